"""Judge where streams repeat themselves; :mod:`shared.session.still` finds the stretches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.checks import Finding, Level, stream_findings
from shared.clock import masked_share
from shared.session.still import POSES, limit_of, repeated_runs, unusual_runs
from shared.streams import Kind, MaskReason, mask_reasons

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    from preprocess.validate.probe import SessionProbe
    from shared.clock import MaskedSpan

_MAX_STILL_SHARE = 0.5
"""A stream that repeats itself for more of its length is as good as missing."""

_FIXES: Mapping[Kind, str] = {
    Kind.VIDEO: "check the camera and its recorder",
    Kind.AUDIO: "check the microphone and its recorder",
    Kind.SENSOR: "check that tracking is on",
}


def check_still(probe: SessionProbe) -> list[Finding]:
    """Check that no stream repeats itself for longer than it may, and is mostly masked for it."""
    findings: list[Finding] = []
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
