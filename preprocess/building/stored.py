"""Fields of a session as they lie in an older shard, so that rows that did not change are copied
and not decoded and encoded again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shared.codec import decode_text, decode_wav
from shared.columns import ColumnFile, read_chunk
from shared.errors import CorruptError
from shared.fields import Mel, Sensors, Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from shared.clock import Window
    from shared.index import ShardIndex
    from shared.recipe import Recipe, Stream


class StoredFields:
    """Reads one column of a session's windows from a shard; the counterpart of
    :class:`shared.fields.SessionFields`.

    Args:
        session: whose rows.
        found: the shard's index and the column's file; of a column in parts those of each.
        recipe: how the column was made.

    Raises (all methods):
        CorruptError: the shard lacks a row, or its bytes differ from their checksum.
    """

    def __init__(
        self, session: str, *, found: Sequence[tuple[ShardIndex, ColumnFile]], recipe: Recipe
    ) -> None:
        self.session = session
        self.recipe = recipe
        self._found = found
        self._rows: dict[int, tuple[ShardIndex, ColumnFile, int]] = {}
        for index, column in found:
            number = index.facts["sessions"].index(session)
            for row in np.flatnonzero(index.arrays["session"] == number):
                self._rows[int(index.arrays["window"][row])] = index, column, int(row)

    def losses(self, stream: Stream) -> list[dict[str, Any]]:
        """What of the session's stream did not decode when the shard was made."""
        return [
            loss
            for index, _ in self._found
            for loss in index.facts["losses"]
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
        """See :meth:`shared.fields.SessionFields.read_audio`."""
        return decode_wav(self._member("audio", window))

    def read_text(self, window: Window) -> Text:
        """See :meth:`shared.fields.SessionFields.read_text`."""
        return decode_text(self._member("text", window))

    def read_sensors(self, window: Window) -> Sensors:
        """See :meth:`shared.fields.SessionFields.read_sensors`."""
        recipe = self.recipe.sensors
        count = self.recipe.count(recipe.rate_hz)
        return Sensors(
            timestamp=self._chunk("proprio/timestamp", "f8", (count,), window),
            proprio=self._chunk("proprio/proprio", "f4", (count, recipe.proprio_size), window),
            touch=self._chunk("proprio/touch", "f4", (count, recipe.touch_size), window),
        )

    def read_mel(self, window: Window) -> Mel:
        """See :meth:`shared.fields.SessionFields.read_mel`."""
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
            raise CorruptError(f"{column.path}: lacks {self.session}/{window.index:06d}")
        return content

    def _place(self, window: Window) -> tuple[ShardIndex, ColumnFile, int]:
        if window.index not in self._rows:
            path = self._found[0][1].path
            raise CorruptError(f"{path}: its index lacks {self.session}/{window.index:06d}")
        return self._rows[window.index]
