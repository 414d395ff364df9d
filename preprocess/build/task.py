"""Write one shard: the columns that changed, then the index.

Each file is written in a staging directory and moved into the set when it is finished.
:func:`build_shard` is an ordinary function of plain values: the Dask job calls it in its workers, a
test in its own process; the bytes are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from preprocess.build.plan_types import (
    BuiltColumn,
    FromSession,
    FromShards,
    FromSubtasks,
    Row,
    built_columns,
)
from preprocess.build.reuse_reader import ColumnFileCache, ShardReader
from preprocess.build.sources import iter_rows, open_sessions
from preprocess.build.video_subtasks import remove_encoded
from preprocess.build.write import IndexBuilder, SessionEncoder, row_arrays, write_column
from shared.clock import Segment
from shared.errors import CorruptError, ShardError
from shared.files import fingerprint_of, sha256_of_bytes, sha256_of_file
from shared.shardset.index import ShardIndex, index_bytes, parse_index
from shared.shardset.layout import COLUMNS, presence_bits, streams_from_bits
from shared.shardset.manifest import ShardEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from preprocess.build.plan_types import RowSource, ShardTask
    from preprocess.build.sources import TaskContext
    from preprocess.build.video_subtasks import EncodedVideo
    from preprocess.build.write import EncodedRow, RowReader
    from shared.recipe import Recipe
    from shared.session.reader import SessionReader
    from shared.shardset.layout import Column
    from shared.shardset.store import ShardSetStore


def build_shard(
    task: ShardTask, context: TaskContext, encoded: Sequence[EncodedVideo] = ()
) -> ShardEntry:
    """Write a shard.

    If the file of a subtask is missing or corrupt, the recording is read instead; likewise if a
    shard of the previous set is corrupt.

    Args:
        task: the shard.
        context: the set, the recipe and the sessions.
        encoded: the results of the task's subtasks; their files are removed at the end.

    Returns:
        The shard's entry in the manifest.

    Raises:
        SessionError: a session's folder or file is missing or changed since it was scanned.
        JobError: the disk is full, or another job took over the set.
        OSError: the folder can't be written.
    """
    try:
        entry = _build_shard(task, context, encoded)
    except ShardError as error:
        if encoded:
            entry = build_shard(task.without(FromSubtasks), context)
        elif isinstance(error, CorruptError) and task.copied_index_files:
            entry = _build_shard(task.without(FromShards), context, ())
        else:
            raise
    remove_encoded(encoded, context)
    return entry


def _build_shard(
    task: ShardTask, context: TaskContext, encoded: Sequence[EncodedVideo]
) -> ShardEntry:
    builder = IndexBuilder(rows=list(iter_rows(task.sessions, context)), recipe=context.recipe)
    with context.out.staging_dir() as work:
        sources, encoded_files = _session_files(task)
        with open_sessions(context, sources, elsewhere=encoded_files) as recordings:
            readers = _RowReaders(context.out, recordings, {video.name: video for video in encoded})
            _write_columns(task, context=context, work=work, builder=builder, readers=readers)
        return _write_index(task, context, work, builder)


def copy_shard(task: ShardTask, context: TaskContext) -> ShardEntry:
    """Write a shard of copied rows, without any recording.

    Args:
        task: writes every column, and copies every session.
        context: needs no recordings, no scans and no tokenizer.

    Raises:
        CorruptError: a previous shard is corrupt.
        JobError: the disk is full, or another job took over the set.
    """
    source = context.old or context.out
    indexes = [source.read_index(file) for file in task.copied_index_files]
    rows = list(_stored_rows(task, context.recipe, indexes))
    builder = IndexBuilder(rows=rows, recipe=context.recipe)
    with context.out.staging_dir() as work:
        readers = _RowReaders(source)
        _write_columns(task, context=context, work=work, builder=builder, readers=readers)
        return _write_index(task, context, work, builder)


def resume_shard(
    task: ShardTask, store: ShardSetStore, sizes: Mapping[str, int]
) -> ShardEntry | ShardTask:
    """Take over what a killed job finished of a shard.

    The index that exists describes its columns. Columns that are not wanted are about to be
    replaced, so they are removed from the index first.

    Args:
        task: the shard that is wanted.
        store: the set.
        sizes: file name -> bytes, of all files of the set.

    Returns:
        The entry of the shard if it is finished, else what is still to do.
    """
    file = task.file_name("index")
    content = store.read(file) if file in sizes else None
    if content is None:
        return task
    try:
        index = parse_index(content, origin=f"{store}/{file}")
        columns = built_columns(index)
    except (ShardError, KeyError, TypeError):
        columns = {}
    expected = task.fingerprints
    finished = {
        name: column
        for name, column in columns.items()
        if column.fingerprint == expected.get(name)
        and sizes.get(column.file) == column.length_bytes
    }
    if set(finished) == set(expected):
        return _entry(task, content, finished)
    if not finished or not set(task.kept) <= set(finished):
        store.remove(file)
        return task
    store.write(file, index_bytes(_select_columns(index, finished)))
    todo = {name: column for name, column in task.columns.items() if name not in finished}
    return replace(task, columns=todo, kept=finished, kept_index_file=file)


def _select_columns(index: ShardIndex, names: Iterable[str]) -> ShardIndex:
    """Keep some columns of an index."""
    kept = set(names)
    removed = tuple(f"{name}{mark}" for name in set(index.columns) - kept for mark in "./")
    columns = {name: index.columns[name] for name in sorted(kept)}
    arrays = {name: a for name, a in index.arrays.items() if not name.startswith(removed)}
    return ShardIndex(header={**index.header, "columns": columns}, arrays=arrays)


def _session_files(task: ShardTask) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """List, per session, the files that the shard is made of, and those that subtasks read.

    Files of kept and copied rows are not read.
    """
    files: dict[str, list[str]] = {}
    encoded: dict[str, set[str]] = {}
    for session in dict.fromkeys(session_segments.session for session_segments in task.sessions):
        used = set()
        for name, column in task.columns.items():
            source = column.sources[session]
            if not isinstance(source, FromShards):
                used |= set(COLUMNS[name].sources)
            if isinstance(source, FromSubtasks):
                encoded.setdefault(session, set()).update(COLUMNS[name].sources)
        files[session] = sorted(used)
    return files, encoded


# --- columns ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _RowReaders:
    """Reads rows from the sources that a plan names."""

    store: ShardSetStore
    """Holds the shards that rows are copied from, and the files of subtasks."""
    recordings: Mapping[str, SessionReader] = field(default_factory=dict)
    encoded: Mapping[str, EncodedVideo] = field(default_factory=dict)
    indexes: dict[str, ShardIndex] = field(default_factory=dict)
    """Indexes that have been read, by file name."""

    def iter_rows(
        self, column: Column, sources: Mapping[str, RowSource], builder: IndexBuilder
    ) -> Iterator[EncodedRow]:
        """Yield the rows of a column, session by session, each from the source that is planned.

        Raises:
            ShardError: a file of a previous shard or of a subtask is missing or corrupt.
        """
        rows = builder.rows_of(column)
        with ColumnFileCache(self.store.open_column) as files:
            for session, source in sources.items():
                if isinstance(source, FromSession):
                    reader: RowReader = SessionEncoder(self.recordings[session])
                else:
                    shards = self._find_files(source, column)
                    reader = ShardReader(session, shards=shards, files=files)
                yield from reader.iter_rows(column, rows.get(session, []), builder.decode_failures)

    def _find_files(
        self, source: FromShards | FromSubtasks, column: Column
    ) -> list[tuple[ShardIndex, str]]:
        """List index and column file of each shard or subtask."""
        if isinstance(source, FromShards):
            indexes = [self._read_index(file) for file in source.index_files]
            return [(index, index.columns[column.name]["file"]) for index in indexes]
        videos = [self.encoded[name] for name in source.names]
        return [(self._read_index(v.index_file, sha256=v.index_sha256), v.file) for v in videos]

    def _read_index(self, file: str, *, sha256: str | None = None) -> ShardIndex:
        if file not in self.indexes:
            self.indexes[file] = self.store.read_index(file, sha256=sha256)
        return self.indexes[file]


def _write_columns(
    task: ShardTask,
    *,
    context: TaskContext,
    work: Path,
    builder: IndexBuilder,
    readers: _RowReaders,
) -> None:
    """Keep or write every column, and put the written files into the set."""
    kept = context.out.read_index(task.kept_index_file) if task.kept_index_file else None
    for name, column in COLUMNS.items():
        if kept is not None and name in task.kept:
            _keep_column(builder, column, task.kept[name], kept)
            continue
        todo = task.columns[name]
        file = task.file_name(f"{name}.{column.suffix}")
        path = work / file
        encoded = readers.iter_rows(column, todo.sources, builder)
        write_column(builder, column, path, encoded)
        builder.columns[name] = BuiltColumn(
            file=file,
            length_bytes=path.stat().st_size,
            sha256=sha256_of_file(path),
            fingerprint=fingerprint_of(todo.basis),
            basis=todo.basis,
            rows=todo.rows,
        )
        context.out.put(path, file)
        path.unlink(missing_ok=True)  # an upload leaves it


def _keep_column(
    builder: IndexBuilder, column: Column, built: BuiltColumn, index: ShardIndex
) -> None:
    """Take over a column that is up to date: its entry, member tables, statistics and failures."""
    name = column.name
    builder.columns[name] = built
    for array, values in index.arrays.items():
        if array.startswith((f"{name}.", f"{name}/")):
            builder.arrays[array] = np.array(values)
    if name in index.header["statistics"]:
        builder.statistics[name] = index.header["statistics"][name]
    builder.decode_failures += [
        failure for failure in index.decode_failures if failure["stream"] in column.streams
    ]
    builder.presence |= index.arrays["present"] & np.uint8(presence_bits(column.streams))


# --- index -----------------------------------------------------------------------------------


def _stored_rows(task: ShardTask, recipe: Recipe, indexes: Sequence[ShardIndex]) -> Iterator[Row]:
    """Yield the rows of a task as previous indexes describe them."""
    stored = {
        (index.sessions[int(index.arrays["session"][row])], int(index.arrays["segment"][row])): (
            index.arrays,
            row,
        )
        for index in indexes
        for row in range(index.num_samples)
    }
    keys = [
        (session_segments.session, segment)
        for session_segments in task.sessions
        for segment in session_segments.segments
    ]
    for number, (session, index) in enumerate(keys):
        arrays, row = stored[session, index]
        segment = Segment(index, float(arrays["start_s"][row]), recipe.segment.duration_s)
        present = streams_from_bits(int(arrays["present"][row]))
        yield Row(number, session, segment, present, arrays["coverage"][row].tolist())


def _write_index(
    task: ShardTask, context: TaskContext, work: Path, builder: IndexBuilder
) -> ShardEntry:
    """Put the index into the set: from here on the shard is finished."""
    sessions = [session_segments.session for session_segments in task.sessions]
    arrays = {**row_arrays(builder.rows, sessions), "present": builder.presence, **builder.arrays}
    header = {
        "name": task.name,
        "split": task.split,
        "sessions": sessions,
        "slices": [
            [session_segments.session, list(session_segments.segments)]
            for session_segments in task.sessions
        ],
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
        "losses": builder.decode_failures,
    }
    content = index_bytes(ShardIndex(header=header, arrays=arrays))
    name = task.file_name("index")
    (work / name).write_bytes(content)
    context.out.put(work / name, name)
    return _entry(task, content, builder.columns)


def _entry(task: ShardTask, index: bytes, columns: Mapping[str, BuiltColumn]) -> ShardEntry:
    """Make the manifest's entry of a shard with this index file."""
    return ShardEntry(
        name=task.name,
        split=task.split,
        num_samples=task.num_samples,
        length_bytes=sum(c.length_bytes for c in columns.values()),
        index_file=task.file_name("index"),
        index_sha256=sha256_of_bytes(index),
    )
