"""A shard set as a source of samples: one ``pread`` per member, only of the fields that are read.

::

    read_into -> _read_frames, _read_chunk   which tables of members a stream is read from
      -> _read_member                        read and checked by ColumnFile, then decoded

Index and column files are opened on first use; the least recently used are closed. Every member is
checked against its CRC32C before it is decoded. Any damage is a CorruptError that names the file
and the member's offset in it. Files of a set behind a URL are copies in this machine's cache
(:mod:`train.data.cached_set`).
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from shared.clock import EPSILON_S
from shared.errors import REBUILD_HINT, CorruptError, ShardError
from shared.media.yuv import check_npy_header
from shared.recipe import SENSOR_STREAMS, TEXT_STREAMS, VISION_STREAMS, Split, Stream
from shared.session.reader import Mel, Text
from shared.shardset.codec import decode_pictures, decode_text, is_raw_layout
from shared.shardset.columns import ColumnFile, read_chunk
from shared.shardset.index import ShardIndex, require_complete
from shared.shardset.layout import member_limits, streams_from_bits
from shared.shardset.locks import ReaderLock, read_manifest_locked
from shared.shardset.store import LocalShardSet, ShardSetReader
from shared.storage import Store, parse_location
from shared.timing import OnStage, no_timer
from train.data.batch import write_absent, write_mel, write_numbers
from train.data.cached_set import CachedShardSet, CacheSettings
from train.data.order import EpochOrder, SampleOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.shardset.manifest import ShardEntry
    from train.data.batch import SampleLocation
    from train.data.order import BatchOrder, OrderSettings

MAX_OPEN_SHARDS = 64
"""Shards kept open at once, with a few file descriptors each: four blocks of the default shuffle.

If more shards are read in turn, the indexes of all of them stay; an index takes no descriptor."""


T = TypeVar("T")

READ_COLUMNS = {
    **{stream: str(stream) for stream in VISION_STREAMS},
    **dict.fromkeys(SENSOR_STREAMS, "proprio"),
    Stream.AUDIO: "dmel",
    **dict.fromkeys(TEXT_STREAMS, "text"),
}
"""The column that each stream is read from."""

READ_TABLES = {
    **{stream: (str(stream),) for stream in VISION_STREAMS},
    **{stream: (f"proprio/{stream}",) for stream in SENSOR_STREAMS},
    Stream.AUDIO: ("dmel/dmel", "dmel/valid"),
    **dict.fromkeys(TEXT_STREAMS, ("text",)),
}
"""The tables of members that each stream is read from."""


class OpenShard:
    """One shard's index and its open columns."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.files: dict[str, ColumnFile] = {}

    def present(self, row: int) -> tuple[Stream, ...]:
        """Return the streams that a row's sample has."""
        return streams_from_bits(int(self.index.arrays["present"][row]))

    def close(self) -> None:
        """Close its files; the next read opens them again."""
        while self.files:
            self.files.popitem()[1].close()


class ShardSource:
    """Samples of one split of a shard set; it can be sent to another process.

    Args:
        root: the shard set's folder, or a URL that fsspec knows.
        split: which sessions.
        cache: for a set behind a URL.

    Raises:
        ShardError: there is no such set, or it can't be read.
        StorageError, ConfigError: see :class:`train.data.cached_set.CachedShardSet`.
    """

    def __init__(
        self, root: Path | str, *, split: Split = "train", cache: CacheSettings | None = None
    ) -> None:
        location = parse_location(root)
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
        self._limits = member_limits(self.recipe)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._num_prefetched = 0
        self.on_stage: OnStage = no_timer
        """Receives the name of each stage when it ends: open, fetch, checksum, decode, collate."""
        self.evict_others: Callable[[], bool] = _nothing_open
        """Closes a file of another source in this process; returns whether one was open."""

    def identity(self) -> dict[str, Any]:
        """See :meth:`train.data.batch.SampleSource.identity`."""
        return {"fingerprint": self.fingerprint}

    def batch_order(self, settings: OrderSettings) -> BatchOrder:
        """See :meth:`train.data.batch.SampleSource.batch_order`."""
        order = SampleOrder(self.shard_sizes, fingerprint=self.fingerprint, settings=settings)
        return EpochOrder(order, settings)

    def shard_name(self, shard: int) -> str:
        """Return a shard's name in the manifest, such as train-000003."""
        return self._entries[shard].name

    def key(self, shard: int, row: int) -> str:
        """Return SESSION/WINDOW."""
        return self.shard(shard).index.key(row)

    def start_s(self, shard: int, row: int) -> float:
        """Return when the window starts on the session clock."""
        return float(self.shard(shard).index.arrays["start_s"][row])

    def present(self, shard: int, row: int) -> tuple[Stream, ...]:
        """Return the streams that the sample has."""
        return self.shard(shard).present(row)

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
            opened = self._open[shard] = OpenShard(index)
            if len(self._open) > max(MAX_OPEN_SHARDS, self._num_prefetched):
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return opened

    def prefetch_shards(self, shards: Iterable[int], streams: Collection[Stream]) -> None:
        """Close all other shards; download these in the background if the set is behind a URL."""
        wanted = list(dict.fromkeys(shards))
        for shard in self._open.keys() - set(wanted):
            self._open.pop(shard).close()
        self._num_prefetched = len(wanted)
        if self._cached is not None:
            columns = sorted({READ_COLUMNS[stream] for stream in streams})
            self._cached.prefetch([self._entries[shard] for shard in wanted], columns)

    def prefetch_samples(
        self, locations: Iterable[SampleLocation], streams: Collection[Stream]
    ) -> None:
        """Ask the kernel for all these samples' members at once.

        Only open files are asked, which are nearly all: those of a block stay open.
        """
        for shard, row in locations:
            if (opened := self._open.get(shard)) is None:
                continue
            present = opened.present(row)
            for table in dict.fromkeys(t for s in present if s in streams for t in READ_TABLES[s]):
                if (file := opened.files.get(_column_of(table))) is not None:
                    file.prefetch(opened.index.members(table), row)
        self.on_stage("fetch")

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[Any]], *, with_text: bool
    ) -> Text | None:
        """See :meth:`train.data.batch.SampleSource.read_into`."""
        opened = self.shard(shard)
        self.on_stage("open")
        for stream in VISION_STREAMS:
            if stream in out:
                self._read_frames(opened, row, stream, out)
        present = opened.present(row)
        write_absent(out, (s for s in (*SENSOR_STREAMS, Stream.AUDIO) if s not in present))
        for stream in SENSOR_STREAMS:
            if stream in out and stream in present:
                shape = out[stream].shape
                values = self._read_chunk(opened, row, f"proprio/{stream}", dtype="f4", shape=shape)
                write_numbers(out, stream, values)
        if Stream.AUDIO in out and Stream.AUDIO in present:
            shape = out[Stream.AUDIO].shape
            levels = self._read_chunk(opened, row, "dmel/dmel", dtype="u1", shape=shape)
            valid = self._read_chunk(opened, row, "dmel/valid", dtype="u1", shape=shape[:1])
            write_mel(out, Mel(levels=levels, valid=valid.astype(np.bool_)))
        text = None
        if with_text:
            start_s = float(opened.index.arrays["start_s"][row])
            decode = partial(self._decode_text, start_s=start_s)
            text = self._read_member(opened, row, "text", decode=decode)
        self.on_stage("collate")
        return text

    def close(self) -> None:
        """Close all files and release the reader lock; the next read opens the files again."""
        while self._open:
            self._open.popitem()[1].close()
        if self._lock is not None:
            self._lock.close()
        if self._cached is not None:
            self._cached.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the open files: another process opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def evict(self, *, num_kept: int = 0) -> bool:
        """Close the least recently used shard; of the `num_kept` newest only the columns.

        Returns:
            Whether anything was open.
        """
        if len(self._open) > num_kept:
            self._open.popitem(last=False)[1].close()
            return True
        with_files = [opened for opened in self._open.values() if opened.files]
        for opened in with_files:
            opened.close()
        return bool(with_files)

    def _evict_any(self) -> bool:
        """Close files of this source, or else of others; return whether any were open.

        The newest shard's index stays: its caller still reads it.
        """
        return self.evict(num_kept=1) or self.evict_others()

    def _require_matching(self, index: ShardIndex, entry: ShardEntry) -> None:
        """Check that an index has this set's columns, rows and frames.

        Raises:
            CorruptError: it does not.
        """
        origin = entry.index_file
        require_complete(index, origin=origin)
        if index.num_samples != entry.num_samples:
            raise CorruptError(
                f"{origin}: has {index.num_samples} rows, manifest says {entry.num_samples}; "
                f"{REBUILD_HINT}"
            )
        expected = self.recipe.count(self.recipe.vision.rate_hz)
        for stream in VISION_STREAMS:
            num_frames = index.arrays[f"{stream}.error_s"].shape[1]
            if num_frames != expected:
                raise CorruptError(
                    f"{origin}: has {num_frames} frames of {stream} in a window, the recipe says "
                    f"{expected}; {REBUILD_HINT}"
                )

    def _read_frames(
        self, opened: OpenShard, row: int, stream: Stream, out: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write a camera's frames and their validity; zeros if the sample lacks them."""
        recipe, pictures = self.recipe.vision, out[stream]
        # A raw member ends with the very bytes of the array, which are read straight into it.
        is_raw = is_raw_layout(pictures, recipe=recipe)

        def decode(member: bytes) -> bool:
            if is_raw:
                check_npy_header(member, pictures)
            else:
                decode_pictures(member, recipe=recipe, out=pictures)
            return True

        tail = pictures if is_raw else None
        if self._read_member(opened, row, stream, decode=decode, tail=tail) is None:
            write_absent(out, [stream])
        else:
            error_s = opened.index.arrays[f"{stream}.error_s"][row]
            out[f"{stream}_valid"][...] = np.isfinite(error_s)

    def _read_chunk(
        self, opened: OpenShard, row: int, table: str, *, dtype: str, shape: tuple[int, ...]
    ) -> NDArray[Any]:
        """Read a row's chunk of a Zarr array, which every row has."""
        decode = partial(read_chunk, dtype=dtype, shape=shape)
        chunk = self._read_member(opened, row, table, decode=decode)
        if chunk is None:
            file, offset = _member_position(opened.index, table, row)
            raise CorruptError(
                f"{file} at {offset}: {opened.index.key(row)} lacks {table}, which its index says "
                f"is there; {REBUILD_HINT}",
                file=file,
                offset=offset,
            )
        return chunk

    def _read_member(
        self,
        opened: OpenShard,
        row: int,
        table: str,
        *,
        decode: Callable[[bytes], T],
        tail: NDArray[np.uint8] | None = None,
    ) -> T | None:
        """Read, check and decode a row's member of a table; None if the sample lacks it.

        See :meth:`shared.shardset.columns.ColumnFile.read` for `tail`.

        Raises:
            CorruptError: the member is damaged or missing; it names file and offset.
        """
        column, members = _column_of(table), opened.index.members(table)
        options: dict[str, Any] = {
            "max_bytes": self._limits[table],
            "tail": tail,
            "on_stage": self.on_stage,
        }
        self.on_stage("collate")
        try:
            file = self._open_column(opened, column)
            try:
                member = file.read(members, row, **options)
            except CorruptError:
                if not self._refetch_column(opened, column):
                    raise
                file = self._open_column(opened, column)
                member = file.read(members, row, **options)
        except ShardError as error:  # a missing file counts as a damaged one
            name, offset = _member_position(opened.index, table, row)
            raise CorruptError(str(error), file=name, offset=offset) from error
        if member is None:
            return None
        try:
            decoded = decode(member)
        except CorruptError as error:
            name, offset = _member_position(opened.index, table, row)
            message = f"{file.origin} at {offset}: {error}"
            raise CorruptError(message, file=name, offset=offset) from error
        self.on_stage("decode")
        return decoded

    def _open_column(self, opened: OpenShard, column: str) -> ColumnFile:
        """Return a shard's column file; open it if necessary."""
        if column not in opened.files:
            self._limit_open_columns(opened)
            header = opened.index.columns[column]
            opened.files[column] = self._store.open_column(
                header["file"],
                sha256=header.get("sha256"),
                length_bytes=header.get("length_bytes"),
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

    def _limit_open_columns(self, opened: OpenShard) -> None:
        """Close the columns of the least recently used other shards if too many are open."""
        others = [o for o in self._open.values() if o.files and o is not opened]
        for other in others[: max(0, len(others) - MAX_OPEN_SHARDS + 1)]:
            other.close()

    def _decode_text(self, member: bytes, *, start_s: float) -> Text:
        """Decode a text member; check its tokens against the vocabulary and the window.

        A model has no embedding for a token outside the vocabulary.

        Raises:
            CorruptError: it does not decode, or has such a token or time.
        """
        text = decode_text(member)
        stop_s = start_s + self.recipe.window.duration_s
        for tokens in (text.internal, text.external):
            if max(tokens.ids, default=0) >= self.recipe.text.vocab_size:
                raise CorruptError(
                    f"token {max(tokens.ids)} is outside the vocabulary of "
                    f"{self.recipe.text.vocab_size}; {REBUILD_HINT}"
                )
            for time_s in tokens.time_s and (min(tokens.time_s), max(tokens.time_s)):
                if not start_s - EPSILON_S <= time_s < stop_s + EPSILON_S:
                    raise CorruptError(
                        f"a token at {time_s:g} s is outside the window [{start_s:g}, {stop_s:g}) "
                        f"s; {REBUILD_HINT}"
                    )
        return text


def _column_of(table: str) -> str:
    """Return the column that holds a table of members."""
    return table.partition("/")[0]


def _member_position(index: ShardIndex, table: str, row: int) -> tuple[str, int]:
    """Return the name of the file that holds a row's member, and the member's offset in it."""
    file: str = index.columns[_column_of(table)]["file"]
    return file, int(index.arrays[f"{table}.offset"][row])


def _nothing_open() -> bool:
    """Return False: there is no other source to evict."""
    return False
