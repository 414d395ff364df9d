"""Senses as wholes: what a session lacks together, and batches in which one is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from shared.recipe import VISION_STREAMS, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MODALITIES: Final[Mapping[str, tuple[Stream, ...]]] = {
    "vision": VISION_STREAMS,
    **{str(stream): (stream,) for stream in Stream if stream not in VISION_STREAMS},
}
"""The streams of each; both eyes are one."""


def without(inputs: Mapping[str, Tensor], streams: Iterable[Stream]) -> dict[str, Tensor]:
    """A batch's inputs with streams masked, as in sessions that lack them.

    The tensors given stay as they are, and what lies under the masks says nothing to a model.
    """
    masks = [name for stream in streams if (name := f"{stream}_valid") in inputs]
    return {**inputs, **{name: torch.zeros_like(inputs[name]) for name in masks}}


def hide_at_random(inputs: Mapping[str, Tensor], *, share: float) -> dict[str, Tensor]:
    """A batch's inputs with each modality masked in some samples, at random and each by itself.

    Args:
        inputs: stay as they are.
        share: probability, in [0, 1).
    """
    hidden = dict(inputs)
    for streams in MODALITIES.values():
        masks = {name: inputs[name] for s in streams if (name := f"{s}_valid") in inputs}
        if masks:
            some = next(iter(masks.values()))
            is_kept = torch.rand(len(some), device=some.device) >= share
            hidden |= {name: mask & is_kept[:, None] for name, mask in masks.items()}
    return hidden
