"""Write predictions as one HTML page: recorded compared with predicted, on one clock.

The file contains its styles, script, pictures and sound; it needs no network. It shows the
session's first minute (:data:`PAGE_S`), about 10 MB for two videos and sound, however long the
session is; its losses are those of the whole session.

What is recorded comes from the session's files, by the model's recipe. What is predicted comes
from the files of :class:`train.infer.predictions.PredictionWriter`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import zarr

from shared.clock import Window, plan_windows, wrap_angle
from shared.media.tokenizer import group_events
from shared.page import (
    TimeAxis,
    TimedText,
    ValueAxis,
    arrange_texts,
    count_lanes,
    curve_path,
    draw_spectrogram,
    jpeg_uri,
    page_environment,
    png_uri,
    sampled_curves,
    wav_uri,
)
from shared.recipe import PAD_TOKEN, TEXT_STREAMS, VISION_STREAMS, Stream
from shared.session.reader import SessionReader
from train.config import HEAD_STREAM, TEXT_HEADS, Head
from train.data.batch import tokens_on_ticks
from train.infer.predictions import ANIMATION_NAME, AUDIO_NAME, DMEL_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.page import TextMark
    from train.trained_model import TrainedModel

PAGE_NAME = "index.html"

PAGE_S = 60.0
"""Length of the session's start that is shown; a browser cannot hold much more."""

FRAME_RATE_HZ = 10.0
"""Frames shown per second and video."""

FRAME_SIZE = 160
"""Height and width of a frame."""

MIN_PIXELS_PER_S = 60.0

MIN_TIMELINE_WIDTH = 1150.0
"""A short session fills the page's width; a longer one is scrolled."""

CURVE_HEIGHT = 46.0

MIN_CURVE_RANGE = 0.2
"""rad or rad/s; a joint that hardly moves is not magnified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSource:
    """A recorded session and its predictions, up to the end of the page."""

    out: Path
    """Folder of the predictions."""
    reader: SessionReader
    trained: TrainedModel
    duration_s: float

    @property
    def axis(self) -> TimeAxis:
        """The page's time axis."""
        width = max(MIN_TIMELINE_WIDTH, MIN_PIXELS_PER_S * self.duration_s)
        return TimeAxis(0.0, self.duration_s, width=math.ceil(width))

    @property
    def windows(self) -> list[Window]:
        """Adjacent windows that cover the page."""
        window_s = self.trained.recipe.window.duration_s
        return plan_windows(self.duration_s, window_s=window_s, stride_s=window_s)

    def is_recorded(self, stream: Stream) -> bool:
        """Return whether a stream was recorded."""
        return stream in self.reader.scan.intervals

    def is_predicted(self, head: Head) -> bool:
        """Return whether the model has a head."""
        return head in self.trained.config.heads

    def read_predicted(self, file: str, array: str, *, count: int) -> NDArray[Any]:
        """Read the first rows of a predicted array."""
        rows = zarr.open_group(self.out / file, mode="r")[array]
        assert isinstance(rows, zarr.Array)
        return np.asarray(rows[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """One text stream."""

    title: str
    recorded: list[TextMark]
    predicted: list[TextMark] | None
    """None if the model has no such head."""
    ticks: list[tuple[float, str]]
    """Position and kind of each tick with a token: right, wrong, missed or invented."""
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveRow:
    """One value of a pose."""

    title: str
    recorded: str
    predicted: str
    low: float
    high: float
    error: str
    """Root mean square with its unit."""


def write_page(
    out: Path, reader: SessionReader, metrics: Mapping[str, Any], *, trained: TrainedModel
) -> Path:
    """Write ``index.html`` into the folder of the predictions.

    Args:
        out: folder that :class:`train.infer.predictions.PredictionWriter` has filled.
        reader: the session, by the model's recipe.
        metrics: the result of :func:`train.infer.run.infer`.
        trained: the model that predicted.
    """
    tick_s = 1 / trained.shapes.tick_rate_hz
    duration_s = math.ceil(reader.scan.duration_s / tick_s - 1e-6) * tick_s
    source = PageSource(out=out, reader=reader, trained=trained, duration_s=min(duration_s, PAGE_S))
    environment = page_environment("train.infer")
    environment.globals["count_lanes"] = count_lanes
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    videos, texts = _draw_videos(source), _draw_texts(source)
    html = environment.get_template("page.html.j2").render(
        script=script,
        script_hash=f"sha256-{digest}",
        metrics=metrics,
        duration_s=reader.scan.duration_s,
        axis=source.axis,
        tick_width=round(source.axis.width / source.duration_s * tick_s - 1, 1),
        curve_height=CURVE_HEIGHT,
        videos=list(videos),
        sounds=_draw_sounds(source),
        texts=texts,
        curves=_draw_curves(source),
        losses=_loss_rows(metrics),
        script_values={
            "durationS": source.duration_s,
            "pixelsPerS": source.axis.width / source.duration_s,
            "frameRateHz": FRAME_RATE_HZ,
            "videos": list(videos.values()),
            "texts": [
                [_script_texts(row.recorded), _script_texts(row.predicted or [])] for row in texts
            ],
        },
    )
    path = out / PAGE_NAME
    path.write_text(html, encoding="utf-8", errors="backslashreplace")
    return path


def _script_texts(marks: Sequence[TextMark]) -> list[tuple[float, float, str]]:
    return [(mark.text.start_s, mark.text.stop_s, mark.text.label) for mark in marks]


def _loss_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per head: its loss or why it has none, and the baselines."""
    names = {head: f"loss_{head}" for head in HEAD_STREAM}
    return [
        {
            "name": name,
            "loss": metrics["losses"][name],
            "reason": metrics["reasons"].get(name, ""),
            "baselines": [row for row in metrics["comparison"] if row["head"] == head],
        }
        for head, name in names.items()
        if name in metrics["losses"]
    ]


def _draw_videos(source: PageSource) -> dict[str, list[str | None]]:
    """Return the frames of each recorded video as data URIs; None if there is no frame."""
    recipe = source.trained.recipe
    vision = recipe.vision.model_copy(
        update={
            "rate_hz": FRAME_RATE_HZ,
            "size": FRAME_SIZE,
            "max_error_s": recipe.vision.tolerance_s,
        }
    )
    reader = SessionReader(
        source.reader.path,
        source.reader.scan,
        recipe=recipe.model_copy(update={"vision": vision}),
    )
    page = [Window(0, 0.0, source.duration_s)]
    videos: dict[str, list[str | None]] = {}
    for stream in filter(source.is_recorded, VISION_STREAMS):
        videos[stream] = [
            jpeg_uri(picture) if is_valid else None
            for _, frames in reader.iter_frames(stream, page)
            for picture, is_valid in zip(frames.pictures, np.isfinite(frames.error_s), strict=True)
        ]
    return videos


def _draw_sounds(source: PageSource) -> list[dict[str, str]]:
    """Draw the recorded and the predicted sound: title, spectrogram, sound."""
    recipe, shapes = source.trained.recipe, source.trained.shapes
    num_frames = round(source.duration_s * recipe.mel.rate_hz)
    num_samples = round(source.duration_s * recipe.audio.rate_hz)
    sounds = []
    if source.is_recorded(Stream.AUDIO):
        levels = np.concatenate([source.reader.read_mel(w).levels for w in source.windows])
        samples = np.concatenate([source.reader.read_audio(w) for w in source.windows])
        sounds.append(("recorded", levels, samples))
    if source.is_predicted(Head.AUDIO):
        levels = source.read_predicted(DMEL_NAME, "dmel", count=num_frames)
        samples, _ = soundfile.read(source.out / AUDIO_NAME, frames=num_samples, dtype="int16")
        sounds.append(("predicted", levels, samples))
    return [
        {
            "title": title,
            "picture": png_uri(draw_spectrogram(levels[:num_frames], num_levels=shapes.mel_levels)),
            "sound": wav_uri(samples[:num_samples], rate_hz=recipe.audio.rate_hz),
        }
        for title, levels, samples in sounds
    ]


def _draw_texts(source: PageSource) -> list[TextRow]:
    """Draw the text streams that were recorded or predicted."""
    is_dense = source.trained.config.is_text_only
    rows = []
    for stream, head in zip(TEXT_STREAMS, TEXT_HEADS, strict=True):
        recorded = _recorded_events(source, stream) if source.is_recorded(stream) else []
        predicted = None
        if source.is_predicted(head):
            lines = (source.out / f"{head}.jsonl").read_text(encoding="utf-8").splitlines()
            events = [json.loads(line) for line in lines]
            predicted = [e for e in events if e["timestamp"] < source.duration_s]
        if not source.is_recorded(stream) and predicted is None:
            continue
        ticks = []
        if predicted is not None and not is_dense and source.is_recorded(stream):
            ticks = _compare_ticks(recorded, predicted, source=source)
        kinds = [kind for _, kind in ticks]
        counts = [(kinds.count(k), k) for k in ("right", "wrong", "missed", "invented")]
        rows.append(
            TextRow(
                title=stream.replace("_", " "),
                recorded=_mark_events(recorded, source),
                predicted=None if predicted is None else _mark_events(predicted, source),
                ticks=ticks,
                summary=", ".join(f"{count} {kind}" for count, kind in counts if count),
            )
        )
    return rows


def _mark_events(events: Sequence[Mapping[str, Any]], source: PageSource) -> list[TextMark]:
    """Place events on the page; a token takes one tick, or no time in dense text."""
    tick_s = 1 / source.trained.shapes.tick_rate_hz
    token_s = 0.0 if source.trained.config.is_text_only else tick_s
    texts = []
    for event in events:
        start_s, label = event["timestamp"], event["text"].strip() or "·"
        stop_s = start_s + len(event["tokens"]) * token_s
        title = f"{start_s:.2f} s: {label}"
        texts.append(TimedText(start_s=start_s, stop_s=stop_s, label=label, title=title))
    return arrange_texts(texts, source.axis)


def _recorded_events(source: PageSource, stream: Stream) -> list[dict[str, Any]]:
    """Return events as the model reads them: on ticks, or at their own times in dense text."""
    shapes, tokenizer = source.trained.shapes, source.trained.tokenizer
    events: list[dict[str, Any]] = []
    for window in source.windows:
        text = source.reader.read_text(window)
        if source.trained.config.is_text_only:
            events += [
                {"timestamp": e.time_s, "text": e.text, "tokens": tokenizer.encode(e.text)}
                for e in text.events
                if e.stream is stream
            ]
            continue
        ticks = tokens_on_ticks(
            text.internal if stream is Stream.INTERNAL_TEXT else text.external,
            start_s=window.start_s,
            num_ticks=shapes.num_ticks,
            tick_rate_hz=shapes.tick_rate_hz,
        )
        times_s = window.start_s + np.arange(len(ticks)) / shapes.tick_rate_hz
        events += group_events(ticks.tolist(), times_s.tolist(), tokenizer)
    return events


def _compare_ticks(
    recorded: Sequence[Mapping[str, Any]],
    predicted: Sequence[Mapping[str, Any]],
    *,
    source: PageSource,
) -> list[tuple[float, str]]:
    """Compare tokens tick by tick (see :attr:`TextRow.ticks`); the first is never predicted."""
    rate_hz = source.trained.shapes.tick_rate_hz
    num_ticks = round(source.duration_s * rate_hz)
    both = np.full((2, num_ticks), PAD_TOKEN, dtype=np.int64)
    for row, events in zip(both, (recorded, predicted), strict=True):
        for event in events:
            first = round(event["timestamp"] * rate_hz)
            tokens = event["tokens"][: num_ticks - first]
            row[first : first + len(tokens)] = tokens
    ticks = []
    for tick, (expected, token) in enumerate(both.T[1:].tolist(), start=1):
        if expected == token == PAD_TOKEN:
            continue
        kind = "missed" if token == PAD_TOKEN else "invented" if expected == PAD_TOKEN else "wrong"
        kind = "right" if expected == token else kind
        ticks.append((round(source.axis.x(tick / rate_hz), 1), kind))
    return ticks


def _draw_curves(source: PageSource) -> list[CurveRow]:
    """Draw angles, then velocities, recorded and predicted."""
    shapes, rate_hz = source.trained.shapes, source.trained.recipe.sensors.rate_hz
    count = round(source.duration_s * rate_hz)
    poses = np.full((2, count, shapes.proprio_size), np.nan)
    if source.is_recorded(Stream.PROPRIO):
        recorded = [source.reader.read_sensors(w).proprio for w in source.windows]
        poses[0] = np.concatenate(recorded)[:count]
    if source.is_predicted(Head.ANIMATION):
        predicted = source.read_predicted(ANIMATION_NAME, "proprio", count=count)
        poses[1, : len(predicted)] = predicted
    if np.isnan(poses).all():
        return []
    num_joints = shapes.proprio_size // 2
    return [
        _draw_pair(
            poses[:, :, i],
            rate_hz=rate_hz,
            joint=i % num_joints,
            is_angle=i < num_joints,
            axis=source.axis,
        )
        for i in range(shapes.proprio_size)
    ]


def _draw_pair(
    pair: NDArray[np.float64], *, rate_hz: float, joint: int, is_angle: bool, axis: TimeAxis
) -> CurveRow:
    """Draw the recorded and the predicted curve of one value [2, N]."""
    finite = pair[np.isfinite(pair)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    margin = max(0.05 * (high - low), (MIN_CURVE_RANGE - (high - low)) / 2)
    values = ValueAxis(float(low - margin), float(high + margin), CURVE_HEIGHT)
    max_jump = np.pi if is_angle else math.inf
    recorded, predicted = (
        curve_path(
            sampled_curves(curve, rate_hz=rate_hz, axis=axis, max_jump=max_jump),
            axis=axis,
            values=values,
        )
        for curve in pair
    )
    errors = pair[1] - pair[0]
    errors = (wrap_angle(errors) if is_angle else errors)[np.isfinite(errors)]
    unit = "rad" if is_angle else "rad/s"
    return CurveRow(
        title=f"joint {joint}" if is_angle else f"joint {joint} velocity",
        recorded=recorded,
        predicted=predicted,
        low=values.low,
        high=values.high,
        error=f"{np.sqrt(np.mean(errors**2)):.3f} {unit}" if len(errors) else "",
    )
