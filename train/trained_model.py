"""TrainedModel: a checkpoint's model, with the recipe and tokenizer that it reads sessions by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from shared.config import make_section
from shared.errors import CheckpointError, ConfigError
from shared.media.tokenizer import TextTokenizer, parse_tokenizer
from shared.recipe import Recipe
from train.checkpoints import load_checkpoint, shape_differences
from train.config import TrainConfig, as_train_config
from train.model.baselines import Baselines
from train.model.multimodal import MultiModalCreature, dimensions
from train.shapes import WindowShapes

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """Everything of a checkpoint that inference needs."""

    model: MultiModalCreature
    """In evaluation mode, on its device."""
    recipe: Recipe
    tokenizer: TextTokenizer
    baselines: Baselines
    step: int
    """Optimizer steps that it was trained for."""
    untrained: frozenset[str]
    """Heads that never had a target."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads whose predictions mean something."""
        return tuple(head for head in self.shapes.heads if head not in self.untrained)

    @property
    def config(self) -> TrainConfig:
        """The training configuration."""
        return self.model.config

    @property
    def shapes(self) -> WindowShapes:
        """Sizes of the model's windows."""
        return self.model.shapes

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.model.parameters()).device


def load_trained_model(path: Path, *, device: torch.device) -> TrainedModel:
    """Read a checkpoint for inference, from an untrusted source if need be.

    No code in it is run, and it needs no more memory than its file is long: larger weights, or a
    configuration of more layers than there are weights for, are refused.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or without recipe or tokenizer.
    """
    state = load_checkpoint(path)
    extra = state.get("extra") or {}
    if missing := {"recipe", "tokenizer"} - extra.keys():
        raise CheckpointError(
            f"{path}: the checkpoint lacks its {' and '.join(sorted(missing))}, so sessions cannot "
            "be read as for training; fix: train by `python -m train run`, or pass both in "
            "Trainer(checkpoint_extra=...)"
        )
    weights = _check_weights(path, state["model"])
    try:
        config, recipe = as_train_config(state["config"]), make_section(Recipe, extra["recipe"])
        tokenizer = parse_tokenizer(extra["tokenizer"], origin="tokenizer")
        shapes = WindowShapes.from_json(state["shapes"])
        expected = WindowShapes.from_recipe(recipe, config)
        if shapes != expected:
            differences = shape_differences(shapes, expected) or ["windows of another length"]
            raise ConfigError(f"its shapes do not match its recipe: {'; '.join(differences)}")
        if dimensions(config.model)[1] + config.model.vision_layers > len(weights):
            raise ConfigError("its configuration has more layers than it has weights")
        with torch.device("meta"):  # initial weights would take time
            model = MultiModalCreature(config, shapes)
        model.load_state_dict(weights, assign=True)
        untrained = frozenset(map(str, extra.get("untrained_heads", ())))
        baselines = Baselines.from_dict(extra.get("baselines", {}), objective=model.objective)
    # A file from elsewhere can hold anything; wrong values raise any of these errors.
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its content does not make a model: {str(error)[:400]}; fix: use a checkpoint "
            "that `python -m train run` wrote"
        ) from error
    return TrainedModel(
        model=model.to(device).eval(),
        recipe=recipe,
        tokenizer=tokenizer,
        baselines=baselines,
        step=int(state["step"]),
        untrained=untrained & model.shapes.targets.keys(),
    )


def _check_weights(path: Path, weights: object) -> dict[str, Tensor]:
    """Return the weights if they are plain tensors that together are no larger than the file."""
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
            f"{path}: its weights are not plain tensors, or larger than the file; fix: use a "
            "checkpoint that `python -m train run` wrote"
        )
    return cast(dict[str, Tensor], weights)


def checkpoint_extras(loader: object) -> dict[str, Any]:
    """Return recipe and tokenizer of a loader's source as plain values; {} if it has none.

    Inference needs them to read sessions as training did. The loader is a
    :class:`train.data.loader.Loader`, or a plain DataLoader over a
    :class:`train.data.session_source.RealMultiModalDataset` (or a Subset of one).
    """
    source = getattr(innermost(loader), "source", None)
    recipe, tokenizer = getattr(source, "recipe", None), getattr(source, "tokenizer", None)
    if not isinstance(recipe, Recipe) or not isinstance(tokenizer, TextTokenizer):
        return {}
    return {"recipe": recipe.as_json(), "tokenizer": tokenizer.json}


def check_windows(loader: object, config: TrainConfig) -> None:
    """Refuse a loader whose windows are made for another configuration.

    Raises:
        ConfigError: one of the two packs text densely and the other does not, or their tick rates
            differ.
    """
    inner = innermost(loader)
    recipe = getattr(getattr(inner, "source", None), "recipe", None)
    shapes = getattr(inner, "shapes", None)
    if not isinstance(recipe, Recipe) or not isinstance(shapes, WindowShapes):
        return
    loader_windows, own_windows = (
        f"{'text alone, densely packed' if each.is_text_only else 'ticks'} at "
        f"{each.tick_rate_hz:g} Hz"
        for each in (shapes, WindowShapes.from_recipe(recipe, config))
    )
    if loader_windows != own_windows:
        raise ConfigError(
            f"the loader's dataset yields {loader_windows}, but the trainer's configuration needs "
            f"{own_windows}; fix: make the dataset by RealMultiModalDataset(..., config=config)"
        )


def innermost(loader: Any) -> object:  # noqa: ANN401 (whatever wraps a dataset)
    """Unwrap DataLoaders and Subsets down to a Loader of this package, or to the dataset."""
    while not hasattr(loader, "source") and hasattr(loader, "dataset"):
        loader = loader.dataset
    return loader
