"""Several shard sets as one source of samples; :mod:`train.data.mixture` says whose turn it is."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared.errors import ConfigError, CorruptError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from numpy.typing import NDArray

    from shared.recipe import Stream
    from shared.session.reader import Text
    from shared.timing import OnStage
    from train.data.shard_source import ShardSource

ALIKE: Final = (
    "window.duration_s",
    "vision.rate_hz",
    "vision.size",
    "audio",
    "mel",
    "sensors.rate_hz",
    "sensors.touch_size",
    "sensors.proprio_size",
    "text.vocab_size",
)
"""Parts of the recipe that must be the same in all sets, or one model could not read them."""


class MixedSource:
    """Samples of all sets, their shards numbered through; safe to send to another process.

    Args:
        sources: by name, at least one.
        weights: whole, by name; see :func:`train.data.mixture.integer_weights`.

    Raises:
        ConfigError: one model can't read them all.
    """

    def __init__(self, sources: Mapping[str, ShardSource], weights: Mapping[str, int]) -> None:
        _require_alike(sources)
        self.sources = dict(sources)
        self.weights = dict(weights)
        self._sources = list(sources.values())
        self.recipe = self._sources[0].recipe
        self.tokenizer = self._sources[0].tokenizer
        self.shard_sizes = np.concatenate([each.shard_sizes for each in self._sources])
        ends = np.cumsum([len(each.shard_sizes) for each in self._sources])
        self._ends, self._first_shards = ends, np.concatenate([[0], ends[:-1]])
        prints = [each.fingerprint for each in self._sources]
        self.fingerprint = hashlib.sha256(json.dumps(prints).encode()).hexdigest()
        self._told: dict[int, tuple[int, list[int]]] = {}
        for k, source in enumerate(self._sources):
            source.evict_others = partial(self._let_go_of_others, k)

    @property
    def on_stage(self) -> OnStage:
        """Told when a stage of reading is over."""
        return self._sources[0].on_stage

    @on_stage.setter
    def on_stage(self, on_stage: OnStage) -> None:
        for source in self._sources:
            source.on_stage = on_stage

    def shard_name(self, shard: int) -> str:
        """The set's name and the shard's."""
        source, own_shard = self._of(shard)
        return f"{self._name_of(shard)}/{source.shard_name(own_shard)}"

    def key(self, shard: int, row: int) -> str:
        """SESSION/WINDOW."""
        source, shard = self._of(shard)
        return source.key(shard, row)

    def start_s(self, shard: int, row: int) -> float:
        """When the window begins on the session clock."""
        source, shard = self._of(shard)
        return source.start_s(shard, row)

    def present(self, shard: int, row: int) -> tuple[Stream, ...]:
        """Streams that the sample has."""
        source, shard = self._of(shard)
        return source.present(shard, row)

    def prefetch_shards(self, shards: Iterable[int], streams: Collection[Stream]) -> None:
        """See :meth:`train.data.source.SampleSource.prefetch_shards`."""
        wanted = np.array(list(shards), dtype=np.int64)
        owners = np.searchsorted(self._ends, wanted, side="right")
        for k, source in enumerate(self._sources):
            told = os.getpid(), (wanted[owners == k] - self._first_shards[k]).tolist()
            if self._told.get(k) != told:  # a set that changes its blocks leaves the others alone
                self._told[k] = told
                source.prefetch_shards(told[1], streams)

    def will_need(self, places: Iterable[tuple[int, int]], streams: Collection[Stream]) -> None:
        """See :meth:`train.data.source.SampleSource.will_need`."""
        for shard, row in places:
            source, own_shard = self._of(shard)
            source.will_need([(own_shard, row)], streams)

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[np.generic]], *, with_text: bool
    ) -> Text | None:
        """See :meth:`train.data.source.SampleSource.read_into`."""
        source, own_shard = self._of(shard)
        try:
            return source.read_into(own_shard, row, out, with_text=with_text)
        except CorruptError as error:
            what = f"{self._name_of(shard)}: {error}"
            raise CorruptError(what, file=error.file, offset=error.offset) from error

    def close(self) -> None:
        """Close all files and hold the sets no longer."""
        self._told.clear()
        for source in self._sources:
            source.close()

    def _let_go_of_others(self, own: int) -> bool:
        """Make room in the cache for a set: close what another one reads, if anything is open."""
        return any(source.evict() for k, source in enumerate(self._sources) if k != own)

    def _name_of(self, shard: int) -> str:
        return list(self.sources)[int(np.searchsorted(self._ends, shard, side="right"))]

    def _of(self, shard: int) -> tuple[ShardSource, int]:
        """The set that has a shard, and its number there."""
        k = int(np.searchsorted(self._ends, shard, side="right"))
        return self._sources[k], shard - int(self._first_shards[k])


def _require_alike(sources: Mapping[str, ShardSource]) -> None:
    (first, source), *others = sources.items()
    for name, other in others:
        for part in ALIKE:
            one, another = (_value(each, part) for each in (source, other))
            if one != another:
                raise ConfigError(
                    f"data.mix: {first} has {part} {one} in its recipe, {name} {another}; build "
                    "one of them again so that one model can read both"
                )
        if other.tokenizer.json != source.tokenizer.json:
            raise ConfigError(
                f"data.mix: {name} has another tokenizer than {first}; build it again with "
                f"text.tokenizer: {source.manifest.root}/tokenizer.json in its recipe"
            )


def _value(source: ShardSource, part: str) -> Any:  # noqa: ANN401 (numbers and sections)
    return attrgetter(part)(source.recipe)
