"""Make scans by hand, plans of them, and the sets that carrying out a plan gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from helpers.oracles import tiny_recipe
from preprocess.build.plan import plan_shards
from preprocess.build.plan_types import BuiltColumn, BuiltShard, Plan, PreviousSet, ShardTask
from shared.clock import Interval
from shared.files import fingerprint_of
from shared.recipe import STREAMS, Recipe, Stream
from shared.session.scan import SessionScan, SourceFile
from shared.shardset.layout import COLUMNS

RECIPE = tiny_recipe()
SHA = "ab" * 32


def scan(name: str, windows: int = 3, *, tail: float = 1.0, **changes: Any) -> SessionScan:
    """Make the scan of a session of windows; the last one covers the share `tail`."""
    shares = [1.0] * (windows - 1) + [tail]
    values = {
        "session": name,
        "duration_s": float(windows),
        "clock_offset_s": 0.0,
        "gain": 1.0,
        "rms": 0.1,
        "start_overrides": {},
        "intervals": {s: Interval(0.0, float(windows)) for s in STREAMS},
        "absent": {},
        "not_recorded": frozenset(),
        "coverage": tuple((share,) * len(STREAMS) for share in shares),
        "issues": (),
        "source_files": {
            file: SourceFile(length_bytes=9, sha256=f"{name} {file}")
            for column in COLUMNS.values()
            for file in column.sources
        },
    }
    return SessionScan(**{**values, **changes})


def scans_of(*scans: SessionScan) -> dict[str, SessionScan]:
    return {s.session: s for s in scans}


def with_source(old: SessionScan, file: str, sha256: str) -> SessionScan:
    return replace(
        old, source_files={**old.source_files, file: SourceFile(length_bytes=9, sha256=sha256)}
    )


def finish(plan: Plan, recipe: Recipe, previous: PreviousSet | None = None) -> PreviousSet:
    """Return the set that carrying out a plan gives."""
    done = {s.name: s for s in plan.unchanged}
    done |= {task.name: _built(task) for task in plan.tasks}
    generation = 0 if previous is None else previous.generation + (0 if plan.is_empty else 1)
    shards = tuple(done[name] for name in plan.order)
    return PreviousSet(recipe=recipe, generation=generation, shards=shards)


def _built(task: ShardTask) -> BuiltShard:
    made = {
        name: BuiltColumn(
            file=task.file_name(f"{name}.{COLUMNS[name].suffix}"),
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
    return [(p.session, w) for shard in shards for p in shard.sessions for w in p.windows]


NAMES = st.text("abcdefgh", min_size=1, max_size=4)
SCANS = st.dictionaries(
    NAMES,
    st.tuples(
        st.integers(1, 6),
        st.sampled_from([0.0, 0.3, 1.0]),
        st.sets(st.sampled_from(STREAMS), min_size=0),
    ),
    max_size=6,
)


def drawn(values: dict[str, tuple[int, float, set[Stream]]]) -> dict[str, SessionScan]:
    scans = {}
    for name, (windows, tail, absent) in values.items():
        whole = scan(name, windows, tail=tail)
        scans[name] = replace(
            whole,
            intervals={s: i for s, i in whole.intervals.items() if s not in absent},
            absent=dict.fromkeys(sorted(absent), "it was not recorded"),
            coverage=tuple(
                tuple(0.0 if s in absent else v for s, v in zip(STREAMS, row, strict=True))
                for row in whole.coverage
            ),
        )
    return scans
