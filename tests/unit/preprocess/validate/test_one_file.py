"""A single video or sound is judged by the checks of sessions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from helpers.sessions import write_session, write_tone, write_video

from preprocess.__main__ import cli
from preprocess.validate.one_file import judge, session_of
from preprocess.validate.verdicts import iter_verdicts
from shared.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from preprocess.validate.validate import Report

VERDICTS = {
    "video/corrupted.mp4": ("failed", "1 of 50 frames tried don't decode"),
    "video/lfs_pointer.mp4": ("failed", "Git LFS pointer"),
    "video/zero_bytes.mp4": ("failed", "the file is empty"),
    "video/vfr_gap_575ms.mp4": ("warnings", "no frame for 0.575 s"),
    "video/rotated_90.mov": ("passed", ""),
    "video/rotated_270.mov": ("passed", ""),
    "video/hevc_10bit.mp4": ("passed", ""),
    "video/av1_no_duration.mkv": ("passed", ""),
    "video/non_utf8_metadata.mp4": ("passed", ""),
    "video/mpeg1_bframes.mpg": ("passed", ""),
    "video/sound_5.1.mp4": ("passed", ""),
    "audio/zero_bytes.wav": ("failed", "the file is empty"),
    "audio/nonstandard-01.wav": ("failed", "holds no sound"),
    "audio/crash-e5471f5b58397287b509db7d026e95f1724454f5.wav": ("failed", "full scale is 1"),
    "audio/oom-48ae4cd061ff8578ad3f23dc87624bd365cf5216.wav": ("failed", "is no sound file"),
    "audio/test-44100Hz-le-1ch-4bytes-incomplete-chunk.wav": ("failed", "is no sound file"),
    "audio/test-44100Hz-le-1ch-4bytes-early-eof.wav": ("warnings", "header promises 16696 bytes"),
    "audio/jfk_cut_half_header_unchanged.wav": ("warnings", "cut off at 5.50 s"),
    "audio/speech_clipped_slightly.wav": ("warnings", "24 samples"),
    "audio/waveformatex-16bit-44100Hz-mono-extra.wav": ("warnings", "silent"),
    "audio/jfk_data_size_ffffffff.wav": ("passed", ""),
    "audio/24bit_stereo.wav": ("passed", ""),
    "audio/dc_offset.wav": ("passed", ""),
    "audio/eight_channels_0.1s.wav": ("passed", ""),
    "audio/test-44100Hz-le-1ch-4bytes-rf64.wav": ("passed", ""),
    "audio/test-8000Hz-le-1ch-1byte-ulaw.wav": ("passed", ""),
}


def judge_file(path: Path) -> Report:
    with session_of(path) as folder:
        return judge(path, folder, recipe=Recipe())[0]


@pytest.mark.parametrize("name", VERDICTS)
def test_every_problem_file_has_its_verdict(name: str, nasty_files: dict[str, Path]) -> None:
    status, words = VERDICTS[name]
    report = judge_file(nasty_files[name])
    messages = (*report.errors, *report.warnings)
    assert (report.session, report.status) == (nasty_files[name].name, status), messages
    assert len(messages) == (status != "passed")
    assert all(m.startswith(report.session) and words in m for m in messages)


def test_files_and_sessions_stand_in_one_table(tmp_path: Path) -> None:
    write_session(tmp_path / "sessions" / "whole")
    write_tone(tmp_path / "mic.WAV", 0.5)
    write_video(tmp_path / "eye.mkv", container="matroska")
    (tmp_path / "bad.mp3").write_bytes(b"no sound")
    places = ["sessions", "mic.WAV", "eye.mkv", "bad.mp3"]
    arguments = ["validate", *(str(tmp_path / p) for p in places), "--json"]
    result = CliRunner().invoke(cli, [*arguments, "--report", str(tmp_path / "page.html")])
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    found = {r["session"]: (r["status"], list(r["stats"].get("streams", {}))) for r in reports}
    assert result.exit_code == 1
    assert found.pop("whole")[0] == "passed"
    assert found == {
        "mic.WAV": ("passed", ["audio"]),
        "eye.mkv": ("passed", ["vision_left"]),
        "bad.mp3": ("failed", []),
    }
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") >= 10
    assert "can't be drawn" not in page


def test_a_part_of_a_session_that_says_nothing_alone_is_refused(tmp_path: Path) -> None:
    write_session(tmp_path / "one")
    lines = str(tmp_path / "one" / "metadata.jsonl")
    (verdict,) = iter_verdicts([lines], recipe=Recipe(), fix=False)
    assert verdict.report.status == "failed"
    assert verdict.report.errors == (
        f"{lines}: no video or sound; for a part of a session give its folder",
    )
