"""The optimizer, its schedule and clipping, and the rule that skips steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.training import (
    BrokenLoader,
    largest_difference,
    make_config,
    make_trainer,
    weights_of,
    with_spike,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DivergedError
from train.config import OptimizerConfig, TrainingConfig
from train.loop.optim import (
    MIN_RISES,
    MIN_STEPS,
    WINDOW_STEPS,
    SpikeWatch,
    clip_gradient,
    learning_rate,
    make_optimizer,
    step_if,
)
from train.machine import runtime

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@given(
    warmup=st.integers(0, 50), decay=st.integers(1, 200), ratio=st.floats(0, 1), step=st.integers(0)
)
def test_the_learning_rate_is_a_warm_up_and_a_cosine(warmup, decay, ratio, step):
    optimizer = OptimizerConfig(lr=3e-4, warmup_steps=warmup, min_lr_ratio=ratio)
    config = TrainingConfig(max_steps=warmup + decay, optimizer=optimizer)
    rising = 3e-4 * np.arange(1, warmup + 1) / max(1, warmup)
    phase = np.linspace(0, np.pi, decay + 1)
    falling = 3e-4 * ratio + 3e-4 * (1 - ratio) * (np.cos(phase) + 1) / 2
    step %= warmup + decay
    expected = np.concatenate([rising, falling])[step]
    assert learning_rate(step, config) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_gradient_is_clipped_to_the_norm_and_its_norm_before_is_returned():
    layer = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(layer, OptimizerConfig())
    (100 * layer(torch.ones(1, 3)).sum()).backward()
    before = np.concatenate([p.grad.numpy().ravel() for p in layer.parameters()])
    scaler = runtime.make_scaler(CPU, torch.float32)
    norm = clip_gradient(optimizer, scaler, max_norm=0.5)
    after = np.concatenate([p.grad.numpy().ravel() for p in layer.parameters()])
    assert float(norm) == pytest.approx(np.linalg.norm(before), rel=1e-6)
    np.testing.assert_allclose(after, before * 0.5 / np.linalg.norm(before), rtol=1e-4)


def test_only_matrices_decay():
    layer = torch.nn.Linear(3, 2)
    decays = {
        tuple(p.shape): group["weight_decay"]
        for group in make_optimizer(layer, OptimizerConfig(weight_decay=0.3)).param_groups
        for p in group["params"]
    }
    assert decays == {(2, 3): 0.3, (2,): 0.0}


def test_the_optimizer_takes_the_steps_of_adamw_as_published():
    layer = torch.nn.Linear(1, 1, bias=False)
    weight, mean, square = layer.weight.item(), 0.0, 0.0
    config = OptimizerConfig(lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    optimizer = make_optimizer(layer, config)
    for step, gradient in enumerate([1.0, -0.5, 2.0], start=1):
        layer.weight.grad = torch.tensor([[gradient]])
        step_if(torch.tensor(True), optimizer, runtime.make_scaler(CPU, torch.float32))
        mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        corrected = mean / (1 - 0.8**step) / ((square / (1 - 0.9**step)) ** 0.5 + 1e-8)
        weight = weight - 0.1 * 0.2 * weight - 0.1 * corrected
    assert layer.weight.item() == pytest.approx(weight, rel=1e-5)


def test_a_bad_step_in_half_precision_is_skipped_though_its_gradient_is_finite():
    layer = torch.nn.Linear(2, 1)
    optimizer, scaler = make_optimizer(layer, OptimizerConfig()), torch.amp.GradScaler("cpu")
    before = layer.weight.clone()
    for is_good in (False, True):
        scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
        clip_gradient(optimizer, scaler, max_norm=1.0)
        step_if(torch.tensor(is_good), optimizer, scaler)
        assert torch.equal(layer.weight, before) != is_good
    assert scaler.get_scale() == 2.0**16


def test_an_overflow_in_half_precision_halves_the_scale():
    layer = torch.nn.Linear(2, 1)
    optimizer, scaler = make_optimizer(layer, OptimizerConfig()), torch.amp.GradScaler("cpu")
    scaler.scale(layer(torch.ones(1, 2)).sum() * torch.inf).backward()
    norm = clip_gradient(optimizer, scaler, max_norm=1.0)
    step_if(torch.isfinite(norm), optimizer, scaler)
    assert scaler.get_scale() == 2.0**15


def judge_all(watch, curve):
    return [bool(watch.judge(torch.tensor(loss), torch.tensor(norm))) for loss, norm in curve]


def slow_rule(curve, sigma):
    """The rule, one step at a time over plain lists."""
    memory, verdicts = [], []
    for now in curve:
        limits = [math.inf, math.inf]
        newest = [pair for pair in memory[-WINDOW_STEPS:] if pair is not None]
        if len(newest) >= MIN_STEPS:
            for k in (0, 1):
                logs = np.log([pair[k] for pair in newest])
                rise = max(sigma * logs.std(), math.log(1 + MIN_RISES[k]))
                limits[k] = math.exp(logs.mean() + rise)
        is_finite = all(math.isfinite(x) for x in now)
        memory.append(
            tuple(min(x, limit) for x, limit in zip(now, limits, strict=True))
            if is_finite
            else None
        )
        verdicts.append(is_finite and all(x <= limit for x, limit in zip(now, limits, strict=True)))
    return verdicts


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), sigma=st.sampled_from([2.0, 6.0]))
def test_steps_are_judged_as_the_slow_rule_says(seed, sigma):
    rng = np.random.default_rng(seed)
    losses, norms = rng.normal(2, 0.1, 300), rng.lognormal(0, 0.3, 300)
    for places, values in ((losses, [9.0, math.nan]), (norms, [40.0, math.inf])):
        places[rng.integers(0, 300, 12)] = rng.choice(values, 12)
    curve = list(zip(losses.tolist(), norms.tolist(), strict=True))
    assert judge_all(SpikeWatch(sigma, CPU), curve) == slow_rule(curve, sigma)


def test_without_sigma_every_finite_step_is_taken():
    curve = [(1.0, 1.0)] * 100 + [(1e6, 1.0), (1.0, 1e6), (math.nan, 1.0), (1.0, math.inf)]
    assert judge_all(SpikeWatch(None, CPU), curve) == [True] * 102 + [False] * 2


def test_a_loss_that_hardly_varies_may_rise_a_little():
    assert all(judge_all(SpikeWatch(6.0, CPU), [(1.0, 1.0)] * 100 + [(1.2, 1.9)]))


def test_a_level_that_moved_a_little_is_accepted_and_one_far_away_is_not():
    rng = np.random.default_rng(0)
    before = [(float(x), 1.0) for x in rng.normal(1, 0.1, 128)]
    moved = judge_all(SpikeWatch(6.0, CPU), [*before, *[(2.2, 1.0)] * 10])[128:]
    far = judge_all(SpikeWatch(6.0, CPU), [*before, *[(9.0, 1.0)] * 10])[128:]
    assert not moved[0]
    assert moved[-1]
    assert not any(far)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_spike_changes_no_weight_and_is_counted(tmp_path, precision):
    config = make_config(tmp_path, max_steps=80, log_interval=80, precision=precision)
    trainer = make_trainer(config, BrokenLoader({80}, with_spike))
    trainer.train()
    before = weights_of(trainer)
    longer = make_config(tmp_path, max_steps=81, log_interval=1, precision=precision)
    resumed = make_trainer(longer, BrokenLoader({80}, with_spike))
    resumed.load_checkpoint(tmp_path / "checkpoints/model_final.pt")
    assert resumed.train().skipped_steps == 1
    assert torch.equal(weights_of(resumed), before)


def test_a_resumed_run_skips_the_same_spikes(tmp_path):
    config = make_config(tmp_path, max_steps=75, save_interval=70)
    whole = make_trainer(config, BrokenLoader({72}, with_spike))
    assert whole.train().skipped_steps == 1
    resumed = make_trainer(config, BrokenLoader({72}, with_spike))
    resumed.load_checkpoint(tmp_path / "checkpoints/model_step_70.pt")
    assert resumed.train().skipped_steps == 1
    assert largest_difference(whole, resumed) == 0.0


def test_ten_spikes_in_a_row_stop_the_run_with_the_walkthroughs_advice(tmp_path):
    trainer = make_trainer(
        make_config(tmp_path, max_steps=99), BrokenLoader(range(70, 99), with_spike)
    )
    with pytest.raises(
        DivergedError, match=r"far above.*spike_sigma.*10 steps in a row.*Reduce LR.*corrupted data"
    ):
        trainer.train()
    assert trainer.step == 80


def test_ordinary_batches_are_no_spikes(tmp_path):
    assert make_trainer(make_config(tmp_path, max_steps=150)).train().skipped_steps == 0


def test_the_memory_of_steps_is_saved_and_loaded():
    watch = SpikeWatch(6.0, CPU)
    judge_all(watch, [(1.0, 1.0)] * 100)
    again = SpikeWatch(6.0, CPU)
    again.load_state_dict(watch.state_dict())
    assert judge_all(again, [(5.0, 1.0)]) == judge_all(watch, [(5.0, 1.0)]) == [False]
