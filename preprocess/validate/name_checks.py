"""Judge names: files and keys that no declared stream uses, and what was probably meant by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from preprocess.validate.checks import Finding
from shared.session.lines import keys_of
from shared.session.names import describe_unused
from shared.streams import SensorStream, TextStream

if TYPE_CHECKING:
    from preprocess.validate.probe import SessionProbe
    from shared.session.names import UnusedName


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
