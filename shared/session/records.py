"""Split text files into lines and JSON objects, whatever their encoding.

Files are read as UTF-8. UTF-16 and UTF-32 are recognized by their first bytes, and lines that are
not UTF-8 are read as Windows-1252. JSON objects should be on lines of their own; those that are
not, in an array or one after the other, are read too.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

MAX_LINE_BYTES = 1 << 20
"""Longer lines are skipped, unless they consist of shorter JSON objects."""

WINDOWS = "Windows-1252"
DAMAGED = "damaged UTF-8"
UNKNOWN = "another encoding"
"""Encodings of a line that is not UTF-8; characters of the last two become U+FFFD."""

_UTF8 = "UTF-8"

_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32-LE", codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF16_LE: "UTF-16-LE", codecs.BOM_UTF16_BE: "UTF-16-BE",
    codecs.BOM_UTF8: _UTF8,
}  # fmt: skip
"""Byte order marks; the longer ones first, as one begins like a shorter one."""

_ZEROS: Mapping[tuple[bool, ...], str] = {
    (False, True, True, True): "UTF-32-LE", (True, True, True, False): "UTF-32-BE",
    (False, True, False, True): "UTF-16-LE", (True, False, True, False): "UTF-16-BE",
}  # fmt: skip
"""Which of the first four bytes are zero without a byte order mark: text begins with ASCII."""

_MAX_FAILURES = 100
"""Attempts to find an object in damaged text; it keeps damaged files from taking hours."""

_JUDGED_LINES = 3
"""Lines at the start of a file that tell whether its objects are on lines of their own."""

_BEYOND_ASCII = re.compile(r"[^\0-\x7f\ufffd]")
_FOREIGN = re.compile(rb"[\x80-\xff]{4}")
"""Bytes that are letters of another script; in Windows-1252, few letters in a row aren't ASCII."""

_OPENING = re.compile(r'\{(?=(\s*(?:"(?:[^"\\]|\\.)*"|\})))')
_FILLING = " \t\r\n,[]"
_DECIMAL_COMMA = re.compile(rb":\s*-?\d+,\d+\s*[,}]")
_DECODER = json.JSONDecoder()


def open_utf8(file: IO[bytes]) -> tuple[IO[bytes], str]:
    """Return a text file in UTF-8, from its start, and its encoding, empty if it is UTF-8."""
    file.seek(0)
    head = file.read(4)
    bom = next((bom for bom in _BOMS if head.startswith(bom)), b"")
    encoding = _BOMS.get(bom) or _ZEROS.get(tuple(byte == 0 for byte in head), _UTF8)
    file.seek(len(bom))
    if encoding == _UTF8:
        return file, ""
    return io.BytesIO(file.read().decode(encoding, "replace").encode()), encoding


def iter_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of the lines that are not blank; of too long ones the beginning."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        tail = raw
        while len(tail) > MAX_LINE_BYTES and not tail.endswith(b"\n"):
            tail = file.readline(MAX_LINE_BYTES + 1)
        if raw.strip() not in (b"", b"\0"):  # the second byte of a line feed of UTF-16
            yield number, raw


class Record(NamedTuple):
    """One JSON object of a file, or something that should be one."""

    raw: bytes
    values: dict[str, Any] | None
    message: str
    """Why it has no values, or that it is not UTF-8."""
    fix: str = ""
    """How to correct it, if that is known."""


@dataclass(frozen=True, slots=True)
class RecordFile:
    """The lines of a file of JSON lines, and what is unusual about it."""

    lines: Iterator[tuple[int, bytes]]
    """Number and bytes of each line that is not blank."""
    encoding: str
    """Empty if it is UTF-8."""
    is_document: bool
    """Whether objects take several lines, or very long ones. They, and what is between them, are
    counted and given as lines then."""


def open_records(file: IO[bytes]) -> RecordFile:
    """Open a seekable file of JSON objects; it is a document if its first line isn't one object.

    A damaged first line does not count, if one of the next lines is an object.
    """
    text, encoding = open_utf8(file)
    lines = [raw for _, raw in itertools.islice(iter_lines(text), _JUDGED_LINES)]
    first = [_split_line(raw) for raw in lines]
    is_document = bool(lines) and (lines[0].lstrip()[:1] == b"[" or len(first[0]) > 1)
    if is_document or not any(map(_has_object, first)):
        text, _ = open_utf8(file)
        head = text.read(2 * MAX_LINE_BYTES)
        is_document = head.lstrip()[:1] in (b"{", b"[") and _has_object(split_objects([head]))
    text, _ = open_utf8(file)
    chunks = iter(lambda: text.read(MAX_LINE_BYTES), b"")
    numbered = enumerate(split_objects(chunks), start=1) if is_document else iter_lines(text)
    return RecordFile(numbered, encoding, is_document)


def parse_records(raw: bytes) -> list[Record]:
    """Parse a line into its JSON objects, usually one, and what is between them but commas."""
    whole = parse_line(raw)
    if whole.values is not None:
        return [whole]
    records = [parse_line(part) for part in _split_line(raw)]
    return records if any(record.values is not None for record in records) else [whole]


def count_split(raw: bytes, records: Sequence[Record]) -> int:
    """Return how many objects of a line are not alone on it, apart from damaged ones."""
    number = sum(record.values is not None for record in records)
    return number if number > 1 or (len(records) == 1 and records[0].raw is not raw) else 0


def parse_line(raw: bytes) -> Record:
    """Parse bytes into their JSON object, or say why they have none."""
    text, encoding = decode_line(raw)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return Record(raw, None, *_explain(raw))
    if not isinstance(values, dict):
        return Record(raw, None, "not a JSON object")
    return Record(raw, values, f"not UTF-8, probably {encoding}" if encoding else "")


def decode_line(raw: bytes) -> tuple[str, str]:
    """Return the text of a line, and its encoding, empty if it is UTF-8."""
    with suppress(UnicodeDecodeError):
        if b"\0" not in raw:
            return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass"), ""
    if raw.count(0) > len(raw) // 3:  # a line feed of UTF-16 is split after its first byte
        with suppress(UnicodeDecodeError):
            even = raw.strip(b"\0\r\n")
            return (even + b"\0" * (len(even) % 2)).decode("utf-16-le"), "UTF-16-LE"
    text = raw.decode("utf-8", "replace")
    if text.count("\ufffd") <= len(_BEYOND_ASCII.findall(text)):
        return text, DAMAGED
    if _FOREIGN.search(raw):
        return text, UNKNOWN
    with suppress(UnicodeDecodeError):
        return raw.decode("cp1252"), WINDOWS
    return raw.decode("latin-1"), WINDOWS


def _explain(raw: bytes) -> tuple[str, str]:
    """Explain why bytes are not JSON, and how to correct that if it is known."""
    if num_zeros := raw.count(0):
        return f"{num_zeros} bytes are zero, as after a power failure", ""
    if match := _DECIMAL_COMMA.search(raw):
        number = match[0].strip(b" \t:,}").decode()
        return f"{number} has a decimal comma", "write numbers with a point, as JSON demands"
    return "not JSON" if raw.endswith(b"\n") else "the last line is cut off", ""


def _has_object(parts: Iterable[bytes]) -> bool:
    return any(parse_line(part).values is not None for part in parts)


def _split_line(raw: bytes) -> list[bytes]:
    """Split a line into the objects in it and what is between them."""
    return list(split_objects([raw])) if len(raw) <= MAX_LINE_BYTES else [raw]


def split_objects(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the JSON objects in some text, and what is between them, as lines.

    Commas and brackets of an array around them are left out. The last line ends without line feed
    if the text does.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    more, text, position, is_end = iter(chunks), "", 0, False
    while not is_end or position < len(text):
        if not is_end and len(text) - position < 2 * MAX_LINE_BYTES:  # of any object, all is there
            raw = next(more, None)
            is_end = raw is None
            text, position = text[position:] + decode(raw or b"", final=is_end), 0
            continue
        start, stop = _find_object(text, position)
        if start < 0:
            start = stop = len(text) if is_end else position + MAX_LINE_BYTES
        for first, last in ((position, start), (start, stop)):
            line = text[first:last].lstrip(_FILLING)
            if last < len(text):
                line = line.rstrip(_FILLING) + "\n" * bool(line)
            if line.strip(_FILLING):
                yield line.encode("utf-8", "surrogateescape")
        position = stop


def _find_object(text: str, position: int) -> tuple[int, int]:
    """Return start and stop of the first JSON object, (-1, -1) if there is none.

    Objects inside of another one that is damaged do not count. Those that begin a line, or have its
    first key, are outside.
    """
    num_failures = 0
    for opening in _OPENING.finditer(text, position):
        before = text[position : opening.start()].strip(" \t\r\n")
        is_inside = bool(before.strip(_FILLING)) and before[-1] in ":[,"
        is_inside &= text[opening.start() - 1] != "\n"
        if is_inside and not before.lstrip(_FILLING).startswith("{" + opening[1]):
            continue
        try:
            return opening.start(), _DECODER.raw_decode(text, opening.start())[1]
        except (ValueError, RecursionError):
            num_failures += 1
        if num_failures > _MAX_FAILURES:
            break
    return -1, -1
