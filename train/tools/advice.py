"""Turn the measurements of ``train profile`` into recommendations.

Pure functions of plain values. :func:`recommend` gives changes that were measured to be faster;
:func:`suggest` gives changes that the measurements speak for but did not try. Every recommendation
quotes the figures that it follows from.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from train.config import TrainConfig

MIN_GAIN: Final = 1.1
"""Smaller speedups are not recommended: short runs differ by some percent."""

NEARLY_BEST: Final = 0.97
"""The setting with the fewest processes within this share of the best rate is chosen."""

HIGH_MEMORY: Final = 0.85
"""Above this share of the device's memory, settings that save memory are suggested."""

MAX_DECODE_SHARE: Final = 0.99
"""Upper limit of the decode share, which keeps the speedup that it allows finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What the recommendations follow from; rates are in samples/s."""

    num_workers: int
    """Configured number of loader processes."""
    rates: Mapping[int, Sequence[float]]
    """Training by number of loader processes: one rate per round, or none if a run failed."""
    cached_rates: Sequence[float]
    """Training on batches that are already on the device, in the same rounds."""
    decode_fraction: float
    """Share of decoding in the time of making a batch."""
    memory_bytes: float
    """Peak of a step."""
    memory_limit_bytes: float
    """Memory that training can use."""
    could_use_bf16: bool
    """Whether the device is a GPU that has bfloat16, and the forward pass is in float32."""

    @property
    def headspaces(self) -> list[float]:
        """Cached over configured rate of each round; 1 means that the loader costs nothing."""
        return _ratios(self.cached_rates, self.rates[self.num_workers])

    @property
    def headspace(self) -> float:
        """Median of the rounds."""
        return median(self.headspaces)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One change of the configuration, its reason and its gain."""

    name: str
    change: Mapping[str, int | str | bool]
    why: str
    expected_gain: str = "not measured"


def as_arguments(change: Mapping[str, int | str | bool]) -> str:
    """Format a change as arguments of ``train run``."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in change.items()
    )


def recommend(measured: Measurements) -> list[Recommendation]:
    """Recommend what was measured to be faster; empty if the configured setting is good.

    A number of loader processes counts as faster if it won every round, and the median round by
    :data:`MIN_GAIN`.
    """
    base = measured.rates[measured.num_workers]
    gains = {n: _ratios(rates, base) for n, rates in measured.rates.items() if rates}
    better = {
        n: median(measured.rates[n])
        for n, ratios in gains.items()
        if min(ratios) > 1 and median(ratios) >= MIN_GAIN
    }
    if not better:
        return []
    best_rate = max(better.values())
    chosen = min(n for n, rate in better.items() if rate >= NEARLY_BEST * best_rate)
    why = (
        f"training made {median(base):.4g} samples/s with num_workers {measured.num_workers} and "
        f"{better[chosen]:.4g} with {chosen}; on cached batches it makes "
        f"{median(measured.cached_rates):.4g}"
    )
    gain = f"{median(gains[chosen]):.2f}x samples/s"
    return [Recommendation("num_workers", {"data.num_workers": chosen}, why, gain)]


def suggest(measured: Measurements, config: TrainConfig) -> list[Recommendation]:
    """Suggest changes that the measurements speak for but did not try."""
    suggestions = []
    is_loader_bound = measured.headspace >= MIN_GAIN
    if is_loader_bound and measured.decode_fraction >= 0.5:
        suggestions.append(_cheaper_decoding(measured, reads_shards=bool(config.data.sets)))
    if not is_loader_bound and measured.could_use_bf16:
        suggestions.append(
            Recommendation(
                "precision",
                {"training.precision": "bf16"},
                "the step limits the rate and computes in float32; this GPU has bfloat16",
                "not measured; profile with it to compare",
            )
        )
    if measured.memory_bytes > HIGH_MEMORY * measured.memory_limit_bytes:
        suggestions += _less_memory(measured, config)
    if not config.training.compile:
        why = "compiling takes minutes; profile with it to compare"
        suggestions.append(Recommendation("compile", {"training.compile": True}, why))
    return suggestions


def _cheaper_decoding(measured: Measurements, *, reads_shards: bool) -> Recommendation:
    """Suggest shards instead of sessions, or a codec that decodes faster."""
    why = (
        f"headspace is {measured.headspace:.2f}x and decoding is {measured.decode_fraction:.0%} of "
        "making a batch; "
    )
    most = 1 / (1 - min(measured.decode_fraction, MAX_DECODE_SHARE))
    gain = f"not measured; the loader at most {most:.1f}x"
    if reads_shards:
        why += "this is a key of the recipe: build the shards again, which are larger"
        return Recommendation("codec", {"video.codec": "yuv420"}, why, gain)
    why += "sessions are decoded for every batch: run `make shards` once"
    return Recommendation("shards", {"data.shards": "shards/default"}, why, gain)


def _less_memory(measured: Measurements, config: TrainConfig) -> list[Recommendation]:
    """Suggest gradient checkpointing, or smaller micro-batches if that is on already."""
    size_gib, limit_gib = measured.memory_bytes / 2**30, measured.memory_limit_bytes / 2**30
    why = f"a step takes {size_gib:.3g} GiB of {limit_gib:.3g} GiB"
    if not config.model.is_checkpointing:
        gain = "not measured; less memory, one more forward pass per step"
        change = {"model.gradient_checkpointing": True}
        return [Recommendation("gradient_checkpointing", change, why, gain)]
    if config.data.batch_size % 2:
        return []
    halved = {
        "data.batch_size": config.data.batch_size // 2,
        "training.accumulation_steps": 2 * config.training.accumulation_steps,
    }
    why += "; the samples per step stay the same"
    return [Recommendation("batch_size", halved, why, "not measured; less memory")]


def _ratios(rates: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the ratio of two rates in each round."""
    return [rate / other for rate, other in zip(rates, base, strict=True)]
