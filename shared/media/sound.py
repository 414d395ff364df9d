"""Read audio files as mono float32, measure their loudness, and convert them to 16 bits.

libsndfile reads audio files; ffmpeg's demuxer (PyAV) reads those that libsndfile refuses, and the
audio of video containers. WAV files with wrong sizes are read as if they were right
(:mod:`shared.media.riff`). How channels become one: :mod:`shared.media.channels`.
"""

from __future__ import annotations

import functools
import itertools
import math
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import soundfile
import soxr

from shared.clock import Interval, marked_runs
from shared.errors import MediaError
from shared.files import DiskArray
from shared.machine import open_for_library
from shared.media.channels import MEAN, SILENCE_RMS, Mix, MixChooser
from shared.media.container import (
    READ_ERRORS,
    REPLACE_FIX,
    container_origin_s,
    decode_all,
    is_picture,
    require_bytes,
)
from shared.media.riff import explain_no_header, open_wav, read_wav_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from av.container import InputContainer
    from numpy.typing import NDArray

    from shared.streams import AudioDefaults, ChannelChoice

MAX_RATE_HZ = 768_000
"""Largest sample rate; a header that claims more is damaged."""

_MAX_SAMPLE = np.float32(2**32)
"""Largest plausible sample; no recorder's scale reaches it."""

_FULL_SCALE = np.float32(32767 / 32768)
"""Largest sample of 16 bits."""

MIN_ZEROS_S = 0.1
"""A shorter run of exact zeros is not reported: quiet sound of 16 bits has some."""

_PACKET_FORMATS = frozenset({"FLAC", "OGG", "MP3"})
"""Formats of libsndfile whose header may promise more than their packets hold."""

_BLOCK_FRAMES = 1 << 16
"""Audio is read and resampled in blocks of this many frames, so that memory does not grow with
length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """Decoded audio, mono float32 [N] at `rate_hz`, full scale 1, and properties of its file.

    The samples are on disk, so that memory does not grow with the length.
    """

    samples: DiskArray[np.float32]
    duration_s: float
    is_exact: bool = True
    """Whether decoding gives this duration; headers and packets of compressed sound may not."""
    start_s: float = 0.0
    """Time of the first sample from the container's start; 0 if the file has only audio."""
    origin_s: float = 0.0
    """Reading of the container's clock at its start; see :class:`shared.media.video.VideoTrack`."""
    rate_hz: int
    source_rate_hz: int
    source_channels: int
    num_bad: int
    """Samples that were not finite or implausibly large; they are zero now."""
    peak: float
    """Largest absolute sample of any channel before mixing."""
    num_clipped: int
    """Samples of any channel at or above full scale, before mixing."""
    zeros: tuple[Interval, ...] = ()
    """Runs of at least MIN_ZEROS_S in which every channel is exactly zero, in seconds from the
    first sample."""
    mix: Mix = MEAN
    """How its channels became one."""

    def zeros_from(self, start_s: float) -> tuple[Interval, ...]:
        """Return the runs of zeros on a clock on which the first sample is at `start_s`."""
        return tuple(Interval(z.start_s + start_s, z.stop_s + start_s) for z in self.zeros)

    @property
    def waveform(self) -> NDArray[np.float32]:
        """All samples, in memory."""
        return self.samples[:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loudness:
    """Level of a session's audio, full scale 1, and the gain that normalizes it."""

    rms: float
    peak: float
    gain: float


def read_sound(
    path: Path,
    *,
    rate_hz: int,
    track: int = 0,
    channels: ChannelChoice | Mix = MEAN,
    decode: bool = True,
) -> Sound:
    """Read an audio track of a file as mono: mix the channels, resample with soxr's HQ.

    A mix is applied as it is. A choice is made from all of the sound, which is read a second time
    if its channels are not simply averaged. Unless asked to decode, only headers and packets are
    read: the sound then has a duration, but no samples, levels or zeros.

    Raises:
        MediaError: the file doesn't open or contains no audio.
    """
    require_bytes(path)
    sound = _read_sound(path, rate_hz, track, channels, decode=decode)
    if not decode or channels == sound.mix or sound.mix == MEAN:
        return sound
    return _read_sound(path, rate_hz, track, sound.mix, decode=True)


@contextmanager
def open_sound(path: Path) -> Iterator[soundfile.SoundFile]:
    """Open a sound file by libsndfile; a WAV file with wrong sizes as if they were right.

    Raises:
        soundfile.SoundFileError, TypeError: libsndfile refuses it.
        MediaError: it contains no audio.
    """
    header = read_wav_header(path)
    if header is not None and not header.num_bytes:
        raise MediaError(f"{path}: contains no audio; fix: record or copy it again")
    with ExitStack() as opened:
        source = opened.enter_context(open_for_library(path))
        if header is not None and not header.is_trusted:
            source = open_wav(source, header)
        file = opened.enter_context(soundfile.SoundFile(source))
        if not file.frames:
            raise TypeError("contains no audio")
        yield file


def measure_loudness(blocks: Iterable[NDArray[np.float32]], *, spec: AudioDefaults) -> Loudness:
    """Measure RMS and peak, and compute the gain to the stream's level.

    The gain is lower if the peak would exceed the stream's limit. `blocks` are the session's
    waveform, float32 [n] each, full scale 1.
    """
    num_samples, energies, peak = 0, [0.0], 0.0
    for block in blocks:
        num_samples += len(block)
        energies.append(float(np.square(block, dtype=np.float64).sum()))
        peak = max(peak, float(np.abs(block).max(initial=0.0)))
    return loudness_of(math.sqrt(math.fsum(energies) / max(1, num_samples)), peak, spec=spec)


def loudness_of(rms: float, peak: float, *, spec: AudioDefaults) -> Loudness:
    """Compute the gain to the stream's level from RMS and peak; see :func:`measure_loudness`."""
    gain = 1.0
    if spec.loudness_dbfs is not None and rms > SILENCE_RMS:
        gain = 10 ** (spec.loudness_dbfs / 20) / rms
    limit = 10 ** (spec.peak_dbfs / 20)
    if spec.loudness_dbfs is not None and peak * gain > limit:
        gain = limit / peak
    return Loudness(rms=rms, peak=peak, gain=gain)


def to_int16(waveform: NDArray[np.float32], *, gain: float) -> NDArray[np.int16]:
    """Multiply a waveform by a gain and round it to 16-bit samples, as they are stored."""
    scaled = np.round(waveform.astype(np.float64) * (gain * 32768.0))
    return np.clip(scaled, -32768, 32767).astype(np.int16)


def _read_sound(
    path: Path, rate_hz: int, track: int, channels: ChannelChoice | Mix, *, decode: bool
) -> Sound:
    """Read a track by libsndfile, or by ffmpeg's demuxer, which reads more containers."""
    mix = functools.partial(_mono, path=path, rate_hz=rate_hz, channels=channels)
    if track:
        try:
            return _read_sound_by_av(path, track, mix, decode=decode)
        except (av.FFmpegError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise MediaError(f"{path}: track {track} does not open: {reason}") from error
    try:
        with open_sound(path) as file:
            form = {"source_rate_hz": file.samplerate, "num_channels": file.channels}
            if not decode:
                sound = mix((), num_frames=file.frames, **form)
                return replace(sound, is_exact=file.format not in _PACKET_FORMATS)
            blocks = file.blocks(_BLOCK_FRAMES, frames=file.frames, dtype="float32", always_2d=True)
            return mix(blocks, **form)
    except (soundfile.SoundFileError, TypeError) as sndfile_error:
        # libsndfile is strict with damaged headers; ffmpeg's demuxer reads many of them.
        try:
            return _read_sound_by_av(path, track, mix, decode=decode)
        except (av.FFmpegError, ValueError) as error:
            reason = explain_no_header(path) or (
                f"not a readable audio file: {str(sndfile_error).split(': ')[-1].rstrip('.')}; "
                f"{REPLACE_FIX}"
            )
            raise MediaError(f"{path}: {reason}") from error


def _read_sound_by_av(path: Path, track: int, mix: Callable[..., Sound], *, decode: bool) -> Sound:
    with (
        open_for_library(path) as file,
        av.open(file, "r", metadata_errors="ignore") as container,
    ):
        streams = container.streams.audio
        stream = streams[track] if track < len(streams) else None
        context: Any = stream and stream.codec_context  # None if no decoder is known
        if context is None and track:
            raise MediaError(
                f"{path}: has {len(streams)} audio tracks, the recipe wants track {track}; fix: "
                "correct `track` of the stream"
            )
        if context is None:
            raise MediaError(f"{path}: contains no audio; fix: record or copy it again")
        if not decode:
            return _add_packets(container, stream, mix)
        resampler = av.AudioResampler(format="fltp")
        frames = decode_all(container, stream)
        first = next(frames, None)

        def blocks() -> Iterator[NDArray[np.float32]]:
            collected, num_frames = [], 0  # frames are short, and each block costs time
            for frame in itertools.chain([] if first is None else [first], frames):
                for plain in resampler.resample(frame):
                    collected.append(plain.to_ndarray().T.astype(np.float32, copy=False))
                    num_frames += plain.samples
                if num_frames >= _BLOCK_FRAMES:
                    yield np.concatenate(collected)
                    collected, num_frames = [], 0
            if collected:
                yield np.concatenate(collected)

        sound = mix(blocks(), source_rate_hz=context.sample_rate, num_channels=context.channels)
        start_s = _start_beside_video(container, None if first is None else first.time)
        return replace(sound, start_s=start_s, origin_s=container_origin_s(container))


def _add_packets(container: InputContainer, stream: Any, mix: Callable[..., Sound]) -> Sound:  # noqa: ANN401
    """Return a sound that is as long as the packets of a track together."""
    packets: list[tuple[int, int]] = []
    with suppress(*READ_ERRORS):
        packets += (
            (packet.pts, packet.duration or 0)
            for packet in container.demux(stream)
            if packet.pts is not None and packet.size and not packet.is_discard
        )
    rate_hz, unit_s = stream.codec_context.sample_rate, float(stream.time_base)
    num_frames = round(sum(duration for _, duration in packets) * unit_s * rate_hz)
    channels = stream.codec_context.channels
    sound = mix((), num_frames=num_frames, source_rate_hz=rate_hz, num_channels=channels)
    start_s = _start_beside_video(container, packets[0][0] * unit_s)
    return replace(sound, is_exact=False, start_s=start_s, origin_s=container_origin_s(container))


def _start_beside_video(container: InputContainer, first_s: float | None) -> float:
    """Return when audio begins whose first sample has a time, from the container's start.

    A container without video starts with its audio. The decoder has already removed the encoder's
    delay from the samples and from this time.
    """
    if first_s is None or all(map(is_picture, container.streams.video)):
        return 0.0
    # Rounded to the microsecond, the precision of the container's start.
    return max(0.0, round(first_s - (container.start_time or 0) / av.time_base, 6))


def _mono(
    blocks: Iterable[NDArray[np.float32]],
    *,
    num_frames: int | None = None,
    path: Path,
    source_rate_hz: int,
    num_channels: int,
    rate_hz: int,
    channels: ChannelChoice | Mix,
) -> Sound:
    """Zero bad samples of blocks [n, channels] of a file, mix them to mono, and resample.

    With a choice of channels, they are averaged, and the mix to take instead is returned. The sound
    is as long as `num_frames` if they are given instead of blocks.
    """
    if not 0 < source_rate_hz <= MAX_RATE_HZ:
        raise MediaError(
            f"{path}: claims {source_rate_hz} samples per second, its header is damaged; "
            f"{REPLACE_FIX}"
        )
    if isinstance(channels, int) and channels >= num_channels:
        raise MediaError(
            f"{path}: has {num_channels} channels, the recipe wants channel {channels} (from 0); "
            "fix: correct `channels` of the stream"
        )
    resampler = soxr.ResampleStream(source_rate_hz, rate_hz, 1, dtype="float32", quality="HQ")
    samples: DiskArray[np.float32] = DiskArray(np.float32)
    peak, num_bad, num_clipped = 0.0, 0, 0
    zeros = _ZeroRuns(min_frames=math.ceil(MIN_ZEROS_S * source_rate_hz))
    mix, chooser = MEAN, None
    if isinstance(channels, Mix):
        mix = channels
    else:
        chooser = MixChooser(channels, num_channels=num_channels, rate_hz=source_rate_hz)
    for block in blocks:
        level = np.abs(block)
        if not level.max(initial=0.0) <= _MAX_SAMPLE:  # also true for NaN
            is_bad = ~(level <= _MAX_SAMPLE)
            num_bad += int(is_bad.sum())
            block = np.where(is_bad, np.float32(0), block)
            level = np.abs(block)
        peak = max(peak, float(level.max(initial=0.0)))
        num_clipped += int((level >= _FULL_SCALE).sum())
        zeros.add(block)
        if chooser:
            chooser.add(block)
        mono = mix.apply(block)
        samples.append(mono if source_rate_hz == rate_hz else resampler.resample_chunk(mono))
    if source_rate_hz != rate_hz:
        samples.append(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    num_samples = len(samples)
    if num_frames is not None:
        num_samples = int(num_frames * rate_hz / source_rate_hz + 0.5)  # as soxr rounds it
    if num_samples == 0:
        raise MediaError(f"{path}: contains no audio; fix: record or copy it again")
    return Sound(
        samples=samples,
        duration_s=num_samples / rate_hz,
        rate_hz=rate_hz,
        source_rate_hz=source_rate_hz,
        source_channels=num_channels,
        num_bad=num_bad,
        peak=peak,
        num_clipped=num_clipped,
        zeros=tuple(Interval(a / source_rate_hz, b / source_rate_hz) for a, b in zeros.runs()),
        mix=chooser.choose(silent_frames=sum(b - a for a, b in zeros.runs())) if chooser else mix,
    )


class _ZeroRuns:
    """Finds runs of frames in which every channel is zero, in blocks [n, channels]."""

    def __init__(self, *, min_frames: int) -> None:
        self._min_frames = min_frames
        self._stop = 0
        self._runs: list[tuple[int, int]] = []
        """Runs so far, [start, stop); the last one may be short, and go on in the next block."""

    def add(self, block: NDArray[np.float32]) -> None:
        """Find the runs of the next block."""
        start, self._stop = self._stop, self._stop + len(block)
        # Every long run contains a probe, or the first or last frame of a block.
        probes = np.append(np.arange(0, len(block), self._min_frames), len(block) - 1)
        if len(block) == 0 or block[probes].any(axis=1).all():
            return
        is_zero = np.logical_and.reduce([channel == 0 for channel in block.T])
        for first, stop in ((start + a, start + b) for a, b in marked_runs(is_zero)):
            if self._runs and self._runs[-1][1] == first:
                first = self._runs.pop()[0]
            elif stop - first < self._min_frames and stop < self._stop:
                continue
            self._runs.append((first, stop))

    def runs(self) -> list[tuple[int, int]]:
        """Return the runs of at least the minimum, [start, stop)."""
        return [run for run in self._runs if run[1] - run[0] >= self._min_frames]
