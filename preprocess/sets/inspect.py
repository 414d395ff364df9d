"""Looking into a shard set: check every byte of it, or show a set or one sample."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.building.rejected import count_windows
from shared.codec import decode_pictures, decode_text, decode_wav
from shared.columns import ColumnFile
from shared.errors import CorruptError, CreatureError, ShardError
from shared.index import ShardIndex, open_index
from shared.layout import COLUMNS, streams_of_bits
from shared.manifest import (
    FORMAT_VERSION,
    REJECTED_FILE,
    Manifest,
    ShardEntry,
    read_manifest,
)
from shared.recipe import SPLITS, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_ZARR_ARRAYS = {
    "proprio": ("timestamp", "proprio", "touch", "valid"),
    "dmel": ("dmel", "valid"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What verifying a set found."""

    num_shards: int
    num_samples: int
    num_members: int
    length_bytes: int
    problems: tuple[str, ...]


def verify_set(root: Path, *, on_shard: Callable[[], None] = lambda: None) -> Verdict:
    """Check a shard set: checksums of every file and member, every member decodes, keys are unique,
    no session is in two splits, counts are right, and windows planned = samples + rejected.

    Args:
        root: the set's folder.
        on_shard: called after each shard.

    Raises:
        ShardError: the manifest can't be read.
    """
    manifest = read_manifest(root)
    problems: list[str] = []
    keys: set[str] = set()
    splits: dict[str, str] = {}
    num_members = 0
    for entry in manifest.shards:
        try:
            index = open_index(root / entry.index_file, sha256=entry.index_sha256)
        except ShardError as error:
            problems.append(str(error))
            continue
        num_members += _verify_shard(manifest, entry, index, problems)
        problems += _verify_rows(entry, index, keys, splits)
        on_shard()
    problems += _verify_tokenizer(manifest)
    problems += _verify_counts(manifest, len(keys))
    return Verdict(
        num_shards=len(manifest.shards),
        num_samples=len(keys),
        num_members=num_members,
        length_bytes=sum(e.length_bytes for e in manifest.shards),
        problems=tuple(problems),
    )


def describe_set(root: Path) -> Iterator[tuple[str, str]]:
    """(name, value) lines about a shard set.

    Raises:
        ShardError: the manifest can't be read.
    """
    manifest = read_manifest(root)
    recipe = manifest.recipe
    yield "folder", str(root)
    is_newest = manifest.format_version == FORMAT_VERSION
    mend = "" if is_newest else f"; `preprocess shards` upgrades it to {FORMAT_VERSION}"
    yield "format", f"{manifest.format_version}{mend}"
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


def describe_sample(root: Path, key: str) -> Iterator[tuple[str, str]]:
    """(name, value) lines about one sample.

    Raises:
        ShardError: no such sample, or it can't be read.
    """
    manifest = read_manifest(root)
    entry, index, row = _find(manifest, key)
    arrays = index.arrays
    present = streams_of_bits(int(arrays["present"][row]))
    yield "sample", f"{key}, row {row} of {entry.name}"
    yield "time", f"[{arrays['start_s'][row]:g}, {arrays['stop_s'][row]:g}) s of its session"
    yield "streams", ", ".join(present) or "none"
    for stream in present:
        name = f"{stream}.error_s"
        if name in arrays:
            error_ms = 1000 * np.asarray(arrays[name][row])
            masked = int(np.isnan(error_ms).sum())
            worst = np.nanmax(np.abs(error_ms)) if masked < len(error_ms) else np.nan
            yield stream, f"{len(error_ms)} frames, worst {worst:.1f} ms off, {masked} masked"
    for name, column in index.facts["columns"].items():
        for part in _members_of(name):
            members = index.members(part)
            place = f"{int(members.length[row])} bytes at {int(members.offset[row])}"
            yield part, f"{place} of {column['file']}"
    text = _read(manifest, index, "text", "text", row)
    for event in decode_text(text).events if text is not None else ():
        yield event.stream, f"{event.time_s:7.2f} s  {event.text}"


def _verify_rows(
    entry: ShardEntry, index: ShardIndex, keys: set[str], splits: dict[str, str]
) -> Iterator[str]:
    """Check a shard's keys and sessions against those of the shards before, and note them."""
    if index.num_samples != entry.num_samples:
        yield (
            f"{entry.name}: its index has {index.num_samples} samples, the manifest says "
            f"{entry.num_samples}; rebuild by `make shards`"
        )
    for key in map(index.key, range(index.num_samples)):
        if key in keys:
            yield f"{entry.name}: key {key} stands twice in the set"
        keys.add(key)
    for session in index.facts["sessions"]:
        if splits.setdefault(session, entry.split) != entry.split:
            yield f"{entry.name}: session {session} is in both splits: held-out data leaks"


def _verify_shard(
    manifest: Manifest, entry: ShardEntry, index: ShardIndex, problems: list[str]
) -> int:
    """Check one shard's files and members; returns how many members there are."""
    num_members = 0
    for name in COLUMNS:
        column = index.facts["columns"][name]
        path = manifest.root / column["file"]
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            problems.append(f"{path}: can't be read: {error.strerror}")
            continue
        if digest != column["sha256"]:
            problems.append(f"{path}: checksum differs from its index; rebuild by `make shards`")
        for part in _members_of(name):
            for row in range(index.num_samples):
                try:
                    content = _read(manifest, index, name, part, row)
                    if content is not None:
                        num_members += 1
                        _decode(name, content, manifest.recipe)
                except ShardError as error:
                    problems.append(f"{entry.name} {index.key(row)}: {error}")
    return num_members


def _verify_tokenizer(manifest: Manifest) -> Iterator[str]:
    """Whether the tokenizer is the one that the manifest means."""
    try:
        manifest.load_tokenizer()
    except CreatureError as error:
        yield str(error)


def _verify_counts(manifest: Manifest, num_samples: int) -> Iterator[str]:
    """Whether the counts of the manifest, the samples and rejected.jsonl agree."""
    path = manifest.root / REJECTED_FILE
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        rejected = count_windows(lines)
        planned, counted = (manifest.counts[name] for name in ("windows_planned", "samples"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{path} or the manifest's counts can't be read: {error!r}; rebuild by `make shards`"
        return
    if counted != num_samples:
        yield f"the manifest counts {counted} samples, {num_samples} are there"
    if planned != num_samples + rejected:
        yield f"{planned} windows were planned, but {num_samples} samples + {rejected} rejected"


def _members_of(column: str) -> list[str]:
    """Names of a column's member tables in the index."""
    return [f"{column}/{array}" for array in _ZARR_ARRAYS.get(column, ())] or [column]


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


def _read(manifest: Manifest, index: ShardIndex, column: str, part: str, row: int) -> bytes | None:
    file = ColumnFile(manifest.root / index.facts["columns"][column]["file"])
    try:
        return file.read(index.members(part), row)
    finally:
        file.close()


def _find(manifest: Manifest, key: str) -> tuple[ShardEntry, ShardIndex, int]:
    session = key.rpartition("/")[0]
    for entry in manifest.shards:
        index = open_index(manifest.root / entry.index_file, sha256=entry.index_sha256)
        if session in index.facts["sessions"]:
            for row in range(index.num_samples):
                if index.key(row) == key:
                    return entry, index, row
    raise ShardError(
        f"{manifest.root}: no sample {key!r}; keys are SESSION/WINDOW such as "
        f"{_first_key(manifest)}"
    )


def _first_key(manifest: Manifest) -> str:
    for entry in manifest.shards:
        return open_index(manifest.root / entry.index_file).key(0)
    raise CorruptError(f"{manifest.root}: holds no sample")
