"""Write tiny sessions and media: a few seconds, a few kilobytes."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections import defaultdict
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import soundfile

from shared.streams import TIME_UNITS, Kind, SensorStream, TextStream, ValueType, VideoStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from shared.recipe import Recipe

    Gaps = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 64, 48


def brightness(index: int) -> int:
    """Return a frame's gray level, which tells neighbors apart after lossy coding."""
    return 30 + (index * 37) % 200


def write_video(
    path: Path,
    *,
    times_s: list[float] | np.ndarray | None = None,
    codec: str = "libx264",
    container: str | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    gop: int = 12,
    b_frames: int = 2,
    ticks_per_s: int = 90_000,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pictures: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Write gray frames, or pictures, at times (2 s of 30 Hz); return the times as stored."""
    if pictures is not None:
        size = pictures[0].shape[1], pictures[0].shape[0]
    if times_s is None:
        times_s = np.arange(60 if pictures is None else len(pictures)) / 30
    times_s = np.asarray(times_s)
    pts = np.round(times_s * ticks_per_s).astype(int)
    base = Fraction(1, ticks_per_s)
    with av.open(str(path), "w", format=container, options=muxer or {}) as output:
        stream = output.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        stream.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        for i, when in enumerate(pts):
            picture = np.full((*size[::-1], 3), brightness(i), dtype=np.uint8)
            if pictures is not None:
                picture = np.stack([pictures[i]] * 3, axis=-1)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(when), base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return pts / ticks_per_s


def tone(
    duration_s: float = 2.0, *, rate_hz: int = 16_000, level: float = 0.3, pitch_hz: float = 440
) -> np.ndarray:
    """Return a tone, float64 [N]."""
    return level * np.sin(2 * np.pi * pitch_hz * np.arange(round(duration_s * rate_hz)) / rate_hz)


def write_tone(path: Path, duration_s: float = 2.0, *, level: float = 0.3) -> None:
    """Write a tone as 16-bit, 16 kHz mono."""
    soundfile.write(path, tone(duration_s, level=level), 16_000, subtype="PCM_16")


def sensor_lines(duration_s: float = 2.0, *, rate_hz: float = 30.0) -> list[dict[str, Any]]:
    """Return metadata lines of smooth touch and movement."""
    lines = []
    for i in range(round(duration_s * rate_hz)):
        time_s = i / rate_hz
        touch = [0.5 + 0.4 * math.sin(2 * time_s + k) for k in range(5)]
        angles = [math.sin(time_s + k) for k in range(10)]
        velocities = [math.cos(time_s + k) for k in range(10)]
        lines.append(
            {"timestamp": round(time_s, 6), "touch": touch, "proprio": angles + velocities}
        )
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write lines of JSON."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read lines of JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_session(folder: Path) -> Path:
    """Write a flawless session: 2 s of video, sound, sensors and two texts."""
    folder.mkdir(parents=True)
    write_video(folder / "vision_left.mp4")
    write_tone(folder / "audio.wav")
    write_lines(folder / "metadata.jsonl", sensor_lines())
    texts = [
        {"timestamp": 0.2, "stream": "internal", "text": "reach"},
        {"timestamp": 1.4, "stream": "external", "text": "got it"},
    ]
    write_lines(folder / "text.jsonl", texts)
    return folder


# --- sessions of any declared streams ---


def write_streams(
    folder: Path,
    recipe: Recipe,
    *,
    duration_s: float = 2.0,
    starts: Mapping[str, float] | None = None,
    gaps: Mapping[str, Gaps] | None = None,
    skip: Iterable[str] = (),
) -> Path:
    """Write a session with every stream of a recipe, from its start to `duration_s`.

    Args:
        folder: the session folder, which may exist.
        recipe: the declared streams.
        duration_s: end of the session.
        starts: first second of streams that begin later; ``session.json`` declares those of media.
        gaps: [start, stop) seconds of streams in which nothing is recorded; audio has none.
        skip: names of streams to leave out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts, gaps = starts or {}, gaps or {}
    streams = {name: spec for name, spec in recipe.streams.items() if name not in {*skip}}
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    tables: dict[str, dict[str, Any]] = defaultdict(dict)
    tracks: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    gops = itertools.count(12)  # no video is a copy of another
    for name, spec in streams.items():
        start_s = starts.get(name, 0.0)
        if isinstance(spec, VideoStream):
            times_s = _times(start_s, duration_s, max(30.0, spec.rate_hz), gaps.get(name, ()))
            times_s = times_s - times_s[0]
            write_video(folder / spec.file, times_s=times_s, size=_size(spec), gop=next(gops))
        elif isinstance(spec, SensorStream):
            times_s, values = make_readings(
                spec, duration_s, start_s=start_s, gaps=gaps.get(name, ())
            )
            if spec.file.endswith(".jsonl"):
                lines[spec.file] += reading_lines(spec, times_s, values)
            else:
                tables[spec.file] |= reading_columns(spec, times_s, values)
        elif isinstance(spec, TextStream):
            its_lines = (
                (line[spec.time] / spec.units_per_s, line)
                for line in text_lines(name, spec, duration_s)
            )
            lines[spec.file] += [
                line
                for time_s, line in its_lines
                if time_s >= start_s and not _in_gap(time_s, gaps.get(name))
            ]
        else:
            tracks[spec.file][spec.track] = tone(
                duration_s - start_s, rate_hz=48_000, pitch_hz=220.0 * (2 + len(tracks))
            )
    for file, its_lines in lines.items():
        write_lines(folder / file, join_lines(its_lines))
    for file, columns in tables.items():
        write_table(folder / file, columns)
    for file, sounds in tracks.items():
        write_tracks(folder / file, [sounds[track] for track in sorted(sounds)])
    media = {n: s for n, s in starts.items() if streams[n].kind in (Kind.VIDEO, Kind.AUDIO)}
    if media:
        (folder / "session.json").write_text(json.dumps({"start_s": media}))
    return folder


def make_readings(
    spec: SensorStream,
    duration_s: float = 2.0,
    *,
    start_s: float = 0.0,
    rate_hz: float | None = None,
    gaps: Gaps = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Return times [N] and smooth values float32 [N, D] of every value type.

    Readings come at `rate_hz`, or at the stream's own rate.
    """
    times_s = _times(start_s, duration_s, rate_hz or spec.rate_hz, gaps)
    columns = [
        _VALUES[group.type](times_s[:, None] + 1.7 * np.arange(group.count // group.vector_size))
        for group in spec.values
    ]
    return times_s, np.hstack([c.reshape(len(times_s), -1) for c in columns]).astype(np.float32)


def _unit_vectors(phase: np.ndarray, size: int) -> np.ndarray:
    vectors = np.stack([np.cos(phase * (1 + 0.3 * k) + k) for k in range(size)], axis=-1)
    vectors[..., 0] += 1.5
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


_VALUES = {
    ValueType.SCALAR: lambda phase: 3 * np.sin(phase),
    ValueType.FRACTION: lambda phase: 0.5 + 0.4 * np.sin(phase),
    ValueType.ANGLE: lambda phase: (2 * phase + np.sin(phase) + np.pi) % (2 * np.pi) - np.pi,
    ValueType.VELOCITY: lambda phase: 2 + np.cos(phase),  # of the angle
    ValueType.POSITION: lambda phase: np.stack([np.sin(phase + k) for k in range(3)], axis=-1),
    ValueType.QUATERNION: lambda phase: _unit_vectors(phase, 4),
    ValueType.DIRECTION: lambda phase: _unit_vectors(phase, 3),
}
"""Value of each type at a phase [N, vectors]."""


def _times(start_s: float, stop_s: float, rate_hz: float, gaps: Gaps) -> np.ndarray:
    times_s = start_s + np.arange(math.ceil((stop_s - start_s) * rate_hz - 1e-9)) / rate_hz
    return np.array([round(t, 6) for t in times_s.tolist() if not _in_gap(t, gaps)])


def _in_gap(time_s: float, gaps: Gaps | None) -> bool:
    return any(start_s <= time_s < stop_s for start_s, stop_s in gaps or ())


def _size(spec: VideoStream) -> tuple[int, int]:
    """Return a picture size, another one for each stream: wider than what is stored."""
    return 2 * spec.width, spec.height + 16


def reading_lines(
    spec: SensorStream, times_s: np.ndarray, values: np.ndarray
) -> list[dict[str, Any]]:
    """Return readings as JSON lines; NaN becomes null."""
    lines = []
    for time, row in zip(to_units(times_s, spec.time_unit), values.tolist(), strict=True):
        numbers = [None if math.isnan(v) else v for v in row]
        own = {spec.key: numbers} if spec.key else dict(zip(spec.names or (), numbers, strict=True))
        lines.append({spec.time: time, **own})
    return lines


def reading_columns(
    spec: SensorStream, times_s: np.ndarray, values: np.ndarray
) -> dict[str, np.ndarray]:
    """Return readings as columns of a table."""
    names = spec.names if spec.key is None else [f"{spec.key}_{i}" for i in range(spec.size)]
    columns = dict(zip(names or (), values.T, strict=True))
    return {spec.time: np.array(to_units(times_s, spec.time_unit)), **columns}


def to_units(times_s: np.ndarray, unit: str) -> list[float] | list[int]:
    """Return times in a unit: seconds, or whole numbers of another unit."""
    if unit == "s":
        return list(times_s.tolist())
    return [round(t * TIME_UNITS[unit]) for t in times_s.tolist()]


def text_lines(name: str, spec: TextStream, duration_s: float) -> list[dict[str, Any]]:
    """Return one text every 0.7 s."""
    own = {} if spec.stream is None else {"stream": spec.stream}
    times = to_units(np.arange(0.2, duration_s, 0.7).round(6), spec.time_unit)
    return [{spec.time: t, **own, "text": f"{name} {i}"} for i, t in enumerate(times)]


def join_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort lines by time, and join sensor lines of equal times."""
    joined: list[dict[str, Any]] = []
    for line in sorted(lines, key=lambda line: line.get("timestamp", 0.0)):
        time = line.get("timestamp")
        if (
            joined
            and "text" not in line
            and time is not None
            and joined[-1].get("timestamp") == time
        ):
            joined[-1] = {**joined[-1], **line}
        else:
            joined.append(line)
    return joined


def write_table(
    path: Path,
    columns: Mapping[str, Any],
    *,
    delimiter: str | None = None,
    decimal: str = ".",
) -> None:
    """Write columns as ``.csv``, ``.tsv`` or ``.parquet``; NaN becomes an empty cell or null."""
    if path.suffix == ".parquet":
        arrays = {name: pa.array(list(map(_plain, values))) for name, values in columns.items()}
        pa.parquet.write_table(pa.table(arrays), path)
        return
    delimiter = delimiter or ("\t" if path.suffix == ".tsv" else ",")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            cells = ["" if _plain(v) is None else str(_plain(v)) for v in row]
            writer.writerow([cell.replace(".", decimal) for cell in cells])


def _plain(value: Any) -> Any:
    """Return a plain Python value, None for NaN."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value]
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and math.isnan(plain) else plain


def write_tracks(path: Path, sounds: Sequence[np.ndarray], *, rate_hz: int = 48_000) -> None:
    """Write audio: one track as it is, several as FLAC tracks of a Matroska file."""
    if len(sounds) == 1:
        soundfile.write(path, sounds[0], rate_hz, subtype="PCM_16")
        return
    with av.open(str(path), "w", format="matroska") as output:
        streams = [output.add_stream("flac", rate=rate_hz, layout="mono") for _ in sounds]
        for stream, sound in zip(streams, sounds, strict=True):
            samples = np.round(sound * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate_hz, 0
            output.mux(stream.encode(frame))
            output.mux(stream.encode())
