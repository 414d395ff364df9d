"""Measure how long a device waits for data, for given durations of a step on it.

    python tests/benchmarks/bench_wait.py --shards shards/demo
    python tests/benchmarks/bench_wait.py --shards data/bench/peers/ours --workers 1 2

Each row is a complete run of the Trainer, with its own metrics, on a model that computes nothing.
So the loader has all cores, as it has when a GPU computes. On the "host", the step sleeps, and its
batches are fetched after it, as when a CPU trains. The "device" is emulated
(tests/helpers/fakes.py): it computes in parallel with the host, which meanwhile fetches the next
step's batches by the code for GPUs and can be one step ahead. As on a GPU, only time in which the
device is idle for data counts as waiting. The last rows are the smallest step times that keep
`data_wait_fraction` under 1 %, by bisection up to 1 s. Copies to the device take no time here.
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
from helpers.fakes import EmulatedDevice

from train import Trainer
from train.config import TrainConfig
from train.data.loader import Loader, open_source
from train.loop.prefetch import BatchFeed
from train.loop.run_log import RunLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from train.shapes import WindowShapes

GOAL = 0.01
SMALLEST_STEP_S = 0.0005
LARGEST_STEP_S = 1.0
WHERE = ("host", "device")


class Sleeper(nn.Module):
    """A model that predicts the last pose; a step takes a fixed time on the host or the device."""

    def __init__(self, step_s: float, shapes: WindowShapes, device: EmulatedDevice | None) -> None:
        super().__init__()
        self.step_s = step_s
        self.device = device
        self.shapes = shapes
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device is None:
            time.sleep(self.step_s)
        else:
            self.device.mark().synchronize()
            self.device.launch(self.step_s)
        pose, ticks = inputs["proprio"], self.shapes.num_ticks
        return {"animation": pose.unflatten(1, (ticks, -1)) + self.zero}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pixels")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--step-ms", nargs="+", type=float, default=[20, 50, 100])
    args = parser.parse_args()
    print(f"{args.shards}, batches of {args.batch_size}, {args.steps} steps")
    print("workers  where   step ms  data_wait_fraction  wait p50 ms   p95    p99   first batch s")
    for workers in args.workers:
        for where in WHERE:
            measure = functools.partial(run, args, workers=workers, where=where)
            for step_ms in args.step_ms:
                print(row(workers, where, step_ms / 1e3, measure(step_ms / 1e3)), flush=True)
            shortest_s = smallest_step_s(measure)
            if shortest_s is None:
                print(f"{workers:7}  {where:6}  none up to {LARGEST_STEP_S} s waits < {GOAL:.0%}")
            else:
                line = row(workers, where, shortest_s, measure(shortest_s))
                print(f"{line}  smallest < {GOAL:.0%}", flush=True)


def row(workers: int, where: str, step_s: float, metrics: dict[str, float]) -> str:
    waits = [metrics[f"data_wait_ms_p{q}"] for q in (50, 95, 99)]
    return (
        f"{workers:7}  {where:6} {step_s * 1e3:8.1f} {metrics['data_wait_fraction']:19.4f}"
        f" {waits[0]:12.2f} {waits[1]:5.2f}  {waits[2]:5.2f}"
        f"   {metrics['time_to_first_batch_s']:13.2f}"
    )


def smallest_step_s(measure: Callable[[float], dict[str, float]]) -> float | None:
    """Find the shortest step with data_wait_fraction below the goal, to 5 %; None if above 1 s."""
    low, high = SMALLEST_STEP_S, 0.02
    while measure(high)["data_wait_fraction"] > GOAL:
        if high == LARGEST_STEP_S:
            return None
        low, high = high, min(2 * high, LARGEST_STEP_S)
    while high / low > 1.05:
        middle = (low * high) ** 0.5
        is_good = measure(middle)["data_wait_fraction"] <= GOAL
        low, high = (low, middle) if is_good else (middle, high)
    return high


def run(args: argparse.Namespace, step_s: float, *, workers: int, where: str) -> dict[str, float]:
    """Return the last metrics of a short run, and the time of the first batch.

    Raises:
        SystemExit: a signal stopped it.
    """
    device = EmulatedDevice() if where == "device" else None
    seen: dict[str, float] = {}
    original = RunLog.write_metrics

    def note(self: RunLog, step: int, metrics: dict[str, float]) -> Any:
        seen.update(metrics)
        return original(self, step, metrics)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(RunLog, "write_metrics", note),
        mock.patch("train.loop.trainer.BatchFeed", functools.partial(BatchFeed, queue=device)),
    ):
        config = TrainConfig.model_validate(
            {
                "data": {
                    "shards": args.shards,
                    "batch_size": args.batch_size,
                    "num_workers": workers,
                    **({"pixels": args.pixels} if args.pixels else {}),
                },
                "training": {
                    "max_steps": 2 * args.steps,
                    "log_interval": args.steps,
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
        model = Sleeper(step_s, loader.shapes, device)
        console = Console(file=io.StringIO())
        summary = Trainer(model, config, loader, "cpu", console=console).train()
    if summary.stopped_by != "max_steps":
        raise SystemExit(f"stopped by a {summary.stopped_by}; what is above is whole")
    return seen


if __name__ == "__main__":
    main()
