"""The model tick by tick: equal to the whole window, at any length, with frames when due."""

from __future__ import annotations

import pytest
import torch
from helpers.models import (
    SHAPES,
    WORLDS,
    declared_streams,
    is_equal,
    make_batch,
    make_config,
    make_model,
    make_shapes,
    make_world,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from shared.errors import ConfigError
from shared.streams import Kind
from train.data.pixels import to_model_inputs
from train.model.encoders import frames_due
from train.model.multimodal import Cache

pytestmark = pytest.mark.usefixtures("one_thread")


def slice_ticks(inputs, shapes, first, count):
    """Return the inputs of some ticks of a window: its samples there, and frames that are due."""
    part = {}
    for name, shape in shapes.streams.items():
        span = slice(first * shape.per_tick, (first + count) * shape.per_tick)
        if shape.kind is Kind.VIDEO:
            due = frames_due(shapes, name, first_tick=first, num_ticks=count)
            span = slice(due.start, due.stop)
        part |= {key: inputs[key][:, span] for key in (name, f"{name}_valid") if key in inputs}
    return part


def stream_ticks(model, inputs, steps, **options):
    """Run a model over groups of ticks, one group after another."""
    cache, parts, first = None, [], 0
    with torch.no_grad():
        for count in steps:
            part = slice_ticks(inputs, model.shapes, first, count)
            outputs, cache = model.forward_step(part, cache, num_ticks=count, **options)
            parts.append(outputs)
            first += count
    return {head: torch.cat([part[head] for part in parts], dim=1) for head in parts[0]}, cache


def assert_close(streamed, whole):
    assert streamed.keys() == whole.keys()
    for head in whole:
        torch.testing.assert_close(streamed[head], whole[head], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [[1] * 8, [3, 1, 4], [8]], ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_streaming_tick_by_tick_equals_the_whole_window(world, steps):
    model, shapes = make_world(world)
    inputs = to_model_inputs(make_batch(shapes))
    streamed, cache = stream_ticks(model, inputs, steps)
    with torch.no_grad():
        whole = model(inputs)
    assert cache.num_ticks == 8
    assert_close(streamed, whole)
    for head in shapes.heads:
        if shapes.target_shape(head).kind is not Kind.SENSOR:
            assert torch.equal(streamed[head].argmax(-1), whole[head].argmax(-1))


@pytest.mark.parametrize("steps", [[1] * 24, [5, 3, 16], [24]], ids=str)
@pytest.mark.parametrize("world", ["default", "many"])
def test_streaming_beyond_the_context_attends_to_a_sliding_window(world, steps, monkeypatch):
    model, shapes = make_world(world, num_ticks=24)
    inputs = to_model_inputs(make_batch(shapes))
    streamed, _ = stream_ticks(model, inputs, steps, context=7)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_to_the_newest_seven)
    with torch.no_grad():
        assert_close(streamed, model(inputs))


def attend_to_the_newest_seven(query, key, value, *, is_causal=False, attn_mask=None):
    assert attn_mask is None
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    if is_causal:
        for index in range(query.shape[2]):
            scores[:, :, index, index + 1 :] = -torch.inf
            scores[:, :, index, : max(0, index - 6)] = -torch.inf
    return scores.softmax(-1) @ value


def test_a_stream_of_any_length_keeps_a_window_of_keys():
    model, inputs, cache = make_model(), to_model_inputs(make_batch()), None
    with torch.no_grad():
        for tick in range(100):
            part = slice_ticks(inputs, SHAPES, tick % 8, 1)
            _, cache = model.forward_step(part, cache)
    assert {x.shape for pair in cache.keys_values for x in pair} == {(2, 2, 7, 16)}


@pytest.mark.parametrize("world", ["default", "many"])
def test_a_tick_after_ten_hours_is_predicted_like_one_at_the_start(world):
    model, shapes = make_world(world)
    inputs = to_model_inputs(make_batch(shapes))
    nothing = torch.zeros(2, 2, 0, 16)
    late = Cache(
        num_ticks=360_000, keys_values=((nothing, nothing),) * 2, frames={}, last_values={}
    )
    with torch.no_grad():
        expected = model(inputs)
        found, cache = model.forward_step(inputs, late)
    assert cache.num_ticks == 360_008
    assert_close(found, expected)


def test_a_step_without_a_due_frame_can_omit_vision():
    model, inputs = make_model(), to_model_inputs(make_batch())
    with torch.no_grad():
        _, cache = model.forward_step(slice_ticks(inputs, SHAPES, 0, 1))
        second = slice_ticks(inputs, SHAPES, 1, 1)
        without = {k: v for k, v in second.items() if not k.startswith("vision")}
        given, _ = model.forward_step(second, cache)
        left_out, _ = model.forward_step(without, cache)
    assert is_equal(given, left_out)


@pytest.mark.parametrize("rates", [(5, 10), (10, 10), (2, 10), (7.5, 15), (30, 10)], ids=str)
def test_due_frames_are_those_whose_grid_time_has_come(rates):
    """A batch holds at most one frame per tick; of a faster camera the newest of each tick."""
    rate_hz, tick_rate_hz = rates
    config = make_config({"model": {"tick_rate_hz": tick_rate_hz}, "data": window(4)})
    shapes = make_shapes(config, video={"rate_hz": rate_hz, "size": 16})
    rate_hz = min(rate_hz, tick_rate_hz)
    for first, count in [(0, 1), (0, 7), (1, 1), (5, 3), (9, 12)]:
        newest = [k for k in range(400) if k * tick_rate_hz <= (first + count - 1) * rate_hz]
        earlier = [k for k in newest if first and k * tick_rate_hz <= (first - 1) * rate_hz]
        due = frames_due(shapes, "vision_left", first_tick=first, num_ticks=count)
        assert [*due] == newest[len(earlier) :]


def window(duration_s):
    return {"window": {"duration_s": duration_s}}


def test_videos_alone_are_counted_by_their_frames():
    config = make_config({"data": {"modalities": ["vision_left", "vision_right"]}})
    model = make_model(config)
    inputs = to_model_inputs(make_batch(streams=["vision_left", "vision_right"]))
    with torch.no_grad():
        assert model(inputs)["audio"].shape[:2] == (2, 8)
        with pytest.raises(ConfigError, match="span the same whole number of ticks"):
            model({**inputs, "vision_left": inputs["vision_left"][:, :3]})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(streams=declared_streams(), data=st.data())
def test_random_streams_tick_by_tick_equal_the_whole_window(streams, data):
    weights = {name: 1 for name, spec in streams.items() if spec["kind"] != "video"}
    config = make_config(num_ticks=8, loss_weights=weights)
    shapes = make_shapes(config, streams=streams, text={"vocab_size": 264})
    model = make_model(config, shapes)
    inputs = to_model_inputs(make_batch(shapes, seed=data.draw(st.integers(0, 1000))))
    steps = data.draw(st.sampled_from([[1] * 8, [3, 5], [2, 1, 1, 4]]))
    with torch.no_grad():
        whole = model(inputs)
    assert_close(stream_ticks(model, inputs, steps)[0], whole)
