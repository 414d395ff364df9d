"""Staging directories of jobs that write a shard set, and clear errors for full disks."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING
from uuid import uuid4

from shared.errors import JobError
from shared.files import sha256_of_bytes
from shared.machine import describe_disk, temporary_folder
from shared.storage import DISK_FULL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.storage import Store

_DISK_FULL = DISK_FULL | {errno.EFBIG}


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn disk-full errors into a message that names the disk; others get a path if they lack one.

    Raises:
        JobError: the disk, the quota or the allowed file size was used up.
    """
    try:
        yield
    except OSError as error:
        error.filename = folder if error.filename is None else error.filename
        if error.errno not in _DISK_FULL:
            raise
        reason = (error.strerror or "the disk is full").lower()
        raise JobError(
            f"{folder}: {reason} ({describe_disk(str(error.filename))}); fix: free some space and "
            "run it again; finished work is kept"
        ) from error


def job_folder(root: Path, job_id: str) -> Path:
    """Return the folder in a local set that holds a job's staging directories."""
    return root / f".{job_id}.tmp"


@contextmanager
def staging_folder(store: Store, job_id: str) -> Iterator[Path]:
    """Make a temporary folder on this machine, and remove those of killed jobs on the same set.

    Reading and dry runs have an empty `job_id` and remove nothing.
    """
    if not job_id:
        with temporary_folder("shard-set-", "copies of files of a shard set") as scratch:
            yield scratch
        return
    digest = sha256_of_bytes(store.url.encode())[:12]
    base = Path(gettempdir()) / f"shard-set-{os.getuid()}-{digest}"
    own = base / job_id
    folder = own / uuid4().hex[:12]
    base.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(parents=True)
    for other in base.iterdir():
        if other != own:
            shutil.rmtree(other, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other tasks still use these folders
            own.rmdir()
            base.rmdir()


def remove_leftover(leftover: Path) -> None:
    """Remove a temporary file or folder that a killed job left."""
    if leftover.is_dir():
        discard(leftover)
    else:
        leftover.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a job's folder; renamed first, so that a process that still uses it fails at once."""
    renamed = folder.with_name(f".gone-{uuid4().hex[:12]}.tmp")
    try:
        folder.rename(renamed)
    except FileNotFoundError:
        return
    shutil.rmtree(renamed, ignore_errors=True)
