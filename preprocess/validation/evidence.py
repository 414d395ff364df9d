"""What is read of a session in order to judge it: plain values, read once.

:func:`read_evidence` opens every source file: it reads all metadata and text lines, decodes all of
the sound, reads every frame's time, and decodes the frames of a spread of stretches of each video.
:mod:`preprocess.validation.checks` judges what it gives.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.audio import measure_loudness
from shared.clock import Interval
from shared.errors import MediaError
from shared.media import read_frames, read_sound, read_video_track
from shared.recipe import Recipe, Stream, VisionRecipe
from shared.scan import recorder_offset
from shared.session import (
    AUDIO_FILE,
    FACTS_FILE,
    METADATA_FILE,
    TEXT_FILE,
    VISION_FILES,
    read_metadata,
    read_text_file,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media import VideoTrack
    from shared.session import Metadata, Oddity, TextEvent

NUM_STRETCHES = 16
STRETCH_FRAMES = 60
"""A video of more than NUM_STRETCHES * STRETCH_FRAMES frames is decoded only in so many stretches
of so many frames, spread evenly from its first frame to its last."""

TEXT_TAIL_S = 1.0
"""A session of nothing but text ends this long after its last event began."""

UNREAD_KINDS = frozenset({"json", "long", "timestamp"})
"""Kinds of oddities that cost the whole line."""

_TINY = VisionRecipe(size=16, fit="stretch")
_STREAMING_SIZES = {0, 0xFFFFFFFF, 0x7FFFFFFF}
"""Sizes that recorders write which can't know how long the sound will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundLevel:
    """What is judged of a session's sound; levels have full scale 1."""

    duration_s: float
    rms: float
    peak: float
    num_samples: int
    """Samples of all channels as recorded."""
    num_clipped: int
    num_bad: int
    missing_bytes: int
    """Bytes that the header promises and the file does not hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What is judged of a video."""

    track: VideoTrack
    num_checked: int
    undecoded: NDArray[np.int64]
    """Indices of the frames that were asked for and did not decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was read of a session. Intervals are on the session clock, metadata and events still
    on the recorder's.
    """

    recipe: Recipe
    pictures: Mapping[Stream, Picture]
    sound: SoundLevel | None
    metadata: Metadata
    events: tuple[TextEvent, ...]
    oddities: tuple[Oddity, ...]
    num_lines: Mapping[str, int]
    """Lines of metadata.jsonl and text.jsonl that are not blank."""
    unreadable: Mapping[str, str]
    """Files that are there and can't be read, and why."""
    intervals: Mapping[Stream, Interval]
    absent: Mapping[Stream, str]
    lines: Interval | None
    """Where the metadata lines lie."""
    offset_s: float
    length_s: float

    def line_at(self, row: int) -> str:
        """Where a metadata row stands: file, line, second."""
        time_s = self.metadata.times_s[row] - self.offset_s
        return f"{METADATA_FILE} line {self.metadata.lines[row]} ({time_s:.3f} s)"


def read_evidence(path: Path, *, recipe: Recipe) -> Evidence:
    """Read all that the checks judge.

    Raises:
        OSError: a folder or file can't be opened for a reason of the file system.
    """
    unreadable: dict[str, str] = {}
    absent: dict[Stream, str] = {}
    intervals: dict[Stream, Interval] = {}
    pictures: dict[Stream, Picture] = {}
    for stream, file in VISION_FILES.items():
        try:
            pictures[stream] = _read_picture(path / file)
            track = pictures[stream].track
            intervals[stream] = Interval(float(track.times_s[0]), track.stop_s)
        except MediaError as error:
            _note_missing(path / file, stream, error, absent, unreadable)
    sound = None
    try:
        sound = _read_sound_level(path / AUDIO_FILE, recipe)
        intervals[Stream.AUDIO] = Interval(0.0, sound.duration_s)
    except MediaError as error:
        _note_missing(path / AUDIO_FILE, Stream.AUDIO, error, absent, unreadable)
    media_stop_s = max((i.stop_s for i in intervals.values()), default=None)

    sensors = recipe.sensors
    metadata = read_metadata(path, touch_size=sensors.touch_size, proprio_size=sensors.proprio_size)
    text_events, text_oddities = read_text_file(path)
    oddities = (*metadata.oddities, *text_oddities)
    unreadable |= {o.file: o.what for o in oddities if o.line == 0}
    unreadable |= _unreadable_facts(path)
    events = tuple(sorted((*metadata.events, *text_events), key=lambda e: e.time_s))
    offset_s = recorder_offset(metadata, events, media_stop_s)
    intervals |= _sensor_intervals(metadata, offset_s, recipe, absent)
    length_s = max((i.stop_s for i in intervals.values()), default=0.0)
    if not intervals and events:
        length_s = max(0.0, events[-1].time_s - offset_s + TEXT_TAIL_S)
    for stream in (Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT):
        if any(event.stream is stream for event in events):
            intervals[stream] = Interval(0.0, length_s)
        else:
            absent[stream] = "no text of it"
    return Evidence(
        recipe=recipe,
        pictures=pictures,
        sound=sound,
        metadata=metadata,
        events=events,
        oddities=tuple(o for o in oddities if o.line > 0),
        num_lines=_count_lines(metadata, text_events, oddities),
        unreadable=unreadable,
        intervals={s: intervals[s] for s in Stream if s in intervals},
        absent={s: absent[s] for s in Stream if s in absent},
        lines=_span(metadata.times_s - offset_s, 1 / sensors.rate_hz),
        offset_s=offset_s,
        length_s=length_s,
    )


def _read_picture(path: Path) -> Picture:
    """Frame times of a video, and which of a spread of its frames don't decode."""
    track = read_video_track(path)
    num_frames = len(track.times_s)
    stretches = [range(num_frames)]
    if num_frames > NUM_STRETCHES * STRETCH_FRAMES:
        starts = np.linspace(0, num_frames - STRETCH_FRAMES, NUM_STRETCHES).astype(int)
        stretches = [range(start, start + STRETCH_FRAMES) for start in starts]
    undecoded: list[int] = []
    for wanted in stretches:
        decoded = {index for index, _ in read_frames(path, track, wanted, recipe=_TINY)}
        undecoded += [index for index in wanted if index not in decoded]
    return Picture(
        track=track,
        num_checked=sum(map(len, stretches)),
        undecoded=np.asarray(undecoded, dtype=np.int64),
    )


def _read_sound_level(path: Path, recipe: Recipe) -> SoundLevel:
    """Decode all of the sound and keep its levels."""
    sound = read_sound(path, rate_hz=recipe.audio.rate_hz)
    loudness = measure_loudness(sound.samples.iter_blocks(), recipe=recipe.audio)
    return SoundLevel(
        duration_s=sound.duration_s,
        rms=loudness.rms,
        peak=sound.peak,
        num_samples=round(sound.duration_s * sound.source_rate_hz) * sound.source_channels,
        num_clipped=sound.num_clipped,
        num_bad=sound.num_bad,
        missing_bytes=missing_wav_bytes(path),
    )


def missing_wav_bytes(path: Path) -> int:
    """Bytes of sound that a WAV file's header promises beyond the file's end; 0 for other files.

    Source: Multimedia Programming Interface and Data Specifications 1.0, IBM and Microsoft 1991.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        if file.read(12)[:4] != b"RIFF":
            return 0
        while len(head := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name == b"data":
                return 0 if size in _STREAMING_SIZES else max(0, file.tell() + size - length)
            file.seek(size + size % 2, 1)
    return 0


def _note_missing(
    path: Path,
    stream: Stream,
    error: MediaError,
    absent: dict[Stream, str],
    unreadable: dict[str, str],
) -> None:
    """Writes down why a media file gives no stream."""
    why = str(error).removeprefix(f"{path}: ")
    absent[stream] = f"{path.name}: {why}"
    if path.exists() or path.is_symlink():
        unreadable[path.name] = why


def _unreadable_facts(path: Path) -> dict[str, str]:
    """{session.json: why} where it is there and no JSON object."""
    file = path / FACTS_FILE
    if not file.exists():
        return {}
    try:
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return {FACTS_FILE: f"is not JSON ({str(error).splitlines()[0]})"}
    return {} if isinstance(facts, dict) else {FACTS_FILE: "is no JSON object"}


def _sensor_intervals(
    metadata: Metadata, offset_s: float, recipe: Recipe, absent: dict[Stream, str]
) -> dict[Stream, Interval]:
    """Where touch and proprio lie on the session clock."""
    found: dict[Stream, Interval] = {}
    for stream in (Stream.TOUCH, Stream.PROPRIO):
        times_s = metadata.times_s[metadata.rows_with(stream)] - offset_s
        span = _span(times_s, 1 / recipe.sensors.rate_hz)
        if span is None:
            absent[stream] = f"{METADATA_FILE} holds no usable reading of it"
        else:
            found[stream] = span
    return found


def _span(times_s: NDArray[np.float64], step_s: float) -> Interval | None:
    """From the first time to a median step after the last one."""
    if len(times_s) == 0:
        return None
    median_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else step_s
    return Interval(float(times_s[0]), float(times_s[-1]) + median_s)


def _count_lines(
    metadata: Metadata, text_events: list[TextEvent], oddities: tuple[Oddity, ...]
) -> dict[str, int]:
    """Lines of each file: those read, and those left out."""
    left_out = UNREAD_KINDS | {"duplicate"}
    lost = {(o.file, o.line) for o in oddities if o.kind in left_out}
    odd_text = {o.line for o in oddities if o.file == TEXT_FILE}
    return {
        METADATA_FILE: len(metadata.lines) + sum(file == METADATA_FILE for file, _ in lost),
        TEXT_FILE: len(text_events) + len(odd_text),
    }
