"""Commands in process groups of their own, to be killed or awaited."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def launch(arguments: Sequence[str | Path], *, scratch: Path) -> subprocess.Popen[str]:
    """A job in a process group of its own; its temporary files lie in `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str]) -> str:
    """Waits for a job that must end well; what it printed."""
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    return output


def await_true(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    """Waits until a condition holds."""
    stop_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < stop_s, "waited in vain"
        time.sleep(0.005)
