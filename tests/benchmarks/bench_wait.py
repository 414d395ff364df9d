"""How much of a step the device waits for data, where the step's time on the device is given.

    python tests/benchmarks/bench_wait.py --shards shards/demo
    python tests/benchmarks/bench_wait.py --shards data/bench/peers/ours --workers 1 2

A whole run of the Trainer, with its own metrics, on a model that computes nothing and sleeps: so
the cores are the loader's, as they are where a GPU computes. Then the smallest step time that keeps
`data_wait_fraction` under 1 %, by bisection.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from train import Trainer
from train.config import TrainConfig
from train.data.loader import Loader, open_source

GOAL = 0.01
SMALLEST_STEP_S = 0.0005


class Sleeper(nn.Module):
    """Predicts that the pose stays, after as long as a device would take."""

    def __init__(self, step_s: float, num_ticks: int) -> None:
        super().__init__()
        self.step_s = step_s
        self.num_ticks = num_ticks
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        time.sleep(self.step_s)
        proprio = inputs["proprio"]
        batch, samples, size = proprio.shape
        held = proprio.view(batch, self.num_ticks, samples // self.num_ticks, size)
        return {"animation": held + self.zero}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pixels")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--step-ms", nargs="+", type=float, default=[20, 50, 100])
    given = parser.parse_args()
    print(f"{given.shards}, batches of {given.batch_size}, {given.steps} steps")
    print("workers  step ms  data_wait_fraction  wait p50 ms   p95    p99   first batch s")
    for workers in given.workers:
        for step_ms in given.step_ms:
            print(row(workers, step_ms / 1e3, run(given, workers, step_ms / 1e3)))
        shortest_s = smallest_step_s(given, workers)
        print(row(workers, shortest_s, run(given, workers, shortest_s)), f"  smallest < {GOAL:.0%}")


def row(workers: int, step_s: float, metrics: dict[str, float]) -> str:
    waits = [metrics[f"data_wait_ms_p{q}"] for q in (50, 95, 99)]
    return (
        f"{workers:7} {step_s * 1e3:8.1f} {metrics['data_wait_fraction']:19.4f}"
        f" {waits[0]:12.2f} {waits[1]:5.2f}  {waits[2]:5.2f}"
        f"   {metrics['time_to_first_batch_s']:13.2f}"
    )


def smallest_step_s(given: argparse.Namespace, workers: int) -> float:
    """To about 5 %: the shortest step with data_wait_fraction below the goal."""
    low, high = SMALLEST_STEP_S, 0.02
    while run(given, workers, high)["data_wait_fraction"] > GOAL:
        low, high = high, 2 * high
    while high / low > 1.05:
        middle = (low * high) ** 0.5
        is_good = run(given, workers, middle)["data_wait_fraction"] <= GOAL
        low, high = (low, middle) if is_good else (middle, high)
    return high


def run(given: argparse.Namespace, workers: int, step_s: float) -> dict[str, float]:
    """The last metrics of a short run, and the first batch's time."""
    from train.loop.metrics import RunLog

    seen: dict[str, float] = {}
    original = RunLog.write_metrics

    def note(self: RunLog, step: int, metrics: dict[str, float]) -> Any:
        seen.update(metrics)
        return original(self, step, metrics)

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.model_validate(
            {
                "data": {
                    "shards": given.shards,
                    "batch_size": given.batch_size,
                    "num_workers": workers,
                    **({"pixels": given.pixels} if given.pixels else {}),
                },
                "training": {
                    "max_steps": 2 * given.steps,
                    "log_interval": given.steps,
                    "save_interval": 10**9,
                    "eval_interval": 10**9,
                    "log_dir": f"{folder}/runs",
                    "num_threads": 1,
                    "checkpointing": {"save_dir": f"{folder}/checkpoints"},
                    "loss_weights": {
                        "internal_text": 0,
                        "external_text": 0,
                        "audio": 0,
                        "animation": 1,
                    },
                },
            }
        )
        loader = Loader(open_source(config, split="train"), config)
        RunLog.write_metrics = note  # type: ignore[method-assign]
        try:
            console = Console(file=io.StringIO())
            model = Sleeper(step_s, loader.shapes.num_ticks)
            Trainer(model, config, loader, "cpu", console=console).train()
        finally:
            RunLog.write_metrics = original  # type: ignore[method-assign]
    return seen


if __name__ == "__main__":
    main()
