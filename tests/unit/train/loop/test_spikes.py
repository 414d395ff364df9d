"""Steps that are left out because their loss or gradient is far above those before."""

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
    with_leap,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DivergedError
from train.loop.optim import MIN_RISES, MIN_STEPS, WINDOW_STEPS, SpikeWatch

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def judged(watch, curve):
    return [bool(watch.judge(torch.tensor(loss), torch.tensor(norm))) for loss, norm in curve]


def slow_judgement(curve, sigma):
    """The rule, one step at a time over plain lists."""
    remembered, verdicts = [], []
    for now in curve:
        limits = [math.inf, math.inf]
        newest = [pair for pair in remembered[-WINDOW_STEPS:] if pair is not None]
        if len(newest) >= MIN_STEPS:
            for k in (0, 1):
                logs = np.log([pair[k] for pair in newest])
                rise = max(sigma * logs.std(), math.log(1 + MIN_RISES[k]))
                limits[k] = math.exp(logs.mean() + rise)
        is_finite = all(math.isfinite(x) for x in now)
        remembered.append(
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
    assert judged(SpikeWatch(sigma, CPU), curve) == slow_judgement(curve, sigma)


def test_without_sigma_every_finite_step_is_taken():
    curve = [(1.0, 1.0)] * 100 + [(1e6, 1.0), (1.0, 1e6), (math.nan, 1.0), (1.0, math.inf)]
    assert judged(SpikeWatch(None, CPU), curve) == [True] * 102 + [False] * 2


def test_a_loss_that_hardly_varies_may_rise_a_little():
    assert all(judged(SpikeWatch(6.0, CPU), [(1.0, 1.0)] * 100 + [(1.2, 1.9)]))


def test_a_level_that_moved_a_little_is_accepted_and_one_far_away_is_not():
    rng = np.random.default_rng(0)
    before = [(float(x), 1.0) for x in rng.normal(1, 0.1, 128)]
    moved = judged(SpikeWatch(6.0, CPU), [*before, *[(2.2, 1.0)] * 10])[128:]
    far = judged(SpikeWatch(6.0, CPU), [*before, *[(9.0, 1.0)] * 10])[128:]
    assert not moved[0]
    assert moved[-1]
    assert not any(far)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_spike_changes_no_weight_and_is_counted(tmp_path, precision):
    config = make_config(tmp_path, max_steps=80, log_interval=80, precision=precision)
    trainer = make_trainer(config, BrokenLoader({80}, with_leap))
    trainer.train()
    before = weights_of(trainer)
    longer = make_config(tmp_path, max_steps=81, log_interval=1, precision=precision)
    resumed = make_trainer(longer, BrokenLoader({80}, with_leap))
    resumed.load_checkpoint(tmp_path / "checkpoints/model_final.pt")
    assert resumed.train().skipped_steps == 1
    assert torch.equal(weights_of(resumed), before)


def test_a_resumed_run_leaves_out_the_same_spikes(tmp_path):
    config = make_config(tmp_path, max_steps=75, save_interval=70)
    whole = make_trainer(config, BrokenLoader({72}, with_leap))
    assert whole.train().skipped_steps == 1
    resumed = make_trainer(config, BrokenLoader({72}, with_leap))
    resumed.load_checkpoint(tmp_path / "checkpoints/model_step_70.pt")
    assert resumed.train().skipped_steps == 1
    assert largest_difference(whole, resumed) == 0.0


def test_ten_spikes_in_a_row_stop_the_run_with_the_walkthroughs_advice(tmp_path):
    trainer = make_trainer(
        make_config(tmp_path, max_steps=99), BrokenLoader(range(70, 99), with_leap)
    )
    with pytest.raises(
        DivergedError, match=r"far above.*spike_sigma.*10 steps in a row.*Reduce LR.*corrupted data"
    ):
        trainer.train()
    assert trainer.step == 80


def test_ordinary_batches_are_no_spikes(tmp_path):
    assert make_trainer(make_config(tmp_path, max_steps=150)).train().skipped_steps == 0


def test_what_is_remembered_is_saved_and_loaded():
    watch = SpikeWatch(6.0, CPU)
    judged(watch, [(1.0, 1.0)] * 100)
    again = SpikeWatch(6.0, CPU)
    again.load_state_dict(watch.state_dict())
    assert judged(again, [(5.0, 1.0)]) == judged(watch, [(5.0, 1.0)]) == [False]
