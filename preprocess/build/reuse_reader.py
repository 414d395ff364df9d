"""Fields of a session as they lie in older shards, so that rows that did not change are copied and
not decoded and encoded again; and statistics of columns that stay as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.build import statistics
from shared.errors import CorruptError
from shared.session.reader import Mel, Sensors, Text
from shared.shardset.codec import decode_text, decode_wav
from shared.shardset.columns import ColumnFile, read_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from shared.clock import Window
    from shared.recipe import Recipe, Stream
    from shared.shardset.index import ShardIndex

MAX_OPEN = 32
"""Files that stay open. A new shard may take its rows from hundreds of small ones, one after the
other."""


class ColumnFileCache(AbstractContextManager["ColumnFileCache"]):
    """The files of one column in older shards, opened when they are asked for; the last few stay
    open.

    Args:
        open_file: opens one by its name.
    """

    def __init__(self, open_file: Callable[[str], ColumnFile]) -> None:
        self._open_file = open_file
        self._open: OrderedDict[str, ColumnFile] = OrderedDict()

    def __exit__(self, *exc: object) -> None:
        while self._open:
            self._close_oldest()

    def open(self, name: str) -> ColumnFile:
        """A file, good until others have been asked for."""
        if name not in self._open:
            if len(self._open) == MAX_OPEN:
                self._close_oldest()
            self._open[name] = self._open_file(name)
        self._open.move_to_end(name)
        return self._open[name]

    def _close_oldest(self) -> None:
        self._open.popitem(last=False)[1].close()


class ShardFieldReader:
    """Reads one column of a session's windows from the shards in which they lie; the counterpart of
    :class:`shared.session.reader.SessionReader`.

    Args:
        session: whose rows.
        found: an index and a column's file of every shard, or part of one, with rows of it.
        columns: opens the files.
        recipe: how the column was made.

    Raises (all methods):
        CorruptError: the shards lack a row, or its bytes differ from their checksum.
    """

    def __init__(
        self,
        session: str,
        *,
        found: Sequence[tuple[ShardIndex, str]],
        columns: ColumnFileCache,
        recipe: Recipe,
    ) -> None:
        self.session = session
        self.recipe = recipe
        self._found = found
        self._columns = columns
        self._rows: dict[int, tuple[ShardIndex, str, int]] = {}
        for index, file in found:
            number = index.sessions.index(session)
            for row in np.flatnonzero(index.arrays["session"] == number):
                self._rows[int(index.arrays["window"][row])] = index, file, int(row)

    def losses(self, stream: Stream) -> list[dict[str, Any]]:
        """What of the session's stream did not decode when the shards were made."""
        return [
            loss
            for index, _ in self._found
            for loss in index.decode_failures
            if loss["session"] == self.session and loss["stream"] == stream
        ]

    def read_encoded(
        self, stream: Stream, window: Window
    ) -> tuple[bytes | None, NDArray[np.float32]]:
        """Encoded pictures (None where none decoded), and each frame's time error [F]."""
        index, column, row = self._place(window)
        content = column.read(index.members(stream), row)
        return content, index.arrays[f"{stream}.error_s"][row]

    def read_audio(self, window: Window) -> NDArray[np.int16]:
        """See :meth:`shared.session.reader.SessionReader.read_audio`."""
        return decode_wav(self._member("audio", window))

    def read_text(self, window: Window) -> Text:
        """See :meth:`shared.session.reader.SessionReader.read_text`."""
        return decode_text(self._member("text", window))

    def read_sensors(self, window: Window) -> Sensors:
        """See :meth:`shared.session.reader.SessionReader.read_sensors`."""
        recipe = self.recipe.sensors
        count = self.recipe.count(recipe.rate_hz)
        return Sensors(
            timestamp=self._chunk("proprio/timestamp", "f8", (count,), window),
            proprio=self._chunk("proprio/proprio", "f4", (count, recipe.proprio_size), window),
            touch=self._chunk("proprio/touch", "f4", (count, recipe.touch_size), window),
        )

    def read_mel(self, window: Window) -> Mel:
        """See :meth:`shared.session.reader.SessionReader.read_mel`."""
        recipe = self.recipe.mel
        count = self.recipe.count(recipe.rate_hz)
        return Mel(
            levels=self._chunk("dmel/dmel", "u1", (count, recipe.channels), window),
            valid=self._chunk("dmel/valid", "bool", (count,), window),
        )

    def _chunk(
        self, array: str, dtype: str, shape: tuple[int, ...], window: Window
    ) -> NDArray[Any]:
        return read_chunk(self._member(array, window), dtype=dtype, shape=shape)

    def _member(self, name: str, window: Window) -> bytes:
        index, column, row = self._place(window)
        content = column.read(index.members(name), row)
        if content is None:
            raise CorruptError(f"{column.origin}: lacks {self.session}/{window.index:06d}")
        return content

    def _place(self, window: Window) -> tuple[ShardIndex, ColumnFile, int]:
        """The index and the file in which a window lies, and its row there."""
        if window.index not in self._rows:
            raise CorruptError(f"no old index has {self.session}/{window.index:06d}")
        index, file, row = self._rows[window.index]
        return index, self._columns.open(file), row


def stored_statistics(
    name: str, *, index: ShardIndex, column: ColumnFile, recipe: Recipe
) -> dict[str, Any]:
    """Statistics of a column that an early version of this program made, from its members.

    Args:
        name: one of :func:`preprocess.build.statistics.lacking`.
        index: the shard's index.
        column: the column's file.
        recipe: how the column was made.

    Raises:
        CorruptError: a member's bytes differ from their checksum.
    """
    if name == "audio":
        sounds = _members(index, column, "audio")
        return statistics.of_sound([statistics.level_db(decode_wav(sound)) for sound in sounds])
    count = recipe.count(recipe.sensors.rate_hz)
    proprio, touch = (
        [
            read_chunk(content, dtype="f4", shape=(count, size))
            for content in _members(index, column, f"proprio/{array}")
        ]
        for array, size in (
            ("proprio", recipe.sensors.proprio_size),
            ("touch", recipe.sensors.touch_size),
        )
    )
    return statistics.of_sensors(np.stack(proprio), np.stack(touch))


def _members(index: ShardIndex, column: ColumnFile, name: str) -> Iterator[bytes]:
    """What is there of a column or an array, in order of the rows."""
    members = index.members(name)
    for row in range(index.num_samples):
        content = column.read(members, row)
        if content is not None:
            yield content
