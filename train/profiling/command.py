"""The command's flow: open, measure one thing after the other, advise, write, print."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from rich.console import Console

from shared.errors import ConfigError
from train.data.device import to_model_inputs
from train.loop.optim import make_optimizer
from train.machine import runtime
from train.profiling.advice import recommend, untested
from train.profiling.breakdown import measure_steps
from train.profiling.figures import Figures
from train.profiling.parts import measure_parts
from train.profiling.rates import cached_batches, use_threads_of
from train.profiling.report import Profile, as_report, print_profile, write_report
from train.profiling.sweeps import Bench, sweep_prefetch, sweep_workers
from train.profiling.trace import TRACE_NAME, trace_steps
from train.profiling.variants import measure_variants, memory_limit_bytes
from train.run import open_parts, require_paths

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from train.config import TrainConfig
    from train.profiling.parts import PartFigures
    from train.profiling.step import Phase
    from train.profiling.trace import Trace

NUM_ROUNDS: Final = 3
"""Every comparison is made so often."""

NUM_WARM_UP: Final = 3
"""Steps before those that are measured: memory is there, kernels are chosen."""


def run_profile(
    config: TrainConfig,
    *,
    origin: Path,
    out: Path,
    num_steps: int = 20,
    num_rounds: int = NUM_ROUNDS,
    try_compile: bool = False,
    console: Console | None = None,
) -> Profile:
    """Measure a training step and its loader, and write the report and a trace into a folder.

    Args:
        config: the whole configuration.
        origin: its file, for messages.
        out: the folder; made where it is missing. Nothing else is written to.
        num_steps: of each measurement, unless it takes too long.
        num_rounds: of the comparisons.
        try_compile: whether torch.compile is tried, which takes minutes.
        console: where tables go; None: the terminal.

    Raises:
        ConfigError: the configuration names data that is not there; or this is one of several
            ranks.
        EngineError: the data can't be read, or the memory does not suffice.
    """
    require_paths(config, origin=origin)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("profile measures one process; start it without torchrun")
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    with console.status("opening the data") as status, runtime.translate_errors():
        bench = _open_bench(config, num_steps, num_rounds, tell=status.update)
        profile = _measure(bench, out, try_compile=try_compile)
    report = as_report(profile, config, origin=origin, device=bench.device)
    path = write_report(report, out)
    print_profile(profile, console)
    for line in (
        f"report  {path}",
        f"trace   {out / TRACE_NAME}: drop it on https://ui.perfetto.dev",
    ):
        console.print(line, soft_wrap=True, markup=False)
    return profile


def _open_bench(
    config: TrainConfig, num_steps: int, num_rounds: int, *, tell: Callable[[str], object]
) -> Bench:
    """The data, and a model with fresh weights on its device."""
    device = runtime.choose_device(config.training.device)
    parts = open_parts(config)
    use_threads_of(config, device)
    model = parts.model.to(device).train()
    return Bench(
        model=model,
        optimizer=make_optimizer(model, config.training.optimizer),
        source=parts.loader.source,
        config=config,
        device=device,
        num_steps=num_steps,
        num_rounds=num_rounds,
        tell=tell,
    )


def _measure(bench: Bench, out: Path, *, try_compile: bool) -> Profile:
    """All measurements, one after the other."""
    step, config = bench.step()
    bench.tell("where the time of a step goes")
    breakdown = measure_steps(
        step,
        bench.source,
        config,
        bench.device,
        num_steps=bench.num_steps,
        num_warm_up=NUM_WARM_UP,
    )
    parts = _measure_parts(bench)
    trace = _trace(bench, out)
    runs = sweep_workers(bench)
    prefetch_base, prefetch_sweep = sweep_prefetch(bench, runs)
    limit_bytes = memory_limit_bytes(bench.device)
    cached, variants = measure_variants(
        bench, folder=out, try_compile=try_compile, limit_bytes=limit_bytes
    )
    figures = Figures(
        configured=runs.configured,
        sweep=runs.sweep,
        prefetch_base=prefetch_base,
        prefetch_sweep=prefetch_sweep,
        cached=cached,
        variants=variants,
        headspaces=runs.headspaces,
        memory_limit_bytes=limit_bytes,
        decode_fraction=breakdown.stages_s["decode"] / breakdown.make_s,
        are_shards=bool(bench.config.data.sets),
    )
    return Profile(
        breakdown=breakdown,
        parts=parts,
        trace=trace,
        figures=figures,
        recommendations=recommend(figures),
        untested=untested(figures),
    )


def _measure_parts(bench: Bench) -> list[PartFigures]:
    """Figures of a forward pass, the second one: the first one chooses kernels."""
    bench.tell("parts of the model")
    step, config = bench.step()
    batch, *_ = cached_batches(bench.source, config, bench.device)
    inputs = to_model_inputs(batch["inputs"], dtype=step.dtype)

    def forward() -> object:
        with runtime.autocast(bench.device, step.dtype):
            return bench.model(inputs)

    forward()
    return measure_parts(bench.model, forward, given=inputs, device=bench.device)


def _trace(bench: Bench, out: Path) -> Trace:
    """Operators and memory, and the trace's file."""
    bench.tell("operators and memory")
    step, config = bench.step()
    batches = cached_batches(bench.source, config, bench.device)

    def run(phase: Phase) -> None:
        step.run(batches, phase=phase)

    return trace_steps(run, out / TRACE_NAME, device=bench.device)
