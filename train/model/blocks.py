"""Pre-norm transformer blocks: attention with rotary positions, and a gated perceptron.

Linear maps have no biases. Sources: pre-norm, Xiong et al. 2020 (arXiv:2002.04745); rotary
positions, Su et al. 2021 (arXiv:2104.09864); SwiGLU, Shazeer 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROTARY_BASE = 10_000.0
"""Longest wavelength of the rotary positions, divided by 2 pi, in ticks."""

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [batch, heads, ticks, head_dim]."""


def rotations(num_positions: int, *, first: int, head_dim: int, device: torch.device) -> Tensor:
    """Compute cosines and sines from `first` on, float32 [2, num_positions, head_dim / 2]."""
    # In float32 the angle of tick 36000, after an hour, would be wrong by up to 0.002.
    positions = torch.arange(first, first + num_positions, device=device, dtype=torch.float64)
    powers = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    angles = torch.outer(positions, ROTARY_BASE**-powers)
    return torch.stack([angles.cos(), angles.sin()]).float()


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over [batch, positions, width]; causal with rotary positions, or neither."""

    def __init__(self, width: int, *, num_heads: int, is_causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        past: KeysValues | None = None,
        *,
        context: int | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Attend to all positions, or if causal to those up to one's own.

        Args:
            x: [batch, positions, width].
            rotation: of :func:`rotations`, for these positions.
            past: keys and values of the positions before these.
            context: the number of positions to attend to, including one's own; None means all.

        Returns:
            [batch, positions, width], and the keys and values for the next position: the newest of
            `past` and of these, at most `context - 1`.
        """
        batch, count, width = x.shape
        heads = self.qkv(x).view(batch, count, 3, self.num_heads, width // self.num_heads)
        query_key, (value,) = heads.permute(2, 0, 3, 1, 4).split([2, 1])
        query, key = query_key if rotation is None else _rotate(query_key, rotation)
        if past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
        total = key.shape[2]
        if past is None and (context is None or count <= context):
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        elif count == 1 and (context is None or total <= context):
            mixed = F.scaled_dot_product_attention(query, key, value)  # all of the past is visible
        else:
            # is_causal aligns the mask with the first key; here it must align with the last one.
            visible = torch.ones(count, total, dtype=torch.bool, device=x.device)
            visible = visible.tril(total - count)
            if context is not None:
                visible = visible.triu(total - count - context + 1)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        if context is not None and total >= context:
            key, value = key[:, :, total - context + 1 :], value[:, :, total - context + 1 :]
        return self.out(mixed.transpose(1, 2).reshape(batch, count, width)), (key, value)


class GatedMLP(nn.Module):
    """SwiGLU perceptron of inner width 8/3 x width, which costs as much as a plain one of 4 x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 64 * -(-width // 24)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    With `is_checkpointing` it saves only its input for the backward pass, and recomputes its
    activations (Chen et al. 2016, arXiv:1604.06174).
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        is_causal: bool,
        dropout: float,
        is_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.is_checkpointing = is_checkpointing
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, num_heads=num_heads, is_causal=is_causal)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp = GatedMLP(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        past: KeysValues | None = None,
        *,
        context: int | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Apply the layer; arguments and results as in :meth:`Attention.forward`."""
        if self.is_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(  # type: ignore[no-any-return]
                self._layer,
                x,
                rotation,
                past,
                context=context,
                use_reentrant=False,
                preserve_rng_state=self.dropout.p > 0,
            )
        return self._layer(x, rotation, past, context=context)

    def _layer(
        self, x: Tensor, rotation: Tensor | None, past: KeysValues | None, *, context: int | None
    ) -> tuple[Tensor, KeysValues]:
        mixed, keys_values = self.attention(self.attention_norm(x), rotation, past, context=context)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), keys_values
