"""Count-based sequence models for the baselines: a trigram of tokens, a bigram of audio levels.

Both say nothing about what they have not counted being impossible: every distribution is proper
and positive everywhere.

The trigram is interpolated Kneser-Ney (Kneser & Ney 1995; Chen & Goodman 1999, section 2.7, with
the discount ``n1 / (n1 + 2 n2)`` per order): each order gives a part of its mass to the next lower
one, whose counts are numbers of different predecessors, down to the uniform distribution.
Counts are kept sparsely, 16 bytes for each different trigram, so never more than for each tick
counted; predicting takes what the head's own logits take, [B, T, V].

Letters: B batch, T ticks, V vocabulary, A dMel frames, C channels, L levels, U contexts, K counts.
"""

# ruff: noqa: N803, N806  (shape letters)
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.errors import ConfigError
from shared.recipe import PAD_TOKEN

if TYPE_CHECKING:
    from typing import Self

ORDER: Final = 3
"""Of the token model: two tokens predict the third."""

DEFAULT_DISCOUNT: Final = 0.5
"""Where an order has no count of 1 or none of 2, which its estimate needs."""

MIN_TILT: Final = 1e-9
"""Least share of silence, so that its logarithm is finite where it has no weight in the loss."""


@dataclass(frozen=True, kw_only=True)
class Trigrams:
    """How often each three successive ticks' tokens were seen.

    What lies before a window, and masked ticks, count as silence.
    """

    vocab_size: int
    keys: Tensor
    """int64 [K], rising: (first * V + second) * V + third token."""
    counts: Tensor
    """int64 [K]."""

    @classmethod
    def none(cls, vocab_size: int) -> Self:
        """Nothing counted yet."""
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(vocab_size=vocab_size, keys=empty, counts=empty)

    @classmethod
    def from_counts(cls, keys: object, counts: object, *, vocab_size: int) -> Self:
        """From what a file has as keys and counts.

        Raises:
            ConfigError: they are no plain tensors that fit each other and the vocabulary; expanded
                ones, which are larger than their memory, would fill it.
        """
        is_plain = all(
            isinstance(t, Tensor)
            and (t.dtype, t.layout, t.device.type) == (torch.int64, torch.strided, "cpu")
            and t.dim() == 1
            and t.is_contiguous()
            for t in (keys, counts)
        )
        if not is_plain or not isinstance(keys, Tensor) or not isinstance(counts, Tensor):
            raise ConfigError(
                "a trigram's keys and counts are no plain int64 tensors; fit it again"
            )
        is_right = len(keys) == len(counts) and bool((counts > 0).all())
        if is_right and len(keys):
            is_rising = bool((keys[1:] > keys[:-1]).all())
            is_right = is_rising and int(keys[0]) >= 0 and int(keys[-1]) < vocab_size**ORDER
        if not is_right:
            raise ConfigError(
                f"a trigram's keys do not rise within {vocab_size} tokens, or its counts are not "
                "theirs; fit it again by Baselines.fit"
            )
        return cls(vocab_size=vocab_size, keys=keys, counts=counts)

    def with_more(self, tokens_BT: Tensor, valid_BT: Tensor, weight_B: Tensor) -> Self:
        """Count the tokens that a head is asked for: valid, not the first, in no padding row."""
        contexts_BT = self._contexts(tokens_BT, valid_BT)[:, :-1]
        is_asked_BT = (valid_BT & (weight_B > 0)[:, None])[:, 1:]
        new_N = (contexts_BT * self.vocab_size + tokens_BT[:, 1:])[is_asked_BT]
        keys_K, index = torch.unique(torch.cat([self.keys, new_N]), return_inverse=True)
        ones_N = torch.ones_like(new_N)
        counts_K = torch.zeros_like(keys_K).index_add(0, index, torch.cat([self.counts, ones_N]))
        return type(self)(vocab_size=self.vocab_size, keys=keys_K, counts=counts_K)

    def log_probs(self, tokens_BT: Tensor, valid_BT: Tensor, *, pad_weight: float) -> Tensor:
        """Log-probabilities of the next tick's token, float32 [B, T, V].

        Args:
            tokens_BT: int64, unshifted.
            valid_BT: bool.
            pad_weight: weight of silence in the loss. Its probability gets the same share and all
                are normalised again: of a model that knows the truth, that has the lowest loss.
        """
        contexts_BT = self._contexts(tokens_BT, valid_BT)
        contexts_U, index_BT = torch.unique(contexts_BT, return_inverse=True)
        probs_UV = self._probs(contexts_U, ORDER)
        probs_UV[:, PAD_TOKEN] *= max(pad_weight, MIN_TILT)
        return (probs_UV / probs_UV.sum(1, keepdim=True)).log()[index_BT]

    def _contexts(self, tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Each tick's token and the one before it as one number, int64 [B, T]."""
        last_BT = tokens_BT.masked_fill(~valid_BT, PAD_TOKEN)
        return F.pad(last_BT, (1, 0), value=PAD_TOKEN)[:, :-1] * self.vocab_size + last_BT

    @cached_property
    def _orders(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and counts of each order; lower ones count the different tokens before them."""
        orders = {ORDER: (self.keys, self.counts)}
        for order in range(ORDER - 1, 0, -1):
            longer, _ = orders[order + 1]
            orders[order] = torch.unique(longer % self.vocab_size**order, return_counts=True)
        return orders

    def _probs(self, contexts_U: Tensor, order: int) -> Tensor:
        """Probabilities [U, V] after contexts of `order` - 1 tokens."""
        size = self.vocab_size
        if order == 0:
            return torch.full((len(contexts_U), size), 1 / size)
        shorter_U = contexts_U % size ** max(0, order - 2)
        shorter, index_U = torch.unique(shorter_U, return_inverse=True)
        lower_UV = self._probs(shorter, order - 1)[index_U]
        keys_K, counts_K = self._orders[order]
        discount = _discount(counts_K)
        starts_U = torch.searchsorted(keys_K, contexts_U * size)
        lengths_U = torch.searchsorted(keys_K, (contexts_U + 1) * size) - starts_U
        rows_N = torch.repeat_interleave(lengths_U)
        places_N = torch.arange(len(rows_N)) - (lengths_U.cumsum(0) - lengths_U - starts_U)[rows_N]
        found_N = counts_K[places_N].float()
        totals_U = torch.zeros(len(contexts_U)).index_add(0, rows_N, found_N)
        kept_U = torch.where(totals_U > 0, discount * lengths_U / totals_U, 1.0)
        probs_UV = lower_UV * kept_U[:, None]
        probs_UV[rows_N, keys_K[places_N] % size] += (found_N - discount) / totals_U[rows_N]
        return probs_UV


def _discount(counts: Tensor) -> float:
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    return ones / (ones + 2 * twos) if ones and twos else DEFAULT_DISCOUNT


def counts_of(found: object, size: torch.Size, *, what: str) -> Tensor:
    """Counts as a file has them, a tensor or, in old files, lists of numbers; float64.

    Args:
        found: anything.
        size: that they must have; looked at before anything is made of them.
        what: they count, for messages.

    Raises:
        ConfigError: they are no counts, or of another size.
    """
    rows: list[Any] = found if isinstance(found, list) and len(size) > 1 else [found]
    is_listed = all(
        isinstance(row, list) and all(isinstance(one, int | float) for one in row) for row in rows
    )
    if is_listed and len({len(row) for row in rows}) == 1:
        found = torch.tensor(found, dtype=torch.float64)
    if not isinstance(found, Tensor):
        raise ConfigError(f"{what} has no counts; fit it again by Baselines.fit")
    if found.shape != size:
        raise ConfigError(
            f"{what} has counts of shape {list(found.shape)}, the model needs {list(size)}; fit it "
            "again by Baselines.fit"
        )
    is_plain = found.layout == torch.strided and found.device.type == "cpu"
    if not is_plain or not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise ConfigError(f"{what} has counts that are negative or no numbers; fit it again")
    return found.to(torch.float64)


def count_level_pairs(
    levels_BAC: Tensor, valid_BA: Tensor, weight_B: Tensor, *, first: int, num_levels: int
) -> Tensor:
    """How often a channel's level followed another in the next frame, float64 [C, L, L].

    Args:
        levels_BAC: any integers where not valid.
        valid_BA: bool; a pair counts where both frames are.
        weight_B: float.
        first: frame from which on a second level counts.
        num_levels: L.
    """
    is_pair_BA = (valid_BA[:, first:] & valid_BA[:, first - 1 : -1])[..., None]
    before, after = levels_BAC[:, first - 1 : -1].long(), levels_BAC[:, first:].long()
    num_channels = levels_BAC.shape[-1]
    places = (torch.arange(num_channels) * num_levels + before) * num_levels + after
    weights = (is_pair_BA * weight_B.double()[:, None, None]).expand_as(places)
    counts = torch.bincount(
        places.masked_fill(~is_pair_BA, 0).flatten(),
        weights=weights.flatten(),
        minlength=num_channels * num_levels**2,
    )
    return counts.view(num_channels, num_levels, num_levels)


def level_transitions(pairs_CLL: Tensor, log_probs_CL: Tensor) -> Tensor:
    """Probabilities of the next frame's level, float64 [C, L, L], from :func:`count_level_pairs`.

    One more observation than were made is spread as the channel's own distribution.
    """
    smoothed = pairs_CLL + log_probs_CL.double().exp()[:, None]
    return smoothed / smoothed.sum(-1, keepdim=True)
