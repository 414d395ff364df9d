"""Kill shard jobs at random moments, and compare the rerun with an undisturbed build.

    python tests/experiments/build_kills.py --kills 50

Each trial starts ``python -m preprocess shards`` with two local workers, from nothing or from an
older set that needs every kind of change, and kills (SIGKILL) the whole process group, the client
alone, or one Dask worker. After a killed job or client the set must be the complete old one or the
new one. A rerun must end with the bytes of the undisturbed build in every file, and leave no
temporary files and no processes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import psutil
from helpers.oracles import check_set
from helpers.processes import finish, launch
from helpers.sessions import write_lines

from preprocess.demo.world import write_demo_sessions
from shared.shardset.locks import read_manifest_locked

if TYPE_CHECKING:
    import subprocess

TARGETS = ("job", "client", "worker")

_RECIPE = """
segment: {{duration_s: 2.0}}
video: {{size: 128}}
audio: {{dmel: {{floor_db: {floor_db}}}}}
sensor: {{max_gap_s: {max_gap_s}}}
text: {{vocab_size: {vocab_size}}}
split: {{val_fraction: 0.3}}
shard: {{target_bytes: 2097152}}
"""


@dataclass(frozen=True)
class Start:
    """Input of a build: sessions, recipe, and the previous set, if any."""

    name: str
    sessions: Path
    recipe: Path
    old: Path | None


@dataclass
class Trial:
    """One kill and its result."""

    start: str
    target: str
    moment: str
    state: str = ""
    num_reads: int = 0
    problems: list[str] = field(default_factory=list)


def command(start: Start, out: Path, *more: str) -> list[str]:
    """Return the job's command line."""
    options = ["--sessions", str(start.sessions), "--out", str(out), "--recipe", str(start.recipe)]
    options += ["--task-seconds", "8"]  # divides shards, and sessions of 20 s, too
    return [sys.executable, "-m", "preprocess", "shards", *options, *(more or ("--workers", "2"))]


def workers_of(pid: int) -> list[psutil.Process]:
    """List Dask's worker processes below a process."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        return [p for p in children if "multiprocessing.spawn" in " ".join(p.cmdline())]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def all_hashes(folder: Path) -> dict[str, str]:
    """Hash every file of a folder by SHA-256, the builder's cache, too."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def prepare(root: Path) -> list[Start]:
    """Write sessions and build the previous set; return the inputs of both kinds of builds."""
    new, old = root / "new", root / "old"
    write_demo_sessions(new, num_sessions=12, duration_s=20.0, seed=3, image_size=128)
    shutil.copytree(new, old)
    shutil.rmtree(old / "session_011")  # the update has one new session,
    shutil.rmtree(new / "session_004")  # one removed,
    texts = [{"timestamp": 1.0, "stream": "external", "text": "another text"}]
    write_lines(new / "session_007" / "text.jsonl", texts)  # and one changed
    values = {"floor_db": -80, "max_gap_s": 0.1, "vocab_size": 300}
    for name, changes in (("old", {}), ("new", {"floor_db": -70, "vocab_size": 290})):
        text = _RECIPE.format(**{**values, **changes})
        (root / f"{name}.yaml").write_text(text, encoding="utf-8")
    first = Start("first", new, root / "new.yaml", None)
    finish(launch(command(Start("old", old, root / "old.yaml", None), root / "set"), scratch=root))
    return [first, Start("update", new, root / "new.yaml", root / "set")]


def undisturbed(start: Start, root: Path) -> tuple[dict[str, str], float]:
    """Build undisturbed in one process; return the set's hashes and the duration in seconds."""
    out = root / f"undisturbed-{start.name}"
    _lay_out(start, out)
    begin_s = time.monotonic()
    finish(launch(command(start, out, "--workers", "0"), scratch=root / "scratch"))
    length_s = time.monotonic() - begin_s
    check_set(out)
    return all_hashes(out), length_s


def run_trial(
    start: Start, target: str, num_files: int, moment_s: float, wanted: dict[str, str], root: Path
) -> Trial:
    """Kill one job `moment_s` after it has written `num_files`, and check what is left."""
    trial = Trial(start.name, target, f"{num_files:2} files + {moment_s:4.2f} s")
    out, scratch = root / "trial", root / "trial-scratch"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    _lay_out(start, out)
    job = launch(command(start, out), scratch=scratch)
    with _Reader(out, trial, is_on=start.old is not None and target != "worker"):
        _kill(job, target, _Moment(out, num_files, moment_s), trial)
        output, _ = job.communicate(timeout=300)
    _wait_for_end_of(out, trial)
    if trial.state == "had ended":
        return trial
    if target == "worker":
        if job.returncode != 0:
            trial.problems.append(f"exit code {job.returncode}: {output[-300:]}")
    else:
        trial.state = _state(start, out, wanted, trial)
        finish(launch(command(start, out), scratch=scratch))
    _compare(out, wanted, trial)
    leftovers = [p for p in scratch.rglob("*") if p.is_file() and "dask-scratch" not in str(p)]
    if leftovers:
        trial.problems.append(f"left in the temporary folder: {leftovers}")
    return trial


def _lay_out(start: Start, out: Path) -> None:
    if start.old is not None:
        shutil.copytree(start.old, out)


@dataclass(frozen=True)
class _Moment:
    out: Path
    num_files: int
    after_s: float

    def wait(self, job: subprocess.Popen[str], target: str) -> None:
        """Return at the moment, or when the job has ended."""
        num_old = len(list(self.out.glob("[!.]*"))) if self.out.exists() else 0
        while job.poll() is None and (
            len(list(self.out.glob("[!.]*"))) < num_old + self.num_files
            or (target == "worker" and not workers_of(job.pid))
        ):
            time.sleep(0.005)
        time.sleep(self.after_s)


def _kill(job: subprocess.Popen[str], target: str, moment: _Moment, trial: Trial) -> None:
    moment.wait(job, target)
    if job.poll() is not None:
        trial.state = "had ended"
        return
    if target == "job":
        os.killpg(job.pid, signal.SIGKILL)
    elif target == "client":
        job.kill()
    else:
        workers = workers_of(job.pid)
        trial.state = "no worker was left"
        if workers:
            workers[moment.num_files % len(workers)].kill()
            trial.state = f"1 of {len(workers)} workers killed"


def _wait_for_end_of(out: Path, trial: Trial) -> None:
    """Wait until no process of the job is left; a killed client's workers end by themselves."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        if not [p for p in psutil.process_iter(["environ"]) if _is_of(p, out)]:
            return
        time.sleep(0.05)
    trial.problems.append("workers of a killed client still run")


def _is_of(process: psutil.Process, out: Path) -> bool:
    environment = process.info["environ"] or {}
    return environment.get("TMPDIR") == str(out.with_name("trial-scratch"))


def _state(start: Start, out: Path, wanted: dict[str, str], trial: Trial) -> str:
    """Describe what readers see after a kill: nothing, the old set or the new one."""
    path = out / "manifest.json"
    num_indexes = len(list(out.glob("*.index"))) if out.exists() else 0
    if not path.exists():
        if start.old is not None:
            trial.problems.append("the old set is gone")
        return f"no set yet, {num_indexes} shards finished"
    check_set(out)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest == wanted["manifest.json"]:
        return "new set"
    if start.old is None or path.read_bytes() != (start.old / "manifest.json").read_bytes():
        trial.problems.append("the manifest is neither the old nor the new one")
    num_new = len(re.findall(r"\.g1\.index", " ".join(p.name for p in out.iterdir())))
    return f"old set, {num_new} shards finished"


def _compare(out: Path, wanted: dict[str, str], trial: Trial) -> None:
    hashes = all_hashes(out)
    different = sorted(n for n in {*hashes, *wanted} if hashes.get(n) != wanted.get(n))
    if different:
        trial.problems.append(f"not byte-equal: {different[:5]} and {len(different)} in all")


class _Reader:
    """Reads the whole set repeatedly while a job runs, each time with a reader lock."""

    def __init__(self, out: Path, trial: Trial, *, is_on: bool) -> None:
        self._out, self._trial, self._is_on = out, trial, is_on
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> None:
        if self._is_on:
            self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._is_on:
            self._thread.join()

    def _read(self) -> None:
        while not self._stop.is_set():
            try:
                _, lock = read_manifest_locked(self._out)
                check_set(self._out)
                self._trial.num_reads += 1
                if lock is not None:
                    lock.close()
            except Exception as error:  # any error of a reader is a problem
                self._trial.problems.append(f"a reader failed: {error!r}")
                return


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="killing-") as folder:
        trials = run_trials(Path(folder), args.kills, args.seed)
    bad = [t for t in trials if t.problems]
    reads = sum(t.num_reads for t in trials)
    print(
        f"{len(trials)} kills: {len(trials) - len(bad)} byte-equal with no file or process left, "
        f"{len(bad)} not; {reads} full reads of sets while jobs ran"
    )
    return 1 if bad else 0


def run_trials(root: Path, num_kills: int, seed: int) -> list[Trial]:
    """Kill `num_kills` jobs at moments drawn by a seed, and print a line for each."""
    chance = random.Random(seed)
    starts = prepare(root)
    wanted = {s.name: undisturbed(s, root) for s in starts}
    for name, (files, length_s) in wanted.items():
        print(f"undisturbed {name}: {len(files)} files in {length_s:.1f} s", flush=True)
    print("kill  from    target  moment             reads  after the kill", flush=True)
    trials = []
    for number in range(num_kills):
        start, target = starts[number % 2], TARGETS[number // 2 % 3]
        files, length_s = wanted[start.name]
        while True:
            # Half of the moments are at any time, half while files are written.
            if chance.random() < 0.5:
                num_files, moment_s = 0, chance.uniform(0, length_s)
            else:
                num_files, moment_s = chance.randint(1, 70), chance.uniform(0, 0.2)
            trial = run_trial(start, target, num_files, moment_s, files, root)
            if trial.state != "had ended" or trial.problems:
                break
        trials.append(trial)
        result = "; ".join(trial.problems) or "byte-equal, nothing left"
        print(
            f"{number + 1:4}  {start.name:6}  {target:6}  {trial.moment}  {trial.num_reads:5}  "
            f"{trial.state}: {result}",
            flush=True,
        )
    return trials


if __name__ == "__main__":
    sys.exit(main())
