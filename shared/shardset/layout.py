"""The columns of a shard set: which files a shard has, and what each depends on.

A column's fingerprint covers what its bytes depend on: the rows, the source files of their
sessions, the settings of its stream, and the version of the code that makes it. The column is
rebuilt only when its fingerprint changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.kinds import audio, sensor, text, video
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shared.kinds.column import Column
    from shared.recipe import Recipe

_COLUMNS_OF_KIND: Mapping[Kind, Callable[..., tuple[Column, ...]]] = {
    Kind.VIDEO: video.columns,
    Kind.AUDIO: audio.columns,
    Kind.SENSOR: sensor.columns,
    Kind.TEXT: text.columns,
}

MAX_RUN_SEGMENTS = 4096
"""Most segments of a session in one shard."""


def columns_of(recipe: Recipe) -> dict[str, Column]:
    """Return every column of a shard set, by name, sorted."""
    columns = [
        column
        for name, spec in recipe.streams.items()
        for column in _COLUMNS_OF_KIND[spec.kind](name, spec, recipe)
    ]
    return {column.name: column for column in sorted(columns, key=lambda column: column.name)}


def training_columns(recipe: Recipe) -> dict[str, Column]:
    """Return the column that training reads of each stream, by the stream's name."""
    columns = columns_of(recipe).values()
    return {column.stream: column for column in columns if column.is_training_input}


def column_basis(column: Column, recipe: Recipe, *, tokenizer_sha256: str) -> dict[str, Any]:
    """Return what a column depends on besides its rows and sources, as flat JSON values."""
    basis = {
        "code_version": column.code_version,
        "segment.duration_s": recipe.segment_s,
        **column.settings,
    }
    if column.uses_tokenizer:
        basis["tokenizer_sha256"] = tokenizer_sha256
    return basis


def field_schema(recipe: Recipe) -> dict[str, Any]:
    """Describe each column for the manifest: stream, kind, dtype, shape of a segment, unit."""
    return {name: column.schema() for name, column in columns_of(recipe).items()}


_BYTES_PER_PIXEL = {"h264": 0.1, "mjpeg": 0.35, "yuv420": 1.5, "raw": 3.0}
"""Bytes of a stored picture per pixel, for packing only."""


def segment_bytes(recipe: Recipe) -> float:
    """Estimate the bytes of a segment that has every stream."""
    total = 0.0
    for column in columns_of(recipe).values():
        if column.kind is Kind.VIDEO:
            spec = recipe.videos[column.stream]
            pixels = recipe.count(spec.rate_hz) * spec.height * spec.width
            total += pixels * _BYTES_PER_PIXEL[spec.codec]
        elif column.kind is not Kind.TEXT:
            total += column.max_bytes
    return max(1.0, total)


def max_run_segments(recipe: Recipe) -> int:
    """Return the most segments of a session in one shard.

    Longer sessions are cut at multiples of this number of segments. It depends on the recipe alone,
    so that packing never changes where windows can begin. It is a power of two, at least the target
    size, so that one more small stream seldom moves the cuts.
    """
    count = int(recipe.shard.target_bytes / segment_bytes(recipe))
    return min(MAX_RUN_SEGMENTS, 1 << max(0, count - 1).bit_length())
