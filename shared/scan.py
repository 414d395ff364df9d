"""A session looked over once: its clock, where each stream lies on it, and how well each window is
covered.

A :class:`SessionScan` is plain values. It decides which windows become samples, so that sessions
read directly and shards agree on them, and a shard task opens only the files of the columns that it
writes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.audio import measure_loudness
from shared.clock import Interval, Window, clock_offset, interpolate, nearest, plan_windows
from shared.errors import MediaError
from shared.media import read_sound, read_video_track
from shared.recipe import STREAMS, Recipe, Stream
from shared.session import (
    AUDIO_FILE,
    SOURCE_FILES,
    VISION_FILES,
    Metadata,
    TextEvent,
    read_metadata,
    read_text_file,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media import VideoTrack

TEXT_ONLY_TAIL_S = 1.0
"""A session of nothing but text ends this long after its last event began."""


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
    absent: Mapping[Stream, str]
    """Why each other stream is missing."""
    coverage: tuple[tuple[float, ...], ...]
    """Per window, the share of it that each of STREAMS covers, 0..1."""
    oddities: tuple[str, ...]
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
            "intervals": {s: [i.start_s, i.stop_s] for s, i in self.intervals.items()},
            "absent": dict(self.absent),
            "coverage": [list(row) for row in self.coverage],
            "oddities": list(self.oddities),
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
        absent={Stream(s): why for s, why in values["absent"].items()},
        coverage=tuple(tuple(row) for row in values["coverage"]),
        oddities=tuple(values["oddities"]),
        sources={
            n: SourceFile(length_bytes=size, sha256=digest)
            for n, (size, digest) in values["sources"].items()
        },
    )


def scan_session(path: Path, *, recipe: Recipe) -> SessionScan:
    """Look a session over: read every source file once, decode the sound, leave the video
    undecoded.

    Whatever can't be read makes its stream absent, with the reason; nothing raises but a vanished
    folder.
    """
    intervals: dict[Stream, Interval] = {}
    absent: dict[Stream, str] = {}
    tracks: dict[Stream, VideoTrack] = {}
    for stream, file in VISION_FILES.items():
        try:
            tracks[stream] = read_video_track(path / file)
            intervals[stream] = Interval(float(tracks[stream].times_s[0]), tracks[stream].stop_s)
        except MediaError as error:
            absent[stream] = _without_path(error, path)
    gain, rms = 1.0, 0.0
    try:
        sound = read_sound(path / AUDIO_FILE, rate_hz=recipe.audio.rate_hz)
        loudness = measure_loudness(sound.waveform, recipe=recipe.audio)
        gain, rms = loudness.gain, loudness.rms
        intervals[Stream.AUDIO] = Interval(0.0, sound.duration_s)
    except MediaError as error:
        absent[Stream.AUDIO] = _without_path(error, path)

    metadata, events, oddities = read_clocked(path, recipe=recipe)
    media_stop_s = max((i.stop_s for i in intervals.values()), default=None)
    offset_s = _offset(metadata, events, media_stop_s)
    times_s = metadata.times_s - offset_s
    for stream in (Stream.TOUCH, Stream.PROPRIO):
        rows = times_s[metadata.rows_with(stream)]
        if len(rows):
            tick_s = (
                float(np.median(np.diff(rows))) if len(rows) > 1 else 1 / recipe.sensors.rate_hz
            )
            intervals[stream] = Interval(float(rows[0]), float(rows[-1]) + tick_s)
        else:
            absent[stream] = "metadata.jsonl holds no usable reading of it"
    length_s = _length(intervals, events, offset_s)
    for stream in (Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT):
        if any(e.stream is stream for e in events):
            intervals[stream] = Interval(0.0, length_s)
        else:
            absent[stream] = "no event of it in text.jsonl or metadata.jsonl"
    oddities += [
        ("text outside", f"text {e.text[:40]!r} at {e.time_s:g} s lies outside the session")
        for e in events
        if not 0 <= e.time_s - offset_s < length_s
    ]
    windows = plan_windows(
        length_s, duration_s=recipe.window.duration_s, step_s=recipe.window.step_s
    )
    coverage = [
        tuple(
            round(_coverage(s, w, intervals, tracks, metadata, offset_s, recipe), 4)
            for s in STREAMS
        )
        for w in windows
    ]
    return SessionScan(
        session=path.name,
        length_s=length_s,
        clock_offset_s=offset_s,
        gain=gain,
        rms=rms,
        intervals={s: intervals[s] for s in STREAMS if s in intervals},
        absent={s: absent[s] for s in STREAMS if s in absent},
        coverage=tuple(coverage),
        oddities=_sentences(oddities),
        sources=_hash_sources(path),
    )


def read_clocked(
    path: Path, *, recipe: Recipe
) -> tuple[Metadata, tuple[TextEvent, ...], list[tuple[str, str]]]:
    """Metadata and all text events, still on the recorder's clock, and (kind, sentence) of each
    oddity.
    """
    metadata = read_metadata(
        path, touch_size=recipe.sensors.touch_size, proprio_size=recipe.sensors.proprio_size
    )
    events, text_oddities = read_text_file(path)
    merged = sorted([*metadata.events, *events], key=lambda e: e.time_s)
    oddities = [
        (f"{o.file} {o.kind}", f"{o.file} line {o.line}: {o.what}")
        for o in (*metadata.oddities, *text_oddities)
    ]
    return metadata, tuple(merged), oddities


def grid_coverage(
    stream: Stream,
    window: Window,
    times_s: NDArray[np.float64],
    *,
    recipe: Recipe,
) -> float:
    """Share of a window's grid points of a sensor stream that readings at `times_s` cover."""
    grid_s = window.grid(recipe.sensors.rate_hz)
    ones = np.ones((len(times_s), 1), dtype=np.float32)
    values = interpolate(
        times_s,
        ones,
        grid_s,
        max_gap_s=recipe.sensors.max_gap_s,
        edge_s=0.5 / recipe.sensors.rate_hz,
    )
    return float(np.isfinite(values).mean())


def _coverage(
    stream: Stream,
    window: Window,
    intervals: Mapping[Stream, Interval],
    tracks: Mapping[Stream, VideoTrack],
    metadata: Metadata,
    offset_s: float,
    recipe: Recipe,
) -> float:
    """Share of a window that a stream covers."""
    if stream not in intervals:
        return 0.0
    if stream in tracks:
        grid_s = window.grid(recipe.vision.rate_hz)
        _, error_s = nearest(tracks[stream].times_s, grid_s)
        return float(np.mean(np.abs(error_s) <= recipe.vision.tolerance_s))
    if stream in (Stream.TOUCH, Stream.PROPRIO):
        times_s = (metadata.times_s - offset_s)[metadata.rows_with(stream)]
        return grid_coverage(stream, window, times_s, recipe=recipe)
    return intervals[stream].overlap_s(window.interval) / window.duration_s


def _offset(metadata: Metadata, events: tuple[TextEvent, ...], media_stop_s: float | None) -> float:
    """Clock offset of the recorder's timestamps, from its lines or, where there are none, its
    texts.
    """
    if len(metadata.times_s):
        return clock_offset(float(metadata.times_s[0]), float(metadata.times_s[-1]), media_stop_s)
    if events and (media_stop_s is None or events[0].time_s >= media_stop_s):
        return events[0].time_s
    return 0.0


def _length(
    intervals: Mapping[Stream, Interval], events: tuple[TextEvent, ...], offset_s: float
) -> float:
    """Seconds from the clock's zero to the end of the last stream."""
    if intervals:
        return max(0.0, *(i.stop_s for i in intervals.values()))
    return max(0.0, events[-1].time_s - offset_s + TEXT_ONLY_TAIL_S) if events else 0.0


def _sentences(oddities: list[tuple[str, str]]) -> tuple[str, ...]:
    """One sentence per kind: the first case and how many there are."""
    counts = Counter(kind for kind, _ in oddities)
    first: dict[str, str] = {}
    for kind, sentence in oddities:
        first.setdefault(kind, sentence)
    return tuple(
        first[kind] + (f" (and {count - 1} more such lines)" if count > 1 else "")
        for kind, count in counts.items()
    )


def _hash_sources(path: Path) -> dict[str, SourceFile]:
    """Size and SHA-256 of every source file that is there."""
    sources: dict[str, SourceFile] = {}
    for name in SOURCE_FILES:
        try:
            with (path / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                sources[name] = SourceFile(length_bytes=file.tell(), sha256=digest)
        except OSError:
            continue
    return sources


def _without_path(error: MediaError, path: Path) -> str:
    """The message without the folder, so that the same session says the same wherever it lies."""
    return str(error).replace(f"{path}/", "")
