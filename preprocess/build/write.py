"""Write the columns of a shard from encoded rows, and encode rows of sessions.

A reader yields the rows of one session in one column as encoded members: :class:`SessionEncoder`
decodes and encodes a recording, :class:`preprocess.build.reuse_reader.ShardReader` copies the bytes
of finished files. :func:`write_column` takes the rows of all readers one after the other. It notes
where every member is stored and counts the statistics from the members, so that encoded and copied
rows are treated alike.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from preprocess.build import statistics
from shared.errors import JobError, MediaError
from shared.kinds.audio import encode_wav
from shared.kinds.text import encode_text
from shared.kinds.video import encode_pictures
from shared.shardset.columns import TarColumnWriter, ZarrArray, read_chunk, write_zarr_column
from shared.shardset.index import FLAG_BITS, MASK_BITS, ShardIndex
from shared.streams import Kind, MaskReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.build.plan_types import BuiltColumn, Row
    from shared.clock import Segment
    from shared.kinds.column import Column
    from shared.kinds.video import Frames
    from shared.recipe import Recipe
    from shared.session.reader import SessionReader
    from shared.shardset.index import Members

DecodeFailure = dict[str, Any]
"""A segment whose stream is recorded but does not decode: session, segment, stream and reason. If
only some of its pictures don't, start_s and stop_s say where."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row of a column as it is stored."""

    row: Row
    content: bytes | None
    """Bytes of the member; None where no picture of the segment decodes."""
    error_s: NDArray[np.float32] | None = None
    """Time error of each picture, of a video column; see :class:`shared.kinds.video.Frames`."""
    flags: int = 0
    """Bits of the index's flags that become known while the row is read."""


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
    durations_s: Mapping[str, float]
    """Length of each session of the shard, in order of the rows."""
    verdicts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Session -> stream -> bits of the verdict."""
    presence: NDArray[np.uint8] = field(init=False)
    """Whether each declared stream is stored, per row."""
    flags: NDArray[np.uint8] = field(init=False)
    """Why content of each declared stream is masked, per row."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    columns: dict[str, BuiltColumn] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    decode_failures: list[DecodeFailure] = field(default_factory=list)
    _streams: dict[str, int] = field(init=False)
    """Position of each stream in `presence`."""

    def __post_init__(self) -> None:
        self._streams = {name: number for number, name in enumerate(self.recipe.streams)}
        self.presence = np.zeros((len(self.rows), len(self._streams)), dtype=np.uint8)
        self.flags = np.zeros_like(self.presence)
        for row in self.rows:
            self.flags[row.number, : len(row.flags)] = row.flags
            for stream, bits in self.verdicts.get(row.session, {}).items():
                self.flags[row.number, self._streams[stream]] |= bits

    def mark_present(self, stream: str, rows: Any) -> None:  # noqa: ANN401 (any NumPy index)
        """Note that rows store a stream."""
        self.presence[rows, self._streams[stream]] = 1

    def add_flags(self, stream: str, rows: Any, bits: Any) -> None:  # noqa: ANN401
        """Note why content of a stream is masked in rows; bits of old verdicts are left out."""
        self.flags[rows, self._streams[stream]] |= bits & MASK_BITS

    def add_members(self, column: Column, members: Members) -> None:
        """Note where the members of a column are stored."""
        self.arrays[f"{column.name}.offset"] = members.offset
        self.arrays[f"{column.name}.length"] = members.length
        self.arrays[f"{column.name}.crc32c"] = members.crc32c

    def rows_of(self, column: Column) -> dict[str, list[Row]]:
        """List the rows that a column stores, by session."""
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            if column.stream in row.present:
                rows.setdefault(row.session, []).append(row)
        return rows

    def index(self, *, name: str, split: str) -> ShardIndex:
        """Make the index."""
        sessions = {session: number for number, session in enumerate(self.durations_s)}
        coverage = np.array([row.coverage for row in self.rows], dtype=np.float32)
        arrays: dict[str, NDArray[Any]] = {
            "session": np.array([sessions[row.session] for row in self.rows], dtype=np.uint32),
            "segment": np.array([row.segment.index for row in self.rows], dtype=np.uint32),
            "present": self.presence,
            "coverage": coverage.reshape(self.presence.shape),
            **({"flags": self.flags} if self.flags.any() else {}),
            **self.arrays,
        }
        header = {
            "name": name,
            "split": split,
            "streams": list(self._streams),
            "videos": list(self.recipe.of_kind(Kind.VIDEO)),
            "sessions": list(sessions),
            "durations_s": list(self.durations_s.values()),
            "segment_s": self.recipe.segment_s,
            "columns": {column: asdict(built) for column, built in self.columns.items()},
            "statistics": self.statistics,
            "decode_failures": self.decode_failures,
        }
        return ShardIndex(header=header, arrays=arrays)


def write_column(
    builder: IndexBuilder, column: Column, path: Path, encoded: Iterable[EncodedRow]
) -> None:
    """Write a column file of the rows in order; the builder takes members, presence, statistics."""
    values = {"tar": _write_tar, "zarr": _write_zarr}[column.container](
        builder, column, path, encoded
    )
    if (summary := statistics.summarize(column, values, builder.recipe)) is not None:
        builder.statistics[column.name] = summary


def _write_tar(
    builder: IndexBuilder, column: Column, path: Path, encoded: Iterable[EncodedRow]
) -> list[Any]:
    """Write a tar column; return what its statistics take of each member.

    Raises:
        JobError: a member is too large to be read again.
    """
    measure, measured = statistics.MEASURES.get(column.kind), []
    if column.has_time_errors:
        shape = (len(builder.rows), column.shape[0])
        builder.arrays[f"{column.name}.error_s"] = np.full(shape, np.nan, np.float32)
    with TarColumnWriter(path, num_samples=len(builder.rows)) as writer:
        for item in encoded:
            number = item.row.number
            builder.add_flags(column.stream, number, item.flags)
            if item.error_s is not None:
                builder.arrays[f"{column.name}.error_s"][number] = item.error_s
            if item.content is not None:
                if len(item.content) > column.max_bytes:
                    raise JobError(
                        f"{column.member_name(item.row.key)} has {len(item.content)} bytes, but "
                        f"readers accept {column.max_bytes}; fix: lower segment.duration_s"
                    )
                writer.add(number, column.member_name(item.row.key), item.content)
                builder.mark_present(column.stream, number)
                if measure is not None:
                    measured.append(measure(item.content))
        builder.add_members(column, writer.members())
    return measured


def _write_zarr(
    builder: IndexBuilder, column: Column, path: Path, encoded: Iterable[EncodedRow]
) -> NDArray[Any]:
    """Write a Zarr column; return its values."""
    shape = (len(builder.rows), *column.shape)
    values = np.full(shape, float(column.fill_value), dtype=column.dtype)
    for item in encoded:
        builder.add_flags(column.stream, item.row.number, item.flags)
        if item.content is not None:
            number = item.row.number
            values[number] = read_chunk(item.content, dtype=column.dtype, shape=column.shape)
            builder.mark_present(column.stream, number)
    array = ZarrArray(
        values=values,
        dimensions=column.dimensions,
        fill_value=column.fill_value,
        attributes=column.attributes,
    )
    keys = {"keys": [row.key for row in builder.rows]}
    members = write_zarr_column(path, {column.array: array}, attributes=keys)
    builder.add_members(column, members[column.array])
    return values


@dataclass(frozen=True, slots=True)
class SessionEncoder:
    """Reads the rows of a session from its recording and encodes them.

    If the rows are only some of those of a pass over a video, `decode_context` has all segments of
    the pass; the pictures get the bits of the whole pass.
    """

    reader: SessionReader
    decode_context: Sequence[Segment] | None = None

    def iter_rows(
        self, column: Column, rows: Sequence[Row], failures: list[DecodeFailure]
    ) -> Iterator[EncodedRow]:
        """See :class:`RowReader`."""
        if column.kind is Kind.VIDEO:
            yield from self._iter_video(column.stream, rows, failures)
            return
        encode = _ENCODERS[column.kind, column.container]
        for row in rows:
            yield EncodedRow(row, encode(self.reader, column.stream, row.segment))

    def _iter_video(
        self, stream: str, rows: Sequence[Row], failures: list[DecodeFailure]
    ) -> Iterator[EncodedRow]:
        """Yield rows with encoded pictures; pictures that don't decode become failures."""
        reader, missing = self.reader, {row.segment.index: row for row in rows}
        spec = reader.recipe.videos[stream]
        reason, lost = "no picture of this segment decodes", FLAG_BITS[MaskReason.DAMAGED]
        segments = [row.segment for row in rows]
        own: list[DecodeFailure] = []
        try:
            for segment, frames in (
                reader.iter_frames(stream, segments, decode_context=self.decode_context)
                if rows
                else ()
            ):
                if np.isfinite(frames.error_s).any():
                    row, flags = missing.pop(segment.index), 0
                    content = encode_pictures(frames.pictures, spec=spec)
                    if frames.damaged.any():
                        own.append(_partial_failure(row, stream, frames, spec.rate_hz))
                        flags = lost
                    yield EncodedRow(row, content, frames.error_s, flags)
        except MediaError as error:
            reason, lost = str(error).replace(f"{reader.path}/", ""), 0
        for number, row in missing.items():
            own.append(
                {"session": row.session, "segment": number, "stream": stream, "reason": reason}
            )
            yield EncodedRow(row, None, None, lost)
        # In the order of segments, however the session was divided.
        failures += sorted(own, key=lambda failure: int(failure["segment"]))


def _partial_failure(row: Row, stream: str, frames: Frames, rate_hz: float) -> DecodeFailure:
    """Describe the damaged pictures of a segment that has others."""
    grid_s = row.segment.grid(rate_hz)[frames.damaged]
    count = f"{len(grid_s)} of {len(frames.damaged)} pictures"
    return {
        "session": row.session,
        "segment": row.segment.index,
        "stream": stream,
        "start_s": float(grid_s[0]),
        "stop_s": float(grid_s[-1]) + 1 / rate_hz,
        "reason": f"{count} do not decode or follow damage",
    }


def _encode_audio(reader: SessionReader, stream: str, segment: Segment) -> bytes:
    rate_hz = reader.recipe.audios[stream].rate_hz
    return encode_wav(reader.read_audio(stream, segment), rate_hz=rate_hz)


_ENCODERS: Mapping[tuple[Kind, str], Callable[[SessionReader, str, Segment], bytes]] = {
    (Kind.AUDIO, "tar"): _encode_audio,
    (Kind.AUDIO, "zarr"): lambda reader, *segment: reader.read_dmel(*segment).tobytes(),
    (Kind.SENSOR, "zarr"): lambda reader, *segment: reader.read_sensor(*segment).tobytes(),
    (Kind.TEXT, "tar"): lambda reader, *segment: encode_text(reader.read_text(*segment)),
}
"""How a segment is encoded, by kind of the stream and container of the column."""
