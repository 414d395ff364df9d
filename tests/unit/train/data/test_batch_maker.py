"""Corrupt samples are substituted, counted and reported, alike for any number of workers."""

from __future__ import annotations

import os
import random
import zipfile

import pytest
import torch
from helpers import sets as tiny_sets
from helpers.faults import hostile_member
from helpers.sets import assert_same, make_loader, take

from shared.errors import CorruptError, TooManyCorruptSamplesError
from shared.recipe import Stream
from train.data.batch_maker import MAX_ATTEMPTS
from train.data.loader import Loader, open_source
from train.data.shard_source import ShardSource


def damage(shards, column, *, key=None, shard=0, row=1):
    """Flip one byte inside a sample's member; returns its key."""
    source = ShardSource(shards)
    if key is not None:
        shard, row = next(p for p in tiny_sets.sample_locations(source) if source.key(*p) == key)
    index = source.shard(shard).index
    name = {"dmel.zarr.zip": "dmel/dmel", "proprio.zarr.zip": "proprio/touch"}.get(column)
    members = index.members(name or column.partition(".")[0])
    assert members.length[row] > 0, "the sample lacks it"
    path = shards / f"{index.header['name']}.{column}"
    tiny_sets.flip_byte(path, int(members.offset[row]) + int(members.length[row]) // 2)
    return source.key(shard, row)


@pytest.fixture
def a_copy(tiny_set, tmp_path):
    return tiny_sets.copy_set(tiny_set, tmp_path / "set")


def skipped_of(batches):
    return [skip for batch in batches for skip in batch["skipped"]]


@pytest.mark.parametrize(
    "column", ["vision_left.tar", "text.tar", "proprio.zarr.zip", "dmel.zarr.zip"]
)
def test_a_flipped_byte_costs_its_sample_only(tiny_set, a_copy, column):
    key = damage(a_copy, column)
    good = make_loader(tiny_set, num_epochs=1)
    batches = list(make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0))
    skipped = skipped_of(batches)
    assert {skip["key"] for skip in skipped} == {key}
    for mine, whole in zip(batches, good, strict=True):
        for i, (my_key, its_key) in enumerate(zip(mine["keys"], whole["keys"], strict=True)):
            assert my_key != key
            if its_key != key:
                assert my_key == its_key
                assert torch.equal(mine["inputs"]["touch"][i], whole["inputs"]["touch"][i])
                assert torch.equal(mine["inputs"]["audio"][i], whole["inputs"]["audio"][i])


def test_a_skipped_sample_is_reported_with_its_file_offset_and_error(a_copy):
    key = damage(a_copy, "dmel.zarr.zip", shard=2, row=3)
    batches = list(make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0))
    skip = skipped_of(batches)[0]
    assert (skip["key"], skip["shard"], skip["row"]) == (key, "train-000002", 3)
    assert skip["file"] == "train-000002.dmel.zarr.zip"
    assert f"train-000002.dmel.zarr.zip at {skip['offset']}: checksum" in skip["error"]
    with zipfile.ZipFile(a_copy / skip["file"]) as archive:
        entry = archive.getinfo("dmel/c/3/0/0")
        assert skip["offset"] == entry.header_offset + len(entry.FileHeader())


def test_a_member_that_does_not_decode_is_reported_with_its_offset(a_copy):
    """The checksums are right, so that only the decoder detects it."""
    hostile_member("text", "text", lambda _: b"{}")(a_copy, random.Random(0))
    skip = skipped_of(make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0))[0]
    assert skip["file"] == f"{skip['shard']}.text.tar"
    assert skip["offset"] + 2 == (a_copy / skip["file"]).stat().st_size
    assert f"{skip['file']} at {skip['offset']}: not a text member" in skip["error"]


def test_a_shard_of_a_mix_is_reported_with_its_set(a_copy, tiny_set):
    damage(a_copy, "text.tar", shard=2)
    mix = [{"shards": str(a_copy), "name": "a"}, {"shards": str(tiny_set), "name": "b"}]
    config = tiny_sets.make_config(mix=mix, max_bad_fraction=1.0)
    loader = Loader(open_source(config, split="train"), config, num_epochs=1)
    skip = skipped_of(loader)[0]
    assert (skip["shard"], skip["file"]) == ("a/train-000002", "train-000002.text.tar")
    assert type(skip["offset"]) is int


def by_key(batches):
    """Each sample that counts: its key, batch and row."""
    rows = [(b["keys"][i], b, i) for b in batches for i in range(len(b["keys"])) if b["weight"][i]]
    return {key: (batch, i) for key, batch, i in rows}, [key for key, _, _ in rows]


def padding_of(shards):
    """Keys of the rows that fill up the epoch's last batch, of those with touch."""
    source = ShardSource(shards)
    locations = tiny_sets.sample_locations(source)
    felt = {source.key(*p) for p in locations if Stream.TOUCH in source.present(*p)}
    last = list(make_loader(shards, num_epochs=1))[-1]
    rows = zip(last["keys"], last["weight"], strict=True)
    return [key for key, weight in rows if not weight and key in felt]


@pytest.mark.parametrize("num_epochs", [None, 1])
def test_corrupt_padding_is_reported_once_at_the_position_where_it_is_a_sample(
    tiny_set, a_copy, num_epochs
):
    padded = padding_of(tiny_set)[0]
    damage(a_copy, "proprio.zarr.zip", key=padded)
    loader = make_loader(a_copy, num_epochs=num_epochs, max_bad_fraction=1.0)
    found = take(loader, loader.batches_per_epoch)
    assert padded not in {key for batch in found for key in batch["keys"]}
    assert [skip["key"] for skip in skipped_of(found)] == [padded]


def test_a_substitute_is_whole_and_counts_as_one_in_training(tiny_set, a_copy):
    key = damage(a_copy, "proprio.zarr.zip", row=2)
    good, loader = make_loader(tiny_set), make_loader(a_copy, max_bad_fraction=1.0)
    wholes = take(good, good.batches_per_epoch)
    clean, _ = by_key(wholes)
    for batch, whole in zip(take(loader, loader.batches_per_epoch), wholes, strict=True):
        assert torch.equal(batch["weight"], whole["weight"])
        for i, its_key in enumerate(batch["keys"]):
            assert its_key != key
            its_batch, row = clean[its_key]
            assert torch.equal(batch["inputs"]["touch"][i], its_batch["inputs"]["touch"][row])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_finite_pass_counts_each_good_sample_once_and_reports_each_corrupt_one_once(
    tiny_set, a_copy, num_workers
):
    """Half of the samples are corrupt, so that some substitutes are, too."""
    source = ShardSource(a_copy)
    locations = [
        p for p in tiny_sets.sample_locations(source) if not source.key(*p).startswith("dan")
    ]
    bad = {damage(a_copy, "proprio.zarr.zip", shard=s, row=r) for s, r in locations[::2]}
    loader = make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0, num_workers=num_workers)
    found = list(loader)
    assert sorted(skip["key"] for skip in skipped_of(found)) == sorted(bad)
    all_keys = {source.key(*p) for p in tiny_sets.sample_locations(source)}
    _, keys = by_key(found)
    assert sorted(keys) == sorted(all_keys - bad)


@pytest.mark.parametrize("fault", ["byte", "column", "index"])
def test_substitutes_are_the_same_for_any_number_of_workers(a_copy, fault):
    if fault == "byte":
        damage(a_copy, "text.tar")
    else:
        (a_copy / f"train-000001.{'index' if fault == 'index' else 'proprio.zarr.zip'}").unlink()
    options = {"max_bad_fraction": 1.0}
    alone = take(make_loader(a_copy, **options), 9)
    assert skipped_of(alone)
    assert_same(take(make_loader(a_copy, num_workers=2, **options), 9), alone)


@pytest.mark.parametrize("suffix", ["vision_left.tar", "dmel.zarr.zip", "index"])
def test_a_missing_file_costs_the_samples_of_its_shard(a_copy, suffix):
    (a_copy / f"train-000001.{suffix}").unlink()
    batches = list(make_loader(a_copy, num_epochs=1, max_bad_fraction=1.0))
    skipped = skipped_of(batches)
    assert {skip["shard"] for skip in skipped} == {"train-000001"}
    assert {skip["row"] for skip in skipped} <= set(range(4))
    assert {skip["file"] for skip in skipped} == {f"train-000001.{suffix}"}
    assert all(f"train-000001.{suffix}" in skip["error"] for skip in skipped)
    assert {skip["key"] == "?" for skip in skipped} == {suffix == "index"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_corrupt_samples_stop_the_run_with_one_plain_message(a_copy, num_workers):
    damage(a_copy, "dmel.zarr.zip")
    loader = make_loader(a_copy, num_workers=num_workers)  # 1 of 30: more than 2 of 200
    with pytest.raises(TooManyCorruptSamplesError, match="max_bad_fraction allows 0") as found:
        take(loader, 1000)
    message = str(found.value)
    assert message.startswith("3 of ")
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
    assert {skip["key"].partition("/")[0] for skip in skipped_of(batches)} == {"cat"}


def test_a_read_error_of_the_disk_is_a_corrupt_sample(tiny_set, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    source = ShardSource(tiny_set)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(CorruptError, match="can't be read: Input/output error"):
        source.read_into(0, 0, {}, with_text=True)
