"""Where samples come from: one small protocol, met by shard sets and by sessions read directly.

A source writes the fields of a sample straight into the arrays of a batch; only text, whose length
varies, is returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shared.recipe import Recipe, Stream

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from numpy.typing import NDArray

    from shared.media.tokenizer import TextTokenizer
    from shared.session.reader import Mel, Text

SENSORS = (Stream.TOUCH, Stream.PROPRIO)


class SampleSource(Protocol):
    """Samples by (shard, row)."""

    recipe: Recipe
    fingerprint: str
    """Changes when any sample does."""
    shard_sizes: NDArray[np.int64]
    tokenizer: TextTokenizer

    def shard_name(self, shard: int) -> str:
        """What people call a shard."""
        ...

    def key(self, shard: int, row: int) -> str:
        """SESSION/WINDOW."""
        ...

    def start_s(self, shard: int, row: int) -> float:
        """When the window begins on the session clock."""
        ...

    def present(self, shard: int, row: int) -> tuple[Stream, ...]:
        """Streams that the sample has."""
        ...

    def prefetch_shards(self, shards: Iterable[int], streams: Collection[Stream]) -> None:
        """Hear which shards, and what of them, are read from now on, in about this order."""
        ...

    def will_need(self, places: Iterable[tuple[int, int]], streams: Collection[Stream]) -> None:
        """Hear which samples, by (shard, row), and what of them, are read next."""
        ...

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[np.generic]], *, with_text: bool
    ) -> Text | None:
        """Write a sample's fields.

        Args:
            shard: its shard.
            row: its row there.
            out: arrays of one sample, ``<stream>`` and ``<stream>_valid``, of the streams wanted.
                Whatever they held before, each is written wholly: zeros and False where the sample
                lacks the stream. After an error they hold anything.
            with_text: whether to read the text too.

        Returns:
            The text, where it was asked for and is there.

        Raises:
            CorruptError: the bytes differ from their checksum or don't decode; of a shard, it
                names the file and where in it they lie.
        """
        ...


def write_absent(out: Mapping[str, NDArray[Any]], streams: Iterable[Stream]) -> None:
    """Write those of the wanted streams that a sample lacks: zeros, nowhere valid."""
    for stream in streams:
        if stream in out:
            out[stream][...] = 0
            out[f"{stream}_valid"][...] = False


def write_numbers(
    out: Mapping[str, NDArray[np.generic]], stream: Stream, values: NDArray[np.float32]
) -> None:
    """Write touch or proprio [S, D] with its validity; NaN becomes zero."""
    valid = np.asarray(~np.isnan(values).any(axis=1))
    out[stream][...] = np.where(valid[:, None], values, np.float32(0))
    out[f"{stream}_valid"][...] = valid


def write_mel(out: Mapping[str, NDArray[np.generic]], mel: Mel) -> None:
    """Write dMel levels with their validity; masked levels become zero."""
    out[Stream.AUDIO][...] = np.where(mel.valid[:, None], mel.levels, np.uint8(0))
    out[f"{Stream.AUDIO}_valid"][...] = mel.valid
