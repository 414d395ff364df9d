"""Judge metadata lines, sensor readings, and gaps.

Gaps between metadata lines: under 35 ms is good, up to 100 ms a warning, over 100 ms an error. A
video has a frame rate of its own, so a gap in it is longer than 100 ms and than three frames. It
is a warning, as frames that are too far away are masked.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.checks import Finding, Level, issue_findings, limit_findings
from preprocess.validate.probe import UNREAD_KINDS
from shared.clock import EPSILON_S
from shared.recipe import Stream
from shared.session.folder import METADATA_FILE, TEXT_FILE, VISION_FILES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from preprocess.validate.probe import SessionProbe

GAP_WARNING_S = 0.035
GAP_ERROR_S = 0.1

VIDEO_GAP_INTERVALS = 3
"""A gap in a video is longer than GAP_ERROR_S and than this many median frame distances."""

MAX_BAD_LINES = 0.1
"""Share of lines that may be unreadable before the whole file counts as damaged."""

MAX_BACK_S = 1.0
"""Lines out of order by at most this much are sorted; a longer jump back is another fault."""

ROUNDING = 1e-3
"""Touch and angles outside their range by less are rounding errors."""

DEGREES_RAD = 8 * math.pi
"""Larger angles are degrees, not unwrapped radians."""

SATURATED_SHARE = 0.2
"""A sensor at its limit for a larger share of its readings is saturated or stuck."""


def find_line_gaps(times_s: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which intervals [N - 1] between lines at times [N] are short gaps, and which are long.

    Short gaps (35 to 100 ms) are warnings, long ones (over 100 ms) errors.
    """
    intervals_s = np.diff(times_s)
    is_long = intervals_s > GAP_ERROR_S + EPSILON_S
    return (intervals_s >= GAP_WARNING_S) & ~is_long, is_long


def find_video_gaps(times_s: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which intervals [N - 1] between frames at times [N] are gaps."""
    intervals_s = np.diff(times_s)
    median_s = float(np.median(intervals_s)) if len(intervals_s) else 0.0
    return np.asarray(intervals_s > max(GAP_ERROR_S + EPSILON_S, VIDEO_GAP_INTERVALS * median_s))


def check_lines(probe: SessionProbe) -> list[Finding]:
    """Check that every line is a JSON object."""
    fix = "the line is skipped; fix: drop it with --fix"
    return _unread_findings(probe, {"json", "long"}, {METADATA_FILE: fix, TEXT_FILE: fix})


def check_timestamps(probe: SessionProbe) -> list[Finding]:
    """Check that every line has a finite timestamp, later than that of the line before."""
    fixes = {
        METADATA_FILE: "the line is skipped; fix: drop it with --fix",
        TEXT_FILE: "the line is skipped; fix: write the second at which the text starts",
    }
    findings = [*_unit_findings(probe), *_unread_findings(probe, {"timestamp"}, fixes)]
    backward = [(i.line, i.back_s) for i in probe.issues if i.kind == "order"]
    findings += limit_findings(
        "error",
        (
            f"{METADATA_FILE} line {line}: timestamp goes back by {back_s:.3f} s: it is wrong, "
            "or the recorder was restarted; fix: correct it, or split the session at this line"
            for line, back_s in backward
            if back_s > MAX_BACK_S
        ),
        file=METADATA_FILE,
    )
    findings += limit_findings(
        "warning",
        (
            f"{METADATA_FILE} line {line}: timestamp goes back by {back_s:.3f} s; lines are sorted "
            "when read; fix: sort the file with --fix"
            for line, back_s in backward
            if back_s <= MAX_BACK_S
        ),
        file=METADATA_FILE,
    )
    duplicates = [issue for issue in probe.issues if issue.kind == "duplicate"]
    fix = "the first line is kept; fix: join the two with --fix"
    return findings + issue_findings("warning", duplicates, fix)


def check_gaps(probe: SessionProbe) -> list[Finding]:
    """Check for gaps between metadata lines, readings of a sensor, and video frames."""
    metadata = probe.metadata
    findings = _line_gap_findings(probe, np.arange(len(metadata.times_s)), noun="line")
    for stream in (Stream.TOUCH, Stream.PROPRIO):
        rows = np.flatnonzero(metadata.rows_with(stream))
        if 0 < len(rows) < len(metadata.times_s):
            findings += _line_gap_findings(probe, rows, noun=f"{stream} reading")
    for stream, video in probe.videos.items():
        file, times_s = VISION_FILES[stream], video.track.times_s
        findings += limit_findings(
            "warning",
            (
                f"{file} {times_s[i]:.2f}-{times_s[i + 1]:.2f} s: no frame for "
                f"{times_s[i + 1] - times_s[i]:.3f} s; frames that are too far away are masked; "
                "fix: record at a steadier frame rate"
                for i in np.flatnonzero(find_video_gaps(times_s))
            ),
            file=file,
        )
    return findings


def check_touch(probe: SessionProbe) -> list[Finding]:
    """Check that touch has the recipe's size, is finite, and is in [0, 1]."""
    findings = _reading_findings(probe, Stream.TOUCH)
    values = probe.metadata.touch.astype(np.float64)
    excess = np.fmax(values - 1, -values).max(axis=1, initial=-np.inf)
    farthest = np.abs(values - 0.5).argmax(axis=1) if values.size else np.zeros(0, dtype=int)
    findings += limit_findings(
        "error",
        (
            f"{probe.locate_row(int(i))}: touch is {values[i, farthest[i]]:g}, outside [0, 1]; "
            "fix: divide raw readings by their full scale before recording"
            for i in np.flatnonzero(excess > ROUNDING)
        ),
        file=METADATA_FILE,
    )
    return findings + limit_findings(
        "warning",
        (
            f"{probe.locate_row(int(i))}: touch is outside [0, 1] by rounding; "
            "fix: clamp it with --fix"
            for i in np.flatnonzero((excess > 0) & (excess <= ROUNDING))
        ),
        file=METADATA_FILE,
    )


def check_proprio(probe: SessionProbe) -> list[Finding]:
    """Check that proprio has the recipe's size, is finite, and has angles in [-pi, pi]."""
    findings = _reading_findings(probe, Stream.PROPRIO)
    num_angles = probe.recipe.sensors.proprio_size // 2
    angles = np.abs(probe.metadata.proprio[:, :num_angles].astype(np.float64))
    largest = angles.max(axis=1, initial=0.0)
    findings += limit_findings(
        "error",
        (
            f"{probe.locate_row(int(i))}: an angle of {largest[i]:g} rad looks like degrees; "
            "fix: multiply angles and velocities by pi / 180 before recording"
            for i in np.flatnonzero(largest > DEGREES_RAD)
        ),
        file=METADATA_FILE,
    )
    beyond = np.flatnonzero((largest > math.pi + EPSILON_S) & (largest <= DEGREES_RAD))
    if len(beyond):
        row = int(beyond[0])
        is_rounding = np.nanmax(largest) <= math.pi + ROUNDING
        fix = "fix: clamp it with --fix" if is_rounding else "fine if rotations are unwrapped"
        message = (
            f"angle of {largest[row]:g} rad, outside [-pi, pi], as in {len(beyond)} of "
            f"{len(largest)} lines; angles are wrapped when read; {fix}"
        )
        findings.append(Finding("warning", f"{probe.locate_row(row)}: {message}"))
    return findings


def check_saturation(probe: SessionProbe) -> list[Finding]:
    """Check that no sensor stays at its limit, and that some angle changes."""
    metadata = probe.metadata
    num_angles = probe.recipe.sensors.proprio_size // 2
    touch = metadata.touch[metadata.rows_with(Stream.TOUCH)]
    angles = metadata.proprio[metadata.rows_with(Stream.PROPRIO), :num_angles]
    findings: list[Finding] = []
    for name, is_at_limit, limit in (
        ("touch", touch >= 1 - ROUNDING, "1"),
        ("proprio", np.abs(np.abs(angles) - math.pi) < ROUNDING, "pi"),
    ):
        shares = is_at_limit.mean(axis=0) if len(is_at_limit) > 1 else np.zeros(0)
        findings += limit_findings(
            "warning",
            (
                f"{METADATA_FILE}: {name}[{i}] is at its limit {limit} in {shares[i]:.0%} of "
                "its readings: saturated or stuck; fix: check the sensor's range and cable"
                for i in np.flatnonzero(shares > SATURATED_SHARE)
            ),
            file=METADATA_FILE,
        )
    if len(angles) > 1 and angles.any() and not np.ptp(angles, axis=0).any():
        message = "no angle changes in the whole session: frozen tracking; fix: check that it is on"
        findings.append(Finding("warning", f"{METADATA_FILE}: {message}"))
    return findings


def is_mostly_unread(num_bad: int, num_lines: int) -> bool:
    """Return whether too many lines of a file are unreadable to trust the file.

    One bad line is always accepted: recordings are often cut off in their last line.
    """
    return num_bad > max(1, MAX_BAD_LINES * num_lines) or num_bad >= num_lines > 0


def _unread_findings(
    probe: SessionProbe, kinds: set[str], fixes: Mapping[str, str]
) -> list[Finding]:
    """Report skipped lines: warnings, or errors if a file lost too many."""
    findings: list[Finding] = []
    for file, fix in fixes.items():
        issues = [i for i in probe.issues if i.file == file and i.kind in kinds]
        unread = {i.line for i in probe.issues if i.file == file and i.kind in UNREAD_KINDS}
        num_lines = probe.num_lines[file]
        if is_mostly_unread(len(unread), num_lines):
            share = f"{len(unread) / num_lines:.0%} of the lines are unreadable"
            advice = f"{share}; fix: check that this is the right file"
            findings += issue_findings("error", issues, advice)
        else:
            findings += issue_findings("warning", issues, fix)
    return findings


def _unit_findings(probe: SessionProbe) -> list[Finding]:
    """Report timestamps that are not seconds."""
    unit, times_s = probe.unit, probe.metadata.times_s
    if unit is None:
        return []
    interval = float(np.median(np.diff(times_s))) * unit.per_s
    message = (
        f"timestamps look like {unit.name}, not seconds: a line every {interval:g}; all other "
        f"messages about times assume divided timestamps; fix: divide them by {unit.per_s:.0f}"
    )
    if probe.is_unit_confirmed:
        message += ", then they last as long as the media (--fix does it)"
    return [Finding("error", f"{METADATA_FILE}: {message}")]


def _reading_findings(probe: SessionProbe, stream: Stream) -> list[Finding]:
    """Report readings of the wrong size, or with values that are not finite numbers."""
    findings: list[Finding] = []
    for kind, fix in (
        ("size", "they are masked"),
        ("number", "it is masked; fix: write numbers only"),
    ):
        issues = [i for i in probe.issues if i.kind == kind and i.key == stream]
        share = len(issues) / max(1, probe.num_lines[METADATA_FILE])
        level: Level = "error" if share > MAX_BAD_LINES else "warning"
        findings += issue_findings(level, issues, fix)
    return findings


def _line_gap_findings(probe: SessionProbe, rows: NDArray[np.int64], *, noun: str) -> list[Finding]:
    """Report gaps between metadata lines: one message for all short ones, one for each long."""
    times_s = probe.metadata.times_s[rows]
    intervals_s = np.diff(times_s)
    is_short, is_long = find_line_gaps(times_s)
    duration_s = max(probe.duration_s, EPSILON_S)
    short_share, long_share = (
        f"{min(1.0, float(intervals_s[is_gap].sum()) / duration_s):.1%}"
        for is_gap in (is_short, is_long)
    )
    findings: list[Finding] = []
    if is_short.any():
        row = int(np.argmax(np.where(is_short, intervals_s, 0)))
        message = (
            f"{probe.locate_row(int(rows[row]))}: no {noun} for {intervals_s[row] * 1e3:.0f} ms "
            f"after it, the longest of {is_short.sum()} gaps of 35-100 ms, {short_share} of "
            "the session; values in between are interpolated; fix: fill in single lost lines with "
            "--fix"
        )
        findings.append(Finding("warning", message))
    return findings + limit_findings(
        "error",
        (
            f"{probe.locate_row(int(rows[row]))}: no {noun} for {intervals_s[row]:.3f} s after it "
            f"(gaps over 100 ms are {long_share} of the session); masked; fix: record again if it "
            "matters"
            for row in np.flatnonzero(is_long)
        ),
        file=METADATA_FILE,
    )
