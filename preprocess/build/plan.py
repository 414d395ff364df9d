"""Plan a build from scans, the recipe and the previous set. Pure: reads and writes nothing.

Sessions keep the shards that hold them. New sessions make new shards; a changed session is rebuilt
in its shard, a removed session leaves its shard. A column of a shard is written only if its
fingerprint changed; the other columns are not even opened. Changing the window, split or shard
section (or `--compact`) repacks everything; rows that would come out identical are copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preprocess.build.packing import (
    PACKING_SECTIONS,
    keep_previous_shards,
    pack,
    recover_lost_shards,
    repack,
    sample_windows,
)
from preprocess.build.plan_types import (
    BuiltShard,
    Cause,
    Changes,
    ColumnTask,
    Plan,
    Reason,
    ShardTask,
)
from preprocess.build.previous_set import PreviousRows, recipe_part, row_hash
from shared.files import fingerprint_of
from shared.recipe import SPLITS
from shared.shardset.layout import COLUMNS, column_basis

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from preprocess.build.packing import Samples
    from preprocess.build.plan_types import (
        BuiltColumn,
        PlannedShard,
        PreviousSet,
        SessionWindows,
    )
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan
    from shared.shardset.layout import Column


def plan_shards(
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
    *,
    tokenizer_sha256: str,
    previous: PreviousSet | None = None,
    compacts: bool = False,
) -> Plan:
    """Plan a build.

    Args:
        scans: every session, by name.
        recipe: the recipe to build by.
        tokenizer_sha256: hash of the tokenizer that encodes the text.
        previous: the set to update, if any.
        compacts: pack as a fresh build would, whatever the previous shards hold.
    """
    # Decide which shard holds which windows.
    samples = {name: sample_windows(scan, recipe) for name, scan in sorted(scans.items())}
    settings = () if previous is None else recipe_changes(previous.recipe, recipe)
    repacking = tuple(s for s in settings if s.partition(".")[0] in PACKING_SECTIONS)
    shards = () if previous is None else _with_recovered(previous, samples, recipe)
    if repacking:
        planned = pack(list(samples), samples, recipe)
    elif compacts:
        planned = repack(shards, samples, recipe)
    else:
        planned = _update(shards, samples, recipe)
    planned.sort(key=_order)
    context = _Context(
        scans=scans,
        recipe=recipe,
        tokenizer_sha256=tokenizer_sha256,
        samples=samples,
        rows=PreviousRows(shards, scans, recipe),
        settings=settings,
        reason_if_new=Reason(
            Cause.REPACKED if compacts and shards else Cause.NEW, settings=repacking
        ),
        generation=0 if previous is None else previous.generation + 1,
    )
    # Decide which columns of each shard are written.
    tasks, unchanged = [], []
    for shard in planned:
        task = _plan_shard(shard, context)
        if shard.previous is None or task.columns:
            tasks.append(task)
        else:
            unchanged.append(shard.previous)
    # Previous shards that the new set does not have, readable or not.
    names = {shard.name for shard in planned}
    dropped = {s.name: s.sessions for s in shards if s.name not in names}
    for entry in () if previous is None else previous.lost:
        if entry.name not in names:
            dropped.setdefault(entry.name, ())
    dropped_sessions = [
        session_windows for sessions in dropped.values() for session_windows in sessions
    ]
    return Plan(
        tasks=tuple(tasks),
        unchanged=tuple(unchanged),
        dropped=tuple(dropped),
        dropped_changes=_find_changes(dropped_sessions, context),
        order=tuple(shard.name for shard in planned),
        settings=settings,
    )


def recipe_changes(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """Describe each changed key of a recipe as ``section.key old -> new``."""
    return setting_changes(_flatten(before), _flatten(after))


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Describe each changed setting as ``key old -> new``."""
    return tuple(
        f"{key} {_short_repr(before.get(key))} -> {_short_repr(value)}"
        for key, value in after.items()
        if before.get(key) != value
    )


def _flatten(recipe: Recipe) -> dict[str, Any]:
    """Flatten a recipe to ``section.key`` -> value."""
    flat: dict[str, Any] = {}
    for name, value in recipe.as_json().items():
        is_section = isinstance(value, dict)
        flat |= {f"{name}.{k}": v for k, v in value.items()} if is_section else {name: value}
    return flat


def _short_repr(value: Any) -> str:  # noqa: ANN401
    """Format a value in few letters: a hash by its first twelve."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if len(str(value)) < 64 else f"{str(value)[:12]}..."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """What the plan of every shard depends on."""

    scans: Mapping[str, SessionScan]
    recipe: Recipe
    tokenizer_sha256: str
    samples: Samples
    rows: PreviousRows
    settings: tuple[str, ...]
    reason_if_new: Reason
    generation: int


def _order(shard: BuiltShard | PlannedShard) -> tuple[int, str]:
    """Order shards: the train split first, each split by name."""
    return SPLITS.index(shard.split), shard.name


def _with_recovered(
    previous: PreviousSet, samples: Samples, recipe: Recipe
) -> tuple[BuiltShard, ...]:
    """List the previous shards in order, and those of lost indexes that can be recovered."""
    recovered = recover_lost_shards(previous.lost, previous.shards, samples, recipe)
    lost = [
        BuiltShard(
            name=entry.name,
            split=entry.split,
            sessions=recovered[entry.name],
            index_file=entry.index_file,
            columns={},
            faults=dict.fromkeys(COLUMNS, Cause.INDEX_LOST),
        )
        for entry in previous.lost
        if entry.name in recovered
    ]
    return tuple(sorted([*previous.shards, *lost], key=_order))


def _update(shards: tuple[BuiltShard, ...], samples: Samples, recipe: Recipe) -> list[PlannedShard]:
    """Keep previous shards with the sessions that stay in them; pack the other sessions."""
    inherited = keep_previous_shards(shards, samples)
    stored = {session_windows.session for shard in inherited for session_windows in shard.sessions}
    others = [name for name, windows in samples.items() if windows and name not in stored]
    planned = inherited + pack(others, samples, recipe, inherited)
    return [shard for shard in planned if shard.sessions]


def _plan_shard(shard: PlannedShard, context: _Context) -> ShardTask:
    """Plan the task that brings a shard up to date."""
    columns: dict[str, ColumnTask] = {}
    kept: dict[str, BuiltColumn] = {}
    previous = shard.previous
    for name, column in COLUMNS.items():
        rows = {
            session_windows.session: row_hash(
                session_windows, column, context.scans[session_windows.session], context.recipe
            )
            for session_windows in shard.sessions
        }
        settings = column_basis(column, context.recipe, tokenizer_sha256=context.tokenizer_sha256)
        basis = {**settings, "rows": fingerprint_of(list(rows.values()))}
        # Keep the file if it has the same fingerprint and is whole.
        built = None if previous is None else previous.columns.get(name)
        fault = None if previous is None else previous.faults.get(name)
        is_same = built is not None and built.fingerprint == fingerprint_of(basis)
        if built is not None and is_same and fault is None:
            kept[name] = built
            continue
        if fault is not None:
            reason = Reason(fault)
        elif previous is None:
            reason = context.reason_if_new
        else:
            reason = _reason(built, basis, context)
        columns[name] = ColumnTask(
            reason=reason,
            basis=basis,
            rows=rows,
            sources={
                session_windows.session: context.rows.choose_source(session_windows, column, basis)
                for session_windows in shard.sessions
            },
            changes=_find_changes(
                [*shard.sessions, *(previous.sessions if previous else ())], context, column
            ),
            is_repair=is_same,
        )
    return ShardTask(
        name=shard.name,
        split=shard.split,
        sessions=tuple(shard.sessions),
        columns=columns,
        kept=kept,
        kept_index_file=previous.index_file if previous and kept else None,
        generation=context.generation,
    )


def _reason(built: BuiltColumn | None, basis: Mapping[str, Any], context: _Context) -> Reason:
    """Explain why a column of a previous shard is written although its file is fine."""
    if built is None:
        return Reason(Cause.FILE_MISSING)
    before, after = recipe_part(built.basis), recipe_part(basis)
    has_new_tokenizer = before.pop("tokenizer_sha256", None) != after.pop("tokenizer_sha256", None)
    changes = setting_changes(before, after)
    if has_new_tokenizer:
        changes += tuple(s for s in context.settings if s.startswith("text.")) or (
            "another tokenizer",
        )
    return Reason(Cause.SETTINGS_CHANGED if changes else Cause.SESSIONS_CHANGED, settings=changes)


def _find_changes(
    sessions: Iterable[SessionWindows], context: _Context, column: Column | None = None
) -> Changes:
    """List which sessions are new, removed or changed (for one column, if given)."""
    names = dict.fromkeys(session_windows.session for session_windows in sessions)
    rows = context.rows
    changed = {
        name: rows.describe_session_changes(name, context.samples[name], column)
        for name in names
        if name in rows and name in context.scans
    }
    return Changes(
        new=tuple(name for name in names if name not in rows),
        removed=tuple(name for name in names if name not in context.scans),
        changed={name: change for name, change in changed.items() if change},
    )
