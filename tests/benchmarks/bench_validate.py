"""Measure `preprocess validate` on one process, local workers, and a scheduler's workers.

    python tests/benchmarks/bench_validate.py
    python tests/benchmarks/bench_validate.py --sessions MORE     also the sessions in that folder

Checks demo sessions, each of another seed, with 0, 1 and 2 local workers, and with a scheduler and
4 workers that the script starts and ends. Then the same again with nothing changed, and the quick
check. Then 1,000 tiny sessions of two small files: first, unchanged, and with one line added to
one of them. CPU is that of the command and all workers; memory is the peak resident size of the
command, and of the largest worker. The sessions are kept under data/bench/validate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import click
from experiments.clusters import cluster

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-m", "preprocess"]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

TINY_RECIPE = """
segment: {duration_s: 1.0}
streams:
  touch: {kind: sensor, file: metadata.jsonl, key: touch, rate_hz: 5, values: [{type: fraction, count: 5}]}
  external: {kind: text, stream: external}
text: {vocab_size: 300}
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT / "data" / "bench" / "validate")
    parser.add_argument("--demo", type=int, default=24, help="demo sessions of 40 s")
    parser.add_argument("--tiny", type=int, default=1000)
    parser.add_argument("--sessions", type=Path, default=None, help="folder of other sessions")
    args = parser.parse_args()
    recordings = args.root / "recordings"
    run([*PYTHON, "demo-sessions", str(recordings), "--sessions", str(args.demo)])
    if args.sessions is not None:
        link_sessions(args.sessions, recordings)
    tiny, recipe = args.root / "tiny", args.root / "tiny.yaml"
    write_tiny_sessions(tiny, args.tiny)
    recipe.write_text(TINY_RECIPE, encoding="utf-8")
    click.echo("sessions  run                   workers  wall s   CPU s  command MiB  worker MiB")
    with cluster(4) as (address, workers):
        where = {str(num): ["--workers", str(num)] for num in (0, 1, 2)}
        where["scheduler, 4"] = ["--scheduler", address]
        groups = [worker.pid for worker in workers]
        for depth in ("full", "quick"):
            options = ["--quick"] if depth == "quick" else []
            for name, chosen in where.items():
                with tempfile.TemporaryDirectory(dir=args.root) as verdicts:
                    measured = [*chosen, *options, "--verdicts", verdicts]
                    measure(recordings, measured, [depth, name], groups)
                    if depth == "full":
                        measure(recordings, measured, ["nothing changed", name], groups)
        for name, chosen in where.items():
            with tempfile.TemporaryDirectory(dir=args.root) as verdicts:
                measured = [*chosen, "--recipe", str(recipe), "--verdicts", verdicts]
                measure(tiny, measured, ["full", name], groups)
                measure(tiny, measured, ["nothing changed", name], groups)
                change_one(tiny)
                measure(tiny, measured, ["one changed", name], groups)


def measure(sessions: Path, options: list[str], row: list[str], groups: list[int]) -> None:
    """Run the command once, and print a row of the table."""
    before_s = sum(cpu_s(pid) for pid in descendants(groups))
    command = [*PYTHON, "validate", str(sessions), "--summary", *options]
    start_s = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    usage = Usage(process.pid, groups if "--scheduler" in options else [])
    os.set_blocking(process.stdout.fileno(), False)
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        with suppress(BlockingIOError):
            process.stdout.read()
        usage.look()
        time.sleep(0.05)
    wall_s = time.perf_counter() - start_s
    code = process.returncode = os.waitstatus_to_exitcode(ended[1])
    if code not in (0, 1):  # 1: a session failed
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    used_s = sum(cpu_s(pid) for pid in descendants(groups)) - before_s
    used_s += ended[2].ru_utime + ended[2].ru_stime  # with its local workers
    num = sum(1 for path in sessions.iterdir() if path.is_dir() and path.name[0] != ".")
    name, workers = row
    worker_mib = f"{usage.worker_mib:.0f}" if usage.worker_mib else "-"
    click.echo(
        f"{num:8}  {name:15}  {workers:>12}  {wall_s:6.1f}  {used_s:6.1f}  "
        f"{usage.command_mib:11.0f}  {worker_mib:>10}"
    )


@dataclass
class Usage:
    """Peaks of a command and its workers."""

    command: int
    groups: list[int]
    command_mib: float = 0.0
    worker_mib: float = 0.0

    def look(self) -> None:
        """Update the peaks; called often, as a process that ended has none."""
        self.command_mib = max(self.command_mib, resident_mib(self.command))
        own = descendants([self.command]) - {self.command}
        workers = own or descendants(self.groups)
        self.worker_mib = max([self.worker_mib, *map(resident_mib, workers)])


def descendants(roots: list[int]) -> set[int]:
    """Return processes and everything that they started."""
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                parents[int(path.name)] = int(fields_of(int(path.name))[1])
    found = {pid for pid in roots if pid in parents}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def fields_of(pid: int) -> list[str]:
    """Read the fields of /proc/PID/stat after the name of the process."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process and of its children that ended."""
    try:
        return sum(map(int, fields_of(pid)[11:15])) / TICKS_PER_S
    except OSError:
        return 0.0


def resident_mib(pid: int) -> float:
    """Return the resident size of a process now."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0.0
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def link_sessions(source: Path, target: Path) -> None:
    """Link the files of sessions into another folder."""
    for path in sorted(source.glob("*/*")):
        linked = target / path.relative_to(source)
        if path.is_file() and not linked.exists():
            linked.parent.mkdir(exist_ok=True)
            linked.symlink_to(path.absolute())


def write_tiny_sessions(folder: Path, count: int) -> None:
    """Write sessions of 10 s: a sensor at 5 Hz and two events of text."""
    words = [
        "the",
        "door",
        "opens",
        "and",
        "a",
        "ball",
        "rolls",
        "over",
        "the",
        "red",
        "floor",
        "to",
        "me",
    ]
    for number in range(count):
        session = folder / f"session_{number:06d}"
        if session.exists():
            continue
        session.mkdir(parents=True)
        rng = random.Random(number)
        lines = [
            {"timestamp": tick / 5, "touch": [round(rng.random(), 3) for _ in range(5)]}
            for tick in range(51)
        ]
        texts = [
            {"timestamp": at_s, "stream": "external", "text": " ".join(rng.choices(words, k=4))}
            for at_s in (2.0, 6.0)
        ]
        for name, values in (("metadata.jsonl", lines), ("text.jsonl", texts)):
            content = "".join(f"{json.dumps(each)}\n" for each in values)
            (session / name).write_text(content, encoding="utf-8")


def change_one(folder: Path) -> None:
    """Add an event to the text of a session."""
    path = max(folder.iterdir()) / "text.jsonl"
    last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    event = {**last, "timestamp": last["timestamp"] + 0.25}
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(event)}\n")


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


if __name__ == "__main__":
    main()
