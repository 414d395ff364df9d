"""Short runs in turns: samples/s of training with other loaders and with other settings.

Machines drift, and others use them. So every comparison is made round by round: all cases once,
then all again in the opposite order, and what is compared is the ratio within a round.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from shared.errors import EngineError
from train.data.device import to_device
from train.data.loader import Loader
from train.loop.prefetch import BatchFeed, iterate
from train.machine import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from train.config import TrainConfig
    from train.data.batch import Batch
    from train.data.source import SampleSource
    from train.profiling.step import TrainingStep

T = TypeVar("T")

MAX_RUN_S: Final = 5.0
"""A run, and the warm-up before it, stops after so long at the latest."""

MIN_STEPS: Final = 2
"""But not before so many steps."""


class CachedFeed:
    """The same batches again and again, in place of a :class:`train.loop.prefetch.BatchFeed`."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = list(batches)

    def take(self, count: int = 1) -> list[Batch]:
        """The batches of a step."""
        return self._batches[:count]

    def fetch_ahead(self) -> None:
        """Nothing: all is here."""

    def close(self) -> None:
        """Nothing is open."""


def cached_batches(source: SampleSource, config: TrainConfig, device: torch.device) -> list[Batch]:
    """The first step's batches, on the device and in memory of their own."""
    quiet = with_changes(config, {"data.num_workers": 0, "data.last_batch": "pad"})
    batches = iterate(Loader(source, quiet), seed=0, position={"next_batch": 0})
    with contextlib.closing(batches):
        taken = itertools.islice(batches, config.training.accumulation_steps)
        return [to_device(_copied(batch), device) for batch, _ in taken]


def training_rate(
    step: TrainingStep,
    feed: BatchFeed | CachedFeed,
    config: TrainConfig,
    device: torch.device,
    *,
    num_steps: int,
    num_warm_up: int,
) -> float:
    """Samples/s of training, as ``Trainer.train`` runs it; closes the feed."""

    def one_step() -> None:
        step.run(feed.take(config.training.accumulation_steps))
        feed.fetch_ahead()

    threads = torch.get_num_threads()
    use_threads_of(config, device)
    try:
        _repeat(one_step, num_warm_up)
        runtime.synchronize(device)
        began_s = time.perf_counter()
        done = _repeat(one_step, num_steps)
        runtime.synchronize(device)
        seconds = time.perf_counter() - began_s
    finally:
        feed.close()
        torch.set_num_threads(threads)
    return done * config.data.batch_size * config.training.accumulation_steps / seconds


def loaded_rate(
    step: TrainingStep,
    source: SampleSource,
    config: TrainConfig,
    device: torch.device,
    *,
    num_steps: int,
) -> float:
    """Samples/s of training on the real loader.

    Raises:
        EngineError: the loader gave up.
    """
    feed = BatchFeed(Loader(source, config), device, seed=config.training.seed)
    warm_up = 2 + _num_ahead(config) // config.training.accumulation_steps
    return training_rate(step, feed, config, device, num_steps=num_steps, num_warm_up=warm_up)


def loader_rate(source: SampleSource, config: TrainConfig, *, num_batches: int) -> float:
    """Samples/s of the loader alone: batches are let go as they come.

    Raises:
        EngineError: the loader gave up.
    """
    batches = iterate(Loader(source, config), seed=0, position={"next_batch": 0})
    with contextlib.closing(batches):
        _repeat(lambda: next(batches), 1 + _num_ahead(config))
        began_s = time.perf_counter()
        done = _repeat(lambda: next(batches), num_batches)
        return done * config.data.batch_size / (time.perf_counter() - began_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a case has no rate."""

    text: str
    lacks_memory: bool


def in_turns(
    cases: Mapping[T, Callable[[], float]], *, num_rounds: int, tell: Callable[[T], object]
) -> tuple[dict[T, tuple[float, ...]], dict[T, Problem]]:
    """Run every case once per round, every other round backwards.

    Args:
        cases: name -> a run, which gives a rate.
        num_rounds: how often.
        tell: told the name of each run before it begins.

    Returns:
        The rates of each case, one per round; and why a case has none. A case that failed is not
        run again.

    Raises:
        EngineError: the first case failed; it is the one that the others are compared with.
    """
    rates: dict[T, tuple[float, ...]] = dict.fromkeys(cases, ())
    problems: dict[T, Problem] = {}
    first = next(iter(cases))
    for number in range(num_rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            if name in problems:
                continue
            tell(name)
            try:
                with runtime.translate_oom():
                    rates[name] += (cases[name](),)
            except EngineError as error:
                if name == first:
                    raise
                lacks_memory = isinstance(error.__cause__, torch.OutOfMemoryError)
                text = str(error).splitlines()[0]  # the error itself would hold what ran out
                problems[name], rates[name] = Problem(text=text, lacks_memory=lacks_memory), ()
                gc.collect()
            _empty_cache()
    return rates, problems


def use_threads_of(config: TrainConfig, device: torch.device) -> None:
    """The threads that a training by this configuration has."""
    threads = runtime.choose_num_threads(
        config.training.num_threads, device, num_workers=config.data.num_workers
    )
    runtime.set_up_math(num_threads=threads)


def with_changes(config: TrainConfig, change: Mapping[str, Any]) -> TrainConfig:
    """A configuration with other values of some keys, such as ``data.num_workers``.

    Raises:
        pydantic.ValidationError: a value is none.
    """
    values = config.model_dump(mode="json")
    for key, value in change.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[name] = value
    return type(config).model_validate(values)


def _num_ahead(config: TrainConfig) -> int:
    """Batches that may be finished before they are asked for."""
    return config.data.num_workers * config.data.prefetch_batches


def _repeat(run: Callable[[], object], count: int) -> int:
    """Run at most `count` times, as long as there is time; returns how often."""
    until_s = time.perf_counter() + MAX_RUN_S
    for number in range(count):
        if number >= MIN_STEPS and time.perf_counter() > until_s:
            return number
        run()
    return count


def _copied(value: Any) -> Any:  # noqa: ANN401 (any nesting)
    """The same with tensors in memory of their own, not the loader's."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return value


def _empty_cache() -> None:
    """Give back what a run left, so that the next one finds the memory that it found."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
