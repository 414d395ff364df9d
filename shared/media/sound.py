"""Video and sound files by PyAV and libsndfile: frames at given times, sound as mono float32.

Frames are found by presentation time. The times come from the container's packets, without
decoding; packets that an edit list hides are left out. Zero is the container's own start, as
players take it: streams of one file keep their distance, while a file's first timestamp says
nothing of other files (MPEG transport streams begin at 1.4 s, others where a clock happened to be).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import soundfile
import soxr

from shared.errors import MediaError
from shared.files import DiskArray
from shared.media.video import container_origin_s, decode_all, require_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from av.audio.frame import AudioFrame
    from av.container import InputContainer
    from numpy.typing import NDArray

    from shared.recipe import AudioRecipe

MAX_RATE_HZ = 768_000
"""A larger sample rate is no sound."""

SILENCE_RMS = 1e-3
"""Below this RMS (full scale 1) a session counts as silent and its level is left alone."""

_MAX_SAMPLE = np.float32(2**32)
"""A larger sample is no number of any scale that recorders write."""

_FULL_SCALE = np.float32(32767 / 32768)
"""The largest sample of 16 bits."""

_PAIRWISE_CHANNELS = 8
"""From so many numbers on, NumPy adds them in another order."""

_BLOCK_FRAMES = 1 << 16
"""Sound is read and resampled in blocks of this many frames, so that memory does not grow with
length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """A decoded sound file: mono float32 [N] at `rate_hz`, full scale 1, with what the file was.

    The samples lie in a file, so that memory does not grow with the sound's length.
    """

    samples: DiskArray[np.float32]
    start_s: float
    """When the first sample sounds, from the container's start; 0 in files of nothing but sound."""
    origin_s: float
    """As in :class:`VideoTrack`."""
    rate_hz: int
    source_rate_hz: int
    source_channels: int
    source_format: str
    num_bad: int
    """Samples that were no finite number, or one beyond any scale; they are zero now."""
    peak: float
    """Largest absolute sample of any channel before mixing."""
    num_clipped: int
    """Samples of any channel at full scale or over it, before mixing."""

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate_hz

    @property
    def waveform(self) -> NDArray[np.float32]:
        """All samples, in memory."""
        return self.samples[:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loudness:
    """Level of a session's sound, full scale 1, and the gain that normalizes it."""

    rms: float
    peak: float
    gain: float


def read_sound(path: Path, *, rate_hz: int) -> Sound:
    """Read a sound file as mono at a sample rate; channels are averaged, resampling is soxr's HQ.

    Raises:
        MediaError: the file doesn't open, or holds no sound.
    """
    require_bytes(path)
    try:
        with soundfile.SoundFile(str(path)) as file:
            return _mono(
                file.blocks(_BLOCK_FRAMES, dtype="float32", always_2d=True),
                path,
                file.samplerate,
                file.channels,
                file.subtype,
                rate_hz,
            )
    except (soundfile.SoundFileError, TypeError) as sndfile_error:
        # libsndfile is strict with damaged headers; ffmpeg's demuxer reads many of them.
        try:
            return _read_sound_by_av(path, rate_hz)
        except (av.FFmpegError, ValueError) as error:
            reason = str(sndfile_error).split(": ")[-1].rstrip(".")
            raise MediaError(f"{path}: is no sound file that can be read: {reason}") from error


def measure_loudness(blocks: Iterable[NDArray[np.float32]], *, recipe: AudioRecipe) -> Loudness:
    """RMS, peak and the gain to the recipe's level, lowered where the peak would pass the limit.

    Args:
        blocks: the session's waveform, float32 [n] each, full scale 1.
        recipe: level and limit.
    """
    num_samples, energies, peak = 0, [0.0], 0.0
    for block in blocks:
        num_samples += len(block)
        energies.append(float(np.square(block, dtype=np.float64).sum()))
        peak = max(peak, float(np.abs(block).max(initial=0.0)))
    rms = math.sqrt(math.fsum(energies) / max(1, num_samples))
    gain = 1.0
    if recipe.loudness_dbfs is not None and rms > SILENCE_RMS:
        gain = 10 ** (recipe.loudness_dbfs / 20) / rms
    limit = 10 ** (recipe.peak_dbfs / 20)
    if recipe.loudness_dbfs is not None and peak * gain > limit:
        gain = limit / peak
    return Loudness(rms=rms, peak=peak, gain=gain)


def to_int16(waveform: NDArray[np.float32], *, gain: float) -> NDArray[np.int16]:
    """The waveform times the gain as 16-bit samples, as they are stored."""
    scaled = np.round(waveform.astype(np.float64) * (gain * 32768.0))
    return np.clip(scaled, -32768, 32767).astype(np.int16)


def _read_sound_by_av(path: Path, rate_hz: int) -> Sound:
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = next(iter(container.streams.audio), None)
        context: Any = stream and stream.codec_context  # None where no decoder is known
        if context is None:
            raise MediaError(f"{path}: holds no sound; record or copy it again")
        source_rate_hz, channels = context.sample_rate, context.channels
        resampler = av.AudioResampler(format="fltp")
        frames = decode_all(container, stream)
        first = next(frames, None)

        def blocks() -> Iterator[NDArray[np.float32]]:
            for frame in itertools.chain([] if first is None else [first], frames):
                for plain in resampler.resample(frame):
                    yield plain.to_ndarray().T.astype(np.float32, copy=False)

        sound = _mono(blocks(), path, source_rate_hz, channels, context.name, rate_hz)
        start_s = 0.0 if first is None else _start_beside_video(container, first)
        return replace(sound, start_s=start_s, origin_s=container_origin_s(container))


def _start_beside_video(container: InputContainer, first: AudioFrame) -> float:
    """When the first decoded sound begins, from the container's start; that is itself where there
    is nothing else. The decoder has taken the encoder's delay off the samples and off this time.
    """
    if first.time is None or not container.streams.video:
        return 0.0
    # To the microsecond, as the container's start is told.
    return max(0.0, round(first.time - (container.start_time or 0) / av.time_base, 6))


def _mono(
    blocks: Iterator[NDArray[np.float32]],
    path: Path,
    source_rate_hz: int,
    channels: int,
    source_format: str,
    rate_hz: int,
) -> Sound:
    """Mix, mend and resample blocks [n, channels] of a sound file."""
    if not 0 < source_rate_hz <= MAX_RATE_HZ:
        raise MediaError(
            f"{path}: says it has {source_rate_hz} samples per second; its header is damaged"
        )
    resampler = soxr.ResampleStream(source_rate_hz, rate_hz, 1, dtype="float32", quality="HQ")
    samples: DiskArray[np.float32] = DiskArray(np.float32)
    peak, num_bad, num_clipped = 0.0, 0, 0
    for block in blocks:
        level = np.abs(block)
        if not level.max(initial=0.0) <= _MAX_SAMPLE:
            is_bad = ~(level <= _MAX_SAMPLE)
            num_bad += int(is_bad.sum())
            block = np.where(is_bad, np.float32(0), block)
            level = np.abs(block)
        peak = max(peak, float(level.max(initial=0.0)))
        num_clipped += int((level >= _FULL_SCALE).sum())
        mono = _mean_of_channels(block)
        samples.append(mono if source_rate_hz == rate_hz else resampler.resample_chunk(mono))
    if source_rate_hz != rate_hz:
        samples.append(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    if len(samples) == 0:
        raise MediaError(f"{path}: holds no sound; record or copy it again")
    return Sound(
        samples=samples,
        start_s=0.0,
        origin_s=0.0,
        rate_hz=rate_hz,
        source_rate_hz=source_rate_hz,
        source_channels=channels,
        source_format=source_format,
        num_bad=num_bad,
        peak=peak,
        num_clipped=num_clipped,
    )


def _mean_of_channels(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """``block.mean(axis=1)`` to the bit; adding whole columns is ten times faster."""
    channels = block.shape[1]
    if channels >= _PAIRWISE_CHANNELS:
        return np.asarray(block.mean(axis=1, dtype=np.float32))
    total = block[:, 0].copy()
    for channel in range(1, channels):
        total += block[:, channel]
    total /= np.float32(channels)
    return total
