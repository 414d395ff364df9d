"""Explain in words what a build writes, and why: one line per reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from preprocess.build.plan_types import Cause, FromShards
from shared.shardset.layout import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from preprocess.build.plan_types import Changes, Plan, Reason, ShardTask

Verb = Literal["make", "remove", "rewrite"]

PAST: dict[Verb, str] = {"make": "made", "remove": "removed", "rewrite": "rewrote"}
"""Past tense of each verb, for a build that is finished."""

_NUM_EXAMPLES = 3
"""Session names per line."""

_EXPLAINED_BY_NAMES = {Cause.NEW, Cause.SESSIONS_CHANGED}
"""Causes that add nothing to the names of the sessions."""


def explain_plan(plan: Plan) -> list[tuple[Verb, str]]:
    """List what is made, removed or only rewritten.

    An example is ``make``, ``3 of 9 dmel columns: mel.levels 16 -> 32; 120 rows made``.
    """
    lines: list[tuple[Verb, str]] = [("make", line) for line in _explain_columns(plan)]
    if plan.dropped:
        owner = "its" if len(plan.dropped) == 1 else "their"
        changes = _names(plan.dropped_changes) or f"other shards hold {owner} sessions"
        lines.append(("remove", f"{_plural(len(plan.dropped), 'shard')}: {changes}"))
    explained = {
        setting
        for task in plan.tasks
        for column in task.columns.values()
        for setting in column.reason.settings
    }
    if others := [setting for setting in plan.settings if setting not in explained]:
        lines.append(("rewrite", f"the manifest: {'; '.join(others)}"))
    return lines


def _explain_columns(plan: Plan) -> list[str]:
    """List one line for all columns that share a reason."""
    written = [column for task in plan.tasks for column in task.columns.values()]
    columns_of: dict[tuple[int, str], list[str]] = {}
    for reason in dict.fromkeys(column.reason for column in written):
        for name in COLUMNS:
            tasks = [
                t for t in plan.tasks if name in t.columns and t.columns[name].reason == reason
            ]
            if tasks:
                line = (len(tasks), _explain(reason, name, tasks))
                columns_of.setdefault(line, []).append(name)
    return [
        f"{num} of {len(plan.order)} "
        + ("shards" if len(names) == len(COLUMNS) else f"{', '.join(names)} columns")
        + f": {explanation}"
        for (num, explanation), names in columns_of.items()
    ]


def _explain(reason: Reason, column: str, tasks: Sequence[ShardTask]) -> str:
    """Format the reason, the names of the sessions, and how many rows are copied and made."""
    names = _names(*(task.columns[column].changes for task in tasks))
    num_copied = sum(_num_copied(task, column) for task in tasks)
    num_made = sum(task.num_samples for task in tasks) - num_copied
    is_explained = bool(names) and not reason.settings and reason.cause in _EXPLAINED_BY_NAMES
    rows = f"{_plural(num_made, 'row')} made"
    if num_copied:
        rows = f"{_plural(num_copied, 'row')} copied, {num_made} made"
    return "; ".join(text for text in ("" if is_explained else str(reason), names, rows) if text)


def _num_copied(task: ShardTask, column: str) -> int:
    sources = task.columns[column].sources
    copied = (
        session_windows
        for session_windows in task.sessions
        if isinstance(sources[session_windows.session], FromShards)
    )
    return sum(len(session_windows.windows) for session_windows in copied)


def _names(*changes: Changes) -> str:
    """Format changes, such as ``new: eve; removed: bob; changed: cat (audio.wav)``."""
    changed: Mapping[str, str] = {s: change for c in changes for s, change in c.changed.items()}
    groups = {
        "new": {name for c in changes for name in c.new},
        "removed": {name for c in changes for name in c.removed},
        "changed": {f"{name} ({change})" for name, change in changed.items()},
    }
    return "; ".join(f"{group}: {_examples(names)}" for group, names in groups.items() if names)


def _examples(names: Iterable[str]) -> str:
    """List the first names, and the number of the others."""
    ordered = sorted(names)
    num_others = len(ordered) - _NUM_EXAMPLES
    if num_others <= 0:
        return ", ".join(ordered)
    return f"{', '.join(ordered[:_NUM_EXAMPLES])} and {num_others} more"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
