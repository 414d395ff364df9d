"""Which steps are taken: those whose loss and gradient are finite and no spike.

A spike is a loss or a gradient norm far above those of the newest steps: its logarithm by more than
`sigma` of their standard deviations, and itself by a good part of their mean (:data:`MIN_RISES`).
Such a step is left out, as one bad batch can undo days of training. That is the rule of OLMo-core's
SkipStepOptimizer, but for the logarithm: norms have long tails, so that of the demo's healthy steps
one in 600 lies 7 deviations above the mean, and none more than 4 in logarithms. A spike is
remembered at no more than the limit that it broke, so that a level that has moved a little is
accepted after a few steps, and one that is far away is not.

All is computed on the device without the host waiting, and the memory is part of checkpoints, so
that a resumed run leaves out the same steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

WINDOW_STEPS: Final = 128
"""Newest steps that a step is compared with."""

MIN_STEPS: Final = 64
"""Nothing is a spike before so many steps are remembered."""

MIN_RISES: Final = (0.25, 1.0)
"""Nor is what rises over the (geometric) mean by less than this share of it: losses of memorised
batches hardly vary, and clipping takes the harm out of a norm that is not even twice the mean."""

MIN_VALUE: Final = 1e-12
"""Smaller losses and norms count as this one, so that they have a logarithm."""


class SpikeWatch:
    """Remembers loss and gradient norm of the newest steps.

    Args:
        sigma: standard deviations of logarithms that make a spike; None: nothing is one.
        device: of the losses.
    """

    def __init__(self, sigma: float | None, device: torch.device) -> None:
        self._sigma = sigma
        self._min_rise_2 = torch.tensor(MIN_RISES, device=device).log1p()
        self._window_2N = torch.full((2, WINDOW_STEPS), math.nan, device=device)
        self._num_judged = 0
        self.is_loss_good = torch.ones((), dtype=torch.bool, device=device)
        """Whether the newest loss by itself was finite and no spike; 0-dim."""

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step may be taken, bool, 0-dim; and remember it.

        Args:
            loss: of the step, 0-dim.
            grad_norm: before clipping, 0-dim.
        """
        values_2 = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        now_2 = values_2.clamp(min=MIN_VALUE).log()
        limit_2 = self._limits()
        is_finite = torch.isfinite(values_2).all()
        kept_2 = torch.where(is_finite, torch.minimum(now_2, limit_2), math.nan)
        self._window_2N[:, self._num_judged % WINDOW_STEPS] = kept_2
        self._num_judged += 1
        self.is_loss_good = torch.isfinite(values_2[0]) & (now_2[0] <= limit_2[0])
        return is_finite & (now_2 <= limit_2).all()

    def _limits(self) -> Tensor:
        """Logarithms of the largest loss and norm that are no spikes, [2]; at first infinite."""
        if self._sigma is None:
            return torch.full_like(self._window_2N[:, 0], math.inf)
        is_known = torch.isfinite(self._window_2N)
        count_2 = is_known.sum(1)
        mean_2 = self._window_2N.nanmean(1)
        distances = torch.where(is_known, self._window_2N - mean_2[:, None], 0.0)
        deviation_2 = (distances.square().sum(1) / count_2).sqrt()
        rise_2 = torch.maximum(self._sigma * deviation_2, self._min_rise_2)
        return torch.where(count_2 >= MIN_STEPS, mean_2 + rise_2, math.inf)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"window": self._window_2N, "num_judged": self._num_judged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._window_2N = state["window"].to(self._window_2N.device)
        self._num_judged = int(state["num_judged"])
