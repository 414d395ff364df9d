"""Text events in the report: marks with labels that don't overlap, and a list to read.

What others wrote is shown in one line, cut to a bounded length, with control characters written
out; the template escapes it.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preprocess.validate.axes import PLOT_WIDTH, say_time
from shared.recipe import Stream

if TYPE_CHECKING:
    from preprocess.validate.axes import TimeAxis
    from preprocess.validate.probe import SessionProbe
    from shared.session.folder import TextEvent

_MAX_LANES = 5
_MAX_MARKS = 500
_MAX_LISTED = 250
_MAX_LISTED_CHARS = 300
_MAX_TITLE_CHARS = 80
_LABEL_CHARS = (100, 60, 36, 20, 12)
"""A label is cut after so many characters: the first number at which all of them have room."""

_CHAR_WIDTH = 6.7


@dataclass(frozen=True, slots=True)
class TextMark:
    """A text event at its place."""

    x: float
    lane: int
    """-1 where there is no room for its words."""
    anchor: str
    label: str
    title: str


@dataclass(frozen=True, slots=True)
class TextLanes:
    """The events of one text stream, in lanes so that labels don't overlap."""

    name: str
    num_lanes: int
    marks: list[TextMark]


@dataclass(frozen=True, slots=True)
class ListedText:
    """A text event in the list below the pictures."""

    time: str
    stream: str
    text: str
    is_outside: bool


def list_texts(evidence: SessionProbe) -> list[ListedText]:
    """The first events of a session, by time."""
    return [
        ListedText(
            say_time(event.time_s - evidence.offset_s),
            event.stream.value,
            readable(event.text, max_chars=_MAX_LISTED_CHARS),
            not _is_inside(event.time_s - evidence.offset_s, evidence),
        )
        for event in evidence.events[:_MAX_LISTED]
    ]


def draw_lanes(evidence: SessionProbe, axis: TimeAxis) -> list[TextLanes]:
    """Text events as marks; labels as long as can be while every event has room for one."""
    found: list[TextLanes] = []
    for stream in (Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT):
        events = _thinned([e for e in evidence.events if e.stream is stream], evidence, axis)
        for max_chars in _LABEL_CHARS:
            stops = [-math.inf] * _MAX_LANES
            marks = [_mark(e, evidence, axis, stops, max_chars=max_chars) for e in events]
            if all(mark.lane >= 0 for mark in marks):
                break
        if marks:
            num_lanes = max(mark.lane + 1 for mark in marks)
            found.append(TextLanes(stream.value, max(1, num_lanes), marks))
    return found


def readable(text: str, *, max_chars: int) -> str:
    """A text in one line that can't reorder or hide its surroundings: control characters are
    written as escapes, and it is cut after so many characters.
    """
    line = " ".join(text[: 4 * max_chars].split())
    plain = "".join(
        c if unicodedata.category(c)[0] != "C" or c == "\u200d" else f"\\u{ord(c):04x}"
        for c in line[:max_chars]
    )
    is_cut = len(line) > max_chars or len(text) > 4 * max_chars
    return f"{plain[: max_chars - 3]}..." if is_cut else plain


def _thinned(events: list[TextEvent], evidence: SessionProbe, axis: TimeAxis) -> list[TextEvent]:
    """All events, or of very many the first at each place that can be told apart."""
    if len(events) <= _MAX_MARKS:
        return events
    first: dict[int, TextEvent] = {}
    for event in events:
        place = axis.x(event.time_s - evidence.offset_s) * _MAX_MARKS / PLOT_WIDTH
        first.setdefault(int(place), event)
    return list(first.values())


def _mark(
    event: TextEvent, evidence: SessionProbe, axis: TimeAxis, stops: list[float], *, max_chars: int
) -> TextMark:
    """One event in the first lane that has room; writes into `stops` where its label ends."""
    time_s = event.time_s - evidence.offset_s
    x, label = axis.x(time_s), readable(event.text, max_chars=max_chars)
    title = f"{say_time(time_s)}: {readable(event.text, max_chars=_MAX_TITLE_CHARS)}"
    if not _is_inside(time_s, evidence):
        label = f"({say_time(time_s)}) {label}"
    num_cells = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in label)
    width = 12 + _CHAR_WIDTH * num_cells
    is_at_end = x + width > PLOT_WIDTH
    left, right = (x - width, x + 4) if is_at_end else (x, x + width)
    lane = next((i for i, stop in enumerate(stops) if left >= stop), -1)
    if lane >= 0:
        stops[lane] = right
    return TextMark(x, lane, "end" if is_at_end else "start", label if lane >= 0 else "", title)


def _is_inside(time_s: float, evidence: SessionProbe) -> bool:
    """Whether a time lies in the session."""
    return 0 <= time_s <= evidence.length_s
