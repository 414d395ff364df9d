"""Pictures as planes, and planes as bytes.

Every decoder writes into the caller's memory, in one of two layouts that it tells by the number of
dimensions:

- *yuv420*, uint8 [F, 3H/2, W]: per picture H rows of Y, then the H/2 x W/2 plane U and then V, each
  packed in H/4 rows, as OpenCV's I420 has it. ITU-R BT.601 over the full range of 0..255 with
  chroma in the middle of its four pixels, as JFIF (ITU-T T.871) has it.
- *rgb*, uint8 [F, H, W, 3].

Planes become RGB (:mod:`shared.media.yuv_numba`) as libjpeg does it: chroma is interpolated
linearly
("fancy upsampling"), which on real footage is nearer to the picture by 0.9 dB than repeating it.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import simplejpeg

from shared.errors import ConfigError, CorruptError
from shared.media.yuv_numba import planes_to_rgb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from av.video.frame import VideoFrame
    from numpy.typing import NDArray

_LUMA = (19595, 38470, 7471)
_BLUE = (-11059, -21709, 32768)
_RED = (32768, -27439, -5329)
"""Weights of R, G and B in 1/65536: JFIF's, rounded so that they add up to 1, 0 and 0."""

_JPEG_SEAM = b"\xff\xd9\xff\xd8"
"""End of one picture and begin of the next; inside a picture 0xFF is always followed by something
else."""

_JPEG_END = b"\xff\xd9"

_ACCESS_UNIT = b"\x00\x00\x00\x01\x09"
"""Access unit delimiter (ITU-T H.264, 7.3.2.4) that begins every picture; no payload holds it."""

_X264_PARAMS = (
    "keyint=infinite:scenecut=0:bframes=0:threads=1:lookahead-threads=1:aud=1:no-psy=1:no-8x8dct=1:"
    "range=pc:colormatrix=smpte170m:chromaloc=1"
)
"""One GOP, no picture out of order, one thread so that the bytes are the same everywhere."""

_EDGE_PIXELS = 64
"""Decoders round sizes up by less than this on each side."""

_NPY_HEADER_BYTES = 128
"""What np.save writes for an array of three or four dimensions."""


def to_yuv420(rgb: NDArray[np.uint8], *, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB pictures uint8 [F, H, W, 3] as planes, written into `out`, uint8 [F, 3H/2, W].

    Y is rounded to nearest; U and V are those of the mean of 2 x 2 pixels, rounded to nearest with
    halves down, so that 256 does not occur. Integers only: the same bytes on every machine.
    """
    for picture, planes in zip(rgb, out, strict=True):
        channels = np.ascontiguousarray(np.moveaxis(picture, -1, 0)).astype(np.int32)
        rows = channels[:, ::2] + channels[:, 1::2]
        quads = rows[:, :, ::2] + rows[:, :, 1::2]
        y, u, v = split_planes(planes)
        y[...] = (_weigh(channels, _LUMA) + (1 << 15)) >> 16
        middle = (128 << 18) + (1 << 17) - 1
        u[...] = (_weigh(quads, _BLUE) + middle) >> 18
        v[...] = (_weigh(quads, _RED) + middle) >> 18
    return out


def split_planes(
    planes: NDArray[np.uint8],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Views of one picture's Y [H, W], U and V [H/2, W/2] in contiguous memory [3H/2, W]."""
    assert planes.flags.c_contiguous  # else reshape copies, and what is written is lost
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    u, v = planes[height:].reshape(2, height // 2, width // 2)
    return planes[:height], u, v


def write_rgb(rgb: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Write RGB pictures uint8 [F, H, W, 3] in the layout of `out`."""
    if out.ndim == 4:
        out[...] = rgb
    else:
        to_yuv420(rgb, out=out)


def encode_jpegs(rgb: NDArray[np.uint8], *, quality: int) -> bytes:
    """RGB pictures as JPEG pictures 4:2:0, one after another.

    libjpeg rounds before it takes the mean of 2 x 2 pixels: its planes may differ from
    :func:`to_yuv420`'s by 1 before they are quantized.
    """
    return b"".join(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(picture),
            quality=quality,
            colorspace="RGB",
            colorsubsampling="420",
        )
        for picture in rgb
    )


def decode_jpegs(member: bytes, out: NDArray[np.uint8]) -> None:
    """Inverse of :func:`encode_jpegs`, in the layout of `out`.

    Raises:
        CorruptError: other bytes than pictures of `out`'s number and size.
    """
    parts = _split(member, _JPEG_SEAM, cut=2, limit=len(out) + 1)
    _require_count(len(parts), out)
    for part in parts:
        _require_jpeg(part, *_size(out))
    if out.ndim == 3:
        _write_frames(_decode("mjpeg", parts, _size(out)), out)
        return
    for part, picture in zip(parts, out, strict=True):
        try:
            simplejpeg.decode_jpeg(part, colorspace="RGB", buffer=picture)
        except ValueError as error:
            raise CorruptError(f"a picture does not decode: {error}") from error


def encode_h264(planes: NDArray[np.uint8], *, qp: int, rate_hz: float) -> bytes:
    """Planes as an H.264 byte stream (Annex B) of one GOP without B-frames, by x264.

    Every picture is one access unit that begins with its delimiter. The quantizer is constant: the
    bytes depend on no rate control in floating point.

    Raises:
        ConfigError: this ffmpeg lacks x264.
    """
    try:
        context: Any = av.CodecContext.create("libx264", "w")
    except ValueError as error:
        raise ConfigError(
            "vision.codec h264 needs an ffmpeg with x264, and this PyAV's has none; install PyAV "
            "from PyPI or set vision.codec: mjpeg"
        ) from error
    context.height, context.width = planes.shape[1] * 2 // 3, planes.shape[2]
    context.pix_fmt = "yuvj420p"
    context.framerate = Fraction(rate_hz).limit_denominator(1001)
    context.time_base = 1 / context.framerate
    context.thread_count = 1
    options = {"preset": "veryfast", "tune": "fastdecode"}
    context.options = {**options, "x264-params": f"qp={qp}:{_X264_PARAMS}"}
    packets: list[bytes] = []
    for number, picture in enumerate(planes):
        frame = av.VideoFrame.from_ndarray(picture, format="yuvj420p")
        frame.pts = number
        packets += map(bytes, context.encode(frame))
    return b"".join([*packets, *map(bytes, context.encode(None))])


def decode_h264(member: bytes, out: NDArray[np.uint8]) -> None:
    """Inverse of :func:`encode_h264`, in the layout of `out`.

    Raises:
        CorruptError: other bytes than pictures of `out`'s number and size.
    """
    if not member.startswith(_ACCESS_UNIT):
        raise CorruptError("is no H.264 stream that begins with an access unit delimiter")
    parts = _split(member, _ACCESS_UNIT, cut=0, limit=len(out) + 1)
    _require_count(len(parts), out)
    _write_frames(_decode("h264", parts, _size(out)), out)


def encode_npy(values: NDArray[np.uint8]) -> bytes:
    """A uint8 array of three or four dimensions as NumPy saves it."""
    return _npy_header(values.shape) + values.tobytes()


def check_npy_header(head: bytes, out: NDArray[np.uint8]) -> None:
    """Check the bytes before those of an array that was read straight into `out`.

    Raises:
        CorruptError: the file held another array.
    """
    if head != _npy_header(out.shape):
        raise CorruptError(f"is no npy file of pictures uint8 {out.shape}")


def decode_npy_planes(member: bytes, out: NDArray[np.uint8]) -> None:
    """Planes saved by :func:`encode_npy`, in the layout of `out`.

    Raises:
        CorruptError: other bytes than planes of `out`'s number and size.
    """
    height, width = _size(out)
    planes = _load_npy(member, (len(out), height * 3 // 2, width))
    if out.ndim == 3:
        out[...] = planes
    else:
        planes_to_rgb(planes, out)


def decode_npy_rgb(member: bytes, out: NDArray[np.uint8]) -> None:
    """RGB pictures saved by :func:`encode_npy`, in the layout of `out`.

    Raises:
        CorruptError: other bytes than pictures of `out`'s number and size.
    """
    write_rgb(_load_npy(member, (len(out), *_size(out), 3)), out)


def _weigh(channels: NDArray[np.int32], weights: tuple[int, int, int]) -> NDArray[np.int32]:
    weighed: NDArray[np.int32] = channels[0] * weights[0]
    weighed += channels[1] * weights[1]
    weighed += channels[2] * weights[2]
    return weighed


def _size(out: NDArray[np.uint8]) -> tuple[int, int]:
    """Height and width of the pictures that `out` takes."""
    return (out.shape[1], out.shape[2]) if out.ndim == 4 else (out.shape[1] * 2 // 3, out.shape[2])


def _split(member: bytes, seam: bytes, *, cut: int, limit: int) -> list[memoryview]:
    """The first `limit` pictures of a member, not copied; they part `cut` bytes into a seam."""
    view = memoryview(member)
    parts: list[memoryview] = []
    begin = 0
    while len(parts) < limit and (place := member.find(seam, begin + 1)) >= 0:
        parts.append(view[begin : place + cut])
        begin = place + cut
    return [*parts, view[begin:]] if len(parts) < limit else parts


def _require_count(count: int, out: NDArray[np.uint8]) -> None:
    if count != len(out):
        more = " or more" if count > len(out) else ""
        raise CorruptError(f"holds {count}{more} pictures, not {len(out)}")


def _require_jpeg(part: memoryview, height: int, width: int) -> None:
    """Look at a header, so that a picture of another kind costs nothing."""
    try:
        found_height, found_width, colours, subsampling = simplejpeg.decode_jpeg_header(part)
    except ValueError as error:
        raise CorruptError(f"a picture does not decode: {error}") from error
    if (found_height, found_width) != (height, width):
        raise CorruptError(f"a picture is {found_width}x{found_height}, not {width}x{height}")
    if (colours, subsampling) != ("YCbCr", "420"):
        raise CorruptError(f"a picture is {colours} {subsampling}, not YCbCr 420")
    if part[-2:] != _JPEG_END:
        raise CorruptError("a picture is cut off")


def _decode(codec: str, parts: Sequence[memoryview], size: tuple[int, int]) -> Iterator[VideoFrame]:
    """Frames of pictures, by a decoder of their own: nothing is left in it of other members."""
    context: Any = av.CodecContext.create(codec, "r")
    packet: Any = av.Packet  # takes any buffer, its stub says bytes
    context.thread_count = 1
    max_pixels = (size[0] + _EDGE_PIXELS) * (size[1] + _EDGE_PIXELS)
    context.options = {"err_detect": "explode", "max_pixels": str(max_pixels)}
    try:
        for part in parts:
            yield from context.decode(packet(part))
        yield from context.decode(None)
    except av.FFmpegError as error:
        raise CorruptError(f"a picture does not decode: {error.strerror}") from error


def _write_frames(frames: Iterator[VideoFrame], out: NDArray[np.uint8]) -> None:
    """Write frames in the layout of `out`; each must be planes of its size, and none may lack."""
    height, width = _size(out)
    own = None if out.ndim == 3 else np.empty((1, height * 3 // 2, width), np.uint8)
    count = 0
    for frame in frames:
        if (frame.height, frame.width, frame.format.name) != (height, width, "yuvj420p"):
            found = f"{frame.width}x{frame.height} {frame.format.name}"
            raise CorruptError(f"a picture is {found}, not {width}x{height} yuvj420p")
        if count == len(out) or frame.is_corrupt:
            raise CorruptError("a picture is damaged or one too many")
        planes = out[count] if own is None else own[0]
        for plane, wanted in zip(frame.planes, split_planes(planes), strict=True):
            rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
            wanted[...] = rows[: wanted.shape[0], : wanted.shape[1]]
        if own is not None:
            planes_to_rgb(own, out[count : count + 1])
        count += 1
    _require_count(count, out)


def _load_npy(member: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The array of an npy member, a read-only view.

    The header is compared and not parsed: NumPy's parser evaluates it as Python.
    """
    size = _NPY_HEADER_BYTES + math.prod(shape)
    if len(member) != size or not member.startswith(_npy_header(shape)):
        raise CorruptError(f"is no npy file of pictures uint8 {shape}")
    return np.frombuffer(member, dtype=np.uint8, offset=_NPY_HEADER_BYTES).reshape(shape)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Header of a uint8 array in NPY format 1.0, as np.save writes it."""
    prefix = b"\x93NUMPY\x01\x00" + struct.pack("<H", _NPY_HEADER_BYTES - 10)
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {tuple(map(int, shape))}, }}"
    return (prefix + text.encode()).ljust(_NPY_HEADER_BYTES - 1) + b"\n"
