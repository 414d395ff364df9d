"""Trivial predictors, scored by the model's own losses: what a trained head must beat.

A baseline is a function from a batch's targets to outputs of a head. Its loss is
:func:`train.model.losses.loss_sums` of these outputs, so ticks, masks and weights are the model's.

- sensors: copy_last and constant_velocity, which need no data;
- text: a unigram and a Kneser-Ney trigram of the training batches' tokens;
- audio: a unigram of each channel's dMel levels, and a bigram. The bigram gets the true frame
  before each frame, which the head does not, because it predicts a whole tick at once.

Unigrams add one to each count. Every distribution is proper and positive everywhere.

Letters: B batch, T ticks, V vocabulary, C channels, L levels, S samples of a stream, D values of
one, U contexts, K counts, N repeated entries.
"""

# ruff: noqa: N803, N806  (shape letters)
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.errors import ConfigError
from shared.recipe import PAD_TOKEN
from shared.streams import Kind, ValueType
from train.model.losses import LossSum, Objective, loss_sums
from train.model.values import RULES, SensorValues, last_positions, move_values
from train.shapes import sample_positions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shared.streams import ValueGroup
    from train.shapes import StreamShape

NGRAM_ORDER: Final = 3
"""Order of the token model: two tokens predict the third."""

DEFAULT_DISCOUNT: Final = 0.5
"""Discount of an order that has no count of 1 or none of 2, which its estimate needs."""

MIN_PAD_WEIGHT: Final = 1e-9
"""Smallest factor of silence's probability, so that its logarithm is finite."""

_REFIT: Final = "fix: fit it again by Baselines.fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The loss of a head compared with that of one of its baselines."""

    head: str
    loss: float
    baseline: str
    """Name without the head, such as unigram."""
    baseline_loss: float
    is_better: bool


def compare(
    model_losses: Mapping[str, float | None], baseline_losses: Mapping[str, float | None]
) -> list[Comparison]:
    """Compare each baseline ``<head>/<baseline>`` with its head's ``loss_<head>``.

    Pairs of which one is missing or not finite are skipped.
    """
    rows = []
    for name, other in baseline_losses.items():
        head, _, baseline = name.partition("/")
        loss = model_losses.get(f"loss_{head}")
        if loss is None or other is None or not math.isfinite(loss + other):
            continue
        row = Comparison(
            head=head, loss=loss, baseline=baseline, baseline_loss=other, is_better=loss < other
        )
        rows.append(row)
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """Fitted baselines of all heads of an objective."""

    objective: Objective
    counts: Mapping[str, Tensor]
    """How often each value was a target, per text and audio head, float64: text [V], audio [C, L].

    Silent ticks count as PAD. A head without counts has no baseline.
    """
    trigrams: Mapping[str, Trigrams]
    """Per text head."""
    level_pairs: Mapping[str, Tensor]
    """How often a level followed another, float64 [C, L, L] per audio head."""

    @classmethod
    def fit(cls, batches: Iterable[Mapping[str, Any]], *, objective: Objective) -> Self:
        """Count the targets of training batches.

        `batches`: as docs/batch.md; finite, with each sample once.
        """
        counts = _no_counts(objective)
        trigrams = {head: Trigrams.none(len(c)) for head, c in counts.items() if c.ndim == 1}
        pairs = {head: _no_pairs(c) for head, c in counts.items() if c.ndim == 2}
        for batch in batches:
            weight_B = torch.as_tensor(batch["weight"]).cpu()
            for head in counts:
                target = torch.as_tensor(batch["targets"][head]).cpu()
                valid = torch.as_tensor(batch["targets"][f"{head}_valid"]).cpu()
                # No head predicts a window's first tick, so it is not counted either.
                first = objective.shapes.target_shape(head).per_tick
                shape = counts[head].shape
                counts[head] += _count(target[:, first:], valid[:, first:], weight_B, shape)
                if head in trigrams:
                    trigrams[head] = trigrams[head].with_more(target, valid, weight_B)
                else:
                    pairs[head] += count_level_pairs(
                        target, valid, weight_B, first=first, num_levels=shape[-1]
                    )
        return cls(objective=objective, counts=counts, trigrams=trigrams, level_pairs=pairs)

    def as_dict(self) -> dict[str, Any]:
        """Pack the counts as tensors in plain containers; :meth:`from_dict` is the inverse."""
        return {
            "counts": dict(self.counts),
            "trigrams": {head: [t.keys, t.counts] for head, t in self.trigrams.items()},
            "level_pairs": dict(self.level_pairs),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, objective: Objective) -> Self:
        """Unpack what :meth:`as_dict` packed; parts that are left out are not fitted."""
        empty = _no_counts(objective)
        return cls(
            objective=objective,
            counts={
                head: _check_counts(stored, empty[head].shape, name=f"the baseline of {head}")
                for head, stored in values.get("counts", {}).items()
                if head in empty
            },
            trigrams={
                head: Trigrams.from_counts(*stored, vocab_size=len(empty[head]))
                for head, stored in values.get("trigrams", {}).items()
                if head in empty and empty[head].ndim == 1
            },
            level_pairs={
                head: _check_counts(stored, _no_pairs(empty[head]).shape, name=f"{head}'s bigram")
                for head, stored in values.get("level_pairs", {}).items()
                if head in empty and empty[head].ndim == 2
            },
        )

    def losses(self, batch: Mapping[str, Any]) -> dict[str, LossSum]:
        """Compute each baseline's loss on a batch: ``<head>/<baseline>`` to weighted sum and count.

        Those of several batches can be added, as those of :func:`train.model.losses.loss_sums`.
        """
        targets = {name: torch.as_tensor(value) for name, value in batch["targets"].items()}
        weight_B = torch.as_tensor(batch["weight"])
        sums = {}
        for head in self.objective.weights:
            one_head = dataclasses.replace(self.objective, weights={head: 1.0})
            for name, output in self._outputs(head, targets).items():
                scored = loss_sums({head: output}, targets, weight_B, objective=one_head)
                sums[f"{head}/{name}"] = scored[f"loss_{head}"]
        return sums

    def mean_losses(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Compute each baseline's mean loss over batches; nan if no target is valid."""
        totals: dict[str, Tensor] = {}
        for batch in batches:
            for name, pair in self.losses(batch).items():
                total = torch.stack([each.double().cpu() for each in pair])
                totals[name] = totals[name] + total if name in totals else total
        return {name: float(total[0] / total[1]) for name, total in totals.items()}

    def _outputs(self, head: str, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of the head's baselines, in the form of the model's outputs."""
        target, valid = targets[head], targets[f"{head}_valid"]
        shape = self.objective.shapes.target_shape(head)
        if shape.kind is Kind.SENSOR:
            rate_hz = self.objective.shapes.tick_rate_hz
            return sensor_outputs(target, valid, shape, tick_rate_hz=rate_hz)
        if head not in self.counts:
            return {}
        if shape.kind is Kind.AUDIO:
            sizes = (len(target), target.shape[1] // shape.per_tick, shape.per_tick)
            log_probs_CL = unigram(self.counts[head]).to(target.device)
            outputs = {"unigram": log_probs_CL.expand(*sizes, -1, -1)}
            if head in self.level_pairs:
                log_probs_BSCL = self._bigram(head, target, valid)
                outputs["bigram"] = log_probs_BSCL.view(*sizes, *log_probs_CL.shape)
            return outputs
        pad_weight = self.objective.pad_weight
        log_probs_V = unigram(self.counts[head], pad_weight=pad_weight).to(target.device)
        outputs = {"unigram": log_probs_V.expand(*target.shape, -1)}
        if head in self.trigrams:
            log_probs_BTV = self.trigrams[head].log_probs(
                target.cpu(), valid.cpu(), pad_weight=pad_weight
            )
            outputs["trigram"] = log_probs_BTV.to(target.device)
        return outputs

    def _bigram(self, head: str, levels_BSC: Tensor, valid_BS: Tensor) -> Tensor:
        """Log-probabilities [B, S, C, L] of each frame of the next tick, given the previous frame.

        After a masked frame they are the unigram's.
        """
        per_tick = self.objective.shapes.target_shape(head).per_tick
        unigram_CL = unigram(self.counts[head])
        transitions_CLL = level_transitions(self.level_pairs[head], unigram_CL).log().float()
        # A tick's outputs are for the next tick: frame a - 1 + per_tick predicts a + per_tick. The
        # frames that wrap around give outputs of the last tick, which have no target.
        known_BS, before_BSC = (x.roll(1 - per_tick, dims=1).cpu() for x in (valid_BS, levels_BSC))
        before_BSC = before_BSC.long().masked_fill(~known_BS[..., None], 0)
        log_probs_BSCL = transitions_CLL[torch.arange(len(unigram_CL)), before_BSC]
        chosen = torch.where(known_BS[..., None, None], log_probs_BSCL, unigram_CL)
        return chosen.to(levels_BSC.device)


def unigram(counts: Tensor, *, pad_weight: float | None = None) -> Tensor:
    """Log-probabilities of values independent of context, float32, in the shape of `counts`.

    Args:
        counts: [..., values]; one is added to each.
        pad_weight: for a text stream, the weight of silence in the loss. The count of silence is
            scaled by it, which gives the unigram of lowest loss; the plain one would spend its
            probability on silence, which hardly counts.
    """
    counts = counts.clone()
    if pad_weight is not None:
        counts[..., PAD_TOKEN] *= pad_weight
    smoothed = counts + 1
    return (smoothed / smoothed.sum(-1, keepdim=True)).log().float()


def sensor_outputs(
    values_BSD: Tensor, valid_BS: Tensor, shape: StreamShape, *, tick_rate_hz: float
) -> dict[str, Tensor]:
    """Predict the next tick's samples of a sensor from its last valid sample.

    Before the first sample the values are 0, the identity or +z.

    Returns:
        Each [B, T, samples per tick, D], float32: "copy_last" repeats the last sample, velocities
        too; "constant_velocity" extrapolates it, keeps velocities, and does not wrap angles.
    """
    per_tick, device = shape.per_tick, valid_BS.device
    last_BT = last_positions(valid_BS, per_tick=per_tick)
    known_BT, index_BT = last_BT >= 0, last_BT.clamp(min=0)
    initial_D = SensorValues(shape.values).initial().to(device)
    last_BTD = values_BSD.float().gather(1, index_BT[..., None].expand(-1, -1, len(initial_D)))
    last_BTD = torch.where(known_BT[..., None], last_BTD, initial_D)
    # Times of all positions; those without a sample, and those after the window, have any time.
    num_ticks = valid_BS.shape[1] // per_tick
    positions = sample_positions(shape, num_ticks=num_ticks, tick_rate_hz=tick_rate_hz)
    times_s_S = torch.zeros(valid_BS.shape[1] + per_tick)
    times_s_S[torch.from_numpy(positions)] = torch.arange(len(positions)) / shape.rate_hz
    times_s_S = times_s_S.to(device)
    last_s_BT, next_s_TS = times_s_S[index_BT], times_s_S[per_tick:].view(num_ticks, per_tick)

    still_BTSD = last_BTD[:, :, None].expand(-1, -1, per_tick, -1)
    rates_BTD = _rates(last_BTD, last_s_BT, known_BT, groups=shape.values)
    moves_BTSD = rates_BTD[:, :, None] * (next_s_TS - last_s_BT[..., None])[..., None]
    is_rate = [RULES[group.type].is_rate for group in shape.values for _ in range(group.count)]
    moves_BTSD = torch.where(torch.tensor(is_rate, device=device), still_BTSD, moves_BTSD)
    moved_BTSD = move_values(still_BTSD, moves_BTSD, shape.values)
    return {"copy_last": still_BTSD, "constant_velocity": moved_BTSD}


def _rates(
    last_BTD: Tensor, last_s_BT: Tensor, known_BT: Tensor, *, groups: Sequence[ValueGroup]
) -> Tensor:
    """Return the change of each value per second, [B, T, D].

    It is the recorded velocity if the next group has it. Otherwise it follows from the last sample
    of the tick before; 0 if that is the same sample, or there is none.
    """
    before_BTD, before_s_BT, was_known_BT = (
        torch.cat([x[:, :1], x[:, :-1]], dim=1) for x in (last_BTD, last_s_BT, known_BT)
    )
    elapsed_s_BT1 = (last_s_BT - before_s_BT)[..., None]
    is_moving_BT1 = was_known_BT[..., None] & (elapsed_s_BT1 > 0)
    sizes = [group.count for group in groups]
    last, before = (torch.split(x, sizes, dim=-1) for x in (last_BTD, before_BTD))
    rates = []
    for index, group in enumerate(groups):
        if _is_rate_of(groups[index + 1 : index + 2], group):
            rates.append(last[index + 1])
        else:
            change = _change(before[index], last[index], group) / elapsed_s_BT1
            rates.append(torch.where(is_moving_BT1, change, 0.0))
    return torch.cat(rates, dim=-1)


def _is_rate_of(following: Sequence[ValueGroup], group: ValueGroup) -> bool:
    """Return whether the group that follows, if any, has the velocity of each value of `group`."""
    return any(
        RULES[each.type].is_rate
        and each.count == group.count
        and each.unit_label == f"{group.unit_label}/s"
        for each in following
    )


def _change(before: Tensor, after: Tensor, group: ValueGroup) -> Tensor:
    """Return the shortest change from one value of a group to another."""
    if group.type is ValueType.ANGLE:
        return torch.remainder(after - before + math.pi, 2 * math.pi) - math.pi
    if group.type is ValueType.QUATERNION:
        old, new = (torch.unflatten(x, -1, (-1, group.vector_size)) for x in (before, after))
        is_opposite = (old * new).sum(-1, keepdim=True) < 0
        before = torch.where(is_opposite, -old, old).flatten(-2)
    return after - before


@dataclass(frozen=True, kw_only=True)
class Trigrams:
    """Counts of the tokens of three successive ticks, and the distribution they predict.

    Ticks before a window and masked ticks count as silence. The model is interpolated Kneser-Ney
    (Kneser & Ney 1995; Chen & Goodman 1999, section 2.7, with the discount ``n1 / (n1 + 2 n2)`` per
    order): each order gives a share of its mass to the next lower one, whose counts are numbers of
    different predecessors, down to the uniform distribution.

    Counts are sparse, 16 bytes per different trigram, so at most one entry per counted tick.
    Predicting takes the memory of the head's own logits, [B, T, V].
    """

    vocab_size: int
    keys: Tensor
    """int64 [K], increasing: (first * V + second) * V + third token."""
    counts: Tensor
    """int64 [K]."""

    @classmethod
    def none(cls, vocab_size: int) -> Self:
        """Make empty counts."""
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(vocab_size=vocab_size, keys=empty, counts=empty)

    @classmethod
    def from_counts(cls, keys: object, counts: object, *, vocab_size: int) -> Self:
        """Check keys and counts from a file.

        Raises:
            ConfigError: they are not plain tensors that fit each other and the vocabulary. An
                expanded tensor, which is larger than its memory, could exhaust the host's memory.
        """
        tensors = [each for each in (keys, counts) if isinstance(each, Tensor)]
        if len(tensors) < 2 or not all(
            (t.dtype, t.layout, t.device.type, t.dim()) == (torch.int64, torch.strided, "cpu", 1)
            and t.is_contiguous()
            for t in tensors
        ):
            raise ConfigError(f"a trigram's keys and counts are not plain int64 tensors; {_REFIT}")
        keys, counts = tensors
        is_increasing = bool((keys[1:] > keys[:-1]).all())
        is_in_range = bool(((keys >= 0) & (keys < vocab_size**NGRAM_ORDER)).all())
        fits = len(keys) == len(counts) and bool((counts > 0).all())
        if not (is_increasing and is_in_range and fits):
            raise ConfigError(
                f"a trigram's keys do not increase within {vocab_size} tokens, or do not fit its "
                f"counts; {_REFIT}"
            )
        return cls(vocab_size=vocab_size, keys=keys, counts=counts)

    def with_more(self, tokens_BT: Tensor, valid_BT: Tensor, weight_B: Tensor) -> Self:
        """Add the tokens that a head must predict: valid, not the first, not in padding rows."""
        contexts_BT = self._contexts(tokens_BT, valid_BT)[:, :-1]
        is_target_BT = (valid_BT & (weight_B > 0)[:, None])[:, 1:]
        new_N = (contexts_BT * self.vocab_size + tokens_BT[:, 1:])[is_target_BT]
        keys_K, index = torch.unique(torch.cat([self.keys, new_N]), return_inverse=True)
        ones_N = torch.ones_like(new_N)
        counts_K = torch.zeros_like(keys_K).index_add(0, index, torch.cat([self.counts, ones_N]))
        return type(self)(vocab_size=self.vocab_size, keys=keys_K, counts=counts_K)

    def log_probs(self, tokens_BT: Tensor, valid_BT: Tensor, *, pad_weight: float) -> Tensor:
        """Log-probabilities of the next tick's token, float32 [B, T, V].

        Silence's probability is scaled by its weight in the loss, and all are normalized again: if
        the probabilities are true, that has the lowest loss.
        """
        contexts_BT = self._contexts(tokens_BT, valid_BT)
        contexts_U, index_BT = torch.unique(contexts_BT, return_inverse=True)
        probs_UV = self._probs(contexts_U, NGRAM_ORDER)
        probs_UV[:, PAD_TOKEN] *= max(pad_weight, MIN_PAD_WEIGHT)
        return (probs_UV / probs_UV.sum(1, keepdim=True)).log()[index_BT]

    def _contexts(self, tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Each tick's token and the previous one as one number, int64 [B, T]."""
        last_BT = tokens_BT.masked_fill(~valid_BT, PAD_TOKEN)
        return F.pad(last_BT, (1, 0), value=PAD_TOKEN)[:, :-1] * self.vocab_size + last_BT

    @cached_property
    def _orders(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and counts of each order; lower ones count the different preceding tokens."""
        orders = {NGRAM_ORDER: (self.keys, self.counts)}
        for order in range(NGRAM_ORDER - 1, 0, -1):
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
        # The keys of a context are one run: [start, start + length).
        starts_U = torch.searchsorted(keys_K, contexts_U * size)
        lengths_U = torch.searchsorted(keys_K, (contexts_U + 1) * size) - starts_U
        # All runs concatenated: the context and the index in `keys_K` of each entry.
        rows_N = torch.repeat_interleave(lengths_U)
        index_N = torch.arange(len(rows_N)) - (lengths_U.cumsum(0) - lengths_U - starts_U)[rows_N]
        counts_N = counts_K[index_N].float()
        totals_U = torch.zeros(len(contexts_U)).index_add(0, rows_N, counts_N)
        # The discounted mass goes to the lower order; a context without counts passes all of it.
        kept_U = torch.where(totals_U > 0, discount * lengths_U / totals_U, 1.0)
        probs_UV = lower_UV * kept_U[:, None]
        probs_UV[rows_N, keys_K[index_N] % size] += (counts_N - discount) / totals_U[rows_N]
        return probs_UV


def _discount(counts: Tensor) -> float:
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    return ones / (ones + 2 * twos) if ones and twos else DEFAULT_DISCOUNT


def count_level_pairs(
    levels_BAC: Tensor, valid_BA: Tensor, weight_B: Tensor, *, first: int, num_levels: int
) -> Tensor:
    """Count how often a channel's level followed another in the next frame, float64 [C, L, L].

    A pair counts if both frames are valid, and the second one is `first` or later.
    """
    before, after = levels_BAC[:, first - 1 : -1].long(), levels_BAC[:, first:].long()
    valid = valid_BA[:, first:] & valid_BA[:, first - 1 : -1]
    shape = torch.Size([levels_BAC.shape[-1], num_levels**2])
    counts = _count(before * num_levels + after, valid, weight_B, shape)
    return counts.view(-1, num_levels, num_levels)


def level_transitions(pairs_CLL: Tensor, log_probs_CL: Tensor) -> Tensor:
    """Probabilities of the next frame's level, float64 [C, L, L], from :func:`count_level_pairs`.

    One additional observation is spread like the channel's own distribution.
    """
    smoothed = pairs_CLL + log_probs_CL.double().exp()[:, None]
    return smoothed / smoothed.sum(-1, keepdim=True)


def _count(values: Tensor, valid: Tensor, weight_B: Tensor, shape: torch.Size) -> Tensor:
    """Count values [B, positions] or [B, positions, C], with weights; float64 of `shape`."""
    weights = (valid * weight_B[:, None]).double()[..., None]
    values = values.reshape(*valid.shape, -1).long().masked_fill(~valid[..., None], 0)
    index = values + torch.arange(values.shape[-1]) * shape[-1]
    flat_weights = weights.expand_as(index).flatten()
    return torch.bincount(index.flatten(), flat_weights, minlength=shape.numel()).view(shape)


def _no_counts(objective: Objective) -> dict[str, Tensor]:
    """Make zero counts of each text and audio head: [V], or [C, L]."""
    shapes = {head: objective.shapes.target_shape(head) for head in objective.weights}
    return {
        head: torch.zeros(*shape.size, shape.num_classes, dtype=torch.float64)
        for head, shape in shapes.items()
        if shape.kind is not Kind.SENSOR
    }


def _no_pairs(counts_CL: Tensor) -> Tensor:
    """Make zero counts of successive levels."""
    return counts_CL.new_zeros(*counts_CL.shape, counts_CL.shape[-1])


def _check_counts(stored: object, size: torch.Size, *, name: str) -> Tensor:
    """Check counts from a file."""
    if not isinstance(stored, Tensor):
        raise ConfigError(f"{name} has no counts; {_REFIT}")
    if stored.shape != size:
        raise ConfigError(
            f"{name} has counts of shape {list(stored.shape)}, the model needs {list(size)}; "
            f"{_REFIT}"
        )
    is_plain = stored.layout == torch.strided and stored.device.type == "cpu"
    if not is_plain or not bool((torch.isfinite(stored) & (stored >= 0)).all()):
        raise ConfigError(f"{name} has counts that are negative or not numbers; {_REFIT}")
    return stored.to(torch.float64)
