"""The model tick by tick: equal to the whole window, at any length, with frames when due."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.models import FAST_FRAMES, SHAPES, is_equal, make_batch, make_model
from torch.nn import functional as F

from train.config import Head
from train.data.batch import WindowShapes
from train.data.pixels import to_model_inputs
from train.model.encoders import frames_due
from train.model.multimodal import Cache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("steps", [[1] * 8, [3, 1, 4], [8]], ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, FAST_FRAMES], ids=["slow_frames", "fast_frames"])
def test_streaming_tick_by_tick_equals_the_whole_window(shapes, steps):
    model, inputs = make_model(shapes=shapes), to_model_inputs(make_batch(shapes))
    cache, parts, first = None, [], 0
    with torch.no_grad():
        whole = model(inputs)
        for count in steps:
            part = slice_ticks(inputs, shapes, first, count)
            outputs, cache = model.forward_step(part, cache)
            parts.append(outputs)
            first += count
    assert cache.num_ticks == 8
    for head in Head:
        streamed = torch.cat([part[head] for part in parts], dim=1)
        torch.testing.assert_close(streamed, whole[head], atol=2e-5, rtol=1e-4)
        if head != Head.ANIMATION:
            assert torch.equal(streamed.argmax(-1), whole[head].argmax(-1))


@pytest.mark.parametrize("steps", [[1] * 24, [5, 3, 16], [24]], ids=str)
def test_streaming_beyond_the_context_attends_to_a_sliding_window(steps, monkeypatch):
    shapes = dataclasses.replace(
        SHAPES, num_ticks=24, num_frames=12, num_audio_frames=120, num_sensor_samples=72
    )
    model, inputs = make_model(shapes=shapes), to_model_inputs(make_batch(shapes))
    cache, parts, first = None, [], 0
    with torch.no_grad():
        for count in steps:
            part = slice_ticks(inputs, shapes, first, count)
            outputs, cache = model.forward_step(part, cache, context=7)
            parts.append(outputs)
            first += count
        monkeypatch.setattr(F, "scaled_dot_product_attention", attend_to_the_newest_seven)
        whole = model(inputs)
    for head in Head:
        streamed = torch.cat([part[head] for part in parts], dim=1)
        torch.testing.assert_close(streamed, whole[head], atol=2e-5, rtol=1e-4)


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


def test_a_tick_after_ten_hours_is_predicted_like_one_at_the_start():
    model, inputs = make_model(), to_model_inputs(make_batch())
    nothing = torch.zeros(2, 2, 0, 16)
    late = Cache(
        num_ticks=360_000,
        keys_values=((nothing, nothing),) * 2,
        frames={},
        last_pose=torch.zeros(2, 20),
    )
    with torch.no_grad():
        expected = model(inputs)
        found, cache = model.forward_step(inputs, late)
    assert cache.num_ticks == 360_008
    for head in Head:
        torch.testing.assert_close(found[head], expected[head], atol=2e-5, rtol=1e-4)


def slice_ticks(inputs, shapes, first, count):
    due = frames_due(shapes, first_tick=first, num_ticks=count)
    part = {}
    for key, value in inputs.items():
        per_tick = value.shape[1] // shapes.num_ticks
        positions = slice(first * per_tick, (first + count) * per_tick)
        part[key] = value[:, slice(due.start, due.stop) if key.startswith("vision") else positions]
    return part


def test_a_step_without_a_due_frame_can_omit_vision():
    model, inputs = make_model(), to_model_inputs(make_batch())
    with torch.no_grad():
        _, cache = model.forward_step(slice_ticks(inputs, SHAPES, 0, 1))
        second = slice_ticks(inputs, SHAPES, 1, 1)
        without = {k: v for k, v in second.items() if not k.startswith("vision")}
        given, _ = model.forward_step(second, cache)
        left_out, _ = model.forward_step(without, cache)
    assert is_equal(given, left_out)


@pytest.mark.parametrize("rates", [(5, 10), (10, 10), (30, 10), (2, 10), (25, 10)], ids=str)
def test_due_frames_are_those_whose_grid_time_has_come(rates):
    fps, tick_rate = rates
    shapes = WindowShapes(num_ticks=4 * tick_rate, num_frames=4 * fps)
    for first, count in [(0, 1), (0, 7), (1, 1), (5, 3), (9, 12)]:
        newest = [k for k in range(400) if k * tick_rate <= (first + count - 1) * fps]
        earlier = [k for k in newest if first and k * tick_rate <= (first - 1) * fps]
        assert [*frames_due(shapes, first_tick=first, num_ticks=count)] == newest[len(earlier) :]
