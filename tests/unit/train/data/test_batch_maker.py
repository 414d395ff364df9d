"""Corrupt samples are substituted, counted and reported, alike for any number of workers."""

from __future__ import annotations

import os
import random
import re
import zipfile

import pytest
import torch
from helpers import sets as tiny_sets
from helpers.faults import hostile_member
from helpers.sets import assert_same, make_loader, take

from shared.errors import MachineError, TooManyCorruptSamplesError
from train.data.batch_maker import MAX_ATTEMPTS, CorruptSampleBudget
from train.data.loader import Loader, open_source


def open_set(shards):
    """Return the touching windows of a set: those of a finite loader."""
    return make_loader(shards, num_epochs=1).source


def damage(shards, column, *, shard=0, row=1):
    """Flip one byte inside a segment's member; return the keys of the windows that need it."""
    source = open_set(shards)
    index = source.shard(shard).index
    members, file = index.members(column), index.columns[column]["file"]
    assert members.length[row] > 0, "the segment lacks it"
    middle = int(members.offset[row]) + int(members.length[row]) // 2
    tiny_sets.flip_byte(shards / file, middle)
    locations = tiny_sets.sample_locations(source)
    return {source.key(*p) for p in locations if p[0] == shard and row in source.locate(*p).rows}


@pytest.fixture
def a_copy(tiny_set, tmp_path):
    return tiny_sets.copy_set(tiny_set, tmp_path / "set")


def skipped_of(batches):
    return [skip for batch in batches for skip in batch["skipped"]]


@pytest.mark.parametrize("column", ["vision_left", "internal_text", "proprio", "audio.dmel"])
def test_a_flipped_byte_costs_its_windows_only_and_is_reported_once(tiny_set, a_copy, column):
    keys = damage(a_copy, column, row=2)
    assert len(keys) == 2, "two windows share the segment"
    good = make_loader(tiny_set, num_epochs=1)
    batches = list(make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0))
    (skip,) = skipped_of(batches)
    assert skip["key"] in keys
    for mine, whole in zip(batches, good, strict=True):
        for i, (my_key, its_key) in enumerate(zip(mine["keys"], whole["keys"], strict=True)):
            assert my_key not in keys
            if its_key not in keys:
                assert my_key == its_key
                for name, tensor in whole["inputs"].items():
                    assert torch.equal(mine["inputs"][name][i], tensor[i]), name


def test_a_corrupt_member_that_many_windows_need_is_reported_once(a_copy):
    """One reads it in each epoch, others overlap it; the limit counts members."""
    damage(a_copy, "proprio", row=1)
    loader = make_loader(a_copy, window={"duration_s": 1.2, "stride_s": 0.2})
    batches = take(loader, 3 * loader.batches_per_epoch)
    (skip,) = skipped_of(batches)
    assert skip["file"] == "train-000000.proprio.zarr.zip"
    num_read = sum(batch["num_members"] for batch in batches)
    assert num_read > 7 * sum(len(batch["keys"]) for batch in batches)


def test_a_skipped_sample_is_reported_with_its_file_offset_and_error(a_copy):
    keys = damage(a_copy, "audio.dmel", shard=2, row=3)
    (skip,) = skipped_of(make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0))
    assert skip["key"] in keys
    assert (skip["shard"], skip["window"]) == ("train-000002", 1)
    assert skip["file"] == "train-000002.audio.dmel.zarr.zip"
    assert f"train-000002.audio.dmel.zarr.zip at {skip['offset']}: " in skip["error"]
    with zipfile.ZipFile(a_copy / skip["file"]) as archive:
        entry = archive.getinfo("dmel/c/3/0/0")
        assert skip["offset"] == entry.header_offset + len(entry.FileHeader())


def test_a_member_that_does_not_decode_is_reported_with_its_offset(a_copy):
    """The checksums are right, so that only the decoder detects it."""
    hostile_member("internal_text", lambda _: b"{}")(a_copy, random.Random(0))
    (skip,) = skipped_of(make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0))
    assert skip["file"] == f"{skip['shard']}.internal_text.tar"
    assert skip["offset"] + 2 == (a_copy / skip["file"]).stat().st_size
    assert f"{skip['file']} at {skip['offset']}: not a text member" in skip["error"]


def test_a_shard_of_a_mix_is_reported_with_its_set(a_copy, tiny_set):
    damage(a_copy, "internal_text", shard=2)
    mix = [{"shards": str(a_copy), "name": "a"}, {"shards": str(tiny_set), "name": "b"}]
    config = tiny_sets.make_config(mix=mix, max_bad_fraction=1.0)
    loader = Loader(open_source(config, split="train"), config, num_epochs=1)
    skip = skipped_of(loader)[0]
    assert (skip["shard"], skip["file"]) == ("a/train-000002", "train-000002.internal_text.tar")
    assert type(skip["offset"]) is int


def by_key(batches):
    """Each sample that counts: its key, batch and row."""
    rows = [(b["keys"][i], b, i) for b in batches for i in range(len(b["keys"])) if b["weight"][i]]
    return {key: (batch, i) for key, batch, i in rows}, [key for key, _, _ in rows]


def padding_of(shards, num_epochs):
    """Return shard and row of a touch segment that only a padding sample of the epoch reads."""
    loader = make_loader(shards, num_epochs=num_epochs)
    source = loader.source
    last = take(loader, loader.batches_per_epoch)[-1]
    padding = [key for key, w in zip(last["keys"], last["weight"], strict=True) if not w]
    locations = {source.key(*p): p for p in tiny_sets.sample_locations(source)}
    for key in padding:
        shard, window = locations[key]
        for row in source.locate(shard, window).rows:
            if source.shard(shard).index.is_present(row, "touch"):
                return key, shard, row
    raise AssertionError("no padding sample has touch")


@pytest.mark.parametrize("num_epochs", [None, 1])
def test_corrupt_padding_is_reported_once_at_the_position_where_it_is_a_sample(
    tiny_set, a_copy, num_epochs
):
    padded, shard, row = padding_of(tiny_set, num_epochs)
    damage(a_copy, "proprio", shard=shard, row=row)
    loader = make_loader(a_copy, num_epochs=num_epochs, max_bad_fraction=1.0)
    found = take(loader, loader.batches_per_epoch)
    assert padded not in {key for batch in found for key in batch["keys"]}
    (skip,) = skipped_of(found)
    batch = next(batch for batch in found if batch["skipped"])
    original = take(make_loader(tiny_set, num_epochs=num_epochs), batch["index"] + 1)[-1]
    weights = dict(zip(original["keys"], original["weight"], strict=True))
    assert weights[skip["key"]] == 1


def test_a_substitute_is_whole_and_counts_as_one_in_training(tiny_set, a_copy):
    damage(a_copy, "proprio", row=2)
    good, loader = make_loader(tiny_set), make_loader(a_copy, max_bad_fraction=1.0)
    wholes = take(good, good.batches_per_epoch)
    clean, _ = by_key(wholes)
    num_substitutes = 0
    for batch, whole in zip(take(loader, loader.batches_per_epoch), wholes, strict=True):
        assert torch.equal(batch["weight"], whole["weight"])
        num_substitutes += sum(a != b for a, b in zip(batch["keys"], whole["keys"], strict=True))
        for i, its_key in enumerate(batch["keys"]):
            its_batch, row = clean[its_key]
            for name, tensor in batch["inputs"].items():
                assert torch.equal(tensor[i], its_batch["inputs"][name][row]), name
    assert num_substitutes >= 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_finite_pass_counts_each_good_sample_once_and_reports_each_corrupt_member_once(
    tiny_set, a_copy, num_workers
):
    """Half of the segments are corrupt, so that some substitutes are, too."""
    source = open_set(tiny_set)
    rows = [
        (shard, row)
        for shard, size in enumerate(source.shard_sizes)
        for row in range(size)
        if source.shard(shard).index.is_present(row, "proprio")
    ]
    bad = set().union(*(damage(a_copy, "proprio", shard=s, row=r) for s, r in rows[::3]))
    loader = make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0, num_workers=num_workers)
    found = list(loader)
    members = [(skip["file"], skip["offset"]) for skip in skipped_of(found)]
    assert len(members) == len(set(members)) > 3
    all_keys = {source.key(*p) for p in tiny_sets.sample_locations(source)}
    _, keys = by_key(found)
    assert sorted(keys) == sorted(all_keys - bad)


@pytest.mark.parametrize("fault", ["byte", "column", "index"])
def test_substitutes_are_the_same_for_any_number_of_workers(a_copy, fault):
    if fault == "byte":
        damage(a_copy, "internal_text")
    else:
        (a_copy / f"train-000001.{'index' if fault == 'index' else 'proprio.zarr.zip'}").unlink()
    options = {"max_bad_fraction": 1.0}
    alone = take(make_loader(a_copy, **options), 9)
    assert skipped_of(alone)
    assert_same(take(make_loader(a_copy, num_workers=2, **options), 9), alone)


@pytest.mark.parametrize("suffix", ["vision_left.tar", "audio.dmel.zarr.zip", "index"])
def test_a_missing_file_costs_the_samples_of_its_shard(tiny_set, a_copy, suffix):
    (a_copy / f"train-000001.{suffix}").unlink()
    batches = list(make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0))
    (skip,) = skipped_of(batches)
    assert skip["shard"] == "train-000001"
    assert (skip["file"], skip["offset"]) == (f"train-000001.{suffix}", None)
    assert f"train-000001.{suffix}" in skip["error"]
    assert (skip["key"] == "?") == (suffix == "index")
    source = open_set(tiny_set)
    lost = {source.key(1, window) for window in range(source.window_counts[1])}
    assert not lost & {key for batch in batches for key in batch["keys"]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_corrupt_samples_stop_the_run_with_one_plain_message(a_copy, num_workers):
    for row in range(3):
        damage(a_copy, "audio.dmel", row=row)
    # Two are more than 0.006 of the 210 members that an epoch reads, in whatever order.
    loader = make_loader(a_copy, num_workers=num_workers, max_bad_fraction=0.006)
    with pytest.raises(TooManyCorruptSamplesError, match="max_bad_fraction allows 0") as found:
        take(loader, 1000)
    message = str(found.value)
    assert re.match(r"[23] of \d+ ", message)
    assert "python -m preprocess shards --verify" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_without_readable_samples_is_a_clear_error(a_copy, num_workers):
    for path in a_copy.glob("*.dmel.zarr.zip"):
        path.write_bytes(b"")
    loader = make_loader(a_copy, heads=("audio",), modalities=["audio"], num_workers=num_workers)
    with pytest.raises(TooManyCorruptSamplesError) as found:
        take(loader, 1)
    message = str(found.value)
    assert f"{MAX_ATTEMPTS - 1} substitutes for it are corrupt" in message or "allows" in message
    assert "Traceback" not in message


def test_a_sample_that_lacks_the_damaged_column_is_not_corrupt(a_copy):
    for path in a_copy.glob("*.vision_right.tar"):
        path.write_bytes(b"")
    batches = list(make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0))
    assert {skip["key"].partition("@")[0] for skip in skipped_of(batches)} == {"cat"}
    keys = {key.partition("@")[0] for batch in batches for key in batch["keys"]}
    assert keys == {"ann", "dan", "eve"}


@pytest.mark.usefixtures("quick_retries")
def test_a_read_error_of_the_disk_is_no_corrupt_sample(tiny_set, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    source = open_set(tiny_set)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(MachineError, match="Input/output error; the disk"):
        tiny_sets.read_sample(source, (0, 0))


# --- the limit -------------------------------------------------------------------------------


def corrupt(file, offset, *, shard="a", window=0):
    return {"shard": shard, "window": window, "file": file, "offset": offset, "error": "e; fix: f"}


def test_the_limit_counts_each_corrupt_member_once_against_the_members_read():
    budget = CorruptSampleBudget(max_fraction=0.01)
    first = corrupt("x.tar", 512)
    assert budget.add(100, [first, corrupt("x.tar", 512, window=1)]) == [first]
    assert budget.add(100, [first]) == []
    others = [corrupt("x.tar", 0), corrupt("y.tar", 512), corrupt("x.tar", 512, shard="b")]
    assert budget.add(199, others + others[:1]) == others
    assert (budget.num_corrupt, budget.num_read) == (4, 399)
    with pytest.raises(TooManyCorruptSamplesError, match="4 of 399 stored segments of streams"):
        budget.check()
    budget.check()  # nothing new
    budget.add(1, [])
    assert budget.add(0, [corrupt("z.tar", None)])
    with pytest.raises(TooManyCorruptSamplesError):
        budget.check()


def test_a_sample_whose_member_is_unknown_stands_for_it():
    budget = CorruptSampleBudget(max_fraction=1.0)
    samples = [corrupt(None, None, window=window) for window in (0, 1, 0)]
    assert budget.add(3, samples) == samples[:2]
    budget.check()


def test_few_members_are_judged_as_if_more_had_been_read():
    budget = CorruptSampleBudget(max_fraction=0.01)
    budget.add(2, [corrupt("x.tar", 0), corrupt("x.tar", 1)])
    budget.check()  # 2 of at least 200
    budget.add(1, [corrupt("x.tar", 2)])
    with pytest.raises(TooManyCorruptSamplesError, match="3 of 3 "):
        budget.check()
