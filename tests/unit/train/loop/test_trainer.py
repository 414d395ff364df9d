"""The trainer: resuming, skipped steps, precision, evaluation, and the walkthrough."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers.training import (
    RECIPE,
    SHAPES,
    WINDOW,
    EndlessLoader,
    corrupt_sample,
    join,
    largest_difference,
    make_batch,
    make_config,
    make_trainer,
    shapes_of,
    weights_of,
    with_nan,
)
from torch.utils.data import DataLoader, Dataset

from shared.errors import CheckpointError, ConfigError, DivergedError, TooManyCorruptSamplesError
from train.loop.prefetch import BatchFeed
from train.loop.trainer import Trainer

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


class Windows(Dataset):
    """Seven windows; `is_noisy` adds numbers from the global random state, as augmentation does."""

    def __init__(self, *, is_noisy=False):
        self.is_noisy = is_noisy

    def __len__(self):
        return 7

    def __getitem__(self, index):
        window = make_batch(index, size=1)
        if self.is_noisy:
            window["inputs"]["touch"] += 0.1 * random.random() + 0.1 * torch.rand(())
        return window


def plain_loader(*, is_shuffled=False, is_noisy=False, num_workers=0):
    return DataLoader(
        Windows(is_noisy=is_noisy),
        batch_size=2,
        shuffle=is_shuffled,
        collate_fn=join,
        num_workers=num_workers,
    )


def train_in_two_parts(folder, make_loader, *, first, total, **training):
    """Resume a run of `total` steps from its checkpoint at step `first`, with new objects."""
    config = make_config(folder, max_steps=total, save_interval=first, **training)
    make_trainer(config, make_loader()).train()
    second = make_trainer(config, make_loader())
    second.load_checkpoint(folder / "checkpoints" / f"model_step_{first}.pt")
    assert second.step == first
    torch.manual_seed(999)  # whatever happens between loading and training must not matter
    second.train()
    return second


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, accumulation_steps):
    options = {"accumulation_steps": accumulation_steps}
    whole = make_trainer(make_config(tmp_path / "whole", **options))
    whole.train()
    resumed = train_in_two_parts(tmp_path, EndlessLoader, first=3, total=6, **options)
    assert largest_difference(whole, resumed) == 0.0


@pytest.mark.parametrize("first", [3, 4, 6])  # inside, at the end of, and after the first pass
def test_a_run_on_a_plain_shuffled_dataloader_resumes_to_the_bit(tmp_path, first):
    def make_loader():
        return plain_loader(is_shuffled=True, is_noisy=True)

    whole = make_trainer(make_config(tmp_path / "whole", max_steps=9), make_loader())
    whole.train()
    resumed = train_in_two_parts(tmp_path, make_loader, first=first, total=9)
    assert largest_difference(whole, resumed) == 0.0


def test_corrupt_samples_before_and_after_a_resume_count_together(tmp_path):
    loader = EndlessLoader(skipped={i: [corrupt_sample(i)] for i in (0, 1, 4)})
    config = make_config(tmp_path, max_steps=3)
    config["data"]["max_bad_fraction"] = 0.0125  # three of the first 200 members are too many
    first = make_trainer(config, loader).train()
    config["training"]["max_steps"] = 6
    second = make_trainer(config, loader)
    second.load_checkpoint(first.checkpoint)
    with pytest.raises(TooManyCorruptSamplesError, match=r"3 of 10 stored segments.*differs 4"):
        second.train()


def test_training_changes_the_weights_and_dropout_draws_from_the_seed(tmp_path):
    before = make_trainer(make_config(tmp_path / "a"))
    one, same = (make_trainer(make_config(tmp_path / name)) for name in ("b", "c"))
    other = make_trainer(make_config(tmp_path / "d", seed=1))
    for trainer in (one, same, other):
        trainer.train()
    assert largest_difference(before, one) > 1e-3
    assert largest_difference(one, same) == 0.0
    assert largest_difference(one, other) > 0.0


def test_a_stopped_trainer_continues_when_train_is_called_again(tmp_path):
    def stop_once(index):
        if index == 2 and not stopped:
            stopped.append(index)
            signal.raise_signal(signal.SIGINT)

    stopped = []
    whole = make_trainer(make_config(tmp_path / "whole"))
    whole.train()
    trainer = make_trainer(make_config(tmp_path), EndlessLoader(on_batch=stop_once))
    assert trainer.train().steps == 3
    assert trainer.train().steps == 6
    assert largest_difference(whole, trainer) == 0.0


def test_a_plain_dataloader_is_repeated_and_reshuffled_in_each_pass():
    feed = BatchFeed(plain_loader(is_shuffled=True), CPU, seed=0)
    passes = [[key for batch in feed.take(4) for key in batch["keys"]] for _ in range(3)]
    assert [sorted(p) for p in passes] == [sorted(f"s@{i}" for i in range(7))] * 3
    assert len({tuple(p) for p in passes}) == 3


def test_two_micro_batches_of_four_equal_one_batch_of_eight(tmp_path):
    batches = [make_batch(i, size=4) for i in range(6)]
    batches[1]["weight"][2:] = 0  # padding rows, so that the halves do not weigh the same
    joined = [join(batches[i : i + 2]) for i in range(0, 6, 2)]
    config = make_config(tmp_path, max_steps=3)
    config["model"]["dropout"] = 0.0
    large = make_trainer(config, joined)
    large_summary = large.train()
    config["training"]["accumulation_steps"] = 2
    small = make_trainer(config, batches)
    small_summary = small.train()
    assert largest_difference(large, small) < 1e-6
    assert small_summary.last_losses == pytest.approx(large_summary.last_losses, abs=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    good = [make_batch(i) for i in range(3)]
    config = make_config(tmp_path, max_steps=4, optimizer={"warmup_steps": 0, "min_lr_ratio": 1})
    config["model"]["dropout"] = 0.0
    trainer = make_trainer(config, [good[0], with_nan(good[1]), good[1], good[2]])
    summary = trainer.train()
    config["training"]["max_steps"] = 3
    expected = make_trainer(config, good)
    expected.train()
    assert summary.skipped_steps == 1
    assert largest_difference(trainer, expected) == 0.0
    assert all(np.isfinite(v) for v in [*summary.first_losses.values(), float(summary.steps)])


def test_ten_bad_steps_in_a_row_stop_the_run_with_the_walkthroughs_advice(tmp_path):
    bad = [with_nan(make_batch(0))]
    trainer = make_trainer(make_config(tmp_path, max_steps=50, log_interval=50), bad)
    before = weights_of(trainer)
    with pytest.raises(DivergedError, match=r"10 steps in a row.*Reduce LR.*corrupted data"):
        trainer.train()
    assert trainer.step == 10
    assert torch.equal(before, weights_of(trainer))


def test_half_precision_trains_and_scales_its_loss(tmp_path):
    trainer = make_trainer(make_config(tmp_path, max_steps=12, precision="fp16"), [make_batch(0)])
    before = weights_of(trainer)
    summary = trainer.train()
    assert float((before - weights_of(trainer)).abs().max()) > 1e-3
    assert summary.last_losses["loss_total"] < summary.first_losses["loss_total"]
    assert torch.load(summary.checkpoint)["scaler"]["scale"] > 0


def test_bfloat16_loss_is_near_that_of_float32(tmp_path):
    half = make_trainer(make_config(tmp_path / "half", precision="bf16")).train()
    full = make_trainer(make_config(tmp_path / "full", precision="fp32")).train()
    assert half.last_losses == pytest.approx(full.last_losses, rel=0.02)
    assert half.last_losses != full.last_losses


def test_evaluation_gives_the_mean_over_all_places_of_all_batches(tmp_path):
    batches = [make_batch(i, size=1 + i) for i in range(3)]
    config = make_config(tmp_path)
    apart = make_trainer(config, val_loader=batches).evaluate()
    at_once = make_trainer(config, val_loader=[join(batches)]).evaluate()
    assert apart == pytest.approx(at_once, rel=1e-5)
    assert set(apart) == {
        "loss_total",
        "loss_internal_text",
        "loss_external_text",
        "loss_audio",
        "loss_animation",
    }


def test_evaluation_stays_within_one_epoch_of_an_endless_loader(tmp_path):
    config = make_config(tmp_path, eval_batches=100)
    endless = make_trainer(config, val_loader=EndlessLoader()).evaluate()
    epoch = make_trainer(config, val_loader=[make_batch(i) for i in range(4)]).evaluate()
    assert endless == epoch


def test_evaluation_changes_nothing_in_the_training(tmp_path):
    without = make_trainer(make_config(tmp_path / "without"), plain_loader(is_shuffled=True))
    config = make_config(tmp_path / "with", eval_interval=1)
    evaluated = make_trainer(
        config, plain_loader(is_shuffled=True), val_loader=plain_loader(is_shuffled=True)
    )
    without.train()
    summary = evaluated.train()
    assert largest_difference(without, evaluated) == 0.0
    assert summary.last_val_losses["loss_total"] < summary.first_val_losses["loss_total"]


def test_a_dataset_made_for_another_configuration_is_refused(tmp_path):
    text_only = {"loss_weights": {"audio": 0.0, "animation": 0.0}}
    config = {**make_config(tmp_path, **text_only), "data": {"window": WINDOW}}
    loader = EndlessLoader()
    loader.shapes = SHAPES
    loader.source = SimpleNamespace(recipe=RECIPE)
    with pytest.raises(ConfigError, match=r"yields ticks at .*Dataset\(.*config=config"):
        make_trainer(config, loader)
    loader.shapes = shapes_of(config)
    make_trainer(config, loader)


def test_an_empty_loader_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no batch"):
        make_trainer(make_config(tmp_path), []).train()


def test_uncollated_windows_are_refused_with_the_name_of_the_collate_fn(tmp_path):
    batch = make_batch(0)
    nested = {
        **batch,
        "inputs": {n: t[:, None] for n, t in batch["inputs"].items()},
        "weight": batch["weight"][:, None],
    }
    with pytest.raises(ConfigError, match="collate_fn=real_data_collate_fn"):
        make_trainer(make_config(tmp_path), [nested]).train()


def test_a_loss_of_what_the_model_does_not_predict_is_refused(tmp_path):
    model = make_trainer(make_config(tmp_path, loss_weights={"audio": 0})).model
    with pytest.raises(ConfigError, match=r"losses of audio, .*loss_weights\.audio: 0"):
        Trainer(model, make_config(tmp_path), [make_batch(0)], device="cpu")


def test_a_position_of_another_kind_of_loader_is_refused_and_changes_nothing(tmp_path):
    make_trainer(make_config(tmp_path)).train()
    trainer = make_trainer(make_config(tmp_path, max_steps=8), [make_batch(0)])
    before = weights_of(trainer)
    message = (
        r"model_final\.pt: .*another kind of loader.*; fix: to start a new run, move .*save_dir"
    )
    with pytest.raises(CheckpointError, match=message):
        trainer.load_checkpoint(tmp_path / "checkpoints/model_final.pt")
    assert trainer.step == 0
    assert torch.equal(weights_of(trainer), before)


WALKTHROUGH = """
training:
    max_steps: 4
    log_interval: 2
    save_interval: 2
    optimizer:
        lr: 3e-4
        betas: [0.9, 0.95]
        weight_decay: 0.01
    checkpointing:
        save_dir: "checkpoints/"

model:
    hidden_dim: 16
    num_layers: 1
"""


def test_the_walkthroughs_steps_work_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {**yaml.safe_load(WALKTHROUGH), "data": make_config(tmp_path)["data"]}
    loader = plain_loader()
    trainer = make_trainer(config, loader, run_name=None)
    assert trainer.train().steps == 4
    trainer.load_checkpoint("checkpoints/model_step_2.pt")
    assert trainer.train().steps == 4
    checkpoint = torch.load("checkpoints/model_step_4.pt")
    assert f"Step: {checkpoint['step']}" == "Step: 4"
    assert Path("checkpoints/model_final.pt").exists()
    assert len(list(Path("runs").iterdir())) == 1


def test_the_loop_reads_no_tensor_between_logs(tmp_path, monkeypatch):
    """On a device each read makes the host wait; the divergence check reads on the CPU only."""
    looks = []
    trainer = make_trainer(make_config(tmp_path, max_steps=5, log_interval=5))
    monkeypatch.setattr("train.loop.meter.StepMeter.check_divergence", lambda *_, **__: None)
    for name in ("item", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)

        def look(tensor, *, name=name, original=original):
            looks.append((name, trainer.step))
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, look)
    trainer.train()
    early = [look for look in looks if look[1] < 5]
    assert early == []


def test_waiting_for_data_is_measured(tmp_path):
    loader = EndlessLoader(on_batch=lambda index: time.sleep(0.05))
    summary = make_trainer(make_config(tmp_path, max_steps=6, log_interval=3), loader).train()
    assert summary.data_wait_fraction > 0.5
    assert summary.samples_per_sec < 2 / 0.05
