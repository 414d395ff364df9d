"""What has to be built: pure arithmetic on scans, the recipe and what the old manifest says.

Sessions keep the shards they are in. New sessions make new shards; a changed one is re-made in its
place, a removed one leaves its shard. A column of a shard is due when its fingerprint differs; the
others are not even opened. A changed window, split or packing recipe starts over, and so does who
asks for the packing of a fresh build; rows that lie in any old shard as they would be made now are
copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preprocess.build.packing import (
    PACKING_SECTIONS,
    compact,
    inherit,
    kept_windows,
    pack,
    recover,
)
from preprocess.build.previous_set import PreviousRows, is_up_to_date, row_facts, settings_of
from preprocess.build.shards import (
    BuiltColumn,
    BuiltShard,
    Changes,
    Plan,
    PlannedShard,
    PreviousSet,
    SessionWindows,
    ShardTask,
)
from shared.files import fingerprint_of
from shared.recipe import SPLITS, Recipe
from shared.shardset.layout import COLUMNS, column_basis
from shared.shardset.manifest import FORMAT_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shared.session.scan import SessionScan
    from shared.shardset.layout import Column


def plan_shards(
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
    *,
    tokenizer_sha256: str,
    old: PreviousSet | None = None,
    compacts: bool = False,
) -> Plan:
    """Plan a build.

    Args:
        scans: every session, by name.
        recipe: the recipe to build by.
        tokenizer_sha256: hash of the tokenizer that text will be encoded with.
        old: the set that is there, if any.
        compacts: pack as a fresh build does, whatever lies where.
    """
    kept = {name: kept_windows(scan, recipe) for name, scan in sorted(scans.items())}
    settings = () if old is None else recipe_changes(old.recipe, recipe)
    repacked = [s for s in settings if s.partition(".")[0] in PACKING_SECTIONS]
    shards = () if old is None else _with_lost(old, kept, recipe)
    drafts = _drafts(shards, kept, recipe, starts_over=bool(repacked), compacts=compacts)
    past = PreviousRows(shards, scans, recipe, tokenizer_sha256=tokenizer_sha256)
    context = _Context(
        scans=scans,
        recipe=recipe,
        tokenizer_sha256=tokenizer_sha256,
        kept=kept,
        past=past,
        settings=settings,
        why_new="; ".join(repacked) or ("packed anew" if compacts and shards else "new"),
        generation=0 if old is None else old.generation + 1,
    )
    version = FORMAT_VERSION if old is None else old.format_version
    tasks, unchanged = [], []
    for draft in drafts:
        task = _task(draft, context)
        if draft.old is None or version < FORMAT_VERSION or _changes(task, draft.old):
            tasks.append(task)
        else:
            unchanged.append(draft.old)
    names = {d.name for d in drafts}
    dropped = {s.name: s.slices for s in shards if s.name not in names}
    dropped |= {e.name: () for e in (old.lost if old else ()) if e.name not in {*dropped, *names}}
    return Plan(
        tasks=tuple(tasks),
        unchanged=tuple(unchanged),
        dropped=tuple(dropped),
        dropped_changes=_became([p for slices in dropped.values() for p in slices], context),
        order=tuple(d.name for d in drafts),
        settings=settings,
        old_version=version,
    )


def recipe_changes(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """``section.key old -> new`` of each key of a recipe whose value is another one."""
    return tuple(setting_changes(_flat(before), _flat(after)))


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """``key old -> new`` of each key whose value is another one."""
    return [
        f"{key} {_short(before.get(key))} -> {_short(value)}"
        for key, value in after.items()
        if before.get(key) != value
    ]


def _flat(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe with their sections, and their values."""
    flat: dict[str, Any] = {}
    for name, value in recipe.as_json().items():
        is_section = isinstance(value, dict)
        flat |= {f"{name}.{k}": v for k, v in value.items()} if is_section else {name: value}
    return flat


def _short(value: Any) -> str:  # noqa: ANN401
    """A value in few letters; of a hash the first ones."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if len(str(value)) < 64 else f"{str(value)[:12]}..."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """What the plan of every shard goes by."""

    scans: Mapping[str, SessionScan]
    recipe: Recipe
    tokenizer_sha256: str
    kept: Mapping[str, tuple[int, ...]]
    past: PreviousRows
    settings: tuple[str, ...]
    why_new: str
    generation: int


def _with_lost(
    old: PreviousSet, kept: Mapping[str, tuple[int, ...]], recipe: Recipe
) -> tuple[BuiltShard, ...]:
    """The old shards, in order, with those whose index can't be read as far as one can tell what
    lay in them.
    """
    found = recover(old.lost, old.shards, kept, recipe)
    lost = [
        BuiltShard(
            name=entry.name,
            split=entry.split,
            slices=found[entry.name],
            index_file=entry.index_file,
            columns={},
            faults=dict.fromkeys(COLUMNS, "its index is gone or damaged"),
        )
        for entry in old.lost
        if entry.name in found
    ]
    return tuple(sorted([*old.shards, *lost], key=lambda s: (SPLITS.index(s.split), s.name)))


def _drafts(
    shards: tuple[BuiltShard, ...],
    kept: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    *,
    starts_over: bool,
    compacts: bool,
) -> list[PlannedShard]:
    """The shards that are to be, in order."""
    if starts_over:
        drafts = pack(list(kept), kept, recipe)
    elif compacts:
        drafts = compact(shards, kept, recipe)
    else:
        drafts = inherit(shards, kept)
        placed = {piece.session for draft in drafts for piece in draft.slices}
        fresh = [name for name, windows in kept.items() if windows and name not in placed]
        drafts += pack(fresh, kept, recipe, drafts)
    return sorted((d for d in drafts if d.slices), key=lambda d: (SPLITS.index(d.split), d.name))


def _task(draft: PlannedShard, context: _Context) -> ShardTask:
    """The task that brings a shard up to date."""
    scans, recipe, past = context.scans, context.recipe, context.past
    facts = {n: row_facts(draft.slices, c, scans, recipe) for n, c in COLUMNS.items()}
    rows = {n: {s: fingerprint_of(f) for s, f in of.items()} for n, of in facts.items()}
    old = draft.old
    due: dict[str, str] = {}
    bases: dict[str, dict[str, Any]] = {}
    kept: dict[str, BuiltColumn] = {}
    copied: dict[str, dict[str, tuple[str, ...]]] = {}
    mended = set()
    for name, column in COLUMNS.items():
        settings = column_basis(column, recipe, tokenizer_sha256=context.tokenizer_sha256)
        basis = {**settings, "rows": fingerprint_of(list(rows[name].values()))}
        bases[name] = basis
        built = old.columns.get(name) if old is not None else None
        fault = old.faults.get(name) if old is not None else None
        if built is not None and is_up_to_date(built, basis, facts[name]):
            if fault is None:
                fingerprint = fingerprint_of(basis)
                kept[name] = replace(built, fingerprint=fingerprint, basis=basis, rows=rows[name])
                continue
            mended.add(name)
        due[name] = fault or (_reason(built, basis, context) if old else context.why_new)
        found = {piece.session: past.find(piece, column, basis) for piece in draft.slices}
        copied[name] = {session: files for session, files in found.items() if files}
    return ShardTask(
        name=draft.name,
        split=draft.split,
        slices=tuple(draft.slices),
        due=due,
        bases=bases,
        rows=rows,
        kept=kept,
        kept_index_file=old.index_file if old is not None else None,
        copied=copied,
        generation=context.generation,
        changes={name: _became(_slices_of(draft), context, COLUMNS[name]) for name in due},
        mended=frozenset(mended),
    )


def _slices_of(draft: PlannedShard) -> list[SessionWindows]:
    """What lies or lay in a shard."""
    return [*draft.slices, *(draft.old.slices if draft.old is not None else ())]


def _became(
    slices: Iterable[SessionWindows], context: _Context, column: Column | None = None
) -> Changes:
    """What became of sessions, or of what a column takes from them."""
    names = dict.fromkeys(piece.session for piece in slices)
    past = context.past
    changes = {
        name: past.change(name, context.kept[name], column)
        for name in names
        if name in past and name in context.scans
    }
    return Changes(
        new=tuple(name for name in names if name not in past),
        removed=tuple(name for name in names if name not in context.scans),
        changed={name: what for name, what in changes.items() if what},
    )


def _changes(task: ShardTask, old: BuiltShard) -> bool:
    """Whether a task makes anything of a shard new, if only its index."""
    is_changed = bool(task.due) or task.slices != old.slices or task.kept != old.columns
    return is_changed or old.lacks_statistics


def _reason(built: BuiltColumn | None, basis: Mapping[str, Any], context: _Context) -> str:
    """Why a column is due, in words."""
    if built is None:
        return "its file is gone or cut"
    changes = setting_changes(built.basis, settings_of(basis))
    if any(change.startswith("tokenizer_sha256 ") for change in changes):
        texts = [change for change in context.settings if change.startswith("text.")]
        changes = [c for c in changes if not c.startswith("tokenizer_sha256 ")]
        changes += texts or ["another tokenizer"]
    return "; ".join(changes) or "its sessions changed"
