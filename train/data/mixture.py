"""Several shard sets as one source and one stream of batches, interleaved by weight.

::

    weights 0.7, 0.2, 0.1  -> integers 7, 2, 1            `integer_weights`
      -> a cycle of 10 turns, spread as evenly as possible  `InterleaveSchedule`
      -> stream position n is position p of set k           `InterleaveSchedule.locate`
      -> epoch p // N of set k, shard, window there         `SampleOrder`, one per set

Each set runs through its own epochs, every sample once per epoch. After any number of samples, each
set has given its share to within one sample. The order is arithmetic, as in
:mod:`train.data.order`: it does not depend on workers, on ranks, or on where a run started.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from fractions import Fraction
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared.config import make_section
from shared.errors import ConfigError, CorruptError
from shared.recipe import Recipe
from shared.streams import DmelSettings, Kind
from train.data.order import BatchPlan, BlockRange, EpochOrder, SampleOrder, order_state
from train.shapes import require_token_rate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from shared.streams import StreamSpec
    from shared.timing import OnStage
    from train.data.batch import ReadWindow, SampleLocation
    from train.data.order import BatchOrder, Blocks, OrderSettings
    from train.data.shard_source import ShardSource
    from train.data.windows import WindowGrid
    from train.shapes import WindowShapes

MAX_TURNS: Final = 1 << 16
"""Longest cycle; finer weights are rounded to it."""

COMMON_KEYS: Final[dict[Kind, tuple[str, ...]]] = {
    Kind.VIDEO: ("rate_hz", "height", "width"),
    Kind.AUDIO: (
        *("rate_hz", "loudness_dbfs", "peak_dbfs"),
        *(f"dmel.{key}" for key in DmelSettings.model_fields),
    ),
    Kind.SENSOR: ("rate_hz", "values", "names"),
    Kind.TEXT: (),
}
"""Keys of a stream that is read, by its kind, that agree in all sets that declare it."""


class MixedSource:
    """Samples of several sets, with their shards numbered consecutively.

    It can be sent to another process. Its recipe has the streams of all sets. A stream that a set
    does not declare is absent in its samples.
    """

    shapes: WindowShapes
    window_counts: NDArray[np.int64]

    def __init__(self, sources: Mapping[str, ShardSource], weights: Mapping[str, int]) -> None:
        self.sources = dict(sources)
        self.weights = dict(weights)
        self._names = list(sources)
        self._sources = list(sources.values())
        with_text = [source for source in self._sources if source.recipe.of_kind(Kind.TEXT)]
        main = (with_text or self._sources)[0]
        self.tokenizer = main.tokenizer
        specs = [pair for s in self._sources[::-1] for pair in s.recipe.streams.items()]
        # The first set decides; of a text, the one with the fewest tokens per second.
        specs.sort(key=lambda pair: -getattr(pair[1], "tokens_per_s", 0.0))
        self.recipe = main.recipe.model_copy(update={"streams": dict(sorted(dict(specs).items()))})
        self.shard_sizes = np.concatenate([source.shard_sizes for source in self._sources])
        self._ends = np.cumsum([len(source.shard_sizes) for source in self._sources])
        self._first_shards = np.concatenate([[0], self._ends[:-1]])
        fingerprints = [source.fingerprint for source in self._sources]
        self.fingerprint = hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()
        self._prefetched: dict[int, tuple[int, list[int]]] = {}
        for k, source in enumerate(self._sources):
            source.evict_others = partial(self._evict_others, k)

    def open_windows(self, shapes: WindowShapes, grid: WindowGrid) -> MixedSource:
        """See :meth:`train.data.batch.SampleSource.open_windows`.

        The new source's recipe has the streams that are read.

        Raises:
            ConfigError: one model can't read all sets.
        """
        _require_compatible(self.sources, shapes)
        opened = {name: source.open_windows(shapes, grid) for name, source in self.sources.items()}
        mixed = MixedSource(opened, self.weights)
        mixed.recipe = self._common_recipe(shapes)
        mixed.shapes = shapes
        mixed.window_counts = np.concatenate([each.window_counts for each in opened.values()])
        return mixed

    @property
    def on_stage(self) -> OnStage:
        """Callback that receives the name of each stage of reading when it ends."""
        return self._sources[0].on_stage

    @on_stage.setter
    def on_stage(self, on_stage: OnStage) -> None:
        for source in self._sources:
            source.on_stage = on_stage

    def run_lengths_s(self) -> list[float]:
        """See :meth:`train.data.batch.SampleSource.run_lengths_s`."""
        return [length_s for source in self._sources for length_s in source.run_lengths_s()]

    def identity(self) -> dict[str, Any]:
        """Return what identifies this data: also the weights, and the sets' fingerprints."""
        sets = {name: source.fingerprint for name, source in self.sources.items()}
        return {"fingerprint": self.fingerprint, "mix": self.weights, "sets": sets}

    def batch_order(self, settings: OrderSettings) -> BatchOrder:
        """Interleave the sets if the order is shuffled and endless; else read one after another."""
        if not (settings.is_shuffled and settings.is_endless):
            order = SampleOrder(self.window_counts, fingerprint=self.fingerprint, settings=settings)
            return EpochOrder(order, settings)
        orders = {
            name: SampleOrder(each.window_counts, fingerprint=each.fingerprint, settings=settings)
            for name, each in self.sources.items()
        }
        return MixedOrder(orders, self.weights, settings)

    def shard_name(self, shard: int) -> str:
        """Return SET/SHARD."""
        k, own_shard = self._resolve(shard)
        return f"{self._names[k]}/{self._sources[k].shard_name(own_shard)}"

    def key(self, shard: int, window: int) -> str:
        """Return SESSION@FIRST_TICK."""
        k, own_shard = self._resolve(shard)
        return self._sources[k].key(own_shard, window)

    def prefetch_shards(self, shards: Iterable[int]) -> None:
        """Prefetch each set's own shards, unless they are the same as last time."""
        wanted = np.array(list(shards), dtype=np.int64)
        owners = np.searchsorted(self._ends, wanted, side="right")
        for k, source in enumerate(self._sources):
            request = os.getpid(), (wanted[owners == k] - self._first_shards[k]).tolist()
            if self._prefetched.get(k) != request:  # sets change their blocks independently
                self._prefetched[k] = request
                source.prefetch_shards(request[1])

    def prefetch_samples(self, locations: Iterable[SampleLocation]) -> None:
        """See :meth:`train.data.batch.SampleSource.prefetch_samples`."""
        for shard, window in locations:
            k, own_shard = self._resolve(shard)
            self._sources[k].prefetch_samples([(own_shard, window)])

    def read_into(self, shard: int, window: int, out: Mapping[str, NDArray[Any]]) -> ReadWindow:
        """See :meth:`train.data.batch.SampleSource.read_into`."""
        k, own_shard = self._resolve(shard)
        try:
            return self._sources[k].read_into(own_shard, window, out)
        except CorruptError as error:
            message = f"{self._names[k]}: {error}"
            raise CorruptError(message, file=error.file, offset=error.offset) from error

    def close(self) -> None:
        """Close all files and release the sets' reader locks."""
        self._prefetched.clear()
        for source in self._sources:
            source.close()

    def _common_recipe(self, shapes: WindowShapes) -> Recipe:
        """Return a recipe of the streams that are read, with segments that fit all of them."""
        values = self.recipe.as_json()
        values["streams"] = {name: values["streams"][name] for name in shapes.streams}
        errors = []
        for source in self._sources:
            values["segment"]["duration_s"] = source.recipe.segment_s
            try:
                return make_section(Recipe, values, origin="data.mix")
            except ConfigError as error:
                errors.append(error)
        raise errors[0]

    def _evict_others(self, own: int) -> bool:
        """Free room in the cache for one set: close a shard of another; False if none is open."""
        return any(source.evict() for k, source in enumerate(self._sources) if k != own)

    def _resolve(self, shard: int) -> tuple[int, int]:
        """Return the index of the set that owns a shard, and the shard's number there."""
        k = int(np.searchsorted(self._ends, shard, side="right"))
        return k, shard - int(self._first_shards[k])


class InterleaveSchedule:
    """Which set gives the sample at each position of an endless stream.

    In a cycle of M turns, turn j of a set with m turns falls in [floor(j M / m),
    ceil((j + 1) M / m)). Of the sets whose turn may come, the one with the earliest deadline is
    next. Every set's share is then exact to within one turn at any time. Source: Baruah, Cohen,
    Plaxton and Varvel 1996, Proportionate progress. Checkpoints depend on this very order.

    Args:
        weights: integers above 0: turns of each set in a cycle.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = np.array(weights, dtype=np.int64)
        self.length = int(self.weights.sum())
        self._cycle = _make_cycle(weights)
        self._turns = [np.flatnonzero(self._cycle == k) for k in range(len(weights))]
        self._rank = np.empty(self.length, dtype=np.int64)
        for turns in self._turns:
            self._rank[turns] = np.arange(len(turns))

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the set at each position, and the position in that set's own stream."""
        cycles, turns = np.divmod(positions, self.length)
        sets = self._cycle[turns]
        return sets, cycles * self.weights[sets] + self._rank[turns]

    def samples_before(self, position: int) -> NDArray[np.int64]:
        """Return how many samples each set gives before a position."""
        cycles, turn = divmod(position, self.length)
        in_cycle = [np.searchsorted(turns, turn) for turns in self._turns]
        return cycles * self.weights + np.array(in_cycle, dtype=np.int64)


class MixedOrder:
    """Global batches of a mix, without end; a :class:`train.data.order.BatchOrder`.

    An epoch of the mix is as many samples as its sets have together. The shards of the orders of
    its sets are numbered consecutively.
    """

    def __init__(
        self, orders: Mapping[str, SampleOrder], weights: Mapping[str, int], settings: OrderSettings
    ) -> None:
        for name, order in orders.items():
            if order.num_samples == 0:
                raise ValueError(f"data.mix: {name} has no samples; fix: remove it from the mix")
        self._names = list(orders)
        self._orders = list(orders.values())
        self._schedule = InterleaveSchedule([weights[name] for name in orders])
        num_shards = [len(order.shard_sizes) for order in self._orders]
        self._first_shards = np.concatenate([[0], np.cumsum(num_shards)[:-1]])
        self.state = order_state(settings)
        self.batch_size = settings.batch_size
        self._share = settings.share()
        self.share_size = self._share.stop - self._share.start
        num_samples = sum(order.num_samples for order in self._orders)
        self.batches_per_epoch = math.ceil(num_samples / self.batch_size)

    def plan(self, index: int) -> BatchPlan:
        """Return global batch `index`, or this rank's share of it."""
        positions = np.arange(index * self.batch_size, (index + 1) * self.batch_size)[self._share]
        sets, set_positions = self._schedule.locate(positions)
        shards, windows = np.empty_like(positions), np.empty_like(positions)
        for k in np.unique(sets):
            is_own = sets == k
            epochs, in_epoch = np.divmod(set_positions[is_own], self._orders[k].num_samples)
            # positions ascend, so that epochs come one after the other
            pairs = [self._orders[k].locate(e, in_epoch[epochs == e]) for e in np.unique(epochs)]
            shards[is_own] = np.concatenate([s for s, _ in pairs]) + self._first_shards[k]
            windows[is_own] = np.concatenate([w for _, w in pairs])
        return BatchPlan(
            index=index,
            epoch=index // self.batches_per_epoch,
            positions=positions,
            shards=shards,
            windows=windows,
            weight=np.ones(len(positions), dtype=np.float32),
        )

    def rescale_index(self, index: int, *, batch_size: int) -> int | None:
        """See :meth:`train.data.order.BatchOrder.rescale_index`."""
        rescaled, remainder = divmod(index * batch_size, self.batch_size)
        return None if remainder else rescaled

    def samples_per_set(self, index: int) -> dict[str, int]:
        """Return how many samples of global batch `index` come from each set."""
        begin, end = self._bounds(index)
        return dict(zip(self._names, (end - begin).tolist(), strict=True))

    def find_blocks(self, plan: BatchPlan) -> Blocks:
        """Return the current blocks of every set, including sets that are not in the batch.

        A set whose next epoch starts within the batch has several ranges.
        """
        begins, ends = self._bounds(plan.index)
        blocks = []
        for k, (order, begin, end) in enumerate(
            zip(self._orders, begins.tolist(), ends.tolist(), strict=True)
        ):
            size, last = order.num_samples, max(begin, end - 1)
            for epoch in range(begin // size, last // size + 1):
                bounds = np.array([max(begin, epoch * size), last]) - epoch * size
                blocks.append(BlockRange(k, epoch, *order.block_range(epoch, bounds)))
        return tuple(blocks)

    def list_shards(self, blocks: Blocks) -> list[int]:
        """Return the shards of these blocks, and of the next block in each set."""
        numbers: list[int] = []
        for i, (k, epoch, first, last) in enumerate(blocks):
            is_newest = i + 1 == len(blocks) or blocks[i + 1].set_index != k
            shards = self._orders[k].shards_in_blocks(epoch, first, last + is_newest)
            numbers += (shards + self._first_shards[k]).tolist()
        return numbers

    def substitute(self, plan: BatchPlan, i: int, attempt: int) -> tuple[int, int]:
        """Return shard and window of another sample of the set that replaces sample `i`."""
        (k,), (set_position,) = self._schedule.locate(plan.positions[i : i + 1])
        order = self._orders[k]
        epoch, position = divmod(int(set_position), order.num_samples)
        shard, window = order.locate_one(epoch, order.substitute_position(epoch, position, attempt))
        return shard + int(self._first_shards[k]), window

    def _bounds(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the range [begin, end) of each set's own stream that a global batch takes."""
        start, stop = index * self.batch_size, (index + 1) * self.batch_size
        return self._schedule.samples_before(start), self._schedule.samples_before(stop)


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers in the ratio of weights above 0.

    If their sum exceeds :data:`MAX_TURNS`, they are rounded to that sum by largest remainders, and
    none to 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    integers = [int(weight * denominator) for weight in exact]
    integers = [integer // math.gcd(*integers) for integer in integers]
    if (total := sum(integers)) <= MAX_TURNS:
        return integers
    shares = [Fraction(integer * (MAX_TURNS - len(integers)), total) for integer in integers]
    rounded = [1 + int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: int(shares[k]) - shares[k])
    for k in by_remainder[: MAX_TURNS - sum(rounded)]:
        rounded[k] += 1
    return rounded


def _make_cycle(weights: Sequence[int]) -> NDArray[np.int64]:
    """Return the set of each turn of a cycle; see :class:`InterleaveSchedule`."""
    length, turns_taken = sum(weights), [0] * len(weights)
    cycle = np.empty(length, dtype=np.int64)
    for turn in range(length):
        _, k = min(
            (-(-(taken + 1) * length // weight), k)  # the deadline of the set's next turn
            for k, (taken, weight) in enumerate(zip(turns_taken, weights, strict=True))
            if taken * length // weight <= turn
        )
        cycle[turn] = k
        turns_taken[k] += 1
    return cycle


def _require_compatible(sources: Mapping[str, ShardSource], shapes: WindowShapes) -> None:
    """Check that one model can read all sets."""
    if not shapes.is_text_only:
        for name, source in sources.items():
            owner = f"the set {name} of data.mix"
            require_token_rate(source.recipe, shapes.streams, shapes.tick_rate_hz, owner=owner)
    for stream in shapes.streams:
        declared = [(name, s) for name, s in sources.items() if stream in s.recipe.streams]
        (first_name, first), *others = declared
        for name, other in others:
            specs = (first.recipe.streams[stream], other.recipe.streams[stream])
            if difference := _describe_difference(*specs):
                key, expected, value = difference
                raise ConfigError(
                    f"data.mix: {stream} has {key} {expected} in {first_name}, and {value} in "
                    f"{name}; fix: rebuild one of them with the other's value, or read other "
                    "streams (data.modalities, training.loss_weights)"
                )
            if specs[0].kind is Kind.TEXT and other.tokenizer.json != first.tokenizer.json:
                raise ConfigError(
                    f"data.mix: {name} has another tokenizer than {first_name}, and {stream} is "
                    f"read; fix: rebuild it with text.tokenizer: {first.manifest.root}/"
                    "tokenizer.json in its recipe"
                )


def _describe_difference(spec: StreamSpec, other: StreamSpec) -> tuple[str, object, object] | None:
    """Return the first key in which two streams must agree and don't, and its two values."""
    for key in ("kind", *COMMON_KEYS[spec.kind]):
        expected, value = _comparable(key, spec), _comparable(key, other)
        if value != expected and not (key == "names" and None in (expected, value)):
            return key, expected, value
    return None


def _comparable(key: str, spec: StreamSpec) -> object:
    """Return the value of a stream's key, in a form for messages."""
    value = attrgetter(key)(spec)
    if key == "values":
        return ", ".join(f"{g.count} {g.type} {g.unit_label}".rstrip() for g in value)
    return value
