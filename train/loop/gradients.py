"""How large the gradient is in each part of the model: where training moves, and where nothing
arrives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.machine.parallel import whole_tensor

_PARTS = (
    ("encoder.encoders.", "encoder_{}"),
    ("encoder.frames.", "encoder_vision"),
    ("encoder.", "encoder_fusion"),
    ("blocks.", "backbone"),
    ("norm.", "backbone"),
    ("predictors.", "head_{}"),
)
"""Prefix of a parameter's name, and its part; {} is the next word of the name."""


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, such as encoder_audio or backbone."""
    for prefix, part in _PARTS:
        if name.startswith(prefix):
            return part.format(name.removeprefix(prefix).partition(".")[0])
    return name.partition(".")[0]


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of each part's gradient as the optimizer got it, clipped; waits for the device.

    All ranks call it.

    Args:
        model: after a backward pass; of its parameters those without a gradient are left out.

    Returns:
        ``grad_norm/<part>``; together, as a root of squares, the norm of the whole gradient.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(part_of(name), []).append(parameter.grad)
    if not parts:
        return {}
    norms = [whole_tensor(nn.utils.get_total_norm(grads)) for grads in parts.values()]
    values = torch.stack(norms).tolist()
    return {f"grad_norm/{part}": value for part, value in zip(parts, values, strict=True)}
