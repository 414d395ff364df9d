"""Repeated pictures of videos, against the pictures that were encoded and a slow search of runs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.sessions import write_video
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, shift

from shared.media.repeats import (
    _DENSE,
    FrameChanges,
    are_same_pictures,
    dense_runs,
    find_repeats,
    is_same_view,
    judge_changes,
)
from shared.media.video import read_frames, read_video_track
from shared.streams import VideoDefaults

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LIMIT_S = 2.0
FRAMES = 180
"""Of each video, 6 s at 30 Hz."""


def make_texture(height: int = 96, width: int = 320) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(height, width))
    smooth = gaussian_filter(noise, 1.5)
    return 128 + 60 * smooth / smooth.std()


TEXTURE = make_texture()


def picture(step: int, *, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Return a view of the texture that pans by one pixel per step."""
    view = TEXTURE[:, step : step + 128]
    if noise:
        view = view + np.random.default_rng((step, seed)).normal(scale=noise, size=view.shape)
    return np.clip(np.round(view), 0, 255).astype(np.uint8)


def frozen(first: int, last: int, *, every: int = 1, noise: float = 0.0) -> list[np.ndarray]:
    """Return pictures of which `first` to `last` are the same; each is shown `every` frames."""
    shown = [i // every for i in range(first)] + [first // every] * (last - first + 1)
    shown += [i // every for i in range(last + 1, FRAMES)]
    return [picture(step, noise=noise) for step in shown]


def runs_of(path: Path, limit_s: float = LIMIT_S) -> list[tuple[int, int, str | None]]:
    track = read_video_track(path)
    found = find_repeats(path, track, limit_s=limit_s)
    return [
        (run.first, run.last, run.color)
        for run in found
        if track.times_s[run.last] - track.times_s[run.first] + 1 / 30 >= limit_s - 1e-6
    ]


ENCODINGS: dict[str, dict] = {
    "x264": {},
    "x264, coarse": {"options": {"crf": "35"}, "gop": 30},
    "x264, one keyframe": {"gop": 999},
    "x264, fine": {"options": {"qp": "10"}, "gop": 60},
    "x264, intra only": {"gop": 1, "options": {"crf": "23"}, "b_frames": 0},
    "x265": {"codec": "libx265", "options": {"x265-params": "log-level=none"}, "gop": 60},
    "av1": {"codec": "libsvtav1", "gop": 2, "options": {"preset": "12"}, "b_frames": 0},
    "mpeg4": {
        "codec": "mpeg4",
        "options": {"qmin": "4", "qmax": "4"},
        "b_frames": 0,
        "ticks_per_s": 30,
    },
    "mjpeg": {"codec": "mjpeg", "options": {"qmin": "4", "qmax": "4"}, "b_frames": 0},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("first", "last"), [(60, 150), (0, 90), (100, 179), (0, 179)])
def test_a_picture_that_repeats_is_found(
    encoding: str, first: int, last: int, tmp_path: Path
) -> None:
    path = tmp_path / ("a.avi" if encoding == "mjpeg" else "a.mp4")
    write_video(path, pictures=frozen(first, last, noise=2.0), **ENCODINGS[encoding])
    ((start, stop, color),) = runs_of(path)
    assert color is None
    assert abs(start - first) <= 2
    assert abs(stop - last) <= 2


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["pans", "tripod", "short", "half rate"])
def test_pictures_of_a_camera_are_none(encoding: str, kind: str, tmp_path: Path) -> None:
    pictures = {
        "pans": [picture(i) for i in range(FRAMES)],
        "tripod": [picture(0, noise=4.0, seed=i) for i in range(FRAMES)],
        "short": frozen(60, 100),
        "half rate": frozen(0, 0, every=3),
    }[kind]
    if kind == "tripod" and encoding == "x264, coarse":
        pytest.skip("no noise is left: its pictures are the same")
    path = tmp_path / ("a.avi" if encoding == "mjpeg" else "a.mp4")
    write_video(path, pictures=pictures, **ENCODINGS[encoding])
    assert runs_of(path) == []


def test_a_video_of_few_pictures_a_second_freezes_too(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", pictures=frozen(60, 149, every=3), gop=30)
    ((start, stop, _),) = runs_of(tmp_path / "a.mp4")
    assert (start, stop) == (60, 149)


def test_runs_are_those_of_the_decoded_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    write_video(path, pictures=frozen(31, 117), **ENCODINGS["mjpeg"])
    spec = VideoDefaults(size=(96, 128))
    decoded = [p for _, p in read_frames(path, read_video_track(path), range(FRAMES), spec=spec)]
    is_same = [np.array_equal(a, b) for a, b in itertools.pairwise(decoded)]
    first = is_same.index(True)
    last = len(is_same) - is_same[::-1].index(True)
    assert all(is_same[first:last])
    assert runs_of(path) == [(first, last, None)]


@pytest.mark.parametrize(
    ("level", "noise", "color"), [(0, 0.0, "black"), (4, 1.5, "black"), (255, 0.0, "white")]
)
@pytest.mark.parametrize("gop", [12, 60, 250, 1])
def test_pictures_of_one_color_are_found_though_they_have_noise(
    level: int, noise: float, color: str, gop: int, tmp_path: Path
) -> None:
    pictures = [picture(i, noise=2.0) for i in range(FRAMES)]
    for i in range(80, 170):
        draw = np.random.default_rng(i).normal(level, noise, pictures[i].shape)
        pictures[i] = np.clip(np.round(draw), 0, 255).astype(np.uint8)
    write_video(tmp_path / "a.mp4", pictures=pictures, gop=gop, b_frames=0)
    ((start, stop, found),) = runs_of(tmp_path / "a.mp4")
    assert found == color
    assert abs(start - 80) <= 2
    assert abs(stop - 169) <= 2


def test_another_color_in_each_frame_is_no_stillness(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", times_s=np.arange(120) / 30)
    assert runs_of(tmp_path / "a.mp4") == []


def slow_dense_runs(flags: Sequence[bool], window: int) -> list[tuple[int, int]]:
    covered = [False] * len(flags)
    for start in range(len(flags) - window + 1):
        if sum(flags[start : start + window]) >= _DENSE * window:
            covered[start : start + window] = [True] * window
    runs, start = [], None
    for i, is_covered in enumerate([*covered, False]):
        if is_covered and start is None:
            start = i
        elif not is_covered and start is not None:
            marked = [k for k in range(start, i) if flags[k]]
            runs.append((marked[0], marked[-1]))
            start = None
    return runs


@given(st.lists(st.booleans() | st.just(True), max_size=60), st.integers(2, 12))
def test_dense_runs_are_those_of_a_slow_search(flags: list[bool], window: int) -> None:
    assert dense_runs(np.array(flags, dtype=np.bool_), window) == slow_dense_runs(flags, window)


@given(st.integers(0, 40), st.integers(8, 60), st.integers(0, 40), st.floats(0.5, 20))
def test_changes_below_what_is_usual_are_a_run(
    before: int, length: int, after: int, usual: float
) -> None:
    mean = np.concatenate([np.full(before + 1, usual), np.zeros(length), np.full(after, usual)])
    changes = FrameChanges(
        first=7,
        mean=mean,
        peak=4 * mean,
        top=4 * mean,
        drift=np.full(len(mean), np.nan),
        lag=16,
        of_keys=np.full(len(mean), np.nan),
        level=np.full(len(mean), np.nan),
        detail=1.0,
    )
    (run,) = judge_changes(changes, 8, usual_mean=usual, usual_peak=4 * usual)
    assert (run.first, run.last) == (7 + before, 7 + before + length)


@pytest.mark.parametrize("pixels", [0.25, 0.5, 1.0, 3.0])
def test_two_eyes_are_no_copies(pixels: float) -> None:
    noise = np.random.default_rng(1).normal(scale=2, size=TEXTURE.shape)
    other = shift(TEXTURE, (0, pixels), order=3, mode="nearest") + noise
    pair = TEXTURE.astype(np.uint8), np.clip(other, 0, 255).astype(np.uint8)
    assert not is_same_view([pair] * 5)


@pytest.mark.parametrize("options", [{"crf": "18"}, {"crf": "30"}, {"b": "300000"}])
def test_a_copy_that_was_encoded_again_is_found(options: dict[str, str], tmp_path: Path) -> None:
    pictures = [picture(i, noise=2.0) for i in range(60)]
    write_video(tmp_path / "a.mp4", pictures=pictures)
    write_video(tmp_path / "b.mp4", pictures=pictures, options=options, gop=50)
    write_video(tmp_path / "c.mp4", pictures=[picture(i + 1, noise=2.0) for i in range(60)])
    a, b, c = ((p, read_video_track(p)) for p in sorted(tmp_path.glob("*.mp4")))
    assert are_same_pictures(a, b)
    assert not are_same_pictures(a, c)


@pytest.mark.parametrize("noise", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9"])
def test_a_still_scene_with_camera_noise_is_no_repeat(
    codec: str, noise: float, tmp_path: Path
) -> None:
    options = {"libx264": {"crf": "26"}, "libx265": {"x265-params": "log-level=none"}}
    path = tmp_path / "a.mp4"
    rng = np.random.default_rng(3)
    pictures = [
        np.clip(picture(min(i, 30)) + rng.normal(0, noise, picture(0).shape), 0, 255).astype(
            np.uint8
        )
        for i in range(150)
    ]
    coded = options.get(codec, {"cpu-used": "8", "deadline": "realtime", "crf": "33", "b": "0"})
    write_video(path, pictures=pictures, codec=codec, options=coded, gop=30)
    assert runs_of(path) == []
    frozen = [*pictures[:31], *([pictures[30]] * 119)]
    write_video(path, pictures=frozen, codec=codec, options=coded, gop=30)
    assert len(runs_of(path)) == 1


def test_a_small_copy_of_another_codec_is_found(tmp_path: Path) -> None:
    pictures = [picture(i, noise=2.0)[:64, :96] for i in range(60)]
    write_video(tmp_path / "a.mp4", pictures=pictures, options={"crf": "23"})
    options = {"x265-params": "log-level=none:crf=32", "preset": "ultrafast"}
    write_video(tmp_path / "b.mp4", pictures=pictures, codec="libx265", options=options)
    a, b = ((p, read_video_track(p)) for p in sorted(tmp_path.glob("*.mp4")))
    assert are_same_pictures(a, b)


def test_a_dark_video_is_named_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pictures = [np.clip(picture(i) * 0.06 + rng.normal(0, 1.2, picture(0).shape), 0, 255)
                for i in range(FRAMES)]  # fmt: skip
    write_video(tmp_path / "a.mp4", pictures=[p.astype(np.uint8) for p in pictures], gop=30)
    found = find_repeats(tmp_path / "a.mp4", read_video_track(tmp_path / "a.mp4"), limit_s=LIMIT_S)
    assert [b.first > a.last for a, b in itertools.pairwise(found)] == [True] * (len(found) - 1)
