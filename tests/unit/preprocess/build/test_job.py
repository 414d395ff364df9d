"""The shard job over time: updates, names, tokenizers, any number of workers."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.oracles import (
    build,
    check_set,
    cluster_of,
    file_hashes,
    file_identities,
    jsonl,
    set_contents,
    set_keys,
    tiny_recipe,
    write_tiny_session,
)
from helpers.sessions import write_lines, write_tone

from preprocess.build import job as job_module
from shared.errors import ConfigError, SessionError
from shared.media.tokenizer import train_tokenizer
from shared.shardset.layout import COLUMNS, column_basis
from shared.shardset.manifest import read_manifest

SMALL = tiny_recipe(shard={"target_bytes": 2**16})
"""Two windows a shard, so that there are several."""

OTHER_TEXT = tiny_recipe(text={"vocab_size": 264})
OTHER_SENSORS = tiny_recipe(sensors={"max_gap_s": 0.2})


# --- workers ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_two_dask_workers_give_the_bytes_of_none(recorded, tmp_path):
    build(recorded, tmp_path / "none", SMALL)
    build(recorded, tmp_path / "two", SMALL, num_workers=2)
    assert len(read_manifest(tmp_path / "none").shards) >= 4
    assert file_hashes(tmp_path / "two") == file_hashes(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_dies_costs_a_retry_and_a_failure_reaches_the_caller(tmp_path):
    mark = tmp_path / "died"
    dies_once = f"import os, pathlib; p = pathlib.Path({str(mark)!r}); p.exists() or die(p)"
    dies_once = f"def die(p): p.touch(); os._exit(1)\n{dies_once}"
    with cluster_of(2) as cluster:
        assert cluster.map(exec, ["pass", dies_once, "pass"], label="run") == [None] * 3
        assert mark.exists()
        with pytest.raises(ValueError, match="invalid literal"):
            cluster.map(int, ["1", "x", "2"], label="read")


def test_the_same_sessions_elsewhere_give_the_same_bytes(sessions, built, tmp_path):
    build(sessions, tmp_path / "elsewhere")
    assert file_hashes(tmp_path / "elsewhere") == file_hashes(built)


# --- updates ---------------------------------------------------------------------------------


def test_without_changes_nothing_is_scanned_or_written(sessions, tmp_path):
    out = tmp_path / "out"
    first = build(sessions, out)
    before = file_identities(out)
    second = build(sessions, out)
    assert (first.num_scanned, second.num_scanned) == (4, 0)
    assert second.plan.is_empty
    assert file_identities(out) == before
    assert second.manifest == first.manifest


def test_a_changed_tokenizer_rebuilds_only_text(sessions, out):
    before = file_identities(out)
    summary = build(sessions, out, OTHER_TEXT)
    after = file_identities(out)
    assert {c for t in summary.plan.tasks for c in t.columns} == {"text"}
    kept = {n for n in before if re.search(r"\.(vision|audio|proprio|dmel)", n)}
    assert len(kept) == 2 * 5
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}
    assert set(after) - set(before) == {
        "tokenizer.g1.json",
        *(f"{s}.g1.{end}" for s in ("train-000000", "val-000000") for end in ("text.tar", "index")),
    }
    assert "tokenizer.json" not in after
    assert check_set(out) > 0
    assert read_manifest(out).load_tokenizer().vocab_size == 264


@pytest.mark.parametrize("name", COLUMNS)
def test_a_raised_code_version_rebuilds_only_its_column(sessions, out, monkeypatch, name):
    before, contents = file_identities(out), set_contents(out)
    number = column_basis(COLUMNS[name], tiny_recipe(), tokenizer_sha256="")["code_version"]
    raised = replace(COLUMNS[name], code_version=COLUMNS[name].code_version + 1)
    monkeypatch.setitem(COLUMNS, name, raised)
    summary = build(sessions, out)
    assert [{n: str(c.reason) for n, c in t.columns.items()} for t in summary.plan.tasks] == [
        {name: f"code_version {number} -> {number + 1}"}
    ] * 2
    after = file_identities(out)
    made = {
        f"{shard}.g1.{end}"
        for shard in ("train-000000", "val-000000")
        for end in ("index", f"{name}.{raised.suffix}")
    }
    assert set(after) - set(before) == made
    others = {n for n in before if n.endswith((".tar", ".zip")) and f".{name}." not in n}
    assert len(others) == 2 * 5
    assert {n: after[n] for n in others} == {n: before[n] for n in others}
    assert set_contents(out) == contents


def test_an_update_has_the_samples_of_a_first_build(sessions, out, tmp_path):
    build(sessions, out, OTHER_SENSORS)
    build(sessions, out, OTHER_TEXT)
    build(sessions, tmp_path / "fresh", OTHER_TEXT)
    assert set_contents(out) == set_contents(tmp_path / "fresh")
    one, other = read_manifest(out), read_manifest(tmp_path / "fresh")
    assert (one.statistics, one.counts, one.fields) == (
        other.statistics,
        other.counts,
        other.fields,
    )
    assert one.generation == 2


def test_a_new_session_makes_a_new_shard(sessions, out):
    before = file_identities(out)
    write_tiny_session(sessions / "eve", 2.0)
    summary = build(sessions, out)
    assert [t.name for t in summary.plan.tasks] == ["train-000001"]
    assert summary.num_scanned == 1
    assert sorted(k for k in set_keys(out) if k.startswith("eve")) == ["eve/000000", "eve/000001"]
    old_columns = {n for n in before if n.startswith(("train-000000", "val-000000", "tokenizer"))}
    after = file_identities(out)
    assert {n: after[n] for n in old_columns} == {n: before[n] for n in old_columns}
    check_set(out)


def test_a_removed_session_leaves_the_set(sessions, out):
    val_before = file_identities(out)["val-000000.index"]
    shutil.rmtree(sessions / "cat")
    build(sessions, out)
    assert set_keys(out) == ["ann/000000", "ann/000001", "dan/000000", "bob/000000", "bob/000001"]
    assert file_identities(out)["val-000000.index"] == val_before
    assert not (out / "train-000000.index").exists()
    assert (out / "train-000000.g1.index").exists()
    check_set(out)


def test_files_of_a_shard_without_sessions_are_removed(sessions, out):
    shutil.rmtree(sessions / "bob")
    build(sessions, out)
    assert [s.name for s in read_manifest(out).shards] == ["train-000000"]
    assert not list(out.glob("val-*"))


def test_a_changed_file_rebuilds_only_its_columns(sessions, out, tmp_path):
    write_tone(sessions / "ann" / "audio.wav", 2.0, level=0.1)
    summary = build(sessions, out)
    assert summary.num_scanned == 1
    assert [(t.name, set(t.columns)) for t in summary.plan.tasks] == [
        ("train-000000", {"audio", "dmel"})
    ]
    build(sessions, tmp_path / "fresh")
    assert set_contents(out) == set_contents(tmp_path / "fresh")


def test_a_shorter_video_moves_the_end_of_the_text_with_it(tmp_path):
    # 2.6 s of video: the text covers 60% of the third window; 2.4 s: 40%, too little.
    root, out = tmp_path / "sessions", tmp_path / "out"
    for duration_s in (2.6, 2.4):
        shutil.rmtree(root, ignore_errors=True)
        folder = write_tiny_session(root / "ann", duration_s)
        write_tone(folder / "audio.wav", 2.0)
        (folder / "metadata.jsonl").unlink()
        build(root, out)
    build(root, tmp_path / "fresh")
    assert set_contents(out) == set_contents(tmp_path / "fresh")


def test_a_changed_reason_of_a_rejected_session_is_written(sessions, out):
    recipe = tiny_recipe(required=["audio"])
    for content in (b"garbage", b""):
        (sessions / "dan" / "audio.wav").write_bytes(content)
        build(sessions, out, recipe)
        [line] = [x for x in jsonl(out / "rejected.jsonl") if x["session"] == "dan"]
        assert ("empty" in line["reason"]) == (content == b"")


def test_sessions_added_under_another_bound_of_the_vocabulary_are_counted(sessions, tmp_path):
    # The tokenizer has fewer tokens than either bound: it stays, and so do the old shards.
    out = tmp_path / "out"
    build(sessions, out, tiny_recipe(text={"vocab_size": 5000}))
    write_tiny_session(sessions / "eve", 1.0)
    shutil.copy(out / "tokenizer.json", tmp_path / "mine.json")
    given = tiny_recipe(text={"vocab_size": 6000, "tokenizer": str(tmp_path / "mine.json")})
    summary = build(sessions, out, given)
    assert [t.name for t in summary.plan.tasks] == ["train-000001"]
    counts = read_manifest(out).statistics["internal_tokens"]
    tokens = read_manifest(out).load_tokenizer()
    assert counts[1] == 4  # events of ann, cat, dan, eve
    assert counts[tokens.encode("e")[1]] >= 1


def test_files_that_did_not_change_are_not_hashed_again(sessions, out, monkeypatch):
    build(sessions, out)
    monkeypatch.setattr("shared.session.scan.sha256_of_file", None)
    summary = build(sessions, out, tiny_recipe(audio={"loudness_dbfs": -30.0}))
    assert summary.num_scanned == 4
    assert {c for t in summary.plan.tasks for c in t.columns} == {"audio", "dmel"}


# --- names and tokenizers --------------------------------------------------------------------


def test_one_session_folder_is_a_set_of_one_session(sessions, tmp_path, monkeypatch):
    monkeypatch.chdir(sessions / "ann")
    for path in (sessions / "ann", Path()):
        out = tmp_path / f"out {path}".replace("/", "_")
        build(path, out)
        assert set_keys(out) == ["ann/000000", "ann/000001"]


@pytest.mark.parametrize("name", ["日本 ☃", "a.b", "x" * 200, "with space", "-dash", "100%"])
def test_unusual_session_names_are_part_of_keys_unchanged(tmp_path, name):
    write_tiny_session(tmp_path / "sessions" / name, 1.0)
    build(tmp_path / "sessions", tmp_path / "out")
    assert set_keys(tmp_path / "out") == [f"{name}/000000"]
    check_set(tmp_path / "out")


@pytest.mark.parametrize("name", [b"new\nline", b"no utf-8 \xff", "sep\u2028arator".encode()])
def test_names_that_cannot_be_part_of_keys_are_refused(tmp_path, name):
    folder = write_tiny_session(tmp_path / "sessions" / "plain", 1.0)
    folder.rename(folder.with_name(os.fsdecode(name)))
    with pytest.raises(SessionError, match="rename it"):
        build(tmp_path / "sessions", tmp_path / "out")


def test_the_tokenizer_of_the_recipe_is_used_and_stored(sessions, tmp_path):
    mine = train_tokenizer(["quite other words"], vocab_size=270)
    path = tmp_path / "mine.json"
    path.write_text(mine.json, encoding="utf-8")
    build(sessions, tmp_path / "out", tiny_recipe(text={"tokenizer": str(path)}))
    assert read_manifest(tmp_path / "out").load_tokenizer().json == mine.json


def test_a_tokenizer_with_more_tokens_than_the_recipe_allows_is_refused(sessions, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(train_tokenizer(["many words"], vocab_size=270).json, encoding="utf-8")
    recipe = tiny_recipe(text={"tokenizer": str(path), "vocab_size": 264})
    with pytest.raises(ConfigError, match=r"set text\.vocab_size: 26[5-9]"):
        build(sessions, tmp_path / "out", recipe)


def test_the_tokenizer_stays_when_sessions_are_added(sessions, out):
    before = (out / "tokenizer.json").read_bytes()
    folder = write_tiny_session(sessions / "eve", 1.0)
    said = [{"timestamp": 0.1, "stream": "internal", "text": "new words " * 20}]
    write_lines(folder / "text.jsonl", said)
    build(sessions, out)
    assert (out / "tokenizer.json").read_bytes() == before


def test_no_text_of_held_out_sessions_trains_the_tokenizer(sessions, out, tmp_path):
    before = (out / "tokenizer.json").read_bytes()
    said = [{"timestamp": 0.1, "stream": "internal", "text": "secret " * 20}]
    write_lines(sessions / "bob" / "text.jsonl", said)
    build(sessions, tmp_path / "fresh")
    assert (tmp_path / "fresh" / "tokenizer.json").read_bytes() == before


def test_a_dry_run_writes_nothing_but_the_cache_of_scans(sessions, tmp_path):
    out = tmp_path / "out"
    with cluster_of(0) as cluster:
        summary = job_module.build_shards(
            sessions, out, recipe=tiny_recipe(), cluster=cluster, dry_run=True
        )
    assert summary.manifest is None
    assert len(summary.plan.tasks) == 2
    assert [p.name for p in out.iterdir()] == ["sessions.jsonl"]
