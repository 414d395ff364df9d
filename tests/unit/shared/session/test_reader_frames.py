"""Every stored frame is the nearest by presentation time, in videos whose frames show their time.

Each frame shows 16 blocks, black or white: the bits of its time in milliseconds. Shards are built
from the videos by the real job and decoded by stock readers (tarfile, PyAV); the time that a
stored frame shows is compared with the nearest encoded time, found in plain Python.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
from helpers.oracles import build, open_indexes, slow_nearest, tar_members, tiny_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from shared.recipe import Recipe

BLOCKS, SIDE = 4, 24
TICKS_PER_MS = 90
STEP_S = 0.2
"""Distance of stored frames, and so the largest error that is not masked."""


# --- videos that say their time ---------------------------------------------------------------


def draw_time(time_ms: int) -> np.ndarray:
    """Draw a time as a picture, RGB uint8."""
    bits = [(time_ms >> i) & 1 for i in range(BLOCKS * BLOCKS)]
    blocks = np.array(bits, dtype=np.uint8).reshape(BLOCKS, BLOCKS) * 255
    return np.repeat(np.kron(blocks, np.ones((SIDE, SIDE), np.uint8))[:, :, None], 3, axis=2)


def read_time_ms(picture: np.ndarray) -> int:
    """Read the time that a picture of any size shows; its blocks must be distinct."""
    side = picture.shape[0] // BLOCKS
    middle = slice(side // 4, side - side // 4)
    blocks = picture.mean(axis=2).reshape(BLOCKS, side, BLOCKS, side)[:, middle, :, middle]
    levels = blocks.mean(axis=(1, 3)).ravel()
    assert (np.abs(levels - 127.5) > 60).all(), levels
    return sum(int(level > 127.5) << i for i, level in enumerate(levels))


def write_clock_video(
    path: Path,
    times_ms: Sequence[int],
    *,
    codec: str = "libx264",
    params: str = "keyint=30:bframes=3:b-adapt=0",
    container: str = "mp4",
    muxer: dict[str, str] | None = None,
) -> None:
    """Write frames that show their own times; negative times show 65536 more."""
    base = Fraction(1, 1000 * TICKS_PER_MS)
    name = "x264-params" if codec == "libx264" else "x265-params"
    options = {"crf": "20", name: params}
    with av.open(str(path), "w", format=container, options=muxer or {}) as output:
        stream = output.add_stream(codec, rate=30, options=options)
        stream.width = stream.height = BLOCKS * SIDE
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        for time_ms in times_ms:
            frame = av.VideoFrame.from_ndarray(draw_time(time_ms % 65536), format="rgb24")
            frame.pts, frame.time_base = time_ms * TICKS_PER_MS, base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def cut_by_edit_list(path: Path, start_ms: int) -> None:
    """Start a video in the middle of a group without re-encoding it, as editors do.

    The frames before the start are still in the file, but hidden.
    """
    content = io.BytesIO(path.read_bytes())
    with av.open(content) as source, av.open(str(path), "w", format="mp4") as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        shift = int(start_ms / 1000 / stream.time_base)
        source.seek(shift, stream=stream)
        for packet in source.demux(stream):
            if packet.pts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                output.mux(packet)


def turn_by_flag(path: Path) -> None:
    """Set the flag in the track header that turns the picture a quarter clockwise."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, 8.3.2, version 0
    one = 1 << 16
    struct.pack_into(">9i", content, place, 0, one, 0, -one, 0, 0, BLOCKS * SIDE * one, 0, 1 << 30)
    path.write_bytes(content)


def at_rate(rate_hz: float, seconds: float = 6.0) -> list[int]:
    return [round(i * 1000 / rate_hz) for i in range(round(seconds * rate_hz))]


def at_random(seed: int, low_ms: int = 4, high_ms: int = 120, seconds: float = 6.0) -> list[int]:
    gaps = np.random.default_rng(seed).integers(low_ms, high_ms, 2000)
    times = [0, *np.cumsum(gaps).tolist()]
    return [t for t in times if t < seconds * 1000]


@dataclass(frozen=True)
class Video:
    """How a video is made, and which of its frames are visible."""

    times_ms: list[int]
    how: dict[str, Any] = field(default_factory=dict)
    cut_ms: int | None = None
    turns: int = 0

    def write(self, path: Path) -> None:
        write_clock_video(path, self.times_ms, **self.how)
        if self.cut_ms is not None:
            cut_by_edit_list(path, self.cut_ms)
        if self.turns:
            turn_by_flag(path)

    @property
    def shown_ms(self) -> list[int]:
        """Times of the frames that a player shows; its clock begins with the first."""
        return [t for t in self.times_ms if t >= max(0, self.cut_ms or 0)]


GAP = [t for t in at_rate(30, 8) if not 2500 < t < 4300]
CLOSED = "keyint=12:min-keyint=12:scenecut=0"
VIDEOS = {
    "constant rate": Video(at_rate(30)),
    "rate of a headset": Video(at_rate(90, 3)),
    "slower than the grid": Video(at_rate(3.3)),
    "variable rate": Video(at_random(0)),
    "variable rate, pyramids of B-frames": Video(
        at_random(1), {"params": "keyint=24:bframes=7:b-adapt=0:b-pyramid=normal"}
    ),
    "variable rate, open groups": Video(
        at_random(2), {"params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:b-adapt=0"}
    ),
    "variable rate, closed groups": Video(at_random(3), {"params": f"{CLOSED}:bframes=3"}),
    "variable rate, no B-frames": Video(at_random(4), {"params": f"{CLOSED}:bframes=0"}),
    "one group": Video(at_random(5), {"params": "keyint=infinite:bframes=3"}),
    "hevc": Video(
        at_random(6), {"codec": "libx265", "params": "keyint=20:bframes=4:log-level=none"}
    ),
    "matroska": Video(at_random(7), {"container": "matroska"}),
    "fragments": Video(at_random(8), {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    "transport stream": Video(at_random(9), {"container": "mpegts"}),
    "late start": Video([t + 730 for t in at_random(10)]),
    "hidden beginning": Video(
        [t - 310 for t in at_rate(100 / 3)], {"params": f"{CLOSED}:bframes=0"}
    ),
    "cut in a group by an edit list": Video(
        at_random(11), {"params": "keyint=40:min-keyint=40:bframes=3"}, cut_ms=1234
    ),
    "turned by a flag": Video(at_random(12), turns=1),
    "a hole": Video(GAP),
}


# --- what the shards hold ----------------------------------------------------------------------


def clock_recipe(codec: str = "mjpeg") -> Recipe:
    """Return a recipe of one-second segments at 5 frames a second, one per shard."""
    video = {"size": 32, "fit": "stretch", "codec": codec, "rate_hz": 1 / STEP_S}
    return tiny_recipe(video=video, shard={"target_bytes": 2**16})


def decode_member(name: str, content: bytes) -> list[np.ndarray]:
    """Decode a video member with NumPy or PyAV."""
    if name.endswith(".npy"):
        return list(np.load(io.BytesIO(content)))
    with av.open(io.BytesIO(content), format="mjpeg") as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


def stored_frames(out: Path, side: str = "left") -> Iterator[tuple[float, np.ndarray, float]]:
    """Yield (grid time, picture, error_s of the index) of every frame of a set."""
    for shard, index in open_indexes(out):
        for name, content in tar_members(out / f"{shard}.vision_{side}.tar").items():
            pictures = decode_member(name, content)
            (row,) = (r for r in range(index.num_samples) if name.startswith(index.key(r)))
            start_s = float(index.arrays["segment"][row])
            errors_s = index.arrays[f"vision_{side}.error_s"][row]
            assert len(pictures) == len(errors_s) == 5
            for i, (picture, error_s) in enumerate(zip(pictures, errors_s, strict=True)):
                yield start_s + i * STEP_S, picture, float(error_s)


def check_frames(out: Path, video: Video, side: str = "left") -> tuple[int, int]:
    """Compare every stored frame with the list of times; count shown and masked frames."""
    times_s = [(t - video.shown_ms[0]) / 1000 for t in video.shown_ms]
    shown = masked = 0
    for grid_s, picture, error_s in stored_frames(out, side):
        best_s = times_s[slow_nearest(times_s, grid_s)] - grid_s
        if np.isnan(error_s):
            assert abs(best_s) > STEP_S - 1e-6, f"masked at {grid_s:g} s"
            masked += 1
            continue
        found_s = (read_time_ms(np.rot90(picture, video.turns)) - video.shown_ms[0]) / 1000
        assert abs(found_s - grid_s) == pytest.approx(abs(best_s), abs=1e-6), f"at {grid_s:g} s"
        assert error_s == pytest.approx(found_s - grid_s, abs=2e-6)
        assert abs(error_s) <= STEP_S + 1e-6
        shown += 1
    return shown, masked


@pytest.mark.parametrize("name", VIDEOS)
def test_every_stored_frame_is_the_nearest_by_presentation_time(name: str, tmp_path: Path) -> None:
    video = VIDEOS[name]
    (tmp_path / "in" / "one").mkdir(parents=True)
    video.write(tmp_path / "in" / "one" / "vision_left.mp4")
    build(tmp_path / "in", tmp_path / "out", clock_recipe())
    shown, masked = check_frames(tmp_path / "out", video)
    duration_s = (video.shown_ms[-1] - video.shown_ms[0]) / 1000
    lost = 5 if name == "a hole" else 0  # a segment of nothing is not stored
    assert shown + masked + lost >= int(duration_s / STEP_S)
    assert masked <= 5  # after the end, or at the edges of the hole


def test_the_hole_in_a_video_is_masked_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "in" / "one").mkdir(parents=True)
    VIDEOS["a hole"].write(tmp_path / "in" / "one" / "vision_left.mp4")
    build(tmp_path / "in", tmp_path / "out", clock_recipe())
    found = {round(t, 3): error_s for t, _, error_s in stored_frames(tmp_path / "out")}
    # The last frame before it is at 2.5 s, the first after it at 4.3 s: 2.6, 2.7, 4.2 s are near.
    assert [t for t, error_s in found.items() if np.isnan(error_s)] == [2.8, 4.0]
    assert not [t for t in found if 3.0 <= t < 4.0]  # this segment has not one frame


def test_raw_frames_are_the_nearest_too(tmp_path: Path) -> None:
    (tmp_path / "in" / "one").mkdir(parents=True)
    VIDEOS["variable rate"].write(tmp_path / "in" / "one" / "vision_left.mp4")
    build(tmp_path / "in", tmp_path / "out", clock_recipe("raw"))
    assert check_frames(tmp_path / "out", VIDEOS["variable rate"])[0] > 25


def test_two_cameras_of_other_rates_and_groups_are_each_nearest(tmp_path: Path) -> None:
    videos = {"left": VIDEOS["rate of a headset"], "right": VIDEOS["variable rate, open groups"]}
    (tmp_path / "in" / "one").mkdir(parents=True)
    for side, video in videos.items():
        video.write(tmp_path / "in" / "one" / f"vision_{side}.mp4")
    build(tmp_path / "in", tmp_path / "out", clock_recipe())
    for side, video in videos.items():
        assert check_frames(tmp_path / "out", video, side)[0] >= 15


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps_ms=st.lists(st.integers(1, 400), min_size=3, max_size=40),
    b_frames=st.integers(0, 5),
    keyint=st.integers(1, 20),
)
def test_any_times_give_the_nearest_frames(
    gaps_ms: list[int], b_frames: int, keyint: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    params = f"keyint={keyint}:min-keyint=1:bframes={b_frames}:b-adapt=0"
    video = Video([0, *np.cumsum(gaps_ms).tolist()], {"params": params})
    (folder / "in" / "one").mkdir(parents=True)
    video.write(folder / "in" / "one" / "vision_left.mp4")
    build(folder / "in", folder / "out", clock_recipe())
    assert check_frames(folder / "out", video)[0] > 0
