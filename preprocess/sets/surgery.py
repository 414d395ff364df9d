"""Sessions of finished shard sets: list, drop, split and merge them, without recordings and without
decoding. Members are copied as they are, or whole files linked.

What is left of a set is what a build of the remaining sessions would keep: their fingerprints stay,
so that the next build has nothing to do for them. Only shards of format 1 that lose some of their
sessions are made again by it, for that format has no hashes of single sessions.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preprocess.building.build import copy_shard
from preprocess.building.commit import commit, make_manifest, sweep
from preprocess.building.inputs import BuildInput
from preprocess.building.places import LocalSet, open_set
from preprocess.building.plan import ShardTask, Slice, setting_changes, versioned
from preprocess.building.rejected import count_windows
from shared.errors import ShardError
from shared.index import ShardIndex, index_bytes, open_index
from shared.layout import COLUMNS
from shared.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    REJECTED_FILE,
    Manifest,
    ShardEntry,
    fingerprint_of,
    read_manifest,
)
from shared.recipe import SPLITS, json_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from preprocess.building.places import SetPlace
    from shared.recipe import Recipe


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


def list_sessions(root: Path) -> list[SetSession]:
    """Every session of a set, by name; those of which nothing is in it have no shards.

    Raises:
        ShardError: the set can't be read.
    """
    return _list(read_manifest(root))


def _list(manifest: Manifest) -> list[SetSession]:
    rejected: Counter[str] = Counter()
    for line in _read_rejected(manifest.root):
        rejected[line["session"]] += count_windows([line])
    samples: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    shards: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for entry in manifest.shards:
        index = open_index(manifest.root / entry.index_file, sha256=entry.index_sha256)
        for number, name in enumerate(index.facts["sessions"]):
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


def drop_sessions(root: Path, names: Collection[str]) -> Manifest:
    """Take sessions out of a set; only their shards are written again.

    Raises:
        ShardError: no such session, none would be left, or another job builds the set.
        JobError: the disk is full.
    """
    with open_set(root) as place:
        manifest = place.read_manifest()
        sessions = _list(manifest)
        _require_known(sessions, names, root)
        rest = _Part(manifest, frozenset(s.name for s in sessions) - set(names))
        generation = manifest.generation + 1
        found = [
            _take(rest, entry, place, place, name=entry.name, generation=generation)
            for entry in manifest.shards
        ]
        return _finish(place, [rest], [e for e in found if e is not None], old=manifest)


def split_sessions(root: Path, out: Path, names: Collection[str]) -> Manifest:
    """Make a set of some sessions of another, which stays as it is.

    Raises:
        ShardError: no such session, or there is a set already at `out`.
        JobError: the disk is full.
    """
    manifest = read_manifest(root)
    _require_known(_list(manifest), names, root)
    return _assemble(out, [_Part(manifest, frozenset(names))])


def merge_sets(out: Path, roots: Sequence[Path]) -> Manifest:
    """Make one set of several, which stay as they are; their files are linked where that can be.

    Raises:
        ShardError: their recipes or tokenizers differ, a session is in two of them, or there is a
            set already at `out`.
        JobError: the disk is full.
    """
    manifests = [read_manifest(root) for root in roots]
    _require_alike(manifests)
    parts = [_Part(m, frozenset(s.name for s in _list(m))) for m in manifests]
    homes: dict[str, Path] = {}
    for part in parts:
        for name in part.sessions:
            root = part.manifest.root
            if homes.setdefault(name, root) != root:
                raise ShardError(
                    f"session {name} is in {homes[name]} and in {root}; drop it from one: "
                    f"python -m preprocess sessions drop {root} {name}"
                )
    return _assemble(out, parts)


@dataclass(frozen=True, slots=True)
class _Part:
    """A set, and which of its sessions are taken."""

    manifest: Manifest
    sessions: frozenset[str]


def _assemble(out: Path, parts: Sequence[_Part]) -> Manifest:
    """A new set of parts of others."""
    if (out / MANIFEST_FILE).exists():
        raise ShardError(f"{out}: is a shard set already; name a new folder")
    with open_set(out) as place:
        entries: list[ShardEntry] = []
        numbers = dict.fromkeys(SPLITS, 0)
        for part in parts:
            source = LocalSet(part.manifest.root.absolute(), "")
            for entry in part.manifest.shards:
                name = f"{entry.split}-{numbers[entry.split]:06d}"
                made = _take(part, entry, place, source, name=name, generation=0)
                if made is not None:
                    entries.append(made)
                    numbers[entry.split] += 1
        entries.sort(key=lambda e: (SPLITS.index(e.split), e.name))
        return _finish(place, parts, entries, old=None)


def _take(
    part: _Part, entry: ShardEntry, place: SetPlace, source: SetPlace, *, name: str, generation: int
) -> ShardEntry | None:
    """A shard with the sessions that are taken; None where it has none of them."""
    index = source.read_index(entry.index_file, sha256=entry.index_sha256)
    slices = [Slice(session, tuple(windows)) for session, windows in index.facts["slices"]]
    taken = tuple(piece for piece in slices if piece.session in part.sessions)
    if not taken:
        return None
    if len(taken) < len(slices):
        task = _copy_task(entry, index, taken, name=name, generation=generation)
        given = BuildInput(
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
    if part.manifest.format_version == FORMAT_VERSION:
        return entry
    return _put_index(entry, index, place, versioned(f"{name}.index", generation))


def _copy_task(
    entry: ShardEntry,
    index: ShardIndex,
    taken: tuple[Slice, ...],
    *,
    name: str,
    generation: int,
) -> ShardTask:
    """The task that copies some sessions of a shard."""
    sessions = tuple(piece.session for piece in taken)
    rows: dict[str, dict[str, str]] = {}
    bases: dict[str, dict[str, Any]] = {}
    for column, facts in index.facts["columns"].items():
        hashes = facts["rows"]
        rows[column] = {s: hashes[s] for s in sessions if s in hashes}
        bases[column] = {**facts["basis"], "rows": fingerprint_of(list(rows[column].values()))}
    return ShardTask(
        name=name,
        split=entry.split,
        slices=taken,
        due=dict.fromkeys(COLUMNS, "some of its sessions go"),
        bases=bases,
        rows=rows,
        kept={},
        kept_index_file=None,
        copied=dict.fromkeys(COLUMNS, sessions),
        old_index_file=entry.index_file,
        generation=generation,
    )


def _link(
    entry: ShardEntry, index: ShardIndex, place: SetPlace, source: SetPlace, *, name: str
) -> ShardEntry:
    """A whole shard of another set under a new name; its columns are linked, or else copied."""
    columns = {}
    with place.workplace() as work:
        for column, facts in index.facts["columns"].items():
            file = f"{name}.{column}.{COLUMNS[column].suffix}"
            _link_or_copy(source.root / facts["file"], work / file)
            place.put(work / file, file)
            columns[column] = {**facts, "file": file}
    facts = {**index.facts, "name": name, "columns": columns}
    renamed = ShardIndex(facts=facts, arrays=index.arrays)
    return _put_index(replace(entry, name=name), renamed, place, f"{name}.index")


def _put_index(entry: ShardEntry, index: ShardIndex, place: SetPlace, file: str) -> ShardEntry:
    """Write an index, in the newest format."""
    content = index_bytes(index)
    with place.workplace() as work:
        (work / file).write_bytes(content)
        place.put(work / file, file)
    return replace(entry, index_file=file, index_sha256=hashlib.sha256(content).hexdigest())


def _link_or_copy(path: Path, new: Path) -> None:
    try:
        new.hardlink_to(path)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(path, new)


def _finish(
    place: SetPlace, parts: Sequence[_Part], entries: Sequence[ShardEntry], *, old: Manifest | None
) -> Manifest:
    """Commit the set of these shards."""
    like = parts[0].manifest
    if not entries:
        raise ShardError(f"{place}: no sample would be left; remove the folder instead")
    tokenizer = like.load_tokenizer()
    facts = [place.read_index(entry.index_file).facts for entry in entries]
    lines = _rejected_of(parts, facts)
    manifest = make_manifest(
        place,
        tuple(entries),
        facts,
        recipe=like.recipe,
        generation=0 if old is None else old.generation + 1,
        tokenizer_file="tokenizer.json" if old is None else old.tokenizer_file,
        tokenizer_sha256=tokenizer.sha256,
        num_sessions=sum(len(part.sessions) for part in parts),
        num_planned=sum(entry.num_samples for entry in entries) + count_windows(lines),
        num_rejected=count_windows(lines),
    )
    commit(manifest, place, old=old, tokenizer_json=tokenizer.json, rejected=lines)
    sweep(manifest, place, facts)
    return manifest


def _rejected_of(
    parts: Sequence[_Part], facts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Lines of ``rejected.jsonl``: of the sessions that are taken by name, then the losses."""
    losses = [{"level": "stream", **loss} for found in facts for loss in found["losses"]]
    lines = [
        line
        for part in parts
        for line in _read_rejected(part.manifest.root)
        if line["session"] in part.sessions and line not in losses
    ]
    return sorted(lines, key=lambda line: str(line["session"])) + losses


def _read_rejected(root: Path) -> list[dict[str, Any]]:
    """Lines of a set's ``rejected.jsonl``."""
    try:
        lines = (root / REJECTED_FILE).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise ShardError(
            f"{root / REJECTED_FILE}: can't be read: {error}; rebuild by `make shards`"
        ) from error


def _require_known(sessions: Iterable[SetSession], names: Collection[str], root: Path) -> None:
    known = [session.name for session in sessions]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see `sessions list`"
            raise ShardError(f"{root}: no session {name!r} in this set; {hint}")


def _require_alike(manifests: Sequence[Manifest]) -> None:
    """Sets whose columns are made in the same way, with the same tokenizer."""
    first = manifests[0]
    for other in manifests[1:]:
        changes = setting_changes(_settings(first.recipe), _settings(other.recipe))
        if changes:
            raise ShardError(
                f"{first.root} and {other.root} are made by different recipes: "
                f"{'; '.join(changes)}; build both by one recipe"
            )
        if first.tokenizer_sha256 != other.tokenizer_sha256:
            raise ShardError(
                f"{first.root} and {other.root} have different tokenizers; build the second with "
                f"text.tokenizer: {first.root / first.tokenizer_file}"
            )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Keys of a recipe that decide what the samples of a set are."""
    sections = {k: v for k, v in json_of(recipe).items() if k not in ("shard", "text")}
    required = sections.pop("required")
    flat = {f"{s}.{key}": value for s, keys in sections.items() for key, value in keys.items()}
    return {"required": required, **flat}
