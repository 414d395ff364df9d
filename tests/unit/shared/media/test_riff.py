"""Headers of WAV files that are wrong, against the samples that were written."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import MediaError
from shared.media import riff
from shared.media.riff import read_wav_header
from shared.media.sound import read_sound

if TYPE_CHECKING:
    from pathlib import Path

RATE_HZ = 16_000
SAMPLES = (8_000 * np.sin(np.arange(3 * RATE_HZ) / 9)).astype("<i2")
LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"recorder 1.00\0"


def wav(
    content: bytes,
    *,
    declared: int | None = None,
    riff_bytes: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
    name: bytes = b"data",
    channels: int = 1,
    form: tuple[int, int] = (1, 2),
) -> bytes:
    """Make a WAV file; `form` is its format tag and the bytes of a sample."""
    tag, width = form
    frame = channels * width
    header = (b"fmt ", 16, tag, channels, RATE_HZ, RATE_HZ * frame, frame, 8 * width)
    fmt = struct.pack("<4sIHHIIHH", *header)
    declared = len(content) if declared is None else declared
    body = b"WAVE" + fmt + before + name + struct.pack("<I", declared) + content + after
    size = len(body) if riff_bytes is None else riff_bytes
    return b"RIFF" + struct.pack("<I", size) + body


BYTES = SAMPLES.tobytes()
SIZE = len(BYTES)
WRONG = {
    "size 0": wav(BYTES, declared=0),
    "both sizes 0": wav(BYTES, declared=0, riff_bytes=0),
    "data without a name": wav(BYTES, declared=0, riff_bytes=0, name=bytes(4)),
    "the size of an earlier second": wav(BYTES, declared=32_000, riff_bytes=32_036),
    "the outer size alone": wav(BYTES, riff_bytes=0),
    "after an odd chunk": wav(BYTES, declared=0, before=b"note\3\0\0\0abc\0"),
    "after an odd chunk without padding": wav(BYTES, declared=0, before=b"note\3\0\0\0abc"),
    "half a frame at the end": wav(BYTES + b"\1", declared=0),
}
RIGHT = {
    "right": wav(BYTES),
    "with short chunks": wav(BYTES, before=b"note\3\0\0\0abc\0fact\4\0\0\0\1\2\3\4"),
    "with tags": wav(BYTES, after=LIST),
    "with tags that are not counted": wav(BYTES, after=LIST, riff_bytes=SIZE + 36),
    "a stream": wav(BYTES, declared=0xFFFFFFFF, riff_bytes=0xFFFFFFFF),
    "a stream of sox": wav(BYTES, declared=0x7FFFF000, riff_bytes=0x7FFFF024),
    "with an ID3v1 tag": wav(BYTES, after=b"TAG" + bytes(125)),
    "with zeros to a full block": wav(BYTES, after=bytes(65_536)),
    "one byte counted too many": wav(BYTES, riff_bytes=SIZE + 37),
}


@pytest.mark.parametrize("name", [*WRONG, *RIGHT])
def test_all_of_the_sound_is_read_whatever_the_header_says(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes({**WRONG, **RIGHT}[name])
    sound = read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ)
    np.testing.assert_array_equal(sound.waveform, SAMPLES / np.float32(32768))
    header = read_wav_header(tmp_path / "a.wav")
    assert header is not None
    assert (header.is_wrong, header.missing_bytes) == (name in WRONG, 0)


def test_a_cut_file_misses_bytes_and_has_no_wrong_header(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(BYTES)[:-30_000])
    header = read_wav_header(tmp_path / "a.wav")
    assert header is not None
    assert (header.is_wrong, header.missing_bytes) == (False, 30_000)


@pytest.mark.parametrize("content", [b"", LIST, LIST + LIST])
def test_a_sound_of_length_0_stays_one(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(b"", after=content))
    with pytest.raises(MediaError, match="contains no audio"):
        read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ)


FORMS = {"PCM_U8": (1, 1), "PCM_24": (1, 3), "PCM_32": (1, 4), "FLOAT": (3, 4), "DOUBLE": (3, 8)}


@settings(max_examples=40, deadline=None)
@given(
    subtype=st.sampled_from(list(FORMS)),
    channels=st.integers(1, 5),
    frames=st.integers(1, 5_000),
    extra=st.integers(0, 40),
    after=st.sampled_from([b"", LIST]),
)
def test_a_file_past_the_limit_of_its_sizes_is_read_whole(
    subtype, channels, frames, extra, after, tmp_path_factory
):
    """The limit of 32 bits is lowered to 16, so that small files pass it, once or more."""
    folder = tmp_path_factory.mktemp("long")
    samples = np.random.default_rng(frames).uniform(-0.9, 0.9, (frames + 70_000, channels))
    soundfile.write(folder / "right.wav", samples, RATE_HZ, subtype=subtype)
    right = read_wav_header(folder / "right.wav")
    content = (folder / "right.wav").read_bytes()[right.start :][: right.num_bytes]
    declared = len(content) % (1 << 16)
    cut = wav(content, declared=declared, channels=channels, form=FORMS[subtype], after=after)
    (folder / "cut.wav").write_bytes(cut + bytes(0 if after else extra % channels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(riff, "_MODULUS", 1 << 16)
        header = read_wav_header(folder / "cut.wav")
        assert (header.num_bytes, header.is_wrong) == (len(content), True)
    patched = header.__class__(**{f: getattr(header, f) for f in header.__slots__})
    with riff.open_wav((folder / "cut.wav").open("rb"), patched) as opened:
        read, _ = soundfile.read(opened, dtype="float32", always_2d=True)
    expected, _ = soundfile.read(folder / "right.wav", dtype="float32", always_2d=True)
    np.testing.assert_array_equal(read, expected)


def sparse(path: Path, *, seconds: int, declared: int) -> int:
    """Write 8 channels of floats at 384 kHz, holes but for the first and last frame."""
    size = seconds * 384_000 * 32
    head = bytearray(wav(b"", declared=declared, channels=8, form=(3, 4)))
    head[24:32] = struct.pack("<II", 384_000, 384_000 * 32)
    with path.open("wb") as file:
        file.write(head)
        file.write(np.full(8, 0.5, "<f4").tobytes())
        file.truncate(len(head) + size)
        file.seek(len(head) + size - 32)
        file.write(np.full(8, 0.25, "<f4").tobytes())
    return size


@pytest.mark.parametrize("declared", ["modulo", "zero", "stream"])
def test_the_last_frame_past_4_gib_is_found(declared: str, tmp_path: Path) -> None:
    size = 400 * 384_000 * 32
    sizes = {"modulo": size % 2**32, "zero": 0, "stream": 0xFFFFFFFF}
    assert sparse(tmp_path / "a.wav", seconds=400, declared=sizes[declared]) == size
    header = read_wav_header(tmp_path / "a.wav")
    assert header is not None
    assert (header.num_bytes, header.is_trusted) == (size, False)
    with (
        riff.open_wav((tmp_path / "a.wav").open("rb"), header) as opened,
        soundfile.SoundFile(opened) as file,
    ):
        assert file.frames == size // 32
        first = file.read(1)[0, 0]
        file.seek(size // 32 - 1)
        assert (first, file.read(1)[0, 0]) == (0.5, 0.25)


RAW = (6_000 * np.sin(np.arange(40_000) / 7)).astype("<i2")


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (RAW.tobytes(), "s16le"),
        (np.stack([RAW, -RAW], axis=1).tobytes(), "s16le"),
        ((RAW / 32768).astype("<f4").tobytes(), "f32le"),
        (bytes(44) + RAW.tobytes(), "s16le.*skip_initial_bytes 44"),
        (np.random.default_rng(0).bytes(40_000), "not a readable audio file"),
        (b'{"timestamp": 0.033, "touch": [0.1, 0.2]}\n' * 1_000, "not a readable audio file"),
        (bytes(40_000), "not a readable audio file"),
    ],
)
def test_raw_samples_are_called_so_and_other_files_not(content, form, tmp_path):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(MediaError, match=form):
        read_sound(tmp_path / "a.wav", rate_hz=RATE_HZ)
