"""Read the paths of curves in a page back into points."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def path_curves(path: str) -> list[NDArray[np.float64]]:
    """Return the points [N, 2] of each curve of an SVG path: a start, then steps."""
    curves = [re.split("[l ]|h0", curve) for curve in path.split("M") if curve]
    return [
        np.cumsum([[float(x) for x in pair.split(",")] for pair in pairs if pair], axis=0)
        for pairs in curves
    ]
