"""Planes by formula, decoders by stock readers, and both by real footage."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from helpers.oracles import exact_planes, exact_rgb, psnr_db
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.clock import nearest
from shared.errors import ConfigError, CorruptError
from shared.kinds.video import decode_pictures, encode_pictures
from shared.media.video import read_frames, read_video_track
from shared.media.yuv import split_planes, to_yuv420
from shared.streams import VideoDefaults

CODECS = {c: VideoDefaults(codec=c) for c in ("h264", "mjpeg", "yuv420", "raw")}
PICTURES = hnp.arrays(np.uint8, (2, 8, 12, 3))


def planes(pictures: np.ndarray) -> np.ndarray:
    count, height, width, _ = pictures.shape
    return to_yuv420(pictures, out=np.full((count, height * 3 // 2, width), 0xA5, np.uint8))


def decode(member: bytes, codec: str, layout: str, like: np.ndarray) -> np.ndarray:
    out = planes(like) if layout == "yuv420" else like.copy()
    out[...] = 0xA5
    return decode_pictures(member, spec=CODECS[codec], out=out)


def moving(count: int = 6, size: int = 64) -> np.ndarray:
    """A colored disc that moves over a ramp, uint8 [count, size, size, 3]."""
    y, x = np.mgrid[:size, :size] / size
    pictures = []
    for k in range(count):
        ramp = np.stack([x, y, (x + y) / 2], axis=2) * 150 + 50
        ramp[np.hypot(x - 0.2 - 0.1 * k, y - 0.5) < 0.2] = (220, 40, 90)
        pictures.append(ramp)
    return np.array(pictures).astype(np.uint8)


# --- planes ----------------------------------------------------------------------------------


@given(pictures=PICTURES)
def test_planes_are_those_of_the_standard_rounded(pictures):
    error = np.abs(planes(pictures) - exact_planes(pictures).clip(0, 255))
    assert error.max() <= 0.505  # weights of 16 bits


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ((0, 0, 0), (0, 128, 128)),
        ((255, 255, 255), (255, 128, 128)),
        ((255, 0, 0), (76, 85, 255)),
        ((0, 255, 0), (150, 44, 21)),
        ((0, 0, 255), (29, 255, 107)),
    ],
)
def test_pure_colors_have_the_planes_that_every_table_of_jfif_gives(color, expected):
    y, u, v = split_planes(planes(np.full((1, 4, 4, 3), color, np.uint8))[0])
    assert (set(y.flat), set(u.flat), set(v.flat)) == tuple({value} for value in expected)


def test_planes_are_packed_as_ffmpeg_packs_them():
    values = np.random.default_rng(0).integers(0, 256, (24, 16), np.uint8)
    frame = av.VideoFrame.from_ndarray(values, format="yuvj420p")
    for ours, theirs in zip(split_planes(values), frame.planes, strict=True):
        rows = np.frombuffer(theirs, np.uint8).reshape(-1, theirs.line_size)
        np.testing.assert_array_equal(ours, rows[: ours.shape[0], : ours.shape[1]])


def test_memory_that_is_not_contiguous_is_refused():
    with pytest.raises(AssertionError):
        split_planes(np.zeros((24, 32), np.uint8)[:, ::2])


# --- codecs ----------------------------------------------------------------------------------


def test_planes_come_back_exactly():
    member = encode_pictures(moving(), spec=CODECS["yuv420"])
    np.testing.assert_array_equal(decode(member, "yuv420", "yuv420", moving()), planes(moving()))
    np.testing.assert_array_equal(np.load(io.BytesIO(member)), planes(moving()))


def test_raw_pictures_become_the_planes_that_other_codecs_store():
    member = encode_pictures(moving(), spec=CODECS["raw"])
    np.testing.assert_array_equal(decode(member, "raw", "yuv420", moving()), planes(moving()))


@pytest.mark.parametrize("codec", ["h264", "mjpeg"])
def test_a_stock_reader_decodes_the_same_planes(codec):
    member = encode_pictures(moving(), spec=CODECS[codec])
    with av.open(io.BytesIO(member), format=codec) as container:
        stock = [frame.to_ndarray() for frame in container.decode(video=0)]
    np.testing.assert_array_equal(decode(member, codec, "yuv420", moving()), np.array(stock))


@pytest.mark.parametrize("codec", ["h264", "yuv420"])
def test_rgb_is_that_of_the_planes_by_the_standard(codec):
    member = encode_pictures(moving(), spec=CODECS[codec])
    expected = exact_rgb(decode(member, codec, "yuv420", moving()))
    assert np.abs(decode(member, codec, "rgb", moving()) - expected).max() <= 0.75


def test_rgb_of_jpegs_is_that_of_the_planes_up_to_libjpegs_rounding():
    member = encode_pictures(moving(), spec=CODECS["mjpeg"])
    error = decode(member, "mjpeg", "rgb", moving()) - exact_rgb(
        decode(member, "mjpeg", "yuv420", moving())
    )
    assert np.abs(error).mean() < 0.5
    assert np.abs(error).max() < 5


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", ["yuv420", "rgb"])
def test_pictures_are_written_into_the_given_memory(codec, layout):
    pictures = moving()
    one = decode(encode_pictures(pictures, spec=CODECS[codec]), codec, layout, pictures)
    slot = np.full((3, *one.shape), 0xA5, np.uint8)
    member = encode_pictures(pictures, spec=CODECS[codec])
    found = decode_pictures(member, spec=CODECS[codec], out=slot[1])
    assert np.shares_memory(found, slot)
    np.testing.assert_array_equal(slot[1], one)
    assert (slot[[0, 2]] == 0xA5).all()


@given(
    sizes=st.lists(st.tuples(st.sampled_from([32, 64]), st.integers(1, 7)), min_size=1, max_size=6),
    cuts=st.lists(st.floats(0.1, 0.9), max_size=3),
)
def test_a_member_decodes_alike_whatever_was_decoded_before(sizes, cuts):
    members = [(encode_pictures(moving(n, s), spec=CODECS["h264"]), n, s) for s, n in sizes]
    for number, (member, count, size) in enumerate(members):
        if number < len(cuts):  # a damaged member leaves nothing behind
            cut = bytearray(member)
            cut[int(cuts[number] * len(cut))] ^= 0x55
            with contextlib.suppress(CorruptError):
                decode(bytes(cut), "h264", "yuv420", moving(count, size))
        with av.open(io.BytesIO(member), format="h264") as container:
            stock = [f.to_ndarray() for f in container.decode(video=0)]
        found = decode(member, "h264", "yuv420", moving(count, size))
        np.testing.assert_array_equal(found, np.array(stock).reshape(found.shape))


@pytest.mark.parametrize("codec", CODECS)
def test_sizes_that_no_block_divides_come_back(codec):
    pictures = moving(size=68)[:, :, :60]
    found = decode(encode_pictures(pictures, spec=CODECS[codec]), codec, "yuv420", pictures)
    assert psnr_db(found, planes(pictures)) > 33


# --- H.264 -----------------------------------------------------------------------------------


def test_an_h264_member_is_one_gop_without_pictures_out_of_order():
    member = encode_pictures(moving(20), spec=CODECS["h264"])
    with av.open(io.BytesIO(member), format="h264") as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert [PictureType(f.pict_type).name for f in frames] == ["I"] + ["P"] * 19
        assert [f.key_frame for f in frames] == [True] + [False] * 19
        assert stream.codec_context.framerate == 5
        assert stream.codec_context.colorspace == 6  # SMPTE 170M, the same matrix as BT.601
        assert stream.codec_context.color_range == 2  # full


def test_an_h264_member_has_the_same_bytes_in_every_process():
    code = (
        "import sys, numpy as np; from test_yuv import CODECS, encode_pictures, moving;"
        "sys.stdout.buffer.write(encode_pictures(moving(), spec=CODECS['h264']))"
    )
    paths = [p for p in sys.path if p]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"],
        capture_output=True,
        check=True,
        cwd=__file__.rpartition("/")[0],
    )
    assert run.stdout == encode_pictures(moving(), spec=CODECS["h264"])


def test_without_x264_the_message_says_what_to_do(monkeypatch):
    class OtherBuild:
        @staticmethod
        def create(name: str, mode: str) -> None:
            raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr("shared.media.yuv.av.CodecContext", OtherBuild)
    with pytest.raises(ConfigError, match="codec: mjpeg"):
        encode_pictures(moving(), spec=CODECS["h264"])


def test_a_smaller_quantizer_is_nearer_to_the_picture():
    found = [
        psnr_db(decode(encode_pictures(moving(), spec=recipe), "h264", "rgb", moving()), moving())
        for recipe in (VideoDefaults(codec="h264", qp=qp) for qp in (10, 22, 34))
    ]
    assert found == sorted(found, reverse=True)


# --- real footage ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def footage(real_sessions) -> list[np.ndarray]:
    """The first two seconds of each real session with a left camera, as the recipe decodes them."""
    found = []
    for video in (v for s in real_sessions if (v := s / "vision_left.mp4").exists()):
        track = read_video_track(video)
        wanted = sorted({int(i) for i in nearest(track.times_s, np.arange(10) / 5)[0]})
        frames = read_frames(video, track, wanted, spec=VideoDefaults())
        found.append(np.array([picture for _, picture in frames]))
    return found


def mean_psnr_db(codec: str, footage: list[np.ndarray]) -> float:
    """PSNR of the planes' exact colors against the pictures, over sessions."""
    found = []
    for pictures in footage:
        member = encode_pictures(pictures, spec=CODECS[codec])
        colors = exact_rgb(decode(member, codec, "yuv420", pictures))
        error = np.mean((colors - pictures) ** 2)
        found.append(10 * np.log10(255**2 / error))
    return float(np.mean(found))


def test_h264_at_its_default_is_as_good_as_jpeg_at_quality_90_on_real_footage(footage):
    assert mean_psnr_db("h264", footage) == pytest.approx(mean_psnr_db("mjpeg", footage), abs=0.5)


def test_colors_of_planes_are_as_near_to_real_footage_as_those_of_libjpeg(footage):
    found = []
    for pictures in footage:
        member = encode_pictures(pictures, spec=CODECS["mjpeg"])
        found.append(psnr_db(decode(member, "mjpeg", "rgb", pictures), pictures))
    assert mean_psnr_db("mjpeg", footage) > np.mean(found) - 0.05
