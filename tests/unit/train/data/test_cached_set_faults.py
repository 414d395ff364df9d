"""Remote shard sets with failing transfers, damage in store or cache, or changes during a run."""

from __future__ import annotations

import logging
import shutil
import threading

import fsspec
import pytest
import tblib.pickling_support
from helpers.faulty_server import FAULTS, first_time
from helpers.remote_sets import (
    SECRET,
    assert_same,
    data_files,
    make_loader,
    read_all,
    url_of,
)
from helpers.sets import TEXT_HEADS, flip_byte

from shared.errors import ConfigError, CorruptError, ShardError, StorageError
from shared.shardset.manifest import MANIFEST_FILE
from train.config import as_train_config
from train.data.shard_source import ShardSource

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]


# --- a line that fails -----------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "num_workers"), [*((f, 0) for f in FAULTS), ("mixed", 2)])
def test_transient_faults_change_no_batch(server, shards, settings, fault, num_workers):
    if fault == "mixed":
        server.plan = first_time
    else:
        # Nothing says of a manifest that a bit of it is wrong.
        files = {f"train-000000.{s}" for s in ("index", "audio.dmel.zarr.zip", "internal_text.tar")}
        files |= {"tokenizer.json", *([MANIFEST_FILE] if fault != "flip" else [])}
        server.plan = lambda name, before: fault if before == 0 and name in files else None
    found = read_all(make_loader(url_of(server), settings, num_workers=num_workers))
    assert_same(found, read_all(make_loader(shards)))
    assert [b["skipped"] for b in found] == [[]] * len(found)
    assert max(server.gets.values()) == 2
    assert not [p for p in settings.folder.iterdir() if p.suffix in {".lock", ".part"}]


@pytest.mark.parametrize("fault", ["stall", "reset", "503", "cut", "flip"])
def test_transient_faults_of_s3_change_no_batch(s3, tiny_set, settings, fault):
    s3.gets.clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            s3, "plan", lambda name, before: fault if before == 0 and "text" in name else None
        )
        patched.setattr("s3fs.S3FileSystem.read_timeout", 1)
        fsspec.filesystem("s3").clear_instance_cache()
        loader = make_loader("s3://trained/set", settings, heads=TEXT_HEADS)
        found = read_all(loader)
    assert_same(found, read_all(make_loader(tiny_set, heads=TEXT_HEADS)))
    assert [b["skipped"] for b in found] == [[]] * len(found)
    assert s3.gets["train-000000.internal_text.tar"] > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreachable_store_ends_the_run_without_substitutes(
    server, settings, num_workers, caplog
):
    loader = make_loader(url_of(server), settings, num_workers=num_workers)
    server.plan = lambda _name, _before: "503"
    with pytest.raises(StorageError, match=r"503.*given up after 6 attempts .* --resume auto"):
        read_all(loader)


def test_an_error_with_an_unpicklable_cause_leaves_a_loader_process(tiny_set, monkeypatch):
    """Once tblib is in the process, as distributed brings it, errors are pickled with causes."""
    tblib.pickling_support.install()

    def fail(*_args, **_options):
        raise StorageError("the store is gone") from ValueError(threading.Lock())

    monkeypatch.setattr(ShardSource, "read_into", fail)
    with pytest.raises(StorageError, match="the store is gone"):
        read_all(make_loader(tiny_set, num_workers=1))


def test_a_refused_request_is_not_retried(server, settings):
    loader = make_loader(url_of(server), settings)
    server.plan = lambda _name, _before: "403"
    with pytest.raises(StorageError, match="403"):
        read_all(loader)
    assert all(count <= 2 for count in server.gets.values())  # ahead, and when it was needed


def test_a_wrong_address_is_reported_at_once(server, settings):
    with pytest.raises(ShardError, match=rf"{server.url}/nothing: no such shard set"):
        ShardSource(f"{server.url}/nothing", cache=settings)
    assert server.gets[MANIFEST_FILE] == 1


def test_a_host_without_a_server_is_an_error_after_a_few_attempts(settings):
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9/set.* given up after 5 attempts"):
        ShardSource("http://127.0.0.1:9/set", cache=settings)


def test_no_message_has_passwords(server, settings, caplog):
    url = f"http://someone:{SECRET}@{url_of(server).removeprefix('http://')}"
    loader = make_loader(url_of(server), settings)
    loader.source = ShardSource(url, cache=settings)
    server.plan = lambda _name, _before: "500"
    with caplog.at_level(logging.DEBUG, logger="train"), pytest.raises(StorageError) as caught:
        ShardSource(url, cache=settings)
    assert "attempt" in caplog.text
    assert SECRET not in caplog.text + str(caught.value)


def test_a_configuration_holds_no_password():
    values = {"data": {"shards": f"https://me:{SECRET}@host/set"}}
    with pytest.raises(ConfigError, match="https://host/set has a password") as caught:
        as_train_config(values)
    assert SECRET not in str(caught.value)


# --- damage ----------------------------------------------------------------------------------


def first_member(shards, column, row=0):
    """File and place of a member in the middle."""
    source = ShardSource(shards)
    index = source.shard(0).index
    members = index.members(column)
    return shards / index.columns[column]["file"], int(members.offset[row]) + 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_in_the_store_loses_the_same_samples_as_in_a_local_set(
    server, shards, settings, num_workers
):
    flip_byte(*first_member(shards, "internal_text"))
    options = {"max_bad_fraction": 1.0}
    local = read_all(make_loader(shards, **options))
    damaged = {s["key"] for b in local for s in b["skipped"]}
    assert damaged == {make_loader(shards).source.key(0, 0)}
    options["num_workers"] = num_workers
    found = read_all(make_loader(url_of(server), settings, **options))
    assert_same(found, local)


def test_a_missing_remote_shard_is_substituted_like_a_local_one(server, shards, settings):
    (shards / "train-000000.audio.dmel.zarr.zip").unlink()
    options = {"max_bad_fraction": 1.0}
    local = read_all(make_loader(shards, **options))
    assert any(b["skipped"] for b in local)
    assert_same(read_all(make_loader(url_of(server), settings, **options)), local)
    assert (
        server.gets["train-000000.audio.dmel.zarr.zip"] <= 3
    )  # ahead, with its block, when needed


def test_a_damaged_remote_index_is_substituted_like_a_local_one(server, shards, settings):
    flip_byte(shards / "train-000000.index", 200)
    options = {"max_bad_fraction": 1.0}
    local = read_all(make_loader(shards, **options))
    assert any(b["skipped"] for b in local)
    assert_same(read_all(make_loader(url_of(server), settings, **options)), local)


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("internal_text.tar", "flipped"),
        ("index", "flipped"),
        ("audio.dmel.zarr.zip", "cut"),
        ("index", "cut"),
        ("internal_text.tar", "empty"),
        ("index", "empty"),
    ],
)
def test_damage_in_the_cache_is_detected_and_refetched(server, shards, settings, suffix, damage):
    expected = read_all(make_loader(url_of(server), settings))
    for path in settings.folder.glob(f"*.{suffix}"):
        content = path.read_bytes()
        wrong = {"flipped": bytes(b ^ 1 for b in content), "cut": content[:600], "empty": b""}
        path.write_bytes(wrong[damage])
    before = server.gets.copy()
    found = read_all(make_loader(url_of(server), settings))
    assert_same(found, expected)
    assert [b["skipped"] for b in found] == [[]] * len(found)
    again = {name for name, count in server.gets.items() if count == 2} - {MANIFEST_FILE}
    assert again
    assert again <= data_files(shards, suffixes=[suffix]) & set(before)


def test_a_set_updated_during_a_run_ends_it(server, shards, settings):
    loader = make_loader(url_of(server), settings)
    for path in shards.glob("*.index"):
        path.rename(path.with_suffix(".g1.index"))
    text = (shards / MANIFEST_FILE).read_text()
    (shards / MANIFEST_FILE).write_text(text.replace('"generation": 0', '"generation": 1'))
    with pytest.raises(StorageError, match="has been updated since this run read its manifest"):
        read_all(loader)


def test_a_set_removed_during_a_run_ends_it(server, shards, settings):
    loader = make_loader(url_of(server), settings)
    shutil.rmtree(shards)
    with pytest.raises(StorageError, match="has been removed since this run read its manifest"):
        read_all(loader)


def test_a_tokenizer_that_the_manifest_does_not_name_is_refused(server, shards, settings):
    flip_byte(shards / "tokenizer.json", 5)
    with pytest.raises(CorruptError, match=r"tokenizer.json: checksum differs"):
        ShardSource(url_of(server), cache=settings)
