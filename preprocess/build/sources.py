"""Recorded sessions, in local folders or behind a URL: find them, scan them, open them for a task.

The scans of a set are cached in its ``sessions.jsonl``, which may be deleted at any time. A session
whose files have the same size and time is not scanned again.

A recording remembers the size and version of its files from when the job listed them. A task opens
the files that it needs. Files behind a URL are downloaded to a staging directory for as long as the
task runs. After reading, the task checks that the files are still the same.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from preprocess.build.commit import to_jsonl
from preprocess.build.plan_types import Row
from shared.errors import SessionError
from shared.files import fingerprint_of
from shared.kinds.column import stream_settings
from shared.machine import read_steadily
from shared.media.tokenizer import parse_tokenizer
from shared.session.folder import (
    SkippedFolder,
    explain_nested,
    explain_no_session,
    files_of_stream,
    scanned_files,
    source_files,
    survey_sessions,
    unused_files,
)
from shared.session.names import (
    describe_unused,
    explain_bad_name,
    find_unused_files,
    printable,
    session_folder,
    session_name,
)
from shared.session.reader import SessionReader
from shared.session.scan import SessionScan, SourceFile, scan_from_json, scan_session
from shared.shardset.index import FLAG_BITS
from shared.shardset.manifest import SESSIONS_FILE
from shared.storage import STARTUP_RETRY, RetryPolicy, Store, StoredFile, parse_location
from shared.streams import Kind, mask_reasons

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
    from pathlib import Path

    from preprocess.build.cluster import Cluster
    from preprocess.build.plan_types import SessionSegments
    from shared.clock import Segment
    from shared.kinds.column import Column
    from shared.recipe import Recipe
    from shared.session.names import UnusedName
    from shared.shardset.store import ShardSetStore


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """What is known of a session before it is read."""

    name: str
    stamp: Mapping[str, list[Any]]
    """Scanned file -> its size, and its modification time in ns, or the tag of its store."""
    unused: tuple[UnusedName, ...] = ()
    """Its files and folders that no declared stream uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRecording(_Recorded):
    """A session folder."""

    folder: Path

    def open_files(
        self, _names: Iterable[str], _staging: ShardSetStore
    ) -> AbstractContextManager[Path]:
        """Provide the session folder itself."""
        return nullcontext(self.folder)

    def changed_files(self, names: Iterable[str]) -> list[str]:
        """Return those of these files that differ from the stamp."""
        names = list(names)
        now = _stamp_of_folder(self.folder, names)
        return [n for n in names if now.get(n) != self.stamp.get(n)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRecording(_Recorded):
    """A session behind a URL."""

    store: Store

    @contextmanager
    def open_files(self, names: Iterable[str], staging: ShardSetStore) -> Iterator[Path]:
        """Provide a folder, named like the session, with those of these files that exist.

        It is in the set's staging directory, so that the next job removes what a killed one left.
        """
        with staging.staging_dir() as work:
            yield self.download_to(work, names)

    def download_to(self, work: Path, names: Iterable[str]) -> Path:
        """Download those of these files that exist into a new folder named like the session."""
        folder = session_folder(work, self.name)
        folder.mkdir()
        for name in names:
            if name in self.stamp:
                with suppress(FileNotFoundError):  # changed_files() reports it
                    self.store.download(name, folder / name)
        return folder

    def changed_files(self, names: Iterable[str]) -> list[str]:
        """Return those of these files that differ from the stamp."""
        return [n for n in names if _stamp_of_object(self.store.stat(n)) != self.stamp.get(n)]


Recording = LocalRecording | RemoteRecording
"""A recorded session; a plain value that can be sent to other processes."""


def survey_recordings(
    location: Path | str, recipe: Recipe
) -> tuple[dict[str, Recording], tuple[SkippedFolder, ...]]:
    """Find the sessions below a folder or URL, or at it, and the folders that are left out.

    Raises:
        SessionError: the location does not exist, or has no session.
        StorageError: the store behind the URL can't be read.
    """
    parsed = parse_location(location)
    if isinstance(parsed, Store):
        return _survey_store(parsed.with_policy(STARTUP_RETRY), recipe)
    names, survey = scanned_files(recipe), survey_sessions(parsed, recipe)
    recordings: dict[str, Recording] = {}
    for path in survey.folders:
        folder = path.absolute()
        recordings[session_name(path)] = LocalRecording(
            name=session_name(path),
            folder=folder,
            stamp=_stamp_of_folder(folder, names),
            unused=unused_files(folder, recipe),
        )
    return recordings, survey.skipped


def require_unchanged(recording: Recording, names: Iterable[str]) -> None:
    """Refuse to continue if files of a session changed since the job listed them.

    Raises:
        SessionError: files changed or no longer exist.
    """
    changed = recording.changed_files(sorted(set(names)))
    if changed:
        raise SessionError(
            f"session {recording.name}: {', '.join(changed)} changed or was removed while the job "
            "was running; fix: run it again; finished work is kept"
        )


def _survey_store(
    store: Store, recipe: Recipe
) -> tuple[dict[str, Recording], tuple[SkippedFolder, ...]]:
    """Find the sessions of a store, sorted by name, and the folders that are left out."""
    scanned, sources = scanned_files(recipe), source_files(recipe)
    files = store.list_files()
    folders: dict[str, dict[str, StoredFile]] = {}
    is_one = not files.keys().isdisjoint(sources)
    for path, file in sorted(files.items()):
        folder, _, name = ("", "", path) if is_one else path.partition("/")
        if name and not folder.startswith("."):
            folders.setdefault(folder, {})[name] = file
    recordings: dict[str, Recording] = {}
    skipped: list[SkippedFolder] = []
    retrying = store.with_policy(RetryPolicy())
    for folder, content in folders.items():
        name = folder or store.url.rpartition("/")[2]
        reason = explain_bad_name(name)
        is_recording = not content.keys().isdisjoint(sources)
        if is_recording and not reason:
            recordings[name] = RemoteRecording(
                name=name,
                store=Store(f"{store.url}/{folder}", retrying.retry) if folder else retrying,
                stamp={n: [f.length_bytes, f.tag] for n, f in content.items() if n in scanned},
                unused=find_unused_files(_names_in(content, sources), sources),
            )
            continue
        if not is_recording:
            reason, is_recording = _explain_stored_folder(f"{store.url}/{folder}", content, sources)
        if reason:
            skipped.append(
                SkippedFolder(name=printable(name), reason=reason, is_recording=is_recording)
            )
    if not recordings:
        names = [path for path in files if "/" not in path]
        reasons = [f"{folder.name}: {folder.reason}" for folder in skipped]
        raise SessionError(
            f"{store}: no session in it; {explain_no_session(reasons, names, recipe)}"
        )
    return recordings, tuple(skipped)


def _names_in(content: Iterable[str], sources: Collection[str]) -> list[str]:
    """List the names in a stored folder as :func:`shared.session.names.list_names` does."""
    names: set[str] = set()
    for path in content:
        folder, slash, name = path.partition("/")
        names |= {f"{folder}{slash}", path if name in sources or not slash else f"{folder}/"}
    return [printable(name) for name in names]


def _explain_stored_folder(
    url: str, content: Iterable[str], sources: Collection[str]
) -> tuple[str, bool]:
    """Explain what is meant by a folder that is no session, if anything; and if as a recording."""
    inside = {path.rpartition("/")[0] for path in content if path.rpartition("/")[2] in sources}
    parents = sorted({f"{url}/{folder.rpartition('/')[0]}".rstrip("/") for folder in inside})
    if parents:
        return explain_nested(parents, len(inside)), False
    files = find_unused_files([name for name in content if "/" not in name], sources)
    return "; ".join(describe_unused(files)[0].values()), True


def _stamp_of_folder(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return size and modification time in ns of each of these files that exists."""
    stamp: dict[str, list[Any]] = {}
    for name in names:
        try:
            status = read_steadily((folder / name).stat, folder / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        stamp[name] = [status.st_size, status.st_mtime_ns]
    return stamp


def _stamp_of_object(file: StoredFile | None) -> list[Any] | None:
    return None if file is None else [file.length_bytes, file.tag]


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
