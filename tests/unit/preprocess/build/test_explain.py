"""What a plan says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.oracles import tiny_recipe
from helpers.plans import RECIPE, finish, plan, scan, scans_of, with_source

from preprocess.build.explain import explain_plan
from shared.recipe import assign_split

NAMES = [n for n in "abcdefghijklmnop" if assign_split(n, RECIPE) == "train"]
ANN, BOB, CAT = NAMES[:3]
OLD_SCANS = scans_of(*(scan(n) for n in NAMES[:3]))
OLD = finish(plan(OLD_SCANS), RECIPE)


def lines_of(scans=OLD_SCANS, recipe=RECIPE, **options) -> list[str]:
    return [
        f"{verb} {what}"
        for verb, what in explain_plan(plan(scans, recipe, previous=OLD, **options))
    ]


def test_a_first_build_names_some_sessions():
    first = plan(scans_of(*(scan(n) for n in NAMES[:5])))
    assert explain_plan(first) == [
        ("make", f"1 of 1 shards: new: {', '.join(NAMES[:3])} and 2 more; 15 rows made")
    ]


def test_nothing_to_do_is_no_line():
    assert lines_of() == []


def test_a_new_a_removed_and_a_changed_session_read_differently():
    new = NAMES[3]
    assert lines_of({**OLD_SCANS, new: scan(new)}) == [
        f"make 1 of 2 shards: new: {new}; 3 rows made"
    ]
    assert lines_of({n: s for n, s in OLD_SCANS.items() if n != BOB}) == [
        f"make 1 of 1 shards: removed: {BOB}; 6 rows copied, 0 made"
    ]
    changed = with_source(OLD_SCANS[CAT], "text.jsonl", "other")
    assert lines_of({**OLD_SCANS, CAT: changed}) == [
        (
            f"make 1 of 1 external_text, internal_text columns: changed: {CAT} (text.jsonl); "
            "6 rows copied, 3 made"
        )
    ]
    assert lines_of({**OLD_SCANS, CAT: scan(CAT, 5)}) == [
        f"make 1 of 1 shards: changed: {CAT} (3 -> 5 segments); 6 rows copied, 5 made"
    ]


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("audio.wav", "audio, audio.dmel"),
        ("vision_left.mp4", "vision_left"),
        ("vision_right.mp4", "vision_right"),
        ("metadata.jsonl", "external_text, internal_text, proprio, touch"),
    ],
)
def test_a_changed_file_is_named_once_for_all_its_columns(file, columns):
    changed = {**OLD_SCANS, ANN: with_source(OLD_SCANS[ANN], file, "other")}
    assert lines_of(changed) == [
        f"make 1 of 1 {columns} columns: changed: {ANN} ({file}); 6 rows copied, 3 made"
    ]


def test_a_column_names_only_the_sessions_that_it_is_due_for():
    rest = {n: s for n, s in OLD_SCANS.items() if n != BOB}
    changed = {**rest, ANN: with_source(OLD_SCANS[ANN], "audio.wav", "other")}
    others = "external_text, internal_text, proprio, touch, vision_left, vision_right"
    both = f"removed: {BOB}; changed: {ANN} (audio.wav); 3 rows copied, 3 made"
    assert sorted(lines_of(changed)) == [
        f"make 1 of 1 audio, audio.dmel columns: {both}",
        f"make 1 of 1 {others} columns: removed: {BOB}; 6 rows copied, 0 made",
    ]


def test_recipe_keys_are_named_with_both_values():
    changed = tiny_recipe(video={"qp": 30}, audio={"dmel": {"levels": 32}})
    assert lines_of(recipe=changed) == [
        "make 1 of 1 audio.dmel columns: streams.audio.dmel.levels 16 -> 32; 9 rows made",
        "make 1 of 1 vision_left columns: streams.vision_left.qp 22 -> 30; 9 rows made",
        "make 1 of 1 vision_right columns: streams.vision_right.qp 22 -> 30; 9 rows made",
    ]
    assert lines_of(recipe=tiny_recipe(sensor={"max_gap_s": 0.2})) == [
        "make 1 of 1 proprio columns: streams.proprio.max_gap_s 0.1 -> 0.2; 9 rows made",
        "make 1 of 1 touch columns: streams.touch.max_gap_s 0.1 -> 0.2; 9 rows made",
    ]
    sha = "cd" * 32
    assert lines_of(recipe=tiny_recipe(text={"vocab_size": 400}), tokenizer_sha256=sha) == [
        "make 1 of 1 external_text, internal_text columns: text.vocab_size 300 -> 400; 9 rows made"
    ]


def test_keys_that_change_only_the_manifest_are_reported():
    assert lines_of(recipe=tiny_recipe(required=["audio", "touch"])) == [
        (
            "rewrite the manifest: streams.audio.required false -> true; streams.touch.required "
            "false -> true"
        )
    ]
    assert lines_of(recipe=tiny_recipe(text={"vocab_size": 400})) == [
        "rewrite the manifest: text.vocab_size 300 -> 400"
    ]


def test_shards_that_go_are_removed():
    assert lines_of({}) == [f"remove 1 shard: removed: {ANN}, {BOB}, {CAT}"]
    deaf = {n: replace(s, intervals={}, absent={}) for n, s in OLD_SCANS.items()}
    assert lines_of(deaf)[0] == "remove 1 shard: changed: " + ", ".join(
        f"{n} (3 -> 0 segments)" for n in NAMES[:3]
    )


def test_another_packing_copies_the_rows():
    [line] = lines_of(recipe=tiny_recipe(shard={"target_bytes": 2**18}))
    assert "shards: shard.target_bytes 268435456 -> 262144; 9 rows copied, 0 made" in line


def test_shards_whose_sessions_moved_say_so():
    new = NAMES[3]
    grown = {**OLD_SCANS, new: scan(new)}
    old = finish(plan(grown, previous=OLD), RECIPE, OLD)
    assert explain_plan(plan(grown, previous=old, compacts=True)) == [
        ("make", "1 of 1 shards: repacked; 12 rows copied, 0 made"),
        ("remove", "1 shard: other shards hold its sessions"),
    ]
