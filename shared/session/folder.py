"""Read a session folder: which files it has, and everything in them that has timestamps.

Sensor readings and texts come from keys of ``metadata.jsonl`` and from files of their own. Each
file is read once, whatever the number of streams in it. All times stay on the recorder's clock, in
seconds. Reading never stops at a bad line: validation prints the issues, and the shard job writes
them to ``rejected.jsonl``.
"""

from __future__ import annotations

import errno
import os
import reprlib
import shlex
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from shared.errors import LINK_FAULT, SessionError
from shared.machine import open_steadily
from shared.session.lines import (
    ARRIVED,
    INTERPOLATED,
    Correction,
    LineCollector,
    SessionLines,
    json_keys,
    keys_of,
    wrong_size,
)
from shared.session.names import (
    UnusedName,
    describe_unused,
    explain_bad_name,
    find_unused_files,
    find_unused_keys,
    list_folder,
    list_names,
    printable,
    session_name,
)
from shared.session.records import MAX_LINE_BYTES, count_split, open_records, parse_records
from shared.session.tables import TableError, choose_columns, open_table
from shared.streams import METADATA_FILE, SensorStream, TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from shared.recipe import Recipe
    from shared.session.lines import FileLines, Readings, TextEvent
    from shared.session.names import Listing
    from shared.session.tables import Table
    from shared.streams import StreamSpec

SESSION_INFO_FILE = "session.json"

_MAX_REASONS = 3
"""Folders that a message explains."""

_MAX_SEARCHED = 500
"""Folders that are searched for sessions below one that is none."""


def files_of_stream(spec: StreamSpec) -> tuple[str, ...]:
    """Return the names of the files that can hold a stream."""
    if isinstance(spec, TextStream) and spec.metadata_key and spec.file != METADATA_FILE:
        return (spec.file, METADATA_FILE)
    return (spec.file,)


def group_by_file(
    streams: Mapping[str, StreamSpec],
) -> dict[str, dict[str, SensorStream | TextStream]]:
    """Return the sensors and texts that each file with lines can hold."""
    by_file: dict[str, dict[str, SensorStream | TextStream]] = {}
    for name, spec in streams.items():
        if isinstance(spec, (SensorStream, TextStream)):
            for file in files_of_stream(spec):
                by_file.setdefault(file, {})[name] = spec
    return by_file


def source_files(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the files that samples are made of, sorted; others are ignored."""
    return tuple(sorted({file for s in recipe.streams.values() for file in files_of_stream(s)}))


def scanned_files(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the files that a scan reads; of ``session.json``, how it places them."""
    return (*source_files(recipe), SESSION_INFO_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedFolder:
    """A folder beside sessions that is left out, but was probably meant as some."""

    name: str
    """Printable."""
    reason: str
    """What is wrong with it, and the fix."""
    is_recording: bool
    """Whether it is a recording itself, which can't be used as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSessions:
    """The sessions in a folder."""

    folders: tuple[Path, ...]
    """Sorted by the names of the sessions."""
    skipped: tuple[SkippedFolder, ...]


def survey_sessions(
    root: Path | str,
    recipe: Recipe,
    *,
    visit: Callable[[Path, Listing | None], None] | None = None,
) -> FoundSessions:
    """Find the session folders below `root` (or `root` itself), and those that are left out.

    A session folder holds at least one source file of the recipe. Links are followed. Each folder
    is listed once; `visit` gets each session folder with its listing, if it can be listed.

    Raises:
        SessionError: the folder doesn't exist or holds no session.
    """
    root = Path(root)
    if root.name in ("", ".."):
        root = root.resolve()  # a session is named after its folder
    if not root.is_dir():
        raise SessionError(
            f"{root}: no such folder; fix: give a session folder or a folder of session folders"
        )
    paths = [p for p in root.iterdir() if not p.name.startswith(".")]
    paths = [root] if is_session(root, recipe) else sorted(paths, key=session_name)
    folders, skipped, sources = [], [], source_files(recipe)
    for path in paths:
        listing = list_folder(path)
        if _holds(path, sources, listing) and not explain_bad_name(session_name(path)):
            folders.append(path)
            if visit is not None:
                visit(path, listing)
        elif folder := _explain_folder(path, recipe):
            skipped.append(folder)
    if not folders:
        reasons = [f"{folder.name}: {folder.reason}" for folder in skipped]
        raise SessionError(
            f"{printable(str(root))}: no session in it; "
            f"{explain_no_session(reasons, list_names(list_folder(root), ()), recipe)}"
        )
    return FoundSessions(folders=tuple(folders), skipped=tuple(skipped))


def unused_files(path: Path, recipe: Recipe) -> tuple[UnusedName, ...]:
    """Return the files and folders in a session folder that no declared stream uses."""
    sources = source_files(recipe)
    return find_unused_files(list_names(list_folder(path), sources), sources)


def is_session(path: Path, recipe: Recipe) -> bool:
    """Check whether a folder holds at least one source file, or a link to one."""
    return _holds(path, source_files(recipe), None)


def _holds(path: Path, sources: Collection[str], listing: Listing | None) -> bool:
    """Check whether a folder, which may have been listed, holds at least one of some files."""
    with suppress(OSError):  # in a folder that may be listed only
        for name in sources:
            if listing and name in listing:
                listing[name].stat(follow_symlinks=False)
                return True
    return any(os.path.lexists(path / name) for name in sources)


def explain_no_session(reasons: Sequence[str], names: Iterable[str], recipe: Recipe) -> str:
    """Say why a place with some skipped folders and names holds no session, and the fix."""
    files = describe_unused(find_unused_files(names, source_files(recipe)))[0]
    reasons = [*reasons, *files.values()]
    more = f"; and {len(reasons) - _MAX_REASONS} more like these"
    if reasons:
        return "; ".join(reasons[:_MAX_REASONS]) + (more if len(reasons) > _MAX_REASONS else "")
    sources = ", ".join(source_files(recipe))
    return f"fix: give a folder of session folders, each with at least one of {sources}"


def _explain_folder(path: Path, recipe: Recipe) -> SkippedFolder | None:
    """Explain what is probably meant by a path that is left out; None if it is something else."""
    if not path.is_dir() and not path.is_symlink():
        return None
    name, is_recording = session_name(path), True
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        reason = "the folder can't be opened; fix: make it readable"
    elif is_session(path, recipe):
        reason = explain_bad_name(name)
    elif path.is_symlink() and not path.exists():
        reason = "links to a missing folder; fix: restore the folder, or remove the link"
    elif parents := _find_parents(path, recipe):
        is_recording = False
        reason = explain_nested([*map(str, parents)], sum(parents.values()))
    else:
        files = find_unused_files(list_names(list_folder(path), ()), source_files(recipe))
        reason = "; ".join(describe_unused(files)[0].values())
    if not reason:
        return None
    return SkippedFolder(name=printable(name), reason=reason, is_recording=is_recording)


def explain_nested(parents: Sequence[str], num_sessions: int) -> str:
    """Say where the sessions below a folder that is no session are, and the fix."""
    command = shlex.join(["python", "-m", "preprocess", "validate", *parents[:_MAX_REASONS]])
    sessions = "1 session is" if num_sessions == 1 else f"{num_sessions} sessions are"
    where = parents[0] if len(parents) == 1 else f"{parents[0]} and {len(parents) - 1} more folders"
    return f"{sessions} deeper, in {where}; fix: give that folder instead, as in `{command}`"


def _find_parents(path: Path, recipe: Recipe) -> dict[Path, int]:
    """Return the folders below a path that hold session folders, and how many each holds."""
    parents: dict[Path, int] = {}
    queue = deque([path])
    for _ in range(_MAX_SEARCHED):
        if not queue:
            break
        folder = queue.popleft()
        with suppress(OSError):
            children = [p for p in folder.iterdir() if p.is_dir()]
            children = sorted(p for p in children if not (p.is_symlink() or p.name[0] == "."))
            if num := sum(is_session(child, recipe) for child in children):
                parents[folder] = num
            else:
                queue.extend(children)
    return parents


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
    """Read the same events as :func:`read_timed_lines`, and parse few lines without text."""
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
    streams_of_file = group_by_file(streams)
    events: dict[str, list[TextEvent]] = {
        name: [] for name, stream in streams.items() if isinstance(stream, TextStream)
    }
    files: list[FileLines] = []
    readings: dict[str, Readings] = {}
    keys: dict[str, set[str]] = {}
    for file in sorted(streams_of_file, key=lambda file: (file != METADATA_FILE, file)):
        own = streams_of_file[file]
        marks = _text_marks(own) if is_only_events and file == METADATA_FILE else ()
        timelines = _plan_timelines(file, own, (corrections or {}).get(file, Correction()))
        num_lines = _read_file(path / file, timelines, marks=marks)
        keys[file] = timelines[0].keys
        for timeline in timelines:
            lines, its_readings = timeline.finish(num_lines=num_lines, is_cleaned=is_cleaned)
            readings.update(its_readings)
            for name, its_events in timeline.events.items():
                events[name] += its_events
            if lines.issues or (num_lines and timeline.has_lines):
                files.append(lines)
    ordered = {n: tuple(sorted(e, key=lambda event: event.time_s)) for n, e in events.items()}
    unused = tuple(
        name
        for file, file_keys in keys.items()
        for name in _unused_keys(file, file_keys, streams_of_file[file], events)
    )
    return SessionLines(readings=readings, events=ordered, files=tuple(files), unused=unused)


def _unused_keys(
    file: str,
    seen: Collection[str],
    streams: Mapping[str, SensorStream | TextStream],
    events: Mapping[str, Sequence[TextEvent]],
) -> tuple[UnusedName, ...]:
    """Return the keys of a file that no stream uses.

    A text stream with events lacks no key: they may be in another file.
    """
    declared = {key for stream in streams.values() for key in keys_of(file, stream)}
    needed = {
        key
        for name, stream in streams.items()
        if not events.get(name)
        for key in keys_of(file, stream)
    }
    known = declared | {INTERPOLATED, ARRIVED}
    return find_unused_keys(file, seen, known, needed.difference(seen))


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
    """Add the lines of a file, if there is one; return the number of those that are not blank."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would never end
            raise IsADirectoryError(errno.EISDIR, "not a regular file")
        file = open_steadily(path)
    except FileNotFoundError:
        if path.is_symlink():
            timelines[0].issues.add(0, "file", LINK_FAULT)
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
        issues.add(0, "form", "its objects are not on lines of their own, and counted as lines")
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
    if count_split(raw, records):
        issues.add(number, "form", "more than one JSON object is on the line")
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
        keys = timelines[0].keys
        keys.update(set(table.names).difference(widths))
        for timeline, columns in plans:
            keys.update(*(keys_of("", timeline.sensors[name]) for name in columns or ()))
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
    """Choose the columns of each stream, and add their widths; None without a column of times."""
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
    """Return bytes of which every line with a text contains some: its key, escaped, in UTF-16."""
    keys = {s.metadata_key or "text" for s in streams.values() if isinstance(s, TextStream)}
    return (*(key.encode("utf-8", "surrogatepass") for key in sorted(keys)), b"\\", b"\0")
