"""Which files a shard source opens, reads, prefetches and closes."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from helpers import sets as tiny_sets
from helpers.oracles import open_indexes
from helpers.processes import count_read_bytes, open_files, record_opened_files
from helpers.sets import make_config, open_windows, read_sample, set_recipe, take

from shared.errors import CorruptError, ShardError
from shared.kinds.video import encode_pictures
from shared.shardset import index
from shared.shardset.columns import ColumnFile
from shared.shardset.layout import columns_of
from shared.streams import Kind
from train.data import shard_source as reader
from train.data.loader import Loader
from train.data.shard_source import ShardSource


def open_set(shards, **options):
    """Return the windows of a set."""
    return open_windows(ShardSource(shards), make_config(**options))


def test_only_the_columns_that_are_needed_are_opened(tiny_set, monkeypatch):
    opened = []
    init = ColumnFile.__init__

    def note(self, path):
        opened.append(path.name.partition(".")[2])
        init(self, path)

    monkeypatch.setattr(ColumnFile, "__init__", note)
    options = {"heads": ("audio",), "modalities": ["audio"]}
    read_sample(open_set(tiny_set, **options), (0, 0))
    assert opened == ["audio.dmel.zarr.zip"]
    read_sample(open_set(tiny_set, heads=tiny_sets.TEXT_HEADS), (0, 0))
    assert opened[1:] == ["external_text.tar", "internal_text.tar"]


def test_text_only_training_reads_the_text_and_nothing_else(tiny_set):
    source = open_set(tiny_set)
    indexes = [source.shard(shard).index for shard in range(len(source.shard_sizes))]
    names = tiny_sets.TEXT_HEADS
    text_bytes = sum(int(i.members(name).length.sum()) for i in indexes for name in names)
    # Touching windows that hold whole segments, so that each is read once.
    config = make_config(tiny_set, heads=names, batch_size=1, window={"duration_s": 0.4})
    with record_opened_files() as opened, count_read_bytes() as read:
        loader = Loader(ShardSource(tiny_set), config)
        assert len(take(loader, loader.batches_per_epoch)) > 3
    own = {Path(path).name for path in opened if Path(path).parent == tiny_set}
    columns = {name for name in own if name.startswith("train-") and not name.endswith(".index")}
    assert columns == {i.columns[name]["file"] for i in indexes for name in names}
    assert {name for name in own if name.startswith("val-")} == set()
    column_bytes = sum(n for path, n in read.items() if Path(path).name in columns)
    assert text_bytes <= column_bytes <= 1.1 * text_bytes


def test_members_of_a_batch_are_prefetched_by_the_kernel(tiny_set, monkeypatch):
    """Of files that are open, which those of a block are after its first batches."""
    events = []

    def note(name, parse_location):
        call = getattr(os, name)

        def noted(fd, *values):
            path = Path(f"/proc/self/fd/{fd}").readlink()
            events.append((name != "posix_fadvise", (path, *parse_location(*values))))
            return call(fd, *values)

        monkeypatch.setattr(os, name, noted)

    note("posix_fadvise", lambda offset, length, advice: (offset, length))
    note("pread", lambda length, offset: (offset, length))
    config = make_config(tiny_set, batch_size=5, window={"duration_s": 1.0})
    loader = Loader(ShardSource(tiny_set), config)
    was_told = []
    for _ in itertools.islice(loader, 3 * loader.batches_per_epoch):
        told = {place for is_read, place in events if not is_read}
        reads = [place for is_read, place in events if is_read]
        first_read = [is_read for is_read, _ in events].index(True)
        assert told <= set(reads)
        assert len(told) == first_read  # all before the first read, and each once
        was_told += [place in told for place in reads]
        events.clear()
    assert sum(was_told) > 0.25 * len(was_told)


def test_shards_that_are_read_in_turn_are_hashed_once(raw_set, monkeypatch):
    monkeypatch.setattr(reader, "MAX_IDLE_INDEXES", 2)
    num_hashed = []
    original = index.sha256_of_bytes
    monkeypatch.setattr(index, "sha256_of_bytes", lambda c: num_hashed.append(0) or original(c))
    source = open_set(raw_set, heads=("audio",), modalities=["audio"])
    num_shards = len(source.shard_sizes)
    num_before = len(num_hashed)
    source.prefetch_shards(range(num_shards))
    for _ in range(3):
        for shard in range(num_shards):
            read_sample(source, (shard, 0))
    assert len(num_hashed) - num_before == num_shards > 4


def test_few_indexes_of_shards_that_are_read_in_turn_stay_in_memory(tiny_set, monkeypatch):
    monkeypatch.setattr(reader, "MAX_IDLE_INDEXES", 2)
    source, plenty = open_set(tiny_set), open_set(tiny_set)
    places = tiny_sets.sample_locations(source)
    for place in (*places, *places[::5]):
        ours, _ = read_sample(source, place)
        assert len(source._open._shards) <= 2
        theirs, _ = read_sample(plenty, place)
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])


@pytest.mark.parametrize("codec", ["raw", "yuv420", "mjpeg", "h264"])
def test_no_member_is_longer_than_its_limit(tiny_sessions, tmp_path, codec):
    """Where the recipe decides the length, the limit is it."""
    recipe = set_recipe(video={"codec": codec, "quality": 100, "qp": 1})
    out = tiny_sets.build_set(tiny_sessions, tmp_path / "shards", recipe)
    columns, longest = columns_of(recipe), Counter()
    for _, each in open_indexes(out):
        for name in columns:
            length = int(each.members(name).length.max(initial=0))
            longest[name] = max(longest[name], length)
    for name, column in columns.items():
        is_exact = column.kind not in (Kind.VIDEO, Kind.TEXT)
        limit = column.max_bytes
        assert longest[name] == limit if is_exact else 0 < longest[name] <= limit


@pytest.mark.parametrize("size", [16, 32, 224])
def test_noise_at_the_best_quality_is_far_below_the_limit(size):
    noise = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    for codec in ("raw", "yuv420", "mjpeg", "h264"):
        video = {"codec": codec, "quality": 100, "qp": 1, "size": size, "rate_hz": 5}
        recipe = set_recipe(video=video)
        limit = columns_of(recipe)["vision_left"].max_bytes
        assert len(encode_pictures(noise, spec=recipe.streams["vision_left"])) < limit / 2


def test_close_closes_and_a_dropped_source_leaves_nothing_open(tiny_set):
    before = open_files(tiny_set)
    source = open_set(tiny_set)
    expected, _ = read_sample(source, (0, 0))
    assert open_files(tiny_set) - before
    source.close()
    assert not open_files(tiny_set) - before
    again, _ = read_sample(source, (0, 0))
    np.testing.assert_array_equal(expected["audio"], again["audio"])
    del source
    assert not open_files(tiny_set) - before


def test_a_source_goes_to_another_process_with_its_files_open(tiny_set):
    source = open_set(tiny_set)
    expected, _ = read_sample(source, (1, 1))
    other = ForkingPickler.loads(ForkingPickler.dumps(source))
    found, _ = read_sample(other, (1, 1))
    np.testing.assert_array_equal(found["audio"], expected["audio"])


def test_a_fork_while_files_are_open_disturbs_no_reader(tiny_set):
    source = open_set(tiny_set)
    places = tiny_sets.sample_locations(source)
    expected = [read_sample(source, place)[0]["audio"] for place in places]
    child = os.fork()
    if child == 0:  # reads the same descriptors at the same time, then ends without clean-up
        same = all(
            np.array_equal(read_sample(source, p)[0]["audio"], e)
            for p, e in zip(places, expected, strict=True)
        )
        os._exit(0 if same else 1)
    for place, values in zip(places, expected, strict=True):
        np.testing.assert_array_equal(read_sample(source, place)[0]["audio"], values)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("suffix", ["index", "audio.dmel.zarr.zip"])
def test_a_missing_file_is_a_corrupt_sample(tiny_set, tmp_path, suffix):
    shards = tiny_sets.copy_set(tiny_set, tmp_path / "set")
    (shards / f"train-000000.{suffix}").unlink()
    with pytest.raises(CorruptError, match=rf"train-000000\.{suffix}"):
        read_sample(open_set(shards), (0, 0))


@pytest.mark.parametrize("runs", [[6], [4, 1], [1, 1, 1, 1, 1]])
def test_an_index_with_other_runs_than_the_manifest_says_is_refused(tiny_set, tmp_path, runs):
    shards = tiny_sets.copy_set(tiny_set, tmp_path / "set")
    tiny_sets.edit_manifest(
        shards, lambda v: v["shards"][0].update(num_samples=sum(runs), runs=runs)
    )
    with pytest.raises(CorruptError, match=f"has 5 rows in 1 runs, manifest says {sum(runs)} in"):
        open_set(shards).key(0, 0)


def test_the_error_for_a_missing_set_says_how_to_build_it(tmp_path):
    with pytest.raises(ShardError, match="python -m preprocess shards --out"):
        ShardSource(tmp_path / "nothing")
