"""Checks of metadata lines and what they hold, and of gaps.

Gaps between metadata lines: under 35 ms good, to 100 ms a warning, over 100 ms an error. A video
has a frame rate of its own, so a hole there is longer than 100 ms and than three frames, and a
warning: the recipe masks what it can't show.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.findings import Finding, Level, limited, say
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

VIDEO_GAP_STEPS = 3
"""A hole in a video is longer than GAP_ERROR_S and than so many median frame distances."""

MAX_BAD_LINES = 0.1
"""Share of lines that may be unreadable before the whole file counts as damaged."""

MAX_STEP_BACK_S = 1.0
"""Lines out of order by no more are sorted; a longer step back can't be lines that changed places.
"""

ROUNDING = 1e-3
"""Touch and angles outside their range by less are rounding errors."""

DEGREES_RAD = 8 * math.pi
"""Larger angles are degrees, not unwrapped radians."""

SATURATED_SHARE = 0.2
"""A sensor at its limit for a larger share of its readings is saturated or stuck."""


def check_lines(evidence: SessionProbe) -> list[Finding]:
    """Every line is a JSON object."""
    mend = "it is left out; --fix drops it"
    return _unread(evidence, {"json", "long"}, {METADATA_FILE: mend, TEXT_FILE: mend})


def check_timestamps(evidence: SessionProbe) -> list[Finding]:
    """Every line has a finite timestamp, later than the line before."""
    mends = {
        METADATA_FILE: "it is left out; --fix drops it",
        TEXT_FILE: "it is left out; write the second when the text begins",
    }
    findings = [*_unit(evidence), *_unread(evidence, {"timestamp"}, mends)]
    back = [(o.line, o.back_s) for o in evidence.issues if o.kind == "order"]
    findings += limited(
        "error",
        (
            f"{METADATA_FILE} line {line}: timestamp goes back by {step_s:.3f} s: it is wrong, "
            "or the recorder started again; correct the line, or split the session there"
            for line, step_s in back
            if step_s > MAX_STEP_BACK_S
        ),
    )
    findings += limited(
        "warning",
        (
            f"{METADATA_FILE} line {line}: timestamp goes back by {step_s:.3f} s; lines are sorted "
            "when read; --fix sorts the file"
            for line, step_s in back
            if step_s <= MAX_STEP_BACK_S
        ),
    )
    mend = "the first line is kept; --fix joins the two"
    twice = [o for o in evidence.issues if o.kind == "duplicate"]
    return findings + limited("warning", (say(o, mend) for o in twice))


def check_gaps(evidence: SessionProbe) -> list[Finding]:
    """Metadata lines, each sensor's readings and video frames follow closely."""
    metadata = evidence.metadata
    findings = _line_gaps(evidence, np.arange(len(metadata.times_s)), "line")
    for stream in (Stream.TOUCH, Stream.PROPRIO):
        rows = np.flatnonzero(metadata.rows_with(stream))
        if 0 < len(rows) < len(metadata.times_s):
            findings += _line_gaps(evidence, rows, f"{stream} reading")
    for stream, picture in evidence.pictures.items():
        findings += _video_gaps(VISION_FILES[stream], picture.track.times_s)
    return findings


def check_touch(evidence: SessionProbe) -> list[Finding]:
    """Touch has the recipe's size, is finite, and lies in [0, 1]."""
    findings = _readings(evidence, "touch")
    values = evidence.metadata.touch.astype(np.float64)
    over = np.fmax(values - 1, -values).max(axis=1, initial=-np.inf)
    far = np.flatnonzero(over > ROUNDING)
    findings += limited(
        "error",
        (
            f"{evidence.line_at(int(i))}: touch holds {_farthest(values[i], 0.5):g}, outside "
            "[0, 1]; divide raw readings by their full scale before recording"
            for i in far
        ),
    )
    near = np.flatnonzero((over > 0) & (over <= ROUNDING))
    return findings + limited(
        "warning",
        (
            f"{evidence.line_at(int(i))}: touch is off [0, 1] by rounding; --fix clamps it"
            for i in near
        ),
    )


def check_proprio(evidence: SessionProbe) -> list[Finding]:
    """Proprio has the recipe's size, is finite, and its angles lie in [-pi, pi]."""
    findings = _readings(evidence, "proprio")
    num_angles = evidence.recipe.sensors.proprio_size // 2
    angles = np.abs(evidence.metadata.proprio[:, :num_angles].astype(np.float64))
    largest = angles.max(axis=1, initial=0.0)
    degrees = np.flatnonzero(largest > DEGREES_RAD)
    findings += limited(
        "error",
        (
            f"{evidence.line_at(int(i))}: an angle of {largest[i]:g} rad looks like degrees; "
            "multiply angles and velocities by pi / 180 before recording"
            for i in degrees
        ),
    )
    beyond = np.flatnonzero((largest > math.pi + EPSILON_S) & (largest <= DEGREES_RAD))
    if len(beyond):
        row = int(beyond[0])
        is_rounding = np.nanmax(largest) <= math.pi + ROUNDING
        mend = "--fix clamps it" if is_rounding else "nothing to do if rotations are unwrapped"
        what = (
            f"angle of {largest[row]:g} rad, outside [-pi, pi], as in {len(beyond)} of "
            f"{len(largest)} lines; angles are wrapped when read; {mend}"
        )
        findings.append(Finding("warning", f"{evidence.line_at(row)}: {what}"))
    return findings


def check_saturation(evidence: SessionProbe) -> list[Finding]:
    """No sensor stands at its limit, and not all of them stand still."""
    metadata = evidence.metadata
    num_angles = evidence.recipe.sensors.proprio_size // 2
    touch = metadata.touch[metadata.rows_with(Stream.TOUCH)]
    angles = metadata.proprio[metadata.rows_with(Stream.PROPRIO), :num_angles]
    findings: list[Finding] = []
    for name, is_at_limit, limit in (
        ("touch", touch >= 1 - ROUNDING, "1"),
        ("proprio", np.abs(np.abs(angles) - math.pi) < ROUNDING, "pi"),
    ):
        shares = is_at_limit.mean(axis=0) if len(is_at_limit) > 1 else np.zeros(0)
        findings += limited(
            "warning",
            (
                f"{METADATA_FILE}: {name}[{i}] stands at its limit {limit} in {shares[i]:.0%} of "
                "its readings: saturated or stuck; check the sensor's range and cable"
                for i in np.flatnonzero(shares > SATURATED_SHARE)
            ),
        )
    if len(angles) > 1 and angles.any() and not np.ptp(angles, axis=0).any():
        what = "no angle changes in the whole session: frozen tracking; check that it was running"
        findings.append(Finding("warning", f"{METADATA_FILE}: {what}"))
    return findings


def is_mostly_unread(num_bad: int, num_lines: int) -> bool:
    """Whether a file lost too many lines to be trusted; one, cut off say, may always be lost."""
    return num_bad > max(1, MAX_BAD_LINES * num_lines) or num_bad >= num_lines > 0


def _unread(evidence: SessionProbe, kinds: set[str], mends: Mapping[str, str]) -> list[Finding]:
    """Lines that are left out: warnings, or errors where a file lost too many."""
    findings: list[Finding] = []
    for file, mend in mends.items():
        found = [o for o in evidence.issues if o.file == file and o.kind in kinds]
        bad = {o.line for o in evidence.issues if o.file == file and o.kind in UNREAD_KINDS}
        num_lines = evidence.num_lines[file]
        if is_mostly_unread(len(bad), num_lines):
            share = f"{len(bad) / num_lines:.0%} of the lines are unreadable"
            wrong = f"{share}: check that this is the right file"
            findings += limited("error", (say(o, wrong) for o in found))
        else:
            findings += limited("warning", (say(o, mend) for o in found))
    return findings


def _unit(evidence: SessionProbe) -> list[Finding]:
    """Timestamps are seconds."""
    unit, times_s = evidence.unit, evidence.metadata.times_s
    if unit is None:
        return []
    step = float(np.median(np.diff(times_s))) * unit.per_s
    mend = f"divide them by {unit.per_s:.0f}"
    if evidence.is_unit_sure:
        mend += ", then they last as long as the media; --fix does it"
    what = f"timestamps look like {unit.name}, not seconds: a line every {step:g}; {mend}"
    what += "; what else is said here of their times holds afterwards"
    return [Finding("error", f"{METADATA_FILE}: {what}")]


def _readings(evidence: SessionProbe, key: str) -> list[Finding]:
    """Readings of the wrong size, or with values that are no finite numbers."""
    findings: list[Finding] = []
    for kind, mend in (("size", "they are masked"), ("number", "it is masked; write numbers only")):
        found = [o for o in evidence.issues if o.kind == kind and o.key == key]
        share = len(found) / max(1, evidence.num_lines[METADATA_FILE])
        level: Level = "error" if share > MAX_BAD_LINES else "warning"
        findings += limited(level, (say(o, mend) for o in found))
    return findings


def _line_gaps(evidence: SessionProbe, rows: NDArray[np.int64], what: str) -> list[Finding]:
    """Gaps between metadata lines: one sentence for the short ones, one for each long."""
    times_s = evidence.metadata.times_s[rows]
    steps_s = np.diff(times_s)
    is_long = steps_s > GAP_ERROR_S + EPSILON_S
    is_short = (steps_s >= GAP_WARNING_S) & ~is_long
    length_s = max(evidence.length_s, EPSILON_S)
    findings: list[Finding] = []
    if is_short.any():
        row = int(np.argmax(np.where(is_short, steps_s, 0)))
        share = _part(steps_s[is_short], length_s)
        message = (
            f"{evidence.line_at(int(rows[row]))}: no {what} for {steps_s[row] * 1e3:.0f} ms after "
            f"it, the longest of {is_short.sum()} gaps of 35-100 ms, {share} of "
            "the session; values between are interpolated; --fix fills in single lost lines"
        )
        findings.append(Finding("warning", message))
    share = _part(steps_s[is_long], length_s)
    return findings + limited(
        "error",
        (
            f"{evidence.line_at(int(rows[row]))}: no {what} for {steps_s[row]:.3f} s after it "
            f"(gaps over 100 ms are {share} of the session); masked; record again if it matters"
            for row in np.flatnonzero(is_long)
        ),
    )


def _part(steps_s: NDArray[np.float64], length_s: float) -> str:
    return f"{min(1.0, float(steps_s.sum()) / length_s):.1%}"


def _video_gaps(file: str, times_s: NDArray[np.float64]) -> list[Finding]:
    """Holes in a video."""
    steps_s = np.diff(times_s)
    if len(steps_s) == 0:
        return []
    least_s = max(GAP_ERROR_S + EPSILON_S, VIDEO_GAP_STEPS * float(np.median(steps_s)))
    return limited(
        "warning",
        (
            f"{file} {times_s[i]:.2f}-{times_s[i + 1]:.2f} s: no frame for {steps_s[i]:.3f} s; "
            "pictures too far away are masked; record at a steadier frame rate"
            for i in np.flatnonzero(steps_s > least_s)
        ),
    )


def _farthest(values: NDArray[np.float64], middle: float) -> float:
    """The value farthest from the middle."""
    return float(values[np.argmax(np.abs(values - middle))])
