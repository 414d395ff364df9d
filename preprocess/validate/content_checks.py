"""Judge what streams hold: sizes and levels of sound, containers and pictures of videos, repeats.

What a header, a container and packet times tell is apart from what only decoding tells, so that the
first can be checked alone. :mod:`shared.session.still` finds stretches that repeat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.checks import NEEDS_DECODING, Finding, Level, stream_findings, unjudged
from preprocess.validate.repair_plan import RepairKind
from shared.clock import frame_mask, masked_share, nearest
from shared.media.channels import SILENCE_RMS
from shared.session.folder import SESSION_INFO_FILE
from shared.session.still import POSES, limit_of, repeated_runs, unusual_runs
from shared.streams import Kind, MaskReason, mask_reasons

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Set

    from preprocess.validate.probe import SessionProbe
    from shared.clock import MaskedSpan

MIN_RATED_FRAMES = 3
"""Fewer frames have no regular rate that gaps could be judged by."""

MIN_CLIPPED = 8
"""Fewer full-scale samples come from normalizing to full scale."""

MAX_CLIPPED_SHARE = 0.01
FLOAT_SCALE_PEAK = 8.0
"""Float sound above this level contains integers, not samples of full scale 1."""

_MAX_STILL_SHARE = 0.5
"""A stream that repeats itself for more of its length is as good as missing."""

_FIXES: Mapping[Kind, str] = {
    Kind.VIDEO: "check the camera and its recorder",
    Kind.AUDIO: "check the microphone and its recorder",
    Kind.SENSOR: "check that tracking is on",
}


def check_sound(probe: SessionProbe) -> list[Finding]:
    """Check that the header of a WAV file gives the right sizes."""
    findings: list[Finding] = []
    for name, header in ((name, audio.header) for name, audio in probe.audio.items()):
        if header is None or not (header.missing_bytes or header.is_wrong):
            continue
        seconds = f"{header.num_bytes / max(1, header.bytes_per_s):.2f} s"
        message = (
            f"the header declares {header.missing_bytes} bytes more than the file has: the "
            f"recording was cut off at {seconds}; fix: copy it again if the original is longer"
        )
        if not header.missing_bytes:
            sizes = header.declared_bytes, header.num_bytes
            fault = "declares {} bytes of sound, the file has {}".format(*sizes)
            if sizes[0] == sizes[1]:
                fault = "gives wrong sizes to the file or to a chunk"
            file, action = probe.recipe.streams[name].file, "write the right sizes"
            fix = probe.plan().advise(RepairKind.SIZES, file, action)
            message = f"the header {fault}; all {seconds} are read; fix: {fix}"
        findings.append(Finding("warning", f"{probe.source(name)}: {message}", (name,)))
    return findings


def check_levels(probe: SessionProbe) -> list[Finding]:
    """Check that sound is not silent, not clipped, and has full scale 1."""
    findings: list[Finding] = []
    for name, audio in probe.audio.items():
        sound = audio.sound
        faults: list[tuple[Level, str]] = []
        if sound.num_bad:
            message = f"{sound.num_bad} samples are not finite numbers and are read as 0"
            faults.append(("warning", f"{message}; fix: export it again"))
        if audio.rms <= SILENCE_RMS:
            message = f"silent (RMS {audio.rms:.5f}, needs over {SILENCE_RMS:g})"
            level: Level = "error" if probe.recipe.streams[name].required else "warning"
            faults.append((level, f"{message}; fix: check the microphone"))
        advice = "none is needed, unless its channels or its level are wrong in the recording"
        faults += [("warning", f"{clause}; fix: {advice}") for clause in sound.mix.describe()]
        num_samples = audio.interval.duration_s * sound.source_rate_hz * sound.source_channels
        share = sound.num_clipped / max(1.0, num_samples)
        if sound.peak > FLOAT_SCALE_PEAK:
            message = f"samples reach {sound.peak:g}, full scale is 1"
            faults.append(("error", f"{message}; fix: divide them by the recorder's scale"))
        elif sound.num_clipped >= MIN_CLIPPED:
            message = f"clipped: {sound.num_clipped} samples ({share:.3%}) at full scale"
            level = "error" if share > MAX_CLIPPED_SHARE else "warning"
            faults.append((level, f"{message}; fix: record quieter"))
        file = probe.source(name)
        findings += [Finding(level, f"{file}: {text}", (name,)) for level, text in faults]
    return findings


def check_video(probe: SessionProbe) -> list[Finding]:
    """Check that the container is whole, and where the times of its frames come from."""
    return [
        Finding(level, f"{probe.source(name)}{text}", (name,))
        for name in probe.videos
        for level, text in _container_messages(name, probe)
    ]


def check_frames(probe: SessionProbe) -> list[Finding]:
    """Check that frames decode, and show no damage."""
    findings: list[Finding] = []
    for name, video in probe.videos.items():
        file = probe.source(name)
        damaged = [
            f"{file} {start_s:.2f}-{stop_s:.2f} s: frames are damaged or follow damage or a lost "
            f"frame, up to the next keyframe: {count} in all; masked; fix: copy it again if the "
            "original is whole"
            for start_s, stop_s, count in video.damaged_stretches()
        ]
        findings += stream_findings("error", damaged, name, probe)
        for start_s, stop_s, count in video.track.runs(video.lost_start):
            text = (
                f"{file} {start_s:.2f}-{stop_s:.2f} s: frames before the first keyframe can't be "
                f"decoded: {count} in all; masked; fix: none for this file; let the recorder begin "
                "with one"
            )
            findings.append(Finding("warning", text, (name,)))
    return findings


def _container_messages(name: str, probe: SessionProbe) -> Iterator[tuple[Level, str]]:
    """Describe what a video's container lacks, and what was chosen of it."""
    track, spec, interval = (
        probe.videos[name].track,
        probe.recipe.videos[name],
        probe.intervals[name],
    )
    if track.num_lost:
        text = f": cut off at {track.stop_s:.2f} s: its index lists {track.num_lost} frames more"
        yield "error", f"{text}; fix: copy it again from the recorder"
    if track.cut is not None:
        yield "warning", f" ends at {track.stop_s:.2f} s: {track.cut}"
    if track.num_tracks > 1:
        text = (
            f": contains {track.num_tracks} video tracks; the largest is read: {track.codec} "
            f"{track.width}x{track.height}, {len(track.pts)} frames; fix: if it is the wrong one, "
            "keep only the right one (`ffmpeg -i FILE -map 0:v:NUMBER -c copy NEW.mp4`)"
        )
        yield "warning", text
    if track.assumed_rate_hz is not None:
        rate = f"{track.assumed_rate_hz:g}"
        text = (
            f": is a bare {track.codec} stream without times; frames are placed at the {rate} "
            f"frames per second that it declares; fix: if that is wrong, write {rate} / RATE as "
            f'FACTOR in "stretch": {{"{name}": FACTOR}} into {SESSION_INFO_FILE}, or re-encode it '
            "(`ffmpeg -r RATE -i FILE NEW.mp4`)"
        )
        yield "warning", text
    grid_s = np.arange(interval.start_s, interval.stop_s, 1 / spec.rate_hz)
    _, error_s = nearest(track.times_s, grid_s)
    share = 1 - float(frame_mask(error_s, tolerance_s=spec.tolerance_s).mean())
    if len(track.times_s) < MIN_RATED_FRAMES and share > 0:
        text = (
            f": only {len(track.times_s)} frames in {interval.duration_s:.2f} s; {share:.0%} of "
            f"its pictures at {spec.rate_hz:g} Hz are masked, as no frame is near; fix: record at "
            "a steadier frame rate"
        )
        yield "warning", text


def check_still(probe: SessionProbe) -> list[Finding]:
    """Check that no stream repeats itself for longer than it may, and is mostly masked for it."""
    findings: list[Finding] = []
    if probe.depth == "quick" and probe.videos:  # they tell whether the world stood still
        return [Finding("unassessed", NEEDS_DECODING)]
    if probe.depth == "quick":
        findings += unjudged(NEEDS_DECODING, tuple(probe.audio), is_all=not probe.readings)
    still_spans = {
        name: still
        for name, spans in probe.faults.items()
        if (still := [span for span in spans if span.reason is MaskReason.STILL])
    }
    for name, still in still_spans.items():
        interval = probe.intervals[name]
        share = masked_share(interval.start_s, interval.stop_s, still)
        spec = probe.recipe.streams[name]
        is_lost = MaskReason.STILL in mask_reasons(spec) and share > _MAX_STILL_SHARE
        level: Level = "error" if is_lost and spec.required else "warning"
        messages = [_describe(name, span, probe) for span in still]
        findings += stream_findings(level, messages, name, probe)
    return findings + _frozen_groups(probe, still_spans.keys())


def _describe(name: str, span: MaskedSpan, probe: SessionProbe) -> str:
    """Describe a stretch in one sentence."""
    spec = probe.recipe.streams[name]
    kept = tuple(reason.value for reason in mask_reasons(spec) if reason is not MaskReason.STILL)
    switch = f"if that is real, set `mask: [{', '.join(kept)}]` or a larger expect.max_still_s"
    if MaskReason.STILL not in mask_reasons(spec):
        outcome, switch = "kept, as `mask` leaves out still", "if not, add still to `mask`"
    else:
        outcome = "masked"
    of_stream = f"{name}: " if len(probe.streams_of(spec.file)) > 1 else ""
    return (
        f"{probe.source(name)} {span.start_s:.2f}-{span.stop_s:.2f} s: {of_stream}{span.message}; "
        f"{outcome}; fix: {_FIXES[spec.kind]}; {switch}"
    )


def _frozen_groups(probe: SessionProbe, reported: Set[str]) -> list[Finding]:
    """Report poses that rest: all of a stream in the whole session, or one group of it alone."""
    findings: list[Finding] = []
    for name, readings in probe.readings.items():
        if name in reported or len(readings.times_s) < 2:
            continue
        spec, interval = probe.recipe.sensors[name], probe.intervals[name]
        limit_s = limit_of(probe.recipe, name, readings.times_s)
        groups = [
            (group, readings.values[:, columns])
            for group, columns in zip(spec.values, spec.slices, strict=True)
            if group.type in POSES
        ]
        still = [not np.ptp(values, axis=0).any() for _, values in groups]
        if groups and all(still):
            types = " and ".join(dict.fromkeys(group.type for group, _ in groups))
            message = f"no {types} of {name} changes in the whole session: frozen tracking"
            findings.append(
                Finding("warning", f"{spec.file}: {message}; fix: check that it is on", (name,))
            )
            continue
        for group, values in groups if len(groups) > 1 else ():
            runs = repeated_runs(readings.times_s, values, interval.stop_s, limit_s / 4)
            messages = [
                f"{spec.file} {run.start_s:.2f}-{run.stop_s:.2f} s: the {group.type} of {name} "
                "repeats while its other poses change; it is kept; fix: check that it is tracked"
                for run in unusual_runs(runs, interval, limit_s, _MAX_STILL_SHARE)
            ]
            findings += stream_findings("warning", messages, name, probe)
    return findings
