"""A shard set as a source of samples: one ``pread`` per member, only of the fields that are wanted.

Index and column files are opened at their first use and the least recently used are closed. Every
member is checked against its CRC32C before it is decoded. Whatever is wrong with one is a
CorruptError that names the file and where in it the member lies. Where the set lies behind a URL,
the files are copies in this machine's cache (:mod:`train.data.cached_set`).
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
from shared.shardset.store import LocalShardSet
from shared.storage import Store, parse_location
from shared.timing import OnStage, no_timer
from train.data.batch import write_absent, write_mel, write_numbers
from train.data.cached_set import CachedShardSet, CacheSettings
from train.data.order import make_epoch_order

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.shardset.manifest import ShardEntry
    from train.data.order import BatchOrder, OrderSettings

MAX_OPEN_SHARDS = 64
"""Shards kept open at once, a few file descriptors each: four blocks of the default shuffle. Where
more are read in turn, the indexes of all of them stay, which take no descriptor."""

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
    """One shard's index and the columns that were asked for."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.files: dict[str, ColumnFile] = {}

    def close(self) -> None:
        """Close its files; the next read opens them again."""
        while self.files:
            self.files.popitem()[1].close()


class ShardSource:
    """Samples of one split of a shard set; safe to send to another process.

    Args:
        root: the shard set's folder, or a URL that fsspec knows.
        split: which sessions.
        cache: for a set behind a URL.

    Raises:
        ShardError: no such set, or no sample in that split.
        StorageError, ConfigError: see :class:`train.data.cached_set.CachedShardSet`.
    """

    def __init__(
        self, root: Path | str, *, split: Split = "train", cache: CacheSettings | None = None
    ) -> None:
        location = parse_location(root)
        self._store: LocalShardSet | CachedShardSet
        self._lock: ReaderLock | None = None
        if isinstance(location, Store):
            settings = cache or CacheSettings()
            self._store = CachedShardSet(location, settings, evict=self._evict_any)
            self.manifest, self.tokenizer = self._store.manifest, self._store.tokenizer
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
        self._num_read_in_turn = 0
        self.on_stage: OnStage = no_timer
        """Told when a stage of reading is over: open, fetch, checksum, decode, collate."""
        self.evict_others: Callable[[], bool] = _nothing_open
        """Closes something that other sources of this process read; whether anything was open."""

    def identity(self) -> dict[str, Any]:
        """See :meth:`train.data.batch.SampleSource.identity`."""
        return {"fingerprint": self.fingerprint}

    def batch_order(self, settings: OrderSettings) -> BatchOrder:
        """See :meth:`train.data.batch.SampleSource.batch_order`."""
        return make_epoch_order(self.shard_sizes, fingerprint=self.fingerprint, settings=settings)

    def shard_name(self, shard: int) -> str:
        """As in the manifest, such as train-000003."""
        return self._entries[shard].name

    def key(self, shard: int, row: int) -> str:
        """SESSION/WINDOW."""
        return self.shard(shard).index.key(row)

    def start_s(self, shard: int, row: int) -> float:
        """When the window begins on the session clock."""
        return float(self.shard(shard).index.arrays["start_s"][row])

    def present(self, shard: int, row: int) -> tuple[Stream, ...]:
        """Streams that the sample has."""
        return streams_from_bits(int(self.shard(shard).index.arrays["present"][row]))

    def shard(self, shard: int) -> OpenShard:
        """The shard, opened if need be.

        Raises:
            CorruptError: its index is missing, damaged or not the manifest's.
        """
        found = self._open.get(shard)
        if found is None:
            entry = self._entries[shard]
            try:
                index = self._store.read_index(entry.index_file, sha256=entry.index_sha256)
                self._require_fitting(index, entry)
            except ShardError as error:  # a missing file is as bad as a damaged one
                raise CorruptError(str(error), file=entry.index_file) from error
            found = self._open[shard] = OpenShard(index)
            if len(self._open) > max(MAX_OPEN_SHARDS, self._num_read_in_turn):
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return found

    def prefetch_shards(self, shards: Iterable[int], streams: Collection[Stream]) -> None:
        """See :meth:`train.data.batch.SampleSource.prefetch_shards`; closes what isn't read any
        more.
        """
        wanted = list(dict.fromkeys(shards))
        for shard in self._open.keys() - set(wanted):
            self._open.pop(shard).close()
        self._num_read_in_turn = len(wanted)
        if isinstance(self._store, CachedShardSet):
            columns = sorted({READ_COLUMNS[stream] for stream in streams})
            self._store.prefetch([self._entries[shard] for shard in wanted], columns)

    def prefetch_samples(
        self, places: Iterable[tuple[int, int]], streams: Collection[Stream]
    ) -> None:
        """Ask the disk for all these samples' members at once.

        Only open files are asked, which are nearly all: those of a block stay open.
        """
        for shard, row in places:
            if (opened := self._open.get(shard)) is None:
                continue
            there = streams_from_bits(int(opened.index.arrays["present"][row]))
            for table in dict.fromkeys(t for s in there if s in streams for t in READ_TABLES[s]):
                if (file := opened.files.get(_column_of(table))) is not None:
                    file.prefetch(opened.index.members(table), row)
        self.on_stage("fetch")

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[np.generic]], *, with_text: bool
    ) -> Text | None:
        """See :meth:`train.data.batch.SampleSource.read_into`."""
        opened = self.shard(shard)
        self.on_stage("open")
        text = self._read_into(opened, row, out, with_text=with_text)
        self.on_stage("collate")
        return text

    def close(self) -> None:
        """Close all files and hold the set no longer; the next read opens its files again."""
        while self._open:
            self._open.popitem()[1].close()
        if self._lock is not None:
            self._lock.close()
        if isinstance(self._store, CachedShardSet):
            self._store.close()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files: another process opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def evict(self, *, num_kept: int = 0) -> bool:
        """Close the shard that was used longest ago; of the `num_kept` newest only the columns.

        Returns:
            Whether anything was open.
        """
        if len(self._open) > num_kept:
            self._open.popitem(last=False)[1].close()
            return True
        opened = [each for each in self._open.values() if each.files]
        for each in opened:
            each.close()
        return bool(opened)

    def _evict_any(self) -> bool:
        """Close files of this source, or else of others; return whether any were open.

        The newest shard's index stays: its caller still reads it.
        """
        return self.evict(num_kept=1) or self.evict_others()

    def _require_fitting(self, index: ShardIndex, entry: ShardEntry) -> None:
        """Raises CorruptError where an index is not of this set's columns, rows and frames."""
        origin = entry.index_file
        require_complete(index, origin=origin)
        if index.num_samples != entry.num_samples:
            raise CorruptError(
                f"{origin}: has {index.num_samples} rows, manifest says {entry.num_samples}; "
                f"{REBUILD_HINT}"
            )
        num_frames = self.recipe.count(self.recipe.vision.rate_hz)
        for eye in VISION_STREAMS:
            found = index.arrays[f"{eye}.error_s"].shape[1]
            if found != num_frames:
                raise CorruptError(
                    f"{origin}: has {found} frames of {eye} in a window, the recipe says "
                    f"{num_frames}; {REBUILD_HINT}"
                )

    def _read_into(
        self,
        opened: OpenShard,
        row: int,
        out: Mapping[str, NDArray[Any]],
        *,
        with_text: bool,
    ) -> Text | None:
        for stream in VISION_STREAMS:
            if stream in out:
                if not self._read_pictures(opened, stream, row, out[stream]):
                    write_absent(out, [stream])
                    continue
                error_s = opened.index.arrays[f"{stream}.error_s"][row]
                out[f"{stream}_valid"][...] = np.isfinite(error_s)
        present = streams_from_bits(int(opened.index.arrays["present"][row]))
        write_absent(out, (s for s in (*SENSOR_STREAMS, Stream.AUDIO) if s not in present))
        for stream in SENSOR_STREAMS:
            if stream in out and stream in present:
                shape = out[stream].shape
                values = self._read_chunk(opened, f"proprio/{stream}", row, "f4", shape)
                write_numbers(out, stream, values)
        if Stream.AUDIO in out and Stream.AUDIO in present:
            shape = out[Stream.AUDIO].shape
            levels = self._read_chunk(opened, "dmel/dmel", row, "u1", shape)
            valid = self._read_chunk(opened, "dmel/valid", row, "u1", shape[:1])
            write_mel(out, Mel(levels=levels, valid=valid.astype(np.bool_)))
        if with_text:
            start_s = float(opened.index.arrays["start_s"][row])
            return self._read(opened, "text", row, partial(self._decode_text, start_s=start_s))
        return None

    def _read_pictures(
        self, opened: OpenShard, eye: Stream, row: int, out: NDArray[np.uint8]
    ) -> bool:
        """Write an eye's pictures; False where the sample lacks them."""
        recipe = self.recipe.vision
        is_tail = is_raw_layout(out, recipe=recipe)

        def decode(member: bytes) -> bool:
            if is_tail:
                check_npy_header(member, out)
            else:
                decode_pictures(member, recipe=recipe, out=out)
            return True

        return self._read(opened, eye, row, decode, tail=out if is_tail else None) or False

    def _read_chunk(
        self, opened: OpenShard, table: str, row: int, dtype: str, shape: tuple[int, ...]
    ) -> NDArray[Any]:
        """A row's chunk of a Zarr array, which every row has."""
        decode = partial(read_chunk, dtype=dtype, shape=shape)
        chunk = self._read(opened, table, row, decode)
        if chunk is None:
            file, offset = _place_of(opened, table, row)
            what = f"{opened.index.key(row)} lacks {table}, which its index says is there"
            raise CorruptError(f"{file} at {offset}: {what}", file=file, offset=offset)
        return chunk

    def _read(
        self,
        opened: OpenShard,
        table: str,
        row: int,
        decode: Callable[[bytes], T],
        *,
        tail: NDArray[np.uint8] | None = None,
    ) -> T | None:
        """A row's member of a table, checked and decoded; None where the sample lacks it.

        See :meth:`shared.shardset.columns.ColumnFile.read` for `tail`.
        """
        file, offset = _place_of(opened, table, row)
        try:
            member = self._read_member(opened, table, row, tail=tail)
        except ShardError as error:  # a missing file is as bad as a damaged one
            raise CorruptError(str(error), file=file, offset=offset) from error
        if member is None:
            return None
        try:
            decoded = decode(member)
        except CorruptError as error:
            origin = opened.files[_column_of(table)].origin
            what = f"{origin} at {offset}: {error}"
            raise CorruptError(what, file=file, offset=offset) from error
        self.on_stage("decode")
        return decoded

    def _read_member(
        self, opened: OpenShard, table: str, row: int, *, tail: NDArray[np.uint8] | None
    ) -> bytes | None:
        """Checked bytes of a row's member; None where the sample lacks it."""
        index, column = opened.index, _column_of(table)
        options: dict[str, Any] = {
            "max_bytes": self._limits[table],
            "tail": tail,
            "on_stage": self.on_stage,
        }
        self.on_stage("collate")
        for is_renewed in (False, True):
            if column not in opened.files:
                self._make_room_for(opened)
                opened.files[column] = self._open_column(index, column)
                self.on_stage("open")
            file = opened.files[column]
            try:
                return file.read(index.members(table), row, **options)
            except CorruptError:
                if is_renewed or not self._refetch(index, column):
                    raise
            if column in opened.files:
                opened.files.pop(column).close()
        raise AssertionError("unreachable")

    def _open_column(self, index: ShardIndex, column: str) -> ColumnFile:
        header = index.columns[column]
        sha256, length_bytes = header.get("sha256"), header.get("length_bytes")
        return self._store.open_column(header["file"], sha256=sha256, length_bytes=length_bytes)

    def _refetch(self, index: ShardIndex, column: str) -> bool:
        """Download a damaged column again; return whether it may be good now."""
        if not isinstance(self._store, CachedShardSet):
            return False
        return self._store.refetch_column(index, column)

    def _make_room_for(self, opened: OpenShard) -> None:
        """Close the columns of other shards, longest unused first, where too many are open."""
        others = [each for each in self._open.values() if each.files and each is not opened]
        for each in others[: max(0, len(others) - MAX_OPEN_SHARDS + 1)]:
            each.close()

    def _decode_text(self, member: bytes, *, start_s: float) -> Text:
        """A text member, if its tokens are of the set's vocabulary (a model has no row for others)
        and of the window that begins at `start_s`.
        """
        text = decode_text(member)
        stop_s = start_s + self.recipe.window.duration_s
        for tokens in (text.internal, text.external):
            if max(tokens.ids, default=0) >= self.recipe.text.vocab_size:
                raise CorruptError(
                    f"token {max(tokens.ids)} is not of the vocabulary of "
                    f"{self.recipe.text.vocab_size}; run `python -m preprocess verify SHARDS`"
                )
            for time_s in tokens.time_s and (min(tokens.time_s), max(tokens.time_s)):
                if not start_s - EPSILON_S <= time_s < stop_s + EPSILON_S:
                    raise CorruptError(
                        f"a token at {time_s:g} s is not of the window [{start_s:g}, {stop_s:g}) "
                        "s; run `python -m preprocess verify SHARDS`"
                    )
        return text


def _column_of(table: str) -> str:
    """The column that a table of members is of."""
    return table.partition("/")[0]


def _place_of(opened: OpenShard, table: str, row: int) -> tuple[str, int]:
    """File of a row's member, by its name in the set, and where in it that lies."""
    file: str = opened.index.columns[_column_of(table)]["file"]
    return file, int(opened.index.arrays[f"{table}.offset"][row])


def _nothing_open() -> bool:
    return False
