"""The order of samples as arithmetic: (fingerprint, seed, epoch, position) -> (shard, window).

::

    SampleOrder   an epoch: shards are permuted, and samples are permuted within blocks of shards
      -> EpochOrder   global batches, epoch after epoch (a mix of sets: train.data.mixture)
      -> BatchPlan    one global batch, or one rank's share of it

There is no state. Any number of workers or ranks therefore sees the same global batches, resuming
costs nothing, and successive reads stay close to each other. Permutations sort hashes (splitmix64:
Steele et al. 2014), so that they do not change with the version of any library.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from train.data.windows import WindowGrid

MAX_BLOCK_SAMPLES: Final = 1 << 20
"""Most samples that are shuffled together; it limits the memory and time that a block takes."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class BlockRange(NamedTuple):
    """Neighboring blocks of one set in one epoch, [first, last]."""

    set_index: int
    """Index of the set in a mix, else 0."""
    epoch: int
    first: int
    last: int


Blocks = tuple[BlockRange, ...]
"""The blocks that hold a batch's samples."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which samples make one global batch, or one rank's share of it."""

    index: int
    """Index of the global batch since the training began."""
    epoch: int
    positions: NDArray[np.int64]
    """Positions of the samples in the epoch; those past its end are padding. For a mix, positions
    in its endless stream."""
    shards: NDArray[np.int64]
    windows: NDArray[np.int64]
    """Number of each sample's window in its shard."""
    weight: NDArray[np.float32]
    """1, or 0 for samples that only pad the epoch's last batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSettings:
    """Everything besides the data that decides which samples a batch holds."""

    seed: int
    grid: WindowGrid
    """Length and spacing of the windows that samples are."""
    block_shards: int
    """Shards whose samples are shuffled together, at most; see :data:`MAX_BLOCK_SAMPLES`."""
    batch_size: int
    """Samples of a global batch."""
    last_batch: Literal["pad", "drop"] = "pad"
    """Pad an epoch's incomplete last batch with samples of weight 0, or leave it out."""
    is_shuffled: bool = True
    """False gives the stored order in every epoch."""
    is_endless: bool = True
    """Whether the order serves a stream without end; only such a stream interleaves a mix."""
    rank: int = 0
    """Which share of each global batch to give."""
    world_size: int = 1
    """Number of shares; divides the batch size."""

    def share(self) -> slice:
        """Return which samples of a global batch this rank gives.

        Raises:
            ValueError: the ranks can't share a batch equally; it names the nearest numbers of
                ranks and batch sizes that fit.
        """
        batch_size, world_size = self.batch_size, self.world_size
        if batch_size % world_size == 0:
            size = batch_size // world_size
            return slice(self.rank * size, (self.rank + 1) * size)
        divisors = sorted(
            (n for n in range(1, batch_size + 1) if batch_size % n == 0),
            key=lambda n: (abs(n - world_size), n),
        )
        below = batch_size // world_size * world_size
        sizes = [str(n) for n in (below, below + world_size) if n]
        raise ValueError(
            f"{world_size} ranks can't share a global batch of {batch_size} equally; fix: start "
            f"{' or '.join(map(str, sorted(divisors[:2])))} ranks (torchrun --nproc-per-node), or "
            f"set data.batch_size to {' or '.join(sizes)}"
        )


class BatchOrder(Protocol):
    """Global batches as a function of their index."""

    share_size: int
    """Samples of a rank's share of a batch."""
    batches_per_epoch: int
    state: dict[str, Any]
    """Plain values by name that decide which samples a batch of a given index holds."""

    def plan(self, index: int) -> BatchPlan:
        """Return global batch `index`, or this rank's share of it."""

    def rescale_index(self, index: int, *, batch_size: int) -> int | None:
        """Return the index of the batch that starts where batch `index` of another size starts.

        None if no batch starts there.
        """

    def samples_per_set(self, index: int) -> dict[str, int]:
        """Return how many samples of global batch `index` come from each set of a mix, else {}."""

    def find_blocks(self, plan: BatchPlan) -> Blocks:
        """Return the blocks that hold a batch's samples."""

    def list_shards(self, blocks: Blocks) -> list[int]:
        """Return the shards of these blocks and of the next block, in reading order."""

    def substitute(self, plan: BatchPlan, i: int, attempt: int) -> tuple[int, int]:
        """Return shard and window of the sample that replaces corrupt sample `i` of a batch.

        It is the same on every rank and worker. `attempt` is 0, then 1 if that one is corrupt too,
        and so on.
        """


class SampleOrder:
    """The order of a set's samples in every epoch.

    Neighboring shards of an epoch form a block, up to `settings.block_shards` of them and
    :data:`MAX_BLOCK_SAMPLES` samples. A shard with more samples counts as several ranges of them,
    which are permuted like shards.

    Args:
        shard_sizes: samples per shard, int64 [num_shards].
        fingerprint: of the dataset; another one gives another order.
    """

    def __init__(
        self, shard_sizes: NDArray[np.int64], *, fingerprint: str, settings: OrderSettings
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        grid = settings.grid
        windows = f"{grid.window_ticks}/{grid.stride_ticks}/{grid.tick_rate_hz!r}"
        self._basis = f"{fingerprint}/{windows}/{settings.seed}"
        self._block_shards = settings.block_shards
        self._is_shuffled = settings.is_shuffled
        num_ranges = np.maximum(1, -(-self.shard_sizes // MAX_BLOCK_SAMPLES))
        self._range_shards = np.repeat(np.arange(len(num_ranges)), num_ranges)
        numbers = np.arange(len(self._range_shards))
        first_ranges = np.cumsum(num_ranges) - num_ranges
        self._range_starts = (numbers - first_ranges[self._range_shards]) * MAX_BLOCK_SAMPLES
        self._range_sizes = np.minimum(
            self.shard_sizes[self._range_shards] - self._range_starts, MAX_BLOCK_SAMPLES
        )
        self._epoch = -1
        self._ranges = np.zeros(0, dtype=np.int64)
        self._block_bounds = np.zeros(1, dtype=np.int64)
        self._block_starts = np.zeros(1, dtype=np.int64)
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int32]]] = {}

    def locate(
        self, epoch: int, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return shard and window of positions in [0, num_samples), each of their shape."""
        self._enter_epoch(epoch)
        shards, windows = np.empty_like(positions), np.empty_like(positions)
        blocks = np.searchsorted(self._block_starts, positions, side="right") - 1
        for block in np.unique(blocks):
            in_block = blocks == block
            ranges, offsets = self._locate_in_block(
                int(block), positions[in_block] - self._block_starts[block]
            )
            shards[in_block] = self._range_shards[ranges]
            windows[in_block] = self._range_starts[ranges] + offsets
        return shards, windows

    def locate_one(self, epoch: int, position: int) -> tuple[int, int]:
        """Return shard and window of one position."""
        shards, windows = self.locate(epoch, np.array([position]))
        return int(shards[0]), int(windows[0])

    def block_range(self, epoch: int, positions: NDArray[np.int64]) -> tuple[int, int]:
        """Return the first and last block among positions.

        Positions past the epoch's end count as its last one.
        """
        self._enter_epoch(epoch)
        ends = np.minimum([positions.min(), positions.max()], self.num_samples - 1)
        first, last = np.searchsorted(self._block_starts, ends, side="right") - 1
        return int(first), int(last)

    def shards_in_blocks(self, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the shards of blocks [first, last] in order.

        Blocks past the epoch's end are the first ones of the next epoch.
        """
        self._enter_epoch(epoch)
        num_blocks = len(self._block_starts)
        start, stop = self._block_bounds[[first, min(last + 1, num_blocks)]]
        ranges = self._ranges[start:stop]
        if (num_beyond := last + 1 - num_blocks) > 0:
            beyond, bounds = self._arrange(epoch + 1)
            ranges = np.concatenate([ranges, beyond[: bounds[min(num_beyond, len(bounds) - 1)]]])
        return self._range_shards[ranges]

    def substitute_position(self, epoch: int, position: int, attempt: int) -> int:
        """Return the position of another sample that replaces a corrupt one.

        It is the same on every rank and worker.

        `position`: of the corrupt sample; past the epoch's end for padding.
        `attempt`: 0, then 1 if that one is corrupt too, and so on.
        """
        chance = int(self._hashes(f"{epoch}/substitute/{position}", attempt + 1)[attempt])
        return (position + 1 + chance % max(1, self.num_samples - 1)) % self.num_samples

    def _enter_epoch(self, epoch: int) -> None:
        """Arrange an epoch, unless it is the current one: O(shards)."""
        if epoch == self._epoch:
            return
        self._ranges, self._block_bounds = self._arrange(epoch)
        ends = np.concatenate([[0], np.cumsum(self._range_sizes[self._ranges])])
        self._block_starts = ends[self._block_bounds[:-1]]
        self._blocks.clear()
        self._epoch = epoch

    def _arrange(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return all ranges in the order of an epoch, and the bounds of its blocks among them."""
        ranges = np.arange(len(self._range_sizes))
        if self._is_shuffled:
            ranges = np.argsort(self._hashes(f"{epoch}/shards", len(ranges)), kind="stable")
        return ranges, _block_bounds(self._range_sizes[ranges], self._block_shards)

    def _locate_in_block(
        self, block: int, offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return range and offset in the range of offsets in a block of the current epoch."""
        ranges = self._ranges[slice(*self._block_bounds[block : block + 2])]
        if block not in self._blocks:
            ends = np.cumsum(self._range_sizes[ranges])
            order = np.zeros(0, dtype=np.int32)
            if self._is_shuffled:
                hashes = self._hashes(f"{self._epoch}/block/{block}", int(ends[-1]))
                order = np.argsort(hashes, kind="stable").astype(np.int32)
            while len(self._blocks) >= 2:  # a batch touches at most a few neighboring blocks
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = (ends, order)
        ends, order = self._blocks[block]
        if self._is_shuffled:
            offsets = order[offsets].astype(np.int64)
        members = np.searchsorted(ends, offsets, side="right")
        ranges = ranges[members]
        return ranges, offsets - (ends[members] - self._range_sizes[ranges])

    def _hashes(self, purpose: str, count: int) -> NDArray[np.uint64]:
        """Return `count` 64-bit hashes that depend on the dataset, the seed and `purpose`."""
        digest = hashlib.sha256(f"{self._basis}/{purpose}".encode()).digest()
        start = np.uint64(int.from_bytes(digest[:8], "little"))
        with np.errstate(over="ignore"):
            state = start + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
            state = (state ^ (state >> np.uint64(30))) * _MIX_1
            state = (state ^ (state >> np.uint64(27))) * _MIX_2
            return state ^ (state >> np.uint64(31))


class EpochOrder:
    """Global batches over the epochs of a :class:`SampleOrder`; none spans two epochs."""

    def __init__(self, order: SampleOrder, settings: OrderSettings) -> None:
        if order.num_samples == 0:
            raise ValueError("no samples to make batches of; fix: name a set that has some")
        self.order = order
        self.batch_size = settings.batch_size
        self._share = settings.share()
        self.share_size = self._share.stop - self._share.start
        self._last_batch = settings.last_batch
        self.state = {"last_batch": settings.last_batch, **order_state(settings)}
        self.batches_per_epoch = self._count_batches(self.batch_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"{order.num_samples} samples do not fill one batch of {self.batch_size}; fix: "
                "lower data.batch_size or set data.last_batch to pad"
            )

    def plan(self, index: int) -> BatchPlan:
        """Return global batch `index`, or this rank's share of it."""
        epoch, batch = divmod(index, self.batches_per_epoch)
        positions = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)[self._share]
        num_samples = self.order.num_samples
        weight = (positions < num_samples).astype(np.float32)
        shards, windows = self.order.locate(epoch, positions % num_samples)
        return BatchPlan(index, epoch, positions, shards, windows, weight)

    def rescale_index(self, index: int, *, batch_size: int) -> int | None:
        """See :meth:`BatchOrder.rescale_index`."""
        if (per_epoch := self._count_batches(batch_size)) == 0:
            return None
        epoch, batch = divmod(index, per_epoch)
        batch, remainder = divmod(batch * batch_size, self.batch_size)
        return None if remainder else epoch * self.batches_per_epoch + batch

    def samples_per_set(self, _index: int) -> dict[str, int]:
        """Return {}: this is no mix."""
        return {}

    def find_blocks(self, plan: BatchPlan) -> Blocks:
        """See :meth:`BatchOrder.find_blocks`."""
        return (BlockRange(0, plan.epoch, *self.order.block_range(plan.epoch, plan.positions)),)

    def list_shards(self, blocks: Blocks) -> list[int]:
        """See :meth:`BatchOrder.list_shards`."""
        ((_, epoch, first, last),) = blocks
        shards = self.order.shards_in_blocks(epoch, first, last + 1)
        return [int(shard) for shard in shards]

    def substitute(self, plan: BatchPlan, i: int, attempt: int) -> tuple[int, int]:
        """See :meth:`BatchOrder.substitute`."""
        position = self.order.substitute_position(plan.epoch, int(plan.positions[i]), attempt)
        return self.order.locate_one(plan.epoch, position)

    def _count_batches(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""
        full, remainder = divmod(self.order.num_samples, batch_size)
        return full + (1 if remainder and self._last_batch == "pad" else 0)


def order_state(settings: OrderSettings) -> dict[str, Any]:
    """Return the values of :attr:`BatchOrder.state` that every order has."""
    return {"shuffle_block_shards": settings.block_shards, **settings.grid.as_state()}


def _block_bounds(sizes: NDArray[np.int64], block_shards: int) -> NDArray[np.int64]:
    """Return where blocks begin among ranges of these sizes, and the number of ranges.

    A block takes the next ranges while it has at most `block_shards` of them and
    :data:`MAX_BLOCK_SAMPLES` samples. No range has more samples than that.
    """
    bounds = np.arange(0, len(sizes), block_shards)
    if len(sizes) and np.add.reduceat(sizes, bounds).max() > MAX_BLOCK_SAMPLES:
        ends = np.cumsum(sizes).tolist()
        firsts = [0]
        while firsts[-1] < len(sizes):
            first = firsts[-1]
            limit = (ends[first - 1] if first else 0) + MAX_BLOCK_SAMPLES
            firsts.append(bisect_right(ends, limit, first, min(first + block_shards, len(sizes))))
        return np.array(firsts)
    return np.append(bounds, len(sizes))
