"""Stream a recorded session through a trained model and write what it predicts, tick by tick.

::

    checkpoint -> load_trained_model   model, recipe, tokenizer, baselines
    session    -> SessionSource        touching windows, cut by the checkpoint's recipe
               -> TickStream           forward_step per tick, with a key-value cache
               -> PredictionWriter     text, sound, poses        (train.infer.predictions)
               -> Score                losses, baselines, latency -> metrics.json
               -> write_page           predictions next to the recording -> index.html

The cache crosses the borders of windows: the last tick of one window predicts the first tick of the
next. It is reset where windows of the session are left out in between, and between windows of
densely packed text, which do not follow each other. No stream is required. A stream that covers
little of a window is masked, and the window is kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.clock import Window
from shared.errors import ConfigError, SessionError
from shared.recipe import Stream
from shared.session.folder import SOURCE_FILES, is_session
from train.config import HEAD_STREAM, TEXT_HEADS, Head, TrainConfig
from train.data.batch import assemble_batch
from train.data.device import to_device
from train.data.session_source import SessionSource
from train.infer.page import write_page
from train.infer.predictions import AUDIO_NAME, DMEL_NAME, PredictionWriter, WindowPrediction
from train.infer.stream import Sampling, TickStream, take_ticks
from train.machine import runtime
from train.model.baselines import compare
from train.model.encoders import count_ticks
from train.model.losses import loss_sums, mean_losses
from train.trained_model import TrainedModel, load_trained_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from shared.session.scan import SessionScan
    from train.data.batch import WindowShapes
    from train.infer.stream import Streamed

METRICS_NAME = "metrics.json"

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

    Args:
        checkpoint: of a training run on shards or sessions.
        session: a session folder with at least one stream.
        out: folder for the predictions (see :mod:`train.infer.predictions`), ``metrics.json`` and
            ``index.html``.
        device: "auto", "cpu", "cuda" or "cuda:N".
        temperature: for tokens and dMel levels; 0 chooses the most likely value.
        top_k: see :class:`train.infer.stream.Sampling`.
        top_p: see :class:`train.infer.stream.Sampling`.
        seed: of every random choice.
        progress: called with the number of finished windows and of all windows.

    Returns:
        The content of ``metrics.json``: among others "losses", in nats per token and per dMel
        value, and for poses as in :func:`train.model.losses.compute_losses`. A loss is None, with
        an entry in "reasons", if the session has nothing to compare with.

    Raises:
        CheckpointError: the file is not a checkpoint, or has no recipe or tokenizer.
        SessionError: the folder is not a session, or nothing in it can be read.
        ConfigError: a sampling value is out of range, the device does not exist, or `out` holds a
            session.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    _refuse_recordings(out, session)
    with runtime.translate_oom("Free memory there, or give --device cpu"):
        trained = load_trained_model(checkpoint, device=runtime.choose_device(device))
        source = open_session(session, trained)
        stream = TickStream(trained, sampling, seed=seed)
        score = run_session(source, trained, stream, out=out, seed=seed, progress=progress)
    metrics = {
        "checkpoint": str(checkpoint),
        **describe_run(source, trained, score),
        "sampling": {**dataclasses.asdict(sampling), "seed": seed},
        **score.as_json(source.reader(0).scan),
    }
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (out / METRICS_NAME).write_text(text, encoding="utf-8")
    write_page(out, source.reader(0), metrics, trained=trained)
    return metrics


def _refuse_recordings(out: Path, session: Path) -> None:
    """Refuse a folder in which predictions would overwrite a recording.

    Raises:
        ConfigError: `out` is a session; recordings and predictions share the name audio.wav.
    """
    # An audio.wav next to the dMel levels that it was decoded from is an earlier prediction.
    recorded = [n for n in SOURCE_FILES if n != AUDIO_NAME or not (out / DMEL_NAME).exists()]
    if any((out / name).exists() for name in recorded) or out.resolve() == session.resolve():
        raise ConfigError(
            f"{out} holds a session, and predictions would overwrite its {AUDIO_NAME}; fix: write "
            "them to another folder by --out"
        )


def describe_run(source: SessionSource, trained: TrainedModel, score: Score) -> dict[str, Any]:
    """Describe the session, its streams, and the step and device of the model."""
    scan = source.reader(0).scan
    return {
        "step": trained.step,
        "session": scan.session,
        "duration_s": scan.duration_s,
        "num_windows": int(source.shard_sizes[0]),
        "num_ticks": len(score.latencies_ms),
        "device": str(trained.device),
        "streams": describe_streams(scan, trained.config),
    }


def describe_streams(scan: SessionScan, config: TrainConfig) -> dict[str, Any]:
    """List the session's streams that the model reads, those that it ignores, and absent ones."""
    return {
        "seen": [str(s) for s in scan.intervals if s in config.input_streams],
        "unseen": [str(s) for s in scan.intervals if s not in config.input_streams],
        "absent": {str(s): reason for s, reason in scan.absent.items()},
    }


def run_session(
    source: SessionSource,
    trained: TrainedModel,
    stream: TickStream,
    *,
    out: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Stream all windows of a session and write the predictions; see :func:`infer`."""
    score, num_windows = Score(trained), int(source.shard_sizes[0])
    is_dense = trained.config.is_text_only
    with PredictionWriter(
        out,
        heads=trained.config.heads,
        num_ticks=ticks_until(source.reader(0).scan.duration_s, trained.shapes),
        recipe=trained.recipe,
        shapes=trained.shapes,
        tokenizer=trained.tokenizer,
        seed=seed,
    ) as writer:
        for row in range(num_windows):
            batch = read_window(source, row, trained)
            if not is_contiguous(source, row, trained):
                stream.reset()
            # A dense window has its own number of tokens; training saw all of them at once.
            streamed = stream.run_window(batch, context=batch["num_ticks"] if is_dense else None)
            score.add(streamed, batch)
            writer.add(locate_window(streamed, source, row, trained))
            if progress is not None:
                progress(row + 1, num_windows)
    return score


def open_session(path: Path, trained: TrainedModel) -> SessionSource:
    """Open a session as one shard of touching windows; any stream may be missing.

    Raises:
        SessionError: the folder is not a session, or nothing in it can be read.
    """
    if not is_session(path):
        raise SessionError(
            f"{path} is not a session; fix: give a folder with at least one of "
            f"{', '.join(SOURCE_FILES)}"
        )
    window = {"stride_s": None, "min_coverage": 0.0}
    recipe = trained.recipe.model_copy(
        update={"required": (), "window": trained.recipe.window.model_copy(update=window)}
    )
    return SessionSource(path, recipe=recipe, tokenizer=trained.tokenizer)


def ticks_until(duration_s: float, shapes: WindowShapes) -> int:
    """Count the ticks that begin before `duration_s`."""
    return math.ceil(duration_s * shapes.tick_rate_hz - _EPSILON_TICKS)


def read_window(source: SessionSource, row: int, trained: TrainedModel) -> dict[str, Any]:
    """Read a window as a batch of one on the model's device, cut at the session's end.

    Returns:
        As docs/batch.md, with "num_ticks": the ticks of the window.
    """
    shapes = trained.shapes
    batch = assemble_batch(source, [(0, row)], config=trained.config, shapes=shapes)
    if trained.config.is_text_only:
        batch["num_ticks"] = count_ticks(batch["inputs"], shapes)
    else:
        first = round(source.start_s(0, row) * shapes.tick_rate_hz)
        count = min(shapes.num_ticks, ticks_until(source.reader(0).scan.duration_s, shapes) - first)
        batch["num_ticks"] = count
        for group in ("inputs", "targets"):
            batch[group] = take_ticks(
                batch[group], first=0, count=count, num_ticks=shapes.num_ticks, shapes=shapes
            )
    moved: dict[str, Any] = to_device(batch, trained.device)
    return moved


def is_contiguous(source: SessionSource, row: int, trained: TrainedModel) -> bool:
    """Return whether a window's first tick comes right after the previous window's last tick."""
    if row == 0 or trained.config.is_text_only:
        return False
    gap_s = source.start_s(0, row) - source.start_s(0, row - 1)
    return gap_s < 1.5 * trained.recipe.window.duration_s


def locate_window(
    streamed: Streamed, source: SessionSource, row: int, trained: TrainedModel
) -> WindowPrediction:
    """Place a window's predictions on the session clock, without ticks beyond the session's end.

    Densely packed text has no ticks: a predicted token gets the time of the recorded token that it
    is compared with.
    """
    rate_hz, start_s = trained.shapes.tick_rate_hz, source.start_s(0, row)
    first = round(start_s * rate_hz) + 1
    if trained.config.is_text_only:
        times_s = _token_times(source, row, trained)[1:]
    else:
        stop = ticks_until(source.reader(0).scan.duration_s, trained.shapes)
        times_s = np.arange(first, min(first + len(streamed.latencies_ms), stop)) / rate_hz
    kept = {Head(head): values[: len(times_s)] for head, values in streamed.chosen.items()}
    levels = kept.get(Head.AUDIO)
    return WindowPrediction(
        first_tick=first,
        follows=is_contiguous(source, row, trained),
        times_s=times_s,
        tokens={head: values for head, values in kept.items() if head in TEXT_HEADS},
        levels=None if levels is None else levels.astype(np.uint8),
        poses=kept.get(Head.ANIMATION),
    )


def _token_times(source: SessionSource, row: int, trained: TrainedModel) -> NDArray[np.float64]:
    """Return the times of a window's densely packed tokens, in order."""
    start_s = source.start_s(0, row)
    window = Window(row, start_s, trained.recipe.window.duration_s)
    text = source.reader(0).read_text(window)
    streams = {*trained.config.input_streams, *trained.config.target_streams}
    times_s = [
        *(text.internal.time_s if Stream.INTERNAL_TEXT in streams else ()),
        *(text.external.time_s if Stream.EXTERNAL_TEXT in streams else ()),
    ]
    return np.sort(np.array(times_s, dtype=np.float64))


class Score:
    """Losses of a model and of its baselines over the windows of a session, and tick latencies."""

    def __init__(self, trained: TrainedModel) -> None:
        self.latencies_ms: list[float] = []
        """Per tick, from its inputs to the chosen values."""
        self._trained = trained
        self._sums: dict[str, Tensor] = {}

    def add(self, streamed: Streamed, batch: Mapping[str, Any]) -> None:
        """Add a window."""
        self.latencies_ms += streamed.latencies_ms
        targets, weight = batch["targets"], batch["weight"]
        sums = loss_sums(streamed.outputs, targets, weight, config=self._trained.config)
        for name, pair in {**sums, **self._trained.baselines.losses(batch)}.items():
            total = torch.stack([each.double().cpu() for each in pair])
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def as_json(self, scan: SessionScan) -> dict[str, Any]:
        """Format as plain values: losses, reasons, baselines, comparison, tick_latency_ms.

        Args:
            scan: has the reasons for absent streams.
        """
        means = {name: _mean(total) for name, total in self._sums.items()}
        config = self._trained.config
        losses = {f"loss_{head}": means[f"loss_{head}"] for head in config.heads}
        baselines = {name: loss for name, loss in means.items() if name not in losses}
        reasons = {
            f"loss_{head}": self._reason(head, scan)
            for head in config.heads
            if losses[f"loss_{head}"] is None
        }
        loss_total = None
        if reasons:
            reasons["loss_total"] = f"its sum needs {', '.join(reasons)}"
        else:
            sums = {name: (self._sums[name][0], self._sums[name][1]) for name in losses}
            loss_total = float(mean_losses(sums, config=config)["loss_total"])
        tick_ms = 1e3 / self._trained.shapes.tick_rate_hz
        return {
            "losses": {"loss_total": loss_total, **losses},
            "reasons": reasons,
            "baselines": baselines,
            "comparison": [dataclasses.asdict(row) for row in compare(losses, baselines)],
            "tick_latency_ms": summarize_latencies(self.latencies_ms, tick_ms=tick_ms),
        }

    def _reason(self, head: Head, scan: SessionScan) -> str:
        """Say why a head has no loss."""
        if self._sums[f"loss_{head}"][1] > 0:
            return "the model's predictions are not finite"
        stream = HEAD_STREAM[head]
        return scan.absent.get(stream, f"no tick with {stream} follows another tick")


def summarize_latencies(latencies_ms: list[float], *, tick_ms: float) -> dict[str, float]:
    """Summarize tick latencies for use in real time.

    Args:
        latencies_ms: of all ticks.
        tick_ms: duration of a tick; a slower model cannot keep up.

    Returns:
        "p50", "p95", "p99" of all ticks but the first, which includes warm-up; "first", that of the
        first tick; "tick", the duration of a tick; "share_in_time", the share of ticks that took no
        longer.
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
