"""A size-limited folder of files that come from stores, shared by all processes of a machine.

Files are named by the checksum of what they hold, so any number of shard sets, versions of a set
and runs can share a folder, and what has its name was whole when it got it: it is fetched under
another name, checked and renamed, in room that :mod:`train.data.cache_quota` sets aside.

Nothing is flushed to the disk: after a power cut a file may hold zeros. Its index or its members'
checksums tell, and :meth:`ShardCache.renew` fetches it again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shared.errors import ConfigError, CorruptError, StorageError
from shared.files import sha256_of_file
from shared.storage import RetryPolicy, Store, with_retry
from train.data.cache_quota import DiskQuota, unlock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROOM_PATIENCE_S = 60.0
"""So long a reader waits for others to let go of files before it gives up."""

AHEAD_ATTEMPTS = 3
"""A file that is fetched ahead is tried so often; whoever needs it then tries on."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_POLL_S = 0.2
_FULL = {errno.ENOSPC, errno.EDQUOT}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a shard set as its manifest or index names it.

    Raises:
        CorruptError: no checksum or no length.
    """

    name: str
    sha256: str
    length_bytes: int | None = None
    """None where nobody says: a manifest doesn't of indexes."""

    def __post_init__(self) -> None:
        # It becomes a file name: a hostile set must not lead out of the folder.
        if not _SHA256.fullmatch(str(self.sha256)):
            raise CorruptError(f"{self.name}: {self.sha256!r} is no checksum; rebuild the set")
        length = self.length_bytes
        if length is not None and (type(length) is not int or length < 0):
            raise CorruptError(f"{self.name}: {length!r} is no length; rebuild the set")

    @property
    def key(self) -> str:
        """Its name in a cache: short enough for every file system, and telling."""
        return f"{self.sha256[:32]}.{self.name[-150:]}"


class CacheFullError(StorageError):
    """There is no room, and nothing that may be removed."""


class ShardCache:
    """Files of one store in a folder of this machine; safe to send to another process.

    Args:
        store: where they come from.
        folder: on a local disk; made where there is none.
        limit_bytes: what may lie there, downloads included, whichever process or run they are of.
        patience: with the store.

    Raises:
        ConfigError: the folder can't be used.
    """

    def __init__(
        self, store: Store, folder: Path, *, limit_bytes: int, patience: RetryPolicy
    ) -> None:
        self.store = store
        self.folder = folder
        self.room = DiskQuota(folder, limit_bytes)
        self._patience = patience
        self._impatience = replace(patience, attempts=min(AHEAD_ATTEMPTS, patience.attempts))
        self._renewed: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.room.look_over()
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir is {folder}: {error.strerror}; set it to a folder on a local disk "
                "where you may write"
            ) from error

    def open(self, file: RemoteFile, *, evict: Callable[[], bool] | None = lambda: False) -> int:
        """A descriptor to read a file by, which keeps it in the cache as long as it is open.

        Args:
            file: fetched, if it is not there.
            evict: called where there is no room: closes something, or says that nothing is left
                to close. None where the file is not worth waiting for room.

        Raises:
            FileNotFoundError: the store has no such file.
            CorruptError: the store's has another length.
            StorageError: it can't be reached.
            ConfigError: the cache is too small for it, or for all that its users read at a time.
        """
        while True:
            descriptor = self._open_here(file)
            try:
                if descriptor is None:
                    descriptor = self._fetch(file, wait=True, evict=evict)
            except FileNotFoundError as error:
                if self.folder.is_dir():
                    raise
                raise StorageError(
                    f"{self.folder}: was removed while it was used; run the command again"
                ) from error
            if descriptor is not None:
                return descriptor

    def fetch_ahead(self, file: RemoteFile, *, since_ns: int) -> None:
        """Fetch a file, unless it is there or someone is at it; it counts as used now.

        Args:
            file: which.
            since_ns: what was used at this time (of the clock) or later is not removed for it.

        Raises:
            CacheFullError: there is no room.
            OSError, EngineError: as of :meth:`open`.
        """
        descriptor = self._open_here(file)
        if descriptor is None:
            descriptor = self._fetch(file, wait=False, since_ns=since_ns)
        if descriptor is not None:
            os.close(descriptor)

    def renew(self, file: RemoteFile, *, evict: Callable[[], bool] = lambda: False) -> bool:
        """Fetch again a file that turned out to be damaged.

        Returns:
            Whether it may be good now; False where this process asked for that before, so that
            damage in the store itself is not fetched for ever.

        Raises:
            OSError, EngineError: as of :meth:`open`.
        """
        if file.key in self._renewed:
            return False
        self._renewed.add(file.key)
        path = self.folder / file.key
        with suppress(FileNotFoundError):
            if sha256_of_file(path) != file.sha256:
                _log.warning("%s: differs from its checksum; fetched again", path)
                self.room.remove(path)
        os.close(self.open(file, evict=evict))
        return True

    def path(self, file: RemoteFile) -> Path:
        """Where a file lies, when it is there."""
        return self.folder / file.key

    def _open_here(self, file: RemoteFile) -> int | None:
        """A descriptor with a shared lock, where the file is there; marks it as used now."""
        try:
            descriptor = os.open(self.folder / file.key, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.fstat(descriptor).st_nlink:  # removed between the two calls
            os.close(descriptor)
            return None
        now_ns = time.time_ns()
        with suppress(PermissionError):  # another user's file
            os.utime(descriptor, ns=(now_ns, now_ns))
        return descriptor

    def _fetch(
        self,
        file: RemoteFile,
        *,
        wait: bool,
        evict: Callable[[], bool] | None = None,
        since_ns: int | None = None,
    ) -> int | None:
        """As :meth:`_open_here` of a file that was fetched; None where another process did that or,
        without `wait`, is at it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)  # whoever tidies up may have removed it
        with self._alone(file.key, wait=wait) as lock:
            if lock is None:
                return None
            descriptor = self._open_here(file)  # another was faster
            if descriptor is not None:
                return descriptor
            expected = file.length_bytes or 0
            self._make_room(lock, file, expected, evict, since_ns)
            part = self.room.part(file.key)
            try:
                self._download(file, part, self._patience if wait else self._impatience)
            except StorageError as error:
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
                    raise StorageError(
                        f"{self.folder}: the disk is full; lower data.cache_gb, or set "
                        "data.cache_dir to a folder on another disk"
                    ) from error
                raise
            if part.stat().st_size > expected:
                self._make_room(lock, file, part.stat().st_size, evict, since_ns)
            descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self.room.admit(file.key, lock)
            return descriptor

    def _download(self, file: RemoteFile, part: Path, patience: RetryPolicy) -> None:
        """Fetch the bytes that the checksum means.

        The same wrong bytes twice are how the store has them. Where their length is right they are
        taken all the same: every member has a checksum of its own, so that only those samples are
        lost that are really damaged, as in a local set.
        """
        seen: set[str] = set()

        def fetch() -> None:
            self.store.fetch(file.name, part)
            digest = sha256_of_file(part)
            if digest == file.sha256:
                return
            length = part.stat().st_size
            wanted = "" if file.length_bytes is None else f"{file.length_bytes} bytes with "
            summary = (
                f"{self.store}/{file.name}: {length} bytes with checksum {digest[:12]}... came, "
                f"not {wanted}{file.sha256[:12]}..."
            )
            if digest not in seen:
                seen.add(digest)
                raise StorageError(summary, is_transient=True)
            if file.length_bytes not in {None, length}:
                raise CorruptError(f"{summary}, twice: it is damaged in the store; upload it again")
            _log.warning("%s, twice: it is damaged in the store; upload it again", summary)

        with_retry(fetch, patience=patience)

    @contextmanager
    def _alone(self, key: str, *, wait: bool) -> Iterator[int | None]:
        """The lock of a download; None where someone else has it or has just finished. In the end
        the lock and what has come under it are gone.
        """
        with self.room.alone():  # whoever looks the folder over tries all locks, and is no download
            descriptor, is_mine = self.room.try_lock(key)
        try:
            if not is_mine and wait:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                is_mine = os.fstat(descriptor).st_nlink > 0
            if not is_mine:
                yield None
                return
            try:
                yield descriptor
            finally:
                self.room.leave(key, descriptor)
        finally:
            unlock(descriptor)

    def _make_room(
        self,
        lock: int,
        file: RemoteFile,
        length_bytes: int,
        evict: Callable[[], bool] | None,
        since_ns: int | None,
    ) -> None:
        """Set room aside for a download; removes what was used longest ago.

        Args:
            lock: of the download.
            file: what is fetched.
            length_bytes: of it.
            evict: as of :meth:`open`; None does not wait for others.
            since_ns: as of :meth:`fetch_ahead`.
        """
        limit_bytes = self.room.limit_bytes
        if length_bytes > limit_bytes:
            raise ConfigError(
                f"{self.store}/{file.name} has {length_bytes / 1e9:.3g} GB, data.cache_gb allows "
                f"{limit_bytes / 1e9:.3g} for the whole cache; raise it"
            )
        begin_s = time.monotonic()
        while True:
            tried_s = time.monotonic()
            if self.room.reserve(lock, length_bytes, since_ns=since_ns):
                return
            if evict is None:
                raise CacheFullError(f"{self.folder}: no room for {file.name}")
            if evict():
                continue
            if time.monotonic() - begin_s > ROOM_PATIENCE_S:
                raise ConfigError(
                    f"{self.folder}: no room for {file.name}: all that lies there is being read or "
                    f"fetched; raise data.cache_gb ({limit_bytes / 1e9:.3g}) to the size of "
                    "two blocks of data.shuffle_block_shards shards for each run that uses it (and "
                    "each set of a mix), or lower data.shuffle_block_shards"
                )
            # Looking over a large folder takes long, and others wait for it meanwhile.
            time.sleep(max(_POLL_S, time.monotonic() - tried_s))
