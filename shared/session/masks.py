"""Mask stretches of a stream whose recorded content is known to be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from shared.streams import MaskReason


@dataclass(frozen=True, slots=True)
class MaskedSpan:
    """A stretch [start_s, stop_s) of a stream, on the session clock, that no sample shows."""

    start_s: float
    stop_s: float
    reason: MaskReason
    message: str
    """What is wrong, in one clause without the times."""


def is_masked(times_s: NDArray[np.float64], spans: Sequence[MaskedSpan]) -> NDArray[np.bool_]:
    """Mark the times, of any shape, that are inside one of the spans."""
    masked = np.zeros(times_s.shape, dtype=np.bool_)
    for span in spans:
        masked |= (times_s >= span.start_s) & (times_s < span.stop_s)
    return masked


def masked_share(start_s: float, stop_s: float, spans: Sequence[MaskedSpan]) -> float:
    """Return the share of [start_s, stop_s) that the spans cover; they may overlap."""
    covered_s, reached_s = 0.0, start_s
    for span in sorted(spans, key=lambda span: span.start_s):
        begin_s, end_s = max(reached_s, span.start_s), min(stop_s, span.stop_s)
        if end_s > begin_s:
            covered_s += end_s - begin_s
            reached_s = end_s
    return covered_s / (stop_s - start_s) if stop_s > start_s else 0.0
