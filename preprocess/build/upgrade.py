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
from shared.recipe import Recipe
from shared.shardset.index import Members, index_bytes
from shared.shardset.layout import column_basis, columns_of
from shared.shardset.manifest import (
    MANIFEST_FILE,
    REJECTED_FILE,
    Manifest,
    ShardEntry,
    find_runs,
)
from shared.shardset.store import KEEP_OLD_S, claim_shard_set, open_shard_set
from shared.storage import parse_location
from shared.streams import DEFAULT_STREAMS, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.build.plan_types import BuiltShard, PreviousSet, SessionSegments
    from preprocess.build.write import DecodeFailure
    from shared.kinds.column import Column
    from shared.media.tokenizer import TextTokenizer
    from shared.session.scan import SessionScan
    from shared.shardset.columns import ColumnFile
    from shared.shardset.store import ShardSetStore

OLD_VERSION = 2
_MAGIC = b"VRCINDEX"
_PREFIX = struct.Struct("<8sII")
_ALIGNMENT = 64
_ROW_HASH = re.compile(r"format 2: (touching|other) ([0-9a-f]+)")
"""How the hash of a row of format 2 is kept, and whether its windows touched."""

_OLD_STREAMS = tuple(DEFAULT_STREAMS)
"""The streams of format 2, in the order of its presence bits."""

_TEXT_COLUMN, _DMEL_COLUMN = "text", "dmel"
_METADATA_FILE, _TEXT_FILE = "metadata.jsonl", "text.jsonl"


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

    @property
    def rows(self) -> list[tuple[str, int]]:
        """Session and window of each row."""
        sessions = self.header["sessions"]
        numbers = zip(self.arrays["session"].tolist(), self.arrays["window"].tolist(), strict=True)
        return [(sessions[session], window) for session, window in numbers]

    def members(self, table: str) -> Members:
        """Return the positions of a table's members."""
        return Members(
            offset=self.arrays[f"{table}.offset"],
            length=self.arrays[f"{table}.length"],
            crc32c=self.arrays[f"{table}.crc32c"],
        )

    def is_present(self, row: int, stream: str) -> bool:
        """Tell whether a row stores a stream."""
        return bool(int(self.arrays["present"][row]) >> _OLD_STREAMS.index(stream) & 1)


def is_format_2(content: bytes) -> bool:
    """Tell whether these are the first bytes of a manifest of format 2."""
    return re.match(rb'\s*\{\s*"format"[^,]*,\s*"format_version"\s*:\s*2\b', content) is not None


def upgrade_set(location: Path | str, *, keep_old_s: float = KEEP_OLD_S) -> UpgradeSummary | None:
    """Upgrade a shard set to the present format, in its place.

    Args:
        location: the set's folder, or its URL.
        keep_old_s: see :func:`shared.shardset.store.claim_shard_set`.

    Returns:
        What was done; None if there is no set of format 2.

    Raises:
        ShardError: the set is corrupt.
        JobError: the disk is full, or another job builds the set.
    """
    with open_shard_set(parse_location(location)) as store:
        content = store.read(MANIFEST_FILE)
        if content is None or not is_format_2(content):
            return None
    with claim_shard_set(
        parse_location(location), keep_old_s=keep_old_s, version=OLD_VERSION
    ) as store:
        content = store.read(MANIFEST_FILE) or b""
        _require_whole(content, f"{store}/{MANIFEST_FILE}")
        return _Upgrade(store, json.loads(content)).run()


def _require_whole(content: bytes, origin: str) -> None:
    """Check a manifest against the checksum in its last line.

    Raises:
        CorruptError: it differs.
    """
    body, _, last = content.rpartition(b',\n "sha256": "')
    if not body or last[:64] != sha256_of_bytes(body).encode():
        raise CorruptError(f"{origin}: differs from its own checksum; {rebuild_hint(origin)}")


def convert_recipe(old: Mapping[str, Any]) -> Recipe:
    """Convert the plain values of a recipe of format 2.

    Raises:
        ConfigError: it has other keys or values than such a recipe.
    """
    streams: dict[str, dict[str, Any]] = {}
    for name, spec in DEFAULT_STREAMS.items():
        values = {**spec, "required": name in old["required"]}
        if "values" in spec:
            size = old["sensors"][f"{spec['key']}_size"] // len(spec["values"])
            values["values"] = [{**group, "count": size} for group in spec["values"]]
        streams[name] = values
    sensors = old["sensors"]
    values = {
        "segment": {
            "duration_s": old["window"]["duration_s"],
            "min_coverage": old["window"]["min_coverage"],
        },
        "video": old["vision"],
        "audio": {**old["audio"], "dmel": old["mel"]},
        "sensor": {"rate_hz": sensors["rate_hz"], "max_gap_s": sensors["max_gap_s"]},
        "text": old["text"],
        "streams": streams,
        "split": old["split"],
        "shard": old["shard"],
    }
    return make_section(Recipe, values, origin="recipe of the set")


class _Upgrade:
    """The upgrade of one set."""

    def __init__(self, store: ShardSetStore, manifest: Mapping[str, Any]) -> None:
        self._store = store
        self._manifest = manifest
        self._recipe = convert_recipe(manifest["recipe"])
        self._columns = columns_of(self._recipe)
        window = manifest["recipe"]["window"]
        self._window_s = float(window["duration_s"])
        self._stride_s = float(window["stride_s"] or window["duration_s"])
        self._tokenizer = self._load_tokenizer()
        self._generation = int(manifest["generation"]) + 1
        self._num_kept = self._num_copied = self._num_rewritten = 0

    def run(self) -> UpgradeSummary:
        """Write all shards, commit the set, and remove the old files."""
        shards = [self._read_shard(entry) for entry in self._manifest["shards"]]
        texts = self._read_texts(shards)
        entries, headers = [], []
        for shard in shards:
            written = self._write_shard(shard, texts)
            if written is not None:
                entries.append(written[0])
                headers.append(written[1])
        old_files = {self._manifest["tokenizer"]["file"]} | {
            file for shard in shards for file in _files_of(shard)
        }
        manifest = commit_set(
            NewSet(
                store=self._store,
                recipe=self._recipe,
                shards=tuple(entries),
                headers=headers,
                generation=self._generation,
                tokenizer=self._tokenizer,
                tokenizer_file=self._manifest["tokenizer"]["file"],
                num_sessions=self._manifest["counts"]["sessions"],
                rejected=self._rejected_lines(),
                previous=None,
            )
        )
        self._remove(old_files, manifest, headers)
        return UpgradeSummary(
            num_shards=len(entries),
            num_segments=sum(entry.num_samples for entry in entries),
            kept_files=self._num_kept,
            copied_members=self._num_copied,
            rewritten_members=self._num_rewritten,
            gaps=tuple(self._find_gaps(shards)),
        )

    # --- reading ---

    def _read_shard(self, entry: Mapping[str, Any]) -> _OldShard:
        file = entry["index_file"]
        origin = f"{self._store}/{file}"
        content = self._store.read(file)
        if content is None or sha256_of_bytes(content) != entry["index_sha256"]:
            raise CorruptError(f"{origin}: is missing or corrupt; {rebuild_hint(self._store)}")
        try:
            header, arrays = _parse_index(content)
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise CorruptError(f"{origin}: is damaged: {error}") from error
        return _OldShard(entry=entry, header=header, arrays=arrays)

    def _load_tokenizer(self) -> TextTokenizer:
        from shared.media.tokenizer import parse_tokenizer

        file, sha256 = (self._manifest["tokenizer"][key] for key in ("file", "sha256"))
        content = self._store.read(file)
        if content is None or sha256_of_bytes(content) != sha256:
            raise CorruptError(f"{self._store}/{file}: is missing or corrupt")
        return parse_tokenizer(content.decode(), origin=f"{self._store}/{file}")

    def _segment_of(self, window: int) -> int | None:
        """Return the segment that a window becomes; None if it starts within one."""
        segment = window * self._stride_s / self._window_s
        is_whole = abs(segment - round(segment)) < EPSILON_S
        return round(segment) if is_whole else None

    def _duration_s(self, session: str, shards: Sequence[_OldShard]) -> float:
        """Estimate the length of a session by what its windows cover."""
        stop_s = 0.0
        for shard in shards:
            for row, (name, _) in enumerate(shard.rows):
                if name == session:
                    share = float(shard.arrays["coverage"][row].max())
                    stop_s = max(
                        stop_s, float(shard.arrays["start_s"][row]) + share * self._window_s
                    )
        return stop_s

    def _read_texts(self, shards: Sequence[_OldShard]) -> dict[str, _SessionTexts]:
        """Read the texts of every session, and give each token its time."""
        events: dict[str, dict[str, list[TimedText]]] = {}
        for shard in shards:
            name = shard.header["columns"][_TEXT_COLUMN]["file"]
            with closing(self._open(shard, _TEXT_COLUMN)) as file:
                members = shard.members(_TEXT_COLUMN)
                for row, (session, window) in enumerate(shard.rows):
                    own = events.setdefault(session, {})
                    if self._segment_of(window) is None:
                        continue
                    content = file.read(members, row)
                    for event in () if content is None else _old_events(content, origin=name):
                        own.setdefault(event[0], []).append(TimedText(event[1], event[2]))
        return {
            session: _SessionTexts(
                self._recipe, self._tokenizer, own, duration_s=self._duration_s(session, shards)
            )
            for session, own in events.items()
        }

    def _open(self, shard: _OldShard, column: str) -> ColumnFile:
        header = shard.header["columns"][column]
        return self._store.open_column(
            header["file"], sha256=header["sha256"], length_bytes=header["length_bytes"]
        )

    # --- writing ---

    def _write_shard(
        self, shard: _OldShard, texts: Mapping[str, _SessionTexts]
    ) -> tuple[ShardEntry, Mapping[str, Any]] | None:
        """Write the columns and the index of a shard; None if no window of it becomes a segment."""
        positions, rows = self._rows_of(shard)
        if not rows:
            return None
        sessions = dict.fromkeys(row.session for row in rows)
        builder = IndexBuilder(
            rows=rows,
            recipe=self._recipe,
            durations_s={session: texts[session].duration_s for session in sessions},
        )
        name, split = shard.entry["name"], shard.entry["split"]
        with self._store.staging_dir() as work:
            for column in self._columns.values():
                if column.has_time_errors and len(rows) == len(shard.rows):
                    self._keep_column(builder, column, shard)
                    continue
                file = f"{name}.g{self._generation}.{column.name}.{column.suffix}"
                encoded = self._iter_rows(
                    shard, column, [*zip(positions, rows, strict=True)], texts
                )
                write_column(builder, column, work / file, encoded)
                if column.has_time_errors:
                    failures = _old_failures(shard, column.stream, self._segment_of)
                    builder.decode_failures += failures
                builder.columns[column.name] = self._built(
                    column, shard, sessions=list(sessions), file=file, path=work / file
                )
                self._store.put(work / file, file)
                (work / file).unlink(missing_ok=True)
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

    def _iter_rows(
        self,
        shard: _OldShard,
        column: Column,
        rows: Sequence[tuple[int, Row]],
        texts: Mapping[str, _SessionTexts],
    ) -> Iterator[EncodedRow]:
        """Yield the rows that have a column's stream; `rows` are old positions and new rows."""
        table = _old_table(column, shard)
        errors = shard.arrays[f"{column.name}.error_s"] if column.has_time_errors else None
        with closing(self._open(shard, table.partition("/")[0])) as file:
            for position, row in rows:
                if column.stream not in row.present:
                    continue
                if column.kind is Kind.TEXT:
                    content: bytes | None = texts[row.session].encode(column.stream, row.segment)
                else:
                    content = file.read(shard.members(table), position)
                if content is None:
                    raise ShardError(f"{file.origin}: lacks {row.key}; {rebuild_hint(self._store)}")
                if column.kind in (Kind.SENSOR, Kind.TEXT):
                    self._num_rewritten += 1
                else:
                    self._num_copied += 1
                yield EncodedRow(row, content, None if errors is None else errors[position])

    def _rows_of(self, shard: _OldShard) -> tuple[list[int], list[Row]]:
        """Return the old positions and the new rows of the windows that become segments."""
        positions: list[int] = []
        rows: list[Row] = []
        for position, (session, window) in enumerate(shard.rows):
            number = self._segment_of(window)
            if number is None:
                continue
            coverage = shard.arrays["coverage"][position]
            shares = {s: float(coverage[i]) for i, s in enumerate(_OLD_STREAMS)}
            positions.append(position)
            rows.append(
                Row(
                    number=len(rows),
                    session=session,
                    segment=Segment(number, self._window_s),
                    present=tuple(s for s in self._recipe.streams if shard.is_present(position, s)),
                    coverage=[shares[s] for s in self._recipe.streams],
                )
            )
        return positions, rows

    def _keep_column(self, builder: IndexBuilder, column: Column, shard: _OldShard) -> None:
        """Take over a video column as the file that it is."""
        members = shard.members(column.name)
        builder.add_members(column, members)
        builder.mark_present(column.stream, members.length > 0)
        builder.arrays[f"{column.name}.error_s"] = shard.arrays[f"{column.name}.error_s"]
        builder.decode_failures += _old_failures(shard, column.stream, self._segment_of)
        header = shard.header["columns"][column.name]
        sessions = shard.header["sessions"]
        built = self._built(column, shard, sessions=sessions, file=header["file"], path=None)
        builder.columns[column.name] = replace(
            built, length_bytes=header["length_bytes"], sha256=header["sha256"]
        )
        self._num_kept += 1

    def _built(
        self,
        column: Column,
        shard: _OldShard,
        *,
        sessions: Sequence[str],
        file: str,
        path: Path | None,
    ) -> BuiltColumn:
        """Describe a column; its rows keep the hashes of format 2."""
        old = shard.header["columns"][_old_column(column, shard)]
        how = "touching" if self._stride_s == self._window_s else "other"
        rows = {session: f"format 2: {how} {old['rows'][session]}" for session in sessions}
        settings = column_basis(
            column, self._recipe, tokenizer_sha256=self._manifest["tokenizer"]["sha256"]
        )
        basis = {**settings, "rows": fingerprint_of(list(rows.values()))}
        return BuiltColumn(
            file=file,
            length_bytes=0 if path is None else path.stat().st_size,
            sha256="" if path is None else sha256_of_file(path),
            fingerprint=fingerprint_of(basis),
            basis=basis,
            rows=rows,
        )

    def _rejected_lines(self) -> list[dict[str, Any]]:
        """Convert the lines of ``rejected.jsonl``; windows that start within a segment go."""
        lines = []
        for line in (self._store.read(REJECTED_FILE) or b"").decode().split("\n"):
            if not line:
                continue
            values = json.loads(line)
            window = values.pop("window", None)
            if window is not None:
                segment = self._segment_of(window)
                if segment is None:
                    continue
                values["segment"] = segment
            if "windows" in values:
                count = values.pop("windows") * self._stride_s / self._window_s
                values["segments"] = math.ceil(count - EPSILON_S)
            if values["level"] == "window":
                values["level"] = "segment"
            lines.append(values)
        return lines

    def _find_gaps(self, shards: Sequence[_OldShard]) -> Iterator[str]:
        """Describe the windows that no multiple of the duration starts."""
        kept: dict[str, set[int]] = {}
        for shard in shards:
            for session, window in shard.rows:
                segment = self._segment_of(window)
                kept.setdefault(session, set())
                if segment is not None:
                    kept[session].add(segment)
        for session, segments in sorted(kept.items()):
            last = max(segments, default=-1)
            missing = [i for i in range(last + 1) if i not in segments]
            if missing or not segments:
                yield f"{session}: {len(missing) or 'all'} segments are not in the set"

    def _remove(
        self, files: set[str], manifest: Manifest, headers: Sequence[Mapping[str, Any]]
    ) -> None:
        """Remove the files of format 2 that the new set does not reference."""
        needed = {manifest.tokenizer_file, *(entry.index_file for entry in manifest.shards)}
        needed |= {c["file"] for header in headers for c in header["columns"].values()}
        sizes = self._store.list_sizes()
        for file in sorted((files - needed) & sizes.keys()):
            self._store.remove(file)


class _SessionTexts:
    """The texts of one session, cut into segments."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: TextTokenizer,
        events: Mapping[str, Sequence[TimedText]],
        *,
        duration_s: float,
    ) -> None:
        self.duration_s = duration_s
        self._readers = {
            name: TextReader(
                sorted(events.get(spec.stream or "", ()), key=lambda e: e.time_s),
                spec,
                tokenizer=tokenizer,
                duration_s=duration_s,
                segment_s=recipe.segment_s,
            )
            for name, spec in recipe.texts.items()
        }

    def encode(self, stream: str, segment: Segment) -> bytes:
        """Encode the member of a segment."""
        return encode_text(self._readers[stream].read(segment))


def _old_table(column: Column, shard: _OldShard) -> str:
    """Return the table of members of format 2 that holds a column's values."""
    if column.kind is Kind.SENSOR:
        suffix = f"/{DEFAULT_STREAMS[column.stream]['key']}.offset"
        return next(n for n in shard.arrays if n.endswith(suffix)).removesuffix(".offset")
    if column.kind is Kind.TEXT:
        return _TEXT_COLUMN
    is_dmel = column.name.endswith(f".{_DMEL_COLUMN}")
    return f"{_DMEL_COLUMN}/{_DMEL_COLUMN}" if is_dmel else column.name


def _old_column(column: Column, shard: _OldShard) -> str:
    """Return the column of format 2 that holds a column's values."""
    return _old_table(column, shard).partition("/")[0]


def _files_of(shard: _OldShard) -> set[str]:
    files = {column["file"] for column in shard.header["columns"].values()}
    return {shard.entry["index_file"], *files}


def _old_failures(
    shard: _OldShard, stream: str, segment_of: Callable[[int], int | None]
) -> list[DecodeFailure]:
    """Return the decode failures of a stream, by segment."""
    failures = []
    for failure in shard.header["losses"]:
        segment = segment_of(failure["window"])
        if failure["stream"] == stream and segment is not None:
            values = {key: value for key, value in failure.items() if key != "window"}
            failures.append({**values, "segment": segment})
    return failures


def _old_events(content: bytes, *, origin: str) -> Iterator[tuple[str, float, str]]:
    """Yield stream, time and text of each event of a text member of format 2."""
    try:
        for event in json.loads(content)["events"]:
            yield str(event["stream"]), float(event["time_s"]), str(event["text"])
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

    Args:
        previous: the set to update.
        scans: every session as it is now.
        recipe: the recipe to build by.
    """
    columns = columns_of(recipe)
    return replace(
        previous,
        shards=tuple(_refresh_shard(s, columns, scans, recipe) for s in previous.shards),
    )


def _refresh_shard(
    shard: BuiltShard,
    columns: Mapping[str, Column],
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
) -> BuiltShard:
    """Replace the hashes of format 2 in the columns of a shard."""
    segments = {stored.session: stored for stored in shard.sessions}
    refreshed = {}
    for name, built in shard.columns.items():
        rows = dict(built.rows)
        for session, recorded in rows.items():
            stored, column = segments.get(session), columns.get(name)
            if stored is None or column is None or not _ROW_HASH.fullmatch(recorded):
                continue
            if is_same_row(recorded, column, stored, scans=scans, recipe=recipe):
                rows[session] = row_hash(stored, column, scans[session], recipe)
        if rows != built.rows:
            basis = {**built.basis, "rows": fingerprint_of(list(rows.values()))}
            refreshed[name] = replace(
                built, rows=rows, basis=basis, fingerprint=fingerprint_of(basis)
            )
    if not refreshed:
        return shard
    return replace(shard, columns={**shard.columns, **refreshed}, is_refreshed=True)


def is_same_row(
    recorded: str | None,
    column: Column,
    segments: SessionSegments,
    *,
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
) -> bool:
    """Tell whether upgraded rows of a session are those that the recording gives now.

    Args:
        recorded: the hash in the index.
        column: the column of the rows.
        segments: the session, and its segments in the shard.
        scans: every session as it is now.
        recipe: the recipe to build by.
    """
    match = _ROW_HASH.fullmatch(recorded or "")
    if match is None or match[1] != "touching":
        return False
    scan = scans.get(segments.session)
    if scan is None or column.stream not in _OLD_STREAMS:
        return False
    minimum = recipe.segment.min_coverage
    bits = []
    own = _streams_beside(column)
    for segment in segments.segments:
        shares = {s: round(scan.coverage[s][segment], 4) for s in own if s in scan.coverage}
        now = {s for s in shares if scan.coverage[s][segment] > 0}
        before = {s for s in shares if shares[s] > 0 and shares[s] >= minimum}
        if (column.stream in now) != (column.stream in before):
            return False
        bits.append(sum(1 << _OLD_STREAMS.index(s) for s in before))
    return match[2] == _old_row_hash(column, segments, bits, scan=scan, recipe=recipe)


def _streams_beside(column: Column) -> tuple[str, ...]:
    """Return the streams that shared a column of format 2 with a column's stream."""
    if column.kind in (Kind.SENSOR, Kind.TEXT):
        return tuple(n for n, spec in DEFAULT_STREAMS.items() if spec["kind"] == column.kind)
    return (column.stream,)


def _old_row_hash(
    column: Column,
    segments: SessionSegments,
    bits: Sequence[int],
    *,
    scan: SessionScan,
    recipe: Recipe,
) -> str:
    """Hash what rows of format 2 depended on, as it did."""
    files = {
        Kind.SENSOR: (_METADATA_FILE,),
        Kind.TEXT: (_METADATA_FILE, _TEXT_FILE),
    }.get(column.kind, (recipe.streams[column.stream].file,))
    sources = {n: scan.source_files[n].sha256 for n in files if n in scan.source_files}
    offset_s = scan.clock_offset_s if _METADATA_FILE in files else 0.0
    gain = scan.gains.get(column.stream, 1.0)
    inputs = [segments.session, segments.segments, list(bits), sources, offset_s, gain]
    own = _streams_beside(column)
    starts = {s: scan.start_overrides[s] for s in own if s in scan.start_overrides}
    return fingerprint_of([*inputs, starts] if starts else inputs)
