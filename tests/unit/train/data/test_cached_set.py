"""Shard sets behind URLs give the batches of the local set.

Each file is downloaded once per machine, and only columns that are read.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from helpers import remote_sets
from helpers import sets as tiny_sets
from helpers.remote_sets import (
    QUICK,
    assert_same,
    copies,
    data_files,
    make_config,
    make_loader,
    read_all,
    url_of,
)
from helpers.sets import TEXT_HEADS

from shared import machine, storage
from shared.errors import ConfigError
from shared.shardset.manifest import MANIFEST_FILE, read_manifest
from train.__main__ import cli
from train.data import cache
from train.data.cached_set import CacheSettings, default_cache_dir
from train.data.loader import Loader, open_source
from train.data.shard_source import ShardSource

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]
USED = (".index", "vision_left.tar", "vision_right.tar", "_text.tar", ".zarr.zip")


# --- the batches of the local set ------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_behind_http_gives_the_local_batches(server, shards, settings, num_workers):
    expected = read_all(make_loader(shards))
    assert_same(read_all(make_loader(url_of(server), settings, num_workers=num_workers)), expected)
    assert sum(len(b["skipped"]) for b in expected) == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_behind_s3_gives_the_local_batches(s3, tiny_set, settings, num_workers):
    s3.gets.clear()
    loader = make_loader("s3://trained/set", settings, num_workers=num_workers)
    assert_same(read_all(loader), read_all(make_loader(tiny_set)))
    used = {name: count for name, count in s3.gets.items() if name.startswith("train")}
    assert set(used) <= data_files(tiny_set, suffixes=USED)
    assert set(used.values()) == {1}


def test_a_local_and_a_remote_set_are_the_same_data_to_a_checkpoint(server, shards, settings):
    local, remote = make_loader(shards), make_loader(url_of(server), settings)
    remote.load_state_dict(local.state_at(3))
    assert next(iter(remote))["index"] == 3


_READ = """
import json, sys
from pathlib import Path
from helpers.remote_sets import QUICK, make_loader
from train.data.cached_set import CacheSettings
settings = CacheSettings(folder=Path(sys.argv[2]), retry=QUICK)
if __name__ == "__main__":
    loader = make_loader(sys.argv[1], settings, num_workers=2)
    print(json.dumps([batch["keys"] for batch in loader]))
"""


@pytest.mark.slow
def test_two_processes_with_two_workers_each_download_every_file_once(server, shards, settings):
    command = [sys.executable, "-c", _READ, url_of(server), str(settings.folder)]
    tests = str(Path(remote_sets.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    keys = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert keys == [[b["keys"] for b in make_loader(shards)]] * 2
    assert server.gets.pop(MANIFEST_FILE) == 2
    assert set(server.gets) <= data_files(shards, suffixes=USED) | {"tokenizer.json"}
    assert set(server.gets) >= data_files(shards, suffixes=(".index", "proprio.zarr.zip"))
    assert set(server.gets.values()) == {1}


def test_text_only_training_downloads_only_text(server, shards, settings):
    loader = make_loader(url_of(server), settings, heads=TEXT_HEADS, num_workers=2)
    assert_same(read_all(loader), read_all(make_loader(shards, heads=TEXT_HEADS)))
    wanted = data_files(shards, suffixes=(".index", "_text.tar"))
    assert wanted >= set(server.gets) - {MANIFEST_FILE, "tokenizer.json"}


def test_a_second_run_downloads_only_the_manifest(server, settings):
    read_all(make_loader(url_of(server), settings))
    server.gets.clear()
    read_all(make_loader(url_of(server), settings))
    assert server.gets == {MANIFEST_FILE: 1}


def test_the_next_block_is_prefetched_while_the_current_one_is_read(
    server, shards, settings, monkeypatch, caplog
):
    # If a prefetch fails, the log says why.
    caplog.set_level(logging.DEBUG, logger="train.data.cached_set")
    # What is fetched ahead is given up after three answers that are late, on a busy machine too.
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 30.0)
    loader = make_loader(url_of(server), settings, batch_size=1)
    next(iter(loader))
    present_and_next = loader.order.order.shards_in_blocks(0, 0, 1)
    entries = read_manifest(shards).in_split("train")
    assert len(present_and_next) == 2 < len(entries)
    expected = {
        name
        for name in data_files(shards, suffixes=USED)
        if name.partition(".")[0] in {entries[i].name for i in present_and_next}
    }
    expected |= {MANIFEST_FILE, "tokenizer.json"}
    deadline_s = time.monotonic() + 60
    while set(server.gets) != expected and time.monotonic() < deadline_s:
        time.sleep(0.01)
    time.sleep(0.2)
    assert set(server.gets) == expected


def test_workers_forked_during_a_prefetch_continue_to_read(server, shards, settings):
    source = ShardSource(url_of(server), cache=settings)
    config = make_config(shards, batch_size=1)
    next(iter(Loader(source, config, num_epochs=1)))
    workers = Loader(source, make_config(shards, num_workers=2), num_epochs=1)
    assert_same(read_all(workers), read_all(make_loader(shards)))


@pytest.mark.parametrize("store", ["http", pytest.param("s3", marks=pytest.mark.slow)])
def test_downloads_in_workers_leave_the_parents_connections_alone(
    request, server, settings, store, monkeypatch, caplog
):
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 5.0)
    if store == "s3":
        request.getfixturevalue("s3")
    place = "s3://trained/set" if store == "s3" else url_of(server)
    for number in range(3):
        empty = CacheSettings(folder=settings.folder / str(number), retry=QUICK)
        read_all(make_loader(place, empty, num_workers=2))
    # asyncio is left out: it speaks of what the garbage of earlier tests had not closed.
    ours = ("shared", "train", "fsspec", "s3fs", "aiobotocore", "botocore", "aiohttp")
    assert [r for r in caplog.records if r.name.startswith(ours)] == []


def test_a_source_goes_to_another_process(server, shards, settings):
    source = ShardSource(url_of(server), cache=settings)
    config = make_config(shards)
    expected = read_all(Loader(source, config, num_epochs=1))
    other = ForkingPickler.loads(ForkingPickler.dumps(source))
    assert_same(read_all(Loader(other, config, num_epochs=1)), expected)


# --- a small cache ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_smaller_than_the_set_keeps_its_limit(server, shards, settings, num_workers):
    loader = make_loader(shards)
    sizes = {p.name: p.stat().st_size for p in shards.iterdir()}
    entries = read_manifest(shards).in_split("train")
    order = loader.order.order.shards_in_blocks(0, 0, 99)[: len(entries)]
    block = [sum(sizes[n] for n in sizes if n.startswith(entries[i].name)) for i in order]
    limit = max(sum(block[i : i + 2]) for i in range(len(block) - 1))
    assert limit < 0.8 * sum(block)
    small = CacheSettings(folder=settings.folder, limit_bytes=limit, retry=QUICK)
    remote = make_loader(url_of(server), small, num_workers=num_workers)
    most = 0
    batches = []
    for batch in remote:
        batches += copies([batch])
        with remote.source._store._cache.quota.exclusive():
            held = [p for p in settings.folder.iterdir() if not p.name.endswith((".lock", ".room"))]
            most = max(most, sum(size_of(p) for p in held))
    assert_same(batches, read_all(loader))
    assert limit / 2 < most <= limit


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_cache_smaller_than_a_shard_still_gives_every_sample(server, shards, settings):
    sizes = [(shards / name).stat().st_size for name in data_files(shards, suffixes=USED)]
    indexes = [(shards / name).stat().st_size for name in data_files(shards, suffixes=[".index"])]
    limit = max(sizes) + max(indexes)
    small = CacheSettings(folder=settings.folder, limit_bytes=limit, retry=QUICK)
    found = read_all(make_loader(url_of(server), small))
    assert_same(found, read_all(make_loader(shards)))


def test_a_cache_smaller_than_a_file_ends_the_run_by_a_clear_error(
    server, shards, settings, monkeypatch
):
    monkeypatch.setattr(cache, "SPACE_TIMEOUT_S", 0.1)
    limit = max((shards / name).stat().st_size for name in data_files(shards, suffixes=USED)) - 1
    small = CacheSettings(folder=settings.folder, limit_bytes=limit, retry=QUICK)
    with pytest.raises(ConfigError, match=r"data\.cache_gb"):
        read_all(make_loader(url_of(server), small))


# --- the configuration and the command -------------------------------------------------------


def test_the_default_cache_is_in_the_users_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/vr-creature/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/vr-creature/shards"


def test_without_a_home_folder_the_cache_is_a_temporary_one_and_that_is_said(
    monkeypatch, tmp_path, caplog
):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    machine.warn_once.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = tmp_path / f"cache-of-user-{os.getuid()}" / "vr-creature" / "shards"
    assert default_cache_dir() == expected
    (record,) = caplog.records
    assert "kept in " + str(expected.parents[1]) in record.getMessage()
    assert "fix: set data.cache_dir" in record.getMessage()


def test_a_local_set_needs_no_home_folder(tiny_set, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    config = tiny_sets.make_config(tiny_set)
    assert open_source(config, split="train").shard_sizes.sum() > 0


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("s3://bucket/set/", "s3://bucket/set"),
        ("https://host/set", "https://host/set"),
        ("shards/x", Path("shards/x")),
        ("file:///data/x", Path("/data/x")),
        (None, None),
    ],
)
def test_urls_stay_urls_and_paths_paths(written, kept):
    config = make_config(written)
    assert config.data.shards == kept
    again = type(config).model_validate(config.model_dump(mode="json"))
    assert again == config


def test_the_command_checks_a_configuration_of_a_set_behind_a_url(
    server, shards, settings, tmp_path
):
    config = make_config(url_of(server), cache_dir=settings.folder).model_dump(mode="json")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    result = CliRunner().invoke(cli, ["run", "--config", str(path), "--check"])
    assert result.exit_code == 0, result.output
    num_train = make_loader(shards, num_epochs=None).source.window_counts.sum()
    assert f"data: {num_train} train samples" in result.output
    assert "one forward and backward" in result.output


def test_the_command_names_a_missing_set(server, tmp_path, settings):
    config = make_config(f"{server.url}/none", cache_dir=settings.folder).model_dump(mode="json")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    result = CliRunner().invoke(cli, ["run", "--config", str(path)])
    assert result.exit_code == 1
    assert f"{server.url}/none: no such shard set" in result.output


def test_batches_of_a_resumed_run_are_those_of_the_local_set(server, shards, settings):
    loader = make_loader(url_of(server), settings, num_epochs=None)
    loader.load_state_dict(loader.state_at(5))
    local = make_loader(shards, num_epochs=None)
    assert_same(copies(itertools.islice(loader, 3)), copies(itertools.islice(local, 5, 8)))
