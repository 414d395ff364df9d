"""Texts of metadata lines found without reading the sensors are those found with them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.recipe import Recipe
from shared.session.folder import read_text_events, read_timed_lines

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
def test_odd_lines_give_the_same_texts(folder, line):
    (folder / "metadata.jsonl").write_bytes(
        b'{"timestamp": 0, "external_text": "first"}\n' + line + b"\n"
    )
    assert read_text_events(folder) == expected(folder)
    assert expected(folder)


def test_a_session_without_files_has_no_text(tmp_path):
    assert read_text_events(tmp_path) == ()
