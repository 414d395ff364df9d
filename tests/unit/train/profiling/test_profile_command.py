"""The command that profiles: its report, its trace, its tables, and how it ends."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from helpers.sets import make_config, set_recipe
from rich.console import Console

from shared.errors import ConfigError
from train.__main__ import cli
from train.data.loader import open_source
from train.data.session_source import SessionSource
from train.profiling.command import run_profile
from train.profiling.step import PHASES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def profiled(tiny_set, tmp_path_factory):
    """The folder that a profile was called in, its report, and what was printed."""
    home = tmp_path_factory.mktemp("profile")
    config = make_config(tiny_set, num_workers=1, batch_size=4)
    said = io.StringIO()
    with contextlib.chdir(home):
        run_profile(
            config,
            origin=Path("mine.yaml"),
            out=Path("profiler_output"),
            num_steps=2,
            num_rounds=1,
            console=Console(file=said, width=120),
        )
    report = json.loads((home / "profiler_output/profile_report.json").read_text())
    return home, report, said.getvalue()


def test_the_command_profiles_the_file_with_its_changes(tiny_set, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "train.profiling.command.run_profile", lambda config, **rest: seen.update(rest, c=config)
    )
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(make_config(tiny_set).model_dump(mode="json")))
    line = ["profile", "--config", str(file), "--steps", "5", "data.num_workers=3"]
    result = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert result.exit_code == 0
    assert seen["c"].data.num_workers == 3
    assert (seen["out"], seen["num_steps"]) == (Path("profiler_output"), 5)


def test_a_profile_writes_its_report_and_its_trace_and_nothing_else(profiled):
    home, *_ = profiled
    files = {p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()}
    assert files == {
        "profiler_output/profile_report.json",
        "profiler_output/step.pt.trace.json.gz",
    }


def test_the_report_has_all_parts(profiled):
    _, report, _ = profiled
    assert set(report) == {
        *("machine", "versions", "config_file", "config", "step", "loader", "variants"),
        *("memory_limit_bytes", "verdict", "recommendations", "untested"),
    }
    assert report["config"]["data"]["batch_size"] == 4
    assert set(report["step"]["phases_s"]) == set(PHASES)
    assert 0 < len(report["step"]["operators"]) <= 20
    for each in report["recommendations"] + report["untested"]:
        assert set(each) == {"what", "change", "why", "expected_gain"}


def test_the_report_s_sums_hold(profiled):
    _, report, _ = profiled
    step, loader = report["step"], report["loader"]
    assert step["samples_per_s"] == pytest.approx(4 / step["step_s"])
    assert sum(step["phases_s"].values()) == pytest.approx(step["step_s"], rel=0.05, abs=1e-3)
    assert sum(step["stages_s"].values()) == pytest.approx(step["make_s"])
    assert loader["headspaces"] == [loader["headspace"]]
    assert {p["num_workers"] for p in loader["workers"]} >= {0}
    assert all(v["samples_per_s"] for v in report["variants"] if not v["problem"])


def test_the_trace_is_a_chrome_trace_with_the_phases(profiled):
    home, *_ = profiled
    with gzip.open(home / "profiler_output/step.pt.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {e["name"] for e in events if e.get("ph") == "X" and e["dur"] >= 0}
    assert {*PHASES} - {"data_wait", "copy"} <= names
    assert "aten::mm" in names or "aten::addmm" in names


def test_the_terminal_shows_tables_and_what_to_add(profiled):
    _, report, said = profiled
    assert "headspace" in said
    for each in report["recommendations"]:
        for key in each["change"]:
            assert f"add {key}=" in said or f" {key}=" in said
    if not report["recommendations"]:
        assert "already good" in said
    assert "untested: training.compile=true" in said


def test_sessions_read_directly_are_profiled_as_well(tiny_sessions, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(set_recipe().model_dump(mode="json")))
    config = make_config(None, root_dir=tiny_sessions, recipe=recipe, batch_size=2)
    assert isinstance(open_source(config, split="train"), SessionSource)
    profile = run_profile(
        config, origin=tmp_path / "mine.yaml", out=tmp_path / "out", num_steps=2, num_rounds=1
    )
    assert profile.breakdown.stages_s["decode"] > 0
    assert profile.breakdown.stages_s["fetch"] == 0


def test_one_of_several_ranks_is_refused(tiny_set, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        run_profile(make_config(tiny_set), origin=tmp_path / "c", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def processes_of(session):
    """Processes of a session that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_ctrl_c_leaves_no_report_and_no_process(tiny_set, tmp_path):
    file = tmp_path / "mine.yaml"
    config = make_config(tiny_set, num_workers=1, batch_size=4)
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "train", "profile", "--config", str(file), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--steps", "100000"], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    until_s = time.monotonic() + 90
    while not processes_of(process.pid)[1:]:  # a loader process is there
        assert process.poll() is None
        assert time.monotonic() < until_s
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    time.sleep(1.5)  # orphans end within a second
    assert processes_of(process.pid) == []
    assert not [p for p in out.rglob("*") if p.is_file()]
