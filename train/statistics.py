"""Statistics that standardize sensor values, gathered once when a run begins.

A shard set's manifest has them, exact. Those of a mix are merged by count, and those of sessions
read directly come from one pass over their sensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import Segment
from shared.shardset.layout import training_columns
from shared.streams import Kind
from train.data.mixture import MixedSource
from train.data.session_source import SessionSource
from train.data.shard_source import ShardSource
from train.machine.distributed import on_main
from train.model.multimodal import MultiModalCreature
from train.trained_model import innermost

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from shared.session.reader import SessionReader
    from train.data.batch import SampleSource


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of each value of a sensor over some readings."""

    count: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def standardize(model: nn.Module, loader: object) -> None:
    """Give a model the statistics of a loader's sensors.

    All ranks call it. A loader of other data than a source of this package changes nothing.
    """
    source = _source_of(loader)
    if isinstance(model, MultiModalCreature) and source is not None:
        model.set_statistics(on_main(lambda: sensor_statistics(source)))


def heads_without_target(loader: object) -> list[str]:
    """List the heads of a loader's source whose stream has no sample in all of its data."""
    source = _source_of(loader)
    if source is None:
        return []
    recorded = _recorded_streams(source)
    return [head for head, stream in source.shapes.targets.items() if stream not in recorded]


def _source_of(loader: object) -> MixedSource | ShardSource | SessionSource | None:
    source = getattr(innermost(loader), "source", None)
    return source if isinstance(source, MixedSource | ShardSource | SessionSource) else None


def _recorded_streams(source: SampleSource) -> set[str]:
    """Return the streams of which something was recorded, by what the statistics count."""
    if isinstance(source, MixedSource):
        return set().union(*map(_recorded_streams, source.sources.values()))
    if isinstance(source, ShardSource):
        statistics = source.manifest.statistics
        columns = training_columns(source.recipe).items()
        counted = {name: statistics.get(column.name, {}) for name, column in columns}
        keys = ("count", "levels", "tokens")
        return {n for n, own in counted.items() if any(np.any(own.get(key)) for key in keys)}
    if isinstance(source, SessionSource):
        return source.recorded_streams()
    return set()


def sensor_statistics(source: SampleSource) -> dict[str, dict[str, Any]]:
    """Return "count", "mean" and "std" of the sensor streams that a source reads, by name.

    A stream without a reading is left out.
    """
    merged: dict[str, Moments] = {}
    for name, part in _parts(source, source.shapes.of_kind(Kind.SENSOR)):
        merged[name] = merge(merged[name], part) if name in merged else part
    return {
        name: {
            "count": moments.count,
            "mean": moments.mean.tolist(),
            "std": np.sqrt(moments.variance).tolist(),
        }
        for name, moments in merged.items()
    }


def merge(one: Moments, other: Moments) -> Moments:
    """Merge the statistics of two disjoint parts.

    Source: Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance.
    """
    count = one.count + other.count
    share, change = other.count / count, other.mean - one.mean
    variance = (1 - share) * one.variance + share * other.variance
    variance += share * (1 - share) * change**2
    return Moments(count, one.mean + share * change, variance)


def moments_of(values: NDArray[np.floating[Any]]) -> Moments | None:
    """Return the statistics of the complete rows of [N, D]; None if there is none."""
    rows = values[np.isfinite(values).all(axis=1)].astype(np.float64)
    return Moments(len(rows), rows.mean(axis=0), rows.var(axis=0)) if len(rows) else None


def _parts(source: SampleSource, names: Sequence[str]) -> Iterator[tuple[str, Moments]]:
    """Yield the statistics of each part of a source, with the stream's name."""
    if isinstance(source, MixedSource):
        for each in source.sources.values():
            yield from _parts(each, names)
    elif isinstance(source, ShardSource):
        for name in names:
            stored = source.manifest.statistics.get(name, {})
            if stored.get("count"):
                # Values without statistics, such as quaternions, are null: NaN here.
                mean, std = (np.array(stored[key], dtype=np.float64) for key in ("mean", "std"))
                yield name, Moments(stored["count"], mean, std**2)
    elif isinstance(source, SessionSource):
        shards = {source.shard_name(shard): shard for shard in range(len(source.shard_sizes))}
        for shard in shards.values():
            yield from _session_parts(source.reader(shard), names)


def _session_parts(reader: SessionReader, names: Sequence[str]) -> Iterator[tuple[str, Moments]]:
    """Yield the statistics of each stored segment of a session."""
    recipe, scan = reader.recipe, reader.scan
    for number in scan.stored_segments(recipe):
        for name in set(names) & set(scan.present(number)):
            values = reader.read_sensor(name, Segment(number, recipe.segment_s))
            if (part := moments_of(values)) is not None:
                yield name, part
