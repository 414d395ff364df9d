"""A size-limited folder of files downloaded from stores, shared by all processes of a machine.

A cached file is named by its checksum, so any number of shard sets, versions of a set and runs can
share a folder. A file is downloaded under another name, checked and then renamed, within the limit
that :mod:`train.data.cache_quota` keeps. So a file that has its name was complete when it got it.

Nothing is flushed to disk: after a power cut a file may hold zeros. The checksum of the index or of
its members detects that, and :meth:`ShardCache.refetch` downloads it again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shared.errors import REBUILD_HINT, ConfigError, CorruptError, StorageError
from shared.files import sha256_of_file
from shared.storage import DISK_FULL, RetryPolicy, Store, with_retry
from train.data.cache_quota import DiskQuota, unlock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SPACE_TIMEOUT_S = 60.0
"""How long a reader waits for other readers to close files in a full cache."""

PREFETCH_ATTEMPTS = 3
"""Attempts to prefetch a file; a reader that needs it continues to retry."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_POLL_S = 0.2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file of a shard set, as its manifest or index names it."""

    name: str
    sha256: str | None
    length_bytes: int | None = None
    """None if unknown: a manifest has no lengths of indexes."""

    def __post_init__(self) -> None:
        # The checksum becomes a file name: a hostile set must not lead out of the folder.
        if not _SHA256.fullmatch(str(self.sha256)):
            raise CorruptError(f"{self.name}: {self.sha256!r} is not a checksum; {REBUILD_HINT}")
        length = self.length_bytes
        if length is not None and (type(length) is not int or length < 0):
            raise CorruptError(f"{self.name}: {length!r} is not a length; {REBUILD_HINT}")

    @property
    def key(self) -> str:
        """File name in a cache: readable, and short enough for every file system."""
        return f"{str(self.sha256)[:32]}.{self.name[-150:]}"


class CacheFullError(StorageError):
    """The cache is full of files that may not be evicted."""


class ShardCache:
    """Files of one store in a folder of this machine; can be sent to another process.

    Args:
        folder: on a local disk; created if missing.
        limit_bytes: of all files and downloads, whichever process or run they belong to.

    Raises:
        ConfigError: the folder can't be used.
    """

    def __init__(self, store: Store, folder: Path, *, limit_bytes: int, retry: RetryPolicy) -> None:
        self.store = store
        self.folder = folder
        self.quota = DiskQuota(folder, limit_bytes)
        self._retry = retry
        self._prefetch_retry = replace(retry, attempts=min(PREFETCH_ATTEMPTS, retry.attempts))
        self._refetched: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.quota.rescan()
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir is {folder}: {error.strerror}; fix: set it to a folder on a local "
                "disk where you may write"
            ) from error

    def open(self, file: CachedFile, *, evict: Callable[[], bool] | None = lambda: False) -> int:
        """Open a file, and download it first if need be; it stays cached as long as it is open.

        `evict`: called while the cache is full: closes an open file, and returns whether there
            was one. None if the file is not worth waiting for space.

        Returns:
            A file descriptor, open for reading.

        Raises:
            FileNotFoundError: the store has no such file.
            CorruptError: the store's file has another length.
            StorageError: the store can't be reached.
            ConfigError: the cache is too small for the file, or for all that is read at a time.
        """
        while True:
            descriptor = self._open_cached(file)
            try:
                if descriptor is None:
                    descriptor = self._fetch(file, wait=True, evict=evict)
            except FileNotFoundError as error:
                if self.folder.is_dir():
                    raise
                raise StorageError(
                    f"{self.folder}: was removed while it was used; fix: run the command again"
                ) from error
            if descriptor is not None:
                return descriptor

    def prefetch(self, file: CachedFile, *, since_ns: int) -> None:
        """Download a file unless it is cached or being downloaded, and mark it as used now.

        `since_ns`: files used at this wall-clock time or later are not evicted for it.

        Raises:
            CacheFullError: there is no space.
            OSError, EngineError: see :meth:`open`.
        """
        descriptor = self._open_cached(file)
        if descriptor is None:
            descriptor = self._fetch(file, wait=False, since_ns=since_ns)
        if descriptor is not None:
            os.close(descriptor)

    def refetch(self, file: CachedFile, *, evict: Callable[[], bool] = lambda: False) -> bool:
        """Download a damaged file again.

        Returns:
            Whether it may be good now. False if this process has refetched it before, so that a
            file that is damaged in the store is not downloaded forever.
        """
        if file.key in self._refetched:
            return False
        self._refetched.add(file.key)
        path = self.path(file)
        with suppress(FileNotFoundError):
            if sha256_of_file(path) != file.sha256:
                _log.warning("%s: differs from its checksum; downloading it again", path)
                self.quota.remove(path)
        os.close(self.open(file, evict=evict))
        return True

    def path(self, file: CachedFile) -> Path:
        """Return the path of a file in the cache, whether it exists or not."""
        return self.folder / file.key

    def _open_cached(self, file: CachedFile) -> int | None:
        """Open a cached file with a shared lock and mark it as used now; None if not cached."""
        try:
            descriptor = os.open(self.path(file), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        self.quota.lock(descriptor, fcntl.LOCK_SH)
        if not os.fstat(descriptor).st_nlink:  # evicted between the two calls
            os.close(descriptor)
            return None
        now_ns = time.time_ns()
        with suppress(PermissionError):  # another user's file
            os.utime(descriptor, ns=(now_ns, now_ns))
        return descriptor

    def _fetch(
        self,
        file: CachedFile,
        *,
        wait: bool,
        evict: Callable[[], bool] | None = None,
        since_ns: int | None = None,
    ) -> int | None:
        """Download a file and open it as :meth:`_open_cached` does.

        Returns None if another process downloaded it or, without `wait`, is downloading it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)  # a user may have removed it
        with self._download_lock(file.key, wait=wait) as lock:
            if lock is None:
                return None
            descriptor = self._open_cached(file)  # another process may have been faster
            if descriptor is not None:
                return descriptor
            expected_bytes = file.length_bytes or 0
            self._reserve(
                file, lock=lock, length_bytes=expected_bytes, evict=evict, since_ns=since_ns
            )
            partial = self.quota.partial_path(file.key)
            try:
                self._download(file, partial, self._retry if wait else self._prefetch_retry)
            except StorageError as error:
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK_FULL:
                    raise StorageError(
                        f"{self.folder}: the disk is full; fix: lower data.cache_gb, or set "
                        "data.cache_dir to a folder on another disk"
                    ) from error
                raise
            size = partial.stat().st_size
            if size > expected_bytes:
                self._reserve(file, lock=lock, length_bytes=size, evict=evict, since_ns=since_ns)
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            self.quota.lock(descriptor, fcntl.LOCK_SH)
            self.quota.commit_download(file.key, lock)
            return descriptor

    def _download(self, file: CachedFile, partial: Path, retry: RetryPolicy) -> None:
        """Download a file until its bytes match the checksum.

        The same wrong bytes twice mean that the store holds them. If their length is right they
        are accepted: every member has a checksum of its own, so only samples whose members are
        damaged are lost, as in a local set.
        """
        seen: set[str] = set()

        def download() -> None:
            self.store.download(file.name, partial)
            digest = sha256_of_file(partial)
            if digest == file.sha256:
                return
            length = partial.stat().st_size
            expected = "" if file.length_bytes is None else f"{file.length_bytes} bytes with "
            summary = (
                f"{self.store}/{file.name}: received {length} bytes with checksum "
                f"{digest[:12]}..., not {expected}{str(file.sha256)[:12]}..."
            )
            if digest not in seen:
                seen.add(digest)
                raise StorageError(summary, is_transient=True)
            damage = f"{summary}, twice: it is damaged in the store; fix: upload it again"
            if file.length_bytes not in {None, length}:
                raise CorruptError(damage)
            _log.warning("%s", damage)

        with_retry(download, retry=retry)

    @contextmanager
    def _download_lock(self, key: str, *, wait: bool) -> Iterator[int | None]:
        """Lock a download; at the end, remove the lock file and what was not committed.

        Yields None if another process holds the lock or has just finished the download.
        """
        # A rescan tries all locks; without this, it would look like a running download.
        with self.quota.exclusive():
            descriptor, is_locked = self.quota.try_lock(key)
        try:
            if not is_locked and wait:
                self.quota.lock(descriptor, fcntl.LOCK_EX)
                is_locked = os.fstat(descriptor).st_nlink > 0
            if not is_locked:
                yield None
                return
            try:
                yield descriptor
            finally:
                self.quota.end_download(key, descriptor)
        finally:
            unlock(descriptor)

    def _reserve(
        self,
        file: CachedFile,
        *,
        lock: int,
        length_bytes: int,
        evict: Callable[[], bool] | None,
        since_ns: int | None,
    ) -> None:
        """Reserve space for a download; evict the least recently used files."""
        limit_bytes = self.quota.limit_bytes
        if length_bytes > limit_bytes:
            raise ConfigError(
                f"{self.store}/{file.name} has {length_bytes / 1e9:.3g} GB, data.cache_gb allows "
                f"{limit_bytes / 1e9:.3g} for the whole cache; fix: raise data.cache_gb"
            )
        begin_s = time.monotonic()
        while True:
            attempt_s = time.monotonic()
            if self.quota.reserve(lock, length_bytes=length_bytes, since_ns=since_ns):
                return
            if evict is None:
                raise CacheFullError(f"{self.folder}: no space for {file.name}")
            if evict():
                continue
            if time.monotonic() - begin_s > SPACE_TIMEOUT_S:
                raise ConfigError(
                    f"{self.folder}: no space for {file.name}: all files in it are being read or "
                    f"downloaded; fix: raise data.cache_gb ({limit_bytes / 1e9:.3g}) to the size "
                    "of two blocks of data.shuffle_block_shards shards for each run that uses it "
                    "(and each set of a mix), or lower data.shuffle_block_shards"
                )
            # A scan of a large folder takes long and blocks others, so wait as long as it took.
            time.sleep(max(_POLL_S, time.monotonic() - attempt_s))
