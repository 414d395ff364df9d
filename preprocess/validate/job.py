"""Validate sessions in any place on a cluster: folders, URLs, and single files.

::

    locations -> find_jobs -> Job -> run_jobs -> ValidatedSession, in the order of the jobs

Locations are folders of this machine, URLs (checked on local copies), and single video or sound
files. A single file is checked as the only stream of a temporary session. A session whose verdict
holds (:mod:`preprocess.validate.verdicts`) is not looked at again. No session raises: one that
cannot be checked gets a failed report, or an unchecked one if the machine could not read it, and
the others are checked.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from preprocess.recordings import (
    LocalRecording,
    RemoteRecording,
    estimate_seconds,
    survey_recordings,
)
from preprocess.validate.duplicates import signature_of
from preprocess.validate.repair import repair_session
from preprocess.validate.report import (
    SINGLE_FILE_CHECKS,
    CheckedSession,
    ValidationReport,
    check_session,
    make_failed_report,
)
from preprocess.validate.verdicts import (
    Verdict,
    Verdicts,
    bases_of_recipe,
    basis_of,
    open_verdicts,
)
from shared.errors import MachineError, SessionError
from shared.files import sha256_of_file
from shared.interrupts import was_interrupted
from shared.machine import temporary_folder
from shared.recipe import Recipe
from shared.session.folder import scanned_files
from shared.session.names import SOUND_SUFFIXES
from shared.storage import Store, parse_location
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

    from preprocess.cluster import Cluster
    from preprocess.recordings import Recording
    from preprocess.validate.page import RenderedSession, ReportPage
    from preprocess.validate.probe import Depth
    from shared.session.folder import SkippedFolder

SAVE_S = 30.0
"""How often new verdicts are written, at most (seconds)."""

_LINE_SUFFIXES = frozenset({".json", ".jsonl", ".csv", ".tsv", ".parquet"})

_BYTES_PER_S: Mapping[Depth, Mapping[Kind, float]] = {
    "quick": {Kind.VIDEO: 100e6, Kind.AUDIO: 100e6},
    "full": {Kind.VIDEO: 8e6, Kind.AUDIO: 20e6},
}
_LINE_BYTES_PER_S = 5e6
"""Bytes of a stream's file that one process checks per second, roughly."""

_SESSION_S, _SINGLE_FILE_S = 0.003, 0.5
"""Seconds that any session takes at least, and a single file about."""

_Work = tuple["Recording | Path", "Verdict | None"]
"""A session or a single file, and its verdict, if that holds as long as the content is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatedSession:
    """What is known of one session, or of a location in which no session could be checked."""

    report: ValidationReport
    repairs: tuple[str, ...] = ()
    verdict: Verdict | None = None
    """What is kept of it; None if the next run has to look at it again."""
    rendered: RenderedSession | None = None
    """Its details on the page, if one is wanted and the session was looked at."""
    is_new: bool = True
    """Whether it was looked at in this run."""


_KNOWN = ValidatedSession(report=ValidationReport(session=""), is_new=False)
"""Stands for a result whose report is in its verdict."""


class Job(NamedTuple):
    """One session to validate, a single file, or the result of what can't be."""

    source: Recording | Path | ValidatedSession
    verdicts: Verdicts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How sessions are validated; plain values that can be sent between processes."""

    recipe: Recipe
    depth: Depth = "full"
    force: bool = False
    """Whether sessions are looked at although their verdicts hold."""
    fix: bool = False
    wants_page: bool = False
    bases: Mapping[Depth, str] = field(default_factory=dict)
    """What verdicts depend on; :func:`run_jobs` sets it."""


def validate_recordings(
    recordings: Mapping[str, Recording],
    *,
    recipe: Recipe,
    cluster: Cluster,
    verdicts: Verdicts,
    depth: Depth = "full",
    force: bool = False,
    fix: bool = False,
) -> Generator[ValidatedSession]:
    """Validate sessions, and keep their verdicts; yield them in order."""
    jobs = [Job(recording, verdicts) for recording in recordings.values()]
    settings = Settings(recipe=recipe, depth=depth, force=force, fix=fix)
    return run_jobs(jobs, settings, cluster=cluster)


def find_jobs(locations: Iterable[str], recipe: Recipe, *, verdicts_at: str | None) -> list[Job]:
    """Find every session in some folders or URLs, and single files.

    Verdicts are in the folder or URL `verdicts_at`, or else beside the sessions. What several
    locations have in common is found once.
    """
    jobs: list[Job] = []
    opened: dict[str, Verdicts] = {}
    locations, seen = list(dict.fromkeys(locations)), set[tuple[str, str]]()

    def is_new(source: Recording | Path) -> bool:
        key = (source.name, os.path.realpath(location_of(source)))
        is_known = key in seen
        seen.add(key)
        return not is_known

    for text in locations:
        location = parse_location(text)
        try:
            if isinstance(location, Store) or not location.is_file():
                survey = survey_recordings(text, recipe)
                if len(locations) > 1:  # which may overlap
                    own = {n: r for n, r in survey.recordings.items() if is_new(r)}
                    survey = survey._replace(recordings=own)
                if survey.recordings:
                    verdicts = open_verdicts(text, survey, folder=verdicts_at, opened=opened)
                    jobs += [Job(recording, verdicts) for recording in survey.recordings.values()]
                jobs += [Job(_report_skipped(folder)) for folder in survey.skipped]
            elif location.suffix in _LINE_SUFFIXES:
                raise SessionError(
                    f"{location}: not a video or sound; fix: give the folder of its session"
                )
            elif is_new(location.absolute()):
                jobs.append(Job(location.absolute()))
        except (SessionError, MachineError, OSError) as error:
            failed = make_failed_report(Path(str(location)), str(location), error)
            jobs.append(Job(ValidatedSession(report=failed.report)))
    return jobs


def location_of(source: Recording | Path) -> str:
    """Return the folder or URL of a session, or the path of a file."""
    if isinstance(source, RemoteRecording):
        return source.store.url
    return str(source.folder if isinstance(source, LocalRecording) else source)


def run_jobs(
    jobs: Sequence[Job], settings: Settings, *, cluster: Cluster, page: ReportPage | None = None
) -> Generator[ValidatedSession]:
    """Validate sessions; yield them in the order of the jobs, and add them to a page.

    New verdicts are written every SAVE_S seconds and at the end, also if that is an interrupt.
    """
    settings = replace(settings, bases=bases_of_recipe(settings.recipe, settings.depth))
    work = _find_work(jobs, settings, page)
    numbers, ready = list(work), dict[int, ValidatedSession]()
    outcomes, saved_s = _iterate([*work.values()], settings, cluster), time.monotonic()
    try:
        for index, job in enumerate(jobs):
            while index in work and index not in ready:
                number, outcome = next(outcomes)
                if was_interrupted():  # perhaps in a callback of a library, which failed then
                    raise KeyboardInterrupt
                done = numbers[number]
                result = _result(work[done][0], outcome)
                if page is not None:
                    _add_to_page(page, done, result)
                ready[done] = _keep(jobs[done], result)
                if time.monotonic() > saved_s + SAVE_S:
                    _save(jobs, cluster)
                    saved_s = time.monotonic()
            result = known_result(job, ready.pop(index, _KNOWN))
            if page is not None and index not in work:
                _add_to_page(page, index, result)
            yield result
    finally:
        _save(jobs, cluster)


def _keep(job: Job, result: ValidatedSession) -> ValidatedSession:
    """Keep the verdict, and leave in the result only what it lacks, as many results may wait."""
    if job.verdicts is None or result.verdict is None:
        return replace(result, rendered=None)
    verdict = result.verdict
    if "full" not in verdict.bases and (old := job.verdicts.get(verdict.session)) is not None:
        is_same = (old.sha256, old.bases.get("quick")) == (verdict.sha256, verdict.bases["quick"])
        if is_same and "full" in old.bases:  # it took longer, and counts as a quick one
            job.verdicts.add(replace(old, stamp=verdict.stamp))
            return replace(result, rendered=None)
    job.verdicts.add(verdict)
    return replace(_KNOWN, repairs=result.repairs, is_new=result.is_new)


def known_result(job: Job, result: ValidatedSession = _KNOWN) -> ValidatedSession:
    """Return what is known of a job without looking at it; a result gets its verdict back."""
    if isinstance(job.source, ValidatedSession):
        return job.source
    if job.verdicts is None or result.report is not _KNOWN.report:
        return result
    verdict = job.verdicts.get(job.source.name)
    assert verdict is not None
    return replace(result, report=verdict.report, verdict=verdict)


def _find_work(
    jobs: Sequence[Job], settings: Settings, page: ReportPage | None
) -> dict[int, _Work]:
    """Return the work of each job whose session has to be looked at, by the job's number."""
    work: dict[int, _Work] = {}
    recipe_basis = settings.bases[settings.depth]
    for index, (source, verdicts) in enumerate(jobs):
        if isinstance(source, ValidatedSession):
            continue
        known = None
        if verdicts is not None and not isinstance(source, Path) and not settings.force:
            known = verdicts.get(source.name)
        if known is not None:
            assert not isinstance(source, Path)
            is_current = known.bases.get(settings.depth) == basis_of(source, recipe_basis)
            has_page = page is None or page.has_details(known.report.session, known.key)
            needs_repair = settings.fix and known.report.status != "passed"
            known = known if is_current and has_page else None
            if known is not None and known.stamp == source.stamp and not needs_repair:
                continue
        work[index] = (source, known)
    return work


def _iterate(
    work: Sequence[_Work], settings: Settings, cluster: Cluster
) -> Iterator[tuple[int, ValidatedSession | Exception]]:
    """Yield number and outcome of each session as it ends; a single one runs in this process."""
    function = partial(_validate, settings=settings)
    if len(work) == 1:
        return iter([(0, function(work[0]))])
    weights = [_seconds(source, settings) for source, _ in work]
    return cluster.iterate(function, work, label="validate", weights=weights)


def _seconds(source: Recording | Path, settings: Settings) -> float:
    """Estimate how long one process takes to check a session or a file."""
    if isinstance(source, Path):
        return _SINGLE_FILE_S
    rates = _BYTES_PER_S[settings.depth]
    return _SESSION_S + estimate_seconds(source, settings.recipe, rates, _LINE_BYTES_PER_S)


def _result(source: Recording | Path, outcome: ValidatedSession | Exception) -> ValidatedSession:
    """Return the result of a call; if its worker died, an unchecked session."""
    if isinstance(outcome, ValidatedSession):
        return outcome
    error = MachineError(f"{source.name}: not checked: {outcome}")
    return ValidatedSession(report=make_failed_report(Path(source.name), source.name, error).report)


def _add_to_page(page: ReportPage, number: int, result: ValidatedSession) -> None:
    """Add a result to the page; of a session that was not looked at, it has the details."""
    key = result.verdict.key if result.verdict is not None else ""
    if result.is_new:
        failed = CheckedSession(folder=Path(), report=result.report)
        page.add(result.rendered or _render(failed), key, number=number)
    else:
        page.keep(result.report, key, number=number)


def _render(checked: CheckedSession) -> RenderedSession:
    from preprocess.validate.page import render_session  # loads jinja2

    return render_session(checked)


def _save(jobs: Sequence[Job], cluster: Cluster) -> None:
    """Write the new verdicts."""
    for verdicts in {id(job.verdicts): job.verdicts for job in jobs}.values():
        if verdicts is not None and (warning := verdicts.save()):
            cluster.log(warning)


def _validate(work: _Work, *, settings: Settings) -> ValidatedSession:
    """Repair, if asked, and check a session; runs in any process."""
    source, known = work
    with ExitStack() as stack:
        folder = Path(source.name)
        try:
            if isinstance(source, LocalRecording):
                return _validate_folder(source.folder, source, known, settings)
            folder = stack.enter_context(temporary_folder("validate-", "copies of sessions"))
            if isinstance(source, RemoteRecording):
                folder = source.download_to(folder, scanned_files(settings.recipe))
                return _validate_folder(folder, source, known, settings)
            checked = _check_single_file(source, folder / source.name, settings.depth)
        except Exception as error:  # Boundary: any exception fails only this session.
            checked = make_failed_report(folder, source.name, error)
        return _finish(checked, settings)


def _validate_folder(
    folder: Path, recording: Recording, known: Verdict | None, settings: Settings
) -> ValidatedSession:
    """Repair, if asked, and check a session whose files are in a folder."""
    recipe = settings.recipe
    repairs = repair_session(folder, recipe=recipe) if settings.fix else []
    if repairs:  # the files are others now
        [recording] = survey_recordings(folder, recipe).recordings.values()
    sha256 = _hash_files(folder, recording, known, scanned_files(recipe))
    if known is not None and known.sha256 == sha256 and not repairs:
        known = replace(known, stamp=recording.stamp)
        return ValidatedSession(report=known.report, verdict=known, is_new=False)
    checked = check_session(folder, recipe=recipe, unused=recording.unused, depth=settings.depth)
    verdict = None
    if sha256 is not None and checked.probe is not None:
        verdict = Verdict(
            session=recording.name,
            stamp=recording.stamp,
            sha256=sha256,
            bases={d: basis_of(recording, basis) for d, basis in settings.bases.items()},
            report=checked.report,
            signature=signature_of(checked.probe),
        )
    return replace(_finish(checked, settings), repairs=tuple(repairs), verdict=verdict)


def _finish(checked: CheckedSession, settings: Settings) -> ValidatedSession:
    """Return the result of a session that was looked at, rendered if a page is wanted."""
    rendered = _render(checked) if settings.wants_page else None
    return ValidatedSession(report=checked.report, rendered=rendered)


def _hash_files(
    folder: Path, recording: Recording, known: Verdict | None, names: Iterable[str]
) -> dict[str, str] | None:
    """Return the SHA-256 of each file; None if one can't be read now, and later perhaps can."""
    hashes: dict[str, str] = {}
    for name in names:
        path, stamp = folder / name, recording.stamp.get(name)
        if stamp is not None and known is not None and known.stamp.get(name) == stamp:
            hashes[name] = known.sha256[name]
        elif stamp is not None or path.is_symlink():
            try:
                if not path.is_file():
                    return None
                hashes[name] = sha256_of_file(path)
            except OSError:
                return None
    return hashes


def _check_single_file(path: Path, folder: Path, depth: Depth) -> CheckedSession:
    """Check a single media file, linked into a new session folder, with a recipe of one stream."""
    folder.mkdir()
    (folder / path.name).symlink_to(path)
    kind = Kind.AUDIO if path.suffix.lower() in SOUND_SUFFIXES else Kind.VIDEO
    recipe = Recipe.model_validate({"streams": {kind.value: {"kind": kind, "file": "file"}}})
    # The name of a recipe's file is restricted; that of a file on this machine is not.
    spec = recipe.streams[kind.value].model_copy(update={"file": path.name})
    recipe = recipe.model_copy(update={"streams": {kind.value: spec}})
    checked = check_session(folder, recipe=recipe, checks=SINGLE_FILE_CHECKS, depth=depth)

    def shorten(messages: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(message.replace(f"{folder}/", "") for message in messages)

    warnings, errors = shorten(checked.report.warnings), shorten(checked.report.errors)
    return replace(checked, report=replace(checked.report, warnings=warnings, errors=errors))


def _report_skipped(folder: SkippedFolder) -> ValidatedSession:
    """Return the report of a folder that is left out: failed if it is a recording."""
    report = ValidationReport(session=folder.name, warnings=(folder.reason,))
    if folder.is_recording:
        report = ValidationReport(session=folder.name, errors=(folder.reason,))
    return ValidatedSession(report=report)
