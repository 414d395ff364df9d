"""Scan recorded sessions, and open them for a task.

The scans of a set are cached in its ``sessions.jsonl``, ``sessions.1.jsonl`` and so on. These may
be deleted at any time. A session whose files have the same size and time is not scanned again. New
scans are written while others are made, so that a job that is stopped keeps them.
"""

from __future__ import annotations

import functools
import json
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from preprocess.build.plan_types import Row
from preprocess.recordings import UNREAD, estimate_seconds, require_unchanged
from preprocess.session_log import SessionLog, log_line
from shared.errors import JobError, MachineError
from shared.files import fingerprint_of
from shared.interrupts import was_interrupted
from shared.kinds.column import stream_settings
from shared.machine import pause_collector
from shared.media.tokenizer import parse_tokenizer
from shared.session.folder import files_of_stream, scanned_files, source_files
from shared.session.reader import SessionReader
from shared.session.scan import SessionScan, SourceFile, scan_session
from shared.shardset.index import FLAG_BITS
from shared.shardset.manifest import SESSIONS_FILE
from shared.streams import Kind, mask_reasons

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set

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

OPEN_S = 0.001
"""Seconds that opening and parsing the files of a session take at least, roughly."""

_SAVE_S = 30.0
"""Seconds between two writes of the cache while sessions are scanned."""

HASHED_BYTES_PER_S = 200e6
"""Bytes that one process reads and hashes per second, roughly."""


def column_seconds(recording: Recording, column: Column, recipe: Recipe) -> float:
    """Estimate how long one process takes to build a column of a session."""
    files = files_of_stream(recipe.streams[column.stream])
    length_bytes = sum(float(recording.stamp[n][0]) for n in files if n in recording.stamp)
    return length_bytes / _BYTES_PER_S[column.kind, column.container]


def scan_seconds(recording: Recording, recipe: Recipe) -> float:
    """Estimate how long one process takes to scan a session."""
    return OPEN_S + estimate_seconds(recording, recipe, _SCAN_BYTES_PER_S, HASHED_BYTES_PER_S)


SCAN_VERSION = 11
"""Raised when a scan of the same files would give another result or has other keys."""


def scan_sessions(
    recordings: Mapping[str, Recording],
    store: ShardSetStore,
    recipe: Recipe,
    cluster: Cluster,
    *,
    present: Collection[str],
) -> tuple[dict[str, SessionScan], int]:
    """Scan the sessions that changed, and cache that; return all scans and how many were made.

    `present` are the names of the set's files.
    """
    streams = {
        name: stream_settings(spec, without=UNREAD.get(spec.kind, ()))
        for name, spec in recipe.streams.items()
    }
    masks = {
        name: [mask_reasons(spec), spec.expect.max_still_s] for name, spec in recipe.streams.items()
    }
    mixes = {name: spec.channels for name, spec in recipe.audios.items()}
    basis = fingerprint_of(SCAN_VERSION, recipe.segment_s, streams, masks, mixes)
    scans: dict[str, SessionScan] = {}
    work: list[tuple[Recording, Mapping[str, SourceFile]]] = []
    with pause_collector():
        log = _open_cache(store, present)
        for name, recording in recordings.items():
            cached, stamp = _parse_cached(log[name]) if name in log else None, recording.stamp
            if cached is not None and (cached.basis, cached.stamp) == (basis, stamp):
                scans[name] = cached.scan
                continue
            known: dict[str, SourceFile] = {}  # unchanged files need no hashing
            if cached is not None:
                files = cached.scan.source_files.items()
                known = {n: f for n, f in files if n in stamp and cached.stamp.get(n) == stamp[n]}
            work.append((recording, known))
    weights = [scan_seconds(recording, recipe) for recording, _ in work]
    function = partial(_scan, basis=basis, recipe=recipe, store=store)
    saved_s, failure = time.monotonic(), None
    names = [recording.name for recording, _ in work]
    iterate = partial(cluster.iterate, label="scan sessions", weights=weights, names=names)
    try:
        for index, line in iterate(function, work):
            if isinstance(line, (JobError, MachineError)):
                raise line
            if isinstance(line, Exception):
                failure = failure or line
                continue
            if was_interrupted():  # perhaps in a callback of a library, which failed then
                raise KeyboardInterrupt
            recording, _ = work[index]
            scans[recording.name] = _cached_adapter().validate_json(line).scan
            log.add(recording.name, line)
            if time.monotonic() > saved_s + _SAVE_S:
                log.save(recordings)
                saved_s = time.monotonic()
    finally:
        log.save(recordings)
    if failure is not None:
        raise failure
    return dict(sorted(scans.items())), len(work)


def _scan(
    work: tuple[Recording, Mapping[str, SourceFile]],
    *,
    basis: str,
    recipe: Recipe,
    store: ShardSetStore,
) -> bytes:
    """Scan a session whose unchanged files are known; return its line of the cache.

    The line takes a third of the memory that the pickled scan takes in the process of the job.
    """
    recording, known = work
    with recording.open_files(scanned_files(recipe), store) as folder:
        scan = scan_session(folder, recipe=recipe, known=known)
    # If a file that is gone comes back, the scan without it does not hold.
    unread = [
        n for n in source_files(recipe) if n in recording.stamp and n not in scan.source_files
    ]
    gone = recording.changed_files(unread)
    stamp = {name: value for name, value in recording.stamp.items() if name not in gone}
    values = {"basis": basis, "stamp": stamp, "scan": scan.as_json()}
    return log_line(recording.name, values)


@dataclass(frozen=True, slots=True)
class _Cached:
    """A line of the cache."""

    basis: str
    """Hash of what the scan depends on besides the session's files."""
    stamp: dict[str, list[Any]]
    scan: SessionScan


_cached_adapter = functools.cache(lambda: TypeAdapter(_Cached))


def _parse_cached(line: bytes) -> _Cached | None:
    """Parse a line of an earlier run; None if it can't be read."""
    try:
        return _cached_adapter().validate_json(line)
    except ValidationError:
        return None


def _open_cache(store: ShardSetStore, present: Collection[str]) -> SessionLog:
    """Open the scans of earlier runs; take over a file of lines that do not begin with a name."""
    log = SessionLog(store, SESSIONS_FILE.removesuffix(".jsonl"), present)
    if SESSIONS_FILE in present and not len(log):
        for line in (store.read(SESSIONS_FILE) or b"").split(b"\n"):
            if (cached := _parse_cached(line)) is not None:
                start = json.dumps({"session": cached.scan.session}, ensure_ascii=False)[:-1]
                log.add(cached.scan.session, start.encode() + b", " + line[1:])
    return log


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
