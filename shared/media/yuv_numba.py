"""Convert YUV planes to RGB and pixels to floats on the CPU, in loops that numba compiles.

Planes and colors are those of :mod:`shared.media.yuv`: JFIF's (ITU-T T.871), with chroma
interpolated linearly. A row of pixels goes through the core's nearest cache once, so that a frame
of 224 x 224 takes 0.07 ms; swscale's exact conversion takes 0.31 ms, torch's operators 0.45 ms.

All arrays must be C-contiguous; numba refuses others.

Numba keeps the compiled code in ``__pycache__`` or in the user's cache. The very first call takes a
few seconds.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_BITS = 20
"""Fractional bits of the integers that hold colors; with 9 bits of value they fit 32 bits."""

_CHROMA_WEIGHTS = np.array([[0, 91881], [-22554, -46802], [116130, 0]], dtype=np.int32)
"""Weights of Cb and Cr in R, G and B, in 1/65536: JFIF's 1.772 and 1.402, and those for green that
follow from them. A chroma value is the weighted sum of four, with weights that add up to 16."""

_QUARTER, _THREE_QUARTERS = np.float32(0.25), np.float32(0.75)


def planes_to_rgb(planes: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Convert planes uint8 [F, 3H/2, W] to RGB uint8 [F, H, W, 3], rounded to nearest.

    Integer arithmetic gives the same bytes on every machine.
    """
    _compiled(_planes_to_rgb, ("u1 3 r", "u1 4 w"))(planes, out)


def planes_to_floats(
    planes: NDArray[np.uint8], out: NDArray[np.float32], *, weights: NDArray[np.float32]
) -> None:
    """Convert planes uint8 [F, 3H/2, W] to colors float32 [F, 3, H, W].

    Args:
        planes: contiguous.
        out: contiguous.
        weights: float32 [3, 6]; per color the factors of Y, Cb and Cr, the constant that is added,
            and the lowest and the highest value.
    """
    _compiled(_planes_to_floats, ("u1 3 r", "f4 4 w", "f4 2 r"))(planes, out, weights)


def rows_to_floats(
    rows: NDArray[np.uint8],
    out: NDArray[np.float32],
    *,
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
) -> None:
    """Convert rows uint8 [N, M] to float32 [N, M], times `scale` [M] plus `shift` [M]."""
    _compiled(_rows_to_floats, ("u1 2 r", "f4 2 w", "f4 1 r", "f4 1 r"))(rows, out, scale, shift)


@cache
def _compiled(function: Callable[..., None], arguments: tuple[str, ...]) -> Callable[..., None]:
    """Compile a loop for its arguments; numba is imported when the first pixel needs it.

    Args:
        function: the loop.
        arguments: dtype, number of dimensions and access of each array; arrays with access "r" may
            be read-only.
    """
    import numba

    types = [
        numba.types.Array(numba.from_dtype(np.dtype(dtype)), int(ndim), "C", readonly=access == "r")
        for dtype, ndim, access in (argument.split() for argument in arguments)
    ]
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        compiled: Callable[..., None] = numba.njit([tuple(types)], cache=True, **options)(function)
    except RuntimeError:  # no writable folder for the cache
        compiled = numba.njit([tuple(types)], **options)(function)
    return compiled


def _planes_to_rgb(planes: Any, out: Any) -> None:  # noqa: ANN401
    half, one, top = np.int32(1 << (_BITS - 1)), np.int32(_BITS), np.int32(255)
    count, num_rows, width = planes.shape
    height, middle = num_rows * 2 // 3, width // 2
    tall = np.empty((2, middle), np.int32)
    wide = np.empty((2, width), np.int32)
    colors = np.empty((3, width), np.uint8)
    for number in range(count):
        chroma = planes[number, height:].reshape(2, height // 2, middle)
        for y in range(height):
            near = y >> 1
            far = min(max(near - 1 + 2 * (y & 1), 0), height // 2 - 1)
            for c in range(2):
                for x in range(middle):
                    both = 3 * np.int32(chroma[c, near, x]) + np.int32(chroma[c, far, x])
                    tall[c, x] = both - 512  # 4 * 128: chroma without its offset
                wide[c, 0], wide[c, width - 1] = 4 * tall[c, 0], 4 * tall[c, middle - 1]
                for x in range(middle - 1):
                    wide[c, 2 * x + 1] = 3 * tall[c, x] + tall[c, x + 1]
                    wide[c, 2 * x + 2] = tall[c, x] + 3 * tall[c, x + 1]
            for k in range(3):
                blue_weight, red_weight = _CHROMA_WEIGHTS[k, 0], _CHROMA_WEIGHTS[k, 1]
                for x in range(width):
                    luma = (np.int32(planes[number, y, x]) << one) + half
                    value = (luma + blue_weight * wide[0, x] + red_weight * wide[1, x]) >> one
                    colors[k, x] = min(max(value, np.int32(0)), top)
            for x in range(width):
                out[number, y, x, 0] = colors[0, x]
                out[number, y, x, 1] = colors[1, x]
                out[number, y, x, 2] = colors[2, x]


def _planes_to_floats(planes: Any, out: Any, weights: Any) -> None:  # noqa: ANN401
    count, num_rows, width = planes.shape
    height, middle = num_rows * 2 // 3, width // 2
    tall = np.empty((2, middle), np.float32)
    added = np.empty(middle, np.float32)
    wide = np.empty(width, np.float32)
    for number in range(count):
        chroma = planes[number, height:].reshape(2, height // 2, middle)
        for y in range(height):
            near = y >> 1
            far = min(max(near - 1 + 2 * (y & 1), 0), height // 2 - 1)
            for c in range(2):
                for x in range(middle):
                    tall[c, x] = _THREE_QUARTERS * chroma[c, near, x] + _QUARTER * chroma[c, far, x]
            for k in range(3):
                luma_weight, blue_weight, red_weight = weights[k, 0], weights[k, 1], weights[k, 2]
                offset, lowest, highest = weights[k, 3], weights[k, 4], weights[k, 5]
                for x in range(middle):
                    added[x] = blue_weight * tall[0, x] + red_weight * tall[1, x] + offset
                wide[0], wide[width - 1] = added[0], added[middle - 1]
                for x in range(middle - 1):
                    wide[2 * x + 1] = _THREE_QUARTERS * added[x] + _QUARTER * added[x + 1]
                    wide[2 * x + 2] = _QUARTER * added[x] + _THREE_QUARTERS * added[x + 1]
                for x in range(width):
                    value = luma_weight * planes[number, y, x] + wide[x]
                    out[number, k, y, x] = min(max(value, lowest), highest)


def _rows_to_floats(rows: Any, out: Any, scale: Any, shift: Any) -> None:  # noqa: ANN401
    count, length = rows.shape
    for number in range(count):
        for i in range(length):
            out[number, i] = rows[number, i] * scale[i] + shift[i]
