"""Compare lengths of segments: bytes of the set, speed of the build, and of reading windows.

    python tests/benchmarks/bench_segments.py                         the demo's sessions
    python tests/benchmarks/bench_segments.py --segments 2 4 --rounds 1

Per length of segments: bytes of the set and of its videos; seconds of one build in this process, as
a share of the recordings' length; the train split read in windows of 4 s that touch: samples per
second, bytes of columns read per sample, and requests. Rounds interleave the lengths; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
from helpers.processes import count_read_bytes
from helpers.sets import build_set

from shared.recipe import load_recipe
from shared.shardset.manifest import read_manifest
from shared.streams import Kind
from train.config import TrainConfig
from train.data.loader import Loader, open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=Path, default=Path("data/demo"))
    parser.add_argument("--recipe", type=Path, default=Path("configs/demo_recipe.yaml"))
    parser.add_argument("--segments", nargs="+", type=float, default=[1, 2, 4])
    parser.add_argument("--window", type=float, default=4, help="seconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of each round of reading at most")
    args = parser.parse_args()
    if not args.sessions.is_dir():
        sys.exit(f"{args.sessions}: no sessions; make them: python -m preprocess demo-sessions DIR")
    builds: dict[float, list[float]] = {length: [] for length in args.segments}
    reads: dict[float, list[dict[str, float]]] = {length: [] for length in args.segments}
    with tempfile.TemporaryDirectory(prefix="bench-segments-") as folder:
        for number in range(args.rounds):
            for length in args.segments:
                recipe = load_recipe(args.recipe).with_segment(length)
                out = Path(folder) / f"{length:g}-{number}"
                began_s = time.perf_counter()
                build_set(args.sessions, out, recipe)
                builds[length].append(time.perf_counter() - began_s)
                reads[length].append(read(out, args))
        print_table(builds, reads, Path(folder))


def read(shards: Path, args: argparse.Namespace) -> dict[str, float]:
    """Read windows of a set for a while; return what a sample costs."""
    config = TrainConfig.model_validate(
        {"data": {"shards": shards, "num_workers": 0, "window": {"duration_s": args.window}}}
    )
    batches = iter(Loader(open_source(config, split="train"), config))
    next(batches)  # first calls
    num_samples, began_s = 0, time.perf_counter()
    with count_read_bytes() as counts:
        while (wall_s := time.perf_counter() - began_s) < args.seconds:
            num_samples += len(next(batches)["keys"])
    return {
        "samples_per_s": num_samples / wall_s,
        "kib": counts.total() / 1024 / num_samples,
        "requests": counts.num_requests / num_samples,
    }


def print_table(builds: dict[float, list[float]], reads: dict[float, Any], folder: Path) -> None:
    """Print a row per length of segments."""
    print("segment s  set MiB  videos MiB  build s  samples/s  KiB per sample  requests per sample")
    for length, found in reads.items():
        shards = folder / f"{length:g}-0"
        videos = read_manifest(shards).recipe.of_kind(Kind.VIDEO)
        sizes = {path.name: path.stat().st_size / 2**20 for path in shards.iterdir()}
        video_mib = sum(n for name, n in sizes.items() if any(f".{v}." in name for v in videos))
        medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
        print(
            f"{length:9g}  {sum(sizes.values()):7.2f}  {video_mib:10.2f}  "
            f"{statistics.median(builds[length]):7.2f}  {medians['samples_per_s']:9.1f}  "
            f"{medians['kib']:14.1f}  {medians['requests']:19.2f}"
        )


if __name__ == "__main__":
    main()
