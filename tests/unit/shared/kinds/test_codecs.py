"""Codecs: round trips, independent readers, and hostile bytes."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
import soundfile
from helpers.oracles import psnr_db
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.errors import CorruptError
from shared.kinds.audio import decode_wav, encode_wav
from shared.kinds.text import SegmentText, TimedText, decode_text, encode_text
from shared.kinds.video import decode_pictures, encode_pictures
from shared.recipe import Recipe
from shared.shardset.layout import columns_of
from shared.streams import VideoDefaults

RAW, JPEG = VideoDefaults(codec="raw"), VideoDefaults(codec="mjpeg")
H264, PLANES = VideoDefaults(codec="h264"), VideoDefaults(codec="yuv420")
SIZE = 64


def smooth(count: int = 3) -> np.ndarray:
    """Pictures of soft color ramps, uint8 [count, SIZE, SIZE, 3]."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    ramps = [np.stack([x, y, (x + y + k) / 3], axis=2) for k in range(count)]
    return (np.array(ramps) * 100 + 70).astype(np.uint8)


def decode(member: bytes, recipe: VideoDefaults, count: int = 3) -> np.ndarray:
    return decode_pictures(member, spec=recipe, out=np.zeros((count, SIZE, SIZE, 3), np.uint8))


def empty(layout: str, count: int = 3) -> np.ndarray:
    """Memory for pictures in a layout; what it held before must not matter."""
    picture = {"rgb": (SIZE, SIZE, 3), "yuv420": (SIZE * 3 // 2, SIZE)}[layout]
    return np.full((count, *picture), 0xA5, np.uint8)


def npy(header: str, content: bytes = b"") -> bytes:
    raw = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + content


@given(pictures=hnp.arrays(np.uint8, (2, 4, 4, 3)))
def test_raw_pictures_come_back_exactly(pictures):
    member = encode_pictures(pictures, spec=RAW)
    found = decode_pictures(member, spec=RAW, out=np.zeros_like(pictures))
    np.testing.assert_array_equal(found, pictures)


@pytest.mark.parametrize("count", [1, 20, 1200])
def test_raw_members_are_what_numpy_saves_and_loads(count):
    pictures = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    member = encode_pictures(pictures, spec=RAW)
    np.testing.assert_array_equal(np.load(io.BytesIO(member), allow_pickle=False), pictures)
    saved = io.BytesIO()
    np.save(saved, pictures)
    assert member == saved.getvalue()


def test_jpeg_pictures_come_back_nearly():
    pictures = smooth()
    found = decode(encode_pictures(pictures, spec=JPEG), JPEG)
    assert psnr_db(found, pictures) > 35  # 37.6 dB found at quality 90


def test_jpeg_members_are_an_mjpeg_stream_for_ffmpeg():
    pictures = smooth()
    member = encode_pictures(pictures, spec=JPEG)
    with av.open(io.BytesIO(member), format="mjpeg") as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 3
    assert psnr_db(np.array(frames), pictures) > 33
    assert psnr_db(np.array(frames), decode(member, JPEG)) > 38  # the same up to color rounding


def test_pictures_are_decoded_into_the_given_memory():
    out = np.zeros((5, 3, SIZE, SIZE, 3), np.uint8)
    for recipe in (RAW, JPEG):
        member = encode_pictures(smooth(), spec=recipe)
        found = decode_pictures(member, spec=recipe, out=out[2])
        assert np.shares_memory(found, out)
        assert psnr_db(out[2], smooth()) > 35


def test_every_codec_has_its_extension():
    recipes = [
        Recipe(video=defaults, streams={"eye": {"kind": "video", "file": "eye.mp4"}})
        for defaults in (H264, JPEG, PLANES, RAW)
    ]
    found = [columns_of(recipe)["eye"].codec for recipe in recipes]
    assert found == ["h264", "mjpeg", "npy", "npy"]


HUGE_JPEG = b"\xff\xd8\xff\xc0\x00\x11\x08\xfd\xe8\xfd\xe8\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"


def hostile_jpegs() -> dict[str, bytes]:
    good = encode_pictures(smooth(), spec=JPEG)
    grown = good.replace(struct.pack(">HH", SIZE, SIZE), struct.pack(">HH", 65_000, 65_000))
    other = np.zeros((3, 32, 32, 3), np.uint8)
    return {
        "empty": b"",
        "garbage": b"garbage",
        "cut": good[: len(good) // 2],
        "last picture cut": good[:-20],
        "one picture short": encode_pictures(smooth(2), spec=JPEG),
        "one picture more": encode_pictures(smooth(4), spec=JPEG),
        "another size": encode_pictures(other, spec=JPEG),
        "65000 x 65000 in a whole member": grown,
        "65000 x 65000 and nothing else": HUGE_JPEG * 3,
        "a million seams": b"\xff\xd9\xff\xd8" * 1_000_000,
        "4:4:4": jpegs_of("444"),
        "4:2:2": jpegs_of("422"),
        "gray": jpegs_of("Gray"),
        "end cut": good[:-2],
        "npy": encode_pictures(smooth(), spec=RAW),
    }


def hostile_h264s() -> dict[str, bytes]:
    good = encode_pictures(smooth(), spec=H264)
    first = good.index(b"\x00\x00\x00\x01\x09", 1)
    second = good.index(b"\x00\x00\x00\x01\x09", first + 1)
    other = np.zeros((3, 32, 32, 3), np.uint8)
    return {
        "empty": b"",
        "garbage": b"garbage",
        "first picture cut": good[: first // 2] + good[first:],
        "last picture cut": good[:-8],
        "second picture lost": good[:first] + good[second:],
        "one picture short": encode_pictures(smooth(2), spec=H264),
        "one picture more": encode_pictures(smooth(4), spec=H264),
        "another size": encode_pictures(other, spec=H264),
        "no keyframe": good[first:second] * 3,
        "nothing but delimiters": good[:6] * 3,
        "a million delimiters": good[:6] * 1_000_000,
        "limited range": coded(smooth(), "yuv420p"),
        "4:2:2": coded(smooth(), "yuvj422p"),
        "4:4:4": coded(smooth(), "yuvj444p"),
        "gray": coded(smooth(), "gray"),
        "16320 x 16320 in a whole member": with_size(good, 1020),
        "mjpeg": encode_pictures(smooth(), spec=JPEG),
    }


def coded(pictures: np.ndarray, pixel_format: str) -> bytes:
    """An H.264 stream of another pixel format."""
    context = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = SIZE, SIZE, pixel_format
    context.time_base = Fraction(1, 5)
    context.options = {"x264-params": "bframes=0:aud=1"}
    frames = [av.VideoFrame.from_ndarray(p).reformat(format=pixel_format) for p in pictures]
    packets = [bytes(packet) for frame in [*frames, None] for packet in context.encode(frame)]
    return b"".join(packets)


def with_size(member: bytes, num_macroblocks: int) -> bytes:
    """The stream with another sequence parameter set (ITU-T H.264, 7.3.2.1.1)."""

    def golomb(value: int) -> str:
        return f"{value + 1:b}".rjust(2 * (value + 1).bit_length() - 1, "0")

    size = golomb(num_macroblocks - 1) * 2
    bits = golomb(0) * 2 + golomb(2) + golomb(1) + "0" + size + "11000" + "1"
    payload = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    begin = member.index(b"\x00\x00\x00\x01\x67")
    end = member.index(b"\x00\x00\x00\x01\x68")
    return member[:begin] + b"\x00\x00\x00\x01\x67\x4d\x00\x3e" + payload + member[end:]


def jpegs_of(subsampling: str) -> bytes:
    return b"".join(
        simplejpeg.encode_jpeg(p, colorspace="RGB", colorsubsampling=subsampling) for p in smooth()
    )


def hostile_npys(recipe: VideoDefaults) -> dict[str, bytes]:
    good = encode_pictures(smooth(), spec=recipe)
    shape = str(np.load(io.BytesIO(good)).shape)
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}] * 3, dtype=object), allow_pickle=True)
    fortran = io.BytesIO()
    np.save(fortran, np.asfortranarray(np.load(io.BytesIO(good))))
    return {
        "empty": b"",
        "garbage": b"garbage",
        "magic only": good[:6],
        "header cut": good[:60],
        "content cut": good[:-1],
        "content longer": good + b"\x00",
        "terabytes": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }\n"),
        "pickled objects": objects.getvalue(),
        "fortran order": fortran.getvalue(),
        "floats": npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n", good),
        "nested header": npy("(" * 9000),
        "open header": npy("{'descr': ["),
        "version 3": good.replace(b"NUMPY\x01", b"NUMPY\x03"),
        "mjpeg": encode_pictures(smooth(), spec=JPEG),
        "the other array": encode_pictures(smooth(), spec=PLANES if recipe is RAW else RAW),
    }


CASES = [(JPEG, name, member) for name, member in hostile_jpegs().items()]
CASES += [(H264, name, member) for name, member in hostile_h264s().items()]
CASES += [(RAW, name, member) for name, member in hostile_npys(RAW).items()]
CASES += [(PLANES, name, member) for name, member in hostile_npys(PLANES).items()]


LAYOUTS = ("yuv420", "rgb")


def peak_bytes() -> int:
    """Return the most memory that this process has held since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def cost_of_refusing(member: bytes, recipe: VideoDefaults, layout: str) -> int | None:
    """Return the bytes that decoding a corrupt member takes at its peak; None if it decodes."""
    out, costs = empty(layout), []
    for _ in range(2):  # what a member really takes, it takes each time
        peak_bytes()
        before = peak_bytes()
        try:
            decode_pictures(member, spec=recipe, out=out)
        except CorruptError:
            costs.append(peak_bytes() - before)
        else:
            return None
    return min(costs)


def print_costs() -> None:
    """Print the cost of every case and layout as JSON; runs in a process of its own."""
    for recipe in (JPEG, H264, RAW, PLANES):  # decoders and compiled loops are loaded before
        for layout in LAYOUTS:
            decode_pictures(encode_pictures(smooth(), spec=recipe), spec=recipe, out=empty(layout))
    print(json.dumps([[cost_of_refusing(m, r, layout) for r, _, m in CASES] for layout in LAYOUTS]))


@pytest.fixture(scope="module")
def costs() -> dict[str, list[int | None]]:
    """Costs of all cases by layout, measured where no other test has left threads or memory."""
    paths = [path for path in sys.path if path]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_codecs; test_codecs.print_costs()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    return dict(zip(LAYOUTS, json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{r.codec}: {n}" for r, n, _ in CASES])
def test_other_bytes_than_its_pictures_are_corrupt_and_cost_no_memory(case, layout, costs):
    cost = costs[layout][case]
    assert cost is not None
    assert cost < 8 << 20


@pytest.mark.parametrize("layout", ["yuv420", "rgb"])
@pytest.mark.parametrize("recipe", [JPEG, H264], ids=["mjpeg", "h264"])
@given(data=st.data())
def test_a_damaged_member_decodes_or_is_corrupt(recipe, layout, data):
    member = bytearray(encode_pictures(smooth(2), spec=recipe))
    for _ in range(data.draw(st.integers(1, 4))):
        member[data.draw(st.integers(0, len(member) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CorruptError):
        decode_pictures(bytes(member), spec=recipe, out=empty(layout, count=2))


@given(samples=hnp.arrays(np.int16, st.integers(0, 200)))
def test_sound_comes_back_exactly(samples):
    np.testing.assert_array_equal(decode_wav(encode_wav(samples, rate_hz=16_000)), samples)


def test_wav_members_are_read_by_libsndfile_and_the_standard_library():
    samples = np.random.default_rng(0).integers(-32768, 32768, 500).astype(np.int16)
    member = encode_wav(samples, rate_hz=22_050)
    found, rate_hz = soundfile.read(io.BytesIO(member), dtype="int16")
    np.testing.assert_array_equal(found, samples)
    with wave.open(io.BytesIO(member)) as file:
        assert file.getparams()[:4] == (1, 2, 22_050, 500)
        assert file.readframes(500) == samples.tobytes()
    assert rate_hz == 22_050


def hostile_wavs() -> dict[str, bytes]:
    good = encode_wav(np.arange(100, dtype=np.int16), rate_hz=16_000)
    stereo, lying = bytearray(good), bytearray(good)
    stereo[22] = 2
    lying[40:44] = b"\xff\xff\xff\xff"
    return {
        "empty": b"",
        "header cut": good[:40],
        "content cut": good[:-2],
        "odd": good[:-1],
        "longer": good + b"\x00\x00",
        "stereo": bytes(stereo),
        "size of 4 GiB": bytes(lying),
        "rate of 4 GHz": good[:24] + b"\xff\xff\xff\xff" + good[28:],
        "garbage": b"x" * 200,
    }


@pytest.mark.parametrize("name", hostile_wavs())
def test_bytes_of_another_form_than_wav_are_corrupt(name):
    with pytest.raises(CorruptError):
        decode_wav(hostile_wavs()[name])


TIMES = st.floats(-1e6, 1e6)
IDS = st.integers(0, 2**31)
EVENTS = st.builds(TimedText, TIMES, st.text(st.characters(exclude_categories=["Cs"])))
TOKENS = st.lists(st.tuples(IDS, TIMES, TIMES)).map(lambda rows: list(zip(*rows, strict=True)))
TEXTS = st.builds(
    lambda tokens, events: SegmentText(
        **dict(zip(("ids", "time_s", "event_s"), tokens, strict=False)), events=tuple(events)
    ),
    TOKENS,
    st.lists(EVENTS),
)


@given(text=TEXTS)
def test_text_comes_back_exactly_and_is_plain_json(text):
    member = encode_text(text)
    assert decode_text(member) == text
    values = json.loads(member.decode())
    assert values["ids"] == list(text.ids)
    assert values["time_s"] == list(text.time_s)
    assert values["event_s"] == list(text.event_s)
    assert [e["text"] for e in values["events"]] == [e.text for e in text.events]


def member_with(**changes: object) -> bytes:
    values = {"ids": [], "time_s": [], "event_s": [], "events": []}
    return json.dumps({**values, **changes}).encode()


def one_token(token: object = 1, time_s: object = 0.0, event_s: object = 0.0) -> bytes:
    return member_with(ids=[token], time_s=[time_s], event_s=[event_s])


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"garbage",
        b"\xff\xfe\xfd",
        b"[]",
        b"null",
        b"3",
        b"[" * 200_000,
        b'{"ids":' * 100_000,
        member_with(ids=None),
        member_with(ids=[1], time_s=[], event_s=[0.0]),
        member_with(ids=[1], time_s=[0.0]),
        one_token(True),
        one_token(-1),
        one_token(1.5),
        member_with(ids="a", time_s="b", event_s="c"),
        one_token(1, "1"),
        one_token(1, float("nan")),
        one_token(1, 0.0, float("inf")),
        one_token(1, 10**400),
        member_with(events={}) + b"x",
        member_with(events=[3]),
        member_with(events=[{"time_s": 0}]),
        member_with(events=[{"time_s": "0", "text": ""}]),
        member_with(events=[{"time_s": 10**400, "text": ""}]),
    ],
    ids=lambda member: member[:40].decode("latin1"),
)
def test_json_of_another_form_than_text_is_corrupt(member):
    with pytest.raises(CorruptError, match="not a text member"):
        decode_text(member)
