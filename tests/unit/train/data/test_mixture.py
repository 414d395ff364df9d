"""Several shard sets mixed by weight, against a walk that takes one sample after the other."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.oracles import slow_epoch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.recipe import Recipe
from train.config import TrainConfig
from train.data.mixture import (
    MAX_TURNS,
    InterleaveSchedule,
    MixedOrder,
    MixedSource,
    integer_weights,
)
from train.data.order import OrderSettings, SampleOrder
from train.data.windows import WindowGrid
from train.shapes import WindowShapes

BLOCK_SHARDS = 2
SEED = 5

weights = st.lists(st.integers(1, 40), min_size=1, max_size=6)
sets = st.lists(
    st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.integers(1, 9)),
    min_size=1,
    max_size=4,
)


def slow_turns(weights):
    """Yield the set of each turn: of the released turns, the one with the earliest deadline."""
    total, taken = sum(weights), [0] * len(weights)
    for n in itertools.count():
        released = [k for k, m in enumerate(weights) if taken[k] * total // m <= n]
        k = min(released, key=lambda k: (-(-(taken[k] + 1) * total // weights[k]), k))
        taken[k] += 1
        yield k


def slow_set(sizes, name):
    """Yield (shard, row) of every sample of one set, epoch after epoch."""
    for epoch in itertools.count():
        yield from slow_epoch(sizes, name, SEED, epoch, BLOCK_SHARDS)


def slow_mix(mix):
    """Yield (set, shard, row) of the samples of a mix of (shard sizes, weight), without end."""
    streams = [slow_set(sizes, f"set{k}") for k, (sizes, _) in enumerate(mix)]
    for k in slow_turns([weight for _, weight in mix]):
        yield (k, *next(streams[k]))


def make_order(mix, *, batch_size=4, rank=0, world_size=1):
    settings = OrderSettings(
        seed=SEED,
        grid=WindowGrid(window_ticks=40, stride_ticks=20, tick_rate_hz=10.0),
        block_shards=BLOCK_SHARDS,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )
    orders = {
        f"set{k}": SampleOrder(np.array(sizes), fingerprint=f"set{k}", settings=settings)
        for k, (sizes, _) in enumerate(mix)
    }
    weights = {f"set{k}": weight for k, (_, weight) in enumerate(mix)}
    return MixedOrder(orders, weights, settings)


def locations(plan, mix):
    """Return (set, shard, row) of a batch, whose shards are numbered across all sets."""
    owners = [(k, shard) for k, (sizes, _) in enumerate(mix) for shard in range(len(sizes))]
    return [
        (*owners[s], r) for s, r in zip(plan.shards.tolist(), plan.windows.tolist(), strict=True)
    ]


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_weights", "expected"),
    [
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([2, 4], [1, 2]),
        ([1.0], [1]),
        ([0.5, 0.25, 0.25], [2, 1, 1]),
        ([1e-3, 1], [1, 1000]),
        ([1e-9, 1], [1, MAX_TURNS - 1]),  # as fine as it gets
    ],
)
def test_weights_become_the_smallest_integers(given_weights, expected):
    assert integer_weights(given_weights) == expected


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_integer_weights_keep_the_shares(given_weights):
    found = integer_weights(given_weights)
    assert min(found) >= 1
    assert sum(found) <= MAX_TURNS
    total = sum(Fraction(str(w)) for w in given_weights)
    for whole, weight in zip(found, given_weights, strict=True):
        share = Fraction(whole, sum(found)) - Fraction(str(weight)) / total
        assert abs(share) <= Fraction(len(given_weights) + 1, MAX_TURNS)


# --- turns -----------------------------------------------------------------------------------


@given(weights=weights)
def test_turns_equal_the_slow_reference(weights):
    count = 2 * sum(weights) + 3
    expected = list(itertools.islice(slow_turns(weights), count))
    schedule, before = InterleaveSchedule(weights), Counter()
    sets, set_positions = schedule.locate(np.arange(count))
    assert sets.tolist() == expected
    for n, k in enumerate(expected):
        assert schedule.samples_before(n).tolist() == [before[s] for s in range(len(weights))]
        assert set_positions[n] == before[k]
        before[k] += 1


@given(weights=weights)
def test_every_set_has_its_share_to_within_one_sample_at_any_time(weights):
    total = sum(weights)
    sets, _ = InterleaveSchedule(weights).locate(np.arange(2 * total))
    for k, weight in enumerate(weights):
        taken = np.cumsum(sets == k)
        assert np.abs(taken * total - np.arange(1, 2 * total + 1) * weight).max() < total


def test_turns_of_far_away_positions_are_exact():
    schedule, cycles = InterleaveSchedule([2, 1]), 10**14
    assert schedule.samples_before(3 * cycles + 1).tolist() == [2 * cycles + 1, cycles]
    sets, set_positions = schedule.locate(np.array([3 * cycles, 3 * cycles + 1, 3 * cycles + 2]))
    assert sorted(zip(sets, set_positions, strict=True)) == [
        (0, 2 * cycles),
        (0, 2 * cycles + 1),
        (1, cycles),
    ]


# --- batches ---------------------------------------------------------------------------------


@given(mix=sets, batch_size=st.integers(1, 9), start=st.integers(0, 8))
def test_batches_equal_the_slow_reference_from_any_position(mix, batch_size, start):
    order = make_order(mix, batch_size=batch_size)
    walk = list(itertools.islice(slow_mix(mix), (start + 5) * batch_size))
    for index in range(start, start + 5):
        expected = walk[index * batch_size : (index + 1) * batch_size]
        plan = order.plan(index)
        assert locations(plan, mix) == expected
        assert plan.weight.tolist() == [1.0] * batch_size
        counts = Counter(k for k, _, _ in expected)
        assert order.samples_per_set(index) == {f"set{k}": counts[k] for k in range(len(mix))}


@given(mix=sets, per_rank=st.integers(1, 3), world_size=st.sampled_from([1, 2, 4]))
def test_ranks_divide_a_global_batch(mix, per_rank, world_size):
    size = 4 * per_rank
    whole = make_order(mix, batch_size=size)
    ranks = [
        make_order(mix, batch_size=size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for index in (0, 1, 7):
        shares = [locations(rank.plan(index), mix) for rank in ranks]
        assert {len(share) for share in shares} == {size // world_size}
        assert list(itertools.chain(*shares)) == locations(whole.plan(index), mix)
        assert {rank.find_blocks(rank.plan(index)) for rank in ranks} == {
            whole.find_blocks(whole.plan(index))
        }


@settings(max_examples=50)
@given(mix=sets, batch_size=st.integers(1, 6), index=st.integers(0, 20))
def test_the_shards_of_a_batch_are_listed_before_it_is_read(mix, batch_size, index):
    order = make_order(mix, batch_size=batch_size)
    plan = order.plan(index)
    listed = set(order.list_shards(order.find_blocks(plan)))
    firsts = np.concatenate([[0], np.cumsum([len(sizes) for sizes, _ in mix])])
    walk = itertools.islice(slow_mix(mix), index * batch_size, (index + 1) * batch_size)
    assert {int(firsts[k]) + shard for k, shard, _ in walk} <= listed
    # of every set something is coming, also of those that this batch has nothing of
    assert all(listed & set(range(firsts[k], firsts[k + 1])) for k in range(len(mix)))


def test_the_block_after_a_sets_newest_is_listed_too():
    order = make_order([([1] * 6, 1)], batch_size=1)
    in_turn = [shard for shard, _ in itertools.islice(slow_set([1] * 6, "set0"), 12)]
    for index, expected in ((0, in_turn[:4]), (2, in_turn[2:6]), (5, in_turn[4:6])):
        listed = order.list_shards(order.find_blocks(order.plan(index)))
        assert set(listed[: len(expected)]) == set(expected)
        assert len(listed) == 4  # the next epoch's first block after the last one


@given(mix=sets, index=st.integers(0, 9), attempt=st.integers(0, 3))
def test_a_substitute_is_another_sample_of_the_same_set(mix, index, attempt):
    order = make_order(mix, batch_size=4)
    shares = [make_order(mix, batch_size=4, rank=r, world_size=2) for r in range(2)]
    plan = order.plan(index)
    owners = [k for k, (sizes, _) in enumerate(mix) for _ in sizes]
    all_sizes = [size for sizes, _ in mix for size in sizes]
    for i, (k, _, _) in enumerate(locations(plan, mix)):
        shard, row = order.substitute(plan, i, attempt)
        assert owners[shard] == k
        assert row < all_sizes[shard]
        is_alone = sum(mix[k][0]) == 1
        assert ((shard, row) == (plan.shards[i], plan.windows[i])) == is_alone
        share = shares[i // 2]
        assert share.substitute(share.plan(index), i % 2, attempt) == (shard, row)


def test_a_set_without_samples_and_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"data\.mix: set1 has no samples; fix: remove it"):
        make_order([([2], 1), ([0], 1)])
    with pytest.raises(ValueError, match="3 ranks can't share a global batch of 4"):
        make_order([([2], 1)], world_size=3)


# --- sets of different recipes ---------------------------------------------------------------


class FakeSource:
    """A shard set of two shards of which only the declarations count."""

    def __init__(self, streams, *, tokenizer="words", **sections):
        self.recipe = Recipe.model_validate({"streams": streams, **sections})
        self.tokenizer = SimpleNamespace(json=tokenizer)
        self.manifest = SimpleNamespace(root="/sets/one")
        self.shard_sizes = np.array([3, 2])
        self.fingerprint = json.dumps(streams)

    def open_windows(self, shapes, grid):
        opened = copy.copy(self)
        opened.shapes = shapes
        opened.window_counts = grid.index([[3], [1, 1]], segment_s=self.recipe.segment_s).counts
        return opened


GAZE = {"kind": "sensor", "file": "gaze.csv", "rate_hz": 60, "key": "g"} | {
    "values": [{"count": 2, "type": "angle"}]
}
CAMERA = {"kind": "video", "file": "cam.mp4", "size": [64, 96]}
SOUND = {"kind": "audio", "file": "a.wav"}
NOTES = {"kind": "text", "file": "notes.jsonl"}


def open_mix(*sources, heads=("gaze",), modalities=None):
    """Open the windows of a mix of sources as a loader does."""
    mixed = MixedSource({f"set{k}": s for k, s in enumerate(sources)}, {"set0": 1, "set1": 1})
    config = TrainConfig.model_validate(
        {
            "data": {"modalities": modalities},
            "training": {"loss_weights": dict.fromkeys(heads, 1.0)},
        }
    )
    shapes = WindowShapes.from_recipe(mixed.recipe, config)
    return mixed.open_windows(shapes, WindowGrid.from_config(config))


@pytest.mark.parametrize(
    ("stream", "change", "message"),
    [
        (GAZE, {"rate_hz": 30}, "gaze has rate_hz 60.0 in set0, and 30.0 in set1"),
        (
            GAZE,
            {"values": [{"count": 3, "type": "position"}]},
            "gaze has values 2 angle rad in set0, and 3 position m in set1",
        ),
        (GAZE, CAMERA | {"key": None}, "gaze has kind sensor in set0, and video in set1"),
        (CAMERA, {"size": [96, 96]}, "gaze has height 64 in set0, and 96 in set1"),
        (SOUND, {"dmel": {"levels": 8}}, "gaze has dmel.levels 16 in set0, and 8 in set1"),
    ],
)
def test_a_stream_that_is_read_agrees_in_all_sets(stream, change, message):
    other = {key: value for key, value in {**stream, **change}.items() if value is not None}
    if other["kind"] != stream["kind"]:
        other = CAMERA
    one, two = (FakeSource({"gaze": s, "notes": NOTES}) for s in (stream, other))
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_mix(one, two, heads=("notes",), modalities=("gaze",))


def test_a_stream_that_is_not_read_may_differ():
    one, two = (FakeSource({"gaze": GAZE, "camera": CAMERA | {"size": n}}) for n in (64, 96))
    assert set(open_mix(one, two, modalities=("gaze",)).shapes.streams) == {"gaze"}


def test_the_recipe_of_a_mix_has_the_streams_of_all_sets_and_then_those_that_are_read():
    one, two = FakeSource({"gaze": GAZE, "camera": CAMERA}), FakeSource({"gaze": GAZE})
    three = FakeSource({"gaze": GAZE, "notes": NOTES})
    assert set(MixedSource({"a": two, "b": one}, {}).recipe.streams) == {"camera", "gaze"}
    mixed = open_mix(one, three, modalities=("gaze", "notes"))
    assert list(mixed.recipe.streams) == ["gaze", "notes"]
    assert Recipe.model_validate(mixed.recipe.as_json()) == mixed.recipe


def test_segments_of_other_lengths_give_windows_of_one():
    one, two = (FakeSource({"gaze": GAZE}, segment={"duration_s": s}) for s in (2.0, 8.0))
    mixed = open_mix(one, two)
    assert mixed.shapes.num_ticks == 40
    # 6 s; 2 s twice; 24 s; 8 s twice; a window has 4 s
    assert mixed.window_counts.tolist() == [2, 2, 6, 4]
    assert mixed.recipe.segment_s == 2.0


def test_the_segments_of_the_recipe_fit_every_stream_that_is_read():
    slow = {"kind": "sensor", "file": "slow.csv", "key": "s", "rate_hz": 0.25}
    slow["values"] = [{"count": 1, "type": "scalar"}]
    one, two = FakeSource({"gaze": GAZE}), FakeSource({"slow": slow}, segment={"duration_s": 4})
    assert open_mix(one, two, heads=("gaze", "slow")).recipe.segment_s == 4.0


def test_the_tokenizer_counts_only_if_text_is_read():
    one, two = (FakeSource({"gaze": GAZE, "notes": NOTES}, tokenizer=t) for t in ("a", "b"))
    open_mix(one, two, modalities=("gaze",))
    with pytest.raises(ConfigError, match="set1 has another tokenizer than set0, and notes is"):
        open_mix(one, two, modalities=("gaze", "notes"))


@pytest.mark.parametrize("rates", [(10, 20), (20, 10)])
def test_no_set_has_more_tokens_than_ticks_unless_only_text_is_trained(rates):
    declared = ({"gaze": GAZE, "notes": NOTES | {"tokens_per_s": rate}} for rate in rates)
    one, two = map(FakeSource, declared)
    open_mix(one, two, modalities=("gaze",))  # at 10 ticks per second
    open_mix(one, two, heads=("notes",))  # packed densely
    owner = f"the set set{rates.index(20)} of data.mix"
    words = f"is below tokens_per_s 20 of notes in {owner}, .* or rebuild {owner} with"
    with pytest.raises(ConfigError, match=words):
        open_mix(one, two, heads=("gaze", "notes"))


def test_the_tokenizer_is_that_of_a_set_with_text():
    one, two = FakeSource({"gaze": GAZE}, tokenizer=None), FakeSource({"notes": NOTES})
    assert open_mix(one, two, heads=("gaze", "notes")).tokenizer.json == "words"


def test_sets_may_give_one_source_two_names():
    one, two = FakeSource({"gaze": GAZE}), FakeSource({"eyes": GAZE})
    mixed = open_mix(one, two, heads=("gaze", "eyes"))
    assert set(mixed.shapes.heads) == {"gaze", "eyes"}
    assert Recipe.model_validate(mixed.recipe.as_json()) == mixed.recipe
