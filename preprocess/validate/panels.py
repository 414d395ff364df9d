"""Draw the panels of a session for the report, as plain values that the template turns into SVG.

:func:`draw_session` draws the probe of a session, and reads thumbnails and the sound's envelope
from its media. Every list has a bound, so that the page does not grow with the session's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.validate.media import FLOOR_DB, read_envelope, read_thumbnails
from preprocess.validate.timeline import draw_timelines, stream_gaps
from shared.clock import marked_runs
from shared.errors import MediaError
from shared.media.channels import SILENCE_RMS
from shared.page import (
    Band,
    Tick,
    TimeAxis,
    TimedText,
    ValueAxis,
    area_path,
    arrange_texts,
    count_lanes,
    curve_path,
    format_time,
    printable_line,
    round_up,
    thin_curve,
)
from shared.streams import Kind, ValueType

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from preprocess.validate.media import Thumbnail
    from preprocess.validate.probe import SessionProbe
    from preprocess.validate.timeline import StreamTimeline
    from shared.page import TextMark
    from shared.session.lines import TextEvent

_PLOT_HEIGHT = 110.0
_MAX_COLUMNS = 500
_MAX_POINTS = 12_000
"""Columns of a panel times its curves: about 250 kB of page."""

_MAX_CURVES = 60
"""Curves of a panel; more look alike."""

_NUM_COLORS = 10

_LIMITS: Mapping[ValueType, tuple[float, ...]] = {
    ValueType.FRACTION: (0.0, 1.0),
    ValueType.ANGLE: (-math.pi, math.pi),
    ValueType.QUATERNION: (-1.0, 1.0),
    ValueType.DIRECTION: (-1.0, 1.0),
}
"""Values that the curves of a type should not pass."""

_MAX_LANES = 5
_MAX_MARKS = 500
_MAX_LISTED = 250
_MAX_LISTED_CHARS = 300
_MAX_TITLE_CHARS = 80
_LABEL_CHARS = (100, 60, 36, 20, 12)
"""Lengths at which labels are cut; the first one that leaves room for all labels is used."""


@dataclass(frozen=True, slots=True)
class PlotCurve:
    """A line or an area of a plot."""

    path: str
    color: int
    label: str
    is_area: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Values over time."""

    name: str
    title: str
    y_ticks: list[Tick]
    curves: list[PlotCurve]
    limits: list[Tick] = field(default_factory=list)
    """Dashed lines at values that the curves should not pass."""
    bands: list[Band] = field(default_factory=list)
    """Gaps, drawn below the curves."""
    alarms: list[Band] = field(default_factory=list)
    """Clipping, in front of them."""
    height: float = _PLOT_HEIGHT


@dataclass(frozen=True, slots=True)
class Strip:
    """Thumbnails of a video."""

    name: str
    note: str
    pictures: list[Thumbnail]


@dataclass(frozen=True, slots=True)
class TextLanes:
    """The events of one text stream."""

    name: str
    num_lanes: int
    marks: list[TextMark]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPanels:
    """Everything that the report draws of a session."""

    axis: TimeAxis
    timelines: list[StreamTimeline]
    panels: list[Strip | Plot | TextLanes]
    texts: list[dict[str, Any]]
    """Time, stream, text and is_outside of the events in the list below the panels."""
    num_unlisted: int
    notes: list[str]
    """What could not be drawn, and why."""


def draw_session(path: Path, probe: SessionProbe) -> SessionPanels:
    """Draw what validation read of a session folder; nothing is decoded if that was quick."""
    intervals = probe.intervals.values()
    axis = TimeAxis(min([0.0, *(i.start_s for i in intervals)]), probe.duration_s)
    panels: list[Strip | Plot | TextLanes] = []
    notes: list[str] = []
    for kind, draw in _PANELS.items():
        for name in probe.recipe.of_kind(kind):
            try:
                if name in probe.intervals and (probe.depth == "full" or kind not in _DECODED):
                    panels += draw(path, name, probe, axis)
            except (MediaError, OSError) as error:
                notes.append(f"{probe.source(name)}: no picture of {name}: {error}")
    events = [(event, name) for name, of_stream in probe.events.items() for event in of_stream]
    events.sort(key=lambda pair: pair[0].time_s)
    return SessionPanels(
        axis=axis,
        timelines=draw_timelines(probe, axis),
        panels=panels,
        texts=[
            {
                "time": format_time(event.time_s),
                "stream": name,
                "text": printable_line(event.text, max_chars=_MAX_LISTED_CHARS),
                "is_outside": _is_outside(event, probe),
            }
            for event, name in events[:_MAX_LISTED]
        ],
        num_unlisted=max(0, len(events) - _MAX_LISTED),
        notes=notes,
    )


def _draw_video(path: Path, name: str, probe: SessionProbe, axis: TimeAxis) -> list[Strip]:
    """Draw thumbnails of a video."""
    spec = probe.recipe.videos[name]
    pictures = read_thumbnails(path / spec.file, probe.videos[name].track, axis=axis, spec=spec)
    return [Strip(name, f"fit: {spec.fit}", pictures)]


def _draw_audio(path: Path, name: str, probe: SessionProbe, axis: TimeAxis) -> list[Plot]:
    """Draw waveform and level of a sound."""
    spec, audio = probe.recipe.audios[name], probe.audio[name]
    envelope = read_envelope(
        path / spec.file, spec, duration_s=audio.interval.duration_s, axis=axis
    )
    edges_s = envelope.edges_s + audio.interval.start_s
    xs = axis.xs(edges_s)
    peak = max(float(envelope.high.max()), -float(envelope.low.min()))
    limit = 1.0 if 0.5 < peak <= 1.0 else round_up(peak)
    values = ValueAxis(-limit, limit, _PLOT_HEIGHT)
    area = area_path(xs, values.ys(envelope.high), values.ys(envelope.low))
    clipped = [
        Band(float(xs[i]), max(2.0, float(xs[j] - xs[i])), "clipped", "samples at full scale")
        for i, j in marked_runs(envelope.is_clipped)
    ]
    waveform = Plot(
        name=f"{name}.waveform",
        title=f"{name} waveform, full scale is 1",
        y_ticks=values.ticks(),
        curves=[PlotCurve(area, 0, "", is_area=True)],
        alarms=clipped,
    )
    top_db = max(0.0, 10 * math.ceil(float(envelope.level_db.max()) / 10))
    values = ValueAxis(FLOOR_DB, top_db, _PLOT_HEIGHT)
    silence_db = 20 * math.log10(SILENCE_RMS)
    levels = (edges_s[:-1] + edges_s[1:]) / 2, envelope.level_db
    level = Plot(
        name=f"{name}.level",
        title=f"{name} level, dBFS (RMS)",
        y_ticks=[Tick(values.y(v), f"{v}") for v in range(-90, int(top_db) + 1, 30)],
        curves=[PlotCurve(curve_path([levels], axis=axis, values=values), 0, "")],
        limits=[Tick(values.y(silence_db), "silent below")],
    )
    return [waveform, level]


def _draw_sensor(_path: Path, name: str, probe: SessionProbe, axis: TimeAxis) -> list[Plot]:
    """Draw the values of a sensor: a plot for each value group, a curve for each value."""
    spec, readings = probe.recipe.sensors[name], probe.readings[name]
    bands = [b for gaps in stream_gaps(readings.times_s, spec) for b in gaps.bands(axis)]
    plots: list[Plot] = []
    for group, columns in zip(spec.values, spec.slices, strict=True):
        values = readings.values[:, columns].astype(np.float64)
        limits = spec.expect.range or _LIMITS.get(group.type, ())
        low = min(float(values.min()), *limits, math.inf)
        high = max(float(values.max()), *limits, -math.inf)
        margin = 0.04 * (high - low) or 1.0
        y_axis = ValueAxis(low - margin, high + margin, _PLOT_HEIGHT)
        unit = f", {group.unit_label}" if group.unit_label else ""
        title = f"{name} {group.type}{unit} ({spec.file})"
        num_curves = min(group.count, _MAX_CURVES)
        if num_curves < group.count:
            title = f"{title}, the first {num_curves} of {group.count} values"
        labels = group.names or [str(number) for number in range(columns.start, columns.stop)]
        curves: list[PlotCurve] = []
        for i in range(num_curves):
            thinned = thin_curve(
                readings.times_s,
                values[:, i],
                axis=axis,
                num_columns=max(10, min(_MAX_COLUMNS, _MAX_POINTS // num_curves)),
                max_interval_s=spec.age_limit_s if spec.resample == "hold" else spec.gap_limit_s,
                max_jump=math.pi if group.type is ValueType.ANGLE else math.inf,
            )
            path = curve_path(thinned, axis=axis, values=y_axis)
            curves.append(PlotCurve(path, i % _NUM_COLORS, labels[i]))
        plots.append(
            Plot(
                name=name if len(spec.values) == 1 else f"{name}.{group.type}",
                title=title,
                y_ticks=y_axis.ticks(),
                curves=curves,
                limits=[Tick(y_axis.y(limit), "") for limit in limits],
                bands=bands,
            )
        )
    return plots


def _draw_text(_path: Path, name: str, probe: SessionProbe, axis: TimeAxis) -> list[TextLanes]:
    """Draw text events as marks, with labels as long as there is room for all of them."""
    events = _thin_events(probe.events[name], axis)
    marks: list[TextMark] = []
    for max_chars in _LABEL_CHARS:
        texts = [_timed_text(event, probe, max_chars=max_chars) for event in events]
        marks = arrange_texts(texts, axis, max_lanes=_MAX_LANES)
        if all(mark.lane >= 0 for mark in marks):
            break
    return [TextLanes(name, count_lanes(marks), marks)]


_PANELS: Mapping[Kind, Callable[..., Sequence[Strip | Plot | TextLanes]]] = {
    Kind.TEXT: _draw_text,
    Kind.VIDEO: _draw_video,
    Kind.AUDIO: _draw_audio,
    Kind.SENSOR: _draw_sensor,
}
"""What is drawn of a stream that is present, in this order."""

_DECODED = frozenset({Kind.VIDEO, Kind.AUDIO})


def _thin_events(events: Sequence[TextEvent], axis: TimeAxis) -> Sequence[TextEvent]:
    """Keep all events, or the first at each of _MAX_MARKS positions."""
    if len(events) <= _MAX_MARKS:
        return events
    first: dict[int, TextEvent] = {}
    for event in events:
        position = axis.x(event.time_s) * _MAX_MARKS / axis.width
        first.setdefault(int(position), event)
    return list(first.values())


def _timed_text(event: TextEvent, probe: SessionProbe, *, max_chars: int) -> TimedText:
    """Return an event's label and tooltip; the label of one outside the session has its time."""
    label = printable_line(event.text, max_chars=max_chars)
    if _is_outside(event, probe):
        label = f"({format_time(event.time_s)}) {label}"
    title = f"{format_time(event.time_s)}: {printable_line(event.text, max_chars=_MAX_TITLE_CHARS)}"
    return TimedText(start_s=event.time_s, stop_s=event.time_s, label=label, title=title)


def _is_outside(event: TextEvent, probe: SessionProbe) -> bool:
    return not 0 <= event.time_s <= probe.duration_s
