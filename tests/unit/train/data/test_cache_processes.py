"""A cache that several processes share: one download for all, kills, forks, one limit."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import threading
import time

import pytest
from helpers.fakes import (
    SIZE,
    MemoryStore,
    exit_code_of,
    make_cache,
    names_in,
    read,
    run_in_fork,
    sum_in,
)

from train.data import cache as cache_module
from train.data import cache_quota


@pytest.fixture
def store(tmp_path):
    return MemoryStore(tmp_path / "gets")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def wait_until(true):
    deadline_s = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_many_processes_download_a_file_once(store, folder):
    def slowly(_name, content, path):
        time.sleep(0.2)
        path.write_bytes(content)

    store.on_fetch = slowly
    children = [
        run_in_fork(lambda: check_read(make_cache(store, folder), store, "f1")) for _ in range(6)
    ]
    assert [exit_code_of(child) for child in children] == [0] * 6
    assert store.gets() == {"f1": 1}
    assert names_in(folder) == {"f1"}


def check_read(cache, store, name):
    assert read(cache, store.file(name)) == store.contents[name]


def test_downloads_do_not_wait_for_each_other(store, folder):
    def stuck(name, content, path):
        path.write_bytes(content)
        if name == "f1":
            time.sleep(60)

    store.on_fetch = stuck
    child = run_in_fork(lambda: make_cache(store, folder).open(store.file("f1")))
    wait_until(lambda: store.gets()["f1"] == 1)
    begin_s = time.monotonic()
    cache = make_cache(store, folder)
    check_read(cache, store, "f2")
    cache.prefetch(store.file("f1"), since_ns=0)
    assert time.monotonic() - begin_s < 10
    assert store.gets() == {"f1": 1, "f2": 1}
    os.kill(child, signal.SIGKILL)
    exit_code_of(child)


@pytest.mark.parametrize("next_file", ["f1", "f2"])
def test_the_next_user_removes_a_killed_download(store, folder, next_file):
    def half(_name, content, path):
        path.write_bytes(content[: SIZE // 2])
        time.sleep(60)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "on_fetch", half)
        child = run_in_fork(lambda: make_cache(store, folder).open(store.file("f1")))
        wait_until(lambda: folder.exists() and any(".part" in n for n in names_in(folder)))
    os.kill(child, signal.SIGKILL)
    assert exit_code_of(child) == -signal.SIGKILL
    check_read(make_cache(store, folder), store, next_file)
    assert names_in(folder) == {next_file}


def test_a_waiting_process_takes_over_from_a_killed_download(store, folder):
    def half(_name, content, path):
        path.write_bytes(content[: SIZE // 2])
        time.sleep(60)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "on_fetch", half)
        child = run_in_fork(lambda: make_cache(store, folder).open(store.file("f1")))
        wait_until(lambda: folder.exists() and any(".part" in n for n in names_in(folder)))
    waiting = run_in_fork(lambda: check_read(make_cache(store, folder), store, "f1"))
    time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    exit_code_of(child)
    assert exit_code_of(waiting) == 0
    assert names_in(folder) == {"f1"}


def test_a_fork_during_a_change_leaves_no_lock_behind(store, folder):
    cache = make_cache(store, folder)
    with cache.quota.exclusive():
        child = run_in_fork(lambda: time.sleep(60))
    descriptor = os.open(folder / ".room", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
    os.kill(child, signal.SIGKILL)
    exit_code_of(child)


def test_a_file_evicted_while_it_is_opened_is_downloaded_again(store, folder, monkeypatch):
    cache, file = make_cache(store, folder), store.file("f1")
    read(cache, file)
    lock = fcntl.flock

    def remove_first(descriptor, how):
        if how == fcntl.LOCK_SH and store.gets()["f1"] == 1:
            cache.path(file).unlink(missing_ok=True)
        lock(descriptor, how)

    monkeypatch.setattr(cache_module.fcntl, "flock", remove_first)
    assert read(cache, file) == store.contents["f1"]
    assert store.gets() == {"f1": 2}
    assert names_in(folder) == {"f1"}


def test_processes_and_kills_never_break_the_limit_or_a_file(store, folder):
    def slowly(_name, content, path):
        for stop in (SIZE // 3, SIZE):
            path.write_bytes(content[:stop])
            time.sleep(0.002)

    def wander(seed):
        chance = random.Random(seed)
        cache = make_cache(store, folder, num_files=6)
        for _ in range(60):
            check_read(cache, store, f"f{chance.randrange(20)}")

    store.on_fetch = slowly
    children = {run_in_fork(lambda seed=seed: wander(seed)) for seed in range(4)}
    victims = {run_in_fork(lambda seed=seed: wander(seed)) for seed in range(4, 7)}
    cache = make_cache(store, folder, num_files=6)
    chance = random.Random(0)
    most = 0
    while children:
        time.sleep(0.005)
        with cache.quota.exclusive():
            held = [p for p in folder.iterdir() if not p.name.endswith((".lock", ".room"))]
            sizes = [p.stat().st_size for p in held]
            assert sum(sizes) <= sum_in(folder)
        most = max(most, sum(sizes))
        if victims and chance.random() < 0.1:
            os.kill(victim := victims.pop(), signal.SIGKILL)
            exit_code_of(victim)
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0
                children.remove(child)
    for victim in victims:
        assert exit_code_of(victim) == 0
    assert 3 * SIZE <= most <= 6 * SIZE
    make_cache(store, folder, num_files=6)
    assert not any(name.startswith(".") for name in names_in(folder))
    assert sum_in(folder) == SIZE * len(names_in(folder))


def test_a_rescan_does_not_look_like_a_running_download(store, folder, monkeypatch):
    cache, file = make_cache(store, folder), store.file("f1")
    rescans = []

    def open_during_a_rescan(path, *options, **named):
        descriptor = os.open(path, *options, **named)
        if str(path).endswith(".lock") and not rescans:
            rescans.append(threading.Thread(target=cache.quota.rescan))
            rescans[0].start()
            rescans[0].join(timeout=0.5)  # it ends, or waits until the lock is ours
        return descriptor

    monkeypatch.setattr(cache_quota, "os", _With(os, open=open_during_a_rescan))
    cache.prefetch(file, since_ns=0)
    rescans[0].join()
    assert cache.path(file).read_bytes() == store.contents["f1"]
    assert names_in(folder) == {"f1"}


class _With:
    """A module with some functions replaced."""

    def __init__(self, module, **functions):
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name):
        return getattr(self._module, name)
