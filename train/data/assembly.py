"""From segments to windows: the one way for shards and for sessions read directly.

::

    WindowRows                 which rows hold a window's ticks, and where it is on the clock
      -> StreamLayout.ranges   which samples of each row's segment go to which positions
      -> read_segments         the source decodes these segments
      -> write_frames, ...     copy the samples; zeros and False where nothing was recorded
      -> gather_tokens         the tokens whose tick is in the window

Sample j of row r is sample r * m + j of its run, with m samples per segment. Nothing after the end
of the run or of the session is valid.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np

from shared.clock import EPSILON_S
from shared.kinds.audio import MASKED_LEVEL
from shared.kinds.text import token_ticks
from shared.recipe import PAD_TOKEN
from shared.streams import Kind
from shared.timing import no_timer
from train.data.batch import ReadWindow, WindowText
from train.data.order import EpochOrder, SampleOrder
from train.shapes import as_fraction, sample_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from shared.kinds.text import SegmentText
    from shared.recipe import Recipe
    from shared.timing import OnStage
    from train.data.order import BatchOrder, OrderSettings
    from train.data.windows import WindowGrid, WindowIndex
    from train.shapes import StreamShape, WindowShapes

_MAX_CACHED_RANGES = 1024


class WindowRows(NamedTuple):
    """Where a window's ticks are stored, and where they are on the session clock."""

    rows: range
    """Neighboring rows that hold consecutive segments."""
    first_tick: int
    """Ticks of the first row before the window."""
    num_ticks: int
    """Ticks of the window inside its run."""
    clock_tick: int
    """First tick of the window on the session clock."""
    duration_s: float


class SegmentRange(NamedTuple):
    """Samples of one segment, and where they go."""

    row: int
    """Number of the segment in the window's rows."""
    samples: slice | NDArray[np.int64]
    positions: slice | NDArray[np.int64]
    """As many positions of the window; a slice unless a tick has unused positions."""


class VideoSegment(NamedTuple):
    """One segment of a video."""

    error_s: NDArray[np.float32]
    """Time error of each frame [F]; NaN for masked frames."""
    write: Callable[[NDArray[np.int64], NDArray[np.uint8]], object]
    """Write the pictures of some frames, numbered in increasing order, in the layout of an array
    (see :mod:`shared.media.yuv`)."""


class StreamLayout:
    """Where the samples of a stream's segments go in a window."""

    def __init__(
        self, shape: StreamShape, *, num_ticks: int, tick_rate_hz: float, segment_s: float
    ) -> None:
        self.shape = shape
        self.per_segment = round(shape.rate_hz * segment_s)
        per_tick = as_fraction(shape.rate_hz) / as_fraction(tick_rate_hz)
        self._samples, self._ticks = per_tick.as_integer_ratio()
        self._positions = sample_positions(shape, num_ticks=num_ticks, tick_rate_hz=tick_rate_hz)
        self._is_contiguous = bool((self._positions == np.arange(len(self._positions))).all())
        self._ranges: dict[tuple[int, int], list[SegmentRange]] = {}

    def ranges(self, window: WindowRows) -> list[SegmentRange]:
        """Return the samples that a window takes of its segments, in order.

        Samples after the end of the run or of the session are left out, and so are frames that no
        tick sees.
        """
        first = self._count(window.first_tick)
        count = max(0, min(self._count(window.num_ticks), self.count_in_session(window)))
        cached = self._ranges.get((first, count))
        if cached is None:
            if len(self._ranges) >= _MAX_CACHED_RANGES:
                self._ranges.clear()
            cached = self._ranges[first, count] = self._cut(first, first + count)
        return cached

    def count_in_session(self, window: WindowRows) -> int:
        """Return the number of samples from a window's begin to the session's end."""
        in_session = math.ceil((window.duration_s - EPSILON_S) * self.shape.rate_hz)
        return in_session - self._count(window.clock_tick)

    def _count(self, num_ticks: int) -> int:
        """Return the number of samples in some ticks, which is whole at windows and segments."""
        return num_ticks * self._samples // self._ticks

    def _cut(self, start: int, stop: int) -> list[SegmentRange]:
        """Cut samples [start, stop), counted from the first row's begin, at segments."""
        ranges: list[SegmentRange] = []
        if stop <= start:
            return ranges
        for row in range(start // self.per_segment, -(-stop // self.per_segment)):
            row_start = row * self.per_segment
            begin, end = max(start, row_start), min(stop, row_start + self.per_segment)
            samples = slice(begin - row_start, end - row_start)
            positions = slice(begin - start, end - start)
            if self._is_contiguous:
                ranges.append(SegmentRange(row, samples, positions))
                continue
            own = self._positions[positions]
            if self.shape.kind is not Kind.VIDEO:
                ranges.append(SegmentRange(row, samples, own))
            elif len(seen := np.flatnonzero(own >= 0)):
                first, last = own[seen[[0, -1]]].tolist()
                ranges.append(SegmentRange(row, seen + samples.start, slice(first, last + 1)))
        return ranges


def make_layouts(shapes: WindowShapes, *, segment_s: float) -> dict[str, StreamLayout]:
    """Return the layout of every stream that is read, by name."""
    return {
        name: StreamLayout(
            shape, num_ticks=shapes.num_ticks, tick_rate_hz=shapes.tick_rate_hz, segment_s=segment_s
        )
        for name, shape in shapes.streams.items()
    }


class SegmentSource(ABC):
    """What the sources of stored segments share: their windows, and where each is stored."""

    recipe: Recipe
    fingerprint: str
    shapes: WindowShapes
    window_counts: NDArray[np.int64]
    _layouts: dict[str, StreamLayout]
    _windows: WindowIndex
    _ticks_per_segment: int

    @abstractmethod
    def runs(self) -> list[Sequence[int]]:
        """Return the lengths of the runs of each shard, in segments."""

    @abstractmethod
    def segment_at(self, shard: int, row: int) -> tuple[int, float]:
        """Return the number of the segment in a row, and the duration of its session."""

    def run_lengths_s(self) -> list[float]:
        """See :meth:`train.data.batch.SampleSource.run_lengths_s`."""
        return [num * self.recipe.segment_s for runs in self.runs() for num in runs]

    def identity(self) -> dict[str, Any]:
        """See :meth:`train.data.batch.SampleSource.identity`."""
        return {"fingerprint": self.fingerprint}

    def open_windows(self, shapes: WindowShapes, grid: WindowGrid) -> Self:
        """See :meth:`train.data.batch.SampleSource.open_windows`."""
        source, segment_s = copy.copy(self), self.recipe.segment_s
        source.shapes = shapes
        source._layouts = make_layouts(shapes, segment_s=segment_s)
        source._ticks_per_segment = round(segment_s * grid.tick_rate_hz)
        source._windows = grid.index(self.runs(), segment_s=segment_s)
        source.window_counts = source._windows.counts
        return source

    def batch_order(self, settings: OrderSettings) -> BatchOrder:
        """See :meth:`train.data.batch.SampleSource.batch_order`."""
        order = SampleOrder(self.window_counts, fingerprint=self.fingerprint, settings=settings)
        return EpochOrder(order, settings)

    def locate(self, shard: int, window: int) -> WindowRows:
        """Return where a window is stored and when it begins."""
        span = self._windows.locate(shard, window)
        segment, duration_s = self.segment_at(shard, span.first_row)
        return WindowRows(
            rows=range(span.first_row, span.first_row + span.num_rows),
            first_tick=span.first_tick,
            num_ticks=span.num_ticks,
            clock_tick=segment * self._ticks_per_segment + span.first_tick,
            duration_s=duration_s,
        )


def write_window(
    out: Mapping[str, NDArray[Any]],
    window: WindowRows,
    layouts: Mapping[str, StreamLayout],
    *,
    read_segments: Callable[[str, list[SegmentRange]], Mapping[int, Any]],
    on_stage: OnStage = no_timer,
) -> ReadWindow:
    """Write all streams of a window; see :meth:`train.data.batch.SampleSource.read_into`.

    `read_segments`: returns the segments that ranges of a stream need, by number in the window's
        rows, without rows that lack the stream: a :class:`VideoSegment`, samples with masked
        values marked, or a SegmentText.
    """
    texts: dict[str, WindowText] = {}
    num_members = 0
    for name, layout in layouts.items():
        ranges = layout.ranges(window)
        segments = read_segments(name, ranges) if ranges else {}
        num_members += len(segments)
        if layout.shape.kind is Kind.TEXT:
            texts[name] = gather_tokens(ranges, segments, window, layout=layout)
            if name in out:
                write_tokens(out[name], out[f"{name}_valid"], texts[name])
        else:
            write = _WRITERS[layout.shape.kind]
            write(out[name], out[f"{name}_valid"], ranges, segments)
        on_stage("decode")
    return ReadWindow(texts, num_members)


def write_frames(
    out: NDArray[np.uint8],
    valid: NDArray[np.bool_],
    ranges: Sequence[SegmentRange],
    segments: Mapping[int, VideoSegment],
) -> None:
    """Write the frames of a window; masked frames become zeros.

    `segments`: by number in the window's rows; a row that lacks the stream is left out.
    """
    valid[...] = False
    for row, samples, positions in ranges:
        if (segment := segments.get(row)) is None:
            continue
        is_valid = np.isfinite(segment.error_s[samples])
        if is_valid.any():
            frames = np.arange(len(segment.error_s))[samples]
            segment.write(frames, out[positions])
            valid[positions] = is_valid
    _clear_invalid(out, valid)


def write_samples(
    out: NDArray[Any],
    valid: NDArray[np.bool_],
    ranges: Sequence[SegmentRange],
    segments: Mapping[int, NDArray[Any]],
) -> None:
    """Write the readings or dMel levels of a window [positions, any]; see :func:`write_frames`.

    In a segment [samples, any], NaN marks masked readings, and MASKED_LEVEL masked levels.
    """
    has_levels = out.dtype == np.uint8
    out[...] = MASKED_LEVEL if has_levels else np.nan
    for row, samples, positions in ranges:
        if row in segments:
            out[positions] = segments[row][samples]
    if has_levels:
        np.not_equal(out[:, 0], MASKED_LEVEL, out=valid)
    else:
        np.logical_not(np.isnan(out).any(axis=1), out=valid)
    _clear_invalid(out, valid)


_WRITERS: Final[dict[Kind, Callable[..., None]]] = {
    Kind.VIDEO: write_frames,
    Kind.SENSOR: write_samples,
    Kind.AUDIO: write_samples,
}
"""How the segments of each kind become a window's array; text has :func:`gather_tokens`."""


def _clear_invalid(out: NDArray[Any], valid: NDArray[np.bool_]) -> None:
    """Write zeros where a window is not valid; whole arrays at the speed of memory."""
    num_valid = np.count_nonzero(valid)
    if num_valid == 0:
        out[...] = 0
    elif num_valid < len(valid):
        out[~valid] = 0


def gather_tokens(
    ranges: Sequence[SegmentRange],
    segments: Mapping[int, SegmentText],
    window: WindowRows,
    *,
    layout: StreamLayout,
) -> WindowText:
    """Return the tokens of a window: those whose own time is in one of its ticks.

    The tokens after the session's end belong to its last tick. They have later ticks, on which
    nothing is valid.

    `segments`: by number in the window's rows; a row that lacks the stream is left out.
    """
    is_valid = np.zeros(layout.shape.num_positions, dtype=np.bool_)
    ids: list[int] = []
    times_s: list[float] = []
    events_s: list[float] = []
    for row, _, positions in ranges:
        if (segment := segments.get(row)) is not None:
            is_valid[positions] = True
            ids += segment.ids
            times_s += segment.time_s
            events_s += segment.event_s
    ticks = token_ticks(times_s, tick_rate_hz=layout.shape.rate_hz) - window.clock_tick
    placed = np.minimum(ticks, layout.count_in_session(window) - 1)
    is_inside = (placed >= 0) & (placed < len(is_valid))
    return WindowText(
        ids=np.array(ids, dtype=np.int64)[is_inside],
        ticks=ticks[is_inside],
        event_s=np.array(events_s, dtype=np.float64)[is_inside],
        is_valid=is_valid,
    )


def write_tokens(out: NDArray[np.int64], valid: NDArray[np.bool_], text: WindowText) -> None:
    """Write tokens on their ticks; PAD marks silence."""
    out[...] = PAD_TOKEN
    on_tick = text.ticks < len(out)
    out[text.ticks[on_tick]] = text.ids[on_tick]
    out[~text.is_valid] = PAD_TOKEN
    valid[...] = text.is_valid
