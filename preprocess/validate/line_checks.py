"""Judge lines of timestamped files, gaps, rates, and what a recipe expects of a stream.

Every timestamped file of a session is judged alike: ``metadata.jsonl``, tables, and text files.

A gap of a sensor is judged by the stream's own regular rate: an interval under 1.8 times its median
lost no reading. Longer ones are a warning if values in between are interpolated, and an error if
they are masked: by default, at 30 Hz, from 35 ms and from 100 ms on. With ``resample: hold``,
readings that become too old are a warning. A video has a frame rate of its own, so a gap in it is
longer than 100 ms and than three frames. It is a warning, as frames that are too far away are
masked. With ``expect.max_gap_s``, longer gaps are errors in every kind of stream, and others pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.checks import Finding, Level, issue_findings, limit_findings, unjudged
from preprocess.validate.content_checks import MIN_RATED_FRAMES
from preprocess.validate.repair_plan import RepairKind
from shared.clock import EPSILON_S, slow_rate_hz
from shared.kinds.sensor import slow_issue
from shared.session.timestamps import MAX_BACK_S, describe_unit
from shared.streams import Kind, SensorStream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from preprocess.validate.probe import SessionProbe
    from shared.session.lines import ParseIssue
    from shared.streams import StreamSpec

VIDEO_GAP_S = 0.1
VIDEO_GAP_INTERVALS = 3
"""A gap in a video is longer than VIDEO_GAP_S and than this many median frame distances."""

MIN_GAP_INTERVALS = 1.8
"""A gap of fewer median intervals lost no reading; the intervals of recorders vary."""

LATE_INTERVALS = 1.05
"""Readings that come this many intervals of the recipe's rate after each other are in time."""

MAX_BAD_LINES = 0.1
"""Share of lines that may be unreadable before the whole file counts as damaged."""


def check_lines(probe: SessionProbe) -> list[Finding]:
    """Check that every line can be read, is UTF-8, and holds one object."""
    findings = _unread_findings(probe, {"json", "row", "long"})
    for file in probe.files:
        for kind, repair, action in (
            ("encoding", RepairKind.ENCODE, "write it in UTF-8"),
            ("form", RepairKind.SPLIT, "write one object per line"),
        ):
            issues = [issue for issue in probe.issues_of(file) if issue.kind == kind]
            if issues:
                outcome = "everything is read"
                if kind == "encoding" and not probe.plan().covers(repair, file):
                    outcome = "characters that can't be decoded are read as U+FFFD"
                advice = f"{outcome}; fix: {probe.plan().advise(repair, file, action)}"
                findings += _summarize("warning", issues, advice, probe)
    return findings


def check_timestamps(probe: SessionProbe) -> list[Finding]:
    """Check that every line has a finite timestamp, later than that of the line before."""
    findings = [*_unit_findings(probe), *_unread_findings(probe, {"timestamp"})]
    for file in probe.files:
        issues = probe.issues_of(file)
        streams = probe.streams_of(file)
        back = [issue for issue in issues if issue.kind == "order"]
        wrong = [issue for issue in back if issue.back_s > MAX_BACK_S]
        messages = [
            f"{issue.source_line}: timestamp goes back by {issue.back_s:.3f} s: it is wrong, or "
            "the recorder was restarted; fix: correct it, or split the session at this line"
            for issue in wrong
        ]
        findings += limit_findings("error", messages, file=file, streams=streams)
        findings += _equal_time_findings(probe, file)
        if len(wrong) < len(back):
            fix = probe.plan().advise(RepairKind.SORT, file, "sort the file")
            messages = [
                f"{issue.source_line}: timestamp goes back by {issue.back_s:.3f} s; lines are "
                f"sorted when read; fix: {fix}"
                for issue in back
                if issue.back_s <= MAX_BACK_S
            ]
            findings += limit_findings("warning", messages, file=file, streams=streams)
    return findings


def _equal_time_findings(probe: SessionProbe, file: str) -> list[Finding]:
    """Report lines with the time of another line: errors if their readings differ."""
    issues = probe.issues_of(file)
    conflicts = [issue for issue in issues if issue.kind == "conflict"]
    repeats = [issue for issue in issues if issue.kind == "repeat"]
    findings: list[Finding] = []
    if conflicts:
        fix = probe.plan().advise(
            RepairKind.SPREAD,
            file,
            "spread the readings of each packet",
            otherwise="write the time of each reading",
        )
        findings += _summarize("error", conflicts, f"others are lost; fix: {fix}", probe)
    if repeats and (not conflicts or probe.plan().covers(RepairKind.JOIN, file)):
        action = probe.plan().advise(RepairKind.JOIN, file, "join them", otherwise="remove it")
        findings += _summarize("warning", repeats, f"fix: {action}", probe)
    return findings


def _summarize(
    level: Level, issues: Sequence[ParseIssue], advice: str, probe: SessionProbe
) -> list[Finding]:
    """Report the first of some issues of a file, and their number."""
    first, number = issues[0], sum(issue.count for issue in issues)
    share = f", as in {number} of {probe.num_lines(first.file)} lines" if number > 1 else ""
    message = f"{first.source_line}: {first.message}{share}; {advice}"
    return [Finding(level, message, probe.streams_of(first.file))]


@dataclass(frozen=True, slots=True)
class Gaps:
    """Which intervals [N - 1] between N times are gaps."""

    short_s: float
    """Short gaps take at least this long."""
    long_s: float
    """Long gaps take longer than this."""
    is_short: NDArray[np.bool_]
    """A warning."""
    is_long: NDArray[np.bool_]
    """An error."""


@dataclass(frozen=True, slots=True)
class _GapRule:
    """How gaps of one kind of stream are judged, and what the messages say."""

    noun: str
    limits: Callable[[float, StreamSpec], tuple[float, float]]
    """From the median interval and the stream to the limits of short and long gaps."""
    advice: Callable[[StreamSpec, SessionProbe], str]
    """What happens in a short gap, and the fix."""


def _sensor_limits(median_s: float, spec: StreamSpec) -> tuple[float, float]:
    assert isinstance(spec, SensorStream)
    lost_s = MIN_GAP_INTERVALS * median_s
    if spec.resample == "hold":
        return max(spec.age_limit_s + EPSILON_S, lost_s), math.inf
    return max(LATE_INTERVALS / spec.rate_hz, lost_s), max(spec.gap_limit_s, lost_s)


def _sensor_advice(spec: StreamSpec, probe: SessionProbe) -> str:
    assert isinstance(spec, SensorStream)
    if spec.resample == "hold":
        return (
            f"readings older than {spec.age_limit_s:g} s are masked; fix: raise max_age_s in the "
            "recipe if they are still true"
        )
    action = "fill in single lost lines"
    fix = probe.plan().advise(RepairKind.FILL, spec.file, action, otherwise="record again")
    return f"values in between are interpolated; fix: {fix}"


_GAP_RULES: Mapping[Kind, _GapRule] = {
    Kind.VIDEO: _GapRule(
        "frame",
        lambda s, _: (max(VIDEO_GAP_S + EPSILON_S, VIDEO_GAP_INTERVALS * s), math.inf),
        lambda *_: "frames that are too far away are masked; fix: record at a steadier frame rate",
    ),
    Kind.SENSOR: _GapRule("reading", _sensor_limits, _sensor_advice),
    Kind.TEXT: _GapRule("text", lambda *_: (math.inf, math.inf), lambda *_: ""),
}
"""Sound has no gaps: its samples have no times."""


def find_gaps(times_s: NDArray[np.float64], spec: StreamSpec) -> Gaps:
    """Find the gaps between the frames, readings or texts of a stream."""
    intervals_s = np.diff(times_s)
    median_s = float(np.median(intervals_s)) if len(intervals_s) else 0.0
    short_s, long_s = _GAP_RULES[spec.kind].limits(median_s, spec)
    if spec.expect.max_gap_s is not None:
        short_s, long_s = math.inf, spec.expect.max_gap_s
    is_long = intervals_s > long_s + EPSILON_S
    return Gaps(short_s, long_s, (intervals_s >= short_s) & ~is_long, is_long)


def check_gaps(probe: SessionProbe) -> list[Finding]:
    """Check for gaps between frames, readings or texts.

    Streams of one file that have the same gaps get the same message.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, spec in probe.recipe.streams.items():
        times_s = probe.times_s(name)
        if times_s is not None and len(times_s) > 1:
            gaps = find_gaps(times_s, spec)
            key = spec.file, spec.kind, times_s.tobytes(), gaps.is_short.tobytes(), gaps.long_s
            alike.setdefault(key, []).append(name)
    return [finding for names in alike.values() for finding in _gap_findings(probe, names)]


def _gap_findings(probe: SessionProbe, names: list[str]) -> list[Finding]:
    """Report the gaps of streams that have the same ones: one message for all short ones."""
    spec, times_s = probe.recipe.streams[names[0]], probe.times_s(names[0])
    assert times_s is not None
    gaps, intervals_s = find_gaps(times_s, spec), np.diff(times_s)
    rule = _GAP_RULES[spec.kind]
    noun = rule.noun if spec.kind is Kind.VIDEO else f"{', '.join(names)} {rule.noun}"
    is_whole_line = set(probe.sensors_of(spec.file)) == set(names)
    if is_whole_line and len(times_s) == probe.num_timed_lines(spec.file):
        noun = "line"

    def where(row: int) -> str:
        return probe.locate(names[0], row)

    def share(is_gap: NDArray[np.bool_]) -> str:
        gap_s = float(intervals_s[is_gap].sum())
        return f"{min(1.0, gap_s / max(probe.duration_s, EPSILON_S)):.1%} of the session"

    findings: list[Finding] = []
    if gaps.is_short.any():
        row = int(np.argmax(np.where(gaps.is_short, intervals_s, 0)))
        count = int(gaps.is_short.sum())
        limits = f"of {gaps.short_s * 1e3:.0f}-{gaps.long_s * 1e3:.0f} ms"
        if math.isinf(gaps.long_s):
            limits = f"over {gaps.short_s * 1e3:.0f} ms"
        which = f", the longest of {count} gaps" if count > 1 else ", a gap"
        which += f" {limits}, {share(gaps.is_short)}"
        message = f"{where(row)}: no {noun} for {_format_gap(intervals_s[row])} after it"
        findings.append(
            Finding(
                "warning", f"{message}{which}; {rule.advice(spec, probe)}", streams=tuple(names)
            )
        )
    masked = [
        f"{where(row)}: no {noun} for {_format_gap(intervals_s[row])} after it (gaps over "
        f"{gaps.long_s * 1e3:.0f} ms are {share(gaps.is_long)}); masked; fix: record again if it "
        "matters"
        for row in np.flatnonzero(gaps.is_long).tolist()
    ]
    return findings + limit_findings("error", masked, file=spec.file, streams=names)


def _format_gap(gap_s: float) -> str:
    return f"{gap_s * 1e3:.0f} ms" if gap_s < 0.1 else f"{gap_s:.3f} s"


def check_rates(probe: SessionProbe) -> list[Finding]:
    """Check that videos and interpolated sensors are recorded as fast as the recipe keeps them."""
    findings: list[Finding] = []
    few: list[str] = []
    for name, spec in (probe.recipe.videos | probe.recipe.sensors).items():
        times_s = probe.times_s(name)
        if times_s is None:
            continue
        if len(times_s) < MIN_RATED_FRAMES:
            few.append(name)
        elif isinstance(spec, SensorStream):
            if (issue := slow_issue(name, times_s, spec)) is not None:
                findings.append(Finding(*issue, (name,)))
        elif (rate_hz := slow_rate_hz(times_s, spec.rate_hz)) is not None:
            message = (
                f"{spec.file}: {name} is recorded at {rate_hz:.3g} Hz, its rate_hz is "
                f"{spec.rate_hz:g}; frames are repeated or masked; fix: lower its rate_hz in the "
                "recipe"
            )
            findings.append(Finding("warning", message, (name,)))
    is_all = len(few) == len(probe.videos) + len(probe.readings)
    return findings + unjudged("fewer than 3 frames or readings", few, is_all=is_all)


def check_expectations(probe: SessionProbe) -> list[Finding]:
    """Check the rate and the range that the recipe expects; :func:`check_gaps` checks the gaps."""
    findings: list[Finding] = []
    unknown: list[str] = []
    for name, spec in probe.recipe.streams.items():
        least_hz, times_s = spec.expect.min_rate_hz, probe.times_s(name)
        rate_hz: float | None = None
        if name in probe.audio:
            rate_hz = float(probe.audio[name].sound.source_rate_hz)
        elif times_s is not None and len(times_s) > 1 and times_s[-1] > times_s[0]:
            rate_hz = (len(times_s) - 1) / float(times_s[-1] - times_s[0])
        if least_hz is not None and rate_hz is not None and rate_hz < least_hz * (1 - 1e-6):
            message = (
                f"{spec.file}: {name} has {rate_hz:.3g} Hz on average, below its "
                f"expect.min_rate_hz {least_hz:g}; fix: record it faster, or lower the expectation"
            )
            findings.append(Finding("error", message, streams=(name,)))
        if spec.expect.range is not None and name in probe.readings:
            findings += _range_findings(probe, name, spec.expect.range)
        elif spec.expect.range is not None or (least_hz is not None and rate_hz is None):
            unknown.append(name)
    return findings + unjudged("no values or no rate to compare", unknown, is_all=False)


def _range_findings(probe: SessionProbe, name: str, limits: tuple[float, float]) -> list[Finding]:
    """Report the first reading with a value outside the expected range."""
    values = probe.readings[name].values
    is_outside = (values < np.float32(limits[0])) | (values > np.float32(limits[1]))
    rows = np.flatnonzero(is_outside.any(axis=1))
    if not len(rows):
        return []
    row = int(rows[0])
    column = int(np.argmax(is_outside[row]))
    message = (
        f"{probe.locate(name, row)}: {probe.label(name, column)} is {values[row, column]:g}, "
        f"outside expect.range [{limits[0]:g}, {limits[1]:g}], as in {len(rows)} of {len(values)} "
        "readings; fix: correct the recording, or widen the range"
    )
    return [Finding("error", message, streams=(name,))]


def is_mostly_unread(num_bad: int, num_lines: int) -> bool:
    """Return whether too many lines of a file are unreadable to trust the file.

    One bad line is always accepted: recordings are often cut off in their last line.
    """
    return num_bad > max(1, MAX_BAD_LINES * num_lines) or num_bad >= num_lines > 0


def _unread_findings(probe: SessionProbe, kinds: set[str]) -> list[Finding]:
    """Report skipped lines: warnings, or errors if a file lost too many."""
    findings: list[Finding] = []
    for file in probe.files:
        alike: dict[tuple[str, str], list[ParseIssue]] = {}
        for issue in probe.issues_of(file):
            if issue.kind in kinds:
                alike.setdefault((issue.kind, issue.fix), []).append(issue)
        is_damaged = is_mostly_unread(probe.num_unread(file), probe.num_lines(file))
        for (kind, own_fix), issues in alike.items():
            fix = _advise_on_unread(probe, file, kind=kind, own_fix=own_fix, is_damaged=is_damaged)
            if is_damaged:
                findings += _summarize("error", issues, f"they are skipped; fix: {fix}", probe)
            else:
                streams = probe.streams_of(file)
                advice = f"the line is skipped; fix: {fix}"
                findings += issue_findings("warning", issues, advice, streams=streams)
    return findings


def _advise_on_unread(
    probe: SessionProbe, file: str, *, kind: str, own_fix: str, is_damaged: bool
) -> str:
    """Return the fix of a skipped line."""
    plan = probe.plan()
    if kind == "timestamp" and plan.covers(RepairKind.NUMBERS, file):
        return "write numbers in place of texts with --fix"
    if plan.covers(RepairKind.DROP, file):
        return "drop it with --fix"
    fix = "check that this is the right file"
    if not is_damaged:
        fix = "write its time, or remove it" if kind == "timestamp" else "remove or correct it"
    if kind == "timestamp" and not probe.sensors_of(file):
        fix = "write the second at which the text starts"
    elif kind == "timestamp" and len(probe.files[file]) > 1:
        fix = "correct it, or the `time` of its streams in the recipe"
    return own_fix or fix


def _unit_findings(probe: SessionProbe) -> list[Finding]:
    """Report timestamps that are in another unit than declared."""
    findings: list[Finding] = []
    of_sensors = [file for file in probe.units if probe.sensors_of(file)]
    for file in of_sensors or probe.units:  # texts follow the sensors
        guess = probe.units[file]
        streams = ", ".join(probe.sensors_of(file) or probe.streams_of(file))
        message = describe_unit(file, guess, streams)
        if probe.plan().covers(RepairKind.UNITS, file):
            message += " (--fix does it)"
        findings.append(Finding("error", message, streams=probe.streams_of(file)))
    return findings
