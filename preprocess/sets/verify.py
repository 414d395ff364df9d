"""Looking into a shard set: check every byte of it, or show a set or one sample."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.build.commit import count_windows
from preprocess.sets.files import SetFiles, open_files
from preprocess.sets.spread import describe_spread
from shared.errors import REBUILD_HINT, CorruptError, EngineError, ShardError
from shared.files import sha256_of_file
from shared.recipe import SPLITS, Recipe
from shared.shardset.codec import decode_pictures, decode_text, decode_wav
from shared.shardset.columns import ColumnFile
from shared.shardset.index import MEMBER_TABLES, ShardIndex, open_index, require_complete
from shared.shardset.layout import COLUMNS, member_limits, streams_from_bits
from shared.shardset.manifest import (
    FORMAT_VERSION,
    REJECTED_FILE,
    ShardEntry,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What verifying a set found."""

    num_shards: int
    num_samples: int
    num_members: int
    length_bytes: int
    problems: tuple[str, ...]


def verify_set(
    place: Path | str, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verdict:
    """Check a shard set: checksums of every file and member, every member decodes, keys are unique,
    no session is in two splits, counts are right, and windows planned = samples + rejected.

    Args:
        place: the set's folder, or a URL; behind one, a shard at a time is copied here.
        progress: called after each shard: how many are done, of how many.

    Raises:
        ShardError: the manifest can't be read.
        StorageError: the store can't be reached.
    """
    problems: list[str] = []
    keys: set[str] = set()
    splits: dict[str, str] = {}
    num_members = 0
    with open_files(place) as files:
        manifest = files.manifest
        for number, entry in enumerate(manifest.shards, start=1):
            try:
                index = _open_index(files, entry)
            except ShardError as error:
                problems.append(str(error))
                continue
            num_members += _verify_shard(files, entry, index, problems)
            problems += _verify_rows(entry, index, keys, splits)
            files.evict()
            progress(number, len(manifest.shards))
        problems += _verify_tokenizer(files)
        problems += _verify_counts(files, len(keys))
    return Verdict(
        num_shards=len(manifest.shards),
        num_samples=len(keys),
        num_members=num_members,
        length_bytes=sum(e.length_bytes for e in manifest.shards),
        problems=tuple(problem.replace(str(files.folder), str(files)) for problem in problems),
    )


def describe_set(place: Path | str) -> Iterator[tuple[str, str]]:
    """(name, value) lines about a shard set in a folder or behind a URL.

    Raises:
        ShardError: the manifest can't be read.
        StorageError: the store can't be reached.
    """
    with open_files(place) as files:
        manifest = files.manifest
    recipe = manifest.recipe
    yield "place", str(files)
    yield "format", str(FORMAT_VERSION)
    yield "fingerprint", f"{manifest.fingerprint} (generation {manifest.generation})"
    for split in SPLITS:
        entries = manifest.in_split(split)
        size = sum(e.length_bytes for e in entries)
        num = manifest.num_samples(split)
        yield split, f"{num} samples in {len(entries)} shards, {size / 2**20:.1f} MiB"
    counts = manifest.counts
    planned, rejected = counts["windows_planned"], counts["windows_rejected"]
    what = f"{planned} planned = {counts['samples']} samples + {rejected} rejected"
    yield "windows", f"{what} (see {REJECTED_FILE})"
    yield "window", f"{recipe.window.duration_s:g} s, every {recipe.window.step_s:g} s"
    for name, field in manifest.fields.items():
        shape = "x".join(str(n) for n in field["shape"]) or "variable"
        yield name, f"{field['dtype']} {shape}, {field['unit']}, {field['codec']}"
    yield from describe_spread(manifest.statistics)


def describe_sample(place: Path | str, key: str) -> Iterator[tuple[str, str]]:
    """(name, value) lines about one sample.

    Raises:
        ShardError: no such sample, or it can't be read.
        StorageError: the store can't be reached.
    """
    with open_files(place) as files:
        entry, index, row = _find(files, key)
        arrays = index.arrays
        present = streams_from_bits(int(arrays["present"][row]))
        yield "sample", f"{key}, row {row} of {entry.name}"
        yield "time", f"[{arrays['start_s'][row]:g}, {arrays['stop_s'][row]:g}) s of its session"
        yield "streams", ", ".join(present) or "none"
        for stream in present:
            name = f"{stream}.error_s"
            if name in arrays:
                yield stream, _frame_errors(np.asarray(arrays[name][row]))
        for name, tables in MEMBER_TABLES.items():
            file = index.columns[name]["file"]
            for table in tables:
                members = index.members(table)
                where = f"{int(members.length[row])} bytes at {int(members.offset[row])}"
                yield table, f"{where} of {file}"
        text = _read(files, index, "text", row)
        for event in decode_text(text).events if text is not None else ():
            yield event.stream, f"{event.time_s:7.2f} s  {event.text}"


def _frame_errors(error_s: NDArray[np.float32]) -> str:
    """How far frames are from their grid times; NaN where one is masked."""
    masked = int(np.isnan(error_s).sum())
    worst_ms = 1000 * np.nanmax(np.abs(error_s)) if masked < len(error_s) else np.nan
    return f"{len(error_s)} frames, worst {worst_ms:.1f} ms off, {masked} masked"


def _verify_rows(
    entry: ShardEntry, index: ShardIndex, keys: set[str], splits: dict[str, str]
) -> Iterator[str]:
    """Check a shard's keys and sessions against those of the shards before, and note them."""
    if index.num_samples != entry.num_samples:
        yield (
            f"{entry.name}: its index has {index.num_samples} samples, the manifest says "
            f"{entry.num_samples}; {REBUILD_HINT}"
        )
    for key in map(index.key, range(index.num_samples)):
        if key in keys:
            yield f"{entry.name}: key {key} stands twice in the set"
        keys.add(key)
    for session in index.sessions:
        if splits.setdefault(session, entry.split) != entry.split:
            yield f"{entry.name}: session {session} is in both splits: held-out data leaks"


def _verify_shard(
    files: SetFiles, entry: ShardEntry, index: ShardIndex, problems: list[str]
) -> int:
    """Check one shard's files and members; returns how many members there are."""
    num_members = 0
    for name in COLUMNS:
        column = index.columns[name]
        path = files.path(column["file"])
        try:
            digest = sha256_of_file(path)
        except OSError as error:
            problems.append(f"{path}: can't be read: {error.strerror}; {REBUILD_HINT}")
            continue
        if digest != column.get("sha256"):
            problems.append(f"{path}: checksum differs from its index; {REBUILD_HINT}")
        for table in MEMBER_TABLES[name]:
            for row in range(index.num_samples):
                try:
                    content = _read(files, index, table, row)
                    if content is not None:
                        num_members += 1
                        _decode(name, content, files.manifest.recipe)
                except ShardError as error:
                    problems.append(f"{entry.name} {index.key(row)}: {error}")
    return num_members


def _verify_tokenizer(files: SetFiles) -> Iterator[str]:
    """Whether the tokenizer is the one that the manifest means."""
    try:
        files.path(files.manifest.tokenizer_file)
        files.manifest.load_tokenizer()
    except EngineError as error:
        yield str(error)


def _verify_counts(files: SetFiles, num_samples: int) -> Iterator[str]:
    """Whether the counts of the manifest, the samples and rejected.jsonl agree."""
    path, counts = files.path(REJECTED_FILE), files.manifest.counts
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        rejected = count_windows(lines)
        planned, counted = (counts[name] for name in ("windows_planned", "samples"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{path} or the manifest's counts can't be read: {error!r}; {REBUILD_HINT}"
        return
    if counted != num_samples:
        yield f"the manifest counts {counted} samples, {num_samples} are there"
    if planned != num_samples + rejected:
        yield f"{planned} windows were planned, but {num_samples} samples + {rejected} rejected"


def _decode(column: str, content: bytes, recipe: Recipe) -> Any:  # noqa: ANN401 (any field)
    if column.startswith("vision"):
        size = recipe.vision.size
        shape = (recipe.count(recipe.vision.rate_hz), size, size, 3)
        return decode_pictures(content, recipe=recipe.vision, out=np.empty(shape, np.uint8))
    if column == "audio":
        return decode_wav(content)
    if column == "text":
        return decode_text(content)
    return content


def _read(files: SetFiles, index: ShardIndex, table: str, row: int) -> bytes | None:
    column = table.partition("/")[0]
    file = ColumnFile(files.path(index.columns[column]["file"]))
    limit = member_limits(files.manifest.recipe)[table]
    try:
        return file.read(index.members(table), row, max_bytes=limit)
    finally:
        file.close()


def _open_index(files: SetFiles, entry: ShardEntry) -> ShardIndex:
    path = files.path(entry.index_file)
    index = open_index(path, sha256=entry.index_sha256)
    require_complete(index, origin=str(path))
    return index


def _find(files: SetFiles, key: str) -> tuple[ShardEntry, ShardIndex, int]:
    session = key.rpartition("/")[0]
    for entry in files.manifest.shards:
        index = _open_index(files, entry)
        if session in index.sessions:
            for row in range(index.num_samples):
                if index.key(row) == key:
                    return entry, index, row
    raise ShardError(
        f"{files.folder}: no sample {key!r}; keys are SESSION/WINDOW such as {_first_key(files)}"
    )


def _first_key(files: SetFiles) -> str:
    for entry in files.manifest.shards:
        return _open_index(files, entry).key(0)
    raise CorruptError(f"{files.folder}: holds no sample")
