"""Fixtures of many tests: real recordings, if available, and tiny shard sets, built once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.sets import build_set, set_recipe, write_sessions
from hypothesis import settings

from shared import machine, storage
from shared.storage import RetryPolicy

settings.register_profile("project", deadline=None)  # machines are shared, so durations vary
settings.load_profile("project")

QUICK_RETRY = RetryPolicy(attempts=4, first_wait_s=0.001, longest_wait_s=0.001)

RECORDINGS = Path(__file__).resolve().parents[2] / "shared"


def _recordings(name: str) -> Path:
    """Return a folder of recordings; if it is missing, skip, or fail if REQUIRE_SESSIONS=1."""
    folder = RECORDINGS / name
    if not folder.is_dir():
        reason = f"no real recordings: {folder} is missing"
        if os.environ.get("REQUIRE_SESSIONS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture
def quick_retries(monkeypatch):
    """Repeat failed reads of local files without long waits."""
    monkeypatch.setattr(storage, "LOCAL_RETRY", QUICK_RETRY)
    monkeypatch.setattr(machine, "_hopeless_until_s", {})


@pytest.fixture(scope="session")
def real_sessions() -> list[Path]:
    """Return the folders of real recorded sessions; read only."""
    return sorted(path for path in _recordings("sessions").iterdir() if path.is_dir())


@pytest.fixture(scope="session")
def import_samples() -> Path:
    """Return the folder of files that other recorders wrote; read only."""
    return _recordings("import_samples")


@pytest.fixture(scope="session")
def nasty_files() -> dict[str, Path]:
    """Return flawed real files by their path, such as ``audio/zero_bytes.wav``."""
    folder = _recordings("nasty")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return {path.relative_to(folder).as_posix(): path for path in files}


@pytest.fixture(scope="session")
def tiny_sessions(tmp_path_factory):
    """Write the sessions of helpers.sets; return their folder."""
    return write_sessions(tmp_path_factory.mktemp("tiny") / "sessions")


@pytest.fixture(scope="session")
def tiny_set(tiny_sessions):
    """Build the shard set of tiny_sessions; read only."""
    return build_set(tiny_sessions, tiny_sessions.parent / "shards", set_recipe())


@pytest.fixture(scope="session")
def raw_set(tiny_sessions):
    """Build the shard set of tiny_sessions with lossless frames; read only."""
    recipe = set_recipe(video={"codec": "raw"})
    return build_set(tiny_sessions, tiny_sessions.parent / "raw", recipe)
