"""Sets of another format version are refused by every command, and nothing is changed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import sets as tiny_sets
from helpers.oracles import (
    build,
    file_hashes,
    file_identities,
    tiny_recipe,
)

from preprocess.sets.edit import drop_sessions, list_sessions, merge_sets, split_sessions
from preprocess.sets.verify import describe_set, verify_set
from shared.errors import FormatVersionError
from shared.shardset.manifest import read_manifest
from train.data.shard_source import ShardSource

if TYPE_CHECKING:
    from collections.abc import Callable


SESSIONS = Path(__file__).parents[3] / "frozen" / "sessions"
RECIPE = tiny_recipe()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "set"
    build(SESSIONS, out, RECIPE)
    return out


@pytest.fixture
def out(built, tmp_path) -> Path:
    """A set that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "out"))


COMMANDS: dict[str, Callable[[Path], object]] = {
    "shards": lambda out: build(SESSIONS, out, RECIPE),
    "verify": verify_set,
    "show": lambda out: list(describe_set(out)),
    "list": list_sessions,
    "drop": lambda out: drop_sessions(out, ["eve"]),
    "split": lambda out: split_sessions(out, out.parent / "few", ["eve"]),
    "merge": lambda out: merge_sets(out.parent / "all", [out]),
    "train": ShardSource,
}


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (1, r"format version 1 is older than 3.*fix: build the set from its sessions"),
        (4, r"format version 4 is newer than 3.*fix: update the program"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_another_format_is_refused_before_the_set_is_read(out, command, version, says):
    head = f'{{"format": "vr-creature-shards", "format_version": {version}'
    (out / "manifest.json").write_bytes(head.encode() + b"\n and then no JSON \xff")
    (out / ".1234.tmp").mkdir()  # of a job of the other program
    before = file_identities(out)
    with pytest.raises(FormatVersionError, match=r"manifest\.json: " + says):
        COMMANDS[command](out)
    assert file_identities(out) == before


@pytest.mark.parametrize("version", [1, 4])
def test_an_index_of_another_version_is_not_reported_as_corrupt(out, version):
    path = out / read_manifest(out).shards[0].index_file
    content = path.read_bytes().replace(b'\\"version\\":3', b'\\"version\\":%d' % version)
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    tiny_sets.edit_manifest(out, lambda v: v["shards"][0].update(index_sha256=digest))
    before = file_hashes(out)
    with pytest.raises(FormatVersionError, match=f"index version {version} is not 3"):
        build(SESSIONS, out, RECIPE)
    assert file_hashes(out) == before
