"""Effects of missing modalities, on models whose effects are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.sets import build_set, make_config, set_recipe
from helpers.training import WINDOW, join, make_batch, shapes_of
from torch import nn

from train.__main__ import cli
from train.config import as_train_config
from train.model.losses import Objective
from train.run import run_training
from train.tools.ablate import ablate

CPU = torch.device("cpu")
CONFIG = as_train_config(
    {
        "data": {"modalities": ["touch", "proprio", "external_text"], "window": WINDOW},
        "training": {"loss_weights": {"internal_text": 0, "audio": 0}},
    }
)


SHAPES = shapes_of(CONFIG)
VOCAB_SIZE = SHAPES.streams["external_text"].num_classes


class TouchModel(nn.Module):
    """Predicts the true next token if touch is valid; predicts random poses."""

    config = CONFIG
    shapes = SHAPES
    objective = Objective.from_config(CONFIG, SHAPES)

    def forward(self, inputs):
        tokens = torch.cat([self.truth[:, 1:], self.truth[:, :1]], dim=1)
        per_tick = SHAPES.streams["touch"].per_tick
        is_touched = inputs["touch_valid"].view(len(tokens), -1, per_tick).any(-1)
        logits = 3 * nn.functional.one_hot(tokens, VOCAB_SIZE) * is_touched[..., None]
        size = (len(tokens), SHAPES.num_ticks, per_tick, 20)
        torch.manual_seed(0)
        return {"external_text": logits.float(), "animation": torch.randn(size)}


def measure(batches):
    model = TouchModel()

    def feed():
        for batch in batches:
            model.truth = batch["targets"]["external_text"]
            yield batch

    losses, effects = ablate(model, feed(), device=CPU)
    return losses, {(e.missing, e.head): e for e in effects}


def make_window(seed):
    """A window in which every tick has touch and a token, so that all windows have equal counts."""
    batch = make_batch(seed, size=1)
    for group in ("inputs", "targets"):
        batch[group] = {
            n: torch.ones_like(t) if n.endswith("_valid") else t for n, t in batch[group].items()
        }
    tokens = batch["targets"]["external_text"]
    tokens[tokens == 0] = 5
    return batch


def test_only_the_head_that_uses_a_modality_gets_worse():
    _, effects = measure([make_batch(seed, size=3) for seed in range(4)])
    assert effects["touch", "external_text"].is_worse
    others = {key: e for key, e in effects.items() if key != ("touch", "external_text")}
    assert set(others) == {
        (missing, head)
        for missing in ("touch", "proprio", "external_text")
        for head in ("external_text", "animation")
    } - {("touch", "external_text")}
    assert all(e.difference == 0 and not e.is_worse for e in others.values())


def test_a_difference_is_that_of_the_two_losses():
    losses, effects = measure([make_window(seed) for seed in range(3)])
    with_touch = math.log(math.exp(3) + VOCAB_SIZE - 1) - 3
    assert losses["external_text"] == pytest.approx(with_touch, rel=1e-6)
    effect = effects["touch", "external_text"]
    assert effect.loss == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    assert effect.difference == pytest.approx(effect.loss - with_touch, rel=1e-6)


def test_the_error_is_that_of_a_mean_of_equally_weighted_windows():
    windows = [make_window(seed) for seed in range(5)]
    for number, window in enumerate(windows):
        window["inputs"]["touch_valid"][:, : number * 3] = False  # differs by `number` ticks' touch
    _, effects = measure(windows)
    alone = [measure([window])[1]["touch", "external_text"] for window in windows]
    differences = [each.difference for each in alone]
    effect = effects["touch", "external_text"]
    assert effect.difference == pytest.approx(np.mean(differences))
    assert effect.error == pytest.approx(np.std(differences, ddof=1) / math.sqrt(5))
    assert all(each.error == math.inf and not each.is_worse for each in alone)


def test_batches_of_any_size_give_the_same_numbers():
    windows = [make_batch(seed, size=1) for seed in range(4)]
    one_by_one, _ = measure(windows)
    at_once, _ = measure([join(windows)])
    assert at_once["external_text"] == pytest.approx(one_by_one["external_text"], rel=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tiny_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = make_config(tiny_set)
    training = config.training.model_copy(
        update={
            "max_steps": 1,
            "log_dir": folder / "runs",
            "checkpointing": config.training.checkpointing.model_copy(update={"save_dir": folder}),
        }
    )
    summary = run_training(config.model_copy(update={"training": training}), origin=folder)
    return summary.checkpoint


def test_the_command_prints_a_row_per_modality(checkpoint):
    result = CliRunner().invoke(cli, ["ablate", "--checkpoint", str(checkpoint)])
    assert result.exit_code == 0, result.output
    rows = {line.split("│")[0].strip(): line for line in result.output.splitlines() if "│" in line}
    assert {"nothing", "vision", "audio", "touch", "proprio"} <= set(rows)
    assert rows["vision"].count("±") == 4


def test_other_data_must_have_the_same_tokenizer(checkpoint, raw_set, tiny_sessions, tmp_path):
    other = build_set(
        tiny_sessions, tmp_path / "other", set_recipe(text={"vocab_size": 280}, video={"size": 32})
    )
    codes = {}
    for shards in (raw_set, other):
        path = tmp_path / "data.yaml"
        path.write_text(f"data: {{shards: {shards}, num_workers: 0}}\n")
        arguments = ["ablate", "--checkpoint", str(checkpoint), "--config", str(path)]
        result = CliRunner().invoke(cli, arguments)
        codes[shards] = result.exit_code
    assert codes == {raw_set: 0, other: 2}, result.output
    assert "its tokenizer is another one" in result.output
