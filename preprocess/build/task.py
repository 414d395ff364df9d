"""Write one shard: the columns that changed, then the index.

Each file is written in a staging directory and moved into the set when it is finished.
:func:`build_shard` is an ordinary function of plain values: the Dask job calls it in its workers, a
test in its own process; the bytes are the same.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from preprocess.build import statistics
from preprocess.build.plan_types import (
    BuiltColumn,
    FromSession,
    FromShards,
    FromSubtasks,
    Row,
    built_columns,
    verdicts_of,
)
from preprocess.build.reuse_reader import ColumnFileCache, ShardReader, read_zarr_values
from preprocess.build.sources import iter_rows, open_sessions
from preprocess.build.video_subtasks import remove_encoded
from preprocess.build.write import IndexBuilder, SessionEncoder, write_column
from shared.clock import Segment
from shared.errors import CorruptError, ShardError
from shared.files import fingerprint_of, sha256_of_bytes, sha256_of_file
from shared.shardset.index import ShardIndex, index_bytes, parse_index
from shared.shardset.layout import columns_of
from shared.shardset.manifest import ShardEntry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from preprocess.build.plan_types import RowSource, ShardTask
    from preprocess.build.sources import TaskContext
    from preprocess.build.video_subtasks import EncodedVideo
    from preprocess.build.write import EncodedRow, RowReader
    from shared.kinds.column import Column
    from shared.recipe import Recipe
    from shared.session.reader import SessionReader
    from shared.shardset.store import ShardSetStore


def build_shard(
    task: ShardTask, context: TaskContext, encoded: Sequence[EncodedVideo] = ()
) -> ShardEntry:
    """Write a shard.

    If the file of a subtask is missing or corrupt, the recording is read instead; likewise if a
    shard of the previous set is corrupt. The files of `encoded`, the results of the task's
    subtasks, are removed at the end.

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
    builder = IndexBuilder(
        rows=list(iter_rows(task.sessions, context)),
        recipe=context.recipe,
        durations_s={s.session: context.scans[s.session].duration_s for s in task.sessions},
        verdicts=task.verdicts,
    )
    with context.out.staging_dir() as work:
        streams, encoded_streams = _session_streams(task, context.recipe)
        with open_sessions(context, streams, elsewhere=encoded_streams) as recordings:
            readers = _RowReaders(context.out, recordings, {video.name: video for video in encoded})
            _write_columns(task, context=context, work=work, builder=builder, readers=readers)
        return _write_index(task, context, work, builder)


def copy_shard(task: ShardTask, context: TaskContext) -> ShardEntry:
    """Write a shard of copied rows, without any recording, scan or tokenizer.

    Raises:
        CorruptError: a previous shard is corrupt.
        JobError: the disk is full, or another job took over the set.
    """
    source = context.old or context.out
    indexes = [source.read_index(file) for file in task.copied_index_files]
    durations_s = {
        name: seconds
        for index in indexes
        for name, seconds in zip(index.sessions, index.header["durations_s"], strict=True)
    }
    builder = IndexBuilder(
        rows=list(_stored_rows(task, context.recipe, indexes)),
        recipe=context.recipe,
        durations_s={stored.session: durations_s[stored.session] for stored in task.sessions},
    )
    with context.out.staging_dir() as work:
        readers = _RowReaders(source)
        _write_columns(task, context=context, work=work, builder=builder, readers=readers)
        return _write_index(task, context, work, builder)


def resume_shard(
    task: ShardTask, store: ShardSetStore, sizes: Mapping[str, int], recipe: Recipe
) -> ShardEntry | ShardTask:
    """Take over what a killed job finished of a shard; return its entry, or what is still to do.

    The index that exists describes its columns. Columns that are not wanted are about to be
    replaced, so they are removed from the index first.
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
    if not finished or not set(task.kept) <= set(finished):
        store.remove(file)
        return task
    is_current = _is_current(index, recipe) and verdicts_of(index) == task.verdicts
    if set(finished) == set(expected) == set(columns) and is_current:
        return _entry(task, content, finished)
    header = {**index.header, "columns": {name: index.columns[name] for name in sorted(finished)}}
    store.write(file, index_bytes(ShardIndex(header=header, arrays=index.arrays)))
    todo = {name: column for name, column in task.columns.items() if name not in finished}
    return replace(task, columns=todo, kept=finished, kept_index_file=file)


def _is_current(index: ShardIndex, recipe: Recipe) -> bool:
    """Return whether an index has the streams of a recipe, and their statistics."""
    return index.streams == list(recipe.streams) and all(
        statistics.has_bins(index.header["statistics"].get(name), column, recipe)
        for name, column in columns_of(recipe).items()
    )


def _session_streams(
    task: ShardTask, recipe: Recipe
) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """List, per session, the streams that the shard is made of, and those that subtasks read.

    Files of kept and copied rows are not read.
    """
    columns = columns_of(recipe)
    used: dict[str, set[str]] = {stored.session: set() for stored in task.sessions}
    encoded: dict[str, set[str]] = {}
    for name, column in task.columns.items():
        for session, source in column.sources.items():
            if not isinstance(source, FromShards):
                used[session].add(columns[name].stream)
            if isinstance(source, FromSubtasks):
                encoded.setdefault(session, set()).add(columns[name].stream)
    return used, encoded


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
    for name, column in columns_of(context.recipe).items():
        if kept is not None and name in task.kept:
            _keep_column(builder, task.kept[name], column=column, index=kept, store=context.out)
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
    builder: IndexBuilder,
    built: BuiltColumn,
    *,
    column: Column,
    index: ShardIndex,
    store: ShardSetStore,
) -> None:
    """Take over a column that is up to date: its entry, member table, statistics and failures."""
    name = column.name
    builder.columns[name] = built
    builder.add_members(column, index.members(name))
    number = index.stream_column(column.stream)
    builder.mark_present(column.stream, index.arrays["present"][:, number] > 0)
    builder.add_flags(column.stream, slice(None), index.flags[:, number])
    if column.has_time_errors:
        builder.arrays[f"{name}.error_s"] = index.arrays[f"{name}.error_s"]
        builder.decode_failures += [
            failure for failure in index.decode_failures if failure["stream"] == column.stream
        ]
    summary = index.header["statistics"].get(name)
    if not statistics.has_bins(summary, column, builder.recipe):
        with closing(store.open_column(built.file)) as file:
            values = read_zarr_values(file, index, column)
        summary = statistics.summarize(column, values, builder.recipe)
    if summary is not None:
        builder.statistics[name] = summary


def _stored_rows(task: ShardTask, recipe: Recipe, indexes: Sequence[ShardIndex]) -> Iterator[Row]:
    """Yield the rows of a task as previous indexes describe them."""
    stored = {
        (index.session(row), index.segment(row)): (index, row)
        for index in indexes
        for row in range(index.num_samples)
    }
    keys = [(s.session, segment) for s in task.sessions for segment in s.segments]
    for number, key in enumerate(keys):
        index, row = stored[key]
        segment = Segment(key[1], recipe.segment_s)
        coverage = dict(zip(index.streams, index.arrays["coverage"][row].tolist(), strict=True))
        shares = [coverage.get(name, 0.0) for name in recipe.streams]
        bits = dict(zip(index.streams, index.flags[row].tolist(), strict=True))
        flags = [bits.get(name, 0) for name in recipe.streams]
        yield Row(number, key[0], segment, index.present_streams(row), shares, flags)


def _write_index(
    task: ShardTask, context: TaskContext, work: Path, builder: IndexBuilder
) -> ShardEntry:
    """Put the index into the set: from here on the shard is finished."""
    content = index_bytes(builder.index(name=task.name, split=task.split))
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
        runs=task.runs,
        length_bytes=sum(c.length_bytes for c in columns.values()),
        index_file=task.file_name("index"),
        index_sha256=sha256_of_bytes(index),
    )
