"""Statistics of a shard's columns that merge exactly: counts and exact sums, never means.

Any packing of the same samples into shards, any number of workers, and an update as well as a fresh
build give the same manifest.

Sums of float32 values and of their squares are exact. A float32 is m * 2**e with an integer
|m| < 2**24. Values of the same e are added as integers, then all e as one unbounded integer. A sum
is written as C writes floats in base 16: ``0x2b3c4p-31`` is 0x2b3c4 * 2**-31.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Axis:
    """Equal bins over [low, high], and one on each side for what lies beyond.

    They never depend on the values, so that histograms of shards add up.
    """

    low: float
    high: float
    num_bins: int

    def count(self, values: NDArray[np.floating[Any]]) -> list[int]:
        """Values per bin: below low, the bins, above high; the last bin holds high itself."""
        steps = np.arange(self.num_bins + 1) / self.num_bins
        edges = self.low + (self.high - self.low) * steps
        edges[-1] = np.nextafter(self.high, np.inf)
        places = np.searchsorted(edges, values.astype(np.float64), side="right")
        return [int(n) for n in np.bincount(places, minlength=self.num_bins + 2)]


_PI = float(np.float32(math.pi))
"""The largest angle that is stored: above pi itself."""

TOUCH = Axis(0.0, 1.0, 50)
ANGLE = Axis(-_PI, _PI, 36)
"""rad."""
VELOCITY = Axis(-20.0, 20.0, 40)
"""rad/s; three turns a second, more than a wrist does."""
LEVEL = Axis(-100.0, 0.0, 50)
"""dBFS."""

FULL_SCALE = 2**15

COLUMNS = frozenset({"audio", "proprio"})
"""Columns whose statistics can be made anew from their members."""

_NUMBERS = ("proprio", "touch", "audio_level")


def of_sensors(
    proprio: NDArray[np.float32], touch: NDArray[np.float32]
) -> dict[str, dict[str, Any]]:
    """Of the proprio column: [..., angles then velocities] and [..., fingers]."""
    num_angles = proprio.shape[-1] // 2
    num_velocities = proprio.shape[-1] - num_angles
    return {
        "proprio": of_numbers(proprio, [ANGLE] * num_angles + [VELOCITY] * num_velocities),
        "touch": of_numbers(touch, [TOUCH] * touch.shape[-1]),
    }


def of_sound(levels_db: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Of the audio column: the levels of its windows."""
    levels = np.array(levels_db, dtype=np.float32).reshape(-1, 1)
    return {"audio_level": of_numbers(levels, [LEVEL])}


def level_db(samples: NDArray[np.int16]) -> float:
    """RMS of a window in dB of full scale; -100 where it is less, as of silence."""
    wide = samples.astype(np.int64)
    energy = int(np.dot(wide, wide))
    if energy == 0:
        return LEVEL.low
    return max(LEVEL.low, 10 * math.log10(energy / (len(samples) * FULL_SCALE**2)))


def of_numbers(values: NDArray[np.float32], axes: Sequence[Axis]) -> dict[str, Any]:
    """Count, sums, sums of squares, min, max and histogram of each column of [..., D]; rows with
    NaN don't count.

    Args:
        values: the rows.
        axes: a column's bins, for each.
    """
    rows = values.reshape(-1, values.shape[-1])
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) == 0:
        return {"count": 0}
    sums, sums_of_squares = exact_sums(rows)
    wide = rows.astype(np.float64)
    return {
        "count": len(rows),
        "sum": wide.sum(axis=0).tolist(),  # for builders that know no exact ones
        "sum_squares": np.square(wide).sum(axis=0).tolist(),
        "exact_sum": sums,
        "exact_sum_squares": sums_of_squares,
        "min": (rows.min(axis=0) + 0.0).tolist(),  # 0.0: no -0.0, which would hang on the order
        "max": (rows.max(axis=0) + 0.0).tolist(),
        "range": [[axis.low, axis.high] for axis in axes],
        "histogram": [axis.count(column) for axis, column in zip(axes, rows.T, strict=True)],
    }


def of_levels(
    levels: NDArray[np.uint8], valid: NDArray[np.bool_], num_levels: int
) -> list[list[int]]:
    """How often each dMel level stands in each channel, [channels][levels]."""
    rows = levels[valid]
    return [np.bincount(channel, minlength=num_levels).tolist() for channel in rows.T]


def of_tokens(streams: Iterable[Sequence[int]]) -> list[int]:
    """How often each token stands in a text stream, up to the largest that does."""
    ids = np.fromiter((i for ids in streams for i in ids), dtype=np.int64)
    return [int(n) for n in np.bincount(ids)]


def lacking(found: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
    """Columns whose statistics an early version of this program left out or rounded.

    Args:
        found: a shard's statistics, per column.
    """
    sensors = found.get("proprio", {})
    numbers = {
        "audio": [found.get("audio", {}).get("audio_level")],
        "proprio": [sensors.get("proprio"), sensors.get("touch")],
    }
    return frozenset(name for name, parts in numbers.items() if not all(map(_is_exact, parts)))


def merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of several shards as those of one set, with mean and std of the numbers.

    Of shards that early versions of this program made, what they left out is left out.
    """
    merged: dict[str, Any] = {"num_samples": sum(p["num_samples"] for p in parts)}
    for name in _NUMBERS:
        if all(name in p for p in parts):
            merged[name] = _merge_numbers([p[name] for p in parts if p[name]["count"]])
    levels = [np.asarray(p["dmel_levels"], dtype=np.int64) for p in parts]
    merged["dmel_levels"] = np.sum(levels, axis=0).tolist() if levels else []
    for name in ("internal_tokens", "external_tokens"):
        columns = zip_longest(*(p[name] for p in parts), fillvalue=0)
        merged[name] = [sum(column) for column in columns]
    return merged


def _is_exact(part: Mapping[str, Any] | None) -> bool:
    return part is not None and (part["count"] == 0 or "histogram" in part)


def _merge_numbers(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = sum(p["count"] for p in parts)
    if count == 0:
        return {"count": 0}
    totals = _totals(parts, "sum")
    squares = _totals(parts, "sum_squares")
    merged = {
        "count": count,
        "mean": [mean_of(total, count) for total in totals],
        "std": [std_of(t, s, count) for t, s in zip(totals, squares, strict=True)],
        "min": [min(column) for column in zip(*(p["min"] for p in parts), strict=True)],
        "max": [max(column) for column in zip(*(p["max"] for p in parts), strict=True)],
    }
    if all(map(_is_exact, parts)):
        merged["range"] = parts[0]["range"]
        merged["histogram"] = [
            [sum(counts) for counts in zip(*columns, strict=True)]
            for columns in zip(*(p["histogram"] for p in parts), strict=True)
        ]
    return merged


def _totals(parts: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """Sums over all parts of each value; of early ones from floats."""
    sums = [p.get(f"exact_{name}", p[name]) for p in parts]
    return [add_exactly(column) for column in zip(*sums, strict=True)]


SCALE_BITS = 1074
"""Sums are counted in units of 2**-1074, the smallest float64: every sum, and every float, is a
whole number of them."""

_DIGITS = 24
"""Bits of a float32's significand."""


def exact_sums(values: NDArray[np.float32]) -> tuple[list[str], list[str]]:
    """Sums, and sums of squares, of each column of finite [N, D]; N below 2**29."""
    fractions, exponents = np.frexp(values.astype(np.float64))
    whole = np.ldexp(fractions, _DIGITS)
    squares = np.square(whole)
    upper = np.floor(np.ldexp(squares, -_DIGITS))
    lower = squares - np.ldexp(upper, _DIGITS)
    lowest = int(exponents.min(initial=0))
    sums, sums_of_squares = [], []
    for column in range(values.shape[1]):
        places = exponents[:, column] - lowest
        base = lowest - _DIGITS
        sums.append(_hex(_total(places, whole[:, column], step=1), base))
        # A square has 48 bits; bincount adds in float64, which holds 2**29 numbers of 24.
        high = _total(places, upper[:, column], step=2)
        low = _total(places, lower[:, column], step=2)
        sums_of_squares.append(_hex((high << _DIGITS) + low, 2 * base))
    return sums, sums_of_squares


def add_exactly(sums: Iterable[str | float]) -> int:
    """The sum of sums, in units of 2**-SCALE_BITS.

    Args:
        sums: as :func:`exact_sums` writes them; or floats, which early sets have.
    """
    return sum(map(_parse, sums))


def mean_of(total: int, count: int) -> float:
    """The mean, correctly rounded, of `count` values whose sum is `total`."""
    return total / (count << SCALE_BITS)


def std_of(total: int, total_of_squares: int, count: int) -> float:
    """The population's standard deviation: nothing cancels, however far from zero values lie."""
    deviations = (count * total_of_squares << SCALE_BITS) - total * total
    # Below zero only where early sets rounded their sums.
    return math.sqrt(max(0, deviations) / (count * count << 2 * SCALE_BITS))


def _total(places: NDArray[np.signedinteger], whole: NDArray[np.float64], *, step: int) -> int:
    """The sum of whole * 2**(step * places), for places from 0."""
    found: Sequence[float] = np.bincount(places, weights=whole).tolist()
    return sum(int(part) << step * place for place, part in enumerate(found))


def _hex(total: int, exponent: int) -> str:
    """The number total * 2**exponent, in lowest terms."""
    zeros = (total & -total).bit_length() - 1 if total else 0
    return f"{total >> zeros:#x}p{exponent + zeros if total else 0}"


def _parse(text: str | float) -> int:
    if isinstance(text, str):
        digits, _, exponent = text.partition("p")
        return int(digits, 16) << (int(exponent) + SCALE_BITS)
    numerator, denominator = float(text).as_integer_ratio()
    return numerator * ((1 << SCALE_BITS) // denominator)
