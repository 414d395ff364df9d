"""Measure what the trainer's loop adds to the work of a step.

    python tests/benchmarks/bench_loop.py [--rounds 12]

A Trainer and a bare loop train equal models on the same batches in memory. A step of both is:
normalize pixels, forward, losses, backward, clip, fused AdamW step, set gradients to None. The bare
loop does nothing else. It releases outputs and losses before it clips, as the trainer does when it
leaves the functions that made them. The trainer also counts valid targets, weighs micro-batches and
ranks, judges spikes, sets the learning rate, adds up metrics and checks for signals.

They alternate in one process: when the trainer requests the first batch of a round, the bare loop
runs its round first, and that time is subtracted from the trainer's. A trainer's round lasts from
receiving its first batch to requesting the next round's, with logs and TensorBoard in between. The
start, the first round, evaluation and checkpoints are excluded. The result is the median of the
rounds' ratios; the goal is at most 1.03. The ratio of the processor time of all threads is less
disturbed by other programs.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
from helpers.models import make_stream, targets_of

from shared.recipe import Recipe
from train import MultiModalCreature, Trainer
from train.config import TrainConfig
from train.data.pixels import to_model_inputs
from train.loop.optim import make_optimizer
from train.model.losses import compute_losses
from train.shapes import WindowShapes

SHAPES = WindowShapes.from_recipe(Recipe.model_validate({"video": {"size": 64}}), TrainConfig())
GOAL = 1.03


Times = tuple[float, float]
"""Seconds by the clock and of the processor."""


def now() -> Times:
    return time.perf_counter(), time.process_time()


def since(began: Times) -> Times:
    wall_s, cpu_s = now()
    return wall_s - began[0], cpu_s - began[1]


class AlternatingLoader:
    """An endless loader of batches in memory, which runs the bare loop between rounds."""

    def __init__(self, batches: list[dict], bare_round, *, steps: int) -> None:
        self.pairs: list[tuple[Times, Times]] = []
        self._batches, self._bare_round, self._steps = batches, bare_round, steps
        self._start = 0

    def state_at(self, next_batch: int) -> dict:
        return {"next_batch": next_batch}

    def load_state_dict(self, state: dict) -> None:
        self._start = state["next_batch"]

    def __iter__(self):
        index, began, bare = self._start, now(), (0.0, 0.0)
        while True:
            if index % self._steps == 0:
                if index > self._start:
                    self.pairs.append((since(began), bare))
                bare = self._bare_round()
                began = now()
            yield {**self._batches[index % len(self._batches)], "index": index, "epoch": 0}
            index += 1


def make_batch(seed: int, *, size: int) -> dict:
    """Make a batch of random numbers, all valid."""
    rng, inputs = np.random.default_rng(seed), {}
    for name, shape in SHAPES.streams.items():
        inputs[name] = torch.from_numpy(make_stream(rng, shape, size))
        inputs[f"{name}_valid"] = torch.ones(inputs[name].shape[:2], dtype=torch.bool)
    keys = [f"s@{i}" for i in range(size)]
    targets, weight = targets_of(inputs, SHAPES), torch.ones(size)
    return {"inputs": inputs, "targets": targets, "weight": weight, "keys": keys}


def make_bare_round(config: TrainConfig, batches: list[dict], *, steps: int):
    """Return a function that does `steps` plain steps and returns their duration."""
    torch.manual_seed(0)
    model = MultiModalCreature(config, SHAPES)
    parameters = list(model.parameters())
    optimizer = make_optimizer(model, config.training.optimizer)

    def bare_round() -> Times:
        began = now()
        for step in range(steps):
            batch = batches[step % len(batches)]
            outputs = model(to_model_inputs(batch["inputs"]))
            losses = compute_losses(
                outputs, batch["targets"], batch["weight"], objective=model.objective
            )
            losses["loss_total"].backward()
            del outputs, losses  # or the next forward pass finds their memory taken
            torch.nn.utils.clip_grad_norm_(parameters, config.training.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return since(began)

    return bare_round


def measure(args: argparse.Namespace, folder: Path) -> list[tuple[Times, Times]]:
    """Return seconds of the trainer and of the bare loop, for each round but the first."""
    config = TrainConfig.model_validate(
        {
            "training": {
                "max_steps": args.steps * (args.rounds + 1) + 1,
                "log_interval": args.steps,
                "save_interval": 10**9,
                "num_threads": args.threads,
                "log_dir": folder / "runs",
                "checkpointing": {"save_dir": folder / "checkpoints"},
            },
            "model": {"hidden_dim": args.hidden, "num_layers": args.layers},
        }
    )
    torch.set_num_threads(args.threads)
    batches = [make_batch(seed, size=args.batch) for seed in range(4)]
    turns = AlternatingLoader(
        batches, make_bare_round(config, batches, steps=args.steps), steps=args.steps
    )
    torch.manual_seed(0)
    model = MultiModalCreature(config, SHAPES)
    Trainer(model, config, turns, device="cpu", console=Console(file=io.StringIO())).train()
    return turns.pairs[1:]


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="of a round; a log line ends each")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loop-") as folder:
        pairs = measure(args, Path(folder))
    print(
        f"hidden {args.hidden}, {args.layers} layers, batch {args.batch}, {args.threads} "
        f"threads; {len(pairs)} rounds of {args.steps} steps, a log line each"
    )
    for kind, name in enumerate(("clock", "processor")):
        ratios = sorted(trainer[kind] / bare[kind] for trainer, bare in pairs)
        steps_ms = [
            statistics.median(each[kind] for each in loop) / args.steps * 1e3
            for loop in zip(*pairs, strict=True)
        ]
        print(
            f"{name:9}  trainer {steps_ms[0]:.1f} ms per step, bare {steps_ms[1]:.1f} ms; "
            f"trainer / bare: median {statistics.median(ratios):.4f} "
            f"({ratios[0]:.4f} to {ratios[-1]:.4f}), goal {GOAL}"
        )


if __name__ == "__main__":
    main()
