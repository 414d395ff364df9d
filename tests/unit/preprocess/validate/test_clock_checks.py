"""Drift and offset of clocks: generated truth, numpy and scipy as oracles, and what is reported."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.clocks import stamp_readings
from helpers.sessions import write_lines, write_tone, write_video
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from preprocess.validate.clock_checks import (
    LIMIT_S,
    Clock,
    check_drift,
    count_clock,
    count_readings,
    fit_clocks,
)
from preprocess.validate.report import check_session
from shared.recipe import Recipe
from shared.session.rates import RateFault

if TYPE_CHECKING:
    from pathlib import Path

    from preprocess.validate.report import CheckedSession

LENGTH_S = 120.0
SENSOR = {"kind": "sensor", "values": [{"count": 1, "type": "scalar"}]}
TOUCH = {"audio": {"kind": "audio", "file": "audio.wav"}, "touch": {**SENSOR, "key": "touch"}}


def measured(times_s: np.ndarray, declared_hz: float | None = None) -> Clock:
    clock = count_clock(times_s.tobytes(), declared_hz)
    assert isinstance(clock, Clock), clock
    return clock


def checked(folder: Path, streams: dict[str, Any]) -> CheckedSession:
    session = check_session(folder, recipe=Recipe.model_validate({"streams": streams}))
    assert session.report.errors == ()
    return session


def write_touch(folder: Path, times_s: np.ndarray) -> None:
    lines = [{"timestamp": round(t, 6), "touch": [i % 7]} for i, t in enumerate(times_s.tolist())]
    write_lines(folder / "metadata.jsonl", lines)


@pytest.mark.parametrize("drift_ppm", [-500, -100, 20, 100, 500])
@pytest.mark.parametrize("fault", [{}, {"lost": 0.01}, {"lost": 0.01, "jump_s": 0.5}])
@pytest.mark.parametrize(
    ("rate_hz", "jitter"), [(30, "Gaussian"), (90, "uniform"), (72, "packets")]
)
def test_the_drift_of_a_device_is_measured(
    rate_hz: float, jitter: Any, fault: dict[str, float], drift_ppm: float
) -> None:
    clock = measured(stamp_readings(rate_hz, 120, drift_ppm, jitter=jitter, **fault))
    assert abs(clock.drift_ppm - drift_ppm) < 4 * clock.drift_error_ppm
    assert clock.drift_error_ppm < (100 if jitter == "packets" else 10)


@pytest.mark.parametrize("seed", range(4))
def test_regression_agrees_with_numpy_and_scipy(seed: int) -> None:
    times_s = stamp_readings(90, 60, 200, seed=seed)
    clock, numbers = measured(times_s), np.arange(len(times_s))
    line = stats.linregress(times_s, numbers / 90)
    ppm, error_ppm = 1e6 * (line.slope - 1), 1e6 * line.stderr
    assert clock.drift_ppm == pytest.approx(ppm, abs=0.01)
    assert clock.drift_ppm == pytest.approx(
        1e6 * (np.polyfit(times_s, numbers / 90, 1)[0] - 1), abs=0.01
    )
    assert error_ppm * 0.99 < clock.drift_error_ppm < 2 * error_ppm  # the jitter is independent
    robust = 1e6 * (stats.theilslopes(numbers[::9] / 90, times_s[::9]).slope - 1)
    assert abs(clock.drift_ppm - robust) < 12 * clock.drift_error_ppm


def test_drift_and_offset_of_two_clocks_are_told_apart() -> None:
    x_s = np.sort(np.random.default_rng(0).uniform(2, 100, 2000))
    y_s = 0.35 + x_s * (1 + 80e-6) + np.random.default_rng(1).normal(0, 0.001, 2000)
    clock, residuals_s = fit_clocks(x_s, y_s)
    slope, intercept = np.polyfit(x_s - x_s[0], y_s - x_s, 1)
    assert clock.drift_ppm == pytest.approx(1e6 * slope, abs=0.01)
    assert clock.offset_s == pytest.approx(intercept, abs=1e-6)
    assert abs(clock.offset_s - 0.35 - 80e-6 * x_s[0]) < 4 * (clock.offset_error_s or 0)
    assert residuals_s.std() == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("jitter", ["Gaussian", "uniform", "packets", "slow load"])
def test_errors_cover_the_truth_and_nothing_alarms_without_drift(jitter: Any) -> None:
    clocks = [
        measured(stamp_readings(90, 30, 0, jitter=jitter, lost=0.01, seed=seed))
        for seed in range(200)
    ]
    is_far = np.array([abs(clock.drift_ppm) > 3 * clock.drift_error_ppm for clock in clocks])
    assert is_far.mean() < 0.03
    assert not any(abs(clock.drift_ppm) * 30e-6 > LIMIT_S for clock in clocks)


@settings(max_examples=25, deadline=None)
@given(
    rate_hz=st.sampled_from([30, 72, 90, 120]),
    drift_ppm=st.floats(-500, 500),
    share=st.floats(0, 0.015),
    jitter=st.floats(0, 0.3),
    seed=st.integers(0, 2**32 - 1),
)
def test_lost_readings_are_counted(
    rate_hz: float, drift_ppm: float, share: float, jitter: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    numbers = np.flatnonzero(rng.random(30 * rate_hz) >= share)
    times_s = (numbers * (1 + drift_ppm / 1e6) + rng.uniform(0, jitter, len(numbers))) / rate_hz
    counted = count_readings(times_s, rate_hz)
    assert not isinstance(counted, str)
    found, spans = counted
    wrong = found - numbers
    for span in range(spans.max() + 1):  # four in a row are a pause
        own = wrong[spans == span]
        assert (own != np.median(own)).mean() < 0.05  # only in the window of a lost reading


def test_a_declared_rate_is_the_nominal_one() -> None:
    times_s = stamp_readings(110, 60, 50)
    assert re.fullmatch(
        r"its rate, 110.* Hz, is not a usual one", str(count_clock(times_s.tobytes()))
    )
    assert abs(measured(times_s, declared_hz=110).drift_ppm - 50) < 20


@pytest.mark.parametrize(
    ("times_s", "reason"),
    [
        (stamp_readings(30, 9, 0), "shorter than 10 s"),
        (stamp_readings(10, 15, 0), "under 192 readings"),
        (np.round(np.arange(900) / 30, 3), "counted, not measured"),
        (stamp_readings(60 / 1.001, 30, 0), "59.94 Hz, is not a usual one"),
        (stamp_readings(100, 30, 50, jitter="packets"), "packets of equal size"),
        (stamp_readings(1000, 30, 50, lost=0.01), "too irregular"),
    ],
    ids=["short", "few", "counted", "unusual", "packets", "irregular"],
)
def test_what_times_do_not_tell_is_not_assessed(times_s: np.ndarray, reason: str) -> None:
    assert reason in str(count_clock(times_s.tobytes()))


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """Write a session whose lines are stamped by a clock that runs 600 ppm fast."""
    write_touch(tmp_path, stamp_readings(30, LENGTH_S, -600))
    write_tone(tmp_path / "audio.wav", LENGTH_S)
    return tmp_path


def test_times_that_also_end_apart_are_reported_with_the_fix(wrong: Path) -> None:
    session = checked(wrong, TOUCH)
    (message,) = session.report.warnings
    assert message.startswith("metadata.jsonl: touch: its clock runs 60")
    assert "0.07 s more by the end" in message
    clock = session.report.stats["clocks"]["touch"]
    stretch = json.loads("{" + message.split(" into ")[0].split("write ")[1] + "}")
    assert stretch == {"stretch": {"touch": round(1 + clock["drift_ppm"] / 1e6, 7)}}
    assert session.report.checks["drift"] == "warnings"
    assert session.report.streams["touch"] == "warnings"
    (wrong / "session.json").write_text(json.dumps(stretch))
    fixed = checked(wrong, TOUCH).report
    assert fixed.warnings == ()
    assert abs(fixed.stats["clocks"]["touch"]["drift_ppm"]) < 1


def test_a_slow_device_whose_times_are_right_is_no_fault(wrong: Path) -> None:
    write_tone(wrong / "audio.wav", LENGTH_S * 1.0006)
    report = checked(wrong, TOUCH).report
    assert report.warnings == ()
    assert report.stats["clocks"]["touch"]["drift_ppm"] == pytest.approx(-600, abs=10)
    assert not report.stats["clocks"]["touch"]["is_fault"]


@pytest.mark.parametrize(("early_s", "is_fault"), [(0.03, True), (0.12, False)])
def test_a_fault_explains_the_end_to_within_a_tenth_of_a_second(
    tmp_path: Path, early_s: float, is_fault: bool
) -> None:
    write_touch(tmp_path, stamp_readings(30, 300, -500))  # 0.15 s more by the end
    write_tone(tmp_path / "audio.wav", 300 - early_s)
    report = checked(tmp_path, TOUCH).report
    assert report.stats["clocks"]["touch"]["is_fault"] is is_fault
    assert report.checks["drift"] == ("warnings" if is_fault else "passed")


def test_a_stream_with_a_surely_wrong_rate_is_reported_once(wrong: Path) -> None:
    probe = checked(wrong, TOUCH).probe
    assert probe is not None
    fault = RateFault(
        streams=("touch",), stop_s=1, true_stop_s=2, factor=2, evidence="", wrong_from_s=0
    )
    assert check_drift(probe) != []
    assert check_drift(replace(probe, rate_faults=(fault,))) == []
    assert check_drift(replace(probe, rate_faults=(replace(fault, is_sure=False),))) != []


def test_a_counted_video_is_compared_with_readings_of_its_frames(tmp_path: Path) -> None:
    counted_s = np.arange(600) / 10
    stamped_s = 0.3 + 1.002 * counted_s + np.random.default_rng(0).uniform(0, 0.01, 600)
    write_video(tmp_path / "eye.mp4", times_s=counted_s)
    write_touch(tmp_path, stamped_s)
    streams = {"eye": {"kind": "video", "file": "eye.mp4"}, "touch": TOUCH["touch"]}
    report = checked(tmp_path, streams).report
    clock = report.stats["clocks"]["eye"]
    slope, offset_s = np.polyfit(stamped_s - stamped_s[0], counted_s - stamped_s, 1)
    assert clock["method"] == "frames"
    assert clock["drift_ppm"] == pytest.approx(1e6 * slope, abs=0.5)
    assert clock["offset_s"] == pytest.approx(offset_s, abs=1e-4)
    (message,) = [m for m in report.warnings if "stretch" in m]
    assert "eye.mp4: eye: its clock runs 19" in message
    assert '-0.305 s off at the start ("start_s" corrects that), 0.12 s more by the end' in message


def test_two_times_of_the_same_rows_are_compared(tmp_path: Path) -> None:
    arrived_s = stamp_readings(50, 200, 0, jitter="uniform")
    device_ms = 1e3 * np.arange(len(arrived_s)) / 50 * (1 + 300e-6)
    rows = ["timestamp,device_ms,a,b"]
    rows += [
        f"{t:.6f},{d:.3f},{i},{i}"
        for i, (t, d) in enumerate(zip(arrived_s, device_ms, strict=True))
    ]
    (tmp_path / "imu.csv").write_text("\n".join(rows))
    own = {"kind": "sensor", "file": "imu.csv", "rate_hz": 50}
    values = {name: [{"count": 1, "type": "scalar", "names": [name]}] for name in "ab"}
    streams = {
        "stamped": {**own, "values": values["a"]},
        "counted": {**own, "values": values["b"], "time": "device_ms", "time_unit": "ms"},
    }
    report = checked(tmp_path, streams).report
    clocks = report.stats["clocks"]
    slope = np.polyfit(arrived_s, device_ms / 1e3 - arrived_s, 1)[0]
    assert clocks["counted"]["drift_ppm"] == pytest.approx(1e6 * slope, abs=0.1)
    assert clocks["stamped"]["drift_ppm"] == pytest.approx(-1e6 * slope, abs=0.5)
    (message,) = [m for m in report.warnings if "clock" in m]
    assert message.startswith("imu.csv: counted: its clock runs 30")
    assert "against imu.csv timestamp, " in message


@pytest.mark.parametrize(
    ("sound_s", "ppm", "reason"),
    [(59.82, -3000, ""), (60.15, 2500, ""), (50.0, None, "it was cut off, or stopped then")],
)
def test_a_length_is_measured_and_never_a_fault(
    sound_s: float, ppm: float | None, reason: str, tmp_path: Path
) -> None:
    write_touch(tmp_path, np.arange(1800) / 30)
    write_tone(tmp_path / "audio.wav", sound_s)
    report = check_session(tmp_path, recipe=Recipe.model_validate({"streams": TOUCH})).report
    clock = report.stats["clocks"]["audio"]
    assert report.checks["drift"] != "warnings"
    if ppm is None:
        assert reason in clock["not_assessed"]
        return
    assert clock["drift_ppm"] == pytest.approx(ppm, abs=5)
    assert clock["drift_error_ppm"] == pytest.approx(0.1 / 60 * 1e6, abs=1)
    assert clock["offset_s"] is None
    assert clock["reference"] == "metadata.jsonl, if they stopped together"
