"""Commit a new shard set: write the manifest, then delete files that it no longer references.

``rejected.jsonl`` says what the set lacks, and why. Levels: "session" (none of its segments became
a sample), "segment", "stream" (a session lacks a stream whose file exists, a sample lacks one, or a
stretch of one is masked), "lines" (lines or events of a file that could not be used), "unknown"
(names that no stream uses). Segments planned = samples + the segments of the first two.
"""

from __future__ import annotations

import itertools
import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preprocess.build import statistics
from preprocess.build.plan_types import add_generation
from shared.errors import ShardError
from shared.files import fingerprint_of
from shared.machine import pause_collector
from shared.session.names import describe_unused
from shared.shardset.layout import columns_of, field_schema
from shared.shardset.manifest import (
    MANIFEST_FILE,
    REJECTED_FILE,
    Manifest,
    ShardEntry,
    commit_manifest,
)
from shared.shardset.store import map_small_files
from shared.streams import STREAM_NAME

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from shared.media.tokenizer import TextTokenizer
    from shared.recipe import Recipe
    from shared.session.folder import SkippedFolder
    from shared.session.names import UnusedName
    from shared.session.scan import SessionScan
    from shared.shardset.store import ShardSetStore

_SET_FILE = re.compile(
    r"tokenizer(\.g\d+)?\.json|manifest\.g\d+\.json|"
    rf"(train|val)-\d{{6,}}(\.g\d+)?\.(index|{STREAM_NAME.pattern}(\.dmel)?\.(tar|zarr\.zip))"
)
"""File names that this program gives to the files of a set."""

_OLD_MANIFEST = re.compile(r"manifest\.g\d+\.json")
"""File names of replaced manifests. Each is kept until no reader can use its set any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSet:
    """A set whose shards are finished, ready to commit."""

    store: ShardSetStore
    recipe: Recipe
    shards: tuple[ShardEntry, ...]
    """Shards, in the order of the set."""
    headers: Sequence[Mapping[str, Any]]
    """The header of each shard's index."""
    generation: int
    """Builds that changed something."""
    tokenizer: TextTokenizer
    tokenizer_file: str
    num_sessions: int
    """Sessions, including sessions without a sample."""
    rejected: Sequence[Mapping[str, Any]]
    """Lines of ``rejected.jsonl``."""
    previous: Manifest | None
    """The manifest that is replaced."""
    fingerprint: str | None = None
    """The fingerprint of the previous set if the samples are the same, so that runs that read it
    can resume; None computes it from the shards."""
    files: Mapping[str, int] | None = None
    """File name -> bytes, of the set's files when the job began; None if they must be listed."""


def commit_set(new: NewSet) -> Manifest:
    """Publish the new set, and delete files that it no longer references."""
    manifest = make_manifest(new)
    files = new.store.list_sizes() if new.files is None else new.files
    retained = write_set_files(new, manifest, files)
    delete_unreferenced(new, manifest, {*files, *retained})
    return manifest


def make_manifest(new: NewSet) -> Manifest:
    """Make the manifest of a set."""
    num_samples = sum(entry.num_samples for entry in new.shards)
    num_rejected = count_segments(new.rejected)
    train = [
        (entry.num_samples, header["statistics"])
        for entry, header in zip(new.shards, new.headers, strict=True)
        if entry.split == "train"
    ]
    return Manifest(
        root=new.store.root,
        recipe=new.recipe,
        shards=new.shards,
        generation=new.generation,
        tokenizer_file=new.tokenizer_file,
        tokenizer_sha256=new.tokenizer.sha256,
        fields=field_schema(new.recipe),
        statistics=statistics.merge(
            [summaries for _, summaries in train],
            columns_of(new.recipe).values(),
            num_samples=sum(count for count, _ in train),
        ),
        counts={
            "sessions": new.num_sessions,
            "segments_planned": num_samples + num_rejected,
            "samples": num_samples,
            "segments_rejected": num_rejected,
        },
        fingerprint=new.fingerprint
        or fingerprint_of(
            [[s.name, s.split, s.num_samples, s.index_sha256] for s in new.shards],
            new.tokenizer.sha256,
        ),
    )


def write_set_files(new: NewSet, manifest: Manifest, files: Mapping[str, int]) -> list[str]:
    """Write those small files of a set that changed; the manifest last.

    `files` has the size of each file that exists.

    Returns:
        The name under which the old manifest is kept, if it is.
    """
    store, previous = new.store, new.previous
    for name, content in (
        (new.tokenizer_file, new.tokenizer.json.encode()),
        (REJECTED_FILE, to_jsonl(new.rejected)),
    ):
        if files.get(name) != len(content) or store.read(name) != content:
            store.write(name, content)
    if previous is not None and replace(previous, root=store.root) == manifest:
        return []
    retained = []
    if previous is not None:
        name = add_generation(MANIFEST_FILE, previous.generation)
        is_extended = _files_named(previous) <= _files_named(manifest)
        retained = [name] if store.retain_manifest(name, is_extended=is_extended) else []
    commit_manifest(manifest, write=store.write)
    return retained


def delete_unreferenced(new: NewSet, manifest: Manifest, files: Collection[str]) -> None:
    """Delete those of the set's files that are of earlier sets and of killed jobs.

    Files with names that this program does not give stay. Files of a replaced set stay while
    someone reads them, or in an object store may still read them.
    """
    store = new.store
    needed = _files_named(manifest)
    needed |= {column["file"] for header in new.headers for column in header["columns"].values()}
    names = sorted(files)
    for name in filter(_OLD_MANIFEST.fullmatch, names):
        if store.has_readers(name):
            needed |= {name, *_files_of(name, store, known=needed)}
    tokenizer = manifest.recipe.text.tokenizer
    for name in names:
        if name in needed or not _SET_FILE.fullmatch(name):
            continue
        # The recipe's tokenizer may be a file in the folder of the set.
        path = manifest.root / name
        is_input = (
            tokenizer is not None
            and tokenizer.exists()
            and path.exists()
            and path.samefile(tokenizer)
        )
        if not is_input:
            store.remove(name)


def _files_named(manifest: Manifest) -> set[str]:
    """List the files that a manifest names; the indexes name the others."""
    return {manifest.tokenizer_file, *(entry.index_file for entry in manifest.shards)}


def _files_of(name: str, store: ShardSetStore, *, known: Collection[str]) -> set[str]:
    """List the files that a replaced manifest references besides the `known` ones.

    Of a damaged set, as far as possible. An index is known only if its columns are.
    """
    files, indexes = set[str](), set[str]()
    with suppress(ShardError, ValueError, KeyError, TypeError):
        values = json.loads(store.read(name) or b"{}")
        files.add(values["tokenizer"]["file"])
        indexes.update(shard["index_file"] for shard in values["shards"])
        indexes.difference_update(known)

    def columns_of_index(file: str) -> list[str]:
        with suppress(ShardError, KeyError, TypeError):
            return [column["file"] for column in store.read_index(file).columns.values()]
        return []

    columns = map_small_files(store, columns_of_index, indexes)
    return {*files, *indexes, *itertools.chain.from_iterable(columns)}


@pause_collector()
def rejected_lines(
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
    failures: Iterable[Mapping[str, Any]],
    *,
    unused: Mapping[str, Sequence[UnusedName]],
    skipped: Iterable[SkippedFolder] = (),
) -> list[dict[str, Any]]:
    """List what the set lacks, by session name, then the decode failures of the indexes."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for folder in skipped:
        line = {"session": folder.name, "reason": folder.reason}
        if folder.is_recording:
            lines[folder.name] = [{"level": "session", **line, "segments": 0}]
        else:
            lines[folder.name] = [{"level": "unknown", **line}]
    for name, scan in scans.items():
        sentences, others = describe_unused(unused.get(name, ()))
        unknown = [*sentences.values(), *([others] if others else [])]
        lines[name] = [{"level": "unknown", "session": name, "reason": text} for text in unknown]
        lines[name] += _session_lines(scan, recipe)
    ordered = [line for name in sorted(lines) for line in lines[name]]
    return ordered + [{"level": "stream", **failure} for failure in failures]


def count_segments(lines: Iterable[Mapping[str, Any]]) -> int:
    """Count the segments that the lines reject."""
    return sum(
        {"session": line.get("segments", 0), "segment": 1}.get(line["level"], 0) for line in lines
    )


def to_jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """Format lines of JSON."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _session_lines(scan: SessionScan, recipe: Recipe) -> Iterator[dict[str, Any]]:
    # What was skipped in files, or why none of the segments is a sample.
    session = {"session": scan.session}
    for sentence in scan.issues:
        yield {"level": "lines", **session, "reason": sentence}
    for stream, sentence in scan.slow.items():
        yield {"level": "lines", **session, "stream": stream, "reason": sentence}
    reason = scan.session_rejection(recipe)
    if reason is not None:
        yield {"level": "session", **session, "segments": scan.num_segments, "reason": reason}
    for stream, cause in scan.absent.items():
        is_recorded = stream not in scan.not_recorded
        is_recorded |= recipe.streams[stream].file in scan.source_files
        if is_recorded and cause not in (reason or ""):
            yield {"level": "stream", **session, "stream": stream, "reason": cause}
    if reason is not None:
        return
    yield from _stretch_lines(scan, recipe)
    for number, reason in scan.rejections(recipe).items():
        times = {"start_s": number * recipe.segment_s, "stop_s": (number + 1) * recipe.segment_s}
        yield {"level": "segment", **session, "segment": number, **times, "reason": reason}


def _stretch_lines(scan: SessionScan, recipe: Recipe) -> Iterator[dict[str, Any]]:
    # What is masked, and runs of stored segments that lack a stream of the session completely.
    session = {"session": scan.session}
    for stream, spans in scan.masked.items():
        for span in spans:
            times = {"start_s": span.start_s, "stop_s": span.stop_s, "mask": span.reason.value}
            yield {"level": "stream", **session, "stream": stream, **times, "reason": span.message}
    incomplete = {name: shares for name, shares in scan.coverage.items() if not all(shares)}
    stored = scan.stored_segments(recipe) if incomplete else ()
    for stream, shares in incomplete.items():
        gaps = [segment for segment in stored if not shares[segment]]
        for _, run in itertools.groupby(enumerate(gaps), key=lambda item: item[1] - item[0]):
            segments = [segment for _, segment in run]
            start_s, stop_s = segments[0] * recipe.segment_s, (segments[-1] + 1) * recipe.segment_s
            masks = scan.describe_masks(stream, start_s, stop_s)
            yield {
                "level": "stream",
                "session": scan.session,
                "stream": stream,
                "segment": segments[0],
                "start_s": start_s,
                "stop_s": stop_s,
                "reason": f"covers none of [{start_s:g}, {stop_s:g}) s{masks}",
            }
