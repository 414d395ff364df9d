"""Ranks started from here: what torchrun does, without restarts, for checks of our own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

END_TIMEOUT_S: Final = 60.0
"""When one rank is killed, the others must have ended after so long."""

POLL_S: Final = 0.005


class RankProcesses:
    """The same program as each of some ranks, without torchrun to look after them.

    A context manager: none is left behind. Each is the first of a process group of its own, and
    what it says goes to ``output_<rank>.txt``.

    Args:
        command: the program.
        world_size: how many.
        out: an existing folder for what they say.
    """

    def __init__(self, command: Sequence[str], world_size: int, out: Path) -> None:
        self._out = out
        port = free_port()
        self._processes = []
        for rank in range(world_size):
            with (out / f"output_{rank}.txt").open("wb") as output:
                self._processes.append(
                    subprocess.Popen(  # noqa: S603 (our own program)
                        command,
                        env={**os.environ, **rank_environment(rank, world_size, port)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_until(self, is_so: Callable[[], bool]) -> str | None:
        """Until something is so; a message where a rank ended before."""
        while not is_so():
            if any(process.poll() is not None for process in self._processes):
                return f"it ended by itself: {self._last_words()}"
            time.sleep(POLL_S)
        return None

    def wait_for_success(self) -> str | None:
        """Until all have ended; a message where one did not end well."""
        codes = [process.wait() for process in self._processes]
        return None if not any(codes) else f"exit codes {codes}: {self._last_words()}"

    def kill(self, *, only_one: bool) -> str | None:
        """Kill all, or the last rank; a message where the others do not end then."""
        if not only_one:
            self.__exit__()
            return None
        os.killpg(self._processes[-1].pid, signal.SIGKILL)
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if all(process.poll() is not None for process in self._processes):
                return None
            time.sleep(POLL_S)
        return f"{END_TIMEOUT_S:.0f} s after a rank was killed the others still run"

    def _last_words(self) -> str:
        outputs = [path.read_text(errors="replace") for path in self._out.glob("output_*.txt")]
        return " | ".join(text.strip()[-400:] for text in outputs if text.strip())


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
