"""Files of a shard set to look into: where they lie, or copies of what lies behind a URL."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import EngineError
from shared.shardset.manifest import MANIFEST_FILE, Manifest, read_manifest
from shared.storage import STARTUP_RETRY, RetryPolicy, Store, parse_location

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class SetFiles:
    """A shard set's files."""

    folder: Path
    """Where they or their copies lie."""
    store: Store | None
    manifest: Manifest

    def __str__(self) -> str:
        """Where the set lies."""
        return str(self.store or self.folder)

    def path(self, name: str) -> Path:
        """A file, copied here at its first use; nothing lies there where the set lacks it.

        Raises:
            StorageError: the store can't be reached.
        """
        _copy(self.store, name, self.folder)
        return self.folder / name

    def evict(self) -> None:
        """Remove the copies of all but the manifest."""
        if self.store is not None:
            for path in self.folder.iterdir():
                if path.name != MANIFEST_FILE:
                    path.unlink()


@contextmanager
def open_files(place: Path | str) -> Iterator[SetFiles]:
    """The files of a shard set in a folder or behind a URL.

    Raises:
        ShardError: the manifest can't be read.
        StorageError: the store can't be reached.
    """
    where = parse_location(place)
    if not isinstance(where, Store):
        yield SetFiles(where, None, read_manifest(where))
        return
    with tempfile.TemporaryDirectory(prefix="shard-set-") as name:
        try:
            _copy(where.with_policy(STARTUP_RETRY), MANIFEST_FILE, Path(name))
            yield SetFiles(Path(name), where.with_policy(RetryPolicy()), read_manifest(name))
        except EngineError as error:  # it knows the copies' folder, whoever reads it the set's
            raise type(error)(str(error).replace(name, str(where))) from error


def _copy(store: Store | None, name: str, folder: Path) -> None:
    path = folder / name
    if store is not None and not path.exists():
        with suppress(FileNotFoundError):
            store.download(name, path)
