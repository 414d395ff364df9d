"""Make scans by hand, plans of them, and the sets that carrying out a plan gives."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from pydantic import TypeAdapter

from helpers.oracles import tiny_recipe
from preprocess.build.plan import plan_shards
from preprocess.build.plan_types import BuiltColumn, BuiltShard, Plan, PreviousSet, ShardTask
from shared.clock import Interval
from shared.files import fingerprint_of
from shared.session.folder import source_files
from shared.session.scan import SessionScan, SourceFile
from shared.shardset.layout import columns_of
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Collection

    from shared.recipe import Recipe

RECIPE = tiny_recipe()
scan_from_json = TypeAdapter(SessionScan).validate_python
SHA = "ab" * 32


def scan(
    name: str, segments: int = 3, *, tail: float = 1.0, recipe: Recipe = RECIPE, **changes: Any
) -> SessionScan:
    """Make the scan of a session of 1 s segments; streams cover the share `tail` of the last."""
    shares = (*[1.0] * (segments - 1), tail)
    values = {
        "session": name,
        "duration_s": float(segments),
        "clock_offset_s": 0.0,
        "gains": dict.fromkeys(recipe.of_kind(Kind.AUDIO), 1.0),
        "levels": dict.fromkeys(recipe.of_kind(Kind.AUDIO), 0.1),
        "start_overrides": {},
        "intervals": {s: Interval(0.0, float(segments)) for s in recipe.streams},
        "stretches": {},
        "proposed_stretches": {},
        "corrections": {},
        "absent": {},
        "masked": {},
        "mixes": {},
        "not_recorded": frozenset(),
        "coverage": dict.fromkeys(recipe.streams, shares),
        "silent": (False,) * segments,
        "issues": (),
        "unused": (),
        "slow": {},
        "source_files": {
            file: SourceFile(length_bytes=9, sha256=f"{name} {file}")
            for file in source_files(recipe)
        },
    }
    return SessionScan(**{**values, **changes})


def without(old: SessionScan, streams: Collection[str]) -> SessionScan:
    """Return a scan that lacks streams."""
    return replace(
        old,
        intervals={s: i for s, i in old.intervals.items() if s not in streams},
        coverage={s: c for s, c in old.coverage.items() if s not in streams},
        absent={**old.absent, **dict.fromkeys(sorted(streams), "it was not recorded")},
    )


def scans_of(*scans: SessionScan) -> dict[str, SessionScan]:
    return {s.session: s for s in scans}


def with_source(old: SessionScan, file: str, sha256: str) -> SessionScan:
    return replace(
        old, source_files={**old.source_files, file: SourceFile(length_bytes=9, sha256=sha256)}
    )


def finish(plan: Plan, recipe: Recipe, previous: PreviousSet | None = None) -> PreviousSet:
    """Return the set that carrying out a plan gives."""
    done = {s.name: s for s in plan.unchanged}
    done |= {task.name: _built(task, recipe) for task in plan.tasks}
    generation = 0 if previous is None else previous.generation + (0 if plan.is_empty else 1)
    shards = tuple(done[name] for name in plan.order)
    return PreviousSet(recipe=recipe, generation=generation, shards=shards)


def _built(task: ShardTask, recipe: Recipe) -> BuiltShard:
    columns = columns_of(recipe)
    made = {
        name: BuiltColumn(
            file=task.file_name(f"{name}.{columns[name].suffix}"),
            length_bytes=1,
            sha256="",
            fingerprint=fingerprint_of(column.basis),
            basis=column.basis,
            rows=column.rows,
        )
        for name, column in task.columns.items()
    }
    return BuiltShard(
        name=task.name,
        split=task.split,
        sessions=task.sessions,
        index_file=task.file_name("index"),
        columns={**task.kept, **made},
    )


def plan(scans: dict[str, SessionScan], recipe: Recipe = RECIPE, **options: Any) -> Plan:
    return plan_shards(scans, recipe, **{"tokenizer_sha256": SHA, **options})


def keys(shards: Any) -> list[tuple[str, int]]:
    return [(p.session, w) for shard in shards for p in shard.sessions for w in p.segments]


NAMES = st.text("abcdefgh", min_size=1, max_size=4)
SCANS = st.dictionaries(
    NAMES,
    st.tuples(
        st.integers(1, 6),
        st.sampled_from([0.0, 0.3, 1.0]),
        st.sets(st.sampled_from(sorted(RECIPE.streams)), min_size=0),
    ),
    max_size=6,
)


def drawn(values: dict[str, tuple[int, float, set[str]]]) -> dict[str, SessionScan]:
    return {
        name: without(scan(name, segments, tail=tail), absent)
        for name, (segments, tail, absent) in values.items()
    }
