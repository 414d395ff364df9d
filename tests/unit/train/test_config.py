"""The training configuration: which layer decides the size of the model, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from shared.errors import ConfigError
from train.__main__ import cli
from train.config import TrainConfig, as_train_config, load_train_config
from train.model.multimodal import SIZES, dimensions

ROOT = Path(__file__).parents[3]


def size_of(folder, model, *overrides):
    """Return width and depth, and the warnings."""
    path, warnings = folder / "mine.yaml", []
    path.write_text(f"model: {model}\n")
    config = load_train_config(path, overrides, warn=warnings.append)
    return dimensions(config.model)[:2], warnings


@pytest.mark.parametrize(
    ("model", "overrides", "expected", "keys"),
    [
        ("{hidden_dim: 512, num_layers: 6}", ["size=tiny"], (256, 8), ["hidden_dim", "num_layers"]),
        ("{hidden_dim: 512, num_heads: 5}", ["size=tiny"], (256, 8), ["hidden_dim", "num_heads"]),
        ("{hidden_dim: 512}", ["size=tiny", "hidden_dim=320"], (320, 8), []),
        ("{size: large}", ["size=tiny"], (256, 8), []),
        ("{size: large}", ["num_layers=2"], (2048, 2), []),
        ("{size: large}", ["num_layers=2", "hidden_dim=64"], (64, 2), ["size"]),
        ("{hidden_dim: 512, num_layers: 6}", ["size=null"], (512, 6), []),
        ("{size: tiny, num_layers: 2}", [], (256, 2), []),
        ("", ["size=tiny"], (256, 8), []),
    ],
)
def test_an_override_of_the_size_wins_and_replaced_keys_are_named(
    tmp_path, model, overrides, expected, keys
):
    found, warnings = size_of(tmp_path, model, *(f"model.{override}" for override in overrides))
    assert found == expected
    assert [line.split("model.")[1].split()[0] for line in warnings] == keys


def test_a_size_without_effect_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"tiny has no effect together with hidden_dim 64 and num_l"
    ):
        size_of(tmp_path, "{size: tiny, hidden_dim: 64, num_layers: 1}")
    with pytest.raises(ConfigError, match="has no effect"):
        size_of(tmp_path, "{}", "model.size=tiny", "model.hidden_dim=64", "model.num_layers=1")


def test_a_section_at_odds_with_an_override_names_both_file_and_override(tmp_path):
    overrides = ["model.size=tiny", "model.hidden_dim=64", "model.num_layers=1"]
    with pytest.raises(ConfigError) as caught:
        size_of(tmp_path, "{dropout: 0.1}", *overrides)
    says = f"{tmp_path / 'mine.yaml'} with {' '.join(overrides)}: model: model.size tiny has"
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("config", [None, "configs/demo.yaml", ["training"]])
def test_a_value_that_is_no_configuration_is_refused_with_the_fix(config):
    with pytest.raises(ConfigError, match=r"give a TrainConfig or a dict"):
        as_train_config(config)


def test_a_checkpoints_configuration_is_valid_again(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {hidden_dim: 512, num_layers: 6}\n")
    config = load_train_config(tmp_path / "mine.yaml", ["model.size=tiny"])
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_example_of_estimates_help_is_of_the_large_model():
    help_text = CliRunner().invoke(cli, ["estimate", "--help"]).output
    line = next(line for line in help_text.splitlines() if "model.size=large" in line)
    *_, file, override = line.split()
    config = load_train_config(ROOT / file, [override])
    assert dimensions(config.model)[:2] == SIZES["large"]
