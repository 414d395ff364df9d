"""The optimizer, its learning rate schedule, gradient clipping, and skipped steps.

A step is skipped if its loss or gradient is not finite or is a spike, because one bad batch can
undo days of training. A spike exceeds the newest steps in two ways: its logarithm by more than
`sigma` of their standard deviations, and its value by a good share of their mean (`MIN_RISES`).

This is the rule of OLMo-core's SkipStepOptimizer, except for the logarithm. Gradient norms have
long tails: of the demo's healthy steps one in 600 is 7 deviations above the mean, but none is more
than 4 in logarithms. A spike enters the memory as the limit that it exceeded. So a small lasting
rise is accepted after a few steps, and a large one is not.

Everything is computed on the device without waiting for the host. The memory is part of
checkpoints, so a resumed run skips the same steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from train.machine.parallel import gather_tensor, shard_moments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.config import OptimizerConfig, TrainingConfig

WINDOW_STEPS: Final = 128
"""Number of newest steps that a step is compared with."""

MIN_STEPS: Final = 64
"""Nothing is a spike before this many steps are in the memory."""

MIN_RISES: Final = (0.25, 1.0)
"""Least rise of a spike's loss and gradient norm, as a share of their geometric means.

Losses of memorized batches hardly vary, so a small rise would be many deviations. Clipping makes a
norm below twice the mean harmless.
"""

MIN_VALUE: Final = 1e-12
"""Smaller losses and norms count as this value, so that they have a logarithm."""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make an AdamW that decays matrices only, not biases, norms or scales.

    It is fused on every device, because only a fused step can be skipped on the device
    (:func:`step_if`).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def restore_optimizer(
    optimizer: torch.optim.AdamW, state: dict[str, Any], config: OptimizerConfig
) -> None:
    """Load a checkpoint's moments; betas, eps and weight decay stay the configuration's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.load_state_dict({**state, "state": shard_moments(state["state"], parameters)})
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = config.betas, config.eps
        group["weight_decay"] = config.weight_decay if group["weight_decay"] else 0.0


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up, then a cosine.

    The cosine (Loshchilov & Hutter 2017) reaches ``min_lr_ratio`` of the peak at ``max_steps``,
    which is one past the last step. The first step's rate is above 0.
    """
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(1, config.max_steps - optimizer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optimizer.lr * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use a learning rate for all parameters from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradient(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *, max_norm: float
) -> Tensor:
    """Scale the gradient down to at most `max_norm`; return the norm before, 0-dim.

    With FSDP2, where ranks hold shards of the gradient, it is the norm of all shards.
    """
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return gather_tensor(nn.utils.clip_grad_norm_(trained, max_norm))


def step_if(is_good: Tensor, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler) -> None:
    """Take the step of a fused optimizer if it is good, without making the host wait.

    If `is_good` (0-dim, on the device) is False, weights and moments stay unchanged. The scaler
    adapts its scale, for float16, to whether :func:`clip_gradient` saw an overflow.
    """
    # GradScaler skips fused steps by these two attributes (torch/amp/grad_scaler.py,
    # `_step_supports_amp_scaling`). Its own step would take finite steps that are spikes.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~is_good).float()  # type: ignore[attr-defined]
    optimizer.step()
    if scaler.is_enabled():
        scaler.update()


class SpikeWatch:
    """Remembers losses and gradient norms of the newest steps, and judges new ones by them.

    Shapes: 2 stands for (loss, norm), N for ``WINDOW_STEPS``.

    Args:
        sigma: standard deviations of the logarithms above which a step is a spike; None: no finite
            step is one.
    """

    def __init__(self, sigma: float | None, device: torch.device) -> None:
        self._sigma = sigma
        self._min_rise_2 = torch.tensor(MIN_RISES, device=device).log1p()
        self._window_2N = torch.full((2, WINDOW_STEPS), math.nan, device=device)
        self._num_judged = 0
        self.is_loss_good = torch.ones((), dtype=torch.bool, device=device)
        """Whether the newest loss by itself was finite and no spike; 0-dim."""

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Remember a step, and return whether it may be taken, bool and 0-dim."""
        values_2 = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        log_2 = values_2.clamp(min=MIN_VALUE).log()
        limit_2 = self._limits()
        is_finite = torch.isfinite(values_2).all()
        kept_2 = torch.where(is_finite, torch.minimum(log_2, limit_2), math.nan)
        self._window_2N[:, self._num_judged % WINDOW_STEPS] = kept_2
        self._num_judged += 1
        self.is_loss_good = torch.isfinite(values_2[0]) & (log_2[0] <= limit_2[0])
        return is_finite & (log_2 <= limit_2).all()

    def _limits(self) -> Tensor:
        """Return the logarithms of the largest loss and norm that are no spikes, [2].

        They are infinite until enough steps are remembered.
        """
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
        """Return the memory as tensors and plain values."""
        return {"window": self._window_2N, "num_judged": self._num_judged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the memory from :meth:`state_dict`."""
        self._window_2N = state["window"].to(self._window_2N.device)
        self._num_judged = int(state["num_judged"])
