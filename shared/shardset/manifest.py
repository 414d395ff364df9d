"""The manifest of a shard set: its root and its one commit point.

``manifest.json`` names every shard's index with its checksum; an index names its columns with
theirs, and its last line is the checksum of its own other lines. So the manifest covers every byte
of the set, and it stays small: 100,000 shards are one line each. It is written last, atomically; a
reader sees the old set or the new one.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config import make_section
from shared.errors import REBUILD_HINT, ConfigError, CorruptError, FormatVersionError, ShardError
from shared.files import sha256_of_bytes, write_atomic
from shared.media.tokenizer import TextTokenizer, parse_tokenizer
from shared.recipe import SPLITS, Recipe, Split
from shared.shardset.index import require_file_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MANIFEST_FILE = "manifest.json"
REJECTED_FILE = "rejected.jsonl"
SESSIONS_FILE = "sessions.jsonl"
FORMAT_NAME = "vr-creature-shards"
FORMAT_VERSION = 2
"""The only version that is read; version 1 was never released."""

_HEAD = re.compile(
    rb'\s*\{\s*"format"\s*:\s*"vr-creature-shards"\s*,\s*"format_version"\s*:\s*(\d+)'
)
"""How a manifest of every version begins."""

_CHECKSUM = b',\n "sha256": "%s"\n}\n'
"""How a manifest ends: the checksum of the bytes before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard in the manifest."""

    name: str
    """Such as train-000003."""
    split: Split
    num_samples: int
    length_bytes: int
    """Size of all its columns."""
    index_file: str
    index_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A shard set as its manifest describes it."""

    root: Path
    recipe: Recipe
    shards: tuple[ShardEntry, ...]
    generation: int
    """Counts the builds that changed something; names files that replace older ones."""
    tokenizer_file: str
    tokenizer_sha256: str
    fields: Mapping[str, Any]
    """Schema: per field its column, dtype, shape, unit and codec."""
    statistics: Mapping[str, Any]
    """Of the train split: mean, std, min, max and histogram of numbers and of the sound's level;
    counts of dMel levels and tokens."""
    counts: Mapping[str, int]
    """Windows planned, and what became of them."""
    fingerprint: str
    """Hash of everything that decides the samples."""

    def in_split(self, split: Split) -> tuple[ShardEntry, ...]:
        """Shards of a split, in order."""
        return tuple(s for s in self.shards if s.split == split)

    def num_samples(self, split: Split) -> int:
        """Samples of a split."""
        return sum(s.num_samples for s in self.shards if s.split == split)

    def load_tokenizer(
        self, content: bytes | None = None, *, origin: str | None = None
    ) -> TextTokenizer:
        """Load the set's tokenizer.

        Args:
            content: bytes of its file; by default the file is read from `root`.
            origin: where the bytes come from, for messages; by default the path in `root`.

        Raises:
            ShardError: the file can't be read.
            CorruptError: it is not the file that the manifest names.
        """
        path = self.root / self.tokenizer_file
        origin = origin or str(path)
        try:
            content = path.read_bytes() if content is None else content
        except OSError as error:
            raise ShardError(f"{origin}: can't be read: {error.strerror}") from error
        if sha256_of_bytes(content) != self.tokenizer_sha256:
            raise CorruptError(f"{origin}: checksum differs from the manifest; {REBUILD_HINT}")
        return parse_tokenizer(content.decode(), origin=origin)


def read_manifest(root: Path | str) -> Manifest:
    """Read the manifest of a shard set.

    Raises:
        ShardError: no such set.
        FormatVersionError: written in another format version.
        CorruptError: the manifest is damaged, or names files outside the set's folder.
        ConfigError: its recipe has keys or values that this software doesn't know.
    """
    root = Path(root)
    path = root / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShardError(
            f"{path}: no such shard set; make it by `python -m preprocess shards --out "
            f"{shlex.quote(str(root))} --sessions SESSIONS`"
        ) from error
    except OSError as error:
        raise CorruptError(f"{path}: is damaged: {error}; {REBUILD_HINT}") from error
    return parse_manifest(content, root=root, path=str(path))


def parse_manifest(content: bytes, *, root: Path, path: str) -> Manifest:
    """A manifest from its file's bytes.

    Args:
        content: the bytes.
        root: where the set's files lie, or copies of them.
        path: where the bytes come from, for messages.

    Raises:
        FormatVersionError, CorruptError, ConfigError: see :func:`read_manifest`.
    """
    require_format(content, path=path)
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: is damaged: {error}; {REBUILD_HINT}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT_NAME:
        raise CorruptError(f"{path}: is no manifest of a shard set")
    version = values.get("format_version")
    if type(version) is not int or version < 1:
        raise CorruptError(f"{path}: format_version is {version!r}; {REBUILD_HINT}")
    if version != FORMAT_VERSION:
        raise _other_version(version, path)
    if "sha256" in values and not _vouches(content, values["sha256"]):  # early sets have none
        raise CorruptError(
            f"{path}: differs from its own checksum: it is damaged, or was edited by hand; "
            f"{REBUILD_HINT}"
        )
    try:
        return _parse(values, root, path)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path}: is damaged: {error!r}; {REBUILD_HINT}") from error


def _vouches(content: bytes, sha256: object) -> bool:
    """Whether a manifest ends with the checksum of what stands before."""
    body, _, _ = content.rpartition(_CHECKSUM.partition(b"%s")[0])
    digest = sha256_of_bytes(body)
    return sha256 == digest and content == body + _CHECKSUM % digest.encode()


def _parse(values: Mapping[str, Any], root: Path, path: str) -> Manifest:
    return Manifest(
        root=root,
        recipe=make_section(Recipe, values["recipe"], origin=f"{path}: recipe"),
        shards=tuple(_parse_shard(entry) for entry in values["shards"]),
        generation=_natural(values["generation"]),
        tokenizer_file=require_file_name(values["tokenizer"]["file"]),
        tokenizer_sha256=_text(values["tokenizer"]["sha256"]),
        fields=dict(values["fields"]),
        statistics=dict(values["statistics"]),
        counts=dict(values["counts"]),
        fingerprint=_text(values["fingerprint"]),
    )


def require_format(content: bytes, *, path: str) -> None:
    """Refuse a manifest of another format version by its first bytes.

    Args:
        content: its file, or the first hundred bytes.
        path: where the content comes from, for the message.

    Raises:
        FormatVersionError: this program does not read the version.
    """
    head = _HEAD.match(content)
    if head is not None and int(head[1]) != FORMAT_VERSION:
        raise _other_version(int(head[1]), path)


def _other_version(version: int, path: str) -> FormatVersionError:
    if version > FORMAT_VERSION:
        return FormatVersionError(
            f"{path}: format version {version} is newer than {FORMAT_VERSION}, the newest that "
            "this program reads; fix: update the program"
        )
    return FormatVersionError(
        f"{path}: format version {version} is older than {FORMAT_VERSION}, the oldest that this "
        "program reads; fix: remove the folder of the set or choose another one, and build the "
        "set from its sessions by `python -m preprocess shards`"
    )


def _parse_shard(values: Mapping[str, Any]) -> ShardEntry:
    entry = ShardEntry(**values)
    if entry.split not in SPLITS:
        raise ValueError(f"shard {entry.name!r} is in the unknown split {entry.split!r}")
    require_file_name(entry.name)
    require_file_name(entry.index_file)
    _text(entry.index_sha256)
    _natural(entry.num_samples)
    _natural(entry.length_bytes)
    return entry


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def commit_manifest(
    manifest: Manifest, *, write: Callable[[str, bytes], None] | None = None
) -> None:
    """Write the manifest and make it durable; from here on readers see the new set.

    Args:
        manifest: the new set.
        write: writes a file of the set, atomically; without it, into the folder `manifest.root`.
    """
    values = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "generation": manifest.generation,
        "fingerprint": manifest.fingerprint,
        "counts": dict(manifest.counts),
        "recipe": manifest.recipe.as_json(),
        "tokenizer": {"file": manifest.tokenizer_file, "sha256": manifest.tokenizer_sha256},
        "fields": manifest.fields,
        "statistics": manifest.statistics,
        "shards": [
            {
                "name": s.name,
                "split": s.split,
                "num_samples": s.num_samples,
                "length_bytes": s.length_bytes,
                "index_file": s.index_file,
                "index_sha256": s.index_sha256,
            }
            for s in manifest.shards
        ],
    }
    body = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}").encode()
    content = body + _CHECKSUM % sha256_of_bytes(body).encode()
    if write is None:
        write_atomic(manifest.root / MANIFEST_FILE, content)
    else:
        write(MANIFEST_FILE, content)
