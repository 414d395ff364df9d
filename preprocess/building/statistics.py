"""Statistics of a shard's columns that merge exactly: sums and counts, never means.

Sums are float64 per shard, and those of the shards are added by math.fsum, so that any number of
workers gives the same manifest.
"""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray


def of_numbers(values: NDArray[np.float32]) -> dict[str, Any]:
    """Count, sums, sums of squares, min and max of each column of [..., D]; rows with NaN don't
    count.
    """
    rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) == 0:
        return {"count": 0}
    return {
        "count": len(rows),
        "sum": rows.sum(axis=0).tolist(),
        "sum_squares": np.square(rows).sum(axis=0).tolist(),
        "min": rows.min(axis=0).tolist(),
        "max": rows.max(axis=0).tolist(),
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


def merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of several shards as those of one set, with mean and std of the numbers."""
    merged: dict[str, Any] = {"num_samples": sum(p["num_samples"] for p in parts)}
    for name in ("proprio", "touch"):
        merged[name] = _merge_numbers([p[name] for p in parts if p[name]["count"]])
    levels = [np.asarray(p["dmel_levels"], dtype=np.int64) for p in parts]
    merged["dmel_levels"] = np.sum(levels, axis=0).tolist() if levels else []
    for name in ("internal_tokens", "external_tokens"):
        columns = zip_longest(*(p[name] for p in parts), fillvalue=0)
        merged[name] = [sum(column) for column in columns]
    return merged


def _merge_numbers(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = sum(p["count"] for p in parts)
    if count == 0:
        return {"count": 0}
    mean = [math.fsum(column) / count for column in zip(*(p["sum"] for p in parts), strict=True)]
    squares = [math.fsum(c) / count for c in zip(*(p["sum_squares"] for p in parts), strict=True)]
    return {
        "count": count,
        "mean": mean,
        "std": [math.sqrt(max(0.0, s - m * m)) for s, m in zip(squares, mean, strict=True)],
        "min": [min(column) for column in zip(*(p["min"] for p in parts), strict=True)],
        "max": [max(column) for column in zip(*(p["max"] for p in parts), strict=True)],
    }
