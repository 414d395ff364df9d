"""Files of a session folder: which ones exist, and the lines and texts in them.

Reading never stops at a bad line. A bad line is skipped, and a :class:`ParseIssue` describes it.
Validation prints the issues; the shard job writes them to ``rejected.jsonl``.
"""

from __future__ import annotations

import errno
import json
import math
import reprlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shared.errors import SessionError
from shared.recipe import Recipe, Stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

METADATA_FILE = "metadata.jsonl"
TEXT_FILE = "text.jsonl"
SESSION_INFO_FILE = "session.json"
AUDIO_FILE = "audio.wav"
VISION_FILES = {Stream.VISION_LEFT: "vision_left.mp4", Stream.VISION_RIGHT: "vision_right.mp4"}

SOURCE_FILES = (METADATA_FILE, TEXT_FILE, AUDIO_FILE, *VISION_FILES.values())
"""Files that samples are made of; other files in the folder are ignored."""

SCANNED_FILES = (*SOURCE_FILES, SESSION_INFO_FILE)
"""Files that a scan reads; of the last one, only ``start_s``."""

MAX_LINE_BYTES = 1 << 20
"""Longer lines are skipped."""

MAX_TIME_S = 1e12
"""Larger timestamps can't be seconds; they may be nanoseconds since 1970."""

MAX_VALUE = 3e38
"""Larger sensor values don't fit float32."""

_TEXT_STREAMS = {"internal": Stream.INTERNAL_TEXT, "external": Stream.EXTERNAL_TEXT}
_INLINE_TEXT_KEYS = {"internal_text": Stream.INTERNAL_TEXT, "external_text": Stream.EXTERNAL_TEXT}
_INLINE_TEXT_MARKS = (b"_text", b"\\u", b"\0")
"""A line that has one of the keys contains one of these: plain, escaped, or in UTF-16 or 32."""

IssueKind = Literal[
    "json", "timestamp", "order", "duplicate", "size", "number", "stream", "text", "long"
]


@dataclass(frozen=True, slots=True)
class ParseIssue:
    """Something in a file that can't be used as it is."""

    file: str
    line: int
    """1-based; 0 means the whole file."""
    kind: IssueKind
    message: str
    key: str = ""
    """JSON key whose value is at fault; empty if the whole line is."""
    back_s: float = 0.0
    """For ``order``: seconds by which the timestamp is earlier than the one before it."""


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
        """File and line of the event, for messages."""
        return f"{self.file} line {self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Sensor lines, sorted by time, without duplicates; missing values are NaN.

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
        """Select the lines that have a finite reading of touch or proprio, bool [N]."""
        values = self.touch if stream is Stream.TOUCH else self.proprio
        return np.asarray(np.isfinite(values).all(axis=1), dtype=np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A line that holds a JSON object."""

    file: str
    number: int
    values: dict[str, Any]

    def issue(self, kind: IssueKind, message: str, *, key: str = "") -> ParseIssue:
        return ParseIssue(self.file, self.number, kind, message, key)


def find_sessions(root: Path | str) -> list[Path]:
    """List the session folders below `root` (or `root` itself), sorted by name.

    A session folder holds at least one of the source files.

    Raises:
        SessionError: the folder doesn't exist or holds no session.
    """
    root = Path(root)
    if root.name in ("", ".."):
        root = root.resolve()  # a session is named after its folder
    if not root.is_dir():
        raise SessionError(
            f"{root}: no such folder; fix: give a session folder or a folder of session folders"
        )
    if is_session(root):
        return [root]
    sessions = sorted(
        (p for p in root.iterdir() if not p.name.startswith(".") and is_session(p)),
        key=lambda p: p.name,
    )
    if not sessions:
        raise SessionError(
            f"{root}: no session in it; fix: give a folder of session folders, each with at least "
            f"one of {', '.join(SOURCE_FILES)}"
        )
    return sessions


def is_session(path: Path) -> bool:
    """Check whether a folder holds at least one source file."""
    return any((path / name).exists() for name in SOURCE_FILES)


def read_timed_lines(
    path: Path, *, recipe: Recipe
) -> tuple[Metadata, tuple[TextEvent, ...], tuple[ParseIssue, ...]]:
    """Read everything of a session that has timestamps, still on the recorder's clock.

    Args:
        path: the session folder.
        recipe: decides how many values a reading must have.

    Returns:
        The sensor lines, the text events of both files sorted by time, and what was skipped.
    """
    metadata = read_metadata(
        path, touch_size=recipe.sensors.touch_size, proprio_size=recipe.sensors.proprio_size
    )
    events, issues = read_text_file(path)
    return metadata, _sorted_events([*metadata.events, *events]), (*metadata.issues, *issues)


def read_text_events(path: Path) -> tuple[TextEvent, ...]:
    """Read the same events as :func:`read_timed_lines`, without parsing the sensor lines."""
    events, _ = read_text_file(path)
    return _sorted_events([*_read_inline_texts(path), *events])


def read_metadata(
    path: Path, *, touch_size: int, proprio_size: int, units_per_s: float = 1.0
) -> Metadata:
    """Read ``metadata.jsonl`` of a session folder; a missing file gives no lines.

    Args:
        path: the session folder.
        touch_size: number of values in a touch reading.
        proprio_size: number of values in a proprio reading.
        units_per_s: divides the timestamps.
    """
    # Arrays hold an hour at 90 Hz in 40 MB; lists take 300 MB.
    times, numbers = array("d"), array("q")
    touch, proprio = array("f"), array("f")
    events: list[TextEvent] = []
    issues: list[ParseIssue] = []
    for line in _iter_lines(path / METADATA_FILE, issues):
        time_s = _timestamp(line, issues, units_per_s=units_per_s)
        if time_s is None:
            continue
        times.append(time_s)
        numbers.append(line.number)
        touch.extend(_reading(line, "touch", issues, size=touch_size))
        proprio.extend(_reading(line, "proprio", issues, size=proprio_size))
        events += _inline_texts(line, time_s, issues)
    times_s = np.asarray(times, dtype=np.float64)
    order = _increasing_order(times_s, numbers, issues)
    is_in_order = len(order) == len(times) and bool((np.diff(order) == 1).all())
    kept = slice(None) if is_in_order else order  # a slice copies nothing
    return Metadata(
        times_s=times_s[kept],
        touch=np.asarray(touch, dtype=np.float32).reshape(-1, touch_size)[kept],
        proprio=np.asarray(proprio, dtype=np.float32).reshape(-1, proprio_size)[kept],
        lines=np.asarray(numbers, dtype=np.int64)[kept],
        events=tuple(events),
        issues=tuple(issues),
    )


def read_text_file(
    path: Path, *, units_per_s: float = 1.0
) -> tuple[list[TextEvent], list[ParseIssue]]:
    """Read ``text.jsonl`` of a session folder, sorted by time; a missing file gives no events.

    Args:
        path: the session folder.
        units_per_s: divides the timestamps.
    """
    events: list[TextEvent] = []
    issues: list[ParseIssue] = []
    for line in _iter_lines(path / TEXT_FILE, issues):
        time_s = _timestamp(line, issues, units_per_s=units_per_s)
        stream = _TEXT_STREAMS.get(str(line.values.get("stream")))
        if stream is None:
            name = reprlib.repr(line.values.get("stream"))
            message = f"stream is {name}; expected 'internal' or 'external'"
            issues.append(line.issue("stream", message, key="stream"))
            continue
        num_issues = len(issues)
        text = _text(line, "text", issues)
        if text is None and len(issues) == num_issues:
            issues.append(line.issue("text", "no text", key="text"))
        elif text is not None and time_s is not None:
            events.append(TextEvent(time_s, stream, text, line.file, line.number))
    return list(_sorted_events(events)), issues


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """Parse a line into its JSON object, or None and the reason why it has none."""
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        is_cut = not raw.endswith(b"\n")
        return None, "the last line is cut off" if is_cut else "not JSON"
    return (values, "") if isinstance(values, dict) else (None, "not a JSON object")


def parse_timestamp(values: dict[str, Any], *, units_per_s: float = 1.0) -> float | None:
    """Return the timestamp of a line in seconds, or None if it isn't a usable number."""
    value = values.get("timestamp")
    time = None if isinstance(value, bool) else _finite(value)
    if time is None or abs(time / units_per_s) >= MAX_TIME_S:
        return None
    return time / units_per_s


def _sorted_events(events: list[TextEvent]) -> tuple[TextEvent, ...]:
    return tuple(sorted(events, key=lambda event: event.time_s))


def _read_inline_texts(path: Path) -> list[TextEvent]:
    """Read the texts of ``metadata.jsonl`` in order of the file, parsing only lines that hold one.

    The events are the ones that :func:`read_metadata` returns.
    """
    events: list[TextEvent] = []
    for line in _iter_lines(path / METADATA_FILE, [], marks=_INLINE_TEXT_MARKS):
        time_s = parse_timestamp(line.values)
        if time_s is not None:
            events += _inline_texts(line, time_s, [])
    return events


def _iter_lines(
    path: Path, issues: list[ParseIssue], *, marks: tuple[bytes, ...] = ()
) -> Iterator[_Line]:
    """Yield each line that holds a JSON object; other lines become issues.

    Args:
        path: the file; a missing file has no lines.
        issues: list that the issues are appended to.
        marks: if there are any, lines without one of these bytes are skipped.
    """
    try:
        if path.exists() and not path.is_file():
            raise IsADirectoryError(errno.EISDIR, "not a regular file")
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
                message = f"line over {MAX_LINE_BYTES} bytes"
                issues.append(ParseIssue(path.name, number, "long", message))
                continue
            if not raw.strip() or (marks and not any(mark in raw for mark in marks)):
                continue
            values, message = parse_line(raw)
            if values is None:
                issues.append(ParseIssue(path.name, number, "json", message))
            else:
                yield _Line(file=path.name, number=number, values=values)


def _timestamp(line: _Line, issues: list[ParseIssue], *, units_per_s: float) -> float | None:
    """Return the line's timestamp, or None and an issue."""
    time_s = parse_timestamp(line.values, units_per_s=units_per_s)
    if time_s is None:
        value = reprlib.repr(line.values.get("timestamp"))
        message = f"timestamp is {value}, not a usable number of seconds"
        issues.append(line.issue("timestamp", message, key="timestamp"))
    return time_s


def _inline_texts(line: _Line, time_s: float, issues: list[ParseIssue]) -> Iterator[TextEvent]:
    """Yield the texts of a metadata line."""
    for key, stream in _INLINE_TEXT_KEYS.items():
        text = _text(line, key, issues)
        if text is not None:
            yield TextEvent(time_s, stream, text, line.file, line.number)


def _text(line: _Line, key: str, issues: list[ParseIssue]) -> str | None:
    """Return a text that isn't blank; a value that can't be a text becomes an issue."""
    text = line.values.get(key)
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        issues.append(line.issue("text", f"{key} is not a string", key=key))
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{key} contains half a character (a surrogate)"
        issues.append(line.issue("text", message, key=key))
        return None
    return text if text.strip() else None


def _reading(line: _Line, key: str, issues: list[ParseIssue], *, size: int) -> list[float]:
    """Return `size` finite numbers, or NaNs; a reading of another form becomes an issue."""
    missing = [math.nan] * size
    numbers = line.values.get(key)
    if numbers is None:
        return missing
    if not isinstance(numbers, list):
        issues.append(line.issue("number", f"{key} is not a list", key=key))
        return missing
    if len(numbers) != size:
        message = (
            f"{key} has {len(numbers)} values, the recipe wants {size}; "
            f"fix: set sensors.{key}_size: {len(numbers)}"
        )
        issues.append(line.issue("size", message, key=key))
        return missing
    finite = [v for v in map(_finite, numbers) if v is not None and abs(v) < MAX_VALUE]
    if len(finite) != size:
        message = f"{key} contains a value that is not a finite number"
        issues.append(line.issue("number", message, key=key))
        return missing
    return finite


def _finite(value: object) -> float | None:
    """Return a JSON number as a finite float, else None."""
    if not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def _increasing_order(
    times_s: NDArray[np.float64], lines: Sequence[int], issues: list[ParseIssue]
) -> NDArray[np.int64]:
    """Sort the lines by time and keep the first of equal times; return their indices."""
    steps = np.diff(times_s)
    issues.extend(
        ParseIssue(
            METADATA_FILE,
            lines[int(i) + 1],
            "order",
            f"timestamp {times_s[i + 1]:g} is before the line above",
            key="timestamp",
            back_s=float(-steps[i]),
        )
        for i in np.flatnonzero(steps < 0)
    )
    order = np.argsort(times_s, kind="stable")
    is_repeat = np.diff(times_s[order], prepend=-np.inf) <= 0
    issues.extend(
        ParseIssue(
            METADATA_FILE,
            lines[i],
            "duplicate",
            f"timestamp {times_s[i]:g} occurs twice",
            key="timestamp",
        )
        for i in order[is_repeat]
    )
    return order[~is_repeat]
