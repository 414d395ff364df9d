"""The verdicts on all sessions that a command names: in folders of this machine, on copies of what
lies behind URLs, and on single media files.

A place that can't be judged is a failed report like any other, so that a wrong path among many
takes no verdict from the others.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.build.sources import RemoteRecording, find_recordings
from preprocess.validate.one_file import judge, require_media, session_of
from preprocess.validate.repair import repair_session
from preprocess.validate.validate import Report, failed_report
from shared.errors import SessionError, StorageError
from shared.session.folder import SCANNED_FILES, find_sessions
from shared.storage import Store, parse_location

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from preprocess.validate.probe import SessionProbe
    from shared.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found of one session, or of a place where none could be judged."""

    folder: Path
    """Its files; copies of those behind a URL are there until the next verdict is asked for."""
    repairs: tuple[str, ...] = ()
    report: Report
    evidence: SessionProbe | None = None


def iter_verdicts(places: Iterable[str], *, recipe: Recipe, fix: bool) -> Iterator[Verdict]:
    """Judge every session below these places.

    Args:
        places: folders, URLs, or single videos and sounds.
        recipe: as in :func:`preprocess.validate.validate.check_session`.
        fix: repair first; of folders only.
    """
    for found in _iter_sessions(places):
        if isinstance(found, Report):
            yield Verdict(folder=Path(found.session), report=found)
            continue
        try:
            is_due = fix and found.is_dir()
            repairs = tuple(repair_session(found, recipe=recipe)) if is_due else ()
        except SessionError as error:
            yield Verdict(folder=found, report=failed_report(found.name, str(error)))
            continue
        with session_of(found) as folder:
            report, evidence = judge(found, folder, recipe=recipe)
            yield Verdict(folder=folder, repairs=repairs, report=report, evidence=evidence)


def _iter_sessions(places: Iterable[str]) -> Iterator[Path | Report]:
    """Folders of sessions, single media files, and a report of every place that has none."""
    for text in places:
        where = parse_location(text)
        try:
            if isinstance(where, Store):
                yield from _iter_copies(where)
            elif where.is_file():
                require_media(where)
                yield where
            else:
                yield from find_sessions(where)
        except (SessionError, StorageError) as error:
            yield failed_report(str(where), str(error))


def _iter_copies(store: Store) -> Iterator[Path]:
    for recording in find_recordings(store.url).values():
        assert isinstance(recording, RemoteRecording)
        with tempfile.TemporaryDirectory(prefix="session-") as work:
            yield recording.copy_to(Path(work), SCANNED_FILES)
