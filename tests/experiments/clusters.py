"""Build on real Dask clusters of this machine, and compare the sets.

    python tests/experiments/clusters.py

Builds the sessions of tests/experiments/build_kills.py in this process, on one and four local
workers, by a scheduler's address, and by one whose workers are killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import yaml
from helpers.processes import finish, launch

from experiments.build_kills import Start, all_hashes, command, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.recipe import Recipe

_DASK = [sys.executable, "-m", "dask"]


@contextmanager
def _process(arguments: list[str], pattern: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a process in its own group; yield it and the match in its output."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tempfile.gettempdir(),
    )
    try:
        for line in process.stderr:
            match = re.search(pattern, line)
            if match:
                break
        else:
            raise RuntimeError(f"{arguments} ended")
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield process, match[1]
    finally:
        kill_group(process)
        process.wait()
        drain.join()
        process.stderr.close()


def kill_group(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a process and all of its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def cluster(num_workers: int) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """Start a cluster; yield its scheduler's address and its workers, a process group each."""
    with ExitStack() as stack:
        arguments = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        _, address = stack.enter_context(
            _process([*_DASK, *arguments], r"Scheduler at:\s+(tcp://\S+)")
        )
        workers = [
            stack.enter_context(
                _process(
                    [*_DASK, "worker", address, "--nthreads", "1", "--no-dashboard"],
                    r"Registered to:\s+(\S+)",
                )
            )[0]
            for _ in range(num_workers)
        ]
        yield address, workers


def build_over_cluster(
    sessions: Path,
    out: Path,
    recipe: Recipe,
    *,
    num_workers: int,
    num_killed: int,
    task_s: float = 8.0,
) -> None:
    """Build by a scheduler's address; kill some workers when shards appear."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.as_json()), encoding="utf-8")
    with cluster(num_workers) as (address, workers):
        start = Start("cluster", sessions, path, None)
        _build(start, out, address, workers[:num_killed], task_s=task_s)


def _build(
    start: Start,
    out: Path,
    address: str,
    victims: list[subprocess.Popen[str]],
    *,
    task_s: float = 8.0,
) -> str:
    options = ["--scheduler", address, "--task-seconds", str(task_s)]
    job = launch(command(start, out, *options), scratch=out.with_suffix(".tmp"))
    for number, victim in enumerate(victims):
        while job.poll() is None and len(list(out.glob("*.index"))) < number + 1:
            time.sleep(0.01)
        assert job.poll() is None, "the job ended before a worker was killed"
        kill_group(victim)
    return finish(job)


def main() -> int:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="clusters-") as folder:
        root = Path(folder)
        start = prepare(root)[0]
        results = {}

        def report(title: str, out: Path, begin_s: float) -> None:
            results[title] = all_hashes(out)
            first = next(iter(results.values()))
            verdict = "byte-equal" if results[title] == first else "DIFFERENT"
            length_s = time.monotonic() - begin_s
            print(
                f"{title:44} {len(results[title])} files  {length_s:5.1f} s  {verdict}", flush=True
            )

        for count in (0, 1, 4):
            begin_s = time.monotonic()
            out = root / f"local-{count}"
            finish(launch(command(start, out, "--workers", str(count)), scratch=root / "scratch"))
            report(f"--workers {count}", out, begin_s)
        for num_killed in (0, 2):
            with cluster(4) as (address, workers):
                begin_s = time.monotonic()
                out = root / f"address-{num_killed}"
                _build(start, out, address, workers[:num_killed])
            title = f"--scheduler tcp://..., 4 workers, {num_killed} of them killed"
            report(title, out, begin_s)
        return 0 if all(r == results["--workers 0"] for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
