"""Read the sizes in the header of a WAV file, and find the sound where they are wrong.

A recorder writes the sizes last. One that stopped early leaves zeros or the sizes of its last
update; one that went past 4 GiB leaves them modulo 2^32. The sound is then all bytes to the end of
the file. Sources: Multimedia Programming Interface and Data Specifications 1.0, IBM and Microsoft
1991; EBU Tech 3306 (RF64).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.machine import open_steadily
from shared.media.container import FilePart

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

_MODULUS = 1 << 32
"""Sizes in a RIFF header have 32 bits."""

_NO_LENGTH = frozenset({0x7FFFF000, 0x7FFFFFDB, 0x7FFFFFFF, 0xFFFFFFDB, 0xFFFFFFFF})
"""Data sizes that a program writes which streams sound of unknown length."""

_MIN_AFTER_S = 1.0
"""Fewer bytes after the declared end are a tag or padding, not sound."""

_MIN_RAW_BYTES = 4096
_MAX_RAW_FLOAT = np.float32(2)
_ZERO_HEADER_BYTES = 44
"""Length of the usual header."""

_SOUND_NAMES = (b"data", bytes(4))
"""A recorder that stopped at once has not written the name of its sound."""

_MAX_CHUNKS = 1000
_PEEK_BYTES = 1 << 16
_CHUNK = struct.Struct("<4sI")
_FORMAT = struct.Struct("<HHIIH2x")
_DS64 = struct.Struct("<4sIQQQI")


@dataclass(frozen=True, slots=True, kw_only=True)
class WavHeader:
    """Where the sound of a WAV file is, and what its header says."""

    chunks: tuple[tuple[int, int], ...]
    """First byte and end of each chunk before the sound."""
    start: int
    """First byte of the sound."""
    num_bytes: int
    """Bytes of sound in the file, whole frames unless the header is right."""
    declared_bytes: int | None
    """Bytes of sound according to the header; None if it says that it doesn't know."""
    is_wrong: bool
    """Whether the sizes are wrong although the sound is there: they can be corrected."""
    is_trusted: bool
    """Whether a reader that trusts the header reads all of the sound."""
    is_last: bool
    """Whether nothing follows the sound."""
    bytes_per_s: int

    @property
    def missing_bytes(self) -> int:
        """Bytes that the header declares beyond the end of the file."""
        return max(0, (self.declared_bytes or 0) - self.num_bytes)


def read_wav_header(path: Path) -> WavHeader | None:
    """Read the header of a WAV or RF64 file; None for another file, or without sound or format."""
    with open_steadily(path) as file:
        length = os.fstat(file.fileno()).st_size
        magic, riff_bytes, form = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
        if magic not in (b"RIFF", b"RF64", b"BW64") or form != b"WAVE":
            return None
        chunks = list(_iter_chunks(file))
        heads = {name: head for name, head, _ in chunks}
        _, _, _, bytes_per_s, frame_bytes = _FORMAT.unpack(heads.get(b"fmt ", bytes(_FORMAT.size)))
        if not chunks or chunks[-1][0] not in _SOUND_NAMES or not frame_bytes:
            return None
        name, _, (start, stop) = chunks.pop()
        start, size = start + _CHUNK.size, stop - start - _CHUNK.size
        if b"ds64" in heads and size == _MODULUS - 1:
            riff_bytes, size = struct.unpack_from("<QQ", heads[b"ds64"])
        spans = tuple(span for _, _, span in chunks)
        ends = [12, *(stop + (stop - start) % 2 for start, stop in spans)]
        is_padded = ends == [*(start for start, _ in spans), start - _CHUNK.size]
        declared, stop = _find_stop(file, start, size, bytes_per_s=bytes_per_s)
        num_bytes, is_last = stop - start, stop == length
        if declared != num_bytes:
            num_bytes -= num_bytes % frame_bytes
        is_wrong = declared is not None and declared < num_bytes
        # Readers that trust the outer size stop there.
        is_wrong |= name != b"data" or (declared == num_bytes and 8 + riff_bytes < stop)
        return WavHeader(
            chunks=spans,
            start=start,
            num_bytes=num_bytes,
            declared_bytes=declared,
            is_wrong=(is_wrong or not is_padded) and num_bytes > 0,
            is_trusted=is_padded and declared is not None and declared >= num_bytes,
            is_last=is_last,
            bytes_per_s=bytes_per_s,
        )


def explain_no_header(path: Path) -> str | None:
    """Explain a file of raw samples that is named as sound; None if it seems to be another file.

    Neighbors in sound of 16 bits are alike, in compressed data or text they are not.
    """
    with open_steadily(path) as file:
        head, content = file.read(_ZERO_HEADER_BYTES), file.read(_PEEK_BYTES)
    content = content[: len(content) // 4 * 4]
    if len(content) < _MIN_RAW_BYTES or content.isascii():
        return None
    integers, floats = np.frombuffer(content, "<i2"), np.frombuffer(content, "<f4")
    deviations = integers - integers.mean()
    steps = [np.square(np.diff(deviations[::channels])).mean() for channels in (1, 2)]
    if (np.abs(floats) <= _MAX_RAW_FLOAT).all() and (np.abs(floats) > 1e-6).mean() > 0.5:
        form = "f32le"
    elif min(steps) < np.square(deviations).mean():
        form = "s16le"
    else:
        return None
    header, skip = "it has no header", ""
    if not any(head):
        header, skip = (
            "it begins with zeros instead of a header",
            f" -skip_initial_bytes {_ZERO_HEADER_BYTES}",
        )
    return (
        f"{header}, and it looks like raw samples ({form}); fix: convert it with the rate and "
        f"channels of the recorder (`ffmpeg -f {form} -ar RATE -ac CHANNELS{skip} -i {path.name} "
        "out.wav`)"
    )


def open_wav(file: BinaryIO, header: WavHeader) -> FilePart:
    """Return an open WAV file as if its header were right."""
    head = corrected_head(file, header)
    return FilePart(file, header.start, header.num_bytes, head=head)


def corrected_head(file: BinaryIO, header: WavHeader) -> bytes:
    """Return the bytes before the sound with the right sizes, as RF64 if it exceeds 4 GiB."""
    length = os.fstat(file.fileno()).st_size
    chunks = b""
    for start, stop in header.chunks:
        file.seek(start)
        chunks += file.read(stop - start) + bytes((stop - start) % 2)
    num_bytes = header.num_bytes + header.num_bytes % 2
    if not header.is_last:
        num_bytes = length - header.start
    riff_bytes = 4 + len(chunks) + _CHUNK.size + num_bytes
    if riff_bytes < _MODULUS:
        head = struct.pack("<4sI4s", b"RIFF", riff_bytes, b"WAVE")
        return head + chunks + _CHUNK.pack(b"data", header.num_bytes)
    head = struct.pack("<4sI4s", b"RF64", _MODULUS - 1, b"WAVE")
    ds64 = _DS64.pack(b"ds64", 28, riff_bytes + 36, header.num_bytes, 0, 0)
    return head + ds64 + chunks + _CHUNK.pack(b"data", _MODULUS - 1)


def _iter_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes, tuple[int, int]]]:
    """Yield name, first bytes and span of each chunk up to that of the sound."""
    for _ in range(_MAX_CHUNKS):
        start, header = file.tell(), file.read(_CHUNK.size)
        if len(header) < _CHUNK.size:
            return
        name, size = _CHUNK.unpack(header)
        stop = start + _CHUNK.size + size
        yield name, file.read(min(size, _FORMAT.size)).ljust(_FORMAT.size, b"\0"), (start, stop)
        if name in _SOUND_NAMES and (name == b"data" or size == 0):
            return
        file.seek(stop)
        if size % 2 and file.read(1).isalnum():  # the byte that pads odd chunks was left out
            file.seek(-1, os.SEEK_CUR)


def _find_stop(
    file: BinaryIO, start: int, size: int, *, bytes_per_s: int
) -> tuple[int | None, int]:
    """Return the bytes of sound that a header declares, and where the sound really ends."""
    length = os.fstat(file.fileno()).st_size
    if size in _NO_LENGTH and (start + size > length or not _is_end(file, start + size, length)):
        return None, length
    if start + size >= length:
        return size, length
    # Past 4 GiB the size was cut to 32 bits.
    stops = range(start + size, length + 1, _MODULUS)
    for stop in reversed(stops):
        if _is_end(file, stop, length):
            return size, stop
    # The header was written before the sound ended, or what follows is no sound.
    file.seek(start + size)
    after = file.read(_PEEK_BYTES)
    has_tag = after[:4].isalnum()
    is_sound = any(after) and not has_tag and length - start - size >= _MIN_AFTER_S * bytes_per_s
    is_sound |= size == 0
    return size, length if is_sound else start + size


def _is_end(file: BinaryIO, position: int, length: int) -> bool:
    """Return whether a file ends at a position, or whole chunks fill it from there to its end."""
    for _ in range(_MAX_CHUNKS):
        if -1 <= length - position < _CHUNK.size:
            return True
        file.seek(position)
        name, size = _CHUNK.unpack(file.read(8).ljust(8, b"\0"))
        if not (name.isascii() and name.decode("ascii").isprintable()):
            # The byte that pads odd chunks is not counted in their size.
            if position % 2:
                return _is_end(file, position + 1, length)
            return False
        position += 8 + size
    return False
