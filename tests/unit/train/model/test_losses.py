"""Losses against plain loops, masks, weights and accumulated gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import Head, as_train_config
from train.data.batch import WindowShapes
from train.model.losses import compute_losses, loss_counts, loss_sums, mean_losses

SHAPES = WindowShapes(
    num_ticks=6, num_audio_frames=12, mel_channels=4, num_sensor_samples=18, vocab_size=11
)
CONFIG = as_train_config(
    {
        "training": {"loss_weights": {"internal_text": 2, "audio": 0.5}},
        "model": {"pad_weight": 0.25},
    }
)
LOSSES = [f"loss_{head}" for head in Head]


def make_case(batch=3, seed=0, valid_share=0.7):
    """Random outputs, targets with NaN or garbage under the masks, and unequal weights."""
    rng = np.random.default_rng(seed)
    ticks, levels = SHAPES.num_ticks, SHAPES.mel_levels
    frames, channels = SHAPES.audio_frames_per_tick, SHAPES.mel_channels
    samples, size = SHAPES.sensor_samples_per_tick, SHAPES.proprio_size
    outputs = {
        "internal_text": rng.normal(size=(batch, ticks, SHAPES.vocab_size)),
        "external_text": rng.normal(size=(batch, ticks, SHAPES.vocab_size)),
        "audio": rng.normal(size=(batch, ticks, frames, channels, levels)),
        "animation": rng.normal(size=(batch, ticks, samples, size)) * 2,
    }
    targets = {
        "internal_text": rng.integers(0, SHAPES.vocab_size, (batch, ticks)),
        "external_text": rng.integers(0, 3, (batch, ticks)),
        "audio": rng.integers(0, levels, (batch, ticks * frames, channels), "u1"),
        "animation": rng.normal(size=(batch, ticks * samples, size)).astype("f4"),
    }
    for head in Head:
        valid = rng.random(targets[head].shape[:2]) < valid_share
        targets[head][~valid] = np.nan if head is Head.ANIMATION else 77
        targets[f"{head}_valid"] = valid
    weight = rng.choice([0.0, 0.5, 1.0], batch).astype("f4")
    weight[0] = 1
    tensors = {key: torch.from_numpy(value) for key, value in targets.items()}
    return (
        {key: torch.from_numpy(value).float() for key, value in outputs.items()},
        tensors,
        torch.from_numpy(weight),
    )


def rows(case, index):
    outputs, targets, weight = case
    return (
        {key: value[index] for key, value in outputs.items()},
        {key: value[index] for key, value in targets.items()},
        weight[index],
    )


def nats(logits, target):
    logits = logits.astype("f8")
    return np.log(np.exp(logits).sum()) - logits[target]


def text_oracle(outputs, targets, weight, head):
    total = count = 0.0
    for b in range(len(weight)):
        for t in range(SHAPES.num_ticks - 1):
            token = targets[head][b, t + 1]
            if targets[f"{head}_valid"][b, t + 1]:
                share = weight[b] * (0.25 if token == 0 else 1.0)
                total += share * nats(outputs[head][b, t], token)
                count += share
    return total / count


def audio_oracle(outputs, targets, weight):
    total = count = 0.0
    per_tick = SHAPES.audio_frames_per_tick
    for b in range(len(weight)):
        for frame in range(per_tick, SHAPES.num_audio_frames):
            if targets["audio_valid"][b, frame]:
                tick, index = divmod(frame, per_tick)
                for channel in range(SHAPES.mel_channels):
                    logits = outputs["audio"][b, tick - 1, index, channel]
                    total += weight[b] * nats(logits, targets["audio"][b, frame, channel])
                    count += weight[b]
    return total / count


def animation_oracle(outputs, targets, weight):
    angles, velocities, shares = [], [], []
    per_tick = SHAPES.sensor_samples_per_tick
    for b in range(len(weight)):
        for sample in range(per_tick, SHAPES.num_sensor_samples):
            if targets["animation_valid"][b, sample]:
                tick, index = divmod(sample, per_tick)
                pose = outputs["animation"][b, tick - 1, index].astype("f8")
                error = pose - targets["animation"][b, sample]
                angles.append((1 - np.cos(error[:10])).mean())
                far = np.abs(error[10:])
                velocities.append(np.where(far < 1, far**2 / 2, far - 0.5).mean())
                shares.append(weight[b])
    return np.average(angles, weights=shares) + np.average(velocities, weights=shares)


def oracle(case):
    outputs, targets, weight = case
    arrays = [{k: v.numpy() for k, v in tensors.items()} for tensors in (outputs, targets)]
    args = (*arrays, weight.numpy())
    losses = {
        "loss_internal_text": text_oracle(*args, "internal_text"),
        "loss_external_text": text_oracle(*args, "external_text"),
        "loss_audio": audio_oracle(*args),
        "loss_animation": animation_oracle(*args),
    }
    total = 2 * losses["loss_internal_text"] + losses["loss_external_text"]
    total += 0.5 * losses["loss_audio"] + losses["loss_animation"]
    return {"loss_total": total, **losses}


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_plain_loops(seed):
    case = make_case(seed=seed)
    losses = {key: loss.item() for key, loss in compute_losses(*case, config=CONFIG).items()}
    assert losses == pytest.approx(oracle(case), rel=1e-5)


def test_equal_logits_cost_the_logarithm_of_the_number_of_levels():
    outputs, targets, weight = make_case()
    outputs["audio"] = torch.zeros_like(outputs["audio"])
    loss = compute_losses(outputs, targets, weight, config=CONFIG)["loss_audio"]
    assert loss.item() == pytest.approx(np.log(16), rel=1e-6)


def test_the_first_tick_is_no_target_and_the_last_prediction_has_none():
    outputs, targets, weight = make_case()
    before = compute_losses(outputs, targets, weight, config=CONFIG)
    for head in Head:
        per_tick = targets[head].shape[1] // SHAPES.num_ticks
        targets[head][:, :per_tick] = 1
        targets[f"{head}_valid"][:, :per_tick] ^= True
        outputs[head][:, -1] += 5
    after = compute_losses(outputs, targets, weight, config=CONFIG)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_masked_values_change_nothing():
    outputs, targets, weight = make_case()
    before = compute_losses(outputs, targets, weight, config=CONFIG)
    for head in Head:
        targets[head][~targets[f"{head}_valid"]] = 0
    after = compute_losses(outputs, targets, weight, config=CONFIG)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_row_of_weight_zero_changes_nothing():
    case = make_case(batch=4)
    case[2][:] = torch.tensor([1.0, 0.0, 0.5, 0.0])
    padded = compute_losses(*case, config=CONFIG)
    without = compute_losses(*rows(case, [0, 2]), config=CONFIG)
    for key in padded:
        torch.testing.assert_close(padded[key], without[key])


@pytest.mark.parametrize("case", ["nothing is valid", "all rows are padding"])
def test_without_a_target_losses_are_zero_and_gradients_finite(case):
    outputs, targets, weight = make_case(valid_share=0 if case == "nothing is valid" else 0.7)
    weight = weight * 0 if case == "all rows are padding" else weight
    for output in outputs.values():
        output.requires_grad_()
    losses = compute_losses(outputs, targets, weight, config=CONFIG)
    losses["loss_total"].backward()
    assert all(loss.item() == 0 for loss in losses.values())
    assert all(not output.grad.any() for output in outputs.values())


def test_a_whole_turn_costs_nothing():
    outputs, targets, weight = make_case(valid_share=1)
    poses = targets["animation"].view(3, SHAPES.num_ticks, -1, SHAPES.proprio_size)
    outputs["animation"] = torch.roll(poses, -1, dims=1)
    outputs["animation"][..., :10] += 2 * np.pi
    loss = compute_losses(outputs, targets, weight, config=CONFIG)["loss_animation"]
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_only_active_heads_have_losses():
    config = as_train_config({"training": {"loss_weights": {"audio": 0, "animation": 0}}})
    outputs, targets, weight = make_case()
    texts = ("internal_text", "external_text")
    losses = compute_losses(
        {head: outputs[head] for head in texts},
        {key: value for key, value in targets.items() if key.startswith(texts)},
        weight,
        config=config,
    )
    assert {*losses} == {"loss_total", "loss_internal_text", "loss_external_text"}


def test_sums_of_two_halves_make_the_mean_of_the_whole():
    case = make_case(batch=8)
    halves = [loss_sums(*rows(case, half), config=CONFIG) for half in (slice(4), slice(4, 8))]
    sums = {
        name: tuple(
            torch.stack(parts).sum() for parts in zip(*(h[name] for h in halves), strict=True)
        )
        for name in LOSSES
    }
    losses = {key: loss.item() for key, loss in mean_losses(sums, config=CONFIG).items()}
    assert losses == pytest.approx(oracle(case), rel=1e-5)


def test_accumulating_two_batches_of_four_gives_the_gradient_of_eight():
    case = make_case(batch=8)
    whole, parts = [[o.clone().requires_grad_() for o in case[0].values()] for _ in range(2)]
    compute_losses(dict(zip(Head, whole, strict=True)), *case[1:], config=CONFIG)[
        "loss_total"
    ].backward()
    halves = [slice(4), slice(4, 8)]
    part_counts = [
        loss_counts(*rows(case, half)[1:], config=CONFIG, shapes=SHAPES) for half in halves
    ]
    counts = {name: part_counts[0][name] + part_counts[1][name] for name in LOSSES}
    for half in halves:
        outputs = {head: part[half] for head, part in zip(Head, parts, strict=True)}
        targets, weight = rows(case, half)[1:]
        compute_losses(outputs, targets, weight, config=CONFIG, counts=counts)[
            "loss_total"
        ].backward()
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), valid_share=st.floats(0, 1))
def test_counts_are_known_before_the_forward_pass(seed, valid_share):
    case = make_case(seed=seed, valid_share=valid_share)
    counts = loss_counts(*case[1:], config=CONFIG, shapes=SHAPES)
    sums = loss_sums(*case, config=CONFIG)
    assert all(torch.equal(counts[name], sums[name][1]) for name in LOSSES)


def test_losses_of_half_precision_outputs_are_computed_in_float32_under_autocast():
    outputs, targets, weight = make_case()
    halves = {head: output.bfloat16() for head, output in outputs.items()}
    exact = compute_losses(
        {head: half.float() for head, half in halves.items()}, targets, weight, config=CONFIG
    )
    with torch.autocast("cpu", torch.bfloat16):
        losses = compute_losses(halves, targets, weight, config=CONFIG)
    assert all(torch.equal(losses[key], exact[key]) for key in exact)
    assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_a_window_of_one_tick_has_nothing_to_predict():
    config = as_train_config({"training": {"loss_weights": {"audio": 0, "animation": 0}}})
    tokens, valid = torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
    texts = ("internal_text", "external_text")
    targets = {f"{t}{end}": v for t in texts for end, v in (("", tokens), ("_valid", valid))}
    outputs = {t: torch.randn(2, 1, 11) for t in texts}
    assert compute_losses(outputs, targets, torch.ones(2), config=config)["loss_total"].item() == 0


def test_padding_of_shorter_texts_changes_nothing():
    config = as_train_config({"training": {"loss_weights": {"audio": 0, "animation": 0}}})
    outputs, targets, weight = make_case()
    texts = ("internal_text", "external_text")
    outputs = {head: outputs[head] for head in texts}
    targets = {name: target for name, target in targets.items() if name.startswith(texts)}
    before = compute_losses(outputs, targets, weight, config=config)
    longer = {head: torch.cat([out, torch.randn(3, 4, 11)], dim=1) for head, out in outputs.items()}
    filled = {
        name: torch.cat([target, torch.zeros(3, 4, dtype=target.dtype)], dim=1)
        for name, target in targets.items()
    }
    after = compute_losses(longer, filled, weight, config=config)
    for name, loss in before.items():
        torch.testing.assert_close(after[name], loss)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_gradients_do_not_depend_on_masked_values(garbage):
    case = make_case()
    grads = []
    for filling in (0.0, garbage):
        outputs, targets, weight = case
        targets = {**targets, "animation": targets["animation"].clone()}
        targets["animation"][~targets["animation_valid"]] = filling
        leaves = {head: out.clone().requires_grad_() for head, out in outputs.items()}
        compute_losses(leaves, targets, weight, config=CONFIG)["loss_total"].backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert all(torch.isfinite(grad).all() for grad in grads[1])
