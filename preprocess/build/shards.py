"""Values of a build: windows of sessions, shards that exist, shards to write, the plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shared.shardset.manifest import FORMAT_VERSION, ShardEntry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.recipe import Recipe, Split


@dataclass(frozen=True, slots=True)
class SessionWindows:
    """Some windows of a session that lie together in a shard."""

    session: str
    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltColumn:
    """A finished column file, as a shard's index describes it."""

    file: str
    length_bytes: int
    sha256: str
    fingerprint: str
    basis: Mapping[str, Any]
    rows: Mapping[str, str]
    """Session -> hash of its rows and of what the column takes from it; one that is the same in
    the new column is copied. Empty where not known: the column was made in format 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltShard:
    """A finished shard, as the old manifest and its index describe it."""

    name: str
    split: Split
    slices: tuple[SessionWindows, ...]
    index_file: str
    columns: Mapping[str, BuiltColumn]
    faults: Mapping[str, str] = field(default_factory=dict)
    """Column name -> what is wrong with its file."""
    losses: frozenset[tuple[str, str]] = frozenset()
    """(session, stream) of those that did not decode throughout."""
    lacks_statistics: bool = False
    """Its index is of a version of this program that made fewer."""


@dataclass(slots=True)
class PlannedShard:
    """A shard while it is being planned."""

    name: str
    split: Split
    slices: list[SessionWindows] = field(default_factory=list)
    old: BuiltShard | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is not as it was, by name of session."""

    new: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: Mapping[str, str] = field(default_factory=dict)
    """Session -> what of it, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One shard to write: which columns are due and why, and which stay as they are."""

    name: str
    split: Split
    slices: tuple[SessionWindows, ...]
    due: Mapping[str, str]
    """Column name -> reason."""
    bases: Mapping[str, Mapping[str, Any]]
    """Column name -> what it depends on; the hash of it is its fingerprint."""
    rows: Mapping[str, Mapping[str, str]]
    """Column name -> session -> hash of its rows, see :class:`BuiltColumn`."""
    kept: Mapping[str, BuiltColumn]
    kept_index_file: str | None
    """Describes the columns that are kept."""
    copied: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Column name -> session whose rows are copied, encoded as they are -> indexes of the shards in
    which they lie."""
    generation: int
    changes: Mapping[str, Changes] = field(default_factory=dict)
    """Column name -> sessions that make it due, or came with what does."""
    mended: frozenset[str] = frozenset()
    """Columns that are due only because their files are damaged."""

    @property
    def num_samples(self) -> int:
        """Rows of the shard."""
        return sum(len(s.windows) for s in self.slices)

    @property
    def old_index_files(self) -> tuple[str, ...]:
        """Indexes of all shards from which rows are copied."""
        found = (f for of in self.copied.values() for files in of.values() for f in files)
        return tuple(dict.fromkeys(found))

    def file_name(self, suffix: str) -> str:
        """Name of a file of this shard that never replaces one that a reader may have open."""
        name = f"{self.name}.{suffix}"
        return versioned(name, self.generation) if self.generation else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a build will do."""

    tasks: tuple[ShardTask, ...]
    unchanged: tuple[BuiltShard, ...]
    dropped: tuple[str, ...]
    """Names of old shards that go."""
    order: tuple[str, ...]
    """Names of all shards of the new set, in its order."""
    dropped_changes: Changes = Changes()
    """What became of the sessions of those."""
    settings: tuple[str, ...] = ()
    """``key old -> new`` of the recipe's keys, be anything made for them or not."""
    old_version: int = FORMAT_VERSION
    """Format of the old set; that of the new one is always the newest."""

    @property
    def is_empty(self) -> bool:
        """Whether the shards of the old set are up to date."""
        return not self.tasks and not self.dropped and self.old_version == FORMAT_VERSION

    @property
    def keeps_samples(self) -> bool:
        """Whether every sample stays as it is, in its place."""
        return not self.dropped and all(set(task.due) <= task.mended for task in self.tasks)

    @property
    def upgrade(self) -> str | None:
        """What a set of an older format needs besides :meth:`reasons`."""
        if self.old_version == FORMAT_VERSION:
            return None
        rest = ", columns stay" if self.keeps_samples else ""
        return f"format {self.old_version} -> {FORMAT_VERSION}: indexes are rewritten{rest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousSet:
    """What a plan may keep."""

    recipe: Recipe
    generation: int
    shards: tuple[BuiltShard, ...]
    lost: tuple[ShardEntry, ...] = ()
    """Shards whose index can't be read."""
    format_version: int = FORMAT_VERSION


def versioned(name: str, generation: int) -> str:
    """``train-000000.audio.tar`` -> ``train-000000.g2.audio.tar``."""
    stem, _, rest = name.partition(".")
    return f"{stem}.g{generation}.{rest}"
