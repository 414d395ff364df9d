"""Losses against plain loops, masks, weights and accumulated gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.models import make_config, make_shapes, make_stream
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from shared.streams import DEFAULT_STREAMS, Kind
from train.model.losses import Objective, compute_losses, loss_counts, loss_sums, mean_losses

STREAMS = {
    **DEFAULT_STREAMS,
    "head": {
        "kind": "sensor",
        "key": "head",
        "rate_hz": 20,
        "values": [{"count": 3, "type": "position"}, {"count": 4, "type": "quaternion"}],
    },
}
CONFIG = make_config(
    {"model": {"pad_weight": 0.25}},
    num_ticks=6,
    loss_weights={"internal_text": 2, "audio": 0.5, "head": 3},
)
SHAPES = make_shapes(
    CONFIG,
    streams=STREAMS,
    audio={"dmel": {"rate_hz": 20, "fft_size": 256, "channels": 4}},
    text={"vocab_size": 264},
)
STD = {
    "animation": torch.cat([torch.ones(10), torch.linspace(0.3, 3, 10)]),
    "head": torch.cat([torch.tensor([0.5, 1.5, 2.5]), torch.ones(4)]),
}
OBJECTIVE = Objective.from_config(CONFIG, SHAPES, std=STD)
HEADS = SHAPES.heads
LOSSES = [f"loss_{head}" for head in HEADS]
SENSORS = ("animation", "head")
TEXTS = ("internal_text", "external_text")


def make_objective(*, num_ticks=6, **weights):
    """Make the objective of some heads of the default streams."""
    default = dict.fromkeys(("internal_text", "external_text", "audio", "animation"), 0)
    config = make_config(num_ticks=num_ticks, loss_weights={**default, **weights})
    return Objective.from_config(config, make_shapes(config, num_ticks=num_ticks))


def make_output(rng, shape, batch):
    """Draw the output of a head."""
    sizes = (batch, SHAPES.num_ticks)
    if shape.kind is Kind.TEXT:
        return rng.normal(size=(*sizes, shape.num_classes))
    if shape.kind is Kind.AUDIO:
        return rng.normal(size=(*sizes, shape.per_tick, *shape.size, shape.num_classes))
    return make_stream(rng, shape, batch).reshape(*sizes, shape.per_tick, -1)


def make_case(batch=3, seed=0, valid_share=0.7):
    """Random outputs, targets with NaN or garbage under the masks, and unequal weights."""
    rng = np.random.default_rng(seed)
    outputs, targets = {}, {}
    for head in HEADS:
        shape = SHAPES.target_shape(head)
        outputs[head] = make_output(rng, shape, batch)
        targets[head] = make_stream(rng, shape, batch)
        if head == "external_text":
            targets[head] %= 3
        valid = rng.random(targets[head].shape[:2]) < valid_share
        targets[head][~valid] = np.nan if shape.kind is Kind.SENSOR else 77
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
        for t in range(5):
            token = targets[head][b, t + 1]
            if targets[f"{head}_valid"][b, t + 1]:
                share = weight[b] * (0.25 if token == 0 else 1.0)
                total += share * nats(outputs[head][b, t], token)
                count += share
    return total / count


def audio_oracle(outputs, targets, weight):
    total = count = 0.0
    for b in range(len(weight)):
        for frame in range(2, 12):
            if targets["audio_valid"][b, frame]:
                tick, index = divmod(frame, 2)
                for channel in range(4):
                    logits = outputs["audio"][b, tick - 1, index, channel]
                    total += weight[b] * nats(logits, targets["audio"][b, frame, channel])
                    count += weight[b]
    return total / count


def smooth_l1(error):
    far = np.abs(error)
    return np.where(far < 1, far**2 / 2, far - 0.5)


def animation_error(output, target):
    error = output.astype("f8") - target
    velocities = smooth_l1(error[10:] / STD["animation"][10:].double().numpy())
    return (1 - np.cos(error[:10])).mean() + velocities.mean()


def head_error(output, target):
    position = smooth_l1((output[:3].astype("f8") - target[:3]) / STD["head"][:3].double().numpy())
    turn = Rotation.from_quat(output[3:]).inv() * Rotation.from_quat(target[3:])
    return position.mean() + np.sin(turn.magnitude() / 2) ** 2


def sensor_oracle(outputs, targets, weight, head, error):
    per_tick = SHAPES.target_shape(head).per_tick
    errors, shares = [], []
    for b in range(len(weight)):
        for sample in range(per_tick, 6 * per_tick):
            if targets[f"{head}_valid"][b, sample]:
                tick, index = divmod(sample, per_tick)
                errors.append(error(outputs[head][b, tick - 1, index], targets[head][b, sample]))
                shares.append(weight[b])
    return np.average(errors, weights=shares)


def oracle(case):
    outputs, targets, weight = case
    arrays = [{k: v.numpy() for k, v in tensors.items()} for tensors in (outputs, targets)]
    args = (*arrays, weight.numpy())
    losses = {
        "loss_internal_text": text_oracle(*args, "internal_text"),
        "loss_external_text": text_oracle(*args, "external_text"),
        "loss_audio": audio_oracle(*args),
        "loss_animation": sensor_oracle(*args, "animation", animation_error),
        "loss_head": sensor_oracle(*args, "head", head_error),
    }
    total = 2 * losses["loss_internal_text"] + losses["loss_external_text"]
    total += 0.5 * losses["loss_audio"] + losses["loss_animation"] + 3 * losses["loss_head"]
    return {"loss_total": total, **losses}


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_plain_loops(seed):
    case = make_case(seed=seed)
    losses = {key: loss.item() for key, loss in compute_losses(*case, objective=OBJECTIVE).items()}
    assert losses == pytest.approx(oracle(case), rel=1e-5)


def test_equal_logits_cost_the_logarithm_of_the_number_of_levels():
    outputs, targets, weight = make_case()
    outputs["audio"] = torch.zeros_like(outputs["audio"])
    loss = compute_losses(outputs, targets, weight, objective=OBJECTIVE)["loss_audio"]
    assert loss.item() == pytest.approx(np.log(16), rel=1e-6)


def test_the_first_tick_is_no_target_and_the_last_prediction_has_none():
    outputs, targets, weight = make_case()
    before = compute_losses(outputs, targets, weight, objective=OBJECTIVE)
    for head in HEADS:
        per_tick = targets[head].shape[1] // SHAPES.num_ticks
        targets[head][:, :per_tick] = 1
        targets[f"{head}_valid"][:, :per_tick] ^= True
        outputs[head][:, -1] += 5
    after = compute_losses(outputs, targets, weight, objective=OBJECTIVE)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_masked_values_change_nothing():
    outputs, targets, weight = make_case()
    before = compute_losses(outputs, targets, weight, objective=OBJECTIVE)
    for head in HEADS:
        targets[head][~targets[f"{head}_valid"]] = 0
    after = compute_losses(outputs, targets, weight, objective=OBJECTIVE)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_row_of_weight_zero_changes_nothing():
    case = make_case(batch=4)
    case[2][:] = torch.tensor([1.0, 0.0, 0.5, 0.0])
    padded = compute_losses(*case, objective=OBJECTIVE)
    without = compute_losses(*rows(case, [0, 2]), objective=OBJECTIVE)
    for key in padded:
        torch.testing.assert_close(padded[key], without[key])


@pytest.mark.parametrize("case", ["nothing is valid", "all rows are padding"])
def test_without_a_target_losses_are_zero_and_gradients_finite(case):
    outputs, targets, weight = make_case(valid_share=0 if case == "nothing is valid" else 0.7)
    weight = weight * 0 if case == "all rows are padding" else weight
    for output in outputs.values():
        output.requires_grad_()
    losses = compute_losses(outputs, targets, weight, objective=OBJECTIVE)
    losses["loss_total"].backward()
    assert all(loss.item() == 0 for loss in losses.values())
    assert all(not output.grad.any() for output in outputs.values())


def test_a_whole_turn_costs_nothing():
    outputs, targets, weight = make_case(valid_share=1)
    poses = targets["animation"].view(3, SHAPES.num_ticks, -1, 20)
    outputs["animation"] = torch.roll(poses, -1, dims=1)
    outputs["animation"][..., :10] += 2 * np.pi
    loss = compute_losses(outputs, targets, weight, objective=OBJECTIVE)["loss_animation"]
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_the_opposite_quaternion_is_the_same_rotation():
    outputs, targets, weight = make_case()
    before = compute_losses(outputs, targets, weight, objective=OBJECTIVE)["loss_head"]
    outputs["head"][..., 3:] *= -1
    after = compute_losses(outputs, targets, weight, objective=OBJECTIVE)["loss_head"]
    torch.testing.assert_close(after, before)


def test_without_statistics_errors_have_the_streams_units():
    case = make_case()
    plain = Objective.from_config(CONFIG, SHAPES)
    ones = {head: torch.ones_like(std) for head, std in STD.items()}
    expected = dataclasses.replace(OBJECTIVE, std=ones)
    losses = [compute_losses(*case, objective=each) for each in (plain, expected)]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in LOSSES)
    assert losses[0]["loss_head"] != compute_losses(*case, objective=OBJECTIVE)["loss_head"]


def test_only_active_heads_have_losses():
    objective = make_objective(internal_text=1, external_text=1)
    outputs, targets, weight = make_case()
    losses = compute_losses(
        {head: outputs[head] for head in TEXTS},
        {key: value for key, value in targets.items() if key.startswith(TEXTS)},
        weight,
        objective=objective,
    )
    assert {*losses} == {"loss_total", "loss_internal_text", "loss_external_text"}


def test_sums_of_two_halves_make_the_mean_of_the_whole():
    case = make_case(batch=8)
    halves = [loss_sums(*rows(case, half), objective=OBJECTIVE) for half in (slice(4), slice(4, 8))]
    sums = {
        name: tuple(
            torch.stack(parts).sum() for parts in zip(*(h[name] for h in halves), strict=True)
        )
        for name in LOSSES
    }
    losses = {key: loss.item() for key, loss in mean_losses(sums, objective=OBJECTIVE).items()}
    assert losses == pytest.approx(oracle(case), rel=1e-5)


def test_accumulating_two_batches_of_four_gives_the_gradient_of_eight():
    case = make_case(batch=8)
    whole, parts = [[o.clone().requires_grad_() for o in case[0].values()] for _ in range(2)]
    compute_losses(dict(zip(HEADS, whole, strict=True)), *case[1:], objective=OBJECTIVE)[
        "loss_total"
    ].backward()
    halves = [slice(4), slice(4, 8)]
    part_counts = [loss_counts(*rows(case, half)[1:], objective=OBJECTIVE) for half in halves]
    counts = {name: part_counts[0][name] + part_counts[1][name] for name in LOSSES}
    for half in halves:
        outputs = {head: part[half] for head, part in zip(HEADS, parts, strict=True)}
        targets, weight = rows(case, half)[1:]
        compute_losses(outputs, targets, weight, objective=OBJECTIVE, counts=counts)[
            "loss_total"
        ].backward()
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), valid_share=st.floats(0, 1))
def test_counts_are_known_before_the_forward_pass(seed, valid_share):
    case = make_case(seed=seed, valid_share=valid_share)
    counts = loss_counts(*case[1:], objective=OBJECTIVE)
    sums = loss_sums(*case, objective=OBJECTIVE)
    assert all(torch.equal(counts[name], sums[name][1]) for name in LOSSES)


def test_losses_of_half_precision_outputs_are_computed_in_float32_under_autocast():
    outputs, targets, weight = make_case()
    halves = {head: output.bfloat16() for head, output in outputs.items()}
    exact = compute_losses(
        {head: half.float() for head, half in halves.items()}, targets, weight, objective=OBJECTIVE
    )
    with torch.autocast("cpu", torch.bfloat16):
        losses = compute_losses(halves, targets, weight, objective=OBJECTIVE)
    assert all(torch.equal(losses[key], exact[key]) for key in exact)
    assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_a_window_of_one_tick_has_nothing_to_predict():
    objective = make_objective(internal_text=1, external_text=1)
    tokens, valid = torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
    targets = {f"{t}{end}": v for t in TEXTS for end, v in (("", tokens), ("_valid", valid))}
    outputs = {t: torch.randn(2, 1, 264) for t in TEXTS}
    losses = compute_losses(outputs, targets, torch.ones(2), objective=objective)
    assert losses["loss_total"].item() == 0


def test_padding_of_shorter_texts_changes_nothing():
    objective = make_objective(internal_text=1, external_text=1)
    outputs, targets, weight = make_case()
    outputs = {head: outputs[head] for head in TEXTS}
    targets = {name: target for name, target in targets.items() if name.startswith(TEXTS)}
    before = compute_losses(outputs, targets, weight, objective=objective)
    longer = {
        head: torch.cat([out, torch.randn(3, 4, 264)], dim=1) for head, out in outputs.items()
    }
    filled = {
        name: torch.cat([target, torch.zeros(3, 4, dtype=target.dtype)], dim=1)
        for name, target in targets.items()
    }
    after = compute_losses(longer, filled, weight, objective=objective)
    for name, loss in before.items():
        torch.testing.assert_close(after[name], loss)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_gradients_do_not_depend_on_masked_values(garbage):
    case = make_case()
    grads = []
    for filling in (0.0, garbage):
        outputs, targets, weight = case
        targets = {**targets, **{head: targets[head].clone() for head in SENSORS}}
        for head in SENSORS:
            targets[head][~targets[f"{head}_valid"]] = filling
        leaves = {head: out.clone().requires_grad_() for head, out in outputs.items()}
        compute_losses(leaves, targets, weight, objective=OBJECTIVE)["loss_total"].backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert all(torch.isfinite(grad).all() for grad in grads[1])
