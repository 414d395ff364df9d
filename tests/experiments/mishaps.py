"""Inflict the mishaps of long trainings on short ones, and print the results.

    python tests/experiments/mishaps.py

Signals, a full disk and damaged checkpoints happen to ``python -m train run --resume auto`` with a
loader process. The resumed run must end with the weights, moments, random states and position of
the undisturbed one, bit for bit. The disk is a small tmpfs, which only root can mount; otherwise
those lines say so. Broken batches are given to a trainer in this process. ``training_kills.py``
tests kills at random moments.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import torch
import yaml
from helpers.processes import finish
from helpers.training import (
    BrokenLoader,
    EndlessLoader,
    cut_in_half,
    flip_a_bit,
    largest_difference,
    make_config,
    make_empty,
    make_trainer,
    with_nan,
    with_spike,
)

from experiments.training_kills import STEPS, differences, final_state, prepare, start
from shared.errors import CheckpointError, DivergedError
from train.checkpoints import FINAL_NAME, check_checkpoint, list_checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class NoSmallDiskError(Exception):
    """This process may not mount a small disk."""


@dataclass(frozen=True)
class Outcome:
    """A description of what happened, and whether it is correct."""

    description: str
    is_good: bool


@dataclass(frozen=True)
class Run:
    """A run that a mishap can happen to."""

    config: Path
    folder: Path
    wanted: dict[str, Any]
    """Final state of the undisturbed run."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def resume(self) -> tuple[str, bool]:
        """Resume to the end; return a description, and whether it ends like the undisturbed run."""
        output = finish(start(self.config, self.folder))
        resumed = [line.strip() for line in output.splitlines() if "resuming at step" in line]
        is_equal = not differences(final_state(self.folder), self.wanted)
        origin = resumed[0].split(" from ")[0] if resumed else "started over"
        return f"{origin}: {'equal to the bit' if is_equal else 'NOT EQUAL'}", is_equal


def press(run: Run, number: signal.Signals) -> Outcome:
    """Send a signal to the whole process group while it trains."""
    job = start(run.config, run.folder)
    wait_for(job, run.checkpoints / "model_step_10.pt")
    os.killpg(job.pid, number)
    output, _ = job.communicate(timeout=60)
    (step,) = [torch.load(p)["step"] for p in newest_first(run.checkpoints)[:1]]
    is_reported = f"stopped at step {step}" in output and "Traceback" not in output
    after, is_equal = run.resume()
    is_good = job.returncode == 128 + number and is_reported and is_equal
    return Outcome(f"exit code {job.returncode}, saved step {step}; {after}", is_good)


def damage(run: Run, spoil: Callable[[Path], object]) -> Outcome:
    """Damage the newest checkpoint of a killed run."""
    job = start(run.config, run.folder)
    wait_for(job, run.checkpoints / "model_step_10.pt")
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    newest, older = newest_first(run.checkpoints)[:2]
    spoil(newest)
    before = torch.load(older)["step"]
    after, is_equal = run.resume()
    return Outcome(after, is_equal and f"resuming at step {before}:" in after)


def leave_partial(run: Run) -> Outcome:
    """Leave the partial checkpoint of a killed run in the folder."""
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / ".model_step_38.pt.partial").write_bytes(b"half of a checkpoint")
    after, is_equal = run.resume()
    return Outcome(after, is_equal and after.startswith("started over"))


def fill_disk(run: Run, *, keep_last_n: int, is_freed: bool) -> Outcome:
    """Fill the disk by another program from step 10, until a save fails or to the end."""
    with small_disk(run.checkpoints):
        job = start(with_key(run, "keep_last_n", keep_last_n), run.folder)
        wait_for(job, run.checkpoints / "model_step_10.pt")
        filler = run.checkpoints / "filler"
        with filling(filler, is_greedy=keep_last_n == 1):
            output = read_until(job, "could not be written" if is_freed else None)
        if is_freed:
            filler.unlink()
        output += job.communicate()[0]
        num_failed = output.count("could not be written")
        num_left = [is_intact(path) for path in list_checkpoints(run.checkpoints)]
        num_intact = sum(num_left)
        description = (
            f"failed saves: {num_failed}, exit code {job.returncode}, intact: {num_intact}"
        )
        is_good = all(num_left) and len(num_left) > 0 and "Traceback" not in output
        if job.returncode == 0:
            is_equal = not differences(final_state(run.folder), run.wanted)
            description += f"; {'equal to the bit' if is_equal else 'NOT EQUAL'}"
            return Outcome(
                description, is_good and is_equal and (num_failed > 0) == (keep_last_n == 1)
            )
        filler.unlink(missing_ok=True)
        after, is_equal = run.resume()
        return Outcome(
            f"{description}; with free space {after}",
            is_good and is_equal and "NOT saved" in output,
        )


def break_batches(run: Run, how: Callable[[Any], Any]) -> Outcome:
    """Break one batch after 80 good ones, and in another run all batches after these."""
    config = make_config(run.folder, max_steps=80, save_interval=80, log_interval=1)
    before = make_trainer(config, EndlessLoader())
    before.train()
    saved = run.checkpoints / "model_step_80.pt"

    def resume(broken: range, max_steps: int) -> Any:
        config["training"]["max_steps"] = max_steps
        trainer = make_trainer(config, BrokenLoader(broken, how))
        trainer.load_checkpoint(saved)
        return trainer

    one = resume(range(80, 81), 81)
    summary = one.train()
    apart = largest_difference(one, before)
    description = f"{summary.skipped_steps} step skipped, weights differ by {apart:g}"
    many = resume(range(80, 1000), 1000)
    try:
        many.train()
    except DivergedError as error:
        advice = str(error).partition("in a row. ")[2]
        is_good = summary.skipped_steps == 1 and apart == 0 and many.step == 90
        is_good &= largest_difference(many, before) == 0 and "Reduce LR" in advice
        return Outcome(
            f"{description}; all: stopped at step {many.step}: {advice[:48]}...", is_good
        )
    return Outcome(f"{description}; all: NOT STOPPED", is_good=False)


def keep_some(run: Run) -> Outcome:
    """Every other step is saved, and two are kept."""
    finish(start(with_key(run, "keep_last_n", 2), run.folder))
    names = sorted(path.name for path in run.checkpoints.iterdir())
    expected = [FINAL_NAME, f"model_step_{STEPS - 2}.pt", f"model_step_{STEPS}.pt"]
    return Outcome(", ".join(names), names == expected)


MISHAPS: dict[str, Callable[[Run], Outcome]] = {
    "SIGTERM": partial(press, number=signal.SIGTERM),
    "SIGHUP": partial(press, number=signal.SIGHUP),
    "Ctrl-C": partial(press, number=signal.SIGINT),
    "newest checkpoint cut in half": partial(damage, spoil=cut_in_half),
    "newest checkpoint, a bit flipped": partial(damage, spoil=flip_a_bit),
    "newest checkpoint empty": partial(damage, spoil=make_empty),
    "a checkpoint half written": leave_partial,
    "disk full, older ones make room": partial(fill_disk, keep_last_n=3, is_freed=False),
    "disk full for a while": partial(fill_disk, keep_last_n=1, is_freed=True),
    "disk full to the end": partial(fill_disk, keep_last_n=1, is_freed=False),
    "a loss that is NaN": partial(break_batches, how=with_nan),
    "a spike": partial(break_batches, how=with_spike),
    "keep_last_n: 2": keep_some,
}


def wait_for(job: subprocess.Popen[str], path: Path) -> None:
    """Wait until a file exists."""
    while not path.exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.001)


def read_until(job: subprocess.Popen[str], words: str | None) -> str:
    """Read lines of a job up to the one with the words, or all."""
    assert job.stdout is not None
    lines = []
    for line in job.stdout:
        lines.append(line)
        if words is not None and words in line:
            break
    return "".join(lines)


def with_key(run: Run, key: str, value: int) -> Path:
    """Write a configuration with another value of a checkpointing key."""
    values = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    values["training"]["checkpointing"][key] = value
    path = run.folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of 4 MiB at a folder.

    Raises:
        NoSmallDiskError: this process may not mount one.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise NoSmallDiskError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def filling(path: Path, *, is_greedy: bool) -> Iterator[None]:
    """Fill a disk by a file; if greedy, take space that becomes free, too."""
    is_over = threading.Event()

    def fill() -> None:
        with path.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    if not is_greedy or is_over.wait(0.001):
                        return

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def newest_first(folder: Path) -> list[Path]:
    """List step checkpoints, newest first."""
    steps = [path for path in list_checkpoints(folder) if path.name != FINAL_NAME]
    return sorted(steps, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def is_intact(path: Path) -> bool:
    """Return whether a checkpoint is undamaged."""
    try:
        check_checkpoint(path)
    except CheckpointError:
        return False
    return True


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", choices=MISHAPS, action="append", help="only this one; can be repeated"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_bad = 0
    with tempfile.TemporaryDirectory(prefix="mishaps-") as folder:
        root = Path(folder)
        config = prepare(root)
        finish(start(config, root / "undisturbed"))
        wanted = final_state(root / "undisturbed")
        print(f"runs of {STEPS} steps, saved at every other one")
        for name in args.only or MISHAPS:
            run = Run(config, root / str(len(list(root.iterdir()))), wanted)
            try:
                outcome = MISHAPS[name](run)
            except NoSmallDiskError as error:
                print(f"{name:33} skipped: {error}")
                continue
            num_bad += not outcome.is_good
            print(
                f"{name:33} {'' if outcome.is_good else 'BAD: '}{outcome.description}", flush=True
            )
    print(f"{num_bad} did not end correctly" if num_bad else "all ended correctly")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
