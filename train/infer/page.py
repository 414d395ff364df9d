"""Write predictions as one HTML page: recorded compared with predicted, on one clock.

The file contains its styles, script, pictures and sound; it needs no network. It shows the
session's first minute (:data:`PAGE_S`), about 10 MB for two videos and sound, however long the
session is; its losses are those of the whole session. Every video, sound and text that was recorded
or predicted is shown, and every sensor that the model predicts.

What is recorded comes from the session's files, by the model's recipe. What is predicted comes
from the files of :class:`train.infer.predictions.PredictionWriter`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import zarr

from shared.clock import Segment, plan_segments
from shared.kinds.text import token_ticks
from shared.media.tokenizer import group_events
from shared.page import (
    MAX_JUMPS,
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
from shared.recipe import PAD_TOKEN
from shared.session.reader import SessionReader
from shared.streams import ValueType
from shared.values import wrap_angle

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.page import TextMark
    from shared.streams import ValueGroup, VideoStream
    from train.trained_model import TrainedModel

PAGE_NAME = "index.html"

PAGE_S = 60.0
"""Length of the session's start that is shown; a browser cannot hold much more."""

FRAME_RATE_HZ = 10.0
"""Frames shown per second and video."""

FRAME_SIZE = 160
"""Height of a frame; of a very wide one, half its width."""

MIN_PIXELS_PER_S = 60.0

MIN_TIMELINE_WIDTH = 1150.0
"""A short session fills the page's width; a longer one is scrolled."""

CURVE_HEIGHT = 46.0

MAX_CURVES = 24
"""Curves shown of a value group."""

MIN_CURVE_RANGE = 0.1
"""Least range of a curve, as a share of its group's; a value that hardly moves is not magnified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSource:
    """A recorded session and its predictions, up to the end of the page."""

    out: Path
    reader: SessionReader
    trained: TrainedModel
    duration_s: float

    @property
    def axis(self) -> TimeAxis:
        """The page's time axis."""
        width = max(MIN_TIMELINE_WIDTH, MIN_PIXELS_PER_S * self.duration_s)
        return TimeAxis(0.0, self.duration_s, width=math.ceil(width))

    @property
    def segments(self) -> list[Segment]:
        """Segments that cover the page."""
        return plan_segments(self.duration_s, self.trained.recipe.segment_s)

    @property
    def heads(self) -> dict[str, str]:
        """Stream -> the head that predicts it; untrained heads are left out."""
        targets = self.trained.shapes.targets
        return {targets[head]: head for head in self.trained.heads}

    def is_recorded(self, stream: str) -> bool:
        """Return whether a stream was recorded."""
        return stream in self.reader.scan.intervals

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


def write_page(
    out: Path, reader: SessionReader, metrics: Mapping[str, Any], *, trained: TrainedModel
) -> Path:
    """Write ``index.html`` into the folder of the predictions."""
    tick_s = 1 / trained.shapes.tick_rate_hz
    duration_s = math.ceil(reader.scan.duration_s / tick_s - 1e-6) * tick_s
    source = PageSource(out=out, reader=reader, trained=trained, duration_s=min(duration_s, PAGE_S))
    environment = page_environment("train.infer")
    environment.globals["count_lanes"] = count_lanes
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    videos = {name: _draw_video(source, name) for name in _recorded_videos(source)}
    texts = _draw_texts(source)
    html = environment.get_template("page.html.j2").render(
        script=script,
        script_hash=f"sha256-{digest}",
        metrics=metrics,
        duration_s=reader.scan.duration_s,
        axis=source.axis,
        tick_width=round(source.axis.width / source.duration_s * tick_s - 1, 1),
        curve_height=CURVE_HEIGHT,
        videos={name: _frame_size(trained.recipe.videos[name]) for name in videos},
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
    return [
        {
            "name": name,
            "loss": loss,
            "reason": metrics["reasons"].get(name, ""),
            "baselines": [row for row in metrics["comparison"] if f"loss_{row['head']}" == name],
        }
        for name, loss in metrics["losses"].items()
        if name != "loss_total"
    ]


def _recorded_videos(source: PageSource) -> list[str]:
    return [name for name in source.trained.recipe.videos if source.is_recorded(name)]


def _frame_size(spec: VideoStream) -> tuple[int, int]:
    """Return height and width of a video's frames on the page."""
    scale = min(FRAME_SIZE / spec.height, 2 * FRAME_SIZE / spec.width)
    return max(2, round(spec.height * scale)), max(2, round(spec.width * scale))


def _draw_video(source: PageSource, name: str) -> list[str | None]:
    """Return the frames of a recorded video as data URIs; None where there is no frame."""
    recipe = source.trained.recipe
    spec = recipe.videos[name]
    small = spec.model_copy(
        update={
            "rate_hz": FRAME_RATE_HZ,
            "size": _frame_size(spec),
            "max_error_s": spec.tolerance_s,
        }
    )
    reader = SessionReader(
        source.reader.path,
        source.reader.scan,
        recipe=recipe.model_copy(update={"streams": {**recipe.streams, name: small}}),
    )
    return [
        jpeg_uri(picture) if is_valid else None
        for _, frames in reader.iter_frames(name, [Segment(0, source.duration_s)])
        for picture, is_valid in zip(frames.pictures, np.isfinite(frames.error_s), strict=True)
    ]


def _draw_sounds(source: PageSource) -> list[dict[str, str]]:
    """Draw each recorded and each predicted sound: stream, which, spectrogram, sound."""
    sounds = []
    for name, spec in source.trained.recipe.audios.items():
        num_frames = round(source.duration_s * spec.dmel.rate_hz)
        num_samples = round(source.duration_s * spec.rate_hz)
        versions = {}
        if source.is_recorded(name):
            parts = [
                (source.reader.read_dmel(name, s), source.reader.read_audio(name, s))
                for s in source.segments
            ]
            levels, samples = map(np.concatenate, zip(*parts, strict=True))
            versions["recorded"] = (levels, samples)
        if (head := source.heads.get(name)) is not None:
            levels = source.read_predicted(f"{head}.dmel.zarr", "dmel", count=num_frames)
            path = source.out / f"{head}.wav"
            samples, _ = soundfile.read(os.fsencode(path), frames=num_samples, dtype="int16")
            versions["predicted"] = (levels, samples)
        sounds += [
            {
                "stream": name.replace("_", " "),
                "which": which,
                "picture": png_uri(
                    draw_spectrogram(levels[:num_frames], num_levels=spec.dmel.levels)
                ),
                "sound": wav_uri(samples[:num_samples], rate_hz=spec.rate_hz),
            }
            for which, (levels, samples) in versions.items()
        ]
    return sounds


def _draw_texts(source: PageSource) -> list[TextRow]:
    """Draw the text streams that were recorded or predicted."""
    is_dense = source.trained.shapes.is_text_only
    rows = []
    for stream in source.trained.recipe.texts:
        recorded = _recorded_events(source, stream) if source.is_recorded(stream) else []
        predicted = None
        if (head := source.heads.get(stream)) is not None:
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
    token_s = 0.0 if source.trained.shapes.is_text_only else tick_s
    texts = []
    for event in events:
        start_s, label = event["timestamp"], event["text"].strip() or "·"
        stop_s = start_s + len(event["tokens"]) * token_s
        title = f"{start_s:.2f} s: {label}"
        texts.append(TimedText(start_s=start_s, stop_s=stop_s, label=label, title=title))
    return arrange_texts(texts, source.axis)


def _recorded_events(source: PageSource, stream: str) -> list[dict[str, Any]]:
    """Return events as the model reads them: on ticks, or at their own times in dense text."""
    shapes, tokenizer = source.trained.shapes, source.trained.tokenizer
    texts = [source.reader.read_text(stream, segment) for segment in source.segments]
    if shapes.is_text_only:
        return [
            {"timestamp": e.time_s, "text": e.text, "tokens": tokenizer.encode(e.text)}
            for text in texts
            for e in text.events
        ]
    tokens = np.full(round(source.duration_s * shapes.tick_rate_hz), PAD_TOKEN, dtype=np.int64)
    times_s = [time_s for text in texts for time_s in text.time_s]
    ticks = token_ticks(times_s, tick_rate_hz=shapes.tick_rate_hz)
    ids = np.array([token for text in texts for token in text.ids], dtype=np.int64)
    is_shown = ticks < len(tokens)
    tokens[ticks[is_shown]] = ids[is_shown]
    tick_times_s = np.arange(len(tokens)) / shapes.tick_rate_hz
    return group_events(tokens.tolist(), tick_times_s.tolist(), tokenizer)


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


def _draw_curves(source: PageSource) -> list[dict[str, Any]]:
    """Draw the value groups of each predicted sensor, recorded and predicted."""
    groups = []
    for name, spec in source.trained.recipe.sensors.items():
        if (head := source.heads.get(name)) is None:
            continue
        count = math.ceil(source.duration_s * spec.rate_hz - 1e-6)
        pair = np.full((2, count, spec.size), np.nan)
        if source.is_recorded(name):
            parts = [source.reader.read_sensor(name, segment) for segment in source.segments]
            pair[0] = np.concatenate(parts)[:count]
        predicted = source.read_predicted(f"{head}.zarr", name, count=count)
        pair[1, : len(predicted)] = predicted
        for group, columns in zip(spec.values, spec.slices, strict=True):
            notes = [str(group.type), group.unit_label]
            if group.count > MAX_CURVES:
                notes.append(f"{MAX_CURVES} of {group.count} shown")
            rows = _draw_group(pair[:, :, columns], group, rate_hz=spec.rate_hz, axis=source.axis)
            note = ", ".join(filter(None, notes))
            groups.append({"title": name.replace("_", " "), "note": note, "rows": rows})
    return groups


def _draw_group(
    pair: NDArray[np.float64], group: ValueGroup, *, rate_hz: float, axis: TimeAxis
) -> list[dict[str, Any]]:
    """Draw the recorded and the predicted curves of a group's values [2, N, count].

    "error" is the root mean square with its unit.
    """
    if group.type is ValueType.QUATERNION:  # q and -q are one rotation
        vectors = pair.reshape(*pair.shape[:2], -1, group.vector_size)
        is_opposite = vectors.prod(axis=0).sum(axis=-1, keepdims=True) < 0
        nearer = np.where(is_opposite, -vectors[1], vectors[1])
        pair = np.stack([vectors[0], nearer]).reshape(pair.shape)
    finite = np.isfinite(pair)
    lows, highs = (
        extreme(np.where(finite, pair, other), axis=(0, 1))
        for extreme, other in ((np.min, np.inf), (np.max, -np.inf))
    )
    is_drawn = np.atleast_1d(finite.any(axis=(0, 1)))
    largest = float(np.max((highs - lows)[is_drawn], initial=0.0)) or 1.0
    rows = []
    for i, label in enumerate(group.labels[:MAX_CURVES]):
        low, high = (float(lows[i]), float(highs[i])) if is_drawn[i] else (0.0, 0.0)
        margin = max(0.05 * (high - low), (MIN_CURVE_RANGE * largest - (high - low)) / 2)
        values = ValueAxis(low - margin, high + margin, CURVE_HEIGHT)
        max_jump = MAX_JUMPS.get(group.type, math.inf)
        recorded, predicted = (
            curve_path(
                sampled_curves(curve, rate_hz=rate_hz, axis=axis, max_jump=max_jump),
                axis=axis,
                values=values,
            )
            for curve in pair[:, :, i]
        )
        errors = pair[1, :, i] - pair[0, :, i]
        errors = wrap_angle(errors) if group.type is ValueType.ANGLE else errors
        errors = errors[np.isfinite(errors)]
        rms = np.sqrt(np.mean(errors**2)) if len(errors) else np.nan
        rows.append(
            {
                "title": label.replace("_", " "),
                "recorded": recorded,
                "predicted": predicted,
                "low": values.low,
                "high": values.high,
                "error": f"{rms:.3g} {group.unit_label}".strip() if len(errors) else "",
            }
        )
    return rows
