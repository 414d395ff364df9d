"""Scans of all sessions, with a cache, ``sessions.jsonl``, that may be deleted at any time.

A session whose files have the same size and time is not read again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preprocess.build.commit import to_jsonl
from preprocess.build.sources import scan_seconds
from shared.files import fingerprint_of
from shared.recipe import Recipe
from shared.session.folder import SCANNED_FILES
from shared.session.scan import SessionScan, SourceFile, scan_from_json, scan_session
from shared.shardset.manifest import SESSIONS_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from preprocess.build.cluster import Cluster
    from preprocess.build.sources import Recording
    from shared.recipe import Recipe
    from shared.shardset.store import ShardSetStore

SCAN_VERSION = 2
"""Raised when a scan of the same files would say something else."""

_SCAN_PARTS = ("window", "vision", "audio", "sensors")


def scan_sessions(
    recordings: Mapping[str, Recording], out: ShardSetStore, recipe: Recipe, cluster: Cluster
) -> tuple[dict[str, SessionScan], int]:
    """A scan of every session, by name, and how many had to be read.

    Args:
        recordings: every session, by name.
        out: the shard set, where the cache is.
        recipe: the recipe to scan by.
        cluster: runs the scans.
    """
    sections = recipe.as_json()
    basis = fingerprint_of(SCAN_VERSION, {p: sections[p] for p in _SCAN_PARTS})
    cached = _parse_cache(out.read(SESSIONS_FILE) or b"")
    stamps = {name: dict(recording.stamp) for name, recording in recordings.items()}
    scans = {
        name: cached[name].scan
        for name in recordings
        if name in cached and (cached[name].basis, cached[name].stamp) == (basis, stamps[name])
    }
    due = [name for name in recordings if name not in scans]
    work = [(recordings[name], _unchanged(cached.get(name), stamps[name])) for name in due]
    seconds = sum(scan_seconds(recording) for recording, _ in work)
    found = cluster.map(_Scan(recipe, out), work, label="scan sessions", work_s=seconds)
    scans.update(zip(due, found, strict=True))
    scans = {name: scans[name] for name in sorted(scans)}
    if due or set(cached) != set(scans):
        lines = [
            {"basis": basis, "stamp": stamps[name], "scan": scan.as_json()}
            for name, scan in scans.items()
        ]
        out.write(SESSIONS_FILE, to_jsonl(lines))
    return scans, len(due)


@dataclass(frozen=True, slots=True)
class _Scan:
    """scan_session with the recipe filled in; crosses processes."""

    recipe: Recipe
    place: ShardSetStore

    def __call__(self, work: tuple[Recording, Mapping[str, SourceFile]]) -> SessionScan:
        recording, known = work
        with recording.files(SCANNED_FILES, self.place) as folder:
            return scan_session(folder, recipe=self.recipe, known=known)


@dataclass(frozen=True, slots=True)
class _Cached:
    """A line of the cache."""

    basis: str
    """Of the scan: its version and the recipe's sections."""
    stamp: Mapping[str, Any]
    scan: SessionScan


def _parse_cache(content: bytes) -> dict[str, _Cached]:
    """Scans of an earlier run, by session; a cache, so that whatever can't be read is scanned
    again.
    """
    cached = {}
    for line in content.split(b"\n"):
        try:
            values = json.loads(line)
            scan = scan_from_json(values["scan"])
            cached[scan.session] = _Cached(values["basis"], dict(values["stamp"]), scan)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return cached


def _unchanged(cached: _Cached | None, stamp: Mapping[str, Any]) -> dict[str, SourceFile]:
    """Source files that are as they were: what they are needs no hashing."""
    if cached is None:
        return {}
    sources = cached.scan.sources
    return {n: f for n, f in sources.items() if n in stamp and cached.stamp.get(n) == stamp[n]}
