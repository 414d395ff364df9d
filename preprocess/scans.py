"""Scans of all sessions, with a cache, ``sessions.jsonl``, that may be deleted at any time.

A session whose files have the same size and time is not read again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preprocess.rejected import to_jsonl
from shared.manifest import SESSIONS_FILE, fingerprint_of, write_durably
from shared.recipe import Recipe, json_of
from shared.scan import SessionScan, scan_from_json, scan_session
from shared.session import SOURCE_FILES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from preprocess.cluster import Cluster

SCAN_VERSION = 1
"""Raised when a scan of the same files would say something else."""

_SCAN_PARTS = ("window", "vision", "audio", "sensors")


def scan_sessions(
    folders: Mapping[str, Path], out: Path, recipe: Recipe, cluster: Cluster
) -> tuple[dict[str, SessionScan], int]:
    """A scan of every session, by name, and how many had to be read.

    Args:
        folders: every session's folder, by name.
        out: the shard set's folder, where the cache is.
        recipe: the recipe to scan by.
        cluster: runs the scans.
    """
    sections = json_of(recipe)
    basis = fingerprint_of(SCAN_VERSION, {p: sections[p] for p in _SCAN_PARTS})
    known = _read_scans(out / SESSIONS_FILE, basis)
    stamps = {name: _stamp(path) for name, path in folders.items()}
    scans = {n: known[n][1] for n in folders if n in known and known[n][0] == stamps[n]}
    due = [name for name in folders if name not in scans]
    found = (
        cluster.map(_Scan(recipe), [folders[n] for n in due], what="scan sessions") if due else []
    )
    scans.update(zip(due, found, strict=True))
    if due or set(known) != set(scans):
        lines = [
            {"basis": basis, "stamp": stamps[name], "scan": scans[name].as_json()}
            for name in sorted(scans)
        ]
        write_durably(out / SESSIONS_FILE, to_jsonl(lines))
    return {name: scans[name] for name in sorted(scans)}, len(due)


@dataclass(frozen=True, slots=True)
class _Scan:
    """scan_session with the recipe filled in; crosses processes."""

    recipe: Recipe

    def __call__(self, path: Path) -> SessionScan:
        return scan_session(path, recipe=self.recipe)


def _read_scans(path: Path, basis: str) -> dict[str, tuple[Any, SessionScan]]:
    """Scans of an earlier run, by session; a cache, so that whatever can't be read is scanned
    again.
    """
    known = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return {}
    for line in lines:
        try:
            values = json.loads(line)
            if values["basis"] == basis:
                scan = scan_from_json(values["scan"])
                known[scan.session] = (values["stamp"], scan)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return known


def _stamp(path: Path) -> dict[str, list[int]]:
    """Size and modification time of each source file."""
    stamp = {}
    for name in SOURCE_FILES:
        try:
            status = (path / name).stat()
        except OSError:
            continue
        stamp[name] = [status.st_size, status.st_mtime_ns]
    return stamp
