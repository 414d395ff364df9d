"""Durable writes, checksums and fingerprints of files, and long arrays on disk.

A file that other processes read is written under a temporary name in the same folder, flushed to
disk, and renamed; then the folder is flushed. At every moment, even after a power cut, its name
stands for the whole old content or the whole new content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from shared.machine import SteadyFile, naming_path, sync, sync_folder, temporary_folder_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from numpy.typing import DTypeLike, NDArray

ScalarT = TypeVar("ScalarT", bound=np.generic)

BLOCK_BYTES = 1 << 20
"""Bytes of a block of :meth:`DiskArray.iter_blocks`."""


def write_atomic(
    path: Path, content: bytes | Callable[[BinaryIO], object], *, temporary: Path | None = None
) -> None:
    """Replace a file by new bytes, or what a function writes to an open binary file, durably.

    It writes first to `temporary`, a path in the same folder, by default :func:`temporary_path`,
    which it removes if the write fails.

    Raises:
        OSError: the file can't be written; `path` is unchanged.
    """
    temporary = temporary_path(path) if temporary is None else temporary
    try:
        write_synced(temporary, content)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_synced(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file in place and flush it to disk; for a path that no process reads yet."""
    with naming_path(path), path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        sync(file.fileno(), path)


def publish_file(temporary: Path, path: Path) -> None:
    """Flush a finished file to disk and rename it, durably.

    Raises:
        OSError: the file can't be renamed; FileNotFoundError if `temporary` is missing.
    """
    with temporary.open("rb") as file:
        sync(file.fileno(), temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """Name a file while it is written; the next build removes one that a killed job left."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sha256_of_bytes(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(file: Path | SteadyFile) -> str:
    """Read a file, or an open binary file, to its end and return its SHA-256, in hex."""
    if isinstance(file, Path):
        with SteadyFile(file) as opened:
            return sha256_of_file(opened)
    return hashlib.file_digest(file, "sha256").hexdigest()


stable_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode
"""Format JSON values; equal values give the same text."""


def fingerprint_of(*values: Any) -> str:  # noqa: ANN401 (any JSON value)
    """Return a short stable hash of plain JSON values."""
    return sha256_of_bytes(stable_json(values).encode())[:32]


class DiskArray(Generic[ScalarT]):
    """Numbers [N] in an unnamed temporary file, so that memory does not grow with their count.

    The file is in $TMPDIR and disappears with the array, however the process ends. Each access maps
    only what it needs and copies it: a mapping of the whole file would count as the process's
    memory. Forked processes can read the same array; pickling copies the numbers.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._length = 0
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise temporary_folder_error(error, "decoded sounds") from error
        weakref.finalize(self, self._file.close)

    @classmethod
    def of(cls, values: NDArray[ScalarT]) -> DiskArray[ScalarT]:
        """Copy values [N] to disk."""
        array = cls(values.dtype)
        array.append(values)
        return array

    def append(self, values: NDArray[ScalarT]) -> None:
        """Write values [n] after the present ones.

        Raises:
            MachineError: the disk is full.
        """
        unwritten = memoryview(values.astype(self.dtype, copy=False).tobytes())
        position = self._length * self.dtype.itemsize
        # Written, not mapped: a mapping per call costs several times as much as the write,
        # and storing into one on a full disk kills the process by SIGBUS.
        while len(unwritten):
            try:
                num_written = os.pwrite(self._file.fileno(), unwritten, position)
            except OSError as error:
                raise temporary_folder_error(error, "decoded sounds") from error
            unwritten, position = unwritten[num_written:], position + num_written
        self._length += len(values)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: slice) -> NDArray[ScalarT]:
        """Return a copy of the numbers [start, stop)."""
        start, stop, step = key.indices(self._length)
        if step != 1:
            raise ValueError("a disk array is read forwards, without steps")
        if stop <= start:
            return np.empty(0, self.dtype)
        offset = start * self.dtype.itemsize
        mapped = np.memmap(self._file, self.dtype, "r", offset=offset, shape=(stop - start,))
        return np.array(mapped)

    def __reduce__(self) -> tuple[Any, ...]:
        return DiskArray.of, (self[:],)

    def iter_blocks(self) -> Iterator[NDArray[ScalarT]]:
        """Yield the numbers, BLOCK_BYTES at a time."""
        step = BLOCK_BYTES // self.dtype.itemsize
        for start in range(0, self._length, step):
            yield self[start : start + step]
