"""Fetching ahead while others make room."""

from __future__ import annotations

import hashlib
import os
import threading

import fsspec
import pytest

from shared.storage import RetryPolicy, Store
from train.data import cache_quota as room
from train.data.cache import CachedFile, ShardCache

CONTENT = b"what a shard holds"


@pytest.fixture
def stored():
    """A store with one file, and the file."""
    store = fsspec.filesystem("memory")
    store.pipe_file("/ahead/file", CONTENT)
    yield Store("memory://ahead"), CachedFile("file", hashlib.sha256(CONTENT).hexdigest())
    store.rm("/ahead", recursive=True)


def test_who_makes_room_is_not_taken_for_a_download(stored, tmp_path, monkeypatch):
    store, file = stored
    shelf = ShardCache(store, tmp_path / "cache", limit_bytes=100, retry=RetryPolicy())
    tidying = []

    def tidy():
        shelf.quota.rescan()

    def open_and_be_interrupted(path, *options, **named):
        descriptor = os.open(path, *options, **named)
        if str(path).endswith(".lock") and not tidying:
            tidying.append(threading.Thread(target=tidy))
            tidying[0].start()
            tidying[0].join(timeout=0.5)  # done, or waits until the lock is ours
        return descriptor

    monkeypatch.setattr(room, "os", _With(os, open=open_and_be_interrupted))
    shelf.prefetch(file, since_ns=0)
    tidying[0].join()
    assert shelf.path(file).read_bytes() == CONTENT
    assert [path.name for path in shelf.folder.iterdir() if "lock" in path.name] == []


class _With:
    """A module with some other functions."""

    def __init__(self, module, **functions):
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name):
        return getattr(self._module, name)
