"""Read a session for validation into plain values.

:func:`probe_session` opens every source file once: it reads all metadata and text lines, decodes
all sound, reads the time of every frame, and decodes frames in evenly spread stretches of each
video. The checks (:mod:`preprocess.validate.checks`, :mod:`preprocess.validate.line_checks`) open
nothing; they judge the :class:`SessionProbe`.

Timestamps in milliseconds, microseconds or nanoseconds are recognized here. Recorders write lines
5 to 500 times per second, so the median interval gives the unit. The media confirm it: the divided
timestamps must span their length. Without media, readings in the lines confirm it.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import Interval
from shared.errors import MediaError, MissingMediaError
from shared.media.sound import measure_loudness, read_sound
from shared.media.video import REPLACE_FIX, read_frames, read_video_track
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
"""Of a video with more than NUM_STRETCHES * STRETCH_FRAMES frames, NUM_STRETCHES stretches of
STRETCH_FRAMES frames are decoded, spread evenly from the first frame to the last.
"""

UNREAD_KINDS = frozenset({"json", "long", "timestamp"})
"""Kinds of parse issues for which the whole line is skipped."""

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.002, 0.2
"""Range of a recorder's median interval: narrow enough that no interval fits two units."""

MIN_TIMED_LINES = 3
"""With fewer lines the unit of their timestamps is not guessed."""

UNIT_TOLERANCE_S = 1.0
"""Timestamps and media of one recording end at most this far apart."""

MAX_TIME = 1e21
"""A larger number is not a timestamp in any unit."""

_NANOSECONDS_PER_S = 1e9
"""With this divisor, timestamps of every unit stay below the limit for seconds."""

_TINY = VisionRecipe(size=16, fit="stretch")
_STREAMING_SIZES = {0, 0xFFFFFFFF, 0x7FFFFFFF}
"""Data sizes that a recorder writes when it cannot know the length of the sound."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of time other than the second."""

    name: str
    per_s: float


UNITS = (Unit("milliseconds", 1e3), Unit("microseconds", 1e6), Unit("nanoseconds", 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioProbe:
    """What validation reads of the sound. Levels have full scale 1."""

    interval: Interval
    """On the session clock."""
    origin_s: float
    """See :class:`shared.media.sound.Sound`."""
    duration_s: float
    rms: float
    peak: float
    num_samples: int
    """Samples of all channels as recorded."""
    num_clipped: int
    num_bad: int
    """Samples that are not finite numbers."""
    missing_bytes: int
    """Bytes that the header announces beyond the end of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoProbe:
    """What validation reads of a video."""

    track: VideoTrack
    num_checked: int
    """Frames that were decoded, or tried."""
    undecoded: NDArray[np.int64]
    """Indices of the tried frames that did not decode."""

    def damaged_stretches(self) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]]:
        """Return start, stop (seconds) and frame count of each run of undecoded frames."""
        frames, stops_s = self.undecoded, np.append(self.track.times_s[1:], self.track.stop_s)
        firsts = np.flatnonzero(np.diff(frames, prepend=-2) > 1)
        lasts = np.append(firsts[1:], len(frames))[: len(firsts)] - 1
        counts = (lasts - firsts + 1).tolist()
        return self.track.times_s[frames[firsts]], stops_s[frames[lasts]], counts


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionProbe:
    """Everything that validation reads of a session.

    Intervals are on the session clock; metadata and events keep the recorder's clock.
    """

    recipe: Recipe
    videos: Mapping[Stream, VideoProbe]
    audio: AudioProbe | None
    metadata: Metadata
    events: tuple[TextEvent, ...]
    issues: tuple[ParseIssue, ...]
    num_lines: Mapping[str, int]
    """Lines of metadata.jsonl and text.jsonl that are not blank."""
    unreadable: Mapping[str, str]
    """File name -> reason and fix, of each file that exists and cannot be read."""
    starts: Mapping[Stream, float]
    """Start of each media file according to ``session.json``."""
    start_error: str | None
    """Why `starts` cannot be used; the containers' own start times apply then."""
    unit: Unit | None
    """Unit of the timestamps in metadata.jsonl if it is not the second; here they are divided."""
    is_unit_confirmed: bool
    """Whether the media confirm the unit, so that --fix divides the timestamps."""
    intervals: Mapping[Stream, Interval]
    absent: Mapping[Stream, str]
    lines_interval: Interval | None
    """From the first metadata line to the last."""
    offset_s: float
    """Session clock = recorder's clock - `offset_s`."""
    duration_s: float
    stop_s: float
    """End of the last stream; greater than `duration_s` if it is too late for a session."""

    def locate_row(self, row: int) -> str:
        """Return file, line and second of a metadata row."""
        time_s = self.metadata.times_s[row] - self.offset_s
        return f"{METADATA_FILE} line {self.metadata.lines[row]} ({time_s:.3f} s)"

    def reading_times_s(self, stream: Stream) -> NDArray[np.float64]:
        """Return the times of a sensor's readings on the session clock."""
        return self.metadata.times_s[self.metadata.rows_with(stream)] - self.offset_s


def probe_session(path: Path, *, recipe: Recipe) -> SessionProbe:
    """Read everything that the checks judge.

    Raises:
        OSError: the file system refuses to open a folder or file.
    """
    # Media that cannot be read are absent streams; reading goes on.
    failures: dict[Stream, MediaError] = {}
    videos: dict[Stream, VideoProbe] = {}
    starts, start_error = read_starts(path)
    for stream, file in VISION_FILES.items():
        try:
            videos[stream] = _probe_video(path / file, starts.get(stream))
        except MediaError as error:
            failures[stream] = error
    audio = None
    try:
        audio = _probe_audio(path / AUDIO_FILE, starts.get(Stream.AUDIO), recipe)
    except MediaError as error:
        failures[Stream.AUDIO] = error
    media = {
        stream: Interval(float(video.track.times_s[0]), video.track.stop_s)
        for stream, video in videos.items()
    }
    if audio is not None:
        media[Stream.AUDIO] = audio.interval
    # The length of the media tells the unit of the timestamps in the lines.
    lines = _read_lines(path, recipe, max((i.stop_s for i in media.values()), default=None))
    absent, unreadable = _explain_failures(path, failures)
    unreadable |= {
        issue.file: f"{issue.message}; {REPLACE_FIX}" for issue in lines.issues if issue.line == 0
    }
    unreadable |= _check_session_file(path / SESSION_INFO_FILE)
    events = tuple(sorted((*lines.metadata.events, *lines.texts), key=lambda e: e.time_s))
    alignment = align_streams(media, lines.metadata, events, recipe=recipe)
    absent |= alignment.absent
    return SessionProbe(
        recipe=recipe,
        videos=videos,
        audio=audio,
        metadata=lines.metadata,
        events=events,
        issues=tuple(issue for issue in lines.issues if issue.line > 0),
        num_lines=_count_lines(lines),
        unreadable=unreadable,
        starts=starts,
        start_error=start_error,
        unit=lines.unit,
        is_unit_confirmed=lines.is_unit_confirmed,
        intervals={s: alignment.intervals[s] for s in Stream if s in alignment.intervals},
        absent={s: absent[s] for s in Stream if s in absent},
        lines_interval=span_of(lines.metadata.times_s - alignment.offset_s, recipe=recipe),
        offset_s=alignment.offset_s,
        duration_s=alignment.duration_s,
        stop_s=alignment.stop_s,
    )


def guess_unit(times: NDArray[np.float64]) -> Unit | None:
    """Guess the unit of timestamps in file order; None for seconds or if nothing fits."""
    if len(times) < MIN_TIMED_LINES:
        return None
    interval = float(np.median(np.diff(times)))
    return next((u for u in UNITS if MIN_INTERVAL_S <= interval / u.per_s <= MAX_INTERVAL_S), None)


def confirms_unit(times: NDArray[np.float64], unit: Unit, media_stop_s: float | None) -> bool:
    """Return whether the timestamps span the media's length after division, and only then."""
    if media_stop_s is None:
        return False
    length = float(np.ptp(times))
    is_apart = abs(length - media_stop_s) > UNIT_TOLERANCE_S
    return is_apart and abs(length / unit.per_s - media_stop_s) <= UNIT_TOLERANCE_S


def text_divisor(
    texts: NDArray[np.float64],
    *,
    times: NDArray[np.float64],
    unit: Unit,
    media_stop_s: float | None,
) -> float | None:
    """Return the divisor that turns timestamps of ``text.jsonl`` into seconds.

    Args:
        texts: the timestamps of the texts.
        times: the timestamps of the metadata lines.
        unit: the unit of `times`.
        media_stop_s: when the last of the media ends; None without media.

    Returns:
        1 if they are seconds already, `unit.per_s` if only that fits, None if neither fits.
    """
    if not len(texts):
        return 1.0
    low, high = float(texts.min()), float(texts.max())
    limit_s = None if media_stop_s is None else media_stop_s + UNIT_TOLERANCE_S
    if limit_s is not None and low >= -UNIT_TOLERANCE_S and high <= limit_s:
        return 1.0
    first_s = float(times.min()) / unit.per_s - UNIT_TOLERANCE_S
    last_s = float(times.max()) / unit.per_s + UNIT_TOLERANCE_S
    return unit.per_s if first_s <= low / unit.per_s and high / unit.per_s <= last_s else None


def raw_timestamp(values: dict[str, Any]) -> float | None:
    """Return the timestamp of a line in its own unit; None if it is not a number."""
    value = values.get("timestamp")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_TIME:
        return None
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lines:
    """Metadata and text lines, in seconds."""

    metadata: Metadata
    texts: list[TextEvent]
    issues: tuple[ParseIssue, ...]
    unit: Unit | None = None
    is_unit_confirmed: bool = False


def _read_lines(path: Path, recipe: Recipe, media_stop_s: float | None) -> _Lines:
    """Read all lines; timestamps in another unit are divided."""
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
    # If most lines were skipped because their timestamps are too large for seconds, read them
    # with the largest divisor and multiply.
    if sum(issue.kind == "timestamp" for issue in metadata.issues) > len(times):
        times = read(_NANOSECONDS_PER_S).times_s * _NANOSECONDS_PER_S
    unit = guess_unit(times)
    is_confirmed = unit is not None and confirms_unit(times, unit, media_stop_s)
    if unit is not None:
        divided = read(unit.per_s)
        has_readings = bool(np.isfinite(divided.touch).any() or np.isfinite(divided.proprio).any())
        unit = unit if is_confirmed or (media_stop_s is None and has_readings) else None
    if unit is None:
        return _Lines(metadata=metadata, texts=texts, issues=(*metadata.issues, *text_issues))
    raw_events = read_text_file(path, units_per_s=_NANOSECONDS_PER_S)[0]
    raw_times = np.array([event.time_s for event in raw_events]) * _NANOSECONDS_PER_S
    divisor = text_divisor(raw_times, times=times, unit=unit, media_stop_s=media_stop_s)
    texts, text_issues = read_text_file(path, units_per_s=divisor or 1.0)
    return _Lines(
        metadata=divided,
        texts=texts,
        issues=(*divided.issues, *text_issues),
        unit=unit,
        is_unit_confirmed=is_confirmed and divisor is not None,
    )


def _probe_video(path: Path, start_s: float | None) -> VideoProbe:
    """Read the frame times of a video, and decode frames spread over it."""
    track = align_track(read_video_track(path), start_s)
    num_frames = len(track.times_s)
    stretches = [range(num_frames)]
    if num_frames > NUM_STRETCHES * STRETCH_FRAMES:
        starts = np.linspace(0, num_frames - STRETCH_FRAMES, NUM_STRETCHES).astype(int)
        stretches = [range(start, start + STRETCH_FRAMES) for start in starts]
    undecoded: list[int] = []
    for requested in stretches:
        decoded = {index for index, _ in read_frames(path, track, requested, recipe=_TINY)}
        undecoded += [index for index in requested if index not in decoded]
    return VideoProbe(
        track=track,
        num_checked=sum(map(len, stretches)),
        undecoded=np.asarray(undecoded, dtype=np.int64),
    )


def _probe_audio(path: Path, start_s: float | None, recipe: Recipe) -> AudioProbe:
    """Decode all of the sound and measure its levels."""
    sound = read_sound(path, rate_hz=recipe.audio.rate_hz)
    loudness = measure_loudness(sound.samples.iter_blocks(), recipe=recipe.audio)
    return AudioProbe(
        interval=align_sound(sound, start_s),
        origin_s=sound.origin_s,
        duration_s=sound.duration_s,
        rms=loudness.rms,
        peak=sound.peak,
        num_samples=round(sound.duration_s * sound.source_rate_hz) * sound.source_channels,
        num_clipped=sound.num_clipped,
        num_bad=sound.num_bad,
        missing_bytes=_missing_wav_bytes(path),
    )


def _missing_wav_bytes(path: Path) -> int:
    """Count the bytes of sound that a WAV header announces beyond the end of the file.

    Other files give 0. Source: Multimedia Programming Interface and Data Specifications 1.0, IBM
    and Microsoft 1991.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        if file.read(12)[:4] != b"RIFF":
            return 0
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            if name == b"data":
                return 0 if size in _STREAMING_SIZES else max(0, file.tell() + size - length)
            file.seek(size + size % 2, 1)
    return 0


def _explain_failures(
    path: Path, failures: Mapping[Stream, MediaError]
) -> tuple[dict[Stream, str], dict[str, str]]:
    """Return why streams are absent; and why files that exist cannot be read, with the fix."""
    absent: dict[Stream, str] = {}
    unreadable: dict[str, str] = {}
    for stream, error in failures.items():
        file = path / VISION_FILES.get(stream, AUDIO_FILE)
        reason = str(error).removeprefix(f"{file}: ")
        absent[stream] = f"{file.name}: {reason}"
        if not isinstance(error, MissingMediaError):
            unreadable[file.name] = reason
        elif file.is_symlink():
            unreadable[file.name] = f"links to a missing file; {REPLACE_FIX}"
    return absent, unreadable


def _check_session_file(path: Path) -> dict[str, str]:
    """Return {session.json: reason and fix} if it exists and is not a JSON object."""
    if not path.exists():
        return {}
    reason = "not a JSON object"
    if not path.is_file():
        reason = "not a file"
    else:
        try:
            if isinstance(json.loads(path.read_bytes()), dict):
                return {}
        except (OSError, ValueError, RecursionError) as error:
            reason = f"not JSON ({str(error).splitlines()[0]})"
    return {path.name: f"{reason}; fix: correct or delete it"}


def _count_lines(lines: _Lines) -> dict[str, int]:
    """Count the lines of each file, skipped ones included."""
    skipped = UNREAD_KINDS | {"duplicate"}
    lost = {(issue.file, issue.line) for issue in lines.issues if issue.kind in skipped}
    bad_texts = {issue.line for issue in lines.issues if issue.file == TEXT_FILE}
    num_lost = sum(file == METADATA_FILE for file, _ in lost)
    return {
        METADATA_FILE: len(lines.metadata.lines) + num_lost,
        TEXT_FILE: len(lines.texts) + len(bad_texts),
    }
