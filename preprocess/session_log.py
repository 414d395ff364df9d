"""Keep one line of JSON per session in a few files, so that adding a session costs little.

The lines are a cache: any file may be deleted or damaged, and costs only that its sessions are read
again. After a crash, an older line may come back, so each line says for which files it holds. New
lines go into the file of level 0. A level that would exceed its size is merged into the next one,
which may be ``GROWTH`` times as large, as in a log-structured merge tree (O'Neil et al. 1996). So
of N sessions that are added one by one, each line is written ``GROWTH * log(N)`` times at most, and
few files are read. Of two lines of a session, that of the lower level is the newer one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

LEVEL_BYTES = 1 << 20
"""Most bytes of level 0."""

GROWTH = 8
MAX_LEVELS = 8

_START = '{"session": '


class LogFiles(Protocol):
    """Where a log keeps its files: a shard set, or a folder."""

    def read(self, name: str) -> bytes | None:
        """Read a file; None if it does not exist."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file, atomically."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        ...


def log_line(session: str, values: Mapping[str, object]) -> bytes:
    """Format the line of a session; its values follow the name."""
    line = json.dumps({"session": session, **values}, ensure_ascii=False)
    return line.encode("utf-8", "surrogatepass")


class SessionLog(Mapping[str, bytes]):
    """Lines by session name, as :func:`log_line` makes them; JSON that is parsed when needed.

    Args:
        files: where the files are.
        stem: first part of their names: STEM.jsonl, STEM.1.jsonl, ...
        present: names of the files that may exist, so that no request looks for others.
    """

    def __init__(self, files: LogFiles, stem: str, present: Collection[str]) -> None:
        self._files = files
        self._names = [f"{stem}.jsonl", *(f"{stem}.{n}.jsonl" for n in range(1, MAX_LEVELS))]
        self._present = {name for name in self._names if name in present}
        self._levels: list[dict[str, bytes]] = []
        """Lines of each file, the newest first."""
        for name in self._names:
            content = files.read(name) if name in present else None
            self._levels.append(_parse_lines(content or b""))
        self._new: dict[str, bytes] = {}

    def __getitem__(self, session: str) -> bytes:
        for lines in (self._new, *self._levels):
            if session in lines:
                return lines[session]
        raise KeyError(session)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for lines in (self._new, *self._levels) for name in lines))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def add(self, session: str, line: bytes) -> None:
        """Add or replace the line of a session; :meth:`save` writes it."""
        self._new[session] = line

    def save(self, sessions: Collection[str]) -> None:
        """Write the new lines; merged files keep only lines of these sessions."""
        if not self._new:
            return
        lines, merged = {n: line for n, line in self._new.items() if n in sessions}, []
        for level, name in enumerate(self._names):
            older = self._levels[level]
            lines = {**{n: line for n, line in older.items() if n in sessions}, **lines}
            size_bytes = sum(map(len, lines.values())) + len(lines)
            if size_bytes <= LEVEL_BYTES * GROWTH**level or level + 1 == MAX_LEVELS:
                break
            if name in self._present:
                merged.append(name)
        self._files.write(name, b"".join(line + b"\n" for line in lines.values()))
        for old in merged:  # after a crash here, they hide newer lines
            self._files.remove(old)
        self._present = self._present.difference(merged) | {name}
        self._levels[: level + 1] = [*({} for _ in range(level)), lines]
        self._new = {}


def _parse_lines(content: bytes) -> dict[str, bytes]:
    """Split a file into lines by session; leave out lines that don't begin like one."""
    lines: dict[str, bytes] = {}
    decoder = json.JSONDecoder()
    for line in content.split(b"\n"):
        try:
            # The name ends at the latest where the second key begins.
            head = line.partition(b', "')[0].decode("utf-8", "surrogatepass")
            name, _ = decoder.raw_decode(head, len(_START)) if head.startswith(_START) else ("", 0)
        except ValueError:
            continue
        if isinstance(name, str) and name:
            lines[name] = line
    return lines
