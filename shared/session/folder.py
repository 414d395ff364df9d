"""Read a session folder: which files it has, and everything in them that has timestamps.

Sensor readings and texts come from keys of ``metadata.jsonl`` and from files of their own. Each
file is read once, whatever the number of streams in it. All times stay on the recorder's clock, in
seconds. Reading never stops at a bad line: validation prints the issues, and the shard job writes
them to ``rejected.jsonl``.
"""

from __future__ import annotations

import errno
import reprlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from shared.errors import SessionError
from shared.recipe import Recipe
from shared.session.lines import (
    Correction,
    LineCollector,
    SessionLines,
    json_keys,
    wrong_size,
)
from shared.session.records import MAX_LINE_BYTES, open_records, parse_records
from shared.session.tables import TableError, choose_columns, open_table
from shared.streams import METADATA_FILE, SensorStream, TextStream

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from shared.session.lines import FileLines, Readings, TextEvent
    from shared.session.tables import Table
    from shared.streams import StreamSpec

SESSION_INFO_FILE = "session.json"


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

    A session folder holds at least one source file of the recipe, by default the default one.

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
    corrections: Mapping[str, Correction] | None = None,
    is_cleaned: bool = True,
) -> SessionLines:
    """Read everything of a session that has timestamps.

    `corrections` are by file. If `is_cleaned`, values are cleaned
    (:func:`shared.values.clean_readings`), and readings that can't be are left out. Else they are
    as recorded, and finite.
    """
    return _read_streams(path, recipe.streams, corrections=corrections, is_cleaned=is_cleaned)


def read_readings(
    path: Path,
    recipe: Recipe,
    names: Collection[str],
    *,
    corrections: Mapping[str, Correction] | None = None,
) -> dict[str, Readings]:
    """Read the same readings as :func:`read_timed_lines`, of some sensor streams only."""
    streams = {name: recipe.streams[name] for name in names}
    return dict(_read_streams(path, streams, corrections=corrections).readings)


def read_text_events(
    path: Path,
    recipe: Recipe,
    names: Collection[str],
    *,
    corrections: Mapping[str, Correction] | None = None,
) -> dict[str, tuple[TextEvent, ...]]:
    """Read the same events as :func:`read_timed_lines`, of some text streams only.

    Lines of ``metadata.jsonl`` without text are not parsed.
    """
    streams = {name: recipe.streams[name] for name in names}
    read = _read_streams(path, streams, corrections=corrections, is_only_events=True)
    return dict(read.events)


def _read_streams(
    path: Path,
    streams: Mapping[str, StreamSpec],
    *,
    corrections: Mapping[str, Correction] | None = None,
    is_cleaned: bool = True,
    is_only_events: bool = False,
) -> SessionLines:
    """Read each file that holds some of the sensor and text streams."""
    streams_of_file: dict[str, dict[str, SensorStream | TextStream]] = {}
    events: dict[str, list[TextEvent]] = {}
    for name, stream in streams.items():
        if isinstance(stream, (SensorStream, TextStream)):
            for file in files_of_stream(stream):
                streams_of_file.setdefault(file, {})[name] = stream
        if isinstance(stream, TextStream):
            events[name] = []
    files: list[FileLines] = []
    readings: dict[str, Readings] = {}
    for file in sorted(streams_of_file, key=lambda file: (file != METADATA_FILE, file)):
        own = streams_of_file[file]
        marks = _text_marks(own) if is_only_events and file == METADATA_FILE else ()
        timelines = _plan_timelines(file, own, (corrections or {}).get(file, Correction()))
        num_lines = _read_file(path / file, timelines, marks=marks)
        for timeline in timelines:
            lines, its_readings = timeline.finish(num_lines=num_lines, is_cleaned=is_cleaned)
            readings.update(its_readings)
            for name, its_events in timeline.events.items():
                events[name] += its_events
            if lines.issues or (num_lines and timeline.has_lines):
                files.append(lines)
    ordered = {n: tuple(sorted(e, key=lambda event: event.time_s)) for n, e in events.items()}
    return SessionLines(readings=readings, events=ordered, files=tuple(files))


def _plan_timelines(
    file: str, streams: Mapping[str, SensorStream | TextStream], correction: Correction
) -> list[LineCollector]:
    """Group the streams of a file by the key and unit of their times, those of sensors first."""
    groups: dict[tuple[str, float], dict[str, SensorStream | TextStream]] = {}
    for name in sorted(streams, key=lambda name: isinstance(streams[name], TextStream)):
        stream = streams[name]
        groups.setdefault((stream.time, stream.units_per_s), {})[name] = stream
    return [
        LineCollector(
            file,
            time,
            group,
            units_per_s=correction.units_per_s or units,
            left_out=correction.left_out,
            of_file=streams,
        )
        for (time, units), group in groups.items()
    ]


def _read_file(path: Path, timelines: list[LineCollector], *, marks: tuple[bytes, ...]) -> int:
    """Add the lines of a file to timelines; return the number of those that are not blank.

    A file that is missing, or can't be opened, which becomes an issue, has no lines.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would never end
            raise IsADirectoryError(errno.EISDIR, "not a regular file")
        file = path.open("rb")
    except FileNotFoundError:
        return 0
    except OSError as error:
        fix = "fix: make it a file that can be read"
        timelines[0].issues.add(0, "file", f"can't be opened: {error.strerror}; {fix}")
        return 0
    with file:
        if path.suffix != ".jsonl":
            return _read_table(file, path.suffix, timelines)
        num_lines = _read_json_lines(file, timelines, marks=marks)
    if not num_lines and not marks and any(timeline.sensors for timeline in timelines):
        timelines[0].issues.add(0, "empty", "has no line")
    return num_lines


def _read_json_lines(
    file: IO[bytes], timelines: list[LineCollector], *, marks: tuple[bytes, ...]
) -> int:
    """Add JSON lines to timelines, if there are `marks`, only those with one of these bytes."""
    issues, num_lines = timelines[0].issues, 0
    opened = open_records(file)
    if opened.encoding:
        issues.add(0, "encoding", f"is {opened.encoding}, not UTF-8")
    if opened.is_document:
        issues.add(0, "form", "objects are not on lines of their own; they are counted as lines")
    for number, raw in opened.lines:
        if len(raw) > MAX_LINE_BYTES:
            num_lines += 1
            issues.add(number, "long", f"line over {MAX_LINE_BYTES} bytes")
        elif not marks or any(mark in raw for mark in marks):
            num_lines += _add_line(number, raw, timelines)
    return num_lines


def _add_line(number: int, raw: bytes, timelines: list[LineCollector]) -> int:
    """Add the objects of a line to timelines; return the number of objects, usually 1."""
    issues, records = timelines[0].issues, parse_records(raw)
    if len(records) != 1:
        issues.add(number, "form", f"{len(records)} objects are on one line")
    for _, values, message, fix in records:
        if message:
            issues.add(number, "json" if values is None else "encoding", message, fix=fix)
        if values is not None:
            for timeline in timelines:
                timeline.add_line(number, values)
    return len(records)


def _read_table(file: IO[bytes], suffix: str, timelines: list[LineCollector]) -> int:
    """Add the rows of a table to timelines."""
    issues, num_rows = timelines[0].issues, 0
    wanted = {t.time_key for t in timelines}
    wanted |= {key for t in timelines for s in t.sensors.values() for key in json_keys(s)}
    try:
        table = open_table(file, suffix, wanted=wanted)
        if table.encoding:
            issues.add(0, "encoding", f"is {table.encoding}, not UTF-8")
        widths: dict[str, int] = {}
        plans = [(timeline, _plan_columns(table, timeline, widths)) for timeline in timelines]
        for block in table.iter_blocks(widths) if widths else ():
            num_rows += block.num_rows
            for timeline, columns in plans:
                if columns is not None:
                    timeline.add_block(block, columns)
            for issue in block.issues:
                if issue.kind != "size":
                    issues.add(issue.line, issue.kind, issue.message)
    except TableError as error:
        issues.add(0, "file", str(error))
    return num_rows


def _plan_columns(
    table: Table, timeline: LineCollector, widths: dict[str, int]
) -> dict[str, list[str]] | None:
    """Choose the columns of each stream, and add their widths; None without a column of times.

    Missing columns become issues.
    """
    line, issues = table.header_line, timeline.issues
    if message := _find_fault(table, [timeline.time_key], "time"):
        issues.add(line, "column", message, key=timeline.time_key)
        return None
    if timeline.time_key in table.seconds_columns:
        timeline.units_per_s = 1.0
    widths.setdefault(timeline.time_key, 1)
    plan: dict[str, list[str]] = {}
    for name, stream in timeline.sensors.items():
        key = stream.key or ""
        names = list(stream.names or ())
        if stream.key:
            names = choose_columns(table, key, size=stream.size)
            names = [column for column in names if column != timeline.time_key] or [key]
        is_list = names[0] in table.list_columns
        if message := _find_fault(table, names, "key" if stream.key else "values"):
            issues.add(line, "column", message, key=key, stream=name)
        elif not is_list and len(names) != stream.size:
            message = wrong_size(f"{len(names)} columns belong to {key}", name, stream)
            issues.add(line, "size", message, key=key, stream=name)
        else:
            plan[name] = names
            for column in names:
                widths.setdefault(column, stream.size if is_list else 1)
    return plan


def _find_fault(table: Table, names: Sequence[str], setting: str) -> str:
    """Explain why columns can't be read; empty if they can."""
    for name in names:
        count = table.names.count(name)
        if count != 1:
            fault = f"{count} columns are called" if count else "no column"
            columns = reprlib.repr(list(table.names))
            return (
                f"{fault} {name}; its columns are {columns}; fix: correct `{setting}` or the file"
            )
    return ""


def _text_marks(streams: Mapping[str, SensorStream | TextStream]) -> tuple[bytes, ...]:
    """Return bytes of which every line with a text of ``metadata.jsonl`` contains some.

    A key is there as it is, or escaped, or in UTF-16 or 32.
    """
    keys = {s.metadata_key or "text" for s in streams.values() if isinstance(s, TextStream)}
    return (*(key.encode("utf-8", "surrogatepass") for key in sorted(keys)), b"\\", b"\0")
