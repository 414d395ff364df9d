"""Encode the inputs of a tick, from all streams, as one vector.

Each stream has its encoder. Its vector is normalized, so that no stream dominates, and gets the
stream's modality embedding. A stream that is missing in a tick contributes a learned null vector
instead. The tick's vector is the sum over all seven streams.

An encoder reads only its own tick; for video that is the newest frame. Values at invalid positions
have no effect: they are overwritten before use, and the validity itself is a feature.

Letters: B batch, T ticks, D width, F frames, N = B * F, A dMel frames, S samples, C values of one,
P patches of a frame, V width inside the frame encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.recipe import PAD_TOKEN, STREAMS, TEXT_STREAMS, VISION_STREAMS, Stream
from train.model.blocks import Block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from train.config import ModelConfig
    from train.data.batch import WindowShapes

LEVEL_WIDTH = 4
"""Width of a dMel level's embedding."""

MAX_FRAME_WIDTH = 384
"""Widest frame encoder (a ViT-S).

A 224-pixel frame has 196 patches per position of the backbone, so that a wider encoder would cost
more than the backbone.
"""

_FIX_SHAPES = "make the model for the data's sizes: MultiModalCreature(config, dataset.shapes)"

MODALITIES: Final[Mapping[str, tuple[Stream, ...]]] = {
    "vision": VISION_STREAMS,
    **{str(stream): (stream,) for stream in Stream if stream not in VISION_STREAMS},
}
"""Streams of each input modality; both cameras are one modality."""

Frame = tuple[Tensor, Tensor]
"""A frame's embedding [B, D] and whether it is valid, bool [B]."""


class SamplesEncoder(nn.Module):
    """Encode a tick's samples [num_per_tick, C] and their validity by one linear map."""

    def __init__(self, num_per_tick: int, num_values: int, width: int) -> None:
        super().__init__()
        self.num_per_tick = num_per_tick
        self.linear = nn.Linear(num_per_tick * (num_values + 1), width)

    def forward(self, x_BSC: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Embed finite values [B, S, C] with validity [B, S].

        Returns:
            [B, T, D], and bool [B, T]: whether any sample of the tick is valid.
        """
        valid_BS1 = valid_BS[..., None]
        x_BSC = torch.cat([x_BSC * valid_BS1, valid_BS1.to(x_BSC.dtype)], dim=-1)
        num_ticks = valid_BS.shape[1] // self.num_per_tick
        x_BTC = x_BSC.reshape(len(x_BSC), num_ticks, -1)
        return self.linear(x_BTC), valid_BS.view(len(x_BSC), num_ticks, -1).any(-1)


class TouchEncoder(SamplesEncoder):
    """Encode touch samples, unchanged."""

    def forward(self, touch_BSC: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Embed float [B, S, C]; see :class:`SamplesEncoder`."""
        return super().forward(touch_BSC.masked_fill(~valid_BS[..., None], 0.0), valid_BS)


class ProprioEncoder(SamplesEncoder):
    """Encode poses: sine and cosine of the angles, so that -pi equals pi, and velocities."""

    def __init__(self, num_per_tick: int, num_values: int, width: int) -> None:
        super().__init__(num_per_tick, num_values // 2 * 3, width)

    def forward(self, proprio_BSC: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Embed float [B, S, C], angles in rad and velocities; see :class:`SamplesEncoder`."""
        proprio_BSC = proprio_BSC.masked_fill(~valid_BS[..., None], 0.0)
        angles, velocities = proprio_BSC.chunk(2, dim=-1)
        return super().forward(torch.cat([angles.sin(), angles.cos(), velocities], -1), valid_BS)


class AudioEncoder(SamplesEncoder):
    """Encode dMel frames: embed each channel's level, then map all of a tick linearly.

    Source: Bai et al. 2024, "dMel: Speech Tokenization made Simple" (arXiv:2407.15835), section 2.
    """

    def __init__(self, num_per_tick: int, num_channels: int, num_levels: int, width: int) -> None:
        super().__init__(num_per_tick, num_channels * LEVEL_WIDTH, width)
        self.levels = nn.Embedding(num_levels, LEVEL_WIDTH)

    def forward(self, audio_BAC: Tensor, valid_BA: Tensor) -> tuple[Tensor, Tensor]:
        """Embed levels, uint8 or int64 [B, A, C]; see :class:`SamplesEncoder`."""
        levels_BAC = audio_BAC.masked_fill(~valid_BA[..., None], 0).int()
        return super().forward(self.levels(levels_BAC).flatten(2), valid_BA)


class TextEncoder(nn.Module):
    """Embed one token per tick, PAD (silence) included; each text stream has its own table."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Embed int64 [B, T]; returns [B, T, D] and `valid_BT`."""
        return self.tokens(tokens_BT.masked_fill(~valid_BT, PAD_TOKEN)), valid_BT


class FrameEncoder(nn.Module):
    """Encode frames by a small ViT (Dosovitskiy et al. 2020, arXiv:2010.11929), pooled by mean.

    All cameras share the weights, except the projection to the model's width: a sum of equally
    projected frames could not distinguish left from right.

    `places` (the position embedding) and `eyes` (the projections) are names in checkpoints.
    """

    def __init__(
        self, config: ModelConfig, shapes: WindowShapes, cameras: Sequence[Stream], width: int
    ) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        if shapes.image_size % self.patch_size:
            raise ConfigError(
                f"model.patch_size {self.patch_size} does not divide the recipe's vision.size "
                f"{shapes.image_size}; fix: set a patch size that does, such as 16"
            )
        inner = min(MAX_FRAME_WIDTH, width, max(64, width // 16 * 8))
        num_heads = next(n for n in range(max(1, inner // 64), 0, -1) if inner % n == 0)
        self.patches = nn.Linear(3 * self.patch_size**2, inner)
        self.places = nn.Parameter(torch.empty((shapes.image_size // self.patch_size) ** 2, inner))
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
        self.eyes = nn.ModuleDict({camera: nn.Linear(inner, width) for camera in cameras})

    def forward(self, frames_BFCHW: Tensor, camera: Stream) -> Tensor:
        """Embed one camera's normalized frames [B, F, 3, H, W] as [B, F, D]."""
        batch, num_frames, channels, height, _ = frames_BFCHW.shape
        side, size = height // self.patch_size, self.patch_size
        # A linear map of unfolded patches equals the patch convolution and is faster on a CPU.
        grid = frames_BFCHW.reshape(batch * num_frames, channels, side, size, side, size)
        patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch * num_frames, side * side, -1)
        x_NPV = self.patches(patches) + self.places
        for block in self.blocks:
            x_NPV, _ = block(x_NPV)
        x_ND: Tensor = self.eyes[camera](self.norm(x_NPV).mean(dim=1))
        return x_ND.view(batch, num_frames, -1)


class TickEncoder(nn.Module):
    """Fuse all streams of a tick into one vector.

    Only `streams` have encoders. Other streams, and those that a batch lacks, give their null
    vectors.
    """

    def __init__(
        self, config: ModelConfig, shapes: WindowShapes, streams: Sequence[Stream], width: int
    ) -> None:
        super().__init__()
        self.shapes = shapes
        self.streams = tuple(streams)
        samples = shapes.sensor_samples_per_tick
        makers: dict[Stream, Callable[[], nn.Module]] = {
            Stream.AUDIO: lambda: AudioEncoder(
                shapes.audio_frames_per_tick, shapes.mel_channels, shapes.mel_levels, width
            ),
            Stream.TOUCH: lambda: TouchEncoder(samples, shapes.touch_size, width),
            Stream.PROPRIO: lambda: ProprioEncoder(samples, shapes.proprio_size, width),
            Stream.INTERNAL_TEXT: lambda: TextEncoder(shapes.vocab_size, width),
            Stream.EXTERNAL_TEXT: lambda: TextEncoder(shapes.vocab_size, width),
        }
        self.encoders = nn.ModuleDict({s: makers[s]() for s in streams if s in makers})
        cameras = [s for s in streams if s in VISION_STREAMS]
        self.frames = FrameEncoder(config, shapes, cameras, width) if cameras else None
        self.norms = nn.ModuleDict({s: nn.LayerNorm(width, bias=False) for s in streams})
        self.modality = nn.Parameter(torch.empty(len(STREAMS), width))
        self.null = nn.Parameter(torch.empty(len(STREAMS), width))

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        *,
        num_ticks: int,
        first_tick: int = 0,
        last_frames: Mapping[Stream, Frame] | None = None,
    ) -> tuple[Tensor, dict[Stream, Frame]]:
        """Encode ticks [first_tick, first_tick + num_ticks).

        Args:
            inputs: of :func:`train.data.pixels.to_model_inputs`, for these ticks.
            num_ticks: number of ticks.
            first_tick: index of the first one since the stream's start.
            last_frames: per camera, the newest frame before these ticks.

        Returns:
            [B, T, D], and per camera the newest frame.
        """
        batch = len(next(iter(inputs.values())))
        x_BTD = self.null.new_zeros(batch, num_ticks, self.null.shape[1])
        newest: dict[Stream, Frame] = {}
        for index, stream in enumerate(STREAMS):
            null_D = self.null[index]
            # The stream's vectors [B, T, D] and their validity [B, T]; None if it is missing.
            encoded: tuple[Tensor, Tensor] | None = None
            if stream in VISION_STREAMS and stream in self.streams:
                encoded, newest[stream] = self._encode_frames(
                    inputs,
                    stream,
                    first_tick=first_tick,
                    num_ticks=num_ticks,
                    before=(last_frames or {}).get(stream),
                )
            elif stream in self.streams and stream in inputs:
                encoded = self.encoders[stream](inputs[stream], inputs[f"{stream}_valid"])
            if encoded is None:
                x_BTD = x_BTD + null_D
            else:
                stream_BTD = self.norms[stream](encoded[0].to(null_D.dtype)) + self.modality[index]
                x_BTD = x_BTD + torch.where(encoded[1][..., None], stream_BTD, null_D)
        return x_BTD, newest

    def _encode_frames(
        self,
        inputs: Mapping[str, Tensor],
        camera: Stream,
        *,
        first_tick: int,
        num_ticks: int,
        before: Frame | None,
    ) -> tuple[Frame, Frame]:
        """Encode each tick's newest frame, [B, T, D] and bool [B, T]; also return the last one."""
        due = frames_due(self.shapes, first_tick=first_tick, num_ticks=num_ticks)
        # Index of each tick's newest frame among the due ones.
        ticks = torch.arange(first_tick, first_tick + num_ticks, device=self.null.device)
        index_T = ticks * self.shapes.num_frames // self.shapes.num_ticks - due.start
        frames_BFD, valid_BF = self._embed(inputs, camera, due, index_T)
        # With at most one frame per tick, ticks share frames; else `_embed` chose one per tick.
        if self.shapes.num_frames <= self.shapes.num_ticks:
            if before is not None:
                frames_BFD = torch.cat([before[0][:, None].to(frames_BFD.dtype), frames_BFD], dim=1)
                valid_BF = torch.cat([before[1][:, None], valid_BF], dim=1)
                index_T = index_T + 1
            frames_BFD = frames_BFD.index_select(1, index_T)
            valid_BF = valid_BF.index_select(1, index_T)
        return (frames_BFD, valid_BF), (frames_BFD[:, -1], valid_BF[:, -1])

    def _embed(
        self, inputs: Mapping[str, Tensor], camera: Stream, due: range, index_T: Tensor
    ) -> Frame:
        """Embed the due frames as [B, F, D]; with more frames than ticks, one per tick."""
        if camera not in inputs or not due:
            batch = len(next(iter(inputs.values())))
            num_frames = len(due if self.shapes.num_frames <= self.shapes.num_ticks else index_T)
            zeros = self.null.new_zeros(batch, num_frames, self.null.shape[1])
            return zeros, torch.zeros_like(zeros[..., 0], dtype=torch.bool)
        frames_BFCHW, valid_BF = inputs[camera], inputs[f"{camera}_valid"]
        if frames_BFCHW.shape[-1] != self.shapes.image_size:
            raise ConfigError(
                f"{camera} has frames of {frames_BFCHW.shape[-1]} pixels, the model is made for "
                f"{self.shapes.image_size}; fix: {_FIX_SHAPES}"
            )
        if frames_BFCHW.shape[1] < len(due):
            raise ConfigError(
                f"{camera} has {frames_BFCHW.shape[1]} frames, its ticks need {len(due)} "
                f"({due.start} to {due.stop - 1}); fix: {_FIX_SHAPES}"
            )
        if self.shapes.num_frames > self.shapes.num_ticks:
            frames_BFCHW = frames_BFCHW.index_select(1, index_T)
            valid_BF = valid_BF.index_select(1, index_T)
        else:
            frames_BFCHW, valid_BF = frames_BFCHW[:, : len(due)], valid_BF[:, : len(due)]
        assert self.frames is not None
        return self.frames(frames_BFCHW, camera), valid_BF


def frames_due(shapes: WindowShapes, *, first_tick: int, num_ticks: int) -> range:
    """List the frames that are first used in ticks [first_tick, first_tick + num_ticks).

    Frame k has the grid time k / fps; a tick uses the newest frame not after its start.
    """
    newest = (first_tick + num_ticks - 1) * shapes.num_frames // shapes.num_ticks
    before = (first_tick - 1) * shapes.num_frames // shapes.num_ticks if first_tick else -1
    return range(before + 1, newest + 1)


def count_ticks(inputs: Mapping[str, Tensor], shapes: WindowShapes) -> int:
    """Count the ticks that inputs span, by their frames if all streams are video.

    Raises:
        ConfigError: there is no stream, streams span different numbers of ticks, or windows were
            not joined into a batch.
    """
    per_tick = {
        Stream.AUDIO: shapes.audio_frames_per_tick,
        Stream.TOUCH: shapes.sensor_samples_per_tick,
        Stream.PROPRIO: shapes.sensor_samples_per_tick,
        **dict.fromkeys(TEXT_STREAMS, 1),
    }
    for stream in (s for s in per_tick if s in inputs):
        if inputs[stream].ndim != (2 if stream in TEXT_STREAMS else 3):
            raise ConfigError(
                f"{stream} has the shape {list(inputs[stream].shape)}, a dimension too many or too "
                "few; fix: give the DataLoader collate_fn=real_data_collate_fn, which joins windows"
            )
    spans = {s: (inputs[s].shape[1], n) for s, n in per_tick.items() if s in inputs}
    if not spans:
        spans = {
            s: (inputs[s].shape[1] * shapes.num_ticks // shapes.num_frames, 1)
            for s in VISION_STREAMS
            if s in inputs
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


def without(inputs: Mapping[str, Tensor], streams: Iterable[Stream]) -> dict[str, Tensor]:
    """Mask streams of a batch's inputs, as in sessions that lack them.

    `inputs` are unchanged. Masked values stay in the result; a model ignores them.
    """
    masks = [name for stream in streams if (name := f"{stream}_valid") in inputs]
    return {**inputs, **{name: torch.zeros_like(inputs[name]) for name in masks}}


def hide_at_random(inputs: Mapping[str, Tensor], *, share: float) -> dict[str, Tensor]:
    """Mask each modality of a batch's inputs in random samples, independently of the others.

    Args:
        inputs: unchanged.
        share: probability, in [0, 1).
    """
    hidden = dict(inputs)
    for streams in MODALITIES.values():
        masks = {name: inputs[name] for s in streams if (name := f"{s}_valid") in inputs}
        if masks:
            first = next(iter(masks.values()))
            is_kept = torch.rand(len(first), device=first.device) >= share
            hidden |= {name: mask & is_kept[:, None] for name, mask in masks.items()}
    return hidden
