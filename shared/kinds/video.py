"""Videos: place them on the clock, read the frames of segments, encode and decode them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from shared.clock import Interval, MaskedSpan, frame_mask, is_masked, nearest
from shared.kinds.column import MAX_MEMBER_BYTES, Column, stream_settings
from shared.media.video import VideoTrack, frames_to_restart, read_frames, read_video_track
from shared.media.yuv import (
    Chosen,
    decode_h264,
    decode_jpegs,
    decode_npy_planes,
    decode_npy_rgb,
    encode_h264,
    encode_jpegs,
    encode_npy,
    to_yuv420,
)
from shared.streams import Kind, MaskReason, VideoStream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.clock import Segment
    from shared.recipe import Recipe
    from shared.streams import VideoDefaults

_MAX_PIXEL_BYTES = 8
_MAX_PICTURE_HEAD_BYTES = 64 << 10
"""Twice the need of any codec: at 224 pixels, raw takes 3 bytes per pixel; noise at the best
quality takes 2.0 in JPEG and 2.5 in x264."""

_CODEC_KEYS = {"qp": "h264", "quality": "mjpeg"}
"""Settings that have an effect only with this codec."""

_EXTENSIONS = {"h264": "h264", "mjpeg": "mjpeg", "yuv420": "npy", "raw": "npy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """The frames of one segment."""

    pictures: NDArray[np.uint8]
    """RGB [F, H, W, 3]; a masked picture is a copy of the nearest decoded one."""
    error_s: NDArray[np.float32]
    """Presentation time minus grid time [F]; NaN for masked pictures."""
    damaged: NDArray[np.bool_]
    """Pictures [F] that are masked because their frame does not decode, or shows damage."""


def columns(name: str, spec: VideoStream, recipe: Recipe) -> tuple[Column, ...]:
    """Return the column of a video."""
    count = recipe.count(spec.rate_hz)
    shape: tuple[int, ...] = (count, spec.height, spec.width, 3)
    unit = "sRGB 0..255"
    if spec.codec == "yuv420":
        shape, unit = (count, spec.height * 3 // 2, spec.width), "JFIF Y, Cb, Cr 0..255 as I420"
    inactive = tuple(key for key, codec in _CODEC_KEYS.items() if spec.codec != codec)
    picture_bytes = spec.height * spec.width * _MAX_PIXEL_BYTES + _MAX_PICTURE_HEAD_BYTES
    return (
        Column(
            name=name,
            stream=name,
            kind=Kind.VIDEO,
            codec=_EXTENSIONS[spec.codec],
            dtype="uint8",
            shape=shape,
            unit=unit,
            max_bytes=min(MAX_MEMBER_BYTES, count * picture_bytes),
            settings={**stream_settings(spec, without=inactive), "max_error_s": spec.tolerance_s},
            has_time_errors=True,
        ),
    )


def align_track(track: VideoTrack, start_s: float | None, *, stretch: float = 1.0) -> VideoTrack:
    """Shift a video so that its first frame is at `start_s`, and multiply the times since then.

    None, or the track's own start, leaves every time of an unstretched one unchanged to the bit.
    """
    first_s = float(track.times_s[0])
    shift_s = 0.0 if start_s is None else start_s - first_s
    if stretch != 1:
        return replace(track, times_s=(track.times_s - first_s) * stretch + first_s + shift_s)
    return replace(track, times_s=track.times_s + shift_s) if shift_s else track


def interval_of(track: VideoTrack) -> Interval:
    """Return the interval from the first frame to the end of the last."""
    return Interval(float(track.times_s[0]), track.stop_s)


def coverage(
    track: VideoTrack,
    segments: Sequence[Segment],
    spec: VideoStream,
    masked: Sequence[MaskedSpan] = (),
) -> NDArray[np.float64]:
    """Compute the share of each segment's grid times that have a frame near enough."""
    if not segments:
        return np.zeros(0)
    grid_s = np.stack([segment.grid(spec.rate_hz) for segment in segments])
    index, error_s = nearest(track.times_s, grid_s)
    is_near = frame_mask(error_s, tolerance_s=spec.tolerance_s)
    return np.asarray((is_near & ~is_masked(track.times_s, masked)[index]).mean(axis=1))


def damaged_spans(track: VideoTrack) -> list[MaskedSpan]:
    """List the stretches, up to the next keyframe, that damage reaches that needs no decoding."""
    return [
        MaskedSpan(start_s, stop_s, MaskReason.DAMAGED, "the file is damaged")
        for start_s, stop_s, _ in track.runs(np.flatnonzero(track.is_damaged))
    ]


class VideoReader:
    """Reads the frames of a session's segments.

    `start_s` is the start of the first frame on the session clock; None means the container's.
    Times since then are multiplied by `stretch`. Frames in `masked` spans are invalid.
    """

    def __init__(
        self,
        file: Path,
        spec: VideoStream,
        *,
        start_s: float | None,
        stretch: float = 1.0,
        masked: Sequence[MaskedSpan] = (),
    ) -> None:
        self._file, self._spec = file, spec
        self._track = align_track(read_video_track(file), start_s, stretch=stretch)
        self._is_masked = is_masked(self._track.times_s, masked)

    def iter_frames(
        self, segments: Sequence[Segment], *, decode_context: Sequence[Segment] | None = None
    ) -> Iterator[tuple[Segment, Frames]]:
        """Read the frames of segments in order of time, in one pass over the video.

        `decode_context` is a superset of the segments. The pictures then have the bits of a pass
        over all of these, even if the video is damaged, provided that a run of
        :meth:`split_into_runs` can start at the first segment.

        Yields:
            Each segment with its frames; a segment of which no picture decodes is left out.

        Raises:
            MediaError: the video doesn't open.
        """
        track, rate_hz = self._track, self._spec.rate_hz
        chosen = [nearest(track.times_s, segment.grid(rate_hz)) for segment in segments]
        requested = {int(i) for index, _ in chosen for i in index}
        if decode_context is not None and requested:
            # Also decode the frames that a full pass would decode, from the restart on.
            start, stop = min(requested), max(requested)
            lead = frames_to_restart(track, np.array([start]))[0]
            start -= int(lead) if np.isfinite(lead) else 0
            for segment in decode_context:
                index, _ = nearest(track.times_s, segment.grid(rate_hz))
                requested |= {int(i) for i in index if start <= i <= stop}
        source = read_frames(self._file, track, sorted(requested), spec=self._spec)
        decoded: dict[int, NDArray[np.uint8]] = {}
        upcoming = next(source, None)
        for segment, (index, error_s) in zip(segments, chosen, strict=True):
            # Hold exactly the frames from this segment's first to its last.
            while upcoming is not None and upcoming[0] <= index[-1]:
                if upcoming[0] >= index[0]:
                    decoded[upcoming[0]] = upcoming[1]
                upcoming = next(source, None)
            frames = self._assemble(decoded, index, error_s)
            if frames is not None:
                yield segment, frames
            decoded = {i: picture for i, picture in decoded.items() if i >= index[0]}

    def split_into_runs(self, segments: Sequence[Segment], num_runs: int) -> list[int]:
        """Split a pass over segments into runs that can be decoded independently.

        Returns:
            The cuts of :func:`split_evenly`.
        """
        starts_s = np.array([segment.start_s for segment in segments])
        first, _ = nearest(self._track.times_s, starts_s)
        return split_evenly(first, frames_to_restart(self._track, first), num_runs)

    def _assemble(
        self,
        decoded: dict[int, NDArray[np.uint8]],
        index: NDArray[np.int64],
        error_s: NDArray[np.float64],
    ) -> Frames | None:
        """Build the frames of a segment; the nearest picture replaces one that did not decode."""
        usable = np.array(sorted(i for i in decoded if index[0] <= i <= index[-1]))
        if len(usable) == 0:
            return None
        nearest_usable = usable[np.abs(usable[None, :] - index[:, None]).argmin(axis=1)]
        is_near = frame_mask(error_s, tolerance_s=self._spec.tolerance_s)
        is_expected = is_near & ~self._is_masked[index]
        is_decoded = nearest_usable == index
        is_valid = is_expected & is_decoded
        return Frames(
            pictures=np.stack([decoded[int(i)] for i in nearest_usable]),
            error_s=np.where(is_valid, error_s, np.nan).astype(np.float32),
            damaged=is_expected & ~is_decoded,
        )


def split_evenly(first: NDArray[np.int64], lead: NDArray[np.float64], num_runs: int) -> list[int]:
    """Split segments into runs of about equal length, where little must be decoded twice.

    Each run starts at the cheapest segment of its first quarter. A run is left out if decoding the
    frames before it would cost as much as the run itself.

    Args:
        first: first frame of each segment [N], at least one segment.
        lead: frames that must be decoded before each segment if a run starts there [N].
        num_runs: number of runs, at least 1.

    Returns:
        num_runs + 1 increasing numbers from 0 to N; run k is segments [cuts[k], cuts[k + 1]). Runs
        that are left out are empty.
    """
    count = len(first)
    run_length = (first[-1] - first[0] + 1) / num_runs
    even = [k * count // num_runs for k in range(num_runs + 1)]
    cuts = [count]
    for start, stop in reversed(list(pairwise(even[1:]))):
        quarter = lead[start : start + max(1, (stop - start) // 4)]
        best = int(quarter.argmin())
        cuts.append(start + best if quarter[best] < run_length else cuts[-1])
    return [0, *reversed(cuts)]


def encode_pictures(pictures: NDArray[np.uint8], *, spec: VideoDefaults) -> bytes:
    """Encode RGB pictures uint8 [F, H, W, 3] with the stream's codec."""
    if spec.codec == "raw":
        return encode_npy(pictures)
    if spec.codec == "mjpeg":
        return encode_jpegs(pictures, quality=spec.quality)
    count, height, width, _ = pictures.shape
    planes = to_yuv420(pictures, out=np.empty((count, height * 3 // 2, width), np.uint8))
    if spec.codec == "h264":
        return encode_h264(planes, qp=spec.qp, rate_hz=spec.rate_hz)
    return encode_npy(planes)


def decode_pictures(
    member: bytes | memoryview,
    *,
    spec: VideoDefaults,
    out: NDArray[np.uint8],
    chosen: Chosen | None = None,
) -> NDArray[np.uint8]:
    """Decode pictures of a member of a video column into `out` and return it.

    `out` is contiguous uint8 [F, 3H/2, W] for planes or [F, H, W, 3] for RGB; see
    :mod:`shared.media.yuv`. If the codec stores the other layout, it is converted. `chosen` are the
    pictures of the member; None means all, as many as `out` has.

    Raises:
        CorruptError: the bytes are not as many pictures of `out`'s size.
    """
    decode = {
        "h264": decode_h264,
        "mjpeg": decode_jpegs,
        "yuv420": decode_npy_planes,
        "raw": decode_npy_rgb,
    }[spec.codec]
    decode(member, out, chosen=chosen or Chosen(range(len(out)), len(out)))
    return out
