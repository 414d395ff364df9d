"""Choose how the channels of a sound become one.

The mean of the channels loses what two of them hold with opposite signs, and keeps their noise.
While a sound is decoded, :class:`MixChooser` compares its channels in stretches of a second.
Hum and offsets, which can be equal in channels that are inverted, are filtered out before. At the
end it inverts channels, or leaves out those that cancel in a part of the sound only. The mean stays
as it is unless the evidence is strong: stereo that is wide, delayed or has a silent channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from shared.streams import ChannelChoice

MixReason = Literal["mean", "chosen", "inverted", "unstable", "lost"]

_DESCRIPTIONS: Mapping[MixReason, str] = {
    "chosen": "of {count} channels (from 0) only {kept} is read, as the recipe asks",
    "inverted": "of {count} channels (from 0) {inverted} is inverted (correlation "
    "{correlation:.2f}) and is turned back, so that the mix keeps the sound",
    "unstable": "two channels cancel in {cancelled_s:g} s, but not everywhere (correlation "
    "{correlation:.2f}): of {count} channels (from 0) only {kept} is read",
    "lost": "the mean of {count} channels (from 0) is silent: only {kept} is read",
}

SILENCE_RMS = 1e-3
"""Below this RMS (full scale 1) a session counts as silent, and its level is not changed."""

MAX_OFFSET = 0.05
"""A larger mean (full scale 1) is removed; recorders have under 0.02."""

MIN_OFFSET, MAX_OFFSET_SHARE = 0.005, 0.1
"""A mean above MIN_OFFSET is removed too if it has more than this share of the energy."""

_MIN_OFFSET_S = 0.5
"""The mean of a shorter sound is not its offset."""

MIN_INVERTED = 0.7
"""Channels whose correlation is below minus this are inverted against each other. Wide stereo
stays above -0.5, one microphone 0.1 to 40 ms after another above -0.4."""

_MIN_OPPOSED = 0.9
"""Stretches with a correlation below minus this cancel: 13 dB are lost."""

_MIN_RUN_S = 2.0
"""Channels that cancel, or agree, for less time without the other are wide stereo."""

_OTHER_SIGN, _OTHER_COST = 0.3, 2.0
"""A correlation beyond this of the other sign takes twice its time from such a run."""

_MIN_LEVEL = 0.25
"""A channel with a smaller share of the other's amplitude can't cancel it."""

_MIN_QUIET_RATIO = 1.9
"""If the mean is silent and one channel this much louder, the mean has lost it."""

_COMPARED_HZ = 8_000
"""Frames per second that are compared, about."""

_STRETCH_S = 1.0
_HIGH_PASS_S = 1 / 2500
"""A sample minus the one so long before: 18 dB less at 50 Hz."""

_FLOOR_RMS = SILENCE_RMS / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How channels become one: sum(weights * channels) / sum(abs(weights)) - offset."""

    weights: tuple[int, ...] = ()
    """1, -1 or 0 of each channel; empty for the mean of all."""
    offset: float = 0.0
    """Mean of the mixed sound, full scale 1."""
    reason: MixReason = "mean"
    correlation: float = 0.0
    """Lowest correlation of two channels that cancel."""
    cancelled_s: float = 0.0
    """Seconds of loud sound in which they cancel almost wholly in the mean."""

    def apply(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mix a block [n, channels] to [n]."""
        used = [(block[:, index], weight) for index, weight in enumerate(self.weights) if weight]
        if used:
            mono = np.zeros(len(block), dtype=np.float32)
            for channel, weight in used:
                mono += channel if weight > 0 else -channel
            mono /= np.float32(len(used))
        else:
            mono = _mean_of_channels(block)
        if self.offset:
            mono -= np.float32(self.offset)
        return mono

    def describe(self) -> Iterator[str]:
        """Say what differs from the mean of all channels, in clauses."""
        if self.reason != "mean":
            yield _DESCRIPTIONS[self.reason].format(
                inverted=_name([i for i, weight in enumerate(self.weights) if weight < 0]),
                kept=_name([i for i, weight in enumerate(self.weights) if weight]),
                count=len(self.weights),
                correlation=self.correlation,
                cancelled_s=self.cancelled_s,
            )
        if self.offset:
            yield f"the samples have an offset of {self.offset:.3f}, which is subtracted"


MEAN = Mix()
"""The mean of all channels."""


def _name(channels: list[int]) -> str:
    return ("channel " if len(channels) == 1 else "channels ") + ", ".join(map(str, channels))


class MixChooser:
    """Compares the channels of a sound, block by block, and chooses a mix."""

    def __init__(self, choice: ChannelChoice, *, num_channels: int, rate_hz: int) -> None:
        self._choice, self._channels = choice, num_channels
        self._lag = max(1, round(_HIGH_PASS_S * rate_hz))
        self._rate_hz, self._step = rate_hz, max(1, rate_hz // _COMPARED_HZ)
        self._stretch = max(1, round(_STRETCH_S * rate_hz / self._step))
        shape = num_channels, num_channels
        self._num_frames = 0
        self._sums = np.zeros(num_channels)
        self._products = np.zeros(shape)
        """Sums of products of two channels, as recorded."""
        self._filtered = np.zeros(shape)
        """The same without hum and offsets."""
        self._opposed_s = np.zeros(shape)
        """Seconds in which two channels are loud and cancel."""
        self._run_s, self._longest_s = np.zeros((2, *shape)), np.zeros((2, *shape))
        """Seconds for which they have cancelled, and have agreed; the most so far. Stretches in
        which they are not correlated don't end a run."""

    def add(self, block: NDArray[np.float32]) -> None:
        """Compare the channels of the next block [n, channels]."""
        self._num_frames += len(block)
        self._sums += [channel.sum() for channel in block.T]
        self._products += _products(block[:: self._step]) * self._step
        if self._channels == 1 or self._choice != "auto" or len(block) <= self._lag:
            return
        high = block[self._lag :: self._step] - block[: -self._lag : self._step]
        for start in range(0, len(high), self._stretch):
            self._add_stretch(high[start : start + self._stretch])

    def _add_stretch(self, high: NDArray[np.float32]) -> None:
        """Compare the channels of a stretch [n, channels] without hum."""
        products, duration_s = _products(high), len(high) * self._step / self._rate_hz
        correlations = _correlations(products, len(high))
        self._filtered += products * self._step
        self._opposed_s += duration_s * (correlations <= -_MIN_OPPOSED)
        both = np.stack([-correlations, correlations])
        gains = 1.0 * (both >= _MIN_OPPOSED) - _OTHER_COST * (both < -_OTHER_SIGN)
        self._run_s = np.maximum(0.0, self._run_s + duration_s * gains)
        self._longest_s = np.maximum(self._longest_s, self._run_s)

    def choose(self, *, silent_frames: int = 0) -> Mix:
        """Choose the mix of the sound so far; `silent_frames` of it are exactly zero."""
        mix = MEAN
        if isinstance(self._choice, int):
            mix = Mix(weights=_only(self._choice, self._channels), reason="chosen")
        elif self._choice == "auto" and self._channels > 1:
            mix = self._align() or self._find_lost() or mix
        num_frames = max(1, self._num_frames - silent_frames)
        shares = _shares(mix.weights, self._channels)
        mean = shares @ self._sums / num_frames
        power = shares @ self._products @ shares / num_frames
        is_offset = num_frames >= _MIN_OFFSET_S * self._rate_hz and (
            abs(mean) > MAX_OFFSET
            or (abs(mean) > MIN_OFFSET and mean**2 > MAX_OFFSET_SHARE * power)
        )
        # Rounded, so that it is the same on every machine.
        return replace(mix, offset=round(float(mean), 5) if is_offset else 0.0)

    def _align(self) -> Mix | None:
        """Invert or leave out channels; None if nothing cancels."""
        correlations = _correlations(self._filtered, self._num_frames)
        is_inverted, is_aligned = correlations < -MIN_INVERTED, correlations > MIN_INVERTED
        # Turned back, or as they are, such channels would cancel in a part.
        cancel, agree = self._longest_s >= _MIN_RUN_S
        is_unstable = np.where(is_inverted, agree, cancel)
        np.fill_diagonal(is_aligned, False)
        kept = _drop_unstable(is_unstable, np.diagonal(self._filtered))
        signs = _signs(is_aligned.astype(int) - is_inverted, kept)
        if all(sign == 1 for sign in signs):
            return None
        is_found = is_inverted | is_unstable
        at = np.unravel_index(np.argmin(np.where(is_found, correlations, np.inf)), is_found.shape)
        return Mix(
            weights=signs,
            reason="inverted" if len(kept) == len(signs) else "unstable",
            correlation=round(float(correlations[at]), 3),
            cancelled_s=round(float(np.where(is_found, self._opposed_s, 0.0).max()), 1),
        )

    def _find_lost(self) -> Mix | None:
        """Take the loudest channel if the mean of all is silent and has lost it."""
        num_frames = max(1, self._num_frames)
        means = self._sums / num_frames
        powers = self._products / num_frames - np.outer(means, means)
        levels = np.sqrt(np.maximum(0, np.diagonal(powers)))
        mean_rms = math.sqrt(max(0.0, float(powers.mean())))
        loudest = int(np.argmax(levels))
        is_lost = levels[loudest] > max(SILENCE_RMS, _MIN_QUIET_RATIO * mean_rms)
        if mean_rms > SILENCE_RMS or not is_lost:
            return None
        return Mix(weights=_only(loudest, self._channels), reason="lost")


def _products(block: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the sums of products of two channels, [channels, channels].

    In short runs: a larger product would be computed by several threads, which costs more.
    """
    channels = block.shape[1]
    size = max(1, min(1024, (1 << 17) // channels**2))
    whole, tail = np.split(block, [len(block) // size * size])
    runs = whole.reshape(-1, size, channels)
    products = np.matmul(runs.transpose(0, 2, 1), runs).sum(axis=0, dtype=np.float64)
    return np.asarray(products + tail.T @ tail)


def _correlations(products: NDArray[np.float64], num_frames: int) -> NDArray[np.float64]:
    """Return the correlations of channels; 0 where one is almost silent or too quiet to cancel."""
    energies = np.diagonal(products)
    least, most = np.minimum.outer(energies, energies), np.maximum.outer(energies, energies)
    is_loud = (least > _FLOOR_RMS**2 * num_frames) & (least >= _MIN_LEVEL**2 * most)
    correlations = np.zeros_like(products)
    np.divide(products, np.sqrt(least * most), where=is_loud, out=correlations)
    return correlations


def _only(channel: int, channels: int) -> tuple[int, ...]:
    """Return the weights that keep one channel."""
    return tuple(int(index == channel) for index in range(channels))


def _shares(weights: tuple[int, ...], channels: int) -> NDArray[np.float64]:
    """Return the factor of each channel."""
    factors = np.array(weights or (1,) * channels, dtype=np.float64)
    factors /= max(1.0, float(np.abs(factors).sum()))
    return factors


def _drop_unstable(is_unstable: NDArray[np.bool_], energies: NDArray[np.float64]) -> list[int]:
    """Drop channels until no pair is unstable: most partners first, then the quieter, the last."""
    kept = list(range(len(energies)))
    while is_unstable[np.ix_(kept, kept)].any():
        partners = is_unstable[np.ix_(kept, kept)].sum(axis=1).tolist()
        worst = [c for c, number in zip(kept, partners, strict=True) if number == max(partners)]
        quietest = min(energies[c] for c in worst)
        # Levels within 10 % count as equal, so that rounding decides nothing.
        kept.remove(max(c for c in worst if energies[c] <= 1.1 * quietest))
    return kept


def _signs(links: NDArray[np.int_], kept: list[int]) -> tuple[int, ...]:
    """Choose signs that make linked channels agree; most of a group keep theirs."""
    signs = [0] * len(links)
    for first in kept:
        if signs[first]:
            continue
        signs[first], group = 1, [first]
        for channel in group:
            for other in kept:
                if links[channel, other] and not signs[other]:
                    signs[other] = signs[channel] * int(links[channel, other])
                    group.append(other)
        if sum(signs[channel] for channel in group) < 0:
            for channel in group:
                signs[channel] = -signs[channel]
    return tuple(signs)


def _mean_of_channels(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute ``block.mean(axis=1)`` to the bit; adding whole columns is ten times faster."""
    channels = block.shape[1]
    if channels >= _PAIRWISE_CHANNELS:
        return np.asarray(block.mean(axis=1, dtype=np.float32))
    total = block[:, 0].copy()
    for channel in range(1, channels):
        total += block[:, channel]
    total /= np.float32(channels)
    return total


_PAIRWISE_CHANNELS = 8
"""From this many numbers on, NumPy adds them in another order."""
