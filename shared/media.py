"""Video and sound files by PyAV and libsndfile: frames at given times, sound as mono float32.

Frames are found by presentation time. The times come from the container's packets, without
decoding; packets that an edit list hides are left out. Zero is the container's own start, as
players take it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import soundfile
import soxr
from av.video.reformatter import Interpolation, VideoReformatter

from shared.errors import MediaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from numpy.typing import NDArray

    from shared.recipe import VisionRecipe

MAX_PIXELS = 8192 * 8192
"""A larger picture is refused before it is decoded."""

MAX_RATE_HZ = 768_000
"""A larger sample rate is no sound."""

_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,mpegvideo,h264,hevc,ivf,ogg,flv,mjpeg",
}
"""No playlists that name other files or hosts, no text that ffmpeg would take for a picture."""

_INDEXED_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Containers in which a seek ends at the keyframe asked for."""

_DAMAGE = (av.FFmpegError, IndexError)
"""What PyAV raises while it reads packets: the second where damage makes a track appear midway."""

_MAX_SAMPLE = np.float32(2**32)
"""A larger sample is no number of any scale that recorders write."""

_FULL_SCALE = np.float32(32767 / 32768)
"""The largest sample of 16 bits."""

_BLOCK_FRAMES = 1 << 16
"""Sound is read and resampled in blocks of this many frames, so that memory does not grow with
length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTrack:
    """What the container says of the first video track.

    `times_s` float64 [N]: presentation times from the container's start, increasing; `pts` int64
    [N]: the same in units of the track's time base; `keyframes` bool [N]. `rotation_deg` is applied
    by :func:`read_frames`.
    """

    codec: str
    width: int
    height: int
    times_s: NDArray[np.float64]
    pts: NDArray[np.int64]
    keyframes: NDArray[np.bool_]
    num_lost: int = 0
    """Frames that the container's index promises and the file, cut off, does not hold."""

    @property
    def stop_s(self) -> float:
        """When the last frame stops being shown: one median frame distance after it began."""
        if len(self.times_s) == 1:
            return float(self.times_s[0]) + 1 / 30
        return float(self.times_s[-1] + np.median(np.diff(self.times_s)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """A decoded sound file: mono float32 [N] at `rate_hz`, full scale 1, with what the file was."""

    waveform: NDArray[np.float32]
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
        return len(self.waveform) / self.rate_hz


def read_video_track(path: Path) -> VideoTrack:
    """Read the frame times of a video without decoding it.

    Raises:
        MediaError: the file doesn't open, or holds no video frame.
    """
    with _open_video(path) as (container, stream):
        origin_s = (container.start_time or 0) / av.time_base
        found: list[tuple[int, bool]] = []
        num_packets = 0
        try:
            # A file that ends early is kept as far as it goes.
            for packet in container.demux(stream):
                num_packets += packet.size > 0
                if packet.pts is not None and not packet.is_discard:
                    found.append((packet.pts, packet.is_keyframe))
        except _DAMAGE as error:
            if not found:
                raise MediaError(f"{path}: can't be read: {_reason(error)}") from error
        if not found:
            raise MediaError(f"{path}: holds no video frame; record or copy it again")
        pts, keyframes = (np.array(column) for column in zip(*sorted(found), strict=True))
        is_first = np.diff(pts, prepend=pts[0] - 1) > 0
        pts, keyframes = pts[is_first], keyframes[is_first]
        return VideoTrack(
            codec=stream.codec_context.name,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            times_s=pts * float(stream.time_base or 0) - origin_s,
            pts=pts,
            keyframes=keyframes.astype(np.bool_),
            num_lost=max(0, stream.frames - num_packets),
        )


def read_frames(
    path: Path, track: VideoTrack, wanted: Sequence[int], *, recipe: VisionRecipe
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode some frames of a video, in order of time, at the recipe's size.

    Decoding starts at the last keyframe before the first wanted frame and runs on to the last one,
    once. Frames that don't decode are left out.

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
    for frame in _decode_from(path, track, wanted[0]):
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
    _require_bytes(path)
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

        def blocks() -> Iterator[NDArray[np.float32]]:
            for frame in _decode(container, stream):
                for plain in resampler.resample(frame):
                    yield plain.to_ndarray().T.astype(np.float32, copy=False)

        return _mono(blocks(), path, source_rate_hz, channels, context.name, rate_hz)


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
    parts: list[NDArray[np.float32]] = []
    peak, num_bad, num_clipped = 0.0, 0, 0
    for block in blocks:
        is_bad = ~(np.abs(block) <= _MAX_SAMPLE)
        if is_bad.any():
            num_bad += int(is_bad.sum())
            block = np.where(is_bad, np.float32(0), block)
        level = np.abs(block)
        peak = max(peak, float(level.max(initial=0.0)))
        num_clipped += int((level >= _FULL_SCALE).sum())
        mono = block.mean(axis=1, dtype=np.float32)
        parts.append(mono if source_rate_hz == rate_hz else resampler.resample_chunk(mono))
    if source_rate_hz != rate_hz:
        parts.append(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    waveform = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    if len(waveform) == 0:
        raise MediaError(f"{path}: holds no sound; record or copy it again")
    return Sound(
        waveform=waveform,
        rate_hz=rate_hz,
        source_rate_hz=source_rate_hz,
        source_channels=channels,
        source_format=source_format,
        num_bad=num_bad,
        peak=peak,
        num_clipped=num_clipped,
    )


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[InputContainer, Any]]:
    """The container and its first video track, after checks that need no decoding."""
    _require_bytes(path)
    try:
        container = av.open(str(path), metadata_errors="ignore", options=_OPEN_OPTIONS)
    except (av.FFmpegError, ValueError) as error:
        hint = _lfs_hint(path)
        what = f"{path}: is no video that can be read: {_reason(error)}{hint}"
        raise MediaError(what) from error
    with container:
        if not container.streams.video:
            raise MediaError(f"{path}: holds no video track")
        stream = container.streams.video[0]
        context: Any = (
            stream.codec_context
        )  # None where no decoder is known, whatever its type says
        if context is None or context.width == 0:
            raise MediaError(f"{path}: its codec is unknown; re-encode it as h264")
        stream.thread_type = "NONE"  # one process per core is faster than threads within one
        if context.width * context.height > MAX_PIXELS:
            size = f"{context.width}x{context.height}"
            raise MediaError(f"{path}: pictures of {size} are too large; re-encode it smaller")
        yield container, stream


def _require_bytes(path: Path) -> None:
    """Refuses what is no file with bytes in it."""
    if not path.exists():
        raise MediaError(f"{path}: no such file")
    if not path.is_file():
        raise MediaError(f"{path}: is no file; put the recording there")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty; record or copy it again")


def _decode_from(path: Path, track: VideoTrack, first: int) -> Iterator[Any]:
    """Decoded frames in order of time, beginning at or before frame `first` of the track.

    Starts at the keyframe before it where the container's index can be trusted, else at the file's
    first frame: after a seek, MPEG streams and AVI lose frames or give them other frames' times.
    """
    before = np.flatnonzero(track.keyframes[: first + 1])
    keyframe = int(before[-1]) if len(before) else 0
    for start in (keyframe, 0):
        with _open_video(path) as (container, stream):
            if start > 0 and not _seek(container, stream, int(track.pts[start])):
                continue
            frames = (f for f in _decode(container, stream) if f.pts is not None)
            head = next(frames, None)
            if head is not None and (start == 0 or head.pts <= track.pts[first]):
                yield head
                yield from frames
                return


def _seek(container: InputContainer, stream: Any, pts: int) -> bool:  # noqa: ANN401
    """Go to a keyframe, if the container can be trusted to."""
    if container.format.name not in _INDEXED_FORMATS:
        return False
    try:
        container.seek(pts, stream=stream)
    except av.FFmpegError:
        return False
    return True


def _decode(container: InputContainer, stream: Any) -> Iterator[Any]:  # noqa: ANN401
    """Frames of a track; packets that don't decode are passed over."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                continue
    except _DAMAGE:
        return


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


def _reason(error: Exception) -> str:
    """The library's reason in one line."""
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def _lfs_hint(path: Path) -> str:
    """Says so when a Git LFS pointer stands where a file should be."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return "; it is a Git LFS pointer, fetch the file by `git lfs pull`" if is_pointer else ""
