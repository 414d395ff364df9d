"""The verdict on one session: read it, run every check, write a report.

``validate_session`` never raises for what lies in a folder: it is one of the borders where
everything is caught, and a session that can't be judged has failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from preprocess.validate.checks import CHECKS, clock_drifts_ppm
from preprocess.validate.line_checks import GAP_ERROR_S, GAP_WARNING_S
from preprocess.validate.probe import probe_session
from shared.errors import SessionError
from shared.session.folder import METADATA_FILE, is_session

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from preprocess.validate.findings import Finding
    from preprocess.validate.probe import SessionProbe
    from shared.recipe import Recipe

Status = Literal["passed", "warnings", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The verdict on one session."""

    session: str
    checks: Mapping[str, Status] = field(default_factory=dict)
    """What each check of :data:`preprocess.validate.checks.CHECKS` came to."""
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    stats: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values: length_s, clock_offset_s, streams, absent, and more where it applies."""

    @property
    def status(self) -> Status:
        """The worst that was found."""
        return "failed" if self.errors else "warnings" if self.warnings else "passed"

    def has_failed(self, *, strict: bool) -> bool:
        """Whether the session failed; with `strict`, warnings are failures."""
        return bool(self.errors) or (strict and bool(self.warnings))

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "session": self.session,
            "status": self.status,
            "checks": dict(self.checks),
            "warnings": list(self.warnings),
            "errors": list(self.errors),
            "stats": dict(self.stats),
        }


def validate_session(path: Path, *, recipe: Recipe) -> Report:
    """Judge one session folder.

    Args:
        path: the session folder.
        recipe: says which streams are required and how large sensor readings are.

    Returns:
        The report; a folder that can't even be judged gives a failed one.
    """
    return check_session(path, recipe=recipe)[0]


def check_session(
    path: Path, *, recipe: Recipe, only: Collection[str] = CHECKS.keys()
) -> tuple[Report, SessionProbe | None]:
    """As :func:`validate_session`, by some of the checks, with what was read; None where it could
    not be.
    """
    session = _printable(path.name or path.resolve().name)
    try:
        if not path.is_dir():
            raise SessionError(f"{path}: no such folder; give the folder of a session")
        if not is_session(path):
            raise SessionError(f"{path}: no session; {METADATA_FILE} or a recording must be in it")
        evidence = probe_session(path, recipe=recipe)
        findings = {name: check(evidence) for name, check in CHECKS.items() if name in only}
        return _report(session, findings, _stats(evidence)), evidence
    except SessionError as error:
        return Report(session=session, errors=(_printable(str(error)),)), None
    except Exception as error:  # the border of a session: whatever it is, the next one is judged
        what = f"{path}: can't be judged: {type(error).__name__}: {error}; look at its files"
        return Report(session=session, errors=(_printable(what),)), None


def failed_report(session: str, reason: str) -> Report:
    """The report on what could not be judged at all."""
    return Report(session=_printable(session), errors=(_printable(reason),))


def _report(
    session: str, findings: Mapping[str, list[Finding]], stats: Mapping[str, Any]
) -> Report:
    """The findings of all checks as one report."""
    every = [finding for found in findings.values() for finding in found]
    return Report(
        session=session,
        checks={name: _worst(found) for name, found in findings.items()},
        warnings=tuple(_printable(f.message) for f in every if f.level == "warning"),
        errors=tuple(_printable(f.message) for f in every if f.level == "error"),
        stats=stats,
    )


def _worst(findings: list[Finding]) -> Status:
    levels = {finding.level for finding in findings}
    return "failed" if "error" in levels else "warnings" if levels else "passed"


def _stats(evidence: SessionProbe) -> dict[str, Any]:
    """Facts of a session as plain JSON values."""
    steps_s = np.diff(evidence.metadata.times_s)
    length_s = max(evidence.length_s, 1e-9)
    stats: dict[str, Any] = {
        "length_s": round(evidence.length_s, 3),
        "clock_offset_s": round(evidence.offset_s, 6),
        "streams": {
            stream.value: [round(interval.start_s, 3), round(interval.stop_s, 3)]
            for stream, interval in evidence.intervals.items()
        },
        "absent": {stream.value: _printable(why) for stream, why in evidence.absent.items()},
        "lines": dict(evidence.num_lines),
        "texts": len(evidence.events),
        "video": {
            stream.value: {
                "codec": picture.track.codec,
                "width": picture.track.width,
                "height": picture.track.height,
                "frames": len(picture.track.times_s),
                "frames_checked": picture.num_checked,
                "frames_undecoded": len(picture.undecoded),
            }
            for stream, picture in evidence.pictures.items()
        },
    }
    if len(steps_s):
        is_long = steps_s > GAP_ERROR_S
        is_short = (steps_s >= GAP_WARNING_S) & ~is_long
        stats["gaps"] = {
            "median_s": round(float(np.median(steps_s)), 6),
            "longest_s": round(float(steps_s.max()), 6),
            "share_35_to_100_ms": round(float(steps_s[is_short].sum()) / length_s, 4),
            "share_over_100_ms": round(float(steps_s[is_long].sum()) / length_s, 4),
        }
    if evidence.sound is not None:
        sound = evidence.sound
        stats["audio"] = {
            "rms": round(sound.rms, 6),
            "peak": round(sound.peak, 6),
            "clipped_samples": sound.num_clipped,
            "drift_ppm": {s.value: round(d) for s, d in clock_drifts_ppm(evidence).items()},
        }
    return stats


def _printable(text: str) -> str:
    """Text that any terminal and JSON reader takes: file names may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
