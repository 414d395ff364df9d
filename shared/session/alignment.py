"""Where the streams of a session lie on its clock: one set of rules for shards and validation.

Sound and video lie where their container puts them, counted from its start, unless ``session.json``
says when they begin; sensors and texts lie at their timestamps, less the recorder's offset.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import Interval, clock_offset
from shared.recipe import Stream
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
"""A session of nothing but text ends this long after its last event began."""

MAX_SESSION_S = 24 * 3600.0
"""What lies after is left out: one wrong timestamp must not make a billion windows."""

MEDIA_STREAMS = (Stream.VISION_LEFT, Stream.VISION_RIGHT, Stream.AUDIO)
"""Streams without timestamps on the recorder's clock: ``start_s`` may place them."""

_STARTS_KEY = "start_s"
_SENSORS = (Stream.TOUCH, Stream.PROPRIO)
_TEXTS = (Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """Where everything of a session lies; all times on the session clock."""

    offset_s: float
    """Subtracted from the recorder's timestamps."""
    stop_s: float
    """End of the last stream, however late."""
    intervals: Mapping[Stream, Interval]
    absent: Mapping[Stream, str]
    """Why sensors and texts are missing."""
    readings: Mapping[Stream, NDArray[np.float64]]
    """Times of each sensor's readings."""

    @property
    def length_s(self) -> float:
        """Seconds from the clock's zero to the end of the session."""
        return min(self.stop_s, MAX_SESSION_S)


def align_streams(
    media: Mapping[Stream, Interval],
    metadata: Metadata,
    events: tuple[TextEvent, ...],
    *,
    recipe: Recipe,
) -> Alignment:
    """Put sensors and texts beside the media.

    Args:
        media: where video and sound lie.
        metadata: the sensors, on the recorder's clock.
        events: all texts in order of time, on the recorder's clock.
        recipe: the sensors' rate, for one that has a single reading.
    """
    intervals, absent = dict(media), {}
    media_stop_s = max((i.stop_s for i in media.values()), default=None)
    offset_s = recorder_offset(metadata, events, media_stop_s)
    times_s = metadata.times_s - offset_s
    readings = {stream: times_s[metadata.rows_with(stream)] for stream in _SENSORS}
    for stream, found_s in readings.items():
        lies = span_of(found_s, recipe=recipe)
        if lies is None:
            absent[stream] = f"{METADATA_FILE} holds no usable reading of it"
        else:
            intervals[stream] = lies
    stops_s = [i.stop_s for i in intervals.values()]
    if not stops_s and events:
        stops_s = [events[-1].time_s - offset_s + TEXT_TAIL_S]
    stop_s = max(0.0, *stops_s) if stops_s else 0.0
    for stream in _TEXTS:
        if any(e.stream is stream for e in events):  # silence is part of a text
            intervals[stream] = Interval(0.0, min(stop_s, MAX_SESSION_S))
        else:
            absent[stream] = "no event of it in text.jsonl or metadata.jsonl"
    return Alignment(
        offset_s=offset_s, stop_s=stop_s, intervals=intervals, absent=absent, readings=readings
    )


def recorder_offset(
    metadata: Metadata, events: tuple[TextEvent, ...], media_stop_s: float | None
) -> float:
    """Seconds to subtract from the recorder's timestamps, from its lines or, where there are none,
    its texts.
    """
    if len(metadata.times_s):
        return clock_offset(float(metadata.times_s[0]), float(metadata.times_s[-1]), media_stop_s)
    if events and (media_stop_s is None or events[0].time_s >= media_stop_s):
        return events[0].time_s
    return 0.0


def span_of(times_s: NDArray[np.float64], *, recipe: Recipe) -> Interval | None:
    """From the first reading to one median step after the last; None without any."""
    if len(times_s) == 0:
        return None
    tick_s = 1 / recipe.sensors.rate_hz
    if len(times_s) > 1:
        tick_s = float(np.median(np.diff(times_s)))
    return Interval(float(times_s[0]), float(times_s[-1]) + tick_s)


def align_track(track: VideoTrack, start_s: float | None) -> VideoTrack:
    """A video whose first frame lies at `start_s`; None or its own start leave it to the bit."""
    shift_s = 0.0 if start_s is None else start_s - float(track.times_s[0])
    return replace(track, times_s=track.times_s + shift_s) if shift_s else track


def align_sound(sound: Sound, start_s: float | None) -> Interval:
    """Where a sound lies whose first sample is at `start_s`, else where its container has it."""
    first_s = sound.start_s if start_s is None else start_s
    return Interval(first_s, first_s + sound.duration_s)


def read_starts(path: Path) -> tuple[dict[Stream, float], str | None]:
    """When the media begin, as ``session.json`` of a session folder says.

    Returns:
        Seconds on the session clock of the first frame or sample of each stream that it names, and
        what is wrong with it: then nothing is known of where any of the media lies.
    """
    file = path / SESSION_INFO_FILE
    try:
        raw = file.read_bytes() if file.is_file() else b""
    except OSError as error:
        return {}, f"{SESSION_INFO_FILE}: can't be opened: {error.strerror}; make it readable"
    try:
        facts = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        if f'"{_STARTS_KEY}"'.encode() in raw:
            return {}, f"{SESSION_INFO_FILE}: holds {_STARTS_KEY} and is not JSON; correct it"
        return {}, None
    declared = facts.get(_STARTS_KEY) if isinstance(facts, dict) else None
    if declared is None:
        return {}, None
    if not isinstance(declared, dict):
        return {}, f'{SESSION_INFO_FILE}: {_STARTS_KEY} is no object; write {{"audio": 0.35}}'
    for name, value in declared.items():
        flaw = _start_flaw(name, value)
        if flaw is not None:
            return {}, f"{SESSION_INFO_FILE}: {_STARTS_KEY} {flaw}"
    return {Stream(name): float(value) for name, value in declared.items()}, None


def _start_flaw(name: str, value: Any) -> str | None:  # noqa: ANN401 (any JSON)
    """What is wrong with one declared start."""
    if name in {*_SENSORS, *_TEXTS}:
        return f"names {name}, which has timestamps of its own; correct those"
    if name not in MEDIA_STREAMS:
        known = ", ".join(MEDIA_STREAMS)
        return f"names {name[:40]!r}, which is no stream; streams are {known}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_SESSION_S or math.isnan(value):
        limit = f"{MAX_SESSION_S:g}"
        return f"of {name} is {str(value)[:40]}; write seconds on the session clock, up to {limit}"
    return None
