"""Repair JSON lines, as pure functions of lines.

Each function makes one kind of repair that has exactly one right outcome. It takes lines and
returns the repaired ones with a sentence that says what was done, or None if there was nothing to
do. What the lines hold is a :class:`LineFile`, which comes from the recipe.

Applied in the order of this module, a second pass changes nothing: no repair creates work for one
before it, and each measures only what no later repair changes (gaps are filled by the median
interval of recorded lines alone).
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.validate.checks import END_ERROR_S, END_WARNING_S
from preprocess.validate.line_checks import (
    LATE_INTERVALS,
    MIN_GAP_INTERVALS,
    is_mostly_unread,
)
from preprocess.validate.repair_plan import Repair, RepairKind
from preprocess.validate.value_checks import ROUNDING
from shared.clock import EPSILON_S, clock_offset
from shared.session.alignment import TEXT_TOLERANCE_S
from shared.session.folder import group_by_file
from shared.session.lines import (
    ARRIVED,
    INTERPOLATED,
    MAX_VALUE,
    TIME_KEY,
    json_keys,
    keys_of,
    parse_number,
    parse_timestamp,
)
from shared.session.records import (
    DAMAGED,
    MAX_LINE_BYTES,
    UNKNOWN,
    count_split,
    decode_line,
    open_records,
    parse_records,
)
from shared.session.timestamps import (
    MAX_BACK_S,
    UNIT_NAMES,
    UNIT_TOLERANCE_S,
    WrongLines,
    WrongUnit,
    find_units,
    find_wrong_lines,
    raw_timestamp,
)
from shared.streams import METADATA_FILE, SensorStream, TextStream, ValueType
from shared.values import VALUE_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from shared.recipe import Recipe

DECIMALS = 9
"""Of shifted timestamps: finer than recorders write, coarser than rounding errors."""

MIN_PACKETS = 8
"""Fewer packets do not tell that readings arrive in packets."""

PACKET_SHARE = 0.8
"""Share of the packets that have about the same size, and of those that arrive regularly."""

CONFLICT_SHARE = 0.5
"""Share of the packets whose readings must differ: lines that are only repeated do not."""

MAX_PACKET_S = 0.25
"""With packets farther apart, it matters whether their readings came before or after."""

_INTEGER = re.compile(r"[+-]?\d{1,30}", re.ASCII)
_COMMA_NUMBER = re.compile(r"[+-]?\d+,\d+", re.ASCII)

_LIMITS: Mapping[ValueType, tuple[float, float]] = {
    ValueType.FRACTION: (0.0, 1.0),
    ValueType.ANGLE: (-math.pi, math.pi),
}
"""Ranges to which values are clamped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineFile:
    """What the lines of a file hold, according to the recipe."""

    name: str
    time_key: str = TIME_KEY
    units_per_s: float = 1.0
    sensors: Mapping[str, SensorStream]
    text_keys: tuple[str, ...] = ()

    @property
    def is_text_file(self) -> bool:
        """Whether the lines hold texts only, which can have equal times in any order."""
        return not self.sensors and self.name != METADATA_FILE


def plan_files(recipe: Recipe) -> dict[str, LineFile]:
    """Describe every file of JSON lines whose streams agree in key and unit of their times."""
    files: dict[str, LineFile] = {}
    for file, streams in sorted(group_by_file(recipe.streams).items()):
        times = {(spec.time, spec.units_per_s) for spec in streams.values()}
        texts = [spec for spec in streams.values() if isinstance(spec, TextStream)]
        if file.endswith(".jsonl") and len(times) == 1:
            ((time_key, units_per_s),) = times
            files[file] = LineFile(
                name=file,
                time_key=time_key,
                units_per_s=units_per_s,
                sensors={n: s for n, s in streams.items() if isinstance(s, SensorStream)},
                text_keys=tuple(keys_of(file, spec)[1] for spec in texts),
            )
    return files


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a file."""

    values: dict[str, Any]
    raw: bytes | None
    """The bytes it was read from; None if a repair changed it."""
    time_s: float | None
    """Its timestamp; None if it has no usable one."""
    number: int = 0
    """Its number in the file; 0 for a new line."""

    def encoded(self) -> bytes:
        """Return the bytes to write; those of an unchanged line are the same."""
        if self.raw is not None:
            return self.raw.rstrip(b"\r\n") + b"\n"
        return json.dumps(self.values, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


Lines = dict[str, list[Line]]
"""Lines by file."""

Repaired = tuple[list[Line], str | None]


def parse_lines(content: bytes, file: LineFile) -> tuple[list[Line], int, list[Repair]]:
    """Return the JSON objects of a file, the number of other lines, and what a rewriting changes.

    Every object is written as a line of UTF-8.
    """
    opened = open_records(io.BytesIO(content))
    lines: list[Line] = []
    encoding, num_bad, num_split = opened.encoding, 0, 0
    for number, raw in opened.lines:
        records = parse_records(raw)
        num_split += len(records) if opened.is_document else count_split(raw, records)
        for record in records:
            if record.values is None or len(raw) > MAX_LINE_BYTES:
                num_bad += 1
                continue
            time_s = parse_timestamp(record.values, key=file.time_key, units_per_s=file.units_per_s)
            written, own = record.raw, decode_line(record.raw)[1] if record.message else ""
            if own not in ("", DAMAGED, UNKNOWN):
                encoding, written = own, decode_line(record.raw)[0].encode()
            one_line = None if b"\n" in written.strip() else written
            lines.append(Line(values=record.values, raw=one_line, time_s=time_s, number=number))
    repairs: list[Repair] = []
    if encoding:
        sentence = f"{file.name}: wrote UTF-8 in place of {encoding}"
        repairs.append(Repair(RepairKind.ENCODE, (file.name,), sentence))
    if num_split:
        sentence = f"{file.name}: wrote {_count(num_split, 'object')} on lines of their own"
        repairs.append(Repair(RepairKind.SPLIT, (file.name,), sentence))
    return lines, num_bad, repairs


def write_numbers(lines: list[Line], *, file: LineFile) -> Repaired:
    """Write numbers in place of texts that are numbers, and of dates the seconds since 1970.

    A comma in them is a decimal one if it cannot be anything else in some text of the file.
    """
    values = [line.values.get(key) for line in lines for key in _number_keys(file)]
    texts = [item for value in values for item in _items(value)]
    commas = [text for text in texts if isinstance(text, str) and "," in text]
    is_decimal = all(map(_COMMA_NUMBER.fullmatch, commas)) and any(
        len(text.rpartition(",")[2]) != 3 or text.lstrip("+-").startswith("0") for text in commas
    )

    def convert(value: object) -> object:
        if isinstance(value, list):
            return [convert(v) for v in value]
        if not isinstance(value, str):
            return value
        text = value.strip().replace(",", "." if is_decimal else ",")
        number = int(text) if _INTEGER.fullmatch(text) else parse_number(text)
        return number if number is not None and math.isfinite(number) else value

    written: list[Line] = []
    for line in lines:
        own = {key: line.values[key] for key in _number_keys(file) if key in line.values}
        with_text = {k: v for k, v in own.items() if any(isinstance(t, str) for t in _items(v))}
        changes = {key: new for key, old in with_text.items() if (new := convert(old)) != old}
        if changes:
            values_now = {**line.values, **changes}
            time_s = parse_timestamp(values_now, key=file.time_key, units_per_s=file.units_per_s)
            line = replace(line, values=values_now, raw=None, time_s=time_s)
        written.append(line)
    num_changed = sum(new is not old for new, old in zip(written, lines, strict=True))
    if not num_changed:
        return lines, None
    return written, f"{file.name}: wrote numbers in place of texts in {_count(num_changed, 'line')}"


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _number_keys(file: LineFile) -> list[str]:
    """Return the keys of a line that should hold numbers."""
    keys = [key for spec in file.sensors.values() for key in json_keys(spec)]
    return [file.time_key, *(key for key in keys if key != file.time_key)]


def convert_units(
    lines: Lines, files: Mapping[str, LineFile], media_stop_s: float | None, *, recipe: Recipe
) -> tuple[Lines, list[Repair]]:
    """Convert timestamps in milliseconds, microseconds or nanoseconds to the declared unit.

    Nothing is divided unless the media confirm the unit. Texts that are seconds already stay; if
    they fit neither unit, nothing is divided.
    """
    times = {name: _raw_times(of_file, files[name]) for name, of_file in lines.items()}
    units = find_units(
        {name: np.unique(times[name]) for name in lines if files[name].sensors},
        {n: times[n] for n in lines if files[n].is_text_file and files[n].units_per_s == 1},
        media_stop_s,
        recipe=recipe,
    )
    if not all(unit.is_confirmed for unit in units.values()):
        return lines, []
    alike: dict[WrongUnit, list[str]] = {}
    for name, unit in units.items():
        alike.setdefault(replace(unit, interval=0.0), []).append(name)
    repairs = [
        Repair(
            RepairKind.UNITS,
            tuple(names),
            f"{', '.join(names)}: divided all timestamps by {unit.factor:.12g}; they were "
            f"{UNIT_NAMES[unit.unit]}",
        )
        for unit, names in alike.items()
    ]
    divided = {
        name: [_divided(line, units[name].factor, files[name]) for line in lines[name]]
        for name in units
    }
    return lines | divided, repairs


def remove_jumps(
    lines: Lines, files: Mapping[str, LineFile], media_stop_s: float | None
) -> tuple[Lines, list[Repair]]:
    """Remove jumps after which lines end with the media no more; texts follow if they fit then."""
    repaired: Lines = dict(lines)
    repairs: list[Repair] = []
    jumps: dict[str, WrongLines] = {}
    for name, of_file in lines.items():
        timed = np.array([i for i, x in enumerate(of_file) if x.time_s is not None], dtype=np.int64)
        if files[name].sensors and len(timed):
            times_s = times_of([of_file[i] for i in timed])
            wrong = find_wrong_lines(times_s, timed, media_stop_s)
            jumps.update((name, fault) for fault in wrong if fault.jump_s)
    for name, jump in jumps.items():
        rows = np.arange(jump.first, jump.last + 1)
        repaired[name], number = _shifted(lines[name], rows, jump.jump_s, files[name])
        sentence = (
            f"{name}: subtracted {jump.jump_s:.6g} s from {number} lines after a jump of the "
            "clock; they now end with the media"
        )
        repairs.append(Repair(RepairKind.JUMP, (name,), sentence))
    jumps_s = {jump.jump_s for jump in jumps.values()}
    for name in (n for n in lines if jumps_s and files[n].is_text_file):
        (jump_s, *others) = sorted(jumps_s)
        times_s = np.array([np.nan if x.time_s is None else x.time_s for x in lines[name]])
        stop_s = (media_stop_s or 0.0) + UNIT_TOLERANCE_S
        rows = np.flatnonzero((times_s < -UNIT_TOLERANCE_S) | (times_s > stop_s))
        moved_s = times_s[rows] - jump_s
        if len(rows) and not others and ((moved_s >= 0) & (moved_s <= stop_s)).all():
            repaired[name], number = _shifted(lines[name], rows, jump_s, files[name])
            sentence = f"{name}: subtracted {jump_s:.6g} s from {number} texts after it"
            repairs.append(Repair(RepairKind.JUMP, (name,), sentence))
    return repaired, repairs


def _shifted(
    lines: list[Line], rows: NDArray[np.int64], jump_s: float, file: LineFile
) -> tuple[list[Line], int]:
    """Return lines of which some are earlier by a number of seconds, and how many are."""
    timed = {row: t for row in rows.tolist() if (t := lines[row].time_s) is not None}
    moved = {row: with_time(lines[row], t - jump_s, file) for row, t in timed.items()}
    return [moved.get(row, line) for row, line in enumerate(lines)], len(moved)


def is_refused(lines: Sequence[Line], num_bad: int, *, file: LineFile) -> bool:
    """Return whether too much of a file is unreadable to repair it, in whatever unit its times."""
    times = len(lines) if file.is_text_file else len(_raw_times(lines, file))
    return is_mostly_unread(num_bad + len(lines) - times, len(lines) + num_bad)


def drop_unreadable(lines: list[Line], num_bad: int, *, file: LineFile) -> Repaired:
    """Drop lines that cannot be read, unless most can't; a text without a timestamp stays."""
    untimed = [
        line
        for line in lines
        if line.time_s is None and not file.is_text_file and not _has_text(line, file)
    ]
    if not (num_bad or untimed) or is_mostly_unread(num_bad + len(untimed), len(lines) + num_bad):
        return lines, None
    sentences = [f"{_count(num_bad, 'line')} without JSON"] if num_bad else []
    if untimed:
        readings = Counter(
            name for line in untimed for name, spec in file.sensors.items() if _reading(line, spec)
        )
        lost = [f"{_count(number, 'reading')} of {name}" for name, number in readings.items()]
        with_readings = f", which have {' and '.join(lost)} at unknown times" if lost else ""
        sentences.append(f"{_count(len(untimed), 'line')} without a timestamp{with_readings}")
    is_untimed = {id(line) for line in untimed}
    kept = [line for line in lines if id(line) not in is_untimed]
    return kept, f"{file.name}: dropped {' and '.join(sentences)}"


def find_obstacle(lines: Sequence[Line]) -> str | None:
    """Explain why lines cannot be sorted by time; None if they can."""
    for line in lines:
        if line.time_s is None:
            return f"line {line.number} has no timestamp; write it first"
    back_s = -np.diff(times_of(lines))
    rows = np.flatnonzero(back_s > MAX_BACK_S)
    if not len(rows):
        return None
    row = int(rows[0])
    return (
        f"line {lines[row + 1].number} goes back by {back_s[row]:.3f} s from line "
        f"{lines[row].number}; correct the wrong one, or split the session there first"
    )


def sort_lines(lines: list[Line], *, file: LineFile) -> Repaired:
    """Sort lines by time; lines with equal times keep their order."""
    num_back = int((np.diff(times_of(lines)) < 0).sum())
    if not num_back:
        return lines, None
    ordered = sorted(lines, key=lambda line: line.time_s or 0.0)
    return ordered, f"{file.name}: sorted {_count(num_back, 'line')} into place"


def shift_to_zero(
    sensors: Lines, texts: Lines, files: Mapping[str, LineFile], media_stop_s: float | None
) -> tuple[Lines, Lines, str | None]:
    """Shift timestamps to start at zero if the recorder's clock was never reset.

    Texts that are on the session clock already stay. If they fit neither clock, nothing is shifted.
    """
    offset_s = _offset(sensors, media_stop_s)
    if not offset_s:
        return sensors, texts, None
    last_s = max(float(times_of(lines)[-1]) for lines in sensors.values())
    stop_s = max(last_s - offset_s, media_stop_s or 0.0) + TEXT_TOLERANCE_S

    def fits(times_s: NDArray[np.float64]) -> bool:
        return bool(((times_s >= -TEXT_TOLERANCE_S) & (times_s <= stop_s)).all())

    shifted = dict(sensors)
    for name, lines in texts.items():
        times_s = np.array([line.time_s for line in lines if line.time_s is not None])
        if len(times_s) and fits(times_s - offset_s):
            shifted[name] = lines
        elif not fits(times_s):
            return sensors, texts, None
    sentence = (
        f"{', '.join(shifted)}: subtracted {offset_s:.12g} s from all timestamps; the clock was "
        "never reset"
    )
    shifted = {
        name: [with_time(line, (line.time_s or 0.0) - offset_s, files[name]) for line in lines]
        for name, lines in shifted.items()
    }
    return (
        {name: shifted[name] for name in sensors},
        {name: shifted.get(name, lines) for name, lines in texts.items()},
        sentence,
    )


def drop_outside_media(
    sensors: Lines, files: Mapping[str, LineFile], media_stop_s: float | None
) -> tuple[Lines, list[Repair]]:
    """Drop lines before the start or after the end of the media.

    Only 0.1 to 1 s of lines are dropped; more is another fault. If one of a file's lines contains
    text, nothing of it is dropped.
    """
    if media_stop_s is None:
        return sensors, []
    kept, repairs = dict(sensors), []
    for name, lines in sensors.items():
        times_s = times_of(lines)
        first, stop = 0, len(lines)
        if END_WARNING_S < times_s[-1] - media_stop_s <= END_ERROR_S:
            stop = int(np.searchsorted(times_s, media_stop_s, side="right"))
        if END_WARNING_S < -times_s[0] <= END_ERROR_S:
            first = int(np.searchsorted(times_s, 0.0, side="left"))
        outside = (*lines[:first], *lines[stop:])
        if outside and stop - first >= 2 and not any(_has_text(o, files[name]) for o in outside):
            kept[name] = lines[first:stop]
            number = _count(len(outside), "line")
            sentence = (
                f"{name}: dropped {number} of readings before or after all video and sound, which "
                f"last [0, {media_stop_s:.3f}] s"
            )
            repairs.append(Repair(RepairKind.TRIM, (name,), sentence))
    # Skip a clock that was not shifted, and one that would look unshifted afterwards.
    if not repairs or any(_offset(some, media_stop_s) for some in (sensors, kept)):
        return sensors, []
    return kept, repairs


def clamp(lines: list[Line], *, file: LineFile) -> Repaired:
    """Clamp fractions to [0, 1] and angles to [-pi, pi].

    Only columns in which every reading is inside, or outside by rounding, are clamped.
    """
    repaired, changes = list(lines), []
    for name, spec in file.sensors.items():
        low, high = np.full(spec.size, -np.inf), np.full(spec.size, np.inf)
        for group, columns in zip(spec.values, spec.slices, strict=True):
            low[columns], high[columns] = _LIMITS.get(group.type, (-np.inf, np.inf))
        read = ((i, _reading(line, spec)) for i, line in enumerate(repaired))
        readings = {i: reading for i, reading in read if reading is not None}
        values = np.array([*readings.values()], dtype=np.float64).reshape(-1, spec.size)
        excess = np.maximum(values - high, low - values)
        is_clamped = (excess > 0) & (excess.max(axis=0, initial=0.0) <= ROUNDING)
        clamped = np.where(is_clamped, np.clip(values, low, high), values)
        for row in np.flatnonzero(is_clamped.any(axis=1)).tolist():
            line = repaired[[*readings][row]]
            repaired[[*readings][row]] = _with_reading(line, spec, clamped[row], is_clamped[row])
        if number := int(is_clamped.any(axis=1).sum()):
            changes.append(f"{name} in {_count(number, 'line')}")
    if not changes:
        return lines, None
    return repaired, f"{file.name}: clamped {' and '.join(changes)}, outside by rounding"


def spread_packets(lines: list[Line], *, file: LineFile) -> Repaired:
    """Spread readings that arrived in regular packets, and have the time of their packet.

    The last reading of a packet keeps its time; those before it come evenly since the packet
    before. The time of arrival is kept in the line.
    """
    packets = [[*packet] for _, packet in itertools.groupby(lines, key=lambda line: line.time_s)]
    ranks = [_ranks(packet, file) for packet in packets]
    sizes = np.array([max(rank, default=0) + 1 for rank in ranks])
    intervals_s = np.diff([packet[0].time_s or 0.0 for packet in packets])
    if len(packets) < MIN_PACKETS or not (sizes > 1).any():
        return lines, None
    size, interval_s = int(np.argmax(np.bincount(sizes))), float(np.median(intervals_s))
    is_regular = np.abs(intervals_s - interval_s) <= 0.25 * interval_s
    conflicts = [_has_conflict(p, file) for p, s in zip(packets, sizes, strict=True) if s > 1]
    shares = float((np.abs(sizes - size) <= size / 4).mean()), float(is_regular.mean())
    is_strong = min(shares) >= PACKET_SHARE and np.mean(conflicts) >= CONFLICT_SHARE
    if size < 2 or interval_s > MAX_PACKET_S or not is_strong:
        return lines, None
    spread: list[Line] = []
    # Before the first packet, times stay so near to zero that no other repair is needed.
    room_s = np.append(max(packets[0][0].time_s or 0.0, END_WARNING_S), intervals_s)
    for packet, rank, number, before_s in zip(packets, ranks, sizes, room_s, strict=True):
        step_s = min(interval_s / size, float(before_s) / number)
        for line, order in zip(packet, rank, strict=True):
            time_s = (line.time_s or 0.0) - (number - 1 - order) * step_s
            if order < number - 1:
                arrived = {ARRIVED: line.values[file.time_key], **line.values}
                line = with_time(replace(line, values=arrived), time_s, file)
            spread.append(line)
    num_spread = int((sizes > 1).sum())
    return sorted(spread, key=lambda line: line.time_s or 0.0), (
        f"{file.name}: spread {_count(num_spread, 'packet')} of {size} readings, {interval_s:.3g} "
        f's apart, since the packet before each; "{ARRIVED}" keeps the time of the packet'
    )


def _ranks(packet: Sequence[Line], file: LineFile) -> list[int]:
    """Return the place of each line in a packet: readings of several sensors go together."""
    seen: Counter[str] = Counter()
    ranks: list[int] = []
    for line in packet:
        own = [name for name, spec in file.sensors.items() if _reading(line, spec) is not None]
        rank = max((seen[name] for name in own), default=-1)
        for name in own:
            seen[name] = rank + 1
        ranks.append(rank)
    last = max(ranks, default=0)
    return [last if rank < 0 else rank for rank in ranks]


def _has_conflict(same_time: Sequence[Line], file: LineFile) -> bool:
    """Return whether a sensor has different readings in some lines."""
    for spec in file.sensors.values():
        readings = [r for line in same_time if (r := _reading(line, spec)) is not None]
        if any(reading != readings[0] for reading in readings[1:]):
            return True
    return False


def join_repeats(lines: list[Line], *, file: LineFile) -> Repaired:
    """Join lines that repeat a reading: the first line, completed from the others, and all texts.

    If a sensor has different readings at some time, no lines are joined, as the times are wrong.
    Lines of different sensors at the same time are kept too.
    """
    joined: list[Line] = []
    groups = [[*g] for _, g in itertools.groupby(lines, key=lambda line: line.time_s)]
    if any(_has_conflict(same_time, file) for same_time in groups if len(same_time) > 1):
        return lines, None
    for same_time in groups:
        first: dict[str, int] = {}
        for line in same_time:
            own = [n for n, s in file.sensors.items() if same_time[1:] and _reading(line, s)]
            targets = {first[name] for name in own if name in first}
            target = targets.pop() if len(targets) == 1 else None
            merged = None
            if target is not None:
                merged = _merge(joined[target].values, line.values, file)
            if target is None or merged is None:
                target = len(joined)
                joined.append(line)
            elif merged != joined[target].values:
                joined[target] = replace(joined[target], values=merged, raw=None)
            for name in own:
                first.setdefault(name, target)
    num_repeats = len(lines) - len(joined)
    if not num_repeats:
        return lines, None
    return joined, f"{file.name}: joined {_count(num_repeats, 'repeated line')} with the first"


def fill_gaps(lines: list[Line], *, file: LineFile) -> Repaired:
    """Fill gaps in which single lines were lost with interpolated, marked lines.

    A gap is filled if it takes at least two median intervals and is short enough to interpolate,
    and if the lines on both sides contain readings.
    """
    sensors = [spec for spec in file.sensors.values() if spec.resample == "by_type"]
    recorded = [line for line in lines if not line.values.get(INTERPOLATED)]
    recorded_s = np.unique(times_of(recorded))
    if len(recorded_s) < 3 or not sensors:
        return lines, None
    interval_s = float(np.median(np.diff(recorded_s)))
    late_s = LATE_INTERVALS / max(spec.rate_hz for spec in sensors)
    limit_s = min(spec.gap_limit_s for spec in sensors) + EPSILON_S
    filled: list[Line] = [lines[0]]
    num_gaps = 0
    for before, after in itertools.pairwise(lines):
        gap_s = float(after.time_s or 0.0) - float(before.time_s or 0.0)
        if max(late_s, MIN_GAP_INTERVALS * interval_s) <= gap_s <= limit_s:
            new = _interpolate(
                before, after, round(gap_s / interval_s) - 1, file=file, sensors=sensors
            )
            num_gaps += bool(new)
            filled += new
        filled.append(after)
    num_new = len(filled) - len(lines)
    if not num_new:
        return lines, None
    sentence = f"filled {_count(num_gaps, 'gap')} with {_count(num_new, 'interpolated line')}"
    return filled, f'{file.name}: {sentence}, marked "{INTERPOLATED}": true'


def _interpolate(
    before: Line, after: Line, count: int, *, file: LineFile, sensors: Sequence[SensorStream]
) -> list[Line]:
    """Return `count` lines evenly between two; none if no sensor has readings in both."""
    ends = [(spec, _reading(before, spec), _reading(after, spec)) for spec in sensors]
    pairs = [(spec, low, high) for spec, low, high in ends if low is not None and high is not None]
    if not pairs or before.time_s is None or after.time_s is None:
        return []
    lines: list[Line] = []
    for k in range(1, count + 1):
        share = k / (count + 1)
        time_s = before.time_s + share * (after.time_s - before.time_s)
        line = with_time(Line(values={}, raw=None, time_s=0.0), time_s, file)
        for spec, low, high in pairs:
            values = np.empty(spec.size)
            for group, columns in zip(spec.values, spec.slices, strict=True):
                rules, shape = VALUE_TYPES[group.type], (1, -1, group.vector_size)
                clean = [rules.clean(np.array(v[columns]).reshape(shape)) for v in (low, high)]
                mixed = rules.mix(clean[0], clean[1], np.full((1, 1, 1), share))
                values[columns] = mixed.ravel()
            if np.isfinite(values).all():
                line = _with_reading(line, spec, values, None)
        line.values[INTERPOLATED] = True
        lines.append(line)
    return lines


def times_of(lines: Sequence[Line]) -> NDArray[np.float64]:
    """Return the times of lines, float64 [N]."""
    return np.array([line.time_s for line in lines], dtype=np.float64)


def _offset(sensors: Lines, media_stop_s: float | None) -> float:
    """Return the offset that the files of a session share; see shared.session.alignment."""
    times_s = [times_of(lines) for lines in sensors.values()]
    first_s, last_s = min(float(t[0]) for t in times_s), max(float(t[-1]) for t in times_s)
    return clock_offset(first_s, last_s, media_stop_s)


def _raw_times(lines: Sequence[Line], file: LineFile) -> NDArray[np.float64]:
    times = (raw_timestamp(line.values, file.time_key) for line in lines)
    return np.array([time for time in times if time is not None], dtype=np.float64)


def _divided(line: Line, divisor: float, file: LineFile) -> Line:
    time = raw_timestamp(line.values, file.time_key)
    if time is None:
        return line
    return with_time(line, time / divisor / file.units_per_s, file)


def with_time(line: Line, time_s: float, file: LineFile) -> Line:
    """Return a line at another time; a line without a usable time stays."""
    if line.time_s is None and file.time_key not in line.values:
        return line
    time = round(time_s * file.units_per_s, DECIMALS)
    values = {**line.values, file.time_key: time}
    return replace(line, values=values, raw=None, time_s=time / file.units_per_s)


def _merge(
    first: Mapping[str, Any], other: Mapping[str, Any], file: LineFile
) -> dict[str, Any] | None:
    """Complete the first line from the other one, and join their texts; None if they differ."""
    merged = {**other, **{k: v for k, v in first.items() if v is not None or k not in other}}
    for key, value in other.items():
        if value is None or merged[key] == value:
            continue
        texts = [text for text in (first.get(key), value) if isinstance(text, str)]
        if key not in file.text_keys or len(texts) < 2:
            return None
        merged[key] = " ".join(text for text in texts if text.strip())
    return merged


def _has_text(line: Line, file: LineFile) -> bool:
    return any(line.values.get(key) for key in file.text_keys)


def _reading(line: Line, spec: SensorStream) -> list[float] | None:
    """Return a reading of the right size with finite numbers only, else None."""
    values = (
        line.values.get(spec.key) if spec.key else [line.values.get(n) for n in spec.names or ()]
    )
    if spec.size == 1 and _is_number(values):
        values = [values]
    if not isinstance(values, list) or len(values) != spec.size:
        return None
    return values if all(_is_number(v) for v in values) else None


def _with_reading(
    line: Line,
    spec: SensorStream,
    values: NDArray[np.float64],
    is_changed: NDArray[np.bool_] | None,
) -> Line:
    """Return a line with another reading; values that did not change keep their form."""
    reading: list[Any] = values.tolist()
    old = _reading(line, spec)
    if old is not None and is_changed is not None:
        reading = [new if c else o for new, o, c in zip(reading, old, is_changed, strict=True)]
    if spec.key is None:
        changes = dict(zip(spec.names or (), reading, strict=True))
    else:
        is_list = isinstance(line.values.get(spec.key, []), list)
        changes = {spec.key: reading if is_list else reading[0]}
    return replace(line, values={**line.values, **changes}, raw=None)


def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < MAX_VALUE  # type: ignore[arg-type]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
