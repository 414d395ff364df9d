"""Several shard sets as one stream, by weight: arithmetic, no state.

::

    weights 0.7, 0.2, 0.1  -> whole numbers 7, 2, 1      `integer_weights`
      -> a cycle of 10 turns, spread as evenly as can be   `InterleaveSchedule`
      -> position n of the stream is position p of set k   `InterleaveSchedule.take`
      -> epoch p // N of set k, shard and row there        `SampleOrder`, each set by itself

So each set goes through its own epochs, each sample once in each; after any number of samples a set
has given its share to within one sample; and like everything about the order, none of it depends on
workers, on ranks, or on where a run began.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
from fractions import Fraction
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared.errors import ConfigError, CorruptError
from train.data.order import BatchPlan, SampleOrder, indivisible

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from shared.recipe import Stream
    from shared.session.reader import Text
    from shared.timing import OnStage
    from train.data.order import Blocks
    from train.data.shard_source import ShardSource

MAX_TURNS: Final = 1 << 16
"""Longest cycle; finer weights are rounded to it."""


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


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Smallest whole numbers in the ratio of weights above 0.

    Where their sum would pass :data:`MAX_TURNS` they are rounded to that sum, by largest
    remainders, and none to 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(each * math.lcm(*(e.denominator for e in exact))) for each in exact]
    whole = [each // math.gcd(*whole) for each in whole]
    if (total := sum(whole)) <= MAX_TURNS:
        return whole
    shares = [Fraction(each * (MAX_TURNS - len(whole)), total) for each in whole]
    rounded = [1 + int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: int(shares[k]) - shares[k])
    for k in by_remainder[: MAX_TURNS - sum(rounded)]:
        rounded[k] += 1
    return rounded


class InterleaveSchedule:
    """Whose turn each position of the stream is.

    Turn j of a set with m of M turns lies in [floor(j M / m), ceil((j + 1) M / m)); the earliest
    deadline goes first. That is fair to within one turn, always. Source: Baruah, Cohen, Plaxton and
    Varvel 1996, Proportionate progress.

    Args:
        weights: whole, above 0; turns of each set in a cycle.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = np.array(weights, dtype=np.int64)
        self.length = int(self.weights.sum())
        cycle = _cycle(weights)
        self._cycle = cycle
        self._turns_of = [np.flatnonzero(cycle == k) for k in range(len(weights))]
        self._rank = np.empty(self.length, dtype=np.int64)
        for turns in self._turns_of:
            self._rank[turns] = np.arange(len(turns))

    def take(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Set of each position of the stream, and the position in that set's own stream."""
        cycles, turns = np.divmod(positions, self.length)
        sets = self._cycle[turns]
        return sets, cycles * self.weights[sets] + self._rank[turns]

    def given(self, position: int) -> NDArray[np.int64]:
        """How many samples each set gives before a position of the stream."""
        cycles, turn = divmod(position, self.length)
        before = [np.searchsorted(turns, turn) for turns in self._turns_of]
        return cycles * self.weights + np.array(before, dtype=np.int64)


class MixedOrder:
    """Global batches of a mix; does what :class:`train.data.order.BatchOrder` does, without an end.

    An epoch of the mix is as many samples as its sets hold together.

    Args:
        orders: of each set, by name; their shards are numbered through.
        weights: whole, by name.
        batch_size: samples of a global batch.
        rank: which share of each global batch to give.
        world_size: number of shares; divides the batch size.

    Raises:
        ValueError: no batch can be made.
    """

    def __init__(
        self,
        orders: Mapping[str, SampleOrder],
        weights: Mapping[str, int],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, order in orders.items():
            if order.num_samples == 0:
                raise ValueError(f"data.mix: {name} has no sample; take it out of the mix")
        if batch_size % world_size:
            raise ValueError(indivisible(batch_size, world_size))
        self._names = list(orders)
        self._orders = list(orders.values())
        self._turns = InterleaveSchedule([weights[name] for name in orders])
        counts = [len(order.shard_sizes) for order in self._orders]
        self._first_shard = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.batch_size = batch_size
        self.share_size = batch_size // world_size
        num_samples = sum(order.num_samples for order in self._orders)
        self.batches_per_epoch = math.ceil(num_samples / batch_size)
        self._share = slice(rank * self.share_size, (rank + 1) * self.share_size)

    def plan(self, index: int) -> BatchPlan:
        """Global batch number `index`, or this rank's share of it."""
        positions = np.arange(index * self.batch_size, (index + 1) * self.batch_size)[self._share]
        sets, places = self._turns.take(positions)
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for k in np.unique(sets):
            here = sets == k
            epochs, within = np.divmod(places[here], self._orders[k].num_samples)
            found = [self._orders[k].locate(e, within[epochs == e]) for e in np.unique(epochs)]
            shards[here] = np.concatenate([each[0] for each in found]) + self._first_shard[k]
            rows[here] = np.concatenate([each[1] for each in found])
        return BatchPlan(
            index=index,
            epoch=index // self.batches_per_epoch,
            positions=positions,
            shards=shards,
            rows=rows,
            weight=np.ones(len(positions), dtype=np.float32),
        )

    def number_of(self, number: int, *, batch_size: int) -> int | None:
        """See :meth:`train.data.order.BatchOrder.number_of`."""
        index, rest = divmod(number * batch_size, self.batch_size)
        return None if rest else index

    def samples_of(self, index: int) -> dict[str, int]:
        """How many samples of global batch number `index` each set gives."""
        begin, end = (self._turns.given(i * self.batch_size) for i in (index, index + 1))
        return dict(zip(self._names, (end - begin).tolist(), strict=True))

    def blocks_of(self, plan: BatchPlan) -> Blocks:
        """Where each set is, also those that the batch has none of; a set that begins anew in the
        batch is at several places.
        """
        begins, ends = (
            self._turns.given(i * self.batch_size) for i in (plan.index, plan.index + 1)
        )
        found = []
        for k, (order, begin, end) in enumerate(
            zip(self._orders, begins.tolist(), ends.tolist(), strict=True)
        ):
            size, last = order.num_samples, max(begin, end - 1)
            for epoch in range(begin // size, last // size + 1):
                ends_here = np.array([max(begin, epoch * size), last]) - epoch * size
                found.append((k, epoch, *order.blocks_of(epoch, ends_here)))
        return tuple(found)

    def shards_of(self, blocks: Blocks) -> list[int]:
        """Shards of such blocks in turn, and of each set's block that follows."""
        found = []
        for number, (k, epoch, first, last) in enumerate(blocks):
            is_newest = number + 1 == len(blocks) or blocks[number + 1][0] != k
            shards = self._orders[k].shards_of(epoch, first, last + is_newest)
            found += [int(shard) for shard in shards + self._first_shard[k]]
        return found

    def substitute(self, plan: BatchPlan, i: int, attempt: int) -> tuple[int, int]:
        """Shard and row of what stands in for sample `i` of a batch: another one of its set."""
        (k,), (place,) = self._turns.take(plan.positions[i : i + 1])
        order = self._orders[k]
        epoch, position = divmod(int(place), order.num_samples)
        shard, row = order.locate_one(epoch, order.substitute(epoch, position, attempt))
        return shard + int(self._first_shard[k]), row


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
        """See :meth:`train.data.batch.SampleSource.prefetch_shards`."""
        wanted = np.array(list(shards), dtype=np.int64)
        owners = np.searchsorted(self._ends, wanted, side="right")
        for k, source in enumerate(self._sources):
            told = os.getpid(), (wanted[owners == k] - self._first_shards[k]).tolist()
            if self._told.get(k) != told:  # a set that changes its blocks leaves the others alone
                self._told[k] = told
                source.prefetch_shards(told[1], streams)

    def prefetch_samples(
        self, places: Iterable[tuple[int, int]], streams: Collection[Stream]
    ) -> None:
        """See :meth:`train.data.batch.SampleSource.prefetch_samples`."""
        for shard, row in places:
            source, own_shard = self._of(shard)
            source.prefetch_samples([(own_shard, row)], streams)

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[np.generic]], *, with_text: bool
    ) -> Text | None:
        """See :meth:`train.data.batch.SampleSource.read_into`."""
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


def _cycle(weights: Sequence[int]) -> NDArray[np.int64]:
    """Set of each turn of a cycle; see :class:`InterleaveSchedule`."""
    length = sum(weights)
    waiting = [(0, k, 0) for k in range(len(weights))]  # (release, set, its turn)
    ready: list[tuple[int, int, int]] = []  # (deadline, set, its turn)
    cycle = np.empty(length, dtype=np.int64)
    for turn in range(length):
        while waiting and waiting[0][0] <= turn:
            _, k, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(j + 1) * length // weights[k]), k, j))
        _, k, j = heapq.heappop(ready)
        cycle[turn] = k
        if j + 1 < weights[k]:
            heapq.heappush(waiting, ((j + 1) * length // weights[k], k, j + 1))
    return cycle


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
