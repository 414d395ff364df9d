"""Draw the timeline of a session: for each stream what was recorded, its gaps, and what is masked.

Gaps follow the rules of :mod:`preprocess.validate.line_checks`. Masked is what samples would not
contain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.validate.line_checks import find_gaps
from shared.clock import EPSILON_S, Interval, masked_share
from shared.page import draw_bands, format_time
from shared.streams import Kind, MaskReason, mask_reasons
from shared.values import is_masked_gap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from preprocess.validate.probe import SessionProbe
    from shared.clock import MaskedSpan
    from shared.page import Band, TimeAxis
    from shared.streams import StreamSpec


@dataclass(frozen=True, slots=True)
class Stretches:
    """Stretches of one kind, float64 [N] seconds each, increasing."""

    kind: str
    """recorded, gap-warning, gap-error, damaged, masked, or the reason of a fault."""
    starts_s: NDArray[np.float64]
    stops_s: NDArray[np.float64]

    def bands(self, axis: TimeAxis) -> list[Band]:
        """Draw the stretches."""
        word = self.kind.partition("-")[0]
        return draw_bands(self.starts_s, self.stops_s, kind=self.kind, word=word, axis=axis)


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


def draw_timelines(probe: SessionProbe, axis: TimeAxis) -> list[StreamTimeline]:
    """Draw a timeline for each declared stream."""
    return [
        _draw_stream(name, probe, axis) if name in probe.intervals else _absent_stream(name, probe)
        for name in probe.recipe.streams
    ]


def stream_gaps(times_s: NDArray[np.float64], spec: StreamSpec) -> list[Stretches]:
    """Return the gaps of a stream: short ones, then long ones."""
    gaps = find_gaps(times_s, spec)
    kinds = {"gap-warning": gaps.is_short, "gap-error": gaps.is_long}
    return [Stretches(k, times_s[:-1][is_gap], times_s[1:][is_gap]) for k, is_gap in kinds.items()]


def absent_state(name: str, probe: SessionProbe) -> str:
    """Return the state of a stream that was not recorded: absent, missing or broken."""
    spec = probe.recipe.streams[name]
    is_broken = spec.file in probe.unreadable and spec.kind is not Kind.TEXT
    return "broken" if is_broken else "missing" if spec.required else "absent"


def measure_stream(name: str, probe: SessionProbe) -> dict[str, Any]:
    """Return the share of the session in which a recorded stream is not masked, and its flaws."""
    flaws, _, share = _find_stretches(name, probe)
    return {"share_used": round(share, 6), "flaws": sum(len(f.starts_s) for f in flaws)}


def _absent_stream(name: str, probe: SessionProbe) -> StreamTimeline:
    """Return the timeline of a stream that was not recorded."""
    state = absent_state(name, probe)
    words = {"broken": "broken", "missing": "required, but missing", "absent": "absent"}[state]
    reason = probe.absent.get(name, "not recorded")
    return StreamTimeline(name=name, state=state, absent=f"{words}: {reason}")


_Covered = tuple["NDArray[np.float64]", "NDArray[np.float64]"]
"""Starts and stops, increasing, of the stretches that are not masked."""


def _video_flaws(name: str, probe: SessionProbe) -> tuple[_Covered, list[Stretches]]:
    video, spec = probe.videos[name], probe.recipe.videos[name]
    times_s = video.track.times_s
    covered = times_s - spec.tolerance_s, times_s + spec.tolerance_s
    runs = [Interval(start_s, stop_s) for start_s, stop_s, _ in video.track.runs(video.undecoded)]
    damaged = _stretches("damaged", runs)
    return covered, [*stream_gaps(times_s, spec), damaged]


def _sensor_flaws(name: str, probe: SessionProbe) -> tuple[_Covered, list[Stretches]]:
    spec, times_s = probe.recipe.sensors[name], probe.readings[name].times_s
    gaps = stream_gaps(times_s, spec)
    if spec.resample == "hold":
        return (times_s, times_s + spec.age_limit_s), gaps
    is_masked = is_masked_gap(np.diff(times_s), stream=spec)
    starts_s = times_s[np.append(True, is_masked)]
    stops_s = np.append(times_s[:-1][is_masked], probe.intervals[name].stop_s)
    return (starts_s, stops_s), gaps


def _no_flaws(name: str, probe: SessionProbe) -> tuple[_Covered, list[Stretches]]:
    interval = probe.intervals[name]
    return (np.array([interval.start_s]), np.array([interval.stop_s])), []


_FLAW_WORDS: Mapping[MaskReason, str] = {
    MaskReason.STILL: "still",
    MaskReason.CLOCK: "mistimed",
    MaskReason.DAMAGED: "damaged",
}

_FLAWS: Mapping[Kind, Callable[[str, SessionProbe], tuple[_Covered, list[Stretches]]]] = {
    Kind.VIDEO: _video_flaws,
    Kind.AUDIO: _no_flaws,
    Kind.SENSOR: _sensor_flaws,
    Kind.TEXT: _no_flaws,
}


def _draw_stream(name: str, probe: SessionProbe, axis: TimeAxis) -> StreamTimeline:
    """Draw a recorded stream, its flaws on top."""
    flaws, masked, _ = _find_stretches(name, probe)
    interval = probe.intervals[name]
    recorded = Stretches("recorded", np.array([interval.start_s]), np.array([interval.stop_s]))
    return StreamTimeline(
        name=name,
        bands=[band for stretches in (recorded, *flaws, masked) for band in stretches.bands(axis)],
        note=f"{format_time(interval.start_s)} to {format_time(interval.stop_s)}",
        flaws=_describe_flaws(flaws),
    )


def _find_stretches(name: str, probe: SessionProbe) -> tuple[list[Stretches], Stretches, float]:
    """Return the flaws of a recorded stream, what is masked, and the share that is not."""
    duration_s = probe.duration_s
    (starts_s, stops_s), flaws = _FLAWS[probe.recipe.streams[name].kind](name, probe)
    # Masked is what the stretches, both ends increasing, do not cover.
    left_s = np.clip(np.append(0.0, stops_s), 0.0, duration_s)
    right_s = np.clip(np.append(starts_s, duration_s), 0.0, duration_s)
    is_masked = right_s - left_s > EPSILON_S
    faults, reasons = probe.faults.get(name, ()), mask_reasons(probe.recipe.streams[name])
    unused: list[Interval | MaskedSpan] = [span for span in faults if span.reason in reasons]
    unused += map(Interval, left_s[is_masked].tolist(), right_s[is_masked].tolist())
    masked = _stretches("masked", unused)
    for reason in dict.fromkeys(span.reason for span in faults):
        if reason is not MaskReason.DAMAGED:  # drawn with the frames that do not decode
            flaws.append(_stretches(reason.value, [s for s in faults if s.reason is reason]))
    share = 1 - masked_share(0.0, duration_s, unused) if duration_s > 0 else 0.0
    return flaws, masked, share


def _stretches(kind: str, spans: Sequence[Interval | MaskedSpan]) -> Stretches:
    """Return stretches in order."""
    ends = np.array(sorted((s.start_s, s.stop_s) for s in spans), dtype=np.float64).reshape(-1, 2)
    return Stretches(kind, ends[:, 0], ends[:, 1])


def _describe_flaws(flaws: list[Stretches]) -> str:
    """Count gaps, and stretches that are damaged or still."""
    durations_s = [f.stops_s - f.starts_s for f in flaws if f.kind.startswith("gap")]
    gaps_s = np.concatenate([np.zeros(0), *durations_s])
    counts: list[str] = []
    if len(gaps_s):
        noun = "gap" if len(gaps_s) == 1 else "gaps, longest"
        counts.append(f"{len(gaps_s)} {noun} {gaps_s.max():.3f} s")
    for reason in MaskReason:
        num = sum(len(f.starts_s) for f in flaws if f.kind == reason.value)
        if num:
            counts.append(f"{num} {_FLAW_WORDS[reason]}")
    return ", ".join(counts)
