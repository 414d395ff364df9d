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

from shared.audio import Loudness, measure_loudness
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
    read_inline_texts,
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

MAX_SESSION_S = 24 * 3600.0
"""What lies after is left out: one wrong timestamp must not make a billion windows."""

_SENSORS = (Stream.TOUCH, Stream.PROPRIO)


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
    intervals: dict[Stream, Interval] = {}
    absent: dict[Stream, str] = {}
    tracks = _scan_videos(path, intervals, absent)
    loudness = _scan_sound(path, recipe, intervals, absent)
    metadata, events, oddities = read_clocked(path, recipe=recipe)
    media_stop_s = max((i.stop_s for i in intervals.values()), default=None)
    offset_s = recorder_offset(metadata, events, media_stop_s)
    readings = {
        stream: (metadata.times_s - offset_s)[metadata.rows_with(stream)] for stream in _SENSORS
    }
    _place_sensors(readings, recipe, intervals, absent)
    length_s = _length(intervals, events, offset_s, oddities)
    _place_texts(events, offset_s, length_s, intervals, absent, oddities)
    windows = plan_windows(
        length_s, duration_s=recipe.window.duration_s, step_s=recipe.window.step_s
    )
    return SessionScan(
        session=path.name,
        length_s=length_s,
        clock_offset_s=offset_s,
        gain=loudness.gain,
        rms=loudness.rms,
        intervals={s: intervals[s] for s in STREAMS if s in intervals},
        absent={s: absent[s] for s in STREAMS if s in absent},
        coverage=_coverage(windows, intervals, tracks, readings, recipe),
        oddities=_sentences(oddities),
        sources=_hash_sources(path, known or {}),
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


def read_texts(path: Path) -> tuple[TextEvent, ...]:
    """The events of :func:`read_clocked`, without reading the sensors."""
    events, _ = read_text_file(path)
    return tuple(sorted([*read_inline_texts(path), *events], key=lambda e: e.time_s))


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


def _scan_videos(
    path: Path, intervals: dict[Stream, Interval], absent: dict[Stream, str]
) -> dict[Stream, VideoTrack]:
    """Frame times of the eyes that there are."""
    tracks: dict[Stream, VideoTrack] = {}
    for stream, file in VISION_FILES.items():
        try:
            tracks[stream] = read_video_track(path / file)
            intervals[stream] = Interval(float(tracks[stream].times_s[0]), tracks[stream].stop_s)
        except MediaError as error:
            absent[stream] = _without_path(error, path)
    return tracks


def _scan_sound(
    path: Path, recipe: Recipe, intervals: dict[Stream, Interval], absent: dict[Stream, str]
) -> Loudness:
    """Level of the sound; a gain of 1 where there is none."""
    try:
        sound = read_sound(path / AUDIO_FILE, rate_hz=recipe.audio.rate_hz)
    except MediaError as error:
        absent[Stream.AUDIO] = _without_path(error, path)
        return Loudness(rms=0.0, peak=0.0, gain=1.0)
    intervals[Stream.AUDIO] = Interval(0.0, sound.duration_s)
    return measure_loudness(sound.samples.iter_blocks(), recipe=recipe.audio)


def _place_sensors(
    readings: Mapping[Stream, NDArray[np.float64]],
    recipe: Recipe,
    intervals: dict[Stream, Interval],
    absent: dict[Stream, str],
) -> None:
    """A sensor lies from its first reading to one median step after its last."""
    for stream, times_s in readings.items():
        if len(times_s):
            tick_s = 1 / recipe.sensors.rate_hz
            if len(times_s) > 1:
                tick_s = float(np.median(np.diff(times_s)))
            intervals[stream] = Interval(float(times_s[0]), float(times_s[-1]) + tick_s)
        else:
            absent[stream] = "metadata.jsonl holds no usable reading of it"


def _place_texts(
    events: tuple[TextEvent, ...],
    offset_s: float,
    length_s: float,
    intervals: dict[Stream, Interval],
    absent: dict[Stream, str],
    oddities: list[tuple[str, str]],
) -> None:
    """A text stream with an event lies over the whole session: silence is part of it."""
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


def _coverage(
    windows: list[Window],
    intervals: Mapping[Stream, Interval],
    tracks: Mapping[Stream, VideoTrack],
    readings: Mapping[Stream, NDArray[np.float64]],
    recipe: Recipe,
) -> tuple[tuple[float, ...], ...]:
    """Per window, the share of it that each of STREAMS covers."""
    shares = np.zeros((len(windows), len(STREAMS)))
    for column, stream in enumerate(STREAMS):
        if stream not in intervals or not windows:
            continue
        if stream in tracks:
            grid_s = _grids(windows, recipe.vision.rate_hz)
            _, error_s = nearest(tracks[stream].times_s, grid_s)
            shares[:, column] = (np.abs(error_s) <= recipe.vision.tolerance_s).mean(axis=1)
        elif stream in readings:
            grid_s = _grids(windows, recipe.sensors.rate_hz)
            covered = _is_covered(readings[stream], grid_s.ravel(), recipe)
            shares[:, column] = covered.reshape(grid_s.shape).mean(axis=1)
        else:
            overlaps_s = [intervals[stream].overlap_s(w.interval) for w in windows]
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


def _length(
    intervals: Mapping[Stream, Interval],
    events: tuple[TextEvent, ...],
    offset_s: float,
    oddities: list[tuple[str, str]],
) -> float:
    """Seconds from the clock's zero to the end of the last stream."""
    stops = [i.stop_s for i in intervals.values()]
    if not stops and events:
        stops = [events[-1].time_s - offset_s + TEXT_ONLY_TAIL_S]
    length_s = max(0.0, *stops) if stops else 0.0
    if length_s > MAX_SESSION_S:
        what = f"streams reach to {length_s:g} s; what lies after {MAX_SESSION_S:g} s is left out"
        oddities.append(("length", f"{what}, a timestamp must be wrong"))
    return min(length_s, MAX_SESSION_S)


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


def _hash_sources(path: Path, known: Mapping[str, SourceFile]) -> dict[str, SourceFile]:
    """Size and SHA-256 of every source file that is there."""
    sources: dict[str, SourceFile] = {}
    for name in SOURCE_FILES:
        if name in known:
            sources[name] = known[name]
            continue
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
