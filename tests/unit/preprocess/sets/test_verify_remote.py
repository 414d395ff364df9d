"""verify and show give the same results for a set behind a URL as for one in a folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner
from helpers import sets as tiny_sets

from preprocess.__main__ import cli
from preprocess.sets.verify import describe_sample, describe_set, verify_set
from shared.errors import ShardError

URL = "memory://sets/mine"


@pytest.fixture
def upload(tiny_set, tmp_path, monkeypatch):
    """Puts a folder behind the URL; copies are made below tmp_path/scratch."""
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()

    def put(folder):
        for path in Path(folder).iterdir():
            store.pipe_file(f"/sets/mine/{path.name}", path.read_bytes())

    yield put
    store.rm("/sets", recursive=True)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_remote_set_is_verified_and_described_like_a_local_one(tiny_set, upload):
    upload(tiny_set)
    assert verify_set(URL) == verify_set(tiny_set)
    local, stored = dict(describe_set(tiny_set)), dict(describe_set(URL))
    assert local.pop("location") == str(tiny_set)
    assert stored.pop("location") == URL
    assert stored == local
    key = "cat/000001"
    assert list(describe_sample(URL, key)) == list(describe_sample(tiny_set, key))


def test_damaged_and_missing_files_are_named_by_url(tiny_set, tmp_path, upload):
    damaged = tiny_sets.copy_set(tiny_set, tmp_path / "set")
    (tar, other, *_) = sorted(damaged.glob("train-*.internal_text.tar"))
    tiny_sets.flip_byte(tar, 600)
    other.unlink()
    upload(damaged)
    local, stored = verify_set(damaged).problems, verify_set(URL).problems
    assert any(f"{URL}/{tar.name}: checksum differs" in problem for problem in stored)
    assert any(f"{URL}/{other.name}: can't be opened" in problem for problem in stored)
    assert stored == tuple(problem.replace(str(damaged), URL) for problem in local)


def test_downloaded_columns_are_removed_after_use(tiny_set, tmp_path, upload):
    upload(tiny_set)
    told = []

    def look(done, total):
        (copies,) = (tmp_path / "scratch").iterdir()
        told.append((done, total, sorted(path.name for path in copies.iterdir())))

    count = verify_set(URL, progress=look).num_shards
    assert told == [(n, count, ["manifest.json", "tokenizer.json"]) for n in range(1, count + 1)]


def test_missing_sets_and_samples_are_named(tiny_set, upload):
    upload(tiny_set)
    with pytest.raises(ShardError, match=r"memory://sets/other: no such shard set"):
        verify_set("memory://sets/other")
    with pytest.raises(ShardError, match=f"{URL}: no sample 'cat/999999'; fix: use a key"):
        list(describe_sample(URL, "cat/999999"))


def test_the_commands_take_urls(tiny_set, upload):
    upload(tiny_set)
    verified = CliRunner().invoke(cli, ["verify", URL])
    assert verified.exit_code == 0
    assert verified.output.startswith(f"{URL}: ")
    assert "all good" in verified.output
    shown = CliRunner().invoke(cli, ["show", URL])
    assert shown.exit_code == 0
    assert "generation" in shown.output
