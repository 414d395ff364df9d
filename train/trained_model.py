"""A trained creature as a checkpoint keeps it: the model and what it needs to read a session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from shared.config import make_section
from shared.errors import CheckpointError, ConfigError
from shared.media.tokenizer import TextTokenizer, parse_tokenizer
from shared.recipe import Recipe
from train.checkpoints import load_checkpoint
from train.config import TrainConfig, as_train_config
from train.data.batch import WindowShapes
from train.model.baselines import Baselines
from train.model.multimodal import MultiModalCreature, dimensions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
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


def load_trained_model(path: Path, *, device: torch.device) -> TrainedModel:
    """Read a checkpoint for inference; it may come from anyone.

    Nothing in it is run, and it takes no more memory than its file is long: weights that are
    larger, or a configuration of more layers than there are weights for, are refused.

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
    weights = _check_weights(path, state["model"])
    try:
        config, recipe = as_train_config(state["config"]), make_section(Recipe, extra["recipe"])
        tokenizer = parse_tokenizer(extra["tokenizer"], origin="tokenizer")
        shapes = WindowShapes(**state["shapes"])
        if shapes != WindowShapes.from_recipe(recipe, tick_rate_hz=config.model.tick_rate_hz):
            raise ConfigError("its window shapes are not those of its recipe")
        baselines = _baselines_of(extra, config, shapes)
        if dimensions(config.model)[1] + config.model.vision_layers > len(weights):
            raise ConfigError("its configuration has more layers than it has weights")
        with torch.device("meta"):  # no time is lost on initial weights
            model = MultiModalCreature(config, shapes)
        model.load_state_dict(weights, assign=True)
    # A foreign file can hold anything anywhere; these are what wrong values come to.
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its parts don't make a creature: {str(error)[:400]}; take a checkpoint that "
            "`python -m train run` wrote"
        ) from error
    return TrainedModel(
        model=model.to(device).eval(),
        recipe=recipe,
        tokenizer=tokenizer,
        baselines=baselines,
        step=int(state["step"]),
    )


def _check_weights(path: Path, weights: object) -> dict[str, Tensor]:
    """Weights as plain tensors that together are no larger than the file.

    Raises:
        CheckpointError: they are something else.
    """
    tensors = list(weights.values()) if isinstance(weights, dict) else [None]
    is_plain = all(
        isinstance(t, Tensor)
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and t.is_floating_point()
        for t in tensors
    )
    if not is_plain or sum(t.nbytes for t in tensors if t is not None) > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its weights are no plain tensors, or larger than the file itself; take a "
            "checkpoint that `python -m train run` wrote"
        )
    return cast(dict[str, Tensor], weights)


def checkpoint_extras(loader: object) -> dict[str, Any]:
    """Recipe and tokenizer of a loader's source as plain values: what inference needs to read
    sessions as training did.

    Args:
        loader: a :class:`train.data.loader.Loader`, or a plain DataLoader over a
            :class:`train.data.session_source.RealMultiModalDataset` (or a Subset of one).

    Returns:
        "recipe" and "tokenizer"; nothing where the loader has no such source.
    """
    source = getattr(_innermost(loader), "source", None)
    recipe, tokenizer = getattr(source, "recipe", None), getattr(source, "tokenizer", None)
    if not isinstance(recipe, Recipe) or not isinstance(tokenizer, TextTokenizer):
        return {}
    return {"recipe": recipe.as_json(), "tokenizer": tokenizer.json}


def check_windows(loader: object, config: TrainConfig) -> None:
    """Refuse a loader whose windows are laid out for another configuration.

    Raises:
        ConfigError: its text is packed densely and the configuration's is not, or the other way
            round; or its ticks have another rate.
    """
    own = getattr(_innermost(loader), "config", None)
    if not isinstance(own, TrainConfig):
        return
    there, here = (
        f"{'text alone, densely packed' if c.is_text_only else 'ticks'} at "
        f"{c.model.tick_rate_hz:g} Hz"
        for c in (own, config)
    )
    if there != here:
        raise ConfigError(
            f"the loader's dataset gives {there}, the trainer's configuration asks for {here}; "
            "make it by RealMultiModalDataset(..., config=config)"
        )


def _innermost(loader: Any) -> object:  # noqa: ANN401 (whatever wraps a dataset)
    """A loader of ours, or the dataset at the bottom of another one."""
    while not hasattr(loader, "source") and hasattr(loader, "dataset"):
        loader = loader.dataset
    return loader


def _baselines_of(extra: Mapping[str, Any], config: TrainConfig, shapes: WindowShapes) -> Baselines:
    """Fitted on the train split, or else from its statistics, or else only those without counts."""
    if "baselines" in extra:
        return Baselines.from_dict(extra["baselines"], config=config, shapes=shapes)
    return Baselines.from_statistics(extra.get("statistics", {}), config=config, shapes=shapes)
