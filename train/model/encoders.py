"""Encode the inputs of a tick, from all streams, as one vector.

Each input stream has an encoder by its kind. Its vector is normalized, so that no stream dominates,
and gets the stream's modality embedding. A stream that is missing in a tick contributes a learned
null vector instead. The tick's vector is the sum over all input streams.

An encoder reads only its own tick; for video that is the newest frame. Values at invalid positions
have no effect: they are overwritten before use, and the validity itself is a feature.

Letters: B batch, T ticks, D width, F frames, N = B * F, S samples of a stream, C features of one,
P patches of a frame, V width inside the frame encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.recipe import PAD_TOKEN
from shared.streams import Kind
from train.model.blocks import Block
from train.model.values import SensorValues

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from train.config import ModelConfig
    from train.shapes import StreamShape, WindowShapes

LEVEL_WIDTH = 4
"""Width of a dMel level's embedding."""

MAX_FRAME_WIDTH = 384
"""Widest frame encoder (a ViT-S).

A 224-pixel frame has 196 patches per position of the backbone, so that a wider encoder would cost
more than the backbone.
"""

_FIX_SHAPES = "make the model for the data's sizes: MultiModalCreature(config, dataset.shapes)"

Frame = tuple[Tensor, Tensor]
"""A frame's embedding [B, D] and whether it is valid, bool [B]."""


def module_key(name: str) -> str:
    """Return the name of a stream's or head's module; no attribute of torch's modules has it."""
    return f"s_{name}"


class SamplesEncoder(nn.Module):
    """Encode a tick's samples [per_tick, C] and their validity by one linear map."""

    def __init__(self, per_tick: int, num_features: int, width: int) -> None:
        super().__init__()
        self.per_tick = per_tick
        self.linear = nn.Linear(per_tick * (num_features + 1), width)

    def forward(self, x_BSC: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Embed finite features [B, S, C] as [B, T, D]; say which ticks have a valid one."""
        valid_BS1 = valid_BS[..., None]
        x_BSC = torch.cat([x_BSC * valid_BS1, valid_BS1.to(x_BSC.dtype)], dim=-1)
        num_ticks = valid_BS.shape[1] // self.per_tick
        x_BTC = x_BSC.reshape(len(x_BSC), num_ticks, -1)
        return self.linear(x_BTC), valid_BS.view(len(x_BSC), num_ticks, -1).any(-1)


class SensorEncoder(SamplesEncoder):
    """Encode the features of a sensor's samples, which :class:`SensorValues` computes."""

    def __init__(self, shape: StreamShape, width: int) -> None:
        super().__init__(shape.per_tick, SensorValues(shape.values).num_features, width)


class AudioEncoder(SamplesEncoder):
    """Encode dMel frames: embed each channel's level, then map all of a tick linearly.

    Source: Bai et al. 2024, "dMel: Speech Tokenization made Simple" (arXiv:2407.15835), section 2.
    """

    def __init__(self, shape: StreamShape, width: int) -> None:
        super().__init__(shape.per_tick, shape.size[0] * LEVEL_WIDTH, width)
        self.levels = nn.Embedding(shape.num_classes, LEVEL_WIDTH)

    def forward(self, audio_BSC: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Embed levels, uint8 or int64 [B, S, channels]; see :class:`SamplesEncoder`."""
        levels_BSC = audio_BSC.masked_fill(~valid_BS[..., None], 0).int()
        return super().forward(self.levels(levels_BSC).flatten(2), valid_BS)


class TextEncoder(nn.Module):
    """Embed one token per tick, PAD (silence) included; each text stream has its own table."""

    def __init__(self, shape: StreamShape, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.num_classes, width)

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Embed int64 [B, T]; returns [B, T, D] and `valid_BT`."""
        return self.tokens(tokens_BT.masked_fill(~valid_BT, PAD_TOKEN)), valid_BT


ENCODERS: Final[Mapping[Kind, Callable[[StreamShape, int], nn.Module]]] = {
    Kind.AUDIO: AudioEncoder,
    Kind.SENSOR: SensorEncoder,
    Kind.TEXT: TextEncoder,
}
"""The encoder of each kind, except for videos, which share :class:`FrameEncoder`."""


class FrameEncoder(nn.Module):
    """Encode frames by a small ViT (Dosovitskiy et al. 2020, arXiv:2010.11929), pooled by mean.

    All cameras share the weights, except for one position embedding per size of frames, and one
    projection to the model's width per camera: a sum of equally projected frames could not
    distinguish left from right.
    """

    def __init__(self, config: ModelConfig, shapes: WindowShapes, width: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        cameras = shapes.inputs_of_kind(Kind.VIDEO)
        inner = min(MAX_FRAME_WIDTH, width, max(64, width // 16 * 8))
        num_heads = next(n for n in range(max(1, inner // 64), 0, -1) if inner % n == 0)
        self.patches = nn.Linear(3 * self.patch_size**2, inner)
        self.positions = nn.ParameterDict()
        for camera in cameras:
            height, image_width = shapes.streams[camera].size
            if height % self.patch_size or image_width % self.patch_size:
                raise ConfigError(
                    f"model.patch_size {self.patch_size} does not divide the frames of {camera}, "
                    f"{height} x {image_width}; fix: set a patch size that does, such as 16"
                )
            num_patches = (height // self.patch_size) * (image_width // self.patch_size)
            self.positions[f"{height}x{image_width}"] = torch.empty(num_patches, inner)
        self.blocks = nn.ModuleList(
            Block(
                inner,
                num_heads=num_heads,
                is_causal=False,
                dropout=config.dropout,
                is_checkpointing=config.is_checkpointing,
            )
            for _ in range(config.vision_layers)
        )
        self.norm = nn.LayerNorm(inner, bias=False)
        self.projections = nn.ModuleDict({module_key(c): nn.Linear(inner, width) for c in cameras})

    def forward(self, frames_BFCHW: Tensor, camera: str) -> Tensor:
        """Embed one camera's normalized frames [B, F, 3, H, W] as [B, F, D]."""
        batch, num_frames, channels, height, width = frames_BFCHW.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        # A linear map of unfolded patches equals the patch convolution and is faster on a CPU.
        grid = frames_BFCHW.reshape(batch * num_frames, channels, rows, size, columns, size)
        patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch * num_frames, rows * columns, -1)
        x_NPV = self.patches(patches) + self.positions[f"{height}x{width}"]
        for block in self.blocks:
            x_NPV, _ = block(x_NPV)
        x_ND: Tensor = self.projections[module_key(camera)](self.norm(x_NPV).mean(dim=1))
        return x_ND.view(batch, num_frames, -1)


class TickEncoder(nn.Module):
    """Fuse all input streams of a tick into one vector.

    A stream that a batch lacks gives its null vector.
    """

    def __init__(self, config: ModelConfig, shapes: WindowShapes, width: int) -> None:
        super().__init__()
        self.shapes = shapes
        self.width = width
        self.encoders = nn.ModuleDict(
            {
                module_key(name): ENCODERS[shapes.streams[name].kind](shapes.streams[name], width)
                for name in shapes.inputs
                if shapes.streams[name].kind in ENCODERS
            }
        )
        has_cameras = bool(shapes.inputs_of_kind(Kind.VIDEO))
        self.frames = FrameEncoder(config, shapes, width) if has_cameras else None
        keys = [module_key(name) for name in shapes.inputs]
        self.norms = nn.ModuleDict({key: nn.LayerNorm(width, bias=False) for key in keys})
        self.modality = nn.ParameterDict({key: torch.empty(width) for key in keys})
        self.null = nn.ParameterDict({key: torch.empty(width) for key in keys})

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        *,
        num_ticks: int,
        first_tick: int = 0,
        last_frames: Mapping[str, Frame] | None = None,
    ) -> tuple[Tensor, dict[str, Frame]]:
        """Encode ticks [first_tick, first_tick + num_ticks).

        Args:
            inputs: of :func:`train.data.pixels.to_model_inputs`, for these ticks, with the features
                of sensors instead of their values.
            num_ticks: number of ticks.
            first_tick: index of the first one since the stream's start.
            last_frames: per camera, the newest frame before these ticks.

        Returns:
            [B, T, D], and per camera the newest frame.
        """
        first = next(iter(inputs.values()))
        x_BTD = torch.zeros(len(first), num_ticks, self.width, device=first.device)
        newest: dict[str, Frame] = {}
        for name in self.shapes.inputs:
            key = module_key(name)
            null_D = self.null[key]
            # The stream's vectors [B, T, D] and their validity [B, T]; None if it is missing.
            encoded: tuple[Tensor, Tensor] | None = None
            if self.shapes.streams[name].kind is Kind.VIDEO:
                encoded, newest[name] = self._encode_frames(
                    inputs,
                    name,
                    first_tick=first_tick,
                    num_ticks=num_ticks,
                    before=(last_frames or {}).get(name),
                )
            elif name in inputs:
                encoded = self.encoders[key](inputs[name], inputs[f"{name}_valid"])
            if encoded is None:
                x_BTD = x_BTD + null_D
            else:
                stream_BTD = self.norms[key](encoded[0].to(null_D.dtype)) + self.modality[key]
                x_BTD = x_BTD + torch.where(encoded[1][..., None], stream_BTD, null_D)
        return x_BTD, newest

    def _encode_frames(
        self,
        inputs: Mapping[str, Tensor],
        camera: str,
        *,
        first_tick: int,
        num_ticks: int,
        before: Frame | None,
    ) -> tuple[Frame, Frame]:
        """Encode each tick's newest frame, [B, T, D] and bool [B, T]; also return the last one."""
        due = frames_due(self.shapes, camera, first_tick=first_tick, num_ticks=num_ticks)
        frames_BFD, valid_BF = self._embed(inputs, camera, due)
        # Index of each tick's newest frame among the due ones.
        ticks = torch.arange(first_tick, first_tick + num_ticks, device=frames_BFD.device)
        num_frames = self.shapes.streams[camera].num_positions
        index_T = ticks * num_frames // self.shapes.num_ticks - due.start
        if before is not None:
            frames_BFD = torch.cat([before[0][:, None].to(frames_BFD.dtype), frames_BFD], dim=1)
            valid_BF = torch.cat([before[1][:, None], valid_BF], dim=1)
            index_T = index_T + 1
        frames_BTD, valid_BT = (
            frames_BFD.index_select(1, index_T),
            valid_BF.index_select(1, index_T),
        )
        return (frames_BTD, valid_BT), (frames_BTD[:, -1], valid_BT[:, -1])

    def _embed(self, inputs: Mapping[str, Tensor], camera: str, due: range) -> Frame:
        """Embed the due frames as [B, F, D], with their validity [B, F]."""
        if camera not in inputs or not due:
            first = next(iter(inputs.values()))
            zeros = torch.zeros(len(first), len(due), self.width, device=first.device)
            return zeros, torch.zeros_like(zeros[..., 0], dtype=torch.bool)
        frames_BFCHW, valid_BF = inputs[camera], inputs[f"{camera}_valid"]
        expected, actual = self.shapes.streams[camera].size, tuple(frames_BFCHW.shape[-2:])
        if actual != expected:
            raise ConfigError(
                f"{camera} has frames of {actual[0]} x {actual[1]} pixels, the model is made for "
                f"{expected[0]} x {expected[1]}; fix: {_FIX_SHAPES}"
            )
        if frames_BFCHW.shape[1] < len(due):
            raise ConfigError(
                f"{camera} has {frames_BFCHW.shape[1]} frames, its ticks need {len(due)} "
                f"({due.start} to {due.stop - 1}); fix: {_FIX_SHAPES}"
            )
        assert self.frames is not None
        return self.frames(frames_BFCHW[:, : len(due)], camera), valid_BF[:, : len(due)]


def frames_due(shapes: WindowShapes, camera: str, *, first_tick: int, num_ticks: int) -> range:
    """List the frames that are first used in ticks [first_tick, first_tick + num_ticks).

    Frames are counted as a batch holds them, which is at most one per tick. A tick uses the newest
    frame not after its start.
    """
    num_frames = shapes.streams[camera].num_positions
    newest = (first_tick + num_ticks - 1) * num_frames // shapes.num_ticks
    before = (first_tick - 1) * num_frames // shapes.num_ticks if first_tick else -1
    return range(before + 1, newest + 1)


def count_ticks(inputs: Mapping[str, Tensor], shapes: WindowShapes) -> int:
    """Count the ticks that inputs span, by their frames if all streams are video."""
    present = {name: shapes.streams[name] for name in shapes.inputs if name in inputs}
    others = {name: shape for name, shape in present.items() if shape.kind is not Kind.VIDEO}
    for name, shape in others.items():
        size = tuple(inputs[name].shape[2:])
        if len(size) != len(shape.size):
            raise ConfigError(
                f"{name} has the shape {list(inputs[name].shape)}, a dimension too many or too "
                "few; fix: give the DataLoader collate_fn=real_data_collate_fn, which joins windows"
            )
        if size != shape.size:
            raise ConfigError(
                f"{name} has {size[0]} values per sample, the model is made for {shape.size[0]}; "
                f"fix: {_FIX_SHAPES}"
            )
    spans = {name: (inputs[name].shape[1], shape.per_tick) for name, shape in others.items()}
    if not spans:
        spans = {
            name: (inputs[name].shape[1] * shapes.num_ticks // shape.num_positions, 1)
            for name, shape in present.items()
        }
    length, per = next(iter(spans.values()), (0, 1))
    count = length // per
    # Integers only: torch.compile makes a constant of a quotient, and recompiles for each.
    if not spans or any(length != count * per for length, per in spans.values()):
        actual = ", ".join(f"{s} {length / per:g}" for s, (length, per) in spans.items())
        raise ConfigError(
            f"the inputs' streams must span the same whole number of ticks, but span "
            f"{actual or 'none: there is no stream'}; fix: {_FIX_SHAPES}"
        )
    return count


def modalities(shapes: WindowShapes) -> dict[str, tuple[str, ...]]:
    """Return the input streams of each modality: all videos are "vision", any other its own."""
    cameras = shapes.inputs_of_kind(Kind.VIDEO)
    others = {name: (name,) for name in shapes.inputs if name not in cameras}
    return ({"vision": cameras} if cameras else {}) | others


def without(inputs: Mapping[str, Tensor], streams: Iterable[str]) -> dict[str, Tensor]:
    """Mask streams of a batch's inputs, as in sessions that lack them.

    `inputs` are unchanged. Masked values stay in the result; a model ignores them.
    """
    masks = [name for stream in streams if (name := f"{stream}_valid") in inputs]
    return {**inputs, **{name: torch.zeros_like(inputs[name]) for name in masks}}


def hide_at_random(
    inputs: Mapping[str, Tensor], groups: Iterable[Iterable[str]], *, share: float
) -> dict[str, Tensor]:
    """Mask each group of streams in random samples, independently of the others."""
    hidden = dict(inputs)
    for streams in groups:
        masks = {name: inputs[name] for s in streams if (name := f"{s}_valid") in inputs}
        if masks:
            first = next(iter(masks.values()))
            is_kept = torch.rand(len(first), device=first.device) >= share
            hidden |= {name: mask & is_kept[:, None] for name, mask in masks.items()}
    return hidden
