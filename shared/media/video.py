"""A video file opened, and as few of its packets decoded as the wanted frames need.

Left out, without changing a bit of any wanted frame:

- what lies before the last keyframe before the first wanted frame, by a seek;
- what lies between a wanted frame and the restart before the next one, in the file's order: at a
  restart, an IDR picture of H.264 or HEVC, the decoder begins afresh;
- pictures of H.264 that no other picture refers to (``nal_ref_idc`` 0, most B-frames), unless they
  are wanted. HEVC has no such mark: its non-reference pictures may serve a higher sub-layer.

The last two halve the decoding of a usual recording kept at 5 of 30 frames a second. They need a
container whose packets and times can be trusted; of others all is decoded.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from shared.errors import MediaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from av.container import InputContainer
    from numpy.typing import NDArray

    from shared.media.sound import VideoTrack

MAX_PIXELS = 8192 * 8192
"""A larger picture is refused before it is decoded."""

DAMAGE = (av.FFmpegError, IndexError)
"""What PyAV raises while it reads packets: the second where damage makes a track appear midway."""

_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,mpegvideo,h264,hevc,ivf,ogg,flv,mjpeg",
}
"""No playlists that name other files or hosts, no text that ffmpeg would take for a picture."""

INDEXED_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Containers in which a seek ends at the keyframe asked for, and whose clock begins at 0."""

_NAL_LENGTH_BYTE = {"h264": 4, "hevc": 21}
"""Where avcC and hvcC (ISO/IEC 14496-15) say how long the lengths of NAL units are."""

_H264_IDR, _H264_LAST_SLICE = 5, 5
_HEVC_IDR, _HEVC_LAST_SLICE = (19, 20), 31


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, Any]]:
    """The container and its first video track, after checks that need no decoding.

    Raises:
        MediaError: the file doesn't open, or holds no video that can be decoded.
    """
    require_bytes(path)
    try:
        container = av.open(str(path), metadata_errors="ignore", options=_OPEN_OPTIONS)
    except (av.FFmpegError, ValueError) as error:
        hint = _lfs_hint(path)
        what = f"{path}: is no video that can be read: {error_reason(error)}{hint}"
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


def decode_frames(path: Path, track: VideoTrack, wanted: Sequence[int]) -> Iterator[Any]:
    """Frames of a video in order of time: the wanted ones that decode, and some others.

    Starts at the keyframe before the first wanted frame where the container's index can be trusted,
    else at the file's first frame: after a seek, MPEG streams and AVI lose frames or give them
    other frames' times.

    Args:
        path: the video.
        track: what :func:`shared.media.sound.read_video_track` gave for it.
        wanted: indices into `track.times_s`, increasing, at least one.

    Yields:
        av.VideoFrame with a presentation time.
    """
    first = wanted[0]
    before = np.flatnonzero(track.keyframes[: first + 1])
    keyframe = int(before[-1]) if len(before) else 0
    for start in (keyframe, 0):
        with open_video(path) as (container, stream):
            is_indexed = container.format.name in INDEXED_FORMATS
            if start > 0 and not (is_indexed and _seek(container, stream, int(track.pts[start]))):
                continue
            source = (
                _decode_needed(container, stream, track, wanted, has_sought=start > 0)
                if is_indexed
                else decode_all(container, stream)
            )
            frames = (f for f in source if f.pts is not None)
            head = next(frames, None)
            if head is not None and (start == 0 or head.pts <= track.pts[first]):
                yield head
                yield from frames
                return


def frames_to_restart(track: VideoTrack, frames: NDArray[np.int64]) -> NDArray[np.float64]:
    """How many frames lie between each frame and the restart at which :func:`decode_frames` would
    begin for it; infinite where there is none, so that it may begin elsewhere and decode otherwise.

    Args:
        track: of the video.
        frames: indices into `track.times_s` [N].
    """
    keys = np.flatnonzero(track.keyframes)
    last = np.searchsorted(keys, frames, side="right") - 1
    distance = np.full(len(frames), np.inf)
    has_key = last >= 0
    key = keys[last[has_key]]
    is_clean = np.isin(track.positions[key], track.restarts)
    distance[has_key] = np.where(is_clean, frames[has_key] - key, np.inf)
    return distance


def decode_all(container: InputContainer, stream: Any) -> Iterator[Any]:  # noqa: ANN401
    """Every frame of a track; packets that don't decode are passed over."""
    try:
        for packet in container.demux(stream):
            yield from _decoded(packet)
    except DAMAGE:
        return


def nal_length_bytes(codec_context: Any) -> int | None:  # noqa: ANN401
    """How many bytes say how long a NAL unit is, in packets of this track; None if they have none
    such.
    """
    place = _NAL_LENGTH_BYTE.get(codec_context.name)
    header = codec_context.extradata
    if place is None or header is None or len(header) <= place or header[0] != 1:
        return None
    return int(header[place] & 3) + 1


def is_restart(packet: Any, codec: str, length_bytes: int | None) -> bool:  # noqa: ANN401
    """Whether a packet holds an IDR picture: nothing after it refers to anything before it.

    Args:
        packet: an av.Packet.
        codec: h264 or hevc.
        length_bytes: what :func:`nal_length_bytes` says of its track; None is no restart.

    Source: ITU-T H.264, 7.4.1.2.4, and H.265, 7.4.2.2.
    """
    if length_bytes is None:
        return False
    view = memoryview(packet)
    while len(view) > length_bytes:
        size = int.from_bytes(view[:length_bytes], "big")
        head = view[length_bytes]
        kind = head & 31 if codec == "h264" else head >> 1 & 63
        if codec == "h264" and 0 < kind <= _H264_LAST_SLICE:
            return kind == _H264_IDR
        if codec == "hevc" and kind <= _HEVC_LAST_SLICE:
            return kind in _HEVC_IDR
        view = view[length_bytes + size :]
    return False


def require_bytes(path: Path) -> None:
    """Refuses what is no file with bytes in it.

    Raises:
        MediaError: it isn't.
    """
    if not path.exists():
        raise MediaError(f"{path}: no such file")
    if not path.is_file():
        raise MediaError(f"{path}: is no file; put the recording there")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty; record or copy it again")


def error_reason(error: Exception) -> str:
    """A library's reason in one line."""
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def _decode_needed(
    container: InputContainer,
    stream: Any,  # noqa: ANN401
    track: VideoTrack,
    wanted: Sequence[int],
    *,
    has_sought: bool,
) -> Iterator[Any]:
    """Frames of the packets that the wanted frames need, from where the container stands; none
    where it stands at a packet that the track does not know.
    """
    context = stream.codec_context
    wanted_pts = {int(track.pts[i]) for i in wanted}
    can_skip = context.name == "h264"
    position = None if has_sought else 0
    needed = _needed_packets(track, wanted, 0)
    restarts = set(track.restarts.tolist())
    is_fresh = True
    try:
        for packet in container.demux(stream):
            if packet.size:
                if position is None:
                    position = _position(track, packet)
                    if position is None:
                        return
                    needed = _needed_packets(track, wanted, position)
                if position >= len(needed):
                    yield from _drained(context)
                    return
                position += 1
                if not needed[position - 1]:
                    continue
                if position - 1 in restarts and not is_fresh:
                    # What damage left in the decoder must not show in pictures that another task,
                    # which begins here, has without it.
                    yield from _drained(context)
                    context.flush_buffers()
                is_fresh = False
            if can_skip:
                is_wanted = packet.pts is None or packet.pts in wanted_pts
                context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            yield from _decoded(packet)
    except DAMAGE:
        return


def _position(track: VideoTrack, packet: Any) -> int | None:  # noqa: ANN401
    """Place in the file's order of a packet."""
    if packet.pts is None:
        return None
    index = int(np.searchsorted(track.pts, packet.pts))
    is_found = index < len(track.pts) and int(track.pts[index]) == packet.pts
    return int(track.positions[index]) if is_found else None


def _needed_packets(track: VideoTrack, wanted: Sequence[int], start: int) -> NDArray[np.bool_]:
    """Which packets, in the file's order up to the last needed one, the wanted frames need: from
    the last restart before each, or `start` where there is none, to itself.
    """
    stops = track.positions[np.asarray(wanted)] + 1
    restarts = np.concatenate([[start], track.restarts[track.restarts > start]])
    begins = restarts[np.searchsorted(restarts, stops - 1, side="right") - 1]
    steps = np.zeros(int(stops.max()) + 1, dtype=np.int64)
    np.add.at(steps, np.minimum(begins, stops), 1)
    np.add.at(steps, stops, -1)
    return np.asarray(np.cumsum(steps)[:-1] > 0)


def _decoded(packet: Any) -> list[Any]:  # noqa: ANN401
    """Frames that a packet completes; none where it doesn't decode."""
    try:
        return list(packet.decode())
    except av.FFmpegError:
        return []


def _drained(context: Any) -> list[Any]:  # noqa: ANN401
    """Frames that the decoder holds back, at what is its end."""
    try:
        return list(context.decode(None))
    except av.FFmpegError:
        return []


def _seek(container: InputContainer, stream: Any, pts: int) -> bool:  # noqa: ANN401
    """Go to a keyframe, if the container can."""
    try:
        container.seek(pts, stream=stream)
    except av.FFmpegError:
        return False
    return True


def _lfs_hint(path: Path) -> str:
    """Says so when a Git LFS pointer stands where a file should be."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return "; it is a Git LFS pointer, fetch the file by `git lfs pull`" if is_pointer else ""
