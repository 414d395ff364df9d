"""Held-out batches measured: exact losses, what was bad among the samples, and a window to show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from train.data.batch_maker import CorruptSampleBudget
from train.loop.sample_logging import pick_window
from train.machine import distributed
from train.model.losses import added, loss_sums, mean_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from train.data.batch import Batch
    from train.loop.sample_logging import LoggedWindow
    from train.loop.state import TrainState


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What one pass over the held-out batches found, the same on every rank but for the window."""

    losses: Mapping[str, float] = field(default_factory=dict)
    """loss_total and loss_<head>; empty where there was no batch."""
    skipped: Sequence[Mapping[str, Any]] = ()
    """Bad samples, each once; the losses leave them out."""
    window: LoggedWindow | None = None
    """The first one, of this rank."""


def measure(
    batches: Iterable[Batch], predict: Callable[[Batch], dict[str, Tensor]], state: TrainState
) -> HeldOut:
    """Run a model over this rank's share of the held-out batches.

    Args:
        batches: on the device.
        predict: a batch's outputs by head; draws no random number of the training's.
        state: of the run.

    Raises:
        TooManyCorruptSamplesError: more of all ranks' samples are bad than
        ``data.max_bad_fraction``.
    """
    config, window, num_read = state.config, None, 0
    skipped: list[Mapping[str, Any]] = []
    parts = []
    for batch in batches:
        outputs = predict(batch)
        parts.append(loss_sums(outputs, batch["targets"], batch["weight"], config=config))
        num_read += len(batch["weight"])
        skipped += batch.get("skipped", ())
        if len(parts) == 1:
            window = pick_window(batch, outputs, state)
    if not parts:
        return HeldOut()
    skipped = distributed.gather(skipped)
    limit = CorruptSampleBudget(max_fraction=config.data.max_bad_fraction)
    limit.count(num_read * distributed.world_size(), skipped)
    sums = distributed.add_up(added({n: total for n, (total, _) in p.items()} for p in parts))
    counts = distributed.add_up(added({n: count for n, (_, count) in p.items()} for p in parts))
    losses = mean_losses({n: (sums[n], counts[n]) for n in sums}, config=config)
    return HeldOut(
        losses={name: float(loss) for name, loss in losses.items()}, skipped=skipped, window=window
    )
