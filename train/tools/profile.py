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
import math
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

from shared.errors import ConfigError, EngineError
from shared.files import write_atomic
from shared.timing import StageTimer, no_timer
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
from train.loop.prefetch import BatchFeed, iterate
from train.machine import runtime
from train.model.losses import added, compute_losses, loss_counts
from train.run import require_paths, set_up_run
from train.tools.advice import Measurements, Recommendation, WorkerRate, recommend, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

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
"""Steps in the trace."""

NUM_ROUNDS: Final = 3
"""How often each number of loader processes is measured."""

MAX_STEPS_S: Final = 30.0
"""No further step of the breakdown starts after this time."""

MAX_RUN_S: Final = 5.0
"""No further step of a run of the sweep, or of its warm-up, starts after this time."""

MIN_STEPS: Final = 2
"""Every run has at least this many steps, whatever time they take."""

NUM_OPERATORS: Final = 20
"""Operators in the report."""

_PRINTED_OPERATORS: Final = 10
_PACKAGES: Final = ("torch", "numpy", "webdataset", "av")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Means per step, and for the loader means per batch."""

    num_steps: int
    step_s: float
    """On the host's clock."""
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
    is_pinned: bool
    pin_s: float
    """Time to pin the shared memory, once before the first batch, if there is a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorUse:
    """Time and memory of one operator, per step."""

    operator: str
    num_calls: float
    self_s: float
    """Without the operators that it calls; on a GPU, the time of its kernels."""
    self_fraction: float
    """Share of all operators."""
    host_s: float
    """On the host, with the operators that it calls."""
    self_memory_bytes: float
    """Allocated minus freed on the device, without the operators that it calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything that was measured, and the recommendations that follow."""

    steps: StepTimes
    operators: Sequence[OperatorUse]
    measured: Measurements
    recommendations: Sequence[Recommendation]
    suggestions: Sequence[Recommendation]


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
) -> Profile:
    """Measure a training step and its loader; write a report and a trace into a folder.

    Args:
        config: the whole configuration.
        origin: its file, for messages.
        out: output folder, created if missing. Nothing else is written to.
        num_steps: steps of each run, unless they take too long.
        num_rounds: rounds of the sweep.
        console: receives the tables; None is the terminal.

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
        bench = _open_bench(config, num_steps, log=status.update)
        profile = _measure(bench, out, num_rounds=num_rounds)
    report = as_report(profile, config, origin=origin, device=bench.device)
    write_atomic(out / REPORT_NAME, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    print_profile(profile, console)
    for line in (
        f"report  {out / REPORT_NAME}",
        f"trace   {out / TRACE_NAME}: drop it on https://ui.perfetto.dev",
    ):
        console.print(line, soft_wrap=True, markup=False)
    return profile


def _open_bench(config: TrainConfig, num_steps: int, *, log: Callable[[str], object]) -> Bench:
    """Open the data and make a model with fresh weights on its device."""
    device = runtime.choose_device(config.training.device)
    run = set_up_run(config)
    _set_threads(config, device)
    model = run.model.to(device).train()
    optimizer = make_optimizer(model, config.training.optimizer)
    return Bench(
        step=TrainingStep(model, optimizer, config=config, device=device),
        source=run.loader.source,
        config=config,
        device=device,
        num_steps=num_steps,
        log=log,
    )


def _measure(bench: Bench, out: Path, *, num_rounds: int) -> Profile:
    """Run all measurements, one after the other."""
    config, device = bench.config, bench.device
    bench.log("phases of a step")
    steps = measure_steps(bench)
    bench.log("operators")
    operators = trace_steps(bench, out / TRACE_NAME)
    configured, sweep, cached_rates = sweep_workers(bench, num_rounds=num_rounds)
    measured = Measurements(
        configured=configured,
        sweep=sweep,
        cached_samples_per_s=cached_rates,
        decode_fraction=steps.stages_s["decode"] / steps.make_s,
        memory_bytes=steps.memory_mb * runtime.BYTES_PER_MB,
        memory_limit_bytes=_memory_limit_bytes(device),
        could_use_bf16=bench.step.dtype == torch.float32
        and runtime.choose_dtype("auto", device) == torch.bfloat16,
    )
    return Profile(
        steps=steps,
        operators=operators,
        measured=measured,
        recommendations=recommend(measured),
        suggestions=suggest(measured, config),
    )


def _memory_limit_bytes(device: torch.device) -> float:
    """Memory that training can use: the rest of the GPU's, or all of the host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


class TrainingStep:
    """One optimizer step in phases: what ``Trainer.train`` does between two batches, and no more.

    Args:
        model: on its device, in training mode.
        optimizer: holds the model's weights.
        config: the whole configuration; decides precision and compilation.
        device: holds model and batches.
    """

    def __init__(
        self,
        model: MultiModalCreature,
        optimizer: torch.optim.AdamW,
        *,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        training = config.training
        self._shapes = model.shapes
        self._optimizer, self._config, self._device = optimizer, config, device
        self.dtype = runtime.choose_dtype(training.precision, device)
        self._scaler = runtime.make_scaler(device, self.dtype)
        self._spikes = SpikeWatch(training.spike_sigma, device)
        self._forward = torch.compile(model) if training.compile else model
        self._num_steps = 0

    def run(self, batches: Sequence[Batch], *, phase: Phase = contextlib.nullcontext) -> None:
        """Train on the micro-batches of one step.

        Args:
            batches: on the device.
            phase: makes the context manager of a phase from its name.
        """
        config, optimizer = self._config, self._optimizer
        with phase("losses"):
            counts = added(
                loss_counts(b["targets"], b["weight"], config=config, shapes=self._shapes)
                for b in batches
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
                losses = compute_losses(outputs, targets, weight, config=config, counts=counts)
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

    Raises:
        EngineError: the loader gave up.
    """
    config, device = bench.config, bench.device
    timer, stages = _device_timer(device), StageTimer()
    step_times: list[dict[str, float]] = []
    batch_times: list[dict[str, float]] = []
    tensors: list[Tensor] = []
    batches = iterate(Loader(bench.source, config, timer=stages), seed=config.training.seed)

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        yield
        timer.end_stage(name)

    def receive() -> Batch:
        with phase("data_wait"):
            requested_s = time.perf_counter()
            batch = next(batches)
            received_s = time.perf_counter()
        made_s, stages_s = batch["made_s"], batch["stages_s"]
        transfer = {"send": received_s - max(made_s, requested_s), "pin": batch.get("pin_s", 0.0)}
        batch_times.append({**stages_s, **transfer, "waited": float(made_s > requested_s)})
        tensors[:] = tensors_of(batch)
        with phase("copy"):
            return to_device(batch, device)  # type: ignore[no-any-return]

    deadline_s = math.inf
    with _timed(bench.source, stages), contextlib.closing(batches):
        for number in range(num_warm_up + bench.num_steps):
            if number == num_warm_up:
                deadline_s = time.perf_counter() + MAX_STEPS_S
            if number >= num_warm_up + MIN_STEPS and time.perf_counter() > deadline_s:
                break
            started_s = time.perf_counter()
            timer.begin()
            micro_batches = [receive() for _ in range(config.training.accumulation_steps)]
            bench.step.run(micro_batches, phase=phase)
            timer.end_stage(PHASES[-1])  # includes the time to free the step's tensors
            runtime.synchronize(device)
            step_s = time.perf_counter() - started_s
            step_times.append({**timer.take(), "step": step_s})
    pin_s = max(row["pin"] for row in batch_times)
    step_times = step_times[num_warm_up:]
    batch_times = batch_times[num_warm_up * config.training.accumulation_steps :]
    stages_s = {name: _mean(batch_times, name) for name in STAGES}
    return StepTimes(
        num_steps=len(step_times),
        step_s=_mean(step_times, "step"),
        phases_s={name: _mean(step_times, name) for name in PHASES},
        memory_mb=runtime.memory_allocated_mb(device),
        stages_s=stages_s,
        make_s=sum(stages_s.values()),
        send_s=_mean(batch_times, "send"),
        waited_fraction=_mean(batch_times, "waited"),
        # Targets are views of inputs: each memory counts once.
        batch_bytes=sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()),
        is_pinned=all(tensor.is_pinned() for tensor in tensors),
        pin_s=pin_s,
    )


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return fmean(row.get(name, 0.0) for row in rows)


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


@contextlib.contextmanager
def _timed(source: SampleSource, stages: StageTimer) -> Iterator[None]:
    """Let a source report its own stages to a timer."""
    source.on_stage = stages.end_stage
    try:
        yield
    finally:
        source.on_stage = no_timer


def trace_steps(bench: Bench, path: Path, *, num_steps: int = NUM_TRACED) -> list[OperatorUse]:
    """Run steps under torch.profiler and write their trace.

    The trace is a Chrome trace. Perfetto (https://ui.perfetto.dev) opens it, and TensorBoard with
    the plugin torch-tb-profiler. One more step before those in the trace warms up the profiler.

    Args:
        bench: the step and its data.
        path: of the trace, ``*.pt.trace.json.gz``.
        num_steps: steps in the trace.

    Returns:
        The :data:`NUM_OPERATORS` operators that take longest.
    """
    device = bench.device
    batches = cached_batches(bench.source, bench.config, device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with TemporaryDirectory(dir=path.parent) as name:
        trace = Path(name) / "trace.json"
        with torch_profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=lambda done: done.export_chrome_trace(str(trace)),
            profile_memory=True,
        ) as profiler:
            for _ in range(1 + num_steps):
                bench.step.run(batches, phase=record_function)
                runtime.synchronize(device)
                profiler.step()
        write_atomic(path, gzip.compress(trace.read_bytes()))
    return _operators(profiler.key_averages(), num_steps=num_steps, device=device)


def _operators(averages: Any, *, num_steps: int, device: torch.device) -> list[OperatorUse]:  # noqa: ANN401 (torch's list)
    """Pick the operators that take longest."""
    kind = "device" if device.type == "cuda" else "cpu"

    def self_us(average: object) -> float:
        return float(getattr(average, f"self_{kind}_time_total"))

    # Kernels are listed beside the operators that launch them, which have their times as well.
    operators = [a for a in averages if a.device_type.name == "CPU" and not a.is_user_annotation]
    total_us = sum(self_us(a) for a in operators) or 1.0
    return [
        OperatorUse(
            operator=a.key,
            num_calls=a.count / num_steps,
            self_s=self_us(a) / num_steps / 1e6,
            self_fraction=self_us(a) / total_us,
            host_s=float(a.cpu_time_total) / num_steps / 1e6,
            self_memory_bytes=float(getattr(a, f"self_{kind}_memory_usage")) / num_steps,
        )
        for a in sorted(operators, key=self_us, reverse=True)[:NUM_OPERATORS]
    ]


def sweep_workers(
    bench: Bench, *, num_rounds: int
) -> tuple[WorkerRate, tuple[WorkerRate, ...], tuple[float, ...]]:
    """Measure training with other numbers of loader processes, and on cached batches.

    Machines drift. So every setting runs once per round, and rates are compared within a round.
    Every other round runs backward.

    Returns:
        The configured number of processes, the other ones, and the rates on cached batches.

    Raises:
        EngineError: the loader gave up with the configured number of processes.
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
        bench.log(f"training on cached batches, round {number + 1}")
        cached_rates.append(
            _training_rate(bench, bench.config, lambda: bench.step.run(batches), num_warm_up=2)
        )
    points = {
        n: WorkerRate(
            num_workers=n,
            training_samples_per_s=() if n in problems else tuple(rates[n]),
            problem=problems.get(n),
        )
        for n in counts
    }
    others = tuple(point for n, point in points.items() if n != configured)
    return points[configured], others, tuple(cached_rates)


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
    with contextlib.closing(iterate(loader, seed=0)) as batches:
        first = itertools.islice(batches, config.training.accumulation_steps)
        return [to_device(_cloned(batch), device) for batch in first]


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
    threads = torch.get_num_threads()
    _set_threads(config, bench.device)
    try:
        _repeat(train_step, num_warm_up)
        runtime.synchronize(bench.device)
        started_s = time.perf_counter()
        num_steps = _repeat(train_step, bench.num_steps)
        runtime.synchronize(bench.device)
        seconds = time.perf_counter() - started_s
    finally:
        torch.set_num_threads(threads)
    return num_steps * config.data.batch_size * config.training.accumulation_steps / seconds


def _set_threads(config: TrainConfig, device: torch.device) -> None:
    """Give this process the threads that a training by this configuration has."""
    threads = runtime.choose_num_threads(
        config.training.num_threads, device, num_workers=config.data.num_workers
    )
    runtime.set_up_math(num_threads=threads)


def _repeat(run: Callable[[], object], count: int) -> int:
    """Run at most `count` times while there is time; return how often."""
    deadline_s = time.perf_counter() + MAX_RUN_S
    for number in range(count):
        if number >= MIN_STEPS and time.perf_counter() > deadline_s:
            return number
        run()
    return count


def _cloned(value: Any) -> Any:  # noqa: ANN401 (any nesting)
    """Copy tensors out of the loader's memory."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(each) for key, each in value.items()}
    return value


def as_report(
    profile: Profile, config: TrainConfig, *, origin: Path, device: torch.device
) -> dict[str, Any]:
    """Format a profile as plain values, with units in the names."""
    steps, measured = profile.steps, profile.measured
    samples = config.data.batch_size * config.training.accumulation_steps
    return {
        "machine": describe_machine(device),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in _PACKAGES},
        "config_file": str(origin),
        "config": config.model_dump(mode="json"),
        "step": {
            **asdict(steps),
            "samples_per_step": samples,
            "samples_per_s": samples / steps.step_s,
            "operators": [asdict(operator) for operator in profile.operators],
            "trace": TRACE_NAME,
        },
        "loader": {
            "headspace": measured.headspace,
            "headspaces": list(measured.headspaces),
            "cached_samples_per_s": list(measured.cached_samples_per_s),
            "configured": asdict(measured.configured),
            "workers": [asdict(point) for point in measured.sweep],
        },
        "memory_limit_bytes": measured.memory_limit_bytes,
        "verdict": "can be made faster" if profile.recommendations else ALREADY_GOOD,
        "recommendations": [_as_plain(each) for each in profile.recommendations],
        "untested": [_as_plain(each) for each in profile.suggestions],
    }


def _as_plain(each: Recommendation) -> dict[str, Any]:
    values = asdict(each)
    return {"what": values.pop("name"), **values}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine that was measured on."""
    machine: dict[str, Any] = {
        "device": str(device),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_1_min": os.getloadavg()[0],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return machine


def print_profile(profile: Profile, console: Console) -> None:
    """Print tables, and each recommendation as a line with what to add to the command."""
    steps, measured = profile.steps, profile.measured
    _print_table(
        console,
        f"a step: {steps.step_s * 1e3:.1f} ms, mean of {steps.num_steps}; "
        f"memory {steps.memory_mb:.0f} MiB",
        ("phase", "ms", "share"),
        rows=[(n, _ms(s), f"{s / steps.step_s:.1%}") for n, s in steps.phases_s.items()],
    )
    _print_table(
        console,
        "operators, per step",
        ("operator", "ms", "share", "calls", "memory MiB"),
        rows=[
            (o.operator, _ms(o.self_s), f"{o.self_fraction:.1%}", f"{o.num_calls:.0f}", _mib(o))
            for o in profile.operators[:_PRINTED_OPERATORS]
        ],
    )
    _print_table(
        console,
        f"a batch of {steps.batch_bytes / 2**20:.2f} MiB; {steps.waited_fraction:.0%} of batches "
        "were not ready when requested",
        ("stage of the loader", "ms"),
        rows=[
            *((name, _ms(seconds)) for name, seconds in steps.stages_s.items()),
            ("all, in one process", _ms(steps.make_s)),
            ("send", _ms(steps.send_s)),
            ("pin, once", _ms(steps.pin_s)),
            (f"copy, {'' if steps.is_pinned else 'not '}pinned", _ms(steps.phases_s["copy"])),
        ],
    )
    _print_table(
        console,
        f"training by loader; headspace {measured.headspace:.2f}x (cached batches: "
        f"{median(measured.cached_samples_per_s):.4g} samples/s)",
        ("num_workers", "samples/s", ""),
        rows=[_worker_row(measured.configured, note="configured")]
        + [_worker_row(point, note=point.problem or "") for point in measured.sweep],
    )
    if not profile.recommendations:
        console.print(ALREADY_GOOD)
    lines = [("add", each) for each in profile.recommendations]
    lines += [("untested:", each) for each in profile.suggestions]
    for lead, each in lines:
        line = f"{lead} {each.as_arguments()}   {each.expected_gain}: {each.why}"
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _print_table(
    console: Console, title: str, columns: Sequence[str], *, rows: Sequence[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number and name else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _worker_row(point: WorkerRate, *, note: str) -> tuple[str, str, str]:
    """Median rate, and the lowest to the highest round."""
    rates = point.training_samples_per_s
    rate = f"{point.rate:.1f} ({min(rates):.1f}-{max(rates):.1f})" if rates else "-"
    return str(point.num_workers), rate, note


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _mib(operator: OperatorUse) -> str:
    return f"{operator.self_memory_bytes / 2**20:.2f}"
