"""What a build makes, and why, in words: one line per reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from shared.shardset.layout import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from preprocess.build.shards import Changes, Plan, ShardTask

Verb = Literal["make", "remove", "rewrite"]

PAST: dict[Verb, str] = {"make": "made", "remove": "removed", "rewrite": "rewrote"}
"""The verbs when it is done."""

_NUM_EXAMPLES = 3
"""How many names of sessions a line has."""

_SAID_BY_CHANGES = {"new", "its sessions changed"}
"""Causes that say nothing more than the names of the sessions."""


def reasons(plan: Plan) -> list[tuple[Verb, str]]:
    """What is made, removed or only rewritten, such as ``make``, ``3 of 9 dmel columns: mel.levels
    16 -> 32; 120 rows made``.
    """
    total = len(plan.order)
    lines: list[tuple[Verb, str]] = [("make", line) for line in _made(plan.tasks, total)]
    num_bare = sum(not task.due for task in plan.tasks)
    if num_bare and plan.upgrade is None:
        lines.append(
            (
                "rewrite",
                f"{num_bare} of {total} indexes: they lack hashes or statistics of their sessions",
            )
        )
    if plan.dropped:
        whose = "its" if len(plan.dropped) == 1 else "their"
        why = _names(plan.dropped_changes) or f"{whose} sessions lie in others"
        lines.append(("remove", f"{_counted(len(plan.dropped), 'shard')}: {why}"))
    causes = {part for task in plan.tasks for why in task.due.values() for part in why.split("; ")}
    if rest := [change for change in plan.settings if change not in causes]:
        lines.append(("rewrite", f"the manifest: {'; '.join(rest)}"))
    return lines


def _made(tasks: Sequence[ShardTask], total: int) -> list[str]:
    """Columns that share a reason stand in one line."""
    columns_of: dict[tuple[int, str], list[str]] = {}
    for cause in dict.fromkeys(why for task in tasks for why in task.due.values()):
        for column in COLUMNS:
            own = [task for task in tasks if task.due.get(column) == cause]
            if own:
                line = (len(own), _why(cause, column, own))
                columns_of.setdefault(line, []).append(column)
    return [
        f"{num} of {total} "
        + ("shards" if len(columns) == len(COLUMNS) else f"{', '.join(columns)} columns")
        + f": {why}"
        for (num, why), columns in columns_of.items()
    ]


def _why(cause: str, column: str, tasks: Sequence[ShardTask]) -> str:
    """The cause, the sessions' names, and how many rows are copied and made."""
    names = _names(*(task.changes[column] for task in tasks if column in task.changes))
    copied = sum(_num_copied(task, column) for task in tasks)
    made = sum(task.num_samples for task in tasks) - copied
    rows = f"{_counted(copied, 'row')} copied, {made} made" if copied else ""
    parts = [
        "" if names and cause in _SAID_BY_CHANGES else cause,
        names,
        rows or f"{_counted(made, 'row')} made",
    ]
    return "; ".join(part for part in parts if part)


def _num_copied(task: ShardTask, column: str) -> int:
    copied = task.copied.get(column, {})
    return sum(len(piece.windows) for piece in task.slices if piece.session in copied)


def _names(*changes: Changes) -> str:
    """``new: eve; removed: bob; changed: cat (audio.wav)``."""
    changed: Mapping[str, str] = {s: what for c in changes for s, what in c.changed.items()}
    groups = {
        "new": {name for c in changes for name in c.new},
        "removed": {name for c in changes for name in c.removed},
        "changed": {f"{name} ({what})" for name, what in changed.items()},
    }
    return "; ".join(f"{group}: {_some(names)}" for group, names in groups.items() if names)


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - _NUM_EXAMPLES
    if rest <= 0:
        return ", ".join(ordered)
    return f"{', '.join(ordered[:_NUM_EXAMPLES])} and {rest} more"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
