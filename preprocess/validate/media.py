"""Read pictures and sound for the report: thumbnails of a video, envelope and level of the sound.

Only what the report shows is kept: frames are decoded one by one from the keyframes before them,
sound is read in blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from shared.clock import frame_mask, nearest
from shared.media.sound import open_sound, read_sound
from shared.media.video import read_frames
from shared.page import format_time, jpeg_uri

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.video import VideoTrack
    from shared.page import TimeAxis
    from shared.streams import AudioStream, VideoStream

NUM_THUMBNAILS = 10
_LONG_S = 120.0
_THUMBNAIL_SIZE = 128

_BLOCK_FRAMES = 1 << 16
_MIN_BIN_SAMPLES = 4
_FALLBACK_RATE_HZ = 16_000
_MIN_LEVEL_S = 0.02
"""The level is measured over at least this time: one period of 50 Hz."""

FULL_SCALE = 32767 / 32768
"""The largest sample of 16 bits; sound that reaches it is clipped."""

FLOOR_DB = -90.0
"""Level of silence: the noise of 16 bits."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """The frame that the recipe selects at a time."""

    x: float
    width: float
    jpeg_uri: str
    """Empty if there is no frame."""
    label: str
    state: str
    """shown, damaged (the frame does not decode) or none (no frame near enough)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """The sound in bins.

    Shapes: edges_s [N + 1] from the first sample on, the others [N], N > 0. Full scale is 1.
    """

    edges_s: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    level_db: NDArray[np.float64]
    """RMS of all channels, dBFS, smoothed over at least 20 ms."""
    is_clipped: NDArray[np.bool_]


def read_thumbnails(
    path: Path, track: VideoTrack, *, axis: TimeAxis, spec: VideoStream
) -> list[Thumbnail]:
    """Read the frames that the recipe selects at NUM_THUMBNAILS times spread over the axis.

    Raises:
        MediaError: the file does not open any more.
    """
    width = axis.width / NUM_THUMBNAILS
    times_s = axis.start_s + (np.arange(NUM_THUMBNAILS) + 0.5) / NUM_THUMBNAILS * axis.duration_s
    indices, error_s = nearest(track.times_s, times_s)
    near = frame_mask(error_s, tolerance_s=spec.tolerance_s)
    scale = _THUMBNAIL_SIZE / max(spec.height, spec.width)
    size = max(1, round(scale * spec.height)), max(1, round(scale * spec.width))
    small = spec.model_copy(update={"size": size})
    uris: dict[int, str] = {}
    # One pass over the frames after each keyframe, or over all without an index.
    keyframes = np.flatnonzero(track.keyframes) if track.is_indexed else np.zeros(0)
    requested = np.unique(indices[near]).tolist()
    for _, run in itertools.groupby(requested, lambda i: np.searchsorted(keyframes, i, "right")):
        for index, picture in read_frames(path, track, list(run), spec=small):
            uris[index] = jpeg_uri(picture)
    thumbnails: list[Thumbnail] = []
    for slot, (index, is_near) in enumerate(zip(indices.tolist(), near.tolist(), strict=True)):
        uri = uris.get(index, "") if is_near else ""
        state = "shown" if uri else "damaged" if is_near else "none"
        time_s = float(track.times_s[index] if is_near else times_s[slot])
        label = format_time(time_s, resolution_s=0.01 if axis.duration_s < _LONG_S else 0.1)
        thumbnails.append(Thumbnail(slot * width, width, uri, label, state))
    return thumbnails


def read_envelope(path: Path, spec: AudioStream, *, duration_s: float, axis: TimeAxis) -> Envelope:
    """Measure extremes and level of a sound file, in bins about as wide as a unit of the axis.

    Raises:
        MediaError: the file does not open any more.
    """
    blocks = _sound_blocks(path, spec.track)
    rate_hz, first = next(blocks, (1, np.zeros((0, 1), dtype=np.float32)))
    num_samples = duration_s * rate_hz
    num_columns = duration_s / axis.duration_s * axis.width
    num_bins = max(1, int(min(num_columns, num_samples / _MIN_BIN_SAMPLES)))
    low, high = np.full(num_bins, np.inf), np.full(num_bins, -np.inf)
    energy, count = np.zeros(num_bins), np.zeros(num_bins)
    position = 0
    for _, block in itertools.chain([(rate_hz, first)], blocks):
        if len(block) == 0:
            continue
        # By channel: reducing along the long axis is ten times faster.
        samples = np.ascontiguousarray(block.T)
        samples = np.nan_to_num(samples, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        number = position + np.arange(len(block), dtype=np.int64)
        position += len(block)
        bins = np.minimum(number * num_bins // max(1, round(num_samples)), num_bins - 1)
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        at = bins[starts]
        low[at] = np.minimum(low[at], np.minimum.reduceat(samples, starts, axis=1).min(axis=0))
        high[at] = np.maximum(high[at], np.maximum.reduceat(samples, starts, axis=1).max(axis=0))
        squares = np.square(samples, dtype=np.float64)
        energy[at] += np.add.reduceat(squares, starts, axis=1).mean(axis=0)
        count[at] += np.diff(np.append(starts, len(block)))
    low, high = np.where(count == 0, 0.0, low), np.where(count == 0, 0.0, high)  # silent
    edges_s = np.linspace(0.0, duration_s, num_bins + 1)
    size = max(1, int(np.ceil(_MIN_LEVEL_S / max(edges_s[1] - edges_s[0], 1e-9))))
    starts = np.arange(0, num_bins, size)
    count = np.maximum(1, np.add.reduceat(count, starts))
    power = np.add.reduceat(energy, starts) / count
    level_db = 10 * np.log10(np.maximum(power, 10 ** (FLOOR_DB / 10)))
    return Envelope(
        edges_s=edges_s,
        low=low,
        high=high,
        level_db=np.repeat(level_db, size)[:num_bins],
        is_clipped=np.maximum(high, -low) >= FULL_SCALE,
    )


def _sound_blocks(path: Path, track: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (rate, samples [n, channels]) of a sound file, block by block at its own rate."""
    if track == 0:  # libsndfile reads no other
        has_begun = False
        try:
            with open_sound(path) as file:
                for block in file.blocks(_BLOCK_FRAMES, dtype="float32", always_2d=True):
                    yield file.samplerate, block
                    has_begun = True
            return
        except (soundfile.SoundFileError, TypeError):
            if has_begun:
                return
    # A file that libsndfile refuses is read as the shard job reads it.
    sound = read_sound(path, rate_hz=_FALLBACK_RATE_HZ, track=track)
    yield sound.rate_hz, sound.waveform[:, None]
