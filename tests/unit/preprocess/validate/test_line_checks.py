"""Lines, gaps, rates and expectations: the same checks for every timestamped file and kind."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.sessions import (
    make_readings,
    reading_columns,
    reading_lines,
    write_lines,
    write_streams,
    write_table,
    write_tone,
    write_video,
)
from hypothesis import given
from hypothesis import strategies as st

from preprocess.validate.line_checks import find_gaps
from preprocess.validate.repair import repair_session
from preprocess.validate.report import check_session
from shared.clock import measure_rate_hz
from shared.recipe import Recipe
from shared.streams import SensorStream, ValueGroup

if TYPE_CHECKING:
    from pathlib import Path

    from preprocess.validate.report import ValidationReport

SUFFIXES = [".jsonl", ".csv", ".tsv", ".parquet"]
GROUP = {"count": 2, "type": "scalar", "names": ["a", "b"]}


def recipe_of(streams: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"segment": {"duration_s": 1.0}, "streams": streams})


def sensor(file: str, **keys: Any) -> dict[str, Any]:
    return {"kind": "sensor", "file": file, "values": [GROUP], **keys}


def write_rows(folder: Path, recipe: Recipe, name: str, rows: np.ndarray) -> None:
    """Write rows of good readings, in the given order."""
    spec = recipe.sensors[name]
    times_s, values = make_readings(spec, 4.0)
    folder.mkdir(exist_ok=True)
    if spec.file.endswith(".jsonl"):
        write_lines(folder / spec.file, reading_lines(spec, times_s[rows], values[rows]))
    else:
        write_table(folder / spec.file, reading_columns(spec, times_s[rows], values[rows]))


def check_rows(folder: Path, suffix: str, rows: np.ndarray, **keys: Any) -> ValidationReport:
    """Write a file of a sensor of 60 Hz, and check it."""
    recipe = recipe_of({"imu": sensor(f"imu{suffix}", rate_hz=60, **keys)})
    write_rows(folder, recipe, "imu", rows)
    return check_session(folder, recipe=recipe).report


WHOLE = np.arange(240)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_good_file_of_any_type_passes(suffix: str, tmp_path: Path) -> None:
    report = check_rows(tmp_path / "one", suffix, WHOLE)
    assert (report.status, report.warnings, report.errors) == ("passed", (), ())
    assert report.streams == {"imu": "passed"}
    stats = report.stats["streams"]["imu"]
    assert (stats["readings"], stats["rate_hz"]) == (240, pytest.approx(60, abs=0.01))
    assert [g["type"] for g in stats["values"]] == ["scalar"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("rows", "check", "status", "words"),
    [
        (np.r_[0:50, 51, 50, 52:240], "timestamps", "warnings", "line 52: timestamp goes back by"),
        (np.r_[0:200, 100:240], "timestamps", "failed", "line 201: timestamp goes back by 1.6"),
        (np.r_[0:50, 49:240], "timestamps", "warnings", "line 51: timestamp 0.8"),
        (np.r_[0:50, 51:240], "gaps", "warnings", "line 50 (0.817 s): no line for 33 ms after it"),
        (np.r_[0:50, 62:240], "gaps", "failed", "line 50 (0.817 s): no line for 0.217 s after it"),
    ],
)
def test_faults_of_lines_are_found_in_every_file(
    suffix: str, rows: np.ndarray, check: str, status: str, words: str, tmp_path: Path
) -> None:
    report = check_rows(tmp_path / "one", suffix, rows)
    messages = report.errors if status == "failed" else report.warnings
    assert report.checks[check] == status
    if suffix in (".csv", ".tsv"):  # the header is line 1
        number = int(words.split()[1].rstrip(":"))
        words = words.replace(f"line {number}", f"line {number + 1}", 1)
    words = words.replace("line ", "row ", 1) if suffix == ".parquet" else words
    assert any(m.startswith(f"imu{suffix} {words}") for m in messages), messages
    promises = [m for m in messages if "--fix" in m and "sort" not in m]
    assert not promises or suffix == ".jsonl"


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_undeclared_unit_is_named_with_its_key(suffix: str, unit: str, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    declared = recipe_of({"imu": sensor(f"imu{suffix}", rate_hz=60, time_unit=unit)})
    write_rows(folder, declared, "imu", WHOLE)
    assert check_session(folder, recipe=declared).report.status == "passed"
    recipe = recipe_of({"imu": sensor(f"imu{suffix}", rate_hz=60)})
    (error,) = check_session(folder, recipe=recipe).report.errors
    assert error.startswith(f"imu{suffix}: timestamps look like ")
    assert f"set `time_unit: {unit}` of imu in the recipe" in error


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_missing_column_fails_its_stream_only(suffix: str, tmp_path: Path) -> None:
    recipe = recipe_of(
        {
            "imu": sensor(f"imu{suffix}", rate_hz=60),
            "hand": {
                "kind": "sensor",
                "file": f"imu{suffix}",
                "values": [{"count": 1, "type": "angle", "names": ["elbow"]}],
            },
        }
    )
    write_rows(tmp_path / "one", recipe, "imu", WHOLE)
    report = check_session(tmp_path / "one", recipe=recipe).report
    assert report.streams == {"hand": "failed", "imu": "passed"}
    assert any("no column elbow; its columns are" in error for error in report.errors)


def slow_gaps(times_s: list[float], spec: SensorStream) -> tuple[list[int], list[int]]:
    """Return the indices of short and of long gaps, interval by interval."""
    steps = [b - a for a, b in itertools.pairwise(times_s)]
    middle = sorted(steps)
    median = (middle[(len(steps) - 1) // 2] + middle[len(steps) // 2]) / 2
    limit = spec.max_gap_s or 3 / spec.rate_hz
    short, long = [], []
    for i, step in enumerate(steps):
        is_lost = step >= 1.8 * median
        if spec.expect.max_gap_s is not None:
            long += [i] if step > spec.expect.max_gap_s + 1e-6 else []
        elif spec.resample == "hold":
            short += [i] if is_lost and step >= limit + 1e-6 else []
        elif is_lost and step > limit + 1e-6 and step > 1.8 * median + 1e-6:
            long.append(i)
        elif is_lost and step >= 1.05 / spec.rate_hz:
            short.append(i)
    return short, long


@given(
    steps=st.lists(st.sampled_from([1, 1, 1, 1, 2, 3, 4, 8, 16, 50]), min_size=1, max_size=60),
    interval_s=st.sampled_from([1 / 512, 1 / 128, 1 / 64, 1 / 32, 1 / 8, 1.0]),
    rate_hz=st.sampled_from([1.0, 15.0, 30.0, 120.0]),
    keys=st.sampled_from([{}, {"max_gap_s": 0.25}, {"resample": "hold"}, {"max_gap_s": 2.0}]),
    expected_s=st.sampled_from([None, None, 0.05, 1.5]),
)
def test_gaps_are_those_of_the_slow_reference(
    steps: list[int],
    interval_s: float,
    rate_hz: float,
    keys: dict[str, Any],
    expected_s: float | None,
) -> None:
    spec = SensorStream(
        key="imu",
        rate_hz=rate_hz,
        values=(ValueGroup(count=1, type="scalar"),),
        expect={"max_gap_s": expected_s},
        **keys,
    )
    times_s = np.concatenate([[0.0], np.cumsum(steps) * interval_s])
    gaps = find_gaps(times_s, spec)
    short, long = slow_gaps(times_s.tolist(), spec)
    assert np.flatnonzero(gaps.is_short).tolist() == short
    assert np.flatnonzero(gaps.is_long).tolist() == long
    if set(steps) == {1}:  # a regular recorder has no gaps, whatever its rate
        assert not gaps.is_short.any()
        assert expected_s is not None or not gaps.is_long.any()
        if len(steps) > 1:
            assert measure_rate_hz(times_s) == pytest.approx(1 / interval_s)


@given(
    rate_hz=st.sampled_from([1.0, 5.0, 10.0, 25.0, 29.97, 60.0, 72.0, 90.0]),
    jitter=st.lists(st.floats(-0.2, 0.2), min_size=30, max_size=30),
    keys=st.sampled_from([{}, {"resample": "hold"}, {"resample": "hold", "max_age_s": 0.2}]),
)
def test_a_recorder_of_any_rate_with_jitter_has_no_gaps(
    rate_hz: float, jitter: list[float], keys: dict[str, Any]
) -> None:
    spec = SensorStream(key="imu", values=(ValueGroup(count=1, type="scalar"),), **keys)
    gaps = find_gaps((np.arange(30) + jitter) / rate_hz, spec)
    assert not (gaps.is_short | gaps.is_long).any()


@pytest.mark.parametrize("is_apart", [True, False])
def test_lines_of_sensors_at_different_rates_have_no_gaps(is_apart: bool, tmp_path: Path) -> None:
    group = {"count": 2, "type": "scalar"}
    streams = {
        name: {"kind": "sensor", "key": name, "values": [group], **keys}
        for name, keys in (
            ("fast", {}),
            ("slow", {}),
            ("rare", {"resample": "hold", "max_age_s": 2.0}),
        )
    }
    recipe = recipe_of(streams)
    lines: list[dict[str, Any]] = []
    for i in range(360):
        readings = {name: [i, -i] for name, every in (("fast", 1), ("slow", 3), ("rare", 90))
                    if i % every == 0}  # fmt: skip
        apart = [{"timestamp": i / 90 + k / 500, n: v} for k, (n, v) in enumerate(readings.items())]
        lines += apart if is_apart else [{"timestamp": i / 90, **readings}]
    write_lines(tmp_path / "metadata.jsonl", lines)
    report = check_session(tmp_path, recipe=recipe).report
    assert (report.errors, report.warnings) == ((), ())
    assert repair_session(tmp_path, recipe=recipe) == []


def test_streams_of_a_file_with_the_same_gaps_have_one_message(tmp_path: Path) -> None:
    group = {"count": 2, "type": "scalar"}
    streams = {
        name: {"kind": "sensor", "key": name, "rate_hz": rate_hz, "values": [group]}
        for name, rate_hz in (("left", 60), ("right", 60), ("slow", 10))
    }
    recipe = recipe_of(streams)
    write_streams(
        tmp_path / "one",
        recipe,
        duration_s=4.0,
        gaps={"left": [(2.0, 2.5)], "right": [(2.0, 2.5)], "slow": [(1.0, 2.0)]},
    )
    report = check_session(tmp_path / "one", recipe=recipe).report
    # Between them, `slow` still writes lines: only readings are missing.
    assert sorted(m.split(": no ")[1].split(" for ")[0] for m in report.errors) == [
        "left, right reading",
        "slow reading",
    ]


def test_hold_accepts_rare_readings_until_they_are_too_old(tmp_path: Path) -> None:
    rows = np.r_[0:240:12]  # 5 Hz
    by_type = check_rows(tmp_path / "one", ".csv", rows)
    assert by_type.checks["rates"] == "failed"
    assert "set `resample: hold`" in by_type.errors[0]
    held = check_rows(tmp_path / "two", ".csv", rows, resample="hold", max_age_s=0.5)
    assert held.status == "passed"
    old = check_rows(
        tmp_path / "three", ".csv", np.r_[0:60:12, 120:240:12], resample="hold", max_age_s=0.5
    )
    (warning,) = old.warnings
    assert "no line for 1.200 s after it" in warning
    assert "readings older than 0.5 s are masked" in warning


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"min_rate_hz": 61}, "imu has 60 Hz on average, below its expect.min_rate_hz 61"),
        ({"max_gap_s": 0.01}, "no line for 17 ms after it (gaps over 10 ms are"),
        ({"range": [-2.9, 4]}, "outside expect.range [-2.9, 4]"),
        ({"min_rate_hz": 59, "max_gap_s": 0.02, "range": [-3.01, 3.01]}, ""),
    ],
)
def test_expectations_of_a_sensor_are_judged(
    expect: dict[str, Any], words: str, tmp_path: Path
) -> None:
    report = check_rows(tmp_path / "one", ".csv", WHOLE, expect=expect)
    assert report.streams["imu"] == ("failed" if words else "passed")
    assert any(words in error for error in report.errors) == bool(words)


def test_expectations_of_media_and_texts_are_judged(tmp_path: Path) -> None:
    def streams(rate_hz: float, gap_s: float) -> dict[str, Any]:
        expect = {"min_rate_hz": rate_hz, "max_gap_s": gap_s}
        return {
            "camera": {"kind": "video", "file": "camera.mp4", "expect": expect},
            "voice": {
                "kind": "audio",
                "file": "voice.wav",
                "expect": {"min_rate_hz": 500 * rate_hz},
            },
            "notes": {"kind": "text", "file": "notes.jsonl", "expect": {"max_gap_s": 10 * gap_s}},
        }

    write_video(tmp_path / "camera.mp4", times_s=[i / 30 for i in range(60) if not 20 < i < 24])
    write_tone(tmp_path / "voice.wav")
    write_lines(tmp_path / "notes.jsonl", [{"timestamp": t, "text": "hm"} for t in (0.1, 1.8)])
    good = check_session(tmp_path, recipe=recipe_of(streams(27.0, 0.2))).report
    assert good.status == "passed", good.as_dict()
    bad = check_session(tmp_path, recipe=recipe_of(streams(33.0, 0.1))).report
    assert bad.streams == dict.fromkeys(("camera", "notes", "voice"), "failed")
    assert len(bad.errors) == 4  # rate and gap of the video


def test_a_slow_video_is_a_warning(tmp_path: Path) -> None:
    write_video(tmp_path / "camera.mp4", times_s=np.arange(8))
    recipe = recipe_of({"camera": {"kind": "video", "file": "camera.mp4"}})
    (warning,) = check_session(tmp_path, recipe=recipe).report.warnings
    assert warning.startswith("camera.mp4: camera is recorded at 1 Hz, its rate_hz is 5; frames")


def test_a_file_of_many_bad_lines_counts_them_all(tmp_path: Path) -> None:
    recipe = recipe_of(
        {"imu": {"kind": "sensor", "key": "imu", "values": [GROUP | {"names": None}]}}
    )
    lines = [{"timestamp": i / 30, "imu": [0.0, 0.0] if i < 100 else [0.0]} for i in range(2200)]
    write_lines(tmp_path / "metadata.jsonl", lines)
    report = check_session(tmp_path, recipe=recipe).report
    assert report.streams["imu"] == "failed"
    assert "metadata.jsonl: 2095 more like these" in report.errors


def test_a_text_without_its_time_names_the_key_of_the_recipe(tmp_path: Path) -> None:
    streams = {"imu": sensor("metadata.jsonl", time="t"), "said": {"kind": "text", "stream": "me"}}
    lines = [{"t": i / 30, "a": i, "b": i} for i in range(60)]
    lines[7]["me_text"] = "hello"
    write_lines(tmp_path / "metadata.jsonl", lines)
    (warning,) = check_session(tmp_path, recipe=recipe_of(streams)).report.warnings
    assert "line 8: no timestamp, but 't'" in warning
    assert "fix: set `time: t` of said in the recipe" in warning
    recipe = recipe_of({**streams, "said": {**streams["said"], "time": "t"}})
    assert check_session(tmp_path, recipe=recipe).report.warnings == ()
