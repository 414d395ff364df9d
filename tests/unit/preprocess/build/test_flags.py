"""Why content is masked is in the index, in every copy of its rows, and in the build's report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.oracles import (
    build,
    build_with_subtasks,
    file_hashes,
    jsonl,
    open_indexes,
    tiny_recipe,
    write_tiny_sessions,
)

from preprocess.__main__ import cli
from preprocess.build import explain
from preprocess.sets.edit import drop_sessions, merge_sets, split_sessions
from preprocess.sets.verify import verify_set
from shared.clock import MaskedSpan
from shared.session import scan as scan_module
from shared.shardset.index import FLAG_BITS
from shared.streams import MaskReason

if TYPE_CHECKING:
    from pathlib import Path

SPANS = {
    "vision_left": (
        MaskedSpan(0.5, 0.7, MaskReason.STILL, "the same picture"),
        MaskedSpan(0.6, 1.2, MaskReason.DAMAGED, "smears"),
    ),
    "touch": (MaskedSpan(1.0, 2.0, MaskReason.CLOCK, "its clock is wrong"),),
}
"""Masked in every session; segments last 1 s."""

EXPECTED = {"vision_left": {0: 1 | 4, 1: 4}, "touch": {1: 2}}
"""Flags by stream and segment."""

RECIPE = tiny_recipe(shard={"target_bytes": 2**16})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return write_tiny_sessions(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def masked(monkeypatch) -> None:
    monkeypatch.setattr(scan_module, "_find_masked", lambda *_, **__: SPANS)


@pytest.fixture(scope="module")
def shards(recorded, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("masked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_find_masked", lambda *_, **__: SPANS)
        build(recorded, out, RECIPE)
    return out


def flags_of(out: Path) -> dict[str, dict[str, int]]:
    """Return the flags that are not 0, by key and stream."""
    found: dict[str, dict[str, int]] = {}
    for _, index in open_indexes(out):
        for row, column in zip(*np.nonzero(index.flags), strict=True):
            bits = int(index.flags[row, column])
            found.setdefault(index.key(row), {})[index.streams[column]] = bits
    return found


def expected_flags(out: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for _, index in open_indexes(out):
        for row in range(index.num_samples):
            for stream, bits in EXPECTED.items():
                if index.segment(row) in bits:
                    found.setdefault(index.key(row), {})[stream] = bits[index.segment(row)]
    return found


def test_the_bits_are_those_of_the_format() -> None:
    assert {str(reason): bit for reason, bit in FLAG_BITS.items()} == {
        "still": 1,
        "clock": 2,
        "damaged": 4,
    }


def test_each_segment_has_the_flags_of_the_spans_that_overlap_it(shards):
    assert flags_of(shards) == expected_flags(shards)
    assert len(flags_of(shards)) > 4
    assert not verify_set(shards).problems


def test_a_set_without_masked_content_has_no_such_array(recorded, tmp_path):
    build(recorded, tmp_path, RECIPE)
    for _, index in open_indexes(tmp_path):
        assert "flags" not in index.arrays
        assert index.flags.shape == index.arrays["present"].shape
        assert not index.flags.any()


def test_sets_of_subtasks_have_the_same_bytes(masked, recorded, shards, tmp_path):
    build_with_subtasks(recorded, tmp_path, RECIPE, task_s=1.0)
    assert file_hashes(tmp_path) == file_hashes(shards)


def test_split_merged_and_dropped_sets_keep_the_flags(shards, tmp_path):
    split_sessions(shards, tmp_path / "few", ["ann", "cat"])
    split_sessions(shards, tmp_path / "rest", ["bob", "dan"])
    merge_sets(tmp_path / "all", [tmp_path / "few", tmp_path / "rest"])
    assert flags_of(tmp_path / "all") == flags_of(shards)
    drop_sessions(tmp_path / "all", ["ann"])
    left = {key: bits for key, bits in flags_of(shards).items() if not key.startswith("ann/")}
    assert flags_of(tmp_path / "all") == left


def test_kept_and_copied_rows_keep_the_flags(masked, recorded, tmp_path):
    out = tmp_path / "out"
    build(recorded, out, RECIPE)
    before = flags_of(out)
    build(recorded, out, tiny_recipe(shard={"target_bytes": 2**16}, text={"vocab_size": 280}))
    assert flags_of(out) == before
    build(recorded, out, tiny_recipe(text={"vocab_size": 280}), compact=True)
    assert flags_of(out) == before


def test_another_reason_for_a_span_changes_the_flags(masked, recorded, tmp_path, monkeypatch):
    build(recorded, tmp_path, RECIPE)
    spans = {"touch": (MaskedSpan(1.0, 2.0, MaskReason.STILL, "nothing moves"),)}
    monkeypatch.setattr(scan_module, "_find_masked", lambda *_, **__: spans)
    (tmp_path / "sessions.jsonl").unlink()
    build(recorded, tmp_path, RECIPE)
    assert {bits for row in flags_of(tmp_path).values() for bits in row.items()} == {("touch", 1)}


def test_show_says_why_a_sample_is_masked(shards):
    result = CliRunner().invoke(cli, ["show", str(shards), "ann/000001"])
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1)[1] for line in result.output.splitlines() if "masked  " in line]
    assert lines == ["touch: clock", "vision_left: damaged"]


def test_every_masked_span_has_a_line(shards):
    lines = [x for x in jsonl(shards / "rejected.jsonl") if x["session"] == "ann"]
    assert lines[:2] == [
        {
            "level": "stream",
            "session": "ann",
            "stream": "vision_left",
            "start_s": start_s,
            "stop_s": stop_s,
            "mask": mask,
            "reason": reason,
        }
        for start_s, stop_s, mask, reason in [
            (0.5, 0.7, "still", "the same picture"),
            (0.6, 1.2, "damaged", "smears"),
        ]
    ]


def test_the_report_of_a_build_counts_what_is_masked(masked, recorded, tmp_path):
    summary = build(recorded, tmp_path, RECIPE)
    losses = {(loss.stream, loss.reason): loss for loss in summary.losses}
    vision = {("vision_left", "still"), ("vision_left", "damaged")}
    assert losses.keys() == vision | {("touch", "clock")}
    loss = losses["touch", "clock"]
    assert loss.num_sessions == 4
    assert loss.seconds == pytest.approx(1.0 + 0.6 + 1.0 + 0.0)  # ann, bob, cat, dan
    assert str(loss) == "touch: clock, 2.6 s in 4 sessions"


def test_what_does_not_decode_is_counted_by_its_segments():
    failures = [{"session": s, "stream": "eye", "segment": 0, "reason": ""} for s in "aab"]
    [loss] = explain.list_losses({}, failures, 2.0)
    assert str(loss) == "eye: does not decode, 6.0 s in 2 sessions"
