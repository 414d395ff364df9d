"""Measure the transport of batches from the loader processes to the trainer.

    python tests/benchmarks/bench_ring.py [--rounds 5] [--batches 40] [--workers 0 1 2]

Batches of 8 windows with 2 videos x 20 frames of 224 x 224. Three sides alternate in each round,
with the same samples and the same decoders:

- ring: :class:`train.data.loader.Loader`; decodes into recycled shared memory.
- ordinary: torch's DataLoader with batches assembled in its processes, as usual; tensors cross in
  new shared memory each time.
- alone: as many processes make the same batches into one buffer each and send nothing. No transport
  can be faster.

The trainer reads one byte of each page of a batch, as a copy would. For comparison: a memcpy of the
batch's bytes to warm and to new memory, in this process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from train.config import TrainConfig
from train.data.batch import array_forms, assemble_batch
from train.data.batch_maker import BatchMaker, Task
from train.data.loader import Loader
from train.data.shard_source import ShardSource
from train.data.shared_pool import SharedBatchPool

ROOT = Path(__file__).resolve().parents[2]
SESSION = ROOT / "data/bench/720p30-gop30-60s/1/session_a"
SETS = ROOT / "data/bench/ring"
CASES = (("raw", "rgb"), ("mjpeg", "rgb"), ("yuv420", "yuv420"), ("mjpeg", "yuv420"))
BATCH_SIZE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40, help="of each side in each round")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--session", type=Path, default=SESSION)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}; "
        f"{args.rounds} rounds of {args.batches} batches of {BATCH_SIZE}; ms per batch: medians"
    )
    print(
        "codec   pixels   MB  workers   ring ms  samples/s  ordinary ms  samples/s  "
        "ratio (rounds)         alone ms  transport ms  memcpy ms warm, new"
    )
    for codec, pixels in CASES:
        shards = make_set(codec, args.session)
        for num_workers in args.workers:
            measure(shards, (codec, pixels), num_workers, args.rounds, args.batches)


def make_set(codec: str, session: Path) -> Path:
    """A shard set of a session, of which windows that overlap give many samples."""
    shards = SETS / codec
    if (shards / "manifest.json").exists():
        return shards
    if not session.is_dir():
        raise SystemExit(f"{session}: no such session; tests/benchmarks/bench_build.py makes it")
    recipe = SETS / f"{codec}.json"  # JSON is YAML
    recipe.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "video": {"codec": codec},
        "split": {"val_fraction": 0.0},
    }
    recipe.write_text(json.dumps(values), encoding="utf-8")
    places = ["--sessions", str(session), "--out", str(shards), "--recipe", str(recipe)]
    subprocess.run([sys.executable, "-m", "preprocess", "shards", *places], cwd=ROOT, check=True)
    return shards


def measure(
    shards: Path, case: tuple[str, str], num_workers: int, rounds: int, batches: int
) -> None:
    config = TrainConfig.model_validate(
        {
            "data": {
                "shards": shards,
                "window": {"duration_s": 4.0, "stride_s": 1.0},
                "batch_size": BATCH_SIZE,
                "num_workers": num_workers,
                "pixels": case[1],
            }
        }
    )
    loader = Loader(ShardSource(shards), config)
    sides = {"ring": ring_s, "ordinary": ordinary_s, "alone": alone_s}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(1e3 * side(loader, batches) / batches)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = [o / r for o, r in zip(found["ordinary"], found["ring"], strict=True)]
    num_bytes = sum(t.nbytes for t in next(iter(loader))["inputs"].values())
    warm, new = memcpy_s(num_bytes)
    rates = {name: BATCH_SIZE * 1e3 / ms for name, ms in medians.items()}
    print(
        f"{case[0]:7} {case[1]:7} {num_bytes / 1e6:3.0f} {num_workers:8} "
        f"{medians['ring']:9.1f} {rates['ring']:10.0f} {medians['ordinary']:12.1f} "
        f"{rates['ordinary']:10.0f}  "
        f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})  "
        f"{medians['alone']:9.1f} {medians['ring'] - medians['alone']:13.1f} "
        f"{1e3 * warm:10.1f}, {1e3 * new:.1f}",
        flush=True,
    )


def ring_s(loader: Loader, count: int) -> float:
    return timed(iter(loader), loader, count)


class Ordinary:
    """Batches in memory of their own."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getitem__(self, index: int) -> dict:
        loader = self._loader
        plan = loader.order.plan(index)
        batch = assemble_batch(
            loader.source,
            list(zip(plan.shards.tolist(), plan.windows.tolist(), strict=True)),
            pixels=loader.config.data.pixels,
        )
        batch["weight"] = torch.from_numpy(plan.weight)
        return {**batch, "index": index, "epoch": plan.epoch, "skipped": []}


def ordinary_s(loader: Loader, count: int) -> float:
    data = loader.config.data
    batches = DataLoader(
        Ordinary(loader),
        sampler=range(1 << 30),
        batch_size=None,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_batches if data.num_workers else None,
    )
    return timed(iter(batches), loader, count)


def timed(batches, loader: Loader, count: int) -> float:
    """Seconds of `count` batches, once every slot and every process has worked."""
    data = loader.config.data
    for batch in islice(batches, data.num_workers * data.prefetch_batches + 4):
        look(batch)
    begin_s = time.perf_counter()
    for batch in islice(batches, count):
        look(batch)
    return time.perf_counter() - begin_s


def look(batch: dict) -> None:
    for tensor in batch["inputs"].values():
        tensor.view(torch.uint8).view(-1)[::4096].sum()


def alone_s(loader: Loader, count: int) -> float:
    """Seconds in which the processes make `count` batches between them and send none."""
    num_processes = max(1, loader.config.data.num_workers)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(num_processes + 1)
    processes = [
        context.Process(target=make_batches, args=(loader, worker, num_processes, count, barrier))
        for worker in range(num_processes)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    begin_s = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - begin_s
    for process in processes:
        process.join()
    return seconds


def make_batches(loader: Loader, worker: int, num_processes: int, count: int, barrier) -> None:
    torch.set_num_threads(1)
    forms = array_forms(BATCH_SIZE, shapes=loader.shapes, pixels=loader.config.data.pixels)
    pool = SharedBatchPool(forms, num_recycled=1)
    maker = BatchMaker(loader.source, loader.order, pool)
    for index in range(worker, 4 * num_processes, num_processes):
        maker.make(Task(index, 0))
    barrier.wait()
    for index in range(4 * num_processes + worker, 4 * num_processes + count, num_processes):
        maker.make(Task(index, 0))
    barrier.wait()


def memcpy_s(num_bytes: int, repeats: int = 9) -> tuple[float, float]:
    """Return seconds to copy `num_bytes` bytes to warm and to new memory."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    warm, new = [], []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        target[...] = source
        warm.append(time.perf_counter() - begin_s)
        begin_s = time.perf_counter()
        source.copy()
        new.append(time.perf_counter() - begin_s)
    return statistics.median(warm), statistics.median(new)


if __name__ == "__main__":
    main()
