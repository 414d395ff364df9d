"""--fix: each repair works once, keeps the original, and changes nothing that is ambiguous."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.report_pages import RECIPE, recipe_of
from helpers.sessions import read_lines, sensor_lines, write_lines, write_streams, write_tone
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

import preprocess.validate.repair
from preprocess.validate.repair import repair_session
from preprocess.validate.report import check_session
from shared.errors import SessionError
from shared.recipe import Recipe


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """Two seconds of sound, sensors and two texts."""
    folder = tmp_path / "session_001"
    folder.mkdir()
    write_tone(folder / "audio.wav")
    write_lines(folder / "metadata.jsonl", sensor_lines())
    put_texts(folder, [0.5, 1.5])
    return folder


def put_texts(folder: Path, times_s: list[float]) -> None:
    texts = [{"timestamp": t, "stream": "external", "text": "there"} for t in times_s]
    write_lines(folder / "text.jsonl", texts)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metadata.jsonl")


def times_of(folder: Path, file: str = "metadata.jsonl") -> list[float]:
    return [line["timestamp"] for line in read_lines(folder / file)]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shift(folder: Path, seconds: float) -> None:
    lines = lines_of(folder)
    for line in lines:
        line["timestamp"] = round(line["timestamp"] + seconds, 6)
    write_lines(folder / "metadata.jsonl", lines)


def test_a_session_without_fault_is_not_changed(session: Path) -> None:
    before = snapshot(session)
    assert repair_session(session, recipe=RECIPE) == []
    assert snapshot(session) == before


def test_unreadable_lines_are_dropped_and_the_others_kept_to_the_byte(session: Path) -> None:
    good = (session / "metadata.jsonl").read_bytes()
    rows = good.splitlines(keepends=True)
    scraps = [b"[]\n", b'{"timestamp": NaN}\n', b"\xff\xfe\n", b'{"timest']
    (session / "metadata.jsonl").write_bytes(
        b"".join([*rows[:9], *scraps[:2], *rows[9:], *scraps[2:]])
    )
    done = repair_session(session, recipe=RECIPE)
    assert done[0] == (
        "metadata.jsonl: dropped 3 lines without JSON and 1 line without a timestamp"
    )
    assert (session / "metadata.jsonl").read_bytes() == good


def test_a_file_of_mostly_bad_lines_is_not_changed(session: Path) -> None:
    (session / "metadata.jsonl").write_text("glove v2\n1 2 3\n4 5 6\n" + '{"timestamp": 0}\n' * 3)
    before = snapshot(session)
    assert repair_session(session, recipe=RECIPE) == []
    assert snapshot(session) == before


def test_a_text_without_a_time_is_kept(session: Path) -> None:
    with (session / "text.jsonl").open("a") as file:
        file.write('{"timestamp": null, "stream": "external", "text": "precious"}\n{"timest')
    assert repair_session(session, recipe=RECIPE)[0] == ("text.jsonl: dropped 1 line without JSON")
    assert read_lines(session / "text.jsonl")[-1]["text"] == "precious"


def test_swapped_lines_are_sorted(session: Path) -> None:
    lines = lines_of(session)
    shuffled = [*lines[:10], *lines[15:20], *lines[10:15], *lines[20:]]
    write_lines(session / "metadata.jsonl", shuffled)
    assert repair_session(session, recipe=RECIPE)[0] == "metadata.jsonl: sorted 1 line into place"
    assert lines_of(session) == lines


def test_lines_of_a_restarted_recorder_are_not_sorted(session: Path) -> None:
    write_lines(session / "metadata.jsonl", [*sensor_lines(1.5), *sensor_lines(0.4)])
    before = snapshot(session)
    assert repair_session(session, recipe=RECIPE) == []
    assert snapshot(session) == before


def test_repeated_times_are_joined_without_losing_readings_or_texts(session: Path) -> None:
    lines = lines_of(session)
    halves = [{k: v for k, v in lines[5].items() if k != "touch"}, {**lines[5]}]
    halves[0]["internal_text"], halves[1]["internal_text"] = "go", "on"
    write_lines(session / "metadata.jsonl", [*lines[:5], *halves, lines[6], lines[6], *lines[7:]])
    done = repair_session(session, recipe=RECIPE)
    assert done[0] == "metadata.jsonl: joined 2 repeated lines with the first"
    lines[5] = {**lines[5], "internal_text": "go on"}
    assert lines_of(session) == lines


def test_lines_of_different_sensors_at_equal_times_are_not_touched(session: Path) -> None:
    per_device = [
        {key: line[key] for key in ("timestamp", name) if key in line}
        for line in lines_of(session)
        for name in ("touch", "proprio")
    ]
    write_lines(session / "metadata.jsonl", per_device)
    report = check_session(session, recipe=RECIPE).report
    assert (report.errors, report.warnings) == ((), ())
    before = snapshot(session)
    assert repair_session(session, recipe=RECIPE) == []
    assert snapshot(session) == before
    # A repeat is joined with the first line of its sensor, not with the line above.
    write_lines(session / "metadata.jsonl", [*per_device[:2], per_device[0], *per_device[2:]])
    (warning,) = check_session(session, recipe=RECIPE).report.warnings
    assert "line 3: timestamp 0 occurs again with the same reading of touch" in warning
    done = repair_session(session, recipe=RECIPE)
    assert done[0] == "metadata.jsonl: joined 1 repeated line with the first"
    assert lines_of(session) == per_device


def test_texts_keep_their_declared_unit(session: Path) -> None:
    recipe = declared({
        "touch": {"kind": "sensor", "key": "touch", "values": [{"count": 5, "type": "fraction"}]},
        "said": {"kind": "text", "file": "said.jsonl", "time": "ms", "time_unit": "ms"},
    })  # fmt: skip
    said = [{"ms": 500 + i, "text": "x"} for i in range(3)]
    write_lines(session / "said.jsonl", said)
    lines = [{**line, "timestamp": line["timestamp"] * 1e3} for line in lines_of(session)]
    write_lines(session / "metadata.jsonl", lines)
    assert check_session(session, recipe=recipe).probe.events["said"][0].time_s == 0.5
    repair_session(session, recipe=recipe)
    assert (session / "said.jsonl").read_text() == "".join(json.dumps(x) + "\n" for x in said)


def test_a_clock_that_was_never_reset_is_rebased_with_its_texts(session: Path) -> None:
    expected = times_of(session)
    shift(session, 12.7)
    put_texts(session, [13.2, 14.2])
    done = repair_session(session, recipe=RECIPE)
    assert done[0].startswith("metadata.jsonl, text.jsonl: subtracted 12.7 s")
    assert times_of(session) == pytest.approx(expected, abs=1e-9)
    assert times_of(session, "text.jsonl") == pytest.approx([0.5, 1.5], abs=1e-9)


def test_texts_on_the_session_clock_are_not_shifted_with_the_lines(session: Path) -> None:
    shift(session, 12.7)
    repair_session(session, recipe=RECIPE)
    assert times_of(session)[0] == 0
    assert times_of(session, "text.jsonl") == [0.5, 1.5]


def test_a_clock_is_not_shifted_if_texts_fit_neither_way(session: Path) -> None:
    shift(session, 12.7)
    put_texts(session, [70.0])
    before = snapshot(session)
    assert repair_session(session, recipe=RECIPE) == []
    assert snapshot(session) == before


def test_a_late_start_that_fits_the_media_is_not_shifted(session: Path) -> None:
    write_tone(session / "audio.wav", 6.0)
    write_lines(session / "metadata.jsonl", sensor_lines(6.0)[60:])
    assert repair_session(session, recipe=RECIPE) == []


@pytest.mark.parametrize(
    ("key", "index", "value", "limit"),
    [("touch", 2, 1.0004, 1.0), ("touch", 0, -1e-5, 0.0), ("proprio", 9, -3.1416, -math.pi)],
)
def test_rounding_errors_are_clamped(
    key: str, index: int, value: float, limit: float, session: Path
) -> None:
    lines = lines_of(session)
    lines[7][key][index] = value
    write_lines(session / "metadata.jsonl", lines)
    done = repair_session(session, recipe=RECIPE)
    assert done[0] == f"metadata.jsonl: clamped {key} in 1 line, outside by rounding"
    lines[7][key][index] = limit
    assert lines_of(session) == lines


@pytest.mark.parametrize(("key", "value"), [("touch", 1.7), ("proprio", 4.0)])
def test_a_sensor_out_of_range_by_more_than_rounding_is_not_clamped(
    key: str, value: float, session: Path
) -> None:
    lines = lines_of(session)
    lines[7][key][0] = value
    lines[8][key][0] = {"touch": 1.0004, "proprio": 3.1418}[key]
    write_lines(session / "metadata.jsonl", lines)
    assert repair_session(session, recipe=RECIPE) == []


def test_velocities_may_be_large(session: Path) -> None:
    lines = lines_of(session)
    lines[7]["proprio"][10] = math.pi + 1e-4
    write_lines(session / "metadata.jsonl", lines)
    assert repair_session(session, recipe=RECIPE) == []


def test_a_short_gap_is_filled_by_interpolation_and_marked(session: Path) -> None:
    lines = lines_of(session)
    write_lines(session / "metadata.jsonl", [*lines[:20], *lines[22:]])
    done = repair_session(session, recipe=RECIPE)
    assert done[0].startswith("metadata.jsonl: filled 1 gap with 2 interpolated lines")
    new = [line for line in lines_of(session) if line.get("interpolated")]
    assert [line["timestamp"] for line in new] == pytest.approx([20 / 30, 21 / 30], abs=1e-5)
    for key in ("touch", "proprio"):
        ends = [np.array(lines[i][key]) for i in (19, 22)]
        expected = [np.interp(k, [0, 3], [0, 1]) * (ends[1] - ends[0]) + ends[0] for k in (1, 2)]
        np.testing.assert_allclose([line[key] for line in new], expected, atol=1e-12)


def test_an_angle_is_interpolated_along_the_shorter_arc(session: Path) -> None:
    lines = lines_of(session)
    lines[19]["proprio"][0], lines[21]["proprio"][0] = 3.0, -3.0
    write_lines(session / "metadata.jsonl", [*lines[:20], *lines[21:]])
    repair_session(session, recipe=RECIPE)
    (new,) = [line for line in lines_of(session) if line.get("interpolated")]
    assert abs(new["proprio"][0]) == pytest.approx(math.pi, abs=1e-9)


def test_a_gap_over_100_ms_is_never_filled(session: Path) -> None:
    lines = lines_of(session)
    write_lines(session / "metadata.jsonl", [*lines[:20], *lines[23:]])
    assert repair_session(session, recipe=RECIPE) == []


def test_lines_after_the_end_of_the_media_are_trimmed(session: Path) -> None:
    write_lines(session / "metadata.jsonl", sensor_lines(2.5))
    done = repair_session(session, recipe=RECIPE)
    assert done[0].startswith("metadata.jsonl: dropped 14 lines of readings before or after all")
    assert times_of(session)[-1] == 2.0


def test_lines_before_the_media_are_trimmed(session: Path) -> None:
    shift(session, -0.5)
    repair_session(session, recipe=RECIPE)
    assert times_of(session)[0] == 0.0


def test_lines_far_beyond_the_media_or_with_texts_are_not_trimmed(session: Path) -> None:
    write_lines(session / "metadata.jsonl", sensor_lines(4.0))
    assert repair_session(session, recipe=RECIPE) == []
    lines = sensor_lines(2.5)
    lines[-1]["external_text"] = "bye"
    write_lines(session / "metadata.jsonl", lines)
    assert repair_session(session, recipe=RECIPE) == []


def test_nothing_is_shifted_or_trimmed_if_media_cannot_be_read(session: Path) -> None:
    shift(session, 12.7)
    (session / "vision_left.mp4").write_bytes(b"")
    before = snapshot(session)
    assert repair_session(session, recipe=RECIPE) == []
    assert snapshot(session) == before


def test_the_original_is_kept_and_never_overwritten(session: Path) -> None:
    (session / "metadata.jsonl.orig").write_text("an older original\n")
    with (session / "metadata.jsonl").open("a") as file:
        file.write('{"timest')
    original = (session / "metadata.jsonl").read_bytes()
    done = repair_session(session, recipe=RECIPE)
    assert done[-1] == "kept the original as metadata.jsonl.orig.1"
    assert (session / "metadata.jsonl.orig").read_text() == "an older original\n"
    assert (session / "metadata.jsonl.orig.1").read_bytes() == original


def test_the_original_is_kept_without_hard_links(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    shift(session, 12.7)
    original = (session / "metadata.jsonl").read_bytes()
    repair_session(session, recipe=RECIPE)
    assert (session / "metadata.jsonl.orig").read_bytes() == original


def damage(folder: Path) -> None:
    """Everything at once, with the clock of both files."""
    lines = sensor_lines(2.5)
    lines[8]["touch"][1] = 1.0001
    lines[10:12] = [lines[11], lines[10], lines[10]]
    del lines[31]
    write_lines(folder / "metadata.jsonl", lines)
    shift(folder, 12.7)
    put_texts(folder, [13.2, 14.2])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"timest')


class _PowerCutError(BaseException):
    """Stops the program as a power cut does: nothing cleans up."""


def test_a_repair_interrupted_anywhere_is_finished_by_the_next(
    session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(session)
    whole = Path(shutil.copytree(session, tmp_path / "whole"))
    repair_session(whole, recipe=RECIPE)
    expected = snapshot(whole)
    real = {(os, "link"): os.link, (os, "fsync"): os.fsync, (Path, "replace"): Path.replace}
    for stop_at in range(100):
        folder = Path(shutil.copytree(session, tmp_path / f"cut_{stop_at}"))
        left = stop_at
        for (owner, name), function in real.items():

            def cut(*args: Any, function: Any = function) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise _PowerCutError
                return function(*args)

            monkeypatch.setattr(owner, name, cut)
        try:
            repair_session(folder, recipe=RECIPE)
        except _PowerCutError:
            monkeypatch.undo()
            repair_session(folder, recipe=RECIPE)
            assert snapshot(folder) == expected, f"stopped at step {stop_at}"
        else:
            break
    assert stop_at > 8


def test_a_read_only_folder_is_a_clear_error(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, _content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(preprocess.validate.repair, "write_synced", refuse)
    shift(session, 12.7)
    before = snapshot(session)
    with pytest.raises(SessionError, match="Permission denied; fix: make the folder writable"):
        repair_session(session, recipe=RECIPE)
    assert snapshot(session) == before


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no such folder"):
        repair_session(tmp_path / "none", recipe=RECIPE)


def test_all_repairs_together_leave_no_warning(session: Path) -> None:
    damage(session)
    recipe = recipe_of(session)
    assert check_session(session, recipe=recipe).report.status == "warnings"
    repair_session(session, recipe=recipe)
    report = check_session(session, recipe=recipe).report
    assert (report.warnings, report.errors) == ((), ())


numbers = st.one_of(
    st.floats(-1.2, 1.2), st.sampled_from([1.0005, -0.0005, 3.1416, 4.0, 1e39, True, None])
)
raw_lines = st.one_of(
    st.builds(
        lambda step, touch, text, is_marked: {
            "step": step,
            **({"touch": [touch] * 5} if touch != "none" else {}),
            **({"external_text": text} if text else {}),
            **({"interpolated": True} if is_marked else {}),
        },
        st.sampled_from([0.0, 0.033, 0.034, 0.05, 0.07, 0.09, 0.101, 0.5, -0.02, -0.5, -3.0]),
        st.one_of(numbers, st.just("none")),
        st.sampled_from(["", "", "", "hm"]),
        st.booleans(),
    ),
    st.sampled_from(["[1]", '{"timest', "", '{"timestamp": NaN}']),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(raw_lines, max_size=25),
    start_s=st.sampled_from([0.0, -0.5, 0.9, 1.5, 12.7, 1.7e9]),
    sound_s=st.sampled_from([None, 0.3, 1.0, 2.0]),
    texts=st.lists(st.sampled_from([0.5, 13.0, 99.0]), max_size=2),
)
@example(
    rows=[{"step": 0.0}, {"step": 0.5}, {"step": 0.5, "touch": [1.0] * 5}],
    start_s=-0.5,
    sound_s=1.0,
    texts=[13.0, 99.0],
)
def test_a_second_repair_does_nothing_and_every_original_stays(
    tmp_path: Path, rows: list[Any], start_s: float, sound_s: float | None, texts: list[float]
) -> None:
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if sound_s is not None:
        write_tone(folder / "audio.wav", sound_s)
    time_s, out = start_s, []
    for row in rows:
        if isinstance(row, dict):
            time_s += row.pop("step") if "step" in row else 0.0
            row = json.dumps({"timestamp": round(time_s, 6), **row})
        out.append(row)
    content = "\n".join(out).encode()
    (folder / "metadata.jsonl").write_bytes(content)
    put_texts(folder, texts)
    done = repair_session(folder, recipe=RECIPE)
    after = snapshot(folder)
    assert repair_session(folder, recipe=RECIPE) == []
    assert snapshot(folder) == after
    if any("metadata" in sentence for sentence in done):
        assert after["metadata.jsonl.orig"] == content


# --- declared streams ---


def declared(streams: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"segment": {"duration_s": 1.0}, "streams": streams})


QUATERNION = {"count": 4, "type": "quaternion"}
MANY = declared(
    {
        "head": {
            "kind": "sensor", "file": "head.jsonl", "time": "t", "time_unit": "ms", "rate_hz": 60,
            "key": "q", "values": [QUATERNION, {"count": 3, "type": "direction"}],
        },
        "grip": {"kind": "sensor", "key": "grip", "values": [{"count": 1, "type": "fraction"}]},
        "pose": {
            "kind": "sensor", "file": "pose.jsonl", "rate_hz": 60,
            "values": [
                {"count": 2, "type": "angle", "names": ["elbow", "wrist"]},
                {"count": 1, "type": "scalar", "names": ["load"]},
            ],
        },
        "held": {
            "kind": "sensor", "file": "held.jsonl", "key": "held", "rate_hz": 60,
            "resample": "hold", "values": [{"count": 1, "type": "scalar"}],
        },
        "imu": {
            "kind": "sensor", "file": "imu.csv", "rate_hz": 60, "clock": "own",
            "values": [{"count": 2, "type": "scalar", "names": ["a", "b"]}],
        },
        "notes": {"kind": "text", "file": "notes.jsonl"},
        "voice": {"kind": "audio", "file": "voice.wav"},
    }
)  # fmt: skip


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A flawless session of seven streams in seven files."""
    return write_streams(tmp_path / "many", MANY, duration_s=4.0)


def edit(folder: Path, file: str, change: Any) -> None:
    lines = read_lines(folder / file)
    change(lines)
    write_lines(folder / file, lines)


def test_a_session_of_declared_streams_without_fault_is_not_changed(many: Path) -> None:
    before = snapshot(many)
    assert check_session(many, recipe=MANY).report.status == "passed"
    assert repair_session(many, recipe=MANY) == []
    assert snapshot(many) == before


def test_gaps_are_filled_as_the_value_types_say(many: Path) -> None:
    """Quaternions against scipy's Slerp; the time is in milliseconds under its own key."""
    before = read_lines(many / "head.jsonl")
    edit(many, "head.jsonl", lambda lines: lines.__delitem__(slice(100, 102)))
    (sentence, _) = repair_session(many, recipe=MANY)
    assert sentence.startswith("head.jsonl: filled 1 gap with 2 interpolated lines")
    after = read_lines(many / "head.jsonl")
    ends = [before[i] for i in (99, 102)]
    slerp = Slerp([0, 3], Rotation.from_quat([end["q"][:4] for end in ends]))
    for k, line in enumerate(after[100:102], start=1):
        assert line["interpolated"] is True
        assert line["t"] == pytest.approx(before[99]["t"] + k * 50 / 3, abs=0.5)
        expected = slerp(k).as_quat()
        rotation = np.abs(np.dot(expected, line["q"][:4]))
        assert rotation == pytest.approx(1, abs=1e-6)
        assert np.linalg.norm(line["q"][4:]) == pytest.approx(1, abs=1e-9)
    assert [*after[:100], *after[102:]] == [*before[:100], *before[102:]]
    assert check_session(many, recipe=MANY).report.status == "passed"


def test_plain_keys_are_filled_and_held_values_are_not(many: Path) -> None:
    for file in ("pose.jsonl", "held.jsonl"):
        edit(many, file, lambda lines: lines.pop(50))
    before = read_lines(many / "held.jsonl")
    done = repair_session(many, recipe=MANY)
    assert done[0].startswith("pose.jsonl: filled 1 gap with 1 interpolated line")
    assert set(read_lines(many / "pose.jsonl")[50]) == {
        "timestamp", "elbow", "wrist", "load", "interpolated",
    }  # fmt: skip
    assert read_lines(many / "held.jsonl") == before


def test_values_of_any_stream_are_clamped_by_type(many: Path) -> None:
    edit(many, "metadata.jsonl", lambda lines: lines[3].update(grip=[1.0004]))
    edit(many, "pose.jsonl", lambda lines: lines[5].update(elbow=-3.1416, load=7.0))
    done = repair_session(many, recipe=MANY)
    assert done[:2] == [
        "metadata.jsonl: clamped grip in 1 line, outside by rounding",
        "pose.jsonl: clamped pose in 1 line, outside by rounding",
    ]
    assert read_lines(many / "metadata.jsonl")[3]["grip"] == [1.0]
    assert read_lines(many / "pose.jsonl")[5]["elbow"] == -math.pi
    assert read_lines(many / "pose.jsonl")[5]["load"] == 7.0


def test_every_file_on_the_shared_clock_is_shifted_together(many: Path) -> None:
    texts = times_of(many, "notes.jsonl")
    names = ("metadata.jsonl", "pose.jsonl", "held.jsonl", "notes.jsonl")
    before = {name: (many / name).read_bytes() for name in (*names, "imu.csv")}
    for name in names:
        edit(many, name, lambda lines: [x.update(timestamp=x["timestamp"] + 12.5) for x in lines])
    edit(many, "head.jsonl", lambda lines: [x.update(t=x["t"] + 12_500) for x in lines])
    done = repair_session(many, recipe=MANY)
    assert done[0] == (
        "head.jsonl, held.jsonl, metadata.jsonl, pose.jsonl, notes.jsonl: subtracted 12.5 s from "
        "all timestamps; the clock was never reset"
    )
    assert times_of(many, "notes.jsonl") == pytest.approx(texts, abs=1e-9)
    assert read_lines(many / "head.jsonl")[0]["t"] == 0
    assert (many / "imu.csv").read_bytes() == before["imu.csv"]  # on a clock of its own
    assert check_session(many, recipe=MANY).report.status == "passed"


def test_nothing_is_shifted_if_a_table_would_stay_behind(many: Path) -> None:
    streams = MANY.as_json()["streams"]
    streams["imu"]["clock"] = "session"
    recipe = declared(streams)
    for name in ("metadata.jsonl", "pose.jsonl", "held.jsonl", "notes.jsonl"):
        edit(many, name, lambda lines: [x.update(timestamp=x["timestamp"] + 12.5) for x in lines])
    edit(many, "head.jsonl", lambda lines: [x.update(t=x["t"] + 12_500) for x in lines])
    before = snapshot(many)
    assert repair_session(many, recipe=recipe) == []
    assert snapshot(many) == before
    warnings = check_session(many, recipe=recipe).report.warnings
    assert not any("--fix" in warning for warning in warnings), warnings


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_rows_of_a_table_are_sorted(ending: str, many: Path) -> None:
    rows = (many / "imu.csv").read_text().splitlines()
    shuffled = [*rows[:50], rows[51], rows[50], *rows[52:]]
    (many / "imu.csv").write_text(ending.join(shuffled), newline="")
    done = repair_session(many, recipe=MANY)
    assert done == [
        "imu.csv: sorted 1 row into place",
        "kept the original as imu.csv.orig",
    ]
    assert (many / "imu.csv").read_bytes() == (ending.join(rows) + ending).encode()
    assert repair_session(many, recipe=MANY) == []


@pytest.mark.parametrize(
    "fault",
    [
        lambda rows: [*rows[:50], rows[51], rows[50], "1,2", *rows[52:]],  # a row of two cells
        lambda rows: [*rows[:50], rows[51], rows[50], rows[50], *rows[52:]],  # a repeated time
        lambda rows: [rows[0], *rows[100:], *rows[1:100]],  # a restarted recorder
    ],
)
def test_a_table_with_another_fault_is_not_changed(fault: Any, many: Path) -> None:
    rows = (many / "imu.csv").read_text().splitlines()
    (many / "imu.csv").write_text("\n".join(fault(rows)))
    before = snapshot(many)
    assert repair_session(many, recipe=MANY) == []
    assert snapshot(many) == before


def test_lines_that_contradict_each_other_are_never_joined(session: Path) -> None:
    lines = lines_of(session)
    twin = {**lines[5], "touch": [0.9] * 5}
    write_lines(session / "metadata.jsonl", [*lines[:6], twin, *lines[6:]])
    before = snapshot(session)
    assert repair_session(session, recipe=RECIPE) == []
    assert snapshot(session) == before
    report = check_session(session, recipe=RECIPE).report
    assert any("line 7: timestamp 0.166667 occurs again with another" in m for m in report.errors)


def test_lines_that_agree_after_rounding_is_clamped_are_joined_at_once(session: Path) -> None:
    lines = lines_of(session)
    lines[5]["touch"] = [1.0, 0.0, 0.0, 0.0, 0.0]
    twin = {**lines[5], "touch": [1.0001, 0.0, 0.0, 0.0, -1e-9]}
    write_lines(session / "metadata.jsonl", [*lines[:6], twin, *lines[6:]])
    assert len(repair_session(session, recipe=RECIPE)) == 3
    assert repair_session(session, recipe=RECIPE) == []
    assert len(lines_of(session)) == len(lines)


def test_a_file_with_two_time_keys_is_left_alone(tmp_path: Path) -> None:
    streams = {
        name: {
            "kind": "sensor", "file": "both.jsonl", "key": name, "time": f"{name}_t",
            "values": [{"count": 1, "type": "scalar"}],
        }
        for name in ("left", "right")
    }  # fmt: skip
    recipe = declared(streams)
    lines = [{"left_t": i / 30, "left": i, "right_t": i / 15, "right": i} for i in range(60)]
    lines[9], lines[10] = lines[10], lines[9]
    write_lines(tmp_path / "both.jsonl", lines)
    before = snapshot(tmp_path)
    assert repair_session(tmp_path, recipe=recipe) == []
    assert snapshot(tmp_path) == before


def all_readings(folder: Path) -> set[tuple[str, str]]:
    """Every value in the JSON lines of a session, by file and key; times are left out."""
    return {
        (f"{path.name} {key}", json.dumps(value))
        for path in folder.glob("*.jsonl")
        for line in read_lines(path)
        for key, value in line.items()
        if key not in ("t", "timestamp", "interpolated")
    }


edits = st.sampled_from(
    [
        ("swap", lambda lines, i: lines.insert(i, lines.pop(i + 1))),
        ("lose", lambda lines, i: lines.pop(i)),
        ("repeat", lambda lines, i: lines.insert(i, lines[i])),
        (
            "contradict",
            lambda lines, i: lines.insert(i, {**lines[i + 1], **_without_time(lines[i])}),
        ),
        ("complete", lambda lines, i: lines.insert(i, dict(list(lines[i].items())[:2]))),
        ("extend", lambda lines, i: lines.append({**lines[i], **_later(lines[-1])})),
    ]
)


def _without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("t", "timestamp")}


def _later(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value + 0.2 for key, value in line.items() if key in ("t", "timestamp")}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(
        st.tuples(
            st.sampled_from(["head.jsonl", "metadata.jsonl", "pose.jsonl", "held.jsonl"]),
            st.integers(0, 100),
            edits,
        ),
        max_size=6,
    ),
    offset_s=st.sampled_from([0.0, 0.0, 12.5]),
)
def test_repairs_of_declared_streams_lose_no_reading_and_are_done_once(
    tmp_path: Path, faults: list[Any], offset_s: float
) -> None:
    source = tmp_path / "source"
    if not source.exists():
        write_streams(source, MANY, duration_s=4.0)
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    for file, index, (_, change) in faults:
        edit(folder, file, lambda lines, i=index, change=change: change(lines, i))
    if offset_s:
        for file, key in (("head.jsonl", "t"), *((f, "timestamp") for f in SHARED)):
            factor = 1000 if key == "t" else 1
            edit(folder, file, lambda lines, k=key, f=factor: shift_key(lines, k, offset_s * f))
    before = all_readings(folder)
    done = repair_session(folder, recipe=MANY)
    after = snapshot(folder)
    assert repair_session(folder, recipe=MANY) == []
    assert snapshot(folder) == after
    if not any("dropped" in sentence for sentence in done):
        assert before <= all_readings(folder)


SHARED = ("metadata.jsonl", "pose.jsonl", "held.jsonl", "notes.jsonl")


def shift_key(lines: list[dict[str, Any]], key: str, offset: float) -> None:
    for line in lines:
        line[key] += offset


@pytest.mark.parametrize("content", [None, b"[]", b"{", b"\xff\xfe"], ids=str)
def test_a_bad_session_file_holds_no_other_repair_back(
    session: Path, content: bytes | None
) -> None:
    lines = lines_of(session)
    write_lines(session / "metadata.jsonl", [*lines[:20], lines[21], lines[20], *lines[22:]])
    if content is None:
        (session / "session.json").mkdir()
    else:
        (session / "session.json").write_bytes(content)
    sentences = repair_session(session, recipe=RECIPE)
    assert any("sorted 1 line into place" in sentence for sentence in sentences)
    assert lines_of(session) == lines
