"""Profile training: where the time of a step goes, and what would make it faster.

::

    steps    train some steps on the real loader: seconds per phase and per stage of the loader
    trace    run some steps under torch.profiler: operators, and a file for Perfetto or TensorBoard
    sweep    train with other numbers of loader processes, and on batches that are on the device
    advice   turn the measurements into recommendations (train.tools.advice)

The model has fresh weights. No checkpoint is read or written; only the output folder changes.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function, schedule
from torch.profiler import profile as torch_profile
from torch.utils._pytree import tree_map_only

from shared.errors import ConfigError, EngineError
from shared.files import write_atomic
from shared.timing import StageTimer
from train.data.device import tensors_of, to_device
from train.data.loader import Loader
from train.data.pixels import to_model_inputs
from train.loop.optim import (
    SpikeWatch,
    clip_gradient,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    step_if,
)
from train.loop.prefetch import BatchFeed, iter_endless
from train.machine import runtime
from train.model.losses import compute_losses, loss_counts, sum_by_name
from train.run import require_paths, set_up_run
from train.tools.advice import Measurements, Recommendation, as_arguments, recommend, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from train.config import TrainConfig
    from train.data.batch import Batch, SampleSource
    from train.model.multimodal import MultiModalCreature

    Phase = Callable[[str], AbstractContextManager[Any]]

PHASES: Final = ("data_wait", "copy", "inputs", "forward", "losses", "backward", "optimizer")
"""Phases of a step, in order.

"inputs" turns pixels into numbers; "optimizer" includes gradient clipping and the spike watch.
"""

STAGES: Final = ("plan", "open", "fetch", "checksum", "decode", "collate")
"""Stages of making a batch, in the process that makes it; sessions are decoded while fetching."""

REPORT_NAME: Final = "profile_report.json"
TRACE_NAME: Final = "step.pt.trace.json.gz"
"""Has the suffix that torch-tb-profiler looks for."""

ALREADY_GOOD: Final = "already good: no run that was tried is faster"

NUM_WARM_UP: Final = 3
"""Steps before the measured ones; they allocate memory and choose kernels."""

NUM_TRACED: Final = 3

NUM_ROUNDS: Final = 3
"""How often each number of loader processes is measured."""

MAX_STEPS_S: Final = 30.0
"""No further step of the breakdown starts after this time."""

MAX_RUN_S: Final = 5.0
"""No further step of a run of the sweep, or of its warm-up, starts after this time."""

MIN_STEPS: Final = 2
"""Every run has at least this many steps, whatever time they take."""

NUM_OPERATORS: Final = 20
"""Operators in the report; the first half of them is printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Means per step, and for the loader means per batch."""

    num_steps: int
    step_s: float
    """Sum of the phases."""
    phases_s: Mapping[str, float]
    memory_mb: float
    """Peak GPU memory in MiB; without a GPU, the resident memory of this process."""
    stages_s: Mapping[str, float]
    make_s: float
    """Sum of the stages: how long one process takes to make one batch."""
    send_s: float
    """From a finished batch in its process to tensors in this one, while this one waits."""
    waited_fraction: float
    """Share of batches that were unfinished when they were requested."""
    batch_bytes: int
    pin_s: float
    """Time to pin the shared memory, once before the first batch, if there is a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all measurements share."""

    step: TrainingStep
    source: SampleSource
    config: TrainConfig
    device: torch.device
    num_steps: int
    """Steps per run."""
    log: Callable[[str], object]
    """Receives the name of each measurement when it starts."""


def run_profile(
    config: TrainConfig,
    *,
    origin: Path,
    out: Path,
    num_steps: int = 20,
    num_rounds: int = NUM_ROUNDS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a training step and its loader; write a report and a trace into a folder.

    `out`: output folder, created if missing. Nothing else is written to.
    `num_steps`: steps of each run, unless they take too long.

    Raises:
        ConfigError: the configuration names missing data, or this process is one of several ranks.
        EngineError: the data can't be read, or the memory does not suffice.
    """
    require_paths(config, origin=origin)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "profile measures one process, and WORLD_SIZE is above 1; fix: start it without "
            "torchrun"
        )
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    with console.status("opening the data") as status, runtime.translate_errors():
        bench = _open_bench(config, num_steps, origin=origin, log=status.update)
        report = {**_describe_run(bench, origin), **_measure(bench, out, num_rounds=num_rounds)}
    write_atomic(out / REPORT_NAME, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    print_report(report, console)
    console.print(
        f"report  {out / REPORT_NAME}\n"
        f"trace   {out / TRACE_NAME}: drop it on https://ui.perfetto.dev",
        soft_wrap=True,
        markup=False,
    )
    return report


def _open_bench(
    config: TrainConfig, num_steps: int, *, origin: Path, log: Callable[[str], object]
) -> Bench:
    """Open the data and make a model with fresh weights on its device."""
    device = runtime.choose_device(config.training.device)
    run = set_up_run(config, origin=origin)
    _set_threads(config, device)
    return Bench(
        step=TrainingStep(run.model.to(device).train(), config, device),
        source=run.loader.source,
        config=config,
        device=device,
        num_steps=num_steps,
        log=log,
    )


def _describe_run(bench: Bench, origin: Path) -> dict[str, Any]:
    """Describe the machine, the software and the configuration that are measured."""
    machine: dict[str, Any] = {
        "device": str(bench.device),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _host_memory_bytes(),
        "load_1_min": os.getloadavg()[0],
    }
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        machine |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    packages = ("torch", "numpy", "webdataset", "av")
    return {
        "machine": machine,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in packages}},
        "config_file": str(origin),
        "config": bench.config.model_dump(mode="json"),
    }


def _measure(bench: Bench, out: Path, *, num_rounds: int) -> dict[str, Any]:
    """Run all measurements, one after the other; return their sections of the report."""
    config, device = bench.config, bench.device
    bench.log("phases of a step")
    steps = measure_steps(bench)
    bench.log("operators")
    operators = trace_steps(bench, out / TRACE_NAME)
    rates, problems, cached_rates = sweep_workers(bench, num_rounds=num_rounds)
    measured = Measurements(
        num_workers=config.data.num_workers,
        rates=rates,
        cached_rates=cached_rates,
        decode_fraction=steps.stages_s["decode"] / steps.make_s,
        memory_bytes=steps.memory_mb * runtime.BYTES_PER_MB,
        memory_limit_bytes=_memory_limit_bytes(device),
        could_use_bf16=bench.step.dtype == torch.float32
        and runtime.choose_dtype("auto", device) == torch.bfloat16,
    )
    points = {
        n: {"num_workers": n, "training_samples_per_s": rounds, "problem": problems.get(n)}
        for n, rounds in rates.items()
    }
    recommendations = recommend(measured)
    samples = config.data.batch_size * config.training.accumulation_steps
    return {
        "step": {
            **asdict(steps),
            "samples_per_step": samples,
            "samples_per_s": samples / steps.step_s,
            "operators": operators,
            "trace": TRACE_NAME,
        },
        "loader": {
            "headspace": measured.headspace,
            "headspaces": measured.headspaces,
            "cached_samples_per_s": cached_rates,
            "configured": points.pop(config.data.num_workers),
            "workers": list(points.values()),
        },
        "memory_limit_bytes": measured.memory_limit_bytes,
        "verdict": "can be made faster" if recommendations else ALREADY_GOOD,
        "recommendations": [_as_plain(each) for each in recommendations],
        "untested": [_as_plain(each) for each in suggest(measured, config)],
    }


def _as_plain(recommendation: Recommendation) -> dict[str, Any]:
    values = asdict(recommendation)
    return {"what": values.pop("name"), **values}


def _memory_limit_bytes(device: torch.device) -> int:
    """Return the memory that training can use: the rest of the GPU's, or all of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return _host_memory_bytes()


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class TrainingStep:
    """One optimizer step in phases: what ``Trainer.train`` does between two batches."""

    def __init__(
        self, model: MultiModalCreature, config: TrainConfig, device: torch.device
    ) -> None:
        training = config.training
        self._config, self._device, self._objective = config, device, model.objective
        self.dtype = runtime.choose_dtype(training.precision, device)
        self._optimizer = make_optimizer(model, training.optimizer)
        self._scaler = runtime.make_scaler(device, self.dtype)
        self._spikes = SpikeWatch(training.spike_sigma, device)
        self._forward = torch.compile(model) if training.compile else model
        self._num_steps = 0

    def run(self, batches: Sequence[Batch], *, phase: Phase = contextlib.nullcontext) -> None:
        """Train on the micro-batches of one step.

        `phase`: makes the context manager of a phase from its name.
        """
        config, objective, optimizer = self._config, self._objective, self._optimizer
        with phase("losses"):
            counts = sum_by_name(
                loss_counts(b["targets"], b["weight"], objective=objective) for b in batches
            )
        with phase("optimizer"):
            set_learning_rate(optimizer, learning_rate(self._num_steps, config.training))
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for batch in batches:
            with phase("inputs"):
                inputs = to_model_inputs(batch["inputs"], dtype=self.dtype)
            with phase("forward"), runtime.autocast(self._device, self.dtype):
                outputs = self._forward(inputs)
            with phase("losses"):
                targets, weight = batch["targets"], batch["weight"]
                losses = compute_losses(
                    outputs, targets, weight, objective=objective, counts=counts
                )
            with phase("backward"):
                self._scaler.scale(losses["loss_total"]).backward()  # type: ignore[no-untyped-call]
            total = total + losses["loss_total"].detach()
        with phase("optimizer"):
            norm = clip_gradient(optimizer, self._scaler, max_norm=config.training.grad_clip)
            step_if(self._spikes.judge(total, norm), optimizer, self._scaler)
        self._num_steps += 1


def measure_steps(bench: Bench, *, num_warm_up: int = NUM_WARM_UP) -> StepTimes:
    """Train some steps and measure where their time goes; fewer if they take too long.

    Each step waits for the device before it requests the next batch, so that the phases add up.
    Training on a GPU is faster, because there the next batch arrives while the device computes.
    """
    config, device = bench.config, bench.device
    timer, stages = _device_timer(device), StageTimer()
    steps: list[dict[str, float]] = []
    received: list[dict[str, float]] = []
    loader = Loader(bench.source, config, timer=stages)
    loader.source.on_stage = stages.end_stage
    batches = iter_endless(loader, seed=config.training.seed)

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        yield
        timer.end_stage(name)

    def receive() -> Batch:
        with phase("data_wait"):
            requested_s = time.perf_counter()
            batch = next(batches)
            received_s = time.perf_counter()
        received.append(_describe_batch(batch, requested_s, received_s))
        with phase("copy"):
            return to_device(batch, device)  # type: ignore[no-any-return]

    def run_step() -> None:
        timer.begin()
        bench.step.run([receive() for _ in range(config.training.accumulation_steps)], phase=phase)
        timer.end_stage(PHASES[-1])  # includes the time to free the step's tensors
        runtime.synchronize(device)
        steps.append(timer.take())

    with contextlib.closing(batches):
        _repeat(run_step, num_warm_up, max_s=MAX_STEPS_S)
        pin_s = max(row["pin"] for row in received)
        steps.clear()
        received.clear()
        _repeat(run_step, bench.num_steps, max_s=MAX_STEPS_S)
    stages_s = {name: _mean(received, name) for name in STAGES}
    return StepTimes(
        num_steps=len(steps),
        step_s=fmean(sum(row.values()) for row in steps),
        phases_s={name: _mean(steps, name) for name in PHASES},
        memory_mb=runtime.memory_allocated_mb(device),
        stages_s=stages_s,
        make_s=sum(stages_s.values()),
        send_s=_mean(received, "send"),
        waited_fraction=_mean(received, "waited"),
        batch_bytes=int(received[-1]["bytes"]),
        pin_s=pin_s,
    )


def _describe_batch(batch: Batch, requested_s: float, received_s: float) -> dict[str, float]:
    """Return the seconds of a batch's stages and its transfer, its size, and if it was awaited."""
    made_s = batch["made_s"]
    # Targets are views of inputs: each memory counts once.
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(batch)}
    return {
        **batch["stages_s"],
        "send": received_s - max(made_s, requested_s),
        "waited": made_s > requested_s,
        "pin": batch.get("pin_s", 0.0),
        "bytes": sum(sizes.values()),
    }


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return fmean(row.get(name, 0.0) for row in rows)


def _repeat(run: Callable[[], object], count: int, *, max_s: float) -> int:
    """Run at most `count` times while there is time; return how often."""
    deadline_s = time.perf_counter() + max_s
    for number in range(count):
        if number >= MIN_STEPS and time.perf_counter() > deadline_s:
            return number
        run()
    return count


def _device_timer(device: torch.device) -> StageTimer:
    """Make a timer of what the device does.

    A GPU is timed by events, and must be synchronized before :meth:`StageTimer.take`. An event on
    an idle GPU happens when it is recorded, so waiting on the host counts as it does on a CPU.
    """
    if device.type != "cuda":
        return StageTimer()

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    return StageTimer(record, lambda start, stop: start.elapsed_time(stop) / 1e3)


def trace_steps(bench: Bench, path: Path) -> list[dict[str, Any]]:
    """Run steps under torch.profiler and write their trace.

    The trace is a Chrome trace. Perfetto (https://ui.perfetto.dev) opens it, and TensorBoard with
    the plugin torch-tb-profiler. One more step before those in the trace warms up the profiler.

    Returns:
        The :data:`NUM_OPERATORS` operators that take longest; figures are per step. "self_s" and
        "self_memory_bytes" are without the operators that it calls: on a GPU the time of its
        kernels, and allocated minus freed memory. "self_fraction" is the share of all operators.
    """
    device = bench.device
    is_cuda = device.type == "cuda"
    batches = cached_batches(bench.source, bench.config, device)
    with TemporaryDirectory(dir=path.parent) as name:
        trace = Path(name) / "trace.json"
        with torch_profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * is_cuda],
            schedule=schedule(wait=0, warmup=1, active=NUM_TRACED, repeat=1),
            on_trace_ready=lambda done: done.export_chrome_trace(str(trace)),
            profile_memory=True,
        ) as profiler:
            for _ in range(1 + NUM_TRACED):
                bench.step.run(batches, phase=record_function)
                runtime.synchronize(device)
                profiler.step()
        write_atomic(path, gzip.compress(trace.read_bytes()))
    kind = "device" if is_cuda else "cpu"
    # Kernels are listed next to the operators that launch them, which have their times as well.
    operators: list[dict[str, Any]] = [
        {
            "operator": average.key,
            "num_calls": average.count / NUM_TRACED,
            "self_s": getattr(average, f"self_{kind}_time_total") / NUM_TRACED / 1e6,
            "self_memory_bytes": getattr(average, f"self_{kind}_memory_usage") / NUM_TRACED,
        }
        for average in profiler.key_averages()
        if average.device_type.name == "CPU" and not average.is_user_annotation
    ]
    total_s = sum(row["self_s"] for row in operators) or 1.0
    operators.sort(key=lambda row: row["self_s"], reverse=True)
    return [{**row, "self_fraction": row["self_s"] / total_s} for row in operators[:NUM_OPERATORS]]


def sweep_workers(
    bench: Bench, *, num_rounds: int
) -> tuple[dict[int, list[float]], dict[int, str], list[float]]:
    """Measure training with other numbers of loader processes, and on cached batches.

    Machines drift. So every setting runs once per round, and rates are compared within a round.
    Every other round runs backward. Returns the rates in samples/s of the rounds by number of
    processes; why there are none, for numbers that failed; and the rates on cached batches.
    """
    configured = bench.config.data.num_workers
    counts = worker_counts(configured, num_cores=len(os.sched_getaffinity(0)))
    batches = cached_batches(bench.source, bench.config, bench.device)
    rates: dict[int, list[float]] = {n: [] for n in counts}
    problems: dict[int, str] = {}
    cached_rates = []
    for number in range(num_rounds):
        for num_workers in counts[:: -1 if number % 2 else 1]:
            if num_workers in problems:
                continue
            bench.log(f"training with {num_workers} loader processes, round {number + 1}")
            try:
                with runtime.translate_oom():
                    rates[num_workers].append(_loader_rate(bench, num_workers))
            except EngineError as error:
                if num_workers == configured:
                    raise
                problems[num_workers] = str(error).splitlines()[0]
                rates[num_workers] = []
        bench.log(f"training on cached batches, round {number + 1}")
        cached_rates.append(
            _training_rate(bench, bench.config, lambda: bench.step.run(batches), num_warm_up=2)
        )
    return rates, problems, cached_rates


def worker_counts(configured: int, *, num_cores: int) -> list[int]:
    """Choose numbers of loader processes to try, below and above the configured one.

    All of 0 to 4; beyond that halves and doubles, up to one per core.
    """
    counts = {0, 1, 2, 3, 4, configured // 2, 2 * configured, num_cores // 2, num_cores}
    return sorted({n for n in counts if n <= num_cores} | {configured})


def cached_batches(source: SampleSource, config: TrainConfig, device: torch.device) -> list[Batch]:
    """Copy the first step's batches to the device, in memory of their own."""
    data = config.data.model_copy(update={"num_workers": 0, "last_batch": "pad"})
    loader = Loader(source, config.model_copy(update={"data": data}))
    with contextlib.closing(iter_endless(loader, seed=0)) as batches:
        first = itertools.islice(batches, config.training.accumulation_steps)
        return [
            to_device(tree_map_only(torch.Tensor, torch.clone, batch), device) for batch in first
        ]


def _loader_rate(bench: Bench, num_workers: int) -> float:
    """Samples/s of training on the real loader, as ``Trainer.train`` runs it."""
    data = bench.config.data.model_copy(update={"num_workers": num_workers})
    config = bench.config.model_copy(update={"data": data})
    steps = config.training.accumulation_steps
    num_warm_up = 2 + num_workers * data.prefetch_batches // steps
    feed = BatchFeed(Loader(bench.source, config), bench.device, seed=config.training.seed)

    def train_step() -> None:
        bench.step.run(feed.take(steps))
        feed.fetch_ahead()

    with contextlib.closing(feed):
        return _training_rate(bench, config, train_step, num_warm_up=num_warm_up)


def _training_rate(
    bench: Bench, config: TrainConfig, train_step: Callable[[], object], *, num_warm_up: int
) -> float:
    """Samples/s of some steps after a warm-up, with the threads that a training would have."""
    _set_threads(config, bench.device)
    _repeat(train_step, num_warm_up, max_s=MAX_RUN_S)
    runtime.synchronize(bench.device)
    started_s = time.perf_counter()
    num_steps = _repeat(train_step, bench.num_steps, max_s=MAX_RUN_S)
    runtime.synchronize(bench.device)
    seconds = time.perf_counter() - started_s
    return num_steps * config.data.batch_size * config.training.accumulation_steps / seconds


def _set_threads(config: TrainConfig, device: torch.device) -> None:
    """Give this process the threads that a training by this configuration has."""
    threads = runtime.choose_num_threads(
        config.training.num_threads, device, num_workers=config.data.num_workers
    )
    runtime.set_up_math(num_threads=threads)


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print tables, and each recommendation as a line with what to add to the command."""
    step, loader = report["step"], report["loader"]
    phases_s, stages_s = step["phases_s"], step["stages_s"]
    _print_table(
        console,
        f"a step: {step['step_s'] * 1e3:.1f} ms, mean of {step['num_steps']}; "
        f"memory {step['memory_mb']:.0f} MiB",
        ("phase", "ms", "share"),
        rows=[(name, s * 1e3, f"{s / step['step_s']:.1%}") for name, s in phases_s.items()],
    )
    _print_table(
        console,
        "operators, per step",
        ("operator", "ms", "share", "calls", "memory MiB"),
        rows=[
            (
                row["operator"],
                row["self_s"] * 1e3,
                f"{row['self_fraction']:.1%}",
                f"{row['num_calls']:.0f}",
                row["self_memory_bytes"] / 2**20,
            )
            for row in step["operators"][: NUM_OPERATORS // 2]
        ],
    )
    _print_table(
        console,
        f"a batch of {step['batch_bytes'] / 2**20:.2f} MiB; {step['waited_fraction']:.0%} of "
        "batches were not ready when requested",
        ("stage of the loader", "ms"),
        rows=[
            *((name, seconds * 1e3) for name, seconds in stages_s.items()),
            ("all, in one process", step["make_s"] * 1e3),
            ("send", step["send_s"] * 1e3),
            ("pin, once", step["pin_s"] * 1e3),
            ("copy", phases_s["copy"] * 1e3),
        ],
    )
    _print_table(
        console,
        f"training by loader; headspace {loader['headspace']:.2f}x (cached batches: "
        f"{median(loader['cached_samples_per_s']):.4g} samples/s)",
        ("num_workers", "samples/s", ""),
        rows=[_worker_row({**loader["configured"], "problem": "configured"})]
        + [_worker_row(point) for point in loader["workers"]],
    )
    if not report["recommendations"]:
        console.print(ALREADY_GOOD)
    for lead, changes in (("add", "recommendations"), ("untested:", "untested")):
        for each in report[changes]:
            arguments = as_arguments(each["change"])
            line = f"{lead} {arguments}   {each['expected_gain']}: {each['why']}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def _print_table(
    console: Console, title: str, columns: Sequence[str], *, rows: Sequence[Sequence[str | float]]
) -> None:
    """Print a table; numbers get two decimals."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number and name else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.2f}" for cell in row))
    console.print(table)


def _worker_row(point: Mapping[str, Any]) -> tuple[str, str, str]:
    """Format the median rate, and the lowest to the highest round."""
    rates = point["training_samples_per_s"]
    rate = f"{median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})" if rates else "-"
    return str(point["num_workers"]), rate, point["problem"] or ""
