"""Which shard holds which windows, and which rows are copied, from scans made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from helpers.oracles import tiny_recipe
from helpers.plans import SCANS, drawn, finish, keys, plan, scan, scans_of, with_source
from hypothesis import given

from preprocess.build.plan_types import FromShards
from shared.shardset.layout import COLUMNS
from shared.shardset.manifest import ShardEntry

if TYPE_CHECKING:
    from preprocess.build.plan_types import Plan, PreviousSet
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan

SMALL = tiny_recipe(shard={"target_bytes": 2**18})
LARGER = tiny_recipe(shard={"target_bytes": 2**19})
MANY = scans_of(*(scan(n, 5) for n in "abcdefghij"))
MANY_OLD = finish(plan(MANY, SMALL), SMALL)


# --- lost indexes ----------------------------------------------------------------------------


def entry_of(shard: Any) -> ShardEntry:
    return ShardEntry(
        name=shard.name,
        split=shard.split,
        num_samples=len(keys([shard])),
        length_bytes=1,
        index_file=shard.index_file,
        index_sha256="",
    )


@pytest.mark.parametrize("numbers", [[0], [1], [1, 2], [0, 1, 2, 3]])
def test_a_shard_whose_index_is_lost_is_made_again_in_its_place(numbers):
    # Sessions of five windows, shards of seven: the missing windows of divided ones tell.
    lost = [MANY_OLD.shards[i] for i in numbers]
    rest = tuple(s for s in MANY_OLD.shards if s not in lost)
    old = replace(MANY_OLD, shards=rest, lost=tuple(map(entry_of, lost)))
    again = plan(MANY, SMALL, previous=old)
    assert [(t.name, t.sessions) for t in again.tasks] == [(s.name, s.sessions) for s in lost]
    assert again.unchanged == rest
    assert {str(c.reason) for t in again.tasks for c in t.columns.values()} == {
        "its index is missing or corrupt"
    }


def test_when_sessions_came_too_lost_windows_are_placed_once():
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
        "dmel": {name},
    }


def test_a_broken_video_is_decoded_again_where_its_windows_are_divided_otherwise():
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
