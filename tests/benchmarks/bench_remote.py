"""Compare a shard set behind URLs with the same set in a folder: cold, warm, and with faults.

    python tests/benchmarks/bench_remote.py [--sessions data/demo] [--rounds 3] [--workers 2]

Builds a set of many small shards from sessions, serves it on this machine by HTTP and by moto's S3
server (whose own speed is part of the figures), and reads epochs. Each row: seconds from opening
the set to the first batch; samples per second from there on (medians of the rounds, whose rows are
interleaved), and the same against the local row of its round; megabytes fetched; GETs per index or
column file that was fetched (least, most); retries that were needed; samples substituted; and
whether the keys are those of the local set. "faults" fails the first GET of every third file, in
eight ways in turn. "2 ranks" are two processes with workers each and one cache; its rate is of both
together.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

from rich.console import Console

from preprocess.build.job import build_shards
from preprocess.cluster import Cluster
from shared import storage
from shared.recipe import Recipe, load_recipe
from shared.storage import RetryPolicy
from train.config import TrainConfig

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
from helpers.faulty_server import FAULTS, FaultyServer, never

SHARD_BYTES = 2 * 2**20
PATIENCE = RetryPolicy(first_wait_s=0.1, longest_wait_s=1.0)
"""Shorter waits than by default: servers on this machine are back at once."""


@dataclass(frozen=True)
class Row:
    """One kind of run, a row of the table."""

    name: str
    store: str
    is_cold: bool = True
    has_faults: bool = False
    num_ranks: int = 1


ROWS = (
    Row("local", "local", is_cold=False),
    Row("http, cold", "http"),
    Row("http, warm", "http", is_cold=False),
    Row("http, cold, faults", "http", has_faults=True),
    Row("http, cold, 2 ranks", "http", num_ranks=2),
    Row("s3, cold", "s3"),
    Row("s3, warm", "s3", is_cold=False),
    Row("s3, cold, faults", "s3", has_faults=True),
    Row("s3, cold, 2 ranks", "s3", num_ranks=2),
)


@dataclass
class Found:
    """Results of a kind of run, by round."""

    first_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    num_bytes: int = 0
    gets: list[int] = field(default_factory=list)
    num_skipped: int = 0
    is_same: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=Path, default=Path("data/demo"))
    parser.add_argument("--recipe", type=Path, default=Path("configs/demo_recipe.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-remote-") as folder, ExitStack() as stack:
        root = Path(folder)
        build_set(args.sessions, root / "set", load_recipe(args.recipe))
        places, servers = serve(root, stack)
        results = {row.name: Found() for row in ROWS}
        for _ in range(args.rounds):
            run_round(places, servers, results, root, args.workers)
    print_table(results)


def build_set(sessions: Path, out: Path, recipe: Recipe) -> None:
    """Build the set of small shards."""
    values = recipe.as_json()
    values["shard"]["target_bytes"] = SHARD_BYTES
    silent = Console(file=io.StringIO())
    with Cluster(scheduler=None, num_workers=0, console=silent) as cluster:
        build_shards(sessions, out, recipe=Recipe.model_validate(values), cluster=cluster)
    names = [p for p in out.iterdir() if p.name.startswith("train")]
    size = sum(p.stat().st_size for p in names)
    print(f"{len(list(out.glob('train*.index')))} shards, {size / 1e6:.1f} MB of train split")


def serve(root: Path, stack: ExitStack) -> tuple[dict[str, str], dict[str, FaultyServer]]:
    """Serve the set; yield its locations and the counting servers."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    stack.callback(moto.stop)
    host, port = moto.get_host_and_port()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="here")
    for path in (root / "set").iterdir():
        client.upload_file(str(path), "here", f"set/{path.name}")
    servers = {
        "http": stack.enter_context(FaultyServer(root)),
        "s3": stack.enter_context(FaultyServer(upstream=(host, port))),
    }
    os.environ["AWS_ENDPOINT_URL"] = servers["s3"].url
    places = {
        "local": str(root / "set"),
        "http": f"{servers['http'].url}/set",
        "s3": "s3://here/set",
    }
    return places, servers


def faulty(name: str, before: int) -> Any:
    """Plan a fault for the first GET of every third file."""
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    is_data = name.startswith("train")
    return FAULTS[number // 3 % len(FAULTS)] if is_data and number % 3 == before == 0 else None


def run_round(
    places: dict[str, str],
    servers: dict[str, FaultyServer],
    results: dict[str, Found],
    root: Path,
    num_workers: int,
) -> None:
    """Run every row once."""
    local_rate, local_keys = 0.0, ""
    for row in ROWS:
        found = results[row.name]
        server = servers.get(row.store)
        cache = root / f"cache-{row.store}"
        if row.is_cold:
            shutil.rmtree(cache, ignore_errors=True)
        if server is not None:
            server.plan = faulty if row.has_faults else never
            server.gets.clear()
            server.num_bytes = 0
        first_s, rate, keys, num_skipped = read_ranks(places[row.store], cache, num_workers, row)
        if server is None:
            local_rate, local_keys = rate, keys
        else:
            found.num_bytes = server.num_bytes
            found.gets = [n for name, n in server.gets.items() if name.startswith("train")]
        found.first_s.append(first_s)
        found.rates.append(rate)
        found.ratios.append(rate / local_rate)
        found.num_skipped += num_skipped
        found.is_same &= row.num_ranks > 1 or keys == local_keys


def read_ranks(
    place: str, cache: Path, num_workers: int, row: Row
) -> tuple[float, float, str, int]:
    """Of all ranks: seconds to the first batch, samples per second after it, a hash of the keys,
    samples replaced.
    """
    ranks = range(row.num_ranks)
    work = [(place, cache, num_workers, rank, row.num_ranks) for rank in ranks]
    with ProcessPoolExecutor(row.num_ranks, mp_context=get_context("spawn")) as pool:
        list(pool.map(warm_up, [1.0 if row.has_faults else 30.0 for _ in ranks]))
        done = list(pool.map(read_epoch, *zip(*work, strict=True)))
    num_samples = sum(samples for samples, _, _, _, _ in done)
    return (
        max(first_s for _, first_s, _, _, _ in done),
        num_samples / max(length_s for _, _, length_s, _, _ in done),
        "".join(keys for _, _, _, keys, _ in done),
        sum(skipped for _, _, _, _, skipped in done),
    )


def warm_up(read_timeout_s: float) -> None:
    """Imports, which are no part of the figures, and how soon silence is a failure."""
    import aiohttp  # noqa: F401
    import s3fs

    import train.data.loader  # noqa: F401

    set_start_method("fork", force=True)  # of the workers, as under torchrun
    storage.READ_TIMEOUT_S = s3fs.S3FileSystem.read_timeout = read_timeout_s
    logging.getLogger("train.data.cache").setLevel(logging.ERROR)
    logging.getLogger("shared.storage").setLevel(logging.ERROR)
    time.sleep(0.1)  # so that no rank's process takes two of these


def read_epoch(
    place: str, cache: Path, num_workers: int, rank: int, num_ranks: int
) -> tuple[int, float, float, str, int]:
    """One epoch of a rank: samples after the first batch, seconds to it and after it, hash of the
    keys, samples replaced.
    """
    from train.data.cached_set import CacheSettings
    from train.data.loader import Loader
    from train.data.shard_source import ShardSource

    config = TrainConfig.model_validate(
        {"data": {"num_workers": num_workers, "shuffle_block_shards": 4}}
    )
    began_s = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        source = ShardSource(place, cache=CacheSettings(folder=cache, retry=PATIENCE))
        loader = Loader(source, config, num_epochs=1, rank=rank, world_size=num_ranks)
        keys, num_skipped = [], 0
        first_s, num_first = 0.0, 0
        for batch in loader:
            if not keys:
                first_s, num_first = time.perf_counter() - began_s, len(batch["keys"])
            keys += batch["keys"]
            num_skipped += len(batch["skipped"])
    length_s = time.perf_counter() - began_s - first_s
    digest = hashlib.sha256(" ".join(keys).encode()).hexdigest()
    return len(keys) - num_first, first_s, length_s, digest, num_skipped


def print_table(results: dict[str, Found]) -> None:
    print(
        "set                   first s  samples/s  to local  MB fetched  GETs per file  more GETs"
        "  replaced  keys"
    )
    for name, found in results.items():
        span = f"{min(found.gets)}..{max(found.gets)}" if found.gets else "-"
        print(
            f"{name:20} {statistics.median(found.first_s):8.2f} "
            f"{statistics.median(found.rates):10.1f}  "
            f"{statistics.median(found.ratios):8.2f} {found.num_bytes / 1e6:11.1f}  {span:>13}"
            f"  {sum(found.gets) - len(found.gets):9}  {found.num_skipped:8}"
            f"  {'same' if found.is_same else 'DIFFERENT'}"
        )


if __name__ == "__main__":
    main()
