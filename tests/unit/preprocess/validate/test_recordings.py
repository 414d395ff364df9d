"""The status of real recordings, with and without flaws."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from helpers.report_pages import recipe_of

from preprocess.validate.report import check_session

if TYPE_CHECKING:
    from pathlib import Path


# file: (status, a word of a message); "" where no message is expected
NASTY = {
    "audio/24bit_stereo.wav": ("passed", ""),
    "audio/crash-e5471f5b58397287b509db7d026e95f1724454f5.wav": ("failed", "full scale is 1"),
    "audio/dc_offset.wav": ("passed", ""),
    "audio/eight_channels_0.1s.wav": ("passed", ""),
    "audio/jfk_cut_half_header_unchanged.wav": ("warnings", "cut off at 5.50 s"),
    "audio/jfk_data_size_ffffffff.wav": ("passed", ""),
    "audio/nonstandard-01.wav": ("failed", "contains no audio"),
    "audio/oom-48ae4cd061ff8578ad3f23dc87624bd365cf5216.wav": (
        "failed",
        "not a readable audio file",
    ),
    "audio/pcmwaveformat-24bit-4byte-48kHz-stereo.wav": ("passed", ""),
    "audio/reachy_24bit_stereo.wav": ("passed", ""),
    "audio/speech_22050_LJ.wav": ("passed", ""),
    "audio/speech_clipped_slightly.wav": ("warnings", "clipped: 24 samples"),
    "audio/test-1234Hz-le-1ch-10S-20bit-extra.wav": ("passed", ""),
    "audio/test-44100Hz-2ch-32bit-float-le.wav": ("passed", ""),
    "audio/test-44100Hz-le-1ch-4bytes-early-eof.wav": ("warnings", "header declares"),
    "audio/test-44100Hz-le-1ch-4bytes-incomplete-chunk.wav": (
        "failed",
        "not a readable audio file",
    ),
    "audio/test-44100Hz-le-1ch-4bytes-rf64.wav": ("passed", ""),
    "audio/test-8000Hz-le-1ch-1byte-ulaw.wav": ("passed", ""),
    "audio/test-8000Hz-le-5ch-9S-5bit.wav": ("passed", ""),
    "audio/waveformatex-16bit-44100Hz-mono-extra.wav": ("warnings", "silent"),
    "audio/zero_bytes.wav": ("failed", "the file is empty"),
    "other/vmg30_pen_17.txt": ("failed", "right file"),
    "other/zero_bytes_stream.raw": ("failed", "contains nothing"),
    "video/av1_no_duration.mkv": ("passed", ""),
    "video/corrupted.mp4": ("failed", "2.90-5.00 s"),
    "video/hevc_10bit.mp4": ("passed", ""),
    "video/lfs_pointer.mp4": ("failed", "git lfs pull"),
    "video/mpeg1_bframes.mpg": ("passed", ""),
    "video/non_utf8_metadata.mp4": ("passed", ""),
    "video/rotated_270.mov": ("passed", ""),
    "video/rotated_90.mov": ("passed", ""),
    "video/sound_5.1.mp4": ("passed", ""),
    "video/vfr_gap_575ms.mp4": ("warnings", "no frame for 0.575 s"),
    "video/zero_bytes.mp4": ("failed", "the file is empty"),
}
NASTY_NAMES = {"audio": "audio.wav", "video": "vision_left.mp4", "other": "metadata.jsonl"}


@pytest.mark.parametrize("name", NASTY)
def test_every_nasty_file_gets_its_status(
    name: str, nasty_files: dict[str, Path], tmp_path: Path
) -> None:
    status, word = NASTY[name]
    shutil.copyfile(nasty_files[name], tmp_path / NASTY_NAMES[name.split("/")[0]])
    report = check_session(tmp_path, recipe=recipe_of(tmp_path)).report
    messages = (*report.errors, *report.warnings)
    assert report.status == status, messages
    assert any(word in message for message in messages) or messages == () == tuple(word), messages


def test_the_table_of_nasty_files_is_whole(nasty_files: dict[str, Path]) -> None:
    assert set(nasty_files) == set(NASTY)


REAL_STATUS = {
    "session_g1_ep037": "passed",
    "session_gopro_walk": "passed",
    "session_nasa_narrated": "passed",
    "session_neon_glasses": "warnings",  # sensors begin 1.06 s late
    "session_reachy2_sleep1": "warnings",  # lines of 26-30 Hz; the sound is 13 s shorter
    "session_vive_webvr": "warnings",  # four gaps over 35 ms; unwrapped angles
}


def test_every_real_session_validates_where_nothing_is_required(real_sessions: list[Path]) -> None:
    found = {
        path.name: check_session(path, recipe=recipe_of(path)).report.status
        for path in real_sessions
    }
    assert found == REAL_STATUS
