"""Measure the clocks of a session's streams: drift (RFC 5905) and offset, by regression.

Of a stream, the best evidence counts: *clocks*, two times in the same lines, if streams of the file
declare both; *frames*, a video against a sensor with one reading per frame; *readings*, their
number at a usual rate, lost ones included, against their times: the rate of the device by the clock
that stamped it. A loop that is slower than planned looks the same, so it is a fault only if the
stream also ends that much apart from the others. Last, *length*: that of a sound, if it stopped
with the others. A later stop looks the same, so it is never a fault; durations reports the end.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.checks import END_WARNING_S, NEEDS_DECODING, Finding, source_intervals
from shared.session import rates
from shared.session.folder import SESSION_INFO_FILE
from shared.session.lines import TIME_KEY
from shared.streams import Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from preprocess.validate.probe import SessionProbe

    Times = NDArray[np.float64]

LIMIT_S, SIGNIFICANT = END_WARNING_S / 2, 3.0
"""Least error at the end, and least drift in standard errors, of a finding. Viewers notice sound
that is 45 ms early (ITU-R BT.1359-1); at 30 Hz, the error is 1.5 samples."""

MIN_READINGS, MAX_DRIFT, MAX_LOST, MAX_LENGTH_DRIFT = 192, 7e-4, 0.025, 1e-2
"""Errors of the rate of a clock (RFC 5905 corrects 5e-4), with lost readings, and of a length."""

STEP_S, STEP_PERIODS = 0.1, 3.5
"""A longer step is a pause or a correction of the clock (RFC 5905 steps from 0.128 s on)."""

MAX_JITTER, WINDOWS = 0.2, (8, 16, 32, 64, 128, 256, 512, 1024)
"""Largest standard deviation of the level of a window of readings, in periods."""

MAX_ALIKE, FLOOR, NUM_BLOCKS, BANDWIDTH = 0.3, 1e-7, 64, 8
"""Correlation of residuals with structure; least error: no quartz is steadier; Newey-West."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """A clock that shows offset + (1 + drift) * reference, with standard errors.

    Of the method "readings" it is the device's. The offset, at the start, may be unknown.
    """

    drift_ppm: float
    drift_error_ppm: float
    offset_s: float | None = None
    offset_error_s: float | None = None
    reference: str = ""
    method: str = ""
    is_fault: bool = False
    """Whether a drift misplaces content; else it is only worth knowing."""


def check_drift(probe: SessionProbe) -> list[Finding]:
    """Check that no clock drifts so far that content is misplaced by the end."""
    if not probe.are_rates_known:  # nor which clocks are wrong, or when a sound ends
        return [Finding("unassessed", NEEDS_DECODING)]
    alike: dict[str | Clock, list[str]] = {}
    for name, clock in measure_clocks(probe).items():
        alike.setdefault(clock, []).append(name)
    is_idle = all(isinstance(clock, str) for clock in alike)
    wrong = {name for fault in probe.rate_faults if fault.is_sure for name in fault.streams}
    findings: list[Finding] = []
    for clock, names in alike.items():
        if isinstance(clock, str):
            reason = f"{', '.join(names)}: {clock}" if is_idle else clock
            findings.append(Finding("unassessed", reason, () if is_idle else names))
            continue
        drift = clock.drift_ppm / 1e6
        error_s = abs(drift) * probe.intervals[names[0]].duration_s
        is_sure = abs(clock.drift_ppm) > SIGNIFICANT * clock.drift_error_ppm
        if not clock.is_fault or not is_sure or error_s <= LIMIT_S or not wrong.isdisjoint(names):
            continue
        factor = round(1 + drift if clock.method == "readings" else 1 / (1 + drift), 7)
        stretch = json.dumps(dict.fromkeys(names, factor))
        offset = f'{clock.offset_s or 0:.3f} s off at the start ("start_s" corrects that), '
        message = (
            f"{probe.source(names[0])}: {', '.join(names)}: {rates.format_rate(factor)} (+- "
            f"{clock.drift_error_ppm:.1f}) against {clock.reference}, "
            f"{offset * (clock.offset_s is not None)}{error_s:.2f} s more by the end; fix: write "
            f'"stretch": {stretch} into {SESSION_INFO_FILE}'
        )
        findings.append(Finding("warning", message, names))
    return findings


def measure_clocks(probe: SessionProbe) -> dict[str, Clock | str]:
    """Measure the clock of each stream but texts, or say why that is impossible."""
    measure = {Kind.VIDEO: _of_video, Kind.SENSOR: _of_sensor, Kind.AUDIO: _of_sound}
    kinds = {name: probe.recipe.streams[name].kind for name in probe.intervals}
    return {name: measure[kind](name, probe) for name, kind in kinds.items() if kind in measure}


def _of_sensor(name: str, probe: SessionProbe) -> Clock | str:
    own, file = probe.readings[name], probe.recipe.streams[name].file
    for other in probe.files.get(file, ()):
        _, at, at_other = np.intersect1d(own.lines, other.lines, return_indices=True)
        if name not in other.streams and len(at) >= MIN_READINGS:
            clock, _ = fit_clocks(other.times_s[at_other] - probe.offset_s, own.times_s[at])
            key, is_fault = f"{file} {other.time_key}", other.time_key == TIME_KEY
            return replace(clock, reference=key, method="clocks", is_fault=is_fault)
    return _count(name, own.times_s[np.argsort(own.lines, kind="stable")], probe)


def _of_video(name: str, probe: SessionProbe) -> Clock | str:
    times_s = probe.videos[name].track.times_s
    for sensor, readings in probe.readings.items():
        if len(readings.times_s) == len(times_s) >= MIN_READINGS:
            clock, residuals_s = fit_clocks(readings.times_s, times_s)
            if np.abs(residuals_s).max() > rates.MAX_STEP_SPREAD_S:
                clock = replace(clock, reference=f"{sensor} readings", method="frames")
                return replace(clock, is_fault=True)
    return _count(name, times_s, probe)


def _of_sound(name: str, probe: SessionProbe) -> Clock | str:
    own, stops_s = probe.intervals[name], _other_stops(name, probe)
    length_s = float(np.median([*stops_s.values()])) - own.start_s if stops_s else 0.0
    if length_s < rates.MIN_LENGTH_S:
        return f"no other stream begins with it, or shorter than {rates.MIN_LENGTH_S:g} s"
    ppm = round(1e6 * (own.duration_s / length_s - 1), 3)
    if abs(ppm) > 1e6 * MAX_LENGTH_DRIFT:
        return f"its length differs by {abs(ppm) / 1e4:.1f} %: it was cut off, or stopped then"
    error_s = max(END_WARNING_S, float(np.ptp([*stops_s.values()])) / 2)
    error_ppm = round(1e6 * error_s / length_s, 3)
    others = f"{', '.join(stops_s)}, if they stopped together"
    return Clock(drift_ppm=ppm, drift_error_ppm=error_ppm, reference=others, method="length")


def _other_stops(name: str, probe: SessionProbe) -> dict[str, float]:
    """Return when the other sources end that begin with a stream, or before it."""
    latest_s = max(0.0, probe.intervals[name].start_s) + rates.TOGETHER_S
    others = (source for source in source_intervals(probe) if name not in source.streams)
    return {o.label: o.interval.stop_s for o in others if o.interval.start_s <= latest_s}


def _count(name: str, times_s: Times, probe: SessionProbe) -> Clock | str:
    """Compare the times of a stream with their number, and both with the end of the others."""
    clock = count_clock(times_s.tobytes(), probe.recipe.streams[name].expect.min_rate_hz)
    own, stops_s = probe.intervals[name], [*_other_stops(name, probe).values()]
    if isinstance(clock, str) or not stops_s:
        return clock
    apart_s = float(np.median(stops_s)) - own.stop_s
    left_s = abs(apart_s - clock.drift_ppm / 1e6 * own.duration_s)  # if it is stretched
    is_explained = left_s < min(abs(apart_s) / 2, END_WARNING_S)
    return replace(clock, is_fault=is_explained)


@functools.lru_cache(maxsize=4)
def count_clock(raw: bytes, declared_hz: float | None = None) -> Clock | str:
    """Measure a device's clock by its readings' times, float64 [N] in bytes; or say why not."""
    times_s = np.frombuffer(raw)
    if len(times_s) < MIN_READINGS or np.ptp(times_s) < rates.MIN_LENGTH_S:
        return f"shorter than {rates.MIN_LENGTH_S:g} s, or under {MIN_READINGS} readings"
    steps_s = np.diff(times_s)
    steps_s = steps_s[np.abs(steps_s) <= max(STEP_S, STEP_PERIODS * float(np.median(steps_s)))]
    rates_hz = [r for r in (declared_hz, *rates.USUAL_RATES_HZ, 1000) if r]
    errors = {r: 1 / float(steps_s.mean()) / r - 1 for r in rates_hz}
    rate_hz = next((r for r, e in errors.items() if -MAX_LOST <= e <= MAX_LOST / 2), None)
    if rate_hz is None:
        return f"its rate, {1 / steps_s.mean():.5g} Hz, is not a usual one"
    counted = count_readings(times_s, rate_hz)
    if isinstance(counted, str):
        return counted
    clock, residuals_s = fit_clocks(times_s, counted[0] / rate_hz, counted[1])
    if np.abs(residuals_s).max() <= rates.MAX_STEP_SPREAD_S / 2:
        return "its times are as even as if they were counted, not measured"
    if abs(clock.drift_ppm) > 1e6 * MAX_DRIFT:
        return f"its rate, {rate_hz * (1 + clock.drift_ppm / 1e6):.5g} Hz, is not a usual one"
    clock = replace(clock, reference=f"its times, at {rate_hz:.5g} Hz", method="readings")
    return replace(clock, offset_s=None, offset_error_s=None)


def count_readings(times_s: Times, rate_hz: float) -> tuple[Times, NDArray[np.int64]] | str:
    """Number readings [N] of a constant rate, and the spans between jumps; or say why not.

    Where the level of the times, less a period per reading, rises by a period, a reading is lost.
    Levels are medians of windows, as long as jitter requires; longer ones find what these miss.
    """
    index, period_s, steps_s = np.arange(len(times_s)), 1 / rate_hz, np.diff(times_s)
    is_apart = steps_s > period_s / 4
    halves = 2 * float(np.median(steps_s[is_apart])) / period_s
    if is_apart.mean() < 0.7 and abs(halves / round(halves) - 1) < 0.02:
        return "it comes in packets of equal size, in which a lost reading looks like drift"
    numbers = index.astype(np.float64)
    is_jump = np.abs(steps_s) > max(STEP_S, STEP_PERIODS * period_s)
    spans = np.append(0, np.cumsum(is_jump))
    lost = _slope(numbers * period_s, times_s, spans)[0]
    period_s *= 1 + (lost if lost <= MAX_DRIFT else 0)

    def levels(window: int) -> Times:
        phases = (times_s / period_s - numbers)[: len(times_s) // window * window]
        return np.asarray(np.median(phases.reshape(-1, window), axis=1))

    def jitter(window: int) -> float:
        steps = np.diff(levels(window))
        return float(1.4826 * np.median(np.abs(steps - np.median(steps))) / np.sqrt(2))

    fitting = (w for w in WINDOWS if w * lost <= 1 and len(times_s) >= 24 * w)
    window = next((w for w in fitting if jitter(w) <= MAX_JITTER / (1 + (w > 32))), 0)
    if not window:
        return "its times are too irregular, or too few, to count lost readings"
    least = np.inf
    while len(times_s) >= 8 * window and jitter(window) <= least:
        least, rises = jitter(window), _count_periods(levels(window))
        numbers += rises[np.minimum(index // window, len(rises) - 1)]
        is_jump |= np.abs(np.diff(numbers) - 1) > STEP_PERIODS
        spans = np.append(0, np.cumsum(is_jump))
        period_s *= 1 + _slope(numbers * period_s, times_s, spans)[0]
        window *= 4
    near = levels(WINDOWS[0])[np.minimum(index // WINDOWS[0], len(times_s) // WINDOWS[0] - 1)]
    apart = times_s / period_s - numbers - near  # at most one, of the readings around a lost one
    return numbers + np.round(apart) * (np.median(np.abs(apart)) < MAX_JITTER / 4), spans


def _count_periods(levels: Times) -> Times:
    """Count the whole periods by which levels rose, as a phase-locked loop does."""
    mean, whole = float(levels[0]), np.zeros(len(levels))
    for index, level in enumerate(levels.tolist()):
        whole[index] = round(level - mean)
        mean += 0.5 * (level - whole[index] - mean)
    return whole


def fit_clocks(
    x_s: Times, y_s: Times, spans: NDArray[np.int64] | None = None
) -> tuple[Clock, Times]:
    """Fit a line to one clock's times [N] over another's by least squares; return residuals too.

    Each span, by default between steps of over STEP_S, has an offset. Errors take autocorrelated
    jitter into account (Newey and West 1987, over blocks). In jitter with structure, as from
    packets, a beat of two clocks can hide, so that its range adds to the error.
    """
    if spans is None:
        spans = np.append(0, np.cumsum(np.abs(np.diff(y_s - x_s)) > STEP_S))
    drift, x_centered, residuals_s = _slope(x_s, y_s, spans)
    starts = np.linspace(0, len(x_s), NUM_BLOCKS, endpoint=False).astype(np.int64).tolist()
    scores = np.add.reduceat(x_centered * residuals_s, starts)
    apart = np.abs(np.subtract.outer(np.arange(NUM_BLOCKS), np.arange(NUM_BLOCKS)))
    weights = np.maximum(0, 1 - apart / BANDWIDTH) / (1 - BANDWIDTH / NUM_BLOCKS) ** 2
    power, extent = float(residuals_s @ residuals_s), float(x_centered @ x_centered)
    variance = max(float(scores @ weights @ scores), power / len(x_s) * extent) / extent**2
    lags = (abs(float(residuals_s[k:] @ residuals_s[:-k])) for k in range(12, 37))
    if max(lags) > MAX_ALIKE * power:  # ends are independent, uniform
        range_s = float(np.ptp(np.percentile(residuals_s, [2.5, 97.5])))
        variance += (range_s / float(np.ptp(x_s))) ** 2 / 6
    error, is_first = float(np.sqrt(variance + FLOOR**2)), spans == 0
    middle_s = float(x_s[is_first].mean() - x_s[0])
    clock = Clock(
        drift_ppm=round(1e6 * drift, 3),
        drift_error_ppm=round(1e6 * error, 3),
        offset_s=round(float((y_s - x_s)[is_first].mean()) - drift * middle_s, 6),
        offset_error_s=round(middle_s * error, 6),
    )
    return clock, residuals_s


def _slope(x: Times, y: Times, spans: NDArray[np.int64]) -> tuple[float, Times, Times]:
    """Fit y - x over x, with an offset per span; return slope, centered x, and residuals."""
    sizes = np.bincount(spans)
    x_centered, apart = (v - (np.bincount(spans, v) / sizes)[spans] for v in (x, y - x))
    slope = float(x_centered @ apart / max(float(x_centered @ x_centered), 1e-300))
    return slope, x_centered, apart - slope * x_centered
