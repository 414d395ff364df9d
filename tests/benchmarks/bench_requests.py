"""Count the requests of builds whose sessions and shard set are on S3, on a server of this machine.

    python tests/benchmarks/bench_requests.py                  1,000 sessions of 2 files
    python tests/benchmarks/bench_requests.py --sessions 100

Counts by operation, retries included: a first validation and build, one that has nothing to do, one
session added, one changed, and the same after further sessions, each added by a build of its own.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]
from bench_growth import RECIPES, write_tiny
from helpers.sets import build_set
from helpers.stores import count_requests, s3_server, upload
from rich.console import Console

from preprocess.cluster import Cluster
from preprocess.validate.job import Settings, find_jobs, run_jobs
from shared.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

SESSIONS, SET = "s3://here/sessions", f"s3://here/set-{os.getpid()}"
"""Another set than that of a build that runs meanwhile: builds remove what another one left."""
LENGTH_S = 10
OPERATIONS = ("ListObjectsV2", "GetObject", "HeadObject", "PutObject", "DeleteObject")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--added", type=int, default=20, help="sessions that are added one by one")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    recipe = Recipe.model_validate({**RECIPES["tiny"], "shard": {"target_bytes": 1 << 16}})
    with tempfile.TemporaryDirectory(prefix="bench-requests-") as folder, s3_server() as fs:
        measure(Path(folder), fs, recipe, args)


def measure(root: Path, fs: Any, recipe: Recipe, args: argparse.Namespace) -> None:
    """Build and print a row per change."""

    def add(number: int) -> None:
        write_tiny(root / f"s{number:06}", LENGTH_S, random.Random(number))
        upload(root / f"s{number:06}", fs, f"here/sessions/s{number:06}")
        shutil.rmtree(root / f"s{number:06}")

    def change() -> None:
        fs.pipe_file("here/sessions/s000000/text.jsonl", b"")

    def build() -> None:
        build_set(SESSIONS, SET, recipe)  # type: ignore[arg-type]

    for number in range(args.sessions):
        add(number)
    print(f"{args.sessions} sessions of 2 files, 59 per shard")
    print(f"{'':36} {'  '.join(OPERATIONS)}  other  total  seconds")
    row("first validation", lambda: validate(recipe))
    row("validation, nothing to do", lambda: validate(recipe))
    row("first build", build)
    row("nothing to do", build)
    row("nothing to do, after 24 hours", lambda: build_set(SESSIONS, SET, recipe, keep_old_s=0))
    add(args.sessions)
    row("validation, one session added", lambda: validate(recipe))
    row("one session added", build)
    change()
    row("one session changed", build)
    for number in range(args.added):
        add(args.sessions + 1 + number)
        build()
    row(f"nothing to do, {args.added} shards more", build)
    add(args.sessions + 1 + args.added)
    row(f"one session added, {args.added} shards more", build)


def validate(recipe: Recipe) -> None:
    """Validate what has no verdict."""
    jobs = find_jobs([SESSIONS], recipe, verdicts_at=None)
    with Cluster(scheduler=None, num_workers=0, console=Console(quiet=True)) as cluster:
        for _ in run_jobs(jobs, Settings(recipe=recipe), cluster=cluster):
            pass


def row(title: str, build: Callable[[], object]) -> None:
    """Count the requests of a build and print them."""
    began_s = time.perf_counter()
    with count_requests() as counts:
        build()
    other = counts.total() - sum(counts[name] for name in OPERATIONS)
    cells = "  ".join(f"{counts[name]:{len(name)}}" for name in OPERATIONS)
    seconds = time.perf_counter() - began_s
    print(f"{title:36} {cells}  {other:5}  {counts.total():5}  {seconds:7.1f}", flush=True)


if __name__ == "__main__":
    main()
