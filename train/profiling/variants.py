"""Short runs of the step with other settings, on cached batches, and what each one found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from shared.errors import ConfigError, EngineError
from train.data.device import tensors_of
from train.machine import runtime
from train.profiling.figures import Value, Variant
from train.profiling.rates import CachedFeed, cached_batches, in_turns, training_rate
from train.profiling.sweeps import AS_CONFIGURED, Bench
from train.profiling.trace import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from train.config import TrainConfig
    from train.profiling.step import Phase

BATCH_FACTORS: Final = (0.5, 2, 4)
"""Times the configured batch size."""

USABLE: Final = 0.9
"""Share of the memory that the device has left that a run may take."""


def measure_variants(
    bench: Bench, *, folder: Path, try_compile: bool, limit_bytes: int
) -> tuple[Variant, tuple[Variant, ...]]:
    """The step on cached batches as configured, and with other settings.

    Args:
        bench: what all runs share.
        folder: for files that are gone afterwards.
        try_compile: whether torch.compile is tried.
        limit_bytes: what would take more memory is not tried.

    Raises:
        EngineError: the configured step does not run.
    """
    bench.tell("memory of the step")
    own_bytes = _peak_bytes(bench, AS_CONFIGURED, folder)
    changes = [AS_CONFIGURED, *variant_changes(bench.config, bench.device, try_compile=try_compile)]
    needed = {n: _expected_bytes(bench, change, own_bytes) for n, change in enumerate(changes)}
    tried = [n for n in needed if n == 0 or needed[n] <= limit_bytes]
    rates, problems = in_turns(
        {n: _cached(bench, changes[n]) for n in tried},
        num_rounds=bench.num_rounds,
        tell=lambda n: bench.tell(f"the step with {_shown(changes[n])}"),
    )
    found = []
    for number, change in enumerate(changes):
        if number not in tried:
            text = f"not tried: about {needed[number] / 2**30:.3g} GiB would be needed"
            found.append(Variant(change=change, problem=text, lacks_memory=True))
        elif (problem := problems.get(number)) is not None:
            found.append(
                Variant(change=change, problem=problem.text, lacks_memory=problem.lacks_memory)
            )
        else:
            bench.tell(f"memory of the step with {_shown(change)}")
            peak = own_bytes if number == 0 else _peak_bytes(bench, change, folder)
            found.append(
                Variant(change=change, samples_per_s=rates[number], peak_memory_bytes=peak)
            )
    bench.step()  # the layers compute as configured again
    return found[0], tuple(found[1:])


def variant_changes(
    config: TrainConfig, device: torch.device, *, try_compile: bool
) -> list[dict[str, Value]]:
    """Changes of the step that are worth a run, one key at a time or two that belong together."""
    training = config.training
    changes: list[dict[str, Value]] = []
    if runtime.choose_dtype(training.precision, device) == torch.float32 and _has_bf16(device):
        changes.append({"training.precision": "bf16"})
    if try_compile and not training.compile:
        changes.append({"training.compile": True})
    changes.append({"model.gradient_checkpointing": not config.model.is_checkpointing})
    for factor in BATCH_FACTORS:
        size = config.data.batch_size * factor
        steps = training.accumulation_steps / factor
        if size == int(size):
            change: dict[str, Value] = {"data.batch_size": int(size)}
            if steps == int(steps):  # the same samples per step, so the same training
                change["training.accumulation_steps"] = int(steps)
            changes.append(change)
    return changes


def memory_limit_bytes(device: torch.device) -> int:
    """Memory that training may take: what the device has left, and what this process has of it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(USABLE * (free + torch.cuda.memory_reserved(device)))
    own = runtime.memory_allocated_mb(device) * runtime.BYTES_PER_MB
    pages = os.sysconf("SC_PHYS_PAGES")
    free = pages * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        return int(USABLE * free)
    facts = dict(line.split(":") for line in lines)
    return int(USABLE * (int(facts["MemAvailable"].split()[0]) * 1024 + own))


def _cached(bench: Bench, change: Mapping[str, Value]) -> Callable[[], float]:
    def run() -> float:
        step, config = bench.step(change)
        feed = CachedFeed(cached_batches(bench.source, config, bench.device))
        try:
            return training_rate(
                step, feed, config, bench.device, num_steps=bench.num_steps, num_warm_up=2
            )
        except torch.OutOfMemoryError:
            bench.optimizer.zero_grad(set_to_none=True)
            raise
        except RuntimeError as error:
            if not config.training.compile:
                raise
            raise EngineError(f"torch.compile: {str(error).splitlines()[0]}") from error

    return run


def _peak_bytes(bench: Bench, change: Mapping[str, Value], folder: Path) -> int:
    """Most memory of the device in a step; see :attr:`Variant.peak_memory_bytes`."""
    step, config = bench.step(change)
    batches = cached_batches(bench.source, config, bench.device)
    if bench.device.type == "cuda":
        step.run(batches)
        torch.cuda.reset_peak_memory_stats(bench.device)
        step.run(batches)
        return int(torch.cuda.max_memory_allocated(bench.device))

    def run(phase: Phase) -> None:
        step.run(batches, phase=phase)

    return peak_bytes(run, folder, device=bench.device) + _state_bytes(bench)


def _state_bytes(bench: Bench) -> int:
    """Weights, gradients and moments."""
    weights = sum(p.nbytes for p in bench.model.parameters() if p.requires_grad)
    moments = sum(t.nbytes for t in tensors_of(list(bench.optimizer.state.values())))
    return 2 * weights + moments


def _expected_bytes(bench: Bench, change: Mapping[str, Value], own_bytes: int) -> float:
    """What a step would take: all but the state grows with the batch."""
    factor = change.get("data.batch_size", bench.config.data.batch_size)
    state = _state_bytes(bench)
    return state + (own_bytes - state) * float(factor) / bench.config.data.batch_size


def _has_bf16(device: torch.device) -> bool:
    try:
        runtime.choose_dtype("bf16", device)
    except ConfigError:
        return False
    return True


def _shown(change: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items()) or "the configured settings"
