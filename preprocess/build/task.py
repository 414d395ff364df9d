"""One task, one shard: write the columns that are due and the index in a workplace, and put each
into the set when it is finished. Pictures may come from parts that other tasks have made.

:func:`build_shard` is an ordinary function of plain values. The Dask job calls it in its workers, a
test in its own process; the bytes are the same.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from preprocess.build import statistics
from preprocess.build.reuse_reader import ColumnFileCache, ShardFieldReader, stored_statistics
from preprocess.build.shards import BuiltColumn, BuiltShard, SessionWindows, ShardTask
from preprocess.build.task_context import iter_rows, open_sessions
from preprocess.build.video_subtasks import open_encoded, remove_encoded
from preprocess.build.write import ZARR_WRITERS, Fields, Row, ShardBuilder, row_arrays, write_tar
from shared.clock import Window
from shared.errors import CorruptError, ShardError
from shared.files import fingerprint_of, sha256_of_bytes, sha256_of_file
from shared.shardset.index import ShardIndex, index_bytes, parse_index
from shared.shardset.layout import COLUMNS, presence_bits, streams_from_bits
from shared.shardset.manifest import ShardEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.build.task_context import TaskContext
    from preprocess.build.video_subtasks import EncodedVideo
    from shared.recipe import Recipe
    from shared.session.reader import SessionReader
    from shared.shardset.store import ShardSetStore


def build_shard(
    task: ShardTask, given: TaskContext, parts: Sequence[EncodedVideo] = ()
) -> ShardEntry:
    """Write what is due of one shard.

    Args:
        task: the shard.
        given: what it is made of.
        parts: what other tasks have made of it; taken over, and removed at the end.

    Returns:
        The shard's line in the manifest.

    Raises:
        SessionError: a session's folder or file went away or changed since it was scanned.
        JobError: the disk is full, or another job took over the set.
        OSError: the folder can't be written.
    """
    try:
        entry = _build_shard(task, given, parts)
    except ShardError as error:
        if parts:  # one of them is damaged or gone
            entry = build_shard(task, given)
        elif isinstance(error, CorruptError) and (any(task.copied.values()) or task.kept):
            entry = _build_shard(_distrusting(task), given, ())
        else:
            raise
    remove_encoded(parts, given)
    return entry


def _distrusting(task: ShardTask) -> ShardTask:
    """A task that reads no member of an old column."""
    unread = {name: column for name, column in task.kept.items() if name not in statistics.COLUMNS}
    due = {name: "its file is damaged" for name in task.kept if name not in unread}
    return replace(task, copied={}, kept=unread, due={**task.due, **due})


def _sources_of(task: ShardTask) -> dict[str, list[str]]:
    """Session -> the files of it that a task reads: none of columns that are kept or copied."""
    return {
        session: sorted(
            {
                source
                for name in task.due
                if session not in task.copied.get(name, {})
                for source in COLUMNS[name].sources
            }
        )
        for session in dict.fromkeys(piece.session for piece in task.slices)
    }


def _build_shard(task: ShardTask, given: TaskContext, parts: Sequence[EncodedVideo]) -> ShardEntry:
    elsewhere: dict[str, set[str]] = {}
    for part in parts:
        for name in part.sessions:
            elsewhere.setdefault(name, set()).update(COLUMNS[part.column].sources)
    rows = list(iter_rows(task.slices, given))
    with given.out.staging_dir() as work:
        with open_sessions(given, _sources_of(task), elsewhere=elsewhere) as fresh:
            builder, presence = _write_columns(task, given, work, rows, fresh, parts)
        return _write_index(task, given, work, builder, presence)


def copy_shard(task: ShardTask, given: TaskContext) -> ShardEntry:
    """Write a shard of rows of old ones, without any recording.

    Args:
        task: all of its columns are due, all of its sessions copied.
        given: needs no recordings, no scans and no tokenizer.

    Raises:
        CorruptError: an old shard is damaged.
        JobError: the disk is full, or another job took over the set.
    """
    source = given.old or given.out
    old = [source.read_index(file) for file in task.old_index_files]
    with given.out.staging_dir() as work:
        rows = list(_old_rows(task, given.recipe, old))
        builder, presence = _write_columns(task, given, work, rows, {})
        return _write_index(task, given, work, builder, presence)


def salvage_shard(
    task: ShardTask, out: ShardSetStore, sizes: Mapping[str, int]
) -> ShardEntry | ShardTask:
    """What a killed job left of a shard: its entry where it was finished, else what is still to do.

    The index that is there vouches for its columns. Those that do not fit are about to be replaced,
    so that it is cut down to the others first.

    Args:
        task: what the shard is to be.
        out: the set.
        sizes: file name -> bytes, of all files of the set.
    """
    name = task.file_name("index")
    content = out.read(name) if name in sizes else None
    if content is None:
        return task
    try:
        index = parse_index(content, origin=f"{out}/{name}")
        columns = _columns(index)
    except (ShardError, KeyError, TypeError):
        columns = {}
    wanted = {name: fingerprint_of(basis) for name, basis in task.bases.items()}
    good = {
        name: column
        for name, column in columns.items()
        if column.fingerprint == wanted.get(name) and sizes.get(column.file) == column.length_bytes
    }
    if set(good) == set(wanted) and not statistics.lacking(index.header.get("statistics", {})):
        digest = sha256_of_bytes(content)
        return _entry(task, index.num_samples, digest, good)
    if not good or not set(task.kept) <= set(good):
        out.remove(name)
        return task
    out.write(name, index_bytes(_cut(index, good)))
    due = {name: reason for name, reason in task.due.items() if name not in good}
    return replace(task, due=due, kept=good, kept_index_file=name)


def _cut(index: ShardIndex, columns: Iterable[str]) -> ShardIndex:
    """An index of some of its columns."""
    columns = set(columns)
    gone = tuple(f"{n}{mark}" for n in set(index.columns) - columns for mark in "./")
    facts = {**index.header, "columns": {n: index.columns[n] for n in sorted(columns)}}
    arrays = {n: array for n, array in index.arrays.items() if not n.startswith(gone)}
    return ShardIndex(header=facts, arrays=arrays)


def describe_shard(
    entry: ShardEntry, out: ShardSetStore, sizes: Mapping[str, int], damage: Mapping[str, str]
) -> BuiltShard:
    """A finished shard as the next plan takes it.

    Args:
        entry: its line in the manifest.
        out: the set.
        sizes: file name -> bytes, of all files of the set.
        damage: file name -> what is wrong with it, of those of the right size.

    Raises:
        CorruptError: its index is damaged or not the one that the manifest means.
    """
    index = out.read_index(entry.index_file, sha256=entry.index_sha256)
    if index.num_samples != entry.num_samples:
        raise CorruptError(f"{out}/{entry.index_file}: is not of {entry.num_samples} samples")
    facts = index.header
    columns = _columns(index)
    cut = {
        name: "its file is gone or cut"
        for name, column in columns.items()
        if sizes.get(column.file) != column.length_bytes
    }
    damaged = {n: damage[c.file] for n, c in columns.items() if c.file in damage}
    return BuiltShard(
        name=entry.name,
        split=entry.split,
        slices=tuple(
            SessionWindows(session, tuple(windows)) for session, windows in facts["slices"]
        ),
        index_file=entry.index_file,
        columns=columns,
        faults={**damaged, **cut},
        losses=frozenset((loss["session"], loss["stream"]) for loss in facts["losses"]),
        lacks_statistics=bool(statistics.lacking(facts["statistics"])),
    )


def _write_columns(
    task: ShardTask,
    given: TaskContext,
    work: Path,
    rows: Sequence[Row],
    fresh: Mapping[str, SessionReader],
    parts: Sequence[EncodedVideo] = (),
) -> tuple[ShardBuilder, NDArray[np.uint8]]:
    """Put the columns that are due into the set; returns the builder of the index and presence bits
    per row.
    """
    builder = ShardBuilder(rows=list(rows))
    presence = np.zeros(len(builder.rows), dtype=np.uint8)
    out, source = given.out, given.old or given.out
    kept = out.read_index(task.kept_index_file) if task.kept and task.kept_index_file else None
    old = {file: source.read_index(file) for file in task.old_index_files}
    for name, column in COLUMNS.items():
        mask = np.uint8(presence_bits(column.streams))
        if name in task.kept and kept is not None:
            _keep_column(builder, name, task.kept[name], kept)
            if name in statistics.lacking(builder.statistics):
                with closing(out.open_column(task.kept[name].file)) as column_file:
                    builder.statistics[name] = stored_statistics(
                        name, index=kept, column=column_file, recipe=given.recipe
                    )
            presence |= kept.arrays["present"] & mask
            continue
        file = task.file_name(f"{name}.{column.suffix}")
        path = work / file
        with ExitStack() as stack:
            readers: dict[str, Fields] = {**fresh}
            columns = stack.enter_context(ColumnFileCache(source.open_column))
            for session, files in task.copied.get(name, {}).items():
                found = [(old[f], old[f].columns[name]["file"]) for f in files]
                readers[session] = ShardFieldReader(
                    session, found=found, columns=columns, recipe=given.recipe
                )
            made = stack.enter_context(ColumnFileCache(out.open_column))
            readers.update(open_encoded(parts, name, given, made))
            if column.kind == "tar":
                presence |= write_tar(builder, name, path, readers, given.recipe)
            else:
                presence |= ZARR_WRITERS[name](builder, path, readers, given.recipe) & mask
        builder.columns[name] = BuiltColumn(
            file=file,
            length_bytes=path.stat().st_size,
            sha256=sha256_of_file(path),
            fingerprint=fingerprint_of(task.bases[name]),
            basis=task.bases[name],
            rows=task.rows[name],
        )
        out.put(path, file)
        path.unlink(missing_ok=True)  # an upload leaves it
    return builder, presence


def _columns(index: ShardIndex) -> dict[str, BuiltColumn]:
    return {name: BuiltColumn(**values) for name, values in index.columns.items()}


def _entry(
    task: ShardTask, num_samples: int, sha256: str, columns: Mapping[str, BuiltColumn]
) -> ShardEntry:
    return ShardEntry(
        name=task.name,
        split=task.split,
        num_samples=num_samples,
        length_bytes=sum(c.length_bytes for c in columns.values()),
        index_file=task.file_name("index"),
        index_sha256=sha256,
    )


def _old_rows(task: ShardTask, recipe: Recipe, old: Sequence[ShardIndex]) -> Iterator[Row]:
    """Rows of a task as old indexes describe them."""
    places = {
        (
            index.sessions[int(index.arrays["session"][row])],
            int(index.arrays["window"][row]),
        ): (index.arrays, row)
        for index in old
        for row in range(index.num_samples)
    }
    keys = [(piece.session, index) for piece in task.slices for index in piece.windows]
    for number, key in enumerate(keys):
        arrays, row = places[key]
        window = Window(key[1], float(arrays["start_s"][row]), recipe.window.duration_s)
        streams = streams_from_bits(int(arrays["present"][row]))
        yield Row(number, key[0], window, streams, arrays["coverage"][row].tolist())


def _keep_column(builder: ShardBuilder, name: str, built: BuiltColumn, old: ShardIndex) -> None:
    """Take over a column that is up to date: its entry, its member tables, its statistics."""
    builder.columns[name] = built
    for array, values in old.arrays.items():
        if array.startswith((f"{name}.", f"{name}/")):
            builder.arrays[array] = np.array(values)
    if name in old.header["statistics"]:
        builder.statistics[name] = old.header["statistics"][name]
    streams = set(COLUMNS[name].streams)
    builder.losses += [loss for loss in old.decode_failures if loss["stream"] in streams]


def _write_index(
    task: ShardTask,
    given: TaskContext,
    work: Path,
    builder: ShardBuilder,
    presence: NDArray[np.uint8],
) -> ShardEntry:
    """Put the index into the set: from here on the shard is finished."""
    sessions = [piece.session for piece in task.slices]
    arrays = {**row_arrays(builder.rows, sessions), "present": presence, **builder.arrays}
    facts = {
        "name": task.name,
        "split": task.split,
        "sessions": sessions,
        "slices": [[piece.session, list(piece.windows)] for piece in task.slices],
        "columns": {
            name: {
                "file": c.file,
                "length_bytes": c.length_bytes,
                "sha256": c.sha256,
                "fingerprint": c.fingerprint,
                "basis": dict(c.basis),
                "rows": dict(c.rows),
            }
            for name, c in builder.columns.items()
        },
        "statistics": builder.statistics,
        "losses": builder.losses,
    }
    content = index_bytes(ShardIndex(header=facts, arrays=arrays))
    name = task.file_name("index")
    (work / name).write_bytes(content)
    given.out.put(work / name, name)
    return _entry(task, len(builder.rows), sha256_of_bytes(content), builder.columns)
