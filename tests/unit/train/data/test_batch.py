"""Text on ticks and batches joined, against slow references."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.sets import TEXT_HEADS, make_config, sample_locations
from hypothesis import given
from hypothesis import strategies as st

from shared.recipe import Stream
from shared.session.reader import Text, TokenStream
from train.data.batch import (
    WindowShapes,
    assemble_batch,
    join_batches,
    pack_tokens,
    tokens_on_ticks,
)
from train.data.shard_source import ShardSource

NUM_TICKS, RATE_HZ = 12, 10


@st.composite
def spoken(draw, start_s=0):
    """Tokens of events that begin in a window; times in hundredths of a second."""
    hundredths = st.integers(0, 100 * NUM_TICKS // RATE_HZ - 1)
    times = sorted(draw(st.lists(hundredths, max_size=20)))
    ids = draw(st.lists(st.integers(1, 99), min_size=len(times), max_size=len(times)))
    return times, ids


def token_stream(times, ids, start_s=0.0):
    return TokenStream(ids=tuple(ids), time_s=tuple(start_s + t / 100 for t in times))


def slow_ticks(times, ids):
    """Each token takes the first free tick, from the one in which its event begins on."""
    ticks = [0] * NUM_TICKS
    last = -1
    for hundredth, token in zip(times, ids, strict=True):
        begin = int(Fraction(hundredth, 100) * RATE_HZ)
        tick = next((t for t in range(NUM_TICKS) if t > last and t >= begin), None)
        if tick is None:
            break
        ticks[tick] = token
        last = tick
    return ticks


@given(speech=spoken(), start=st.integers(0, 40_000))
def test_tokens_on_ticks_equal_the_slow_reference(speech, start):
    start_s = start / 4
    found = tokens_on_ticks(
        token_stream(*speech, start_s),
        start_s=start_s,
        num_ticks=NUM_TICKS,
        tick_rate_hz=RATE_HZ,
    )
    assert found.dtype == np.int64
    assert found.tolist() == slow_ticks(*speech)


@given(speech=spoken())
def test_no_token_is_seen_before_its_event_begins(speech):
    times, _ = speech
    tokens = token_stream(times, range(1, len(times) + 1))
    ticks = tokens_on_ticks(tokens, start_s=0.0, num_ticks=NUM_TICKS, tick_rate_hz=RATE_HZ)
    for tick, token in enumerate(ticks):
        if token:
            assert times[token - 1] / 100 < (tick + 1) / RATE_HZ


def test_a_token_that_starts_with_a_tick_is_on_it():
    times_s = [k / 10 for k in range(NUM_TICKS)]  # 0.3 * 10 is not 3 to a float
    tokens = TokenStream(ids=tuple(range(1, NUM_TICKS + 1)), time_s=tuple(times_s))
    ticks = tokens_on_ticks(tokens, start_s=0.0, num_ticks=NUM_TICKS, tick_rate_hz=RATE_HZ)
    assert ticks.tolist() == list(range(1, NUM_TICKS + 1))


@pytest.mark.parametrize(
    ("time_s", "start_s"),
    [(1e308, 0.0), (1e308, -1e308), (-1e308, 0.0), (-1e308, 1e308), (1e300, 5.0)],
)
def test_an_extreme_time_is_before_or_after_the_window(time_s, start_s):
    tokens = TokenStream(ids=(5,), time_s=(time_s,))
    ticks = tokens_on_ticks(tokens, start_s=start_s, num_ticks=NUM_TICKS, tick_rate_hz=RATE_HZ)
    assert ticks.tolist() == [5 if time_s < start_s else 0] + [0] * (NUM_TICKS - 1)


def make_text(internal, external):
    return Text(internal=token_stream(*internal), external=token_stream(*external), events=())


@given(internal=spoken(), external=spoken())
def test_packed_tokens_lose_none_and_keep_each_streams_order(internal, external):
    packed = pack_tokens(make_text(internal, external))
    thoughts, speech = packed[Stream.INTERNAL_TEXT], packed[Stream.EXTERNAL_TEXT]
    assert [t for t in thoughts if t] == internal[1]
    assert [t for t in speech if t] == external[1]
    assert all((a == 0) != (b == 0) for a, b in zip(thoughts, speech, strict=True))


@given(internal=spoken(), external=spoken())
def test_packed_tokens_are_in_order_of_time_thoughts_first(internal, external):
    packed = pack_tokens(make_text(internal, external))
    left = {
        Stream.INTERNAL_TEXT: iter(internal[0]),
        Stream.EXTERNAL_TEXT: iter(external[0]),
    }
    order = []
    for thought, _ in zip(*packed.values(), strict=True):
        stream = Stream.INTERNAL_TEXT if thought else Stream.EXTERNAL_TEXT
        order.append((next(left[stream]), not thought))
    assert order == sorted(order)


def test_one_packed_stream_has_no_silence():
    text = make_text(([0, 50], [5, 6]), ([10, 20, 30], [7, 8, 9]))
    assert pack_tokens(text, [Stream.EXTERNAL_TEXT]) == {Stream.EXTERNAL_TEXT: [7, 8, 9]}


# --- whole batches ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tiny_set):
    return ShardSource(tiny_set)


def make_batch(source, locations, **options):
    config = make_config(**options)
    return assemble_batch(
        source, locations, config=config, shapes=WindowShapes.from_recipe(source.recipe)
    )


def locate(source, session):
    return next(p for p in sample_locations(source) if source.key(*p).startswith(session))


@pytest.mark.parametrize(("pixels", "picture"), [("yuv420", (48, 32)), ("rgb", (32, 32, 3))])
def test_a_batch_has_the_documented_form(source, pixels, picture):
    batch = make_batch(source, sample_locations(source)[:3], pixels=pixels)
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
    location = locate(source, "cat/000001")  # [0.25, 1.25) s; events at 0.1, 0.4, 0.7, 1.0 s
    batch = make_batch(source, [location])
    encode = source.tokenizer.encode
    thoughts, speech = [0] * 10, [0] * 10
    for tick, text, ticks in ((1, "the red ball", speech), (4, "got it", thoughts)):
        tokens = list(encode(text))[: 10 - tick]
        ticks[tick : tick + len(tokens)] = tokens
    said = speech.index(0, 1)
    for offset, token in enumerate(encode("wait, wörld")):
        tick = max(7, said) + offset
        if tick < 10:
            speech[tick] = token
    assert batch["inputs"]["internal_text"].tolist() == [thoughts]
    assert batch["inputs"]["external_text"].tolist() == [speech]
    assert batch["inputs"]["external_text_valid"].all()


@pytest.mark.parametrize(
    ("session", "lacks"),
    [
        ("dan/000000", ("vision_left", "vision_right", "touch", "proprio")),
        ("eve/000000", ("vision_left", "audio", "internal_text", "external_text")),
    ],
)
def test_a_missing_stream_is_zeros_and_invalid(source, session, lacks):
    batch = make_batch(source, [locate(source, session)])
    for stream in lacks:
        assert not batch["inputs"][f"{stream}_valid"].any()
        assert not batch["inputs"][stream].any()


def test_numbers_have_no_nan_where_masked(source):
    batch = make_batch(source, sample_locations(source))
    valid = batch["inputs"]["touch_valid"]
    assert not valid.all()
    assert valid.any()
    for name, tensor in batch["inputs"].items():
        assert torch.isfinite(tensor.float()).all(), name
    assert not batch["inputs"]["touch"][~valid].any()
    assert int(batch["inputs"]["audio"].max()) < 16


def test_only_configured_heads_have_targets(source):
    batch = make_batch(source, sample_locations(source)[:1], heads=("audio",), modalities=["touch"])
    assert set(batch["inputs"]) == {"touch", "touch_valid"}
    assert set(batch["targets"]) == {"audio", "audio_valid"}


@pytest.mark.parametrize("heads", [TEXT_HEADS, ("animation", "audio", "internal_text")])
def test_joined_batches_equal_one_made_at_once(source, heads):
    locations = sample_locations(source)[::4]
    whole = make_batch(source, locations, heads=heads)
    joined = join_batches([make_batch(source, [location], heads=heads) for location in locations])
    assert joined["keys"] == whole["keys"]
    for group in ("inputs", "targets"):
        assert set(joined[group]) == set(whole[group])
        for name, tensor in whole[group].items():
            assert torch.equal(joined[group][name], tensor), name


def test_joined_targets_share_the_memory_of_the_inputs(source):
    joined = join_batches(
        [make_batch(source, [location]) for location in sample_locations(source)[:2]]
    )
    assert joined["targets"]["animation"].data_ptr() == joined["inputs"]["proprio"].data_ptr()
    assert joined["targets"]["audio_valid"].data_ptr() == joined["inputs"]["audio_valid"].data_ptr()
