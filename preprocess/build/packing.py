"""Decide which shard holds which windows.

Sessions stay in the shards that hold them, and new sessions fill new shards; or everything is
packed as if there were no previous set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from preprocess.build.plan_types import PlannedShard, SessionWindows
from shared.recipe import SPLITS, assign_split

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from preprocess.build.plan_types import BuiltShard
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan
    from shared.shardset.manifest import ShardEntry

    Samples = Mapping[str, tuple[int, ...]]
    """Session -> its windows that become samples."""

PACKING_SECTIONS = ("window", "split", "shard")
"""Sections of a recipe that decide which sample is in which shard."""

_BYTES_PER_PIXEL = {"h264": 0.1, "mjpeg": 0.35, "yuv420": 1.5, "raw": 3.0}
"""Bytes of a stored picture per pixel, for packing only."""


def sample_windows(scan: SessionScan, recipe: Recipe) -> tuple[int, ...]:
    """List the windows of a session that become samples."""
    if scan.session_rejection(recipe) is not None:
        return ()
    windows = scan.windows(recipe)
    return tuple(w.index for w in windows if scan.rejection(w, recipe) is None)


def keep_previous_shards(shards: Sequence[BuiltShard], samples: Samples) -> list[PlannedShard]:
    """Keep the previous shards, with the sessions that can stay in them.

    A session whose windows changed stays only if one shard holds all of it.

    Args:
        shards: the previous shards.
        samples: session -> its windows that become samples.
    """
    stored: dict[str, list[SessionWindows]] = {}
    for shard in shards:
        for session_windows in shard.sessions:
            stored.setdefault(session_windows.session, []).append(session_windows)
    is_same = {
        name: tuple(w for session_windows in runs for w in session_windows.windows)
        == samples.get(name, ())
        for name, runs in stored.items()
    }
    planned = []
    for shard in shards:
        new = PlannedShard(shard.name, shard.split, previous=shard)
        for session_windows in shard.sessions:
            if is_same[session_windows.session]:
                new.sessions.append(session_windows)
            elif len(stored[session_windows.session]) == 1 and samples.get(session_windows.session):
                new.sessions.append(
                    SessionWindows(session_windows.session, samples[session_windows.session])
                )
        planned.append(new)
    return planned


def pack(
    sessions: Sequence[str],
    samples: Samples,
    recipe: Recipe,
    planned: Sequence[PlannedShard] = (),
) -> list[PlannedShard]:
    """Pack sessions into new shards of about the target size; split long sessions over shards.

    Args:
        sessions: the sessions to pack, in order of name.
        samples: session -> its windows that become samples.
        recipe: the splits and the target size.
        planned: shards that are planned already; new shards are numbered after them.
    """
    capacity = max(1, int(recipe.shard.target_bytes / sample_bytes(recipe)))
    new: list[PlannedShard] = []
    for split in SPLITS:
        numbers = [int(s.name.rpartition("-")[2]) for s in planned if s.split == split]
        number = max(numbers, default=-1) + 1
        num_free = 0
        for session in sessions:
            if assign_split(session, recipe) != split:
                continue
            windows = samples[session]
            # Fill the last shard, then open new ones until the session is stored.
            while windows:
                if num_free == 0:
                    new.append(PlannedShard(f"{split}-{number:06d}", split))
                    number, num_free = number + 1, capacity
                stored, windows = windows[:num_free], windows[num_free:]
                new[-1].sessions.append(SessionWindows(session, stored))
                num_free -= len(stored)
    return new


def repack(shards: Sequence[BuiltShard], samples: Samples, recipe: Recipe) -> list[PlannedShard]:
    """Pack as a fresh build would; keep previous shards that come out the same.

    Args:
        shards: the previous shards.
        samples: session -> its windows that become samples.
        recipe: the splits and the target size.
    """
    previous = {(shard.name, shard.sessions): shard for shard in shards}
    return [
        replace(new, previous=previous.get((new.name, tuple(new.sessions))))
        for new in pack(list(samples), samples, recipe)
    ]


def recover_lost_shards(
    lost: Iterable[ShardEntry],
    shards: Iterable[BuiltShard],
    samples: Samples,
    recipe: Recipe,
) -> dict[str, tuple[SessionWindows, ...]]:
    """Find out what shards with an unreadable index held: shard name -> windows by session.

    The windows that no other shard holds must be theirs. A split in which the numbers of samples
    do not add up is left out.

    Args:
        lost: the manifest's entries of these shards.
        shards: the other shards.
        samples: session -> its windows that become samples.
        recipe: the splits.
    """
    entries = sorted(lost, key=lambda entry: entry.name)
    if not entries:
        return {}
    stored = {
        (session_windows.session, w)
        for shard in shards
        for session_windows in shard.sessions
        for w in session_windows.windows
    }
    missing = [(s, w) for s, windows in samples.items() for w in windows if (s, w) not in stored]
    recovered: dict[str, tuple[SessionWindows, ...]] = {}
    for split in SPLITS:
        lost_here = [entry for entry in entries if entry.split == split]
        rows = [row for row in missing if assign_split(row[0], recipe) == split]
        if len(rows) != sum(entry.num_samples for entry in lost_here):
            continue
        for entry in lost_here:
            shard_rows, rows = rows[: entry.num_samples], rows[entry.num_samples :]
            windows: dict[str, list[int]] = {}
            for session, window in shard_rows:
                windows.setdefault(session, []).append(window)
            recovered[entry.name] = tuple(SessionWindows(n, tuple(w)) for n, w in windows.items())
    return recovered


def sample_bytes(recipe: Recipe) -> float:
    """Estimate the bytes of a sample with both videos and sound."""
    frames = recipe.count(recipe.vision.rate_hz)
    picture = recipe.vision.size**2 * _BYTES_PER_PIXEL[recipe.vision.codec]
    sound = 2 * recipe.count(recipe.audio.rate_hz)
    mel = recipe.count(recipe.mel.rate_hz) * recipe.mel.channels
    numbers = recipe.sensors.proprio_size + recipe.sensors.touch_size
    sensors = 4 * recipe.count(recipe.sensors.rate_hz) * numbers
    return 2 * frames * picture + sound + mel + sensors
