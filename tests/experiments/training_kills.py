"""Kill trainings at random moments, and compare `--resume auto` with an undisturbed run.

    python tests/experiments/training_kills.py --kills 30

Each trial starts ``python -m train run --resume auto`` with a loader process and kills (SIGKILL)
the whole process group, or the trainer alone: half of the times anywhere in the training, half
while a checkpoint is being written. All checkpoints that are left must be intact. The same command
must end with the weights, moments, random states and stream position of the undisturbed run, bit
for bit, and no process may be left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import numpy as np
import psutil
import torch
import yaml
from helpers.processes import finish, launch
from helpers.sets import make_config, make_set

from train.checkpoints import FINAL_NAME, check_checkpoint

if TYPE_CHECKING:
    import subprocess

STEPS, SAVE_INTERVAL = 40, 2
TARGETS = ("group", "trainer")
OWN_TO_A_RUN = ("saved_at", "run_name", "config")
"""Keys of a checkpoint that differ between two runs: the time, and names of folders."""


@dataclass
class Trial:
    """One kill and its result."""

    target: str
    moment: str
    resumed_from: str = ""
    problems: list[str] = field(default_factory=list)


def prepare(root: Path) -> Path:
    """Build a tiny set; write a configuration that uses every source of random numbers."""
    config = make_config(make_set(root), num_workers=1)
    values = config.model_dump(mode="json")
    values["model"] |= {"dropout": 0.1, "modality_dropout": 0.2}
    values["training"] |= {
        "max_steps": STEPS,
        "save_interval": SAVE_INTERVAL,
        "log_interval": 5,
        "eval_interval": 20,
        "device": "cpu",
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(config: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a training that resumes if it can; its temporary files are in `folder`/tmp."""
    overrides = [
        f"training.checkpointing.save_dir={folder / 'checkpoints'}",
        f"training.log_dir={folder / 'runs'}",
    ]
    command = [sys.executable, "-m", "train", "run", "--config", config, "--resume", "auto"]
    return launch([*command, *overrides], scratch=folder / "tmp")


def final_state(folder: Path) -> dict[str, Any]:
    """Read the final state of a run, without what is its own."""
    state = torch.load(folder / "checkpoints" / FINAL_NAME)
    return {key: value for key, value in state.items() if key not in OWN_TO_A_RUN}


def differences(state: Any, other: Any, path: str = "") -> list[str]:
    """List the paths at which two nested states are not equal bit for bit."""
    if isinstance(state, dict) and isinstance(other, dict) and state.keys() == other.keys():
        pairs = [(f"{path}/{key}", state[key], other[key]) for key in state]
    elif isinstance(state, list | tuple) and isinstance(other, list | tuple):
        if len(state) != len(other):
            return [path]
        pairs = [(f"{path}/{i}", *pair) for i, pair in enumerate(zip(state, other, strict=True))]
    elif isinstance(state, torch.Tensor) and isinstance(other, torch.Tensor):
        bits = [
            t.contiguous().view(torch.uint8).numpy() if t.dim() else t.numpy().tobytes()
            for t in (state, other)
        ]
        is_equal = state.dtype == other.dtype and np.array_equal(*bits)
        return [] if is_equal else [path]
    else:
        return [] if state == other else [path]
    return [each for name, a, b in pairs for each in differences(a, b, name)]


def run_trial(
    config: Path, target: str, folder: Path, wanted: dict[str, Any], chance: random.Random
) -> Trial:
    """Kill one training at a random moment, resume it, and compare."""
    num_saved = chance.randrange(0, STEPS // SAVE_INTERVAL)
    is_saving = chance.random() < 0.5
    after_s = chance.uniform(0, 0.02 if is_saving else 0.3)
    kind = "while saving" if is_saving else "anywhere"
    trial = Trial(target, f"{num_saved * SAVE_INTERVAL:2} steps + {after_s:.3f} s {kind}")
    job = start(config, folder)
    _wait_for(job, folder / "checkpoints", num_saved, is_saving=is_saving)
    time.sleep(after_s)
    if job.poll() is not None:
        trial.problems.append(f"had ended by itself: {job.communicate()[0][-300:]}")
        return trial
    if target == "group":
        os.killpg(job.pid, signal.SIGKILL)
    else:
        job.kill()
    job.communicate(timeout=60)
    _check_left(folder, trial)
    output = finish(start(config, folder))
    resumed = [line for line in output.splitlines() if "resuming at step" in line]
    trial.resumed_from = resumed[0].split(" from ")[0] if resumed else "started over"
    different = differences(final_state(folder), wanted)
    if different:
        trial.problems.append(f"not equal: {different[:4]} and {len(different)} in all")
    return trial


def _wait_for(
    job: subprocess.Popen[str], checkpoints: Path, num_saved: int, *, is_saving: bool
) -> None:
    """Wait for `num_saved` checkpoints and, if `is_saving`, for the start of the next one."""
    while job.poll() is None:
        steps = [int(p.stem.rpartition("_")[2]) for p in checkpoints.glob("model_step_*.pt")]
        is_saved = max(steps, default=0) >= num_saved * SAVE_INTERVAL and checkpoints.is_dir()
        if is_saved and (not is_saving or any(checkpoints.glob(".*.partial"))):
            return
        time.sleep(0.0005)


def _check_left(folder: Path, trial: Trial) -> None:
    """Check that complete checkpoints are intact, and that no process is left."""
    for path in (folder / "checkpoints").glob("model_*.pt"):
        try:
            check_checkpoint(path)
        except ValueError as error:
            trial.problems.append(str(error))
    deadline_s = time.monotonic() + 20
    while any(_is_of(process, folder) for process in psutil.process_iter(["environ"])):
        if time.monotonic() > deadline_s:
            trial.problems.append("a loader process still runs")
            return
        time.sleep(0.05)


def _is_of(process: psutil.Process, folder: Path) -> bool:
    return (process.info["environ"] or {}).get("TMPDIR") == str(folder / "tmp")


def run_trials(root: Path, num_kills: int, seed: int) -> list[Trial]:
    """Kill `num_kills` trainings at moments drawn by a seed, and print a line for each."""
    chance = random.Random(seed)
    config = prepare(root)
    began_s = time.monotonic()
    finish(start(config, root / "undisturbed"))
    wanted = final_state(root / "undisturbed")
    print(f"undisturbed: {STEPS} steps, {time.monotonic() - began_s:.1f} s", flush=True)
    print("kill  target   moment                            after the kill", flush=True)
    trials = []
    for number in range(num_kills):
        folder = root / f"trial_{number}"
        trials.append(run_trial(config, TARGETS[number % 2], folder, wanted, chance))
        trial = trials[-1]
        result = "; ".join(trial.problems) or "equal to the bit"
        print(
            f"{number + 1:4}  {trial.target:7}  {trial.moment:32}  {trial.resumed_from}: {result}",
            flush=True,
        )
        shutil.rmtree(folder)
    return trials


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="training-kills-") as folder:
        trials = run_trials(Path(folder), args.kills, args.seed)
    bad = [trial for trial in trials if trial.problems]
    print(f"{len(trials)} kills: {len(trials) - len(bad)} resumes equal to the bit, {len(bad)} not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
