"""Holding a shard set while reading it: whoever holds one keeps its files from being removed by a
later build.

A reader locks (shared) the manifest that it read. A build links the old manifest to
``manifest.gN.json`` before it commits the new one, so that the lock can still be asked after; files
of old manifests that someone holds are left for the next build to remove. Locks go with their
process, however it ends. Where the file system has no locks, nothing is held.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from shared.errors import ShardError
from shared.shardset.manifest import MANIFEST_FILE, Manifest, read_manifest

if TYPE_CHECKING:
    from pathlib import Path


class ReaderLock:
    """A manifest that is being read; ends with :meth:`close`, or with the object.

    Args:
        path: the manifest.

    Raises:
        OSError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        except OSError:
            return  # the file system has no locks

    def is_of(self, path: Path) -> bool:
        """Whether the file at a path is still the one that is held."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        except OSError:
            return False

    def close(self) -> None:
        """ReaderLock no longer."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def read_manifest_locked(root: Path) -> tuple[Manifest, ReaderLock | None]:
    """The manifest of a shard set as it is now, and the hold on it; None where nothing can be held.

    Raises:
        ShardError: see :func:`shared.shardset.manifest.read_manifest`.
    """
    path = root / MANIFEST_FILE
    while True:
        try:
            hold = ReaderLock(path)
        except OSError:
            return read_manifest(root), None
        try:
            manifest = read_manifest(root)
        except ShardError:
            hold.close()
            raise
        if hold.is_of(path):
            return manifest, hold
        hold.close()


def has_readers(path: Path) -> bool:
    """Whether someone reads by this manifest."""
    with path.open("rb+") as file:  # NFS locks exclusively only what is open for writing
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
