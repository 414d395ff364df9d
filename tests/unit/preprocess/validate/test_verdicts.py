"""Rows of docs/verdicts.md: exit code of validate, and what a build makes of the same session."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from helpers.oracles import build, jsonl, open_indexes, tiny_recipe, write_tiny_session
from helpers.sessions import read_lines, write_lines

from preprocess.__main__ import cli
from shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def exit_code(sessions: Path, tmp_path: Path, recipe: object, *options: str) -> int:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe.as_json()))
    command = ["validate", str(sessions), "--recipe", str(path), *options]
    return CliRunner().invoke(cli, command).exit_code


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    write_tiny_session(tmp_path / "in" / "ann", 2.0)
    write_tiny_session(tmp_path / "in" / "bob", 2.0)
    return tmp_path / "in"


def test_a_required_stream_that_can_not_be_read_rejects_the_session(sessions, tmp_path):
    (sessions / "bob" / "audio.wav").write_bytes(b"\0" * 999)
    recipe = tiny_recipe(required=["audio"])
    assert exit_code(sessions, tmp_path, recipe) == 1
    build(sessions, tmp_path / "out", recipe)
    [line] = jsonl(tmp_path / "out" / "rejected.jsonl")
    assert (line["level"], line["session"], line["segments"]) == ("session", "bob", 2)


def test_another_stream_that_can_not_be_read_is_masked(sessions, tmp_path):
    (sessions / "bob" / "audio.wav").write_bytes(b"\0" * 999)
    assert exit_code(sessions, tmp_path, tiny_recipe()) == 1
    summary = build(sessions, tmp_path / "out", tiny_recipe())
    assert summary.manifest.counts["samples"] == 4
    [line] = jsonl(tmp_path / "out" / "rejected.jsonl")
    assert (line["level"], line["stream"]) == ("stream", "audio")
    [loss] = summary.losses
    assert str(loss) == "audio: unreadable, 2.0 s in 1 session"
    present = {
        index.key(row): index.is_present(row, "audio")
        for _, index in open_indexes(tmp_path / "out")
        for row in range(index.num_samples)
    }
    assert {key for key, is_there in present.items() if not is_there} == {
        "bob/000000",
        "bob/000001",
    }


def test_a_gap_is_reported_and_stored_yet(sessions, tmp_path):
    path = sessions / "bob" / "metadata.jsonl"
    write_lines(path, [line for line in read_lines(path) if not 0.3 < line["timestamp"] < 1.6])
    assert exit_code(sessions, tmp_path, tiny_recipe(), "--strict") == 1
    summary = build(sessions, tmp_path / "out", tiny_recipe())
    assert summary.manifest.counts["samples"] == 4


def test_a_misspelled_name_is_a_warning_that_only_strict_fails(sessions, tmp_path):
    (sessions / "bob" / "audio.wav").rename(sessions / "bob" / "Audio.WAV")
    assert exit_code(sessions, tmp_path, tiny_recipe()) == 0
    assert exit_code(sessions, tmp_path, tiny_recipe(), "--strict") == 1
    build(sessions, tmp_path / "out", tiny_recipe())
    [line] = jsonl(tmp_path / "out" / "rejected.jsonl")
    assert line["level"] == "unknown"


def test_a_name_that_nothing_resembles_is_a_note(sessions, tmp_path):
    (sessions / "bob" / "imu.csv").touch()
    assert exit_code(sessions, tmp_path, tiny_recipe(), "--strict") == 0


def test_a_required_stream_that_no_session_has_ends_the_build(sessions, tmp_path):
    for name in ("ann", "bob"):
        (sessions / name / "audio.wav").unlink()
    with pytest.raises(ConfigError, match=r"streams\.audio is required, but none of 2 sessions"):
        build(sessions, tmp_path / "out", tiny_recipe(required=["audio"]))
