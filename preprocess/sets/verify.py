"""Verify every byte of a shard set, or describe a set or one of its samples."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from shared.shardset.codec import decode_pictures, decode_text, decode_wav

from preprocess.build.commit import count_segments
from shared.errors import CorruptError, EngineError, ShardError, rebuild_hint
from shared.recipe import SPLITS, Recipe
from shared.shardset.index import MEMBER_TABLES, ShardIndex, require_complete
from shared.shardset.layout import COLUMNS, member_limits, streams_from_bits
from shared.shardset.manifest import FORMAT_VERSION, REJECTED_FILE, Manifest, ShardEntry
from shared.shardset.store import ShardSetStore, open_shard_set
from shared.storage import parse_location

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.shardset.columns import ColumnFile


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What verifying a set found."""

    num_shards: int
    num_samples: int
    num_members: int
    length_bytes: int
    problems: tuple[str, ...]


def verify_set(
    location: Path | str, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> VerifyResult:
    """Verify a shard set.

    Checksums of all files and members match, every member decodes, keys are unique, no session is
    in two splits, counts are right, and planned segments = samples + rejected segments.

    Args:
        location: the set's folder, or its URL; behind a URL, a column at a time is downloaded.
        progress: called after each shard with the numbers of verified and of all shards.

    Raises:
        ShardError: the manifest can't be read.
        StorageError: the store can't be reached.
    """
    with open_shard_set(parse_location(location)) as store:
        manifest = store.read_manifest()
        verifier = _Verifier(store, manifest)
        for number, entry in enumerate(manifest.shards, start=1):
            verifier.verify_shard(entry)
            progress(number, len(manifest.shards))
        verifier.verify_tokenizer()
        verifier.verify_counts()
    return VerifyResult(
        num_shards=len(manifest.shards),
        num_samples=len(verifier.keys),
        num_members=verifier.num_members,
        length_bytes=sum(e.length_bytes for e in manifest.shards),
        problems=tuple(verifier.problems),
    )


@dataclass(slots=True)
class _Verifier:
    """Problems of a set, and what later shards are compared with."""

    store: ShardSetStore
    manifest: Manifest
    problems: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    """Sample keys of the verified shards."""
    splits: dict[str, str] = field(default_factory=dict)
    """Session -> split."""
    num_members: int = 0

    @property
    def _fix(self) -> str:
        return rebuild_hint(self.store)

    def verify_shard(self, entry: ShardEntry) -> None:
        """Verify the columns, keys and sessions of one shard."""
        try:
            index = _read_index(self.store, entry)
        except ShardError as error:
            self.problems.append(str(error))
            return
        for column in COLUMNS:
            self._verify_column(entry, index, column)
        self._verify_keys(entry, index)

    def verify_tokenizer(self) -> None:
        """Verify that the tokenizer is the one that the manifest names."""
        name = self.manifest.tokenizer_file
        origin = f"{self.store}/{name}"
        try:
            self.manifest.load_tokenizer(self.store.read(name), origin=origin)
        except EngineError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{origin}: can't be read: {error.strerror}; {self._fix}")

    def verify_counts(self) -> None:
        """Verify that the manifest's counts, the samples and ``rejected.jsonl`` agree."""
        path = f"{self.store}/{REJECTED_FILE}"
        counts, num_samples = self.manifest.counts, len(self.keys)
        try:
            content = self.store.read(REJECTED_FILE)
            if content is None:
                raise FileNotFoundError("no such file")
            lines = [json.loads(line) for line in content.decode().split("\n") if line]
            rejected = count_segments(lines)
            planned, counted = (counts[name] for name in ("segments_planned", "samples"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append(
                f"{path} or the manifest's counts can't be read: {error!r}; {self._fix}"
            )
            return
        if counted != num_samples:
            self.problems.append(
                f"the manifest counts {counted} samples, but the set has {num_samples}"
            )
        if planned != num_samples + rejected:
            self.problems.append(
                f"{planned} segments were planned, but {num_samples} samples + {rejected} rejected"
            )

    def _verify_column(self, entry: ShardEntry, index: ShardIndex, column: str) -> None:
        """Verify the checksum of a column's file, and that every member is whole and decodes."""
        header, recipe = index.columns[column], self.manifest.recipe
        try:
            file = self.store.open_column(header["file"])
        except ShardError as error:
            self.problems.append(str(error))
            return
        with closing(file):
            try:
                sha256 = file.sha256()
            except OSError as error:
                self.problems.append(f"{file.origin}: can't be read: {error.strerror}; {self._fix}")
                return
            if sha256 != header.get("sha256"):
                self.problems.append(f"{file.origin}: checksum differs from its index; {self._fix}")
            for table in MEMBER_TABLES[column]:
                for row in range(index.num_samples):
                    try:
                        content = _read_member(file, index, table=table, row=row, recipe=recipe)
                        if content is not None:
                            self.num_members += 1
                            _decode(column, content, recipe)
                    except ShardError as error:
                        self.problems.append(f"{entry.name} {index.key(row)}: {error}")

    def _verify_keys(self, entry: ShardEntry, index: ShardIndex) -> None:
        """Compare a shard's keys and sessions with those of earlier shards, and add them."""
        if index.num_samples != entry.num_samples:
            self.problems.append(
                f"{entry.name}: its index has {index.num_samples} samples, the manifest says "
                f"{entry.num_samples}; {self._fix}"
            )
        for key in map(index.key, range(index.num_samples)):
            if key in self.keys:
                self.problems.append(f"{entry.name}: key {key} occurs twice in the set")
            self.keys.add(key)
        for session in index.sessions:
            if self.splits.setdefault(session, entry.split) != entry.split:
                self.problems.append(
                    f"{entry.name}: session {session} is in both splits: held-out data leaks"
                )


def describe_set(location: Path | str) -> Iterator[tuple[str, str]]:
    """Describe a shard set in lines of (name, value).

    Raises:
        ShardError: the manifest can't be read.
        StorageError: the store can't be reached.
    """
    with open_shard_set(parse_location(location)) as store:
        manifest = store.read_manifest()
    recipe = manifest.recipe
    yield "location", str(store)
    yield "format", str(FORMAT_VERSION)
    yield "fingerprint", f"{manifest.fingerprint} (generation {manifest.generation})"
    for split in SPLITS:
        entries = manifest.in_split(split)
        size = sum(e.length_bytes for e in entries)
        num = manifest.num_samples(split)
        yield split, f"{num} samples in {len(entries)} shards, {size / 2**20:.1f} MiB"
    counts = manifest.counts
    planned, rejected = counts["segments_planned"], counts["segments_rejected"]
    segments = f"{planned} planned = {counts['samples']} samples + {rejected} rejected"
    yield "segments", f"{segments} (see {REJECTED_FILE})"
    yield (
        "segment",
        f"{recipe.segment.duration_s:g} s, every {recipe.segment.effective_stride_s:g} s",
    )
    for name, schema in manifest.fields.items():
        shape = "x".join(str(n) for n in schema["shape"]) or "variable"
        yield name, f"{schema['dtype']} {shape}, {schema['unit']}, {schema['codec']}"
    yield from _describe_statistics(manifest.statistics)


def describe_sample(location: Path | str, key: str) -> Iterator[tuple[str, str]]:
    """Describe one sample in lines of (name, value).

    Raises:
        ShardError: there is no such sample, or it can't be read.
        StorageError: the store can't be reached.
    """
    with open_shard_set(parse_location(location)) as store:
        manifest = store.read_manifest()
        entry, index, row = _find_sample(store, manifest, key)
        arrays = index.arrays
        present = streams_from_bits(int(arrays["present"][row]))
        yield "sample", f"{key}, row {row} of {entry.name}"
        yield "time", f"[{arrays['start_s'][row]:g}, {arrays['stop_s'][row]:g}) s of its session"
        yield "streams", ", ".join(present) or "none"
        for stream in present:
            name = f"{stream}.error_s"
            if name in arrays:
                yield stream, _frame_errors(np.asarray(arrays[name][row]))
        for column, tables in MEMBER_TABLES.items():
            for table in tables:
                members = index.members(table)
                span = f"{int(members.length[row])} bytes at {int(members.offset[row])}"
                yield table, f"{span} of {index.columns[column]['file']}"
        with closing(store.open_column(index.columns["text"]["file"])) as file:
            text = _read_member(file, index, table="text", row=row, recipe=manifest.recipe)
        for event in decode_text(text).events if text is not None else ():
            yield event.stream, f"{event.time_s:7.2f} s  {event.text}"


def _frame_errors(error_s: NDArray[np.float32]) -> str:
    """Describe how far frames are from their grid times; NaN means a masked frame."""
    masked = int(np.isnan(error_s).sum())
    worst_ms = 1000 * np.nanmax(np.abs(error_s)) if masked < len(error_s) else np.nan
    return f"{len(error_s)} frames, worst {worst_ms:.1f} ms off, {masked} masked"


def _read_index(store: ShardSetStore, entry: ShardEntry) -> ShardIndex:
    index = store.read_index(entry.index_file, sha256=entry.index_sha256)
    require_complete(index, origin=f"{store}/{entry.index_file}")
    return index


def _read_member(
    file: ColumnFile, index: ShardIndex, *, table: str, row: int, recipe: Recipe
) -> bytes | None:
    return file.read(index.members(table), row, max_bytes=member_limits(recipe)[table])


def _decode(column: str, content: bytes, recipe: Recipe) -> None:
    """Decode a member of a tar column; chunks of Zarr columns have nothing to decode.

    Raises:
        CorruptError: it does not decode.
    """
    if column.startswith("vision"):
        size = recipe.vision.size
        shape = (recipe.count(recipe.vision.rate_hz), size, size, 3)
        decode_pictures(content, recipe=recipe.vision, out=np.empty(shape, np.uint8))
    elif column == "audio":
        decode_wav(content)
    elif column == "text":
        decode_text(content)


def _find_sample(
    store: ShardSetStore, manifest: Manifest, key: str
) -> tuple[ShardEntry, ShardIndex, int]:
    session = key.rpartition("/")[0]
    example = ""
    for entry in manifest.shards:
        index = _read_index(store, entry)
        example = example or index.key(0)
        if session in index.sessions:
            for row in range(index.num_samples):
                if index.key(row) == key:
                    return entry, index, row
    if not example:
        raise CorruptError(f"{store}: the set has no sample")
    raise ShardError(
        f"{store}: no sample {key!r}; fix: use a key SESSION/SEGMENT such as {example}"
    )


_GROUP_NAMES = {
    "touch": ("touch values",),
    "proprio": ("joint angles", "joint velocities"),
    "audio_level": ("dB of segments",),
}
"""Field -> names of its groups of values that share a histogram range."""

_BARS = "▁▂▃▄▅▆▇█"


def _describe_statistics(statistics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Describe the distributions of the train split; values of one range form a group."""
    for name, group_names in _GROUP_NAMES.items():
        values = statistics.get(name, {})
        if not values.get("count") or "histogram" not in values:
            continue
        groups = groupby(range(len(values["mean"])), key=lambda i: values["range"][i])
        for group_name, (limits, indexes) in zip(group_names, groups, strict=False):
            yield group_name, _distribution(values, list(indexes), limits)
    for name in ("internal_tokens", "external_tokens"):
        counts = statistics.get(name, [])
        used = sum(count > 0 for count in counts)
        yield name.replace("_", " "), f"{sum(counts)} of {used} kinds"


def _distribution(
    values: Mapping[str, Any], indexes: Sequence[int], limits: Sequence[float]
) -> str:
    """Format mean, deviation, range and histogram of some values of a field together."""
    means, stds = ([values[name][i] for i in indexes] for name in ("mean", "std"))
    mean = fmean(means)
    # Total variance = mean of the variances + variance of the means.
    std = math.hypot(*stds, *(m - mean for m in means)) / math.sqrt(len(indexes))
    low, high = (f([values[f.__name__][i] for i in indexes]) for f in (min, max))
    counts = [sum(bin_) for bin_ in zip(*(values["histogram"][i] for i in indexes), strict=True)]
    num_outside = counts[0] + counts[-1]
    outside = f", {num_outside} beyond" if num_outside else ""
    return (
        f"{mean:.3g} +- {std:.3g}, {low:.3g} to {high:.3g}; "
        f"{limits[0]:.3g} {_bars(counts[1:-1])} {limits[1]:.3g}{outside}"
    )


def _bars(counts: Sequence[int]) -> str:
    """Draw a bar for each count, a blank for zero."""
    most = max(*counts, 1)
    return "".join(_BARS[(count * len(_BARS) - 1) // most] if count else " " for count in counts)
