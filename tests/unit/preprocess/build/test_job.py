"""The shard job over time: updates, names, tokenizers, any number of workers."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
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
from helpers.processes import SimulatedKillError, fail
from helpers.sessions import write_lines, write_tone

from preprocess.__main__ import cli
from preprocess.build import job as job_module
from shared.errors import ConfigError, SessionError
from shared.media.tokenizer import train_tokenizer
from shared.shardset import layout
from shared.shardset.layout import columns_of
from shared.shardset.manifest import read_manifest
from shared.streams import DEFAULT_STREAMS

SMALL = tiny_recipe(shard={"target_bytes": 2**16})
"""A segment per shard, so that there are several."""

OTHER_TEXT = tiny_recipe(text={"vocab_size": 264})
OTHER_SENSORS = tiny_recipe(sensor={"max_gap_s": 0.2})

COLUMNS = columns_of(tiny_recipe())
TEXT_COLUMNS = {"internal_text", "external_text"}
SENSOR_COLUMNS = {"proprio", "touch"}


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
    assert {c for t in summary.plan.tasks for c in t.columns} == TEXT_COLUMNS
    kept = {n for n in before if re.search(r"\.(vision|audio|proprio|touch)", n)}
    assert len(kept) == 2 * 6
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}
    assert set(after) - set(before) == {
        "tokenizer.g1.json",
        *(f"{s}-000000.g1.index" for s in ("train", "val")),
        *(f"{s}-000000.g1.{name}.tar" for s in ("train", "val") for name in TEXT_COLUMNS),
    }
    assert "tokenizer.json" not in after
    assert check_set(out) > 0
    assert read_manifest(out).load_tokenizer().vocab_size == 264


@pytest.mark.parametrize("name", COLUMNS)
def test_a_raised_code_version_rebuilds_only_its_column(sessions, out, monkeypatch, name):
    before, contents = file_identities(out), set_contents(out)
    kind, number = COLUMNS[name].kind, COLUMNS[name].code_version
    columns_of_kind = layout._COLUMNS_OF_KIND[kind]

    def raised(*arguments):
        return tuple(
            replace(c, code_version=number + 1) if c.name == name else c
            for c in columns_of_kind(*arguments)
        )

    monkeypatch.setitem(layout._COLUMNS_OF_KIND, kind, raised)
    summary = build(sessions, out)
    assert [{n: str(c.reason) for n, c in t.columns.items()} for t in summary.plan.tasks] == [
        {name: f"code_version {number} -> {number + 1}"}
    ] * 2
    after = file_identities(out)
    made = {
        f"{shard}.g1.{end}"
        for shard in ("train-000000", "val-000000")
        for end in ("index", f"{name}.{COLUMNS[name].suffix}")
    }
    assert set(after) - set(before) == made
    own = tuple(f".{name}.{suffix}" for suffix in ("tar", "zarr.zip"))
    others = {n for n in before if n.endswith((".tar", ".zip")) and not n.endswith(own)}
    assert len(others) == 2 * 7
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
        ("train-000000", {"audio", "audio.dmel"})
    ]
    build(sessions, tmp_path / "fresh")
    assert set_contents(out) == set_contents(tmp_path / "fresh")


def test_a_shorter_video_moves_the_end_of_the_text_with_it(tmp_path):
    # An event at 2.5 s is part of the session of 2.6 s, but not of that of 2.4 s.
    root, out = tmp_path / "sessions", tmp_path / "out"
    for duration_s in (2.6, 2.4):
        shutil.rmtree(root, ignore_errors=True)
        folder = write_tiny_session(root / "ann", duration_s)
        write_tone(folder / "audio.wav", 2.0)
        (folder / "metadata.jsonl").unlink()
        late = {"timestamp": 2.5, "stream": "internal", "text": "late"}
        write_lines(folder / "text.jsonl", [{**late, "timestamp": 0.5}, late])
        build(root, out)
    levels = [line["level"] for line in jsonl(out / "rejected.jsonl")]
    assert levels.count("lines") == 1
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
    counts = read_manifest(out).statistics["internal_text"]["tokens"]
    tokens = read_manifest(out).load_tokenizer()
    assert counts[1] == 4  # events of ann, cat, dan, eve
    assert counts[tokens.encode("e")[1]] >= 1


def test_files_that_did_not_change_are_not_hashed_again(sessions, out, monkeypatch):
    build(sessions, out)
    monkeypatch.setattr("shared.session.scan.sha256_of_file", None)
    summary = build(sessions, out, tiny_recipe(audio={"loudness_dbfs": -30.0}))
    assert summary.num_scanned == 4
    assert {c for t in summary.plan.tasks for c in t.columns} == {"audio", "audio.dmel"}


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
    with pytest.raises(SessionError, match="rename the folder"):
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


def test_many_folders_that_are_left_out_give_few_warnings(sessions, tmp_path):
    for number in range(50):
        (sessions / f"odd{number:02d}").mkdir()
        (sessions / f"odd{number:02d}" / f"Audio {number}.wav").touch()
    with cluster_of(0) as cluster:
        summary = job_module.build_shards(
            sessions, tmp_path / "out", recipe=tiny_recipe(), cluster=cluster, dry_run=True
        )
    assert len(summary.skipped) == 50
    assert len(summary.warnings) == job_module.MAX_WARNINGS + 1
    num_others = 50 - job_module.MAX_WARNINGS
    assert summary.warnings[-1] == f"{num_others} more like these; see rejected.jsonl of the set"


# --- declared streams ------------------------------------------------------------------------

PLAIN_STREAMS = {name: {**stream, "required": False} for name, stream in DEFAULT_STREAMS.items()}
GAZE = {
    "kind": "sensor",
    "file": "gaze.csv",
    "rate_hz": 50,
    "values": [{"count": 2, "type": "angle", "names": ["x", "y"]}],
}
WITH_GAZE = tiny_recipe(streams={**PLAIN_STREAMS, "gaze": GAZE})


@pytest.fixture
def gazing(sessions) -> Path:
    """The sessions, with a table of gaze in all but one."""
    for name in ("ann", "bob", "cat"):
        lines = [f"{i / 50:.2f},{i / 100:.3f},{-i / 100:.3f}" for i in range(75)]
        text = "\n".join(["timestamp,x,y", *lines])
        (sessions / name / "gaze.csv").write_text(text, encoding="utf-8")
    return sessions


def test_a_declared_stream_opens_nothing_but_its_file_and_the_indexes(gazing, out, monkeypatch):
    before = file_identities(out)
    opened: set[str] = set()

    def watch(event, arguments):
        if event == "open" and is_building and isinstance(arguments[0], str):
            opened.add(Path(arguments[0]).name)

    is_building = False
    sys.addaudithook(watch)
    build_shard = job_module.build_shard

    def watched(*arguments):
        nonlocal is_building
        is_building = True
        try:
            return build_shard(*arguments)
        finally:
            is_building = False

    monkeypatch.setattr(job_module, "build_shard", watched)
    summary = build(gazing, out, WITH_GAZE)
    assert [set(t.columns) for t in summary.plan.tasks] == [{"gaze"}] * 2
    after = file_identities(out)
    columns = {n for n in before if n.endswith((".tar", ".zip"))}
    assert len(columns) == 2 * len(COLUMNS)
    assert {n: after[n] for n in columns} == {n: before[n] for n in columns}
    assert not opened & columns
    recorded = {n for n in opened if n.endswith((".mp4", ".wav", ".jsonl", ".csv"))}
    assert recorded == {"gaze.csv"}
    assert {n for n in opened if n.endswith(".index")} >= {n for n in before if ".index" in n}


def test_streams_come_and_go_as_in_a_fresh_build(gazing, out, built, tmp_path):
    build(gazing, out, WITH_GAZE)
    build(gazing, tmp_path / "fresh", WITH_GAZE)
    assert set_contents(out) == set_contents(tmp_path / "fresh")
    assert read_manifest(out).statistics == read_manifest(tmp_path / "fresh").statistics
    check_set(out)
    assert build(gazing, out, WITH_GAZE).plan.is_empty
    summary = build(gazing, out)
    assert [(t.removed, dict(t.columns)) for t in summary.plan.tasks] == [(("gaze",), {})] * 2
    assert not list(out.glob("*gaze*"))
    assert set_contents(out) == set_contents(built)
    assert read_manifest(out).statistics == read_manifest(built).statistics


@pytest.mark.parametrize("where", ["before an index", "before the manifest"])
def test_an_interrupted_removal_of_a_stream_is_completed(gazing, out, tmp_path, monkeypatch, where):
    build(gazing, out, WITH_GAZE)
    undisturbed = Path(shutil.copytree(out, tmp_path / "undisturbed"))
    target = {
        "before an index": "preprocess.build.task.index_bytes",
        "before the manifest": "preprocess.build.commit.commit_manifest",
    }[where]
    with monkeypatch.context() as patched:
        patched.setattr(target, fail)
        with pytest.raises(SimulatedKillError):
            build(gazing, out)
    check_set(out)
    build(gazing, out)
    build(gazing, undisturbed)
    assert file_hashes(out) == file_hashes(undisturbed)


def test_an_interrupted_recount_under_another_range_is_done_again(recorded, tmp_path, monkeypatch):
    def recipe_of(limits):
        touch = {"kind": "sensor", "key": "touch", "values": [{"count": 5, "type": "scalar"}]}
        return tiny_recipe(streams={"touch": {**touch, "expect": {"range": limits}}})

    out = tmp_path / "out"
    build(recorded, out, recipe_of(None))
    with monkeypatch.context() as patched:
        patched.setattr("preprocess.build.commit.commit_manifest", fail)
        with pytest.raises(SimulatedKillError):
            build(recorded, out, recipe_of([-1.0, 1.0]))
    build(recorded, out, recipe_of([0.0, 1.0]))
    assert read_manifest(out).statistics["touch"]["range"] == [[0.0, 1.0]] * 5
    build(recorded, tmp_path / "fresh", recipe_of([0.0, 1.0]))
    assert read_manifest(out).statistics == read_manifest(tmp_path / "fresh").statistics


def test_a_declared_stream_that_no_session_has_is_masked_and_reported(sessions, out):
    summary = build(sessions, out, WITH_GAZE)
    assert list(summary.absent) == ["gaze"]
    assert "gaze.csv" in summary.absent["gaze"]
    assert check_set(out) > 0
    assert read_manifest(out).statistics["gaze"] == {"count": 0}


def test_a_build_warns_once_of_each_sensor_that_is_recorded_too_slowly(recorded, tmp_path):
    spec = {"kind": "sensor", "key": "touch", "rate_hz": 60}
    streams = {"touch": {**spec, "values": [{"count": 5, "type": "fraction"}]}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(streams=streams).as_json()), encoding="utf-8")
    given = ["--recipe", str(recipe), "--sessions", str(recorded), "--out", str(tmp_path / "out")]
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(cli, ["shards", *given, "--workers", "0", *more])
        (warning,) = [line for line in result.stderr.splitlines() if "warning" in line]
        assert warning.startswith("warning: ann/metadata.jsonl: touch is recorded at 30 Hz, its")
        assert warning.endswith("fix: set `resample: hold` or lower its rate_hz in the recipe")
    rejected = jsonl(tmp_path / "out" / "rejected.jsonl")
    rejected = [line for line in rejected if line["level"] != "unknown"]
    found = [(line["session"], line["level"], line["stream"]) for line in rejected]
    assert found == [(path.name, "lines", "touch") for path in sorted(recorded.iterdir())]
    assert f"warning: {rejected[0]['session']}/{rejected[0]['reason']}" == warning


def test_a_required_stream_that_no_session_has_is_an_error_of_the_recipe(sessions, out):
    recipe = tiny_recipe(streams={**PLAIN_STREAMS, "gaze": {**GAZE, "required": True}})
    before = file_identities(out)
    with pytest.raises(
        ConfigError, match=r"streams\.gaze is required, but none of 4 sessions"
    ) as e:
        build(sessions, out, recipe)
    assert e.value.exit_code == 2
    assert {**file_identities(out), "sessions.jsonl": 0} == {**before, "sessions.jsonl": 0}


def test_one_sensor_and_nothing_else_is_a_set(sessions, tmp_path):
    recipe = tiny_recipe(streams={"touch": PLAIN_STREAMS["touch"]})
    build(sessions, tmp_path / "out", recipe)
    assert {p.name.partition(".")[2] for p in (tmp_path / "out").glob("train*")} == {
        "index",
        "touch.zarr.zip",
    }
    check_set(tmp_path / "out")


# --- length of segments ----------------------------------------------------------------------


def recipe_without_length(**sections):
    return tiny_recipe(**{"segment": {"duration_s": None}, **sections})


def test_without_a_length_the_segments_of_the_set_stay(sessions, out, tmp_path):
    summary = build(sessions, out, recipe_without_length())
    assert summary.plan.is_empty
    assert summary.manifest.recipe.segment_s == 1.0
    fresh = build(sessions, tmp_path / "fresh", recipe_without_length())
    assert fresh.manifest.recipe.segment.duration_s == 2.0


def test_another_length_rebuilds_everything(sessions, out, tmp_path):
    recipe = tiny_recipe(segment={"duration_s": 2.0})
    summary = build(sessions, out, recipe)
    assert {str(c.reason) for t in summary.plan.tasks for c in t.columns.values()} == {
        "segment.duration_s 1.0 -> 2.0"
    }
    assert not any(task.copied_index_files for task in summary.plan.tasks)
    build(sessions, tmp_path / "fresh", recipe)
    assert set_contents(out) == set_contents(tmp_path / "fresh")


def test_streams_that_do_not_fit_the_segments_of_the_set_are_refused(sessions, out):
    recipe = recipe_without_length(video={"rate_hz": 2.5})
    with pytest.raises(
        ConfigError, match=r"segments of 1 s of the set; .*streams\.vision_left: rate_hz 2\.5"
    ):
        build(sessions, out, recipe)
