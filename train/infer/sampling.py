"""From logits to choices: the most likely value, or one drawn by temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shared.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How values are chosen.

    Raises:
        ConfigError: a number out of its range, or one that would do nothing.
    """

    temperature: float = 0.0
    """0 takes the most likely value; 1 draws by the model's probabilities, less is bolder towards
    the likely ones."""
    top_k: int | None = None
    """Draw among so many of the likeliest values only (Fan et al. 2018, arXiv:1805.04833)."""
    top_p: float | None = None
    """Draw among the fewest values that together have this probability only (Holtzman et al. 2020,
    arXiv:1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; give a number from 0 on")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; give a number from 1 on, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; give a share in (0, 1], or leave it out")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError(
                "top_k and top_p say among what to draw, and at temperature 0 nothing is drawn; "
                "set --temperature 1 (temperature=1.0), or leave them out"
            )


def choose(logits: Tensor, sampling: Sampling, *, generator: torch.Generator) -> Tensor:
    """Choose a value from each row of logits.

    Args:
        logits: [..., values], on any device.
        sampling: how.
        generator: on the CPU, so that every device draws alike; not touched at temperature 0.

    Returns:
        int64 [...], on the CPU.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).cpu()
    kept = allowed(logits.float().cpu() / sampling.temperature, sampling)
    probabilities = kept.flatten(0, -2).softmax(-1)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return chosen.view(logits.shape[:-1])


def allowed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits with -inf for what top-k and top-p leave out; the likeliest value always stays."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(-1)
        # A value goes when those before it have the whole share already.
        is_out = shares.cumsum(-1) - shares >= sampling.top_p
        logits = ordered.masked_fill(is_out, -torch.inf).gather(-1, places.argsort(-1))
    return logits
