"""Columns of a shard set and their contents: the closed table for builders and readers.

A column's fingerprint covers what its bytes depend on: the rows, the source files of their
sessions, the recipe's sections for it, and the version of the code that makes it. The column is
rebuilt only when its fingerprint changes.
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
    """One field, or a few fields that change together, of all samples of a shard."""

    name: str
    kind: Literal["tar", "zarr"]
    streams: tuple[Stream, ...]
    sources: tuple[str, ...]
    """Session files that it is made of."""
    recipe_sections: tuple[str, ...]
    """Sections of the recipe that it depends on."""
    code_version: int = 1
    """Must be raised when the code gives other bytes for the same input."""

    @property
    def suffix(self) -> str:
        """Suffix of the file name."""
        return {"tar": "tar", "zarr": "zarr.zip"}[self.kind]


COLUMNS: dict[str, Column] = {
    c.name: c
    for c in (
        Column(
            name="vision_left",
            kind="tar",
            streams=(Stream.VISION_LEFT,),
            sources=(VISION_FILES[Stream.VISION_LEFT],),
            recipe_sections=("vision",),
        ),
        Column(
            name="vision_right",
            kind="tar",
            streams=(Stream.VISION_RIGHT,),
            sources=(VISION_FILES[Stream.VISION_RIGHT],),
            recipe_sections=("vision",),
        ),
        Column(
            name="audio",
            kind="tar",
            streams=(Stream.AUDIO,),
            sources=(AUDIO_FILE,),
            recipe_sections=("audio",),
        ),
        Column(
            name="text",
            kind="tar",
            streams=(Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT),
            sources=(METADATA_FILE, TEXT_FILE),
            recipe_sections=(),  # the tokenizer's hash stands for the recipe
        ),
        Column(
            name="proprio",
            kind="zarr",
            streams=(Stream.PROPRIO, Stream.TOUCH),
            sources=(METADATA_FILE,),
            recipe_sections=("sensors",),
        ),
        Column(
            name="dmel",
            kind="zarr",
            streams=(Stream.AUDIO,),
            sources=(AUDIO_FILE,),
            recipe_sections=("audio", "mel"),
        ),
    )
}
"""Every column of a shard set, by name."""


_MAX_PIXEL_BYTES = 8
_MAX_PICTURE_HEAD_BYTES = 64 << 10
"""Twice the need of any codec: at 224 pixels, raw takes 3 bytes per pixel; noise at the best
quality takes 2.0 in JPEG and 2.5 in x264."""

_CODEC_KEYS = {"vision.qp": "h264"}
"""Recipe keys that have an effect only with this codec."""


def member_name(key: str, column: str, recipe: Recipe) -> str:
    """Return a sample's member name in a tar column, such as ``session_001/000004.audio.wav``."""
    extension = {"audio": "wav", "text": "json"}.get(column) or vision_extension(recipe.vision)
    return f"{key}.{column}.{extension}"


def column_basis(column: Column, recipe: Recipe, *, tokenizer_sha256: str) -> dict[str, Any]:
    """Return what a column depends on besides its rows and sources, as flat JSON values."""
    basis: dict[str, Any] = {
        "code_version": column.code_version,
        "window.duration_s": recipe.window.duration_s,
        "window.step_s": recipe.window.effective_stride_s,
    }
    sections = recipe.as_json()
    for section in column.recipe_sections:
        basis.update({f"{section}.{key}": value for key, value in sections[section].items()})
    for key, codec in _CODEC_KEYS.items():
        if recipe.vision.codec != codec:
            basis.pop(key, None)
    if column.name == "text":
        basis["tokenizer_sha256"] = tokenizer_sha256
    return basis


def member_limits(recipe: Recipe) -> dict[str, int]:
    """Return the largest size of a member, per table of ``shared.shardset.index.MEMBER_TABLES``.

    The limit is exact if the recipe decides the length. For pictures it is far above the need of
    any codec.
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
    """Encode streams as the bits of an index's presence byte."""
    return sum(1 << STREAMS.index(s) for s in streams)


def streams_from_bits(bits: int) -> tuple[Stream, ...]:
    """Decode the bits of :func:`presence_bits`."""
    return tuple(s for i, s in enumerate(STREAMS) if bits >> i & 1)


def field_schema(recipe: Recipe) -> dict[str, Any]:
    """Describe each field for the manifest: column, dtype, shape of one sample, unit, codec."""
    frames, size = recipe.count(recipe.vision.rate_hz), recipe.vision.size
    mel, sensors = recipe.count(recipe.mel.rate_hz), recipe.count(recipe.sensors.rate_hz)

    def field(
        column: str, dtype: str, shape: list[int], *, unit: str, codec: str = "zarr"
    ) -> dict[str, Any]:
        return {"column": column, "dtype": dtype, "shape": shape, "unit": unit, "codec": codec}

    vision = vision_extension(recipe.vision)
    shape, unit = [frames, size, size, 3], "sRGB 0..255"
    if recipe.vision.codec == "yuv420":
        shape, unit = [frames, size * 3 // 2, size], "JFIF Y, Cb, Cr 0..255 as I420"
    samples = [recipe.count(recipe.audio.rate_hz)]
    proprio, touch = [sensors, recipe.sensors.proprio_size], [sensors, recipe.sensors.touch_size]
    text_unit = "token ids and seconds on the session clock"
    return {
        "vision_left": field("vision_left", "uint8", shape, unit=unit, codec=vision),
        "vision_right": field("vision_right", "uint8", shape, unit=unit, codec=vision),
        "audio": field("audio", "int16", samples, unit="1/32768 of full scale", codec="wav"),
        "text": field("text", "json", [], unit=text_unit, codec="json"),
        "timestamp": field("proprio", "float64", [sensors], unit="s on the session clock"),
        "proprio": field("proprio", "float32", proprio, unit="rad, rad/s"),
        "touch": field("proprio", "float32", touch, unit="0..1"),
        "valid": field("proprio", "bool", [sensors], unit="true where recorded"),
        "dmel": field("dmel", "uint8", [mel, recipe.mel.channels], unit="level, 255 masked"),
    }
