"""Scan a session once: its clock, the interval of each stream, and the coverage of each segment.

A :class:`SessionScan` holds plain values. It decides which segments are stored, so that sessions
read directly and shards agree on them. A shard task therefore opens only the files of the columns
that it writes.
"""

from __future__ import annotations

import functools
import math
import reprlib
from collections import Counter
from collections.abc import Mapping  # noqa: TC003 (read at run time by pydantic)
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import AfterValidator

from shared.clock import Interval, MaskedSpan, Segment, masked_share, plan_segments
from shared.errors import MediaError, MissingMediaError
from shared.files import sha256_of_file
from shared.kinds import audio, sensor, text, video
from shared.machine import SteadyFile
from shared.media.channels import MEAN, Mix
from shared.media.sound import Loudness, loudness_of, measure_loudness
from shared.media.video import read_video_track
from shared.session.alignment import (
    MAX_SESSION_S,
    MEDIA_KINDS,
    Alignment,
    Placement,
    align_streams,
    read_placement,
)
from shared.session.folder import SESSION_INFO_FILE, source_files
from shared.session.lines import Correction  # noqa: TC001 (read at run time too)
from shared.session.names import UnusedName, session_name
from shared.session.rates import find_rate_faults, mask_wrong_rates, propose_stretches
from shared.session.still import Recorded, find_still
from shared.session.timestamps import read_lines
from shared.streams import Kind, MaskReason, mask_reasons

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.video import VideoTrack
    from shared.recipe import Recipe
    from shared.session.lines import SessionLines
    from shared.session.rates import RateFault

_COVERAGE_DECIMALS = 6


def _share() -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Make a function that returns an equal tuple of another scan; most are covered whole.

    Each field needs its own, as (0.0, 1.0) and (False, True) are equal.
    """
    return functools.lru_cache(maxsize=1 << 14)(lambda values: values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """Size and checksum of a file that segments are made of."""

    length_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionScan:
    """What the shard job needs to know about a session; all times on the session clock."""

    session: str
    duration_s: float
    clock_offset_s: float
    """Subtracted from the recorder's timestamps."""
    gains: Mapping[str, float]
    """Audio stream -> factor that normalizes its loudness."""
    levels: Mapping[str, float]
    """Audio stream -> RMS before the gain, full scale 1."""
    mixes: Mapping[str, Mix]
    """Audio stream -> how its channels become one, if not by their mean."""
    intervals: Mapping[str, Interval]
    """Interval of each stream that the session has."""
    start_overrides: Mapping[str, float]
    """Start of each stream that begins elsewhere than by default.

    By default audio begins at 0, a video at its container's times, and a timestamped stream at its
    first timestamp minus the offset. Columns depend on these starts as on the source files.
    """
    stretches: Mapping[str, float]
    """Factor of the times since its start, of each stream whose clock is declared to be wrong."""
    corrections: Mapping[str, Correction]
    """How files are read whose timestamps can't be taken as they are."""
    absent: Mapping[str, str]
    """Why each other stream is missing."""
    not_recorded: frozenset[str]
    """Missing streams that nothing was recorded of: no file, no reading, no event."""
    proposed_stretches: Mapping[str, float]
    """What `stretches` should have as well, by strong evidence."""
    masked: Mapping[str, tuple[MaskedSpan, ...]]
    """Stretches of streams that no sample shows, because their content is known to be wrong."""
    coverage: Mapping[str, Annotated[tuple[float, ...], AfterValidator(_share())]]
    """Stream that the session has -> share of each segment that it covers, 0..1; above 0 where at
    least one sample is valid."""
    silent: Annotated[tuple[bool, ...], AfterValidator(_share())]
    """Per segment, whether it certainly holds no token."""
    issues: tuple[str, ...]
    """What was skipped while reading the files, one sentence per kind."""
    unused: tuple[UnusedName, ...]
    """Keys of the files that no declared stream uses."""
    slow: Mapping[str, str]
    """Sensor that is recorded too slowly to interpolate it -> what that means."""
    source_files: Mapping[str, SourceFile]

    @property
    def num_segments(self) -> int:
        """Number of segments, whether they are stored or not."""
        return len(self.silent)

    def segments(self, recipe: Recipe) -> list[Segment]:
        """List every segment of this session."""
        return plan_segments(self.duration_s, recipe.segment_s)

    def present(self, segment: int) -> tuple[str, ...]:
        """List the streams that have a valid sample in a segment, sorted."""
        return tuple(name for name, shares in self.coverage.items() if shares[segment] > 0)

    def stored_segments(self, recipe: Recipe) -> list[int]:
        """List the segments that are stored, in order."""
        if self.session_rejection(recipe) is not None:
            return []
        rejected = self.rejections(recipe)
        return [i for i in range(self.num_segments) if i not in rejected]

    def rejections(self, recipe: Recipe) -> dict[int, str]:
        """Explain why segments are not stored; segment -> reason, in order."""
        required, minimum, texts = recipe.required, recipe.segment.min_coverage, recipe.texts
        nothing = (0.0,) * self.num_segments
        rejected: set[int] = set()
        for name in required:
            shares = self.coverage.get(name, nothing)
            rejected |= {i for i, share in enumerate(shares) if share < minimum or not share}
        # Without another stream, a text is stored where it may hold a token.
        others = [shares for name, shares in self.coverage.items() if name not in texts]
        if not any(map(all, others)):
            spoken = [shares for name, shares in self.coverage.items() if name in texts]
            has_other, has_text = (
                map(any, zip(nothing, *s, strict=True)) for s in (others, spoken)
            )
            is_shown = zip(has_other, has_text, self.silent, strict=True)
            rejected |= {i for i, (a, b, no) in enumerate(is_shown) if not (a or (b and not no))}
        return {i: self._explain_rejection(i, recipe, required) for i in sorted(rejected)}

    def _explain_rejection(self, segment: int, recipe: Recipe, required: Sequence[str]) -> str:
        """Explain why a segment that is not stored is not."""
        present, minimum = self.present(segment), recipe.segment.min_coverage
        shares = {n: self.coverage[n][segment] if n in present else 0.0 for n in required}
        missing = {n: share for n, share in shares.items() if n not in present or share < minimum}
        start_s, stop_s = segment * recipe.segment_s, (segment + 1) * recipe.segment_s
        where = f"of [{start_s:g}, {stop_s:g}) s"
        if missing:
            causes = ", ".join(
                f"{name} covers {share:.0%}{self.describe_masks(name, start_s, stop_s)}"
                for name, share in missing.items()
            )
            return f"{causes} {where}; segment.min_coverage asks for {minimum:.0%}"
        if not present:
            masks = [
                f"{name} is masked{message}"
                for name in self.masked
                if (message := self.describe_masks(name, start_s, stop_s))
            ]
            return "; ".join([f"no stream covers any {where}", *masks])
        return f"nothing but silent text {where}"

    def describe_masks(self, name: str, start_s: float, stop_s: float) -> str:
        """Name what is masked of a stream between two times; empty if nothing is."""
        spans = self.masked.get(name, ())
        messages = [s.message for s in spans if s.start_s < stop_s and s.stop_s > start_s]
        return f" ({'; '.join(dict.fromkeys(messages))})" if messages else ""

    def session_rejection(self, recipe: Recipe) -> str | None:
        """Explain why no segment of the session can be stored; None if some can."""
        missing = [name for name in recipe.required if name not in self.intervals]
        if missing:
            return "; ".join(f"required stream {name}: {self.absent[name]}" for name in missing)
        if self.intervals:
            return None
        reasons = dict.fromkeys(self.absent[n] for n in self.absent if n not in self.not_recorded)
        return "; ".join(["no stream of it can be read", *reasons])

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values, which pydantic reads back."""
        return {**asdict(self), "not_recorded": sorted(self.not_recorded)}


def scan_session(
    path: Path, *, recipe: Recipe, known: Mapping[str, SourceFile] | None = None
) -> SessionScan:
    """Scan a session: read every source file once and decode the audio, but no video.

    A stream that can't be read is absent, with the reason. Only a folder that disappears meanwhile
    raises an error. Source files that are `known` to be unchanged are not hashed again.
    """
    placement = read_placement(path, recipe)
    media = _read_media(path, recipe, placement)
    media_stop_s = max((interval.stop_s for interval in media.intervals.values()), default=None)
    timed = read_lines(path, recipe, media_stop_s, is_cleaned=True)
    lines, refusal = timed.lines, placement.error or timed.refusal
    if refusal is None:
        alignment = align_streams(media.intervals, lines, placement=placement, recipe=recipe)
    else:
        alignment = Alignment(absent=dict.fromkeys(recipe.streams, refusal))
    sentences = [(f"{i.file} {i.kind} {i.stream}", i.sentence, i.count) for i in lines.issues]
    sentences += [(kind, sentence, 1) for kind, sentence in timed.sentences.items()]
    sentences += _describe_outside(alignment, placement)
    sentences += media.describe_mixes()
    absent = {**media.absent, **alignment.absent}
    recorded = _recorded(media, alignment, lines)
    rates = find_rate_faults(recorded) or ()
    sentences += [("rate", fault.sentence, 1) for fault in rates]
    masked = _find_masked(recorded, rates)
    loudness = _measured_loudness(media, masked)
    segments = plan_segments(alignment.duration_s, recipe.segment_s)
    return SessionScan(
        session=session_name(path),
        duration_s=alignment.duration_s,
        clock_offset_s=alignment.offset_s,
        gains={name: of_sound.gain for name, of_sound in loudness.items()},
        levels={name: of_sound.rms for name, of_sound in loudness.items()},
        mixes=media.mixes,
        intervals={n: alignment.intervals[n] for n in recipe.streams if n in alignment.intervals},
        start_overrides=media.start_overrides | alignment.starts,
        stretches=placement.stretches,
        corrections=timed.corrections,
        absent={n: absent[n] for n in recipe.streams if n in absent},
        not_recorded=frozenset({*media.not_recorded, *alignment.not_recorded}),
        proposed_stretches=propose_stretches(rates, recipe),
        masked=masked,
        coverage=_coverage(segments, alignment, media, masked=masked),
        silent=_silent_segments(segments, alignment, recipe),
        issues=_first_of_each_kind(sentences),
        unused=lines.unused,
        slow={
            name: issue[1]
            for name, spec in recipe.sensors.items()
            if (issue := sensor.slow_issue(name, lines.readings[name].times_s, spec)) is not None
        },
        source_files=_hash_source_files(path, recipe, known or {}),
    )


@dataclass(slots=True)
class _Media:
    """What a scan finds of video and audio."""

    path: Path
    recipe: Recipe
    tracks: dict[str, VideoTrack] = field(default_factory=dict)
    loudness: dict[str, Loudness] = field(default_factory=dict)
    mixes: dict[str, Mix] = field(default_factory=dict)
    zeros: dict[str, tuple[Interval, ...]] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    start_overrides: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    not_recorded: set[str] = field(default_factory=set)

    def describe_mixes(self) -> list[tuple[str, str, int]]:
        """Say which channels are not averaged, as issues of the scan."""
        return [
            (f"mix {name}", f"{self.recipe.streams[name].file}: {clause}", 1)
            for name, mix in self.mixes.items()
            for clause in mix.describe()
        ]


def _read_media(path: Path, recipe: Recipe, placement: Placement) -> _Media:
    """Read when each video and sound of a session begins and ends, and its frames or level."""
    media = _Media(path, recipe)
    for name in recipe.of_kind(*MEDIA_KINDS) if placement.error is None else ():
        try:
            _SCANNERS[recipe.streams[name].kind](media, name, placement)
        except MediaError as error:
            # Without the folder, so that it does not depend on where the session is stored.
            media.absent[name] = str(error).replace(f"{path}/", "")
            if isinstance(error, MissingMediaError):
                media.not_recorded.add(name)
    return media


def _scan_video(media: _Media, name: str, placement: Placement) -> None:
    """Read the frame times of a video."""
    start_s, stretch = placement.starts.get(name), placement.stretches.get(name, 1.0)
    recorded = read_video_track(media.path / media.recipe.streams[name].file)
    track = media.tracks[name] = video.align_track(recorded, start_s, stretch=stretch)
    media.intervals[name] = video.interval_of(track)
    if track is not recorded and start_s is not None:
        media.start_overrides[name] = start_s


def _scan_audio(media: _Media, name: str, placement: Placement) -> None:
    """Measure the interval and the level of an audio stream."""
    spec = media.recipe.audios[name]
    stretch = placement.stretches.get(name, 1.0)
    sound = audio.read_stretched(media.path / spec.file, spec, stretch=stretch)
    if sound.mix != MEAN:
        media.mixes[name] = sound.mix
    interval = media.intervals[name] = audio.align_sound(sound, placement.starts.get(name))
    if interval.start_s:
        media.start_overrides[name] = interval.start_s
    media.loudness[name] = measure_loudness(sound.samples.iter_blocks(), spec=spec)
    media.zeros[name] = sound.zeros_from(interval.start_s)


_SCANNERS: Mapping[Kind, Callable[[_Media, str, Placement], None]] = {
    Kind.VIDEO: _scan_video,
    Kind.AUDIO: _scan_audio,
}


def _recorded(media: _Media, alignment: Alignment, lines: SessionLines) -> Recorded:
    """Return what is searched for wrong content."""
    return Recorded(
        path=media.path,
        recipe=media.recipe,
        intervals=alignment.intervals,
        tracks=media.tracks,
        zeros=media.zeros,
        readings={n: (t, lines.readings[n].values) for n, t in alignment.times_s.items()},
    )


def find_faults(
    recorded: Recorded, rates: Sequence[RateFault]
) -> dict[str, tuple[MaskedSpan, ...]]:
    """Find the stretches of each stream whose content is wrong, whether they are masked or not."""
    by_cause = (
        find_still(recorded),
        {name: video.damaged_spans(track) for name, track in recorded.tracks.items()},
        mask_wrong_rates(rates),
    )
    return {
        name: spans
        for name in sorted(set().union(*by_cause))
        if (spans := tuple(span for faults in by_cause for span in faults.get(name, ())))
    }


def _find_masked(
    recorded: Recorded, rates: Sequence[RateFault]
) -> dict[str, tuple[MaskedSpan, ...]]:
    """Find the stretches of each stream that its recipe masks."""
    reasons = {name: mask_reasons(spec) for name, spec in recorded.recipe.streams.items()}
    return {
        name: kept
        for name, spans in find_faults(recorded, rates).items()
        if (kept := tuple(span for span in spans if span.reason in reasons[name]))
    }


def _measured_loudness(
    media: _Media, masked: Mapping[str, Sequence[MaskedSpan]]
) -> dict[str, Loudness]:
    """Return the loudness of each sound; masked zeros have no part in it."""
    loudness = dict(media.loudness)
    for name in loudness.keys() & masked.keys():
        interval, measured = media.intervals[name], loudness[name]
        zeros = [span for span in masked[name] if span.reason is MaskReason.STILL]
        share = masked_share(interval.start_s, interval.stop_s, zeros)
        if share < 1:  # not a copy
            rms = measured.rms / math.sqrt(1 - share)
            loudness[name] = loudness_of(rms, measured.peak, spec=media.recipe.audios[name])
    return loudness


def _coverage(
    segments: Sequence[Segment],
    alignment: Alignment,
    media: _Media,
    *,
    masked: Mapping[str, Sequence[MaskedSpan]],
) -> dict[str, tuple[float, ...]]:
    """Compute, per stream, the share of each segment that it covers."""
    recipe = media.recipe
    compute: Mapping[Kind, Callable[[str], NDArray[np.float64]]] = {
        Kind.VIDEO: lambda n: video.coverage(
            media.tracks[n], segments, recipe.videos[n], masked.get(n, ())
        ),
        Kind.AUDIO: lambda n: audio.coverage(alignment.intervals[n], segments, masked.get(n, ())),
        Kind.SENSOR: lambda n: sensor.coverage(
            alignment.times_s[n], segments, recipe.sensors[n], masked.get(n, ())
        ),
        Kind.TEXT: lambda n: audio.coverage(alignment.intervals[n], segments),
    }
    coverage = {}
    for name in (n for n in recipe.streams if n in alignment.intervals):
        shares = compute[recipe.streams[name].kind](name)
        least = np.where(shares > 0, 10**-_COVERAGE_DECIMALS, 0.0)
        coverage[name] = tuple(np.maximum(np.round(shares, _COVERAGE_DECIMALS), least).tolist())
    return coverage


def _silent_segments(
    segments: Sequence[Segment], alignment: Alignment, recipe: Recipe
) -> tuple[bool, ...]:
    """Tell, per segment, whether it certainly holds no token of any text stream."""
    is_spoken = np.zeros(len(segments), dtype=np.bool_)
    for name, events in alignment.events.items():
        is_spoken |= text.spoken_segments(events, segments, recipe.texts[name])
    return tuple((~is_spoken).tolist())


def _describe_outside(alignment: Alignment, placement: Placement) -> list[tuple[str, str, int]]:
    """Say what is outside the session's time or streams, as issues of the scan."""
    sentences = [("text outside", sentence, 1) for sentence in alignment.outside]
    sentences += [("clock", note, 1) for note in alignment.notes]
    if alignment.stop_s > MAX_SESSION_S:
        sentence = (
            f"streams reach to {alignment.stop_s:g} s; everything after {MAX_SESSION_S:g} s is "
            "left out, a timestamp must be wrong"
        )
        sentences.append(("length", sentence, 1))
    if names := placement.undeclared:
        sentence = (
            f"{SESSION_INFO_FILE}: {reprlib.repr(names[0])} in start_s or stretch is ignored, the "
            "recipe declares no such stream; fix: correct the name"
        )
        sentences.append(("start", sentence, len(names)))
    return sentences


def _first_of_each_kind(sentences: list[tuple[str, str, int]]) -> tuple[str, ...]:
    """Keep the first sentence of each kind, with the number of the others."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for kind, sentence, count in sentences:
        counts[kind] += count
        first.setdefault(kind, sentence)
    more = {
        k: f" (and {count - 1} more such lines)" if count > 1 else "" for k, count in counts.items()
    }
    return tuple(sentence + more[kind] for kind, sentence in first.items())


def _hash_source_files(
    path: Path, recipe: Recipe, known: Mapping[str, SourceFile]
) -> dict[str, SourceFile]:
    """Return the size and SHA-256 of every source file that exists."""
    sources: dict[str, SourceFile] = {}
    for name in source_files(recipe):
        if name in known:
            sources[name] = known[name]
        elif (path / name).is_file():  # reading a pipe would never end
            with suppress(OSError), SteadyFile(path / name) as file:
                digest = sha256_of_file(file)
                sources[name] = SourceFile(length_bytes=file.tell(), sha256=digest)
    return sources
