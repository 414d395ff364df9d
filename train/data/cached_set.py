"""A shard set behind a URL, read through this machine's cache.

Whole files are downloaded, each once per machine, and only indexes and the columns that are read.
Failures are handled by kind:

- The store can't be reached, or the transfer breaks: requests are retried for minutes, then a
  StorageError ends the run. This never counts as corrupt data, because then substitutes would
  replace the whole set.
- Bytes differ from their checksum: the file is downloaded again. The same wrong bytes twice mean
  that the store holds them. Then only samples whose members are damaged are corrupt (see
  :mod:`train.data.loader`), as in a local set.
- A file is missing, or twice has another length: its samples are corrupt. If the set's manifest
  has changed since this run read it, the run ends by a StorageError instead.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

from shared.errors import CorruptError, ShardError, StorageError
from shared.files import sha256_of_bytes
from shared.machine import warn_once
from shared.shardset.columns import ColumnFile
from shared.shardset.index import ShardIndex, parse_index
from shared.shardset.manifest import MANIFEST_FILE, parse_manifest
from shared.shardset.store import no_such_set_message
from shared.storage import STARTUP_RETRY, RetryPolicy, Store, with_retry
from train.data.cache import CachedFile, ShardCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shared.shardset.manifest import Manifest, ShardEntry

PREFETCH_THREADS = 4
"""Parallel downloads per process; one stream from an object store gives about 50 MB/s."""

_log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Return ``vr-creature/shards`` in the user's cache folder (XDG Base Directory).

    A user without a home folder has one in the folder of temporary files.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        folder = Path(gettempdir()) / f"cache-of-user-{os.getuid()}"
        warn_once(
            f"this user has no home folder, so copies of shard sets are kept in {folder}; fix: set "
            "data.cache_dir to a folder on a local disk"
        )
    return folder / "vr-creature" / "shards"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Folder and size limit of the cache, and how long requests to a store are retried."""

    folder: Path | None = None
    """None means :func:`default_cache_dir`."""
    limit_bytes: int = 64 * 10**9
    retry: RetryPolicy = field(default_factory=RetryPolicy)


class CachedShardSet:
    """A remote shard set; a :class:`shared.shardset.store.ShardSetReader` that can be forked.

    It can be pickled; background downloads stay in their process.

    Args:
        evict: called when the cache is full: closes a file that this process reads, and returns
            whether one was open.

    Raises:
        ShardError: no such set, or it can't be read.
        StorageError: the store can't be reached.
        ConfigError: the cache can't be used.
    """

    def __init__(self, store: Store, settings: CacheSettings, *, evict: Callable[[], bool]) -> None:
        self._store = store
        self._settings = settings
        self._folder = settings.folder or default_cache_dir()
        self._evict = evict
        attempts = min(STARTUP_RETRY.attempts, settings.retry.attempts)
        first_retry = replace(settings.retry, attempts=attempts)
        self.manifest, self._manifest_sha256 = with_retry(self._read_manifest, retry=first_retry)
        self._cache = ShardCache(
            store, self._folder, limit_bytes=settings.limit_bytes, retry=settings.retry
        )
        self._missing: dict[str, str] = {}
        self._downloads = _BackgroundJobs()
        name = self.manifest.tokenizer_file
        file = CachedFile(name, self.manifest.tokenizer_sha256)
        content = self._read(file, evict=lambda: False)
        self.tokenizer = self.manifest.load_tokenizer(content, origin=f"{store}/{name}")

    def _read_manifest(self) -> tuple[Manifest, str]:
        """Read the manifest and its checksum; one that can't be parsed is retried.

        A failed transfer may have cut it off.
        """
        path = f"{self._store}/{MANIFEST_FILE}"
        try:
            content = self._store.read(MANIFEST_FILE)
            manifest = parse_manifest(content, root=self._folder, path=path)
        except FileNotFoundError as error:
            raise ShardError(no_such_set_message(self._store)) from error
        except CorruptError as error:
            raise StorageError(str(error), is_transient=True) from error
        return manifest, sha256_of_bytes(content)

    def read_index(self, name: str, *, sha256: str | None = None) -> ShardIndex:
        """Read an index."""
        file = CachedFile(name, sha256)
        try:
            return self._parse_index(file, evict=self._evict)
        except CorruptError:
            if name in self._missing or not self._cache.refetch(file, evict=self._evict):
                raise
            return self._parse_index(file, evict=self._evict)

    def open_column(
        self, name: str, *, sha256: str | None = None, length_bytes: int | None = None
    ) -> ColumnFile:
        """Open a column; the cache keeps it as long as it is open."""
        file = CachedFile(name, sha256, length_bytes)
        return ColumnFile(
            self._cache.path(file),
            descriptor=self._open(file, evict=self._evict),
            origin=f"{self._store}/{name}",
        )

    def refetch_column(self, index: ShardIndex, column: str) -> bool:
        """Download a damaged column again; return whether it may be good now."""
        return self._cache.refetch(_column_file(index, column), evict=self._evict)

    def prefetch(self, entries: Iterable[ShardEntry], columns: Sequence[str]) -> None:
        """Download shards in the background, in this order.

        Replaces earlier requests whose download has not begun.
        """
        since_ns = time.time_ns()

        def download(entry: ShardEntry) -> Callable[[], None]:
            return lambda: self._download_shard(entry, columns, since_ns)

        self._downloads.replace(download(entry) for entry in entries)

    def close(self) -> None:
        """Start no more downloads."""
        self._downloads.replace(())

    def _download_shard(self, entry: ShardEntry, columns: Sequence[str], since_ns: int) -> None:
        file = CachedFile(entry.index_file, entry.index_sha256)
        self._cache.prefetch(file, since_ns=since_ns)
        index = self._parse_index(file, evict=None)
        for file in (_column_file(index, column) for column in columns):
            if file.name not in self._missing:
                self._cache.prefetch(file, since_ns=since_ns)

    def _parse_index(self, file: CachedFile, *, evict: Callable[[], bool] | None) -> ShardIndex:
        content = self._read(file, evict=evict)
        return parse_index(content, origin=f"{self._store}/{file.name}", sha256=file.sha256)

    def _read(self, file: CachedFile, *, evict: Callable[[], bool] | None) -> bytes:
        with os.fdopen(self._open(file, evict=evict), "rb") as opened:
            return opened.read()

    def _open(self, file: CachedFile, *, evict: Callable[[], bool] | None) -> int:
        """Open a file through the cache; a file that the store lacks is requested only once.

        See :meth:`train.data.cache.ShardCache.open`.
        """
        if file.name in self._missing:
            raise CorruptError(self._missing[file.name])
        try:
            return self._cache.open(file, evict=evict)
        except FileNotFoundError as error:
            self._require_same_manifest(file.name)
            self._missing[file.name] = f"{self._store}/{file.name}: does not exist"
            raise CorruptError(self._missing[file.name]) from error
        except CorruptError as error:
            self._missing[file.name] = str(error)
            raise

    def _require_same_manifest(self, missing: str) -> None:
        """Refuse to continue with a set that was replaced."""
        try:
            content = with_retry(
                lambda: self._store.read(MANIFEST_FILE), retry=self._settings.retry
            )
        except FileNotFoundError:
            content = b""
        if sha256_of_bytes(content) == self._manifest_sha256:
            return
        state = "has been updated" if content else "has been removed"
        raise StorageError(
            f"{self._store}: {missing} no longer exists: the set {state} since this run read its "
            "manifest; fix: start again to train on the set as it is now; a checkpoint resumes "
            "(--resume auto) where the old set's files are"
        )


class _BackgroundJobs:
    """Runs jobs in a few threads, which end when no job is left."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._num_threads = 0

    def replace(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Run these jobs instead of those that have not begun."""
        if self._process != os.getpid():  # after a fork: no threads, and the lock may be held
            self._process, self._num_threads, self._lock = os.getpid(), 0, threading.Lock()
        with self._lock:
            self._jobs = deque(jobs)
            while self._num_threads < min(PREFETCH_THREADS, len(self._jobs)):
                self._num_threads += 1
                threading.Thread(target=self._work, name="prefetch-shards", daemon=True).start()

    def __reduce__(self) -> tuple[type[_BackgroundJobs], tuple[()]]:
        """Let another process start without jobs."""
        return _BackgroundJobs, ()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._num_threads -= 1
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception as error:  # a reader that needs the file meets the error itself
                _log.debug("not prefetched: %s", error)


def _column_file(index: ShardIndex, column: str) -> CachedFile:
    header = index.columns[column]
    return CachedFile(header["file"], header.get("sha256"), header.get("length_bytes"))
