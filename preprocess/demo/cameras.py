"""Render the demo world's two cameras: a lit room, a glowing ball, and the creature's own arm.

Coordinates are meters: x to the right, y forward, z up; the origin is between the cameras. A
camera is a pinhole at ``(x, 0, 0)`` that points along y. It maps a point to column
``W / 2 + f (x - x_camera) / y`` and row ``H / 2 - f z / y``, with focal length f in pixels. So a
point at depth y is ``f B / y`` columns farther right in the left picture than in the right one,
where B is the baseline (Hartley & Zisserman 2004, section 6.1).

The ball is a lamp. Its color tints the whole room, so it can be seen at any distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    Float32Array = npt.NDArray[np.float32]
    Float64Array = npt.NDArray[np.float64]
    ImageArray = npt.NDArray[np.uint8]

BASELINE_M = 0.065
"""Distance of the two cameras: that of human eyes."""

FOCAL_PER_WIDTH = 0.8
"""Focal length in image widths: a field of view of 64 degrees."""

BALL_RADIUS_M = 0.12
FLOOR_M, CEILING_M, SIDE_M, BACK_M = -0.6, 0.9, 1.0, 2.4
"""Planes of the room: z, z, +-x and y."""

AMBIENT = 0.40
GLOW = 1.0
"""Brightness of the room, and of the ball's light at the ball."""

GLOW_RANGE_M2 = 0.5
"""Squared distance at which the ball's light is half as bright."""

CHECKER_M = 0.4
SKIN_RGB = (205.0, 160.0, 130.0)
FOREARM_RADIUS_M, FINGER_RADIUS_M = 0.03, 0.011
NEAREST_M = 0.1
"""Nearer points of the arm are drawn at this distance; they are outside the picture anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that moves, for N frames, in meters.

    Attributes:
        ball_m: [N, 3] center of the ball.
        ball_rgb: [N, 3] color of the ball, each channel in [0, 1].
        elbow_m: [N, 3].
        wrist_m: [N, 3].
        knuckles_m: [N, 5, 3] roots of the fingers.
        tips_m: [N, 5, 3] tips of the fingers.
    """

    ball_m: Float64Array
    ball_rgb: Float64Array
    elbow_m: Float64Array
    wrist_m: Float64Array
    knuckles_m: Float64Array
    tips_m: Float64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """A pinhole camera in the room, with the parts of its picture that never change.

    Pictures are planar, [3, H, W], until they are complete: numpy is three times slower along an
    axis of length 3.

    Attributes:
        x_m: x coordinate of the camera.
        size: height and width in pixels.
        rays: [3, H, W] unit vectors through the centers of the pixels.
        points_m: [3, H, W] points at which the rays hit the room.
        squares_m2: [H, W] squared length of `points_m`.
        albedo: [3, H, W] color of the room at these points, 0 to 255.
        is_floor: [H, W] 1 if the point is on the floor, else 0.
    """

    x_m: float
    size: int
    rays: Float32Array
    points_m: Float32Array
    squares_m2: Float32Array
    albedo: Float32Array
    is_floor: Float32Array

    @property
    def focal_px(self) -> float:
        """Focal length in pixels."""
        return FOCAL_PER_WIDTH * self.size


def make_camera(x_m: float, *, size: int, paint: Float64Array) -> Camera:
    """Make a camera at ``(x_m, 0, 0)``.

    Args:
        x_m: x coordinate of the camera.
        size: height and width of the pictures in pixels.
        paint: [4, 3] RGB of floor, ceiling, side walls and back wall.
    """
    focal_px = FOCAL_PER_WIDTH * size
    offsets = (np.arange(size) + 0.5 - size / 2) / focal_px
    rays = np.stack(np.broadcast_arrays(offsets[None, :], np.ones((size, size)), -offsets[:, None]))
    reach = np.stack(
        [
            np.where(rays[2] < 0, FLOOR_M / rays[2], np.inf),
            np.where(rays[2] > 0, CEILING_M / rays[2], np.inf),
            (np.copysign(SIDE_M, rays[0]) - x_m) / rays[0],
            np.full((size, size), BACK_M),
        ]
    )
    surface = reach.argmin(axis=0)
    points_m = rays * reach.min(axis=0) + np.array([x_m, 0.0, 0.0])[:, None, None]
    # The offset keeps rounding errors on the planes from speckling the pattern.
    parity = np.floor((points_m + 0.01) / CHECKER_M).sum(axis=0) % 2
    albedo = 255 * np.moveaxis(paint[surface], -1, 0) * (0.85 + 0.3 * parity)
    return Camera(
        x_m=x_m,
        size=size,
        rays=(rays / np.linalg.norm(rays, axis=0)).astype(np.float32),
        points_m=points_m.astype(np.float32),
        squares_m2=(points_m**2).sum(axis=0).astype(np.float32),
        albedo=albedo.astype(np.float32),
        is_floor=(surface == 0).astype(np.float32),
    )


def project(camera: Camera, points_m: Float64Array) -> Float64Array:
    """Project points [..., 3] in meters to columns and rows [..., 2] in pixels."""
    depth_m = np.maximum(points_m[..., 1], NEAREST_M)
    columns = camera.size / 2 + camera.focal_px * (points_m[..., 0] - camera.x_m) / depth_m
    rows = camera.size / 2 - camera.focal_px * points_m[..., 2] / depth_m
    return np.stack([columns, rows], axis=-1)


def render_frames(camera: Camera, scene: Scene) -> Iterator[ImageArray]:
    """Render the N pictures, RGB [H, W, 3]."""
    ball_px = project(camera, scene.ball_m)[:, None]
    # Each limb is a line: the forearm from elbow to wrist, then five fingers.
    roots_m = np.concatenate([scene.elbow_m[:, None], scene.knuckles_m], axis=1)
    ends_m = np.concatenate([scene.wrist_m[:, None], scene.tips_m], axis=1)
    roots_px, ends_px = project(camera, roots_m), project(camera, ends_m)
    px_per_m = camera.focal_px / np.maximum(scene.wrist_m[:, 1], NEAREST_M)
    limbs = ((slice(0, 1), FOREARM_RADIUS_M), (slice(1, 6), FINGER_RADIUS_M))
    for i, (ball_m, ball_rgb) in enumerate(zip(scene.ball_m, scene.ball_rgb, strict=True)):
        image = _lit_room(camera, ball_m, ball_rgb)
        _draw_ball(image, camera=camera, ball_m=ball_m, ball_rgb=ball_rgb, ball_px=ball_px[i])
        for limb, radius_m in limbs:
            _draw_capsules(image, roots_px[i, limb], ends_px[i, limb], radius_m * px_per_m[i])
        np.maximum(np.minimum(image, 255, out=image), 0, out=image)
        yield np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))


def write_video(path: Path, frames: Iterable[ImageArray], *, size: int, rate_hz: float) -> None:
    """Encode RGB frames as H.264 in MP4; the same frames give the same bytes.

    With one thread and no B-frames, the encoding does not depend on the machine's load.
    """
    rate = Fraction(rate_hz).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.options = {
            "preset": "ultrafast",
            "crf": "18",
            "g": "30",
            "bf": "0",
            "x264-params": "threads=1:lookahead-threads=1",
        }
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _lit_room(camera: Camera, ball_m: Float64Array, ball_rgb: Float64Array) -> Float32Array:
    """Render the room in its own light and the ball's, with the ball's shadow on the floor."""
    x, y, z = ball_m.astype(np.float32)
    # The squared distance to the ball plus the range, then the light.
    light: Float32Array = camera.points_m[0] * (-2 * x)
    light += camera.points_m[1] * (-2 * y)
    light += camera.points_m[2] * (-2 * z)
    light += camera.squares_m2
    light += x * x + y * y + z * z + np.float32(GLOW_RANGE_M2)
    np.divide(np.float32(GLOW * GLOW_RANGE_M2), light, out=light)
    image: Float32Array = light * ball_rgb.astype(np.float32)[:, None, None]
    image += np.float32(AMBIENT)
    image *= camera.albedo
    rows = slice(camera.size // 2, camera.size)
    gap_m2 = (camera.points_m[0, rows] - x) ** 2 + (camera.points_m[1, rows] - y) ** 2
    image[:, rows] *= 1 - 0.6 * camera.is_floor[rows] * np.exp(gap_m2 / -(BALL_RADIUS_M**2))
    return image


def _draw_ball(
    image: Float32Array,
    *,
    camera: Camera,
    ball_m: Float64Array,
    ball_rgb: Float64Array,
    ball_px: Float64Array,
) -> None:
    """Draw the ball over `image`: the pixels with rays that pass through it."""
    x, y, z = (ball_m - np.array([camera.x_m, 0.0, 0.0])).astype(np.float32)
    px_per_m = np.float32(camera.focal_px) / y
    rows, columns = _box(ball_px, 1.2 * BALL_RADIUS_M * float(px_per_m) + 2, camera.size)
    rays = camera.rays[:, rows, columns]
    along_m = rays[0] * x + rays[1] * y + rays[2] * z
    miss_m2 = np.maximum(x * x + y * y + z * z - along_m * along_m, 0)
    cover = _clip_unit(0.5 + (BALL_RADIUS_M - np.sqrt(miss_m2)) * px_per_m)
    facing = np.sqrt(np.maximum(1 - miss_m2 / BALL_RADIUS_M**2, 0))
    color = (255 * ball_rgb).astype(np.float32)[:, None, None]
    image[:, rows, columns] += cover * (color * (0.7 + 0.3 * facing) - image[:, rows, columns])


def _draw_capsules(
    image: Float32Array, starts_px: Float64Array, stops_px: Float64Array, radius_px: float
) -> None:
    """Draw K round-ended strokes between positions [K, 2] over `image`."""
    size = image.shape[-1]
    rows, columns = _box(np.concatenate([starts_px, stops_px]), radius_px + 1, size)
    starts, along = starts_px.astype(np.float32), (stops_px - starts_px).astype(np.float32)
    along_x, along_y = along[:, 0, None, None], along[:, 1, None, None]
    across_x = np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5
    across_y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5
    from_x, from_y = across_x - starts[:, 0, None, None], across_y - starts[:, 1, None, None]
    share = _clip_unit((from_x * along_x + from_y * along_y) / (along_x**2 + along_y**2 + 1e-9))
    gap2 = (from_x - share * along_x) ** 2 + (from_y - share * along_y) ** 2
    gap = np.sqrt(gap2.min(axis=0))
    cover = _clip_unit(np.float32(0.5 + radius_px) - gap)
    shade = 1 - 0.4 * np.minimum(gap / np.float32(radius_px), 1)
    skin = np.array(SKIN_RGB, dtype=np.float32)[:, None, None]
    image[:, rows, columns] += cover * (skin * shade - image[:, rows, columns])


def _clip_unit(values: Float32Array) -> Float32Array:
    """Clip to [0, 1]; much faster than np.clip for small arrays."""
    return np.maximum(np.minimum(values, 1), 0)


def _box(points_px: Float64Array, margin_px: float, size: int) -> tuple[slice, slice]:
    """Return the rows and columns of the picture within `margin_px` of points [K, 2]."""
    columns, rows = points_px.T.tolist()
    return _span(rows, margin_px, size), _span(columns, margin_px, size)


def _span(positions_px: list[float], margin_px: float, size: int) -> slice:
    """Return the pixels of one axis of the picture within `margin_px` of some positions."""
    start = min(max(math.floor(min(positions_px) - margin_px), 0), size)
    return slice(start, min(max(math.ceil(max(positions_px) + margin_px), start), size))
