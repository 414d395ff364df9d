"""Sound and frames against slow, plain readers: soundfile, wave, soxr on the whole file, and PyAV
decoding from the first frame on.
"""

from __future__ import annotations

import wave
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
import soxr
from helpers.sessions import tone

from shared.errors import MediaError
from shared.media.sound import Sound, read_sound
from shared.media.video import read_video_track
from shared.recipe import VisionRecipe

if TYPE_CHECKING:
    from pathlib import Path

RATE_HZ = 16_000
SMALL = VisionRecipe(size=16, fit="stretch")


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
def test_what_is_no_sound_is_a_media_error(content: bytes, tmp_path: Path) -> None:
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
