"""The order of samples against a slow reference written from design.md, "Streaming"."""

from __future__ import annotations

import dataclasses
import re
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from helpers.oracles import slow_epoch, slow_hashes, slow_permutation
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train.data import order as order_module
from train.data.order import EpochOrder, OrderSettings, SampleOrder
from train.data.windows import WindowGrid

GRID = WindowGrid(window_ticks=40, stride_ticks=20, tick_rate_hz=10.0)


def make_settings(**settings):
    defaults = {"seed": 0, "grid": GRID, "block_shards": 2, "batch_size": 4, "last_batch": "pad"}
    return OrderSettings(**defaults | settings)


def make_order(sizes, *, fingerprint="f", **options):
    return SampleOrder(
        np.array(sizes, dtype=np.int64), fingerprint=fingerprint, settings=make_settings(**options)
    )


def make_batches(sizes, *, batch_size=4, last_batch="pad", rank=0, world_size=1, **options):
    return EpochOrder(
        make_order(sizes, **options),
        make_settings(
            batch_size=batch_size, last_batch=last_batch, rank=rank, world_size=world_size
        ),
    )


def locations(plan, *, real_only=True):
    is_wanted = plan.weight > 0 if real_only else np.ones(len(plan.weight), bool)
    return list(zip(plan.shards[is_wanted].tolist(), plan.windows[is_wanted].tolist(), strict=True))


def epoch_locations(batches, epoch, **options):
    first = epoch * batches.batches_per_epoch
    plans = [batches.plan(first + i) for i in range(batches.batches_per_epoch)]
    return [location for plan in plans for location in locations(plan, **options)]


def all_locations(sizes):
    return [(s, r) for s, size in enumerate(sizes) for r in range(size)]


shard_sizes = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)
blocks = st.integers(1, 5)
batch_sizes = st.integers(1, 12)
epochs = st.integers(0, 3)


@given(sizes=shard_sizes, block_shards=blocks, epoch=epochs, seed=st.integers(0, 2**63 - 1))
def test_the_order_is_the_slow_references(sizes, block_shards, epoch, seed):
    order = make_order(sizes, fingerprint="print", seed=seed, block_shards=block_shards)
    shards, windows = order.locate(epoch, np.arange(sum(sizes)))
    expected = slow_epoch(sizes, "print", seed, epoch, block_shards)
    assert list(zip(shards.tolist(), windows.tolist(), strict=True)) == expected


@given(
    sizes=shard_sizes,
    block_shards=blocks,
    epoch=epochs,
    most_samples=st.integers(1, 9),
    is_shuffled=st.booleans(),
)
def test_blocks_end_at_the_limit_as_in_the_slow_reference(
    sizes, block_shards, epoch, most_samples, is_shuffled
):
    with mock.patch.object(order_module, "MAX_BLOCK_SAMPLES", most_samples):
        order = make_order(sizes, block_shards=block_shards, is_shuffled=is_shuffled)
        shards, windows = order.locate(epoch, np.arange(sum(sizes)))
        first, last = order.block_range(epoch, np.array([0, sum(sizes)]))
        counts = np.diff([*order._block_starts, sum(sizes)])
        in_blocks = order.shards_in_blocks(epoch, first, last)
    expected = slow_epoch(sizes, "f", 0, epoch, block_shards, most_samples=most_samples)
    found = list(zip(shards.tolist(), windows.tolist(), strict=True))
    assert found == (expected if is_shuffled else all_locations(sizes))
    assert max(counts) <= most_samples
    assert set(in_blocks.tolist()) >= set(shards.tolist())


@given(sizes=shard_sizes, block_shards=blocks, batch_size=batch_sizes, epoch=epochs)
def test_an_epoch_holds_every_sample_once(sizes, block_shards, batch_size, epoch):
    batches = make_batches(sizes, block_shards=block_shards, batch_size=batch_size)
    assert sorted(epoch_locations(batches, epoch)) == all_locations(sizes)


@given(sizes=shard_sizes, batch_size=batch_sizes)
def test_padding_fills_only_the_last_batch_up(sizes, batch_size):
    batches = make_batches(sizes, batch_size=batch_size)
    weights = np.concatenate([batches.plan(i).weight for i in range(batches.batches_per_epoch)])
    assert len(weights) % batch_size == 0
    assert weights.dtype == np.float32
    num_padding = -sum(sizes) % batch_size
    np.testing.assert_array_equal(weights, [1.0] * sum(sizes) + [0.0] * num_padding)


@given(sizes=shard_sizes, batch_size=batch_sizes)
def test_padding_is_made_of_samples_that_exist(sizes, batch_size):
    batches = make_batches(sizes, batch_size=batch_size)
    assert set(epoch_locations(batches, 0, real_only=False)) == set(all_locations(sizes))


@given(sizes=shard_sizes, batch_size=batch_sizes, epoch=epochs)
def test_drop_leaves_out_only_the_incomplete_batch(sizes, batch_size, epoch):
    if sum(sizes) < batch_size:
        with pytest.raises(ValueError, match="last_batch to pad"):
            make_batches(sizes, batch_size=batch_size, last_batch="drop")
        return
    dropping = make_batches(sizes, batch_size=batch_size, last_batch="drop")
    padding = make_batches(sizes, batch_size=batch_size)
    num_kept = sum(sizes) // batch_size * batch_size
    kept = epoch_locations(dropping, epoch, real_only=False)
    assert kept == epoch_locations(padding, epoch)[:num_kept]


@given(sizes=shard_sizes, per_rank=st.integers(1, 4), world=st.sampled_from([1, 2, 4]))
def test_ranks_divide_a_global_batch(sizes, per_rank, world):
    size = 4 * per_rank
    whole = make_batches(sizes, batch_size=size)
    ranks = [make_batches(sizes, batch_size=size, rank=r, world_size=world) for r in range(world)]
    for index in range(2 * whole.batches_per_epoch):
        shares = [rank.plan(index) for rank in ranks]
        plan = whole.plan(index)
        for name in ("positions", "shards", "windows", "weight"):
            joined = np.concatenate([getattr(share, name) for share in shares])
            np.testing.assert_array_equal(joined, getattr(plan, name))
        assert {len(share.windows) for share in shares} == {size // world}


@given(
    sizes=shard_sizes,
    batch_size=st.integers(1, 5),
    factor=st.integers(1, 4),
    number=st.integers(0, 30),
    last_batch=st.sampled_from(["pad", "drop"]),
)
def test_smaller_batches_begin_where_larger_ones_would(
    sizes, batch_size, factor, number, last_batch
):
    assume(last_batch == "pad" or sum(sizes) >= factor * batch_size)
    large = make_batches(sizes, batch_size=factor * batch_size, last_batch=last_batch)
    small = make_batches(sizes, batch_size=batch_size, last_batch=last_batch)
    index = small.rescale_index(number, batch_size=factor * batch_size)
    first = large.plan(number)
    assert small.plan(index).epoch == first.epoch
    assert small.plan(index).positions[0] == first.positions[0]
    assert large.rescale_index(index, batch_size=batch_size) == number


@given(sizes=shard_sizes, one=batch_sizes, other=batch_sizes, number=st.integers(0, 30))
def test_batches_of_any_other_size_begin_at_the_same_sample_or_nowhere(sizes, one, other, number):
    old, new = make_batches(sizes, batch_size=one), make_batches(sizes, batch_size=other)
    index = new.rescale_index(number, batch_size=one)
    begins = {
        (plan.epoch, int(plan.positions[0])): plan.index
        for plan in map(new.plan, range((number // old.batches_per_epoch + 1) * sum(sizes)))
    }
    plan = old.plan(number)
    assert index == begins.get((plan.epoch, int(plan.positions[0])))


@given(sizes=shard_sizes, batch_size=batch_sizes, index=st.integers(0, 40))
def test_a_plan_needs_no_history(sizes, batch_size, index):
    walked = make_batches(sizes, batch_size=batch_size)
    for i in range(index):
        walked.plan(i)
    fresh = make_batches(sizes, batch_size=batch_size).plan(index)
    assert locations(walked.plan(index), real_only=False) == locations(fresh, real_only=False)
    assert fresh.epoch == index // walked.batches_per_epoch


@given(sizes=shard_sizes, jumps=st.lists(st.integers(0, 60), max_size=8))
def test_plans_asked_for_in_any_order_are_the_same(sizes, jumps):
    batches = make_batches(sizes, batch_size=3)
    for index in jumps:
        expected = make_batches(sizes, batch_size=3).plan(index)
        assert locations(batches.plan(index)) == locations(expected)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=9), block_shards=blocks)
def test_samples_of_a_block_come_from_its_shards_only(sizes, block_shards):
    order = make_order(sizes, block_shards=block_shards)
    shards, _ = order.locate(0, np.arange(sum(sizes)))
    in_order = list(
        dict.fromkeys(slow_permutation("f/40/20/10.0/0/0/shards", list(range(len(sizes)))))
    )
    position = 0
    for first in range(0, len(sizes), block_shards):
        members = in_order[first : first + block_shards]
        count = sum(sizes[s] for s in members)
        assert set(shards[position : position + count].tolist()) == set(members)
        position += count


@pytest.mark.parametrize("change", [{"seed": 1}, {"fingerprint": "g"}, {"block_shards": 3}])
def test_another_seed_fingerprint_or_block_gives_another_order(change):
    sizes = [5] * 8
    one, other = (epoch_locations(make_batches(sizes, **o), 0) for o in ({}, change))
    assert one != other
    assert sorted(one) == sorted(other)


def test_epochs_differ():
    batches = make_batches([5] * 8)
    orders = {tuple(epoch_locations(batches, epoch)) for epoch in range(5)}
    assert len(orders) == 5


def test_without_shuffling_the_stored_order_comes_in_every_epoch():
    batches = make_batches([3, 0, 4, 1], is_shuffled=False)
    for epoch in range(3):
        assert epoch_locations(batches, epoch) == all_locations([3, 0, 4, 1])


def test_frozen_order():
    # These numbers are the order of samples that runs have been trained on. If they change, every
    # checkpoint resumes at other samples than it stopped at, some twice and some never, and no
    # published run can be repeated: then Loader.state_at needs a version, and refuses the old one.
    batches = make_batches([3, 5, 4], fingerprint="frozen", seed=42, batch_size=6)
    plan = batches.plan(3)
    assert plan.epoch == 1
    found = [s * 10 + r for s, r in epoch_locations(batches, 1)]
    assert found == [1, 12, 0, 10, 13, 14, 2, 11, 23, 22, 20, 21]


@given(
    sizes=shard_sizes,
    epoch=epochs,
    position=st.integers(0, 10**12),
    attempt=st.integers(0, 15),
)
def test_a_substitute_is_another_position_and_always_the_same(sizes, epoch, position, attempt):
    order = make_order(sizes)
    found = order.substitute_position(epoch, position, attempt)
    hashes = slow_hashes(f"f/40/20/10.0/0/{epoch}/substitute/{position}", attempt + 1)
    others = [p % sum(sizes) for p in range(position + 1, position + sum(sizes))]
    assert position % sum(sizes) not in others
    assert found == (others[hashes[attempt] % len(others)] if others else 0)


def test_substitutes_are_spread_over_the_epoch():
    order = make_order([50, 50])
    found = [order.substitute_position(0, position, 0) for position in range(4000)]
    counts = np.bincount(found, minlength=100)
    # 40 +- 6.3 each; five standard deviations
    assert counts.min() > 8
    assert counts.max() < 72


@settings(max_examples=20)
@given(sizes=shard_sizes, world=st.sampled_from([1, 2, 4]))
def test_a_plan_names_positions_of_the_epoch_whatever_the_rank(sizes, world):
    ranks = [make_batches(sizes, batch_size=8, rank=r, world_size=world) for r in range(world)]
    for index in range(2 * ranks[0].batches_per_epoch):
        positions = np.concatenate([rank.plan(index).positions for rank in ranks])
        first = index % ranks[0].batches_per_epoch * 8
        np.testing.assert_array_equal(positions, np.arange(first, first + 8))


def test_a_batch_of_100_000_shards_permutes_its_own_blocks_only(monkeypatch):
    sizes = np.full(100_000, 1000)
    batches = make_batches(sizes, batch_size=256, block_shards=16)
    counted = []
    hashes = SampleOrder._hashes

    def count(self, what, number):
        counted.append(number)
        return hashes(self, what, number)

    monkeypatch.setattr(SampleOrder, "_hashes", count)
    index = 300_000
    plan = batches.plan(index)
    assert counted[0] == 100_000  # the shards, once per epoch
    assert sum(counted[1:]) <= 2 * 16 * 1000  # at most two blocks of samples
    counted.clear()
    batches.plan(index + 1)
    assert sum(counted) <= 16 * 1000
    assert (plan.windows < 1000).all()


def test_a_huge_shard_is_permuted_in_blocks_of_bounded_memory():
    batches = make_batches([100, 24_000_000, 7], batch_size=512)
    tracemalloc.start()
    try:
        plan = batches.plan(batches.batches_per_epoch // 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(locations(plan))) == 512
    assert peak < 64 * 2**20
    shards, windows = batches.order.locate(0, np.arange(0, batches.order.num_samples, 1000))
    assert windows[shards == 1].max() > 23_900_000


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"window_ticks": 80}, "window_s"),
        ({"stride_ticks": 10}, "stride_s"),
        ({"window_ticks": 80, "stride_ticks": 40, "tick_rate_hz": 20.0}, "tick_rate_hz"),
    ],
)
def test_another_window_gives_another_order_and_state(change, key):
    grid = dataclasses.replace(GRID, **change)
    one, other = make_order([5] * 8), make_order([5] * 8, grid=grid)
    places = np.arange(40)
    assert not np.array_equal(one.locate(0, places), other.locate(0, places))
    states = [EpochOrder(one, make_settings(grid=each)).state for each in (GRID, grid)]
    assert {name for name in states[0] if states[0][name] != states[1][name]} == {key}


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        make_batches([0, 0])


@pytest.mark.parametrize(
    ("batch_size", "world_size", "fix"),
    [
        (4, 3, "start 2 or 4 ranks (torchrun --nproc-per-node), or set data.batch_size to 3 or 6"),
        (
            12,
            5,
            "start 4 or 6 ranks (torchrun --nproc-per-node), or set data.batch_size to 10 or 15",
        ),
        (2, 8, "start 1 or 2 ranks (torchrun --nproc-per-node), or set data.batch_size to 8"),
    ],
)
def test_ranks_that_do_not_divide_the_batch_get_numbers_that_do(batch_size, world_size, fix):
    with pytest.raises(ValueError, match=re.escape(fix)):
        make_batches([50], batch_size=batch_size, world_size=world_size)


# --- what comes next -------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any),
    block_shards=st.integers(1, 4),
    fraction=st.floats(0, 1),
    length=st.integers(1, 6),
    is_shuffled=st.booleans(),
    most_samples=st.sampled_from([2, 7, 2**20]),
)
def test_the_shards_of_the_next_block_hold_every_sample_up_to_its_end(
    sizes, block_shards, fraction, length, is_shuffled, most_samples
):
    with mock.patch.object(order_module, "MAX_BLOCK_SAMPLES", most_samples):
        order = make_order(sizes, block_shards=block_shards, is_shuffled=is_shuffled)
        first = int(fraction * (sum(sizes) - 1))
        positions = np.arange(first, first + length)
        first_block, last_block = order.block_range(1, positions)
        known = set(order.shards_in_blocks(1, first_block, last_block + 1).tolist())
        in_epoch = positions[positions < sum(sizes)]
        read, _ = order.locate(1, in_epoch)
        assert set(read.tolist()) <= known
        rest = np.arange(in_epoch[-1], sum(sizes))
        in_block = [p for p in rest if order.block_range(1, np.array([p]))[0] <= last_block + 1]
        assert set(order.locate(1, np.array(in_block))[0].tolist()) <= known


def test_after_the_last_block_comes_the_next_epochs_first():
    sizes, options = [3, 1, 2, 4, 2], {"block_shards": 2}
    order = make_order(sizes, **options)
    num_samples = sum(sizes)
    first, last = order.block_range(0, np.array([num_samples - 1, num_samples + 3]))
    assert (first, last) == (2, 2)
    epochs = [[s for s, _ in slow_epoch(sizes, "f", 0, e, 2)] for e in (0, 1)]
    in_turn = [list(dict.fromkeys(shards)) for shards in epochs]
    assert order.shards_in_blocks(0, 2, 3).tolist() == [
        in_turn[0][-1],
        *slow_permutation("f/40/20/10.0/0/1/shards", list(range(5)))[:2],
    ]


def test_a_set_of_one_block_knows_all_its_shards():
    order = make_order([2, 2], block_shards=9)
    assert sorted(order.shards_in_blocks(0, 0, 1).tolist()) == [0, 0, 1, 1]
