"""What the report draws of a session, as plain values that the template puts into SVG.

:func:`draw_session` takes what validation read
(:class:`preprocess.validate.probe.SessionProbe`), and of the media only what is shown. Every list
is bounded, so that a page's size does not grow with a session's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.axes import (
    Tick,
    TimeAxis,
    ValueAxis,
    band_path,
    line_path,
    round_up,
    step_path,
    thin_curve,
)
from preprocess.validate.media import FLOOR_DB, read_envelope, read_thumbnails
from preprocess.validate.texts import ListedText, TextLanes, draw_lanes, list_texts
from preprocess.validate.timeline import Band, Row, draw_bands, find_gaps, timeline_rows
from shared.errors import MediaError
from shared.media.sound import SILENCE_RMS
from shared.recipe import Stream
from shared.session.folder import AUDIO_FILE, METADATA_FILE, VISION_FILES

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.validate.media import Envelope, Thumbnail
    from preprocess.validate.probe import SessionProbe

_PLOT_HEIGHT = 110.0
_MAX_COLUMNS = 500
_MAX_POINTS = 12_000
"""Columns of a panel times its curves: some 250 kB of page."""

_NUM_COLOURS = 10


@dataclass(frozen=True, slots=True)
class Curve:
    """A line or an area of a plot."""

    path: str
    colour: int
    label: str
    is_area: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Values over time."""

    name: str
    title: str
    height: float
    y_ticks: list[Tick]
    curves: list[Curve]
    limits: list[Tick] = field(default_factory=list)
    """Dashed lines at values that should not be passed."""
    bands: list[Band] = field(default_factory=list)
    """Gaps, behind the curves."""
    alarms: list[Band] = field(default_factory=list)
    """Clipping, before them."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Thumbnails of an eye."""

    name: str
    note: str
    pictures: list[Thumbnail]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Everything that is drawn of a session."""

    axis: TimeAxis
    rows: list[Row]
    strips: list[Strip]
    plots: list[Plot]
    lanes: list[TextLanes]
    texts: list[ListedText]
    num_unlisted: int
    notes: list[str]
    """What could not be drawn, and why."""


def draw_session(path: Path, evidence: SessionProbe) -> Figures:
    """Everything that is drawn of a session.

    Args:
        path: the session folder.
        evidence: what validation read of it.
    """
    starts_s = [interval.start_s for interval in evidence.intervals.values()]
    lines = evidence.lines
    stop_s = max(evidence.length_s, lines.stop_s if lines else 0.0)
    axis = TimeAxis(min(0.0, *starts_s, 0.0, lines.start_s if lines else 0.0), stop_s)
    notes: list[str] = []
    strips = _strips(path, evidence, axis, notes)
    plots = [*_sound_plots(path, evidence, axis, notes), *_sensor_plots(evidence, axis)]
    texts = list_texts(evidence)
    return Figures(
        axis=axis,
        rows=timeline_rows(evidence, axis),
        strips=strips,
        plots=plots,
        lanes=draw_lanes(evidence, axis),
        texts=texts,
        num_unlisted=len(evidence.events) - len(texts),
        notes=notes,
    )


def _strips(path: Path, evidence: SessionProbe, axis: TimeAxis, notes: list[str]) -> list[Strip]:
    """Thumbnails of the eyes that can be read."""
    strips: list[Strip] = []
    vision = evidence.recipe.vision
    for stream, picture in evidence.pictures.items():
        file = VISION_FILES[stream]
        try:
            pictures = read_thumbnails(path / file, picture.track, axis=axis, recipe=vision)
        except (MediaError, OSError) as error:
            notes.append(f"{file}: no thumbnails: {error}")
            continue
        strips.append(Strip(stream.value, f"fit: {vision.fit}", pictures))
    return strips


def _sound_plots(
    path: Path, evidence: SessionProbe, axis: TimeAxis, notes: list[str]
) -> list[Plot]:
    """Waveform and level of the sound."""
    sound = evidence.sound
    if sound is None:
        return []
    try:
        envelope = read_envelope(path / AUDIO_FILE, duration_s=sound.duration_s, axis=axis)
    except (MediaError, OSError) as error:
        notes.append(f"{AUDIO_FILE}: no waveform: {error}")
        return []
    xs = np.array([axis.x(sound.lies.start_s + t) for t in envelope.edges_s])
    return [_waveform(envelope, xs), _level(envelope, xs)]


def _waveform(envelope: Envelope, xs: NDArray[np.float64]) -> Plot:
    peak = max(float(envelope.high.max()), -float(envelope.low.min()))
    limit = 1.0 if 0.5 < peak <= 1.0 else round_up(peak)
    values = ValueAxis(-limit, limit, _PLOT_HEIGHT)
    area = band_path(xs, values.ys(envelope.high), values.ys(envelope.low))
    is_new = np.diff(envelope.is_clipped, prepend=False) & envelope.is_clipped
    starts = np.flatnonzero(is_new)
    is_last = np.diff(envelope.is_clipped, append=False) & envelope.is_clipped
    stops = np.flatnonzero(is_last) + 1
    clipped = [
        Band(float(xs[i]), max(2.0, float(xs[j] - xs[i])), "clipped", "samples at full scale")
        for i, j in zip(starts, stops, strict=True)
    ]
    return Plot(
        name="waveform",
        title="audio waveform, full scale is 1",
        height=_PLOT_HEIGHT,
        y_ticks=values.ticks(),
        curves=[Curve(area, 0, "", is_area=True)],
        alarms=clipped,
    )


def _level(envelope: Envelope, xs: NDArray[np.float64]) -> Plot:
    top_db = max(0.0, 10 * math.ceil(float(envelope.level_db.max()) / 10))
    values = ValueAxis(FLOOR_DB, top_db, _PLOT_HEIGHT)
    silence_db = 20 * math.log10(SILENCE_RMS)
    return Plot(
        name="level",
        title="audio level, dBFS (RMS)",
        height=_PLOT_HEIGHT,
        y_ticks=[Tick(values.y(v), f"{v}") for v in range(-90, int(top_db) + 1, 30)],
        curves=[Curve(step_path(xs, values.ys(envelope.level_db)), 0, "")],
        limits=[Tick(values.y(silence_db), "silent below")],
    )


def _sensor_plots(evidence: SessionProbe, axis: TimeAxis) -> list[Plot]:
    """Touch, joint angles and joint velocities."""
    num_angles = evidence.recipe.sensors.proprio_size // 2
    metadata = evidence.metadata
    panels = (
        ("touch", "touch, 0 to 1", Stream.TOUCH, metadata.touch, (0.0, 1.0)),
        (
            "angles",
            "proprio angles, rad",
            Stream.PROPRIO,
            metadata.proprio[:, :num_angles],
            (-math.pi, math.pi),
        ),
        (
            "velocities",
            "proprio velocities, rad/s",
            Stream.PROPRIO,
            metadata.proprio[:, num_angles:],
            None,
        ),
    )
    plots: list[Plot] = []
    for name, title, stream, values, limits in panels:
        rows = metadata.rows_with(stream)
        if rows.any():
            times_s = metadata.times_s[rows] - evidence.offset_s
            readings = values[rows].astype(np.float64)
            first = num_angles if name == "velocities" else 0
            plots.append(
                _sensor_plot(
                    name,
                    title,
                    times_s,
                    readings,
                    limits,
                    first=first,
                    evidence=evidence,
                    axis=axis,
                )
            )
    return plots


def _sensor_plot(
    name: str,
    title: str,
    times_s: NDArray[np.float64],
    readings: NDArray[np.float64],
    limits: tuple[float, float] | None,
    *,
    first: int,
    evidence: SessionProbe,
    axis: TimeAxis,
) -> Plot:
    """Curves of readings [N, D] at times [N]; `first` is the number of the first column."""
    low, high = float(readings.min()), float(readings.max())
    if limits:
        low, high = min(low, limits[0]), max(high, limits[1])
    margin = 0.04 * (high - low) or 1.0
    values = ValueAxis(low - margin, high + margin, _PLOT_HEIGHT)
    num_curves = readings.shape[1]
    num_columns = max(10, min(_MAX_COLUMNS, _MAX_POINTS // num_curves))
    max_gap_s = evidence.recipe.sensors.max_gap_s
    curves = []
    for i in range(num_curves):
        pieces = thin_curve(
            times_s, readings[:, i], axis=axis, num_columns=num_columns, max_step_s=max_gap_s
        )
        path = line_path(pieces, axis=axis, values=values)
        curves.append(Curve(path, i % _NUM_COLOURS, f"{first + i}"))
    return Plot(
        name=name,
        title=f"{title} ({METADATA_FILE})",
        height=_PLOT_HEIGHT,
        y_ticks=values.ticks(),
        curves=curves,
        limits=[Tick(values.y(limit), "") for limit in limits or ()],
        bands=[b for gaps in find_gaps(times_s) for b in draw_bands(gaps, axis)],
    )
