"""How a media field becomes the bytes of a tar member, and back: a closed table, nothing else is
ever decoded.

==============  ==========================================================  =======================
extension       bytes                                                       error of a round trip
==============  ==========================================================  =======================
mjpeg           JPEG 4:2:0 pictures one after another, as ffmpeg's mjpeg    about 37 dB at q 90
npy             NumPy array uint8 [F, H, W, 3], never pickled               none
wav             RIFF, mono, 16 bit                                          none
json            UTF-8 JSON of :class:`shared.fields.Text`                   none
==============  ==========================================================  =======================
"""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg

from shared.errors import CorruptError
from shared.fields import Text, TokenStream
from shared.recipe import Stream
from shared.session import TextEvent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shared.recipe import VisionRecipe

MAX_MEMBER_BYTES = 1 << 30
"""A larger member is refused unread."""

MAX_TEXT_BYTES = 16 << 20
"""A larger text member is refused undecoded: JSON takes many times its size in memory."""

_JPEG_SEAM = b"\xff\xd9\xff\xd8"
"""End of one picture and begin of the next; inside a picture 0xFF is always followed by something
else."""

_WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
_MAX_WAV_RATE_HZ = 1 << 31
"""From here on its bytes per second don't fit the header."""

_NPY_HEADER_BYTES = 128
"""What np.save writes for an array of four dimensions."""

_STREAM_OF_NAME = {"internal": Stream.INTERNAL_TEXT, "external": Stream.EXTERNAL_TEXT}
_NAME_OF_STREAM = {stream: name for name, stream in _STREAM_OF_NAME.items()}


def vision_extension(recipe: VisionRecipe) -> str:
    """File name extension of vision members."""
    return {"mjpeg": "mjpeg", "raw": "npy"}[recipe.codec]


def encode_pictures(pictures: NDArray[np.uint8], *, recipe: VisionRecipe) -> bytes:
    """RGB pictures uint8 [F, H, W, 3] as the recipe's codec."""
    if recipe.codec == "raw":
        return _npy_header(pictures.shape) + pictures.tobytes()
    return b"".join(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(p),
            quality=recipe.quality,
            colorspace="RGB",
            colorsubsampling="420",
        )
        for p in pictures
    )


def decode_pictures(
    member: bytes, *, recipe: VisionRecipe, out: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Decode a vision member into `out`, uint8 [F, H, W, 3], and return it.

    Raises:
        CorruptError: other bytes than pictures of `out`'s number and size.
    """
    if recipe.codec == "raw":
        out[...] = _load_npy(member, out.shape)
        return out
    parts = split_jpegs(member, limit=len(out) + 1)
    if len(parts) != len(out):
        more = " or more" if len(parts) > len(out) else ""
        raise CorruptError(f"holds {len(parts)}{more} pictures, not {len(out)}")
    for part, picture in zip(parts, out, strict=True):
        _decode_jpeg(part, picture)
    return out


def split_jpegs(member: bytes, *, limit: int) -> list[memoryview]:
    """The first `limit` pictures of an mjpeg member, without copying."""
    view = memoryview(member)
    parts: list[memoryview] = []
    begin = 0
    while len(parts) < limit and (seam := member.find(_JPEG_SEAM, begin)) >= 0:
        parts.append(view[begin : seam + 2])
        begin = seam + 2
    return [*parts, view[begin:]] if len(parts) < limit else parts


def encode_wav(samples: NDArray[np.int16], *, rate_hz: int) -> bytes:
    """Mono int16 samples as a RIFF file."""
    return _wav_header(samples.nbytes, rate_hz) + samples.astype("<i2", copy=False).tobytes()


def decode_wav(member: bytes) -> NDArray[np.int16]:
    """Samples of :func:`encode_wav`, int16 [N], a read-only view of `member`.

    Raises:
        CorruptError: other bytes.
    """
    if len(member) < _WAV_HEADER.size or len(member) % 2:
        raise CorruptError(f"{len(member)} bytes are no 16-bit wav file")
    rate_hz = _WAV_HEADER.unpack_from(member)[7]
    size = len(member) - _WAV_HEADER.size
    if rate_hz >= _MAX_WAV_RATE_HZ or not member.startswith(_wav_header(size, rate_hz)):
        raise CorruptError("is no wav file as this format writes them")
    return np.frombuffer(member, dtype="<i2", offset=_WAV_HEADER.size)


def encode_text(text: Text) -> bytes:
    """Tokens, their times and the events as JSON."""
    values = {
        "internal": {"ids": text.internal.ids, "time_s": text.internal.time_s},
        "external": {"ids": text.external.ids, "time_s": text.external.time_s},
        "events": [
            {"time_s": e.time_s, "stream": _NAME_OF_STREAM[e.stream], "text": e.text}
            for e in text.events
        ],
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def decode_text(member: bytes) -> Text:
    """Inverse of :func:`encode_text`.

    Raises:
        CorruptError: other bytes, or too many.
    """
    if len(member) > MAX_TEXT_BYTES:
        raise CorruptError(f"{len(member)} bytes of text are more than {MAX_TEXT_BYTES}")
    try:
        values: dict[str, Any] = json.loads(member)
        streams = {}
        for name in _STREAM_OF_NAME:
            ids, time_s = values[name]["ids"], values[name]["time_s"]
            if len(ids) != len(time_s) or not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"{name} has {len(ids)} tokens and {len(time_s)} times")
            streams[name] = TokenStream(ids=tuple(ids), time_s=tuple(map(_seconds, time_s)))
        events = tuple(
            TextEvent(_seconds(e["time_s"]), _STREAM_OF_NAME[e["stream"]], str(e["text"]))
            for e in values["events"]
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptError(f"is no text member: {type(error).__name__}: {error}") from error
    return Text(internal=streams["internal"], external=streams["external"], events=events)


def _decode_jpeg(part: memoryview, out: NDArray[np.uint8]) -> None:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(part)
        if (height, width) != out.shape[:2]:
            raise CorruptError(f"a picture is {width}x{height}, not {out.shape[1]}x{out.shape[0]}")
        simplejpeg.decode_jpeg(part, colorspace="RGB", buffer=out)
    except ValueError as error:
        raise CorruptError(f"a picture does not decode: {error}") from error


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


def _wav_header(size: int, rate_hz: int) -> bytes:
    return _WAV_HEADER.pack(
        b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate_hz, rate_hz * 2, 2, 16, b"data", size
    )


def _seconds(value: object) -> float:
    """A finite JSON number."""
    if type(value) not in (int, float) or not math.isfinite(number := float(value)):  # type: ignore[arg-type]
        raise ValueError(f"{value!r} is no time")
    return number
