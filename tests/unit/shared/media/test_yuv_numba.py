"""The compiled loops against the formulas of the standard in float64, at every size."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.oracles import exact_rgb
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.media import yuv_numba
from shared.media.yuv_numba import planes_to_floats, planes_to_rgb, rows_to_floats

SIZES = st.tuples(st.integers(0, 3), st.integers(1, 6).map(lambda n: 4 * n), st.integers(1, 9))


def planes_of_size(count: int, height: int, half_width: int, seed: int) -> np.ndarray:
    shape = (count, height * 3 // 2, 2 * half_width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=60, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**32))
def test_planes_become_the_nearest_rgb(size, seed):
    planes = planes_of_size(*size, seed)
    planes.flags.writeable = False  # as what was read is
    exact = exact_rgb(planes)
    out = np.full(exact.shape, 77, dtype=np.uint8)
    planes_to_rgb(planes, out)
    # Two weights, each off by half of 1/65536, times chroma's 128.
    assert np.abs(out - exact).max(initial=0) < 0.5 + 128 / 65536


@settings(max_examples=60, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**32))
def test_planes_become_the_numbers_that_the_weights_say(size, seed):
    planes = planes_of_size(*size, seed)
    exact = exact_rgb(planes)
    scale, shift = np.array([0.5, 2.0, 1 / 255]), np.array([-3.0, 0.25, 1.0])
    chroma = np.array([[0, 1.402], [-0.114 * 1.772 / 0.587, -0.299 * 1.402 / 0.587], [1.772, 0]])
    chroma *= scale[:, None]
    columns = [scale, *chroma.T, shift - 128 * chroma.sum(axis=1), shift, shift + 255 * scale]
    out = np.full((len(planes), 3, *exact.shape[1:3]), np.nan, dtype=np.float32)
    weights = np.ascontiguousarray(np.stack(columns, axis=1), dtype=np.float32)
    planes_to_floats(planes, out, weights=weights)
    oracle = (exact * scale + shift).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(out, oracle, atol=2e-4)


@given(shape=st.tuples(st.integers(0, 4), st.integers(0, 40)), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_rows_are_scaled_and_shifted(shape, seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, shape, dtype=np.uint8)
    scale, shift = rng.normal(size=(2, shape[1])).astype(np.float32)
    out = np.empty(shape, dtype=np.float32)
    rows_to_floats(rows, out, scale=scale, shift=shift)
    np.testing.assert_allclose(out, rows.astype(np.float64) * scale + shift, atol=1e-4)


def test_memory_that_is_not_contiguous_is_refused():
    with pytest.raises(TypeError):
        planes_to_rgb(np.zeros((1, 6, 8), np.uint8)[:, :, ::2], np.zeros((1, 4, 4, 3), np.uint8))


def test_without_a_writable_cache_the_loops_are_still_compiled(monkeypatch):
    import numba

    def njit(*given, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(numba, "njit", njit)
    yuv_numba._compiled.cache_clear()
    try:
        out = np.empty((1, 4, 4, 3), np.uint8)
        planes = planes_of_size(1, 4, 2, seed=0)
        with np.errstate(over="ignore"):
            planes_to_rgb(planes, out)
    finally:
        yuv_numba._compiled.cache_clear()
    assert np.abs(out - exact_rgb(planes)).max() < 0.5 + 1e-3
