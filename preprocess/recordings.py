"""Recorded sessions, in local folders or behind a URL: find them, and open their files for a task.

A recording remembers the size and version of its files from when the job listed them. A task opens
the files that it needs. Files behind a URL are downloaded to a staging directory for as long as the
task runs. After reading, the task checks that the files are still the same.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.errors import SessionError
from shared.machine import pause_collector, read_steadily
from shared.session.folder import (
    SkippedFolder,
    explain_nested,
    explain_no_session,
    files_of_stream,
    scanned_files,
    source_files,
    survey_sessions,
)
from shared.session.names import (
    describe_unused,
    explain_bad_name,
    find_unused_files,
    list_names,
    printable,
    session_folder,
    session_name,
)
from shared.storage import STARTUP_RETRY, RetryPolicy, Store, StoredFile, parse_location
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from shared.recipe import Recipe
    from shared.session.names import Listing, UnusedName
    from shared.shardset.store import ShardSetStore


UNREAD: Mapping[Kind, tuple[str, ...]] = {
    Kind.VIDEO: ("size", "fit", "codec", "qp", "quality"),
    Kind.AUDIO: ("dmel",),
}
"""Settings of streams that neither checks nor scans depend on."""


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


class Survey(NamedTuple):
    """What is at a location."""

    recordings: dict[str, Recording]
    """By name, sorted."""
    skipped: tuple[SkippedFolder, ...]
    """Folders that are left out, but were probably meant."""
    hidden: tuple[str, ...] = ()
    """Paths of the files in hidden folders of a store, whose listing has them anyway."""


@pause_collector()
def survey_recordings(location: Path | str, recipe: Recipe) -> Survey:
    """Find the sessions below a folder or URL, or at it, and the folders that are left out.

    Raises:
        SessionError: the location does not exist, or has no session.
        StorageError: the store behind the URL can't be read.
    """
    parsed = parse_location(location)
    if isinstance(parsed, Store):
        return _survey_store(parsed.with_policy(STARTUP_RETRY), recipe)
    names, sources = scanned_files(recipe), frozenset(source_files(recipe))
    recordings: dict[str, Recording] = {}

    def add(path: Path, listing: Listing | None) -> None:
        recordings[session_name(path)] = LocalRecording(
            name=session_name(path),
            folder=path.absolute(),
            stamp=_stamp_of_folder(path, names, listing),
            unused=find_unused_files(list_names(listing, sources), sources),
        )

    survey = survey_sessions(parsed, recipe, visit=add)
    return Survey(recordings, survey.skipped)


def estimate_seconds(
    recording: Recording, recipe: Recipe, bytes_per_s: Mapping[Kind, float], others: float
) -> float:
    """Estimate how long reading a session takes, by the rates of some kinds and of all others."""
    rates: dict[str, float] = {}
    for spec in recipe.streams.values():
        for name in files_of_stream(spec):
            rate = bytes_per_s.get(spec.kind, others)
            rates[name] = min(rate, rates.get(name, rate))
    stamps = recording.stamp.items()
    return sum(float(stamp[0]) / rates.get(name, others) for name, stamp in stamps)


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


def _survey_store(store: Store, recipe: Recipe) -> Survey:
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
    hidden = tuple(path for path in files if path.startswith(".") and "/" in path)
    return Survey(recordings, tuple(skipped), hidden)


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


def _stamp_of_folder(
    folder: Path, names: Iterable[str], listing: Listing | None = None
) -> dict[str, list[Any]]:
    """Return size and modification time in ns of each of these files that exists."""
    stamp: dict[str, list[Any]] = {}
    listed = None if listing is None else {name.casefold() for name in listing}
    for name in names:
        if listed is not None and name.casefold() not in listed:  # as some file systems compare
            continue
        entry = (listing or {}).get(name, folder / name)
        try:
            status = read_steadily(entry.stat, os.fspath(entry))
        except (FileNotFoundError, NotADirectoryError):
            continue
        stamp[name] = [status.st_size, status.st_mtime_ns]
    return stamp


def _stamp_of_object(file: StoredFile | None) -> list[Any] | None:
    return None if file is None else [file.length_bytes, file.tag]
