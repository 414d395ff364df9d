"""Where a shard set is written: a folder, or behind a URL.

Tasks write their files in a workplace and put them into the set when they are finished: by a rename
in a folder, by an upload behind a URL. A job marks the set as its own while it runs. Whoever starts
later takes over, and what is left of an earlier job (a worker whose client was killed) can put
nothing any more: in a folder because its workplace is gone, behind a URL because the mark is
another's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from preprocess.build.staging import (
    discard,
    disk_errors,
    locked,
    remove_leftover,
    run_folder,
    staging_folder,
)
from shared.errors import REBUILD_HINT, CorruptError, JobError, ShardError
from shared.files import publish_file, sha256_of_file, write_atomic
from shared.shardset.columns import ColumnFile
from shared.shardset.index import ShardIndex, open_index, parse_index
from shared.shardset.locks import has_readers
from shared.shardset.manifest import (
    MANIFEST_FILE,
    Manifest,
    parse_manifest,
    read_manifest,
    refuse_newer,
)
from shared.storage import STARTUP_RETRY, RetryPolicy, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

_RUN_MARK = ".run.tmp"
_TAKEN_OVER = "another job has taken over this shard set, or this machine does not see its folder"
_PART = re.compile(r"\.[0-9a-f]{12}\.tmp/")
"""Where a job's parts of shards lie in a store."""

_HEAD_BYTES = 4096
_REPLACED = "replaced_s"
"""Key of copies of replaced manifests: when that was, in seconds since 1970."""

KEEP_OLD_S = 24 * 3600.0
"""How long files of a replaced set stay behind a URL, for those who still read it."""


@dataclass(frozen=True, slots=True)
class LocalShardSet:
    """A shard set in a folder, while a job writes it; crosses processes."""

    root: Path
    """Absolute."""
    run: str
    """Names this job among all."""

    def __str__(self) -> str:
        return str(self.root)

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """A folder of its own for one task, on the same disk as the set.

        Raises:
            JobError: another job took over, or the disk is full.
        """
        folder = run_folder(self.root, self.run) / uuid4().hex[:12]
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
        """Make a finished file of a workplace a file of the set.

        Raises:
            JobError: another job took over.
        """
        try:
            publish_file(path, self.root / name)
        except FileNotFoundError as error:
            raise JobError(f"{self.root}: {_TAKEN_OVER}") from error

    def read_index(self, name: str, *, sha256: str | None = None) -> ShardIndex:
        """One index; see :func:`shared.shardset.index.open_index`."""
        return open_index(self.root / name, sha256=sha256)

    @contextmanager
    def open_column(self, name: str, work: Path) -> Iterator[ColumnFile]:
        """A column of the set, to read from."""
        del work
        with closing(ColumnFile(self.root / name)) as column:
            yield column

    def copy(self, name: str, path: Path, *, sha256: str) -> None:
        """Link a file of the set to a path, or copy it there where that can't be."""
        del sha256  # it is the same file, or a copy by the kernel
        try:
            path.hardlink_to(self.root / name)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(self.root / name, path)

    def sizes(self) -> dict[str, int]:
        """Size of every file."""
        with os.scandir(self.root) as entries:
            return {e.name: e.stat().st_size for e in entries if e.is_file()}

    def read(self, name: str) -> bytes | None:
        """Bytes of a small file; None where there is none."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a small file, atomically."""
        write_atomic(self.root / name, content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def read_manifest(self) -> Manifest:
        """The set as it is; see :func:`shared.shardset.manifest.read_manifest`."""
        return read_manifest(self.root)

    def link_manifest(self, name: str) -> None:
        """Give the manifest a second name, so that its readers can be asked after when it is
        replaced.
        """
        path = self.root / name
        with suppress(FileNotFoundError):
            if path.samefile(self.root / MANIFEST_FILE):
                return
            path.unlink()
        with suppress(OSError):  # a file system without links: nobody can be asked after
            path.hardlink_to(self.root / MANIFEST_FILE)

    def has_readers(self, name: str) -> bool:
        """Whether someone reads by an older manifest."""
        return has_readers(self.root / name)


@dataclass(frozen=True, slots=True)
class RemoteShardSet:
    """A shard set behind a URL, while a job writes it; crosses processes."""

    store: Store
    run: str
    """Names this job among all; empty for a dry run."""
    root: Path
    """The job's own folder for copies of the manifest and the tokenizer."""
    keep_s: float = KEEP_OLD_S
    """How long files of a replaced set stay."""

    def __str__(self) -> str:
        return str(self.store)

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """A temporary folder for one task.

        Raises:
            JobError: the disk is full.
        """
        with staging_folder(self.store, self.run) as folder, disk_errors(folder):
            yield folder

    def put(self, path: Path, name: str) -> None:
        """Upload a finished file of a workplace.

        Raises:
            JobError: another job took over.
        """
        self._require_mine()
        self.store.put(path, name)

    def read_index(self, name: str, *, sha256: str | None = None) -> ShardIndex:
        """One index; see :func:`shared.shardset.index.open_index`."""
        content = self.read(name)
        if content is None:
            raise ShardError(f"{self}/{name}: no such index; is the shard set complete?")
        return parse_index(content, origin=f"{self}/{name}", sha256=sha256)

    @contextmanager
    def open_column(self, name: str, work: Path) -> Iterator[ColumnFile]:
        """A column of the set, to read from; copied into the workplace."""
        path = work / f"old.{name.rpartition('/')[2]}"
        self._fetch(name, path)
        with closing(ColumnFile(path)) as column:
            yield column
        path.unlink()

    def copy(self, name: str, path: Path, *, sha256: str) -> None:
        """Copy a file of the set to a path of this machine.

        Raises:
            CorruptError: it is gone, or its checksum is another.
        """
        self._fetch(name, path)
        if sha256_of_file(path) != sha256:
            raise CorruptError(f"{self}/{name}: checksum differs from its index; {REBUILD_HINT}")

    def _fetch(self, name: str, path: Path) -> None:
        try:
            self.store.fetch(name, path)
        except FileNotFoundError as error:
            raise CorruptError(f"{self}/{name}: is not there any more") from error

    def sizes(self) -> dict[str, int]:
        """Size of every file."""
        return {n: f.length_bytes for n, f in self.store.list_files().items() if "/" not in n}

    def read(self, name: str) -> bytes | None:
        """Bytes of a small file; None where there is none."""
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a small file, atomically.

        Raises:
            JobError: another job took over.
        """
        self._require_mine()
        self.store.write(name, content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.store.remove(name)

    def read_manifest(self) -> Manifest:
        """The set as it is, copied to `root`; see
        :func:`shared.shardset.manifest.read_manifest`.
        """
        try:
            content = self.store.trying(STARTUP_RETRY).read(MANIFEST_FILE)
        except FileNotFoundError as error:
            raise ShardError(
                f"{self}: no such shard set; is the address that of the folder with "
                f"{MANIFEST_FILE}?"
            ) from error
        manifest = parse_manifest(content, root=self.root, path=f"{self}/{MANIFEST_FILE}")
        (self.root / MANIFEST_FILE).write_bytes(content)
        (self.root / manifest.tokenizer_file).write_bytes(self.read(manifest.tokenizer_file) or b"")
        return manifest

    def link_manifest(self, name: str) -> None:
        """Keep a copy of the manifest that is about to be replaced, with the time."""
        values = json.loads(self.read(MANIFEST_FILE) or b"{}")
        self.write(name, json.dumps({**values, _REPLACED: time.time()}).encode())

    def has_readers(self, name: str) -> bool:
        """Whether someone may still read by an older manifest: stores have no locks that say so,
        but time for a reader to end.
        """
        try:
            return bool(time.time() - json.loads(self.read(name) or b"{}")[_REPLACED] < self.keep_s)
        except (ValueError, KeyError, TypeError):
            return False

    def _require_mine(self) -> None:
        if self.run and self.read(_RUN_MARK) != self.run.encode():
            raise JobError(f"{self}: {_TAKEN_OVER}")


ShardSetStore = LocalShardSet | RemoteShardSet


def part_file(place: ShardSetStore, name: str) -> str:
    """Name in a set for a file that is there as long as the job."""
    return f".{place.run}.tmp/{name}"


@contextmanager
def open_source(place: Path | Store) -> Iterator[ShardSetStore]:
    """A shard set to read from; nothing is made where it should be.

    Args:
        place: the folder or the store.
    """
    if isinstance(place, Path):
        yield LocalShardSet(place.absolute(), "")
        return
    with tempfile.TemporaryDirectory(prefix="shard-set-") as scratch:
        yield RemoteShardSet(place.trying(RetryPolicy()), "", Path(scratch))


@contextmanager
def open_set(
    place: Path | Store, *, dry_run: bool = False, keep_old_s: float = KEEP_OLD_S
) -> Iterator[ShardSetStore]:
    """A shard set for one job: marked as its own, without what killed jobs left of temporary files.

    Args:
        place: the folder; made where there is none.
        dry_run: leave a store's mark to whoever builds there.
        keep_old_s: how long files of a replaced set stay behind a URL; those in a folder stay as
            long as someone reads them.

    Raises:
        ShardError: another job of this machine, or of one that shares the folder, builds it.
        FormatVersionError: the set that is there is of a newer format; nothing was touched.
    """
    run = uuid4().hex[:12]
    if isinstance(place, Store):
        run = "" if dry_run else run
        hasty = place.trying(STARTUP_RETRY)
        with suppress(FileNotFoundError):
            refuse_newer(hasty.read(MANIFEST_FILE), path=f"{place}/{MANIFEST_FILE}")
        with staging_folder(place, run) as scratch:
            stored = RemoteShardSet(place.trying(RetryPolicy()), run, scratch, keep_old_s)
            if dry_run:
                yield stored
                return
            hasty.write(_RUN_MARK, run.encode())
            _remove_parts(hasty)
            try:
                yield stored
            finally:  # perhaps because the store is gone: nobody waits for that twice
                with suppress(FileNotFoundError):
                    if hasty.read(_RUN_MARK) == run.encode():
                        hasty.remove(_RUN_MARK)
                        _remove_parts(hasty)
        return
    root = place.absolute()
    with suppress(FileNotFoundError, NotADirectoryError), (root / MANIFEST_FILE).open("rb") as file:
        refuse_newer(file.read(_HEAD_BYTES), path=str(root / MANIFEST_FILE))
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with locked(root):
            for leftover in root.glob(".*.tmp"):
                remove_leftover(leftover)
            folder = run_folder(root, run)
            folder.mkdir()
            try:
                yield LocalShardSet(root, run)
            finally:
                discard(folder)


def _remove_parts(store: Store) -> None:
    """Remove parts of shards that a job left in a store."""
    for name in filter(_PART.match, store.list_files()):
        store.remove(name)
