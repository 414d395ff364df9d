"""The main track of odd containers, and what is said of files that are no whole video."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from av.stream import Disposition
from helpers.sessions import brightness, write_video

from shared.errors import MediaError
from shared.media.video import read_frames, read_video_track
from shared.streams import VideoDefaults

if TYPE_CHECKING:
    from pathlib import Path

SMALL = VideoDefaults(size=16, fit="stretch")
KEY = "00112233445566778899aabbccddeeff"


def gray(level: float, size: tuple[int, int] = (64, 48)) -> av.VideoFrame:
    picture = np.full((size[1], size[0], 3), level, dtype=np.uint8)
    return av.VideoFrame.from_ndarray(picture, format="rgb24")


def encoded(codec: str, size: tuple[int, int]) -> bytes:
    """One picture as JPEG or PNG."""
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.time_base = *size, Fraction(1)
    context.pix_fmt = "yuvj420p" if codec == "mjpeg" else "rgb24"
    packets = context.encode(gray(250, size).reformat(format=context.pix_fmt))
    return b"".join(bytes(packet) for packet in [*packets, *context.encode(None)])


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content) + 8, name) + content


def add_cover(path: Path, picture: bytes, *, first: bool) -> None:
    """Put a cover picture into the tags of an MP4 file, before or after its tracks."""
    content = path.read_bytes()  # moov is at the end, so no offset changes
    start = content.rindex(b"moov") - 4
    moov = content[start + 8 :]
    kind = 14 if picture.startswith(b"\x89PNG") else 13
    data = box(b"data", struct.pack(">II", kind, 0) + picture)
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"meta", bytes(4) + handler + box(b"ilst", box(b"covr", data)))
    head, tail = (moov[:108], moov[108:]) if first else (moov, b"")  # after mvhd
    path.write_bytes(content[:start] + box(b"moov", head + box(b"udta", tags) + tail))


def levels(path: Path, frames: list[int]) -> list[float]:
    track = read_video_track(path)
    return [float(p.mean()) for _, p in read_frames(path, track, frames, spec=SMALL)]


@pytest.mark.parametrize("size", [(32, 32), (1600, 1200)])
@pytest.mark.parametrize("codec", ["mjpeg", "png"])
@pytest.mark.parametrize("first", [True, False])
def test_a_cover_picture_is_not_the_video(
    codec: str, size: tuple[int, int], first: bool, tmp_path: Path
) -> None:
    write_video(tmp_path / "a.mp4")
    add_cover(tmp_path / "a.mp4", encoded(codec, size), first=first)
    with av.open(str(tmp_path / "a.mp4")) as container:
        flags = [bool(s.disposition & Disposition.attached_pic) for s in container.streams.video]
        assert flags == [first, not first]
    track = read_video_track(tmp_path / "a.mp4")
    assert (len(track.pts), track.codec, track.num_tracks) == (60, "h264", 1)
    expected = [brightness(3), brightness(30)]
    np.testing.assert_allclose(levels(tmp_path / "a.mp4", [3, 30]), expected, atol=6)


def write_tracks(
    path: Path, tracks: list[tuple[int, int, int]], container: str, default: int = 0
) -> None:
    """Write tracks of (width, frames, gray level)."""
    with av.open(str(path), "w", format=container) as output:
        streams = []
        for number, (width, _, _) in enumerate(tracks):
            stream = output.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
            stream.disposition = Disposition.default if number == default else Disposition(0)
            streams.append(stream)
        for stream, (width, count, level) in zip(streams, tracks, strict=True):
            for _ in range(count):
                output.mux(stream.encode(gray(level, (width, 48))))
            output.mux(stream.encode())


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi"])
@pytest.mark.parametrize(
    ("tracks", "default", "chosen"),
    [
        ([(32, 6, 30), (64, 60, 200)], 0, 200),  # a preview comes first
        ([(64, 60, 200), (32, 60, 30)], 1, 200),
        ([(64, 40, 30), (64, 40, 200)], 0, 30),
    ],
)
def test_the_largest_track_is_read(
    tracks: list[tuple[int, int, int]], default: int, chosen: int, container: str, tmp_path: Path
) -> None:
    write_tracks(tmp_path / "a.mp4", tracks, container, default)
    assert read_video_track(tmp_path / "a.mp4").num_tracks == 2
    assert abs(levels(tmp_path / "a.mp4", [2])[0] - chosen) < 6


def test_of_equal_tracks_the_default_one_is_read(tmp_path: Path) -> None:
    write_tracks(tmp_path / "a.mp4", [(64, 40, 30), (64, 40, 200)], "matroska", default=1)
    assert abs(levels(tmp_path / "a.mp4", [2])[0] - 200) < 6


def test_a_picture_of_one_frame_is_not_the_video(tmp_path: Path) -> None:
    write_tracks(tmp_path / "a.mp4", [(1920, 1, 30), (32, 20, 200)], "mp4")
    assert len(read_video_track(tmp_path / "a.mp4").pts) == 20


RAW = {
    "h264": ("libx264", "h264"),
    "hevc": ("libx265", "hevc"),
    "mpeg4": ("mpeg4", "m4v"),
    "mpeg2video": ("mpeg2video", "mpeg2video"),
}


def write_raw(path: Path, codec: str, rate: int) -> None:
    encoder, muxer = RAW[codec]
    options = {"x265-params": "log-level=none:bframes=2"} if codec == "hevc" else {}
    with av.open(str(path), "w", format=muxer) as output:
        stream = output.add_stream(encoder, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size, stream.codec_context.max_b_frames = 12, 2
        for i in range(60):
            output.mux(stream.encode(gray(brightness(i))))
        output.mux(stream.encode())


@pytest.mark.parametrize("rate", [24, 30, 50])
@pytest.mark.parametrize("codec", RAW)
def test_an_elementary_stream_has_its_own_rate_in_order_of_presentation(
    codec: str, rate: int, tmp_path: Path
) -> None:
    write_raw(tmp_path / "a.mp4", codec, rate)
    track = read_video_track(tmp_path / "a.mp4")
    assert (track.codec, track.assumed_rate_hz) == (codec, rate)
    np.testing.assert_allclose(track.times_s, np.arange(60) / rate, atol=1e-9)
    for frames in (range(60), [0, 17, 41], [59]):
        expected = [brightness(i) for i in frames]
        np.testing.assert_allclose(levels(tmp_path / "a.mp4", list(frames)), expected, atol=10)


def test_damage_of_an_elementary_stream_does_not_move_later_frames(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.mp4", "h264", 30)
    with av.open(str(tmp_path / "a.mp4")) as container:
        sizes = [p.size for p in container.demux(container.streams.video[0]) if p.size]
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    start = sum(sizes[:13])
    for place in range(start + 6, start + sizes[13]):
        content[place] ^= 0x55
    (tmp_path / "a.mp4").write_bytes(content)
    track = read_video_track(tmp_path / "a.mp4")
    found = dict(read_frames(tmp_path / "a.mp4", track, range(60), spec=SMALL))
    assert len(track.pts) == 60
    later = [*range(12), *range(24, 60)]  # the place of a lost frame is not known exactly
    assert set(later) <= set(found)
    np.testing.assert_allclose(
        [found[i].mean() for i in later], [brightness(i) for i in later], atol=6
    )


def reason_of(path: Path) -> str:
    with pytest.raises(MediaError) as error:
        read_video_track(path)
    return str(error.value).removeprefix(f"{path}: ")


def test_an_elementary_stream_without_a_rate_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w", format="obu") as output:
        stream = output.add_stream("libsvtav1", rate=30, options={"preset": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(4):
            output.mux(stream.encode(gray(90, (64, 64))))
        output.mux(stream.encode())
    assert reason_of(tmp_path / "a.mp4").startswith("is a bare av1 stream without times")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (encoded("mjpeg", (64, 48)), "a JPEG picture"),
        (encoded("png", (64, 48)), "a PNG picture"),
        (b"GIF89a" + bytes(50), "a GIF picture"),
        (b"\0\0\0\x18ftypheic" + bytes(400), "an HEIF picture"),
        (b"\0\0\0\x18ftypavif" + bytes(400), "an HEIF picture"),
        (b"<!DOCTYPE html>\n<title>404</title>", "HTML"),
        (b'\xef\xbb\xbf{"error": "quota"}\n', "JSON"),
        (b"<?xml version='1.0'?><Error/>", "XML"),
        ("Die Datei fehlt \u00fc".encode() * 400, "plain text"),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(30), "a WAV sound"),
        (b"PK\x03\x04" + bytes(30), "a ZIP archive"),
    ],
)
def test_another_kind_of_file_is_named(content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    assert reason_of(tmp_path / "a.mp4").startswith(f"is {kind}, not a video; fix: ")


def test_a_file_of_zeros_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(bytes(100_000))
    assert reason_of(tmp_path / "a.mp4").startswith("begins with zeros only")


def test_a_file_whose_index_was_never_written_is_named(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: content.rindex(b"moov") - 4])
    assert "moov box) is missing" in reason_of(tmp_path / "a.mp4")


def test_an_index_that_is_cut_is_named(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    start = content.rindex(b"moov") - 4
    (tmp_path / "a.mp4").write_bytes(content[: start + 200])
    length = len(content) - start
    expected = f"cut off: its last part (moov) should have {length} bytes, but 200 are there"
    assert reason_of(tmp_path / "a.mp4").startswith(expected)


def test_a_cut_fragment_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", muxer={"movflags": "frag_keyframe+empty_moov"})
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: content.rindex(b"mdat") + 30])
    track = read_video_track(tmp_path / "a.mp4")
    assert 30 < len(track.pts) < 60
    assert track.cut is not None
    assert track.cut.startswith("cut off: its last part (mdat)")


def test_a_whole_file_has_no_cut_box(tmp_path: Path) -> None:
    for number, flags in enumerate(["faststart", "frag_keyframe+empty_moov", "use_metadata_tags"]):
        write_video(tmp_path / f"{number}.mp4", muxer={"movflags": flags})
        assert read_video_track(tmp_path / f"{number}.mp4").cut is None
    content = (tmp_path / "0.mp4").read_bytes()
    (tmp_path / "0.mp4").write_bytes(content + bytes(1000))  # padding
    assert read_video_track(tmp_path / "0.mp4").cut is None


def test_an_encrypted_video_is_named(tmp_path: Path) -> None:
    scheme = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": KEY, "encryption_kid": KEY}
    write_video(tmp_path / "a.mp4", muxer=scheme)
    assert reason_of(tmp_path / "a.mp4").startswith("is encrypted; fix: decrypt it")


def test_a_file_with_sound_only_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16_000, layout="mono")
        samples = np.zeros((1, 4096), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    (tmp_path / "a.mp4").write_bytes(buffer.getvalue())
    assert reason_of(tmp_path / "a.mp4").startswith("contains no video track")


def test_fragments_before_a_cut_header_are_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", muxer={"movflags": "frag_keyframe+empty_moov"})
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: content.rindex(b"moof") + 100])
    track = read_video_track(tmp_path / "a.mp4")
    assert 24 <= len(track.pts) < 60
    assert track.cut is not None
    assert track.cut.startswith("cut off: its last part (moof)")
    expected = [brightness(i) for i in (0, 13, 23)]
    np.testing.assert_allclose(levels(tmp_path / "a.mp4", [0, 13, 23]), expected, atol=6)


@pytest.mark.parametrize(("container", "part"), [("matroska", "Segment"), ("avi", "RIFF")])
def test_a_cut_container_is_named_and_the_rest_is_read(
    container: str, part: str, tmp_path: Path
) -> None:
    write_video(tmp_path / "a.mp4", container=container, codec="mpeg4", ticks_per_s=30)
    assert read_video_track(tmp_path / "a.mp4").cut is None
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) * 2 // 3])
    track = read_video_track(tmp_path / "a.mp4")
    assert 10 < len(track.pts) < 60
    assert track.num_lost or (track.cut or "").startswith(f"cut off: its last part ({part})")


def test_a_recording_in_matroska_that_was_never_finished_is_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", container="matroska", ticks_per_s=1000, muxer={"live": "1"})
    track = read_video_track(tmp_path / "a.mp4")
    assert (len(track.pts), track.cut) == (60, None)


def test_an_index_with_a_wrong_number_of_samples_is_named(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    place = content.rindex(b"stsz") + 12
    content[place : place + 4] = struct.pack(">I", 600)
    (tmp_path / "a.mp4").write_bytes(content)
    assert reason_of(tmp_path / "a.mp4").startswith(
        "its index is wrong: none of its 60 frames is found"
    )


def test_an_index_that_a_cut_copy_lacks_is_named(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: content.index(b"mdat") + 400])
    expected = "its index (the moov box) is missing, as it is cut off: its last part (mdat) should"
    assert reason_of(tmp_path / "a.mp4").startswith(expected)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_picture_beside_a_video_of_matroska_is_not_read(is_first: bool, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    path = tmp_path / "b.mp4"
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(
        str(path), "w", format="matroska"
    ) as output:  # fmt: skip
        copied = None if is_first else output.add_stream_from_template(source.streams.video[0])
        cover = output.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
        copied = copied or output.add_stream_from_template(source.streams.video[0])
        gray = np.full((240, 320, 3), 90, dtype=np.uint8)
        output.mux(cover.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        output.mux(cover.encode())
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                output.mux(packet)
    track = read_video_track(path)
    assert (len(track.pts), track.codec) == (60, "h264")


def test_the_clock_of_an_encoder_is_no_frame_rate(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", container="h264", ticks_per_s=90_000)
    with pytest.raises(MediaError, match="declares no frame rate; fix: re-encode it with its rate"):
        read_video_track(tmp_path / "a.mp4")
    write_video(tmp_path / "a.mp4", container="h264", ticks_per_s=30)
    assert read_video_track(tmp_path / "a.mp4").stop_s == pytest.approx(2.0)
