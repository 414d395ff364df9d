"""Values of a build: rows, shards that exist, shards to write, and the plan.

All other build modules import this one. The values are plain: they cross processes, and tests make
them by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.files import fingerprint_of
from shared.shardset.index import MASK_BITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shared.clock import Segment
    from shared.recipe import Recipe, Split
    from shared.shardset.index import ShardIndex
    from shared.shardset.manifest import ShardEntry


@dataclass(frozen=True, slots=True)
class SessionSegments:
    """Segments of one session that one shard holds."""

    session: str
    segments: tuple[int, ...]


def runs_of(sessions: Iterable[SessionSegments]) -> tuple[int, ...]:
    """Return the length of each run of a shard: of each sequence of consecutive segments."""
    return tuple(
        sum(1 for _ in run)
        for stored in sessions
        for _, run in groupby(enumerate(stored.segments), key=lambda item: item[1] - item[0])
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of a shard: a segment of a session."""

    number: int
    """Its position in the shard."""
    session: str
    segment: Segment
    present: tuple[str, ...]
    """Streams with at least one valid sample."""
    coverage: Sequence[float]
    """Share of the segment that each declared stream covers, in order of the names."""
    flags: Sequence[int] = ()
    """Why content of each declared stream is masked, as in the index; empty means nothing is."""

    @property
    def key(self) -> str:
        """SESSION/SEGMENT."""
        return f"{self.session}/{self.segment.index:06d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltColumn:
    """A finished column file, as the index of its shard describes it."""

    file: str
    length_bytes: int
    sha256: str
    fingerprint: str
    basis: Mapping[str, Any]
    """What the column depends on; its hash is the fingerprint."""
    rows: Mapping[str, str]
    """Session -> hash of its rows and of what the column takes from the session. Rows whose hash
    is the same in a new column are copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltShard:
    """A finished shard, as the previous manifest and its index describe it."""

    name: str
    split: Split
    sessions: tuple[SessionSegments, ...]
    index_file: str
    columns: Mapping[str, BuiltColumn]
    faults: Mapping[str, Cause] = field(default_factory=dict)
    """Column name -> what is wrong with its file."""
    verdicts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """See :func:`verdicts_of`."""
    decode_failures: frozenset[tuple[str, str]] = frozenset()
    """(session, stream) pairs in which at least one segment did not decode."""
    is_refreshed: bool = False
    """Whether its index is written again, because it has hashes of an older format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousSet:
    """The shard set that a build updates."""

    recipe: Recipe
    generation: int
    shards: tuple[BuiltShard, ...]
    lost: tuple[ShardEntry, ...] = ()
    """Shards whose index cannot be read."""
    headers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The headers of the indexes, by file name."""


def built_columns(index: ShardIndex) -> dict[str, BuiltColumn]:
    """Read the columns of a shard from its index, by name."""
    return {name: BuiltColumn(**values) for name, values in index.columns.items()}


def sessions_of(index: ShardIndex) -> tuple[SessionSegments, ...]:
    """Read what a shard holds from its index, in row order."""
    return tuple(SessionSegments(name, tuple(numbers)) for name, numbers in index.segments)


def verdicts_of(index: ShardIndex) -> dict[str, dict[str, int]]:
    """Read the bits of verdicts from an index: session -> stream -> bits, without zeros."""
    bits = index.flags & ~np.uint8(MASK_BITS)
    if not bits.any():
        return {}
    numbers, first_rows = np.unique(index.arrays["session"], return_index=True)
    return {
        index.sessions[number]: {name: b for name, b in zip(index.streams, row, strict=True) if b}
        for number, row in zip(numbers.tolist(), bits[first_rows].tolist(), strict=True)
        if any(row)
    }


class Cause(StrEnum):
    """Why a column is written; the values are display text."""

    NEW = "new"
    REPACKED = "repacked"
    SETTINGS_CHANGED = "its settings changed"
    SESSIONS_CHANGED = "its sessions changed"
    SESSIONS_DROPPED = "some of its sessions are dropped"
    FILE_MISSING = "its file is missing or truncated"
    FILE_CORRUPT = "its bytes differ from their checksum"
    INDEX_LOST = "its index is missing or corrupt"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a column is written, and which changed settings of the recipe say so."""

    cause: Cause
    settings: tuple[str, ...] = ()
    """``key old -> new`` of each setting that changed."""

    def __str__(self) -> str:
        return "; ".join(self.settings) or self.cause.value


@dataclass(frozen=True, slots=True)
class FromSession:
    """Rows are decoded from the session's recording and encoded."""


@dataclass(frozen=True, slots=True)
class FromShards:
    """Rows are copied from shards of the previous set."""

    index_files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FromSubtasks:
    """Rows are copied from the files of subtasks that encode them first."""

    names: tuple[str, ...]


RowSource = FromSession | FromShards | FromSubtasks
"""Where the rows of one session in one column come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Sessions that differ from those of the previous set."""

    new: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: Mapping[str, str] = field(default_factory=dict)
    """Session -> what changed, as display text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnTask:
    """A column to write: why, what it depends on, and where its rows come from."""

    reason: Reason
    basis: Mapping[str, Any]
    """See :class:`BuiltColumn`."""
    rows: Mapping[str, str]
    """See :class:`BuiltColumn`."""
    sources: Mapping[str, RowSource]
    """Session -> where its rows come from; sessions in the order of the shard."""
    changes: Changes = Changes()
    """Sessions that cause the write, or that changed besides."""
    is_repair: bool = False
    """Whether only the file is damaged: the samples stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One shard to write: the columns to write, and the columns to keep."""

    name: str
    split: Split
    sessions: tuple[SessionSegments, ...]
    columns: Mapping[str, ColumnTask]
    kept: Mapping[str, BuiltColumn]
    kept_index_file: str | None
    """Index of the previous set that describes the kept columns."""
    generation: int
    removed: tuple[str, ...] = ()
    """Columns of the previous shard whose stream is not declared any more."""
    recounted: tuple[str, ...] = ()
    """Kept columns whose statistics get other bins."""
    verdicts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of its sessions that were validated: see :func:`verdicts_of`."""
    has_new_verdicts: bool = False
    """Whether the index of the previous shard has others."""

    @property
    def num_samples(self) -> int:
        """Rows of the shard."""
        return sum(len(stored.segments) for stored in self.sessions)

    @property
    def runs(self) -> tuple[int, ...]:
        """Length of each run of the shard."""
        return runs_of(self.sessions)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint that each column of the finished shard has."""
        kept = {name: column.fingerprint for name, column in self.kept.items()}
        return kept | {name: fingerprint_of(c.basis) for name, c in self.columns.items()}

    @property
    def copied_index_files(self) -> tuple[str, ...]:
        """Indexes of the previous shards from which rows are copied."""
        sources = (s for column in self.columns.values() for s in column.sources.values())
        files = (f for s in sources if isinstance(s, FromShards) for f in s.index_files)
        return tuple(dict.fromkeys(files))

    def without(self, kind: type[FromShards | FromSubtasks]) -> ShardTask:
        """Return the task with the sessions' recordings in place of one kind of source."""
        columns = {}
        for name, column in self.columns.items():
            sources = {
                session: FromSession() if isinstance(source, kind) else source
                for session, source in column.sources.items()
            }
            columns[name] = replace(column, sources=sources)
        return replace(self, columns=columns)

    def file_name(self, suffix: str) -> str:
        """Name a file of this shard; it never replaces a file that a reader may have open."""
        name = f"{self.name}.{suffix}"
        return add_generation(name, self.generation) if self.generation else name


@dataclass(slots=True)
class PlannedShard:
    """A shard while the plan is being made."""

    name: str
    split: Split
    sessions: list[SessionSegments] = field(default_factory=list)
    previous: BuiltShard | None = None
    """The shard of the previous set that has its name and place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a build will do."""

    tasks: tuple[ShardTask, ...]
    unchanged: tuple[BuiltShard, ...]
    dropped: tuple[str, ...]
    """Names of previous shards that are removed."""
    order: tuple[str, ...]
    """Names of all shards of the new set, in its order."""
    dropped_changes: Changes = Changes()
    """What happened to the sessions of the dropped shards."""
    settings: tuple[str, ...] = ()
    """``key old -> new`` of each changed recipe key, including keys that cause no rebuild."""

    @property
    def is_empty(self) -> bool:
        """Whether the shards of the previous set are up to date."""
        return not self.tasks and not self.dropped

    @property
    def keeps_samples(self) -> bool:
        """Whether every sample stays the same and in its place."""
        columns = (column for task in self.tasks for column in task.columns.values())
        has_all = not any(task.removed for task in self.tasks)
        return not self.dropped and has_all and all(column.is_repair for column in columns)


def add_generation(name: str, generation: int) -> str:
    """Insert a generation: ``train-000000.audio.tar`` -> ``train-000000.g2.audio.tar``."""
    stem, _, suffix = name.partition(".")
    return f"{stem}.g{generation}.{suffix}"
