"""What validate says of videos: the second, what is wrong, and a fix that helps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from helpers.sessions import brightness, write_video
from helpers.validation import validated

from preprocess.validate.report import check_session
from shared.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from preprocess.validate.report import ValidationReport

RECIPE = Recipe.model_validate({"streams": {"eye": {"kind": "video", "file": "eye.mp4"}}})


@pytest.fixture
def session(tmp_path: Path) -> Path:
    (tmp_path / "ann").mkdir()
    return tmp_path / "ann"


def check(session: Path) -> ValidationReport:
    return check_session(session, recipe=RECIPE).report


def drop_first_keyframe(path: Path, out: Path) -> None:
    """Copy a video from its second packet on."""
    with av.open(str(path)) as source, av.open(str(out), "w", format="mp4") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(source.streams.video[0]) if p.size]
        for packet in packets[1:]:
            packet.stream = stream
            output.mux(packet)


def test_frames_before_the_first_keyframe_are_masked_without_a_wrong_advice(session: Path) -> None:
    options = {"x264-params": "keyint=15:min-keyint=15:scenecut=0:bframes=0"}
    write_video(session / "whole.mp4", options=options)
    drop_first_keyframe(session / "whole.mp4", session / "eye.mp4")
    report = check(session)
    assert report.errors == ()
    (message,) = (m for m in report.warnings if "keyframe" in m)
    assert message.startswith(
        "eye.mp4 0.00-0.47 s: frames before the first keyframe can't be decoded: 14 "
    )
    assert "masked" in message
    assert "damaged" not in message
    assert report.stats["streams"]["eye"]["frames_undecoded"] == 14
    assert not any("-0.00" in m or "e-07" in m for m in report.warnings)


def test_a_zeroed_block_is_found_though_only_stretches_are_decoded(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.validate.probe.STRETCH_FRAMES", 1)
    rng = np.random.default_rng(0)
    with av.open(str(session / "eye.mp4"), "w") as output:
        options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"}
        stream = output.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(200):
            noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        output.mux(stream.encode())
    with av.open(str(session / "eye.mp4")) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
    content = bytearray((session / "eye.mp4").read_bytes())
    content[packets[83].pos + 90 : packets[83].pos + 500] = bytes(410)
    (session / "eye.mp4").write_bytes(content)
    (message,) = check(session).errors
    expected = "eye.mp4 2.77-3.00 s: frames are damaged or follow damage or a lost frame"
    assert message.startswith(expected)


def test_several_tracks_are_counted_and_the_one_that_is_read_is_named(session: Path) -> None:
    with av.open(str(session / "eye.mp4"), "w") as output:
        streams = []
        for width in (32, 64):
            stream = output.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
            streams.append(stream)
        for stream in streams:
            for i in range(30):
                picture = np.full((48, stream.width, 3), brightness(i), dtype=np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode())
    report = check(session)
    assert report.errors == ()
    (message,) = report.warnings
    expected = "eye.mp4: contains 2 video tracks; the largest is read: h264 64x48, 30 frames; fix: "
    assert message.startswith(expected)


def test_the_assumed_times_of_an_elementary_stream_are_said(session: Path) -> None:
    write_video(session / "eye.mp4", container="h264", ticks_per_s=30)
    (message,) = check(session).warnings
    expected = "eye.mp4: is a bare h264 stream without times; frames are placed at the 30 frames"
    assert message.startswith(expected)
    assert '"stretch": {"eye": FACTOR}' in message


def test_what_is_masked_between_two_frames_far_apart_is_said(session: Path) -> None:
    write_video(session / "eye.mp4", times_s=[0.0, 8.0], b_frames=0)
    (message,) = check(session).warnings
    assert message.startswith("eye.mp4: only 2 frames in 16.00 s; 95% of its pictures at 5 Hz are")


def test_a_cut_fragment_is_said_beside_what_is_read(session: Path) -> None:
    write_video(session / "eye.mp4", muxer={"movflags": "frag_keyframe+empty_moov"})
    content = (session / "eye.mp4").read_bytes()
    (session / "eye.mp4").write_bytes(content[: content.rindex(b"mdat") + 30])
    report = check(session)
    messages = [*report.errors, *report.warnings]
    assert any(" s: cut off: its last part (mdat) should have " in m for m in messages)
    assert report.stats["streams"]["eye"]["frames"] > 30


def test_a_codec_is_shown_by_its_own_name(session: Path) -> None:
    with av.open(str(session / "eye.mp4"), "w") as output:
        stream = output.add_stream("libsvtav1", rate=30, options={"preset": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(4):
            gray = np.full((64, 64, 3), 90, dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        output.mux(stream.encode())
    assert check(session).stats["streams"]["eye"]["codec"] == "av1"


def test_a_single_file_gets_the_same_words(tmp_path: Path) -> None:
    (tmp_path / "scene.mp4").write_bytes(b"<!DOCTYPE html><title>Not found</title>")
    (checked,) = validated(tmp_path / "scene.mp4", recipe=RECIPE)
    assert checked.report.errors[0].startswith("scene.mp4: is HTML, not a video; fix: ")
