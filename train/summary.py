"""Text around training: warnings before the first step, a summary after the last one."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.table import Table

from shared.clock import EPSILON_S
from shared.session.folder import is_session
from shared.session.names import session_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console

    from shared.recipe import Recipe
    from train.config import TrainConfig
    from train.loop.meter import TrainSummary
    from train.model.baselines import Comparison
    from train.shapes import WindowShapes


_SESSION_ROOTS: Final = ("data/sessions", "data/demo")
"""Folders of sessions in the README."""


def describe_streams(shapes: WindowShapes) -> str:
    """Return which streams are inputs and which heads are trained."""
    return f"inputs: {', '.join(shapes.inputs)}; heads: {', '.join(shapes.heads)}"


def startup_warnings(
    config: TrainConfig,
    *,
    num_samples: int,
    runs_s: Sequence[float] = (),
    no_val_reason: str | None = None,
    num_ranks: int = 1,
) -> Iterator[str]:
    """Yield warnings about settings that are probably mistakes, or slow to start.

    `runs_s`: lengths of the train data's uninterrupted runs of segments.
    """
    data, training = config.data, config.training
    if no_val_reason is not None:
        yield (
            f"nothing is held out: {no_val_reason}; losses are of training samples only and do not "
            "show how the model does on new ones; fix: record more sessions, or raise "
            "split.val_fraction in the recipe (and build the shards again)"
        )
    if data.batch_size > num_samples and data.mix is None:
        yield (
            f"data.batch_size is {data.batch_size}, but there are {num_samples} train samples: the "
            "rest of each batch is padding of weight 0, which costs as much time as samples; fix: "
            f"set data.batch_size to {num_samples} or less"
        )
    window_s, longest_s = data.window.duration_s, max(runs_s, default=math.inf)
    if window_s > longest_s + EPSILON_S:  # then each run is one window
        masked = 1 - sum(runs_s) / len(runs_s) / window_s
        yield (
            f"data.window.duration_s {window_s:g} is longer than the longest run of {longest_s:g} "
            f"s: {100 * masked:.0f} % of the ticks are masked; fix: set it to {longest_s:g} or less"
        )
    if training.parallel != "auto" and num_ranks == 1:
        yield (
            f"training.parallel is {training.parallel}, but this is one process, so it has no "
            "effect; fix: start several processes by `torchrun --nproc-per-node=N -m train run "
            "...`, or set it to auto"
        )
    if training.compile:
        yield "training.compile: the first step compiles the model, which takes minutes"


def print_summary(
    summary: TrainSummary,
    *,
    config: TrainConfig,
    first_val_losses: Mapping[str, float],
    comparisons: Sequence[Comparison],
    origin: Path,
    session: str,
    recipe: Recipe,
    console: Console,
) -> None:
    """Print losses before and after a run, its speed, and the commands that come next."""
    console.print(_loss_table(summary, first_val_losses), soft_wrap=False)
    if comparisons:
        console.print(_comparison_table(comparisons), soft_wrap=False)
    console.print(
        f"{summary.samples_per_sec:.1f} samples/s, data_wait_fraction "
        f"{summary.data_wait_fraction:.3f}; skipped: {summary.skipped_steps} steps, "
        f"{summary.skipped_samples} train samples, {summary.skipped_val_samples} held-out samples"
    )
    console.print(f"checkpoint   {summary.checkpoint}", soft_wrap=True)
    console.print(
        f"TensorBoard  tensorboard --logdir={shlex.quote(str(summary.log_dir))}", soft_wrap=True
    )
    folder = _find_session(config, session, recipe)
    words = ["--checkpoint", str(summary.checkpoint), "--input", str(folder or "SESSION")]
    command = shlex.join(["python", "-m", "train", "infer", *words, "--out", "predictions"])
    hint = "" if folder else f", where SESSION is the folder of a recording, such as {session}"
    console.print(f"next         {command}{hint}", soft_wrap=True)
    if summary.stopped_by == "signal":
        words = ["--config", str(origin), "--resume", "auto"]
        command = shlex.join(["python", "-m", "train", "run", *words])
        console.print(f"to resume    {command}, with the same key=value if any", soft_wrap=True)


def _find_session(config: TrainConfig, session: str, recipe: Recipe) -> Path | None:
    """Find the folder of a session in the usual places; shard sets do not know where theirs are."""
    roots = [config.data.root_dir] if config.data.root_dir else map(Path, _SESSION_ROOTS)
    folders = [folder for root in roots for folder in (root, session_folder(root, session))]
    return next((folder for folder in folders if is_session(folder, recipe)), None)


def _loss_table(summary: TrainSummary, first_val_losses: Mapping[str, float]) -> Table:
    table = Table(title=f"{summary.steps} steps", title_justify="left")
    for title in ("loss", "train start", "train end", "held-out start", "held-out end"):
        table.add_column(title, justify="left" if title == "loss" else "right")
    columns = (summary.first_losses, summary.last_losses, first_val_losses, summary.last_val_losses)
    for name in summary.last_losses or summary.last_val_losses:
        table.add_row(name, *(f"{c[name]:.4f}" if name in c else "-" for c in columns))
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="held-out sessions, compared with baselines", title_justify="left")
    for title in ("head", "loss", "baseline", "its loss", "better"):
        table.add_column(title, justify="right" if "loss" in title else "left")
    for row in comparisons:
        table.add_row(
            row.head,
            f"{row.loss:.4f}",
            row.baseline,
            f"{row.baseline_loss:.4f}",
            "yes" if row.is_better else "NO",
        )
    return table
