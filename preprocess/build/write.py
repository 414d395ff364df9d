"""The columns of one shard: what each row's fields are, encoded and written by one function per
column.

Each writer takes the rows and one reader per session, writes its file, notes in the builder where
every member lies, and returns per row which of its streams are there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.build import statistics
from preprocess.build.reuse_reader import ShardFieldReader
from shared.errors import MediaError
from shared.recipe import STREAMS, Recipe, Stream
from shared.session.reader import MASKED_LEVEL, SessionReader
from shared.shardset.codec import encode_pictures, encode_text, encode_wav
from shared.shardset.columns import TarColumnWriter, ZarrArray, write_zarr_column
from shared.shardset.layout import member_name, presence_bits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.build.shards import BuiltColumn
    from shared.clock import Window
    from shared.shardset.index import Members


Fields = SessionReader | ShardFieldReader
"""A session's fields, from its files or from the shard in which they were before."""


@dataclass(slots=True)
class Row:
    """One sample to write."""

    number: int
    session: str
    window: Window
    streams: tuple[Stream, ...]
    coverage: Sequence[float]
    """Share of the window that each of STREAMS covers."""

    @property
    def key(self) -> str:
        """SESSION/WINDOW."""
        return f"{self.session}/{self.window.index:06d}"


@dataclass(slots=True)
class ShardBuilder:
    """What the columns of a shard add up to."""

    rows: list[Row]
    passes: Mapping[str, Sequence[Window]] = field(default_factory=dict)
    """Session -> the windows with which its pictures are read, where the rows are only some."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    columns: dict[str, BuiltColumn] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    losses: list[dict[str, Any]] = field(default_factory=list)

    def add_members(self, name: str, members: Members) -> None:
        """Note where a column's members or an array's chunks lie."""
        self.arrays[f"{name}.offset"] = members.offset
        self.arrays[f"{name}.length"] = members.length
        self.arrays[f"{name}.crc32c"] = members.crc32c


def row_arrays(rows: Sequence[Row], sessions: Sequence[str]) -> dict[str, NDArray[Any]]:
    """What an index says of every row; which streams a row has ("present") is none as yet.

    Args:
        rows: the rows.
        sessions: names of their sessions, as the index lists them.
    """
    position = {name: i for i, name in enumerate(sessions)}
    partial = [
        presence_bits(s for s, share in zip(STREAMS, row.coverage, strict=True) if 0 < share < 1)
        for row in rows
    ]
    coverage = np.array([row.coverage for row in rows], dtype=np.float32)
    return {
        "session": np.array([position[row.session] for row in rows], dtype=np.uint32),
        "window": np.array([row.window.index for row in rows], dtype=np.uint32),
        "start_s": np.array([row.window.start_s for row in rows], dtype=np.float64),
        "stop_s": np.array([row.window.stop_s for row in rows], dtype=np.float64),
        "present": np.zeros(len(rows), dtype=np.uint8),
        "partial": np.array(partial, dtype=np.uint8),
        "coverage": coverage.reshape(len(rows), len(STREAMS)),
    }


def write_tar(
    builder: ShardBuilder,
    name: str,
    path: Path,
    readers: Mapping[str, Fields],
    recipe: Recipe,
) -> NDArray[np.uint8]:
    """Write a tar column; returns the presence bits of its streams per row."""
    presence = np.zeros(len(builder.rows), dtype=np.uint8)
    with TarColumnWriter(path, num_samples=len(builder.rows)) as writer:
        for row, content, bits in TAR_CONTENTS[name](builder, readers, recipe):
            writer.add(row.number, member_name(row.key, name, recipe), content)
            presence[row.number] |= bits
        builder.add_members(name, writer.members())
    return presence


def _vision_contents(
    stream: Stream, builder: ShardBuilder, readers: Mapping[str, Fields], recipe: Recipe
) -> Iterator[tuple[Row, bytes, int]]:
    """Encoded pictures of the rows that have them; notes each frame's time error."""
    errors = np.full((len(builder.rows), recipe.count(recipe.vision.rate_hz)), np.nan, np.float32)
    builder.arrays[f"{stream}.error_s"] = errors
    bits = presence_bits([stream])
    for session, reader in readers.items():
        rows = {
            r.window.index: r for r in builder.rows if r.session == session and stream in r.streams
        }
        if isinstance(reader, ShardFieldReader):
            builder.losses += reader.losses(stream)
            for row in rows.values():
                content, errors[row.number] = reader.read_encoded(stream, row.window)
                if content is not None:
                    yield row, content, bits
            continue
        try:
            windows, among = [r.window for r in rows.values()], builder.passes.get(session)
            for window, frames in reader.iter_frames(stream, windows, decode_context=among):
                row = rows.pop(window.index)
                errors[row.number] = frames.error_s
                if np.isfinite(frames.error_s).any():
                    yield row, encode_pictures(frames.pictures, recipe=recipe.vision), bits
                else:
                    rows[window.index] = row
        except MediaError as error:
            _note_losses(builder, stream, rows.values(), str(error).replace(f"{reader.path}/", ""))
            continue
        _note_losses(builder, stream, rows.values(), "no picture of this window decodes")


def _left_contents(
    builder: ShardBuilder, readers: Mapping[str, Fields], recipe: Recipe
) -> Iterator[tuple[Row, bytes, int]]:
    return _vision_contents(Stream.VISION_LEFT, builder, readers, recipe)


def _right_contents(
    builder: ShardBuilder, readers: Mapping[str, Fields], recipe: Recipe
) -> Iterator[tuple[Row, bytes, int]]:
    return _vision_contents(Stream.VISION_RIGHT, builder, readers, recipe)


def _audio_contents(
    builder: ShardBuilder, readers: Mapping[str, Fields], recipe: Recipe
) -> Iterator[tuple[Row, bytes, int]]:
    bits = presence_bits([Stream.AUDIO])
    levels_db = []
    for row in builder.rows:
        if Stream.AUDIO in row.streams:
            samples = readers[row.session].read_audio(row.window)
            levels_db.append(statistics.level_db(samples))
            yield row, encode_wav(samples, rate_hz=recipe.audio.rate_hz), bits
    builder.statistics["audio"] = statistics.of_sound(levels_db)


def _text_contents(
    builder: ShardBuilder, readers: Mapping[str, Fields], recipe: Recipe
) -> Iterator[tuple[Row, bytes, int]]:
    tokens: dict[str, list[tuple[int, ...]]] = {"internal": [], "external": []}
    texts = {Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT}
    for row in builder.rows:
        have = texts & set(row.streams)
        if have:
            text = readers[row.session].read_text(row.window)
            tokens["internal"].append(text.internal.ids)
            tokens["external"].append(text.external.ids)
            yield row, encode_text(text), presence_bits(have)
    builder.statistics["text"] = {
        f"{name}_tokens": statistics.of_tokens(ids) for name, ids in tokens.items()
    }


TAR_CONTENTS = {
    "vision_left": _left_contents,
    "vision_right": _right_contents,
    "audio": _audio_contents,
    "text": _text_contents,
}


def _write_proprio(
    builder: ShardBuilder, path: Path, readers: Mapping[str, Fields], recipe: Recipe
) -> NDArray[np.uint8]:
    """Write the sensor column; returns the presence bits of its streams per row."""
    windows = [readers[row.session].read_sensors(row.window) for row in builder.rows]
    presence = np.zeros(len(windows), dtype=np.uint8)
    proprio = np.stack([w.proprio for w in windows])
    touch = np.stack([w.touch for w in windows])
    for row in builder.rows:
        for stream, values in ((Stream.PROPRIO, proprio), (Stream.TOUCH, touch)):
            if stream in row.streams:
                presence[row.number] |= presence_bits([stream])
            else:
                values[row.number] = np.nan
    valid = np.isfinite(proprio).all(axis=2)
    valid |= np.isfinite(touch).all(axis=2)
    arrays = {
        "timestamp": ZarrArray(
            values=np.stack([w.timestamp for w in windows]),
            dimensions=("sample", "time"),
            fill_value="NaN",
            attributes={"units": "s", "long_name": "seconds since session start"},
        ),
        "proprio": ZarrArray(
            values=proprio,
            dimensions=("sample", "time", "joint"),
            fill_value="NaN",
            attributes={"units": "rad (first half), rad s-1 (second half)"},
        ),
        "touch": ZarrArray(
            values=touch,
            dimensions=("sample", "time", "finger"),
            fill_value="NaN",
            attributes={"units": "1", "valid_range": [0.0, 1.0]},
        ),
        "valid": ZarrArray(
            values=np.asarray(valid),
            dimensions=("sample", "time"),
            fill_value=False,
            attributes={"long_name": "proprio or touch was recorded"},
        ),
    }
    builder.statistics["proprio"] = statistics.of_sensors(proprio, touch)
    _write_zarr(builder, path, "proprio", arrays)
    return presence


def _write_dmel(
    builder: ShardBuilder, path: Path, readers: Mapping[str, Fields], recipe: Recipe
) -> NDArray[np.uint8]:
    """Write the audio tokens; returns the presence bits of its streams per row."""
    shape = (len(builder.rows), recipe.count(recipe.mel.rate_hz))
    levels = np.full((*shape, recipe.mel.channels), MASKED_LEVEL, dtype=np.uint8)
    valid = np.zeros(shape, dtype=np.bool_)
    presence = np.zeros(len(builder.rows), dtype=np.uint8)
    for row in builder.rows:
        if Stream.AUDIO in row.streams:
            mel = readers[row.session].read_mel(row.window)
            levels[row.number], valid[row.number] = mel.levels, mel.valid
            presence[row.number] |= presence_bits([Stream.AUDIO])
    arrays = {
        "dmel": ZarrArray(
            values=levels,
            dimensions=("sample", "frame", "channel"),
            fill_value=MASKED_LEVEL,
            attributes={"long_name": "dMel level", "missing_value": MASKED_LEVEL},
        ),
        "valid": ZarrArray(
            values=valid,
            dimensions=("sample", "frame"),
            fill_value=False,
            attributes={"long_name": "sound covers the frame"},
        ),
    }
    builder.statistics["dmel"] = {
        "dmel_levels": statistics.of_levels(levels, valid, recipe.mel.levels)
    }
    _write_zarr(builder, path, "dmel", arrays)
    return presence


ZARR_WRITERS = {"proprio": _write_proprio, "dmel": _write_dmel}


def _write_zarr(
    builder: ShardBuilder, path: Path, column: str, arrays: Mapping[str, ZarrArray]
) -> None:
    attributes = {"keys": [row.key for row in builder.rows]}
    for name, members in write_zarr_column(path, arrays, attributes=attributes).items():
        builder.add_members(f"{column}/{name}", members)


def _note_losses(
    builder: ShardBuilder,
    stream: Stream,
    rows: Iterable[Row],
    reason: str,
) -> None:
    """Note windows that have no picture, in order."""
    builder.losses += [
        {"session": r.session, "window": r.window.index, "stream": stream, "reason": reason}
        for r in sorted(rows, key=lambda row: row.number)
    ]
