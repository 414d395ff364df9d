"""Start child processes; record which files a process opens and reads."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def launch(arguments: Sequence[str | Path], *, scratch: Path) -> subprocess.Popen[str]:
    """Start a job in its own process group, with its temporary files in `scratch`."""
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
    """Wait for a job that must succeed; return its output."""
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    return output


def await_true(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    """Wait until a condition holds."""
    stop_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < stop_s, f"the condition did not hold within {timeout_s} s"
        time.sleep(0.005)


def open_files(start: str | Path | tuple[str, ...]) -> Counter[str]:
    """Count how often this process has each file, pipe or memory open.

    Args:
        start: a folder, or prefixes of names ("pipe:", "/memfd:").
    """
    starts = start if isinstance(start, tuple) else str(start)
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this listing
            names.append(os.readlink(fd))  # noqa: PTH115 (not all are paths)
    return Counter(name for name in names if name.startswith(starts))


@contextlib.contextmanager
def record_opened_files():
    """Record the name of every file that Python opens inside."""
    opened: set[str] = set()
    is_over = False

    def note(event, values):
        if event == "open" and not is_over and isinstance(values[0], str | os.PathLike):
            opened.add(os.fspath(values[0]))

    sys.addaudithook(note)  # it cannot be removed
    try:
        yield opened
    finally:
        is_over = True


class ReadBytes(Counter[str]):
    """Bytes that were read, by file name."""

    num_requests = 0


@contextlib.contextmanager
def count_read_bytes():
    """Count the bytes that pread and preadv read inside, and the calls."""
    read = ReadBytes()
    pread, preadv = os.pread, os.preadv

    def name_of(fd):
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    def count_pread(fd, length, offset):
        content = pread(fd, length, offset)
        read[name_of(fd)] += len(content)
        read.num_requests += 1
        return content

    def count_preadv(fd, buffers, offset):
        count = preadv(fd, buffers, offset)
        read[name_of(fd)] += count
        read.num_requests += 1
        return count

    os.pread, os.preadv = count_pread, count_preadv
    try:
        yield read
    finally:
        os.pread, os.preadv = pread, preadv


class SimulatedKillError(BaseException):
    """Raised where a test simulates a kill."""


def fail(*_: object, **__: object) -> None:
    """Take the place of a function at which a process is killed."""
    raise SimulatedKillError
