"""Write and read a shard's columns: tar files for media, Zarr v3 files for numbers.

A tar column is a legal WebDataset by itself: one member ``SESSION/WINDOW.<field>.<extension>`` per
sample that has the field, in row order, with fixed owner, mode and time. A Zarr column is a zip
(stored, not deflated) of one Zarr v3 group. Its arrays have one row per sample and one chunk per
row. The same input gives the same bytes. Both writers return the offset of every member or chunk,
so that a reader needs one ``pread``.
"""

from __future__ import annotations

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
from shared.shardset.codec import MAX_MEMBER_BYTES
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


class MemberTable:
    """Collects offset, length and CRC32C of a column's members, one row per sample.

    Args:
        num_samples: number of rows; a row that is never recorded keeps length 0, which means
            absent.
    """

    def __init__(self, num_samples: int) -> None:
        self._offset = np.zeros(num_samples, dtype=np.uint64)
        self._length = np.zeros(num_samples, dtype=np.uint64)
        self._crc32c = np.zeros(num_samples, dtype=np.uint32)

    def record(self, row: int, *, offset: int, content: bytes) -> None:
        """Record the offset, length and checksum of a row's bytes."""
        self._offset[row] = offset
        self._length[row] = len(content)
        self._crc32c[row] = google_crc32c.value(content)

    def members(self) -> Members:
        """Return the finished table."""
        return Members(offset=self._offset, length=self._length, crc32c=self._crc32c)


class TarColumnWriter:
    """Writes one tar column; a context manager.

    Args:
        path: file to write; it is overwritten.
        num_samples: number of rows of the shard.
    """

    def __init__(self, path: Path, *, num_samples: int) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._table = MemberTable(num_samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tar.close()

    def add(self, row: int, name: str, content: bytes) -> None:
        """Append a member.

        Args:
            row: row of its sample.
            name: member name, ``KEY.<field>.<extension>``.
            content: bytes of the member.
        """
        member = tarfile.TarInfo(name)
        member.size = len(content)
        member.mode = _MODE
        self._tar.addfile(member, io.BytesIO(content))
        padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._table.record(row, offset=self._tar.offset - padded, content=content)

    def members(self) -> Members:
        """Return offset, length and checksum of each member."""
        return self._table.members()


@dataclass(frozen=True, slots=True, kw_only=True)
class ZarrArray:
    """One array of a Zarr column: values with one row per sample, and their metadata."""

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
            table = MemberTable(len(array.values))
            inner = "/".join("0" for _ in array.values.shape[1:])
            for row, chunk in enumerate(array.values):
                content = np.ascontiguousarray(chunk).tobytes()
                offset = _add_to_zip(archive, f"{name}/c/{row}/{inner}".rstrip("/"), content)
                table.record(row, offset=offset, content=content)
            tables[name] = table.members()
    return tables


class ColumnFile:
    """Opens a column for reading single members by ``pread``.

    Threads and forked processes can share it, because nothing moves a file position.

    Args:
        path: the file.
        descriptor: file descriptor if the file is already open; this object then closes it.
        origin: name of the file in messages; by default its path.

    Raises:
        ShardError: the file can't be opened.
    """

    def __init__(
        self, path: Path, *, descriptor: int | None = None, origin: str | None = None
    ) -> None:
        self.path = path
        self.origin = str(path) if origin is None else origin
        try:
            self._file: io.FileIO = (
                path.open("rb", buffering=0)
                if descriptor is None
                else os.fdopen(descriptor, "rb", buffering=0)
            )
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
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

    def prefetch(self, members: Members, row: int) -> None:
        """Ask the kernel to prefetch a row's member; an out-of-range member is ignored."""
        length, offset = int(members.length[row]), int(members.offset[row])
        if length > 0 and offset + length <= self._size:
            os.posix_fadvise(self._file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def read(
        self,
        members: Members,
        row: int,
        *,
        max_bytes: int = MAX_MEMBER_BYTES,
        tail: NDArray[np.uint8] | None = None,
        on_stage: OnStage = no_timer,
    ) -> bytes | None:
        """Read the bytes of a row's member and check them; None if the sample has no member.

        Args:
            members: offsets, lengths and checksums of the column's members.
            row: row of the sample.
            max_bytes: a longer member is refused without reading it; see
                :func:`shared.shardset.layout.member_limits`.
            tail: contiguous array; the member's last bytes are read directly into it, and only the
                bytes before them are returned.
            on_stage: called when "fetch" and "checksum" end.

        Raises:
            CorruptError: the file or the member is too short, or the bytes differ from their
                checksum.
        """
        length, offset = int(members.length[row]), int(members.offset[row])
        if length == 0:
            return None
        # Refuse impossible lengths before memory is allocated.
        if length > max_bytes:
            raise CorruptError(
                f"{self.origin} at {offset}: a member of {length} bytes; the limit is {max_bytes}; "
                f"{rebuild_hint_for(self.origin)}"
            )
        if offset + length > self._size:
            raise CorruptError(
                f"{self.origin} at {offset}: {length} bytes reach past its end at {self._size}; "
                f"{rebuild_hint_for(self.origin)}"
            )
        if tail is not None and length < tail.nbytes:
            raise CorruptError(
                f"{self.origin} at {offset}: a member of {length} bytes, expected {tail.nbytes}; "
                f"{rebuild_hint_for(self.origin)}"
            )
        head, count = self._pread(offset, length, tail)
        on_stage("fetch")
        if count != length:
            raise CorruptError(
                f"{self.origin} at {offset}: only {count} of {length} bytes exist; "
                f"{rebuild_hint_for(self.origin)}"
            )
        crc32c = google_crc32c.value(head)
        if tail is not None:
            crc32c = google_crc32c.extend(crc32c, tail)
        on_stage("checksum")
        if crc32c != int(members.crc32c[row]):
            raise CorruptError(
                f"{self.origin} at {offset}: checksum is {crc32c:08x}, index says "
                f"{int(members.crc32c[row]):08x}; {rebuild_hint_for(self.origin)}"
            )
        return head

    def _pread(self, offset: int, length: int, tail: NDArray[np.uint8] | None) -> tuple[bytes, int]:
        """Read a member; return the bytes before `tail` and the number of all bytes read."""
        try:
            if tail is None:
                content = os.pread(self._file.fileno(), length, offset)
                return content, len(content)
            head = bytearray(length - tail.nbytes)
            count = os.preadv(self._file.fileno(), [head, tail.data], offset)
            return bytes(head), count
        except OSError as error:
            raise CorruptError(
                f"{self.origin} at {offset}: can't be read: {error.strerror}; "
                f"{rebuild_hint_for(self.origin)}"
            ) from error


def read_chunk(content: bytes, *, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
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
    is_single_byte = values.dtype.itemsize == 1
    codec: dict[str, Any] = {"name": "bytes"}
    if not is_single_byte:
        codec["configuration"] = {"endian": "little"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(values.shape),
        "data_type": values.dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [1, *values.shape[1:]]},
        },
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
