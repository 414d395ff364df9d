"""Drift between the clocks of sound and video, from sessions whose sound is too long or short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.sessions import sensor_lines, write_lines, write_tone, write_video

from preprocess.validate.validate import validate_session
from shared.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from preprocess.validate.validate import Report


def judge(folder: Path, *, video_s: float, sound_s: float) -> Report:
    folder.mkdir()
    write_video(folder / "vision_left.mp4", times_s=np.arange(round(video_s * 10)) / 10)
    write_tone(folder / "audio.wav", sound_s)
    write_lines(folder / "metadata.jsonl", sensor_lines(video_s))
    return validate_session(folder, recipe=Recipe())


def drift_messages(report: Report) -> list[str]:
    return [m for m in report.warnings if "ppm" in m]


@pytest.mark.parametrize(
    ("sound_s", "ppm", "pace", "tempo"),
    [(59.82, 3000, "slow", "atempo=0.997000"), (60.15, 2500, "fast", "atempo=1.002500")],
)
def test_a_drift_is_measured_and_said_with_the_remedy(
    sound_s: float, ppm: int, pace: str, tempo: str, tmp_path: Path
) -> None:
    report = judge(tmp_path / "s", video_s=60, sound_s=sound_s)
    (message,) = drift_messages(report)
    assert f"{sound_s:.2f} s of sound beside 60.00 s of vision_left.mp4" in message
    assert f"{ppm} ppm {pace}" in message
    assert tempo in message
    assert report.checks["drift"] == "warnings"


@pytest.mark.parametrize(
    ("video_s", "sound_s", "expected"),
    [
        (20.0, 20.05, {"vision_left": 2500}),  # half a frame: measured, not worth a word
        (20.0, 20.0, {"vision_left": 0}),
        (5.0, 5.02, {}),  # too short to tell
        (20.0, 15.0, {}),  # one was cut off
    ],
)
def test_what_is_no_drift_gives_no_warning(
    video_s: float, sound_s: float, expected: dict[str, Any], tmp_path: Path
) -> None:
    report = judge(tmp_path / "s", video_s=video_s, sound_s=sound_s)
    assert report.stats["audio"]["drift_ppm"] == expected
    assert report.checks["drift"] == "passed"
    assert drift_messages(report) == []
