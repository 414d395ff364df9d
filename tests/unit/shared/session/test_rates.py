"""Wrong rates of clocks against recordings whose true times are known."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.oracles import build as build_set
from helpers.oracles import jsonl, open_indexes, tiny_recipe
from helpers.sessions import sensor_lines, write_lines, write_tone
from hypothesis import assume, given
from hypothesis import strategies as st

from preprocess.validate.repair import repair_session
from preprocess.validate.report import check_session
from shared.clock import Interval
from shared.media.video import VideoTrack
from shared.session.rates import LIMIT_S, RateFault, find_rate_faults, propose_stretches
from shared.session.scan import scan_session
from shared.session.still import Recorded

RECIPE = tiny_recipe()
NOWHERE = Path("/nowhere")
TIMED = ("touch", "proprio")
VIDEOS = ("vision_left", "vision_right")


def track(times_s: np.ndarray) -> VideoTrack:
    count = len(times_s)
    return VideoTrack(
        codec="h264", width=32, height=32, times_s=times_s, pts=np.arange(count),
        keyframes=np.ones(count, bool), positions=np.arange(count), restarts=np.arange(count),
        sizes=np.ones(count, int),
    )  # fmt: skip


def judge(
    sound_s: float | None, videos: dict[str, np.ndarray], sensors: dict[str, np.ndarray]
) -> tuple[RateFault, ...]:
    """Find the faults of streams by their times alone."""
    intervals = {
        n: Interval(t[0], t[-1] + np.median(np.diff(t))) for n, t in {**videos, **sensors}.items()
    }
    if sound_s is not None:
        intervals["audio"] = Interval(0.0, sound_s)
    tracks = {name: track(times_s) for name, times_s in videos.items()}
    readings = {n: (t, np.zeros((len(t), 1), np.float32)) for n, t in sensors.items()}
    return find_rate_faults(
        Recorded(
            path=NOWHERE, recipe=RECIPE, intervals=intervals, tracks=tracks, zeros={},
            readings=readings,
        )
    )  # fmt: skip


def times(length_s: float, rate_hz: float, *, jitter: float = 0.0, seed: int = 0) -> np.ndarray:
    count = round(length_s * rate_hz)
    shaken = np.random.default_rng(seed).uniform(-jitter / 2, jitter / 2, count)
    shaken[0] = abs(shaken[0])
    return (np.arange(count) + shaken) / rate_hz


PPM = st.sampled_from([100, -100, 500, -500, 40_000, -40_000])


@given(
    ppm=PPM, jitter=st.floats(0, 0.4), rate_hz=st.sampled_from([30, 60, 90]),
    has_sound=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_sensor_whose_clock_drifts_is_measured(
    ppm: int, jitter: float, rate_hz: int, has_sound: bool, seed: int
) -> None:
    length_s = max(20.0, 0.6e6 / abs(ppm))
    true_s = times(length_s, rate_hz, jitter=jitter, seed=seed)
    own_s = true_s * (1 + ppm / 1e6)
    faults = judge(
        length_s if has_sound else None,
        {"vision_left": times(length_s, 30)},
        dict.fromkeys(TIMED, own_s),
    )
    (fault,) = faults
    assert fault.is_sure
    assert set(fault.streams) == {*TIMED}
    assert fault.factor == pytest.approx(1 / (1 + ppm / 1e6), abs=0.1 / length_s)
    assert ("fast" if ppm > 0 else "slow") in fault.describe()
    # After the correction, and before the mask, no reading is wrong by more than the limit.
    tolerance_s = 0.1
    assert np.abs(own_s * fault.factor - true_s).max() <= tolerance_s
    is_kept = own_s < fault.span.start_s
    assert np.abs(own_s - true_s)[is_kept].max() <= LIMIT_S + tolerance_s
    assert np.abs(own_s - true_s)[~is_kept].min() >= LIMIT_S - tolerance_s
    texts = set(RECIPE.texts)
    assert propose_stretches(faults, RECIPE).keys() == {*TIMED, *texts}


@given(
    ppm=st.sampled_from([40_000, -40_000, 25_000, 90_000]),
    length_s=st.floats(20, 600),
    rate_hz=st.sampled_from([24, 25, 30, 60]),
    num_videos=st.sampled_from([1, 2]),
    jitter=st.floats(0, 0.4),
)
def test_videos_that_are_declared_at_a_wrong_rate_are_measured(
    ppm: int, length_s: float, rate_hz: int, num_videos: int, jitter: float
) -> None:
    video_s = np.arange(round(length_s * rate_hz / (1 + ppm / 1e6))) / rate_hz
    sensor_s = times(length_s, 60, jitter=jitter)
    names = VIDEOS[:num_videos]
    (fault,) = judge(length_s, dict.fromkeys(names, video_s), dict.fromkeys(TIMED, sensor_s))
    assert fault.is_sure
    assert fault.streams == names
    assert fault.factor == pytest.approx(1 + ppm / 1e6, abs=0.15 / length_s)


@given(
    sound_s=st.floats(55, 66), video_s=st.floats(55, 66), sensor_s=st.floats(55, 66),
    rate_hz=st.sampled_from([30.0, 90.0, 27.3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_streams_that_were_stopped_at_other_times_are_not_called_wrong(
    sound_s: float, video_s: float, sensor_s: float, rate_hz: float, seed: int
) -> None:
    # At this ratio, a sound of 44.1 kHz that is declared as 48 kHz is more likely.
    assume(
        all(
            abs(s / sound_s / ratio - 1) > 0.005
            for s in (video_s, sensor_s)
            for ratio in (441 / 480, 480 / 441)
        )
    )
    # The recorder measured when frames and readings were taken.
    frames_s = times(video_s, 30, jitter=0.2, seed=seed)
    readings_s = times(sensor_s, rate_hz, jitter=0.2, seed=seed + 1)
    for sound in (sound_s, None):
        faults = judge(sound, dict.fromkeys(VIDEOS, frames_s), dict.fromkeys(TIMED, readings_s))
        assert not any(fault.is_sure for fault in faults if rate_hz != 27.3)
        assert propose_stretches([f for f in faults if not f.is_sure], RECIPE) == {}


@pytest.mark.parametrize(("length_s", "early_s"), [(12.0, 0.3), (30.0, 0.5), (60.0, 1.0)])
def test_cameras_that_stop_a_little_before_the_others_are_not_called_slow(
    length_s: float, early_s: float
) -> None:
    frames_s = np.arange(round((length_s - early_s) * 30)) / 30
    sensors = dict.fromkeys(TIMED, times(length_s, 60))
    faults = judge(length_s, dict.fromkeys(VIDEOS, frames_s), sensors)
    assert not any(fault.is_sure for fault in faults)


def test_lengths_alone_are_not_sure() -> None:
    (fault,) = judge(60.0, {"vision_left": times(57.0, 30)}, {})
    assert not fault.is_sure
    assert "or it was stopped at another time, or cut off" in fault.sentence


# --- files ---------------------------------------------------------------------------------------

LENGTH_S = 14.0


@cache
def world(count: int) -> np.ndarray:
    """Return what two cameras see, uint8 [count, 32, 32]: spots that drift at random."""
    rng = np.random.default_rng(7)
    steps = rng.normal(0, 1.0, (count, 6, 2)).cumsum(axis=0)
    grid = np.stack(np.mgrid[:32, :32], axis=-1)[None]
    pictures = np.zeros((count, 32, 32))
    for spot in range(6):
        center = 16 + 14 * np.sin(steps[:, spot] / 5 + spot)
        pictures += np.exp(-((grid - center[:, None, None]) ** 2).sum(axis=-1) / 30)
    return np.clip(30 + 120 * pictures, 0, 255).astype(np.uint8)


def write_pictures(path: Path, frames: np.ndarray, rate_hz: int) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=rate_hz, options={"crf": "20"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i, gray in enumerate(frames):
            picture = np.repeat(gray[..., None], 3, axis=-1)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate_hz)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def write_eyes(session: Path, left: np.ndarray, right: np.ndarray, *, rate_hz: int = 30) -> Path:
    """Write a session whose sound and sensors last LENGTH_S."""
    session.mkdir(parents=True)
    write_pictures(session / "vision_left.mp4", left, rate_hz)
    write_pictures(session / "vision_right.mp4", right, rate_hz)
    write_tone(session / "audio.wav", LENGTH_S)
    write_lines(session / "metadata.jsonl", sensor_lines(LENGTH_S))
    return session


def lost_at_random(count: int, share: float) -> np.ndarray:
    return np.sort(np.random.default_rng(3).permutation(count)[: round(count * (1 - share))])


def test_frames_that_one_eye_lost_are_masked_and_corrected(tmp_path: Path) -> None:
    count = round(LENGTH_S * 30)
    kept = lost_at_random(count, 0.06)
    session = write_eyes(tmp_path / "in" / "one", world(count), world(count)[kept] // 2 + 40)
    scan = scan_session(session, recipe=RECIPE)
    assert [*scan.masked] == ["vision_right"]
    (span,) = scan.masked["vision_right"]
    error_s = (kept - np.arange(len(kept))) / 30
    assert error_s[np.arange(len(kept)) / 30 < span.start_s].max() <= LIMIT_S + 2 / 30
    assert error_s[int(span.start_s * 30)] > 0.5 * LIMIT_S
    repair_session(session, recipe=RECIPE)
    factor = json.loads((session / "session.json").read_text())["stretch"]["vision_right"]
    corrected_s = np.arange(len(kept)) / 30 * factor
    assert np.abs(corrected_s - kept / 30).max() <= LIMIT_S
    assert scan_session(session, recipe=RECIPE).masked == {}
    assert repair_session(session, recipe=RECIPE) == []


def test_an_eye_that_was_switched_off_is_not_said_to_have_lost_frames(tmp_path: Path) -> None:
    count = round(LENGTH_S * 30)
    session = write_eyes(tmp_path / "one", world(count), world(count)[: round(count * 0.94)])
    scan = scan_session(session, recipe=RECIPE)
    assert (scan.masked, scan.proposed_stretches) == ({}, {})


def test_frames_lost_in_one_place_are_masked_after_it(tmp_path: Path) -> None:
    count = round(LENGTH_S * 30)
    kept = np.delete(np.arange(count), slice(200, 225))
    session = write_eyes(tmp_path / "one", world(count), world(count)[kept])
    scan = scan_session(session, recipe=RECIPE)
    (span,) = scan.masked["vision_right"]
    assert 3.5 < span.start_s < 200 / 30 + 0.1
    assert scan.proposed_stretches == {}
    errors = check_session(session, recipe=RECIPE).report.errors
    assert any("no one factor corrects it" in error for error in errors)


def session_at_a_wrong_rate(folder: Path) -> Path:
    """Write pictures taken 24 times per second as 25 per second."""
    frames = world(round(LENGTH_S * 24))
    return write_eyes(folder / "in" / "one", frames, np.roll(frames, 4, axis=2), rate_hz=25)


def test_the_build_masks_what_is_late_and_says_so(tmp_path: Path) -> None:
    session_at_a_wrong_rate(tmp_path)
    build_set(tmp_path / "in", tmp_path / "out")
    valid_s = {name: [] for name in VIDEOS}
    for _, index in open_indexes(tmp_path / "out"):
        for name in VIDEOS:
            errors_s = index.arrays[f"{name}.error_s"]
            grid_s = index.arrays["segment"][:, None] + np.arange(5) / 5
            valid_s[name] += grid_s[np.isfinite(errors_s)].tolist()
    for name in VIDEOS:
        # Content at t of the file was seen at t * 25 / 24.
        assert max(valid_s[name]) * (25 / 24 - 1) <= LIMIT_S + 0.01
        assert max(valid_s[name]) > 4.0
    lines = jsonl(tmp_path / "out" / "rejected.jsonl")
    spans = [
        line for line in lines if line.get("reason", "").startswith("clock") or "start_s" in line
    ]
    assert {line["stream"] for line in spans if line["level"] == "stream"} == {*VIDEOS}
    assert any("24 by the other clocks" in line["reason"] for line in lines)


def test_the_repair_is_recorded_and_can_be_removed(tmp_path: Path) -> None:
    session = session_at_a_wrong_rate(tmp_path)
    before = '{"by": "hand", "start_s": {"audio": 0.0}}'
    (session / "session.json").write_text(before)
    (error,) = check_session(session, recipe=RECIPE).report.errors
    assert "its clock runs 4.00% slow" in error
    assert "session.json with --fix" in error
    done = repair_session(session, recipe=RECIPE)
    assert done[0].startswith("session.json: declared that times are multiplied")
    assert (session / "session.json.orig").read_text() == before
    info = json.loads((session / "session.json").read_text())
    assert info["by"] == "hand"
    assert info["stretch"] == dict.fromkeys(VIDEOS, pytest.approx(25 / 24, abs=0.01))
    assert check_session(session, recipe=RECIPE).report.errors == ()
    scan = scan_session(session, recipe=RECIPE)
    assert scan.intervals["vision_left"].stop_s == pytest.approx(LENGTH_S, abs=0.05)
    assert repair_session(session, recipe=RECIPE) == []
    (session / "session.json").write_text(before)
    assert scan_session(session, recipe=RECIPE).masked.keys() == {*VIDEOS}


def test_masks_can_be_switched_off_and_the_reason_stays(tmp_path: Path) -> None:
    session = session_at_a_wrong_rate(tmp_path)
    recipe = tiny_recipe(video={"mask": ["still"]})
    scan = scan_session(session, recipe=recipe)
    assert scan.masked == {}
    assert any("its clock runs 4.00% slow" in issue for issue in scan.issues)
    (error,) = check_session(session, recipe=recipe).report.errors
    assert "kept, as `mask` of the recipe says" in error


def test_a_segment_of_which_the_only_stream_is_masked_is_rejected(tmp_path: Path) -> None:
    session = session_at_a_wrong_rate(tmp_path)
    required = tiny_recipe(required=["vision_left"])
    scan = scan_session(session, recipe=required)
    assert scan.stored_segments(required) == [0, 1, 2, 3, 4]
    assert "clock runs 4.00% slow" in str(scan.rejections(required).get(9))
    scan = replace(scan, intervals={"vision_left": scan.intervals["vision_left"]})
    alone = replace(scan, coverage={"vision_left": scan.coverage["vision_left"]})
    reason = str(alone.rejections(tiny_recipe()).get(9))
    assert reason.startswith("no stream covers any of [9, 10) s; vision_left is masked (")
    assert "clock runs 4.00% slow" in reason


def test_a_rate_that_is_not_sure_comes_with_both_repairs(tmp_path: Path) -> None:
    frames = world(round((LENGTH_S - 0.3) * 30))
    session = write_eyes(tmp_path / "one", frames, np.roll(frames, 4, axis=2))
    report = check_session(session, recipe=RECIPE).report
    assert report.errors == ()
    messages = [m for m in report.warnings if "a copy was cut off or its clock runs" in m]
    assert messages
    for message in messages:
        name = message.split(".mp4")[0]
        assert (
            f'fix: copy it again if the original is longer, or write "stretch": {{"{name}": 1.0'
            in message
        )
    assert repair_session(session, recipe=RECIPE) == []
