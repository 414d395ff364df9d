"""TrainState: everything that a step changes, saved and loaded whole."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.errors import CheckpointError, ConfigError
from shared.recipe import Recipe
from train.checkpoints import FORMAT_VERSION, check_checkpoint, read_checkpoint, shape_differences
from train.config import ModelConfig, TrainConfig
from train.data.batch_maker import CorruptSampleBudget
from train.loop.optim import SpikeWatch, make_optimizer, restore_optimizer
from train.machine import distributed, runtime
from train.machine.parallel import gather_state, shard_like
from train.model.losses import Objective
from train.model.multimodal import MultiModalCreature, dimensions
from train.shapes import WindowShapes, head_weight
from train.walkthrough import DEFAULT_HEADS, HEAD_OF_STREAM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from train.config import TrainingConfig


RESUMED_KEYS: Final = frozenset(
    {"optimizer", "scaler", "schedule", "rng", "stream", "run_name", "corrupt_members"}
)
"""Keys of a checkpoint that resuming needs and inference does not."""


_NO_WEIGHTS: Final = frozenset({"dropout", "modality_dropout", "gradient_checkpointing"})
"""Keys of the model's configuration that change no weight's shape."""


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The content of a checkpoint, except random states and the stream's position."""

    model: nn.Module
    """Not compiled, on its device."""
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    spikes: SpikeWatch
    config: TrainConfig
    shapes: WindowShapes
    corrupt_samples: CorruptSampleBudget
    """Members that the whole run has read, and the corrupt ones among them."""
    members_of_rank: int = 0
    """Members that this rank has read since the ranks' were last added up."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Plain values that make a checkpoint usable without the data, such as the tokenizer."""
    run_name: str | None = None
    """Folder name of the run's logs; a resumed run continues in the same folder."""
    step: int = 0
    """Optimizer steps done."""
    samples_of: Counter[str] = field(default_factory=Counter)
    """Samples read from each set of a mix, by the set's name."""

    @classmethod
    def initial(
        cls, model: nn.Module, config: TrainConfig, *, device: torch.device, dtype: torch.dtype
    ) -> TrainState:
        """Return the state before the first step.

        `model`: on its device and, with FSDP, sharded already.
        """
        training = config.training
        return cls(
            model=model,
            optimizer=make_optimizer(model, training.optimizer),
            scaler=runtime.make_scaler(device, dtype, num_ranks=distributed.world_size()),
            spikes=SpikeWatch(training.spike_sigma, device),
            config=config,
            shapes=window_shapes(model, config),
            corrupt_samples=CorruptSampleBudget(max_fraction=config.data.max_bad_fraction),
        )

    @property
    def objective(self) -> Objective:
        """What is learned: heads, weights, and scales of errors."""
        std = self.model.target_std if isinstance(self.model, MultiModalCreature) else None
        return Objective.from_config(self.config, self.shapes, std=std)

    def count_members(
        self, reports: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]
    ) -> list[Mapping[str, Any]]:
        """Count the members read on all ranks; return the corrupt samples whose member is new."""
        self.members_of_rank += sum(num_members for num_members, _ in reports)
        skipped = distributed.gather([each for _, corrupt in reports for each in corrupt])
        if not skipped:  # on most steps; then no numbers are exchanged
            return []
        self._add_up_members()
        return self.corrupt_samples.add(0, skipped)

    def _add_up_members(self) -> None:
        """Add the members that all ranks have read; they differ where streams are absent."""
        self.corrupt_samples.num_read += sum(distributed.gather([self.members_of_rank]))
        self.members_of_rank = 0

    def as_dict(self, stream: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return everything that resuming needs, as tensors and plain containers.

        All ranks call it. The model and the moments are complete on the main rank, even if ranks
        hold shards of them. `stream` is the position after the batches trained on.
        """
        self._add_up_members()
        return {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "saved_at": time.time(),
            "model": gather_state(self.model.state_dict()),
            "optimizer": gather_state(self.optimizer.state_dict()),
            "scaler": runtime.scaler_state(self.scaler, num_ranks=distributed.world_size()),
            "spikes": self.spikes.state_dict(),
            "schedule": schedule_dict(self.config.training),
            "rng": runtime.rng_state(),
            "rng_of_other_ranks": distributed.gather([runtime.rng_state()])[1:],
            "stream": stream,
            "config": self.config.model_dump(mode="json"),
            "shapes": self.shapes.as_json(),
            "run_name": self.run_name,
            "corrupt_members": [list(each) for each in self.corrupt_samples.corrupt],
            "read_members": self.corrupt_samples.num_read,
            "samples_of": dict(self.samples_of),
            "extra": self.extra,
        }

    def load(
        self,
        path: Path | str,
        *,
        device: torch.device,
        check_stream: Callable[[Mapping[str, Any]], object],
    ) -> dict[str, Any]:
        """Restore everything from a checkpoint.

        A run name that is already set stays. The name in a checkpoint is taken over only if the
        checkpoint is in this run's own folder; otherwise it belongs to the run that wrote it.

        `check_stream`: raises if the loader cannot resume at the position that it is given.

        Returns:
            What this object does not hold: "rng" (None for a rank that the saved run did not have),
            "stream" and "schedule".
        """
        state = self._read(path, device=device)
        if missing := RESUMED_KEYS - state.keys():
            raise CheckpointError(
                f"{path}: it lacks {', '.join(sorted(missing))}, so training cannot resume from "
                "it; fix: use a checkpoint that `python -m train run` wrote"
            )
        with self._explain_mismatch(path, state):
            self._check_model(state)
        check_stream(state["stream"])  # before anything is changed
        with self._explain_mismatch(path, state):
            self._load_model(state)
            restore_optimizer(self.optimizer, state["optimizer"], self.config.training.optimizer)
        ranks = distributed.world_size()
        runtime.set_scaler_state(self.scaler, state["scaler"], num_ranks=ranks)
        if "spikes" in state:
            self.spikes.load_state_dict(state["spikes"])
        self.step = int(state["step"])
        self.corrupt_samples.corrupt = set(map(tuple, state["corrupt_members"]))
        self.corrupt_samples.num_read, self.members_of_rank = int(state["read_members"]), 0
        self.samples_of = Counter(state.get("samples_of", {}))
        save_dir = self.config.training.checkpointing.save_dir
        if Path(path).resolve().parent == save_dir.resolve():
            self.run_name = self.run_name or state["run_name"]
        rngs = dict(enumerate([state["rng"], *state.get("rng_of_other_ranks", [])]))
        rng = rngs.get(distributed.rank())
        return {"rng": rng, "stream": state["stream"], "schedule": state["schedule"]}

    def load_weights(self, path: Path | str, *, device: torch.device) -> bool:
        """See :meth:`train.loop.trainer.Trainer.load_weights`."""
        state = self._read(path, device=device)
        with self._explain_mismatch(path, state):
            self._check_model(state)
            self._load_model(state)
        saved, own = ((extra or {}).get("tokenizer") for extra in (state.get("extra"), self.extra))
        return saved is None or own is None or saved == own

    def _read(self, path: Path | str, *, device: torch.device) -> dict[str, Any]:
        distributed.on_main(lambda: check_checkpoint(path))
        # A model that is to be sharded may not fit a device. Mapped, the ranks of a machine share
        # the file's pages.
        is_sharded = distributed.world_size() > 1 and self.config.training.parallel == "fsdp"
        target = "cpu" if is_sharded else device
        return read_checkpoint(path, map_location=target, mmap=is_sharded)

    def _load_model(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(shard_like(state["model"], self.model.state_dict()))

    @contextlib.contextmanager
    def _explain_mismatch(self, path: Path | str, state: Mapping[str, Any]) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: the checkpoint is of another model ({self._difference(state, error)}); "
                "fix: use the configuration that it was trained with"
            ) from error

    def _check_model(self, state: Mapping[str, Any]) -> None:
        """Compare what changes the model's meaning but not the shapes of its weights."""
        # The streams of a model of the user's are not known.
        if isinstance(self.model, MultiModalCreature) and self._shape_differences(state):
            raise ValueError("its streams differ")
        saved_values = state["config"]["model"]
        known = {k: v for k, v in saved_values.items() if k in ModelConfig.model_fields}
        saved, own = ModelConfig.model_validate(known), self.config.model
        for name, saved_value, own_value in (
            ("num_heads", dimensions(saved)[2], dimensions(own)[2]),
            ("tick_rate_hz", saved.tick_rate_hz, own.tick_rate_hz),
        ):
            if saved_value != own_value:
                raise ValueError(f"{name} {saved_value} in the checkpoint, {own_value} here")

    def _difference(self, state: Mapping[str, Any], error: Exception) -> str:
        """Name the streams and the keys that differ; if none does, quote torch's message."""
        differences = self._shape_differences(state)
        saved, own = state["config"]["model"], self.config.model.model_dump(mode="json")
        differences += [
            f"{key} {saved.get(key)} in the checkpoint, {value} here"
            for key, value in own.items()
            if key not in {*_NO_WEIGHTS, "tick_rate_hz"} and saved.get(key) != value
        ]
        return "; ".join(differences) or " ".join(str(error).split())[:400]

    def _shape_differences(self, state: Mapping[str, Any]) -> list[str]:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            return shape_differences(WindowShapes.from_json(state["shapes"]), self.shapes)
        return []


def schedule_dict(training: TrainingConfig) -> dict[str, float]:
    """Return the settings of the learning rate schedule, which a resumed run compares."""
    optimizer = training.optimizer
    return {
        "lr": optimizer.lr,
        "warmup_steps": optimizer.warmup_steps,
        "min_lr_ratio": optimizer.min_lr_ratio,
        "max_steps": training.max_steps,
    }


def require_heads(model: nn.Module, config: TrainConfig) -> None:
    """Refuse a configuration with losses of heads that the model does not have."""
    own = getattr(model, "config", None)
    if not isinstance(own, TrainConfig):  # a model of the user's may predict anything
        return
    names = dict.fromkeys([*DEFAULT_HEADS, *config.training.loss_weights])
    heads = dict.fromkeys(HEAD_OF_STREAM.get(name, name) for name in names)
    # A head of weight above 0 that the model still lacks is of a stream that is not declared.
    if missing := [h for h in heads if head_weight(config, h) > 0 and head_weight(own, h) == 0]:
        raise ConfigError(
            f"the configuration has losses of {', '.join(missing)}, which the model does not "
            f"predict: it predicts {', '.join(window_shapes(model, own).heads)}; fix: make the "
            "model by MultiModalCreature(config, shapes) with the same configuration, or set "
            f"training.loss_weights.{missing[0]}: 0"
        )


def window_shapes(model: nn.Module, config: TrainConfig) -> WindowShapes:
    """Return the window shapes that a model was made for, by default the default recipe's."""
    shapes = getattr(model, "shapes", None)
    if isinstance(shapes, WindowShapes):
        return shapes
    return WindowShapes.from_recipe(Recipe(), config)
