"""The model: causality, masks, sizes, messages and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import (
    DEFAULT_NAMES,
    MODEL,
    SHAPES,
    STREAMS_OF_WORLDS,
    WORLDS,
    declared_streams,
    is_equal,
    make_batch,
    make_config,
    make_model,
    make_shapes,
    make_world,
    targets_of,
    used_positions,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from shared.errors import ConfigError
from shared.streams import DEFAULT_STREAMS, Kind
from train.data.pixels import to_model_inputs
from train.model.blocks import Block
from train.model.encoders import frames_due, module_key
from train.model.losses import compute_losses
from train.model.multimodal import MultiModalCreature

TEXT_ONLY = {"training": {"loss_weights": {"audio": 0, "animation": 0}}, "model": MODEL}
TEXTS = ("external_text", "internal_text")
HEADS = ("audio", "external_text", "internal_text", "animation")
GRAVITY = {
    "kind": "sensor",
    "key": "gravity",
    "rate_hz": 20,
    "values": [{"count": 3, "type": "direction"}],
}
pytestmark = pytest.mark.usefixtures("one_thread")
each_stream = pytest.mark.parametrize(("world", "stream"), STREAMS_OF_WORLDS)


def losses_of(model, inputs):
    outputs, targets = model(to_model_inputs(inputs)), targets_of(inputs, model.shapes)
    return compute_losses(outputs, targets, torch.ones(2), objective=model.objective)


def run(model, inputs):
    with torch.no_grad():
        return model(to_model_inputs(inputs))


def perturbed_after(inputs, stream, tick, shapes):
    """Inputs with other values and other validity of `stream` at all positions after a tick."""
    changed = {key: value.clone() for key, value in inputs.items()}
    value, valid = changed[stream], changed[f"{stream}_valid"]
    shape = shapes.streams[stream]
    first = (tick + 1) * shape.per_tick
    if shape.kind is Kind.VIDEO:
        first = frames_due(shapes, stream, first_tick=0, num_ticks=tick + 1).stop
    value[:, first:] = make_batch(shapes, seed=99, streams=[stream])[stream][:, first:]
    is_used = torch.from_numpy(used_positions(shape, shapes))
    valid[:, first:] = (~valid & is_used)[:, first:]
    return changed


def test_densely_packed_text_of_any_length_is_compiled_once_or_twice():
    """The second compilation has a variable length."""
    model, counter = make_model(TEXT_ONLY), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for length in (20, 23, 31, 17, 40, 28):
        texts = {stream: torch.zeros(2, length, dtype=torch.int64) for stream in TEXTS}
        valid = {f"{s}_valid": torch.ones(2, length, dtype=torch.bool) for s in TEXTS}
        compiled({**texts, **valid})
    assert counter.frame_count == 2


@pytest.mark.parametrize("world", WORLDS)
def test_a_whole_model_is_one_graph_when_compiled(world):
    model, shapes = make_world(world)
    counter = CompileCounter()
    compiled, inputs = torch.compile(model, backend=counter), to_model_inputs(make_batch(shapes))
    with torch.no_grad():
        outputs = compiled(inputs)
    assert counter.frame_count == 1
    assert is_equal(outputs, model(inputs))


@each_stream
def test_no_head_depends_on_the_future(world, stream):
    model, shapes = make_world(world)
    inputs = make_batch(shapes)
    before = run(model, inputs)
    for tick in (0, 3, 6):
        after = run(model, perturbed_after(inputs, stream, tick, shapes))
        assert is_equal(before, after, ticks=slice(0, tick + 1)), f"tick {tick}"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(streams=declared_streams(), tick=st.integers(0, 6), seed=st.integers(0, 1000))
def test_no_head_of_random_streams_depends_on_the_future(streams, tick, seed):
    weights = {name: 1 for name, spec in streams.items() if spec["kind"] != "video"}
    config = make_config(loss_weights=weights)
    shapes = make_shapes(config, streams=streams, text={"vocab_size": 264})
    model, inputs = make_model(config, shapes), make_batch(shapes, seed=seed)
    changed = inputs
    for name in streams:
        changed = perturbed_after(changed, name, tick, shapes)
    assert is_equal(run(model, inputs), run(model, changed), ticks=slice(0, tick + 1))


@each_stream
def test_every_head_depends_on_the_present_and_the_past_of_every_stream(world, stream):
    model, shapes = make_world(world)
    inputs = make_batch(shapes)
    before = run(model, inputs)
    # Ticks from 4 on differ; a stream with a sample every second tick has a new one in tick 4.
    after = run(model, perturbed_after(inputs, stream, 3, shapes))
    for head in shapes.heads:
        assert not torch.equal(before[head][:, 4], after[head][:, 4]), head
        assert not torch.equal(before[head][:, 7], after[head][:, 7]), head


@each_stream
def test_without_the_causal_mask_heads_would_depend_on_the_future(world, stream, monkeypatch):
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attention(q, k, v)
    )
    model, shapes = make_world(world)
    inputs = make_batch(shapes)
    before, after = run(model, inputs), run(model, perturbed_after(inputs, stream, 3, shapes))
    assert not is_equal(before, after, ticks=slice(0, 4))


@each_stream
def test_an_absent_stream_equals_a_fully_invalid_one(world, stream):
    model, shapes = make_world(world)
    masked = make_batch(shapes)
    masked[f"{stream}_valid"] = torch.zeros_like(masked[f"{stream}_valid"])
    absent = {k: v for k, v in masked.items() if k not in (stream, f"{stream}_valid")}
    assert is_equal(run(model, masked), run(model, absent))


@each_stream
def test_each_stream_has_its_own_null_used_only_where_it_is_missing(world, stream):
    model, shapes = make_world(world)
    present = make_batch(shapes)
    present[f"{stream}_valid"] = torch.ones_like(present[f"{stream}_valid"])
    missing = present | {f"{stream}_valid": torch.zeros_like(present[f"{stream}_valid"])}
    before = run(model, present), run(model, missing)
    with torch.no_grad():
        model.encoder.null[module_key(stream)] += 1
    after = run(model, present), run(model, missing)
    assert is_equal(before[0], after[0])
    assert not is_equal(before[1], after[1])


@each_stream
def test_values_at_invalid_positions_change_nothing(world, stream):
    model, shapes = make_world(world)
    zeros = make_batch(shapes)
    garbage = dict(zeros)
    value, valid = zeros[stream], zeros[f"{stream}_valid"]
    assert not valid.all()
    hidden = ~valid.view(*valid.shape, *[1] * (value.dim() - 2))
    worst = {torch.float32: float("nan"), torch.uint8: 255, torch.int64: 10**9}[value.dtype]
    zeros[stream] = value.masked_fill(hidden, 0)
    garbage[stream] = value.masked_fill(hidden, worst)
    assert is_equal(run(model, zeros), run(model, garbage))


@each_stream
def test_garbage_at_invalid_positions_gives_finite_gradients(world, stream):
    model, shapes = make_world(world)
    inputs = make_batch(shapes)
    inputs[f"{stream}_valid"][:] = False
    if inputs[stream].is_floating_point():
        inputs[stream][:] = float("nan")
    losses_of(model.train(), inputs)["loss_total"].backward()
    bad = [
        n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    assert not bad


def test_swapping_the_cameras_changes_the_output():
    model, inputs = make_model(), make_batch()
    inputs["vision_right_valid"] = inputs["vision_left_valid"]
    left, right = inputs["vision_left"], inputs["vision_right"]
    swapped = inputs | {"vision_left": right, "vision_right": left}
    assert not is_equal(run(model, inputs), run(model, swapped))


def test_standing_still_is_the_first_prediction():
    model, inputs = make_model(is_random=False), make_batch()
    proprio, valid = inputs["proprio"].numpy(), inputs["proprio_valid"].numpy()
    valid[0, :7] = False  # no pose before tick 2
    valid[1, 9:15] = False  # ticks 3 and 4 repeat the pose of tick 2
    expected = np.zeros((2, 8, 3, 20), "f4")
    for row in range(2):
        for tick in range(8):
            known = [s for s in range(3 * tick + 3) if valid[row, s]]
            if known:
                expected[row, tick, :, :10] = proprio[row, known[-1], :10]
    np.testing.assert_array_equal(run(model, inputs)["animation"].numpy(), expected)


@pytest.mark.parametrize("head", ["gaze", "hand", "arm", "slow"])
def test_every_sensor_head_starts_by_standing_still(head):
    model, shapes = make_world("many", is_random=False)
    inputs, shape = make_batch(shapes), shapes.target_shape(head)
    values, valid = inputs[head].numpy(), inputs[f"{head}_valid"].numpy()
    valid[0, : 3 * shape.per_tick] = False
    sensor = model.sensors[module_key(head)]
    expected = np.zeros((2, 8, shape.per_tick, *shape.size), "f4")
    for row in range(2):
        for tick in range(8):
            known = [s for s in range((tick + 1) * shape.per_tick) if valid[row, s]]
            last = values[row, known[-1]] if known else sensor.initial().numpy()
            expected[row, tick] = np.where(_is_velocity(shape), 0, last)
    np.testing.assert_allclose(run(model, inputs)[head].numpy(), expected, atol=1e-6)


def _is_velocity(shape):
    return [group.type == "velocity" for group in shape.values for _ in range(group.count)]


@pytest.mark.parametrize("head", ["gaze", "hand"])
def test_predicted_rotations_and_directions_have_length_one(head):
    model, shapes = make_world("many")
    outputs, start = run(model, make_batch(shapes))[head], 0
    for group in shapes.target_shape(head).values:
        part = outputs[..., start : start + group.count]
        start += group.count
        if group.type in ("quaternion", "direction"):
            norms = part.unflatten(-1, (-1, group.vector_size)).norm(dim=-1)
            torch.testing.assert_close(norms, torch.ones_like(norms))


def test_without_proprio_the_animation_starts_at_zero():
    config = {"data": {"modalities": ["audio"]}, "model": MODEL}
    outputs = run(make_model(config, is_random=False), make_batch())
    assert not outputs["animation"].any()


@pytest.mark.parametrize("value_type", ["scalar", "position", "velocity"])
def test_the_unit_of_standardized_values_does_not_matter(value_type):
    values = {"count": 3, "type": value_type}
    streams = {"height": {"kind": "sensor", "key": "height", "values": [values]}}
    config = make_config(loss_weights={"height": 1})
    shapes = make_shapes(config, streams=streams)
    inputs, found = make_batch(shapes), []
    shift = 0.0 if value_type == "velocity" else 7.0
    for scale, offset in ((1.0, 0.0), (1000.0, shift)):
        model = make_model(config, shapes)
        mean, std = [offset + scale * 0.5] * 3, [scale * 2.0] * 3
        model.set_statistics({"height": {"count": 5, "mean": mean, "std": std}})
        scaled = {**inputs, "height": inputs["height"] * scale + offset}
        output, loss = run(model, scaled)["height"], losses_of(model, scaled)["loss_height"]
        found.append(((output - offset) / scale, loss.detach()))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_a_state_dict_has_the_statistics_and_makes_the_same_model():
    model, shapes = make_world("many")
    other = make_model(model.config, shapes, is_random=False)
    inputs = make_batch(shapes)
    assert not is_equal(run(model, inputs), run(other, inputs))
    missing = other.load_state_dict(model.state_dict())
    assert missing == ([], [])
    assert is_equal(run(model, inputs), run(other, inputs))
    assert torch.equal(other.target_std["hand"], model.target_std["hand"])


def test_streams_without_statistics_keep_their_scale():
    model, _ = make_world("many")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.set_statistics({"gaze": {"count": 0}, "unknown": {"count": 3}})
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_a_sensor_alone_makes_a_model():
    streams = {"gravity": GRAVITY}
    config = make_config({"model": MODEL}, loss_weights={"gravity": 1})
    shapes = make_shapes(config, streams=streams)
    model, inputs = make_model(config, shapes), make_batch(shapes)
    assert run(model, inputs)["gravity"].shape == (2, 8, 2, 3)
    losses_of(model.train(), inputs)["loss_total"].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["forward", "type", "pop", "keys_", "norm", "bias", "values", "update"]
)
def test_names_of_streams_collide_with_nothing(name):
    config = make_config(loss_weights={name: 1})
    streams = {**DEFAULT_STREAMS, name: GRAVITY}
    shapes = make_shapes(config, streams=streams)
    model, inputs = make_model(config, shapes, is_random=False), make_batch(shapes)
    first = run(model, inputs)[name]
    expected = torch.tensor([0.0, 0.0, 1.0])
    inputs[f"{name}_valid"][:] = False
    torch.testing.assert_close(run(model, inputs)[name], expected.expand_as(first))
    assert (model.encoder.norms[module_key(name)].weight == 8**-0.5).all()
    assert model.encoder.null[module_key(name)].any()


def test_cameras_of_one_size_share_positions_and_all_share_the_trunk():
    model, _ = make_world("many")
    assert {*model.encoder.frames.positions} == {"32x48", "16x16", "32x32"}
    assert {*model.encoder.frames.projections} == {"s_front", "s_back", "s_wrist"}
    assert {*make_model().encoder.frames.positions} == {"32x32"}


def test_a_frame_is_encoded_alike_by_columns_and_rows():
    """The patches of a frame that is wider than high keep their places."""
    model, _ = make_world("many")
    frames = torch.randn(1, 1, 3, 32, 48)
    encoder = model.encoder.frames
    patches = [
        frames[0, 0, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        for row in range(2)
        for column in range(3)
    ]
    x = torch.stack([encoder.patches(p.permute(1, 2, 0).flatten()) for p in patches])[None]
    x = x + encoder.positions["32x48"]
    for block in encoder.blocks:
        x, _ = block(x)
    expected = encoder.projections["s_front"](encoder.norm(x).mean(1))
    torch.testing.assert_close(encoder(frames, "front")[:, 0], expected)


def test_text_only_training_is_a_language_model_without_other_encoders():
    model = make_model(TEXT_ONLY)
    names = {module_key(name) for name in TEXTS}
    assert {*model.encoder.encoders} == {*model.encoder.norms} == {*model.predictors} == names
    assert model.encoder.frames is None


@pytest.mark.parametrize("num_ticks", [1, 5, 300])
def test_text_only_windows_can_have_any_length(num_ticks):
    inputs = make_batch(make_shapes(TEXT_ONLY, num_ticks=num_ticks))
    assert run(make_model(TEXT_ONLY), inputs)["internal_text"].shape == (2, num_ticks, 300)


@pytest.mark.parametrize("stream", DEFAULT_NAMES)
def test_a_model_of_one_stream_builds_and_runs(stream):
    model = make_model({"data": {"modalities": [stream]}, "model": MODEL})
    outputs = run(model, make_batch(streams=[stream]))
    assert {head: tuple(output.shape) for head, output in outputs.items()} == {
        "internal_text": (2, 8, 300),
        "external_text": (2, 8, 300),
        "audio": (2, 8, 5, 6, 16),
        "animation": (2, 8, 3, 20),
    }
    assert sum(1 for _ in model.encoder.encoders) + (model.encoder.frames is not None) == 1


def test_a_head_of_weight_zero_does_not_exist():
    config = {"training": {"loss_weights": {"audio": 0}}, "model": MODEL}
    heads = {"internal_text", "external_text", "animation"}
    assert {*run(make_model(config), make_batch())} == heads


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 10), ("small", 100), ("medium", 500), ("large", 1000)]
)
def test_sizes_have_about_the_promised_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = MultiModalCreature({"model": {"size": size}})
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.1)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, (512, 6, 8)),
        ({"hidden_dim": 128}, (128, 6, 2)),
        ({"size": "tiny"}, (256, 8, 4)),
        ({"size": "tiny", "num_layers": 2, "num_heads": 2}, (256, 2, 2)),
    ],
    ids=str,
)
def test_dimensions_come_from_size_or_single_keys(model, expected):
    with torch.device("meta"):
        built = MultiModalCreature({"model": model})
    num_heads = built.blocks[0].attention.num_heads
    assert (built.width, len(built.blocks), num_heads) == expected


@pytest.mark.parametrize(
    "model", [{"hidden_dim": 64, "num_heads": 5}, {"hidden_dim": 200}], ids=str
)
def test_heads_that_do_not_divide_the_width_are_refused_with_a_fix(model):
    with pytest.raises(ConfigError, match=r"model\.hidden_dim .* set `model\.num_heads: \d+`"):
        MultiModalCreature({"model": model})


def test_patches_that_do_not_divide_the_frame_are_refused():
    with pytest.raises(ConfigError, match=r"model\.patch_size 24 .* 32"):
        MultiModalCreature({"model": {**MODEL, "patch_size": 24}}, SHAPES)


def test_inputs_of_another_recipe_are_refused():
    inputs = make_batch()
    inputs["audio"], inputs["audio_valid"] = inputs["audio"][:, :32], inputs["audio_valid"][:, :32]
    with pytest.raises(ConfigError, match=r"whole number .* audio .*\(config, dataset\.shapes\)"):
        run(make_model(), inputs)


@pytest.mark.parametrize("stream", ["audio", "internal_text"])
def test_windows_that_were_not_joined_are_refused_with_the_collate_fn(stream):
    inputs = make_batch()
    for name in (stream, f"{stream}_valid"):
        inputs[name] = inputs[name][:, None]
    with pytest.raises(ConfigError, match=rf"{stream} has the shape .*=real_data_collate_fn"):
        run(make_model(), inputs)


def test_frames_of_another_size_are_refused():
    inputs = make_batch()
    inputs["vision_left"] = inputs["vision_left"][..., :16, :16, :]
    with pytest.raises(ConfigError, match="16 x 16 pixels, the model is made for 32 x 32"):
        run(make_model(), inputs)


def test_samples_of_another_number_of_values_are_refused():
    inputs = make_batch()
    inputs["proprio"] = inputs["proprio"][..., :14]
    with pytest.raises(ConfigError, match=r"proprio has 14 values .* made for 20; fix: make the"):
        run(make_model(), inputs)


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for is_on in (False, True):
        model = make_model({"model": {**MODEL, "gradient_checkpointing": is_on}}).train()
        blocks = [block for block in model.modules() if isinstance(block, Block)]
        assert len(blocks) > len(model.blocks)  # includes those of the frame encoder
        assert all(block.is_checkpointing is is_on for block in blocks)
        losses_of(model, make_batch())["loss_total"].backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_only_large_models_checkpoint_by_default():
    with torch.device("meta"):
        large = MultiModalCreature({"model": {"size": "large"}})
        medium = MultiModalCreature({"model": {"size": "medium"}})
    assert large.blocks[0].is_checkpointing
    assert not medium.blocks[0].is_checkpointing


def test_autocast_keeps_poses_in_float32_and_everything_close():
    model, inputs = make_model(), make_batch()
    exact = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(model, inputs)
    assert rough["animation"].dtype == torch.float32
    for head in HEADS:
        torch.testing.assert_close(rough[head].float(), exact[head], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("world", WORLDS)
def test_every_parameter_learns_from_a_full_batch(world):
    model, shapes = make_world(world)
    losses_of(model.train(), make_batch(shapes))["loss_total"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_same_seed_gives_the_same_weights():
    one, other = make_model().state_dict(), make_model().state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_thirty_steps_on_one_batch_lower_the_loss():
    model, inputs = make_model(is_random=False).train(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        loss = losses_of(model, inputs)["loss_total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0], history[::10]
