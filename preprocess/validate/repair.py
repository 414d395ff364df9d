"""Repair a session in place (``preprocess validate --fix``).

Only faults with exactly one right repair are repaired. Files of JSON lines are read, the functions
of :mod:`preprocess.validate.line_repairs` are applied in order, and the files that changed are
written. The rows of a .csv or .tsv file are sorted; other faults of tables are only reported. Media
files are never changed. The original files are kept as ``*.orig``.

All files change together or not at all, at whatever moment the machine stops. First the new files
are written under temporary names, then a journal that names them; only then they are renamed over
the old ones. The next run finishes the renames of a journal that it finds.
"""

from __future__ import annotations

import filecmp
import itertools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.validate.line_checks import MAX_BACK_S
from preprocess.validate.line_repairs import (
    LineFile,
    Lines,
    clamp,
    convert_units,
    drop_outside_media,
    drop_unreadable,
    fill_gaps,
    is_sortable,
    join_repeats,
    parse_lines,
    plan_files,
    shift_to_zero,
    sort_lines,
)
from shared.errors import MediaError, SessionError
from shared.files import sync_folder, write_synced
from shared.kinds.audio import align_sound
from shared.kinds.video import align_track
from shared.media.sound import read_sound
from shared.media.video import read_video_track
from shared.session.alignment import MEDIA_KINDS, read_starts
from shared.session.folder import files_of_stream, read_timed_lines
from shared.streams import AudioStream, VideoStream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.recipe import Recipe
    from shared.session.lines import FileLines

JOURNAL_FILE = ".repair"
_TEMPORARY = ".repairing"
"""Suffix of files that are not complete yet."""

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


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
        contents, repairs = _plan_repairs(path, recipe=recipe)
        if contents:
            repairs += _commit(path, contents)
        return finished + repairs
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "make the folder writable, or repair a copy of it"
        raise SessionError(f"{path}: cannot be repaired: {reason}; fix: {fix}") from error


def _plan_repairs(path: Path, *, recipe: Recipe) -> tuple[dict[str, bytes], list[str]]:
    """Return the new content of each file that changes, and a sentence for each repair."""
    files = {n: f for n, f in plan_files(recipe).items() if (path / n).is_file()}
    parsed = {n: parse_lines((path / n).read_bytes(), f) for n, f in files.items()}
    starts, start_error = read_starts(path, recipe)
    is_media_known, media_stop_s = False, None
    if start_error is None:
        is_media_known, media_stop_s = _find_media_stop(path, starts, recipe)
    as_read = {name: lines for name, (lines, _) in parsed.items()}
    in_seconds, repairs = convert_units(as_read, files, media_stop_s, recipe=recipe)
    repaired: Lines = {}
    changed: set[str] = set()
    for name, lines in in_seconds.items():
        num_bad = parsed[name][1]
        kept, sentence = drop_unreadable(lines, num_bad, file=files[name])
        if sentence:
            repairs.append(sentence)
            changed.add(name)
        # Bad lines that are not dropped mean that this is probably another kind of file.
        if sentence or not num_bad:
            repaired[name] = kept
    shared = _shared_files(path, starts, recipe) if is_media_known else None
    if repaired.keys() == parsed.keys():
        repairs += _repair_lines(repaired, files, shared, media_stop_s)
    changed |= {name for name, lines in repaired.items() if lines != parsed[name][0]}
    contents = {name: b"".join(line.encoded() for line in repaired[name]) for name in changed}
    tables, sentences = _sort_tables(path, recipe)
    return contents | tables, repairs + sentences


def _repair_lines(
    repaired: Lines,
    files: Mapping[str, LineFile],
    shared: frozenset[str] | None,
    media_stop_s: float | None,
) -> list[str]:
    """Apply every repair that needs lines with times; replaces the lists in `repaired`.

    `shared` are the files on the shared clock; None if it cannot be shifted.
    """
    sentences: list[str | None] = []
    sortable = [n for n, f in files.items() if not f.is_text_file and is_sortable(repaired[n])]
    for name in sortable:
        repaired[name], sentence = sort_lines(repaired[name], file=files[name])
        sentences.append(sentence)
    sensors = {n: repaired[n] for n, f in files.items() if not f.is_text_file}
    if shared is not None and sensors.keys() <= {*sortable}:
        on_clock = {n: lines for n, lines in sensors.items() if n in shared}
        texts = {n: repaired[n] for n, f in files.items() if f.is_text_file and n in shared}
        if on_clock:
            on_clock, texts, rebased = shift_to_zero(on_clock, texts, files, media_stop_s)
            on_clock, trimmed = drop_outside_media(on_clock, files, media_stop_s)
            sentences += [rebased, *trimmed]
        repaired.update(on_clock | texts)
    for repair in (clamp, join_repeats, fill_gaps):
        for name in sortable:
            repaired[name], sentence = repair(repaired[name], file=files[name])
            sentences.append(sentence)
    return [sentence for sentence in sentences if sentence]


def _shared_files(path: Path, starts: Mapping[str, float], recipe: Recipe) -> frozenset[str] | None:
    """Return the files whose timestamps share an offset; None if one of them can't be written.

    A file whose streams do not agree on it, or a table, would stay behind.
    """
    clocks: dict[str, set[bool]] = {}
    for name, spec in recipe.streams.items():
        if spec.kind not in MEDIA_KINDS:
            for file in files_of_stream(spec):
                is_shared = spec.clock == "session" and name not in starts
                clocks.setdefault(file, set()).add(is_shared)
    present = {file: clock for file, clock in clocks.items() if (path / file).is_file()}
    shared = frozenset(file for file, clock in present.items() if True in clock)
    is_writable = shared <= plan_files(recipe).keys()
    return shared if is_writable and all(len(clock) == 1 for clock in present.values()) else None


def _find_media_stop(
    path: Path, starts: Mapping[str, float], recipe: Recipe
) -> tuple[bool, float | None]:
    """Return whether all media can be read, and when the last one ends, if there is any."""
    stops_s: list[float] = []
    try:
        for name, spec in recipe.streams.items():
            file, start_s = path / spec.file, starts.get(name)
            if isinstance(spec, VideoStream) and file.exists():
                stops_s.append(align_track(read_video_track(file), start_s).stop_s)
            elif isinstance(spec, AudioStream) and file.exists():
                sound = read_sound(file, rate_hz=spec.rate_hz, track=spec.track)
                stops_s.append(align_sound(sound, start_s).stop_s)
    except MediaError:
        return False, None
    return True, max(stops_s, default=None)


def _sort_tables(path: Path, recipe: Recipe) -> tuple[dict[str, bytes], list[str]]:
    """Sort the rows of text tables by time; a table with any other fault is not changed."""
    names = {s.file for s in recipe.sensors.values() if s.file.endswith((".csv", ".tsv"))}
    contents: dict[str, bytes] = {}
    sentences: list[str] = []
    if any((path / name).is_file() for name in names):
        files = [lines for lines in read_timed_lines(path, recipe).files if lines.file in names]
        of_one_key = [f for f in files if sum(other.file == f.file for other in files) == 1]
        for file in of_one_key:
            ordered = _sorted_rows((path / file.file).read_bytes(), file)
            if ordered is not None:
                contents[file.file] = ordered
                num_back = sum(issue.count for issue in file.issues if issue.kind == "order")
                noun = "row" if num_back == 1 else "rows"
                sentences.append(f"{file.file}: sorted {num_back} {noun} into place")
    return contents, sentences


def _sorted_rows(content: bytes, file: FileLines) -> bytes | None:
    """Return a table with its rows in order of time; None if they are, or cannot be sorted.

    Every row after the header must be one line with a time.
    """
    back_s = [issue.back_s for issue in file.issues if issue.kind == "order"]
    rows = content.splitlines(keepends=True)
    first = int(file.lines.min()) - 1 if len(file.lines) else 0
    is_whole = sorted(file.lines.tolist()) == [
        number + 1 for number in range(first, len(rows)) if rows[number].strip()
    ]
    if not back_s or max(back_s) > MAX_BACK_S or not is_whole or content.startswith(_UTF_16):
        return None
    ordered = [rows[number - 1] for number in file.lines.tolist()]
    ending = b"\r\n" if ordered[0].endswith(b"\r\n") else b"\n"
    return b"".join([*rows[:first], *(row.rstrip(b"\r\n") + ending for row in ordered)])


def _commit(path: Path, contents: Mapping[str, bytes]) -> list[str]:
    """Write the new files and keep the old ones."""
    for file, content in contents.items():
        temporary = path / f"{file}{_TEMPORARY}"
        write_synced(temporary, content)
        shutil.copymode(path / file, temporary)
    backups = [f"kept the original as {_back_up(path / file).name}" for file in contents]
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
    """Keep a file's bytes under the first free name of ``*.orig``, ``*.orig.1``, ...

    A file of these names that has the same bytes already is returned instead.
    """
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
        write_synced(backup, path.read_bytes())
        shutil.copystat(path, backup)
    return backup
