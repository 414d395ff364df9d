"""Counts and places of windows against a slow reference that walks every tick in Python."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.errors import ConfigError
from train.config import TrainConfig, load_train_config
from train.data.windows import WindowGrid, WindowIndex, WindowSpan


def make_index(runs, *, ticks_per_segment=4, window=6, stride=3):
    return WindowIndex(
        runs, ticks_per_segment=ticks_per_segment, window_ticks=window, stride_ticks=stride
    )


def slow_windows(runs, *, ticks_per_segment, window, stride):
    """Return every window of one shard as its list of (row, tick in the row)."""
    windows, first_row = [], 0
    for length in runs:
        ticks = [(first_row + s, t) for s in range(length) for t in range(ticks_per_segment)]
        start = 0
        while ticks:
            windows.append(ticks[start : start + window])
            if start + window >= len(ticks):
                break
            start += stride
        first_row += length
    return windows


def ticks_of(span, ticks_per_segment):
    """Return a located window as its list of (row, tick in the row)."""
    ticks = range(span.first_tick, span.first_tick + span.num_ticks)
    return [
        (span.first_row + tick // ticks_per_segment, tick % ticks_per_segment) for tick in ticks
    ]


def all_ticks(runs, ticks_per_segment):
    return set(itertools.product(range(sum(runs)), range(ticks_per_segment)))


run_lengths = st.lists(st.integers(0, 6), max_size=6)
shards = st.lists(run_lengths, min_size=1, max_size=5)
ticks = st.integers(1, 9)
grids = st.tuples(st.integers(1, 30), st.integers(1, 30)).map(lambda pair: (max(pair), min(pair)))


@given(runs=shards, ticks_per_segment=ticks, grid=grids)
def test_every_window_is_the_slow_references(runs, ticks_per_segment, grid):
    window, stride = grid
    index = make_index(runs, ticks_per_segment=ticks_per_segment, window=window, stride=stride)
    for shard, shard_runs in enumerate(runs):
        expected = slow_windows(
            shard_runs, ticks_per_segment=ticks_per_segment, window=window, stride=stride
        )
        found = [
            ticks_of(index.locate(shard, w), ticks_per_segment) for w in range(index.counts[shard])
        ]
        assert found == expected


@given(runs=shards, ticks_per_segment=ticks, grid=grids)
def test_windows_together_cover_every_tick(runs, ticks_per_segment, grid):
    window, stride = grid
    index = make_index(runs, ticks_per_segment=ticks_per_segment, window=window, stride=stride)
    for shard, shard_runs in enumerate(runs):
        spans = [index.locate(shard, w) for w in range(index.counts[shard])]
        covered = {tick for span in spans for tick in ticks_of(span, ticks_per_segment)}
        assert covered == all_ticks(shard_runs, ticks_per_segment)


@given(runs=shards, ticks_per_segment=ticks, window=st.integers(1, 30))
def test_touching_windows_cover_every_tick_once(runs, ticks_per_segment, window):
    grid = WindowGrid(window_ticks=window, stride_ticks=1, tick_rate_hz=1.0).as_touching()
    index = grid.index(runs, segment_s=ticks_per_segment)
    for shard, shard_runs in enumerate(runs):
        spans = [index.locate(shard, w) for w in range(index.counts[shard])]
        covered = [tick for span in spans for tick in ticks_of(span, ticks_per_segment)]
        assert len(covered) == len(set(covered)) == sum(shard_runs) * ticks_per_segment


@given(runs=shards, ticks_per_segment=ticks, grid=grids)
def test_a_window_reads_only_rows_that_it_needs(runs, ticks_per_segment, grid):
    window, stride = grid
    index = make_index(runs, ticks_per_segment=ticks_per_segment, window=window, stride=stride)
    for shard in range(len(runs)):
        for span in (index.locate(shard, w) for w in range(index.counts[shard])):
            assert 0 <= span.first_tick < ticks_per_segment
            assert 1 <= span.num_ticks <= window
            rows = {row for row, _ in ticks_of(span, ticks_per_segment)}
            assert rows == set(range(span.first_row, span.first_row + span.num_rows))


@given(length=st.integers(1, 40), ticks_per_segment=ticks, grid=grids)
def test_a_run_gives_as_many_windows_as_the_formula(length, ticks_per_segment, grid):
    window, stride = grid
    index = make_index(
        [[length]], ticks_per_segment=ticks_per_segment, window=window, stride=stride
    )
    beyond = length * ticks_per_segment - window
    assert index.counts.tolist() == [1 + max(0, int(np.ceil(beyond / stride)))]


@given(runs=run_lengths, grid=grids)
def test_dividing_runs_among_shards_changes_no_window(runs, grid):
    assume(any(runs))
    window, stride = grid
    together = make_index([runs], window=window, stride=stride)
    apart = make_index([[length] for length in runs], window=window, stride=stride)
    assert together.counts.sum() == apart.counts.sum()
    found, first_row = [], 0
    for shard, length in enumerate(runs):
        for w in range(apart.counts[shard]):
            span = apart.locate(shard, w)
            found.append(span._replace(first_row=span.first_row + first_row))
        first_row += length
    assert found == [together.locate(0, w) for w in range(together.counts[0])]


def test_the_last_window_reaches_beyond_the_run():
    index = make_index([[2, 1]], ticks_per_segment=20, window=40, stride=30)
    assert index.counts.tolist() == [2]
    assert index.locate(0, 0) == WindowSpan(first_row=0, num_rows=2, first_tick=0, num_ticks=40)
    assert index.locate(0, 1) == WindowSpan(first_row=2, num_rows=1, first_tick=0, num_ticks=20)


def test_a_window_may_be_shorter_than_a_segment_and_begin_inside_one():
    index = make_index([[2]], ticks_per_segment=20, window=10, stride=10)
    assert index.locate(0, 3) == WindowSpan(first_row=1, num_rows=1, first_tick=10, num_ticks=10)


@pytest.mark.parametrize("window", [-1, 2])
def test_a_window_that_a_shard_lacks_is_refused(window):
    with pytest.raises(IndexError, match="shard 1 has 2 windows"):
        make_index([[5], [2]]).locate(1, window)


def test_a_million_segments_in_ten_thousand_shards_are_counted_at_once():
    runs = [[60, 40]] * 10_000
    began_s = time.perf_counter()
    index = make_index(runs, ticks_per_segment=20, window=160, stride=2)
    assert index.counts.sum() == 10_000 * (1 + 520 + 1 + 320)
    assert index.locate(9_999, 841).num_ticks == 160
    assert time.perf_counter() - began_s < 1
    held = sum(array.nbytes for array in vars(index).values() if isinstance(array, np.ndarray))
    assert held < 16 * 20_000 + 24 * 10_000


def test_a_configuration_gives_ticks():
    config = TrainConfig.model_validate(
        {"data": {"window": {"duration_s": 8, "stride_s": 0.5}}, "model": {"tick_rate_hz": 20}}
    )
    grid = WindowGrid.from_config(config)
    assert grid == WindowGrid(window_ticks=160, stride_ticks=10, tick_rate_hz=20)
    assert grid.as_touching().stride_ticks == 160


def test_windows_that_leave_ticks_out_are_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {window: {duration_s: 4, stride_s: 5}}\n")
    with pytest.raises(ConfigError, match=r"stride_s 5 exceeds duration_s 4.*at most 4"):
        load_train_config(path)
    with pytest.raises(ValueError, match="do not cover"):
        WindowGrid(window_ticks=4, stride_ticks=5, tick_rate_hz=1)


def test_segments_without_whole_ticks_are_refused():
    grid = WindowGrid(window_ticks=4, stride_ticks=4, tick_rate_hz=3.0)
    with pytest.raises(ConfigError, match=r"gives 1\.5 ticks in a segment of 0\.5 s.*_hz to 4"):
        grid.index([[3]], segment_s=0.5)
