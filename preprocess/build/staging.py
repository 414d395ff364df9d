"""Folders that jobs work in, and what can stand in their way: other jobs, what killed ones left,
full disks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING
from uuid import uuid4

from shared.errors import JobError, ShardError
from shared.files import sha256_of_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.storage import Store

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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


def run_folder(root: Path, run: str) -> Path:
    """Where a job works on a set in a folder."""
    return root / f".{run}.tmp"


def remove_leftover(leftover: Path) -> None:
    """Remove what a killed job was writing."""
    if leftover.is_dir():
        discard(leftover)
    else:
        leftover.unlink(missing_ok=True)


@contextmanager
def staging_folder(store: Store, run: str) -> Iterator[Path]:
    """A temporary folder of this machine; those that killed jobs of the same set left are removed.

    Args:
        store: the set.
        run: this job; empty for a dry run, which removes nothing.
    """
    digest = sha256_of_bytes(store.url.encode())[:12]
    base = Path(gettempdir()) / f"shard-set-{os.getuid()}-{digest}"
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


def discard(folder: Path) -> None:
    """Remove a job's folder; moved first, so that whoever still works there finds nothing."""
    gone = folder.with_name(f".gone-{uuid4().hex[:12]}.tmp")
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
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
