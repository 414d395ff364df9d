"""Judge whole sessions and media: pure functions from a probe to findings.

A check is a function of a :class:`preprocess.validate.probe.SessionProbe` and opens nothing. A
finding has a level and one sentence: where, what, and how to fix it. Checks of metadata lines are
in :mod:`preprocess.validate.line_checks`; the table of all checks is in
:mod:`preprocess.validate.report`.

Streams may end at different times: over 0.1 s is a warning. Over 1 s is an error if both streams
are required (a clock or a copy is wrong), else a warning, as the rest is masked. A late start is a
warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shared.clock import EPSILON_S
from shared.media.sound import SILENCE_RMS
from shared.recipe import Stream
from shared.session.folder import (
    AUDIO_FILE,
    METADATA_FILE,
    SESSION_INFO_FILE,
    TEXT_FILE,
    VISION_FILES,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from preprocess.validate.probe import SessionProbe
    from shared.clock import Interval
    from shared.session.folder import ParseIssue

Level = Literal["warning", "error"]

MAX_MESSAGES = 5
"""Messages of one kind that are written out; the others are counted."""

END_WARNING_S = 0.1
END_ERROR_S = 1.0

MIN_DRIFT_LENGTH_S = 10.0
"""In a shorter video, the duration of one frame equals the worst drift."""

MAX_DRIFT_PPM = 10_000.0
"""A larger difference is not drift: one of the two was cut off. Quartz clocks have under 100."""

MIN_CLIPPED = 8
"""Fewer full-scale samples come from normalizing to full scale."""

MAX_CLIPPED_SHARE = 0.01
FLOAT_SCALE_PEAK = 8.0
"""Float sound above this level contains integers, not samples of full scale 1."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a session."""

    level: Level
    message: str


def limit_findings(level: Level, messages: Iterable[str], *, file: str) -> list[Finding]:
    """Make findings of one kind: the first MAX_MESSAGES, and the number of the others."""
    messages = list(messages)
    findings = [Finding(level, message) for message in messages[:MAX_MESSAGES]]
    if len(messages) > MAX_MESSAGES:
        findings.append(Finding(level, f"{file}: {len(messages) - MAX_MESSAGES} more like these"))
    return findings


def issue_findings(level: Level, issues: Sequence[ParseIssue], fix: str) -> list[Finding]:
    """Make findings of parse issues of one kind and file: file and line, issue, fix."""
    messages = (f"{issue.file} line {issue.line}: {issue.message}; {fix}" for issue in issues)
    return limit_findings(level, messages, file=issues[0].file) if issues else []


def check_files(probe: SessionProbe) -> list[Finding]:
    """Check that every file that exists can be read."""
    return [
        Finding("warning" if file == SESSION_INFO_FILE else "error", f"{file}: {reason}")
        for file, reason in probe.unreadable.items()
    ]


def check_streams(probe: SessionProbe) -> list[Finding]:
    """Check that every required stream is present, and at least one stream."""
    if not probe.intervals:
        message = "contains nothing that can be read as a stream; fix: record it again or remove it"
        return [Finding("error", f"session: {message}")]
    return [
        Finding(
            "error",
            f"session: required stream {stream} is missing ({probe.absent[stream]}); "
            f"fix: record it, or remove {stream} from `required` in the recipe",
        )
        for stream in probe.recipe.required
        if stream not in probe.intervals
    ]


def check_clock(probe: SessionProbe) -> list[Finding]:
    """Check that the recorder's clock started with the session."""
    offset_s, has_lines = probe.offset_s, probe.lines_interval is not None
    if not offset_s or not (has_lines or file_intervals(probe)):
        return []
    file, fix = METADATA_FILE, "write the shifted timestamps with --fix"
    if not has_lines:
        file, fix = TEXT_FILE, "correct them if the first text does not start at 0 s"
    message = (
        f"the clock was never reset: timestamps start at {offset_s:g} s; this offset is subtracted "
        f"when they are read; fix: {fix}"
    )
    return [Finding("warning", f"{file}: {message}")]


def check_starts(probe: SessionProbe) -> list[Finding]:
    """Check that the start of every media file relative to the others is known."""
    if probe.start_error is not None:
        consequence = "video and sound cannot be placed on the clock and are left out"
        return [Finding("error", f"{probe.start_error}; until then {consequence}")]
    origins_s = {stream: video.track.origin_s for stream, video in probe.videos.items()}
    if probe.audio is not None:
        origins_s[Stream.AUDIO] = probe.audio.origin_s
    return [
        Finding(
            "warning",
            f"{VISION_FILES.get(stream, AUDIO_FILE)}: starts {origin_s:.3f} s after its "
            f"container's zero; placed at {probe.intervals[stream].start_s:g} s, as files share "
            "no clock; fix: if it was recorded that much later than the others, write "
            f'"start_s": {{"{stream}": {origin_s:.3f}}} into {SESSION_INFO_FILE}',
        )
        for stream, origin_s in origins_s.items()
        if stream not in probe.starts and abs(origin_s) > END_WARNING_S
    ]


def check_audio(probe: SessionProbe) -> list[Finding]:
    """Check that the sound is complete, not silent, not clipped, and has full scale 1."""
    audio = probe.audio
    if audio is None:
        return []
    findings: list[Finding] = []

    def report(level: Level, message: str) -> None:
        findings.append(Finding(level, f"{AUDIO_FILE}: {message}"))

    if audio.missing_bytes:
        report(
            "warning",
            f"the header declares {audio.missing_bytes} bytes more than the file has: the "
            f"recording was cut off at {audio.duration_s:.2f} s; fix: copy it again if the "
            "original is longer",
        )
    if audio.num_bad:
        report(
            "warning",
            f"{audio.num_bad} samples are not finite numbers and are read as 0; "
            "fix: export it again",
        )
    if audio.rms <= SILENCE_RMS:
        is_required = Stream.AUDIO in probe.recipe.required
        report(
            "error" if is_required else "warning",
            f"silent (RMS {audio.rms:.5f}, needs over {SILENCE_RMS:g}); fix: check the microphone",
        )
    share = audio.num_clipped / max(1, audio.num_samples)
    if audio.peak > FLOAT_SCALE_PEAK:
        report(
            "error",
            f"samples reach {audio.peak:g}, full scale is 1; fix: divide them by the recorder's "
            "scale",
        )
    elif audio.num_clipped >= MIN_CLIPPED:
        report(
            "error" if share > MAX_CLIPPED_SHARE else "warning",
            f"clipped: {audio.num_clipped} samples ({share:.3%}) at full scale; "
            "fix: record quieter",
        )
    return findings


def check_vision(probe: SessionProbe) -> list[Finding]:
    """Check that frames decode, and that the container's promised frames are present."""
    findings: list[Finding] = []
    for stream, video in probe.videos.items():
        file, track = VISION_FILES[stream], video.track
        findings += limit_findings(
            "error",
            (
                f"{file} {start_s:.2f}-{stop_s:.2f} s: {count} of {video.num_checked} frames "
                "tried don't decode: damaged; fix: copy it again from the recorder, or cut that "
                "part"
                for start_s, stop_s, count in zip(*video.damaged_stretches(), strict=True)
            ),
            file=file,
        )
        if track.num_lost:
            message = (
                f"cut off at {track.stop_s:.2f} s: its index lists {track.num_lost} frames "
                "more; fix: copy it again from the recorder"
            )
            findings.append(Finding("error", f"{file}: {message}"))
    return findings


def check_durations(probe: SessionProbe) -> list[Finding]:
    """Check that video, sound and metadata start and end together."""
    intervals = file_intervals(probe)
    if len(intervals) < 2:
        return []
    longest = max(intervals, key=lambda file: intervals[file].stop_s)
    stop_s = intervals[longest].stop_s
    findings: list[Finding] = []
    for file, interval in intervals.items():
        apart_s = stop_s - interval.stop_s
        if apart_s > END_WARNING_S:
            is_error = apart_s > END_ERROR_S and _are_required(probe, file, longest)
            findings.append(
                Finding(
                    "error" if is_error else "warning",
                    f"{file} ends at {interval.stop_s:.2f} s, {longest} at {stop_s:.2f} s, "
                    f"{apart_s:.2f} s apart; {_advise_on_end(probe, apart_s, longest=longest)}",
                )
            )
        if interval.start_s > END_WARNING_S:
            advice = "it is masked before that; fix: start the recorders together"
            findings.append(
                Finding("warning", f"{file} starts at {interval.start_s:.2f} s; {advice}")
            )
    return findings


def check_drift(probe: SessionProbe) -> list[Finding]:
    """Check that the clocks of sound and video ran equally fast."""
    findings: list[Finding] = []
    for stream, ppm in clock_drifts_ppm(probe).items():
        start_s = probe.intervals[Stream.AUDIO].start_s
        sound_s = probe.intervals[Stream.AUDIO].stop_s - start_s
        video_s = probe.intervals[stream].stop_s - start_s
        if abs(sound_s - video_s) <= END_WARNING_S:
            continue
        pace = "slow" if ppm < 0 else "fast"
        message = (
            f"{sound_s:.2f} s of sound and {video_s:.2f} s of {VISION_FILES[stream]}: if they "
            f"were recorded together from start to stop, the sound's clock runs {abs(ppm):.0f} ppm "
            f"{pace}, {abs(sound_s - video_s):.2f} s by the end; fix: stretch it to the video "
            f"(`ffmpeg -i in.wav -af atempo={1 + ppm / 1e6:.6f} out.wav`), or cut the longer one "
            "if it was stopped later"
        )
        findings.append(Finding("warning", f"{AUDIO_FILE}: {message}"))
    return findings


def check_text(probe: SessionProbe) -> list[Finding]:
    """Check that text events are inside the session, in known streams, and not empty."""
    unknown = [issue for issue in probe.issues if issue.kind == "stream"]
    findings = issue_findings("error", unknown, "the text is skipped; fix: correct the name")
    empty = [issue for issue in probe.issues if issue.kind == "text"]
    findings += issue_findings("warning", empty, "it is skipped; fix: write a text in its place")
    duration_s = probe.duration_s
    outside = [
        (event, time_s)
        for event in probe.events
        for time_s in [event.time_s - probe.offset_s]
        if not -EPSILON_S <= time_s <= duration_s + EPSILON_S
    ]
    return findings + limit_findings(
        "warning",
        (
            f"{event.source_line}: a text starts at {time_s:.3f} s, outside the session "
            f"[0, {duration_s:.3f}) s; fix: correct its timestamp"
            for event, time_s in outside
        ),
        file=outside[0][0].file if outside else TEXT_FILE,
    )


def check_length(probe: SessionProbe) -> list[Finding]:
    """Check that the session is long enough for a sample, and not longer than a session can be."""
    if probe.stop_s > probe.duration_s:
        message = (
            f"lasts {probe.stop_s:g} s: everything after {probe.duration_s:g} s is left out; "
            "a timestamp is probably wrong; fix: correct it"
        )
        return [Finding("warning", f"session: {message}")]
    window = probe.recipe.window
    least_s = window.min_coverage * window.duration_s
    if not probe.intervals or probe.duration_s >= least_s:
        return []
    message = (
        f"lasts {probe.duration_s:.2f} s: too short for a sample of {window.duration_s:g} s, "
        f"{window.min_coverage:.0%} of which must be covered; fix: shorten window.duration_s"
    )
    return [Finding("warning", f"session: {message}")]


def file_intervals(probe: SessionProbe) -> dict[str, Interval]:
    """Return the interval of each file's content on the session clock."""
    intervals = {VISION_FILES[stream]: probe.intervals[stream] for stream in probe.videos}
    if probe.audio is not None:
        intervals[AUDIO_FILE] = probe.intervals[Stream.AUDIO]
    if probe.lines_interval is not None:
        intervals[METADATA_FILE] = probe.lines_interval
    return intervals


def clock_drifts_ppm(probe: SessionProbe) -> dict[Stream, float]:
    """Return how much longer the sound is than each video, in parts per million of the video.

    Only videos are listed for which drift is a possible cause, and measurable for the duration
    of a frame.
    """
    drifts: dict[Stream, float] = {}
    for stream in probe.videos:
        sound, video = probe.intervals.get(Stream.AUDIO), probe.intervals[stream]
        if sound is None or video.start_s > max(0.0, sound.start_s) + END_WARNING_S:
            continue
        video_s = video.stop_s - sound.start_s
        if video_s < MIN_DRIFT_LENGTH_S:
            continue
        ppm = (sound.duration_s / video_s - 1) * 1e6
        if abs(ppm) <= MAX_DRIFT_PPM:
            drifts[stream] = ppm
    return drifts


def _are_required(probe: SessionProbe, *files: str) -> bool:
    """Return whether each of these files contains a required stream."""
    required = set(probe.recipe.required)
    needed = {VISION_FILES[s] for s in required if s in VISION_FILES}
    needed |= {AUDIO_FILE} if Stream.AUDIO in required else set()
    needed |= {METADATA_FILE} if required & {Stream.TOUCH, Stream.PROPRIO} else set()
    return needed.issuperset(files)


def _advise_on_end(probe: SessionProbe, apart_s: float, *, longest: str) -> str:
    """Return the advice for a stream that ends early; mentions --fix only if it helps."""
    if longest != METADATA_FILE or apart_s > END_ERROR_S:
        return "the rest is masked; if they ran together, a copy was cut off or a clock is wrong"
    intervals = file_intervals(probe)
    media_stops_s = [i.stop_s for file, i in intervals.items() if file != METADATA_FILE]
    media_stop_s = max(media_stops_s) + probe.offset_s
    if not END_WARNING_S < probe.metadata.times_s[-1] - media_stop_s <= END_ERROR_S:
        return "the rest is masked"
    if any(e.time_s > media_stop_s for e in probe.metadata.events):
        return (
            "the rest is masked; --fix keeps lines after the end of all media, as they contain text"
        )
    return "the rest is masked; fix: --fix drops lines after the end of all media"
