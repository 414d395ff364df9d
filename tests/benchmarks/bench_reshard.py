"""Measure updates of a shard set, as shares of the full build.

    python tests/benchmarks/bench_reshard.py [--workers 2] [--session FOLDER]

Builds 20 sessions (21 for the last but one case), each the same recording under another name with
texts of its own, then runs the command again after each kind of change, always from a copy of the
full set, and once more under strace: which columns are rebuilt, which files are opened,
whether the others are the same files (inode, time, SHA-256), and how many bytes are read and
written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench_sessions import FILM, MINUTE_S, Case, make_sessions

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("720p30-gop30", 1280, 720, 30, "5M")
NUM_SESSIONS = 20
COLUMN = re.compile(r"(?:train|val)-\d+(?:\.g\d+)?\.([\w.]+?)(?:\.tar|\.zarr\.zip|\.index)?$")


@dataclass(frozen=True)
class Run:
    """A command and its result."""

    wall_s: float
    output: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--session", type=Path, help="by default a minute of 720p stereo is made")
    parser.add_argument("--film", type=Path, default=FILM)
    parser.add_argument("--rounds", type=int, default=3, help="of each update; the best counts")
    args = parser.parse_args()
    if args.session is None:
        args.session = make_sessions(CASE, MINUTE_S, args.film) / "1" / "session_a"
    with tempfile.TemporaryDirectory(dir=args.session.parents[1], prefix="reshard-") as folder:
        measure(Path(folder), args)


def measure(root: Path, args: argparse.Namespace) -> None:
    sessions = link_sessions(root / "sessions", args.session, NUM_SESSIONS)
    recipe = write_recipe(root / "recipe.yaml")
    full_set = root / "full"
    full = run(sessions, full_set, recipe, args.workers)
    size = sum(p.stat().st_size for p in full_set.iterdir())
    print(
        f"{os.uname().machine}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"--workers {args.workers}; {NUM_SESSIONS} sessions like {args.session}; "
        f"set of {size / 2**20:.0f} MiB in {len(list(full_set.glob('*.index')))} shards"
    )
    python_s = min(timed([sys.executable, "-c", "pass"]).wall_s for _ in range(3))
    print(f"full build: {full.wall_s:.2f} s; starting Python alone: {python_s:.2f} s\n")
    print("change                      command s  of full  columns made again / kept the same")
    more = link_sessions(root / "more", args.session, NUM_SESSIONS + 1)
    less = link_sessions(root / "less", args.session, NUM_SESSIONS - 1)
    cases = {
        "nothing": (sessions, recipe),
        "text: vocab_size": (sessions, write_recipe(root / "t.yaml", text={"vocab_size": 280})),
        "dmel: floor_db": (
            sessions,
            write_recipe(root / "m.yaml", audio={"dmel": {"floor_db": -75.0}}),
        ),
        "audio: loudness_dbfs": (
            sessions,
            write_recipe(root / "a.yaml", audio={"loudness_dbfs": -26.0}),
        ),
        "one session added to 20": (more, recipe),
        "one of 20 removed": (less, recipe),
    }
    details = []
    for name, (folder, by) in cases.items():
        runs = []
        for _ in range(args.rounds):
            out = copy_set(full_set, root / "out")
            runs.append(run(folder, out, by, args.workers))
        made, kept, same = compare(full_set, out)
        best = min(r.wall_s for r in runs)
        print(
            f"{name:26} {best:9.2f}  {best / full.wall_s:7.4f}  "
            f"{', '.join(f'{c} {n}' for c, n in sorted(made.items())) or 'none'} / "
            f"{kept} column files, {'all the same bytes' if same else 'CHANGED'}"
        )
        if name == "nothing":
            print(f"{'  without Python itself':26} {best - python_s:9.2f}")
            inside = run_inside(folder, copy_set(full_set, root / "out"), by)
            print(f"{'  build_shards() alone':26} {inside:9.2f}")
        out = copy_set(full_set, root / "out")
        details.append((name, trace(folder, out, by, args.workers)))
    print("\nopened under strace (all processes), by what is in the file")
    for name, (read, written, io) in details:
        print(f"{name}: {io}")
        print(f"    read   {show(read)}")
        print(f"    written {show(written)}")


def link_sessions(root: Path, session: Path, count: int) -> Path:
    """Link one recording under many names, with texts of their own."""
    for number in range(1, count + 1):
        folder = root / f"session_{number:03}"
        folder.mkdir(parents=True)
        for path in session.iterdir():
            if path.name != "text.jsonl":
                (folder / path.name).hardlink_to(path)
        lines = [
            {"timestamp": t / 2, "stream": "internal", "text": f"session {number} at {t} halves"}
            for t in range(100)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path = folder / "text.jsonl"
        path.write_text(text, encoding="utf-8")
        os.utime(path, (number, number))  # the same in every folder of sessions, as the links are
    return root


def write_recipe(path: Path, **sections: dict[str, object]) -> Path:
    path.write_text(json.dumps(sections), encoding="utf-8")  # JSON is YAML
    return path


def copy_set(full: Path, out: Path) -> Path:
    """Copy a set by hard links; its files are never changed in place."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(full, out, copy_function=os.link)
    return out


def command(sessions: Path, out: Path, recipe: Path, workers: int) -> list[str]:
    places = ["--sessions", str(sessions), "--out", str(out), "--recipe", str(recipe)]
    return [sys.executable, "-m", "preprocess", "shards", *places, "--workers", str(workers)]


def run(sessions: Path, out: Path, recipe: Path, workers: int) -> Run:
    return timed(command(sessions, out, recipe, workers))


def timed(arguments: list[str]) -> Run:
    begin_s = time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    wall_s = time.perf_counter() - begin_s
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stdout}{done.stderr}")
    return Run(wall_s, done.stdout)


def run_inside(sessions: Path, out: Path, recipe: Path) -> float:
    """Return seconds of build_shards in a process that has imported everything."""
    code = f"""
import time, io
from pathlib import Path
from rich.console import Console
from preprocess.cluster import Cluster
from preprocess.build.job import build_shards
from shared.recipe import load_recipe
recipe = load_recipe({str(recipe)!r})
begin_s = time.perf_counter()
with Cluster(scheduler=None, num_workers=2, console=Console(file=io.StringIO())) as cluster:
    build_shards({str(sessions)!r}, {str(out)!r}, recipe=recipe, cluster=cluster)
print(time.perf_counter() - begin_s)
"""
    return float(timed([sys.executable, "-c", code]).output)


def compare(full: Path, out: Path) -> tuple[Counter[str], int, bool]:
    """Return rebuilt columns, kept column files, and whether these are the same files and bytes."""
    made: Counter[str] = Counter()
    kept, same = 0, True
    before = {p.name: p for p in full.iterdir()}
    for path in sorted(out.iterdir()):
        found = COLUMN.match(path.name)
        if found is None or path.suffix == ".index":
            continue
        if path.name not in before:
            made[found[1]] += 1
            continue
        kept += 1
        old = before[path.name]
        same &= path.stat().st_ino == old.stat().st_ino
        same &= path.stat().st_mtime_ns == old.stat().st_mtime_ns
        same &= digest(path) == path_digest(out, path.name)
    return made, kept, same


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def path_digest(out: Path, name: str) -> str:
    """Return the SHA-256 of a column file by the index of the new set."""
    from shared.shardset.index import open_index
    from shared.shardset.manifest import read_manifest

    for entry in read_manifest(out).shards:
        for column in open_index(out / entry.index_file).columns.values():
            if column["file"] == name:
                return str(column["sha256"])
    return "none"


def trace(
    sessions: Path, out: Path, recipe: Path, workers: int
) -> tuple[Counter[str], Counter[str], str]:
    """Return files opened for reading and writing, by kind, and bytes read and written."""
    if shutil.which("strace") is None:
        return Counter(), Counter(), "no strace here"
    logs = out.with_suffix(".strace")
    logs.mkdir()
    calls = "openat,open,read,pread64,write,pwrite64"
    tracer = ["strace", "-ff", "-y", "-e", f"trace={calls}", "-o", str(logs / "log")]
    timed([*tracer, *command(sessions, out, recipe, workers)])
    read: Counter[str] = Counter()
    written: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    place = re.compile(
        r"(?P<call>read|pread64|write|pwrite64)\(\d+<(?P<path>[^>]+)>.*= (?P<size>\d+)$"
    )
    opened = re.compile(r'open(?:at)?\([^"]*"(?P<path>[^"]+)", (?P<flags>[A-Z_|]+).*= \d+')
    lines = (
        line
        for log in sorted(logs.iterdir())  # one per process and thread
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    for line in lines:
        found = opened.search(line)
        if found and (kind := kind_of(found["path"], sessions, out)):
            is_write = "O_WRONLY" in found["flags"] or "O_RDWR" in found["flags"]
            (written if is_write else read)[kind] += 1
        found = place.search(line)
        if found and kind_of(found["path"], sessions, out):
            sizes["read" if "read" in found["call"] else "written"] += int(found["size"])
    shutil.rmtree(logs)
    io = f"{sizes['read'] / 2**20:.1f} MiB read, {sizes['written'] / 2**20:.1f} MiB written"
    return read, written, io


def kind_of(path: str, sessions: Path, out: Path) -> str | None:
    """Return the kind of a file of the sessions or the set; None for other paths."""
    name = path.rpartition("/")[2]
    if path.startswith(f"{sessions}/") and "." in name:
        return f"sessions' {name}"
    if not path.startswith(f"{out}/") or name.endswith(".tmp"):
        return None
    found = COLUMN.match(name)
    return found[1] if found else name


def show(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {n}" for kind, n in sorted(counts.items())) or "nothing"


if __name__ == "__main__":
    main()
