"""The cache: complete files only, within its limit, downloaded once per machine."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import threading
import time

import pytest
from helpers.fakes import (
    QUICK,
    SIZE,
    MemoryStore,
    exit_code_of,
    make_cache,
    names_in,
    read,
    run_in_fork,
)

from shared import machine
from shared.errors import ConfigError, CorruptError, StorageError
from train.data import cache as cache_module
from train.data.cache import CachedFile, CacheFullError, ShardCache


@pytest.fixture
def store(tmp_path):
    return MemoryStore(tmp_path / "gets")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    machine.warn_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)


# --- without locks ------------------------------------------------------------------------------


def test_without_locks_files_are_cached_and_evicted_after_one_warning(
    store, folder, no_locks, caplog
):
    cache = make_cache(store, folder, num_files=2)
    for name in ("f1", "f2", "f3", "f3"):
        assert read(cache, store.file(name)) == store.contents[name]
    assert store.gets() == {"f1": 1, "f2": 1, "f3": 1}
    assert names_in(folder) == {"f2", "f3"}
    assert [r.getMessage().count("has no file locks") for r in caplog.records] == [1]


def test_without_locks_several_processes_get_whole_files(store, folder, no_locks):
    def download_all() -> None:
        cache = make_cache(store, folder, num_files=20)
        for number in range(20):
            name = f"f{number}"
            assert read(cache, store.file(name)) == store.contents[name]

    processes = [run_in_fork(download_all) for _ in range(4)]
    assert [exit_code_of(process) for process in processes] == [0] * 4
    assert names_in(folder) == {f"f{number}" for number in range(20)}


# --- downloads --------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_and_then_read_from_the_cache(store, folder):
    cache = make_cache(store, folder)
    for _ in range(3):
        assert read(cache, store.file("f1")) == store.contents["f1"]
    assert read(make_cache(store, folder), store.file("f1")) == store.contents["f1"]
    assert store.gets() == {"f1": 1}
    assert names_in(folder) == {"f1"}


def test_the_same_bytes_of_two_sets_are_downloaded_once(store, folder, tmp_path):
    other = MemoryStore(tmp_path / "other")
    read(make_cache(store, folder), store.file("f1"))
    assert read(make_cache(other, folder), other.file("f1")) == store.contents["f1"]
    assert other.gets() == {}


def test_other_bytes_under_the_same_name_are_another_file(store, folder):
    cache = make_cache(store, folder)
    old = store.contents["f1"]
    old_file = store.file("f1")
    read(cache, old_file)
    store.contents["f1"] = bytes(SIZE)
    assert read(cache, store.file("f1")) == bytes(SIZE)
    assert read(cache, old_file) == old


def fails_first(num, error=None, content=None):
    """Make a MemoryStore.on_fetch that fails at first."""
    times = iter(range(100))

    def on_fetch(_name, right, path):
        is_bad = next(times) < num
        if is_bad and error is not None:
            path.write_bytes(right[:10])
            raise error
        path.write_bytes(content(right) if is_bad else right)

    return on_fetch


@pytest.mark.parametrize(
    "on_fetch",
    [
        lambda: fails_first(3, error=StorageError("broken off", is_transient=True)),
        lambda: fails_first(1, content=lambda right: right[:-1]),
        lambda: fails_first(1, content=lambda right: right + b"x"),
        lambda: fails_first(1, content=lambda right: bytes([right[0] ^ 1]) + right[1:]),
        lambda: fails_first(1, content=lambda _: b""),
    ],
    ids=["error", "short", "long", "flip", "empty"],
)
def test_a_transient_failure_is_retried_and_logged_once(store, folder, caplog, on_fetch):
    store.on_fetch = on_fetch()
    assert read(make_cache(store, folder), store.file("f1")) == store.contents["f1"]
    retries = [r for r in caplog.records if "attempt" in r.getMessage()]
    assert len(retries) == store.gets()["f1"] - 1
    assert names_in(folder) == {"f1"}


def test_a_lasting_failure_is_an_error_and_leaves_no_file(store, folder):
    store.on_fetch = fails_first(99, error=StorageError("broken off", is_transient=True))
    with pytest.raises(StorageError, match="broken off; given up after 4 attempts"):
        make_cache(store, folder).open(store.file("f1"))
    assert store.gets() == {"f1": 4}
    assert names_in(folder) == set()


def test_a_permanent_error_is_not_retried(store, folder):
    store.on_fetch = fails_first(99, error=StorageError("not allowed"))
    with pytest.raises(StorageError, match="not allowed"):
        make_cache(store, folder).open(store.file("f1"))
    assert store.gets() == {"f1": 1}


def test_a_missing_file_is_not_retried(store, folder):
    with pytest.raises(FileNotFoundError):
        make_cache(store, folder).open(CachedFile("none", "0" * 64, 1))
    assert store.gets() == {"none": 1}
    assert names_in(folder) == set()


def test_the_same_wrong_bytes_twice_are_kept(store, folder, caplog):
    wrong = bytes(SIZE)
    store.on_fetch = lambda _name, _content, path: path.write_bytes(wrong)
    assert read(make_cache(store, folder), store.file("f1")) == wrong
    assert store.gets() == {"f1": 2}
    assert "damaged in the store" in caplog.text


def test_the_same_wrong_length_twice_is_corrupt(store, folder):
    store.on_fetch = lambda _name, content, path: path.write_bytes(content[:-1])
    with pytest.raises(CorruptError, match=r"999 bytes .* not 1000 .* damaged in the store"):
        make_cache(store, folder).open(store.file("f1"))
    assert store.gets() == {"f1": 2}


def test_different_wrong_bytes_each_time_are_a_storage_error(store, folder):
    store.on_fetch = lambda _name, content, path: path.write_bytes(os.urandom(len(content)))
    with pytest.raises(StorageError, match="given up after 4 attempts"):
        make_cache(store, folder).open(store.file("f1"))


def test_a_full_disk_is_named_with_the_keys_that_fix_it(store, folder):
    full = StorageError("x")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    store.on_fetch = fails_first(99, error=full)
    with pytest.raises(StorageError, match=r"disk is full; fix: lower data\.cache_gb, or set"):
        make_cache(store, folder).open(store.file("f1"))


@pytest.mark.parametrize("sha256", ["../../etc/passwd", "", None, "A" * 64, "0" * 63])
def test_an_invalid_checksum_is_refused(sha256):
    with pytest.raises(CorruptError, match="is not a checksum"):
        CachedFile("f1", sha256)


def test_a_folder_that_can_not_be_created_names_the_key(store, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data\.cache_dir is .*file/cache: Not a directory"):
        make_cache(store, tmp_path / "file" / "cache")


# --- damage on the disk ----------------------------------------------------------------------


def test_a_damaged_file_is_refetched_once(store, folder):
    cache, file = make_cache(store, folder), store.file("f1")
    read(cache, file)
    cache.path(file).write_bytes(bytes(SIZE))
    assert cache.refetch(file)
    assert read(cache, file) == store.contents["f1"]
    assert store.gets() == {"f1": 2}
    assert not cache.refetch(file)


def test_a_file_that_another_process_refetched_is_not_downloaded_again(store, folder):
    cache, other, file = make_cache(store, folder), make_cache(store, folder), store.file("f1")
    read(cache, file)
    cache.path(file).write_bytes(bytes(SIZE))
    assert cache.refetch(file)
    assert other.refetch(file)
    assert store.gets() == {"f1": 2}


def test_a_folder_that_was_removed_is_filled_again(store, folder):
    cache = make_cache(store, folder)
    read(cache, store.file("f1"))
    shutil.rmtree(folder)
    assert read(cache, store.file("f1")) == store.contents["f1"]


def test_a_folder_removed_during_a_download_is_not_a_missing_file(store, folder):
    def remove(_name, content, path):
        path.write_bytes(content)
        shutil.rmtree(folder)

    store.on_fetch = remove
    with pytest.raises(StorageError, match="was removed while it was used"):
        make_cache(store, folder).open(store.file("f1"))


# --- the limit -------------------------------------------------------------------------------


def test_the_least_recently_used_file_is_evicted_first(store, folder):
    cache = make_cache(store, folder, num_files=3)
    for name in ("f1", "f2", "f3", "f1", "f4"):
        read(cache, store.file(name))
    assert names_in(folder) == {"f1", "f3", "f4"}


@pytest.mark.parametrize("is_there_before", [False, True])
def test_a_file_that_any_process_has_open_is_not_evicted(store, folder, is_there_before):
    cache = make_cache(store, folder, num_files=3)
    if is_there_before:
        for name in ("f1", "f2"):
            read(cache, store.file(name))
    own = cache.open(store.file("f1"))
    ready, ready_now = os.pipe()

    def hold():
        make_cache(store, folder, num_files=3).open(store.file("f2"))
        os.write(ready_now, b"x")
        time.sleep(60)

    child = run_in_fork(hold)
    os.read(ready, 1)
    for name in ("f3", "f4", "f5", "f3"):
        read(cache, store.file(name))
    assert names_in(folder) == {"f1", "f2", "f3"}
    os.kill(child, signal.SIGKILL)
    exit_code_of(child)
    os.close(own)
    for name in ("f4", "f5", "f6"):
        read(cache, store.file(name))
    assert names_in(folder) == {"f4", "f5", "f6"}


def test_a_reader_evicts_its_own_files_from_a_full_cache(store, folder):
    cache = make_cache(store, folder, num_files=2)
    held = [cache.open(store.file("f1")), cache.open(store.file("f2"))]

    def evict():
        if not held:
            return False
        os.close(held.pop(0))
        return True

    assert read(cache, store.file("f3"), evict=evict) == store.contents["f3"]
    assert names_in(folder) == {"f2", "f3"}
    os.close(held.pop())


def test_a_cache_that_stays_full_is_an_error_that_names_the_key(store, folder, monkeypatch):
    monkeypatch.setattr(cache_module, "SPACE_TIMEOUT_S", 0.1)
    cache = make_cache(store, folder, num_files=1)
    held = cache.open(store.file("f1"))
    with pytest.raises(ConfigError, match=r"no space for f2: .* raise data\.cache_gb"):
        cache.open(store.file("f2"))
    os.close(held)
    assert names_in(folder) == {"f1"}


def test_a_reader_waits_for_others_to_close_files(store, folder):
    cache = make_cache(store, folder, num_files=1)
    held = cache.open(store.file("f1"))
    timer = threading.Timer(0.3, os.close, [held])
    timer.start()
    assert read(cache, store.file("f2")) == store.contents["f2"]
    timer.join()


@pytest.mark.parametrize("is_length_known", [True, False])
def test_a_file_larger_than_the_limit_is_an_error_that_names_the_key(
    store, folder, is_length_known
):
    cache = ShardCache(store, folder, limit_bytes=SIZE - 1, retry=QUICK)
    file = store.file("f1")
    if not is_length_known:
        file = CachedFile(file.name, file.sha256)
    with pytest.raises(ConfigError, match=r"f1 has 1e-06 GB, data\.cache_gb allows"):
        cache.open(file)
    assert names_in(folder) == set()


def test_files_of_unknown_length_keep_the_limit_too(store, folder):
    cache = make_cache(store, folder, num_files=2)
    for name in ("f1", "f2", "f3"):
        read(cache, CachedFile(name, store.file(name).sha256))
    assert names_in(folder) == {"f2", "f3"}


def test_a_lower_limit_holds_from_the_next_start(store, folder):
    cache = make_cache(store, folder, num_files=5)
    for i in range(5):
        read(cache, store.file(f"f{i}"))
    make_cache(store, folder, num_files=2)
    assert names_in(folder) == {"f3", "f4"}


def test_a_prefetch_evicts_nothing_that_was_used_since(store, folder):
    cache = make_cache(store, folder, num_files=3)
    read(cache, store.file("f1"))
    since_ns = time.time_ns()
    for name in ("f2", "f3", "f4"):
        cache.prefetch(store.file(name), since_ns=since_ns)
    with pytest.raises(CacheFullError):
        cache.prefetch(store.file("f5"), since_ns=since_ns)
    assert names_in(folder) == {"f2", "f3", "f4"}


def test_the_log_names_the_file_and_the_attempt(store, folder, caplog):
    store.on_fetch = fails_first(1, error=StorageError("f1: broken off", is_transient=True))
    with caplog.at_level(logging.WARNING):
        read(make_cache(store, folder), store.file("f1"))
    (record,) = caplog.records
    assert record.getMessage().startswith("f1: broken off; attempt 2 of 4 in 0.0")
