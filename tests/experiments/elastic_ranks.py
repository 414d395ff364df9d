"""Show that global batches depend on no number of ranks or loader processes, and time resumes.

    python tests/experiments/elastic_ranks.py --shards 10000 --resumes 5

First table: real processes, connected by gloo, read two epochs of a tiny set, in windows of one
segment, in overlapping ones, and in ones longer than a session. The hash covers the keys, bytes and
weights of all global batches, and of those after a resume from one process's state. Second: how
often each sample of an epoch was read, and how many there are by the formula. Third: resumes at
random positions in a set of many shards, each in its own process, timed from opening the set to the
first batch.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import torch
from helpers import sets as tiny_sets
from helpers.rank_program import start_ranks

from shared.shardset.manifest import commit_manifest, read_manifest
from train.data.loader import Loader, open_source
from train.machine import distributed
from train.tools.selftest import samples_of

WORLD_SIZES = (1, 2, 4)
NUM_WORKERS = (0, 1, 2)
CASES = (
    ("pad", {"duration_s": 0.4}),
    ("pad", {"duration_s": 1.0, "stride_s": 0.2}),
    ("pad", {"duration_s": 2.0, "stride_s": 0.6}),
    ("drop", {"duration_s": 1.0, "stride_s": 0.2}),
)
"""What becomes of an incomplete batch, and the windows."""
BATCH_SIZE = 4
MAX_RESUME_S = 1.0

_RESUME = """
import json, sys, time
import torch, train.data.loader
from train.config import TrainConfig
torch.set_num_threads(1)
job = json.loads(sys.argv[1])
config = TrainConfig.model_validate(job["config"])
began_s = time.perf_counter()
loader = train.data.loader.Loader(train.data.loader.open_source(config, split="train"), config)
opened_s = time.perf_counter() - began_s
position = int(job["share"] * loader.batches_per_epoch)
loader.load_state_dict(loader.state_at(position))
batch = next(iter(loader))
assert batch["index"] == position
print(json.dumps([position, opened_s, time.perf_counter() - began_s]))
"""


def config_of(shards: Path, **data: Any) -> Any:
    """Make a configuration of all streams, with batches that 1, 2 and 4 ranks can share."""
    return tiny_sets.make_config(shards, **{"batch_size": BATCH_SIZE, **data})


def read(config: Any, *, first: int, num_epochs: int = 2) -> tuple[str, list[Any]]:
    """Hash the global batches from `first` to the end of the epochs; also return their samples.

    Shares are gathered from all ranks.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    source = open_source(config, split="train")
    loader = Loader(source, config, rank=rank, world_size=world_size)
    loader.load_state_dict(loader.state_at(first))
    count = num_epochs * loader.batches_per_epoch - first
    batches = [
        (batch["index"], distributed.gather(samples_of(batch)))
        for batch in itertools.islice(loader, count)
    ]
    digest = hashlib.sha256(json.dumps(batches).encode()).hexdigest()[:16]
    return digest, batches


def rank_main(path: Path) -> None:
    """Run one rank with every case and number of loader processes; the main one prints JSON."""
    torch.set_num_threads(1)
    job = json.loads(path.read_text())
    with distributed.process_group(torch.device("cpu")):
        for (case, (policy, window)), num_workers, first in itertools.product(
            enumerate(CASES), NUM_WORKERS, (0, job["resume_at"])
        ):
            config = config_of(
                Path(job["shards"]), last_batch=policy, window=window, num_workers=num_workers
            )
            digest, batches = read(config, first=first)
            if distributed.is_main():
                keys = [key for _, b in batches for key, _, counts in b if counts]
                row = {"case": case, "num_workers": num_workers, "first": first}
                print(json.dumps({**row, "digest": digest, "num": len(batches), "keys": keys}))


def count_windows(shards: Path, window: dict[str, float], *, tick_rate_hz: int = 10) -> int:
    """Count the windows of a set's train split by the formula, from its manifest alone."""
    manifest = read_manifest(shards)
    length, stride = (
        round(tick_rate_hz * window.get(key, window["duration_s"]))
        for key in ("duration_s", "stride_s")
    )
    segment = round(tick_rate_hz * manifest.recipe.segment_s)
    runs = [n * segment for entry in manifest.in_split("train") for n in entry.runs]
    return sum(1 + max(0, math.ceil((ticks - length) / stride)) for ticks in runs)


def elastic_table(shards: Path, folder: Path) -> bool:
    """Print the first two tables; return whether rows are equal and samples were read once."""
    path = folder / "job.json"
    path.write_text(json.dumps({"shards": str(shards), "resume_at": 3}))
    expected: dict[tuple[int, int], str] = {}
    is_good = True
    counts: dict[int, collections.Counter[str]] = {}
    print("window, stride  last_batch  ranks  loader processes  from batch  batches  hash  equal")
    for world_size in WORLD_SIZES:
        ranks = start_ranks([str(Path(__file__).resolve()), "--rank", str(path)], world_size)
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
        assert not any(process.returncode for process in ranks), "\n".join(outputs)
        for line in outputs[0].splitlines():
            row = json.loads(line)
            case, first = row["case"], row["first"]
            is_equal = expected.setdefault((case, first), row["digest"]) == row["digest"]
            is_good &= is_equal
            if first == 0:
                counts[case] = collections.Counter(row["keys"])
            print(
                f"{title(case)}  {world_size:5}  {row['num_workers']:16}  {first:10}  "
                f"{row['num']:7}  {row['digest']}  {'yes' if is_equal else 'NO'}",
                flush=True,
            )
    print(
        "\nwindow, stride  last_batch  by the formula  read in 2 epochs: twice  once  never  more"
    )
    for case, times in counts.items():
        policy, window = CASES[case]
        num_samples = count_windows(shards, window)
        spread = collections.Counter(times.values())
        never, once, twice = num_samples - len(times), spread[1], spread[2]
        more = len(times) - once - twice
        print(f"{title(case)}  {num_samples:14}  {twice:23}  {once:4}  {never:5}  {more:4}")
        num_dropped = 0 if policy == "pad" else num_samples % BATCH_SIZE
        is_good &= more == 0 and sum(times.values()) == 2 * (num_samples - num_dropped)
    return is_good


def title(case: int) -> str:
    """Return a case's columns in the tables."""
    policy, window = CASES[case]
    stride_s = window.get("stride_s", window["duration_s"])
    return f"{window['duration_s']:6g}, {stride_s:6g}  {policy:10}"


def make_wide_set(shards: Path, root: Path, *, num_shards: int) -> Path:
    """Make a set of many shards by hard links to a small set's files."""
    root.mkdir()
    manifest = read_manifest(shards)
    train = manifest.in_split("train")
    for path in shards.iterdir():
        if path.is_file() and path.name != "manifest.json":
            (root / path.name).hardlink_to(path)
    entries = []
    for number in range(num_shards):
        entry = train[number % len(train)]
        name = f"train-{number + len(train):06}"
        (root / f"{name}.index").hardlink_to(shards / entry.index_file)
        entries.append(dataclasses.replace(entry, name=name, index_file=f"{name}.index"))
    commit_manifest(dataclasses.replace(manifest, root=root, shards=tuple(entries)))
    return root


def resume_table(shards: Path, *, num_resumes: int, seed: int) -> bool:
    """Print the third table; return whether every resume was quick."""
    chance = random.Random(seed)
    is_quick = True
    print("\nloader processes  at batch  set opened, s  first batch, s")
    for num_workers, _ in itertools.product((0, 2), range(num_resumes)):
        config = config_of(shards, num_workers=num_workers).model_dump(mode="json")
        job = {"config": config, "share": chance.uniform(0, 3)}
        command = [sys.executable, "-c", _RESUME, json.dumps(job)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        position, opened_s, first_s = json.loads(output)
        is_quick &= first_s < MAX_RESUME_S
        print(f"{num_workers:16}  {position:8}  {opened_s:13.3f}  {first_s:14.3f}", flush=True)
    return is_quick


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--resumes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank_main(args.rank)
        return 0
    with tempfile.TemporaryDirectory(prefix="elastic-") as name:
        folder = Path(name)
        shards = tiny_sets.make_set(folder)
        is_equal = elastic_table(shards, folder)
        began_s = time.monotonic()
        wide = make_wide_set(shards, folder / "wide", num_shards=args.shards)
        print(f"\n{args.shards} shards linked in {time.monotonic() - began_s:.1f} s", end="")
        is_quick = resume_table(wide, num_resumes=args.resumes, seed=args.seed)
    print(
        f"\nglobal batches {'equal' if is_equal else 'NOT EQUAL'}; resumes "
        f"{'all' if is_quick else 'NOT all'} under {MAX_RESUME_S:g} s"
    )
    return 0 if is_equal and is_quick else 1


if __name__ == "__main__":
    sys.exit(main())
