"""``train profile``: what it measures, against sums, sleeps and allocations that are known."""

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
from rich.console import Console
from tiny_sets import make_config, set_recipe
from tiny_training import SHAPES, EndlessLoader, make_batch, make_trainer
from tiny_training import make_config as training_config
from torch import nn

import shared.columns
import train.reader
from shared.errors import ConfigError, CreatureError
from shared.laps import Laps
from shared.recipe import WindowShapes
from train.__main__ import cli
from train.config import as_train_config
from train.dataset import SessionSource
from train.loader import open_source
from train.model import MultiModalCreature
from train.optimizing import make_optimizer
from train.profiling.breakdown import STAGES, Delivery, measure_steps, ready_counts
from train.profiling.command import run_profile
from train.profiling.parts import measure_parts
from train.profiling.rates import cached_batches, in_turns, with_changes
from train.profiling.step import PHASES, TrainingStep
from train.profiling.sweeps import Bench, worker_counts
from train.profiling.trace import memory_by_phase, peak_bytes, trace_steps
from train.profiling.variants import measure_variants, variant_changes

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_step(config, shapes):
    torch.manual_seed(1)
    model = MultiModalCreature(config, shapes).train()
    optimizer = make_optimizer(model, config.training.optimizer)
    return model, optimizer, TrainingStep(model, optimizer, config, CPU)


def measure(config, source, **options):
    shapes = WindowShapes.from_recipe(source.recipe, tick_rate_hz=config.model.tick_rate_hz)
    *_, step = make_step(config, shapes)
    options = {"num_steps": 4, "num_warm_up": 1, **options}
    return measure_steps(step, source, config, CPU, **options)


def bench_of(config, **options):
    source = open_source(config, split="train")
    shapes = WindowShapes.from_recipe(source.recipe, tick_rate_hz=config.model.tick_rate_hz)
    model, optimizer, _ = make_step(config, shapes)
    options = {"num_steps": 2, "num_rounds": 1, "tell": lambda _: None, **options}
    return Bench(
        model=model, optimizer=optimizer, source=source, config=config, device=CPU, **options
    )


# --- the step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_profiled_step_is_the_trainers(tmp_path, accumulation_steps):
    plain = training_config(tmp_path, accumulation_steps=accumulation_steps, max_steps=3)
    plain["model"]["dropout"] = 0.0
    trainer = make_trainer(plain, EndlessLoader())
    trainer.train()
    model, _, step = make_step(as_train_config(plain), SHAPES)
    for first in range(0, 3 * accumulation_steps, accumulation_steps):
        step.run([make_batch(first + i) for i in range(accumulation_steps)])
    pairs = zip(model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_every_phase_of_a_step_is_entered(tmp_path):
    config = as_train_config(training_config(tmp_path))
    *_, step = make_step(config, SHAPES)
    entered = set()

    def phase(name):
        entered.add(name)
        return contextlib.nullcontext()

    step.run([make_batch(0)], phase=phase)
    assert entered == set(PHASES) - {"data_wait", "copy"}


def test_laps_add_up_and_belong_to_the_stage_that_ended():
    moments = iter([0.0, 1.0, 3.0, 6.0])
    laps = Laps(lambda: next(moments))
    for stage in ("read", "decode", "read"):
        laps.lap(stage)
    assert laps.take() == {"read": 4.0, "decode": 2.0}


# --- the loader --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_phases_add_up_to_the_step(tiny_set, num_workers):
    config = make_config(tiny_set, num_workers=num_workers)
    found = measure(config, open_source(config, split="train"))
    assert tuple(found.phases_s) == PHASES
    assert min(found.phases_s.values()) >= 0
    assert sum(found.phases_s.values()) == pytest.approx(found.step_s, rel=0.05, abs=1e-3)


def test_the_stages_add_up_to_making_a_batch_and_fit_into_the_wait_for_it(tiny_set):
    config = make_config(tiny_set)
    found = measure(config, open_source(config, split="train"))
    assert tuple(found.stages_s) == STAGES
    assert min(found.stages_s.values()) >= 0
    assert sum(found.stages_s.values()) == pytest.approx(found.make_s)
    assert found.make_s + found.send_s <= found.phases_s["data_wait"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_time_goes_to_the_stage_that_takes_it(tiny_set, monkeypatch, num_workers):
    decode, checksum = train.reader.decode_text, shared.columns.google_crc32c.value

    def slow_decode(member):
        time.sleep(0.004)
        return decode(member)

    class SlowChecksum:
        extend = shared.columns.google_crc32c.extend

        @staticmethod
        def value(content):
            time.sleep(0.001)
            return checksum(content)

    config = make_config(tiny_set, num_workers=num_workers)
    source = open_source(config, split="train")
    before = measure(config, source).stages_s
    monkeypatch.setattr(train.reader, "decode_text", slow_decode)
    monkeypatch.setattr(shared.columns, "google_crc32c", SlowChecksum)
    after = measure(config, source).stages_s
    longer = {name: after[name] - before[name] for name in STAGES}
    # At most two thirds of the samples lack text; each has sensors or sound.
    assert longer["decode"] > 7 / 3 * 0.004
    assert longer["checksum"] > 7 * 0.001
    assert max(longer["plan"], longer["open"], longer["collate"]) < longer["checksum"]


def test_a_loader_without_laps_gives_batches_without_them(tiny_set):
    config = make_config(tiny_set)
    source = open_source(config, split="train")
    measure(config, source)
    (batch,) = cached_batches(source, config, CPU)
    assert not {"stages_s", "made_s"} & set(batch)


def test_what_was_ready_is_counted_from_when_it_was_made():
    asked_and_made = [(10, 9), (11, 10.5), (12, 12.5), (13, 12.75), (14, 20), (15, 21)]
    deliveries = [Delivery(asked_s=a, made_s=m, there_s=m) for a, m in asked_and_made]
    # At 10 only the first; at 11 the second; at 12 none; at 13 the fourth. Of those asked for at 14
    # and 15 it is not known what was begun behind them.
    assert ready_counts(deliveries, num_ahead=2) == [1, 1, 0, 1]
    assert ready_counts(deliveries[:1], num_ahead=2) == [1]


def test_batches_of_a_fast_loader_are_ready_and_not_waited_for(tiny_set):
    config = make_config(tiny_set, num_workers=1, prefetch_batches=2)
    source = open_source(config, split="train")

    class SlowStep:
        def run(self, batches, *, phase):
            time.sleep(0.15)

    found = measure_steps(SlowStep(), source, config, CPU, num_steps=4, num_warm_up=2)
    assert found.waited_fraction == 0
    assert found.ready_batches_p50 == 2


def test_without_loader_processes_every_batch_is_waited_for(tiny_set):
    config = make_config(tiny_set)
    found = measure(config, open_source(config, split="train"))
    assert (found.waited_fraction, found.ready_batches_p50) == (1, 0)


@pytest.mark.parametrize(
    ("configured", "cores", "expected"),
    [(2, 2, [0, 1, 2]), (0, 1, [0, 1]), (4, 16, [0, 1, 2, 3, 4, 8, 16]), (6, 2, [0, 1, 2, 6])],
)
def test_numbers_of_processes_are_tried_in_both_directions(configured, cores, expected):
    assert worker_counts(configured, num_cores=cores) == expected


# --- parts of the model and operators ----------------------------------------------------------


def test_bytes_of_parts_are_those_of_their_tensors():
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 8)])
            self.predictors = nn.ModuleDict({"audio": nn.Linear(8, 2, bias=False)})

        def forward(self, x):
            return self.predictors["audio"](self.blocks[0](x))

    toy, x = Toy(), torch.ones(3, 4)
    found = {p.part: p for p in measure_parts(toy, lambda: toy(x), given={"x": x}, device=CPU)}
    assert {n: p.num_parameters for n, p in found.items() if p.num_calls} == {
        "backbone": 4 * 8 + 8,
        "head_audio": 8 * 2,
    }
    assert found["backbone"].output_bytes == 3 * 8 * 4
    assert found["head_audio"].output_bytes == 3 * 2 * 4
    assert found["backbone"].kept_bytes == 0  # its input is the batch
    assert found["head_audio"].kept_bytes == 3 * 8 * 4  # its input


def test_seconds_of_parts_are_without_the_parts_inside_and_add_up(tmp_path):
    config = as_train_config(training_config(tmp_path))
    model, *_ = make_step(config, SHAPES)
    inputs = make_batch(0)["inputs"]
    touch = model.encoder.encoders["touch"]
    touch.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    began_s = time.perf_counter()
    found = {
        p.part: p.forward_s
        for p in measure_parts(model, lambda: model(inputs), given=inputs, device=CPU)
    }
    whole_s = time.perf_counter() - began_s
    assert sum(found.values()) <= whole_s
    # The sleep's hook runs before the measuring one, so it is the surrounding part's.
    assert found["encoder_fusion"] >= 0.05 > found["encoder_touch"]
    assert set(found) >= {"backbone", "head_audio", "head_animation", "encoder_audio", "outside"}


def test_hooks_are_gone_after_the_measurement(tmp_path):
    model, *_ = make_step(as_train_config(training_config(tmp_path)), SHAPES)
    inputs = make_batch(0)["inputs"]
    measure_parts(model, lambda: model(inputs), given=inputs, device=CPU)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_memory_of_phases_is_what_they_allocate(tmp_path):
    def run_step(phase):
        held = []
        with phase("forward"):
            held.append(torch.empty(4 * MIB, dtype=torch.uint8))
        with phase("backward"):
            held.append(torch.empty(2 * MIB, dtype=torch.uint8))
            held.clear()
        with phase("optimizer"):
            torch.empty(1 * MIB, dtype=torch.uint8)

    trace = trace_steps(run_step, tmp_path / "a.pt.trace.json.gz", device=CPU, num_steps=2)
    found = {m.phase: (round(m.peak_bytes / MIB), round(m.end_bytes / MIB)) for m in trace.memory}
    assert found == {"forward": (4, 4), "backward": (6, 0), "optimizer": (1, 0)}
    assert round(peak_bytes(run_step, tmp_path, device=CPU) / MIB) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt.trace.json.gz"]


def test_memory_is_relative_to_the_begin_of_the_last_step():
    def phase(name, ts):
        return {"cat": "user_annotation", "name": name, "ts": ts, "dur": 10}

    def memory(ts, total, change, device=0):
        args = {"Total Allocated": total, "Bytes": change, "Device Type": device}
        return {"name": "[memory]", "ts": ts, "args": args}

    events = [
        {"cat": "user_annotation", "name": "ProfilerStep#1", "ts": 0, "dur": 50},
        {"cat": "user_annotation", "name": "ProfilerStep#2", "ts": 100, "dur": 50},
        phase("forward", 0),
        memory(1, 900, 900),
        phase("forward", 100),
        memory(101, 1000, 100),
        memory(102, 7, 7, device=1),
        phase("losses", 120),
        memory(121, 1300, 300),
        memory(122, 1050, -250),
    ]
    found = {m.phase: (m.peak_bytes, m.end_bytes) for m in memory_by_phase(events, device_type=0)}
    assert found == {"forward": (100, 100), "losses": (400, 150)}


def test_operators_are_counted_per_step(tmp_path):
    weight = torch.ones(64, 64)

    def run_step(phase):
        with phase("forward"):
            weight @ weight
            weight @ weight

    trace = trace_steps(run_step, tmp_path / "a.pt.trace.json.gz", device=CPU)
    found = {o.operator: o for o in trace.operators}
    assert found["aten::mm"].num_calls == 2
    assert sum(o.self_fraction for o in trace.operators) == pytest.approx(1)


# --- runs in turns -----------------------------------------------------------------------------


def test_cases_run_in_turns_every_other_round_backwards():
    order = []
    cases = {name: (lambda name=name: order.append(name) or 1.0) for name in "abc"}
    rates, problems = in_turns(cases, num_rounds=3, tell=lambda _: None)
    assert "".join(order) == "abccbaabc"
    assert rates == dict.fromkeys("abc", (1.0, 1.0, 1.0))
    assert problems == {}


def test_a_case_that_fails_is_named_and_not_run_again():
    tries = []

    def fail():
        tries.append(1)
        raise torch.OutOfMemoryError("no more")

    cases = {"base": lambda: 1.0, "bad": fail}
    rates, problems = in_turns(cases, num_rounds=2, tell=lambda _: None)
    assert (rates, len(tries)) == ({"base": (1.0, 1.0), "bad": ()}, 1)
    assert problems["bad"].lacks_memory


def test_the_first_case_must_run():
    def fail():
        raise CreatureError("no")

    with pytest.raises(CreatureError, match="no"):
        in_turns({"base": fail, "other": lambda: 1.0}, num_rounds=1, tell=lambda _: None)


def test_changes_reach_the_configuration_they_name(tiny_set):
    config = make_config(tiny_set)
    changed = with_changes(config, {"data.num_workers": 3, "training.precision": "bf16"})
    assert (changed.data.num_workers, changed.training.precision) == (3, "bf16")
    assert config.data.num_workers == 0


def test_batch_sizes_keep_the_samples_of_a_step_where_they_can(tiny_set):
    config = with_changes(
        make_config(tiny_set), {"data.batch_size": 4, "training.accumulation_steps": 2}
    )
    sizes = [
        (c["data.batch_size"], c.get("training.accumulation_steps"))
        for c in variant_changes(config, CPU, try_compile=False)
        if "data.batch_size" in c
    ]
    assert sizes == [(2, 4), (8, 1), (16, None)]


def test_out_of_memory_is_a_figure_and_no_failure(tiny_set, tmp_path, monkeypatch):
    run = TrainingStep.run

    def run_small(self, batches, **options):
        if len(batches[0]["weight"]) > 8:
            raise torch.OutOfMemoryError("no more")
        run(self, batches, **options)

    monkeypatch.setattr(TrainingStep, "run", run_small)
    _, variants = measure_variants(
        bench_of(make_config(tiny_set, batch_size=8)),
        folder=tmp_path,
        try_compile=False,
        limit_bytes=2**60,
    )
    lacking = {v.change["data.batch_size"] for v in variants if v.lacks_memory}
    assert lacking == {16, 32}
    assert {v.problem for v in variants if not v.lacks_memory} == {None}
    assert list(tmp_path.iterdir()) == []


def test_what_would_not_fit_is_not_tried(tiny_set, tmp_path):
    bench = bench_of(make_config(tiny_set, batch_size=8))
    options = {"folder": tmp_path, "try_compile": False}
    cached, _ = measure_variants(bench, limit_bytes=2**60, **options)
    _, variants = measure_variants(bench, limit_bytes=cached.peak_memory_bytes, **options)
    lacking = {v.change["data.batch_size"] for v in variants if v.lacks_memory}
    assert lacking == {16, 32}


def test_peak_memory_grows_with_the_batch(tiny_set, tmp_path):
    bench = bench_of(make_config(tiny_set, batch_size=8))
    cached, variants = measure_variants(
        bench, folder=tmp_path, try_compile=False, limit_bytes=2**60
    )
    by_size = {v.change.get("data.batch_size"): v.peak_memory_bytes for v in variants}
    weights = sum(p.nbytes for p in bench.model.parameters())
    assert 4 * weights < by_size[4] < cached.peak_memory_bytes < by_size[16] < by_size[32]


# --- the command -------------------------------------------------------------------------------


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
