"""Periods of rates, against a search, and the messages about windows that do not fit them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from helpers.models import make_shapes
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from train.shapes import common_period_s

EIGHTHS_HZ = st.integers(1, 320).map(lambda n: n / 8)


def sensor(name, rate_hz):
    values = [{"count": 1, "type": "scalar"}]
    return {"kind": "sensor", "key": name, "rate_hz": rate_hz, "values": values}


@given(st.lists(EIGHTHS_HZ, min_size=1, max_size=5))
def test_the_period_is_the_shortest_time_with_whole_samples_of_all_rates(rates_hz):
    first = Fraction(rates_hz[0])
    times_s = (n / first for n in range(1, 321))  # 8 s fit every rate
    fits = (t for t in times_s if all((t * Fraction(r)).denominator == 1 for r in rates_hz))
    assert common_period_s(rates_hz) == next(fits)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, "whole samples of cam_b 2.5 Hz, imu 7 Hz, ticks 10 Hz; fix: set it to 2 or 4, or"),
        ({"slow": sensor("slow", 1)}, "of cam_b 2.5 Hz, slow 1 Hz, ticks 10 Hz; fix"),
    ],
)
def test_a_window_that_fits_no_period_names_the_rates_that_force_it(extra, words):
    streams = {
        "cam_b": {"kind": "video", "file": "b.mp4", "rate_hz": 2.5},
        "imu": sensor("imu", 7),
        "touch": sensor("touch", 30),
    }
    sections = {"training": {"loss_weights": {"imu": 1}}}
    with pytest.raises(ConfigError, match="3 is not a multiple of 2 s, the shortest") as found:
        make_shapes(sections, num_ticks=30, streams=streams | extra)
    assert words in str(found.value)
    assert str(found.value).endswith("or read fewer streams (data.modalities)")
