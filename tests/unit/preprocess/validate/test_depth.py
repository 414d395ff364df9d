"""A quick look decodes nothing, finds nothing that a full one does not, and says what it left."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
import soundfile
from helpers.report_pages import RECIPE, default_recipe, recipe_of
from helpers.sessions import (
    read_lines,
    sensor_lines,
    tone,
    write_lines,
    write_session,
    write_tone,
    write_video,
)

import shared.media.sound
import shared.media.video
from preprocess.validate.report import CHECKS, NEEDS_DECODING, check_session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from preprocess.validate.report import ValidationReport
    from shared.recipe import Recipe

TWO_EYES = default_recipe(required=())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List every call of a decoder of this program and of libsndfile."""
    calls: list[str] = []

    def listen(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    listen(shared.media.video, "_decode")
    listen(shared.media.sound, "decode_all")
    for name in ("read", "buffer_read", "_cdata_io"):
        listen(soundfile.SoundFile, name)
    return calls


def require_quick_finds_no_more(folder: Path, recipe: Recipe = RECIPE) -> ValidationReport:
    """Check a session quickly and fully; the first must find a subset of the second."""
    quick, full = (check_session(folder, recipe=recipe, depth=d) for d in ("quick", "full"))
    found = [{(f.level, f.message, *f.streams) for f in one.findings} for one in (quick, full)]
    assert found[0] <= found[1], found[0] - found[1]
    assert quick.report.is_unchecked == full.report.is_unchecked
    for check, status in quick.report.checks.items():
        assert status in ("not assessed", "passed", full.report.checks[check]), check
    for name, stats in quick.report.stats.get("streams", {}).items():
        measured = full.report.stats["streams"][name]
        same = stats.keys() - {"frames_checked", "frames_undecoded", "share_used", "flaws"}
        assert {key: measured[key] for key in same} == {key: stats[key] for key in same}
    return quick.report


def fast_sensors(folder: Path) -> None:
    lines = sensor_lines(3.0)
    for line in lines:
        line["proprio"] = [0.5] * 20
    write_lines(folder / "metadata.jsonl", lines)


def unlike_eyes(folder: Path) -> None:
    for name, count in (("left", 300), ("right", 290)):
        write_video(folder / f"vision_{name}.mp4", times_s=np.arange(count) / 30)


FAULTS: dict[str, Callable[[Path], object]] = {
    "none": lambda folder: None,
    "still sensors": fast_sensors,
    "only sensors": lambda folder: [
        fast_sensors(folder), (folder / "audio.wav").unlink(), (folder / "vision_left.mp4").unlink()
    ],
    "cut sound": lambda folder: write_tone(folder / "audio.wav", 0.7),
    "bare stream": lambda folder: write_video(
        folder / "vision_left.mp4", container="h264", b_frames=2
    ),
    "copied eye": lambda folder: shutil.copy(
        folder / "vision_left.mp4", folder / "vision_right.mp4"
    ),
    "unlike eyes": unlike_eyes,
    "text for video": lambda folder: (folder / "vision_left.mp4").write_bytes(b"{}" * 999),
    "unconfirmed unit": lambda folder: write_lines(
        folder / "metadata.jsonl",
        [{**line, "timestamp": line["timestamp"] * 1e5} for line in sensor_lines(2.0)],
    ),
    "stretched": lambda folder: (folder / "session.json").write_text(
        '{"stretch": {"audio": 1.01, "vision_left": 1.02}}'
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_quick_look_decodes_nothing_and_finds_no_more_than_a_full_one(
    name: str, session: Path, decoded: list[str]
) -> None:
    FAULTS[name](session)
    decoded.clear()
    check_session(session, recipe=TWO_EYES, depth="quick")
    assert not decoded
    require_quick_finds_no_more(session, TWO_EYES)
    assert decoded or "audio" not in require_quick_finds_no_more(session, TWO_EYES).stats["streams"]


@pytest.mark.parametrize("seed", range(30))
def test_no_damage_of_a_file_makes_a_quick_look_find_more(seed: int, session: Path) -> None:
    rng = np.random.default_rng(seed)
    path = sorted(session.iterdir())[rng.integers(4)]
    content = bytearray(path.read_bytes())
    where = int(rng.integers(len(content)))
    if rng.random() < 0.4:
        del content[where:]
    else:
        content[where : where + 200] = rng.bytes(min(200, len(content) - where))
    path.write_bytes(content)
    require_quick_finds_no_more(session)


def test_recordings_and_nasty_files_show_no_more_at_a_quick_look(
    real_sessions: list[Path], nasty_files: dict[str, Path], tmp_path: Path
) -> None:
    kinds = {"audio": "audio.wav", "video": "vision_left.mp4", "other": "metadata.jsonl"}
    for name, file in nasty_files.items():
        folder = tmp_path / name.replace("/", "_")
        folder.mkdir()
        shutil.copyfile(file, folder / kinds[name.split("/")[0]])
        require_quick_finds_no_more(folder, recipe_of(folder))
    for folder in real_sessions:
        require_quick_finds_no_more(folder, recipe_of(folder))


def test_a_quick_look_says_which_checks_need_decoding(session: Path) -> None:
    report = require_quick_finds_no_more(session)
    needed = {check for check, reason in report.not_assessed.items() if reason == NEEDS_DECODING}
    assert needed == {"levels", "frames", "still"}
    assert {check for check in CHECKS if CHECKS[check].depth == "full"} == {"levels", "frames"}
    assert all(report.checks[check] == "not assessed" for check in needed)
    assert report.status == "passed"


def test_frozen_tracking_is_found_quickly_where_no_video_could_explain_it(session: Path) -> None:
    (session / "vision_left.mp4").unlink()
    fast_sensors(session)
    report = require_quick_finds_no_more(session)
    assert report.checks["still"] == "warnings"
    assert report.not_assessed["still"] == f"audio: {NEEDS_DECODING}"


def test_clocks_are_not_compared_quickly_where_only_pictures_tell(session: Path) -> None:
    unlike_eyes(session)
    report = require_quick_finds_no_more(session, TWO_EYES)
    for check in ("clock rates", "durations", "drift"):
        assert (report.checks[check], report.not_assessed[check]) == (
            "not assessed", NEEDS_DECODING,
        )  # fmt: skip
    write_video(session / "vision_right.mp4", times_s=np.arange(300) / 30)
    assert require_quick_finds_no_more(session, TWO_EYES).checks["durations"] == "warnings"


@pytest.mark.parametrize(
    ("form", "subtype", "is_exact"),
    [("WAV", "PCM_16", True), ("WAV", "IMA_ADPCM", True), ("AIFF", "PCM_24", True),
     ("WAV", "GSM610", True), ("FLAC", "PCM_16", False), ("OGG", "VORBIS", False),
     ("MP3", "MPEG_LAYER_III", False)],
)  # fmt: skip
@pytest.mark.parametrize("rate_hz", [8_000, 44_100])
def test_the_length_of_a_sound_is_that_of_its_samples(
    form: str, subtype: str, is_exact: bool, rate_hz: int, tmp_path: Path
) -> None:
    for num_frames in (rate_hz, 12_345, 54_321):
        path = tmp_path / f"{num_frames}.sound"
        samples = 0.1 * np.sin(np.arange(num_frames)).astype(np.float32)
        soundfile.write(path, samples, rate_hz, format=form, subtype=subtype)
        quick, full = (
            shared.media.sound.read_sound(path, rate_hz=16_000, decode=decode)
            for decode in (False, True)
        )
        assert quick.duration_s == full.duration_s == len(full.samples) / 16_000
        assert quick.source_rate_hz == full.source_rate_hz
        assert quick.is_exact == is_exact
        assert not len(quick.samples)


def test_packets_tell_when_the_sound_of_a_video_begins_and_ends(tmp_path: Path) -> None:
    path, rate_hz = tmp_path / "a.mp4", 48_000
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=30)
        video.width = video.height = 64
        audio = output.add_stream("aac", rate=rate_hz, layout="mono")
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), i, np.uint8))
            output.mux(video.encode(frame))
        for first in range(24_000, 96_000, 1024):
            plane = 0.1 * np.sin(np.arange(1024, dtype=np.float32))[None]
            sound = av.AudioFrame.from_ndarray(plane, format="fltp", layout="mono")
            sound.rate, sound.pts = rate_hz, first
            output.mux(audio.encode(sound))
        output.mux([*video.encode(), *audio.encode()])
    quick, full = (
        shared.media.sound.read_sound(path, rate_hz=16_000, decode=decode)
        for decode in (False, True)
    )
    assert quick.duration_s == pytest.approx(full.duration_s, abs=0.05)
    assert quick.start_s == pytest.approx(full.start_s, abs=0.05)
    assert not quick.is_exact
    assert full.is_exact


def only(folder: Path, *files: str) -> None:
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()


def one_stream(folder: Path) -> None:
    only(folder, "audio.wav")


def two_frames(folder: Path) -> None:
    write_video(folder / "vision_left.mp4", times_s=[0.0, 1.0])


def at_rest(folder: Path) -> None:
    lines = read_lines(folder / "metadata.jsonl")
    for line in lines:
        line["proprio"] = [0.5 + 1e-6 * line["timestamp"]] * 10 + [0.0] * 10
    write_lines(folder / "metadata.jsonl", lines)


@pytest.mark.parametrize(
    ("change", "check", "reason", "is_whole"),
    [
        (one_stream, "durations", "fewer than two streams", True),
        (one_stream, "clock rates", "fewer than two streams", True),
        (lambda folder: None, "clock rates", "shorter than 10 s", True),
        (two_frames, "rates", "vision_left: fewer than 3", False),
        (lambda folder: [only(folder, "vision_left.mp4"), two_frames(folder)], "rates",
         "fewer than 3", True),
        (at_rest, "velocities", "almost no movement", True),
    ],
)  # fmt: skip
def test_a_check_that_cannot_judge_says_so(
    change: Callable[[Path], object], check: str, reason: str, is_whole: bool, session: Path
) -> None:
    change(session)
    report = check_session(session, recipe=RECIPE).report
    assert report.not_assessed[check].startswith(reason)
    assert report.checks[check] == ("not assessed" if is_whole else "passed")


def test_an_expectation_that_nothing_is_compared_with_is_named(session: Path) -> None:
    values = TWO_EYES.as_json()
    values["streams"]["touch"]["expect"] = {"range": [0.0, 1.0]}
    values["streams"]["audio"]["expect"] = {"min_rate_hz": 8_000, "range": [-1.0, 1.0]}
    values["streams"]["vision_right"]["expect"] = {"min_rate_hz": 20.0}
    recipe = type(RECIPE).model_validate(values)
    report = check_session(session, recipe=recipe).report
    assert (
        report.not_assessed["expectations"]
        == "audio, vision_right: no values or no rate to compare"
    )
    assert check_session(session, recipe=RECIPE).report.checks["expectations"] == "passed"


def test_a_whole_session_of_over_ten_seconds_judges_all_but_counted_times(tmp_path: Path) -> None:
    folder = write_session(tmp_path / "long")
    write_video(folder / "vision_left.mp4", times_s=np.arange(330) / 30)
    soundfile.write(folder / "audio.wav", tone(11.0), 16_000)
    write_lines(folder / "metadata.jsonl", sensor_lines(11.0))
    report = check_session(folder, recipe=RECIPE).report
    assert [*report.not_assessed] == ["drift"]  # of times that are counted
    assert report.checks == dict.fromkeys(CHECKS, "passed")
