"""Predictions of a model as plain values: the arrays of a window, and events of tokens.

Letters: N ticks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.media.tokenizer import EVENT_TOKEN
from shared.recipe import PAD_TOKEN
from train.config import Head

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from shared.media.tokenizer import TextTokenizer

TEXT_HEADS = (Head.INTERNAL_TEXT, Head.EXTERNAL_TEXT)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPrediction:
    """Predictions for N successive ticks of a session."""

    first_tick: int
    """First predicted tick, counted from the session's start."""
    follows: bool
    """Whether it follows the last tick of the previous window, so that a text can continue."""
    times_s: NDArray[np.float64]
    """Start of each predicted tick on the session clock, [N]."""
    tokens: Mapping[Head, NDArray[np.int64]]
    """Per text head, [N]."""
    levels: NDArray[np.uint8] | None
    """dMel levels [N, frames per tick, channels]; None without an audio head."""
    poses: NDArray[np.float32] | None
    """Angles in rad and velocities in rad/s, [N, samples per tick, proprio_size]; None without an
    animation head."""


def group_events(
    tokens: Sequence[int], times_s: Sequence[float], tokenizer: TextTokenizer
) -> list[dict[str, Any]]:
    """Group predicted tokens, one per tick, into events.

    An event is a run of tokens without PAD; the event mark starts a new one.

    Args:
        tokens: ids of successive ticks.
        times_s: start of each tick.
        tokenizer: decodes the tokens.

    Returns:
        One {"timestamp": seconds, "text", "tokens"} per event; its ids include the event mark.
    """
    events: list[dict[str, Any]] = []
    previous = PAD_TOKEN
    for token, time_s in zip(tokens, times_s, strict=True):
        if token == EVENT_TOKEN or (token != PAD_TOKEN and previous == PAD_TOKEN):
            events.append({"timestamp": round(time_s, 6), "text": "", "tokens": [token]})
        elif token != PAD_TOKEN:
            events[-1]["tokens"].append(token)
        previous = token
    for event in events:
        event["text"] = tokenizer.decode(event["tokens"])
    return events
