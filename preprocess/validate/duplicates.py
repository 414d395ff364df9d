"""Find sessions with the same content under two names, also if one of them was encoded again.

Streams are hashed to the signs of random projections, of which a share of arccos(r) / pi differs if
their correlation is r (Charikar 2002, "Similarity estimation techniques from rounding algorithms").
Similar hashes are neighbors in tables that are sorted from different bytes on, at linear cost
(Manku et al. 2007, "Detecting near-duplicates for web crawling").
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from preprocess.validate.checks import Finding
from preprocess.validate.probe import NUM_PICTURES, SessionProbe
from shared.recipe import Recipe, assign_split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from shared.session.lines import TextEvent

Signature: TypeAlias = "Mapping[str, str]"
"""Stream -> hash of its content; streams with too little content are left out."""

_CODE_BYTES = 64
_SAME, _DIFFERENT, _UNKNOWN = 80, 128, 100
"""Bits up to which streams are the same (correlation 0.88), from which on they differ (0.71)."""

_MIN_FREEDOM, _MIN_GAP_BITS = 44.0, 60.0
"""Least independent numbers n in the features (Bretherton et al. 1999, "The effective number of
spatial degrees of freedom"): the correlation of unrelated ones has the density
(1 - r ** 2) ** ((n - 3) / 2), so that they are the same with a probability of 5e-13."""

_BANDS_HZ = (100, 200, 300, 450, 700, 1000, 1500, 2200, 3300)
_NEIGHBORS, _KEY_BYTES, _MAX_KEY_DISTANCE, _MAX_PAIRS = 3, 8, 20, 16
_FILES = "all files"


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateGroup:
    """Sessions in order of names, with their streams that others have too; streams that differ."""

    sessions: Mapping[str, tuple[str, ...]]
    differing: tuple[str, ...] = ()


def signature_of(probe: SessionProbe) -> dict[str, str]:
    """Return the hashes of the streams of a session from what was read of it."""
    codes = {name: hash_pictures(video.pictures) for name, video in probe.videos.items()}
    codes |= {n: hash_sound(own.excerpts, own.sound.rate_hz) for n, own in probe.audio.items()}
    codes |= {n: hash_readings(own.times_s, own.values) for n, own in probe.readings.items()}
    codes |= {name: hash_texts(events) for name, events in probe.events.items()}
    return {name: code for name, code in codes.items() if code}


def hash_pictures(pictures: Sequence[NDArray[np.uint8]]) -> str:
    """Hash RGB pictures [H, W, 3] by neighboring pixels, as dHash does (Krawetz 2013)."""
    if len(pictures) < NUM_PICTURES:
        return ""
    luma = np.stack(pictures) @ np.array([0.299, 0.587, 0.114])
    edges = [np.diff(luma, axis=axis).reshape(len(luma), -1) for axis in (1, 2)]
    return _hash(np.concatenate(edges, axis=1), share=0.5, least_rms=3.0)  # compression: up to 1


def hash_sound(excerpts: NDArray[np.float32], rate_hz: int) -> str:
    """Hash excerpts [T, n] of a sound by their levels in some bands."""
    waves = excerpts * np.hanning(excerpts.shape[1])
    power = np.cumsum(np.abs(np.fft.rfft(waves, rate_hz)) ** 2, axis=1)  # in steps of 1 Hz
    energies = np.diff(power[:, np.minimum(_BANDS_HZ, rate_hz // 2)], axis=1)
    levels_db = 10 * np.log10(np.maximum(energies, energies.max(axis=0) / 1000 + 1e-12))
    return _hash(levels_db, share=0.7, least_rms=2.0)  # steady noise: up to 1 dB


def hash_readings(times_s: NDArray[np.float64], values: NDArray[np.float32]) -> str:
    """Hash the readings [N, D] of a sensor."""
    grid_s = np.linspace(times_s[0], times_s[-1], 32)
    readings = np.stack([np.interp(grid_s, times_s, column) for column in values.T], axis=1)
    moves = np.diff(readings, axis=0).std(axis=0)
    readings /= np.maximum(moves, max(np.median(moves) / 10, 1e-9))  # less could be rounding
    return _hash(readings, share=1.0, least_rms=1e-3)


def hash_texts(events: Sequence[TextEvent]) -> str:
    """Hash texts and the gaps between them, in quarters of a second."""
    gaps = np.round(np.diff([e.time_s for e in events], prepend=events[0].time_s) * 4).astype(int)
    counts = np.unique(gaps, return_counts=True)[1]
    if (counts * np.log2(len(gaps) / counts)).sum() < _MIN_GAP_BITS:
        return ""
    words = [" ".join(event.text.casefold().split()) for event in events]
    sums = np.zeros(8 * _CODE_BYTES)
    for gap, text in zip(gaps, words, strict=True):
        sums += _signs(f"{gap} {text}", 1)[0]
    return _encode(sums)


def _hash(features: NDArray[np.float64], *, share: float, least_rms: float) -> str:
    """Hash features [T, C] minus a share of the row before; return "" if they hold too little."""
    centered = features - features.mean(axis=0)
    steps = centered[1:] - share * centered[:-1]
    steps -= steps.mean(axis=0)
    columns = np.linalg.svd(steps, compute_uv=False) ** 2
    times = (np.abs(np.fft.fft(steps, axis=0)) ** 2).sum(axis=1)
    freedom = np.prod([own.sum() ** 2 / max((own**2).sum(), 1e-30) for own in (columns, times)])
    if steps.std() < least_rms or freedom < _MIN_FREEDOM:
        return ""
    return _encode(steps.ravel() @ _signs("projections", steps.size))


def _signs(seed: str, num_rows: int) -> NDArray[np.float32]:
    """Return random 1 and -1 for each row and bit, the same on any machine."""
    digest = hashlib.shake_256(seed.encode(errors="replace")).digest(num_rows * _CODE_BYTES)
    bits = np.unpackbits(np.frombuffer(digest, np.uint8)).reshape(num_rows, -1)
    return bits.astype(np.float32) * 2 - 1


def _encode(sums: NDArray[np.float64]) -> str:
    return base64.b64encode(np.packbits(sums > 0).tobytes()).decode()


def find_duplicates(
    signatures: Mapping[str, Signature], *, files: Mapping[str, str] | None = None
) -> list[DuplicateGroup]:
    """Group sessions with the same content, or some streams; `files` have hashes of all files."""
    if len(signatures) < 2:
        return []
    names = sorted(signatures)
    streams = [_FILES, *sorted({stream for own in signatures.values() for stream in own})]
    codes = np.zeros((len(streams), len(names), _CODE_BYTES), np.uint8)
    for number, name in enumerate(names):
        if files and (of_all := files.get(name)):
            codes[0, number] = np.packbits(_signs(of_all, 1) > 0)
        for stream, code in signatures[name].items():
            codes[streams.index(stream), number] = np.frombuffer(base64.b64decode(code), np.uint8)
    pairs = _similar_pairs(codes)
    distances = np.stack([_distances(of_stream, pairs) for of_stream in codes], axis=1)
    agrees, differs = distances <= _SAME, distances >= _DIFFERENT
    differs[:, 0] = False
    # All duplicates are grouped together; other pairs by the streams that agree and differ.
    patterns = np.hstack([agrees, differs]) & differs.any(axis=1, keepdims=True)
    groups: list[DuplicateGroup] = []
    for pattern in np.unique(patterns, axis=0):
        own = (patterns == pattern).all(axis=1)
        agreed = np.zeros((len(names), len(streams)), np.bool_)
        np.logical_or.at(agreed, pairs[own], agrees[own][:, None])
        differing = tuple(compress(streams, pattern[len(streams) :]))
        for numbers in _linked(pairs[own]):
            sessions = {names[n]: tuple(compress(streams, agreed[n])) for n in numbers}
            groups.append(DuplicateGroup(sessions=sessions, differing=differing))
    return groups


def duplicate_findings(groups: list[DuplicateGroup], recipe: Recipe) -> dict[str, list[Finding]]:
    """Return warnings, or notes where streams differ, for all but the first of each group.

    Of sessions with one name, at several locations, others than one are given by their paths.
    """
    findings: dict[str, list[Finding]] = {}
    roles = {"train": "trains", "val": "is held out"}
    for group in groups:
        splits = {s: assign_split(s.rpartition("/")[2], recipe) for s in group.sessions}
        firsts = {split: session for session, split in reversed(splits.items())}
        for session, split in list(splits.items())[1:]:
            # The first of the other split, if there is one: it spoils the validation loss.
            other = firsts.get("val" if split == "train" else "train", firsts[split])
            shared = ", ".join(group.sessions[session])
            if not group.differing:
                is_copy = _FILES in group.sessions[session]
                how = _FILES if is_copy else f"{shared}; re-encoded"
                text = f"session: same content as {other} ({how})"
                if splits[other] != split:
                    text += f", which {roles[splits[other]]} while this one {roles[split]}"
                finding = Finding("warning", f"{text}; fix: remove one of the two folders")
            elif not recipe.texts.keys() >= set(group.sessions[session]):  # they may share a script
                text = f"shares {shared} with {other}, but not {', '.join(group.differing)}"
                fix = "if it is not the same take, replace the file that was copied by mistake"
                finding = Finding("note", f"session: {text}; fix: {fix}")
            else:
                continue
            findings.setdefault(session, []).append(finding)
    return findings


def _similar_pairs(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the pairs of sessions [n, 2] of which the hashes [S, N, bytes] of a stream agree."""
    batches = [np.zeros((0, 2), np.int64)]
    for hashes in codes:
        numbers, num_pairs = np.flatnonzero(hashes.any(axis=1)), np.zeros(len(hashes), np.int64)
        for first in range(_CODE_BYTES):
            columns = np.arange(first, first + _KEY_BYTES) % _CODE_BYTES
            keys = hashes[numbers[:, None], columns].view(">u8")[:, 0].astype(np.uint64)
            order = np.argsort(keys, kind="stable")
            for step in range(1, _NEIGHBORS + 1):
                left, right = order[:-step], order[step:]
                is_near = np.bitwise_count(keys[left] ^ keys[right]) <= _MAX_KEY_DISTANCE
                pairs = np.sort(numbers[np.stack([left, right], axis=1)[is_near]], axis=1)
                pairs = pairs[num_pairs[pairs].min(axis=1) < _MAX_PAIRS]
                batches.append(pairs[_distances(hashes, pairs) <= _SAME])
                np.add.at(num_pairs, batches[-1], 1)
    return np.unique(np.concatenate(batches), axis=0)


def _distances(hashes: NDArray[np.uint8], pairs: NDArray[np.int64]) -> NDArray[np.int16]:
    """Return how many bits differ between hashes [N, bytes] of pairs [n, 2]; zeros are none."""
    left, right = hashes[pairs.T]
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
