"""Read a session folder: which files it has, and everything in them that has timestamps.

Sensor readings and texts come from keys of ``metadata.jsonl`` and from files of their own. Each
file is read once, whatever the number of streams in it, and each stream keeps its own readings.
All times stay on the recorder's clock, in seconds.

Reading never stops at a bad line. A bad line is skipped, and a :class:`ParseIssue` describes it.
Validation prints the issues; the shard job writes them to ``rejected.jsonl``.
"""

from __future__ import annotations

import errno
import json
import reprlib
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from shared.errors import SessionError
from shared.recipe import Recipe
from shared.session.tables import MAX_LINE_BYTES, TableError, choose_columns, open_table
from shared.streams import METADATA_FILE, Kind, SensorStream, TextStream
from shared.values import clean_readings

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from shared.session.tables import Table, TableBlock
    from shared.streams import StreamSpec

SESSION_INFO_FILE = "session.json"

MAX_TIME_S = 1e12
"""Larger timestamps can't be seconds; they may be nanoseconds since 1970."""

MAX_VALUE = 3e38
"""Larger sensor values don't fit float32."""

MAX_ISSUES = 1000
"""Issues of one kind, key and file that are listed; the last one counts the others."""

TIME_KEY = "timestamp"
"""Key of the timestamps of texts."""

IssueKind = Literal[
    "file", "json", "row", "long", "timestamp", "order", "duplicate", "column", "size", "number",
    "stream", "text",
]  # fmt: skip

UNREAD_KINDS = frozenset(["json", "row", "long", "timestamp"])
"""Kinds of issues for which a whole line is skipped."""


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
    count: int = 1
    """Number of such issues, of which this is the last one listed."""

    @property
    def source_line(self) -> str:
        """File and line, for messages."""
        return _source_line(self.file, self.line)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLines:
    """Lines of a file that have a usable time, sorted by it.

    Of lines with equal times the first is kept, except in a file of texts. A file whose streams
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


def files_of_stream(spec: StreamSpec) -> tuple[str, ...]:
    """Return the names of the files that can hold a stream."""
    if isinstance(spec, TextStream) and spec.metadata_key and spec.file != METADATA_FILE:
        return (spec.file, METADATA_FILE)
    return (spec.file,)


def source_files(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the files that samples are made of, sorted; others are ignored."""
    return tuple(sorted({file for s in recipe.streams.values() for file in files_of_stream(s)}))


def scanned_files(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the files that a scan reads; of ``session.json``, only ``start_s``."""
    return (*source_files(recipe), SESSION_INFO_FILE)


def find_sessions(root: Path | str, recipe: Recipe | None = None) -> list[Path]:
    """List the session folders below `root` (or `root` itself), sorted by name.

    A session folder holds at least one of the source files.

    Args:
        root: the folder.
        recipe: names the source files; None means the default recipe.

    Raises:
        SessionError: the folder doesn't exist or holds no session.
    """
    recipe = Recipe() if recipe is None else recipe
    root = Path(root)
    if root.name in ("", ".."):
        root = root.resolve()  # a session is named after its folder
    if not root.is_dir():
        raise SessionError(
            f"{root}: no such folder; fix: give a session folder or a folder of session folders"
        )
    if is_session(root, recipe):
        return [root]
    sessions = sorted(
        (p for p in root.iterdir() if not p.name.startswith(".") and is_session(p, recipe)),
        key=lambda p: p.name,
    )
    if not sessions:
        raise SessionError(
            f"{root}: no session in it; fix: give a folder of session folders, each with at least "
            f"one of {', '.join(source_files(recipe))}"
        )
    return sessions


def is_session(path: Path, recipe: Recipe) -> bool:
    """Check whether a folder holds at least one source file."""
    return any((path / name).exists() for name in source_files(recipe))


def read_timed_lines(
    path: Path,
    recipe: Recipe,
    *,
    units_per_s: Mapping[str, float] | None = None,
    is_cleaned: bool = True,
) -> SessionLines:
    """Read everything of a session that has timestamps.

    Args:
        path: the session folder.
        recipe: declares the streams.
        units_per_s: divisors of the timestamps by file, instead of those of the recipe.
        is_cleaned: whether values are cleaned (:func:`shared.values.clean_readings`); readings that
            can't be are left out. Else they are as recorded, and finite.
    """
    return _read_streams(
        path, _timed_streams(recipe), units_per_s=units_per_s or {}, is_cleaned=is_cleaned
    )


def read_readings(path: Path, recipe: Recipe, names: Collection[str]) -> dict[str, Readings]:
    """Read the same readings as :func:`read_timed_lines`, of some sensor streams only."""
    streams = {name: recipe.streams[name] for name in names}
    return dict(_read_streams(path, streams).readings)


def read_text_events(
    path: Path, recipe: Recipe, names: Collection[str]
) -> dict[str, tuple[TextEvent, ...]]:
    """Read the same events as :func:`read_timed_lines`, of some text streams only.

    Lines of ``metadata.jsonl`` without text are not parsed.
    """
    streams = {name: recipe.streams[name] for name in names}
    return dict(_read_streams(path, streams, is_only_events=True).events)


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """Parse a line into its JSON object, or None and the reason why it has none."""
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        is_cut = not raw.endswith(b"\n")
        return None, "the last line is cut off" if is_cut else "not JSON"
    return (values, "") if isinstance(values, dict) else (None, "not a JSON object")


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


# --- one file, in one pass ---


class _IssueList:
    """Collects the issues of one file; of many alike, the last one listed counts the others."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.num_unread = 0
        self._issues: list[ParseIssue] = []
        self._counts: dict[tuple[str, str, str], int] = {}
        self._last: dict[tuple[str, str, str], int] = {}

    def add(  # one argument per field of the issue
        self, line: int, kind: IssueKind, message: str, *, key: str = "", stream: str = "",
        back_s: float = 0.0,
    ) -> None:  # fmt: skip
        alike = (kind, key, stream)
        self.num_unread += kind in UNREAD_KINDS
        self._counts[alike] = self._counts.get(alike, 0) + 1
        if self._counts[alike] <= MAX_ISSUES:
            self._last[alike] = len(self._issues)
            issue = ParseIssue(self.file, line, kind, message, key, stream, back_s)
            self._issues.append(issue)

    def as_tuple(self) -> tuple[ParseIssue, ...]:
        issues = list(self._issues)
        for alike, index in self._last.items():
            extra = max(0, self._counts[alike] - MAX_ISSUES)
            issues[index] = replace(issues[index], count=1 + extra)
        return tuple(sorted(issues, key=lambda issue: issue.line))


class _Timeline:
    """Collects the streams of a file that share a time key.

    Arrays hold an hour at 90 Hz in 40 MB; lists take 300 MB.

    Args:
        file: name of the file.
        time_key: key or column of the timestamps.
        units_per_s: divides the timestamps.
    """

    def __init__(self, file: str, time_key: str, units_per_s: float) -> None:
        self.file, self.time_key, self.units_per_s = file, time_key, units_per_s
        self.sensors: dict[str, SensorStream] = {}
        self.texts: dict[str, TextStream] = {}
        self.is_optional = False
        """Whether lines may lack the time, because streams with another time key share the file."""
        self.issues = _IssueList(file)
        self.times, self.numbers = array("d"), array("q")
        self.rows: dict[str, array[int]] = {}
        """Of each sensor, the indices in `times` of its readings."""
        self.values: dict[str, array[float]] = {}
        self.events: dict[str, list[TextEvent]] = {}

    def add_stream(self, name: str, stream: SensorStream | TextStream) -> None:
        if isinstance(stream, SensorStream):
            self.sensors[name], self.rows[name] = stream, array("q")
            self.values[name] = array("f")
        else:
            self.texts[name], self.events[name] = stream, []

    @property
    def is_text_file(self) -> bool:
        """Whether every line must be a text."""
        return not self.sensors and self.file != METADATA_FILE

    def add_line(self, number: int, values: dict[str, Any]) -> None:
        """Take the time, readings and texts of a JSON line."""
        time_s = parse_timestamp(values, key=self.time_key, units_per_s=self.units_per_s)
        if time_s is None:
            keys = {key for s in self.sensors.values() for key in _json_keys(s)}
            if not self.is_optional or self.time_key in values or not keys.isdisjoint(values):
                value = reprlib.repr(values.get(self.time_key))
                message = f"{self.time_key} is {value}, not a usable number of seconds"
                self.issues.add(number, "timestamp", message, key=self.time_key)
            return
        row = len(self.times)
        for name, stream in self.sensors.items():
            reading = self._parse_reading(number, values, name, stream)
            if reading is not None:
                self.rows[name].append(row)
                self.values[name].extend(reading)
        has_text = bool(self.texts) and self._add_texts(number, values, time_s)
        if has_text or not self.is_text_file:
            self.times.append(time_s)
            self.numbers.append(number)

    def add_block(self, block: TableBlock, columns: Mapping[str, Sequence[int]]) -> None:
        """Take the times and readings of table rows.

        Args:
            block: the rows.
            columns: columns of the cells by name of the stream; the time's has the empty name.
        """
        times_s = block.cells[:, columns[""][0]] / self.units_per_s
        is_timed = np.abs(times_s) < MAX_TIME_S
        is_missing = np.isnan(times_s)
        for name in columns.keys() & self.sensors.keys():
            values = block.cells[:, columns[name]]
            is_empty = np.isnan(values).all(axis=1)
            is_missing &= is_empty
            is_read = is_timed & ~is_empty
            rows = (np.cumsum(is_timed) - 1 + len(self.times))[is_read]
            self.rows[name].frombytes(rows.astype(np.int64).tobytes())
            with np.errstate(over="ignore"):  # what does not fit float32 is reported as infinite
                self.values[name].frombytes(values[is_read].astype(np.float32).tobytes())
        is_unread = ~is_timed & ~(is_missing & self.is_optional)
        for row in np.flatnonzero(is_unread):
            value = block.cells[row, columns[""][0]]
            text = f"{value:g}" if np.isfinite(value) else "no number"
            message = f"{self.time_key} is {text}, not a usable number of seconds"
            self.issues.add(int(block.lines[row]), "timestamp", message, key=self.time_key)
        self.times.frombytes(times_s[is_timed].tobytes())
        self.numbers.frombytes(block.lines[is_timed].tobytes())

    def _add_texts(self, number: int, values: dict[str, Any], time_s: float) -> bool:
        """Take the texts of a JSON line; return whether there is one."""
        if self.file == METADATA_FILE:
            keys = {name: text.metadata_key or "text" for name, text in self.texts.items()}
        else:
            label = values.get("stream")
            keys = {
                name: "text"
                for name, text in self.texts.items()
                if text.stream is None or (label is not None and text.stream == str(label))
            }
            if not keys and (self.is_text_file or label is not None):
                declared = ", ".join(sorted({str(text.stream) for text in self.texts.values()}))
                message = (
                    f"stream is {reprlib.repr(label)}, the recipe declares {declared}; "
                    "fix: correct it, or declare a text stream of it"
                )
                self.issues.add(number, "stream", message, key="stream")
                return False
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
        keys = _json_keys(stream)
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
            message = _wrong_size(f"{key} has {len(numbers)} values", name, stream)
            self.issues.add(number, "size", message, key=key, stream=name)
            return None
        try:
            return array("f", numbers)  # values that are not finite are reported later
        except (TypeError, OverflowError):
            if any(value is not None for value in numbers):
                message = f"{key} contains a value that is not a finite number"
                self.issues.add(number, "number", message, key=key, stream=name)
            return None

    def finish(self, *, num_lines: int, is_cleaned: bool) -> tuple[FileLines, dict[str, Readings]]:
        """Sort everything by time, and return the lines and the usable readings."""
        times_s, numbers = np.asarray(self.times), np.asarray(self.numbers)
        order = self._increasing_order(times_s, numbers)
        is_sorted = len(order) == len(times_s) and bool((np.diff(order) == 1).all())
        position = np.full(len(times_s), -1)
        position[order] = np.arange(len(order))
        readings = {}
        for name, stream in self.sensors.items():
            rows = np.asarray(self.rows[name])
            values = np.asarray(self.values[name]).reshape(-1, stream.size)
            is_usable = self._find_usable(name, values, numbers[rows])
            if not is_usable.all():
                rows, values = rows[is_usable], values[is_usable]
            if is_cleaned:
                values, is_usable = self._clean(name, values, numbers[rows])
                if not is_usable.all():
                    rows, values = rows[is_usable], values[is_usable]
            if not is_sorted:
                kept = np.flatnonzero(position[rows] >= 0)
                kept = kept[np.argsort(position[rows[kept]])]
                rows, values = rows[kept], values[kept]
            readings[name] = Readings(times_s=times_s[rows], values=values, lines=numbers[rows])
        lines = FileLines(
            file=self.file,
            time_key=self.time_key,
            streams=(*self.sensors, *self.texts),
            times_s=times_s if is_sorted else times_s[order],
            lines=numbers if is_sorted else numbers[order],
            num_lines=num_lines,
            num_unread=self.issues.num_unread,
            issues=self.issues.as_tuple(),
        )
        return lines, readings

    def _find_usable(
        self, name: str, values: NDArray[np.float32], lines: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Mark the readings that are finite; those that are partly so become issues."""
        is_finite = np.abs(values) < MAX_VALUE
        is_usable = is_finite.all(axis=1)
        for row in np.flatnonzero(~is_usable & ~np.isnan(values).all(axis=1)):
            key = _key_of_value(self.sensors[name], int(np.argmin(is_finite[row])))
            message = f"{key} contains a value that is not a finite number"
            self.issues.add(int(lines[row]), "number", message, key=key, stream=name)
        return np.asarray(is_usable)

    def _clean(
        self, name: str, values: NDArray[np.float32], lines: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Clean finite readings, and mark the usable ones; others become issues."""
        stream = self.sensors[name]
        cleaned, is_usable = clean_readings(values, stream)
        for row in np.flatnonzero(~is_usable):
            key = _key_of_value(stream, 0)
            message = f"{key} contains a quaternion or direction of almost no length"
            self.issues.add(int(lines[row]), "number", message, key=key, stream=name)
        return cleaned, is_usable

    def _increasing_order(
        self, times_s: NDArray[np.float64], lines: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Sort the lines by time and keep the first of equal times; return their indices."""
        order = np.argsort(times_s, kind="stable")
        if self.is_text_file:
            return order
        steps = np.diff(times_s)
        for i in np.flatnonzero(steps < 0):
            message = f"{self.time_key} {times_s[i + 1]:g} is before the line above"
            self.issues.add(
                int(lines[i + 1]), "order", message, key=self.time_key, back_s=float(-steps[i])
            )
        is_repeat = np.diff(times_s[order], prepend=-np.inf) <= 0
        for i in order[is_repeat]:
            message = f"{self.time_key} {times_s[i]:g} occurs twice"
            self.issues.add(int(lines[i]), "duplicate", message, key=self.time_key)
        return np.asarray(order[~is_repeat])


def _timed_streams(recipe: Recipe) -> dict[str, StreamSpec]:
    return {name: recipe.streams[name] for name in recipe.of_kind(Kind.SENSOR, Kind.TEXT)}


def _read_streams(
    path: Path,
    streams: Mapping[str, StreamSpec],
    *,
    units_per_s: Mapping[str, float] | None = None,
    is_cleaned: bool = True,
    is_only_events: bool = False,
) -> SessionLines:
    """Read each file that holds some of the streams."""
    streams_of_file: dict[str, dict[str, SensorStream | TextStream]] = {}
    for name, stream in streams.items():
        if isinstance(stream, (SensorStream, TextStream)):
            for file in files_of_stream(stream):
                streams_of_file.setdefault(file, {})[name] = stream
    files: list[FileLines] = []
    readings: dict[str, Readings] = {}
    events: dict[str, list[TextEvent]] = {
        name: [] for name, stream in streams.items() if isinstance(stream, TextStream)
    }
    for file in sorted(streams_of_file, key=lambda file: (file != METADATA_FILE, file)):
        has_marks = is_only_events and file == METADATA_FILE
        marks = _text_marks(streams_of_file[file]) if has_marks else ()
        timelines = _plan_timelines(file, streams_of_file[file], (units_per_s or {}).get(file))
        if file.endswith(".jsonl"):
            num_lines = _read_json_lines(path / file, timelines, marks=marks)
        else:
            num_lines = _read_table(path / file, timelines)
        for timeline in timelines:
            lines, its_readings = timeline.finish(num_lines=num_lines, is_cleaned=is_cleaned)
            readings.update(its_readings)
            for name, its_events in timeline.events.items():
                events[name] += its_events
            if num_lines or lines.issues:
                files.append(lines)
    return SessionLines(
        readings=readings,
        events={n: tuple(sorted(e, key=lambda event: event.time_s)) for n, e in events.items()},
        files=tuple(files),
    )


def _plan_timelines(
    file: str, streams: Mapping[str, SensorStream | TextStream], units_per_s: float | None
) -> list[_Timeline]:
    """Group the streams of a file by the key of their times; texts join the first sensors."""
    timelines: dict[tuple[str, float], _Timeline] = {}
    texts = {name: stream for name, stream in streams.items() if isinstance(stream, TextStream)}
    for name, stream in streams.items():
        if isinstance(stream, SensorStream):
            key = (stream.time, stream.units_per_s)
            if key not in timelines:
                timelines[key] = _Timeline(file, stream.time, units_per_s or stream.units_per_s)
            timelines[key].add_stream(name, stream)
    if texts:
        key = (TIME_KEY, 1.0)
        if not timelines:
            timelines[key] = _Timeline(file, TIME_KEY, units_per_s or 1.0)
        timeline = timelines.get(key, next(iter(timelines.values())))
        for name, stream in texts.items():
            timeline.add_stream(name, stream)
    for timeline in timelines.values():
        timeline.is_optional = len(timelines) > 1
    return list(timelines.values())


def _read_json_lines(path: Path, timelines: list[_Timeline], *, marks: tuple[bytes, ...]) -> int:
    """Read a file of JSON lines; return the number of lines that are not blank.

    Args:
        path: the file; a missing file has no lines.
        timelines: what the lines are added to.
        marks: if there are any, lines without one of these bytes are skipped.
    """
    issues = timelines[0].issues
    file = _open_regular(path, issues)
    if file is None:
        return 0
    num_lines = number = 0
    with file:
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                num_lines += 1
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                issues.add(number, "long", f"line over {MAX_LINE_BYTES} bytes")
                continue
            if not raw.strip() or (marks and not any(mark in raw for mark in marks)):
                continue
            num_lines += 1
            values, message = parse_line(raw)
            if values is None:
                issues.add(number, "json", message)
                continue
            for timeline in timelines:
                timeline.add_line(number, values)
    return num_lines


def _read_table(path: Path, timelines: list[_Timeline]) -> int:
    """Read a table file; return the number of its rows."""
    issues = timelines[0].issues
    file = _open_regular(path, issues)
    if file is None:
        return 0
    wanted = {t.time_key for t in timelines}
    wanted |= {key for t in timelines for s in t.sensors.values() for key in _json_keys(s)}
    num_rows = 0
    with file:
        try:
            table = open_table(file, path.suffix, wanted=wanted)
            offsets: dict[str, range] = {}
            plans = [(timeline, _plan_columns(table, timeline, offsets)) for timeline in timelines]
            widths = [(name, len(columns)) for name, columns in offsets.items()]
            for block in table.iter_blocks(widths) if widths else ():
                num_rows += block.num_rows
                for timeline, columns in plans:
                    if columns:
                        timeline.add_block(block, columns)
                _add_row_issues(block, timelines, issues)
        except TableError as error:
            issues.add(0, "file", str(error))
    return num_rows


def _plan_columns(
    table: Table, timeline: _Timeline, offsets: dict[str, range]
) -> dict[str, list[int]]:
    """Choose the columns of each stream, and of the time under the empty name.

    Args:
        table: the table.
        timeline: the streams. One whose columns are missing becomes an issue.
        offsets: columns of the cells by name of the table's column; new ones are added.
    """

    def take(names: Sequence[str], width: int) -> list[int]:
        for name in names:
            stop = max((columns.stop for columns in offsets.values()), default=0)
            offsets.setdefault(name, range(stop, stop + width))
        return [index for name in names for index in offsets[name]]

    line, issues = table.header_line, timeline.issues
    if message := _find_fault(table, [timeline.time_key], "time"):
        issues.add(line, "column", message, key=timeline.time_key)
        return {}
    plan: dict[str, list[int]] = {"": take([timeline.time_key], 1)}
    for name, stream in timeline.sensors.items():
        key = stream.key or ""
        names = list(stream.names or ())
        if stream.key:
            names = choose_columns(table, key, size=stream.size)
            names = [column for column in names if column != timeline.time_key] or [key]
        if message := _find_fault(table, names, "key" if stream.key else "values"):
            issues.add(line, "column", message, key=key, stream=name)
        elif names[0] in table.list_columns:
            plan[name] = take(names, stream.size)
        elif len(names) != stream.size:
            message = _wrong_size(f"{len(names)} columns belong to {key}", name, stream)
            issues.add(line, "size", message, key=key, stream=name)
        else:
            plan[name] = take(names, 1)
    return plan


def _find_fault(table: Table, names: Sequence[str], setting: str) -> str:
    """Explain why columns can't be read; empty if they can."""
    for name in names:
        count = table.names.count(name)
        if count != 1:
            fault = "no column" if count == 0 else f"{count} columns are called"
            columns = reprlib.repr(list(table.names))
            return (
                f"{fault} {name}; its columns are {columns}; fix: correct `{setting}` or the file"
            )
    return ""


def _add_row_issues(block: TableBlock, timelines: list[_Timeline], issues: _IssueList) -> None:
    """Report skipped rows, and lists of another length."""
    for issue in block.issues:
        if issue.kind != "size":
            issues.add(issue.line, issue.kind, issue.message)
            continue
        for timeline in timelines:
            for name, stream in timeline.sensors.items():
                if stream.key == issue.column:
                    message = _wrong_size(issue.message, name, stream)
                    timeline.issues.add(issue.line, "size", message, key=issue.column, stream=name)


def _open_regular(path: Path, issues: _IssueList) -> IO[bytes] | None:
    """Open a regular file; None if it is missing, or can't be opened, which becomes an issue."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would never end
            raise IsADirectoryError(errno.EISDIR, "not a regular file")
        return path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        issues.add(0, "file", f"can't be opened: {error.strerror}")
        return None


def _text_marks(streams: Mapping[str, SensorStream | TextStream]) -> tuple[bytes, ...]:
    """Return bytes of which every line with a text of ``metadata.jsonl`` contains some.

    A key is there as it is, or escaped, or in UTF-16 or 32.
    """
    keys = {s.metadata_key or "text" for s in streams.values() if isinstance(s, TextStream)}
    return (*(key.encode("utf-8", "surrogatepass") for key in sorted(keys)), b"\\", b"\0")


def _json_keys(stream: SensorStream) -> tuple[str, ...]:
    """Return the keys of a line that hold the values of a sensor."""
    return (stream.key,) if stream.key else (stream.names or ())


def _key_of_value(stream: SensorStream, index: int) -> str:
    return stream.key or (stream.names or ("",))[index]


def _wrong_size(fault: str, name: str, stream: SensorStream) -> str:
    return (
        f"{fault}, the recipe declares {stream.size}; fix: correct the counts of "
        f"streams.{name}.values"
    )


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
