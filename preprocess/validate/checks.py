"""What is judged in a session: a closed table of checks, each a pure function of what was read.

Reading lies in :mod:`preprocess.validate.probe`; here nothing is opened. A check gives
findings, each a level and a sentence that says where, what, and how to mend.

Streams that end apart: over 0.1 s a warning; over 1 s an error where both are required (a clock or
a copy is wrong), else a warning (the rest is masked). A late start is a warning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.findings import Finding, Level, limited, say
from preprocess.validate.line_checks import (
    check_gaps,
    check_lines,
    check_proprio,
    check_saturation,
    check_timestamps,
    check_touch,
)
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
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from preprocess.validate.probe import SessionProbe
    from shared.clock import Interval
    from shared.media.video import VideoTrack

END_WARNING_S = 0.1
END_ERROR_S = 1.0

MIN_DRIFT_LENGTH_S = 10.0
"""In a shorter video, the length of one frame is as much as the worst drift."""

MAX_DRIFT_PPM = 10_000.0
"""Clocks that differ by more are no clocks: one of the two was cut off. Quartz has under 100."""

MIN_CLIPPED = 8
"""Fewer full-scale samples are what normalizing to full scale leaves."""

MAX_CLIPPED_SHARE = 0.01
FLOAT_SCALE_PEAK = 8.0
"""Float sound above this holds integers, not samples of full scale 1."""


def check_files(evidence: SessionProbe) -> list[Finding]:
    """Every file that is there opens."""
    findings: list[Finding] = []
    for file, why in evidence.unreadable.items():
        is_free = file == SESSION_INFO_FILE
        mend = "correct or delete it" if is_free else "replace it, or remove it to do without it"
        message = f"{file}: {why}" if ";" in why else f"{file}: {why}; {mend}"
        findings.append(Finding("warning" if is_free else "error", message))
    return findings


def check_streams(evidence: SessionProbe) -> list[Finding]:
    """Every required stream is there, and at least one."""
    if not evidence.intervals:
        what = "holds nothing that can be read as a stream; record it again or remove the folder"
        return [Finding("error", f"session: {what}")]
    return [
        Finding(
            "error",
            f"session: required stream {stream} is missing ({evidence.absent[stream]}); "
            f"record it, or take {stream} out of `required` in the recipe",
        )
        for stream in evidence.recipe.required
        if stream not in evidence.intervals
    ]


def check_clock(evidence: SessionProbe) -> list[Finding]:
    """The recorder's clock began with the session."""
    offset_s, has_lines = evidence.offset_s, evidence.lines is not None
    if not offset_s or not (has_lines or spans(evidence)):
        return []
    file, mend = METADATA_FILE, "--fix writes them so"
    if not has_lines:
        file, mend = TEXT_FILE, "correct them if the first text does not begin at 0 s"
    what = (
        f"the clock was never reset: timestamps start at {offset_s:g} s; as much is subtracted "
        f"when they are read; {mend}"
    )
    return [Finding("warning", f"{file}: {what}")]


def check_starts(evidence: SessionProbe) -> list[Finding]:
    """It is known where media begin beside each other."""
    if evidence.start_error is not None:
        what = "video and sound can't be placed and are left out"
        return [Finding("error", f"{evidence.start_error}; until then {what}")]
    origins_s = {stream: picture.track.origin_s for stream, picture in evidence.pictures.items()}
    if evidence.sound is not None:
        origins_s[Stream.AUDIO] = evidence.sound.origin_s
    return [
        Finding(
            "warning",
            f"{VISION_FILES.get(stream, AUDIO_FILE)}: begins {origin_s:.3f} s after its "
            f"container's zero; placed at {evidence.intervals[stream].start_s:g} s, for files have "
            "no clock in common; if it was recorded so much later than the others, write "
            f'"start_s": {{"{stream}": {origin_s:.3f}}} into {SESSION_INFO_FILE}',
        )
        for stream, origin_s in origins_s.items()
        if stream not in evidence.starts and abs(origin_s) > END_WARNING_S
    ]


def check_audio(evidence: SessionProbe) -> list[Finding]:
    """Sound is whole, not silent, not clipped, and full scale is 1."""
    sound = evidence.sound
    if sound is None:
        return []
    findings: list[Finding] = []
    if sound.missing_bytes:
        what = (
            f"the header promises {sound.missing_bytes} bytes more than there are: the recording "
            f"was cut off at {sound.duration_s:.2f} s; copy it again if the original is longer"
        )
        findings.append(Finding("warning", f"{AUDIO_FILE}: {what}"))
    if sound.num_bad:
        what = f"{sound.num_bad} samples are no finite numbers; they are read as 0; export it again"
        findings.append(Finding("warning", f"{AUDIO_FILE}: {what}"))
    if sound.rms <= SILENCE_RMS:
        is_required = Stream.AUDIO in evidence.recipe.required
        what = f"silent (RMS {sound.rms:.5f}, needs over {SILENCE_RMS:g}); check the microphone"
        findings.append(Finding("error" if is_required else "warning", f"{AUDIO_FILE}: {what}"))
    share = sound.num_clipped / max(1, sound.num_samples)
    if sound.peak > FLOAT_SCALE_PEAK:
        what = f"samples reach {sound.peak:g}, full scale is 1; divide them by the recorder's scale"
        findings.append(Finding("error", f"{AUDIO_FILE}: {what}"))
    elif sound.num_clipped >= MIN_CLIPPED:
        what = f"clipped: {sound.num_clipped} samples ({share:.3%}) at full scale; record quieter"
        level: Level = "error" if share > MAX_CLIPPED_SHARE else "warning"
        findings.append(Finding(level, f"{AUDIO_FILE}: {what}"))
    return findings


def check_vision(evidence: SessionProbe) -> list[Finding]:
    """Frames decode, and as many are there as the container promises."""
    findings: list[Finding] = []
    for stream, picture in evidence.pictures.items():
        file, track = VISION_FILES[stream], picture.track
        findings += limited(
            "error",
            (
                f"{file} {start_s:.2f}-{stop_s:.2f} s: {count} of {picture.num_checked} frames "
                "tried don't decode: damaged; copy it again from the recorder, or cut that part"
                for start_s, stop_s, count in _stretches(track, picture.undecoded)
            ),
        )
        if track.num_lost:
            what = (
                f"cut off at {track.stop_s:.2f} s: its index promises {track.num_lost} frames "
                "more; copy it again from the recorder"
            )
            findings.append(Finding("error", f"{file}: {what}"))
    return findings


def check_durations(evidence: SessionProbe) -> list[Finding]:
    """Video, sound and metadata begin and end together."""
    ends = spans(evidence)
    if len(ends) < 2:
        return []
    longest = max(ends, key=lambda name: ends[name].stop_s)
    findings: list[Finding] = []
    for name, interval in ends.items():
        apart_s = ends[longest].stop_s - interval.stop_s
        if apart_s > END_WARNING_S:
            is_error = apart_s > END_ERROR_S and _is_required(evidence, name, longest)
            findings.append(
                Finding(
                    "error" if is_error else "warning",
                    f"{name} ends at {interval.stop_s:.2f} s, {longest} at "
                    f"{ends[longest].stop_s:.2f} s, {apart_s:.2f} s apart; "
                    + _end_mend(evidence, apart_s, longest),
                )
            )
        if interval.start_s > END_WARNING_S:
            what = "the session's beginning is masked for it; start the recorders together"
            findings.append(
                Finding("warning", f"{name} begins at {interval.start_s:.2f} s; {what}")
            )
    return findings


def check_drift(evidence: SessionProbe) -> list[Finding]:
    """The clocks of sound and video ran equally fast."""
    findings: list[Finding] = []
    for stream, ppm in clock_drifts_ppm(evidence).items():
        begin_s = evidence.intervals[Stream.AUDIO].start_s
        sound_s = evidence.intervals[Stream.AUDIO].stop_s - begin_s
        video_s = evidence.intervals[stream].stop_s - begin_s
        if abs(sound_s - video_s) <= END_WARNING_S:
            continue
        pace = "slow" if ppm < 0 else "fast"
        what = (
            f"{sound_s:.2f} s of sound beside {video_s:.2f} s of {VISION_FILES[stream]}: if they "
            f"were recorded together from start to stop, the sound's clock runs {abs(ppm):.0f} ppm "
            f"{pace}, {abs(sound_s - video_s):.2f} s by the end; stretch it to the video "
            f"(`ffmpeg -i in.wav -af atempo={1 + ppm / 1e6:.6f} out.wav`), or cut the longer one "
            "if it was stopped later"
        )
        findings.append(Finding("warning", f"{AUDIO_FILE}: {what}"))
    return findings


def check_text(evidence: SessionProbe) -> list[Finding]:
    """Text events lie inside the session, in known streams, and say something."""
    unknown = [o for o in evidence.issues if o.kind == "stream"]
    findings = limited("error", (say(o, "correct the name; the text is lost") for o in unknown))
    empty = [o for o in evidence.issues if o.kind == "text"]
    findings += limited("warning", (say(o, "it is left out; write a text there") for o in empty))
    length_s = evidence.length_s
    found = [(event, event.time_s - evidence.offset_s) for event in evidence.events]
    return findings + limited(
        "warning",
        (
            f"{event.source_line}: a text begins at {t:.3f} s, outside the session "
            f"[0, {length_s:.3f}) s; correct its timestamp"
            for event, t in found
            if not -EPSILON_S <= t <= length_s + EPSILON_S
        ),
    )


def check_length(evidence: SessionProbe) -> list[Finding]:
    """The session is long enough for a sample, and no longer than one can be."""
    if evidence.stop_s > evidence.length_s:
        what = (
            f"lasts {evidence.stop_s:g} s: what lies after {evidence.length_s:g} s is left out; "
            "a timestamp must be wrong"
        )
        return [Finding("warning", f"session: {what}")]
    window = evidence.recipe.window
    least_s = window.min_coverage * window.duration_s
    if not evidence.intervals or evidence.length_s >= least_s:
        return []
    what = (
        f"lasts {evidence.length_s:.2f} s: too short for a sample of {window.duration_s:g} s, "
        f"of which {window.min_coverage:.0%} must be covered; shorten window.duration_s"
    )
    return [Finding("warning", f"session: {what}")]


CHECKS: Mapping[str, Callable[[SessionProbe], list[Finding]]] = {
    "files": check_files,
    "streams": check_streams,
    "lines": check_lines,
    "timestamps": check_timestamps,
    "clock": check_clock,
    "starts": check_starts,
    "gaps": check_gaps,
    "touch": check_touch,
    "proprio": check_proprio,
    "saturation": check_saturation,
    "audio": check_audio,
    "vision": check_vision,
    "durations": check_durations,
    "drift": check_drift,
    "text": check_text,
    "length": check_length,
}
"""Every check of a session, in the order of their messages."""


def spans(evidence: SessionProbe) -> dict[str, Interval]:
    """Where the contents of each file lie on the session clock."""
    found = {VISION_FILES[stream]: evidence.intervals[stream] for stream in evidence.pictures}
    if evidence.sound is not None:
        found[AUDIO_FILE] = evidence.intervals[Stream.AUDIO]
    if evidence.lines is not None:
        found[METADATA_FILE] = evidence.lines
    return found


def clock_drifts_ppm(evidence: SessionProbe) -> dict[Stream, float]:
    """Per eye, by how much more sound than video there is, in parts per million of the video; only
    where a drift could explain it and be told from the length of a frame.
    """
    drifts: dict[Stream, float] = {}
    for stream in evidence.pictures:
        sound, video = evidence.intervals.get(Stream.AUDIO), evidence.intervals[stream]
        if sound is None or video.start_s > max(0.0, sound.start_s) + END_WARNING_S:
            continue
        video_s = video.stop_s - sound.start_s
        if video_s < MIN_DRIFT_LENGTH_S:
            continue
        ppm = (sound.duration_s / video_s - 1) * 1e6
        if abs(ppm) <= MAX_DRIFT_PPM:
            drifts[stream] = ppm
    return drifts


def _stretches(track: VideoTrack, frames: NDArray[np.int64]) -> list[tuple[float, float, int]]:
    """(start, stop, frames) in seconds of each run of neighbouring frames."""
    runs = np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1) if len(frames) else []
    stops_s = np.append(track.times_s[1:], track.stop_s)
    return [(float(track.times_s[r[0]]), float(stops_s[r[-1]]), len(r)) for r in runs]


def _is_required(evidence: SessionProbe, *files: str) -> bool:
    """Whether each of some files holds a required stream."""
    required = set(evidence.recipe.required)
    needed = {VISION_FILES[s] for s in required if s in VISION_FILES}
    needed |= {AUDIO_FILE} if Stream.AUDIO in required else set()
    needed |= {METADATA_FILE} if required & {Stream.TOUCH, Stream.PROPRIO} else set()
    return needed.issuperset(files)


def _end_mend(evidence: SessionProbe, apart_s: float, longest: str) -> str:
    """What to do about a stream that ends early; speaks of --fix as it is."""
    if longest != METADATA_FILE or apart_s > END_ERROR_S:
        return "the rest is masked; if they ran together, a copy was cut off or a clock is wrong"
    others = [lies.stop_s for file, lies in spans(evidence).items() if file != METADATA_FILE]
    media_stop_s = max(others) + evidence.offset_s
    if not END_WARNING_S < evidence.metadata.times_s[-1] - media_stop_s <= END_ERROR_S:
        return "the rest is masked"
    if any(e.time_s > media_stop_s for e in evidence.metadata.events):
        return "the rest is masked; --fix leaves lines after the end of all media that hold text"
    return "the rest is masked; --fix drops lines after the end of all media"
