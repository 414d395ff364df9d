"""Statistics of columns that merge exactly: counts and exact sums, never means.

Any packing of the same samples into shards, any number of workers, and an update as well as a fresh
build give the same manifest.

Sums of float32 values and of their squares are exact. A float32 is m * 2**e with an integer
|m| < 2**24. Values of the same e are added as integers, then all e as one unbounded integer. A sum
is written as C writes floats in base 16: ``0x2b3c4p-31`` is 0x2b3c4 * 2**-31.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from shared.shardset.codec import decode_wav

from shared.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from shared.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Axis:
    """Equal bins over [low, high], and one bin on each side for values beyond.

    The bins never depend on the values, so histograms of shards can be added.
    """

    low: float
    high: float
    num_bins: int

    def count(self, values: NDArray[np.floating[Any]]) -> list[int]:
        """Count values per bin: below low, the bins, above high; the last bin includes high."""
        steps = np.arange(self.num_bins + 1) / self.num_bins
        edges = self.low + (self.high - self.low) * steps
        edges[-1] = np.nextafter(self.high, np.inf)
        bins = np.searchsorted(edges, values.astype(np.float64), side="right")
        return [int(n) for n in np.bincount(bins, minlength=self.num_bins + 2)]


_PI = float(np.float32(math.pi))
"""The largest angle that is stored; slightly above pi."""

TOUCH = Axis(0.0, 1.0, 50)
ANGLE = Axis(-_PI, _PI, 36)
"""rad."""
VELOCITY = Axis(-20.0, 20.0, 40)
"""rad/s; three turns a second, faster than a wrist."""
LEVEL = Axis(-100.0, 0.0, 50)
"""dBFS."""

FULL_SCALE = 2**15

_NUMBERS = ("proprio", "touch", "audio_level")

# --- columns of a shard ----------------------------------------------------------------------


class NoCounter:
    """Counts nothing, for columns without statistics."""

    result: dict[str, Any] | None = None

    def add(self, content: bytes) -> None:
        """Take a member's bytes."""


class SoundCounter(NoCounter):
    """Counts the levels of sound members."""

    def __init__(self) -> None:
        self._levels_db: list[float] = []

    def add(self, content: bytes) -> None:
        """Take a member's bytes."""
        self._levels_db.append(level_db(decode_wav(content)))

    @property
    def result(self) -> dict[str, Any]:  # type: ignore[override]
        """Statistics of the members so far."""
        return sound_statistics(self._levels_db)


class TokenCounter(NoCounter):
    """Counts the tokens of text members."""

    def __init__(self) -> None:
        self._ids: dict[str, list[list[int]]] = {"internal": [], "external": []}

    def add(self, content: bytes) -> None:
        """Take a member's bytes."""
        text = json.loads(content)
        for name, ids in self._ids.items():
            ids.append(text[name]["ids"])

    @property
    def result(self) -> dict[str, Any]:  # type: ignore[override]
        """Statistics of the members so far."""
        return {f"{name}_tokens": token_statistics(ids) for name, ids in self._ids.items()}


TAR_COUNTERS: dict[str, type[NoCounter]] = {"audio": SoundCounter, "text": TokenCounter}
"""Tar columns with statistics, and what counts their members."""


def array_statistics(
    column: str, arrays: Mapping[str, NDArray[Any]], recipe: Recipe
) -> dict[str, Any]:
    """Compute the statistics of a Zarr column from its arrays, with a row per sample."""
    if column == "proprio":
        return of_sensors(arrays["proprio"], arrays["touch"])
    return {"dmel_levels": level_statistics(arrays["dmel"], arrays["valid"], recipe.mel.levels)}


def of_sensors(
    proprio: NDArray[np.float32], touch: NDArray[np.float32]
) -> dict[str, dict[str, Any]]:
    """Compute the statistics of [..., angles then velocities] and [..., fingers]."""
    num_angles = proprio.shape[-1] // 2
    num_velocities = proprio.shape[-1] - num_angles
    return {
        "proprio": number_statistics(proprio, [ANGLE] * num_angles + [VELOCITY] * num_velocities),
        "touch": number_statistics(touch, [TOUCH] * touch.shape[-1]),
    }


def sound_statistics(levels_db: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Compute the statistics of the levels of segments."""
    levels = np.array(levels_db, dtype=np.float32).reshape(-1, 1)
    return {"audio_level": number_statistics(levels, [LEVEL])}


def level_db(samples: NDArray[np.int16]) -> float:
    """Compute the RMS of a segment in dB of full scale, at least -100 (silence)."""
    wide = samples.astype(np.int64)
    energy = int(np.dot(wide, wide))
    if energy == 0:
        return LEVEL.low
    return max(LEVEL.low, 10 * math.log10(energy / (len(samples) * FULL_SCALE**2)))


def number_statistics(values: NDArray[np.float32], axes: Sequence[Axis]) -> dict[str, Any]:
    """Compute count, sums, sums of squares, min, max and histogram of each column of [..., D].

    Args:
        values: the rows; rows with NaN are skipped.
        axes: the bins of each column.
    """
    rows = values.reshape(-1, values.shape[-1])
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) == 0:
        return {"count": 0}
    sums, sums_of_squares = exact_sums(rows)
    wide = rows.astype(np.float64)
    return {
        "count": len(rows),
        "sum": wide.sum(axis=0).tolist(),  # part of the format; the exact sums are read
        "sum_squares": np.square(wide).sum(axis=0).tolist(),
        "exact_sum": sums,
        "exact_sum_squares": sums_of_squares,
        # Adding 0.0 turns -0.0 into 0.0, whose choice would depend on the order of values.
        "min": (rows.min(axis=0) + 0.0).tolist(),
        "max": (rows.max(axis=0) + 0.0).tolist(),
        "range": [[axis.low, axis.high] for axis in axes],
        "histogram": [axis.count(column) for axis, column in zip(axes, rows.T, strict=True)],
    }


def level_statistics(
    levels: NDArray[np.uint8], valid: NDArray[np.bool_], num_levels: int
) -> list[list[int]]:
    """Count each dMel level in each channel: [channels][levels]."""
    rows = levels[valid]
    return [np.bincount(channel, minlength=num_levels).tolist() for channel in rows.T]


def token_statistics(streams: Iterable[Sequence[int]]) -> list[int]:
    """Count each token of a text stream, up to the largest token that occurs."""
    ids = np.fromiter((i for ids in streams for i in ids), dtype=np.int64)
    return [int(n) for n in np.bincount(ids)]


# --- sets ------------------------------------------------------------------------------------


def merge(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the statistics of shards into those of a set, with mean and std of the numbers.

    Raises:
        ShardError: a shard lacks some: it was written before they were part of the format.
    """
    merged: dict[str, Any] = {"num_samples": sum(shard["num_samples"] for shard in shards)}
    for name in _NUMBERS:
        try:
            merged[name] = _merge_numbers([shard[name] for shard in shards if shard[name]["count"]])
        except KeyError as error:
            raise ShardError(
                f"statistics of {name}: a shard of the set lacks {error}, so an unreleased version "
                "wrote it; fix: remove the folder of the set or choose another one, and build the "
                "set again"
            ) from error
    levels = [np.asarray(shard["dmel_levels"], dtype=np.int64) for shard in shards]
    merged["dmel_levels"] = np.sum(levels, axis=0).tolist() if levels else []
    for name in ("internal_tokens", "external_tokens"):
        columns = zip_longest(*(shard[name] for shard in shards), fillvalue=0)
        merged[name] = [sum(column) for column in columns]
    return merged


def _merge_numbers(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = sum(shard["count"] for shard in shards)
    if count == 0:
        return {"count": 0}

    def columns(name: str) -> Iterable[tuple[Any, ...]]:
        """Group the values of all shards by column."""
        return zip(*(shard[name] for shard in shards), strict=True)

    totals = [add_exactly(column) for column in columns("exact_sum")]
    squares = [add_exactly(column) for column in columns("exact_sum_squares")]
    return {
        "count": count,
        "mean": [mean_of(total, count) for total in totals],
        "std": [std_of(t, s, count) for t, s in zip(totals, squares, strict=True)],
        "min": [min(column) for column in columns("min")],
        "max": [max(column) for column in columns("max")],
        "range": shards[0]["range"],
        "histogram": [
            [sum(counts) for counts in zip(*histograms, strict=True)]
            for histograms in columns("histogram")
        ],
    }


# --- exact sums ------------------------------------------------------------------------------

SCALE_BITS = 1074
"""Sums are counted in units of 2**-1074, the smallest float64: every sum is a whole number of
them."""

_DIGITS = 24
"""Bits of a float32's significand."""


def exact_sums(values: NDArray[np.float32]) -> tuple[list[str], list[str]]:
    """Compute sums and sums of squares of each column of finite [N, D]; N below 2**29."""
    fractions, exponents = np.frexp(values.astype(np.float64))
    whole = np.ldexp(fractions, _DIGITS)
    squares = np.square(whole)
    upper = np.floor(np.ldexp(squares, -_DIGITS))
    lower = squares - np.ldexp(upper, _DIGITS)
    lowest = int(exponents.min(initial=0))
    sums, sums_of_squares = [], []
    for column in range(values.shape[1]):
        shifts = exponents[:, column] - lowest
        base = lowest - _DIGITS
        sums.append(_to_hex(_shifted_sum(shifts, whole[:, column], step=1), base))
        # A square has 48 bits; bincount adds in float64, which holds 2**29 numbers of 24.
        high = _shifted_sum(shifts, upper[:, column], step=2)
        low = _shifted_sum(shifts, lower[:, column], step=2)
        sums_of_squares.append(_to_hex((high << _DIGITS) + low, 2 * base))
    return sums, sums_of_squares


def add_exactly(sums: Iterable[str]) -> int:
    """Add sums that :func:`exact_sums` wrote; the result is in units of 2**-SCALE_BITS."""
    return sum(map(_from_hex, sums))


def mean_of(total: int, count: int) -> float:
    """Compute the correctly rounded mean of `count` values whose sum is `total`."""
    return total / (count << SCALE_BITS)


def std_of(total: int, total_of_squares: int, count: int) -> float:
    """Compute the population's standard deviation; nothing cancels, however large the mean."""
    deviations = (count * total_of_squares << SCALE_BITS) - total * total
    return math.sqrt(deviations / (count * count << 2 * SCALE_BITS))


def _shifted_sum(
    shifts: NDArray[np.signedinteger], whole: NDArray[np.float64], *, step: int
) -> int:
    """Add whole * 2**(step * shifts), for shifts from 0."""
    totals: Sequence[float] = np.bincount(shifts, weights=whole).tolist()
    return sum(int(total) << step * shift for shift, total in enumerate(totals))


def _to_hex(total: int, exponent: int) -> str:
    """Format the number total * 2**exponent, in lowest terms."""
    zeros = (total & -total).bit_length() - 1 if total else 0
    return f"{total >> zeros:#x}p{exponent + zeros if total else 0}"


def _from_hex(text: str) -> int:
    digits, _, exponent = text.partition("p")
    return int(digits, 16) << (int(exponent) + SCALE_BITS)
