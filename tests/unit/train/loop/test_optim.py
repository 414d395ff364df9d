from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.config import OptimizerConfig, TrainingConfig
from train.loop.optim import clip_gradient, learning_rate, make_optimizer, step_if
from train.machine import runtime

CPU = torch.device("cpu")


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


def test_a_step_in_half_precision_is_left_out_though_its_gradient_is_finite():
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
