"""Tiny sessions and a shard set of them, to update, break off and damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.oracles import build, write_tiny_sessions


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """The sessions; read only."""
    return write_tiny_sessions(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def built(recorded, tmp_path_factory) -> Path:
    """Their shard set; read only."""
    out = tmp_path_factory.mktemp("built")
    build(recorded, out)
    return out


@pytest.fixture
def sessions(recorded, tmp_path) -> Path:
    """A copy that a test may change; file times stay, so that scans are not repeated."""
    return Path(shutil.copytree(recorded, tmp_path / "sessions"))


@pytest.fixture
def out(built, tmp_path) -> Path:
    """A finished set that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "out"))
