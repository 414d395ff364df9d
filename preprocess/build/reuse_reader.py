"""Read encoded rows from finished files, so that they are copied without decoding."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.build.write import DecodeFailure, EncodedRow
from shared.errors import REBUILD_HINT, CorruptError
from shared.shardset.columns import read_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from preprocess.build.plan_types import Row
    from shared.kinds.column import Column
    from shared.shardset.columns import ColumnFile
    from shared.shardset.index import ShardIndex

MAX_OPEN = 32
"""Files that stay open. A new shard may copy rows from hundreds of small shards, one after the
other."""


class ColumnFileCache(AbstractContextManager["ColumnFileCache"]):
    """Opens column files on demand and keeps the most recent ones open."""

    def __init__(self, open_file: Callable[[str], ColumnFile]) -> None:
        self._open_file = open_file
        self._open: OrderedDict[str, ColumnFile] = OrderedDict()

    def __exit__(self, *exc: object) -> None:
        while self._open:
            self._close_oldest()

    def open(self, name: str) -> ColumnFile:
        """Return an open file; it may be closed when other files are opened."""
        if name not in self._open:
            if len(self._open) == MAX_OPEN:
                self._close_oldest()
            self._open[name] = self._open_file(name)
        self._open.move_to_end(name)
        return self._open[name]

    def _close_oldest(self) -> None:
        self._open.popitem(last=False)[1].close()


@dataclass(frozen=True, slots=True)
class ShardReader:
    """Reads the rows of a session in one column from finished shards.

    The counterpart of :class:`preprocess.build.write.SessionEncoder`. `shards` has index and column
    file of each shard or subtask that holds rows of the session.
    """

    session: str
    shards: Sequence[tuple[ShardIndex, str]]
    files: ColumnFileCache

    def iter_rows(
        self, column: Column, rows: Sequence[Row], failures: list[DecodeFailure]
    ) -> Iterator[EncodedRow]:
        """See :class:`preprocess.build.write.RowReader`.

        Raises:
            CorruptError: the shards lack a row, or its bytes differ from their checksum.
        """
        stored: dict[int, tuple[ShardIndex, str, int]] = {}
        for index, file in self.shards:
            failures += [
                failure
                for failure in index.decode_failures
                if failure["session"] == self.session and failure["stream"] == column.stream
            ]
            number = index.sessions.index(self.session)
            for position in np.flatnonzero(index.arrays["session"] == number).tolist():
                stored[index.segment(position)] = index, file, position
        for row in rows:
            if row.segment.index not in stored:
                raise CorruptError(f"no previous index has {row.key}; {REBUILD_HINT}")
            index, file, position = stored[row.segment.index]
            column_file = self.files.open(file)
            content = column_file.read(
                index.members(column.name), position, max_bytes=column.max_bytes
            )
            errors = index.arrays.get(f"{column.name}.error_s")
            if errors is None and content is None:
                raise CorruptError(f"{column_file.origin}: lacks {row.key}; {REBUILD_HINT}")
            error_s = None if errors is None else errors[position]
            flags = int(index.flags[position, index.stream_column(column.stream)])
            yield EncodedRow(row, content, error_s, flags)


def read_zarr_values(file: ColumnFile, index: ShardIndex, column: Column) -> NDArray[Any]:
    """Read the array of a Zarr column, with a row per segment.

    Raises:
        CorruptError: a chunk differs from its checksum.
    """
    members = index.members(column.name)
    values = np.empty((index.num_samples, *column.shape), dtype=column.dtype)
    for row in range(index.num_samples):
        content = file.read(members, row, max_bytes=column.max_bytes) or b""
        values[row] = read_chunk(content, dtype=column.dtype, shape=column.shape)
    return values
