"""From the loader's batch to what the model takes: copies to the device, pixels to numbers.

The loader hands out the smallest form of everything (uint8 pixels, uint8 levels); what is larger
is made here, on the training device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared.recipe import Stream

if TYPE_CHECKING:
    from collections.abc import Mapping

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of R, G and B in [0, 1] (Deng et al. 2009, as torchvision gives it)."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of R, G and B in [0, 1]."""

VISION_STREAMS = (Stream.VISION_LEFT, Stream.VISION_RIGHT)
"""The eyes, in the order of their presence bits."""


def to_device(batch: Any, device: torch.device | str) -> Any:  # noqa: ANN401 (any nesting)
    """A batch with every tensor on `device`; from pinned memory without waiting for the copy.

    Args:
        batch: tensors in any nesting of dicts, lists and tuples; all else is left as it is.
        device: where to.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=batch.is_pinned())
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)([to_device(value, device) for value in batch])
    return batch


def to_model_inputs(
    inputs: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Turn a batch's "inputs" into the model's, on the device they are on.

    Args:
        inputs: as docs/architecture.md, "The batch".
        dtype: of the frames that come out.

    Returns:
        The same keys. Frames uint8 [B, F, H, W, 3] become `dtype` [B, F, 3, H, W], normalised by
        ImageNet's mean and deviation, an NCHW view of NHWC memory. All else is passed through.
    """
    frames = {
        str(eye): normalized_frames(inputs[eye], dtype) for eye in VISION_STREAMS if eye in inputs
    }
    return {**inputs, **frames}


def normalized_frames(rgb: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels uint8 [B, F, H, W, 3] as `dtype` [B, F, 3, H, W], ((x / 255) - mean) / std.

    One multiply-add that reads the bytes and writes the numbers: on a GPU a single kernel.
    """
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    shift, scale = torch.stack([-mean / std, 1 / (255 * std)]).to(rgb.device, non_blocking=True)
    pixels = rgb.permute(0, 1, 4, 2, 3)
    return torch.addcmul(shift, pixels, scale, out=torch.empty_like(pixels, dtype=dtype))
