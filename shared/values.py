"""Resample readings of a sensor onto a grid, as the types of its values say.

A closed table gives the rules of each value type: how a reading is cleaned, and how a value between
two readings is made. Scalars, fractions, velocities and positions are mixed linearly. Angles take
the shorter way around. Quaternions and directions move along the shortest arc of the unit sphere at
constant speed (slerp). Between opposite directions no arc is the shortest: there the nearer reading
counts.

Times are seconds on one clock. Work per call grows with the grid and with the logarithm of the
number of readings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from shared.clock import EPSILON_S
from shared.streams import ValueType

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shared.streams import SensorStream

    Vectors: TypeAlias = NDArray[np.float64]
    """Values of one group, [N, vectors, components]."""

MIN_NORM = 0.5
"""A shorter quaternion or direction is a missing reading: trackers send zeros when they fail."""

OPPOSITE_RAD = 1e-4
"""Directions that are this close to opposite have no shortest arc in float32."""


def resample(
    times_s: NDArray[np.float64],
    values: NDArray[np.float32],
    grid_s: NDArray[np.float64],
    *,
    stream: SensorStream,
) -> NDArray[np.float32]:
    """Compute the values of a stream at the times of a grid; NaN where :func:`resample_mask` fails.

    A value depends on the two readings around its grid time only; with ``resample: hold``, on the
    latest reading at or before it only. `values` [N, D] are readings at increasing times [N], as
    :func:`clean_readings` returns the usable ones.

    Returns:
        [T, D] float32.
    """
    result = np.full((len(grid_s), values.shape[1]), np.nan, dtype=np.float32)
    if len(times_s) == 0:
        return result
    is_valid = resample_mask(times_s, grid_s, stream=stream)
    if stream.resample == "hold":
        latest = np.searchsorted(times_s, grid_s, side="right") - 1
        result[is_valid] = values[latest[is_valid]]
        return result
    left, right = _neighbors(times_s, grid_s)
    span_s = times_s[right] - times_s[left]
    share = np.divide(grid_s - times_s[left], span_s, out=np.zeros_like(grid_s), where=span_s > 0)
    mixed = interpolate(values[left], values[right], np.clip(share, 0.0, 1.0), stream=stream)
    result[is_valid] = mixed[is_valid]
    return result


def resample_mask(
    times_s: NDArray[np.float64], grid_s: NDArray[np.float64], *, stream: SensorStream
) -> NDArray[np.bool_]:
    """Mark the grid times at which :func:`resample` gives values.

    With ``resample: by_type``, a grid time is valid between readings that are near enough to each
    other, on a reading, and at most half a step of the grid before the first or after the last
    one. With ``resample: hold``, it is valid if a reading at or before it is young enough.
    """
    if len(times_s) == 0:
        return np.zeros(len(grid_s), dtype=np.bool_)
    if stream.resample == "hold":
        latest = np.searchsorted(times_s, grid_s, side="right") - 1
        age_s = grid_s - times_s[np.maximum(latest, 0)]
        return np.asarray((latest >= 0) & ~is_masked_gap(age_s, stream=stream))
    edge_s = 0.5 / stream.rate_hz
    left, right = _neighbors(times_s, grid_s)
    is_inside = (grid_s >= times_s[0] - edge_s) & (grid_s <= times_s[-1] + edge_s)
    is_at_edge = (grid_s <= times_s[0]) | (grid_s >= times_s[-1])
    is_on_reading = (np.abs(grid_s - times_s[left]) <= EPSILON_S) | (
        np.abs(grid_s - times_s[right]) <= EPSILON_S
    )
    is_gap = is_masked_gap(times_s[right] - times_s[left], stream=stream)
    return np.asarray(is_inside & (~is_gap | is_on_reading | is_at_edge))


def is_masked_gap(interval_s: NDArray[np.float64], *, stream: SensorStream) -> NDArray[np.bool_]:
    """Mark the intervals after a reading that are too long for a value at their end.

    They are intervals between successive readings; with ``resample: hold``, ages of readings.
    """
    limit_s = stream.age_limit_s if stream.resample == "hold" else stream.gap_limit_s
    return np.asarray(interval_s > limit_s + EPSILON_S)


def clean_readings(
    values: NDArray[np.float32], stream: SensorStream
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Bring readings into the form that is stored, and mark the usable ones.

    Quaternions and directions get unit length, quaternions also the canonical sign, and angles are
    wrapped to [-pi, pi). A reading is usable if all its values are finite, and its quaternions and
    directions have at least half of unit length.

    Returns:
        [N, D] float32, NaN in readings that are not usable; and [N].
    """
    cleaned = np.where(np.isfinite(values), values, np.float32(np.nan))
    for group, columns in zip(stream.values, stream.slices, strict=True):
        vectors = _vectors(cleaned[:, columns], group.vector_size)
        cleaned[:, columns] = VALUE_TYPES[group.type].clean(vectors).reshape(-1, group.count)
    is_usable = np.asarray(np.isfinite(cleaned).all(axis=1))
    cleaned[~is_usable] = np.nan
    return cleaned, is_usable


def interpolate(
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    share: NDArray[np.float64],
    *,
    stream: SensorStream,
) -> NDArray[np.float32]:
    """Compute values float32 [T, D] between pairs of clean readings [T, D].

    `share` [T] is 0 at the reading `low` before a value, and 1 at `high` after it.
    """
    mixed = np.empty(low.shape, dtype=np.float32)
    for group, columns in zip(stream.values, stream.slices, strict=True):
        before, after = (_vectors(end[:, columns], group.vector_size) for end in (low, high))
        vectors = VALUE_TYPES[group.type].mix(before, after, share[:, None, None])
        mixed[:, columns] = vectors.reshape(-1, group.count)
    return mixed


def wrap_angle(angle_rad: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wrap angles to [-pi, pi); angles already in that range are unchanged to the bit."""
    is_out = (angle_rad < -np.pi) | (angle_rad >= np.pi)
    wrapped = np.mod(angle_rad + np.pi, 2 * np.pi) - np.pi
    return np.where(is_out, wrapped, angle_rad)


@dataclass(frozen=True, slots=True)
class ValueRules:
    """What happens to values of one type."""

    clean: Callable[[Vectors], Vectors]
    """Bring vectors into the form that is stored; missing ones become NaN."""
    mix: Callable[[Vectors, Vectors, Vectors], Vectors]
    """Compute vectors between `low` and `high`, float64, at a share of the way."""


def _neighbors(
    times_s: NDArray[np.float64], grid_s: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the two readings around each grid time; at least one exists."""
    right = np.clip(np.searchsorted(times_s, grid_s, side="left"), 1, max(1, len(times_s) - 1))
    return right - 1, np.minimum(right, len(times_s) - 1)


def _vectors(columns: NDArray[np.float32], size: int) -> Vectors:
    """Return columns as float64 vectors of `size` components."""
    num_rows, num_columns = columns.shape
    return columns.astype(np.float64).reshape(num_rows, num_columns // size, size)


def _keep(vectors: Vectors) -> Vectors:
    return vectors


def _mix_linearly(low: Vectors, high: Vectors, share: Vectors) -> Vectors:
    return low + share * (high - low)


def _mix_angles(low: Vectors, high: Vectors, share: Vectors) -> Vectors:
    return wrap_angle(low + share * wrap_angle(high - low))


def _mix_quaternions(low: Vectors, high: Vectors, share: Vectors) -> Vectors:
    """Rotate from one attitude to another; q and -q are the same, so the nearer sign is taken."""
    is_far = (low * high).sum(axis=-1, keepdims=True) < 0
    return _canonical(_slerp(low, np.where(is_far, -high, high), share))


def _slerp(low: Vectors, high: Vectors, share: Vectors) -> Vectors:
    """Move along the shortest arc between unit vectors; the ends stay as they are."""
    # Kahan's formula of the angle is exact for tiny angles too, where acos is not.
    angle = 2 * np.arctan2(_norm(high - low), _norm(high + low))
    weights = [part * np.sinc(part * angle / np.pi) for part in (1 - share, share)]
    arc = _unit(weights[0] * low + weights[1] * high, min_norm=0.0)
    nearer = np.where(share <= 0.5, low, high)
    is_end = (share <= 0) | (share >= 1) | (angle > np.pi - OPPOSITE_RAD)
    return np.where(is_end, nearer, arc)


def _norm(vectors: Vectors) -> Vectors:
    return np.asarray(np.linalg.norm(vectors, axis=-1, keepdims=True))


def _unit(vectors: Vectors, min_norm: float = MIN_NORM) -> Vectors:
    """Return vectors of unit length; NaN for those that are too short."""
    norm = _norm(vectors)
    is_long = (norm >= min_norm) & (norm > 0)
    return np.asarray(np.divide(vectors, norm, out=np.full_like(vectors, np.nan), where=is_long))


def _canonical(quaternions: Vectors) -> Vectors:
    """Choose the sign of quaternions: w >= 0; if it is 0, the first other component decides."""
    rounded = quaternions.astype(np.float32).astype(np.float64)  # w may become 0
    decisive = rounded[..., 3]
    for component in range(3):
        decisive = np.where(decisive == 0, rounded[..., component], decisive)
    return np.where(decisive[..., None] < 0, -rounded, rounded) + 0.0  # makes -0.0 to 0.0


_LINEAR = ValueRules(_keep, _mix_linearly)

VALUE_TYPES: dict[ValueType, ValueRules] = {
    ValueType.SCALAR: _LINEAR,
    ValueType.FRACTION: _LINEAR,
    ValueType.ANGLE: ValueRules(wrap_angle, _mix_angles),
    ValueType.VELOCITY: _LINEAR,
    ValueType.POSITION: _LINEAR,
    ValueType.QUATERNION: ValueRules(lambda vectors: _canonical(_unit(vectors)), _mix_quaternions),
    ValueType.DIRECTION: ValueRules(_unit, _slerp),
}
"""The rules of every value type."""
