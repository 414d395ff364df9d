"""Everything that a step changes, saved and loaded whole: weights, moments, scale, counters."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import train.checkpoints as checkpoint
from shared.errors import CheckpointError, ConfigError
from shared.recipe import Recipe
from train.config import ModelConfig, TrainConfig
from train.data.batch import WindowShapes
from train.loop.optim import restore_optimizer
from train.machine import distributed, runtime
from train.machine.parallel import shares_of, whole
from train.model.multimodal import dimensions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from torch import nn

    from train.config import TrainingConfig
    from train.data.batch_maker import CorruptSampleBudget
    from train.loop.optim import SpikeWatch


RESUMED_KEYS: Final = frozenset(
    {"optimizer", "scaler", "schedule", "rng", "stream", "run_name", "skipped_samples"}
)
"""Keys of a checkpoint that inference does without, and going on from it does not."""


_NO_WEIGHTS: Final = frozenset({"dropout", "modality_dropout", "gradient_checkpointing"})
"""Keys of the model that change no weight's shape."""


@dataclass(slots=True, kw_only=True)
class TrainState:
    """What a checkpoint holds, besides the random states and the stream's position."""

    model: nn.Module
    """Uncompiled, on its device."""
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    spikes: SpikeWatch
    config: TrainConfig
    shapes: WindowShapes
    bad_samples: CorruptSampleBudget
    """Counts of the whole run: bad samples that were replaced, and all that were read."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Plain values that make a checkpoint usable without the data, such as the tokenizer."""
    run_name: str | None = None
    """Folder of the run's curves, so that a resumed run goes on in it."""
    step: int = 0
    """Optimizer steps done."""
    samples_of: Counter[str] = field(default_factory=Counter)
    """Of a mix: samples that each set has given."""

    def save(
        self,
        path: Path | str,
        *,
        stream: Mapping[str, Any] | None,
        write: Callable[[Path | str, Mapping[str, Any]], Path] = checkpoint.save_checkpoint,
    ) -> Path:
        """Save everything that going on from here needs; all ranks call it, the main one writes.

        Whatever the ranks hold, the file has the whole model and its whole moments.

        Args:
            path: the file.
            stream: position of the batches trained on, from ``BatchFeed.state``.
            write: writes a file.

        Raises:
            CheckpointError: it could not be written.
        """
        state = {
            "format_version": checkpoint.FORMAT_VERSION,
            "step": self.step,
            "saved_at": time.time(),
            "model": whole(self.model.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": runtime.scaler_state(self.scaler, num_ranks=distributed.world_size()),
            "spikes": self.spikes.state_dict(),
            "schedule": schedule_dict(self.config.training),
            "rng": runtime.rng_state(),
            "rng_of_other_ranks": distributed.gather([runtime.rng_state()])[1:],
            "stream": stream,
            "config": self.config.model_dump(mode="json"),
            "shapes": dataclasses.asdict(self.shapes),
            "run_name": self.run_name,
            "skipped_samples": self.bad_samples.num_bad,
            "read_samples": self.bad_samples.num_read,
            "samples_of": dict(self.samples_of),
            "extra": self.extra,
        }
        return distributed.on_main(lambda: write(path, state))

    def load(
        self,
        path: Path | str,
        *,
        device: torch.device,
        check_stream: Callable[[Mapping[str, Any]], object],
    ) -> dict[str, Any]:
        """Take over a checkpoint; a run name that was given stays, and that of a checkpoint in
        another folder is left to the run that wrote it.

        Args:
            path: the file.
            device: where the weights go.
            check_stream: raises where the position of the batches can't be gone on from.

        Returns:
            What is not of this object: "rng" (None for a rank that there was not), "stream" and
            "schedule".

        Raises:
            CheckpointError: missing, damaged, foreign, or of another model.
        """
        state = self._read(path, device=device)
        if missing := RESUMED_KEYS - state.keys():
            raise CheckpointError(
                f"{path}: it lacks {', '.join(sorted(missing))}, so a training can't go on from "
                "it; take a checkpoint that `python -m train run` wrote"
            )
        check_stream(state["stream"])  # before anything is taken over
        with self._explained(path, state):
            self._load_model(state)
            restore_optimizer(self.optimizer, state["optimizer"], self.config.training.optimizer)
        ranks = distributed.world_size()
        runtime.set_scaler_state(self.scaler, state["scaler"], num_ranks=ranks)
        if "spikes" in state:
            self.spikes.load_state_dict(state["spikes"])
        self.step = int(state["step"])
        self.bad_samples.num_bad = int(state["skipped_samples"])
        per_step = self.config.data.batch_size * self.config.training.accumulation_steps
        self.bad_samples.num_read = int(state.get("read_samples", self.step * per_step))
        self.samples_of = Counter(state.get("samples_of", {}))
        save_dir = self.config.training.checkpointing.save_dir
        if Path(path).resolve().parent == save_dir.resolve():  # else it is another run's
            self.run_name = self.run_name or state["run_name"]
        rngs = dict(enumerate([state["rng"], *state.get("rng_of_other_ranks", [])]))
        rng = rngs.get(distributed.rank())
        return {"rng": rng, "stream": state["stream"], "schedule": state["schedule"]}

    def load_weights(self, path: Path | str, *, device: torch.device) -> bool:
        """Take over a checkpoint's weights and nothing else.

        Returns:
            Whether tokens mean the same there and here, as far as both tell.

        Raises:
            CheckpointError: missing, damaged, foreign, or of another model.
        """
        state = self._read(path, device=device)
        with self._explained(path, state):
            self._load_model(state)
        there, here = (extra.get("tokenizer") for extra in (state.get("extra") or {}, self.extra))
        return there is None or here is None or there == here

    def _read(self, path: Path | str, *, device: torch.device) -> dict[str, Any]:
        distributed.on_main(lambda: checkpoint.check_checkpoint(path))
        # What is to be cut into shares may not fit a device; ranks of a machine share its pages.
        is_cut = distributed.world_size() > 1 and self.config.training.parallel == "fsdp"
        place = "cpu" if is_cut else device
        return checkpoint.read_checkpoint(path, map_location=place, mmap=is_cut)

    def _load_model(self, state: Mapping[str, Any]) -> None:
        self._check_dimensions(state["config"])
        self.model.load_state_dict(shares_of(state["model"], self.model.state_dict()))

    @contextlib.contextmanager
    def _explained(self, path: Path | str, state: Mapping[str, Any]) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: the checkpoint is of another model ({self._difference(state, error)}); "
                "use the configuration that it was trained with"
            ) from error

    def _check_dimensions(self, config: Mapping[str, Any]) -> None:
        """Compare what makes another model of weights of the same shapes.

        Raises:
            ValueError: a number of heads or a rate of ticks differs.
        """
        known = {k: v for k, v in config["model"].items() if k in ModelConfig.model_fields}
        there, here = ModelConfig.model_validate(known), self.config.model
        for name, one, other in (
            ("num_heads", dimensions(there)[2], dimensions(here)[2]),
            ("tick_rate_hz", there.tick_rate_hz, here.tick_rate_hz),
        ):
            if one != other:
                raise ValueError(f"{name} {one} there, {other} here")

    def _difference(self, state: Mapping[str, Any], error: Exception) -> str:
        """The configuration keys that differ, or else torch's words."""
        here = {
            **_making_weights(self.config.model_dump(mode="json")),
            **dataclasses.asdict(self.shapes),
        }
        there = {**_making_weights(state["config"]), **state["shapes"]}
        differing = [
            f"{key} {there.get(key)} there, {value} here"
            for key, value in here.items()
            if there.get(key) != value
        ]
        return "; ".join(differing) or " ".join(str(error).split())[:400]


def _making_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a configuration that decide which weights there are, and their shapes."""
    model = {k: v for k, v in config["model"].items() if k not in _NO_WEIGHTS}
    weights = config["training"].get("loss_weights", {})
    return {
        "data.modalities": config["data"].get("modalities"),
        "losses that count:": sorted(head for head, weight in weights.items() if weight),
        **model,
    }


def schedule_dict(training: TrainingConfig) -> dict[str, float]:
    """What the learning rate follows, for a resumed run to compare with its own."""
    optimizer = training.optimizer
    return {
        "lr": optimizer.lr,
        "warmup_steps": optimizer.warmup_steps,
        "min_lr_ratio": optimizer.min_lr_ratio,
        "max_steps": training.max_steps,
    }


def require_heads(model: nn.Module, config: TrainConfig) -> None:
    """Refuse losses of what a model does not predict.

    Raises:
        ConfigError: it names the heads and both mends.
    """
    own = getattr(model, "config", None)
    if not isinstance(own, TrainConfig):  # a model of the user's may predict anything
        return
    if lacking := [head for head in config.heads if head not in own.heads]:
        raise ConfigError(
            f"the configuration has losses of {', '.join(lacking)}, which the model does not "
            "predict; make it by MultiModalCreature(config, shapes) with the same configuration, "
            f"or set training.loss_weights.{lacking[0]}: 0"
        )


def window_shapes(model: nn.Module) -> WindowShapes:
    """The window shapes that a model was made for; the default recipe's where it does not say."""
    shapes = getattr(model, "shapes", None)
    return shapes if isinstance(shapes, WindowShapes) else WindowShapes.from_recipe(Recipe())
