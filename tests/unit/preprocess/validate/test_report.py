"""Every location has its report: folders, URLs, and single video and sound files."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from click.testing import CliRunner
from helpers.sessions import write_session, write_tone, write_video
from helpers.stores import fail_at_first, s3_server, upload
from helpers.validation import validated

from preprocess.__main__ import cli
from shared.storage import STARTUP_RETRY

if TYPE_CHECKING:
    from collections.abc import Iterator


FILE_REPORTS = {
    "video/corrupted.mp4": ("failed", "frames are damaged or follow damage"),
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
    "audio/nonstandard-01.wav": ("failed", "contains no audio"),
    "audio/crash-e5471f5b58397287b509db7d026e95f1724454f5.wav": ("failed", "full scale is 1"),
    "audio/oom-48ae4cd061ff8578ad3f23dc87624bd365cf5216.wav": (
        "failed",
        "not a readable audio file",
    ),
    "audio/test-44100Hz-le-1ch-4bytes-incomplete-chunk.wav": (
        "failed",
        "not a readable audio file",
    ),
    "audio/test-44100Hz-le-1ch-4bytes-early-eof.wav": ("warnings", "header declares 16696 bytes"),
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


@pytest.fixture
def sessions(session: Path, tmp_path: Path) -> Path:
    """A folder of a good session and one without pictures."""
    folder = tmp_path / "sessions"
    write_video(session / "vision_right.mp4", gop=6)
    shutil.copytree(session, folder / "good")
    shutil.copytree(session, folder / "poor")
    (folder / "poor" / "vision_left.mp4").unlink()
    return folder


@pytest.fixture
def memory(
    sessions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[fsspec.AbstractFileSystem]:
    """The sessions in memory://here/sessions; nothing stays in the temporary folder."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    upload(sessions, fs, "/here/sessions")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    yield fs
    fs.store.clear()
    assert list((tmp_path / "scratch").iterdir()) == []


def reports_of(*arguments: object, code: int = 1) -> list[dict[str, Any]]:
    """The reports of `validate --json`; a failed session is among them."""
    result = CliRunner().invoke(cli, ["validate", *map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_sessions_beside_a_missing_folder_are_checked(sessions: Path) -> None:
    missing = sessions / "missing"
    result = CliRunner().invoke(
        cli, ["validate", str(sessions / "good"), str(missing), "--summary"]
    )
    assert result.exit_code == 1
    assert "2 sessions" in result.output
    assert "1 passed, 1 failed" in result.output
    reports = reports_of(sessions, missing)
    assert [r["session"] for r in reports] == ["good", "poor", str(missing)]
    assert "no such folder" in reports[2]["errors"][0]


def test_what_several_locations_have_in_common_is_checked_once(sessions: Path) -> None:
    (sessions.parent / "link").symlink_to(sessions)
    sound = sessions / "good" / "audio.wav"
    folders = [sessions / "good", sessions, f"{sessions}/", sessions.parent / "link"]
    for _ in range(2):  # the second time, of the first location there are verdicts
        reports = reports_of(*folders, sound, sessions / ".." / "sessions" / "good" / "audio.wav")
        assert [r["session"] for r in reports] == ["good", "poor", "audio.wav"]
        (sessions / "poor" / "text.jsonl").touch()


def test_sessions_of_one_name_at_two_locations_are_told_apart(sessions: Path) -> None:
    other = sessions.parent / "other"
    shutil.copytree(sessions / "good", other / "good")
    page = sessions.parent / "page.html"
    args = ["validate", str(sessions / "good"), str(other / "good"), "--report", str(page)]
    result = CliRunner().invoke(cli, args)
    first, second = (place / "good" for place in (sessions, other))
    assert result.exit_code == 0
    title, warning = result.output.splitlines()[-3:-1]
    assert title == "good, compared with the other sessions:"
    assert warning.startswith(f"  warning  session: same content as {second} (all files); fix")
    assert f"same content as {first}" not in result.output
    rows = page.read_text(encoding="utf-8").split("<section")
    assert [str(second) in row for row in rows[1:3]] == [True, False]


def test_sessions_behind_a_url_are_checked_as_in_folders(
    sessions: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_at_first(patched, memory, 2)
        assert reports_of("memory://here/sessions") == reports_of(sessions)
    assert reports_of("memory://here/sessions/poor/") == reports_of(sessions / "poor")


def test_sessions_behind_s3_are_checked_as_in_folders(sessions: Path) -> None:
    with s3_server() as fs:
        upload(sessions, fs, "here/sessions")
        assert reports_of("s3://here/sessions") == reports_of(sessions)
        (report,) = reports_of("s3://here/nowhere")
    assert report["errors"][0].startswith("s3://here/nowhere: no session in it")


def test_the_sessions_beside_a_broken_store_are_checked(
    sessions: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda wait_s: None)
    with monkeypatch.context() as patched:
        fail_at_first(patched, memory, STARTUP_RETRY.attempts)
        reports = reports_of("memory://here/sessions", sessions / "good", code=3)
    assert [(r["session"], r["status"]) for r in reports] == [
        ("memory://here/sessions", "unchecked"),
        ("good", "passed"),
    ]


def test_a_disk_that_fails_leaves_a_session_unchecked(
    sessions: Path, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    def fail(fd: int, *_: object) -> int:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, *_)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", fail)
    for failing in ("vision_left.mp4", "audio.wav", "metadata.jsonl"):
        if not (sessions / "good" / failing).exists():
            (sessions / "good" / failing).write_text("{}")
            monkeypatch.setattr(os, "pread", fail)
        (report,) = reports_of(sessions / "good", code=3)
        (message,) = report["errors"]
        assert report["status"] == "unchecked", message
        assert f"{failing}: Input/output error" in message
        assert "; fix: look for the device's errors" in message


def test_reads_that_fail_for_a_while_change_no_report(
    sessions: Path, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    expected = reports_of(sessions / "good", code=0)
    calls, preadv = itertools.count(), os.preadv

    def fails_sometimes(*args: Any) -> int:
        if next(calls) % 3 < 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", fails_sometimes)
    assert reports_of(sessions / "good", code=0) == expected


def test_a_full_folder_of_temporary_files_leaves_a_session_unchecked_and_is_named(
    sessions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tiny"))
    (tmp_path / "tiny").mkdir()
    monkeypatch.setattr(os, "pwrite", fail)
    result = CliRunner().invoke(cli, ["validate", str(sessions / "good"), "--summary"])
    assert result.exit_code == 3
    assert "1 session, 0.0 s: 1 that could not be checked" in result.output
    (report,) = reports_of(sessions / "good", code=3)
    (message,) = report["errors"]
    assert message.startswith(f"{tmp_path / 'tiny'}: No space left on device; decoded sounds do")
    assert message.endswith("; fix: set TMPDIR to a folder on a disk with more space")


def test_repairs_behind_a_url_are_refused_before_any_change(
    sessions: Path, memory: fsspec.AbstractFileSystem
) -> None:
    before = {path: memory.cat_file(path) for path in memory.find("/")}
    args = ["validate", str(sessions), "memory://me:word@here/sessions", "--fix"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert "memory://here/sessions: --fix repairs sessions in folders only" in result.output
    assert {path: memory.cat_file(path) for path in memory.find("/")} == before


@pytest.mark.parametrize("name", FILE_REPORTS)
def test_every_problem_file_has_its_report(name: str, nasty_files: dict[str, Path]) -> None:
    status, words = FILE_REPORTS[name]
    (checked,) = validated(nasty_files[name])
    report = checked.report
    messages = (*report.errors, *report.warnings)
    assert (report.session, report.status) == (nasty_files[name].name, status), messages
    assert len(messages) == (status != "passed")
    assert all(m.startswith(report.session) and words in m for m in messages)


def test_files_and_sessions_are_in_one_table(tmp_path: Path) -> None:
    whole = write_session(tmp_path / "sessions" / "whole")
    write_video(whole / "vision_right.mp4", gop=6)
    write_tone(tmp_path / "mic.WAV", 0.5)
    write_video(tmp_path / "eye.mkv", container="matroska")
    (tmp_path / "bad.mp3").write_bytes(b"no sound")
    locations = ["sessions", "mic.WAV", "eye.mkv", "bad.mp3"]
    arguments = ["validate", *(str(tmp_path / p) for p in locations), "--json"]
    result = CliRunner().invoke(cli, [*arguments, "--report", str(tmp_path / "page.html")])
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    found = {r["session"]: (r["status"], list(r["stats"].get("streams", {}))) for r in reports}
    assert result.exit_code == 1
    assert found.pop("whole")[0] == "passed"
    assert found == {
        "mic.WAV": ("passed", ["audio"]),
        "eye.mkv": ("passed", ["video"]),
        "bad.mp3": ("failed", []),
    }
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") >= 10
    assert "cannot be drawn" not in page


def test_the_metadata_file_of_a_session_alone_fails(tmp_path: Path) -> None:
    write_session(tmp_path / "one")
    lines = str(tmp_path / "one" / "metadata.jsonl")
    (checked,) = validated(lines)
    assert checked.report.status == "failed"
    assert checked.report.errors == (
        f"{lines}: not a video or sound; fix: give the folder of its session",
    )
