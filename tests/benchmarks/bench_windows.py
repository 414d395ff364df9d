"""Read one shard set in windows of many lengths and strides, without rebuilding it.

    python tests/benchmarks/bench_windows.py                          the demo's sessions
    python tests/benchmarks/bench_windows.py --durations 4 --rounds 1

First table, a row per window and stride (one common period, half a window, a whole window): samples
of an epoch, and by the formula from the segments in the indexes; samples per second and seconds of
recording per second, medians of rounds of `--seconds` at most, in this process; bytes of columns
read per second of recording that was delivered; seconds until the first batch after a resume in the
middle of the epoch, by a new loader of an open set. At the end: whether the set's files are
the same.

Then one segment in 100 of one stream is corrupted, in a copy, and an epoch is read in the longest
windows: samples that were replaced, distinct members that were reported, and their share of the
members read, which `data.max_bad_fraction` limits.

Second table: a set of 10 sensor streams and nothing else, in windows of 4 s: samples per second,
read requests and bytes of a sample, and open files, with 1, 5 and 10 of the streams read.

Third table: bytes of a batch's slot in shared memory, and of all slots that the default number of
loader processes recycles, for 1 and 3 cameras of 224 pixels and windows of 4 and 16 s.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
from helpers.processes import count_read_bytes, open_files
from helpers.sessions import write_lines
from helpers.sets import build_set, copy_set, flip_byte

from shared.recipe import Recipe, load_recipe
from shared.shardset.index import open_index
from shared.shardset.layout import training_columns
from shared.shardset.manifest import read_manifest
from train.config import TrainConfig
from train.data.batch import array_forms
from train.data.loader import Loader, num_recycled_slots, open_source
from train.shapes import WindowShapes

NUM_SENSORS = 10
SENSOR_SECONDS = 120
CAMERA = {"kind": "video", "size": 224, "rate_hz": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=Path, default=Path("data/demo"))
    parser.add_argument("--recipe", type=Path, default=Path("configs/demo_recipe.yaml"))
    parser.add_argument("--durations", nargs="+", type=float, default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of each round at most")
    parser.add_argument("--sensor-seconds", type=int, default=SENSOR_SECONDS)
    args = parser.parse_args()
    if not args.sessions.is_dir():
        sys.exit(f"{args.sessions}: no sessions; make them: python -m preprocess demo-sessions DIR")
    with tempfile.TemporaryDirectory(prefix="bench-windows-") as folder:
        shards = build_set(args.sessions, Path(folder) / "set", load_recipe(args.recipe))
        print_windows(shards, args)
        print_damage(copy_set(shards, Path(folder) / "damaged"), max(args.durations))
        print_sensors(Path(folder), args)
    print_slots()


# --- windows ---------------------------------------------------------------------------------


def print_windows(shards: Path, args: argparse.Namespace) -> None:
    """Print the first table."""
    before = files_of(shards)
    recipe = read_manifest(shards).recipe
    print(f"segments of {recipe.segment_s:g} s")
    print("window s  stride s  samples  formula  samples/s  s/s  KiB per s  resume in the middle s")
    shapes = WindowShapes.from_recipe(recipe, make_config(shards))
    for duration_s in args.durations:
        for stride_s in strides_of(duration_s, shapes.period_s):
            config = make_config(shards, window={"duration_s": duration_s, "stride_s": stride_s})
            loader = Loader(open_source(config, split="train"), config)
            num_samples = int(loader.source.window_counts.sum())
            rates, kib = measure(config, args)
            print(
                f"{duration_s:8g}  {stride_s:8g}  {num_samples:7}  "
                f"{count_windows(shards, duration_s, stride_s):7}  {rates[0]:9.1f}  "
                f"{rates[1]:3.0f}  {kib:9.1f}  {resume_s(config):8.3f}",
                flush=True,
            )
    print(f"the set's files are {'the same' if files_of(shards) == before else 'CHANGED'}\n")


def make_config(shards: Path, **data: Any) -> TrainConfig:
    """Make a configuration that reads every stream in this process."""
    values = {"shards": shards, "num_workers": 0, "batch_size": 8, **data}
    return TrainConfig.model_validate({"data": values, "training": {"num_threads": 1}})


def strides_of(duration_s: float, period_s: float) -> list[float]:
    """Return one common period, half a window and a whole window, if they are multiples of it."""
    half_s = math.floor(duration_s / 2 / period_s + 1e-6) * period_s
    return sorted({round(s, 6) for s in (period_s, half_s, duration_s) if s > 0})


def count_windows(shards: Path, duration_s: float, stride_s: float) -> int:
    """Count the train split's windows by the formula, from the segments in the indexes."""
    manifest, total = read_manifest(shards), 0
    for entry in manifest.in_split("train"):
        for _, segments in open_index(shards / entry.index_file).segments:
            runs = np.split(segments, np.flatnonzero(np.diff(segments) != 1) + 1)
            for run_s in (len(run) * manifest.recipe.segment_s for run in runs):
                total += 1 + max(0, math.ceil(round((run_s - duration_s) / stride_s, 6)))
    return total


def measure(config: TrainConfig, args: argparse.Namespace) -> tuple[tuple[float, float], float]:
    """Return samples and seconds of recording per second, and KiB read per second of recording."""
    loader = Loader(open_source(config, split="train"), config)
    next(iter(loader))  # first calls
    samples, seconds, kib = [], [], []
    for _ in range(args.rounds):
        num_samples, recorded_s, began_s = 0, 0.0, time.perf_counter()
        with count_read_bytes() as read:
            for batch in loader:
                num_samples += int((batch["weight"] > 0).sum())
                recorded_s += ticks_of(batch, loader.shapes) / loader.shapes.tick_rate_hz
                if time.perf_counter() - began_s > args.seconds:
                    break
        wall_s = time.perf_counter() - began_s
        samples.append(num_samples / wall_s)
        seconds.append(recorded_s / wall_s)
        kib.append(sum(n for f, n in read.items() if not f.endswith(".index")) / 1024 / recorded_s)
    return (statistics.median(samples), statistics.median(seconds)), statistics.median(kib)


def ticks_of(batch: dict[str, Any], shapes: WindowShapes) -> int:
    """Count the ticks of a batch in which any stream was recorded."""
    seen = torch.zeros(len(batch["keys"]), shapes.num_ticks, dtype=torch.bool)
    for name, shape in shapes.streams.items():
        if shape.num_positions == shapes.num_ticks * shape.per_tick:  # not a slow video
            valid = batch["inputs"][f"{name}_valid"]
            seen |= valid.unflatten(1, (shapes.num_ticks, shape.per_tick)).any(-1)
    return int(seen.sum())


def resume_s(config: TrainConfig) -> float:
    """Return seconds until the first batch of a new loader that resumes in the middle."""
    source = open_source(config, split="train")
    began_s = time.perf_counter()
    loader = Loader(source, config)
    loader.load_state_dict(loader.state_at(loader.batches_per_epoch // 2))
    next(iter(loader))
    return time.perf_counter() - began_s


def files_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, size and time of every file."""
    stats = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats.items()}


def print_damage(shards: Path, duration_s: float) -> None:
    """Corrupt one segment in 100 of the first stream, and read an epoch of windows."""
    manifest, number = read_manifest(shards), 0
    column = next(iter(training_columns(manifest.recipe).values())).name
    num_corrupt = 0
    for entry in manifest.in_split("train"):
        index = open_index(shards / entry.index_file)
        members = index.members(column)
        for offset, length in zip(members.offset, members.length, strict=True):
            if length and number % 100 == 0:
                flip_byte(shards / index.columns[column]["file"], int(offset + length // 2))
                num_corrupt += 1
            number += 1
    config = make_config(shards, window={"duration_s": duration_s}, max_bad_fraction=1.0)
    loader = Loader(open_source(config, split="train"), config)
    batches = list(itertools.islice(loader, loader.batches_per_epoch))
    num_members = sum(batch["num_members"] for batch in batches)
    reported = sum(len(batch["skipped"]) for batch in batches)
    keys = {source_key for batch in batches for source_key in batch["keys"]}
    num_samples = int(loader.source.window_counts.sum())
    print(
        f"{num_corrupt} of {number} segments of {column} corrupt, windows of {duration_s:g} s: "
        f"{num_samples - len(keys)} of {num_samples} samples replaced, {reported} members reported "
        f"of {num_members} read: {reported / num_members:.3%}\n"
    )


# --- sensors ---------------------------------------------------------------------------------


def print_sensors(folder: Path, args: argparse.Namespace) -> None:
    """Print the second table."""
    names = [f"sensor_{n}" for n in range(NUM_SENSORS)]
    values = [{"count": 6, "type": "scalar"}]
    streams = {
        name: {"kind": "sensor", "file": f"{name}.jsonl", "key": "v", "rate_hz": 30}
        | {"values": values}
        for name in names
    }
    for session in ("one", "two", "three"):
        write_sensors(folder / "sensors" / session, names, args.sensor_seconds)
    recipe = {"streams": streams, "split": {"val_fraction": 0}, "segment": {"duration_s": 2}}
    shards = build_set(folder / "sensors", folder / "sensor-set", Recipe.model_validate(recipe))
    print("sensor streams  samples/s  requests per sample  KiB per sample  open files")
    for count in (1, NUM_SENSORS // 2, NUM_SENSORS):
        weights = {"loss_weights": {names[0]: 1}}
        data = make_config(shards, modalities=names[:count]).data.model_dump()
        config = TrainConfig.model_validate({"data": data, "training": weights})
        batches = iter(Loader(open_source(config, split="train"), config))
        next(batches)
        num_samples, began_s = 0, time.perf_counter()
        with count_read_bytes() as read:
            while (wall_s := time.perf_counter() - began_s) < args.seconds:
                num_samples += len(next(batches)["keys"])
        print(
            f"{count:14}  {num_samples / wall_s:9.0f}  {read.num_requests / num_samples:19.2f}  "
            f"{read.total() / 1024 / num_samples:14.2f}  {open_files(shards).total():10}"
        )
    print()


def write_sensors(folder: Path, names: list[str], seconds: int) -> None:
    """Write a session of sensor files of 30 Hz."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in names:
        rows = np.round(np.cumsum(rng.normal(size=(seconds * 30, 6)), axis=0), 4)
        lines = [{"timestamp": i / 30, "v": row.tolist()} for i, row in enumerate(rows)]
        write_lines(folder / f"{name}.jsonl", lines)


# --- slots -----------------------------------------------------------------------------------


def print_slots() -> None:
    """Print the third table."""
    print("cameras  window s  MiB of a slot of 8 samples  MiB of all slots")
    for num_cameras, duration_s in itertools.product((1, 3), (4, 16)):
        streams = {f"camera_{n}": {**CAMERA, "file": f"{n}.mp4"} for n in range(num_cameras)}
        pose = {"kind": "sensor", "key": "pose", "values": [{"count": 7, "type": "scalar"}]}
        recipe = Recipe.model_validate({"streams": {**streams, "pose": pose}})
        config = TrainConfig.model_validate(
            {
                "data": {"window": {"duration_s": duration_s}},
                "training": {"loss_weights": {"pose": 1}},
            }
        )
        shapes = WindowShapes.from_recipe(recipe, config)
        forms = array_forms(8, shapes=shapes, pixels=config.data.pixels)
        size = sum(math.prod(form.shape) * form.dtype.itemsize for form in forms.values()) / 2**20
        count = num_recycled_slots(config)
        print(f"{num_cameras:7}  {duration_s:8}  {size:26.1f}  {count} x = {count * size:.0f}")


if __name__ == "__main__":
    main()
