"""``train run`` from a configuration to a summary, on a tiny set."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from tiny_sets import make_config

from shared.errors import ConfigError
from train.__main__ import cli
from train.run import baseline_losses, fit_baselines, open_parts, run_training


@pytest.fixture
def config(tiny_set, tmp_path):
    return make_run(tiny_set, tmp_path)


def make_run(shards, folder, *, max_steps=3):
    config = make_config(shards)
    training = config.training.model_copy(
        update={
            "max_steps": max_steps,
            "log_dir": folder / "runs",
            "checkpointing": config.training.checkpointing.model_copy(
                update={"save_dir": folder / "checkpoints"}
            ),
        }
    )
    return config.model_copy(update={"training": training})


def test_a_run_trains_and_says_what_came_of_it(config, tmp_path, capsys):
    summary = run_training(config, origin=tmp_path / "mine.yaml")
    assert summary.steps == 3
    out = capsys.readouterr().out
    assert "held-out" in out
    assert "python -m train infer --checkpoint" in out
    assert (tmp_path / "checkpoints" / "model_final.pt").is_file()


def test_a_finished_run_says_so_and_trains_no_more(config, tmp_path, capsys):
    run_training(config, origin=tmp_path / "mine.yaml")
    capsys.readouterr()
    assert run_training(config, origin=tmp_path / "mine.yaml", resume="auto") is None
    assert "trained to step 3 already, nothing to do" in capsys.readouterr().out


def test_more_steps_go_on_from_the_checkpoint(tiny_set, tmp_path):
    run_training(make_run(tiny_set, tmp_path), origin=tmp_path / "mine.yaml")
    longer = make_run(tiny_set, tmp_path, max_steps=5)
    assert run_training(longer, origin=tmp_path / "mine.yaml", resume="auto").steps == 5


@pytest.mark.parametrize("max_steps", [3, 5])
def test_a_run_is_not_resumed_on_other_shards(tiny_set, raw_set, tmp_path, max_steps):
    run_training(make_run(tiny_set, tmp_path), origin=tmp_path / "mine.yaml")
    other = make_run(raw_set, tmp_path, max_steps=max_steps)
    with pytest.raises(ConfigError, match="fingerprint"):
        run_training(other, origin=tmp_path / "mine.yaml", resume="auto")


def test_resume_auto_begins_where_there_is_nothing_yet(config, tmp_path):
    assert run_training(config, origin=tmp_path / "mine.yaml", resume="auto").steps == 3


def test_held_out_sessions_are_measured_in_stored_order(config):
    parts = open_parts(config)
    keys = [key for batch in parts.val_loader for key in batch["keys"]]
    assert {key.partition("/")[0] for key in keys} == {"bob"}


def test_baselines_read_targets_only(config):
    baselines = fit_baselines(config)
    losses = baseline_losses(baselines, open_parts(config).val_loader)
    assert losses
    assert all(loss >= 0 for loss in losses.values())


def test_check_reads_a_batch_and_trains_nothing(tiny_set, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"data: {{shards: {tiny_set}, num_workers: 0}}\nmodel: {{hidden_dim: 16, num_layers: 1}}\n"
        f"training: {{checkpointing: {{save_dir: {tmp_path}/c}}, log_dir: {tmp_path}/r}}\n"
    )
    result = CliRunner().invoke(cli, ["run", "--config", str(path), "--check"])
    assert result.exit_code == 0, result.output
    for text in ("keys and values are good", "vision_left", "one forward and backward: loss_"):
        assert text in result.output
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "r").exists()
