"""Check one session: read it, run every check, and collect the findings in a report."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from preprocess.validate import checks as session_checks
from preprocess.validate import content_checks, line_checks, value_checks
from preprocess.validate.checks import NEEDS_DECODING, Finding
from preprocess.validate.clock_checks import check_drift, measure_clocks
from preprocess.validate.probe import READER_VERSION, probe_session
from preprocess.validate.repair import plan_repairs
from preprocess.validate.timeline import absent_state, measure_stream
from shared.clock import measure_rate_hz
from shared.errors import EngineError, MachineError, SessionError
from shared.machine import describe_os_error
from shared.session.folder import is_session, source_files
from shared.session.names import explain_bad_name, printable, session_name
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import Self

    from preprocess.validate.checks import Level
    from preprocess.validate.probe import Depth, SessionProbe
    from shared.recipe import Recipe
    from shared.session.names import UnusedName

Status = Literal["passed", "warnings", "failed", "unchecked"]
CheckStatus = Literal["passed", "warnings", "failed", "not assessed"]
StreamStatus = Literal["passed", "warnings", "failed", "absent"]


@dataclass(frozen=True, slots=True)
class Check:
    """How a session is judged in one respect."""

    function: Callable[[SessionProbe], list[Finding]]
    version: int = 1
    """Raise it when the check can say something else of the same session: kept verdicts of other
    versions do not count. When a reader can, raise READER_VERSION instead."""
    depth: Depth = "quick"
    """What it needs; a check that needs decoding is not assessed when a session is read quickly."""


CHECKS: Mapping[str, Check] = {
    "files": Check(session_checks.check_files),
    "names": Check(session_checks.check_names),
    "streams": Check(session_checks.check_streams),
    "lines": Check(line_checks.check_lines),
    "timestamps": Check(line_checks.check_timestamps),
    "left out": Check(session_checks.check_left_out),
    "clock": Check(session_checks.check_clock),
    "starts": Check(session_checks.check_starts),
    "gaps": Check(line_checks.check_gaps),
    "rates": Check(line_checks.check_rates),
    "expectations": Check(line_checks.check_expectations),
    "values": Check(value_checks.check_values),
    "velocities": Check(value_checks.check_velocities),
    "saturation": Check(value_checks.check_saturation),
    "still": Check(content_checks.check_still),
    "sound": Check(content_checks.check_sound),
    "levels": Check(content_checks.check_levels, depth="full"),
    "video": Check(content_checks.check_video),
    "frames": Check(content_checks.check_frames, depth="full"),
    "clock rates": Check(session_checks.check_clock_rates),
    "durations": Check(session_checks.check_durations),
    "drift": Check(check_drift, version=2),
    "text": Check(session_checks.check_text),
    "length": Check(session_checks.check_length),
}
"""Every check of a session, in the order of their messages."""

CHECK_VERSIONS = {name: f"{READER_VERSION}.{check.version}" for name, check in CHECKS.items()}
"""Version of each check together with the readers; a kept verdict must agree in all of them."""

SINGLE_FILE_CHECKS = frozenset(
    {"files", "gaps", "starts", "still", "sound", "levels", "video", "frames"}
)
"""Checks of a single file; the others compare streams, or need a whole session."""

_SILENT_DBFS = -120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """The outcome of all checks of one session."""

    session: str
    checks: Mapping[str, CheckStatus] = field(default_factory=dict)
    """Outcome of each check in :data:`CHECKS`."""
    not_assessed: Mapping[str, str] = field(default_factory=dict)
    """Check -> why it could not judge the session, or some streams, which the reason then names.
    Never changes a status."""
    streams: Mapping[str, StreamStatus] = field(default_factory=dict)
    """Outcome of all checks for each declared stream."""
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What is worth knowing, and is no fault."""
    stats: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values: length_s, clock_offset_s, lines of each file, absent with the reason and
    absent_states, streams: statistics of each stream by its kind, and clocks: drift and offset."""

    is_unchecked: bool = False
    """Whether the machine could not read the session, which may be good; `errors` says why."""
    depth: Depth = "full"
    """How much of the session was read."""

    @property
    def status(self) -> Status:
        """The worst outcome of a check."""
        if self.is_unchecked:
            return "unchecked"
        return "failed" if self.errors else "warnings" if self.warnings else "passed"

    def has_failed(self, *, strict: bool) -> bool:
        """Return whether the session failed; with `strict`, warnings count as failures."""
        return self.status == "failed" or (strict and self.status == "warnings")

    def with_findings(self, findings: Iterable[Finding]) -> Self:
        """Return the report with more warnings and notes."""
        added = [(finding.level, printable(finding.message)) for finding in findings]
        warnings = (message for level, message in added if level == "warning")
        notes = (message for level, message in added if level == "note")
        return replace(self, warnings=(*self.warnings, *warnings), notes=(*self.notes, *notes))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        messages = {key: list(getattr(self, key)) for key in ("warnings", "errors", "notes")}
        keys = ("checks", "not_assessed", "streams")
        mappings = {key: dict(getattr(self, key)) for key in keys}
        own = {"session": self.session, "status": self.status, "depth": self.depth}
        return {**own, **mappings, **messages, "stats": dict(self.stats)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report that :meth:`as_dict` made the values of."""
        own = {key: value for key, value in values.items() if key != "status"}
        messages = {key: tuple(values[key]) for key in ("warnings", "errors", "notes")}
        return cls(**{**own, **messages}, is_unchecked=values["status"] == "unchecked")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedSession:
    """The report of one session, or of a location in which no session could be checked."""

    folder: Path
    """The session's files; copies of remote ones exist until the next session is requested."""
    repairs: tuple[str, ...] = ()
    report: ValidationReport
    probe: SessionProbe | None = None
    """What was read of it; None if that was not possible."""
    findings: tuple[Finding, ...] = ()
    """What the checks found, errors first."""


def check_session(
    path: Path,
    *,
    recipe: Recipe,
    checks: Collection[str] = CHECKS.keys(),
    unused: Sequence[UnusedName] | None = None,
    depth: Depth = "full",
) -> CheckedSession:
    """Check one session folder; the report is failed, without a probe, if that is impossible.

    `unused` are its files that no stream uses; None finds those in the folder. Checks that need
    more than `depth` are not assessed.
    """
    name = session_name(path if path.name else path.resolve())
    try:
        if not path.is_dir():
            raise SessionError(f"{path}: no such folder; fix: give the folder of a session")
        if not is_session(path, recipe):
            raise SessionError(
                f"{path}: not a session; fix: put one of {', '.join(source_files(recipe))} into it"
            )
        if fault := explain_bad_name(name):
            raise SessionError(fault)
        seen = probe_session(path, recipe=recipe, unused=unused, depth=depth)
        # In an unconfirmed unit, a repair takes nothing from the streams, as in a scan.
        known = seen
        if not all(unit.is_confirmed for unit in seen.units.values()):
            absent = dict.fromkeys(recipe.streams, "")
            known = replace(seen, absent=absent, intervals={}, rate_faults=())
        plan = functools.cache(lambda: plan_repairs(path, recipe=recipe, seen=known))
        probe = replace(seen, plan=plan)
        findings = {key: _judge(CHECKS[key], probe) for key in CHECKS if key in checks}
        report = _make_report(name, findings, probe)
        everything = [finding for of_check in findings.values() for finding in of_check]
        levels: tuple[Level, ...] = ("error", "warning", "note")
        ordered = [f for level in levels for f in everything if f.level == level]
        return CheckedSession(folder=path, report=report, probe=probe, findings=tuple(ordered))
    except Exception as error:  # Boundary: any exception fails only this session.
        return make_failed_report(path, name, error)


def _judge(check: Check, probe: SessionProbe) -> list[Finding]:
    """Run a check, if what was read is enough for it."""
    if check.depth == "full" and probe.depth == "quick" and (probe.videos or probe.audio):
        return [Finding("unassessed", NEEDS_DECODING)]
    return check.function(probe)


def describe_totals(statuses: Iterable[Status] | Counter[Status], length: str) -> str:
    """Format the number of sessions, their length, and how many have each status."""
    words: dict[Status, str] = {
        "passed": "passed",
        "warnings": "with warnings",
        "failed": "failed",
        "unchecked": "that could not be checked",
    }
    counts = Counter(statuses)
    outcomes = [f"{counts[s]} {word}" for s, word in words.items() if counts[s]]
    sessions = "1 session" if counts.total() == 1 else f"{counts.total()} sessions"
    return f"{sessions}, {length}: {', '.join(outcomes) or 'nothing to check'}"


def make_failed_report(folder: Path, session: str, error: Exception) -> CheckedSession:
    """Return the report of what cannot be checked: "failed", or "unchecked" if machines fail."""
    message, is_unchecked = str(error), isinstance(error, (MachineError, MemoryError, OSError))
    if isinstance(error, (OSError, MemoryError)):
        message = describe_os_error(error, getattr(error, "filename", None) or folder)
    elif not isinstance(error, EngineError):
        reason = f"{type(error).__name__}: {error}"
        message = f"{folder}: cannot be checked: {reason}; fix: look at its files"
    report = ValidationReport(
        session=printable(session), errors=(printable(message),), is_unchecked=is_unchecked
    )
    return CheckedSession(folder=folder, report=report)


def _make_report(
    session: str, findings: Mapping[str, list[Finding]], probe: SessionProbe
) -> ValidationReport:
    """Join the findings of all checks."""
    everything = [finding for of_check in findings.values() for finding in of_check]
    streams: dict[str, StreamStatus] = {}
    for name in probe.recipe.streams:
        status = _worst_status([finding for finding in everything if name in finding.streams])
        is_absent = name not in probe.intervals and status != "failed"
        streams[name] = "absent" if is_absent else status
    return ValidationReport(
        session=printable(session),
        checks={name: _check_status(of_check) for name, of_check in findings.items()},
        not_assessed={n: text for n, of in findings.items() if (text := _describe_unassessed(of))},
        streams=streams,
        warnings=tuple(printable(f.message) for f in everything if f.level == "warning"),
        errors=tuple(printable(f.message) for f in everything if f.level == "error"),
        notes=tuple(printable(f.message) for f in everything if f.level == "note"),
        stats=_collect_stats(probe),
        depth=probe.depth,
    )


def _describe_unassessed(findings: list[Finding]) -> str:
    """Return what a check could not judge, and why; empty if it judged everything."""
    return "; ".join(
        f"{', '.join(finding.streams)}: {finding.message}" if finding.streams else finding.message
        for finding in findings
        if finding.level == "unassessed"
    )


def _check_status(findings: list[Finding]) -> CheckStatus:
    """Return the outcome of a check; what it could not judge hides no fault that it found."""
    status = _worst_status(findings)
    is_idle = any(f.level == "unassessed" and not f.streams for f in findings)
    return "not assessed" if is_idle and status == "passed" else status


def _worst_status(findings: list[Finding]) -> Literal["passed", "warnings", "failed"]:
    levels = {finding.level for finding in findings}
    return "failed" if "error" in levels else "warnings" if "warning" in levels else "passed"


def _collect_stats(probe: SessionProbe) -> dict[str, Any]:
    """Return measurements of a session as plain JSON values."""
    return {
        "length_s": round(probe.duration_s, 3),
        "clock_offset_s": round(probe.offset_s, 6),
        "lines": {file: probe.num_lines(file) for file in probe.files},
        "absent": {name: printable(reason) for name, reason in probe.absent.items()},
        "absent_states": {name: absent_state(name, probe) for name in probe.absent},
        "streams": {
            name: {
                "kind": probe.recipe.streams[name].kind.value,
                "start_s": round(interval.start_s, 3),
                "stop_s": round(interval.stop_s, 3),
                **_STATISTICS[probe.recipe.streams[name].kind][0](name, probe),
                **measure_stream(name, probe),
            }
            for name, interval in probe.intervals.items()
        },
        "clocks": {
            name: {"not_assessed": clock} if isinstance(clock, str) else asdict(clock)
            for name, clock in measure_clocks(probe).items()
        },
    }


def _video_statistics(name: str, probe: SessionProbe) -> dict[str, Any]:
    video = probe.videos[name]
    return {
        "codec": video.track.codec,
        "width": video.track.width,
        "height": video.track.height,
        "frames": len(video.track.times_s),
        "frames_checked": video.num_checked,
        "frames_undecoded": len(video.undecoded),
        **_time_statistics(name, probe),
    }


def _audio_statistics(name: str, probe: SessionProbe) -> dict[str, Any]:
    sound = probe.audio[name].sound
    form = {"rate_hz": sound.source_rate_hz, "channels": sound.source_channels}
    if probe.depth == "quick":
        return form
    return form | {
        "mix": {"weights": sound.mix.weights, "offset": sound.mix.offset}
        | ({"correlation": sound.mix.correlation} if sound.mix.correlation else {}),
        "rms": round(probe.audio[name].rms, 6),
        "peak": round(sound.peak, 6),
        "clipped_samples": sound.num_clipped,
    }


def _sensor_statistics(name: str, probe: SessionProbe) -> dict[str, Any]:
    spec, readings = probe.recipe.sensors[name], probe.readings[name]
    values: list[dict[str, Any]] = []
    for group, columns in zip(spec.values, spec.slices, strict=True):
        numbers = readings.values[:, columns].astype(np.float64)
        measures = {"min": numbers.min(), "mean": numbers.mean(), "max": numbers.max()}
        measures["std"] = numbers.std()
        values.append(
            {"type": group.type.value, "count": group.count, "unit": group.unit_label}
            | {key: float(f"{value:.6g}") for key, value in measures.items()}
        )
    return {"readings": len(readings.times_s), **_time_statistics(name, probe), "values": values}


def _text_statistics(name: str, probe: SessionProbe) -> dict[str, Any]:
    texts = [event.text for event in probe.events[name]]
    return {"events": len(texts), "characters": sum(map(len, texts))}


def _time_statistics(name: str, probe: SessionProbe) -> dict[str, Any]:
    """Return the regular rate and the gaps of frames or readings."""
    times_s = probe.times_s(name)
    if times_s is None or len(times_s) < 2:
        return {}
    intervals_s, gaps = np.diff(times_s), line_checks.find_gaps(times_s, probe.recipe.streams[name])
    duration_s = max(probe.duration_s, 1e-9)
    return {
        "rate_hz": round(measure_rate_hz(times_s) or 0.0, 3),
        "longest_gap_s": round(float(intervals_s.max()), 6),
        "share_short_gaps": round(float(intervals_s[gaps.is_short].sum()) / duration_s, 4),
        "share_long_gaps": round(float(intervals_s[gaps.is_long].sum()) / duration_s, 4),
    }


def _describe_video(stats: Mapping[str, Any]) -> str:
    size = f"{stats['codec']} {stats['width']}x{stats['height']}"
    return f"{size}, {stats['frames']} frames{_describe_times(stats, 'fps')}"


def _describe_audio(stats: Mapping[str, Any]) -> str:
    rate = f"{stats['rate_hz'] / 1e3:g} kHz x {stats['channels']}"
    if "rms" not in stats:
        return rate
    levels = f"RMS {_format_level(stats['rms'])}, peak {_format_level(stats['peak'])}"
    return f"{rate}, {levels}, {stats['clipped_samples']} samples clipped"


def _describe_sensor(stats: Mapping[str, Any]) -> str:
    ranges = [
        f"{group['count']} x {group['type']} {group['min']:.3g} to {group['max']:.3g}"
        + (f" {group['unit']}" if group["unit"] not in ("", "0..1") else "")
        for group in stats["values"]
    ]
    readings = f"{stats['readings']} readings{_describe_times(stats, 'Hz')}"
    return "; ".join([readings, ", ".join(ranges)] if ranges else [readings])


_Statistics = tuple["Callable[[str, SessionProbe], dict[str, Any]]", "Callable[..., str]"]

_STATISTICS: Mapping[Kind, _Statistics] = {
    Kind.VIDEO: (_video_statistics, _describe_video),
    Kind.AUDIO: (_audio_statistics, _describe_audio),
    Kind.SENSOR: (_sensor_statistics, _describe_sensor),
    Kind.TEXT: (_text_statistics, "{events} texts, {characters} characters".format_map),
}
"""What is measured of a stream that is present, and how that is described."""


def describe_stream(stats: Mapping[str, Any]) -> str:
    """Describe a stream by its statistics."""
    return _STATISTICS[Kind(stats["kind"])][1](stats)


def _describe_times(stats: Mapping[str, Any], unit: str) -> str:
    """Format rate and longest gap, if there are any."""
    if not stats.get("rate_hz"):
        return ""
    return f", {stats['rate_hz']:.1f} {unit}, longest gap {stats['longest_gap_s']:.3f} s"


def _format_level(level: float) -> str:
    """Format a level of full scale 1 in dBFS."""
    level_db = 20 * math.log10(level) if level > 0 else _SILENT_DBFS
    return f"{level_db:.1f} dBFS" if level_db > _SILENT_DBFS else "silent"
