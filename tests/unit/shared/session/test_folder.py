"""Files of a session folder: bad lines are reported, and all others are read."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.sessions import sensor_lines, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import SessionError
from shared.recipe import Recipe, Stream
from shared.session.folder import (
    MAX_LINE_BYTES,
    Metadata,
    find_sessions,
    read_metadata,
    read_text_events,
    read_text_file,
    read_timed_lines,
)

if TYPE_CHECKING:
    from pathlib import Path


def read(folder: Path, content: bytes | str | None = None) -> Metadata:
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "metadata.jsonl").write_bytes(raw)
    return read_metadata(folder, touch_size=5, proprio_size=20)


def kinds(metadata: Metadata) -> list[tuple[int, str]]:
    return [(issue.line, issue.kind) for issue in metadata.issues]


def test_numbers_come_through_as_float32_in_file_order(tmp_path: Path) -> None:
    lines = sensor_lines()
    write_lines(tmp_path / "metadata.jsonl", lines)
    metadata = read(tmp_path)
    np.testing.assert_array_equal(metadata.times_s, [line["timestamp"] for line in lines])
    for key in ("touch", "proprio"):
        expected = np.array([line[key] for line in lines], dtype=np.float32)
        np.testing.assert_array_equal(getattr(metadata, key), expected)
    assert metadata.issues == ()


def test_a_missing_file_gives_no_lines_and_no_issue(tmp_path: Path) -> None:
    metadata = read(tmp_path)
    assert (len(metadata.times_s), metadata.touch.shape, metadata.issues) == (0, (0, 5), ())


def test_a_folder_in_place_of_the_file_is_an_issue_without_a_line(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").mkdir()
    assert kinds(read(tmp_path)) == [(0, "json")]


BAD_LINES = {
    "cut": (b'{"timestamp": 0.1, "tou', "json"),
    "array": (b"[1, 2]", "json"),
    "number": (b"12", "json"),
    "no utf-8": (b'{"timestamp": 1, "note": "\xff"}', "json"),
    "deep": (b"[" * 200_000, "json"),
    "long": (b'{"timestamp": 1, "x": "' + b"x" * MAX_LINE_BYTES + b'"}', "long"),
    "no time": (b"{}", "timestamp"),
    "text time": (b'{"timestamp": "0.1"}', "timestamp"),
    "true time": (b'{"timestamp": true}', "timestamp"),
    "nan time": (b'{"timestamp": NaN}', "timestamp"),
    "infinite time": (b'{"timestamp": 1e400}', "timestamp"),
    "nanoseconds": (b'{"timestamp": 1728546108163313160}', "timestamp"),
    "huge integer time": (b'{"timestamp": ' + b"9" * 400 + b"}", "timestamp"),
    "integer of 5000 digits": (b'{"timestamp": ' + b"9" * 5000 + b"}", "json"),
    "touch no list": (b'{"timestamp": 1, "touch": 3}', "number"),
    "touch short": (b'{"timestamp": 1, "touch": [0, 0]}', "size"),
    "touch null": (b'{"timestamp": 1, "touch": [0, 0, 0, 0, null]}', "number"),
    "touch huge": (b'{"timestamp": 1, "touch": [0, 0, 0, 0, %s]}' % (b"9" * 400), "number"),
    "touch over float32": (b'{"timestamp": 1, "touch": [0, 0, 0, 0, 1e39]}', "number"),
    "text no string": (b'{"timestamp": 1, "internal_text": ["a"]}', "text"),
    "half a character": (b'{"timestamp": 1, "internal_text": "\\ud83d"}', "text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_reported_and_its_neighbors_are_read(name: str, tmp_path: Path) -> None:
    raw, kind = BAD_LINES[name]
    metadata = read(tmp_path, b'{"timestamp": 0}\n' + raw + b'\n{"timestamp": 2}\n')
    assert kinds(metadata) == [(2, kind)]
    assert set(metadata.lines) >= {1, 3}
    assert not metadata.events


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"timestamp": 1, "proprio": [0]}', "proprio"),
        ('{"timestamp": 1, "touch": "x"}', "touch"),
        ('{"timestamp": 1, "external_text": 3}', "external_text"),
        ('{"timestamp": "x"}', "timestamp"),
        ("[]", ""),
    ],
)
def test_an_issue_names_the_key_at_fault(line: str, key: str, tmp_path: Path) -> None:
    assert [issue.key for issue in read(tmp_path, line).issues] == [key]


def test_a_line_with_a_bad_reading_keeps_its_time_and_other_reading(tmp_path: Path) -> None:
    line = {"timestamp": 1.5, "touch": [0.5], "proprio": [0.25] * 20}
    metadata = read(tmp_path, json.dumps(line))
    assert metadata.times_s.tolist() == [1.5]
    assert metadata.rows_with(Stream.PROPRIO).tolist() == [True]
    assert metadata.rows_with(Stream.TOUCH).tolist() == [False]


def test_windows_line_ends_a_byte_order_mark_and_blank_lines_are_no_issues(
    tmp_path: Path,
) -> None:
    metadata = read(tmp_path, b'\xef\xbb\xbf{"timestamp": 0}\r\n\r\n \n{"timestamp": 1}')
    assert (metadata.times_s.tolist(), metadata.lines.tolist()) == ([0.0, 1.0], [1, 4])
    assert metadata.issues == ()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=st.lists(st.integers(-5, 20), max_size=12))
def test_lines_are_sorted_and_the_first_of_equal_times_is_kept(
    tmp_path: Path, times: list[int]
) -> None:
    metadata = read(tmp_path, "".join(f'{{"timestamp": {t / 10}}}\n' for t in times))
    first = {t: i + 1 for i, t in reversed(list(enumerate(times)))}
    assert metadata.times_s.tolist() == [t / 10 for t in sorted(first)]
    assert metadata.lines.tolist() == [first[t] for t in sorted(first)]
    repeats = [i + 1 for i, t in enumerate(times) if first[t] != i + 1]
    back = [i + 2 for i, (a, b) in enumerate(itertools.pairwise(times)) if b < a]
    assert sorted(line for line, kind in kinds(metadata) if kind == "duplicate") == repeats
    assert [line for line, kind in kinds(metadata) if kind == "order"] == back


def test_a_step_back_says_how_far(tmp_path: Path) -> None:
    metadata = read(tmp_path, '{"timestamp": 5}\n{"timestamp": 1.5}\n')
    assert [(issue.line, issue.back_s) for issue in metadata.issues] == [(2, 3.5)]


def test_words_in_metadata_lines_become_events_and_blank_ones_do_not(tmp_path: Path) -> None:
    metadata = read(
        tmp_path,
        '{"timestamp": 1, "internal_text": "hm", "external_text": ""}\n'
        '{"timestamp": 2, "external_text": "né 🙂", "internal_text": null}\n'
        '{"timestamp": 3, "external_text": "  "}\n',
    )
    assert [(e.time_s, e.stream, e.text) for e in metadata.events] == [
        (1.0, Stream.INTERNAL_TEXT, "hm"),
        (2.0, Stream.EXTERNAL_TEXT, "né 🙂"),
    ]


def test_text_events_are_sorted_by_time_and_bad_ones_reported(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(
        '{"timestamp": 3, "stream": "external", "text": "c"}\n'
        '{"timestamp": 1, "stream": "internal", "text": "a"}\n'
        '{"timestamp": 2, "stream": "Internal", "text": "b"}\n'
        '{"timestamp": 2, "stream": "internal", "text": ""}\n'
        '{"timestamp": 2, "stream": "internal", "text": 7}\n'
        '{"timestamp": null, "stream": "internal", "text": "x"}\n'
    )
    events, issues = read_text_file(tmp_path)
    assert [event.text for event in events] == ["a", "c"]
    assert [(o.line, o.kind) for o in issues] == [
        (3, "stream"),
        (4, "text"),
        (5, "text"),
        (6, "timestamp"),
    ]


def test_sessions_are_found_by_name_below_a_folder_and_in_it(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "audio.wav").touch()
    (tmp_path / "a" / "text.jsonl").touch()
    (tmp_path / "c" / "notes.txt").touch()
    assert [path.name for path in find_sessions(tmp_path)] == ["a", "b"]
    assert find_sessions(tmp_path / "b") == [tmp_path / "b"]


def test_a_folder_without_sessions_is_an_error_that_names_what_a_session_is(
    tmp_path: Path,
) -> None:
    with pytest.raises(SessionError, match=r"metadata\.jsonl"):
        find_sessions(tmp_path)
    with pytest.raises(SessionError, match="no such folder"):
        find_sessions(tmp_path / "none")


def test_every_real_session_reads_without_an_issue(real_sessions: list[Path]) -> None:
    odd = {path.name: (*read(path).issues, *read_text_file(path)[1]) for path in real_sessions}
    assert not any(odd.values()), odd


# --- texts without sensors ---

KEYS = st.sampled_from(["internal_text", "external_text", "note", "text"])
LINES = st.fixed_dictionaries(
    {"timestamp": st.one_of(st.floats(0, 10), st.none(), st.text(max_size=3))},
    optional={"touch": st.just([0.5] * 5), "proprio": st.just([0.0] * 20)},
)
TEXTS = st.dictionaries(KEYS, st.one_of(st.text(max_size=8), st.integers()), max_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("session")


def expected(folder):
    return read_timed_lines(folder, recipe=Recipe())[1]


@given(
    st.lists(st.tuples(LINES, TEXTS, st.booleans()), max_size=8),
    st.sampled_from(["utf-8", "utf-16-be"]),
    st.lists(st.tuples(st.floats(0, 10), st.text(max_size=4)), max_size=4),
)
def test_texts_without_sensors_are_those_with_them(folder, lines, encoding, more):
    content = "".join(
        json.dumps({**line, **texts}, ensure_ascii=is_ascii) + "\n"
        for line, texts, is_ascii in lines
    )
    (folder / "metadata.jsonl").write_bytes(content.encode(encoding, "surrogatepass"))
    said = [{"timestamp": t, "stream": "internal", "text": text} for t, text in more]
    (folder / "text.jsonl").write_text("".join(json.dumps(x) + "\n" for x in said))
    assert read_text_events(folder) == expected(folder)


@pytest.mark.parametrize(
    "line",
    [
        b'{"timestamp": 1, "internal\\u005ftext": "escaped"}',
        b'{"timestamp": 1, "internal_text": "cut',
        b'{"timestamp": 1, "internal_text": "long' + b"x" * (1 << 20) + b'"}',
        b'{"internal_text": "no time"}',
        b'["internal_text"]',
    ],
)
def test_bad_lines_give_the_same_texts(folder, line):
    (folder / "metadata.jsonl").write_bytes(
        b'{"timestamp": 0, "external_text": "first"}\n' + line + b"\n"
    )
    assert read_text_events(folder) == expected(folder)
    assert expected(folder)


def test_a_session_without_files_has_no_text(tmp_path):
    assert read_text_events(tmp_path) == ()
