"""Compute with times on the session clock: windows, grids, nearest frames, interpolation.

All times are in seconds, and intervals are half-open, [start, stop). Everything here is a pure
function of plain values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

EPSILON_S = 1e-6
"""Times closer than this count as equal: recorders write microseconds."""


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
class Window:
    """One window of a session: [start_s, start_s + duration_s)."""

    index: int
    start_s: float
    duration_s: float

    @property
    def stop_s(self) -> float:
        """End of the window, exclusive."""
        return self.start_s + self.duration_s

    @property
    def interval(self) -> Interval:
        """The window as an interval."""
        return Interval(self.start_s, self.stop_s)

    def grid(self, rate_hz: float) -> NDArray[np.float64]:
        """Return times start, start + 1/rate, ... in the window, float64 [rate * duration]."""
        return self.start_s + np.arange(round(rate_hz * self.duration_s)) / rate_hz


def plan_windows(duration_s: float, *, window_s: float, stride_s: float) -> list[Window]:
    """List every window that begins inside a session; the last ones may extend beyond its end."""
    count = max(0, math.ceil((duration_s - EPSILON_S) / stride_s))
    return [Window(i, i * stride_s, window_s) for i in range(count)]


def nearest(
    times_s: NDArray[np.float64], grid_s: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the recorded time nearest to each grid time; ties go to the earlier.

    Args:
        times_s: recorded times, increasing, at least one.
        grid_s: requested times.

    Returns:
        Index into `times_s`, and recorded minus requested time; both have the grid's shape.
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
    """Interpolate linearly onto a grid; outside the recording and inside its gaps, give NaN.

    Args:
        times_s: [N] recorded times, increasing.
        values: [N, D] recorded values, finite.
        grid_s: [T] requested times.
        max_gap_s: grid points between neighbors farther apart than this are NaN.
        edge_s: grid points at most this far outside the recording take its first or last value.
        num_angles: number of leading columns that are angles in rad; they take the shorter way
            around and end in [-pi, pi), up to float32 precision.

    Returns:
        [T, D] float32.
    """
    result = np.full((len(grid_s), values.shape[1]), np.nan, dtype=np.float32)
    if len(times_s) == 0:
        return result
    # The two recorded times around each grid time, and where between them it is.
    right = np.clip(np.searchsorted(times_s, grid_s, side="left"), 1, max(1, len(times_s) - 1))
    left = right - 1
    right = np.minimum(right, len(times_s) - 1)
    span = times_s[right] - times_s[left]
    share = np.divide(grid_s - times_s[left], span, out=np.zeros_like(grid_s), where=span > 0)
    share = np.clip(share, 0.0, 1.0)
    # A grid time is valid in a short enough gap, on a recorded time, or just outside the recording.
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
    """Wrap angles to [-pi, pi); angles already in that range are unchanged to the bit."""
    is_out = (angle_rad < -np.pi) | (angle_rad >= np.pi)
    wrapped = np.mod(angle_rad + np.pi, 2 * np.pi) - np.pi
    return np.where(is_out, wrapped, angle_rad)


def clock_offset(
    first_s: float, last_s: float, media_stop_s: float | None, *, tolerance_s: float = 1.0
) -> float:
    """Return the seconds to subtract from a recorder's timestamps to get session times.

    Timestamps that start late are kept if they fit the media (the sensor started late). They are
    shifted to start at zero if only then they end together with the media (the clock was never
    reset), or if there is no media to compare with.

    Args:
        first_s: first timestamp.
        last_s: last timestamp.
        media_stop_s: end of video and audio on the session clock; None if there is neither.
        tolerance_s: timestamps that start within this of zero are never shifted.
    """
    if abs(first_s) <= tolerance_s:
        return 0.0
    if media_stop_s is None:
        return first_s
    mismatch_kept_s = abs(last_s - media_stop_s)
    mismatch_shifted_s = abs((last_s - first_s) - media_stop_s)
    is_apart = first_s >= media_stop_s or last_s <= 0
    return first_s if is_apart or mismatch_shifted_s + EPSILON_S < mismatch_kept_s else 0.0
