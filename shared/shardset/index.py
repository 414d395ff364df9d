"""Write and read the index of a shard: its rows, and the offsets of their bytes.

An index is a safetensors file: 8 bytes length of the header, the header (UTF-8 JSON), and the bytes
of the arrays without gaps. The header's ``__metadata__`` has one key, whose value is the JSON of
everything that is no array. docs/format.md is the specification.

The file is written and read here, not by the library: the same index gives the same bytes, sizes
are limited, and nothing is mapped. All of its bytes are hashed anyway, and a mapped file that is
truncated kills its readers with SIGBUS.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from shared.errors import (
    CorruptError,
    FormatVersionError,
    ShardError,
    rebuild_hint_for,
    upgrade_hint_for,
)
from shared.files import sha256_of_bytes
from shared.machine import raise_if_refused, read_bytes, read_steadily
from shared.streams import MAX_STREAMS, STREAM_NAME, MaskReason, check_stream_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.kinds.column import Column

INDEX_VERSION = 3
"""The only version that is read; manifests of its format name only such indexes."""

METADATA_KEY = "vr_creature"
"""The key of ``__metadata__`` that holds the header of the index."""

FLAG_BITS: Mapping[MaskReason, int] = {
    MaskReason.STILL: 1,
    MaskReason.CLOCK: 2,
    MaskReason.DAMAGED: 4,
}
"""Bit of each reason in the array ``flags``."""

MASK_BITS = sum(FLAG_BITS.values())

VERDICT_BITS: Mapping[str, int] = {"checked": 8, "warnings": 16, "failed": 32}
"""Bits of a validated session in ``flags``: that it was, and the verdict on the stream."""

_OLD_MAGIC = b"VRCINDEX"
"""First bytes of an index of format 2 or older."""

_MAX_INDEX_BYTES = 1 << 30
_MAX_HEADER_BYTES = 64 << 20
_MAX_ARRAYS = 8 * MAX_STREAMS
_MAX_SESSION_S = 1e6
_MAX_SEGMENT_S = 600.0
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")

_DTYPES = {"U8": "u1", "U32": "u4", "U64": "u8", "F32": "f4", "F64": "f8"}
"""NumPy's name of each dtype of safetensors that an index may have."""
_SAFETENSORS_DTYPES = {dtype: name for name, dtype in _DTYPES.items()}

_PARSE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""Errors that reading damaged JSON values can raise."""

_HEADER_TYPES = {
    **dict.fromkeys(["name", "split"], str),
    **dict.fromkeys(["streams", "videos", "sessions", "durations_s", "decode_failures"], list),
    **dict.fromkeys(["columns", "statistics"], dict),
}
_COLUMN_TYPES = {
    **dict.fromkeys(["file", "sha256", "fingerprint"], str),
    **dict.fromkeys(["basis", "rows"], dict),
    "length_bytes": int,
}
_FAILURE_TYPES = {"session": str, "segment": int, "stream": str, "reason": str}

_Form = tuple[str, tuple[int | None, ...]]
"""Dtype of an array and the shape of one row; None is a width that the recipe decides."""

_MEMBER_FORMS: dict[str, _Form] = {"offset": ("u8", ()), "length": ("u8", ()), "crc32c": ("u4", ())}
"""Arrays of each column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Positions of one tar column's members or one Zarr array's chunks, one row per segment.

    offset uint64 [N], length uint64 [N] (0 if the row has no member), crc32c uint32 [N] of the
    bytes.
    """

    offset: NDArray[np.uint64]
    length: NDArray[np.uint64]
    crc32c: NDArray[np.uint32]

    @classmethod
    def empty(cls, num_rows: int) -> Members:
        """Return a table of rows without members, for :meth:`record`."""
        arrays = {n: np.zeros(num_rows, dtype) for n, (dtype, _) in _MEMBER_FORMS.items()}
        return cls(**arrays)

    def record(self, row: int, *, offset: int, content: bytes) -> None:
        """Record the offset, length and checksum of a row's bytes."""
        self.offset[row], self.length[row] = offset, len(content)
        self.crc32c[row] = google_crc32c.value(content)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """A shard's index; its arrays have one row per segment."""

    header: Mapping[str, Any]
    """Plain JSON: "name", "split", "streams", "videos" (the streams with time errors), "sessions",
    "durations_s" (per session), "segment_s", "columns" (file, size, checksum, fingerprint, basis
    and rows of each), "statistics", "decode_failures"."""
    arrays: Mapping[str, NDArray[Any]]
    """session u4 [N], segment u4 [N], present u1 [N, S], coverage f4 [N, S]; flags u1 [N, S], if
    any is not 0; per column COLUMN.offset u8, COLUMN.length u8, COLUMN.crc32c u4 [N]; per video
    STREAM.error_s f4 [N, F]."""

    @property
    def num_samples(self) -> int:
        """Number of rows of the shard."""
        return len(self.arrays["segment"])

    @property
    def streams(self) -> list[str]:
        """Names of the set's streams, sorted: the columns of present and coverage."""
        streams: list[str] = self.header["streams"]
        return streams

    @property
    def videos(self) -> list[str]:
        """Names of the streams with time errors of their frames."""
        videos: list[str] = self.header["videos"]
        return videos

    @property
    def sessions(self) -> list[str]:
        """Names of the sessions whose segments are rows of the shard."""
        sessions: list[str] = self.header["sessions"]
        return sessions

    @property
    def segment_s(self) -> float:
        """Length of a segment in seconds."""
        return float(self.header["segment_s"])

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """Header entry of each column: its file, size, checksum and fingerprint."""
        columns: dict[str, dict[str, Any]] = self.header["columns"]
        return columns

    @property
    def decode_failures(self) -> list[dict[str, Any]]:
        """Streams of segments that did not decode: session, segment, stream and reason."""
        failures: list[dict[str, Any]] = self.header["decode_failures"]
        return failures

    @property
    def segments(self) -> list[tuple[str, list[int]]]:
        """Each session with the numbers of its segments, in the order of the rows."""
        edges = np.searchsorted(self.arrays["session"], np.arange(len(self.sessions) + 1)).tolist()
        numbers = self.arrays["segment"].tolist()
        rows = itertools.pairwise(edges)
        return [(n, numbers[a:b]) for n, (a, b) in zip(self.sessions, rows, strict=True)]

    def session(self, row: int) -> str:
        """Return the name of a row's session."""
        return self.sessions[int(self.arrays["session"][row])]

    def segment(self, row: int) -> int:
        """Return the number of a row's segment; it begins at that many segment lengths."""
        return int(self.arrays["segment"][row])

    def key(self, row: int) -> str:
        """Return the key of a row, SESSION/SEGMENT."""
        return f"{self.session(row)}/{self.segment(row):06d}"

    def duration_s(self, row: int) -> float:
        """Return the length of a row's session in seconds."""
        return float(self.header["durations_s"][int(self.arrays["session"][row])])

    def stream_column(self, stream: str) -> int:
        """Return the column of a declared stream in present and coverage."""
        return self.streams.index(stream)

    def is_present(self, row: int, stream: str) -> bool:
        """Return whether a row has a stream; no row has one that the set does not declare."""
        is_declared = stream in self.streams
        return is_declared and bool(self.arrays["present"][row, self.stream_column(stream)])

    def present_streams(self, row: int) -> tuple[str, ...]:
        """Return the streams that a row has, sorted."""
        return tuple(itertools.compress(self.streams, self.arrays["present"][row].tolist()))

    @property
    def flags(self) -> NDArray[np.uint8]:
        """Bits of FLAG_BITS (content is masked) and VERDICT_BITS (validation), uint8 [N, S]."""
        return self.arrays.get("flags", np.zeros_like(self.arrays["present"]))

    def members(self, column: str) -> Members:
        """Return the positions of a column's members, such as ``audio`` or ``audio.dmel``."""
        return Members(**{name: self.arrays[f"{column}.{name}"] for name in _MEMBER_FORMS})


def index_bytes(index: ShardIndex) -> bytes:
    """Encode an index; the same index gives the same bytes."""
    # Items of 8 bytes come first, so that each array is aligned to its items.
    names = sorted(index.arrays, key=lambda name: (-index.arrays[name].dtype.itemsize, name))
    header = {"version": INDEX_VERSION, **index.header}
    layout: dict[str, Any] = {"__metadata__": {METADATA_KEY: _json(header)}}
    position = 0
    for name in names:
        array = index.arrays[name]
        layout[name] = {
            "dtype": _SAFETENSORS_DTYPES[array.dtype.str[1:]],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    encoded = _json(layout, sort_keys=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    body = (
        index.arrays[name].astype(index.arrays[name].dtype.newbyteorder("<")).tobytes()
        for name in names
    )
    return b"".join([len(encoded).to_bytes(8, "little"), encoded, *body])


def open_index(path: Path, *, sha256: str | None = None) -> ShardIndex:
    """Read an index; see :func:`parse_index`.

    Raises:
        ShardError: the file doesn't exist, or is not such an index.
        MachineError: the machine can't read it now.
    """
    hint = rebuild_hint_for(path)
    try:
        if (size := read_steadily(path.stat, path).st_size) > _MAX_INDEX_BYTES:
            limit = f"the limit is {_MAX_INDEX_BYTES}"
            raise CorruptError(f"{path}: an index of {size} bytes; {limit}; {hint}")
        content = read_bytes(path)
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such index; {hint}") from error
    except OSError as error:
        raise_if_refused(error, path)
        raise CorruptError(f"{path}: can't be read: {error}; {hint}") from error
    return parse_index(content, origin=str(path), sha256=sha256)


def parse_index(content: bytes, *, origin: str, sha256: str | None = None) -> ShardIndex:
    """Parse the bytes of an index; its arrays are read-only views of them.

    Raises:
        CorruptError: the bytes differ from `sha256`, the manifest's checksum, or are damaged.
        FormatVersionError: the index has another version.
    """
    hint, upgrade = rebuild_hint_for(origin), upgrade_hint_for(origin)
    if content.startswith(_OLD_MAGIC):
        raise FormatVersionError(f"{origin}: an index of format 2 or older; {upgrade}")
    if sha256 is not None and sha256_of_bytes(content) != sha256:
        raise CorruptError(f"{origin}: checksum differs from the manifest; {hint}")
    start = 8 + int.from_bytes(content[:8], "little")
    if len(content) < 8 or start > min(_MAX_HEADER_BYTES, len(content)):
        raise CorruptError(f"{origin}: {len(content)} bytes are not a shard index; {hint}")
    try:
        layout = json.loads(content[8:start])
        header = json.loads(layout.pop("__metadata__")[METADATA_KEY])
        version = header.pop("version")
        if type(version) is not int:
            raise TypeError("its version is no number")
        if version == INDEX_VERSION:
            arrays = _arrays(np.frombuffer(content, np.uint8)[start:], layout)
            _require_whole(header, arrays)
            return ShardIndex(header=header, arrays=arrays)
    except _PARSE_ERRORS as error:
        fault = f"{type(error).__name__}: {error}"
        raise CorruptError(f"{origin}: its header is damaged: {fault}; {hint}") from error
    fix = "fix: update the program" if version > INDEX_VERSION else upgrade
    raise FormatVersionError(
        f"{origin}: index version {version} is not {INDEX_VERSION}, the only one that this program "
        f"reads; {fix}"
    )


def require_matching(
    index: ShardIndex, columns: Iterable[Column], *, segment_s: float, origin: str
) -> None:
    """Check that an index has some columns of a recipe, in the recipe's form.

    Raises:
        CorruptError: a column is missing, or segments or frames differ from the recipe's.
    """
    columns, hint = list(columns), rebuild_hint_for(origin)
    if missing := [column.name for column in columns if column.name not in index.columns]:
        raise CorruptError(f"{origin}: lacks the column {', '.join(missing)}; {hint}")
    if index.segment_s != segment_s:
        raise CorruptError(
            f"{origin}: has segments of {index.segment_s:g} s, the recipe says {segment_s:g}; "
            f"{hint}"
        )
    for column in columns:
        name = column.name
        num_frames = index.arrays[f"{name}.error_s"].shape[1] if name in index.videos else None
        expected = column.shape[0] if column.has_time_errors else None
        if num_frames != expected:
            raise CorruptError(
                f"{origin}: has {num_frames} frames of {name} in a segment, the recipe says "
                f"{expected}; {hint}"
            )


def require_file_name(name: object) -> str:
    """Return a name if it is a plain file name, which can't leave its folder.

    Raises:
        ValueError: it is a path, hidden, or not a name.
    """
    if not isinstance(name, str) or _FILE_NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _arrays(body: NDArray[np.uint8], layout: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return views of all arrays, which fill `body` one after another without gaps."""
    if len(layout) > _MAX_ARRAYS:
        raise ValueError(f"{len(layout)} arrays; the limit is {_MAX_ARRAYS}")
    arrays: dict[str, NDArray[Any]] = {}
    position = 0
    for name, entry in sorted(layout.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if len(shape) > 2 or any(type(n) is not int or n < 0 for n in (*shape, *offsets)):
            raise ValueError(f"array {name[:80]!r} has an impossible shape")
        start, stop = offsets
        if start != position or stop - start != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"array {name[:80]!r} does not begin where the one before it ends")
        arrays[name] = body[start:stop].view(f"<{dtype}").reshape(shape)
        position = stop
    if position != len(body):
        raise ValueError(f"arrays of {position} bytes in a body of {len(body)}")
    return arrays


def _require_whole(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check that header and arrays are complete and agree; raise an error of `_PARSE_ERRORS`."""
    _require_header(header)
    # Every array has its dtype and shape, and all have the same rows.
    for name, (dtype, widths) in _forms(header).items():
        if name == "flags" and name not in arrays:
            continue
        if name not in arrays:
            raise ValueError(f"lacks the array {name}")
        own, shape = arrays[name].dtype.str[1:], arrays[name].shape
        expected = tuple(shape[1:2] if width is None else (width,) for width in widths)
        if own != dtype or len(shape) != 1 + len(widths) or shape[1:] != sum(expected, ()):
            raise ValueError(f"{name} is {own} {list(shape)}")
    num_rows = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(num_rows) != 1:
        raise ValueError(f"arrays have {sorted(num_rows)} rows")
    _require_rows(header, arrays)


def _forms(header: Mapping[str, Any]) -> dict[str, _Form]:
    """Return the form of each array that an index with this header has."""
    columns, widths = header["columns"], (len(header["streams"]),)
    return {
        **dict.fromkeys(["session", "segment"], ("u4", ())),
        "present": ("u1", widths),
        "coverage": ("f4", widths),
        "flags": ("u1", widths),
        **{f"{c}.{name}": form for c in columns for name, form in _MEMBER_FORMS.items()},
        **{
            f"{stream}.error_s": ("f4", (None,)) for stream in header["videos"] if stream in columns
        },
    }


def _require_header(header: Mapping[str, Any]) -> None:
    """Check the parts of a header and their types."""
    _require_types(header, _HEADER_TYPES, "header")
    _require_sessions(header["sessions"], header["durations_s"], header["segment_s"])
    streams = header["streams"]
    if not 1 <= len(streams) <= MAX_STREAMS:
        raise ValueError(f"{len(streams)} streams; the limit is {MAX_STREAMS}")
    for name in streams:
        check_stream_name(name)
    if streams != sorted(set(streams)) or not set(header["videos"]) <= set(streams):
        raise ValueError("its streams or videos are not sorted names")
    for name, column in header["columns"].items():
        stream, dot, part = name.partition(".")
        if stream not in streams or (dot and STREAM_NAME.fullmatch(part) is None):
            raise ValueError(f"{name[:80]!r} is not a column of its streams")
        _require_types(column, _COLUMN_TYPES, f"column {name}")
        require_file_name(column["file"])
    for failure in header["decode_failures"]:
        _require_types(failure, _FAILURE_TYPES, "decode failure")


def _require_sessions(sessions: list[Any], durations_s: list[Any], segment_s: object) -> None:
    """Check the names and durations of the sessions, and the duration of a segment."""
    if not all(isinstance(name, str) and name.encode() for name in sessions):
        raise ValueError("its sessions are not a list of names")
    if len(set(sessions)) != len(sessions):
        raise ValueError("its sessions repeat")
    if len(durations_s) != len(sessions):
        raise ValueError(f"{len(durations_s)} durations of {len(sessions)} sessions")
    if not all(_is_between(duration, 0, _MAX_SESSION_S) for duration in durations_s):
        raise ValueError("the duration of a session is impossible")
    if not _is_between(segment_s, 0, _MAX_SEGMENT_S) or segment_s == 0:
        raise ValueError("the duration of a segment is impossible")


def _is_between(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and low <= value <= high


def _require_types(values: Mapping[str, Any], types: Mapping[str, type], name: str) -> None:
    """Check that JSON values have their keys and types."""
    for key, expected in types.items():
        if type(values[key]) is not expected:
            raise ValueError(f"{key} of its {name} is {type(values[key]).__name__}")


def _require_rows(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check that rows are segments of the sessions, each once and in order."""
    session, segment = arrays["session"], arrays["segment"]
    if session.size and int(session.max()) >= len(header["sessions"]):
        raise ValueError("a row refers to a session that doesn't exist")
    order = session.astype(np.uint64) << np.uint64(32) | segment
    if not (order[1:] > order[:-1]).all():
        raise ValueError("rows are not in the order of sessions and segments")
    starts_s = segment * float(header["segment_s"])
    if (starts_s > np.asarray(header["durations_s"], np.float64)[session]).any():
        raise ValueError("a segment begins after the end of its session")
    if (arrays["present"] > 1).any():
        raise ValueError("present has values other than 0 and 1")
    if not (np.isfinite(arrays["coverage"]) & (arrays["coverage"] >= 0)).all():
        raise ValueError("coverage has values that are no shares")
    for name, column in header["columns"].items():
        is_present = arrays["present"][:, header["streams"].index(name.partition(".")[0])] == 1
        has_member = arrays[f"{name}.length"] > 0
        # A tar has no member for an absent stream; a Zarr array has a chunk for every row.
        is_tar = column["file"].endswith(".tar")
        if (is_present & ~has_member).any() or (is_tar and (has_member & ~is_present).any()):
            raise ValueError(f"present and the members of {name} differ")


def _json(values: Mapping[str, Any], *, sort_keys: bool = True) -> str:
    return json.dumps(values, sort_keys=sort_keys, ensure_ascii=False, separators=(",", ":"))
