"""Encoders: everything that the model sees of a tick becomes one vector.

Each stream has its encoder; its vector is normalised, so that no stream drowns another, and gets
the stream's modality embedding. A stream that is missing in a tick gives a learned null instead.
The tick's vector is the sum over all seven streams. An encoder reads only its own tick (vision:
the newest frame), and nothing depends on what lies under an invalid place: values are overwritten
before they are used, and the validity itself is a feature.

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
"""Widest frame encoder (a ViT-S): a 224-pixel frame has 196 patches where a tick has one place, so
that a wider one would cost more than the backbone."""

_MEND = "make the model of the data's sizes: MultiModalCreature(config, dataset.shapes)"

MODALITIES: Final[Mapping[str, tuple[Stream, ...]]] = {
    "vision": VISION_STREAMS,
    **{str(stream): (stream,) for stream in Stream if stream not in VISION_STREAMS},
}
"""The streams of each; both eyes are one."""

Frame = tuple[Tensor, Tensor]
"""A frame's embedding [B, D] and whether it is valid, bool [B]."""


class SamplesEncoder(nn.Module):
    """A tick's samples [num_per_tick, C] and their validity, by one linear map."""

    def __init__(self, num_per_tick: int, num_values: int, width: int) -> None:
        super().__init__()
        self.num_per_tick = num_per_tick
        self.linear = nn.Linear(num_per_tick * (num_values + 1), width)

    def forward(self, x_BSC: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Embed finite values.

        Returns:
            [B, T, D], and bool [B, T]: whether any sample of the tick is valid.
        """
        valid_BS1 = valid_BS[..., None]
        x_BSC = torch.cat([x_BSC * valid_BS1, valid_BS1.to(x_BSC.dtype)], dim=-1)
        num_ticks = valid_BS.shape[1] // self.num_per_tick
        x_BTC = x_BSC.reshape(len(x_BSC), num_ticks, -1)
        return self.linear(x_BTC), valid_BS.view(len(x_BSC), num_ticks, -1).any(-1)


class TouchEncoder(SamplesEncoder):
    """Touch samples, as they are."""

    def forward(self, touch_BSC: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Embed float [B, S, C]; see :class:`SamplesEncoder`."""
        return super().forward(touch_BSC.masked_fill(~valid_BS[..., None], 0.0), valid_BS)


class ProprioEncoder(SamplesEncoder):
    """Poses: sine and cosine of the angles, so that -pi and pi are one place, and velocities."""

    def __init__(self, num_per_tick: int, num_values: int, width: int) -> None:
        super().__init__(num_per_tick, num_values // 2 * 3, width)

    def forward(self, proprio_BSC: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Embed float [B, S, C], angles in rad and velocities; see :class:`SamplesEncoder`."""
        proprio_BSC = proprio_BSC.masked_fill(~valid_BS[..., None], 0.0)
        angles, velocities = proprio_BSC.chunk(2, dim=-1)
        return super().forward(torch.cat([angles.sin(), angles.cos(), velocities], -1), valid_BS)


class AudioEncoder(SamplesEncoder):
    """dMel frames: each channel's level is embedded, then all of a tick go through one linear map.

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
    """One token per tick; PAD, silence, has its vector too. Each text stream has its own table."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Embed int64 [B, T]; returns [B, T, D] and `valid_BT`."""
        return self.tokens(tokens_BT.masked_fill(~valid_BT, PAD_TOKEN)), valid_BT


class FrameEncoder(nn.Module):
    """A small ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): a frame's patches, pooled by mean.

    Both eyes go through the same weights; only the map to the width of the model is each eye's
    own, since a sum of equally mapped eyes could not tell left from right.
    """

    def __init__(
        self, config: ModelConfig, shapes: WindowShapes, eyes: Sequence[Stream], width: int
    ) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        if shapes.image_size % self.patch_size:
            raise ConfigError(
                f"model.patch_size {self.patch_size} does not divide the recipe's vision.size "
                f"{shapes.image_size}; choose a patch size that does, such as 16"
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
        self.eyes = nn.ModuleDict({eye: nn.Linear(inner, width) for eye in eyes})

    def forward(self, frames_BFCHW: Tensor, eye: Stream) -> Tensor:
        """Embed one eye's normalised frames [B, F, 3, H, W] as [B, F, D]."""
        batch, num_frames, channels, height, _ = frames_BFCHW.shape
        side, size = height // self.patch_size, self.patch_size
        # A linear map of unfolded patches is the patch convolution, and faster on a CPU.
        grid = frames_BFCHW.reshape(batch * num_frames, channels, side, size, side, size)
        patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch * num_frames, side * side, -1)
        x_NPV = self.patches(patches) + self.places
        for block in self.blocks:
            x_NPV, _ = block(x_NPV)
        x_ND: Tensor = self.eyes[eye](self.norm(x_NPV).mean(dim=1))
        return x_ND.view(batch, num_frames, -1)


class TickEncoder(nn.Module):
    """All streams of a tick, fused into one vector.

    Has encoders only for `streams`; every other stream, and any that a batch lacks, is the null.
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
        eyes = [s for s in streams if s in VISION_STREAMS]
        self.frames = FrameEncoder(config, shapes, eyes, width) if eyes else None
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
            num_ticks: how many.
            first_tick: index of the first since the window's start.
            last_frames: for each eye the frame that was newest before these ticks.

        Returns:
            [B, T, D], and for each eye the newest frame.
        """
        batch = len(next(iter(inputs.values())))
        x_BTD = self.null.new_zeros(batch, num_ticks, self.null.shape[1])
        newest: dict[Stream, Frame] = {}
        for index, stream in enumerate(STREAMS):
            null_D = self.null[index]
            seen: tuple[Tensor, Tensor] | None = None
            if stream in VISION_STREAMS and stream in self.streams:
                before = (last_frames or {}).get(stream)
                seen, newest[stream] = self._see(inputs, stream, first_tick, num_ticks, before)
            elif stream in self.streams and stream in inputs:
                seen = self.encoders[stream](inputs[stream], inputs[f"{stream}_valid"])
            if seen is None:
                x_BTD = x_BTD + null_D
            else:
                seen_BTD = self.norms[stream](seen[0].to(null_D.dtype)) + self.modality[index]
                x_BTD = x_BTD + torch.where(seen[1][..., None], seen_BTD, null_D)
        return x_BTD, newest

    def _see(
        self,
        inputs: Mapping[str, Tensor],
        eye: Stream,
        first_tick: int,
        num_ticks: int,
        before: Frame | None,
    ) -> tuple[Frame, Frame]:
        """The newest frame at each tick, [B, T, D] and bool [B, T]; and the newest of all."""
        due = frames_due(self.shapes, first_tick=first_tick, num_ticks=num_ticks)
        ticks = torch.arange(first_tick, first_tick + num_ticks, device=self.null.device)
        index_T = ticks * self.shapes.num_frames // self.shapes.num_ticks - due.start
        frames_BFD, valid_BF = self._embed(inputs, eye, due, index_T)
        if self.shapes.num_frames <= self.shapes.num_ticks:
            if before is not None:
                frames_BFD = torch.cat([before[0][:, None].to(frames_BFD.dtype), frames_BFD], dim=1)
                valid_BF = torch.cat([before[1][:, None], valid_BF], dim=1)
                index_T = index_T + 1
            frames_BFD = frames_BFD.index_select(1, index_T)
            valid_BF = valid_BF.index_select(1, index_T)
        return (frames_BFD, valid_BF), (frames_BFD[:, -1], valid_BF[:, -1])

    def _embed(
        self, inputs: Mapping[str, Tensor], eye: Stream, due: range, index_T: Tensor
    ) -> Frame:
        """The due frames' embeddings [B, F, D], or with more frames than ticks one per tick."""
        if eye not in inputs or not due:
            batch = len(next(iter(inputs.values())))
            num_frames = len(due if self.shapes.num_frames <= self.shapes.num_ticks else index_T)
            zeros = self.null.new_zeros(batch, num_frames, self.null.shape[1])
            return zeros, torch.zeros_like(zeros[..., 0], dtype=torch.bool)
        frames_BFCHW, valid_BF = inputs[eye], inputs[f"{eye}_valid"]
        if frames_BFCHW.shape[-1] != self.shapes.image_size:
            raise ConfigError(
                f"{eye} has frames of {frames_BFCHW.shape[-1]} pixels, the model is made for "
                f"{self.shapes.image_size}; {_MEND}"
            )
        if frames_BFCHW.shape[1] < len(due):
            raise ConfigError(
                f"{eye} has {frames_BFCHW.shape[1]} frames, its ticks need {len(due)} "
                f"({due.start} to {due.stop - 1}); {_MEND}"
            )
        if self.shapes.num_frames > self.shapes.num_ticks:
            frames_BFCHW = frames_BFCHW.index_select(1, index_T)
            valid_BF = valid_BF.index_select(1, index_T)
        else:
            frames_BFCHW, valid_BF = frames_BFCHW[:, : len(due)], valid_BF[:, : len(due)]
        assert self.frames is not None
        return self.frames(frames_BFCHW, eye), valid_BF


def frames_due(shapes: WindowShapes, *, first_tick: int, num_ticks: int) -> range:
    """Indices of the frames that become visible in ticks [first_tick, first_tick + num_ticks).

    Frame k has the grid time k / fps; a tick sees the newest frame not after its start.
    """
    newest = (first_tick + num_ticks - 1) * shapes.num_frames // shapes.num_ticks
    before = (first_tick - 1) * shapes.num_frames // shapes.num_ticks if first_tick else -1
    return range(before + 1, newest + 1)


def count_ticks(inputs: Mapping[str, Tensor], shapes: WindowShapes) -> int:
    """Number of ticks that inputs span; where there is nothing but vision, by its frames.

    Raises:
        ConfigError: no stream at all, streams that span different numbers of ticks, or windows that
            were not joined into a batch.
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
                "few; give the DataLoader collate_fn=real_data_collate_fn, which joins windows"
            )
    spans = {s: (inputs[s].shape[1], n) for s, n in per_tick.items() if s in inputs}
    if not spans:
        spans = {
            s: (inputs[s].shape[1] * shapes.num_ticks // shapes.num_frames, 1)
            for s in VISION_STREAMS
            if s in inputs
        }
    places, per = next(iter(spans.values()), (0, 1))
    count = places // per
    # Whole numbers only: torch.compile makes a constant of a quotient, and compiles each anew.
    if not spans or any(places != count * per for places, per in spans.values()):
        found = ", ".join(f"{s} {places / per:g}" for s, (places, per) in spans.items())
        raise ConfigError(
            f"the inputs' streams must span one whole number of ticks; found "
            f"{found or 'no stream'}; {_MEND}"
        )
    return count


def without(inputs: Mapping[str, Tensor], streams: Iterable[Stream]) -> dict[str, Tensor]:
    """A batch's inputs with streams masked, as in sessions that lack them.

    The tensors given stay as they are, and what lies under the masks says nothing to a model.
    """
    masks = [name for stream in streams if (name := f"{stream}_valid") in inputs]
    return {**inputs, **{name: torch.zeros_like(inputs[name]) for name in masks}}


def hide_at_random(inputs: Mapping[str, Tensor], *, share: float) -> dict[str, Tensor]:
    """A batch's inputs with each modality masked in some samples, at random and each by itself.

    Args:
        inputs: stay as they are.
        share: probability, in [0, 1).
    """
    hidden = dict(inputs)
    for streams in MODALITIES.values():
        masks = {name: inputs[name] for s in streams if (name := f"{s}_valid") in inputs}
        if masks:
            some = next(iter(masks.values()))
            is_kept = torch.rand(len(some), device=some.device) >= share
            hidden |= {name: mask & is_kept[:, None] for name, mask in masks.items()}
    return hidden
