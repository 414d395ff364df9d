"""The report's timeline: for each stream where it was recorded, where it has gaps, and what the
recipe masks.

Gaps are those that validation speaks of, with its limits; masked is what a sample would not hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.axes import say_time
from preprocess.validate.line_checks import GAP_ERROR_S, GAP_WARNING_S, VIDEO_GAP_STEPS
from shared.clock import EPSILON_S
from shared.recipe import STREAMS, Stream
from shared.session.folder import AUDIO_FILE, METADATA_FILE, VISION_FILES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from preprocess.validate.axes import TimeAxis
    from preprocess.validate.probe import Picture, SessionProbe
    from shared.clock import Interval

_MIN_WIDTH = 2.0
"""A shorter stretch is drawn so wide, so that it can be seen."""

_MANY = 100
"""Of so many stretches none is widened beyond one unit: they would look like all of the session."""

_TEXT_STREAMS = (Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT)
_WORDS = {
    "gap-warning": "gap",
    "gap-error": "gap",
    "damaged": "damaged",
    "masked": "masked",
    "recorded": "recorded",
}


@dataclass(frozen=True, slots=True)
class Stretches:
    """Stretches of one kind, float64 [N] seconds each, increasing."""

    kind: str
    """recorded, gap-warning, gap-error, damaged or masked."""
    starts_s: NDArray[np.float64]
    stops_s: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Band:
    """A stretch of the time axis as it is drawn."""

    x: float
    width: float
    kind: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One stream of the timeline."""

    name: str
    bands: list[Band] = field(default_factory=list)
    state: str = "recorded"
    """recorded, absent, missing (a required stream) or broken (its file can't be read)."""
    absent: str = ""
    """Why it is missing."""
    note: str = ""
    """Where it begins and ends."""
    flaws: str = ""
    """How many gaps there are, and the longest."""
    share: float = 0.0
    """Part of the session that is not masked, 0..1."""


def timeline_rows(evidence: SessionProbe, axis: TimeAxis) -> list[Row]:
    """A row for each stream, and one for the metadata lines where there are any."""
    rows = [
        _row(stream, evidence, axis) if stream in evidence.intervals else _absent(stream, evidence)
        for stream in STREAMS
    ]
    if evidence.lines is not None:
        gaps = find_gaps(evidence.metadata.times_s - evidence.offset_s)
        rows.append(_drawn("metadata lines", evidence.lines, gaps, axis, evidence.length_s))
    return rows


def find_gaps(times_s: NDArray[np.float64]) -> list[Stretches]:
    """Gaps between lines or readings: to 100 ms warnings, beyond errors."""
    steps_s = np.diff(times_s)
    is_long = steps_s > GAP_ERROR_S + EPSILON_S
    is_short = (steps_s >= GAP_WARNING_S) & ~is_long
    return [_between("gap-warning", times_s, is_short), _between("gap-error", times_s, is_long)]


def draw_bands(stretches: Stretches, axis: TimeAxis) -> list[Band]:
    """Stretches as bands, joined where they can't be told apart: no more than pixels."""
    bands: list[Band] = []
    starts_s, stops_s = stretches.starts_s, stretches.stops_s
    if len(starts_s) == 0:
        return bands
    xs = np.array([axis.x(t) for t in starts_s])
    stop_xs = np.maximum.accumulate([axis.x(t) for t in stops_s])
    heads = np.flatnonzero(np.append(True, xs[1:] - stop_xs[:-1] >= 1))
    tails = np.append(heads[1:], len(xs)) - 1
    for head, tail in zip(heads.tolist(), tails.tolist(), strict=True):
        width = float(stop_xs[tail] - xs[head])
        middle = xs[head] + width / 2
        width = max(_MIN_WIDTH if len(heads) < _MANY else 1.0, width)
        note = f"{say_time(starts_s[head], step_s=1e-3)} to {say_time(stops_s[tail], step_s=1e-3)}"
        longest_s = float((stops_s - starts_s)[head : tail + 1].max())
        word = _WORDS[stretches.kind]
        what = f"{word}, {longest_s:.3f} s"
        if tail > head:
            what = f"{tail - head + 1} x {word}, the longest {longest_s:.3f} s"
        bands.append(
            Band(round(middle - width / 2, 2), round(width, 2), stretches.kind, f"{what}: {note}")
        )
    return bands


def _absent(stream: Stream, evidence: SessionProbe) -> Row:
    """A stream that is missing."""
    file = VISION_FILES.get(stream) or (AUDIO_FILE if stream is Stream.AUDIO else METADATA_FILE)
    is_broken = file in evidence.unreadable and stream not in _TEXT_STREAMS
    is_missing = stream in evidence.recipe.required
    state = "broken" if is_broken else "missing" if is_missing else "absent"
    words = {"broken": "broken", "missing": "required, but missing", "absent": "absent"}[state]
    why = evidence.absent.get(stream, "not recorded")
    return Row(name=stream.value, state=state, absent=f"{words}: {why}")


def _row(stream: Stream, evidence: SessionProbe, axis: TimeAxis) -> Row:
    """A stream that is there."""
    interval = evidence.intervals[stream]
    if stream in evidence.pictures:
        picture = evidence.pictures[stream]
        tolerance_s = evidence.recipe.vision.tolerance_s
        starts_s = picture.track.times_s - tolerance_s
        stops_s = picture.track.times_s + tolerance_s
        flaws = [_video_gaps(picture), _damaged(picture)]
    elif stream in (Stream.TOUCH, Stream.PROPRIO):
        rows = evidence.metadata.rows_with(stream)
        times_s = evidence.metadata.times_s[rows] - evidence.offset_s
        is_masked = np.diff(times_s) > evidence.recipe.sensors.max_gap_s + EPSILON_S
        starts_s = times_s[np.append(True, is_masked)]
        stops_s = np.append(times_s[:-1][is_masked], interval.stop_s)
        flaws = find_gaps(times_s)
    else:
        starts_s, stops_s = np.array([interval.start_s]), np.array([interval.stop_s])
        flaws = []
    masked = _complement(starts_s, stops_s, evidence.length_s)
    return _drawn(stream.value, interval, [*flaws, masked], axis, evidence.length_s)


def _drawn(
    name: str, interval: Interval, flaws: list[Stretches], axis: TimeAxis, length_s: float
) -> Row:
    """A row of a recorded stretch with its flaws on top."""
    recorded = Stretches("recorded", np.array([interval.start_s]), np.array([interval.stop_s]))
    masked_s = sum(float((f.stops_s - f.starts_s).sum()) for f in flaws if f.kind == "masked")
    return Row(
        name=name,
        bands=[band for stretches in (recorded, *flaws) for band in draw_bands(stretches, axis)],
        note=f"{say_time(interval.start_s)} to {say_time(interval.stop_s)}",
        flaws=_say_flaws(flaws),
        share=max(0.0, 1 - masked_s / length_s) if length_s > 0 else 0.0,
    )


def _say_flaws(flaws: list[Stretches]) -> str:
    """Gaps and damage in a few words."""
    lengths_s = [f.stops_s - f.starts_s for f in flaws if f.kind.startswith("gap")]
    gaps_s = np.concatenate([np.zeros(0), *lengths_s])
    parts: list[str] = []
    if len(gaps_s):
        plural = "gap" if len(gaps_s) == 1 else "gaps, longest"
        parts.append(f"{len(gaps_s)} {plural} {gaps_s.max():.3f} s")
    num_damaged = sum(len(f.starts_s) for f in flaws if f.kind == "damaged")
    if num_damaged:
        parts.append(f"{num_damaged} {'stretch' if num_damaged == 1 else 'stretches'} damaged")
    return ", ".join(parts)


def _video_gaps(picture: Picture) -> Stretches:
    """Holes in a video; validation warns of them."""
    times_s = picture.track.times_s
    steps_s = np.diff(times_s)
    median_s = float(np.median(steps_s)) if len(steps_s) else 0.0
    least_s = max(GAP_ERROR_S + EPSILON_S, VIDEO_GAP_STEPS * median_s)
    return _between("gap-warning", times_s, steps_s > least_s)


def _damaged(picture: Picture) -> Stretches:
    """Runs of frames that don't decode."""
    frames = picture.undecoded
    stops_s = np.append(picture.track.times_s[1:], picture.track.stop_s)
    is_head = np.diff(frames, prepend=-2) > 1
    is_tail = np.diff(frames, append=len(stops_s) + 1) > 1
    return Stretches("damaged", picture.track.times_s[frames[is_head]], stops_s[frames[is_tail]])


def _between(kind: str, times_s: NDArray[np.float64], is_wide: NDArray[np.bool_]) -> Stretches:
    """The steps between neighbouring times [N] for which `is_wide` [N - 1]."""
    return Stretches(kind, times_s[:-1][is_wide], times_s[1:][is_wide])


def _complement(
    starts_s: NDArray[np.float64], stops_s: NDArray[np.float64], length_s: float
) -> Stretches:
    """What stretches [N], both ends increasing, leave of the session."""
    left_s = np.clip(np.append(0.0, stops_s), 0.0, length_s)
    right_s = np.clip(np.append(starts_s, length_s), 0.0, length_s)
    is_masked = right_s - left_s > EPSILON_S
    return Stretches("masked", left_s[is_masked], right_s[is_masked])
