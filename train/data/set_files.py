"""Where the files of a shard set come from: a folder here, or by way of the cache
(:class:`train.data.remote.RemoteFiles`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from shared.shardset.columns import ColumnFile
from shared.shardset.index import ShardIndex, open_index
from shared.shardset.locks import read_manifest_locked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from shared.shardset.manifest import ShardEntry


class SetFiles(Protocol):
    """Where a set's files come from. `evict` closes a shard to make room, if one is open."""

    def open_index(self, entry: ShardEntry, *, evict: Callable[[], bool]) -> ShardIndex:
        """A shard's index."""
        ...

    def open_column(
        self, index: ShardIndex, column: str, *, evict: Callable[[], bool]
    ) -> ColumnFile:
        """A column's file."""
        ...

    def refetch_column(self, index: ShardIndex, column: str, *, evict: Callable[[], bool]) -> bool:
        """Get a damaged column anew; False where that does not help."""
        ...

    def fetch_ahead(self, entries: Sequence[ShardEntry], columns: Sequence[str]) -> None:
        """Get what will be read."""
        ...

    def close(self) -> None:
        """Let go of the set."""
        ...


class LocalFiles:
    """A set in a folder, which is held while it is read; see :mod:`shared.shardset.locks`."""

    def __init__(self, root: Path) -> None:
        self.manifest, self._hold = read_manifest_locked(root)
        self.tokenizer = self.manifest.load_tokenizer()

    def open_index(self, entry: ShardEntry, *, evict: Callable[[], bool]) -> ShardIndex:
        """A shard's index."""
        del evict
        return open_index(self.manifest.root / entry.index_file, sha256=entry.index_sha256)

    def open_column(
        self, index: ShardIndex, column: str, *, evict: Callable[[], bool]
    ) -> ColumnFile:
        """A column's file."""
        del evict
        return ColumnFile(self.manifest.root / index.columns[column]["file"])

    def refetch_column(self, index: ShardIndex, column: str, *, evict: Callable[[], bool]) -> bool:
        """Nothing helps."""
        del index, column, evict
        return False

    def fetch_ahead(self, entries: Sequence[ShardEntry], columns: Sequence[str]) -> None:
        """Nothing: all is here."""

    def close(self) -> None:
        """ReaderLock the set no longer."""
        if self._hold is not None:
            self._hold.close()

    def __getstate__(self) -> dict[str, Any]:
        """The hold stays with the first process, which outlives the others."""
        return {**self.__dict__, "_hold": None}
