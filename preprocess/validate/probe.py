"""What is read of a session in order to judge it: plain values, read once.

:func:`probe_session` opens every source file: it reads all metadata and text lines, decodes all of
the sound, reads every frame's time, and decodes the frames of a spread of stretches of each video.
:mod:`preprocess.validate.checks` judges what it gives.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.units import Unit, is_sure, text_scale, unit_of
from shared.clock import Interval
from shared.errors import MediaError
from shared.media.sound import measure_loudness, read_sound
from shared.media.video import read_frames, read_video_track
from shared.recipe import Recipe, Stream, VisionRecipe
from shared.session.alignment import align_sound, align_streams, align_track, read_starts, span_of
from shared.session.folder import (
    AUDIO_FILE,
    METADATA_FILE,
    SESSION_INFO_FILE,
    TEXT_FILE,
    VISION_FILES,
    read_metadata,
    read_text_file,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.video import VideoTrack
    from shared.session.folder import Metadata, ParseIssue, TextEvent

NUM_STRETCHES = 16
STRETCH_FRAMES = 60
"""A video of more than NUM_STRETCHES * STRETCH_FRAMES frames is decoded only in so many stretches
of so many frames, spread evenly from its first frame to its last."""

UNREAD_KINDS = frozenset({"json", "long", "timestamp"})
"""Kinds of issues that cost the whole line."""

_FINEST = 1e9
"""Nanoseconds per second: timestamps of any unit are finite numbers of seconds so."""

_TINY = VisionRecipe(size=16, fit="stretch")
_STREAMING_SIZES = {0, 0xFFFFFFFF, 0x7FFFFFFF}
"""Sizes that recorders write which can't know how long the sound will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioLevel:
    """What is judged of a session's sound; levels have full scale 1."""

    lies: Interval
    """On the session clock."""
    origin_s: float
    """As of :class:`shared.media.sound.Sound`."""
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
class SessionProbe:
    """All that was read of a session. Intervals are on the session clock, metadata and events still
    on the recorder's.
    """

    recipe: Recipe
    pictures: Mapping[Stream, Picture]
    sound: AudioLevel | None
    metadata: Metadata
    events: tuple[TextEvent, ...]
    issues: tuple[ParseIssue, ...]
    num_lines: Mapping[str, int]
    """Lines of metadata.jsonl and text.jsonl that are not blank."""
    unreadable: Mapping[str, str]
    """Files that are there and can't be read, and why."""
    starts: Mapping[Stream, float]
    """Where ``session.json`` says that media begin."""
    start_error: str | None
    """Why it can't be used; media then lie where their containers have them."""
    unit: Unit | None
    """What the timestamps of metadata.jsonl are instead of seconds; here they are divided."""
    is_unit_sure: bool
    """Whether the media agree, so that --fix divides them."""
    intervals: Mapping[Stream, Interval]
    absent: Mapping[Stream, str]
    lines: Interval | None
    """Where the metadata lines lie."""
    offset_s: float
    length_s: float
    stop_s: float
    """End of the last stream; later than `length_s` where that is too late for a session."""

    def line_at(self, row: int) -> str:
        """Where a metadata row stands: file, line, second."""
        time_s = self.metadata.times_s[row] - self.offset_s
        return f"{METADATA_FILE} line {self.metadata.lines[row]} ({time_s:.3f} s)"


def probe_session(path: Path, *, recipe: Recipe) -> SessionProbe:
    """Read all that the checks judge.

    Raises:
        OSError: a folder or file can't be opened for a reason of the file system.
    """
    unreadable: dict[str, str] = {}
    absent: dict[Stream, str] = {}
    media: dict[Stream, Interval] = {}
    pictures: dict[Stream, Picture] = {}
    starts, start_error = read_starts(path)
    for stream, file in VISION_FILES.items():
        try:
            pictures[stream] = _read_picture(path / file, starts.get(stream))
            track = pictures[stream].track
            media[stream] = Interval(float(track.times_s[0]), track.stop_s)
        except MediaError as error:
            _note_missing(path / file, stream, error, absent, unreadable)
    sound = None
    try:
        sound = _read_sound_level(path / AUDIO_FILE, starts.get(Stream.AUDIO), recipe)
        media[Stream.AUDIO] = sound.lies
    except MediaError as error:
        _note_missing(path / AUDIO_FILE, Stream.AUDIO, error, absent, unreadable)
    lines = _read_lines(path, recipe, max((i.stop_s for i in media.values()), default=None))
    unreadable |= {o.file: o.message for o in lines.issues if o.line == 0}
    unreadable |= _unreadable_facts(path)
    events = tuple(sorted((*lines.metadata.events, *lines.texts), key=lambda e: e.time_s))
    placed = align_streams(media, lines.metadata, events, recipe=recipe)
    absent |= placed.absent
    return SessionProbe(
        recipe=recipe,
        pictures=pictures,
        sound=sound,
        metadata=lines.metadata,
        events=events,
        issues=tuple(o for o in lines.issues if o.line > 0),
        num_lines=_count_lines(lines),
        unreadable=unreadable,
        starts=starts,
        start_error=start_error,
        unit=lines.unit,
        is_unit_sure=lines.is_unit_sure,
        intervals={s: placed.intervals[s] for s in Stream if s in placed.intervals},
        absent={s: absent[s] for s in Stream if s in absent},
        lines=span_of(lines.metadata.times_s - placed.offset_s, recipe=recipe),
        offset_s=placed.offset_s,
        length_s=placed.length_s,
        stop_s=placed.stop_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lines:
    """Metadata and text lines, in seconds."""

    metadata: Metadata
    texts: list[TextEvent]
    issues: tuple[ParseIssue, ...]
    unit: Unit | None = None
    is_unit_sure: bool = False


def _read_lines(path: Path, recipe: Recipe, media_stop_s: float | None) -> _Lines:
    """All lines; where their timestamps are in another unit, divided."""
    sensors = recipe.sensors

    def read(units_per_s: float) -> Metadata:
        return read_metadata(
            path,
            touch_size=sensors.touch_size,
            proprio_size=sensors.proprio_size,
            units_per_s=units_per_s,
        )

    metadata = read(1.0)
    texts, text_issues = read_text_file(path)
    times = metadata.times_s
    if sum(o.kind == "timestamp" for o in metadata.issues) > len(times):
        times = read(_FINEST).times_s * _FINEST  # of lines that are too large for seconds
    unit = unit_of(times)
    sure = unit is not None and is_sure(times, unit, media_stop_s)
    if unit is not None:
        divided = read(unit.per_s)
        has_readings = bool(np.isfinite(divided.touch).any() or np.isfinite(divided.proprio).any())
        unit = unit if sure or (media_stop_s is None and has_readings) else None
    if unit is None:
        return _Lines(metadata=metadata, texts=texts, issues=(*metadata.issues, *text_issues))
    raw = np.array([e.time_s for e in read_text_file(path, units_per_s=_FINEST)[0]]) * _FINEST
    scale = text_scale(raw, times, unit, media_stop_s)
    texts, text_issues = read_text_file(path, units_per_s=scale or 1.0)
    return _Lines(
        metadata=divided,
        texts=texts,
        issues=(*divided.issues, *text_issues),
        unit=unit,
        is_unit_sure=sure and scale is not None,
    )


def _read_picture(path: Path, start_s: float | None) -> Picture:
    """Frame times of a video, and which of a spread of its frames don't decode."""
    track = align_track(read_video_track(path), start_s)
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


def _read_sound_level(path: Path, start_s: float | None, recipe: Recipe) -> AudioLevel:
    """Decode all of the sound and keep its levels."""
    sound = read_sound(path, rate_hz=recipe.audio.rate_hz)
    loudness = measure_loudness(sound.samples.iter_blocks(), recipe=recipe.audio)
    return AudioLevel(
        lies=align_sound(sound, start_s),
        origin_s=sound.origin_s,
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
    file = path / SESSION_INFO_FILE
    if not file.exists():
        return {}
    if not file.is_file():
        return {SESSION_INFO_FILE: "is no file"}
    try:
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return {SESSION_INFO_FILE: f"is not JSON ({str(error).splitlines()[0]})"}
    return {} if isinstance(facts, dict) else {SESSION_INFO_FILE: "is no JSON object"}


def _count_lines(lines: _Lines) -> dict[str, int]:
    """Lines of each file: those read, and those left out."""
    left_out = UNREAD_KINDS | {"duplicate"}
    lost = {(o.file, o.line) for o in lines.issues if o.kind in left_out}
    odd_text = {o.line for o in lines.issues if o.file == TEXT_FILE}
    num_lost = sum(file == METADATA_FILE for file, _ in lost)
    return {
        METADATA_FILE: len(lines.metadata.lines) + num_lost,
        TEXT_FILE: len(lines.texts) + len(odd_text),
    }
