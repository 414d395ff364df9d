"""Listed, dropped, split and merged sessions: the samples of a build of the same sessions.

Nothing is decoded.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from helpers.oracles import (
    SESSIONS,
    build,
    check_set,
    file_hashes,
    file_identities,
    jsonl,
    open_indexes,
    set_keys,
    tiny_recipe,
    write_tiny_session,
    write_tiny_sessions,
)

from preprocess.__main__ import cli
from preprocess.sets.edit import drop_sessions, list_sessions, merge_sets, split_sessions
from preprocess.sets.verify import verify_set
from shared.errors import ShardError
from shared.shardset.columns import ColumnFile
from shared.shardset.locks import read_manifest_locked
from shared.shardset.manifest import read_manifest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """The tiny sessions, and one more."""
    root = write_tiny_sessions(tmp_path_factory.mktemp("recorded"))
    write_tiny_session(root / "eve", 2.1)
    return root


@pytest.fixture(scope="module")
def tokenizer(recorded, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("first")
    build(recorded, out)
    return out / "tokenizer.json"


@pytest.fixture(params=[2**16, 2**20], ids=["many shards", "one shard"])
def recipe(request, tokenizer):
    return tiny_recipe(
        shard={"target_bytes": request.param},
        text={"tokenizer": str(tokenizer)},
        video={"codec": "raw"},
    )


@pytest.fixture
def whole(recorded, recipe, tmp_path) -> Path:
    build(recorded, tmp_path / "whole", recipe)
    return tmp_path / "whole"


def samples(out: Path) -> dict[tuple[str, str], bytes | None]:
    """Every member and row of a set, by key and name, wherever it lies."""
    found = {}
    for _, index in open_indexes(out):
        for name, column in index.columns.items():
            file = ColumnFile(out / column["file"])
            for row in range(index.num_samples):
                found[index.key(row), name] = file.read(index.members(name), row)
            file.close()
        for name in ("coverage", "present", "vision_left.error_s"):
            for row in range(index.num_samples):
                found[index.key(row), name] = index.arrays[name][row].tobytes()
        for row in range(index.num_samples):
            found[index.key(row), "duration"] = index.duration_s(row)
    return found


def runs(out: Path) -> list[tuple[str, int, int]]:
    """(session, first segment, length) of each run, from the manifest's lengths."""
    found = []
    for entry, (_, index) in zip(read_manifest(out).shards, open_indexes(out), strict=True):
        row = 0
        for length in entry.runs:
            found.append((index.session(row), index.segment(row), length))
            row += length
    return sorted(found)


def only(recorded: Path, folder: Path, names: set[str]) -> Path:
    for name in names:
        shutil.copytree(recorded / name, folder / name)
    return folder


def same_as_built(out: Path, built: Path) -> None:
    """The samples, statistics, counts and rejections of a build of the same sessions."""
    assert samples(out) == samples(built)
    assert runs(out) == runs(built)  # so windows are the same, too
    one, other = read_manifest(out), read_manifest(built)
    assert one.counts == other.counts
    assert one.statistics == other.statistics
    assert jsonl(out / "rejected.jsonl") == jsonl(built / "rejected.jsonl")
    assert verify_set(out).problems == ()
    check_set(out)


NAMES = {*SESSIONS, "eve"}


@pytest.mark.parametrize("dropped", [{"cat"}, {"bob"}, {"ann", "eve"}], ids=["cat", "bob", "two"])
def test_dropping_sessions_equals_building_the_others(whole, recorded, recipe, tmp_path, dropped):
    drop_sessions(whole, dropped)
    rest = only(recorded, tmp_path / "rest", NAMES - dropped)
    build(rest, tmp_path / "built", recipe)
    same_as_built(whole, tmp_path / "built")
    assert read_manifest(whole).generation == 1


def test_shards_without_a_dropped_session_stay_unchanged(whole):
    mine = {s.name: set(s.shards) for s in list_sessions(whole)}
    before = file_identities(whole)
    drop_sessions(whole, ["cat"])
    after = file_identities(whole)
    others = set.union(*mine.values()) - mine["cat"]
    kept = {n for n in before if n.split(".")[0] in others}
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}


def test_a_build_after_a_drop_has_nothing_to_do(whole, recorded, recipe, tmp_path):
    drop_sessions(whole, ["cat"])
    before = file_hashes(whole)
    rest = only(recorded, tmp_path / "rest", NAMES - {"cat"})
    assert build(rest, whole, recipe).plan.is_empty
    assert file_hashes(whole) == before


def test_a_dropped_session_comes_back_by_a_build(whole, recorded, recipe):
    keys = set(set_keys(whole))
    drop_sessions(whole, ["cat"])
    build(recorded, whole, recipe)
    assert set(set_keys(whole)) == keys


def test_splitting_sessions_equals_building_them(whole, recorded, recipe, tmp_path):
    before = file_hashes(whole)
    split_sessions(whole, tmp_path / "few", ["cat", "eve", "bob"])
    assert file_hashes(whole) == before
    rest = only(recorded, tmp_path / "rest", {"cat", "eve", "bob"})
    build(rest, tmp_path / "built", recipe)
    same_as_built(tmp_path / "few", tmp_path / "built")
    assert build(rest, tmp_path / "few", recipe).plan.is_empty


def test_merging_sets_equals_building_all_sessions(whole, recorded, recipe, tmp_path):
    names = {"ann", "cat"}
    build(only(recorded, tmp_path / "a", names), tmp_path / "one", recipe)
    build(only(recorded, tmp_path / "b", NAMES - names), tmp_path / "two", recipe)
    merge_sets(tmp_path / "all", [tmp_path / "one", tmp_path / "two"])
    same_as_built(tmp_path / "all", whole)
    inodes = {p.stat().st_ino for p in (tmp_path / "one").iterdir()}
    linked = [p for p in (tmp_path / "all").iterdir() if p.stat().st_ino in inodes]
    assert {p.suffix for p in linked} == {".tar", ".zip"}
    assert build(recorded, tmp_path / "all", recipe).plan.is_empty


def test_splitting_and_merging_gives_the_same_set(whole, tmp_path):
    split_sessions(whole, tmp_path / "one", ["cat", "dan"])
    split_sessions(whole, tmp_path / "two", ["ann", "bob", "eve"])
    merge_sets(tmp_path / "all", [tmp_path / "one", tmp_path / "two"])
    assert samples(tmp_path / "all") == samples(whole)
    assert runs(tmp_path / "all") == runs(whole)
    assert read_manifest(tmp_path / "all").counts == read_manifest(whole).counts


def test_nothing_is_decoded(whole, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        pytest.fail("a recording is opened, or a picture decoded or encoded")

    monkeypatch.setattr("preprocess.build.sources.SessionReader", fail)
    monkeypatch.setattr("preprocess.build.write.encode_pictures", fail)
    drop_sessions(whole, ["cat"])
    split_sessions(whole, tmp_path / "few", ["ann"])
    merge_sets(tmp_path / "copy", [whole])
    assert set_keys(tmp_path / "copy") == set_keys(whole)


def test_a_reader_of_the_set_keeps_its_files_through_a_drop(whole):
    manifest, hold = read_manifest_locked(whole)
    drop_sessions(whole, ["cat"])
    assert all((whole / entry.index_file).exists() for entry in manifest.shards)
    hold.close()


def test_unknown_sessions_and_incompatible_sets_are_named(whole, recorded, recipe, tmp_path):
    before = file_hashes(whole)
    with pytest.raises(ShardError, match="no session 'cast' in this set; did you mean 'cat'"):
        drop_sessions(whole, ["cast"])
    with pytest.raises(ShardError, match="no sample would be left"):
        drop_sessions(whole, NAMES)
    with pytest.raises(ShardError, match="is a shard set already"):
        split_sessions(whole, whole, ["cat"])
    settings = {"shard": recipe.shard.as_json(), "text": recipe.text.as_json()}
    other = tiny_recipe(audio={"rate_hz": 8000}, video={"codec": "raw"}, **settings)
    build(only(recorded, tmp_path / "a", {"dan"}), tmp_path / "other", other)
    with pytest.raises(ShardError, match=r"different recipes: streams.audio.rate_hz 16000 -> 8000"):
        merge_sets(tmp_path / "all", [whole, tmp_path / "other"])
    split_sessions(whole, tmp_path / "few", ["cat"])
    with pytest.raises(ShardError, match=r"session cat is in .* leave out .*few: all its sessions"):
        merge_sets(tmp_path / "all", [whole, tmp_path / "few"])
    assert file_hashes(whole) == before
    assert not (tmp_path / "all").exists()


def test_a_set_is_not_merged_with_itself_under_another_name(whole, tmp_path, monkeypatch):
    before = file_hashes(whole)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(whole)
    shutil.copytree(whole, tmp_path / "copy")
    for name in ("whole", "./whole", "copy/../whole", "link", "copy", f"file://{whole}"):
        result = CliRunner().invoke(cli, ["sessions", "merge", "all", "whole", name])
        assert result.exit_code == 1
        assert "are the same set (fingerprint" in result.output
        assert "sessions drop" not in result.output
    assert not (tmp_path / "all").exists()
    assert file_hashes(whole) == before


def test_the_fix_for_overlapping_sets_works(whole, tmp_path):
    split_sessions(whole, tmp_path / "one", ["ann", "bob", "cat"])
    split_sessions(whole, tmp_path / "two", ["bob", "cat", "dan", "eve"])
    with pytest.raises(
        ShardError, match=r"session bob \(and 1 more\) is in .*one and in"
    ) as caught:
        merge_sets(tmp_path / "all", [tmp_path / "one", tmp_path / "two"])
    command = str(caught.value).partition("python -m preprocess ")[2]
    arguments = command.replace("NEW_SET", str(tmp_path / "rest")).split()
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    merge_sets(tmp_path / "all", [tmp_path / "one", tmp_path / "rest"])
    assert samples(tmp_path / "all") == samples(whole)


def test_sets_with_different_tokenizers_are_not_merged(recorded, tmp_path):
    for name in ("ann", "cat"):
        build(only(recorded, tmp_path / f"{name}s", {name}), tmp_path / name, tiny_recipe())
    with pytest.raises(ShardError, match=r"different tokenizers; fix: build .* text.tokenizer: "):
        merge_sets(tmp_path / "all", [tmp_path / "ann", tmp_path / "cat"])


def test_the_commands_list_drop_split_and_merge(whole, tmp_path):
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(cli, ["sessions", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    lines = run("list", whole).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["ann", "train", "2"],
        ["bob", "val", "2"],
        ["cat", "train", "4"],
        ["dan", "train", "1"],
        ["eve", "train", "3"],
    ]
    assert [line.split()[4] for line in lines] == ["0"] * 5
    assert "1 sessions, 4 samples (0 held out)" in run("split", whole, tmp_path / "few", "cat")
    output = run("drop", whole, "cat")
    assert "4 sessions, 8 samples (2 held out)" in output
    assert "`make shards` into it brings cat back" in output
    output = run("merge", tmp_path / "all", whole, tmp_path / "few")
    assert "5 sessions, 12 samples (2 held out)" in output
