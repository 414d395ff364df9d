"""Pictures are upright and have the shape that the file declares, against a NumPy oracle."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest

from shared.media.video import read_frames, read_video_track
from shared.streams import VideoDefaults

if TYPE_CHECKING:
    from pathlib import Path

HEIGHT, WIDTH = 96, 160
ORIENTATIONS = [
    *((a, 0, 0, d) for a, d in product((1, -1), repeat=2)),
    *((0, b, c, 0) for b, c in product((1, -1), repeat=2)),
]
"""Elements a, b, c, d of a display matrix: all eight."""


def asymmetric() -> np.ndarray:
    """A picture that no turn or reflection leaves as it is."""
    picture = np.full((HEIGHT, WIDTH, 3), 40, dtype=np.uint8)
    picture[:32, :48] = (220, 40, 40)
    picture[-32:, :80] = (40, 220, 40)
    picture[32:64, -48:] = (40, 40, 220)
    return picture


def write_picture(
    path: Path,
    *,
    matrix: tuple[int, int, int, int] | None = None,
    codec_aspect: Fraction | None = None,
    container: str = "mp4",
    codec: str = "libx264",
) -> None:
    with av.open(str(path), "w", format=container) as output:
        options = {"crf": "4"} if codec == "libx264" else {"q": "2"}
        stream = output.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if codec_aspect is not None:
            stream.codec_context.sample_aspect_ratio = codec_aspect
        if matrix is not None:
            a, b, c, d = (element << 16 for element in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(asymmetric(), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def read_picture(path: Path, **keys: object) -> np.ndarray:
    track = read_video_track(path)
    return dict(read_frames(path, track, [1], spec=VideoDefaults(**keys)))[1].astype(float)


def moved(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Move every pixel as a display matrix says (ISO/IEC 14496-12, 6.2.2)."""
    a, b, c, d = matrix
    down, right = np.mgrid[: picture.shape[0], : picture.shape[1]]
    x, y = a * right + c * down, b * right + d * down
    turned = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1, 3), dtype=np.uint8)
    turned[y - y.min(), x - x.min()] = picture
    return turned


def scaled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sample the middle of each target pixel, float [height, width, 3]."""
    rows = ((np.arange(height) + 0.5) * picture.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * picture.shape[1] / width).astype(int)
    return picture[rows][:, columns].astype(float)


def fitted(picture: np.ndarray, fit: str, size: int, *, aspect: float = 1.0) -> np.ndarray:
    """Fit a picture whose pixels are `aspect` times as wide as high into a square."""
    height, width = picture.shape[0], picture.shape[1] * aspect
    if fit == "stretch":
        return scaled(picture, size, size)
    scale = (max if fit == "crop" else min)(size / height, size / width)
    whole = scaled(picture, round(height * scale), round(width * scale))
    canvas = np.zeros((size, size, 3))
    rows, columns = whole.shape[:2]
    if fit == "crop":
        top, left = (rows - size) // 2, (columns - size) // 2
        return whole[top : top + size, left : left + size]
    top, left = (size - rows) // 2, (size - columns) // 2
    canvas[top : top + rows, left : left + columns] = whole
    return canvas


def assert_alike(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 6  # edges of the areas are smoothed


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_each_orientation_is_shown_upright(
    matrix: tuple[int, int, int, int], fit: str, tmp_path: Path
) -> None:
    write_picture(tmp_path / "a.mp4", matrix=matrix)
    found = read_picture(tmp_path / "a.mp4", size=64, fit=fit)
    assert_alike(found, fitted(moved(asymmetric(), matrix), fit, 64))
    others = [fitted(moved(asymmetric(), m), fit, 64) for m in ORIENTATIONS if m != matrix]
    assert min(np.abs(found - other).mean() for other in others) > 12


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(4, 3)])
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_pixels_that_are_not_square_are_shown_in_their_shape(
    aspect: Fraction, fit: str, container: str, tmp_path: Path
) -> None:
    write_picture(tmp_path / "a.mp4", codec_aspect=aspect, container=container)
    found = read_picture(tmp_path / "a.mp4", size=64, fit=fit)
    assert_alike(found, fitted(asymmetric(), fit, 64, aspect=float(aspect)))


def test_wide_pixels_are_widened_before_the_picture_is_turned(tmp_path: Path) -> None:
    matrix = (0, 1, -1, 0)
    write_picture(tmp_path / "a.mp4", matrix=matrix, codec_aspect=Fraction(2))
    found = read_picture(tmp_path / "a.mp4", size=64, fit="pad")
    wide = np.repeat(asymmetric(), 2, axis=1)
    assert_alike(found, fitted(moved(wide, matrix), "pad", 64))


@pytest.mark.parametrize("aspect", [Fraction(1, 200), Fraction(200)])
def test_an_absurd_shape_of_pixels_is_ignored(aspect: Fraction, tmp_path: Path) -> None:
    write_picture(tmp_path / "a.mp4", codec_aspect=aspect)
    assert read_video_track(tmp_path / "a.mp4").pixel_aspect == 1.0
