"""Collect what the lines of one file say: times, sensor readings, texts, and what is wrong.

:class:`LineCollector` takes JSON lines or blocks of table rows, in one pass over the file, and
gives each stream its own readings. A bad line is skipped, and a :class:`ParseIssue` describes it.
"""

from __future__ import annotations

import re
import reprlib
from array import array
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shared.session.names import closest
from shared.streams import METADATA_FILE, SensorStream, TextStream
from shared.values import clean_readings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from shared.session.names import UnusedName
    from shared.session.tables import TableBlock

MAX_TIME_S = 1e12
"""Larger timestamps can't be seconds; they may be nanoseconds since 1970."""

MAX_VALUE = 3e38
"""Larger sensor values don't fit float32."""

MAX_ISSUES = 1000
"""Issues of one kind, key and file that are listed; the last one counts the others."""

MAX_KEYS = 200
"""Keys of a file, about, that are compared with the declared ones."""

INTERPOLATED = "interpolated"
"""Key that marks a line that a repair filled into a gap."""

ARRIVED = "arrived"
"""Key that keeps the timestamp of a line of a packet that a repair spread."""

TIME_KEY = "timestamp"
"""Key of the timestamps of a stream that declares no other."""

IssueKind = Literal[
    "file", "empty", "encoding", "form", "json", "row", "long", "timestamp", "order", "repeat",
    "conflict", "column", "size", "number", "stream", "text",
]  # fmt: skip
"""``repeat`` and ``conflict``: a sensor has an equal, or another, reading at the same time."""

_NO_CAUSES = frozenset(["encoding", "form"])
"""Kinds of issues that leave nothing out."""

_TIME_NAME = re.compile(
    r"(?i)ts?([ _(\[]*(100n|n|u|m)?s\W?)?|m?s|sec.*|.*(time|stamp|date|epoch).*"
)
"""Names of keys that probably hold timestamps."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)

_CLEANED_ROWS = 1 << 14


@dataclass(frozen=True, slots=True)
class ParseIssue:
    """Something in a file that can't be used as it is."""

    file: str
    line: int
    """1-based, the row of a Parquet file; 0 means the whole file."""
    kind: IssueKind
    message: str
    key: str = ""
    """Key or column whose value is at fault; empty if the whole line is."""
    stream: str = ""
    """Name of the stream that lacks the value; empty if it concerns several."""
    back_s: float = 0.0
    """For ``order``: seconds by which the timestamp is earlier than the one before it."""
    fix: str = ""
    """How to correct it; empty if that depends on the program."""
    count: int = 1
    """Number of such issues, of which this is the last one listed."""

    @property
    def source_line(self) -> str:
        """File and line, for messages."""
        return _source_line(self.file, self.line)

    @property
    def sentence(self) -> str:
        """What is wrong, and where; and the fix, if the issue has one."""
        return f"{self.source_line}: {self.message}" + (self.fix and f"; fix: {self.fix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How a file is read whose timestamps can't be taken as they are."""

    units_per_s: float | None = None
    """Divides the timestamps instead of the declared unit."""
    left_out: tuple[tuple[int, int], ...] = ()
    """First and last of each range of lines that are skipped without an issue."""


@dataclass(frozen=True, slots=True)
class TextEvent:
    """A text that begins at a time on the recorder's clock."""

    time_s: float
    text: str
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)

    @property
    def source_line(self) -> str:
        """File and line, for messages."""
        return _source_line(self.file, self.line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Usable readings of a sensor stream at increasing times.

    Shapes: times_s float64 [N], values float32 [N, D], lines int64 [N] (see ParseIssue.line).
    """

    times_s: NDArray[np.float64]
    values: NDArray[np.float32]
    lines: NDArray[np.int64]
    lost_times_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Times of readings that are lost, as another one has the same time; with their lines."""
    lost_lines: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLines:
    """Lines of a file that have a usable time, sorted by it.

    Of lines with equal times the first is listed, except in a file of texts. A file whose streams
    have several time keys gives one of these per key.

    Shapes: times_s float64 [N], lines int64 [N] (see ParseIssue.line).
    """

    file: str
    time_key: str
    streams: tuple[str, ...]
    """Names of the streams that take their times from these lines."""
    times_s: NDArray[np.float64]
    lines: NDArray[np.int64]
    num_lines: int
    """Lines that are not blank, skipped ones included."""
    num_unread: int
    """Lines that are skipped as a whole."""
    issues: tuple[ParseIssue, ...]
    """Issues by line; those of the whole file are with its first time key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLines:
    """Everything of a session that has timestamps, on the recorder's clock."""

    readings: Mapping[str, Readings]
    """Readings of each sensor stream, also if it has none."""
    events: Mapping[str, tuple[TextEvent, ...]]
    """Events of each text stream in order of time."""
    files: tuple[FileLines, ...]
    """Lines of each file that exists."""
    unused: tuple[UnusedName, ...] = ()
    """Keys that no stream of those that were read uses."""

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        """First and last time of each file that has one."""
        spans: dict[str, tuple[float, float]] = {}
        for lines in self.files:
            if len(lines.times_s):
                first_s, last_s = float(lines.times_s[0]), float(lines.times_s[-1])
                known = spans.get(lines.file, (first_s, last_s))
                spans[lines.file] = (min(first_s, known[0]), max(last_s, known[1]))
        return spans

    @property
    def issues(self) -> tuple[ParseIssue, ...]:
        """Issues of all files."""
        return tuple(issue for lines in self.files for issue in lines.issues)

    def find_cause(self, name: str, file: str) -> ParseIssue | None:
        """Return the issue that leaves a stream without readings or events, if there is one.

        Issues of its whole file count, and if the file has no times, all of them.
        """
        has_times = file in self.spans
        for issue in self.issues:
            counts = issue.kind in ("file", "column") or not has_times
            counts = counts and issue.kind not in _NO_CAUSES
            if issue.stream == name or (issue.file == file and not issue.stream and counts):
                return issue
        return None


def parse_timestamp(
    values: Mapping[str, Any], *, key: str = TIME_KEY, units_per_s: float = 1.0
) -> float | None:
    """Return the timestamp of a line in seconds, or None if it isn't a usable number."""
    value = values.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        time_s = value / units_per_s
    except OverflowError:  # an integer of more than 308 digits
        return None
    return float(time_s) if abs(time_s) < MAX_TIME_S else None


class IssueList:
    """Collects issues of one file; of many alike, the last one listed counts the others."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.num_unread = 0
        """Lines that are skipped as a whole."""
        self._issues: list[ParseIssue] = []
        self._alike: dict[tuple[str, str, str], tuple[int, int]] = {}
        """Of each kind, key and stream: number of issues, and index of the last one listed."""

    def add(
        self, line: int, kind: IssueKind, message: str, *, key: str = "", stream: str = "",
        back_s: float = 0.0, fix: str = "",
    ) -> None:  # fmt: skip
        """Add an issue; the arguments are the fields of :class:`ParseIssue`."""
        self.num_unread += kind in ("json", "row", "long", "timestamp")
        number, index = self._alike.get((kind, key, stream), (0, 0))
        if number < MAX_ISSUES:
            index = len(self._issues)
            issue = ParseIssue(self.file, line, kind, message, key, stream, back_s, fix)
            self._issues.append(issue)
        self._alike[kind, key, stream] = (number + 1, index)

    def as_tuple(self) -> tuple[ParseIssue, ...]:
        """Return the issues in order of lines."""
        issues = list(self._issues)
        for number, index in self._alike.values():
            issues[index] = replace(issues[index], count=max(1, number - MAX_ISSUES + 1))
        return tuple(sorted(issues, key=lambda issue: issue.line))


class LineCollector:
    """Collects the streams of a file that share a time key.

    Arrays hold an hour at 90 Hz in 40 MB; lists take 300 MB. `units_per_s` divides the timestamps.
    Lines in the ranges `left_out` are skipped. Lines may lack the time if others `of_file`, which
    are all streams of the file, have another.
    """

    def __init__(
        self,
        file: str,
        time_key: str,
        streams: Mapping[str, SensorStream | TextStream],
        *,
        units_per_s: float,
        left_out: Sequence[tuple[int, int]] = (),
        of_file: Mapping[str, SensorStream | TextStream],
    ) -> None:
        self.file, self.time_key, self.units_per_s = file, time_key, units_per_s
        self.left_out = left_out
        self.is_optional = len(of_file) > len(streams)
        self.sensors = {n: s for n, s in streams.items() if isinstance(s, SensorStream)}
        self.texts = {n: s for n, s in streams.items() if isinstance(s, TextStream)}
        texts = {n: s for n, s in of_file.items() if isinstance(s, TextStream)}
        self.is_text_file = len(texts) == len(of_file) and file != METADATA_FILE
        """Whether every line must be a text."""
        self.has_texts_only = not self.sensors and (self.is_optional or self.is_text_file)
        """Whether lines without a text count for nothing here."""
        self.labels = {text.stream for text in texts.values()}
        """Labels of texts that the file can hold; None means all."""
        self.checks_labels = bool(self.texts) and next(iter(texts)) in self.texts
        """Whether labels that no stream declares are reported here: once per file."""
        self.issues = IssueList(file)
        self.keys: set[str] = set()
        """Keys of the lines; columns of a sensor count as its key."""
        self.times, self.numbers = array("d"), array("q")
        self.rows = {name: array("q") for name in self.sensors}
        """Of each sensor, the indices in `times` of its readings."""
        self.values = {name: array("f") for name in self.sensors}
        self.events: dict[str, list[TextEvent]] = {name: [] for name in self.texts}

    def add_line(self, number: int, values: dict[str, Any]) -> None:
        """Take the time, readings and texts of a JSON line."""
        if len(self.keys) < MAX_KEYS:
            self.keys.update(values)
        if any(first <= number <= last for first, last in self.left_out):
            return
        time_s = parse_timestamp(values, key=self.time_key, units_per_s=self.units_per_s)
        text_keys = self._text_keys(values)
        if time_s is None:
            keys = {key for s in self.sensors.values() for key in json_keys(s)}
            is_needed = self.time_key in values or not keys.isdisjoint(values)
            if not self.is_optional or is_needed or any(map(values.get, text_keys.values())):
                self._add_time_issue(number, values)
                return
        self._check_label(number, values)
        if time_s is None:
            return
        row = len(self.times)
        for name, stream in self.sensors.items():
            reading = self._parse_reading(number, values, name, stream)
            if reading is not None:
                self.rows[name].append(row)
                self.values[name].extend(reading)
        has_text = self._add_texts(number, values, text_keys, time_s)
        if has_text or not self.has_texts_only:
            self.times.append(time_s)
            self.numbers.append(number)

    def add_block(self, block: TableBlock, columns: Mapping[str, Sequence[str]]) -> None:
        """Take the times and readings of table rows; `columns` are the columns of each stream."""
        raw_times = block.cells[self.time_key][:, 0]
        times_s = raw_times / self.units_per_s
        is_kept = np.ones(len(times_s), dtype=np.bool_)
        for first_line, last_line in self.left_out:
            is_kept &= (block.lines < first_line) | (block.lines > last_line)
        is_timed = (np.abs(times_s) < MAX_TIME_S) & is_kept
        is_missing = np.isnan(times_s)
        for name, own in columns.items():
            values = np.hstack([block.cells[column] for column in own])
            is_empty = np.isnan(values).all(axis=1)
            is_missing &= is_empty
            is_read = is_timed & ~is_empty
            rows = (np.cumsum(is_timed) - 1 + len(self.times))[is_read]
            self.rows[name].frombytes(rows.astype(np.int64).tobytes())
            with np.errstate(over="ignore"):  # what does not fit float32 is reported as infinite
                self.values[name].frombytes(values[is_read].astype(np.float32).tobytes())
        is_unread = ~is_timed & is_kept & ~(is_missing & self.is_optional)
        for row in np.flatnonzero(is_unread):
            value = raw_times[row]
            text = f"{value:g}" if np.isfinite(value) else "no number"
            message = f"{self.time_key} is {text}, not a usable number of seconds"
            self.issues.add(int(block.lines[row]), "timestamp", message, key=self.time_key)
        self.times.frombytes(times_s[is_timed].tobytes())
        self.numbers.frombytes(block.lines[is_timed].tobytes())
        for issue in block.issues:
            for name in (n for n, s in self.sensors.items() if s.key == issue.column):
                message = wrong_size(issue.message, name, self.sensors[name])
                self.issues.add(issue.line, "size", message, key=issue.column, stream=name)

    def _add_time_issue(self, number: int, values: Mapping[str, Any]) -> None:
        """Report a JSON line without usable timestamp."""
        value, fix = values.get(self.time_key), ""
        message = f"{self.time_key} is {reprlib.repr(value)}, not a usable number of seconds"
        if self.time_key not in values:
            message = f"no {self.time_key}"
            for name in (n for n, v in values.items() if _TIME_NAME.fullmatch(n) and _is_time(v)):
                streams = ", ".join(self.sensors or self.texts)
                message += f", but {reprlib.repr(name)}"
                fix = f"set `time: {name}` of {streams} in the recipe"
                break
        elif isinstance(value, str) and _is_time(value):
            message = f"{self.time_key} is the text {reprlib.repr(value)}, not a number"
            fix = "write numbers without quotes"
        elif isinstance(value, str):
            fix = "write seconds as a number"
        is_table = isinstance(value, list) or (len(values) == 1 and _is_table(*values.values()))
        fix = "write the values of each time as an object on a line of its own" if is_table else fix
        self.issues.add(number, "timestamp", message, key=self.time_key, fix=fix)

    def _text_keys(self, values: dict[str, Any]) -> dict[str, str]:
        """Return the text streams that a JSON line can belong to, and the key of their texts."""
        if self.file == METADATA_FILE:
            return {name: text.metadata_key or "text" for name, text in self.texts.items()}
        label = values.get("stream")
        own = (None,) if label is None else (None, str(label))
        return {name: "text" for name, text in self.texts.items() if text.stream in own}

    def _check_label(self, number: int, values: dict[str, Any]) -> None:
        """Report a JSON line whose label belongs to no text stream of the file."""
        label = values.get("stream")
        is_labeled = self.is_text_file or label is not None
        if not self.checks_labels or self.file == METADATA_FILE or not is_labeled:
            return
        if None in self.labels or (label is not None and str(label) in self.labels):
            return
        declared = sorted(map(str, self.labels))
        meant = closest(str(label), declared)
        message = (
            f"stream is {reprlib.repr(label)}, the recipe declares {', '.join(declared)}; "
            f"{f'did you mean {meant}? ' if meant else ''}fix: correct it, or declare a text "
            "stream of it"
        )
        self.issues.add(number, "stream", message, key="stream")

    def _add_texts(
        self, number: int, values: dict[str, Any], keys: Mapping[str, str], time_s: float
    ) -> bool:
        """Take the texts of a JSON line; return whether there is one."""
        has_text = False
        for name, key in keys.items():
            text, message = _parse_text(values, key)
            if text is not None:
                self.events[name].append(TextEvent(time_s, text, self.file, number))
                has_text = True
            elif message or self.is_text_file:
                message = message or f"no {key}"
                self.issues.add(number, "text", message, key=key, stream=name)
        return has_text

    def _parse_reading(
        self, number: int, values: dict[str, Any], name: str, stream: SensorStream
    ) -> array[float] | None:
        """Return the reading of a JSON line, or None; one of another form becomes an issue."""
        keys = json_keys(stream)
        numbers = values.get(keys[0]) if stream.key else [values.get(key) for key in keys]
        key = keys[0]
        if numbers is None:
            return None
        if stream.size == 1 and isinstance(numbers, (int, float)):
            numbers = [numbers]
        if not isinstance(numbers, list):
            self.issues.add(number, "number", f"{key} is not a list", key=key, stream=name)
            return None
        if len(numbers) != stream.size:
            message = wrong_size(f"{key} has {len(numbers)} values", name, stream)
            self.issues.add(number, "size", message, key=key, stream=name)
            return None
        try:
            return array("f", numbers)  # values that are not finite are reported later
        except (TypeError, OverflowError):
            if any(value is not None for value in numbers):
                message = f"{key} contains a value that is not a finite number"
                self.issues.add(number, "number", message, key=key, stream=name)
            return None

    @property
    def has_lines(self) -> bool:
        """Whether lines of the file count: not if texts share a file that holds none of them."""
        return bool(self.sensors or self.times) or not self.is_optional

    def finish(self, *, num_lines: int, is_cleaned: bool) -> tuple[FileLines, dict[str, Readings]]:
        """Sort everything by time, and return the lines and the usable readings."""
        times_s, numbers = np.asarray(self.times), np.asarray(self.numbers)
        order = self._sorted_order(times_s, numbers)
        is_sorted = bool((np.diff(order) == 1).all())
        repeats: dict[int, dict[bool, list[str]]] = {}
        readings = {}
        for name, stream in self.sensors.items():
            rows, values = self._usable_readings(name, numbers, is_cleaned=is_cleaned)
            if not is_sorted:
                by_time = np.argsort(times_s[rows], kind="stable")
                rows, values = rows[by_time], values[by_time]
            is_repeat, is_equal = _find_repeats(times_s[rows], values, stream)
            if is_repeat.any():
                for row, equal in zip(rows[is_repeat].tolist(), is_equal[is_repeat], strict=True):
                    repeats.setdefault(row, {}).setdefault(bool(equal), []).append(name)
            lost = rows[is_repeat & ~is_equal]
            rows, values = rows[~is_repeat], values[~is_repeat]
            readings[name] = Readings(
                times_s=times_s[rows],
                values=values,
                lines=numbers[rows],
                lost_times_s=times_s[lost],
                lost_lines=numbers[lost],
            )
        for row, alike in sorted(repeats.items()):
            kind: IssueKind = "repeat"
            names, which = alike.get(True, []), "the same reading"
            if False in alike:
                kind, names, which = "conflict", alike[False], "another reading"
            of_which = f" of {', '.join(names)}" if len(names) < len(self.sensors) else ""
            message = f"{self.time_key} {times_s[row]:.12g} occurs again with {which}{of_which}"
            message += "; the first is used" if kind == "conflict" else ""
            self.issues.add(int(numbers[row]), kind, message, key=self.time_key)
        if not self.is_text_file:
            order = order[np.diff(times_s[order], prepend=-np.inf) > 0]
        is_whole = is_sorted and len(order) == len(times_s)
        lines = FileLines(
            file=self.file,
            time_key=self.time_key,
            streams=(*self.sensors, *self.texts),
            times_s=times_s if is_whole else times_s[order],
            lines=numbers if is_whole else numbers[order],
            num_lines=num_lines,
            num_unread=self.issues.num_unread,
            issues=self.issues.as_tuple(),
        )
        return lines, readings

    def _usable_readings(
        self, name: str, numbers: NDArray[np.int64], *, is_cleaned: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the rows and values of usable readings; others become issues, unless empty."""
        stream = self.sensors[name]
        rows = np.asarray(self.rows[name])
        values = np.asarray(self.values[name]).reshape(-1, stream.size)
        is_usable = np.ones(len(values), dtype=np.bool_)
        for start in range(0, len(values), _CLEANED_ROWS):  # in parts, which need less memory
            part = slice(start, start + _CLEANED_ROWS)
            is_finite = np.abs(values[part]) < MAX_VALUE
            is_usable[part] = is_finite.all(axis=1)
            is_clean = is_usable[part]
            is_bad = ~is_clean & ~np.isnan(values[part]).all(axis=1)
            if is_cleaned:
                values[part], is_clean = clean_readings(values[part], stream)
            for row in np.flatnonzero(is_bad | (is_usable[part] & ~is_clean)):
                key, fault = stream.key or name, "a quaternion or direction of almost no length"
                if is_bad[row]:
                    key = stream.key or (stream.names or ())[int(np.argmin(is_finite[row]))]
                    fault = "a value that is not a finite number"
                line = int(numbers[rows[start + row]])
                self.issues.add(line, "number", f"{key} contains {fault}", key=key, stream=name)
            is_usable[part] &= is_clean
        if is_usable.all():
            return rows, values
        return rows[is_usable], values[is_usable]

    def _sorted_order(
        self, times_s: NDArray[np.float64], lines: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the indices of the lines by time; lines out of order become issues."""
        order = np.argsort(times_s, kind="stable")
        if self.has_texts_only:
            return order
        steps = np.diff(times_s)
        for i in np.flatnonzero(steps < 0):
            message = f"{self.time_key} {times_s[i + 1]:g} is before the line above"
            self.issues.add(
                int(lines[i + 1]), "order", message, key=self.time_key, back_s=float(-steps[i])
            )
        return order


def _find_repeats(
    times_s: NDArray[np.float64], values: NDArray[np.float32], stream: SensorStream
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Mark the readings of a sensor, sorted by time, that follow a usable one of the same time.

    The second mask marks those that are equal to the usable one.
    """
    is_repeat = np.diff(times_s, prepend=-np.inf) <= 0
    is_equal = np.zeros(len(times_s), dtype=np.bool_)
    if is_repeat.any():
        rows = np.flatnonzero(clean_readings(values, stream)[1])
        is_later = np.diff(times_s[rows], prepend=-np.inf) <= 0
        first = rows[np.maximum.accumulate(np.where(is_later, 0, np.arange(len(rows))))]
        is_repeat[:] = False
        is_repeat[rows] = is_later
        is_equal[rows] = (values[rows] == values[first]).all(axis=1)
    return is_repeat, is_equal


def json_keys(stream: SensorStream) -> tuple[str, ...]:
    """Return the keys of a line that hold the values of a sensor."""
    return (stream.key,) if stream.key else (stream.names or ())


def keys_of(file: str, stream: SensorStream | TextStream) -> tuple[str, ...]:
    """Return the keys of a file's lines, or of its columns, that a stream can use."""
    if isinstance(stream, SensorStream):
        return (stream.time, *json_keys(stream))
    if file == METADATA_FILE:
        return (stream.time, stream.metadata_key or "text")
    return (stream.time, "text", *(("stream",) if stream.stream else ()))


def wrong_size(fault: str, name: str, stream: SensorStream) -> str:
    """Complete the message about another number of values than declared."""
    return (
        f"{fault}, the recipe declares {stream.size}; fix: correct the counts of "
        f"streams.{name}.values"
    )


def parse_number(text: str) -> float | None:
    """Return the number that a text holds, of a date the seconds since 1970; None if it is none."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    return date.replace(tzinfo=date.tzinfo or UTC).timestamp()


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_time(value: object) -> bool:
    if isinstance(value, str):
        return parse_number(value.replace(",", ".")) is not None
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse_text(values: Mapping[str, Any], key: str) -> tuple[str | None, str]:
    """Return a text that isn't blank, or None and what is wrong with it, if anything is."""
    text = values.get(key)
    if text is None or text == "":
        return None, ""
    if not isinstance(text, str):
        return None, f"{key} is not a string"
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, f"{key} contains half a character (a surrogate)"
    return (text if text.strip() else None), ""


def _source_line(file: str, line: int) -> str:
    if line == 0:
        return file
    return f"{file} {'row' if file.endswith('.parquet') else 'line'} {line}"
