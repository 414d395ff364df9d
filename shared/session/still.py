"""Find stretches of a session in which a recorder repeats itself: what they hold is not real.

A camera that stalls writes its last frame on, a tracker that is lost its last pose, a capture chain
without input exact zeros. All kinds share one definition: content repeats exactly for at least
`expect.max_still_s`, which is out of character for the rest of its stream. Slide shows, screen
recordings, gated microphones and robots that pause repeat themselves elsewhere too. Where every
stream of another kind rests as well, the world stood still, not the recorder.

A picture of one color over that time, and a stream that is a copy of another, show nothing either.
"""

from __future__ import annotations

import filecmp
import itertools
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from shared.clock import Interval, MaskedSpan, marked_runs
from shared.errors import MediaError
from shared.media.repeats import MIN_RUN_SHARE, are_same_pictures, find_repeats
from shared.streams import Kind, MaskReason, ValueType

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.video import VideoTrack
    from shared.recipe import Recipe
    from shared.streams import SensorStream

MAX_STILL_S: Mapping[Kind, float] = {Kind.VIDEO: 2.0, Kind.AUDIO: 1.0, Kind.SENSOR: 2.0}
"""Longest time for which the content of a kind may repeat, where the recipe gives none."""

MIN_ITEMS = 8
"""A run has at least this many frames or readings; slow streams repeat for longer."""

_MAX_SHORT_SHARE = 0.1
"""Time in runs below the limit, of the time outside longer runs, from which on repeats are in the
stream's character ..."""

_MAX_REST_SHARE: Mapping[Kind, float] = {Kind.VIDEO: 0.5, Kind.AUDIO: 0.2, Kind.SENSOR: 0.5}
"""... and time in any other runs, of the time outside a run. Gates cut sound at each pause."""

_GATE_PAUSES, _GATE_WINDOW_S = 4, 30.0
"""A gate cut this number of pauses, each at least half as long, at most this far away."""

_RESTING = 0.9
"""A stream rests in a stretch if it repeats itself for this share of it."""

POSES = (ValueType.ANGLE, ValueType.POSITION, ValueType.QUATERNION, ValueType.DIRECTION)
"""Types of values that always change a little while they are tracked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What is needed of a session to find where its recorders repeat themselves."""

    path: Path
    recipe: Recipe
    intervals: Mapping[str, Interval]
    tracks: Mapping[str, VideoTrack]
    """On the session clock."""
    zeros: Mapping[str, Sequence[Interval]]
    """Audio stream -> stretches of exact zeros on the session clock."""
    readings: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float32]]]
    """Sensor -> times on the session clock [N], and values [N, D]."""


@dataclass(frozen=True, slots=True)
class _Stillness:
    """Where a stream repeats itself."""

    runs: list[Interval] = field(default_factory=list)
    """From 1 / MIN_RUN_SHARE of the limit on."""
    limit_s: float = 0.0
    flat: list[tuple[Interval, str]] = field(default_factory=list)
    """Pictures of one color, and which."""


def find_still(recorded: Recorded) -> dict[str, list[MaskedSpan]]:
    """Find the stretches of each stream that cannot be real, whether they are masked or not."""
    stillness = {
        name: _FINDERS[recorded.recipe.streams[name].kind](recorded, name)
        for name in recorded.intervals
        if recorded.recipe.streams[name].kind in _FINDERS
    }
    spans: dict[str, list[MaskedSpan]] = {}
    copies = _find_copies(recorded)
    for name, still in stillness.items():
        kind, interval = recorded.recipe.streams[name].kind, recorded.intervals[name]
        faults = [(run, f"a picture of one color ({color})") for run, color in still.flat]
        unusual = unusual_runs(still.runs, interval, still.limit_s, _MAX_REST_SHARE[kind])
        if kind is Kind.AUDIO:
            unusual = [run for run in unusual if not is_gated(run, still.runs)]
        is_rest = [_is_rest(run, name, recorded, stillness) for run in unusual]
        faults += [(run, _REPEATS[kind]) for run, rests in zip(unusual, is_rest, strict=True)
                   if not rests]  # fmt: skip
        if name in copies:
            faults = [(interval, f"a copy of {copies[name]}")]
        if faults:
            faults.sort(key=lambda pair: pair[0].start_s)
            spans[name] = [
                MaskedSpan(run.start_s, run.stop_s, MaskReason.STILL, text) for run, text in faults
            ]
    return spans


def unusual_runs(
    runs: Sequence[Interval], interval: Interval, limit_s: float, max_rest_share: float
) -> list[Interval]:
    """Return the runs of at least `limit_s` that are out of character for their stream.

    `runs` do not overlap.
    """
    long = [run for run in runs if run.duration_s >= limit_s - 1e-6]
    long_s = sum(run.duration_s for run in long)
    still_s = sum(run.duration_s for run in runs)
    if still_s - long_s > _MAX_SHORT_SHARE * (interval.duration_s - long_s):
        return []
    # Slides follow each other without movement between them.
    if len(runs) > 1 and interval.duration_s - still_s < len(runs) * limit_s / 2:
        return []
    return [
        run
        for run in long
        if still_s - run.duration_s <= max_rest_share * (interval.duration_s - run.duration_s)
    ]


def is_gated(run: Interval, runs: Sequence[Interval]) -> bool:
    """Return whether a stretch of zeros is one of the pauses that a gate cuts out of speech."""
    alike = [
        other
        for other in runs
        if other.duration_s >= run.duration_s / 2
        and abs(other.start_s - run.start_s) <= _GATE_WINDOW_S
    ]
    return len(alike) >= _GATE_PAUSES


def repeated_runs(
    times_s: NDArray[np.float64], values: NDArray[np.float32], stop_s: float, least_s: float
) -> list[Interval]:
    """Return the runs of equal readings [N, D] of at least `least_s`; each ends at the next one."""
    is_same = (values[1:] == values[:-1]).all(axis=1)
    ends_s = np.append(times_s, stop_s)
    runs = [
        Interval(float(times_s[first]), float(ends_s[last + 1]))
        for first, last in marked_runs(is_same)
    ]
    return [run for run in runs if run.duration_s >= least_s]


def pose_columns(spec: SensorStream) -> list[int]:
    """Return the columns of a sensor whose values are poses."""
    groups = zip(spec.values, spec.slices, strict=True)
    return [c for g, part in groups if g.type in POSES for c in range(part.start, part.stop)]


def limit_of(recipe: Recipe, name: str, times_s: NDArray[np.float64] | None = None) -> float:
    """Return the time in seconds for which a stream with items at some times may repeat itself."""
    spec = recipe.streams[name]
    limit_s = spec.expect.max_still_s or MAX_STILL_S[spec.kind]
    if times_s is None or len(times_s) < 2:
        return limit_s
    return max(limit_s, MIN_ITEMS * float(np.median(np.diff(times_s))))


def _of_video(recorded: Recorded, name: str) -> _Stillness:
    """Find where a video shows one picture."""
    track, spec = recorded.tracks[name], recorded.recipe.streams[name]
    limit_s = limit_of(recorded.recipe, name, track.times_s)
    try:
        pictures = find_repeats(recorded.path / spec.file, track, limit_s=limit_s)
    except (MediaError, OSError):  # it opened a moment ago
        return _Stillness()
    ends_s = np.append(track.times_s, track.stop_s)
    still = _Stillness(limit_s=limit_s)
    for run in pictures:
        interval = Interval(float(track.times_s[run.first]), float(ends_s[run.last + 1]))
        if run.color is None:
            still.runs.append(interval)
        elif interval.duration_s >= limit_s - 1e-6:
            still.flat.append((interval, run.color))
    return still


def _of_audio(recorded: Recorded, name: str) -> _Stillness:
    """Find where a sound is zero; sound that is nothing else has no level to judge it by."""
    zeros = list(recorded.zeros[name])
    if sum(run.duration_s for run in zeros) >= 0.99 * recorded.intervals[name].duration_s:
        return _Stillness()
    return _Stillness(zeros, limit_of(recorded.recipe, name))


def _of_sensor(recorded: Recorded, name: str) -> _Stillness:
    """Find where all poses of a sensor repeat; without a limit of its own, a sensor needs poses."""
    spec, (times_s, values) = recorded.recipe.sensors[name], recorded.readings[name]
    columns = pose_columns(spec)
    has_limit = spec.expect.max_still_s is not None
    if len(times_s) < MIN_ITEMS or not (has_limit or (columns and spec.resample != "hold")):
        return _Stillness()
    limit_s = limit_of(recorded.recipe, name, times_s)
    judged = values[:, columns] if columns else values
    stop_s = recorded.intervals[name].stop_s
    return _Stillness(repeated_runs(times_s, judged, stop_s, limit_s / MIN_RUN_SHARE), limit_s)


_FINDERS: Mapping[Kind, Callable[[Recorded, str], _Stillness]] = {
    Kind.VIDEO: _of_video,
    Kind.AUDIO: _of_audio,
    Kind.SENSOR: _of_sensor,
}

_REPEATS: Mapping[Kind, str] = {
    Kind.VIDEO: "one picture repeats",
    Kind.AUDIO: "exact zeros, no sound of any device",
    Kind.SENSOR: "the same poses repeat, as frozen tracking does",
}

_WITNESSES: Mapping[Kind, Kind] = {Kind.VIDEO: Kind.SENSOR, Kind.SENSOR: Kind.VIDEO}
"""Kinds whose streams tell whether the world moved. Streams of one kind may share a recorder."""


def _is_rest(
    run: Interval, name: str, recorded: Recorded, stillness: Mapping[str, _Stillness]
) -> bool:
    """Return whether everything that could move rests in a stretch; false if nothing tells."""
    recipe = recorded.recipe
    kind = _WITNESSES.get(recipe.streams[name].kind)
    witnesses = [
        other
        for other in stillness
        if recipe.streams[other].kind is kind
        and (kind is Kind.VIDEO or pose_columns(recipe.sensors[other]))
        and recorded.intervals[other].overlap_s(run) >= _RESTING * run.duration_s
    ]
    return bool(witnesses) and all(
        sum(r.overlap_s(run) for r in stillness[other].runs) >= _RESTING * run.duration_s
        for other in witnesses
    )


def _find_copies(recorded: Recorded) -> dict[str, str]:
    """Return the streams that are copies of another of their kind, with the other's name."""
    copies: dict[str, str] = {}
    for first, second in itertools.combinations(sorted(recorded.intervals), 2):
        kinds = {recorded.recipe.streams[name].kind for name in (first, second)}
        if second in copies or first in copies or len(kinds) > 1:
            continue
        is_copy = _COPIES.get(kinds.pop())
        with suppress(MediaError, OSError):  # they were read a moment ago
            if is_copy is not None and is_copy(recorded, first, second):
                copies[second] = first
    return copies


def _is_video_copy(recorded: Recorded, first: str, second: str) -> bool:
    """Return whether two videos show the same pictures."""
    a, b = (recorded.path / recorded.recipe.streams[name].file for name in (first, second))
    tracks = recorded.tracks
    return a != b and (
        filecmp.cmp(a, b, shallow=False)
        or are_same_pictures((a, tracks[first]), (b, tracks[second]))
    )


def _is_sound_copy(recorded: Recorded, first: str, second: str) -> bool:
    """Return whether two sounds are the same track of files of equal bytes."""
    one, other = recorded.recipe.audios[first], recorded.recipe.audios[second]
    files = recorded.path / one.file, recorded.path / other.file
    is_same_track = one.file != other.file and one.track == other.track
    return is_same_track and filecmp.cmp(*files, shallow=False)


def _is_sensor_copy(recorded: Recorded, first: str, second: str) -> bool:
    """Return whether two sensors, declared of different content, have the same moving poses."""
    specs = [recorded.recipe.sensors[name] for name in (first, second)]
    sources = {(spec.file, spec.key, spec.names) for spec in specs}
    values = [recorded.readings[name][1] for name in (first, second)]
    return (
        len(sources) == 2
        and bool(pose_columns(specs[0]))
        and np.array_equal(values[0], values[1])
        and np.array_equal(recorded.readings[first][0], recorded.readings[second][0])
        and bool(np.ptp(values[0], axis=0).any())
    )


_COPIES: Mapping[Kind, Callable[[Recorded, str, str], bool]] = {
    Kind.VIDEO: _is_video_copy,
    Kind.AUDIO: _is_sound_copy,
    Kind.SENSOR: _is_sensor_copy,
}
