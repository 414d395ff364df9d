"""The store of a shard set does the same in a folder and behind a URL."""

from __future__ import annotations

import hashlib
import multiprocessing.reduction
import tempfile
import threading
from contextlib import closing, contextmanager

import fsspec
import pytest

from shared.errors import CorruptError, JobError, ShardError, rebuild_hint
from shared.shardset.locks import read_manifest_locked
from shared.shardset.manifest import MANIFEST_FILE
from shared.shardset.store import (
    LocalShardSet,
    claim_shard_set,
    job_file,
    map_small_files,
    open_shard_set,
)
from shared.storage import parse_location

CONTENT = bytes(range(256)) * 8
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=["folder", "url"])
def location(request, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    where = str(tmp_path / "set") if request.param == "folder" else "memory://store/set"
    yield parse_location(where)
    fs.store.clear()
    assert list((tmp_path / "temporary").iterdir()) == []


@contextmanager
def claimed(location, **options):
    """A claimed set with one column."""
    with claim_shard_set(location, **options) as store:
        with store.staging_dir() as work:
            (work / "made").write_bytes(CONTENT)
            store.put(work / "made", "column.tar")
        yield store


def test_a_finished_file_can_be_listed_read_and_copied(location, tmp_path):
    with claimed(location) as store:
        store.write("small.json", b"{}")
        files = {n: size for n, size in store.list_sizes().items() if not n.startswith(".")}
        assert files == {"column.tar": len(CONTENT), "small.json": 2}
        assert (store.read("small.json"), store.read("missing")) == (b"{}", None)
        store.copy_to("column.tar", tmp_path / "copy", sha256=SHA256)
        assert (tmp_path / "copy").read_bytes() == CONTENT
        store.remove("small.json")
        store.remove("small.json")
        assert "small.json" not in store.list_sizes()


def test_an_open_column_needs_no_temporary_files(location, tmp_path):
    with claimed(location):
        pass
    with open_shard_set(location) as store, closing(store.open_column("column.tar")) as column:
        assert column.origin == f"{store}/column.tar"
        assert column.sha256() == SHA256
        assert not list((tmp_path / "temporary").rglob("column.tar"))


def test_missing_columns_and_indexes_are_named_alike(location):
    with claimed(location) as store:
        missing = (
            f"{store}/missing: can't be opened: No such file or directory; {rebuild_hint(store)}"
        )
        with pytest.raises(ShardError) as caught:
            store.open_column("missing")
        assert str(caught.value) == missing
        with pytest.raises(ShardError, match="missing: no such index"):
            store.read_index("missing")


def test_a_store_can_be_sent_to_another_process(location):
    with claimed(location) as store:
        pickler = multiprocessing.reduction.ForkingPickler
        copy = pickler.loads(pickler.dumps(store))
        assert copy == store
        assert copy.list_sizes() == store.list_sizes()


def test_files_of_a_job_end_with_it(location):
    with claimed(location) as store:
        with store.staging_dir() as work:
            (work / "part").write_bytes(CONTENT)
            store.put(work / "part", job_file(store, "part"))
        assert store.read(job_file(store, "part")) == CONTENT
    with open_shard_set(location) as after:
        assert after.read(job_file(store, "part")) is None
        assert after.list_sizes().keys() == {"column.tar"}


def test_a_job_that_lost_its_claim_puts_no_more_files(location):
    with claimed(location) as lost:
        pass

    def put_late():
        with lost.staging_dir() as work:
            (work / "late").write_bytes(CONTENT)
            lost.put(work / "late", "late.tar")

    with claimed(location), pytest.raises(JobError, match="another job has taken over"):
        put_late()


def test_a_copy_of_damaged_bytes_is_refused_behind_a_url(tmp_path):
    with (
        claimed(parse_location("memory://damaged/set")) as store,
        pytest.raises(CorruptError, match=r"column\.tar: checksum differs from its index"),
    ):
        store.copy_to("column.tar", tmp_path / "copy", sha256="0" * 64)
    fsspec.filesystem("memory").store.clear()


def test_a_retained_manifest_has_readers_while_it_is_locked(tmp_path):
    with claim_shard_set(tmp_path / "set") as store:
        store.write(MANIFEST_FILE, b"{}")
        store.retain_manifest("manifest.g0.json")
        store.write(MANIFEST_FILE, b"{ }")
        assert not store.has_readers("manifest.g0.json")
    with pytest.raises(ShardError):
        read_manifest_locked(tmp_path / "set")  # not a manifest: the lock is released


def test_only_a_folder_keeps_a_manifest_whose_files_the_next_one_has(location):
    with claimed(location) as store:
        store.write(MANIFEST_FILE, b"{}")
        is_kept = store.retain_manifest("manifest.g0.json", is_extended=True)
        assert ("manifest.g0.json" in store.list_sizes()) is is_kept
        assert is_kept is (store.read("manifest.g0.json") is not None)
        # In a folder it shows the locks of its readers, also after a later build.
        assert is_kept is isinstance(store, LocalShardSet)


def test_small_files_behind_a_url_are_read_at_the_same_time_and_in_order():
    together = threading.Barrier(4, timeout=60)

    def read(name):
        together.wait()
        return store.read(name)

    with claimed(parse_location("memory://many/set")) as store:
        for number in range(8):
            store.write(str(number), b"%d" % number)
        contents = map_small_files(store, read, map(str, range(8)))
        assert contents == [b"%d" % number for number in range(8)]
        with pytest.raises(ShardError, match="no such index"):
            map_small_files(store, store.read_index, ["4.index"])
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(("keep_old_s", "expected"), [(3600.0, True), (0.0, False)])
def test_a_retained_remote_manifest_has_readers_for_a_time(keep_old_s, expected):
    location = parse_location("memory://retained/set")
    with claim_shard_set(location, keep_old_s=keep_old_s) as store:
        store.write(MANIFEST_FILE, b"{}")
        store.retain_manifest("manifest.g0.json")
        assert store.has_readers("manifest.g0.json") is expected
    fsspec.filesystem("memory").store.clear()
