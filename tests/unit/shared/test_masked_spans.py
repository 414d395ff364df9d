"""Masked spans against a fine grid of times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import MaskedSpan, is_masked, masked_share
from shared.streams import MaskReason

TICKS = 200
"""Times are whole hundredths of a second, so that a grid of them is exact."""

spans = st.lists(
    st.tuples(st.integers(0, TICKS), st.integers(0, TICKS)).map(
        lambda ends: MaskedSpan(min(ends) / 100, max(ends) / 100, MaskReason.STILL, "stands still")
    ),
    max_size=5,
)


def slow_mask(times_s: np.ndarray, masked: list[MaskedSpan]) -> np.ndarray:
    return np.array([any(s.start_s <= t < s.stop_s for s in masked) for t in times_s])


@given(spans)
def test_a_time_is_masked_from_the_start_of_a_span_to_before_its_end(masked):
    times_s = np.arange(TICKS) / 100
    np.testing.assert_array_equal(is_masked(times_s, masked), slow_mask(times_s, masked))


@given(spans, st.integers(0, TICKS), st.integers(0, TICKS))
def test_the_masked_share_counts_overlapping_spans_once(masked, first, last):
    start, stop = min(first, last), max(first, last)
    middles_s = (np.arange(start, stop) + 0.5) / 100
    expected = slow_mask(middles_s, masked).mean() if len(middles_s) else 0.0
    assert masked_share(start / 100, stop / 100, masked) == pytest.approx(expected, abs=1e-9)
