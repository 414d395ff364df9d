"""Tiny shard sets, built once."""

from __future__ import annotations

import pytest
from tiny_sets import build_set, set_recipe, write_sessions


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
