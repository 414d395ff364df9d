"""Choose the sessions of a build by their verdicts (``shards --only``).

Sessions whose verdict does not hold are validated first. What validation found is written into the
flags of each sample; see :data:`shared.shardset.index.VERDICT_BITS`.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from shared.errors import MachineError, SessionError
from shared.session.folder import SkippedFolder
from shared.shardset.index import VERDICT_BITS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from preprocess.cluster import Cluster
    from preprocess.recordings import Recording, Survey
    from preprocess.validate.report import ValidationReport
    from shared.recipe import Recipe

Only = Literal["passed", "warnings", "any"]
"""The worst verdict of a session that is used; `any` uses all, and writes their flags."""

_USED: Mapping[Only, tuple[str, ...]] = {
    "passed": ("passed",),
    "warnings": ("passed", "warnings"),
    "any": ("passed", "warnings", "failed"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenSessions:
    """The sessions that a build uses."""

    recordings: Mapping[str, Recording]
    left_out: tuple[SkippedFolder, ...] = ()
    """Recordings whose verdict is too bad."""
    verdicts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Session -> stream -> bits of VERDICT_BITS."""


def choose_sessions(
    location: Path | str,
    survey: Survey,
    *,
    only: Only,
    verdicts_at: str | None,
    recipe: Recipe,
    cluster: Cluster,
) -> ChosenSessions:
    """Validate the sessions that changed since they were, and choose those that are good enough.

    Raises:
        SessionError: none is.
        MachineError: a session could not be read, so that its verdict is not known.
    """
    from preprocess.validate.job import validate_recordings  # loads all checks
    from preprocess.validate.verdicts import open_verdicts

    kept = open_verdicts(location, survey, folder=verdicts_at)
    used: dict[str, Recording] = {}
    left_out: list[SkippedFolder] = []
    verdicts: dict[str, dict[str, int]] = {}
    unchecked: list[str] = []
    results = validate_recordings(survey.recordings, recipe=recipe, cluster=cluster, verdicts=kept)
    with closing(results):
        for (name, recording), result in zip(survey.recordings.items(), results, strict=True):
            report = result.report
            if report.is_unchecked:
                unchecked += report.errors
            elif report.status in _USED[only]:
                used[name] = recording
                verdicts[name] = bits_of(report)
            else:
                left_out.append(_leave_out(report, only))
    if unchecked:
        raise MachineError(
            f"{len(unchecked)} of {len(survey.recordings)} sessions could not be checked, as "
            f"--only {only} asks: {unchecked[0]}"
        )
    if not used:
        raise SessionError(
            f"{location}: --only {only} leaves out all {len(left_out)} sessions, such as "
            f"{left_out[0].name}: {left_out[0].reason}; fix: correct what `python -m preprocess "
            "validate` says of them, or allow more (--only warnings, --only any)"
        )
    return ChosenSessions(recordings=used, left_out=tuple(left_out), verdicts=verdicts)


def bits_of(report: ValidationReport) -> dict[str, int]:
    """Return the bits of each stream's verdict; that of the session if no stream explains it."""
    is_explained = report.status in report.streams.values()
    return {
        stream: VERDICT_BITS["checked"]
        | VERDICT_BITS.get(status if is_explained else report.status, 0)
        for stream, status in report.streams.items()
    }


def _leave_out(report: ValidationReport, only: Only) -> SkippedFolder:
    """Say why a session is left out."""
    messages = [*report.errors, *report.warnings]
    others = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
    reason = f"{report.status}, --only {only}: {messages[0]}{others}"
    return SkippedFolder(name=report.session, reason=reason, is_recording=True)
