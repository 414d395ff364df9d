"""Arithmetic on the clock, against slow loops."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.oracles import increasing_times, seconds, slow_nearest, slow_windows
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import (
    Interval,
    Window,
    audio_mask,
    clock_offset,
    nearest,
    plan_windows,
)


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


@given(start=st.integers(-20, 20), count=st.integers(0, 6), num_samples=st.integers(0, 30))
def test_a_frame_of_audio_is_valid_if_every_sample_of_it_exists(start, count, num_samples):
    hop = 4
    expected = [
        all(0 <= i < num_samples for i in range(start + k * hop, start + (k + 1) * hop))
        for k in range(count)
    ]
    mask = audio_mask(start, count, hop=hop, num_samples=num_samples)
    assert mask.tolist() == expected
