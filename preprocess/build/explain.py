"""Explain in words what a build writes, and why: one line per reason."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from preprocess.build.packing import shard_segments
from preprocess.build.plan_types import Cause, FromShards
from shared.session.names import describe_unused

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from preprocess.build.plan_types import Changes, Plan, Reason, ShardTask
    from shared.session.folder import SkippedFolder
    from shared.session.names import UnusedName
    from shared.session.scan import SessionScan
    from shared.shardset.manifest import Manifest

Verb = Literal["make", "remove", "rewrite"]

PAST: dict[Verb, str] = {"make": "made", "remove": "removed", "rewrite": "rewrote"}
"""Past tense of each verb, for a build that is finished."""

_NUM_EXAMPLES = 3
"""Session names per line."""

_EXPLAINED_BY_NAMES = {Cause.NEW, Cause.SESSIONS_CHANGED}
"""Causes that add nothing to the names of the sessions."""

_READ_WINDOW_S, _NUM_READERS = 4.0, 2
"""Length of a window and loader processes of a training, by the defaults of its configuration."""

_OPEN_S, _OPEN_STREAM_S = 0.4e-3, 0.15e-3
_WINDOW_S, _STREAM_S, _PICTURE_S, _PIXEL_S = 0.1e-3, 75e-6, 12e-6, 2.6e-9
"""CPU time that a loader process takes to open a shard, and for each of its streams; and to read a
window, for each stream, picture and pixel. Fitted to what tests/benchmarks/bench_growth.py measures
(docs/building.md); their ratios count."""

_WORTH_COMPACTING, _WORTH_COMPACTING_S = 0.1, 0.25
"""Share and seconds of an epoch from which compaction is advised."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What no sample shows of a stream for one reason."""

    stream: str
    reason: str
    seconds: float
    num_sessions: int

    def __str__(self) -> str:
        sessions = _plural(self.num_sessions, "session")
        return f"{self.stream}: {self.reason}, {self.seconds:.1f} s in {sessions}"


def list_losses(
    scans: Mapping[str, SessionScan],
    decode_failures: Iterable[Mapping[str, Any]],
    segment_s: float,
) -> tuple[Loss, ...]:
    """Sum up by stream and reason what is masked, unreadable or does not decode."""
    lost: defaultdict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for name, scan in scans.items():
        for stream in scan.absent.keys() - scan.not_recorded:
            lost[stream, "unreadable"].append((scan.duration_s, name))
        for stream, spans in scan.masked.items():
            for span in spans:
                length_s = min(span.stop_s, scan.duration_s) - max(0.0, span.start_s)
                lost[stream, span.reason].append((max(0.0, length_s), name))
    for failure in decode_failures:
        length_s = failure.get("stop_s", segment_s) - failure.get("start_s", 0.0)
        lost[failure["stream"], "does not decode"].append((length_s, failure["session"]))
    return tuple(
        Loss(stream, reason, sum(s for s, _ in own), len({name for _, name in own}))
        for (stream, reason), own in sorted(lost.items())
    )


def explain_unused(unused: Mapping[str, Sequence[UnusedName]]) -> tuple[list[str], str]:
    """Describe unused names: a sentence for each name that was meant, and one for all others."""
    sessions: dict[str, list[str]] = {}
    others: set[UnusedName] = set()
    num_others = 0
    for session, names in unused.items():
        for sentence in describe_unused(names)[0].values():
            sessions.setdefault(sentence, []).append(session)
        own = {name for name in names if not name.meant}
        others |= own
        num_others += bool(own)
    meant = [f"{sentence} ({_examples(names)})" for sentence, names in sessions.items()]
    listed = describe_unused(sorted(others, key=lambda name: (name.file, name.key)))[1]
    return meant, f"{listed} ({_plural(num_others, 'session')})" if listed else ""


def explain_left_out(folders: Sequence[SkippedFolder], num_sessions: int) -> list[str]:
    """Say in one line which sessions are left out because of their verdict; [] if none is."""
    if not folders:
        return []
    first, sessions = folders[0], _plural(num_sessions, "session")
    names = _examples(folder.name for folder in folders)
    reason = f"{first.name} {first.reason}"
    return [f"left out by their verdict, {len(folders)} of {sessions}: {names}; {reason}"]


def advise_compaction(manifest: Manifest) -> str:
    """Say how much faster a training would read a compacted set; empty if that is little.

    A set has many small shards if sessions were added by many builds. Each loader process opens a
    shard again in every epoch.
    """
    shards, recipe = manifest.in_split("train"), manifest.recipe
    runs = [run for shard in shards for run in shard.runs]
    windows = [
        sum(math.ceil(run * recipe.segment_s / _READ_WINDOW_S) for run in shard.runs)
        for shard in shards
    ]
    # Fill shards with the runs, each whole, as packing does with sessions.
    num_packed, num_free = 0, 0
    for run in runs:
        if run > num_free:
            num_packed, num_free = num_packed + 1, shard_segments(recipe)
        num_free -= run
    open_s = _OPEN_S + _OPEN_STREAM_S * len(recipe.streams)
    window_s = _WINDOW_S + _STREAM_S * len(recipe.streams)
    for spec in recipe.videos.values():
        picture_s = _PICTURE_S + _PIXEL_S * spec.height * spec.width
        window_s += _READ_WINDOW_S * spec.rate_hz * picture_s
    # Each window goes to any of the processes, which opens its shard if it has none of it yet.
    num_opened = sum(_NUM_READERS * (1 - (1 - 1 / _NUM_READERS) ** count) for count in windows)
    packed_s = min(_NUM_READERS * num_packed, num_opened) * open_s
    more_s, read_s = num_opened * open_s - packed_s, sum(windows) * window_s + packed_s
    if more_s < _WORTH_COMPACTING_S or more_s < _WORTH_COMPACTING * read_s:
        return ""
    size = sum(shard.length_bytes for shard in manifest.shards) / 2**20
    return (
        f"{len(shards)} shards for training where about {num_packed} would do: an epoch takes "
        f"about {more_s / read_s:.0%} longer to read, as opening them takes "
        f"{more_s:.1f} s more (estimated for {_NUM_READERS} loader processes); fix: run it once "
        f"with --compact, which copies {size:.0f} MiB and decodes nothing"
    )


def explain_plan(plan: Plan) -> list[tuple[Verb, str]]:
    """List what is made, removed or only rewritten.

    An example is ``make``, ``3 of 9 dmel columns: mel.levels 16 -> 32; 120 rows made``.
    """
    lines: list[tuple[Verb, str]] = [("make", line) for line in _explain_columns(plan)]
    # The columns whose streams are not declared any more, with the settings that say so.
    if removed := sorted({name for task in plan.tasks for name in task.removed}):
        num = sum(bool(task.removed) for task in plan.tasks)
        settings = "; ".join(s for s in plan.settings if s.endswith(" removed"))
        columns = f"{num} of {len(plan.order)} {', '.join(removed)} columns"
        lines.append(("remove", f"{columns}: {settings}"))
    if num := sum(task.has_new_verdicts for task in plan.tasks if not task.columns):
        lines.append(("rewrite", f"{num} of {len(plan.order)} indexes: verdicts of their sessions"))
    if plan.dropped:
        owner = "its" if len(plan.dropped) == 1 else "their"
        changes = _names(plan.dropped_changes) or f"other shards hold {owner} sessions"
        lines.append(("remove", f"{_plural(len(plan.dropped), 'shard')}: {changes}"))
    explained = " ".join(line for _, line in lines)
    if others := [s for s in plan.settings if f"{s.partition(' ')[0]} " not in explained]:
        lines.append(("rewrite", f"the manifest: {'; '.join(others)}"))
    return lines


def _explain_columns(plan: Plan) -> list[str]:
    """List one line for all columns that share a reason."""
    written = [(name, column) for task in plan.tasks for name, column in task.columns.items()]
    names = sorted({name for name, _ in written} | {n for t in plan.tasks for n in t.kept})
    columns_of: dict[tuple[int, str], list[str]] = {}
    for reason in dict.fromkeys(column.reason for _, column in written):
        for name in names:
            tasks = [
                t for t in plan.tasks if name in t.columns and t.columns[name].reason == reason
            ]
            if tasks:
                line = (len(tasks), _explain(reason, name, tasks))
                columns_of.setdefault(line, []).append(name)
    return [
        f"{num} of {len(plan.order)} "
        + ("shards" if columns == names else f"{', '.join(columns)} columns")
        + f": {explanation}"
        for (num, explanation), columns in columns_of.items()
    ]


def _explain(reason: Reason, column: str, tasks: Sequence[ShardTask]) -> str:
    """Format the reason, the names of the sessions, and how many rows are copied and made."""
    names = _names(*(task.columns[column].changes for task in tasks))
    num_copied = sum(
        len(stored.segments)
        for task in tasks
        for stored in task.sessions
        if isinstance(task.columns[column].sources[stored.session], FromShards)
    )
    num_made = sum(task.num_samples for task in tasks) - num_copied
    is_explained = bool(names) and not reason.settings and reason.cause in _EXPLAINED_BY_NAMES
    rows = f"{_plural(num_made, 'row')} made"
    if num_copied:
        rows = f"{_plural(num_copied, 'row')} copied, {num_made} made"
    return "; ".join(text for text in ("" if is_explained else str(reason), names, rows) if text)


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
