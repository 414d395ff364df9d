"""Video and sound files by PyAV and libsndfile: frames at given times, sound as mono float32.

Frames are found by presentation time. The times come from the container's packets, without
decoding; packets that an edit list hides are left out. Zero is the container's own start, as
players take it: streams of one file keep their distance, while a file's first timestamp says
nothing of other files (MPEG transport streams begin at 1.4 s, others where a clock happened to be).
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import soundfile
import soxr
from av.video.reformatter import Interpolation, VideoReformatter

from shared.disk_array import DiskArray
from shared.errors import MediaError
from shared.media.video import (
    DAMAGE,
    INDEXED_FORMATS,
    decode_all,
    decode_frames,
    error_reason,
    is_restart,
    nal_length_bytes,
    open_video,
    require_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from av.audio.frame import AudioFrame
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from numpy.typing import NDArray

    from shared.recipe import VisionRecipe

MAX_RATE_HZ = 768_000
"""A larger sample rate is no sound."""

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
class VideoTrack:
    """What the container says of the first video track.

    `times_s` float64 [N]: presentation times from the container's start, increasing; `pts` int64
    [N]: the same in units of the track's time base; `keyframes` bool [N]; `positions` int64 [N]:
    place of each frame's packet in the file's order; `restarts` int64 [R]: places of the packets
    from which a decoder begins afresh, increasing; none where no seek can be trusted.
    """

    codec: str
    width: int
    height: int
    times_s: NDArray[np.float64]
    pts: NDArray[np.int64]
    keyframes: NDArray[np.bool_]
    positions: NDArray[np.int64]
    restarts: NDArray[np.int64]
    num_lost: int = 0
    """Frames that the container's index promises and the file, cut off, does not hold."""
    origin_s: float = 0.0
    """What the container's clock says at its start, which counts as 0; 0 where that means nothing
    (MPEG streams)."""

    @property
    def stop_s(self) -> float:
        """When the last frame stops being shown: one median frame distance after it began."""
        if len(self.times_s) == 1:
            return float(self.times_s[0]) + 1 / 30
        return float(self.times_s[-1] + np.median(np.diff(self.times_s)))


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


def read_video_track(path: Path) -> VideoTrack:
    """Read the frame times of a video without decoding it.

    Raises:
        MediaError: the file doesn't open, or holds no video frame.
    """
    with open_video(path) as (container, stream):
        context = stream.codec_context
        origin_s = (container.start_time or 0) / av.time_base
        is_indexed = container.format.name in INDEXED_FORMATS
        length_bytes = nal_length_bytes(context) if is_indexed else None
        pts, positions, restarts = array("q"), array("q"), array("q")
        is_key = array("b")
        num_packets = 0
        try:
            # A file that ends early is kept as far as it goes.
            for packet in container.demux(stream):
                if packet.is_keyframe and is_restart(packet, context.name, length_bytes):
                    restarts.append(num_packets)
                if packet.pts is not None and not packet.is_discard:
                    pts.append(packet.pts)
                    positions.append(num_packets)
                    is_key.append(packet.is_keyframe)
                num_packets += packet.size > 0
        except DAMAGE as error:
            if not pts:
                raise MediaError(f"{path}: can't be read: {error_reason(error)}") from error
        if not pts:
            raise MediaError(f"{path}: holds no video frame; record or copy it again")
        order = _increasing_order(np.asarray(pts, dtype=np.int64))
        times_pts = np.asarray(pts, dtype=np.int64)[order]
        return VideoTrack(
            codec=context.name,
            width=context.width,
            height=context.height,
            times_s=times_pts.astype(np.float64) * float(stream.time_base or 0) - origin_s,
            pts=times_pts,
            keyframes=np.asarray(is_key, dtype=np.bool_)[order],
            positions=np.asarray(positions, dtype=np.int64)[order],
            restarts=np.asarray(restarts, dtype=np.int64),
            num_lost=max(0, stream.frames - num_packets),
            origin_s=_told_origin(container),
        )


def read_frames(
    path: Path, track: VideoTrack, wanted: Sequence[int], *, recipe: VisionRecipe
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode some frames of a video, in order of time, at the recipe's size.

    What no wanted frame needs is not decoded (see :mod:`shared.media.video`). Frames that don't
    decode
    are left out.

    Args:
        path: the video.
        track: what :func:`read_video_track` gave for it.
        wanted: indices into `track.times_s`, increasing.
        recipe: size and fit.

    Yields:
        (index into `track.times_s`, RGB uint8 [size, size, 3]).

    Raises:
        MediaError: the file doesn't open.
    """
    if not len(wanted):
        return
    index_of_pts = {int(track.pts[i]): i for i in wanted}
    last_pts = int(track.pts[wanted[-1]])
    reformatter = VideoReformatter()
    for frame in decode_frames(path, track, wanted):
        index = index_of_pts.pop(frame.pts, None)
        if index is not None:
            yield index, _picture(frame, reformatter, recipe)
        if not index_of_pts or frame.pts > last_pts:
            return


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
        return replace(sound, start_s=start_s, origin_s=_told_origin(container))


def _start_beside_video(container: InputContainer, first: AudioFrame) -> float:
    """When the first decoded sound begins, from the container's start; that is itself where there
    is nothing else. The decoder has taken the encoder's delay off the samples and off this time.
    """
    if first.time is None or not container.streams.video:
        return 0.0
    # To the microsecond, as the container's start is told.
    return max(0.0, round(first.time - (container.start_time or 0) / av.time_base, 6))


def _told_origin(container: InputContainer) -> float:
    """Start of a container whose clock has a zero."""
    is_told = container.format.name in INDEXED_FORMATS
    return (container.start_time or 0) / av.time_base if is_told else 0.0


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


def _increasing_order(pts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order that sorts by time and keeps the first of equal times."""
    order = np.argsort(pts, kind="stable")
    is_first = np.diff(pts[order], prepend=pts[order[0]] - 1) > 0
    return order[is_first]


def _picture(
    frame: VideoFrame, reformatter: VideoReformatter, recipe: VisionRecipe
) -> NDArray[np.uint8]:
    """A decoded frame as RGB uint8 [size, size, 3]: scaled by area, upright, cut or padded."""
    size = recipe.size
    if recipe.fit == "stretch":
        width = height = size
    else:
        sides = (frame.width, frame.height)
        scale = size / (min(sides) if recipe.fit == "crop" else max(sides))
        width, height = (max(1, round(side * scale)) for side in sides)
    scaled = reformatter.reformat(
        frame, width=width, height=height, format="rgb24", interpolation=Interpolation.AREA
    )
    picture = scaled.to_ndarray().astype(np.uint8, copy=False)
    turns = round(frame.rotation / 90) % 4
    if turns:
        picture = np.rot90(picture, k=turns)
    return np.ascontiguousarray(_square(picture, size))


def _square(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Cut the middle out, or pad with black to the middle, to [size, size, 3]."""
    height, width = picture.shape[:2]
    top, left = max(0, (height - size) // 2), max(0, (width - size) // 2)
    cut = picture[top : top + size, left : left + size]
    if cut.shape[:2] == (size, size):
        return cut
    padded = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - cut.shape[0]) // 2, (size - cut.shape[1]) // 2
    padded[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    return padded
