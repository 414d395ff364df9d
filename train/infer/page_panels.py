"""Panels of the predictions' page: what was recorded and what was predicted of each modality.

Recorded is what the session's files hold, by the creature's recipe; predicted is what
:class:`train.infer.predictions.PredictionWriter` wrote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import zarr

from shared.clock import Window, plan_windows, wrap_angle
from shared.recipe import PAD_TOKEN, TEXT_STREAMS, VISION_STREAMS, Stream
from shared.session.reader import SessionReader
from train.config import Head
from train.data.batch import tokens_on_ticks
from train.figures import draw_curve, draw_levels, jpeg_uri, place_texts, png_uri, wav_uri
from train.infer.predictions import ANIMATION_NAME, AUDIO_NAME, DMEL_NAME
from train.model.outputs import TEXT_HEADS, group_events

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from train.figures import Mark
    from train.trained_model import TrainedModel

FRAME_RATE_HZ = 10.0
"""Frames shown per second and eye."""

FRAME_SIZE = 160
"""Height and width of a frame."""

MIN_PIXELS_PER_S = 60.0

TIMELINE_WIDTH = 1150.0
"""A short session fills it, a longer one is scrolled through."""

CURVE_HEIGHT = 46.0

MIN_CURVE_RANGE = 0.2
"""rad or rad/s; a joint that hardly moves is not blown up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """One text stream."""

    title: str
    recorded: list[Mark]
    predicted: list[Mark] | None
    """None where the model has no such head."""
    ticks: list[tuple[float, str]]
    """x of each tick in which one of the two says something, and right, wrong, missed or
    invented."""
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
    """Root of the mean square, with its unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What of a session a page shows, and on which scale."""

    out: Path
    fields: SessionReader
    creature: TrainedModel
    duration_s: float

    @property
    def pixels_per_s(self) -> float:
        """Scale of the timeline."""
        return max(MIN_PIXELS_PER_S, TIMELINE_WIDTH / self.duration_s)

    @property
    def windows(self) -> list[Window]:
        """Windows that touch and cover it."""
        step_s = self.creature.recipe.window.duration_s
        return plan_windows(self.duration_s, duration_s=step_s, step_s=step_s)

    def has(self, stream: Stream) -> bool:
        """Whether it was recorded."""
        return stream in self.fields.scan.intervals


def draw_eyes(shown: Shown) -> dict[str, list[str | None]]:
    """Frames of each eye that was recorded, as data URIs; None where there is no picture."""
    recipe = shown.creature.recipe
    vision = recipe.vision.model_copy(
        update={
            "rate_hz": FRAME_RATE_HZ,
            "size": FRAME_SIZE,
            "max_error_s": recipe.vision.tolerance_s,
        }
    )
    fields = SessionReader(
        shown.fields.path,
        shown.fields.scan,
        recipe=recipe.model_copy(update={"vision": vision}),
    )
    eyes: dict[str, list[str | None]] = {}
    for eye in VISION_STREAMS:
        if shown.has(eye):
            eyes[eye] = []
            for _, frames in fields.iter_frames(eye, [Window(0, 0.0, shown.duration_s)]):
                eyes[eye] = [
                    jpeg_uri(picture) if is_there else None
                    for picture, is_there in zip(
                        frames.pictures, np.isfinite(frames.error_s), strict=True
                    )
                ]
    return eyes


def draw_sounds(shown: Shown) -> list[dict[str, str]]:
    """The recorded and the predicted sound: title, picture of the levels, sound."""
    recipe, shapes = shown.creature.recipe, shown.creature.shapes
    num_frames = round(shown.duration_s * recipe.mel.rate_hz)
    num_samples = round(shown.duration_s * recipe.audio.rate_hz)
    found = []
    if shown.has(Stream.AUDIO):
        levels = np.concatenate([shown.fields.read_mel(w).levels for w in shown.windows])
        samples = np.concatenate([shown.fields.read_audio(w) for w in shown.windows])
        found.append(("recorded", levels, samples))
    if Head.AUDIO in shown.creature.config.heads:
        levels = _read_array(shown.out / DMEL_NAME, "dmel", num_frames)
        samples, _ = soundfile.read(shown.out / AUDIO_NAME, frames=num_samples, dtype="int16")
        found.append(("predicted", levels, samples))
    return [
        {
            "title": title,
            "picture": png_uri(draw_levels(levels[:num_frames], num_levels=shapes.mel_levels)),
            "sound": wav_uri(samples[:num_samples], rate_hz=recipe.audio.rate_hz),
        }
        for title, levels, samples in found
    ]


def draw_texts(shown: Shown) -> list[TextRow]:
    """Text streams that were recorded or predicted."""
    tick_rate_hz = shown.creature.shapes.tick_rate_hz
    is_dense = shown.creature.config.is_text_only
    scale = {
        "pixels_per_s": shown.pixels_per_s,
        "tick_s": 0.0 if is_dense else 1 / tick_rate_hz,
    }
    rows = []
    for stream, head in zip(TEXT_STREAMS, TEXT_HEADS, strict=True):
        recorded = _recorded_events(shown, stream) if shown.has(stream) else []
        predicted = None
        if head in shown.creature.config.heads:
            lines = (shown.out / f"{head}.jsonl").read_text(encoding="utf-8").splitlines()
            events = [json.loads(line) for line in lines]
            predicted = [e for e in events if e["timestamp"] < shown.duration_s]
        if not shown.has(stream) and predicted is None:
            continue
        ticks = []
        if predicted is not None and not is_dense and shown.has(stream):
            ticks = _compare_ticks(recorded, predicted, shown=shown)
        rows.append(
            TextRow(
                title=stream.replace("_", " "),
                recorded=place_texts(recorded, **scale),
                predicted=None if predicted is None else place_texts(predicted, **scale),
                ticks=ticks,
                summary=_summarize(ticks),
            )
        )
    return rows


def _recorded_events(shown: Shown, stream: Stream) -> list[dict[str, Any]]:
    """Events as the model meets them, laid on ticks; of dense text when they were said."""
    shapes, tokenizer = shown.creature.shapes, shown.creature.tokenizer
    events: list[dict[str, Any]] = []
    for window in shown.windows:
        text = shown.fields.read_text(window)
        if shown.creature.config.is_text_only:
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
    recorded: Sequence[Mapping[str, Any]], predicted: Sequence[Mapping[str, Any]], *, shown: Shown
) -> list[tuple[float, str]]:
    """See :attr:`TextRow.ticks`; the session's first tick is never predicted."""
    rate_hz = shown.creature.shapes.tick_rate_hz
    num_ticks = round(shown.duration_s * rate_hz)
    both = np.full((2, num_ticks), PAD_TOKEN, dtype=np.int64)
    for row, events in zip(both, (recorded, predicted), strict=True):
        for event in events:
            first = round(event["timestamp"] * rate_hz)
            tokens = event["tokens"][: num_ticks - first]
            row[first : first + len(tokens)] = tokens
    kinds = []
    for tick, (wanted, said) in enumerate(both.T[1:].tolist(), start=1):
        if wanted == said == PAD_TOKEN:
            continue
        kind = "missed" if said == PAD_TOKEN else "invented" if wanted == PAD_TOKEN else "wrong"
        kind = "right" if wanted == said else kind
        kinds.append((round(tick / rate_hz * shown.pixels_per_s, 1), kind))
    return kinds


def _summarize(ticks: Sequence[tuple[float, str]]) -> str:
    if not ticks:
        return ""
    kinds = [kind for _, kind in ticks]
    found = [f"{kinds.count(k)} {k}" for k in ("right", "wrong", "missed", "invented")]
    return ", ".join(part for part in found if not part.startswith("0 "))


def draw_curves(shown: Shown) -> list[CurveRow]:
    """Angles, then velocities, recorded and predicted."""
    shapes, rate_hz = shown.creature.shapes, shown.creature.recipe.sensors.rate_hz
    count = round(shown.duration_s * rate_hz)
    times_s = np.arange(count) / rate_hz
    recorded = np.full((count, shapes.proprio_size), np.nan)
    predicted = recorded.copy()
    if shown.has(Stream.PROPRIO):
        parts = [shown.fields.read_sensors(w).proprio for w in shown.windows]
        recorded = np.concatenate(parts)[:count].astype(np.float64)
    if Head.ANIMATION in shown.creature.config.heads:
        poses = _read_array(shown.out / ANIMATION_NAME, "proprio", count)
        predicted[: len(poses)] = poses
    if np.isnan(recorded).all() and np.isnan(predicted).all():
        return []
    num_joints = shapes.proprio_size // 2
    rows = []
    for i in range(shapes.proprio_size):
        is_angle = i < num_joints
        pair = np.stack([recorded[:, i], predicted[:, i]])
        rows.append(_draw_pair(pair, times_s, joint=i % num_joints, is_angle=is_angle, shown=shown))
    return rows


def _draw_pair(
    pair: NDArray[np.float64],
    times_s: NDArray[np.float64],
    *,
    joint: int,
    is_angle: bool,
    shown: Shown,
) -> CurveRow:
    """One value's curves [2, N], recorded and predicted."""
    finite = pair[np.isfinite(pair)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    margin = max(0.05 * (high - low), (MIN_CURVE_RANGE - (high - low)) / 2)
    low, high = low - margin, high + margin
    recorded, predicted = (
        draw_curve(
            times_s,
            values,
            pixels_per_s=shown.pixels_per_s,
            low=low,
            high=high,
            height=CURVE_HEIGHT,
        )
        for values in pair
    )
    errors = pair[1] - pair[0]
    errors = (wrap_angle(errors) if is_angle else errors)[np.isfinite(errors)]
    unit = "rad" if is_angle else "rad/s"
    return CurveRow(
        title=f"joint {joint}" if is_angle else f"joint {joint} velocity",
        recorded=recorded,
        predicted=predicted,
        low=low,
        high=high,
        error=f"{np.sqrt(np.mean(errors**2)):.3f} {unit}" if len(errors) else "",
    )


def _read_array(path: Path, name: str, count: int) -> NDArray[Any]:
    """The first rows of an array that was predicted."""
    array = zarr.open_group(path, mode="r")[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[:count])
