"""How the values of a set are spread, in a line per field: by the manifest's statistics."""

from __future__ import annotations

import math
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_NAMES = {
    "touch": ("touch values",),
    "proprio": ("joint angles", "joint velocities"),
    "audio_level": ("dB of windows",),
}
"""Field -> names of its runs of values on one range."""

_BARS = "▁▂▃▄▅▆▇█"


def describe_spread(statistics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) lines about the train split; values of one range are taken together."""
    for field, names in _NAMES.items():
        found = statistics.get(field, {})
        if not found.get("count") or "histogram" not in found:  # or of an early version
            continue
        runs = groupby(range(len(found["mean"])), key=lambda i: found["range"][i])
        for name, (ends, places) in zip(names, runs, strict=False):
            yield name, _spread(found, list(places), ends)
    for name in ("internal_tokens", "external_tokens"):
        counts = statistics.get(name, [])
        used = sum(count > 0 for count in counts)
        yield name.replace("_", " "), f"{sum(counts)} of {used} kinds"


def _spread(found: Mapping[str, Any], places: Sequence[int], ends: Sequence[float]) -> str:
    """Mean, deviation and histogram of some values of a field."""
    means, stds = ([found[name][i] for i in places] for name in ("mean", "std"))
    mean = fmean(means)
    std = math.hypot(*stds, *(m - mean for m in means)) / math.sqrt(len(places))
    low, high = (f([found[f.__name__][i] for i in places]) for f in (min, max))
    counts = [sum(column) for column in zip(*(found["histogram"][i] for i in places), strict=True)]
    beyond = counts[0] + counts[-1]
    rest = f", {beyond} beyond" if beyond else ""
    return (
        f"{mean:.3g} +- {std:.3g}, {low:.3g} to {high:.3g}; "
        f"{ends[0]:.3g} {_bars(counts[1:-1])} {ends[1]:.3g}{rest}"
    )


def _bars(counts: Sequence[int]) -> str:
    """A bar for each count, a blank for none."""
    most = max(*counts, 1)
    return "".join(_BARS[(count * len(_BARS) - 1) // most] if count else " " for count in counts)
