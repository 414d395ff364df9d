"""Timestamps in milliseconds, microseconds and nanoseconds are recognized and repaired."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.report_pages import RECIPE
from helpers.sessions import read_lines, sensor_lines, write_lines, write_session

from preprocess.validate.repair import repair_session
from preprocess.validate.report import check_session

if TYPE_CHECKING:
    from pathlib import Path

NAMES = {"milliseconds": 1_000, "microseconds": 1_000_000, "nanoseconds": 1_000_000_000}
UNIX_S = 1_700_000_000


@pytest.fixture
def session(tmp_path: Path) -> Path:
    return write_session(tmp_path / "one")


def multiply(session: Path, file: str, factor: int, *, since_s: int = 0) -> None:
    lines = read_lines(session / file)
    for line in lines:
        line["timestamp"] = since_s * factor + round(line["timestamp"] * factor)
    write_lines(session / file, lines)


def times_of(session: Path, file: str = "metadata.jsonl") -> list[float]:
    return [line["timestamp"] for line in read_lines(session / file)]


@pytest.mark.parametrize("since_s", [0, UNIX_S])
@pytest.mark.parametrize("name", NAMES)
def test_another_unit_is_one_error_and_one_repair(name: str, since_s: int, session: Path) -> None:
    factor, expected_s = NAMES[name], times_of(session)
    for file in ("metadata.jsonl", "text.jsonl"):
        multiply(session, file, factor, since_s=since_s)
    report = check_session(session, recipe=RECIPE).report
    (error,) = report.errors
    assert f"timestamps look like {name}, not seconds" in error
    assert f"divide them by {factor}" in error
    assert "--fix does it" in error
    assert not [w for w in report.warnings if "never reset" not in w]
    done = repair_session(session, recipe=RECIPE)
    assert f"divided all timestamps by {factor}; they were {name}" in done[0]
    tolerance_s = 1e-3 if name == "milliseconds" else 2e-6
    np.testing.assert_allclose(times_of(session), expected_s, atol=tolerance_s)
    np.testing.assert_allclose(times_of(session, "text.jsonl"), [0.2, 1.4], atol=tolerance_s)
    assert check_session(session, recipe=RECIPE).report.status == "passed"
    assert repair_session(session, recipe=RECIPE) == []


def test_texts_in_seconds_beside_lines_in_milliseconds_stay(session: Path) -> None:
    multiply(session, "metadata.jsonl", 1000)
    assert repair_session(session, recipe=RECIPE)[0].startswith("metadata.jsonl: divided")
    assert times_of(session, "text.jsonl") == [0.2, 1.4]
    assert check_session(session, recipe=RECIPE).report.status == "passed"


def test_nothing_is_divided_if_texts_fit_neither_way(session: Path) -> None:
    multiply(session, "metadata.jsonl", 1000)
    multiply(session, "text.jsonl", 55_000)
    (error,) = check_session(session, recipe=RECIPE).report.errors
    assert error.endswith("divide them by 1000")
    assert "--fix" not in error
    assert repair_session(session, recipe=RECIPE) == []


def test_without_media_the_unit_is_named_and_nothing_repaired(session: Path) -> None:
    multiply(session, "metadata.jsonl", 1000)
    for file in ("vision_left.mp4", "audio.wav"):
        (session / file).unlink()
    before = (session / "metadata.jsonl").read_bytes()
    errors = check_session(session, recipe=RECIPE).report.errors
    assert any("look like milliseconds" in e and "--fix" not in e for e in errors)
    assert repair_session(session, recipe=RECIPE) == []
    assert (session / "metadata.jsonl").read_bytes() == before


def test_lines_every_few_seconds_that_last_as_long_as_the_media_are_seconds(
    session: Path,
) -> None:
    lines = sensor_lines(2.0)[:3]
    for i, line in enumerate(lines):
        line["timestamp"] = i * 0.9
    write_lines(session / "metadata.jsonl", lines)
    errors = check_session(session, recipe=RECIPE).report.errors
    assert errors
    assert not any("look like" in e for e in errors)


def test_texts_every_few_seconds_are_not_read_as_milliseconds(tmp_path: Path) -> None:
    lines = [{"timestamp": 5 * i, "internal_text": "hm"} for i in range(20)]
    write_lines(tmp_path / "metadata.jsonl", lines)
    report = check_session(tmp_path, recipe=RECIPE).report
    assert not any("look like" in e for e in report.errors)


def test_a_text_outside_the_session_is_reported_with_its_line(session: Path) -> None:
    lines = read_lines(session / "metadata.jsonl")
    lines.insert(3, {"timestamp": -5.0, "internal_text": "before all"})
    write_lines(session / "metadata.jsonl", lines)
    warnings = check_session(session, recipe=RECIPE).report.warnings
    assert any(w.startswith("metadata.jsonl line 4: a text starts at -5.000 s") for w in warnings)
    write_lines(session / "metadata.jsonl", sensor_lines())
    with (session / "text.jsonl").open("a") as file:
        file.write('{"timestamp": 9, "stream": "internal", "text": "late"}\n')
    warnings = check_session(session, recipe=RECIPE).report.warnings
    assert any(w.startswith("text.jsonl line 3: a text starts at 9.000 s") for w in warnings)


def test_a_session_longer_than_a_day_reports_the_ignored_part(session: Path) -> None:
    write_lines(
        session / "metadata.jsonl",
        [{"timestamp": i * 100.0, "touch": [i % 2] * 5} for i in range(1000)],
    )
    report = check_session(session, recipe=RECIPE).report
    assert report.stats["length_s"] == 86_400
    assert any("everything after 86400 s is left out" in w for w in report.warnings)
