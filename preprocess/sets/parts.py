"""Sets, or some of their sessions, that a new set is made of, and whether they go together."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preprocess.build.plan import setting_changes
from shared.errors import ShardError
from shared.shardset.store import RemoteShardSet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shared.recipe import Recipe
    from shared.shardset.manifest import Manifest
    from shared.shardset.store import ShardSetStore
    from shared.storage import Store

_MAX_NAMES = 5
"""So many sessions stand in a message."""


@dataclass(frozen=True, slots=True)
class Part:
    """A set, and which of its sessions are taken."""

    source: ShardSetStore
    manifest: Manifest
    sessions: frozenset[str]


def require_different(parts: Sequence[Part]) -> None:
    """No set twice, under whatever names.

    Raises:
        ShardError: two are the same.
    """
    for number, part in enumerate(parts):
        for other in parts[:number]:
            is_same = part.manifest.fingerprint == other.manifest.fingerprint
            if is_same or _home(part.source) == _home(other.source):
                raise ShardError(
                    f"{other.source} and {part.source} are the same set (fingerprint "
                    f"{part.manifest.fingerprint}); name it once"
                )


def _home(source: ShardSetStore) -> Path | Store:
    """Where a set lies, whatever the path to it."""
    return source.store if isinstance(source, RemoteShardSet) else source.root.resolve()


def require_apart(parts: Sequence[Part]) -> None:
    """No session in two sets.

    Raises:
        ShardError: names it, and how to merge the others.
    """
    homes: dict[str, ShardSetStore] = {}
    for part in parts:
        twice = sorted(part.sessions & set(homes))
        if twice:
            name, rest = twice[0], sorted(part.sessions - set(homes))
            few = " ".join(map(shlex.quote, rest[:_MAX_NAMES]))
            mend = (
                f"merge what is only there: python -m preprocess sessions split {part.source} "
                f"NEW_SET {few}{' ...' if len(rest) > _MAX_NAMES else ''}"
                if rest
                else f"all sessions of {part.source} are in the sets before it: leave it out"
            )
            others = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
            raise ShardError(
                f"session {name}{others} is in {homes[name]} and in {part.source}; {mend}"
            )
        homes |= dict.fromkeys(part.sessions, part.source)


def require_alike(parts: Sequence[Part]) -> None:
    """Sets whose columns are made in the same way, with the same tokenizer.

    Raises:
        ShardError: says what differs.
    """
    first = parts[0]
    for other in parts[1:]:
        one, two = first.manifest, other.manifest
        changes = setting_changes(_settings(one.recipe), _settings(two.recipe))
        if changes:
            raise ShardError(
                f"{first.source} and {other.source} are made by different recipes: "
                f"{'; '.join(changes)}; build both by one recipe"
            )
        if one.tokenizer_sha256 != two.tokenizer_sha256:
            raise ShardError(
                f"{first.source} and {other.source} have different tokenizers; build the second "
                f"with text.tokenizer: {first.source}/{one.tokenizer_file}"
            )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Keys of a recipe that decide what the samples of a set are."""
    sections = {k: v for k, v in recipe.as_json().items() if k not in ("shard", "text")}
    required = sections.pop("required")
    flat = {f"{s}.{key}": value for s, keys in sections.items() for key, value in keys.items()}
    return {"required": required, **flat}
