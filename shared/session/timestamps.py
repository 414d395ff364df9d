"""Read timestamps as the seconds that they mean: units, and lines whose clock is wrong.

Recorders write lines 5 to 500 times per second, so the median interval suggests the unit. The media
confirm it: only in one unit do the timestamps last as long. Without media, readings in the lines
must confirm it, and the recipe has to declare the unit.

Lines are left out where their times contradict the other lines of the same sensor. *Runs* are lines
in the order of the file without a step back of more than MAX_BACK_S or a long step forward. The
longest run is right. Others are left out if they are

- single lines (fewer than MIN_RUN) over MIN_FAR_S away from the session, or from as much as is
  recorded if there are no media;
- single lines out of place between long runs, which follow each other without them;
- over FAR_FACTOR times as far away as the session lasts, if there are media; else over 24 h;
- at the same times as other lines, after one step back;
- after one step, without which the lines end with the media.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import EPSILON_S, clock_offset
from shared.session.alignment import MAX_SESSION_S
from shared.session.folder import read_timed_lines
from shared.session.lines import TIME_KEY, Correction
from shared.streams import TIME_UNITS, SensorStream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.recipe import Recipe
    from shared.session.lines import FileLines, SessionLines

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.002, 0.2
"""Range of a recorder's median interval."""

SLOWEST_INTERVAL_S = 10.0
"""Longest median interval in a unit that the media confirm."""

RATE_FACTOR = 4.0
"""An interval within this factor of the declared rate's is in the declared unit."""

MIN_TIMED_LINES = 8
"""With fewer lines the unit of their timestamps is not guessed."""

UNIT_TOLERANCE_S = 1.0
"""Timestamps and media of one recording end at most this far apart."""

MAX_TIME = 1e21
"""A larger number is not a timestamp in any unit."""

_NANOSECONDS_PER_S = 1e9
"""With this divisor, timestamps of every unit stay below the limit for seconds."""

UNIT_NAMES = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
    "100ns": "units of 100 nanoseconds",
}
"""Units that are recognized."""

MAX_BACK_S = 1.0
"""Lines out of order by at most this much are sorted; a longer step back is another fault."""

MIN_RUN = 8
"""Fewer lines between two steps are single wrong timestamps, not a recording."""

MIN_FAR_S, FAR_FACTOR = 60.0, 10.0
"""See the rules above."""

JUMP_TOLERANCE_S = 0.1
"""Without the jump of their clock, lines end this close to the media."""

_STEP_INTERVALS = 10.0
"""A step of more median intervals, and of more than MAX_BACK_S, ends a run."""

_USUAL_STEPS = 1.5
"""Lines that are farther apart, in median intervals, lack a line between them."""

_EPOCH_S = 1e6
"""Later times were counted from a date, not from the start of a recording."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongUnit:
    """The unit of a file's timestamps that is not the one that the recipe declares."""

    unit: str
    """A key of UNIT_NAMES."""
    declared: str
    """A key of shared.streams.TIME_UNITS."""
    interval: float
    """Median interval in its own unit."""
    is_confirmed: bool
    """Whether the media confirm it, and texts too, so that the timestamps are divided."""

    @property
    def factor(self) -> float:
        """What the timestamps must be divided by to be in the declared unit."""
        return TIME_UNITS[self.unit] / TIME_UNITS[self.declared]


@dataclass(frozen=True, slots=True)
class WrongLines:
    """Lines of a file that are left out, because their timestamps are wrong."""

    first: int
    """1-based, like `last`."""
    last: int
    message: str
    jump_s: float = 0.0
    """Seconds by which the clock jumped before them, if the media confirm it; else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLines:
    """Everything of a session that has timestamps, and how they were corrected."""

    lines: SessionLines
    units: Mapping[str, WrongUnit]
    """File -> the unit that it has instead of the declared one; `lines` are divided."""
    left_out: Mapping[str, tuple[WrongLines, ...]]
    corrections: Mapping[str, Correction]
    """How :mod:`shared.session.folder` reads the files in the same way."""

    @property
    def sentences(self) -> dict[str, str]:
        """What is wrong with timestamps, one sentence per kind of fault and file."""
        named = {f"unit {file}": describe_unit(file, unit) for file, unit in self.units.items()}
        for file, wrong in self.left_out.items():
            more = f" (and {len(wrong) - 1} more such places)" if len(wrong) > 1 else ""
            named[f"left out {file}"] = describe_left_out(file, wrong[0]) + more
        return named

    @property
    def refusal(self) -> str | None:
        """Why the position of every line is unknown; None if it is known."""
        unsure = [(file, unit) for file, unit in self.units.items() if not unit.is_confirmed]
        return f"{describe_unit(*unsure[0])}; until then no stream is read" if unsure else None


def describe_unit(file: str, unit: WrongUnit, streams: str = "") -> str:
    """Say in which unit the timestamps of a file are, and how to declare it for its streams."""
    outcome = "nothing confirms it"
    if unit.is_confirmed:
        outcome = "they are divided, as they then last as long as the session"
    return (
        f"{file}: timestamps look like {UNIT_NAMES[unit.unit]}, not {UNIT_NAMES[unit.declared]}: "
        f"a line every {unit.interval:g}; {outcome}; fix: set `time_unit: {unit.unit}`"
        f"{streams and f' of {streams}'} in the recipe, or divide them by {unit.factor:.12g}"
    )


def describe_left_out(file: str, wrong: WrongLines) -> str:
    """Say which lines of a file are left out, and why."""
    lines = f"line {wrong.first}" if wrong.first == wrong.last else (
        f"lines {wrong.first} to {wrong.last}"
    )  # fmt: skip
    return f"{file} {lines}: {wrong.message}; left out"


def read_lines(
    path: Path, recipe: Recipe, media_stop_s: float | None, *, is_cleaned: bool
) -> TimedLines:
    """Read all lines of a session with times in seconds; see :func:`read_timed_lines`."""
    lines = read_timed_lines(path, recipe, is_cleaned=is_cleaned)
    units = _find_units_of(path, recipe, lines, media_stop_s)
    corrections = {f: Correction(units_per_s=TIME_UNITS[u.unit]) for f, u in units.items()}
    if units:
        divided = read_timed_lines(path, recipe, corrections=corrections, is_cleaned=is_cleaned)
        # Without media, only readings tell that the lines are those of a recorder.
        if media_stop_s is None and not any(len(r.times_s) for r in divided.readings.values()):
            units, corrections = {}, {}
        else:
            lines = divided
    left_out = _find_left_out(lines, recipe, media_stop_s)
    for file, wrong in left_out.items():
        ranges = tuple((w.first, w.last) for w in wrong)
        corrections[file] = replace(corrections.get(file, Correction()), left_out=ranges)
    if left_out:
        lines = read_timed_lines(path, recipe, corrections=corrections, is_cleaned=is_cleaned)
    return TimedLines(lines=lines, units=units, left_out=left_out, corrections=corrections)


def find_units(
    sensors: Mapping[str, NDArray[np.float64]],
    texts: Mapping[str, NDArray[np.float64]],
    media_stop_s: float | None,
    *,
    recipe: Recipe,
) -> dict[str, WrongUnit]:
    """Return the unit of each file whose timestamps are not in the declared one.

    Timestamps are sorted, and in the unit of their file. Texts that declare no unit but seconds can
    have another one. If some fit neither beside sensors in another unit, no unit is confirmed.
    """
    units: dict[str, WrongUnit] = {}
    windows_s = [] if media_stop_s is None else [(0.0, media_stop_s)]
    for file, times in sensors.items():
        specs = [spec for spec in recipe.sensors.values() if spec.file == file]
        declared = specs[0].time_unit
        guess = guess_unit(times, specs, declared=declared, media_stop_s=media_stop_s)
        if guess is not None:
            interval = float(np.median(np.diff(times)))
            units[file] = WrongUnit(
                unit=guess[0], declared=declared, interval=interval, is_confirmed=guess[1]
            )
        if len(times):
            times_s = times / TIME_UNITS[guess[0] if guess else declared]
            windows_s.append((float(times_s.min()), float(times_s.max())))
    of_sensors = next(iter(units.values())).unit if units else None
    for file, times in texts.items():
        unit = _text_unit(times, windows_s, of_sensors)
        if unit is None and of_sensors:
            units = {f: replace(known, is_confirmed=False) for f, known in units.items()}
        elif unit not in (None, "s"):
            interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
            units[file] = WrongUnit(
                unit=unit, declared="s", interval=interval, is_confirmed=True
            )  # fmt: skip
    return units


def guess_unit(
    times: NDArray[np.float64],
    specs: Sequence[SensorStream],
    *,
    declared: str = "s",
    media_stop_s: float | None = None,
) -> tuple[str, bool] | None:
    """Guess the unit of increasing timestamps, and whether the media confirm it; None: declared."""
    if len(times) < MIN_TIMED_LINES:
        return None
    steps = np.diff(times)
    interval, declared_per_s = float(np.median(steps)), TIME_UNITS[declared]
    rates_hz = np.array([spec.rate_hz for spec in specs])

    def rate_error(unit: str) -> float:
        return float(np.abs(np.log(rates_hz * interval / TIME_UNITS[unit])).min(initial=np.inf))

    if interval <= 0 or rate_error(declared) <= np.log(RATE_FACTOR):
        return None
    others = [unit for unit in UNIT_NAMES if unit != declared]
    fits = [
        u for u in (declared, *others)
        if MIN_INTERVAL_S <= interval / TIME_UNITS[u] <= MAX_INTERVAL_S
    ]  # fmt: skip
    likely = None if not fits or declared in fits else min(fits, key=rate_error)
    if media_stop_s is None:
        return None if likely is None else (likely, False)
    # How long the lines last, with and without the time lost in gaps and jumps.
    spans = np.array([np.ptp(times), np.minimum(steps, _STEP_INTERVALS * interval).sum()])
    if np.abs(spans / declared_per_s - media_stop_s).min() <= UNIT_TOLERANCE_S:
        return None
    tolerance_s = min(UNIT_TOLERANCE_S, 0.2 * media_stop_s)
    confirmed = [
        u
        for u in others
        if np.abs(spans / TIME_UNITS[u] - media_stop_s).min() <= tolerance_s
        and interval / TIME_UNITS[u] <= SLOWEST_INTERVAL_S
    ]
    if len(confirmed) == 1:
        return confirmed[0], True
    # A part of the session was recorded, or somewhat more: likely, but no proof.
    shares = spans / TIME_UNITS[likely or declared] / media_stop_s
    is_similar = bool(((shares >= 1 / 3) & (shares <= 3)).any())
    return (likely, False) if likely is not None and is_similar else None


def raw_timestamp(values: Mapping[str, Any], key: str = TIME_KEY) -> float | None:
    """Return the timestamp of a line in its own unit; None if it is not a number."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_TIME:
        return None
    return float(value)


def find_wrong_lines(
    times_s: NDArray[np.float64], lines: NDArray[np.int64], media_stop_s: float | None
) -> list[WrongLines]:
    """Find the lines of a sensor, in the order of the file, whose timestamps are wrong."""
    firsts = np.concatenate([[0], _find_steps(times_s) + 1])
    runs = [*zip(firsts.tolist(), [*firsts[1:].tolist(), len(times_s)], strict=True)]
    if len(runs) == 1:
        return []
    strays = _find_strays(times_s, runs)
    if strays:
        ahead = [
            WrongLines(
                int(lines[first]),
                int(lines[stop - 1]),
                f"timestamp {times_s[first]:.3f} s does not fit the lines around it",
            )
            for first, stop in strays
        ]
        is_other = np.ones(len(times_s), dtype=np.bool_)
        for first, stop in strays:
            is_other[first:stop] = False
        others = find_wrong_lines(times_s[is_other], lines[is_other], media_stop_s)
        return sorted([*ahead, *others], key=operator.attrgetter("first"))
    long = [run for run in runs if run[1] - run[0] >= MIN_RUN]
    jump = _find_jump(times_s, long, media_stop_s)
    if jump is not None:
        first, stop = long[1]
        message = (
            f"the clock jumps by {jump:+.3f} s here; without the jump the lines end with the media"
        )
        of_jump = [WrongLines(int(lines[first]), int(lines[stop - 1]), message, jump)]
        is_other = (np.arange(len(times_s)) < first) | (np.arange(len(times_s)) >= stop)
        others = find_wrong_lines(times_s[is_other], lines[is_other], media_stop_s)
        return sorted([*of_jump, *others], key=operator.attrgetter("first"))
    runs.sort(key=lambda run: run[0] - run[1])
    recorded_s = sum(times_s[stop - 1] - times_s[first] for first, stop in long)
    low_s = high_s = times_s[runs[0][0]]
    if media_stop_s is not None:
        high_s += media_stop_s
    far_s = max(MIN_FAR_S, FAR_FACTOR * max(recorded_s, media_stop_s or 0.0))
    used: list[tuple[float, float]] = []
    wrong: list[WrongLines] = []
    for first, stop in runs:
        start_s, end_s = times_s[first:stop].min(), times_s[first:stop].max()
        away_s = max(low_s - end_s, start_s - high_s, 0.0) if used else 0.0
        limit_s = far_s if media_stop_s is not None else MAX_SESSION_S
        if stop - first < MIN_RUN:
            limit_s = max(MIN_FAR_S, recorded_s if media_stop_s is None else 0.0)
        overlap_s = max((min(end_s, b) - max(start_s, a) for a, b in used), default=0.0)
        is_double = stop - first >= MIN_RUN and len(long) <= 2 and overlap_s > MAX_BACK_S
        if away_s > limit_s or is_double:
            message = f"timestamp {start_s:.3f} s is {away_s:g} s away from all other lines"
            if is_double:
                message = f"the clock goes back to {start_s:.3f} s, where other lines are"
            wrong.append(WrongLines(int(lines[first]), int(lines[stop - 1]), message))
        else:
            used.append((start_s, end_s))
            low_s, high_s = min(low_s, start_s), max(high_s, end_s)
    return sorted(wrong, key=operator.attrgetter("first"))


def _find_steps(times_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the lines before a step that ends a run."""
    steps_s = np.diff(times_s)
    limit_s = max(MAX_BACK_S, _STEP_INTERVALS * float(np.median(np.abs(steps_s)))) if len(
        steps_s
    ) else 0.0  # fmt: skip
    return np.flatnonzero((steps_s > limit_s) | (steps_s < -MAX_BACK_S))


def _find_strays(
    times_s: NDArray[np.float64], runs: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return single lines out of place between long runs, which follow each other without them.

    Lines that were written late are behind the lines around them, where other lines have a gap;
    lines ahead of those around them, or behind where no line is missing, have wrong times.
    """
    strays = []
    for number, (first, stop) in enumerate(runs):
        before = runs[number - 1] if number else (0, 0)
        after = runs[number + 1] if number + 1 < len(runs) else (stop, stop)
        around = [r for r in (before, after) if r[1] > r[0]]
        rest_s = np.concatenate([times_s[slice(*before)], times_s[slice(*after)]])
        is_single = stop - first < MIN_RUN <= min(r[1] - r[0] for r in around)
        if not is_single or len(_find_steps(rest_s)):
            continue
        own_s = times_s[first:stop]
        is_ahead = after[1] > after[0] and own_s.min() > times_s[after[0]] + MAX_BACK_S
        is_behind = number > 0 and own_s.max() < times_s[first - 1] - MAX_BACK_S
        if is_ahead or (is_behind and not _fill_gap(own_s, np.delete(times_s, slice(first, stop)))):
            strays.append((first, stop))
    return strays


def _fill_gap(own_s: NDArray[np.float64], others_s: NDArray[np.float64]) -> bool:
    """Return whether times are outside of others, or where those are farther apart than usual."""
    ordered_s = np.unique(others_s)
    after = np.searchsorted(ordered_s, own_s)
    is_outside = (after == 0) | (after == len(ordered_s))
    steps_s = np.diff(ordered_s)
    gaps_s = steps_s[np.clip(after - 1, 0, len(steps_s) - 1)]
    return bool((is_outside | (gaps_s > _USUAL_STEPS * np.median(steps_s))).any())


def _find_jump(
    times_s: NDArray[np.float64], runs: Sequence[tuple[int, int]], media_stop_s: float | None
) -> float | None:
    """Return the step between two runs without which, and only then, they end with the media."""
    if media_stop_s is None or len(runs) != 2:
        return None
    (first, stop), (next_first, next_stop) = runs
    interval_s = float(np.median(np.diff(times_s[first:stop])))
    jump_s = float(times_s[next_first] - times_s[stop - 1]) - interval_s

    def apart_s(low_s: float, high_s: float) -> float:
        stop_s = high_s - clock_offset(low_s, high_s, media_stop_s) + interval_s
        return abs(stop_s - media_stop_s)

    start_s, end_s = float(times_s[first]), float(times_s[next_stop - 1])
    of_both = times_s[first], times_s[stop - 1], times_s[next_first], end_s
    is_with_media = apart_s(float(min(of_both)), float(max(of_both))) <= 5 * JUMP_TOLERANCE_S
    if is_with_media or apart_s(start_s, end_s - jump_s) > JUMP_TOLERANCE_S + EPSILON_S:
        return None
    return jump_s


def _find_left_out(
    lines: SessionLines, recipe: Recipe, media_stop_s: float | None
) -> dict[str, tuple[WrongLines, ...]]:
    """Find the lines with wrong timestamps of each file of sensors."""
    by_file: dict[str, dict[tuple[int, int], WrongLines]] = {}
    for name, readings in lines.readings.items():
        times_s, numbers = _in_order(readings.times_s, readings.lines)
        # A clock that went back may have hit the times of other lines exactly.
        all_times_s, all_numbers = _in_order(
            np.concatenate([readings.times_s, readings.lost_times_s]),
            np.concatenate([readings.lines, readings.lost_lines]),
        )
        if (np.diff(all_times_s) < -MAX_BACK_S).any():
            times_s, numbers = all_times_s, all_numbers
        for wrong in find_wrong_lines(times_s, numbers, media_stop_s):
            of_file = by_file.setdefault(recipe.streams[name].file, {})
            of_file.setdefault((wrong.first, wrong.last), wrong)
    return {
        file: tuple(of_file[key] for key in sorted(of_file)) for file, of_file in by_file.items()
    }


def _in_order(
    times_s: NDArray[np.float64], lines: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return times and lines in the order of the file."""
    order = np.argsort(lines, kind="stable")
    return times_s[order], lines[order]


def _text_unit(
    times: NDArray[np.float64], windows_s: Sequence[tuple[float, float]], of_sensors: str | None
) -> str | None:
    """Return the unit in which texts are inside the session; None if none fits, or several do."""
    longest_s = max((high_s - low_s for low_s, high_s in windows_s), default=0.0)

    def fits(unit: str) -> bool:
        times_s = times / TIME_UNITS[unit]
        return any(
            times_s.min() >= low_s - UNIT_TOLERANCE_S and times_s.max() <= high_s + UNIT_TOLERANCE_S
            and (
                unit in ("s", of_sensors)
                or low_s > _EPOCH_S
                or np.ptp(times_s) >= 0.1 * longest_s
            )
            for low_s, high_s in windows_s
        )  # fmt: skip

    if not len(times) or not windows_s or fits("s"):
        return "s"
    if of_sensors and fits(of_sensors):
        return of_sensors
    is_outside = np.all([(times < low) | (times > high) for low, high in windows_s], axis=0)
    units = [unit for unit in UNIT_NAMES if fits(unit)]
    return units[0] if len(units) == 1 and is_outside.mean() > 0.5 else None


def _find_units_of(
    path: Path, recipe: Recipe, lines: SessionLines, media_stop_s: float | None
) -> dict[str, WrongUnit]:
    """Return the unit of each file that was read whose timestamps are not in the declared one."""
    by_file: dict[str, list[FileLines]] = {}
    for of_file in lines.files:
        by_file.setdefault(of_file.file, []).append(of_file)
    # With several time keys, nothing is guessed.
    alone = {file: same[0] for file, same in by_file.items() if len(same) == 1}
    is_sensor = {f: not recipe.sensors.keys().isdisjoint(x.streams) for f, x in alone.items()}
    raw = {file: _raw_times(path, recipe, of_file) for file, of_file in alone.items()}
    sensors = {file: raw[file] for file in alone if is_sensor[file]}
    texts = {
        file: raw[file]
        for file, of_file in alone.items()
        if not is_sensor[file] and all(recipe.texts[n].time_unit == "s" for n in of_file.streams)
    }
    return find_units(sensors, texts, media_stop_s, recipe=recipe)


def _raw_times(path: Path, recipe: Recipe, lines: FileLines) -> NDArray[np.float64]:
    """Return the timestamps of a file in its own unit, also those too large for seconds."""
    num_large = sum(issue.count for issue in lines.issues if issue.kind == "timestamp")
    if num_large <= len(lines.times_s):
        specs = [s for s in recipe.streams.values() if isinstance(s, SensorStream)]
        unit = next((s.time_unit for s in specs if s.file == lines.file), "s")
        return lines.times_s * TIME_UNITS[unit]
    large = {lines.file: Correction(units_per_s=_NANOSECONDS_PER_S)}
    read = read_timed_lines(path, recipe, corrections=large, is_cleaned=False)
    times_s = next((f.times_s for f in read.files if f.file == lines.file), lines.times_s)
    return times_s * _NANOSECONDS_PER_S
