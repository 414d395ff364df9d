"""A device that computes beside the host for as long as it is told: a clock and a queue."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class EmulatedDevice:
    """A :class:`train.loop.prefetch.DeviceQueue` without hardware.

    Args:
        copy_s: what the copies of one batch take, beside the work.
        now_s: the clock.
        sleep: lets it go on by so many seconds.
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
        """Work that takes so long, behind all that was launched before."""
        self._done_s = max(self.now_s(), self._done_s) + seconds

    def mark(self) -> EmulatedMark:
        """Behind all work that was launched."""
        return EmulatedMark(self, max(self.now_s(), self._done_s))

    def send(self, batch: dict[str, Any]) -> tuple[dict[str, Any], EmulatedMark]:
        """The batch itself; the mark is where copies would be done."""
        self._copied_s = max(self.now_s(), self._copied_s) + self._copy_s
        return batch, EmulatedMark(self, self._copied_s)

    def receive(self, batch: dict[str, Any]) -> None:
        """What is launched from now on waits for all copies."""
        self._done_s = max(self._done_s, self._copied_s)


class EmulatedMark:
    """A moment that the device reaches."""

    def __init__(self, device: EmulatedDevice, time_s: float) -> None:
        self._device, self._time_s = device, time_s

    def query(self) -> bool:
        """Whether it is past."""
        return self._device.now_s() >= self._time_s

    def synchronize(self) -> None:
        """Sleep until then."""
        if (left_s := self._time_s - self._device.now_s()) > 0:
            self._device.sleep(left_s)

    def elapsed_time(self, later: EmulatedMark, /) -> float:
        """Milliseconds from here to there."""
        return 1e3 * (later._time_s - self._time_s)
