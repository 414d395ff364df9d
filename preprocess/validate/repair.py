"""Repair a session in place (``preprocess validate --fix``).

Only faults with exactly one right repair are repaired: metadata and text lines are read, the
functions of :mod:`preprocess.validate.line_repairs` are applied in order, and the files that
changed are written. Media files are never changed. The original files are kept as ``*.orig``.

Both files change together or not at all, at whatever moment the machine stops. First the new files
are written under temporary names, then a journal that names them; only then they are renamed over
the old ones. The next run finishes the renames of a journal that it finds.
"""

from __future__ import annotations

import filecmp
import itertools
import os
import shutil
from typing import TYPE_CHECKING

from preprocess.validate.line_repairs import (
    Line,
    clamp,
    convert_units,
    drop_outside_media,
    drop_unreadable,
    fill_gaps,
    is_sortable,
    join_repeats,
    parse_lines,
    shift_to_zero,
    sort_lines,
)
from shared.errors import MediaError, SessionError
from shared.files import sync_folder, write_synced
from shared.media.sound import read_sound
from shared.media.video import read_video_track
from shared.recipe import Stream
from shared.session.alignment import align_sound, align_track, read_starts
from shared.session.folder import AUDIO_FILE, METADATA_FILE, TEXT_FILE, VISION_FILES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from shared.recipe import Recipe

JOURNAL_FILE = ".repair"
_FILES = (METADATA_FILE, TEXT_FILE)
_TEMPORARY = ".repairing"
"""Suffix of files that are not complete yet."""


def repair_session(path: Path, *, recipe: Recipe) -> list[str]:
    """Repair a session folder.

    Args:
        path: the session folder.
        recipe: sizes of readings, and the longest gap that is interpolated.

    Returns:
        One sentence for each repair; [] if there was nothing to repair, as on every second run.

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
    parsed = {f: parse_lines((path / f).read_bytes()) for f in _FILES if (path / f).is_file()}
    is_media_known, media_stop_s = _find_media_stop(path, recipe)
    repairs: list[str] = []
    repaired: dict[str, list[Line]] = {}
    changed: set[str] = set()
    as_read = {file: lines for file, (lines, _) in parsed.items()}
    for file, lines in _convert_to_seconds(as_read, media_stop_s, repairs).items():
        num_bad = parsed[file][1]
        kept, sentence = drop_unreadable(lines, num_bad, file=file)
        if sentence:
            repairs.append(sentence)
            changed.add(file)
        # Bad lines that are not dropped mean that this is probably another kind of file.
        if sentence or not num_bad:
            repaired[file] = kept
    has_all = repaired.keys() == parsed.keys()
    if has_all and is_sortable(repaired.get(METADATA_FILE, [])):
        repairs += _repair_lines(
            repaired, is_media_known=is_media_known, media_stop_s=media_stop_s, recipe=recipe
        )
    changed |= {file for file, lines in repaired.items() if lines != parsed[file][0]}
    return {f: b"".join(line.encoded() for line in repaired[f]) for f in changed}, repairs


def _convert_to_seconds(
    lines: dict[str, list[Line]], media_stop_s: float | None, repairs: list[str]
) -> dict[str, list[Line]]:
    """Return the lines of both files with timestamps in seconds."""
    if METADATA_FILE not in lines:
        return lines
    metadata, texts = lines[METADATA_FILE], lines.get(TEXT_FILE, [])
    metadata, texts, sentence = convert_units(metadata, texts, media_stop_s)
    if sentence:
        repairs.append(sentence)
    divided = {METADATA_FILE: metadata, TEXT_FILE: texts}
    return {file: divided[file] for file in lines}


def _repair_lines(
    repaired: dict[str, list[Line]],
    *,
    is_media_known: bool,
    media_stop_s: float | None,
    recipe: Recipe,
) -> list[str]:
    """Apply every repair that needs lines with times; replaces the lists in `repaired`."""
    lines, texts = repaired[METADATA_FILE], repaired.get(TEXT_FILE, [])
    lines, sorted_ = sort_lines(lines)
    lines, joined = join_repeats(lines)
    rebased = trimmed = None
    if is_media_known:
        lines, texts, rebased = shift_to_zero(lines, texts, media_stop_s)
        lines, trimmed = drop_outside_media(lines, media_stop_s)
    lines, clamped = clamp(lines, sensors=recipe.sensors)
    lines, filled = fill_gaps(lines, sensors=recipe.sensors)
    repaired[METADATA_FILE] = lines
    if TEXT_FILE in repaired:
        repaired[TEXT_FILE] = texts
    return [repair for repair in (sorted_, joined, rebased, trimmed, clamped, filled) if repair]


def _find_media_stop(path: Path, recipe: Recipe) -> tuple[bool, float | None]:
    """Return whether all media can be read and placed, and when the last one ends, if any."""
    stops_s: list[float] = []
    starts, start_error = read_starts(path)
    if start_error is not None:
        return False, None
    try:
        for stream, file in VISION_FILES.items():
            if (path / file).exists():
                track = align_track(read_video_track(path / file), starts.get(stream))
                stops_s.append(track.stop_s)
        if (path / AUDIO_FILE).exists():
            sound = read_sound(path / AUDIO_FILE, rate_hz=recipe.audio.rate_hz)
            stops_s.append(align_sound(sound, starts.get(Stream.AUDIO)).stop_s)
    except MediaError:
        return False, None
    return True, max(stops_s, default=None)


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
    temporary_files = [path / f"{file}{_TEMPORARY}" for file in (*_FILES, JOURNAL_FILE)]
    journal = path / JOURNAL_FILE
    if not journal.exists():
        for temporary in temporary_files:
            temporary.unlink(missing_ok=True)
        return []
    named = journal.read_text(encoding="utf-8").split()
    for file in _FILES:
        temporary = path / f"{file}{_TEMPORARY}"
        if file in named and temporary.exists():
            temporary.replace(path / file)
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
