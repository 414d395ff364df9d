"""Audio against slow, plain readers: soundfile, wave, and soxr on the whole file."""

from __future__ import annotations

import itertools
import math
import wave
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
import soxr
from helpers.sessions import tone
from hypothesis import given
from hypothesis import strategies as st

import shared.media.sound as sound_module
from shared.clock import Interval
from shared.errors import MediaError
from shared.media.sound import Sound, measure_loudness, read_sound, to_int16
from shared.media.video import read_video_track
from shared.streams import AudioDefaults, VideoDefaults

if TYPE_CHECKING:
    from pathlib import Path

RATE_HZ = 16_000
SMALL = VideoDefaults(size=16, fit="stretch")


def noise(seconds: float, rate_hz: int, channels: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.uniform(-0.9, 0.9, (round(seconds * rate_hz), channels))


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_sixteen_bit_sound_is_the_mean_of_its_channels(channels: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1, RATE_HZ, channels), RATE_HZ, subtype="PCM_16")
    with wave.open(str(tmp_path / "a.wav")) as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    expected = raw.reshape(-1, channels).astype(np.float64).mean(axis=1) / 32768
    sound = read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ)
    np.testing.assert_allclose(sound.waveform, expected, atol=1e-7)
    assert (sound.source_channels, sound.duration_s) == (channels, 1.0)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
def test_resampling_in_blocks_is_resampling_the_whole_to_the_bit(
    subtype: str, rate_hz: int, tmp_path: Path
) -> None:
    seconds = 150_000 / rate_hz  # several blocks, the last one not full
    soundfile.write(tmp_path / "a.wav", noise(seconds, rate_hz, 2), rate_hz, subtype=subtype)
    whole = soundfile.read(tmp_path / "a.wav", dtype="float32")[0].mean(axis=1, dtype=np.float32)
    expected = soxr.resample(whole, rate_hz, RATE_HZ, quality="HQ")
    sound = read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ)
    np.testing.assert_array_equal(sound.waveform, expected)


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000])
def test_a_resampled_tone_stays_where_it_was(rate_hz: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(2.0, rate_hz=rate_hz), rate_hz, subtype="FLOAT")
    sound = read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ)
    middle = slice(RATE_HZ // 4, -RATE_HZ // 4)
    assert len(sound.waveform) == 2 * RATE_HZ
    assert np.abs(sound.waveform - tone(2.0))[middle].max() < 1e-4


def test_samples_that_are_no_numbers_are_zero_and_counted(tmp_path: Path) -> None:
    samples = tone(0.1)
    samples[[3, 50, 700]] = [np.nan, np.inf, 1e30]
    soundfile.write(tmp_path / "a.wav", samples, RATE_HZ, subtype="FLOAT")
    sound = read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ)
    assert (sound.num_bad, sound.waveform[[3, 50, 700]].tolist()) == (3, [0, 0, 0])


def test_peak_and_clipping_are_those_of_single_channels(tmp_path: Path) -> None:
    samples = np.zeros((1000, 2), dtype=np.int16)
    samples[100:110, 0], samples[200:205, 1] = 32767, -32768
    soundfile.write(tmp_path / "a.wav", samples, 44_100)
    sound = read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ)
    assert (sound.peak, sound.num_clipped) == (1.0, 15)


def test_a_sound_file_that_ends_early_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1.0), RATE_HZ, subtype="PCM_16")
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[: 44 + 16_000])
    assert read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ).duration_s == 0.5


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("24bit_stereo.wav", 10.0),
        ("jfk_data_size_ffffffff.wav", 11.0),
        ("test-44100Hz-le-1ch-4bytes-rf64.wav", 0.1),
        ("test-8000Hz-le-1ch-1byte-ulaw.wav", 9 / 8000),
        ("eight_channels_0.1s.wav", 0.1),
    ],
)
def test_odd_but_legal_wav_files_are_read_as_soundfile_reads_them(
    name: str, seconds: float, nasty_files: dict[str, Path]
) -> None:
    path = nasty_files[f"audio/{name}"]
    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1, dtype=np.float32)
    expected = mono if rate_hz == RATE_HZ else soxr.resample(mono, rate_hz, RATE_HZ)
    sound = read_sound(path, rate_hz=RATE_HZ)
    np.testing.assert_array_equal(sound.waveform, expected)
    assert sound.duration_s == pytest.approx(seconds, abs=1 / RATE_HZ)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\0" * 5000, b"version https://git-lfs"])
def test_a_file_without_audio_is_a_media_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(MediaError, match=r"a\.wav"):
        read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ)


@pytest.mark.parametrize("read", [lambda p: read_sound(p, rate_hz=RATE_HZ), read_video_track])
def test_a_folder_or_nothing_in_place_of_media_is_a_media_error(read, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(MediaError):
            read(path)


def test_sound_of_a_video_file_is_read_too(nasty_files: dict[str, Path]) -> None:
    sound: Sound = read_sound(nasty_files["video/sound_5.1.mp4"], rate_hz=RATE_HZ)
    assert sound.source_channels == 6
    assert sound.duration_s == pytest.approx(5.3, abs=0.1)


# --- exact zeros ---


@given(
    runs=st.lists(st.tuples(st.integers(1, 4_000), st.integers(1, 4_000)), max_size=8),
    sizes=st.lists(st.integers(1, 3_000), min_size=1, max_size=4),
    channels=st.integers(1, 3),
)
def test_runs_of_zeros_are_those_of_a_plain_loop_whatever_the_blocks(runs, sizes, channels):
    levels = np.concatenate([np.zeros(0), *(np.r_[np.ones(a), np.zeros(b)] for a, b in runs)])
    samples = np.zeros((len(levels), channels), np.float32)
    samples[np.arange(len(levels)), np.arange(len(levels)) % channels] = levels
    found = sound_module._ZeroRuns(min_frames=1_600)
    cuts = np.cumsum(np.resize(sizes, len(samples)))
    for block in np.split(samples, cuts[cuts < len(samples)]):
        found.add(block)
    expected, start = [], 0
    for is_zero, run in itertools.groupby(levels == 0):
        length = len(list(run))
        if is_zero and length >= 1_600:
            expected.append((start, start + length))
        start += length
    assert found.runs() == expected


def test_zeros_are_told_in_seconds_of_the_recorded_sound(tmp_path: Path) -> None:
    samples = noise(20, 48_000, 2)
    samples[48_000:62_400] = 0
    samples[70_000:90_000, 1] = 0  # one channel alone
    samples[100_000:104_799] = 0  # a frame less than 0.1 s
    samples[-200_000:] = 0
    soundfile.write(tmp_path / "a.flac", samples, 48_000)
    zeros = read_sound(tmp_path / "a.flac", rate_hz=RATE_HZ).zeros
    assert zeros == (Interval(1.0, 1.3), Interval(760_000 / 48_000, 20.0))


# --- loudness ---


@pytest.mark.parametrize("level", [0.01, 0.1, 0.5])
def test_loudness_is_brought_to_the_level_of_the_recipe(level):
    waveform = tone(1.0, level=level).astype(np.float32)
    loudness = measure_loudness([waveform], spec=AudioDefaults())
    assert loudness.rms == pytest.approx(level / math.sqrt(2), rel=1e-3)
    brought = waveform * loudness.gain
    assert 20 * np.log10(np.sqrt(np.mean(brought**2))) == pytest.approx(-23, abs=0.01)


def test_loudness_in_blocks_is_that_of_the_whole():
    waveform = tone(3.0, level=0.2).astype(np.float32)
    whole = measure_loudness([waveform], spec=AudioDefaults())
    parts = measure_loudness(np.array_split(waveform, 7), spec=AudioDefaults())
    assert parts.gain == pytest.approx(whole.gain, rel=1e-12)
    assert parts.peak == whole.peak


def test_the_gain_stops_where_the_peak_meets_the_limit():
    waveform = np.zeros(16_000, dtype=np.float32)
    waveform[::1000] = 0.5  # RMS -36 dBFS, peaks -6 dBFS
    loudness = measure_loudness([waveform], spec=AudioDefaults())
    assert np.abs(waveform * loudness.gain).max() == pytest.approx(10 ** (-1 / 20), rel=1e-6)


@pytest.mark.parametrize("waveform", [np.zeros(0, np.float32), np.full(100, 1e-4, np.float32)])
def test_the_level_of_silence_is_unchanged(waveform):
    assert measure_loudness([waveform], spec=AudioDefaults()).gain == 1.0


def test_without_a_loudness_in_the_recipe_the_level_is_unchanged():
    waveform = np.ones(100, np.float32)
    assert measure_loudness([waveform], spec=AudioDefaults(loudness_dbfs=None)).gain == 1.0


def test_stored_samples_are_rounded_and_clipped():
    waveform = np.array([0, 0.5, -1, 1, 3, -3, 1.4 / 32768, 1.6 / 32768], dtype=np.float32)
    expected = [0, 16384, -32768, 32767, 32767, -32768, 1, 2]
    assert to_int16(waveform, gain=1.0).tolist() == expected
    assert to_int16(waveform, gain=0.5)[2] == -16384
