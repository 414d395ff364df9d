"""Encode pictures as YUV planes and compressed bytes, and decode them.

Every decoder writes into the caller's memory, in one of two layouts. The number of dimensions
selects the layout:

- *yuv420*, uint8 [F, 3H/2, W]: per picture H rows of Y, then the H/2 x W/2 plane U and then V, each
  packed in H/4 rows, as in OpenCV's I420. Colors are ITU-R BT.601 over the full range of 0..255,
  with chroma in the middle of its four pixels, as in JFIF (ITU-T T.871).
- *rgb*, uint8 [F, H, W, 3].

Planes become RGB (:mod:`shared.media.yuv_numba`) as in libjpeg: chroma is interpolated linearly
("fancy upsampling"). On real footage that is nearer to the original by 0.9 dB than repeating it.
"""

from __future__ import annotations

import math
import struct
import threading
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

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
"""JFIF's weights of R, G and B in 1/65536, rounded so that they add up to 1, 0 and 0."""

_JPEG_SEAM = b"\xff\xd9\xff\xd8"
"""End of one picture and start of the next; inside a picture, other bytes follow 0xFF."""

_JPEG_END = b"\xff\xd9"

_ACCESS_UNIT = b"\x00\x00\x00\x01\x09"
"""Access unit delimiter (ITU-T H.264, 7.3.2.4) that starts every picture, and never occurs
inside one."""

_X264_PARAMS = (
    "keyint=infinite:scenecut=0:bframes=0:threads=1:lookahead-threads=1:aud=1:no-psy=1:no-8x8dct=1:"
    "range=pc:colormatrix=smpte170m:chromaloc=1"
)
"""One GOP, pictures in order, and one thread, so that the bytes are the same everywhere."""

_MAX_IDLE_DECODERS = 16
"""Decoders that a thread keeps: one per codec and size of picture."""

_EDGE_PIXELS = 64
"""Decoders round each side up by less than this."""

_NPY_HEADER_BYTES = 128
"""Size of the header that np.save writes for an array of three or four dimensions."""


Buffer = bytes | memoryview


class Chosen(NamedTuple):
    """Some of a member's pictures."""

    numbers: Sequence[int]
    """Numbers of the pictures, at least one, increasing."""
    num_stored: int
    """Pictures of the member."""

    @property
    def selection(self) -> slice | list[int]:
        """Index of these pictures in an array of all; a slice where that copies nothing."""
        first, stop = self.numbers[0], self.numbers[-1] + 1
        return slice(first, stop) if stop - first == len(self.numbers) else list(self.numbers)


def to_yuv420(rgb: NDArray[np.uint8], *, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert RGB pictures uint8 [F, H, W, 3] to planes in `out`, uint8 [F, 3H/2, W].

    Y is rounded to nearest. U and V come from the mean of 2 x 2 pixels and are rounded to nearest,
    halves down, so that 256 does not occur. Integer arithmetic gives the same bytes everywhere.
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
    """Return views of one picture's Y [H, W], U and V [H/2, W/2] in memory [3H/2, W]."""
    assert planes.flags.c_contiguous  # otherwise reshape copies, and writes are lost
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
    """Encode RGB pictures as concatenated JPEG pictures 4:2:0.

    libjpeg rounds before it averages 2 x 2 pixels. Before quantization, its planes may differ from
    those of :func:`to_yuv420` by 1.
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


def decode_jpegs(member: Buffer, out: NDArray[np.uint8], *, chosen: Chosen) -> None:
    """Decode the bytes of :func:`encode_jpegs` in the layout of `out`.

    Raises:
        CorruptError: the bytes are not as many pictures of `out`'s size.
    """
    jpegs = _split(bytes(member), _JPEG_SEAM, cut=2, limit=chosen.num_stored + 1)
    _require_count(len(jpegs), chosen.num_stored)
    jpegs = [jpegs[number] for number in chosen.numbers]
    for jpeg in jpegs:
        _require_jpeg(jpeg, *_size(out))
    if out.ndim == 3:
        _write_frames(_decode("mjpeg", jpegs, _size(out)), out, range(len(out)))
        return
    for jpeg, picture in zip(jpegs, out, strict=True):
        try:
            simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=picture)
        except ValueError as error:
            raise CorruptError(f"a picture does not decode: {error}") from error


def encode_h264(planes: NDArray[np.uint8], *, qp: int, rate_hz: float) -> bytes:
    """Encode planes as an H.264 byte stream (Annex B) of one GOP without B-frames, by x264.

    Every picture is one access unit that starts with its delimiter. The quantizer is constant, so
    that the bytes do not depend on a rate control in floating point.

    Raises:
        ConfigError: this ffmpeg has no x264.
    """
    try:
        context: Any = av.CodecContext.create("libx264", "w")
    except ValueError as error:
        raise ConfigError(
            "vision.codec h264 needs an ffmpeg with x264, and this PyAV's has none; fix: "
            "install PyAV from PyPI or set vision.codec: mjpeg"
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


def decode_h264(member: Buffer, out: NDArray[np.uint8], *, chosen: Chosen) -> None:
    """Decode the bytes of :func:`encode_h264` as :func:`decode_jpegs` does.

    Pictures after the last chosen one are not decoded.
    """
    member = bytes(member)
    if not member.startswith(_ACCESS_UNIT):
        raise CorruptError("not an H.264 stream that starts with an access unit delimiter")
    access_units = _split(member, _ACCESS_UNIT, cut=0, limit=chosen.num_stored + 1)
    _require_count(len(access_units), chosen.num_stored)
    needed = access_units[: chosen.numbers[-1] + 1]
    _write_frames(_decode("h264", needed, _size(out)), out, chosen.numbers)


def encode_npy(values: NDArray[np.uint8]) -> bytes:
    """Encode a uint8 array of three or four dimensions as np.save does."""
    return _npy_header(values.shape) + values.tobytes()


def decode_npy_planes(member: Buffer, out: NDArray[np.uint8], *, chosen: Chosen) -> None:
    """Decode planes of :func:`encode_npy` as :func:`decode_jpegs` does."""
    height, width = _size(out)
    planes = _load_npy(member, (chosen.num_stored, height * 3 // 2, width))
    if out.ndim == 3:
        out[...] = planes[chosen.selection]
    else:
        planes_to_rgb(planes[chosen.selection], out)


def decode_npy_rgb(member: Buffer, out: NDArray[np.uint8], *, chosen: Chosen) -> None:
    """Decode RGB pictures of :func:`encode_npy` as :func:`decode_jpegs` does."""
    write_rgb(_load_npy(member, (chosen.num_stored, *_size(out), 3))[chosen.selection], out)


def _weigh(channels: NDArray[np.int32], weights: tuple[int, int, int]) -> NDArray[np.int32]:
    weighed: NDArray[np.int32] = channels[0] * weights[0]
    weighed += channels[1] * weights[1]
    weighed += channels[2] * weights[2]
    return weighed


def _size(out: NDArray[np.uint8]) -> tuple[int, int]:
    """Return height and width of the pictures in `out`."""
    return (out.shape[1], out.shape[2]) if out.ndim == 4 else (out.shape[1] * 2 // 3, out.shape[2])


def _split(member: bytes, seam: bytes, *, cut: int, limit: int) -> list[memoryview]:
    """Return views of the first `limit` pictures of a member, split `cut` bytes into each seam."""
    view = memoryview(member)
    pictures: list[memoryview] = []
    start = 0
    while len(pictures) < limit and (offset := member.find(seam, start + 1)) >= 0:
        pictures.append(view[start : offset + cut])
        start = offset + cut
    return [*pictures, view[start:]] if len(pictures) < limit else pictures


def _require_count(count: int, expected: int) -> None:
    if count != expected:
        more = " or more" if count > expected else ""
        raise CorruptError(f"contains {count}{more} pictures, not {expected}")


def _require_jpeg(jpeg: memoryview, height: int, width: int) -> None:
    """Check a header, so that a picture of another kind costs no memory."""
    try:
        jpeg_height, jpeg_width, colors, subsampling = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError as error:
        raise CorruptError(f"a picture does not decode: {error}") from error
    if (jpeg_height, jpeg_width) != (height, width):
        raise CorruptError(f"a picture is {jpeg_width}x{jpeg_height}, not {width}x{height}")
    if (colors, subsampling) != ("YCbCr", "420"):
        raise CorruptError(f"a picture is {colors} {subsampling}, not YCbCr 420")
    if jpeg[-2:] != _JPEG_END:
        raise CorruptError("a picture is cut off")


class _Decoders(threading.local):
    """The idle decoders of a thread, by codec and size of picture."""

    def __init__(self) -> None:
        self.idle: dict[tuple[str, int, int], Any] = {}


_decoders = _Decoders()


def _decode(
    codec: str, pictures: Sequence[memoryview], size: tuple[int, int]
) -> Iterator[VideoFrame]:
    """Decode the pictures of a member, which begin with a key frame.

    A decoder is flushed and used again, which saves its buffers: a tenth of the time of a segment
    of 2 s. After an error it is dropped, so that it holds nothing of other members.
    """
    idle, key = _decoders.idle, (codec, *size)
    context = idle.pop(key, None) or _open_decoder(codec, size)
    packet: Any = av.Packet  # takes any buffer, its stub says bytes
    try:
        for picture in pictures:
            yield from context.decode(packet(picture))
        yield from context.decode(None)
    except av.FFmpegError as error:
        raise CorruptError(f"a picture does not decode: {error.strerror}") from error
    context.flush_buffers()
    if len(idle) < _MAX_IDLE_DECODERS:
        idle[key] = context


def _open_decoder(codec: str, size: tuple[int, int]) -> Any:  # noqa: ANN401
    context: Any = av.CodecContext.create(codec, "r")
    context.thread_count = 1
    max_pixels = (size[0] + _EDGE_PIXELS) * (size[1] + _EDGE_PIXELS)
    context.options = {"err_detect": "explode", "max_pixels": str(max_pixels)}
    return context


def _write_frames(
    frames: Iterator[VideoFrame], out: NDArray[np.uint8], numbers: Sequence[int]
) -> None:
    """Write the frames of some numbers in the layout of `out`, and check all up to the last.

    Their number, size and pixel format must match. `out` is contiguous.
    """
    height, width = _size(out)
    planes = out if out.ndim == 3 else np.empty((1, height * 3 // 2, width), np.uint8)
    # Views of all pictures are made once; per picture they would cost as much as the copy.
    pixels = planes.reshape(len(planes), -1)
    luma = pixels[:, : height * width].reshape(-1, height, width)
    chroma = pixels[:, height * width :].reshape(-1, 2, height // 2, width // 2)
    positions = {number: position for position, number in enumerate(numbers)}
    expected = numbers[-1] + 1
    count = 0
    for frame in frames:
        if (frame.height, frame.width, frame.format.name) != (height, width, "yuvj420p"):
            form = f"{frame.width}x{frame.height} {frame.format.name}"
            raise CorruptError(f"a picture is {form}, not {width}x{height} yuvj420p")
        if count == expected or frame.is_corrupt:
            raise CorruptError("a picture is damaged, or there is one too many")
        position = positions.get(count)
        count += 1
        if position is None:
            continue
        row = position if planes is out else 0
        for plane, target in zip(frame.planes, (luma[row], *chroma[row]), strict=True):
            buffer: Any = plane  # its stub lacks the buffer protocol
            strides = (plane.line_size, 1)
            target[...] = np.ndarray(target.shape, np.uint8, buffer, strides=strides)
        if planes is not out:
            planes_to_rgb(planes, out[position : position + 1])
    _require_count(count, expected)


def _load_npy(member: Buffer, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the array of an npy member, a read-only view.

    The header is compared, not parsed: NumPy's parser evaluates it as a Python literal.
    """
    size = _NPY_HEADER_BYTES + math.prod(shape)
    if len(member) != size or member[:_NPY_HEADER_BYTES] != _npy_header(shape):
        raise CorruptError(f"not an npy file of pictures uint8 {shape}")
    return np.frombuffer(member, dtype=np.uint8, offset=_NPY_HEADER_BYTES).reshape(shape)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a uint8 array in NPY format 1.0, as np.save writes it."""
    prefix = b"\x93NUMPY\x01\x00" + struct.pack("<H", _NPY_HEADER_BYTES - 10)
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {tuple(map(int, shape))}, }}"
    return (prefix + text.encode()).ljust(_NPY_HEADER_BYTES - 1) + b"\n"
