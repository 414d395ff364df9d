"""The size limit of a cache folder, shared by all processes of a machine.

The file ``.room`` holds the number of bytes in use: files in the folder plus space reserved for
downloads. Every change updates it under a lock, so a download that fits costs the same in a folder
of any size (1.3 ms instead of 1.5 s for a scan of 100,000 files). The folder is scanned when a
process opens it, and when the sum exceeds the limit. Only then are files evicted, and enough at a
time that this stays rare. A per-process estimate can't replace the file: it would miss what other
processes download. ::

    NAME           a cached file; its mtime is its last use
    .NAME.lock     a running download holds an exclusive lock on it; its (sparse) length is the
                   reserved space
    .NAME.part     the downloaded bytes so far
    .room          locked exclusively during each change; the sum, in 20 digits

The sum is raised before space is taken and lowered after it was freed. So a kill in between leaves
a sum that is too large, never too small; the next scan corrects it, as it does an unreadable one.

All locks are ``flock`` locks, which end with their process however it ends. What a killed download
left has no lock, and the next scan removes it. A reader holds a shared lock on its file; eviction
takes an exclusive lock first and skips files that are being read.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from shared.machine import lock_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEPT_SHARE = 0.95
"""An eviction continues down to this share of the limit, so that the folder is scanned once per
twentieth of its content."""

_SUM_FILE = ".room"
_DEAD_S = 3600.0
"""Without locks, a download that was not written to for this long is left over from a killed run.
"""
_NO_LOCKS = (
    "runs that share it may download a file twice, exceed data.cache_gb, or evict a file that "
    "another one reads; fix: set data.cache_dir to a folder on a local disk"
)
_SUM = re.compile(rb"\d{20}")


class DiskQuota:
    """The size limit of one cache folder; can be sent to another process.

    Args:
        limit_bytes: of all files and downloads, whichever process or run they belong to.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._has_locks = True

    def lock(self, descriptor: int, operation: int) -> bool:
        """Lock an open file of the folder; return False if another process holds the lock."""
        is_locked = lock_file(descriptor, operation, path=self.folder, loss=_NO_LOCKS)
        self._has_locks = self._has_locks and is_locked is not None
        return is_locked is not False

    def rescan(self) -> None:
        """Correct the sum, remove what killed downloads left, and evict down to the limit.

        Files that are being read stay, even over the limit.
        """
        with self.exclusive() as sum_file:
            self._evict(sum_file, since_ns=None)

    def reserve(self, lock: int, *, length_bytes: int, since_ns: int | None = None) -> bool:
        """Reserve space for a download, instead of what it has; evict the least recently used.

        `since_ns`: files used at this wall-clock time or later are not evicted for it.

        Returns:
            Whether there is space; if not, the download keeps no reservation.
        """
        with self.exclusive() as sum_file:
            reserved = os.fstat(lock).st_size
            total = _read_sum(sum_file)
            if total is not None:
                wanted = total - reserved + length_bytes
                _write_sum(sum_file, max(total, wanted))
            os.ftruncate(lock, length_bytes)
            if total is not None and wanted <= self.limit_bytes:
                _write_sum(sum_file, wanted)
                return True
            if self._evict(sum_file, since_ns=since_ns):
                return True
            os.ftruncate(lock, 0)
            _add_to_sum(sum_file, -length_bytes)
            return False

    def commit_download(self, key: str, lock: int) -> None:
        """Rename a complete download to its name, in the space that was reserved for it."""
        partial = self.partial_path(key)
        with self.exclusive() as sum_file:
            change = partial.stat().st_size - os.fstat(lock).st_size
            os.ftruncate(lock, 0)
            partial.rename(self.folder / key)
            _add_to_sum(sum_file, change)

    def end_download(self, key: str, lock: int) -> None:
        """Remove a download's lock file, and what an aborted one left and had reserved."""
        reserved = os.fstat(lock).st_size
        if not reserved:  # as after a committed download
            self._remove_download(key)
            return
        with suppress(FileNotFoundError), self.exclusive() as sum_file:  # the folder may be gone
            self._remove_download(key)
            _add_to_sum(sum_file, -reserved)

    def remove(self, path: Path) -> None:
        """Remove a file if it exists, even if it is being read."""
        with self.exclusive() as sum_file, suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            _add_to_sum(sum_file, -size)

    def try_lock(self, key: str) -> tuple[int, bool]:
        """Open a download's lock file; return its descriptor and whether it is now locked."""
        path = self.folder / f".{key}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        is_locked = self.lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor, is_locked and os.fstat(descriptor).st_nlink > 0

    def partial_path(self, key: str) -> Path:
        """Return where a download's bytes are written; without locks, each process has its own."""
        own = "" if self._has_locks else f".{os.getpid()}"
        return self.folder / f".{key}{own}.part"

    @contextmanager
    def exclusive(self) -> Iterator[int]:
        """Keep other processes and threads from changing the folder; yield the sum's descriptor."""
        descriptor = os.open(self.folder / _SUM_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.lock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            unlock(descriptor)

    def _evict(self, sum_file: int, *, since_ns: int | None) -> bool:
        """Scan the folder, evict unread files if it is over the limit, and write the sum.

        Call only while :meth:`exclusive`. Returns whether the folder is within the limit now.
        """
        files, total = self._scan()
        limit, lowest = self.limit_bytes, self.limit_bytes * KEPT_SHARE
        is_over = total > limit
        for used_ns, size, path in sorted(files):
            is_enough = not is_over or (total <= limit and total - size < lowest)
            if is_enough or (since_ns is not None and used_ns >= since_ns):
                break
            total -= size if self._remove_unread(path) else 0
        _write_sum(sum_file, total)
        return total <= limit

    def _scan(self) -> tuple[list[tuple[int, int, Path]], int]:
        """Return last use, size and path of every file, and the sum including downloads."""
        files: list[tuple[int, int, Path]] = []
        downloads: dict[str, int] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if not entry.name.startswith("."):
                        files.append((status.st_mtime_ns, status.st_size, self.folder / entry.name))
                    elif entry.name != _SUM_FILE:
                        # A download counts once: as its reservation or its bytes so far.
                        key = entry.name[1:].rpartition(".")[0]
                        if not self._remove_dead(key):
                            downloads[key] = max(downloads.get(key, 0), status.st_size)
        return files, sum(downloads.values()) + sum(size for _, size, _ in files)

    def _remove_dead(self, key: str) -> bool:
        """Remove a download that no process runs; return whether it was one."""
        if not self._has_locks and not self._is_old(key):
            return False
        descriptor, is_locked = self.try_lock(key)
        try:
            if is_locked:
                self._remove_download(key)
        finally:
            unlock(descriptor)
        return is_locked

    def _is_old(self, key: str) -> bool:
        """Return whether a download was not written to for :data:`_DEAD_S`."""
        written_s = [0.0]
        for path in (self.partial_path(key), self.folder / f".{key}.lock"):
            with suppress(FileNotFoundError):
                written_s.append(path.stat().st_mtime)
        return time.time() - max(written_s) > _DEAD_S

    def _remove_unread(self, path: Path) -> bool:
        """Remove a file unless it is being read; return whether it is gone."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        except OSError:  # another user's file
            return False
        try:
            if not self.lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            path.unlink(missing_ok=True)
            return True
        finally:
            unlock(descriptor)

    def _remove_download(self, key: str) -> None:
        self.partial_path(key).unlink(missing_ok=True)
        (self.folder / f".{key}.lock").unlink(missing_ok=True)


def unlock(descriptor: int) -> None:
    """Release a lock and close its file; closing alone leaves it to a process forked meanwhile."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _read_sum(sum_file: int) -> int | None:
    """Read the sum; None if it is missing or unreadable."""
    content = os.pread(sum_file, 20, 0)
    return int(content) if _SUM.fullmatch(content) else None


def _write_sum(sum_file: int, total: int) -> None:
    os.pwrite(sum_file, b"%020d" % max(0, total), 0)


def _add_to_sum(sum_file: int, change: int) -> None:
    """Change the sum, if there is one."""
    total = _read_sum(sum_file)
    if total is not None:
        _write_sum(sum_file, total + change)
