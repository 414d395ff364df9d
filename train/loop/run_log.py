"""RunLog: a run's metrics in the terminal and in TensorBoard, and its corrupt samples in a file.

Metrics have the same names everywhere. The terminal gets one line per log; TensorBoard's files are
in ``log_dir/<run name>``, next to ``quarantine.jsonl`` with the corrupt samples.
"""

from __future__ import annotations

import json
import math
import re
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from shared.errors import ConfigError, EngineError
from train.loop.health import HealthWatch
from train.loop.sample_logging import render_window, write_window

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from shared.recipe import Split
    from train.loop.health import HealthFinding
    from train.loop.sample_logging import LoggedWindow

QUARANTINE_NAME: Final = "quarantine.jsonl"
"""Substituted corrupt samples: key, shard, row, error, and the step and split that read them."""

HEADER_EVERY: Final = 20
"""Number of log lines between two headers with the column names."""

MIN_COLUMN_WIDTH: Final = 9

TENSORBOARD_ONLY_PREFIXES: Final = (
    "data_wait_ms_",
    "time_to_",
    "skipped_steps",
    "fp16_overflows",
    "grad_norm/",
    "samples_of/",
)
"""Prefixes of metrics that are not in the terminal line, because it would be too long."""

MIX_CHART: Final = "samples of each set"
"""Title of the chart that has curves only if several sets are mixed."""

CHARTS: Final = {
    "speed": {
        name: ["Multiline", [f"^{name}$"]]
        for name in ("samples_per_sec", "data_wait_fraction", "memory_allocated_mb")
    },
    "steps": {
        "gradient norm per part, clipped": ["Multiline", ["^grad_norm/"]],
        "grad_norm": ["Multiline", ["^grad_norm$"]],
        "lr": ["Multiline", ["^lr$"]],
        MIX_CHART: ["Multiline", ["^samples_of/"]],
        "skipped": ["Multiline", ["^skipped_steps$", "^fp16_overflows$", "^skipped_samples$"]],
    },
}
"""Curves that share a chart in TensorBoard's tab "custom scalars", by category and title.

A chart per loss comes first.
"""


class RunLog:
    """Writes to the terminal, TensorBoard and the quarantine file; a context manager.

    Args:
        first_step: the step that the run starts or resumes at; TensorBoard hides points that an
            earlier attempt logged for later steps.
        quiet_steps: health rules that every untrained model breaks are skipped before this step.
        console: where terminal output goes; None: to the terminal.
        is_silent: whether nothing is written at all, as on all ranks but the main one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int = 0,
        max_steps: int,
        quiet_steps: int,
        console: Console | None = None,
        is_silent: bool = False,
    ) -> None:
        self.folder = folder
        self.console = Console(quiet=True) if is_silent else console or Console(soft_wrap=True)
        self._is_silent = is_silent
        self._max_steps = max_steps
        self._watch = HealthWatch(quiet_steps=quiet_steps)
        self._curves = _Curves(
            folder, first_step=first_step, on_failure=self._warn, is_silent=is_silent
        )
        self._step = first_step
        self._num_lines = 0
        self._columns: tuple[str, ...] = ()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close TensorBoard's files; log the error that stopped the run, under "health"."""
        if isinstance(error, EngineError):
            self._write_text("health", f"**stopped**: {error}", self._step)
        self._curves.write(lambda writer: writer.close())

    def print(self, message: str, *, style: str | None = None) -> None:
        """Print a message to the terminal."""
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Report a problem that does not stop training, in the terminal and under "health"."""
        self._warn(message)
        self._write_text("health", f"**warning**: {message}", self._step)

    def write_config(self, config: Mapping[str, Any], *, heads: Sequence[str]) -> None:
        """Write the configuration to TensorBoard's text tab, and define its charts."""
        text = f"```\n{json.dumps(config, indent=2)}\n```"
        self._curves.write(lambda writer: writer.add_text("config", text))
        is_mix = config["data"]["mix"] is not None
        losses = ("loss_total", *(f"loss_{head}" for head in heads))
        charts = {
            "losses": {name: ["Multiline", [f"^{name}$", f"^val/{name}$"]] for name in losses},
            **{
                category: {n: chart for n, chart in group.items() if is_mix or n != MIX_CHART}
                for category, group in CHARTS.items()
            },
        }
        self._curves.write(lambda writer: writer.add_custom_scalars(charts))

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> list[HealthFinding]:
        """Write one log line, the same metrics to TensorBoard, and what the health rules find."""
        self._step = step
        self._write_scalars(step, metrics)
        self._write_line(step, metrics)
        findings = self._watch.observe(step, metrics)
        self._report(findings)
        return findings

    def write_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write held-out metrics as val/..., and what the health rules find in them."""
        named = {f"val/{name}": value for name, value in metrics.items()}
        self._write_scalars(step, named)
        self.print(
            f"  held out at step {step}: " + "  ".join(f"{n} {_short(v)}" for n, v in named.items())
        )
        self._report(self._watch.observe_held_out(step, named))

    def write_window(
        self, step: int, window: LoggedWindow | None, extra: Mapping[str, Any]
    ) -> None:
        """Write a held-out window as recorded and as predicted.

        `extra`: the checkpoint's "recipe" and "tokenizer", if it has them.
        """
        if window is not None and not self._is_silent:
            rendered = render_window(window, extra)
            self._curves.write(lambda writer: write_window(writer, rendered, step))

    def write_skipped(
        self, step: int, skipped: Sequence[Mapping[str, Any]], *, split: Split
    ) -> None:
        """Write substituted corrupt samples to the quarantine file and TensorBoard's text tab."""
        if not skipped or self._is_silent:
            return
        entries = [
            json.dumps({"step": step, "split": split, **each}, default=str) for each in skipped
        ]
        try:
            with (self.folder / QUARANTINE_NAME).open("a", encoding="utf-8") as file:
                file.writelines(f"{entry}\n" for entry in entries)
        except OSError as error:
            self._warn(f"{error}; these corrupt samples are missing there: {'; '.join(entries)}")
        self._write_text("skipped_samples", "\n\n".join(f"`{entry}`" for entry in entries), step)

    def _report(self, findings: Sequence[HealthFinding]) -> None:
        for finding in findings:
            self.print(f"  health at step {finding.step}: {finding}", style="yellow")
            self._write_text("health", f"**{finding.rule}**: {finding}", finding.step)

    def _warn(self, message: str) -> None:
        self.print(f"  warning: {message}", style="red")

    def _write_text(self, tag: str, text: str, step: int) -> None:
        self._curves.write(lambda writer: writer.add_text(tag, text, step))

    def _write_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        def add_all(writer: Any) -> None:  # noqa: ANN401 (tensorboard has no types)
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        self._curves.write(add_all)

    def _write_line(self, step: int, metrics: Mapping[str, float]) -> None:
        names = tuple(n for n in metrics if not n.startswith(TENSORBOARD_ONLY_PREFIXES))
        if self._num_lines % HEADER_EVERY == 0 or names != self._columns:
            self._columns = names
            self.print(format_line(self._step_column("step"), {n: n for n in names}), style="bold")
        self._num_lines += 1
        step_column = self._step_column(f"{step}/{self._max_steps}")
        self.print(format_line(step_column, {n: _short(metrics[n]) for n in names}))

    def _step_column(self, text: str) -> str:
        return text.rjust(max(len("step"), 2 * len(str(self._max_steps)) + 1))


class _Curves:
    """TensorBoard's writer; a disk that fills up stops the curves, but not the training.

    Raises:
        ConfigError: the folder is not writable.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        on_failure: Callable[[str], None],
        is_silent: bool = False,
    ) -> None:
        self._folder = folder
        self._on_failure = on_failure
        self._is_silent = is_silent
        self._is_failing = False
        if is_silent:
            return
        try:
            purge_step = first_step + 1 if first_step else None
            self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step)
        except OSError as error:
            raise ConfigError(
                f"{folder}: logs cannot be written there ({error}); fix: set training.log_dir to a "
                "writable folder"
            ) from error

    def write(self, call: Callable[[Any], None]) -> None:
        """Call a function with the writer; after a failure, the next call opens a new writer."""
        if self._is_silent:
            return
        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._folder))
            call(self._writer)
        except OSError as error:
            self._writer = None  # its thread is dead
            if not self._is_failing:
                self._on_failure(f"{error}; TensorBoard misses some curves, training continues")
            self._is_failing = True
        else:
            self._is_failing = False


def format_line(first: str, columns: Mapping[str, str]) -> str:
    """Return one line with each text right-aligned under its column's name."""
    cells = [text.rjust(max(len(name), MIN_COLUMN_WIDTH)) for name, text in columns.items()]
    return "  ".join([first, *cells])


def default_run_name() -> str:
    """Return a folder name of time and host name, such as 20260131-174502-lab-3."""
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname().split(".")[0]).strip("-")
    return "-".join(filter(None, [time.strftime("%Y%m%d-%H%M%S"), host]))


def _short(value: float) -> str:
    """Format four significant digits, without an exponent if that is readable."""
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 10_000 or value == int(value) else f"{value:.4g}"
