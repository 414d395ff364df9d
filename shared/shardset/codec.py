"""Encode media fields as the bytes of tar members, and decode them.

The codecs are a closed table; nothing else is decoded.

=========  ==========================================================  ==========================
extension  bytes                                                       error of a round trip
=========  ==========================================================  ==========================
h264       H.264 byte stream, 4:2:0, one GOP                           about that of JPEG at q 90
mjpeg      JPEG 4:2:0 pictures one after another, as ffmpeg's mjpeg    about 37 dB at q 90
npy        NumPy array uint8 [F, 3H/2, W], planes 4:2:0                that of 4:2:0
npy        NumPy array uint8 [F, H, W, 3], RGB                         none
wav        RIFF, mono, 16 bit                                          none
json       UTF-8 JSON of :class:`shared.session.reader.Text`                   none
=========  ==========================================================  ==========================

:mod:`shared.media.yuv` converts pictures to planes, and planes to bytes.
"""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import CorruptError
from shared.media.yuv import (
    decode_h264,
    decode_jpegs,
    decode_npy_planes,
    decode_npy_rgb,
    encode_h264,
    encode_jpegs,
    encode_npy,
    to_yuv420,
)
from shared.recipe import Stream
from shared.session.folder import TextEvent
from shared.session.reader import Text, TokenStream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shared.recipe import VisionRecipe

MAX_MEMBER_BYTES = 1 << 30
"""A larger member of any field is refused without reading it; see
:func:`shared.shardset.layout.member_limits`."""

MAX_TEXT_BYTES = 16 << 20
"""A larger text member is refused without decoding it: parsed JSON takes many times its size."""

_WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
WAV_HEADER_BYTES = _WAV_HEADER.size
_MAX_WAV_RATE_HZ = 1 << 31
"""From this rate on, the bytes per second don't fit the header."""

_STREAM_OF_NAME = {"internal": Stream.INTERNAL_TEXT, "external": Stream.EXTERNAL_TEXT}
_NAME_OF_STREAM = {stream: name for name, stream in _STREAM_OF_NAME.items()}


def vision_extension(recipe: VisionRecipe) -> str:
    """Return the file name extension of vision members."""
    return {"h264": "h264", "mjpeg": "mjpeg", "yuv420": "npy", "raw": "npy"}[recipe.codec]


def encode_pictures(pictures: NDArray[np.uint8], *, recipe: VisionRecipe) -> bytes:
    """Encode RGB pictures uint8 [F, H, W, 3] with the recipe's codec."""
    if recipe.codec == "raw":
        return encode_npy(pictures)
    if recipe.codec == "mjpeg":
        return encode_jpegs(pictures, quality=recipe.quality)
    count, height, width, _ = pictures.shape
    planes = to_yuv420(pictures, out=np.empty((count, height * 3 // 2, width), np.uint8))
    if recipe.codec == "h264":
        return encode_h264(planes, qp=recipe.qp, rate_hz=recipe.rate_hz)
    return encode_npy(planes)


def decode_pictures(
    member: bytes, *, recipe: VisionRecipe, out: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Decode a vision member into `out` and return it.

    Args:
        member: bytes of the member.
        recipe: selects the codec.
        out: uint8 [F, 3H/2, W] for planes or [F, H, W, 3] for RGB, contiguous; see
            :mod:`shared.media.yuv`. If the codec stores the other layout, it is converted.

    Raises:
        CorruptError: the bytes are not pictures of `out`'s number and size.
    """
    decode = {
        "h264": decode_h264,
        "mjpeg": decode_jpegs,
        "yuv420": decode_npy_planes,
        "raw": decode_npy_rgb,
    }[recipe.codec]
    decode(member, out)
    return out


def is_raw_layout(out: NDArray[np.uint8], *, recipe: VisionRecipe) -> bool:
    """Check whether a vision member is an npy header followed by the bytes of `out`.

    Such a member needs no decoding: its end can be read directly into `out`, and
    :func:`shared.media.yuv.check_npy_header` checks the header.
    """
    return {"yuv420": 3, "raw": 4}.get(recipe.codec) == out.ndim


def encode_wav(samples: NDArray[np.int16], *, rate_hz: int) -> bytes:
    """Encode mono int16 samples as a RIFF file."""
    return _wav_header(samples.nbytes, rate_hz) + samples.astype("<i2", copy=False).tobytes()


def decode_wav(member: bytes) -> NDArray[np.int16]:
    """Decode the bytes of :func:`encode_wav` to int16 [N], a read-only view of `member`.

    Raises:
        CorruptError: the bytes have another form.
    """
    if len(member) < _WAV_HEADER.size or len(member) % 2:
        raise CorruptError(f"{len(member)} bytes are not a 16-bit wav file")
    rate_hz = _WAV_HEADER.unpack_from(member)[7]
    size = len(member) - _WAV_HEADER.size
    if rate_hz >= _MAX_WAV_RATE_HZ or not member.startswith(_wav_header(size, rate_hz)):
        raise CorruptError("not a wav file as this format writes it")
    return np.frombuffer(member, dtype="<i2", offset=_WAV_HEADER.size)


def encode_text(text: Text) -> bytes:
    """Encode tokens, their times and the events as JSON."""
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
    """Decode the bytes of :func:`encode_text`.

    Raises:
        CorruptError: the bytes have another form, or are too many.
    """
    if len(member) > MAX_TEXT_BYTES:
        raise CorruptError(f"{len(member)} bytes of text exceed the limit of {MAX_TEXT_BYTES}")
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
        raise CorruptError(f"not a text member: {type(error).__name__}: {error}") from error
    return Text(internal=streams["internal"], external=streams["external"], events=events)


def _wav_header(size: int, rate_hz: int) -> bytes:
    return _WAV_HEADER.pack(
        b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate_hz, rate_hz * 2, 2, 16, b"data", size
    )


def _seconds(value: object) -> float:
    """Return a finite JSON number of seconds."""
    if type(value) not in (int, float) or not math.isfinite(number := float(value)):  # type: ignore[arg-type]
        raise ValueError(f"{value!r} is not a time")
    return number
