"""What a check says of a session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shared.session.folder import ParseIssue

Level = Literal["warning", "error"]

MAX_MESSAGES = 5
"""So many messages of one kind; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth saying about a session."""

    level: Level
    message: str


def limited(level: Level, messages: Iterable[str]) -> list[Finding]:
    """Findings of one kind: the first few, and how many more there are."""
    every = list(messages)
    findings = [Finding(level, message) for message in every[:MAX_MESSAGES]]
    if len(every) > MAX_MESSAGES:
        kind = every[0].split(" ", 1)[0].rstrip(":")
        findings.append(Finding(level, f"{kind}: {len(every) - MAX_MESSAGES} more like these"))
    return findings


def say(issue: ParseIssue, mend: str) -> str:
    """File, line and issue in one sentence with its mend."""
    return f"{issue.file} line {issue.line}: {issue.message}; {mend}"
