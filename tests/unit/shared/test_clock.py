"""Arithmetic on the clock, against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.oracles import (
    angle_distance,
    increasing_times,
    seconds,
    slow_interpolate,
    slow_nearest,
    slow_windows,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.clock import (
    Interval,
    Window,
    audio_mask,
    clock_offset,
    interpolate,
    nearest,
    plan_windows,
    sensor_mask,
    wrap_angle,
)

ANGLES = st.floats(-3.1415, 3.1415).map(lambda a: float(np.float32(a)))
READINGS = st.floats(-1000, 1000, width=32)


@given(duration_s=seconds(), window_s=seconds(0.25, 6), stride_s=seconds(0.125, 6))
def test_windows_are_those_that_begin_inside_the_session(duration_s, window_s, stride_s):
    windows = plan_windows(duration_s, window_s=window_s, stride_s=stride_s)
    assert [(w.start_s, w.stop_s) for w in windows] == slow_windows(duration_s, window_s, stride_s)
    assert [w.index for w in windows] == list(range(len(windows)))


def test_no_window_begins_in_the_last_microsecond():
    assert len(plan_windows(8.0 + 5e-7, window_s=4, stride_s=4)) == 2
    assert plan_windows(5e-7, window_s=4, stride_s=4) == []


@pytest.mark.parametrize(("rate_hz", "duration_s"), [(5, 4.0), (30, 4.0), (50, 1.0), (3, 1 / 3)])
def test_a_grid_has_rate_times_duration_points_inside_the_window(rate_hz, duration_s):
    window = Window(3, 12.5, duration_s)
    grid_s = window.grid(rate_hz)
    expected = [12.5 + k / rate_hz for k in range(round(rate_hz * duration_s))]
    np.testing.assert_allclose(grid_s, expected, rtol=0, atol=1e-12)
    assert grid_s[0] == window.start_s
    assert grid_s[-1] < window.stop_s


@given(a=seconds(), b=seconds(), c=seconds(), d=seconds())
def test_the_overlap_of_intervals_counts_common_grains(a, b, c, d):
    one, other = Interval(a, b), Interval(c, d)
    grain = 1 / 1024
    first, second = (range(round(i.start_s / grain), round(i.stop_s / grain)) for i in (one, other))
    assert one.overlap_s(other) == len(set(first) & set(second)) * grain
    assert one.duration_s == len(first) * grain


@given(times_s=increasing_times(min_size=1), grid_s=st.lists(seconds(), max_size=8))
def test_nearest_agrees_with_a_search_over_all_times(times_s, grid_s):
    index, error_s = nearest(np.array(times_s), np.array(grid_s))
    assert index.tolist() == [slow_nearest(times_s, g) for g in grid_s]
    assert error_s.tolist() == [times_s[i] - g for i, g in zip(index, grid_s, strict=True)]


def test_nearest_takes_the_earlier_of_two_equally_near():
    index, _ = nearest(np.array([0.0, 1.0]), np.array([0.5]))
    assert index.tolist() == [0]


@given(data=st.data(), times_s=increasing_times(), grid_s=st.lists(seconds(), max_size=8))
def test_interpolation_agrees_with_a_loop(data, times_s, grid_s):
    max_gap_s, edge_s = data.draw(seconds(0.0, 8.0)), data.draw(seconds(0.0, 2.0))
    values = data.draw(st.lists(READINGS, min_size=len(times_s), max_size=len(times_s)))
    found = interpolate(
        np.array(times_s),
        np.array(values, dtype=np.float32).reshape(-1, 1),
        np.array(grid_s),
        max_gap_s=max_gap_s,
        edge_s=edge_s,
    )
    assert found.dtype == np.float32
    for asked_s, value in zip(grid_s, found[:, 0], strict=True):
        expected = slow_interpolate(times_s, values, asked_s, max_gap_s=max_gap_s, edge_s=edge_s)
        if expected is None:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(expected, rel=1e-6, abs=1e-4)


@given(data=st.data(), times_s=increasing_times(min_size=1), asked_s=seconds())
def test_angles_go_the_short_way_round(data, times_s, asked_s):
    angles = data.draw(st.lists(ANGLES, min_size=len(times_s), max_size=len(times_s)))
    rises = np.abs([math.remainder(d, 2 * math.pi) for d in np.diff(angles)])
    assume((rises < math.pi - 1e-3).all())  # opposite angles have two short ways
    values = np.array([angles, angles], dtype=np.float32).T
    found = interpolate(
        np.array(times_s), values, np.array([asked_s]), max_gap_s=5, edge_s=1, num_angles=1
    )[0]
    expected = slow_interpolate(times_s, angles, asked_s, max_gap_s=5, edge_s=1, is_angle=True)
    assert np.isnan(found[0]) == np.isnan(found[1]) == (expected is None)
    if expected is not None:
        assert angle_distance(found[0], expected) < 1e-5
        assert abs(found[0]) <= np.float32(math.pi)


def test_a_turn_through_pi_does_not_pass_through_zero():
    values = np.array([[3.0], [-3.0]], dtype=np.float32)
    found = interpolate(np.array([0.0, 1.0]), values, np.array([0.5]), max_gap_s=2, num_angles=1)
    assert abs(found[0, 0]) > 3.1


def test_a_lone_reading_counts_within_the_edge_only():
    grid_s = np.array([0.89, 0.95, 1.0, 1.05, 1.11])
    found = interpolate(
        np.array([1.0]), np.array([[7.0]], np.float32), grid_s, max_gap_s=0.1, edge_s=0.1
    )
    np.testing.assert_array_equal(found[:, 0], [np.nan, 7, 7, 7, np.nan])


def test_an_edge_before_a_gap_still_takes_the_first_reading():
    found = interpolate(
        np.array([1.0, 5.0]),
        np.array([[2.0], [3.0]], np.float32),
        np.array([0.99, 1.0, 1.01, 5.0, 5.01]),
        max_gap_s=0.1,
        edge_s=0.02,
    )
    np.testing.assert_array_equal(found[:, 0], [2, 2, np.nan, 3, 3])


def test_nothing_recorded_gives_nan_everywhere():
    found = interpolate(np.zeros(0), np.zeros((0, 5), np.float32), np.arange(3.0), max_gap_s=1)
    assert found.shape == (3, 5)
    assert np.isnan(found).all()


@given(angle_rad=st.floats(-100, 100))
def test_wrapping_keeps_the_angle_and_comes_out_in_range(angle_rad):
    wrapped = float(wrap_angle(np.array([angle_rad]))[0])
    assert angle_distance(wrapped, angle_rad) < 1e-9
    assert -math.pi <= wrapped <= math.pi
    if -math.pi <= angle_rad < math.pi:
        assert wrapped == angle_rad


@pytest.mark.parametrize(
    ("first_s", "last_s", "media_stop_s", "expected"),
    [
        (0.0, 10.0, 10.0, 0.0),  # the usual recording
        (0.9, 10.0, 5.0, 0.0),  # a start within the tolerance is never moved
        (-0.9, 10.0, None, 0.0),
        (12.7, 22.7, 10.0, 12.7),  # a clock that was never reset
        (12.7, 22.7, None, 12.7),  # nothing to compare with
        (4.0, 10.0, 10.0, 0.0),  # a sensor that woke up late
        (4.0, 14.0, 10.0, 4.0),  # ends with the media only when moved
        (1.7e9, 1.7e9 + 10, 10.0, 1.7e9),  # seconds since 1970
        (-50.0, -40.0, 10.0, -50.0),  # wholly before the media
        (2.0, 9.0, 8.0, 0.0),  # either way 1 s off: as it is
    ],
)
def test_timestamps_are_shifted_only_if_that_fits_the_media(
    first_s, last_s, media_stop_s, expected
):
    assert clock_offset(first_s, last_s, media_stop_s) == expected


@given(first_s=seconds(-20, 20), duration_s=seconds(0, 20), stop_s=st.none() | seconds(0.5, 20))
def test_an_offset_never_makes_the_fit_to_the_media_worse(first_s, duration_s, stop_s):
    last_s = first_s + duration_s
    offset_s = clock_offset(first_s, last_s, stop_s)
    assert offset_s in (0.0, first_s)
    if offset_s and stop_s is not None and first_s < stop_s and last_s > 0:
        assert abs(duration_s - stop_s) < abs(last_s - stop_s)


@given(
    times_s=st.lists(seconds(0, 3), unique=True, max_size=6).map(sorted),
    max_gap_s=seconds(0, 1),
    edge_s=seconds(0, 0.5),
)
def test_a_grid_time_is_valid_exactly_if_it_gets_a_value(times_s, max_gap_s, edge_s):
    times, grid_s = np.array(times_s, dtype=np.float64), np.arange(-1, 4, 0.1)
    values = np.ones((len(times), 1), dtype=np.float32)
    gap = {"max_gap_s": max_gap_s, "edge_s": edge_s}
    expected = np.isfinite(interpolate(times, values, grid_s, **gap)[:, 0])
    np.testing.assert_array_equal(sensor_mask(times, grid_s, **gap), expected)


@given(start=st.integers(-20, 20), count=st.integers(0, 6), num_samples=st.integers(0, 30))
def test_a_frame_of_audio_is_valid_if_every_sample_of_it_exists(start, count, num_samples):
    hop = 4
    expected = [
        all(0 <= i < num_samples for i in range(start + k * hop, start + (k + 1) * hop))
        for k in range(count)
    ]
    mask = audio_mask(start, count, hop=hop, num_samples=num_samples)
    assert mask.tolist() == expected
