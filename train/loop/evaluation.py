"""Measure a model on held-out batches: exact losses, corrupt samples, and one window to log."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from train.data.batch_maker import CorruptSampleBudget
from train.data.device import to_device
from train.loop.sample_logging import pick_window
from train.machine import distributed
from train.model.losses import loss_sums, mean_losses, sum_by_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from train.data.batch import Batch
    from train.loop.sample_logging import LoggedWindow
    from train.loop.state import TrainState


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The result of one pass over held-out batches; the same on every rank, but for the window."""

    losses: Mapping[str, float] = field(default_factory=dict)
    """loss_total and loss_<head>; empty if there was no batch."""
    skipped: Sequence[Mapping[str, Any]] = ()
    """Corrupt samples, each once; they do not count in the losses."""
    window: LoggedWindow | None = None
    """A window of this rank's first batch."""


def evaluate(
    batches: Iterable[Batch], predict: Callable[[Batch], dict[str, Tensor]], state: TrainState
) -> HeldOut:
    """Run a model over this rank's share of the held-out batches.

    `predict`: gives the model's outputs for a batch, by head; it must not draw random numbers
        from the training's generators.
    """
    objective, window = state.objective, None
    reports: list[tuple[int, Sequence[Mapping[str, Any]]]] = []
    sums_per_batch = []
    for batch in batches:
        outputs = predict(batch)
        sums = loss_sums(outputs, batch["targets"], batch["weight"], objective=objective)
        sums_per_batch.append(sums)
        reports.append(members_read(batch))
        if len(sums_per_batch) == 1:
            window = pick_window(batch, outputs, shapes=state.shapes)
    if not sums_per_batch:
        return HeldOut()
    budget = CorruptSampleBudget(max_fraction=state.config.data.max_bad_fraction)
    skipped = [each for report in distributed.gather(reports) for each in budget.add(*report)]
    budget.check()
    totals, counts = (
        distributed.sum_over_ranks(
            sum_by_name({name: pair[i] for name, pair in sums.items()} for sums in sums_per_batch)
        )
        for i in (0, 1)
    )
    losses = mean_losses({n: (totals[n], counts[n]) for n in totals}, objective=objective)
    return HeldOut(
        losses={name: float(loss) for name, loss in losses.items()}, skipped=skipped, window=window
    )


def members_read(batch: Batch) -> tuple[int, Sequence[Mapping[str, Any]]]:
    """Return how many members a batch was read from, and its corrupt samples.

    A batch that does not say it counts as one member per sample.
    """
    return batch.get("num_members", len(batch["weight"])), batch.get("skipped", ())


def iter_one_epoch(
    loader: Iterable[Batch], device: torch.device, *, max_batches: int
) -> Iterator[Batch]:
    """Iterate over at most `max_batches` batches on the device, all of the first one's epoch."""
    epochs = set()
    for batch in itertools.islice(loader, max_batches):
        epochs.add(batch.get("epoch"))
        if len(epochs) > 1:
            return
        yield to_device(batch, device)
