"""Hash the content of streams to bits that hardly change when it is encoded again.

Features at fixed shares of a stream's length -> differences over time, which remove what recordings
of one place or task have in common -> signs of random projections. Of two streams with correlation
r, a share of arccos(r) / pi of the bits differs (Charikar 2002, "Similarity estimation techniques
from rounding algorithms"). Content with too little information has the hash "".
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from shared.files import DiskArray

SIGNATURE_VERSION = 1
CODE_BITS = 512
MAX_DISTANCE = 80
"""Of two streams with the same content, at most this number of bits differs (correlation 0.88)."""

_MIN_FREEDOM = 44.0
"""Least independent numbers n in the features. The correlation of unrelated ones has the density
(1 - r ** 2) ** ((n - 3) / 2): at most MAX_DISTANCE bits differ with a probability of 5e-13."""

NUM_PICTURES = 14
_NUM_LEVELS, _LEVEL_S, _NUM_READINGS = 64, 0.5, 32
_BANDS_HZ = (100, 200, 300, 450, 700, 1000, 1500, 2200, 3300)
"""Bands of sound that every sample rate and codec keeps."""

_MIN_GAP_BITS = 60.0
"""Least information in the gaps between texts; regular gaps have none."""


def hash_pictures(pictures: Sequence[NDArray[np.uint8]]) -> str:
    """Hash RGB pictures [H, W, 3] by neighboring pixels, as dHash does (Krawetz 2013)."""
    if len(pictures) < NUM_PICTURES:
        return ""
    luma = np.stack(pictures) @ np.array([0.299, 0.587, 0.114])
    edges = [np.diff(luma, axis=axis).reshape(len(luma), -1) for axis in (1, 2)]
    # Compression noise has an RMS of up to 1 of 255 levels.
    return _hash(np.concatenate(edges, axis=1), share=0.5, least_rms=3.0)


def hash_sound(samples: DiskArray[np.float32], rate_hz: int) -> str:
    """Hash the levels of a sound in some bands, in windows spread over its length."""
    if len(samples) < rate_hz:
        return ""
    width = 2 * int(min(len(samples) / _NUM_LEVELS, rate_hz * _LEVEL_S / 2))
    edges = np.searchsorted(np.fft.rfftfreq(width, 1 / rate_hz), _BANDS_HZ)
    energies = np.empty((_NUM_LEVELS, len(_BANDS_HZ) - 1))
    for row, start in enumerate(np.linspace(0, len(samples) - width, _NUM_LEVELS).astype(int)):
        spectrum = np.abs(np.fft.rfft(samples[start : start + width] * np.hanning(width))) ** 2
        energies[row] = np.diff(np.cumsum(np.append(0.0, spectrum))[edges])
    floor = np.maximum(energies.max(axis=0) / 1000, 1e-12)
    # Levels of steady noise have an RMS of up to 1 dB.
    return _hash(10 * np.log10(np.maximum(energies, floor)), share=0.7, least_rms=2.0)


def hash_readings(times_s: NDArray[np.float64], values: NDArray[np.float32]) -> str:
    """Hash the readings [N, D] of a sensor."""
    if len(times_s) < 2:
        return ""
    grid_s = np.linspace(times_s[0], times_s[-1], _NUM_READINGS)
    readings = np.stack([np.interp(grid_s, times_s, own) for own in values.T], axis=1)
    deviations = np.diff(readings, axis=0).std(axis=0)
    # What moves much less than other values counts less: it could be rounding.
    readings /= np.maximum(deviations, max(np.median(deviations) / 10, 1e-9))
    return _hash(readings, share=1.0, least_rms=1e-3)


def hash_texts(times_s: Sequence[float], texts: Sequence[str]) -> str:
    """Hash texts and the gaps between them; case, spaces and the rounding of times don't matter."""
    gaps = np.round(np.diff(times_s, prepend=times_s[:1]) * 4).astype(int).tolist()
    counts = np.array(list(Counter(gaps).values()))
    if -(counts * np.log2(counts / len(gaps))).sum() < _MIN_GAP_BITS:
        return ""
    words = [" ".join(text.casefold().split()) for text in texts]
    return _encode(sum(_signs(f"{gap} {w}", 1)[0] for gap, w in zip(gaps, words, strict=True)))


def _hash(features: NDArray[np.float64], *, share: float, least_rms: float) -> str:
    """Hash the differences of features [T, C] from a `share` of the row before, if they say enough.

    Independent columns and times are counted by the spectrum, (sum of powers) ** 2 / sum of powers
    ** 2 (Bretherton et al. 1999, "The effective number of spatial degrees of freedom ...").
    """
    centered = features - features.mean(axis=0)
    steps = centered[1:] - share * centered[:-1]
    steps -= steps.mean(axis=0)
    if not np.sqrt(np.mean(steps**2)) >= least_rms:
        return ""
    products, powers = steps @ steps.T, (np.abs(np.fft.fft(steps, axis=0)) ** 2).sum(axis=1)
    num_columns = np.trace(products) ** 2 / (products**2).sum()
    if num_columns * powers.sum() ** 2 / (powers**2).sum() < _MIN_FREEDOM:
        return ""
    return _encode(steps.ravel() @ _signs("projections", steps.size))


def _signs(seed: str, num_rows: int) -> NDArray[np.float32]:
    """Return random 1 and -1 [num_rows, CODE_BITS], the same on any machine."""
    digest = hashlib.shake_256(seed.encode(errors="replace")).digest(num_rows * CODE_BITS // 8)
    bits = np.unpackbits(np.frombuffer(digest, np.uint8)).reshape(num_rows, CODE_BITS)
    return bits.astype(np.float32) * 2 - 1


def _encode(sums: NDArray[np.float64]) -> str:
    return base64.b64encode(np.packbits(sums > 0).tobytes()).decode()
