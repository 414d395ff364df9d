"""Write tiny sessions and media: a few seconds, a few kilobytes."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import soundfile

if TYPE_CHECKING:
    from pathlib import Path

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
) -> np.ndarray:
    """Write gray frames at times (2 s of 30 Hz); return the times as stored."""
    times_s = np.arange(60) / 30 if times_s is None else np.asarray(times_s)
    pts = np.round(times_s * ticks_per_s).astype(int)
    base = Fraction(1, ticks_per_s)
    with av.open(str(path), "w", format=container, options=muxer or {}) as output:
        stream = output.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        stream.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        for i, when in enumerate(pts):
            gray = np.full((HEIGHT, WIDTH, 3), brightness(i), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(gray, format="rgb24")
            frame.pts, frame.time_base = int(when), base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return pts / ticks_per_s


def tone(duration_s: float = 2.0, *, rate_hz: int = 16_000, level: float = 0.3) -> np.ndarray:
    """Return a tone, float64 [N]."""
    return level * np.sin(2 * np.pi * 440 * np.arange(round(duration_s * rate_hz)) / rate_hz)


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
