"""Compare the prediction at tick t with the target of tick t + 1.

Every loss is a weighted sum over a weighted count (:func:`loss_sums`). So means over several
batches, of an evaluation or of accumulated gradients, are exact. Masked positions and padding rows
have weight 0. All math is float32. Targets are shifted instead of predictions, because they have
only a small fraction of the logits' bytes.

Letters: B batch, T ticks, V vocabulary, S samples of a stream, C channels, L levels, D values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.recipe import PAD_TOKEN
from shared.streams import Kind
from train.model.values import value_errors
from train.shapes import head_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from train.config import TrainConfig
    from train.shapes import StreamShape, WindowShapes

LossSum = tuple[Tensor, Tensor]
"""Weighted sum of a loss and the weighted count of its terms, float32 and 0-dim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is learned: the heads, their targets and weights, and the scales of their errors."""

    shapes: WindowShapes
    weights: Mapping[str, float]
    """Weight of each head's loss in loss_total."""
    pad_weight: float
    """Weight of a silent tick in the text losses."""
    std: Mapping[str, Tensor] = field(default_factory=dict)
    """Per sensor head, the standard deviation [D] that errors are divided by; 1 if left out."""

    @classmethod
    def from_config(
        cls, config: TrainConfig, shapes: WindowShapes, *, std: Mapping[str, Tensor] | None = None
    ) -> Self:
        """Return the objective of a configuration.

        `std`: of :attr:`train.model.multimodal.MultiModalCreature.target_std`.
        """
        weights = {head: head_weight(config, head) for head in shapes.heads}
        return cls(
            shapes=shapes,
            weights={head: weight for head, weight in weights.items() if weight > 0},
            pad_weight=config.model.pad_weight,
            std=std or {},
        )


def compute_losses(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    weight: Tensor,
    *,
    objective: Objective,
    counts: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the losses of one batch.

    `targets`: the batch's "targets", unshifted, with "<head>_valid".
    `weight`: float [B], weight of each sample; 0 for padding rows.
    `counts`: sums of :func:`loss_counts` over several micro-batches, used as divisors instead of
        this batch's own counts. Then the micro-batches' losses (and gradients) add up to the
        mean over all of them.

    Returns:
        ``loss_total``, and ``loss_<head>`` of each head, float32 and 0-dim: text and audio in nats
        per token and per dMel value; sensors: the sum over value groups of the mean error of the
        group's elements (:data:`train.model.values.RULES`). 0 if nothing is valid.
    """
    sums = loss_sums(outputs, targets, weight, objective=objective)
    if counts is not None:
        sums = {name: (total, counts[name]) for name, (total, _) in sums.items()}
    return mean_losses(sums, objective=objective)


def mean_losses(sums: Mapping[str, LossSum], *, objective: Objective) -> dict[str, Tensor]:
    """Compute losses from the sums of any number of batches; see :func:`compute_losses`."""
    losses = {
        name: total / torch.where(count > 0, count, torch.ones_like(count))
        for name, (total, count) in sums.items()
    }
    shares = [weight * losses[f"loss_{head}"] for head, weight in objective.weights.items()]
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
    objective: Objective,
) -> dict[str, LossSum]:
    """Compute ``loss_<head>`` of each head as its weighted sum and weighted count.

    Arguments and units are as in :func:`compute_losses`. Sums and counts of several batches can be
    added.
    """
    sums = {}
    for head in objective.weights:
        target, valid_BS = targets[head], targets[f"{head}_valid"]
        shape = objective.shapes.target_shape(head)
        next_BS = _next_tick(_masked(target, valid_BS), shape.per_tick)
        std = objective.std.get(head)
        errors_BS = ERRORS[shape.kind](outputs[head].float(), next_BS, shape, std)
        weights_BS = _next_weights(head, targets, weight, objective)
        sums[f"loss_{head}"] = ((errors_BS * weights_BS).sum(), weights_BS.sum())
    return sums


def loss_counts(
    targets: Mapping[str, Tensor], weight: Tensor, *, objective: Objective
) -> dict[str, Tensor]:
    """Compute the counts of :func:`loss_sums`, which need no forward pass."""
    return {
        f"loss_{head}": _next_weights(head, targets, weight, objective).sum()
        for head in objective.weights
    }


def _masked(target: Tensor, valid_BS: Tensor) -> Tensor:
    """Return a target with zeros at invalid positions; 0 is PAD for text."""
    return target.masked_fill(~valid_BS.view(*valid_BS.shape, *[1] * (target.ndim - 2)), 0)


def _next_tick(x: Tensor, per_tick: int) -> Tensor:
    """Shift [B, positions, ...] back by one tick of positions, with zeros at the end."""
    return torch.cat([x[:, per_tick:], torch.zeros_like(x[:, :per_tick])], dim=1)


def _next_weights(
    head: str, targets: Mapping[str, Tensor], weight_B: Tensor, objective: Objective
) -> Tensor:
    """Return the weight of each position of the next tick, float32 [B, S].

    Invalid positions have 0; the token of silence has `pad_weight`.
    """
    shape = objective.shapes.target_shape(head)
    weights_BS = _next_tick(targets[f"{head}_valid"], shape.per_tick) * weight_B.float()[:, None]
    if shape.kind is not Kind.TEXT:
        return weights_BS
    is_silent_BS = _next_tick(targets[head], 1) == PAD_TOKEN
    return torch.where(is_silent_BS, objective.pad_weight, 1.0) * weights_BS


def _text_errors(
    logits_BTV: Tensor, tokens_BT: Tensor, shape: StreamShape, std: Tensor | None
) -> Tensor:
    """Compute the cross-entropy of each token, in nats."""
    nats = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none")
    return nats.view_as(tokens_BT)


def _audio_errors(
    logits_BTSCL: Tensor, levels_BSC: Tensor, shape: StreamShape, std: Tensor | None
) -> Tensor:
    """Compute the mean cross-entropy of each frame's dMel values, in nats."""
    nats = F.cross_entropy(logits_BTSCL.flatten(0, 3), levels_BSC.flatten(), reduction="none")
    return nats.view(levels_BSC.shape).mean(-1)


def _sensor_errors(
    output_BTSD: Tensor, target_BSD: Tensor, shape: StreamShape, std: Tensor | None
) -> Tensor:
    """Compute the error of each sample by its value groups."""
    output_BSD = output_BTSD.flatten(1, 2)
    std_D = output_BSD.new_ones(shape.size) if std is None else std.to(output_BSD.device)
    return value_errors(output_BSD, target_BSD.float(), shape.values, std=std_D)


ERRORS: Final[Mapping[Kind, Callable[[Tensor, Tensor, StreamShape, Tensor | None], Tensor]]] = {
    Kind.TEXT: _text_errors,
    Kind.AUDIO: _audio_errors,
    Kind.SENSOR: _sensor_errors,
}
"""The error of each position, [B, S], by the kind of the target."""
