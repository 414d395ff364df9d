"""The log of sessions holds what a dictionary holds, in few files, and costs little to extend."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess import session_log
from preprocess.session_log import SessionLog, log_line


class Files:
    """Files in memory, that count the bytes that are written."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.written_bytes = 0

    def read(self, name: str) -> bytes | None:
        return self.content.get(name)

    def write(self, name: str, content: bytes) -> None:
        self.content[name] = content
        self.written_bytes += len(content)

    def remove(self, name: str) -> None:
        self.content.pop(name, None)

    def open(self) -> SessionLog:
        return SessionLog(self, "sessions", self.content)


NAMES = st.text(min_size=1, max_size=3) | st.sampled_from(['a", "b', "é, ü", "\ud800"])


@given(
    runs=st.lists(st.dictionaries(NAMES, st.integers(), max_size=4), max_size=12),
    gone=st.sets(NAMES, max_size=2),
)
def test_a_log_holds_what_a_dictionary_holds(runs, gone):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_log, "LEVEL_BYTES", 100)
        patch.setattr(session_log, "GROWTH", 2)
        files, expected = Files(), {}
        for values in runs:
            log = files.open()
            for name, value in values.items():
                log.add(name, log_line(name, {"value": value}))
            expected |= values
            log.save(expected)
            assert {n: json.loads(line)["value"] for n, line in log.items()} == expected
        log = files.open()
        assert {n: json.loads(line)["value"] for n, line in log.items()} == expected
        assert len(log) == len(expected)
        kept = expected.keys() - gone
        log.add("new", log_line("new", {"value": 0}))
        log.save({*kept, "new"})
        assert kept <= set(files.open())


class StoppedError(Exception):
    """The process ends."""


@given(
    runs=st.lists(st.dictionaries(NAMES, st.integers(), min_size=1, max_size=4), max_size=12),
    num_steps=st.integers(0, 12),
)
def test_a_crash_brings_back_older_lines_at_most(runs, num_steps):
    class Stopping(Files):
        num_steps = 0

        def count(self) -> None:
            self.num_steps += 1
            if self.num_steps > num_steps:
                raise StoppedError

        def write(self, name: str, content: bytes) -> None:
            self.count()
            super().write(name, content)

        def remove(self, name: str) -> None:
            self.count()
            super().remove(name)

    files, saved, before = Stopping(), {}, {}
    with pytest.MonkeyPatch.context() as patch, suppress(StoppedError):
        patch.setattr(session_log, "LEVEL_BYTES", 100)
        patch.setattr(session_log, "GROWTH", 2)
        for values in runs:
            log = files.open()
            for name, value in values.items():
                log.add(name, log_line(name, {"value": value}))
                before.setdefault(name, set()).add(value)
            log.save(before)
            saved |= values
    found = {n: json.loads(line)["value"] for n, line in files.open().items()}
    assert saved.keys() <= found.keys()
    assert all(value in before[name] for name, value in found.items())


def test_adding_sessions_one_by_one_writes_little(monkeypatch):
    monkeypatch.setattr(session_log, "LEVEL_BYTES", 20_000)
    monkeypatch.setattr(session_log, "GROWTH", 4)
    files, names = Files(), {}
    for number in range(1000):
        name = f"s{number:04d}"
        names[name] = log_line(name, {"scan": "x" * 1000})
        log = files.open()
        log.add(name, names[name])
        log.save(names)
    assert dict(files.open()) == names
    assert len(files.content) <= 5
    # Level 0 is written whole each time, half full on average; each further level 4 times.
    line_bytes = len(names[name]) + 1
    assert files.written_bytes / len(names) < 20_000 / 2 + 4 * line_bytes * 4
    # Written as one file, it would be half of them each time.
    assert files.written_bytes < len(names) * len(names) * line_bytes / 2 / 20


def test_damaged_lines_are_left_out():
    files = Files()
    good = log_line("good", {"value": 1})
    files.content["sessions.jsonl"] = b"\n".join([good, good[:9], b"{}", b"\xff", b"[]", b""])
    assert dict(files.open()) == {"good": good}
