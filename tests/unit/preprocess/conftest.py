"""A session without a fault, to look at or to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.sessions import write_session


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session; read only."""
    return write_session(tmp_path_factory.mktemp("whole") / "session_001")


@pytest.fixture
def session(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "session_001"))
