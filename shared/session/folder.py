"""A session folder as it was recorded: which files there are, metadata lines and text events, with
what is odd in them.

Reading never stops at a bad line: it is left out, counted and reported as a :class:`ParseIssue`.
Whoever reads says what became of them (validation prints them, the shard job writes them to
``rejected.jsonl``).
"""

from __future__ import annotations

import errno
import json
import math
import reprlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import SessionError
from shared.recipe import Stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

METADATA_FILE = "metadata.jsonl"
TEXT_FILE = "text.jsonl"
SESSION_INFO_FILE = "session.json"
AUDIO_FILE = "audio.wav"
VISION_FILES = {Stream.VISION_LEFT: "vision_left.mp4", Stream.VISION_RIGHT: "vision_right.mp4"}

SOURCE_FILES = (METADATA_FILE, TEXT_FILE, AUDIO_FILE, *VISION_FILES.values())
"""Files that samples are made of; others in the folder are left alone."""

SCANNED_FILES = (*SOURCE_FILES, SESSION_INFO_FILE)
"""Files that a scan reads: of the last one only ``start_s``."""

MAX_LINE_BYTES = 1 << 20
"""A longer line of metadata is no metadata."""

MAX_TIME_S = 1e12
"""Larger timestamps are no seconds (nanoseconds since 1970, say)."""

MAX_VALUE = 3e38
"""Larger sensor readings don't fit float32."""

_TEXT_STREAMS = {"internal": Stream.INTERNAL_TEXT, "external": Stream.EXTERNAL_TEXT}
_INLINE_TEXT_KEYS = {"internal_text": Stream.INTERNAL_TEXT, "external_text": Stream.EXTERNAL_TEXT}
_INLINE_TEXT_MARKS = (b"_text", b"\\u", b"\0")
"""A line has one of these bytes if it has one of the keys: plain, escaped, or in UTF-16 or 32."""


@dataclass(frozen=True, slots=True)
class ParseIssue:
    """Something in a file that could not be taken as it stands."""

    file: str
    line: int
    kind: str
    """A short fixed word: json, timestamp, order, duplicate, size, number, stream, text, long."""
    what: str
    back_s: float = 0.0
    """Seconds by which a timestamp out of order is before the line above."""


@dataclass(frozen=True, slots=True)
class TextEvent:
    """A text that begins at a time on the recorder's clock."""

    time_s: float
    stream: Stream
    text: str
    file: str = field(default=TEXT_FILE, compare=False)
    line: int = field(default=0, compare=False)

    @property
    def source_line(self) -> str:
        """File and line where it stands."""
        return f"{self.file} line {self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Sensor lines, sorted by time without duplicates; what a line lacks is NaN.

    Shapes: times_s float64 [N], touch float32 [N, touch_size], proprio float32 [N, proprio_size],
        line int64 [N] (1-based line numbers of the file).
    """

    times_s: NDArray[np.float64]
    touch: NDArray[np.float32]
    proprio: NDArray[np.float32]
    lines: NDArray[np.int64]
    events: tuple[TextEvent, ...]
    issues: tuple[ParseIssue, ...]

    def rows_with(self, stream: Stream) -> NDArray[np.bool_]:
        """Which lines carry a finite value of touch or proprio, bool [N]."""
        values = self.touch if stream is Stream.TOUCH else self.proprio
        return np.asarray(np.isfinite(values).all(axis=1), dtype=np.bool_)


def find_sessions(root: Path | str) -> list[Path]:
    """Session folders below `root` (or `root` itself), sorted by name.

    A session folder holds at least one of the source files.

    Raises:
        SessionError: no such folder, or no session in it.
    """
    root = Path(root)
    if root.name in ("", ".."):
        root = root.resolve()  # a session's name is its folder's
    if not root.is_dir():
        raise SessionError(f"{root}: no such folder; give a session folder or a folder of them")
    if is_session(root):
        return [root]
    found = sorted(
        (p for p in root.iterdir() if not p.name.startswith(".") and is_session(p)),
        key=lambda p: p.name,
    )
    if not found:
        raise SessionError(
            f"{root}: no session in it; a session is a folder with at least one of "
            f"{', '.join(SOURCE_FILES)}"
        )
    return found


def is_session(path: Path) -> bool:
    """Whether a folder holds at least one source file."""
    return any((path / name).exists() for name in SOURCE_FILES)


def read_metadata(
    path: Path, *, touch_size: int, proprio_size: int, units_per_s: float = 1.0
) -> Metadata:
    """Read ``metadata.jsonl`` of a session folder; a missing file gives no lines.

    Args:
        path: the session folder.
        touch_size: values that a touch reading must have.
        proprio_size: values that a proprio reading must have.
        units_per_s: what timestamps are divided by.
    """
    times, lines = array("d"), array("q")
    touch, proprio = array("f"), array("f")  # an hour at 90 Hz is 40 MB so, and 300 MB in lists
    events: list[TextEvent] = []
    issues: list[ParseIssue] = []
    for number, values in _iter_objects(path / METADATA_FILE, issues):
        time_s = _timestamp(values, METADATA_FILE, number, issues, units_per_s)
        if time_s is None:
            continue
        times.append(time_s)
        lines.append(number)
        touch.extend(_numbers(values, "touch", touch_size, number, issues))
        proprio.extend(_numbers(values, "proprio", proprio_size, number, issues))
        events += _inline_texts(values, time_s, number, issues)
    times_s = np.asarray(times, dtype=np.float64)
    order = _increasing_order(times_s, lines, issues)
    is_whole = len(order) == len(times) and bool((np.diff(order) == 1).all())
    chosen = slice(None) if is_whole else order  # a slice copies nothing
    return Metadata(
        times_s=times_s[chosen],
        touch=np.asarray(touch, dtype=np.float32).reshape(-1, touch_size)[chosen],
        proprio=np.asarray(proprio, dtype=np.float32).reshape(-1, proprio_size)[chosen],
        lines=np.asarray(lines, dtype=np.int64)[chosen],
        events=tuple(events),
        issues=tuple(issues),
    )


def read_inline_texts(path: Path) -> list[TextEvent]:
    """Texts of ``metadata.jsonl`` in order of the file, as :func:`read_metadata` finds them; lines
    that hold none are not parsed.
    """
    events: list[TextEvent] = []
    for number, values in _iter_objects(path / METADATA_FILE, [], marks=_INLINE_TEXT_MARKS):
        time_s = parse_timestamp(values)
        if time_s is not None:
            events += _inline_texts(values, time_s, number, [])
    return events


def read_text_file(
    path: Path, *, units_per_s: float = 1.0
) -> tuple[list[TextEvent], list[ParseIssue]]:
    """Read ``text.jsonl`` of a session folder, sorted by time; a missing file gives no events.

    Args:
        path: the session folder.
        units_per_s: what timestamps are divided by.
    """
    events: list[TextEvent] = []
    issues: list[ParseIssue] = []
    for number, values in _iter_objects(path / TEXT_FILE, issues):
        time_s = _timestamp(values, TEXT_FILE, number, issues, units_per_s)
        stream = _TEXT_STREAMS.get(str(values.get("stream")))
        if stream is None:
            name = reprlib.repr(values.get("stream"))
            what = f"stream is {name}; expected 'internal' or 'external'"
            issues.append(ParseIssue(TEXT_FILE, number, "stream", what))
            continue
        num_odd = len(issues)
        text = _text(values, "text", TEXT_FILE, number, issues)
        if text is None and len(issues) == num_odd:
            issues.append(ParseIssue(TEXT_FILE, number, "text", "no text"))
        elif text is not None and time_s is not None:
            events.append(TextEvent(time_s, stream, text, TEXT_FILE, number))
    events.sort(key=lambda event: event.time_s)
    return events, issues


def _inline_texts(
    values: dict[str, Any], time_s: float, number: int, issues: list[ParseIssue]
) -> Iterator[TextEvent]:
    """Texts of a metadata line."""
    for key, stream in _INLINE_TEXT_KEYS.items():
        text = _text(values, key, METADATA_FILE, number, issues)
        if text is not None:
            yield TextEvent(time_s, stream, text, METADATA_FILE, number)


def _iter_objects(
    path: Path, issues: list[ParseIssue], *, marks: tuple[bytes, ...] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each JSON line; anything else becomes an issue.

    Args:
        path: the file.
        issues: where those go.
        marks: lines without any of these bytes are passed over, unless there are none.
    """
    try:
        if path.exists() and not path.is_file():
            raise IsADirectoryError(errno.EISDIR, "it is no file")
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        issues.append(ParseIssue(path.name, 0, "json", f"can't be opened: {error.strerror}"))
        return
    with file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                what = f"line over {MAX_LINE_BYTES} bytes"
                issues.append(ParseIssue(path.name, number, "long", what))
                continue
            if not raw.strip() or (marks and not any(mark in raw for mark in marks)):
                continue
            values, what = parse_line(raw)
            if values is None:
                issues.append(ParseIssue(path.name, number, "json", what))
            else:
                yield number, values


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """The JSON object of a line, or None and what is wrong with it."""
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        is_cut = not raw.endswith(b"\n")
        return None, "the last line is cut off" if is_cut else "not JSON"
    return (values, "") if isinstance(values, dict) else (None, "not a JSON object")


def parse_timestamp(values: dict[str, Any], *, units_per_s: float = 1.0) -> float | None:
    """The timestamp of a line in seconds, or None where it isn't a usable number."""
    value = values.get("timestamp")
    time = None if isinstance(value, bool) else _finite(value)
    if time is None or abs(time / units_per_s) >= MAX_TIME_S:
        return None
    return time / units_per_s


def _finite(value: object) -> float | None:
    """A JSON number as a finite float, else None."""
    if not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def _timestamp(
    values: dict[str, Any], file: str, number: int, issues: list[ParseIssue], units_per_s: float
) -> float | None:
    """The line's timestamp, or None and an issue."""
    time_s = parse_timestamp(values, units_per_s=units_per_s)
    if time_s is None:
        what = f"timestamp is {reprlib.repr(values.get('timestamp'))}, no usable number of seconds"
        issues.append(ParseIssue(file, number, "timestamp", what))
    return time_s


def _text(
    values: dict[str, Any], key: str, file: str, number: int, issues: list[ParseIssue]
) -> str | None:
    """A text that says something, else None and, unless it is missing or empty, an issue."""
    text = values.get(key)
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        issues.append(ParseIssue(file, number, "text", f"{key} is no string"))
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        issues.append(
            ParseIssue(file, number, "text", f"{key} holds half a character (a surrogate)")
        )
        return None
    return text if text.strip() else None


def _numbers(
    values: dict[str, Any], key: str, size: int, number: int, issues: list[ParseIssue]
) -> list[float]:
    """`size` finite numbers under a key, else all NaN and, unless the key is missing, an issue."""
    missing = [math.nan] * size
    numbers = values.get(key)
    if numbers is None:
        return missing
    if not isinstance(numbers, list):
        issues.append(ParseIssue(METADATA_FILE, number, "number", f"{key} is no list"))
        return missing
    if len(numbers) != size:
        what = (
            f"{key} has {len(numbers)} values, recipe wants {size}; "
            f"set sensors.{key}_size: {len(numbers)}"
        )
        issues.append(ParseIssue(METADATA_FILE, number, "size", what))
        return missing
    finite = [v for v in map(_finite, numbers) if v is not None and abs(v) < MAX_VALUE]
    if len(finite) != size:
        what = f"{key} holds a value that is no finite number"
        issues.append(ParseIssue(METADATA_FILE, number, "number", what))
        return missing
    return finite


def _increasing_order(
    times_s: NDArray[np.float64], lines: Sequence[int], issues: list[ParseIssue]
) -> NDArray[np.int64]:
    """Order that sorts the lines by time and keeps the first of equal times."""
    steps = np.diff(times_s)
    issues.extend(
        ParseIssue(
            METADATA_FILE,
            lines[int(i) + 1],
            "order",
            f"timestamp {times_s[i + 1]:g} is before the line above",
            back_s=float(-steps[i]),
        )
        for i in np.flatnonzero(steps < 0)
    )
    order = np.argsort(times_s, kind="stable")
    is_repeat = np.diff(times_s[order], prepend=-np.inf) <= 0
    issues.extend(
        ParseIssue(METADATA_FILE, lines[i], "duplicate", f"timestamp {times_s[i]:g} stands twice")
        for i in order[is_repeat]
    )
    return order[~is_repeat]
