"""Find stretches of a video in which one picture repeats, with little decoding.

A repeated picture costs almost nothing to encode. The sizes of packets therefore say where to look,
and only there frames are decoded and compared, pixel by pixel: noise shows that a camera was on. A
repeated picture is not always the same to the bit: encoders refine it for some frames, and encode
it again at keyframes. What counts as the same picture is thus measured against the changes around
the stretch. Pictures of one color are found by the small packets of their keyframes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from shared.clock import marked_runs
from shared.media.video import read_luma

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.video import VideoTrack

MIN_RUN_SHARE = 4
"""Runs of repeats from 1 / MIN_RUN_SHARE of the limit on are found."""

_DENSE = 0.75
"""Share of the frames of a window that repeat the frame before them, in a stretch of repeats."""

_MAX_PIXELS = 32_768
_CONTEXT_FRAMES = 8
"""Frames before and after a stretch that say how much pictures change otherwise."""

_TINY_BYTES, _TINY_BITS_PER_PIXEL = 64, 0.01
"""A packet that repeats the picture before it has at most this size: a skipped macroblock takes
0.004 bits per pixel in MPEG-4, less in later codecs."""

_EQUAL_BYTES = 4
"""Packets of repeated intra frames differ by at most this much, in the picture's number."""

_FLAT_BYTES, _FLAT_BITS_PER_PIXEL = 1_000, 0.15
"""A keyframe of one color is no larger: the bits that a JPEG picture takes for empty blocks."""

_QUIET_SHARE = 0.25
"""Noise of a covered lens takes at most this share of the bytes of large pictures."""

_FLAT_RANGE = 10
"""Range of 98 % of the luma of a picture of one color: noise of the codec or of a covered lens."""

_SAME_MEAN, _SAME_PEAK = 0.05, 4.0
"""A repeat changes luma by at most this much, in the mean and in 99.9 % of the pixels ..."""

_SAME_MEAN_SHARE, _SAME_PEAK_SHARE = 0.05, 0.2
"""... or by this share of what is usual around the stretch."""

_NEW_MEAN, _NEW_MEAN_SHARE, _NEW_DETAIL_SHARE = 4.0, 0.5, 0.4
"""A larger mean change is a new picture; a smaller one may be the same picture, encoded again.
The shares are of what is usual, and of the difference between neighbors in a picture."""

_NEW_TOP, _TOP_PIXELS = 100, 4
"""It is a new picture too if _TOP_PIXELS pixels change by more: a letter was typed."""

_KEY_SIZES, _KEY_MEAN = 0.015, 0.3
"""Keyframes of one picture differ in size by at most this share, then in luma by at most this.
Encoders skip the noise of a camera that sees nothing move, except in keyframes."""

_COMPARED_FRAMES = 5
_MIN_DETAIL = 1.0
_MAX_NOISE = 1.2
"""Copies that were encoded again differ by at most this share of the difference to the next pixel
..."""

_MAX_SHIFT, _BLOCKS = 0.15, 4
"""... and by at most this shift in pixels, in 90 % of _BLOCKS x _BLOCKS blocks; two cameras
are farther apart."""


@dataclass(frozen=True, slots=True)
class Run:
    """Frames `first` to `last` show one picture."""

    first: int
    last: int
    color: str | None = None
    """black, white or gray if the picture is of one color, in luma."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameChanges:
    """How N frames of a stretch, the first at index `first`, differ; NaN where one doesn't decode.

    All arrays float64 [N], in levels of luma, from the frame before: mean, and 99.9th percentile.
    """

    first: int
    mean: NDArray[np.float64]
    peak: NDArray[np.float64]
    top: NDArray[np.float64]
    """Change of the pixel that changes fourth most."""
    drift: NDArray[np.float64]
    """Mean change from the frame `lag` frames before; NaN for the first ones."""
    lag: int
    of_keys: NDArray[np.float64]
    """Mean change of a keyframe from the one before, of nearly its size; NaN for other frames."""
    level: NDArray[np.float64]
    """Median luma of a picture of one color; NaN for others."""
    detail: float
    """Mean difference between neighbors in the first picture."""


def find_repeats(path: Path, track: VideoTrack, *, limit_s: float) -> list[Run]:
    """Find the runs of frames that show one picture for at least a part of `limit_s`.

    Runs shorter than `limit_s` are only searched if there is a longer one.
    """
    times_s = track.times_s
    if len(times_s) < 3:
        return []
    step_s = max(float(np.median(np.diff(times_s))), 1e-6)
    window = max(2, round(limit_s / MIN_RUN_SHARE / step_s))
    likely = dense_runs(is_small(track), window)
    long = [(a, b) for a, b in likely if times_s[b] - times_s[a - 1] + step_s >= 0.9 * limit_s]
    flat = _flat_stretches(path, track, window=window)
    runs = _confirm(path, track, [*long, *flat], likely=likely, window=window)
    if any(times_s[run.last] - times_s[run.first] + step_s >= limit_s for run in runs):
        short = [run for run in likely if run not in long]
        runs += _confirm(path, track, short, likely=likely, window=window)
    return _merge(runs)


def _merge(runs: Sequence[Run]) -> list[Run]:
    """Return runs in order; those of one color, or of none, that overlap become one."""
    merged: list[Run] = []
    for run in sorted(runs, key=lambda run: run.first):
        if merged and run.first <= merged[-1].last and run.color == merged[-1].color:
            merged[-1] = replace(merged[-1], last=max(run.last, merged[-1].last))
        else:
            merged.append(run)
    return merged


def is_small(track: VideoTrack) -> NDArray[np.bool_]:
    """Mark the frames whose packets are small enough to repeat the frame before."""
    sizes, pixels = track.sizes, track.width * track.height
    limit = _TINY_BYTES + pixels * _TINY_BITS_PER_PIXEL / 8
    is_equal = np.abs(np.diff(sizes, prepend=-np.inf)) <= _EQUAL_BYTES
    small = (sizes <= limit) | is_equal
    # A keyframe encodes its picture again. It counts like its surroundings, if of usual size.
    keys = np.flatnonzero(track.keyframes)
    if len(keys) < len(sizes):
        small[keys] |= small[np.minimum(keys + 1, len(sizes) - 1)] & _is_like_last(sizes, keys)
    small[0] = False
    return small


def _is_like_last(sizes: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark keyframes that are rare, or about as large as the one before."""
    is_rare = np.diff(keys, prepend=-100) > 2 * MIN_RUN_SHARE
    change = np.abs(np.diff(sizes[keys], prepend=-np.inf))
    return is_rare | (change <= _EQUAL_BYTES + sizes[keys] // 1000)


def dense_runs(is_repeat: NDArray[np.bool_], window: int) -> list[tuple[int, int]]:
    """Return the first and last of each run of elements, of which most are marked.

    Each element is in a window, of `window` elements, of which a share of _DENSE is marked. Both
    ends are marked.
    """
    if len(is_repeat) < window:
        return []
    sums = np.concatenate([[0], np.cumsum(is_repeat)])
    is_dense = sums[window:] - sums[:-window] >= _DENSE * window
    steps = np.zeros(len(is_repeat) + 1, dtype=np.int64)
    steps[:-window] += is_dense
    steps[window:] -= is_dense
    runs = []
    for start, stop in marked_runs(np.cumsum(steps)[:-1] > 0):
        marked = np.flatnonzero(is_repeat[start:stop])
        runs.append((start + int(marked[0]), start + int(marked[-1])))
    return runs


def _flat_stretches(path: Path, track: VideoTrack, *, window: int) -> list[tuple[int, int]]:
    """Return stretches that have pictures of one color, to the keyframes before and after.

    Keyframes with small packets are probed, and the middles of stretches that are small for the
    video.
    """
    sizes, keys, pixels = track.sizes, np.flatnonzero(track.keyframes), track.width * track.height
    limit = _FLAT_BYTES + pixels * _FLAT_BITS_PER_PIXEL / 8
    between = sizes[~track.keyframes]
    is_quiet = sizes <= min(
        limit, _QUIET_SHARE * (np.percentile(between, 90) if len(between) else 0)
    )
    quiet = [(a + b) // 2 for a, b in dense_runs(is_quiet, MIN_RUN_SHARE * window)]
    probes: list[int] = []
    for frame in sorted({*keys[sizes[keys] <= limit].tolist(), *quiet}):
        if not probes or frame - probes[-1] >= window:
            probes.append(frame)
    if not probes:
        return []
    stretches = []
    for frames in [[frame] for frame in probes] if track.is_indexed else [probes]:
        for index, luma in read_luma(path, track, frames, max_pixels=_MAX_PIXELS):
            if flat_level(luma) is not None:
                before, after = keys[keys < index], keys[keys >= index + window]
                first = int(before[-1]) if len(before) else 1
                stretches.append((first, int(after[0]) if len(after) else len(sizes) - 1))
    return stretches


def _confirm(
    path: Path,
    track: VideoTrack,
    stretches: Sequence[tuple[int, int]],
    *,
    likely: Sequence[tuple[int, int]],
    window: int,
) -> list[Run]:
    """Decode stretches, with some frames around them, and return the runs in them."""
    count, parts = len(track.sizes), list[tuple[int, int]]()
    for first, last in sorted(stretches):
        first, last = max(0, first - _CONTEXT_FRAMES), min(count - 1, last + _CONTEXT_FRAMES)
        if parts and first <= parts[-1][1] + 1:
            parts[-1] = parts[-1][0], max(last, parts[-1][1])
        else:
            parts.append((first, last))
    changes = [_measure(path, track, first, last, lag=2 * window) for first, last in parts]
    is_context = np.ones(count, dtype=np.bool_)
    for first, last in likely:
        is_context[first : last + 1] = False
    around = [is_context[c.first : c.first + len(c.mean)] for c in changes]
    usual = [np.zeros((2, 0)), *(np.stack([c.mean, c.peak])[:, at]
                                 for c, at in zip(changes, around, strict=True))]  # fmt: skip
    known = np.concatenate(usual, axis=1)
    known = known[:, np.isfinite(known[0])]
    is_enough = known.shape[1] >= _CONTEXT_FRAMES // 2
    mean, peak = np.median(known, axis=1).tolist() if is_enough else (0.0, 0.0)
    return [
        run
        for part in changes
        for run in judge_changes(part, window, usual_mean=mean, usual_peak=peak)
        if run.color or not _has_noise(run, part, track)
    ]


def _has_noise(run: Run, changes: FrameChanges, track: VideoTrack) -> bool:
    """Return whether keyframes tell that a camera was on, and saw nothing move."""
    keys = run.first + np.flatnonzero(track.keyframes[run.first : run.last + 1])
    of_keys = changes.of_keys[keys[1:] - changes.first]
    known = of_keys[np.isfinite(of_keys)]
    return len(known) > 0 and float(known.min()) > _KEY_MEAN


def _measure(path: Path, track: VideoTrack, first: int, last: int, *, lag: int) -> FrameChanges:
    """Decode frames `first` to `last` and measure how they change."""
    mean, peak, top, drift, level, of_keys = (np.full(last - first + 1, np.nan) for _ in range(6))
    detail, key = 0.0, None
    recent: deque[tuple[int, NDArray[np.uint8]]] = deque(maxlen=lag)
    requested = range(first, last + 1)
    for index, luma in read_luma(path, track, requested, max_pixels=_MAX_PIXELS):
        row = index - first
        if recent and recent[-1][1].shape != luma.shape:
            recent.clear()
        if recent and recent[-1][0] == index - 1:
            change = change_of(recent[-1][1], luma)
            mean[row] = change.mean()
            ranks = int(0.999 * (change.size - 1)), max(0, change.size - _TOP_PIXELS)
            ordered = np.partition(change, ranks, axis=None) if mean[row] else change.ravel()
            peak[row], top[row] = ordered[ranks[0]], ordered[ranks[1]]
        if len(recent) == lag:
            drift[row] = change_of(recent[0][1], luma).mean()
        if track.keyframes[index]:
            if key is not None and key[1].shape == luma.shape:
                share = track.sizes[index] / track.sizes[key[0]]
                if abs(share - 1) <= _KEY_SIZES:
                    of_keys[row] = change_of(key[1], luma).mean()
            key = index, luma
        detail = detail or float(change_of(luma[:, 1:], luma[:, :-1]).mean())
        flat = flat_level(luma)
        level[row] = np.nan if flat is None else flat
        recent.append((index, luma))
    return FrameChanges(
        first=first, mean=mean, peak=peak, top=top, drift=drift, lag=lag, of_keys=of_keys,
        level=level, detail=detail,
    )  # fmt: skip


def change_of(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the absolute difference of two pictures."""
    return np.asarray(np.maximum(a, b) - np.minimum(a, b))


def flat_level(luma: NDArray[np.uint8]) -> float | None:
    """Return the median luma of a picture of one color; None for others."""
    few = luma[:: max(1, luma.shape[0] // 8), :: max(1, luma.shape[1] // 8)]
    if np.ptp(np.sort(few, axis=None)[1:-1]) > 2 * _FLAT_RANGE:
        return None
    low, middle, high = np.percentile(luma, [1, 50, 99])
    return float(middle) if high - low <= _FLAT_RANGE else None


def judge_changes(
    changes: FrameChanges, window: int, *, usual_mean: float, usual_peak: float
) -> list[Run]:
    """Return the runs of one picture, by what is usual around them; 0 if nothing is known."""
    mean, peak = changes.mean, changes.peak
    is_same = (mean <= max(_SAME_MEAN, _SAME_MEAN_SHARE * usual_mean)) & (
        peak <= max(_SAME_PEAK, _SAME_PEAK_SHARE * usual_peak)
    )
    limit = max(_NEW_MEAN, _NEW_MEAN_SHARE * usual_mean, _NEW_DETAIL_SHARE * changes.detail)
    is_known = (mean <= limit) & (changes.top <= _NEW_TOP)
    is_flat = np.isfinite(changes.level)
    level_change = np.abs(np.diff(changes.level, prepend=np.nan))
    repeats = [
        Run(
            changes.first + a, changes.first + b, _color(float(np.median(changes.level[a : b + 1])))
        )
        for a, b in marked_runs(is_flat[1:] & is_flat[:-1] & (level_change[1:] <= 2))
        if b - a + 1 >= window
    ]
    is_same[is_flat] = is_known[is_flat] = False
    for start, stop in marked_runs(is_known):
        for a, b in dense_runs(is_same[start:stop], window):
            first, last = start + a - 1, start + b
            late = np.arange(first + changes.lag, last + 1)
            breaks = late[changes.drift[late] > limit].tolist()
            for begin, end in zip([first, *breaks], [*(i - 1 for i in breaks), last], strict=True):
                if end - begin >= window:
                    repeats.append(Run(changes.first + begin, changes.first + end))
    return repeats


def _color(level: float) -> str:
    """Name a luma, of full or of limited range."""
    return "black" if level < 32 else "white" if level > 224 else "gray or a hue"


def are_same_pictures(a: tuple[Path, VideoTrack], b: tuple[Path, VideoTrack]) -> bool:
    """Return whether two videos, of the same size and frames, show the same pictures.

    Frames at _COMPARED_FRAMES times are compared. Pictures of one color are no evidence.
    """
    (_, track), (_, other) = a, b
    num = len(track.times_s)
    is_alike = (track.width, track.height) == (other.width, other.height)
    if not is_alike or abs(len(other.times_s) - num) > 0.02 * num:
        return False
    pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
    for position in np.linspace(0, num - 1, _COMPARED_FRAMES).astype(int).tolist():
        at = int(np.abs(other.times_s - track.times_s[position]).argmin())
        pictures = [
            luma
            for video, index in ((a, position), (b, at))
            for _, luma in read_luma(*video, [index], max_pixels=track.width * track.height)
        ]
        if len(pictures) < 2 or pictures[0].shape != pictures[1].shape:
            return False
        one, two = pictures
        detail = change_of(one[:, 1:], one[:, :-1]).mean()
        if detail >= _MIN_DETAIL:
            if change_of(one, two).mean() > _MAX_NOISE * detail:
                return False
            pairs.append((one, two))
    return len(pairs) >= _COMPARED_FRAMES // 2 and is_same_view(pairs)


def is_same_view(pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> bool:
    """Return whether pairs of pictures [H, W] differ by noise only, not as two cameras do.

    Nothing may be shifted horizontally, by more than a part of a pixel: noise and codecs change
    pixels too, but not in proportion to the slope of the picture. Over several pairs noise cancels,
    and the distance of two cameras does not.
    """
    sums = np.zeros((2, _BLOCKS**2))
    for one, two in pairs:
        slope = np.gradient(one.astype(np.float32) + two, axis=1) / 2
        products = slope * (two.astype(np.float32) - one), np.square(slope)
        sums += [
            [
                block.sum(dtype=np.float64)
                for rows in np.array_split(product, _BLOCKS)
                for block in np.array_split(rows, _BLOCKS, axis=1)
            ]
            for product in products
        ]
    shifted, squares = sums
    has_detail = squares > sum(one.size for one, _ in pairs) / _BLOCKS**2
    shifts = np.abs(shifted[has_detail] / squares[has_detail])
    return len(shifts) > 0 and float(np.percentile(shifts, 90)) <= _MAX_SHIFT
