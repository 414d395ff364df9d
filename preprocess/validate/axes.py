"""Arithmetic of the report's pictures: from seconds and values to places on the page, and curves
thinned so that no spike is lost.

Places are SVG units, PLOT_WIDTH wide whatever the session's length, y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.clock import EPSILON_S

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

PLOT_WIDTH = 1000
"""Width of what has a time, in SVG units; one unit is about one pixel."""

_STEPS_S = (*(m * 10.0**e for e in range(-4, 1) for m in (1, 2, 5)), 10.0, 15.0, 30.0, 60.0, 120.0)
_LONG_STEPS_S = (300.0, 600.0, 1800.0, 3600.0, 7200.0, 21_600.0, 86_400.0)
_MIN_VIEW_S = 0.01
_CLOCK_FROM_S = 120.0


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis."""

    place: float
    label: str


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """The stretch of the session clock that a picture shows."""

    start_s: float
    stop_s: float

    def __post_init__(self) -> None:
        if self.stop_s - self.start_s < _MIN_VIEW_S:
            object.__setattr__(self, "stop_s", self.start_s + _MIN_VIEW_S)

    @property
    def length_s(self) -> float:
        """Seconds shown."""
        return self.stop_s - self.start_s

    def x(self, time_s: float) -> float:
        """Place of a time, kept inside the picture."""
        share = (time_s - self.start_s) / self.length_s
        return round(min(1.0, max(0.0, share)) * PLOT_WIDTH, 2)

    def ticks(self) -> list[Tick]:
        """About ten round times."""
        least_s = self.length_s / 10
        steps_s = (*_STEPS_S, *_LONG_STEPS_S)
        step_s = next((s for s in steps_s if s >= least_s * 0.99), round_up(least_s))
        first, last = math.ceil(self.start_s / step_s), math.floor(self.stop_s / step_s)
        times_s = [index * step_s for index in range(first, last + 1)]
        return [Tick(self.x(t), say_time(t, step_s=step_s)) for t in times_s]


@dataclass(frozen=True, slots=True)
class ValueAxis:
    """The range of values that a picture of some height shows, the largest on top."""

    low: float
    high: float
    height: float

    def y(self, value: float) -> float:
        """Place of a value, kept inside the picture."""
        share = (self.high - value) / (self.high - self.low)
        return round(min(1.0, max(0.0, share)) * self.height, 1)

    def ys(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Places of values."""
        share = (self.high - values) / (self.high - self.low)
        return np.asarray(np.clip(share, 0.0, 1.0) * self.height, dtype=np.float64)

    def ticks(self) -> list[Tick]:
        """Three to five round values."""
        step = round_up((self.high - self.low) / 4)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        values = [index * step for index in range(first, last + 1)]
        return [Tick(self.y(v), f"{0.0 if abs(v) < step / 2 else v:.6g}") for v in values]


def round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten; 1 for what is not positive."""
    if not 0 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= value * (1 - 1e-9))


def say_time(time_s: float, *, step_s: float = 0.01) -> str:
    """A time as people read it, rounded to a step: seconds, from two minutes on m:ss or h:mm:ss."""
    digits = max(0, -math.floor(math.log10(step_s) + 1e-9))
    if abs(time_s) < _CLOCK_FROM_S:
        return f"{time_s:.{digits}f} s"
    minutes, seconds = divmod(round(abs(time_s), digits), 60)
    hours, minutes = divmod(int(minutes), 60)
    padded = f"{seconds:0{digits + 3 if digits else 2}.{digits}f}"
    head = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{'-' if time_s < 0 else ''}{head}:{padded}"


def thin_curve(
    times_s: NDArray[np.float64],
    values: NDArray[np.float64],
    *,
    axis: TimeAxis,
    num_columns: int,
    max_step_s: float,
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """A curve in pieces: apart where readings are farther apart than `max_step_s`; within one of
    `num_columns` columns of the picture only the smallest and the largest value.

    Args:
        times_s: [N] increasing.
        values: [N] finite.
        axis: what is shown.
        num_columns: columns of the picture.
        max_step_s: longest step that is joined by a line, where it is wider than a column.

    Returns:
        (times [M], values [M]) of each piece, M > 0.
    """
    if len(times_s) == 0:
        return []
    column = np.floor((times_s - axis.start_s) / axis.length_s * num_columns)
    # Gaps narrower than a column are bands of the picture; as pieces there could be any number.
    is_break = np.diff(times_s) > max(max_step_s + EPSILON_S, axis.length_s / num_columns)
    starts = np.flatnonzero(np.concatenate([[True], is_break | (np.diff(column) != 0)]))
    stops = np.append(starts[1:], len(times_s)) - 1
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    is_rising = values[stops] >= values[starts]
    pair_times = np.stack([times_s[starts], times_s[stops]], axis=1).ravel()
    pairs = np.stack([np.where(is_rising, low, high), np.where(is_rising, high, low)], axis=1)
    keep = np.stack([np.ones(len(starts), dtype=np.bool_), stops > starts], axis=1).ravel()
    piece_of_group = np.searchsorted(np.flatnonzero(is_break), starts, side="left")
    piece = np.repeat(piece_of_group, 2)[keep]
    cuts = np.flatnonzero(np.diff(piece)) + 1
    thin_times, thin_values = pair_times[keep], pairs.ravel()[keep]
    return list(zip(np.split(thin_times, cuts), np.split(thin_values, cuts), strict=True))


def line_path(
    pieces: Iterable[tuple[NDArray[np.float64], NDArray[np.float64]]],
    *,
    axis: TimeAxis,
    values: ValueAxis,
) -> str:
    """Pieces of a curve as the `d` of an SVG path."""
    parts: list[str] = []
    for times_s, readings in pieces:
        xs = np.clip((times_s - axis.start_s) / axis.length_s, 0.0, 1.0) * PLOT_WIDTH
        places = zip(xs.tolist(), values.ys(readings).tolist(), strict=True)
        parts.append("M" + " ".join(f"{x:.5g},{y:.4g}" for x, y in places))
        if len(times_s) == 1:
            parts.append("h0")
    return "".join(parts)


def step_path(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> str:
    """A staircase: `ys` [N] between the edges `xs` [N + 1]; NaN leaves a hole."""
    parts: list[str] = []
    is_open = False
    for left, right, y in zip(xs[:-1].tolist(), xs[1:].tolist(), ys.tolist(), strict=True):
        if math.isnan(y):
            is_open = False
            continue
        parts.append(f"V{y:.4g}H{right:.5g}" if is_open else f"M{left:.5g},{y:.4g}H{right:.5g}")
        is_open = True
    return "".join(parts)


def band_path(
    xs: NDArray[np.float64], tops: NDArray[np.float64], bottoms: NDArray[np.float64]
) -> str:
    """The area between two staircases over the edges `xs` [N + 1], both [N] and finite."""
    if len(tops) == 0:
        return ""
    edges = xs.tolist()
    forth = [f"V{y:.4g}H{x:.5g}" for x, y in zip(edges[1:], tops.tolist(), strict=True)]
    back_pairs = zip(edges[-2::-1], bottoms.tolist()[::-1], strict=True)
    back = [f"V{y:.4g}H{x:.5g}" for x, y in back_pairs]
    return f"M{edges[0]:.5g},{tops[0]:.4g}{''.join(forth)}{''.join(back)}Z"
