"""A shard set as a source of samples: one ``pread`` per member, only of the fields that are wanted.

Index and column files are opened at their first use and the least recently used are closed. Every
member is checked against its CRC32C before it is decoded. Where the set lies behind a URL, the
files are copies in this machine's cache (:mod:`train.data.remote`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shared.codec import decode_pictures, decode_text, is_stored_as_in
from shared.columns import ColumnFile, read_chunk
from shared.errors import MEND_SET, CorruptError, ShardError
from shared.fields import Mel, Text
from shared.hold import read_held
from shared.index import ShardIndex, open_index
from shared.laps import Lap, no_lap
from shared.layout import streams_of_bits
from shared.pictures import require_npy_head
from shared.recipe import Split, Stream
from shared.storage import Store, place_of
from train.config import TEXT_STREAMS
from train.data.inputs import VISION_STREAMS
from train.data.remote import CacheSettings, RemoteFiles
from train.data.source import SENSORS, write_absent, write_mel, write_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.manifest import ShardEntry

MAX_OPEN_SHARDS = 64
"""Shards kept open at once, a few file descriptors each: two blocks of the default shuffle."""


READ_COLUMNS = {
    **{stream: str(stream) for stream in VISION_STREAMS},
    **dict.fromkeys(SENSORS, "proprio"),
    Stream.AUDIO: "dmel",
    **dict.fromkeys(TEXT_STREAMS, "text"),
}
"""The column that each stream is read from."""


class SetFiles(Protocol):
    """Where a set's files come from. `let_go` closes a shard to make room, if one is open."""

    def open_index(self, entry: ShardEntry, *, let_go: Callable[[], bool]) -> ShardIndex:
        """A shard's index."""
        ...

    def open_column(
        self, index: ShardIndex, column: str, *, let_go: Callable[[], bool]
    ) -> ColumnFile:
        """A column's file."""
        ...

    def renew_column(self, index: ShardIndex, column: str, *, let_go: Callable[[], bool]) -> bool:
        """Get a damaged column anew; False where that does not help."""
        ...

    def fetch_ahead(self, entries: Sequence[ShardEntry], columns: Sequence[str]) -> None:
        """Get what will be read."""
        ...

    def close(self) -> None:
        """Let go of the set."""
        ...


class LocalFiles:
    """A set in a folder, which is held while it is read; see :mod:`shared.hold`."""

    def __init__(self, root: Path) -> None:
        self.manifest, self._hold = read_held(root)
        self.tokenizer = self.manifest.load_tokenizer()

    def open_index(self, entry: ShardEntry, *, let_go: Callable[[], bool]) -> ShardIndex:
        """A shard's index, mapped."""
        del let_go
        return open_index(self.manifest.root / entry.index_file, sha256=entry.index_sha256)

    def open_column(
        self, index: ShardIndex, column: str, *, let_go: Callable[[], bool]
    ) -> ColumnFile:
        """A column's file."""
        del let_go
        return ColumnFile(self.manifest.root / index.facts["columns"][column]["file"])

    def renew_column(self, index: ShardIndex, column: str, *, let_go: Callable[[], bool]) -> bool:
        """Nothing helps."""
        del index, column, let_go
        return False

    def fetch_ahead(self, entries: Sequence[ShardEntry], columns: Sequence[str]) -> None:
        """Nothing: all is here."""

    def close(self) -> None:
        """Hold the set no longer."""
        if self._hold is not None:
            self._hold.close()

    def __getstate__(self) -> dict[str, Any]:
        """The hold stays with the first process, which outlives the others."""
        return {**self.__dict__, "_hold": None}


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
        StorageError, ConfigError: see :class:`train.data.remote.RemoteFiles`.
    """

    def __init__(
        self, root: Path | str, *, split: Split = "train", cache: CacheSettings | None = None
    ) -> None:
        place = place_of(root)
        files = (
            RemoteFiles(place, cache or CacheSettings())
            if isinstance(place, Store)
            else LocalFiles(place)
        )
        self._files: SetFiles = files
        self.manifest, self.tokenizer = files.manifest, files.tokenizer
        self.recipe = self.manifest.recipe
        self.fingerprint = f"{self.manifest.fingerprint}/{split}"
        self._entries = self.manifest.in_split(split)
        self.shard_sizes = np.array([e.num_samples for e in self._entries], dtype=np.int64)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self.lap: Lap = no_lap
        """Told when a stage of reading is over: open, fetch, checksum, decode, collate."""
        self.let_go_of_others: Callable[[], bool] = _nothing_to_let_go
        """Closes something that other sources of this process read; whether anything was open."""

    def key(self, shard: int, row: int) -> str:
        """SESSION/WINDOW."""
        return self.shard(shard).index.key(row)

    def start_s(self, shard: int, row: int) -> float:
        """When the window begins on the session clock."""
        return float(self.shard(shard).index.arrays["start_s"][row])

    def present(self, shard: int, row: int) -> tuple[Stream, ...]:
        """Streams that the sample has."""
        return streams_of_bits(int(self.shard(shard).index.arrays["present"][row]))

    def shard(self, shard: int) -> OpenShard:
        """The shard, opened if need be.

        Raises:
            CorruptError: its index is missing, damaged or not the manifest's.
        """
        found = self._open.get(shard)
        if found is None:
            entry = self._entries[shard]
            try:
                index = self._files.open_index(entry, let_go=lambda: self._let_go(num_kept=0))
            except ShardError as error:  # a missing file is as bad as a damaged one
                raise CorruptError(str(error)) from error
            found = OpenShard(index)
            if found.index.num_samples != entry.num_samples:
                raise CorruptError(
                    f"{entry.index_file}: has {found.index.num_samples} rows, manifest says "
                    f"{entry.num_samples}; {MEND_SET}"
                )
            self._open[shard] = found
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return found

    def will_read(self, shards: Iterable[int], streams: Collection[Stream]) -> None:
        """See :meth:`train.data.source.SampleSource.will_read`; closes what isn't read any more."""
        wanted = list(dict.fromkeys(shards))
        for shard in self._open.keys() - set(wanted):
            self._open.pop(shard).close()
        columns = sorted({READ_COLUMNS[stream] for stream in streams})
        self._files.fetch_ahead([self._entries[shard] for shard in wanted], columns)

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[np.generic]], *, with_text: bool
    ) -> Text | None:
        """See :meth:`train.data.source.SampleSource.read_into`."""
        try:
            opened = self.shard(shard)
            self.lap("open")
            text = self._read_into(opened, row, out, with_text=with_text)
            self.lap("collate")
            return text
        except CorruptError:
            raise
        except ShardError as error:
            raise CorruptError(str(error)) from error

    def close(self) -> None:
        """Close all files and hold the set no longer; the next read opens its files again."""
        while self._open:
            self._open.popitem()[1].close()
        self._files.close()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files: another process opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def let_go(self, *, num_kept: int = 0) -> bool:
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

    def _let_go(self, *, num_kept: int = 1) -> bool:
        """:meth:`let_go`, or else what others read."""
        return self.let_go(num_kept=num_kept) or self.let_go_of_others()

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
        present = streams_of_bits(int(opened.index.arrays["present"][row]))
        write_absent(out, (s for s in (*SENSORS, Stream.AUDIO) if s not in present))
        for stream in SENSORS:
            if stream in out and stream in present:
                chunk = self._read(opened, "proprio", f"proprio/{stream}", row)
                values = read_chunk(chunk or b"", dtype="f4", shape=out[stream].shape)
                self.lap("decode")
                write_numbers(out, stream, values)
        if Stream.AUDIO in out and Stream.AUDIO in present:
            levels = self._read(opened, "dmel", "dmel/dmel", row) or b""
            valid = self._read(opened, "dmel", "dmel/valid", row) or b""
            shape = out[Stream.AUDIO].shape
            write_mel(
                out,
                Mel(
                    levels=read_chunk(levels, dtype="u1", shape=shape),
                    valid=read_chunk(valid, dtype="u1", shape=shape[:1]).astype(np.bool_),
                ),
            )
        if with_text:
            member = self._read(opened, "text", "text", row)
            text = None if member is None else self._known_tokens(decode_text(member))
            self.lap("decode")
            return text
        return None

    def _read_pictures(
        self, opened: OpenShard, eye: Stream, row: int, out: NDArray[np.uint8]
    ) -> bool:
        """Write an eye's pictures; False where the sample lacks them."""
        recipe = self.recipe.vision
        if not is_stored_as_in(out, recipe=recipe):
            member = self._read(opened, eye, eye, row)
            if member is not None:
                decode_pictures(member, recipe=recipe, out=out)
                self.lap("decode")
            return member is not None
        head = self._read(opened, eye, eye, row, tail=out)
        if head is not None:
            require_npy_head(head, out)
        return head is not None

    def _read(
        self,
        opened: OpenShard,
        column: str,
        members: str,
        row: int,
        *,
        tail: NDArray[np.uint8] | None = None,
    ) -> bytes | None:
        """Checked bytes of a row: `members` of `column`; None where the sample lacks it.

        See :meth:`shared.columns.ColumnFile.read` for `tail`.
        """
        index, let_go = opened.index, self._let_go
        self.lap("collate")
        for is_renewed in (False, True):
            if column not in opened.files:
                opened.files[column] = self._files.open_column(index, column, let_go=let_go)
                self.lap("open")
            file = opened.files[column]
            try:
                return file.read(index.members(members), row, tail=tail, lap=self.lap)
            except CorruptError:
                if is_renewed or not self._files.renew_column(index, column, let_go=let_go):
                    raise
            if column in opened.files:
                opened.files.pop(column).close()
        raise AssertionError("unreachable")

    def _known_tokens(self, text: Text) -> Text:
        """The text, if its tokens are of the set's vocabulary; a model has no row for others."""
        for tokens in (text.internal, text.external):
            if max(tokens.ids, default=0) >= self.recipe.text.vocab_size:
                raise CorruptError(
                    f"token {max(tokens.ids)} is not of the vocabulary of "
                    f"{self.recipe.text.vocab_size}; run `python -m preprocess verify`"
                )
        return text


def _nothing_to_let_go() -> bool:
    return False
