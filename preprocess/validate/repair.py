"""Repairs a session in place (``preprocess validate --fix``): what has one right repair, and
nothing else.

Reads metadata and text lines, applies :mod:`preprocess.validate.line_repairs` in order, writes
the files that changed. Media are never touched. The originals stay beside them as ``*.orig``.

Both files change together or not at all, wherever the machine stops: the new files are written
whole under temporary names, then a journal that names them is, and only then are they renamed over
the old ones; the next run finishes what a journal names.
"""

from __future__ import annotations

import filecmp
import itertools
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preprocess.validate.line_repairs import (
    Line,
    clamp,
    divide,
    drop_unreadable,
    fill_gaps,
    is_sortable,
    join_repeats,
    parse_lines,
    rebase,
    sort_lines,
    trim,
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
_PART = ".repairing"


def repair_session(path: Path, *, recipe: Recipe) -> list[str]:
    """Repair what has one right repair in a session folder.

    Args:
        path: the session folder.
        recipe: sizes of readings, and the longest gap that is interpolated.

    Returns:
        What was done, one sentence each; [] where nothing was, as on every second run.

    Raises:
        SessionError: the folder is no folder, or can't be read or written; nothing has changed, or
            the next run finishes the change.
    """
    if not path.is_dir():
        raise SessionError(f"{path}: no such folder; give the folder of a session")
    try:
        done = _finish(path)
        contents, sentences = _plan(path, recipe=recipe)
        if contents:
            sentences += _commit(path, contents)
        return done + sentences
    except OSError as error:
        why = error.strerror or str(error)
        mend = "make the folder writable, or repair a copy of it"
        raise SessionError(f"{path}: can't be repaired: {why}; {mend}") from error


def _plan(path: Path, *, recipe: Recipe) -> tuple[dict[str, bytes], list[str]]:
    """New contents of the files that change, and what is done to them."""
    found = {f: parse_lines((path / f).read_bytes()) for f in _FILES if (path / f).is_file()}
    media = _media_stop(path, recipe)
    sentences: list[str] = []
    repaired: dict[str, list[Line]] = {}
    changed: set[str] = set()
    as_read = {file: lines for file, (lines, _) in found.items()}
    for file, lines in _in_seconds(as_read, media.stop_s, sentences).items():
        num_bad = found[file][1]
        kept, done = drop_unreadable(lines, num_bad, file=file)
        if done:
            sentences.append(done)
            changed.add(file)
        if done or not num_bad:  # else it is hardly this file at all: hands off
            repaired[file] = kept
    has_all = repaired.keys() == found.keys()
    if has_all and is_sortable(repaired.get(METADATA_FILE, [])):
        sentences += _repair_lines(repaired, media, recipe)
    changed |= {file for file, lines in repaired.items() if lines != found[file][0]}
    return {f: b"".join(line.encoded() for line in repaired[f]) for f in changed}, sentences


def _in_seconds(
    lines: dict[str, list[Line]], media_stop_s: float | None, sentences: list[str]
) -> dict[str, list[Line]]:
    """The lines of both files, their timestamps divided where these are no seconds."""
    if METADATA_FILE not in lines:
        return lines
    metadata, texts = lines[METADATA_FILE], lines.get(TEXT_FILE, [])
    metadata, texts, done = divide(metadata, texts, media_stop_s)
    if done:
        sentences.append(done)
    divided = {METADATA_FILE: metadata, TEXT_FILE: texts}
    return {file: divided[file] for file in lines}


def _repair_lines(repaired: dict[str, list[Line]], media: _Media, recipe: Recipe) -> list[str]:
    """Apply every repair that needs lines with times, in place of the lists in `repaired`."""
    lines, texts = repaired[METADATA_FILE], repaired.get(TEXT_FILE, [])
    lines, sorted_ = sort_lines(lines)
    lines, joined = join_repeats(lines)
    rebased = trimmed = None
    if media.is_known:
        lines, texts, rebased = rebase(lines, texts, media.stop_s)
        lines, trimmed = trim(lines, media.stop_s)
    lines, clamped = clamp(lines, sensors=recipe.sensors)
    lines, filled = fill_gaps(lines, sensors=recipe.sensors)
    repaired[METADATA_FILE] = lines
    if TEXT_FILE in repaired:
        repaired[TEXT_FILE] = texts
    return [done for done in (sorted_, joined, rebased, trimmed, clamped, filled) if done]


@dataclass(frozen=True, slots=True)
class _Media:
    """When the last of the media ends."""

    is_known: bool
    """Whether all of them can be read, and placed."""
    stop_s: float | None
    """None without media."""


def _media_stop(path: Path, recipe: Recipe) -> _Media:
    stops_s: list[float] = []
    starts, flaw = read_starts(path)
    if flaw is not None:
        return _Media(False, None)
    try:
        for stream, file in VISION_FILES.items():
            if (path / file).exists():
                track = align_track(read_video_track(path / file), starts.get(stream))
                stops_s.append(track.stop_s)
        if (path / AUDIO_FILE).exists():
            sound = read_sound(path / AUDIO_FILE, rate_hz=recipe.audio.rate_hz)
            stops_s.append(align_sound(sound, starts.get(Stream.AUDIO)).stop_s)
    except MediaError:
        return _Media(False, None)
    return _Media(True, max(stops_s, default=None))


def _commit(path: Path, contents: Mapping[str, bytes]) -> list[str]:
    """Write the new files, keep the old ones."""
    for file, content in contents.items():
        write_synced(path / f"{file}{_PART}", content)
        shutil.copymode(path / file, path / f"{file}{_PART}")
    kept = [f"kept the original as {_keep(path / file).name}" for file in contents]
    temporary = path / f"{JOURNAL_FILE}{_PART}"
    write_synced(temporary, "\n".join(sorted(contents)).encode())
    temporary.replace(path / JOURNAL_FILE)
    sync_folder(path)
    _finish(path)
    return kept


def _finish(path: Path) -> list[str]:
    """Put the new files that a journal names in place; without a journal, remove what a stopped
    repair left.
    """
    parts = [path / f"{file}{_PART}" for file in (*_FILES, JOURNAL_FILE)]
    journal = path / JOURNAL_FILE
    if not journal.exists():
        for part in parts:
            part.unlink(missing_ok=True)
        return []
    named = journal.read_text(encoding="utf-8").split()
    for file in _FILES:
        part = path / f"{file}{_PART}"
        if file in named and part.exists():
            part.replace(path / file)
    sync_folder(path)
    journal.unlink()
    return ["finished a repair that was interrupted"]


def _keep(path: Path) -> Path:
    """Keep a file's bytes under the first free name of ``*.orig``, ``*.orig.1``, ...; a file that
    holds them already is enough.
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
