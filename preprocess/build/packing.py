"""Decide which shard holds which segments.

Sessions stay in the shards that hold them, and new sessions fill new shards; or everything is
packed as if there were no previous set. Either way a session is cut only where
:func:`shared.shardset.layout.max_run_segments` says, so the windows of training stay the same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from preprocess.build.plan_types import PlannedShard, SessionSegments, runs_of
from shared.recipe import SPLITS, assign_split
from shared.shardset.layout import MAX_RUN_SEGMENTS, max_run_segments, segment_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from preprocess.build.plan_types import BuiltShard
    from shared.recipe import Recipe
    from shared.shardset.manifest import ShardEntry

    Samples = Mapping[str, tuple[int, ...]]
    """Session -> its segments that become samples."""

PACKING_SECTIONS = ("segment", "split", "shard")
"""Sections of a recipe that decide which sample is in which shard."""


def cut_sessions(samples: Samples, recipe: Recipe) -> list[SessionSegments]:
    """Cut sessions that are longer than a shard, in order of name."""
    length = max_run_segments(recipe)
    return [
        SessionSegments(name, tuple(numbers))
        for name in sorted(samples)
        for _, numbers in groupby(samples[name], key=lambda number: number // length)
    ]


def keep_previous_shards(
    shards: Sequence[BuiltShard], samples: Samples, recipe: Recipe
) -> list[PlannedShard]:
    """Keep the previous shards, with the sessions that can stay in them.

    A session, or what is between two cuts of it, stays if one shard holds all that is stored of it,
    and nothing from beyond the cuts.
    """
    length = max_run_segments(recipe)
    current = {(s.session, s.segments[0] // length): s for s in cut_sessions(samples, recipe)}
    num_shards = Counter(
        (old.session, cut)
        for shard in shards
        for old in shard.sessions
        for cut in {number // length for number in old.segments}
    )
    planned = []
    for shard in shards:
        new = PlannedShard(shard.name, shard.split, previous=shard)
        num_free = MAX_RUN_SEGMENTS
        for old in shard.sessions:
            key = (old.session, old.segments[0] // length)
            is_whole = old.segments[-1] // length == key[1]
            is_alone = is_whole and num_shards[key] == 1 and key in current
            if is_alone and len(current[key].segments) <= num_free:
                new.sessions.append(current[key])
                num_free -= len(current[key].segments)
        planned.append(new)
    return planned


def pack(
    sessions: Iterable[SessionSegments], recipe: Recipe, planned: Sequence[PlannedShard] = ()
) -> list[PlannedShard]:
    """Pack sessions into new shards of about the target size, each whole.

    They are numbered after those that are `planned` already.
    """
    capacity = shard_segments(recipe)
    numbers = dict.fromkeys(SPLITS, -1)
    for shard in planned:
        numbers[shard.split] = max(numbers[shard.split], int(shard.name.rpartition("-")[2]))
    new: dict[str, list[PlannedShard]] = {split: [] for split in SPLITS}
    num_free = dict.fromkeys(SPLITS, 0)
    for stored in sessions:
        split = assign_split(stored.session, recipe)
        shards, count = new[split], len(stored.segments)
        # Two sequences of one session in a shard could touch, and would then be one run.
        is_cut = bool(shards) and shards[-1].sessions[-1].session == stored.session
        if is_cut or count > num_free[split]:
            numbers[split] += 1
            shards.append(PlannedShard(f"{split}-{numbers[split]:06d}", split))
            num_free[split] = capacity
        shards[-1].sessions.append(stored)
        num_free[split] -= count
    return [shard for split in SPLITS for shard in new[split]]


def shard_segments(recipe: Recipe) -> int:
    """Return how many segments fill a shard."""
    return min(MAX_RUN_SEGMENTS, int(recipe.shard.target_bytes / segment_bytes(recipe)))


def repack(shards: Sequence[BuiltShard], samples: Samples, recipe: Recipe) -> list[PlannedShard]:
    """Pack as a fresh build would; keep previous shards that come out the same."""
    previous = {(shard.name, shard.sessions): shard for shard in shards}
    return [
        replace(new, previous=previous.get((new.name, tuple(new.sessions))))
        for new in pack(cut_sessions(samples, recipe), recipe)
    ]


def recover_lost_shards(
    lost: Iterable[ShardEntry], shards: Iterable[BuiltShard], samples: Samples, recipe: Recipe
) -> dict[str, tuple[SessionSegments, ...]]:
    """Find out what shards with an unreadable index held: shard name -> segments by session.

    The segments that no other shard holds must be theirs. A split in which the numbers of samples
    or the runs differ is left out.
    """
    entries = sorted(lost, key=lambda entry: entry.name)
    if not entries:
        return {}
    stored = {
        (s.session, number) for shard in shards for s in shard.sessions for number in s.segments
    }
    missing = [(s, n) for s, segments in samples.items() for n in segments if (s, n) not in stored]
    recovered: dict[str, tuple[SessionSegments, ...]] = {}
    for split in SPLITS:
        lost_here = [entry for entry in entries if entry.split == split]
        rows = [row for row in missing if assign_split(row[0], recipe) == split]
        if len(rows) != sum(entry.num_samples for entry in lost_here):
            continue
        contents = {}
        for entry in lost_here:
            shard_rows, rows = rows[: entry.num_samples], rows[entry.num_samples :]
            segments: dict[str, list[int]] = {}
            for session, number in shard_rows:
                segments.setdefault(session, []).append(number)
            contents[entry.name] = tuple(SessionSegments(n, tuple(s)) for n, s in segments.items())
        if all(runs_of(contents[entry.name]) == entry.runs for entry in lost_here):
            recovered |= contents
    return recovered
