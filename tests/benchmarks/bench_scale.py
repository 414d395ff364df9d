"""What a very large shard set costs before its first byte of payload is read.

    python tests/benchmarks/bench_scale.py                up to 100,000 shards, 10^8 segments
    python tests/benchmarks/bench_scale.py --shards 1000 10000

Per size, in a fresh process: makes a manifest of as many shards of 1,000 segments in four runs (no
payload), opens it as a training source of windows of 4 s at a stride of 2 s, and draws plans of
batches at random positions of the first epochs, in the process itself and in two loader processes.
Prints seconds and memory: what opening adds to a process that has imported everything, that
process's private memory, and what a loader process adds on top.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEGMENTS_PER_SHARD = 1000
SHARD_BYTES = 256 << 20
BATCH_SIZE = 256
NUM_PLANS = 2000
PLANS_PER_EPOCH_TRIED = 200
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", nargs="+", type=int, default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    print(
        " shards    segments  manifest MiB  open s  open adds MiB  (peak)  process MiB  "
        "first batch ms  batch p50 us  new epoch ms  loader process adds MiB"
    )
    for num_shards in args.shards:
        with tempfile.TemporaryDirectory() as folder:
            write_manifest(Path(folder), num_shards)
            command = [sys.executable, __file__, "--measure", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            size = (Path(folder) / "manifest.json").stat().st_size / MIB
        r = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{num_shards:7}  {num_shards * SEGMENTS_PER_SHARD:10}  {size:12.1f}"
            f"  {r['open_s']:6.2f}  {r['open_mib']:13.1f}  {r['peak_mib']:6.1f}"
            f"  {r['total_mib']:11.1f}  {r['first_ms']:14.2f}  {r['plan_us']:12.1f}"
            f"  {r['epoch_ms']:12.1f}  {r['worker_mib']:23.1f}"
        )


def write_manifest(folder: Path, num_shards: int) -> None:
    """A manifest as the shard job writes it, of shards that are not there."""
    from shared.media.tokenizer import train_tokenizer
    from shared.recipe import Recipe
    from shared.shardset.manifest import Manifest, ShardEntry, commit_manifest

    tokenizer = train_tokenizer(["a few words"], vocab_size=300)
    content = tokenizer.json.encode()
    (folder / "tokenizer.json").write_bytes(content)
    shards = tuple(
        ShardEntry(
            name=f"train-{i:06d}",
            split="train",
            num_samples=SEGMENTS_PER_SHARD,
            runs=(SEGMENTS_PER_SHARD // 4,) * 4,
            length_bytes=SHARD_BYTES,
            index_file=f"train-{i:06d}.index",
            index_sha256=hashlib.sha256(str(i).encode()).hexdigest(),
        )
        for i in range(num_shards)
    )
    commit_manifest(
        Manifest(
            root=folder,
            recipe=Recipe(),
            shards=shards,
            generation=0,
            tokenizer_file="tokenizer.json",
            tokenizer_sha256=hashlib.sha256(content).hexdigest(),
            fields={},
            statistics={},
            counts={},
            fingerprint="0" * 32,
        )
    )


def measure(folder: Path) -> dict[str, float]:
    """Open the set and draw plans; runs in a process of its own."""
    import numpy as np
    from torch.utils.data import DataLoader

    from shared.recipe import Recipe
    from train.config import TrainConfig
    from train.data.order import OrderSettings
    from train.data.shard_source import ShardSource
    from train.data.windows import WindowGrid
    from train.shapes import WindowShapes

    gc.collect()
    before_mib, peak_before_mib = private_mib(), peak_mib()
    began_s = time.perf_counter()
    config = TrainConfig.model_validate({"data": {"window": {"duration_s": 4, "stride_s": 2}}})
    grid = WindowGrid.from_config(config)
    shapes = WindowShapes.from_recipe(Recipe(), config)
    source = ShardSource(folder, split="train").open_windows(shapes, grid)
    settings = OrderSettings(seed=0, grid=grid, block_shards=16, batch_size=BATCH_SIZE)
    order = source.batch_order(settings)
    open_s = time.perf_counter() - began_s
    peak = peak_mib() - peak_before_mib
    gc.collect()
    total_mib = private_mib()
    open_mib = total_mib - before_mib

    first_ms = timed_ms(order, order.batches_per_epoch // 2)
    epoch_ms = timed_ms(order, order.batches_per_epoch + 1)
    # In order, as a loader process asks for them, from a random place of an epoch on.
    rng = np.random.default_rng(0)
    start = int(rng.integers(order.batches_per_epoch))
    times_us = [1e3 * timed_ms(order, start + i) for i in range(NUM_PLANS)]

    plans: Any = Plans(order)
    loader: Any = DataLoader(plans, sampler=range(1 << 30), batch_size=None, num_workers=2)
    drawn = iter(loader)
    for _ in range(NUM_PLANS):
        next(drawn)
    worker_mib = max(private_mib(worker.pid) for worker in drawn._workers)
    return {
        "open_s": open_s,
        "open_mib": open_mib,
        "peak_mib": peak,
        "total_mib": total_mib,
        "first_ms": first_ms,
        "plan_us": float(np.median(times_us)),
        "epoch_ms": epoch_ms,
        "worker_mib": worker_mib,
    }


class Plans:
    """Plans drawn in loader processes."""

    def __init__(self, order: Any) -> None:
        self._order = order

    def __getitem__(self, index: int) -> Any:
        return self._order.plan(index)


def timed_ms(order: Any, index: int) -> float:
    began_s = time.perf_counter()
    order.plan(index)
    return (time.perf_counter() - began_s) * 1e3


def private_mib(pid: int | str = "self") -> float:
    """Memory that is this process's alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    kib = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return kib / 1024


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
