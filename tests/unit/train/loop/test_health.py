"""Health rules: what they find in curves, what they ignore, and what they report."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from experiments.health_rules import CASES, MAX_ACCUSED, MIN_FOUND, share_found
from helpers.training import make_batch, make_config, make_trainer, read_events, text_of, with_nan
from rich.console import Console

from train.loop import health
from train.loop.health import HealthWatch, LogPoint, apply_rules
from train.loop.run_log import RunLog

FALLING = np.geomspace(8.0, 1.0, 12)
FLAT = np.full(12, 5.0)
pytestmark = pytest.mark.usefixtures("one_thread")


def curve(**metrics):
    """A history of one log per 100 steps, from equally long curves."""
    rows = zip(*metrics.values(), strict=True)
    return [
        LogPoint(step=100 * i, metrics={k: float(v) for k, v in zip(metrics, row, strict=True)})
        for i, row in enumerate(rows, start=1)
    ]


def noisy(values, *, scale=0.05, seed=0):
    return values + np.random.default_rng(seed).normal(scale=scale, size=len(values))


BROKEN = {
    "not finite": ({"loss_total": [1.0, 1.0, math.nan]}, "Reduce LR"),
    "overflows": (
        {"loss_total": [2.0, math.nan], "fp16_overflows": [0.0, 4.0]},
        "training.precision: bf16",
    ),
    "no decrease": ({"loss_total": noisy(FLAT)}, "Model/data mismatch, check shapes"),
    "rising": ({"loss_total": [9.0, 7.0, 5.0, *np.geomspace(2, 4, 12)]}, "Reduce LR"),
    "plateau": ({"loss_total": [9.0, 7.0, *FLAT]}, "Check learning rate, data quality"),
    "internal text": ({"loss_internal_text": [3.1] * 3}, "Check text tokenization"),
    "audio": ({"loss_audio": [2.6] * 3}, "Check audio normalization"),
    "one rises": (
        {"loss_animation": noisy(FALLING[::-1]), "loss_audio": noisy(FALLING)},
        "Check that modality's data",
    ),
    "uneven": (
        {"loss_animation": noisy(FLAT), "loss_audio": noisy(FALLING)},
        "Adjust loss weights",
    ),
    "slow": ({"samples_per_sec": [4.0] * 3}, "precision: bf16"),
    "waiting for data": ({"data_wait_fraction": [0.6] * 3}, "raise data.num_workers"),
    "memory": ({"memory_allocated_mb": [22_001.0] * 3}, "Reduce batch size"),
}
"""Per rule curves that break it alone, and words of the walkthrough's advice."""


def test_every_rule_has_its_curves_here():
    assert [*BROKEN] == [*CASES] == [rule.name for rule in health.RULES]


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_gives_the_walkthroughs_advice(rule):
    metrics, advice = BROKEN[rule]
    (finding,) = apply_rules(curve(**metrics))
    assert finding.rule == rule
    assert advice in finding.advice
    assert finding.metric in str(finding)


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_reports_in_the_terminal_and_in_tensorboard(tmp_path, rule):
    metrics, advice = BROKEN[rule]
    screen = io.StringIO()
    console = Console(file=screen, width=400)
    with RunLog(tmp_path, max_steps=2000, quiet_steps=0, console=console) as log:
        for point in curve(**metrics):
            log.write_metrics(point.step, point.metrics)
    assert advice in screen.getvalue()
    assert advice in text_of(tmp_path, "health")


def test_skipped_steps_are_a_finding():
    (finding,) = apply_rules(curve(skipped_steps=[0.0, 0.0, 2.0]))
    assert "check for corrupted data" in finding.advice


@pytest.mark.parametrize(
    "metrics",
    [{"loss_total": FLAT}, {"loss_animation": FLAT, "loss_audio": FALLING}],
    ids=["no decrease", "uneven"],
)
def test_a_resumed_run_is_not_blamed_for_what_it_learned_before(metrics):
    early = curve(**metrics)
    late = [LogPoint(step=p.step + 50_000, metrics=p.metrics) for p in early]
    assert apply_rules(early)
    assert {finding.rule for finding in apply_rules(late)} <= {"plateau"}


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss_internal_text": [1.9] * 3, "loss_audio": [1.4] * 3},
        {"loss_internal_text": [3.0] * 3, "loss_audio": [2.5] * 3, "samples_per_sec": [5.0] * 3},
        {"samples_per_sec": [50.0, 4.0, 50.0, 4.0], "memory_allocated_mb": [22_000.0] * 4},
        {"loss_total": noisy(FALLING)},
        {"loss_total": noisy(FLAT[:9])},
        {"loss_total": [9.0, 7.0, *noisy(FLAT)], "lr": [1.0] * 4 + [0.1] * 10},
        {"loss_animation": noisy(FALLING, seed=1), "loss_audio": noisy(FALLING, seed=2)},
        {"loss_animation": noisy(FLAT[:9], scale=0.5), "loss_external_text": noisy(FALLING[:9])},
        {"loss_animation": noisy(FALLING), "loss_audio": noisy(FALLING * 0 + 0.0, scale=0)},
        {"loss_total": [math.inf], "val/loss_audio": [2.5]},
        {"loss_animation": FALLING[::-1][:9], "loss_external_text": FALLING[:9]},
        {"loss_animation": noisy(FLAT), "loss_external_text": noisy(FLAT, seed=1)},
        {"skipped_steps": [0.0] * 3, "fp16_overflows": [0.0, 2.0, 1.0]},
    ],
)
def test_healthy_curves_have_no_finding(metrics):
    assert apply_rules(curve(**metrics)) == []


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_finds_noisy_sick_runs_and_leaves_healthy_ones_alone(rule):
    case = CASES[rule]
    assert share_found(rule, case.sick, num_runs=10, noise=case.noise) >= MIN_FOUND
    assert share_found(rule, case.healthy, num_runs=50, noise=case.noise) <= MAX_ACCUSED


def test_a_rising_loss_is_found_in_noise_and_a_flat_one_seldom_accused():
    others = {"loss_animation": 2 * np.exp(-np.arange(20) / 40)}
    rising = {"loss_audio": 3 * (1 + 0.01 * np.arange(20)), **others}
    flat = {"loss_audio": np.full(20, 3.0), **others}
    assert share_found("one rises", rising) > 0.9
    assert share_found("one rises", flat) < 0.1


def test_two_rising_heads_are_not_reported_as_one():
    rising = FALLING[::-1]
    findings = apply_rules(
        curve(loss_animation=rising, loss_audio=rising / 8, loss_external_text=FALLING)
    )
    assert [finding.rule for finding in findings] == ["uneven"]


AT_ITS_FLOOR = np.full(20, 0.01)


def test_a_head_at_its_floor_hides_no_rising_one():
    """Its loss only jitters, so that it falls in one half of the logs and rises in the other."""
    rising = {"loss_audio": np.linspace(1, 2, 20), "loss_animation": np.linspace(1.2, 0.5, 20)}
    found = share_found("one rises", {**rising, "loss_external_text": AT_ITS_FLOOR}, num_runs=50)
    assert found > 0.9
    still = {**rising, "loss_audio": np.full(20, 1.0), "loss_external_text": AT_ITS_FLOOR}
    assert share_found("one rises", still, num_runs=50) < 0.1


def test_a_total_loss_that_rises_after_a_fall_is_reported_as_rising():
    curves = {"loss_total": np.array([9.0, 7, 5, 3, 2, *np.linspace(2, 4, 25)])}
    assert share_found("rising", curves, num_runs=50) > 0.9
    history = curve(**curves)
    late = {f.rule for end in range(18, 31) for f in apply_rules(history[:end])}
    assert late == {"rising"}


@pytest.mark.parametrize("total", [np.full(60, 5.0), 9 * np.arange(1, 61.0) ** -0.3])
def test_a_total_loss_that_is_constant_or_falls_is_seldom_reported_as_rising(total):
    assert share_found("rising", {"loss_total": total}, num_runs=50) < 0.1


def test_a_rising_head_that_lifts_the_sum_is_named_alone():
    one = {"loss_audio": np.linspace(1, 4, 15), "loss_animation": np.linspace(1.2, 0.5, 15)}
    findings = apply_rules(curve(**one, loss_total=one["loss_audio"] + one["loss_animation"]))
    assert [f.rule for f in findings if f.rule != "audio"] == ["one rises", "no decrease"][::-1]


def resumed(at, losses):
    """A history of logs every 100 steps after a resume."""
    return [LogPoint(step=at + 100 * i, metrics={"loss_total": x}) for i, x in enumerate(losses, 1)]


def test_a_resumed_run_that_learns_nothing_is_found_when_its_steps_have_doubled():
    rules = [
        {finding.rule for finding in apply_rules(resumed(3000, np.full(length, 5.0)))}
        for length in (9, 29, 32)
    ]
    assert rules == [set(), {"plateau"}, {"no decrease"}]


@pytest.mark.parametrize("at", [2000, 5000, 20_000])
def test_a_resumed_run_that_falls_as_a_power_of_its_steps_is_healthy(at):
    steps = at + 100 * np.arange(1, at // 50)
    losses = 9 * (steps / 100.0) ** -0.1
    rng = np.random.default_rng(at)
    history = resumed(at, losses * (1 + 0.003 * rng.normal(size=len(losses))))
    found = {f.rule for end in range(1, len(history), 7) for f in apply_rules(history[:end])}
    assert "no decrease" not in found


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("val/loss_audio", 2.6, "val/loss_audio is 2.6, above 2.5"),
        ("val/loss_internal_text", 3.5, "val/loss_internal_text is 3.5"),
        ("val/loss_total", math.nan, "val/loss_total is NaN"),
    ],
)
def test_held_out_losses_are_judged_by_their_ranges(name, value, words):
    watch = HealthWatch()
    (finding,) = watch.observe_held_out(300, {name: value, "val/loss_external_text": 9.0})
    assert (finding.metric, finding.step) == (name, 300)
    assert words in str(finding)
    assert watch.observe_held_out(301, {name: value}) == []


def test_held_out_losses_leave_the_trends_of_the_others_alone(tmp_path):
    screen = io.StringIO()
    with RunLog(tmp_path, max_steps=9, quiet_steps=0, console=Console(file=screen)) as log:
        for point in curve(loss_total=FALLING, loss_audio=FALLING[::-1] / 8, loss_b=FALLING):
            log.write_metrics(point.step, point.metrics)
            log.write_validation(point.step, {"loss_audio": 2.6})
    assert screen.getvalue().count("val/loss_audio is 2.6") == 1
    assert "loss_audio rose by" in screen.getvalue()


def test_overflows_of_scaled_losses_are_counted_separately_and_are_no_finding(tmp_path):
    screen = io.StringIO()
    config = make_config(tmp_path, precision="fp16", max_steps=9, log_interval=9)
    trainer = make_trainer(config, console=Console(file=screen, width=400))
    trainer._state.scaler._init_scale = 2.0**20  # its first gradients overflow
    trainer.train()
    curves = read_events(tmp_path / "runs" / "tiny")
    found = {n: curves.Scalars(n)[0].value for n in ("fp16_overflows", "skipped_steps")}
    assert 1 <= found["fp16_overflows"] <= 8
    assert found["skipped_steps"] == 0
    assert "Reduce LR" not in screen.getvalue()


def test_a_log_of_overflows_alone_is_blamed_on_the_scale(tmp_path):
    screen = io.StringIO()
    config = make_config(tmp_path, precision="fp16", max_steps=4, log_interval=4)
    trainer = make_trainer(config, console=Console(file=screen, width=400))
    trainer._state.scaler._init_scale = 2.0**100
    trainer.train()
    assert "fp16_overflows is 4: every step" in screen.getvalue()
    assert "corrupted data" not in screen.getvalue()


def test_a_plateau_is_found_in_noise_and_a_slow_fall_seldom_accused():
    plateau = {"loss_total": np.array([9.0, 7.0, *[5.0] * 16])}
    slow = {"loss_total": np.array([9.0, 7.0, *np.linspace(5.0, 4.5, 16)])}
    assert share_found("plateau", plateau, noise=0.01) > 0.9
    assert share_found("plateau", slow, noise=0.01) < 0.05


@pytest.mark.parametrize("interval", [100, 500, 1000, 5000])
def test_a_plateau_is_found_whatever_the_log_interval(interval):
    losses = [9.0, 7.0, *[5.0] * 12]
    history = [
        LogPoint(step=interval * i, metrics={"loss_total": x}) for i, x in enumerate(losses, 1)
    ]
    (finding,) = apply_rules(history)
    assert finding.rule == "plateau"
    assert f"for {max(1000, 3 * interval)} steps" in finding.problem


def test_thresholds_that_every_untrained_model_breaks_are_silent_at_first():
    metrics = {"loss_internal_text": 7.0, "loss_audio": 2.77}
    early = [LogPoint(step=step, metrics=metrics) for step in (50, 199)]
    late = [*early, LogPoint(step=200, metrics=metrics)]
    assert apply_rules(early) == []
    assert {finding.metric for finding in apply_rules(late)} == set(metrics)
    assert apply_rules(late, quiet_steps=1000) == []


def test_a_lasting_finding_is_repeated_only_now_and_then():
    watch = HealthWatch(repeat_after_logs=5)
    said = [step for step in range(200, 214) if watch.observe(step, {"loss_audio": 2.7})]
    assert said == [200, 205, 210]


def test_the_table_has_the_walkthroughs_limits():
    limits = {(rule.metric, rule.good, rule.warning) for rule in health.RULES}
    assert {
        ("loss_internal_text", "< 2.0", "> 3.0"),
        ("loss_audio", "< 1.5", "> 2.5"),
        ("samples_per_sec", "> 10", "< 5"),
        ("memory_allocated_mb", "< 20000", "> 22000"),
    } <= limits


def test_a_finding_is_reported_in_the_terminal_and_in_tensorboard(tmp_path):
    screen = io.StringIO()
    batches = [make_batch(0), with_nan(make_batch(1))]
    trainer = make_trainer(make_config(tmp_path), batches, console=Console(file=screen))
    summary = trainer.train()
    assert screen.getvalue().count("Reduce LR") == 1
    assert "Reduce LR" in text_of(summary.log_dir, "health")
