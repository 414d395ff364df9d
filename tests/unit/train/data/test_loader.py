"""The stream of batches: the same for any number of workers and from any position."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import sets as tiny_sets
from helpers.sets import TEXT_HEADS, assert_same, make_config, make_loader, take

from shared.errors import ConfigError
from shared.shardset.columns import ColumnFile
from train.data.loader import Loader, open_source
from train.data.shard_source import ShardSource
from train.loop.prefetch import BatchFeed

few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")


# --- any number of workers -------------------------------------------------------------------


@few_cores
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_workers(tiny_set, num_workers):
    expected = take(make_loader(tiny_set), 9)
    assert_same(take(make_loader(tiny_set, num_workers=num_workers), 9), expected)


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


def test_an_epoch_holds_every_key_once_with_weight(tiny_set):
    loader = make_loader(tiny_set)
    source = loader.source
    batches = take(loader, 2 * loader.batches_per_epoch)
    for epoch in (0, 1):
        rows = [zip(b["keys"], b["weight"], strict=True) for b in batches if b["epoch"] == epoch]
        keys = [key for batch in rows for key, weight in batch if weight]
        assert sorted(keys) == sorted(source.key(*p) for p in tiny_sets.sample_locations(source))
    assert any((batch["weight"] == 0).any() for batch in batches)


# --- resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("position", [0, 1, 4, 6, 9])
def test_a_loaded_state_resumes_with_the_same_batches(tiny_set, position, num_workers):
    loader = make_loader(tiny_set)
    assert 4 < loader.batches_per_epoch < 9  # so that positions lie on both sides of the border
    expected = take(loader, 11)[position:]
    resumed = make_loader(tiny_set, num_workers=num_workers)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_at(position))))
    assert_same(take(resumed, 11 - position), expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 8),
        ("last_batch", "drop"),
        ("shuffle_block_shards", 3),
    ],
)
def test_a_state_of_another_order_is_refused(tiny_set, key, value):
    loader = make_loader(tiny_set)
    with pytest.raises(ConfigError, match=f"has {key} {value!r}, this run has"):
        loader.load_state_dict({**loader.state_at(3), key: value})


@pytest.mark.parametrize(("batch_size", "num_workers"), [(2, 0), (3, 1), (6, 0)])
def test_smaller_batches_resume_with_the_samples_of_larger_ones(tiny_set, batch_size, num_workers):
    larger = make_loader(tiny_set, batch_size=6)
    position = larger.batches_per_epoch + 2  # within the second epoch
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
    assert {key.partition("/")[0] for key in keys} == {"bob"}


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
    original = ColumnFile.read

    def note(self, members, row, **options):
        content = original(self, members, row, **options)
        column = self.path.name.partition(".")[2]
        read[column] = read.get(column, 0) + (0 if content is None else members.length[row])
        return content

    with monkeypatch.context() as patch:
        patch.setattr(ColumnFile, "read", note)
        take(loader, count)
    return read


def test_text_only_reads_no_other_byte(tiny_set, monkeypatch):
    read = bytes_read(monkeypatch, make_loader(tiny_set, heads=TEXT_HEADS))
    assert set(read) == {"text.tar"}


def test_text_only_works_without_the_other_columns(tiny_set, tmp_path):
    shards = tiny_sets.copy_set(tiny_set, tmp_path / "set")
    for path in (*shards.glob("*.zarr.zip"), *shards.glob("*.vision*"), *shards.glob("*.audio.*")):
        path.unlink()
    expected = take(make_loader(tiny_set, heads=TEXT_HEADS), 7)
    assert_same(take(make_loader(shards, heads=TEXT_HEADS), 7), expected)
    assert not any(batch["skipped"] for batch in expected)


def test_modalities_without_vision_read_none(tiny_set, monkeypatch):
    loader = make_loader(tiny_set, modalities=["touch"], heads=("animation",))
    assert set(bytes_read(monkeypatch, loader)) == {"proprio.zarr.zip"}


def test_one_camera_reads_one_camera(tiny_set, monkeypatch):
    loader = make_loader(tiny_set, modalities=["vision_left"], heads=("audio",))
    assert set(bytes_read(monkeypatch, loader)) == {"vision_left.tar", "dmel.zarr.zip"}


def slow_dense(path_of_text, streams):
    """Return a text member's tokens by time; at equal times internal text comes first."""
    values = json.loads(path_of_text)
    events = []
    for stream in ("internal", "external"):
        if stream in streams:
            pairs = zip(values[stream]["time_s"], values[stream]["ids"], strict=True)
            events += [(time_s, stream, token) for time_s, token in pairs]
    times = sorted({time_s for time_s, _, _ in events})
    order = [e for t in times for s in ("internal", "external") for e in events if e[:2] == (t, s)]
    return {s: [token if s == said_by else 0 for _, said_by, token in order] for s in streams}


@pytest.mark.parametrize("heads", [TEXT_HEADS, TEXT_HEADS[:1], TEXT_HEADS[1:]])
def test_text_only_is_packed_densely(tiny_set, heads):
    loader = make_loader(tiny_set, heads=heads, num_epochs=1)
    members = {}
    for path in tiny_set.glob("*.text.tar"):
        members |= read_tar(path)
    streams = [head.removesuffix("_text") for head in heads]
    for batch in loader:
        rows = [slow_dense(members.get(key, EMPTY), streams) for key in batch["keys"]]
        longest = max(2, *(len(row[streams[0]]) for row in rows))
        for stream in streams:
            lengths = [len(row[stream]) for row in rows]
            expected = [row[stream] + [0] * (longest - len(row[stream])) for row in rows]
            assert batch["inputs"][f"{stream}_text"].tolist() == expected
            valid = [[i < n for i in range(longest)] for n in lengths]
            assert batch["inputs"][f"{stream}_text_valid"].tolist() == valid


EMPTY = '{"internal": {"ids": [], "time_s": []}, "external": {"ids": [], "time_s": []}}'


def read_tar(path):
    import tarfile

    with tarfile.open(path) as tar:
        return {m.name.partition(".")[0]: tar.extractfile(m).read() for m in tar.getmembers()}


# --- signals ---------------------------------------------------------------------------------

SCRIPT = """
import itertools, signal, sys
from helpers.sets import make_config
from train.data.loader import Loader
from train.data.shard_source import ShardSource

for number in (signal.SIGINT, signal.SIGTERM):
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
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate("go on\n", timeout=30)
    assert (out, err, process.returncode) == ("30\n", "", 0)
