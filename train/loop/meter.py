"""Numbers of a run: means between two logs, gradient norms of parts, and the final summary.

``StepMeter`` adds up on the device, so that no step waits for the host. ``Progress`` gathers what a
call of ``Trainer.train`` returns as its ``TrainSummary``.
"""

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
from train.machine.parallel import gather_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

QUANTILES: Final = (50, 95, 99)
"""Percentiles of the waits for data."""

MAX_BAD_STEPS: Final = 10
"""This many skipped steps in a row (not finite, or spikes) stop the run."""

FIRST_STEPS: Final = 5
"""The mean over this many first steps is the first loss."""

_MODEL_PARTS: Final = (
    ("encoder.encoders.s_", "encoder_{}"),
    ("encoder.frames.", "frames"),
    ("encoder.", "fusion"),
    ("blocks.", "backbone"),
    ("norm.", "backbone"),
    ("predictors.s_", "head_{}"),
)
"""Prefix of a parameter's name, and its part of the model; {} is the next word of the name."""


class StepMeter:
    """Means over the steps since the last log, added up without waiting for the device.

    Skipped steps, which are not finite or spikes, count as skipped and enter no mean. Overflows of
    float16 enter no mean either, but are counted separately: they are how the loss scale is found,
    not a fault.
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
        """Add one step.

        All tensors are 0-dim and on the device.

        `grad_norm`: before clipping.
        `is_good`: bool; False for a skipped step.
        `is_overflow`: bool; True if the loss is good and the gradient is not finite. None if the
            loss is not scaled.
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
        """Return everything since the last call as plain numbers, and reset.

        It waits for the device.

        Returns:
            The means of what was added, samples_per_sec, skipped_steps, data_wait_fraction,
            data_wait_ms_p50, _p95 and _p99 and, if the loss is scaled, fp16_overflows. Means are
            NaN if no step was good.
        """
        # This waits for the device, so that the clock below covers all of its work.
        num_good = int(self._num_good)
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
        """Return the mean losses of the first few steps; it waits for the device."""
        good = [losses for losses, is_good in self._first_steps if is_good]
        return {
            name: sum(float(losses[name]) for losses in good) / len(good)
            for name in (good or [{}])[0]
        }

    def is_in_bad_steps(self) -> bool:
        """Return whether the newest step was skipped; it waits for the device."""
        return int(self._bad_in_a_row) > 0

    def check_divergence(self, step: int, *, newest: Path | None = None) -> None:
        """Stop a run that no longer learns; it waits for the device.

        `newest`: the newest checkpoint from before the skipped steps, if there is one.

        Raises:
            DivergedError: at least :data:`MAX_BAD_STEPS` steps in a row were skipped.
        """
        if (count := int(self._bad_in_a_row)) < MAX_BAD_STEPS:
            return
        not_finite = [name for name, loss in self._losses.items() if not torch.isfinite(loss)]
        fault = f"{' and '.join(not_finite) or 'the gradient'} was not finite"
        if not not_finite and torch.isfinite(self._grad_norm):
            total = float(self._losses["loss_total"])
            fault = (
                f"loss_total {total:.4g} or grad_norm {float(self._grad_norm):.4g} was far above "
                "the steps before (training.spike_sigma)"
            )
        restart = "start over, because no checkpoint was saved before these steps"
        if newest is not None:
            restart = f"resume from the checkpoint before these steps (`--resume {newest}`)"
        raise DivergedError(
            f"step {step}: {fault} in {count} steps in a row. Reduce LR "
            "(training.optimizer.lr), check for corrupted data (`python -m preprocess verify "
            f"SHARDS`), and {restart}"
        )

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside from the speed, because it is not spent on training."""
        runtime.synchronize(self._device)  # work launched before is training
        began_s = time.perf_counter()
        yield
        self._excluded_s += time.perf_counter() - began_s

    def restart_clock(self) -> None:
        """Measure the speed from now on."""
        self._began_s = time.perf_counter()
        self._excluded_s = 0.0

    def _reset(self) -> None:
        self._sums = {}
        self._num_good = torch.zeros_like(self._num_good)
        self._num_overflows = None
        self._num_samples = torch.zeros_like(self._num_samples)
        self._num_steps = 0
        self.restart_clock()


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the norm of each model part's clipped gradient, ``grad_norm/<part>``.

    It shows where a model learns, and where no gradient arrives. It waits for the device; all ranks
    call it. The root of the sum of their squares is the norm of the whole gradient.
    """
    grads_of: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grads_of.setdefault(model_part(name), []).append(parameter.grad)
    if not grads_of:
        return {}
    norms = [gather_tensor(nn.utils.get_total_norm(grads)) for grads in grads_of.values()]
    values = torch.stack(norms).tolist()
    return {f"grad_norm/{part}": value for part, value in zip(grads_of, values, strict=True)}


def model_part(name: str) -> str:
    """Return the model part of a parameter, such as encoder_audio or backbone, by its name."""
    for prefix, part in _MODEL_PARTS:
        if name.startswith(prefix):
            return part.format(name.removeprefix(prefix).partition(".")[0])
    return name.partition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """The result of one call of ``Trainer.train``."""

    steps: int
    """Optimizer steps of the whole run so far."""
    stopped_by: Literal["max_steps", "signal"]
    """Why it returned; a signal is Ctrl-C, SIGTERM or SIGHUP."""
    signal_number: int | None
    """The signal; None if it stopped by max_steps."""
    first_losses: Mapping[str, float]
    """Means over this call's first few steps, by metric name."""
    last_losses: Mapping[str, float]
    """Means of the newest log."""
    first_val_losses: Mapping[str, float]
    """This call's first held-out losses; empty without a val_loader."""
    last_val_losses: Mapping[str, float]
    """The newest held-out losses."""
    samples_per_sec: float
    """Speed in the newest log."""
    data_wait_fraction: float
    """Share of the time in which the device waited for data, in the newest log."""
    skipped_samples: int
    """Corrupt training samples that were substituted, in the whole run."""
    skipped_val_samples: int
    """Corrupt held-out samples that the newest held-out losses exclude."""
    skipped_steps: int
    """Skipped steps of this call: not finite, or spikes."""
    checkpoint: Path | None
    """The newest checkpoint of this call."""
    log_dir: Path
    """This run's TensorBoard folder."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """What one call of ``Trainer.train`` has measured so far."""

    meter: StepMeter
    began_s: float = field(default_factory=time.perf_counter)
    time_to_first_batch_s: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the newest log."""
    first_val_losses: Mapping[str, float] = field(default_factory=dict)
    held_out: HeldOut = field(default_factory=HeldOut)
    """The newest evaluation."""
    skipped_steps: int = 0

    def summary(
        self,
        *,
        steps: int,
        signal_number: int | None,
        skipped_samples: int,
        checkpoint: Path | None,
        log_dir: Path,
    ) -> TrainSummary:
        """Return the summary at the end of the call."""
        metrics = self.metrics
        return TrainSummary(
            steps=steps,
            stopped_by="max_steps" if signal_number is None else "signal",
            signal_number=signal_number,
            first_losses=self.meter.first_losses(),
            last_losses={n: v for n, v in metrics.items() if n.startswith("loss_")},
            first_val_losses=self.first_val_losses,
            last_val_losses=self.held_out.losses,
            samples_per_sec=metrics.get("samples_per_sec", 0.0),
            data_wait_fraction=metrics.get("data_wait_fraction", 0.0),
            skipped_samples=skipped_samples,
            skipped_val_samples=len(self.held_out.skipped),
            skipped_steps=self.skipped_steps,
            checkpoint=checkpoint,
            log_dir=log_dir,
        )
