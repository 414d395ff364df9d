"""The shard set that a build updates: what its shards hold, and which rows can be reused.

A row is reused if everything that it depends on is the same as now: the session's windows and files
(hashed per session and column) and the recipe's settings of the column.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from preprocess.build.plan_types import (
    BuiltShard,
    Cause,
    FromSession,
    FromShards,
    PreviousSet,
    SessionWindows,
    built_columns,
)
from preprocess.build.sources import HASHED_BYTES_PER_S
from shared.errors import CorruptError, FormatVersionError, ShardError
from shared.files import fingerprint_of
from shared.session.folder import AUDIO_FILE, METADATA_FILE, SOURCE_FILES, TEXT_FILE
from shared.shardset.layout import COLUMNS, Column, presence_bits

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from preprocess.build.cluster import Cluster
    from preprocess.build.plan_types import BuiltColumn
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan
    from shared.shardset.manifest import Manifest, ShardEntry
    from shared.shardset.store import ShardSetStore


def read_previous_set(
    manifest: Manifest,
    store: ShardSetStore,
    sizes: Mapping[str, int],
    *,
    corrupt: Collection[str] = (),
) -> PreviousSet:
    """Describe a finished set for the plan; shards with an unreadable index are listed as lost.

    Args:
        manifest: the set's manifest.
        store: the set's files.
        sizes: file name -> bytes, of all files of the set.
        corrupt: column files of the right size whose bytes differ from their checksum.

    Raises:
        FormatVersionError: an index has a version that this program does not read.
    """
    shards, lost = [], []
    for entry in manifest.shards:
        try:
            shards.append(_describe_shard(entry, store, sizes, corrupt))
        except FormatVersionError:
            raise
        except (ShardError, KeyError, TypeError):
            lost.append(entry)
    return PreviousSet(
        recipe=manifest.recipe,
        generation=manifest.generation,
        shards=tuple(shards),
        lost=tuple(lost),
    )


def _describe_shard(
    entry: ShardEntry, store: ShardSetStore, sizes: Mapping[str, int], corrupt: Collection[str]
) -> BuiltShard:
    index = store.read_index(entry.index_file, sha256=entry.index_sha256)
    if index.num_samples != entry.num_samples:
        raise CorruptError(
            f"{store}/{entry.index_file}: has {index.num_samples} samples, the manifest says "
            f"{entry.num_samples}"
        )
    header, columns = index.header, built_columns(index)
    faults = {}
    for name, column in columns.items():
        if sizes.get(column.file) != column.length_bytes:
            faults[name] = Cause.FILE_MISSING
        elif column.file in corrupt:
            faults[name] = Cause.FILE_CORRUPT
    return BuiltShard(
        name=entry.name,
        split=entry.split,
        sessions=tuple(SessionWindows(name, tuple(windows)) for name, windows in header["slices"]),
        index_file=entry.index_file,
        columns=columns,
        faults=faults,
        decode_failures=frozenset((f["session"], f["stream"]) for f in header["losses"]),
    )


def find_corrupt_files(
    indexes: Sequence[str], store: ShardSetStore, sizes: Mapping[str, int], cluster: Cluster
) -> set[str]:
    """Find column files whose bytes differ from the checksum in their index.

    Args:
        indexes: names of the indexes; an unreadable index is skipped.
        store: the set's files.
        sizes: file name -> bytes, of all files of the set.
        cluster: reads the files.
    """
    seconds = sum(sizes.values()) / HASHED_BYTES_PER_S
    find = partial(_corrupt_columns, store=store)
    corrupt = cluster.map(find, indexes, label="check shards", work_s=seconds)
    return {file for files in corrupt for file in files}


def _corrupt_columns(index_file: str, *, store: ShardSetStore) -> list[str]:
    """Find the corrupt column files of one shard."""
    try:
        columns = store.read_index(index_file).columns.values()
        return [c["file"] for c in columns if _is_corrupt(c["file"], c["sha256"], store)]
    except (ShardError, KeyError, TypeError):
        return []


def _is_corrupt(file: str, sha256: str, store: ShardSetStore) -> bool:
    """Return whether a file has another checksum; a missing file is not corrupt."""
    try:
        with closing(store.open_column(file)) as column:
            return column.sha256() != sha256
    except ShardError:
        return False


# --- rows ------------------------------------------------------------------------------------


def row_hash(
    session_windows: SessionWindows, column: Column, scan: SessionScan, recipe: Recipe
) -> str:
    """Hash everything that the rows of a session depend on in a column, besides the recipe.

    Args:
        session_windows: the windows of the session that the shard holds.
        column: the column.
        scan: the session as it is now.
        recipe: decides which streams are present in a window.
    """
    sources = {n: scan.source_files[n].sha256 for n in column.sources if n in scan.source_files}
    offset_s = scan.clock_offset_s if METADATA_FILE in column.sources else 0.0
    gain = scan.gain if AUDIO_FILE in column.sources else 1.0
    # Text covers the whole session, so the length of another stream can change its presence.
    windows = scan.windows(recipe)
    bits = [
        presence_bits(set(scan.present(windows[w], recipe)) & set(column.streams))
        for w in session_windows.windows
    ]
    inputs = [session_windows.session, session_windows.windows, bits, sources, offset_s, gain]
    # Only sessions with declared starts hash them: the hashes of the others stay the same.
    starts = {s: scan.start_overrides[s] for s in column.streams if s in scan.start_overrides}
    return fingerprint_of([*inputs, starts] if starts else inputs)


def recipe_part(basis: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a column depends on besides its rows."""
    return {key: value for key, value in basis.items() if key != "rows"}


class PreviousRows:
    """Rows of the previous set, compared with the sessions as they are now.

    Args:
        shards: the shards of the previous set.
        scans: every session, by name.
        recipe: the recipe to build by.
    """

    def __init__(
        self, shards: Iterable[BuiltShard], scans: Mapping[str, SessionScan], recipe: Recipe
    ) -> None:
        self._scans = scans
        self._recipe = recipe
        self._stored: dict[str, list[tuple[BuiltShard, SessionWindows]]] = {}
        for shard in shards:
            for session_windows in shard.sessions:
                self._stored.setdefault(session_windows.session, []).append(
                    (shard, session_windows)
                )

    def __contains__(self, session: str) -> bool:
        return session in self._stored

    def choose_source(
        self, session_windows: SessionWindows, column: Column, basis: Mapping[str, Any]
    ) -> FromShards | FromSession:
        """Find previous shards that hold all rows as they would be made now, or the recording.

        Args:
            session_windows: the windows to find.
            column: the column of the rows.
            basis: what the column depends on now.
        """
        missing, files = set(session_windows.windows), []
        for shard, stored in self._stored.get(session_windows.session, ()):
            built = shard.columns.get(column.name)
            if built is None or column.name in shard.faults or missing.isdisjoint(stored.windows):
                continue
            # Which windows of a broken video decode depends on where decoding begins.
            if (
                stored != session_windows
                and (session_windows.session, column.name) in shard.decode_failures
            ):
                continue
            has_same_settings = recipe_part(built.basis) == recipe_part(basis)
            if has_same_settings and self._is_same(built, stored, column):
                files.append(shard.index_file)
                missing -= set(stored.windows)
        return FromSession() if missing else FromShards(tuple(files))

    def describe_session_changes(
        self, session: str, windows: Sequence[int], column: Column | None
    ) -> str:
        """Describe what changed in a session, or in what a column takes from it; empty for nothing.

        Only hashes of the previous rows are known. The columns whose hash changed show which files
        changed.
        """
        runs = self._stored[session]
        before = [w for _, stored in runs for w in stored.windows]
        if before != list(windows):
            has_as_many = len(before) == len(windows)
            return "other windows" if has_as_many else f"{len(before)} -> {len(windows)} windows"
        changed = {
            name
            for shard, stored in runs
            for name, built in shard.columns.items()
            if not self._is_same(built, stored, COLUMNS[name])
        }
        files = [f for f in SOURCE_FILES if _columns_of(f) and _columns_of(f) <= changed]
        if METADATA_FILE in files and TEXT_FILE in files:
            files.remove(TEXT_FILE)  # a changed metadata.jsonl explains the text column
        return ", ".join(f for f in files if column is None or f in column.sources)

    def _is_same(self, built: BuiltColumn, stored: SessionWindows, column: Column) -> bool:
        """Return whether the rows of a session have the hash that they would have now."""
        scan = self._scans.get(stored.session)
        if scan is None or max(stored.windows) >= len(scan.coverage):
            return False
        now = row_hash(stored, column, scan, self._recipe)
        return built.rows.get(stored.session) == now


def _columns_of(file: str) -> set[str]:
    """List the columns that take something from a file of a session."""
    return {name for name, column in COLUMNS.items() if file in column.sources}
