"""Unchanged rows are copied from previous shards: the same bytes, and no recording is opened."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.oracles import (
    build,
    check_set,
    file_hashes,
    jsonl,
    set_keys,
    tiny_recipe,
    write_tiny_session,
    write_tiny_sessions,
)
from helpers.sessions import write_lines, write_tone, write_video

from preprocess.build import job as job_module
from preprocess.build.plan_types import FromShards
from shared.session.reader import SessionReader
from shared.shardset.index import open_index

RAW = tiny_recipe(video={"codec": "raw"})
H264 = tiny_recipe(video={"codec": "h264"})

CHANGES = {
    "a session goes": lambda root: shutil.rmtree(root / "cat"),
    "another goes": lambda root: shutil.rmtree(root / "ann"),
    "a video changes": lambda root: write_video(
        root / "ann" / "vision_left.mp4", times_s=np.arange(50) / 30, b_frames=0
    ),
    "a sound changes": lambda root: write_tone(root / "dan" / "audio.wav", 1.0, level=0.1),
    "sensors go": lambda root: (root / "cat" / "metadata.jsonl").unlink(),
    "a text changes": lambda root: write_lines(
        root / "cat" / "text.jsonl", [{"timestamp": 0.1, "stream": "internal", "text": "new"}]
    ),
    "a session gets longer": lambda root: (
        shutil.rmtree(root / "dan"),
        write_tiny_session(root / "dan", 3.0),
    ),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Tiny sessions, and one whose video breaks off in the midst."""
    root = write_tiny_sessions(tmp_path_factory.mktemp("recorded"))
    broken = write_tiny_session(root / "bad", 3.0)
    path = broken / "vision_left.mp4"
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 1500
    content[begin : begin + 2500] = bytes(2500)
    path.write_bytes(content)
    return root


@pytest.fixture
def sessions(recorded, tmp_path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "sessions"))


def without_copies(monkeypatch) -> None:
    """Plans copy nothing."""
    plan = job_module.plan_shards

    def plan_shards(*args, **options):
        whole = plan(*args, **options)
        return replace(whole, tasks=tuple(task.without(FromShards) for task in whole.tasks))

    monkeypatch.setattr(job_module, "plan_shards", plan_shards)


@pytest.mark.parametrize("recipe", [RAW, H264], ids=["raw", "h264"])
@pytest.mark.parametrize("change", CHANGES)
def test_copied_rows_have_the_bytes_of_decoded_rows(
    sessions, tmp_path, monkeypatch, change, recipe
):
    copied, decoded = tmp_path / "copied", tmp_path / "decoded"
    build(sessions, copied, recipe)
    shutil.copytree(copied, decoded)
    CHANGES[change](sessions)
    summary = build(sessions, copied, recipe)
    assert any(task.copied_index_files for task in summary.plan.tasks)
    with monkeypatch.context() as patched:
        without_copies(patched)
        build(sessions, decoded, recipe)
    assert file_hashes(copied) == file_hashes(decoded)
    check_set(copied)


def test_when_a_session_goes_no_recording_of_the_others_is_read(sessions, tmp_path, monkeypatch):
    build(sessions, tmp_path / "out", H264)
    before = set_keys(tmp_path / "out")
    shutil.rmtree(sessions / "ann")
    for method in ("iter_frames", "read_audio", "read_dmel", "read_sensor", "read_text"):
        monkeypatch.setattr(SessionReader, method, lambda *_: pytest.fail("a recording is read"))
    build(sessions, tmp_path / "out", H264)
    assert set_keys(tmp_path / "out") == [k for k in before if not k.startswith("ann/")]


def test_losses_of_copied_rows_stay(sessions, tmp_path):
    build(sessions, tmp_path / "out", H264)
    losses = [x for x in jsonl(tmp_path / "out" / "rejected.jsonl") if x["session"] == "bad"]
    shutil.rmtree(sessions / "ann")
    build(sessions, tmp_path / "out", H264)
    assert losses
    assert [
        x for x in jsonl(tmp_path / "out" / "rejected.jsonl") if x["session"] == "bad"
    ] == losses


def test_a_damaged_old_column_is_not_copied_from(sessions, tmp_path, monkeypatch):
    out, decoded = tmp_path / "out", tmp_path / "decoded"
    build(sessions, out, H264)
    shutil.copytree(out, decoded)
    index = open_index(out / "train-000000.index")
    row = [index.key(r) for r in range(index.num_samples)].index("dan/000000")
    path = out / "train-000000.vision_left.tar"
    content = bytearray(path.read_bytes())
    content[int(index.arrays["vision_left.offset"][row]) + 100] ^= 1
    path.write_bytes(content)
    shutil.rmtree(sessions / "ann")
    build(sessions, out, H264)
    check_set(out)
    with monkeypatch.context() as patched:
        without_copies(patched)
        build(sessions, decoded, H264)
    assert file_hashes(out) == file_hashes(decoded)
