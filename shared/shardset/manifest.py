"""The manifest of a shard set: its root and its commit point.

``manifest.json`` names every shard's index with its checksum, and an index names its columns with
theirs. The manifest's last line is the checksum of its other lines. So it covers every byte of the
set. It stays small: 100,000 shards are one line each. It is written last, atomically, so a reader
sees the old set or the new one.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from shared.config import make_section
from shared.errors import (
    CorruptError,
    FormatVersionError,
    ShardError,
    rebuild_hint_for,
    upgrade_hint_for,
)
from shared.files import sha256_of_bytes, write_atomic
from shared.machine import raise_if_refused, read_bytes
from shared.media.tokenizer import TextTokenizer, parse_tokenizer
from shared.recipe import Recipe, Split
from shared.shardset.index import require_file_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shared.shardset.index import ShardIndex

MANIFEST_FILE = "manifest.json"
REJECTED_FILE = "rejected.jsonl"
SESSIONS_FILE = "sessions.jsonl"
FORMAT_NAME = "vr-creature-shards"
FORMAT_VERSION = 3
"""The only version that is read."""

UPGRADED_VERSION = 2
"""The older version that `python -m preprocess upgrade` turns into the newest."""

_HEAD = re.compile(
    rb'\s*\{\s*"format"\s*:\s*"vr-creature-shards"\s*,\s*"format_version"\s*:\s*(\d+)'
)
"""How a manifest of any version begins."""

_CHECKSUM = b',\n "sha256": "%s"\n}\n'
"""How a manifest ends: with the checksum of the bytes before."""

_Count = Annotated[int, Field(strict=True, ge=0)]
_FileName = Annotated[str, BeforeValidator(require_file_name)]
_Text = Annotated[str, Field(strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard in the manifest."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: _FileName
    """Such as train-000003."""
    split: Split
    num_samples: _Count
    """Number of its segments."""
    runs: tuple[_Count, ...]
    """Length of each run, in row order; see :func:`find_runs`."""
    length_bytes: _Count
    """Size of all its columns."""
    index_file: _FileName
    index_sha256: _Text

    def __post_init__(self) -> None:
        if sum(self.runs) != self.num_samples or 0 in self.runs:
            raise ValueError(f"{self.name}: runs of {sum(self.runs)} of {self.num_samples} samples")


def find_runs(index: ShardIndex) -> tuple[int, ...]:
    """Return the length of each run of a shard, in row order.

    A run is a maximal sequence of consecutive segments of one session. Windows are cut from runs.
    """
    steps = np.diff(index.arrays["segment"].astype(np.int64))
    is_cut = (np.diff(index.arrays["session"]) != 0) | (steps != 1)
    edges = [0, *(np.flatnonzero(is_cut) + 1).tolist(), index.num_samples]
    return tuple(np.diff(edges).tolist()) if index.num_samples else ()


_SHARDS = TypeAdapter(tuple[ShardEntry, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A shard set as its manifest describes it."""

    root: Path
    recipe: Recipe
    shards: tuple[ShardEntry, ...]
    generation: int
    """Number of builds that changed something; part of the names of files that replace others."""
    tokenizer_file: str
    tokenizer_sha256: str
    fields: Mapping[str, Any]
    """Schema: column -> stream, kind, dtype, shape, unit and codec."""
    statistics: Mapping[str, Any]
    """Statistics of the train split by column, and `num_samples`. A sensor has count, mean, std,
    min, max and histogram of each value; audio has those of the `level` of segments; dMel tokens
    have counts of `levels` per channel; text has counts of `tokens`."""
    counts: Mapping[str, int]
    """Numbers of sessions, and of planned, stored and rejected segments."""
    fingerprint: str
    """Hash of everything that the samples depend on."""

    def in_split(self, split: Split) -> tuple[ShardEntry, ...]:
        """Return the shards of a split, in order."""
        return tuple(s for s in self.shards if s.split == split)

    def num_samples(self, split: Split) -> int:
        """Count the samples of a split."""
        return sum(s.num_samples for s in self.shards if s.split == split)

    def load_tokenizer(
        self, content: bytes | None = None, *, origin: str | None = None
    ) -> TextTokenizer:
        """Load the set's tokenizer from the bytes of its file, by default that in `root`.

        Raises:
            ShardError: the file can't be read.
            CorruptError: it is not the file that the manifest names.
        """
        path = self.root / self.tokenizer_file
        origin = origin or str(path)
        hint = rebuild_hint_for(origin)
        try:
            content = read_bytes(path) if content is None else content
        except OSError as error:
            raise_if_refused(error, path)
            raise ShardError(f"{origin}: can't be read: {error.strerror}; {hint}") from error
        if sha256_of_bytes(content) != self.tokenizer_sha256:
            raise CorruptError(f"{origin}: checksum differs from the manifest; {hint}")
        return parse_tokenizer(content.decode(), origin=origin)


def read_manifest(root: Path | str) -> Manifest:
    """Read the manifest of a shard set.

    Raises:
        ShardError: there is no such set.
        FormatVersionError: the manifest has another format version.
        CorruptError: it is damaged, or names files outside the set's folder.
        ConfigError: its recipe has unknown keys or values.
        MachineError: the machine can't read it now.
    """
    root = Path(root)
    path = root / MANIFEST_FILE
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShardError(
            f"{path}: no such shard set; fix: build it by `python -m preprocess shards --out "
            f"{shlex.quote(str(root))} --sessions SESSIONS`"
        ) from error
    except OSError as error:
        raise_if_refused(error, path)
        raise CorruptError(f"{path}: is damaged: {error}; {rebuild_hint_for(path)}") from error
    return parse_manifest(content, root=root, path=str(path))


def parse_manifest(content: bytes, *, root: Path, path: str) -> Manifest:
    """Parse the bytes of a manifest; see :func:`read_manifest` for errors.

    `root` is the folder of the set's files, or of copies of them.
    """
    require_format(content, path=path)
    hint = rebuild_hint_for(path)
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: is damaged: {error}; {hint}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT_NAME:
        raise CorruptError(
            f"{path}: is not the manifest of a shard set; fix: give the folder of a shard set"
        )
    version = values.get("format_version")
    if type(version) is not int or version < 1:
        raise CorruptError(f"{path}: format_version is {version!r}; {hint}")
    if version != FORMAT_VERSION:
        raise _other_version(version, path)
    if "sha256" in values and not _is_checksum(values["sha256"], content):  # optional
        raise CorruptError(
            f"{path}: differs from its own checksum: it is damaged, or was edited by hand; {hint}"
        )
    try:
        fields = _Fields.model_validate(values)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        reason = detail["msg"].removeprefix("Value error, ")
        raise CorruptError(f"{path}: is damaged: {key}: {reason}; {hint}") from error
    return Manifest(
        root=root,
        recipe=make_section(Recipe, fields.recipe, origin=f"{path}: recipe"),
        shards=fields.shards,
        generation=fields.generation,
        tokenizer_file=fields.tokenizer.file,
        tokenizer_sha256=fields.tokenizer.sha256,
        fields=fields.fields,
        statistics=fields.statistics,
        counts=fields.counts,
        fingerprint=fields.fingerprint,
    )


class _Tokenizer(BaseModel):
    file: _FileName
    sha256: _Text


class _Fields(BaseModel):
    """Values of a manifest file, without its recipe's meaning."""

    recipe: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    generation: _Count
    tokenizer: _Tokenizer
    fields: dict[str, Any]
    statistics: dict[str, Any]
    counts: dict[str, Any]
    fingerprint: _Text


def _is_checksum(sha256: object, content: bytes) -> bool:
    """Return whether a manifest ends with the checksum of all bytes before."""
    body, _, _ = content.rpartition(_CHECKSUM.partition(b"%s")[0])
    digest = sha256_of_bytes(body)
    return sha256 == digest and content == body + _CHECKSUM % digest.encode()


def require_format(content: bytes, *, path: str, version: int = FORMAT_VERSION) -> None:
    """Refuse a manifest of another format version by its first hundred bytes.

    Raises:
        FormatVersionError: this program does not read that version.
    """
    head = _HEAD.match(content)
    if head is not None and int(head[1]) != version:
        raise _other_version(int(head[1]), path)


def _other_version(version: int, path: str) -> FormatVersionError:
    relation = "newer" if version > FORMAT_VERSION else "older"
    fix = "fix: update the program"
    if version == UPGRADED_VERSION:
        fix = upgrade_hint_for(path)
    elif version < FORMAT_VERSION:
        fix = "fix: build the set from its sessions by `python -m preprocess shards`"
    return FormatVersionError(
        f"{path}: format version {version} is {relation} than {FORMAT_VERSION}, the only one that "
        f"this program reads; {fix}"
    )


def commit_manifest(
    manifest: Manifest, *, write: Callable[[str, bytes], None] | None = None
) -> None:
    """Write the manifest durably; from now on readers see the new set.

    `write` writes a file of the set atomically; by default into the folder `manifest.root`.
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
        "shards": _SHARDS.dump_python(manifest.shards),
    }
    body = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}").encode()
    content = body + _CHECKSUM % sha256_of_bytes(body).encode()
    if write is None:
        write_atomic(manifest.root / MANIFEST_FILE, content)
    else:
        write(MANIFEST_FILE, content)
