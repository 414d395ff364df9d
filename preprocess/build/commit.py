"""Commit a new shard set: write the manifest, then delete files that it no longer references.

``rejected.jsonl`` says what the set lacks, and why. Levels: "session" (none of its windows became a
sample), "window", "stream" (a session or a sample lacks a stream whose file exists), "lines" (lines
or events of a file that could not be used). Windows planned = samples + the windows of the first
two.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preprocess.build import statistics
from preprocess.build.shards import versioned
from shared.errors import ShardError
from shared.files import fingerprint_of
from shared.recipe import STREAMS
from shared.shardset.layout import COLUMNS, field_schema
from shared.shardset.manifest import (
    MANIFEST_FILE,
    REJECTED_FILE,
    Manifest,
    ShardEntry,
    commit_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from shared.recipe import Recipe
    from shared.session.scan import SessionScan
    from shared.shardset.store import ShardSetStore

_OWN_FILE = re.compile(
    r"tokenizer(\.g\d+)?\.json|manifest\.g\d+\.json|(train|val)-\d{6,}(\.g\d+)?\."
    f"(index|{'|'.join(f'{name}.{c.suffix}' for name, c in COLUMNS.items())})"
)
"""Names that shard sets give to files."""

_OLD_MANIFEST = re.compile(r"manifest\.g\d+\.json")
"""Names of replaced manifests; they are there as long as someone reads by them, or may."""


def make_manifest(
    place: ShardSetStore,
    shards: tuple[ShardEntry, ...],
    facts: Sequence[Mapping[str, Any]],
    *,
    recipe: Recipe,
    generation: int,
    tokenizer_file: str,
    tokenizer_sha256: str,
    num_sessions: int,
    num_planned: int,
    num_rejected: int,
) -> Manifest:
    """The manifest of a set.

    Args:
        place: where the set is.
        shards: its shards, in order.
        facts: those of the shards' indexes.
        recipe: the recipe it is made by.
        generation: builds that changed something.
        tokenizer_file: name of its tokenizer.
        tokenizer_sha256: checksum of it.
        num_sessions: sessions, with those of which nothing is in the set.
        num_planned: windows of them all.
        num_rejected: windows that are not in the set.
    """
    parts = [
        {"num_samples": entry.num_samples, **_flat(found["statistics"])}
        for entry, found in zip(shards, facts, strict=True)
        if entry.split == "train"
    ]
    return Manifest(
        root=place.root,
        recipe=recipe,
        shards=shards,
        generation=generation,
        tokenizer_file=tokenizer_file,
        tokenizer_sha256=tokenizer_sha256,
        fields=field_schema(recipe),
        statistics=statistics.merge(parts),
        counts={
            "sessions": num_sessions,
            "windows_planned": num_planned,
            "samples": sum(s.num_samples for s in shards),
            "windows_rejected": num_rejected,
        },
        fingerprint=fingerprint_of(
            [[s.name, s.split, s.num_samples, s.index_sha256] for s in shards], tokenizer_sha256
        ),
    )


def commit(
    manifest: Manifest,
    place: ShardSetStore,
    *,
    old: Manifest | None,
    tokenizer_json: str,
    rejected: Iterable[Mapping[str, Any]],
) -> None:
    """Make the new set the set; write only what differs.

    Args:
        manifest: the new set.
        place: where it is.
        old: the set before.
        tokenizer_json: the tokenizer's file.
        rejected: lines of ``rejected.jsonl``.
    """
    for name, content in (
        (manifest.tokenizer_file, tokenizer_json.encode()),
        (REJECTED_FILE, to_jsonl(rejected)),
    ):
        if place.read(name) != content:
            place.write(name, content)
    if old is None or replace(old, root=place.root) != manifest:
        if old is not None:
            place.retain_manifest(versioned(MANIFEST_FILE, old.generation))
        commit_manifest(manifest, write=place.write)


def sweep(manifest: Manifest, place: ShardSetStore, facts: Iterable[Mapping[str, Any]]) -> None:
    """Remove what older sets and killed runs left; nothing that this program did not name, and
    nothing of an older set that someone reads, or behind a URL may still read.

    Args:
        manifest: the set, committed.
        place: where it is.
        facts: those of its indexes.
    """
    needed = {manifest.tokenizer_file, *(entry.index_file for entry in manifest.shards)}
    needed |= {column["file"] for found in facts for column in found["columns"].values()}
    names = sorted(place.list_sizes())
    for name in filter(_OLD_MANIFEST.fullmatch, names):
        if place.has_readers(name):
            needed |= {name, *_files_of(name, place, known=needed)}
    given = manifest.recipe.text.tokenizer
    for name in names:
        if name in needed or not _OWN_FILE.fullmatch(name):
            continue
        path = manifest.root / name
        if given is None or not (given.exists() and path.exists() and path.samefile(given)):
            place.remove(name)


def _files_of(name: str, place: ShardSetStore, *, known: Collection[str]) -> set[str]:
    """Files that a replaced manifest leads to; of a damaged set those that can be told.

    Args:
        name: the manifest.
        place: where the set is.
        known: files that stay; what these indexes lead to is among them.
    """
    found = set()
    with suppress(ShardError, ValueError, KeyError, TypeError):
        values = json.loads(place.read(name) or b"{}")
        found.add(values["tokenizer"]["file"])
        for shard in values["shards"]:
            if shard["index_file"] in known:
                continue
            found.add(shard["index_file"])
            columns = place.read_index(shard["index_file"]).columns
            found |= {column["file"] for column in columns.values()}
    return found


def _flat(per_column: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in per_column.values() for name, value in part.items()}


def rejected_lines(
    scans: Mapping[str, SessionScan], recipe: Recipe, losses: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Every line, in order of session name.

    Args:
        scans: every session.
        recipe: the recipe of the set.
        losses: streams of samples that turned out not to decode, from the shards' indexes.
    """
    lines: list[dict[str, Any]] = []
    for name in sorted(scans):
        lines += _session_lines(scans[name], recipe)
    lines += [{"level": "stream", **loss} for loss in losses]
    return lines


def count_windows(lines: Iterable[Mapping[str, Any]]) -> int:
    """Windows that the lines reject."""
    return sum(
        {"session": line.get("windows", 0), "window": 1}.get(line["level"], 0) for line in lines
    )


def to_jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """The file's bytes."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _session_lines(scan: SessionScan, recipe: Recipe) -> Iterator[dict[str, Any]]:
    windows = scan.windows(recipe)
    for sentence in scan.issues:
        yield {"level": "lines", "session": scan.session, "reason": sentence}
    reason = scan.session_rejection(recipe)
    if reason is not None:
        yield {
            "level": "session",
            "session": scan.session,
            "windows": len(windows),
            "reason": reason,
        }
        return
    for stream, why in scan.absent.items():
        sources = next(c.sources for c in COLUMNS.values() if stream in c.streams)
        if len(sources) == 1 and stream not in scan.not_recorded:
            yield {"level": "stream", "session": scan.session, "stream": stream, "reason": why}
    for window in windows:
        place = {"session": scan.session, "window": window.index}
        reason = scan.rejection(window, recipe)
        if reason is not None:
            times = {"start_s": window.start_s, "stop_s": window.stop_s}
            yield {"level": "window", **place, **times, "reason": reason}
            continue
        present = scan.present(window, recipe)
        for stream, share in zip(STREAMS, scan.coverage[window.index], strict=True):
            if share > 0 and stream not in present:
                why = f"covers {share:.0%} of the window, less than window.min_coverage"
                yield {"level": "stream", **place, "stream": stream, "reason": why}
