"""Demo sessions against physics, numpy and stock readers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

import preprocess.demo.world
from preprocess.demo.world import write_demo_sessions
from shared.config import make_section, parse_yaml
from shared.errors import ConfigError, SessionError
from shared.recipe import Recipe
from shared.session.folder import read_readings

ROOT = Path(__file__).resolve().parents[4]
DURATION_S = 8.0
SIZE = 192
SMALL = {"duration_s": 4.0, "image_size": 32}
FILES = {
    "metadata.jsonl",
    "vision_left.mp4",
    "vision_right.mp4",
    "audio.wav",
    "text.jsonl",
    "gaze.csv",
    "session.json",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return write_demo_sessions(out, num_sessions=1, duration_s=DURATION_S, image_size=SIZE)[0]


@pytest.fixture(scope="module")
def info(folder):
    return json.loads((folder / "session.json").read_text())


@pytest.fixture(scope="module")
def metadata(folder):
    lines = read_lines(folder / "metadata.jsonl")
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


@pytest.fixture(scope="module")
def wave(folder):
    samples, rate_hz = soundfile.read(folder / "audio.wav")
    assert rate_hz == 16_000
    return samples


@pytest.fixture(scope="module")
def videos(folder):
    return {side: read_video(folder / f"vision_{side}.mp4") for side in ("left", "right")}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_video(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def read_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loudest_hz(wave, start_s, duration_s):
    clip = wave[round(start_s * 16_000) : round((start_s + duration_s) * 16_000)]
    spectrum = np.abs(np.fft.rfft(clip * np.hanning(len(clip)), n=1 << 15))
    return float(np.fft.rfftfreq(1 << 15, 1 / 16_000)[spectrum.argmax()])


def column_of(image, color):
    near = np.linalg.norm(image.astype(float) - 255 * np.array(color), axis=-1) < 60
    assert near.sum() > 20, "the ball is not visible"
    return float(np.nonzero(near)[1].mean())


def disparity_px(videos, time_s, color):
    frame = round(time_s * 30)
    left, right = (column_of(videos[s][frame], color) for s in ("left", "right"))
    return left - right


def test_a_session_has_the_files_of_the_session_layout(folder):
    assert {path.name for path in folder.iterdir()} == FILES


def test_all_streams_decode_and_have_the_same_length(folder, metadata, wave):
    lasts = {"metadata": metadata["timestamp"][-1] + 1 / 30, "audio": len(wave) / 16_000}
    for side in ("left", "right"):
        with av.open(str(folder / f"vision_{side}.mp4")) as container:
            frames = [(f.time, f.width, f.height) for f in container.decode(video=0)]
            assert container.streams.video[0].codec_context.name == "h264"
        assert {(width, height) for _, width, height in frames} == {(SIZE, SIZE)}
        lasts[side] = frames[-1][0] + 1 / 30
    assert max(abs(last - DURATION_S) for last in lasts.values()) < 0.1, lasts


def test_frames_have_the_timestamps_of_the_metadata(folder, metadata):
    with av.open(str(folder / "vision_right.mp4")) as container:
        times_s = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times_s, metadata["timestamp"], atol=1e-5)


def test_audio_is_16_bit_mono_and_neither_silent_nor_clipped(folder, wave):
    assert soundfile.info(folder / "audio.wav").subtype == "PCM_16"
    assert wave.ndim == 1
    loudness = np.sqrt(np.mean(wave.reshape(-1, 800) ** 2, axis=1))
    assert loudness.min() > 0.001
    assert np.abs(wave).max() < 0.95


def test_sensors_stay_in_their_ranges(metadata):
    assert metadata["touch"].shape == (240, 5)
    assert metadata["proprio"].shape == (240, 20)
    assert metadata["touch"].min() >= 0
    assert metadata["touch"].max() <= 1
    assert np.abs(metadata["proprio"][:, :10]).max() <= np.pi


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_sessions(tmp_path):
    one = write_demo_sessions(tmp_path / "one", num_sessions=1, seed=5, **SMALL)
    two = write_demo_sessions(tmp_path / "two", num_sessions=2, seed=5, **SMALL)
    assert read_bytes(one[0]) == read_bytes(two[0])
    assert [path.name for path in two] == ["session_001", "session_002"]


def test_another_seed_and_another_number_give_other_bytes(tmp_path):
    folders = write_demo_sessions(tmp_path / "0", num_sessions=2, **SMALL)
    folders += write_demo_sessions(tmp_path / "1", num_sessions=1, seed=1, **SMALL)
    for name in FILES:
        assert len({(folder / name).read_bytes() for folder in folders}) == 3, name


def test_a_second_run_leaves_complete_sessions_alone(tmp_path):
    def stamps():
        return {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))}

    write_demo_sessions(tmp_path, num_sessions=1, **SMALL)
    before, lines = stamps(), []
    write_demo_sessions(tmp_path, num_sessions=1, progress=lines.append, **SMALL)
    assert stamps() == before
    assert lines == ["session_001: exists already (1 of 1)"]


@pytest.mark.parametrize("name", sorted(FILES - {"session.json"}))
def test_a_session_with_a_shortened_file_is_rebuilt(tmp_path, name):
    (folder,) = write_demo_sessions(tmp_path, num_sessions=1, **SMALL)
    whole = read_bytes(folder)
    (folder / name).write_bytes(whole[name][:-10])
    write_demo_sessions(tmp_path, num_sessions=1, **SMALL)
    assert read_bytes(folder) == whole


def test_other_parameters_rebuild_a_session(tmp_path):
    (folder,) = write_demo_sessions(tmp_path, num_sessions=1, seed=1, **SMALL)
    before = read_bytes(folder)
    write_demo_sessions(tmp_path, num_sessions=1, seed=2, **SMALL)
    assert read_bytes(folder)["text.jsonl"] != before["text.jsonl"]


def test_a_killed_run_leaves_no_incomplete_session_and_resumes(tmp_path, monkeypatch):
    whole = write_demo_sessions(tmp_path / "whole", num_sessions=2, **SMALL)
    write_video, calls = preprocess.demo.world.write_video, itertools.count(1)

    def die_in_the_fourth(path, frames, **sizes):
        if next(calls) == 4:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        write_video(path, frames, **sizes)

    monkeypatch.setattr(preprocess.demo.world, "write_video", die_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        write_demo_sessions(tmp_path / "killed", num_sessions=2, **SMALL)
    assert [p.name for p in (tmp_path / "killed").glob("session_*")] == ["session_001"]
    again = write_demo_sessions(tmp_path / "killed", num_sessions=2, **SMALL)
    assert [read_bytes(folder) for folder in again] == [read_bytes(folder) for folder in whole]
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["session_001", "session_002"]


@pytest.mark.parametrize("info", [None, "{}", '{"source": "a recording"}', "{", "[]"])
def test_a_folder_of_another_source_is_refused_and_not_changed(tmp_path, info):
    recording = tmp_path / "session_001"
    recording.mkdir()
    (recording / "metadata.jsonl").write_text('{"timestamp": 0}\n')
    if info is not None:
        (recording / "session.json").write_text(info)
    before = read_bytes(recording)
    with pytest.raises(SessionError, match=r"session_001.*move it away"):
        write_demo_sessions(tmp_path, num_sessions=1, **SMALL)
    assert read_bytes(recording) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_sessions": 0},
        {"seed": -1},
        {"duration_s": 0.0},
        {"duration_s": float("nan")},
        {"image_size": 33},
        {"image_size": 0},
        {"rate_hz": 0.0},
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        write_demo_sessions(tmp_path, **{"num_sessions": 1, **SMALL, **wrong})


def test_velocities_are_the_derivatives_of_the_angles(tmp_path):
    (folder,) = write_demo_sessions(
        tmp_path, num_sessions=1, duration_s=6.0, image_size=16, rate_hz=240.0
    )
    pose = np.array([line["proprio"] for line in read_lines(folder / "metadata.jsonl")])
    slopes = np.gradient(pose[:, :10], 1 / 240, axis=0)
    assert np.abs(pose[:, 10:]).max() > 3, "nothing moves"
    np.testing.assert_allclose(pose[1:-1, 10:], slopes[1:-1], atol=0.03)


def test_touch_rises_on_the_named_finger_at_the_contact(info, metadata):
    names = [finger["name"] for finger in info["fingers"]]
    assert len(info["contacts"]) >= 4
    for contact in info["contacts"]:
        before = metadata["timestamp"] < contact["time_s"]
        first = int(before.sum())
        expected = np.zeros(5)
        expected[names.index(contact["finger"])] = contact["pressure"]
        np.testing.assert_allclose(metadata["touch"][first], expected, atol=1e-3)
        np.testing.assert_array_equal(metadata["touch"][first - 1], np.zeros(5))


def test_the_force_shows_in_touch_before_the_text(folder, info):
    texts = {e["timestamp"]: e["text"] for e in read_lines(folder / "text.jsonl")}
    for contact in info["contacts"]:
        text = texts.get(round(contact["time_s"] + 0.2, 6), "")
        assert (contact["pressure"] > 0.65) == (text.split(" ")[0] == "hits") or not text


def test_the_tone_at_a_contact_has_the_pitch_of_its_finger(info, wave):
    pitches = {finger["name"]: finger["tone_hz"] for finger in info["fingers"]}
    for contact in info["contacts"]:
        if contact["time_s"] + 0.15 < DURATION_S:
            measured_hz = loudest_hz(wave, contact["time_s"], 0.15)
            assert measured_hz == pytest.approx(pitches[contact["finger"]], abs=6)


def test_the_tone_starts_exactly_at_the_contact(info, wave):
    for contact in info["contacts"]:
        start = round(contact["time_s"] * 16_000)
        before, after = wave[start - 80 : start], wave[start + 16 : start + 96]
        assert np.std(after) > 3 * np.std(before)


def test_the_knock_reveals_the_level_of_the_next_internal_text(folder, info, wave):
    texts = {e["timestamp"]: e["text"] for e in read_lines(folder / "text.jsonl")}
    num_checked = 0
    for contact in info["contacts"]:
        text = texts.get(round(contact["time_s"] - 0.6, 6))
        if text and contact["wall_time_s"] >= 0:
            is_high = loudest_hz(wave, contact["wall_time_s"], 0.06) > 1000
            assert text.split(" ")[1] == ("high" if is_high else "low")
            num_checked += 1
    assert num_checked >= 3


def test_internal_text_precedes_and_external_text_follows_each_contact(folder, info):
    events = read_lines(folder / "text.jsonl")
    assert [e["timestamp"] for e in events] == sorted(e["timestamp"] for e in events)
    for contact in info["contacts"]:
        for stream, low_s, high_s in (("internal", -0.65, -0.3), ("external", 0.15, 0.3)):
            if not 0 < contact["time_s"] + low_s < contact["time_s"] + high_s < DURATION_S:
                continue
            texts = [
                e["text"]
                for e in events
                if e["stream"] == stream and low_s <= e["timestamp"] - contact["time_s"] <= high_s
            ]
            assert len(texts) == 1
            assert contact["finger"] in texts[0].split(" ")


def test_texts_of_a_stream_are_apart_and_short(folder):
    for stream in ("internal", "external"):
        events = [e for e in read_lines(folder / "text.jsonl") if e["stream"] == stream]
        times_s = [e["timestamp"] for e in events]
        assert min(np.diff(times_s)) >= 0.8
        assert all(len(e["text"].split(" ")) == 3 for e in events)
        assert all(0 <= time_s < DURATION_S for time_s in times_s)


def test_the_disparity_of_the_ball_is_focal_length_times_baseline_over_depth(info, videos):
    eyes = info["eyes"]
    colors = {finger["name"]: finger["ball_rgb"] for finger in info["fingers"]}
    num_checked = 0
    for contact in info["contacts"]:
        if contact["wall_time_s"] < 0 or contact["time_s"] + 0.2 > DURATION_S:
            continue
        scale = eyes["focal_px"] * eyes["baseline_m"]
        far = disparity_px(videos, contact["wall_time_s"] + 0.02, colors[contact["finger"]])
        near = disparity_px(videos, contact["time_s"] + 0.1, (0.75, 0.75, 0.75))
        assert far == pytest.approx(scale / contact["wall_m"][1], abs=0.5)
        assert near == pytest.approx(scale / contact["ball_m"][1], abs=1.0)
        num_checked += 1
    assert num_checked >= 3


def test_the_gaze_of_both_cameras_is_on_the_ball(folder, info):
    gaze = np.genfromtxt(folder / "gaze.csv", delimiter=",", names=True)
    assert len(gaze) == DURATION_S * 120
    np.testing.assert_allclose(gaze["timestamp"], np.arange(len(gaze)) / 120, atol=1e-6)
    half_m = info["eyes"]["baseline_m"] / 2
    for contact in info["contacts"]:
        if contact["wall_time_s"] < 0 or contact["time_s"] + 0.2 > DURATION_S:
            continue
        # In the hand, the ball hops for 0.2 s under 4 m/s2; at the wall it is for an instant.
        held = gaze[round((contact["time_s"] + 0.1) * 120)]
        held_s = held["timestamp"] - contact["time_s"]
        hop_m = np.array([0, 0, 2 * held_s * (0.2 - held_s)])
        for reading, ball_m, tolerance in (
            (held, contact["ball_m"] + hop_m, 1e-5),
            (gaze[round(contact["wall_time_s"] * 120)], contact["wall_m"], 0.02),
        ):
            for side, x_m in (("l", -half_m), ("r", half_m)):
                ray_m = np.array(ball_m) - [x_m, 0, 0]
                direction = [reading[side + axis] for axis in "xyz"]
                expected = ray_m / np.linalg.norm(ray_m)
                np.testing.assert_allclose(direction, expected, atol=tolerance)


def test_the_gaze_shows_where_the_ball_is_in_the_pictures(folder, info, videos):
    gaze = np.genfromtxt(folder / "gaze.csv", delimiter=",", names=True)
    for contact in info["contacts"]:
        frame = round((contact["time_s"] + 0.1) * 30)
        if contact["time_s"] < 0 or frame >= len(videos["left"]):
            continue
        for side in ("left", "right"):
            x, y = (gaze[side[0] + axis][frame * 4] for axis in "xy")
            expected = SIZE / 2 + info["eyes"]["focal_px"] * x / y
            measured = column_of(videos[side][frame], (0.75, 0.75, 0.75))
            assert measured == pytest.approx(expected, abs=5.0)  # fingers hide parts


def test_five_more_lines_of_a_recipe_declare_the_gaze(folder):
    lines = (ROOT / "configs/recipe.yaml").read_text().splitlines()
    doc = preprocess.demo.world.__doc__.splitlines()
    start = doc.index("  gaze:")
    at = next(i for i, line in enumerate(lines) if line.startswith("streams:")) + 1
    recipe = make_section(
        Recipe,
        parse_yaml("\n".join([*lines[:at], *doc[start : start + 5], *lines[at:]]), origin="f"),
    )
    assert set(recipe.streams) == {*Recipe().streams, "gaze"}
    (readings,) = read_readings(folder, recipe, ["gaze"]).values()
    assert readings.values.shape == (DURATION_S * 120, 6)
    np.testing.assert_allclose(
        np.linalg.norm(readings.values.reshape(-1, 2, 3), axis=2), 1, atol=1e-6
    )


def test_the_picture_reveals_the_finger_before_the_internal_text(info, videos):
    colors = np.array([finger["ball_rgb"] for finger in info["fingers"]])
    names = [finger["name"] for finger in info["fingers"]]
    mean_rgb = videos["left"].mean(axis=(0, 1, 2))
    for contact in info["contacts"]:
        if contact["wall_time_s"] < 0:
            continue
        frame = round((contact["time_s"] - 0.65) * 30)
        tint = videos["left"][frame].mean(axis=(0, 1)) / mean_rgb
        cosine = (colors - 0.4) @ (tint - tint.mean()) / np.linalg.norm(colors - 0.4, axis=1)
        assert names[int(cosine.argmax())] == contact["finger"]


def test_the_finger_touches_the_ball(info, metadata):
    def turn(axis, angle):
        c, s = np.cos(angle), np.sin(angle)
        i, j = ((1, 2), (2, 0), (0, 1))[axis]
        matrix = np.eye(3)
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
        return matrix

    arm = info["arm"]
    for contact in info["contacts"]:
        if contact["time_s"] + 0.1 > DURATION_S - 1 / 30:
            continue
        pose = metadata["proprio"][round((contact["time_s"] + 0.1) * 30)]
        yaw, pitch, elbow, roll = pose[5:9]
        shoulder = turn(2, -yaw) @ turn(1, roll) @ turn(0, pitch)
        forward = np.array([0.0, 1.0, 0.0])
        tip_m = arm["shoulder_m"] + shoulder @ (
            arm["upper_arm_m"] * forward + turn(0, elbow) @ (arm["forearm_m"] * forward)
        )
        gap_m = np.linalg.norm(tip_m - contact["ball_m"])
        assert gap_m == pytest.approx(info["eyes"]["ball_radius_m"], abs=0.002)
