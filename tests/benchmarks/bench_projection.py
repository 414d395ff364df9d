"""Measure bytes read and speed when only some streams are read.

    python tests/benchmarks/bench_projection.py --shards shards/demo

Each row is one epoch in a new process with `num_workers: 0`. "asked" is the sum of the members'
bytes of the wanted fields, from the indexes. "columns" is what was read of the column files (by
pread), and its ratio to "asked". "index" is the bytes of the indexes, and the ratio of both to
"asked". "device" is what the disk delivered (read_bytes of /proc/self/io), including the kernel's
readahead, after the set's files were dropped from the page cache; "-" if they could not be dropped.
Rows are interleaved over the rounds; rates are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
from helpers.processes import count_read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STREAMS = {
    "text only": (["internal_text", "external_text"], None),
    "touch, proprio": (["animation"], ["touch", "proprio"]),
    "audio": (["audio"], ["audio"]),
    "left eye, audio": (["audio"], ["vision_left", "audio"]),
    "everything": (["internal_text", "external_text", "audio", "animation"], None),
}
"""What is wanted -> heads that are trained, and inputs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=STREAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.shards, args.measure)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in STREAMS}
    for _ in range(args.rounds):
        for name, found in results.items():
            command = [sys.executable, __file__, "--shards", str(args.shards), "--measure", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    print(
        "wanted            asked KiB  columns KiB  ratio  index KiB  with index  device KiB"
        "  samples/s  speed-up"
    )
    slowest = statistics.median(r["rate"] for r in results["everything"])
    for name, found in results.items():
        first, rate = found[0], statistics.median(r["rate"] for r in found)
        kib = {k: first[k] / 1024 for k in ("asked", "columns", "index", "device")}
        device = f"{kib['device']:.1f}" if kib["device"] else "-"
        print(
            f"{name:16} {kib['asked']:10.1f} {kib['columns']:12.1f}"
            f"  {kib['columns'] / kib['asked']:5.3f} {kib['index']:10.1f}"
            f"  {(kib['columns'] + kib['index']) / kib['asked']:10.3f} {device:>11}"
            f" {rate:10.0f}  {rate / slowest:8.2f}"
        )


def measure(shards: Path, name: str) -> dict[str, float]:
    """Read one epoch of a set, in its own process."""
    from train.config import TrainConfig
    from train.data.loader import Loader
    from train.data.shard_source import ShardSource

    heads, modalities = STREAMS[name]
    config = TrainConfig.model_validate(
        {
            "data": {"num_workers": 0, "modalities": modalities},
            "training": {"loss_weights": {h: float(h in heads) for h in STREAMS["everything"][0]}},
        }
    )
    files = sorted(shards.glob("train-*"))
    warm_up = Loader(ShardSource(shards, split="val"), config, num_epochs=1)
    list(warm_up)  # imports and first calls
    asked = asked_bytes(shards, warm_up.shapes.streams)
    drop_cache(files)
    source, before = ShardSource(shards), counters()
    with count_read_bytes() as read:
        list(Loader(source, config, num_epochs=1))
    after = counters()
    began_s = time.perf_counter()
    num_samples = sum(len(batch["keys"]) for batch in Loader(source, config, num_epochs=1))
    return {
        "asked": asked,
        "columns": sum(count for path, count in read.items() if not path.endswith(".index")),
        "index": sum(path.stat().st_size for path in files if path.suffix == ".index"),
        "device": after["read_bytes"] - before["read_bytes"],
        "rate": num_samples / (time.perf_counter() - began_s),
    }


def asked_bytes(shards: Path, streams: Iterable[str]) -> int:
    """Return the bytes of all members of some streams of the train split."""
    from shared.shardset.index import open_index
    from shared.shardset.layout import training_columns
    from shared.shardset.manifest import read_manifest

    manifest = read_manifest(shards)
    columns = training_columns(manifest.recipe)
    indexes = [open_index(shards / e.index_file) for e in manifest.in_split("train")]
    names = [columns[stream].name for stream in streams]
    return sum(int(index.members(name).length.sum()) for index in indexes for name in names)


def drop_cache(paths: Sequence[Path]) -> None:
    """Drop files from the page cache, so that the disk reads them again."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def counters() -> dict[str, int]:
    """Return this process's input and output in bytes."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {key: int(value) for key, _, value in (line.partition(":") for line in lines)}


if __name__ == "__main__":
    main()
