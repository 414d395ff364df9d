"""Locks on a local shard set: of processes that read it, and of the one job that writes it.

A reader holds a shared lock on the manifest that it read. Before a build commits a new manifest, it
links the old one to ``manifest.gN.json``, so that the readers' locks stay visible. Files that a
locked old manifest names stay until a later build finds them unlocked. Locks end with their
process, however it ends. On file systems without locks, one warning says what is not protected.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from shared.errors import ShardError
from shared.machine import lock_file, read_steadily
from shared.shardset.manifest import MANIFEST_FILE, Manifest, read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_NO_READER_LOCK = "a build that replaces this shard set does not wait for runs that read it"
_NO_BUILD_LOCK = "start only one job at a time that writes this shard set"


class ReaderLock:
    """A shared lock on a manifest; ends with :meth:`close`, or with the object.

    A pickled copy holds no lock: the first process outlives the others.

    Args:
        path: the manifest.

    Raises:
        OSError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        lock_file(self._descriptor, fcntl.LOCK_SH, path=path, loss=_NO_READER_LOCK)

    def is_current(self, path: Path) -> bool:
        """Return whether the file at a path is still the locked one."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        except OSError:
            return False

    def close(self) -> None:
        """Release the lock."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptor": -1}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def read_manifest_locked(root: Path) -> tuple[Manifest, ReaderLock | None]:
    """Read a set's manifest and lock it; the lock is None if there is no file to lock.

    Raises:
        ShardError: see :func:`shared.shardset.manifest.read_manifest`.
    """
    path = root / MANIFEST_FILE
    while True:
        try:
            lock = read_steadily(partial(ReaderLock, path), path)
        except OSError:
            return read_manifest(root), None
        try:
            manifest = read_manifest(root)
        except ShardError:
            lock.close()
            raise
        if lock.is_current(path):
            return manifest, lock
        lock.close()  # a build replaced the manifest in between


def has_readers(path: Path) -> bool:
    """Return whether another process holds a reader lock on a manifest."""
    with path.open("rb+") as file:  # NFS grants exclusive locks only on files open for writing
        exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
        return lock_file(file.fileno(), exclusive, path=path, loss=_NO_READER_LOCK) is False


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Let only one job write a set; the lock ends with the process, however it ends.

    Raises:
        ShardError: another job holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        if lock_file(descriptor, exclusive, path=folder, loss=_NO_BUILD_LOCK) is False:
            raise ShardError(f"{folder}: another job is building this shard set; fix: wait for it")
        yield
    finally:
        os.close(descriptor)
