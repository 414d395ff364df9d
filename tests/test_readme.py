"""What README.md tells to type exists and runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch.distributed.run
import yaml

from preprocess.__main__ import cli as preprocess_cli
from shared.config import make_section
from train.__main__ import cli as train_cli
from train.config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLIS = {"preprocess": preprocess_cli, "train": train_cli}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(prefix):
    found = re.findall(rf"^{prefix} [^\n`#]*", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert found, f"README names no {prefix} command"
    return [line.strip() for line in found]


@pytest.mark.parametrize("line", commands("python -m"))
def test_every_python_command_of_the_readme_is_one_of_ours(line):
    _, _, program, name, *arguments = shlex.split(line)
    command = CLIS[program].commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {a for a in arguments if a.startswith("--")} <= known


@pytest.mark.parametrize("line", commands("torchrun"))
def test_every_torchrun_line_of_the_readme_starts_a_training(line):
    _, _, rest = line.partition(" -m ")
    program, name, *arguments = shlex.split(rest)
    known = {option for p in CLIS[program].commands[name].params for option in p.opts}
    assert {a for a in arguments if a.startswith("--")} <= known
    parser = torch.distributed.run.get_args_parser()
    assert parser.parse_args(shlex.split(line)[1:]).training_script == "train"


@pytest.mark.parametrize("line", commands("make"))
def test_every_make_target_of_the_readme_is_in_the_makefile(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_configuration_of_the_readme_is_valid():
    (block,) = blocks("yaml")
    config = make_section(TrainConfig, yaml.safe_load(block))
    assert config.training.optimizer.lr == 3e-4


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_the_stock_reader_of_the_readme_joins_a_shard(tiny_set, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "demo").symlink_to(tiny_set)
    monkeypatch.chdir(tmp_path)
    (block,) = (b for b in blocks("python") if "webdataset" in b)
    names = {}
    exec(block, names)
    names["store"].close()
    assert {"audio.wav", "text.json"} <= set().union(*names["samples"].values())
    assert names["proprio"].shape[0] >= len(names["samples"]) > 0
