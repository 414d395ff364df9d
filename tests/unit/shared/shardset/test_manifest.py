"""The manifest: atomic, versioned, and leading nowhere out of its folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import sets as tiny_sets
from hypothesis import given
from hypothesis import strategies as st

from preprocess.build.plan_types import SessionSegments, runs_of
from shared.errors import ConfigError, CorruptError, FormatVersionError, ShardError
from shared.media.tokenizer import train_tokenizer
from shared.recipe import Recipe
from shared.shardset.index import ShardIndex
from shared.shardset.layout import field_schema
from shared.shardset.manifest import (
    Manifest,
    ShardEntry,
    commit_manifest,
    find_runs,
    parse_manifest,
    read_manifest,
)

KEYS = [
    "recipe",
    "shards",
    "generation",
    "tokenizer",
    "fields",
    "statistics",
    "counts",
    "fingerprint",
]
TOKENIZER = train_tokenizer(["some words"], vocab_size=300)


def entry(name: str = "train-000000", **changes: Any) -> ShardEntry:
    values = {
        "name": name,
        "split": name.partition("-")[0],
        "num_samples": 3,
        "runs": (2, 1),
        "length_bytes": 1000,
        "index_file": f"{name}.index",
        "index_sha256": "ab" * 32,
    }
    return ShardEntry(**{**values, **changes})


def make_manifest(root: Path, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "root": root,
        "recipe": Recipe(),
        "shards": (entry(), entry("train-000001", num_samples=2, runs=(2,)), entry("val-000000")),
        "generation": 4,
        "tokenizer_file": "tokenizer.json",
        "tokenizer_sha256": TOKENIZER.sha256,
        "fields": field_schema(Recipe()),
        "statistics": {"num_samples": 5, "proprio": {"count": 1, "mean": [0.1, 1e-17]}},
        "counts": {"samples": 8, "segments_planned": 9, "segments_rejected": 1},
        "fingerprint": "f" * 32,
    }
    return Manifest(**{**values, **changes})


def edited(root: Path, edit: Any) -> Path:
    """A committed manifest whose JSON values are changed by `edit`."""
    commit_manifest(make_manifest(root))
    tiny_sets.edit_manifest(root, edit)
    return root


def test_a_manifest_round_trips(tmp_path):
    commit_manifest(make_manifest(tmp_path))
    assert read_manifest(tmp_path) == make_manifest(tmp_path)
    assert read_manifest(str(tmp_path)) == make_manifest(tmp_path)


def test_the_bytes_of_a_manifest_do_not_depend_on_its_folder(tmp_path):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        commit_manifest(make_manifest(tmp_path / name))
        contents.append((tmp_path / name / "manifest.json").read_bytes())
    assert contents[0] == contents[1]


def test_a_json_reader_finds_the_checksum_of_all_bytes_before(tmp_path):
    commit_manifest(make_manifest(tmp_path))
    content = (tmp_path / "manifest.json").read_bytes()
    *_, last = json.loads(content)
    assert last == "sha256"
    before, _, _ = content.rpartition(b',\n "sha256"')
    assert json.loads(content)["sha256"] == hashlib.sha256(before).hexdigest()


def test_every_flipped_bit_is_found(tmp_path):
    commit_manifest(make_manifest(tmp_path))
    good = (tmp_path / "manifest.json").read_bytes()
    unfound = []
    for bit in range(8 * len(good)):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        try:
            parse_manifest(bytes(content), root=tmp_path, path="manifest.json")
        except (CorruptError, FormatVersionError):
            continue
        unfound.append(bytes(content[-100:]))
    # A flip in the key "sha256" hides the checksum, but every byte that it covers is unchanged.
    assert all(b'"sha256": "' not in tail for tail in unfound)
    assert len(unfound) <= 8 * len("sha256")


def test_an_edited_manifest_is_refused_until_its_checksum_is_removed(tmp_path):
    commit_manifest(make_manifest(tmp_path))
    path = tmp_path / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"generation": 4', '"generation": 5'))
    with pytest.raises(CorruptError, match=r"differs from its own checksum.*edited by hand"):
        read_manifest(tmp_path)
    tiny_sets.edit_manifest(tmp_path, lambda values: None)
    assert read_manifest(tmp_path).generation == 5


@given(
    sessions=st.lists(st.sets(st.integers(0, 12), min_size=1, max_size=8).map(sorted), max_size=4)
)
def test_runs_are_consecutive_segments_of_one_session(sessions):
    rows = [(session, segment) for session, own in enumerate(sessions) for segment in own]
    arrays = {
        "session": np.array([session for session, _ in rows], np.uint32),
        "segment": np.array([segment for _, segment in rows], np.uint32),
    }
    slow: list[int] = []
    for number, row in enumerate(rows):
        if number and rows[number - 1] == (row[0], row[1] - 1):
            slow[-1] += 1
        else:
            slow.append(1)
    assert find_runs(ShardIndex(header={}, arrays=arrays)) == tuple(slow)
    planned = [SessionSegments(str(n), tuple(own)) for n, own in enumerate(sessions)]
    assert runs_of(planned) == tuple(slow)


def test_splits_are_counted_separately(tmp_path):
    manifest = make_manifest(tmp_path)
    assert [s.name for s in manifest.in_split("train")] == ["train-000000", "train-000001"]
    assert (manifest.num_samples("train"), manifest.num_samples("val")) == (5, 3)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_half_way_leaves_the_old_manifest(tmp_path, monkeypatch, failing):
    commit_manifest(make_manifest(tmp_path))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if failing == "fsync":
            patched.setattr(os, "fsync", fail)
        else:
            patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            commit_manifest(make_manifest(tmp_path, generation=5))
    assert read_manifest(tmp_path).generation == 4
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_a_missing_set_says_how_to_make_one(tmp_path):
    with pytest.raises(ShardError, match="no such shard set; fix: build it by `python -m"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (1, r"version 1 is older than 3.*fix: build the set from its sessions"),
        (2, r"version 2 is older than 3.*fix: run `python -m preprocess upgrade "),
        (4, r"version 4 is newer than 3.*fix: update the program"),
    ],
)
def test_another_format_is_refused_with_what_to_do(tmp_path, version, says):
    edited(tmp_path, lambda v: v.update(format_version=version))
    with pytest.raises(FormatVersionError, match=says):
        read_manifest(tmp_path)


def test_a_newer_format_is_refused_before_other_keys_are_read(tmp_path):
    values = {"format": "vr-creature-shards", "format_version": 7, "quite": "different"}
    (tmp_path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(FormatVersionError):
        read_manifest(tmp_path)


def test_an_unknown_recipe_key_is_named(tmp_path):
    edited(tmp_path, lambda v: v["recipe"]["video"].update(depth=3))
    with pytest.raises(ConfigError, match=r"manifest\.json: recipe: unknown key 'video\.depth'"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"format": "other"}', b"\xff\xfe", b"[" * 100_000],
    ids=lambda c: c[:10].decode("latin1"),
)
def test_a_file_that_is_not_a_manifest_is_corrupt(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_folder_in_place_of_the_manifest_is_corrupt(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(CorruptError):
        read_manifest(tmp_path)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["gone", None, 3.5, [3]])
def test_a_missing_key_or_another_type_is_a_clear_error(tmp_path, key, value):
    edited(tmp_path, lambda v: v.pop(key) if value == "gone" else v.update({key: value}))
    with pytest.raises((CorruptError, ConfigError), match=r"manifest\.json"):
        read_manifest(tmp_path)


UNSAFE = ["../other.index", "/etc/passwd", "a/b.index", "..", ".", "", ".hidden", "a\x00", 3, None]


@pytest.mark.parametrize("name", UNSAFE)
def test_an_index_file_outside_the_set_is_refused(tmp_path, name):
    edited(tmp_path, lambda v: v["shards"][1].update(index_file=name))
    with pytest.raises(CorruptError, match="not a plain file name"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", UNSAFE)
def test_a_tokenizer_file_outside_the_set_is_refused(tmp_path, name):
    edited(tmp_path, lambda v: v["tokenizer"].update(file=name))
    with pytest.raises(CorruptError, match="not a plain file name"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"split": "test"},
        {"num_samples": -1},
        {"num_samples": "3"},
        {"length_bytes": 1e9},
        {"x": 1},
        {"runs": [2, 2]},
        {"runs": [3, 0]},
        {"runs": [4, -1]},
        {"runs": ["3"]},
        {"runs": 3},
        {"runs": []},
    ],
)
def test_an_impossible_shard_entry_is_refused(tmp_path, change):
    edited(tmp_path, lambda v: v["shards"][0].update(change))
    with pytest.raises(CorruptError, match="is damaged"):
        read_manifest(tmp_path)


def test_the_tokenizer_is_loaded_and_checked(tmp_path):
    manifest = make_manifest(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.json, encoding="utf-8")
    assert manifest.load_tokenizer().encode("some") == TOKENIZER.encode("some")
    for content in (TOKENIZER.json.encode() + b" ", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match="checksum differs"):
            manifest.load_tokenizer()
    path.unlink()
    with pytest.raises(ShardError, match="can't be read"):
        manifest.load_tokenizer()
