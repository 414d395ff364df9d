"""Which windows lie in which shard.

Sessions keep the shards they are in, new ones fill new shards; or all are packed as if there had
been no set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from preprocess.build.shards import PlannedShard, SessionWindows
from shared.recipe import SPLITS, assign_split

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from preprocess.build.shards import BuiltShard
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan
    from shared.shardset.manifest import ShardEntry

PACKING_SECTIONS = ("window", "split", "shard")
"""Sections of a recipe that decide which sample lies in which shard."""

_BYTES_PER_PIXEL = {"h264": 0.1, "mjpeg": 0.35, "yuv420": 1.5, "raw": 3.0}
"""Bytes of a stored picture per pixel, for packing only."""


def kept_windows(scan: SessionScan, recipe: Recipe) -> tuple[int, ...]:
    """Windows of a session that become samples."""
    if scan.session_rejection(recipe) is not None:
        return ()
    windows = scan.windows(recipe)
    return tuple(w.index for w in windows if scan.rejection(w, recipe) is None)


def inherit(
    shards: Sequence[BuiltShard], kept: Mapping[str, tuple[int, ...]]
) -> list[PlannedShard]:
    """Old shards with the sessions that can stay where they are.

    Args:
        shards: the old ones.
        kept: session -> windows of it that become samples.
    """
    homes: dict[str, list[SessionWindows]] = {}
    for shard in shards:
        for piece in shard.slices:
            homes.setdefault(piece.session, []).append(piece)
    is_same = {
        name: tuple(w for p in pieces for w in p.windows) == kept.get(name, ())
        for name, pieces in homes.items()
    }
    drafts = []
    for shard in shards:
        draft = PlannedShard(shard.name, shard.split, old=shard)
        for piece in shard.slices:
            if is_same[piece.session]:
                draft.slices.append(piece)
            elif len(homes[piece.session]) == 1 and kept.get(piece.session):
                draft.slices.append(SessionWindows(piece.session, kept[piece.session]))
        drafts.append(draft)
    return drafts


def pack(
    sessions: Sequence[str],
    kept: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    drafts: Sequence[PlannedShard] = (),
) -> list[PlannedShard]:
    """Sessions in order of name into new shards of about the target size; long ones are divided.

    Args:
        sessions: which.
        kept: session -> windows of it that become samples.
        recipe: splits, and how large a shard may be.
        drafts: shards that there are; numbers go on after theirs.
    """
    capacity = max(1, int(recipe.shard.target_bytes / sample_bytes(recipe)))
    new: list[PlannedShard] = []
    for split in SPLITS:
        numbers = [int(d.name.rpartition("-")[2]) for d in drafts if d.split == split]
        number = max(numbers, default=-1) + 1
        room = 0
        for session in sessions:
            if assign_split(session, recipe) != split:
                continue
            windows = kept[session]
            while windows:
                if room == 0:
                    new.append(PlannedShard(f"{split}-{number:06d}", split))
                    number, room = number + 1, capacity
                part, windows = windows[:room], windows[room:]
                new[-1].slices.append(SessionWindows(session, part))
                room -= len(part)
    return new


def compact(
    shards: Sequence[BuiltShard], kept: Mapping[str, tuple[int, ...]], recipe: Recipe
) -> list[PlannedShard]:
    """The shards of a fresh build; an old one that is as it would be there stays.

    Args:
        shards: the old ones.
        kept: session -> windows of it that become samples.
        recipe: splits, and how large a shard may be.
    """
    olds = {(shard.name, shard.slices): shard for shard in shards}
    return [
        replace(draft, old=olds.get((draft.name, tuple(draft.slices))))
        for draft in pack(list(kept), kept, recipe)
    ]


def recover(
    lost: Iterable[ShardEntry],
    shards: Iterable[BuiltShard],
    kept: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
) -> dict[str, tuple[SessionWindows, ...]]:
    """What lay in shards whose index can't be read, as far as the others and the number of their
    samples tell: name -> slices. A split that does not add up is left out.

    Args:
        lost: their lines in the manifest.
        shards: the other shards.
        kept: session -> windows of it that become samples.
        recipe: splits.
    """
    entries = sorted(lost, key=lambda entry: entry.name)
    if not entries:
        return {}
    placed = {(p.session, w) for shard in shards for p in shard.slices for w in p.windows}
    missing = [(s, w) for s, windows in kept.items() for w in windows if (s, w) not in placed]
    found: dict[str, tuple[SessionWindows, ...]] = {}
    for split in SPLITS:
        own = [entry for entry in entries if entry.split == split]
        rows = [row for row in missing if assign_split(row[0], recipe) == split]
        if len(rows) != sum(entry.num_samples for entry in own):
            continue
        for entry in own:
            part, rows = rows[: entry.num_samples], rows[entry.num_samples :]
            names = dict.fromkeys(session for session, _ in part)
            found[entry.name] = tuple(
                SessionWindows(name, tuple(w for session, w in part if session == name))
                for name in names
            )
    return found


def sample_bytes(recipe: Recipe) -> float:
    """About how many bytes a sample takes, both eyes and sound included."""
    frames = recipe.count(recipe.vision.rate_hz)
    picture = recipe.vision.size**2 * _BYTES_PER_PIXEL[recipe.vision.codec]
    sound = 2 * recipe.count(recipe.audio.rate_hz)
    mel = recipe.count(recipe.mel.rate_hz) * recipe.mel.channels
    numbers = recipe.sensors.proprio_size + recipe.sensors.touch_size
    sensors = 4 * recipe.count(recipe.sensors.rate_hz) * numbers
    return 2 * frames * picture + sound + mel + sensors
