"""Fingerprints of rows, and which rows of the previous set can be reused."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shared.errors import ShardError
from shared.files import fingerprint_of
from shared.session.folder import AUDIO_FILE, METADATA_FILE, SOURCE_FILES, TEXT_FILE
from shared.shardset.layout import COLUMNS, Column, column_basis, presence_bits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from preprocess.build.cluster import Cluster
    from preprocess.build.shards import BuiltColumn, BuiltShard, SessionWindows
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan
    from shared.shardset.store import ShardSetStore


def row_facts(
    slices: Sequence[SessionWindows],
    column: Column,
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
) -> dict[str, list[Any]]:
    """Session -> its rows in a shard, and the sources and facts that a column takes from it."""
    facts = {}
    for piece in slices:
        scan = scans[piece.session]
        sources = {n: scan.sources[n].sha256 for n in column.sources if n in scan.sources}
        offset_s = scan.clock_offset_s if METADATA_FILE in column.sources else 0.0
        gain = scan.gain if AUDIO_FILE in column.sources else 1.0
        # Text lies over the whole session, so that another stream's new length can move it.
        windows = scan.windows(recipe)
        bits = [
            presence_bits(set(scan.present(windows[w], recipe)) & set(column.streams))
            for w in piece.windows
        ]
        moved = {s: scan.start_overrides[s] for s in column.streams if s in scan.start_overrides}
        facts[piece.session] = [piece.session, piece.windows, bits, sources, offset_s, gain]
        facts[piece.session] += [moved] if moved else []  # others hash as they always did
    return facts


def settings_of(basis: Mapping[str, Any]) -> dict[str, Any]:
    """What a column depends on besides its rows."""
    return {key: value for key, value in basis.items() if key != "rows"}


def is_up_to_date(
    built: BuiltColumn, basis: Mapping[str, Any], facts: Mapping[str, list[Any]]
) -> bool:
    """Whether a column is what it would be if it were made now."""
    if built.fingerprint == fingerprint_of(basis):
        return True
    # Format 1 hashed the facts of all sessions at once.
    in_format_1 = {**basis, "rows": fingerprint_of(list(facts.values()))}
    return not built.rows and built.fingerprint == fingerprint_of(in_format_1)


class PreviousRows:
    """The rows of an old set beside the sessions as they are now.

    Args:
        shards: the old set's.
        scans: every session, by name.
        recipe: the recipe to build by.
        tokenizer_sha256: hash of the tokenizer that text will be encoded with.
    """

    def __init__(
        self,
        shards: Iterable[BuiltShard],
        scans: Mapping[str, SessionScan],
        recipe: Recipe,
        *,
        tokenizer_sha256: str,
    ) -> None:
        self._scans = scans
        self._recipe = recipe
        self._tokenizer_sha256 = tokenizer_sha256
        self._homes: dict[str, list[tuple[BuiltShard, SessionWindows]]] = {}
        for shard in shards:
            known = self._with_hashes(shard)
            for piece in shard.slices:
                self._homes.setdefault(piece.session, []).append((known, piece))

    def __contains__(self, session: str) -> bool:
        return session in self._homes

    def find(
        self, piece: SessionWindows, column: Column, basis: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Indexes of the shards in which all rows of a slice lie as they would be made now; none
        where some do not.

        Args:
            piece: the slice.
            column: of which column.
            basis: what the column depends on.
        """
        missing, files = set(piece.windows), []
        for shard, lain in self._homes.get(piece.session, ()):
            built = shard.columns.get(column.name)
            if built is None or column.name in shard.faults or missing.isdisjoint(lain.windows):
                continue
            # What else of a broken video decodes depends on where decoding begins.
            if lain != piece and (piece.session, column.name) in shard.losses:
                continue
            if settings_of(built.basis) == settings_of(basis) and self._is_same(
                built, lain, column
            ):
                files.append(shard.index_file)
                missing -= set(lain.windows)
        return () if missing else tuple(files)

    def change(self, session: str, windows: Sequence[int], column: Column | None) -> str:
        """What of a session, or of what a column takes from it, is not as it was, in words; empty
        for nothing.

        Only hashes of the old rows are known: which file it is, the columns that changed tell.
        """
        homes = self._homes[session]
        before = [w for _, piece in homes for w in piece.windows]
        if before != list(windows):
            is_as_many = len(before) == len(windows)
            return "other windows" if is_as_many else f"{len(before)} -> {len(windows)} windows"
        changed = {
            name
            for shard, piece in homes
            for name, built in shard.columns.items()
            if built.rows and not self._is_same(built, piece, COLUMNS[name])
        }
        files = [f for f in SOURCE_FILES if _columns_of(f) and _columns_of(f) <= changed]
        if METADATA_FILE in files and TEXT_FILE in files:
            files.remove(TEXT_FILE)  # the other one explains it
        return ", ".join(f for f in files if column is None or f in column.sources)

    def _is_same(self, built: BuiltColumn, piece: SessionWindows, column: Column) -> bool:
        """Whether a session's rows in an old column have the hash that they would have now."""
        facts = self._facts([piece], column)
        if facts is None:
            return False
        return built.rows.get(piece.session) == fingerprint_of(facts[piece.session])

    def _facts(
        self, slices: Sequence[SessionWindows], column: Column
    ) -> dict[str, list[Any]] | None:
        """See :func:`row_facts`; None where a session lacks some of these windows by now."""
        for piece in slices:
            scan = self._scans.get(piece.session)
            if scan is None or max(piece.windows) >= len(scan.coverage):
                return None
        return row_facts(slices, column, self._scans, self._recipe)

    def _with_hashes(self, shard: BuiltShard) -> BuiltShard:
        """A shard that knows the hashes of its sessions also where its columns have none."""
        columns = dict(shard.columns)
        for name, built in shard.columns.items():
            facts = None if built.rows else self._facts(shard.slices, COLUMNS[name])
            if facts is None:
                continue
            settings = column_basis(
                COLUMNS[name], self._recipe, tokenizer_sha256=self._tokenizer_sha256
            )
            rows = {session: fingerprint_of(of) for session, of in facts.items()}
            if is_up_to_date(
                built, {**settings, "rows": fingerprint_of(list(rows.values()))}, facts
            ):
                columns[name] = replace(built, rows=rows)
        return replace(shard, columns=columns)


def _columns_of(file: str) -> set[str]:
    """Columns that take something from a file of a session."""
    return {name for name, column in COLUMNS.items() if file in column.sources}


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
            columns = self.place.read_index(index_file).columns.values()
            return [c["file"] for c in columns if not self._is_whole(c["file"], c["sha256"])]
        except (ShardError, KeyError, TypeError):
            return []

    def _is_whole(self, file: str, sha256: str) -> bool:
        """Whether a file has this checksum; one that is not there is no damaged one."""
        try:
            with closing(self.place.open_column(file)) as column:
                return column.sha256() == sha256
        except ShardError:
            return True
