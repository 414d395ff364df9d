"""Sound of a session: one loudness for all of it, and dMel tokens.

dMel (Bai et al. 2024, arXiv:2407.15835): log-mel energies in dB, each channel rounded to one of a
few levels. Training free, and decodable by Griffin-Lim. The mel filters and the STFT are librosa's.
Each analysis window ends where its frame ends, so that no frame hears what comes after it.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import librosa
import numpy as np
from librosa.filters import mel as mel_filters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shared.recipe import AudioRecipe, MelRecipe

SILENCE_RMS = 1e-3
"""Below this RMS (full scale 1) a session counts as silent and its level is left alone."""

_ENERGY_FLOOR = 1e-10
_GRIFFIN_LIM_ROUNDS = 32
_INVERSION_ROUNDS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Loudness:
    """Level of a session's sound, full scale 1, and the gain that normalizes it."""

    rms: float
    peak: float
    gain: float


def measure_loudness(waveform: NDArray[np.float32], *, recipe: AudioRecipe) -> Loudness:
    """RMS, peak and the gain to the recipe's level, lowered where the peak would pass the limit."""
    rms = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))) if len(waveform) else 0.0
    peak = float(np.abs(waveform).max(initial=0.0))
    gain = 1.0
    if recipe.loudness_dbfs is not None and rms > SILENCE_RMS:
        gain = 10 ** (recipe.loudness_dbfs / 20) / rms
    limit = 10 ** (recipe.peak_dbfs / 20)
    if recipe.loudness_dbfs is not None and peak * gain > limit:
        gain = limit / peak
    return Loudness(rms=rms, peak=peak, gain=gain)


def to_int16(waveform: NDArray[np.float32], *, gain: float) -> NDArray[np.int16]:
    """The waveform times the gain as 16-bit samples, as they are stored."""
    scaled = np.round(waveform.astype(np.float64) * (gain * 32768.0))
    return np.clip(scaled, -32768, 32767).astype(np.int16)


def encode_dmel(
    samples: NDArray[np.int16], start: int, count: int, *, rate_hz: int, recipe: MelRecipe
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """DMel tokens of `count` frames that begin at sample `start` of a session's sound.

    Args:
        samples: the whole session, int16 [N].
        start: first sample of the first frame.
        count: number of frames.
        rate_hz: sample rate.
        recipe: frame rate, channels, levels.

    Returns:
        Levels uint8 [count, channels] and, bool [count], whether the sound covers the whole frame.
        Frames it does not cover have level 0.
    """
    hop = rate_hz // recipe.rate_hz
    context = recipe.fft_size - hop
    padded = np.zeros(context + count * hop, dtype=np.float32)
    first, last = start - context, start + count * hop
    have = samples[max(0, first) : max(0, min(last, len(samples)))]
    offset = max(0, first) - first
    padded[offset : offset + len(have)] = have.astype(np.float32) / 32768.0
    spectrum = librosa.stft(
        padded, n_fft=recipe.fft_size, hop_length=hop, window="hann", center=False
    )
    bands = _mel_bands(rate_hz, recipe.fft_size, recipe.channels)
    energy = _mel_energy(np.square(np.abs(spectrum)), bands)
    level_db = 10.0 * np.log10(np.maximum(energy.T, _ENERGY_FLOOR))
    share = (level_db - recipe.floor_db) / (recipe.ceiling_db - recipe.floor_db)
    levels = np.clip(np.round(share * (recipe.levels - 1)), 0, recipe.levels - 1).astype(np.uint8)
    stops = start + hop * np.arange(1, count + 1)
    valid = (stops <= len(samples)) & (stops - hop >= 0)
    levels[~valid] = 0
    return levels, valid


def decode_dmel(
    levels: NDArray[np.uint8], *, rate_hz: int, recipe: MelRecipe, seed: int = 0
) -> NDArray[np.float32]:
    """Sound whose dMel tokens are about `levels` [frames, channels], by Griffin-Lim; float32 [N],
    full scale 1.
    """
    hop = rate_hz // recipe.rate_hz
    share = levels.astype(np.float32).T / (recipe.levels - 1)
    level_db = recipe.floor_db + share * (recipe.ceiling_db - recipe.floor_db)
    energy = np.power(np.float32(10.0), level_db / 10.0)
    power = _power_of_mel(energy, _mel_matrix(rate_hz, recipe.fft_size, recipe.channels))
    waveform = librosa.griffinlim(
        np.sqrt(power),
        n_iter=_GRIFFIN_LIM_ROUNDS,
        hop_length=hop,
        n_fft=recipe.fft_size,
        center=False,
        random_state=seed,
    )
    context = recipe.fft_size - hop
    waveform = waveform[context : context + len(levels) * hop]
    return np.asarray(np.clip(waveform, -1.0, 1.0), dtype=np.float32)


def _power_of_mel(energy: NDArray[np.float32], filters: NDArray[np.float32]) -> NDArray[np.float32]:
    """A power spectrum [bins, A] whose mel energies are about `energy` [channels, A], nowhere
    negative.

    Multiplicative updates (Lee & Seung 2001, "Algorithms for non-negative matrix factorization").
    On real recordings 50 rounds come 2 to 7 times closer, in levels, than librosa's mel_to_stft,
    and take 0.1 to 0.5 s per window where that takes up to 8 s.
    """
    wanted = filters.T @ energy
    gram = filters.T @ filters
    power: NDArray[np.float32] = np.maximum(wanted, np.float32(_ENERGY_FLOOR))
    for _ in range(_INVERSION_ROUNDS):
        power *= wanted / np.maximum(gram @ power, np.float32(1e-20))
    return power


def _mel_energy(
    power: NDArray[np.float32], bands: tuple[tuple[int, NDArray[np.float32]], ...]
) -> NDArray[np.float32]:
    """Energy per mel channel [channels, A] of a power spectrum [bins, A].

    Not by a matrix product: BLAS adds in another order with another number of threads, and 1 of 100
    results then differs in its last bit (measured), so that shards would depend on the machine.
    """
    energy = np.zeros((len(bands), power.shape[1]), dtype=np.float32)
    for row, (first, weights) in zip(energy, bands, strict=True):
        np.sum(weights[:, None] * power[first : first + len(weights)], axis=0, out=row)
    return energy


@functools.lru_cache(maxsize=8)
def _mel_matrix(rate_hz: int, fft_size: int, channels: int) -> NDArray[np.float32]:
    """Slaney mel filters [channels, bins]."""
    with warnings.catch_warnings():
        # Narrow channels of a short window hold no bin; they are silent, which is no news.
        warnings.simplefilter("ignore", UserWarning)
        filters: NDArray[np.float32] = mel_filters(sr=rate_hz, n_fft=fft_size, n_mels=channels)
    return filters


@functools.lru_cache(maxsize=8)
def _mel_bands(
    rate_hz: int, fft_size: int, channels: int
) -> tuple[tuple[int, NDArray[np.float32]], ...]:
    """Slaney mel filters: per channel its first bin and the weights from there on."""
    filters = _mel_matrix(rate_hz, fft_size, channels)
    bands = []
    for weights in filters:
        bins = np.flatnonzero(weights)
        first, stop = (int(bins[0]), int(bins[-1]) + 1) if len(bins) else (0, 0)
        bands.append((first, weights[first:stop]))
    return tuple(bands)
