"""Repair a session in place (``preprocess validate --fix``).

Only faults with exactly one right repair are repaired. Files of JSON lines are read, the functions
of :mod:`preprocess.validate.line_repairs` are applied in order, and the files that changed are
written. The rows of a .csv or .tsv file are sorted; other faults of tables are only reported. Of
media, only wrong sizes in the header of a WAV file are. The original files are kept as ``*.orig``.

All files change together or not at all, at whatever moment the machine stops. First the new files
are written under temporary names, then a journal that names them; only then they are renamed over
the old ones. The next run finishes the renames of a journal that it finds.
"""

from __future__ import annotations

import filecmp
import functools
import io
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.validate import line_repairs
from preprocess.validate.repair_plan import Repair, RepairKind, RepairPlan
from shared.errors import SessionError
from shared.files import BLOCK_BYTES, write_synced
from shared.machine import is_machine_trouble, machine_error, sync_folder
from shared.media.riff import corrected_head, read_wav_header
from shared.session.alignment import MEDIA_KINDS, STRETCH_KEY, read_placement
from shared.session.folder import SESSION_INFO_FILE, files_of_stream, read_timed_lines
from shared.session.records import open_utf8
from shared.session.scan import scan_session
from shared.session.timestamps import MAX_BACK_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import BinaryIO

    from preprocess.validate.line_repairs import LineFile, Lines, Repaired
    from preprocess.validate.probe import SessionProbe
    from preprocess.validate.repair_plan import Content
    from shared.media.riff import WavHeader
    from shared.recipe import Recipe
    from shared.session.lines import FileLines
    from shared.session.scan import SessionScan

JOURNAL_FILE = ".repair"
_BYTES_PER_STAT_BLOCK = 512
_MIN_FREE_BYTES = 64 << 20
"""Space that a repair leaves on the disk."""
_UNREADABLE = "too much of it is unreadable"

_TEMPORARY = ".repairing"
"""Suffix of files that are not complete yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _MediaEnd:
    """When the video and sound of a session end."""

    is_known: bool
    """Whether all of them can be read and placed on the clock."""
    stop_s: float | None = None
    """End of the last one; None if there is none."""


def repair_session(path: Path, *, recipe: Recipe) -> list[str]:
    """Repair a session folder; return one sentence for each repair, none on every second run.

    Raises:
        SessionError: not a folder, or it cannot be read or written. Nothing has changed then, or
            the next run finishes the change.
    """
    if not path.is_dir():
        raise SessionError(f"{path}: no such folder; fix: give the folder of a session")
    try:
        finished = _finish_journal(path)
        plan = plan_repairs(path, recipe=recipe)
        done = [repair.sentence for repair in plan.repairs]
        return finished + done + (_commit(path, plan.contents) if plan.contents else [])
    except OSError as error:
        if is_machine_trouble(error):
            raise machine_error(error, error.filename or path) from error
        reason = error.strerror or str(error)
        fix = "make the folder writable, or repair a copy of it"
        raise SessionError(f"{path}: cannot be repaired: {reason}; fix: {fix}") from error


def plan_repairs(
    path: Path,
    *,
    recipe: Recipe,
    seen: SessionScan | SessionProbe | None = None,
) -> RepairPlan:
    """Decide what to repair in a session folder, and change nothing; None reads its streams."""
    seen = seen or scan_session(path, recipe=recipe)
    plans = (
        _plan_stretches(path, seen.proposed_stretches),
        _plan_lines(path, recipe, seen),
        _plan_tables(path, recipe),
        _plan_media(path, recipe=recipe),
    )
    return RepairPlan(
        repairs=tuple(repair for plan in plans for repair in plan.repairs),
        contents={name: content for plan in plans for name, content in plan.contents.items()},
        blocked={name: reason for plan in plans for name, reason in plan.blocked.items()},
    )


def _plan_lines(path: Path, recipe: Recipe, seen: SessionScan | SessionProbe) -> RepairPlan:
    """Plan the repairs of files of JSON lines."""
    files = {n: f for n, f in line_repairs.plan_files(recipe).items() if (path / n).is_file()}
    placement = read_placement(path, recipe)
    is_placed = placement.error is None
    media = _find_media_end(path, recipe, seen) if is_placed else _MediaEnd(is_known=False)
    repairs: list[Repair] = []
    repaired: Lines = {}
    blocked: dict[str, str] = {}
    num_bad: dict[str, int] = {}
    for name, file in files.items():
        lines, num_bad[name], rewriting = line_repairs.parse_lines((path / name).read_bytes(), file)
        repaired[name], sentence = line_repairs.write_numbers(lines, file=file)
        if num_bad[name] and line_repairs.is_refused(repaired[name], num_bad[name], file=file):
            blocked[name] = _UNREADABLE
            del repaired[name]
            continue
        repairs += rewriting
        _note(repairs, RepairKind.NUMBERS, (name,), sentence)
    if not blocked:
        repaired, converted = line_repairs.convert_units(
            repaired, files, media.stop_s, recipe=recipe
        )
        repaired, unjumped = line_repairs.remove_jumps(repaired, files, media.stop_s)
        repairs += converted + unjumped
    for name, lines in list(repaired.items()):
        repaired[name], sentence = line_repairs.drop_unreadable(
            lines, num_bad[name], file=files[name]
        )
        _note(repairs, RepairKind.DROP, (name,), sentence)
        if num_bad[name] and not sentence:
            blocked[name] = _UNREADABLE
            repairs = [repair for repair in repairs if name not in repair.files]
            del repaired[name]
            continue
        obstacle = None if files[name].is_text_file else line_repairs.find_obstacle(repaired[name])
        if obstacle is not None:
            blocked[name] = obstacle
    shared = _shared_files(path, placement.starts, recipe) if media.is_known else None
    stretched = (*seen.proposed_stretches, *placement.stretches)
    can_trim = all(recipe.streams[name].kind in MEDIA_KINDS for name in stretched)
    repairs += _repair_lines(
        repaired, files, blocked, shared=shared, media_stop_s=media.stop_s, can_trim=can_trim
    )
    changed = {name for repair in repairs for name in repair.files}
    contents = {n: b"".join(line.encoded() for line in repaired[n]) for n in sorted(changed)}
    return RepairPlan(repairs=tuple(repairs), contents=contents, blocked=blocked)


def _note(
    repairs: list[Repair], kind: RepairKind, files: tuple[str, ...], sentence: str | None
) -> None:
    """Add a repair if there is a sentence about it."""
    if sentence:
        repairs.append(Repair(kind, files, sentence))


def _repair_lines(
    repaired: Lines,
    files: Mapping[str, LineFile],
    blocked: Mapping[str, str],
    *,
    shared: frozenset[str] | None,
    media_stop_s: float | None,
    can_trim: bool,
) -> list[Repair]:
    """Apply every repair that needs lines with times; replaces the lists in `repaired`.

    Lines are trimmed if they `can_trim`: not of a wrong clock. `shared` are the files on the shared
    clock; None if it cannot be shifted.
    """
    repairs: list[Repair] = []
    sensors = [n for n in repaired if not files[n].is_text_file and repaired[n]]
    sortable = [n for n in sensors if n not in blocked]

    def apply(kind: RepairKind, repair: Callable[..., Repaired], names: Iterable[str]) -> None:
        for name in names:
            repaired[name], sentence = repair(repaired[name], file=files[name])
            _note(repairs, kind, (name,), sentence)

    apply(RepairKind.SORT, line_repairs.sort_lines, sortable)
    if (
        shared is not None
        and not blocked
        and all(repaired[n] for n in repaired if not files[n].is_text_file)
    ):
        on_clock = {n: repaired[n] for n in sensors if n in shared}
        texts = {n: repaired[n] for n, f in files.items() if f.is_text_file and n in shared}
        if on_clock:
            moved, moved_texts, shifted = line_repairs.shift_to_zero(
                on_clock, texts, files, media_stop_s
            )
            placed, trimmed = line_repairs.drop_outside_media(
                moved, files, media_stop_s if can_trim else None
            )
            names = [n for n, lines in (moved | moved_texts).items() if lines != repaired[n]]
            _note(repairs, RepairKind.SHIFT, tuple(names), shifted)
            repairs += trimmed
            repaired.update(placed | moved_texts)
    apply(RepairKind.CLAMP, line_repairs.clamp, sensors)
    apply(RepairKind.SPREAD, line_repairs.spread_packets, sortable)
    apply(RepairKind.JOIN, line_repairs.join_repeats, sortable)
    apply(RepairKind.FILL, line_repairs.fill_gaps, sortable)
    return repairs


def _shared_files(path: Path, starts: Mapping[str, float], recipe: Recipe) -> frozenset[str] | None:
    """Return the files whose timestamps share an offset; None if one can't be moved by it."""
    clocks: dict[str, set[bool]] = {}
    for name, spec in recipe.streams.items():
        if spec.kind not in MEDIA_KINDS:
            for file in files_of_stream(spec):
                is_shared = spec.clock == "session" and name not in starts
                clocks.setdefault(file, set()).add(is_shared)
    present = {file: clock for file, clock in clocks.items() if (path / file).is_file()}
    shared = frozenset(file for file, clock in present.items() if True in clock)
    is_writable = shared <= line_repairs.plan_files(recipe).keys()
    return shared if is_writable and all(len(clock) == 1 for clock in present.values()) else None


def _find_media_end(path: Path, recipe: Recipe, seen: SessionScan | SessionProbe) -> _MediaEnd:
    """Return when the last video or sound of a session ends."""
    names = recipe.of_kind(*MEDIA_KINDS)
    failed = [name for name in names if name in seen.absent and name not in seen.not_recorded]
    if any((path / recipe.streams[name].file).exists() for name in failed):
        return _MediaEnd(is_known=False)
    stops_s = [seen.intervals[name].stop_s for name in names if name in seen.intervals]
    return _MediaEnd(is_known=True, stop_s=max(stops_s, default=None))


def _plan_tables(path: Path, recipe: Recipe) -> RepairPlan:
    """Plan to write text tables in UTF-8, and their rows by time if they have no other fault."""
    names = {s.file for s in recipe.sensors.values() if s.file.endswith((".csv", ".tsv"))}
    contents: dict[str, bytes] = {}
    repairs: list[Repair] = []
    if any((path / name).is_file() for name in names):
        files = [lines for lines in read_timed_lines(path, recipe).files if lines.file in names]
        of_one_key = [f for f in files if sum(other.file == f.file for other in files) == 1]
        for file in of_one_key:
            text, encoding = open_utf8(io.BytesIO((path / file.file).read_bytes()))
            content = text.read()
            if encoding:
                contents[file.file] = content
                sentence = f"{file.file}: wrote UTF-8 in place of {encoding}"
                repairs.append(Repair(RepairKind.ENCODE, (file.file,), sentence))
            ordered = _sorted_rows(content, file)
            if ordered is not None:
                contents[file.file] = ordered
                num_back = sum(issue.count for issue in file.issues if issue.kind == "order")
                noun = "row" if num_back == 1 else "rows"
                sentence = f"{file.file}: sorted {num_back} {noun} into place"
                repairs.append(Repair(RepairKind.SORT, (file.file,), sentence))
    return RepairPlan(repairs=tuple(repairs), contents=contents)


def _sorted_rows(content: bytes, file: FileLines) -> bytes | None:
    """Return a table with its rows, each a line with a time, sorted; None if they are, or can't."""
    back_s = [issue.back_s for issue in file.issues if issue.kind == "order"]
    rows = content.splitlines(keepends=True)
    first = int(file.lines.min()) - 1 if len(file.lines) else 0
    is_whole = sorted(file.lines.tolist()) == [
        number + 1 for number in range(first, len(rows)) if rows[number].strip()
    ]
    if not back_s or max(back_s) > MAX_BACK_S or not is_whole:
        return None
    ordered = [rows[number - 1] for number in file.lines.tolist()]
    ending = b"\r\n" if ordered[0].endswith(b"\r\n") else b"\n"
    return b"".join([*rows[:first], *(row.rstrip(b"\r\n") + ending for row in ordered)])


def _plan_stretches(path: Path, stretches: Mapping[str, float]) -> RepairPlan:
    """Plan to declare the factors of wrong clocks in ``session.json``, beside what it has."""
    if not stretches:
        return RepairPlan()
    file = path / SESSION_INFO_FILE
    try:
        session_info = json.loads(file.read_bytes()) if file.exists() else {}
    except (OSError, ValueError, RecursionError):  # a check reports it
        session_info = None
    if not isinstance(session_info, dict):
        return RepairPlan()
    declared = {**(session_info.get(STRETCH_KEY) or {}), **stretches}
    content = json.dumps({**session_info, STRETCH_KEY: declared}, indent=2, ensure_ascii=False)
    factors = ", ".join(f"{name} by {factor:.7g}" for name, factor in stretches.items())
    sentence = (
        f"{SESSION_INFO_FILE}: declared that times are multiplied, of {factors}; delete "
        f"{STRETCH_KEY!r} if they were only stopped at another time"
    )
    return RepairPlan(
        repairs=(Repair(RepairKind.STRETCH, (SESSION_INFO_FILE,), sentence),),
        contents={SESSION_INFO_FILE: f"{content}\n".encode("utf-8", "surrogatepass")},
    )


def _plan_media(path: Path, *, recipe: Recipe) -> RepairPlan:
    """Plan to correct the headers of a session's sound files."""
    repairs: list[Repair] = []
    contents: dict[str, Content] = {}
    blocked: dict[str, str] = {}
    for name in dict.fromkeys(spec.file for spec in recipe.audios.values()):
        file = path / name
        header = read_wav_header(file) if file.is_file() else None
        if header is None or not header.is_wrong:
            continue
        stat = file.stat()
        needed = min(stat.st_size, stat.st_blocks * _BYTES_PER_STAT_BLOCK)
        free = shutil.disk_usage(path).free
        if needed + _MIN_FREE_BYTES > free:
            blocked[name] = (
                f"it needs {needed >> 20} MiB for a corrected copy, {free >> 20} MiB are free; "
                "without it, the sound is read whole all the same"
            )
            continue
        contents[name] = functools.partial(_write_corrected, file, header)
        seconds = header.num_bytes / max(1, header.bytes_per_s)
        sentence = f"{name}: wrote the size of all {seconds:.2f} s of sound into the header"
        repairs.append(Repair(RepairKind.SIZES, (name,), sentence))
    return RepairPlan(repairs=tuple(repairs), contents=contents, blocked=blocked)


def _write_corrected(path: Path, header: WavHeader, output: BinaryIO) -> None:
    """Write a sound file with right sizes; blocks of zeros stay holes."""
    with path.open("rb") as file:
        output.write(corrected_head(file, header))
        file.seek(header.start)
        remaining = header.num_bytes if header.is_last else path.stat().st_size - header.start
        hole = bytes(BLOCK_BYTES)
        while block := file.read(min(BLOCK_BYTES, remaining)):
            remaining -= len(block)
            if block == hole:
                output.seek(len(block), os.SEEK_CUR)
            else:
                output.write(block)
        if header.is_last and header.num_bytes % 2:
            output.write(b"\0")
        output.truncate()


def _commit(path: Path, contents: Mapping[str, Content]) -> list[str]:
    """Write the new files and keep the old ones."""
    for file, content in contents.items():
        temporary = path / f"{file}{_TEMPORARY}"
        write_synced(temporary, content)
        if (path / file).exists():
            shutil.copymode(path / file, temporary)
    backups = [
        f"kept the original as {_back_up(path / file).name}"
        for file in contents
        if (path / file).exists()
    ]
    journal = path / f"{JOURNAL_FILE}{_TEMPORARY}"
    write_synced(journal, "\n".join(sorted(contents)).encode())
    journal.replace(path / JOURNAL_FILE)
    sync_folder(path)
    _finish_journal(path)
    return backups


def _finish_journal(path: Path) -> list[str]:
    """Rename the files that a journal names; without one, delete what a stopped repair left."""
    journal = path / JOURNAL_FILE
    if not journal.exists():
        for temporary in path.glob(f"*{_TEMPORARY}"):
            temporary.unlink()
        return []
    for name in journal.read_text(encoding="utf-8").splitlines():
        temporary = path / f"{name}{_TEMPORARY}"
        if Path(name).name == name and temporary.exists():
            temporary.replace(path / name)
    sync_folder(path)
    journal.unlink()
    return ["finished a repair that was interrupted"]


def _back_up(path: Path) -> Path:
    """Keep a file's bytes under the first name of ``*.orig``, ``*.orig.1``, ... free or equal."""
    for number in itertools.count():
        backup = path.with_name(f"{path.name}.orig" + (f".{number}" if number else ""))
        if not backup.exists():
            break
        if filecmp.cmp(path, backup, shallow=False):
            return backup
    try:
        os.link(path, backup)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("rb") as original:
            write_synced(backup, functools.partial(shutil.copyfileobj, original))
        shutil.copystat(path, backup)
    return backup
