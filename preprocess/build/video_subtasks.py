"""Split the video of a shard into subtasks, which decode and encode it in parallel.

Nine tenths of a build are video, so only video columns are split: each camera, the sessions of a
shard, and a long session at keyframes. A subtask writes a small shard of one column under a
temporary name. The shard's own task copies its members as it copies members of a previous shard, so
the bytes do not depend on whether and where a column was split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from preprocess.build.plan_types import FromSession, FromSubtasks
from preprocess.build.sources import iter_rows, open_sessions
from preprocess.build.write import IndexBuilder, SessionEncoder, write_column
from shared.errors import MediaError
from shared.files import sha256_of_bytes
from shared.shardset.index import index_bytes
from shared.shardset.layout import columns_of
from shared.shardset.store import job_file
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from preprocess.build.plan_types import Row, SessionSegments, ShardTask
    from preprocess.build.sources import TaskContext
    from preprocess.build.write import EncodedRow
    from shared.clock import Segment
    from shared.recipe import Recipe
    from shared.session.reader import SessionReader
    from shared.session.scan import SessionScan

TASK_S = 120.0
"""Seconds of video that one task decodes: about ten seconds of work at 720p. Reading the frame
times of a file of half an hour costs each task half a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSubtask:
    """Rows of one video column of a shard: whole sessions, or a run of one session's segments."""

    name: str
    """Unique in the set."""
    column: str
    sessions: tuple[SessionSegments, ...]
    run: int = 0
    """Which run this is."""
    num_runs: int = 1
    """Runs that the only session is split into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedVideo:
    """The result of a subtask, stored under temporary names."""

    name: str
    """Name of the subtask."""
    file: str
    index_file: str
    index_sha256: str


def split_task(
    task: ShardTask, scans: Mapping[str, SessionScan], recipe: Recipe, *, task_s: float
) -> tuple[ShardTask, tuple[VideoSubtask, ...]]:
    """Split the video that a task decodes into subtasks of about `task_s`.

    A task of at most `task_s` stays whole. Returns the task, with the subtasks as sources of their
    rows, and the subtasks.
    """
    subtasks: list[VideoSubtask] = []
    total_s = 0.0
    for column in recipe.of_kind(Kind.VIDEO):
        decoded = [
            stored
            for stored in task.sessions
            if column in task.columns
            and isinstance(task.columns[column].sources[stored.session], FromSession)
            and column in scans[stored.session].intervals
        ]
        subtasks += _split_column(column, decoded, segment_s=recipe.segment_s, task_s=task_s)
        total_s += sum(len(stored.segments) * recipe.segment_s for stored in decoded)
    if total_s <= task_s:
        return task, ()
    named = tuple(
        replace(subtask, name=f"{task.name}.{subtask.column}.{number}")
        for number, subtask in enumerate(subtasks)
    )
    names: dict[tuple[str, str], tuple[str, ...]] = {}
    for subtask in named:
        for stored in subtask.sessions:
            key = subtask.column, stored.session
            names[key] = (*names.get(key, ()), subtask.name)
    columns = dict(task.columns)
    for (column, session), files in names.items():
        sources = {**columns[column].sources, session: FromSubtasks(files)}
        columns[column] = replace(columns[column], sources=sources)
    return replace(task, columns=columns), named


def _split_column(
    column: str, sessions: Iterable[SessionSegments], *, segment_s: float, task_s: float
) -> list[VideoSubtask]:
    """Split long sessions into runs, and group consecutive short ones; without names."""
    subtasks: list[VideoSubtask] = []
    group: list[SessionSegments] = []
    free_s = 0.0
    for stored in sessions:
        duration_s = len(stored.segments) * segment_s
        num_runs = min(math.ceil(duration_s / task_s), len(stored.segments))
        if num_runs > 1:
            whole = VideoSubtask(name="", column=column, sessions=(stored,), num_runs=num_runs)
            subtasks += [replace(whole, run=run) for run in range(num_runs)]
            continue
        if group and duration_s > free_s:
            subtasks.append(VideoSubtask(name="", column=column, sessions=tuple(group)))
            group = []
        free_s = (free_s if group else task_s) - duration_s
        group.append(stored)
    if group:
        subtasks.append(VideoSubtask(name="", column=column, sessions=tuple(group)))
    return subtasks


def encode_video(subtask: VideoSubtask, context: TaskContext) -> EncodedVideo:
    """Decode and encode the rows of a subtask, and put them next to the set.

    Raises:
        SessionError, JobError, OSError: see :func:`preprocess.build.task.build_shard`.
    """
    streams = {stored.session: {subtask.column} for stored in subtask.sessions}
    with context.out.staging_dir() as work:
        path = work / "subtask.tar"
        with open_sessions(context, streams, elsewhere={}) as readers:
            rows, decode_context = _select_rows(subtask, context, readers)
            durations_s = {name: context.scans[name].duration_s for name in readers}
            builder = IndexBuilder(rows=rows, recipe=context.recipe, durations_s=durations_s)
            column = columns_of(context.recipe)[subtask.column]
            write_column(
                builder, column, path, _iter_encoded(subtask, builder, readers, decode_context)
            )
        file = job_file(context.out, f"{subtask.name}.tar")
        index_file = job_file(context.out, f"{subtask.name}.index")
        content = index_bytes(builder.index(name=subtask.name, split=""))
        (work / "subtask.index").write_bytes(content)
        context.out.put(path, file)
        context.out.put(work / "subtask.index", index_file)
    return EncodedVideo(
        name=subtask.name, file=file, index_file=index_file, index_sha256=sha256_of_bytes(content)
    )


def remove_encoded(encoded: Iterable[EncodedVideo], context: TaskContext) -> None:
    """Remove the files of subtasks whose shard is finished."""
    for video in encoded:
        context.out.remove(video.file)
        context.out.remove(video.index_file)


def _select_rows(
    subtask: VideoSubtask, context: TaskContext, readers: Mapping[str, SessionReader]
) -> tuple[list[Row], list[Segment] | None]:
    """Select a subtask's rows, and the segments of the whole pass if it is one run of several."""
    rows = list(iter_rows(subtask.sessions, context))
    if subtask.num_runs == 1:
        return rows, None
    rows = [row for row in rows if subtask.column in row.present]
    segments = [row.segment for row in rows]
    if not rows:
        return [], segments
    reader = readers[subtask.sessions[0].session]
    try:
        cuts = reader.split_into_runs(subtask.column, segments, subtask.num_runs)
    except MediaError:
        # The video does not open: the first run reports every segment.
        cuts = [0, *[len(rows)] * subtask.num_runs]
    run_rows = rows[cuts[subtask.run] : cuts[subtask.run + 1]]
    return [replace(row, number=number) for number, row in enumerate(run_rows)], segments


def _iter_encoded(
    subtask: VideoSubtask,
    builder: IndexBuilder,
    readers: Mapping[str, SessionReader],
    decode_context: list[Segment] | None,
) -> Iterator[EncodedRow]:
    column = columns_of(builder.recipe)[subtask.column]
    rows = builder.rows_of(column)
    for stored in subtask.sessions:
        encoder = SessionEncoder(readers[stored.session], decode_context=decode_context)
        session_rows = rows.get(stored.session, [])
        yield from encoder.iter_rows(column, session_rows, builder.decode_failures)
