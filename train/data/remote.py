"""A shard set behind a URL, by way of this machine's cache: whole files, each fetched once per
machine, only indexes and the columns that are read.

What can go wrong, and what becomes of it:

- The store can't be reached, or breaks off: tried again for minutes, then a StorageError ends the
  run. It is never taken for bad data: the whole set would be replaced.
- Bytes differ from their checksum: fetched again. Twice the same wrong ones are damage in the
  store: those samples are corrupt (see :mod:`train.data.loader`) whose members are, as in a local
  set.
- A file is not there, or twice of another length: its samples are corrupt. When the set's manifest
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
from typing import TYPE_CHECKING

from shared.errors import CorruptError, ShardError, StorageError
from shared.files import sha256_of_bytes
from shared.shardset.columns import ColumnFile
from shared.shardset.index import ShardIndex, parse_index
from shared.shardset.manifest import MANIFEST_FILE, parse_manifest
from shared.storage import STARTUP_RETRY, RetryPolicy, Store, with_retry
from train.data.cache import RemoteFile, ShardCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shared.shardset.manifest import Manifest, ShardEntry

AHEAD_THREADS = 4
"""Downloads ahead at a time in each process; one stream from an object store gives some 50 MB/s."""

_log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """``vr-creature/shards`` where the user's caches lie (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vr-creature" / "shards"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Where copies lie, how much of them, and how long a store is tried."""

    folder: Path = field(default_factory=default_cache_dir)
    limit_bytes: int = 64 * 10**9
    patience: RetryPolicy = field(default_factory=RetryPolicy)


class RemoteFiles:
    """Files of a shard set behind a URL; safe to send to another process, and to fork.

    Args:
        store: the set.
        settings: of the cache.

    Raises:
        ShardError: no such set, or it can't be read.
        StorageError: the store can't be reached.
        ConfigError: the cache can't be used.
    """

    def __init__(self, store: Store, settings: CacheSettings) -> None:
        self._store = store
        self._settings = settings
        attempts = min(STARTUP_RETRY.attempts, settings.patience.attempts)
        first = replace(settings.patience, attempts=attempts)
        self.manifest, self._manifest_sha256 = with_retry(self._read_manifest, patience=first)
        self._cache = ShardCache(
            store, settings.folder, limit_bytes=settings.limit_bytes, patience=settings.patience
        )
        self._lost: dict[str, str] = {}
        self._ahead = _Ahead()
        self.tokenizer = self.manifest.load_tokenizer(self._tokenizer_bytes())

    def _read_manifest(self) -> tuple[Manifest, str]:
        """The manifest and its checksum; one that can't be parsed may have been cut on its way."""
        path = f"{self._store}/{MANIFEST_FILE}"
        try:
            content = self._store.read(MANIFEST_FILE)
            manifest = parse_manifest(content, root=self._settings.folder, path=path)
        except FileNotFoundError as error:
            raise ShardError(
                f"{self._store}: no such shard set; is the address that of the folder with "
                f"{MANIFEST_FILE}?"
            ) from error
        except CorruptError as error:
            raise StorageError(str(error), is_transient=True) from error
        return manifest, sha256_of_bytes(content)

    def open_index(self, entry: ShardEntry, *, evict: Callable[[], bool]) -> ShardIndex:
        """A shard's index.

        Raises:
            CorruptError: it is missing or damaged.
            StorageError, ConfigError: see :meth:`train.data.cache.ShardCache.open`.
        """
        file = RemoteFile(entry.index_file, entry.index_sha256)
        try:
            return self._read_index(file, evict)
        except CorruptError:
            if file.name in self._lost or not self._cache.renew(file, evict=evict):
                raise
            return self._read_index(file, evict)

    def open_column(
        self, index: ShardIndex, column: str, *, evict: Callable[[], bool]
    ) -> ColumnFile:
        """A column's file; it stays in the cache as long as it is open.

        Raises:
            CorruptError: it is missing.
            StorageError, ConfigError: see :meth:`train.data.cache.ShardCache.open`.
        """
        file = _column_file(index, column)
        return ColumnFile(
            self._cache.path(file),
            descriptor=self._open(file, evict),
            origin=f"{self._store}/{file.name}",
        )

    def refetch_column(self, index: ShardIndex, column: str, *, evict: Callable[[], bool]) -> bool:
        """Fetch a column again that turned out damaged; whether it may be good now."""
        return self._cache.renew(_column_file(index, column), evict=evict)

    def fetch_ahead(self, entries: Iterable[ShardEntry], columns: Sequence[str]) -> None:
        """Fetch shards in the background, in this order; what was asked before and has not begun
        is dropped.
        """
        since_ns = time.time_ns()

        def fetch(entry: ShardEntry) -> Callable[[], None]:
            return lambda: self._fetch_shard(entry, columns, since_ns)

        self._ahead.run(fetch(entry) for entry in entries)

    def close(self) -> None:
        """Begin no more downloads."""
        self._ahead.run(())

    def _fetch_shard(self, entry: ShardEntry, columns: Sequence[str], since_ns: int) -> None:
        file = RemoteFile(entry.index_file, entry.index_sha256)
        self._cache.fetch_ahead(file, since_ns=since_ns)
        index = self._read_index(file, None)
        for file in (_column_file(index, column) for column in columns):
            if file.name not in self._lost:
                self._cache.fetch_ahead(file, since_ns=since_ns)

    def _read_index(self, file: RemoteFile, evict: Callable[[], bool] | None) -> ShardIndex:
        with os.fdopen(self._open(file, evict), "rb") as opened:
            content = opened.read()
        return parse_index(content, origin=f"{self._store}/{file.name}", sha256=file.sha256)

    def _tokenizer_bytes(self) -> bytes:
        file = RemoteFile(self.manifest.tokenizer_file, self.manifest.tokenizer_sha256)
        with os.fdopen(self._open(file, lambda: False), "rb") as opened:
            return opened.read()

    def _open(self, file: RemoteFile, evict: Callable[[], bool] | None) -> int:
        """See :meth:`train.data.cache.ShardCache.open`; a file that the store has lost is asked for
        only once.
        """
        if file.name in self._lost:
            raise CorruptError(self._lost[file.name])
        try:
            return self._cache.open(file, evict=evict)
        except FileNotFoundError as error:
            self._require_same_set(file.name)
            self._lost[file.name] = f"{self._store}/{file.name}: is not there"
            raise CorruptError(self._lost[file.name]) from error
        except CorruptError as error:
            self._lost[file.name] = str(error)
            raise

    def _require_same_set(self, missing: str) -> None:
        """Refuse to go on with a set that was replaced.

        Raises:
            StorageError: the manifest is another one now, or gone.
        """
        try:
            content = with_retry(
                lambda: self._store.read(MANIFEST_FILE), patience=self._settings.patience
            )
        except FileNotFoundError:
            content = b""
        if sha256_of_bytes(content) == self._manifest_sha256:
            return
        state = "has been updated" if content else "has been removed"
        raise StorageError(
            f"{self._store}: {missing} is not there any more: the set {state} since this run read "
            "its manifest. Start again to train on the set as it is now; a checkpoint goes on "
            "(--resume auto) where the old set's files are"
        )


class _Ahead:
    """Runs jobs in a few threads, which end when nothing is left to do."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._num_threads = 0

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Do these instead of those that have not begun."""
        if self._process != os.getpid():  # the threads stayed behind, one with the lock perhaps
            self._process, self._num_threads, self._lock = os.getpid(), 0, threading.Lock()
        with self._lock:
            self._jobs = deque(jobs)
            while self._num_threads < min(AHEAD_THREADS, len(self._jobs)):
                self._num_threads += 1
                threading.Thread(target=self._work, name="fetch-ahead", daemon=True).start()

    def __reduce__(self) -> tuple[type[_Ahead], tuple[()]]:
        """Another process begins with nothing to do."""
        return _Ahead, ()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._num_threads -= 1
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception as error:  # whoever needs it meets it again, and says so
                _log.debug("not fetched ahead: %s", error)


def _column_file(index: ShardIndex, column: str) -> RemoteFile:
    entry = index.columns[column]
    return RemoteFile(entry["file"], str(entry.get("sha256")), entry.get("length_bytes"))
