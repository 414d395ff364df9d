"""Which column holds what: the closed table that the builder writes by and readers read by.

A column's fingerprint says what its bytes depend on: the rows, the source files of their sessions,
the part of the recipe that makes it, and the version of the code that does. It is re-made when its
fingerprint changes, and only then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shared.recipe import STREAMS, Recipe, Stream
from shared.session.folder import AUDIO_FILE, METADATA_FILE, TEXT_FILE, VISION_FILES
from shared.shardset.codec import (
    MAX_MEMBER_BYTES,
    MAX_TEXT_BYTES,
    WAV_HEADER_BYTES,
    vision_extension,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One field, or a few that change together, of all samples of a shard."""

    name: str
    kind: Literal["tar", "zarr"]
    streams: tuple[Stream, ...]
    sources: tuple[str, ...]
    """Session files that it is made of."""
    parts: tuple[str, ...]
    """Sections of the recipe that it depends on."""
    code_version: int = 1
    """Raised when the code that makes it gives other bytes for the same input."""

    @property
    def suffix(self) -> str:
        """File name ending."""
        return {"tar": "tar", "zarr": "zarr.zip"}[self.kind]


COLUMNS: dict[str, Column] = {
    c.name: c
    for c in (
        Column(
            name="vision_left",
            kind="tar",
            streams=(Stream.VISION_LEFT,),
            sources=(VISION_FILES[Stream.VISION_LEFT],),
            parts=("vision",),
        ),
        Column(
            name="vision_right",
            kind="tar",
            streams=(Stream.VISION_RIGHT,),
            sources=(VISION_FILES[Stream.VISION_RIGHT],),
            parts=("vision",),
        ),
        Column(
            name="audio",
            kind="tar",
            streams=(Stream.AUDIO,),
            sources=(AUDIO_FILE,),
            parts=("audio",),
        ),
        Column(
            name="text",
            kind="tar",
            streams=(Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT),
            sources=(METADATA_FILE, TEXT_FILE),
            parts=(),  # text depends on the recipe through the tokenizer's hash
        ),
        Column(
            name="proprio",
            kind="zarr",
            streams=(Stream.PROPRIO, Stream.TOUCH),
            sources=(METADATA_FILE,),
            parts=("sensors",),
        ),
        Column(
            name="dmel",
            kind="zarr",
            streams=(Stream.AUDIO,),
            sources=(AUDIO_FILE,),
            parts=("audio", "mel"),
        ),
    )
}
"""Every column of a shard set, by name."""


_MAX_PIXEL_BYTES = 8
_MAX_PICTURE_HEAD_BYTES = 64 << 10
"""No codec needs half as much: of 224 pixels, raw takes 3 bytes each, and noise at the best quality
2.0 by JPEG and 2.5 by x264."""

_CODEC_KEYS = {"vision.qp": "h264"}
"""Keys of a recipe that say nothing where the codec is another one."""


def member_name(key: str, column: str, recipe: Recipe) -> str:
    """Name of a sample's member in a tar column, such as ``session_001/000004.audio.wav``."""
    extension = {"audio": "wav", "text": "json"}.get(column) or vision_extension(recipe.vision)
    return f"{key}.{column}.{extension}"


def column_basis(column: Column, recipe: Recipe, *, tokenizer_sha256: str) -> dict[str, Any]:
    """What a column depends on besides its rows and their sources, as flat JSON values."""
    basis: dict[str, Any] = {
        "code_version": column.code_version,
        "window.duration_s": recipe.window.duration_s,
        "window.step_s": recipe.window.step_s,
    }
    sections = recipe.as_json()
    for part in column.parts:
        basis.update({f"{part}.{key}": value for key, value in sections[part].items()})
    for key, codec in _CODEC_KEYS.items():
        if recipe.vision.codec != codec:
            basis.pop(key, None)
    if column.name == "text":
        basis["tokenizer_sha256"] = tokenizer_sha256
    return basis


def member_limits(recipe: Recipe) -> dict[str, int]:
    """Most bytes of a member, per table of :data:`shared.shardset.index.MEMBER_TABLES`.

    Exact where the recipe decides the length; for pictures far more than any codec needs.
    """
    frames, size = recipe.count(recipe.vision.rate_hz), recipe.vision.size
    mel, sensors = recipe.count(recipe.mel.rate_hz), recipe.count(recipe.sensors.rate_hz)
    pictures = frames * (size * size * _MAX_PIXEL_BYTES + _MAX_PICTURE_HEAD_BYTES)
    limits = {
        "vision_left": pictures,
        "vision_right": pictures,
        "audio": WAV_HEADER_BYTES + 2 * recipe.count(recipe.audio.rate_hz),
        "text": MAX_TEXT_BYTES,
        "proprio/timestamp": 8 * sensors,
        "proprio/proprio": 4 * sensors * recipe.sensors.proprio_size,
        "proprio/touch": 4 * sensors * recipe.sensors.touch_size,
        "proprio/valid": sensors,
        "dmel/dmel": mel * recipe.mel.channels,
        "dmel/valid": mel,
    }
    return {table: min(limit, MAX_MEMBER_BYTES) for table, limit in limits.items()}


def presence_bits(streams: Iterable[Stream]) -> int:
    """Streams as the bits of an index's presence byte."""
    return sum(1 << STREAMS.index(s) for s in streams)


def streams_from_bits(bits: int) -> tuple[Stream, ...]:
    """Inverse of :func:`presence_bits`."""
    return tuple(s for i, s in enumerate(STREAMS) if bits >> i & 1)


def field_schema(recipe: Recipe) -> dict[str, Any]:
    """Per field: its column, dtype, shape of one sample, unit and codec, for the manifest."""
    frames, size = recipe.count(recipe.vision.rate_hz), recipe.vision.size
    mel, sensors = recipe.count(recipe.mel.rate_hz), recipe.count(recipe.sensors.rate_hz)

    def field(column: str, dtype: str, shape: list[int], unit: str, codec: str) -> dict[str, Any]:
        return {"column": column, "dtype": dtype, "shape": shape, "unit": unit, "codec": codec}

    vision = vision_extension(recipe.vision)
    shape, unit = [frames, size, size, 3], "sRGB 0..255"
    if recipe.vision.codec == "yuv420":
        shape, unit = [frames, size * 3 // 2, size], "JFIF Y, Cb, Cr 0..255 as I420"
    return {
        "vision_left": field("vision_left", "uint8", shape, unit, vision),
        "vision_right": field("vision_right", "uint8", shape, unit, vision),
        "audio": field(
            "audio", "int16", [recipe.count(recipe.audio.rate_hz)], "1/32768 of full scale", "wav"
        ),
        "text": field("text", "json", [], "token ids and seconds on the session clock", "json"),
        "timestamp": field("proprio", "float64", [sensors], "s on the session clock", "zarr"),
        "proprio": field(
            "proprio", "float32", [sensors, recipe.sensors.proprio_size], "rad, rad/s", "zarr"
        ),
        "touch": field("proprio", "float32", [sensors, recipe.sensors.touch_size], "0..1", "zarr"),
        "valid": field("proprio", "bool", [sensors], "true where recorded", "zarr"),
        "dmel": field("dmel", "uint8", [mel, recipe.mel.channels], "level, 255 masked", "zarr"),
    }
