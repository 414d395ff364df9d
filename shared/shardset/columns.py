"""Write and read a shard's columns: tar files for media, Zarr v3 files for numbers.

A tar column is a legal WebDataset by itself: one member ``SESSION/SEGMENT.<column>.<extension>``
per segment that has the stream, in row order, with fixed owner, mode and time. A Zarr column is a
zip (stored, not deflated) of one Zarr v3 group. Its array has one row per segment and one chunk per
row. The same input gives the same bytes. Both writers return the offset of every member or chunk,
so that a reader needs one ``pread``.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tarfile
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import google_crc32c
import numpy as np

from shared.errors import REBUILD_HINT, CorruptError, ShardError, rebuild_hint_for
from shared.files import sha256_of_file
from shared.kinds.column import MAX_MEMBER_BYTES
from shared.machine import SteadyFile, raise_if_refused
from shared.shardset.index import Members
from shared.timing import OnStage, no_timer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_ZIP_LOCAL_HEADER_BYTES = 30
_MODE = 0o644

_MAX_GAP_BYTES = 64 << 10
"""Largest gap between two members that are read by one request."""

_MAX_SPAN_BYTES = 64 << 20
"""Most bytes of a request for several members."""


class TarColumnWriter:
    """Writes one tar column of a shard of some rows; a context manager that replaces the file."""

    def __init__(self, path: Path, *, num_samples: int) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._members = Members.empty(num_samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()

    def add(self, row: int, name: str, content: bytes) -> None:
        """Append the member of a row, named ``KEY.<column>.<extension>``."""
        member = tarfile.TarInfo(name)
        member.size = len(content)
        member.mode = _MODE
        self._tar.addfile(member, io.BytesIO(content))
        padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._members.record(row, offset=self._tar.offset - padded, content=content)

    def members(self) -> Members:
        """Return offset, length and checksum of each member."""
        return self._members


@dataclass(frozen=True, slots=True, kw_only=True)
class ZarrArray:
    """One array of a Zarr column: values with one row per segment, and their metadata."""

    values: NDArray[Any]
    dimensions: tuple[str, ...]
    fill_value: float | int | bool | str
    """Fill value in the JSON form of Zarr v3; "NaN" for floats."""
    attributes: Mapping[str, Any]


def write_zarr_column(
    path: Path, arrays: Mapping[str, ZarrArray], *, attributes: Mapping[str, Any]
) -> dict[str, Members]:
    """Write arrays with equal numbers of rows as a Zarr v3 group in a zip; one chunk per row.

    This code follows https://zarr-specs.readthedocs.io/en/latest/v3/core/ itself. With a library,
    the bytes would change with its version, and the offsets of the chunks would be unknown.

    Returns:
        Per array, offset, length and checksum of each row's chunk.
    """
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    tables: dict[str, Members] = {}
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add_to_zip(archive, "zarr.json", _json(group))
        for name, array in arrays.items():
            _add_to_zip(archive, f"{name}/zarr.json", _json(_array_metadata(array)))
        for name, array in arrays.items():
            table = tables[name] = Members.empty(len(array.values))
            inner = "/".join("0" for _ in array.values.shape[1:])
            for row, chunk in enumerate(array.values):
                content = np.ascontiguousarray(chunk).tobytes()
                offset = _add_to_zip(archive, f"{name}/c/{row}/{inner}".rstrip("/"), content)
                table.record(row, offset=offset, content=content)
    return tables


@dataclass(slots=True, kw_only=True)
class _Span:
    """A part [start, stop) of a file with the members of some rows."""

    start: int
    stop: int
    rows: list[int]


class ColumnFile:
    """Opens a column for reading members by ``pread``.

    Threads and forked processes can share it, because nothing moves a file position.

    Args:
        path: the file.
        descriptor: file descriptor if the file is already open; this object then closes it.
        origin: name of the file in messages; by default its path.

    Raises:
        ShardError: the file doesn't exist.
        MachineError: the machine can't open it now.
    """

    def __init__(
        self, path: Path, *, descriptor: int | None = None, origin: str | None = None
    ) -> None:
        self.path = path
        self.origin = str(path) if origin is None else origin
        try:
            self._file = SteadyFile(path, descriptor=descriptor)
            self._size = self._file.size()
        except OSError as error:
            raise_if_refused(error, self.origin)
            raise ShardError(
                f"{self.origin}: can't be opened: {error.strerror}; {rebuild_hint_for(self.origin)}"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file; unlike other methods, moves the file position."""
        self._file.seek(0)
        return sha256_of_file(self._file)

    def prefetch(self, members: Members, rows: range) -> None:
        """Ask the kernel to prefetch the members of rows; impossible ones are left to the read."""
        with contextlib.suppress(CorruptError, OSError):
            for span in self._spans(members, rows, max_bytes=MAX_MEMBER_BYTES):
                size = span.stop - span.start
                os.posix_fadvise(self._file.fileno(), span.start, size, os.POSIX_FADV_WILLNEED)

    def read(
        self,
        members: Members,
        row: int,
        *,
        max_bytes: int = MAX_MEMBER_BYTES,
        on_stage: OnStage = no_timer,
    ) -> bytes | None:
        """Read one row's member; see :meth:`read_rows`."""
        rows = range(row, row + 1)
        (content,) = self.read_rows(members, rows, max_bytes=max_bytes, on_stage=on_stage)
        return None if content is None else bytes(content)

    def read_rows(
        self,
        members: Members,
        rows: range,
        *,
        max_bytes: int = MAX_MEMBER_BYTES,
        on_stage: OnStage = no_timer,
    ) -> list[bytes | memoryview | None]:
        """Read the members of consecutive rows and check them; None where a row has no member.

        Members that follow each other in the file are read by one request, with the headers
        between them. A member longer than `max_bytes` is refused without reading it. `on_stage` is
        called when "fetch" and "checksum" end.

        Raises:
            CorruptError: the file or a member is too short, or the bytes of a member differ from
                their checksum; the error has the member's offset.
            MachineError: the machine can't read the file now.
        """
        contents: dict[int, bytes | memoryview] = {}
        for span in self._spans(members, rows, max_bytes=max_bytes):
            whole = self._file.pread(span.stop - span.start, span.start)
            on_stage("fetch")
            view = memoryview(whole)
            for row in span.rows:
                start, length = int(members.offset[row]) - span.start, int(members.length[row])
                member = view[start : start + length]
                if len(member) < length:
                    problem = f"only {len(member)} of {length} bytes exist"
                    raise self._corrupt(members, row, problem)
                contents[row] = whole if len(member) == len(whole) else member
        for row, content in contents.items():
            crc32c = google_crc32c.value(np.frombuffer(content, np.uint8))  # it takes no memoryview
            if crc32c != int(members.crc32c[row]):
                problem = f"checksum is {crc32c:08x}, index says {int(members.crc32c[row]):08x}"
                raise self._corrupt(members, row, problem)
        on_stage("checksum")
        return [contents.get(row) for row in rows]

    def _spans(self, members: Members, rows: range, *, max_bytes: int) -> list[_Span]:
        """Group the members of rows into parts of the file that are read by one request each."""
        spans: list[_Span] = []
        offsets = members.offset[rows.start : rows.stop].tolist()
        lengths = members.length[rows.start : rows.stop].tolist()
        for row, start, length in zip(rows, offsets, lengths, strict=True):
            stop = start + length
            if length == 0:
                continue
            # Refuse impossible lengths before memory is allocated.
            if length > max_bytes:
                problem = f"a member of {length} bytes; the limit is {max_bytes}"
                raise self._corrupt(members, row, problem)
            if stop > self._size:
                problem = f"{length} bytes reach past its end at {self._size}"
                raise self._corrupt(members, row, problem)
            last = spans[-1] if spans else None
            if (
                last is not None
                and 0 <= start - last.stop <= _MAX_GAP_BYTES
                and stop - last.start <= _MAX_SPAN_BYTES
            ):
                last.stop = stop
                last.rows.append(row)
            else:
                spans.append(_Span(start=start, stop=stop, rows=[row]))
        return spans

    def _corrupt(self, members: Members, row: int, problem: str) -> CorruptError:
        """Return the error for the member of a row."""
        offset, hint = int(members.offset[row]), rebuild_hint_for(self.origin)
        message = f"{self.origin} at {offset}: row {row}: {problem}; {hint}"
        return CorruptError(message, offset=offset)


def read_chunk(content: bytes | memoryview, *, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Convert the bytes of a Zarr row chunk to an array.

    Raises:
        CorruptError: the number of bytes is wrong.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    if len(content) != math.prod(shape) * kind.itemsize:
        raise CorruptError(
            f"chunk has {len(content)} bytes, expected {kind.name} {shape}; {REBUILD_HINT}"
        )
    return np.frombuffer(content, dtype=kind).reshape(shape)


def _array_metadata(array: ZarrArray) -> dict[str, Any]:
    """Return Zarr v3 array metadata: one row per chunk, little-endian bytes, no compression."""
    values = array.values
    codec: dict[str, Any] = {"name": "bytes"}
    if values.dtype.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    chunk_shape = [1, *values.shape[1:]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(values.shape),
        "data_type": values.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": array.fill_value,
        "codecs": [codec],
        "dimension_names": list(array.dimensions),
        "attributes": dict(array.attributes),
    }


def _add_to_zip(archive: zipfile.ZipFile, name: str, content: bytes) -> int:
    """Append a stored entry with fixed time and mode; return the offset of its content."""
    entry = zipfile.ZipInfo(name, date_time=_ZIP_TIME)
    entry.external_attr = _MODE << 16
    entry.create_system = 3
    archive.writestr(entry, content)
    return entry.header_offset + _ZIP_LOCAL_HEADER_BYTES + len(name.encode()) + len(entry.extra)


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
