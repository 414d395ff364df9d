"""Video split into subtasks: the bytes of one pass, whatever the split, and no leftover files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click
import fsspec
import numpy as np
import pytest
from helpers.oracles import (
    build,
    build_with_subtasks,
    check_set,
    cluster_of,
    file_hashes,
    jsonl,
    tiny_recipe,
)
from helpers.plans import RECIPE, scan, without
from helpers.processes import SimulatedKillError, fail
from helpers.sessions import sensor_lines, write_lines, write_tone, write_video
from hypothesis import given
from hypothesis import strategies as st

from preprocess.__main__ import shards
from preprocess.build import job as job_module
from preprocess.build import task as build_module
from preprocess.build.plan_types import (
    Cause,
    ColumnTask,
    FromSession,
    FromShards,
    FromSubtasks,
    Reason,
    SessionSegments,
    ShardTask,
)
from preprocess.build.video_subtasks import TASK_S, split_task
from shared.errors import SessionError
from shared.session.reader import SessionReader
from shared.storage import Store, parse_location

if TYPE_CHECKING:
    from shared.session.scan import SessionScan

WHOLE = tiny_recipe(split={"val_fraction": 0})
"""All segments in one shard."""

VIDEOS = {
    "constant rate": ({"b_frames": 0}, {"gop": 30}),
    "variable rate, B-frames": ({"b_frames": 3, "gop": 8}, {"b_frames": 2, "gop": 20}),
    "one group, open groups": (
        {"gop": 1000},
        {"options": {"x264-params": "open-gop=1:bframes=3"}, "gop": 9},
    ),
    "hevc, transport stream": (
        {"codec": "libx265", "options": {"x265-params": "log-level=none"}, "gop": 10},
        {"container": "mpegts"},
    ),
}


def write_stereo(folder: Path, kind: str, duration_s: float, *, seed: int = 0) -> Path:
    """A session with two videos, at a constant rate or at any times."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name, how in zip(("vision_left.mp4", "vision_right.mp4"), VIDEOS[kind], strict=True):
        times_s = np.arange(round(duration_s * 30)) / 30
        if "variable" in kind:
            times_s = np.cumsum(rng.uniform(0.005, 0.12, 900))
            times_s = times_s[times_s < duration_s] - times_s[0]
        write_video(folder / name, times_s=times_s, **how)
    write_tone(folder / "audio.wav", duration_s)
    write_lines(folder / "metadata.jsonl", sensor_lines(duration_s))
    return folder


@pytest.fixture(scope="module")
def stereo(tmp_path_factory) -> Path:
    """A session of several subtasks and two shorter ones; read only."""
    root = tmp_path_factory.mktemp("stereo")
    for name, duration_s in (("ann", 6.5), ("bob", 1.0), ("cat", 1.4)):
        write_stereo(root / name, "variable rate, B-frames", duration_s)
    (root / "cat" / "vision_right.mp4").unlink()
    return root


@pytest.fixture(scope="module")
def made(stereo, tmp_path_factory) -> dict[str, str]:
    """Hashes of the set that one pass makes of them."""
    out = tmp_path_factory.mktemp("made")
    build(stereo, out, WHOLE)
    return file_hashes(out)


def replace_left(folder: Path) -> None:
    """Replace the left video by the right one, in a file of other bytes."""
    content = (folder / "vision_right.mp4").read_bytes()
    (folder / "vision_left.mp4").write_bytes(content + b"\0\0\0\x08free")


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.iterdir() if p.name.startswith(".")]


def count_calls(monkeypatch, module, name: str) -> list[object]:
    """Arguments of the calls of a function from now on."""
    calls: list[object] = []
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: [calls.append(a), original(*a)][1])
    return calls


# --- the same bytes --------------------------------------------------------------------------


WRIST = {"kind": "video", "file": "wrist.mp4", "rate_hz": 10, "size": [32, 48], "fit": "pad"}
THREE_CAMERAS = tiny_recipe(
    split={"val_fraction": 0},
    streams={
        "vision_left": {"kind": "video", "file": "vision_left.mp4"},
        "vision_right": {"kind": "video", "file": "vision_right.mp4", "codec": "mjpeg"},
        "wrist": WRIST,
        "audio": {"kind": "audio", "file": "audio.wav"},
    },
)


@pytest.mark.parametrize("recipe", [WHOLE, THREE_CAMERAS], ids=["two cameras", "three cameras"])
@pytest.mark.parametrize("kind", VIDEOS)
def test_subtasks_give_the_bytes_of_one_pass(tmp_path, monkeypatch, kind, recipe):
    tries = count_calls(monkeypatch, build_module, "_build_shard")
    for name, duration_s in (("long", 5.2), ("short", 1.0)):
        folder = write_stereo(tmp_path / "in" / name, kind, duration_s, seed=len(name))
        shutil.copy(folder / "vision_left.mp4", folder / "wrist.mp4")
    build(tmp_path / "in", tmp_path / "whole", recipe)
    build_with_subtasks(tmp_path / "in", tmp_path / "split", recipe, task_s=1.0)
    assert file_hashes(tmp_path / "split") == file_hashes(tmp_path / "whole")
    assert leftovers(tmp_path / "split") == []
    assert len(tries) == 2  # no subtask was given up


def test_subtasks_report_the_same_decode_failures_of_a_damaged_video(tmp_path, monkeypatch):
    folder = write_stereo(tmp_path / "in" / "ann", "constant rate", 8.0)
    content = bytearray((folder / "vision_left.mp4").read_bytes())
    for offset in range(len(content) // 4, len(content) // 2):
        content[offset] ^= 0x55
    (folder / "vision_left.mp4").write_bytes(content)
    tries = count_calls(monkeypatch, build_module, "_build_shard")
    for build_it, out in ((build, "whole"), (build_with_subtasks, "split")):
        build_it(tmp_path / "in", tmp_path / out, WHOLE)
    lost = [x["segment"] for x in jsonl(tmp_path / "whole" / "rejected.jsonl") if "segment" in x]
    assert lost
    assert len(tries) == 2
    assert file_hashes(tmp_path / "split") == file_hashes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_bytes_of_none(stereo, made, tmp_path, num_workers):
    build(stereo, tmp_path / "out", WHOLE, num_workers=num_workers, task_s=1.0)
    assert file_hashes(tmp_path / "out") == made
    assert leftovers(tmp_path / "out") == []


def test_the_task_of_a_split_session_decodes_nothing(stereo, made, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch, job_module, "encode_video")
    lengths = []
    original = SessionReader.iter_frames

    def iter_frames(self, stream, segments, **more):
        lengths.append(len(segments))
        return original(self, stream, segments, **more)

    monkeypatch.setattr(SessionReader, "iter_frames", iter_frames)
    build_with_subtasks(stereo, tmp_path / "out", WHOLE, task_s=2.0)
    assert file_hashes(tmp_path / "out") == made
    assert len(calls) == 2 * 4 + 2 + 1  # ann's 7 segments of each video, bob and cat, bob
    assert max(lengths) <= 3
    assert sum(lengths) == 7 + 1 + 2 + 7 + 1  # each segment once: the shard itself reads none


def test_only_rows_that_are_not_copied_are_split(stereo, tmp_path, monkeypatch):
    sessions = Path(shutil.copytree(stereo, tmp_path / "in"))
    one, other = tmp_path / "one", tmp_path / "other"
    build(sessions, one, WHOLE)
    shutil.copytree(one, other)
    replace_left(sessions / "ann")
    build(sessions, one, WHOLE)
    calls = count_calls(monkeypatch, job_module, "encode_video")
    build_with_subtasks(sessions, other, WHOLE)
    assert file_hashes(other) == file_hashes(one)
    assert {(s.column, *(stored.session for stored in s.sessions)) for s, _ in calls} == {
        ("vision_left", "ann")
    }


# --- failures between a subtask and its shard ------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 1  # of a tar, in its first member
    path.write_bytes(content)


@pytest.mark.parametrize("end", ["tar", "index"])
@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["damaged", "gone"])
def test_a_corrupt_or_missing_subtask_file_is_replaced_by_decoding(
    stereo, made, tmp_path, monkeypatch, end, damage
):
    out = tmp_path / "out"
    original = job_module.build_shard

    def build_shard(task, context, encoded):
        damage(out / (encoded[2].file if end == "tar" else encoded[2].index_file))
        return original(task, context, encoded)

    monkeypatch.setattr(job_module, "build_shard", build_shard)
    tries = count_calls(monkeypatch, build_module, "_build_shard")
    build_with_subtasks(stereo, out, WHOLE)
    assert len(tries) == 2
    check_set(out)
    assert file_hashes(out) == made
    assert leftovers(out) == []


def test_a_video_that_changes_after_its_subtask_fails_the_job(stereo, tmp_path, monkeypatch):
    sessions = Path(shutil.copytree(stereo, tmp_path / "in"))
    original = job_module.build_shard

    def build_shard(*args):
        replace_left(sessions / "ann")
        return original(*args)

    monkeypatch.setattr(job_module, "build_shard", build_shard)
    with pytest.raises(SessionError, match=r"session ann: vision_left.mp4 changed or was removed"):
        build_with_subtasks(sessions, tmp_path / "out", WHOLE)
    assert leftovers(tmp_path / "out") == []


def test_subtask_files_of_an_interrupted_job_are_removed_by_the_next(
    stereo, made, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    exist = []

    def stop(task, context, encoded):
        exist.extend((out / video.file).exists() for video in encoded)
        fail()

    with monkeypatch.context() as patched:
        patched.setattr(job_module, "build_shard", stop)
        patched.setattr("shared.shardset.store.discard", lambda _: None)  # as a kill does
        with pytest.raises(SimulatedKillError):
            build_with_subtasks(stereo, out, WHOLE)
    assert exist
    assert all(exist)
    assert leftovers(out)
    build_with_subtasks(stereo, out, WHOLE)
    assert file_hashes(out) == made
    assert leftovers(out) == []


def test_subtask_files_behind_a_url_leave_no_trace(stereo, made, tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    url, store = "memory://here/split", parse_location("memory://here/split")
    assert isinstance(store, Store)
    store.write(".0123456789ab.tmp/train-000000.vision_left.0.tar", b"of a killed job")
    seen = []
    original = job_module.build_shard

    def build_shard(*args):
        seen.extend(n for n in store.list_files() if n.endswith(".0.tar"))
        return original(*args)

    monkeypatch.setattr(job_module, "build_shard", build_shard)
    build_with_subtasks(stereo, url, WHOLE)
    assert len(seen) == 1
    assert not seen[0].startswith(".0123456789ab.")
    names = set(store.list_files())
    assert names - {"sessions.jsonl"} == set(made)
    assert fs.cat_file("/here/split/manifest.json") is not None
    store.write(".0123456789ab.tmp/train-000000.vision_left.0.tar", b"of a late worker")
    build_with_subtasks(stereo, url, WHOLE)
    assert set(store.list_files()) == names
    fs.store.clear()


# --- splitting --------------------------------------------------------------------------------


def scan_of(name: str, streams: tuple[str, ...], num_segments: int) -> SessionScan:
    return without(scan(name, num_segments), set(RECIPE.streams) - set(streams))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    left_only=st.sets(st.integers(0, 7)),
    copied=st.sets(st.integers(0, 7)),
    task_s=st.floats(1.0, 50.0),
)
def test_subtasks_decode_each_segment_once_and_are_no_longer_than_task_s(
    lengths, left_only, copied, task_s
):
    both = ("vision_left", "vision_right")
    names = [f"s{i}" for i in range(len(lengths))]
    scans = {
        name: scan_of(name, both[:1] if i in left_only else both, lengths[i])
        for i, name in enumerate(names)
    }
    copied = tuple(name for i, name in enumerate(names) if i in copied)
    task = task_of(names, lengths, copied=copied)
    split, subtasks = split_task(task, scans, tiny_recipe(), task_s=task_s)
    wanted = {("vision_left", n): c for n, c in zip(names, lengths, strict=True) if n not in copied}
    wanted |= {("vision_right", n): lengths[i] for i, n in enumerate(names) if i not in left_only}
    if sum(wanted.values()) <= task_s:
        assert (split, subtasks) == (task, ())
        return
    assert len({subtask.name for subtask in subtasks}) == len(subtasks)
    runs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    encoded: dict[tuple[str, str], list[str]] = {}
    for subtask in subtasks:
        length = sum(len(stored.segments) for stored in subtask.sessions)
        assert subtask.num_runs == 1 or len(subtask.sessions) == 1
        assert length / subtask.num_runs <= task_s + 1e-9 or length == subtask.num_runs
        for stored in subtask.sessions:
            key = subtask.column, stored.session
            runs.setdefault(key, []).append((subtask.run, subtask.num_runs))
            encoded.setdefault(key, []).append(subtask.name)
    assert set(runs) == set(wanted)
    for run in runs.values():
        assert run == [(k, len(run)) for k in range(len(run))]
    sources = {
        (name, session): list(source.names)
        for name, column in split.columns.items()
        for session, source in column.sources.items()
        if isinstance(source, FromSubtasks)
    }
    assert sources == encoded


def task_of(names: list[str], lengths: list[int], *, copied: tuple[str, ...]) -> ShardTask:
    """A task of both videos and the sound; the left video of some sessions is copied."""
    columns = {
        name: ColumnTask(
            reason=Reason(Cause.NEW),
            basis={},
            rows={},
            sources={
                n: FromShards(("train-000000.index",))
                if name == "vision_left" and n in copied
                else FromSession()
                for n in names
            },
        )
        for name in ("vision_left", "vision_right", "audio")
    }
    return ShardTask(
        name="train-000000",
        split="train",
        sessions=tuple(
            SessionSegments(n, tuple(range(c))) for n, c in zip(names, lengths, strict=True)
        ),
        columns=columns,
        kept={},
        kept_index_file=None,
        generation=0,
    )


def test_the_default_of_task_seconds_is_the_constant():
    (option,) = (p for p in shards.params if p.name == "task_s")
    assert isinstance(option, click.Option)
    assert option.default == TASK_S


def test_a_task_in_this_process_is_not_split(stereo, made, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "encode_video", fail)
    with cluster_of(0) as cluster:
        job_module.build_shards(stereo, tmp_path / "out", recipe=WHOLE, cluster=cluster, task_s=1.0)
    assert file_hashes(tmp_path / "out") == made
