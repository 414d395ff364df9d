"""Read a session for validation into plain values.

:func:`probe_session` opens every source file once: it reads all lines of the timestamped files,
decodes all sound, reads the time of every frame, and decodes frames in evenly spread stretches of
each video. At depth "quick" it decodes nothing. The checks (:mod:`preprocess.validate.checks` and
its neighbors) open nothing; they judge the :class:`SessionProbe`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from preprocess.validate.repair_plan import RepairPlan
from shared.clock import nearest
from shared.errors import MediaError, MissingMediaError
from shared.files import DiskArray
from shared.kinds.audio import align_sound, read_stretched
from shared.kinds.video import align_track, interval_of
from shared.machine import read_bytes
from shared.media.riff import read_wav_header
from shared.media.sound import measure_loudness
from shared.media.video import read_frames, read_video_track
from shared.session.alignment import Placement, align_streams, read_placement
from shared.session.folder import SESSION_INFO_FILE, files_of_stream, unused_files
from shared.session.lines import Readings
from shared.session.rates import find_rate_faults, propose_stretches
from shared.session.scan import find_faults
from shared.session.still import Recorded
from shared.session.timestamps import read_lines
from shared.streams import AudioStream, VideoDefaults, VideoStream
from shared.values import clean_readings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.clock import Interval, MaskedSpan
    from shared.media.riff import WavHeader
    from shared.media.sound import Sound
    from shared.media.video import VideoTrack
    from shared.recipe import Recipe
    from shared.session.lines import FileLines, ParseIssue, SessionLines, TextEvent
    from shared.session.names import UnusedName
    from shared.session.rates import RateFault
    from shared.session.timestamps import WrongLines, WrongUnit

READER_VERSION = 1
"""Raise it when what is read of the same files (containers, sound, lines, clocks) changes."""

Depth = Literal["quick", "full"]
"""How much of a session is read. quick: all lines, and what headers, containers and packets tell;
no frame and no sound is decoded. full: everything."""

NUM_STRETCHES = 16
STRETCH_FRAMES = 60
"""Of a video with more than NUM_STRETCHES * STRETCH_FRAMES frames, NUM_STRETCHES stretches of
STRETCH_FRAMES frames are decoded, spread evenly from the first frame to the last.
"""

NUM_PICTURES, NUM_EXCERPTS = 14, 64
_TINY = VideoDefaults(size=16, fit="stretch")


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioProbe:
    """What validation reads of a sound."""

    sound: Sound
    """Without its samples."""
    interval: Interval
    """On the session clock."""
    rms: float
    """Like the levels of `sound`, 0 if it was not decoded."""
    header: WavHeader | None
    """Of a WAV file."""
    excerpts: NDArray[np.float32]
    """Samples [NUM_EXCERPTS, n], spread evenly over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoProbe:
    """What validation reads of a video."""

    track: VideoTrack
    num_checked: int
    """Frames that were decoded, or tried."""
    undecoded: NDArray[np.int64]
    """Indices of the frames that show damage or, if they were tried, did not decode."""
    pictures: Sequence[NDArray[np.uint8]] = ()
    """NUM_PICTURES or, if not all decode, fewer pictures, at evenly spread times."""

    @property
    def lost_start(self) -> NDArray[np.int64]:
        """Indices of the undecoded frames before the first keyframe; a decoder needs one first."""
        keyframes = np.flatnonzero(self.track.keyframes)
        first = keyframes[0] if len(keyframes) else len(self.track.pts)
        return self.undecoded[self.undecoded < first]

    def damaged_stretches(self) -> list[tuple[float, float, int]]:
        """Return start, stop (seconds) and frame count of each run of damaged frames."""
        return self.track.runs(self.undecoded[len(self.lost_start) :])


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionProbe:
    """Everything that validation reads of a session; all times are on the session clock."""

    recipe: Recipe
    videos: Mapping[str, VideoProbe]
    audio: Mapping[str, AudioProbe]
    readings: Mapping[str, Readings]
    """Of each sensor stream that is present; values as recorded, quaternions not normalized."""
    missing: Mapping[str, NDArray[np.int64]]
    """Of each sensor, the lines whose quaternions or directions have almost no length."""
    events: Mapping[str, tuple[TextEvent, ...]]
    """Of each text stream with events, those outside the session too."""
    files: Mapping[str, tuple[FileLines, ...]]
    """Lines of each timestamped file that exists, on the recorder's clock."""
    issues: tuple[ParseIssue, ...]
    unreadable: Mapping[str, str]
    """File name -> reason and fix, of each file that exists and cannot be read."""
    placement: Placement
    """What ``session.json`` says; with an error, the containers' own start times apply."""
    clock_notes: tuple[str, ...]
    """One sentence per stream that is not on the clock that it should be on."""
    unused: tuple[UnusedName, ...]
    """Files, folders and keys that no declared stream uses."""
    units: Mapping[str, WrongUnit]
    """Timestamped file -> the unit that it has instead of the declared one; it is divided here."""
    rate_faults: tuple[RateFault, ...]
    """Streams whose clock ran at another rate than that of the others, or may have."""
    left_out: Mapping[str, tuple[WrongLines, ...]]
    """Timestamped file -> lines that are left out, because their timestamps are wrong."""
    are_rates_known: bool
    """Whether the clocks were compared."""
    intervals: Mapping[str, Interval]
    faults: Mapping[str, tuple[MaskedSpan, ...]]
    """Stretches of streams whose content is wrong, whether the recipe masks them or not."""
    absent: Mapping[str, str]
    not_recorded: frozenset[str]
    """Absent streams of which nothing was recorded: no file, no reading, no event."""
    offset_s: float
    """Session clock = recorder's clock - `offset_s`."""
    duration_s: float
    stop_s: float
    """End of the last stream; greater than `duration_s` if it is too late for a session."""
    depth: Depth
    plan: Callable[[], RepairPlan] = RepairPlan
    """Plans what --fix does, at the first message that depends on it; by default it does nothing.
    """

    @property
    def proposed_stretches(self) -> dict[str, float]:
        """Factors of wrong clocks, by strong evidence."""
        return propose_stretches(self.rate_faults, self.recipe)

    def times_s(self, name: str) -> NDArray[np.float64] | None:
        """Return the times of a stream's frames, readings or texts; None for sound or if absent."""
        if name in self.videos:
            return self.videos[name].track.times_s
        if name in self.readings:
            return self.readings[name].times_s
        if name in self.events:
            return np.array([event.time_s for event in self.events[name]])
        return None

    def locate(self, name: str, row: int) -> str:
        """Return file, line and second of a frame, reading or text of a stream."""
        times_s = self.times_s(name)
        assert times_s is not None
        where = f"({times_s[row]:.3f} s)"
        if name in self.readings:
            file = self.recipe.streams[name].file
            noun = "row" if file.endswith(".parquet") else "line"
            return f"{file} {noun} {self.readings[name].lines[row]} {where}"
        if name in self.events:
            return f"{self.events[name][row].source_line} {where}"
        return f"{self.source(name)} at {times_s[row]:.2f} s"

    def label(self, name: str, column: int) -> str:
        """Return stream and name of a sensor's value, by its number if it has no name."""
        spec = self.recipe.sensors[name]
        return f"{name}[{spec.names[column] if spec.names else column}]"

    def source(self, name: str) -> str:
        """Return the file of a stream, with the track if other streams could be meant."""
        spec = self.recipe.streams[name]
        if not isinstance(spec, AudioStream):
            return spec.file
        others = [s for n, s in self.recipe.streams.items() if n != name and s.file == spec.file]
        return f"{spec.file} track {spec.track}" if spec.track or others else spec.file

    def streams_of(self, file: str) -> tuple[str, ...]:
        """Return the streams that a file can hold."""
        return tuple(n for n, s in self.recipe.streams.items() if file in files_of_stream(s))

    def sensors_of(self, file: str) -> tuple[str, ...]:
        """Return the sensors whose readings are in a file."""
        return tuple(name for name, spec in self.recipe.sensors.items() if spec.file == file)

    def issues_of(self, file: str) -> list[ParseIssue]:
        """Return the issues of a file."""
        return [issue for issue in self.issues if issue.file == file]

    def num_lines(self, file: str) -> int:
        """Return the number of lines of a file that are not blank."""
        return max((lines.num_lines for lines in self.files.get(file, ())), default=0)

    def num_unread(self, file: str) -> int:
        """Return the number of lines of a file that are skipped as a whole."""
        return sum(lines.num_unread for lines in self.files.get(file, ()))

    def num_timed_lines(self, file: str) -> int:
        """Return the number of lines of a file with times of their own."""
        return max((len(lines.times_s) for lines in self.files.get(file, ())), default=0)

    @property
    def shared_files(self) -> tuple[str, ...]:
        """Timestamped files that share the session's offset."""
        streams = self.recipe.streams.items()
        shared = {n for n, s in streams if s.clock == "session" and n not in self.placement.starts}
        return tuple(f for f in self.files if not shared.isdisjoint(self.streams_of(f)))


def probe_session(
    path: Path,
    *,
    recipe: Recipe,
    unused: Sequence[UnusedName] | None = None,
    depth: Depth = "full",
) -> SessionProbe:
    """Read everything that the checks of a depth judge.

    `unused` are files of the session that no stream uses; None finds those in the folder.

    Raises:
        OSError: the file system refuses to open a folder or file.
    """
    placement = read_placement(path, recipe)
    videos, audio, failures = _probe_media(path, recipe, placement, depth)
    media = {name: interval_of(video.track) for name, video in videos.items()}
    media |= {name: sound.interval for name, sound in audio.items()}
    # The length of the media tells the unit of the timestamps in the lines.
    media_stop_s = max((interval.stop_s for interval in media.values()), default=None)
    timed = read_lines(path, recipe, media_stop_s, is_cleaned=False)
    lines, missing = _drop_missing(timed.lines, recipe)
    absent, unreadable = _explain_failures(path, failures, recipe)
    unreadable |= {issue.file: issue.message for issue in lines.issues if issue.kind == "file"}
    unreadable |= _check_session_file(path / SESSION_INFO_FILE)
    alignment = align_streams(media, lines, placement=placement, recipe=recipe)
    absent |= alignment.absent
    readings = {n: replace(lines.readings[n], times_s=t) for n, t in alignment.times_s.items()}
    recorded = Recorded(
        path=path,
        recipe=recipe,
        intervals=alignment.intervals,
        tracks={name: video.track for name, video in videos.items()},
        zeros={n: own.sound.zeros_from(own.interval.start_s) for n, own in audio.items()},
        readings={name: (own.times_s, own.values) for name, own in readings.items()},
    )
    is_exact = all(own.sound.is_exact for own in audio.values())
    rates = find_rate_faults(recorded, decode=depth == "full") if is_exact else None
    if depth == "quick":  # only pictures tell whether the world stood still, or a recorder
        judged = {} if videos else {name: alignment.intervals[name] for name in readings}
        recorded = replace(recorded, intervals=judged)
    return SessionProbe(
        recipe=recipe,
        videos=videos,
        audio=audio,
        readings=readings,
        faults=find_faults(recorded, rates or ()),
        missing=missing,
        events={
            name: tuple(replace(e, time_s=t.time_s) for e, t in zip(events, texts, strict=True))
            for name, texts in alignment.texts.items()
            if (events := lines.events[name])
        },
        files={f.file: tuple(o for o in lines.files if o.file == f.file) for f in lines.files},
        issues=tuple(issue for issue in lines.issues if issue.kind != "file"),
        unreadable=unreadable,
        placement=placement,
        clock_notes=tuple(alignment.notes),
        unused=(*lines.unused, *(unused_files(path, recipe) if unused is None else unused)),
        units=timed.units,
        left_out=timed.left_out,
        rate_faults=rates or (),
        are_rates_known=rates is not None,
        intervals={n: alignment.intervals[n] for n in recipe.streams if n in alignment.intervals},
        absent={n: absent[n] for n in recipe.streams if n in absent},
        not_recorded=frozenset(alignment.not_recorded)
        | {n for n, error in failures.items() if isinstance(error, MissingMediaError)},
        offset_s=alignment.offset_s,
        duration_s=alignment.duration_s,
        stop_s=alignment.stop_s,
        depth=depth,
    )


def _probe_media(
    path: Path, recipe: Recipe, placement: Placement, depth: Depth
) -> tuple[dict[str, VideoProbe], dict[str, AudioProbe], dict[str, MediaError]]:
    """Read all videos and sounds; those that cannot be read are absent, with the reason."""
    failures: dict[str, MediaError] = {}
    videos: dict[str, VideoProbe] = {}
    audio: dict[str, AudioProbe] = {}
    for name, spec in recipe.streams.items():
        try:
            if isinstance(spec, VideoStream):
                videos[name] = _probe_video(path / spec.file, name, placement, depth=depth)
            elif isinstance(spec, AudioStream):
                audio[name] = _probe_audio(
                    path / spec.file, name, placement, spec=spec, depth=depth
                )
        except MediaError as error:
            failures[name] = error
    return videos, audio, failures


def _drop_missing(
    lines: SessionLines, recipe: Recipe
) -> tuple[SessionLines, dict[str, NDArray[np.int64]]]:
    """Drop readings that cannot be cleaned, as the shard job does; return their lines too."""
    readings: dict[str, Readings] = {}
    missing: dict[str, NDArray[np.int64]] = {}
    for name, recorded in lines.readings.items():
        _, is_usable = clean_readings(recorded.values, recipe.sensors[name])
        missing[name] = recorded.lines[~is_usable]
        readings[name] = Readings(
            times_s=recorded.times_s[is_usable],
            values=recorded.values[is_usable],
            lines=recorded.lines[is_usable],
        )
    return replace(lines, readings=readings), missing


def _probe_video(path: Path, name: str, placement: Placement, *, depth: Depth) -> VideoProbe:
    """Read the frame times of a video, and decode frames spread over it."""
    stretch = placement.stretches.get(name, 1.0)
    recorded = read_video_track(path, decode=depth == "full")
    track = align_track(recorded, placement.starts.get(name), stretch=stretch)
    num_frames = len(track.times_s)
    stretches = [range(num_frames)] if depth == "full" else []
    if stretches and num_frames > NUM_STRETCHES * STRETCH_FRAMES:
        starts = np.linspace(0, num_frames - STRETCH_FRAMES, NUM_STRETCHES).astype(int)
        stretches = [range(start, start + STRETCH_FRAMES) for start in starts]
    is_lost = track.is_damaged
    decoded: dict[int, NDArray[np.uint8]] = {}
    for requested in stretches:
        decoded |= dict(read_frames(path, track, requested, spec=_TINY))
        is_lost[np.setdiff1d(requested, list(decoded))] = True
    grid_s = np.linspace(track.times_s[0], track.times_s[-1], NUM_PICTURES + 2)
    kept = nearest(track.times_s, grid_s[1:-1])[0]
    return VideoProbe(
        track=track,
        num_checked=sum(map(len, stretches)),
        undecoded=np.flatnonzero(is_lost),
        pictures=[decoded[index] for index in kept if index in decoded],
    )


def _probe_audio(
    path: Path, name: str, placement: Placement, *, spec: AudioStream, depth: Depth
) -> AudioProbe:
    """Decode all of a sound and measure its levels, or read its length."""
    stretch = placement.stretches.get(name, 1.0)
    sound = read_stretched(path, spec, stretch=stretch, decode=depth == "full")
    loudness = measure_loudness(sound.samples.iter_blocks(), spec=spec)
    length = min(len(sound.samples) * 2 // NUM_EXCERPTS, sound.rate_hz // 2)
    starts = np.linspace(0, len(sound.samples) - length, NUM_EXCERPTS).astype(int)
    return AudioProbe(
        sound=replace(sound, samples=DiskArray(np.float32)),
        interval=align_sound(sound, placement.starts.get(name)),
        rms=loudness.rms,
        header=read_wav_header(path),
        excerpts=np.stack([sound.samples[start : start + length] for start in starts]),
    )


def _explain_failures(
    path: Path, failures: Mapping[str, MediaError], recipe: Recipe
) -> tuple[dict[str, str], dict[str, str]]:
    """Return why streams are absent; and why files that exist cannot be read, with the fix."""
    absent: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for name, error in failures.items():
        file = path / recipe.streams[name].file
        reason = str(error).removeprefix(f"{file}: ")
        absent[name] = f"{file.name}: {reason}"
        if not isinstance(error, MissingMediaError):
            unreadable[file.name] = reason
    return absent, unreadable


def _check_session_file(path: Path) -> dict[str, str]:
    """Return why ``session.json`` cannot be read."""
    if not path.exists():
        return {}
    reason = "not a JSON object" if path.is_file() else "not a file"
    try:
        if path.is_file() and isinstance(json.loads(read_bytes(path)), dict):
            return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = f"not JSON ({str(error).splitlines()[0]})"
    return {path.name: f"{reason}; fix: correct or delete it"}
