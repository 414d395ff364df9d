"""Scan a session once: its clock, the interval of each stream, and the coverage of each window.

A :class:`SessionScan` holds plain values. It decides which windows become samples, so that sessions
read directly and shards agree on them. A shard task therefore opens only the files of the columns
that it writes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import Interval, Window, frame_mask, nearest, plan_windows, sensor_mask
from shared.errors import MediaError, MissingMediaError
from shared.files import sha256_of_file
from shared.media.sound import Loudness, measure_loudness, read_sound
from shared.media.video import read_video_track
from shared.recipe import STREAMS, Recipe, Stream
from shared.session.alignment import (
    MAX_SESSION_S,
    MEDIA_STREAMS,
    Alignment,
    align_sound,
    align_streams,
    align_track,
    read_starts,
)
from shared.session.folder import AUDIO_FILE, SOURCE_FILES, VISION_FILES, read_timed_lines

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.video import VideoTrack
    from shared.session.folder import TextEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """Size and checksum of a file that samples are made of."""

    length_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionScan:
    """What the shard job needs to know about a session; all times on the session clock."""

    session: str
    duration_s: float
    clock_offset_s: float
    """Subtracted from the recorder's timestamps."""
    gain: float
    """Factor that normalizes the session's loudness."""
    rms: float
    """Level of the audio before the gain, full scale 1; 0 without audio."""
    intervals: Mapping[Stream, Interval]
    """Interval of each stream that the session has."""
    start_overrides: Mapping[Stream, float]
    """Start of each media stream that begins elsewhere than by default.

    By default audio begins at 0 and a video at its container's times. Columns depend on these
    starts as they depend on the source files.
    """
    absent: Mapping[Stream, str]
    """Why each other stream is missing."""
    not_recorded: frozenset[Stream]
    """Missing streams that nothing was recorded of: no file, no reading, no event."""
    coverage: tuple[tuple[float, ...], ...]
    """Per window, the share of it that each of STREAMS covers, 0..1."""
    issues: tuple[str, ...]
    """What was skipped while reading the files, one sentence per kind."""
    source_files: Mapping[str, SourceFile]

    def windows(self, recipe: Recipe) -> list[Window]:
        """List every window planned for this session."""
        window = recipe.window
        return plan_windows(
            self.duration_s, window_s=window.duration_s, stride_s=window.effective_stride_s
        )

    def present(self, window: Window, recipe: Recipe) -> tuple[Stream, ...]:
        """List the streams that cover enough of a window."""
        shares = zip(STREAMS, self.coverage[window.index], strict=True)
        return tuple(s for s, share in shares if share > 0 and share >= recipe.window.min_coverage)

    def rejection(self, window: Window, recipe: Recipe) -> str | None:
        """Explain why a window does not become a sample; None if it does."""
        present = self.present(window, recipe)
        missing = [s for s in recipe.required if s not in present]
        if not missing:
            return None if present else self._low_coverage(window, recipe, tuple(self.intervals))
        return self._low_coverage(window, recipe, tuple(missing))

    def _low_coverage(self, window: Window, recipe: Recipe, streams: tuple[Stream, ...]) -> str:
        shares = self.coverage[window.index]
        causes = [f"{s} covers {shares[STREAMS.index(s)]:.0%}" for s in streams] or ["nothing here"]
        return (
            f"{', '.join(causes)} of [{window.start_s:g}, {window.stop_s:g}) s; "
            f"window.min_coverage asks for {recipe.window.min_coverage:.0%}"
        )

    def session_rejection(self, recipe: Recipe) -> str | None:
        """Explain why no window of the session can become a sample; None if some can."""
        missing = [s for s in recipe.required if s not in self.intervals]
        if missing:
            return "; ".join(f"required stream {s}: {self.absent[s]}" for s in missing)
        return None if self.intervals else "no stream of it can be read"

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values, which :func:`scan_from_json` reads back."""
        return {
            "session": self.session,
            "duration_s": self.duration_s,
            "clock_offset_s": self.clock_offset_s,
            "gain": self.gain,
            "rms": self.rms,
            "start_overrides": dict(self.start_overrides),
            "intervals": {s: [i.start_s, i.stop_s] for s, i in self.intervals.items()},
            "absent": dict(self.absent),
            "not_recorded": sorted(self.not_recorded),
            "coverage": [list(row) for row in self.coverage],
            "issues": list(self.issues),
            "sources": {n: [f.length_bytes, f.sha256] for n, f in self.source_files.items()},
        }


def scan_from_json(values: Mapping[str, Any]) -> SessionScan:
    """Restore a scan from the values of :meth:`SessionScan.as_json`."""
    return SessionScan(
        session=values["session"],
        duration_s=values["duration_s"],
        clock_offset_s=values["clock_offset_s"],
        gain=values["gain"],
        rms=values["rms"],
        intervals={Stream(s): Interval(*pair) for s, pair in values["intervals"].items()},
        start_overrides={Stream(s): start_s for s, start_s in values["start_overrides"].items()},
        absent={Stream(s): reason for s, reason in values["absent"].items()},
        not_recorded=frozenset(map(Stream, values["not_recorded"])),
        coverage=tuple(tuple(row) for row in values["coverage"]),
        issues=tuple(values["issues"]),
        source_files={
            n: SourceFile(length_bytes=size, sha256=digest)
            for n, (size, digest) in values["sources"].items()
        },
    )


def scan_session(
    path: Path, *, recipe: Recipe, known: Mapping[str, SourceFile] | None = None
) -> SessionScan:
    """Scan a session: read every source file once and decode the audio, but no video.

    A stream that can't be read is absent, with the reason. Only a folder that disappears meanwhile
    raises an error.

    Args:
        path: the session folder.
        recipe: how streams become fields.
        known: source files that are known to be unchanged; they are not hashed again.
    """
    media = _Media()
    starts, start_error = read_starts(path)
    if start_error is None:
        _scan_videos(path, starts, media)
        _scan_sound(path, starts, recipe, media)
    else:  # media without a position on the clock can't be used
        media.absent.update(dict.fromkeys(MEDIA_STREAMS, start_error))
    metadata, events, issues = read_timed_lines(path, recipe=recipe)
    alignment = align_streams(media.intervals, metadata, events, recipe=recipe)
    sentences = [(f"{i.file} {i.kind}", f"{i.file} line {i.line}: {i.message}") for i in issues]
    sentences += _outside_session(alignment, events)
    absent = {**media.absent, **alignment.absent}
    windows = plan_windows(
        alignment.duration_s,
        window_s=recipe.window.duration_s,
        stride_s=recipe.window.effective_stride_s,
    )
    return SessionScan(
        session=path.name,
        duration_s=alignment.duration_s,
        clock_offset_s=alignment.offset_s,
        gain=media.loudness.gain,
        rms=media.loudness.rms,
        intervals={s: alignment.intervals[s] for s in STREAMS if s in alignment.intervals},
        start_overrides=media.start_overrides,
        absent={s: absent[s] for s in STREAMS if s in absent},
        not_recorded=frozenset({*media.not_recorded, *alignment.absent}),
        coverage=_coverage(windows, alignment, media.tracks, recipe),
        issues=_first_of_each_kind(sentences),
        source_files=_hash_source_files(path, known or {}),
    )


_SILENCE = Loudness(rms=0.0, peak=0.0, gain=1.0)


@dataclass(slots=True)
class _Media:
    """What the scan has found of video and audio so far."""

    tracks: dict[Stream, VideoTrack] = field(default_factory=dict)
    loudness: Loudness = _SILENCE
    intervals: dict[Stream, Interval] = field(default_factory=dict)
    start_overrides: dict[Stream, float] = field(default_factory=dict)
    absent: dict[Stream, str] = field(default_factory=dict)
    not_recorded: set[Stream] = field(default_factory=set)

    def add_absent(self, stream: Stream, error: MediaError, path: Path) -> None:
        """Record why a stream is missing.

        The reason leaves out the folder, so that it does not depend on where the session is stored.
        """
        self.absent[stream] = str(error).replace(f"{path}/", "")
        if isinstance(error, MissingMediaError):
            self.not_recorded.add(stream)


def _scan_videos(path: Path, starts: Mapping[Stream, float], media: _Media) -> None:
    """Read the frame times of each video."""
    for stream, file in VISION_FILES.items():
        try:
            recorded = read_video_track(path / file)
        except MediaError as error:
            media.add_absent(stream, error, path)
            continue
        track = media.tracks[stream] = align_track(recorded, starts.get(stream))
        media.intervals[stream] = Interval(float(track.times_s[0]), track.stop_s)
        if track is not recorded:
            media.start_overrides[stream] = starts[stream]


def _scan_sound(path: Path, starts: Mapping[Stream, float], recipe: Recipe, media: _Media) -> None:
    """Measure the interval and the level of the audio."""
    try:
        sound = read_sound(path / AUDIO_FILE, rate_hz=recipe.audio.rate_hz)
    except MediaError as error:
        media.add_absent(Stream.AUDIO, error, path)
        return
    interval = media.intervals[Stream.AUDIO] = align_sound(sound, starts.get(Stream.AUDIO))
    if interval.start_s:
        media.start_overrides[Stream.AUDIO] = interval.start_s
    media.loudness = measure_loudness(sound.samples.iter_blocks(), recipe=recipe.audio)


def _outside_session(alignment: Alignment, events: tuple[TextEvent, ...]) -> list[tuple[str, str]]:
    """List (kind, sentence) of each text outside the session, and of a session that is too long."""
    sentences = []
    if alignment.stop_s > MAX_SESSION_S:
        sentence = (
            f"streams reach to {alignment.stop_s:g} s; everything after {MAX_SESSION_S:g} s is "
            "left out, a timestamp must be wrong"
        )
        sentences.append(("length", sentence))
    sentences += [
        (
            "text outside",
            f"{e.source_line}: text {e.text[:40]!r} at {e.time_s:g} s is outside the session",
        )
        for e in events
        if not 0 <= e.time_s - alignment.offset_s < alignment.duration_s
    ]
    return sentences


def _coverage(
    windows: list[Window],
    alignment: Alignment,
    tracks: Mapping[Stream, VideoTrack],
    recipe: Recipe,
) -> tuple[tuple[float, ...], ...]:
    """Compute, per window, the share of it that each of STREAMS covers."""
    shares = np.zeros((len(windows), len(STREAMS)))
    for column, stream in enumerate(STREAMS):
        if stream not in alignment.intervals or not windows:
            continue
        if stream in tracks:
            # Video: grid times that have a frame near enough.
            grid_s = _grids(windows, recipe.vision.rate_hz)
            _, error_s = nearest(tracks[stream].times_s, grid_s)
            is_near = frame_mask(error_s, tolerance_s=recipe.vision.tolerance_s)
            shares[:, column] = is_near.mean(axis=1)
        elif stream in alignment.readings:
            # Sensors: grid times that get a value by interpolation.
            grid_s = _grids(windows, recipe.sensors.rate_hz)
            covered = sensor_mask(
                alignment.readings[stream],
                grid_s.ravel(),
                max_gap_s=recipe.sensors.max_gap_s,
                edge_s=0.5 / recipe.sensors.rate_hz,
            )
            shares[:, column] = covered.reshape(grid_s.shape).mean(axis=1)
        else:
            # Audio and texts: overlap with the stream's interval.
            overlaps_s = [alignment.intervals[stream].overlap_s(w.interval) for w in windows]
            shares[:, column] = np.array(overlaps_s) / recipe.window.duration_s
    return tuple(tuple(round(float(share), 4) for share in row) for row in shares)


def _grids(windows: list[Window], rate_hz: float) -> NDArray[np.float64]:
    """Return the grid times of every window [W, T]."""
    return np.stack([w.grid(rate_hz) for w in windows])


def _first_of_each_kind(sentences: list[tuple[str, str]]) -> tuple[str, ...]:
    """Keep the first sentence of each kind, with the number of the others."""
    counts = Counter(kind for kind, _ in sentences)
    first: dict[str, str] = {}
    for kind, sentence in sentences:
        first.setdefault(kind, sentence)
    return tuple(
        first[kind] + (f" (and {count - 1} more such lines)" if count > 1 else "")
        for kind, count in counts.items()
    )


def _hash_source_files(path: Path, known: Mapping[str, SourceFile]) -> dict[str, SourceFile]:
    """Return the size and SHA-256 of every source file that exists."""
    sources: dict[str, SourceFile] = {}
    for name in SOURCE_FILES:
        if name in known:
            sources[name] = known[name]
            continue
        if not (path / name).is_file():  # reading a pipe would never end
            continue
        try:
            with (path / name).open("rb") as file:
                digest = sha256_of_file(file)
                sources[name] = SourceFile(length_bytes=file.tell(), sha256=digest)
        except OSError:
            continue
    return sources
