"""Stand-ins: an emulated device, a store in memory."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from shared.storage import RetryPolicy
from train.data.cache import CachedFile, ShardCache

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class EmulatedDevice:
    """A :class:`train.loop.prefetch.DeviceQueue` without hardware.

    Args:
        copy_s: duration of the copies of one batch, in parallel with the work.
        now_s: reads the clock.
        sleep: advances the clock by a number of seconds.
    """

    def __init__(
        self,
        *,
        copy_s: float = 0.0,
        now_s: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.now_s, self.sleep = now_s, sleep
        self._copy_s = copy_s
        self._done_s = self._copied_s = 0.0

    def launch(self, seconds: float) -> None:
        """Launch work of a duration, behind all work launched before."""
        self._done_s = max(self.now_s(), self._done_s) + seconds

    def mark(self) -> EmulatedMark:
        """Return a mark behind all work launched so far."""
        return EmulatedMark(self, max(self.now_s(), self._done_s))

    def send(self, batch: dict[str, Any]) -> tuple[dict[str, Any], EmulatedMark]:
        """Return the batch itself, and a mark at the time when copies would be done."""
        self._copied_s = max(self.now_s(), self._copied_s) + self._copy_s
        return batch, EmulatedMark(self, self._copied_s)

    def receive(self, batch: dict[str, Any]) -> None:
        """Make work that is launched from now on wait for all copies."""
        self._done_s = max(self._done_s, self._copied_s)


class EmulatedMark:
    """A time that the device reaches."""

    def __init__(self, device: EmulatedDevice, time_s: float) -> None:
        self._device, self._time_s = device, time_s

    def query(self) -> bool:
        """Return whether the time is past."""
        return self._device.now_s() >= self._time_s

    def synchronize(self) -> None:
        """Sleep until the time."""
        if (left_s := self._time_s - self._device.now_s()) > 0:
            self._device.sleep(left_s)

    def elapsed_time(self, later: EmulatedMark, /) -> float:
        """Return the milliseconds from this mark to a later one."""
        return 1e3 * (later._time_s - self._time_s)


QUICK = RetryPolicy(attempts=4, first_wait_s=0.01, longest_wait_s=0.02)
SIZE = 1000


class MemoryStore:
    """A store in memory whose responses can be changed.

    Requests are logged to a file, so that those of other processes count.
    """

    def __init__(self, log: Path) -> None:
        self.contents = {f"f{i}": random.Random(i).randbytes(SIZE) for i in range(20)}
        self.log = log
        self.on_fetch = lambda name, content, path: path.write_bytes(content)

    def __str__(self) -> str:
        return "memory://here"

    def file(self, name: str) -> CachedFile:
        content = self.contents[name]
        return CachedFile(name, hashlib.sha256(content).hexdigest(), len(content))

    def download(self, name: str, path: Path) -> None:
        with self.log.open("a") as file:
            file.write(f"{name}\n")
        if name not in self.contents:
            raise FileNotFoundError(name)
        self.on_fetch(name, self.contents[name], path)

    def gets(self) -> Counter[str]:
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()


def make_cache(store, folder, *, num_files=10, retry=QUICK):
    return ShardCache(store, folder, limit_bytes=num_files * SIZE, retry=retry)


def read(cache, file, **options):
    with os.fdopen(cache.open(file, **options), "rb") as opened:
        return opened.read()


def names_in(folder):
    """Return the names of cached files; names of temporary files begin with a dot."""
    names = {p.name for p in folder.iterdir()} - {".room"}
    return {n if n.startswith(".") else n.partition(".")[2] for n in names}


def sum_in(folder):
    """Return the bytes that the cache counts as used or reserved."""
    return int((folder / ".room").read_text())


def run_in_fork(work):
    """Run a function in a forked process; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def exit_code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
