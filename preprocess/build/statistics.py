"""Statistics of columns that merge exactly: counts and exact sums, never means.

Any packing of the same samples into shards, any number of workers, and an update as well as a fresh
build give the same manifest.

Sums of float32 values and of their squares are exact. A float32 is m * 2**e with an integer
|m| < 2**24. Values of the same e are added as integers, then all e as one unbounded integer. A sum
is written as C writes floats in base 16: ``0x2b3c4p-31`` is 0x2b3c4 * 2**-31.

What is counted depends on the kind of a column's stream; see :data:`_SUMMARIES`. The lists of a
sensor have one entry per value, which is null for the values of quaternions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import ShardError
from shared.kinds.audio import MASKED_LEVEL, decode_wav
from shared.streams import Kind, ValueType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from shared.kinds.column import Column
    from shared.recipe import Recipe
    from shared.streams import AudioStream, SensorStream, StreamSpec

LINEAR = "linear"
SIGNED_LOG = "signed_log"


@dataclass(frozen=True, slots=True)
class Axis:
    """Bins between increasing edges, and one bin on each side for values beyond.

    The bins never depend on the values, so histograms of shards can be added.
    """

    edges: tuple[float, ...]
    scale: str = LINEAR

    @classmethod
    def linear(cls, low: float, high: float, num_bins: int) -> Axis:
        """Make equal bins over [low, high]."""
        steps = np.arange(num_bins) / num_bins
        return cls((*(low + (high - low) * steps).tolist(), float(high)))

    @property
    def range(self) -> list[float]:
        """Lowest and highest edge."""
        return [self.edges[0], self.edges[-1]]

    def count(self, values: NDArray[np.floating[Any]]) -> list[int]:
        """Count values per bin: below low, the bins, above high; the last bin includes high."""
        edges = np.array(self.edges)
        edges[-1] = np.nextafter(edges[-1], np.inf)
        bins = np.searchsorted(edges, values.astype(np.float64), side="right")
        return [int(n) for n in np.bincount(bins, minlength=len(edges) + 1)]


_PI = float(np.float32(math.pi))
"""The largest angle that is stored; slightly above pi."""

_STEPS = [float(f"{digit}e{power}") for power in range(-4, 4) for digit in (1, 2, 5)]

LOG = Axis((-1e4, *(-step for step in reversed(_STEPS)), *_STEPS, 1e4), SIGNED_LOG)
"""Three bins per decade from 1e-4 to 1e4, with edges at 1, 2 and 5, on both sides of a bin around
zero."""

LEVEL = Axis.linear(-100.0, 0.0, 50)
"""dBFS."""

AXES: Mapping[ValueType, Axis | None] = {
    ValueType.SCALAR: LOG,
    ValueType.FRACTION: Axis.linear(0.0, 1.0, 50),
    ValueType.ANGLE: Axis.linear(-_PI, _PI, 36),
    ValueType.VELOCITY: Axis.linear(-20.0, 20.0, 40),
    ValueType.POSITION: LOG,
    ValueType.QUATERNION: None,
    ValueType.DIRECTION: Axis.linear(-1.0, 1.0, 40),
}
"""Bins of each type of values. 20 rad/s are three turns a second, faster than a wrist."""

_EXPECTED_BINS = 50
"""Bins of values whose range the recipe expects."""

FULL_SCALE = 2**15


def sensor_axes(spec: SensorStream) -> list[Axis | None]:
    """Return the bins of each value of a sensor; None for values without statistics.

    ``expect.range`` replaces bins that would not fit every sensor.
    """
    expected = spec.expect.range
    own = None if expected is None else Axis.linear(*expected, _EXPECTED_BINS)
    axes = {type_: own or axis if axis is LOG else axis for type_, axis in AXES.items()}
    return [axes[group.type] for group in spec.values for _ in range(group.count)]


def level_db(member: bytes) -> float:
    """Compute the RMS of a segment's sound in dB of full scale, at least -100 (silence)."""
    samples = decode_wav(member)
    wide = samples.astype(np.int64)
    energy = int(np.dot(wide, wide))
    if energy == 0:
        return LEVEL.edges[0]
    return max(LEVEL.edges[0], 10 * math.log10(energy / (len(samples) * FULL_SCALE**2)))


MEASURES: Mapping[Kind, Callable[[bytes], Any]] = {
    Kind.AUDIO: level_db,
    Kind.TEXT: lambda member: json.loads(member)["ids"],
}
"""What the statistics of a tar column take of each member."""


def summarize(column: Column, values: Any, recipe: Recipe) -> dict[str, Any] | None:  # noqa: ANN401
    """Compute the statistics of a column of a shard; None if it has none.

    `values` is the array of a Zarr column, or what MEASURES takes of each member of a tar column.
    """
    summarize_kind, _ = _SUMMARIES.get((column.kind, column.container), (None, None))
    return summarize_kind and summarize_kind(values, recipe.streams[column.stream])


def has_bins(summary: Mapping[str, Any] | None, column: Column, recipe: Recipe) -> bool:
    """Return whether statistics of a column have the bins that :func:`summarize` would use."""
    if column.kind is not Kind.SENSOR or not summary or not summary["count"]:
        return True
    axes = sensor_axes(recipe.sensors[column.stream])
    bins = [(axis and axis.range, axis and axis.scale) for axis in axes]
    return bins == list(zip(summary["range"], summary["scale"], strict=True))


def number_statistics(values: NDArray[np.float32], axes: Sequence[Axis | None]) -> dict[str, Any]:
    """Compute count, sums, sums of squares, min, max and histogram of each column of [..., D].

    Rows with NaN are skipped, and columns without bins left out.
    """
    rows = values.reshape(-1, values.shape[-1])
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) == 0:
        return {"count": 0}
    columns = [
        None if axis is None else _column_statistics(np.ascontiguousarray(column), axis)
        for axis, column in zip(axes, rows.T, strict=True)
    ]
    return {"count": len(rows)} | {
        name: [None if column is None else column[name] for column in columns] for name in _NUMBERS
    }


_NUMBERS = ("exact_sum", "exact_sum_squares", "min", "max", "range", "scale", "histogram")


def _column_statistics(values: NDArray[np.float32], axis: Axis) -> dict[str, Any]:
    total, total_of_squares = exact_sums(values)
    return {
        "exact_sum": total,
        "exact_sum_squares": total_of_squares,
        # Adding 0.0 turns -0.0 into 0.0, whose choice would depend on the order of values.
        "min": float(values.min()) + 0.0,
        "max": float(values.max()) + 0.0,
        "range": axis.range,
        "scale": axis.scale,
        "histogram": axis.count(values),
    }


def _sound_statistics(levels_db: Sequence[float], _spec: StreamSpec) -> dict[str, Any]:
    levels = np.array(levels_db, dtype=np.float32).reshape(-1, 1)
    return {"level": number_statistics(levels, [LEVEL])}


def _dmel_statistics(values: NDArray[np.uint8], spec: AudioStream) -> dict[str, Any]:
    """Count each dMel level in each channel of the frames that are not masked."""
    frames = values.reshape(-1, values.shape[-1])
    frames = frames[(frames != MASKED_LEVEL).all(axis=1)]
    num_levels = spec.dmel.levels
    return {"levels": [np.bincount(c, minlength=num_levels).tolist() for c in frames.T]}


def _token_statistics(ids: Iterable[Sequence[int]], _spec: StreamSpec) -> dict[str, Any]:
    """Count each token, up to the largest that occurs."""
    tokens = np.fromiter((i for member in ids for i in member), dtype=np.int64)
    return {"tokens": np.bincount(tokens).tolist()}


def merge(
    shards: Sequence[Mapping[str, Any]], columns: Iterable[Column], *, num_samples: int
) -> dict[str, Any]:
    """Merge the statistics of shards into those of a set, with mean and std of the numbers.

    Raises:
        ShardError: a shard lacks some.
    """
    merged: dict[str, Any] = {"num_samples": num_samples}
    for column in columns:
        _, merge_kind = _SUMMARIES.get((column.kind, column.container), (None, None))
        if merge_kind is None:
            continue
        try:
            merged[column.name] = merge_kind([shard[column.name] for shard in shards])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ShardError(
                f"statistics of {column.name}: an index of the set lacks them or has others: "
                f"{error!r}; fix: remove the folder of the set or choose another one, and build "
                "the set again"
            ) from error
    return merged


def merge_numbers(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the results of :func:`number_statistics`."""
    shards = [shard for shard in shards if shard["count"]]
    count = sum(shard["count"] for shard in shards)
    if count == 0:
        return {"count": 0}
    columns = [
        [{name: shard[name][number] for name in _NUMBERS} for shard in shards]
        for number in range(len(shards[0]["scale"]))
    ]
    values = [
        None if parts[0]["scale"] is None else _merge_column(parts, count) for parts in columns
    ]
    names = ("mean", "std", "min", "max", "range", "scale", "histogram")
    return {"count": count} | {
        name: [None if value is None else value[name] for value in values] for name in names
    }


def _merge_column(parts: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    total = add_exactly(part["exact_sum"] for part in parts)
    squares = add_exactly(part["exact_sum_squares"] for part in parts)
    deviations = (count * squares << SCALE_BITS) - total * total
    axes = {(*part["range"], part["scale"], len(part["histogram"])) for part in parts}
    if len(axes) != 1:
        raise ValueError(f"histograms over {sorted(axes)}")
    return {
        "mean": total / (count << SCALE_BITS),  # correctly rounded
        # Of the population; nothing cancels, however large the mean.
        "std": math.sqrt(deviations / (count * count << 2 * SCALE_BITS)),
        "min": min(part["min"] for part in parts),
        "max": max(part["max"] for part in parts),
        "range": parts[0]["range"],
        "scale": parts[0]["scale"],
        "histogram": [sum(bins) for bins in zip(*(p["histogram"] for p in parts), strict=True)],
    }


def _merge_dmel(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    levels = [np.asarray(shard["levels"], dtype=np.int64) for shard in shards]
    return {"levels": np.sum(levels, axis=0).tolist() if levels else []}


def _merge_tokens(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = zip_longest(*(shard["tokens"] for shard in shards), fillvalue=0)
    return {"tokens": [sum(count) for count in counts]}


_Summary = tuple["Callable[..., dict[str, Any]]", "Callable[..., dict[str, Any]]"]

_SUMMARIES: Mapping[tuple[Kind, str], _Summary] = {
    (Kind.SENSOR, "zarr"): (
        lambda values, spec: number_statistics(values, sensor_axes(spec)),
        merge_numbers,
    ),
    (Kind.AUDIO, "tar"): (
        _sound_statistics,
        lambda shards: {"level": merge_numbers([shard["level"] for shard in shards])},
    ),
    (Kind.AUDIO, "zarr"): (_dmel_statistics, _merge_dmel),
    (Kind.TEXT, "tar"): (_token_statistics, _merge_tokens),
}
"""How the statistics of a column are computed in a shard and merged, by kind and container."""


SCALE_BITS = 1074
"""Sums are counted in units of 2**-1074, the smallest float64: every sum is a whole number of
them."""

_DIGITS = 24
"""Bits of a float32's significand."""


def exact_sums(values: NDArray[np.float32]) -> tuple[str, str]:
    """Compute the sum and the sum of squares of finite [N]; N below 2**29."""
    fractions, exponents = np.frexp(values.astype(np.float64))
    whole = np.ldexp(fractions, _DIGITS)
    squares = np.square(whole)
    upper = np.floor(np.ldexp(squares, -_DIGITS))
    lower = squares - np.ldexp(upper, _DIGITS)
    lowest = int(exponents.min(initial=0))
    shifts, base = exponents - lowest, lowest - _DIGITS
    # A square has 48 bits; bincount adds in float64, which holds 2**29 numbers of 24.
    high = _shifted_sum(shifts, upper, step=2)
    low = _shifted_sum(shifts, lower, step=2)
    total = _shifted_sum(shifts, whole, step=1)
    return _to_hex(total, base), _to_hex((high << _DIGITS) + low, 2 * base)


def add_exactly(sums: Iterable[str]) -> int:
    """Add sums that :func:`exact_sums` wrote; the result is in units of 2**-SCALE_BITS."""
    return sum(map(_from_hex, sums))


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
