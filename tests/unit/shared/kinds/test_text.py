"""Times of tokens: dense, never shared, never lost, the same for any cut into segments."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import Segment, count_segments, plan_segments
from shared.kinds.text import TextReader, TimedText, spoken_segments, time_tokens, token_ticks
from shared.streams import TextStream

RATES = st.sampled_from([1.0, 3.0, 5.0, 10.0, 12.5, 30.0])
EVENTS = st.lists(
    st.tuples(st.integers(0, 20_000_000).map(lambda us: us / 1e6), st.integers(0, 6)), max_size=12
).map(sorted)


class OneTokenPerByte:
    """A tokenizer with as many tokens as bytes, the most that there can be."""

    def encode(self, text: str) -> list[int]:
        """Return the bytes."""
        return list(text.encode())


@given(events=EVENTS, rate=RATES)
def test_tokens_are_at_least_a_step_apart_and_never_before_their_event(events, rate):
    ids, times_s, events_s = time_tokens(
        ((time_s, range(count)) for time_s, count in events), tokens_per_s=rate
    )
    assert ids == [i for _, count in events for i in range(count)]
    assert events_s == [time_s for time_s, count in events for _ in range(count)]
    for time_s, event_s in zip(times_s, events_s, strict=True):
        assert time_s >= event_s - 5e-7
    for before, after in itertools.pairwise(times_s):
        assert after - before >= 1 / rate - 1.1e-6


def test_an_event_starts_at_its_own_time_if_the_stream_is_free():
    _, times_s, _ = time_tokens([(0.25, [1, 2]), (0.3, [3]), (5.0, [4])], tokens_per_s=10)
    assert times_s == [0.25, 0.35, 0.45, 5.0]


@given(events=EVENTS, rate=RATES)
def test_no_two_tokens_share_a_tick_at_the_rate_of_tokens(events, rate):
    _, times_s, _ = time_tokens(
        ((time_s, range(count)) for time_s, count in events), tokens_per_s=rate
    )
    ticks = token_ticks(times_s, tick_rate_hz=rate)
    assert len(np.unique(ticks)) == len(ticks)


@given(events=EVENTS, rate=RATES, segment_s=st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_segments_joined_are_all_tokens_in_order(events, rate, segment_s):
    duration_s = 20.0
    texts = [TimedText(time_s, "x" * count) for time_s, count in events if time_s < duration_s]
    reader = TextReader(
        texts,
        TextStream(tokens_per_s=rate),
        tokenizer=OneTokenPerByte(),
        duration_s=duration_s,
        segment_s=segment_s,
    )
    segments = plan_segments(duration_s, segment_s)
    read = [reader.read(segment) for segment in segments]
    _, times_s, events_s = time_tokens(
        ((text.time_s, text.text.encode()) for text in texts), tokens_per_s=rate
    )
    assert [t for text in read for t in text.time_s] == times_s
    assert [t for text in read for t in text.event_s] == events_s
    assert [event for text in read for event in text.events] == texts
    for segment, text in zip(segments[:-1], read, strict=False):
        for time_s in text.time_s:
            assert segment.start_s - 1e-6 <= time_s < segment.stop_s
    assert all(t >= segments[-1].start_s - 1e-6 for t in read[-1].time_s)


@given(events=EVENTS, rate=RATES, segment_s=st.sampled_from([0.5, 2.0]))
def test_a_segment_that_counts_as_silent_has_no_token(events, rate, segment_s):
    spec = TextStream(tokens_per_s=rate)
    texts = [TimedText(time_s, "é" * count) for time_s, count in events if time_s < 20]
    segments = plan_segments(20.0, segment_s)
    reader = TextReader(
        texts, spec, tokenizer=OneTokenPerByte(), duration_s=20.0, segment_s=segment_s
    )
    spoken = spoken_segments(texts, segments, spec)
    for segment, is_spoken in zip(segments, spoken, strict=True):
        assert is_spoken or not reader.read(segment).ids


def test_segments_cover_a_session_and_no_more():
    assert count_segments(4.0, 2.0) == 2
    assert count_segments(4.0000001, 2.0) == 2  # closer than a recorder's microsecond
    assert count_segments(4.01, 2.0) == 3
    assert count_segments(0.0, 2.0) == 0
    for segment in plan_segments(7.3, 2.0):
        assert segment == Segment(segment.index, 2.0)
        assert math.isclose(segment.stop_s - segment.start_s, 2.0)
