"""Measure builds of 100 to 100,000 tiny sessions, and with one added, changed and removed.

    python tests/benchmarks/bench_sessions_curve.py --folder /tmp/curve --counts 100 1000 10000

A session has ten segments of 1 s and four streams in two files. Every run is a process of its own,
as ``python -m preprocess shards`` is. The last column is the processor time of all processes per
session, above that of the first number of sessions: without the start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

RECIPE = """\
segment: {duration_s: 1.0}
streams:
  touch: {kind: sensor, key: touch, rate_hz: 5, values: [{type: fraction, count: 5}]}
  proprio: {kind: sensor, key: proprio, rate_hz: 5, values: [{type: angle, unit: rad, count: 6}]}
  internal: {kind: text, stream: internal}
  external: {kind: text, stream: external}
text: {vocab_size: 300}
"""
WORDS = ["the", "door", "opens", "and", "a", "ball", "rolls", "over", "the", "red", "floor"]
PHASES = {
    "survey": "survey_recordings",
    "scan": "scan_sessions",
    "previous": "read_previous_set",
    "plan": "plan_shards",
    "build": "_write_shards",
    "commit": "commit_set",
}
"""Functions of preprocess.build.job, each timed in the client."""
HEAD = ("run", "s", "cpu s", *PHASES, "client", "worker", "cpu ms/each")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch; sessions are kept")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("SESSIONS", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        run_job(args.folder, Path(args.child[0]), Path(args.child[1]), args.workers)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "recipe.yaml").write_text(RECIPE)
    bases: dict[str, tuple[int, float]] = {}
    for count in args.counts:
        measure(args.folder, count, args.workers, bases)


def measure(folder: Path, count: int, workers: int, bases: dict[str, tuple[int, float]]) -> None:
    """Print the rows of one number of sessions."""
    sessions, out = folder / f"s{count}", folder / f"out{count}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(sessions / "s_added", ignore_errors=True)
    for number in range(count):
        write_session(sessions / f"s{number:06d}", seed=number)
    print(f"\n{count:,} sessions, {10 * count:,} segments", flush=True)
    print("".join(f"{name:>11}" for name in HEAD), flush=True)
    for name in ("first", "no-op", "added", "changed", "removed"):
        if name == "added":
            write_session(sessions / "s_added", seed=-1)
        elif name == "changed":
            shutil.rmtree(sessions / "s_added")
            write_session(sessions / "s_added", seed=-2)
        elif name == "removed":
            shutil.rmtree(sessions / "s_added")
        before = written_files(out)
        run = measure_run(folder, sessions, out, workers)
        base_count, base_s = bases.setdefault(name, (count, run["cpu"]))
        each_ms = 1e3 * (run["cpu"] - base_s) / max(1, count - base_count)
        cells = [f"{run['s']:.2f}", f"{run['cpu']:.2f}"]
        cells += [f"{run['phases'].get(phase, 0.0):.2f}" for phase in PHASES]
        cells += [f"{run['client_mib']:.0f} MiB", f"{run['worker_mib']:.0f} MiB"]
        cells.append(f"{each_ms:.3f}" if count > base_count else "")
        after = written_files(out)
        changed_kib = sum(after[n][1] for n in after if after[n] != before.get(n)) / 1024
        print("".join(f"{cell:>11}" for cell in (name, *cells)), f"  wrote {changed_kib:,.0f} KiB")
    sizes = {name: size / 1024 for name, (_, size) in sorted(written_files(out).items())}
    small = {n: s for n, s in sizes.items() if n.endswith((".json", ".jsonl"))}
    print(
        "files:", ", ".join(f"{name} {size:,.0f} KiB" for name, size in small.items()), flush=True
    )


def measure_run(folder: Path, sessions: Path, out: Path, workers: int) -> dict:
    """Run the job once; return its seconds, phases, and the peak memory of its processes."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, __file__, "--folder", str(folder), "--workers", str(workers)]
    command += ["--child", str(sessions), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as job:
        peaks: dict[int, int] = {}
        watcher = threading.Thread(target=watch, args=(job, peaks))
        watcher.start()
        assert job.stdout is not None
        output = job.stdout.read()
        watcher.join()
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if job.returncode:
        raise SystemExit(f"the job failed with {job.returncode}")
    report = json.loads(output.splitlines()[-1])
    return {
        "s": seconds,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "phases": report["phases"],
        "client_mib": report["peak_kib"] / 1024,
        "worker_mib": max((kib for pid, kib in peaks.items() if pid != job.pid), default=0) / 1024,
    }


def watch(job: subprocess.Popen[bytes], peaks: dict[int, int]) -> None:
    """Note the peak resident memory (KiB) of a process and its descendants until it ends."""
    while job.poll() is None:
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                lines = (folder / "status").read_text().splitlines()
            except OSError:
                continue
            values = dict(line.split(":", 1) for line in lines)
            parents[int(folder.name)] = int(values["PPid"]), values.get("VmHWM", "0 kB")
        family = {job.pid}
        for _ in range(4):
            family |= {pid for pid, (parent, _) in parents.items() if parent in family}
        for pid in family & parents.keys():
            peaks[pid] = max(peaks.get(pid, 0), int(parents[pid][1].split()[0]))
        time.sleep(0.5)


def run_job(folder: Path, sessions: Path, out: Path, workers: int) -> None:
    """Build in this process, and print a line of JSON with the seconds of each phase."""
    from functools import partial

    from rich.console import Console

    from preprocess.build import job
    from preprocess.cluster import Cluster
    from shared.recipe import load_recipe

    phases: dict[str, float] = {}

    def timed(function, phase: str, *args, **kwargs):
        started = time.monotonic()
        result = function(*args, **kwargs)
        phases[phase] = phases.get(phase, 0.0) + time.monotonic() - started
        return result

    for phase, name in PHASES.items():
        setattr(job, name, partial(timed, getattr(job, name), phase))
    console = Console(file=sys.stderr)
    with Cluster(scheduler=None, num_workers=workers, console=console) as cluster:
        recipe = load_recipe(folder / "recipe.yaml")
        job.build_shards(sessions, out, recipe=recipe, cluster=cluster)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"phases": phases, "peak_kib": peak_kib}))


def write_session(folder: Path, *, seed: int) -> None:
    """Write a session of 10 s; the same seed gives the same bytes."""
    if folder.exists():
        return
    rng = random.Random(seed)
    part = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with (part / "metadata.jsonl").open("w") as file:
        for number in range(51):
            touch = ", ".join(f"{rng.random():.3f}" for _ in range(5))
            angles = ", ".join(f"{rng.uniform(-3, 3):.3f}" for _ in range(6))
            file.write(
                f'{{"timestamp": {number / 5:.1f}, "touch": [{touch}], "proprio": [{angles}]}}\n'
            )
    with (part / "text.jsonl").open("w") as file:
        for number in range(4):
            line = {
                "timestamp": 2.0 * number + 1,
                "stream": ("internal", "external")[number % 2],
                "text": " ".join(rng.choices(WORDS, k=4)),
            }
            file.write(json.dumps(line) + "\n")
    part.rename(folder)


def written_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return modification time and size of each file of a folder."""
    if not folder.exists():
        return {}
    stats = {entry.name: entry.stat() for entry in os.scandir(folder) if entry.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


if __name__ == "__main__":
    main()
