"""Compute with times on the session clock: segments, grids, nearest frames, masks.

All times are in seconds, and intervals are half-open, [start, stop). Everything here is a pure
function of plain values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.streams import MaskReason  # noqa: TC001 (read at run time by pydantic)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

EPSILON_S = 1e-6
"""Times closer than this count as equal: recorders write microseconds."""

RATE_TOLERANCE = 0.9
"""A stream that is slower than this share of its `rate_hz` is recorded too slowly."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval [start_s, stop_s) of the clock."""

    start_s: float
    stop_s: float

    @property
    def duration_s(self) -> float:
        """Length in seconds, never negative."""
        return max(0.0, self.stop_s - self.start_s)

    def overlap_s(self, other: Interval) -> float:
        """Return the seconds that both cover."""
        return max(0.0, min(self.stop_s, other.stop_s) - max(self.start_s, other.start_s))


@dataclass(frozen=True, slots=True)
class Segment:
    """One stored unit of a session: [index * duration_s, (index + 1) * duration_s)."""

    index: int
    duration_s: float

    @property
    def start_s(self) -> float:
        """Start on the session clock."""
        return self.index * self.duration_s

    @property
    def stop_s(self) -> float:
        """End of the segment, exclusive."""
        return (self.index + 1) * self.duration_s

    @property
    def interval(self) -> Interval:
        """The segment as an interval."""
        return Interval(self.start_s, self.stop_s)

    def grid(self, rate_hz: float) -> NDArray[np.float64]:
        """Return times start, start + 1/rate, ... in the segment, float64 [rate * duration]."""
        return self.start_s + np.arange(round(rate_hz * self.duration_s)) / rate_hz


@dataclass(frozen=True, slots=True)
class MaskedSpan:
    """A stretch [start_s, stop_s) of a stream, on the session clock, that no sample shows."""

    start_s: float
    stop_s: float
    reason: MaskReason
    message: str
    """What is wrong, in one clause without the times."""


def plan_segments(duration_s: float, segment_s: float) -> list[Segment]:
    """List the segments of a session; the last one may extend beyond its end."""
    return [Segment(i, segment_s) for i in range(count_segments(duration_s, segment_s))]


def count_segments(duration_s: float, segment_s: float) -> int:
    """Return the number of segments of a session."""
    return max(0, math.ceil((duration_s - EPSILON_S) / segment_s))


def segment_of(time_s: float, segment_s: float) -> int:
    """Return the index of the segment that a time belongs to."""
    return math.floor((time_s + EPSILON_S / 2) / segment_s)


def nearest(
    times_s: NDArray[np.float64], grid_s: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the nearest of the recorded times, at least one, to each grid time.

    Ties go to the earlier.

    Returns:
        Index into `times_s`, and recorded minus requested time; both have the grid's shape.
    """
    right = np.clip(np.searchsorted(times_s, grid_s), 0, len(times_s) - 1)
    left = np.maximum(right - 1, 0)
    is_left = (grid_s - times_s[left]) <= np.abs(times_s[right] - grid_s)
    index = np.where(is_left, left, right)
    return index, times_s[index] - grid_s


def marked_runs(is_marked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return start and stop, exclusive, of each run of marked elements."""
    edges = np.flatnonzero(np.diff(is_marked, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def measure_rate_hz(times_s: NDArray[np.float64]) -> float | None:
    """Return the regular rate of times: one over their median interval; None for fewer than 3."""
    if len(times_s) < 3:
        return None
    median_s = float(np.median(np.diff(times_s)))
    return 1 / median_s if median_s > 0 else None


def slow_rate_hz(times_s: NDArray[np.float64], rate_hz: float) -> float | None:
    """Return the regular rate of times if it is too far below `rate_hz`; else None."""
    measured_hz = measure_rate_hz(times_s)
    is_slow = measured_hz is not None and measured_hz < RATE_TOLERANCE * rate_hz
    return measured_hz if is_slow else None


def frame_mask(error_s: NDArray[np.float64], *, tolerance_s: float) -> NDArray[np.bool_]:
    """Mark the grid times whose nearest frame, `error_s` away, is near enough to be used."""
    return np.asarray(np.abs(error_s) <= tolerance_s)


def audio_mask(start: int, count: int, *, hop: int, num_samples: int) -> NDArray[np.bool_]:
    """Mark the frames of `hop` samples, the first at sample `start`, that the audio covers whole.

    `start` is negative before the audio begins, which has `num_samples` in all.
    """
    stops = start + hop * np.arange(1, count + 1)
    return np.asarray((stops <= num_samples) & (stops - hop >= 0))


def is_masked(times_s: NDArray[np.float64], spans: Sequence[MaskedSpan]) -> NDArray[np.bool_]:
    """Mark the times, of any shape, that are inside one of the spans."""
    masked = np.zeros(times_s.shape, dtype=np.bool_)
    for span in spans:
        masked |= (times_s >= span.start_s) & (times_s < span.stop_s)
    return masked


def masked_share(start_s: float, stop_s: float, spans: Sequence[Interval | MaskedSpan]) -> float:
    """Return the share of [start_s, stop_s) that the spans cover; they may overlap."""
    covered_s, reached_s = 0.0, start_s
    for span in sorted(spans, key=lambda span: span.start_s):
        begin_s, end_s = max(reached_s, span.start_s), min(stop_s, span.stop_s)
        if end_s > begin_s:
            covered_s += end_s - begin_s
            reached_s = end_s
    return covered_s / (stop_s - start_s) if stop_s > start_s else 0.0


def clock_offset(
    first_s: float, last_s: float, media_stop_s: float | None, *, tolerance_s: float = 1.0
) -> float:
    """Return the seconds to subtract from a recorder's timestamps to get session times.

    Timestamps that start late are kept if they fit the media (the sensor started late). They are
    shifted to start at zero if only then they end together with the media (the clock was never
    reset), or if there is no media to compare with, which ends at `media_stop_s` on the session
    clock. Timestamps that start within `tolerance_s` of zero are never shifted.
    """
    if abs(first_s) <= tolerance_s:
        return 0.0
    if media_stop_s is None:
        return first_s
    mismatch_kept_s = abs(last_s - media_stop_s)
    mismatch_shifted_s = abs((last_s - first_s) - media_stop_s)
    is_apart = first_s >= media_stop_s or last_s <= 0
    return first_s if is_apart or mismatch_shifted_s + EPSILON_S < mismatch_kept_s else 0.0
