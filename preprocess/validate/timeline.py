"""Draw the timeline of a session: for each stream what was recorded, its gaps, and what is masked.

Gaps follow the rules of :mod:`preprocess.validate.line_checks`. Masked is what samples would not
contain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.line_checks import find_line_gaps, find_video_gaps
from shared.clock import EPSILON_S, is_masked_gap
from shared.page import draw_bands, format_time
from shared.recipe import STREAMS, Stream
from shared.session.folder import AUDIO_FILE, METADATA_FILE, VISION_FILES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from preprocess.validate.probe import SessionProbe
    from shared.clock import Interval
    from shared.page import Band, TimeAxis

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

    @property
    def durations_s(self) -> NDArray[np.float64]:
        """Duration of each stretch."""
        return self.stops_s - self.starts_s

    def bands(self, axis: TimeAxis) -> list[Band]:
        """Draw the stretches."""
        return draw_bands(
            self.starts_s, self.stops_s, kind=self.kind, word=_WORDS[self.kind], axis=axis
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTimeline:
    """One stream of the timeline."""

    name: str
    bands: list[Band] = field(default_factory=list)
    state: str = "recorded"
    """recorded, absent, missing (a required stream) or broken (its file cannot be read)."""
    absent: str = ""
    """Why it is not recorded."""
    note: str = ""
    """When it starts and ends."""
    flaws: str = ""
    """The number of gaps, and the longest."""
    share: float = 0.0
    """Part of the session that is not masked, 0 to 1."""


def draw_timelines(probe: SessionProbe, axis: TimeAxis) -> list[StreamTimeline]:
    """Draw a timeline for each stream, and one for the metadata lines if there are any."""
    timelines = [
        _draw_stream(stream, probe, axis)
        if stream in probe.intervals
        else _absent_stream(stream, probe)
        for stream in STREAMS
    ]
    if probe.lines_interval is not None:
        gaps = line_gaps(probe.metadata.times_s - probe.offset_s)
        timelines.append(
            _draw_interval(
                probe.lines_interval,
                name="metadata lines",
                flaws=gaps,
                axis=axis,
                duration_s=probe.duration_s,
            )
        )
    return timelines


def line_gaps(times_s: NDArray[np.float64]) -> list[Stretches]:
    """Return the gaps between lines or readings: short ones, then long ones."""
    is_short, is_long = find_line_gaps(times_s)
    return [
        _select_intervals("gap-warning", times_s, is_short),
        _select_intervals("gap-error", times_s, is_long),
    ]


def _absent_stream(stream: Stream, probe: SessionProbe) -> StreamTimeline:
    """Return the timeline of a stream that was not recorded."""
    file = VISION_FILES.get(stream) or (AUDIO_FILE if stream is Stream.AUDIO else METADATA_FILE)
    is_broken = file in probe.unreadable and stream not in _TEXT_STREAMS
    is_missing = stream in probe.recipe.required
    state = "broken" if is_broken else "missing" if is_missing else "absent"
    words = {"broken": "broken", "missing": "required, but missing", "absent": "absent"}[state]
    reason = probe.absent.get(stream, "not recorded")
    return StreamTimeline(name=stream.value, state=state, absent=f"{words}: {reason}")


def _draw_stream(stream: Stream, probe: SessionProbe, axis: TimeAxis) -> StreamTimeline:
    """Draw a stream that was recorded."""
    interval = probe.intervals[stream]
    flaws: list[Stretches] = []
    # starts_s and stops_s are the stretches that are not masked.
    starts_s, stops_s = np.array([interval.start_s]), np.array([interval.stop_s])
    if stream in probe.videos:
        video = probe.videos[stream]
        times_s = video.track.times_s
        tolerance_s = probe.recipe.vision.tolerance_s
        starts_s, stops_s = times_s - tolerance_s, times_s + tolerance_s
        damaged = Stretches("damaged", *video.damaged_stretches()[:2])
        flaws = [_select_intervals("gap-warning", times_s, find_video_gaps(times_s)), damaged]
    elif stream in (Stream.TOUCH, Stream.PROPRIO):
        times_s = probe.reading_times_s(stream)
        is_masked = is_masked_gap(np.diff(times_s), max_gap_s=probe.recipe.sensors.max_gap_s)
        starts_s = times_s[np.append(True, is_masked)]
        stops_s = np.append(times_s[:-1][is_masked], interval.stop_s)
        flaws = line_gaps(times_s)
    flaws.append(_find_masked(starts_s, stops_s, probe.duration_s))
    return _draw_interval(
        interval, name=stream.value, flaws=flaws, axis=axis, duration_s=probe.duration_s
    )


def _draw_interval(
    interval: Interval, *, name: str, flaws: list[Stretches], axis: TimeAxis, duration_s: float
) -> StreamTimeline:
    """Draw a recorded interval with its flaws on top."""
    recorded = Stretches("recorded", np.array([interval.start_s]), np.array([interval.stop_s]))
    masked_s = sum(float(f.durations_s.sum()) for f in flaws if f.kind == "masked")
    return StreamTimeline(
        name=name,
        bands=[band for stretches in (recorded, *flaws) for band in stretches.bands(axis)],
        note=f"{format_time(interval.start_s)} to {format_time(interval.stop_s)}",
        flaws=_describe_flaws(flaws),
        share=max(0.0, 1 - masked_s / duration_s) if duration_s > 0 else 0.0,
    )


def _describe_flaws(flaws: list[Stretches]) -> str:
    """Count gaps and damaged stretches."""
    durations_s = [f.durations_s for f in flaws if f.kind.startswith("gap")]
    gaps_s = np.concatenate([np.zeros(0), *durations_s])
    counts: list[str] = []
    if len(gaps_s):
        noun = "gap" if len(gaps_s) == 1 else "gaps, longest"
        counts.append(f"{len(gaps_s)} {noun} {gaps_s.max():.3f} s")
    num_damaged = sum(len(f.starts_s) for f in flaws if f.kind == "damaged")
    if num_damaged:
        counts.append(f"{num_damaged} {'stretch' if num_damaged == 1 else 'stretches'} damaged")
    return ", ".join(counts)


def _select_intervals(
    kind: str, times_s: NDArray[np.float64], is_chosen: NDArray[np.bool_]
) -> Stretches:
    """Return the chosen ones [N - 1] of the intervals between times [N]."""
    return Stretches(kind, times_s[:-1][is_chosen], times_s[1:][is_chosen])


def _find_masked(
    starts_s: NDArray[np.float64], stops_s: NDArray[np.float64], duration_s: float
) -> Stretches:
    """Return the parts of a session that stretches [N], both ends increasing, do not cover."""
    left_s = np.clip(np.append(0.0, stops_s), 0.0, duration_s)
    right_s = np.clip(np.append(starts_s, duration_s), 0.0, duration_s)
    is_masked = right_s - left_s > EPSILON_S
    return Stretches("masked", left_s[is_masked], right_s[is_masked])
