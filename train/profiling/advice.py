"""Figures -> recommendations: a pure function. Each one follows from figures, which it names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from train.profiling.figures import Figures, LoaderPoint, Value, Variant

MIN_GAIN: Final = 1.1
"""What promises less is not recommended: short runs differ by some percent."""

NEARLY_BEST: Final = 0.97
"""Of settings that are so near to the best, the one with the least processes and batches is taken.
"""

FULL: Final = 0.85
"""A step that takes more than this share of the memory wants it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """One change, why, and what it is worth."""

    what: str
    change: Mapping[str, Value]
    why: str
    expected_gain: str

    def as_arguments(self) -> str:
        """The change as one adds it to a command line."""
        return " ".join(f"{key}={_yaml(value)}" for key, value in self.change.items())


def recommend(figures: Figures) -> list[Recommendation]:
    """What would make training faster or fit, the largest gains first; empty where all is good."""
    found = _for_loader(figures)
    found += [better for v in _kinds(figures) if (better := _better_step(figures, v)) is not None]
    ranked = [r for _, r in sorted(found, key=lambda pair: -pair[0])]
    return [*ranked, *_for_memory(figures)]


def expected_rate(figures: Figures, cached_rate: float) -> float:
    """Samples/s of training, if the step on cached batches had another rate.

    What the step saves is saved of the whole, but with loader processes beside it training is never
    faster than the loader alone.
    """
    saved_s = 1 / figures.cached.rate - 1 / cached_rate
    sample_s = 1 / figures.configured.training_rate - saved_s
    if figures.configured.num_workers:
        sample_s = max(sample_s, 1 / figures.configured.loader_rate)
    return 1 / max(sample_s, 1 / cached_rate)


def untested(figures: Figures) -> list[Recommendation]:
    """What the figures speak for and these runs can't measure."""
    found = []
    keys = {key for variant in figures.variants for key in variant.change}
    if "training.compile" not in keys:
        found.append(
            Recommendation(
                what="compile",
                change={"training.compile": True},
                why="compiling takes minutes; `--try-compile` measures it",
                expected_gain="not measured",
            )
        )
    is_waiting = figures.headspace >= MIN_GAIN
    if is_waiting and figures.decode_fraction >= 0.5:
        found.append(_cheaper_decoding(figures))
    return found


def _cheaper_decoding(figures: Figures) -> Recommendation:
    """Shards in the place of recordings, or frames that need less decoding."""
    most = 1 / (1 - min(figures.decode_fraction, 0.99))
    change: dict[str, Value] = {"data.shards": "shards/default"}
    mend = "the recordings are decoded anew each time: build them into shards once by `make shards`"
    if figures.are_shards:
        change = {"vision.codec": "yuv420"}
        mend = "a key of the recipe: build the shards again, larger"
    return Recommendation(
        what="codec" if figures.are_shards else "shards",
        change=change,
        why=(
            f"headspace is {figures.headspace:.2f}x and decoding is "
            f"{figures.decode_fraction:.0%} of making a batch; {mend}"
        ),
        expected_gain=f"not measured; the loader at most {most:.1f}x",
    )


def _for_loader(figures: Figures) -> list[tuple[float, Recommendation]]:
    """Of other processes and other prefetching: both at once where prefetching was found better
    with another number of processes than the configured one.
    """
    configured, base = figures.configured, figures.prefetch_base
    workers = _better_loader(figures, configured, figures.sweep, "num_workers")
    prefetch = _better_loader(figures, base, figures.prefetch_sweep, "prefetch_batches")
    if prefetch is None or base.num_workers == configured.num_workers:
        return [better for better in (workers, prefetch) if better is not None]
    # Runs in turns are compared with each other only: the gains of the two sweeps multiply.
    same = next(p for p in figures.sweep if p.num_workers == base.num_workers)
    first = median(_ratios(same.training_samples_per_s, configured.training_samples_per_s))
    gain, alone = first * prefetch[0], prefetch[1]
    why = (
        f"training made {configured.training_rate:.4g} samples/s with num_workers "
        f"{configured.num_workers} and {same.training_rate:.4g} with {base.num_workers}; then "
        f"{alone.why}"
    )
    change = {"data.num_workers": base.num_workers, **alone.change}
    return [(gain, replace(alone, change=change, why=why, expected_gain=_times(gain)))]


def _better_loader(
    figures: Figures, base: LoaderPoint, points: Sequence[LoaderPoint], what: str
) -> tuple[float, Recommendation] | None:
    """The least of the points that are nearly the best, where they are better than the base."""
    better = [
        p
        for p in points
        if p.problem is None
        and _is_gain(_ratios(p.training_samples_per_s, base.training_samples_per_s))
    ]
    if not better:
        return None
    best = max(p.training_rate for p in better)
    chosen = min(
        (p for p in better if p.training_rate >= NEARLY_BEST * best),
        key=lambda p: (p.num_workers, p.prefetch_batches),
    )
    gain = median(_ratios(chosen.training_samples_per_s, base.training_samples_per_s))
    value, was = getattr(chosen, what), getattr(base, what)
    beside = "" if what == "num_workers" else f" with num_workers {base.num_workers}"
    return gain, Recommendation(
        what=what,
        change={f"data.{what}": value},
        why=(
            f"training{beside} made {base.training_rate:.4g} samples/s with {what} {was} and "
            f"{chosen.training_rate:.4g} with {value}; on cached batches it makes "
            f"{figures.cached.rate:.4g}"
        ),
        expected_gain=_times(gain),
    )


def _kinds(figures: Figures) -> list[Variant]:
    """The best variant of each kind, which is what is changed; those that ran and fit."""
    best: dict[str, Variant] = {}
    for variant in figures.variants:
        peak = variant.peak_memory_bytes or 0
        if variant.problem is None and peak <= figures.memory_limit_bytes:
            kind = next(iter(variant.change))
            if kind not in best or variant.rate > best[kind].rate:
                best[kind] = variant
    return list(best.values())


def _better_step(figures: Figures, variant: Variant) -> tuple[float, Recommendation] | None:
    """A variant of the step, if training would be faster with it, as the loader is."""
    ratios = _ratios(variant.samples_per_s, figures.cached.samples_per_s)
    gain = expected_rate(figures, figures.cached.rate * median(ratios)) / (
        figures.configured.training_rate
    )
    if not _is_gain(ratios) or gain < MIN_GAIN:
        return None
    why = (
        f"the step makes {figures.cached.rate:.4g} samples/s as configured and "
        f"{variant.rate:.4g} with this, on cached batches"
    )
    if variant.peak_memory_bytes is not None and figures.cached.peak_memory_bytes is not None:
        why += (
            f"; memory {_gib(figures.cached.peak_memory_bytes)} -> "
            f"{_gib(variant.peak_memory_bytes)} of {_gib(figures.memory_limit_bytes)}"
        )
    what = next(iter(variant.change)).rpartition(".")[2]
    if what == "batch_size" and len(variant.change) == 1:
        why += "; it is another training, for which another learning rate may be right"
    return gain, Recommendation(
        what=what, change=variant.change, why=why, expected_gain=_times(gain)
    )


def _for_memory(figures: Figures) -> list[Recommendation]:
    """Gradient checkpointing, where memory is what keeps the batch small."""
    before = figures.cached.peak_memory_bytes
    saving = next(
        (v for v in figures.variants if v.change.get("model.gradient_checkpointing") is True), None
    )
    if before is None or saving is None or saving.problem or saving.peak_memory_bytes is None:
        return []
    is_short = any(v.lacks_memory for v in figures.variants)
    is_short = is_short or before > FULL * figures.memory_limit_bytes
    share = saving.peak_memory_bytes / before
    if not is_short or share > 1 / MIN_GAIN:
        return []
    slower = 1 / median(_ratios(saving.samples_per_s, figures.cached.samples_per_s))
    return [
        Recommendation(
            what="gradient_checkpointing",
            change=saving.change,
            why=(
                f"a larger batch lacks memory: a step takes {_gib(before)} of "
                f"{_gib(figures.memory_limit_bytes)}, with this {_gib(saving.peak_memory_bytes)}"
            ),
            expected_gain=f"{share:.2f}x memory at {slower:.2f}x time",
        )
    ]


def _ratios(rates: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round."""
    return [rate / other for rate, other in zip(rates, base, strict=True)]


def _is_gain(ratios: Sequence[float]) -> bool:
    """Better in every round, and by enough in the middle one."""
    return min(ratios) > 1 and median(ratios) >= MIN_GAIN


def _times(gain: float) -> str:
    return f"{gain:.2f}x samples/s"


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.3g} GiB"


def _yaml(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
