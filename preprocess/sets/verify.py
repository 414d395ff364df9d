"""Verify every byte of a shard set, or describe a set or one of its samples."""

from __future__ import annotations

import json
import math
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.build.commit import count_segments
from shared.errors import CorruptError, MachineError, ShardError, StorageError, rebuild_hint
from shared.kinds.audio import decode_wav
from shared.kinds.text import decode_text
from shared.kinds.video import decode_pictures
from shared.recipe import SPLITS, Recipe
from shared.shardset.columns import read_chunk
from shared.shardset.index import FLAG_BITS, VERDICT_BITS, ShardIndex, require_matching
from shared.shardset.layout import columns_of
from shared.shardset.manifest import FORMAT_VERSION, REJECTED_FILE, Manifest, ShardEntry, find_runs
from shared.shardset.store import ShardSetStore, open_shard_set
from shared.storage import parse_location
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.kinds.column import Column


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What verifying a set found."""

    num_shards: int
    num_samples: int
    num_members: int
    length_bytes: int
    problems: tuple[str, ...]
    unread: tuple[str, ...]
    """Files that the machine could not read, and why."""


def verify_set(
    location: Path | str, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> VerifyResult:
    """Verify a shard set.

    Checksums of all files and members match, every member decodes, streams, runs and keys are what
    the manifest says, keys are unique, no session is in two splits, and planned segments = samples
    + rejected segments. A column at a time is downloaded from a URL. After each shard, `progress`
    is called with the numbers of verified and of all shards.

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
        if not verifier.unread:  # otherwise samples are missing from the counts
            verifier.verify_counts()
    return VerifyResult(
        num_shards=len(manifest.shards),
        num_samples=len(verifier.keys),
        num_members=verifier.num_members,
        length_bytes=sum(e.length_bytes for e in manifest.shards),
        problems=tuple(verifier.problems),
        unread=tuple(verifier.unread),
    )


@dataclass(slots=True)
class _Verifier:
    """Problems of a set, and what later shards are compared with."""

    store: ShardSetStore
    manifest: Manifest
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
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
        columns = columns_of(self.manifest.recipe)
        with self._collect_errors():
            index = _read_index(self.store, entry, self.manifest.recipe)
            for column in columns.values():
                with self._collect_errors():
                    self._verify_column(entry, index, column)
            self._verify_keys(entry, index)

    @contextmanager
    def _collect_errors(self) -> Iterator[None]:
        """Record damage as a problem, and what the machine could not read as unread."""
        try:
            yield
        except StorageError:
            raise
        except MachineError as error:
            self.unread.append(str(error))
        except ShardError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{error.filename}: can't be read: {error.strerror}; {self._fix}")

    def verify_tokenizer(self) -> None:
        """Verify that the tokenizer is the one that the manifest names."""
        name = self.manifest.tokenizer_file
        origin = f"{self.store}/{name}"
        with self._collect_errors():
            self.manifest.load_tokenizer(self.store.read(name), origin=origin)

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

    def _verify_column(self, entry: ShardEntry, index: ShardIndex, column: Column) -> None:
        """Verify the checksum of a column's file, and that every member is whole and decodes."""
        header = index.columns[column.name]
        with closing(self.store.open_column(header["file"])) as file:
            if file.sha256() != header["sha256"]:
                self.problems.append(f"{file.origin}: checksum differs from its index; {self._fix}")
            for row in range(index.num_samples):
                try:
                    content = file.read(index.members(column.name), row, max_bytes=column.max_bytes)
                    if content is not None:
                        self.num_members += 1
                        _decode(content, column, self.manifest.recipe)
                except ShardError as error:
                    self.problems.append(f"{entry.name} {index.key(row)}: {error}")

    def _verify_keys(self, entry: ShardEntry, index: ShardIndex) -> None:
        """Compare a shard's keys and sessions with those of earlier shards, and add them."""
        if (runs := find_runs(index)) != entry.runs:
            self.problems.append(
                f"{entry.name}: its index has {index.num_samples} samples in {len(runs)} runs, not "
                f"those of the manifest, {entry.num_samples} in {len(entry.runs)}; {self._fix}"
            )
        if index.streams != list(self.manifest.recipe.streams):
            self.problems.append(
                f"{entry.name}: its index has other streams than the manifest's recipe; {self._fix}"
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
    yield "segments", f"{segments}, {recipe.segment_s:g} s each (see {REJECTED_FILE})"
    for name, schema in manifest.fields.items():
        shape = "x".join(str(n) for n in schema["shape"]) or "variable"
        described = (f"{schema['dtype']} {shape}", schema["unit"], schema["codec"])
        yield name, f"{schema['kind']}: {', '.join(filter(None, described))}"
    yield from _describe_statistics(manifest.statistics, recipe)


def describe_sample(location: Path | str, key: str) -> Iterator[tuple[str, str]]:
    """Describe one sample in lines of (name, value).

    Raises:
        ShardError: there is no such sample, or it can't be read.
        StorageError: the store can't be reached.
    """
    with open_shard_set(parse_location(location)) as store:
        manifest = store.read_manifest()
        entry, index, row = _find_sample(store, manifest, key)
        segment, recipe = index.segment(row), manifest.recipe
        start_s, stop_s = segment * index.segment_s, (segment + 1) * index.segment_s
        yield "sample", f"{key}, row {row} of {entry.name}"
        yield "time", f"[{start_s:g}, {stop_s:g}) s of {index.duration_s(row):g} s of its session"
        yield "streams", ", ".join(index.present_streams(row)) or "none"
        for name, bits in zip(index.streams, index.flags[row].tolist(), strict=True):
            if reasons := [reason for reason, bit in FLAG_BITS.items() if bits & bit]:
                yield "masked", f"{name}: {', '.join(reasons)}"
            if statuses := [status for status, bit in VERDICT_BITS.items() if bits & bit]:
                yield "validated", f"{name}: {(*statuses[1:], 'passed')[0]}"
        for name, column in columns_of(recipe).items():
            if not index.is_present(row, column.stream):
                continue
            members = index.members(name)
            location = f"at {int(members.offset[row])} of {index.columns[name]['file']}"
            yield name, f"{int(members.length[row])} bytes {location}"
            if column.has_time_errors:
                yield name, _frame_errors(np.asarray(index.arrays[f"{name}.error_s"][row]))
            if column.kind is Kind.TEXT:
                with closing(store.open_column(index.columns[name]["file"])) as file:
                    content = file.read(members, row, max_bytes=column.max_bytes)
                for event in decode_text(content or b"").events:
                    yield name, f"{event.time_s:7.2f} s  {event.text}"


def _frame_errors(error_s: NDArray[np.float32]) -> str:
    """Describe how far frames are from their grid times; NaN means a masked frame."""
    masked = int(np.isnan(error_s).sum())
    worst_ms = 1000 * np.nanmax(np.abs(error_s)) if masked < len(error_s) else np.nan
    return f"{len(error_s)} frames, worst {worst_ms:.1f} ms off, {masked} masked"


def _read_index(store: ShardSetStore, entry: ShardEntry, recipe: Recipe) -> ShardIndex:
    index = store.read_index(entry.index_file, sha256=entry.index_sha256)
    origin = f"{store}/{entry.index_file}"
    columns = columns_of(recipe).values()
    require_matching(index, columns, segment_s=recipe.segment_s, origin=origin)
    return index


def _decode(content: bytes, column: Column, recipe: Recipe) -> None:
    """Decode a member."""
    if column.container == "zarr":
        read_chunk(content, dtype=column.dtype, shape=column.shape)
    elif column.kind is Kind.VIDEO:
        out = np.empty(column.shape, np.uint8)
        decode_pictures(content, spec=recipe.videos[column.stream], out=out)
    elif column.kind is Kind.TEXT:
        decode_text(content)
    elif (shape := decode_wav(content).shape) != column.shape:
        raise CorruptError(f"{shape[0]} samples of sound, expected {column.shape[0]}")


def _find_sample(
    store: ShardSetStore, manifest: Manifest, key: str
) -> tuple[ShardEntry, ShardIndex, int]:
    session = key.rpartition("/")[0]
    example = ""
    for entry in manifest.shards:
        index = _read_index(store, entry, manifest.recipe)
        example = example or index.key(0)
        if session in index.sessions:
            for row in range(index.num_samples):
                if index.key(row) == key:
                    return entry, index, row
    if not example:
        raise CorruptError(f"{store}: the set has no sample")
    window = ""
    if "@" in key:
        ticks = f"TICK / ({manifest.recipe.segment_s:g} x model.tick_rate_hz)"
        window = f"; the SEGMENT of a window SESSION@TICK is {ticks}, rounded down"
    raise ShardError(
        f"{store}: no sample {key!r}; fix: use a key SESSION/SEGMENT such as {example}{window}"
    )


_BARS = "▁▂▃▄▅▆▇█"


def _describe_statistics(
    statistics: Mapping[str, Any], recipe: Recipe
) -> Iterator[tuple[str, str]]:
    """Describe the distributions of the train split; the values of a group together."""
    for name, spec in recipe.streams.items():
        values = statistics.get(name, {})
        if spec.kind is Kind.SENSOR and values["count"]:
            for group, columns in zip(spec.values, spec.slices, strict=True):
                if values["range"][columns.start] is not None:
                    unit = f" {group.unit_label}" if group.unit_label else ""
                    indexes = range(columns.start, columns.stop)
                    yield name, f"{group.type}:{unit} {_distribution(values, indexes)}"
        elif spec.kind is Kind.AUDIO and values["level"]["count"]:
            yield name, f"dBFS of segments: {_distribution(values['level'], [0])}"
        elif spec.kind is Kind.TEXT:
            used = sum(count > 0 for count in values["tokens"])
            yield name, f"{sum(values['tokens'])} tokens of {used} kinds"


def _distribution(values: Mapping[str, Any], indexes: Sequence[int]) -> str:
    """Format mean, deviation, range and histogram of some values of a field together."""
    limits = values["range"][indexes[0]]
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
