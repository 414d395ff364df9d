"""Build self-contained HTML pages: axes, curves, bands, text lanes, data URIs, templates.

The validation report (:mod:`preprocess.validate.page`) and the prediction page
(:mod:`train.infer.page`) draw with it; TensorBoard's pictures take their curves and spectrograms
from it. A page contains everything that it shows, needs no network, and escapes every text.

Positions and lengths are SVG units, about one pixel each: x to the right, y downwards. Jinja2 and
Pillow come with the extras ``preprocess`` and ``train``, so they are imported where they are used.
"""

from __future__ import annotations

import base64
import io
import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import simplejpeg
import soundfile

from shared.clock import EPSILON_S
from shared.streams import ValueType

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jinja2 import Environment
    from numpy.typing import NDArray

    Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
    """Times [N] and values [N] of one connected line, N > 0."""

PLOT_WIDTH = 1000.0
"""Default width of a time axis."""

TICK_DISTANCE = 100.0
"""Least distance between the ticks of a time axis."""

JPEG_QUALITY = 80

LEVEL_COLORS = np.array(
    [(6, 6, 20), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)],
    dtype=np.float64,
)
"""From silent to loud: colors of matplotlib's magma."""

MASKED_COLOR = (128, 128, 128)
"""Where there is no sound, or where nothing was predicted."""

CHAR_WIDTH = 6.7
"""Upper estimate of a character's mean width at a height of 12; wide characters take two."""

LABEL_GAP = 12.0
"""Room around a label."""

MIN_BAND_WIDTH = 2.0
"""A shorter stretch is drawn this wide to stay visible."""

MANY_BANDS = 100
"""With this many bands the least width is one unit; wider bands would fill the axis."""

MAX_JUMPS = {ValueType.ANGLE: math.pi, ValueType.QUATERNION: 1.0}
"""A step of this size breaks a curve: an angle wraps there, a quaternion changes its sign."""

_TICK_INTERVALS_S = (
    *(m * 10.0**e for e in range(-4, 1) for m in (1, 2, 5)),
    *(10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21_600.0, 86_400.0),
)
_MIN_VIEW_S = 0.01
_CLOCK_FROM_S = 120.0


def page_environment(package: str) -> Environment:
    """Return the Jinja2 environment for the templates of a package and of this one.

    Every value is escaped, and an undefined name is an error. Templates extend
    ``page_base.html.j2`` and import macros from ``page_macros.html.j2``.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    packages = (package, "shared")
    return Environment(
        loader=ChoiceLoader([PackageLoader(name, package_path="") for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True, slots=True)
class Tick:
    """A labeled position on an axis."""

    position: float
    label: str


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """The stretch of the session clock that a figure shows, and the figure's width."""

    start_s: float
    stop_s: float
    width: float = PLOT_WIDTH

    def __post_init__(self) -> None:
        if self.stop_s - self.start_s < _MIN_VIEW_S:
            object.__setattr__(self, "stop_s", self.start_s + _MIN_VIEW_S)

    @property
    def duration_s(self) -> float:
        """Seconds shown."""
        return self.stop_s - self.start_s

    def x(self, time_s: float) -> float:
        """Return the position of a time, kept inside the figure."""
        share = (time_s - self.start_s) / self.duration_s
        return round(min(1.0, max(0.0, share)) * self.width, 2)

    def xs(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the positions of times, kept inside the figure."""
        share = (times_s - self.start_s) / self.duration_s
        return np.asarray(np.clip(share, 0.0, 1.0) * self.width, dtype=np.float64)

    def ticks(self) -> list[Tick]:
        """Return round times, about TICK_DISTANCE apart."""
        least_s = self.duration_s * TICK_DISTANCE / self.width
        interval_s = next((s for s in _TICK_INTERVALS_S if s >= least_s * 0.99), round_up(least_s))
        first, last = math.ceil(self.start_s / interval_s), math.floor(self.stop_s / interval_s)
        times_s = [index * interval_s for index in range(first, last + 1)]
        return [Tick(self.x(t), format_time(t, resolution_s=interval_s)) for t in times_s]


@dataclass(frozen=True, slots=True)
class ValueAxis:
    """The range of values that a figure shows, the largest on top, and the figure's height."""

    low: float
    high: float
    height: float

    def y(self, value: float) -> float:
        """Return the position of a value, kept inside the figure."""
        share = (self.high - value) / (self.high - self.low)
        return round(min(1.0, max(0.0, share)) * self.height, 1)

    def ys(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the positions of values, kept inside the figure."""
        share = (self.high - values) / (self.high - self.low)
        return np.asarray(np.clip(share, 0.0, 1.0) * self.height, dtype=np.float64)

    def ticks(self) -> list[Tick]:
        """Return three to five round values."""
        step = round_up((self.high - self.low) / 4)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        values = [index * step for index in range(first, last + 1)]
        return [Tick(self.y(v), f"{0.0 if abs(v) < step / 2 else v:.6g}") for v in values]


def round_up(value: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten; 1 for a value that is not positive."""
    if not 0 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= value * (1 - 1e-9))


def format_time(time_s: float, *, resolution_s: float = 0.01) -> str:
    """Format a time, rounded to a resolution: seconds, and m:ss or h:mm:ss from two minutes on."""
    digits = max(0, -math.floor(math.log10(resolution_s) + 1e-9))
    if abs(time_s) < _CLOCK_FROM_S:
        return f"{time_s:.{digits}f} s"
    minutes, seconds = divmod(round(abs(time_s), digits), 60)
    hours, minutes = divmod(int(minutes), 60)
    padded = f"{seconds:0{digits + 3 if digits else 2}.{digits}f}"
    start = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{'-' if time_s < 0 else ''}{start}:{padded}"


def thin_curve(
    times_s: NDArray[np.float64],
    values: NDArray[np.float64],
    *,
    axis: TimeAxis,
    num_columns: int,
    max_interval_s: float,
    max_jump: float = math.inf,
) -> list[Curve]:
    """Split a curve, finite values [N], at gaps, and keep the extremes of each column of it.

    An interval up to `max_interval_s`, or narrower than a column, is joined by a line. A step in
    value of at least `max_jump` is not joined, as of a wrapped angle.
    """
    if len(times_s) == 0:
        return []
    column = np.floor((times_s - axis.start_s) / axis.duration_s * num_columns)
    # Gaps narrower than a column stay joined: as curves of their own their number has no bound.
    is_break = np.diff(times_s) > max(max_interval_s + EPSILON_S, axis.duration_s / num_columns)
    is_break |= np.abs(np.diff(values)) >= max_jump
    # A group is the readings of one column of one curve; it becomes one or two points.
    starts = np.flatnonzero(np.concatenate([[True], is_break | (np.diff(column) != 0)]))
    stops = np.append(starts[1:], len(times_s)) - 1
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    is_rising = values[stops] >= values[starts]
    pair_times = np.stack([times_s[starts], times_s[stops]], axis=1).ravel()
    pairs = np.stack([np.where(is_rising, low, high), np.where(is_rising, high, low)], axis=1)
    is_kept = np.stack([np.ones(len(starts), dtype=np.bool_), stops > starts], axis=1).ravel()
    curve_of_group = np.searchsorted(np.flatnonzero(is_break), starts, side="left")
    cuts = np.flatnonzero(np.diff(np.repeat(curve_of_group, 2)[is_kept])) + 1
    thin_times, thin_values = pair_times[is_kept], pairs.ravel()[is_kept]
    return list(zip(np.split(thin_times, cuts), np.split(thin_values, cuts), strict=True))


def sampled_curves(
    values: NDArray[np.float64], *, rate_hz: float, axis: TimeAxis, max_jump: float = math.inf
) -> list[Curve]:
    """Split values [N] at a regular rate at their missing values (NaN); see :func:`thin_curve`."""
    rows = np.flatnonzero(np.isfinite(values))
    return thin_curve(
        rows / rate_hz,
        values[rows],
        axis=axis,
        num_columns=int(axis.width),
        max_interval_s=1.5 / rate_hz,
        max_jump=max_jump,
    )


def curve_path(curves: Iterable[Curve], *, axis: TimeAxis, values: ValueAxis) -> str:
    """Return the `d` of an SVG path that draws curves."""
    commands: list[str] = []
    for times_s, readings in curves:
        points = np.stack([axis.xs(times_s), values.ys(readings)], axis=1).round(1)
        steps = np.diff(points, axis=0, prepend=0.0).tolist()  # shorter than positions
        first, *others = (f"{x:.6g},{y:.6g}" for x, y in steps)
        commands.append(f"M{first}l{' '.join(others)}" if others else f"M{first}h0")
    return "".join(commands)


def area_path(
    xs: NDArray[np.float64], tops: NDArray[np.float64], bottoms: NDArray[np.float64]
) -> str:
    """Return the path of the area between two finite staircases [N] over the edges [N + 1]."""
    if len(tops) == 0:
        return ""
    edges = xs.tolist()
    forth = [f"V{y:.4g}H{x:.5g}" for x, y in zip(edges[1:], tops.tolist(), strict=True)]
    back_pairs = zip(edges[-2::-1], bottoms.tolist()[::-1], strict=True)
    back = [f"V{y:.4g}H{x:.5g}" for x, y in back_pairs]
    return f"M{edges[0]:.5g},{tops[0]:.4g}{''.join(forth)}{''.join(back)}Z"


@dataclass(frozen=True, slots=True)
class Band:
    """A stretch of the time axis as it is drawn."""

    x: float
    width: float
    kind: str
    """The band's CSS class."""
    note: str


def draw_bands(
    starts_s: NDArray[np.float64],
    stops_s: NDArray[np.float64],
    *,
    kind: str,
    word: str,
    axis: TimeAxis,
) -> list[Band]:
    """Draw stretches, increasing [N], as bands, at most one per unit of the axis.

    `kind` is their CSS class, and `word` says what a stretch is, for the note.
    """
    bands: list[Band] = []
    if len(starts_s) == 0:
        return bands
    xs = np.array([axis.x(t) for t in starts_s])
    stop_xs = np.maximum.accumulate([axis.x(t) for t in stops_s])
    # A group is a run of stretches less than one unit apart.
    firsts = np.flatnonzero(np.append(True, xs[1:] - stop_xs[:-1] >= 1))
    lasts = np.append(firsts[1:], len(xs)) - 1
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        width = float(stop_xs[last] - xs[first])
        middle = xs[first] + width / 2
        width = max(MIN_BAND_WIDTH if len(firsts) < MANY_BANDS else 1.0, width)
        ends_s = (starts_s[first], stops_s[last])
        times = " to ".join(format_time(time_s, resolution_s=1e-3) for time_s in ends_s)
        longest_s = float((stops_s - starts_s)[first : last + 1].max())
        note = f"{word}, {longest_s:.3f} s"
        if last > first:
            note = f"{last - first + 1} x {word}, the longest {longest_s:.3f} s"
        x = round(middle - width / 2, 2)
        bands.append(Band(x, round(width, 2), kind, f"{note}: {times}"))
    return bands


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedText:
    """A text event of a figure."""

    start_s: float
    stop_s: float
    """End of the time that the text takes; `start_s` if it takes none."""
    label: str
    title: str
    """Text of the tooltip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextMark:
    """A text event at its position."""

    text: TimedText
    x: float
    width: float
    """Width of the time that the text takes."""
    lane: int
    """Row of the label, 0 on top; -1 if no lane has room for it."""
    anchor: Literal["start", "end"]
    """The end of the label that is at `x`."""


def arrange_texts(
    texts: Iterable[TimedText], axis: TimeAxis, *, max_lanes: int | None = None
) -> list[TextMark]:
    """Place texts in lanes so that no two labels overlap.

    A label that would pass the figure's right edge is placed left of its mark. `texts` are in order
    of time; None means any number of lanes.
    """
    marks: list[TextMark] = []
    lane_ends: list[float] = []
    for text in texts:
        x = axis.x(text.start_s)
        width = max(2.0, axis.x(text.stop_s) - x)
        label_width = LABEL_GAP + CHAR_WIDTH * _count_cells(text.label)
        is_at_end = x + label_width > axis.width and x > axis.width / 2
        left, right = x, x + max(label_width, width + 2.0)
        if is_at_end:
            left, right = x - label_width, x + width + 2.0
        lane = next((i for i, end in enumerate(lane_ends) if left >= end), -1)
        if lane >= 0:
            lane_ends[lane] = right
        elif max_lanes is None or len(lane_ends) < max_lanes:
            lane = len(lane_ends)
            lane_ends.append(right)
        anchor: Literal["start", "end"] = "end" if is_at_end else "start"
        marks.append(TextMark(text=text, x=x, width=width, lane=lane, anchor=anchor))
    return marks


def count_lanes(marks: Sequence[TextMark]) -> int:
    """Return the number of lanes of some marks, at least 1."""
    return 1 + max((mark.lane for mark in marks), default=0)


def printable_line(text: str, *, max_chars: int) -> str:
    """Return a text as one line that cannot reorder or hide its surroundings.

    Control characters are written as escapes; a longer text is cut and ends in "...".
    """
    line = " ".join(text[: 4 * max_chars].split())
    plain = "".join(
        c if unicodedata.category(c)[0] != "C" or c == "\u200d" else f"\\u{ord(c):04x}"
        for c in line[:max_chars]
    )
    is_cut = len(line) > max_chars or len(text) > 4 * max_chars
    return f"{plain[: max_chars - 3]}..." if is_cut else plain


def _count_cells(text: str) -> int:
    """Count the cells of a text; East Asian wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def draw_spectrogram(levels: NDArray[np.uint8], *, num_levels: int) -> NDArray[np.uint8]:
    """Draw dMel levels, RGB [channels, frames, 3], low pitches at the bottom.

    Args:
        levels: [frames, channels]; `num_levels` and above are masked.
        num_levels: number of levels.
    """
    positions = np.linspace(0, len(LEVEL_COLORS) - 1, num_levels)
    anchors = np.arange(len(LEVEL_COLORS))
    palette = np.tile(np.array(MASKED_COLOR, dtype=np.uint8), (256, 1))
    for channel in range(3):
        palette[:num_levels, channel] = np.interp(positions, anchors, LEVEL_COLORS[:, channel])
    return palette[levels.T[::-1]]


def png_uri(picture: NDArray[np.uint8]) -> str:
    """Return a picture, RGB [H, W, 3], as the data URI of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return _data_uri("image/png", file.getvalue())


def jpeg_uri(picture: NDArray[np.uint8]) -> str:
    """Return a frame, RGB [H, W, 3], as the data URI of a JPEG file."""
    pixels = np.ascontiguousarray(picture)
    jpeg = simplejpeg.encode_jpeg(
        pixels, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420"
    )
    return _data_uri("image/jpeg", jpeg)


def wav_uri(samples: NDArray[np.int16], *, rate_hz: int) -> str:
    """Return mono sound as the data URI of a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="WAV", subtype="PCM_16")
    return _data_uri("audio/wav", file.getvalue())


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
