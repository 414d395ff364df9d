"""MultiModalCreature: predict tick t + 1 of the targets from all inputs up to tick t.

encode_ticks (a vector per tick) -> backbone (a causal transformer over ticks) -> heads, in
parallel. :meth:`MultiModalCreature.forward` runs whole windows for training.
:meth:`MultiModalCreature.forward_step` runs a few new ticks after those in a :class:`Cache`; its
cost does not depend on the number of earlier ticks, and within a window it gives the same numbers.
Streams run in parallel as in Moshi's inner monologue (Défossez et al. 2024, arXiv:2410.00037).

Letters: B batch, T ticks, D width, S samples of a stream, V values of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.recipe import Recipe
from shared.streams import Kind
from train.config import ModelConfig, TrainConfig, as_train_config
from train.model.blocks import Block, KeysValues, rotations
from train.model.encoders import (
    AudioEncoder,
    Frame,
    TickEncoder,
    count_ticks,
    hide_at_random,
    modalities,
    module_key,
)
from train.model.losses import Objective
from train.model.values import SensorValues, last_positions
from train.shapes import WindowShapes

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZES = {"tiny": (256, 8), "small": (768, 12), "medium": (1280, 24), "large": (2048, 20)}
"""Width and depth by model.size; about 10M, 100M, 500M and 1B parameters with all streams."""

DEFAULT_SIZE = (512, 6)
"""Width and depth if the configuration sets neither model.size nor them."""

HEAD_WIDTH = 64
"""Width per attention head if the configuration does not set model.num_heads."""

INIT_STD = 0.02
"""Standard deviation of initial weights (as GPT-2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """State of a stream of ticks, made by :meth:`MultiModalCreature.forward_step`.

    Its size, and with it the cost of a tick, does not grow with the stream.
    """

    num_ticks: int
    """Ticks so far, which is the position of the next one."""
    keys_values: tuple[KeysValues, ...]
    """Per layer, each [B, heads, T, D / heads], of the ticks that the next one attends to."""
    frames: Mapping[str, Frame]
    last_values: Mapping[str, Tensor]
    """Last valid sample of each predicted sensor, float32 [B, V]."""


class MultiModalCreature(nn.Module):
    """A causal multi-stream transformer over ticks.

    It has encoders only for the input streams, and only heads whose loss weight is not 0, so that
    text-only training has no frame encoder. Positions are rotary: absolute indices of ticks have no
    effect, and windows can have any number of ticks.
    """

    def __init__(
        self, config: TrainConfig | Mapping[str, Any], shapes: WindowShapes | None = None
    ) -> None:
        """Build the model, with initial weights from torch's random generator (seed it before).

        Args:
            config: the training configuration, or its plain values as from ``yaml.safe_load``.
            shapes: streams and sizes of the windows; None means those of the default recipe.

        Raises:
            ConfigError: the configuration is wrong, or sizes do not divide.
        """
        super().__init__()
        self.config = as_train_config(config)
        model = self.config.model
        self.shapes = shapes or WindowShapes.from_recipe(Recipe(), self.config)
        self.width, num_layers, num_heads = dimensions(model)
        self.head_dim = self.width // num_heads
        self.modality_dropout = 0.0 if self.shapes.is_text_only else model.modality_dropout
        self.sensors = nn.ModuleDict(
            {
                module_key(name): SensorValues(self.shapes.streams[name].values)
                for name in self.shapes.of_kind(Kind.SENSOR)
            }
        )
        self.encoder = TickEncoder(model, self.shapes, self.width)
        self.blocks = nn.ModuleList(
            Block(
                self.width,
                num_heads=num_heads,
                is_causal=True,
                dropout=model.dropout,
                is_checkpointing=model.is_checkpointing,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(self.width, bias=False)
        self.predictors = nn.ModuleDict(
            {module_key(head): nn.Linear(*self._head_sizes(head)) for head in self.shapes.heads}
        )
        init_weights(self)

    @property
    def objective(self) -> Objective:
        """What the model is trained for, with the scales of its sensor values."""
        return Objective.from_config(self.config, self.shapes, std=self.target_std)

    @property
    def target_std(self) -> dict[str, Tensor]:
        """Standard deviation of each value of each predicted sensor, [V] by head."""
        return {
            head: self._values_of(head).std
            for head in self.shapes.heads
            if self.shapes.target_shape(head).kind is Kind.SENSOR
        }

    @property
    def has_statistics(self) -> bool:
        """Whether any sensor's values are standardized."""
        return any(isinstance(s, SensorValues) and s.has_statistics for s in self.sensors.values())

    def set_statistics(self, statistics: Mapping[str, Mapping[str, Any]]) -> None:
        """Standardize sensor values, before training begins; checkpoints hold the statistics.

        They have "count", "mean" and "std" by the stream's name, as in a manifest. A stream without
        them keeps its present scale, at first 1.

        Raises:
            ConfigError: statistics are of another number of values than their stream has.
        """
        for name in self.shapes.of_kind(Kind.SENSOR):
            self._sensor(name).set_statistics(statistics.get(name) or {}, name=name)

    def _sensor(self, name: str) -> SensorValues:
        sensor = self.sensors[module_key(name)]
        assert isinstance(sensor, SensorValues)
        return sensor

    def _values_of(self, head: str) -> SensorValues:
        return self._sensor(self.shapes.targets[head])

    def _head_sizes(self, head: str) -> tuple[int, int]:
        """Return the numbers of inputs and outputs of a head."""
        shape = self.shapes.target_shape(head)
        num_outputs = shape.per_tick * math.prod(shape.size) * max(1, shape.num_classes)
        if shape.kind is not Kind.SENSOR:
            return self.width, num_outputs
        # The last velocities go directly to the head: the next angles are nearly linear in them,
        # and the tick's vector would have to carry them through the backbone.
        return self.width + self._values_of(head).num_rates, num_outputs

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict tick t + 1 at each tick t, from ticks <= t.

        Args:
            inputs: of :func:`train.data.pixels.to_model_inputs`; streams may be absent.

        Returns:
            For each head whose loss weight is not 0, by its target's kind:
            text: logits [B, T, vocab];
            audio: logits [B, T, frames per tick, mel channels, mel levels];
            sensor: float32 [B, T, samples per tick, V], values in the stream's units; angles are
            not wrapped. The head predicts a residual to standing still, which is the last valid
            sample with velocities of 0; its initial residual is 0. Quaternions and directions are
            normalized. Before the first sample, standing still is the mean of standardized values,
            else 0, the identity or +z.

        Raises:
            ConfigError: the inputs do not have the model's window shapes.
        """
        if self.training and self.modality_dropout:
            streams = modalities(self.shapes).values()
            inputs = hide_at_random(inputs, streams, share=self.modality_dropout)
        last = self.last_values(inputs, num_ticks=count_ticks(inputs, self.shapes))
        return self.heads(self.backbone(self.encode_ticks(inputs)), last)

    def forward_step(
        self,
        inputs: Mapping[str, Tensor],
        cache: Cache | None = None,
        *,
        num_ticks: int | None = None,
        context: int | None = None,
    ) -> tuple[dict[str, Tensor], Cache]:
        """Predict from one or more new ticks after those in `cache`.

        Equals :meth:`forward` up to `context` ticks. After that, each layer attends to the newest
        `context` ticks, whose keys and values depend on earlier ticks. So a prediction uses more
        than `context` ticks, while the cost of a tick stays the same.

        Args:
            inputs: of the new ticks. Video has the frames of
                :func:`train.model.encoders.frames_due`, possibly none; then the last frame is used.
            cache: of the ticks before; None for the first ones. It is not changed.
            num_ticks: number of new ticks, needed only if all inputs are video.
            context: ticks that a layer attends to, including the new one; the same in all calls.
                None means as many as a window has, the most that the model was trained on.

        Returns:
            The outputs for the new ticks, and the cache with them.
        """
        num_ticks = count_ticks(inputs, self.shapes) if num_ticks is None else num_ticks
        context = self.shapes.num_ticks if context is None else context
        first = cache.num_ticks if cache else 0
        x_BTD, frames = self.encoder(
            self._features(inputs),
            num_ticks=num_ticks,
            first_tick=first,
            last_frames=cache.frames if cache else None,
        )
        last = self.last_values(inputs, cache.last_values if cache else {}, num_ticks=num_ticks)
        rotation = self._rotations(x_BTD, first)
        keys_values = []
        for index, block in enumerate(self.blocks):
            past = cache.keys_values[index] if cache else None
            x_BTD, layer = block(x_BTD, rotation, past, context=context)
            keys_values.append(layer)
        return self.heads(self.norm(x_BTD), last), Cache(
            num_ticks=first + num_ticks,
            keys_values=tuple(keys_values),
            frames=frames,
            last_values={name: values[:, -1] for name, values in last.items()},
        )

    def encode_ticks(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Encode each tick, independently of the others, as a vector [B, T, D]."""
        num_ticks = count_ticks(inputs, self.shapes)
        x_BTD, _ = self.encoder(self._features(inputs), num_ticks=num_ticks)
        return x_BTD  # type: ignore[no-any-return]

    def _features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replace the values of sensors by their features."""
        features = {
            name: self._sensor(name).features(inputs[name], inputs[f"{name}_valid"])
            for name in self.shapes.inputs_of_kind(Kind.SENSOR)
            if name in inputs
        }
        return {**inputs, **features}

    def backbone(self, x_BTD: Tensor) -> Tensor:
        """Apply the causal transformer to the ticks' vectors [B, T, D]."""
        rotation = self._rotations(x_BTD, 0)
        for block in self.blocks:
            x_BTD, _ = block(x_BTD, rotation)
        return self.norm(x_BTD)  # type: ignore[no-any-return]

    def heads(self, x_BTD: Tensor, last: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs of all heads; see :meth:`forward`."""
        outputs = {}
        for head, stream in self.shapes.targets.items():
            shape, predictor = self.shapes.streams[stream], self.predictors[module_key(head)]
            if shape.kind is Kind.SENSOR:
                values = self._sensor(stream)
                rates = values.rates(last[stream]).to(x_BTD.dtype)
                residual = predictor(torch.cat([x_BTD, rates], dim=-1)).float()
                residual = residual.unflatten(-1, (shape.per_tick, -1))
                outputs[head] = values.predict(last[stream][:, :, None], residual)
            elif shape.kind is Kind.AUDIO:
                sizes = (shape.per_tick, *shape.size, shape.num_classes)
                outputs[head] = predictor(x_BTD).unflatten(-1, sizes)
            else:
                outputs[head] = predictor(x_BTD)
        return outputs

    def last_values(
        self,
        inputs: Mapping[str, Tensor],
        before: Mapping[str, Tensor] | None = None,
        *,
        num_ticks: int,
    ) -> dict[str, Tensor]:
        """Find the last valid sample of predicted sensors at or before the end of each tick.

        `before`: the last samples before them, [B, V] by stream; those of other streams are as
            before the first reading.

        Returns:
            float32 [B, T, V], by stream.
        """
        batch = len(next(iter(inputs.values())))
        last = {}
        for head in self.target_std:
            name, shape = self.shapes.targets[head], self.shapes.target_shape(head)
            before_BV = (before or {}).get(name)
            if before_BV is None:
                before_BV = self._sensor(name).initial().expand(batch, -1)
            if name in self.shapes.inputs and name in inputs:
                last_BT = last_positions(inputs[f"{name}_valid"], per_tick=shape.per_tick)
                values_BSV = torch.cat([before_BV[:, None], inputs[name].float()], dim=1)
                index_BTV = (last_BT + 1)[..., None].expand(-1, -1, values_BSV.shape[2])
                last[name] = values_BSV.gather(1, index_BTV)
            else:
                last[name] = before_BV[:, None].expand(-1, num_ticks, -1)
        return last

    def _rotations(self, x_BTD: Tensor, first: int) -> Tensor:
        return rotations(x_BTD.shape[1], first=first, head_dim=self.head_dim, device=x_BTD.device)


def dimensions(model: ModelConfig) -> tuple[int, int, int]:
    """Return width, depth and number of attention heads of the backbone."""
    width, depth = SIZES[model.size] if model.size else DEFAULT_SIZE
    width, depth = model.hidden_dim or width, model.num_layers or depth
    num_heads = model.num_heads or max(1, width // HEAD_WIDTH)
    if width % (2 * num_heads):
        fitting = [n for n in range(1, width // 2 + 1) if width % (2 * n) == 0]
        nearest = min(fitting, key=lambda n: abs(n - num_heads))
        raise ConfigError(
            f"model.hidden_dim {width} over {num_heads} attention heads gives no even width per "
            f"head; fix: set `model.num_heads: {nearest}`, or a hidden_dim that {2 * num_heads} "
            "divides"
        )
    return width, depth, num_heads


def init_weights(model: MultiModalCreature) -> None:
    """Initialize all weights from torch's random generator.

    Heads of sensors start at zero, which predicts standing still. Outputs of the layers are scaled
    by the number of layers (Radford et al. 2019, GPT-2), and the streams' vectors so that their sum
    has about unit size.
    """
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=INIT_STD)
    for module in model.modules():
        _init_module(module)
    for parameter in model.encoder.norms.parameters():
        nn.init.constant_(parameter, len(model.encoder.norms) ** -0.5)
    for head in model.target_std:
        for parameter in model.predictors[module_key(head)].parameters():
            nn.init.zeros_(parameter)


def _init_module(module: nn.Module) -> None:
    """Initialize the weights of one module that are not normal with :data:`INIT_STD`."""
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    elif isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    elif isinstance(module, AudioEncoder):
        nn.init.normal_(module.levels.weight)  # smaller, validity would dominate the levels
    elif isinstance(module, nn.ModuleList):
        for block in module:
            assert isinstance(block, Block)
            for layer in (block.attention, block.mlp):
                nn.init.normal_(layer.out.weight, std=INIT_STD / math.sqrt(2 * len(module)))
