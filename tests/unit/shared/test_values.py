"""Resampling by value type, against scipy and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from shared.recipe import Recipe
from shared.streams import SensorStream, ValueType
from shared.values import (
    VALUE_TYPES,
    clean_readings,
    interpolate,
    is_masked_gap,
    resample,
    resample_mask,
    wrap_angle,
)

LINEAR = (ValueType.SCALAR, ValueType.FRACTION, ValueType.VELOCITY, ValueType.POSITION)
SEEDS = st.integers(0, 2**32 - 1)


def sensor(*groups: tuple[int, str], **keys: object) -> SensorStream:
    values = [{"count": count, "type": kind} for count, kind in groups]
    return SensorStream.model_validate({"key": "k", "values": values, **keys})


def rows(*readings: float | list[float]) -> np.ndarray:
    return np.array([np.atleast_1d(r) for r in readings], dtype=np.float32)


def random_readings(rng: np.random.Generator, count: int, stream: SensorStream) -> np.ndarray:
    values, usable = clean_readings(
        (rng.normal(size=(count, stream.size)) * 2 + 0.01).astype(np.float32), stream
    )
    ones, _ = clean_readings(np.ones((1, stream.size), dtype=np.float32), stream)
    values[~usable] = values[usable][0] if usable.any() else ones[0]
    return values


def random_times(rng: np.random.Generator, count: int, step_s: float) -> np.ndarray:
    return np.cumsum(rng.uniform(0.2, 1.8, count) * step_s) - rng.uniform(0, 1)


def attitude_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (Rotation.from_quat(a) * Rotation.from_quat(b).inv()).magnitude()


EVERY_TYPE = sensor(
    (2, "scalar"), (1, "fraction"), (2, "angle"), (1, "velocity"), (3, "position"),
    (8, "quaternion"), (6, "direction"), rate_hz=30, max_gap_s=0.2,
)  # fmt: skip


def test_every_value_type_has_rules():
    assert set(VALUE_TYPES) == set(ValueType)


# --- between readings ------------------------------------------------------------------------


@pytest.mark.parametrize("value_type", LINEAR)
@given(seed=SEEDS, count=st.integers(1, 30))
def test_linear_types_agree_with_numpy_interp(value_type, seed, count):
    rng = np.random.default_rng(seed)
    stream = sensor((3, value_type), rate_hz=30, max_gap_s=100)
    times_s = random_times(rng, count, 0.05)
    values = rng.normal(size=(count, 3)).astype(np.float32) * 100
    grid_s = np.sort(np.concatenate([rng.uniform(-1, 2, 20), times_s]))
    result = resample(times_s, values, grid_s, stream=stream)
    inside = (grid_s >= times_s[0] - 1 / 60) & (grid_s <= times_s[-1] + 1 / 60)
    np.testing.assert_array_equal(np.isfinite(result), inside[:, None].repeat(3, axis=1))
    for column in range(3):
        expected = np.interp(grid_s, times_s, values[:, column])
        np.testing.assert_allclose(result[inside, column], expected[inside], rtol=1e-6, atol=1e-4)


@given(seed=SEEDS, count=st.integers(2, 30))
def test_angles_agree_with_numpy_unwrap(seed, count):
    rng = np.random.default_rng(seed)
    stream = sensor((1, "angle"), rate_hz=30, max_gap_s=100)
    times_s = random_times(rng, count, 0.05)
    turns = np.cumsum(rng.uniform(-3, 3, count))  # steps below pi: the shorter way is clear
    values = wrap_angle(turns).astype(np.float32)[:, None]
    grid_s = rng.uniform(times_s[0], times_s[-1], 20)
    result = resample(times_s, values, grid_s, stream=stream)[:, 0].astype(np.float64)
    expected = np.interp(grid_s, times_s, np.unwrap(values[:, 0].astype(np.float64)))
    assert np.abs(wrap_angle(result - expected)).max() < 1e-6
    assert np.abs(result).max() <= np.float32(math.pi)


def test_an_angle_that_crosses_pi_does_not_pass_through_zero():
    stream = sensor((1, "angle"), rate_hz=10, max_gap_s=2)
    result = resample(np.array([0.0, 1.0]), rows(3.0, -3.0), np.arange(11) / 10, stream=stream)
    assert (np.abs(result) > 2.99).all()
    assert (np.diff(np.unwrap(result[:, 0])) > 0).all()


@given(seed=SEEDS, count=st.integers(2, 20))
def test_quaternions_agree_with_scipy_slerp(seed, count):
    rng = np.random.default_rng(seed)
    stream = sensor((4, "quaternion"), rate_hz=30, max_gap_s=100)
    times_s = random_times(rng, count, 0.05)
    values = random_readings(rng, count, stream)
    grid_s = rng.uniform(times_s[0], times_s[-1], 20)
    result = resample(times_s, values, grid_s, stream=stream)
    # Attitudes that are half a turn apart have two shortest arcs; random ones never are.
    expected = Slerp(times_s, Rotation.from_quat(values))(grid_s)
    assert attitude_distance(result, expected.as_quat()).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, atol=1e-6)
    assert (result[:, 3] >= 0).all()


def test_a_quaternion_stream_whose_sign_flips_halfway_turns_evenly():
    stream = sensor((4, "quaternion"), rate_hz=60)
    times_s = np.arange(120) / 60
    turned = Rotation.from_euler("zyx", np.outer(times_s, [0.9, 0.4, -0.7]))
    recorded = turned.as_quat().astype(np.float32)
    recorded[60:] *= -1
    values, usable = clean_readings(recorded, stream)
    assert usable.all()
    grid_s = np.arange(118) / 60 + 1 / 120
    result = resample(times_s, values, grid_s, stream=stream)
    expected = Slerp(times_s, turned)(grid_s).as_quat()
    assert attitude_distance(result, expected).max() < 1e-5
    unflipped, _ = clean_readings(turned.as_quat().astype(np.float32), stream)
    np.testing.assert_array_equal(values, unflipped)


def test_a_quaternion_turns_the_short_way_across_the_canonical_sign():
    stream = sensor((4, "quaternion"), rate_hz=10, max_gap_s=2)
    angles = np.radians([170.0, 190.0])  # w changes its sign at 180 degrees
    values, _ = clean_readings(
        Rotation.from_rotvec(np.outer(angles, [0, 0, 1])).as_quat().astype(np.float32), stream
    )
    result = resample(np.array([0.0, 1.0]), values, np.array([0.25, 0.5, 0.75]), stream=stream)
    expected = Rotation.from_rotvec(np.outer(np.radians([175, 180, 185]), [0, 0, 1])).as_quat()
    assert attitude_distance(result, expected).max() < 1e-5
    assert (result[:, 3] >= 0).all()


@given(seed=SEEDS, spread=st.sampled_from([1e-7, 1e-3, 0.1, 10.0]))
def test_directions_move_evenly_along_the_great_circle(seed, spread):
    rng = np.random.default_rng(seed)
    stream = sensor((3, "direction"), rate_hz=10, max_gap_s=2)
    first = rng.normal(size=3)
    values, usable = clean_readings(
        np.array([first, first + spread * rng.normal(size=3)], dtype=np.float32), stream
    )
    assume(usable.all())
    share = np.array([0.25, 0.5, 0.9])
    result = resample(np.array([0.0, 1.0]), values, share, stream=stream).astype(np.float64)
    low, high = values.astype(np.float64)
    axis = np.cross(low, high)
    if (length := np.linalg.norm(axis)) < 1e-4:
        expected = low + share[:, None] * (high - low)  # an arc this short is straight
    else:
        angle = math.atan2(length, low @ high)
        turn = Rotation.from_rotvec(np.outer(share * angle, axis / length))
        expected = turn.apply(low)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, atol=1e-6)


def test_between_opposite_directions_the_nearer_reading_counts():
    stream = sensor((3, "direction"), rate_hz=10, max_gap_s=2)
    values = rows([0.0, 0.6, 0.8], [0.0, -0.6, -0.8])
    result = resample(np.array([0.0, 1.0]), values, np.array([0.3, 0.5, 0.7]), stream=stream)
    np.testing.assert_array_equal(result, values[[0, 0, 1]])


@given(seed=SEEDS, count=st.integers(1, 20))
def test_on_a_reading_the_reading_itself_counts(seed, count):
    rng = np.random.default_rng(seed)
    times_s = random_times(rng, count, 0.2)  # some gaps exceed the limit
    values = random_readings(rng, count, EVERY_TYPE)
    result = resample(times_s, values, times_s, stream=EVERY_TYPE)
    np.testing.assert_array_equal(result, values)


def test_values_of_a_long_recording_are_read_only_where_they_are_needed():
    # 64 GB, if anything copied them.
    times_s = np.arange(4_000_000) / 2000
    values = np.broadcast_to(np.ones(4096, dtype=np.float32), (len(times_s), 4096))
    for resample_as in ("by_type", "hold"):
        stream = sensor((4096, "angle"), rate_hz=200, resample=resample_as)
        result = resample(times_s, values, 1000 + np.arange(20) / 200, stream=stream)
        assert (result == 1).all()


# --- gaps and edges --------------------------------------------------------------------------


def slow_mask(times_s: list[float], asked_s: float, max_gap_s: float, edge_s: float) -> bool:
    if not times_s or not times_s[0] - edge_s <= asked_s <= times_s[-1] + edge_s:
        return False
    if any(abs(t - asked_s) <= 1e-6 for t in times_s):
        return True
    if asked_s <= times_s[0] or asked_s >= times_s[-1]:
        return True
    before, after = (max(t for t in times_s if t < asked_s), min(t for t in times_s if t > asked_s))
    return after - before <= max_gap_s + 1e-6


@given(
    grains=st.lists(st.integers(0, 3000), unique=True, max_size=8).map(sorted),
    max_gap=st.integers(1, 1000),
    rate_hz=st.sampled_from([1.0, 4.0, 50.0]),
)
def test_grid_times_are_masked_outside_and_in_long_gaps(grains, max_gap, rate_hz):
    times_s, max_gap_s = [g / 1000 for g in grains], max_gap / 1000
    stream = sensor((1, "scalar"), rate_hz=rate_hz, max_gap_s=max_gap_s)
    grid_s = np.concatenate([np.arange(-100, 400) / 100 + 1 / 3000, times_s])
    mask = resample_mask(np.array(times_s, dtype=np.float64), grid_s, stream=stream)
    assert mask.tolist() == [slow_mask(times_s, g, max_gap_s, 0.5 / rate_hz) for g in grid_s]


@given(seed=SEEDS, count=st.integers(0, 12), resample_as=st.sampled_from(["by_type", "hold"]))
def test_a_grid_time_is_valid_exactly_if_it_gets_values(seed, count, resample_as):
    rng = np.random.default_rng(seed)
    stream = EVERY_TYPE.model_copy(update={"resample": resample_as})
    times_s = random_times(rng, count, 0.15)
    values = random_readings(rng, count, stream)
    grid_s = np.arange(-10, 30) / 10
    result = resample(times_s, values, grid_s, stream=stream)
    assert (result.shape, result.dtype) == ((40, stream.size), np.float32)
    mask = resample_mask(times_s, grid_s, stream=stream)
    np.testing.assert_array_equal(np.isfinite(result), mask[:, None].repeat(stream.size, axis=1))


def test_a_single_reading_counts_within_half_a_step():
    stream = sensor((1, "scalar"), rate_hz=5)
    grid_s = np.array([0.89, 0.95, 1.0, 1.05, 1.11])
    result = resample(np.array([1.0]), rows(7.0), grid_s, stream=stream)
    np.testing.assert_array_equal(result[:, 0], [np.nan, 7, 7, 7, np.nan])


def test_before_a_gap_the_first_reading_counts_for_half_a_step():
    stream = sensor((1, "scalar"), rate_hz=25, max_gap_s=0.1)
    grid_s = np.array([0.99, 1.0, 1.01, 5.0, 5.01])
    result = resample(np.array([1.0, 5.0]), rows(2.0, 3.0), grid_s, stream=stream)
    np.testing.assert_array_equal(result[:, 0], [2, 2, np.nan, 3, 3])


@pytest.mark.parametrize("resample_as", ["by_type", "hold"])
def test_without_readings_everything_is_missing(resample_as):
    stream = sensor((5, "fraction"), resample=resample_as)
    result = resample(np.zeros(0), np.zeros((0, 5), np.float32), np.arange(3.0), stream=stream)
    assert result.shape == (3, 5)
    assert np.isnan(result).all()
    assert not resample_mask(np.zeros(0), np.arange(3.0), stream=stream).any()
    empty = resample(np.arange(3.0), np.ones((3, 5), np.float32), np.zeros(0), stream=stream)
    assert empty.shape == (0, 5)


def test_gaps_are_judged_by_the_limit_of_the_rule():
    by_type = sensor((1, "scalar"), rate_hz=10, max_gap_s=0.3, max_age_s=0.1)
    hold = by_type.model_copy(update={"resample": "hold"})
    intervals_s = np.array([0.1, 0.1000005, 0.2, 0.3, 0.31])
    assert is_masked_gap(intervals_s, stream=by_type).tolist() == [0, 0, 0, 0, 1]
    assert is_masked_gap(intervals_s, stream=hold).tolist() == [0, 0, 1, 1, 1]


# --- what a value depends on -----------------------------------------------------------------


def slow_hold(times_s: np.ndarray, asked_s: float, max_age_s: float) -> int | None:
    earlier = [i for i, t in enumerate(times_s) if t <= asked_s]
    if not earlier or asked_s - times_s[earlier[-1]] > max_age_s + 1e-6:
        return None
    return earlier[-1]


@given(seed=SEEDS, count=st.integers(0, 15), max_age_s=st.sampled_from([0.01, 0.1, 0.5]))
def test_hold_takes_the_latest_young_reading(seed, count, max_age_s):
    rng = np.random.default_rng(seed)
    stream = EVERY_TYPE.model_copy(update={"resample": "hold", "max_age_s": max_age_s})
    times_s = np.round(random_times(rng, count, 0.1), 2)
    times_s = np.unique(times_s)
    values = random_readings(rng, len(times_s), stream)
    grid_s = np.arange(-100, 200) / 100
    result = resample(times_s, values, grid_s, stream=stream)
    for row, asked_s in zip(result, grid_s, strict=True):
        index = slow_hold(times_s, asked_s, max_age_s)
        expected = np.full(stream.size, np.nan) if index is None else values[index]
        np.testing.assert_array_equal(row, expected)


@given(seed=SEEDS, count=st.integers(1, 15), cut=st.integers(0, 39))
def test_hold_never_looks_into_the_future(seed, count, cut):
    rng = np.random.default_rng(seed)
    stream = EVERY_TYPE.model_copy(update={"resample": "hold"})
    times_s = random_times(rng, count, 0.1)
    values = random_readings(rng, count, stream)
    grid_s = np.concatenate([np.arange(-10, 30) / 10, times_s])
    now_s = grid_s[cut]
    past = times_s <= now_s
    full = resample(times_s, values, grid_s, stream=stream)
    seen = resample(times_s[past], values[past], grid_s, stream=stream)
    np.testing.assert_array_equal(full[grid_s <= now_s], seen[grid_s <= now_s])


@given(seed=SEEDS, count=st.integers(1, 15), cut=st.integers(0, 39))
def test_no_value_depends_on_more_than_the_next_reading(seed, count, cut):
    rng = np.random.default_rng(seed)
    times_s = random_times(rng, count, 0.1)
    values = random_readings(rng, count, EVERY_TYPE)
    grid_s = np.arange(-10, 30) / 10
    kept = np.searchsorted(times_s, grid_s[cut]) + 1  # up to the next reading
    other = np.concatenate([values[:kept], random_readings(rng, count, EVERY_TYPE)[kept:]])
    full = resample(times_s, values, grid_s, stream=EVERY_TYPE)
    changed = resample(times_s, other, grid_s, stream=EVERY_TYPE)
    np.testing.assert_array_equal(full[: cut + 1], changed[: cut + 1])


@given(seed=SEEDS, rate_hz=st.sampled_from([10, 30, 60]), source_hz=st.integers(10, 200))
def test_values_of_a_tick_end_one_source_step_after_it(seed, rate_hz, source_hz):
    rng = np.random.default_rng(seed)
    stream = sensor((2, "scalar"), rate_hz=rate_hz, max_gap_s=1.0)
    times_s = np.arange(2 * source_hz) / source_hz + rng.uniform(0, 1)
    values = rng.normal(size=(len(times_s), 2)).astype(np.float32)
    grid_s, tick = np.arange(2 * rate_hz) / rate_hz, int(rng.integers(20))
    last_s = (tick + 1) / 10 + 1 / source_hz
    other = np.where((times_s > last_s)[:, None], values + 1, values)
    of_tick = slice(0, (tick + 1) * rate_hz // 10)
    full, changed = (resample(times_s, v, grid_s, stream=stream) for v in (values, other))
    np.testing.assert_array_equal(full[of_tick], changed[of_tick])


# --- clean readings --------------------------------------------------------------------------


@given(seed=SEEDS, scale=st.sampled_from([1e-6, 0.2, 1.0, 1e20]))
def test_clean_readings_have_unit_length_and_a_canonical_sign(seed, scale):
    rng = np.random.default_rng(seed)
    stream = sensor((4, "quaternion"), (3, "direction"), (2, "angle"), (1, "scalar"))
    raw = np.hstack([rng.normal(size=(20, 7)) * scale, rng.uniform(-20, 20, (20, 3))])
    raw = raw.astype(np.float32)
    values, usable = clean_readings(raw, stream)
    norms = [np.linalg.norm(raw[:, s].astype(np.float64), axis=1) for s in stream.slices[:2]]
    np.testing.assert_array_equal(usable, (norms[0] >= 0.5) & (norms[1] >= 0.5))
    assert np.isnan(values[~usable]).all()
    kept, raw = values[usable].astype(np.float64), raw[usable].astype(np.float64)
    quaternions, directions, angles = (kept[:, s] for s in stream.slices[:3])
    for vectors, s in ((quaternions, stream.slices[0]), (directions, stream.slices[1])):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        unit = raw[:, s] / np.linalg.norm(raw[:, s], axis=1)[:, None]
        sign = np.sign((unit * vectors).sum(axis=1))[:, None]
        np.testing.assert_allclose(vectors, unit * sign, atol=1e-6)
        assert (sign > 0).all() or s == stream.slices[0]
    assert (quaternions[:, 3] >= 0).all()
    turns = (angles - raw[:, stream.slices[2]]) / (2 * math.pi)
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-6)
    assert np.abs(angles).max(initial=0) <= np.float32(math.pi)
    np.testing.assert_array_equal(kept[:, 9], raw[:, 9])


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ([0, 0, 0, -1], [0, 0, 0, 1]),
        ([0, 0, -1, 0], [0, 0, 1, 0]),
        ([0, -1, 0, 0], [0, 1, 0, 0]),
        ([-0.6, 0.8, 0, -0.0], [0.6, -0.8, 0, 0]),
        ([0.6, -0.8, 0, 0], [0.6, -0.8, 0, 0]),
        ([0, 1, 0, -1e-46], [0, 1, 0, 0]),
    ],
)
def test_if_w_is_zero_the_first_other_component_decides_the_sign(recorded, expected):
    values, usable = clean_readings(rows(recorded), sensor((4, "quaternion")))
    assert usable.all()
    assert values.tobytes() == rows(expected).tobytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", range(EVERY_TYPE.size))
def test_one_missing_value_makes_the_reading_missing(bad, column):
    raw = random_readings(np.random.default_rng(0), 3, EVERY_TYPE)
    raw[1, column] = bad
    values, usable = clean_readings(raw, EVERY_TYPE)
    assert usable.tolist() == [True, False, True]
    assert np.isnan(values[1]).all()


def test_readings_are_not_changed_in_memory():
    raw = rows([0.0, 0.0, 0.0, -2.0])
    clean_readings(raw, sensor((4, "quaternion")))
    assert raw.tolist() == [[0, 0, 0, -2]]


@given(angle_rad=st.floats(-100, 100))
def test_wrapping_keeps_the_angle_and_ends_in_range(angle_rad):
    wrapped = float(wrap_angle(np.array([angle_rad]))[0])
    assert abs(math.remainder(wrapped - angle_rad, 2 * math.pi)) < 1e-9
    assert -math.pi <= wrapped <= math.pi
    if -math.pi <= angle_rad < math.pi:
        assert wrapped == angle_rad


# --- the default streams as before -----------------------------------------------------------


def frozen_interpolate(times_s, values, grid_s, *, max_gap_s, edge_s, num_angles):
    """Interpolate as `shared.clock.interpolate` did before streams were declared; a frozen copy."""

    def wrap(angle_rad):
        is_out = (angle_rad < -np.pi) | (angle_rad >= np.pi)
        return np.where(is_out, np.mod(angle_rad + np.pi, 2 * np.pi) - np.pi, angle_rad)

    result = np.full((len(grid_s), values.shape[1]), np.nan, dtype=np.float32)
    if len(times_s) == 0:
        return result
    right = np.clip(np.searchsorted(times_s, grid_s, side="left"), 1, max(1, len(times_s) - 1))
    left, right = right - 1, np.minimum(right, len(times_s) - 1)
    span = times_s[right] - times_s[left]
    share = np.divide(grid_s - times_s[left], span, out=np.zeros_like(grid_s), where=span > 0)
    share = np.clip(share, 0.0, 1.0)
    is_inside = (grid_s >= times_s[0] - edge_s) & (grid_s <= times_s[-1] + edge_s)
    is_at_edge = (grid_s <= times_s[0]) | (grid_s >= times_s[-1])
    is_on_sample = (np.abs(grid_s - times_s[left]) <= 1e-6) | (
        np.abs(grid_s - times_s[right]) <= 1e-6
    )
    is_gap = times_s[right] - times_s[left] > max_gap_s + 1e-6
    is_valid = is_inside & (~is_gap | is_on_sample | is_at_edge)
    low, high = values[left].astype(np.float64), values[right].astype(np.float64)
    delta = high - low
    delta[:, :num_angles] = wrap(delta[:, :num_angles])
    mixed = low + share[:, None] * delta
    mixed[:, :num_angles] = wrap(mixed[:, :num_angles])
    result[is_valid] = mixed[is_valid]
    return result


@pytest.mark.parametrize("num_angles", [0, 10])
@given(seed=SEEDS, count=st.integers(0, 60), step_s=st.sampled_from([0.01, 1 / 30, 0.07]))
def test_the_default_streams_keep_their_bits(num_angles, seed, count, step_s):
    rng = np.random.default_rng(seed)
    stream = next(
        s
        for s in Recipe().streams.values()
        if isinstance(s, SensorStream)
        and any(v.type is ValueType.ANGLE for v in s.values) == bool(num_angles)
    )
    times_s = np.round(random_times(rng, count, step_s), 6)
    values = (rng.normal(size=(count, stream.size)) * 2).astype(np.float32)
    values[:, :num_angles] = wrap_angle(values[:, :num_angles].astype(np.float64))
    grid_s = 0.2 * rng.integers(-5, 10) + np.arange(60) / 30
    result = resample(times_s, values, grid_s, stream=stream)
    expected = frozen_interpolate(
        times_s, values, grid_s, max_gap_s=0.1, edge_s=0.5 / 30, num_angles=num_angles
    )
    assert result.tobytes() == expected.tobytes()


@given(seed=SEEDS)
def test_interpolation_ends_at_the_readings(seed):
    rng = np.random.default_rng(seed)
    low, high = (random_readings(rng, 4, EVERY_TYPE) for _ in range(2))
    for share, end in ((0.0, low), (1.0, high)):
        mixed = interpolate(low, high, np.full(4, share), stream=EVERY_TYPE)
        np.testing.assert_allclose(mixed, end, rtol=1e-6, atol=1e-6)
