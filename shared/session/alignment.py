"""Align the streams of a session on its clock; shards and validation share these rules.

Audio and video begin where their container says, counted from the container's start. Readings and
texts begin at their timestamps, minus one offset that all timestamped files of the session share.
``session.json`` can declare when any stream begins, and how fast its clock ran.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import Interval, clock_offset
from shared.kinds import sensor
from shared.kinds.text import TimedText
from shared.machine import read_bytes
from shared.session.folder import SESSION_INFO_FILE
from shared.streams import METADATA_FILE, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.recipe import Recipe
    from shared.session.lines import SessionLines, TextEvent
    from shared.streams import SensorStream

TEXT_TAIL_S = 1.0
"""A session that has only texts ends this long after its last event began."""

MAX_SESSION_S = 24 * 3600.0
"""Everything later is ignored: one wrong timestamp must not create a billion segments."""

MEDIA_KINDS = (Kind.VIDEO, Kind.AUDIO)
"""Streams without timestamps on the recorder's clock."""

_STARTS_KEY, STRETCH_KEY = "start_s", "stretch"
_LIMITS = {
    _STARTS_KEY: (-MAX_SESSION_S, MAX_SESSION_S, "seconds on the session clock, up to 86400"),
    STRETCH_KEY: (0.5, 2.0, "a factor of 0.5 to 2"),
}
"""Least and greatest value of each key of ``session.json``, and what it means."""

EPOCH_S, MAX_EPOCH_S = 1e8, 2e11
"""Times from here on count from a date; no year is later than MAX_EPOCH_S."""

TEXT_TOLERANCE_S = 1.0
"""Texts this far outside the session can still be on its clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """When streams begin on the session clock, and how fast their own clocks run."""

    starts: Mapping[str, float] = field(default_factory=dict)
    """Start of each stream that begins elsewhere than by default."""
    stretches: Mapping[str, float] = field(default_factory=dict)
    """Factor of the times since the start of each stream whose clock is wrong."""
    error: str | None = None
    """What is wrong with ``session.json``; the position of every stream is unknown then."""
    undeclared: tuple[str, ...] = ()
    """Names that the recipe does not declare; they are ignored."""


@dataclass(slots=True, kw_only=True)
class Alignment:
    """When each stream of a session begins and ends; all times on the session clock."""

    offset_s: float = 0.0
    """Subtracted from the recorder's timestamps."""
    stop_s: float = 0.0
    """End of the last stream, however late."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Why a sensor or text stream is missing."""
    times_s: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Times of each sensor's readings."""
    events: dict[str, tuple[TimedText, ...]] = field(default_factory=dict)
    """Events of each text stream within the session."""
    texts: dict[str, tuple[TimedText, ...]] = field(default_factory=dict)
    """All events of each text stream."""
    not_recorded: set[str] = field(default_factory=set)
    """Missing streams without any reading or event."""
    starts: dict[str, float] = field(default_factory=dict)
    """Start of each sensor or text stream that has one of its own."""
    notes: list[str] = field(default_factory=list)
    """One sentence per stream that is not on the clock that it should be on."""
    outside: list[str] = field(default_factory=list)
    """One sentence per event outside the session."""

    @property
    def duration_s(self) -> float:
        """Seconds from the clock's zero to the end of the session."""
        return min(self.stop_s, MAX_SESSION_S)


def align_streams(
    media: Mapping[str, Interval],
    lines: SessionLines,
    *,
    placement: Placement,
    recipe: Recipe,
) -> Alignment:
    """Put sensors and texts on the clock of the media, each of which has an interval."""
    media_stop_s = max((interval.stop_s for interval in media.values()), default=None)
    offset_s = recorder_offset(lines, media_stop_s, starts=placement.starts, recipe=recipe)
    streams = Alignment(offset_s=offset_s, intervals=dict(media))
    for name, start_s in placement.starts.items():
        if recipe.streams[name].kind not in MEDIA_KINDS:
            streams.starts[name] = start_s
    for name, spec in recipe.sensors.items():
        times_s = lines.readings[name].times_s
        placed_s = session_times(name, times_s, offset_s, placement=placement, recipe=recipe)
        _align_sensor(name, placed_s, streams, spec=spec, media_stop_s=media_stop_s)
    texts = {
        name: shift_events(name, lines.events[name], offset_s, placement=placement, recipe=recipe)
        for name in recipe.of_kind(Kind.TEXT)
    }
    stops_s = [interval.stop_s for interval in streams.intervals.values()]
    if not stops_s:
        stops_s = [events[-1].time_s + TEXT_TAIL_S for events in texts.values() if events]
    streams.stop_s = max([0.0, *stops_s])
    for name, events in texts.items():
        own_start_s = _start_on_session_clock(events, streams)
        is_shared = name not in placement.starts and recipe.streams[name].clock == "session"
        if own_start_s is not None and is_shared:
            streams.starts[name] = own_start_s
            streams.notes.append(
                f"{recipe.streams[name].file}: {name} is on the session clock, the other files are "
                f"{offset_s:g} s later; its times are kept"
            )
            placed_at = replace(placement, starts={**placement.starts, name: own_start_s})
            recorded = lines.events[name]
            events = shift_events(name, recorded, offset_s, placement=placed_at, recipe=recipe)
        streams.texts[name] = events
        _align_text(name, events, streams)
    for name in sorted(streams.not_recorded):
        if issue := lines.find_cause(name, recipe.streams[name].file):
            streams.absent[name] = f"{issue.source_line}: {issue.message}"
            streams.not_recorded.remove(name)
    return streams


def _start_on_session_clock(events: Sequence[TimedText], streams: Alignment) -> float | None:
    """Return the first recorded time of texts that are inside the session only as recorded."""
    recorded_s = [event.recorded_s for event in events]
    if not events or not streams.intervals:
        return None

    def is_inside(time_s: float) -> bool:
        return -TEXT_TOLERANCE_S <= time_s <= streams.duration_s + TEXT_TOLERANCE_S

    is_apart = not any(is_inside(event.time_s) for event in events)
    return recorded_s[0] if is_apart and all(map(is_inside, recorded_s)) else None


def _clock_fix(name: str, recorded_s: float) -> str:
    """Return the fix for a stream outside the session, which began at a recorded time."""
    if recorded_s < EPOCH_S:
        return f"fix: correct its timestamps, or declare its start in {SESSION_INFO_FILE}"
    date = datetime.fromtimestamp(min(recorded_s, MAX_EPOCH_S), tz=UTC)
    return (
        f"its times look like seconds since 1970, from {date:%Y-%m-%d %H:%M:%S} UTC on, and "
        f'nothing says when the session began; fix: write "start_s": {{"{name}": SECONDS}} into '
        f"{SESSION_INFO_FILE}, with the time of its first entry on the session clock"
    )


def recorder_offset(
    lines: SessionLines, media_stop_s: float | None, *, starts: Mapping[str, float], recipe: Recipe
) -> float:
    """Return the seconds to subtract from the recorder's timestamps.

    The files of sensors decide, by the union of their first and last times; without lines in them,
    the texts do. Streams with a clock or a start of their own have no say.
    """
    shared = {n for n, s in recipe.streams.items() if s.clock == "session"} - starts.keys()
    files = [f for f in lines.files if len(f.times_s) and not shared.isdisjoint(f.streams)]
    timed = shared & recipe.sensors.keys()
    sensors = [f for f in files if f.file == METADATA_FILE or not timed.isdisjoint(f.streams)]
    times_s = [float(f.times_s[end]) for f in sensors or files for end in (0, -1)]
    if not times_s:
        return 0.0
    first_s, last_s = min(times_s), max(times_s)
    if sensors or media_stop_s is None:
        return clock_offset(first_s, last_s, media_stop_s)
    # When the last text begins says nothing about the session's end.
    return first_s if first_s >= media_stop_s else 0.0


def session_times(
    name: str, times_s: NDArray[np.float64], offset_s: float,
    *, placement: Placement, recipe: Recipe,
) -> NDArray[np.float64]:  # fmt: skip
    """Return the times of a sensor or text stream on the session clock.

    The files of the session share `offset_s`. Of a stretched stream, the times since its start are
    multiplied; texts without a start of their own are stretched from the clock's zero on.
    """
    if not len(times_s):
        return times_s
    start_s = placement.starts.get(name)
    own_s = 0.0 if recipe.streams[name].clock == "own" else offset_s
    placed_s = times_s - (own_s if start_s is None else float(times_s[0]) - start_s)
    stretch = placement.stretches.get(name, 1.0)
    if stretch == 1:
        return placed_s
    is_from_zero = start_s is None and recipe.streams[name].kind is Kind.TEXT
    origin_s = 0.0 if is_from_zero else float(placed_s[0])
    return origin_s + (placed_s - origin_s) * stretch


def _align_sensor(
    name: str, times_s: NDArray[np.float64], streams: Alignment,
    *, spec: SensorStream, media_stop_s: float | None,
) -> None:  # fmt: skip
    """Place the readings of a sensor on the clock, or note why it is absent."""
    interval = sensor.interval_of(times_s, spec)
    limit_s = MAX_SESSION_S if media_stop_s is None else media_stop_s
    if interval is None:
        streams.absent[name] = f"{spec.file} holds no usable reading of it"
        streams.not_recorded.add(name)
    elif interval.start_s >= limit_s or interval.stop_s <= 0:
        streams.absent[name] = (
            f"{spec.file} is at {interval.start_s:g} to {interval.stop_s:g} s, outside the session "
            f"of {limit_s:g} s; {_clock_fix(name, interval.start_s)}"
        )
    else:
        streams.times_s[name] = times_s
        streams.intervals[name] = interval


def shift_events(
    name: str, events: Sequence[TextEvent], offset_s: float,
    *, placement: Placement, recipe: Recipe,
) -> tuple[TimedText, ...]:  # fmt: skip
    """Return the events of a text stream on the session clock; see :func:`session_times`."""
    times_s = np.array([event.time_s for event in events], dtype=np.float64)
    placed_s = session_times(name, times_s, offset_s, placement=placement, recipe=recipe).tolist()
    return tuple(
        TimedText(time_s, e.text, origin=e.source_line, recorded_s=e.time_s)
        for time_s, e in zip(placed_s, events, strict=True)
    )


def _align_text(name: str, events: tuple[TimedText, ...], streams: Alignment) -> None:
    """Place the events of a text stream on the clock, or note why it is absent."""
    inside = tuple(e for e in events if 0 <= e.time_s < streams.duration_s)
    streams.outside += [
        f"{e.origin}: text {e.text[:40]!r} at {e.recorded_s:g} s is outside the session"
        for e in events
        if not 0 <= e.time_s < streams.duration_s
    ]
    if inside:  # silence is part of a text stream
        streams.intervals[name] = Interval(0.0, streams.duration_s)
        streams.events[name] = inside
    elif events:
        streams.absent[name] = (
            f"all of its events are outside the session, as at {events[0].origin}; "
            + _clock_fix(name, events[0].recorded_s)
        )
    else:
        streams.absent[name] = "no event of it is recorded"
        streams.not_recorded.add(name)


def read_placement(path: Path, recipe: Recipe) -> Placement:
    """Read what ``session.json`` of a session folder says about the times of streams."""
    declared: dict[str, dict[str, float]] = {}
    undeclared: list[str] = []
    for key, (least, most, meaning) in _LIMITS.items():
        values, error = _read_key(path / SESSION_INFO_FILE, key)
        declared[key] = {name: value for name, value in values.items() if name in recipe.streams}
        undeclared += [name for name in values if name not in recipe.streams]
        for name, value in declared[key].items():
            if type(value) not in (int, float) or not least <= value <= most:  # also NaN
                error = f"{key} of {name} is {str(value)[:40]}; fix: write {meaning}"
        if error is not None:
            return Placement(error=f"{SESSION_INFO_FILE}: {error}")
    return Placement(
        starts={name: float(value) for name, value in declared[_STARTS_KEY].items()},
        stretches={name: float(value) for name, value in declared[STRETCH_KEY].items()},
        undeclared=tuple(dict.fromkeys(undeclared)),
    )


def _read_key(file: Path, key: str) -> tuple[dict[str, Any], str | None]:
    """Return an object of ``session.json``, empty if there is none, and an error or None."""
    try:
        raw = read_bytes(file) if file.is_file() else b""
    except OSError as error:
        return {}, f"can't be opened: {error.strerror}; fix: make it readable"
    try:
        session_info = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        if f'"{key}"'.encode() in raw:
            return {}, f"contains {key} but is not JSON; fix: correct its syntax"
        return {}, None
    values = session_info.get(key) if isinstance(session_info, dict) else None
    if values is None or isinstance(values, dict):
        return values or {}, None
    return {}, f'{key} is not an object; fix: write {{"NAME": 1.0}}'
