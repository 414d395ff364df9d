"""Write and read the index of a shard: its samples and the offsets of their bytes.

The index is read into memory, not mapped: all of its bytes are hashed anyway, and a mapped file
that is truncated kills its readers with SIGBUS.

Layout, little-endian: 8 bytes magic, uint32 version, uint32 header length, header (UTF-8 JSON),
then arrays, each at a multiple of 64 bytes. Under "arrays", the header maps each name to
[dtype, shape, offset]. docs/format.md is the specification.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import CorruptError, FormatVersionError, ShardError, rebuild_hint_for
from shared.files import sha256_of_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

MAGIC = b"VRCINDEX"
INDEX_VERSION = 2
"""The only version that is read; manifests of its format name only such indexes."""

_ALIGNMENT = 64
_PREFIX = struct.Struct("<8sII")
_DTYPES = {"u1", "u4", "u8", "f4", "f8"}

MEMBER_TABLES = {
    "vision_left": ("vision_left",),
    "vision_right": ("vision_right",),
    "audio": ("audio",),
    "text": ("text",),
    "proprio": ("proprio/timestamp", "proprio/proprio", "proprio/touch", "proprio/valid"),
    "dmel": ("dmel/dmel", "dmel/valid"),
}
"""Member tables of each column: one of a tar column, one per array of a Zarr column."""

_Form = tuple[str, tuple[int | None, ...]]
"""Dtype of an array and the shape of one row; None is a width that the recipe decides."""

_MEMBER_FORMS: dict[str, _Form] = {"offset": ("u8", ()), "length": ("u8", ()), "crc32c": ("u4", ())}

_ROW_FORMS: dict[str, _Form] = {
    "session": ("u4", ()),
    "window": ("u4", ()),
    "start_s": ("f8", ()),
    "stop_s": ("f8", ()),
    "present": ("u1", ()),
    "partial": ("u1", ()),
    "coverage": ("f4", (7,)),
}
"""Arrays that every index has."""

_COLUMN_FORMS: dict[str, dict[str, _Form]] = {
    column: {
        **{f"{t}.{name}": form for t in tables for name, form in _MEMBER_FORMS.items()},
        **({f"{column}.error_s": ("f4", (None,))} if column.startswith("vision") else {}),
    }
    for column, tables in MEMBER_TABLES.items()
}
"""Arrays that an index has for each of its columns."""
_MAX_HEADER_BYTES = 64 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
_PARSE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""Errors that reading damaged JSON values can raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Positions of one tar column's members or one Zarr array's chunks, one row per sample.

    offset uint64 [N], length uint64 [N] (0 if the sample has no member), crc32c uint32 [N] of the
    bytes.
    """

    offset: NDArray[np.uint64]
    length: NDArray[np.uint64]
    crc32c: NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """A shard's index; its arrays have one row per sample."""

    header: Mapping[str, Any]
    """Plain JSON: shard name, sessions, columns (file, size, checksum, fingerprint), statistics."""
    arrays: Mapping[str, NDArray[Any]]

    @property
    def num_samples(self) -> int:
        """Number of rows of the shard."""
        return len(self.arrays["window"])

    @property
    def sessions(self) -> list[str]:
        """Names of the sessions whose windows are rows of the shard."""
        sessions: list[str] = self.header["sessions"]
        return sessions

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """Header entry of each column: its file, size, checksum and fingerprint."""
        columns: dict[str, dict[str, Any]] = self.header["columns"]
        return columns

    @property
    def decode_failures(self) -> list[dict[str, Any]]:
        """Streams of samples that did not decode: session, window, stream and reason."""
        failures: list[dict[str, Any]] = self.header["losses"]
        return failures

    def key(self, row: int) -> str:
        """Return the key of a row, SESSION/WINDOW."""
        session = self.sessions[int(self.arrays["session"][row])]
        return f"{session}/{int(self.arrays['window'][row]):06d}"

    def members(self, name: str) -> Members:
        """Return the positions of a table's members, such as ``audio`` or ``proprio/touch``."""
        return Members(
            offset=self.arrays[f"{name}.offset"],
            length=self.arrays[f"{name}.length"],
            crc32c=self.arrays[f"{name}.crc32c"],
        )


def index_bytes(index: ShardIndex) -> bytes:
    """Encode an index; the same index gives the same bytes."""
    layout: dict[str, list[Any]] = {}
    names = sorted(index.arrays)
    # The header contains the offsets, so its own length must not change them: they count from the
    # first array.
    position = 0
    for name in names:
        array = index.arrays[name]
        layout[name] = [array.dtype.str[1:], list(array.shape), position]
        position = _aligned(position + array.nbytes)
    header = json.dumps(
        {**index.header, "arrays": layout},
        sort_keys=True,
        ensure_ascii=False,
        separators=(",", ":"),
    ).encode()
    start = _aligned(_PREFIX.size + len(header))
    out = bytearray(start + position)
    _PREFIX.pack_into(out, 0, MAGIC, INDEX_VERSION, len(header))
    out[_PREFIX.size : _PREFIX.size + len(header)] = header
    for name in names:
        array = index.arrays[name]
        offset = start + layout[name][2]
        out[offset : offset + array.nbytes] = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return bytes(out)


def open_index(path: Path, *, sha256: str | None = None) -> ShardIndex:
    """Read an index.

    Args:
        path: the file.
        sha256: see :func:`parse_index`.

    Raises:
        ShardError: the file doesn't exist.
        CorruptError, FormatVersionError: see :func:`parse_index`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such index; {rebuild_hint_for(path)}") from error
    except OSError as error:
        raise CorruptError(f"{path}: can't be read: {error}; {rebuild_hint_for(path)}") from error
    return parse_index(content, origin=str(path), sha256=sha256)


def parse_index(content: bytes, *, origin: str, sha256: str | None = None) -> ShardIndex:
    """Parse the bytes of an index; its arrays are read-only views of them.

    Args:
        content: bytes of the file.
        origin: name of the file, for messages.
        sha256: checksum from the manifest, to be checked.

    Raises:
        CorruptError: the bytes differ from the checksum or are damaged.
        FormatVersionError: the index has another version.
    """
    if sha256 is not None and sha256_of_bytes(content) != sha256:
        raise CorruptError(
            f"{origin}: checksum differs from the manifest; {rebuild_hint_for(origin)}"
        )
    if len(content) < _PREFIX.size:
        raise CorruptError(
            f"{origin}: {len(content)} bytes are not an index; {rebuild_hint_for(origin)}"
        )
    magic, version, header_length = _PREFIX.unpack_from(content)
    if magic != MAGIC:
        raise CorruptError(f"{origin}: not a shard index; {rebuild_hint_for(origin)}")
    if version != INDEX_VERSION:
        relation = "newer" if version > INDEX_VERSION else "older"
        raise FormatVersionError(
            f"{origin}: index version {version} is {relation} than {INDEX_VERSION}, the only one "
            "that this program reads; fix: "
            + ("update the program" if version > INDEX_VERSION else "build the set again")
        )
    if header_length > min(_MAX_HEADER_BYTES, len(content) - _PREFIX.size):
        raise CorruptError(
            f"{origin}: its header extends beyond the end of the file; {rebuild_hint_for(origin)}"
        )
    body = np.frombuffer(content, dtype=np.uint8)[_aligned(_PREFIX.size + header_length) :]
    try:
        header = json.loads(content[_PREFIX.size : _PREFIX.size + header_length])
        layout = header.pop("arrays")
        arrays = {name: _array(body, *entry) for name, entry in layout.items()}
        _require_whole(header, arrays)
    except _PARSE_ERRORS as error:
        raise CorruptError(
            f"{origin}: its header is damaged: {type(error).__name__}: {error}; "
            f"{rebuild_hint_for(origin)}"
        ) from error
    return ShardIndex(header=header, arrays=arrays)


def require_complete(index: ShardIndex, *, origin: str) -> None:
    """Check that an index has every column, as the indexes of a finished set do.

    Raises:
        CorruptError: a column is missing.
    """
    if missing := [name for name in MEMBER_TABLES if name not in index.columns]:
        raise CorruptError(
            f"{origin}: lacks the column {', '.join(missing)}; {rebuild_hint_for(origin)}"
        )


def _array(body: NDArray[np.uint8], dtype: str, shape: list[int], offset: int) -> NDArray[Any]:
    """Return a view of one array at an offset in `body`."""
    if dtype not in _DTYPES or any(type(n) is not int or n < 0 for n in (*shape, offset)):
        raise ValueError(f"an array of {dtype!r} {shape} at {offset}")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if offset + size > len(body):
        raise ValueError("an array extends beyond the end of the file")
    return body[offset : offset + size].view(f"<{dtype}").reshape(shape)


def _require_whole(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check that header and arrays are complete and agree.

    Raises:
        ValueError: an array is missing or has another form, numbers of rows differ, a row has no
            session or time, or a column's file name is a path.
    """
    columns = header["columns"]
    # Every required array has its dtype and shape.
    forms = dict(_ROW_FORMS)
    for name in columns:
        forms |= _COLUMN_FORMS.get(name, {})
    for name, (dtype, row_shape) in forms.items():
        if name not in arrays:
            raise ValueError(f"lacks the array {name}")
        array = arrays[name]
        has_shape = len(array.shape) == 1 + len(row_shape) and all(
            wanted in (None, width)
            for wanted, width in zip(row_shape, array.shape[1:], strict=True)
        )
        if array.dtype.str[1:] != dtype or not has_shape:
            raise ValueError(f"{name} is {array.dtype.str[1:]} {list(array.shape)}")
    # All arrays have the same rows, and every row has a session and a finite time.
    num_rows = {len(array) for array in arrays.values()}
    if num_rows != {len(arrays["window"])}:
        raise ValueError(f"arrays have {sorted(num_rows)} rows")
    sessions = header["sessions"]
    if not isinstance(sessions, list) or not all(isinstance(name, str) for name in sessions):
        raise ValueError("its sessions are not a list of names")
    if arrays["session"].size and int(arrays["session"].max()) >= len(sessions):
        raise ValueError("a row refers to a session that doesn't exist")
    if not (np.isfinite(arrays["start_s"]).all() and np.isfinite(arrays["stop_s"]).all()):
        raise ValueError("a window's time is not finite")
    for column in columns.values():
        require_file_name(column["file"])


def require_file_name(name: object) -> str:
    """Return a name if it is a plain file name, which can't leave its folder.

    Raises:
        ValueError: it is a path, hidden, or not a name.
    """
    is_plain = isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None
    if not is_plain:
        raise ValueError(f"{name!r} is not a plain file name")
    return str(name)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
