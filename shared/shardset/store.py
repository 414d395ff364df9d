"""The files of one shard set, in a folder or behind a URL.

:class:`LocalShardSet` and :class:`RemoteShardSet` share one protocol, :class:`ShardSetStore`. Any
process may read a set at any time. One job at a time claims a set and writes to it
(:func:`claim_shard_set`): a task writes its files in a staging directory and puts each finished
file into the set, by a rename in a folder and by an upload behind a URL.

A later job takes over from a killed one. What is left of the earlier job, such as a worker whose
client was killed, can put no more files: in a folder its staging directory is gone, and behind a
URL the claim file names another job.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar
from uuid import uuid4

from shared.errors import CorruptError, JobError, ShardError, rebuild_hint
from shared.files import publish_file, sha256_of_file, write_atomic
from shared.machine import read_bytes, temporary_folder
from shared.shardset.columns import ColumnFile
from shared.shardset.index import ShardIndex, open_index, parse_index
from shared.shardset.locks import exclusive_lock, has_readers
from shared.shardset.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    parse_manifest,
    read_manifest,
    require_format,
)
from shared.shardset.staging import (
    discard,
    disk_errors,
    job_folder,
    remove_leftover,
    staging_folder,
)
from shared.storage import STARTUP_RETRY, RetryPolicy, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

KEEP_OLD_S = 24 * 3600.0
"""How long files of a replaced set stay behind a URL, for processes that still read it."""

_CLAIM_FILE = ".run.tmp"
_TAKEN_OVER = (
    "another job has taken over this shard set, or this machine does not see its folder; fix: run "
    "one job at a time, on machines that share the folder"
)
_JOB_FILE = re.compile(r"\.[0-9a-f]{12}\.tmp/")
"""How names of a job's own files in a store begin; see :func:`job_file`."""

_HEAD_BYTES = 4096
_NUM_REQUESTS = 16
"""Requests for small files at a time behind a URL, where each waits for the network."""

_T = TypeVar("_T")
_R = TypeVar("_R")
_REPLACED_KEY = "replaced_s"
"""Key in copies of replaced manifests: when that happened, in seconds since 1970."""


class ShardSetReader(Protocol):
    """Read access to the indexes and columns of one shard set."""

    def read_index(self, name: str, *, sha256: str | None = None) -> ShardIndex:
        """Read one index; see :func:`shared.shardset.index.open_index`."""
        ...

    def open_column(
        self, name: str, *, sha256: str | None = None, length_bytes: int | None = None
    ) -> ColumnFile:
        """Open a column for reading; the caller closes it.

        A cache needs the checksum from the index and uses the size; others ignore both.

        Raises:
            ShardError: the file is missing.
        """
        ...


class ShardSetStore(ShardSetReader, Protocol):
    """All files of one shard set; a plain value that can be sent to other processes."""

    @property
    def root(self) -> Path:
        """The set's folder, or the folder of local copies of a remote set's small files."""
        ...

    @property
    def job_id(self) -> str:
        """ID of the job that claimed the set; empty for reading."""
        ...

    def read_manifest(self) -> Manifest:
        """Read the manifest; see :func:`shared.shardset.manifest.read_manifest`."""
        ...

    def list_sizes(self) -> dict[str, int]:
        """List all files: name -> size in bytes."""
        ...

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        ...

    def copy_to(self, name: str, path: Path, *, sha256: str) -> None:
        """Copy a file of the set to a path on this machine, or link it there.

        Raises:
            CorruptError: a copied file is missing or differs from its checksum.
        """
        ...

    def staging_dir(self) -> AbstractContextManager[Path]:
        """Make a directory for one task and remove it at the end.

        Raises:
            JobError: another job took over the set, or the disk is full.
        """
        ...

    def put(self, path: Path, name: str) -> None:
        """Move or upload a finished file from a staging directory into the set.

        Raises:
            JobError: another job took over the set.
        """
        ...

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a small file, atomically.

        Raises:
            JobError: another job took over the set.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        ...

    def retain_manifest(self, name: str, *, is_extended: bool = False) -> bool:
        """Keep the manifest that is about to be replaced under another name.

        :meth:`has_readers` then tells whether its files are still in use. `is_extended` says that
        the new manifest has all of its files. Returns whether it was kept.
        """
        ...

    def has_readers(self, name: str) -> bool:
        """Return whether a process reads, or may still read, by a retained manifest."""
        ...


@dataclass(frozen=True, slots=True)
class LocalShardSet:
    """A shard set in a folder; see :class:`ShardSetStore`."""

    root: Path
    job_id: str = ""

    def __str__(self) -> str:
        return str(self.root)

    def read_manifest(self) -> Manifest:
        """Read the manifest."""
        return read_manifest(self.root)

    def read_index(self, name: str, *, sha256: str | None = None) -> ShardIndex:
        """Read one index."""
        return open_index(self.root / name, sha256=sha256)

    def open_column(
        self, name: str, *, sha256: str | None = None, length_bytes: int | None = None
    ) -> ColumnFile:
        """Open a column for reading."""
        return ColumnFile(self.root / name)

    def list_sizes(self) -> dict[str, int]:
        """List all files: name -> size in bytes."""
        with os.scandir(self.root) as entries:
            return {e.name: e.stat().st_size for e in entries if e.is_file()}

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        try:
            return read_bytes(self.root / name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def copy_to(self, name: str, path: Path, *, sha256: str) -> None:
        """Link a file to a path, or copy it if linking is impossible; trusts the file system."""
        try:
            path.hardlink_to(self.root / name)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(self.root / name, path)

    @contextmanager
    def staging_dir(self) -> Iterator[Path]:
        """Make a directory on the set's disk for one task and remove it at the end."""
        folder = job_folder(self.root, self.job_id) / uuid4().hex[:12]
        try:
            folder.mkdir()
        except FileNotFoundError as error:
            raise JobError(f"{self.root}: {_TAKEN_OVER}") from error
        try:
            with disk_errors(self.root):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, path: Path, name: str) -> None:
        """Move a finished file from a staging directory into the set."""
        try:
            publish_file(path, self.root / name)
        except FileNotFoundError as error:
            raise JobError(f"{self.root}: {_TAKEN_OVER}") from error

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a small file, atomically."""
        write_atomic(self.root / name, content)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        (self.root / name).unlink(missing_ok=True)

    def retain_manifest(self, name: str, *, is_extended: bool = False) -> bool:
        """Link the manifest to a second name, so that its reader locks stay visible."""
        path = self.root / name
        with suppress(FileNotFoundError):
            if path.samefile(self.root / MANIFEST_FILE):
                return True
            path.unlink()
        with suppress(OSError):  # without links, reader locks on old manifests are not visible
            path.hardlink_to(self.root / MANIFEST_FILE)
            return True
        return False

    def has_readers(self, name: str) -> bool:
        """Return whether a process holds a reader lock on a retained manifest."""
        return has_readers(self.root / name)


@dataclass(frozen=True, slots=True)
class RemoteShardSet:
    """A shard set behind a URL; see :class:`ShardSetStore`."""

    store: Store
    job_id: str
    """ID of the job that claimed the set; empty for reading and for dry runs."""
    root: Path
    """Local folder for copies of the manifest and the tokenizer."""
    keep_old_s: float = KEEP_OLD_S
    """How long files of a replaced set stay."""

    def __str__(self) -> str:
        return str(self.store)

    def read_manifest(self) -> Manifest:
        """Read the manifest; it and the tokenizer are copied to `root`."""
        try:
            content = self.store.with_policy(STARTUP_RETRY).read(MANIFEST_FILE)
        except FileNotFoundError as error:
            raise ShardError(no_such_set_message(self.store)) from error
        manifest = parse_manifest(content, root=self.root, path=f"{self}/{MANIFEST_FILE}")
        (self.root / MANIFEST_FILE).write_bytes(content)
        (self.root / manifest.tokenizer_file).write_bytes(self.read(manifest.tokenizer_file) or b"")
        return manifest

    def read_index(self, name: str, *, sha256: str | None = None) -> ShardIndex:
        """Read one index."""
        content = self.read(name)
        if content is None:
            raise ShardError(f"{self}/{name}: no such index; {rebuild_hint(self)}")
        return parse_index(content, origin=f"{self}/{name}", sha256=sha256)

    def open_column(
        self, name: str, *, sha256: str | None = None, length_bytes: int | None = None
    ) -> ColumnFile:
        """Download a column and open the copy; its disk space is freed when it is closed."""
        with self.staging_dir() as folder:
            path = folder / name.rpartition("/")[2]
            self._download(name, path)
            return ColumnFile(path, origin=f"{self}/{name}")

    def list_sizes(self) -> dict[str, int]:
        """List all files: name -> size in bytes."""
        return {n: f.length_bytes for n, f in self.store.list_files().items() if "/" not in n}

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def copy_to(self, name: str, path: Path, *, sha256: str) -> None:
        """Download a file to a path and check it."""
        self._download(name, path)
        if sha256_of_file(path) != sha256:
            raise CorruptError(
                f"{self}/{name}: checksum differs from its index; {rebuild_hint(self)}"
            )

    @contextmanager
    def staging_dir(self) -> Iterator[Path]:
        """Make a temporary directory for one task and remove it at the end."""
        with staging_folder(self.store, self.job_id) as folder, disk_errors(folder):
            yield folder

    def put(self, path: Path, name: str) -> None:
        """Upload a finished file from a staging directory into the set."""
        self._require_claim()
        self.store.upload(path, name)

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a small file, atomically."""
        self._require_claim()
        self.store.write(name, content)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        self.store.remove(name)

    def retain_manifest(self, name: str, *, is_extended: bool = False) -> bool:
        """Write a copy of the manifest with the time at which it is replaced.

        None is needed if the new manifest has all of its files: these stay as long as the new one,
        which is replaced later. So sessions can be added any number of times a day.
        """
        if is_extended:
            return False
        values = json.loads(self.read(MANIFEST_FILE) or b"{}")
        self.write(name, json.dumps({**values, _REPLACED_KEY: time.time()}).encode())
        return True

    def has_readers(self, name: str) -> bool:
        """Return whether a retained manifest was replaced less than `keep_old_s` ago.

        Object stores have no locks, so readers get a fixed time to finish.
        """
        try:
            age_s = time.time() - json.loads(self.read(name) or b"{}")[_REPLACED_KEY]
        except (ValueError, KeyError, TypeError):
            return False
        return bool(age_s < self.keep_old_s)

    def _download(self, name: str, path: Path) -> None:
        try:
            self.store.download(name, path)
        except FileNotFoundError as error:
            raise CorruptError(
                f"{self}/{name}: can't be opened: No such file or directory; {rebuild_hint(self)}"
            ) from error

    def _require_claim(self) -> None:
        if self.job_id and self.read(_CLAIM_FILE) != self.job_id.encode():
            raise JobError(f"{self}: {_TAKEN_OVER}")


def map_small_files(
    store: ShardSetReader, read: Callable[[_T], _R], files: Iterable[_T]
) -> list[_R]:
    """Call a function that reads one small file of a set, for each; behind a URL, several at once.

    The results have the order of the files.
    """
    if not isinstance(store, RemoteShardSet):
        return [*map(read, files)]
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        return [*pool.map(read, files)]


def no_such_set_message(store: Store) -> str:
    """Return the error message for a URL without a manifest."""
    return (
        f"{store}: no such shard set; fix: give the URL of the folder that has {MANIFEST_FILE}, or "
        f"build it by `python -m preprocess shards --out {store} --sessions SESSIONS`"
    )


def job_file(store: ShardSetStore, name: str) -> str:
    """Name a file in a set that exists only as long as the job."""
    return f".{store.job_id}.tmp/{name}"


@contextmanager
def open_shard_set(location: Path | Store) -> Iterator[ShardSetStore]:
    """Open a shard set for reading; creates nothing at the location."""
    if isinstance(location, Path):
        yield LocalShardSet(location.absolute())
        return
    with temporary_folder("shard-set-", "copies of files of a shard set") as scratch:
        yield RemoteShardSet(location.with_policy(RetryPolicy()), "", scratch)


@contextmanager
def claim_shard_set(
    location: Path | Store,
    *,
    dry_run: bool = False,
    keep_old_s: float = KEEP_OLD_S,
    version: int = FORMAT_VERSION,
) -> Iterator[ShardSetStore]:
    """Claim a shard set for one job, and remove temporary files that killed jobs left.

    A missing folder is created. A dry run does not claim a set behind a URL. There, files of a
    replaced set stay for `keep_old_s`; those in a folder stay as long as a process reads them. An
    existing set must have the format `version`.

    Raises:
        ShardError: another job on this machine, or on one that shares the folder, builds the set.
        FormatVersionError: the set has another format version; nothing was changed.
    """
    job_id = uuid4().hex[:12]
    if isinstance(location, Path):
        with _claim_folder(location.absolute(), job_id, version) as local:
            yield local
        return
    with suppress(FileNotFoundError):
        head = location.with_policy(STARTUP_RETRY).read(MANIFEST_FILE)
        require_format(head, path=f"{location}/{MANIFEST_FILE}", version=version)
    job_id = "" if dry_run else job_id
    with staging_folder(location, job_id) as scratch:
        remote = RemoteShardSet(location.with_policy(RetryPolicy()), job_id, scratch, keep_old_s)
        if dry_run:
            yield remote
            return
        with _claim_store(location.with_policy(STARTUP_RETRY), job_id):
            yield remote


@contextmanager
def _claim_folder(root: Path, job_id: str, version: int) -> Iterator[LocalShardSet]:
    with suppress(FileNotFoundError, NotADirectoryError), (root / MANIFEST_FILE).open("rb") as file:
        path = str(root / MANIFEST_FILE)
        require_format(file.read(_HEAD_BYTES), path=path, version=version)
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(root):
            for leftover in root.glob(".*.tmp"):
                remove_leftover(leftover)
            folder = job_folder(root, job_id)
            try:
                folder.mkdir()
                yield LocalShardSet(root, job_id)
            finally:
                discard(folder)


@contextmanager
def _claim_store(store: Store, job_id: str) -> Iterator[None]:
    """Write the claim file, and remove it and the job's own files at the end.

    The store has a short retry policy: if it became unreachable during the job, the job has
    already waited for it.
    """
    store.write(_CLAIM_FILE, job_id.encode())
    _remove_job_files(store)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if store.read(_CLAIM_FILE) == job_id.encode():
                store.remove(_CLAIM_FILE)
                _remove_job_files(store)


def _remove_job_files(store: Store) -> None:
    for name in filter(_JOB_FILE.match, store.list_files(prefix=".")):
        store.remove(name)
