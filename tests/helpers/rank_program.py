"""Train a tiny model on a tiny set, in one process or on several ranks, and record the results.

    python tests/helpers/rank_program.py RUNS.json OUT     as torchrun starts it

RUNS.json has a list of runs (keys as in :func:`train_once`); rank r writes OUT/rank_r.json, a list
with each run's keys by step and metrics by step.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from train.config import TrainConfig
from train.data.loader import Loader, open_source
from train.loop.meter import StepMeter
from train.loop.run_log import RunLog
from train.loop.trainer import Trainer
from train.machine import distributed
from train.model.multimodal import MultiModalCreature
from train.tools.selftest import free_port, rank_environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).resolve().parent


class RecordedLoader:
    """A loader that records the keys of samples with weight, batch by batch."""

    def __init__(self, loader: Loader, *, signal_at: int | None = None) -> None:
        self._loader = loader
        self._signal_at = signal_at
        self.rank, self.world_size = loader.rank, loader.world_size
        self.keys: list[list[str]] = []

    def state_at(self, next_batch: int) -> dict[str, Any]:
        return self._loader.state_at(next_batch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            if batch["index"] == self._signal_at:
                signal.raise_signal(signal.SIGTERM)
            self.keys.append([k for k, w in zip(batch["keys"], batch["weight"], strict=True) if w])
            yield batch


def tiny_config(shards: str, folder: str, **options: Any) -> TrainConfig:
    """Make a run's configuration; `options` are keys of any section, which do not collide."""
    data: dict[str, Any] = {
        "shards": shards,
        "batch_size": 4,
        "num_workers": 0,
        "shuffle_block_shards": 2,
        "window": {"duration_s": 1.0, "stride_s": 0.2},
    }
    training: dict[str, Any] = {
        "max_steps": 4,
        "seed": 7,
        "device": "cpu",
        "num_threads": 1,
        "log_interval": 1,
        "eval_interval": 1000,
        "save_interval": 1000,
        "log_dir": f"{folder}/runs",
        "checkpointing": {"save_dir": f"{folder}/checkpoints", "keep_last_n": 100},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
    }
    model = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "vision_layers": 1}
    sections = {"data": data, "training": training, "model": model}
    for key, value in options.items():
        kind = next(n for n in sections if key in TrainConfig().model_dump()[n])
        sections[kind][key] = value
    return TrainConfig.model_validate(sections)


def train_once(
    *,
    shards: str,
    folder: str,
    resume: str | None = None,
    signal_at: tuple[int, int] = (-1, -1),
    **options: Any,
) -> dict[str, Any]:
    """Train as this rank; return what it read and what all ranks measured.

    Args:
        shards: the set.
        folder: for checkpoints and logs.
        resume: a checkpoint to resume from.
        signal_at: rank and batch index at which SIGTERM is raised.
        options: configuration keys.

    Returns:
        "keys" of each batch of this rank, "metrics" and "num_samples" of each step, "val" losses
        at the end, "steps" done, and "stopped_by".
    """
    config = tiny_config(shards, folder, **options)
    rank, world_size = distributed.rank(), distributed.world_size()
    share = {"rank": rank, "world_size": world_size}
    loader = RecordedLoader(
        Loader(open_source(config, split="train"), config, **share),
        signal_at=signal_at[1] if signal_at[0] == rank else None,
    )
    held_out = open_source(config, split="val")
    val_loader = Loader(held_out, config, is_shuffled=False, num_epochs=1, **share)
    torch.manual_seed(1)
    model = MultiModalCreature(config, val_loader.shapes)
    trainer = Trainer(
        model,
        config,
        loader,
        val_loader=val_loader,
        console=Console(file=io.StringIO()),
        run_name="tiny",
    )
    if resume is not None:
        trainer.load_checkpoint(resume)
    with recorded(StepMeter, "add") as steps, recorded(RunLog, "write_metrics") as logs:
        summary = trainer.train()
    return {
        "keys": loader.keys,
        "metrics": [metrics for _, (_, metrics), _ in logs],
        "num_samples": [float(values["num_samples"]) for _, _, values in steps],
        "val": trainer.evaluate(),
        "steps": summary.steps,
        "stopped_by": summary.stopped_by,
    }


@contextlib.contextmanager
def recorded(kind: type, name: str) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Record the calls of a method: object, arguments, keyword arguments."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    method = getattr(kind, name)

    def call(self: Any, *values: Any, **named: Any) -> Any:
        calls.append((self, values, named))
        return method(self, *values, **named)

    setattr(kind, name, call)
    try:
        yield calls
    finally:
        setattr(kind, name, method)


def start_ranks(command: Sequence[str], world_size: int) -> list[subprocess.Popen[str]]:
    """Start a program as each of `world_size` ranks, without torchrun."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **rank_environment(rank, world_size, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]


def train_among_ranks(
    world_size: int, runs: list[dict[str, Any]], folder: Path
) -> list[list[dict[str, Any]]]:
    """Train several runs in turn on ranks; return results by run, then by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    program = ["-W", "error", str(HERE / "rank_program.py"), str(folder / "runs.json"), str(folder)]
    processes = start_ranks(program, world_size)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * world_size, "\n".join(outputs)
    ranks = [json.loads((folder / f"rank_{r}.json").read_text()) for r in range(world_size)]
    return [list(shares) for shares in zip(*ranks, strict=True)]


def main() -> None:
    """Run one rank of :func:`train_among_ranks`."""
    torch.set_num_threads(1)
    runs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with distributed.process_group(torch.device("cpu")):
        results = [train_once(**run) for run in runs]
        (out / f"rank_{distributed.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
