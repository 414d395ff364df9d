"""Where time goes: laps between marks, which add up to the whole.

Code that may be measured takes a ``OnStage`` and calls it with a stage's name when the stage is
over;
by default it is :func:`no_timer`, which does nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

OnStage = Callable[[str], object]
"""Told that a stage, by its name, is over."""


def _difference(start: float, stop: float) -> float:
    return stop - start


def no_timer(_stage: str) -> None:
    """Nothing is measured."""


class StageTimer:
    """Seconds since the last mark, by stage; the sum of all stages is the whole time.

    Args:
        now: a moment, such as a clock's reading or an event of a GPU.
        seconds_between: of two moments; asked in :meth:`take`.
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
        """Forget what was measured; the first stage begins."""
        self._marks = [("", self._now())]

    def end_stage(self, stage: str) -> None:
        """The time since the last mark was this stage's."""
        self._marks.append((stage, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds of each stage since :meth:`begin`, in the order of their first end."""
        seconds: dict[str, float] = {}
        for (_, start), (stage, stop) in itertools.pairwise(self._marks):
            seconds[stage] = seconds.get(stage, 0.0) + self._seconds_between(start, stop)
        return seconds
