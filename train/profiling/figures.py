"""What the short runs measured: plain values, from which the advice follows."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = int | float | str | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderPoint:
    """Training with one number of loader processes and one depth of prefetching."""

    num_workers: int
    prefetch_batches: int
    training_samples_per_s: tuple[float, ...] = ()
    """One per round."""
    loader_samples_per_s: tuple[float, ...] = ()
    """Where nothing is done with the batches."""
    problem: str | None = None
    """Why there are no figures."""

    @property
    def training_rate(self) -> float:
        """Median of the rounds, samples/s."""
        return median(self.training_samples_per_s)

    @property
    def loader_rate(self) -> float:
        """Median of the rounds, samples/s."""
        return median(self.loader_samples_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The step on cached batches with some keys of the configuration changed."""

    change: Mapping[str, Value]
    """Empty: as configured."""
    samples_per_s: tuple[float, ...] = ()
    """One per round."""
    peak_memory_bytes: int | None = None
    """Of the device in a step: on a GPU all that is allocated; on a CPU weights, gradients, moments
    and what the step adds."""
    problem: str | None = None
    """Why there are no figures."""
    lacks_memory: bool = False
    """Whether that is for want of memory."""

    @property
    def rate(self) -> float:
        """Median of the rounds, samples/s."""
        return median(self.samples_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All short runs."""

    configured: LoaderPoint
    sweep: tuple[LoaderPoint, ...]
    """Other numbers of processes, with the configured prefetching; rounds in turns with
    `configured`."""
    prefetch_base: LoaderPoint
    """The best number of processes, with the configured prefetching."""
    prefetch_sweep: tuple[LoaderPoint, ...]
    """Other depths; rounds in turns with `prefetch_base`."""
    cached: Variant
    """As configured, on cached batches; rounds in turns with `variants`."""
    variants: tuple[Variant, ...]
    headspaces: tuple[float, ...]
    """Per round: the rate with cached batches over that with the loader. About 1: the loader costs
    nothing."""
    memory_limit_bytes: int
    """What the device has for training."""
    decode_fraction: float = 0.0
    """Share of decoding in making a batch."""
    are_shards: bool = True
    """Whether samples come from shards; else recordings are decoded."""

    @property
    def headspace(self) -> float:
        """Median of the rounds."""
        return median(self.headspaces)
