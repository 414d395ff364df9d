"""Measure how much each head's loss rises without each input modality.

A trained model predicts the held-out sessions once with all modalities, and once without each of
them. The missing one is masked, as in a session that does not have it; targets, ticks and weights
stay the same. Differences are paired by window, which gives their standard error.

The result shows what the heads need if the model was trained with ``model.modality_dropout``. Any
other model has never seen an input without the modality.
"""

# ruff: noqa: N803, N806  (shape letters: N windows, B windows of a batch)
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shared.errors import ConfigError, ShardError
from shared.streams import Kind
from train.checkpoints import shape_differences
from train.data.device import to_device
from train.data.loader import Loader, open_source
from train.data.pixels import to_model_inputs
from train.machine.runtime import choose_device
from train.model.encoders import modalities, without
from train.model.losses import loss_sums
from train.trained_model import load_trained_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from train.config import DataConfig
    from train.model.losses import Objective
    from train.model.multimodal import MultiModalCreature
    from train.trained_model import TrainedModel

NOISE: Final = 2.0
"""A difference of more standard errors than this counts as real."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Effect of a missing modality on a head."""

    missing: str
    """A name of :func:`train.model.encoders.modalities`."""
    head: str
    loss: float
    """Without the modality."""
    difference: float
    """That loss minus the one with all modalities."""
    error: float
    """Standard error of the difference over windows; infinite for a single window."""

    @property
    def is_worse(self) -> bool:
        """Whether the loss rose by more than noise."""
        return self.difference > NOISE * self.error


def run_ablation(checkpoint: Path, *, data: DataConfig | None = None, device: str = "auto") -> None:
    """Measure a checkpoint on held-out sessions and print the table.

    `data`: names other data, with the same streams; None uses the training's data.
    """
    trained = load_trained_model(checkpoint, device=choose_device(device))
    losses, effects = ablate(trained.model, _held_out(trained, data), device=trained.device)
    Console(markup=False).print(
        _table(losses, effects, title=f"{checkpoint}, step {trained.step}: held-out sessions")
    )


@torch.no_grad()
def ablate(
    model: MultiModalCreature, batches: Iterable[Mapping[str, Any]], *, device: torch.device
) -> tuple[dict[str, float], list[Effect]]:
    """Measure each head's loss with all modalities, and the effect of each input modality on it.

    Effects are ordered by modality, then by head. A head without a valid target is left out.
    """
    groups, objective = modalities(model.shapes), model.objective
    # By missing modality; "" is the pass with all of them.
    windows_by_missing: dict[str, list[dict[str, Tensor]]] = {n: [] for n in ("", *groups)}
    for batch in batches:
        moved = to_device(batch, device)
        inputs = to_model_inputs(moved["inputs"])
        for name, windows in windows_by_missing.items():
            outputs = model(without(inputs, groups.get(name, ())))
            windows.append(_window_sums(outputs, moved, objective=objective))
    sums = {
        missing: {name: torch.cat([each[name] for each in windows], dim=1) for name in windows[0]}
        for missing, windows in windows_by_missing.items()
    }
    heads = [head for head, sums_2N in sums[""].items() if sums_2N[1].sum() > 0]
    losses = {head: float(sums[""][head][0].sum() / sums[""][head][1].sum()) for head in heads}
    effects = [
        _effect(sums[""][head], sums[name][head], missing=name, head=head)
        for name in groups
        for head in heads
    ]
    return losses, effects


def _held_out(trained: TrainedModel, data: DataConfig | None) -> Loader:
    """Load held-out batches with the model's modalities and windows."""
    training_data = trained.config.data
    data = data or training_data
    kept = {"modalities": training_data.modalities, "window": training_data.window}
    data = data.model_copy(update=kept)
    config = trained.config.model_copy(update={"data": data})
    source = open_source(config, split="val")
    if int(source.shard_sizes.sum()) == 0:
        raise ShardError(
            f"{data.source_description}: no session is held out; fix: set split in its recipe"
        )
    loader = Loader(source, config, is_shuffled=False, num_epochs=1)
    differences = shape_differences(trained.shapes, loader.shapes)
    if trained.shapes.of_kind(Kind.TEXT) and source.tokenizer.json != trained.tokenizer.json:
        differences.append("its tokenizer is another one")
    if differences:
        raise ConfigError(
            f"{data.source_description} does not fit the checkpoint: {'; '.join(differences)}; "
            "fix: name the set that it was trained on, or one of the same streams built with its "
            "text.tokenizer"
        )
    return loader


def _window_sums(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Any], *, objective: Objective
) -> dict[str, Tensor]:
    """Weighted sum and count of each window per head, float64 [2, B] on the CPU."""
    windows = []
    for row in range(len(batch["weight"])):
        one = slice(row, row + 1)
        sums = loss_sums(
            {name: output[one] for name, output in outputs.items()},
            {name: target[one] for name, target in batch["targets"].items()},
            batch["weight"][one],
            objective=objective,
        )
        windows.append({name: torch.stack(pair).double().cpu() for name, pair in sums.items()})
    return {
        name.removeprefix("loss_"): torch.stack([window[name] for window in windows], dim=1)
        for name in windows[0]
    }


def _effect(with_2N: Tensor, without_2N: Tensor, *, missing: str, head: str) -> Effect:
    """Difference of two weighted means over the same windows, and its error by linearization.

    Source: Cochran 1977, Sampling Techniques, chapter 6 (ratio estimates).
    """
    counts_N = with_2N[1]
    rises_N = without_2N[0] - with_2N[0]
    total, num_windows = counts_N.sum(), int((counts_N > 0).sum())
    difference = rises_N.sum() / total
    spread = (rises_N - difference * counts_N).square().sum().sqrt() / total
    return Effect(
        missing=missing,
        head=head,
        loss=float(without_2N[0].sum() / total),
        difference=float(difference),
        error=float(spread) * math.sqrt(num_windows / (num_windows - 1))
        if num_windows > 1
        else math.inf,
    )


def _table(losses: Mapping[str, float], effects: Sequence[Effect], *, title: str) -> Table:
    """Make a table with a row per missing modality and a column per head."""
    caption = f"difference to that ± its standard error; * worse by more than {NOISE:g} of them"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.show_edge = False  # or it would not fit into 80 columns
    for name in ("missing", *losses):
        table.add_column(name, justify="left" if name == "missing" else "right")
    table.add_row("nothing", *(f"{loss:.4f} " for loss in losses.values()), end_section=True)
    for missing in dict.fromkeys(effect.missing for effect in effects):
        row = [effect for effect in effects if effect.missing == missing]
        table.add_row(missing, *(_cell(effect) for effect in row))
    return table


def _cell(effect: Effect) -> str:
    mark = "*" if effect.is_worse else " "
    return f"{effect.difference:+.3f}±{effect.error:.3f}{mark}"
