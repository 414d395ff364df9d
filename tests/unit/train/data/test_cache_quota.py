"""The quota of a cache: the sum that replaces a scan of the folder, and what corrects it."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.fakes import SIZE, MemoryStore, make_cache, names_in, read, sum_in

from shared.errors import StorageError
from train.data.cache import CachedFile, CacheFullError
from train.data.cache_quota import DiskQuota


@pytest.fixture
def store(tmp_path):
    return MemoryStore(tmp_path / "gets")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def scans(monkeypatch):
    """One entry per scan of a folder from now on."""
    seen, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or scandir(path))
    return seen


def fill(folder, number, *, size=0):
    """Create files that were used long ago, the first one longest."""
    folder.mkdir(exist_ok=True)
    for i in range(number):
        path = folder / f"{i:032x}.old{i}"
        path.touch()
        os.truncate(path, size)
        os.utime(path, (i, i))


# --- how often the folder is scanned -----------------------------------------------------


def test_a_file_that_fits_is_downloaded_without_a_scan(store, folder, scans):
    fill(folder, 1000)
    cache = make_cache(store, folder, num_files=20)
    assert len(scans) == 1
    for i in range(20):
        read(cache, store.file(f"f{i}"))
    cache.prefetch(store.file("f3"), since_ns=0)
    assert len(scans) == 1
    assert sum_in(folder) == 20 * SIZE


@pytest.mark.parametrize("is_length_known", [True, False])
def test_a_full_folder_is_scanned_once_for_many_files(store, folder, scans, is_length_known):
    fill(folder, 400, size=SIZE)
    cache = make_cache(store, folder, num_files=400)
    for i in range(20):
        file = store.file(f"f{i}")
        read(cache, file if is_length_known else CachedFile(file.name, file.sha256))
        assert size_of_all(folder) == sum_in(folder) <= 400 * SIZE
    assert len(scans) == 2
    assert names_in(folder) == {f"old{i}" for i in range(21, 400)} | {f"f{i}" for i in range(20)}


def size_of_all(folder):
    return sum(p.stat().st_size for p in folder.iterdir() if p.name != ".room")


def test_an_eviction_stops_at_its_share_of_the_limit(store, folder):
    fill(folder, 40, size=SIZE)
    read(make_cache(store, folder, num_files=40), store.file("f1"))
    assert names_in(folder) == {f"old{i}" for i in range(3, 40)} | {"f1"}  # 38 of 40


def test_a_prefetch_evicts_more_but_nothing_that_was_used_since(store, folder):
    fill(folder, 40, size=SIZE)
    cache = make_cache(store, folder, num_files=40)
    cache.prefetch(store.file("f1"), since_ns=2 * 10**9)
    assert names_in(folder) == {f"old{i}" for i in range(2, 40)} | {"f1"}


# --- the sum ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"x" * 20, bytes(20), b"1" * 20, b"0" * 19, b"-" + b"1" * 19]
)
def test_an_unreadable_or_too_large_sum_is_corrected_by_a_scan(store, folder, scans, content):
    cache = make_cache(store, folder, num_files=3)
    for name in ("f1", "f2"):
        read(cache, store.file(name))
    scans.clear()
    (folder / ".room").write_bytes(content)
    read(cache, store.file("f3"))
    assert len(scans) == 1
    assert (names_in(folder), sum_in(folder)) == ({"f1", "f2", "f3"}, 3 * SIZE)
    read(cache, store.file("f4"))
    assert names_in(folder) == {"f2", "f3", "f4"}


def test_a_sum_that_is_too_small_is_corrected_when_the_cache_is_opened(store, folder):
    make_cache(store, folder)
    fill(folder, 7, size=SIZE)  # put there by hand
    assert sum_in(folder) == 0
    make_cache(store, folder)
    assert sum_in(folder) == 7 * SIZE


def test_space_of_files_removed_by_hand_is_used_when_it_is_needed(store, folder):
    cache = make_cache(store, folder, num_files=3)
    for name in ("f1", "f2", "f3"):
        read(cache, store.file(name))
    cache.path(store.file("f3")).unlink()
    read(cache, store.file("f4"))
    assert names_in(folder) == {"f1", "f2", "f4"}
    assert sum_in(folder) == 3 * SIZE


def test_space_of_failed_and_refetched_files_is_released(store, folder):
    cache = make_cache(store, folder)
    read(cache, store.file("f1"))
    put, store.on_fetch = store.on_fetch, fail
    for ask in (cache.open, lambda file: cache.prefetch(file, since_ns=0)):
        with pytest.raises(StorageError):
            ask(store.file("f2"))
        assert sum_in(folder) == SIZE
    store.on_fetch = put
    cache.path(store.file("f1")).write_bytes(bytes(SIZE))
    assert cache.refetch(store.file("f1"))
    assert sum_in(folder) == SIZE


def fail(_name, _content, path):
    path.write_bytes(b"half")
    raise StorageError("gone")


def test_a_failed_reservation_leaves_the_sum_unchanged(store, folder):
    cache = make_cache(store, folder, num_files=1)
    held = cache.open(store.file("f1"))
    with pytest.raises(CacheFullError):
        cache.open(store.file("f2"), evict=None)
    os.close(held)
    assert (names_in(folder), sum_in(folder)) == ({"f1"}, SIZE)


class Killed(BaseException):
    """Stands for a kill: the cache does not catch it, and no clean-up succeeds."""


@pytest.mark.parametrize("seed", range(10))
def test_a_kill_at_any_point_never_leaves_too_small_a_sum(store, folder, monkeypatch, seed):
    chance = random.Random(seed)
    make_cache(store, folder, num_files=4)
    cache = make_cache(store, folder.parent / "other", num_files=4)
    cache.folder, cache.quota = folder, DiskQuota(folder, 4 * SIZE)  # opening would correct the sum
    for _ in range(20):
        with monkeypatch.context() as patched:
            die_before_change(patched, number=chance.randrange(12))
            with suppress(Killed):
                read(cache, store.file(f"f{chance.randrange(8)}"))
        held = sum(p.stat().st_size for p in folder.iterdir() if not p.name.startswith("."))
        aside = sum(p.stat().st_size for p in folder.glob(".*.lock"))
        assert held + aside <= sum_in(folder)
        assert held <= 4 * SIZE
    make_cache(store, folder, num_files=4)
    assert sum_in(folder) == SIZE * len(names_in(folder))


def die_before_change(patched, *, number):
    """From the n-th change of a file on, this process changes no file."""
    left = [number]

    def dying(change):
        def or_die(*given, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(*given, **named)

        return or_die

    for name in ("pwrite", "ftruncate"):
        patched.setattr(os, name, dying(getattr(os, name)))
    for name in ("rename", "unlink"):
        patched.setattr(Path, name, dying(getattr(Path, name)))
