"""Check sessions in any place: folders, URLs, and single files.

::

    locations -> check_sessions -> repair (--fix) -> check_session -> CheckedSession

Locations are folders of this machine, URLs (checked on local copies), and single video or sound
files. A single file is checked as the only stream of a temporary session. Nothing in a folder
raises: a session that cannot be checked gets a failed report, or an unchecked one if the machine
could not read it, and the next one is checked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.recordings import RemoteRecording, survey_recordings
from preprocess.validate.repair import repair_session
from preprocess.validate.report import (
    SINGLE_FILE_CHECKS,
    CheckedSession,
    ValidationReport,
    check_session,
    make_failed_report,
)
from shared.errors import MachineError, SessionError
from shared.machine import temporary_folder
from shared.recipe import Recipe
from shared.session.folder import scanned_files, survey_sessions
from shared.session.names import SOUND_SUFFIXES
from shared.storage import Store, parse_location
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from shared.session.folder import SkippedFolder
    from shared.session.names import UnusedName

_LINE_SUFFIXES = frozenset({".json", ".jsonl", ".csv", ".tsv", ".parquet"})


def check_sessions(
    locations: Iterable[str], *, recipe: Recipe, fix: bool
) -> Iterator[CheckedSession]:
    """Check every session in some folders, which `fix` repairs first, or URLs, and single files."""
    for item in _iter_sources(locations, recipe):
        if isinstance(item, CheckedSession):
            yield item
            continue
        source, unused = item
        try:
            if source.is_file():
                with temporary_folder("validate-", "links to single files") as root:
                    yield _check_single_file(source, root / source.name)
                continue
            repairs = repair_session(source, recipe=recipe) if fix and source.is_dir() else ()
        except (SessionError, MachineError) as error:
            yield make_failed_report(source, source.name, error)
            continue
        checked = check_session(source, recipe=recipe, unused=unused)
        yield replace(checked, repairs=tuple(repairs))


def _iter_sources(
    locations: Iterable[str], recipe: Recipe
) -> Iterator[tuple[Path, Sequence[UnusedName] | None] | CheckedSession]:
    """Yield session folders and single media files; a report for each location or folder without.

    Sessions of a store are copied to a temporary folder, one at a time, with the files that streams
    use; the names of the others come with them.
    """
    for text in locations:
        location = parse_location(text)
        try:
            if isinstance(location, Store):
                recordings, skipped = survey_recordings(location.url, recipe)
                for recording in recordings.values():
                    assert isinstance(recording, RemoteRecording)
                    with temporary_folder("session-", "copies of sessions") as folder:
                        yield recording.download_to(folder, scanned_files(recipe)), recording.unused
                yield from map(_report_skipped, skipped)
            elif not location.is_file():
                survey = survey_sessions(location, recipe)
                yield from ((path, None) for path in survey.folders)
                yield from map(_report_skipped, survey.skipped)
            elif location.suffix in _LINE_SUFFIXES:
                raise SessionError(
                    f"{location}: not a video or sound; fix: give the folder of its session"
                )
            else:
                yield location, None
        except (SessionError, MachineError, OSError) as error:
            yield make_failed_report(Path(str(location)), str(location), error)


def _check_single_file(path: Path, folder: Path) -> CheckedSession:
    """Check a single media file, linked into a new session folder, with a recipe of one stream."""
    folder.mkdir()
    (folder / path.name).symlink_to(path.absolute())
    kind = Kind.AUDIO if path.suffix.lower() in SOUND_SUFFIXES else Kind.VIDEO
    recipe = Recipe.model_validate({"streams": {kind.value: {"kind": kind, "file": "file"}}})
    # The name of a recipe's file is restricted; that of a file on this machine is not.
    spec = recipe.streams[kind.value].model_copy(update={"file": path.name})
    recipe = recipe.model_copy(update={"streams": {kind.value: spec}})
    checked = check_session(folder, recipe=recipe, checks=SINGLE_FILE_CHECKS)

    def shorten(messages: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(message.replace(f"{folder}/", "") for message in messages)

    warnings, errors = shorten(checked.report.warnings), shorten(checked.report.errors)
    return replace(checked, report=replace(checked.report, warnings=warnings, errors=errors))


def _report_skipped(folder: SkippedFolder) -> CheckedSession:
    """Return the report of a folder that is left out: failed if it is a recording."""
    report = ValidationReport(session=folder.name, warnings=(folder.reason,))
    if folder.is_recording:
        report = ValidationReport(session=folder.name, errors=(folder.reason,))
    return CheckedSession(folder=Path(folder.name), report=report)
