"""Edits of sets behind URLs give the bytes of the same edits in folders."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner
from helpers.oracles import build, file_hashes, write_tiny_sessions
from helpers.stores import fail_at_first, s3_server, stored_hashes, upload

from preprocess.__main__ import cli
from preprocess.sets.edit import drop_sessions, list_sessions, merge_sets, split_sessions
from shared.errors import CorruptError, ShardError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A set; read only."""
    root = tmp_path_factory.mktemp("built")
    build(write_tiny_sessions(root / "sessions"), root / "set")
    return root / "set"


@pytest.fixture(scope="module")
def s3():
    with s3_server() as fs:
        yield fs


@pytest.fixture
def memory(built, tmp_path, monkeypatch):
    """The set in memory://here/set; nothing stays in the temporary folder."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    upload(built, fs, "/here/set")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    yield fs
    fs.store.clear()
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.fixture
def local(built, tmp_path) -> Path:
    """The set in a folder, to change."""
    return Path(shutil.copytree(built, tmp_path / "local"))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["sessions", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("store", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_the_commands_do_the_same_on_urls_and_folders(request, built, local, tmp_path, store):
    fs = request.getfixturevalue(store)
    url = f"{store}://here"
    upload(built, fs, "here/set")
    assert run("list", f"{url}/set") == run("list", local)
    run("split", local, tmp_path / "few", "cat", "bob")
    assert "2 sessions" in run("split", f"{url}/set", f"{url}/few", "cat", "bob")
    assert stored_hashes(fs, "here/few") == file_hashes(tmp_path / "few")
    run("drop", local, "cat", "bob")
    run("drop", f"{url}/set", "cat", "bob", "--keep-old", 0)
    assert stored_hashes(fs, "here/set") == file_hashes(local)
    run("merge", tmp_path / "all", local, tmp_path / "few")
    run("merge", f"{url}/all", f"{url}/set", tmp_path / "few")
    assert stored_hashes(fs, "here/all") == file_hashes(tmp_path / "all")
    run("merge", tmp_path / "from-store", f"{url}/set", f"{url}/few")
    assert file_hashes(tmp_path / "from-store") == file_hashes(tmp_path / "all")


def test_a_reader_of_a_remote_set_keeps_its_files_through_a_drop(memory, built):
    before = {n: h for n, h in file_hashes(built).items() if n.startswith(("train", "val", "tok"))}
    drop_sessions("memory://here/set", ["cat"])
    assert before.items() <= stored_hashes(memory, "/here/set").items()


def test_transient_failures_change_nothing(memory, built, local, monkeypatch):
    drop_sessions(local, ["cat"])
    with monkeypatch.context() as patched:
        fail_at_first(patched, memory, 4)
        drop_sessions("memory://here/set", ["cat"], keep_old_s=0.0)
    assert stored_hashes(memory, "/here/set") == file_hashes(local)


@pytest.mark.parametrize("place", ["nowhere", "memory://nowhere/set", "s3://here/nowhere"])
def test_a_missing_set_is_not_created(request, memory, built, tmp_path, monkeypatch, place):
    s3 = request.getfixturevalue("s3") if place.startswith("s3") else None
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for act in (
        lambda: list_sessions(place),
        lambda: drop_sessions(place, ["ann"]),
        lambda: split_sessions(place, "out", ["ann"]),
        lambda: split_sessions(place, "memory://out", ["ann"]),
        lambda: merge_sets("out", [place]),
        lambda: merge_sets("memory://out", [built, place]),
    ):
        with pytest.raises(ShardError, match=f"{place}.*no such shard set"):
            act()
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.startswith("/here/set/") for path in memory.find("/"))
    assert s3 is None or s3.find("here/nowhere") == []


def test_unknown_sessions_and_existing_sets_leave_a_store_unchanged(memory):
    before = stored_hashes(memory, "/")
    with pytest.raises(ShardError, match=r"memory://here/set: no session 'cast' .* 'cat'"):
        drop_sessions("memory://here/set", ["cast"])
    with pytest.raises(ShardError, match="memory://here/set: is a shard set already"):
        split_sessions("memory://here/set", "memory://here/set", ["cat"])
    with pytest.raises(ShardError, match="no sample would be left"):
        drop_sessions("memory://here/set", ["ann", "bob", "cat", "dan"])
    assert stored_hashes(memory, "/") == before


def test_a_column_that_is_damaged_in_the_store_is_not_copied(memory, built):
    name = next(p.name for p in sorted(built.iterdir()) if p.name.endswith(".audio.tar"))
    content = bytearray(memory.cat_file(f"/here/set/{name}"))
    content[600] ^= 1
    memory.pipe_file(f"/here/set/{name}", bytes(content))
    with pytest.raises(CorruptError, match=f"memory://here/set/{name}: checksum differs"):
        merge_sets("memory://here/copy", ["memory://here/set"])
    assert not memory.exists("/here/copy/manifest.json")
