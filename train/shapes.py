"""Sizes of a window: which streams a model reads and predicts, and the arrays that hold them.

A window has ticks, the model's time steps. A sample k of a stream, counted from the start of the
window, belongs to tick floor(k * tick rate / rate). In a batch each tick of a sensor or of dMel
tokens has ceil(rate / tick rate) positions; positions without a sample are invalid. Of a video a
tick sees the newest frame, and a batch holds only frames that a tick sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import ConfigError
from shared.streams import Kind, TextStream, ValueGroup
from train.walkthrough import DEFAULT_HEADS, HEAD_OF_STREAM, STREAM_OF_HEAD

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from shared.recipe import Recipe
    from shared.streams import StreamSpec
    from train.config import TrainConfig

_RATE_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamShape:
    """Sizes of one stream in a window."""

    kind: Kind
    rate_hz: float
    """Stored samples per second: readings, dMel frames or pictures; of text, the tick rate."""
    per_tick: int
    """Positions of a tick; 1 for video and text."""
    num_positions: int
    """Length of the time dimension in a window."""
    size: tuple[int, ...] = ()
    """Shape of one position: (values,) of a sensor, (channels,) of audio, (height, width) of a
    video, () of text."""
    num_classes: int = 0
    """dMel levels of audio, or size of the vocabulary of text."""
    values: tuple[ValueGroup, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain values, which :meth:`from_json` reads back."""
        return {
            "kind": self.kind.value,
            "rate_hz": self.rate_hz,
            "per_tick": self.per_tick,
            "num_positions": self.num_positions,
            "size": list(self.size),
            "num_classes": self.num_classes,
            "values": [group.as_json() for group in self.values],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StreamShape:
        """Restore a shape; raises ValueError, KeyError or TypeError for other values."""
        return cls(
            kind=Kind(values["kind"]),
            rate_hz=float(values["rate_hz"]),
            per_tick=int(values["per_tick"]),
            num_positions=int(values["num_positions"]),
            size=tuple(int(n) for n in values["size"]),
            num_classes=int(values["num_classes"]),
            values=tuple(ValueGroup.model_validate(group) for group in values["values"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowShapes:
    """Sizes of a window's arrays, as a model and its batches need them."""

    num_ticks: int
    tick_rate_hz: float
    streams: Mapping[str, StreamShape]
    """Every stream that is read, by name, sorted."""
    inputs: tuple[str, ...]
    """Streams that are the model's inputs, sorted."""
    targets: Mapping[str, str] = field(default_factory=dict)
    """Head -> the stream whose next tick it predicts; heads of weight 0 are left out."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, config: TrainConfig) -> WindowShapes:
        """Return the sizes of a configuration's windows over a recipe's streams.

        Raises:
            ConfigError: the configuration names streams that the recipe does not declare, nothing
                would be learned, or window, stride or tick rate do not fit the streams' rates.
        """
        targets = target_streams(recipe, config)
        inputs = input_streams(recipe, config, targets)
        names = sorted({*inputs, *targets.values()})
        is_text_only = all(recipe.streams[name].kind is Kind.TEXT for name in names)
        count_segment_ticks(recipe.segment_s, config.model.tick_rate_hz)
        _require_period(recipe, config, names)
        if not is_text_only:
            require_token_rate(recipe, names, config.model.tick_rate_hz)
        tick_rate_hz = config.model.tick_rate_hz
        num_ticks = round(config.data.window.duration_s * tick_rate_hz)
        return cls(
            num_ticks=num_ticks,
            tick_rate_hz=tick_rate_hz,
            streams={
                name: _stream_shape(recipe.streams[name], recipe, num_ticks, tick_rate_hz)
                for name in names
            },
            inputs=inputs,
            targets=targets,
        )

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads whose loss weight is above 0."""
        return tuple(self.targets)

    @property
    def is_text_only(self) -> bool:
        """Whether only text is read, so that batches are packed densely."""
        return all(shape.kind is Kind.TEXT for shape in self.streams.values())

    @property
    def period_s(self) -> float:
        """Shortest time with whole ticks and whole samples of every stream that is read."""
        rates_hz = [shape.rate_hz for shape in self.streams.values()]
        return float(common_period_s([self.tick_rate_hz, *rates_hz]))

    def of_kind(self, *kinds: Kind) -> tuple[str, ...]:
        """Return the names of the streams of some kinds, sorted."""
        return tuple(name for name, shape in self.streams.items() if shape.kind in kinds)

    def inputs_of_kind(self, *kinds: Kind) -> tuple[str, ...]:
        """Return the names of the input streams of some kinds, sorted."""
        return tuple(name for name in self.inputs if self.streams[name].kind in kinds)

    def target_shape(self, head: str) -> StreamShape:
        """Return the shape of the stream that a head predicts."""
        return self.streams[self.targets[head]]

    def as_json(self) -> dict[str, Any]:
        """Return plain values, which :meth:`from_json` reads back; for checkpoints."""
        return {
            "num_ticks": self.num_ticks,
            "tick_rate_hz": self.tick_rate_hz,
            "streams": {name: shape.as_json() for name, shape in self.streams.items()},
            "inputs": list(self.inputs),
            "targets": dict(self.targets),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WindowShapes:
        """Restore shapes; raises ValueError, KeyError or TypeError for other values."""
        return cls(
            num_ticks=int(values["num_ticks"]),
            tick_rate_hz=float(values["tick_rate_hz"]),
            streams={
                str(name): StreamShape.from_json(shape) for name, shape in values["streams"].items()
            },
            inputs=tuple(map(str, values["inputs"])),
            targets={str(head): str(name) for head, name in values["targets"].items()},
        )


def head_weight(config: TrainConfig, head: str) -> float:
    """Return the weight of a head's loss in ``loss_total``."""
    weights = config.training.loss_weights
    stream = STREAM_OF_HEAD.get(head, head)
    default = 1.0 if head in DEFAULT_HEADS else 0.0
    return weights.get(head, weights.get(stream, default))


def target_streams(recipe: Recipe, config: TrainConfig) -> dict[str, str]:
    """Return head -> stream of every head whose loss weight is above 0."""
    for head, weight in config.training.loss_weights.items():
        spec = recipe.streams.get(STREAM_OF_HEAD.get(head, head))
        fault = None
        if spec is None and head not in DEFAULT_HEADS:
            fault = "which the recipe does not declare; fix:"
        elif spec is not None and spec.kind is Kind.VIDEO:
            fault = "a video, which can't be predicted; fix: remove it, or"
        if fault is not None and weight > 0:
            raise ConfigError(
                f"training.loss_weights names {head}, {fault} use one of "
                f"{', '.join(_possible_targets(recipe)) or 'its streams'}"
            )
    heads = [HEAD_OF_STREAM.get(name, name) for name in _possible_targets(recipe)]
    targets = {
        head: STREAM_OF_HEAD.get(head, head) for head in heads if head_weight(config, head) > 0
    }
    if not targets:
        raise ConfigError(
            "no declared stream has a loss weight above 0, so nothing would be learned; fix: set "
            f"training.loss_weights: {{{(heads or ['NAME'])[0]}: 1.0}}"
        )
    return targets


def _possible_targets(recipe: Recipe) -> tuple[str, ...]:
    return recipe.of_kind(Kind.AUDIO, Kind.SENSOR, Kind.TEXT)


def input_streams(
    recipe: Recipe, config: TrainConfig, targets: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the streams that are the model's inputs, sorted."""
    modalities = config.data.modalities
    if modalities is None:
        only_text = all(recipe.streams[name].kind is Kind.TEXT for name in targets.values())
        return tuple(sorted(targets.values() if only_text else recipe.streams))
    for name in modalities:
        if name not in recipe.streams:
            raise ConfigError(
                f"data.modalities names {name}, which the recipe does not declare; fix: use "
                f"{', '.join(recipe.streams)}"
            )
    return tuple(sorted(set(modalities)))


def stored_rate_hz(spec: StreamSpec) -> float | None:
    """Return the samples per second that training reads of a stream; None for text."""
    if spec.kind is Kind.AUDIO:
        return float(spec.dmel.rate_hz)
    return None if spec.kind is Kind.TEXT else float(spec.rate_hz)


def _stream_shape(
    spec: StreamSpec, recipe: Recipe, num_ticks: int, tick_rate_hz: float
) -> StreamShape:
    """Return the sizes of one stream."""
    rate_hz = stored_rate_hz(spec) or tick_rate_hz
    per_tick = max(1, math.ceil(rate_hz / tick_rate_hz - _RATE_TOLERANCE))
    num_positions = num_ticks * per_tick
    size: tuple[int, ...] = ()
    values: tuple[ValueGroup, ...] = ()
    num_classes = 0
    if spec.kind is Kind.VIDEO:
        size, per_tick = (spec.height, spec.width), 1
        num_positions = round(min(rate_hz, tick_rate_hz) * num_ticks / tick_rate_hz)
    elif spec.kind is Kind.AUDIO:
        size, num_classes = (spec.dmel.channels,), spec.dmel.levels
    elif spec.kind is Kind.SENSOR:
        size, values = (spec.size,), spec.values
    else:
        num_classes = recipe.text.vocab_size
    return StreamShape(
        kind=spec.kind,
        rate_hz=rate_hz,
        per_tick=per_tick,
        num_positions=num_positions,
        size=size,
        num_classes=num_classes,
        values=values,
    )


def sample_positions(
    shape: StreamShape, *, num_ticks: int, tick_rate_hz: float
) -> NDArray[np.int64]:
    """Return the position of each stored sample of a window, int64 [samples]; -1 if unseen."""
    rate, tick_rate = as_fraction(shape.rate_hz), as_fraction(tick_rate_hz)
    count = round(num_ticks * rate / tick_rate)
    ratio = tick_rate / rate
    samples = np.arange(count, dtype=np.int64)
    if shape.kind is Kind.VIDEO:
        if rate <= tick_rate:
            return samples
        # The newest frame of tick t is frame floor(t * rate / tick rate).
        inverse = 1 / ratio
        seen = np.arange(num_ticks) * inverse.numerator // inverse.denominator
        positions = np.full(count, -1, dtype=np.int64)
        positions[seen] = np.arange(num_ticks)
        return positions
    ticks = samples * ratio.numerator // ratio.denominator
    first_of_tick = np.searchsorted(ticks, ticks, side="left")
    return ticks * shape.per_tick + samples - first_of_tick


def common_period_s(rates_hz: list[float]) -> Fraction:
    """Return the shortest time in seconds in which each rate has a whole number of samples."""
    rates = [as_fraction(rate_hz) for rate_hz in rates_hz]
    return Fraction(
        math.lcm(*(r.denominator for r in rates)), math.gcd(*(r.numerator for r in rates))
    )


def as_fraction(value: float) -> Fraction:
    """Return the fraction that a rate or a length in a configuration means, such as 1/3."""
    return Fraction(str(float(value))).limit_denominator(10**6)


def count_segment_ticks(segment_s: float, tick_rate_hz: float) -> int:
    """Return the number of ticks in a segment."""
    ticks = as_fraction(tick_rate_hz) * as_fraction(segment_s)
    if ticks.denominator != 1:
        raise ConfigError(
            f"model.tick_rate_hz {tick_rate_hz:g} gives {float(ticks):g} ticks in a segment of "
            f"{segment_s:g} s, not a whole number; fix: set model.tick_rate_hz to "
            f"{float(max(1, round(ticks)) / as_fraction(segment_s)):g}"
        )
    return ticks.numerator


def _require_period(recipe: Recipe, config: TrainConfig, names: list[str]) -> None:
    """Check that windows begin and end on whole samples of every stream that is read."""
    stored = {name: stored_rate_hz(recipe.streams[name]) for name in names}
    rates_hz = {n: r for n, r in stored.items() if r is not None}
    rates_hz["ticks"] = config.model.tick_rate_hz
    period = common_period_s([*rates_hz.values()])
    window = config.data.window
    for key, value in (("duration_s", window.duration_s), ("stride_s", window.stride)):
        multiple = as_fraction(value) / period
        if multiple.denominator != 1 or multiple < 1:
            below = math.floor(multiple) * period
            fits = [f"{float(fit):g}" for fit in (below, below + period) if fit > 0]
            raise ConfigError(
                f"data.window.{key} {value:g} is not a multiple of {float(period):g} s, the "
                f"shortest time with whole samples of {_describe_rates(rates_hz)}; fix: set it to "
                f"{' or '.join(fits)}, or read fewer streams (data.modalities)"
            )


def _describe_rates(rates_hz: Mapping[str, float]) -> str:
    """Name the ticks, which come last, and streams without any of which the period is shorter."""
    period, kept = common_period_s([*rates_hz.values()]), dict(rates_hz)
    for name in list(rates_hz)[:-1]:
        others = {n: r for n, r in kept.items() if n != name}
        kept = others if common_period_s([*others.values()]) == period else kept
    return ", ".join(f"{name} {rate_hz:g} Hz" for name, rate_hz in kept.items())


def require_token_rate(
    recipe: Recipe, names: Iterable[str], tick_rate_hz: float, *, owner: str = "the set"
) -> None:
    """Check that no tick gets two tokens of a stream; `owner` names the recipe's set."""
    for name in names:
        spec = recipe.streams.get(name)
        if isinstance(spec, TextStream) and spec.tokens_per_s > tick_rate_hz * (1 + 1e-9):
            raise ConfigError(
                f"model.tick_rate_hz {tick_rate_hz:g} is below tokens_per_s {spec.tokens_per_s:g} "
                f"of {name} in {owner}, so that tokens would share a tick; fix: raise "
                f"model.tick_rate_hz, or rebuild {owner} with text.tokens_per_s: {tick_rate_hz:g}"
            )
