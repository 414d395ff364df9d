"""Shard sets behind URLs: the batches of the local set, whatever the line does; each file fetched
once per machine; only the columns that are read.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import fsspec
import pytest
import tblib.pickling_support
import tiny_sets
import torch
import yaml
from click.testing import CliRunner
from faulty_server import FAULTS, FaultyServer, first_time
from tiny_sets import TEXT_HEADS, flip_byte, make_config

from shared import storage
from shared.errors import ConfigError, CorruptError, ShardError, StorageError
from shared.manifest import MANIFEST_FILE, read_manifest
from shared.storage import Patience
from train import cache
from train.__main__ import cli
from train.config import as_train_config
from train.loader import Loader
from train.reader import ShardSource
from train.remote import CacheSettings, default_cache_dir

QUICK = Patience(attempts=6, first_wait_s=0.01, longest_wait_s=0.05)
SECRET = "do-not-print-me"

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 0.5)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shards(tiny_set, tmp_path):
    """A set to serve and to change."""
    return tiny_sets.copy_set(tiny_set, tmp_path / "set")


@pytest.fixture
def server(shards):
    with FaultyServer(shards.parent) as running:
        yield running


@pytest.fixture
def settings(tmp_path):
    return CacheSettings(folder=tmp_path / "cache", patience=QUICK)


@pytest.fixture(scope="module")
def s3(tiny_set):
    """moto's server with the set in s3://trained/set, behind a server that counts; that one."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with (
        pytest.MonkeyPatch.context() as patched,
        FaultyServer(upstream=moto.get_host_and_port()) as counting,
    ):
        patched.setenv("AWS_ACCESS_KEY_ID", "someone")
        patched.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        host, port = moto.get_host_and_port()
        fs = fsspec.filesystem("s3", endpoint_url=f"http://{host}:{port}")
        fs.mkdir("trained")
        for path in tiny_set.iterdir():
            fs.pipe_file(f"trained/set/{path.name}", path.read_bytes())
        patched.setenv("AWS_ENDPOINT_URL", counting.url)
        type(fs).clear_instance_cache()  # other tests' file systems know other servers
        yield counting
    moto.stop()


def url_of(server):
    return f"{server.url}/set"


def make_loader(place, settings=None, *, num_epochs=1, **options):
    return Loader(
        ShardSource(place, cache=settings), make_config(place, **options), num_epochs=num_epochs
    )


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        for name in ("keys", "index", "epoch"):
            assert one[name] == other[name]
        assert [s["key"] for s in one["skipped"]] == [s["key"] for s in other["skipped"]]
        for group in ("inputs", "targets"):
            for name, tensor in one[group].items():
                assert torch.equal(tensor, other[group][name]), name


def copies(batches):
    """Batches that outlive the loader's memory."""
    return [
        {
            **batch,
            **{g: {n: t.clone() for n, t in batch[g].items()} for g in ("inputs", "targets")},
        }
        for batch in batches
    ]


def read_all(loader):
    return copies(loader)


def data_files(shards, *, split="train", suffixes=("",)):
    """Names of indexes and columns of a split."""
    names = [e.name for e in read_manifest(shards).in_split(split)]
    return {
        p.name
        for p in shards.iterdir()
        if p.name.partition(".")[0] in names and p.name.endswith(tuple(suffixes))
    }


USED = (".index", "vision_left.tar", "vision_right.tar", "text.tar", ".zarr.zip")

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
sys.path.insert(0, sys.argv[1])
from test_remote import *
settings = CacheSettings(folder=Path(sys.argv[3]), patience=QUICK)
if __name__ == "__main__":
    loader = make_loader(sys.argv[2], settings, num_workers=2)
    print(json.dumps([batch["keys"] for batch in loader]))
"""


def test_two_processes_with_two_workers_each_fetch_every_file_once(server, shards, settings):
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", _READ, str(here), url_of(server), str(settings.folder)]
    environment = {**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
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


def test_text_only_training_fetches_only_text(server, shards, settings):
    loader = make_loader(url_of(server), settings, heads=TEXT_HEADS, num_workers=2)
    assert_same(read_all(loader), read_all(make_loader(shards, heads=TEXT_HEADS)))
    wanted = data_files(shards, suffixes=(".index", "text.tar"))
    assert wanted >= set(server.gets) - {MANIFEST_FILE, "tokenizer.json"}


def test_a_second_run_fetches_only_the_manifest(server, settings):
    read_all(make_loader(url_of(server), settings))
    server.gets.clear()
    read_all(make_loader(url_of(server), settings))
    assert server.gets == {MANIFEST_FILE: 1}


def test_the_next_block_is_fetched_while_the_present_one_is_read(
    server, shards, settings, monkeypatch, caplog
):
    caplog.set_level(logging.DEBUG, logger="train.remote")  # says what was given up, and why
    # What is fetched ahead is given up after three answers that are late, on a busy machine too.
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 30.0)
    loader = make_loader(url_of(server), settings, batch_size=1)
    next(iter(loader))
    present_and_next = loader.order.order.shards_of(0, 0, 1)
    entries = read_manifest(shards).in_split("train")
    assert len(present_and_next) == 4 < len(entries)
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


def test_workers_forked_while_files_are_fetched_ahead_read_on(server, shards, settings):
    source = ShardSource(url_of(server), cache=settings)
    config = make_config(shards, batch_size=1)
    next(iter(Loader(source, config, num_epochs=1)))
    workers = Loader(source, make_config(shards, num_workers=2), num_epochs=1)
    assert_same(read_all(workers), read_all(make_loader(shards)))


@pytest.mark.parametrize("store", ["http", "s3"])
def test_workers_that_fetch_leave_the_parents_connections_alone(
    request, server, settings, store, monkeypatch, caplog
):
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 5.0)
    if store == "s3":
        request.getfixturevalue("s3")
    place = "s3://trained/set" if store == "s3" else url_of(server)
    for _ in range(3):
        read_all(make_loader(place, settings, num_workers=2))
        shutil.rmtree(settings.folder, ignore_errors=True)  # a file may still be on its way
    retries = [r for r in caplog.records if r.name.startswith(("shared", "train"))]
    assert retries == []


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
    order = loader.order.order.shards_of(0, 0, 99)[: len(entries)]
    block = [sum(sizes[n] for n in sizes if n.startswith(entries[i].name)) for i in order]
    limit = max(sum(block[i : i + 4]) for i in range(len(block) - 3))
    assert limit < 0.8 * sum(block)
    small = CacheSettings(folder=settings.folder, limit_bytes=limit, patience=QUICK)
    remote = make_loader(url_of(server), small, num_workers=num_workers)
    most = 0
    batches = []
    for batch in remote:
        batches += copies([batch])
        with remote.source._files._cache._looking_over():
            held = [p for p in settings.folder.iterdir() if not p.name.endswith(".lock")]
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
    small = CacheSettings(folder=settings.folder, limit_bytes=limit, patience=QUICK)
    found = read_all(make_loader(url_of(server), small))
    assert_same(found, read_all(make_loader(shards)))


def test_a_cache_smaller_than_a_file_ends_the_run_by_a_clear_error(
    server, shards, settings, monkeypatch
):
    monkeypatch.setattr(cache, "ROOM_PATIENCE_S", 0.1)
    limit = max((shards / name).stat().st_size for name in data_files(shards, suffixes=USED)) - 1
    small = CacheSettings(folder=settings.folder, limit_bytes=limit, patience=QUICK)
    with pytest.raises(ConfigError, match=r"data\.cache_gb"):
        read_all(make_loader(url_of(server), small))


# --- a line that fails -----------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "num_workers"), [*((f, 0) for f in FAULTS), ("mixed", 2)])
def test_faults_that_pass_change_no_batch(server, shards, settings, fault, num_workers):
    if fault == "mixed":
        server.plan = first_time
    else:
        # Nothing says of a manifest that a bit of it is wrong.
        files = {f"train-000000.{s}" for s in ("index", "dmel.zarr.zip", "text.tar")}
        files |= {"tokenizer.json", *([MANIFEST_FILE] if fault != "flip" else [])}
        server.plan = lambda name, before: fault if before == 0 and name in files else None
    found = read_all(make_loader(url_of(server), settings, num_workers=num_workers))
    assert_same(found, read_all(make_loader(shards)))
    assert [b["skipped"] for b in found] == [[]] * len(found)
    assert max(server.gets.values()) == 2
    assert not [p for p in settings.folder.iterdir() if p.suffix in {".lock", ".part"}]


@pytest.mark.parametrize("fault", ["stall", "reset", "503", "cut", "flip"])
def test_faults_between_here_and_s3_change_no_batch(s3, tiny_set, settings, fault):
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
    assert s3.gets["train-000000.text.tar"] > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_that_is_gone_ends_the_run_and_replaces_nothing(
    server, settings, num_workers, caplog
):
    loader = make_loader(url_of(server), settings, num_workers=num_workers)
    server.plan = lambda _name, _before: "503"
    with pytest.raises(StorageError, match=r"503.*given up after 6 attempts .* --resume auto"):
        read_all(loader)


def test_an_error_whose_cause_can_not_be_sent_comes_out_of_a_loader_process(tiny_set, monkeypatch):
    """Once tblib is in the process, as distributed brings it, errors are pickled with causes."""
    tblib.pickling_support.install()

    def fail(*_args, **_options):
        raise StorageError("the store is gone") from ValueError(threading.Lock())

    monkeypatch.setattr(ShardSource, "read_into", fail)
    with pytest.raises(StorageError, match="the store is gone"):
        read_all(make_loader(tiny_set, num_workers=1))


def test_a_store_that_refuses_is_not_asked_again(server, settings):
    loader = make_loader(url_of(server), settings)
    server.plan = lambda _name, _before: "403"
    with pytest.raises(StorageError, match="403"):
        read_all(loader)
    assert all(count <= 2 for count in server.gets.values())  # ahead, and when it was needed


def test_a_wrong_address_is_said_at_once(server, settings):
    with pytest.raises(ShardError, match=rf"{server.url}/nothing: no such shard set"):
        ShardSource(f"{server.url}/nothing", cache=settings)
    assert server.gets[MANIFEST_FILE] == 1


def test_a_host_without_a_server_is_an_error_after_a_few_attempts(settings):
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9/set.* given up after 5 attempts"):
        ShardSource("http://127.0.0.1:9/set", cache=settings)


def test_passwords_are_in_no_message(server, settings, caplog):
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
    with pytest.raises(ConfigError, match=r"data\.shards: https://host/set: .* no pass") as caught:
        as_train_config(values)
    assert SECRET not in str(caught.value)


# --- damage ----------------------------------------------------------------------------------


def first_member(shards, column, row=0):
    """File and place of a member in the middle."""
    source = ShardSource(shards)
    index = source.shard(0).index
    members = index.members(column)
    return shards / index.facts["columns"][column]["file"], int(members.offset[row]) + 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_in_the_store_costs_the_samples_that_it_costs_a_local_set(
    server, shards, settings, num_workers
):
    flip_byte(*first_member(shards, "text"))
    options = {"max_bad_fraction": 1.0}
    local = read_all(make_loader(shards, **options))
    damaged = {s["key"] for b in local for s in b["skipped"]}
    assert damaged == {ShardSource(shards).key(0, 0)}
    options["num_workers"] = num_workers
    found = read_all(make_loader(url_of(server), settings, **options))
    assert_same(found, local)


def test_a_shard_that_the_store_has_lost_is_substituted_as_a_local_one(server, shards, settings):
    (shards / "train-000000.dmel.zarr.zip").unlink()
    options = {"max_bad_fraction": 1.0}
    local = read_all(make_loader(shards, **options))
    assert any(b["skipped"] for b in local)
    assert_same(read_all(make_loader(url_of(server), settings, **options)), local)
    assert server.gets["train-000000.dmel.zarr.zip"] <= 3  # ahead, with its block, when needed


def test_a_damaged_index_in_the_store_is_substituted_as_a_local_one(server, shards, settings):
    flip_byte(shards / "train-000000.index", 200)
    options = {"max_bad_fraction": 1.0}
    local = read_all(make_loader(shards, **options))
    assert any(b["skipped"] for b in local)
    assert_same(read_all(make_loader(url_of(server), settings, **options)), local)


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("text.tar", "flipped"),
        ("index", "flipped"),
        ("dmel.zarr.zip", "cut"),
        ("index", "cut"),
        ("text.tar", "empty"),
        ("index", "empty"),
    ],
)
def test_damage_on_the_disk_of_the_cache_is_seen_and_fetched_again(
    server, shards, settings, suffix, damage
):
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


def test_a_set_that_was_updated_meanwhile_ends_the_run(server, shards, settings):
    loader = make_loader(url_of(server), settings)
    for path in shards.glob("*.index"):
        path.rename(path.with_suffix(".g1.index"))
    text = (shards / MANIFEST_FILE).read_text()
    (shards / MANIFEST_FILE).write_text(text.replace('"generation": 0', '"generation": 1'))
    with pytest.raises(StorageError, match="has been updated since this run read its manifest"):
        read_all(loader)


def test_a_set_that_was_removed_meanwhile_ends_the_run(server, shards, settings):
    loader = make_loader(url_of(server), settings)
    shutil.rmtree(shards)
    with pytest.raises(StorageError, match="has been removed since this run read its manifest"):
        read_all(loader)


def test_a_tokenizer_that_is_not_the_manifests_is_refused(server, shards, settings):
    flip_byte(shards / "tokenizer.json", 5)
    with pytest.raises(CorruptError, match=r"tokenizer.json: checksum differs"):
        ShardSource(url_of(server), cache=settings)


# --- the configuration and the command -------------------------------------------------------


def test_the_cache_lies_where_the_users_caches_lie(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/vr-creature/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/vr-creature/shards"


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
    num_train = read_manifest(shards).num_samples("train")
    assert f"data: {num_train} train samples" in result.output
    assert "one forward and backward" in result.output


def test_the_command_says_where_no_set_is(server, tmp_path, settings):
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
