"""``train run`` from a configuration to a summary, on a tiny set."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.sets import (
    HEADS,
    TEXT_HEADS,
    build_set,
    make_config,
    sample_locations,
    set_recipe,
)
from rich.console import Console
from torch.utils.data import DataLoader

from shared.errors import CheckpointError, ConfigError
from shared.streams import DEFAULT_STREAMS
from train import MultiModalCreature, RealMultiModalDataset, Trainer, real_data_collate_fn
from train.__main__ import cli
from train.checkpoints import load_checkpoint
from train.config import WindowConfig, load_train_config
from train.infer.run import infer
from train.run import (
    baseline_losses,
    check_config,
    describe_rejected,
    fit_baselines,
    held_out_loader,
    require_paths,
    run_training,
    set_up_run,
)
from train.walkthrough import STREAM_OF_HEAD


def requiring(*names, **sections):
    """Make a recipe of the tiny sets that requires some streams."""
    streams = {name: {**spec, "required": name in names} for name, spec in DEFAULT_STREAMS.items()}
    return set_recipe(streams=streams, **sections)


ROOT = Path(__file__).parents[3]


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


def test_a_run_trains_and_prints_a_summary(config, tmp_path, capsys):
    summary = run_training(config, origin=tmp_path / "mine.yaml")
    assert summary.steps == 3
    out = capsys.readouterr().out
    assert out.startswith(
        "inputs: audio, external_text, internal_text, proprio, touch, vision_left"
    )
    assert "; heads: audio, external_text, internal_text, animation\n" in out
    assert "held-out" in out
    assert "python -m train infer --checkpoint" in out
    assert (tmp_path / "checkpoints" / "model_final.pt").is_file()


def test_a_finished_run_says_so_and_trains_no_more(config, tmp_path, capsys):
    run_training(config, origin=tmp_path / "mine.yaml")
    capsys.readouterr()
    assert run_training(config, origin=tmp_path / "mine.yaml", resume="auto") is None
    assert "trained to step 3 already, nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("max_steps", [3, 4])  # a finished run, and one that is resumed
def test_a_resumed_run_says_that_it_ignores_weights(tiny_set, tmp_path, capsys, max_steps):
    first = run_training(make_run(tiny_set, tmp_path), origin=tmp_path / "mine.yaml")
    options = {"resume": "auto", "weights": first.checkpoint}
    config = make_run(tiny_set, tmp_path, max_steps=max_steps)
    run_training(config, origin=tmp_path / "mine.yaml", **options)
    out = capsys.readouterr().out
    assert f"--weights {first.checkpoint} is ignored" in out
    assert "starting with the weights" not in out


@pytest.mark.parametrize("place", ["root_dir", "data/sessions", "data/demo"])
def test_the_next_command_names_a_session_that_exists(
    config, tiny_sessions, tmp_path, monkeypatch, capsys, place
):
    monkeypatch.chdir(tmp_path)
    if place == "root_dir":
        data = config.data.model_copy(update={"root_dir": tiny_sessions})
        config = config.model_copy(update={"data": data})
    else:
        (tmp_path / "data").mkdir()
        (tmp_path / place).symlink_to(tiny_sessions)
    run_training(config, origin=tmp_path / "mine.yaml")
    words = shlex.split(capsys.readouterr().out.rpartition("next ")[2].splitlines()[0])
    session = Path(words[words.index("--input") + 1])
    assert session.resolve().parent == tiny_sessions.resolve()
    assert (session / "metadata.jsonl").exists()


def test_the_next_command_invents_no_session(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_training(config, origin=tmp_path / "mine.yaml")
    line = capsys.readouterr().out.rpartition("next ")[2].splitlines()[0]
    assert "--input SESSION --out predictions, where SESSION is the folder of a recording" in line


def test_more_steps_resume_from_the_checkpoint(tiny_set, tmp_path):
    run_training(make_run(tiny_set, tmp_path), origin=tmp_path / "mine.yaml")
    longer = make_run(tiny_set, tmp_path, max_steps=5)
    assert run_training(longer, origin=tmp_path / "mine.yaml", resume="auto").steps == 5


@pytest.mark.parametrize("max_steps", [3, 5])
def test_a_run_is_not_resumed_on_other_shards(tiny_set, raw_set, tmp_path, max_steps):
    run_training(make_run(tiny_set, tmp_path), origin=tmp_path / "mine.yaml")
    other = make_run(raw_set, tmp_path, max_steps=max_steps)
    with pytest.raises(ConfigError, match="fingerprint"):
        run_training(other, origin=tmp_path / "mine.yaml", resume="auto")


def test_a_new_run_does_not_overwrite_another_ones_checkpoints(config, tmp_path):
    run_training(config, origin=tmp_path / "mine.yaml")
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(ConfigError, match=r"model_final\.pt.*--resume auto.*save_dir"):
        run_training(config, origin=tmp_path / "mine.yaml")
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()} == before


def test_resuming_in_another_folder_does_not_overwrite_its_checkpoints(tiny_set, tmp_path):
    one = run_training(make_run(tiny_set, tmp_path / "a"), origin=tmp_path / "mine.yaml")
    run_training(make_run(tiny_set, tmp_path / "b"), origin=tmp_path / "mine.yaml")
    longer = make_run(tiny_set, tmp_path / "b", max_steps=5)
    with pytest.raises(ConfigError, match="holds a run's checkpoints"):
        run_training(longer, origin=tmp_path / "mine.yaml", resume=str(one.checkpoint))
    elsewhere = make_run(tiny_set, tmp_path / "c", max_steps=5)
    resumed = run_training(elsewhere, origin=tmp_path / "mine.yaml", resume=str(one.checkpoint))
    assert resumed.steps == 5


def test_weights_and_a_checkpoint_to_resume_from_exclude_each_other(tmp_path):
    words = ["run", "--config", "configs/demo.yaml", "--resume", "a.pt", "--weights", "b.pt"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert "give one" in done.output


def test_a_new_run_may_start_with_the_weights_of_one_on_other_data(tiny_set, raw_set, tmp_path):
    first = run_training(make_run(tiny_set, tmp_path / "a"), origin=tmp_path / "mine.yaml")
    other = make_run(raw_set, tmp_path / "b", max_steps=1)
    with pytest.raises(ConfigError, match=r"other data.*--weights"):
        run_training(other, origin=tmp_path / "mine.yaml", resume=str(first.checkpoint))
    frozen = other.model_copy(
        update={"training": other.training.model_copy(update={"spike_sigma": None})}
    )
    optimizer = frozen.training.optimizer.model_copy(update={"lr": 1e-12, "weight_decay": 0.0})
    frozen = frozen.model_copy(
        update={"training": frozen.training.model_copy(update={"optimizer": optimizer})}
    )
    second = run_training(frozen, origin=tmp_path / "mine.yaml", weights=first.checkpoint)
    old, new = (load_checkpoint(s.checkpoint) for s in (first, second))
    assert new["step"] == 1
    for name, weight in old["model"].items():
        torch.testing.assert_close(new["model"][name], weight, atol=1e-9, rtol=0)


def test_weights_take_another_window_and_a_resumed_run_does_not(tiny_set, tmp_path):
    first = run_training(make_run(tiny_set, tmp_path / "a"), origin=tmp_path / "mine.yaml")
    other = make_run(tiny_set, tmp_path / "b")
    window = WindowConfig(duration_s=0.6, stride_s=0.6)
    data = other.data.model_copy(update={"window": window})
    other = other.model_copy(update={"data": data})
    with pytest.raises(ConfigError, match=r"windows with window_s 1\.0.*--weights"):
        run_training(other, origin=tmp_path / "mine.yaml", resume=str(first.checkpoint))
    second = run_training(other, origin=tmp_path / "mine.yaml", weights=first.checkpoint)
    old, new = (load_checkpoint(s.checkpoint) for s in (first, second))
    assert (old["shapes"]["num_ticks"], new["shapes"]["num_ticks"]) == (10, 6)
    std = "sensors.s_proprio.std"  # the checkpoint's scales stay
    assert torch.equal(new["model"][std], old["model"][std])


def test_resume_auto_starts_at_step_0_without_checkpoints(config, tmp_path):
    assert run_training(config, origin=tmp_path / "mine.yaml", resume="auto").steps == 3


def test_held_out_sessions_are_measured_in_stored_order(config):
    setup = set_up_run(config, origin=Path("mine.yaml"))
    batches = list(setup.val_loader)
    rows = [zip(batch["keys"], batch["weight"], strict=True) for batch in batches]
    keys = [key for row in rows for key, weight in row if weight]
    # bob lasts 1.6 s: windows of 1 s touch, though those of training overlap
    assert keys == ["bob@0", "bob@10"]


@pytest.mark.parametrize("modalities", [None, ("vision_left", "touch")])
@pytest.mark.parametrize("heads", [HEADS, TEXT_HEADS])
def test_baselines_are_judged_on_the_evaluated_samples_and_read_targets_only(
    tiny_set, monkeypatch, heads, modalities
):
    config = make_config(tiny_set, heads=heads, modalities=modalities, batch_size=2)
    training = config.training.model_copy(update={"eval_batches": 2})
    config = config.model_copy(update={"training": training})
    setup, opened = set_up_run(config, origin=Path("mine.yaml")), []

    def open_recorded(*arguments):
        opened.append(list(held_out_loader(*arguments)))
        return opened[-1]

    baselines = fit_baselines(setup, config, Console(quiet=True))
    expected = baselines.mean_losses(itertools.islice(setup.val_loader, 2))
    monkeypatch.setattr("train.run.held_out_loader", open_recorded)
    assert baseline_losses(baselines, setup, config) == pytest.approx(expected)
    read = set(opened[0][0]["inputs"]) - {f"{name}_valid" for name in opened[0][0]["inputs"]}
    targets = {STREAM_OF_HEAD.get(head, head) for head in heads}
    assert read in (targets, targets | {"touch"})
    # Otherwise text alone would be packed densely.
    assert ("touch" in read) == (heads == TEXT_HEADS and modalities is not None)


def test_check_reads_a_batch_and_trains_nothing(tiny_set, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"data: {{shards: {tiny_set}, num_workers: 0}}\nmodel: {{hidden_dim: 16, num_layers: 1}}\n"
        f"training: {{checkpointing: {{save_dir: {tmp_path}/c}}, log_dir: {tmp_path}/r}}\n"
    )
    result = CliRunner().invoke(cli, ["run", "--config", str(path), "--check"])
    assert result.exit_code == 0, result.output
    for text in ("keys and values are valid", "vision_left", "one forward and backward: loss_"):
        assert text in result.output
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "r").exists()


def check(config, tmp_path, **options):
    check_config(config, origin=tmp_path / "mine.yaml", **options)


def test_check_refuses_a_device_that_a_run_refuses(config, tmp_path):
    training = config.training.model_copy(update={"device": "meta"})
    with pytest.raises(ConfigError, match="is not supported"):
        check(config.model_copy(update={"training": training}), tmp_path)


def test_check_refuses_a_precision_that_the_gpu_lacks(config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr("train.run.choose_device", lambda name: torch.device("cuda"))
    training = config.training.model_copy(update={"precision": "bf16"})
    with pytest.raises(ConfigError, match="this GPU has no bfloat16"):
        check(config.model_copy(update={"training": training}), tmp_path)


def test_check_refuses_a_folder_that_is_not_writable(config, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="checkpoints cannot be written there"):
        check(config, tmp_path)


def test_check_loads_the_checkpoint_to_resume_from(tiny_set, tmp_path, capsys):
    run_training(make_run(tiny_set, tmp_path), origin=tmp_path / "mine.yaml")
    final = tmp_path / "checkpoints" / "model_final.pt"
    before = final.read_bytes()
    config = make_run(tiny_set, tmp_path, max_steps=5)
    check(config, tmp_path, resume=str(final))
    assert "can resume from it, at step 3" in capsys.readouterr().out
    assert final.read_bytes() == before
    check(config, tmp_path, resume="auto")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        check(config, tmp_path, resume=str(tmp_path / "none.pt"))
    wide = config.model_copy(update={"model": config.model.model_copy(update={"hidden_dim": 32})})
    with pytest.raises(CheckpointError, match="of another model"):
        check(wide, tmp_path, resume=str(final))
    blind = config.model_copy(
        update={"data": config.data.model_copy(update={"modalities": ["audio"]})}
    )
    with pytest.raises(CheckpointError, match=r"checkpoint reads touch .*, the run does not use"):
        check(blind, tmp_path, resume=str(final))
    seeded = config.training.model_copy(update={"seed": 8})
    with pytest.raises(ConfigError, match="seed"):
        check(config.model_copy(update={"training": seeded}), tmp_path, resume=str(final))


def test_check_makes_the_model_if_the_data_does_not_exist_yet(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{shards: {tmp_path}/later}}\nmodel: {{hidden_dim: 16}}\n")
    result = CliRunner().invoke(cli, ["run", "--config", str(path), "--check"])
    assert result.exit_code == 0, result.output
    assert "parameters" in result.output
    line = f"NOT checked: data, because {tmp_path}/later does not exist yet; no batch was read\n"
    assert line in result.output


def test_rejected_sessions_read_directly_are_named(tiny_sessions, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(requiring("audio").as_json()))
    config = make_config(root_dir=tiny_sessions, recipe=recipe)
    setup = set_up_run(config, origin=Path("mine.yaml"))
    assert [line.split(":")[0] for line in setup.rejected if "segments" not in line] == ["eve"]
    check_config(config, origin=tmp_path / "mine.yaml")
    assert "rejected: eve: required stream audio" in capsys.readouterr().out


def test_rejected_held_out_sessions_are_named(tiny_sessions, tmp_path):
    sessions = tmp_path / "sessions"
    shutil.copytree(tiny_sessions, sessions)
    (sessions / "bob" / "audio.wav").unlink()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(requiring("audio").as_json()))
    setup = set_up_run(make_config(root_dir=sessions, recipe=recipe), origin=recipe)
    assert setup.val_loader is None
    assert "bob" in setup.no_val_reason


def test_a_set_without_held_out_sessions_gets_one_warning(tiny_sessions, tmp_path, capsys):
    shards = build_set(tiny_sessions, tmp_path / "set", set_recipe(split={"val_fraction": 0}))
    summary = run_training(make_run(shards, tmp_path), origin=tmp_path / "mine.yaml")
    assert summary.last_val_losses == {}
    out = capsys.readouterr().out
    assert out.count("nothing is held out") == 1
    assert f"{shards} has no session in its val split" in out


def test_a_set_without_train_sessions_names_its_path_and_the_fix(tiny_sessions, tmp_path):
    recipe = set_recipe(split={"val_fraction": 0.999999})
    shards = build_set(tiny_sessions, tmp_path / "set", recipe)
    with pytest.raises(
        ConfigError, match=rf"{shards}: this split has no samples.*split\.val_fraction"
    ):
        set_up_run(make_run(shards, tmp_path), origin=tmp_path)


def test_paths_with_brackets_and_spaces_are_printed_as_they_are_and_quoted(
    tiny_sessions, tmp_path, capsys
):
    folder = tmp_path / "a [red] b"
    shutil.copytree(tiny_sessions / "ann", folder / "ann")
    config = make_run(None, folder)
    data = config.data.model_copy(update={"root_dir": folder / "ann", "recipe": folder / "r.yaml"})
    (folder / "r.yaml").write_text(json.dumps(set_recipe().as_json()))
    run_training(config.model_copy(update={"data": data}), origin=folder / "mine.yaml")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")]
    words = shlex.split(line)
    assert words[words.index("--checkpoint") + 1] == str(folder / "checkpoints/model_final.pt")
    assert words[words.index("--input") + 1] == str(folder / "ann")


def test_rejected_segments_are_named(tiny_sessions):
    def open_segments(recipe):
        """Return the source, and its segments; windows are as long as these."""
        config = {"data": {"window": {"duration_s": 0.4}}}
        source = RealMultiModalDataset(tiny_sessions, recipe=recipe, config=config).source
        keys = {source.key(*location) for location in sample_locations(source)}
        parts = [key.partition("@") for key in keys]
        return source, {f"{session}/{int(tick) // 4:06d}" for session, _, tick in parts}

    strict = requiring("vision_left", "proprio", "audio", segment={"min_coverage": 1.0})
    source, used = open_segments(strict)
    assert not used & source.rejected.keys()
    _, planned = open_segments(set_recipe())
    rejected = {key for key in planned - used if key.partition("/")[0] not in source.rejected}
    assert rejected == {name for name in source.rejected if "/" in name}
    (line,) = [line for line in describe_rejected(source) if "segments" in line]
    assert line.startswith(f"{len(rejected)} segments of sessions that are used; the first is ")


def test_a_model_trained_on_a_plain_loader_can_infer(tiny_sessions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = RealMultiModalDataset(tiny_sessions, recipe=set_recipe())
    loader = DataLoader(dataset, batch_size=4, collate_fn=real_data_collate_fn)
    config = {
        "training": {"max_steps": 1, "num_threads": 1},
        "model": {"hidden_dim": 16, "num_layers": 1, "vision_layers": 0},
    }
    Trainer(MultiModalCreature(config, dataset.shapes), config, loader, device="cpu").train()
    metrics = infer(tmp_path / "checkpoints/model_final.pt", tiny_sessions / "cat", tmp_path / "p")
    assert metrics["losses"]["loss_audio"] > 0


def test_a_folder_that_is_not_writable_is_refused_before_the_first_step(config, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="checkpoints cannot be written there"):
        run_training(config, origin=tmp_path / "mine.yaml")
    assert not (tmp_path / "runs").exists()


def test_the_command_does_not_import_torch_before_it_reads_the_configuration():
    script = "import sys, train.__main__; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_the_fix_for_a_missing_set_names_the_configurations_sessions(tmp_path, monkeypatch):
    config = make_config(tmp_path / "set", root_dir=tmp_path / "my sessions")
    with pytest.raises(ConfigError) as caught:
        require_paths(config, origin=tmp_path / "mine.yaml")
    words = shlex.split(str(caught.value).split("`")[1])
    assert words[:4] == ["python", "-m", "preprocess", "shards"]
    assert words[words.index("--out") + 1] == str(tmp_path / "set")
    assert words[words.index("--sessions") + 1] == str(tmp_path / "my sessions")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="build it by `make demo`"):
        require_paths(load_train_config(ROOT / "configs/demo.yaml"), origin=Path("demo.yaml"))


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("data.shards=no/such/set", "preprocess shards --out no/such/set"),
        ("data.root_dir=no/such/folder", "that holds the session folders"),
    ],
)
def test_missing_data_is_named_with_its_file_key_and_fix(tmp_path, override, fix):
    file = tmp_path / "mine.yaml"
    file.write_text("training: {max_steps: 1}\n")
    result = CliRunner().invoke(cli, ["run", "--config", str(file), override])
    assert result.exit_code == 2
    message = result.output.strip()
    key, _, path = override.partition("=")
    assert message.startswith(f"Error: {file}: key '{key}' is {path}: does not exist; ")
    assert fix in message
    assert "\n" not in message
