"""What a call of ``Trainer.train`` has come to: while it runs, and as its result."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from train.loop.evaluation import HeldOut

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from train.loop.meter import StepMeter


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
