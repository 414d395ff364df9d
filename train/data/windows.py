"""The windows of a set as arithmetic: (shard, window) -> rows and ticks.

::

    runs of each shard, in segments   neighboring rows that hold consecutive segments of a session
      -> count_windows                a run of T ticks: 1 + max(0, ceil((T - window) / stride))
      -> WindowIndex.counts           windows of each shard, for train.data.order
      -> WindowIndex.locate           which rows to read, and which of their ticks

A window never leaves its run. The last window of a run may reach beyond the run's end, where it is
masked, so that every recorded tick is in a window.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from train.shapes import count_segment_ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from train.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowGrid:
    """Length and spacing of windows in ticks.

    Raises:
        ValueError: a length is not above 0, or ticks between two windows would be left out.
    """

    window_ticks: int
    stride_ticks: int
    """Ticks between the starts of windows, at most `window_ticks`."""
    tick_rate_hz: float

    def __post_init__(self) -> None:
        if not 1 <= self.stride_ticks <= self.window_ticks:
            raise ValueError(
                f"windows of {self.window_ticks} ticks, {self.stride_ticks} ticks apart, do not "
                "cover a recording; fix: set data.window.stride_s to at most duration_s"
            )

    @classmethod
    def from_config(cls, config: TrainConfig) -> WindowGrid:
        """Return the windows of a configuration, in the nearest whole ticks.

        :meth:`train.shapes.WindowShapes.from_recipe` refuses a configuration without whole ticks.
        """
        window, tick_rate_hz = config.data.window, config.model.tick_rate_hz
        window_ticks = max(1, round(window.duration_s * tick_rate_hz))
        return cls(
            window_ticks=window_ticks,
            stride_ticks=max(1, round(window.stride * tick_rate_hz)),
            tick_rate_hz=tick_rate_hz,
        )

    def as_touching(self) -> WindowGrid:
        """Return windows of this length that touch: a held-out pass reads every tick once."""
        return replace(self, stride_ticks=self.window_ticks)

    def as_state(self) -> dict[str, float]:
        """Return plain values that tell these windows from others, for checkpoints."""
        return {
            "window_s": self.window_ticks / self.tick_rate_hz,
            "stride_s": self.stride_ticks / self.tick_rate_hz,
            "tick_rate_hz": self.tick_rate_hz,
        }

    def index(self, runs: Sequence[Sequence[int]], *, segment_s: float) -> WindowIndex:
        """Return the windows of shards; see :class:`WindowIndex`."""
        return WindowIndex(
            runs,
            ticks_per_segment=count_segment_ticks(segment_s, self.tick_rate_hz),
            window_ticks=self.window_ticks,
            stride_ticks=self.stride_ticks,
        )


class WindowSpan(NamedTuple):
    """Where a window's ticks are stored."""

    first_row: int
    """Row of the segment that holds the first tick."""
    num_rows: int
    """Neighboring rows that hold the window's ticks."""
    first_tick: int
    """Ticks of the first row before the window."""
    num_ticks: int
    """Ticks of the window inside its run; the others are masked."""


class WindowIndex:
    """The windows of every shard, numbered from 0 in each.

    It holds 16 bytes per run and 24 per shard, whatever the number of windows.

    Args:
        runs: lengths in segments of each shard's runs, in the order of its rows.

    Attributes:
        counts: windows per shard, int64 [num_shards].
    """

    def __init__(
        self,
        runs: Sequence[Sequence[int]],
        *,
        ticks_per_segment: int,
        window_ticks: int,
        stride_ticks: int,
    ) -> None:
        num_runs = np.fromiter(map(len, runs), dtype=np.int64, count=len(runs))
        lengths = np.fromiter(
            itertools.chain.from_iterable(runs), dtype=np.int64, count=int(num_runs.sum())
        )
        windows = count_windows(
            lengths * ticks_per_segment, window_ticks=window_ticks, stride_ticks=stride_ticks
        )
        self._ticks_per_segment = ticks_per_segment
        self._window_ticks, self._stride_ticks = window_ticks, stride_ticks
        self._first_run = _sums_before(num_runs)
        self._first_window, self._first_row = _sums_before(windows), _sums_before(lengths)
        self.counts: NDArray[np.int64] = np.diff(self._first_window[self._first_run])

    def locate(self, shard: int, window: int) -> WindowSpan:
        """Return where a window is stored; O(log runs)."""
        if not 0 <= window < self.counts[shard]:
            raise IndexError(f"shard {shard} has {self.counts[shard]} windows, not {window}")
        first_run = self._first_run[shard]
        number = int(self._first_window[first_run]) + window
        run = int(np.searchsorted(self._first_window, number, side="right")) - 1
        run_row, run_stop = self._first_row[run : run + 2].tolist()
        start = (number - int(self._first_window[run])) * self._stride_ticks
        num_ticks = min(self._window_ticks, (run_stop - run_row) * self._ticks_per_segment - start)
        rows_before, first_tick = divmod(start, self._ticks_per_segment)
        return WindowSpan(
            first_row=run_row - int(self._first_row[first_run]) + rows_before,
            num_rows=-(-(first_tick + num_ticks) // self._ticks_per_segment),
            first_tick=first_tick,
            num_ticks=num_ticks,
        )


def count_windows(
    run_ticks: NDArray[np.int64], *, window_ticks: int, stride_ticks: int
) -> NDArray[np.int64]:
    """Return the number of windows of runs of some ticks each, int64 [runs]; 0 for an empty run."""
    beyond_first = -(-(run_ticks - window_ticks) // stride_ticks)
    return np.where(run_ticks > 0, 1 + np.maximum(0, beyond_first), 0)


def _sums_before(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sum of the values before each index, and of all at the end."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values)])
