"""Upgrade shard sets of format 2, without recordings and without decoding a picture.

Format 2 stored windows of the seven default streams in six columns. Here is everything that still
knows it: this module can be deleted one day. Videos stay the files that they are, or their members
are copied. Audio and dMel members are copied. Sensors and texts are rewritten from stored values:
each gets a column of its own, and each token a time of its own.

A row that is copied depends on the same recording as before. :func:`refresh_upgraded` compares the
hash that format 2 kept with the one that the recording would give today, so that the next build
rebuilds only what differs.
"""

from __future__ import annotations

import json
import math
import re
import struct
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.build.commit import NewSet, commit_set
from preprocess.build.plan_types import BuiltColumn, Row
from preprocess.build.previous_set import row_hash
from preprocess.build.write import EncodedRow, IndexBuilder, write_column
from shared.clock import EPSILON_S, Segment
from shared.config import make_section
from shared.errors import CorruptError, ShardError, rebuild_hint
from shared.files import fingerprint_of, sha256_of_bytes, sha256_of_file
from shared.kinds.text import TextReader, TimedText, encode_text
from shared.media.tokenizer import parse_tokenizer
from shared.recipe import Recipe
from shared.shardset.index import Members, index_bytes
from shared.shardset.layout import column_basis, columns_of
from shared.shardset.manifest import (
    MANIFEST_FILE,
    REJECTED_FILE,
    ShardEntry,
    find_runs,
)
from shared.shardset.store import KEEP_OLD_S, claim_shard_set, open_shard_set
from shared.storage import parse_location
from shared.streams import DEFAULT_STREAMS, METADATA_FILE, TEXT_FILE, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.build.plan_types import BuiltShard, PreviousSet, SessionSegments
    from preprocess.build.write import DecodeFailure
    from shared.kinds.column import Column
    from shared.session.scan import SessionScan
    from shared.shardset.columns import ColumnFile
    from shared.shardset.store import ShardSetStore

OLD_VERSION = 2
_MAGIC = b"VRCINDEX"
_PREFIX = struct.Struct("<8sII")
_ALIGNMENT = 64
_ROW_HASH = re.compile(r"format 2: touching ([0-9a-f]+)")
"""How the hash of a row of format 2 is kept if its windows touched, with "other" if not."""

_OLD_STREAMS = tuple(DEFAULT_STREAMS)
"""The streams of format 2, in the order of its presence bits."""

_TEXT_COLUMN, _DMEL_COLUMN = "text", "dmel"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeSummary:
    """What an upgrade did."""

    num_shards: int
    num_segments: int
    kept_files: int
    """Video columns that stay the files that they are."""
    copied_members: int
    rewritten_members: int
    gaps: tuple[str, ...]
    """One line per session in which windows at multiples of their duration are missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _OldShard:
    """A shard of format 2."""

    entry: Mapping[str, Any]
    header: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    rows: Sequence[tuple[str, int | None]]
    """Session of each row, and the segment that its window becomes; None if it starts in one."""

    def members(self, table: str) -> Members:
        """Return the positions of a table's members."""
        names = ("offset", "length", "crc32c")
        return Members(**{name: self.arrays[f"{table}.{name}"] for name in names})

    def present(self, row: int) -> set[str]:
        """Return the streams that a row stores."""
        bits = int(self.arrays["present"][row])
        return {stream for i, stream in enumerate(_OLD_STREAMS) if bits >> i & 1}


def is_format_2(content: bytes) -> bool:
    """Tell whether these are the first bytes of a manifest of format 2."""
    return re.match(rb'\s*\{\s*"format"[^,]*,\s*"format_version"\s*:\s*2\b', content) is not None


def upgrade_set(location: Path | str, *, keep_old_s: float = KEEP_OLD_S) -> UpgradeSummary | None:
    """Upgrade a shard set, a folder or URL, to the present format, in its place.

    `keep_old_s` is that of :func:`shared.shardset.store.claim_shard_set`.

    Returns:
        What was done; None if there is no set of format 2.

    Raises:
        ShardError: the set is corrupt.
        JobError: the disk is full, or another job builds the set.
    """
    parsed = parse_location(location)
    with open_shard_set(parsed) as store:
        content = store.read(MANIFEST_FILE)
        if content is None or not is_format_2(content):
            return None
    with claim_shard_set(parsed, keep_old_s=keep_old_s, version=OLD_VERSION) as store:
        content = store.read(MANIFEST_FILE) or b""
        body, _, last = content.rpartition(b',\n "sha256": "')
        if not body or last[:64] != sha256_of_bytes(body).encode():
            origin = f"{store}/{MANIFEST_FILE}"
            raise CorruptError(f"{origin}: differs from its own checksum; {rebuild_hint(origin)}")
        return _Upgrade(store, json.loads(content)).run()


def convert_recipe(old: Mapping[str, Any]) -> Recipe:
    """Convert the plain values of a recipe of format 2.

    Raises:
        ConfigError: it has other keys or values than such a recipe.
    """
    sensors = old["sensors"]
    streams: dict[str, dict[str, Any]] = {}
    for name, spec in DEFAULT_STREAMS.items():
        streams[name] = {**spec, "required": name in old["required"]}
        if groups := spec.get("values"):
            count = sensors[f"{spec['key']}_size"] // len(groups)
            streams[name]["values"] = [{**group, "count": count} for group in groups]
    values = {
        "segment": {key: old["window"][key] for key in ("duration_s", "min_coverage")},
        "video": old["vision"],
        "audio": {**old["audio"], "dmel": old["mel"]},
        "sensor": {key: sensors[key] for key in ("rate_hz", "max_gap_s")},
        "streams": streams,
        **{key: old[key] for key in ("text", "split", "shard")},
    }
    return make_section(Recipe, values, origin="recipe of the set")


class _Upgrade:
    """The upgrade of one set."""

    def __init__(self, store: ShardSetStore, manifest: Mapping[str, Any]) -> None:
        self._store = store
        self._manifest = manifest
        self._recipe = convert_recipe(manifest["recipe"])
        window = manifest["recipe"]["window"]
        self._window_s = float(window["duration_s"])
        self._stride_s = float(window["stride_s"] or window["duration_s"])
        file, sha256 = (manifest["tokenizer"][key] for key in ("file", "sha256"))
        content = self._read_checked(file, sha256)
        self._tokenizer = parse_tokenizer(content.decode(), origin=f"{store}/{file}")
        self._generation = int(manifest["generation"]) + 1
        self._num_kept = self._num_copied = self._num_rewritten = 0
        self._durations_s: dict[str, float] = {}
        """Estimate of the length of each session by what its windows cover."""
        self._texts: dict[str, dict[str, TextReader]] = {}
        """Reader of each text stream of each session."""

    def run(self) -> UpgradeSummary:
        """Write all shards, commit the set, and remove the old files."""
        shards = [self._read_shard(entry) for entry in self._manifest["shards"]]
        self._read_texts(shards)
        written = [self._write_shard(s) for s in shards if any(n is not None for _, n in s.rows)]
        entries, headers = tuple(entry for entry, _ in written), [header for _, header in written]
        manifest = commit_set(
            NewSet(
                store=self._store,
                recipe=self._recipe,
                shards=entries,
                headers=headers,
                generation=self._generation,
                tokenizer=self._tokenizer,
                tokenizer_file=self._manifest["tokenizer"]["file"],
                num_sessions=self._manifest["counts"]["sessions"],
                rejected=self._rejected_lines(),
                previous=None,
            )
        )
        # The new set does not reference these files of format 2.
        old = {self._manifest["tokenizer"]["file"], *(s.entry["index_file"] for s in shards)}
        old |= {c["file"] for s in shards for c in s.header["columns"].values()}
        needed = {manifest.tokenizer_file, *(entry.index_file for entry in entries)}
        needed |= {c["file"] for header in headers for c in header["columns"].values()}
        for file in sorted((old - needed) & self._store.list_sizes().keys()):
            self._store.remove(file)
        return UpgradeSummary(
            num_shards=len(entries),
            num_segments=sum(entry.num_samples for entry in entries),
            kept_files=self._num_kept,
            copied_members=self._num_copied,
            rewritten_members=self._num_rewritten,
            gaps=tuple(_find_gaps(shards)),
        )

    # --- reading ---

    def _read_checked(self, file: str, sha256: str) -> bytes:
        content = self._store.read(file)
        if content is None or sha256_of_bytes(content) != sha256:
            hint = rebuild_hint(self._store)
            raise CorruptError(f"{self._store}/{file}: is missing or corrupt; {hint}")
        return content

    def _read_shard(self, entry: Mapping[str, Any]) -> _OldShard:
        content = self._read_checked(entry["index_file"], entry["index_sha256"])
        try:
            header, arrays = _parse_index(content)
        except (ValueError, KeyError, TypeError, struct.error) as error:
            origin = f"{self._store}/{entry['index_file']}"
            raise CorruptError(f"{origin}: is damaged: {error}") from error
        rows = zip(arrays["session"].tolist(), arrays["window"].tolist(), strict=True)
        segments = [(header["sessions"][session], self._segment_of(w)) for session, w in rows]
        return _OldShard(entry=entry, header=header, arrays=arrays, rows=segments)

    def _segment_of(self, window: int) -> int | None:
        """Return the segment that a window becomes; None if it starts within one."""
        segment = window * self._stride_s / self._window_s
        return round(segment) if abs(segment - round(segment)) < EPSILON_S else None

    def _read_texts(self, shards: Sequence[_OldShard]) -> None:
        """Read the texts of every session, and give each token its time."""
        events: dict[str, dict[str, list[TimedText]]] = {}
        for shard in shards:
            shares = shard.arrays["coverage"].max(axis=1).astype(np.float64)
            stops_s = shard.arrays["start_s"] + self._window_s * shares
            members = shard.members(_TEXT_COLUMN)
            with closing(self._open(shard, _TEXT_COLUMN)) as file:
                for row, (session, segment) in enumerate(shard.rows):
                    stop_s = max(float(stops_s[row]), self._durations_s.get(session, 0.0))
                    self._durations_s[session] = stop_s
                    own = events.setdefault(session, {})
                    content = None if segment is None else file.read(members, row)
                    for stream, event in _old_events(content, origin=file.origin):
                        own.setdefault(stream, []).append(event)
        for session, own in events.items():
            self._texts[session] = {
                name: TextReader(
                    sorted(own.get(spec.stream or "", ()), key=lambda event: event.time_s),
                    spec,
                    tokenizer=self._tokenizer,
                    duration_s=self._durations_s[session],
                    segment_s=self._recipe.segment_s,
                )
                for name, spec in self._recipe.texts.items()
            }

    def _open(self, shard: _OldShard, column: str) -> ColumnFile:
        header = shard.header["columns"][column]
        return self._store.open_column(
            header["file"], sha256=header["sha256"], length_bytes=header["length_bytes"]
        )

    # --- writing ---

    def _write_shard(self, shard: _OldShard) -> tuple[ShardEntry, Mapping[str, Any]]:
        """Write the columns and the index of a shard, of which some window becomes a segment."""
        rows = self._rows_of(shard)
        sessions = dict.fromkeys(row.session for row in rows.values())
        builder = IndexBuilder(
            rows=list(rows.values()),
            recipe=self._recipe,
            durations_s={session: self._durations_s[session] for session in sessions},
        )
        name, split = shard.entry["name"], shard.entry["split"]
        with self._store.staging_dir() as work:
            for column in columns_of(self._recipe).values():
                if column.has_time_errors:
                    builder.decode_failures += self._old_failures(shard, column.stream)
                if column.has_time_errors and len(rows) == len(shard.rows):
                    self._keep_column(builder, column, shard)
                    continue
                file = f"{name}.g{self._generation}.{column.name}.{column.suffix}"
                path = work / file
                write_column(builder, column, path, self._iter_rows(shard, column, rows))
                size, sha256 = path.stat().st_size, sha256_of_file(path)
                built = {"file": file, "length_bytes": size, "sha256": sha256}
                self._add_built(builder, column, shard, entry=built)
                self._store.put(path, file)
                path.unlink(missing_ok=True)
            index = builder.index(name=name, split=split)
            content = index_bytes(index)
            file = f"{name}.g{self._generation}.index"
            self._store.write(file, content)
        entry = ShardEntry(
            name=name,
            split=split,
            num_samples=len(rows),
            runs=find_runs(index),
            length_bytes=sum(column.length_bytes for column in builder.columns.values()),
            index_file=file,
            index_sha256=sha256_of_bytes(content),
        )
        return entry, index.header

    def _rows_of(self, shard: _OldShard) -> dict[int, Row]:
        """Return the new row of each old position whose window becomes a segment."""
        rows: dict[int, Row] = {}
        for position, (session, number) in enumerate(shard.rows):
            if number is not None:
                present = shard.present(position)
                shares = dict(zip(_OLD_STREAMS, shard.arrays["coverage"][position], strict=True))
                rows[position] = Row(
                    number=len(rows),
                    session=session,
                    segment=Segment(number, self._window_s),
                    present=tuple(stream for stream in self._recipe.streams if stream in present),
                    coverage=[float(shares[stream]) for stream in self._recipe.streams],
                )
        return rows

    def _iter_rows(
        self, shard: _OldShard, column: Column, rows: Mapping[int, Row]
    ) -> Iterator[EncodedRow]:
        """Yield the rows that have a column's stream."""
        table = _old_table(column, shard)
        errors = shard.arrays[f"{column.name}.error_s"] if column.has_time_errors else None
        with closing(self._open(shard, table.partition("/")[0])) as file:
            for position, row in rows.items():
                if column.stream not in row.present:
                    continue
                if column.kind is Kind.TEXT:
                    text = self._texts[row.session][column.stream].read(row.segment)
                    content: bytes | None = encode_text(text)
                else:
                    content = file.read(shard.members(table), position)
                if content is None:
                    raise ShardError(f"{file.origin}: lacks {row.key}; {rebuild_hint(self._store)}")
                if column.kind in (Kind.SENSOR, Kind.TEXT):
                    self._num_rewritten += 1
                else:
                    self._num_copied += 1
                yield EncodedRow(row, content, None if errors is None else errors[position])

    def _keep_column(self, builder: IndexBuilder, column: Column, shard: _OldShard) -> None:
        """Take over a video column as the file that it is."""
        members = shard.members(column.name)
        builder.add_members(column, members)
        builder.mark_present(column.stream, members.length > 0)
        builder.arrays[f"{column.name}.error_s"] = shard.arrays[f"{column.name}.error_s"]
        self._add_built(builder, column, shard, entry=shard.header["columns"][column.name])
        self._num_kept += 1

    def _add_built(
        self, builder: IndexBuilder, column: Column, shard: _OldShard, *, entry: Mapping[str, Any]
    ) -> None:
        """Describe a column; its rows keep the hashes of format 2."""
        old = shard.header["columns"][_old_table(column, shard).partition("/")[0]]
        how = "touching" if self._stride_s == self._window_s else "other"
        rows = {name: f"format 2: {how} {old['rows'][name]}" for name in builder.durations_s}
        settings = column_basis(column, self._recipe, tokenizer_sha256=self._tokenizer.sha256)
        basis = {**settings, "rows": fingerprint_of(list(rows.values()))}
        builder.columns[column.name] = BuiltColumn(
            **{key: entry[key] for key in ("file", "length_bytes", "sha256")},
            fingerprint=fingerprint_of(basis),
            basis=basis,
            rows=rows,
        )

    def _old_failures(self, shard: _OldShard, stream: str) -> list[DecodeFailure]:
        """Return the decode failures of a stream, by segment."""
        failures = []
        for failure in shard.header["losses"]:
            segment = self._segment_of(failure["window"])
            if failure["stream"] == stream and segment is not None:
                values = {key: value for key, value in failure.items() if key != "window"}
                failures.append({**values, "segment": segment})
        return failures

    def _rejected_lines(self) -> list[dict[str, Any]]:
        """Convert the lines of ``rejected.jsonl``; windows that start within a segment go."""
        content = (self._store.read(REJECTED_FILE) or b"").decode()
        lines = []
        for values in map(json.loads, filter(None, content.split("\n"))):
            if (window := values.pop("window", None)) is not None:
                values["segment"] = self._segment_of(window)
            if "windows" in values:
                count = values.pop("windows") * self._stride_s / self._window_s
                values["segments"] = math.ceil(count - EPSILON_S)
            if values["level"] == "window":
                values["level"] = "segment"
            if window is None or values["segment"] is not None:
                lines.append(values)
        return lines


def _find_gaps(shards: Sequence[_OldShard]) -> Iterator[str]:
    """Describe the windows that no multiple of the duration starts."""
    kept: dict[str, set[int]] = {}
    for session, segment in (row for shard in shards for row in shard.rows):
        kept.setdefault(session, set()).update([] if segment is None else [segment])
    for session, segments in sorted(kept.items()):
        num_missing = max(segments, default=-1) + 1 - len(segments)
        if num_missing or not segments:
            yield f"{session}: {num_missing or 'all'} segments are not in the set"


def _old_table(column: Column, shard: _OldShard) -> str:
    """Return the table of members of format 2 that holds a column's values."""
    if column.kind is Kind.SENSOR:
        suffix = f"/{DEFAULT_STREAMS[column.stream]['key']}.offset"
        return next(n for n in shard.arrays if n.endswith(suffix)).removesuffix(".offset")
    if column.kind is Kind.TEXT:
        return _TEXT_COLUMN
    is_dmel = column.name.endswith(f".{_DMEL_COLUMN}")
    return f"{_DMEL_COLUMN}/{_DMEL_COLUMN}" if is_dmel else column.name


def _old_events(content: bytes | None, *, origin: str) -> Iterator[tuple[str, TimedText]]:
    """Yield stream and text of each event of a text member of format 2."""
    try:
        for event in json.loads(content)["events"] if content is not None else ():
            yield str(event["stream"]), TimedText(float(event["time_s"]), str(event["text"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{origin}: not a text member: {error}") from error


def _parse_index(content: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Parse the bytes of an index of format 2, whose checksum was right."""
    magic, version, length = _PREFIX.unpack_from(content)
    if magic != _MAGIC or version != OLD_VERSION:
        raise ValueError(f"not an index of version {OLD_VERSION}")
    header = json.loads(content[_PREFIX.size : _PREFIX.size + length])
    start = -(-(_PREFIX.size + length) // _ALIGNMENT) * _ALIGNMENT
    arrays = {}
    for name, (dtype, shape, offset) in header["arrays"].items():
        if dtype not in ("u1", "u4", "u8", "f4", "f8") or min([offset, *shape]) < 0:
            raise ValueError(f"array {name} has the form {dtype} {shape} at {offset}")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raw = content[start + offset : start + offset + size]
        arrays[name] = np.frombuffer(raw, dtype=f"<{dtype}").reshape(shape)
    return header, arrays


# --- builds onto an upgraded set ----------------------------------------------------------------


def refresh_upgraded(
    previous: PreviousSet, scans: Mapping[str, SessionScan], recipe: Recipe
) -> PreviousSet:
    """Give upgraded rows the hashes of today, where the recordings still give the same bytes.

    `scans` are those of every session as it is now, and the next build is by `recipe`.
    """
    shards = tuple(_refresh_shard(shard, scans, recipe) for shard in previous.shards)
    return replace(previous, shards=shards)


def _refresh_shard(
    shard: BuiltShard, scans: Mapping[str, SessionScan], recipe: Recipe
) -> BuiltShard:
    """Replace the hashes of format 2 in the columns of a shard."""
    columns, segments = columns_of(recipe), {stored.session: stored for stored in shard.sessions}
    refreshed = {}
    for name, built in shard.columns.items():
        rows = dict(built.rows)
        for session, recorded in rows.items():
            stored, column, scan = segments.get(session), columns.get(name), scans.get(session)
            match = _ROW_HASH.fullmatch(recorded)
            if match is None or stored is None or column is None or scan is None:
                continue
            if _old_row_hash(column, stored, scan=scan, recipe=recipe) == match[1]:
                rows[session] = row_hash(stored, column, scan, recipe)
        if rows != built.rows:
            basis = {**built.basis, "rows": fingerprint_of(list(rows.values()))}
            refreshed[name] = replace(
                built, rows=rows, basis=basis, fingerprint=fingerprint_of(basis)
            )
    if not refreshed:
        return shard
    return replace(shard, columns={**shard.columns, **refreshed}, is_refreshed=True)


def _old_row_hash(
    column: Column, segments: SessionSegments, *, scan: SessionScan, recipe: Recipe
) -> str | None:
    """Hash what rows of format 2 depended on, as it did; None if they stored other rows."""
    if column.stream not in _OLD_STREAMS:
        return None
    files: tuple[str, ...] = (recipe.streams[column.stream].file,)
    own: tuple[str, ...] = (column.stream,)
    if column.kind in (Kind.SENSOR, Kind.TEXT):  # these streams shared a column of format 2
        own = tuple(n for n, spec in DEFAULT_STREAMS.items() if spec["kind"] == column.kind)
        files = (METADATA_FILE,) if column.kind is Kind.SENSOR else (METADATA_FILE, TEXT_FILE)
    minimum, bits = recipe.segment.min_coverage, []
    for segment in segments.segments:
        now = {s: scan.coverage[s][segment] for s in own if s in scan.coverage}
        before = {s for s, share in now.items() if round(share, 4) >= minimum and round(share, 4)}
        if (now.get(column.stream, 0.0) > 0) != (column.stream in before):
            return None
        bits.append(sum(1 << _OLD_STREAMS.index(s) for s in before))
    sources = {n: scan.source_files[n].sha256 for n in files if n in scan.source_files}
    offset_s = scan.clock_offset_s if METADATA_FILE in files else 0.0
    gain = scan.gains.get(column.stream, 1.0)
    inputs = [segments.session, segments.segments, bits, sources, offset_s, gain]
    starts = {s: scan.start_overrides[s] for s in own if s in scan.start_overrides}
    return fingerprint_of([*inputs, starts] if starts else inputs)
