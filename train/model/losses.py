"""Compare the prediction at tick t with the target of tick t + 1.

Every loss is a weighted sum over a weighted count (:func:`loss_sums`). So means over several
batches, of an evaluation or of accumulated gradients, are exact. Masked positions and padding rows
have weight 0. All math is float32. Targets are shifted instead of predictions, because they have
only a small fraction of the logits' bytes.

Letters: B batch, T ticks, V vocabulary, A dMel frames, C channels, L levels, S samples, P pose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.recipe import PAD_TOKEN
from train.config import Head, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from train.data.batch import WindowShapes

LossSum = tuple[Tensor, Tensor]
"""Weighted sum of a loss and the weighted count of its terms, float32 and 0-dim."""


def compute_losses(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    weight: Tensor,
    *,
    config: TrainConfig,
    counts: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the losses of one batch.

    Args:
        outputs: of the model.
        targets: the batch's "targets", unshifted, with "<head>_valid".
        weight: float [B], weight of each sample; 0 for padding rows.
        config: has the heads and their weights.
        counts: sums of :func:`loss_counts` over several micro-batches, used as divisors instead of
            this batch's own counts. Then the micro-batches' losses (and gradients) add up to the
            mean over all of them.

    Returns:
        ``loss_total``, and ``loss_<head>`` of each head whose weight is not 0, float32 and 0-dim:
        text and audio in nats per token and per dMel value; animation: mean 1 - cos of the angles'
        errors plus mean smooth L1 of the velocities'. 0 if nothing is valid.
    """
    sums = loss_sums(outputs, targets, weight, config=config)
    if counts is not None:
        sums = {name: (total, counts[name]) for name, (total, _) in sums.items()}
    return mean_losses(sums, config=config)


def mean_losses(sums: Mapping[str, LossSum], *, config: TrainConfig) -> dict[str, Tensor]:
    """Compute losses from the sums of any number of batches; see :func:`compute_losses`."""
    losses = {
        name: total / torch.where(count > 0, count, torch.ones_like(count))
        for name, (total, count) in sums.items()
    }
    weights = config.training.loss_weights
    shares = [getattr(weights, head) * losses[f"loss_{head}"] for head in config.heads]
    return {"loss_total": torch.stack(shares).sum(), **losses}


def sum_by_name(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Add tensors of the same name, such as losses or counts of micro-batches."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        total = {name: total[name] + value if total else value for name, value in batch.items()}
    return total


def loss_sums(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    weight: Tensor,
    *,
    config: TrainConfig,
) -> dict[str, LossSum]:
    """Compute ``loss_<head>`` of each head as its weighted sum and weighted count.

    Arguments and units are as in :func:`compute_losses`. Sums and counts of several batches can be
    added.
    """
    sums = {}
    for head in config.heads:
        output, target, valid = outputs[head], targets[head], targets[f"{head}_valid"]
        if head is Head.AUDIO:
            sums[f"loss_{head}"] = _audio_sum(output, target, valid, weight)
        elif head is Head.ANIMATION:
            sums[f"loss_{head}"] = _animation_sum(output, target, valid, weight)
        else:
            weights_BT = _text_weights(target, valid, weight, config.model.pad_weight)
            sums[f"loss_{head}"] = _text_sum(output, target, valid, weights_BT)
    return sums


def loss_counts(
    targets: Mapping[str, Tensor], weight: Tensor, *, config: TrainConfig, shapes: WindowShapes
) -> dict[str, Tensor]:
    """Compute the counts of :func:`loss_sums`, which need no forward pass."""
    counts = {}
    for head in config.heads:
        target, valid = targets[head], targets[f"{head}_valid"]
        if head is Head.AUDIO:
            weights_BA = _next_weights(valid, weight, shapes.audio_frames_per_tick)
            counts[f"loss_{head}"] = weights_BA.sum() * target.shape[-1]
        elif head is Head.ANIMATION:
            weights_BS = _next_weights(valid, weight, shapes.sensor_samples_per_tick)
            counts[f"loss_{head}"] = weights_BS.sum() * (target.shape[-1] // 2)
        else:
            weights_BT = _text_weights(target, valid, weight, config.model.pad_weight)
            counts[f"loss_{head}"] = weights_BT.sum()
    return counts


def _next_tick(x: Tensor, per_tick: int) -> Tensor:
    """Shift [B, positions, ...] back by one tick of positions, with zeros at the end."""
    return torch.cat([x[:, per_tick:], torch.zeros_like(x[:, :per_tick])], dim=1)


def _next_weights(valid_BS: Tensor, weight_B: Tensor, per_tick: int) -> Tensor:
    """Return the weight of each position of the next tick, float32 [B, S]."""
    return _next_tick(valid_BS, per_tick) * weight_B.float()[:, None]


def _next_targets(x_BSC: Tensor, valid_BS: Tensor, per_tick: int) -> Tensor:
    """Return the values of the next tick, 0 where invalid."""
    return _next_tick(x_BSC.masked_fill(~valid_BS[..., None], 0), per_tick)


def _text_weights(
    tokens_BT: Tensor, valid_BT: Tensor, weight_B: Tensor, pad_weight: float
) -> Tensor:
    """Weigh the next tick's token by 1, or by `pad_weight` if silent, float32 [B, T]."""
    shares_BT = torch.where(_next_tick(tokens_BT, 1) == PAD_TOKEN, pad_weight, 1.0)
    return shares_BT * _next_weights(valid_BT, weight_B, 1)


def _text_sum(
    logits_BTV: Tensor, tokens_BT: Tensor, valid_BT: Tensor, weights_BT: Tensor
) -> LossSum:
    """Sum the cross-entropy of the next tick's token, weighted by :func:`_text_weights`."""
    next_BT = _next_tick(tokens_BT.masked_fill(~valid_BT, PAD_TOKEN), 1)
    nats = F.cross_entropy(logits_BTV.float().flatten(0, 1), next_BT.flatten(), reduction="none")
    return (nats * weights_BT.flatten()).sum(), weights_BT.sum()


def _audio_sum(
    logits_BTACL: Tensor, levels_BAC: Tensor, valid_BA: Tensor, weight_B: Tensor
) -> LossSum:
    """Sum the cross-entropy of each dMel value of the next tick."""
    _, _, per_tick, channels, _ = logits_BTACL.shape
    weights_BA = _next_weights(valid_BA, weight_B, per_tick)
    next_BAC = _next_targets(levels_BAC, valid_BA, per_tick)
    nats = F.cross_entropy(logits_BTACL.float().flatten(0, 3), next_BAC.flatten(), reduction="none")
    nats_A = nats.view(-1, channels).sum(1)
    return (nats_A * weights_BA.flatten()).sum(), weights_BA.sum() * channels


def _animation_sum(
    poses_BTSP: Tensor, targets_BSP: Tensor, valid_BS: Tensor, weight_B: Tensor
) -> LossSum:
    """Sum the errors of the next tick's angles (1 - cos) and velocities (smooth L1)."""
    per_tick = poses_BTSP.shape[2]
    weights_BS = _next_weights(valid_BS, weight_B, per_tick)
    next_BSP = _next_targets(targets_BSP.float(), valid_BS, per_tick)
    angles, velocities = poses_BTSP.float().flatten(1, 2).chunk(2, dim=-1)
    next_angles, next_velocities = next_BSP.chunk(2, dim=-1)
    errors = 1 - torch.cos(angles - next_angles)
    errors = errors + F.smooth_l1_loss(velocities, next_velocities, reduction="none")
    # There are as many angles as velocities, so the sum of their means is one mean.
    return (errors.sum(-1) * weights_BS).sum(), weights_BS.sum() * angles.shape[-1]
