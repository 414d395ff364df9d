"""Stream a recorded session through a trained model and write what it predicts, tick by tick.

::

    checkpoint -> load_trained_model   model, recipe, tokenizer, baselines
    session    -> SessionSource        touching windows of the training's length
               -> TickStream           forward_step per tick, with a key-value cache
               -> PredictionWriter     text, sound, sensors      (train.infer.predictions)
               -> Score                losses, baselines, latency -> metrics.json
               -> write_page           predictions next to the recording -> index.html

The cache crosses the borders of windows: the last tick of one window predicts the first tick of the
next. It is reset where segments of the session are left out in between, and between windows of
densely packed text, which do not follow each other. No stream is required: what is missing is
masked.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table

from shared.errors import ConfigError, SessionError
from shared.session.folder import is_session, source_files
from train.data.batch import assemble_batch
from train.data.device import to_device
from train.data.session_source import SessionSource
from train.data.windows import WindowGrid
from train.infer.page import write_page
from train.infer.predictions import METRICS_NAME, PredictionWriter, WindowPrediction, earlier_files
from train.infer.stream import Sampling, TickStream, take_ticks
from train.machine import runtime
from train.model.baselines import compare
from train.model.encoders import count_ticks
from train.model.losses import loss_sums, mean_losses
from train.trained_model import TrainedModel, load_trained_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from rich.console import Console
    from torch import Tensor

    from shared.recipe import Recipe
    from shared.session.scan import SessionScan
    from train.data.assembly import WindowRows
    from train.data.batch import SampleLocation
    from train.infer.stream import Streamed
    from train.shapes import WindowShapes

_EPSILON_TICKS = 1e-6
"""Rounding error that a session's duration may have, in ticks."""


def infer(
    checkpoint: Path,
    session: Path,
    out: Path,
    *,
    device: str = "auto",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Stream a session through a checkpoint's model and write what it predicts.

    `session`: a session folder with at least one stream.
    `out`: folder for the predictions (see :mod:`train.infer.predictions`), ``metrics.json`` and
        ``index.html``.
    `temperature`: for tokens and dMel levels; 0 chooses the most likely value.
    `seed`: of every random choice.
    `progress`: called with the number of finished windows and of all windows.

    Returns:
        The content of ``metrics.json``: among others "losses", in nats per token and per dMel
        value, and for sensors as in :func:`train.model.losses.compute_losses`. A loss is None,
        with an entry in "reasons", if the session has nothing to compare with.

    Raises:
        CheckpointError: the file is not a checkpoint, or has no recipe or tokenizer.
        SessionError: the folder is not a session, or nothing in it can be read.
        ConfigError: a sampling value is out of range, the device does not exist, or `out` holds a
            session.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    with runtime.translate_oom("Free memory there, or give --device cpu"):
        trained = load_trained_model(checkpoint, device=runtime.choose_device(device))
        _refuse_recordings(out, session, trained.recipe)
        source = open_session(session, trained)
        stream = TickStream(trained, sampling, seed=seed)
        score, files = run_session(source, trained, stream, out=out, seed=seed, progress=progress)
    metrics = {
        "checkpoint": str(checkpoint),
        **describe_run(source, trained, score),
        "sampling": {**dataclasses.asdict(sampling), "seed": seed},
        **score.as_json(source.reader(0).scan),
        "files": files,
    }
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (out / METRICS_NAME).write_text(text, encoding="utf-8")
    write_page(out, source.reader(0), metrics, trained=trained)
    return metrics


def _refuse_recordings(out: Path, session: Path, recipe: Recipe) -> None:
    """Refuse a folder in which predictions would overwrite a recording."""
    names = [name for name in source_files(recipe) if name not in earlier_files(out)]
    recorded = [name for name in names if (out / name).exists()]
    if recorded or out.resolve() == session.resolve():
        raise ConfigError(
            f"{out} holds a session, and predictions could overwrite its "
            f"{recorded[0] if recorded else 'files'}; fix: write them to another folder by --out"
        )


def describe_run(source: SessionSource, trained: TrainedModel, score: Score) -> dict[str, Any]:
    """Describe the session, its streams, and the step and device of the model."""
    scan = source.reader(0).scan
    return {
        "step": trained.step,
        "session": scan.session,
        "duration_s": scan.duration_s,
        "num_windows": int(source.window_counts.sum()),
        "num_ticks": len(score.latencies_ms),
        "device": str(trained.device),
        "streams": {
            "seen": [name for name in scan.intervals if name in trained.shapes.inputs],
            "unseen": [name for name in scan.intervals if name not in trained.shapes.inputs],
            "absent": dict(scan.absent),
        },
    }


def run_session(
    source: SessionSource,
    trained: TrainedModel,
    stream: TickStream,
    *,
    out: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Score, list[str]]:
    """Stream a session's windows and write predictions; return the score and the files' names."""
    score, shapes = Score(trained), trained.shapes
    num_ticks = ticks_until(source.reader(0).scan.duration_s, shapes)
    windows = list(list_windows(source, shapes))
    next_tick: int | None = None
    with PredictionWriter(out, trained=trained, num_ticks=num_ticks, seed=seed) as writer:
        for number, (location, rows) in enumerate(windows, start=1):
            batch = read_window(source, location, rows, trained)
            follows = rows.clock_tick == next_tick and not shapes.is_text_only
            if not follows:
                stream.reset()
            # A dense window has its own number of tokens; training saw all of them at once.
            context = batch["num_ticks"] if shapes.is_text_only else None
            streamed = stream.run_window(batch, context=context)
            score.add(streamed, batch)
            times_s = batch["times_s"]
            prediction = WindowPrediction(
                first_tick=rows.clock_tick + 1,
                follows=follows,
                times_s=times_s,
                values={head: chosen[: len(times_s)] for head, chosen in streamed.chosen.items()},
            )
            writer.add(prediction)
            next_tick = rows.clock_tick + rows.num_ticks
            if progress is not None:
                progress(number, len(windows))
    return score, writer.files


def open_session(path: Path, trained: TrainedModel) -> SessionSource:
    """Open a session in touching windows; any stream may be missing."""
    if not is_session(path, trained.recipe):
        raise SessionError(
            f"{path} is not a session; fix: give a folder with at least one of "
            f"{', '.join(source_files(trained.recipe))}"
        )
    streams = trained.recipe.streams.items()
    optional = {name: spec.model_copy(update={"required": False}) for name, spec in streams}
    recipe = trained.recipe.model_copy(update={"streams": optional})
    source = SessionSource(path, recipe=recipe, tokenizer=trained.tokenizer)
    return source.open_windows(trained.shapes, WindowGrid.from_config(trained.config).as_touching())


def ticks_until(duration_s: float, shapes: WindowShapes) -> int:
    """Count the ticks that begin before `duration_s`."""
    return math.ceil(duration_s * shapes.tick_rate_hz - _EPSILON_TICKS)


def list_windows(
    source: SessionSource, shapes: WindowShapes
) -> Iterator[tuple[SampleLocation, WindowRows]]:
    """Yield the windows of a session in order of time, without ticks beyond the session's end."""
    for shard, count in enumerate(source.window_counts.tolist()):
        for window in range(count):
            rows = source.locate(shard, window)
            num_ticks = ticks_until(rows.duration_s, shapes) - rows.clock_tick
            if num_ticks > 0:
                num_ticks = min(num_ticks, rows.num_ticks)
                yield (shard, window), rows._replace(num_ticks=num_ticks)


def read_window(
    source: SessionSource, location: SampleLocation, rows: WindowRows, trained: TrainedModel
) -> dict[str, Any]:
    """Read the ticks of a window as a batch of one on the model's device.

    Returns:
        As docs/batch.md, with "num_ticks", the ticks of the window, and "times_s", the times on the
        session clock of the ticks that they predict, without one beyond the session's end. Densely
        packed text has tokens instead of ticks: a predicted token gets the time of the recorded
        token that it is compared with.
    """
    shapes = trained.shapes
    batch = assemble_batch(source, [location], pixels=trained.config.data.pixels)
    if shapes.is_text_only:
        batch["num_ticks"] = count_ticks(batch["inputs"], shapes)
        texts = source.read_into(*location, {}).texts.values()
        batch["times_s"] = np.sort(np.concatenate([text.event_s for text in texts]))[1:]
    else:
        count = batch["num_ticks"] = rows.num_ticks
        first, stop = rows.clock_tick + 1, ticks_until(rows.duration_s, shapes)
        batch["times_s"] = np.arange(first, min(first + count, stop)) / shapes.tick_rate_hz
        for group in ("inputs", "targets"):
            batch[group] = take_ticks(
                batch[group], first=0, count=count, num_ticks=shapes.num_ticks, shapes=shapes
            )
    moved: dict[str, Any] = to_device(batch, trained.device)
    return moved


class Score:
    """Losses of a model and of its baselines over the windows of a session, and tick latencies."""

    def __init__(self, trained: TrainedModel) -> None:
        self.latencies_ms: list[float] = []
        """Per tick, from its inputs to the chosen values."""
        self._trained = trained
        self._objective = trained.model.objective
        self._sums: dict[str, Tensor] = {}

    def add(self, streamed: Streamed, batch: Mapping[str, Any]) -> None:
        """Add a window."""
        self.latencies_ms += streamed.latencies_ms
        targets, weight = batch["targets"], batch["weight"]
        sums = loss_sums(streamed.outputs, targets, weight, objective=self._objective)
        for name, pair in {**sums, **self._trained.baselines.losses(batch)}.items():
            total = torch.stack([each.double().cpu() for each in pair])
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def as_json(self, scan: SessionScan) -> dict[str, Any]:
        """Format as plain values: losses, reasons, baselines, comparison, tick_latency_ms."""
        means = {name: _mean(total) for name, total in self._sums.items()}
        means |= dict.fromkeys((f"loss_{head}" for head in self._trained.untrained), None)
        heads = list(self._objective.weights)
        losses = {f"loss_{head}": means[f"loss_{head}"] for head in heads}
        baselines = {name: loss for name, loss in means.items() if name not in losses}
        reasons = {
            f"loss_{head}": self._reason(head, scan)
            for head in heads
            if losses[f"loss_{head}"] is None
        }
        loss_total = None
        if reasons:
            reasons["loss_total"] = f"its sum needs {', '.join(reasons)}"
        else:
            sums = {name: (self._sums[name][0], self._sums[name][1]) for name in losses}
            loss_total = float(mean_losses(sums, objective=self._objective)["loss_total"])
        tick_ms = 1e3 / self._trained.shapes.tick_rate_hz
        return {
            "losses": {"loss_total": loss_total, **losses},
            "reasons": reasons,
            "baselines": baselines,
            "comparison": [dataclasses.asdict(row) for row in compare(losses, baselines)],
            "tick_latency_ms": summarize_latencies(self.latencies_ms, tick_ms=tick_ms),
        }

    def _reason(self, head: str, scan: SessionScan) -> str:
        """Say why a head has no loss."""
        if head in self._trained.untrained:
            return "it never had a target in training, so its predictions are left out"
        if self._sums[f"loss_{head}"][1] > 0:
            return "the model's predictions are not finite"
        stream = self._trained.shapes.targets[head]
        return scan.absent.get(stream, f"no tick with {stream} follows another tick")


def print_inference(metrics: Mapping[str, Any], page: Path, console: Console) -> None:
    """Print what a session's predictions are worth, and where they are."""
    console.print(
        f"{metrics['session']}: {metrics['duration_s']:.1f} s, {metrics['num_ticks']} ticks, by "
        f"the model of step {metrics['step']}"
    )
    table = Table()
    for title in ("head", "loss", "baselines"):
        table.add_column(title, justify="right" if title == "loss" else "left")
    for name, loss in metrics["losses"].items():
        head = name.removeprefix("loss_")
        against = [row for row in metrics["comparison"] if row["head"] == head]
        notes = [
            f"{row['baseline']} {row['baseline_loss']:.4f}{'' if row['is_better'] else ' (better)'}"
            for row in against
        ]
        note = metrics["reasons"].get(name) or ", ".join(notes)
        table.add_row(head, "-" if loss is None else f"{loss:.4f}", note)
    console.print(table, soft_wrap=False)
    latency = metrics["tick_latency_ms"]
    console.print(
        f"latency  p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms per tick of "
        f"{latency['tick']:.0f} ms"
    )
    console.print(f"files    {page.parent} (all figures: {METRICS_NAME})")
    console.print(f"page     {page}")


def summarize_latencies(latencies_ms: list[float], *, tick_ms: float) -> dict[str, float]:
    """Summarize tick latencies for use in real time.

    The first tick includes warm-up, so the percentiles leave it out. "share_in_time" is the share
    of ticks that took no longer than a tick lasts, "tick".
    """
    later = np.array(latencies_ms[1:] or latencies_ms)
    percentiles = {f"p{share}": float(np.percentile(later, share)) for share in (50, 95, 99)}
    return {
        **percentiles,
        "first": latencies_ms[0],
        "tick": tick_ms,
        "share_in_time": float((later <= tick_ms).mean()),
    }


def _mean(total: Tensor) -> float | None:
    """Divide a sum by its count; None if nothing was counted, or the sum is not finite."""
    mean = float(total[0] / total[1]) if total[1] > 0 else math.nan
    return mean if math.isfinite(mean) else None
