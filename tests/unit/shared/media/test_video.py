"""Decoding only what the wanted frames need gives the bits of decoding everything by PyAV."""

from __future__ import annotations

from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.media.video import decode_frames, frames_to_restart, read_video_track

if TYPE_CHECKING:
    from pathlib import Path

NUM_FRAMES = 72
WIDTH, HEIGHT = 80, 64

CLOSED = "keyint=12:min-keyint=12:scenecut=0"
VIDEOS = {
    "no B-frames": ("libx264", {"x264-params": f"{CLOSED}:bframes=0"}),
    "B-frames": ("libx264", {"x264-params": f"{CLOSED}:bframes=3:b-adapt=0"}),
    "pyramid": ("libx264", {"x264-params": f"{CLOSED}:bframes=5:b-adapt=0:b-pyramid=normal"}),
    "open groups": ("libx264", {"x264-params": f"{CLOSED}:bframes=3:b-adapt=0:open-gop=1"}),
    "one long group": ("libx264", {"x264-params": "keyint=250:bframes=3:ref=4"}),
    "hidden refresh": ("libx264", {"x264-params": "keyint=24:intra-refresh=1:bframes=0"}),
    "interlaced": ("libx264", {"x264-params": f"{CLOSED}:bframes=2:tff=1"}),
    "only keyframes": ("libx264", {"x264-params": "keyint=1"}),
    "hevc": ("libx265", {"x265-params": f"{CLOSED}:bframes=3:open-gop=0:log-level=none"}),
    "hevc open groups": ("libx265", {"x265-params": f"{CLOSED}:open-gop=1:log-level=none"}),
    "mpeg4": ("mpeg4", {"g": "12", "bf": "2"}),
}


def write_moving(path: Path, codec: str, options: dict[str, str], *, first: int = 0) -> None:
    """Write drifting noise, so that no picture is what others predict."""
    rng = np.random.default_rng(0)
    field = rng.integers(0, 256, (HEIGHT + NUM_FRAMES, WIDTH + NUM_FRAMES, 3), dtype=np.uint8)
    with av.open(str(path), "w", format="matroska" if path.suffix == ".mkv" else "mp4") as output:
        stream = output.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(NUM_FRAMES):
            picture = field[i : i + HEIGHT, i // 2 : i // 2 + WIDTH] // 2 + rng.integers(0, 64)
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            frame.pts = first + i
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def decode_everything(path: Path) -> dict[int, bytes]:
    """Planes of every frame by its pts."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        return {f.pts: f.to_ndarray().tobytes() for f in container.decode(video=0)}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[int, bytes]]]:
    folder = tmp_path_factory.mktemp("videos")
    found = {}
    for name, (codec, options) in VIDEOS.items():
        path = folder / f"{name}.mp4"
        write_moving(path, codec, options)
        found[name] = (path, decode_everything(path))
    return found


@pytest.mark.parametrize("name", VIDEOS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.sets(st.integers(0, NUM_FRAMES - 1), min_size=1, max_size=9).map(sorted))
def test_wanted_frames_have_the_bits_of_decoding_everything(
    name: str, wanted: list[int], videos: dict[str, tuple[Path, dict[int, bytes]]]
) -> None:
    path, expected = videos[name]
    track = read_video_track(path)
    found = {f.pts: f.to_ndarray().tobytes() for f in decode_frames(path, track, wanted)}
    for pts in (int(track.pts[i]) for i in wanted):
        assert found[pts] == expected[pts], pts


@pytest.mark.parametrize("step", [5, 6, 7, 12, 13, 30])
@pytest.mark.parametrize("name", VIDEOS)
def test_frames_kept_at_an_even_rate_come_in_order_of_time(
    name: str, step: int, videos: dict[str, tuple[Path, dict[int, bytes]]]
) -> None:
    path, expected = videos[name]
    track, wanted = read_video_track(path), range(0, NUM_FRAMES, step)
    pts = [f.pts for f in decode_frames(path, track, wanted)]
    assert pts == sorted(pts)
    assert {int(track.pts[i]) for i in wanted} <= set(pts) <= set(expected)


def test_frames_that_follow_a_hidden_keyframe_have_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_moving(path, "libx264", {"x264-params": f"{CLOSED}:bframes=0"}, first=-5)
    expected, track = decode_everything(path), read_video_track(path)
    for wanted in ([0], [3, 6], [6, 8, 30], [66]):
        found = {f.pts: f.to_ndarray().tobytes() for f in decode_frames(path, track, wanted)}
        assert {found[int(track.pts[i])] for i in wanted} == {
            expected[int(track.pts[i])] for i in wanted
        }


@pytest.mark.parametrize(
    ("name", "wanted", "most"),
    [
        ("B-frames", range(0, 72, 6), 45),  # of 72: most B-frames are not
        ("no B-frames", range(0, 72, 6), 42),  # of 12 in a group, the last 5 are not
        ("one long group", [0, 1], 12),
        ("B-frames", [61, 66], 10),  # a later slice begins at the keyframe before it
        ("only keyframes", [5, 50], 4),
    ],
)
def test_packets_that_no_wanted_frame_needs_are_not_decoded(
    name: str,
    wanted: list[int],
    most: int,
    videos: dict[str, tuple[Path, dict[int, bytes]]],
) -> None:
    path, _ = videos[name]
    assert len(list(decode_frames(path, read_video_track(path), wanted))) <= most


@pytest.mark.parametrize("name", ["B-frames", "no B-frames", "pyramid"])
def test_damage_does_not_reach_past_the_next_restart(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_moving(path, *VIDEOS[name])
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 20, len(content) // 2, 997):
        content[place] ^= 0x08
    path.write_bytes(content)
    track = read_video_track(path)
    whole = {f.pts: f.to_ndarray().tobytes() for f in decode_frames(path, track, range(72))}
    for start in (24, 36, 48):
        wanted = range(start, NUM_FRAMES)
        alone = {f.pts: f.to_ndarray().tobytes() for f in decode_frames(path, track, wanted)}
        for pts in (int(track.pts[i]) for i in wanted):
            assert alone.get(pts) == whole.get(pts), (start, pts)


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_to_a_restart_are_those_to_the_keyframe_where_decoding_begins(
    name: str, videos: dict[str, tuple[Path, dict[int, bytes]]]
) -> None:
    track = read_video_track(videos[name][0])
    found = frames_to_restart(track, np.arange(NUM_FRAMES))
    for frame in range(NUM_FRAMES):
        key = max(i for i in range(frame + 1) if track.keyframes[i])
        is_clean = int(track.positions[key]) in track.restarts.tolist()
        assert found[frame] == (frame - key if is_clean else np.inf)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("name", "restarts"),
    [
        ("B-frames", list(range(0, 72, 12))),
        ("open groups", [0]),  # later keyframes are followed by frames that look back past them
        ("hevc", list(range(0, 72, 12))),
        ("hevc open groups", [0]),
        ("only keyframes", list(range(72))),
        ("mpeg4", []),
    ],
)
def test_restarts_are_the_idr_pictures(
    name: str, restarts: list[int], ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    write_moving(path, *VIDEOS[name])
    assert read_video_track(path).restarts.tolist() == restarts
