"""Batches in recycled shared memory: never overwritten while in use, and nothing leaks."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import sets as tiny_sets
from helpers.processes import open_files
from helpers.sets import HEADS, TEXT_HEADS, make_config
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import machine
from shared.errors import EngineError, MachineError
from shared.streams import DEFAULT_STREAMS
from train.data.batch import ArrayForm, assemble_batch, join_batches
from train.data.loader import Loader, num_recycled_slots
from train.data.shard_source import ShardSource
from train.data.shared_pool import SharedBatchPool

FORMS = {
    "pixels": ArrayForm((2, 3, 5), np.dtype(np.uint8)),
    "valid": ArrayForm((2, 3), np.dtype(np.bool_)),
    "numbers": ArrayForm((2, 7), np.dtype(np.float32)),
}
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")


# --- slots -----------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=3),
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
            st.sampled_from(["u1", "?", "f4", "i8"]).map(np.dtype),
        ),
        max_size=5,
    )
)
def test_a_view_of_a_slot_shows_what_was_written_to_it(forms):
    pool = SharedBatchPool({name: ArrayForm(*form) for name, form in forms.items()}, num_recycled=2)
    expected = []
    for slot in (pool.acquire(), pool.acquire()):
        values = {}
        for name, array in pool.arrays(slot).items():
            assert (array.shape, array.dtype) == forms[name]
            assert array.ctypes.data % 64 == 0
            values[name] = np.random.default_rng(slot).integers(0, 2, array.shape)
            array[...] = values[name]
        expected.append((slot, values))
    for slot, values in expected:
        arrays = pool.view(slot)
        assert set(arrays) == set(values)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, values[name])


VIEWS = {
    "array": lambda arrays: arrays["pixels"],
    "view of a view": lambda arrays: arrays["pixels"][1:][..., ::2].T,
    "tensor": lambda arrays: torch.as_tensor(arrays["numbers"]),
    "view of a tensor": lambda arrays: torch.as_tensor(arrays["numbers"]).view(torch.uint8)[1, 3:],
    "detached tensor": lambda arrays: torch.as_tensor(arrays["numbers"]).detach(),
    "storage": lambda arrays: torch.as_tensor(arrays["numbers"]).untyped_storage(),
    "memoryview": lambda arrays: memoryview(arrays["valid"]),
}


@pytest.mark.parametrize("look", VIEWS)
def test_a_slot_is_free_when_the_last_view_of_it_is_gone(look):
    pool = SharedBatchPool(FORMS, num_recycled=1)
    slot = pool.acquire()
    arrays = pool.view(slot)
    view = VIEWS[look](arrays)
    del arrays
    assert pool.acquire() != slot
    del view
    assert pool.acquire() == slot


def test_a_view_outlives_the_pool():
    pool = SharedBatchPool(FORMS, num_recycled=1)
    arrays = pool.view(pool.acquire())
    arrays["numbers"][...] = 7
    tensor = torch.as_tensor(arrays["numbers"])
    del pool, arrays
    assert bool((tensor == 7).all())


def allocated_bytes(pool):
    return os.fstat(pool._fd).st_blocks * 512


def test_memory_beyond_the_recycled_slots_is_released():
    forms = {"pixels": ArrayForm((100_000,), np.dtype(np.uint8))}
    pool = SharedBatchPool(forms, num_recycled=2)
    assert allocated_bytes(pool) == 0
    for _ in range(3):
        held = []
        for number in range(7):
            slot = pool.acquire()
            pool.arrays(slot)["pixels"][...] = number
            held.append(pool.view(slot)["pixels"])
        assert allocated_bytes(pool) == 7 * pool.slot_bytes
        assert [int(pixels[-1]) for pixels in held] == list(range(7))
        held.clear()
        assert allocated_bytes(pool) == 2 * pool.slot_bytes


def test_more_batches_than_fit_into_memory_are_refused(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 3)
    pool = SharedBatchPool({"pixels": ArrayForm((4096,), np.dtype(np.uint8))}, num_recycled=1)
    held = [pool.view(pool.acquire()) for _ in range(3)]
    with pytest.raises(EngineError, match="3 batches of 0 MiB are held at once"):
        pool.acquire()
    held.pop()
    assert pool.acquire() == 2


def test_few_addresses_are_reserved_where_the_process_may_have_few(monkeypatch):
    limits = {resource.RLIMIT_AS: 64 << 20, resource.RLIMIT_FSIZE: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], limits[which]))
    pool = SharedBatchPool({"pixels": ArrayForm((1 << 20,), np.dtype(np.uint8))}, num_recycled=1)
    assert pool.num_slots * pool.slot_bytes == 16 << 20


SHORT_FILES = """
import resource, sys
import numpy as np
from train.data.batch import ArrayForm
from train.data.shared_pool import SharedBatchPool

resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, resource.RLIM_INFINITY))
pool = SharedBatchPool(
    {"pixels": ArrayForm((1 << 20,), np.dtype(np.uint8))}, num_recycled=int(sys.argv[1])
)
print(pool.num_slots)
"""


@pytest.mark.parametrize(
    ("num_recycled", "said"),
    [
        (3, "8\n"),
        (9, "batches need 9 MiB of shared memory: File too large; fix: raise `ulimit -f`"),
    ],
)
def test_the_memory_is_no_longer_than_a_file_may_be(num_recycled, said):
    command = [sys.executable, "-c", SHORT_FILES, str(num_recycled)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said in done.stdout + done.stderr


def refuse_memfd(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_without_memfd_batches_are_kept_in_a_temporary_file(tmp_path, monkeypatch, caplog):
    machine.warn_once.cache_clear()
    monkeypatch.setattr(os, "memfd_create", refuse_memfd)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = SharedBatchPool(FORMS, num_recycled=1)
    slots = [pool.acquire() for _ in range(3)]
    held = [pool.view(slot) for slot in slots]
    for number, arrays in enumerate(held):
        arrays["pixels"][...] = number
    assert [int(arrays["pixels"].max()) for arrays in held] == [0, 1, 2]
    del arrays, held
    assert {pool.acquire() for _ in range(3)} == set(slots)
    (record,) = caplog.records
    assert f"a file in {tmp_path}" in record.getMessage()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["made", "acquired"])
def test_without_memfd_a_full_disk_is_an_error_and_kills_nothing(tmp_path, monkeypatch, when):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "memfd_create", refuse_memfd)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = None if when == "made" else SharedBatchPool(FORMS, num_recycled=0)
    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(MachineError, match=rf"^{tmp_path}: No space left.*fix: set TMPDIR"):
        pool.acquire() if pool else SharedBatchPool(FORMS, num_recycled=1)


def test_garbage_collection_in_a_forked_process_frees_no_slot():
    pool = SharedBatchPool(FORMS, num_recycled=0)
    slot = pool.acquire()
    arrays = pool.view(slot)
    arrays["pixels"][...] = 5
    child = os.fork()
    if child == 0:
        arrays.clear()
        gc.collect()
        os._exit(0 if pool.acquire() == slot + 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (arrays["pixels"] == 5).all()


class FakeCuda:
    """What torch.cuda.cudart() gives, as far as pinning goes."""

    def __init__(self, error=0):
        self.calls = []
        self._error = error

    def cudaHostRegister(self, address, length, flags):  # noqa: N802
        self.calls.append(("register", address, length, flags))
        return self._error

    def cudaHostUnregister(self, address):  # noqa: N802
        self.calls.append(("unregister", address, bytes((ctypes.c_char * 2).from_address(address))))


def test_recycled_memory_is_pinned_once_and_unpinned_before_it_is_unmapped(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    pool = SharedBatchPool(FORMS, num_recycled=3)
    pool.pin()
    slots = [pool.acquire() for _ in range(3)]
    arrays = pool.view(min(slots))["pixels"]
    arrays[...] = ord("x")
    address = arrays.ctypes.data
    assert cuda.calls == [("register", address, 3 * pool.slot_bytes, 0)]
    del pool
    assert len(cuda.calls) == 1  # a batch is still held
    del arrays
    assert cuda.calls[1:] == [("unregister", address, b"xx")]


def test_memory_that_cannot_be_pinned_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCuda(error=2))
    with pytest.raises(
        EngineError, match=r"cudaHostRegister: error 2\); fix: lower data.num_workers"
    ):
        SharedBatchPool(FORMS, num_recycled=3).pin()


@pytest.mark.parametrize(
    ("device", "heads", "num_epochs", "pinned"),
    [
        ("cpu", HEADS, None, 0),
        ("cpu", TEXT_HEADS, None, 0),
        ("cuda", HEADS, None, 1),
        ("auto", TEXT_HEADS, None, 1),
        ("cuda", HEADS, 1, 0),  # a few held-out batches are not worth it
    ],
)
def test_memory_is_pinned_if_an_endless_stream_goes_to_a_gpu(
    tiny_set, monkeypatch, device, heads, num_epochs, pinned
):
    cuda, dense = FakeCuda(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: dense.append(tensor.data_ptr()) or tensor
    )
    config = make_config(tiny_set, heads=heads)
    training = config.training.model_copy(update={"device": device})
    config = config.model_copy(update={"training": training})
    loader = Loader(ShardSource(tiny_set), config, num_epochs=num_epochs)
    for batch in itertools.islice(loader, 2):
        texts = {t.data_ptr() for n, t in batch["inputs"].items() if n in TEXT_HEADS}
        assert texts <= set(dense) or not (pinned and heads == TEXT_HEADS)
        assert not dense or (pinned and heads == TEXT_HEADS)
    assert [call[0] for call in cuda.calls] == ["register"] * pinned


# --- the loader's batches --------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """Fill every slot with 0xFF when it is acquired."""
    acquire = SharedBatchPool.acquire

    def acquire_poisoned(self):
        slot = acquire(self)
        start = slot * self.slot_bytes
        self._bytes[start : start + self.slot_bytes] = 0xFF
        return slot

    monkeypatch.setattr(SharedBatchPool, "acquire", acquire_poisoned)


def make_loader(shards, *, num_epochs=1, **options):
    return Loader(ShardSource(shards), make_config(shards, **options), num_epochs=num_epochs)


def assert_same(one, other):
    for group in ("inputs", "targets"):
        assert set(one[group]) == set(other[group])
        for name, tensor in one[group].items():
            assert tensor.dtype == other[group][name].dtype, name
            assert torch.equal(tensor, other[group][name]), name
    assert one["keys"] == other["keys"]


def assert_right(loader, batches, *, oracle=None):
    """Compare batches with samples read one by one into memory of their own."""
    source = oracle or loader.source
    locations = {source.key(*location): location for location in tiny_sets.sample_locations(source)}
    num_rows = 0
    for number, batch in enumerate(batches):
        assert batch["index"] == number
        alone = [
            assemble_batch(source, [locations[key]], pixels=loader.config.data.pixels)
            for key in batch["keys"]
        ]
        assert_same(batch, join_batches(alone))
        assert torch.equal(
            batch["weight"], torch.from_numpy(loader.order.plan(batch["index"]).weight)
        )
        num_rows += int(batch["weight"].sum())
    return num_rows


@few_cores
@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
@pytest.mark.parametrize("heads", [HEADS, TEXT_HEADS])
def test_stale_memory_never_shows(tiny_set, poisoned, num_workers, heads):
    loader = make_loader(tiny_set, num_workers=num_workers, heads=heads, num_epochs=3)
    num_rows = assert_right(loader, loader)
    assert num_rows == 3 * loader.source.window_counts.sum()


@settings(max_examples=40)
@given(
    batch_size=st.integers(1, 9),
    modalities=st.sets(st.sampled_from(sorted(DEFAULT_STREAMS)), min_size=1),
    heads=st.sets(st.sampled_from(HEADS), min_size=1),
)
def test_stale_memory_never_shows_in_any_choice_of_streams(tiny_set, batch_size, modalities, heads):
    with pytest.MonkeyPatch.context() as patch:
        acquire = SharedBatchPool.acquire

        def acquire_poisoned(pool):
            slot = acquire(pool)
            for array in pool.arrays(slot).values():
                array.view(np.uint8)[...] = 0xFF
            return slot

        patch.setattr(SharedBatchPool, "acquire", acquire_poisoned)
        loader = make_loader(
            tiny_set, batch_size=batch_size, modalities=sorted(modalities), heads=tuple(heads)
        )
        assert_right(loader, loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_substitute_overwrites_what_the_corrupt_sample_left(
    tiny_set, tmp_path, poisoned, num_workers
):
    shards = tiny_sets.copy_set(tiny_set, tmp_path / "set")
    source = ShardSource(shards)
    for shard in range(3):
        index = source.shard(shard).index
        row = index.num_samples - 1
        damage(source, shard, max(index.present_streams(row)), row)  # the last that is read
        damage(source, shard, "touch" if index.is_present(0, "touch") else "audio.dmel", row=0)
    source.close()
    loader = make_loader(shards, num_epochs=None, num_workers=num_workers, max_bad_fraction=1.0)
    batches = list(itertools.islice(loader, loader.batches_per_epoch))
    assert len({skip["file"] for batch in batches for skip in batch["skipped"]}) >= 3
    oracle = make_loader(tiny_set, num_epochs=None).source
    assert_right(loader, batches, oracle=oracle)


def damage(source, shard, column, row):
    """Flip a byte in the middle of a row's member."""
    index = source.shard(shard).index
    table = index.members(column)
    path = source.manifest.root / index.columns[column]["file"]
    assert table.length[row]
    tiny_sets.flip_byte(path, int(table.offset[row]) + int(table.length[row]) // 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_held_batches_stay_as_they_were(tiny_set, num_workers):
    loader = make_loader(tiny_set, num_workers=num_workers, prefetch_batches=1, num_epochs=8)
    assert loader.batches_per_epoch * 8 > 3 * num_recycled_slots(loader.config)
    assert assert_right(loader, list(loader)) == 8 * loader.source.window_counts.sum()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_part_of_each_batch_can_be_kept(tiny_set, num_workers):
    loader = make_loader(tiny_set, num_workers=num_workers, num_epochs=5)
    kept = [(b["inputs"]["vision_left"][0, 1], b["targets"]["audio"][0].clone()) for b in loader]
    for batch, (picture, _) in zip(loader, kept, strict=True):
        assert torch.equal(batch["inputs"]["vision_left"][0, 1], picture)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_plain_loop_takes_no_slot_beyond_those_recycled(tiny_set, monkeypatch, num_workers):
    taken, take = [], SharedBatchPool.acquire
    monkeypatch.setattr(
        SharedBatchPool, "acquire", lambda pool: taken.append(take(pool)) or taken[-1]
    )
    loader = make_loader(tiny_set, num_workers=num_workers, num_epochs=8)
    for _ in loader:
        pass
    assert len(taken) == 8 * loader.batches_per_epoch
    assert set(taken) == set(range(num_recycled_slots(loader.config)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterators_of_one_loader_do_not_disturb_each_other(tiny_set, num_workers):
    loader = make_loader(tiny_set, num_workers=num_workers, num_epochs=2)
    pairs = list(zip(loader, loader, strict=True))
    for one, other in pairs:
        assert_same(one, other)
    assert_right(loader, [one for one, _ in pairs])


POOL_FILES = ("pipe:", "socket:", "/memfd:")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterators_dropped_half_way_leave_nothing_open(tiny_set, num_workers):
    loader = make_loader(tiny_set, num_workers=num_workers)
    before, mapped = open_files(POOL_FILES), mapped_pools()
    for count in (1, 2, 3, 1):
        assert_right(loader, list(itertools.islice(loader, count)))
    assert not multiprocessing.active_children()
    # torch's threads close their pipes a moment after the processes have ended.
    until = time.monotonic() + 10
    while open_files(POOL_FILES) - before and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    assert not open_files(POOL_FILES) - before  # nothing new
    assert not mapped_pools() - mapped


def mapped_pools():
    """Return the inodes of the pools that this process maps.

    Errors of earlier tests may hold some and release them at any time, so only new ones count.
    """
    lines = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
    return {line.split()[4] for line in lines if "memfd:batches" in line}
