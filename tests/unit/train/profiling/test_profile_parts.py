"""Where memory and time go: parts of the model, phases, operators."""

from __future__ import annotations

import time

import pytest
import torch
from helpers.steps import CPU, make_step
from helpers.training import SHAPES, make_batch
from helpers.training import make_config as training_config
from torch import nn

from train.config import as_train_config
from train.profiling.parts import measure_parts
from train.profiling.trace import memory_by_phase, peak_bytes, trace_steps

MIB = 2**20
pytestmark = pytest.mark.usefixtures("one_thread")


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
