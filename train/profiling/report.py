"""The figures as ``profile_report.json`` and as tables for people."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.table import Table

from train.profiling.trace import TRACE_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from train.config import TrainConfig
    from train.profiling.advice import Recommendation
    from train.profiling.breakdown import Breakdown
    from train.profiling.figures import Figures
    from train.profiling.parts import PartFigures
    from train.profiling.trace import Trace

REPORT_NAME: Final = "profile_report.json"

ALREADY_GOOD: Final = "already good: no run that was tried is faster"

_PACKAGES: Final = ("torch", "numpy", "webdataset", "av")
_SHOWN_OPERATORS: Final = 10
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything that was measured, and what follows."""

    breakdown: Breakdown
    parts: Sequence[PartFigures]
    trace: Trace
    figures: Figures
    recommendations: Sequence[Recommendation]
    untested: Sequence[Recommendation]


def as_report(
    profile: Profile, config: TrainConfig, *, origin: Path, device: torch.device
) -> dict[str, Any]:
    """A profile as plain values, with units in the names."""
    breakdown, figures = profile.breakdown, profile.figures
    samples = config.data.batch_size * config.training.accumulation_steps
    return {
        "machine": describe_machine(device),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in _PACKAGES},
        "config_file": str(origin),
        "config": config.model_dump(mode="json"),
        "step": {
            **asdict(breakdown),
            "samples_per_step": samples,
            "samples_per_s": samples / breakdown.step_s,
            "parts": [asdict(part) for part in profile.parts],
            "operators": [asdict(operator) for operator in profile.trace.operators],
            "memory_by_phase": [asdict(phase) for phase in profile.trace.memory],
            "trace": TRACE_NAME,
        },
        "loader": {
            "headspace": figures.headspace,
            "headspaces": list(figures.headspaces),
            "configured": asdict(figures.configured),
            "workers": [asdict(p) for p in figures.sweep],
            "prefetch": [asdict(p) for p in (figures.prefetch_base, *figures.prefetch_sweep)],
        },
        "variants": [asdict(v) for v in (figures.cached, *figures.variants)],
        "memory_limit_bytes": figures.memory_limit_bytes,
        "verdict": ALREADY_GOOD if not profile.recommendations else "can be made faster",
        "recommendations": [asdict(r) for r in profile.recommendations],
        "untested": [asdict(r) for r in profile.untested],
    }


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write ``profile_report.json``, whole or not at all."""
    path = folder / REPORT_NAME
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {
        "device": str(device),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_1_min": os.getloadavg()[0],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return facts


def print_profile(profile: Profile, console: Console) -> None:
    """Tables, and the recommendations as lines with what to add to the command."""
    for table in (
        _phase_table(profile),
        _part_table(profile.parts),
        _operator_table(profile.trace),
        _stage_table(profile.breakdown),
        _loader_table(profile.figures),
        _variant_table(profile.figures),
    ):
        console.print(table)
    if not profile.recommendations:
        console.print(ALREADY_GOOD)
    for each in profile.recommendations:
        _print_advice(each, console, is_tested=True)
    for each in profile.untested:
        _print_advice(each, console, is_tested=False)


def _print_advice(each: Recommendation, console: Console, *, is_tested: bool) -> None:
    lead = "add" if is_tested else "untested:"
    line = f"{lead} {each.as_arguments()}   {each.expected_gain}: {each.why}"
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _phase_table(profile: Profile) -> Table:
    breakdown = profile.breakdown
    memory = {phase.phase: phase for phase in profile.trace.memory}
    table = _table(
        f"a step: {breakdown.step_s * 1e3:.1f} ms, mean of {breakdown.num_steps}",
        ("phase", "ms", "share", "memory peak MiB", "at its end"),
    )
    for name, seconds in breakdown.phases_s.items():
        phase = memory.get(name)
        sizes = (f"{phase.peak_bytes / _MIB:.1f}", f"{phase.end_bytes / _MIB:.1f}") if phase else ()
        share = seconds / breakdown.step_s
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{share:.1%}", *sizes)
    return table


def _part_table(parts: Sequence[PartFigures]) -> Table:
    table = _table(
        "a forward pass by part of the model",
        ("part", "ms", "parameters M", "output MiB", "kept for backward MiB"),
    )
    for part in parts:
        table.add_row(
            part.part,
            f"{part.forward_s * 1e3:.2f}",
            f"{part.num_parameters / 1e6:.2f}",
            f"{part.output_bytes / _MIB:.2f}",
            f"{part.kept_bytes / _MIB:.2f}",
        )
    return table


def _operator_table(trace: Trace) -> Table:
    table = _table("operators, per step", ("operator", "ms", "share", "calls"))
    for each in trace.operators[:_SHOWN_OPERATORS]:
        table.add_row(
            each.operator,
            f"{each.self_s * 1e3:.2f}",
            f"{each.self_fraction:.1%}",
            f"{each.num_calls:.0f}",
        )
    return table


def _stage_table(breakdown: Breakdown) -> Table:
    table = _table(
        f"a batch of {breakdown.batch_bytes / _MIB:.2f} MiB; when asked for, "
        f"{breakdown.ready_batches_p50:g} were ready (median), "
        f"{breakdown.waited_fraction:.0%} had to be waited for",
        ("stage of the loader", "ms"),
    )
    for name, seconds in breakdown.stages_s.items():
        table.add_row(name, f"{seconds * 1e3:.2f}")
    table.add_row("in one process", f"{breakdown.make_s * 1e3:.2f}", end_section=True)
    table.add_row("send", f"{breakdown.send_s * 1e3:.2f}")
    table.add_row("pin, once", f"{breakdown.pin_s * 1e3:.2f}")
    copy = f"copy, {'pinned' if breakdown.is_pinned else 'not pinned'}"
    table.add_row(copy, f"{breakdown.phases_s['copy'] * 1e3:.2f}")
    return table


def _loader_table(figures: Figures) -> Table:
    table = _table(
        f"samples/s by loader; headspace {figures.headspace:.2f}x (cached batches: "
        f"{figures.headspace * figures.configured.training_rate:.4g})",
        ("num_workers", "prefetch_batches", "training", "the loader alone", ""),
    )
    seen = set()
    for point in (
        figures.configured,
        *figures.sweep,
        figures.prefetch_base,
        *figures.prefetch_sweep,
    ):
        place = (point.num_workers, point.prefetch_batches)
        if place not in seen:
            seen.add(place)
            note = "configured" if point is figures.configured else point.problem or ""
            table.add_row(
                *map(str, place),
                _rate(point.training_samples_per_s),
                _rate(point.loader_samples_per_s),
                note,
            )
    return table


def _variant_table(figures: Figures) -> Table:
    limit = figures.memory_limit_bytes / _MIB
    table = _table(
        f"the step on cached batches; memory for training {limit:.0f} MiB",
        ("setting", "samples/s", "memory MiB", ""),
    )
    for each in (figures.cached, *figures.variants):
        setting = " ".join(f"{k}={v}" for k, v in each.change.items()) or "as configured"
        peak = each.peak_memory_bytes
        memory = "-" if peak is None else f"{peak / _MIB:.0f}"
        table.add_row(setting, _rate(each.samples_per_s), memory, each.problem or "")
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number and name else "left", overflow="fold")
    return table


def _rate(rounds: Sequence[float]) -> str:
    """Median, and the lowest to the highest round."""
    if not rounds:
        return "-"
    return f"{median(rounds):.1f} ({min(rounds):.1f}-{max(rounds):.1f})"
