"""Scan all sessions, with a cache of the scans.

The cache is the set's ``sessions.jsonl``; it may be deleted at any time. A session whose files have
the same size and time is not read again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from preprocess.build.commit import to_jsonl
from preprocess.build.sources import scan_seconds
from shared.files import fingerprint_of
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
"""Raised when a scan of the same files would give another result."""

_SCAN_SECTIONS = ("window", "vision", "audio", "sensors")
"""Sections of a recipe that a scan depends on."""


def scan_sessions(
    recordings: Mapping[str, Recording], store: ShardSetStore, recipe: Recipe, cluster: Cluster
) -> tuple[dict[str, SessionScan], int]:
    """Scan every session that changed, and update the cache.

    Args:
        recordings: every session, by name.
        store: the shard set, which holds the cache.
        recipe: the recipe to scan by.
        cluster: runs the scans.

    Returns:
        The scan of every session, by name, and how many sessions were read.
    """
    sections = recipe.as_json()
    basis = fingerprint_of(SCAN_VERSION, {name: sections[name] for name in _SCAN_SECTIONS})
    cached = _parse_cache(store.read(SESSIONS_FILE) or b"")
    stamps = {name: dict(recording.stamp) for name, recording in recordings.items()}
    scans = {
        name: cached[name].scan
        for name in recordings
        if name in cached and (cached[name].basis, cached[name].stamp) == (basis, stamps[name])
    }
    changed = [name for name in recordings if name not in scans]
    work = [(recordings[name], _unchanged(cached.get(name), stamps[name])) for name in changed]
    seconds = sum(scan_seconds(recording) for recording, _ in work)
    scan = partial(_scan, recipe=recipe, store=store)
    new = cluster.map(scan, work, label="scan sessions", work_s=seconds)
    scans.update(zip(changed, new, strict=True))
    scans = {name: scans[name] for name in sorted(scans)}
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
    with recording.files(SCANNED_FILES, store) as folder:
        return scan_session(folder, recipe=recipe, known=known)


@dataclass(frozen=True, slots=True)
class _Cached:
    """A line of the cache."""

    basis: str
    """Hash of the scan's version and the recipe's sections."""
    stamp: Mapping[str, Any]
    scan: SessionScan


def _parse_cache(content: bytes) -> dict[str, _Cached]:
    """Parse the scans of an earlier run, by session; skip lines that can't be read."""
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
    """Return the identity of unchanged source files, which need no hashing."""
    if cached is None:
        return {}
    sources = cached.scan.sources
    return {n: f for n, f in sources.items() if n in stamp and cached.stamp.get(n) == stamp[n]}
