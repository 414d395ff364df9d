"""Some steps on the real loader: seconds by phase, by stage of the loader, and what was ready.

Each step is waited for before the next batch is asked for, so that the phases add up. A training
on a GPU does better: there the next batch comes while the device computes (:mod:`.rates` measures
that).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Final

from shared.timing import StageTimer, no_timer
from train.data.device import tensors_of, to_device
from train.data.loader import Loader
from train.data.mixed_source import MixedSource
from train.data.shard_source import ShardSource
from train.loop.prefetch import iterate
from train.machine.runtime import memory_allocated_mb
from train.profiling.step import PHASES, PhaseTimes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from train.config import TrainConfig
    from train.data.batch import Batch
    from train.data.source import SampleSource
    from train.profiling.step import TrainingStep

STAGES: Final = ("plan", "open", "fetch", "checksum", "decode", "collate")
"""Of making a batch, in the process that makes it. Sessions read directly decode as they fetch."""

MAX_S: Final = 30.0
"""After so long no further step is begun."""

MIN_STEPS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Means per step, and of the loader per batch."""

    num_steps: int
    step_s: float
    """By the host's clock."""
    phases_s: Mapping[str, float]
    memory_mb: float
    """The most that was in use on a GPU; else this process's resident memory."""
    stages_s: Mapping[str, float]
    """Their sum is how long one process makes one batch."""
    make_s: float
    send_s: float
    """From the process that made it to tensors in this one, when this one waits for it."""
    batch_bytes: int
    is_pinned: bool
    pin_s: float
    """Once, at the first batch, where there is a GPU."""
    ready_batches_p50: float
    """Finished batches when one was asked for."""
    waited_fraction: float
    """Share of batches that were not finished when they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """When one batch was asked for, made and there, by one clock, in seconds."""

    asked_s: float
    made_s: float
    there_s: float


def measure_steps(
    step: TrainingStep,
    source: SampleSource,
    config: TrainConfig,
    device: torch.device,
    *,
    num_steps: int,
    num_warm_up: int,
) -> Breakdown:
    """Train for some steps, fewer if they take too long, and say where the time went.

    Raises:
        EngineError: the loader gave up.
    """
    timer, times, record, until_s = StageTimer(), PhaseTimes(device), _Record(), math.inf
    loader = Loader(source, config, timer=timer)
    batches = iterate(loader, seed=config.training.seed, position={"next_batch": 0})
    with _timed(source, timer), contextlib.closing(batches):
        for number in range(num_warm_up + num_steps):
            if number == num_warm_up:
                record, until_s = _Record(pin_s=record.pin_s), time.perf_counter() + MAX_S
            if len(record.steps) >= MIN_STEPS and time.perf_counter() > until_s:
                break
            times.begin()
            taken = [
                _take(batches, times, record, device)
                for _ in range(config.training.accumulation_steps)
            ]
            step.run(taken, phase=times.phase)
            record.steps.append(times.take())
    ahead = config.data.num_workers * config.data.prefetch_batches
    return _means(record, num_ahead=ahead, memory_mb=memory_allocated_mb(device))


@dataclass(slots=True, kw_only=True)
class _Record:
    """What was noted of each step and of each batch."""

    steps: list[tuple[dict[str, float], float]] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    batch_bytes: int = 0
    is_pinned: bool = False
    pin_s: float = 0.0


def _take(
    batches: Iterator[tuple[Batch, Mapping[str, int]]],
    times: PhaseTimes,
    record: _Record,
    device: torch.device,
) -> Batch:
    """The next batch on the device."""
    with times.phase("data_wait"):
        asked_s = time.perf_counter()
        batch, _ = next(batches)
        there_s = time.perf_counter()
    tensors = list(tensors_of(batch))
    record.deliveries.append(Delivery(asked_s=asked_s, made_s=batch["made_s"], there_s=there_s))
    record.stages.append(batch["stages_s"])
    record.batch_bytes = sum(tensor.nbytes for tensor in _distinct(tensors))
    record.pin_s += batch.get("pin_s", 0.0)
    record.is_pinned = all(tensor.is_pinned() for tensor in tensors)
    with times.phase("copy"):
        return to_device(batch, device)  # type: ignore[no-any-return]


def _means(record: _Record, *, num_ahead: int, memory_mb: float) -> Breakdown:
    deliveries = record.deliveries
    return Breakdown(
        num_steps=len(record.steps),
        step_s=fmean(step_s for _, step_s in record.steps),
        phases_s={n: fmean(p.get(n, 0.0) for p, _ in record.steps) for n in PHASES},
        memory_mb=memory_mb,
        stages_s={n: fmean(s.get(n, 0.0) for s in record.stages) for n in STAGES},
        make_s=fmean(sum(s.values()) for s in record.stages),
        send_s=fmean(d.there_s - max(d.made_s, d.asked_s) for d in deliveries),
        batch_bytes=record.batch_bytes,
        is_pinned=record.is_pinned,
        pin_s=record.pin_s,
        ready_batches_p50=median(ready_counts(deliveries, num_ahead=num_ahead)),
        waited_fraction=fmean(d.made_s > d.asked_s for d in deliveries),
    )


def ready_counts(deliveries: Sequence[Delivery], *, num_ahead: int) -> list[int]:
    """How many batches, from the one asked for on, were finished when it was asked for.

    Args:
        deliveries: of successive batches, one at least.
        num_ahead: as many batches are begun beyond the one asked for; the last ones, of whose
            followers nothing is known, are left out, unless that leaves none.
    """
    known = deliveries[: max(1, len(deliveries) - num_ahead)]
    return [
        sum(d.made_s <= asked.asked_s for d in itertools.islice(deliveries, number, None))
        for number, asked in enumerate(known)
    ]


@contextlib.contextmanager
def _timed(source: SampleSource, timer: StageTimer) -> Iterator[None]:
    """A shard set's own stages go to `timer`."""
    if not isinstance(source, ShardSource | MixedSource):
        yield
        return
    source.on_stage = timer.end_stage
    try:
        yield
    finally:
        source.on_stage = no_timer


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each memory once: targets are views of inputs."""
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())
