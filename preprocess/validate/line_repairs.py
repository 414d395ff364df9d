"""Repair metadata and text lines, as pure functions of lines.

Each function makes one kind of repair that has exactly one right outcome. It takes the lines of a
file and returns the repaired lines with a sentence that says what was done, or None if there was
nothing to do.

Applied in the order of this module, a second pass changes nothing: no repair creates work for one
before it, and each measures only what no later repair changes (gaps are filled by the median
interval of recorded lines alone).
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.validate.checks import END_ERROR_S, END_WARNING_S
from preprocess.validate.line_checks import (
    GAP_ERROR_S,
    GAP_WARNING_S,
    MAX_BACK_S,
    ROUNDING,
    is_mostly_unread,
)
from preprocess.validate.probe import confirms_unit, guess_unit, raw_timestamp, text_divisor
from shared.clock import EPSILON_S, clock_offset, wrap_angle
from shared.session.folder import (
    MAX_LINE_BYTES,
    MAX_VALUE,
    METADATA_FILE,
    TEXT_FILE,
    parse_line,
    parse_timestamp,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.recipe import SensorRecipe

MIN_GAP_INTERVALS = 1.8
"""A gap of fewer median intervals lost no line; the intervals of recorders vary."""

TEXT_TOLERANCE_S = 1.0
"""Texts this far outside the lines can still be on the same clock."""

DECIMALS = 9
"""Of shifted timestamps: finer than recorders write, coarser than rounding errors."""

INTERPOLATED = "interpolated"
"""Key that marks a line that fills a gap."""

_TEXT_KEYS = ("internal_text", "external_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a file."""

    values: dict[str, Any]
    raw: bytes | None
    """The bytes it was read from; None if a repair changed it."""
    time_s: float | None
    """Its timestamp; None if it has no usable one."""

    def encoded(self) -> bytes:
        """Return the bytes to write; those of an unchanged line are the same."""
        if self.raw is not None:
            return self.raw.rstrip(b"\r\n") + b"\n"
        return json.dumps(self.values, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


Repaired = tuple[list[Line], str | None]


def parse_lines(content: bytes) -> tuple[list[Line], int]:
    """Return the lines that are JSON objects, and the number of other lines that are not blank."""
    lines: list[Line] = []
    num_bad = 0
    for raw in content.split(b"\n"):
        if not raw.strip():
            continue
        values = parse_line(raw)[0] if len(raw) < MAX_LINE_BYTES else None
        if values is None:
            num_bad += 1
        else:
            lines.append(Line(values=values, raw=raw, time_s=parse_timestamp(values)))
    return lines, num_bad


def convert_units(
    lines: list[Line], texts: list[Line], media_stop_s: float | None
) -> tuple[list[Line], list[Line], str | None]:
    """Convert timestamps in milliseconds, microseconds or nanoseconds to seconds.

    Nothing is divided unless the media confirm the unit. Texts that are seconds already stay.
    """
    times = _raw_times(lines)
    unit = guess_unit(times)
    if unit is None or not confirms_unit(times, unit, media_stop_s):
        return lines, texts, None
    divisor = text_divisor(_raw_times(texts), times=times, unit=unit, media_stop_s=media_stop_s)
    if divisor is None:
        return lines, texts, None
    files = METADATA_FILE if divisor == 1 else f"{METADATA_FILE}, {TEXT_FILE}"
    sentence = f"{files}: divided all timestamps by {unit.per_s:.0f}; they were {unit.name}"
    divided = [_divided(line, unit.per_s) for line in lines]
    return divided, [_divided(t, divisor) if divisor > 1 else t for t in texts], sentence


def drop_unreadable(lines: list[Line], num_bad: int, *, file: str) -> Repaired:
    """Drop lines that cannot be read; a file with hardly any other lines is not changed.

    A text without a timestamp stays, so that its words are not lost.
    """
    kept = [line for line in lines if line.time_s is not None or file == TEXT_FILE]
    num_dropped = num_bad + len(lines) - len(kept)
    if not num_dropped or is_mostly_unread(num_dropped, len(lines) + num_bad):
        return lines, None
    fault = "without JSON" if file == TEXT_FILE else "without JSON or a timestamp"
    return kept, f"{file}: dropped {_count(num_dropped, 'line')} {fault}"


def is_sortable(lines: Sequence[Line]) -> bool:
    """Return whether all lines have timestamps that go back by at most MAX_BACK_S."""
    times_s = np.array([math.nan if line.time_s is None else line.time_s for line in lines])
    if len(lines) == 0 or np.isnan(times_s).any():
        return False
    return bool((np.diff(times_s) >= -MAX_BACK_S).all())


def sort_lines(lines: list[Line]) -> Repaired:
    """Sort lines by time; lines with equal times keep their order."""
    num_back = int((np.diff(_times(lines)) < 0).sum())
    if not num_back:
        return lines, None
    ordered = sorted(lines, key=lambda line: line.time_s or 0.0)
    return ordered, f"{METADATA_FILE}: sorted {_count(num_back, 'line')} into place"


def join_repeats(lines: list[Line]) -> Repaired:
    """Join lines with equal times: the first line, completed from the others, and all texts."""
    joined: list[Line] = []
    for line in lines:
        if joined and joined[-1].time_s == line.time_s:
            merged = _merge(joined[-1].values, line.values)
            if merged != joined[-1].values:
                joined[-1] = replace(joined[-1], values=merged, raw=None)
        else:
            joined.append(line)
    num_repeats = len(lines) - len(joined)
    if not num_repeats:
        return lines, None
    return joined, f"{METADATA_FILE}: joined {_count(num_repeats, 'repeated line')} with the first"


def shift_to_zero(
    lines: list[Line], texts: list[Line], media_stop_s: float | None
) -> tuple[list[Line], list[Line], str | None]:
    """Shift timestamps to start at zero if the recorder's clock was never reset.

    Texts that are on the session clock already stay. If they fit neither clock, nothing is shifted.
    """
    offset_s = _offset(lines, media_stop_s)
    if not offset_s:
        return lines, texts, None
    text_times_s = np.array([line.time_s for line in texts if line.time_s is not None])
    stop_s = max(float(_times(lines)[-1]) - offset_s, media_stop_s or 0.0) + TEXT_TOLERANCE_S

    def fits(times_s: np.ndarray[Any, Any]) -> bool:
        return bool(((times_s >= -TEXT_TOLERANCE_S) & (times_s <= stop_s)).all())

    shifted, files = texts, METADATA_FILE
    if len(text_times_s) and fits(text_times_s - offset_s):
        shifted, files = [_shifted(t, offset_s) for t in texts], f"{METADATA_FILE}, {TEXT_FILE}"
    elif not fits(text_times_s):
        return lines, texts, None
    sentence = f"{files}: subtracted {offset_s:g} s from all timestamps; the clock was never reset"
    return [_shifted(line, offset_s) for line in lines], shifted, sentence


def drop_outside_media(lines: list[Line], media_stop_s: float | None) -> Repaired:
    """Drop lines before the start or after the end of the media.

    Only 0.1 to 1 s of lines are dropped; more is another fault. If one of them contains text,
    nothing is dropped.
    """
    if media_stop_s is None:
        return lines, None
    times_s = _times(lines)
    first, stop = 0, len(lines)
    if END_WARNING_S < times_s[-1] - media_stop_s <= END_ERROR_S:
        stop = int(np.searchsorted(times_s, media_stop_s, side="right"))
    if END_WARNING_S < -times_s[0] <= END_ERROR_S:
        first = int(np.searchsorted(times_s, 0.0, side="left"))
    outside = (*lines[:first], *lines[stop:])
    if not outside or stop - first < 2 or any(_has_text(line) for line in outside):
        return lines, None
    # Skip a clock that was not shifted, and one that would look unshifted afterwards.
    if any(_offset(some, media_stop_s) for some in (lines, lines[first:stop])):
        return lines, None
    sentence = f"{METADATA_FILE}: dropped {_count(len(outside), 'line')} outside the media's "
    return lines[first:stop], sentence + f"[0, {media_stop_s:.3f}] s"


def clamp(lines: list[Line], *, sensors: SensorRecipe) -> Repaired:
    """Clamp touch to [0, 1] and angles to [-pi, pi].

    Only columns in which every reading is inside, or outside by rounding, are clamped.
    """
    touch_size, num_angles = sensors.touch_size, sensors.proprio_size // 2
    repaired, num_touch = _clamp_key(
        lines, "touch", size=touch_size, num_checked=touch_size, limits=(0.0, 1.0)
    )
    repaired, num_proprio = _clamp_key(
        repaired, "proprio", size=2 * num_angles, num_checked=num_angles, limits=(-math.pi, math.pi)
    )
    counts = [("touch", num_touch), ("proprio", num_proprio)]
    changes = [f"{key} in {_count(number, 'line')}" for key, number in counts if number]
    if not changes:
        return lines, None
    return repaired, f"{METADATA_FILE}: clamped {' and '.join(changes)}, outside by rounding"


def _clamp_key(
    lines: list[Line], key: str, *, size: int, num_checked: int, limits: tuple[float, float]
) -> tuple[list[Line], int]:
    """Clamp the first `num_checked` values under a key; return the number of changed lines."""
    low, high = limits
    rows = [i for i, line in enumerate(lines) if _reading(line, key, size) is not None]
    values = np.array([lines[i].values[key] for i in rows], dtype=np.float64)
    checked = values.reshape(len(rows), size)[:, :num_checked]
    excess = np.maximum(checked - high, low - checked)
    is_clamped = (excess > 0) & (excess.max(axis=0, initial=0.0) <= ROUNDING)
    repaired = list(lines)
    changed = np.flatnonzero(is_clamped.any(axis=1))
    for row in changed:
        line = lines[rows[row]]
        reading = list(line.values[key])
        for column in np.flatnonzero(is_clamped[row]):
            reading[column] = min(max(reading[column], low), high)
        repaired[rows[row]] = replace(line, values={**line.values, key: reading}, raw=None)
    return repaired, len(changed)


def fill_gaps(lines: list[Line], *, sensors: SensorRecipe) -> Repaired:
    """Fill gaps in which single lines were lost with interpolated, marked lines.

    A gap is filled if it takes 35 to 100 ms and at least two median intervals, and if the lines on
    both sides contain readings.
    """
    recorded = [line for line in lines if not line.values.get(INTERPOLATED)]
    if len(recorded) < 3:
        return lines, None
    interval_s = float(np.median(np.diff(_times(recorded))))
    limit_s = min(GAP_ERROR_S, sensors.max_gap_s) + EPSILON_S
    filled: list[Line] = [lines[0]]
    num_gaps = 0
    for before, after in itertools.pairwise(lines):
        gap_s = float(after.time_s or 0.0) - float(before.time_s or 0.0)
        if max(GAP_WARNING_S, MIN_GAP_INTERVALS * interval_s) <= gap_s <= limit_s:
            new = _interpolate(before, after, round(gap_s / interval_s) - 1, sensors)
            num_gaps += bool(new)
            filled += new
        filled.append(after)
    num_new = len(filled) - len(lines)
    if not num_new:
        return lines, None
    sentence = f"filled {_count(num_gaps, 'gap')} with {_count(num_new, 'interpolated line')}"
    return filled, f'{METADATA_FILE}: {sentence}, marked "{INTERPOLATED}": true'


def _interpolate(before: Line, after: Line, count: int, sensors: SensorRecipe) -> list[Line]:
    """Return `count` lines evenly between two; none if no sensor has readings in both.

    Angles are interpolated along the shorter arc.
    """
    ends: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]] = {}
    for key, size, num_angles in (
        ("touch", sensors.touch_size, 0),
        ("proprio", sensors.proprio_size, sensors.proprio_size // 2),
    ):
        low, high = _reading(before, key, size), _reading(after, key, size)
        if low is not None and high is not None:
            ends[key] = (np.array(low), np.array(high), num_angles)
    if not ends or before.time_s is None or after.time_s is None:
        return []
    lines: list[Line] = []
    for k in range(1, count + 1):
        share = k / (count + 1)
        time_s = round(before.time_s + share * (after.time_s - before.time_s), DECIMALS)
        values: dict[str, Any] = {"timestamp": time_s}
        for key, (low_values, high_values, num_angles) in ends.items():
            delta = high_values - low_values
            delta[:num_angles] = wrap_angle(delta[:num_angles])
            mixed = low_values + share * delta
            mixed[:num_angles] = wrap_angle(mixed[:num_angles])
            values[key] = mixed.tolist()
        values[INTERPOLATED] = True
        lines.append(Line(values=values, raw=None, time_s=time_s))
    return lines


def _times(lines: Sequence[Line]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([line.time_s for line in lines], dtype=np.float64)


def _offset(lines: Sequence[Line], media_stop_s: float | None) -> float:
    times_s = _times(lines)
    return clock_offset(float(times_s[0]), float(times_s[-1]), media_stop_s)


def _raw_times(lines: Sequence[Line]) -> np.ndarray[Any, np.dtype[np.float64]]:
    times = (raw_timestamp(line.values) for line in lines)
    return np.array([time for time in times if time is not None], dtype=np.float64)


def _divided(line: Line, units_per_s: float) -> Line:
    time = raw_timestamp(line.values)
    if time is None:
        return line
    time_s = round(time / units_per_s, DECIMALS)
    return replace(line, values={**line.values, "timestamp": time_s}, raw=None, time_s=time_s)


def _shifted(line: Line, offset_s: float) -> Line:
    if line.time_s is None:
        return line
    time_s = round(line.time_s - offset_s, DECIMALS)
    return replace(line, values={**line.values, "timestamp": time_s}, raw=None, time_s=time_s)


def _merge(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Complete the first line from the other one, and join their texts."""
    merged = {**other, **{k: v for k, v in first.items() if v is not None or k not in other}}
    for key in _TEXT_KEYS:
        both = [v.get(key) for v in (first, other)]
        texts = [text for text in both if isinstance(text, str) and text.strip()]
        if len(texts) == 2 and texts[0] != texts[1]:
            merged[key] = " ".join(texts)
    return merged


def _has_text(line: Line) -> bool:
    return any(line.values.get(key) for key in _TEXT_KEYS)


def _reading(line: Line, key: str, size: int) -> list[float] | None:
    """Return a reading of the right size with finite numbers only, else None."""
    values = line.values.get(key)
    if not isinstance(values, list) or len(values) != size:
        return None
    return values if all(_is_number(v) for v in values) else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < MAX_VALUE


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
