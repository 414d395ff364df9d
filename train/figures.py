"""Figures of the predictions' page: arrays become pictures, sounds and paths that lie in the page
itself. Pure functions; all lengths are in pixels.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
import soundfile
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

LEVEL_COLOURS = np.array(
    [(6, 6, 20), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)],
    dtype=np.float64,
)
"""From silent to loud; the colours of matplotlib's magma."""

MASKED_COLOUR = (128, 128, 128)
"""Where there is no sound, or nothing was predicted."""

JPEG_QUALITY = 80

LETTER_WIDTH = 6.6
"""About the mean width of a letter of 12 pixels' height."""

LANE_GAP = 14.0
"""Least room between two texts of a lane."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A text event in its place."""

    x: float
    width: float
    """Of the time it takes."""
    lane: int
    """Texts that would run into each other lie in different lanes, 0 on top."""
    text: str
    start_s: float
    stop_s: float


def draw_levels(levels: NDArray[np.uint8], *, num_levels: int) -> NDArray[np.uint8]:
    """A spectrogram of dMel levels, RGB [channels, frames, 3], low pitches at the bottom.

    Args:
        levels: [frames, channels]; `num_levels` and above are masked.
        num_levels: how many there are.
    """
    places = np.linspace(0, len(LEVEL_COLOURS) - 1, num_levels)
    anchors = np.arange(len(LEVEL_COLOURS))
    palette = np.tile(np.array(MASKED_COLOUR, dtype=np.uint8), (256, 1))
    for channel in range(3):
        palette[:num_levels, channel] = np.interp(places, anchors, LEVEL_COLOURS[:, channel])
    return palette[levels.T[::-1]]


def png_uri(picture: NDArray[np.uint8]) -> str:
    """A picture, RGB [H, W, 3], as a data URI."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return _uri("image/png", file.getvalue())


def jpeg_uri(picture: NDArray[np.uint8]) -> str:
    """A frame, RGB [H, W, 3], as a data URI."""
    pixels = np.ascontiguousarray(picture)
    data = simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorspace="RGB")
    return _uri("image/jpeg", data)


def wav_uri(samples: NDArray[np.int16], *, rate_hz: int) -> str:
    """Mono sound as the data URI of a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="WAV", subtype="PCM_16")
    return _uri("audio/wav", file.getvalue())


def draw_curve(
    times_s: NDArray[np.float64],
    values: NDArray[np.float64],
    *,
    pixels_per_s: float,
    low: float,
    high: float,
    height: float,
) -> str:
    """A curve as an SVG path; it has gaps where a value is NaN or an angle passes from pi to -pi.

    Args:
        times_s: [N].
        values: [N], `low` at the bottom and `high` on top.
        pixels_per_s: scale of time.
        low: lowest value shown.
        high: highest value shown.
        height: of the figure.
    """
    x = times_s * pixels_per_s
    y = (high - values) / (high - low) * height
    is_shown = np.isfinite(values)
    jumps = np.abs(np.diff(values, prepend=np.nan)) < np.pi
    goes_on = is_shown & np.concatenate([[False], is_shown[:-1]]) & jumps
    return "".join(
        f"{'L' if on else 'M'}{a:.1f} {b:.1f}"
        for a, b, shown, on in zip(x, y, is_shown, goes_on, strict=True)
        if shown
    )


def place_texts(
    events: Sequence[Mapping[str, Any]], *, pixels_per_s: float, tick_s: float
) -> list[Mark]:
    """Give each text event its place and a lane in which it overlaps no other.

    Args:
        events: of :func:`train.model.outputs.group_events`, in order of time.
        pixels_per_s: scale of time.
        tick_s: how long a token takes; 0 where tokens are no ticks.
    """
    marks: list[Mark] = []
    free_from: list[float] = []
    for event in events:
        x, text = event["timestamp"] * pixels_per_s, event["text"].strip() or "·"
        duration_s = len(event["tokens"]) * tick_s
        lane = next((i for i, free in enumerate(free_from) if free <= x), len(free_from))
        free_from[lane:] = [
            x + max(len(text) * LETTER_WIDTH, duration_s * pixels_per_s) + LANE_GAP,
            *free_from[lane + 1 :],
        ]
        marks.append(
            Mark(
                x=round(x, 1),
                width=round(max(3.0, duration_s * pixels_per_s), 1),
                lane=lane,
                text=text,
                start_s=event["timestamp"],
                stop_s=event["timestamp"] + duration_s,
            )
        )
    return marks


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
