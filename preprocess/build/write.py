"""Write the columns of a shard from encoded rows, and encode rows of sessions.

A reader yields the rows of one session in one column as encoded members: :class:`SessionEncoder`
decodes and encodes a recording, :class:`preprocess.build.reuse_reader.ShardReader` copies the bytes
of finished files. :func:`write_column` takes the rows of all readers one after the other. It notes
where every member is stored and counts the statistics from the members, so that encoded and copied
rows are treated alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from shared.shardset.codec import encode_pictures, encode_text, encode_wav

from preprocess.build import statistics
from shared.errors import MediaError
from shared.recipe import STREAMS, Recipe, Stream
from shared.session.folder import VISION_FILES
from shared.session.reader import MASKED_LEVEL
from shared.shardset.columns import TarColumnWriter, ZarrArray, read_chunk, write_zarr_column
from shared.shardset.layout import COLUMNS, Column, member_name, presence_bits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.build.plan_types import BuiltColumn, Row
    from shared.clock import Segment
    from shared.session.reader import SessionReader
    from shared.shardset.index import Members

DecodeFailure = dict[str, Any]
"""A segment whose stream is recorded but does not decode: session, segment, stream and reason."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row of a column as it is stored."""

    row: Row
    members: Mapping[str, bytes]
    """Member table (see :data:`shared.shardset.index.MEMBER_TABLES`) -> bytes; empty where no
    picture of the segment decodes."""
    error_s: NDArray[np.float32] | None = None
    """Time error of each picture, of a video column; see :class:`shared.session.reader.Frames`."""


class RowReader(Protocol):
    """Reads the rows of one session."""

    def iter_rows(
        self, column: Column, rows: Sequence[Row], failures: list[DecodeFailure]
    ) -> Iterator[EncodedRow]:
        """Yield rows of a column in order; append to `failures` what does not decode."""
        ...


@dataclass(slots=True)
class IndexBuilder:
    """Collects what the index of a shard says of its columns."""

    rows: list[Row]
    recipe: Recipe
    presence: NDArray[np.uint8] = field(init=False)
    """Bits of the streams that are stored, per row."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    columns: dict[str, BuiltColumn] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    decode_failures: list[DecodeFailure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.presence = np.zeros(len(self.rows), dtype=np.uint8)

    def add_members(self, name: str, members: Members) -> None:
        """Note where the members of a column or the chunks of an array are stored."""
        self.arrays[f"{name}.offset"] = members.offset
        self.arrays[f"{name}.length"] = members.length
        self.arrays[f"{name}.crc32c"] = members.crc32c

    def rows_of(self, column: Column) -> dict[str, list[Row]]:
        """List the rows that a column stores, by session."""
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            # Sensor columns store the times of every row.
            if column.name == "proprio" or not set(column.streams).isdisjoint(row.present):
                rows.setdefault(row.session, []).append(row)
        return rows


def row_arrays(rows: Sequence[Row], sessions: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Make the arrays that an index has for its rows, all but "present".

    Args:
        rows: the rows.
        sessions: names of their sessions, as the index lists them.
    """
    position = {name: i for i, name in enumerate(sessions)}
    partial = [
        presence_bits(s for s, share in zip(STREAMS, row.coverage, strict=True) if 0 < share < 1)
        for row in rows
    ]
    coverage = np.array([row.coverage for row in rows], dtype=np.float32)
    return {
        "session": np.array([position[row.session] for row in rows], dtype=np.uint32),
        "segment": np.array([row.segment.index for row in rows], dtype=np.uint32),
        "start_s": np.array([row.segment.start_s for row in rows], dtype=np.float64),
        "stop_s": np.array([row.segment.stop_s for row in rows], dtype=np.float64),
        "partial": np.array(partial, dtype=np.uint8),
        "coverage": coverage.reshape(len(rows), len(STREAMS)),
    }


# --- columns ---------------------------------------------------------------------------------


def write_column(
    builder: IndexBuilder, column: Column, path: Path, encoded: Iterable[EncodedRow]
) -> None:
    """Write a column file.

    Args:
        builder: takes the member tables, presence bits and statistics.
        column: the column.
        path: the file to write.
        encoded: the rows that the column stores, in order.
    """
    write = _write_tar if column.kind == "tar" else _write_zarr
    write(builder, column, path, encoded)


def _write_tar(
    builder: IndexBuilder, column: Column, path: Path, encoded: Iterable[EncodedRow]
) -> None:
    name, recipe = column.name, builder.recipe
    counter = statistics.TAR_COUNTERS.get(name, statistics.NoCounter)()
    if column.streams[0] in VISION_FILES:
        shape = (len(builder.rows), recipe.count(recipe.vision.rate_hz))
        builder.arrays[f"{name}.error_s"] = np.full(shape, np.nan, np.float32)
    with TarColumnWriter(path, num_samples=len(builder.rows)) as writer:
        for item in encoded:
            row = item.row
            if item.error_s is not None:
                builder.arrays[f"{name}.error_s"][row.number] = item.error_s
            if item.members:
                content = item.members[name]
                writer.add(row.number, member_name(row.key, name, recipe), content)
                counter.add(content)
                _mark_present(builder, column, row)
        builder.add_members(name, writer.members())
    if counter.result is not None:
        builder.statistics[name] = counter.result


def _write_zarr(
    builder: IndexBuilder, column: Column, path: Path, encoded: Iterable[EncodedRow]
) -> None:
    arrays = _ZARR_ARRAYS[column.name](len(builder.rows), builder.recipe)
    for item in encoded:
        for table, content in item.members.items():
            values = arrays[table.partition("/")[2]].values
            values[item.row.number] = read_chunk(
                content, dtype=values.dtype.name, shape=values.shape[1:]
            )
        _mark_present(builder, column, item.row)
    attributes = {"keys": [row.key for row in builder.rows]}
    for name, members in write_zarr_column(path, arrays, attributes=attributes).items():
        builder.add_members(f"{column.name}/{name}", members)
    stored = {name: array.values for name, array in arrays.items()}
    builder.statistics[column.name] = statistics.array_statistics(
        column.name, stored, builder.recipe
    )


def _mark_present(builder: IndexBuilder, column: Column, row: Row) -> None:
    """Note that a row stores those streams of a column that it has."""
    builder.presence[row.number] |= presence_bits(set(column.streams) & set(row.present))


def _proprio_arrays(num_rows: int, recipe: Recipe) -> dict[str, ZarrArray]:
    """Make the arrays of the sensor column, all values missing."""
    shape = (num_rows, recipe.count(recipe.sensors.rate_hz))
    return {
        "timestamp": ZarrArray(
            values=np.full(shape, np.nan, np.float64),
            dimensions=("sample", "time"),
            fill_value="NaN",
            attributes={"units": "s", "long_name": "seconds since session start"},
        ),
        "proprio": ZarrArray(
            values=np.full((*shape, recipe.sensors.proprio_size), np.nan, np.float32),
            dimensions=("sample", "time", "joint"),
            fill_value="NaN",
            attributes={"units": "rad (first half), rad s-1 (second half)"},
        ),
        "touch": ZarrArray(
            values=np.full((*shape, recipe.sensors.touch_size), np.nan, np.float32),
            dimensions=("sample", "time", "finger"),
            fill_value="NaN",
            attributes={"units": "1", "valid_range": [0.0, 1.0]},
        ),
        "valid": ZarrArray(
            values=np.zeros(shape, np.bool_),
            dimensions=("sample", "time"),
            fill_value=False,
            attributes={"long_name": "proprio or touch was recorded"},
        ),
    }


def _dmel_arrays(num_rows: int, recipe: Recipe) -> dict[str, ZarrArray]:
    """Make the arrays of the audio tokens, all values masked."""
    shape = (num_rows, recipe.count(recipe.mel.rate_hz))
    return {
        "dmel": ZarrArray(
            values=np.full((*shape, recipe.mel.channels), MASKED_LEVEL, np.uint8),
            dimensions=("sample", "frame", "channel"),
            fill_value=MASKED_LEVEL,
            attributes={"long_name": "dMel level", "missing_value": MASKED_LEVEL},
        ),
        "valid": ZarrArray(
            values=np.zeros(shape, np.bool_),
            dimensions=("sample", "frame"),
            fill_value=False,
            attributes={"long_name": "sound covers the frame"},
        ),
    }


_ZARR_ARRAYS = {"proprio": _proprio_arrays, "dmel": _dmel_arrays}


# --- sessions --------------------------------------------------------------------------------


class SessionEncoder:
    """Reads the rows of a session from its recording and encodes them.

    Args:
        reader: reads the recording.
        decode_context: segments that the pass over a video covers, if the rows are only some of
            them; the pictures get the bits of a pass over all of these segments.
    """

    def __init__(
        self, reader: SessionReader, *, decode_context: Sequence[Segment] | None = None
    ) -> None:
        self._reader = reader
        self._decode_context = decode_context

    def iter_rows(
        self, column: Column, rows: Sequence[Row], failures: list[DecodeFailure]
    ) -> Iterator[EncodedRow]:
        """See :class:`RowReader`."""
        if column.streams[0] in VISION_FILES:
            yield from self._iter_video(column.streams[0], rows, failures)
            return
        encode = _ENCODERS[column.name]
        for row in rows:
            yield EncodedRow(row, encode(self._reader, row))

    def _iter_video(
        self, stream: Stream, rows: Sequence[Row], failures: list[DecodeFailure]
    ) -> Iterator[EncodedRow]:
        """Yield rows with encoded pictures; rows of which no picture decodes become failures."""
        reader, missing = self._reader, {row.segment.index: row for row in rows}
        reason = "no picture of this segment decodes"
        frames_of = reader.iter_frames(
            stream, [row.segment for row in rows], decode_context=self._decode_context
        )
        try:
            for segment, frames in frames_of if rows else ():
                if not np.isfinite(frames.error_s).any():
                    continue
                content = encode_pictures(frames.pictures, recipe=reader.recipe.vision)
                row = missing.pop(segment.index)
                yield EncodedRow(row, {COLUMNS[stream].name: content}, frames.error_s)
        except MediaError as error:
            reason = str(error).replace(f"{reader.path}/", "")
        failures += [
            {
                "session": row.session,
                "segment": row.segment.index,
                "stream": stream,
                "reason": reason,
            }
            for row in missing.values()
        ]


def _encode_audio(reader: SessionReader, row: Row) -> dict[str, bytes]:
    samples = reader.read_audio(row.segment)
    return {"audio": encode_wav(samples, rate_hz=reader.recipe.audio.rate_hz)}


def _encode_text(reader: SessionReader, row: Row) -> dict[str, bytes]:
    return {"text": encode_text(reader.read_text(row.segment))}


def _encode_proprio(reader: SessionReader, row: Row) -> dict[str, bytes]:
    """Encode the sensors; a stream that the row lacks is NaN."""
    sensors = reader.read_sensors(row.segment)
    for stream, values in ((Stream.PROPRIO, sensors.proprio), (Stream.TOUCH, sensors.touch)):
        if stream not in row.present:
            values[...] = np.nan
    return {
        "proprio/timestamp": sensors.timestamp.tobytes(),
        "proprio/proprio": sensors.proprio.tobytes(),
        "proprio/touch": sensors.touch.tobytes(),
        "proprio/valid": sensors.valid.tobytes(),
    }


def _encode_dmel(reader: SessionReader, row: Row) -> dict[str, bytes]:
    mel = reader.read_mel(row.segment)
    return {"dmel/dmel": mel.levels.tobytes(), "dmel/valid": mel.valid.tobytes()}


_ENCODERS = {
    "audio": _encode_audio,
    "text": _encode_text,
    "proprio": _encode_proprio,
    "dmel": _encode_dmel,
}
