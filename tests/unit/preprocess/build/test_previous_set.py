"""A build that verifies repairs flipped bytes: only what is corrupt is rebuilt."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import yaml
from click.testing import CliRunner
from helpers.oracles import (
    build,
    check_set,
    file_identities,
    open_indexes,
    set_contents,
    tiny_recipe,
)
from helpers.processes import SimulatedKillError, fail
from helpers.sets import flip_byte

from preprocess.__main__ import cli
from preprocess.sets.verify import verify_set
from shared.errors import rebuild_hint
from shared.shardset.layout import columns_of
from shared.shardset.manifest import read_manifest

COLUMNS = columns_of(tiny_recipe()).values()
FILES = [f"train-000000.{column.name}.{column.suffix}" for column in COLUMNS]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [100, -3], ids=["front", "back"])
def test_only_the_damaged_column_is_rebuilt(sessions, built, out, name, place):
    before = file_identities(out)
    flip_byte(out / name, place % (out / name).stat().st_size)
    assert build(sessions, out).plan.is_empty  # sizes tell nothing
    assert any(rebuild_hint(out) in problem for problem in verify_set(out).problems)
    summary = build(sessions, out, verify=True)
    column = name.removeprefix("train-000000.").removesuffix(".tar").removesuffix(".zarr.zip")
    assert [(t.name, set(t.columns)) for t in summary.plan.tasks] == [("train-000000", {column})]
    check_set(out)
    assert set_contents(out) == set_contents(built)
    assert read_manifest(out).fingerprint == read_manifest(built).fingerprint  # runs can go on
    made = {re.sub(r"\.g1\b", "", n) for n in set(file_identities(out)) - set(before)}
    assert made == {name, "train-000000.index"}
    assert build(sessions, out, verify=True).plan.is_empty


def test_a_shard_with_a_damaged_index_is_rebuilt_in_its_place(sessions, tmp_path):
    recipe, out, whole = tiny_recipe(shard={"target_bytes": 2**16}), tmp_path / "a", tmp_path / "b"
    for place in (out, whole):
        build(sessions, place, recipe)
    flip_byte(out / "train-000001.index", 300)
    summary = build(sessions, out, recipe, verify=True)
    assert [t.name for t in summary.plan.tasks] == ["train-000001"]
    check_set(out)
    assert set_contents(out) == set_contents(whole)
    assert verify_set(out).problems == ()


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "rejected.jsonl"])
def test_small_files_are_repaired_too(sessions, built, out, name):
    (out / name).write_bytes((out / name).read_bytes() or b"x")
    flip_byte(out / name, 0)
    build(sessions, out, verify=True)
    check_set(out)
    assert verify_set(out).problems == ()
    assert set_contents(out) == set_contents(built)


def test_a_shard_with_a_wrong_count_in_the_manifest_is_rebuilt(sessions, out):
    values = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    del values["sha256"]
    values["shards"][0]["num_samples"] += 1
    values["shards"][0]["runs"][0] += 1
    (out / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    assert any(rebuild_hint(out) in problem for problem in verify_set(out).problems)
    build(sessions, out, verify=True)
    assert verify_set(out).problems == ()


def test_files_of_a_killed_build_are_checked_before_they_are_taken_over(
    sessions, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("preprocess.build.commit.write_set_files", fail)
        with pytest.raises(SimulatedKillError):
            build(sessions, out)
    flip_byte(out / "train-000000.audio.tar", 600)
    build(sessions, out, verify=True)
    check_set(out)


def test_a_dry_run_names_what_is_damaged(sessions, out, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe().as_json()), encoding="utf-8")
    given = ["--recipe", str(recipe), "--sessions", str(sessions), "--out", str(out)]
    command = ["shards", *given, "--workers", "0", "--dry-run"]
    flip_byte(out / "val-000000.proprio.zarr.zip", 600)
    assert CliRunner().invoke(cli, command).output == f"{out} is up to date\n"
    assert CliRunner().invoke(cli, [*command, "--verify"]).output.strip() == (
        "would make 1 of 2 proprio columns: its bytes differ from their checksum; 2 rows made"
    )
    lines = CliRunner().invoke(cli, [*command[:-1], "--verify"]).output.splitlines()
    manifest = read_manifest(out)
    held_out = sum(shard.num_samples for shard in manifest.shards if shard.split == "val")
    assert (
        f"{out} is ready: 4 sessions, {manifest.counts['samples']} segments ({held_out} held out) "
        f"+ {manifest.counts['segments_rejected']} rejected"
    ) in lines


def test_hashes_of_rows_are_those_of_the_specification(sessions, out):
    def hash_of(values: object) -> str:
        text = json.dumps([values], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    _, index = next(open_indexes(out))
    column, name = index.columns["external_text"], index.sessions[0]
    files = ("metadata.jsonl", "text.jsonl")
    row = {
        "session": name,
        "segments": dict(index.segments)[name],
        "present": [True] * len(dict(index.segments)[name]),
        "files": {f: hashlib.sha256((sessions / name / f).read_bytes()).hexdigest() for f in files},
        "gain": None,
        "start_s": None,
        "clock_offset_s": 0.0,
        "duration_s": index.header["durations_s"][0],
    }
    assert column["rows"][name] == hash_of(row)
    assert column["basis"]["rows"] == hash_of(list(column["rows"].values()))
    assert column["fingerprint"] == hash_of(column["basis"])
