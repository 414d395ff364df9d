"""Files of a set that are not the bytes that its indexes mean; their sizes tell only of some."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from preprocess.build.cluster import Cluster
    from preprocess.build.places import ShardSetStore

_HASHED_BYTES_PER_S = 200e6


def find_corrupt_files(
    indexes: Sequence[str], place: ShardSetStore, sizes: Mapping[str, int], cluster: Cluster
) -> dict[str, str]:
    """Column files whose bytes differ from the checksum in their index: file name -> what is wrong.

    Args:
        indexes: names of the indexes; what one that can't be read leads to is not looked at.
        place: the set.
        sizes: file name -> bytes, of all files of the set.
        cluster: reads the files.
    """
    seconds = sum(sizes.values()) / _HASHED_BYTES_PER_S
    found = cluster.map(_Check(place), indexes, what="check shards", work_s=seconds)
    return {file: "its bytes differ from their checksum" for files in found for file in files}


@dataclass(frozen=True, slots=True)
class _Check:
    """Damaged column files of one shard; crosses processes."""

    place: ShardSetStore

    def __call__(self, index_file: str) -> list[str]:
        try:
            columns = self.place.read_index(index_file).facts["columns"].values()
            return [c["file"] for c in columns if not self._is_whole(c["file"], c["sha256"])]
        except (ShardError, KeyError, TypeError):
            return []

    def _is_whole(self, file: str, sha256: str) -> bool:
        """Whether a file has this checksum; one that is not there is no damaged one."""
        with self.place.workplace() as work:
            try:
                with (
                    self.place.open_column(file, work) as column,
                    column.path.open("rb") as content,
                ):
                    return hashlib.file_digest(content, "sha256").hexdigest() == sha256
            except ShardError:
                return True
