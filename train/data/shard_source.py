"""A shard set as a source of windows: one request per stream and window.

::

    read_into -> write_window        which segments of each stream (train.data.assembly)
      -> ShardSource._read_segments  the members of consecutive rows, read and checked by ColumnFile
      -> _DECODERS[kind]             bytes of a member -> a segment

Index and column files are opened on first use; the least recently used are closed. Every member is
checked against its CRC32C before it is decoded. Any damage is a CorruptError that names the file
and the member's offset in it; what the machine fails to read is a MachineError. Files of a set
behind a URL are copies in this machine's cache (:mod:`train.data.cached_set`).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, cast

import numpy as np

from shared.clock import EPSILON_S
from shared.errors import REBUILD_HINT, CorruptError, ShardError
from shared.kinds.text import SegmentText, decode_text
from shared.kinds.video import decode_pictures
from shared.machine import count_descriptors, raise_descriptor_limit, warn_once
from shared.media.yuv import Chosen
from shared.shardset.columns import ColumnFile, read_chunk
from shared.shardset.index import Members, ShardIndex, require_matching
from shared.shardset.layout import training_columns
from shared.shardset.locks import ReaderLock, read_manifest_locked
from shared.shardset.manifest import find_runs
from shared.shardset.store import LocalShardSet, ShardSetReader
from shared.storage import Store, parse_location
from shared.streams import Kind, VideoStream
from shared.timing import OnStage, no_timer
from train.data.assembly import SegmentSource, VideoSegment, write_window
from train.data.cached_set import CachedShardSet, CacheSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.kinds.column import Column
    from shared.recipe import Split
    from shared.shardset.manifest import ShardEntry
    from train.data.assembly import SegmentRange
    from train.data.batch import ReadWindow, SampleLocation

MAX_IDLE_INDEXES: Final = 64
"""Indexes kept in memory besides those of the shards that are prefetched."""

_OPEN_SHARE: Final = 0.5
"""Share of the files that the process may open that columns take; all its sets together."""

_SMALL_LIMIT: Final = 1024
"""Below this limit of open files, those that are no columns count."""

_SPARE_DESCRIPTORS: Final = 8
"""Descriptors that are left for indexes, downloads and libraries."""

_MAX_TIME_S: Final = 1e9
"""Far beyond any token's time."""


class OpenShard:
    """One shard's index and its open columns."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.files: dict[str, ColumnFile] = {}
        self._members: dict[str, Members] = {}

    def members(self, column: str) -> Members:
        """Return the positions of a column's members."""
        if column not in self._members:
            self._members[column] = self.index.members(column)
        return self._members[column]

    def close(self) -> None:
        """Close its files; the next read opens them again."""
        while self.files:
            self.files.popitem()[1].close()


class OpenShards:
    """The shards of a set that are open in this process, the least recently used first.

    All sets of a process share its limit of open files. Another process opens its own.
    """

    _alive: ClassVar[weakref.WeakSet[OpenShards]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._shards: OrderedDict[int, OpenShard] = OrderedDict()
        self._num_prefetched = 0
        self._alive.add(self)

    def __reduce__(self) -> tuple[type[OpenShards], tuple[()]]:
        return OpenShards, ()

    def peek(self, shard: int) -> OpenShard | None:
        """Return a shard if it is open."""
        return self._shards.get(shard)

    def get(self, shard: int) -> OpenShard | None:
        """Return a shard if it is open, and mark it as used now."""
        opened = self._shards.get(shard)
        if opened is not None:
            self._shards.move_to_end(shard)
        return opened

    def add(self, shard: int, opened: OpenShard) -> None:
        """Add a shard; close the one used longest ago if there are too many."""
        self._shards[shard] = opened
        if len(self._shards) > max(MAX_IDLE_INDEXES, self._num_prefetched):
            self._shards.popitem(last=False)[1].close()

    def keep(self, shards: set[int]) -> None:
        """Close all other shards."""
        self._num_prefetched = len(shards)
        for shard in self._shards.keys() - shards:
            self._shards.pop(shard).close()

    def make_room(self, user: OpenShard) -> None:
        """Close columns, those used longest ago first, before a column of a shard is opened.

        Its own are closed last. That is possible: a column is needed only while it is read.
        """
        limit = max_open_files(sum(opened.num_open for opened in self._alive)) // len(self._alive)
        others = (opened for opened in self._shards.values() if opened is not user)
        num_open = self.num_open
        for opened in (*others, user):
            if num_open < limit:
                return
            num_open -= len(opened.files)
            opened.close()

    @property
    def num_open(self) -> int:
        """Number of open columns."""
        return sum(len(opened.files) for opened in self._shards.values())

    def evict(self, *, num_kept: int = 0) -> bool:
        """Close the least recently used shard; of the `num_kept` newest only the columns.

        Returns:
            Whether anything was open.
        """
        if len(self._shards) > num_kept:
            self._shards.popitem(last=False)[1].close()
            return True
        with_files = [opened for opened in self._shards.values() if opened.files]
        for opened in with_files:
            opened.close()
        return bool(with_files)

    def close(self) -> None:
        """Close all files."""
        while self._shards:
            self._shards.popitem()[1].close()


def max_open_files(num_open: int) -> int:
    """Return how many columns the process may keep open: a share of ``ulimit -n``.

    Of a small limit, that is at most what its other files leave; `num_open` columns are open now.
    """
    limit = raise_descriptor_limit()
    share = int(limit * _OPEN_SHARE)
    if limit < _SMALL_LIMIT:
        share = min(share, limit - _SPARE_DESCRIPTORS - (count_descriptors() - num_open))
    return max(1, share)


class ShardSource(SegmentSource):
    """Windows of one split of a shard set; it can be sent to another process.

    Args:
        root: the shard set's folder, or a URL that fsspec knows.

    Raises:
        ShardError: there is no such set, or it can't be read.
        StorageError, ConfigError: see :class:`train.data.cached_set.CachedShardSet`.
    """

    def __init__(
        self, root: Path | str, *, split: Split = "train", cache: CacheSettings | None = None
    ) -> None:
        location = parse_location(root)
        if (limit := raise_descriptor_limit()) < _SMALL_LIMIT:
            warn_once(
                f"a process may open only {limit} files, so files of shards are closed and opened "
                f"again while they are read; fix: raise `ulimit -n` to {_SMALL_LIMIT} or more"
            )
        self._store: ShardSetReader
        self._cached: CachedShardSet | None = None
        self._lock: ReaderLock | None = None
        if isinstance(location, Store):
            settings = cache or CacheSettings()
            self._store = self._cached = CachedShardSet(location, settings, evict=self._evict_any)
            self.manifest, self.tokenizer = self._cached.manifest, self._cached.tokenizer
        else:
            self._store = LocalShardSet(location)
            self.manifest, self._lock = read_manifest_locked(location)
            self.tokenizer = self.manifest.load_tokenizer()
        self.recipe = self.manifest.recipe
        self.fingerprint = f"{self.manifest.fingerprint}/{split}"
        self._entries = self.manifest.in_split(split)
        self.shard_sizes = np.array([e.num_samples for e in self._entries], dtype=np.int64)
        self._columns = training_columns(self.recipe)
        self._open = OpenShards()
        self.on_stage: OnStage = no_timer
        """Receives the name of each stage when it ends: open, fetch, checksum, decode, collate."""
        self.evict_others: Callable[[], bool] = _nothing_open
        """Closes a file of another source in this process; returns whether one was open."""

    def runs(self) -> list[Sequence[int]]:
        """See :class:`SegmentSource`."""
        return [entry.runs for entry in self._entries]

    def segment_at(self, shard: int, row: int) -> tuple[int, float]:
        """See :class:`SegmentSource`."""
        index = self.shard(shard).index
        return index.segment(row), index.duration_s(row)

    def shard_name(self, shard: int) -> str:
        """Return a shard's name in the manifest, such as train-000003."""
        return self._entries[shard].name

    def key(self, shard: int, window: int) -> str:
        """Return SESSION@FIRST_TICK."""
        rows = self.locate(shard, window)
        return f"{self.shard(shard).index.session(rows.rows.start)}@{rows.clock_tick}"

    def shard(self, shard: int) -> OpenShard:
        """Return a shard; open it if necessary.

        Raises:
            CorruptError: its index is missing, damaged or does not match the manifest.
        """
        opened = self._open.get(shard)
        if opened is None:
            entry = self._entries[shard]
            try:
                index = self._store.read_index(entry.index_file, sha256=entry.index_sha256)
                self._require_matching(index, entry)
            except ShardError as error:  # a missing file counts as a damaged one
                raise CorruptError(str(error), file=entry.index_file) from error
            opened = OpenShard(index)
            self._open.add(shard, opened)
        return opened

    def prefetch_shards(self, shards: Iterable[int]) -> None:
        """Close all other shards; download these in the background if the set is behind a URL."""
        wanted = list(dict.fromkeys(shards))
        self._open.keep(set(wanted))
        if self._cached is not None:
            columns = [self._columns[name].name for name in self._layouts if name in self._columns]
            self._cached.prefetch([self._entries[shard] for shard in wanted], columns)

    def prefetch_samples(self, locations: Iterable[SampleLocation]) -> None:
        """Ask the kernel for the members of all these windows at once.

        Only open files are asked, which are nearly all: those of a block stay open.
        """
        for shard, window in locations:
            if (opened := self._open.peek(shard)) is None:
                continue
            span = self._windows.locate(shard, window)
            rows = range(span.first_row, span.first_row + span.num_rows)
            for column, file in opened.files.items():
                file.prefetch(opened.members(column), rows)
        self.on_stage("fetch")

    def read_into(self, shard: int, window: int, out: Mapping[str, NDArray[Any]]) -> ReadWindow:
        """See :meth:`train.data.batch.SampleSource.read_into`."""
        opened, rows = self.shard(shard), self.locate(shard, window)
        self.on_stage("open")
        read = write_window(
            out,
            rows,
            self._layouts,
            read_segments=partial(self._read_segments, opened, rows.rows.start),
            on_stage=self.on_stage,
        )
        self.on_stage("collate")
        return read

    def close(self) -> None:
        """Close all files and release the reader lock; the next read opens the files again."""
        self._open.close()
        if self._lock is not None:
            self._lock.close()
        if self._cached is not None:
            self._cached.close()

    def evict(self) -> bool:
        """Close the least recently used shard; return whether one was open."""
        return self._open.evict()

    def _evict_any(self) -> bool:
        """Close files of this source, or else of others; return whether any were open.

        The newest shard's index stays: its caller still reads it.
        """
        return self._open.evict(num_kept=1) or self.evict_others()

    def _require_matching(self, index: ShardIndex, entry: ShardEntry) -> None:
        """Check that an index has this set's columns, runs, segments and frames."""
        origin = entry.index_file
        columns = self._columns.values()
        require_matching(index, columns, segment_s=self.recipe.segment_s, origin=origin)
        runs = find_runs(index)
        if runs != entry.runs:
            raise CorruptError(
                f"{origin}: has {index.num_samples} rows in {len(runs)} runs, manifest says "
                f"{entry.num_samples} in {len(entry.runs)}; {REBUILD_HINT}"
            )

    def _read_segments(
        self, opened: OpenShard, first_row: int, name: str, ranges: list[SegmentRange]
    ) -> dict[int, Any]:
        """Read the segments of a stream that a window needs; see :func:`write_window`."""
        column = self._columns.get(name)
        if column is None:  # a set of a mix does not declare it
            return {}
        rows = range(first_row + ranges[0].row, first_row + ranges[-1].row + 1)
        members = self._read_members(opened, column, rows)
        decode = _DECODERS[column.kind]
        segments: dict[int, Any] = {}
        for row, member in zip(rows, members, strict=True):
            if member is not None:
                at = _Position(opened, column, row)
                segments[row - first_row] = decode(self, at, member)
        return segments

    def _read_members(
        self, opened: OpenShard, column: Column, rows: range
    ) -> list[bytes | memoryview | None]:
        """Read and check the members of consecutive rows; None where a row lacks the stream."""
        read = partial(
            ColumnFile.read_rows,
            members=opened.members(column.name),
            rows=rows,
            max_bytes=column.max_bytes,
            on_stage=self.on_stage,
        )
        self.on_stage("collate")
        try:
            file = self._open_column(opened, column.name)
            try:
                return read(file)
            except CorruptError:
                if not self._refetch_column(opened, column.name):
                    raise
                return read(self._open_column(opened, column.name))
        except ShardError as error:  # a missing file counts as a damaged one
            name = opened.index.columns[column.name]["file"]
            offset = error.offset if isinstance(error, CorruptError) else None
            raise CorruptError(str(error), file=name, offset=offset) from error

    def _open_column(self, opened: OpenShard, column: str) -> ColumnFile:
        """Return a shard's column file; open it if necessary."""
        if column not in opened.files:
            self._open.make_room(opened)
            header = opened.index.columns[column]
            opened.files[column] = self._store.open_column(
                header["file"], sha256=header.get("sha256"), length_bytes=header.get("length_bytes")
            )
            self.on_stage("open")
        return opened.files[column]

    def _refetch_column(self, opened: OpenShard, column: str) -> bool:
        """Download a damaged column again and close it; return whether it may be good now."""
        if self._cached is None or not self._cached.refetch_column(opened.index, column):
            return False
        if column in opened.files:  # downloading may have evicted it
            opened.files.pop(column).close()
        return True

    def _decode_video(self, at: _Position, member: bytes | memoryview) -> VideoSegment:
        """Return a segment that decodes chosen pictures straight into a batch."""
        column = at.column
        spec = cast(VideoStream, self.recipe.streams[column.stream])

        def write(frames: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
            chosen = Chosen(frames.tolist(), column.shape[0])
            try:
                decode_pictures(member, spec=spec, out=out, chosen=chosen)
            except CorruptError as error:
                raise at.error(str(error)) from error

        return VideoSegment(at.opened.index.arrays[f"{column.name}.error_s"][at.row], write)

    def _decode_samples(self, at: _Position, member: bytes | memoryview) -> NDArray[Any]:
        """Return the readings or dMel levels of a segment."""
        try:
            return read_chunk(member, dtype=at.column.dtype, shape=at.column.shape)
        except CorruptError as error:
            raise at.error(str(error)) from error

    def _decode_text(self, at: _Position, member: bytes | memoryview) -> SegmentText:
        """Decode a text; check its tokens against the vocabulary and the segment.

        A model has no embedding for a token outside the vocabulary.
        """
        try:
            text = decode_text(bytes(member))
        except CorruptError as error:
            raise at.error(str(error)) from error
        if max(text.ids, default=0) >= self.recipe.text.vocab_size:
            raise at.error(
                f"token {max(text.ids)} is outside the vocabulary of "
                f"{self.recipe.text.vocab_size}; {REBUILD_HINT}"
            )
        start_s = at.opened.index.segment(at.row) * self.recipe.segment_s
        stop_s = start_s + self.recipe.segment_s
        is_last = stop_s >= at.opened.index.duration_s(at.row) - EPSILON_S
        # The last segment of a session also holds the tokens after its end.
        limit_s = _MAX_TIME_S if is_last else stop_s
        for time_s in text.time_s and (min(text.time_s), max(text.time_s)):
            if not start_s - EPSILON_S <= time_s < limit_s + EPSILON_S:
                raise at.error(
                    f"a token at {time_s:g} s is outside the segment [{start_s:g}, {stop_s:g}) s; "
                    f"{REBUILD_HINT}"
                )
        return text


_DECODERS: Final[dict[Kind, Callable[..., Any]]] = {
    Kind.VIDEO: ShardSource._decode_video,
    Kind.AUDIO: ShardSource._decode_samples,
    Kind.SENSOR: ShardSource._decode_samples,
    Kind.TEXT: ShardSource._decode_text,
}
"""How a member of each kind becomes a segment."""


class _Position(NamedTuple):
    """A member of a column, for errors about it."""

    opened: OpenShard
    column: Column
    row: int

    def error(self, problem: str) -> CorruptError:
        """Return the error for a member that can't be decoded."""
        file: str = self.opened.index.columns[self.column.name]["file"]
        offset = int(self.opened.members(self.column.name).offset[self.row])
        opened = self.opened.files.get(self.column.name)
        origin = file if opened is None else opened.origin
        return CorruptError(f"{origin} at {offset}: {problem}", file=file, offset=offset)


def _nothing_open() -> bool:
    """Return False: there is no other source to evict."""
    return False
