"""The public face: imports, configurations, commands."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers import sets as tiny_sets
from pydantic import BaseModel

import preprocess
import shared
import train
from preprocess.__main__ import cli as preprocess_cli
from shared.config import Section, load_section, make_section, parse_yaml, read_yaml
from shared.errors import ConfigError
from shared.recipe import Recipe
from train.__main__ import cli as train_cli
from train.config import TrainConfig
from train.shapes import WindowShapes

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for name in ("shared", "preprocess", "train") for p in (ROOT / name).rglob("*.py")]
HEAVY = ("torch", "webdataset", "tensorboard")

# The five blocks of the walkthrough, to the letter; the last three are indented with tabs.
TRAINING = """\
training:
    max_steps: 1000000
    log_interval: 100
    save_interval: 1000
    optimizer:
        lr: 3e-4
        betas: [0.9, 0.95]
        weight_decay: 0.01
    checkpointing:
        save_dir: "checkpoints/"

model:
    hidden_dim: 512
    num_layers: 6
"""
REAL = """\
data:
	root_dir: "data/sessions"
	batch_size: 4
	modalities: ["vision_left", "audio", "touch", "proprio"]

training:
	max_steps: 100000
	log_interval: 100
	save_interval: 5000

model:
	hidden_dim: 512
	num_layers: 6
"""
TEXT_ONLY = """\
training:
	loss_weights:
		internal_text: 1.0
		external_text: 1.0
		audio: 0.0  # Disable audio loss
		animation: 0.0  # Disable animation loss
"""


def run_module(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        **options,
    )


# --- imports ---------------------------------------------------------------------------------


def modules_of(package):
    return [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


@pytest.mark.parametrize(
    ("packages", "forbidden"),
    [
        ([shared], (*HEAVY, "dask", "distributed", "preprocess", "train")),
        ([shared, preprocess], (*HEAVY, "train")),
        ([train], ("dask", "distributed", "preprocess")),
    ],
)
def test_importing_everything_brings_nothing_forbidden(packages, forbidden):
    names = [name for package in packages for name in modules_of(package)]
    assert len(names) > 10
    script = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        f"print([name for name in {forbidden} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr


def test_what_train_exports_is_there_and_documented():
    assert train.__all__ == sorted(train.__all__)
    for name in train.__all__:
        assert getattr(train, name).__doc__, name


@pytest.mark.parametrize("name", ["shared", "preprocess", "train"])
def test_every_module_says_what_it_is_for(name):
    for module in modules_of(importlib.import_module(name)):
        if not module.endswith("__main__"):
            assert importlib.import_module(module).__doc__, module


# --- configurations --------------------------------------------------------------------------


def as_config(text):
    return make_section(TrainConfig, parse_yaml(text, origin="walkthrough.md"))


def test_the_walkthroughs_training_block_is_read():
    config = as_config(TRAINING)
    assert config.training.optimizer.lr == 0.0003
    assert isinstance(config.training.optimizer.lr, float)
    assert config.training.optimizer.betas == (0.9, 0.95)
    assert config.training.checkpointing.save_dir == Path("checkpoints")
    assert (config.model.hidden_dim, config.model.num_layers) == (512, 6)


def test_the_walkthroughs_real_data_block_is_read():
    config = as_config(REAL)
    assert config.data.root_dir == Path("data/sessions")
    assert config.data.batch_size == 4
    shapes = WindowShapes.from_recipe(Recipe(), config)
    assert shapes.inputs == ("audio", "proprio", "touch", "vision_left")
    assert set(shapes.heads) == {"internal_text", "external_text", "audio", "animation"}
    assert config.training.save_interval == 5000


def test_the_walkthroughs_text_only_block_trains_text_only():
    config = as_config(TEXT_ONLY)
    shapes = WindowShapes.from_recipe(Recipe(), config)
    assert shapes.heads == shapes.inputs == ("external_text", "internal_text")
    assert shapes.is_text_only


def test_the_blocks_are_those_of_the_walkthrough():
    path = ROOT.parent / "shared" / "walkthrough.md"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    blocks = re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks == [TRAINING, REAL, TEXT_ONLY]


def sections_of(kind):
    """(section, key, field) of a configuration, all the way down."""
    for key, field in kind.model_fields.items():
        yield kind, key, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections_of(field.annotation)


KEYS = [
    pytest.param(section, key, field, id=f"{section.__name__}.{key}")
    for root in (TrainConfig, Recipe)
    for section, key, field in sections_of(root)
]


@pytest.mark.parametrize(("section", "key", "field"), KEYS)
def test_every_key_says_what_it_means(section, key, field):
    is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    meaning = field.annotation.__doc__ if is_section else field.description
    assert meaning, f"{section.__name__}.{key} has no docstring"


@pytest.mark.parametrize(("section", "key", "field"), KEYS)
def test_every_key_is_read_by_the_code(section, key, field):
    # LossWeights' keys are read by the name of their head, as getattr(weights, head).
    if section.__name__ == "LossWeights":
        assert key in {head.value for head in train.config.Head}
        return
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert re.search(rf"\.{key}\b", code), f"{section.__name__}.{key} changes nothing"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_of_ours_loads(path):
    is_recipe = not {"training", "model", "data"} & set(read_yaml(path))
    loaded = load_section(Recipe if is_recipe else TrainConfig, path)
    assert loaded


def test_the_recipe_file_holds_the_defaults():
    assert load_section(Recipe, ROOT / "configs" / "recipe.yaml") == Recipe()


# --- errors ----------------------------------------------------------------------------------

FAULTS = {
    "unknown key": ("training:\n  max_stepz: 3\n", ["'training.max_stepz'", "'max_steps'"]),
    "unknown section": ("trainign: {}\n", ["'trainign'", "'training'"]),
    "wrong type": ("training:\n  max_steps: many\n", ["'training.max_steps'", "valid integer"]),
    "out of range": ("data:\n  batch_size: 0\n", ["'data.batch_size'", "greater than or equal"]),
    "beta of 2": ("training: {optimizer: {betas: [0.9, 2]}}\n", ["optimizer.betas.1", "less than"]),
    "unknown stream": (
        "data:\n  modalities: [smell]\n",
        ["data.modalities names smell", "use audio, ", "vision_left"],
    ),
    "value for a section": ("model: big\n", ["'model'", "hidden_dim"]),
    "nothing learned": (
        "training: {loss_weights: {internal_text: 0, external_text: 0, audio: 0, animation: 0}}\n",
        ["nothing would be learned", "set training.loss_weights: {"],
    ),
    "a list": ("- 1\n- 2\n", ["expected `key: value` lines"]),
    "bad yaml": ("training: [1, 2\n", ["line 2", "not valid YAML", "check the indentation"]),
    "a date that is none": ("training:\n  max_steps: 2001-99-99\n", ["not valid YAML"]),
    "too deep": ("[" * 5000, ["not valid YAML"]),
    "code": ("a: !!python/object/apply:os.system [id]\n", ["line 1", "not valid YAML"]),
    "key of a number": ("1: 2\n", ["'1'"]),
    "not text": (b"\xff\xfe\x00", ["can't be read as text"]),
}


def complaint(result):
    """The one message of a failed command."""
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("Error: ") == 1
    assert result.stderr.startswith("Error: ")
    return result.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_configuration_ends_in_one_clear_message(tmp_path, fault):
    content, says = FAULTS[fault]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = CliRunner().invoke(train_cli, ["run", "--config", str(path), "--check"])
    message = complaint(result)
    assert result.exit_code == 2
    for text in (str(path), *says):
        assert text in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("demmo.yaml", "did you mean configs/demo.yaml?"),
        ("quite_another_thing.yaml", "configs/ has examples"),
    ],
)
def test_a_missing_configuration_is_said(monkeypatch, name, says):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(train_cli, ["run", "--config", f"configs/{name}"])
    assert result.exit_code == 2
    assert complaint(result) == f"Error: configs/{name}: no such file; {says}\n"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.max_steps", "expected key=value, such as training.max_steps=200"),
        ("training.max_stepz=3", "did you mean 'max_steps'?"),
        ("training.max_steps=x", "valid integer"),
        ("data.batch_size.x=3", "has no keys below it"),
        ("model.size=[", "the value is not valid YAML"),
        ("model.size=2001-99-99", "the value is not valid YAML"),
    ],
)
def test_a_bad_override_is_said(tmp_path, override, says):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {batch_size: 3}\n")
    result = CliRunner().invoke(train_cli, ["run", "--config", str(path), "--check", override])
    assert result.exit_code == 2
    assert says in complaint(result)


@pytest.mark.parametrize("command", [*train_cli.commands.values()], ids=lambda c: c.name)
def test_every_option_of_train_has_a_text(command):
    silent = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert silent == []


def test_an_override_wins_over_the_file_and_leaves_the_rest(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("training:\n  max_steps: 5\n  log_interval: 7\n")
    config = load_section(TrainConfig, path, ["training.max_steps=9", "training.optimizer.lr=1e-3"])
    assert (config.training.max_steps, config.training.log_interval) == (9, 7)
    assert config.training.optimizer.lr == 0.001


def test_several_wrong_keys_are_all_said_at_once():
    with pytest.raises(ConfigError) as found:
        make_section(TrainConfig, {"data": {"x": 1}, "model": {"hidden_dim": 3}}, origin="here")
    lines = str(found.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("here: ") for line in lines)


def test_a_wrong_configuration_ends_the_process_with_2_and_one_message(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("training:\n\tmax_stepz: 3\n")
    result = run_module("train", "run", "--config", str(path))
    assert result.returncode == 2
    assert complaint(result) == (
        f"Error: {path}: unknown key 'training.max_stepz'; did you mean 'max_steps'?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["shards", "--sessions", "{tmp}/none", "--out", "{tmp}/out", "--workers", "0"], 1, "none"),
        (["verify", "{tmp}/none"], 1, "python -m preprocess shards --out"),
        (["show", "{tmp}/none"], 1, "python -m preprocess shards --out"),
        (["shards", "--recipe", "{tmp}/bad.yaml"], 2, "'segment.duration_x'"),
        (["validate", "{tmp}", "--recipe", "{tmp}/bad.yaml"], 2, "did you mean 'duration_s'?"),
        (["shards", "--recipe", "{tmp}/odd.yaml"], 2, "not a whole number of samples"),
    ],
)
def test_preprocess_ends_in_one_clear_message(tmp_path, arguments, code, says):
    (tmp_path / "bad.yaml").write_text("segment:\n  duration_x: 3\n")
    (tmp_path / "odd.yaml").write_text("segment:\n  duration_s: 0.33\n")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    result = CliRunner().invoke(preprocess_cli, given)
    assert result.exit_code == code
    assert says in complaint(result)


def test_a_folder_that_can_not_be_written_ends_in_one_clear_message(tmp_path):
    tiny_sets.write_sessions(tmp_path / "sessions")
    (tmp_path / "file").write_text("")
    given = ["--sessions", f"{tmp_path}/sessions", "--out", f"{tmp_path}/file/out"]
    result = CliRunner().invoke(preprocess_cli, ["shards", "--workers", "0", *given])
    assert result.exit_code == 1
    assert "a file is where a folder must be; fix: choose another path" in complaint(result)
    given = ["--sessions", f"{tmp_path}/sessions", "--out", f"{tmp_path}/file"]
    result = CliRunner().invoke(preprocess_cli, ["shards", "--workers", "0", *given])
    assert result.exit_code == 1
    assert f"{tmp_path}/file: File exists; a file is where a folder must be" in complaint(result)
    result = CliRunner().invoke(preprocess_cli, ["sessions", "list", f"{tmp_path}/file"])
    assert f"{tmp_path}/file/manifest.json: no such shard set" in complaint(result)


def test_validate_exits_with_1_when_a_session_failed_and_0_when_none_did(tmp_path):
    sessions = tiny_sets.write_sessions(tmp_path / "sessions")
    for name in ("bob", "cat", "dan", "eve"):
        shutil.rmtree(sessions / name)
    runner = CliRunner()
    good = runner.invoke(preprocess_cli, ["validate", str(sessions), "--summary"])
    assert good.exit_code == 0, good.output
    (sessions / "ann" / "vision_left.mp4").write_bytes(b"no video")
    bad = runner.invoke(preprocess_cli, ["validate", str(sessions), "--summary"])
    assert bad.exit_code == 1


# --- commands --------------------------------------------------------------------------------

COMMANDS = [
    pytest.param(group, name, id=f"{group.name or 'cli'}-{module}-{name}")
    for module, group in (("preprocess", preprocess_cli), ("train", train_cli))
    for name in ("", *group.commands)
]


@pytest.mark.parametrize(("group", "name"), COMMANDS)
def test_help_shows_an_example_or_defaults(group, name):
    result = CliRunner().invoke(group, [*([name] if name else []), "--help"])
    assert result.exit_code == 0
    assert re.search(r"python -m (train|preprocess) |make |\[default: ", result.output)
    assert "\\b" not in result.output


@pytest.mark.parametrize("group", [preprocess_cli, train_cli])
def test_an_unknown_command_or_option_exits_with_2(group):
    for given in (["dance"], [next(iter(group.commands)), "--dance"]):
        result = CliRunner().invoke(group, given)
        assert result.exit_code == 2
        assert "No such" in result.stderr


@pytest.mark.parametrize("group", [preprocess_cli, train_cli])
def test_ctrl_c_ends_with_130_and_no_traceback(group, monkeypatch):
    name, command = next(iter(group.commands.items()))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Command, "invoke", interrupt)
    assert command
    arguments = {"run": ["--config", "x"], "validate": ["x"]}[name]
    result = CliRunner().invoke(group, [name, *arguments])
    assert result.exit_code == 130
    assert result.stderr.startswith("Interrupted.")


def test_the_programs_say_their_names():
    for program in ("preprocess", "train"):
        result = run_module(program, "--help")
        assert result.stdout.startswith(f"Usage: python -m {program} ")
        assert result.returncode == 0
