"""JFIF's planes and colours in float64, by the formulas of ITU-T T.871, section 7."""

from __future__ import annotations

import numpy as np


def exact_planes(rgb: np.ndarray) -> np.ndarray:
    """Unrounded I420 planes float64 [F, 3H/2, W] of RGB [F, H, W, 3]."""
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    packed = []
    for chroma in ((blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128):
        count, height, width = chroma.shape
        quads = chroma.reshape(count, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
        packed.append(quads.reshape(count, height // 4, width))
    return np.concatenate([luma, *packed], axis=1)


def exact_rgb(planes: np.ndarray) -> np.ndarray:
    """Unrounded RGB float64 [F, H, W, 3] of I420 planes [F, 3H/2, W]; chroma lies in the middle of
    its four pixels and is interpolated linearly.
    """
    count, rows, width = planes.shape
    height = rows * 2 // 3
    luma = planes[:, :height].astype(np.float64)
    chroma = planes[:, height:].reshape(count, 2, height // 2, width // 2).astype(np.float64) - 128
    blue, red = np.moveaxis(_doubled(_doubled(chroma, 2), 3), 1, 0)
    colours = [
        luma + 1.402 * red,
        luma - (0.114 * 1.772 * blue + 0.299 * 1.402 * red) / 0.587,
        luma + 1.772 * blue,
    ]
    return np.stack(colours, axis=-1).clip(0, 255)


def _doubled(values: np.ndarray, axis: int) -> np.ndarray:
    """Twice as many values along an axis, at a quarter to each side of the old ones."""
    count = values.shape[axis]
    places = (np.arange(2 * count) - 0.5) / 2
    before = np.floor(places).astype(int)
    share = (places - before).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    low = np.take(values, before.clip(0, count - 1), axis)
    high = np.take(values, (before + 1).clip(0, count - 1), axis)
    return low + share * (high - low)
