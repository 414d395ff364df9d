"""A trained creature as a checkpoint keeps it: the model and what it needs to read a session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from shared.config import make_section
from shared.errors import CheckpointError
from shared.recipe import Recipe, WindowShapes, json_of
from shared.text import TextTokenizer, parse_tokenizer
from train.baselines import Baselines
from train.checkpoint import load_checkpoint
from train.config import TrainConfig, as_train_config
from train.model import MultiModalCreature

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Creature:
    """All of a checkpoint that inference needs."""

    model: MultiModalCreature
    """In evaluation mode, on its device."""
    recipe: Recipe
    """Of training."""
    tokenizer: TextTokenizer
    baselines: Baselines
    step: int
    """Optimizer steps that it was trained for."""

    @property
    def config(self) -> TrainConfig:
        """The training configuration."""
        return self.model.config

    @property
    def shapes(self) -> WindowShapes:
        """Sizes of a window."""
        return self.model.shapes

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def load_creature(path: Path, *, device: torch.device) -> Creature:
    """Read a checkpoint for inference.

    Raises:
        CheckpointError: missing, damaged, foreign, or without recipe and tokenizer.
    """
    state = load_checkpoint(path)
    extra = state.get("extra") or {}
    if missing := {"recipe", "tokenizer"} - extra.keys():
        raise CheckpointError(
            f"{path}: the checkpoint lacks its {' and '.join(sorted(missing))}, so a session can't "
            "be read as it was for training; train by `python -m train run`, or give "
            "Trainer(checkpoint_extra=...) both"
        )
    config, shapes = as_train_config(state["config"]), WindowShapes(**state["shapes"])
    with torch.device("meta"):  # no time is lost on initial weights
        model = MultiModalCreature(config, shapes)
    try:
        model.load_state_dict(state["model"], assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: its weights are not those of its configuration: {str(error)[:400]}"
        ) from error
    return Creature(
        model=model.to(device).eval(),
        recipe=make_section(Recipe, extra["recipe"], origin=f"{path}: recipe"),
        tokenizer=parse_tokenizer(extra["tokenizer"], origin=f"{path}: tokenizer"),
        baselines=_baselines_of(extra, config, shapes),
        step=int(state["step"]),
    )


def reading_of(loader: object) -> dict[str, Any]:
    """Recipe and tokenizer of a loader's source as plain values: what inference needs to read
    sessions as training did.

    Args:
        loader: a :class:`train.loader.Loader`, or a plain DataLoader over a
            :class:`train.dataset.RealMultiModalDataset` (or a Subset of one).

    Returns:
        "recipe" and "tokenizer"; nothing where the loader has no such source.
    """
    while not hasattr(loader, "source") and hasattr(loader, "dataset"):
        loader = loader.dataset
    source = getattr(loader, "source", None)
    recipe, tokenizer = getattr(source, "recipe", None), getattr(source, "tokenizer", None)
    if not isinstance(recipe, Recipe) or not isinstance(tokenizer, TextTokenizer):
        return {}
    return {"recipe": json_of(recipe), "tokenizer": tokenizer.json}


def _baselines_of(extra: Mapping[str, Any], config: TrainConfig, shapes: WindowShapes) -> Baselines:
    """Fitted on the train split, or else from its statistics, or else only those without counts."""
    if "baselines" in extra:
        return Baselines.from_dict(extra["baselines"], config=config, shapes=shapes)
    return Baselines.from_statistics(extra.get("statistics", {}), config=config, shapes=shapes)
