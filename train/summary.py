"""What came of a run: losses before and after, against predictors that know nothing, and the
commands that come next.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from shared.session.folder import is_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console

    from train.config import TrainConfig
    from train.loop.meter import TrainSummary
    from train.model.baselines import Comparison


def remarks(
    config: TrainConfig, *, num_samples: int, not_held_out: str | None = None, num_ranks: int = 1
) -> Iterator[str]:
    """Lines for people, each with its mend.

    Args:
        config: the whole configuration.
        num_samples: of the train split.
        not_held_out: why no session is held out; None where some are.
        num_ranks: processes that train together.
    """
    data, training = config.data, config.training
    if not_held_out is not None:
        yield (
            f"nothing is held out: {not_held_out}; losses are of trained samples only, and say "
            "nothing of new ones. Record more sessions, or raise split.val_fraction in the recipe "
            "(and build the shards again)"
        )
    if data.batch_size > num_samples and data.mix is None:
        yield (
            f"data.batch_size is {data.batch_size}, and there are {num_samples} train samples: "
            f"the rest of each batch is padding of weight 0, at the cost of samples; set "
            f"data.batch_size: {num_samples} or less"
        )
    if training.parallel != "auto" and num_ranks == 1:
        yield (
            f"training.parallel is {training.parallel}, and this is one process: it changes "
            "nothing; start several by `torchrun --nproc-per-node=N -m train run ...`, or leave it "
            "auto"
        )
    if training.compile:
        yield "training.compile: the first step compiles the model, which takes minutes"


def print_summary(
    console: Console,
    config: TrainConfig,
    summary: TrainSummary,
    before: Mapping[str, float],
    rows: Sequence[Comparison],
    *,
    origin: Path,
    session: str,
) -> None:
    """Print what happened in a run.

    Args:
        console: where to.
        config: the run's.
        summary: of the trainer.
        before: held-out losses before the first step; empty where nothing is held out.
        rows: the trained losses beside the baselines'.
        origin: the configuration's file, for the commands.
        session: name of one to look at.
    """
    table = Table(title=f"{summary.steps} steps", title_justify="left")
    for title in ("loss", "train start", "train end", "held-out start", "held-out end"):
        table.add_column(title, justify="left" if title == "loss" else "right")
    names = summary.last_losses or summary.last_val_losses
    for name in names:
        columns = (summary.first_losses, summary.last_losses, before, summary.last_val_losses)
        table.add_row(name, *(f"{c[name]:.4f}" if name in c else "-" for c in columns))
    console.print(table)
    if rows:
        console.print(_comparison_table(rows))
    console.print(
        f"{summary.samples_per_sec:.1f} samples/s, data_wait_fraction "
        f"{summary.data_wait_fraction:.3f}; skipped: {summary.skipped_steps} steps, "
        f"{summary.skipped_samples} samples, {summary.skipped_val_samples} held-out ones"
    )
    console.print(f"checkpoint   {summary.checkpoint}", soft_wrap=True)
    console.print(
        f"TensorBoard  tensorboard --logdir={shlex.quote(str(summary.log_dir))}", soft_wrap=True
    )
    words = ["--checkpoint", str(summary.checkpoint), "--input", str(_folder_of(session, config))]
    command = shlex.join(["python", "-m", "train", "infer", *words, "--out", "predictions"])
    console.print(f"next         {command}", soft_wrap=True)
    if summary.stopped_by == "signal":
        words = ["--config", str(origin), "--resume", "auto"]
        command = shlex.join(["python", "-m", "train", "run", *words])
        console.print(f"to go on     {command}, with the same key=value if any", soft_wrap=True)


def _folder_of(session: str, config: TrainConfig) -> Path:
    """Where a session lies; ``data.root_dir`` may be the session itself."""
    root = config.data.root_dir or Path("data/sessions")
    return root if is_session(root) else root / session


def _comparison_table(rows: Sequence[Comparison]) -> Table:
    table = Table(
        title="held-out sessions, against predictors that know nothing", title_justify="left"
    )
    for title in ("head", "loss", "baseline", "its loss", "better"):
        table.add_column(title, justify="right" if "loss" in title else "left")
    for row in rows:
        table.add_row(
            row.head,
            f"{row.loss:.4f}",
            row.baseline,
            f"{row.baseline_loss:.4f}",
            "yes" if row.is_better else "NO",
        )
    return table
