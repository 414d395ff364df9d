"""What a model predicts, as plain values: one window's arrays, and tokens grouped into events."""

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
    """What was predicted in one window of a session, for N ticks that follow each other."""

    first_tick: int
    """The first tick that was predicted, counted from the session's start."""
    follows: bool
    """Whether it follows the last tick of the window before, so that a text may go on."""
    times_s: NDArray[np.float64]
    """When each predicted tick begins, [N], on the session clock."""
    tokens: Mapping[Head, NDArray[np.int64]]
    """Per text head, [N]."""
    levels: NDArray[np.uint8] | None
    """dMel levels [N, frames per tick, channels], where the model has an audio head."""
    poses: NDArray[np.float32] | None
    """Angles in rad and velocities in rad/s, [N, samples per tick, proprio_size]."""


def group_events(
    tokens: Sequence[int], times_s: Sequence[float], tokenizer: TextTokenizer
) -> list[dict[str, Any]]:
    """Predicted tokens, one per tick, as events.

    An event is a run of tokens without PAD; the event mark begins a new one.

    Args:
        tokens: ids of ticks that follow each other.
        times_s: when each tick begins.
        tokenizer: decodes them.

    Returns:
        {"timestamp": seconds, "text", "tokens": ids, with the event mark where there is one}.
    """
    events: list[dict[str, Any]] = []
    before = PAD_TOKEN
    for token, time_s in zip(tokens, times_s, strict=True):
        if token == EVENT_TOKEN or (token != PAD_TOKEN and before == PAD_TOKEN):
            events.append({"timestamp": round(time_s, 6), "text": "", "tokens": [token]})
        elif token != PAD_TOKEN:
            events[-1]["tokens"].append(token)
        before = token
    for event in events:
        event["text"] = tokenizer.decode(event["tokens"])
    return events
