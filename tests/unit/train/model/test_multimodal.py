"""The model: causality, masks, sizes, messages and gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.models import FAST_FRAMES, MODEL, SHAPES, is_equal, make_batch, make_model
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from shared.errors import ConfigError
from shared.recipe import STREAMS, TEXT_STREAMS, Stream
from train.config import Head
from train.data.pixels import to_model_inputs
from train.model.blocks import Block
from train.model.encoders import frames_due
from train.model.losses import compute_losses
from train.model.multimodal import MultiModalCreature

TEXT_ONLY = {"training": {"loss_weights": {"audio": 0, "animation": 0}}, "model": MODEL}
pytestmark = pytest.mark.usefixtures("one_thread")


def targets_of(inputs):
    keys = {Head.ANIMATION: Stream.PROPRIO}
    pairs = [(head, keys.get(head, head)) for head in Head if keys.get(head, head) in inputs]
    return {
        f"{head}{end}": inputs[f"{stream}{end}"] for head, stream in pairs for end in ("", "_valid")
    }


def losses_of(model, inputs):
    outputs = model(to_model_inputs(inputs))
    return compute_losses(outputs, targets_of(inputs), torch.ones(2), config=model.config)


def run(model, inputs):
    with torch.no_grad():
        return model(to_model_inputs(inputs))


def perturbed_after(inputs, stream, tick, shapes=SHAPES):
    """Inputs with other values and other validity of `stream` at all positions after a tick."""
    changed = {key: value.clone() for key, value in inputs.items()}
    value, valid = changed[stream], changed[f"{stream}_valid"]
    if stream in (Stream.VISION_LEFT, Stream.VISION_RIGHT):
        first = frames_due(shapes, first_tick=0, num_ticks=tick + 1).stop
    else:
        first = (tick + 1) * value.shape[1] // shapes.num_ticks
    value[:, first:] = make_batch(shapes, seed=99)[stream][:, first:]
    valid[:, first:] = ~valid[:, first:]
    return changed


def test_densely_packed_text_of_any_length_is_compiled_once_or_twice():
    """The second compilation has a variable length."""
    model, counter = MultiModalCreature(TEXT_ONLY, SHAPES), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for length in (20, 23, 31, 17, 40, 28):
        texts = {stream: torch.zeros(2, length, dtype=torch.int64) for stream in TEXT_STREAMS}
        valid = {f"{s}_valid": torch.ones(2, length, dtype=torch.bool) for s in TEXT_STREAMS}
        compiled({**texts, **valid})
    assert counter.frame_count == 2


@pytest.mark.parametrize("shapes", [SHAPES, FAST_FRAMES], ids=["slow_frames", "fast_frames"])
@pytest.mark.parametrize("stream", STREAMS)
def test_no_head_depends_on_the_future(stream, shapes):
    model, inputs = make_model(shapes=shapes), make_batch(shapes)
    before = run(model, inputs)
    for tick in (0, 3, 6):
        after = run(model, perturbed_after(inputs, stream, tick, shapes))
        assert is_equal(before, after, ticks=slice(0, tick + 1)), f"tick {tick}"


@pytest.mark.parametrize("stream", STREAMS)
def test_every_head_depends_on_the_present_and_the_past_of_every_stream(stream):
    model, inputs = make_model(), make_batch()
    before = run(model, inputs)
    # Ticks from 4 on differ; with a frame every second tick, tick 4 has a new one.
    after = run(model, perturbed_after(inputs, stream, 3))
    for head in Head:
        assert not torch.equal(before[head][:, 4], after[head][:, 4]), head
        assert not torch.equal(before[head][:, 7], after[head][:, 7]), head


@pytest.mark.parametrize("stream", STREAMS)
def test_without_the_causal_mask_heads_would_depend_on_the_future(stream, monkeypatch):
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attention(q, k, v)
    )
    model, inputs = make_model(), make_batch()
    before, after = run(model, inputs), run(model, perturbed_after(inputs, stream, 3))
    assert not is_equal(before, after, ticks=slice(0, 4))


@pytest.mark.parametrize("stream", STREAMS)
def test_an_absent_stream_equals_a_fully_invalid_one(stream):
    model, masked = make_model(), make_batch()
    masked[f"{stream}_valid"] = torch.zeros_like(masked[f"{stream}_valid"])
    absent = {k: v for k, v in masked.items() if k not in (stream, f"{stream}_valid")}
    assert is_equal(run(model, masked), run(model, absent))


@pytest.mark.parametrize("stream", STREAMS)
def test_each_stream_has_its_own_null_used_only_where_it_is_missing(stream):
    model, present = make_model(), make_batch()
    present[f"{stream}_valid"] = torch.ones_like(present[f"{stream}_valid"])
    missing = present | {f"{stream}_valid": torch.zeros_like(present[f"{stream}_valid"])}
    before = run(model, present), run(model, missing)
    with torch.no_grad():
        model.encoder.null[STREAMS.index(stream)] += 1
    after = run(model, present), run(model, missing)
    assert is_equal(before[0], after[0])
    assert not is_equal(before[1], after[1])


@pytest.mark.parametrize("stream", STREAMS)
def test_values_at_invalid_positions_change_nothing(stream):
    model, zeros = make_model(), make_batch()
    garbage = dict(zeros)
    value, valid = zeros[stream], zeros[f"{stream}_valid"]
    assert not valid.all()
    hidden = ~valid.view(*valid.shape, *[1] * (value.dim() - 2))
    worst = {torch.float32: float("nan"), torch.uint8: 255, torch.int64: 10**9}[value.dtype]
    zeros[stream] = value.masked_fill(hidden, 0)
    garbage[stream] = value.masked_fill(hidden, worst)
    assert is_equal(run(model, zeros), run(model, garbage))


@pytest.mark.parametrize("stream", STREAMS)
def test_garbage_at_invalid_positions_gives_finite_gradients(stream):
    model, inputs = make_model().train(), make_batch()
    inputs[f"{stream}_valid"][:] = False
    if inputs[stream].is_floating_point():
        inputs[stream][:] = float("nan")
    losses_of(model, inputs)["loss_total"].backward()
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


def test_without_proprio_the_animation_starts_at_zero():
    config = {"data": {"modalities": ["audio"]}, "model": MODEL}
    outputs = run(make_model(config, is_random=False), make_batch())
    assert not outputs["animation"].any()


def test_text_only_training_is_a_language_model_without_other_encoders():
    model = make_model(TEXT_ONLY)
    assert {*model.encoder.encoders} == {"internal_text", "external_text"}
    assert model.encoder.frames is None
    assert {*model.predictors} == {"internal_text", "external_text"}


@pytest.mark.parametrize("num_ticks", [1, 5, 300])
def test_text_only_windows_can_have_any_length(num_ticks):
    shapes = dataclasses.replace(SHAPES, num_ticks=num_ticks)
    inputs = make_batch(shapes, streams=TEXT_STREAMS)
    assert run(make_model(TEXT_ONLY), inputs)["internal_text"].shape == (2, num_ticks, 300)


@pytest.mark.parametrize("stream", STREAMS)
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
    inputs[stream] = inputs[stream][:, None]
    with pytest.raises(ConfigError, match=rf"{stream} has the shape .*=real_data_collate_fn"):
        run(make_model(), inputs)


def test_frames_of_another_size_are_refused():
    inputs = make_batch()
    inputs["vision_left"] = inputs["vision_left"][..., :16, :16, :]
    with pytest.raises(ConfigError, match="16 pixels, the model is made for 32"):
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
    for head in Head:
        torch.testing.assert_close(rough[head].float(), exact[head], atol=0.05, rtol=0.05)


def test_every_parameter_learns_from_a_full_batch():
    model = make_model().train()
    losses_of(model, make_batch())["loss_total"].backward()
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
