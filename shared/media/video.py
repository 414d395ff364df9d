"""Read video files: frame times without decoding, and requested frames with as little as possible.

Frames are found by presentation time. The times come from the container's packets, without
decoding; packets that an edit list hides are left out. Time 0 is the container's own start, as in
players: streams of one file keep their distance, while a file's first timestamp is unrelated to
those of other files (MPEG transport streams begin at 1.4 s, others at whatever the clock said).

Decoding skips what no requested frame needs, without changing a bit of any requested frame:

- packets before the last keyframe before the first requested frame, by a seek;
- packets between a requested frame and the restart before the next one, in the file's order. At a
  restart, an IDR picture of H.264 or HEVC, nothing refers to earlier pictures;
- pictures of H.264 that no other picture refers to (``nal_ref_idc`` 0, most B-frames), unless they
  are requested. HEVC has no such mark: its non-reference pictures may serve a higher sub-layer.

The last two halve the decoding of a usual recording kept at 5 of 30 frames a second. They need a
container whose packets and times can be trusted; other files are decoded completely.
"""

from __future__ import annotations

from array import array
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from shared.errors import MediaError, MissingMediaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from numpy.typing import NDArray

    from shared.streams import VideoDefaults

MAX_PIXELS = 8192 * 8192
"""A larger picture is refused before it is decoded."""

INDEXED_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Containers in which a seek ends at the requested keyframe, and whose clock begins at 0."""

_READ_ERRORS = (av.FFmpegError, IndexError)
"""Errors that PyAV raises while it reads packets; IndexError if damage makes a track appear
midway."""

_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,mpegvideo,h264,hevc,ivf,ogg,flv,mjpeg",
}
"""Refuse playlists that name other files or hosts, and text that ffmpeg would draw as a picture."""

REPLACE_FIX = "fix: replace it, or remove it to do without it"
"""Fix for a file of a session that can't be read."""

_NAL_LENGTH_BYTE = {"h264": 4, "hevc": 21}
"""Byte of avcC and hvcC (ISO/IEC 14496-15) that holds the size of NAL unit lengths."""

_H264_IDR, _H264_LAST_SLICE = 5, 5
_HEVC_IDR, _HEVC_LAST_SLICE = (19, 20), 31


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTrack:
    """Frame times and packet order of the first video track, as its container has them.

    `times_s` float64 [N]: presentation times from the container's start, increasing; `pts` int64
    [N]: the same in units of the track's time base; `keyframes` bool [N]; `positions` int64 [N]:
    index of each frame's packet in the file's order; `restarts` int64 [R]: indices of the packets
    at which a decoder can start without earlier ones, increasing; none where no seek can be
    trusted.
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
    """Frames that the container's index lists but a truncated file does not contain."""
    origin_s: float = 0.0
    """Reading of the container's clock at its start, which counts as 0; 0 where it means nothing
    (MPEG streams)."""

    @property
    def stop_s(self) -> float:
        """End of the last frame: one median frame distance after it began."""
        if len(self.times_s) == 1:
            return float(self.times_s[0]) + 1 / 30
        return float(self.times_s[-1] + np.median(np.diff(self.times_s)))


def read_video_track(path: Path) -> VideoTrack:
    """Read the frame times of a video without decoding it.

    Raises:
        MediaError: the file doesn't open or contains no video frame.
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
            # The packets before damage or a cut are kept.
            for packet in container.demux(stream):
                if packet.is_keyframe and is_restart(packet, context.name, length_bytes):
                    restarts.append(num_packets)
                if packet.pts is not None and not packet.is_discard:
                    pts.append(packet.pts)
                    positions.append(num_packets)
                    is_key.append(packet.is_keyframe)
                num_packets += packet.size > 0
        except _READ_ERRORS as error:
            if not pts:
                raise MediaError(
                    f"{path}: can't be read: {error_reason(error)}; {REPLACE_FIX}"
                ) from error
        if not pts:
            raise MediaError(f"{path}: contains no video frame; fix: record or copy it again")
        order = _increasing_order(np.asarray(pts, dtype=np.int64))
        sorted_pts = np.asarray(pts, dtype=np.int64)[order]
        return VideoTrack(
            codec=context.name,
            width=context.width,
            height=context.height,
            times_s=sorted_pts.astype(np.float64) * float(stream.time_base or 0) - origin_s,
            pts=sorted_pts,
            keyframes=np.asarray(is_key, dtype=np.bool_)[order],
            positions=np.asarray(positions, dtype=np.int64)[order],
            restarts=np.asarray(restarts, dtype=np.int64),
            num_lost=max(0, stream.frames - num_packets),
            origin_s=container_origin_s(container),
        )


def read_frames(
    path: Path, track: VideoTrack, requested: Sequence[int], *, spec: VideoDefaults
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode some frames of a video, in order of time, at the stream's size.

    Packets that no requested frame needs are skipped. Frames that don't decode are left out.
    `requested` are increasing indices into `track.times_s`.

    Yields:
        (index into `track.times_s`, RGB uint8 [height, width, 3]).

    Raises:
        MediaError: the file doesn't open.
    """
    if not len(requested):
        return
    index_of_pts = {int(track.pts[i]): i for i in requested}
    last_pts = int(track.pts[requested[-1]])
    reformatter = VideoReformatter()
    for frame in decode_frames(path, track, requested):
        index = index_of_pts.pop(frame.pts, None)
        if index is not None:
            yield index, _convert_frame(frame, reformatter, spec)
        if not index_of_pts or frame.pts > last_pts:
            return


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, Any]]:
    """Open a container and its first video track, after checks that need no decoding.

    Raises:
        MediaError: the file doesn't open or contains no video that can be decoded.
    """
    require_bytes(path)
    try:
        container = av.open(str(path), metadata_errors="ignore", options=_OPEN_OPTIONS)
    except (av.FFmpegError, ValueError) as error:
        reason = f"{error_reason(error)}; {_open_fix(path)}"
        raise MediaError(f"{path}: not a readable video: {reason}") from error
    with container:
        if not container.streams.video:
            raise MediaError(f"{path}: contains no video track; {REPLACE_FIX}")
        stream = container.streams.video[0]
        context: Any = stream.codec_context  # None if no decoder is known, despite its type
        if context is None or context.width == 0:
            raise MediaError(f"{path}: its codec is unknown; fix: re-encode it as h264")
        stream.thread_type = "NONE"  # one process per core is faster than threads within one
        if context.width * context.height > MAX_PIXELS:
            size = f"{context.width}x{context.height}"
            raise MediaError(f"{path}: pictures of {size} are too large; fix: re-encode it smaller")
        yield container, stream


def decode_frames(path: Path, track: VideoTrack, requested: Sequence[int]) -> Iterator[Any]:
    """Decode frames in order of time: the requested ones that decode, and some others.

    Decoding starts at the keyframe before the first requested frame if the container's index can be
    trusted. Otherwise it starts at the file's first frame: after a seek, MPEG streams and AVI lose
    frames or give them the times of other frames.

    Yields:
        av.VideoFrame with a presentation time.
    """
    first = requested[0]
    keyframes_before = np.flatnonzero(track.keyframes[: first + 1])
    keyframe = int(keyframes_before[-1]) if len(keyframes_before) else 0
    # Try from the keyframe; if the seek went wrong, decode from the beginning.
    for start in (keyframe, 0):
        with open_video(path) as (container, stream):
            is_indexed = container.format.name in INDEXED_FORMATS
            if start > 0 and not (is_indexed and _seek(container, stream, int(track.pts[start]))):
                continue
            source = (
                _decode_needed(container, stream, track, requested, has_sought=start > 0)
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
    """Count the frames between each frame [N] and the restart where :func:`decode_frames` begins.

    The count is infinite where no restart precedes a frame. Decoding may then begin elsewhere and
    give other pictures.
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
    """Decode every frame of a track; packets that don't decode are skipped."""
    try:
        for packet in container.demux(stream):
            yield from _decode_packet(packet)
    except _READ_ERRORS:
        return


def container_origin_s(container: InputContainer) -> float:
    """Return the start of a container whose clock has a meaningful zero, else 0."""
    is_indexed = container.format.name in INDEXED_FORMATS
    return (container.start_time or 0) / av.time_base if is_indexed else 0.0


def nal_length_bytes(codec_context: Any) -> int | None:  # noqa: ANN401
    """Return the size of the length field before each NAL unit; None if the track has none."""
    index = _NAL_LENGTH_BYTE.get(codec_context.name)
    header = codec_context.extradata
    if index is None or header is None or len(header) <= index or header[0] != 1:
        return None
    return int(header[index] & 3) + 1


def is_restart(packet: Any, codec: str, length_bytes: int | None) -> bool:  # noqa: ANN401
    """Check whether a packet is an IDR picture: nothing after it refers to anything before it.

    `length_bytes` is the result of :func:`nal_length_bytes` for its track; None means no restart.
    Source: ITU-T H.264, 7.4.1.2.4, and H.265, 7.4.2.2.
    """
    if length_bytes is None:
        return False
    view = memoryview(packet)
    # The first NAL unit that is a slice decides; parameter sets before it are skipped.
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
    """Check that a path is a regular file that is not empty.

    Raises:
        MissingMediaError: it doesn't exist.
        MediaError: it isn't such a file.
    """
    if not path.exists():
        raise MissingMediaError(f"{path}: no such file")
    if not path.is_file():
        raise MediaError(f"{path}: not a regular file; fix: put the recording there")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty; fix: record or copy it again")


def error_reason(error: Exception) -> str:
    """Return a library's reason in one line."""
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def _decode_needed(
    container: InputContainer, stream: Any, track: VideoTrack, requested: Sequence[int],  # noqa: ANN401
    *, has_sought: bool,
) -> Iterator[Any]:  # fmt: skip
    """Decode the packets that the requested frames need, from the container's current position.

    Yields nothing if the container is at a packet that the track does not have.
    """
    context = stream.codec_context
    wanted_pts = {int(track.pts[i]) for i in requested}
    can_skip = context.name == "h264"
    position = None if has_sought else 0
    needed = _needed_packets(track, requested, 0)
    restarts = set(track.restarts.tolist())
    is_fresh = True
    try:
        for packet in container.demux(stream):
            if packet.size:
                if position is None:
                    # After a seek, the first packet says where the container is.
                    position = _position(track, packet)
                    if position is None:
                        return
                    needed = _needed_packets(track, requested, position)
                if position >= len(needed):
                    yield from _drain_decoder(context)
                    return
                position += 1
                if not needed[position - 1]:
                    continue
                if position - 1 in restarts and not is_fresh:
                    # Damage left in the decoder must not show in pictures that another task, which
                    # begins here, decodes without it.
                    yield from _drain_decoder(context)
                    context.flush_buffers()
                is_fresh = False
            if can_skip:
                is_wanted = packet.pts is None or packet.pts in wanted_pts
                context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            yield from _decode_packet(packet)
    except _READ_ERRORS:
        return


def _position(track: VideoTrack, packet: Any) -> int | None:  # noqa: ANN401
    """Return the index of a packet in the file's order; None if the track does not have it."""
    if packet.pts is None:
        return None
    index = int(np.searchsorted(track.pts, packet.pts))
    is_known = index < len(track.pts) and int(track.pts[index]) == packet.pts
    return int(track.positions[index]) if is_known else None


def _needed_packets(track: VideoTrack, requested: Sequence[int], start: int) -> NDArray[np.bool_]:
    """Mark the packets that requested frames need, in the file's order up to the last needed one.

    A frame needs the packets from the last restart before it to its own, or from `start` if there
    is no restart after `start`.
    """
    stops = track.positions[np.asarray(requested)] + 1
    restarts = np.concatenate([[start], track.restarts[track.restarts > start]])
    begins = restarts[np.searchsorted(restarts, stops - 1, side="right") - 1]
    # Count the frames that need each packet: +1 where a frame's run begins, -1 where it stops.
    steps = np.zeros(int(stops.max()) + 1, dtype=np.int64)
    np.add.at(steps, np.minimum(begins, stops), 1)
    np.add.at(steps, stops, -1)
    return np.asarray(np.cumsum(steps)[:-1] > 0)


def _decode_packet(packet: Any) -> list[Any]:  # noqa: ANN401
    """Return the frames that a packet completes; none if it doesn't decode."""
    try:
        return list(packet.decode())
    except av.FFmpegError:
        return []


def _drain_decoder(context: Any) -> list[Any]:  # noqa: ANN401
    """End the decoder's stream and return the frames that it still holds."""
    try:
        return list(context.decode(None))
    except av.FFmpegError:
        return []


def _seek(container: InputContainer, stream: Any, pts: int) -> bool:  # noqa: ANN401
    """Seek to a keyframe; return whether the container can."""
    try:
        container.seek(pts, stream=stream)
    except av.FFmpegError:
        return False
    return True


def _open_fix(path: Path) -> str:
    """Return the fix for a file that does not open; a Git LFS pointer has one of its own."""
    with suppress(OSError), path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return "it is a Git LFS pointer; fix: fetch the file with `git lfs pull`"
    return REPLACE_FIX


def _increasing_order(pts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort by time and keep the first of equal times; return the indices."""
    order = np.argsort(pts, kind="stable")
    is_first = np.diff(pts[order], prepend=pts[order[0]] - 1) > 0
    return order[is_first]


def _convert_frame(
    frame: VideoFrame, reformatter: VideoReformatter, spec: VideoDefaults
) -> NDArray[np.uint8]:
    """Convert a frame to RGB uint8 [height, width, 3]: scaled by area, upright, fitted."""
    quarter_turns = round(frame.rotation / 90) % 4
    # The size before the frame is turned upright.
    sides = (spec.width, spec.height) if quarter_turns % 2 == 0 else (spec.height, spec.width)
    if spec.fit != "stretch":
        ratios = (sides[0] / frame.width, sides[1] / frame.height)
        scale = max(ratios) if spec.fit == "crop" else min(ratios)
        sides = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    scaled = reformatter.reformat(
        frame, width=sides[0], height=sides[1], format="rgb24", interpolation=Interpolation.AREA
    )
    picture = scaled.to_ndarray().astype(np.uint8, copy=False)
    if quarter_turns:
        picture = np.rot90(picture, k=quarter_turns)
    return np.ascontiguousarray(_fit(picture, spec.height, spec.width))


def _fit(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Crop the middle, or pad with black around the middle, to [height, width, 3]."""
    top, left = (max(0, (a - b) // 2) for a, b in zip(picture.shape, (height, width), strict=False))
    cropped = picture[top : top + height, left : left + width]
    if cropped.shape[:2] == (height, width):
        return cropped
    padded = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = (height - cropped.shape[0]) // 2, (width - cropped.shape[1]) // 2
    padded[top : top + cropped.shape[0], left : left + cropped.shape[1]] = cropped
    return padded
