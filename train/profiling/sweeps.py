"""Short runs of training with other loaders, and what each one found."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shared.errors import EngineError
from train.profiling.figures import LoaderPoint, Value
from train.profiling.rates import (
    CachedFeed,
    cached_batches,
    in_turns,
    loaded_rate,
    loader_rate,
    training_rate,
    with_changes,
)
from train.profiling.step import TrainingStep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from train.config import TrainConfig
    from train.data.source import SampleSource
    from train.model.multimodal import MultiModalCreature

MAX_PREFETCH: Final = 4
"""Batches per process that are tried."""

AS_CONFIGURED: Final[Mapping[str, Value]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all short runs share."""

    model: MultiModalCreature
    optimizer: torch.optim.AdamW
    source: SampleSource
    config: TrainConfig
    device: torch.device
    num_steps: int
    """Of a run."""
    num_rounds: int
    tell: Callable[[str], object]
    """Told what is measured."""

    def step(self, change: Mapping[str, Value] = AS_CONFIGURED) -> tuple[TrainingStep, TrainConfig]:
        """The step with some keys changed, and its configuration."""
        config = with_changes(self.config, change)
        return TrainingStep(self.model, self.optimizer, config, self.device), config


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderRuns:
    """What the runs with other numbers of loader processes found."""

    configured: LoaderPoint
    sweep: tuple[LoaderPoint, ...]
    headspaces: tuple[float, ...]


def sweep_workers(bench: Bench) -> LoaderRuns:
    """Training with other numbers of loader processes, and on cached batches beside them.

    Raises:
        EngineError: the configured loader gave up, or the step does not run.
    """
    data = bench.config.data
    counts = worker_counts(data.num_workers, num_cores=len(os.sched_getaffinity(0)))
    points = [(data.num_workers, data.prefetch_batches)]
    points += [(n, data.prefetch_batches) for n in counts if n != data.num_workers]
    cached = CachedFeed(cached_batches(bench.source, bench.config, bench.device))

    def cached_rate() -> float:
        step, config = bench.step()
        return training_rate(
            step, cached, config, bench.device, num_steps=bench.num_steps, num_warm_up=2
        )

    trained, problems = in_turns(
        {
            **{f"{p[0]} processes": _loaded(bench, p) for p in points},
            "cached batches": cached_rate,
        },
        num_rounds=bench.num_rounds,
        tell=lambda name: bench.tell(f"training on {name}"),
    )
    alone, alone_problems = in_turns(
        {f"{p[0]} processes": _alone(bench, p) for p in points},
        num_rounds=bench.num_rounds,
        tell=lambda name: bench.tell(f"the loader alone, {name}"),
    )
    problems = {**problems, **alone_problems}
    found = []
    for workers, prefetch in points:
        name = f"{workers} processes"
        problem = problems.get(name)
        found.append(
            LoaderPoint(
                num_workers=workers,
                prefetch_batches=prefetch,
                training_samples_per_s=() if problem else trained[name],
                loader_samples_per_s=() if problem else alone[name],
                problem=problem.text if problem else None,
            )
        )
    if (failed := problems.get("cached batches")) is not None:
        raise EngineError(failed.text)
    rounds = zip(trained["cached batches"], found[0].training_samples_per_s, strict=True)
    return LoaderRuns(
        configured=found[0], sweep=tuple(found[1:]), headspaces=tuple(c / t for c, t in rounds)
    )


def sweep_prefetch(bench: Bench, runs: LoaderRuns) -> tuple[LoaderPoint, tuple[LoaderPoint, ...]]:
    """Training with the best number of loader processes and other depths of prefetching.

    Returns:
        The configured depth, and the others; without processes there is nothing to prefetch.

    Raises:
        EngineError: the loader gave up.
    """
    tried = [p for p in (runs.configured, *runs.sweep) if p.problem is None]
    best = max(tried, key=lambda p: p.training_rate)
    if best.num_workers == 0:
        return best, ()
    depths = [best.prefetch_batches]
    depths += [d for d in range(1, MAX_PREFETCH + 1) if d != best.prefetch_batches]
    rates, problems = in_turns(
        {depth: _loaded(bench, (best.num_workers, depth)) for depth in depths},
        num_rounds=bench.num_rounds,
        tell=lambda d: bench.tell(f"training on {best.num_workers} processes, prefetching {d}"),
    )
    points = [
        LoaderPoint(
            num_workers=best.num_workers,
            prefetch_batches=depth,
            training_samples_per_s=rates[depth],
            problem=problems[depth].text if depth in problems else None,
        )
        for depth in depths
    ]
    return points[0], tuple(points[1:])


def worker_counts(configured: int, *, num_cores: int) -> list[int]:
    """Numbers of loader processes to try, in both directions from the configured one.

    All of 0 to 4; beyond that halves and doubles, up to one per core.
    """
    counts = {0, 1, 2, 3, 4, configured // 2, 2 * configured, num_cores // 2, num_cores}
    return sorted({n for n in counts if n <= num_cores} | {configured})


def _loaded(bench: Bench, point: tuple[int, int]) -> Callable[[], float]:
    def run() -> float:
        step, config = bench.step(_loader_change(point))
        return loaded_rate(step, bench.source, config, bench.device, num_steps=bench.num_steps)

    return run


def _alone(bench: Bench, point: tuple[int, int]) -> Callable[[], float]:
    def run() -> float:
        config = with_changes(bench.config, _loader_change(point))
        return loader_rate(bench.source, config, num_batches=bench.num_steps)

    return run


def _loader_change(point: tuple[int, int]) -> dict[str, Value]:
    return {"data.num_workers": point[0], "data.prefetch_batches": point[1]}
