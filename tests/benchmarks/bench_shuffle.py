"""Compare the block shuffle with a full random permutation, by size of the block.

    python tests/benchmarks/bench_shuffle.py
    python tests/benchmarks/bench_shuffle.py --minutes 2 --batch-size 64

The set is computed, without files: shards of the default size, filled with sessions in sequence, as
the shard job does. Per `data.shuffle_block_shards`, over two epochs:

    sessions    distinct sessions in a batch, as a share of a full permutation's
    repeats     chance that two samples of a batch are of the same session, full permutation = 1
    distance    distance in the epoch of two neighboring windows of a session (median), as a
                share of a full permutation's
    new order   rank correlation of a sample's positions in two epochs (0: independent)
    open        shards that are being read at a time, and bytes to fetch before a block can begin
"""

from __future__ import annotations

import argparse

import numpy as np

from shared.recipe import Recipe
from train.data.order import EpochOrder, OrderSettings, SampleOrder
from train.data.windows import WindowGrid

WINDOW_S = 4
GRID = WindowGrid(window_ticks=40, stride_ticks=40, tick_rate_hz=10.0)
BYTES_PER_SAMPLE = 800_000
"""Both videos at 224 pixels as JPEG, sound, sensors."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=10, help="length of a session")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    args = parser.parse_args()
    shard_bytes = Recipe().shard.target_bytes
    rows = shard_bytes // BYTES_PER_SAMPLE
    windows = max(1, round(args.minutes * 60 / WINDOW_S))
    session_of = np.arange(args.shards * rows) // windows
    print(
        f"{args.shards} shards of {rows} samples, sessions of {windows} samples "
        f"({windows / rows:.1f} shards each), batches of {args.batch_size}"
    )
    print("block  sessions  repeats  distance  new order   open")
    rng = np.random.default_rng(0)
    full = [rng.permutation(len(session_of)) for _ in range(2)]
    base = measures(full, session_of, args.batch_size)
    for block in [*args.blocks, args.shards]:
        settings = OrderSettings(seed=0, grid=GRID, block_shards=block, batch_size=4096)
        samples = SampleOrder(np.full(args.shards, rows), fingerprint="bench", settings=settings)
        batches = EpochOrder(samples, settings)
        found = measures([epoch(batches, e, rows) for e in (0, 1)], session_of, args.batch_size)
        print(
            f"{block:5}  {found['sessions'] / base['sessions']:8.2f}  "
            f"{found['repeats'] / base['repeats']:7.2f}  "
            f"{found['distance'] / base['distance']:8.3f}  {found['correlation']:9.2f}   "
            f"{block} shards, {block * shard_bytes / 2**30:.2f} GiB"
        )
    print(
        f" full  {1:8.2f}  {1:7.2f}  {1:8.3f}  {base['correlation']:9.2f}   "
        f"a permutation by numpy: {base['sessions']:.1f} sessions in a batch"
    )


def epoch(batches: EpochOrder, number: int, rows: int) -> np.ndarray:
    """Return the stored number of the sample at each position of an epoch."""
    parts = []
    for i in range(batches.batches_per_epoch):
        plan = batches.plan(number * batches.batches_per_epoch + i)
        parts.append((plan.shards * rows + plan.windows)[plan.weight > 0])
    stored = np.concatenate(parts)
    assert np.array_equal(np.sort(stored), np.arange(batches.order.num_samples))
    return stored


def measures(epochs: list[np.ndarray], session_of: np.ndarray, batch_size: int) -> dict[str, float]:
    """Return the measures of the order of two epochs, int [N] each."""
    stored = epochs[0]
    sessions = session_of[stored[: len(stored) // batch_size * batch_size]].reshape(-1, batch_size)
    ordered = np.sort(sessions, axis=1)
    distinct = 1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)
    place = [np.argsort(e) for e in epochs]
    is_neighbour = session_of[1:] == session_of[:-1]
    distance = np.abs(np.diff(place[0]))[is_neighbour]
    return {
        "sessions": float(distinct.mean()),
        "repeats": float(np.mean([same_pairs(row) for row in ordered])),
        "distance": float(np.median(distance)),
        "correlation": float(np.corrcoef(place[0], place[1])[0, 1]),
    }


def same_pairs(sessions: np.ndarray) -> float:
    """Return the share of a batch's pairs that are of one session."""
    counts = np.unique(sessions, return_counts=True)[1]
    size = len(sessions)
    return float((counts * (counts - 1)).sum() / (size * (size - 1)))


if __name__ == "__main__":
    main()
