"""List, drop, split and merge the sessions of finished shard sets, without recordings.

Nothing is decoded. Members are copied as they are, and whole files are linked if possible. Files
behind a URL pass through a temporary folder, a column of one shard at a time.

The result is what a build of the remaining sessions would keep: their fingerprints stay, so the
next build has nothing to do for them. Every function raises StorageError if a store can't be read
or written, and every one that writes raises JobError if the disk is full.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.build.commit import NewSet, commit_set, count_segments
from preprocess.build.plan import recipe_changes
from preprocess.build.plan_types import (
    Cause,
    ColumnTask,
    FromShards,
    Reason,
    ShardTask,
    sessions_of,
)
from preprocess.build.sources import TaskContext
from preprocess.build.task import copy_shard
from shared.errors import ShardError, rebuild_hint
from shared.files import fingerprint_of, sha256_of_bytes, stable_json
from shared.recipe import SPLITS
from shared.shardset.index import ShardIndex, index_bytes
from shared.shardset.layout import columns_of
from shared.shardset.manifest import MANIFEST_FILE, REJECTED_FILE, Manifest, ShardEntry
from shared.shardset.store import KEEP_OLD_S, RemoteShardSet, claim_shard_set, open_shard_set
from shared.storage import parse_location

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from shared.shardset.store import ShardSetStore

_MAX_NAMES = 5
"""How many session names a message lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSession:
    """A session of a shard set."""

    name: str
    split: str
    num_samples: int
    num_rejected: int
    length_bytes: int
    """Size of its members."""
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Selection:
    """A shard set, and the sessions of it that go into the result."""

    store: ShardSetStore
    manifest: Manifest
    sessions: frozenset[str]


def list_sessions(location: Path | str) -> list[SetSession]:
    """List every session of a set by name; sessions without samples have no shards.

    Raises:
        ShardError: the set can't be read.
    """
    with open_shard_set(parse_location(location)) as store:
        return _list(store, store.read_manifest())


def drop_sessions(
    location: Path | str, names: Collection[str], *, keep_old_s: float = KEEP_OLD_S
) -> Manifest:
    """Remove sessions from a set; rewrites only the shards that hold them.

    Raises:
        ShardError: no such set or session, no sample would be left, or another job builds the set.
    """
    with open_shard_set(parse_location(location)) as existing:
        existing.read_manifest()  # fails before the claim creates a folder
    with claim_shard_set(parse_location(location), keep_old_s=keep_old_s) as store:
        manifest = store.read_manifest()
        known = {s.name for s in _list(store, manifest)}
        _require_known(known, names, store)
        kept = _Selection(store, manifest, frozenset(known) - set(names))
        generation = manifest.generation + 1
        entries = [
            _copy_selected(kept, entry, store, name=entry.name, generation=generation)
            for entry in manifest.shards
        ]
        return _commit(store, [kept], [e for e in entries if e is not None], old=manifest)


def split_sessions(location: Path | str, out: Path | str, names: Collection[str]) -> Manifest:
    """Make a new set of some sessions of another, which stays as it is.

    Raises:
        ShardError: no such set or session, or there is already a set at `out`.
    """
    with open_shard_set(parse_location(location)) as store:
        manifest = store.read_manifest()
        _require_known({s.name for s in _list(store, manifest)}, names, store)
        return _assemble(out, [_Selection(store, manifest, frozenset(names))])


def merge_sets(out: Path | str, locations: Sequence[Path | str]) -> Manifest:
    """Make one new set of several, which stay as they are; links files if possible.

    Raises:
        ShardError: no such set, two are the same one, their recipes or tokenizers differ, a session
            is in two of them, or there is already a set at `out`.
    """
    with ExitStack() as stack:
        selections = []
        for location in locations:
            store = stack.enter_context(open_shard_set(parse_location(location)))
            manifest = store.read_manifest()
            names = frozenset(s.name for s in _list(store, manifest))
            selections.append(_Selection(store, manifest, names))
        _require_different_sets(selections)
        _require_same_settings(selections)
        _require_disjoint_sessions(selections)
        return _assemble(out, selections)


def _list(store: ShardSetStore, manifest: Manifest) -> list[SetSession]:
    rejected: Counter[str] = Counter()
    for line in _read_rejected(store):
        if line["level"] != "unknown":  # it can be about a folder that is no session
            rejected[line["session"]] += count_segments([line])
    samples: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    shards: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for entry in manifest.shards:
        index = store.read_index(entry.index_file, sha256=entry.index_sha256)
        numbers, lengths = index.arrays["session"], np.zeros(len(index.sessions), np.uint64)
        for column in index.columns:
            np.add.at(lengths, numbers, index.members(column).length)
        counts = np.bincount(numbers, minlength=len(index.sessions))
        for name, count, length in zip(index.sessions, counts, lengths, strict=True):
            samples[name] += int(count)
            sizes[name] += int(length)
            shards.setdefault(name, []).append(entry.name)
            splits[name] = entry.split
    return [
        SetSession(
            name=name,
            split=splits.get(name, "-"),
            num_samples=samples[name],
            num_rejected=rejected[name],
            length_bytes=sizes[name],
            shards=tuple(shards.get(name, ())),
        )
        for name in sorted({*samples, *rejected})
    ]


def _read_rejected(store: ShardSetStore) -> list[dict[str, Any]]:
    """Read the lines of a set's ``rejected.jsonl``."""
    path = f"{store}/{REJECTED_FILE}"
    try:
        content = store.read(REJECTED_FILE)
        if content is None:
            raise ShardError(f"{path}: does not exist; {rebuild_hint(store)}")
        return [json.loads(line) for line in content.decode().split("\n") if line]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path}: can't be read: {error}; {rebuild_hint(store)}") from error


def _require_known(known: Collection[str], names: Collection[str], store: ShardSetStore) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "fix: see `sessions list`"
            raise ShardError(f"{store}: no session {name!r} in this set; {hint}")


def _require_different_sets(selections: Sequence[_Selection]) -> None:
    """Refuse the same set twice, even under two names."""
    for number, selection in enumerate(selections):
        for other in selections[:number]:
            is_same = selection.manifest.fingerprint == other.manifest.fingerprint
            locations = [
                s.store if isinstance(s, RemoteShardSet) else s.root.resolve()
                for s in (selection.store, other.store)
            ]
            if is_same or locations[0] == locations[1]:
                raise ShardError(
                    f"{other.store} and {selection.store} are the same set (fingerprint "
                    f"{selection.manifest.fingerprint}); fix: name it once"
                )


def _require_disjoint_sessions(selections: Sequence[_Selection]) -> None:
    """Refuse a session that is in two sets; the message says how to merge the others."""
    owners: dict[str, ShardSetStore] = {}
    for selection in selections:
        shared_names = sorted(selection.sessions & owners.keys())
        if shared_names:
            name, own_names = shared_names[0], sorted(selection.sessions - owners.keys())
            listed = " ".join(map(shlex.quote, own_names[:_MAX_NAMES]))
            fix = (
                f"merge only its other sessions: python -m preprocess sessions split "
                f"{selection.store} NEW_SET {listed}{' ...' if len(own_names) > _MAX_NAMES else ''}"
                if own_names
                else f"leave out {selection.store}: all its sessions are in the sets before it"
            )
            more = f" (and {len(shared_names) - 1} more)" if len(shared_names) > 1 else ""
            raise ShardError(
                f"session {name}{more} is in {owners[name]} and in {selection.store}; fix: {fix}"
            )
        owners |= dict.fromkeys(selection.sessions, selection.store)


def _require_same_settings(selections: Sequence[_Selection]) -> None:
    """Refuse sets whose recipes or tokenizers differ."""
    first = selections[0]
    for other in selections[1:]:
        changes = [
            change
            for change in recipe_changes(first.manifest.recipe, other.manifest.recipe)
            if not change.startswith(("shard.", "text."))
        ]
        if changes:
            raise ShardError(
                f"{first.store} and {other.store} are built by different recipes: "
                f"{'; '.join(changes)}; fix: build both by one recipe"
            )
        if first.manifest.tokenizer_sha256 != other.manifest.tokenizer_sha256:
            raise ShardError(
                f"{first.store} and {other.store} have different tokenizers; fix: build the second "
                f"with text.tokenizer: {first.store}/{first.manifest.tokenizer_file}"
            )


def _assemble(out: Path | str, selections: Sequence[_Selection]) -> Manifest:
    """Make a new set of the selected sessions of others."""
    with open_shard_set(parse_location(out)) as existing:
        if existing.read(MANIFEST_FILE) is not None:
            raise ShardError(f"{existing}: is a shard set already; fix: name a new folder")
    with claim_shard_set(parse_location(out)) as store:
        entries: list[ShardEntry] = []
        numbers = dict.fromkeys(SPLITS, 0)
        for selection in selections:
            for entry in selection.manifest.shards:
                name = f"{entry.split}-{numbers[entry.split]:06d}"
                copy = _copy_selected(selection, entry, store, name=name, generation=0)
                if copy is not None:
                    entries.append(copy)
                    numbers[entry.split] += 1
        entries.sort(key=lambda e: (SPLITS.index(e.split), e.name))
        return _commit(store, selections, entries, old=None)


def _copy_selected(
    selection: _Selection, entry: ShardEntry, out: ShardSetStore, *, name: str, generation: int
) -> ShardEntry | None:
    """Write a shard with the selected sessions of another; None if it has none of them."""
    source = selection.store
    index = source.read_index(entry.index_file, sha256=entry.index_sha256)
    sessions = sessions_of(index)
    selected = tuple(s for s in sessions if s.session in selection.sessions)
    if not selected:
        return None
    if len(selected) < len(sessions):
        context = TaskContext(
            out=out,
            recipe=selection.manifest.recipe,
            tokenizer_json="",
            recordings={},
            scans={},
            old=source,
        )
        names = tuple(s.session for s in selected)
        columns = {}
        for column, header in index.columns.items():
            rows = {session: header["rows"][session] for session in names}
            columns[column] = ColumnTask(
                reason=Reason(Cause.SESSIONS_DROPPED),
                basis={**header["basis"], "rows": fingerprint_of(list(rows.values()))},
                rows=rows,
                sources=dict.fromkeys(names, FromShards((entry.index_file,))),
            )
        task = ShardTask(
            name=name,
            split=entry.split,
            sessions=selected,
            columns=columns,
            kept={},
            kept_index_file=None,
            generation=generation,
        )
        return copy_shard(task, context)
    if source is not out:
        return _link_shard(entry, index, out, selection, name=name)
    return entry


def _link_shard(
    entry: ShardEntry, index: ShardIndex, out: ShardSetStore, selection: _Selection, *, name: str
) -> ShardEntry:
    """Put a whole shard of another set under a new name; links its columns, or copies them."""
    columns, known = {}, columns_of(selection.manifest.recipe)
    with out.staging_dir() as work:
        for column, header in index.columns.items():
            file = f"{name}.{column}.{known[column].suffix}"
            selection.store.copy_to(header["file"], work / file, sha256=header["sha256"])
            out.put(work / file, file)
            (work / file).unlink(missing_ok=True)  # an upload leaves it
            columns[column] = {**header, "file": file}
    renamed = ShardIndex(
        header={**index.header, "name": name, "columns": columns}, arrays=index.arrays
    )
    content, file = index_bytes(renamed), f"{name}.index"
    with out.staging_dir() as work:
        (work / file).write_bytes(content)
        out.put(work / file, file)
    return replace(entry, name=name, index_file=file, index_sha256=sha256_of_bytes(content))


def _commit(
    out: ShardSetStore,
    selections: Sequence[_Selection],
    entries: Sequence[ShardEntry],
    *,
    old: Manifest | None,
) -> Manifest:
    """Commit the set of these shards; rejected are its sessions' lines, then decode failures."""
    first = selections[0].manifest
    if not entries:
        raise ShardError(f"{out}: no sample would be left; fix: remove the folder instead")
    tokenizer = first.load_tokenizer()
    headers = [out.read_index(entry.index_file).header for entry in entries]
    failures = [{"level": "stream", **f} for header in headers for f in header["decode_failures"]]
    known = {stable_json(failure) for failure in failures}
    lines = [
        line
        for selection in selections
        for line in _read_rejected(selection.store)
        if line["session"] in selection.sessions and not (known and stable_json(line) in known)
    ]
    return commit_set(
        NewSet(
            store=out,
            recipe=first.recipe,
            shards=tuple(entries),
            headers=headers,
            generation=0 if old is None else old.generation + 1,
            tokenizer=tokenizer,
            tokenizer_file="tokenizer.json" if old is None else old.tokenizer_file,
            num_sessions=sum(len(s.sessions) for s in selections),
            rejected=[*sorted(lines, key=lambda line: str(line["session"])), *failures],
            previous=old,
        )
    )
