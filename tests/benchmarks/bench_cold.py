"""Measure loading from a cold page cache, with and without prefetching of samples.

    python tests/benchmarks/bench_cold.py --shards shards/demo
    python tests/benchmarks/bench_cold.py --shards /disk/set --workers 2 --pixels rgb --rounds 9

Before a batch is read, the source asks the kernel for all its members
(``ShardSource.prefetch_samples``), so that the disk reads them in parallel. Each pass is a shuffled
epoch in a new process, after the set's files were dropped from the page cache. Both sides
alternate, in reverse order every other round. Two more sides read files that are in the cache,
where prefetching has no use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (0, 2)]
from bench_projection import drop_cache

SIDES = [(is_cold, has_prefetch) for is_cold in (True, False) for has_prefetch in (False, True)]


def main() -> None:
    """Measure all sides in turn and print their medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pixels", choices=["yuv420", "rgb"], default="yuv420")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        is_cold, has_prefetch = SIDES[args.measure]
        print(json.dumps(measure(args, is_cold=is_cold, has_prefetch=has_prefetch)))
        return
    rates: dict[tuple[bool, bool], list[float]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for index in range(len(SIDES))[:: -1 if number % 2 else 1]:
            command = [sys.executable, *sys.argv, "--measure", str(index)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rates[SIDES[index]].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{args.shards}, {args.workers} workers, {args.rounds} rounds; samples/s")
    for is_cold in (True, False):
        plain, prefetched = rates[is_cold, False], rates[is_cold, True]
        ratios = [t / p for p, t in zip(plain, prefetched, strict=True)]
        print(
            f"{'cold' if is_cold else 'warm'}: without prefetching {statistics.median(plain):.1f}, "
            f"with {statistics.median(prefetched):.1f}; ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def measure(args: argparse.Namespace, *, is_cold: bool, has_prefetch: bool) -> float:
    """Return samples per second of an epoch, from the first batch on."""
    from train.config import TrainConfig
    from train.data.loader import Loader
    from train.data.shard_source import ShardSource

    if not has_prefetch:
        ShardSource.prefetch_samples = lambda *_: None  # type: ignore[method-assign]
    data = {"num_workers": args.workers, "batch_size": args.batch_size, "pixels": args.pixels}
    config = TrainConfig.model_validate({"data": data})
    files = sorted(path for path in args.shards.iterdir() if path.is_file())
    if is_cold:
        drop_cache(files)
    else:
        for path in files:
            path.read_bytes()
    num_samples, began_s = 0.0, 0.0
    for batch in Loader(ShardSource(args.shards), config, num_epochs=1):
        if not began_s:
            began_s = time.perf_counter()
        else:
            num_samples += float(batch["weight"].sum())
    return num_samples / (time.perf_counter() - began_s)


if __name__ == "__main__":
    main()
