"""Find streams whose clock ran at another rate than the others', and how sure that is.

Streams of one recording begin and end together. One that ends earlier or later was stopped then,
was cut off, or its clock was wrong: a camera that is set to 24 frames per second and takes 23.04, a
file whose frames were numbered after some were lost. Lengths alone can't tell. It is *sure* if

- **frames lost**: two videos of one constant rate have unlike numbers of frames, and the pictures
  of the shorter one are ahead of the other's by more and more frames, up to all the missing ones;
- **rate**: all streams begin together; the others, of at least two sources, end together; and the
  one, or all videos, ends apart by over SURE_S and 2 to 10 %: recorders that are stopped one after
  the other differ by less. Videos must have constant frame distances, which are counted, not
  measured. Sound must have the ratio of two usual sample rates.
  For a sensor one other source is enough, and smaller errors are found, but the corrected rate of
  its readings must be a usual one.

Sources are all videos, all sounds, and all sensors that end together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from shared.clock import MaskedSpan, measure_rate_hz
from shared.media.video import read_frames
from shared.streams import Kind, MaskReason, VideoDefaults

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.clock import Interval
    from shared.media.video import VideoTrack
    from shared.recipe import Recipe
    from shared.session.still import Recorded

LIMIT_S = 0.2
"""Content is masked where its time is known to be wrong by more."""

TOGETHER_S = 0.1
"""Streams that began or ended together differ by at most this."""

SURE_S, SURE_ERROR = 0.4, 0.02
"""Least error of video or sound that is taken for a wrong rate."""

MIN_ERROR, MAX_ERROR = 0.01, 0.1
MIN_LENGTH_S = 10.0
MAX_STEP_SPREAD_S = 0.002
"""Constant frame distances differ by at most this: containers round to milliseconds."""

MAX_STEPS = 1.8
"""An interval of more median intervals lost a reading."""

USUAL_RATES_HZ = (
    10, 20, 24, 25, 30, 48, 50, 60, 72, 80, 90, 100, 120, 144, 150, 200, 240, 250, 500,
)  # fmt: skip
USUAL_SAMPLE_RATES_HZ = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)

_TINY = VideoDefaults(size=16, fit="stretch")
_NUM_WINDOWS, _WINDOW_FRAMES = 7, 45
_MIN_MATCH, _MIN_LEAD = 0.5, 0.15
"""Correlation of the pictures of two videos that match, and by how much it exceeds others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateFault:
    """Streams whose clock ran at another rate than that of the others."""

    streams: tuple[str, ...]
    stop_s: float
    """When they end."""
    true_stop_s: float
    """When the others end."""
    factor: float
    """By what times since the start must be multiplied to be true."""
    evidence: str
    wrong_from_s: float
    """From when on the error exceeds LIMIT_S."""
    is_sure: bool = True
    is_even: bool = True
    """Whether the factor is the same from start to end, so that it corrects all times."""

    def describe(self) -> str:
        """Say what is wrong, by how much, and how that is known."""
        rate = f"{format_rate(self.factor)}, " if self.is_even else ""
        return f"{self.evidence}: {rate}{self.apart_s:.2f} s by the end"

    @property
    def apart_s(self) -> float:
        """Error at the end."""
        return abs(self.true_stop_s - self.stop_s)

    @property
    def span(self) -> MaskedSpan:
        """The stretch with times that are known to be wrong."""
        stop_s = max(self.stop_s, self.true_stop_s) + 1.0
        return MaskedSpan(self.wrong_from_s, stop_s, MaskReason.CLOCK, self.describe())

    @property
    def sentence(self) -> str:
        """What a build says about it."""
        outcome = f"wrong by over {LIMIT_S:g} s from {self.wrong_from_s:.2f} s on"
        if not self.is_sure:
            outcome = "or it was stopped at another time, or cut off"
        return f"{', '.join(self.streams)}: {self.describe()}; {outcome}"


def mask_wrong_rates(faults: Sequence[RateFault]) -> dict[str, list[MaskedSpan]]:
    """Return what to mask of each stream whose clock is surely wrong."""
    return {name: [fault.span] for fault in faults if fault.is_sure for name in fault.streams}


def propose_stretches(faults: Sequence[RateFault], recipe: Recipe) -> dict[str, float]:
    """Return the factor that corrects each stream whose clock is surely wrong from start to end.

    Texts follow the sensors, if all sensors on the shared clock have the same fault.
    """
    factors: dict[str, float] = {}
    shared = {name: s for name, s in recipe.streams.items() if s.clock == "session"}
    timed = {name for name, spec in shared.items() if spec.kind is Kind.SENSOR}
    texts = [name for name, spec in shared.items() if spec.kind is Kind.TEXT]
    for fault in faults:
        if fault.is_sure and fault.is_even:
            names = [*fault.streams, *(texts if timed and timed <= {*fault.streams} else ())]
            factors |= dict.fromkeys(names, round(fault.factor, 7))
    return factors


def format_rate(factor: float) -> str:
    """Say how wrong a clock is that needs a factor, in ppm or per cent."""
    error = 1 / factor - 1
    size = f"{abs(error):.2%}" if abs(error) >= MIN_ERROR else f"{abs(error) * 1e6:.0f} ppm"
    return f"its clock runs {size} {'fast' if error > 0 else 'slow'}"


def find_rate_faults(recorded: Recorded, *, decode: bool = True) -> tuple[RateFault, ...] | None:
    """Find the streams whose clock is wrong, or may be; None if only decoded pictures can tell."""
    recipe, intervals = recorded.recipe, recorded.intervals
    faults = _find_lost_frames(recorded, decode=decode)
    if faults is None:
        return None
    lost = {name for fault in faults for name in fault.streams}
    sources = _group_sources(recipe, {n: i for n, i in intervals.items() if n not in lost})
    likely: list[RateFault] = []
    for number, names in enumerate(sources):
        others = [source for k, source in enumerate(sources) if k != number]
        fault = _judge_rate(names, [name for source in others for name in source], intervals)
        if fault is not None:
            likely.append(_add_evidence(fault, recorded, num_sources=len(others)))
    # Of two sources that contradict each other, the one with evidence is wrong.
    return (*faults, *([fault for fault in likely if fault.is_sure] or likely[:1]))


def _group_sources(recipe: Recipe, intervals: Mapping[str, Interval]) -> list[list[str]]:
    """Group the streams that begin with the session by what can have a clock of its own.

    Streams that end far from most others were stopped, and are left out.
    """
    early = {
        name: interval.stop_s
        for name, interval in sorted(intervals.items(), key=lambda item: item[1].stop_s)
        if recipe.streams[name].kind is not Kind.TEXT
        and abs(interval.start_s) <= TOGETHER_S
        and interval.duration_s > 0
    }
    groups: dict[Kind, list[list[str]]] = {}
    for name, stop_s in early.items():
        kind = recipe.streams[name].kind
        of_kind = groups.setdefault(kind, [[]])
        if kind is Kind.SENSOR and of_kind[-1] and stop_s - early[of_kind[-1][0]] > TOGETHER_S:
            of_kind.append([])
        of_kind[-1].append(name)
    sources = [names for of_kind in groups.values() for names in of_kind]
    middle_s = float(np.median([early[names[-1]] for names in sources])) if sources else 0.0
    return [n for n in sources if abs(early[n[-1]] - middle_s) <= MAX_ERROR * middle_s]


def _judge_rate(
    names: Sequence[str], others: Sequence[str], intervals: Mapping[str, Interval]
) -> RateFault | None:
    """Return the fault that would explain why streams end apart from others; None if they don't."""
    own_s = [intervals[name].stop_s for name in names]
    others_s = [intervals[name].stop_s for name in others]
    if not others or np.ptp(own_s) > TOGETHER_S or np.ptp(others_s) > TOGETHER_S:
        return None
    start_s, stop_s, true_stop_s = intervals[names[0]].start_s, max(own_s), max(others_s)
    factor = (true_stop_s - start_s) / (stop_s - start_s)
    is_apart = abs(stop_s - true_stop_s) > LIMIT_S and abs(factor - 1) <= MAX_ERROR
    if not is_apart or min(stop_s, true_stop_s) < MIN_LENGTH_S:
        return None
    return RateFault(
        streams=tuple(names),
        stop_s=stop_s,
        true_stop_s=true_stop_s,
        factor=factor,
        evidence=f"begins with {', '.join(sorted(others))}, ends at {stop_s:.2f} s, "
        f"not at {true_stop_s:.2f} s",
        is_sure=False,
        wrong_from_s=start_s + LIMIT_S / abs(factor - 1),
    )


def _add_evidence(fault: RateFault, recorded: Recorded, *, num_sources: int) -> RateFault:
    """Say whether a fault is sure, and which rates it implies."""
    name, factor, tolerance = fault.streams[0], fault.factor, TOGETHER_S / fault.true_stop_s
    tracks = recorded.tracks
    is_sure = num_sources > 1 and abs(factor - 1) >= SURE_ERROR and fault.apart_s >= SURE_S
    rates = ""
    if recorded.recipe.streams[name].kind is Kind.SENSOR:
        rate_hz = _usual_rate_hz(recorded.readings[name][0], factor, tolerance)
        is_sure = rate_hz is not None
        if rate_hz is not None:
            rates = f"{rate_hz:g} readings per second, {rate_hz * factor:.6g} by their times; "
    elif name in tracks:
        counted = [track for stream, track in tracks.items() if stream in fault.streams]
        is_sure &= all(_is_counted(track) and not track.num_lost for track in counted)
        rate_hz = measure_rate_hz(tracks[name].times_s)
        if rate_hz is not None:
            rates = (
                f"{rate_hz:.4g} frames per second by its file, {rate_hz / factor:.4g} by the "
                "other clocks; "
            )
    else:
        ratios = np.divide.outer(USUAL_SAMPLE_RATES_HZ, USUAL_SAMPLE_RATES_HZ)
        is_sure &= bool(np.abs(ratios - factor).min() <= tolerance)
    return replace(
        fault, is_sure=bool(is_sure), evidence=(rates if is_sure else "") + fault.evidence
    )


def _is_counted(track: VideoTrack) -> bool:
    """Return whether the times of a video follow from a count and a rate, which can be wrong."""
    steps_s = np.diff(track.times_s)
    return bool(len(steps_s) > 1 and np.ptp(steps_s) <= MAX_STEP_SPREAD_S)


def _usual_rate_hz(times_s: NDArray[np.float64], factor: float, tolerance: float) -> float | None:
    """Return the usual rate that readings have with the factor, and do not have without it."""
    if len(times_s) < 2:
        return None
    steps_s = np.diff(times_s)
    kept_s = steps_s[steps_s < MAX_STEPS * np.median(steps_s)]
    rate_hz = 1 / float(kept_s.mean())
    errors = np.abs(np.log(np.array([rate_hz / factor, rate_hz])[:, None] / USUAL_RATES_HZ))
    best = int(errors[0].argmin())
    tolerance = min(tolerance, abs(np.log(factor)) / 3)
    is_usual = errors[0, best] <= tolerance < errors[1].min()
    return float(USUAL_RATES_HZ[best]) if is_usual else None


def _find_lost_frames(recorded: Recorded, *, decode: bool) -> list[RateFault] | None:
    """Find videos that lack frames that another one of the same constant rate has."""
    counted = {
        name: track
        for name, track in recorded.tracks.items()
        if len(track.times_s) > 2 * _WINDOW_FRAMES and not track.num_lost and _is_counted(track)
    }
    longest = max(counted, key=lambda name: len(counted[name].times_s), default="")
    faults: list[RateFault] = []
    for name, track in counted.items():
        whole = counted[longest]
        step_s, whole_step_s = (float(np.median(np.diff(t.times_s))) for t in (track, whole))
        missing = len(whole.times_s) - len(track.times_s)
        is_alike = abs(whole_step_s / step_s - 1) <= MIN_ERROR
        is_alike &= abs(float(whole.times_s[0] - track.times_s[0])) <= TOGETHER_S
        if not is_alike or not LIMIT_S / step_s < missing <= MAX_ERROR * len(whole.times_s):
            continue
        if not decode:
            return None
        videos = recorded.recipe.videos
        files = [(recorded.path / videos[n].file, counted[n]) for n in (name, longest)]
        leads = _measure_leads(*files, missing=missing)
        if leads is not None:
            faults.append(_lost_fault(name, longest, counted, leads))
    return faults


def _lost_fault(
    name: str,
    longest: str,
    tracks: Mapping[str, VideoTrack],
    leads: tuple[NDArray[np.float64], NDArray[np.int64]],
) -> RateFault:
    """Describe a video that lacks frames of another; for `leads` see :func:`_measure_leads`."""
    (centers, ahead), track, whole = leads, tracks[name], tracks[longest]
    count, count_whole = len(track.times_s), len(whole.times_s)
    step_s, first_s = float(np.median(np.diff(track.times_s))), float(track.times_s[0])
    factor = count_whole / count
    is_even = bool((np.abs(ahead - centers * (factor - 1)) * step_s <= LIMIT_S).all())
    wrong_from_s = first_s + LIMIT_S / (factor - 1)
    is_late = ahead * step_s > LIMIT_S
    if is_late.any():
        window = max(0, int(np.argmax(is_late)) - 1)
        measured_s = first_s + float(centers[window]) * step_s
        wrong_from_s = min(wrong_from_s, measured_s) if is_even else measured_s
    return RateFault(
        streams=(name,),
        stop_s=track.stop_s,
        true_stop_s=whole.stop_s,
        factor=factor,
        evidence=f"lacks {count_whole - count} of the {count_whole} frames of {longest}, and its "
        "pictures are ahead by more and more",
        is_even=is_even,
        wrong_from_s=wrong_from_s,
    )


def _measure_leads(
    short: tuple[Path, VideoTrack], whole: tuple[Path, VideoTrack], *, missing: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Measure by how many frames a video is ahead of another one, [W] centers and [W] frames.

    None if the pictures don't tell, or if the video merely ends earlier.
    """
    count = len(short[1].times_s)
    firsts = np.linspace(0, count - _WINDOW_FRAMES, _NUM_WINDOWS).astype(int)
    ahead: dict[int, int] = {}
    for first in firsts.tolist():
        own = _pictures(short, range(first, first + _WINDOW_FRAMES))
        other = _pictures(whole, range(first, first + _WINDOW_FRAMES + missing))
        if own is None or other is None:
            continue
        matches = [_match(own, other[s : s + _WINDOW_FRAMES]) for s in range(missing + 1)]
        best = int(np.argmax(matches))
        # At the end, where all are missing, the pictures must contradict that none is.
        lead = _MIN_LEAD if first == firsts[-1] else 0.0
        if matches[best] >= max(_MIN_MATCH, matches[0] + lead):
            ahead[first] = best
    if len(ahead) <= _NUM_WINDOWS // 2 or ahead.get(int(firsts[-1]), 0) < 0.7 * missing:
        return None
    if ahead[min(ahead)] > 0.3 * missing:
        return None
    return np.array([*ahead]) + _WINDOW_FRAMES / 2, np.array([*ahead.values()])


def _pictures(source: tuple[Path, VideoTrack], frames: Sequence[int]) -> NDArray[np.float32] | None:
    """Decode tiny pictures of frames, float32 [N, values]; None if one does not decode."""
    decoded = [picture for _, picture in read_frames(*source, frames, spec=_TINY)]
    if len(decoded) != len(frames):
        return None
    return np.stack(decoded).reshape(len(frames), -1).astype(np.float32)


def _match(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Correlate how the pictures of two stretches change; 0 if one of them stands still."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0
