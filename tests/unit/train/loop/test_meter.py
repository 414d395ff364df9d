"""Means between logs, the speed, and gradient norms of a model's parts."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from helpers.training import SHAPES, make_batch, make_config, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from train.loop.meter import StepMeter, gradient_norms, model_part
from train.machine import runtime
from train.model.losses import compute_losses
from train.model.multimodal import MultiModalCreature


def add_step(meter, *, loss=1.0, num_samples=1.0, is_good=True):
    loss = torch.tensor(loss)
    meter.add(
        {"loss_total": loss},
        grad_norm=loss,
        is_good=torch.tensor(is_good),
        num_samples=torch.tensor(num_samples),
    )


def test_the_speed_counts_samples_and_not_padding():
    meter = StepMeter(torch.device("cpu"))
    began_s = time.perf_counter()
    for _ in range(4):
        add_step(meter, num_samples=2.0)
    time.sleep(0.2)
    speed = meter.take([])["samples_per_sec"]
    assert speed == pytest.approx(8 / (time.perf_counter() - began_s), rel=0.1)


def test_work_launched_before_a_pause_counts_as_training(monkeypatch):
    monkeypatch.setattr(runtime, "synchronize", lambda _: time.sleep(0.2))
    meter = StepMeter(torch.device("cpu"))
    add_step(meter)
    with meter.pause():
        pass
    assert meter.take([0.0])["samples_per_sec"] < 1 / 0.2


def test_pauses_do_not_lower_the_speed():
    meter = StepMeter(torch.device("cpu"))
    add_step(meter)
    time.sleep(0.02)
    with meter.pause():
        time.sleep(0.4)
    assert 1 / 0.2 < meter.take([])["samples_per_sec"] <= 1 / 0.02


def test_bad_steps_enter_no_mean():
    meter = StepMeter(torch.device("cpu"))
    add_step(meter, loss=1.0)
    add_step(meter, loss=math.nan, is_good=False)
    add_step(meter, loss=3.0)
    metrics = meter.take([])
    assert (metrics["loss_total"], metrics["skipped_steps"]) == (2.0, 1.0)
    assert meter.first_losses() == {"loss_total": 2.0}


def test_waits_are_reported_as_share_and_percentiles():
    meter = StepMeter(torch.device("cpu"))
    waits_s = np.random.default_rng(0).exponential(0.001, size=100)
    time.sleep(0.2)
    metrics = meter.take(list(waits_s))
    for quantile in (50, 95, 99):
        expected = 1e3 * np.quantile(waits_s, quantile / 100)
        assert metrics[f"data_wait_ms_p{quantile}"] == pytest.approx(expected)
    assert 0 < metrics["data_wait_fraction"] <= waits_s.sum() / 0.2


def test_each_part_has_the_root_of_the_sum_of_its_squares(tmp_path):
    torch.manual_seed(0)
    model, batch = MultiModalCreature(make_config(tmp_path), SHAPES), make_batch(0)
    losses = compute_losses(
        model(batch["inputs"]), batch["targets"], batch["weight"], objective=model.objective
    )
    losses["loss_total"].backward()
    modules = {
        "encoder_audio": [model.encoder.encoders["s_audio"]],
        "head_external_text": [model.predictors["s_external_text"]],
        "backbone": [model.blocks, model.norm],
    }
    norms = gradient_norms(model)
    for part, members in modules.items():
        gradients = [p.grad.numpy().ravel() for m in members for p in m.parameters()]
        expected = np.linalg.norm(np.concatenate(gradients).astype(np.float64))
        assert norms[f"grad_norm/{part}"] == pytest.approx(expected, rel=1e-5)
    whole = [p.grad.numpy().ravel() for p in model.parameters() if p.grad is not None]
    total = np.linalg.norm(np.concatenate(whole).astype(np.float64))
    assert math.hypot(*norms.values()) == pytest.approx(total, rel=1e-5)


def test_every_model_part_a_model_that_sees_everything_has_its_name():
    with torch.device("meta"):
        model = MultiModalCreature({})
    encoders = ("audio", "touch", "proprio", "internal_text", "external_text")
    heads = ("internal_text", "external_text", "audio", "animation")
    parts = [f"encoder_{e}" for e in encoders] + [f"head_{h}" for h in heads]
    parts += ["frames", "fusion", "backbone"]
    assert {model_part(name) for name, _ in model.named_parameters()} == set(parts)


def test_the_parts_of_another_model_are_its_members():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model(torch.ones(1, 2)).sum().backward()
    assert set(gradient_norms(model)) == {"grad_norm/0", "grad_norm/1"}


def test_a_model_without_gradients_has_no_norms():
    assert gradient_norms(nn.Linear(1, 1)) == {}


def test_tensorboard_has_the_norms_of_each_logged_step(tmp_path):
    config = make_config(tmp_path, log_interval=1, max_steps=2, grad_clip=1e9)
    summary = make_trainer(config).train()
    events = EventAccumulator(str(summary.log_dir)).Reload()
    parts = [name for name in events.Tags()["scalars"] if name.startswith("grad_norm/")]
    for index, whole in enumerate(events.Scalars("grad_norm")):
        values = [events.Scalars(part)[index].value for part in parts]
        assert math.hypot(*values) == pytest.approx(whole.value, rel=1e-5)
