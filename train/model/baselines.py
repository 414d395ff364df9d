"""Trivial predictors, scored by the model's own losses: what a trained head must beat.

A baseline is a function from a batch's targets to outputs of a head. Its loss is
:func:`train.model.losses.loss_sums` of these outputs, so ticks, masks and weights are the model's.

- animation: copy_last_pose and constant_velocity, which need no data;
- text: a unigram and a Kneser-Ney trigram of the training batches' tokens;
- audio: a unigram of each channel's dMel levels, and a bigram. The bigram gets the true frame
  before each frame, which the head does not, because it predicts a whole tick at once.

Unigrams add one to each count. Every distribution is proper and positive everywhere.

Letters: B batch, T ticks, V vocabulary, A dMel frames, C channels, L levels, S samples, P pose,
U contexts, K counts, N repeated entries.
"""

# ruff: noqa: N803, N806  (shape letters)
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.errors import ConfigError
from shared.recipe import PAD_TOKEN
from train.config import Head, LossWeights, ModelConfig, TrainConfig, TrainingConfig
from train.model.losses import LossSum, loss_sums

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from train.data.batch import WindowShapes

NGRAM_ORDER: Final = 3
"""Order of the token model: two tokens predict the third."""

DEFAULT_DISCOUNT: Final = 0.5
"""Discount of an order that has no count of 1 or none of 2, which its estimate needs."""

MIN_PAD_WEIGHT: Final = 1e-9
"""Smallest factor of silence's probability, so that its logarithm is finite."""

UNIGRAM_STATISTICS: Final = {
    Head.INTERNAL_TEXT: "internal_tokens",
    Head.EXTERNAL_TEXT: "external_tokens",
    Head.AUDIO: "dmel_levels",
}
"""Heads with a unigram baseline, and the keys of its counts in a manifest's statistics."""

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
    """Whether the model's loss is lower."""


def compare(
    model_losses: Mapping[str, float | None], baseline_losses: Mapping[str, float | None]
) -> list[Comparison]:
    """Compare each baseline with its head; skip pairs of which one is missing or not finite.

    Args:
        model_losses: ``loss_<head>``, as from ``Trainer.evaluate``; other names are ignored.
        baseline_losses: ``<head>/<baseline>``, as from :meth:`Baselines.mean_losses`.
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
    """Fitted baselines of all heads that a configuration trains."""

    config: TrainConfig
    shapes: WindowShapes
    counts: Mapping[str, Tensor]
    """How often each value was a target, per head with a unigram, float64: text [V], audio [C, L].

    Silent ticks count as PAD.
    """
    trigrams: Mapping[str, Trigrams]
    """Per text head."""
    level_pairs: Tensor | None
    """How often a level followed another, float64 [C, L, L]; None without an audio head."""

    @classmethod
    def fit(
        cls, batches: Iterable[Mapping[str, Any]], *, config: TrainConfig, shapes: WindowShapes
    ) -> Self:
        """Count the targets of training batches.

        Args:
            batches: as docs/batch.md; finite, with each sample once.
            config: has the heads.
            shapes: sizes of the windows.
        """
        counts = _no_counts(config, shapes)
        pairs = _no_pairs(counts)
        trigrams = {head: Trigrams.none(shapes.vocab_size) for head in counts if head != Head.AUDIO}
        for batch in batches:
            weight_B = torch.as_tensor(batch["weight"]).cpu()
            for head in counts:
                target = torch.as_tensor(batch["targets"][head]).cpu()
                valid = torch.as_tensor(batch["targets"][f"{head}_valid"]).cpu()
                # No head predicts a window's first tick, so it is not counted either.
                first = shapes.audio_frames_per_tick if head == Head.AUDIO else 1
                shape = counts[head].shape
                counts[head] += _count(target[:, first:], valid[:, first:], weight_B, shape)
                if head in trigrams:
                    trigrams[head] = trigrams[head].with_more(target, valid, weight_B)
                elif pairs is not None:
                    pairs += count_level_pairs(
                        target, valid, weight_B, first=first, num_levels=shapes.mel_levels
                    )
        return cls(
            config=config, shapes=shapes, counts=counts, trigrams=trigrams, level_pairs=pairs
        )

    @classmethod
    def from_statistics(
        cls, statistics: Mapping[str, Any], *, config: TrainConfig, shapes: WindowShapes
    ) -> Self:
        """Make unigrams from a manifest's statistics of the train split.

        Statistics do not count silence; it is assumed to fill all ticks without a token. This is
        slightly too much if a sample lacks the stream, or a window's end cuts an event. Statistics
        have no sequences, so there are no trigrams and no bigram.

        Args:
            statistics: ``dmel_levels``, ``internal_tokens``, ``external_tokens``, ``num_samples``.
                A head whose counts are missing or empty has no baseline.
            config: has the heads.
            shapes: sizes of the windows.
        """
        counts = {}
        num_ticks = statistics.get("num_samples", 0) * shapes.num_ticks
        for head, empty in _no_counts(config, shapes).items():
            stored = torch.tensor(statistics.get(UNIGRAM_STATISTICS[Head(head)], ())).double()
            if head == Head.AUDIO and stored.shape == empty.shape:
                counts[head] = stored
            elif head != Head.AUDIO and num_ticks and 0 < len(stored) <= len(empty):
                empty[: len(stored)] = stored
                empty[PAD_TOKEN] += max(0.0, num_ticks - float(stored.sum()))
                counts[head] = empty
        return cls(config=config, shapes=shapes, counts=counts, trigrams={}, level_pairs=None)

    def as_dict(self) -> dict[str, Any]:
        """Pack the counts as tensors in plain containers; :meth:`from_dict` is the inverse."""
        trigrams = {head: [t.keys, t.counts] for head, t in self.trigrams.items()}
        return {"counts": dict(self.counts), "trigrams": trigrams, "level_pairs": self.level_pairs}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, config: TrainConfig, shapes: WindowShapes
    ) -> Self:
        """Unpack what :meth:`as_dict` packed; an older one can lack trigrams and level pairs.

        Raises:
            ConfigError: a value has no counts, or counts of another shape.
        """
        expected = _no_counts(config, shapes)
        counts = {
            head: _check_counts(stored, expected[head].shape, name=f"the baseline of {head}")
            for head, stored in values["counts"].items()
            if head in expected
        }
        trigrams = {
            head: Trigrams.from_counts(*stored, vocab_size=shapes.vocab_size)
            for head, stored in values.get("trigrams", {}).items()
            if head in expected and head != Head.AUDIO
        }
        pairs, no_pairs = None, _no_pairs(expected)
        if no_pairs is not None and (stored := values.get("level_pairs")) is not None:
            pairs = _check_counts(stored, no_pairs.shape, name="the bigram of audio levels")
        return cls(
            config=config, shapes=shapes, counts=counts, trigrams=trigrams, level_pairs=pairs
        )

    def losses(self, batch: Mapping[str, Any]) -> dict[str, LossSum]:
        """Compute each baseline's loss on a batch: ``<head>/<baseline>`` to weighted sum and count.

        Those of several batches can be added, as those of :func:`train.model.losses.loss_sums`.

        Args:
            batch: its "targets" and "weight", tensors or numpy arrays.
        """
        targets = {name: torch.as_tensor(value) for name, value in batch["targets"].items()}
        weight_B = torch.as_tensor(batch["weight"])
        sums = {}
        for head in self.config.heads:
            one_head = _with_one_head(head, self.config)
            for name, output in self._outputs(head, targets).items():
                scored = loss_sums({str(head): output}, targets, weight_B, config=one_head)
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

    def _outputs(self, head: Head, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of the head's baselines, in the form of the model's outputs."""
        target, valid = targets[head], targets[f"{head}_valid"]
        if head is Head.ANIMATION:
            per_tick = self.shapes.sensor_samples_per_tick
            rate_hz = self.shapes.tick_rate_hz * per_tick
            return {
                "copy_last_pose": copy_last_pose(target, valid, per_tick=per_tick),
                "constant_velocity": constant_velocity(
                    target, valid, per_tick=per_tick, rate_hz=rate_hz
                ),
            }
        if head not in self.counts:
            return {}
        if head is Head.AUDIO:
            per_tick = self.shapes.audio_frames_per_tick
            sizes = (len(target), target.shape[1] // per_tick, per_tick)
            log_probs_CL = unigram(self.counts[head]).to(target.device)
            outputs = {"unigram": log_probs_CL.expand(*sizes, -1, -1)}
            if self.level_pairs is not None:
                outputs["bigram"] = self._bigram(target, valid).view(*sizes, *log_probs_CL.shape)
            return outputs
        pad_weight = self.config.model.pad_weight
        log_probs_V = unigram(self.counts[head], pad_weight=pad_weight).to(target.device)
        outputs = {"unigram": log_probs_V.expand(*target.shape, -1)}
        if head in self.trigrams:
            log_probs_BTV = self.trigrams[head].log_probs(
                target.cpu(), valid.cpu(), pad_weight=pad_weight
            )
            outputs["trigram"] = log_probs_BTV.to(target.device)
        return outputs

    def _bigram(self, levels_BAC: Tensor, valid_BA: Tensor) -> Tensor:
        """Log-probabilities [B, A, C, L] of each frame of the next tick, given the previous frame.

        After a masked frame they are the unigram's.
        """
        assert self.level_pairs is not None
        per_tick = self.shapes.audio_frames_per_tick
        unigram_CL = unigram(self.counts[Head.AUDIO])
        transitions_CLL = level_transitions(self.level_pairs, unigram_CL).log().float()
        # A tick's outputs are for the next tick: frame a - 1 + per_tick predicts a + per_tick. The
        # frames that wrap around give outputs of the last tick, which have no target.
        known_BA, before_BAC = (x.roll(1 - per_tick, dims=1).cpu() for x in (valid_BA, levels_BAC))
        before_BAC = before_BAC.long().masked_fill(~known_BA[..., None], 0)
        log_probs_BACL = transitions_CLL[torch.arange(len(unigram_CL)), before_BAC]
        chosen = torch.where(known_BA[..., None, None], log_probs_BACL, unigram_CL)
        return chosen.to(levels_BAC.device)


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


def copy_last_pose(poses_BSP: Tensor, valid_BS: Tensor, *, per_tick: int) -> Tensor:
    """Repeat the last valid pose, angles and velocities, for all samples of the next tick.

    Returns:
        [B, T, per_tick, P], float32; zeros before the first valid pose.
    """
    last_BTP, _ = _last_poses(poses_BSP, valid_BS, per_tick)
    return last_BTP[:, :, None].expand(-1, -1, per_tick, -1)


def constant_velocity(
    poses_BSP: Tensor, valid_BS: Tensor, *, per_tick: int, rate_hz: float
) -> Tensor:
    """Extrapolate the last valid pose: its velocities (rad/s) move its angles (rad).

    Returns:
        [B, T, per_tick, P], float32; the angles are not wrapped.
    """
    last_BTP, last_BT = _last_poses(poses_BSP, valid_BS, per_tick)
    index = torch.arange(valid_BS.shape[1], device=valid_BS.device).view(-1, per_tick) + per_tick
    elapsed_s = (index[None] - last_BT[..., None]).float() / rate_hz
    angles, velocities = last_BTP[:, :, None].expand(-1, -1, per_tick, -1).chunk(2, dim=-1)
    return torch.cat([angles + velocities * elapsed_s[..., None], velocities], dim=-1)


def _last_poses(poses_BSP: Tensor, valid_BS: Tensor, per_tick: int) -> tuple[Tensor, Tensor]:
    """Last valid pose at the end of each tick, float32 [B, T, P], and its sample index, [B, T].

    Before the first one: zeros, at index 0.
    """
    index_S = torch.arange(valid_BS.shape[1], device=valid_BS.device)
    last_BS = torch.where(valid_BS, index_S, -1).cummax(dim=1).values
    last_BT = last_BS[:, per_tick - 1 :: per_tick]
    index_BTP = last_BT.clamp(min=0)[..., None].expand(-1, -1, poses_BSP.shape[2])
    last_BTP = poses_BSP.float().gather(1, index_BTP)
    return last_BTP.masked_fill((last_BT < 0)[..., None], 0.0), last_BT.clamp(min=0)


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
    """Count values [B, positions], or per channel [B, positions, C], with weights.

    Returns:
        float64 of `shape`, [values] or [C, values].
    """
    weights = (valid * weight_B[:, None]).double()[..., None]
    values = values.reshape(*valid.shape, -1).long().masked_fill(~valid[..., None], 0)
    index = values + torch.arange(values.shape[-1]) * shape[-1]
    flat_weights = weights.expand_as(index).flatten()
    return torch.bincount(index.flatten(), flat_weights, minlength=shape.numel()).view(shape)


def _no_counts(config: TrainConfig, shapes: WindowShapes) -> dict[str, Tensor]:
    """Make zero counts of each head with a unigram."""
    levels, tokens = (shapes.mel_channels, shapes.mel_levels), (shapes.vocab_size,)
    return {
        str(head): torch.zeros(levels if head is Head.AUDIO else tokens, dtype=torch.float64)
        for head in config.heads
        if head in UNIGRAM_STATISTICS
    }


def _no_pairs(counts: Mapping[str, Tensor]) -> Tensor | None:
    """Make zero counts of successive levels."""
    if Head.AUDIO not in counts:
        return None
    num_channels, num_levels = counts[Head.AUDIO].shape
    return torch.zeros(num_channels, num_levels, num_levels, dtype=torch.float64)


def _check_counts(stored: object, size: torch.Size, *, name: str) -> Tensor:
    """Check counts from a file, a tensor or (in old files) lists of numbers; return float64.

    Raises:
        ConfigError: the value has no counts, or counts of another size.
    """
    rows: list[Any] = stored if isinstance(stored, list) and len(size) > 1 else [stored]
    # Memory is allocated only for rows of numbers that have one length.
    is_listed = all(
        isinstance(row, list) and all(isinstance(each, int | float) for each in row) for row in rows
    )
    if is_listed and len({len(row) for row in rows}) == 1:
        stored = torch.tensor(stored, dtype=torch.float64)
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


def _with_one_head(head: Head, config: TrainConfig) -> TrainConfig:
    """Make a configuration with one head, for :func:`train.model.losses.loss_sums` to score."""
    weights = LossWeights(**{str(other): float(other is head) for other in Head})
    return TrainConfig(
        training=TrainingConfig(loss_weights=weights),
        model=ModelConfig(pad_weight=config.model.pad_weight),
    )
