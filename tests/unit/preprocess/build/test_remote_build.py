"""Sessions and shard sets behind URLs: the bytes of local folders. `memory://` is a store without a
server; S3 is moto's server on this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import pytest
import yaml
from helpers.oracles import (
    build,
    check_set,
    cluster_of,
    file_hashes,
    set_keys,
    tiny_recipe,
)
from helpers.processes import SimulatedKillError, fail
from helpers.sessions import write_tone
from helpers.stores import SECRET, fail_at_first, s3_server, stored_hashes, upload

from preprocess.build import job as job_module
from preprocess.build.job import build_shards
from preprocess.recordings import survey_recordings
from shared.errors import JobError, SessionError, ShardError, StorageError
from shared.shardset import store as store_module
from shared.shardset.manifest import read_manifest
from shared.shardset.store import KEEP_OLD_S, RemoteShardSet
from shared.storage import STARTUP_RETRY, RetryPolicy, Store, parse_location, redact_url

SMALL = tiny_recipe(shard={"target_bytes": 2**16})
OTHER_TEXT = tiny_recipe(shard={"target_bytes": 2**16}, text={"vocab_size": 264})

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def built(recorded, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    build(recorded, out, SMALL)
    return out


@pytest.fixture
def memory(recorded, tmp_path):
    """An empty store but for the sessions below memory://here/sessions."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    upload(recorded, fs, "/here/sessions")
    yield fs
    fs.store.clear()


@pytest.fixture(scope="module")
def s3(recorded):
    """moto's server with the sessions in s3://here/sessions."""
    with s3_server() as fs:
        upload(recorded, fs, "here/sessions")
        yield fs


def test_a_remote_session_json_gives_stream_starts_but_is_not_a_session(memory, recorded) -> None:
    name = next(iter(survey_recordings(recorded, SMALL)[0]))
    memory.pipe_file("/here/sessions/no session/session.json", b'{"start_s": {"audio": 1}}')
    before = build("memory://here/sessions", "memory://here/set", SMALL)
    stored = survey_recordings("memory://here/sessions", SMALL)[0]
    assert stored.keys() == survey_recordings(recorded, SMALL)[0].keys()
    memory.pipe_file(f"/here/sessions/{name}/session.json", b'{"start_s": {"audio": -0.25}}')
    after = build("memory://here/sessions", "memory://here/set", SMALL)
    assert (after.num_scanned, before.num_scanned) == (1, before.num_sessions)
    assert {c for task in after.plan.tasks for c in task.columns} == {"audio", "audio.dmel"}


# --- the same bytes --------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_remote_sessions_and_sets_give_the_bytes_of_local_ones(
    request, recorded, built, tmp_path, store
):
    fs = request.getfixturevalue(store)
    build(f"{store}://here/sessions", tmp_path / "out", SMALL)
    assert file_hashes(tmp_path / "out") == file_hashes(built)
    build(recorded, f"{store}://here/from-local", SMALL)
    assert stored_hashes(fs, "here/from-local") == file_hashes(built)
    build(f"{store}://here/sessions", f"{store}://here/from-store", SMALL)
    assert stored_hashes(fs, "here/from-store") == file_hashes(built)


@pytest.mark.parametrize("store", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_remote_update_gives_the_bytes_of_a_local_one(
    request, recorded, built, tmp_path, store, monkeypatch
):
    fs = request.getfixturevalue(store)
    local = Path(shutil.copytree(built, tmp_path / "local"))
    build(recorded, local, OTHER_TEXT)
    url = f"{store}://here/updated"
    build(f"{store}://here/sessions", url, SMALL)
    downloaded, uploaded = [], []
    download, put = Store.download, Store.upload
    monkeypatch.setattr(
        Store, "download", lambda s, n, p: (downloaded.append(n), download(s, n, p))
    )
    monkeypatch.setattr(Store, "upload", lambda s, p, n: (uploaded.append(n), put(s, p, n)))
    summary = build(f"{store}://here/sessions", url, OTHER_TEXT)
    assert stored_hashes(fs, "here/updated") == file_hashes(local)
    assert summary.num_scanned == 0
    assert set(downloaded) == {"metadata.jsonl", "text.jsonl"}
    assert {name.split(".", 2)[2] for name in uploaded} == {
        "internal_text.tar",
        "external_text.tar",
        "index",
    }


def test_a_build_without_changes_downloads_and_writes_nothing(memory, monkeypatch):
    build("memory://here/sessions", "memory://here/set", SMALL)
    before = {path: facts["created"] for path, facts in memory.find("/here", detail=True).items()}
    monkeypatch.setattr(Store, "download", fail)
    monkeypatch.setattr(Store, "upload", fail)
    summary = build("memory://here/sessions", "memory://here/set", SMALL)
    assert summary.plan.is_empty
    after = {path: facts["created"] for path, facts in memory.find("/here", detail=True).items()}
    assert after == before


def test_a_changed_remote_file_is_detected(memory, recorded, tmp_path):
    build("memory://here/sessions", "memory://here/set", SMALL)
    write_tone(tmp_path / "audio.wav", 2.0, level=0.1)
    memory.pipe_file("/here/sessions/ann/audio.wav", (tmp_path / "audio.wav").read_bytes())
    summary = build("memory://here/sessions", "memory://here/set", SMALL)
    assert summary.num_scanned == 1
    assert {c for t in summary.plan.tasks for c in t.columns} == {"audio", "audio.dmel"}


def test_a_remote_set_is_repaired_and_packed_like_a_local_one(memory, recorded, tmp_path):
    ann = Path(shutil.copytree(recorded / "ann", tmp_path / "ann"))
    shutil.copytree(recorded, tmp_path / "sessions", ignore=shutil.ignore_patterns("ann"))
    memory.rm("/here/sessions/ann", recursive=True)
    for place, sessions in (
        ("memory://here/set", "memory://here/sessions"),
        (tmp_path / "set", tmp_path / "sessions"),
    ):
        build(sessions, place, SMALL)
    upload(ann, memory, "/here/sessions/ann")
    shutil.copytree(ann, tmp_path / "sessions" / "ann")
    content = bytearray(memory.cat_file("/here/set/train-000000.audio.tar"))
    content[700] ^= 1
    memory.pipe_file("/here/set/train-000000.audio.tar", bytes(content))
    for options in ({"verify": True}, {"compact": True}):
        summary = build("memory://here/sessions", "memory://here/set", SMALL, **options)
        build(tmp_path / "sessions", tmp_path / "set", SMALL, compact="compact" in options)
        if "verify" in options:
            assert {t.name: set(t.columns) for t in summary.plan.tasks}["train-000000"] == {"audio"}
    assert {n: h for n, h in stored_hashes(memory, "/here/set").items() if "zip" in n} == {
        n: h for n, h in file_hashes(tmp_path / "set").items() if "zip" in n
    }
    memory.get("/here/set", str(tmp_path / "copy"), recursive=True)
    check_set(tmp_path / "copy")


def test_unknown_names_are_those_of_a_local_folder(memory, recorded, tmp_path):
    """Misspelled names, folders in sessions and of sessions, and names that keys can't have."""
    local = tmp_path / "sessions"
    shutil.copytree(recorded, local)
    name = next(path.name for path in sorted(local.iterdir()))
    (local / name / "media").mkdir()
    (local / name / "media" / "vision_right.mp4").touch()
    for path in (f"{name}/frames/0.png", f"{name}/imu.csv", "odd/Audio.WAV", "tab\t/audio.wav"):
        (local / path).parent.mkdir(exist_ok=True)
        (local / path).write_bytes(b"x")
    shutil.copytree(recorded / name, local / "day" / "deep")
    memory.rm("/here/sessions", recursive=True)
    upload(local, memory, "/here/sessions")
    remote = build("memory://here/sessions", "memory://here/set", SMALL)
    summary = build(local, tmp_path / "set", SMALL)
    assert remote.unused == summary.unused
    assert {folder.name for folder in summary.skipped} == {"day", "odd", r"tab\t"}

    def described(folders):
        return [(f.name, f.is_recording, f.reason.replace("memory://here", "")) for f in folders]

    assert described(remote.skipped) == [
        (n, r, text.replace(str(tmp_path), "")) for n, r, text in described(summary.skipped)
    ]


def test_the_url_of_one_session_is_a_set_of_one_session(memory):
    assert list(survey_recordings("memory://here/sessions/ann/", SMALL)[0]) == ["ann"]
    summary = build("memory://here/sessions/ann", "memory://here/one", SMALL)
    assert summary.manifest.counts["samples"] == 2


def test_nothing_stays_in_the_temporary_folder(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build("memory://here/sessions", "memory://here/set", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_temporary_folders_of_killed_jobs_are_removed(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    task = RemoteShardSet(Store("memory://here/set"), "killed", tmp_path).staging_dir()
    folder = task.__enter__()
    (folder / "train-000000.audio.tar").write_bytes(b"half")
    build("memory://here/sessions", "memory://here/set", SMALL)
    assert list(tmp_path.iterdir()) == []


# --- a line that fails ---------------------------------------------------------------------------


def test_transient_failures_change_nothing(memory, built, monkeypatch):
    failures = fail_at_first(monkeypatch, memory, 4)
    build("memory://here/sessions", "memory://here/set", SMALL)
    assert {"find", "cat_file", "get_file", "put_file", "rm_file"} <= set(failures)
    monkeypatch.undo()
    assert stored_hashes(memory, "/here/set") == file_hashes(built)


def test_a_store_that_disappears_ends_a_job_at_its_first_task(memory, tmp_path, monkeypatch):
    tried = []

    def put_file(self, path, *args, **options):
        tried.append(path)
        raise ConnectionResetError("the line broke")

    monkeypatch.setattr(time, "sleep", lambda wait_s: None)
    monkeypatch.setattr(type(memory), "put_file", put_file)
    with pytest.raises(StorageError, match=r"memory://here/set/\S+: the line broke .*given up"):
        build("memory://here/sessions", "memory://here/set", SMALL)
    assert len(tried) == RetryPolicy().attempts
    assert not memory.exists("/here/set/.run.tmp")


def test_an_unreachable_address_fails_soon(memory, monkeypatch):
    tried = []

    def fail(self, path, *args, **options):
        tried.append(path)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(time, "sleep", lambda wait_s: None)
    monkeypatch.setattr(type(memory), "find", fail)
    with pytest.raises(StorageError, match="nobody there"):
        survey_recordings("memory://here/sessions", SMALL)[0]
    assert len(tried) == STARTUP_RETRY.attempts


# --- readers of the old set ------------------------------------------------------------------


def test_files_of_a_replaced_set_stay_for_its_readers_for_a_day(
    memory, recorded, built, tmp_path, monkeypatch
):
    url, day_s = "memory://here/set", 24 * 3600
    build("memory://here/sessions", url, SMALL)
    build("memory://here/sessions", url, OTHER_TEXT, keep_old_s=KEEP_OLD_S)
    now_s = time.time()
    names = set(stored_hashes(memory, "/here/set"))
    old = {n: h for n, h in file_hashes(built).items() if n.startswith(("train", "val", "tok"))}
    assert old.items() <= stored_hashes(memory, "/here/set").items()
    monkeypatch.setattr(store_module.time, "time", lambda: now_s + day_s - 60)
    build("memory://here/sessions", url, OTHER_TEXT, keep_old_s=KEEP_OLD_S)
    assert set(stored_hashes(memory, "/here/set")) == names
    monkeypatch.setattr(store_module.time, "time", lambda: now_s + day_s + 1)
    build("memory://here/sessions", url, OTHER_TEXT, keep_old_s=KEEP_OLD_S)
    local = Path(shutil.copytree(built, tmp_path / "local"))
    build(recorded, local, OTHER_TEXT)
    assert stored_hashes(memory, "/here/set") == file_hashes(local)


def test_leftovers_of_a_killed_update_are_removed_but_not_the_old_set(memory, built, monkeypatch):
    url = "memory://here/set"
    build("memory://here/sessions", url, SMALL)
    with monkeypatch.context() as patched:
        patched.setattr("preprocess.build.commit.commit_manifest", fail)
        with pytest.raises(SimulatedKillError):
            build("memory://here/sessions", url, OTHER_TEXT, keep_old_s=KEEP_OLD_S)
    assert any(".g1." in name for name in stored_hashes(memory, "/here/set"))
    build("memory://here/sessions", url, SMALL, keep_old_s=KEEP_OLD_S)
    after = stored_hashes(memory, "/here/set")
    assert set(after) - set(file_hashes(built)) == {"manifest.g0.json"}


def test_a_damaged_retained_manifest_retains_no_files(memory):
    build("memory://here/sessions", "memory://here/set", SMALL)
    before = stored_hashes(memory, "/here/set")
    for number, scrap in enumerate([b"", b"scrap", b"[]", b"{}", b'{"replaced_s": "x"}', b"\xff"]):
        memory.pipe_file(f"/here/set/manifest.g{number}.json", scrap)
    build("memory://here/sessions", "memory://here/set", SMALL, keep_old_s=KEEP_OLD_S)
    assert stored_hashes(memory, "/here/set") == before


# --- broken off and disturbed ----------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["preprocess.build.task.index_bytes", "preprocess.build.commit.commit_manifest"]
)
def test_an_interrupted_remote_build_is_completed_to_the_same_bytes(
    memory, built, monkeypatch, where
):
    with monkeypatch.context() as patched:
        patched.setattr(where, fail)
        with pytest.raises(SimulatedKillError):
            build("memory://here/sessions", "memory://here/set", SMALL)
    assert not memory.exists("/here/set/manifest.json")
    memory.pipe_file("/here/set/.run.tmp", b"of a killed job")
    build("memory://here/sessions", "memory://here/set", SMALL)
    assert stored_hashes(memory, "/here/set") == file_hashes(built)


def test_a_job_that_another_took_over_puts_no_more_files(memory, monkeypatch):
    plan = job_module.plan_shards

    def plan_shards(*args, **options):
        memory.pipe_file("/here/set/.run.tmp", b"another's")
        return plan(*args, **options)

    monkeypatch.setattr(job_module, "plan_shards", plan_shards)
    with pytest.raises(JobError, match=r"memory://here/set: another job has taken over"):
        build("memory://here/sessions", "memory://here/set", SMALL)
    rest = {path.rpartition("/")[2] for path in memory.find("/here/set")}
    assert rest == {".run.tmp", "sessions.jsonl"}


def test_a_remote_session_deleted_during_a_job_fails_it_and_a_rerun_completes(memory, monkeypatch):
    plan = job_module.plan_shards

    def plan_shards(*args, **options):
        memory.rm("/here/sessions/cat", recursive=True)
        return plan(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(job_module, "plan_shards", plan_shards)
        with pytest.raises(SessionError, match=r"session cat: .* was removed"):
            build("memory://here/sessions", "memory://here/set", SMALL)
    summary = build("memory://here/sessions", "memory://here/set", SMALL)
    assert summary.manifest.counts["sessions"] == 3


def test_damaged_remote_indexes_are_rebuilt(memory, built, tmp_path):
    build("memory://here/sessions", "memory://here/set", SMALL)
    memory.pipe_file("/here/set/train-000000.index", b"scrap")
    memory.rm_file("/here/set/val-000000.index")
    build("memory://here/sessions", "memory://here/set", SMALL)
    memory.get("/here/set", str(tmp_path / "copy"), recursive=True)
    check_set(tmp_path / "copy")
    assert sorted(set_keys(tmp_path / "copy")) == sorted(set_keys(built))


def test_a_remote_dry_run_writes_only_the_cache_of_scans(memory):
    with cluster_of(0) as cluster:
        build_shards(
            "memory://here/sessions",
            "memory://here/set",
            recipe=SMALL,
            cluster=cluster,
            dry_run=True,
        )
    assert [p.rpartition("/")[2] for p in memory.find("/here/set")] == ["sessions.jsonl"]


# --- errors ----------------------------------------------------------------------------------


def test_a_url_without_sessions_is_named(memory):
    with pytest.raises(SessionError, match="memory://nowhere: no session in it"):
        build("memory://nowhere", "memory://here/set", SMALL)


@pytest.mark.parametrize("url", ["s3://nobodys-bucket/x", "nonsense://x/y"])
def test_a_missing_store_is_an_error_of_one_line(s3, recorded, url):
    with pytest.raises((StorageError, SessionError)) as caught:
        build(recorded, url, SMALL)
    assert url.partition("/x")[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_missing_remote_index_is_a_clear_error(memory, tmp_path):
    place = RemoteShardSet(Store("memory://here/none"), "", tmp_path)
    with pytest.raises(ShardError, match="no such index"):
        place.read_index("train-000000.index")
    with pytest.raises(ShardError, match="no such shard set"):
        place.read_manifest()


def test_user_names_and_passwords_of_urls_are_redacted():
    assert redact_url("ftp://me:word@host/x") == "ftp://host/x"
    assert str(Store("ftp://me:word@host/x")) == "ftp://host/x"


def test_locations_are_paths_or_stores(tmp_path):
    assert parse_location("data/x") == Path("data/x")
    assert parse_location("file:///data/a%20b") == Path("/data/a b")
    assert parse_location(tmp_path) == tmp_path
    assert parse_location("s3://bucket/x/") == Store("s3://bucket/x")


# --- the command -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_with_two_workers_from_s3_to_s3_gives_the_local_bytes(
    s3, recorded, built, tmp_path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SMALL.as_json()), encoding="utf-8")
    places = ["--sessions", "s3://here/sessions", "--out", "s3://here/by-command"]
    command = [sys.executable, "-m", "preprocess", "shards", *places, "--recipe", str(recipe)]
    command += ["--keep-old", "0"]

    def run() -> str:
        done = subprocess.run(
            [*command, "--workers", "2"], capture_output=True, text=True, env=dict(os.environ)
        )
        assert done.returncode == 0, done
        assert SECRET not in done.stdout + done.stderr
        return done.stdout

    assert "s3://here/by-command is ready: 4 sessions" in run()
    assert "is up to date" in run()
    assert stored_hashes(s3, "here/by-command") == file_hashes(built)
    other = tiny_recipe(shard={"target_bytes": 2**16}, video={"qp": 40})
    recipe.write_text(yaml.safe_dump(other.as_json()), encoding="utf-8")
    run()
    local = Path(shutil.copytree(built, tmp_path / "local"))
    build(recorded, local, other)
    assert stored_hashes(s3, "here/by-command") == file_hashes(local)
    s3.get("here/by-command", str(tmp_path / "copy"), recursive=True)
    assert read_manifest(tmp_path / "copy").counts["sessions"] == 4
