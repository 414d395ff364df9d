"""``train profile``: its measurements against known sums, sleeps and allocations; its report."""

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
import torch
import yaml
from click.testing import CliRunner
from helpers.sets import make_config, set_recipe
from helpers.training import CPU, SHAPES, EndlessLoader, make_batch, make_trainer
from helpers.training import make_config as training_config
from rich.console import Console

import shared.shardset.columns
import train.data.shard_source
import train.tools.profile
from shared.errors import ConfigError, EngineError
from shared.timing import StageTimer
from train.__main__ import cli
from train.config import as_train_config
from train.data.loader import open_source
from train.data.session_source import SessionSource
from train.model.multimodal import MultiModalCreature
from train.shapes import WindowShapes
from train.tools.profile import (
    PHASES,
    STAGES,
    Bench,
    TrainingStep,
    cached_batches,
    measure_steps,
    run_profile,
    sweep_workers,
    trace_steps,
    worker_counts,
)

MIB = 2**20
pytestmark = pytest.mark.usefixtures("one_thread")


def make_step(config, shapes):
    torch.manual_seed(1)
    model = MultiModalCreature(config, shapes).train()
    return model, TrainingStep(model, config, CPU)


def bench_of(config, *, num_steps=4, step=None):
    source = open_source(config, split="train")
    shapes = WindowShapes.from_recipe(source.recipe, config)
    return Bench(
        step=step or make_step(config, shapes)[1],
        source=source,
        config=config,
        device=CPU,
        num_steps=num_steps,
        log=lambda _: None,
    )


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_profiled_step_is_the_trainers(tmp_path, accumulation_steps):
    plain = training_config(tmp_path, accumulation_steps=accumulation_steps, max_steps=3)
    plain["model"]["dropout"] = 0.0
    trainer = make_trainer(plain, EndlessLoader())
    trainer.train()
    model, step = make_step(as_train_config(plain), SHAPES)
    for first in range(0, 3 * accumulation_steps, accumulation_steps):
        step.run([make_batch(first + i) for i in range(accumulation_steps)])
    pairs = zip(model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_every_phase_of_a_step_is_entered(tmp_path):
    config = as_train_config(training_config(tmp_path))
    _, step = make_step(config, SHAPES)
    entered = set()

    def phase(name):
        entered.add(name)
        return contextlib.nullcontext()

    step.run([make_batch(0)], phase=phase)
    assert entered == set(PHASES) - {"data_wait", "copy"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_phases_add_up_to_the_step(tiny_set, num_workers):
    times = measure_steps(bench_of(make_config(tiny_set, num_workers=num_workers)), num_warm_up=1)
    assert tuple(times.phases_s) == PHASES
    assert min(times.phases_s.values()) >= 0
    assert sum(times.phases_s.values()) == pytest.approx(times.step_s)
    assert times.num_steps == 4


def test_the_stages_add_up_to_making_a_batch_and_fit_into_the_wait_for_it(tiny_set):
    times = measure_steps(bench_of(make_config(tiny_set)), num_warm_up=1)
    assert tuple(times.stages_s) == STAGES
    assert min(times.stages_s.values()) >= 0
    assert sum(times.stages_s.values()) == pytest.approx(times.make_s)
    assert times.make_s + times.send_s <= times.phases_s["data_wait"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_time_is_charged_to_the_stage_that_takes_it(tiny_set, monkeypatch, num_workers):
    clock_s = 0  # a clock that stands still while anything else runs
    decode = train.data.shard_source.decode_text

    def slow_decode(member):
        nonlocal clock_s
        clock_s += 4
        return decode(member)

    class SlowChecksum:
        extend = shared.shardset.columns.google_crc32c.extend
        checksum = shared.shardset.columns.google_crc32c.value

        @classmethod
        def value(cls, content):
            nonlocal clock_s
            clock_s += 1
            return cls.checksum(content)

    monkeypatch.setattr(train.data.shard_source, "decode_text", slow_decode)
    monkeypatch.setattr(shared.shardset.columns, "google_crc32c", SlowChecksum)
    monkeypatch.setattr(train.tools.profile, "StageTimer", lambda: StageTimer(lambda: clock_s))
    bench = bench_of(make_config(tiny_set, num_workers=num_workers))
    times = measure_steps(bench, num_warm_up=1)
    # At most two thirds of the samples lack text; each has sensors or sound.
    assert times.stages_s["decode"] >= 7 / 3 * 4
    assert times.stages_s["checksum"] >= 7
    others = set(STAGES) - {"decode", "checksum"}
    assert {name: times.stages_s[name] for name in others} == dict.fromkeys(others, 0)
    if num_workers == 0:  # the loader works while the step waits for data
        assert times.phases_s["data_wait"] == times.step_s == times.make_s


def test_a_loader_without_a_timer_gives_batches_without_times(tiny_set):
    config = make_config(tiny_set)
    bench = bench_of(config)
    measure_steps(bench, num_warm_up=1)
    (batch,) = cached_batches(bench.source, config, CPU)
    assert not {"stages_s", "made_s"} & set(batch)


@pytest.mark.parametrize("was_ready", [True, False])
def test_a_batch_is_waited_for_if_it_is_made_after_it_is_requested(
    tiny_set, monkeypatch, was_ready
):
    bench = bench_of(make_config(tiny_set))
    (batch,) = cached_batches(bench.source, bench.config, CPU)

    def iter_endless(loader, *, seed):
        while True:
            made_s = 0.0 if was_ready else time.perf_counter()
            yield {**batch, "stages_s": {}, "made_s": made_s}

    monkeypatch.setattr(train.tools.profile, "iter_endless", iter_endless)
    assert measure_steps(bench, num_warm_up=1).waited_fraction == (not was_ready)


def test_without_loader_processes_every_batch_is_waited_for(tiny_set):
    assert measure_steps(bench_of(make_config(tiny_set)), num_warm_up=1).waited_fraction == 1


def test_operators_are_counted_per_step(tiny_set, tmp_path):
    weight = torch.ones(512, 512)

    class TwoProducts:
        def run(self, batches, *, phase):
            with phase("forward"):
                products.append(weight @ weight)
                products.append(weight @ weight)

    products = []
    bench = bench_of(make_config(tiny_set), step=TwoProducts())
    operators = {o["operator"]: o for o in trace_steps(bench, tmp_path / "a.pt.trace.json.gz")}
    assert operators["aten::mm"]["num_calls"] == 2
    allocated = sum(o["self_memory_bytes"] for o in operators.values())
    assert allocated == pytest.approx(2 * MIB, rel=0.01)  # float32 [512, 512], twice
    assert sum(o["self_fraction"] for o in operators.values()) == pytest.approx(1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt.trace.json.gz"]


@pytest.mark.parametrize(
    ("configured", "cores", "expected"),
    [(2, 2, [0, 1, 2]), (0, 1, [0, 1]), (4, 16, [0, 1, 2, 3, 4, 8, 16]), (6, 2, [0, 1, 2, 6])],
)
def test_numbers_of_processes_are_tried_in_both_directions(configured, cores, expected):
    assert worker_counts(configured, num_cores=cores) == expected


@pytest.fixture
def run_order(monkeypatch):
    """Replaces the runs of the sweep: the numbers of processes as they ran, and those that fail."""
    order, lost = [], set()

    def loader_rate(bench, num_workers):
        order.append(num_workers)
        if num_workers in lost:
            raise EngineError("a process was lost\nfix: use fewer")
        return 10.0 + num_workers

    monkeypatch.setattr(train.tools.profile, "_loader_rate", loader_rate)
    monkeypatch.setattr(train.tools.profile, "worker_counts", lambda *_, **__: [0, 1, 2])
    return order, lost


def test_every_other_round_of_the_sweep_runs_backward(tiny_set, run_order):
    order, _ = run_order
    bench = bench_of(make_config(tiny_set, num_workers=1), num_steps=2)
    rates, problems, cached_rates = sweep_workers(bench, num_rounds=3)
    assert order == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert rates == {n: [10.0 + n] * 3 for n in (0, 1, 2)}
    assert (problems, len(cached_rates)) == ({}, 3)


def test_a_number_of_processes_that_fails_is_reported_and_not_run_again(tiny_set, run_order):
    order, lost = run_order
    lost.add(2)
    bench = bench_of(make_config(tiny_set, num_workers=1), num_steps=2)
    rates, problems, _ = sweep_workers(bench, num_rounds=2)
    assert order.count(2) == 1
    assert rates == {0: [10.0, 10.0], 1: [11.0, 11.0], 2: []}
    assert problems == {2: "a process was lost"}


def test_the_configured_number_of_processes_must_run(tiny_set, run_order):
    _, lost = run_order
    lost.add(1)
    with pytest.raises(EngineError, match="a process was lost"):
        sweep_workers(bench_of(make_config(tiny_set, num_workers=1)), num_rounds=1)


@pytest.fixture(scope="module")
def profiled(tiny_set, tmp_path_factory):
    """The folder that the command ran in, its report, and its output."""
    home = tmp_path_factory.mktemp("profile")
    config = make_config(tiny_set, num_workers=1, batch_size=4)
    output = io.StringIO()
    with contextlib.chdir(home):
        run_profile(
            config,
            origin=Path("mine.yaml"),
            out=Path("profiler_output"),
            num_steps=2,
            num_rounds=1,
            console=Console(file=output, width=120),
        )
    report = json.loads((home / "profiler_output/profile_report.json").read_text())
    return home, report, output.getvalue()


def test_the_command_profiles_the_file_with_its_overrides(tiny_set, tmp_path, monkeypatch):
    calls = {}
    monkeypatch.setattr(
        "train.tools.profile.run_profile", lambda config, **values: calls.update(values, c=config)
    )
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(make_config(tiny_set).model_dump(mode="json")))
    line = ["profile", "--config", str(file), "--steps", "5", "data.num_workers=3"]
    result = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert result.exit_code == 0
    assert calls["c"].data.num_workers == 3
    assert (calls["out"], calls["num_steps"]) == (Path("profiler_output"), 5)


def test_a_profile_writes_its_report_and_its_trace_and_nothing_else(profiled):
    home, *_ = profiled
    files = {p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()}
    assert files == {
        "profiler_output/profile_report.json",
        "profiler_output/step.pt.trace.json.gz",
    }


def test_the_report_has_all_sections(profiled):
    _, report, _ = profiled
    assert set(report) == {
        *("machine", "versions", "config_file", "config", "step", "loader"),
        *("memory_limit_bytes", "verdict", "recommendations", "untested"),
    }
    assert report["config"]["data"]["batch_size"] == 4
    assert set(report["step"]["phases_s"]) == set(PHASES)
    assert report["step"]["memory_mb"] > 0
    assert 0 < len(report["step"]["operators"]) <= 20
    for each in report["recommendations"] + report["untested"]:
        assert set(each) == {"what", "change", "why", "expected_gain"}


def test_the_sums_of_the_report_hold(profiled):
    _, report, _ = profiled
    step, loader = report["step"], report["loader"]
    assert step["samples_per_s"] == pytest.approx(4 / step["step_s"])
    assert sum(step["phases_s"].values()) == pytest.approx(step["step_s"])
    assert sum(step["stages_s"].values()) == pytest.approx(step["make_s"])
    assert loader["headspaces"] == [loader["headspace"]]
    assert {p["num_workers"] for p in loader["workers"]} >= {0}


def test_the_trace_is_a_chrome_trace_with_the_phases(profiled):
    home, *_ = profiled
    with gzip.open(home / "profiler_output/step.pt.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {e["name"] for e in events if e.get("ph") == "X" and e["dur"] >= 0}
    assert {*PHASES} - {"data_wait", "copy"} <= names
    assert "aten::mm" in names or "aten::addmm" in names


def test_the_terminal_shows_tables_and_what_to_add(profiled):
    _, report, output = profiled
    assert "headspace" in output
    for each in report["recommendations"]:
        for key in each["change"]:
            assert f"add {key}=" in output or f" {key}=" in output
    if not report["recommendations"]:
        assert "already good" in output
    assert "untested: training.compile=true" in output


def test_sessions_read_directly_are_profiled_as_well(tiny_sessions, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(set_recipe().model_dump(mode="json")))
    config = make_config(None, root_dir=tiny_sessions, recipe=recipe, batch_size=2)
    assert isinstance(open_source(config, split="train"), SessionSource)
    report = run_profile(
        config, origin=tmp_path / "mine.yaml", out=tmp_path / "out", num_steps=2, num_rounds=1
    )
    assert report["step"]["stages_s"]["decode"] > 0
    assert report["step"]["stages_s"]["fetch"] == 0


def test_one_of_several_ranks_is_refused(tiny_set, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        run_profile(make_config(tiny_set), origin=tmp_path / "c", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def processes_of(session):
    """Running processes of a session."""
    processes = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state != "Z":
                processes.append(int(stat.parent.name))
    return processes


CTRL_C_TARGET = """
import sys
import train.tools.profile
from train.__main__ import cli

run = train.tools.profile.TrainingStep.run

def announced_run(*values, **named):
    run(*values, **named)  # the first step imports numba, which hides an interrupt
    print("a step has run", flush=True)

train.tools.profile.TrainingStep.run = announced_run
cli(sys.argv[1:])
"""


def test_ctrl_c_leaves_no_report_and_no_process(tiny_set, tmp_path):
    file = tmp_path / "mine.yaml"
    config = make_config(tiny_set, num_workers=1, batch_size=4)
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    out = tmp_path / "out"
    arguments = ["profile", "--config", str(file), "--out", str(out), "--steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C_TARGET, *arguments],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "a step has run\n", process.communicate()[0]
    assert processes_of(process.pid)[1:]  # its loader process, which gave the first batch
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    for _ in range(1000):  # orphans end by themselves
        if not processes_of(process.pid):
            break
        time.sleep(0.05)
    assert processes_of(process.pid) == []
    assert not [p for p in out.rglob("*") if p.is_file()]
