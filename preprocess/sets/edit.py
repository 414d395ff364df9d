"""Sessions of finished shard sets: list, drop, split and merge them, without recordings and without
decoding. Members are copied as they are, or whole files linked; what lies behind a URL passes
through a temporary folder, a column of one shard at a time.

What is left of a set is what a build of the remaining sessions would keep: their fingerprints stay,
so that the next build has nothing to do for them.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preprocess.build.commit import NewSet, commit_set, count_windows
from preprocess.build.shards import (
    Cause,
    ColumnTask,
    FromShards,
    Reason,
    SessionWindows,
    ShardTask,
)
from preprocess.build.task import copy_shard
from preprocess.build.task_context import TaskContext
from preprocess.sets.parts import Part, require_alike, require_apart, require_different
from shared.errors import REBUILD_HINT, ShardError
from shared.files import fingerprint_of, sha256_of_bytes
from shared.recipe import SPLITS
from shared.shardset.index import ShardIndex, index_bytes
from shared.shardset.layout import COLUMNS
from shared.shardset.manifest import (
    MANIFEST_FILE,
    REJECTED_FILE,
    Manifest,
    ShardEntry,
)
from shared.shardset.store import KEEP_OLD_S, claim_shard_set, open_shard_set
from shared.storage import parse_location

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from shared.shardset.store import ShardSetStore


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSession:
    """A session of a shard set."""

    name: str
    split: str
    num_samples: int
    num_rejected: int
    length_bytes: int
    """Of its members."""
    shards: tuple[str, ...]


def list_sessions(where: Path | str) -> list[SetSession]:
    """Every session of a set, by name; those of which nothing is in it have no shards.

    Args:
        where: the set's folder, or its URL.

    Raises:
        ShardError: the set can't be read.
        StorageError: the store can't be reached.
    """
    with open_shard_set(parse_location(where)) as source:
        return _list(source, source.read_manifest())


def _list(source: ShardSetStore, manifest: Manifest) -> list[SetSession]:
    rejected: Counter[str] = Counter()
    for line in _read_rejected(source):
        rejected[line["session"]] += count_windows([line])
    samples: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    shards: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for entry in manifest.shards:
        index = source.read_index(entry.index_file, sha256=entry.index_sha256)
        for number, name in enumerate(index.sessions):
            rows = index.arrays["session"] == number
            samples[name] += int(rows.sum())
            lengths = (a[rows] for n, a in index.arrays.items() if n.endswith(".length"))
            sizes[name] += sum(int(length.sum()) for length in lengths)
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


def drop_sessions(
    where: Path | str, names: Collection[str], *, keep_old_s: float = KEEP_OLD_S
) -> Manifest:
    """Take sessions out of a set; only their shards are written again.

    Args:
        where: the set's folder, or its URL.
        names: the sessions.
        keep_old_s: see :func:`shared.shardset.store.claim_shard_set`.

    Raises:
        ShardError: no such set or session, none would be left, or another job builds the set.
        JobError: the disk is full.
        StorageError: the store can't be read or written.
    """
    with open_shard_set(parse_location(where)) as source:
        source.read_manifest()  # whoever opens a set to write makes its folder
    with claim_shard_set(parse_location(where), keep_old_s=keep_old_s) as place:
        manifest = place.read_manifest()
        known = {s.name for s in _list(place, manifest)}
        _require_known(known, names, place)
        rest = Part(place, manifest, frozenset(known) - set(names))
        generation = manifest.generation + 1
        found = [
            _take(rest, entry, place, name=entry.name, generation=generation)
            for entry in manifest.shards
        ]
        return _finish(place, [rest], [e for e in found if e is not None], old=manifest)


def split_sessions(where: Path | str, out: Path | str, names: Collection[str]) -> Manifest:
    """Make a set of some sessions of another, which stays as it is.

    Args:
        where: the set's folder, or its URL.
        out: the new set's folder, or its URL.
        names: the sessions.

    Raises:
        ShardError: no such set or session, or there is a set already at `out`.
        JobError: the disk is full.
        StorageError: a store can't be read or written.
    """
    with open_shard_set(parse_location(where)) as source:
        manifest = source.read_manifest()
        _require_known({s.name for s in _list(source, manifest)}, names, source)
        return _assemble(out, [Part(source, manifest, frozenset(names))])


def merge_sets(out: Path | str, sets: Sequence[Path | str]) -> Manifest:
    """Make one set of several, which stay as they are; their files are linked where that can be.

    Args:
        out: the new set's folder, or its URL.
        sets: the others' folders or URLs.

    Raises:
        ShardError: no such set, two are the same one, their recipes or tokenizers differ, a session
            is in two of them, or there is a set already at `out`.
        JobError: the disk is full.
        StorageError: a store can't be read or written.
    """
    with ExitStack() as stack:
        parts = []
        for where in sets:
            source = stack.enter_context(open_shard_set(parse_location(where)))
            manifest = source.read_manifest()
            names = frozenset(s.name for s in _list(source, manifest))
            parts.append(Part(source, manifest, names))
        require_different(parts)
        require_alike(parts)
        require_apart(parts)
        return _assemble(out, parts)


def _assemble(out: Path | str, parts: Sequence[Part]) -> Manifest:
    """A new set of parts of others."""
    with open_shard_set(parse_location(out)) as there:
        if there.read(MANIFEST_FILE) is not None:
            raise ShardError(f"{there}: is a shard set already; name a new folder")
    with claim_shard_set(parse_location(out)) as place:
        entries: list[ShardEntry] = []
        numbers = dict.fromkeys(SPLITS, 0)
        for part in parts:
            for entry in part.manifest.shards:
                name = f"{entry.split}-{numbers[entry.split]:06d}"
                made = _take(part, entry, place, name=name, generation=0)
                if made is not None:
                    entries.append(made)
                    numbers[entry.split] += 1
        entries.sort(key=lambda e: (SPLITS.index(e.split), e.name))
        return _finish(place, parts, entries, old=None)


def _take(
    part: Part, entry: ShardEntry, place: ShardSetStore, *, name: str, generation: int
) -> ShardEntry | None:
    """A shard with the sessions that are taken; None where it has none of them."""
    source = part.source
    index = source.read_index(entry.index_file, sha256=entry.index_sha256)
    slices = [
        SessionWindows(session, tuple(windows)) for session, windows in index.header["slices"]
    ]
    taken = tuple(piece for piece in slices if piece.session in part.sessions)
    if not taken:
        return None
    if len(taken) < len(slices):
        task = _copy_task(entry, index, taken, name=name, generation=generation)
        given = TaskContext(
            out=place,
            recipe=part.manifest.recipe,
            tokenizer_json="",
            recordings={},
            scans={},
            old=source,
        )
        return copy_shard(task, given)
    if source is not place:
        return _link(entry, index, place, source, name=name)
    return entry


def _copy_task(
    entry: ShardEntry,
    index: ShardIndex,
    taken: tuple[SessionWindows, ...],
    *,
    name: str,
    generation: int,
) -> ShardTask:
    """The task that copies some sessions of a shard."""
    sessions = tuple(piece.session for piece in taken)
    columns = {}
    for column, entry_of_column in index.columns.items():
        rows = {session: entry_of_column["rows"][session] for session in sessions}
        columns[column] = ColumnTask(
            reason=Reason(Cause.SESSIONS_DROPPED),
            basis={**entry_of_column["basis"], "rows": fingerprint_of(list(rows.values()))},
            rows=rows,
            sources=dict.fromkeys(sessions, FromShards((entry.index_file,))),
        )
    return ShardTask(
        name=name,
        split=entry.split,
        sessions=taken,
        columns=columns,
        kept={},
        kept_index_file=None,
        generation=generation,
    )


def _link(
    entry: ShardEntry, index: ShardIndex, place: ShardSetStore, source: ShardSetStore, *, name: str
) -> ShardEntry:
    """A whole shard of another set under a new name; its columns are linked, or else copied.

    Raises:
        CorruptError: a column came from a store as other bytes than its index says.
    """
    columns = {}
    with place.staging_dir() as work:
        for column, facts in index.columns.items():
            file = f"{name}.{column}.{COLUMNS[column].suffix}"
            source.copy_to(facts["file"], work / file, sha256=facts["sha256"])
            place.put(work / file, file)
            (work / file).unlink(missing_ok=True)  # an upload leaves it
            columns[column] = {**facts, "file": file}
    facts = {**index.header, "name": name, "columns": columns}
    renamed = ShardIndex(header=facts, arrays=index.arrays)
    return _put_index(replace(entry, name=name), renamed, place, f"{name}.index")


def _put_index(entry: ShardEntry, index: ShardIndex, place: ShardSetStore, file: str) -> ShardEntry:
    """Write an index, in the newest format."""
    content = index_bytes(index)
    with place.staging_dir() as work:
        (work / file).write_bytes(content)
        place.put(work / file, file)
    return replace(entry, index_file=file, index_sha256=sha256_of_bytes(content))


def _finish(
    place: ShardSetStore,
    parts: Sequence[Part],
    entries: Sequence[ShardEntry],
    *,
    old: Manifest | None,
) -> Manifest:
    """Commit the set of these shards."""
    like = parts[0].manifest
    if not entries:
        raise ShardError(f"{place}: no sample would be left; remove the folder instead")
    tokenizer = like.load_tokenizer()
    facts = [place.read_index(entry.index_file).header for entry in entries]
    lines = _rejected_of(parts, facts)
    return commit_set(
        NewSet(
            store=place,
            recipe=like.recipe,
            shards=tuple(entries),
            headers=facts,
            generation=0 if old is None else old.generation + 1,
            tokenizer=tokenizer,
            tokenizer_file="tokenizer.json" if old is None else old.tokenizer_file,
            num_sessions=sum(len(part.sessions) for part in parts),
            rejected=lines,
            previous=old,
        )
    )


def _rejected_of(parts: Sequence[Part], facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of ``rejected.jsonl``: of the sessions that are taken by name, then the losses."""
    losses = [{"level": "stream", **loss} for found in facts for loss in found["losses"]]
    lines = [
        line
        for part in parts
        for line in _read_rejected(part.source)
        if line["session"] in part.sessions and line not in losses
    ]
    return sorted(lines, key=lambda line: str(line["session"])) + losses


def _read_rejected(source: ShardSetStore) -> list[dict[str, Any]]:
    """Lines of a set's ``rejected.jsonl``."""
    path = f"{source}/{REJECTED_FILE}"
    try:
        content = source.read(REJECTED_FILE)
        if content is None:
            raise ShardError(f"{path}: is not there; {REBUILD_HINT}")
        return [json.loads(line) for line in content.decode().split("\n") if line]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path}: can't be read: {error}; {REBUILD_HINT}") from error


def _require_known(known: Collection[str], names: Collection[str], source: ShardSetStore) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see `sessions list`"
            raise ShardError(f"{source}: no session {name!r} in this set; {hint}")
