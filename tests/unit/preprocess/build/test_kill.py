"""Jobs killed for real, full disks, sessions that go or change under a job, workers that outlive
it. `python tests/experiments/build_kills.py --kills 50` prints the long table.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from experiments.build_kills import run_trials
from helpers.oracles import (
    build,
    check_set,
    file_hashes,
    file_identities,
    jsonl,
    set_contents,
    set_keys,
    tiny_recipe,
)
from helpers.processes import await_true

from preprocess.build import job as job_module
from preprocess.build import task as task_module
from shared.errors import JobError, SessionError
from shared.shardset.manifest import read_manifest
from shared.shardset.store import claim_shard_set

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.recipe import Recipe

SMALL = tiny_recipe(shard={"target_bytes": 2**16})
"""A segment per shard, so that there are several."""

OTHER = tiny_recipe(
    shard={"target_bytes": 2**16},
    text={"vocab_size": 264},
    audio={"dmel": {"floor_db": -60}},
)
"""Text and dMel are due."""


@pytest.fixture(scope="module")
def built(recorded, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    build(recorded, out, SMALL)
    return out


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.iterdir() if p.name.startswith(".")]


def run_job(sessions: Path, out: Path, recipe: Recipe, *options: str) -> subprocess.Popen[str]:
    """The command, in a process group of its own, without Dask."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.as_json()), encoding="utf-8")
    places = ["--sessions", str(sessions), "--out", str(out), "--recipe", str(path)]
    return subprocess.Popen(
        [sys.executable, "-m", "preprocess", "shards", *places, "--workers", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# --- killed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_old", [False, True], ids=["first", "update"])
def test_a_job_killed_while_it_writes_is_completed_to_the_same_bytes(
    recorded, built, tmp_path, has_old
):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    if has_old:
        shutil.copytree(built, out)
        shutil.copytree(built, undisturbed)
    build(recorded, undisturbed, OTHER)
    job = run_job(recorded, out, OTHER)
    new_index = "train-000001.g1.index" if has_old else "train-000001.index"
    while job.poll() is None and not (out / new_index).exists():
        time.sleep(0.002)
    time.sleep(random.Random(has_old).uniform(0, 0.05))
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    if has_old:
        assert read_manifest(out) == replace(read_manifest(built), root=out)
        check_set(out)
    build(recorded, out, OTHER)
    assert file_hashes(out) == file_hashes(undisturbed)
    assert leftovers(out) == []


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_job_reports_it_and_leaves_no_temporary_file(recorded, tmp_path, stop):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    job = run_job(recorded, out, SMALL)
    await_true(lambda: out.exists() and any(p.suffix == ".tmp" for p in out.iterdir()))
    job.send_signal(stop)
    _, stderr = job.communicate()
    assert job.returncode == 128 + stop
    assert stderr == "Interrupted. Finished work is kept; run the command again to continue.\n"
    assert leftovers(out) == []
    build(recorded, out, SMALL)
    build(recorded, undisturbed, SMALL)
    assert file_hashes(out) == file_hashes(undisturbed)


def test_a_compaction_killed_while_it_writes_is_completed_to_the_same_bytes(
    recorded, sessions, tmp_path
):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    shutil.move(sessions / "ann", tmp_path / "ann")
    build(sessions, out, SMALL)
    build(recorded, out, SMALL)
    shutil.copytree(out, undisturbed)
    build(recorded, undisturbed, SMALL, compact=True)
    old = read_manifest(out)
    job = run_job(recorded, out, SMALL, "--compact")
    while job.poll() is None and not (out / "train-000000.g2.index").exists():
        time.sleep(0.002)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    assert read_manifest(out) == old
    check_set(out)
    build(recorded, out, SMALL, compact=True)
    assert file_hashes(out) == file_hashes(undisturbed)
    assert leftovers(out) == []


@pytest.mark.slow
def test_random_kills_of_jobs_clients_and_workers_leave_no_trace(tmp_path):
    trials = run_trials(tmp_path, 12, seed=1)
    assert {t.target for t in trials} == {"job", "client", "worker"}
    assert [problem for t in trials for problem in t.problems] == []


def test_a_process_that_outlives_its_job_puts_no_files(tmp_path):
    with claim_shard_set(tmp_path / "out") as place:
        task = place.staging_dir()
        folder = task.__enter__()
        (folder / "train-000000.index").write_bytes(b"late")
    with pytest.raises(JobError, match="another job has taken over"):
        place.put(folder / "train-000000.index", "train-000000.index")
    with pytest.raises(JobError, match="another job has taken over"), place.staging_dir():
        pass
    assert list((tmp_path / "out").iterdir()) == []


# --- full disks ------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, *, size_kib: int) -> Iterator[None]:
    """A file system of a few kilobytes; needs root."""
    path.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_named_in_one_line_and_the_old_set_stays(recorded, built, tmp_path):
    disk = tmp_path / "disk"
    size_kib = sum(-(-p.stat().st_size // 4096) * 4 for p in built.iterdir()) + 120
    with small_disk(disk, size_kib=size_kib):
        out = Path(shutil.copytree(built, disk / "out"))
        undisturbed = Path(shutil.copytree(built, tmp_path / "undisturbed"))
        before = read_manifest(out)
        job = run_job(recorded, out, OTHER)
        _, stderr = job.communicate()
        assert job.returncode == 1
        assert f"disk {disk}, " in stderr
        assert "no space left" in stderr
        assert stderr.count("\n") == 1
        assert read_manifest(out) == before
        check_set(out)
        assert leftovers(out) == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        build(recorded, out, OTHER)
        build(recorded, undisturbed, OTHER)
        assert file_hashes(out) == file_hashes(undisturbed)


def test_a_disk_that_is_full_at_any_write_is_a_clear_error(recorded, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patched.setattr(
            "preprocess.build.write.encode_text", lambda *_, **__: (_ for _ in ()).throw(full)
        )
        with pytest.raises(JobError, match=r"no space left on device \(disk .*free some space"):
            build(recorded, out, SMALL)
    assert leftovers(out) == []
    build(recorded, out, SMALL)
    check_set(out)


# --- sessions that go or change --------------------------------------------------------------

OF_OTHERS = re.compile(r"(val-00000[01]|train-00000[01])\.(vision_.*|audio|proprio|touch)\..*")

CHANGES = {
    "deleted": shutil.rmtree,
    "emptied": lambda folder: os.truncate(folder / "vision_left.mp4", 0),
    "damaged": lambda folder: (folder / "vision_left.mp4").write_bytes(b"scrap" * 100),
    "without sound": lambda folder: (folder / "audio.wav").unlink(),
    "without sensors": lambda folder: (folder / "metadata.jsonl").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["before its shard", "in its shard"])
def test_a_session_that_changes_under_a_job_fails_it_and_a_rerun_completes(
    sessions, tmp_path, monkeypatch, change, moment
):
    out = tmp_path / "out"
    original = task_module.write_column

    def write_column(builder, *args):
        is_cat = any(row.session == "cat" for row in builder.rows)
        if (sessions / "cat" / "text.jsonl").exists() and (moment[0] == "b" or is_cat):
            (sessions / "cat" / "text.jsonl").unlink()
            CHANGES[change](sessions / "cat")
        return original(builder, *args)

    recipe = tiny_recipe(shard={"target_bytes": 2**16}, required=["vision_left"])
    with monkeypatch.context() as patched:
        patched.setattr(task_module, "write_column", write_column)
        with pytest.raises(SessionError, match=r"session cat: .* changed or was removed .*again"):
            build(sessions, out, recipe)
    # Of the other sessions' shards only the text is made again: cat's words made the tokenizer too.
    kept = {n: i for n, i in file_identities(out).items() if OF_OTHERS.fullmatch(n)}
    assert len(kept) == 4 * 6
    build(sessions, out, recipe)
    after = file_identities(out)
    assert {n: after[n] for n in kept} == kept
    build(sessions, tmp_path / "fresh", recipe)
    assert set_contents(out) == set_contents(tmp_path / "fresh")
    assert leftovers(out) == []
    if change in ("emptied", "damaged"):
        [line] = [x for x in jsonl(out / "rejected.jsonl") if x["level"] == "session"]
        assert line["session"] == "cat"
        assert "vision_left" in line["reason"]


def test_a_session_deleted_while_it_is_scanned_is_rejected_and_then_gone(
    sessions, tmp_path, monkeypatch
):
    scan = job_module.scan_sessions

    def scan_sessions(*args, **options):
        shutil.rmtree(sessions / "cat")
        return scan(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(job_module, "scan_sessions", scan_sessions)
        build(sessions, tmp_path / "out", SMALL)
    assert not [k for k in set_keys(tmp_path / "out") if k.startswith("cat")]
    build(sessions, tmp_path / "out", SMALL)
    assert jsonl(tmp_path / "out" / "rejected.jsonl") == []
