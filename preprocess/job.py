"""The shard job: scan, plan, build, commit.

Scans and shard tasks are independent functions; :mod:`preprocess.cluster` runs them. Nothing
of the old set is touched before the new manifest is there, and what a killed run had finished is
taken over by the next.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preprocess import statistics
from preprocess.build import BuildInput, build_shard, describe_shard
from preprocess.plan import OldSet, Plan, ShardTask, plan_shards, versioned
from preprocess.rejected import count_windows, rejected_lines, to_jsonl
from preprocess.scans import scan_sessions
from shared.errors import ConfigError, CorruptError, SessionError, ShardError
from shared.index import open_index
from shared.layout import COLUMNS, field_schema
from shared.manifest import (
    REJECTED_FILE,
    Manifest,
    ShardEntry,
    commit_manifest,
    fingerprint_of,
    read_manifest,
    write_durably,
)
from shared.recipe import Recipe, split_of
from shared.scan import read_clocked
from shared.session import find_sessions
from shared.text import TextTokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from preprocess.cluster import Cluster
    from shared.scan import SessionScan

_OWN_FILE = re.compile(
    r"tokenizer(\.g\d+)?\.json|(train|val)-\d{6,}(\.g\d+)?\."
    f"(index|{'|'.join(f'{name}.{c.suffix}' for name, c in COLUMNS.items())})"
)
"""Names that shard sets give to files."""


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

    A dry run makes nothing but the cache of scans.

    Raises:
        SessionError: no session there, one went away while it was read, or its name is no name.
        ConfigError: the recipe's tokenizer can't be used.
        ShardError: another job builds the same set, or the old set is of a newer format.
    """
    folders = {p.name: p for p in find_sessions(sessions)}
    _require_names(folders)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        old = _read_old(out)
        scans, num_scanned = scan_sessions(folders, out, recipe, cluster)
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
        _sweep(manifest)
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


def _require_names(names: Iterable[str]) -> None:
    """Refuses session names that can't stand in keys: tar readers and JSON must take them."""
    for name in names:
        if not name.isprintable():
            raise SessionError(
                f"session folder {name!r}: its name holds control characters or is no UTF-8; "
                "rename it"
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


def _choose_tokenizer(
    folders: Mapping[str, Path], recipe: Recipe, old: Manifest | None
) -> tuple[TextTokenizer, str]:
    """The tokenizer and its file name: given, kept from the old set, or trained on the train
    sessions.
    """
    tokenizer: TextTokenizer | None = None
    if recipe.text.tokenizer is not None:
        tokenizer = load_tokenizer(recipe.text.tokenizer)
        if tokenizer.vocab_size > recipe.text.vocab_size:
            raise ConfigError(
                f"{recipe.text.tokenizer}: has {tokenizer.vocab_size} tokens, more than "
                f"text.vocab_size; set text.vocab_size: {tokenizer.vocab_size}"
            )
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
    is_same = plan.is_empty and old is not None and tokenizer_file == old.tokenizer_file
    return Manifest(
        root=out,
        recipe=recipe,
        shards=shards,
        generation=0 if old is None else old.generation + (0 if is_same else 1),
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
    """Make the new set the set; write only what differs."""
    root = manifest.root
    for name, content in (
        (manifest.tokenizer_file, tokenizer.json.encode()),
        (REJECTED_FILE, to_jsonl(rejected)),
    ):
        if not _holds(root / name, content):
            write_durably(root / name, content)
    if old is None or replace(old, root=root) != manifest:
        commit_manifest(manifest)


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file is there with just these bytes."""
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _sweep(manifest: Manifest) -> None:
    """Remove what older sets and killed runs left; nothing that this program did not name."""
    needed = {manifest.tokenizer_file}
    for entry in manifest.shards:
        columns = open_index(manifest.root / entry.index_file).facts["columns"]
        needed |= {entry.index_file, *(c["file"] for c in columns.values())}
    given = manifest.recipe.text.tokenizer
    for path in manifest.root.iterdir():
        if path.name in needed or not _OWN_FILE.fullmatch(path.name):
            continue
        if given is None or not given.exists() or not path.samefile(given):
            path.unlink()
