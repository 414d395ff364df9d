"""Text packed densely, whole batches, and batches joined, against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.sets import TEXT_HEADS, make_config, open_windows, sample_locations
from hypothesis import given
from hypothesis import strategies as st

from shared.streams import Kind
from train.data.batch import (
    MIN_TOKENS,
    ReadSample,
    WindowText,
    assemble_batch,
    join_batches,
    pack_texts,
)
from train.data.shard_source import ShardSource
from train.shapes import StreamShape, WindowShapes

NUM_TICKS = 12
NAMES = ("actions", "speech", "thoughts")


def text_shapes(names=NAMES, *, with_sensor=False):
    streams = {
        name: StreamShape(kind=Kind.TEXT, rate_hz=10, per_tick=1, num_positions=NUM_TICKS)
        for name in names
    }
    if with_sensor:
        streams["x"] = StreamShape(
            kind=Kind.SENSOR, rate_hz=10, per_tick=1, num_positions=NUM_TICKS, size=(1,)
        )
    return WindowShapes(
        num_ticks=NUM_TICKS, tick_rate_hz=10, streams=streams, inputs=tuple(streams)
    )


@st.composite
def spoken(draw):
    """Tokens of one stream in a window, from events in order of time."""
    is_recorded = draw(st.integers(0, 4)) > 0
    ticks = sorted(draw(st.sets(st.integers(0, NUM_TICKS - 1)))) if is_recorded else []
    size = len(ticks)
    # An event may begin long before its tokens' ticks.
    events = sorted(draw(st.lists(st.integers(-20, NUM_TICKS), min_size=size, max_size=size)))
    ids = draw(st.lists(st.integers(1, 99), min_size=size, max_size=size))
    return WindowText(
        ids=np.array(ids, dtype=np.int64),
        ticks=np.array(ticks, dtype=np.int64),
        event_s=np.array(events, dtype=np.float64) / 10,
        is_valid=np.full(NUM_TICKS, is_recorded),
    )


samples = st.lists(st.fixed_dictionaries({name: spoken() for name in NAMES}), min_size=1)


def slow_pack(texts):
    """Return (stream, token) one after another: by event, then by stream, then as spoken."""
    times = sorted({time for text in texts.values() for time in text.event_s})
    return [
        (name, int(token))
        for time in times
        for name in NAMES
        for token, event in zip(texts[name].ids, texts[name].event_s, strict=True)
        if event == time
    ]


@given(texts=samples)
def test_packed_texts_equal_the_slow_reference(texts):
    packed = pack_texts([ReadSample((0, i), each) for i, each in enumerate(texts)], text_shapes())
    expected = [slow_pack(each) for each in texts]
    longest = max(MIN_TOKENS, *map(len, expected))
    assert set(packed) == {f"{name}{end}" for name in NAMES for end in ("", "_valid")}
    for name in NAMES:
        rows = [[token if own == name else 0 for own, token in row] for row in expected]
        assert packed[name].tolist() == [row + [0] * (longest - len(row)) for row in rows]
        is_recorded = [each[name].is_valid.any() for each in texts]
        assert packed[f"{name}_valid"].tolist() == [
            [recorded and i < len(row) for i in range(longest)]
            for row, recorded in zip(expected, is_recorded, strict=True)
        ]


@given(texts=samples)
def test_packed_texts_lose_no_token_and_keep_each_streams_order(texts):
    packed = pack_texts([ReadSample((0, i), each) for i, each in enumerate(texts)], text_shapes())
    for i, each in enumerate(texts):
        for name in NAMES:
            assert [t for t in packed[name][i] if t] == each[name].ids.tolist()
        columns = np.stack([packed[name][i] for name in NAMES])
        assert ((columns > 0).sum(axis=0) <= 1).all()


def test_text_beside_another_stream_is_not_packed():
    assert pack_texts([], text_shapes(with_sensor=True)) == {}


# --- whole batches ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tiny_set):
    return ShardSource(tiny_set)


@pytest.fixture(scope="module")
def source(shards):
    return open_windows(shards)


def make_batch(shards, locations, **options):
    config = make_config(**options)
    return assemble_batch(open_windows(shards, config), locations, pixels=config.data.pixels)


def locate(source, key):
    return next(p for p in sample_locations(source) if source.key(*p) == key)


@pytest.mark.parametrize(("pixels", "picture"), [("yuv420", (48, 32)), ("rgb", (32, 32, 3))])
def test_a_batch_has_the_documented_form(source, pixels, picture):
    batch = assemble_batch(source, sample_locations(source)[:3], pixels=pixels)
    forms = {name: (tuple(t.shape), t.dtype) for name, t in batch["inputs"].items()}
    frames, mel, sensors, ticks = 5, 50, 30, 10
    expected = {
        "vision_left": ((3, frames, *picture), torch.uint8),
        "vision_right": ((3, frames, *picture), torch.uint8),
        "audio": ((3, mel, 16), torch.uint8),
        "touch": ((3, sensors, 5), torch.float32),
        "proprio": ((3, sensors, 20), torch.float32),
        "internal_text": ((3, ticks), torch.int64),
        "external_text": ((3, ticks), torch.int64),
    }
    valid = {f"{name}_valid": (shape[:2], torch.bool) for name, (shape, _) in expected.items()}
    assert forms == expected | valid
    assert set(batch["targets"]) == {
        name + suffix
        for name in ("internal_text", "external_text", "audio", "animation")
        for suffix in ("", "_valid")
    }
    assert torch.equal(batch["weight"], torch.ones(3))


def test_text_of_a_batch_is_on_the_ticks_of_its_window(source):
    """Events at 0.1, 0.4, 0.7, 1.0 s; a token follows another of its stream after 0.1 s."""
    batch = assemble_batch(source, [locate(source, "cat@2")], pixels="yuv420")
    encode = source.tokenizer.encode
    streams = {"internal": [0] * 40, "external": [0] * 40}
    for event, (stream, text) in enumerate(
        [
            ("internal", "reach"),
            ("external", "the red ball"),
            ("internal", "got it"),
            ("external", "wait, wörld"),
        ]
    ):
        line = streams[stream]
        last = max((i for i, token in enumerate(line) if token), default=-1)
        tick = max(1 + 3 * event, last + 1)
        line[tick : tick + len(encode(text))] = encode(text)
    for stream, line in streams.items():
        assert batch["inputs"][f"{stream}_text"].tolist() == [line[2:12]]
        assert batch["inputs"][f"{stream}_text_valid"].all()


@pytest.mark.parametrize(
    ("key", "lacks"),
    [
        ("dan@0", ("vision_left", "vision_right", "touch", "proprio")),
        ("eve@0", ("vision_left", "audio", "internal_text", "external_text")),
    ],
)
def test_a_missing_stream_is_zeros_and_invalid(source, key, lacks):
    batch = assemble_batch(source, [locate(source, key)], pixels="yuv420")
    for stream in lacks:
        assert not batch["inputs"][f"{stream}_valid"].any()
        assert not batch["inputs"][stream].any()


def test_invalid_values_are_zeros(source):
    batch = assemble_batch(source, sample_locations(source), pixels="yuv420")
    for name in source.shapes.streams:
        values, valid = batch["inputs"][name], batch["inputs"][f"{name}_valid"]
        assert not valid.all(), name
        assert valid.any(), name
        assert torch.isfinite(values.float()).all(), name
        assert not values[~valid].any(), name
    assert int(batch["inputs"]["audio"].max()) < 16


def test_only_configured_heads_have_targets(shards, source):
    locations = sample_locations(source)[:1]
    batch = make_batch(shards, locations, heads=("audio",), modalities=["touch"])
    assert set(batch["inputs"]) == {"touch", "touch_valid"}
    assert set(batch["targets"]) == {"audio", "audio_valid"}


@pytest.mark.parametrize("heads", [TEXT_HEADS, ("animation", "audio", "internal_text")])
def test_joined_batches_equal_one_made_at_once(shards, source, heads):
    locations = sample_locations(source)[::4]
    whole = make_batch(shards, locations, heads=heads)
    joined = join_batches([make_batch(shards, [location], heads=heads) for location in locations])
    assert joined["keys"] == whole["keys"]
    for group in ("inputs", "targets"):
        assert set(joined[group]) == set(whole[group])
        for name, tensor in whole[group].items():
            assert torch.equal(joined[group][name], tensor), name


def test_joined_targets_share_the_memory_of_the_inputs(shards, source):
    joined = join_batches(
        [make_batch(shards, [location]) for location in sample_locations(source)[:2]]
    )
    assert joined["targets"]["animation"].data_ptr() == joined["inputs"]["proprio"].data_ptr()
    assert joined["targets"]["audio_valid"].data_ptr() == joined["inputs"]["audio_valid"].data_ptr()
