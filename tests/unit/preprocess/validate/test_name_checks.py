"""Validation names what no stream uses; of folders that are left out it says what a build says."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from helpers.oracles import build, jsonl, tiny_recipe, write_tiny_session
from helpers.sessions import read_lines, write_lines

from preprocess.__main__ import cli
from preprocess.sets.edit import list_sessions
from preprocess.sets.verify import verify_set
from preprocess.validate.report import check_session
from shared.errors import ConfigError, SessionError
from shared.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = tiny_recipe()


def validate(*arguments: Path | str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run validate; return its exit code and the reports by session."""
    result = CliRunner().invoke(cli, ["validate", "--json", *map(str, arguments)])
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    return result.exit_code, {report["session"]: report for report in reports}


def rename_key(path: Path, old: str, new: str) -> None:
    lines = read_lines(path)
    write_lines(path, [{new if k == old else k: v for k, v in line.items()} for line in lines])


def test_a_misspelled_key_is_a_warning_that_names_the_declared_one(session):
    rename_key(session / "metadata.jsonl", "touch", "tuoch")
    checked = check_session(session, recipe=Recipe())
    assert checked.report.status == "warnings"
    [warning] = checked.report.warnings
    assert warning == (
        "metadata.jsonl: key tuoch not used by the recipe; did you mean touch? fix: correct the "
        "name, or declare a stream of it"
    )
    assert checked.report.checks["names"] == "warnings"
    [finding] = checked.findings
    assert finding.streams == ("touch",)


def test_a_misspelled_file_is_a_warning_beside_the_missing_stream(session):
    (session / "vision_left.mp4").rename(session / "Vision_Left.MP4")
    report = check_session(session, recipe=Recipe()).report
    assert any("did you mean vision_left.mp4? fix: rename it" in text for text in report.warnings)
    assert any("required stream vision_left is missing" in text for text in report.errors)
    assert report.streams["vision_left"] == "failed"


def test_more_than_the_recipe_uses_is_a_note_and_passes(session):
    (session / "imu.csv").touch()
    lines = read_lines(session / "metadata.jsonl")
    write_lines(session / "metadata.jsonl", [{**line, "gaze": [1]} for line in lines])
    code, reports = validate(session)
    assert code == 0
    assert reports["session_001"]["status"] == "passed"
    note = "not used by the recipe: key gaze of metadata.jsonl; file imu.csv"
    assert reports["session_001"]["notes"] == [note]
    assert validate(session, "--strict")[0] == 0
    assert f"  note  {note}" in CliRunner().invoke(cli, ["validate", str(session)]).output


def test_a_misspelled_label_names_the_declared_one(session):
    lines = read_lines(session / "text.jsonl")
    wrong = [{**line, "stream": "extrenal"} for line in lines]
    write_lines(session / "text.jsonl", wrong)
    report = check_session(session, recipe=Recipe()).report
    assert "declares external, internal; did you mean external? fix:" in report.errors[0]


# --- what validation and the build say of the same folders -----------------------------------


@pytest.fixture
def mixed(tmp_path) -> Path:
    """One good session, and folders that are left out, each for a reason."""
    root = tmp_path / "sessions"
    write_tiny_session(root / "good", 2.0)
    write_tiny_session(root / "tab\tbed", 1.0)
    write_tiny_session(root / "cafe", 1.0).rename(root / os.fsdecode(b"caf\xe9"))
    write_tiny_session(root / "day 1" / "deep", 1.0)
    odd = write_tiny_session(root / "odd", 1.0)
    for name in ("vision_left.mp4", "audio.wav", "metadata.jsonl", "text.jsonl"):
        (odd / name).rename(odd / name.upper())
    (root / "lost").symlink_to(root / "nowhere")
    (root / "notes").mkdir()
    return root


LOST = {r"tab\tbed", r"caf\udce9", "odd", "lost"}


def test_folders_that_are_left_out_are_told_alike_and_the_rest_is_built(mixed, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE.as_json()))
    code, reports = validate(mixed, "--recipe", recipe)
    assert code == 1
    assert reports.keys() == {"good", "day 1", *LOST}
    assert reports["good"]["status"] == "passed"
    assert {name for name, report in reports.items() if report["status"] == "failed"} == LOST

    summary = build(mixed, tmp_path / "out", RECIPE)
    assert summary.manifest.counts["samples"] == 2
    assert summary.manifest.counts["sessions"] == summary.num_sessions == 5
    lines = {line["session"]: line for line in jsonl(tmp_path / "out" / "rejected.jsonl")}
    assert lines.keys() == {"day 1", *LOST}
    for name, line in lines.items():
        assert line["reason"] in reports[name]["errors"] + reports[name]["warnings"]
        assert line["level"] == ("session" if name in LOST else "unknown")
        assert line.get("segments", 0) == 0
        assert any(text.startswith(f"{name} is left out: ") for text in summary.warnings)
    assert verify_set(tmp_path / "out").problems == ()
    assert {s.name for s in list_sessions(tmp_path / "out")} == {"good", *LOST}


def test_only_bad_names_are_an_error_with_the_reason(tmp_path):
    write_tiny_session(tmp_path / "in" / "tab\tbed", 1.0)
    with pytest.raises(SessionError, match=r"contains \\t, which is not printable; fix: rename"):
        build(tmp_path / "in", tmp_path / "out", RECIPE)
    assert validate(tmp_path / "in")[0] == 1
    assert validate(tmp_path / "in" / "tab\tbed")[0] == 1
    report = check_session(tmp_path / "in" / "tab\tbed", recipe=RECIPE).report
    assert report.errors == (
        r"the name of its folder contains \t, which is not printable; fix: rename the folder",
    )


def test_a_build_counts_unknown_names_and_lists_them(tmp_path):
    root = tmp_path / "sessions"
    for name in ("ann", "bob"):
        write_tiny_session(root / name, 1.0)
        rename_key(root / name / "metadata.jsonl", "touch", "tuoch")
        (root / name / "imu.csv").touch()
    command = ["shards", "--sessions", str(root), "--out", str(tmp_path / "out"), "--workers", "0"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE.as_json()))
    result = CliRunner().invoke(cli, [*command, "--recipe", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0
    assert "warning: metadata.jsonl: key tuoch not used by the recipe; did you mean touch?" in (
        result.stderr
    )
    assert "(ann, bob)" in result.stderr
    assert "not used by the recipe: file imu.csv (2 sessions)" in result.stdout
    lines = [x for x in jsonl(tmp_path / "out" / "rejected.jsonl") if x["level"] == "unknown"]
    assert [line["session"] for line in lines] == ["ann", "ann", "bob", "bob"]
    assert lines[1] == {
        "level": "unknown",
        "session": "ann",
        "reason": "not used by the recipe: file imu.csv",
    }


def test_an_added_file_is_listed_although_no_session_is_scanned_again(tmp_path):
    write_tiny_session(tmp_path / "in" / "ann", 1.0)
    build(tmp_path / "in", tmp_path / "out", RECIPE)
    assert jsonl(tmp_path / "out" / "rejected.jsonl") == []
    (tmp_path / "in" / "ann" / "imu.csv").touch()
    summary = build(tmp_path / "in", tmp_path / "out", RECIPE)
    assert summary.num_scanned == 0
    assert summary.plan.is_empty
    [line] = jsonl(tmp_path / "out" / "rejected.jsonl")
    assert line["reason"] == "not used by the recipe: file imu.csv"


def test_a_required_stream_that_is_misspelled_everywhere_is_named(tmp_path):
    folder = write_tiny_session(tmp_path / "in" / "ann", 1.0)
    (folder / "vision_left.mp4").rename(folder / "vision-left.mp4")
    with pytest.raises(ConfigError, match=r"did you mean vision_left\.mp4\?"):
        build(tmp_path / "in", tmp_path / "out", tiny_recipe(required=["vision_left"]))
