"""Where a shard set is written: a folder, or behind a URL.

Tasks write their files in a workplace and put them into the set when they are finished: by a rename
in a folder, by an upload behind a URL. A job marks the set as its own while it runs. Whoever starts
later takes over, and what is left of an earlier job (a worker whose client was killed) can put
nothing any more: in a folder because its workplace is gone, behind a URL because the mark is
another's.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np

from shared.columns import ColumnFile
from shared.errors import CorruptError, JobError, ShardError
from shared.hold import is_held
from shared.index import ShardIndex, open_index, parse_index
from shared.manifest import (
    MANIFEST_FILE,
    Manifest,
    move_durably,
    read_manifest,
    refuse_newer,
    write_durably,
)
from shared.storage import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

_RUN_MARK = ".run.tmp"
_TAKEN_OVER = "another job has taken over this shard set, or this machine does not see its folder"
_PART = re.compile(r"\.[0-9a-f]{12}\.tmp/")
"""Where a job's parts of shards lie in a store."""

_HEAD_BYTES = 4096
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class LocalSet:
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
        folder = _run_folder(self.root, self.run) / uuid4().hex[:12]
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
            move_durably(path, self.root / name)
        except FileNotFoundError as error:
            raise JobError(f"{self.root}: {_TAKEN_OVER}") from error

    def read_index(self, name: str, *, sha256: str | None = None) -> ShardIndex:
        """One index; see :func:`shared.index.open_index`."""
        return open_index(self.root / name, sha256=sha256)

    @contextmanager
    def open_column(self, name: str, work: Path) -> Iterator[ColumnFile]:
        """A column of the set, to read from."""
        del work
        with closing(ColumnFile(self.root / name)) as column:
            yield column

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
        write_durably(self.root / name, content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def read_manifest(self) -> Manifest:
        """The set as it is; see :func:`shared.manifest.read_manifest`."""
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

    def is_held(self, name: str) -> bool:
        """Whether someone reads by an older manifest."""
        return is_held(self.root / name)


@dataclass(frozen=True, slots=True)
class StoredSet:
    """A shard set behind a URL, while a job writes it; crosses processes."""

    store: Store
    run: str
    """Names this job among all; empty for a dry run."""
    root: Path
    """The job's own folder for copies of the manifest and the tokenizer."""

    def __str__(self) -> str:
        return str(self.store)

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """A temporary folder for one task.

        Raises:
            JobError: the disk is full.
        """
        with _temporary(self.store, self.run) as folder, disk_errors(folder):
            yield folder

    def put(self, path: Path, name: str) -> None:
        """Upload a finished file of a workplace.

        Raises:
            JobError: another job took over.
        """
        self._require_mine()
        self.store.put(path, name)

    def read_index(self, name: str, *, sha256: str | None = None) -> ShardIndex:
        """One index; see :func:`shared.index.open_index`."""
        content = self.read(name)
        if content is None:
            raise ShardError(f"{self}/{name}: no such index; is the shard set complete?")
        if sha256 is not None and _sha256(content) != sha256:
            raise CorruptError(
                f"{self}/{name}: checksum differs from the manifest; rebuild by `make shards`"
            )
        return parse_index(np.frombuffer(content, np.uint8), origin=f"{self}/{name}")

    @contextmanager
    def open_column(self, name: str, work: Path) -> Iterator[ColumnFile]:
        """A column of the set, to read from; copied into the workplace."""
        path = work / f"old.{name.rpartition('/')[2]}"
        try:
            self.store.fetch(name, path)
        except FileNotFoundError as error:
            raise CorruptError(f"{self}/{name}: is not there any more") from error
        with closing(ColumnFile(path)) as column:
            yield column
        path.unlink()

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
        """The set as it is, copied to `root`; see :func:`shared.manifest.read_manifest`."""
        content = self.read(MANIFEST_FILE)
        if content is None:
            raise ShardError(f"{self}: no such shard set") from FileNotFoundError(MANIFEST_FILE)
        (self.root / MANIFEST_FILE).write_bytes(content)
        manifest = read_manifest(self.root)
        (self.root / manifest.tokenizer_file).write_bytes(self.read(manifest.tokenizer_file) or b"")
        return manifest

    def link_manifest(self, name: str) -> None:
        """Nothing: stores have no locks that say who reads."""

    def is_held(self, name: str) -> bool:
        """Always false: stores have no locks that say who reads."""
        del name
        return False

    def _require_mine(self) -> None:
        if self.run and self.read(_RUN_MARK) != self.run.encode():
            raise JobError(f"{self}: {_TAKEN_OVER}")


SetPlace = LocalSet | StoredSet


def part_file(place: SetPlace, name: str) -> str:
    """Name in a set for a file that is there as long as the job."""
    return f".{place.run}.tmp/{name}"


@contextmanager
def open_set(place: Path | Store, *, dry_run: bool = False) -> Iterator[SetPlace]:
    """A shard set for one job: marked as its own, without what killed jobs left of temporary files.

    Args:
        place: the folder; made where there is none.
        dry_run: leave a store's mark to whoever builds there.

    Raises:
        ShardError: another job of this machine, or of one that shares the folder, builds it.
        FormatVersionError: the set that is there is of a newer format; nothing was touched.
    """
    run = uuid4().hex[:12]
    if isinstance(place, Store):
        run = "" if dry_run else run
        with suppress(FileNotFoundError):
            refuse_newer(place.read(MANIFEST_FILE), path=f"{place}/{MANIFEST_FILE}")
        with _temporary(place, run) as scratch:
            stored = StoredSet(place, run, scratch)
            if dry_run:
                yield stored
                return
            place.write(_RUN_MARK, run.encode())
            _remove_parts(place)
            try:
                yield stored
            finally:
                if stored.read(_RUN_MARK) == run.encode():
                    place.remove(_RUN_MARK)
                    _remove_parts(place)
        return
    root = place.absolute()
    with suppress(FileNotFoundError, NotADirectoryError), (root / MANIFEST_FILE).open("rb") as file:
        refuse_newer(file.read(_HEAD_BYTES), path=str(root / MANIFEST_FILE))
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            for leftover in root.glob(".*.tmp"):
                _remove(leftover)
            folder = _run_folder(root, run)
            folder.mkdir()
            try:
                yield LocalSet(root, run)
            finally:
                _retire(folder)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Says of a full disk which one it is.

    Raises:
        JobError: the disk, the quota or the allowed size of a file was used up.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise JobError(
            f"{folder}: {(error.strerror or 'the disk is full').lower()} (disk {_mount(folder)}, "
            f"{free / 2**20:.0f} MiB free); make room and run it again: what was finished is kept"
        ) from error


def _mount(path: Path) -> Path:
    """Where the disk of a folder is mounted."""
    return next((p for p in (path, *path.parents) if p.is_mount()), path)


def _run_folder(root: Path, run: str) -> Path:
    return root / f".{run}.tmp"


def _remove(leftover: Path) -> None:
    """Remove what a killed job was writing."""
    if leftover.is_dir():
        _retire(leftover)
    else:
        leftover.unlink(missing_ok=True)


@contextmanager
def _temporary(store: Store, run: str) -> Iterator[Path]:
    """A temporary folder of this machine; those that killed jobs of the same set left are removed.

    Args:
        store: the set.
        run: this job; empty for a dry run, which removes nothing.
    """
    base = Path(gettempdir()) / f"shard-set-{os.getuid()}-{_sha256(store.url.encode())[:12]}"
    own = base / (run or "dry")
    folder = own / uuid4().hex[:12]
    base.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(parents=True)
    if run:
        for other in base.iterdir():
            if other != own:
                shutil.rmtree(other, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # others are still there
            own.rmdir()
            base.rmdir()


def _remove_parts(store: Store) -> None:
    """Remove parts of shards that a job left in a store."""
    for name in filter(_PART.match, store.list_files()):
        store.remove(name)


def _retire(folder: Path) -> None:
    """Remove a job's folder; moved first, so that whoever still works there finds nothing."""
    gone = folder.with_name(f".gone-{uuid4().hex[:12]}.tmp")
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one job builds a set; the lock goes with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"{folder}: another job is building this shard set; wait for it"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
