"""Numbers of the steps between two logs, added up on the device, so that no step waits for it."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import DivergedError
from train.loop.evaluation import HeldOut
from train.machine import runtime
from train.machine.parallel import whole_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

QUANTILES: Final = (50, 95, 99)
"""Percentiles of the waits for data."""

MAX_BAD_STEPS: Final = 10
"""So many steps in a row that were not finite, or spikes, stop the run."""

FIRST_STEPS: Final = 5
"""Steps whose mean counts as the first loss."""


class StepMeter:
    """Means over the steps since the last log, added up on the device without waiting for it.

    Steps that were left out, not finite or spikes, count as skipped and enter no mean. So do
    overflows of float16, by which its scale is found and nothing is wrong; they count apart.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_overflows: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._num_good = torch.zeros((), dtype=torch.int64, device=device)
        self._num_samples = torch.zeros((), device=device)
        self._num_steps = 0
        self._first_steps: list[tuple[dict[str, Tensor], Tensor]] = []
        self._bad_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._losses: dict[str, Tensor] = {}
        self._grad_norm = torch.zeros((), device=device)
        self.restart_clock()

    @property
    def has_steps(self) -> bool:
        """Whether steps were added since the last log."""
        return self._num_steps > 0

    def add(
        self,
        losses: Mapping[str, Tensor],
        *,
        grad_norm: Tensor,
        is_good: Tensor,
        num_samples: Tensor,
        is_overflow: Tensor | None = None,
    ) -> None:
        """Add one step; all tensors are 0-dim on the device, `is_good` bool, and `is_overflow`,
        where the loss is scaled: whether the gradient of a good loss is not finite.
        """
        for name, value in {**losses, "grad_norm": grad_norm}.items():
            good = torch.where(is_good, value.detach().float(), 0.0)
            self._sums[name] = self._sums[name] + good if name in self._sums else good
        self._num_good = self._num_good + is_good
        if is_overflow is not None:
            before = self._num_overflows
            self._num_overflows = is_overflow.long() if before is None else before + is_overflow
        self._num_samples = self._num_samples + num_samples
        self._num_steps += 1
        self._losses = {name: loss.detach() for name, loss in losses.items()}
        self._grad_norm = grad_norm
        self._bad_in_a_row = torch.where(is_good, 0, self._bad_in_a_row + 1)
        if len(self._first_steps) < FIRST_STEPS:
            self._first_steps.append((self._losses, is_good))

    def take(self, waits_s: Sequence[float]) -> dict[str, float]:
        """Everything since the last call, as plain numbers; waits for the device and starts anew.

        Args:
            waits_s: how long each step waited for its data.

        Returns:
            The means of what was added, samples_per_sec, skipped_steps, data_wait_fraction,
            data_wait_ms_p50, _p95 and _p99 and, where the loss is scaled, fp16_overflows. Means
            without a single good step are NaN.
        """
        num_good = int(
            self._num_good
        )  # waits for the device, so that the clock below sees all its work
        elapsed_s = max(time.perf_counter() - self._began_s - self._excluded_s, 1e-9)
        metrics = {n: float(s) / num_good if num_good else math.nan for n, s in self._sums.items()}
        metrics["samples_per_sec"] = float(self._num_samples) / elapsed_s
        metrics["data_wait_fraction"] = min(1.0, sum(waits_s) / elapsed_s)
        num_overflows = 0
        if self._num_overflows is not None:
            num_overflows = int(self._num_overflows)
            metrics["fp16_overflows"] = float(num_overflows)
        metrics["skipped_steps"] = float(self._num_steps - num_good - num_overflows)
        waits_ms = np.percentile(np.array(waits_s or [0.0]) * 1e3, QUANTILES)
        metrics |= {
            f"data_wait_ms_p{q}": float(w) for q, w in zip(QUANTILES, waits_ms, strict=True)
        }
        self._reset()
        return metrics

    def first_losses(self) -> dict[str, float]:
        """Means of the losses of the first few steps; waits for the device."""
        good = [losses for losses, is_good in self._first_steps if is_good]
        return {
            name: sum(float(losses[name]) for losses in good) / len(good)
            for name in (good or [{}])[0]
        }

    def is_in_bad_steps(self) -> bool:
        """Whether the newest step was left out; waits for the device."""
        return int(self._bad_in_a_row) > 0

    def check_divergence(self, step: int, *, newest: Path | None = None) -> None:
        """Stop a run that no longer learns anything; waits for the device.

        Args:
            step: the newest one.
            newest: checkpoint from before these steps, if one was saved.

        Raises:
            DivergedError: :data:`MAX_BAD_STEPS` steps or more in a row were left out.
        """
        if (count := int(self._bad_in_a_row)) < MAX_BAD_STEPS:
            return
        culprits = [name for name, loss in self._losses.items() if not torch.isfinite(loss)]
        fault = f"{' and '.join(culprits) or 'the gradient'} was not finite"
        if not culprits and torch.isfinite(self._grad_norm):
            total = float(self._losses["loss_total"])
            fault = (
                f"loss_total {total:.4g} or grad_norm {float(self._grad_norm):.4g} was far above "
                "the steps before (training.spike_sigma)"
            )
        go_on = "start anew: no checkpoint was saved before them"
        if newest is not None:
            go_on = f"resume from a checkpoint from before them (`--resume {newest}`)"
        raise DivergedError(
            f"step {step}: {fault} in {count} steps in a row. "
            "Reduce LR (training.optimizer.lr), check for corrupted data (`python -m preprocess "
            f"verify SHARDS`), and {go_on}"
        )

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside out of the speed: it is spent on something else than training."""
        runtime.synchronize(self._device)  # what was launched before is training
        began_s = time.perf_counter()
        yield
        self._excluded_s += time.perf_counter() - began_s

    def restart_clock(self) -> None:
        """Begin to measure the speed now."""
        self._began_s = time.perf_counter()
        self._excluded_s = 0.0

    def _reset(self) -> None:
        self._sums = {}
        self._num_good = torch.zeros_like(self._num_good)
        self._num_overflows = None
        self._num_samples = torch.zeros_like(self._num_samples)
        self._num_steps = 0
        self.restart_clock()


_PARTS = (
    ("encoder.encoders.", "encoder_{}"),
    ("encoder.frames.", "encoder_vision"),
    ("encoder.", "encoder_fusion"),
    ("blocks.", "backbone"),
    ("norm.", "backbone"),
    ("predictors.", "head_{}"),
)
"""Prefix of a parameter's name, and its part; {} is the next word of the name."""


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, such as encoder_audio or backbone."""
    for prefix, part in _PARTS:
        if name.startswith(prefix):
            return part.format(name.removeprefix(prefix).partition(".")[0])
    return name.partition(".")[0]


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of each part's gradient as the optimizer got it, clipped; waits for the device.

    All ranks call it.

    Args:
        model: after a backward pass; of its parameters those without a gradient are left out.

    Returns:
        ``grad_norm/<part>``; together, as a root of squares, the norm of the whole gradient.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(part_of(name), []).append(parameter.grad)
    if not parts:
        return {}
    norms = [whole_tensor(nn.utils.get_total_norm(grads)) for grads in parts.values()]
    values = torch.stack(norms).tolist()
    return {f"grad_norm/{part}": value for part, value in zip(parts, values, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """What a call of ``Trainer.train`` did."""

    steps: int
    """Optimizer steps of the whole run so far."""
    stopped_by: Literal["max_steps", "signal"]
    """Why it returned; a signal is Ctrl-C or SIGTERM."""
    first_losses: Mapping[str, float]
    """Means over this call's first few steps, by metric name."""
    last_losses: Mapping[str, float]
    """Means of the newest log."""
    first_val_losses: Mapping[str, float]
    """This call's first held-out losses; empty without a val_loader."""
    last_val_losses: Mapping[str, float]
    """The newest held-out losses."""
    samples_per_sec: float
    """Of the newest log."""
    data_wait_fraction: float
    """Share of the time in which the device waited for data, of the newest log."""
    skipped_samples: int
    """Bad train samples that were replaced, in the whole run."""
    skipped_val_samples: int
    """Bad held-out samples that the newest losses leave out."""
    skipped_steps: int
    """Steps of this call that were left out: not finite, or spikes."""
    checkpoint: Path | None
    """The newest checkpoint of this call."""
    log_dir: Path
    """TensorBoard's folder of this run."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """What one call of ``train`` has come to so far."""

    meter: StepMeter
    began_s: float = field(default_factory=time.perf_counter)
    to_first_batch_s: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    first_val: dict[str, float] = field(default_factory=dict)
    held_out: HeldOut = field(default_factory=HeldOut)
    skipped_steps: int = 0
    checkpoint: Path | None = None

    def summary(
        self, *, steps: int, is_complete: bool, skipped_samples: int, log_dir: Path
    ) -> TrainSummary:
        """All of it, at the end."""
        metrics = self.metrics
        return TrainSummary(
            steps=steps,
            stopped_by="max_steps" if is_complete else "signal",
            first_losses=self.meter.first_losses(),
            last_losses={n: v for n, v in metrics.items() if n.startswith("loss_")},
            first_val_losses=self.first_val,
            last_val_losses=self.held_out.losses,
            samples_per_sec=metrics.get("samples_per_sec", 0.0),
            data_wait_fraction=metrics.get("data_wait_fraction", 0.0),
            skipped_samples=skipped_samples,
            skipped_val_samples=len(self.held_out.skipped),
            skipped_steps=self.skipped_steps,
            checkpoint=self.checkpoint,
            log_dir=log_dir,
        )
