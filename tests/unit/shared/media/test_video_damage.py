"""Pictures that damage reaches are left out, the same ones wherever decoding begins."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import MediaError
from shared.media.video import read_frames, read_video_track
from shared.streams import VideoDefaults

if TYPE_CHECKING:
    from pathlib import Path

NUM_FRAMES, HEIGHT, WIDTH, GROUP = 60, 96, 128, 12
SMALL = VideoDefaults(size=16, fit="stretch")

CLOSED = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
VIDEOS = {
    "h264": ("libx264", {"x264-params": CLOSED}, "mp4"),
    "h264 open groups": ("libx264", {"x264-params": f"{CLOSED}:open-gop=1"}, "mp4"),
    "h264 refresh": ("libx264", {"x264-params": "keyint=12:intra-refresh=1:bframes=0"}, "mp4"),
    "h264 in a transport stream": ("libx264", {"x264-params": CLOSED}, "mpegts"),
    "hevc": ("libx265", {"x265-params": f"{CLOSED}:open-gop=0:log-level=none"}, "mp4"),
    "vp9": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, "matroska"),
    "av1": ("libsvtav1", {"g": "12", "preset": "12"}, "mp4"),
    "mpeg4": ("mpeg4", {"g": "12", "bf": "2"}, "mp4"),
}


def write_blocks(path: Path, codec: str, options: dict[str, str], container: str) -> None:
    """Write drifting colored blocks, so that no picture is what others predict."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    field = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    field += rng.integers(0, 40, field.shape, dtype=np.uint8)
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(NUM_FRAMES):
            picture = np.ascontiguousarray(field[i : i + HEIGHT, i : i + WIDTH])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())


def read(path: Path, requested: list[int] | range | None = None) -> dict[int, np.ndarray]:
    track = read_video_track(path)
    requested = range(len(track.pts)) if requested is None else requested
    return dict(read_frames(path, track, requested, spec=SMALL))


def packets_of(path: Path) -> list[tuple[int, int]]:
    """Place and length of each packet in the file's order."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    paths = {}
    for name, (codec, options, container) in VIDEOS.items():
        paths[name] = folder / name
        write_blocks(paths[name], codec, options, container)
    return paths


def damage(content: bytes, kind: str, rng: random.Random) -> bytes:
    """Change a file's bytes as disks, copies and radios do."""
    changed = bytearray(content)
    start = rng.randrange(len(content) // 20, len(content) * 9 // 10)
    length = rng.choice([300, 1000, 4096])
    if kind == "zeros":
        changed[start : start + length] = bytes(len(changed[start : start + length]))
    elif kind == "bits":
        for place in rng.choices(range(start, min(start + 200, len(changed))), k=rng.randint(1, 9)):
            changed[place] ^= 1 << rng.randrange(8)
    else:
        other = rng.randrange(len(content) // 20, len(content) * 9 // 10)
        one, two = changed[start : start + 300], changed[other : other + 300]
        changed[start : start + len(two)], changed[other : other + len(one)] = two, one
    return bytes(changed)


@pytest.mark.parametrize("name", VIDEOS)
def test_every_frame_of_a_clean_video_is_read(name: str, videos: dict[str, Path]) -> None:
    track = read_video_track(videos[name])
    assert not track.is_damaged.any()
    assert list(read(videos[name])) == list(range(NUM_FRAMES))


@pytest.mark.parametrize("name", VIDEOS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.sets(st.integers(0, NUM_FRAMES - 1), min_size=1, max_size=6).map(sorted))
def test_any_frames_of_a_clean_video_have_the_bits_of_all(
    name: str, wanted: list[int], videos: dict[str, Path]
) -> None:
    whole, found = read(videos[name]), read(videos[name], wanted)
    assert list(found) == wanted
    assert all((found[i] == whole[i]).all() for i in wanted)


@pytest.mark.parametrize("name", VIDEOS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_frames_that_are_left_out_do_not_depend_on_what_is_requested(
    name: str, data: st.DataObject, videos: dict[str, Path], tmp_path: Path
) -> None:
    seed, kind = data.draw(st.integers(0, 9999)), data.draw(st.sampled_from(["zeros", "bits"]))
    path = tmp_path / "damaged"
    path.write_bytes(damage(videos[name].read_bytes(), kind, random.Random(seed)))
    try:
        whole = read(path)
    except MediaError:
        return
    count = len(read_video_track(path).pts)
    for _ in range(3):
        frames = st.sets(st.integers(0, count - 1), min_size=1, max_size=8)
        requested = sorted(data.draw(frames))
        found = read(path, requested)
        assert sorted(found) == [i for i in requested if i in whole]


@pytest.mark.parametrize("name", VIDEOS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 9999))
def test_no_picture_behind_a_zeroed_block_is_read(
    name: str, seed: int, videos: dict[str, Path], tmp_path: Path
) -> None:
    path, clean = tmp_path / "damaged", read(videos[name])
    path.write_bytes(damage(videos[name].read_bytes(), "zeros", random.Random(seed)))
    try:
        found = read(path)
    except MediaError:
        return
    if read_video_track(path).pts.tolist() == read_video_track(videos[name]).pts.tolist():
        wrong = [i for i in found if (found[i] != clean[i]).any()]
        assert wrong == []


@pytest.mark.parametrize(
    ("name", "position", "lost"),
    [
        ("h264", 13, range(12, 24)),  # the P-picture behind the keyframe: all to the next keyframe
        ("h264", 24, range(24, 36)),
        ("hevc", 24, range(24, 36)),
        ("vp9", 26, range(26, 36)),
        ("av1", 24, range(24, 36)),
        ("h264 refresh", 30, range(30, 60)),  # nothing after it starts anew
    ],
)
def test_damage_reaches_to_the_next_keyframe(
    name: str, position: int, lost: range, videos: dict[str, Path], tmp_path: Path
) -> None:
    start, length = packets_of(videos[name])[position]
    content = bytearray(videos[name].read_bytes())
    content[start + length // 3 : start + length] = bytes(length - length // 3)
    (tmp_path / "damaged").write_bytes(content)
    found = read(tmp_path / "damaged")
    left_out = sorted(set(range(NUM_FRAMES)) - set(found))
    assert left_out[-1] == lost[-1]
    assert set(left_out) <= set(lost)
    assert len(left_out) >= len(lost) - 1  # the keyframe before the P-picture is whole


def test_a_picture_that_no_other_refers_to_keeps_its_damage(
    videos: dict[str, Path], tmp_path: Path
) -> None:
    path = videos["h264"]
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        heads = [bytes(p)[4] for p in packets]
    position = next(i for i in range(14, NUM_FRAMES) if not heads[i] & 0x60)
    packet = packets[position]
    content = bytearray(path.read_bytes())
    for place in range(packet.pos + 8, packet.pos + packet.size):
        content[place] ^= 0x55
    (tmp_path / "damaged").write_bytes(content)
    track = read_video_track(tmp_path / "damaged")
    frame = int(np.flatnonzero(track.positions == position)[0])
    assert sorted(set(range(NUM_FRAMES)) - set(read(tmp_path / "damaged"))) == [frame]


def test_an_interrupted_transport_stream_is_damaged_at_the_gap(
    videos: dict[str, Path], tmp_path: Path
) -> None:
    content = videos["h264 in a transport stream"].read_bytes()
    start = len(content) // 2 // 188 * 188
    (tmp_path / "cut.ts").write_bytes(content[:start] + content[start + 20 * 188 :])
    track = read_video_track(tmp_path / "cut.ts")
    found = read(tmp_path / "cut.ts")
    keyframes = np.flatnonzero(track.keyframes)
    lost = [i for i in range(len(track.pts)) if i not in found]
    assert lost
    assert lost[-1] + 1 in {*keyframes.tolist(), len(track.pts)}


def copy_without(path: Path, out: Path, position: int) -> None:
    """Copy an MP4 file without one packet, as recorders do whose queue is full."""
    with av.open(str(path)) as source, av.open(str(out), "w", format="mp4") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(source.streams.video[0]) if p.size]
        for packet in packets[:position] + packets[position + 1 :]:
            packet.stream = stream
            output.mux(packet)


@pytest.mark.parametrize("position", [13, 14, 17, 25, 31])
@pytest.mark.parametrize("name", ["h264", "h264 open groups", "h264 refresh", "hevc"])
def test_pictures_that_refer_to_a_lost_frame_are_not_read(
    name: str, position: int, videos: dict[str, Path], tmp_path: Path
) -> None:
    path, clean = videos[name], read(videos[name])
    whole = read_video_track(path)
    copy_without(path, tmp_path / "short", position)
    track = read_video_track(tmp_path / "short")
    shift_s = whole.times_s[0] - track.times_s[0] + (whole.origin_s - track.origin_s)
    frames = np.round((track.times_s + shift_s) * 30).astype(int).tolist()
    found = read(tmp_path / "short")
    assert [frames[i] for i in found if (found[i] != clean[frames[i]]).any()] == []
    assert len(found) > 11


def test_a_lost_frame_that_no_other_refers_to_damages_none(
    videos: dict[str, Path], tmp_path: Path
) -> None:
    with av.open(str(videos["h264"])) as container:
        heads = [bytes(p)[4] for p in container.demux(container.streams.video[0]) if p.size]
    position = next(i for i in range(14, NUM_FRAMES) if not heads[i] & 0x60)
    copy_without(videos["h264"], tmp_path / "short", position)
    assert len(read(tmp_path / "short")) == NUM_FRAMES - 1
