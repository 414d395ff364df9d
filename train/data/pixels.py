"""Turn uint8 pixels into normalized frames, on the training device.

The loader hands out pixels in their smallest form, as RGB or as the planes of yuv420. The float
frames that the model takes are larger, so that they are made where they are used.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shared.media.yuv_numba import planes_to_floats, rows_to_floats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of R, G and B in [0, 1] (Deng et al. 2009, as torchvision gives it)."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of R, G and B in [0, 1]."""

CB_WEIGHTS = (0.0, -0.114 * 1.772 / 0.587, 1.772)
"""What Cb adds to R, G and B: ITU-R BT.601 over the full range, as in JFIF."""

CR_WEIGHTS = (1.402, -0.299 * 1.402 / 0.587, 0.0)
"""What Cr adds to R, G and B."""

_THREAD_BYTES = 1 << 22
"""Output bytes that are worth a thread: they take about a millisecond."""


def to_model_inputs(
    inputs: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Turn a batch's "inputs" into the model's, on the device they are on.

    Args:
        inputs: see docs/batch.md. Of videos, a position is a picture and not a row of values.
        dtype: of the frames that are returned.

    Returns:
        The same keys. Frames in either form become `dtype` [B, F, 3, H, W], normalized by
        ImageNet's mean and standard deviation, in the memory order of the pixels: RGB gives an NCHW
        view of NHWC memory, planes give NCHW memory. Other inputs are passed through.
    """
    frames = {
        name: normalized_frames(values, dtype)
        for name, values in inputs.items()
        if _is_video(values, inputs.get(f"{name}_valid"))
    }
    return {**inputs, **frames}


def _is_video(values: Tensor, valid: Tensor | None) -> bool:
    """Return whether values are pictures: RGB, or planes; windows that were not joined are not."""
    return values.ndim >= 4 and (valid is None or valid.ndim == 2)


def normalized_frames(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels as `dtype` [B, F, 3, H, W]: ((x / 255) - mean) / std of R, G and B.

    Args:
        pixels: RGB uint8 [B, F, H, W, 3], or planes uint8 [B, F, 3H/2, W] as
            :mod:`shared.media.yuv` packs them.
        dtype: floating point; values are computed in float32 and rounded once.
    """
    return _normalize_rgb(pixels, dtype) if pixels.ndim == 5 else _normalize_planes(pixels, dtype)


def _normalize_rgb(rgb: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalize RGB by one multiply-add over rows of 3W numbers."""
    scale, shift = (x.flatten().repeat(rgb.shape[3]) for x in _constants(rgb.device)[:2])
    rows = rgb.flatten(3)
    if _is_compiled(rgb):
        exact = torch.empty(rows.shape, dtype=torch.float32)
        _run_in_threads(
            partial(rows_to_floats, scale=scale.numpy(), shift=shift.numpy()),
            rows.flatten(0, 2),
            exact.flatten(0, 2),
        )
        out = exact.to(dtype)
    else:
        values = rows.float()
        out = values if dtype == values.dtype else torch.empty_like(values, dtype=dtype)
        torch.addcmul(shift, values, scale, out=out)
    return out.view_as(rgb).permute(0, 1, 4, 2, 3)


def _normalize_planes(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert planes to RGB and normalize them in one pass."""
    batch, num_frames, rows, width = planes.shape
    height = rows * 2 // 3
    flat = planes.flatten(0, 1)
    shape = (len(flat), 3, height, width)
    exact = torch.empty(shape, dtype=torch.float32, device=planes.device)
    if _is_compiled(planes):
        _run_in_threads(partial(planes_to_floats, weights=_weights()), flat, exact)
    else:
        _write_colors(flat, exact, _constants(planes.device))
    return exact.to(dtype).view(batch, num_frames, 3, height, width)


def _is_compiled(pixels: Tensor) -> bool:
    """Return whether a compiled loop can read them: tensors in the CPU's memory."""
    is_real = type(pixels) is Tensor  # torch's fake tensors have a shape only
    return is_real and pixels.device.type == "cpu" and pixels.is_contiguous()


def _run_in_threads(
    write: Callable[[NDArray[np.uint8], NDArray[np.float32]], None], pixels: Tensor, out: Tensor
) -> None:
    """Run a loop over rows of `pixels` and `out` in as many threads as torch would use."""
    source, target = pixels.numpy(), out.numpy()
    num_threads = min(torch.get_num_threads(), out.nbytes // _THREAD_BYTES)
    if num_threads <= 1:
        write(source, target)
        return
    chunks = [np.array_split(values, num_threads) for values in (source, target)]
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(write, *chunks))  # raises what a thread raised


def _write_colors(planes: Tensor, out: Tensor, constants: tuple[Tensor, ...]) -> None:
    """Write planes uint8 [N, 3H/2, W] as normalized colors, float32 [N, 3, H, W], on any device.

    What chroma and the mean add to each color is computed at a quarter of the pixels and upsampled.
    Then luma is added, and values outside the RGB gamut are clamped to it.
    """
    scale, _, cb_weights, cr_weights, offset = constants
    count, _, height, width = out.shape
    chroma = planes[:, height:].reshape(count, 2, height // 2, width // 2).float()
    added = torch.addcmul(offset, chroma[:, :1], cb_weights)
    torch.addcmul(added, chroma[:, 1:], cr_weights, out=added)
    _upsample(added, out)
    torch.addcmul(out, planes[:, None, :height].float(), scale, out=out)
    for number, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        out[:, number].clamp_(-mean / std, (1 - mean) / std)


def _upsample(values: Tensor, out: Tensor) -> None:
    """Write [N, C, h, w] as [N, C, 2h, 2w] by bilinear interpolation.

    Each old sample is at the center of four new ones.
    """
    count, channels, height, width = values.shape
    padded = functional.pad(values, (1, 1, 1, 1), mode="replicate")
    tall = values.new_empty(count, channels, height, 2, width + 2)
    torch.lerp(padded[:, :, 1:-1], padded[:, :, :-2], 0.25, out=tall[:, :, :, 0])
    torch.lerp(padded[:, :, 1:-1], padded[:, :, 2:], 0.25, out=tall[:, :, :, 1])
    wide = out.view(count, channels, height, 2, width, 2)
    torch.lerp(tall[..., 1:-1], tall[..., :-2], 0.25, out=wide[..., 0])
    torch.lerp(tall[..., 1:-1], tall[..., 2:], 0.25, out=wide[..., 1])


def _weights() -> NDArray[np.float32]:
    """Return the constants and gamut limits that the compiled loop over planes takes."""
    scale, shift, cb, cr, offset = (x.flatten() for x in _constants(torch.device("cpu")))
    columns = [scale, cb, cr, offset, shift, shift + 255 * scale]
    return np.ascontiguousarray(torch.stack(columns, dim=1).numpy())


def _constants(device: torch.device) -> tuple[Tensor, ...]:
    """Return constants per color, each [3, 1, 1].

    They are the scale and shift of its normalization, the scaled weights of Cb and Cr by JFIF
    (ITU-T T.871), and the value of a pixel with Y = Cb = Cr = 0.
    """
    mean, std, cb, cr = torch.tensor(
        [IMAGENET_MEAN, IMAGENET_STD, CB_WEIGHTS, CR_WEIGHTS], dtype=torch.float64
    )
    scale, shift = 1 / (255 * std), -mean / std
    cb, cr = cb * scale, cr * scale
    values = torch.stack([scale, shift, cb, cr, shift - 128 * (cb + cr)])
    return values.float().view(5, 3, 1, 1).to(device, non_blocking=True).unbind()
