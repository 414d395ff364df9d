"""One task, one shard: write the columns that are due and the index, under temporary names, then
rename.

:func:`build_shard` is an ordinary function of plain values. The Dask job calls it in its workers, a
test in its own process; the bytes are the same.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.plan import BuiltColumn, BuiltShard, ShardTask, Slice
from preprocess.write import ZARR_WRITERS, Draft, Row, write_tar
from shared.errors import ShardError
from shared.fields import SessionFields
from shared.index import ShardIndex, index_bytes, open_index
from shared.layout import COLUMNS, presence_bits
from shared.manifest import (
    ShardEntry,
    fingerprint_of,
    sync_folder,
    temporary_path,
    write_durably,
)
from shared.recipe import STREAMS, Recipe
from shared.text import parse_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.scan import SessionScan


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInput:
    """All that a shard task needs besides the task itself."""

    out: Path
    recipe: Recipe
    tokenizer_json: str
    paths: Mapping[str, Path]
    """Session name -> folder, of the task's sessions."""
    scans: Mapping[str, SessionScan]


def build_shard(task: ShardTask, given: BuildInput) -> ShardEntry:
    """Write what is due of one shard.

    Returns:
        The shard's line in the manifest.

    Raises:
        SessionError: a session's folder or file went away since it was scanned.
        OSError: the disk is full, or the folder can't be written.
    """
    finished = _finished(task, given)
    if finished is not None:
        return finished
    # From here on its columns are replaced: a killed run's index must not vouch for them.
    (given.out / task.file_name("index")).unlink(missing_ok=True)
    tokenizer = parse_tokenizer(given.tokenizer_json, origin="the shard set's tokenizer")
    draft = Draft(rows=list(_rows(task, given)))
    readers = {
        name: SessionFields(
            given.paths[name], given.scans[name], recipe=given.recipe, tokenizer=tokenizer
        )
        for name in dict.fromkeys(row.session for row in draft.rows)
    }
    presence = np.zeros(len(draft.rows), dtype=np.uint8)
    old = open_index(given.out / task.old_index_file) if task.kept and task.old_index_file else None
    for name, column in COLUMNS.items():
        mask = presence_bits(column.streams)
        if name in task.kept and old is not None:
            _keep_column(draft, name, task.kept[name], old)
            presence |= old.arrays["present"] & np.uint8(mask)
            continue
        path = given.out / task.file_name(f"{name}.{column.suffix}")
        with _written(path) as temporary:
            if column.kind == "tar":
                presence |= write_tar(draft, name, temporary, readers, given.recipe)
            else:
                presence |= ZARR_WRITERS[name](draft, temporary, readers, given.recipe) & np.uint8(
                    mask
                )
        draft.columns[name] = BuiltColumn(
            file=path.name,
            length_bytes=path.stat().st_size,
            sha256=_sha256(path),
            fingerprint=fingerprint_of(task.bases[name]),
            basis=task.bases[name],
        )
    sync_folder(given.out)
    return _write_index(task, given, draft, presence)


def _finished(task: ShardTask, given: BuildInput) -> ShardEntry | None:
    """The shard as a killed run left it, if that had finished it; the index is written last."""
    path = given.out / task.file_name("index")
    try:
        index = open_index(path)
        columns = _columns(index)
    except (ShardError, KeyError, TypeError):
        return None
    wanted = {name: fingerprint_of(basis) for name, basis in task.bases.items()}
    slices = [[piece.session, list(piece.windows)] for piece in task.slices]
    is_same = {n: c.fingerprint for n, c in columns.items()} == wanted
    if not is_same or index.facts["slices"] != slices:
        return None
    if not all(_has_size(given.out / c.file, c.length_bytes) for c in columns.values()):
        return None
    return _entry(task, path, index.num_samples, columns)


def _entry(
    task: ShardTask, index_path: Path, num_samples: int, columns: Mapping[str, BuiltColumn]
) -> ShardEntry:
    return ShardEntry(
        name=task.name,
        split=task.split,
        num_samples=num_samples,
        length_bytes=sum(c.length_bytes for c in columns.values()),
        index_file=index_path.name,
        index_sha256=_sha256(index_path),
    )


def describe_shard(entry: ShardEntry, root: Path) -> BuiltShard:
    """A finished shard as the next plan takes it, without the columns whose files are gone or cut.

    Raises:
        CorruptError: its index is damaged or not the one that the manifest means.
    """
    index = open_index(root / entry.index_file, sha256=entry.index_sha256)
    facts = index.facts
    return BuiltShard(
        name=entry.name,
        split=entry.split,
        slices=tuple(Slice(session, tuple(windows)) for session, windows in facts["slices"]),
        index_file=entry.index_file,
        columns={
            name: column
            for name, column in _columns(index).items()
            if _has_size(root / column.file, column.length_bytes)
        },
    )


def _columns(index: ShardIndex) -> dict[str, BuiltColumn]:
    return {name: BuiltColumn(**values) for name, values in index.facts["columns"].items()}


def _has_size(path: Path, length_bytes: int) -> bool:
    """Whether a file is there with all its bytes."""
    try:
        return path.stat().st_size == length_bytes
    except OSError:
        return False


def _rows(task: ShardTask, given: BuildInput) -> Iterator[Row]:
    number = 0
    for piece in task.slices:
        scan = given.scans[piece.session]
        windows = scan.windows(given.recipe)
        for index in piece.windows:
            window = windows[index]
            yield Row(number, piece.session, window, scan.present(window, given.recipe))
            number += 1


def _keep_column(draft: Draft, name: str, built: BuiltColumn, old: ShardIndex) -> None:
    """Take over a column that is up to date: its entry, its member tables, its statistics."""
    draft.columns[name] = built
    for array, values in old.arrays.items():
        if array.startswith((f"{name}.", f"{name}/")):
            draft.arrays[array] = np.array(values)
    if name in old.facts["statistics"]:
        draft.statistics[name] = old.facts["statistics"][name]
    streams = set(COLUMNS[name].streams)
    draft.losses += [loss for loss in old.facts["losses"] if loss["stream"] in streams]


def _write_index(
    task: ShardTask, given: BuildInput, draft: Draft, presence: NDArray[np.uint8]
) -> ShardEntry:
    sessions = [piece.session for piece in task.slices]
    position = {name: i for i, name in enumerate(sessions)}
    coverage = [given.scans[r.session].coverage[r.window.index] for r in draft.rows]
    partial = [
        presence_bits(s for s, share in zip(STREAMS, shares, strict=True) if 0 < share < 1)
        for shares in coverage
    ]
    arrays: dict[str, NDArray[Any]] = {
        "session": np.array([position[r.session] for r in draft.rows], dtype=np.uint32),
        "window": np.array([r.window.index for r in draft.rows], dtype=np.uint32),
        "start_s": np.array([r.window.start_s for r in draft.rows], dtype=np.float64),
        "stop_s": np.array([r.window.stop_s for r in draft.rows], dtype=np.float64),
        "present": presence,
        "partial": np.array(partial, dtype=np.uint8),
        "coverage": np.array(coverage, dtype=np.float32),
        **draft.arrays,
    }
    facts = {
        "name": task.name,
        "split": task.split,
        "sessions": sessions,
        "slices": [[piece.session, list(piece.windows)] for piece in task.slices],
        "columns": {
            name: {
                "file": c.file,
                "length_bytes": c.length_bytes,
                "sha256": c.sha256,
                "fingerprint": c.fingerprint,
                "basis": dict(c.basis),
            }
            for name, c in draft.columns.items()
        },
        "statistics": draft.statistics,
        "losses": draft.losses,
    }
    content = index_bytes(ShardIndex(facts=facts, arrays=arrays))
    path = given.out / task.file_name("index")
    write_durably(path, content)
    return _entry(task, path, len(draft.rows), draft.columns)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and goes when it doesn't."""
    temporary = temporary_path(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
