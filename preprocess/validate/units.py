"""Timestamps that are no seconds: milliseconds, microseconds or nanoseconds.

Recorders write lines 5 to 500 times a second, so that the median step tells the unit; that it is no
mistake the media say, whose length the divided timestamps must have, or, where there are none, the
readings in the lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_STEP_S, MAX_STEP_S = 0.002, 0.2
"""Median distances of a recorder's lines; so far apart that no two units can be mixed up."""

MIN_LINES = 3
TOLERANCE_S = 1.0
"""Timestamps and media of one recording end no farther apart."""

MAX_TIME = 1e21
"""A larger timestamp is none in any unit."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of time that is not the second."""

    name: str
    per_s: float


UNITS = (Unit("milliseconds", 1e3), Unit("microseconds", 1e6), Unit("nanoseconds", 1e9))


def unit_of(times: NDArray[np.float64]) -> Unit | None:
    """The unit in which timestamps in order of the file seem to be; None for seconds, and where
    nothing can be told.
    """
    if len(times) < MIN_LINES:
        return None
    step = float(np.median(np.diff(times)))
    return next((u for u in UNITS if MIN_STEP_S <= step / u.per_s <= MAX_STEP_S), None)


def is_sure(times: NDArray[np.float64], unit: Unit, media_stop_s: float | None) -> bool:
    """Whether the timestamps last as long as the media when they are divided, and don't as they
    stand.
    """
    if media_stop_s is None:
        return False
    length = float(np.ptp(times))
    is_apart = abs(length - media_stop_s) > TOLERANCE_S
    return is_apart and abs(length / unit.per_s - media_stop_s) <= TOLERANCE_S


def text_scale(
    texts: NDArray[np.float64], times: NDArray[np.float64], unit: Unit, media_stop_s: float | None
) -> float | None:
    """What to divide the timestamps of ``text.jsonl`` by beside those of the lines: 1 where they
    are seconds already, as the lines' unit where only that fits, None where nothing does.
    """
    if not len(texts):
        return 1.0
    low, high = float(texts.min()), float(texts.max())
    if media_stop_s is not None and low >= -TOLERANCE_S and high <= media_stop_s + TOLERANCE_S:
        return 1.0
    first, last = float(times.min()) / unit.per_s, float(times.max()) / unit.per_s
    is_beside = first - TOLERANCE_S <= low / unit.per_s and high / unit.per_s <= last + TOLERANCE_S
    return unit.per_s if is_beside else None


def raw_time(values: dict[str, Any]) -> float | None:
    """The timestamp of a line, however large; None where it is no number."""
    value = values.get("timestamp")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_TIME:
        return None
    return float(value)
