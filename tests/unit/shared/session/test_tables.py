"""Tables of numbers agree with stock readers, whatever their dialect; bad rows are named."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shared.recipe import Recipe
from shared.session import tables
from shared.session.folder import read_timed_lines
from shared.session.tables import (
    MAX_COLUMNS,
    MAX_LINE_BYTES,
    TableBlock,
    TableError,
    choose_columns,
    open_table,
)
from shared.streams import TIME_UNITS

if TYPE_CHECKING:
    from pathlib import Path

    from shared.session.lines import SessionLines


def read_cells(
    content: bytes, columns: list[str], *, suffix: str = ".csv", wanted: set[str] | None = None
) -> TableBlock:
    """Read columns of one value each, and join the blocks."""
    table = open_table(io.BytesIO(content), suffix, wanted=wanted or {*columns})
    blocks = list(table.iter_blocks(dict.fromkeys(columns, 1)))
    empty = np.zeros((0, len(columns)))
    return TableBlock(
        np.concatenate([np.zeros(0, np.int64), *(block.lines for block in blocks)]),
        np.concatenate([empty, *(np.hstack(list(block.cells.values())) for block in blocks)]),
        tuple(issue for block in blocks for issue in block.issues),
    )


def read(folder: Path, file: str, content: bytes | str, **stream: object) -> SessionLines:
    """Read one sensor stream `x` of a file; it has two scalars unless `stream` says otherwise."""
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    keys = {"kind": "sensor", "file": file, "key": "x", "rate_hz": 30, **stream}
    keys.setdefault("values", [{"count": 2, "type": "scalar"}])
    return read_timed_lines(folder, Recipe.model_validate({"streams": {"x": keys}}))


# --- dialects of text tables ---

NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(10**20), 10**20).map(str),
    st.decimals(-100, 100, places=6).map(str),
)
CELLS = st.one_of(NUMBERS, st.sampled_from(["", "nan", "NaN", "null", "NA", "true", "False"]))
TEXTS = st.text(alphabet="ab ,;\t\"'.0é#", max_size=6)
VALUES = {"": math.nan, "nan": math.nan, "null": math.nan, "na": math.nan, "true": 1, "false": 0}


def value_of(cell: str) -> float:
    cell = cell.strip().lower()
    return VALUES[cell] if cell in VALUES else float(cell)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.tuples(CELLS, TEXTS, CELLS, CELLS), min_size=1, max_size=8),
    delimiter=st.sampled_from([",", ";", "\t"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    has_comma=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    has_end=st.booleans(),
)
def test_every_dialect_gives_the_numbers_that_the_csv_module_reads(
    rows, delimiter, quoting, line_end, has_comma, encoding, has_end
):
    has_comma = has_comma and delimiter != ","
    # rows of nothing but blanks and tabs count as blank lines
    assume(delimiter != "\t" or all(any(cell.strip() for cell in row) for row in rows))
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=line_end)
    writer.writerow(["t", "note", "a b", "c"])
    for t, text, *cells in rows:
        texts = [c.replace(".", ",") if has_comma else c for c in (t, *cells)]
        writer.writerow([texts[0], text, *texts[1:]])
    content = file.getvalue() if has_end else file.getvalue().removesuffix(line_end)
    block = read_cells(content.encode(encoding), ["a b", "t"])
    expected, lines = [], []
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter)
    next(reader)
    last = reader.line_num
    for row in reader:
        cells = [row[2], row[0]]
        expected.append([value_of(c.replace(",", ".") if has_comma else c) for c in cells])
        lines.append(last + 1)
        last = reader.line_num
    np.testing.assert_array_equal(block.cells, np.array(expected).reshape(-1, 2))
    assert block.lines.tolist() == lines
    assert block.issues == ()


@given(
    rows=st.lists(
        st.lists(st.text("0123456789.eE+-_naifx, \t\"'d٣", max_size=5), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    delimiter=st.sampled_from([",", ";"]),
)  # fmt: skip
def test_the_fast_path_gives_what_the_slow_one_does(rows, delimiter):
    content = "".join(delimiter.join(row) + "\n" for row in [["a", "b", "c"], *rows])
    fast = read_cells(content.encode(), ["a", "c"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables._DelimitedTable, "_parse_fast", lambda *_: None)
        slow = read_cells(content.encode(), ["a", "c"])
    assert fast.lines.tolist() == slow.lines.tolist()
    np.testing.assert_array_equal(np.abs(fast.cells), np.abs(slow.cells))
    assert fast.issues == slow.issues


@given(
    values=st.lists(
        st.tuples(st.floats(-1e6, 1e6), *[st.one_of(st.none(), st.floats(-1e6, 1e6))] * 3),
        min_size=1,
        max_size=20,
    ),
    separator=st.sampled_from([";", "\t"]),
)
def test_tables_of_pandas_read_back(values, separator):
    frame = pd.DataFrame(values, columns=["t", "x", "y", "z"], dtype=float)
    content = frame.to_csv(sep=separator, decimal=",", index=False)
    block = read_cells(content.encode(), ["t", "x", "y", "z"])
    stock = pd.read_csv(io.StringIO(content), sep=separator, decimal=",").to_numpy(dtype=float)
    np.testing.assert_allclose(block.cells, stock, rtol=1e-15)
    np.testing.assert_array_equal(block.cells, frame.to_numpy(dtype=float))


def test_blocks_join_to_the_whole_file(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(500, 4)), columns=list("tabc"))
    frame.insert(1, "note", ["x,y" if i % 7 == 0 else "z" for i in range(500)])
    frame.loc[::11, "b"] = np.nan
    content = frame.to_csv(index=False).encode()
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1000)
    block = read_cells(content, ["t", "b", "c"])
    np.testing.assert_array_equal(block.cells, frame[["t", "b", "c"]].to_numpy())
    np.testing.assert_array_equal(block.lines, np.arange(500) + 2)


@pytest.mark.parametrize("first", ["\n\n", "\ufeff"])
def test_what_stands_before_the_header_is_skipped(first: str) -> None:
    block = read_cells((first + "t;x\n1;2,5\n").encode(), ["t", "x"])
    assert block.cells.tolist() == [[1.0, 2.5]]


def test_the_wanted_columns_decide_the_delimiter() -> None:
    content = b"time, seconds;x, m\n1;2\n"
    assert read_cells(content, ["time, seconds", "x, m"]).cells.tolist() == [[1.0, 2.0]]


# --- rows that can't be read ---

BAD_ROWS = {
    "short": "1,2",
    "cut": "1,",
    "long": "1,2,3,4",
    "quote": '1,"2,3',
    "quote inside": '1,"2"5,3',
    "no number of cells": "a line of text",
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_reported_and_its_neighbors_are_read(name: str, tmp_path: Path) -> None:
    content = f"timestamp,x_0,x_1\n0,1,2\n{BAD_ROWS[name]}\n2,3,4\n5,6,7,,\n"
    lines = read(tmp_path, "a.csv", content)
    assert [(i.line, i.kind) for i in lines.issues] == [(3, "row")]
    assert lines.readings["x"].lines.tolist() == [2, 4, 5]
    assert (lines.files[0].num_lines, lines.files[0].num_unread) == (4, 1)


def test_a_long_line_is_skipped(tmp_path: Path) -> None:
    long_line = "9" * (MAX_LINE_BYTES + 5)
    lines = read(tmp_path, "a.csv", f"timestamp,x_0,x_1\n0,1,2\n{long_line}\n2,3,4\n")
    assert [(i.line, i.kind) for i in lines.issues] == [(3, "long")]
    assert lines.readings["x"].lines.tolist() == [2, 4]


def test_a_quote_that_is_never_closed_loses_one_row(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i},1\n" for i in range(300))
    lines = read(tmp_path, "a.csv", f'timestamp,x_0,x_1\n-1,"5,1\n{rows}')
    assert [(i.line, i.kind) for i in lines.issues] == [(2, "row")]
    assert lines.readings["x"].lines.tolist() == list(range(3, 303))


def test_cells_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    content = "timestamp,x_0,x_1\n0,1,2\nabc,1,2\n1e15,1,2\n2,north,2\n3,,\n4,1e39,1\n5,,1\n,1,2\n"
    lines = read(tmp_path, "a.csv", content)
    assert [(i.line, i.kind, i.key) for i in lines.issues] == [
        (3, "timestamp", "timestamp"),
        (4, "timestamp", "timestamp"),
        (5, "number", "x"),
        (7, "number", "x"),
        (8, "number", "x"),
        (9, "timestamp", "timestamp"),
    ]
    assert lines.issues[0].message == "timestamp is no number, not a usable number of seconds"
    assert lines.readings["x"].values.tolist() == [[1.0, 2.0]]
    assert lines.files[0].times_s.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0]


def test_rows_of_a_table_are_sorted_by_time(tmp_path: Path) -> None:
    lines = read(tmp_path, "a.csv", "timestamp,x_0,x_1\n3,1,1\n1,2,2\n2,3,3\n1,4,4\n")
    assert lines.readings["x"].times_s.tolist() == [1.0, 2.0, 3.0]
    assert lines.readings["x"].values[:, 0].tolist() == [2.0, 3.0, 1.0]
    assert [(i.line, i.kind, i.back_s) for i in lines.issues] == [
        (3, "order", 2.0),
        (5, "order", 1.0),
        (5, "conflict", 0.0),
    ]


# --- columns ---

COLUMNS = {
    "numbers in order": (["x_1", "x_10", "x_2", "x_0"], 4, ["x_0", "x_1", "x_2", "x_10"]),
    "dots": (["x.0", "x.1"], 2, ["x.0", "x.1"]),
    "brackets": (["x[0]", "y", "x[1]"], 2, ["x[0]", "x[1]"]),
    "words in file order": (["x_yaw", "y", "x_pitch", "xy"], 2, ["x_yaw", "x_pitch"]),
    "one value": (["x", "x_0"], 1, ["x"]),
    "the column itself is not enough": (["x", "x_a", "x_b"], 2, ["x_a", "x_b"]),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_key_chooses_columns(name: str) -> None:
    names, size, expected = COLUMNS[name]
    table = open_table(io.BytesIO(",".join(names).encode() + b"\n"), ".csv", wanted=())
    assert choose_columns(table, "x", size=size) == expected


FAULTS = {
    "no time": (
        "t,x_0,x_1", {}, "column",
        "no column timestamp; its columns are ['t', 'x_0', 'x_1']; fix: correct `time` or the file",
    ),
    "no columns": (
        "timestamp,y", {}, "column",
        "no column x; its columns are ['timestamp', 'y']; fix: correct `key` or the file",
    ),
    "no named column": (
        "timestamp,a", {"key": None, "values": [{"count": 1, "type": "scalar", "names": ["b"]}]},
        "column",
        "no column b; its columns are ['timestamp', 'a']; fix: correct `values` or the file",
    ),
    "twice": (
        "timestamp,a,a", {"key": None, "values": [{"count": 1, "type": "scalar", "names": ["a"]}]},
        "column",
        "2 columns are called a; its columns are",
    ),
    "count": (
        "timestamp,x_0,x_1,x_2", {}, "size",
        "3 columns belong to x, the recipe declares 2; fix: correct the counts of streams.x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_missing_columns_are_one_issue_of_the_header(name: str, tmp_path: Path) -> None:
    header, stream, kind, message = FAULTS[name]
    rows = [",".join([cell] * len(header.split(","))) for cell in "12"]
    lines = read(tmp_path, "a.csv", "\n".join([header, *rows]), **stream)
    (issue,) = lines.issues
    assert (issue.line, issue.kind) == (1, kind)
    assert issue.message.startswith(message)
    assert len(lines.readings["x"].times_s) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header line"),
        (b"\n\n", "no header line"),
        (b"x" * (MAX_LINE_BYTES + 9), "no header line"),
        (b"," * MAX_COLUMNS, f"{MAX_COLUMNS + 1} columns exceed"),
    ],
)
def test_a_table_without_a_usable_header_is_one_issue(
    content: bytes, message: str, tmp_path: Path
) -> None:
    lines = read(tmp_path, "a.csv", content)
    assert [(i.line, i.kind) for i in lines.issues] == [(0, "file")]
    assert lines.issues[0].message.startswith(message)


def test_streams_of_one_table_are_read_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalar = [{"count": 1, "type": "scalar"}]
    streams = {
        "a": {"key": "a", "values": scalar},
        "b": {"key": "b", "values": [{"count": 2, "type": "scalar"}]},
        "c": {"key": "b_x", "values": scalar, "time": "t2", "time_unit": "ms"},
    }
    keys = {"kind": "sensor", "file": "a.csv", "rate_hz": 30}
    recipe = Recipe.model_validate({"streams": {n: {**keys, **s} for n, s in streams.items()}})
    (tmp_path / "a.csv").write_text("timestamp,a,b_x,b_y,t2\n1,2,3,4,500\n2,,5,6,\n3,7,,,900\n")
    opened = []
    open_file = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *args: (opened.append(path), open_file(path, *args))[1]
    )
    lines = read_timed_lines(tmp_path, recipe)
    assert len(opened) == 1
    readings = {
        n: (r.times_s.tolist(), r.values.tolist(), r.lines.tolist())
        for n, r in lines.readings.items()
    }
    assert readings == {
        "a": ([1.0, 3.0], [[2.0], [7.0]], [2, 4]),
        "b": ([1.0, 2.0], [[3.0, 4.0], [5.0, 6.0]], [2, 3]),
        "c": ([0.5], [[3.0]], [2]),
    }
    assert [(i.line, i.kind, i.key) for i in lines.issues] == [(3, "timestamp", "t2")]


# --- Parquet ---


def write_parquet(path: Path, columns: dict[str, pa.Array], **options: object) -> bytes:
    pq.write_table(pa.table(columns), path, **options)
    return path.read_bytes()


ARROW_LISTS = [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float64(), 2)]


@pytest.mark.parametrize("kind", ARROW_LISTS, ids=str)
def test_lists_of_a_parquet_column_are_readings(kind: pa.DataType, tmp_path: Path) -> None:
    values = [[1.5, 2.0], None, [3.0, 4.0], [None, None], [5.0, None], [6.0, 7.0]]
    columns = {"timestamp": pa.array(np.arange(6.0)), "x": pa.array(values, kind)}
    content = write_parquet(tmp_path / "b.parquet", columns, row_group_size=2)
    lines = read(tmp_path, "a.parquet", content)
    assert lines.readings["x"].values.tolist() == [[1.5, 2.0], [3.0, 4.0], [6.0, 7.0]]
    assert lines.readings["x"].lines.tolist() == [1, 3, 6]
    assert [(i.source_line, i.kind) for i in lines.issues] == [("a.parquet row 5", "number")]
    assert (lines.files[0].num_lines, lines.files[0].num_unread) == (6, 0)


def test_lists_of_another_length_are_named(tmp_path: Path) -> None:
    columns = {"timestamp": pa.array([0.0, 1, 2]), "x": pa.array([[1.0], [], [1.0, 2.0]])}
    lines = read(tmp_path, "a.parquet", write_parquet(tmp_path / "b.parquet", columns))
    (issue,) = lines.issues
    assert (issue.line, issue.kind, issue.stream) == (1, "size", "x")
    assert issue.message.startswith("x has 1 values, the recipe declares 2; fix: correct")
    assert lines.readings["x"].lines.tolist() == [3]


@given(
    frame=st.lists(
        st.tuples(*[st.one_of(st.none(), st.floats(-3e4, 3e4, width=32))] * 2),
        min_size=1,
        max_size=30,
    ),
    group=st.integers(1, 10),
    number=st.sampled_from([pa.float32(), pa.float64(), pa.float16(), pa.int16(), pa.bool_()]),
)
def test_parquet_columns_are_those_of_pandas(tmp_path_factory, frame, group, number):
    makers = {pa.int16(): int, pa.bool_(): lambda v: v > 0, pa.float16(): np.float16}
    make = makers.get(number, float)
    a, b = (
        pa.array([None if v is None else make(v) for v in column], number)
        for column in zip(*frame, strict=True)
    )
    path = tmp_path_factory.mktemp("x") / "a.parquet"
    times = pa.array(np.arange(len(frame)))
    columns = {"t": times, "note": pa.array(["x"] * len(frame)), "a": a, "b": b}
    content = write_parquet(path, columns, row_group_size=group)
    block = read_cells(content, ["t", "b", "a"], suffix=".parquet")
    stock = pd.read_parquet(path)[["t", "b", "a"]].astype(float).to_numpy()
    np.testing.assert_array_equal(block.cells, stock)
    np.testing.assert_array_equal(block.lines, 1 + np.arange(len(frame)))


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_arrow_are_seconds(unit: str, tmp_path: Path) -> None:
    numbers = np.array([1_700_000_000, 1_700_000_001]) * round(TIME_UNITS[unit])
    columns = {
        "timestamp": pa.array(numbers, pa.timestamp(unit)),
        "x": pa.array([[1.0, 2.0]] * 2),
    }
    lines = read(tmp_path, "a.parquet", write_parquet(tmp_path / "b", columns), time_unit="ms")
    assert lines.readings["x"].times_s.tolist() == [1_700_000_000.0, 1_700_000_001.0]


@pytest.mark.parametrize(
    ("unit", "per_s"), [("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9), ("100ns", 1e7)]
)
def test_declared_units_of_time(unit: str, per_s: float, tmp_path: Path) -> None:
    start = 1_700_000_000
    numbers = [round((start + s) * per_s) for s in range(3)]
    content = "timestamp,x_0,x_1\n" + "".join(f"{number},1,2\n" for number in numbers)
    lines = read(tmp_path, "a.csv", content, time_unit=unit)
    np.testing.assert_allclose(lines.readings["x"].times_s, start + np.arange(3), atol=1e-6)


def test_other_bytes_are_no_parquet_file(tmp_path: Path) -> None:
    columns = {"timestamp": pa.array([0.0]), "x": pa.array([[1.0, 2.0]])}
    content = write_parquet(tmp_path / "b.parquet", columns)
    for bad in (b"", b"PAR1", b"timestamp,x\n", content[:-9], content[:20] + b"\0" * 99):
        (issue,) = read(tmp_path, "a.parquet", bad).issues
        assert (issue.line, issue.kind) == (0, "file")
        assert "no Parquet file of numbers" in issue.message


def test_columns_of_words_are_one_issue(tmp_path: Path) -> None:
    columns = {"timestamp": pa.array([0.0]), "x_0": pa.array(["a"]), "x_1": pa.array([1.0])}
    (issue,) = read(tmp_path, "a.parquet", write_parquet(tmp_path / "b", columns)).issues
    assert (issue.line, issue.kind) == (0, "file")


def test_a_file_that_claims_too_many_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_ROWS", 5)
    columns = {"timestamp": pa.array(np.arange(6.0)), "x": pa.array([[1.0, 2.0]] * 6)}
    content = write_parquet(tmp_path / "b.parquet", columns)
    (issue,) = read(tmp_path, "a.parquet", content).issues
    assert issue.message == "6 rows exceed 5; fix: split the recording"


def test_without_pyarrow_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (issue,) = read(tmp_path, "a.parquet", b"PAR1").issues
    assert issue.message.startswith("a Parquet file needs pyarrow; fix: run `pip install")
    with pytest.raises(TableError):
        open_table(io.BytesIO(b""), ".parquet", wanted=())


# --- damaged files ---


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    suffix=st.sampled_from([".csv", ".jsonl", ".parquet"]),
    changes=st.lists(
        st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 20)), max_size=8
    ),
)
def test_damage_gives_issues_and_never_an_error(tmp_path, suffix, changes):
    rows = np.random.default_rng(0).normal(size=(60, 2)).tolist()
    contents = {
        ".csv": "timestamp;x_0;x_1\n"
        + "".join(f'{i};"{a}";{b}\n'.replace(".", ",") for i, (a, b) in enumerate(rows)),
        ".jsonl": "".join(f'{{"timestamp": {i}, "x": {row}}}\n' for i, row in enumerate(rows)),
    }
    if suffix == ".parquet":
        columns = {"timestamp": pa.array(np.arange(60.0)), "x": pa.array(rows)}
        content = bytearray(write_parquet(tmp_path / "b", columns, row_group_size=20))
    else:
        content = bytearray(contents[suffix].encode())
    for share, new, removed in changes:
        at = int(share * len(content))
        content[at : at + removed] = new
    readings = read(tmp_path, f"a{suffix}", bytes(content)).readings["x"]
    assert np.isfinite(readings.values).all()
    assert (np.diff(readings.times_s) > 0).all()


# --- tables of real recorders ---

RECORDERS = {
    "vr_csv/vive_pro_eye.csv": {
        "time": "time(100ns)", "time_unit": "100ns", "key": "gaze_direct_L", "rate_hz": 120,
        "values": [{"count": 3, "type": "direction"}],
    },
    "vr_csv/pico_boxing.csv": {
        "time": "Timeline", "key": "Head Position", "rate_hz": 90,
        "values": [{"count": 3, "type": "position"}],
    },
    "pupil_invisible/gaze.csv": {
        "time": "timestamp [ns]", "time_unit": "ns", "key": None, "rate_hz": 200,
        "values": [{"count": 2, "type": "scalar", "names": ["gaze x [px]", "gaze y [px]"]}],
    },
    "pupil_invisible/imu.csv": {
        "time": "timestamp [ns]", "time_unit": "ns", "key": None, "rate_hz": 200,
        "values": [{"count": 3, "type": "velocity", "names": [
            "gyro x [deg/s]", "gyro y [deg/s]", "gyro z [deg/s]"]}],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDERS)
def test_tables_of_real_recorders_are_read_like_pandas_does(
    name: str, import_samples: Path, tmp_path: Path
) -> None:
    stream = RECORDERS[name]
    content = (import_samples / name).read_bytes()
    lines = read(tmp_path, "a.csv", content, **stream)
    separator = max(",;\t", key=content[:400].decode().count)
    frame = pd.read_csv(import_samples / name, sep=separator)
    prefix = str(stream["key"])
    names = stream["values"][0].get("names") or [c for c in frame if c.startswith(prefix)]
    spec = Recipe.model_validate(
        {"streams": {"x": {"kind": "sensor", "file": "a.csv", **stream}}}
    ).streams["x"]
    rows = frame[~frame[stream["time"]].duplicated() & frame[names].notna().all(axis=1)]
    readings = lines.readings["x"]
    assert len(readings.times_s) > 0.9 * len(rows)
    expected = rows.set_index(rows.index + 2).loc[readings.lines]
    times = expected[stream["time"]].to_numpy(dtype=float) / spec.units_per_s
    np.testing.assert_array_equal(readings.times_s, times)
    raw = read_timed_lines(
        tmp_path, Recipe.model_validate({"streams": {"x": spec.model_dump()}}), is_cleaned=False
    ).readings["x"]
    chosen = np.isin(raw.lines, readings.lines)
    np.testing.assert_array_equal(raw.values[chosen], expected[names].to_numpy(dtype=np.float32))
