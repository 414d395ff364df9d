"""Files of a session folder: bad lines are reported, and all others are read."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.sessions import make_readings, sensor_lines, write_lines, write_streams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import SessionError
from shared.recipe import Recipe
from shared.session.folder import (
    files_of_stream,
    is_session,
    read_readings,
    read_text_events,
    read_timed_lines,
    scanned_files,
    source_files,
    survey_sessions,
)
from shared.session.lines import MAX_ISSUES, Correction, SessionLines
from shared.session.tables import MAX_LINE_BYTES
from shared.values import clean_readings

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT = Recipe()
TEXTS = DEFAULT.of_kind("text")


def recipe_of(**streams: dict) -> Recipe:
    """Return a recipe of streams; sensors have one scalar unless they say otherwise."""
    for stream in streams.values():
        if stream.setdefault("kind", "sensor") == "sensor":
            stream.setdefault("values", [{"count": 1, "type": "scalar"}])
    return Recipe.model_validate({"streams": streams})


def read(folder: Path, content: bytes | str | None = None) -> SessionLines:
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "metadata.jsonl").write_bytes(raw)
    return read_timed_lines(folder, DEFAULT)


def kinds(lines: SessionLines) -> list[tuple[int, str]]:
    return [(issue.line, issue.kind) for issue in lines.issues]


# --- sensors of metadata.jsonl ---


def test_numbers_come_through_as_float32_in_file_order(tmp_path: Path) -> None:
    lines = sensor_lines()
    write_lines(tmp_path / "metadata.jsonl", lines)
    read_lines = read(tmp_path)
    for key in ("touch", "proprio"):
        readings = read_lines.readings[key]
        np.testing.assert_array_equal(readings.times_s, [line["timestamp"] for line in lines])
        expected = np.array([line[key] for line in lines], dtype=np.float32)
        np.testing.assert_array_equal(readings.values, expected)
        assert readings.lines.tolist() == list(range(1, len(lines) + 1))
    assert read_lines.issues == ()


def test_a_missing_file_gives_no_readings_and_no_issue(tmp_path: Path) -> None:
    lines = read(tmp_path)
    assert {name: r.values.shape for name, r in lines.readings.items()} == {
        "touch": (0, 5),
        "proprio": (0, 20),
    }
    assert (lines.files, lines.issues, lines.spans) == ((), (), {})


@pytest.mark.parametrize("file", ["metadata.jsonl", "gaze.csv", "gaze.parquet"])
def test_a_folder_in_place_of_a_file_is_an_issue_without_a_line(file: str, tmp_path: Path) -> None:
    (tmp_path / file).mkdir()
    lines = read_timed_lines(tmp_path, recipe_of(gaze={"file": file, "key": "gaze"}))
    assert kinds(lines) == [(0, "file")]
    assert lines.issues[0].source_line == file


BAD_LINES = {
    "cut": (b'{"timestamp": 0.1, "tou', "json"),
    "array": (b"[1, 2]", "json"),
    "number": (b"12", "json"),
    "no utf-8": (b'{"timestamp": 1, "note": "\xff"}', "encoding"),
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
    "touch text": (b'{"timestamp": 1, "touch": [0, 0, 0, 0, "1"]}', "number"),
    "touch nan": (b'{"timestamp": 1, "touch": [0, 0, 0, 0, NaN]}', "number"),
    "touch infinite": (b'{"timestamp": 1, "touch": [0, 0, 0, 0, -Infinity]}', "number"),
    "touch huge": (b'{"timestamp": 1, "touch": [0, 0, 0, 0, %s]}' % (b"9" * 400), "number"),
    "touch over float32": (b'{"timestamp": 1, "touch": [0, 0, 0, 0, 1e39]}', "number"),
    "text no string": (b'{"timestamp": 1, "internal_text": ["a"]}', "text"),
    "half a character": (b'{"timestamp": 1, "internal_text": "\\ud83d"}', "text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_reported_and_its_neighbors_are_read(name: str, tmp_path: Path) -> None:
    raw, kind = BAD_LINES[name]
    lines = read(tmp_path, b'{"timestamp": 0}\n' + raw + b'\n{"timestamp": 2}\n')
    assert kinds(lines) == [(2, kind)]
    assert set(lines.files[0].lines) >= {1, 3}
    assert lines.files[0].num_lines == 3
    assert lines.files[0].num_unread == (kind in ("json", "long", "timestamp"))
    assert not any(lines.events.values())
    assert not len(lines.readings["touch"].times_s)


@pytest.mark.parametrize(
    ("line", "key", "stream"),
    [
        ('{"timestamp": 1, "proprio": [0]}', "proprio", "proprio"),
        ('{"timestamp": 1, "touch": "x"}', "touch", "touch"),
        ('{"timestamp": 1, "external_text": 3}', "external_text", "external_text"),
        ('{"timestamp": "x"}', "timestamp", ""),
        ("[]", "", ""),
    ],
)
def test_an_issue_names_the_key_and_stream_at_fault(
    line: str, key: str, stream: str, tmp_path: Path
) -> None:
    assert [(i.key, i.stream) for i in read(tmp_path, line).issues] == [(key, stream)]


def test_a_wrong_count_says_what_to_write_in_the_recipe(tmp_path: Path) -> None:
    (issue,) = read(tmp_path, '{"timestamp": 1, "touch": [0, 0]}').issues
    assert issue.message == (
        "touch has 2 values, the recipe declares 5; fix: correct the counts of streams.touch.values"
    )
    assert issue.source_line == "metadata.jsonl line 1"


@pytest.mark.parametrize(
    "touch", ["null", "[null, null, null, null, null]", "[NaN, NaN, NaN, NaN, NaN]"]
)
def test_null_and_nan_are_missing_readings(touch: str, tmp_path: Path) -> None:
    lines = read(tmp_path, f'{{"timestamp": 1, "touch": {touch}}}\n')
    assert lines.issues == ()
    assert lines.readings["touch"].values.shape == (0, 5)
    assert lines.files[0].times_s.tolist() == [1.0]


def test_many_issues_of_a_kind_are_counted_by_the_last_one(tmp_path: Path) -> None:
    number = MAX_ISSUES + 234
    lines = read(
        tmp_path, "".join(f'{{"timestamp": {i}, "touch": [0]}}\n' for i in range(number)) + "[]"
    )
    sizes = [issue for issue in lines.issues if issue.kind == "size"]
    assert len(sizes) == MAX_ISSUES
    assert sum(issue.count for issue in sizes) == number
    assert {issue.count for issue in sizes[:-1]} == {1}
    assert kinds(lines)[-1] == (number + 1, "json")


def test_a_line_with_a_bad_reading_keeps_its_time_and_other_reading(tmp_path: Path) -> None:
    line = {"timestamp": 1.5, "touch": [0.5], "proprio": [0.25] * 20}
    lines = read(tmp_path, json.dumps(line))
    assert lines.readings["proprio"].times_s.tolist() == [1.5]
    assert lines.readings["touch"].times_s.tolist() == []


def test_windows_line_ends_a_byte_order_mark_and_blank_lines_are_no_issues(
    tmp_path: Path,
) -> None:
    (lines,) = read(tmp_path, b'\xef\xbb\xbf{"timestamp": 0}\r\n\r\n \n{"timestamp": 1}').files
    assert (lines.times_s.tolist(), lines.lines.tolist()) == ([0.0, 1.0], [1, 4])
    assert (lines.issues, lines.num_lines, lines.time_key) == ((), 2, "timestamp")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.tuples(st.integers(-2, 5), st.booleans(), st.booleans()), max_size=12))
def test_readings_are_sorted_and_the_first_of_equal_times_is_kept(
    tmp_path: Path, lines: list[tuple[int, bool, bool]]
) -> None:
    times = [time for time, *_ in lines]
    content = [
        {"timestamp": t / 10}
        | ({"touch": [i] * 5} if has_touch else {})
        | ({"proprio": [i] * 20} if has_proprio else {})
        for i, (t, has_touch, has_proprio) in enumerate(lines)
    ]
    write_lines(tmp_path / "metadata.jsonl", content)
    session = read_timed_lines(tmp_path, DEFAULT, is_cleaned=False)
    first = {t: i + 1 for i, t in reversed(list(enumerate(times)))}
    if lines:
        assert session.files[0].times_s.tolist() == [t / 10 for t in sorted(first)]
        assert session.files[0].lines.tolist() == [first[t] for t in sorted(first)]
    repeats = set()
    for column, name in ((1, "touch"), (2, "proprio")):
        kept: dict[int, int] = {}
        for i, line in enumerate(lines):
            if line[column] and kept.setdefault(line[0], i + 1) != i + 1:
                repeats.add(i + 1)
        readings = session.readings[name]
        assert readings.lines.tolist() == [kept[t] for t in sorted(kept)]
        assert readings.values[:, 0].tolist() == [kept[t] - 1 for t in sorted(kept)]
        assert readings.times_s.tolist() == [t / 10 for t in sorted(kept)]
    back = [i + 2 for i, (a, b) in enumerate(itertools.pairwise(times)) if b < a]
    assert sorted(line for line, kind in kinds(session) if kind == "conflict") == sorted(repeats)
    assert [line for line, kind in kinds(session) if kind == "order"] == back


def test_a_line_per_device_loses_no_stream_and_is_no_issue(tmp_path: Path) -> None:
    recipe = recipe_of(left={"key": "left"}, right={"key": "right"})
    lines = [{"timestamp": t, name: [t + 1]} for t in range(50) for name in ("left", "right")]
    write_lines(tmp_path / "metadata.jsonl", lines)
    session = read_timed_lines(tmp_path, recipe)
    assert session.issues == ()
    for readings in session.readings.values():
        assert readings.times_s.tolist() == [*range(50)]
        assert readings.values[:, 0].tolist() == [*range(1, 51)]
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('{"timestamp": 49, "right": [7]}\n')
    (issue,) = read_timed_lines(tmp_path, recipe).issues
    assert (issue.line, issue.kind, issue.message) == (
        101,
        "conflict",
        "timestamp 49 occurs again with another reading of right; the first is used",
    )


@pytest.mark.parametrize("is_cleaned", [True, False])
def test_a_reading_that_can_not_be_used_hides_none_of_the_same_time(
    is_cleaned: bool, tmp_path: Path
) -> None:
    recipe = recipe_of(q={"key": "q", "values": [{"count": 4, "type": "quaternion"}]})
    (tmp_path / "metadata.jsonl").write_text(
        '{"timestamp": 0, "q": [0, 0, 0, 0]}\n{"timestamp": 0, "q": [0, 0, 0, 1]}\n'
    )
    session = read_timed_lines(tmp_path, recipe, is_cleaned=is_cleaned)
    assert not any(issue.kind in ("repeat", "conflict") for issue in session.issues)
    assert session.readings["q"].lines.tolist() == ([2] if is_cleaned else [1, 2])


def test_rows_of_a_table_at_equal_times_keep_every_sensor(tmp_path: Path) -> None:
    recipe = recipe_of(
        left={"file": "hands.csv", "key": "left"}, right={"file": "hands.csv", "key": "right"}
    )
    (tmp_path / "hands.csv").write_text("timestamp,left,right\n0,1,\n0,,2\n1,3,\n1,,4\n1,,5\n")
    session = read_timed_lines(tmp_path, recipe)
    assert session.readings["left"].values[:, 0].tolist() == [1, 3]
    assert session.readings["right"].values[:, 0].tolist() == [2, 4]
    assert kinds(session) == [(6, "conflict")]


def test_a_step_back_says_how_far(tmp_path: Path) -> None:
    lines = read(tmp_path, '{"timestamp": 5}\n{"timestamp": 1.5}\n')
    assert [(issue.line, issue.back_s) for issue in lines.issues] == [(2, 3.5)]


# --- declared streams ---

STREAMS = recipe_of(
    temperature={"file": "temperature.csv", "key": "temperature", "rate_hz": 1},
    gaze={
        "file": "gaze.tsv", "rate_hz": 120, "time": "time [ns]", "time_unit": "ns",
        "values": [{"count": 6, "type": "direction", "names": list("abcdef")}],
    },
    head={
        "file": "head.parquet", "key": "pose", "rate_hz": 90,
        "values": [{"count": 3, "type": "position"}, {"count": 4, "type": "quaternion"}],
    },
    left={"file": "hands.jsonl", "key": "left", "values": [{"count": 8, "type": "quaternion"}]},
    right={
        "file": "hands.jsonl", "key": "right", "rate_hz": 60, "time": "right_ms",
        "time_unit": "ms", "values": [{"count": 4, "type": "quaternion"}],
    },
    parts={
        "file": "parts.jsonl", "values": [{"count": 2, "type": "fraction", "names": ["x.y", "z"]}]
    },
    imu={
        "file": "imu.csv", "key": "imu", "rate_hz": 200, "time_unit": "us",
        "values": [{"count": 6, "type": "scalar"}],
    },
    touch={"key": "touch", "rate_hz": 60, "values": [{"count": 5, "type": "fraction"}]},
    joints={"key": "joints", "rate_hz": 15, "values": [{"count": 9, "type": "angle"}]},
    inner={"kind": "text", "stream": "internal"},
    notes={"kind": "text", "file": "notes.jsonl"},
)  # fmt: skip
GAPS = {"imu": [(0.5, 1.0)], "head": [(0.0, 0.25)]}


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_streams(tmp_path_factory.mktemp("declared"), STREAMS, gaps=GAPS)


@pytest.mark.parametrize("name", STREAMS.of_kind("sensor"))
def test_every_declared_sensor_is_read_to_the_bit(name: str, declared: Path) -> None:
    spec = STREAMS.streams[name]
    readings = read_timed_lines(declared, STREAMS).readings[name]
    times_s, values = make_readings(spec, gaps=GAPS.get(name, ()))
    unit_s = 1 / spec.units_per_s
    np.testing.assert_allclose(readings.times_s, times_s, rtol=0, atol=max(1e-9, unit_s / 2))
    np.testing.assert_array_equal(readings.values, clean_readings(values, spec)[0])
    part = read_readings(declared, STREAMS, [name])
    assert list(part) == [name]
    for field in ("times_s", "values", "lines"):
        np.testing.assert_array_equal(getattr(part[name], field), getattr(readings, field))


def test_values_that_are_not_cleaned_are_as_recorded(declared: Path) -> None:
    readings = read_timed_lines(declared, STREAMS, is_cleaned=False).readings["left"]
    np.testing.assert_array_equal(readings.values, make_readings(STREAMS.streams["left"])[1])


def test_every_file_gives_its_lines_by_time_key(declared: Path) -> None:
    lines = read_timed_lines(declared, STREAMS)
    assert not lines.issues
    keys = {(f.file, f.time_key): f.streams for f in lines.files}
    assert keys[("hands.jsonl", "timestamp")] == ("left",)
    assert keys[("hands.jsonl", "right_ms")] == ("right",)
    assert set(keys[("metadata.jsonl", "timestamp")]) == {"touch", "joints", "inner"}
    assert keys[("notes.jsonl", "timestamp")] == ("notes",)
    assert set(lines.spans) == set(source_files(STREAMS))
    assert lines.spans["imu.csv"] == (0.0, 1.995)
    first_s, last_s = lines.spans["hands.jsonl"]
    assert (first_s, last_s) == (0.0, 1.983)


def test_another_divisor_replaces_the_declared_unit(declared: Path) -> None:
    lines = read_timed_lines(
        declared,
        STREAMS,
        corrections={
            "imu.csv": Correction(units_per_s=1e3),
            "text.jsonl": Correction(units_per_s=10.0),
        },
    )
    assert lines.spans["imu.csv"] == (0.0, 1995.0)
    assert lines.events["inner"][0].time_s == pytest.approx(0.02)


def test_several_time_keys_share_a_file(tmp_path: Path) -> None:
    recipe = recipe_of(
        a={"file": "x.jsonl", "key": "a", "time": "t_a"},
        b={"file": "x.jsonl", "key": "b", "time": "t_b", "time_unit": "ms"},
    )
    (tmp_path / "x.jsonl").write_text(
        '{"t_a": 1, "a": 10}\n'
        '{"t_b": 500, "b": [20]}\n'
        '{"t_a": 2, "a": [11], "t_b": 700, "b": [21]}\n'
        '{"a": 12}\n'
        '{"t_b": "x"}\n'
    )
    lines = read_timed_lines(tmp_path, recipe)
    assert lines.readings["a"].times_s.tolist() == [1.0, 2.0]
    assert lines.readings["b"].times_s.tolist() == [0.5, 0.7]
    assert lines.readings["b"].values.tolist() == [[20.0], [21.0]]
    assert [(i.line, i.key) for f in lines.files for i in f.issues] == [(4, "t_a"), (5, "t_b")]


def test_a_quaternion_of_almost_no_length_is_missing_and_reported(tmp_path: Path) -> None:
    recipe = recipe_of(q={"key": "q", "values": [{"count": 4, "type": "quaternion"}]})
    (tmp_path / "metadata.jsonl").write_text(
        '{"timestamp": 0, "q": [0, 0, 0, -2]}\n'
        '{"timestamp": 1, "q": [0, 0, 0, 0]}\n'
        '{"timestamp": 2, "q": [0, 0, 0.3, 0.3]}\n'
    )
    lines = read_timed_lines(tmp_path, recipe)
    assert lines.readings["q"].values.tolist() == [[0.0, 0.0, 0.0, 1.0]]
    assert [(i.line, i.kind, i.stream) for i in lines.issues] == [
        (2, "number", "q"),
        (3, "number", "q"),
    ]


# --- texts ---


def test_words_in_metadata_lines_become_events_and_blank_ones_do_not(tmp_path: Path) -> None:
    lines = read(
        tmp_path,
        '{"timestamp": 1, "internal_text": "hm", "external_text": ""}\n'
        '{"timestamp": 2, "external_text": "né 🙂", "internal_text": null}\n'
        '{"timestamp": 3, "external_text": "  "}\n',
    )
    events = {name: [(e.time_s, e.text) for e in events] for name, events in lines.events.items()}
    assert events == {"internal_text": [(1.0, "hm")], "external_text": [(2.0, "né 🙂")]}
    assert lines.events["external_text"][0].source_line == "metadata.jsonl line 2"


def test_text_events_are_sorted_by_time_and_bad_ones_reported(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(
        '{"timestamp": 3, "stream": "internal", "text": "c"}\n'
        '{"timestamp": 1, "stream": "internal", "text": "a"}\n'
        '{"timestamp": 1, "stream": "internal", "text": "b"}\n'
        '{"timestamp": 2, "stream": "Internal", "text": "b"}\n'
        '{"timestamp": 2, "stream": "internal", "text": ""}\n'
        '{"timestamp": 2, "stream": "internal", "text": 7}\n'
        '{"timestamp": null, "stream": "internal", "text": "x"}\n'
        '{"timestamp": 4, "text": "y"}\n'
    )
    lines = read_timed_lines(tmp_path, DEFAULT)
    assert [event.text for event in lines.events["internal_text"]] == ["a", "b", "c"]
    assert kinds(lines) == [
        (4, "stream"),
        (5, "text"),
        (6, "text"),
        (7, "timestamp"),
        (8, "stream"),
    ]
    assert lines.issues[0].message == (
        "stream is 'Internal', the recipe declares external, internal; did you mean "
        "internal? fix: correct it, or declare a text stream of it"
    )
    assert lines.spans == {"text.jsonl": (1.0, 3.0)}
    assert lines.files[0].num_lines == 8


def test_a_stream_without_a_filter_takes_all_lines_and_no_metadata_key(tmp_path: Path) -> None:
    recipe = recipe_of(
        all={"kind": "text", "file": "notes.jsonl"},
        some={"kind": "text", "file": "notes.jsonl", "stream": "1", "key": "word"},
    )
    (tmp_path / "notes.jsonl").write_text(
        '{"timestamp": 1, "text": "a"}\n{"timestamp": 2, "stream": 1, "text": "b"}\n'
    )
    (tmp_path / "metadata.jsonl").write_text('{"timestamp": 0, "word": "c", "1_text": "d"}\n')
    lines = read_timed_lines(tmp_path, recipe)
    texts = {name: [e.text for e in events] for name, events in lines.events.items()}
    assert texts == {"all": ["a", "b"], "some": ["c", "b"]}
    assert lines.issues == ()


def test_texts_may_be_in_a_file_of_readings(tmp_path: Path) -> None:
    recipe = recipe_of(
        glove={"file": "glove.jsonl", "key": "bend", "time": "ms", "time_unit": "ms"},
        label={"kind": "text", "file": "glove.jsonl", "time": "ms", "time_unit": "ms"},
        word={"kind": "text", "file": "metadata.jsonl"},
    )
    (tmp_path / "glove.jsonl").write_text(
        '{"ms": 500, "bend": 1}\n{"ms": 700, "bend": 2, "text": "grip"}\n'
    )
    (tmp_path / "metadata.jsonl").write_text('{"timestamp": 3}\n{"timestamp": 4, "text": "x"}\n')
    lines = read_timed_lines(tmp_path, recipe)
    assert lines.issues == ()
    assert [(e.time_s, e.text) for e in lines.events["label"]] == [(0.7, "grip")]
    assert [(e.time_s, e.text) for e in lines.events["word"]] == [(4.0, "x")]
    assert lines.spans["metadata.jsonl"] == (3.0, 4.0)


# --- texts with times of their own ---

TIME_KEYS = ["timestamp", "t", "u"]
FILES = ["metadata.jsonl", "x.jsonl", "y.jsonl"]
_OWN_TIME = {"time": st.sampled_from(TIME_KEYS), "time_unit": st.sampled_from(["s", "ms", "us"])}


@st.composite
def mixed_recipes(draw: st.DrawFn) -> Recipe:
    """Draw sensors and texts that share files, with time keys and units of their own."""
    streams: dict[str, dict] = {}
    for i, file in enumerate(FILES):
        for j in range(draw(st.integers(0, 2))):
            own = {key: draw(value) for key, value in _OWN_TIME.items()}
            streams[f"s{i}{j}"] = {"file": file, "key": f"v{j}", **own}
        for label in draw(st.sets(st.sampled_from([None, "a", "b"]))):
            own = {key: draw(value) for key, value in _OWN_TIME.items()}
            key = {"key": draw(st.sampled_from(["a_text", "word"]))} if draw(st.booleans()) else {}
            streams[f"t{i}{label or ''}"] = {
                "kind": "text", "file": file, "stream": label, **key, **own,
            }  # fmt: skip
    return recipe_of(**(streams or {"word": {"kind": "text"}}))


MIXED_LINES = st.fixed_dictionaries(
    {},
    optional={
        **{key: st.one_of(st.integers(0, 9), st.just("x")) for key in TIME_KEYS},
        **{key: st.lists(st.integers(0, 3), min_size=1, max_size=1) for key in ("v0", "v1")},
        **{key: st.sampled_from(["hm", " ", "", 5]) for key in ("a_text", "b_text", "word")},
        "text": st.sampled_from(["yes", "no", "", None]),
        "stream": st.sampled_from(["a", "b", "c"]),
    },
)


def slow_events(spec, content) -> list[tuple[float, str]]:
    """Return the events of a text stream, read line by line."""
    events = []
    for file in files_of_stream(spec):
        for line in content[file]:
            is_inline = file == "metadata.jsonl"
            text = line.get((spec.metadata_key or "text") if is_inline else "text")
            time = line.get(spec.time)
            is_own = is_inline or spec.stream in (None, line.get("stream"))
            if is_own and isinstance(time, int) and isinstance(text, str) and text.strip():
                events.append((time / {"s": 1, "ms": 1e3, "us": 1e6}[spec.time_unit], text))
    return sorted(events)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixed_recipes(), st.lists(st.lists(MIXED_LINES, max_size=6), min_size=3, max_size=3))
def test_a_scan_and_a_reader_see_the_same_events(tmp_path: Path, recipe, lines_of_file) -> None:
    content = dict(zip(FILES, lines_of_file, strict=True)) | {"text.jsonl": []}
    for file, its_lines in content.items():
        write_lines(tmp_path / file, its_lines)
    scanned = read_timed_lines(tmp_path, recipe)
    assert read_text_events(tmp_path, recipe, recipe.texts) == scanned.events
    for name, spec in recipe.texts.items():
        assert read_text_events(tmp_path, recipe, [name]) == {name: scanned.events[name]}
        found = sorted((event.time_s, event.text) for event in scanned.events[name])
        assert found == slow_events(spec, content)
        for file in files_of_stream(spec):
            for number, line in enumerate(content[file], start=1):
                if slow_events(
                    spec, {key: [] for key in content} | {file: [{**line, spec.time: 1}]}
                ):
                    reported = [i for i in scanned.issues if (i.file, i.line) == (file, number)]
                    is_read = any((e.file, e.line) == (file, number) for e in scanned.events[name])
                    assert is_read or reported, "a text was lost without an issue"


def test_texts_of_several_time_keys_share_a_file(tmp_path: Path) -> None:
    recipe = recipe_of(
        a={"kind": "text", "file": "x.jsonl", "stream": "a", "time": "t"},
        b={"kind": "text", "file": "x.jsonl", "stream": "b", "time": "ms", "time_unit": "ms"},
    )
    (tmp_path / "x.jsonl").write_text(
        '{"t": 1, "stream": "a", "text": "one"}\n'
        '{"ms": 500, "stream": "b", "text": "two"}\n'
        '{"ms": 500, "stream": "c", "text": "three"}\n'
        '{"ms": 500, "stream": "a", "text": "four"}\n'
    )
    lines = read_timed_lines(tmp_path, recipe)
    assert [(e.time_s, e.text) for e in lines.events["a"]] == [(1.0, "one")]
    assert [(e.time_s, e.text) for e in lines.events["b"]] == [(0.5, "two")]
    assert sorted(kinds(lines)) == [(3, "stream"), (4, "timestamp")]


def test_texts_beside_sensors_of_another_time_key_are_reported_not_lost(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"t": 1, "v": [1], "a_text": "hm"}\n{"t": 2}\n')
    sensor = {"key": "v", "time": "t"}
    silent = recipe_of(v=sensor, a={"kind": "text", "stream": "a"})
    assert [(i.line, i.kind) for i in read_timed_lines(tmp_path, silent).issues] == [
        (1, "timestamp")
    ]
    spoken = recipe_of(v=sensor, a={"kind": "text", "stream": "a", "time": "t"})
    lines = read_timed_lines(tmp_path, spoken)
    assert lines.issues == ()
    assert [e.text for e in lines.events["a"]] == ["hm"]


# --- texts without sensors ---

KEYS = ["internal_text", "external_text", "note", "text", "wörd", 'a"b\\c/d', "tab\t"]
KEYED = recipe_of(
    touch={"key": "touch", "values": [{"count": 5, "type": "fraction"}]},
    **{f"t{i}": {"kind": "text", "file": f"t{i}.jsonl", "key": key} for i, key in enumerate(KEYS)},
    internal={"kind": "text", "stream": "internal"},
)
LINES = st.fixed_dictionaries(
    {"timestamp": st.one_of(st.floats(0, 10), st.none(), st.text(max_size=3))},
    optional={"touch": st.just([0.5] * 5), "proprio": st.just([0.0] * 20)},
)
WORDS = st.dictionaries(
    st.sampled_from(KEYS), st.one_of(st.text(max_size=8), st.integers()), max_size=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("session")


@given(
    st.lists(st.tuples(LINES, WORDS, st.booleans()), max_size=8),
    st.sampled_from(["utf-8", "utf-16-be"]),
    st.lists(st.tuples(st.floats(0, 10), st.text(max_size=4)), max_size=4),
    st.booleans(),
)
def test_texts_without_sensors_are_those_with_them(folder, lines, encoding, more, is_slashed):
    content = "".join(
        json.dumps({**line, **texts}, ensure_ascii=is_ascii) + "\n"
        for line, texts, is_ascii in lines
    )
    content = content.replace("/", "\\/") if is_slashed else content
    (folder / "metadata.jsonl").write_bytes(content.encode(encoding, "surrogatepass"))
    said = [{"timestamp": t, "stream": "internal", "text": text} for t, text in more]
    (folder / "text.jsonl").write_text("".join(json.dumps(x) + "\n" for x in said))
    expected = read_timed_lines(folder, KEYED).events
    assert read_text_events(folder, KEYED, KEYED.of_kind("text")) == expected
    for name in ("t0", "t4", "t5", "internal"):
        assert read_text_events(folder, KEYED, [name]) == {name: expected[name]}


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
    expected = read_timed_lines(folder, DEFAULT).events
    assert read_text_events(folder, DEFAULT, TEXTS) == expected
    assert expected["external_text"]


def test_a_session_without_files_has_no_text(tmp_path):
    assert read_text_events(tmp_path, DEFAULT, TEXTS) == dict.fromkeys(TEXTS, ())


# --- files and sessions ---


def test_the_files_of_a_recipe_are_those_of_its_streams() -> None:
    assert source_files(DEFAULT) == (
        "audio.wav",
        "metadata.jsonl",
        "text.jsonl",
        "vision_left.mp4",
        "vision_right.mp4",
    )
    gaze = recipe_of(gaze={"file": "gaze.csv", "key": "g"})
    assert source_files(gaze) == ("gaze.csv",)
    assert scanned_files(gaze) == ("gaze.csv", "session.json")
    assert files_of_stream(DEFAULT.streams["internal_text"]) == ("text.jsonl", "metadata.jsonl")
    assert files_of_stream(STREAMS.streams["notes"]) == ("notes.jsonl",)


def test_sessions_are_found_by_name_below_a_folder_and_in_it(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "audio.wav").touch()
    (tmp_path / "a" / "text.jsonl").touch()
    (tmp_path / "c" / "gaze.csv").touch()
    assert [path.name for path in survey_sessions(tmp_path, Recipe()).folders] == ["a", "b"]
    assert survey_sessions(tmp_path / "b", Recipe()).folders == (tmp_path / "b",)
    gaze = recipe_of(gaze={"file": "gaze.csv", "key": "g"})
    assert [path.name for path in survey_sessions(tmp_path, gaze).folders] == ["c"]
    assert is_session(tmp_path / "c", gaze)
    assert not is_session(tmp_path / "c", DEFAULT)


def test_a_folder_without_sessions_is_an_error_that_names_what_a_session_is(
    tmp_path: Path,
) -> None:
    with pytest.raises(SessionError, match=r"metadata\.jsonl"):
        survey_sessions(tmp_path, Recipe())
    with pytest.raises(SessionError, match="no such folder"):
        survey_sessions(tmp_path / "none", Recipe())


def test_every_real_session_reads_without_an_issue(real_sessions: list[Path]) -> None:
    issues = {path.name: read(path).issues for path in real_sessions}
    assert not any(issues.values()), issues
