"""Train the same 20 steps in several ways, and print how much their losses differ.

    python tests/experiments/numerics.py

Each way differs from plain float32 steps on batches of 8 in one key of the configuration, or in two
micro-batches of 4. The model is small and has no dropout. The logged total loss of each step is
compared, so a difference in forward, backward or optimizer shows in the steps after it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import numpy as np
import torch
from helpers.training import join, make_batch, make_config, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = 20
FAST = {"lr": 1e-2}


@dataclass(frozen=True)
class Way:
    """One way to train, and the largest relative difference of its losses from float32's."""

    tolerance: float
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


WAYS = {
    "bf16": Way(2e-3, {"precision": "bf16"}),
    "fp16": Way(1e-3, {"precision": "fp16"}),
    "2 x 4": Way(1e-5, {"accumulation_steps": 2}),
    "checkpointing": Way(0.0, {}, {"gradient_checkpointing": True}),
    "compile": Way(1e-5, {"compile": True}),
}
"""Weights, sums and losses stay float32; products are rounded to 2^-9 in bf16 and 2^-12 in fp16,
and the order of a sum changes the 24th bit. These differences grow over 20 steps."""

PLAIN = Way(0.0)


def find_compiler() -> str | None:
    """Find the C++ compiler that torch.compile needs on a CPU."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)


def train(way: Way, folder: Path) -> np.ndarray:
    """Train, and return the total loss of each step."""
    config = make_config(folder, max_steps=STEPS, log_interval=1, optimizer=FAST, **way.training)
    config["model"] |= {"hidden_dim": 32, "num_layers": 3, "dropout": 0.0, **way.model}
    halves = [make_batch(seed, size=4) for seed in range(10)]
    whole = [join(halves[i : i + 2]) for i in range(0, len(halves), 2)]
    is_split = way.training.get("accumulation_steps") == 2
    make_trainer(config, halves if is_split else whole).train()
    events = EventAccumulator(str(folder / "runs" / "tiny"))
    events.Reload()
    losses = [point.value for point in events.Scalars("loss_total")]
    assert len(losses) == STEPS
    return np.array(losses)


def deviation(curve: np.ndarray, plain: np.ndarray) -> float:
    """Return the largest relative difference of a curve from the plain one."""
    return float(np.max(np.abs(curve - plain) / plain))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--way", choices=WAYS, action="append", help="only this way; can be repeated"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="curves-") as folder:
        plain = train(PLAIN, Path(folder) / "plain")
        print(f"float32, batches of 8: loss {plain[0]:.4f} at step 1, {plain[-1]:.4f} at {STEPS}")
        print("way            last loss  largest deviation  tolerance")
        is_good = True
        for name in args.way or WAYS:
            if name == "compile" and find_compiler() is None:
                print(f"{name:13}  skipped: no C++ compiler on this machine")
                continue
            curve = train(WAYS[name], Path(folder) / name.replace(" ", ""))
            difference, tolerance = deviation(curve, plain), WAYS[name].tolerance
            is_good &= difference <= tolerance
            print(f"{name:13}  {curve[-1]:9.4f}  {difference:17.2e}  {tolerance:9.0e}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
