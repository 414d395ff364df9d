"""A session looked over once: its clock, where each stream lies on it, and how well each window is
covered.

A :class:`SessionScan` is plain values. It decides which windows become samples, so that sessions
read directly and shards agree on them, and a shard task opens only the files of the columns that it
writes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import Interval, Window, interpolate, nearest, plan_windows
from shared.errors import MediaError
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
from shared.session.folder import (
    AUDIO_FILE,
    SOURCE_FILES,
    VISION_FILES,
    Metadata,
    TextEvent,
    read_inline_texts,
    read_metadata,
    read_text_file,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.video import VideoTrack


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """Identity of a file that samples are made of."""

    length_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionScan:
    """What the shard job needs to know of a session; all times on the session clock."""

    session: str
    length_s: float
    clock_offset_s: float
    """Subtracted from the recorder's timestamps."""
    gain: float
    """Factor that normalizes the session's loudness."""
    rms: float
    """Level of the sound before the gain, full scale 1; 0 without sound."""
    intervals: Mapping[Stream, Interval]
    """Where each stream that the session has lies."""
    start_overrides: Mapping[Stream, float]
    """Streams that begin elsewhere than sound at 0 and a video's frames at its container's times,
    and where: columns depend on it, as on the file."""
    absent: Mapping[Stream, str]
    """Why each other stream is missing."""
    coverage: tuple[tuple[float, ...], ...]
    """Per window, the share of it that each of STREAMS covers, 0..1."""
    issues: tuple[str, ...]
    """What was left out of the files while reading, one sentence per kind."""
    sources: Mapping[str, SourceFile]

    def windows(self, recipe: Recipe) -> list[Window]:
        """Every window planned for this session."""
        window = recipe.window
        return plan_windows(self.length_s, duration_s=window.duration_s, step_s=window.step_s)

    def present(self, window: Window, recipe: Recipe) -> tuple[Stream, ...]:
        """Streams that cover enough of a window."""
        shares = zip(STREAMS, self.coverage[window.index], strict=True)
        return tuple(s for s, share in shares if share > 0 and share >= recipe.window.min_coverage)

    def rejection(self, window: Window, recipe: Recipe) -> str | None:
        """Why a window does not become a sample; None where it does."""
        present = self.present(window, recipe)
        missing = [s for s in recipe.required if s not in present]
        if not missing:
            return None if present else self._thin(window, recipe, tuple(self.intervals))
        return self._thin(window, recipe, tuple(missing))

    def _thin(self, window: Window, recipe: Recipe, streams: tuple[Stream, ...]) -> str:
        shares = self.coverage[window.index]
        parts = [f"{s} covers {shares[STREAMS.index(s)]:.0%}" for s in streams] or ["nothing here"]
        return (
            f"{', '.join(parts)} of [{window.start_s:g}, {window.stop_s:g}) s; "
            f"window.min_coverage asks for {recipe.window.min_coverage:.0%}"
        )

    def session_rejection(self, recipe: Recipe) -> str | None:
        """Why no window of the session can become a sample; None where some can."""
        missing = [s for s in recipe.required if s not in self.intervals]
        if missing:
            return "; ".join(f"required stream {s}: {self.absent[s]}" for s in missing)
        return None if self.intervals else "no stream of it can be read"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; :func:`scan_from_json` reads them back."""
        return {
            "session": self.session,
            "length_s": self.length_s,
            "clock_offset_s": self.clock_offset_s,
            "gain": self.gain,
            "rms": self.rms,
            "moved": dict(self.start_overrides),
            "intervals": {s: [i.start_s, i.stop_s] for s, i in self.intervals.items()},
            "absent": dict(self.absent),
            "coverage": [list(row) for row in self.coverage],
            "oddities": list(self.issues),
            "sources": {n: [f.length_bytes, f.sha256] for n, f in self.sources.items()},
        }


def scan_from_json(values: Mapping[str, Any]) -> SessionScan:
    """A scan from the values of :meth:`SessionScan.as_json`."""
    return SessionScan(
        session=values["session"],
        length_s=values["length_s"],
        clock_offset_s=values["clock_offset_s"],
        gain=values["gain"],
        rms=values["rms"],
        intervals={Stream(s): Interval(*pair) for s, pair in values["intervals"].items()},
        start_overrides={Stream(s): start_s for s, start_s in values["moved"].items()},
        absent={Stream(s): why for s, why in values["absent"].items()},
        coverage=tuple(tuple(row) for row in values["coverage"]),
        issues=tuple(values["oddities"]),
        sources={
            n: SourceFile(length_bytes=size, sha256=digest)
            for n, (size, digest) in values["sources"].items()
        },
    )


def scan_session(
    path: Path, *, recipe: Recipe, known: Mapping[str, SourceFile] | None = None
) -> SessionScan:
    """Look a session over: read every source file once, decode the sound, leave the video
    undecoded.

    Whatever can't be read makes its stream absent, with the reason; nothing raises but a vanished
    folder.

    Args:
        path: the session folder.
        recipe: how streams become fields.
        known: source files whose identity is known to be still the same; they are not hashed again.
    """
    media = _Media()
    starts, flaw = read_starts(path)
    if flaw is None:
        _scan_videos(path, starts, media)
        _scan_sound(path, starts, recipe, media)
    else:  # what can't be placed can't be used
        media.absent.update(dict.fromkeys(MEDIA_STREAMS, flaw))
    metadata, events, issues = read_clocked(path, recipe=recipe)
    placed = align_streams(media.intervals, metadata, events, recipe=recipe)
    issues += _left_out(placed, events)
    absent = {**media.absent, **placed.absent}
    windows = plan_windows(
        placed.length_s, duration_s=recipe.window.duration_s, step_s=recipe.window.step_s
    )
    return SessionScan(
        session=path.name,
        length_s=placed.length_s,
        clock_offset_s=placed.offset_s,
        gain=media.loudness.gain,
        rms=media.loudness.rms,
        intervals={s: placed.intervals[s] for s in STREAMS if s in placed.intervals},
        start_overrides=media.start_overrides,
        absent={s: absent[s] for s in STREAMS if s in absent},
        coverage=_coverage(windows, placed, media.tracks, recipe),
        issues=_sentences(issues),
        sources=_hash_sources(path, known or {}),
    )


def read_clocked(
    path: Path, *, recipe: Recipe
) -> tuple[Metadata, tuple[TextEvent, ...], list[tuple[str, str]]]:
    """Metadata and all text events, still on the recorder's clock, and (kind, sentence) of each
    issue.
    """
    metadata = read_metadata(
        path, touch_size=recipe.sensors.touch_size, proprio_size=recipe.sensors.proprio_size
    )
    events, text_issues = read_text_file(path)
    merged = sorted([*metadata.events, *events], key=lambda e: e.time_s)
    issues = [
        (f"{o.file} {o.kind}", f"{o.file} line {o.line}: {o.what}")
        for o in (*metadata.issues, *text_issues)
    ]
    return metadata, tuple(merged), issues


def read_texts(path: Path) -> tuple[TextEvent, ...]:
    """The events of :func:`read_clocked`, without reading the sensors."""
    events, _ = read_text_file(path)
    return tuple(sorted([*read_inline_texts(path), *events], key=lambda e: e.time_s))


_SILENCE = Loudness(rms=0.0, peak=0.0, gain=1.0)


@dataclass(slots=True)
class _Media:
    """What is found of video and sound."""

    tracks: dict[Stream, VideoTrack] = field(default_factory=dict)
    loudness: Loudness = _SILENCE
    intervals: dict[Stream, Interval] = field(default_factory=dict)
    start_overrides: dict[Stream, float] = field(default_factory=dict)
    absent: dict[Stream, str] = field(default_factory=dict)


def _scan_videos(path: Path, starts: Mapping[Stream, float], media: _Media) -> None:
    """Frame times of the eyes that there are."""
    for stream, file in VISION_FILES.items():
        try:
            own = read_video_track(path / file)
        except MediaError as error:
            media.absent[stream] = _without_path(error, path)
            continue
        track = media.tracks[stream] = align_track(own, starts.get(stream))
        media.intervals[stream] = Interval(float(track.times_s[0]), track.stop_s)
        if track is not own:
            media.start_overrides[stream] = starts[stream]


def _scan_sound(path: Path, starts: Mapping[Stream, float], recipe: Recipe, media: _Media) -> None:
    """Place and level of the sound; a gain of 1 where there is none."""
    try:
        sound = read_sound(path / AUDIO_FILE, rate_hz=recipe.audio.rate_hz)
    except MediaError as error:
        media.absent[Stream.AUDIO] = _without_path(error, path)
        return
    lies = media.intervals[Stream.AUDIO] = align_sound(sound, starts.get(Stream.AUDIO))
    if lies.start_s:
        media.start_overrides[Stream.AUDIO] = lies.start_s
    media.loudness = measure_loudness(sound.samples.iter_blocks(), recipe=recipe.audio)


def _left_out(placed: Alignment, events: tuple[TextEvent, ...]) -> list[tuple[str, str]]:
    """(kind, sentence) of each text outside the session, and of a session that is too long."""
    found = []
    if placed.stop_s > MAX_SESSION_S:
        what = f"streams reach to {placed.stop_s:g} s; what lies after {MAX_SESSION_S:g} s is left"
        found.append(("length", f"{what} out, a timestamp must be wrong"))
    found += [
        (
            "text outside",
            f"{e.source_line}: text {e.text[:40]!r} at {e.time_s:g} s lies outside the session",
        )
        for e in events
        if not 0 <= e.time_s - placed.offset_s < placed.length_s
    ]
    return found


def _coverage(
    windows: list[Window],
    placed: Alignment,
    tracks: Mapping[Stream, VideoTrack],
    recipe: Recipe,
) -> tuple[tuple[float, ...], ...]:
    """Per window, the share of it that each of STREAMS covers."""
    shares = np.zeros((len(windows), len(STREAMS)))
    for column, stream in enumerate(STREAMS):
        if stream not in placed.intervals or not windows:
            continue
        if stream in tracks:
            grid_s = _grids(windows, recipe.vision.rate_hz)
            _, error_s = nearest(tracks[stream].times_s, grid_s)
            shares[:, column] = (np.abs(error_s) <= recipe.vision.tolerance_s).mean(axis=1)
        elif stream in placed.readings:
            grid_s = _grids(windows, recipe.sensors.rate_hz)
            covered = _is_covered(placed.readings[stream], grid_s.ravel(), recipe)
            shares[:, column] = covered.reshape(grid_s.shape).mean(axis=1)
        else:
            overlaps_s = [placed.intervals[stream].overlap_s(w.interval) for w in windows]
            shares[:, column] = np.array(overlaps_s) / recipe.window.duration_s
    return tuple(tuple(round(float(share), 4) for share in row) for row in shares)


def _grids(windows: list[Window], rate_hz: float) -> NDArray[np.float64]:
    """Grid times of every window [W, T]."""
    return np.stack([w.grid(rate_hz) for w in windows])


def _is_covered(
    times_s: NDArray[np.float64], grid_s: NDArray[np.float64], recipe: Recipe
) -> NDArray[np.bool_]:
    """Grid points that get a value from readings at `times_s`."""
    values = interpolate(
        times_s,
        np.ones((len(times_s), 1), dtype=np.float32),
        grid_s,
        max_gap_s=recipe.sensors.max_gap_s,
        edge_s=0.5 / recipe.sensors.rate_hz,
    )
    return np.isfinite(values[:, 0])


def _sentences(issues: list[tuple[str, str]]) -> tuple[str, ...]:
    """One sentence per kind: the first case and how many there are."""
    counts = Counter(kind for kind, _ in issues)
    first: dict[str, str] = {}
    for kind, sentence in issues:
        first.setdefault(kind, sentence)
    return tuple(
        first[kind] + (f" (and {count - 1} more such lines)" if count > 1 else "")
        for kind, count in counts.items()
    )


def _hash_sources(path: Path, known: Mapping[str, SourceFile]) -> dict[str, SourceFile]:
    """Size and SHA-256 of every source file that is there."""
    sources: dict[str, SourceFile] = {}
    for name in SOURCE_FILES:
        if name in known:
            sources[name] = known[name]
            continue
        if not (path / name).is_file():  # a pipe would be read for ever
            continue
        try:
            with (path / name).open("rb") as file:
                digest = sha256_of_file(file)
                sources[name] = SourceFile(length_bytes=file.tell(), sha256=digest)
        except OSError:
            continue
    return sources


def _without_path(error: MediaError, path: Path) -> str:
    """The message without the folder, so that the same session says the same wherever it lies."""
    return str(error).replace(f"{path}/", "")
