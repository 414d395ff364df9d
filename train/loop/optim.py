"""The optimizer, its schedule, and steps that are left out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from train.machine.parallel import moment_shares, whole_tensor

if TYPE_CHECKING:
    from train.config import OptimizerConfig, TrainingConfig


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
