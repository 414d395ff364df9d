"""--fix loses no reading or text of any session without saying so, and keeps its promises."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from helpers.sessions import write_tone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocess.validate.repair import repair_session
from preprocess.validate.report import check_session
from shared.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

PROMISE = re.compile(r"with --fix|--fix (does it|drops)")

STREAMS = {
    "pad": {"kind": "sensor", "key": "pad", "values": [{"count": 2, "type": "scalar"}]},
    "grip": {"kind": "sensor", "key": "grip", "values": [{"count": 1, "type": "scalar"}]},
    "head": {
        "kind": "sensor", "file": "head.jsonl", "time": "t", "time_unit": "ms", "rate_hz": 60,
        "values": [{"count": 2, "type": "scalar", "names": ["yaw", "roll"]}],
    },
    "imu": {
        "kind": "sensor", "file": "imu.csv", "rate_hz": 60, "clock": "own",
        "values": [{"count": 1, "type": "scalar", "names": ["a"]}],
    },
    "hold": {
        "kind": "sensor", "file": "hold.tsv", "resample": "hold", "max_age_s": 1.0,
        "values": [{"count": 1, "type": "scalar", "names": ["b"]}],
    },
    "notes": {"kind": "text", "file": "notes.jsonl"},
    "said": {"kind": "text", "stream": "said"},
    "voice": {"kind": "audio", "file": "voice.wav"},
}  # fmt: skip
RECIPE = Recipe.model_validate({"segment": {"duration_s": 1.0}, "streams": STREAMS})
KEYS = {"pad": "pad", "grip": "grip", "yaw": "head", "a": "imu", "b": "hold"}
"""Key that holds a stream's readings, and the stream."""


def in_line(line: dict[str, Any]) -> set[tuple[str, str]]:
    """Return the readings and texts of a line, as key and value."""
    found = set()
    for key in ("pad", "grip", "yaw", "a", "b"):
        values = line.get(key) if isinstance(line.get(key), list) else [line.get(key)]
        if all(value not in (None, "") for value in values):
            found.add((key, " ".join(f"{float(value):.6f}" for value in values)))
    for key in ("text", "said_text"):
        found |= {(key, word) for word in (line.get(key) or "").split()}
    return found


class Raw(bytes):
    """A line that is not one JSON object of UTF-8, and what it holds whole."""

    holds: frozenset[tuple[str, str]] = frozenset()


@dataclass
class Lines:
    """The lines of a file, and what has been done to them."""

    rows: list[dict[str, Any] | bytes]
    time: str
    whole: set[tuple[str, str]] = field(default_factory=set)
    """Readings and texts in objects that are written whole."""

    def written(self, form: str, encoding: str) -> bytes:
        rows = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in self.rows]
        for row in self.rows:
            self.whole |= in_line(row) if isinstance(row, dict) else getattr(row, "holds", set())
        content = {"lines": b"\n", "commas": b",\n", "one": b"", "spaces": b"  "}[form].join(rows)
        if form == "one":
            content = content.replace(b", ", b",\n  ")
        if form == "commas":
            content = b"[" + content + b"]"
        return content.decode("latin-1").encode(encoding)


def repeat(lines: Lines, i: int) -> None:
    lines.rows.insert(i, lines.rows[i])


def contradict(lines: Lines, i: int) -> None:
    first, other = lines.rows[i - 1], lines.rows[i]
    if isinstance(first, dict) and isinstance(other, dict) and lines.time in first:
        lines.rows[i] = {**other, lines.time: first[lines.time]}


def swap(lines: Lines, i: int) -> None:
    lines.rows[i - 1 : i + 1] = lines.rows[i - 1 : i + 1][::-1]


def go_back(lines: Lines, i: int) -> None:
    lines.rows.insert(0, lines.rows.pop(i))


def lose(lines: Lines, i: int) -> None:
    del lines.rows[i]


def lose_many(lines: Lines, i: int) -> None:
    del lines.rows[i : i + 9]


def cut(lines: Lines, i: int) -> None:
    row = lines.rows[i]
    raw = row if isinstance(row, bytes) else json.dumps(row).encode()
    lines.rows[i] = raw[: len(raw) // 2]


def insert_zeros(lines: Lines, i: int) -> None:
    lines.rows.insert(i, b"\0" * 7)


def forget_time(lines: Lines, i: int) -> None:
    row = lines.rows[i]
    if isinstance(row, dict):
        lines.rows[i] = {k: v for k, v in row.items() if k != lines.time}


def quote_time(lines: Lines, i: int) -> None:
    row = lines.rows[i]
    if isinstance(row, dict) and lines.time in row:
        lines.rows[i] = {**row, lines.time: str(row[lines.time]).replace(".", ",")}


def quote_values(lines: Lines, i: int) -> None:
    row = lines.rows[i]
    if isinstance(row, dict):
        lines.rows[i] = {
            k: [str(x) for x in v] if isinstance(v, list) else v for k, v in row.items()
        }


def speak(lines: Lines, i: int) -> None:
    row = lines.rows[i]
    if isinstance(row, dict) and "yaw" not in row:  # a file that has no texts
        key = "text" if "text" in row else "said_text"
        lines.rows[i] = {**row, key: f"word{i} f\xfcr"}


def write_windows(lines: Lines, i: int) -> None:
    row = lines.rows[i]
    if isinstance(row, dict):
        raw = Raw(json.dumps({**row, "note": "f\xfcr"}, ensure_ascii=False).encode("cp1252"))
        raw.holds = frozenset(in_line(row))
        lines.rows[i] = raw


def join_two(lines: Lines, i: int) -> None:
    two = lines.rows[i - 1 : i + 1]
    if all(isinstance(row, dict) for row in two):
        raw = Raw(b" ".join(json.dumps(row).encode() for row in two))
        raw.holds = frozenset().union(*map(in_line, two))
        lines.rows[i - 1 : i + 1] = [raw]


def pack(lines: Lines, i: int) -> None:
    size = 2 + i % 4
    dicts = [row for row in lines.rows if isinstance(row, dict) and lines.time in row]
    for j, row in enumerate(dicts):
        row[lines.time] = dicts[j - j % size][lines.time]


EDITS = [
    repeat, contradict, swap, go_back, lose, lose_many, cut, insert_zeros, forget_time, quote_time,
    quote_values, speak, write_windows, join_two, pack,
]  # fmt: skip


@dataclass
class Table:
    """The rows of a table."""

    rows: list[list[str]]
    whole: set[tuple[str, str]] = field(default_factory=set)


def make_lines(file: str, *, offset_s: float, length_s: float, rate_hz: int, unit: float) -> Lines:
    """Return the lines of a file without fault; every reading and text is another one."""
    times_s = [offset_s + i / rate_hz for i in range(round(length_s * rate_hz))]
    if file == "notes.jsonl":
        texts = [{"timestamp": round(t * unit, 6), "text": f"note{t:.2f}"} for t in times_s[::20]]
        return Lines([*texts], "timestamp")
    if file == "head.jsonl":
        rows = [{"t": t * 1000 * unit, "yaw": i + 0.5, "roll": -i} for i, t in enumerate(times_s)]
        return Lines([*rows], "t")
    metadata: list[dict[str, Any] | bytes] = []
    for i, t in enumerate(times_s):
        row: dict[str, Any] = {"timestamp": round(t * unit, 6), "pad": [i + 0.25, -i]}
        metadata.append(row | ({"grip": [i * 0.5]} if i % 3 else {}))
    return Lines(metadata, "timestamp")


edits = st.lists(st.tuples(st.sampled_from(EDITS), st.integers(1, 60)), max_size=4)
plans = st.fixed_dictionaries(
    {
        "edits": edits,
        "form": st.sampled_from(["lines", "lines", "lines", "commas", "one", "spaces"]),
        "encoding": st.sampled_from(
            ["latin-1", "latin-1", "latin-1", "utf-16", "utf-16-be", "utf-16-le", "utf-32"]
        ),
        "offset_s": st.sampled_from([0.0, 0.0, -0.4, 12.5, 1.7e9]),
        "length_s": st.sampled_from([1.9, 2.0, 2.6, 4.0]),
        "rate_hz": st.sampled_from([10, 25, 30, 90]),
        "unit": st.sampled_from([1.0, 1.0, 1.0, 1000.0]),
    }
)


def write_rows(path: Path, edges: list[int], encoding: str) -> set[tuple[str, str]]:
    """Write a table with some rows repeated, contradicted or swapped; return its readings."""
    key, delimiter = ("a", ",") if path.suffix == ".csv" else ("b", "\t")
    rows = [[f"{i / 60:.4f}", f"{i + 0.5}"] for i in range(120)]
    for edge in edges:
        if edge % 3:
            rows[edge : edge + 2] = rows[edge : edge + 2][::-1]
        else:
            rows.insert(edge, [rows[edge][0], f"{edge}.75"])
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["timestamp", key], *rows])
    path.write_bytes(out.getvalue().encode(encoding))
    return {(key, f"{float(value):.6f}") for _, value in rows}


def read_back(path: Path) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Read a file as any other program does; return what is recorded, and what is interpolated."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in text else ","))
        return set().union(*map(in_line, rows)), set()
    lines = [json.loads(line) for line in text.splitlines()]
    new = [in_line(line) for line in lines if line.get("interpolated")]
    old = [in_line(line) for line in lines if not line.get("interpolated")]
    return set().union(*old), set().union(*new)


def announced(done: list[str], file: str) -> int:
    """Return how many lines with readings the messages say were dropped from a file."""
    words = r"(\d+) lines? (?:without a timestamp|of readings before or after)"
    return sum(int(n) for s in done if s.startswith(file) for n in re.findall(words, s))


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    plan=st.fixed_dictionaries(
        {file: st.none() | plans for file in ("metadata.jsonl", "head.jsonl", "notes.jsonl")}
    ),
    tables=st.fixed_dictionaries(
        {
            file: st.none()
            | st.tuples(
                st.lists(st.integers(1, 100), max_size=3),
                st.sampled_from(["utf-8", "utf-16", "utf-8-sig"]),
            )
            for file in ("imu.csv", "hold.tsv")
        }
    ),
    sound_s=st.sampled_from([None, 2.0, 2.0]),
)
def test_no_reading_or_text_is_lost_without_a_word_and_promises_are_kept(
    tmp_path: Path, plan: dict[str, Any], tables: dict[str, Any], sound_s: float | None
) -> None:
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if sound_s is not None:
        write_tone(folder / "voice.wav", sound_s)
    whole: dict[str, set[tuple[str, str]]] = {}
    for file, one in plan.items():
        if one is None:
            continue
        numbers = ("offset_s", "length_s", "rate_hz", "unit")
        lines = make_lines(file, **{key: one[key] for key in numbers})
        for edit, index in one["edits"]:
            if len(lines.rows) > index:
                edit(lines, index)
        (folder / file).write_bytes(lines.written(one["form"], one["encoding"]))
        whole[file] = lines.whole
    for file, table in tables.items():
        if table is not None:
            whole[file] = write_rows(folder / file, *table)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = check_session(folder, recipe=RECIPE).report
    promised = [m for m in (*report.errors, *report.warnings) if PROMISE.search(m)]
    done = repair_session(folder, recipe=RECIPE)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert bool(done) >= bool(promised), promised
    for file, content in before.items():
        if after[file] == content:
            continue
        assert after[f"{file}.orig"] == content
        assert not file.endswith(".wav")
        recorded, interpolated = read_back(folder / file)
        lost = whole[file] - recorded
        assert recorded <= whole[file], "a reading that nobody recorded"
        assert all(key in KEYS for key, _ in lost | interpolated), "a text is gone"
        most = max(Counter(key for key, _ in lost).values(), default=0)
        assert most <= announced(done, file), (done, sorted(lost)[:5])
    assert repair_session(folder, recipe=RECIPE) == []
    again = check_session(folder, recipe=RECIPE).report
    assert not [m for m in (*again.errors, *again.warnings) if PROMISE.search(m)], done
