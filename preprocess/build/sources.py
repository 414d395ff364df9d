"""Where recorded sessions lie: folders of this machine's file system, or behind a URL.

A recording knows the size and time of its files as they were when the job looked. A task asks for
the files that it needs; those behind a URL are copied into a temporary folder for as long as it
works.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import SessionError
from shared.session.folder import (
    AUDIO_FILE,
    METADATA_FILE,
    SCANNED_FILES,
    SOURCE_FILES,
    find_sessions,
)
from shared.shardset.layout import COLUMNS
from shared.storage import STARTUP_RETRY, RetryPolicy, Store, StoredFile, parse_location

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from shared.shardset.store import ShardSetStore


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRecording:
    """A session folder."""

    name: str
    folder: Path
    stamp: Mapping[str, list[Any]]
    """File that a scan reads -> size and modification time in ns."""

    @contextmanager
    def files(self, names: Iterable[str], place: ShardSetStore) -> Iterator[Path]:
        """A folder called as the session, with at least these of its files that there are."""
        del names, place
        yield self.folder

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of its files that are not as they were."""
        now = _stamp(self.folder)
        return [n for n in names if now.get(n) != self.stamp.get(n)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRecording:
    """A session behind a URL."""

    name: str
    store: Store
    stamp: Mapping[str, list[Any]]
    """File that a scan reads -> size and tag."""

    @contextmanager
    def files(self, names: Iterable[str], place: ShardSetStore) -> Iterator[Path]:
        """A folder called as the session, with these of its files that there are; it lies in a
        workplace of the set, so that the next job finds what a killed one left.
        """
        with place.staging_dir() as work:
            yield self.copy_to(work, names)

    def copy_to(self, work: Path, names: Iterable[str]) -> Path:
        """Copy those of these files that there are into a new folder called as the session."""
        folder = work / self.name
        folder.mkdir()
        for name in names:
            if name in self.stamp:
                with suppress(FileNotFoundError):  # :meth:`changed` says so
                    self.store.download(name, folder / name)
        return folder

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of its files that are not as they were."""
        return [n for n in names if _stored_stamp(self.store.stat(n)) != self.stamp.get(n)]


Recording = LocalRecording | RemoteRecording

_BYTES_PER_S = {
    "vision_left": 0.5e6,
    "vision_right": 0.5e6,
    "audio": 20e6,
    "text": 100e6,
    "proprio": 10e6,
    "dmel": 10e6,
}
"""About how many bytes of its sources one process makes into a column per second."""

_SCAN_BYTES_PER_S = {METADATA_FILE: 10e6, AUDIO_FILE: 20e6}
HASHED_BYTES_PER_S = 200e6


def column_seconds(recording: Recording, column: str) -> float:
    """About how long one process takes to make a column of a session."""
    sizes = (recording.stamp[n][0] for n in COLUMNS[column].sources if n in recording.stamp)
    return float(sum(sizes)) / _BYTES_PER_S[column]


def scan_seconds(recording: Recording) -> float:
    """About how long one process takes to look a session over."""
    return sum(
        float(stamp[0]) / _SCAN_BYTES_PER_S.get(name, HASHED_BYTES_PER_S)
        for name, stamp in recording.stamp.items()
    )


def find_recordings(place: Path | str) -> dict[str, Recording]:
    """Sessions below a folder or URL (or it itself), by name.

    Raises:
        SessionError: no such place, no session in it, or one whose name can't stand in keys.
        StorageError: the store behind the URL can't be read.
    """
    where = parse_location(place)
    found: dict[str, Recording] = {}
    if isinstance(where, Store):
        for name, files in _group(where.with_policy(STARTUP_RETRY)).items():
            url = where.url if files.is_root else f"{where.url}/{name}"
            store = Store(url, RetryPolicy())
            found[name] = RemoteRecording(name=name, store=store, stamp=files.stamp)
    else:
        for path in find_sessions(where):
            folder = path.absolute()
            found[path.name] = LocalRecording(name=path.name, folder=folder, stamp=_stamp(folder))
    for name in found:
        _require_name(name)
    return found


def require_unchanged(recording: Recording, names: Iterable[str]) -> None:
    """Raises SessionError where files of a session went away or changed since the job looked."""
    changed = recording.changed(sorted(set(names)))
    if changed:
        raise SessionError(
            f"session {recording.name}: {', '.join(changed)} went away or changed while the job "
            "was running; run it again: what was finished is kept"
        )


@dataclass(frozen=True, slots=True)
class _Files:
    """Files of one session behind a URL."""

    is_root: bool
    stamp: dict[str, list[Any]]


def _group(store: Store) -> dict[str, _Files]:
    """Sessions of a store, sorted by name."""
    sessions: dict[str, _Files] = {}
    own: dict[str, list[Any]] = {}
    for path, file in sorted(store.list_files().items()):
        folder, _, name = path.rpartition("/")
        if name not in SCANNED_FILES or "/" in folder or folder.startswith("."):
            continue
        if folder:
            sessions.setdefault(folder, _Files(False, {})).stamp[name] = [
                file.length_bytes,
                file.tag,
            ]
        else:
            own[name] = [file.length_bytes, file.tag]
    sessions = {n: f for n, f in sessions.items() if not f.stamp.keys().isdisjoint(SOURCE_FILES)}
    if not own.keys().isdisjoint(SOURCE_FILES):
        return {store.url.rpartition("/")[2]: _Files(True, own)}
    if not sessions:
        raise SessionError(
            f"{store}: no session in it; a session is a folder with at least one of "
            f"{', '.join(SOURCE_FILES)}"
        )
    return dict(sorted(sessions.items()))


def _require_name(name: str) -> None:
    """Refuses session names that can't stand in keys: tar readers and JSON must take them."""
    if not name.isprintable():
        raise SessionError(
            f"session folder {name!r}: its name holds control characters or is no UTF-8; rename it"
        )


def _stamp(folder: Path) -> dict[str, list[Any]]:
    """Size and modification time of each file that a scan reads."""
    stamp: dict[str, list[Any]] = {}
    for name in SCANNED_FILES:
        try:
            status = (folder / name).stat()
        except OSError:
            continue
        stamp[name] = [status.st_size, status.st_mtime_ns]
    return stamp


def _stored_stamp(file: StoredFile | None) -> list[Any] | None:
    return None if file is None else [file.length_bytes, file.tag]
