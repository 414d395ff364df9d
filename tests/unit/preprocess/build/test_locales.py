"""Names of sessions, keys and splits are the same under any locale of the machine."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from helpers.locales import LOCALES, locale_environment
from helpers.locales import run_python as run
from helpers.oracles import build, file_hashes, set_keys, tiny_recipe, write_tiny_session

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("grün", "日本", "plain")
RECIPE = tiny_recipe(split={"val_fraction": 0.5})

READ_BY_TRAINING = """
import json, sys
from shared.recipe import load_recipe
from train.data.session_source import SessionSource
source = SessionSource(sys.argv[1], recipe=load_recipe(sys.argv[2]), split="val")
print(json.dumps([source.fingerprint, source._scan(0).session]))
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sessions")
    for name in NAMES:
        write_tiny_session(root / name, 1.0)
    return root


@pytest.fixture(params=LOCALES)
def environment(request, tmp_path_factory) -> dict[str, str]:
    return locale_environment(request.param, tmp_path_factory.mktemp("locales"))


def test_a_set_has_the_same_bytes_under_another_locale(recorded, tmp_path, environment):
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE.as_json()))
    options = ["--recipe", tmp_path / "recipe.yaml", "--sessions", recorded]
    options += ["--out", tmp_path / "out", "--workers", "0"]
    run("-m", "preprocess", "shards", *options, environment=environment)
    assert {key.partition("/")[0] for key in set_keys(tmp_path / "out")} == set(NAMES)
    build(recorded, tmp_path / "utf8", RECIPE)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "utf8")
    show = ["-m", "preprocess", "show", tmp_path / "out"]
    assert b"/000000, row" in run(*show, f"{NAMES[0]}/000000", environment=environment)
    drop = ["-m", "preprocess", "sessions", "drop", tmp_path / "out"]
    run(*drop, NAMES[0], environment=environment)
    assert not any(key.startswith(NAMES[0]) for key in set_keys(tmp_path / "out"))


def test_validation_names_sessions_alike_under_another_locale(recorded, tmp_path, environment):
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE.as_json()))
    command = ["-m", "preprocess", "validate", recorded, "--recipe", tmp_path / "recipe.yaml"]
    lines = run(*command, "--json", environment=environment).decode().splitlines()
    reports = [json.loads(line) for line in lines]
    assert [report["session"] for report in reports] == sorted(NAMES)
    assert {report["status"] for report in reports} == {"passed"}
    run(*command, environment=environment)
    run(*command, "--summary", "--report", tmp_path / "page.html", environment=environment)
    assert NAMES[1] in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_training_reads_the_same_split_under_another_locale(recorded, tmp_path, environment):
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE.as_json()))
    command = ["-c", READ_BY_TRAINING, recorded, tmp_path / "recipe.yaml"]
    there = run(*command, environment=environment)
    assert json.loads(there) == json.loads(run(*command, environment=dict(os.environ)))
