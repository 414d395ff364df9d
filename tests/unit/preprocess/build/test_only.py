"""Builds use the sessions whose verdict is good enough, and write verdicts into the flags."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.oracles import build, file_hashes, open_indexes, tiny_recipe, write_tiny_sessions

from preprocess.__main__ import cli
from preprocess.build import job as build_job
from preprocess.sets.edit import drop_sessions, merge_sets, split_sessions
from preprocess.sets.verify import verify_set
from preprocess.validate import job as validate_job
from shared.errors import MachineError, SessionError
from shared.shardset.index import FLAG_BITS, VERDICT_BITS
from shared.shardset.manifest import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = tiny_recipe(shard={"target_bytes": 2**16})
CHECKED, WARNINGS, FAILED = 8, 16, 32


@pytest.fixture
def recorded(tmp_path) -> Path:
    """Sessions ann and cat are flawless, bob has a text too late, dan a sound that is none."""
    root = write_tiny_sessions(tmp_path / "sessions")
    with (root / "bob" / "text.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"timestamp": 900.0, "stream": "internal", "text": "late"}) + "\n")
    (root / "dan" / "audio.wav").write_bytes(b"no sound" * 100)
    return root


def verdict_bits(out: Path) -> dict[str, dict[str, int]]:
    """Return the bits of verdicts by session and stream; all rows of a session have the same."""
    found: dict[str, dict[str, int]] = {}
    for _, index in open_indexes(out):
        for row in range(index.num_samples):
            bits = (index.flags[row] & ~np.uint8(7)).tolist()
            own = dict(zip(index.streams, bits, strict=True))
            assert found.setdefault(index.session(row), own) == own
    return found


def rejected(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text("utf-8").splitlines()]
    return {line["session"]: line["reason"] for line in lines if line["level"] == "session"}


def expected_bits(names: str) -> dict[str, dict[str, int]]:
    """Of these sessions; the fault of bob is in its internal texts, that of dan in its sound."""
    streams = dict.fromkeys(RECIPE.streams, CHECKED)
    bits = {name: dict(streams) for name in names.split()}
    if "bob" in bits:
        bits["bob"]["internal_text"] |= WARNINGS
    if "dan" in bits:
        bits["dan"]["audio"] |= FAILED
    return bits


def test_the_bits_are_those_of_the_format():
    assert VERDICT_BITS == {"checked": CHECKED, "warnings": WARNINGS, "failed": FAILED}
    assert sum(VERDICT_BITS.values()) + sum(FLAG_BITS.values()) == 63  # no bit twice


@pytest.mark.parametrize(
    ("only", "used", "left_out"),
    [
        ("passed", "ann cat", {"bob": "warnings", "dan": "failed"}),
        ("warnings", "ann bob cat", {"dan": "failed"}),
        ("any", "ann bob cat dan", {}),
    ],
)
def test_sessions_are_used_up_to_a_verdict(recorded, tmp_path, only, used, left_out):
    out = tmp_path / "set"
    summary = build(recorded, out, RECIPE, only=only)
    assert verdict_bits(out) == expected_bits(used)
    reasons = rejected(out)
    assert reasons.keys() == left_out.keys()
    for name, status in left_out.items():
        assert reasons[name].startswith(f"{status}, --only {only}: ")
    assert "audio.wav" in reasons.get("dan", "audio.wav")
    assert read_manifest(out).counts["sessions"] == 4
    assert any("left out by their verdict" in note for note in summary.notes) == bool(left_out)
    assert not summary.warnings
    assert not verify_set(out).problems
    # All else is as in a set of only these sessions.
    for name in left_out:
        shutil.rmtree(recorded / name)
    build(recorded, tmp_path / "alone", RECIPE, only="any")
    columns = [
        {n: h for n, h in file_hashes(place).items() if not n.endswith(("json", "jsonl"))}
        for place in (out, tmp_path / "alone")
    ]
    assert columns[0] == columns[1]


def test_without_the_option_nothing_is_validated(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(build_job, "choose_sessions", None)
    build(recorded, tmp_path / "set", RECIPE)
    assert not any(bits for own in verdict_bits(tmp_path / "set").values() for bits in own.values())
    assert not (recorded / ".verdicts").exists()


def test_a_kept_verdict_is_used(recorded, tmp_path, monkeypatch):
    build(recorded, tmp_path / "set", RECIPE, only="any")
    checked = []
    check = validate_job.check_session
    monkeypatch.setattr(
        validate_job,
        "check_session",
        lambda path, **o: checked.append(path.name) or check(path, **o),
    )
    assert build(recorded, tmp_path / "set", RECIPE, only="any").plan.is_empty
    assert build(recorded, tmp_path / "other", RECIPE, only="warnings").rejected
    assert checked == []
    (recorded / "ann" / "text.jsonl").unlink()
    build(recorded, tmp_path / "set", RECIPE, only="any")
    assert checked == ["ann"]


def test_another_verdict_rewrites_indexes_only(recorded, tmp_path):
    out = tmp_path / "set"
    build(recorded, out, RECIPE)
    before, columns = read_manifest(out), file_hashes(out)
    summary = build(recorded, out, RECIPE, only="any")
    assert verdict_bits(out) == expected_bits("ann bob cat dan")
    assert not any(task.columns for task in summary.plan.tasks)
    is_column = [n for n in columns if n.endswith((".tar", ".zip"))]
    assert {n: file_hashes(out)[n] for n in is_column} == {n: columns[n] for n in is_column}
    after = read_manifest(out)
    assert after.generation == before.generation + 1
    assert after.fingerprint == before.fingerprint  # a run can resume
    assert build(recorded, out, RECIPE, only="any").plan.is_empty
    # Without the option, the samples are not validated any more.
    build(recorded, out, RECIPE)
    assert not any(bits for own in verdict_bits(out).values() for bits in own.values())


def test_sessions_leave_and_return_with_their_verdict(recorded, tmp_path):
    out = tmp_path / "set"
    build(recorded, out, RECIPE)
    build(recorded, out, RECIPE, only="warnings")
    assert verdict_bits(out) == expected_bits("ann bob cat")
    shutil.copy(recorded / "ann" / "audio.wav", recorded / "dan" / "audio.wav")
    build(recorded, out, RECIPE, only="warnings")
    assert verdict_bits(out).keys() == {"ann", "bob", "cat", "dan"}
    assert rejected(out) == {}


def test_edited_sets_keep_verdicts(recorded, tmp_path):
    build(recorded, tmp_path / "set", RECIPE, only="any")
    split_sessions(tmp_path / "set", tmp_path / "few", ["ann", "dan"])
    split_sessions(tmp_path / "set", tmp_path / "rest", ["bob", "cat"])
    merge_sets(tmp_path / "all", [tmp_path / "few", tmp_path / "rest"])
    assert verdict_bits(tmp_path / "all") == expected_bits("ann bob cat dan")
    drop_sessions(tmp_path / "all", ["ann"])
    assert verdict_bits(tmp_path / "all") == expected_bits("bob cat dan")


def test_a_build_that_takes_over_writes_its_own_verdicts(recorded, tmp_path, monkeypatch):
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(build_job, "commit_set", lambda _: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            build(recorded, out, RECIPE)
    columns = {n: h for n, h in file_hashes(out).items() if n.endswith((".tar", ".zip"))}
    build(recorded, out, RECIPE, only="any")
    assert verdict_bits(out) == expected_bits("ann bob cat dan")
    assert {n: file_hashes(out)[n] for n in columns} == columns


def test_a_session_that_can_not_be_read_now_ends_the_build(recorded, tmp_path, monkeypatch):
    out = tmp_path / "set"
    build(recorded, out, RECIPE, only="any")
    before = file_hashes(out)
    (recorded / "cat" / "text.jsonl").unlink()

    def refuse(path: Path, **_: object) -> None:
        raise MachineError(f"{path}: no answer")

    monkeypatch.setattr(validate_job, "check_session", refuse)
    with pytest.raises(MachineError, match=r"1 of 4 sessions could not be checked.*no answer"):
        build(recorded, out, RECIPE, only="passed")
    assert file_hashes(out) == before


def test_it_is_said_if_no_session_is_good_enough(recorded, tmp_path):
    for name in ("ann", "bob", "cat"):
        shutil.rmtree(recorded / name)
    with pytest.raises(SessionError, match=r"leaves out all 1 sessions, such as dan: failed"):
        build(recorded, tmp_path / "set", RECIPE, only="passed")


def test_the_command_says_what_it_leaves_out_and_show_what_was_found(recorded, tmp_path):
    run = CliRunner().invoke
    places = ["--sessions", str(recorded), "--out", str(tmp_path / "set"), "--workers", "0"]
    verdicts = ["--verdicts", str(tmp_path / "kept")]
    for more in (["--dry-run"], []):
        done = run(cli, ["shards", *places, "--only", "warnings", *verdicts, *more])
        assert done.exit_code == 0, done.output
        assert "left out by their verdict, 1 of 4 sessions: dan; dan failed" in done.output
    assert (tmp_path / "kept").is_dir()
    assert not (recorded / ".verdicts").exists()
    shown = run(cli, ["show", str(tmp_path / "set"), "bob/000000"]).output
    assert "validated  internal_text: warnings" in shown
    assert "validated  audio: passed" in shown
    for wrong in (["--only", "some"], verdicts):  # verdicts without --only
        failed = run(cli, ["shards", *places, *wrong])
        assert failed.exit_code == 2
