"""Where recorded sessions lie: folders of this machine's file system, or behind a URL.

A recording knows the size and time of its files as they were when the job looked. A task asks for
the files that it needs; those behind a URL are copied into a temporary folder for as long as it
works.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shared.errors import SessionError
from shared.session import AUDIO_FILE, METADATA_FILE, SOURCE_FILES, TEXT_FILE, find_sessions
from shared.storage import Store, StoredFile, place_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRecording:
    """A session folder."""

    name: str
    folder: Path
    stamp: Mapping[str, list[Any]]
    """Source file -> size and modification time in ns."""

    @contextmanager
    def files(self, names: Iterable[str]) -> Iterator[Path]:
        """A folder called as the session, with at least these of its files that there are."""
        del names
        yield self.folder

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of its files that are not as they were."""
        now = _stamp(self.folder)
        return [n for n in names if now.get(n) != self.stamp.get(n)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecording:
    """A session behind a URL."""

    name: str
    store: Store
    stamp: Mapping[str, list[Any]]
    """Source file -> size and tag."""

    @contextmanager
    def files(self, names: Iterable[str]) -> Iterator[Path]:
        """A temporary folder called as the session, with these of its files that there are."""
        with TemporaryDirectory(prefix="recording-") as temporary:
            folder = Path(temporary) / self.name
            folder.mkdir()
            for name in names:
                if name in self.stamp:
                    try:
                        self.store.fetch(name, folder / name)
                    except FileNotFoundError:
                        continue  # :meth:`changed` says so
            yield folder

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of its files that are not as they were."""
        return [n for n in names if _stored_stamp(self.store.find(n)) != self.stamp.get(n)]


Recording = LocalRecording | StoredRecording

_BYTES_PER_S = {METADATA_FILE: 10e6, TEXT_FILE: 10e6, AUDIO_FILE: 20e6}
"""About how fast a file is read and made into fields."""

_VIDEO_BYTES_PER_S = 0.5e6
_SCAN_BYTES_PER_S = 200e6


def work_seconds(recordings: Iterable[Recording], names: Iterable[str]) -> float:
    """About how long one process takes to make fields of these files of some sessions."""
    speeds = {name: _BYTES_PER_S.get(name, _VIDEO_BYTES_PER_S) for name in names}
    return sum(
        float(r.stamp[name][0]) / speed
        for r in recordings
        for name, speed in speeds.items()
        if name in r.stamp
    )


def scan_seconds(recordings: Iterable[Recording]) -> float:
    """About how long one process takes to look sessions over."""
    recordings = list(recordings)
    size = sum(int(stamp[0]) for r in recordings for stamp in r.stamp.values())
    return work_seconds(recordings, _BYTES_PER_S) + size / _SCAN_BYTES_PER_S


def find_recordings(place: Path | str) -> dict[str, Recording]:
    """Sessions below a folder or URL (or it itself), by name.

    Raises:
        SessionError: no such place, no session in it, or one whose name can't stand in keys.
        StorageError: the store behind the URL can't be read.
    """
    where = place_of(place)
    found: dict[str, Recording] = {}
    if isinstance(where, Store):
        for name, files in _group(where).items():
            url = where.url if files.is_root else f"{where.url}/{name}"
            found[name] = StoredRecording(name=name, store=Store(url), stamp=files.stamp)
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
    """Source files of one session behind a URL."""

    is_root: bool
    stamp: dict[str, list[Any]]


def _group(store: Store) -> dict[str, _Files]:
    """Sessions of a store, sorted by name."""
    sessions: dict[str, _Files] = {}
    own: dict[str, list[Any]] = {}
    for path, file in sorted(store.list_files().items()):
        folder, _, name = path.rpartition("/")
        if name not in SOURCE_FILES or "/" in folder or folder.startswith("."):
            continue
        if folder:
            sessions.setdefault(folder, _Files(False, {})).stamp[name] = [
                file.length_bytes,
                file.tag,
            ]
        else:
            own[name] = [file.length_bytes, file.tag]
    if own:
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
    """Size and modification time of each source file."""
    stamp: dict[str, list[Any]] = {}
    for name in SOURCE_FILES:
        try:
            status = (folder / name).stat()
        except OSError:
            continue
        stamp[name] = [status.st_size, status.st_mtime_ns]
    return stamp


def _stored_stamp(file: StoredFile | None) -> list[Any] | None:
    return None if file is None else [file.length_bytes, file.tag]
