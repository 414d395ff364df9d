"""Judge whole sessions: pure functions from a probe to findings.

A check is a function of a :class:`preprocess.validate.probe.SessionProbe` and opens nothing. A
finding has a level, the streams that it is about, and one sentence: where, what, and how to fix it.
Checks of what streams hold are in :mod:`preprocess.validate.content_checks`, of lines in
:mod:`preprocess.validate.line_checks`, of sensor values in
:mod:`preprocess.validate.value_checks`; the table of all checks is in
:mod:`preprocess.validate.report`.

Streams may end at different times: over 0.1 s is a warning. Over 1 s is an error if both streams
are required (a clock or a copy is wrong), else a warning, as the rest is masked. A late start is a
warning.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from preprocess.validate.repair_plan import RepairKind
from shared.clock import EPSILON_S, Interval
from shared.session.folder import SESSION_INFO_FILE
from shared.session.lines import keys_of
from shared.session.names import describe_unused
from shared.session.rates import MIN_LENGTH_S, format_rate
from shared.session.timestamps import describe_left_out
from shared.streams import Kind, MaskReason, SensorStream, TextStream, mask_reasons

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from preprocess.validate.probe import SessionProbe
    from shared.session.lines import ParseIssue
    from shared.session.names import UnusedName

Level = Literal["note", "warning", "error", "unassessed"]
"""What a finding means. "unassessed" is no fault: a check could not judge the streams that it
names, or, without streams, anything; the message is the reason alone."""

MAX_MESSAGES = 5
"""Messages of one kind that are written out; the others are counted."""

END_WARNING_S = 0.1
END_ERROR_S = 1.0

NEEDS_DECODING = "needs decoding; run without --quick"
"""Why a check judges nothing at depth "quick"."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a session."""

    level: Level
    message: str
    streams: Sequence[str] = ()
    """Streams whose verdict it decides; none if it is about the session."""


def unjudged(reason: str, streams: Sequence[str], *, is_all: bool) -> list[Finding]:
    """Say which streams a check could not judge; without their names if it judged no other."""
    return [Finding("unassessed", reason, () if is_all else streams)] if streams else []


def limit_findings(
    level: Level,
    messages: Iterable[str],
    *,
    file: str,
    streams: Sequence[str] = (),
    total: int | None = None,
) -> list[Finding]:
    """Make findings of one kind: the first MAX_MESSAGES, and the number of the others."""
    messages = list(messages)
    findings = [Finding(level, message, streams) for message in messages[:MAX_MESSAGES]]
    num_others = (len(messages) if total is None else total) - len(findings)
    if num_others > 0:
        findings.append(Finding(level, f"{file}: {num_others} more like these", streams))
    return findings


def stream_findings(
    level: Level, messages: Iterable[str], name: str, probe: SessionProbe
) -> list[Finding]:
    """Make findings of one kind about a stream."""
    return limit_findings(level, messages, file=probe.recipe.streams[name].file, streams=(name,))


def issue_findings(
    level: Level, issues: Sequence[ParseIssue], fix: str, *, streams: Sequence[str] = ()
) -> list[Finding]:
    """Make findings of parse issues of one kind and file: file and line, issue, fix."""
    if not issues:
        return []
    messages = (f"{issue.source_line}: {issue.message}; {fix}" for issue in issues)
    total = sum(issue.count for issue in issues)
    return limit_findings(level, messages, file=issues[0].file, streams=streams, total=total)


def check_files(probe: SessionProbe) -> list[Finding]:
    """Check that every file that exists can be read."""
    findings: list[Finding] = []
    for file, reason in probe.unreadable.items():
        level: Level = "warning" if file == SESSION_INFO_FILE else "error"
        findings.append(Finding(level, f"{file}: {reason}", probe.streams_of(file)))
    return findings


def check_names(probe: SessionProbe) -> list[Finding]:
    """Check that the files and keys of a session are those of declared streams.

    A name that is probably meant to be a declared one, which the session lacks, is a warning. All
    others are listed in a note: recorders may write more than a recipe uses.
    """
    sentences, others = describe_unused(probe.unused)
    findings = [
        Finding("warning", sentence, _streams_of(name, probe))
        for name, sentence in sentences.items()
    ]
    return findings + ([Finding("note", others)] if others else [])


def _streams_of(name: UnusedName, probe: SessionProbe) -> tuple[str, ...]:
    """Return the streams that the declared name belongs to."""
    if not name.key:
        return probe.streams_of(name.meant)
    specs = {stream: probe.recipe.streams[stream] for stream in probe.streams_of(name.file)}
    return tuple(
        stream
        for stream, spec in specs.items()
        if isinstance(spec, (SensorStream, TextStream)) and name.meant in keys_of(name.file, spec)
    )


def check_streams(probe: SessionProbe) -> list[Finding]:
    """Check that every required stream is present, and every other one that is recorded."""
    if not probe.intervals:
        message = "contains nothing that can be read as a stream; fix: record it again or remove it"
        return [Finding("error", f"session: {message}")]
    findings: list[Finding] = []
    for name, spec in probe.recipe.streams.items():
        if name in probe.intervals or (not spec.required and name in probe.not_recorded):
            continue
        reason = probe.absent.get(name, "not recorded")
        if spec.required:
            fix = f"record it, or remove `required` from streams.{name} in the recipe"
            message = f"session: required stream {name} is missing ({reason}); fix: {fix}"
        else:
            fix = f"record it, or remove streams.{name} from the recipe"
            message = f"session: stream {name} is missing ({reason}) and is masked; fix: {fix}"
        findings.append(Finding("error" if spec.required else "warning", message, (name,)))
    return findings


def check_clock(probe: SessionProbe) -> list[Finding]:
    """Check that the recorder's clock started with the session."""
    findings = [Finding("warning", note) for note in probe.clock_notes]
    file = next(iter(probe.shared_files), None)
    if not probe.offset_s or file is None or not (probe.readings or source_intervals(probe)):
        return findings
    fix = probe.plan().advise(
        RepairKind.SHIFT,
        file,
        "write the shifted timestamps",
        otherwise="none is needed, unless this is not the time of the session's start",
    )
    message = (
        f"the clock was never reset: timestamps start at {probe.offset_s:g} s; this offset is "
        f"subtracted when they are read; fix: {fix}"
    )
    return [*findings, Finding("warning", f"{file}: {message}")]


def check_left_out(probe: SessionProbe) -> list[Finding]:
    """Check that no lines are left out because their timestamps are wrong."""
    findings: list[Finding] = []
    for file, wrong in probe.left_out.items():
        fix = "correct them, or remove these lines"
        if probe.plan().covers(RepairKind.JUMP, file):
            fix = "remove the jump with --fix"
        messages = (f"{describe_left_out(file, lines)}; fix: {fix}" for lines in wrong)
        findings += limit_findings("error", messages, file=file, streams=probe.streams_of(file))
    return findings


def check_starts(probe: SessionProbe) -> list[Finding]:
    """Check that the start of every media file relative to the others is known."""
    if probe.placement.error is not None:
        consequence = "video and sound cannot be placed on the clock and are left out"
        return [Finding("error", f"{probe.placement.error}; until then {consequence}")]
    findings = [
        Finding(
            "warning",
            f"{SESSION_INFO_FILE}: start_s or stretch names {name[:40]!r}, which the recipe does "
            "not declare; fix: correct the name, or declare the stream",
        )
        for name in probe.placement.undeclared
    ]
    origins_s = {name: video.track.origin_s for name, video in probe.videos.items()}
    origins_s |= {name: audio.sound.origin_s for name, audio in probe.audio.items()}
    return findings + [
        Finding(
            "warning",
            f"{probe.source(name)}: starts {origin_s:.3f} s after its container's zero; placed at "
            f"{probe.intervals[name].start_s:g} s, as files share no clock; fix: if it was "
            f'recorded that much later than the others, write "start_s": {{"{name}": '
            f"{origin_s:.3f}}} into {SESSION_INFO_FILE}",
            (name,),
        )
        for name, origin_s in origins_s.items()
        if name not in probe.placement.starts and abs(origin_s) > END_WARNING_S
    ]


@dataclass(frozen=True, slots=True)
class _Source:
    """Streams of one file that begin and end together."""

    label: str
    """The file, and the streams if the file has others too."""
    streams: tuple[str, ...]
    interval: Interval


def source_intervals(probe: SessionProbe) -> list[_Source]:
    """Return the interval of the content of each file but texts, on the session clock.

    Streams of a file that begin or end apart are listed separately.
    """
    together: dict[tuple[str, int, int], list[str]] = {}
    for name, interval in probe.intervals.items():
        if probe.recipe.streams[name].kind is not Kind.TEXT:
            tenths = round(interval.start_s * 10), round(interval.stop_s * 10)
            together.setdefault((probe.source(name), *tenths), []).append(name)
    labels = [label for label, *_ in together]
    sources: list[_Source] = []
    for (label, *_), names in together.items():
        intervals = [probe.intervals[name] for name in names]
        start_s, stop_s = min(i.start_s for i in intervals), max(i.stop_s for i in intervals)
        full = label if labels.count(label) == 1 else f"{label} ({', '.join(names)})"
        sources.append(_Source(full, tuple(names), Interval(start_s, stop_s)))
    return sources


def incomparable(probe: SessionProbe) -> list[Finding]:
    """Say why the clocks of streams can't be compared; nothing if they can."""
    if len(source_intervals(probe)) < 2:
        return [Finding("unassessed", "fewer than two streams to compare")]
    return [] if probe.are_rates_known else [Finding("unassessed", NEEDS_DECODING)]


def check_clock_rates(probe: SessionProbe) -> list[Finding]:
    """Check that the clock of every stream ran as fast as those of the others."""
    if unassessed := incomparable(probe):
        return unassessed
    if not probe.rate_faults and probe.duration_s < MIN_LENGTH_S:
        return [Finding("unassessed", f"shorter than {MIN_LENGTH_S:g} s")]
    findings: list[Finding] = []
    for fault in (fault for fault in probe.rate_faults if fault.is_sure):
        stretch = {name: round(fault.factor, 7) for name in fault.streams}
        action = f'write "stretch": {json.dumps(stretch)} into {SESSION_INFO_FILE}'
        if not fault.is_even:
            action = "record again; no one factor corrects it"
        fix = probe.plan().advise(RepairKind.STRETCH, SESSION_INFO_FILE, action)
        specs = [probe.recipe.streams[name] for name in fault.streams]
        is_masked = all(MaskReason.CLOCK in mask_reasons(spec) for spec in specs)
        outcome = "masked" if is_masked else "kept, as `mask` of the recipe says"
        message = f"{fault.sentence}: {outcome}; fix: {fix}"
        findings.append(Finding("error", message, fault.streams))
    return findings


def check_durations(probe: SessionProbe) -> list[Finding]:
    """Check that videos, sound and sensors start and end together."""
    if unassessed := incomparable(probe):
        return unassessed
    sources = source_intervals(probe)
    longest = max(sources, key=lambda source: source.interval.stop_s)
    stop_s = longest.interval.stop_s
    findings: list[Finding] = []
    wrong = {name for fault in probe.rate_faults if fault.is_sure for name in fault.streams}
    for source in sources:
        apart_s = stop_s - source.interval.stop_s
        is_explained = wrong.issuperset(source.streams) or wrong.issuperset(longest.streams)
        if apart_s > END_WARNING_S and not is_explained:
            is_error = apart_s > END_ERROR_S and all(
                any(probe.recipe.streams[name].required for name in s.streams)
                for s in (source, longest)
            )
            message = (
                f"{source.label} ends at {source.interval.stop_s:.2f} s, {longest.label} at "
                f"{stop_s:.2f} s, {apart_s:.2f} s apart; "
                f"{_advise_on_end(probe, source, longest=longest)}"
            )
            level: Level = "error" if is_error else "warning"
            findings.append(Finding(level, message, source.streams))
        if source.interval.start_s > END_WARNING_S:
            advice = "it is masked before that; fix: start the recorders together"
            message = f"{source.label} starts at {source.interval.start_s:.2f} s; {advice}"
            findings.append(Finding("warning", message, source.streams))
    return findings


def check_text(probe: SessionProbe) -> list[Finding]:
    """Check that text events are inside the session, in declared streams, and not empty."""
    findings: list[Finding] = []
    for file in probe.files:
        issues, streams = probe.issues_of(file), probe.streams_of(file)
        unknown = [issue for issue in issues if issue.kind == "stream"]
        findings += issue_findings("error", unknown, "the text is skipped")
        empty = [issue for issue in issues if issue.kind == "text"]
        advice = "it is skipped; fix: write a text in its place"
        findings += issue_findings("warning", empty, advice, streams=streams)
    duration_s = probe.duration_s
    for name, events in probe.events.items():
        outside = [
            f"{event.source_line}: a text starts at {event.time_s:.3f} s, outside the session "
            f"[0, {duration_s:.3f}) s; fix: correct its timestamp"
            for event in events
            if not -EPSILON_S <= event.time_s <= duration_s + EPSILON_S
        ]
        findings += stream_findings("warning", outside, name, probe)
    return findings


def check_length(probe: SessionProbe) -> list[Finding]:
    """Check that the session is long enough for a segment, and not longer than one can be."""
    if probe.stop_s > probe.duration_s:
        message = (
            f"lasts {probe.stop_s:g} s: everything after {probe.duration_s:g} s is left out; "
            "a timestamp is probably wrong; fix: correct it"
        )
        return [Finding("warning", f"session: {message}")]
    recipe = probe.recipe
    least_s = recipe.segment.min_coverage * recipe.segment_s if recipe.required else 0.0
    if not probe.intervals or probe.duration_s >= least_s:
        return []
    message = (
        f"lasts {probe.duration_s:.2f} s: too short for a segment of {recipe.segment_s:g} s, of "
        f"which required streams must cover {recipe.segment.min_coverage:.0%}; fix: shorten "
        "segment.duration_s"
    )
    return [Finding("warning", f"session: {message}")]


def _advise_on_end(probe: SessionProbe, source: _Source, *, longest: _Source) -> str:
    """Return the advice for a stream that ends early; mentions --fix only if it helps."""
    file = probe.recipe.streams[longest.streams[0]].file
    apart_s = longest.interval.stop_s - source.interval.stop_s
    if probe.plan().covers(RepairKind.TRIM, file):
        return "the rest is masked; fix: --fix drops lines after the end of all media"
    rates = [f for f in probe.rate_faults if {*f.streams} & {*source.streams}]
    if file in probe.files and apart_s <= END_ERROR_S and not rates:
        media_stop_s = max(
            (probe.intervals[n].stop_s for n in (*probe.videos, *probe.audio)), default=0
        )
        events = (event for of_stream in probe.events.values() for event in of_stream)
        has_text = any(event.time_s > media_stop_s and event.file == file for event in events)
        reason = "; --fix keeps lines after the end of all media, as they contain text"
        return "the rest is masked" + reason * has_text
    cause, fix = "a clock is wrong", "copy it again if the original is longer"
    if rates:
        factors = json.dumps(dict.fromkeys(source.streams, round(rates[0].factor, 7)))
        cause = format_rate(rates[0].factor)
        fix += f', or write "stretch": {factors} into session.json'
    return f"the rest is masked; if they ran together, a copy was cut off or {cause}; fix: {fix}"
