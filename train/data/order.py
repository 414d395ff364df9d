"""The order of samples: arithmetic, no state. (fingerprint, seed, epoch, position) -> (shard, row).

Shards are permuted, taken in blocks, and the samples of a block are permuted among themselves. So
any number of workers or ranks sees the same global batches, resuming costs nothing, and reads stay
near each other. Permutations sort hashes (splitmix64: Steele et al. 2014), so that they stay the
same with every version of every library.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Blocks = tuple[tuple[int, int, int, int], ...]
"""What a batch has samples of: number of the set, epoch, first and last block there."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which samples make one global batch, or one rank's share of it."""

    index: int
    """Number of the global batch since the training began."""
    epoch: int
    positions: NDArray[np.int64]
    """Places of the samples in the epoch; those past its end are padding. Of a mix, in the stream.
    """
    shards: NDArray[np.int64]
    rows: NDArray[np.int64]
    weight: NDArray[np.float32]
    """1, or 0 where a sample only fills up the epoch's last batch."""


class SampleOrder:
    """Order of a split in every epoch.

    Args:
        shard_sizes: samples per shard, int64 [num_shards].
        fingerprint: of the dataset; another one gives another order.
        seed: of the run.
        block_shards: shards whose samples are mixed with each other.
        is_shuffled: False gives the stored order, in every epoch.
    """

    def __init__(
        self,
        shard_sizes: NDArray[np.int64],
        *,
        fingerprint: str,
        seed: int,
        block_shards: int,
        is_shuffled: bool = True,
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self._basis = f"{fingerprint}/{seed}"
        self._block_shards = block_shards
        self._is_shuffled = is_shuffled
        self._epoch = -1
        self._shards = np.zeros(0, dtype=np.int64)
        self._block_starts = np.zeros(1, dtype=np.int64)
        self._blocks: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def locate(
        self, epoch: int, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and row of positions 0..num_samples-1 of an epoch, each of the positions' shape."""
        if epoch != self._epoch:
            self._enter(epoch)
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        blocks = np.searchsorted(self._block_starts, positions, side="right") - 1
        for block in np.unique(blocks):
            here = blocks == block
            block_shards, block_rows = self._block(epoch, int(block))
            offsets = positions[here] - self._block_starts[block]
            shards[here], rows[here] = block_shards[offsets], block_rows[offsets]
        return shards, rows

    def blocks_of(self, epoch: int, positions: NDArray[np.int64]) -> tuple[int, int]:
        """First and last block among positions; those past the epoch's end count as its last."""
        if epoch != self._epoch:
            self._enter(epoch)
        ends = np.minimum([positions.min(), positions.max()], self.num_samples - 1)
        first, last = np.searchsorted(self._block_starts, ends, side="right") - 1
        return int(first), int(last)

    def shards_of(self, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        """Shards of blocks [first, last] in turn; past an epoch's end come the next one's."""
        if epoch != self._epoch:
            self._enter(epoch)
        num_ahead = last + 1 - len(self._block_starts)
        start, stop = first * self._block_shards, (last + 1) * self._block_shards
        shards = self._shards[start:stop]
        if num_ahead > 0:
            after = self._permuted(epoch + 1)[: num_ahead * self._block_shards]
            shards = np.concatenate([shards, after])
        return shards

    def locate_one(self, epoch: int, position: int) -> tuple[int, int]:
        """Shard and row of one position."""
        shards, rows = self.locate(epoch, np.array([position]))
        return int(shards[0]), int(rows[0])

    def substitute(self, epoch: int, position: int, attempt: int) -> int:
        """The position of another sample that stands in for a corrupt one, the same on every rank
        and worker.

        Args:
            epoch: the epoch.
            position: of the corrupt sample; may be past the epoch's end, where padding is.
            attempt: 0, then 1 where that one is corrupt too, and so on.
        """
        chance = int(self._hashes(f"{epoch}/substitute/{position}", attempt + 1)[attempt])
        return (position + 1 + chance % max(1, self.num_samples - 1)) % self.num_samples

    def _enter(self, epoch: int) -> None:
        """Permute the shards of an epoch: O(shards), once per epoch."""
        order = self._permuted(epoch)
        sizes = self.shard_sizes[order]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self._shards = order
        self._block_starts = starts[: -1 : self._block_shards]
        self._blocks.clear()
        self._epoch = epoch

    def _permuted(self, epoch: int) -> NDArray[np.int64]:
        """Shards in the order of an epoch."""
        count = len(self.shard_sizes)
        if not self._is_shuffled:
            return np.arange(count)
        return np.argsort(self._hashes(f"{epoch}/shards", count), kind="stable")

    def _block(self, epoch: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and row of each place of a block; kept while it is in use."""
        key = (epoch, block)
        if key not in self._blocks:
            first = block * self._block_shards
            members = self._shards[first : first + self._block_shards]
            sizes = self.shard_sizes[members]
            shards = np.repeat(members, sizes)
            rows = np.arange(len(shards)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            if self._is_shuffled:
                hashes = self._hashes(f"{epoch}/block/{block}", len(shards))
                order = np.argsort(hashes, kind="stable")
                shards, rows = shards[order], rows[order]
            while len(self._blocks) >= 2:  # a batch touches at most a few neighbouring blocks
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[key] = (shards, rows)
        return self._blocks[key]

    def _hashes(self, what: str, count: int) -> NDArray[np.uint64]:
        """`count` 64-bit hashes that depend on the dataset, the seed and `what`."""
        digest = hashlib.sha256(f"{self._basis}/{what}".encode()).digest()
        start = np.uint64(int.from_bytes(digest[:8], "little"))
        with np.errstate(over="ignore"):
            state = start + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
            state = (state ^ (state >> np.uint64(30))) * _MIX_1
            state = (state ^ (state >> np.uint64(27))) * _MIX_2
            return state ^ (state >> np.uint64(31))


class BatchOrder:
    """Global batches over the epochs of a :class:`SampleOrder`.

    Args:
        order: the samples.
        batch_size: samples of a global batch.
        last_batch: an epoch's incomplete last batch is filled up with weight 0, or left out.
        rank: which share of each global batch to give.
        world_size: number of shares; divides the batch size.

    Raises:
        ValueError: no batch can be made.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        batch_size: int,
        last_batch: Literal["pad", "drop"],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if order.num_samples == 0:
            raise ValueError("there is no sample to make batches of")
        if batch_size % world_size:
            raise ValueError(indivisible(batch_size, world_size))
        self.order = order
        self.batch_size = batch_size
        self.share_size = batch_size // world_size
        self._last_batch = last_batch
        self.batches_per_epoch = self._batches_of(batch_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"{order.num_samples} samples do not fill one batch of {batch_size}; "
                "lower data.batch_size or set data.last_batch: pad"
            )
        self._share = slice(rank * self.share_size, (rank + 1) * self.share_size)

    def plan(self, index: int) -> BatchPlan:
        """Global batch number `index`, or this rank's share of it."""
        epoch, batch = divmod(index, self.batches_per_epoch)
        positions = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)[self._share]
        num_samples = self.order.num_samples
        weight = (positions < num_samples).astype(np.float32)
        shards, rows = self.order.locate(epoch, positions % num_samples)
        return BatchPlan(index, epoch, positions, shards, rows, weight)

    def number_of(self, number: int, *, batch_size: int) -> int | None:
        """Number of the batch that begins where batch `number` of another size would; None where
        none does.
        """
        if (per_epoch := self._batches_of(batch_size)) == 0:
            return None
        epoch, batch = divmod(number, per_epoch)
        batch, rest = divmod(batch * batch_size, self.batch_size)
        return None if rest else epoch * self.batches_per_epoch + batch

    def _batches_of(self, batch_size: int) -> int:
        """Batches of an epoch."""
        full, rest = divmod(self.order.num_samples, batch_size)
        return full + (1 if rest and self._last_batch == "pad" else 0)

    def blocks_of(self, plan: BatchPlan) -> Blocks:
        """Where a batch is."""
        return ((0, plan.epoch, *self.order.blocks_of(plan.epoch, plan.positions)),)

    def shards_of(self, blocks: Blocks) -> list[int]:
        """Shards of such blocks in turn, and of the block that follows."""
        ((_, epoch, first, last),) = blocks
        return [int(shard) for shard in self.order.shards_of(epoch, first, last + 1)]

    def substitute(self, plan: BatchPlan, i: int, attempt: int) -> tuple[int, int]:
        """Shard and row of what stands in for sample `i` of a batch; see
        :meth:`SampleOrder.substitute`.
        """
        position = self.order.substitute(plan.epoch, int(plan.positions[i]), attempt)
        return self.order.locate_one(plan.epoch, position)


def indivisible(batch_size: int, world_size: int) -> str:
    """What fits, nearest first: numbers of ranks for the batch, or a batch for the ranks."""
    fitting = sorted(
        (n for n in range(1, batch_size + 1) if batch_size % n == 0),
        key=lambda n: (abs(n - world_size), n),
    )
    below = batch_size // world_size * world_size
    sizes = [str(n) for n in (below, below + world_size) if n]
    return (
        f"{world_size} ranks can't share a global batch of {batch_size} equally; start "
        f"{' or '.join(map(str, sorted(fitting[:2])))} ranks (torchrun --nproc-per-node), or set "
        f"data.batch_size: {' or '.join(sizes)}"
    )
