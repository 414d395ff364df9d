"""A long row of numbers in a file without a name, so that memory does not grow with its length."""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import DTypeLike, NDArray

ScalarT = TypeVar("ScalarT", bound=np.generic)

BLOCK_BYTES = 1 << 20
"""What is read at once by :meth:`DiskArray.iter_blocks`."""


class DiskArray(Generic[ScalarT]):
    """Numbers [N] that are written once, at the end, and read in slices.

    They lie in the folder for temporary files ($TMPDIR), under no name: the file goes with its
    spool, however the process ends. Reading moves no file position, so forked processes may share
    one; pickling carries the numbers.

    Args:
        dtype: of the numbers.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._length = 0
        with tempfile.TemporaryFile(buffering=0) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def append(self, values: NDArray[ScalarT]) -> None:
        """Write values [n] after those that are there.

        Raises:
            OSError: the disk is full.
        """
        rest = memoryview(values.astype(self.dtype, copy=False).tobytes())
        place = self._length * self.dtype.itemsize
        self._length += len(values)
        while rest:
            try:
                written = os.pwrite(self._descriptor, rest, place)
            except OSError as error:
                error.add_note(
                    f"{tempfile.gettempdir()} has no room for a session's sound; set TMPDIR"
                )
                raise
            rest, place = rest[written:], place + written

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, piece: slice) -> NDArray[ScalarT]:
        """A copy of the numbers [start, stop)."""
        start, stop, step = piece.indices(self._length)
        if step != 1:
            raise ValueError("a spool is read forwards, without steps")
        values = np.empty(max(0, stop - start), dtype=self.dtype)
        raw: Any = values.view(np.uint8)
        rest = memoryview(raw)
        place = start * self.dtype.itemsize
        while rest:
            count = os.preadv(self._descriptor, [rest], place)
            if count == 0:
                raise OSError(f"the file of {self._length} numbers has been cut")
            rest, place = rest[count:], place + count
        return values

    def __array__(
        self, dtype: DTypeLike | None = None, *, copy: bool | None = None
    ) -> NDArray[Any]:
        """All of them, in memory."""
        if copy is False:
            raise ValueError("numbers in a file can't be an array without a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return disk_array_of, (self[:],)

    def iter_blocks(self) -> Iterator[NDArray[ScalarT]]:
        """The numbers, BLOCK_BYTES at a time."""
        step = BLOCK_BYTES // self.dtype.itemsize
        for start in range(0, self._length, step):
            yield self[start : start + step]


def disk_array_of(values: NDArray[ScalarT]) -> DiskArray[ScalarT]:
    """A spool of values [N]."""
    spool: DiskArray[ScalarT] = DiskArray(values.dtype)
    spool.append(values)
    return spool
