"""MultiModalCreature: predict tick t + 1 of the targets from all inputs up to tick t.

encode_ticks (a vector per tick) -> backbone (a causal transformer over ticks) -> heads, in
parallel. :meth:`MultiModalCreature.forward` runs whole windows for training.
:meth:`MultiModalCreature.forward_step` runs a few new ticks after those in a :class:`Cache`; its
cost does not depend on the number of earlier ticks, and within a window it gives the same numbers.
Streams run in parallel as in Moshi's inner monologue (Défossez et al. 2024, arXiv:2410.00037).

Letters: B batch, T ticks, D width, S samples of a stream, P size of a pose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.recipe import Recipe, Stream
from train.config import Head, ModelConfig, TrainConfig, as_train_config
from train.data.batch import WindowShapes
from train.model.blocks import Block, KeysValues, rotations
from train.model.encoders import Frame, TickEncoder, count_ticks, hide_at_random

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
    frames: Mapping[Stream, Frame]
    """Newest frame per camera."""
    last_pose: Tensor
    """Last valid pose, float32 [B, P]; zeros before the first one."""


class MultiModalCreature(nn.Module):
    """A causal multi-stream transformer over ticks.

    It has encoders only for the streams that the configuration reads, and only heads whose loss
    weight is not 0, so that text-only training has no frame encoder. Positions are rotary: absolute
    indices of ticks have no effect, and windows can have any number of ticks.
    """

    def __init__(
        self, config: TrainConfig | Mapping[str, Any], shapes: WindowShapes | None = None
    ) -> None:
        """Build the model, with initial weights from torch's random generator (seed it before).

        Args:
            config: the training configuration, or its plain values as from ``yaml.safe_load``.
            shapes: sizes of the windows; None means those of the default recipe.

        Raises:
            ConfigError: the configuration is wrong, or sizes do not divide.
        """
        super().__init__()
        self.config = as_train_config(config)
        model = self.config.model
        self.shapes = shapes or WindowShapes.from_recipe(Recipe(), tick_rate_hz=model.tick_rate_hz)
        self.width, num_layers, num_heads = dimensions(model)
        self.head_dim = self.width // num_heads
        self.modality_dropout = 0.0 if self.config.is_text_only else model.modality_dropout
        self.encoder = TickEncoder(model, self.shapes, self.config.input_streams, self.width)
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
            {head: nn.Linear(*self._head_sizes(head)) for head in self.config.heads}
        )
        init_weights(self)

    def _head_sizes(self, head: Head) -> tuple[int, int]:
        shapes = self.shapes
        if head is Head.AUDIO:
            levels = shapes.audio_frames_per_tick * shapes.mel_channels * shapes.mel_levels
            return self.width, levels
        if head is Head.ANIMATION:
            # The last velocities go directly to the head: the next angles are nearly linear in
            # them, and the tick's vector would have to carry them through the backbone.
            pose_size = shapes.proprio_size
            return self.width + pose_size // 2, shapes.sensor_samples_per_tick * pose_size
        return self.width, shapes.vocab_size

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict tick t + 1 at each tick t, from ticks <= t.

        Args:
            inputs: of :func:`train.data.pixels.to_model_inputs`; streams may be absent.

        Returns:
            For each head whose loss weight is not 0:
            internal_text, external_text: logits [B, T, vocab];
            audio: logits [B, T, frames per tick, mel channels, mel levels];
            animation: float32 [B, T, samples per tick, P], poses: angles in rad (not wrapped) and
            velocities in rad/s. The head predicts a residual to standing still, which is the last
            valid angles (0 before the first) and velocities of 0; its initial residual is 0.

        Raises:
            ConfigError: the inputs do not have the model's window shapes.
        """
        if self.training and self.modality_dropout:
            inputs = hide_at_random(inputs, share=self.modality_dropout)
        pose_BTP = self.last_poses(inputs)
        return self.heads(self.backbone(self.encode_ticks(inputs)), pose_BTP)

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

        Raises:
            ConfigError: the inputs do not have the model's window shapes.
        """
        num_ticks = count_ticks(inputs, self.shapes) if num_ticks is None else num_ticks
        context = self.shapes.num_ticks if context is None else context
        first = cache.num_ticks if cache else 0
        x_BTD, frames = self.encoder(
            inputs,
            num_ticks=num_ticks,
            first_tick=first,
            last_frames=cache.frames if cache else None,
        )
        pose_BTP = self.last_poses(inputs, cache.last_pose if cache else None, num_ticks=num_ticks)
        rotation = self._rotations(x_BTD, first)
        keys_values = []
        for index, block in enumerate(self.blocks):
            past = cache.keys_values[index] if cache else None
            x_BTD, layer = block(x_BTD, rotation, past, context=context)
            keys_values.append(layer)
        outputs = self.heads(self.norm(x_BTD), pose_BTP)
        return outputs, Cache(
            num_ticks=first + num_ticks,
            keys_values=tuple(keys_values),
            frames=frames,
            last_pose=pose_BTP[:, -1],
        )

    def encode_ticks(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Encode each tick, independently of the others, as a vector [B, T, D]."""
        x_BTD, _ = self.encoder(inputs, num_ticks=count_ticks(inputs, self.shapes))
        return x_BTD  # type: ignore[no-any-return]

    def backbone(self, x_BTD: Tensor) -> Tensor:
        """Apply the causal transformer to the ticks' vectors [B, T, D]."""
        rotation = self._rotations(x_BTD, 0)
        for block in self.blocks:
            x_BTD, _ = block(x_BTD, rotation)
        return self.norm(x_BTD)  # type: ignore[no-any-return]

    def heads(self, x_BTD: Tensor, pose_BTP: Tensor) -> dict[str, Tensor]:
        """Compute the outputs of all heads; see :meth:`forward`.

        Args:
            x_BTD: from :meth:`backbone`.
            pose_BTP: from :meth:`last_poses`.
        """
        shapes = self.shapes
        outputs = {}
        for head in self.config.heads:
            predictor = self.predictors[head]
            if head is Head.ANIMATION:
                angles, velocities = pose_BTP.chunk(2, dim=-1)
                still_BTP = torch.cat([angles, torch.zeros_like(velocities)], dim=-1)
                residual = predictor(torch.cat([x_BTD, velocities.to(x_BTD.dtype)], dim=-1))
                residual = residual.float().view(*x_BTD.shape[:2], -1, shapes.proprio_size)
                outputs[str(head)] = still_BTP[:, :, None] + residual
            elif head is Head.AUDIO:
                sizes = (shapes.mel_channels, shapes.mel_levels)
                outputs[str(head)] = predictor(x_BTD).view(*x_BTD.shape[:2], -1, *sizes)
            else:
                outputs[str(head)] = predictor(x_BTD)
        return outputs

    def last_poses(
        self,
        inputs: Mapping[str, Tensor],
        before_BP: Tensor | None = None,
        *,
        num_ticks: int | None = None,
    ) -> Tensor:
        """Find the last valid pose at or before the end of each tick, float32 [B, T, P].

        Args:
            inputs: of these ticks.
            before_BP: the last pose before them; None means zeros.
            num_ticks: number of ticks; None counts them.
        """
        num_ticks = count_ticks(inputs, self.shapes) if num_ticks is None else num_ticks
        if before_BP is None:
            first = next(iter(inputs.values()))
            before_BP = torch.zeros(len(first), self.shapes.proprio_size, device=first.device)
        if Stream.PROPRIO not in self.config.input_streams or Stream.PROPRIO not in inputs:
            return before_BP[:, None].expand(-1, num_ticks, -1)
        valid_BS = inputs[f"{Stream.PROPRIO}_valid"]
        poses_BSP = torch.cat([before_BP[:, None], inputs[Stream.PROPRIO].float()], dim=1)
        # Index of the last valid pose up to each sample; 0 is the pose before these ticks.
        index_S = torch.arange(1, valid_BS.shape[1] + 1, device=valid_BS.device)
        last_BS = torch.where(valid_BS, index_S, 0).cummax(dim=1).values
        per_tick = self.shapes.sensor_samples_per_tick
        last_BT1 = last_BS[:, per_tick - 1 :: per_tick, None]
        return poses_BSP.gather(1, last_BT1.expand(-1, -1, poses_BSP.shape[2]))

    def _rotations(self, x_BTD: Tensor, first: int) -> Tensor:
        return rotations(x_BTD.shape[1], first=first, head_dim=self.head_dim, device=x_BTD.device)


def dimensions(model: ModelConfig) -> tuple[int, int, int]:
    """Return width, depth and number of attention heads of the backbone.

    Raises:
        ConfigError: the width per head is not an even number.
    """
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

    The animation head starts at zero, which predicts standing still. Outputs of the layers are
    scaled by the number of layers (Radford et al. 2019, GPT-2), and the streams' vectors so that
    their sum has about unit size.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name == f"predictors.{Head.ANIMATION}.weight":
            nn.init.zeros_(parameter)
        elif name.startswith("encoder.norms."):
            nn.init.constant_(parameter, len(model.encoder.norms) ** -0.5)
        elif "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith("levels.weight"):
            nn.init.normal_(parameter)  # smaller, the validity feature would dominate the levels
        elif name.endswith("out.weight"):
            is_vision = name.startswith("encoder.frames.")
            depth = model.config.model.vision_layers if is_vision else len(model.blocks)
            nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * depth))
        else:
            nn.init.normal_(parameter, std=INIT_STD)
