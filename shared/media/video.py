"""Read video files: frame times without decoding, and requested frames with as little as possible.

Frames are found by presentation time. The times come from the container's packets, without
decoding; packets that an edit list hides are left out. Time 0 is the container's own start, as in
players: streams of one file keep their distance, while a file's first timestamp is unrelated to
those of other files (MPEG transport streams begin at 1.4 s, others at whatever the clock said).

Decoding skips what no requested frame needs, without changing a bit of any requested frame:

- packets before the last keyframe before the first requested frame, by a seek;
- packets between a requested frame and the restart before the next one, in the file's order. At a
  restart, an IDR picture of H.264 or HEVC or a keyframe of VP8, VP9 or AV1, nothing refers to
  earlier pictures;
- pictures of H.264 that no other picture refers to (``nal_ref_idc`` 0, most B-frames), unless they
  are requested. HEVC has no such mark: its non-reference pictures may serve a higher sub-layer.

The last two halve the decoding of a usual recording kept at 5 of 30 frames a second. They need a
container whose packets and times can be trusted; other files are decoded completely.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from shared.clock import marked_runs
from shared.errors import MediaError
from shared.media.container import (
    INDEXED_FORMATS,
    RAW_FORMATS,
    READ_ERRORS,
    REPAIR_FIX,
    REPLACE_FIX,
    codec_name,
    container_origin_s,
    describe_cut,
    error_reason,
    explain_failure,
    is_picture,
    open_video,
    pixel_aspect,
)
from shared.media.nal import NalReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from numpy.typing import NDArray

    from shared.streams import VideoDefaults

_LUMA_FIRST = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray"}
"""Pixel formats whose first plane is luma of 8 bits."""

_CLOSED = {"vp8", "vp9", "av1"}
"""Codecs whose keyframes, as containers mark them, replace every reference."""

_MAX_RATE_HZ = 1_000
"""A larger frame rate is the unit of an encoder's clock."""

_ZEROS = bytes(32)
_CODECS_WITHOUT_ZEROS = {"h264", "hevc", "vp8", "vp9", "av1"}
_CODECS_WITH_STUFFING = {"mpeg1video", "mpeg2video", "mpeg4"}
"""A packet of these codecs with this many zeros in a row, or with nothing else, lost a block of the
disk. H.264 and HEVC allow no three in a row; the others are packed too densely. MPEG pictures may
end in zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTrack:
    """Frame times and packet order of the main video track, as its container has them.

    `times_s` float64 [N]: presentation times from the container's start, increasing; `pts` int64
    [N]: the same in units of the track's time base; `keyframes` bool [N]; `positions` int64 [N]:
    index of each frame's packet in the file's order; `restarts` int64 [R]: indices of the packets
    at which a decoder can start without earlier ones, increasing; none where no seek can be
    trusted; `damaged` int64 [D]: indices of the packets that are damaged without any doubt;
    `sizes` int64 [N]: bytes of each frame's packet.

    Keyframes at which H.264 begins to refresh the picture over several frames are not marked: what
    follows them depends on what was decoded before.
    """

    codec: str
    width: int
    height: int
    times_s: NDArray[np.float64]
    pts: NDArray[np.int64]
    keyframes: NDArray[np.bool_]
    positions: NDArray[np.int64]
    restarts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    damaged: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    num_tracks: int = 1
    """Video tracks of the file, without cover pictures."""
    pixel_aspect: float = 1.0
    """Width of a pixel by its height."""
    assumed_rate_hz: float | None = None
    """Frame rate that gives the times of an elementary stream, which has no others."""
    is_indexed: bool = False
    """Whether a seek ends at the requested keyframe."""
    num_lost: int = 0
    """Frames that the container's index lists but a truncated file does not contain."""
    cut: str | None = None
    """Which part of the container ends beyond the end of the file, and the fix."""
    origin_s: float = 0.0
    """Reading of the container's clock at its start, which counts as 0; 0 where it means nothing
    (MPEG streams)."""

    @property
    def stop_s(self) -> float:
        """End of the last frame: one median frame distance after it began."""
        if len(self.times_s) == 1:
            return float(self.times_s[0]) + 1 / 30
        return float(self.times_s[-1] + np.median(np.diff(self.times_s)))

    def runs(self, frames: NDArray[np.int64]) -> list[tuple[float, float, int]]:
        """Return start, stop (seconds) and frame count of each run of consecutive frames."""
        ends_s = np.append(self.times_s, self.stop_s)
        is_in = np.isin(np.arange(len(self.times_s)), frames)
        return [(float(ends_s[a]), float(ends_s[b]), b - a) for a, b in marked_runs(is_in)]

    @property
    def group_starts(self) -> NDArray[np.int64]:
        """Index of the packet of the last keyframe at or before each frame [N]; 0 if none is."""
        keys = np.flatnonzero(self.keyframes)
        number = np.searchsorted(keys, np.arange(len(self.pts)), side="right")
        return np.concatenate([[0], self.positions[keys]])[number]

    @property
    def is_damaged(self) -> NDArray[np.bool_]:
        """Mark the frames [N] that known damage reaches; decoding may find more."""
        before = np.searchsorted(self.damaged, self.group_starts, side="left")
        return np.asarray(before < np.searchsorted(self.damaged, self.positions, side="right"))


def read_video_track(path: Path, *, decode: bool = True) -> VideoTrack:
    """Read the frame times of a video without decoding it, except for an elementary stream.

    Unless asked to decode, the times of such a stream are right, but not which packet has which.

    Raises:
        MediaError: the file doesn't open or contains no video frame.
    """
    with open_video(path) as (container, stream):
        context = stream.codec_context
        rate_hz = _declared_rate(path, container, context)
        ranks: Sequence[int] | None = range(sys.maxsize) if rate_hz else None
        if ranks and decode:
            state = path.stat()
            ranks = _presentation_order(path, state.st_size, state.st_mtime_ns)
        packets = _read_packets(path, container, stream, ranks)
        _require_frames(path, packets, stream)
        pts = np.asarray(packets.pts, dtype=np.int64)
        order = _increasing_order(pts)
        pts = pts[order]
        if rate_hz:
            times_s = pts / rate_hz
        else:
            times_s = pts.astype(np.float64) * float(stream.time_base or 0)
            times_s -= (container.start_time or 0) / av.time_base
            if 0 < abs(times_s[0]) < 1 / av.time_base:  # the container's start is rounded
                times_s -= times_s[0]
        num_lost = max(0, stream.frames - packets.count)
        return VideoTrack(
            codec=codec_name(context),
            width=context.width,
            height=context.height,
            times_s=times_s,
            pts=pts,
            keyframes=np.asarray(packets.is_key, dtype=np.bool_)[order],
            positions=np.asarray(packets.positions, dtype=np.int64)[order],
            restarts=np.asarray(packets.restarts, dtype=np.int64),
            sizes=np.asarray(packets.sizes, dtype=np.int64)[order],
            damaged=np.unique(np.asarray(packets.damaged, dtype=np.int64)),
            num_tracks=len([s for s in container.streams.video if not is_picture(s)]),
            pixel_aspect=pixel_aspect(stream),
            assumed_rate_hz=rate_hz,
            is_indexed=container.format.name in INDEXED_FORMATS,
            num_lost=num_lost,
            cut=None if num_lost else describe_cut(path),
            origin_s=container_origin_s(container),
        )


def _declared_rate(path: Path, container: InputContainer, context: Any) -> float | None:  # noqa: ANN401
    """Return the frame rate that an elementary stream declares; None if packets have times."""
    if container.format.name not in RAW_FORMATS:
        return None
    if not context.framerate or context.framerate > _MAX_RATE_HZ:
        raise MediaError(
            f"{path}: is a bare {codec_name(context)} stream without times, and declares no frame "
            "rate; fix: re-encode it with its rate (`ffmpeg -r RATE -i FILE NEW.mp4`)"
        )
    return float(context.framerate)


def _require_frames(path: Path, packets: _Packets, stream: Any) -> None:  # noqa: ANN401
    """Check that a track has frames, and that not all of them are encrypted."""
    if not packets.pts:
        reason = "contains no video frame; fix: record or copy it again"
        if stream.frames:
            reason = (
                f"its index is wrong: none of its {stream.frames} frames is found; {REPAIR_FIX}"
            )
        raise MediaError(f"{path}: {explain_failure(path) or reason}")
    if packets.num_encrypted == packets.count:
        fix = "fix: decrypt it (`ffmpeg -decryption_key KEY -i FILE -c copy NEW.mp4`)"
        raise MediaError(f"{path}: is encrypted; {fix}")


@dataclass(slots=True)
class _Packets:
    """What the packets of a track say: of each frame, and indices of packets."""

    pts: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    is_key: list[bool] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    count: int = 0
    num_encrypted: int = 0


def _read_packets(
    path: Path,
    container: InputContainer,
    stream: Any,  # noqa: ANN401
    ranks: Sequence[int] | None,
) -> _Packets:
    """Read all packets of a track; those before damage or a cut are kept."""
    packets, name = _Packets(), codec_name(stream.codec_context)
    nal, is_indexed = NalReader(stream.codec_context), container.format.name in INDEXED_FORMATS
    ends_in_zero = False
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            number = packets.count
            is_key = packet.is_keyframe and nal.is_intra(packet)
            if packet.is_keyframe and is_indexed and (name in _CLOSED or nal.is_restart(packet)):
                packets.restarts.append(number)
            pts = packet.pts if ranks is None else ranks[number]
            if pts is not None and not packet.is_discard:
                packets.pts.append(pts)
                packets.positions.append(number)
                packets.sizes.append(packet.size)
                packets.is_key.append(is_key)
            is_encrypted = packet.has_sidedata("encryption_info")
            packets.num_encrypted += is_encrypted
            damaged = _zeroed_packets(number, packet, name, follows_zero=ends_in_zero)
            if packet.is_corrupt:  # of a transport stream, the next one may be meant
                damaged += [number, number + 1]
            if is_encrypted or nal.follows_lost_frame(packet, is_keyframe=is_key):
                damaged.append(number)
            packets.damaged += damaged
            ends_in_zero = memoryview(packet)[-1] == 0
            packets.count += 1
    except READ_ERRORS as error:
        if not packets.pts:
            reason = f"can't be read: {error_reason(error)}; {REPLACE_FIX}"
            raise MediaError(f"{path}: {reason}") from error
    return packets


def _zeroed_packets(number: int, packet: Any, codec: str, *, follows_zero: bool) -> list[int]:  # noqa: ANN401
    """List which of a packet and the one before it, if that ends in a zero, lost a disk block."""
    content = bytes(packet)
    if codec in _CODECS_WITH_STUFFING:
        content = content.rstrip(b"\0") or content
    elif codec not in _CODECS_WITHOUT_ZEROS:
        return []
    if content.startswith(_ZEROS[:8]):
        return [number - 1, number] if follows_zero else [number]
    return [number] if _ZEROS[: packet.size] in content else []


@lru_cache(maxsize=8)
def _presentation_order(path: Path, _size: int, _mtime_ns: int) -> list[int]:
    """Decode an elementary stream and return the place of each packet in order of presentation.

    A packet that gives no frame has a place too, at the latest after all packets before it.
    """
    displayed: list[int] = []
    count = 0
    with open_video(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size:
                packet.pts, packet.dts = count, None
                count += 1
            frames = _decode(stream.codec_context, packet) or []
            displayed += [frame.pts for frame in frames if frame.pts is not None]
    missing = deque(sorted(set(range(count)) - set(displayed)))
    order: list[int] = []
    for position in (*displayed, count):
        while missing and missing[0] < position:
            order.append(missing.popleft())
        order.append(position)
    ranks = [0] * (count + 1)
    for rank, position in enumerate(order):
        ranks[position] = rank
    return ranks


class _Damage:
    """Damage of a track, and which frames it reaches.

    A picture is clean if all packets from the last keyframe up to its own are. Pictures of H.264
    that no other refers to pass their damage on to none: whether they are decoded depends on what
    is requested.
    """

    def __init__(self, track: VideoTrack) -> None:
        self._track, self._starts = track, track.group_starts
        self._positions: list[int] = track.damaged.tolist()
        self._own: set[int] = set()
        self.disposable: set[int] = set()
        """Packets that no other refers to."""

    def mark(self, position: int) -> None:
        """Note that a packet is damaged."""
        if position in self.disposable:
            self._own.add(position)
        elif not self.is_between(position, position + 1):
            insort(self._positions, position)

    def inspect(self, frame: VideoFrame) -> None:
        """Note the damage of a frame that the decoder had to guess parts of."""
        if frame.is_corrupt and frame.pts is not None:
            index = int(np.searchsorted(self._track.pts, frame.pts))
            if index < len(self._track.pts):
                self.mark(int(self._track.positions[index]))

    def is_between(self, start: int, stop: int) -> bool:
        """Return whether one of the packets [start, stop) is damaged."""
        at = bisect_left(self._positions, start)
        return at < len(self._positions) and self._positions[at] < stop

    def reaches(self, index: int) -> bool:
        """Return whether a frame shows damage."""
        position = int(self._track.positions[index])
        return position in self._own or self.is_between(int(self._starts[index]), position + 1)


def read_frames(
    path: Path, track: VideoTrack, requested: Sequence[int], *, spec: VideoDefaults
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode some frames of a video, in order of time, at the stream's size.

    Packets that no requested frame needs are skipped. Frames that don't decode are left out, and so
    are those that the decoder marks as damaged, with all that follow up to the next keyframe.
    `requested` are increasing indices into `track.times_s`.

    Yields:
        (index into `track.times_s`, RGB uint8 [height, width, 3]).

    Raises:
        MediaError: the file doesn't open.
    """
    if not len(requested):
        return
    index_of_pts = {int(track.pts[i]): i for i in requested}
    # A picture is clean only if those before it in the file's order are, which may be shown later.
    in_file = np.argsort(track.positions, kind="stable")
    judged_pts = np.empty_like(track.pts)
    judged_pts[in_file] = np.maximum.accumulate(track.pts[in_file])
    damage, reformatter = _Damage(track), VideoReformatter()
    held: deque[tuple[int, NDArray[np.uint8]]] = deque()
    for frame in decode_frames(path, track, requested, damage=damage):
        index = index_of_pts.pop(frame.pts, None)
        if index is not None and not damage.reaches(index):
            held.append((index, _convert_frame(frame, reformatter, spec, track.pixel_aspect)))
        while held and judged_pts[held[0][0]] <= frame.pts:
            index, picture = held.popleft()
            if not damage.reaches(index):
                yield index, picture
        if not held and not index_of_pts:
            return
    yield from ((index, picture) for index, picture in held if not damage.reaches(index))


def decode_frames(
    path: Path, track: VideoTrack, requested: Sequence[int], *, damage: _Damage | None = None
) -> Iterator[Any]:
    """Decode frames in order of time: the requested ones that decode, and some others.

    Decoding starts at the keyframe before the first requested frame if the container's index can be
    trusted. Otherwise it starts at the file's first frame: after a seek, MPEG streams and AVI lose
    frames or give them the times of other frames. What does not decode is noted in `damage`.

    Yields:
        av.VideoFrame with a presentation time.
    """
    damage = _Damage(track) if damage is None else damage
    first = requested[0]
    keyframes_before = np.flatnonzero(track.keyframes[: first + 1])
    keyframe = int(keyframes_before[-1]) if len(keyframes_before) else 0
    # Try from the keyframe; if the seek went wrong, decode from the beginning.
    for start in (keyframe, 0) if track.is_indexed else (0,):
        with open_video(path) as (container, stream):
            if start > 0:
                try:
                    container.seek(int(track.pts[start]), stream=stream)
                except av.FFmpegError:
                    continue
            source = _decode_needed(
                container, stream, track, requested if track.is_indexed else None, damage=damage,
                has_sought=start > 0,
            )  # fmt: skip
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


def _decode_needed(
    container: InputContainer, stream: Any, track: VideoTrack,  # noqa: ANN401
    requested: Sequence[int] | None, *, has_sought: bool, damage: _Damage,
) -> Iterator[Any]:  # fmt: skip
    """Decode the packets that the requested frames need, from the container's current position.

    None means all packets. Yields nothing if the container is at a packet that the track does not
    have.
    """
    context = stream.codec_context
    source = _iter_needed(container.demux(stream), track, requested, has_sought=has_sought)
    prepare = _PacketPreparation(track, requested, context, damage)
    restarts, key = set(track.restarts.tolist()), -1
    keyframes = restarts | set(track.positions[track.keyframes].tolist())
    for packet, position in source:
        must_restart = position in restarts or damage.is_between(key, position)
        if position in keyframes and must_restart and key >= 0:
            # Damage left in the decoder must not show in pictures that another task, which begins
            # here, decodes without it.
            yield from _drain(context, damage)
        is_first = key < 0
        key = position if is_first or position in keyframes else key
        prepare(packet, position)
        frames = _decode(context, packet, damage)
        if frames is None and position in keyframes and not is_first:
            # Decoders may report the damage of a packet when they get the next one.
            yield from _drain(context, damage)
            frames = _decode(context, packet, damage)
            damage.mark(position if frames is None else position - 1)
        elif frames is None:
            damage.mark(position)
        yield from frames or ()
    yield from _drain(context, damage)


def _iter_needed(
    packets: Iterator[Any], track: VideoTrack, requested: Sequence[int] | None, *, has_sought: bool
) -> Iterator[tuple[Any, int]]:
    """Yield the packets that the requested frames need, with their indices in the file's order."""
    position = None if has_sought else -1
    needed = None if requested is None else _needed_packets(track, requested, 0)
    try:
        for packet in packets:
            if not packet.size:
                continue
            if position is None:
                # After a seek, the first packet says where the container is.
                position = _position(track, packet)
                if position is None:
                    return
                needed = _needed_packets(track, requested or (), position)
            else:
                position += 1
            if needed is not None and position >= len(needed):
                return
            if needed is None or needed[position]:
                yield packet, position
    except READ_ERRORS:
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


class _PacketPreparation:
    """Prepares packets for the decoder: it skips what no requested frame needs."""

    def __init__(
        self, track: VideoTrack, requested: Sequence[int] | None, context: Any, damage: _Damage  # noqa: ANN401
    ) -> None:  # fmt: skip
        self._context, self._damage = context, damage
        self._can_skip = context.name == "h264" and requested is not None
        self._wanted_pts = {int(track.pts[i]) for i in requested or ()}
        self._nal = NalReader(context)
        self._pts: dict[int, int] | None = None
        if track.assumed_rate_hz is not None:
            pairs = zip(track.positions.tolist(), track.pts.tolist(), strict=True)
            self._pts = dict(pairs)

    def __call__(self, packet: Any, position: int) -> None:  # noqa: ANN401
        """Give a packet its time, and tell the decoder whether its picture can be skipped."""
        if self._pts is not None:
            packet.pts, packet.dts = self._pts.get(position), None
        if not self._can_skip:
            return
        is_disposable = self._nal.is_disposable(packet)
        if is_disposable:
            self._damage.disposable.add(position)
        is_wanted = packet.pts is None or packet.pts in self._wanted_pts
        # A packet without a slice is decoded, so that its damage is noticed.
        can_skip = not is_wanted and (is_disposable or not self._nal.knows_slices)
        self._context.skip_frame = "NONREF" if can_skip else "DEFAULT"


def _decode(context: Any, packet: Any, damage: _Damage | None = None) -> list[Any] | None:  # noqa: ANN401
    """Return the frames that a packet completes, or None the stream; None if it doesn't decode."""
    try:
        frames = list(context.decode(packet))
    except av.FFmpegError:
        return None
    for frame in frames:
        if damage is not None:
            damage.inspect(frame)
    return frames


def _drain(context: Any, damage: _Damage) -> list[Any]:  # noqa: ANN401
    """Return the frames that the decoder still holds, and let it forget everything."""
    frames = _decode(context, None, damage) or []
    context.flush_buffers()
    return frames


def _increasing_order(pts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort by time and keep the first of equal times; return the indices."""
    order = np.argsort(pts, kind="stable")
    is_first = np.diff(pts[order], prepend=pts[order[0]] - 1) > 0
    return order[is_first]


def _convert_frame(
    frame: VideoFrame, reformatter: VideoReformatter, spec: VideoDefaults, pixel_aspect: float
) -> NDArray[np.uint8]:
    """Convert a frame to RGB uint8 [height, width, 3]: scaled by area, upright, fitted."""
    is_transposed, flips = _orientation(frame)
    # The size before the frame is turned upright.
    sides = (spec.height, spec.width) if is_transposed else (spec.width, spec.height)
    if spec.fit != "stretch":
        width = frame.width * pixel_aspect
        ratios = (sides[0] / width, sides[1] / frame.height)
        scale = max(ratios) if spec.fit == "crop" else min(ratios)
        sides = (max(1, round(width * scale)), max(1, round(frame.height * scale)))
    scaled = reformatter.reformat(
        frame, width=sides[0], height=sides[1], format="rgb24", interpolation=Interpolation.AREA
    )
    picture = scaled.to_ndarray().astype(np.uint8, copy=False)
    if is_transposed:
        picture = picture.swapaxes(0, 1)
    picture = picture[:: flips[0], :: flips[1]]
    return np.ascontiguousarray(_fit(picture, spec.height, spec.width))


def _orientation(frame: VideoFrame) -> tuple[bool, tuple[int, int]]:
    """Return whether rows and columns change places, and the steps (1 or -1) of the new ones.

    Rotations between quarter turns are rounded. Source: ISO/IEC 14496-12, 6.2.2.
    """
    matrices: Any = frame.side_data  # PyAV's stub yields names
    for data in matrices:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), dtype="<i4")[:5].tolist()
            if abs(b) + abs(c) > abs(a) + abs(d):
                return True, (-1 if b < 0 else 1, -1 if c < 0 else 1)
            return False, (-1 if d < 0 else 1, -1 if a < 0 else 1)
    return False, (1, 1)


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


def read_luma(
    path: Path, track: VideoTrack, requested: Sequence[int], *, max_pixels: int
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode some frames; yield each one's index and a grid of about `max_pixels` of its luma.

    Pixels are picked, not averaged, so that noise remains. See :func:`read_frames`.
    """
    index_of_pts = {int(track.pts[i]): i for i in requested}
    for frame in decode_frames(path, track, requested):
        index = index_of_pts.pop(frame.pts, None)
        if index is not None:
            is_plain = frame.format.name in _LUMA_FIRST
            plane = (frame if is_plain else frame.reformat(format="gray")).planes[0]
            step = max(1, math.ceil(math.sqrt(frame.width * frame.height / max_pixels)))
            rows = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
            yield index, rows[: frame.height : step, : frame.width : step].copy()
        if not index_of_pts or frame.pts > int(track.pts[requested[-1]]):
            return
