"""The room in a cache's folder: what lies there and what is coming, within a limit that all
processes of a machine keep together.

The sum is kept in the file ``.room`` and changed with everything that takes or gives room, so that
what fits costs the same in a folder of any size. The folder is looked over when a process begins
with it, and when the sum passes the limit: only then is anything removed, and enough at a time that
this stays rare. ::

    NAME           a file: its mtime is its last use
    .NAME.lock     someone fetches it: an exclusive lock on this file; its (sparse) length is the
                   room that is set aside
    .NAME.part     what has come so far
    .room          an exclusive lock on it while room is taken or given; the sum, in 20 digits

The sum is raised before room is taken and lowered after it was given. So a kill in between leaves
one that is too large, never too small; the next look over the folder mends it, as it does one that
can't be read.

Locks are ``flock``'s, which end with their process however it ends; what a killed download left has
no lock, and whoever looks the folder over next removes it. Whoever reads a file has a shared lock
on it; whoever removes one takes an exclusive lock first and leaves alone what is being read.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEPT_SHARE = 0.95
"""Where something has to go, so much more goes that no less than this share of the limit stays: the
folder is looked over once for a twentieth of what it holds."""

_FILE = ".room"
_SUM = re.compile(rb"\d{20}")


class DiskQuota:
    """What a folder may hold; safe to send to another process.

    Args:
        folder: where; it is there.
        limit_bytes: what may lie there, downloads included, whichever process or run they are of.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def look_over(self) -> None:
        """Mend the sum, remove what killed downloads left, and keep the limit as far as nobody
        reads what would have to go.
        """
        with self.alone() as room:
            self._evict(room, since_ns=None)

    def reserve(self, lock: int, length_bytes: int, *, since_ns: int | None = None) -> bool:
        """Set room aside for a download, instead of what it has; removes what was used longest ago.

        Args:
            lock: of the download.
            length_bytes: of what comes.
            since_ns: what was used at this time (of the clock) or later is not removed for it.

        Returns:
            Whether there is room; else the download has none.
        """
        with self.alone() as room:
            held = os.fstat(lock).st_size
            total = _read_sum(room)
            if total is not None:
                wanted = total - held + length_bytes
                _write_sum(room, max(total, wanted))
            os.ftruncate(lock, length_bytes)
            if total is not None and wanted <= self.limit_bytes:
                _write_sum(room, wanted)
                return True
            if self._evict(room, since_ns=since_ns):
                return True
            os.ftruncate(lock, 0)
            _add(room, -length_bytes)
            return False

    def admit(self, key: str, lock: int) -> None:
        """Give a download that is whole its name, in the room that was set aside for it."""
        part = self.part(key)
        with self.alone() as room:
            change = part.stat().st_size - os.fstat(lock).st_size
            os.ftruncate(lock, 0)
            part.rename(self.folder / key)
            _add(room, change)

    def leave(self, key: str, lock: int) -> None:
        """Remove a download's lock, which is ours, and what has come under it; give its room."""
        held = os.fstat(lock).st_size
        if not held:  # as after all that went well
            self._remove_download(key)
            return
        with suppress(FileNotFoundError), self.alone() as room:  # or the whole folder is gone
            self._remove_download(key)
            _add(room, -held)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there, though someone may read it."""
        with self.alone() as room, suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            _add(room, -size)

    def try_lock(self, key: str) -> tuple[int, bool]:
        """The open lock of a download, and whether it is ours."""
        path = self.folder / f".{key}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return descriptor, False
        return descriptor, os.fstat(descriptor).st_nlink > 0

    def part(self, key: str) -> Path:
        """Where a download's bytes come to lie."""
        return self.folder / f".{key}.part"

    @contextmanager
    def alone(self) -> Iterator[int]:
        """No other process or thread takes or gives room meanwhile; the file of the sum."""
        descriptor = os.open(self.folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            unlock(descriptor)

    def _evict(self, room: int, *, since_ns: int | None) -> bool:
        """Count anew, remove what killed downloads left and, where the limit is passed, what was
        used longest ago and nobody reads; whether it is kept now. Only while :meth:`alone`.
        """
        files, total = self._count()
        limit, lowest = self.limit_bytes, self.limit_bytes * KEPT_SHARE
        is_due = total > limit
        for used_ns, size, path in sorted(files):
            is_enough = not is_due or (total <= limit and total - size < lowest)
            if is_enough or (since_ns is not None and used_ns >= since_ns):
                break
            total -= size if _remove_unread(path) else 0
        _write_sum(room, total)
        return total <= limit

    def _count(self) -> tuple[list[tuple[int, int, Path]], int]:
        """Last use, size and path of every file; and the sum, downloads included."""
        files: list[tuple[int, int, Path]] = []
        coming: dict[str, int] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    facts = entry.stat()
                    if not entry.name.startswith("."):
                        files.append((facts.st_mtime_ns, facts.st_size, self.folder / entry.name))
                    elif entry.name != _FILE:
                        key = entry.name[1:].rpartition(".")[0]
                        if not self._remove_dead(key):
                            coming[key] = max(coming.get(key, 0), facts.st_size)
        return files, sum(coming.values()) + sum(size for _, size, _ in files)

    def _remove_dead(self, key: str) -> bool:
        """Remove what a download left that nobody is at; whether it was one."""
        descriptor, is_mine = self.try_lock(key)
        try:
            if is_mine:
                self._remove_download(key)
        finally:
            unlock(descriptor)
        return is_mine

    def _remove_download(self, key: str) -> None:
        self.part(key).unlink(missing_ok=True)
        (self.folder / f".{key}.lock").unlink(missing_ok=True)


def unlock(descriptor: int) -> None:
    """End a lock; a process forked meanwhile would keep one whose descriptor is only closed."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _read_sum(room: int) -> int | None:
    """The sum; None where there is none, or nothing that is one."""
    content = os.pread(room, 20, 0)
    return int(content) if _SUM.fullmatch(content) else None


def _write_sum(room: int, total: int) -> None:
    os.pwrite(room, b"%020d" % max(0, total), 0)


def _add(room: int, change: int) -> None:
    """Change the sum, where there is one."""
    total = _read_sum(room)
    if total is not None:
        _write_sum(room, total + change)


def _remove_unread(path: Path) -> bool:
    """Remove a file unless someone reads it; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:  # another user's file
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        path.unlink(missing_ok=True)
        return True
    finally:
        unlock(descriptor)
