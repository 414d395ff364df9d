"""Pictures and sound of the report page against slow references."""

from __future__ import annotations

import base64
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import simplejpeg
import soundfile
from helpers.report_pages import panel, render_page
from helpers.sessions import (
    write_video,
)

from preprocess.validate.media import read_envelope, read_thumbnails
from shared.media.video import read_video_track
from shared.page import TimeAxis
from shared.streams import AudioStream, VideoStream

if TYPE_CHECKING:
    from pathlib import Path


def test_thumbnails_are_jpegs_of_the_frames_at_their_times(session: Path) -> None:
    pictures = panel(render_page(session), "vision_left").all("image")
    greys = []
    for picture in pictures:
        head, _, content = picture.attributes["href"].partition(",")
        assert head == "data:image/jpeg;base64"
        greys.append(float(simplejpeg.decode_jpeg(base64.b64decode(content)).mean()))
    times_s = (np.arange(10) + 0.5) * 0.2  # nearest of 30 frames a second, each of its own grey
    frames = [min(range(60), key=lambda i: (abs(i / 30 - t), i)) for t in times_s]
    assert greys == pytest.approx([30 + (i * 37) % 200 for i in frames], abs=4)


def test_the_envelope_is_that_of_every_channel_and_the_level_its_rms(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    samples = generator.uniform(-0.5, 0.5, (48_000, 2))
    samples[12_345, 1] = 0.9
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    envelope = read_envelope(
        tmp_path / "a.wav", AudioStream(file="a.wav"), duration_s=3.0, axis=TimeAxis(0.0, 6.0)
    )
    assert len(envelope.low) == 500
    bins = samples.astype(np.float32).reshape(500, 96 * 2)
    np.testing.assert_array_equal(envelope.low, bins.min(axis=1))
    np.testing.assert_array_equal(envelope.high, bins.max(axis=1))
    groups = bins.astype(np.float64).reshape(125, -1)  # 4 bins of 6 ms are the first over 20 ms
    level_db = 10 * np.log10(np.square(groups).mean(axis=1))
    np.testing.assert_allclose(envelope.level_db, np.repeat(level_db, 4), atol=1e-9)
    assert not envelope.is_clipped.any()


def test_thumbnails_are_the_same_with_and_without_seeking(
    tmp_path: Path,
) -> None:
    times_s = write_video(tmp_path / "a.mp4", times_s=np.arange(90) / 30, gop=10)
    shutil.copyfile(tmp_path / "a.mp4", tmp_path / "b.mp4")
    found = [
        read_thumbnails(
            tmp_path / name,
            read_video_track(tmp_path / name),
            axis=TimeAxis(0.0, float(times_s[-1])),
            spec=VideoStream(file="a.mp4"),
        )
        for name in ("a.mp4", "b.mp4")
    ]
    through = read_thumbnails(
        tmp_path / "b.mp4",
        replace(read_video_track(tmp_path / "b.mp4"), is_indexed=False),
        axis=TimeAxis(0.0, float(times_s[-1])),
        spec=VideoStream(file="a.mp4"),
    )
    assert found[0] == found[1] == through
    assert all(t.state == "shown" for t in through)
