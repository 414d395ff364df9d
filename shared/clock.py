"""Arithmetic on the session clock: windows, grids, nearest frames, interpolation. All times in
seconds.

Intervals are half-open, [start, stop). Everything here is a pure function of plain values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

EPSILON_S = 1e-6
"""Times closer than this are the same: recorders write microseconds."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A stretch [start_s, stop_s) of the clock."""

    start_s: float
    stop_s: float

    @property
    def duration_s(self) -> float:
        """Length in seconds, never negative."""
        return max(0.0, self.stop_s - self.start_s)

    def overlap_s(self, other: Interval) -> float:
        """Seconds that both cover."""
        return max(0.0, min(self.stop_s, other.stop_s) - max(self.start_s, other.start_s))


@dataclass(frozen=True, slots=True)
class Window:
    """One cut of a session: [start_s, start_s + duration_s)."""

    index: int
    start_s: float
    duration_s: float

    @property
    def stop_s(self) -> float:
        """End of the window, not part of it."""
        return self.start_s + self.duration_s

    @property
    def interval(self) -> Interval:
        """The window as an interval."""
        return Interval(self.start_s, self.stop_s)

    def grid(self, rate_hz: float) -> NDArray[np.float64]:
        """Times start, start + 1/rate, ... inside the window, float64 [round(rate * duration)]."""
        return self.start_s + np.arange(round(rate_hz * self.duration_s)) / rate_hz


def plan_windows(length_s: float, *, duration_s: float, step_s: float) -> list[Window]:
    """Every window that begins inside a session of `length_s`; the last ones may reach past its
    end.
    """
    count = max(0, math.ceil((length_s - EPSILON_S) / step_s))
    return [Window(i, i * step_s, duration_s) for i in range(count)]


def nearest(
    times_s: NDArray[np.float64], grid_s: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The recorded time nearest to each grid time; the earlier one of two equally near.

    Args:
        times_s: recorded times, increasing, at least one.
        grid_s: times asked for.

    Returns:
        Index into `times_s` and recorded minus asked time, both of the grid's shape.
    """
    right = np.clip(np.searchsorted(times_s, grid_s), 0, len(times_s) - 1)
    left = np.maximum(right - 1, 0)
    is_left = (grid_s - times_s[left]) <= np.abs(times_s[right] - grid_s)
    index = np.where(is_left, left, right)
    return index, times_s[index] - grid_s


def interpolate(
    times_s: NDArray[np.float64],
    values: NDArray[np.float32],
    grid_s: NDArray[np.float64],
    *,
    max_gap_s: float,
    edge_s: float = EPSILON_S,
    num_angles: int = 0,
) -> NDArray[np.float32]:
    """Linear interpolation onto a grid that invents nothing: outside the recording and inside its
    gaps it is NaN.

    Args:
        times_s: [N] recorded times, increasing.
        values: [N, D] recorded values, finite.
        grid_s: [T] times asked for.
        max_gap_s: neighbours farther apart than this leave the grid points between them NaN.
        edge_s: grid points at most this far outside the recording take its first or last value.
        num_angles: the first so many columns are angles in rad; they go the short way round and
            come out in [-pi, pi), as near as float32 has it.

    Returns:
        [T, D] float32.
    """
    result = np.full((len(grid_s), values.shape[1]), np.nan, dtype=np.float32)
    if len(times_s) == 0:
        return result
    right = np.clip(np.searchsorted(times_s, grid_s, side="left"), 1, max(1, len(times_s) - 1))
    left = right - 1
    right = np.minimum(right, len(times_s) - 1)
    span = times_s[right] - times_s[left]
    share = np.divide(grid_s - times_s[left], span, out=np.zeros_like(grid_s), where=span > 0)
    share = np.clip(share, 0.0, 1.0)
    is_inside = (grid_s >= times_s[0] - edge_s) & (grid_s <= times_s[-1] + edge_s)
    is_at_edge = (grid_s <= times_s[0]) | (grid_s >= times_s[-1])
    is_on_sample = (np.abs(grid_s - times_s[left]) <= EPSILON_S) | (
        np.abs(grid_s - times_s[right]) <= EPSILON_S
    )
    is_valid = is_inside & ((span <= max_gap_s + EPSILON_S) | is_on_sample | is_at_edge)
    low, high = values[left].astype(np.float64), values[right].astype(np.float64)
    delta = high - low
    delta[:, :num_angles] = wrap_angle(delta[:, :num_angles])
    mixed = low + share[:, None] * delta
    mixed[:, :num_angles] = wrap_angle(mixed[:, :num_angles])
    result[is_valid] = mixed[is_valid]
    return result


def wrap_angle(angle_rad: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same angles in [-pi, pi); those already there are left to the bit."""
    is_out = (angle_rad < -np.pi) | (angle_rad >= np.pi)
    wrapped = np.mod(angle_rad + np.pi, 2 * np.pi) - np.pi
    return np.where(is_out, wrapped, angle_rad)


def clock_offset(
    first_s: float, last_s: float, media_stop_s: float | None, *, tolerance_s: float = 1.0
) -> float:
    """Seconds to subtract from a recorder's timestamps to bring them onto the session clock.

    Timestamps that start late are taken as they are when they fit the media (a sensor that woke up
    late); they are moved to start at zero when they then end together with the media and otherwise
    don't (a clock that was never reset), or when there is no media to compare with.

    Args:
        first_s: first timestamp.
        last_s: last timestamp.
        media_stop_s: end of video and audio on the session clock, None where there is neither.
        tolerance_s: starts within this of zero are never moved.
    """
    if abs(first_s) <= tolerance_s:
        return 0.0
    if media_stop_s is None:
        return first_s
    mismatch_as_is_s = abs(last_s - media_stop_s)
    mismatch_moved_s = abs((last_s - first_s) - media_stop_s)
    is_apart = first_s >= media_stop_s or last_s <= 0
    return first_s if is_apart or mismatch_moved_s + EPSILON_S < mismatch_as_is_s else 0.0
