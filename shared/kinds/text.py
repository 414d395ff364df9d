"""Text: give each token a time of its own, cut tokens into segments, encode and decode them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import EPSILON_S, count_segments, segment_of
from shared.errors import CorruptError
from shared.kinds.column import Column, stream_settings
from shared.streams import Kind, TextStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from shared.clock import Segment
    from shared.media.tokenizer import TextTokenizer
    from shared.recipe import Recipe

MAX_TEXT_BYTES = 16 << 20
"""A larger text member is refused without decoding it: parsed JSON takes many times its size."""

_TIME_DECIMALS = 6
"""Tokens' times are rounded to microseconds, so that JSON keeps them short."""


@dataclass(frozen=True, slots=True)
class TimedText:
    """A text that begins at a time on the session clock."""

    time_s: float
    text: str
    origin: str = field(default="", compare=False)
    """File and line, for messages."""
    recorded_s: float = field(default=0.0, compare=False)
    """Its timestamp on the recorder's clock, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentText:
    """The tokens of one text stream in a segment, and the events that begin there.

    The three tuples of tokens have the same length and are in order of time.
    """

    ids: tuple[int, ...] = ()
    time_s: tuple[float, ...] = ()
    """Own time of each token on the session clock; no two tokens are closer than
    1 / tokens_per_s."""
    event_s: tuple[float, ...] = ()
    """Per token, when its event began."""
    events: tuple[TimedText, ...] = ()


def columns(name: str, spec: TextStream, recipe: Recipe) -> tuple[Column, ...]:
    """Return the column of a text stream."""
    del recipe  # text has no fixed length
    return (
        Column(
            name=name,
            stream=name,
            kind=Kind.TEXT,
            codec="json",
            dtype="json",
            shape=(),
            unit="token ids and seconds on the session clock",
            max_bytes=MAX_TEXT_BYTES,
            settings=stream_settings(spec),
            uses_tokenizer=True,
        ),
    )


def time_tokens(
    events: Iterable[tuple[float, Sequence[int]]], *, tokens_per_s: float
) -> tuple[list[int], list[float], list[float]]:
    """Give each token a time: its event's begin, or that of the token before plus one step.

    So no two tokens of a stream share a step, however dense the events are. `events` are the time
    and tokens of each, in order of time.

    Returns:
        Ids, own times and event times of all tokens.
    """
    ids: list[int] = []
    times_s: list[float] = []
    events_s: list[float] = []
    free_s = -math.inf
    for event_s, tokens in events:
        begin_s = max(event_s, free_s)
        for number, token in enumerate(tokens):
            ids.append(token)
            times_s.append(round(begin_s + number / tokens_per_s, _TIME_DECIMALS))
            events_s.append(event_s)
        if tokens:
            free_s = begin_s + len(tokens) / tokens_per_s
    return ids, times_s, events_s


def spoken_segments(
    events: Sequence[TimedText], segments: Sequence[Segment], spec: TextStream
) -> NDArray[np.bool_]:
    """Mark the segments that may hold tokens, bool [N]; the others are silent for certain.

    A text has at most as many tokens as bytes, whatever the tokenizer.
    """
    is_spoken = np.zeros(len(segments), dtype=np.bool_)
    if not segments:
        return is_spoken
    free_s = -math.inf
    for event in events:
        begin_s = max(event.time_s, free_s)
        free_s = begin_s + len(event.text.encode()) / spec.tokens_per_s
        first = segment_of(begin_s, segments[0].duration_s)
        last = segment_of(free_s, segments[0].duration_s)
        is_spoken[max(0, first) : max(0, last + 1)] = True
    return is_spoken


class TextReader:
    """Reads the tokens of a session's segments.

    `events` are all of the stream within the session, in order of time; `duration_s` is the length
    of the session.
    """

    def __init__(
        self,
        events: Sequence[TimedText],
        spec: TextStream,
        *,
        tokenizer: TextTokenizer,
        duration_s: float,
        segment_s: float,
    ) -> None:
        self._events = events
        encoded = ((event.time_s, tokenizer.encode(event.text)) for event in events)
        tokens = time_tokens(encoded, tokens_per_s=spec.tokens_per_s)
        self._ids, self._times_s, self._events_s = tokens
        # Tokens after the session's end stay in its last segment, so that none is lost.
        last = max(0, count_segments(duration_s, segment_s) - 1)
        numbers = [min(last, segment_of(time_s, segment_s)) for time_s in self._times_s]
        self._token_segments = np.array(numbers, dtype=np.int64)
        event_numbers = [min(last, segment_of(event.time_s, segment_s)) for event in events]
        self._event_segments = np.array(event_numbers, dtype=np.int64)

    def read(self, segment: Segment) -> SegmentText:
        """Read the tokens whose own time is in a segment, and the events that begin in it."""
        bounds = [segment.index, segment.index + 1]
        start, stop = np.searchsorted(self._token_segments, bounds).tolist()
        first_event, last_event = np.searchsorted(self._event_segments, bounds).tolist()
        return SegmentText(
            ids=tuple(self._ids[start:stop]),
            time_s=tuple(self._times_s[start:stop]),
            event_s=tuple(self._events_s[start:stop]),
            events=tuple(self._events[first_event:last_event]),
        )


def token_ticks(time_s: Sequence[float], *, tick_rate_hz: float) -> NDArray[np.int64]:
    """Return the tick of each token on the session clock, int64."""
    times_s = np.asarray(time_s, dtype=np.float64)
    return np.floor((times_s + EPSILON_S / 2) * tick_rate_hz).astype(np.int64)


def encode_text(text: SegmentText) -> bytes:
    """Encode tokens, their times and the events as JSON."""
    values = {
        "ids": text.ids,
        "time_s": text.time_s,
        "event_s": text.event_s,
        "events": [{"time_s": e.time_s, "text": e.text} for e in text.events],
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def decode_text(member: bytes) -> SegmentText:
    """Decode the bytes of :func:`encode_text`.

    Raises:
        CorruptError: the bytes have another form, or are too many.
    """
    if len(member) > MAX_TEXT_BYTES:
        raise CorruptError(f"{len(member)} bytes of text exceed the limit of {MAX_TEXT_BYTES}")
    try:
        values: dict[str, Any] = json.loads(bytes(member))
        ids, time_s, event_s = values["ids"], values["time_s"], values["event_s"]
        if not len(ids) == len(time_s) == len(event_s):
            raise ValueError(f"{len(ids)} tokens, {len(time_s)} times, {len(event_s)} event times")
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError("a token is not a number from 0")
        return SegmentText(
            ids=tuple(ids),
            time_s=tuple(map(_seconds, time_s)),
            event_s=tuple(map(_seconds, event_s)),
            events=tuple(
                TimedText(_seconds(e["time_s"]), str(e["text"])) for e in values["events"]
            ),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptError(f"not a text member: {type(error).__name__}: {error}") from error


def _seconds(value: object) -> float:
    """Return a finite JSON number of seconds."""
    if type(value) not in (int, float) or not math.isfinite(number := float(value)):  # type: ignore[arg-type]
        raise ValueError(f"{value!r} is not a time")
    return number
