"""Arithmetic on the clock, against slow loops."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.oracles import increasing_times, seconds, slow_nearest, slow_segments
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import (
    Interval,
    Segment,
    audio_mask,
    clock_offset,
    nearest,
    plan_segments,
    segment_of,
)


@given(duration_s=seconds(), segment_s=seconds(0.25, 6))
def test_segments_are_those_that_begin_inside_the_session(duration_s, segment_s):
    segments = plan_segments(duration_s, segment_s)
    found = [(segment.start_s, segment.stop_s) for segment in segments]
    assert found == slow_segments(duration_s, segment_s)
    assert [segment.index for segment in segments] == list(range(len(segments)))


def test_no_segment_begins_in_the_last_microsecond():
    assert len(plan_segments(8.0 + 5e-7, 4)) == 2
    assert plan_segments(5e-7, 4) == []


@given(time_s=seconds(), segment_s=seconds(0.25, 6))
def test_a_time_belongs_to_the_segment_that_holds_it(time_s, segment_s):
    segment = Segment(segment_of(time_s, segment_s), segment_s)
    assert segment.start_s <= time_s < segment.stop_s


@pytest.mark.parametrize(("rate_hz", "duration_s"), [(5, 4.0), (30, 4.0), (50, 1.0), (3, 1 / 3)])
def test_a_grid_has_rate_times_duration_points_inside_the_segment(rate_hz, duration_s):
    segment = Segment(3, duration_s)
    grid_s = segment.grid(rate_hz)
    expected = [3 * duration_s + k / rate_hz for k in range(round(rate_hz * duration_s))]
    np.testing.assert_allclose(grid_s, expected, rtol=0, atol=1e-12)
    assert grid_s[0] == segment.start_s
    assert grid_s[-1] < segment.stop_s


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
