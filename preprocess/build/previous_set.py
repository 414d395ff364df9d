"""The shard set that a build updates: what its shards hold, and which rows can be reused.

A row is reused if everything that it depends on is the same as now: the session's segments and
files (hashed per session and column) and the recipe's settings of the column.
"""

from __future__ import annotations

import functools
import math
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any

from preprocess.build.plan_types import (
    BuiltShard,
    Cause,
    FromSession,
    FromShards,
    PreviousSet,
    SessionSegments,
    built_columns,
    sessions_of,
    verdicts_of,
)
from preprocess.build.sources import HASHED_BYTES_PER_S
from shared.errors import CorruptError, FormatVersionError, ShardError
from shared.files import sha256_of_bytes, stable_json
from shared.machine import pause_collector
from shared.session.folder import files_of_stream, source_files
from shared.shardset.layout import columns_of
from shared.shardset.manifest import find_runs
from shared.shardset.store import map_small_files
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from preprocess.build.plan_types import BuiltColumn
    from preprocess.cluster import Cluster
    from shared.kinds.column import Column
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan
    from shared.shardset.index import ShardIndex
    from shared.shardset.manifest import Manifest, ShardEntry
    from shared.shardset.store import ShardSetStore


@pause_collector()
def read_previous_set(
    manifest: Manifest,
    store: ShardSetStore,
    sizes: Mapping[str, int],
    *,
    corrupt: Collection[str] = (),
) -> PreviousSet:
    """Describe a finished set for the plan; shards with an unreadable index are listed as lost.

    `corrupt` names column files of the right size whose bytes differ from their checksum.

    Raises:
        FormatVersionError: an index has a version that this program does not read.
    """
    headers: dict[str, Mapping[str, Any]] = {}

    def describe(entry: ShardEntry) -> BuiltShard | ShardEntry:
        try:
            index = store.read_index(entry.index_file, sha256=entry.index_sha256)
            shard = _describe_shard(entry, index, sizes, corrupt)
        except FormatVersionError:
            raise
        except (ShardError, KeyError, TypeError):
            return entry
        headers[entry.index_file] = index.header
        return shard

    described = map_small_files(store, describe, manifest.shards)
    return PreviousSet(
        recipe=manifest.recipe,
        generation=manifest.generation,
        shards=tuple(shard for shard in described if isinstance(shard, BuiltShard)),
        lost=tuple(entry for entry in described if not isinstance(entry, BuiltShard)),
        headers=headers,
    )


def _describe_shard(
    entry: ShardEntry, index: ShardIndex, sizes: Mapping[str, int], corrupt: Collection[str]
) -> BuiltShard:
    if find_runs(index) != entry.runs:
        raise CorruptError(f"{entry.index_file}: has other runs than the manifest says")
    columns = built_columns(index)
    faults = {}
    for name, column in columns.items():
        if sizes.get(column.file) != column.length_bytes:
            faults[name] = Cause.FILE_MISSING
        elif column.file in corrupt:
            faults[name] = Cause.FILE_CORRUPT
    return BuiltShard(
        name=entry.name,
        split=entry.split,
        sessions=sessions_of(index),
        index_file=entry.index_file,
        columns=columns,
        faults=faults,
        verdicts=verdicts_of(index),
        decode_failures=frozenset((f["session"], f["stream"]) for f in index.decode_failures),
    )


def find_corrupt_files(
    indexes: Sequence[str], store: ShardSetStore, sizes: Mapping[str, int], cluster: Cluster
) -> set[str]:
    """Find column files whose bytes differ from the checksum in a readable index."""
    seconds = sum(sizes.values()) / HASHED_BYTES_PER_S / max(1, len(indexes))
    find = partial(_corrupt_columns, store=store)
    corrupt = cluster.map(find, indexes, label="check shards", weights=[seconds] * len(indexes))
    return {file for files in corrupt for file in files}


def _corrupt_columns(index_file: str, *, store: ShardSetStore) -> list[str]:
    """Find the corrupt column files of one shard; a missing file is not corrupt."""
    corrupt: list[str] = []
    with suppress(ShardError, KeyError, TypeError):
        for header in store.read_index(index_file).columns.values():
            with suppress(ShardError), closing(store.open_column(header["file"])) as column:
                if column.sha256() != header["sha256"]:
                    corrupt.append(header["file"])
    return corrupt


_TIMESTAMPED_KINDS = (Kind.SENSOR, Kind.TEXT)
"""Kinds whose samples have timestamps on the recorder's clock."""


def row_hash(stored: SessionSegments, column: Column, scan: SessionScan, recipe: Recipe) -> str:
    """Hash everything that the rows of a session depend on in a column, besides the recipe.

    A plan needs millions of them. So the JSON of :func:`fingerprint_of` is put together from texts,
    and those of the segments are kept.
    """
    stream, spec = column.stream, recipe.streams[column.stream]
    files = [
        f"{encode_basestring(name)}:{encode_basestring(scan.source_files[name].sha256)}"
        for name in sorted(files_of_stream(spec))
        if name in scan.source_files
    ]
    shares = scan.coverage.get(stream)
    present = (shares is not None,) * len(stored.segments)
    if shares is not None and not all(shares):
        present = tuple([shares[number] > 0 for number in stored.segments])
    texts = {
        "session": encode_basestring(stored.session),
        "segments": _segments_json(stored.segments),
        "present": _present_json(present),
        "files": f"{{{','.join(files)}}}",
        "gain": _number_json(scan.gains.get(stream)),
        "start_s": _number_json(scan.start_overrides.get(stream)),
    }
    if spec.kind in _TIMESTAMPED_KINDS and spec.clock == "session":
        texts["clock_offset_s"] = _number_json(scan.clock_offset_s)
    if stream in scan.stretches:
        texts["stretch"] = _number_json(scan.stretches[stream])
    corrections = {f: scan.corrections[f] for f in files_of_stream(spec) if f in scan.corrections}
    if corrections:
        texts["corrections"] = stable_json({file: asdict(c) for file, c in corrections.items()})
    if spec.kind is Kind.TEXT:  # events after the session's end are left out
        texts["duration_s"] = _number_json(scan.duration_s)
    if stream in scan.mixes:
        texts["mix"] = stable_json([scan.mixes[stream].weights, scan.mixes[stream].offset])
    if stream in scan.masked:
        masked = [[s.start_s, s.stop_s, s.reason] for s in scan.masked[stream]]
        texts["masked"] = stable_json(masked)
    inputs = ",".join([f'"{key}":{text}' for key, text in sorted(texts.items())])
    return sha256_of_bytes(f"[{{{inputs}}}]".encode())[:32]


# Two caches, as (0, 1) and (False, True) are equal.
_segments_json = functools.lru_cache(maxsize=1024)(stable_json)
_present_json = functools.lru_cache(maxsize=1024)(stable_json)


def _number_json(value: float | None) -> str:
    if value is None:
        return "null"
    is_plain = type(value) is float and math.isfinite(value)
    return repr(value) if is_plain else stable_json(value)


def recipe_part(basis: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a column depends on besides its rows."""
    return {key: value for key, value in basis.items() if key != "rows"}


class PreviousRows:
    """Rows of the previous set, compared with the sessions as they are now."""

    def __init__(
        self, shards: Iterable[BuiltShard], scans: Mapping[str, SessionScan], recipe: Recipe
    ) -> None:
        self._scans = scans
        self._recipe = recipe
        self._columns = columns_of(recipe)
        files = {n: files_of_stream(recipe.streams[c.stream]) for n, c in self._columns.items()}
        self._columns_of_file = {
            file: {name for name in files if file in files[name]} for file in source_files(recipe)
        }
        self._changed: dict[str, set[str]] = {}
        self._stored: dict[str, list[tuple[BuiltShard, SessionSegments]]] = {}
        for shard in shards:
            for stored in shard.sessions:
                self._stored.setdefault(stored.session, []).append((shard, stored))

    def __contains__(self, session: str) -> bool:
        return session in self._stored

    def choose_source(
        self, needed: SessionSegments, column: Column, basis: Mapping[str, Any]
    ) -> FromShards | FromSession:
        """Find previous shards that hold all rows as they would be made now, or the recording."""
        missing, files = set(needed.segments), []
        for shard, stored in self._stored.get(needed.session, ()):
            built = shard.columns.get(column.name)
            if built is None or column.name in shard.faults or missing.isdisjoint(stored.segments):
                continue
            # Which segments of a broken video decode depends on where decoding begins.
            has_failed = (needed.session, column.stream) in shard.decode_failures
            if stored != needed and has_failed:
                continue
            has_same_settings = recipe_part(built.basis) == recipe_part(basis)
            if has_same_settings and self._is_same(built, stored, column):
                files.append(shard.index_file)
                missing -= set(stored.segments)
        return FromSession() if missing else FromShards(tuple(files))

    def describe_session_changes(
        self, session: str, segments: Sequence[int], column: Column | None
    ) -> str:
        """Describe what changed in a session, or in what a column takes from it; empty for nothing.

        Only hashes of the previous rows are known. The columns whose hash changed show which files
        changed.
        """
        before = [number for _, stored in self._stored[session] for number in stored.segments]
        if before != list(segments):
            if len(before) == len(segments):
                return "other segments"
            return f"{len(before)} -> {len(segments)} segments"
        changed = self._changed_columns(session)
        files = {f: columns for f, columns in self._columns_of_file.items() if columns <= changed}
        # A file explains another one whose columns are some of its own.
        explained = {f for f, own in files.items() if any(own < other for other in files.values())}
        return ", ".join(
            f
            for f, columns in files.items()
            if f not in explained and (column is None or column.name in columns)
        )

    def _changed_columns(self, session: str) -> set[str]:
        """Return the columns whose rows of a session would not be the same now."""
        if session not in self._changed:
            self._changed[session] = {
                name
                for shard, stored in self._stored[session]
                for name, built in shard.columns.items()
                if name in self._columns and not self._is_same(built, stored, self._columns[name])
            }
        return self._changed[session]

    def _is_same(self, built: BuiltColumn, stored: SessionSegments, column: Column) -> bool:
        """Return whether the rows of a session have the hash that they would have now."""
        scan = self._scans.get(stored.session)
        if scan is None or max(stored.segments) >= scan.num_segments:
            return False
        return built.rows.get(stored.session) == row_hash(stored, column, scan, self._recipe)
