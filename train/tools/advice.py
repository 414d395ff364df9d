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

Value = int | float | str | bool

MIN_GAIN: Final = 1.1
"""Smaller speedups are not recommended: short runs differ by some percent."""

NEARLY_BEST: Final = 0.97
"""Of all settings within this share of the best rate, the one with fewest processes is chosen."""

HIGH_MEMORY: Final = 0.85
"""Above this share of the device's memory, settings that save memory are suggested."""

MAX_DECODE_SHARE: Final = 0.99
"""Upper limit of the decode share, which keeps the speedup that it allows finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRate:
    """Training speed with one number of loader processes."""

    num_workers: int
    training_samples_per_s: tuple[float, ...] = ()
    """One rate per round; empty if a run failed."""
    problem: str | None = None
    """Why there are no rates."""

    @property
    def rate(self) -> float:
        """Median of the rounds, in samples/s."""
        return median(self.training_samples_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What the recommendations follow from."""

    configured: WorkerRate
    sweep: tuple[WorkerRate, ...]
    """Other numbers of processes, in the same rounds as `configured`."""
    cached_samples_per_s: tuple[float, ...]
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
    def headspaces(self) -> tuple[float, ...]:
        """Per round, the rate on cached batches over the configured rate.

        1 means that the loader costs nothing.
        """
        return tuple(_ratios(self.cached_samples_per_s, self.configured.training_samples_per_s))

    @property
    def headspace(self) -> float:
        """Median of the rounds."""
        return median(self.headspaces)

    @property
    def is_loader_bound(self) -> bool:
        """Whether training waits for the loader for a notable part of the time."""
        return self.headspace >= MIN_GAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """One change of the configuration, its reason and its gain."""

    name: str
    change: Mapping[str, Value]
    why: str
    expected_gain: str

    def as_arguments(self) -> str:
        """Format the change as arguments of ``train run``."""
        return " ".join(f"{key}={_yaml(value)}" for key, value in self.change.items())


def recommend(measured: Measurements) -> list[Recommendation]:
    """Recommend what was measured to be faster; empty if the configured setting is good.

    A number of loader processes counts as faster if it won every round, and the median round by
    :data:`MIN_GAIN`.
    """
    base = measured.configured
    better = [point for point in measured.sweep if _is_faster(point, base)]
    if not better:
        return []
    best_rate = max(point.rate for point in better)
    chosen = min(
        (point for point in better if point.rate >= NEARLY_BEST * best_rate),
        key=lambda point: point.num_workers,
    )
    gain = median(_ratios(chosen.training_samples_per_s, base.training_samples_per_s))
    return [
        Recommendation(
            name="num_workers",
            change={"data.num_workers": chosen.num_workers},
            why=(
                f"training made {base.rate:.4g} samples/s with num_workers {base.num_workers} and "
                f"{chosen.rate:.4g} with {chosen.num_workers}; on cached batches it makes "
                f"{median(measured.cached_samples_per_s):.4g}"
            ),
            expected_gain=f"{gain:.2f}x samples/s",
        )
    ]


def suggest(measured: Measurements, config: TrainConfig) -> list[Recommendation]:
    """Suggest changes that the measurements speak for but did not try."""
    suggestions = []
    if measured.is_loader_bound and measured.decode_fraction >= 0.5:
        suggestions.append(_cheaper_decoding(measured, reads_shards=bool(config.data.sets)))
    if not measured.is_loader_bound and measured.could_use_bf16:
        suggestions.append(
            Recommendation(
                name="precision",
                change={"training.precision": "bf16"},
                why="the step limits the rate and computes in float32; this GPU has bfloat16",
                expected_gain="not measured; profile with it to compare",
            )
        )
    if measured.memory_bytes > HIGH_MEMORY * measured.memory_limit_bytes:
        suggestions += _less_memory(measured, config)
    if not config.training.compile:
        suggestions.append(
            Recommendation(
                name="compile",
                change={"training.compile": True},
                why="compiling takes minutes; profile with it to compare",
                expected_gain="not measured",
            )
        )
    return suggestions


def _cheaper_decoding(measured: Measurements, *, reads_shards: bool) -> Recommendation:
    """Shards instead of sessions, or a codec that decodes faster."""
    most = 1 / (1 - min(measured.decode_fraction, MAX_DECODE_SHARE))
    if reads_shards:
        name, fix = "codec", "this is a key of the recipe: build the shards again, which are larger"
        change: dict[str, Value] = {"vision.codec": "yuv420"}
    else:
        name, fix = "shards", "sessions are decoded for every batch: run `make shards` once"
        change = {"data.shards": "shards/default"}
    return Recommendation(
        name=name,
        change=change,
        why=(
            f"headspace is {measured.headspace:.2f}x and decoding is "
            f"{measured.decode_fraction:.0%} of making a batch; {fix}"
        ),
        expected_gain=f"not measured; the loader at most {most:.1f}x",
    )


def _less_memory(measured: Measurements, config: TrainConfig) -> list[Recommendation]:
    """Gradient checkpointing, or smaller micro-batches if that is on already."""
    why = f"a step takes {_gib(measured.memory_bytes)} of {_gib(measured.memory_limit_bytes)}"
    if not config.model.is_checkpointing:
        return [
            Recommendation(
                name="gradient_checkpointing",
                change={"model.gradient_checkpointing": True},
                why=why,
                expected_gain="not measured; less memory, one more forward pass per step",
            )
        ]
    batch_size, steps = config.data.batch_size, config.training.accumulation_steps
    if batch_size % 2:
        return []
    return [
        Recommendation(
            name="batch_size",
            change={
                "data.batch_size": batch_size // 2,
                "training.accumulation_steps": 2 * steps,
            },
            why=f"{why}; the samples per step stay the same",
            expected_gain="not measured; less memory",
        )
    ]


def _is_faster(point: WorkerRate, base: WorkerRate) -> bool:
    """Whether a setting won every round, and the median round by enough."""
    if point.problem is not None:
        return False
    ratios = _ratios(point.training_samples_per_s, base.training_samples_per_s)
    return min(ratios) > 1 and median(ratios) >= MIN_GAIN


def _ratios(rates: Sequence[float], base: Sequence[float]) -> list[float]:
    """Ratio of two rates in each round."""
    return [rate / other for rate, other in zip(rates, base, strict=True)]


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.3g} GiB"


def _yaml(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
