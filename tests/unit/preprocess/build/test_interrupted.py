"""Interrupted builds and damaged sets: the next build ends with the bytes of an undisturbed one."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.oracles import (
    build,
    check_set,
    file_hashes,
    file_identities,
    set_contents,
    tiny_recipe,
)
from helpers.processes import SimulatedKillError, fail

from preprocess.build import task as task_module
from shared.errors import ShardError
from shared.shardset.manifest import read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.iterdir() if p.name.endswith(".tmp")]


# --- broken off ------------------------------------------------------------------------------

BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "in a tar column": lambda m: m.setattr("preprocess.build.write.encode_text", fail),
    "in a zarr column": lambda m: m.setattr("preprocess.build.write.write_zarr_column", fail),
    "before an index": lambda m: m.setattr(task_module, "index_bytes", fail),
    "before the manifest": lambda m: m.setattr("preprocess.build.commit.commit_manifest", fail),
    "before the sweep": lambda m: m.setattr("preprocess.build.commit.delete_unreferenced", fail),
}


def break_off(monkeypatch: pytest.MonkeyPatch, where: str, *args: Any) -> None:
    with monkeypatch.context() as patched:
        BREAKS[where](patched)
        with pytest.raises(SimulatedKillError):
            build(*args)


@pytest.mark.parametrize("where", BREAKS)
def test_an_interrupted_first_build_is_completed_to_the_same_bytes(
    recorded, built, tmp_path, monkeypatch, where
):
    out = tmp_path / "out"
    break_off(monkeypatch, where, recorded, out)
    if where != "before the sweep":
        with pytest.raises(ShardError, match="no such shard set"):
            read_manifest(out)
    build(recorded, out)
    assert file_hashes(out) == file_hashes(built)
    assert leftovers(out) == []


@pytest.mark.parametrize("where", BREAKS)
def test_an_interrupted_update_leaves_the_previous_set_whole_and_is_completed(
    sessions, out, tmp_path, monkeypatch, where
):
    undisturbed = Path(shutil.copytree(out, tmp_path / "undisturbed"))
    recipe = tiny_recipe(text={"vocab_size": 264}, sensor={"max_gap_s": 0.2})
    old = read_manifest(out)
    num_members = check_set(out)
    break_off(monkeypatch, where, sessions, out, recipe)
    if where != "before the sweep":
        assert read_manifest(out) == old
        assert check_set(out) == num_members
    build(sessions, undisturbed, recipe)
    build(sessions, out, recipe)
    assert file_hashes(out) == file_hashes(undisturbed)
    assert leftovers(out) == []
    check_set(out)


def test_finished_shards_of_an_interrupted_build_are_taken_over(recorded, tmp_path, monkeypatch):
    out = tmp_path / "out"
    break_off(monkeypatch, "before the manifest", recorded, out)
    before = {n: i for n, i in file_identities(out).items() if n.startswith(("train", "val"))}
    build(recorded, out)
    after = file_identities(out)
    assert {n: after[n] for n in before} == before


def test_two_interrupted_builds_with_different_recipes_do_not_mix(recorded, tmp_path, monkeypatch):
    out = tmp_path / "out"
    break_off(monkeypatch, "before the manifest", recorded, out, tiny_recipe())
    # The same sizes of files, other bytes; broken off when they are replaced and the index is not.
    other = tiny_recipe(audio={"dmel": {"floor_db": -60}})
    break_off(monkeypatch, "before an index", recorded, out, other)
    build(recorded, out, tiny_recipe())
    check_set(out)
    build(recorded, tmp_path / "undisturbed", tiny_recipe())
    assert file_hashes(out) == file_hashes(tmp_path / "undisturbed")


def test_temporary_files_of_a_killed_build_are_removed(sessions, out):
    (out / ".train-000000.audio.tar.123.tmp").write_bytes(b"half")
    build(sessions, out)
    assert leftovers(out) == []


def test_other_files_in_the_folder_stay(sessions, out):
    names = ["train-notes.md", "tokenizer-mine.json", "val-000000.txt", "train-000000.tar"]
    for name in names:
        (out / name).write_text("mine", encoding="utf-8")
    (out / "train-logs").mkdir()
    build(sessions, out, tiny_recipe(text={"vocab_size": 264}))
    assert all((out / name).read_text(encoding="utf-8") == "mine" for name in names)
    assert (out / "train-logs").is_dir()


# --- killed before every change of a file ----------------------------------------------------

OTHER_TEXT = tiny_recipe(text={"vocab_size": 264})

KILLED = """
import os, sys
from pathlib import Path
from helpers.oracles import build, tiny_recipe

sessions, out, left = Path(sys.argv[1]), Path(sys.argv[2]), [int(sys.argv[3])]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def die_before_a_change(event, arguments):
    is_change = event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}
    is_new = event == "open" and (arguments[2] or 0) & WRITES and str(out) in str(arguments[0])
    if is_change or is_new:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)

sys.addaudithook(die_before_a_change)
build(sessions, out, tiny_recipe(text={"vocab_size": 264}))
os._exit(0)
"""
"""An update that dies before its n-th change of a folder or file."""


@pytest.mark.slow
def test_an_update_killed_before_any_change_of_a_file_leaves_one_of_the_two_sets(
    recorded, built, tmp_path
):
    old, new = built, tmp_path / "new"
    shutil.copytree(old, new)
    build(recorded, new, OTHER_TEXT)
    tests = Path(__file__).parents[3]
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    num_members, generations, code = check_set(old), [], 9
    for number in itertools.count():
        out = Path(shutil.copytree(old, tmp_path / f"out{number}"))
        code = subprocess.run(
            [sys.executable, "-c", KILLED, str(recorded), str(out), str(number)],
            env={**os.environ, "PYTHONPATH": paths},
        ).returncode
        manifest = read_manifest(out)
        generations.append(manifest.generation)
        expected = read_manifest(new if manifest.generation else old)
        assert manifest == replace(expected, root=out)
        assert check_set(out) == num_members
        build(recorded, out, OTHER_TEXT)
        assert file_hashes(out) == file_hashes(new)
        if code == 0:
            break
        assert code == 9
    assert generations == sorted(generations)
    assert generations.count(0) > 10
    assert generations.count(1) > 3


# --- damaged sets ----------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Path], object]] = {
    "a column is gone": lambda out: (out / "train-000000.audio.tar").unlink(),
    "a column is cut": lambda out: os.truncate(out / "val-000000.audio.dmel.zarr.zip", 100),
    "an index is gone": lambda out: (out / "train-000000.index").unlink(),
    "an index is cut": lambda out: os.truncate(out / "train-000000.index", 100),
    "the tokenizer is gone": lambda out: (out / "tokenizer.json").unlink(),
    "the tokenizer is cut": lambda out: os.truncate(out / "tokenizer.json", 100),
    "the manifest is cut": lambda out: os.truncate(out / "manifest.json", 100),
    "the rejected are gone": lambda out: (out / "rejected.jsonl").unlink(),
    "the scans are gone": lambda out: (out / "sessions.jsonl").unlink(),
    "the scans are cut": lambda out: os.truncate(out / "sessions.jsonl", 2000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_next_build_repairs_a_damaged_set(sessions, built, out, damage):
    DAMAGES[damage](out)
    build(sessions, out)
    check_set(out)
    assert set_contents(out) == set_contents(built)
    assert (out / "rejected.jsonl").read_bytes() == (built / "rejected.jsonl").read_bytes()
    again = build(sessions, out)
    assert (again.plan.is_empty, again.num_scanned) == (True, 0)


def test_only_one_job_builds_a_set(sessions, out):
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match="another job is building this shard set"):
            build(sessions, out)
    finally:
        os.close(descriptor)
