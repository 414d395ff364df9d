"""Describe what ``--fix`` does to a session, for the repair itself and for messages that advise it.

Messages never promise a repair by a rule of their own: they ask the plan, which is made by the code
that repairs.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import BinaryIO

    Content = bytes | Callable[[BinaryIO], object]
    """The bytes of a file, or what writes them."""


class RepairKind(enum.StrEnum):
    """What a repair does."""

    ENCODE = "encode"
    SPLIT = "split"
    NUMBERS = "numbers"
    UNITS = "units"
    JUMP = "jump"
    STRETCH = "stretch"
    DROP = "drop"
    SORT = "sort"
    SHIFT = "shift"
    TRIM = "trim"
    CLAMP = "clamp"
    SPREAD = "spread"
    JOIN = "join"
    FILL = "fill"
    SIZES = "sizes"


@dataclass(frozen=True, slots=True)
class Repair:
    """One repair of some files, and the sentence that says what was done."""

    kind: RepairKind
    files: tuple[str, ...]
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairPlan:
    """What --fix does to a session, and why it does not do more."""

    repairs: tuple[Repair, ...] = ()
    contents: Mapping[str, Content] = field(default_factory=dict)
    """New content of each file that changes."""
    blocked: Mapping[str, str] = field(default_factory=dict)
    """Why a file that has a fault cannot be changed, if it cannot."""

    def covers(self, kind: RepairKind, file: str) -> bool:
        """Return whether --fix does this to a file."""
        return any(kind is repair.kind and file in repair.files for repair in self.repairs)

    def advise(self, kind: RepairKind, file: str, action: str, *, otherwise: str = "") -> str:
        """Return an action against a fault of a file: with --fix if that does it, else by hand."""
        if self.covers(kind, file):
            return f"{action} with --fix"
        reason = self.blocked.get(file)
        return (otherwise or action) + (f" (--fix does not: {reason})" if reason else "")
