"""A shard's columns: deterministic tar files for media, Zarr v3 files for numbers.

A tar column is a legal WebDataset by itself: one member ``SESSION/WINDOW.<field>.<extension>`` per
sample that has the field, in row order, with fixed owner, mode and time. A Zarr column is a zip
(stored, not deflated) of one Zarr v3 group whose arrays have a row per sample and one chunk per
row. Both writers report where every member or chunk lies, so that a reader needs one ``pread``.
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

from shared.errors import CorruptError, ShardError
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
    """Collects offset, length and CRC32C of a column's members, a row per sample.

    Args:
        num_samples: rows; those never recorded stay of length 0, which means absent.
    """

    def __init__(self, num_samples: int) -> None:
        self._offset = np.zeros(num_samples, dtype=np.uint64)
        self._length = np.zeros(num_samples, dtype=np.uint64)
        self._crc32c = np.zeros(num_samples, dtype=np.uint32)

    def record(self, row: int, *, offset: int, content: bytes) -> None:
        """Note where the bytes of a row lie."""
        self._offset[row] = offset
        self._length[row] = len(content)
        self._crc32c[row] = google_crc32c.value(content)

    def members(self) -> Members:
        """The finished table."""
        return Members(offset=self._offset, length=self._length, crc32c=self._crc32c)


class TarColumnWriter:
    """Writes one tar column; use with ``with``.

    Args:
        path: where to; overwritten.
        num_samples: rows of the shard.
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
            row: its sample's row.
            name: member name, ``KEY.<field>.<extension>``.
            content: its bytes.
        """
        member = tarfile.TarInfo(name)
        member.size = len(content)
        member.mode = _MODE
        self._tar.addfile(member, io.BytesIO(content))
        padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._table.record(row, offset=self._tar.offset - padded, content=content)

    def members(self) -> Members:
        """Where the members lie."""
        return self._table.members()


@dataclass(frozen=True, slots=True, kw_only=True)
class ZarrArray:
    """One array of a Zarr column: values with a row per sample, and what they mean."""

    values: NDArray[Any]
    dimensions: tuple[str, ...]
    fill_value: float | int | bool | str
    """As Zarr v3 writes it in JSON; "NaN" for floats."""
    attributes: Mapping[str, Any]


def write_zarr_column(
    path: Path, arrays: Mapping[str, ZarrArray], *, attributes: Mapping[str, Any]
) -> dict[str, Members]:
    """Write arrays with equal numbers of rows as a Zarr v3 group in a zip; one chunk per row.

    The specification is https://zarr-specs.readthedocs.io/en/latest/v3/core/; written here and not
    by a library so that the bytes are the same with every version of it and the place of every
    chunk is known.

    Returns:
        Per array, where its row chunks lie.
    """
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    tables: dict[str, Members] = {}
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add_to_zip(archive, "zarr.json", _json(group))
        for name, array in arrays.items():
            _add_to_zip(archive, f"{name}/zarr.json", _json(_array_metadata(array)))
        for name, array in arrays.items():
            table = MemberTable(len(array.values))
            rest = "/".join("0" for _ in array.values.shape[1:])
            for row, chunk in enumerate(array.values):
                content = np.ascontiguousarray(chunk).tobytes()
                offset = _add_to_zip(archive, f"{name}/c/{row}/{rest}".rstrip("/"), content)
                table.record(row, offset=offset, content=content)
            tables[name] = table.members()
    return tables


class ColumnFile:
    """A column opened for reading single members by ``pread``; safe to share between threads and
    with forked processes: nothing moves a file position.

    Args:
        path: the file.
        descriptor: it is open already, and this one closes it.
        origin: what messages call it; by default its path.

    Raises:
        ShardError: no such file.
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
            raise ShardError(f"{self.origin}: can't be opened: {error.strerror}") from error

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
        """Let the kernel read a row's member in the background; one that can't be read is not."""
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
        """Bytes of a row's member, checked; None where the sample lacks it.

        Args:
            members: where the column's members lie.
            row: which one.
            max_bytes: a longer member is refused unread; see
            :func:`shared.shardset.layout.member_limits`.
            tail: contiguous; the member's last bytes are read straight into it, and only those
                before them are returned.
            on_stage: told when "fetch" and "checksum" are over.

        Raises:
            CorruptError: the file or the member is too short, or the bytes differ from their
                checksum.
        """
        length, offset = int(members.length[row]), int(members.offset[row])
        if length == 0:
            return None
        if length > max_bytes:
            raise CorruptError(
                f"{self.origin} at {offset}: a member of {length} bytes, at most {max_bytes} can be"
            )
        if offset + length > self._size:
            raise CorruptError(
                f"{self.origin} at {offset}: {length} bytes reach past its end at {self._size}"
            )
        if tail is not None and length < tail.nbytes:
            raise CorruptError(
                f"{self.origin} at {offset}: a member of {length} bytes, expected {tail.nbytes}"
            )
        head, count = self._pread(offset, length, tail)
        on_stage("fetch")
        if count != length:
            raise CorruptError(f"{self.origin} at {offset}: {count} of {length} bytes are there")
        found = google_crc32c.value(head)
        if tail is not None:
            found = google_crc32c.extend(found, tail)
        on_stage("checksum")
        if found != int(members.crc32c[row]):
            raise CorruptError(
                f"{self.origin} at {offset}: checksum is {found:08x}, index says "
                f"{int(members.crc32c[row]):08x}; run `python -m preprocess verify`"
            )
        return head

    def _pread(self, offset: int, length: int, tail: NDArray[np.uint8] | None) -> tuple[bytes, int]:
        """The bytes that do not go into `tail`, and how many were read in all."""
        try:
            if tail is None:
                content = os.pread(self._file.fileno(), length, offset)
                return content, len(content)
            head = bytearray(length - tail.nbytes)
            count = os.preadv(self._file.fileno(), [head, tail.data], offset)
            return bytes(head), count
        except OSError as error:
            raise CorruptError(
                f"{self.origin} at {offset}: can't be read: {error.strerror}"
            ) from error


def read_chunk(content: bytes, *, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """A Zarr row chunk as an array.

    Raises:
        CorruptError: another number of bytes.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    if len(content) != math.prod(shape) * kind.itemsize:
        raise CorruptError(f"chunk has {len(content)} bytes, expected {kind.name} {shape}")
    return np.frombuffer(content, dtype=kind).reshape(shape)


def _array_metadata(array: ZarrArray) -> dict[str, Any]:
    """Zarr v3 array metadata: regular grid of one row per chunk, little-endian bytes, no
    compression.
    """
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
    """Append a stored entry with fixed time and mode; returns where its content begins."""
    entry = zipfile.ZipInfo(name, date_time=_ZIP_TIME)
    entry.external_attr = _MODE << 16
    entry.create_system = 3
    archive.writestr(entry, content)
    return entry.header_offset + _ZIP_LOCAL_HEADER_BYTES + len(name.encode()) + len(entry.extra)


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
