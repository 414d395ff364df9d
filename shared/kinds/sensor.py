"""Sensors: place readings on the clock, and resample them onto the grid of segments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from shared.clock import EPSILON_S, Interval, is_masked, slow_rate_hz
from shared.kinds.column import Column, stream_settings
from shared.streams import Kind, SensorStream
from shared.values import resample, resample_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from shared.clock import MaskedSpan, Segment
    from shared.recipe import Recipe


def columns(name: str, spec: SensorStream, recipe: Recipe) -> tuple[Column, ...]:
    """Return the column of a sensor: one array; time is arithmetic, and NaN means missing."""
    count = recipe.count(spec.rate_hz)
    units = list(dict.fromkeys(group.unit_label for group in spec.values if group.unit_label))
    return (
        Column(
            name=name,
            stream=name,
            kind=Kind.SENSOR,
            codec="zarr",
            dtype="float32",
            shape=(count, spec.size),
            unit=", ".join(units),
            max_bytes=4 * count * spec.size,
            settings={
                **stream_settings(spec),
                "max_gap_s": spec.gap_limit_s,
                "max_age_s": spec.age_limit_s if spec.resample == "hold" else None,
            },
            dimensions=("segment", "time", "value"),
            fill_value="NaN",
            attributes={
                "rate_hz": spec.rate_hz,
                "names": list(spec.labels),
                "types": [str(g.type) for g in spec.values for _ in range(g.count)],
                "units": [g.unit_label for g in spec.values for _ in range(g.count)],
            },
        ),
    )


def interval_of(times_s: NDArray[np.float64], spec: SensorStream) -> Interval | None:
    """Return the interval from the first reading to one median interval after the last one."""
    if len(times_s) == 0:
        return None
    interval_s = 1 / spec.rate_hz
    if len(times_s) > 1:
        interval_s = float(np.median(np.diff(times_s)))
    return Interval(float(times_s[0]), float(times_s[-1]) + interval_s)


def slow_issue(
    name: str, times_s: NDArray[np.float64], spec: SensorStream
) -> tuple[Literal["warning", "error"], str] | None:
    """Explain that readings are too rare to be interpolated; an error if most is masked.

    None if they are not, or if the latest one holds.
    """
    rate_hz = slow_rate_hz(times_s, spec.rate_hz)
    if rate_hz is None or spec.resample == "hold":
        return None
    is_masked = 1 / rate_hz > spec.gap_limit_s + EPSILON_S
    effect = "values in between are interpolated"
    if is_masked:
        effect = "readings are too far apart for that, so most is masked"
    sentence = (
        f"{spec.file}: {name} is recorded at {rate_hz:.3g} Hz, its rate_hz is {spec.rate_hz:g}; "
        f"{effect}; fix: set `resample: hold` or lower its rate_hz in the recipe"
    )
    return "error" if is_masked else "warning", sentence


def coverage(
    times_s: NDArray[np.float64],
    segments: Sequence[Segment],
    spec: SensorStream,
    masked: Sequence[MaskedSpan] = (),
) -> NDArray[np.float64]:
    """Compute the share of each segment's grid times that get a value."""
    if not segments:
        return np.zeros(0)
    grid_s = np.stack([segment.grid(spec.rate_hz) for segment in segments])
    mask = resample_mask(times_s[~is_masked(times_s, masked)], grid_s.ravel(), stream=spec)
    return np.asarray((mask.reshape(grid_s.shape) & ~is_masked(grid_s, masked)).mean(axis=1))


class SensorReader:
    """Resamples readings at increasing times on the session clock, finite float32 [N, D].

    Readings in `masked` spans are not used.
    """

    def __init__(
        self,
        times_s: NDArray[np.float64],
        values: NDArray[np.float32],
        spec: SensorStream,
        masked: Sequence[MaskedSpan] = (),
    ) -> None:
        is_used = ~is_masked(times_s, masked)
        self._times_s, self._values = times_s[is_used], values[is_used]
        self._spec, self._masked = spec, masked

    def read(self, segment: Segment) -> NDArray[np.float32]:
        """Read a segment, float32 [rate * duration, D]; NaN where masked."""
        grid_s = segment.grid(self._spec.rate_hz)
        values = resample(self._times_s, self._values, grid_s, stream=self._spec)
        values[is_masked(grid_s, self._masked)] = np.nan
        return values
