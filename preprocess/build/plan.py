"""Plan a build from scans, the recipe and the previous set. Pure: reads and writes nothing.

Sessions keep the shards that hold them. New sessions make new shards; a changed session is rebuilt
in its shard, a removed session leaves its shard. A column of a shard is written only if its
fingerprint changed; the other columns are not even opened. Changing the segment, split or shard
section (or `--compact`) repacks everything; rows that would come out identical are copied.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preprocess.build.packing import (
    PACKING_SECTIONS,
    cut_sessions,
    keep_previous_shards,
    pack,
    recover_lost_shards,
    repack,
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
from preprocess.build.statistics import sensor_axes
from shared.files import fingerprint_of
from shared.machine import pause_collector
from shared.recipe import SPLITS
from shared.shardset.layout import column_basis, columns_of
from shared.streams import DEFAULTS_OF_KIND

if TYPE_CHECKING:
    from collections.abc import Iterable

    from preprocess.build.packing import Samples
    from preprocess.build.plan_types import BuiltColumn, PlannedShard, PreviousSet, SessionSegments
    from shared.kinds.column import Column
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan


_GENERAL_KEYS = ("code_version", "segment.duration_s", "tokenizer_sha256")
"""What a column depends on besides the keys of its stream."""


@pause_collector()
def plan_shards(
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
    *,
    tokenizer_sha256: str,
    previous: PreviousSet | None = None,
    compacts: bool = False,
    verdicts: Mapping[str, Mapping[str, int]] | None = None,
) -> Plan:
    """Plan a build; `compacts` packs as a fresh build would, whatever the previous shards hold.

    `verdicts` are bits of the index's flags: session -> stream -> bits.
    """
    # Decide which shard holds which segments.
    samples = {n: tuple(scan.stored_segments(recipe)) for n, scan in sorted(scans.items())}
    settings = () if previous is None else recipe_changes(previous.recipe, recipe)
    repacking = tuple(s for s in settings if s.partition(".")[0] in PACKING_SECTIONS)
    shards = () if previous is None else _with_recovered(previous, samples, recipe)
    if repacking:
        planned = pack(cut_sessions(samples, recipe), recipe)
    elif compacts:
        planned = repack(shards, samples, recipe)
    else:
        planned = _update(shards, samples, recipe)
    planned.sort(key=_order)
    context = _Context(
        scans=scans,
        recipe=recipe,
        columns={
            name: (column, column_basis(column, recipe, tokenizer_sha256=tokenizer_sha256))
            for name, column in columns_of(recipe).items()
        },
        samples=samples,
        rows=PreviousRows(shards, scans, recipe),
        settings=settings,
        reason_if_new=Reason(
            Cause.REPACKED if compacts and shards else Cause.NEW, settings=repacking
        ),
        generation=0 if previous is None else previous.generation + 1,
        rebinned=() if previous is None else _rebinned(previous.recipe, recipe),
        verdicts=verdicts or {},
    )
    # Decide which columns of each shard are written.
    tasks, unchanged = [], []
    for shard in planned:
        task = _plan_shard(shard, context)
        is_stale = shard.previous is None or shard.previous.is_refreshed
        is_stale |= task.has_new_verdicts
        if is_stale or task.columns or task.removed or task.recounted:
            tasks.append(task)
        elif shard.previous is not None:
            unchanged.append(shard.previous)
    # Previous shards that the new set does not have, readable or not.
    names = {shard.name for shard in planned}
    dropped = {s.name: s.sessions for s in shards if s.name not in names}
    for entry in () if previous is None else previous.lost:
        if entry.name not in names:
            dropped.setdefault(entry.name, ())
    dropped_sessions = [stored for sessions in dropped.values() for stored in sessions]
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
    streams = set(before.streams) & set(after.streams)
    return (
        *(f"streams.{name} added" for name in after.streams if name not in streams),
        *(f"streams.{name} removed" for name in before.streams if name not in streams),
        *setting_changes(_settings(before, streams), _settings(after, streams)),
    )


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Describe each changed setting as ``key old -> new``; nested keys as ``key.key``."""
    old, new = _flatten(before), _flatten(after)
    return tuple(
        f"{key} {_short_repr(old.get(key))} -> {_short_repr(new.get(key))}"
        for key in {**new, **old}
        if old.get(key) != new.get(key)
    )


def _settings(recipe: Recipe, streams: Collection[str]) -> dict[str, Any]:
    """Return the keys of a recipe that have an effect, with some of its streams.

    The defaults of the kinds are keys of the streams themselves.
    """
    sections = recipe.as_json()
    for kind, defaults in DEFAULTS_OF_KIND.items():
        section = sections.pop(kind.value)
        own = {key: v for key, v in section.items() if key not in defaults.model_fields}
        sections |= {kind.value: own} if own else {}
    sections["streams"] = {name: sections["streams"][name] for name in sorted(streams)}
    return sections


def _flatten(values: Any, name: str = "") -> dict[str, Any]:  # noqa: ANN401 (any JSON)
    """Flatten nested mappings, and lists of them, to ``key.key`` -> value."""
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, Mapping):
        return {name: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{name}.{key}" if name else str(key))
    return flat


def _short_repr(value: Any) -> str:  # noqa: ANN401
    """Format a value as YAML in few letters: a hash by its first twelve."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = f"[{', '.join(map(_short_repr, value))}]" if isinstance(value, list) else str(value)
    return text if len(text) < 64 else f"{text[:12]}..."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """What the plan of every shard depends on."""

    scans: Mapping[str, SessionScan]
    recipe: Recipe
    columns: Mapping[str, tuple[Column, Mapping[str, Any]]]
    """Every column, and what it depends on besides its rows."""
    samples: Samples
    rows: PreviousRows
    settings: tuple[str, ...]
    reason_if_new: Reason
    generation: int
    rebinned: tuple[str, ...]
    """Sensors whose statistics get other bins."""
    verdicts: Mapping[str, Mapping[str, int]]


def _rebinned(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """List the sensors whose values are counted in other bins than before."""
    old = before.sensors
    return tuple(
        name
        for name, spec in after.sensors.items()
        if name in old and sensor_axes(old[name]) != sensor_axes(spec)
    )


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
            faults=dict.fromkeys(columns_of(recipe), Cause.INDEX_LOST),
        )
        for entry in previous.lost
        if entry.name in recovered
    ]
    return tuple(sorted([*previous.shards, *lost], key=_order))


def _update(shards: tuple[BuiltShard, ...], samples: Samples, recipe: Recipe) -> list[PlannedShard]:
    """Keep previous shards with the sessions that stay in them; pack the other sessions."""
    inherited = keep_previous_shards(shards, samples, recipe)
    kept = {stored for shard in inherited for stored in shard.sessions}
    others = [stored for stored in cut_sessions(samples, recipe) if stored not in kept]
    planned = inherited + pack(others, recipe, inherited)
    return [shard for shard in planned if shard.sessions]


def _plan_shard(shard: PlannedShard, context: _Context) -> ShardTask:
    """Plan the task that brings a shard up to date."""
    columns: dict[str, ColumnTask] = {}
    kept: dict[str, BuiltColumn] = {}
    previous = shard.previous
    for name, (column, settings) in context.columns.items():
        rows = {
            stored.session: row_hash(stored, column, context.scans[stored.session], context.recipe)
            for stored in shard.sessions
        }
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
            reason = _reason(column, built, basis, context)
        columns[name] = ColumnTask(
            reason=reason,
            basis=basis,
            rows=rows,
            sources={
                stored.session: context.rows.choose_source(stored, column, basis)
                for stored in shard.sessions
            },
            changes=_find_changes(
                [*shard.sessions, *(previous.sessions if previous else ())], context, column
            ),
            is_repair=is_same,
        )
    names = [stored.session for stored in shard.sessions]
    verdicts = {name: context.verdicts[name] for name in names if name in context.verdicts}
    old = {} if previous is None else previous.verdicts
    return ShardTask(
        name=shard.name,
        split=shard.split,
        sessions=tuple(shard.sessions),
        columns=columns,
        kept=kept,
        kept_index_file=previous.index_file if previous and kept else None,
        generation=context.generation,
        recounted=tuple(name for name in kept if name in context.rebinned),
        verdicts=verdicts,
        has_new_verdicts=any(old.get(name) != verdicts.get(name) for name in names),
        removed=tuple(
            n for n in (previous.columns if previous else ()) if n not in context.columns
        ),
    )


def _reason(
    column: Column, built: BuiltColumn | None, basis: Mapping[str, Any], context: _Context
) -> Reason:
    """Explain why a column of a previous shard is written although its file is fine."""
    if built is None:
        key = f"streams.{column.stream}"
        added = tuple(s for s in context.settings if s.startswith((f"{key} ", f"{key}.")))
        return Reason(Cause.SETTINGS_CHANGED if added else Cause.FILE_MISSING, settings=added)
    before, after = (
        {k if k in _GENERAL_KEYS else f"streams.{column.stream}.{k}": v for k, v in part.items()}
        for part in map(recipe_part, (built.basis, basis))
    )
    has_new_tokenizer = before.pop("tokenizer_sha256", None) != after.pop("tokenizer_sha256", None)
    # Another codec has other keys, which say nothing more.
    both = {key: value for key, value in after.items() if key in before}
    changes = setting_changes({key: before[key] for key in both}, both)
    changes = changes or setting_changes(before, after)
    if has_new_tokenizer:
        changes += tuple(s for s in context.settings if s.startswith("text.")) or (
            "another tokenizer",
        )
    return Reason(Cause.SETTINGS_CHANGED if changes else Cause.SESSIONS_CHANGED, settings=changes)


def _find_changes(
    sessions: Iterable[SessionSegments], context: _Context, column: Column | None = None
) -> Changes:
    """List which sessions are new, removed or changed (for one column, if given)."""
    names = dict.fromkeys(stored.session for stored in sessions)
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
