"""Behavior that both command lines share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("columns", "width"), [(None, 120), ("60", 60)])
def test_a_table_in_a_pipe_has_room_unless_the_user_says_how_much(columns, width):
    script = (
        "from shared.cli import widen_pipes; from rich.console import Console; "
        "widen_pipes(); print(Console().width)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    if columns is not None:
        environment["COLUMNS"] = columns
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == width
