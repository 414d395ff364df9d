"""``--compact``: the bytes of a fresh build, without looking into a recording."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.oracles import (
    build,
    check_set,
    file_hashes,
    file_identities,
    open_indexes,
    set_contents,
    tiny_recipe,
    write_tiny_session,
    write_tiny_sessions,
)
from helpers.processes import SimulatedKillError, fail
from helpers.sets import flip_byte

from preprocess.build import reuse_reader as stored
from preprocess.build import task as build_module
from preprocess.build import write
from shared.media.tokenizer import train_tokenizer
from shared.session.reader import SessionReader
from shared.shardset.manifest import read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.recipe import Recipe

READERS = ("iter_frames", "read_audio", "read_dmel", "read_sensor", "read_text")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Seven segments a shard, so that one is divided; a tokenizer that sessions don't move."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(["hello, wörld"], vocab_size=270).json, encoding="utf-8")
    return tiny_recipe(shard={"target_bytes": 2**18}, text={"tokenizer": str(path)})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Tiny sessions, and a long one."""
    root = write_tiny_sessions(tmp_path_factory.mktemp("recorded"))
    write_tiny_session(root / "fay", 11.0, has_right=True)
    return root


@pytest.fixture(scope="module")
def grown_set(recorded, recipe, tmp_path_factory) -> Path:
    """A set of the sessions, of which one after the other came."""
    folder = tmp_path_factory.mktemp("grown")
    for name in ("fay", "dan", "cat", "bob", "ann"):
        shutil.copytree(recorded / name, folder / "sessions" / name)
        build(folder / "sessions", folder / "set", recipe)
    return folder / "set"


@pytest.fixture(scope="module")
def fresh(recorded, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("fresh") / "set"
    build(recorded, out, recipe)
    return out


@pytest.fixture
def grown(grown_set, tmp_path) -> Path:
    return Path(shutil.copytree(grown_set, tmp_path / "grown"))


@pytest.fixture
def no_recordings(monkeypatch) -> None:
    """Reading a recording, or encoding a row, fails."""
    for method in READERS:
        monkeypatch.setattr(SessionReader, method, lambda *_: pytest.fail("a recording is read"))
    for encode in ("encode_pictures", "encode_text", "encode_wav"):
        monkeypatch.setattr(write, encode, lambda *_, **__: pytest.fail("a row is encoded"))


def all_of(out: Path) -> dict[str, Any]:
    """Everything of a set but file names: members, arrays, headers, and the manifest."""
    headers = {}
    for name, index in open_indexes(out):
        columns = {n: {**c, "file": ""} for n, c in index.columns.items()}
        headers[name] = json.dumps({**index.header, "columns": columns}, sort_keys=True)
    manifest = read_manifest(out)
    return {
        "contents": set_contents(out),
        "headers": headers,
        "manifest": (manifest.statistics, manifest.counts, manifest.recipe, manifest.fields),
        "rejected": (out / "rejected.jsonl").read_bytes(),
    }


@pytest.mark.usefixtures("no_recordings")
def test_a_grown_set_becomes_a_fresh_one_and_no_recording_is_read(recorded, recipe, grown, fresh):
    assert len(read_manifest(grown).shards) > len(read_manifest(fresh).shards)
    summary = build(recorded, grown, recipe, compact=True)
    assert any(len(task.copied_index_files) > 1 for task in summary.plan.tasks)
    assert all_of(grown) == all_of(fresh)
    check_set(grown)


def test_a_set_without_its_first_session_is_repacked(recorded, recipe, fresh, tmp_path, request):
    out, rest = tmp_path / "out", tmp_path / "rest"
    shutil.copytree(fresh, out)
    shutil.copytree(recorded, rest, ignore=shutil.ignore_patterns("ann"))
    build(rest, tmp_path / "fresh", recipe)
    request.getfixturevalue("no_recordings")
    assert not build(rest, out, recipe, compact=True).plan.is_empty
    assert all_of(out) == all_of(tmp_path / "fresh")


def test_a_changed_session_is_read_and_no_other(recorded, recipe, grown, tmp_path, monkeypatch):
    sessions = Path(shutil.copytree(recorded, tmp_path / "sessions"))
    (sessions / "cat" / "vision_right.mp4").unlink()
    write_tiny_session(sessions / "gus", 1.0)
    read = set()
    original = SessionReader.read_audio

    def read_audio(self, stream, segment):
        read.add(self.path.name)
        return original(self, stream, segment)

    monkeypatch.setattr(SessionReader, "read_audio", read_audio)
    build(sessions, grown, recipe, compact=True)
    assert read == {"gus"}
    build(sessions, tmp_path / "fresh", recipe)
    assert all_of(grown) == all_of(tmp_path / "fresh")


def test_what_is_packed_already_stays(recorded, recipe, grown, fresh, tmp_path):
    out = Path(shutil.copytree(fresh, tmp_path / "out"))
    build(recorded, grown, recipe, compact=True)
    for place in (out, grown):
        before = file_identities(place)
        assert build(recorded, place, recipe, compact=True).plan.is_empty
        assert build(recorded, place, recipe).plan.is_empty
        assert {n: i for n, i in file_identities(place).items() if n != "sessions.jsonl"} == {
            n: i for n, i in before.items() if n != "sessions.jsonl"
        }


def test_a_broken_video_is_as_in_a_fresh_build(recorded, recipe, tmp_path):
    sessions, out = tmp_path / "sessions", tmp_path / "out"
    for name in ("fay", "bob"):
        shutil.copytree(recorded / name, sessions / name)
        path = sessions / name / "vision_left.mp4"
        content = bytearray(path.read_bytes())
        begin = content.index(b"mdat") + len(content) // 3
        for place in range(begin, begin + len(content) // 3):
            content[place] ^= 0x55
        path.write_bytes(content)
        build(sessions, out, recipe)
    losses = [loss for _, index in open_indexes(out) for loss in index.decode_failures]
    assert "fay" in {loss["session"] for loss in losses}
    build(sessions, out, recipe, compact=True)
    build(sessions, tmp_path / "fresh", recipe)
    assert all_of(out) == all_of(tmp_path / "fresh")


def test_of_a_damaged_old_column_the_recordings_are_read(recorded, recipe, grown, fresh):
    index = next(i for _, i in open_indexes(grown) if "fay" in i.sessions)
    column = index.columns["audio"]["file"]
    flip_byte(grown / column, int(index.arrays["audio.offset"][0]) + 100)
    build(recorded, grown, recipe, compact=True)
    assert all_of(grown) == all_of(fresh)
    check_set(grown)


@pytest.mark.usefixtures("no_recordings")
def test_few_files_are_open_at_a_time(recorded, recipe, grown, fresh, monkeypatch):
    monkeypatch.setattr(stored, "MAX_OPEN", 1)
    build(recorded, grown, recipe, compact=True)
    assert all_of(grown) == all_of(fresh)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_two_dask_workers_give_the_bytes_of_none(recorded, recipe, grown, tmp_path):
    other = Path(shutil.copytree(grown, tmp_path / "other"))
    build(recorded, grown, recipe, compact=True)
    build(recorded, other, recipe, compact=True, num_workers=2)
    assert file_hashes(other) == file_hashes(grown)


# --- broken off ------------------------------------------------------------------------------

BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "in a tar column": lambda m: m.setattr("preprocess.build.write.TarColumnWriter", fail),
    "before an index": lambda m: m.setattr(build_module, "index_bytes", fail),
    "before the manifest": lambda m: m.setattr("preprocess.build.commit.commit_manifest", fail),
    "before the sweep": lambda m: m.setattr("preprocess.build.commit.delete_unreferenced", fail),
}


@pytest.mark.parametrize("where", BREAKS)
def test_a_compaction_broken_off_leaves_the_old_set_and_is_completed(
    recorded, recipe, grown, tmp_path, monkeypatch, where
):
    undisturbed = Path(shutil.copytree(grown, tmp_path / "undisturbed"))
    old = read_manifest(grown)
    with monkeypatch.context() as patched:
        BREAKS[where](patched)
        with pytest.raises(SimulatedKillError):
            build(recorded, grown, recipe, compact=True)
    if where != "before the sweep":
        assert read_manifest(grown) == old
    check_set(grown)
    build(recorded, grown, recipe, compact=True)
    build(recorded, undisturbed, recipe, compact=True)
    assert file_hashes(grown) == file_hashes(undisturbed)


def test_after_a_broken_off_compaction_a_plain_build_keeps_the_old_packing(
    recorded, recipe, grown, monkeypatch
):
    before = all_of(grown)
    with monkeypatch.context() as patched:
        BREAKS["before the manifest"](patched)
        with pytest.raises(SimulatedKillError):
            build(recorded, grown, recipe, compact=True)
    build(recorded, grown, recipe)
    assert all_of(grown) == before
    check_set(grown)
