"""Draw the panels of a session for the report, as plain values that the template turns into SVG.

:func:`draw_session` draws the probe of a session, and reads thumbnails and the sound's envelope
from its media. Every list has a bound, so that the page does not grow with the session's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.media import FLOOR_DB, read_envelope, read_thumbnails
from preprocess.validate.timeline import draw_timelines, line_gaps
from shared.errors import MediaError
from shared.media.sound import SILENCE_RMS
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
from shared.recipe import Stream
from shared.session.folder import AUDIO_FILE, METADATA_FILE, VISION_FILES

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.validate.media import Envelope, Thumbnail
    from preprocess.validate.probe import SessionProbe
    from preprocess.validate.timeline import StreamTimeline
    from shared.page import TextMark
    from shared.session.folder import TextEvent

_PLOT_HEIGHT = 110.0
_MAX_COLUMNS = 500
_MAX_POINTS = 12_000
"""Columns of a panel times its curves: about 250 kB of page."""

_NUM_COLORS = 10

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


@dataclass(frozen=True, slots=True)
class ListedText:
    """A text event in the list below the panels."""

    time: str
    stream: str
    text: str
    is_outside: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPanels:
    """Everything that the report draws of a session."""

    axis: TimeAxis
    timelines: list[StreamTimeline]
    strips: list[Strip]
    plots: list[Plot]
    lanes: list[TextLanes]
    texts: list[ListedText]
    num_unlisted: int
    notes: list[str]
    """What could not be drawn, and why."""


def draw_session(path: Path, probe: SessionProbe) -> SessionPanels:
    """Draw a session.

    Args:
        path: the session folder.
        probe: what validation read of it.
    """
    intervals = [*probe.intervals.values()]
    if probe.lines_interval is not None:
        intervals.append(probe.lines_interval)
    axis = TimeAxis(
        min([0.0, *(i.start_s for i in intervals)]),
        max(probe.duration_s, probe.lines_interval.stop_s if probe.lines_interval else 0.0),
    )
    notes: list[str] = []
    listed = probe.events[:_MAX_LISTED]
    return SessionPanels(
        axis=axis,
        timelines=draw_timelines(probe, axis),
        strips=_draw_strips(path, probe, axis, notes),
        plots=[*_draw_sound(path, probe, axis, notes), *_draw_sensors(probe, axis)],
        lanes=_draw_texts(probe, axis),
        texts=[_list_text(event, probe) for event in listed],
        num_unlisted=len(probe.events) - len(listed),
        notes=notes,
    )


def _draw_strips(path: Path, probe: SessionProbe, axis: TimeAxis, notes: list[str]) -> list[Strip]:
    """Draw thumbnails of the videos that can be read."""
    strips: list[Strip] = []
    vision = probe.recipe.vision
    for stream, video in probe.videos.items():
        file = VISION_FILES[stream]
        try:
            pictures = read_thumbnails(path / file, video.track, axis=axis, recipe=vision)
        except (MediaError, OSError) as error:
            notes.append(f"{file}: no thumbnails: {error}")
            continue
        strips.append(Strip(stream.value, f"fit: {vision.fit}", pictures))
    return strips


def _draw_sound(path: Path, probe: SessionProbe, axis: TimeAxis, notes: list[str]) -> list[Plot]:
    """Draw waveform and level of the sound."""
    audio = probe.audio
    if audio is None:
        return []
    try:
        envelope = read_envelope(path / AUDIO_FILE, duration_s=audio.duration_s, axis=axis)
    except (MediaError, OSError) as error:
        notes.append(f"{AUDIO_FILE}: no waveform: {error}")
        return []
    start_s = audio.interval.start_s
    return [_draw_waveform(envelope, start_s, axis), _draw_level(envelope, start_s, axis)]


def _draw_waveform(envelope: Envelope, start_s: float, axis: TimeAxis) -> Plot:
    xs = axis.xs(envelope.edges_s + start_s)
    peak = max(float(envelope.high.max()), -float(envelope.low.min()))
    limit = 1.0 if 0.5 < peak <= 1.0 else round_up(peak)
    values = ValueAxis(-limit, limit, _PLOT_HEIGHT)
    area = area_path(xs, values.ys(envelope.high), values.ys(envelope.low))
    is_first = np.diff(envelope.is_clipped, prepend=False) & envelope.is_clipped
    is_last = np.diff(envelope.is_clipped, append=False) & envelope.is_clipped
    clipped = [
        Band(float(xs[i]), max(2.0, float(xs[j] - xs[i])), "clipped", "samples at full scale")
        for i, j in zip(np.flatnonzero(is_first), np.flatnonzero(is_last) + 1, strict=True)
    ]
    return Plot(
        name="waveform",
        title="audio waveform, full scale is 1",
        y_ticks=values.ticks(),
        curves=[PlotCurve(area, 0, "", is_area=True)],
        alarms=clipped,
    )


def _draw_level(envelope: Envelope, start_s: float, axis: TimeAxis) -> Plot:
    top_db = max(0.0, 10 * math.ceil(float(envelope.level_db.max()) / 10))
    values = ValueAxis(FLOOR_DB, top_db, _PLOT_HEIGHT)
    silence_db = 20 * math.log10(SILENCE_RMS)
    levels = (envelope.edges_s[:-1] + envelope.edges_s[1:]) / 2 + start_s, envelope.level_db
    return Plot(
        name="level",
        title="audio level, dBFS (RMS)",
        y_ticks=[Tick(values.y(v), f"{v}") for v in range(-90, int(top_db) + 1, 30)],
        curves=[PlotCurve(curve_path([levels], axis=axis, values=values), 0, "")],
        limits=[Tick(values.y(silence_db), "silent below")],
    )


def _draw_sensors(probe: SessionProbe, axis: TimeAxis) -> list[Plot]:
    """Draw touch, joint angles and joint velocities."""
    metadata = probe.metadata
    touch, proprio = (metadata.rows_with(s) for s in (Stream.TOUCH, Stream.PROPRIO))
    num_angles = probe.recipe.sensors.proprio_size // 2
    plots: list[Plot] = []
    for name, title, rows, values, limits in (
        ("touch", "touch, 0 to 1", touch, metadata.touch, (0.0, 1.0)),
        (
            "angles",
            "proprio angles, rad",
            proprio,
            metadata.proprio[:, :num_angles],
            (-math.pi, math.pi),
        ),
        (
            "velocities",
            "proprio velocities, rad/s",
            proprio,
            metadata.proprio[:, num_angles:],
            (),
        ),
    ):
        if rows.any():
            plots.append(
                _draw_readings(
                    metadata.times_s[rows] - probe.offset_s,
                    values[rows].astype(np.float64),
                    name=name,
                    title=f"{title} ({METADATA_FILE})",
                    limits=limits,
                    first_label=num_angles if name == "velocities" else 0,
                    max_gap_s=probe.recipe.sensors.max_gap_s,
                    axis=axis,
                )
            )
    return plots


def _draw_readings(
    times_s: NDArray[np.float64],
    readings: NDArray[np.float64],
    *,
    name: str,
    title: str,
    limits: tuple[float, ...],
    first_label: int,
    max_gap_s: float,
    axis: TimeAxis,
) -> Plot:
    """Draw a curve for each column of readings [N, D] at times [N]."""
    low = min(float(readings.min()), *limits, math.inf)
    high = max(float(readings.max()), *limits, -math.inf)
    margin = 0.04 * (high - low) or 1.0
    values = ValueAxis(low - margin, high + margin, _PLOT_HEIGHT)
    num_curves = readings.shape[1]
    num_columns = max(10, min(_MAX_COLUMNS, _MAX_POINTS // num_curves))
    curves = []
    for i in range(num_curves):
        thinned = thin_curve(
            times_s, readings[:, i], axis=axis, num_columns=num_columns, max_interval_s=max_gap_s
        )
        path = curve_path(thinned, axis=axis, values=values)
        curves.append(PlotCurve(path, i % _NUM_COLORS, f"{first_label + i}"))
    return Plot(
        name=name,
        title=title,
        y_ticks=values.ticks(),
        curves=curves,
        limits=[Tick(values.y(limit), "") for limit in limits],
        bands=[band for gaps in line_gaps(times_s) for band in gaps.bands(axis)],
    )


def _draw_texts(probe: SessionProbe, axis: TimeAxis) -> list[TextLanes]:
    """Draw text events as marks, with labels as long as there is room for all of them."""
    streams: list[TextLanes] = []
    for stream in (Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT):
        events = _thin_events([e for e in probe.events if e.stream is stream], probe, axis)
        for max_chars in _LABEL_CHARS:
            texts = [_timed_text(event, probe, max_chars=max_chars) for event in events]
            marks = arrange_texts(texts, axis, max_lanes=_MAX_LANES)
            if all(mark.lane >= 0 for mark in marks):
                break
        if marks:
            streams.append(TextLanes(stream.value, count_lanes(marks), marks))
    return streams


def _thin_events(events: list[TextEvent], probe: SessionProbe, axis: TimeAxis) -> list[TextEvent]:
    """Keep all events, or the first at each of _MAX_MARKS positions."""
    if len(events) <= _MAX_MARKS:
        return events
    first: dict[int, TextEvent] = {}
    for event in events:
        position = axis.x(event.time_s - probe.offset_s) * _MAX_MARKS / axis.width
        first.setdefault(int(position), event)
    return list(first.values())


def _timed_text(event: TextEvent, probe: SessionProbe, *, max_chars: int) -> TimedText:
    """Return an event's label and tooltip; the label of one outside the session has its time."""
    time_s = event.time_s - probe.offset_s
    label = printable_line(event.text, max_chars=max_chars)
    if _is_outside(event, probe):
        label = f"({format_time(time_s)}) {label}"
    title = f"{format_time(time_s)}: {printable_line(event.text, max_chars=_MAX_TITLE_CHARS)}"
    return TimedText(start_s=time_s, stop_s=time_s, label=label, title=title)


def _list_text(event: TextEvent, probe: SessionProbe) -> ListedText:
    return ListedText(
        time=format_time(event.time_s - probe.offset_s),
        stream=event.stream.value,
        text=printable_line(event.text, max_chars=_MAX_LISTED_CHARS),
        is_outside=_is_outside(event, probe),
    )


def _is_outside(event: TextEvent, probe: SessionProbe) -> bool:
    return not 0 <= event.time_s - probe.offset_s <= probe.duration_s
