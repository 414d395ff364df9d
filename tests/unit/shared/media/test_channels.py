"""The mix of channels against what was put into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.media.channels import MEAN, Mix, MixChooser
from shared.media.sound import read_sound

if TYPE_CHECKING:
    from pathlib import Path

RATE_HZ = 16_000


def voice(seed: int = 0, *, seconds: float = 12.0, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Make something like speech, RMS 0.1: syllables of harmonics and of noise, with pauses."""
    rng = np.random.default_rng(seed)
    times_s = np.arange(round(seconds * rate_hz)) / rate_hz
    pitch_hz = 140 + 25 * np.sin(2 * np.pi * 0.7 * times_s + seed)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / rate_hz
    voiced = sum(np.sin(k * phase + k * k) / k for k in range(1, 20))
    loud = np.interp(times_s, np.arange(0, seconds + 1, 0.2), rng.random(int(seconds * 5) + 5) ** 2)
    samples = loud * (voiced + 0.2 * rng.standard_normal(len(times_s)))
    return 0.1 * samples / np.sqrt(np.mean(samples**2))


def noise(seed: int, level_db: float) -> np.ndarray:
    return 10 ** (level_db / 20) * np.random.default_rng(seed).standard_normal(len(VOICE))


def choose(*channels: np.ndarray, rate_hz: int = RATE_HZ) -> Mix:
    samples = np.stack(channels, axis=1).astype(np.float32)
    chooser = MixChooser("auto", num_channels=len(channels), rate_hz=rate_hz)
    for start in range(0, len(samples), 1 << 16):
        chooser.add(samples[start : start + (1 << 16)])
    return chooser.choose()


VOICE = voice()
OTHER = voice(5)
TIMES_S = np.arange(len(VOICE)) / RATE_HZ
HUM = 0.2 * np.sin(2 * np.pi * 50 * TIMES_S)
FLIPPED = np.where(TIMES_S < 4, -1, 1)
"""Sign of a channel that is inverted for 4 s."""

INVERTED = {
    "exactly": (VOICE, -VOICE),
    "own noise at -55 dB": (VOICE + noise(1, -55), -VOICE + noise(2, -55)),
    "own noise at -35 dB": (VOICE + noise(1, -35), -VOICE + noise(2, -35)),
    "one quieter": (VOICE + noise(1, -60), -0.4 * VOICE + noise(2, -60)),
    "the same hum in both": (VOICE + HUM + noise(1, -60), HUM - VOICE + noise(2, -60)),
    "an offset in both": (0.3 + VOICE, 0.3 - VOICE),
}


@pytest.mark.parametrize("name", INVERTED)
def test_an_inverted_channel_is_turned_back(name: str) -> None:
    mix = choose(*INVERTED[name])
    assert (mix.weights, mix.reason) == ((1, -1), "inverted")
    mono = mix.apply(np.stack(INVERTED[name], axis=1).astype(np.float32))
    assert np.corrcoef(mono, VOICE)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ((1, 1, -1, 1), (1, 1, -1, 1)),
        ((-1, -1, 1, -1), (1, 1, -1, 1)),  # most channels keep their sign
        ((1, -1, -1, 1), (1, -1, -1, 1)),
        ((1, 1, 1, 1, 1, -1, 1, 1), (1, 1, 1, 1, 1, -1, 1, 1)),
    ],
)
def test_of_many_channels_the_fewer_are_turned_back(signs, expected):
    channels = [sign * VOICE + noise(number, -50) for number, sign in enumerate(signs)]
    assert choose(*channels).weights == expected


def test_two_pairs_in_different_rooms_are_aligned_on_their_own():
    assert choose(VOICE, 0.8 * VOICE, OTHER, -OTHER).weights == (1, 1, 1, -1)


def test_a_channel_that_is_inverted_for_a_while_is_left_out():
    mix = choose(VOICE + noise(1, -55), FLIPPED * VOICE + noise(2, -55))
    assert (mix.weights, mix.reason) == ((1, 0), "unstable")
    assert mix.cancelled_s == pytest.approx(4, abs=1.1)
    others = [VOICE + noise(number, -50) for number in range(3)]
    assert choose(others[0], FLIPPED * VOICE, *others[1:]).weights == (1, 0, 1, 1)


def test_of_an_unstable_pair_the_louder_channel_is_kept():
    assert choose(0.5 * FLIPPED * VOICE, VOICE).weights == (0, 1)


WIDE = {
    "equal": (VOICE, VOICE),
    "uncorrelated": (VOICE, OTHER),
    "mid and side": (VOICE, 0.5 * OTHER),
    "wide, correlation 0.4": (VOICE + 0.7 * OTHER, VOICE - 0.7 * OTHER),
    "wide, correlation -0.4": (VOICE + 1.5 * OTHER, VOICE - 1.5 * OTHER),
    "dead": (VOICE, 0 * VOICE),
    "dead with noise": (VOICE, noise(1, -70)),
    "dead with hum": (VOICE, 0.1 * HUM),
    "inverted crosstalk": (VOICE, -0.02 * VOICE),
    "inverted for a moment": (VOICE, np.where(TIMES_S < 1, -1, 1) * VOICE),
    "noise, almost silent": (noise(1, -59), noise(2, -59)),
    "clicks in one": (VOICE, VOICE * (np.random.default_rng(0).random(len(VOICE)) < 0.5)),
}


@pytest.mark.parametrize("name", WIDE)
def test_other_stereo_is_averaged(name: str) -> None:
    assert choose(*WIDE[name]) == MEAN


@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
def test_a_delayed_channel_is_averaged(rate_hz: int) -> None:
    samples = voice(seconds=6, rate_hz=rate_hz)
    delays = [*range(1, 20), *range(20, 2_000, 101)]
    mixes = {delay: choose(samples[delay:], samples[:-delay], rate_hz=rate_hz) for delay in delays}
    assert {delay for delay, mix in mixes.items() if mix != MEAN} == set()


def test_one_live_channel_of_many_is_not_averaged_to_silence():
    channels = [noise(number, -90) for number in range(8)]
    channels[3] = 0.04 * VOICE
    mix = choose(*channels)
    assert (mix.weights, mix.reason) == ((0, 0, 0, 1, 0, 0, 0, 0), "lost")


@settings(max_examples=25, deadline=None)
@given(
    signs=st.lists(st.sampled_from([-1, 1]), min_size=1, max_size=6),
    gain=st.floats(0.3, 3.0),
    sizes=st.lists(st.integers(5_000, 70_000), min_size=1, max_size=3),
)
def test_the_mix_of_copies_with_any_signs_is_the_sound_whatever_the_blocks(signs, gain, sizes):
    samples = (VOICE[:, None] * gain * np.array(signs)).astype(np.float32)
    chooser = MixChooser("auto", num_channels=len(signs), rate_hz=RATE_HZ)
    cuts = np.cumsum(np.resize(sizes, len(samples)))
    for block in np.split(samples, cuts[cuts < len(samples)]):
        chooser.add(block)
    mono = chooser.choose().apply(samples)
    np.testing.assert_allclose(np.abs(mono), np.abs(samples[:, 0]), rtol=1e-5)


@pytest.mark.parametrize(
    ("channels", "removed"),
    [
        ((0.3 + VOICE,), 0.3),
        ((0.1 + VOICE, VOICE + 0.12), 0.11),
        ((0.01 + 0.1 * VOICE,), 0.01),  # little, but as loud as the voice
        ((0.01 + VOICE,), 0.0),
        ((0.04 + VOICE, VOICE - 0.04), 0.0),
    ],
)
def test_an_offset_is_removed_above_a_limit(channels, removed):
    mix = choose(*channels)
    assert mix.offset == pytest.approx(removed, abs=1e-4)
    if removed:
        mono = mix.apply(np.stack(channels, axis=1).astype(np.float32))
        assert abs(mono.mean()) < 1e-4


def write(path: Path, *channels: np.ndarray) -> Path:
    soundfile.write(path, np.stack(channels, axis=1), RATE_HZ, subtype="FLOAT")
    return path


def test_a_file_with_an_inverted_channel_reads_as_the_mix_of_a_straight_one(tmp_path: Path) -> None:
    left, right = VOICE + noise(1, -55), VOICE + noise(2, -55)
    straight = read_sound(write(tmp_path / "a.wav", left, right), rate_hz=8_000, channels="auto")
    inverted = read_sound(write(tmp_path / "b.wav", left, -right), rate_hz=8_000, channels="auto")
    np.testing.assert_array_equal(inverted.waveform, straight.waveform)
    assert (straight.mix, inverted.mix.weights) == (MEAN, (1, -1))
    again = read_sound(tmp_path / "b.wav", rate_hz=8_000, channels=inverted.mix)
    np.testing.assert_array_equal(again.waveform, inverted.waveform)


def test_the_offset_is_that_of_the_stretches_with_sound(tmp_path: Path) -> None:
    samples = 0.4 + VOICE
    samples[len(samples) // 2 :] = 0
    sound = read_sound(write(tmp_path / "a.wav", samples), rate_hz=RATE_HZ, channels="auto")
    assert sound.mix.offset == pytest.approx(0.4, abs=0.01)


def test_a_chosen_channel_is_read_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", VOICE, OTHER, -VOICE)
    sound = read_sound(path, rate_hz=RATE_HZ, channels=1)
    np.testing.assert_allclose(sound.waveform, OTHER, atol=1e-7)
    assert sound.mix.weights == (0, 1, 0)
    mean = read_sound(path, rate_hz=RATE_HZ, channels="mean")
    np.testing.assert_allclose(mean.waveform, OTHER / 3, atol=1e-6)
    with pytest.raises(ValueError, match="has 3 channels, the recipe wants channel 3"):
        read_sound(path, rate_hz=RATE_HZ, channels=3)
