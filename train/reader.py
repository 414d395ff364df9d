"""A shard set as a source of samples: one ``pread`` per member, only of the fields that are wanted.

Index and column files are opened at their first use and the least recently used are closed. Every
member is checked against its CRC32C before it is decoded.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.codec import decode_pictures, decode_text
from shared.columns import ColumnFile, read_chunk
from shared.errors import CorruptError, ShardError
from shared.fields import Mel, Text
from shared.hold import read_held
from shared.index import ShardIndex, open_index
from shared.layout import streams_of_bits
from shared.recipe import Split, Stream
from train.inputs import VISION_STREAMS
from train.source import SENSORS, write_absent, write_mel, write_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MAX_OPEN_SHARDS = 64
"""Shards kept open at once, a few file descriptors each: two blocks of the default shuffle."""


class OpenShard:
    """One shard's index and the columns that were asked for."""

    def __init__(self, root: Path, index: ShardIndex) -> None:
        self.index = index
        self._root = root
        self._files: dict[str, ColumnFile] = {}

    def read(self, column: str, members: str, row: int) -> bytes | None:
        """Checked bytes of a row: `members` of `column`; None where the sample lacks it."""
        if column not in self._files:
            name = self.index.facts["columns"][column]["file"]
            self._files[column] = ColumnFile(self._root / name)
        return self._files[column].read(self.index.members(members), row)

    def close(self) -> None:
        """Close its files."""
        for file in self._files.values():
            file.close()


class ShardSource:
    """Samples of one split of a shard set; safe to send to another process.

    Args:
        root: the shard set's folder.
        split: which sessions.

    Raises:
        ShardError: no such set, or no sample in that split.
    """

    def __init__(self, root: Path | str, *, split: Split = "train") -> None:
        self.manifest, self._hold = read_held(Path(root))
        self.recipe = self.manifest.recipe
        self.fingerprint = f"{self.manifest.fingerprint}/{split}"
        self.tokenizer = self.manifest.load_tokenizer()
        self._entries = self.manifest.in_split(split)
        self.shard_sizes = np.array([e.num_samples for e in self._entries], dtype=np.int64)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

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
            path = self.manifest.root / entry.index_file
            try:
                index = open_index(path, sha256=entry.index_sha256)
            except ShardError as error:  # a missing file is as bad as a damaged one
                raise CorruptError(str(error)) from error
            found = OpenShard(self.manifest.root, index)
            if found.index.num_samples != entry.num_samples:
                raise CorruptError(
                    f"{path}: has {found.index.num_samples} rows, manifest says "
                    f"{entry.num_samples}; rebuild by `make shards`"
                )
            self._open[shard] = found
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return found

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[np.generic]], *, with_text: bool
    ) -> Text | None:
        """See :meth:`train.source.SampleSource.read_into`."""
        try:
            return self._read_into(self.shard(shard), row, out, with_text=with_text)
        except CorruptError:
            raise
        except ShardError as error:
            raise CorruptError(str(error)) from error

    def close(self) -> None:
        """Close all files and hold the set no longer; the next read opens its files again."""
        while self._open:
            self._open.popitem()[1].close()
        if self._hold is not None:
            self._hold.close()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files: another process opens its own. The hold stays with the
        first, which outlives it.
        """
        return {**self.__dict__, "_open": OrderedDict(), "_hold": None}

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
                member = opened.read(stream, stream, row)
                if member is None:
                    write_absent(out, [stream])
                    continue
                decode_pictures(member, recipe=self.recipe.vision, out=out[stream])
                error_s = opened.index.arrays[f"{stream}.error_s"][row]
                out[f"{stream}_valid"][...] = np.isfinite(error_s)
        present = streams_of_bits(int(opened.index.arrays["present"][row]))
        write_absent(out, (s for s in (*SENSORS, Stream.AUDIO) if s not in present))
        for stream in SENSORS:
            if stream in out and stream in present:
                chunk = opened.read("proprio", f"proprio/{stream}", row)
                shape = out[stream].shape
                write_numbers(out, stream, read_chunk(chunk or b"", dtype="f4", shape=shape))
        if Stream.AUDIO in out and Stream.AUDIO in present:
            levels = opened.read("dmel", "dmel/dmel", row) or b""
            valid = opened.read("dmel", "dmel/valid", row) or b""
            shape = out[Stream.AUDIO].shape
            write_mel(
                out,
                Mel(
                    levels=read_chunk(levels, dtype="u1", shape=shape),
                    valid=read_chunk(valid, dtype="u1", shape=shape[:1]).astype(np.bool_),
                ),
            )
        if with_text:
            member = opened.read("text", "text", row)
            return None if member is None else self._known_tokens(decode_text(member))
        return None

    def _known_tokens(self, text: Text) -> Text:
        """The text, if its tokens are of the set's vocabulary; a model has no row for others."""
        for tokens in (text.internal, text.external):
            if max(tokens.ids, default=0) >= self.recipe.text.vocab_size:
                raise CorruptError(
                    f"token {max(tokens.ids)} is not of the vocabulary of "
                    f"{self.recipe.text.vocab_size}; run `python -m preprocess verify`"
                )
        return text
