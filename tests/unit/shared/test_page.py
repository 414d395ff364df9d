"""Axes, curves, lanes and times of the HTML pages."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.svg_paths import path_curves
from hypothesis import given
from hypothesis import strategies as st

from shared.page import (
    PLOT_WIDTH,
    TimeAxis,
    TimedText,
    ValueAxis,
    arrange_texts,
    curve_path,
    format_time,
    printable_line,
    round_up,
    thin_curve,
)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(1, 20))
def test_thinning_keeps_the_extremes_of_every_column(values: list[float], columns: int) -> None:
    times_s = np.arange(len(values)) / 10
    axis = TimeAxis(0.0, len(values) / 10)
    curves = thin_curve(
        times_s, np.array(values), axis=axis, num_columns=columns, max_interval_s=0.11
    )
    ((thin_times, thin_values),) = curves
    assert len(thin_times) <= 2 * columns
    assert (np.diff(thin_times) >= 0).all()
    column = np.floor(times_s / axis.duration_s * columns)
    thin_column = np.floor(thin_times / axis.duration_s * columns)
    for c in np.unique(column):
        at, thin_at = np.array(values)[column == c], thin_values[thin_column == c]
        assert (at.min(), at.max()) == (thin_at.min(), thin_at.max())


def test_a_curve_of_one_reading_is_one_point() -> None:
    axis = TimeAxis(0.0, 1.0)
    (curve,) = thin_curve(
        np.array([0.5]), np.array([2.0]), axis=axis, num_columns=9, max_interval_s=0.1
    )
    assert [array.tolist() for array in curve] == [[0.5], [2.0]]


@given(st.floats(-10, 1e6), st.floats(1e-6, 1e9))
def test_an_axis_has_a_handful_of_ticks_inside_it(start_s: float, duration_s: float) -> None:
    ticks = TimeAxis(start_s, start_s + duration_s).ticks()
    assert len(ticks) <= 13
    assert all(0 <= tick.position <= PLOT_WIDTH for tick in ticks)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e30))
def test_a_value_axis_has_a_handful_of_ticks(low: float, length: float) -> None:
    assert 1 <= len(ValueAxis(low, low + length, 100.0).ticks()) <= 7


@pytest.mark.parametrize(
    ("time_s", "resolution_s", "words"),
    [
        (1.5, 0.01, "1.50 s"),
        (-0.25, 0.01, "-0.25 s"),
        (119.0, 1.0, "119 s"),
        (120.0, 1.0, "2:00"),
        (3661.0, 60.0, "1:01:01"),
        (125.25, 0.1, "2:05.2"),
        (-130.0, 1.0, "-2:10"),
        (179.999, 0.01, "3:00.00"),
    ],
)
def test_times_are_formatted_for_people(time_s: float, resolution_s: float, words: str) -> None:
    assert format_time(time_s, resolution_s=resolution_s) == words


@given(st.floats(1e-12, 1e12))
def test_rounding_up_gives_the_next_round_number(value: float) -> None:
    rounded = round_up(value)
    assert value <= rounded * (1 + 1e-6)
    assert rounded <= value * 2.5 * (1 + 1e-6)
    assert f"{rounded:e}"[0] in "125"


def test_control_characters_of_a_text_are_escaped() -> None:
    assert printable_line("a\u202eb\x00\n c", max_chars=50) == "a\\u202eb\\u0000 c"
    assert printable_line("word " * 9, max_chars=10) == "word wo..."


def timed(start_s: float, stop_s: float, label: str) -> TimedText:
    return TimedText(start_s=start_s, stop_s=stop_s, label=label, title="")


def test_texts_that_would_overlap_are_in_different_lanes() -> None:
    texts = [
        timed(0.0, 0.2, "a long text indeed"),
        timed(0.5, 0.6, "b"),
        timed(1.0, 1.1, "c"),
        timed(9.0, 9.1, "d"),
    ]
    axis = TimeAxis(0.0, 10.0, width=600.0)
    marks = arrange_texts(texts, axis)
    assert [mark.lane for mark in marks] == [0, 1, 1, 0]
    assert [mark.x for mark in marks] == [0, 30, 60, 540]
    assert marks[0].width == 12
    assert [mark.lane for mark in arrange_texts(texts, axis, max_lanes=1)] == [0, -1, -1, 0]


def test_a_label_that_would_pass_the_right_edge_is_left_of_its_mark() -> None:
    texts = [timed(9.5, 9.5, "long enough"), timed(9.6, 9.6, "long enough")]
    marks = arrange_texts(texts, TimeAxis(0.0, 10.0))
    assert [(mark.anchor, mark.lane) for mark in marks] == [("end", 0), ("end", 1)]


def test_a_curve_has_gaps_at_missing_values_and_where_an_angle_wraps() -> None:
    times_s = np.array([0.0, 1.0, 2.0, 4.0, 5.0])  # the reading at 3 s is missing
    values = np.array([3.0, 3.1, -3.1, -3.0, -2.9])
    axis = TimeAxis(0.0, 10.0, width=100.0)
    curves = thin_curve(
        times_s, values, axis=axis, num_columns=100, max_interval_s=1.5, max_jump=np.pi
    )
    path = curve_path(curves, axis=axis, values=ValueAxis(-3.2, 3.2, 64.0))
    assert path == "M0,2l10,-1M20,63h0M40,62l10,-1"


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(-1, 1)), min_size=1, max_size=300))
def test_a_path_of_steps_ends_where_the_curve_ends(readings: list[tuple[float, float]]) -> None:
    times_s, values = np.array(sorted(readings)).T
    axis, y_axis = TimeAxis(0.0, 10.0, width=3600.0), ValueAxis(-1.0, 1.0, 110.0)
    (points,) = path_curves(curve_path([(times_s, values)], axis=axis, values=y_axis))
    expected = np.stack([times_s * 360, (1 - values) * 55], axis=1)
    np.testing.assert_allclose(points, expected, atol=0.051)
