"""Windows over segments equal windows that a slow reference makes sample by sample."""

from __future__ import annotations

import collections
import functools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.kinds.text import SegmentText
from shared.streams import Kind
from train.data.assembly import (
    StreamLayout,
    VideoSegment,
    WindowRows,
    make_layouts,
    write_window,
)
from train.data.batch import array_forms
from train.shapes import StreamShape, WindowShapes

TICK_RATES = (5, 10)
RATES = {
    Kind.SENSOR: (1, 5, 15, 30, 60, 90, 120, 200),
    Kind.AUDIO: (25, 50),
    Kind.VIDEO: (1, 5, 10, 15, 30),
    Kind.TEXT: (None,),
}
SIZES = {Kind.SENSOR: (3,), Kind.AUDIO: (4,), Kind.VIDEO: (16, 32), Kind.TEXT: ()}


def stream_shape(kind, rate_hz, num_ticks, tick_rate_hz):
    """Return a shape, with positions counted as docs/batch.md says."""
    rate_hz = rate_hz or tick_rate_hz
    per_tick = math.ceil(Fraction(rate_hz, tick_rate_hz)) if kind is not Kind.VIDEO else 1
    num_positions = num_ticks * per_tick
    if kind is Kind.VIDEO:
        num_positions = num_ticks * min(rate_hz, tick_rate_hz) // tick_rate_hz
    return StreamShape(
        kind=kind,
        rate_hz=rate_hz,
        per_tick=per_tick,
        num_positions=num_positions,
        size=SIZES[kind],
    )


@st.composite
def worlds(draw):
    """Draw streams, a run of segments of a session with gaps, and a window of it."""
    tick_rate = draw(st.sampled_from(TICK_RATES))
    kinds = draw(st.lists(st.sampled_from(list(Kind)), min_size=1, max_size=5))
    specs = {f"s{i}": (kind, draw(st.sampled_from(RATES[kind]))) for i, kind in enumerate(kinds)}
    rates = [tick_rate, *(rate for _, rate in specs.values() if rate)]
    period_ticks = tick_rate // math.gcd(*rates)  # a whole number of samples of everything
    segment_ticks = tick_rate * draw(st.sampled_from((1, 2)))
    num_segments, first_segment = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    num_ticks = period_ticks * draw(st.integers(1, 4 * segment_ticks // period_ticks))
    last = (num_segments * segment_ticks - 1) // period_ticks
    start = period_ticks * draw(st.integers(0, last))
    # The session may end inside the last segment, between two samples.
    left = draw(st.integers(1, 1000)) / 1000 if draw(st.booleans()) else 1.0
    duration_s = (first_segment + num_segments - 1 + left) * segment_ticks / tick_rate
    absent = draw(st.sets(st.tuples(st.sampled_from(sorted(specs)), st.integers(0, 4)), max_size=4))
    return SimpleNamespace(
        tick_rate=tick_rate,
        specs=specs,
        segment_ticks=segment_ticks,
        segment_s=segment_ticks / tick_rate,
        first_segment=first_segment,
        num_segments=num_segments,
        num_ticks=num_ticks,
        start=start,
        duration_s=duration_s,
        absent=absent,
        seed=draw(st.integers(0, 99)),
    )


def make_shapes(world):
    return WindowShapes(
        num_ticks=world.num_ticks,
        tick_rate_hz=world.tick_rate,
        streams={
            name: stream_shape(kind, rate, world.num_ticks, world.tick_rate)
            for name, (kind, rate) in sorted(world.specs.items())
        },
        inputs=tuple(sorted(world.specs)),
    )


@functools.cache
def samples_of_ticks(rate, tick_rate):
    """Return which samples each tick has: sample k belongs to tick floor(k * tick rate / rate)."""
    ticks = collections.defaultdict(list)
    for k in range(rate * 12):
        ticks[math.floor(Fraction(k, rate) * tick_rate)].append(k)
    return ticks


class Recording:
    """Random samples of every stream over the whole run, some masked."""

    def __init__(self, world):
        self.world = world
        rng = np.random.default_rng(world.seed)
        self.samples, self.valid = {}, {}
        for name, (kind, rate) in world.specs.items():
            count = world.num_segments * world.segment_ticks * (rate or 0) // world.tick_rate
            size = {Kind.VIDEO: (24, 32)}.get(kind, SIZES[kind])
            values = rng.integers(0, 200, (count, *size))
            self.samples[name] = values.astype(np.float32 if kind is Kind.SENSOR else np.uint8)
            self.valid[name] = rng.random(count) < 0.8
        # A token may begin anywhere; at most one per tick.
        self.tokens = {}
        for name, (kind, _) in world.specs.items():
            ticks = np.arange(world.num_segments * world.segment_ticks) if kind is Kind.TEXT else []
            ticks = [int(t) for t in ticks if rng.random() < 0.4]
            offsets = rng.choice([0, 1e-6, 0.03, 0.0999], len(ticks))
            first = world.first_segment * world.segment_ticks
            self.tokens[name] = [
                (first + tick, (first + tick + offset) / world.tick_rate, int(rng.integers(1, 99)))
                for tick, offset in zip(ticks, offsets * world.tick_rate, strict=True)
            ]

    def segment(self, name, number):
        """Return one segment as a source gives it; number counts from the run's begin."""
        world, (kind, rate) = self.world, self.world.specs[name]
        if kind is Kind.TEXT:
            first = (world.first_segment + number) * world.segment_ticks
            own = [t for t in self.tokens[name] if first <= t[0] < first + world.segment_ticks]
            times_s = tuple(t[1] for t in own)
            ids = tuple(t[2] for t in own)
            return SegmentText(ids=ids, time_s=times_s, event_s=times_s, events=())
        count = rate * world.segment_ticks // world.tick_rate
        part = slice(number * count, (number + 1) * count)
        samples, valid = self.samples[name][part].copy(), self.valid[name][part]
        if kind is not Kind.VIDEO:
            samples[~valid] = np.nan if kind is Kind.SENSOR else 255
            return samples

        def write(frames, out):
            out[...] = samples[frames]

        return VideoSegment(np.where(valid, 0, np.nan).astype(np.float32), write)

    def expected(self, name, position):
        """Return the value at a position of the window and whether it is valid, slowly."""
        world, (kind, rate) = self.world, self.world.specs[name]
        first = world.first_segment * world.segment_ticks
        if kind is Kind.TEXT:
            clock_tick = first + world.start + position
            is_valid = self.has(name, Fraction(clock_tick, world.tick_rate))
            ids = [token for tick, _, token in self.tokens[name] if tick == clock_tick]
            return (ids[0] if ids and is_valid else 0), is_valid
        run_begin = Fraction(first, world.tick_rate)
        window_begin = run_begin + Fraction(world.start, world.tick_rate)
        # Which sample of the window is at this position?
        if kind is Kind.VIDEO:
            sample = position if rate <= world.tick_rate else position * rate // world.tick_rate
        else:
            tick, place = divmod(position, math.ceil(Fraction(rate, world.tick_rate)))
            of_tick = samples_of_ticks(rate, world.tick_rate)[tick]
            sample = of_tick[place] if place < len(of_tick) else None
        zero = np.zeros(self.samples[name].shape[1:])
        if sample is None:
            return zero, False
        time = window_begin + Fraction(sample, rate)
        number = (time - run_begin) * rate
        assert number.denominator == 1
        if not self.has(name, time) or not self.valid[name][int(number)]:
            return zero, False
        return self.samples[name][int(number)], True

    def has(self, name, time):
        """Return whether a time is in the run, in the session, and in a segment with the stream."""
        world = self.world
        number = int(time * world.tick_rate // world.segment_ticks) - world.first_segment
        in_session = time < Fraction(world.duration_s) - Fraction(1, 10**6)
        return number < world.num_segments and in_session and (name, number) not in world.absent


def read(world, recording):
    """Return the arrays of the window, as the engine writes them, and what it returns."""
    shapes = make_shapes(world)
    forms = array_forms(1, shapes=shapes, pixels="yuv420")
    out = {  # old content must not matter
        name: np.full(form.shape[1:], 7 if form.dtype != bool else True, form.dtype)
        for name, form in forms.items()
        if name != "weight"
    }
    rows_before, first_tick = divmod(world.start, world.segment_ticks)
    in_run = min(world.num_ticks, world.num_segments * world.segment_ticks - world.start)
    num_rows = -(-(first_tick + in_run) // world.segment_ticks)
    window = WindowRows(
        rows=range(rows_before, rows_before + num_rows),
        first_tick=first_tick,
        num_ticks=in_run,
        clock_tick=world.first_segment * world.segment_ticks + world.start,
        duration_s=world.duration_s,
    )

    def read_segments(name, ranges):
        assert ranges
        rows = {part.row for part in ranges}
        assert rows <= set(range(num_rows))
        return {
            row: recording.segment(name, rows_before + row)
            for row in rows
            if (name, rows_before + row) not in world.absent
        }

    layouts = make_layouts(shapes, segment_s=world.segment_s)
    return out, write_window(out, window, layouts, read_segments=read_segments), shapes


@given(world=worlds())
def test_a_window_equals_the_slow_reference_for_every_kind(world):
    recording = Recording(world)
    out, _, shapes = read(world, recording)
    for name, shape in shapes.streams.items():
        if name not in out:  # text alone is packed, not put on ticks
            continue
        for position in range(shape.num_positions):
            value, is_valid = recording.expected(name, position)
            where = f"{name} {world.specs[name]} at {position}"
            assert out[f"{name}_valid"][position] == is_valid, where
            assert np.array_equal(out[name][position], value), where


@given(world=worlds())
def test_tokens_of_a_window_are_those_of_its_ticks_in_order(world):
    recording = Recording(world)
    _, (texts, _), shapes = read(world, recording)
    assert sorted(texts) == [n for n, s in shapes.streams.items() if s.kind is Kind.TEXT]
    for name, text in texts.items():
        expected = [recording.expected(name, t)[1] for t in range(world.num_ticks)]
        assert text.is_valid.tolist() == expected
        first = world.first_segment * world.segment_ticks
        begin, last = first + world.start, math.ceil((world.duration_s - 1e-6) * world.tick_rate)
        tokens = [
            (tick - begin, token)
            for tick, _, token in recording.tokens[name]
            if begin <= min(tick, last - 1) < begin + world.num_ticks
            and (name, (tick - first) // world.segment_ticks) not in world.absent
        ]
        assert list(zip(text.ticks, text.ids, strict=True)) == tokens


@given(world=worlds())
def test_only_segments_that_are_there_count_as_read(world):
    recording = Recording(world)
    _, (_, num_members), _ = read(world, recording)
    assert 0 <= num_members <= len(world.specs) * world.num_segments


def test_frames_that_no_tick_sees_are_not_decoded():
    shape = stream_shape(Kind.VIDEO, 30, num_ticks=5, tick_rate_hz=10)
    layout = StreamLayout(shape, num_ticks=5, tick_rate_hz=10, segment_s=1.0)
    window = WindowRows(rows=range(1), first_tick=2, num_ticks=5, clock_tick=2, duration_s=9.0)
    (part,) = layout.ranges(window)
    assert part.samples.tolist() == [6, 9, 12, 15, 18]
    assert part.positions == slice(0, 5)


@pytest.mark.parametrize(("start", "kept"), [(0, []), (4, [2, 3, 4, 5]), (8, [])])
def test_tokens_after_the_sessions_end_belong_to_its_last_tick_and_are_on_none(start, kept):
    """The session ends within tick 7; its last segment has 10 ticks, and the window 4."""
    shape = stream_shape(Kind.TEXT, None, num_ticks=4, tick_rate_hz=10)
    shapes = WindowShapes(num_ticks=4, tick_rate_hz=10, streams={"t": shape}, inputs=("t",))
    window = WindowRows(
        rows=range(1), first_tick=start, num_ticks=4, clock_tick=start, duration_s=0.73
    )
    times_s = (0.2, 0.7, 0.8, 1.1, 1e9)
    text = SegmentText(ids=(1, 2, 3, 4, 5), time_s=times_s, event_s=(0.2,) * 5, events=())
    layouts = make_layouts(shapes, segment_s=1.0)
    out = {"t": np.full(4, 7), "t_valid": np.ones(4, dtype=bool)}
    read = write_window(out, window, layouts, read_segments=lambda *_: {0: text})
    assert read.texts["t"].ids.tolist() == ([1] if start == 0 else kept)
    expected = {0: [0, 0, 1, 0], 4: [0, 0, 0, 2], 8: [0, 0, 0, 0]}[start]
    assert out["t"].tolist() == expected
    assert out["t_valid"].tolist() == [start + t < 8 for t in range(4)]


@pytest.mark.parametrize("segment_s", [1.0, 2.0])
def test_a_window_reads_each_sample_once(segment_s):
    shape = stream_shape(Kind.SENSOR, 30, num_ticks=40, tick_rate_hz=10)
    layout = StreamLayout(shape, num_ticks=40, tick_rate_hz=10, segment_s=segment_s)
    window = WindowRows(rows=range(5), first_tick=4, num_ticks=40, clock_tick=4, duration_s=99.0)
    ranges = layout.ranges(window)
    assert sum(p.samples.stop - p.samples.start for p in ranges) == shape.num_positions
    assert [p.positions.start for p in ranges[1:]] == [p.positions.stop for p in ranges[:-1]]
