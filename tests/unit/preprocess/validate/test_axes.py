"""Axes, curves and times of the report page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.validate.axes import PLOT_WIDTH, TimeAxis, ValueAxis, round_up, say_time, thin_curve


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(1, 20))
def test_thinning_keeps_the_extremes_of_every_column(values: list[float], columns: int) -> None:
    times_s = np.arange(len(values)) / 10
    axis = TimeAxis(0.0, len(values) / 10)
    pieces = thin_curve(times_s, np.array(values), axis=axis, num_columns=columns, max_step_s=0.11)
    ((thin_times, thin_values),) = pieces
    assert len(thin_times) <= 2 * columns
    assert (np.diff(thin_times) >= 0).all()
    column = np.floor(times_s / axis.length_s * columns)
    thin_column = np.floor(thin_times / axis.length_s * columns)
    for c in np.unique(column):
        at, thin_at = np.array(values)[column == c], thin_values[thin_column == c]
        assert (at.min(), at.max()) == (thin_at.min(), thin_at.max())


def test_a_curve_of_one_reading_is_one_point() -> None:
    axis = TimeAxis(0.0, 1.0)
    (piece,) = thin_curve(
        np.array([0.5]), np.array([2.0]), axis=axis, num_columns=9, max_step_s=0.1
    )
    assert [part.tolist() for part in piece] == [[0.5], [2.0]]


@given(st.floats(-10, 1e6), st.floats(1e-6, 1e9))
def test_an_axis_has_a_handful_of_ticks_inside_it(start_s: float, length_s: float) -> None:
    ticks = TimeAxis(start_s, start_s + length_s).ticks()
    assert len(ticks) <= 13
    assert all(0 <= tick.place <= PLOT_WIDTH for tick in ticks)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e30))
def test_a_value_axis_has_a_handful_of_ticks(low: float, length: float) -> None:
    assert 1 <= len(ValueAxis(low, low + length, 100.0).ticks()) <= 7


@pytest.mark.parametrize(
    ("time_s", "step_s", "words"),
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
def test_times_are_said_as_people_do(time_s: float, step_s: float, words: str) -> None:
    assert say_time(time_s, step_s=step_s) == words


@given(st.floats(1e-12, 1e12))
def test_rounding_up_gives_the_next_round_number(value: float) -> None:
    rounded = round_up(value)
    assert value <= rounded * (1 + 1e-6)
    assert rounded <= value * 2.5 * (1 + 1e-6)
    assert f"{rounded:e}"[0] in "125"
