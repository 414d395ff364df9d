"""--init: the proposed recipe loads, its session passes, and its guesses are right or scalar."""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from helpers.sessions import (
    make_readings,
    reading_lines,
    write_lines,
    write_session,
    write_streams,
    write_table,
    write_tone,
    write_video,
)
from hypothesis import given
from hypothesis import strategies as st

from preprocess.__main__ import cli
from preprocess.validate.propose import guess_groups, propose_recipe, round_rate
from preprocess.validate.report import check_session
from shared.errors import SessionError
from shared.recipe import Recipe, load_recipe
from shared.session.folder import read_text_events

if TYPE_CHECKING:
    from pathlib import Path


def propose(folder: Path) -> Recipe:
    """Return the proposal for a session; it must pass with it."""
    recipe = Recipe.model_validate(yaml.safe_load(propose_recipe(folder)))
    report = check_session(folder, recipe=recipe).report
    assert report.errors == (), report.errors
    return recipe


def types_of(recipe: Recipe, name: str) -> list[tuple[str, int]]:
    return [(str(group.type), group.count) for group in recipe.sensors[name].values]


def test_a_session_of_the_default_layout_is_recognized(tmp_path: Path) -> None:
    folder = write_session(tmp_path / "one")
    recipe = propose(folder)
    assert set(recipe.streams) == {
        "vision_left", "audio", "touch", "proprio", "internal_text", "external_text",
    }  # fmt: skip
    assert types_of(recipe, "proprio") == [("angle", 10), ("velocity", 10)]
    assert types_of(recipe, "touch") == [("fraction", 5)]
    assert (recipe.sensors["touch"].rate_hz, recipe.sensors["touch"].resample) == (30, "by_type")
    assert recipe.texts["internal_text"].stream == "internal"
    assert check_session(folder, recipe=recipe).report.status == "passed"


def test_the_command_prints_yaml_that_loads(tmp_path: Path) -> None:
    folder = write_session(tmp_path / "one")
    result = CliRunner().invoke(cli, ["validate", "--init", str(folder)])
    assert result.exit_code == 0, result.output
    (tmp_path / "recipe.yaml").write_text(result.stdout)
    assert "touch" in load_recipe(tmp_path / "recipe.yaml").streams
    check = ["validate", str(folder), "--recipe", str(tmp_path / "recipe.yaml"), "--strict"]
    assert CliRunner().invoke(cli, check).exit_code == 0
    assert CliRunner().invoke(cli, ["validate", "--init", str(folder), str(folder)]).exit_code == 2


MANY = {
    "wrist": {"kind": "video", "file": "wrist.mkv", "rate_hz": 10},
    "room": {"kind": "audio", "file": "room.wav"},
    "battery": {"kind": "sensor", "key": "battery", "rate_hz": 1,
                "values": [{"count": 1, "type": "fraction"}]},
    "head_pose": {"kind": "sensor", "key": "head_pose", "rate_hz": 90,
                  "values": [{"count": 3, "type": "position"}, {"count": 4, "type": "quaternion"}]},
    "hands_rotation": {"kind": "sensor", "file": "hands.jsonl", "key": "rotation", "rate_hz": 60,
                       "values": [{"count": 8, "type": "quaternion"}]},
    "hands_position": {"kind": "sensor", "file": "hands.jsonl", "key": "position", "rate_hz": 60,
                       "values": [{"count": 6, "type": "position"}]},
    "gaze": {"kind": "sensor", "file": "gaze.csv", "rate_hz": 120, "time_unit": "ns", "values": [
        {"count": 3, "type": "direction", "names": ["gaze x", "gaze y", "gaze z"]},
        {"count": 1, "type": "fraction", "names": ["open"]}]},
    "arm": {"kind": "sensor", "file": "arm.tsv", "rate_hz": 50, "values": [
        {"count": 2, "type": "angle", "names": ["elbow angle", "wrist angle"]},
        {"count": 2, "type": "scalar", "names": ["load", "heat"]}]},
    "imu": {"kind": "sensor", "file": "imu.parquet", "rate_hz": 200, "time_unit": "us", "values": [
        {"count": 4, "type": "quaternion", "names": ["rot.x", "rot.y", "rot.z", "rot.w"]},
        {"count": 3, "type": "scalar", "names": ["acc x", "acc y", "acc z"]}]},
    "notes": {"kind": "text", "file": "notes.jsonl"},
    "said_text": {"kind": "text", "stream": "said"},
}  # fmt: skip


def test_streams_of_every_kind_and_type_are_found_as_they_were_declared(tmp_path: Path) -> None:
    declared = Recipe.model_validate({"streams": MANY})
    folder = write_streams(tmp_path / "one", declared, duration_s=8.0)
    recipe = propose(folder)
    assert recipe.streams.keys() == declared.streams.keys()
    for name, spec in declared.sensors.items():
        found = recipe.sensors[name]
        assert types_of(recipe, name) == types_of(declared, name), name
        assert (found.file, found.rate_hz, found.units_per_s, found.names) == (
            spec.file, spec.rate_hz, spec.units_per_s, spec.names,
        )  # fmt: skip
    assert check_session(folder, recipe=recipe).report.status == "passed"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_that_are_empty_text_or_missing_elsewhere_are_apart(
    delimiter: str, tmp_path: Path
) -> None:
    comma = "," if delimiter == ";" else "."
    rows = [delimiter.join(["user", "time (ms)", "heat", "blink id", "never", "quat w",
                            "quat x", "quat y", "quat z"])]  # fmt: skip
    for i in range(200):
        angle = i / 50
        numbers = [math.cos(angle), math.sin(angle), 0.0, 0.0]
        cells = [f"{20 + math.sin(i / 9):.3f}", str(i) if i % 3 else "", ""]
        cells += [f"{number:.6f}" for number in numbers]
        rows.append(delimiter.join(["me", f"{i * 20}", *(c.replace(".", comma) for c in cells)]))
    (tmp_path / "glove.csv").write_text("\n".join(rows))
    text = propose_recipe(tmp_path)
    assert "# glove.csv: columns without numbers, or times: user, never" in text
    recipe = propose(tmp_path)
    assert set(recipe.streams) == {"glove", "glove_blink_id"}
    assert types_of(recipe, "glove") == [("scalar", 1), ("quaternion", 4)]
    assert recipe.sensors["glove"].values[1].names == ("quat x", "quat y", "quat z", "quat w")
    assert (recipe.sensors["glove"].time, recipe.sensors["glove"].time_unit) == ("time (ms)", "ms")


def test_a_file_on_a_clock_of_its_own_is_declared_so(tmp_path: Path) -> None:
    declared = Recipe.model_validate({"streams": {n: MANY[n] for n in ("hands_rotation", "arm")}})
    folder = write_streams(tmp_path / "one", declared, duration_s=8.0)
    lines = [json.loads(line) for line in (folder / "hands.jsonl").read_text().splitlines()]
    for line in lines:
        line["timestamp"] += 1.7e9
    write_lines(folder / "hands.jsonl", lines)
    write_tone(folder / "voice.wav", 8.0)
    recipe = propose(folder)
    assert recipe.sensors["arm"].clock == "own"
    assert recipe.sensors["hands_rotation"].clock == "session"
    report = check_session(folder, recipe=recipe).report
    stops_s = [stats["stop_s"] for stats in report.stats["streams"].values()]
    assert stops_s == pytest.approx([8] * 3, abs=0.1)


def test_rare_and_irregular_readings_are_held(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    times_s = np.cumsum(generator.exponential(0.5, 100)).round(3)
    lines = [{"timestamp": t, "button": float(i % 3)} for i, t in enumerate(times_s.tolist())]
    write_lines(tmp_path / "events.jsonl", lines)
    spec = propose(tmp_path).sensors["events_button"]
    assert spec.resample == "hold"
    assert spec.age_limit_s > np.diff(times_s).max()


def test_streams_that_fail_are_comments(tmp_path: Path) -> None:
    folder = write_session(tmp_path / "one")
    (folder / "vision_left.mp4").write_bytes((folder / "vision_left.mp4").read_bytes()[:900])
    lines = [{"timestamp": 1.0, "imu": [float(i)]} for i in range(50)]
    write_lines(folder / "imu.jsonl", [{"timestamp": 0.5, "imu": [0.0]}, *lines])
    text = propose_recipe(folder)
    assert "# vision_left.mp4 is left out: " in text
    assert "  # imu_imu: {kind: sensor, file: imu.jsonl, key: imu" in text
    assert "imu_imu" not in propose(folder).streams


@pytest.mark.parametrize(
    "content", [{}, {"metadata.jsonl": b""}, {"a.jsonl": b'{"time": "noon"}\n'}]
)
def test_a_folder_without_streams_is_a_clear_error(
    content: dict[str, bytes], tmp_path: Path
) -> None:
    for file, raw in content.items():
        (tmp_path / file).write_bytes(raw)
    with pytest.raises(SessionError, match=r"nothing in it can be a stream; .*fix: give"):
        propose_recipe(tmp_path)


def test_hostile_names_are_left_out_or_written_harmlessly(tmp_path: Path) -> None:
    write_video(tmp_path / "left; rm.mp4")
    write_tone(tmp_path / "Weight.wav")
    lines = reading_lines(*sensor_of("a: {b}\n#", 90))
    write_lines(tmp_path / "metadata.jsonl", lines)
    text = propose_recipe(tmp_path)
    assert "# left; rm.mp4 is left out: proposal: " in text
    recipe = propose(tmp_path)
    assert set(recipe.streams) == {"audio_weight", "a_b"}
    assert recipe.sensors["a_b"].key == "a: {b}\n#"


def sensor_of(key: str, rate_hz: float) -> tuple[Any, np.ndarray, np.ndarray]:
    stream = {"kind": "sensor", "key": key, "values": [{"count": 2, "type": "scalar"}]}
    spec = Recipe.model_validate({"streams": {"any": stream}}).sensors["any"]
    return spec, *make_readings(spec, 4.0, rate_hz=rate_hz)


@given(rate_hz=st.floats(0.05, 3000))
def test_a_round_rate_is_whole_in_a_segment_and_close(rate_hz: float) -> None:
    rounded = round_rate(rate_hz)
    assert (2 * rounded) == round(2 * rounded) > 0
    if 0.6 <= rate_hz <= 2000:
        assert 0.5 * rate_hz <= rounded <= 1.02 * rate_hz + 1e-9


@pytest.mark.parametrize(
    ("names", "columns", "expected"),
    [
        (["x", "y", "z"], "unit", [("scalar", 3)]),  # of what?
        (["pos_x", "pos_y", "pos_z"], "any", [("position", 3)]),
        (["gaze_x", "gaze_y", "gaze_z"], "unit", [("direction", 3)]),
        (["gaze_x", "gaze_y", "gaze_z"], "any", [("scalar", 3)]),
        (["lx", "ly", "lz"], "unit", [("scalar", 3)]),
        (["q.w", "q.x", "q.y", "q.z"], "unit", [("quaternion", 4)]),
        (["q.w", "q.x", "q.y", "q.z"], "any", [("scalar", 4)]),
        (["roll", "controller", "joint_0"], "unit", [("angle", 1), ("scalar", 1), ("angle", 1)]),
        (["roll [deg]", "elbow_vel", "gyro dps"], "any", [("scalar", 1), ("velocity", 1),
                                                       ("scalar", 1)]),
    ],
)  # fmt: skip
def test_columns_are_guessed_by_name_and_norm(
    names: list[str], columns: str, expected: list[tuple[str, int]]
) -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=(300, len(names)))
    if columns == "unit":
        values /= np.linalg.norm(values, axis=1, keepdims=True)
    groups = guess_groups(values, times_s=np.arange(300) / 60, names=names, label="glove")
    assert [(g["type"], g["count"]) for g in groups] == expected
    assert sorted(name for g in groups for name in g["names"]) == sorted(names)


def test_real_recordings_pass_with_their_proposal(real_sessions: list[Path]) -> None:
    for folder in real_sessions:
        recipe = propose(folder)
        assert len(recipe.streams) >= 2, folder.name


@pytest.mark.parametrize("case", ["c09_case_names", "c10_other_ext", "a12_ts_ms_rel", "b31_fps1"])
def test_recordings_with_other_names_and_units_pass(
    case: str, real_sessions: list[Path], tmp_path: Path
) -> None:
    source = real_sessions[0].parents[1] / "recording_cases" / case
    propose(shutil.copytree(source, tmp_path / case))


def test_samples_of_other_recorders_pass(real_sessions: list[Path], tmp_path: Path) -> None:
    samples = real_sessions[0].parents[1] / "import_samples"
    for file in ("pupil_invisible/gaze.csv", "pupil_invisible/imu.csv", "vr_csv/vive_pro_eye.csv"):
        folder = tmp_path / file.replace("/", "_")
        folder.mkdir()
        shutil.copy(samples / file, folder)
        propose(folder)


def test_a_table_of_lists_is_read_by_its_columns(tmp_path: Path) -> None:
    times_s = np.arange(200) / 50
    state = np.sin(times_s)[:, None] * np.arange(1, 7)
    columns = {"timestamp": times_s, "state": list(state), "index": np.arange(200) % 7}
    write_table(tmp_path / "robot.parquet", columns)
    recipe = propose(tmp_path)
    assert types_of(recipe, "robot_state") == [("scalar", 6)]
    assert recipe.sensors["robot_state"].key == "state"


@pytest.mark.parametrize(("unit", "factor"), [("s", 1.0), ("ms", 1e3)])
def test_texts_are_proposed_with_their_time(unit: str, factor: float, tmp_path: Path) -> None:
    key = f"t_{unit}"
    lines = [{key: i / 30 * factor, "grip": [i % 7, i % 5]} for i in range(300)]
    lines[40]["said"], lines[50]["odd"] = "hello", ["a"]
    write_lines(tmp_path / "metadata.jsonl", lines)
    notes = [{key: i * factor, "text": f"note {i}", "author": "me"} for i in range(8)]
    write_lines(tmp_path / "notes.jsonl", notes)
    write_lines(tmp_path / "words.jsonl", [{key: i * factor, "word": "x"} for i in range(5)])
    recipe = propose(tmp_path)
    assert recipe.streams.keys() == {"grip", "said", "notes"}
    assert {(s.time, s.time_unit) for s in recipe.streams.values()} == {(key, unit)}
    events = read_text_events(tmp_path, recipe, recipe.texts)
    assert [(e.time_s, e.text) for e in events["said"]] == [(pytest.approx(40 / 30), "hello")]
    assert [(e.time_s, e.text) for e in events["notes"]] == [(i, f"note {i}") for i in range(8)]
    text = propose_recipe(tmp_path)
    for file, name in (("metadata", "odd"), ("notes", "author"), ("words", "word")):
        assert re.search(rf"^# {file}\.jsonl: neither .*\b{name}\b", text, flags=re.MULTILINE)
