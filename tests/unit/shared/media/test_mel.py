"""DMel tokens against NumPy and librosa."""

from __future__ import annotations

import librosa
import numpy as np
import pytest
from helpers.oracles import slow_mel_share
from helpers.sessions import tone
from threadpoolctl import threadpool_limits

from shared.media.mel import decode_dmel, encode_dmel, mel_filters, stft
from shared.media.sound import to_int16
from shared.streams import DmelSettings

RATE_HZ = 16_000
MEL = DmelSettings()


def noise(count: int, *, seed: int = 0, level: float = 0.1) -> np.ndarray:
    """White noise, int16."""
    values = np.random.default_rng(seed).normal(0, level, count)
    return to_int16(values.astype(np.float32), gain=1.0)


def encode(samples: np.ndarray, start: int = 0, count: int = 10, recipe: DmelSettings = MEL):
    return encode_dmel(samples, start, count, rate_hz=RATE_HZ, settings=recipe)


@pytest.mark.parametrize(
    ("start", "recipe"),
    [
        (0, MEL),  # silence before the first sample
        (5000, MEL),  # sound before the window
        (320, DmelSettings(fft_size=512, channels=12, levels=4)),
        (640, DmelSettings(rate_hz=10, fft_size=1024)),  # the hop is longer than the FFT
    ],
)
def test_levels_are_those_of_one_numpy_fft_per_frame(start, recipe):
    samples = noise(40_000)
    levels, valid = encode(samples, start, 6, recipe)
    share = slow_mel_share(samples, start, 6, rate_hz=RATE_HZ, settings=recipe)
    # float32 against float64: only a level that lies on the border of two may differ
    is_border = np.abs(share % 1 - 0.5) < 1e-3
    expected = np.clip(np.round(share), 0, recipe.levels - 1)
    np.testing.assert_array_equal(levels[~is_border], expected[~is_border])
    assert is_border.mean() < 0.01
    assert valid.all()


def test_levels_are_those_of_librosa_on_the_left_padded_sound():
    samples = noise(RATE_HZ)
    levels, _ = encode(samples, 0, 50)
    padded = np.pad(samples / np.float32(32768), (MEL.fft_size - 320, 0))
    energy = librosa.feature.melspectrogram(
        y=padded, sr=RATE_HZ, n_fft=1024, hop_length=320, center=False, n_mels=80
    )
    level_db = 10 * np.log10(np.maximum(energy.T, 1e-10))
    share = (level_db + 70) / 100 * 15
    is_border = np.abs(share % 1 - 0.5) < 1e-4
    assert levels.shape == share.shape == (50, 80)
    expected = np.clip(np.round(share), 0, 15)
    np.testing.assert_array_equal(levels[~is_border], expected[~is_border])


@pytest.mark.parametrize(("fft_size", "hop"), [(1024, 320), (512, 160), (64, 100), (1000, 333)])
def test_spectra_are_those_of_librosa_to_the_bit(fft_size, hop):
    waveform = (noise(RATE_HZ) / 32768).astype(np.float32)
    expected = librosa.stft(waveform, n_fft=fft_size, hop_length=hop, center=False)
    np.testing.assert_array_equal(stft(waveform, fft_size=fft_size, hop=hop), expected)


@pytest.mark.filterwarnings("ignore:Empty filters")
@pytest.mark.parametrize(
    ("rate_hz", "fft_size", "channels"),
    [
        (16_000, 1024, 80),
        (24_000, 1024, 80),
        (16_000, 64, 128),
        (48_000, 2048, 12),
        (4_000, 512, 4),
    ],
)
def test_mel_filters_are_those_of_librosa_to_the_bit(rate_hz, fft_size, channels):
    expected = librosa.filters.mel(sr=rate_hz, n_fft=fft_size, n_mels=channels)
    found = mel_filters(rate_hz=rate_hz, fft_size=fft_size, channels=channels)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("frame", [0, 3, 8])
def test_no_frame_depends_on_later_samples(frame):
    samples = noise(10 * 320)
    changed = samples.copy()
    changed[(frame + 1) * 320 :] = 20_000
    before, _ = encode(samples)
    after, _ = encode(changed)
    np.testing.assert_array_equal(before[: frame + 1], after[: frame + 1])
    assert (before[frame + 1] != after[frame + 1]).any()


def test_frames_that_the_sound_does_not_cover_are_invalid_and_level_zero():
    samples = noise(1000)  # 3 whole frames of 320 and a part of the fourth
    levels, valid = encode(samples, 0, 6)
    np.testing.assert_array_equal(valid, [True] * 3 + [False] * 3)
    assert (levels[3:] == 0).all()
    assert (levels[:3] > 0).any()


def test_silence_is_the_lowest_level_and_full_scale_the_highest():
    quiet, _ = encode(np.zeros(3200, np.int16))
    assert (quiet == 0).all()
    loud, _ = encode(to_int16(tone(1.0, level=1.0).astype(np.float32), gain=1.0), 3200)
    assert loud.max() == 15


def test_levels_do_not_depend_on_the_number_of_threads():
    samples = noise(4 * RATE_HZ)
    with threadpool_limits(1):
        one, _ = encode(samples, 0, 200)
    with threadpool_limits(2):
        two, _ = encode(samples, 0, 200)
    np.testing.assert_array_equal(one, two)


def test_decoded_tokens_of_a_tone_have_about_the_same_levels():
    samples = to_int16(tone(1.0).astype(np.float32), gain=1.0)
    levels, _ = encode(samples, 0, 50)
    decoded = decode_dmel(levels, rate_hz=RATE_HZ, settings=MEL)
    again, _ = encode(to_int16(decoded, gain=1.0), 0, 50)
    assert decoded.shape == (RATE_HZ,)
    # The first frames have no past in the decoded sound. Found after them: the mean difference is
    # 1.1 levels of 6.7 dB, nearly all of it in channels near silence, where Griffin-Lim leaks.
    difference = np.abs(again.astype(int) - levels)[5:]
    assert difference.mean() < 1.3
    assert difference[levels[5:] >= 8].max() <= 1
    np.testing.assert_array_equal(again[5:].argmax(axis=1), levels[5:].argmax(axis=1))
