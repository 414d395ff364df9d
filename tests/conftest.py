"""Fixtures that many tests share: real recordings where they are, tiny shard sets built once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.sets import build_set, set_recipe, write_sessions
from hypothesis import settings

settings.register_profile("project", deadline=None)  # machines are shared: time says nothing
settings.load_profile("project")

RECORDINGS = Path(__file__).resolve().parents[2] / "shared"


def _recordings(name: str) -> Path:
    """A folder of recordings; without it a skip, or a failure where REQUIRE_SESSIONS=1."""
    folder = RECORDINGS / name
    if not folder.is_dir():
        reason = f"no real recordings: {folder} is missing"
        if os.environ.get("REQUIRE_SESSIONS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def real_sessions() -> list[Path]:
    """Folders of real recorded sessions; read only."""
    return sorted(path for path in _recordings("sessions").iterdir() if path.is_dir())


@pytest.fixture(scope="session")
def nasty_files() -> dict[str, Path]:
    """Real or published files with a flaw, by their path such as ``audio/zero_bytes.wav``."""
    folder = _recordings("nasty")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return {path.relative_to(folder).as_posix(): path for path in files}


@pytest.fixture(scope="session")
def tiny_sessions(tmp_path_factory):
    """Folder of the sessions of tiny_sets."""
    return write_sessions(tmp_path_factory.mktemp("tiny") / "sessions")


@pytest.fixture(scope="session")
def tiny_set(tiny_sessions):
    """Their shard set; read only."""
    return build_set(tiny_sessions, tiny_sessions.parent / "shards", set_recipe())


@pytest.fixture(scope="session")
def raw_set(tiny_sessions):
    """Their shard set with vision kept to the bit; read only."""
    recipe = set_recipe(vision={"codec": "raw"})
    return build_set(tiny_sessions, tiny_sessions.parent / "raw", recipe)
