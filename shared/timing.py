"""Measure how long each stage of some work takes; the stages add up to the whole time.

Code that can be measured takes an ``on_stage`` callback and calls it with a stage's name when that
stage ends. The default, :func:`no_timer`, does nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

OnStage = Callable[[str], object]
"""Callback that is called with the name of the stage that has just ended."""


def _difference(start: float, stop: float) -> float:
    return stop - start


def no_timer(_stage: str) -> None:
    """Measure nothing."""


class StageTimer:
    """Measure the seconds of each stage; they add up to the whole time.

    Args:
        now: returns a point in time, such as a clock's reading or an event of a GPU.
        seconds_between: returns the seconds between two points in time; called in :meth:`take`.
    """

    def __init__(
        self,
        now: Callable[[], Any] = time.perf_counter,
        seconds_between: Callable[[Any, Any], float] = _difference,
    ) -> None:
        self._now = now
        self._seconds_between = seconds_between
        self._marks: list[tuple[str, Any]] = []
        self.begin()

    def begin(self) -> None:
        """Discard all measurements and begin the first stage."""
        self._marks = [("", self._now())]

    def end_stage(self, stage: str) -> None:
        """Count the time since the last stage ended as this stage's; an :data:`OnStage`."""
        self._marks.append((stage, self._now()))

    def take(self) -> dict[str, float]:
        """Return the seconds of each stage since :meth:`begin`, in the order of their first end."""
        seconds: dict[str, float] = {}
        for (_, start), (stage, stop) in itertools.pairwise(self._marks):
            seconds[stage] = seconds.get(stage, 0.0) + self._seconds_between(start, stop)
        return seconds
