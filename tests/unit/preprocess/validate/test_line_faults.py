"""Faults of timestamped files that people met: what is read, what is said, and what --fix does."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.report_pages import default_recipe
from helpers.sessions import read_lines, sensor_lines, write_lines, write_tone

from preprocess.validate.repair import repair_session
from preprocess.validate.report import ValidationReport, check_session
from shared.recipe import Recipe
from shared.session.folder import read_timed_lines
from shared.session.scan import scan_session

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = default_recipe(without=("vision_left", "vision_right", "audio"))


def texts(number: int = 9) -> list[dict[str, Any]]:
    words = ["Grüße", "naïve café", "over there", "ßtraße"]
    return [{"timestamp": i / 5, "stream": "external", "text": words[i % 4]} for i in range(number)]


def encode(lines: list[dict[str, Any]], encoding: str, ending: str = "\n") -> bytes:
    return "".join(json.dumps(x, ensure_ascii=False) + ending for x in lines).encode(encoding)


def check(folder: Path, recipe: Recipe = RECIPE) -> ValidationReport:
    return check_session(folder, recipe=recipe).report


def messages(folder: Path, recipe: Recipe = RECIPE) -> list[str]:
    report = check(folder, recipe)
    return [*report.errors, *report.warnings]


# --- encodings ---

BOM = {"utf-16": "UTF-16-LE", "utf-32": "UTF-32-LE"}
ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp1252"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_texts_and_readings_in_another_encoding_are_read_and_fixed(
    encoding: str, ending: str, tmp_path: Path
) -> None:
    lines = [line | {"note": "ü"} for line in sensor_lines()]
    (tmp_path / "text.jsonl").write_bytes(encode(texts(), encoding, ending))
    (tmp_path / "metadata.jsonl").write_bytes(encode(lines, encoding, ending))
    read = read_timed_lines(tmp_path, RECIPE)
    assert [e.text for e in read.events["external_text"]] == [t["text"] for t in texts()]
    assert len(read.readings["touch"].times_s) == len(lines)
    name = "Windows-1252" if encoding == "cp1252" else BOM.get(encoding, encoding.upper())
    found = messages(tmp_path)
    assert len(found) == 2
    assert all(name in m and m.endswith("fix: write it in UTF-8 with --fix") for m in found), found
    done = repair_session(tmp_path, recipe=RECIPE)
    assert f"text.jsonl: wrote UTF-8 in place of {name}" in done
    assert read_lines(tmp_path / "text.jsonl") == texts()
    assert read_lines(tmp_path / "metadata.jsonl") == lines
    assert (check(tmp_path).errors, check(tmp_path).warnings) == ((), ())


def test_a_byte_order_mark_of_utf_8_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(encode(sensor_lines(), "utf-8-sig"))
    assert messages(tmp_path, default_recipe(without=(*RECIPE.texts, "audio", "vision_left",
                                                       "vision_right"))) == []  # fmt: skip
    assert repair_session(tmp_path, recipe=RECIPE) == []


def test_lines_that_a_shell_appended_in_utf_16_are_read(tmp_path: Path) -> None:
    content = encode(texts()[:3], "utf-8") + encode(texts()[3:], "utf-16-le", "\r\n")
    (tmp_path / "text.jsonl").write_bytes(content)
    read = read_timed_lines(tmp_path, RECIPE)
    assert [e.text for e in read.events["external_text"]] == [t["text"] for t in texts()]
    repair_session(tmp_path, recipe=RECIPE)
    assert read_lines(tmp_path / "text.jsonl") == texts()


def test_a_flipped_byte_in_utf_8_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    raw = json.dumps({"timestamp": 0.5, "external_text": "ééé"}, ensure_ascii=False).encode()
    damaged = raw.replace("é".encode(), b"\xc3\xff", 1)
    (tmp_path / "metadata.jsonl").write_bytes(damaged + b"\n" + encode(sensor_lines(), "utf-8"))
    (event,) = read_timed_lines(tmp_path, RECIPE).events["external_text"]
    assert event.text.endswith("éé")
    before = (tmp_path / "metadata.jsonl").read_bytes()
    assert any("probably damaged UTF-8; characters" in m for m in messages(tmp_path))
    assert not any("UTF-8 with --fix" in m for m in messages(tmp_path))
    repair_session(tmp_path, recipe=RECIPE)
    assert damaged in before
    assert damaged in (tmp_path / "metadata.jsonl").read_bytes()


@pytest.mark.parametrize("encoding", ["gbk", "cp1251", "shift_jis", "euc-kr"])
def test_an_encoding_that_is_not_known_is_never_written_as_another(
    encoding: str, tmp_path: Path
) -> None:
    words = {
        "gbk": "你好你好",
        "cp1251": "привет мир",
        "shift_jis": "あいうえ",
        "euc-kr": "안녕하세요",
    }
    line = {"timestamp": 0.5, "external_text": words[encoding]}
    raw = json.dumps(line, ensure_ascii=False).encode(encoding) + b"\n"
    (tmp_path / "metadata.jsonl").write_bytes(raw + encode(sensor_lines(), "utf-8"))
    (message,) = [m for m in messages(tmp_path) if "not UTF-8, probably another encoding" in m]
    assert message.endswith("are read as U+FFFD; fix: write it in UTF-8")
    repair_session(tmp_path, recipe=RECIPE)
    assert raw in (tmp_path / "metadata.jsonl").read_bytes()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ";"), (".csv", ","), (".tsv", "\t")])
def test_a_table_in_another_encoding_is_read_and_fixed(
    encoding: str, suffix: str, delimiter: str, tmp_path: Path
) -> None:
    streams = {
        "imu": {
            "kind": "sensor", "file": f"imu{suffix}", "rate_hz": 30,
            "values": [{"count": 1, "type": "scalar", "names": ["größe"]}],
        }
    }  # fmt: skip
    recipe = Recipe.model_validate({"segment": {"duration_s": 1.0}, "streams": streams})
    rows = [f"timestamp{delimiter}größe", *(f"{i / 30:.4f}{delimiter}{i}" for i in range(60))]
    (tmp_path / f"imu{suffix}").write_bytes("\r\n".join(rows).encode(encoding))
    assert read_timed_lines(tmp_path, recipe).readings["imu"].values[:, 0].tolist() == [*range(60)]
    (message,) = messages(tmp_path, recipe)
    assert "write it in UTF-8 with --fix" in message
    repair_session(tmp_path, recipe=recipe)
    assert (tmp_path / f"imu{suffix}").read_text(encoding="utf-8").splitlines() == rows
    assert messages(tmp_path, recipe) == []


# --- objects that are not on lines of their own ---


def forms(lines: list[dict[str, Any]]) -> dict[str, str]:
    objects = [json.dumps(line) for line in lines]
    return {
        "no line feeds": "".join(objects),
        "array": json.dumps(lines),
        "array of lines": "[\n" + ",\n".join(objects) + "\n]\n",
        "commas": ",\n".join(objects) + ",\n",
        "pretty": "\n".join(json.dumps(line, indent=2) for line in lines),
        "pretty array": json.dumps(lines, indent=4),
        "two on some lines": "\n".join(
            ["".join(objects[:1]), *("".join(objects[i : i + 2]) for i in range(1, 60, 2))]
        ),
        "spaces": "  ".join(objects),
    }  # fmt: skip


@pytest.mark.parametrize("form", forms([]).keys())
def test_objects_that_are_not_on_lines_of_their_own_are_read_and_split(
    form: str, tmp_path: Path
) -> None:
    lines = [line | {"nested": {"timestamp": 5, "a": [{}]}} for line in sensor_lines()]
    (tmp_path / "metadata.jsonl").write_text(forms(lines)[form])
    read = read_timed_lines(tmp_path, RECIPE)
    assert read.readings["touch"].times_s.tolist() == [line["timestamp"] for line in lines]
    (message,) = [m for m in messages(tmp_path) if "one object per line" in m]
    assert message.endswith("fix: write one object per line with --fix")
    repair_session(tmp_path, recipe=RECIPE)
    assert read_lines(tmp_path / "metadata.jsonl") == lines
    assert not any("--fix" in m for m in messages(tmp_path))


def test_a_long_line_of_short_objects_is_read(tmp_path: Path) -> None:
    lines = [line | {"note": "x" * 3000} for line in sensor_lines(20.0)]
    (tmp_path / "metadata.jsonl").write_text("".join(map(json.dumps, lines)))
    assert (tmp_path / "metadata.jsonl").stat().st_size > 2 << 20
    read = read_timed_lines(tmp_path, RECIPE)
    assert read.readings["proprio"].times_s.tolist() == [line["timestamp"] for line in lines]


def test_the_objects_around_a_crash_are_kept(tmp_path: Path) -> None:
    """The recorder died in a line, and went on behind it; zeros are from a power failure."""
    rows = [json.dumps(line) for line in sensor_lines()]
    content = "\n".join([*rows[:20], rows[20][:40] + rows[21], "\0" * 99 + rows[22], *rows[23:]])
    (tmp_path / "metadata.jsonl").write_text(content)
    assert len(read_timed_lines(tmp_path, RECIPE).readings["touch"].times_s) == len(rows) - 1
    found = messages(tmp_path)
    assert any("line 22: 99 bytes are zero, as after a power failure" in m for m in found), found
    done = repair_session(tmp_path, recipe=RECIPE)
    assert "metadata.jsonl: dropped 2 lines without JSON" in done
    written = [json.dumps(line) for line in read_lines(tmp_path / "metadata.jsonl")]
    assert [row for row in written if "interpolated" not in row] == [*rows[:20], *rows[21:]]


def test_an_object_inside_of_a_damaged_one_is_no_line(tmp_path: Path) -> None:
    damaged = '{"meta": {"timestamp": 0.5, "touch": [1, 1, 1, 1, 1]}, "touch": [0'
    write_lines(tmp_path / "metadata.jsonl", sensor_lines())
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(damaged)
    assert len(read_timed_lines(tmp_path, RECIPE).readings["touch"].times_s) == 60


# --- timestamps ---


def rewrite(folder: Path, change: Any) -> None:
    write_lines(folder / "metadata.jsonl", [change(line) for line in sensor_lines()])


def with_time(time: Any) -> Any:
    return lambda line: {**line, "timestamp": time(line["timestamp"])}


START = datetime.datetime(2026, 11, 29, 10, tzinfo=datetime.UTC)
TIME_TEXTS = {
    "points": lambda t: f"{t:.6f}",
    "commas": lambda t: f"{t:.6f}".replace(".", ","),
    "dates": lambda t: (START + datetime.timedelta(seconds=t)).isoformat(),
    "dates with Z": lambda t: (START + datetime.timedelta(seconds=t)).isoformat()[:-6] + "Z",
}


@pytest.mark.parametrize("form", TIME_TEXTS)
def test_timestamps_that_are_texts_are_named_and_converted(form: str, tmp_path: Path) -> None:
    rewrite(tmp_path, with_time(TIME_TEXTS[form]))
    (error,) = [m for m in check(tmp_path).errors if m.startswith("metadata")]
    assert "line 1: timestamp is the text" in error
    assert "as in 60 of 60 lines" in error
    assert error.endswith("write numbers in place of texts with --fix")
    done = repair_session(tmp_path, recipe=RECIPE)
    assert done[0] == "metadata.jsonl: wrote numbers in place of texts in 60 lines"
    times_s = np.array([line["timestamp"] for line in read_lines(tmp_path / "metadata.jsonl")])
    expected_s = np.array([line["timestamp"] for line in sensor_lines()])
    assert times_s - times_s[0] == pytest.approx(expected_s, abs=2e-6)
    assert not any("--fix" in m for m in messages(tmp_path))


def test_a_comma_that_may_stand_between_thousands_is_not_converted(tmp_path: Path) -> None:
    rewrite(tmp_path, with_time(lambda t: f"{1 + int(t * 30)},500"))
    before = (tmp_path / "metadata.jsonl").read_bytes()
    assert repair_session(tmp_path, recipe=RECIPE) == []
    assert (tmp_path / "metadata.jsonl").read_bytes() == before
    assert not any("--fix" in m for m in messages(tmp_path))


def test_readings_that_are_texts_are_converted(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda line: {**line, "touch": [str(v) for v in line["touch"]]})
    assert repair_session(tmp_path, recipe=RECIPE)[0].startswith("metadata.jsonl: wrote numbers")
    assert read_lines(tmp_path / "metadata.jsonl") == sensor_lines()


@pytest.mark.parametrize("key", ["time", "t", "ts", "Timestamp", "t_ms", "Time (s)", "seconds"])
def test_another_key_of_the_times_is_named(key: str, tmp_path: Path) -> None:
    rewrite(tmp_path, lambda line: {key: line["timestamp"], "touch": line["touch"]})
    (error,) = [m for m in check(tmp_path).errors if m.startswith("metadata")]
    assert f"no timestamp, but {key!r}, as in 60 of 60 lines" in error
    assert error.endswith(f"fix: set `time: {key}` of proprio, touch in the recipe"), error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_time(lambda t: f"11/29/2026 10:00:{t:06.3f}"), "fix: write seconds as a number"),
        (with_time(lambda t: f"00:00:{t:06.3f}"), "fix: write seconds as a number"),
        (with_time(lambda t: [t, t + 1]), "as an object on a line of its own"),
        (lambda line: {"data": [line]}, "as an object on a line of its own"),
        (with_time(lambda _: None), "fix: check that this is the right file"),
    ],
)
def test_other_timestamps_that_can_not_be_read_say_how_to_write_them(
    change: Any, words: str, tmp_path: Path
) -> None:
    rewrite(tmp_path, change)
    before = (tmp_path / "metadata.jsonl").read_bytes()
    (error,) = [m for m in check(tmp_path).errors if m.startswith("metadata")]
    assert error.endswith(words)
    assert repair_session(tmp_path, recipe=RECIPE) == []
    assert (tmp_path / "metadata.jsonl").read_bytes() == before


def test_decimal_commas_are_named(tmp_path: Path) -> None:
    lines = [f'{{"timestamp": 0,{i:03}, "touch": [0,1, 0,2]}}\n' for i in range(60)]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    before = (tmp_path / "metadata.jsonl").read_bytes()
    (error,) = [m for m in check(tmp_path).errors if m.startswith("metadata")]
    assert "line 1: 0,000 has a decimal comma, as in 60 of 60 lines" in error
    assert error.endswith("fix: write numbers with a point, as JSON demands")
    assert repair_session(tmp_path, recipe=RECIPE) == []
    assert (tmp_path / "metadata.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_beside_good_media_is_reported(content: bytes, tmp_path: Path) -> None:
    write_tone(tmp_path / "audio.wav")
    (tmp_path / "metadata.jsonl").write_bytes(content)
    (tmp_path / "text.jsonl").write_bytes(content)  # nobody said anything
    report = check(tmp_path, default_recipe(without=("vision_left", "vision_right")))
    assert len(report.warnings) == 2
    assert all("missing (metadata.jsonl: has no line)" in m for m in report.warnings)


# --- readings of one time ---


def packets(size: int, *, interval_s: float = 0.1, number: int = 200) -> list[dict[str, Any]]:
    """Return smooth readings that arrive in packets."""
    return [
        {"timestamp": round(0.3 + (i // size) * interval_s, 6), "touch": [0.1 + i / 1000] * 5}
        for i in range(number)
    ]


@pytest.mark.parametrize("size", [2, 4, 5])
def test_readings_of_regular_packets_are_spread(size: int, tmp_path: Path) -> None:
    lines = packets(size)
    write_lines(tmp_path / "metadata.jsonl", lines)
    (error,) = check(tmp_path).errors
    assert "occurs again with another reading of touch; the first is used, as in" in error
    assert error.endswith("others are lost; fix: spread the readings of each packet with --fix")
    done = repair_session(tmp_path, recipe=RECIPE)
    assert done[0].startswith(f"metadata.jsonl: spread {200 // size} packets of {size} readings")
    after = read_lines(tmp_path / "metadata.jsonl")
    assert [line["touch"] for line in after] == [line["touch"] for line in lines]
    steps_s = np.diff([line["timestamp"] for line in after])
    assert steps_s == pytest.approx(np.full(199, 0.1 / size), abs=1e-6)
    assert [line.get("arrived", line["timestamp"]) for line in after] == [
        line["timestamp"] for line in lines
    ]
    assert not check(tmp_path).errors
    assert repair_session(tmp_path, recipe=RECIPE) == []


def test_readings_that_a_build_leaves_out_are_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "metadata.jsonl", packets(4))
    (sentence,) = scan_session(tmp_path, recipe=RECIPE).issues  # lines of rejected.jsonl
    assert sentence == (
        "metadata.jsonl line 2: timestamp 0.3 occurs again with another reading of touch; the "
        "first is used (and 149 more such lines)"
    )


def test_a_lost_packet_and_one_of_another_size_are_spread_too(tmp_path: Path) -> None:
    lines = packets(4)
    del lines[80:84], lines[41]
    write_lines(tmp_path / "metadata.jsonl", lines)
    repair_session(tmp_path, recipe=RECIPE)
    after = read_lines(tmp_path / "metadata.jsonl")
    assert [line["touch"] for line in after if "interpolated" not in line] == [
        line["touch"] for line in lines
    ]
    assert (np.diff([line["timestamp"] for line in after]) > 0.01).all()


def one_time(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "timestamp": 1.0}


def seconds_only(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "timestamp": float(int(line["timestamp"]))}


def irregular(line: dict[str, Any]) -> dict[str, Any]:
    number = int(line["timestamp"] * 30 + 0.5)
    return {
        **line,
        "timestamp": max(n for n in (0, 1, 5, 6, 7, 12, 30, 31, 50) if n <= number) / 30,
    }


@pytest.mark.parametrize("change", [one_time, seconds_only, irregular])
def test_readings_of_one_time_are_never_joined(change: Any, tmp_path: Path) -> None:
    lines = [change(line) for line in sensor_lines(20.0 if change is seconds_only else 2.0)]
    write_lines(tmp_path / "metadata.jsonl", lines)
    (error,) = [m for m in check(tmp_path).errors if "occurs again" in m]
    assert error.endswith("others are lost; fix: write the time of each reading")
    repair_session(tmp_path, recipe=RECIPE)
    after = read_lines(tmp_path / "metadata.jsonl")
    assert [line for line in after if "interpolated" not in line] == lines
    assert not any("--fix" in m for m in messages(tmp_path))


def test_a_file_that_was_written_twice_is_joined_not_spread(tmp_path: Path) -> None:
    lines = sensor_lines()
    write_lines(tmp_path / "metadata.jsonl", [line for line in lines for _ in range(2)])
    (warning,) = [m for m in check(tmp_path).warnings if m.startswith("metadata")]
    assert "occurs again with the same reading, as in 60 of 120 lines; fix: join them" in warning
    repair_session(tmp_path, recipe=RECIPE)
    assert read_lines(tmp_path / "metadata.jsonl") == lines


def test_what_holds_a_repair_back_is_said(tmp_path: Path) -> None:
    lines = sensor_lines(10.0)
    lines[50], lines[51] = lines[51], lines[50]
    lines[200:] = [{**line, "timestamp": line["timestamp"] - 3} for line in lines[200:]]
    write_lines(tmp_path / "metadata.jsonl", lines)
    (sorting,) = [m for m in check(tmp_path).warnings if "lines are sorted" in m]
    assert sorting.endswith(
        "fix: sort the file (--fix does not: line 201 goes back by 2.967 s from line 200; correct "
        "the wrong one, or split the session there first)"
    )
    assert repair_session(tmp_path, recipe=RECIPE) == []
