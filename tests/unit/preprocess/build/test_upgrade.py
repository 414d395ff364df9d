"""Sets of format 1, by a frozen one that the code of that format wrote (tests/frozen): read as they
are, upgraded without touching a column.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from click.testing import CliRunner
from helpers.frozen_sets import BUMPED, FROZEN, OLD, RECIPE, SESSIONS, columns_of, header_of
from helpers.oracles import (
    build,
    check_whole,
    file_hashes,
    file_identities,
    set_contents,
)
from helpers.sets import make_config

from preprocess.__main__ import cli
from preprocess.build import job as job_module
from preprocess.build import task as build_module
from preprocess.build.explain import reasons
from preprocess.sets.edit import list_sessions
from preprocess.sets.verify import describe_sample, describe_set, verify_set
from shared.shardset.manifest import read_manifest
from train.data.loader import Loader
from train.data.shard_source import ShardSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OTHER_TEXT = RECIPE.model_copy(update={"text": RECIPE.text.model_copy(update={"vocab_size": 264})})
ENCODERS = {"av": "18.1.0", "simplejpeg": "1.9.0", "soxr": "1.1.0", "numpy": "2.4.6"}

needs_encoders = pytest.mark.skipif(
    any(version(package) != number for package, number in ENCODERS.items()),
    reason=f"the frozen set's pictures and sound are those of {ENCODERS}",
)


@pytest.fixture
def out(tmp_path) -> Path:
    """The old set, for a test to change."""
    return Path(shutil.copytree(OLD, tmp_path / "out"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A set of the same sessions, made today."""
    out = tmp_path_factory.mktemp("fresh") / "set"
    build(SESSIONS, out, RECIPE)
    return out


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory) -> Path:
    out = Path(shutil.copytree(OLD, tmp_path_factory.mktemp("upgraded") / "set"))
    build(SESSIONS, out, RECIPE)
    return out


def batches_of(shards: Path, *, is_shuffled: bool = True) -> list[dict[str, Any]]:
    """Every batch of two epochs."""
    source, config = ShardSource(shards, split="train"), make_config(shards, batch_size=2)
    return list(Loader(source, config, num_epochs=2, is_shuffled=is_shuffled))


def assert_same(batches: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    for one, other in zip(batches, others, strict=True):
        assert one["keys"] == other["keys"]
        for group in ("inputs", "targets"):
            assert one[group].keys() == other[group].keys()
            for name in one[group].keys() - BUMPED:
                assert torch.equal(one[group][name], other[group][name]), name


_watched: list[str] | None = None


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched is not None:
        _watched.append(str(arguments[0]))


sys.addaudithook(_note_open)


@pytest.fixture
def opened(monkeypatch) -> Iterator[list[str]]:
    """Every path that Python opens from now on."""
    paths: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "_watched", paths)
    return paths


# --- re-packed ------------------------------------------------------------------------------


def test_rows_of_a_set_of_format_1_are_copied_into_other_shards(out):
    shard = RECIPE.shard.model_copy(update={"target_bytes": 2**18})
    summary = build(SESSIONS, out, RECIPE.model_copy(update={"shard": shard}))
    assert summary.plan.tasks
    for task in summary.plan.tasks:
        for column in task.due.keys() - BUMPED:
            assert task.copied[column].keys() == {piece.session for piece in task.slices}
    assert verify_set(out).problems == ()


# --- read as it is ---------------------------------------------------------------------------


def test_the_frozen_set_is_of_format_1():
    values = json.loads((OLD / "manifest.json").read_text(encoding="utf-8"))
    assert values["format_version"] == 1
    for path in OLD.glob("*.index"):
        number, header = header_of(path)
        assert number == 1
        assert all("rows" not in column for column in header["columns"].values())


def test_a_set_of_format_1_is_read_as_it_is():
    before = file_hashes(OLD)
    verdict = verify_set(OLD)
    assert (verdict.problems, verdict.num_samples) == ((), 6)
    assert [s.name for s in list_sessions(OLD)] == ["ann", "bob", "cat", "eve"]
    assert "1; `preprocess shards` upgrades it to 2" in dict(describe_set(OLD))["format"]
    assert "reach" in "".join(value for _, value in describe_sample(OLD, "ann/000000"))
    assert file_hashes(OLD) == before


def test_batches_of_the_old_set_are_those_of_the_upgraded_one(upgraded):
    is_shuffled = not BUMPED  # else the fingerprint, and so the order, is another one
    found, expected = (batches_of(s, is_shuffled=is_shuffled) for s in (OLD, upgraded))
    assert_same(found, expected)


@needs_encoders
def test_samples_of_the_old_set_are_those_of_one_made_today(fresh):
    assert_same(batches_of(OLD, is_shuffled=False), batches_of(fresh, is_shuffled=False))


def test_the_reader_in_the_specification_reads_format_1(monkeypatch):
    page = (FROZEN.parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    monkeypatch.chdir(OLD)
    found: dict[str, Any] = {}
    exec(page.split("\n## The index\n")[1].split("```python\n")[1].split("```")[0], found)
    assert found["wav"][:4] == b"RIFF"
    assert len(found["arrays"]["window"]) == 4


def test_hashes_of_rows_are_those_of_the_specification(upgraded):
    def hash_of(values: Any) -> str:
        text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    lines = (SESSIONS / "eve" / "metadata.jsonl").read_bytes()
    sources = {"metadata.jsonl": hashlib.sha256(lines).hexdigest()}
    row = ["eve", [0], [0b11000], sources, 0.0, 1.0]  # touch and proprio
    for shards, rows in ((OLD, hash_of([[row]])), (upgraded, hash_of([[hash_of([row])]]))):
        entry = next(e for e in read_manifest(shards).shards if e.name == "train-000001")
        column = header_of(shards / entry.index_file)[1]["columns"]["proprio"]
        assert column["basis"]["rows"] == rows
        assert column["fingerprint"] == hash_of([column["basis"]])
    assert column["rows"] == {"eve": hash_of([row])}


# --- upgraded --------------------------------------------------------------------------------


def test_an_upgrade_makes_no_column_and_opens_those_whose_statistics_it_lacks(out, opened):
    before, hashes = file_identities(out), file_hashes(out)
    opened.clear()
    summary = build(SESSIONS, out, RECIPE)
    seen = {Path(path).name for path in opened}
    assert "train-000000.index" in seen  # the hook hooks
    assert columns_of(OLD)
    counted = {name for name in columns_of(OLD) if name.split(".")[1] in {"audio", "proprio"}}
    assert seen & columns_of(OLD) == counted
    after = file_identities(out)
    for name in {*columns_of(OLD), "tokenizer.json"}:
        assert (after[name], file_hashes(out)[name]) == (before[name], hashes[name])
    assert {column for task in summary.plan.tasks for column in task.due} == BUMPED
    assert read_manifest(out).format_version == 2
    assert {header_of(path)[0] for path in out.glob("*.index")} == {2}
    check_whole(out)
    assert verify_set(out).problems == ()


@needs_encoders
def test_an_upgraded_set_is_byte_equal_to_one_made_today_but_for_generations(upgraded, fresh):
    if BUMPED:
        assert set_contents(upgraded) == set_contents(fresh)
        return
    plain = {name.replace(".g1.", "."): h for name, h in file_hashes(upgraded).items()}
    expected = file_hashes(fresh)
    assert {**plain, "manifest.json": ""} == {**expected, "manifest.json": ""}
    one, other = (json.loads((s / "manifest.json").read_text()) for s in (upgraded, fresh))
    for shard in one["shards"]:
        shard["index_file"] = shard["index_file"].replace(".g1.", ".")
    own = json.loads((OLD / "manifest.json").read_text())["fingerprint"]  # runs can go on
    own_parts = {"generation": 0, "sha256": ""}
    assert {**one, **own_parts} == {**other, **own_parts, "fingerprint": own}


def test_an_upgraded_set_needs_nothing_more(upgraded):
    before = file_identities(upgraded)
    summary = build(SESSIONS, upgraded, RECIPE)
    assert (summary.plan.is_empty, summary.plan.upgrade, reasons(summary.plan)) == (True, None, [])
    assert file_identities(upgraded) == before


def test_a_dry_run_says_that_a_set_would_be_upgraded_and_touches_nothing(out):
    before = file_hashes(out)
    given = ["--sessions", str(SESSIONS), "--out", str(out), "--recipe", f"{FROZEN}/recipe.yaml"]
    result = CliRunner().invoke(cli, ["shards", "--dry-run", "--workers", "0", *given])
    rest = "" if BUMPED else ", columns stay"
    assert f"{out}: format 1 -> 2: indexes are rewritten{rest}" in result.output.splitlines()
    assert "up to date" not in result.output
    assert file_hashes(out) == before


def test_a_changed_recipe_makes_its_column_on_the_way_and_no_other(out):
    before = file_identities(out)
    summary = build(SESSIONS, out, OTHER_TEXT)
    assert summary.plan.upgrade == "format 1 -> 2: indexes are rewritten"
    assert {column for task in summary.plan.tasks for column in task.due} == {"text", *BUMPED}
    kept = {name for name in columns_of(OLD) if ".text." not in name}
    assert {n: i for n, i in file_identities(out).items() if n in kept} == {
        n: before[n] for n in kept
    }
    check_whole(out)


def test_a_changed_session_makes_only_its_shard_again(out, tmp_path):
    sessions = Path(shutil.copytree(SESSIONS, tmp_path / "sessions"))
    lines = (sessions / "eve" / "metadata.jsonl").read_text().splitlines(keepends=True)
    (sessions / "eve" / "metadata.jsonl").write_text("".join(lines[:-3]))
    due = {task.name: set(task.due) - BUMPED for task in build(sessions, out, RECIPE).plan.tasks}
    assert due == {
        "train-000000": set(),
        "train-000001": {"text", "proprio"},
        "val-000000": set(),
    }


class BrokenOff(Exception):  # noqa: N818
    """Stands for a kill."""


def fail(*_: object, **__: object) -> None:
    raise BrokenOff


def fail_at_the(number: int) -> Callable[..., bytes]:
    """index_bytes that breaks off at its n-th call."""
    calls, index_bytes = itertools.count(1), build_module.index_bytes
    return lambda index: fail() if next(calls) == number else index_bytes(index)


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before the first index": lambda m: m.setattr(build_module, "index_bytes", fail_at_the(1)),
    "before the last index": lambda m: m.setattr(build_module, "index_bytes", fail_at_the(3)),
    "before the manifest": lambda m: m.setattr("preprocess.build.commit.commit_manifest", fail),
    "before the sweep": lambda m: m.setattr(job_module, "sweep", fail),
}


@pytest.mark.parametrize("where", BREAKS)
def test_an_upgrade_broken_off_leaves_the_old_set_or_the_new_one(out, upgraded, monkeypatch, where):
    num_members = check_whole(OLD)
    with monkeypatch.context() as patched:
        BREAKS[where](patched)
        with pytest.raises(BrokenOff):
            build(SESSIONS, out, RECIPE)
    is_new = where == "before the sweep"
    assert read_manifest(out) == replace(read_manifest(upgraded if is_new else OLD), root=out)
    assert check_whole(out) == num_members
    build(SESSIONS, out, RECIPE)
    assert file_hashes(out) == file_hashes(upgraded)
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


KILLED = """
import os, sys
from pathlib import Path
from helpers.oracles import build
from shared.recipe import load_recipe

sessions, out, recipe, left = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], [int(sys.argv[4])]
MARKS = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def die_before_a_change(event, arguments):
    is_change = event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}
    is_new = event == "open" and (arguments[2] or 0) & MARKS and str(out) in str(arguments[0])
    if is_change or is_new:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)

recipe = load_recipe(Path(recipe))
sys.addaudithook(die_before_a_change)
build(sessions, out, recipe)
os._exit(0)
"""
"""An upgrade that dies before its n-th change of a folder or file."""


@pytest.mark.slow
def test_an_upgrade_killed_before_any_change_of_a_file_leaves_one_of_the_two_sets(
    tmp_path, upgraded
):
    num_members, versions, code = check_whole(OLD), [], 9
    for number in itertools.count():
        out = Path(shutil.copytree(OLD, tmp_path / f"out{number}"))
        given = [str(SESSIONS), str(out), f"{FROZEN}/recipe.yaml", str(number)]
        paths = os.pathsep.join([str(FROZEN.parent), str(FROZEN.parents[1])])
        code = subprocess.run(
            [sys.executable, "-c", KILLED, *given], env={**os.environ, "PYTHONPATH": paths}
        ).returncode
        manifest = read_manifest(out)
        versions.append(manifest.format_version)
        assert manifest == replace(read_manifest(upgraded if versions[-1] == 2 else OLD), root=out)
        assert check_whole(out) == num_members
        build(SESSIONS, out, RECIPE)
        assert file_hashes(out) == file_hashes(upgraded)
        if code == 0:
            break
        assert code == 9
    assert versions == sorted(versions)
    assert versions.count(1) > 10
    assert versions.count(2) > 3


def test_a_reader_of_the_old_set_reads_on_through_an_upgrade(out, upgraded):
    source = ShardSource(out, split="train")
    build(SESSIONS, out, RECIPE)
    keys = [source.key(shard, 0) for shard in range(2)]  # their indexes open only now
    assert keys == ["ann/000000", "eve/000000"]
    source.close()
    build(SESSIONS, out, RECIPE)
    assert file_hashes(out) == file_hashes(upgraded)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_set_behind_a_url_is_upgraded_to_the_same_bytes(upgraded):
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for path in OLD.iterdir():
        fs.pipe_file(f"/here/set/{path.name}", path.read_bytes())
    build(SESSIONS, "memory://here/set", RECIPE)
    found = {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find("/here/set")}
    fs.store.clear()
    del found["sessions.jsonl"]
    assert found == {
        p.name: p.read_bytes() for p in upgraded.iterdir() if p.name != "sessions.jsonl"
    }
