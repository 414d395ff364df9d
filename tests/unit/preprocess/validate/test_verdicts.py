"""`validate` of many places: every one has its verdict, in a folder or behind a URL."""

from __future__ import annotations

import json
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from click.testing import CliRunner
from helpers.stores import fail_at_first, s3_server, upload

from preprocess.__main__ import cli
from shared import storage
from shared.storage import STARTUP_RETRY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def sessions(session: Path, tmp_path: Path) -> Path:
    """A folder of a good session and one without pictures."""
    folder = tmp_path / "sessions"
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


def judge(*arguments: object) -> list[dict[str, Any]]:
    """The reports of `validate --json`; a failed session is among them."""
    result = CliRunner().invoke(cli, ["validate", *map(str, arguments), "--json"])
    assert result.exit_code == 1, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_missing_folder_takes_no_verdict_from_the_others(sessions: Path) -> None:
    missing = sessions / "missing"
    args = ["validate", str(sessions / "good"), str(missing), str(sessions / "good"), "--summary"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 1
    assert "3 sessions" in result.output
    assert "2 passed, 1 failed" in result.output
    reports = judge(sessions, missing, sessions / "good")
    assert [r["session"] for r in reports] == ["good", "poor", str(missing), "good"]
    assert "no such folder" in reports[2]["errors"][0]


def test_sessions_behind_a_url_are_judged_as_in_folders(
    sessions: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_at_first(patched, memory, 2)
        assert judge("memory://here/sessions") == judge(sessions)
    assert judge("memory://here/sessions/poor/") == judge(sessions / "poor")


def test_sessions_behind_s3_are_judged_as_in_folders(sessions: Path) -> None:
    with s3_server() as fs:
        upload(sessions, fs, "here/sessions")
        assert judge("s3://here/sessions") == judge(sessions)
        (report,) = judge("s3://here/nowhere")
    assert report["errors"][0].startswith("s3://here/nowhere: no session in it")


def test_a_store_that_is_gone_takes_no_verdict_from_the_others(
    sessions: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda wait_s: None)
    with monkeypatch.context() as patched:
        fail_at_first(patched, memory, STARTUP_RETRY.attempts)
        reports = judge("memory://here/sessions", sessions / "good")
    assert [(r["session"], r["status"]) for r in reports] == [
        ("memory://here/sessions", "failed"),
        ("good", "passed"),
    ]


def test_repairs_behind_a_url_are_refused_before_anything_is_done(
    sessions: Path, memory: fsspec.AbstractFileSystem
) -> None:
    before = {path: memory.cat_file(path) for path in memory.find("/")}
    args = ["validate", str(sessions), "memory://me:word@here/sessions", "--fix"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert "memory://here/sessions: --fix repairs sessions in folders only" in result.output
    assert {path: memory.cat_file(path) for path in memory.find("/")} == before
