"""Locks on a set: several readers, one writer, and none after a process or an object ends."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing.reduction

import pytest

from shared import machine
from shared.errors import ShardError
from shared.shardset import locks
from shared.shardset.locks import ReaderLock, exclusive_lock, has_readers, read_manifest_locked
from shared.shardset.manifest import MANIFEST_FILE


@pytest.fixture
def path(tmp_path):
    path = tmp_path / MANIFEST_FILE
    path.write_text("{}")
    return path


def test_readers_share_a_lock_until_the_last_one_closes_it(path):
    assert not has_readers(path)
    first, second = ReaderLock(path), ReaderLock(path)
    first.close()
    assert has_readers(path)
    second.close()
    assert not has_readers(path)


def test_a_lock_ends_with_its_object(path):
    lock = ReaderLock(path)
    assert has_readers(path)
    del lock
    assert not has_readers(path)


def test_a_pickled_copy_holds_no_lock(path):
    lock = ReaderLock(path)
    pickler = multiprocessing.reduction.ForkingPickler
    copy = pickler.loads(pickler.dumps(lock))
    assert not copy.is_current(path)
    lock.close()
    assert not has_readers(path)


def test_a_replaced_file_is_not_the_locked_one(path):
    lock = ReaderLock(path)
    assert lock.is_current(path)
    (path.parent / "new").write_text("{}")
    (path.parent / "new").replace(path)
    assert not lock.is_current(path)


def test_a_manifest_replaced_while_it_is_read_is_read_again(path, monkeypatch):
    versions = iter(["old", "new"])

    def read(root):
        version = next(versions)
        if version == "old":
            (root / "new").write_text("{}")
            (root / "new").replace(path)
        return version

    monkeypatch.setattr(locks, "read_manifest", read)
    manifest, lock = read_manifest_locked(path.parent)
    assert manifest == "new"
    assert lock is not None
    assert lock.is_current(path)


def test_only_one_job_has_the_exclusive_lock(tmp_path):
    with (
        exclusive_lock(tmp_path),
        pytest.raises(ShardError, match="another job is building this shard set; fix: wait"),
        exclusive_lock(tmp_path),
    ):
        pass
    with exclusive_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_set_is_read_and_written_after_a_warning(path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, "refused")

    machine.warn_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "read_manifest", lambda _: "manifest")
    with exclusive_lock(path.parent):
        assert read_manifest_locked(path.parent)[0] == "manifest"
        assert not has_readers(path)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # one loss for writers, one for readers
    assert all(f"{path.parent}: its file system has no file locks" in each for each in messages)
