"""Exact sums of float32 values and of their squares, so that it is all one into which shards the
values are packed and in what order the sums of those are added.

A float32 is m * 2**e with an integer |m| < 2**24. Values of the same e are added as integers, those
of all e as one integer without bounds. A sum is written as C writes floats in base 16:
``0x2b3c4p-31`` is 0x2b3c4 * 2**-31.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

SCALE_BITS = 1074
"""Sums are counted in units of 2**-1074, the smallest float64: every sum, and every float, is a
whole number of them."""

_DIGITS = 24
"""Bits of a float32's significand."""


def exact_sums(values: NDArray[np.float32]) -> tuple[list[str], list[str]]:
    """Sums, and sums of squares, of each column of finite [N, D]; N below 2**29."""
    fractions, exponents = np.frexp(values.astype(np.float64))
    whole = np.ldexp(fractions, _DIGITS)
    squares = np.square(whole)
    upper = np.floor(np.ldexp(squares, -_DIGITS))
    lower = squares - np.ldexp(upper, _DIGITS)
    lowest = int(exponents.min(initial=0))
    sums, sums_of_squares = [], []
    for column in range(values.shape[1]):
        places = exponents[:, column] - lowest
        base = lowest - _DIGITS
        sums.append(_hex(_total(places, whole[:, column], step=1), base))
        # A square has 48 bits; bincount adds in float64, which holds 2**29 numbers of 24.
        high = _total(places, upper[:, column], step=2)
        low = _total(places, lower[:, column], step=2)
        sums_of_squares.append(_hex((high << _DIGITS) + low, 2 * base))
    return sums, sums_of_squares


def add_exactly(sums: Iterable[str | float]) -> int:
    """The sum of sums, in units of 2**-SCALE_BITS.

    Args:
        sums: as :func:`exact_sums` writes them; or floats, which early sets have.
    """
    return sum(map(_parse, sums))


def mean_of(total: int, count: int) -> float:
    """The mean, correctly rounded, of `count` values whose sum is `total`."""
    return total / (count << SCALE_BITS)


def std_of(total: int, total_of_squares: int, count: int) -> float:
    """The population's standard deviation: nothing cancels, however far from zero values lie."""
    deviations = (count * total_of_squares << SCALE_BITS) - total * total
    # Below zero only where early sets rounded their sums.
    return math.sqrt(max(0, deviations) / (count * count << 2 * SCALE_BITS))


def _total(places: NDArray[np.signedinteger], whole: NDArray[np.float64], *, step: int) -> int:
    """The sum of whole * 2**(step * places), for places from 0."""
    found: Sequence[float] = np.bincount(places, weights=whole).tolist()
    return sum(int(part) << step * place for place, part in enumerate(found))


def _hex(total: int, exponent: int) -> str:
    """The number total * 2**exponent, in lowest terms."""
    zeros = (total & -total).bit_length() - 1 if total else 0
    return f"{total >> zeros:#x}p{exponent + zeros if total else 0}"


def _parse(text: str | float) -> int:
    if isinstance(text, str):
        digits, _, exponent = text.partition("p")
        return int(digits, 16) << (int(exponent) + SCALE_BITS)
    numerator, denominator = float(text).as_integer_ratio()
    return numerator * ((1 << SCALE_BITS) // denominator)
