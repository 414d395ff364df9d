"""Sessions of sets of an older format, and sets of a format to come, which are refused."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import sets as tiny_sets
from helpers.frozen_sets import BUMPED, OLD, RECIPE, SESSIONS, columns_of, header_of
from helpers.oracles import (
    build,
    file_hashes,
    file_identities,
    set_contents,
)

from preprocess.build.explain import reasons
from preprocess.sets.edit import drop_sessions, list_sessions, merge_sets, split_sessions
from preprocess.sets.verify import describe_set, verify_set
from shared.errors import FormatVersionError
from shared.shardset.layout import COLUMNS
from shared.shardset.manifest import read_manifest
from train.data.shard_source import ShardSource

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def out(tmp_path) -> Path:
    """The old set, for a test to change."""
    return Path(shutil.copytree(OLD, tmp_path / "out"))


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory) -> Path:
    out = Path(shutil.copytree(OLD, tmp_path_factory.mktemp("upgraded") / "set"))
    build(SESSIONS, out, RECIPE)
    return out


# --- sessions of old sets --------------------------------------------------------------------


def sessions_without(folder: Path, name: str) -> Path:
    shutil.copytree(SESSIONS, folder, ignore=shutil.ignore_patterns(name))
    return folder


def test_after_a_session_with_a_shard_of_its_own_went_every_column_stays(out, tmp_path):
    drop_sessions(out, ["eve"])
    assert read_manifest(out).format_version == 2
    assert {header_of(path)[0] for path in out.glob("*.index")} == {2}
    assert verify_set(out).problems == ()
    before = file_identities(out)
    summary = build(sessions_without(tmp_path / "rest", "eve"), out, RECIPE)
    if not BUMPED:
        assert reasons(summary.plan) == [
            ("rewrite", "2 of 2 indexes: they lack hashes or statistics of their sessions")
        ]
    for name in columns_of(out):
        assert file_identities(out)[name] == before[name]


def test_a_shard_that_lost_one_of_its_sessions_is_made_again_by_the_next_build(out, tmp_path):
    drop_sessions(out, ["cat"])
    assert verify_set(out).problems == ()
    assert [s.name for s in list_sessions(out)] == ["ann", "bob", "eve"]
    due = {
        task.name: set(task.due) - BUMPED
        for task in build(sessions_without(tmp_path / "rest", "cat"), out, RECIPE).plan.tasks
    }
    assert due == {
        "train-000000": set(COLUMNS) - BUMPED,
        "train-000001": set(),
        "val-000000": set(),
    }


def test_old_sets_are_split_and_merged_with_new_ones(tmp_path, upgraded):
    split_sessions(OLD, tmp_path / "few", ["eve", "bob"])
    split_sessions(upgraded, tmp_path / "rest", ["ann", "cat"])
    merge_sets(tmp_path / "all", [tmp_path / "rest", tmp_path / "few"])
    assert verify_set(tmp_path / "all").problems == ()
    if not BUMPED:
        assert set_contents(tmp_path / "all") == set_contents(OLD)


# --- formats to come -------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Path], object]] = {
    "shards": lambda out: build(SESSIONS, out, RECIPE),
    "verify": verify_set,
    "show": lambda out: list(describe_set(out)),
    "list": list_sessions,
    "drop": lambda out: drop_sessions(out, ["eve"]),
    "split": lambda out: split_sessions(out, out.parent / "few", ["eve"]),
    "merge": lambda out: merge_sets(out.parent / "all", [OLD, out]),
    "train": ShardSource,
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_newer_format_is_refused_before_anything_else_is_looked_at(out, what):
    head = '{"format": "vr-creature-shards", "format_version": 3'
    (out / "manifest.json").write_bytes(head.encode() + b"\n and then no JSON \xff")
    (out / ".1234.tmp").mkdir()  # of a job of the newer program
    before = file_identities(out)
    says = r"manifest\.json: format version 3 is newer than 2.*update the program"
    with pytest.raises(FormatVersionError, match=says):
        COMMANDS[what](out)
    assert file_identities(out) == before


def test_a_newer_index_is_not_taken_for_a_damaged_one(upgraded, tmp_path):
    out = Path(shutil.copytree(upgraded, tmp_path / "out"))
    path = out / read_manifest(out).shards[0].index_file
    content = bytearray(path.read_bytes())
    content[8] = 3
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    tiny_sets.edit_manifest(out, lambda v: v["shards"][0].update(index_sha256=digest))
    before = file_hashes(out)
    with pytest.raises(FormatVersionError, match="index version 3 is newer than 2"):
        build(SESSIONS, out, RECIPE)
    assert file_hashes(out) == before
