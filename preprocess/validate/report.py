"""Check sessions: read each one, run every check, and collect the findings in a report.

::

    locations -> check_sessions -> repair (--fix) -> check_session -> CheckedSession
                                                     probe, CHECKS -> ValidationReport

Locations are folders of this machine, URLs (checked on local copies), and single video or sound
files. A single file is checked as the only stream of a temporary session. Nothing in a folder
raises: a session that cannot be checked gets a failed report, and the next one is checked.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from preprocess.build.sources import RemoteRecording, find_recordings
from preprocess.validate.checks import (
    check_audio,
    check_clock,
    check_drift,
    check_durations,
    check_files,
    check_length,
    check_starts,
    check_streams,
    check_text,
    check_vision,
    clock_drifts_ppm,
)
from preprocess.validate.line_checks import (
    check_gaps,
    check_lines,
    check_proprio,
    check_saturation,
    check_timestamps,
    check_touch,
    find_line_gaps,
)
from preprocess.validate.probe import probe_session
from preprocess.validate.repair import repair_session
from shared.errors import SessionError, StorageError
from shared.recipe import Stream
from shared.session.folder import (
    AUDIO_FILE,
    METADATA_FILE,
    SCANNED_FILES,
    VISION_FILES,
    find_sessions,
    is_session,
)
from shared.storage import Store, parse_location

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from preprocess.validate.checks import Finding
    from preprocess.validate.probe import SessionProbe
    from shared.recipe import Recipe

Status = Literal["passed", "warnings", "failed"]

CHECKS: Mapping[str, Callable[[SessionProbe], list[Finding]]] = {
    "files": check_files,
    "streams": check_streams,
    "lines": check_lines,
    "timestamps": check_timestamps,
    "clock": check_clock,
    "starts": check_starts,
    "gaps": check_gaps,
    "touch": check_touch,
    "proprio": check_proprio,
    "saturation": check_saturation,
    "audio": check_audio,
    "vision": check_vision,
    "durations": check_durations,
    "drift": check_drift,
    "text": check_text,
    "length": check_length,
}
"""Every check of a session, in the order of their messages."""

SINGLE_FILE_CHECKS = frozenset({"files", "gaps", "starts", "audio", "vision"})
"""Checks of a single file; the others compare streams, or need a whole session."""

SOUND_SUFFIXES = frozenset(
    {".wav", ".wave", ".aac", ".aif", ".aiff", ".caf", ".flac", ".m4a", ".mp3", ".oga", ".ogg"}
    | {".opus", ".w64", ".wma"}
)
"""Single files that are checked as sound; any other is checked as a video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """The outcome of all checks of one session."""

    session: str
    checks: Mapping[str, Status] = field(default_factory=dict)
    """Outcome of each check in :data:`CHECKS`."""
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    stats: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values: duration_s, clock_offset_s, streams, absent, and more where it applies."""

    @property
    def status(self) -> Status:
        """The worst outcome of a check."""
        return "failed" if self.errors else "warnings" if self.warnings else "passed"

    def has_failed(self, *, strict: bool) -> bool:
        """Return whether the session failed; with `strict`, warnings count as failures."""
        return bool(self.errors) or (strict and bool(self.warnings))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "session": self.session,
            "status": self.status,
            "checks": dict(self.checks),
            "warnings": list(self.warnings),
            "errors": list(self.errors),
            "stats": dict(self.stats),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedSession:
    """The report of one session, or of a location in which no session could be checked."""

    folder: Path
    """The session's files; copies of remote ones exist until the next session is requested."""
    repairs: tuple[str, ...] = ()
    report: ValidationReport
    probe: SessionProbe | None = None
    """What was read of it; None if that was not possible."""


def check_sessions(
    locations: Iterable[str], *, recipe: Recipe, fix: bool
) -> Iterator[CheckedSession]:
    """Check every session in some locations.

    Args:
        locations: folders, URLs, or single video and sound files.
        recipe: see :func:`check_session`.
        fix: repair first; folders only.
    """
    for source in _iter_sources(locations):
        if isinstance(source, CheckedSession):
            yield source
            continue
        try:
            is_repaired = fix and source.is_dir()
            repairs = tuple(repair_session(source, recipe=recipe)) if is_repaired else ()
        except SessionError as error:
            yield _make_failed_report(source, source.name, str(error))
            continue
        if source.is_file():
            with _session_of_file(source) as folder:
                yield _check_single_file(source, folder, recipe=recipe)
        else:
            yield replace(check_session(source, recipe=recipe), repairs=repairs)


def check_session(
    path: Path, *, recipe: Recipe, checks: Collection[str] = CHECKS.keys()
) -> CheckedSession:
    """Check one session folder.

    Args:
        path: the session folder.
        recipe: required streams, and sizes of sensor readings.
        checks: names of the checks to run.

    Returns:
        The report; failed, without a probe, if the folder cannot be checked.
    """
    name = path.name or path.resolve().name
    try:
        if not path.is_dir():
            raise SessionError(f"{path}: no such folder; fix: give the folder of a session")
        if not is_session(path):
            raise SessionError(
                f"{path}: not a session; fix: put {METADATA_FILE} or a recording into it"
            )
        probe = probe_session(path, recipe=recipe)
        findings = {key: check(probe) for key, check in CHECKS.items() if key in checks}
        report = _make_report(name, findings, _collect_stats(probe))
        return CheckedSession(folder=path, report=report, probe=probe)
    except SessionError as error:
        return _make_failed_report(path, name, str(error))
    except Exception as error:  # Boundary: any exception fails only this session.
        message = (
            f"{path}: cannot be checked: {type(error).__name__}: {error}; fix: look at its files"
        )
        return _make_failed_report(path, name, message)


def describe_totals(statuses: Sequence[Status], length: str) -> str:
    """Format the number of sessions, their length, and how many have each status."""
    words: dict[Status, str] = {"passed": "passed", "warnings": "with warnings", "failed": "failed"}
    counts = Counter(statuses)
    outcomes = [f"{counts[s]} {word}" for s, word in words.items() if counts[s]]
    sessions = "1 session" if len(statuses) == 1 else f"{len(statuses)} sessions"
    return f"{sessions}, {length}: {', '.join(outcomes) or 'nothing to check'}"


def _iter_sources(locations: Iterable[str]) -> Iterator[Path | CheckedSession]:
    """Yield session folders and single media files; a failed report for each bad location."""
    for text in locations:
        location = parse_location(text)
        try:
            if isinstance(location, Store):
                yield from _iter_copies(location)
            elif not location.is_file():
                yield from find_sessions(location)
            elif location.suffix in {".json", ".jsonl"}:
                raise SessionError(
                    f"{location}: not a video or sound; fix: give the folder of its session"
                )
            else:
                yield location
        except (SessionError, StorageError) as error:
            yield _make_failed_report(Path(str(location)), str(location), str(error))


def _iter_copies(store: Store) -> Iterator[Path]:
    """Copy each session of a store to a temporary folder."""
    for recording in find_recordings(store.url).values():
        assert isinstance(recording, RemoteRecording)
        with tempfile.TemporaryDirectory(prefix="session-") as folder:
            yield recording.download_to(Path(folder), SCANNED_FILES)


@contextmanager
def _session_of_file(path: Path) -> Iterator[Path]:
    """Make a temporary session folder that links to a single media file."""
    with tempfile.TemporaryDirectory(prefix="validate-") as root:
        folder = Path(root) / path.name
        folder.mkdir()
        (folder / _name_in_session(path)).symlink_to(path.absolute())
        yield folder


def _check_single_file(path: Path, folder: Path, *, recipe: Recipe) -> CheckedSession:
    """Check the session of a single media file; messages name the file itself."""
    recipe = recipe.model_copy(update={"required": ()})
    checked = check_session(folder, recipe=recipe, checks=SINGLE_FILE_CHECKS)
    name = _name_in_session(path)

    def rename(messages: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(m.replace(f"{folder}/", "").replace(name, path.name) for m in messages)

    warnings, errors = rename(checked.report.warnings), rename(checked.report.errors)
    return replace(checked, report=replace(checked.report, warnings=warnings, errors=errors))


def _name_in_session(path: Path) -> str:
    """Return the name of a media file in a session folder."""
    is_sound = path.suffix.lower() in SOUND_SUFFIXES
    return AUDIO_FILE if is_sound else VISION_FILES[Stream.VISION_LEFT]


def _make_failed_report(folder: Path, session: str, error: str) -> CheckedSession:
    """Return a failed report for a session or location that cannot be checked."""
    report = ValidationReport(session=_printable(session), errors=(_printable(error),))
    return CheckedSession(folder=folder, report=report)


def _make_report(
    session: str, findings: Mapping[str, list[Finding]], stats: Mapping[str, Any]
) -> ValidationReport:
    """Join the findings of all checks."""
    messages: dict[str, list[str]] = {"warning": [], "error": []}
    for finding in (f for of_check in findings.values() for f in of_check):
        messages[finding.level].append(_printable(finding.message))
    return ValidationReport(
        session=_printable(session),
        checks={name: _worst_status(of_check) for name, of_check in findings.items()},
        warnings=tuple(messages["warning"]),
        errors=tuple(messages["error"]),
        stats=stats,
    )


def _worst_status(findings: list[Finding]) -> Status:
    levels = {finding.level for finding in findings}
    return "failed" if "error" in levels else "warnings" if levels else "passed"


def _collect_stats(probe: SessionProbe) -> dict[str, Any]:
    """Return measurements of a session as plain JSON values."""
    stats: dict[str, Any] = {
        "length_s": round(probe.duration_s, 3),
        "clock_offset_s": round(probe.offset_s, 6),
        "streams": {
            stream.value: [round(interval.start_s, 3), round(interval.stop_s, 3)]
            for stream, interval in probe.intervals.items()
        },
        "absent": {stream.value: _printable(reason) for stream, reason in probe.absent.items()},
        "lines": dict(probe.num_lines),
        "texts": len(probe.events),
        "video": {
            stream.value: {
                "codec": video.track.codec,
                "width": video.track.width,
                "height": video.track.height,
                "frames": len(video.track.times_s),
                "frames_checked": video.num_checked,
                "frames_undecoded": len(video.undecoded),
            }
            for stream, video in probe.videos.items()
        },
    }
    intervals_s = np.diff(probe.metadata.times_s)
    if len(intervals_s):
        is_short, is_long = find_line_gaps(probe.metadata.times_s)
        duration_s = max(probe.duration_s, 1e-9)
        stats["gaps"] = {
            "median_s": round(float(np.median(intervals_s)), 6),
            "longest_s": round(float(intervals_s.max()), 6),
            "share_35_to_100_ms": round(float(intervals_s[is_short].sum()) / duration_s, 4),
            "share_over_100_ms": round(float(intervals_s[is_long].sum()) / duration_s, 4),
        }
    if probe.audio is not None:
        stats["audio"] = {
            "rms": round(probe.audio.rms, 6),
            "peak": round(probe.audio.peak, 6),
            "clipped_samples": probe.audio.num_clipped,
            "drift_ppm": {s.value: round(d) for s, d in clock_drifts_ppm(probe).items()},
        }
    return stats


def _printable(text: str) -> str:
    """Return a text that every terminal and JSON reader accepts; file names may not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
