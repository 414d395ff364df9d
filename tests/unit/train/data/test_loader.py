"""The stream of batches: the same for any number of workers and from any position."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import sets as tiny_sets
from helpers.sets import LENGTHS_S, TEXT_HEADS, assert_same, make_config, make_loader, take

from shared.errors import ConfigError, MachineError
from shared.shardset.columns import ColumnFile
from train.data.loader import Loader, open_source
from train.data.shard_source import ShardSource
from train.loop.prefetch import BatchFeed

WINDOWS = [
    {"duration_s": 0.4},
    {"duration_s": 1.0, "stride_s": 0.2},
    {"duration_s": 4.0, "stride_s": 2.0},
]
"""Windows of one segment, overlapping ones over several, and one per session."""

few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")


# --- any number of workers -------------------------------------------------------------------


@few_cores
@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_batches_are_the_same_for_any_number_of_workers(tiny_set, window, num_workers):
    expected = take(make_loader(tiny_set, window=window), 9)
    found = make_loader(tiny_set, window=window, num_workers=num_workers)
    assert_same(take(found, 9), expected)


@few_cores
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_text_batches_are_the_same_for_any_number_of_workers(tiny_set, num_workers):
    expected = take(make_loader(tiny_set, heads=TEXT_HEADS), 7)
    found = make_loader(tiny_set, heads=TEXT_HEADS, num_workers=num_workers)
    assert_same(take(found, 7), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_targets_share_the_memory_of_the_inputs(tiny_set, num_workers):
    (batch,) = take(make_loader(tiny_set, num_workers=num_workers), 1)
    names = {"animation": "proprio", "audio": "audio", "internal_text": "internal_text"}
    for head, stream in names.items():
        for suffix in ("", "_valid"):
            target, given = batch["targets"][head + suffix], batch["inputs"][stream + suffix]
            assert target.data_ptr() == given.data_ptr(), head


@pytest.mark.parametrize("window", WINDOWS)
def test_an_epoch_holds_every_key_once_with_weight(tiny_set, window):
    loader = make_loader(tiny_set, window=window)
    source = loader.source
    batches = take(loader, 2 * loader.batches_per_epoch)
    for epoch in (0, 1):
        rows = [zip(b["keys"], b["weight"], strict=True) for b in batches if b["epoch"] == epoch]
        keys = [key for batch in rows for key, weight in batch if weight]
        assert sorted(keys) == sorted(source.key(*p) for p in tiny_sets.sample_locations(source))
        assert len(set(keys)) == len(keys)
    num_padding = sum(int((batch["weight"] == 0).sum()) for batch in batches)
    assert num_padding == 2 * (-len(keys) % 7)


# --- resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_loaded_state_resumes_with_the_same_batches(tiny_set, window, num_workers):
    loader = make_loader(tiny_set, window=window, batch_size=4)
    border = loader.batches_per_epoch
    batches = take(loader, border + 4)
    for position in (0, border - 1, border, border + 1):
        resumed = make_loader(tiny_set, window=window, batch_size=4, num_workers=num_workers)
        resumed.load_state_dict(json.loads(json.dumps(loader.state_at(position))))
        assert_same(take(resumed, 3), batches[position : position + 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": {"duration_s": 2.0, "stride_s": 0.2}}, "window_s 1.0, this run has 2.0; fix"),
        ({"window": {"duration_s": 1.0, "stride_s": 1.0}}, "stride_s 0.2, this run has 1.0; fix"),
        ({"modalities": ["touch"], "heads": ("animation",)}, "period_s 0.2, this run has 0.1; fix"),
    ],
)
def test_a_state_of_other_windows_is_refused(tiny_set, options, message):
    state = make_loader(tiny_set).state_at(3)
    with pytest.raises(ConfigError, match=f"{re.escape(message)}: .*--weights"):
        make_loader(tiny_set, **options).load_state_dict(state)


def test_held_out_windows_touch_whatever_the_stride(tiny_set):
    for stride_s in (0.2, 1.0):
        window = {"duration_s": 1.0, "stride_s": stride_s}
        loader = make_loader(tiny_set, split="val", num_epochs=1, is_shuffled=False, window=window)
        batches = list(loader)
        keys = [k for b in batches for k, w in zip(b["keys"], b["weight"], strict=True) if w]
        assert keys == ["bob@0", "bob@10"]  # 1.6 s


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 8),
        ("last_batch", "drop"),
        ("shuffle_block_shards", 3),
        ("tick_rate_hz", 5.0),
        ("window_s", 2.0),
        ("stride_s", 1.0),
        ("period_s", 0.4),
    ],
)
def test_a_state_of_another_order_is_refused(tiny_set, key, value):
    loader = make_loader(tiny_set)
    with pytest.raises(ConfigError, match=f"(has|with) {key} {value!r}, this run has .*; fix: "):
        loader.load_state_dict({**loader.state_at(3), key: value})


@pytest.mark.parametrize(("batch_size", "num_workers"), [(2, 0), (3, 1), (6, 0)])
def test_smaller_batches_resume_with_the_samples_of_larger_ones(tiny_set, batch_size, num_workers):
    larger = make_loader(tiny_set, batch_size=6)
    position = larger.batches_per_epoch + 1  # within the second epoch
    expected = [key for b in take(larger, position + 3)[position:] for key in b["keys"]]
    smaller = make_loader(tiny_set, batch_size=batch_size, num_workers=num_workers)
    smaller.load_state_dict(larger.state_at(position))
    found = [key for b in take(smaller, 18 // batch_size) for key in b["keys"]]
    assert found == expected


def test_a_feed_resumes_at_the_position_of_larger_batches(tiny_set):
    state = make_loader(tiny_set, batch_size=6).state_at(3)
    feed = BatchFeed(make_loader(tiny_set, batch_size=3), torch.device("cpu"), seed=0, state=state)
    assert feed.state()["next_batch"] == 6
    assert feed.state()["batch_size"] == 3
    feed.take(2)
    assert feed.state()["next_batch"] == 8


@pytest.mark.parametrize("batch_size", [4, 0, -7, None, "7", 1 << 70, True])
def test_a_state_where_no_batch_begins_is_refused(tiny_set, batch_size):
    loader = make_loader(tiny_set)
    with pytest.raises(
        ConfigError, match=r"where no batch of size 7 starts; fix: set data\.batch_size"
    ):
        loader.load_state_dict({**loader.state_at(3), "batch_size": batch_size})


@pytest.mark.parametrize("next_batch", [None, -1, 1.0, "3", True, 1 << 70])
def test_a_state_without_a_position_is_refused(tiny_set, next_batch):
    loader = make_loader(tiny_set)
    with pytest.raises(
        ConfigError, match=f"resumes at next_batch {next_batch!r}, which is not a batch"
    ):
        loader.load_state_dict({**loader.state_at(3), "next_batch": next_batch})


def test_an_empty_state_is_refused(tiny_set):
    with pytest.raises(ConfigError, match="resumes at next_batch None"):
        make_loader(tiny_set).load_state_dict({})


def test_a_state_of_other_recordings_is_refused(tiny_set, raw_set):
    state = make_loader(raw_set).state_at(1)
    with pytest.raises(ConfigError, match="fingerprint"):
        make_loader(tiny_set).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "difference", "fix"),
    [
        (
            {"window": {"duration_s": 0.8, "stride_s": 0.2}},
            "window_s 1.0, this run has 0.8",
            "set data.window.duration_s",
        ),
        ({"window": {"duration_s": 1.0}}, "stride_s 0.2, this run has 1.0", "data.window.stride_s"),
        (
            {"modalities": ["proprio"], "heads": ("animation",)},
            "period_s 0.2, this run has 0.1",
            "data.modalities",
        ),
    ],
)
def test_other_windows_do_not_resume(tiny_set, options, difference, fix):
    state = make_loader(tiny_set).state_at(1)
    with pytest.raises(ConfigError) as found:
        make_loader(tiny_set, **options).load_state_dict(state)
    message = str(found.value)
    assert difference in message
    assert fix in message
    assert "--weights" in message


def test_a_state_is_refused_once_reading_has_begun(tiny_set):
    loader = make_loader(tiny_set)
    take(loader, 1)
    with pytest.raises(ConfigError, match="begun to read"):
        loader.load_state_dict(loader.state_at(0))


def test_every_iteration_starts_at_the_loaded_state(tiny_set):
    loader = make_loader(tiny_set)
    loader.load_state_dict(loader.state_at(3))
    first = take(loader, 2)
    assert first[0]["index"] == 3
    assert_same(take(loader, 2), first)


# --- the held-out loader ---------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_finite_loader_ends_and_can_be_read_again(tiny_set, num_workers):
    loader = make_loader(
        tiny_set, split="val", num_epochs=1, is_shuffled=False, num_workers=num_workers
    )
    first, cut_short, again = list(loader), take(loader, 1), list(loader)
    assert len(first) == loader.batches_per_epoch
    assert_same(cut_short, first[:1])
    assert_same(again, first)
    rows = [zip(batch["keys"], batch["weight"], strict=True) for batch in first]
    keys = [key for batch in rows for key, weight in batch if weight]
    assert keys == sorted(keys)
    assert {key.partition("@")[0] for key in keys} == {"bob"}


def test_a_split_without_samples_is_refused(tiny_set):
    source = ShardSource(tiny_set, split="val")
    source.shard_sizes = np.zeros(0, dtype=np.int64)
    with pytest.raises(ConfigError, match="no sample"):
        Loader(source, make_config(tiny_set))


def test_a_batch_that_cannot_be_filled_is_refused(tiny_set):
    with pytest.raises(ConfigError, match=r"lower data\.batch_size"):
        make_loader(tiny_set, batch_size=1000, last_batch="drop")


def test_a_config_without_data_is_refused():
    with pytest.raises(ConfigError, match=r"set data\.shards"):
        open_source(make_config(), split="train")


# --- only what is needed is read -------------------------------------------------------------


def bytes_read(monkeypatch, loader, count=3):
    """Count the bytes of each column that the next batches read."""
    read = {}
    original = ColumnFile.read_rows

    def note(self, members, rows, **options):
        contents = original(self, members, rows, **options)
        column = self.path.name.partition(".")[2]
        read[column] = read.get(column, 0) + sum(len(each or b"") for each in contents)
        return contents

    with monkeypatch.context() as patch:
        patch.setattr(ColumnFile, "read_rows", note)
        take(loader, count)
    return read


def test_text_only_reads_no_other_byte(tiny_set, monkeypatch):
    read = bytes_read(monkeypatch, make_loader(tiny_set, heads=TEXT_HEADS))
    assert set(read) == {"internal_text.tar", "external_text.tar"}


def test_text_only_works_without_the_other_columns(tiny_set, tmp_path):
    shards = tiny_sets.copy_set(tiny_set, tmp_path / "set")
    for path in {*shards.glob("*.zarr.zip"), *shards.glob("*.vision*"), *shards.glob("*.audio.*")}:
        path.unlink()
    expected = take(make_loader(tiny_set, heads=TEXT_HEADS), 7)
    assert_same(take(make_loader(shards, heads=TEXT_HEADS), 7), expected)
    assert not any(batch["skipped"] for batch in expected)


def test_modalities_without_vision_read_none(tiny_set, monkeypatch):
    loader = make_loader(tiny_set, modalities=["touch"], heads=("animation",))
    assert set(bytes_read(monkeypatch, loader)) == {"touch.zarr.zip", "proprio.zarr.zip"}


def test_one_camera_reads_one_camera(tiny_set, monkeypatch):
    loader = make_loader(tiny_set, modalities=["vision_left"], heads=("audio",))
    assert set(bytes_read(monkeypatch, loader)) == {"vision_left.tar", "audio.dmel.zarr.zip"}


def stored_tokens(shards, stream):
    """Return (tick, time of the event, token) of every token by session, from a stream's tars."""
    tokens = {}
    for path in sorted(shards.glob(f"*.{stream}.tar")):
        for key, member in sorted(read_tar(path).items()):
            values = json.loads(member)
            ticks = [int(time_s * 10 + 1e-6) for time_s in values["time_s"]]
            columns = (ticks, values["event_s"], values["ids"])
            tokens.setdefault(key.partition("/")[0], []).extend(zip(*columns, strict=True))
    return tokens


def test_a_window_reads_its_segments_of_a_stream_by_one_request(tiny_set, monkeypatch):
    loader = make_loader(tiny_set, window={"duration_s": 1.6}, batch_size=1)
    next(iter(loader))  # opens files
    requests = []
    original = os.pread

    def note(descriptor, length, offset):
        requests.append(offset)
        return original(descriptor, length, offset)

    for location in tiny_sets.sample_locations(loader.source):
        tiny_sets.read_sample(loader.source, location)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", note)
            tiny_sets.read_sample(loader.source, location)
        assert len(requests) <= len(loader.shapes.streams)
        requests.clear()


LAST_TICKS = {name: round(length_s * 10) - 1 for name, length_s in LENGTHS_S.items()}
"""Tokens after a session's end belong to its last tick."""


def slow_dense(members, key, streams):
    """Return the tokens of a window by event, from the members of its segments.

    At equal times streams come by name.
    """
    session, first = key.split("@")
    ticks = range(int(first), int(first) + 10)
    tokens = []
    for (name, own_session, _), member in sorted(members.items()):
        if name in streams and own_session == session:
            values = json.loads(member)
            tokens += [
                (event_s, name, time_s, token)
                for token, time_s, event_s in zip(
                    values["ids"], values["time_s"], values["event_s"], strict=True
                )
                if min(math.floor(time_s * 10 + 1e-5), LAST_TICKS[session]) in ticks
            ]
    tokens.sort()
    return {s: [token if s == name else 0 for _, name, _, token in tokens] for s in streams}


@pytest.mark.parametrize("heads", [TEXT_HEADS, TEXT_HEADS[:1], TEXT_HEADS[1:]])
def test_text_only_is_packed_densely(tiny_set, heads):
    loader = make_loader(tiny_set, heads=heads, num_epochs=1, window={"duration_s": 1.0})
    members = {}
    for path in tiny_set.glob("*_text.tar"):
        members |= read_tar(path)
    ends = run_ends(loader.source)
    num_tokens = 0
    for batch in loader:
        rows = []
        for key in batch["keys"]:
            session, first = key.split("@")
            # Tokens after the end of the window's run belong to the next run.
            cut = {m: c for m, c in members.items() if m[2] < ends[session, int(first)]}
            rows.append(slow_dense(cut, key, heads))
        num_tokens += sum(len(row[heads[0]]) for row in rows)
        longest = max(2, *(len(row[heads[0]]) for row in rows))
        for stream in heads:
            lengths = [len(row[stream]) for row in rows]
            expected = [row[stream] + [0] * (longest - len(row[stream])) for row in rows]
            assert batch["inputs"][stream].tolist() == expected
            valid = [[i < n for i in range(longest)] for n in lengths]
            assert batch["inputs"][f"{stream}_valid"].tolist() == valid
    assert num_tokens > 20


def run_ends(source):
    """Return (session, first tick of a window) -> segment at which its run ends."""
    ends = {}
    for shard, window in tiny_sets.sample_locations(source):
        session, first = source.key(shard, window).split("@")
        index = source.shard(shard).index
        row = source.locate(shard, window).rows.start
        while row + 1 < index.num_samples and index.key(row + 1).startswith(f"{session}/"):
            if index.segment(row + 1) != index.segment(row) + 1:
                break
            row += 1
        ends[session, int(first)] = index.segment(row) + 1
    return ends


def read_tar(path):
    """Return (column, session, segment) -> bytes."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            key, column, _ = member.name.split(".")
            session, segment = key.split("/")
            found[column, session, int(segment)] = tar.extractfile(member).read()
    return found


# --- signals ---------------------------------------------------------------------------------

SCRIPT = """
import itertools, signal, sys
from helpers.sets import make_config
from train.data.loader import Loader
from train.data.shard_source import ShardSource

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
batches = iter(Loader(ShardSource(sys.argv[1]), make_config(num_workers=2)))
next(batches)
print("reading", flush=True)
sys.stdin.readline()
print(len(list(itertools.islice(batches, 30))), flush=True)
"""


def test_workers_outlive_a_signal_to_the_whole_group(tiny_set):
    env = {**os.environ, "PYTHONPATH": str(Path(tiny_sets.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_set)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "reading\n"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(process.pid, number)
        out, err = process.communicate("go on\n", timeout=30)
    assert (out, err, process.returncode) == ("30\n", "", 0)


SPAWNED = """
import atexit, multiprocessing
from train.data.batch_maker import init_worker
if __name__ == "__mp_main__":
    atexit.register(print, "the interpreter is taken apart")
def work(code):
    init_worker(0)
    raise SystemExit(code)
if __name__ == "__main__":
    for code in (None, 3, "message"):
        worker = multiprocessing.get_context("spawn").Process(target=work, args=(code,))
        worker.start()
        worker.join()
        print("ended", worker.exitcode)
"""


def test_a_spawned_worker_ends_like_a_forked_one(tmp_path):
    # Threads of libraries that need the interpreter while it is taken apart can abort the process.
    program = tmp_path / "program.py"
    program.write_text(SPAWNED)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    # torch notices at once only if a failed worker has another exit code than 0.
    assert (done.stdout, done.stderr) == ("ended 0\nended 3\nended 1\n", "message\n")


def test_a_dev_shm_without_space_for_semaphores_is_named(tiny_set, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    loader = tiny_sets.make_loader(tiny_set)
    monkeypatch.setattr(Loader, "_make_batches", fail)
    with pytest.raises(MachineError, match=r"^/dev/shm: No space left.*data\.num_workers: 0"):
        next(iter(loader))
