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

import io
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

_JPEG_SEAM = b"\xff\xd9\xff\xd8"
"""End of one picture and begin of the next; inside a picture 0xFF is always followed by something
else."""

_WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")

_STREAM_OF_NAME = {"internal": Stream.INTERNAL_TEXT, "external": Stream.EXTERNAL_TEXT}
_NAME_OF_STREAM = {stream: name for name, stream in _STREAM_OF_NAME.items()}


def vision_extension(recipe: VisionRecipe) -> str:
    """File name extension of vision members."""
    return {"mjpeg": "mjpeg", "raw": "npy"}[recipe.codec]


def encode_pictures(pictures: NDArray[np.uint8], *, recipe: VisionRecipe) -> bytes:
    """RGB pictures uint8 [F, H, W, 3] as the recipe's codec."""
    if recipe.codec == "raw":
        buffer = io.BytesIO()
        np.save(buffer, pictures, allow_pickle=False)
        return buffer.getvalue()
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
        out[:] = _load_npy(member, out.shape)
        return out
    parts = split_jpegs(member)
    if len(parts) != len(out):
        raise CorruptError(f"holds {len(parts)} pictures, not {len(out)}")
    for part, picture in zip(parts, out, strict=True):
        _decode_jpeg(part, picture)
    return out


def split_jpegs(member: bytes) -> list[memoryview]:
    """The pictures of an mjpeg member, without copying."""
    view = memoryview(member)
    parts = []
    begin = 0
    while (seam := member.find(_JPEG_SEAM, begin)) >= 0:
        parts.append(view[begin : seam + 2])
        begin = seam + 2
    parts.append(view[begin:])
    return parts


def encode_wav(samples: NDArray[np.int16], *, rate_hz: int) -> bytes:
    """Mono int16 samples as a RIFF file."""
    size = samples.nbytes
    header = _WAV_HEADER.pack(
        b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate_hz, rate_hz * 2, 2, 16, b"data", size
    )
    return header + samples.astype("<i2", copy=False).tobytes()


def decode_wav(member: bytes) -> NDArray[np.int16]:
    """Samples of :func:`encode_wav`, int16 [N], a view of `member`.

    Raises:
        CorruptError: other bytes.
    """
    if len(member) < _WAV_HEADER.size or len(member) % 2:
        raise CorruptError(f"{len(member)} bytes are no 16-bit wav file")
    riff, _, wave, *_, data, size = _WAV_HEADER.unpack_from(member)
    if (riff, wave, data, size) != (b"RIFF", b"WAVE", b"data", len(member) - _WAV_HEADER.size):
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
        CorruptError: other bytes.
    """
    try:
        values: dict[str, Any] = json.loads(member)
        streams = {}
        for name in _STREAM_OF_NAME:
            ids, time_s = values[name]["ids"], values[name]["time_s"]
            if len(ids) != len(time_s) or not all(isinstance(i, int) for i in ids):
                raise CorruptError(f"{name} has {len(ids)} tokens and {len(time_s)} times")
            streams[name] = TokenStream(ids=tuple(ids), time_s=tuple(float(t) for t in time_s))
        events = tuple(
            TextEvent(float(e["time_s"]), _STREAM_OF_NAME[e["stream"]], str(e["text"]))
            for e in values["events"]
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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
    """The array of an npy member, a view; its header is checked before anything is allocated."""
    file = io.BytesIO(member)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise CorruptError(f"is npy version {version}, not (1, 0)")
        found, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise CorruptError(f"is no npy file: {error}") from error
    expected = file.tell() + math.prod(shape)
    if (found, is_fortran, dtype.str) != (shape, False, "|u1") or len(member) != expected:
        raise CorruptError(f"pictures are {dtype} {found}, not uint8 {shape}")
    return np.frombuffer(member, dtype=np.uint8, offset=file.tell()).reshape(shape)
