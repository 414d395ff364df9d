"""Judge the values of sensors by their type.

Each value type has a row in two tables: how its range is checked, and when a value is at its limit.
A stream with poses and as many velocities must have velocities that are the change of the poses.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.checks import Finding, Level, issue_findings, stream_findings, unjudged
from preprocess.validate.line_checks import MAX_BAD_LINES
from preprocess.validate.repair_plan import RepairKind
from shared.clock import EPSILON_S
from shared.streams import ValueType
from shared.values import wrap_angle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from preprocess.validate.probe import SessionProbe
    from shared.streams import ValueGroup

ROUNDING = 1e-3
"""Fractions and angles outside their range by less are rounding errors."""

DEGREES_RAD = 8 * math.pi
"""Larger angles are degrees, not unwrapped radians."""

NORM_TOLERANCE = 0.05
"""Quaternions and directions differ from unit length by at most this much."""

SATURATED_SHARE = 0.2
"""A sensor at its limit for a larger share of its readings is saturated or stuck."""

_COMPARED_S = 0.5
"""Changes of poses and of summed velocities are compared over about this time."""

_MIN_CHANGE = 0.02
"""Root mean square of the changes below which poses stand still, rad or m."""

_MIN_COMPARED = 5
_MIN_CORRELATION = 0.5
_SLOPES = (0.5, 2.0)
"""Velocities that change the pose by a factor outside this range are wrong."""

_DEGREES = 180 / math.pi


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The readings of one value group."""

    name: str
    """The stream."""
    group: ValueGroup
    first: int
    """Column of the group's first value."""
    values: NDArray[np.float64]
    """[N, count]."""


def _groups(probe: SessionProbe) -> Iterator[_Group]:
    """Yield each value group of each sensor with readings."""
    for name, readings in probe.readings.items():
        spec = probe.recipe.sensors[name]
        for group, columns in zip(spec.values, spec.slices, strict=True):
            values = readings.values[:, columns].astype(np.float64)
            yield _Group(name=name, group=group, first=columns.start, values=values)


def check_values(probe: SessionProbe) -> list[Finding]:
    """Check that readings have the declared size, and are in the range of their type."""
    findings = _reading_findings(probe)
    for group in _groups(probe):
        check = _RANGE_CHECKS.get(group.group.type)
        if check is not None:
            findings += check(probe, group)
    return findings


def _reading_findings(probe: SessionProbe) -> list[Finding]:
    """Report readings of the wrong size, or with values that are not finite numbers."""
    findings: list[Finding] = []
    for name, spec in probe.recipe.sensors.items():
        file = spec.file
        num_lines = probe.num_lines(file)
        for kind, fix in (
            ("column", "the stream is left out"),
            ("size", "they are masked"),
            ("number", "it is masked; fix: write numbers only"),
        ):
            issues = [i for i in probe.issues_of(file) if i.kind == kind and i.stream in (name, "")]
            level = _share_level(sum(issue.count for issue in issues), num_lines)
            if kind == "column":
                level = "error"
            findings += issue_findings(level, issues, fix, streams=(name,))
        lines = probe.missing[name]
        if len(lines):
            message = (
                f"{file} line {lines[0]}: {name} has a quaternion or direction of almost no "
                f"length, as in {len(lines)} of {num_lines} lines; it is masked; fix: write null "
                "where tracking fails"
            )
            findings.append(Finding(_share_level(len(lines), num_lines), message, (name,)))
    return findings


def _share_level(num_faults: int, num_lines: int) -> Level:
    """Return the level of readings that cannot be used: an error if they are many."""
    return "error" if num_faults > MAX_BAD_LINES * num_lines else "warning"


def _check_fractions(probe: SessionProbe, group: _Group) -> list[Finding]:
    """Check that fractions are in [0, 1]."""
    name, values = group.name, group.values
    excess = np.maximum(values - 1, -values).max(axis=1, initial=-np.inf)
    farthest = np.abs(values - 0.5).argmax(axis=1)
    outside = [
        f"{probe.locate(name, i)}: {name} is {values[i, farthest[i]]:g}, outside [0, 1]; fix: "
        "divide raw readings by their full scale before recording"
        for i in np.flatnonzero(excess > ROUNDING).tolist()
    ]
    rounded = [
        f"{probe.locate(name, i)}: {name} is outside [0, 1] by rounding; fix: "
        + probe.plan().advise(RepairKind.CLAMP, probe.recipe.streams[name].file, "clamp it")
        for i in np.flatnonzero((excess > 0) & (excess <= ROUNDING)).tolist()
    ]
    findings = stream_findings("error", outside, name, probe)
    return findings + stream_findings("warning", rounded, name, probe)


def _check_angles(probe: SessionProbe, group: _Group) -> list[Finding]:
    """Check that angles are radians, and in [-pi, pi]."""
    name, largest = group.name, np.abs(group.values).max(axis=1, initial=0.0)
    degrees = [
        f"{probe.locate(name, i)}: {name} has an angle of {largest[i]:g} rad, which looks like "
        "degrees; fix: multiply angles and velocities by pi / 180 before recording"
        for i in np.flatnonzero(largest > DEGREES_RAD).tolist()
    ]
    findings = stream_findings("error", degrees, name, probe)
    beyond = np.flatnonzero((largest > math.pi + EPSILON_S) & (largest <= DEGREES_RAD))
    if len(beyond):
        row = int(beyond[0])
        fix = "fine if rotations are unwrapped"
        if largest.max() <= math.pi + ROUNDING:
            file = probe.recipe.streams[name].file
            fix = f"fix: {probe.plan().advise(RepairKind.CLAMP, file, 'clamp it')}"
        message = (
            f"{probe.locate(name, row)}: {name} has an angle of {largest[row]:g} rad, outside "
            f"[-pi, pi], as in {len(beyond)} of {len(largest)} readings; angles are wrapped when "
            f"read; {fix}"
        )
        findings.append(Finding("warning", message, (name,)))
    return findings


def _check_norms(probe: SessionProbe, group: _Group) -> list[Finding]:
    """Check that quaternions and directions have unit length."""
    size = group.group.vector_size
    norms = np.linalg.norm(group.values.reshape(len(group.values), -1, size), axis=2)
    is_off = np.abs(norms - 1) > NORM_TOLERANCE
    rows = np.flatnonzero(is_off.any(axis=1))
    if not len(rows):
        return []
    row = int(rows[0])
    order = "x, y, z, w" if size == 4 else "x, y, z"
    message = (
        f"{probe.locate(group.name, row)}: {group.name} has a {group.group.type} of length "
        f"{norms[row, int(np.argmax(is_off[row]))]:.3g}, not 1, as in {len(rows)} of {len(norms)} "
        f"readings; it gets unit length when read; fix: check that the values are {order}"
    )
    return [Finding("warning", message, streams=(group.name,))]


_RANGE_CHECKS: Mapping[ValueType, Callable[[SessionProbe, _Group], list[Finding]]] = {
    ValueType.FRACTION: _check_fractions,
    ValueType.ANGLE: _check_angles,
    ValueType.QUATERNION: _check_norms,
    ValueType.DIRECTION: _check_norms,
}
"""Types whose values have a range; `expect.range` gives one to the others."""

_LIMITS: Mapping[ValueType, tuple[str, Callable[[NDArray[np.float64]], NDArray[np.bool_]]]] = {
    ValueType.FRACTION: ("1", lambda values: values >= 1 - ROUNDING),
    ValueType.ANGLE: ("pi", lambda values: np.abs(np.abs(values) - math.pi) < ROUNDING),
}
"""Limit of a type that a sensor can get stuck at, and which values are at it."""


def check_saturation(probe: SessionProbe) -> list[Finding]:
    """Check that no value stays at its limit."""
    findings: list[Finding] = []
    for group in _groups(probe):
        if group.group.type not in _LIMITS or len(group.values) < 2:
            continue
        limit, is_at = _LIMITS[group.group.type]
        shares = is_at(group.values).mean(axis=0)
        messages = [
            f"{probe.recipe.streams[group.name].file}: {probe.label(group.name, group.first + i)} "
            f"is at its limit {limit} in {shares[i]:.0%} of its readings: saturated or stuck; fix: "
            "check the sensor's range and cable"
            for i in np.flatnonzero(shares > SATURATED_SHARE).tolist()
        ]
        findings += stream_findings("warning", messages, group.name, probe)
    return findings


def check_velocities(probe: SessionProbe) -> list[Finding]:
    """Check that velocities are the change of the angles or positions beside them.

    A velocity group belongs to the pose group of its stream that has as many values.
    """
    findings: list[Finding] = []
    judged: dict[str, bool] = {}
    for name, of_stream in itertools.groupby(_groups(probe), key=lambda group: group.name):
        groups = list(of_stream)
        poses = [g for g in groups if g.group.type in (ValueType.ANGLE, ValueType.POSITION)]
        for velocity in (g for g in groups if g.group.type is ValueType.VELOCITY):
            pose = next((p for p in poses if p.group.count == velocity.group.count), None)
            if pose is None:
                continue
            poses.remove(pose)
            is_angle = pose.group.type is ValueType.ANGLE
            times_s = probe.readings[name].times_s
            fit = fit_velocities(times_s, pose.values, velocity.values, is_angle=is_angle)
            fault, judged[name] = (fit.fault, True) if fit is not None else ("", False)
            if fault:
                file = probe.recipe.streams[name].file
                message = f"velocities of {name} are not the change of its {pose.group.type}s"
                findings.append(Finding("warning", f"{file}: {message}: {fault}", (name,)))
    still = [name for name, is_judged in judged.items() if not is_judged]
    return findings + unjudged("almost no movement", still, is_all=len(still) == len(judged))


@dataclass(frozen=True, slots=True)
class VelocityFit:
    """How recorded velocities agree with the change of poses."""

    slope: float
    """Factor from the change to the summed velocities."""
    correlation: float

    @property
    def fault(self) -> str:
        """What is wrong, and the fix; empty if nothing is."""
        if self.correlation < _MIN_CORRELATION:
            return f"correlation {self.correlation:.2f}; fix: check their order and sign"
        if _SLOPES[0] <= self.slope <= _SLOPES[1]:
            return ""
        advice = "check their unit and order"
        if _SLOPES[0] <= self.slope / _DEGREES <= _SLOPES[1]:
            advice = "they look like degrees per second: multiply them by pi / 180 before recording"
        return f"they are {self.slope:.3g} times as large; fix: {advice}"


def fit_velocities(
    times_s: NDArray[np.float64],
    poses: NDArray[np.float64],
    velocities: NDArray[np.float64],
    *,
    is_angle: bool,
) -> VelocityFit | None:
    """Compare summed velocities [N, D] with the change of poses [N, D]; None if they stand still.

    Both are summed over about _COMPARED_S, so that noise of single readings does not count. Spans
    with a gap are left out.
    """
    steps_s = np.diff(times_s)
    if len(steps_s) < _MIN_COMPARED:
        return None
    median_s = float(np.median(steps_s))
    length = max(1, min(len(steps_s) // _MIN_COMPARED, round(_COMPARED_S / max(median_s, 1e-6))))
    starts = np.arange(0, len(steps_s) - length + 1, length)
    stop = int(starts[-1]) + length
    changes = np.diff(poses, axis=0)[:stop]
    if is_angle:
        changes = wrap_angle(changes)
    means = ((velocities[1:] + velocities[:-1]) / 2 * steps_s[:, None])[:stop]
    is_whole = ~np.logical_or.reduceat((steps_s > 2 * median_s)[:stop], starts)
    moved = np.add.reduceat(changes, starts, axis=0)[is_whole]
    summed = np.add.reduceat(means, starts, axis=0)[is_whole]
    energy = float(np.square(moved).sum())
    if not moved.size or math.sqrt(energy / moved.size) < _MIN_CHANGE:
        return None
    product = float((moved * summed).sum())
    spread = math.sqrt(energy * float(np.square(summed).sum()))
    return VelocityFit(product / energy, product / spread if spread > 0 else 0.0)
