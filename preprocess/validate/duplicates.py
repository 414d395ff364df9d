"""Find sessions with the same content under two names, also if one of them was encoded again.

Similar hashes (:mod:`preprocess.validate.signatures`) are neighbors in sorted tables, of which each
sorts them from another byte on (Charikar 2002; Manku et al. 2007, "Detecting near-duplicates for
web crawling"); so the cost is linear, also if all are the same. Two sessions are duplicates if a
stream agrees, and none that both have a hash of differs. A part of a longer session isn't found.
"""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from preprocess.validate.checks import Finding
from preprocess.validate.signatures import CODE_BITS, MAX_DISTANCE, hash_readings, hash_texts
from shared.recipe import assign_split
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from preprocess.validate.probe import SessionProbe
    from shared.recipe import Recipe

Signature: TypeAlias = "Mapping[str, str]"
"""Stream -> hash of its content; streams with too little content are left out."""

_DIFFERENT, _UNKNOWN = 128, 100
"""Bits from which on streams differ (correlation 0.71); in between, an encoder lost too much."""

_NEIGHBORS, _KEY_BYTES, _MAX_KEY_DISTANCE, _MAX_PAIRS = 3, 8, 20, 16
"""Neighbors that a hash is compared with in a table, if the first bytes are similar enough, until
both are in enough pairs."""

_FILES = "all files"


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateGroup:
    """Sessions with the same content, or with some streams of the same content."""

    sessions: Mapping[str, tuple[str, ...]]
    """Session, in order of names -> its streams that agree with those of another one here, and
    "all files" if they are byte for byte the same."""
    differing: tuple[str, ...] = ()
    """Streams that differ although the others agree; none if the sessions are duplicates."""


def signature_of(probe: SessionProbe) -> dict[str, str]:
    """Return the hashes of the streams of a session from what was read of it."""
    codes = {name: video.code for name, video in probe.videos.items()}
    codes |= {name: sound.code for name, sound in probe.audio.items()}
    codes |= {n: hash_readings(own.times_s, own.values) for n, own in probe.readings.items()}
    for name, events in probe.events.items():
        codes[name] = hash_texts([e.time_s for e in events], [e.text for e in events])
    return {name: code for name, code in codes.items() if code}


def find_duplicates(
    signatures: Mapping[str, Signature], *, files: Mapping[str, Mapping[str, str]] | None = None
) -> list[DuplicateGroup]:
    """Group the sessions that have the same content, or share some of their streams.

    `files` are the SHA-256 of each file of a session, by which exact copies are found too.
    """
    names = sorted({*signatures, *(files or {})})
    streams = [_FILES, *sorted({stream for own in signatures.values() for stream in own})]
    codes = np.zeros((len(streams), len(names), CODE_BITS // 8), np.uint8)
    for number, name in enumerate(names):
        if hashes := (files or {}).get(name):
            digest = hashlib.shake_256(repr(sorted(hashes.items())).encode())
            codes[0, number] = np.frombuffer(digest.digest(CODE_BITS // 8), np.uint8)
        for stream, code in signatures.get(name, {}).items():
            codes[streams.index(stream), number] = np.frombuffer(base64.b64decode(code), np.uint8)
    pairs = _similar_pairs(codes)
    distances = np.stack([_distances(of_stream, pairs) for of_stream in codes], axis=1)
    agrees, differs = distances <= MAX_DISTANCE, distances >= _DIFFERENT
    differs[:, 0] = False
    # All duplicates are grouped together; other pairs by the streams that agree.
    patterns = agrees | ~differs.any(axis=1, keepdims=True)
    groups: list[DuplicateGroup] = []
    for pattern in np.unique(patterns, axis=0)[::-1]:
        own = (patterns == pattern).all(axis=1)
        agreed = np.zeros((len(names), len(streams)), np.bool_)
        for side in pairs[own].T:
            np.logical_or.at(agreed, side, agrees[own])
        differing = tuple(compress(streams, differs[own].any(axis=0)))
        for numbers in _linked(pairs[own]):
            sessions = {names[n]: tuple(compress(streams, agreed[n])) for n in numbers}
            groups.append(DuplicateGroup(sessions=sessions, differing=differing))
    return groups


def duplicate_findings(
    groups: Iterable[DuplicateGroup], recipe: Recipe
) -> dict[str, list[Finding]]:
    """Return findings by session: a warning for all but the first of each group of duplicates.

    Where other streams differ, it is a note; none if only texts agree: sessions may share a script.
    """
    findings: dict[str, list[Finding]] = defaultdict(list)
    texts = {name for name, spec in recipe.streams.items() if spec.kind is Kind.TEXT}
    for group in groups:
        splits = {session: assign_split(session, recipe) for session in group.sessions}
        for session, split in list(splits.items())[1:]:
            # A session of the other split is named first: its leak spoils the validation loss.
            other = next((name for name in splits if splits[name] != split), next(iter(splits)))
            shared = ", ".join(group.sessions[session])
            if not group.differing:
                how = "" if _FILES in group.sessions[session] else "; re-encoded"
                leak = "" if splits[other] == split else ", which trains while this one is held out"
                if leak and split == "train":
                    leak = ", which is held out while this one trains"
                fix = "fix: remove one of the two folders"
                message = f"session: same content as {other} ({shared}{how}){leak}; {fix}"
                findings[session].append(Finding("warning", message))
            elif not texts.issuperset(group.sessions[session]):
                fix = "fix: if it is not the same take, replace the file that was copied by mistake"
                differing = ", ".join(group.differing)
                message = f"session: shares {shared} with {other}, but not {differing}; {fix}"
                findings[session].append(Finding("note", message))
    return dict(findings)


def _similar_pairs(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the pairs of sessions [n, 2] of which the hashes [S, N, bytes] of a stream agree."""
    batches = [np.zeros((0, 2), np.int64)]
    for hashes in codes:
        numbers, num_pairs = np.flatnonzero(hashes.any(axis=1)), np.zeros(len(hashes), np.int64)
        for first in range(CODE_BITS // 8):
            columns = np.arange(first, first + _KEY_BYTES) % hashes.shape[1]
            keys = hashes[numbers[:, None], columns].view(">u8").ravel().astype(np.uint64)
            order = np.argsort(keys, kind="stable")
            for step in range(1, _NEIGHBORS + 1):
                left, right = order[:-step], order[step:]
                is_near = np.bitwise_count(keys[left] ^ keys[right]) <= _MAX_KEY_DISTANCE
                pairs = np.sort(numbers[np.stack([left, right], axis=1)[is_near]], axis=1)
                pairs = pairs[num_pairs[pairs].min(axis=1) < _MAX_PAIRS]
                batches.append(pairs[_distances(hashes, pairs) <= MAX_DISTANCE])
                np.add.at(num_pairs, batches[-1], 1)
    return np.unique(np.concatenate(batches), axis=0)


def _distances(hashes: NDArray[np.uint8], pairs: NDArray[np.int64]) -> NDArray[np.int16]:
    """Return how many bits differ between hashes [N, bytes] of pairs [n, 2]; zeros are none."""
    left, right = hashes[pairs[:, 0]], hashes[pairs[:, 1]]
    distances = np.bitwise_count(left ^ right).sum(axis=1, dtype=np.int16)
    return np.where(left.any(axis=1) & right.any(axis=1), distances, np.int16(_UNKNOWN))


def _linked(pairs: NDArray[np.int64]) -> list[list[int]]:
    """Return the numbers that pairs link, directly or not, in increasing order."""
    groups: dict[int, list[int]] = {}
    for pair in pairs.tolist():
        small, large = sorted((groups.setdefault(n, [n]) for n in pair), key=len)
        if small is not large:
            large += small
            groups.update(dict.fromkeys(small, large))
    return sorted(sorted(numbers) for numbers in {id(g): g for g in groups.values()}.values())
