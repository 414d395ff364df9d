"""Compute with sensor values by their type: features, predictions and errors.

:data:`RULES` has one row per value type. Scalars, velocities and positions are standardized: the
model sees (x - mean) / std, and errors are divided by std. Other types have a scale of their own.

Letters: B batch, T ticks, S samples, D values of a sample, N vectors of a group, V values of one.
"""

# ruff: noqa: N803, N806  (shape letters)
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import ConfigError
from shared.streams import ValueGroup, ValueType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

MIN_STD: Final = 1e-6
"""Values of a smaller standard deviation, in their own unit, are constant and divided by 1.

Divided by this limit, such a value that moves by 0.1 in another session would be 100,000."""

MIN_NORM: Final = 1e-6
"""Smaller norms of a predicted quaternion or direction are divided by this instead."""


def _unchanged(x: Tensor) -> Tensor:
    return x


def _sine_and_cosine(angles: Tensor) -> Tensor:
    """Encode angles without a jump where pi becomes -pi."""
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _rotation_columns(quaternions: Tensor) -> Tensor:
    """Return the first two columns of the rotation matrices of x, y, z, w.

    A continuous form of rotations: Zhou et al. 2019 (arXiv:1812.07035), section 4.2.
    """
    x, y, z, w = quaternions.unbind(-1)
    columns = [
        1 - 2 * (y * y + z * z),
        2 * (x * y + z * w),
        2 * (x * z - y * w),
        2 * (x * y - z * w),
        1 - 2 * (x * x + z * z),
        2 * (y * z + x * w),
    ]
    return torch.stack(columns, dim=-1)


def _smooth_l1(difference: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")


def _one_minus_cosine(difference: Tensor, target: Tensor) -> Tensor:
    return 1 - torch.cos(difference)


def _half_squared_chord(difference: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine of unit vectors; this form keeps its precision for small angles."""
    return difference.square().sum(-1, keepdim=True) / 2


def _squared_sine(difference: Tensor, target: Tensor) -> Tensor:
    """Return 1 - <q, q'>^2 of unit quaternions: the squared length of q beside the target q'.

    q and -q are one rotation; an error of angle a costs sin(a / 2)^2.
    """
    along = (difference * target).sum(-1, keepdim=True) * target
    return (difference - along).square().sum(-1, keepdim=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRule:
    """How values of one type enter the model, are predicted, and are scored."""

    features: Callable[[Tensor], Tensor] = _unchanged
    """Vectors [..., N, V] to their features [..., N, any]."""
    error: Callable[[Tensor, Tensor], Tensor] = _smooth_l1
    """From outputs minus targets, and targets, [..., N, V] to errors of values or, [..., N, 1], of
    vectors."""
    is_standardized: bool = False
    """Whether features and errors are in units of the standard deviation."""
    is_unit: bool = False
    """Whether vectors have length 1; at rest only the last value is not 0."""
    is_rate: bool = False
    """Whether standing still is 0, instead of the last value. Last values go to the head."""


RULES: Final[Mapping[ValueType, ValueRule]] = {
    ValueType.SCALAR: ValueRule(is_standardized=True),
    ValueType.FRACTION: ValueRule(),
    ValueType.ANGLE: ValueRule(features=_sine_and_cosine, error=_one_minus_cosine),
    ValueType.VELOCITY: ValueRule(is_standardized=True, is_rate=True),
    ValueType.POSITION: ValueRule(is_standardized=True),
    ValueType.QUATERNION: ValueRule(features=_rotation_columns, error=_squared_sine, is_unit=True),
    ValueType.DIRECTION: ValueRule(error=_half_squared_chord, is_unit=True),
}


def split(x: Tensor, groups: Sequence[ValueGroup]) -> list[tuple[ValueRule, Tensor]]:
    """Split [..., D] into the groups' vectors [..., N, V], each with its rule."""
    parts = torch.split(x, [group.count for group in groups], dim=-1)
    return [
        (RULES[group.type], torch.unflatten(part, -1, (group.count // group.vector_size, -1)))
        for group, part in zip(groups, parts, strict=True)
    ]


def join(vectors: Iterable[Tensor]) -> Tensor:
    """Join vectors [..., N, any] of groups to [..., all]."""
    return torch.cat([part.flatten(-2) for part in vectors], dim=-1)


def value_features(x: Tensor, groups: Sequence[ValueGroup]) -> Tensor:
    """Compute the features of standardized values [..., D]."""
    return join(rule.features(part) for rule, part in split(x, groups))


def value_errors(
    output: Tensor, target: Tensor, groups: Sequence[ValueGroup], *, std: Tensor
) -> Tensor:
    """Compare values [..., D]: the sum over groups of the mean over a group's elements, [...].

    Elements are values; of quaternions and directions they are whole vectors.
    """
    # The difference comes first: a value far from 0 has no digits to spare.
    pairs = zip(split((output - target) / std, groups), split(target, groups), strict=True)
    means = [rule.error(off, true).flatten(-2).mean(-1) for (rule, off), (_, true) in pairs]
    return torch.stack(means).sum(0)


def move_values(start: Tensor, move: Tensor, groups: Sequence[ValueGroup]) -> Tensor:
    """Add a move to values [..., D]; quaternions and directions are normalized.

    Velocities start from 0.
    """
    moved = []
    for (rule, old), (_, change) in zip(split(start, groups), split(move, groups), strict=True):
        new = change if rule.is_rate else old + change
        moved.append(F.normalize(new, dim=-1, eps=MIN_NORM) if rule.is_unit else new)
    return join(moved)


def last_positions(valid_BS: Tensor, *, per_tick: int) -> Tensor:
    """Return the last valid position up to the end of each tick, int64 [B, T]; -1 if none."""
    index_S = torch.arange(valid_BS.shape[1], device=valid_BS.device)
    last_BS = torch.where(valid_BS, index_S, -1).cummax(dim=1).values
    return last_BS[:, per_tick - 1 :: per_tick]


class SensorValues(nn.Module):
    """The values of one sensor stream, and the statistics that standardize them.

    The statistics are buffers, so that checkpoints hold them. Without statistics, and for types
    that are not standardized, they are 0 and 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, groups: Sequence[ValueGroup]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        size = sum(group.count for group in groups)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @property
    def num_features(self) -> int:
        """Number of features of one sample."""
        return value_features(torch.zeros(len(self.mean)), self.groups).shape[0]

    @property
    def num_rates(self) -> int:
        """Number of values of one sample that are velocities."""
        return sum(group.count for group in self.groups if RULES[group.type].is_rate)

    @property
    def has_statistics(self) -> bool:
        """Whether any value is standardized."""
        return bool((self.mean != 0).any() or (self.std != 1).any())

    def set_statistics(self, statistics: Mapping[str, Any], *, name: str) -> None:
        """Standardize by the "mean" and "std" of each value; no "count" changes nothing.

        Raises:
            ConfigError: the statistics are of another number of values.
        """
        if not statistics.get("count"):
            return
        size = len(self.mean)
        if not len(statistics["mean"]) == len(statistics["std"]) == size:
            raise ConfigError(
                f"the statistics of {name} have {len(statistics['mean'])} values, its stream has "
                f"{size}; fix: build the set again by `python -m preprocess shards`"
            )
        types = [group.type for group in self.groups for _ in range(group.count)]
        rows = zip(types, statistics["mean"], statistics["std"], strict=True)
        scales = [
            (float(mean), float(std) if std >= MIN_STD else 1.0)
            if RULES[each].is_standardized
            else (0.0, 1.0)
            for each, mean, std in rows
        ]
        mean, std = torch.tensor(scales).unbind(1)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def features(self, x_BSD: Tensor, valid_BS: Tensor) -> Tensor:
        """Compute finite features [B, S, any] of samples; invalid values have no effect."""
        x_BSD = x_BSD.float().masked_fill(~valid_BS[..., None], 0.0)
        return value_features((x_BSD - self.mean) / self.std, self.groups)

    def initial(self) -> Tensor:
        """Return the values before the first reading, [D].

        They are the mean, else 0; for a quaternion the identity, for a direction +z.
        """
        vectors = split(self.mean.clone(), self.groups)
        for rule, part in vectors:
            if rule.is_unit:
                part[..., -1] = 1.0
        return join(part for _, part in vectors)

    def rates(self, x: Tensor) -> Tensor:
        """Select the velocities of [..., D], standardized."""
        vectors = split((x - self.mean) / self.std, self.groups)
        return join([part for rule, part in vectors if rule.is_rate] or [x[..., None, :0]])

    def predict(self, last: Tensor, residual: Tensor) -> Tensor:
        """Move the last values [..., D] by a residual in units of the standard deviation."""
        return move_values(last, residual * self.std, self.groups)
