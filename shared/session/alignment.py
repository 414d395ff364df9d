"""Align the streams of a session on its clock; shards and validation share these rules.

Audio and video begin where their container says, counted from the container's start, unless
``session.json`` declares when they begin. Sensor readings and texts begin at their timestamps,
minus the recorder's offset.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import Interval, clock_offset
from shared.recipe import SENSOR_STREAMS, TEXT_STREAMS, VISION_STREAMS, Stream
from shared.session.folder import METADATA_FILE, SESSION_INFO_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.sound import Sound
    from shared.media.video import VideoTrack
    from shared.recipe import Recipe
    from shared.session.folder import Metadata, TextEvent

TEXT_TAIL_S = 1.0
"""A session that has only texts ends this long after its last event began."""

MAX_SESSION_S = 24 * 3600.0
"""Everything later is ignored: one wrong timestamp must not create a billion windows."""

MEDIA_STREAMS = (*VISION_STREAMS, Stream.AUDIO)
"""Streams without timestamps on the recorder's clock; ``start_s`` can say when they begin."""

_STARTS_KEY = "start_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """When each stream of a session begins and ends; all times on the session clock."""

    offset_s: float
    """Subtracted from the recorder's timestamps."""
    stop_s: float
    """End of the last stream, however late."""
    intervals: Mapping[Stream, Interval]
    absent: Mapping[Stream, str]
    """Why a sensor or text stream is missing."""
    readings: Mapping[Stream, NDArray[np.float64]]
    """Times of each sensor's readings."""

    @property
    def duration_s(self) -> float:
        """Seconds from the clock's zero to the end of the session."""
        return min(self.stop_s, MAX_SESSION_S)


def align_streams(
    media: Mapping[Stream, Interval],
    metadata: Metadata,
    events: tuple[TextEvent, ...],
    *,
    recipe: Recipe,
) -> Alignment:
    """Put sensors and texts on the clock of the media.

    Args:
        media: interval of each video and audio stream, on the session clock.
        metadata: sensor lines, on the recorder's clock.
        events: all texts in order of time, on the recorder's clock.
        recipe: gives the sensors' rate, for a sensor that has a single reading.
    """
    intervals, absent = dict(media), {}
    media_stop_s = max((i.stop_s for i in media.values()), default=None)
    offset_s = recorder_offset(metadata, events, media_stop_s)
    times_s = metadata.times_s - offset_s
    readings = {stream: times_s[metadata.rows_with(stream)] for stream in SENSOR_STREAMS}
    for stream, reading_times_s in readings.items():
        span = span_of(reading_times_s, recipe=recipe)
        if span is None:
            absent[stream] = f"{METADATA_FILE} holds no usable reading of it"
        else:
            intervals[stream] = span
    stops_s = [i.stop_s for i in intervals.values()]
    if not stops_s and events:
        stops_s = [events[-1].time_s - offset_s + TEXT_TAIL_S]
    stop_s = max(0.0, *stops_s) if stops_s else 0.0
    for stream in TEXT_STREAMS:
        if any(e.stream is stream for e in events):  # silence is part of a text stream
            intervals[stream] = Interval(0.0, min(stop_s, MAX_SESSION_S))
        else:
            absent[stream] = "no event of it in text.jsonl or metadata.jsonl"
    return Alignment(
        offset_s=offset_s, stop_s=stop_s, intervals=intervals, absent=absent, readings=readings
    )


def recorder_offset(
    metadata: Metadata, events: tuple[TextEvent, ...], media_stop_s: float | None
) -> float:
    """Return the seconds to subtract from the recorder's timestamps.

    The sensor lines decide; without sensor lines, the texts do.
    """
    if len(metadata.times_s):
        return clock_offset(float(metadata.times_s[0]), float(metadata.times_s[-1]), media_stop_s)
    if events and (media_stop_s is None or events[0].time_s >= media_stop_s):
        return events[0].time_s
    return 0.0


def span_of(times_s: NDArray[np.float64], *, recipe: Recipe) -> Interval | None:
    """Return the interval from the first reading to one median interval after the last one."""
    if len(times_s) == 0:
        return None
    interval_s = 1 / recipe.sensors.rate_hz
    if len(times_s) > 1:
        interval_s = float(np.median(np.diff(times_s)))
    return Interval(float(times_s[0]), float(times_s[-1]) + interval_s)


def align_track(track: VideoTrack, start_s: float | None) -> VideoTrack:
    """Shift a video so that its first frame is at `start_s`.

    None, or the track's own start, leaves every time unchanged to the bit.
    """
    shift_s = 0.0 if start_s is None else start_s - float(track.times_s[0])
    return replace(track, times_s=track.times_s + shift_s) if shift_s else track


def align_sound(sound: Sound, start_s: float | None) -> Interval:
    """Return the interval of a sound that begins at `start_s`, or where its container says."""
    first_s = sound.start_s if start_s is None else start_s
    return Interval(first_s, first_s + sound.duration_s)


def read_starts(path: Path) -> tuple[dict[Stream, float], str | None]:
    """Read when the media begin, as ``session.json`` of a session folder declares it.

    Returns:
        Start of each declared stream in seconds on the session clock, and an error or None. With an
        error, the position of every media stream is unknown.
    """
    file = path / SESSION_INFO_FILE
    try:
        raw = file.read_bytes() if file.is_file() else b""
    except OSError as error:
        reason = f"can't be opened: {error.strerror}; fix: make it readable"
        return {}, f"{SESSION_INFO_FILE}: {reason}"
    try:
        session_info = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        if f'"{_STARTS_KEY}"'.encode() in raw:
            reason = f"contains {_STARTS_KEY} but is not JSON; fix: correct its syntax"
            return {}, f"{SESSION_INFO_FILE}: {reason}"
        return {}, None
    starts = session_info.get(_STARTS_KEY) if isinstance(session_info, dict) else None
    if starts is None:
        return {}, None
    if not isinstance(starts, dict):
        reason = f'{_STARTS_KEY} is not an object; fix: write {{"audio": 0.35}}'
        return {}, f"{SESSION_INFO_FILE}: {reason}"
    for name, value in starts.items():
        error_reason = _start_error(name, value)
        if error_reason is not None:
            return {}, f"{SESSION_INFO_FILE}: {_STARTS_KEY} {error_reason}"
    return {Stream(name): float(value) for name, value in starts.items()}, None


def _start_error(name: str, value: Any) -> str | None:  # noqa: ANN401 (any JSON)
    """Explain what is wrong with one declared start; None if nothing is."""
    if name in {*SENSOR_STREAMS, *TEXT_STREAMS}:
        return f"names {name}, which has timestamps of its own; fix: correct those"
    if name not in MEDIA_STREAMS:
        known = ", ".join(MEDIA_STREAMS)
        return f"names {name[:40]!r}, which is not a stream; fix: use one of {known}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_SESSION_S or math.isnan(value):
        limit = f"{MAX_SESSION_S:g}"
        return (
            f"of {name} is {str(value)[:40]}; "
            f"fix: write seconds on the session clock, up to {limit}"
        )
    return None
