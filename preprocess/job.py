"""The shard job: scan, plan, build, commit.

Scans and shard tasks are independent functions; :mod:`preprocess.cluster` runs them. Nothing
of the old set is touched before the new manifest is there, and what a killed run had finished is
taken over by the next.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preprocess import statistics
from preprocess.build import BuildInput, build_shard, describe_shard
from preprocess.plan import OldSet, Plan, ShardTask, plan_shards, versioned
from preprocess.rejected import count_windows, rejected_lines, to_jsonl
from shared.errors import CorruptError, ShardError
from shared.index import open_index
from shared.layout import field_schema
from shared.manifest import (
    REJECTED_FILE,
    SESSIONS_FILE,
    Manifest,
    ShardEntry,
    commit_manifest,
    fingerprint_of,
    read_manifest,
    write_durably,
)
from shared.recipe import Recipe, json_of, split_of
from shared.scan import SessionScan, read_clocked, scan_from_json, scan_session
from shared.session import SOURCE_FILES, find_sessions
from shared.text import TextTokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from preprocess.cluster import Cluster

SCAN_VERSION = 1
"""Raised when a scan of the same files would say something else."""

_SCAN_PARTS = ("window", "vision", "audio", "sensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSummary:
    """What a build did."""

    plan: Plan
    manifest: Manifest | None
    """None after a dry run."""
    num_sessions: int
    num_scanned: int
    """Sessions looked over anew; the others had not changed."""
    rejected: tuple[Mapping[str, Any], ...]


def build_shards(
    sessions: Path,
    out: Path,
    *,
    recipe: Recipe,
    cluster: Cluster,
    dry_run: bool = False,
) -> BuildSummary:
    """Bring the shard set `out` up to date with the sessions and the recipe.

    Raises:
        SessionError: no session there, or one went away while it was read.
        ShardError: another job builds the same set, or the old set is of a newer format.
    """
    folders = {p.name: p for p in find_sessions(sessions)}
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        old = _read_old(out)
        scans, num_scanned = _scan_all(folders, out, recipe, cluster)
        tokenizer, tokenizer_file = _choose_tokenizer(folders, recipe, old)
        plan = plan_shards(
            scans,
            recipe,
            tokenizer_sha256=tokenizer.sha256,
            old=None if old is None else _describe(old),
        )
        if dry_run:
            return _summary(plan, None, scans, num_scanned, ())
        entries = _run(plan, folders, scans, out, recipe, tokenizer, cluster)
        kept = {s.name: s for s in old.shards} if old is not None else {}
        shards = tuple(entries.get(name) or kept[name] for name in plan.order)
        manifest = _manifest(out, recipe, shards, scans, tokenizer, tokenizer_file, old, plan)
        rejected = rejected_lines(scans, recipe, _losses(manifest))
        _commit(manifest, old, tokenizer, rejected)
        return _summary(plan, manifest, scans, num_scanned, rejected)


def _summary(
    plan: Plan,
    manifest: Manifest | None,
    scans: Mapping[str, SessionScan],
    num_scanned: int,
    rejected: Iterable[Mapping[str, Any]],
) -> BuildSummary:
    return BuildSummary(
        plan=plan,
        manifest=manifest,
        num_sessions=len(scans),
        num_scanned=num_scanned,
        rejected=tuple(rejected),
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one job builds a set; the lock goes with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"{folder}: another job is building this shard set; wait for it"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _read_old(out: Path) -> Manifest | None:
    """The set that is there; None where there is none or its manifest is damaged."""
    try:
        return read_manifest(out)
    except CorruptError:
        return None
    except ShardError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _describe(manifest: Manifest) -> OldSet | None:
    """The old set for planning; shards whose index is damaged are left out and so built anew."""
    shards = []
    for entry in manifest.shards:
        try:
            shards.append(describe_shard(entry, manifest.root))
        except (ShardError, KeyError, TypeError):
            continue
    return OldSet(recipe=manifest.recipe, generation=manifest.generation, shards=tuple(shards))


def _scan_all(
    folders: Mapping[str, Path], out: Path, recipe: Recipe, cluster: Cluster
) -> tuple[dict[str, SessionScan], int]:
    """A scan of every session; those whose files have the same size and time are not read again."""
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
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if values["basis"] == basis:
                scan = scan_from_json(values["scan"])
                known[scan.session] = (values["stamp"], scan)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
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


def _choose_tokenizer(
    folders: Mapping[str, Path], recipe: Recipe, old: Manifest | None
) -> tuple[TextTokenizer, str]:
    """The tokenizer and its file name: given, kept from the old set, or trained on the train
    sessions.
    """
    tokenizer: TextTokenizer | None = None
    if recipe.text.tokenizer is not None:
        tokenizer = load_tokenizer(recipe.text.tokenizer)
    elif old is not None and old.recipe.text == recipe.text and old.recipe.split == recipe.split:
        try:
            return old.load_tokenizer(), old.tokenizer_file
        except ShardError:
            tokenizer = None
    if tokenizer is None:
        texts = [
            event.text
            for name, path in folders.items()
            if split_of(name, recipe) == "train"
            for event in read_clocked(path, recipe=recipe)[1]
        ]
        tokenizer = train_tokenizer(texts, vocab_size=recipe.text.vocab_size)
    if old is None or tokenizer.sha256 == old.tokenizer_sha256:
        return tokenizer, "tokenizer.json" if old is None else old.tokenizer_file
    return tokenizer, versioned("tokenizer.json", old.generation + 1)


def _run(
    plan: Plan,
    folders: Mapping[str, Path],
    scans: Mapping[str, SessionScan],
    out: Path,
    recipe: Recipe,
    tokenizer: TextTokenizer,
    cluster: Cluster,
) -> dict[str, ShardEntry]:
    """Build every task of a plan."""

    def given(task: ShardTask) -> tuple[ShardTask, BuildInput]:
        names = [piece.session for piece in task.slices]
        return task, BuildInput(
            out=out.absolute(),
            recipe=recipe,
            tokenizer_json=tokenizer.json,
            paths={n: folders[n].absolute() for n in names},
            scans={n: scans[n] for n in names},
        )

    if not plan.tasks:
        return {}
    entries = cluster.map(_build, [given(task) for task in plan.tasks], what="build shards")
    return {entry.name: entry for entry in entries}


def _build(work: tuple[ShardTask, BuildInput]) -> ShardEntry:
    return build_shard(*work)


def _manifest(
    out: Path,
    recipe: Recipe,
    shards: tuple[ShardEntry, ...],
    scans: Mapping[str, SessionScan],
    tokenizer: TextTokenizer,
    tokenizer_file: str,
    old: Manifest | None,
    plan: Plan,
) -> Manifest:
    num_samples = sum(s.num_samples for s in shards)
    planned = sum(len(scan.windows(recipe)) for scan in scans.values())
    parts = [
        {
            "num_samples": entry.num_samples,
            **_flat(open_index(out / entry.index_file).facts["statistics"]),
        }
        for entry in shards
        if entry.split == "train"
    ]
    previous = -1 if old is None else old.generation
    return Manifest(
        root=out,
        recipe=recipe,
        shards=shards,
        generation=max(0, previous if plan.is_empty else previous + 1),
        tokenizer_file=tokenizer_file,
        tokenizer_sha256=tokenizer.sha256,
        fields=field_schema(recipe),
        statistics=statistics.merge(parts),
        counts={
            "sessions": len(scans),
            "windows_planned": planned,
            "samples": num_samples,
            "windows_rejected": count_windows(rejected_lines(scans, recipe, ())),
        },
        fingerprint=fingerprint_of(
            [[s.name, s.split, s.num_samples, s.index_sha256] for s in shards], tokenizer.sha256
        ),
    )


def _flat(per_column: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in per_column.values() for name, value in part.items()}


def _losses(manifest: Manifest) -> list[dict[str, Any]]:
    """Streams of samples that did not decode, from every index."""
    return [
        loss
        for entry in manifest.shards
        for loss in open_index(manifest.root / entry.index_file).facts["losses"]
    ]


def _commit(
    manifest: Manifest,
    old: Manifest | None,
    tokenizer: TextTokenizer,
    rejected: Sequence[Mapping[str, Any]],
) -> None:
    """Make the new set the set, then remove what only the old one needed."""
    if old is not None and replace(old, root=manifest.root) == manifest:
        return
    root = manifest.root
    if old is None or old.tokenizer_file != manifest.tokenizer_file:
        write_durably(root / manifest.tokenizer_file, tokenizer.json.encode())
    write_durably(root / REJECTED_FILE, to_jsonl(rejected))
    commit_manifest(manifest)
    needed = {manifest.tokenizer_file}
    for entry in manifest.shards:
        columns = open_index(root / entry.index_file).facts["columns"]
        needed |= {entry.index_file, *(c["file"] for c in columns.values())}
    for pattern in ("train-*", "val-*", "tokenizer*.json"):
        for path in root.glob(pattern):
            if path.name not in needed:
                path.unlink()
