"""What a build plans, from scans made by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from helpers.oracles import tiny_recipe
from helpers.plans import RECIPE, SCANS, drawn, finish, keys, plan, scan, scans_of, with_source
from hypothesis import given
from hypothesis import strategies as st

from preprocess.build.commit import count_windows, rejected_lines
from preprocess.build.explain import explain_plan
from preprocess.build.plan_types import Cause, Plan, ShardTask
from shared.clock import Interval
from shared.recipe import STREAMS, Stream, assign_split
from shared.shardset.layout import COLUMNS

SMALL = tiny_recipe(shard={"target_bytes": 2**18})

TRAIN_NAMES = [n for n in "abcdefghij" if assign_split(n, RECIPE) == "train"][:4]
FOUR = scans_of(*(scan(n) for n in TRAIN_NAMES))
OLD = finish(plan(FOUR), RECIPE)
MANY = scans_of(*(scan(n, 5) for n in "abcdefghij"))
MANY_OLD = finish(plan(MANY, SMALL), SMALL)


def reasons_of(task: ShardTask) -> dict[str, str]:
    """Column name -> why it is written."""
    return {name: str(column.reason) for name, column in task.columns.items()}


def all_reasons(plan: Plan) -> set[str]:
    return {reason for task in plan.tasks for reason in reasons_of(task).values()}


def test_the_same_input_gives_the_same_plan():
    backwards = dict(reversed(MANY.items()))
    assert plan(MANY, SMALL) == plan(backwards, SMALL)
    assert plan(MANY, SMALL, previous=MANY_OLD) == plan(backwards, SMALL, previous=MANY_OLD)


def test_a_first_plan_makes_every_column_of_every_shard():
    first = plan(MANY, SMALL)
    assert [t.name for t in first.tasks] == list(first.order)
    assert all(reasons_of(t) == dict.fromkeys(COLUMNS, "new") for t in first.tasks)
    assert [t.file_name("index") for t in first.tasks] == [f"{n}.index" for n in first.order]


def test_shards_are_numbered_from_zero_in_each_split():
    order = plan(MANY, SMALL).order
    for split in ("train", "val"):
        found = [n for n in order if n.startswith(split)]
        assert found == [f"{split}-{i:06d}" for i in range(len(found))]
        assert found
    assert order == tuple(sorted(order))


def test_when_nothing_changed_nothing_is_planned():
    again = plan(MANY, SMALL, previous=MANY_OLD)
    assert again.is_empty
    assert again.unchanged == MANY_OLD.shards
    assert explain_plan(again) == []


@pytest.mark.parametrize(
    ("section", "columns", "reason"),
    [
        ({"vision": {"quality": 80}}, {"vision_left", "vision_right"}, "vision.quality 90 -> 80"),
        ({"audio": {"rate_hz": 24_000}}, {"audio", "dmel"}, "audio.rate_hz 16000 -> 24000"),
        ({"mel": {"levels": 32}}, {"dmel"}, "mel.levels 16 -> 32"),
        ({"sensors": {"max_gap_s": 0.2}}, {"proprio"}, "sensors.max_gap_s 0.1 -> 0.2"),
        ({"required": ["audio"]}, set(), ""),
        ({"text": {"vocab_size": 400}}, set(), ""),
    ],
)
def test_one_recipe_key_makes_only_its_columns_due(section, columns, reason):
    changed = plan(FOUR, tiny_recipe(**section), previous=OLD)
    assert [set(t.columns) for t in changed.tasks] == ([columns] if columns else [])
    assert all_reasons(changed) == ({reason} if columns else set())
    for task in changed.tasks:
        assert set(task.kept) == set(COLUMNS) - columns
        assert task.file_name("audio.tar") == "train-000000.g1.audio.tar"


@pytest.mark.parametrize(
    ("text", "reason"),
    [({}, "another tokenizer"), ({"vocab_size": 400}, "text.vocab_size 300 -> 400")],
)
def test_another_tokenizer_makes_only_text_due(text, reason):
    changed = plan(FOUR, tiny_recipe(text=text), previous=OLD, tokenizer_sha256="cd" * 32)
    assert [reasons_of(t) for t in changed.tasks] == [{"text": reason}]


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("audio.wav", {"audio", "dmel"}),
        ("vision_left.mp4", {"vision_left"}),
        ("vision_right.mp4", {"vision_right"}),
        ("metadata.jsonl", {"text", "proprio"}),
        ("text.jsonl", {"text"}),
    ],
)
def test_one_changed_file_makes_only_its_columns_due(file, columns):
    name = TRAIN_NAMES[0]
    changed = plan({**FOUR, name: with_source(FOUR[name], file, "other")}, previous=OLD)
    assert [set(t.columns) for t in changed.tasks] == [columns]
    assert all_reasons(changed) == {"its sessions changed"}


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"gain": 2.0}, {"audio", "dmel"}),
        ({"clock_offset_s": 3.0}, {"text", "proprio"}),
        ({"rms": 0.2}, set()),
    ],
)
def test_a_changed_gain_or_clock_rebuilds_the_columns_that_use_it(change, columns):
    name = TRAIN_NAMES[0]
    changed = plan({**FOUR, name: replace(FOUR[name], **change)}, previous=OLD)
    assert [set(t.columns) for t in changed.tasks] == ([columns] if columns else [])


def test_a_stream_that_leaves_a_window_makes_its_column_due():
    # Text covers the whole session: a shorter video can end it, with the same text.jsonl.
    name, at = TRAIN_NAMES[0], STREAMS.index(Stream.INTERNAL_TEXT)
    last = tuple(0.25 if i == at else 1.0 for i in range(len(STREAMS)))
    shorter = replace(FOUR[name], coverage=(*FOUR[name].coverage[:-1], last))
    changed = plan({**FOUR, name: shorter}, previous=OLD)
    assert [set(t.columns) for t in changed.tasks] == [{"text"}]


def test_a_new_session_makes_a_new_shard_and_touches_no_other():
    new = next(n for n in "klmnop" if assign_split(n, RECIPE) == "train")
    grown = plan({**FOUR, new: scan(new)}, previous=OLD)
    assert [t.name for t in grown.tasks] == ["train-000001"]
    assert keys(grown.tasks) == [(new, 0), (new, 1), (new, 2)]
    assert grown.unchanged == OLD.shards


def test_a_removed_session_touches_only_its_own_shards():
    gone = MANY_OLD.shards[1].sessions[0].session
    rest = {n: s for n, s in MANY.items() if n != gone}
    less = plan(rest, SMALL, previous=MANY_OLD)
    own = {s.name for s in MANY_OLD.shards if gone in {p.session for p in s.sessions}}
    assert {t.name for t in less.tasks} | set(less.dropped) == own
    assert gone not in {p.session for t in less.tasks for p in t.sessions}
    assert not any(s.name in own for s in less.unchanged)


def test_a_shard_whose_sessions_are_all_gone_is_dropped():
    less = plan({}, previous=OLD)
    assert (less.dropped, less.tasks, less.order) == (("train-000000",), (), ())
    assert not less.is_empty


def test_a_changed_session_is_made_again_in_its_place():
    session = MANY_OLD.shards[0].sessions[0].session
    changed = {**MANY, session: with_source(MANY[session], "audio.wav", "other")}
    again = plan(changed, SMALL, previous=MANY_OLD)
    own = {s.name for s in MANY_OLD.shards if session in {p.session for p in s.sessions}}
    assert {t.name for t in again.tasks} == own
    assert again.order == tuple(s.name for s in MANY_OLD.shards)


def test_a_session_that_grew_keeps_every_window_once():
    name = TRAIN_NAMES[1]
    grown = plan({**FOUR, name: scan(name, 7)}, previous=OLD)
    assert sorted(k for k in keys(grown.tasks) if k[0] == name) == [(name, w) for w in range(7)]


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"window": {"min_coverage": 0.9}}, "window.min_coverage 0.5 -> 0.9"),
        ({"shard": {"target_bytes": 2**20}}, "shard.target_bytes 268435456 -> 1048576"),
        ({"split": {"val_fraction": 0.0}}, "split.val_fraction 0.25 -> 0.0"),
    ],
)
def test_another_packing_starts_over_and_says_why(section, reason):
    over = plan(FOUR, tiny_recipe(**section), previous=OLD)
    assert all(set(t.columns) == set(COLUMNS) for t in over.tasks)
    assert all_reasons(over) == {reason}
    assert all(".g1." in t.file_name("index") for t in over.tasks)  # readers keep the old ones


def test_a_damaged_column_is_due_and_the_samples_stay():
    damaged = replace(OLD, shards=(replace(OLD.shards[0], faults={"audio": Cause.FILE_MISSING}),))
    again = plan(FOUR, previous=damaged)
    assert [reasons_of(t) for t in again.tasks] == [{"audio": "its file is missing or truncated"}]
    assert again.tasks[0].copied_index_files == ()
    assert again.keeps_samples
    louder = plan(FOUR, tiny_recipe(audio={"loudness_dbfs": -30.0}), previous=damaged)
    assert not louder.keeps_samples


def test_long_sessions_are_divided_over_shards():
    long = plan(scans_of(scan("a", 40)), tiny_recipe(shard={"target_bytes": 2**18}))
    assert len(long.tasks) > 3
    assert keys(long.tasks) == [("a", w) for w in range(40)]
    sizes = [t.num_samples for t in long.tasks]
    assert len(set(sizes[:-1])) == 1
    assert sizes[-1] <= sizes[0]


def test_required_streams_decide_which_windows_become_samples():
    recipe = tiny_recipe(required=["audio"])
    deaf = replace(
        scan("d"),
        intervals={Stream.TOUCH: Interval(0.0, 3.0)},
        absent={Stream.AUDIO: "audio.wav: no such file"},
    )
    found = plan(scans_of(scan("a", tail=0.4), scan("b", tail=0.5), deaf), recipe)
    kept = [k for k in keys(found.tasks) if k[1] == 2]
    assert kept == [("b", 2)]
    assert "d" not in {name for name, _ in keys(found.tasks)}


@given(values=SCANS, required=st.sets(st.sampled_from(STREAMS), max_size=2))
def test_every_window_planned_is_placed_once_or_rejected(values, required):
    scans = drawn(values)
    recipe = tiny_recipe(required=sorted(required), shard={"target_bytes": 2**18})
    placed = keys(plan(scans, recipe).tasks)
    assert max(Counter(placed).values(), default=1) == 1
    lines = rejected_lines(scans, recipe, ())
    planned = sum(windows for windows, _, _ in values.values())
    assert planned == len(placed) + count_windows(lines)
    rejected = {(x["session"], x["window"]) for x in lines if x["level"] == "window"}
    assert not rejected & set(placed)


@given(values=SCANS, more=SCANS)
def test_sessions_never_change_sides_when_others_come(values, more):
    recipe = tiny_recipe(shard={"target_bytes": 2**18})
    first = plan(drawn(values), recipe)
    scans = {**drawn(more), **drawn(values)}
    second = plan(scans, recipe, previous=finish(first, recipe))
    assert second.unchanged == finish(first, recipe).shards
    sides = {
        piece.session: task.split
        for p in (first, second)
        for task in p.tasks
        for piece in task.sessions
    }
    assert all(sides[n] == assign_split(n, recipe) for n in sides)
    assert {s.split for s in second.unchanged} == {t.split for t in first.tasks}


@given(values=SCANS, later=SCANS)
def test_an_update_places_the_windows_that_a_first_build_does(values, later):
    recipe = tiny_recipe(shard={"target_bytes": 2**18})
    old = finish(plan(drawn(values), recipe), recipe)
    update = plan(drawn(later), recipe, previous=old)
    fresh = plan(drawn(later), recipe)
    assert sorted(keys(finish(update, recipe, old).shards)) == sorted(keys(fresh.tasks))
