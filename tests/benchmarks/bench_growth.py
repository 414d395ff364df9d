"""Compare reading of a set that grew by one session at a time with the same set packed.

    python tests/benchmarks/bench_growth.py                           1,000 demo sessions of 12 s
    python tests/benchmarks/bench_growth.py --content tiny
    python tests/benchmarks/bench_growth.py --sessions 100 --seconds 60 --workers 0

The grown set has one shard per session, the packed one is its copy after ``--compact``. The grown
set is made by two builds, the second with a packing that opens a shard per session. A small set is
also made by real additions, and its files must have the same bytes.

Per number of loader processes and state of the page cache, both sets are read in turns, each in a
new process: an epoch of windows of 4 s in the training order. CPU time counts that of the loader
processes. `opening` is the difference of CPU time per shard and process that opens it, less the
time of the packed set: what :data:`preprocess.build.growth.OPEN_S` is fitted to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]
from bench_projection import counters, drop_cache
from helpers.sets import build_set

from shared.recipe import Recipe
from shared.shardset.index import open_index
from shared.shardset.manifest import read_manifest

NUM_RECORDINGS = 8
"""Demo sessions that are made; the others are links to them."""

NUM_VERIFIED = 20
TEXTS = {"internal_text", "external_text", "external"}
WORDS = ["the door", "opens and", "a ball", "rolls over", "the red", "floor to me"]
RECIPES: dict[str, dict[str, Any]] = {
    "demo": {"video": {"size": 64}, "split": {"val_fraction": 0}},
    "tiny": {
        "segment": {"duration_s": 1.0},
        "streams": {
            "touch": {
                "kind": "sensor",
                "file": "metadata.jsonl",
                "key": "touch",
                "rate_hz": 5,
                "values": [{"type": "fraction", "count": 5}],
            },
            "external": {"kind": "text", "stream": "external"},
        },
        "text": {"vocab_size": 300},
        "split": {"val_fraction": 0},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--content", choices=list(RECIPES), default="demo")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=12, help="length of a session")
    parser.add_argument("--size", type=int, default=64, help="pixels of a picture's sides")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps the sets here, and uses those there")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(**args.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as folder:
        root = args.folder or Path(folder)
        sets = make_sets(root, args)
        compare(sets, args)


def make_sets(root: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Make the grown and the packed set, unless they are there."""
    sets = {name: root / f"{args.content}-{args.sessions}-{name}" for name in ("grown", "packed")}
    if all(path.is_dir() for path in sets.values()):
        return sets
    values = RECIPES[args.content]
    if args.content == "demo":
        values = {**values, "video": {"size": args.size}}
    recipe = Recipe.model_validate(values)
    sessions = write_sessions(root / "sessions", args)
    verify_growth(sessions, root / "verified", recipe)
    grow(sessions, sets["grown"], recipe)
    shutil.copytree(sets["grown"], sets["packed"], copy_function=os.link)
    before = {path.name for path in sets["packed"].iterdir()}
    began_s = cpu_s()
    build_set(sessions, sets["packed"], recipe, compact=True)
    compact_s = cpu_s() - began_s
    columns = [p for p in sets["packed"].iterdir() if p.name not in before]
    size = sum(path.stat().st_size for path in columns) / 2**20
    print(f"--compact: {compact_s:.1f} s of CPU time, {size:.1f} MiB written")
    print_additions(sessions, sets["grown"], root / "added", recipe)
    shutil.rmtree(sessions)
    return sets


def write_sessions(root: Path, args: argparse.Namespace) -> Path:
    """Write sessions; those of the demo are links to a few recordings."""
    names = [f"session_{number:06}" for number in range(args.sessions)]
    if args.content == "tiny":
        for name in names:
            write_tiny(root / name, args.seconds, random.Random(name))
        return root
    from preprocess.demo.world import write_demo_sessions

    made = root.with_name("recordings")
    write_demo_sessions(
        made, num_sessions=NUM_RECORDINGS, duration_s=args.seconds, seed=0, progress=lambda _: None
    )
    recordings = sorted(made.iterdir())
    for number, name in enumerate(names):
        source = recordings[number % len(recordings)]
        shutil.copytree(source, root / name, copy_function=os.link)
    return root


def write_tiny(folder: Path, length_s: int, rng: random.Random) -> None:
    """Write five readings five times per second, and a sentence every 4 s."""
    folder.mkdir(parents=True)
    readings = [
        {"timestamp": i / 5, "touch": [round(rng.random(), 3) for _ in range(5)]}
        for i in range(5 * length_s + 1)
    ]
    texts = [
        {"timestamp": t, "stream": "external", "text": " ".join(rng.choices(WORDS, k=4))}
        for t in range(2, length_s, 4)
    ]
    for file, lines in (("metadata.jsonl", readings), ("text.jsonl", texts)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / file).write_text(content, encoding="utf-8")


def grow(sessions: Path, out: Path, recipe: Recipe) -> None:
    """Build a set of one session per shard, as additions of one session each leave it."""
    from preprocess.build import plan

    names = sorted(path.name for path in sessions.iterdir())
    first = out.with_name("first")
    shutil.copytree(sessions / names[0], first / names[0], copy_function=os.link)
    build_set(first, out, recipe)
    shutil.rmtree(first)
    pack = plan.pack

    def pack_each(new: Any, recipe: Recipe, planned: Any = ()) -> list[Any]:
        shards: list[Any] = []
        for stored in new:
            shards += pack([stored], recipe, [*planned, *shards])
        return shards

    with patch.object(plan, "pack", pack_each):
        build_set(sessions, out, recipe)


def verify_growth(sessions: Path, root: Path, recipe: Recipe) -> None:
    """Check that a small set has the bytes that real additions give it."""
    names = sorted(path.name for path in sessions.iterdir())[:NUM_VERIFIED]
    added = root / "sessions"
    for name in names:
        shutil.copytree(sessions / name, added / name, copy_function=os.link)
        build_set(added, root / "added", recipe)
    grow(added, root / "grown", recipe)
    if contents(root / "added") != contents(root / "grown"):
        raise SystemExit("the sets differ from those that real additions give")
    print(f"{len(names)} real additions give the same {len(contents(root / 'grown'))} shards")
    shutil.rmtree(root)


def contents(shards: Path) -> list[Any]:
    """Return what the indexes of a set say, without names of files."""
    found = []
    for entry in read_manifest(shards).shards:
        index = open_index(shards / entry.index_file, sha256=entry.index_sha256)
        columns = {n: {**c, "file": ""} for n, c in index.columns.items()}
        arrays = {name: array.tobytes() for name, array in index.arrays.items()}
        found.append((entry.name, {**index.header, "columns": columns}, arrays))
    return found


def print_additions(sessions: Path, grown: Path, root: Path, recipe: Recipe) -> None:
    """Print what a build with nothing to do and an added session cost, in a small and a large set.

    Each session has a shard of its own.
    """
    names = sorted(path.name for path in sessions.iterdir())
    print("sessions  build    CPU s  files read  MiB read  files written  MiB written")
    for count in (NUM_VERIFIED, len(names)):
        own, out = root / "sessions", root / "set"
        for name in names[:count]:
            shutil.copytree(sessions / name, own / name, copy_function=os.link)
        if count == len(names):
            shutil.copytree(grown, out, copy_function=os.link)
        else:
            grow(own, out, recipe)
        build_set(own, out, recipe)
        for title in ("no-op", "added"):
            if title == "added":
                shutil.copytree(own / names[0], own / "new", copy_function=os.link)
            print(f"{count:8}  {title}  {cost_of_build(own, out, recipe)}", flush=True)
        shutil.rmtree(root)


def cost_of_build(sessions: Path, out: Path, recipe: Recipe) -> str:
    """Return the cells of a row: CPU time, and files of the set with bytes of all files."""
    opened: set[tuple[str, bool]] = set()
    _watched[0] = lambda path, is_write: opened.add((path, is_write)) if str(out) in path else None
    before, began_s = counters(), cpu_s()
    build_set(sessions, out, recipe)
    used_s, after = cpu_s() - began_s, counters()
    _watched[0] = None
    written = sum(is_write for _, is_write in opened)
    mib = {key: (after[key] - before[key]) / 2**20 for key in ("rchar", "wchar")}
    return (
        f"{used_s:7.2f}  {len(opened) - written:10}  {mib['rchar']:8.2f}  {written:13}  "
        f"{mib['wchar']:11.2f}"
    )


_watched: list[Any] = [None]
"""What is called with the path of each file that is opened, and whether it is written."""


def watch_opened(event: str, values: tuple[Any, ...]) -> None:
    """Pass on which files are opened; an audit hook, which stays."""
    if event == "open" and _watched[0] is not None and isinstance(values[0], (str, bytes, Path)):
        is_write = bool(values[2] & (os.O_WRONLY | os.O_RDWR))
        _watched[0](os.fsdecode(values[0]), is_write)


sys.addaudithook(watch_opened)


def compare(sets: dict[str, Path], args: argparse.Namespace) -> None:
    """Read both sets in turns and print a row per number of processes and state of the cache."""
    counts = {name: len(read_manifest(path).shards) for name, path in sets.items()}
    print(f"{args.content}: {args.sessions} sessions of {args.seconds} s in {counts} shards")
    print(
        "workers  cache    windows  CPU ms per window  ratio  wall ratio  opening  first batch s  "
        "resume s     open files  MiB        sessions in a batch"
    )
    for workers in args.workers:
        for is_cold in (False, True):
            found: dict[str, list[dict[str, float]]] = {name: [] for name in sets}
            for number in range(args.rounds):
                for name in sorted(sets, reverse=bool(number % 2)):
                    found[name].append(run(sets[name], workers, args.batch_size, is_cold=is_cold))
            print_row(found, counts, workers, is_cold=is_cold)


def print_row(
    found: dict[str, list[dict[str, float]]],
    counts: dict[str, int],
    workers: int,
    *,
    is_cold: bool,
) -> None:
    def pair(key: str, form: str, scale: float = 1) -> str:
        values = [statistics.median(each[key] for each in found[n]) for n in ("packed", "grown")]
        return " ".join(f"{value * scale:{form}}" for value in values)

    def ratio(key: str) -> float:
        pairs = zip(found["packed"], found["grown"], strict=True)
        return statistics.median(grown[key] / packed[key] for packed, grown in pairs)

    number = found["grown"][0]["num_windows"]
    pairs = zip(found["packed"], found["grown"], strict=True)
    more_s = statistics.median(g["cpu_s"] - p["cpu_s"] for p, g in pairs) * number
    opened = (counts["grown"] - counts["packed"]) * max(1, workers)
    print(
        f"{workers:7}  {'cold' if is_cold else 'warm'}  {number:9.0f}  "
        f"{pair('cpu_s', '8.2f', 1e3):>17}  {ratio('cpu_s'):5.2f}  {ratio('wall_s'):10.2f}  "
        f"{more_s / opened * 1e3:4.2f} ms  {pair('first_s', '6.2f'):>13}  "
        f"{pair('resume_s', '4.2f')}  {pair('num_files', '5.0f'):>13}  {pair('mib', '4.0f')}  "
        f"{pair('num_sessions', '4.1f')}",
        flush=True,
    )


def run(shards: Path, workers: int, batch_size: int, *, is_cold: bool) -> dict[str, float]:
    """Read a set in a new process."""
    files = [path for path in shards.iterdir() if path.is_file()]
    if is_cold:
        drop_cache(files)
    else:
        for path in files:
            path.read_bytes()
    what = {"shards": str(shards), "workers": workers, "batch_size": batch_size}
    command = [sys.executable, __file__, "--measure", json.dumps(what)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(shards: str, workers: int, batch_size: int) -> dict[str, float]:
    """Read an epoch; return time per window from the first batch on, and what else it takes."""
    from train.config import TrainConfig
    from train.data.loader import Loader, open_source

    streams = tuple(read_manifest(Path(shards)).recipe.streams)
    data = {"shards": shards, "num_workers": workers, "batch_size": batch_size}
    config = TrainConfig.model_validate(
        {
            "data": {**data, "modalities": streams},
            "training": {"loss_weights": {name: 1.0 for name in streams if name in TEXTS}},
        }
    )
    began_s = time.perf_counter()
    loader = Loader(open_source(config, split="train"), config, num_epochs=1)
    batches = iter(loader)
    num_windows, num_files, mib, num_sessions = 0.0, 0, 0.0, []
    first_s = read_s = used_s = 0.0
    for number, batch in enumerate(batches):
        if number == 0:
            first_s = time.perf_counter() - began_s
            read_s, used_s = time.perf_counter(), cpu_s()
            continue
        num_windows += float(batch["weight"].sum())
        num_sessions.append(len({key.rpartition("@")[0] for key in batch["keys"]}))
        if number % 16 == 1:
            with suppress(FileNotFoundError, ProcessLookupError):  # a process has just ended
                processes = own_processes()
                num_files = max(num_files, *map(count_columns, processes), 0)
                mib = max(mib, *map(memory_mib, processes), 0)
    wall_s, used_s = time.perf_counter() - read_s, cpu_s() - used_s
    resumed = Loader(open_source(config, split="train"), config)
    began_s = time.perf_counter()
    resumed.load_state_dict(resumed.state_at(loader.batches_per_epoch // 2))
    next(iter(resumed))
    return {
        "num_windows": num_windows,
        "cpu_s": used_s / num_windows,
        "wall_s": wall_s / num_windows,
        "first_s": first_s,
        "resume_s": time.perf_counter() - began_s,
        "num_sessions": statistics.mean(num_sessions),
        "num_files": num_files,
        "mib": mib,
    }


def own_processes() -> list[int]:
    """List this process and its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    return [os.getpid(), *map(int, children.split())]


def count_columns(process: int) -> int:
    """Count the columns that a process has open."""
    links = [link for link in Path(f"/proc/{process}/fd").iterdir() if link.is_symlink()]
    return sum("/train-" in str(link.readlink()) for link in links)


def memory_mib(process: int) -> float:
    """Return the peak resident memory of a process."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def cpu_s() -> float:
    """Return CPU time of this process and of its processes, running or ended."""
    ended = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    used_s = sum(usage.ru_utime + usage.ru_stime for usage in ended)
    for process in own_processes()[1:]:
        with suppress(FileNotFoundError, ProcessLookupError):  # then its parent counts it
            fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2]
            used_s += sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")
    return used_s


if __name__ == "__main__":
    main()
