"""Units and wrong timestamps against recordings whose true times are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.oracles import build as build_set
from helpers.oracles import jsonl, set_contents, tiny_recipe, write_tiny_session
from helpers.plans import scan_from_json
from helpers.report_pages import default_recipe
from helpers.sessions import read_lines, sensor_lines, write_lines, write_session
from hypothesis import assume, given
from hypothesis import strategies as st

from preprocess.validate.repair import repair_session
from preprocess.validate.report import check_session
from shared.media.tokenizer import train_tokenizer
from shared.session.reader import SessionReader
from shared.session.scan import scan_session
from shared.session.timestamps import UNIT_NAMES, find_wrong_lines, guess_unit
from shared.streams import TIME_UNITS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RECIPE = default_recipe()
HOUR = 3600.0
EPOCH = 1_700_000_000.0

UNITS = st.sampled_from([*UNIT_NAMES])


def sensors(rate_hz: float) -> list[Any]:
    recipe = tiny_recipe(sensor={"rate_hz": rate_hz})
    return [next(iter(recipe.sensors.values()))]


@given(
    rate_hz=st.floats(5, 400), unit=UNITS, declared=UNITS, jitter=st.floats(0, 0.3),
    since_s=st.sampled_from([0.0, EPOCH]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_media_give_the_unit_of_any_recorder(
    rate_hz: float, unit: str, declared: str, jitter: float, since_s: float, seed: int
) -> None:
    media_s = 30.0
    shaken = np.random.default_rng(seed).uniform(-jitter / 2, jitter / 2, round(media_s * rate_hz))
    times_s = since_s + (np.arange(len(shaken)) + shaken) / rate_hz
    guess = guess_unit(
        np.sort(times_s) * TIME_UNITS[unit], sensors(30.0), declared=declared, media_stop_s=media_s
    )
    # An interval near the declared rate's is in the declared unit, whatever the media say.
    is_near = 0.25 <= 30 / rate_hz * TIME_UNITS[unit] / TIME_UNITS[declared] <= 4
    assert guess == (None if unit == declared or is_near else (unit, True)) or is_near


@given(rate_hz=st.floats(20, 45), unit=UNITS, declared=UNITS)
def test_without_media_the_rate_suggests_the_unit_and_confirms_nothing(
    rate_hz: float, unit: str, declared: str
) -> None:
    times = np.arange(50) / rate_hz * TIME_UNITS[unit]
    guess = guess_unit(times, sensors(30.0), declared=declared)
    assert guess is None or guess[1] is False
    if {unit, declared} != {"us", "100ns"}:  # their ranges overlap
        assert guess == (None if unit == declared else (unit, False))


def regular(count: int = 500, rate_hz: float = 60.0) -> np.ndarray:
    return np.arange(count) / rate_hz


def wrong_rows(times_s: np.ndarray, media_stop_s: float | None) -> list[int]:
    wrong = find_wrong_lines(times_s, np.arange(len(times_s)), media_stop_s)
    return [row for w in wrong for row in range(w.first, w.last + 1)]


@given(
    rows=st.lists(st.integers(0, 499), min_size=1, max_size=6, unique=True),
    error_s=st.sampled_from([HOUR, -HOUR, EPOCH, 1e9, -EPOCH, 700.0]),
    media_s=st.sampled_from([None, 500 / 60]),
)
def test_single_wrong_timestamps_are_left_out_and_nothing_else(
    rows: list[int], error_s: float, media_s: float | None
) -> None:
    times_s = regular()
    times_s[rows] += error_s
    assert wrong_rows(times_s, media_s) == sorted(rows)


@given(
    row=st.integers(0, 490), count=st.integers(1, 6), ahead_s=st.floats(1.5, 59.0),
    media_s=st.sampled_from([None, 500 / 60]),
)  # fmt: skip
def test_single_lines_ahead_of_their_neighbors_are_left_out(
    row: int, count: int, ahead_s: float, media_s: float | None
) -> None:
    assume(row == 0 or row >= 8)
    times_s = regular()
    times_s[row : row + count] += ahead_s
    assume(row + count + 8 <= 500)
    assert wrong_rows(times_s, media_s) == [*range(row, row + count)]


@given(row=st.integers(100, 499), back_s=st.floats(1.2, 1.6))
def test_a_line_behind_its_neighbors_where_none_is_missing_is_left_out(
    row: int, back_s: float
) -> None:
    assume(row <= 490 or row == 499)
    times_s = regular()
    times_s[row] -= back_s
    assert wrong_rows(times_s, 500 / 60) == [row]


@given(row=st.integers(150, 380), count=st.integers(1, 7), late=st.integers(80, 99))
def test_lines_that_were_written_late_are_kept(row: int, count: int, late: int) -> None:
    times_s = regular()
    moved = times_s[row : row + count]
    rest = np.delete(times_s, range(row, row + count))
    assert wrong_rows(np.insert(rest, row + late, moved), 500 / 60) == []


@given(
    first=st.integers(60, 440),
    jump_s=st.sampled_from([HOUR, -HOUR, EPOCH, 40.0, -40.0, 3.0, -3.0]),
    jitter=st.floats(0, 0.3), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_jump_that_the_media_contradict_is_measured(
    first: int, jump_s: float, jitter: float, seed: int
) -> None:
    shaken = np.random.default_rng(seed).uniform(-jitter / 2, jitter / 2, 500) / 60
    times_s = regular() + shaken
    times_s[first:] += jump_s
    (wrong,) = find_wrong_lines(times_s, np.arange(500), 500 / 60)
    assert (wrong.first, wrong.last) == (first, 499)
    assert wrong.jump_s == pytest.approx(jump_s, abs=2 / 60)


@pytest.mark.parametrize("media_s", [None, 60.0])
def test_regular_lines_are_kept_whatever_is_lost_between_them(media_s: float | None) -> None:
    times_s = regular(3600)
    for kept in (
        times_s,
        times_s[(times_s < 10) | (times_s > 25)],  # tracking was lost
        np.concatenate([times_s[:1200], times_s[1800:], ]),
        times_s + EPOCH,  # the clock was never reset
        np.sort(times_s + np.random.default_rng(0).exponential(0.05, 3600)),
        np.arange(6) * 10.0,  # one reading every ten seconds
        times_s[np.argsort(times_s + np.random.default_rng(1).uniform(0, 0.3, 3600))],
    ):  # fmt: skip
        assert wrong_rows(kept, media_s) == []


def test_without_media_a_pause_of_an_hour_is_believed_and_a_day_is_not() -> None:
    times_s = regular()
    for jump_s, expected in ((HOUR, 0), (EPOCH, 250), (-3.0, 250)):
        jumped = times_s + jump_s * (np.arange(500) >= 250)
        assert len(wrong_rows(jumped, None)) == expected


@pytest.fixture
def session(tmp_path: Path) -> Path:
    write_session(tmp_path / "one")
    write_lines(
        tmp_path / "one" / "text.jsonl", [{"timestamp": 0.5, "stream": "internal", "text": "hi"}]
    )
    return tmp_path / "one"  # fmt: skip


def change(session: Path, new_time: Callable[[int, float], float]) -> list[dict[str, Any]]:
    """Change the timestamps of the session's 60 lines; return the recorded lines."""
    recorded = read_lines(session / "metadata.jsonl")
    lines = [
        {**line, "timestamp": new_time(i, line["timestamp"])} for i, line in enumerate(recorded)
    ]
    write_lines(session / "metadata.jsonl", lines)
    return recorded


@pytest.mark.parametrize("has_media", [True, False])
@pytest.mark.parametrize("row", [0, 31, 59])
@pytest.mark.parametrize("wrong_s", [HOUR, -HOUR, 1e9, EPOCH])
def test_one_wrong_timestamp_makes_no_sample(
    session: Path, row: int, wrong_s: float, has_media: bool
) -> None:
    if not has_media:
        for file in ("vision_left.mp4", "audio.wav", "text.jsonl"):
            (session / file).unlink()
    change(session, lambda i, time_s: wrong_s if i == row else time_s)
    scan = scan_session(session, recipe=RECIPE)
    assert scan.duration_s < 2.2
    assert scan.num_segments <= 2
    assert any(f"metadata.jsonl line {row + 1}: timestamp" in issue for issue in scan.issues)
    errors = check_session(session, recipe=RECIPE).report.errors
    assert any(f"metadata.jsonl line {row + 1}: timestamp" in e for e in errors)


def test_one_timestamp_that_is_seconds_ahead_makes_no_sample(session: Path) -> None:
    change(session, lambda i, time_s: 15.0 if i == 30 else time_s)
    scan = scan_session(session, recipe=RECIPE)
    assert scan.duration_s == pytest.approx(2.0, abs=0.05)
    errors = check_session(session, recipe=RECIPE).report.errors
    assert any("line 31: timestamp 15.000 s does not fit the lines around it" in e for e in errors)


def test_a_clock_that_goes_back_to_the_same_times_is_masked_until_it_is_repaired(
    session: Path,
) -> None:
    recorded = change(session, lambda i, time_s: round(time_s - 1.2 * (i >= 40), 6))
    scan = scan_session(session, recipe=RECIPE)
    assert scan.intervals["touch"].stop_s == pytest.approx(40 / 30, abs=0.05)
    errors = check_session(session, recipe=RECIPE).report.errors
    assert any("lines 41 to 60: the clock jumps" in e and "--fix" in e for e in errors)
    repair_session(session, recipe=RECIPE)
    repaired = read_lines(session / "metadata.jsonl")
    np.testing.assert_allclose([line["timestamp"] for line in repaired],
                               [line["timestamp"] for line in recorded], atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("jump_s", [HOUR, -HOUR, EPOCH, 5.0, -1.5])
def test_a_jump_is_removed_only_by_the_repair(session: Path, jump_s: float) -> None:
    recorded = change(session, lambda i, time_s: time_s + jump_s * (i >= 30))
    before = (session / "metadata.jsonl").read_bytes()
    scan = scan_session(session, recipe=RECIPE)
    assert scan.duration_s == pytest.approx(2.0, abs=0.05)
    assert scan.intervals["touch"].stop_s == pytest.approx(1.0, abs=0.05)
    assert scan_from_json(scan.as_json()) == scan
    reader = SessionReader(session, scan, recipe=RECIPE, streams=["touch"])
    stored = np.concatenate([reader.read_sensor("touch", s) for s in scan.segments(RECIPE)])
    assert np.isfinite(stored[:30]).all()
    assert np.isnan(stored[31:]).all()
    done = repair_session(session, recipe=RECIPE)
    assert "after a jump of the clock" in done[0]
    assert (session / "metadata.jsonl.orig").read_bytes() == before
    repaired = read_lines(session / "metadata.jsonl")
    assert [line["touch"] for line in repaired] == [line["touch"] for line in recorded]
    np.testing.assert_allclose(
        [line["timestamp"] for line in repaired],
        [line["timestamp"] for line in recorded],
        atol=1e-3,
    )
    assert check_session(session, recipe=RECIPE).report.errors == ()
    assert repair_session(session, recipe=RECIPE) == []


def test_texts_after_the_jump_follow_it(session: Path) -> None:
    change(session, lambda i, time_s: time_s + HOUR * (i >= 30))
    texts = [{"timestamp": t, "stream": "internal", "text": "x"} for t in (0.5, HOUR + 1.5)]
    write_lines(session / "text.jsonl", texts)
    repair_session(session, recipe=RECIPE)
    assert [t["timestamp"] for t in read_lines(session / "text.jsonl")] == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize("unit", ["ms", "us", "ns", "100ns"])
@pytest.mark.parametrize("since_s", [0.0, EPOCH])
def test_the_build_converts_the_unit_that_the_media_confirm(
    session: Path, unit: str, since_s: float
) -> None:
    expected = scan_session(session, recipe=RECIPE)
    change(session, lambda _, time_s: round((since_s + time_s) * TIME_UNITS[unit]))
    scan = scan_session(session, recipe=RECIPE)
    assert scan.duration_s == pytest.approx(expected.duration_s, abs=0.01)
    assert any(UNIT_NAMES[unit] in issue and "divided" in issue for issue in scan.issues)
    segment = scan.segments(RECIPE)[0]
    reader = SessionReader(session, scan, recipe=RECIPE, streams=["proprio"])
    write_lines(session / "metadata.jsonl", sensor_lines(2.0))
    whole = SessionReader(session, expected, recipe=RECIPE, streams=["proprio"])
    tolerance = 2e-3 if unit == "ms" else 1e-4
    expected_values = whole.read_sensor("proprio", segment)
    change(session, lambda _, time_s: round((since_s + time_s) * TIME_UNITS[unit]))
    np.testing.assert_allclose(
        reader.read_sensor("proprio", segment)[:-1], expected_values[:-1], atol=tolerance
    )


def test_the_build_refuses_a_unit_that_nothing_confirms(tmp_path: Path) -> None:
    sessions = tmp_path / "sessions"
    write_tiny_session(sessions / "good", 3.0)
    lines = sensor_lines(8.0)
    for line in lines:
        line["timestamp"] = round(line["timestamp"] * 1000)
    (sessions / "in_ms").mkdir()
    write_lines(sessions / "in_ms" / "metadata.jsonl", lines)
    out = tmp_path / "set"
    build_set(sessions, out)
    assert {key for _, key in set_contents(out)} or True
    (line,) = (
        x
        for x in jsonl(out / "rejected.jsonl")
        if x["session"] == "in_ms" and x["level"] == "session"
    )
    assert "timestamps look like milliseconds, not seconds" in line["reason"]
    assert "time_unit: ms" in line["reason"]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("since_s", [0.0, EPOCH])
def test_texts_alone_in_another_unit(session: Path, unit: str, since_s: float) -> None:
    change(session, lambda _, time_s: since_s + time_s)
    texts = [
        {"timestamp": round((since_s + t) * TIME_UNITS[unit]), "stream": "internal", "text": "x"}
        for t in (0.2, 1.0, 1.6)
    ]
    write_lines(session / "text.jsonl", texts)
    scan = scan_session(session, recipe=RECIPE)
    assert "internal_text" in scan.intervals
    assert not any("outside" in issue for issue in scan.issues)
    (error,) = check_session(session, recipe=RECIPE).report.errors
    assert f"text.jsonl: timestamps look like {UNIT_NAMES[unit]}" in error
    repair_session(session, recipe=RECIPE)
    assert not check_session(session, recipe=RECIPE).report.errors


def write_texts(session: Path, since_s: float) -> None:
    texts = [{"timestamp": since_s + t, "stream": "internal", "text": "x"} for t in (0.5, 1.5)]
    write_lines(session / "text.jsonl", texts)


def test_texts_on_the_session_clock_beside_sensors_on_the_epoch_stay(session: Path) -> None:
    change(session, lambda _, time_s: EPOCH + time_s)
    write_texts(session, 0.0)
    scan = scan_session(session, recipe=RECIPE)
    assert scan.start_overrides["internal_text"] == 0.5
    assert any("internal_text is on the session clock" in issue for issue in scan.issues)
    tokenizer = train_tokenizer(["x"], vocab_size=300)
    reader = SessionReader(session, scan, recipe=RECIPE, tokenizer=tokenizer)
    events = [e for s in scan.segments(RECIPE) for e in reader.read_text("internal_text", s).events]
    assert [event.time_s for event in events] == pytest.approx([0.5, 1.5])
    warnings = check_session(session, recipe=RECIPE).report.warnings
    assert any("internal_text is on the session clock" in warning for warning in warnings)
    repair_session(session, recipe=RECIPE)
    assert check_session(session, recipe=RECIPE).report.warnings == ()
    assert [e["timestamp"] for e in read_lines(session / "text.jsonl")] == [0.5, 1.5]


def test_texts_on_the_epoch_beside_sensors_from_zero_are_named(session: Path) -> None:
    write_texts(session, EPOCH)
    scan = scan_session(session, recipe=RECIPE)
    assert scan.duration_s < 2.1
    reason = scan.absent["internal_text"]
    assert "look like seconds since 1970, from 2023-11-14 22:13:20 UTC on" in reason
    assert '"start_s": {"internal_text": SECONDS}' in reason
    (session / "session.json").write_text('{"start_s": {"internal_text": 0.5}}')
    scan = scan_session(session, recipe=RECIPE)
    assert "internal_text" in scan.intervals


def test_texts_and_sensors_on_the_epoch_share_an_offset(session: Path) -> None:
    change(session, lambda _, time_s: EPOCH + time_s)
    write_texts(session, EPOCH)
    scan = scan_session(session, recipe=RECIPE)
    assert (scan.clock_offset_s, scan.start_overrides) == (EPOCH, {})
    assert "internal_text" in scan.intervals
