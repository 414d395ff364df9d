"""The optimizer, its schedule, and steps that are left out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from train.machine.parallel import moment_shares, whole_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.config import OptimizerConfig, TrainingConfig

WINDOW_STEPS: Final = 128
"""Newest steps that a step is compared with."""

MIN_STEPS: Final = 64
"""Nothing is a spike before so many steps are remembered."""

MIN_RISES: Final = (0.25, 1.0)
"""Nor is what rises over the (geometric) mean by less than this share of it: losses of memorised
batches hardly vary, and clipping takes the harm out of a norm that is not even twice the mean."""

MIN_VALUE: Final = 1e-12
"""Smaller losses and norms count as this one, so that they have a logarithm."""


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of a step, counted from 0: a linear warm-up to the peak, then a cosine.

    The cosine (Loshchilov & Hutter 2017) would end at ``min_lr_ratio`` of the peak at
    ``max_steps``, which is one past the last step. The first step's rate is above 0.
    """
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(1, config.max_steps - optimizer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optimizer.lr * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` in the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; biases, norms and scales have none.

    Fused on every device, also because only the fused step can be left out on the device
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
    """Load the whole moments of a checkpoint; betas, eps and decay stay the configuration's.

    Raises:
        ValueError: the state is of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.load_state_dict({**state, "state": moment_shares(state["state"], parameters)})
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = config.betas, config.eps
        group["weight_decay"] = config.weight_decay if group["weight_decay"] else 0.0


def clip_gradient(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *, max_norm: float
) -> Tensor:
    """Scale the whole gradient down to `max_norm`; returns its norm before that, 0-dim.

    With FSDP2, where ranks hold shares of it, the norm is that of all shares.
    """
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return whole_tensor(nn.utils.clip_grad_norm_(trained, max_norm))


def step_if(is_good: Tensor, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler) -> None:
    """Take the optimizer's step, or leave weights and moments alone, without the host waiting.

    Args:
        is_good: bool, 0-dim, on the device; False where a gradient is not finite.
        optimizer: fused.
        scaler: for float16; adapts its scale to whether :func:`clip_gradient` met an overflow.
    """
    # The switch by which GradScaler leaves out fused steps (torch/amp/grad_scaler.py,
    # `_step_supports_amp_scaling`). Its own step would take finite ones that are spikes.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~is_good).float()  # type: ignore[attr-defined]
    optimizer.step()
    if scaler.is_enabled():
        scaler.update()


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
