"""Some steps under torch.profiler: operators, memory by phase, and a file to look at.

The file is a Chrome trace, which Perfetto (https://ui.perfetto.dev) reads, and TensorBoard with the
plugin torch-tb-profiler, which is not installed here. Memory is read back from it: it has an event
for each allocation, with what is allocated in all, on the host's clock as the phases are.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from train.machine import runtime
from train.profiling.step import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from train.profiling.step import Phase

NUM_STEPS: Final = 3
"""Of the trace; one more before them is not in it."""

NUM_OPERATORS: Final = 20

TRACE_NAME: Final = "step.pt.trace.json.gz"
"""As torch-tb-profiler wants it."""

_MEMORY_EVENT: Final = "[memory]"
_DEVICE_TYPES: Final = {"cpu": 0, "cuda": 1}
"""Of torch's memory events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorFigures:
    """One operator, per step."""

    operator: str
    num_calls: float
    self_s: float
    """Without operators that it calls; on a GPU the time of its kernels."""
    self_fraction: float
    """Of all operators."""
    host_s: float
    """With operators that it calls, on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """Memory that torch has on the device beyond what it had when the step began."""

    phase: str
    peak_bytes: int
    end_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What the profiler saw of the last step (memory) and of all (operators)."""

    operators: tuple[OperatorFigures, ...]
    memory: tuple[PhaseMemory, ...]


def trace_steps(
    run_step: Callable[[Phase], object],
    path: Path,
    *,
    device: torch.device,
    num_steps: int = NUM_STEPS,
) -> Trace:
    """Run steps under the profiler and write their trace.

    Args:
        run_step: one step, which enters its phases.
        path: of the trace, ``*.pt.trace.json.gz``.
        device: whose time and memory count.
        num_steps: in the trace.
    """
    profiler, written = _record(run_step, path.parent, device=device, num_steps=num_steps)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(gzip.compress(written))
    partial.replace(path)
    return Trace(
        operators=tuple(_operators(profiler.key_averages(), num_steps=num_steps, device=device)),
        memory=_memory(written, device),
    )


def peak_bytes(run_step: Callable[[Phase], object], folder: Path, *, device: torch.device) -> int:
    """Most memory in a step, beyond what there was at its begin.

    Args:
        run_step: as in :func:`trace_steps`.
        folder: for a file that is gone afterwards.
        device: whose memory.
    """
    _, written = _record(run_step, folder, device=device, num_steps=1)
    return max((phase.peak_bytes for phase in _memory(written, device)), default=0)


def _record(
    run_step: Callable[[Phase], object], folder: Path, *, device: torch.device, num_steps: int
) -> tuple[profile, bytes]:
    """Steps under the profiler, and their trace as it writes it."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "trace.json"
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
            profile_memory=True,
        ) as profiler:
            for _ in range(1 + num_steps):
                run_step(record_function)
                runtime.synchronize(device)
                profiler.step()
        return profiler, path.read_bytes()


def _memory(written: bytes, device: torch.device) -> tuple[PhaseMemory, ...]:
    events = json.loads(written)["traceEvents"]
    return tuple(memory_by_phase(events, device_type=_DEVICE_TYPES[device.type]))


def memory_by_phase(events: Sequence[Mapping[str, Any]], *, device_type: int) -> list[PhaseMemory]:
    """Memory of the last step in a trace, by phase.

    Args:
        events: "traceEvents" of a Chrome trace by torch.
        device_type: whose memory, as torch numbers them.
    """
    steps = [e for e in events if e.get("name", "").startswith("ProfilerStep#") and "dur" in e]
    hosts = [e for e in steps if e.get("cat") == "user_annotation"]
    if not hosts:
        return []
    last = max(hosts, key=lambda e: e["ts"])
    start, stop = last["ts"], last["ts"] + last["dur"]
    phases = [
        e
        for e in events
        if e.get("cat") == "user_annotation" and e.get("name") in PHASES and start <= e["ts"] < stop
    ]
    marks = sorted(
        (e["ts"], e["args"]["Total Allocated"], e["args"]["Bytes"])
        for e in events
        if e.get("name") == _MEMORY_EVENT
        and e["args"].get("Device Type") == device_type
        and start <= e["ts"] < stop
    )
    base = marks[0][1] - marks[0][2] if marks else 0
    return [_phase_memory(name, phases, marks, base) for name in PHASES if _has(phases, name)]


def _phase_memory(
    name: str,
    phases: Sequence[Mapping[str, Any]],
    marks: Sequence[tuple[float, int, int]],
    base: int,
) -> PhaseMemory:
    """Peak over all the phase's stretches, and the level at the end of its last one."""
    peak = level = 0
    for phase in sorted((p for p in phases if p["name"] == name), key=lambda p: p["ts"]):
        start, stop = phase["ts"], phase["ts"] + phase["dur"]
        before = [total for ts, total, _ in marks if ts < start]
        inside = [total for ts, total, _ in marks if start <= ts < stop]
        levels = [before[-1] if before else base, *inside]
        peak, level = max(peak, max(levels) - base), levels[-1] - base
    return PhaseMemory(phase=name, peak_bytes=peak, end_bytes=level)


def _has(phases: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(phase["name"] == name for phase in phases)


def _operators(averages: Any, *, num_steps: int, device: torch.device) -> list[OperatorFigures]:  # noqa: ANN401 (torch's list)
    """The operators that take longest."""

    def self_us(average: Any) -> float:  # noqa: ANN401
        on_gpu = device.type == "cuda"
        return float(average.self_device_time_total if on_gpu else average.self_cpu_time_total)

    # Kernels are listed beside the operators that launch them, which have their times as well.
    found = [a for a in averages if a.device_type.name == "CPU" and not a.is_user_annotation]
    total_us = sum(self_us(a) for a in found) or 1.0
    return [
        OperatorFigures(
            operator=a.key,
            num_calls=a.count / num_steps,
            self_s=self_us(a) / num_steps / 1e6,
            self_fraction=self_us(a) / total_us,
            host_s=float(a.cpu_time_total) / num_steps / 1e6,
        )
        for a in sorted(found, key=self_us, reverse=True)[:NUM_OPERATORS]
    ]
