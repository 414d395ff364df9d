"""Pre-norm transformer blocks: attention with rotary positions, and a gated perceptron.

Sources: pre-norm, Xiong et al. 2020 (arXiv:2002.04745); rotary positions, Su et al. 2021
(arXiv:2104.09864); SwiGLU, Shazeer 2020 (arXiv:2002.05202). Linears without biases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROTARY_BASE = 10_000.0
"""Longest wavelength of the rotary positions over 2 pi, in ticks."""

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [batch, heads, ticks, head_dim]."""


def rotations(num_positions: int, *, first: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines for positions [first, first + num_positions).

    Returns:
        float32 [2, num_positions, head_dim / 2].
    """
    # In float32 an angle of a stream's tick 36000, an hour, would be wrong by up to 0.002.
    places = torch.arange(first, first + num_positions, device=device, dtype=torch.float64)
    powers = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    angles = torch.outer(places, ROTARY_BASE**-powers)
    return torch.stack([angles.cos(), angles.sin()]).float()


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over [batch, places, width]; causal with rotary positions, or neither."""

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
        """Attend to all places, or to those not after one's own.

        Args:
            x: [batch, places, width].
            rotation: of :func:`rotations`, for these places.
            past: keys and values of the places before these.
            context: attend to at most so many places, one's own among them; None means to all.

        Returns:
            [batch, places, width], and the keys and values that the next place can see: these and
            the past's before them, at most `context - 1`.
        """
        batch, places, width = x.shape
        heads = self.qkv(x).view(batch, places, 3, self.num_heads, width // self.num_heads)
        turned, (value,) = heads.permute(2, 0, 3, 1, 4).split([2, 1])
        query, key = turned if rotation is None else _rotate(turned, rotation)
        if past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
        total = key.shape[2]
        if past is None and (context is None or places <= context):
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        elif places == 1 and (context is None or total <= context):
            mixed = F.scaled_dot_product_attention(query, key, value)  # all of the past is visible
        else:
            # is_causal aligns the mask to the first key; here it belongs to the last one.
            visible = torch.ones(places, total, dtype=torch.bool, device=x.device)
            visible = visible.tril(total - places)
            if context is not None:
                visible = visible.triu(total - places - context + 1)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        if context is not None and total >= context:
            key, value = key[:, :, total - context + 1 :], value[:, :, total - context + 1 :]
        return self.out(mixed.transpose(1, 2).reshape(batch, places, width)), (key, value)


class GatedMLP(nn.Module):
    """SwiGLU perceptron; 8/3 x width inside, so that it costs what a plain one of 4 x costs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 64 * -(-width // 24)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    With `is_checkpointing` it keeps only its input for the backward pass and computes the rest
    again (Chen et al. 2016, arXiv:1604.06174).
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
        """As :meth:`Attention.forward`."""
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
        self,
        x: Tensor,
        rotation: Tensor | None,
        past: KeysValues | None,
        *,
        context: int | None,
    ) -> tuple[Tensor, KeysValues]:
        mixed, keys_values = self.attention(self.attention_norm(x), rotation, past, context=context)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), keys_values
