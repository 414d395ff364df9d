"""What a build plans, from scans made by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace

import pytest
from helpers.oracles import tiny_recipe
from helpers.plans import (
    RECIPE,
    SCANS,
    drawn,
    finish,
    keys,
    plan,
    scan,
    scans_of,
    with_source,
    without,
)
from hypothesis import given
from hypothesis import strategies as st

from preprocess.build import plan as plan_module
from preprocess.build import previous_set
from preprocess.build.commit import count_segments, rejected_lines
from preprocess.build.explain import explain_plan
from preprocess.build.plan import recipe_changes
from preprocess.build.plan_types import Cause, Plan, SessionSegments, ShardTask
from preprocess.build.previous_set import row_hash
from shared.clock import MaskedSpan
from shared.files import fingerprint_of
from shared.media.channels import Mix
from shared.recipe import Recipe, assign_split
from shared.session.folder import files_of_stream, source_files
from shared.session.lines import Correction
from shared.session.scan import SourceFile
from shared.shardset.layout import columns_of
from shared.streams import DEFAULT_STREAMS, Kind, MaskReason

SMALL = tiny_recipe(shard={"target_bytes": 2**18})
COLUMNS = columns_of(RECIPE)
STREAMS = sorted(RECIPE.streams)
AUDIO_COLUMNS = {"audio", "audio.dmel"}
TEXT_COLUMNS = {"internal_text", "external_text"}
PLAIN_STREAMS = {name: {**stream, "required": False} for name, stream in DEFAULT_STREAMS.items()}

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
    ("section", "columns", "reasons"),
    [
        (
            {"video": {"qp": 30}},
            {"vision_left", "vision_right"},
            {f"streams.vision_{side}.qp 22 -> 30" for side in ("left", "right")},
        ),
        (
            {"audio": {"rate_hz": 24_000}},
            AUDIO_COLUMNS,
            {"streams.audio.rate_hz 16000 -> 24000"},
        ),
        (
            {"audio": {"dmel": {"levels": 32}}},
            {"audio.dmel"},
            {"streams.audio.dmel.levels 16 -> 32"},
        ),
        (
            {"sensor": {"max_gap_s": 0.2}},
            {"proprio", "touch"},
            {f"streams.{name}.max_gap_s 0.1 -> 0.2" for name in ("proprio", "touch")},
        ),
        (
            {"text": {"tokens_per_s": 5.0}},
            TEXT_COLUMNS,
            {f"streams.{name}.tokens_per_s 10.0 -> 5.0" for name in TEXT_COLUMNS},
        ),
        ({"video": {"quality": 80}}, set(), set()),  # of another codec
        (
            {"video": {"codec": "raw"}},
            {"vision_left", "vision_right"},
            {f"streams.vision_{side}.codec h264 -> raw" for side in ("left", "right")},
        ),
        ({"required": ["audio"]}, set(), set()),
        ({"text": {"vocab_size": 400}}, set(), set()),
    ],
)
def test_one_recipe_key_makes_only_its_columns_due(section, columns, reasons):
    changed = plan(FOUR, tiny_recipe(**section), previous=OLD)
    assert [set(t.columns) for t in changed.tasks] == ([columns] if columns else [])
    assert all_reasons(changed) == reasons
    for task in changed.tasks:
        assert set(task.kept) == set(COLUMNS) - columns
        assert task.file_name("audio.tar") == "train-000000.g1.audio.tar"


@pytest.mark.parametrize(
    ("text", "reason"),
    [({}, "another tokenizer"), ({"vocab_size": 400}, "text.vocab_size 300 -> 400")],
)
def test_another_tokenizer_makes_only_text_due(text, reason):
    changed = plan(FOUR, tiny_recipe(text=text), previous=OLD, tokenizer_sha256="cd" * 32)
    assert [reasons_of(t) for t in changed.tasks] == [dict.fromkeys(sorted(TEXT_COLUMNS), reason)]


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("audio.wav", AUDIO_COLUMNS),
        ("vision_left.mp4", {"vision_left"}),
        ("vision_right.mp4", {"vision_right"}),
        ("metadata.jsonl", {"proprio", "touch", *TEXT_COLUMNS}),
        ("text.jsonl", TEXT_COLUMNS),
    ],
)
def test_one_changed_file_makes_only_its_columns_due(file, columns):
    name = TRAIN_NAMES[0]
    changed = plan({**FOUR, name: with_source(FOUR[name], file, "other")}, previous=OLD)
    assert [set(t.columns) for t in changed.tasks] == [columns]
    assert all_reasons(changed) == {"its sessions changed"}
    [(_, line)] = explain_plan(changed)
    assert f"changed: {name} ({file})" in line


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"gains": {"audio": 2.0}}, AUDIO_COLUMNS),
        ({"clock_offset_s": 3.0}, {"proprio", "touch", *TEXT_COLUMNS}),
        ({"start_overrides": {"vision_left": 0.5}}, {"vision_left"}),
        ({"start_overrides": {"touch": 0.5}}, {"touch"}),
        ({"duration_s": 2.9}, TEXT_COLUMNS),  # an event after the end is left out
        ({"levels": {"audio": 0.2}}, set()),
        ({"mixes": {"audio": Mix(weights=(1, -1), reason="inverted")}}, AUDIO_COLUMNS),
        ({"mixes": {"audio": Mix(offset=0.1)}}, AUDIO_COLUMNS),
    ],
)
def test_a_changed_gain_start_or_clock_rebuilds_the_columns_that_use_it(change, columns):
    name = TRAIN_NAMES[0]
    changed = plan({**FOUR, name: replace(FOUR[name], **change)}, previous=OLD)
    assert [set(t.columns) for t in changed.tasks] == ([columns] if columns else [])


def test_a_stream_with_its_own_clock_does_not_depend_on_the_offset():
    streams = {**PLAIN_STREAMS, "touch": {**PLAIN_STREAMS["touch"], "clock": "own"}}
    recipe = tiny_recipe(streams=streams)
    old = finish(plan(FOUR, recipe), recipe)
    name = TRAIN_NAMES[0]
    shifted = {**FOUR, name: replace(FOUR[name], clock_offset_s=3.0)}
    changed = plan(shifted, recipe, previous=old)
    assert [set(t.columns) for t in changed.tasks] == [{"proprio", *TEXT_COLUMNS}]


def test_a_stream_that_leaves_a_segment_makes_its_columns_due():
    name = TRAIN_NAMES[0]
    quieter = {**FOUR[name].coverage, "audio": (1.0, 1.0, 0.0)}
    changed = plan({**FOUR, name: replace(FOUR[name], coverage=quieter)}, previous=OLD)
    assert [set(t.columns) for t in changed.tasks] == [AUDIO_COLUMNS]


GAZE = {
    "kind": "sensor",
    "file": "gaze.csv",
    "rate_hz": 60,
    "values": [{"count": 2, "type": "angle", "names": ["x", "y"]}],
}


def with_gaze(**keys):
    return tiny_recipe(streams={**PLAIN_STREAMS, "gaze": {**GAZE, **keys}})


def scans_with_gaze() -> dict:
    return scans_of(*(scan(n, recipe=with_gaze()) for n in TRAIN_NAMES))


def test_a_declared_stream_adds_its_columns_and_keeps_all_others():
    grown = plan(scans_with_gaze(), with_gaze(), previous=OLD)
    assert [reasons_of(t) for t in grown.tasks] == [{"gaze": "streams.gaze added"}]
    assert set(grown.tasks[0].kept) == set(COLUMNS)
    assert explain_plan(grown) == [
        ("make", "1 of 1 gaze columns: streams.gaze added; 12 rows made")
    ]


def test_a_stream_that_is_not_declared_any_more_loses_its_columns_alone():
    recipe = with_gaze()
    old = finish(plan(scans_with_gaze(), recipe), recipe)
    streams = {n: s for n, s in PLAIN_STREAMS.items() if n != "audio"}
    less = tiny_recipe(streams={**streams, "gaze": GAZE})
    shrunk = plan(scans_with_gaze(), less, previous=old)
    assert [t.removed for t in shrunk.tasks] == [("audio", "audio.dmel")]
    assert [(t.columns, set(t.kept)) for t in shrunk.tasks] == [({}, set(columns_of(less)))]
    assert not shrunk.keeps_samples
    assert not shrunk.is_empty
    assert explain_plan(shrunk) == [
        ("remove", "1 of 1 audio, audio.dmel columns: streams.audio removed")
    ]
    assert plan(scans_with_gaze(), less, previous=finish(shrunk, less, old)).is_empty


def test_a_stream_of_another_kind_replaces_its_column():
    recipe = with_gaze()
    old = finish(plan(scans_with_gaze(), recipe), recipe)
    sound = {"kind": "audio", "file": "gaze.wav"}
    other = tiny_recipe(streams={**PLAIN_STREAMS, "gaze": sound})
    scans = scans_of(*(scan(n, recipe=other) for n in TRAIN_NAMES))
    [task] = plan(scans, other, previous=old).tasks
    assert set(task.columns) == {"gaze", "gaze.dmel"}
    assert all("streams.gaze.kind sensor -> audio" in r for r in reasons_of(task).values())


def test_another_expected_range_recounts_and_rebuilds_nothing():
    scalar = {"values": [{"count": 2, "type": "scalar", "names": ["x", "y"]}]}
    recipe, expecting = (with_gaze(**scalar, expect={"range": r}) for r in (None, [-1.0, 1.0]))
    old = finish(plan(scans_with_gaze(), recipe), recipe)
    again = plan(scans_with_gaze(), expecting, previous=old)
    assert [(t.columns, t.recounted) for t in again.tasks] == [({}, ("gaze",))]
    assert again.keeps_samples
    lines = explain_plan(again)
    assert lines == [("rewrite", "the manifest: streams.gaze.expect.range null -> [-1.0, 1.0]")]
    angles = with_gaze(expect={"range": [-1.0, 1.0]})  # their bins are fixed
    old = finish(plan(scans_with_gaze(), with_gaze()), with_gaze())
    assert plan(scans_with_gaze(), angles, previous=old).is_empty


def test_changes_of_a_recipe_name_streams_and_nested_keys():
    other = with_gaze(rate_hz=120, values=[{"count": 3, "type": "angle", "names": ["x", "y", "z"]}])
    assert recipe_changes(with_gaze(), other) == (
        "streams.gaze.rate_hz 60.0 -> 120.0",
        "streams.gaze.values.0.count 2 -> 3",
        "streams.gaze.values.0.names [x, y] -> [x, y, z]",
    )
    assert recipe_changes(tiny_recipe(), with_gaze()) == ("streams.gaze added",)
    assert recipe_changes(with_gaze(), tiny_recipe()) == ("streams.gaze removed",)
    louder = tiny_recipe(audio={"loudness_dbfs": -20})
    assert recipe_changes(tiny_recipe(), louder) == ("streams.audio.loudness_dbfs -23.0 -> -20.0",)


def test_a_recipe_of_one_sensor_and_nothing_else_is_planned():
    recipe = Recipe.model_validate({"streams": {"touch": PLAIN_STREAMS["touch"]}})
    first = plan(scans_of(*(scan(n, recipe=recipe) for n in TRAIN_NAMES)), recipe)
    assert {name for task in first.tasks for name in task.columns} == {"touch"}


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


def test_a_session_that_grew_keeps_every_segment_once():
    name = TRAIN_NAMES[1]
    grown = plan({**FOUR, name: scan(name, 7)}, previous=OLD)
    assert sorted(k for k in keys(grown.tasks) if k[0] == name) == [(name, w) for w in range(7)]


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"segment": {"min_coverage": 0.9}}, "segment.min_coverage 0.5 -> 0.9"),
        ({"segment": {"duration_s": 2.0}}, "segment.duration_s 1.0 -> 2.0"),
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
    assert keys(long.tasks) == [("a", n) for n in range(40)]
    sizes = [t.num_samples for t in long.tasks]
    assert len(set(sizes[:-1])) == 1
    assert sizes[-1] <= sizes[0]


def test_required_streams_decide_which_segments_become_samples():
    recipe = tiny_recipe(required=["audio"])
    deaf = without(scan("d"), set(STREAMS) - {"touch"})
    scans = scans_of(scan("a", tail=0.4), scan("b", tail=0.5), deaf)
    kept = keys(plan(scans, recipe).tasks)
    assert [key for key in kept if key[1] == 2] == [("b", 2)]
    assert "d" not in {name for name, _ in kept}


@given(values=SCANS, required=st.sets(st.sampled_from(STREAMS), max_size=2))
def test_every_segment_planned_is_stored_once_or_rejected(values, required):
    scans = drawn(values)
    recipe = tiny_recipe(required=sorted(required), shard={"target_bytes": 2**18})
    stored = keys(plan(scans, recipe).tasks)
    assert max(Counter(stored).values(), default=1) == 1
    lines = rejected_lines(scans, recipe, (), unused={})
    planned = sum(segments for segments, _, _ in values.values())
    assert planned == len(stored) + count_segments(lines)
    rejected = {(x["session"], x["segment"]) for x in lines if x["level"] == "segment"}
    assert not rejected & set(stored)


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
def test_an_update_stores_the_segments_that_a_first_build_does(values, later):
    recipe = tiny_recipe(shard={"target_bytes": 2**18})
    old = finish(plan(drawn(values), recipe), recipe)
    update = plan(drawn(later), recipe, previous=old)
    fresh = plan(drawn(later), recipe)
    assert sorted(keys(finish(update, recipe, old).shards)) == sorted(keys(fresh.tasks))


# --- hashes of rows --------------------------------------------------------------------------


def slow_row_hash(stored, column, scan, recipe):
    """Hash the inputs of a session's rows as one JSON value."""
    stream, spec = column.stream, recipe.streams[column.stream]
    files, shares = scan.source_files, scan.coverage.get(stream)
    inputs = {
        "session": stored.session,
        "segments": stored.segments,
        "present": [shares is not None and shares[number] > 0 for number in stored.segments],
        "files": {n: files[n].sha256 for n in files_of_stream(spec) if n in files},
        "gain": scan.gains.get(stream),
        "start_s": scan.start_overrides.get(stream),
    }
    if spec.kind in (Kind.SENSOR, Kind.TEXT) and spec.clock == "session":
        inputs["clock_offset_s"] = scan.clock_offset_s
    if stream in scan.stretches:
        inputs["stretch"] = scan.stretches[stream]
    corrections = {f: scan.corrections[f] for f in files_of_stream(spec) if f in scan.corrections}
    if corrections:
        inputs["corrections"] = {file: asdict(c) for file, c in corrections.items()}
    if spec.kind is Kind.TEXT:
        inputs["duration_s"] = scan.duration_s
    if stream in scan.mixes:
        inputs["mix"] = [scan.mixes[stream].weights, scan.mixes[stream].offset]
    if stream in scan.masked:
        inputs["masked"] = [[s.start_s, s.stop_s, s.reason] for s in scan.masked[stream]]
    return fingerprint_of(inputs)


NUMBERS = st.floats() | st.integers(-3, 3) | st.sampled_from([0.0, -0.0, 1e-7, 1e300])
BY_STREAM = st.dictionaries(st.sampled_from(STREAMS), NUMBERS, max_size=3)
BY_FILE = st.sampled_from(sorted(source_files(RECIPE)))
SPANS = [MaskedSpan(0.0, 1.5, MaskReason.STILL, "a"), MaskedSpan(1.0, 2.0, MaskReason.CLOCK, "b")]


@given(
    name=st.text(max_size=5),
    shares=st.dictionaries(
        st.sampled_from(STREAMS), st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2)
    ),
    segments=st.sampled_from([(0,), (1,), (0, 1)]),
    hashes=st.dictionaries(BY_FILE, st.text(max_size=3)),
    numbers=st.fixed_dictionaries(
        {"gains": BY_STREAM, "start_overrides": BY_STREAM, "stretches": BY_STREAM}
    ),
    offset_s=NUMBERS,
    masked=st.dictionaries(st.sampled_from(STREAMS), st.lists(st.sampled_from(SPANS)).map(tuple)),
    left_out=st.dictionaries(BY_FILE, st.just(Correction(units_per_s=1e3)), max_size=2),
    mixes=st.dictionaries(st.just("audio"), st.just(Mix(weights=(1, -1)))),
)
def test_a_row_hash_is_that_of_its_inputs_as_one_json_value(
    name, shares, segments, hashes, numbers, offset_s, masked, left_out, mixes
):
    files = {file: SourceFile(length_bytes=1, sha256=text) for file, text in hashes.items()}
    of_session = scan(
        name,
        2,
        coverage=shares,
        source_files=files,
        clock_offset_s=offset_s,
        masked=masked,
        corrections=left_out,
        mixes=mixes,
        **numbers,
    )
    stored = SessionSegments(name, segments)
    for column in columns_of(RECIPE).values():
        expected = slow_row_hash(stored, column, of_session, RECIPE)
        assert row_hash(stored, column, of_session, RECIPE) == expected


@pytest.mark.parametrize(("num_changed", "most"), [(0, 1.0), (1, 1.3), (100, 3.0)])
def test_hashes_are_made_a_few_times_per_session_and_column(monkeypatch, num_changed, most):
    scans = scans_of(*(scan(f"s{number:03d}", 2) for number in range(100)))
    small = tiny_recipe(shard={"target_bytes": 2**20})
    old = finish(plan(scans, small), small)
    for name in sorted(scans)[:num_changed]:
        scans[name] = with_source(scans[name], "metadata.jsonl", "other")
    hashed = []
    for module in (plan_module, previous_set):
        monkeypatch.setattr(module, "row_hash", lambda *a: (hashed.append(1), row_hash(*a))[1])
    again = plan(scans, small, previous=old)
    assert again.is_empty == (not num_changed)
    assert len(hashed) <= most * len(scans) * len(COLUMNS)
