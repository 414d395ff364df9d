"""Scan recorded sessions, and open them for a task.

The scans of a set are cached in its ``sessions.jsonl``, which may be deleted at any time. A session
whose files have the same size and time is not scanned again.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from preprocess.build.commit import to_jsonl
from preprocess.build.plan_types import Row
from preprocess.recordings import require_unchanged
from shared.files import fingerprint_of
from shared.kinds.column import stream_settings
from shared.media.tokenizer import parse_tokenizer
from shared.session.folder import (
    files_of_stream,
    scanned_files,
)
from shared.session.reader import SessionReader
from shared.session.scan import SessionScan, SourceFile, scan_from_json, scan_session
from shared.shardset.index import FLAG_BITS
from shared.shardset.manifest import SESSIONS_FILE
from shared.streams import Kind, mask_reasons

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

    from preprocess.build.plan_types import SessionSegments
    from preprocess.cluster import Cluster
    from preprocess.recordings import Recording
    from shared.clock import Segment
    from shared.kinds.column import Column
    from shared.recipe import Recipe
    from shared.shardset.store import ShardSetStore


_BYTES_PER_S: Mapping[tuple[Kind, str], float] = {
    (Kind.VIDEO, "tar"): 0.5e6,
    (Kind.AUDIO, "tar"): 20e6,
    (Kind.AUDIO, "zarr"): 10e6,
    (Kind.SENSOR, "zarr"): 10e6,
    (Kind.TEXT, "tar"): 100e6,
}
"""Bytes of a stream's files that one process converts per second, roughly, by the stream's kind and
the column's container."""

_SCAN_BYTES_PER_S: Mapping[Kind, float] = {Kind.AUDIO: 20e6, Kind.SENSOR: 10e6}
"""Streams of whose files a scan does more than hashing: bytes that it reads per second."""

HASHED_BYTES_PER_S = 200e6
"""Bytes that one process reads and hashes per second, roughly."""


def column_seconds(recording: Recording, column: Column, recipe: Recipe) -> float:
    """Estimate how long one process takes to build a column of a session."""
    files = files_of_stream(recipe.streams[column.stream])
    length_bytes = sum(float(recording.stamp[n][0]) for n in files if n in recording.stamp)
    return length_bytes / _BYTES_PER_S[column.kind, column.container]


def scan_seconds(recording: Recording, recipe: Recipe) -> float:
    """Estimate how long one process takes to scan a session."""
    rates = dict.fromkeys(recording.stamp, HASHED_BYTES_PER_S)
    for spec in recipe.streams.values():
        for name in files_of_stream(spec):
            rate = _SCAN_BYTES_PER_S.get(spec.kind, HASHED_BYTES_PER_S)
            rates[name] = min(rate, rates.get(name, rate))
    return sum(float(stamp[0]) / rates[name] for name, stamp in recording.stamp.items())


SCAN_VERSION = 11
"""Raised when a scan of the same files would give another result or has other keys."""

_NOT_SCANNED: Mapping[Kind, tuple[str, ...]] = {
    Kind.VIDEO: ("size", "fit", "codec", "qp", "quality"),
    Kind.AUDIO: ("dmel",),
}
"""Settings of streams that a scan does not depend on."""


def scan_sessions(
    recordings: Mapping[str, Recording], store: ShardSetStore, recipe: Recipe, cluster: Cluster
) -> tuple[dict[str, SessionScan], int]:
    """Scan the sessions that changed, and cache that; return all scans and how many were made."""
    streams = {
        name: stream_settings(spec, without=_NOT_SCANNED.get(spec.kind, ()))
        for name, spec in recipe.streams.items()
    }
    masks = {
        name: [mask_reasons(spec), spec.expect.max_still_s] for name, spec in recipe.streams.items()
    }
    mixes = {name: spec.channels for name, spec in recipe.audios.items()}
    basis = fingerprint_of(SCAN_VERSION, recipe.segment_s, streams, masks, mixes)
    cached = _parse_cache(store.read(SESSIONS_FILE) or b"")
    stamps = {name: dict(recording.stamp) for name, recording in recordings.items()}
    scans = {
        name: cached[name][2]
        for name in recordings
        if name in cached and cached[name][:2] == (basis, stamps[name])
    }
    changed = [name for name in recordings if name not in scans]
    work = []
    for name in changed:
        known: dict[str, SourceFile] = {}  # unchanged files need no hashing
        if name in cached:
            _, old, scan = cached[name]
            stamp = stamps[name]
            files = scan.source_files.items()
            known = {n: f for n, f in files if n in stamp and old.get(n) == stamp[n]}
        work.append((recordings[name], known))
    seconds = sum(scan_seconds(recording, recipe) for recording, _ in work)
    function = partial(_scan, recipe=recipe, store=store)
    new = cluster.map(function, work, label="scan sessions", work_s=seconds)
    scans.update(zip(changed, new, strict=True))
    scans = dict(sorted(scans.items()))
    if changed or set(cached) != set(scans):
        lines = [
            {"basis": basis, "stamp": stamps[name], "scan": scan.as_json()}
            for name, scan in scans.items()
        ]
        store.write(SESSIONS_FILE, to_jsonl(lines))
    return scans, len(changed)


def _scan(
    work: tuple[Recording, Mapping[str, SourceFile]], *, recipe: Recipe, store: ShardSetStore
) -> SessionScan:
    """Scan a session whose unchanged files are known."""
    recording, known = work
    with recording.open_files(scanned_files(recipe), store) as folder:
        return scan_session(folder, recipe=recipe, known=known)


def _parse_cache(content: bytes) -> dict[str, tuple[str, dict[str, Any], SessionScan]]:
    """Parse basis, stamp and scan of an earlier run, by session; skip lines that can't be read."""
    cached = {}
    for line in content.split(b"\n"):
        try:
            values = json.loads(line)
            scan = scan_from_json(values["scan"])
            cached[scan.session] = values["basis"], dict(values["stamp"]), scan
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return cached


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContext:
    """Everything that a task needs besides the task itself."""

    out: ShardSetStore
    recipe: Recipe
    tokenizer_json: str
    """Empty if no text is read."""
    recordings: Mapping[str, Recording]
    """The task's sessions, by name."""
    scans: Mapping[str, SessionScan]
    old: ShardSetStore | None = None
    """The set that holds the task's old shard; None if it is `out`."""


@contextmanager
def open_sessions(
    context: TaskContext,
    streams: Mapping[str, Set[str]],
    *,
    elsewhere: Mapping[str, Set[str]],
) -> Iterator[dict[str, SessionReader]]:
    """Open a reader per session.

    The output depends on the files of `streams`, by session; other tasks have read those of
    `elsewhere`.

    Raises:
        SessionError: a file changed or was removed since it was scanned.
    """
    content, recipe = context.tokenizer_json, context.recipe
    tokenizer = parse_tokenizer(content, origin="the shard set's tokenizer") if content else None
    files = {name: _files(streams[name], recipe) for name in streams}
    with ExitStack() as stack:
        try:
            readers = {}
            for name in streams:
                needed = streams[name] - elsewhere.get(name, set())
                opened = context.recordings[name].open_files(_files(needed, recipe), context.out)
                readers[name] = SessionReader(
                    stack.enter_context(opened),
                    context.scans[name],
                    recipe=recipe,
                    tokenizer=tokenizer,
                    streams=sorted(needed),
                )
            yield readers
        except Exception:
            # If a session was removed or changed, report that instead of the reader's error.
            for name in streams:
                require_unchanged(context.recordings[name], files[name])
            raise
        for name in streams:
            require_unchanged(context.recordings[name], files[name])


def _files(streams: Iterable[str], recipe: Recipe) -> list[str]:
    """List the files of streams."""
    return sorted({f for name in streams for f in files_of_stream(recipe.streams[name])})


def flag_bits(scan: SessionScan, stream: str, segment: Segment) -> int:
    """Return the bits of the reasons for which content of a stream is masked in a segment."""
    start_s, stop_s = segment.interval.start_s, segment.interval.stop_s
    spans = scan.masked.get(stream, ())
    reasons = {s.reason for s in spans if s.start_s < stop_s and s.stop_s > start_s}
    return sum(FLAG_BITS[reason] for reason in reasons)


def iter_rows(sessions: Sequence[SessionSegments], context: TaskContext) -> Iterator[Row]:
    """Iterate over the rows of segments, as their sessions' scans describe them."""
    number = 0
    for stored in sessions:
        scan = context.scans[stored.session]
        segments = scan.segments(context.recipe)
        shares = [scan.coverage.get(name) for name in context.recipe.streams]
        for index in stored.segments:
            coverage = [0.0 if share is None else share[index] for share in shares]
            flags = [flag_bits(scan, name, segments[index]) for name in context.recipe.streams]
            yield Row(number, stored.session, segments[index], scan.present(index), coverage, flags)
            number += 1
