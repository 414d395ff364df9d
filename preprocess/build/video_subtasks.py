"""Parts of a shard: runs of its pictures that tasks of their own decode and encode.

Nine tenths of a build go into pictures, so only their columns are divided: each eye, the sessions
of a shard, and a long session at keyframes. A part is a small shard of one column, under a
temporary name where the set is written. The shard's own task copies its members as it would copy
those of an old shard, so that the bytes do not depend on whether, and where, a column was divided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from preprocess.build.reuse_reader import ColumnFileCache, ShardFieldReader
from preprocess.build.task_context import iter_rows, open_sessions
from preprocess.build.write import ShardBuilder, row_arrays, write_tar
from shared.errors import MediaError
from shared.files import sha256_of_bytes
from shared.session.folder import VISION_FILES
from shared.shardset.index import ShardIndex, index_bytes
from shared.shardset.layout import COLUMNS
from shared.shardset.store import job_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from preprocess.build.shards import SessionWindows, ShardTask
    from preprocess.build.task_context import TaskContext
    from preprocess.build.write import Row
    from shared.recipe import Recipe
    from shared.session.reader import SessionReader
    from shared.session.scan import SessionScan

TASK_S = 120.0
"""About how many seconds of video one task decodes: some ten seconds of work at 720p. To read the
frame times of a file of half an hour costs a task half a second."""

_STREAMS = {n: c.streams[0] for n, c in COLUMNS.items() if c.streams[0] in VISION_FILES}
"""Columns that are divided, and their streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSubtask:
    """Some rows of a column of a shard: whole sessions, or a run of one session's windows."""

    name: str
    """Unique in the set."""
    column: str
    slices: tuple[SessionWindows, ...]
    """As they lie in the shard."""
    run: int = 0
    num_runs: int = 1
    """Into how many runs the only slice is divided, and which of them this is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedVideo:
    """A part that is there, under temporary names."""

    column: str
    sessions: tuple[str, ...]
    file: str
    index_file: str
    index_sha256: str


def split_task(
    task: ShardTask, scans: Mapping[str, SessionScan], recipe: Recipe, *, task_s: float
) -> tuple[VideoSubtask, ...]:
    """Parts of what a shard task decodes; none where it is no more than one task's share.

    Args:
        task: the shard.
        scans: at least its sessions.
        recipe: the recipe to build by.
        task_s: seconds of video that are one task's share.
    """
    step_s = min(recipe.window.step_s, recipe.window.duration_s)
    parts: list[VideoSubtask] = []
    total_s = 0.0
    for column, stream in _STREAMS.items():
        together: list[SessionWindows] = []
        room_s = 0.0
        for piece in task.slices if column in task.due else ():
            is_copied = piece.session in task.copied.get(column, ())
            if is_copied or stream not in scans[piece.session].intervals:
                continue
            length_s = len(piece.windows) * step_s
            total_s += length_s
            num_runs = min(math.ceil(length_s / task_s), len(piece.windows))
            if num_runs > 1:
                whole = VideoSubtask(name="", column=column, slices=(piece,), num_runs=num_runs)
                parts += [replace(whole, run=run) for run in range(num_runs)]
                continue
            if together and length_s > room_s:
                parts.append(VideoSubtask(name="", column=column, slices=tuple(together)))
                together = []
            room_s = (room_s if together else task_s) - length_s
            together.append(piece)
        if together:
            parts.append(VideoSubtask(name="", column=column, slices=tuple(together)))
    if total_s <= task_s:
        return ()
    return tuple(
        replace(part, name=f"{task.name}.{part.column}.{number}")
        for number, part in enumerate(parts)
    )


def encode_subtask(part: VideoSubtask, given: TaskContext) -> EncodedVideo:
    """Decode and encode a part, and put it beside the set.

    Raises:
        SessionError, JobError, OSError: see :func:`preprocess.build.task.build_shard`.
    """
    sources = {piece.session: COLUMNS[part.column].sources for piece in part.slices}
    with given.out.staging_dir() as work:
        path = work / "part.tar"
        with open_sessions(given, sources) as readers:
            builder = _builder(part, given, readers)
            write_tar(builder, part.column, path, readers, given.recipe)
        file = job_file(given.out, f"{part.name}.tar")
        index_file = job_file(given.out, f"{part.name}.index")
        content = index_bytes(_index(part, builder))
        (work / "part.index").write_bytes(content)
        given.out.put(path, file)
        given.out.put(work / "part.index", index_file)
    return EncodedVideo(
        column=part.column,
        sessions=tuple(sources),
        file=file,
        index_file=index_file,
        index_sha256=sha256_of_bytes(content),
    )


def open_encoded(
    parts: Sequence[EncodedVideo], column: str, given: TaskContext, columns: ColumnFileCache
) -> dict[str, ShardFieldReader]:
    """Session -> its rows of a column, of those sessions that the parts hold.

    Args:
        parts: of any columns.
        column: which.
        given: where they lie.
        columns: opens their files.

    Raises:
        ShardError: a part is damaged or not there any more.
    """
    found: dict[str, list[tuple[ShardIndex, str]]] = {}
    for part in parts:
        if part.column == column:
            index = given.out.read_index(part.index_file, sha256=part.index_sha256)
            for session in part.sessions:
                found.setdefault(session, []).append((index, part.file))
    return {
        session: ShardFieldReader(session, found=of, columns=columns, recipe=given.recipe)
        for session, of in found.items()
    }


def remove_encoded(parts: Sequence[EncodedVideo], given: TaskContext) -> None:
    """Remove parts whose shard is there."""
    for part in parts:
        given.out.remove(part.file)
        given.out.remove(part.index_file)


def _builder(
    part: VideoSubtask, given: TaskContext, readers: Mapping[str, SessionReader]
) -> ShardBuilder:
    """The rows of a part, and what its run's pictures are read among."""
    rows = list(iter_rows(part.slices, given))
    if part.num_runs == 1:
        return ShardBuilder(rows=rows)
    stream, session = _STREAMS[part.column], part.slices[0].session
    seen = [row for row in rows if stream in row.streams]
    windows = [row.window for row in seen]
    try:
        cuts = readers[session].split_into_runs(stream, windows, part.num_runs) if windows else ()
    except MediaError:
        cuts = [0, *[len(seen)] * part.num_runs]  # the first run notes the losses
    mine: list[Row] = seen[cuts[part.run] : cuts[part.run + 1]] if windows else []
    numbered = [replace(row, number=number) for number, row in enumerate(mine)]
    return ShardBuilder(rows=numbered, passes={session: windows})


def _index(part: VideoSubtask, builder: ShardBuilder) -> ShardIndex:
    """What the shard needs to know of a part, as an index of it alone."""
    sessions = [piece.session for piece in part.slices]
    return ShardIndex(
        header={"sessions": sessions, "columns": {}, "losses": builder.losses},
        arrays={**row_arrays(builder.rows, sessions), **builder.arrays},
    )
