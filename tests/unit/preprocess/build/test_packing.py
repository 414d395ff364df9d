"""Which shard holds which segments, and which rows are copied, from scans made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from helpers.oracles import tiny_recipe
from helpers.plans import SCANS, drawn, finish, keys, plan, scan, scans_of, with_source
from hypothesis import given
from hypothesis import strategies as st

from preprocess.build.plan_types import FromShards, runs_of
from shared.recipe import assign_split
from shared.shardset.layout import MAX_RUN_SEGMENTS, columns_of, max_run_segments, segment_bytes
from shared.shardset.manifest import ShardEntry

if TYPE_CHECKING:
    from preprocess.build.plan_types import Plan, PreviousSet
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan

SMALL = tiny_recipe(shard={"target_bytes": 2**18})
LARGER = tiny_recipe(shard={"target_bytes": 2**19})
COLUMNS = columns_of(SMALL)
MANY = scans_of(*(scan(n, 2 + 3 * i) for i, n in enumerate("abcdefghij")))
MANY_OLD = finish(plan(MANY, SMALL), SMALL)


# --- lost indexes ----------------------------------------------------------------------------


def entry_of(shard: Any) -> ShardEntry:
    return ShardEntry(
        name=shard.name,
        split=shard.split,
        num_samples=len(keys([shard])),
        runs=runs_of(shard.sessions),
        length_bytes=1,
        index_file=shard.index_file,
        index_sha256="",
    )


@pytest.mark.parametrize("numbers", [[0], [1], [1, 2], [0, 1, 2, 3]])
def test_a_shard_whose_index_is_lost_is_made_again_in_its_place(numbers):
    # Long sessions are cut at multiples of eight: the missing segments of cut ones tell.
    lost = [MANY_OLD.shards[i] for i in numbers]
    rest = tuple(s for s in MANY_OLD.shards if s not in lost)
    old = replace(MANY_OLD, shards=rest, lost=tuple(map(entry_of, lost)))
    again = plan(MANY, SMALL, previous=old)
    assert [(t.name, t.sessions) for t in again.tasks] == [(s.name, s.sessions) for s in lost]
    assert again.unchanged == rest
    assert {str(c.reason) for t in again.tasks for c in t.columns.values()} == {
        "its index is missing or corrupt"
    }


def test_when_sessions_came_too_lost_segments_are_placed_once():
    first, *rest = MANY_OLD.shards
    more = {**MANY, "aa": scan("aa", 2), "ab": scan("ab", 2)}
    old = replace(MANY_OLD, shards=tuple(rest), lost=(entry_of(first),))
    again = plan(more, SMALL, previous=old)
    assert sorted(keys([*again.tasks, *again.unchanged])) == sorted(keys(plan(more, SMALL).tasks))


# --- rows of the previous set ----------------------------------------------------------------


def sources_of(plan: Plan, column: str) -> set[str]:
    """Sessions that are not copied."""
    return {
        session
        for task in plan.tasks
        for session, source in task.columns[column].sources.items()
        if not isinstance(source, FromShards)
    }


def test_another_size_of_shards_copies_every_row():
    packed = plan(MANY, LARGER, previous=MANY_OLD)
    assert all(sources_of(packed, column) == set() for column in COLUMNS)
    olds = {file for t in packed.tasks for file in t.copied_index_files}
    assert olds == {s.index_file for s in MANY_OLD.shards}


def test_sessions_that_changed_are_not_copied_where_it_matters():
    name = MANY_OLD.shards[1].sessions[0].session
    changed = {**MANY, name: with_source(MANY[name], "audio.wav", "other")}
    packed = plan(changed, LARGER, previous=MANY_OLD)
    assert {c: sources_of(packed, c) for c in COLUMNS if sources_of(packed, c)} == {
        "audio": {name},
        "audio.dmel": {name},
    }


def test_a_broken_video_is_decoded_again_where_its_segments_are_divided_otherwise():
    divided = next(
        n for n in MANY if sum(n == p.session for s in MANY_OLD.shards for p in s.sessions) > 1
    )
    lossy = tuple(
        replace(s, decode_failures=frozenset({(divided, "vision_left")})) for s in MANY_OLD.shards
    )
    packed = plan(MANY, LARGER, previous=replace(MANY_OLD, shards=lossy))
    assert {c: sources_of(packed, c) for c in COLUMNS if sources_of(packed, c)} == {
        "vision_left": {divided}
    }


# --- packed as a fresh build does ------------------------------------------------------------


def test_a_compact_plan_of_a_packed_set_is_empty():
    again = plan(MANY, SMALL, previous=MANY_OLD, compacts=True)
    assert again.is_empty
    assert again.unchanged == MANY_OLD.shards


def grown(recipe: Recipe) -> PreviousSet:
    """The set of MANY when its sessions came one by one."""
    scans: dict[str, SessionScan] = {}
    old = None
    for name, each in reversed(MANY.items()):
        scans[name] = each
        old = finish(plan(scans, recipe, previous=old), recipe, old)
    return old


def test_a_compact_plan_of_a_grown_set_is_the_packing_of_a_fresh_one_and_copies_all():
    old = grown(SMALL)
    packed = plan(MANY, SMALL, previous=old, compacts=True)
    fresh = plan(MANY, SMALL)
    assert len(old.shards) > len(fresh.order)
    assert finish(packed, SMALL, old).shards != old.shards
    assert packed.order == fresh.order
    assert [s.sessions for s in finish(packed, SMALL, old).shards] == [
        t.sessions for t in fresh.tasks
    ]
    assert all(sources_of(packed, column) == set() for column in COLUMNS)
    assert set(packed.dropped) == {s.name for s in old.shards} - set(fresh.order)
    assert not packed.keeps_samples


@given(values=SCANS, later=SCANS)
def test_a_compact_plan_is_always_the_packing_of_a_fresh_one(values, later):
    recipe = tiny_recipe(shard={"target_bytes": 2**18})
    old = finish(plan(drawn(values), recipe), recipe)
    packed = plan(drawn(later), recipe, previous=old, compacts=True)
    fresh = plan(drawn(later), recipe)
    assert [(s.name, s.sessions) for s in finish(packed, recipe, old).shards] == [
        (t.name, t.sessions) for t in fresh.tasks
    ]
    assert plan(drawn(later), recipe, previous=finish(packed, recipe, old), compacts=True).is_empty


# --- cuts and runs ---------------------------------------------------------------------------

SESSIONS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=2),
    st.lists(st.sampled_from([0.0, 1.0, 1.0, 1.0]), min_size=1, max_size=40),
    max_size=6,
)
"""Session -> share of each segment that its streams cover."""

Runs = dict[str, list[tuple[int, ...]]]


def scans_with_gaps(shares: dict[str, list[float]]) -> dict[str, SessionScan]:
    return {
        name: scan(name, len(own), coverage=dict.fromkeys(SMALL.streams, tuple(own)))
        for name, own in shares.items()
    }


def slow_runs(shares: dict[str, list[float]], recipe: Recipe) -> Runs:
    """Walk over the segments of each session; a run ends at a gap and at a cut."""
    runs: Runs = {}
    for name, own in shares.items():
        run: tuple[int, ...] = ()
        for number, share in enumerate([*own, 0.0]):
            if run and (share == 0.0 or number % max_run_segments(recipe) == 0):
                runs.setdefault(name, []).append(run)
                run = ()
            if share:
                run = (*run, number)
    return runs


def runs_in(shards: Any) -> Runs:
    """Runs of a set as its manifest would list them: lengths, in the order of the rows."""
    runs: Runs = {}
    for shard in shards:
        rows = keys([shard])
        for length in runs_of(shard.sessions):
            run, rows = rows[:length], rows[length:]
            assert len({session for session, _ in run}) == 1
            runs.setdefault(run[0][0], []).append(tuple(number for _, number in run))
        assert not rows
    return {name: sorted(own) for name, own in runs.items()}


@given(history=st.lists(st.tuples(SESSIONS, st.booleans()), min_size=1, max_size=4))
def test_updates_and_compaction_change_no_run(history):
    old = None
    for shares, compacts in history:
        scans = scans_with_gaps(shares)
        old = finish(plan(scans, SMALL, previous=old, compacts=compacts), SMALL, old)
        assert runs_in(old.shards) == slow_runs(shares, SMALL)


@given(shares=SESSIONS, target=st.integers(16, 21), dropped=st.sets(st.text("abcdef", max_size=2)))
def test_shards_of_any_size_and_dropped_sessions_change_only_cuts(shares, target, dropped):
    recipe = tiny_recipe(shard={"target_bytes": 2**target})
    shards = finish(plan(scans_with_gaps(shares), recipe), recipe).shards
    kept = [
        replace(shard, sessions=tuple(s for s in shard.sessions if s.session not in dropped))
        for shard in shards
    ]
    others = {name: own for name, own in shares.items() if name not in dropped}
    assert runs_in(kept) == slow_runs(others, recipe)


@given(shares=SESSIONS, target=st.integers(16, 21))
def test_shards_hold_whole_sessions_up_to_their_size(shares, target):
    recipe = tiny_recipe(shard={"target_bytes": 2**target})
    capacity = 2**target / segment_bytes(recipe)
    for task in plan(scans_with_gaps(shares), recipe).tasks:
        assert task.num_samples <= max(capacity, max_run_segments(recipe))
        assert len(task.sessions) == 1 or task.num_samples <= capacity
        assert all(assign_split(s.session, recipe) == task.split for s in task.sessions)
        assert sum(task.runs) == task.num_samples


def test_a_shard_has_at_most_4096_segments_even_if_a_session_of_it_grows():
    recipe = tiny_recipe(shard={"target_bytes": 2**40})
    pair = [n for n in "abcdefghij" if assign_split(n, recipe) == "train"][:2]
    half = scans_of(*(scan(n, MAX_RUN_SEGMENTS // 2) for n in pair))
    old = finish(plan(half, recipe), recipe)
    assert [len(keys([s])) for s in old.shards] == [MAX_RUN_SEGMENTS]
    grown_too = {**half, pair[0]: scan(pair[0], MAX_RUN_SEGMENTS // 2 + 1)}
    after = finish(plan(grown_too, recipe, previous=old), recipe, old).shards
    assert [len(keys([s])) for s in after] == [MAX_RUN_SEGMENTS // 2 + 1, MAX_RUN_SEGMENTS // 2]


def test_one_more_small_stream_cuts_long_sessions_where_they_were_cut():
    touch = {"kind": "sensor", "key": "touch", "values": [{"count": 5, "type": "fraction"}]}
    sound = {"kind": "audio", "file": "audio.wav"}
    recipe = tiny_recipe(streams={"touch": touch, "audio": sound})
    more = {"kind": "sensor", "key": "gaze", "values": [{"count": 3, "type": "direction"}]}
    larger = tiny_recipe(streams={"touch": touch, "audio": sound, "gaze": more})
    assert segment_bytes(larger) > segment_bytes(recipe)
    assert max_run_segments(larger) == max_run_segments(recipe)
