"""How well a creature foresaw a session: its losses beside those of the baselines, and how long a
tick took.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from train.config import HEAD_STREAM, Head
from train.model.baselines import compare
from train.model.losses import loss_sums, mean_losses

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from shared.session.scan import SessionScan
    from train.infer.stream import Streamed
    from train.trained_model import TrainedModel


class Score:
    """Losses of the model and of its baselines over the windows of a session, and latencies."""

    def __init__(self, creature: TrainedModel) -> None:
        self.latencies_ms: list[float] = []
        """Of every tick, from its inputs to its choices."""
        self._creature = creature
        self._sums: dict[str, Tensor] = {}

    def add(self, streamed: Streamed, batch: Mapping[str, Any]) -> None:
        """Count a window."""
        self.latencies_ms += streamed.latencies_ms
        targets, weight = batch["targets"], batch["weight"]
        sums = loss_sums(streamed.outputs, targets, weight, config=self._creature.config)
        for name, pair in {**sums, **self._creature.baselines.losses(batch)}.items():
            both = torch.stack([part.double().cpu() for part in pair])
            self._sums[name] = self._sums[name] + both if name in self._sums else both

    def as_json(self, scan: SessionScan) -> dict[str, Any]:
        """Plain values: losses, reasons, baselines, comparison, tick_latency_ms.

        Args:
            scan: says why streams are missing.
        """
        means = {name: _mean(both) for name, both in self._sums.items()}
        config = self._creature.config
        losses = {f"loss_{head}": means[f"loss_{head}"] for head in config.heads}
        baselines = {name: loss for name, loss in means.items() if name not in losses}
        reasons = {
            f"loss_{head}": self._reason(head, scan)
            for head in config.heads
            if losses[f"loss_{head}"] is None
        }
        total = None
        if reasons:
            reasons["loss_total"] = f"it has no sum without {', '.join(reasons)}"
        else:
            sums = {name: (self._sums[name][0], self._sums[name][1]) for name in losses}
            total = float(mean_losses(sums, config=config)["loss_total"])
        rows = compare(losses, baselines)
        tick_ms = 1e3 / self._creature.shapes.tick_rate_hz
        return {
            "losses": {"loss_total": total, **losses},
            "reasons": reasons,
            "baselines": baselines,
            "comparison": [dataclasses.asdict(row) for row in rows],
            "tick_latency_ms": summarize_latencies(self.latencies_ms, tick_ms=tick_ms),
        }

    def _reason(self, head: Head, scan: SessionScan) -> str:
        """Why a head has no loss."""
        if self._sums[f"loss_{head}"][1] > 0:
            return "the model's predictions are not finite"
        stream = HEAD_STREAM[head]
        return scan.absent.get(stream, f"no tick with {stream} follows another tick")


def summarize_latencies(latencies_ms: list[float], *, tick_ms: float) -> dict[str, float]:
    """What a life in real time must know of its ticks' latencies.

    Args:
        latencies_ms: of all ticks.
        tick_ms: how long a tick lasts; a creature that takes longer falls behind.

    Returns:
        p50, p95 and p99 of all ticks but the first, which warms the machine up; "first", that one;
        "tick", the time there is; "share_in_time", of ticks that took no longer.
    """
    later = np.array(latencies_ms[1:] or latencies_ms)
    shares = {f"p{share}": float(np.percentile(later, share)) for share in (50, 95, 99)}
    return {
        **shares,
        "first": latencies_ms[0],
        "tick": tick_ms,
        "share_in_time": float((later <= tick_ms).mean()),
    }


def _mean(both: Tensor) -> float | None:
    """Sum over count; None where nothing was counted or the model gives no numbers."""
    mean = float(both[0] / both[1]) if both[1] > 0 else math.nan
    return mean if math.isfinite(mean) else None
