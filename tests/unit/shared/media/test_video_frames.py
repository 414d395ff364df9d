"""Frame times and frames against PyAV that decodes from the first frame on."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from helpers.sessions import HEIGHT, WIDTH, brightness, write_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import MediaError
from shared.media.video import read_frames, read_video_track
from shared.streams import VideoDefaults

if TYPE_CHECKING:
    from pathlib import Path

RATE_HZ = 16_000
SMALL = VideoDefaults(size=16, fit="stretch")


VARIABLE_S = np.cumsum(np.random.default_rng(0).uniform(0.005, 0.1, 60)) - 0.005
VIDEOS = {
    "h264 with B-frames": {},
    "open groups": {"options": {"x264-params": "open-gop=1:bframes=3:keyint=12"}},
    "pyramid of B-frames": {
        "options": {"x264-params": "keyint=6:min-keyint=1:bframes=5:b-pyramid=normal:b-adapt=0"}
    },
    "groups of two": {"options": {"x264-params": "keyint=2:min-keyint=1:bframes=1:scenecut=0"}},
    "only keyframes": {"gop": 1, "b_frames": 0},
    "variable rate": {"times_s": VARIABLE_S},
    "late start": {"times_s": 5 + np.arange(60) / 30},
    "fragments": {"muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc": {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=none"}},
    "mpeg4": {"codec": "mpeg4", "ticks_per_s": 30_000},
    "matroska": {"container": "matroska", "ticks_per_s": 1000},
    "transport stream": {"container": "mpegts"},
    "mpeg1 program stream": {"codec": "mpeg1video", "container": "mpeg", "ticks_per_s": 30},
    "avi": {"codec": "mpeg4", "container": "avi", "ticks_per_s": 30, "b_frames": 0},
    "avi with B-frames": {"codec": "mpeg4", "container": "avi", "ticks_per_s": 30},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    folder = tmp_path_factory.mktemp("videos")
    made = {}
    for i, (name, how) in enumerate(VIDEOS.items()):
        path = folder / f"{i}.mp4"  # whatever it holds: recorders misname files
        made[name] = (path, write_video(path, **how))
    return made


def decode_all(path: Path) -> dict[int, np.ndarray]:
    """Every frame by its pts, decoded one after another from the first; RGB [H, W, 3]."""
    frames: dict[int, np.ndarray] = {}
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # threads conceal damage differently
        for packet in container.demux(stream):
            try:
                for frame in packet.decode():
                    frames.setdefault(frame.pts, frame.to_ndarray(format="rgb24"))
            except av.FFmpegError:
                continue
    return frames


def box_mean(picture: np.ndarray, size: int) -> np.ndarray:
    """Scaled by plain averages; its sides must be multiples of size."""
    height, width, _ = picture.shape
    boxes = picture.reshape(size, height // size, size, width // size, 3)
    return boxes.astype(np.float64).mean(axis=(1, 3))


@pytest.mark.parametrize("name", VIDEOS)
def test_frame_times_are_those_of_all_decoded_frames(
    name: str, videos: dict[str, tuple[Path, np.ndarray]]
) -> None:
    path, _ = videos[name]
    assert read_video_track(path).pts.tolist() == sorted(decode_all(path))


@pytest.mark.parametrize("name", [n for n in VIDEOS if "container" not in VIDEOS[n]])
def test_frame_times_are_those_recorded_from_the_first_frame_on(
    name: str, videos: dict[str, tuple[Path, np.ndarray]]
) -> None:
    path, times_s = videos[name]
    np.testing.assert_allclose(read_video_track(path).times_s, times_s - times_s[0], atol=2e-4)


@pytest.mark.parametrize("name", VIDEOS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.sets(st.integers(0, 57), min_size=1, max_size=4).map(sorted))
def test_wanted_frames_are_those_of_decoding_everything(
    name: str, wanted: list[int], videos: dict[str, tuple[Path, np.ndarray]]
) -> None:
    path, _ = videos[name]
    track, expected = read_video_track(path), decode_all(path)
    found = dict(read_frames(path, track, wanted, spec=SMALL))
    assert list(found) == wanted
    for index, picture in found.items():
        plain = box_mean(expected[int(track.pts[index])], 16)
        assert np.abs(picture - plain).max() < 3, index


def test_each_frame_shows_what_was_recorded_at_its_time(
    videos: dict[str, tuple[Path, np.ndarray]],
) -> None:
    path, _ = videos["variable rate"]
    found = dict(read_frames(path, read_video_track(path), range(60), spec=SMALL))
    levels = [found[i].mean() for i in range(60)]
    np.testing.assert_allclose(levels, [brightness(i) for i in range(60)], atol=6)


def test_frames_before_an_edit_list_begins_are_left_out(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", times_s=np.arange(-10, 50) / 30, b_frames=0)
    track = read_video_track(tmp_path / "a.mp4")
    assert (len(track.pts), track.times_s[0]) == (50, 0.0)
    found = dict(read_frames(tmp_path / "a.mp4", track, [0, 20], spec=SMALL))
    levels = [found[0].mean(), found[20].mean()]
    np.testing.assert_allclose(levels, [brightness(10), brightness(30)], atol=6)


@pytest.mark.parametrize(
    "name",
    ["av1_no_duration.mkv", "hevc_10bit.mp4", "mpeg1_bframes.mpg", "non_utf8_metadata.mp4"],
)
def test_real_files_give_the_frames_of_decoding_everything(
    name: str, nasty_files: dict[str, Path]
) -> None:
    path = nasty_files[f"video/{name}"]
    track, expected = read_video_track(path), decode_all(path)
    last = len(track.pts) - 1
    for wanted in ([last], [last // 2, last // 2 + 3], [0, last]):
        for index, picture in read_frames(path, track, wanted, spec=SMALL):
            wanted.remove(index)
            assert abs(picture.mean() - expected[int(track.pts[index])].mean()) < 3
        assert wanted == []


def upright(path: Path) -> np.ndarray:
    """The first frame moved pixel by pixel as the file's display matrix says; RGB [H, W, 3]."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        (matrix,) = [s for s in frame.side_data if s.type.name == "DISPLAYMATRIX"]
        a, b, _, c, d = (np.frombuffer(bytes(matrix), dtype="<i4") / 65536)[:5]
        picture = frame.to_ndarray(format="rgb24")
    down, right = np.mgrid[: picture.shape[0], : picture.shape[1]]
    x = np.round(a * right + c * down).astype(int)  # ISO/IEC 14496-12, 6.2.2
    y = np.round(b * right + d * down).astype(int)
    turned = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1, 3), dtype=np.uint8)
    turned[y - y.min(), x - x.min()] = picture
    return turned


@pytest.mark.parametrize("name", ["video/rotated_90.mov", "video/rotated_270.mov"])
def test_a_rotated_video_is_shown_upright(name: str, nasty_files: dict[str, Path]) -> None:
    path, recipe = nasty_files[name], VideoDefaults(size=64, fit="crop")
    (_, picture), *_ = read_frames(path, read_video_track(path), [0], spec=recipe)
    expected = upright(path)
    height, width = expected.shape[:2]
    top = (height - width) // 2
    square = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(expected[top : top + width]), format="rgb24"
    ).to_ndarray(width=64, height=64, interpolation="AREA")
    error = np.abs(picture.astype(float) - square).mean()
    assert height > width
    assert error < 6 < np.abs(picture[::-1, ::-1].astype(float) - square).mean()


@pytest.mark.parametrize(
    ("fit", "left", "right"), [("crop", 30, 220), ("stretch", 30, 220), ("pad", 30, 220)]
)
def test_a_wide_picture_is_cut_squeezed_or_padded(
    fit: str, left: int, right: int, tmp_path: Path
) -> None:
    half = np.full((HEIGHT, WIDTH, 3), left, dtype=np.uint8)
    half[:, WIDTH // 2 :] = right
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(half, format="rgb24")))
        output.mux(stream.encode())
    track = read_video_track(tmp_path / "a.mp4")
    recipe = VideoDefaults(size=32, fit=fit)
    ((_, picture),) = read_frames(tmp_path / "a.mp4", track, [0], spec=recipe)
    bar = 4 if fit == "pad" else 0  # 32 * (1 - 48 / 64) / 2 rows above and below
    assert picture.shape == (32, 32, 3)
    rows = picture[:, 8].mean(axis=1)
    assert [int((rows < 10).sum()), int((rows[:16] < 10).sum())] == [2 * bar, bar]
    assert abs(picture[16, 12].mean() - left) < 5
    assert abs(picture[16, 20].mean() - right) < 5


def test_frames_from_damage_to_the_next_keyframe_are_left_out(
    nasty_files: dict[str, Path],
) -> None:
    path = nasty_files["video/corrupted.mp4"]
    track, expected = read_video_track(path), decode_all(path)
    found = {i for i, _ in read_frames(path, track, range(50), spec=SMALL)}
    first_lost = min(i for i in range(50) if int(track.pts[i]) not in expected)
    assert np.flatnonzero(track.keyframes).tolist() == [0]
    assert found <= set(range(first_lost + 1))
    assert len(found) >= first_lost - 3  # those that refer to the lost one are shown before it


def test_a_video_cut_short_says_how_many_frames_its_index_promised(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", muxer={"movflags": "faststart"})
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) * 3 // 4])
    track = read_video_track(tmp_path / "a.mp4")
    assert 0 < len(track.pts) < 60
    assert track.num_lost == 60 - len(track.pts)


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"plain text that ffmpeg would draw as a picture\n" * 20,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_playlists_and_text_are_refused_as_videos(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(MediaError):
        read_video_track(tmp_path / "a.mp4")


def test_a_git_lfs_pointer_is_reported_as_one(nasty_files: dict[str, Path]) -> None:
    with pytest.raises(MediaError, match="git lfs pull"):
        read_video_track(nasty_files["video/lfs_pointer.mp4"])


def test_a_hole_in_a_video_shows_in_its_times(nasty_files: dict[str, Path]) -> None:
    track = read_video_track(nasty_files["video/vfr_gap_575ms.mp4"])
    assert np.diff(track.times_s).max() == pytest.approx(0.5754, abs=1e-3)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_raises_anything_but_a_media_error(
    data: st.DataObject, videos: dict[str, tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    path = shutil.copyfile(videos[data.draw(st.sampled_from(sorted(videos)))][0], tmp_path / "a")
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at : at + 3] = data.draw(st.binary(min_size=1, max_size=3))
    path.write_bytes(content)
    try:
        track = read_video_track(path)
        for _, picture in read_frames(path, track, range(len(track.pts)), spec=SMALL):
            assert picture.shape == (16, 16, 3)
    except MediaError:
        return
