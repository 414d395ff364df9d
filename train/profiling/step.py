"""One optimizer step, in phases: what ``Trainer.train`` does between two batches, and no more."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import torch

from shared.timing import StageTimer
from train.data.device import to_model_inputs
from train.loop.optim import SpikeWatch, clip_gradient, learning_rate, set_learning_rate, step_if
from train.machine import runtime
from train.model.blocks import Block
from train.model.losses import compute_losses, loss_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from train.config import TrainConfig
    from train.data.batch import Batch
    from train.model.multimodal import MultiModalCreature

    Phase = Callable[[str], AbstractContextManager[Any]]

PHASES: Final = ("data_wait", "copy", "inputs", "forward", "losses", "backward", "optimizer")
"""Of a step, in order. "inputs": pixels become numbers; "optimizer": clipping and the watch for
spikes, too."""


class TrainingStep:
    """Trains a model on batches as a configuration says: precision, layers computed again, compile.

    Several may share a model and an optimizer: the newest says which layers compute again.

    Args:
        model: on its device, in training mode.
        optimizer: of its weights.
        config: the whole configuration.
        device: of model and batches.
    """

    def __init__(
        self,
        model: MultiModalCreature,
        optimizer: torch.optim.AdamW,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        training = config.training
        self._model, self._optimizer, self._config, self._device = model, optimizer, config, device
        self.dtype = runtime.choose_dtype(training.precision, device)
        self._scaler = runtime.make_scaler(device, self.dtype)
        self._spikes = SpikeWatch(training.spike_sigma, device)
        self._forward = torch.compile(model) if training.compile else model
        self._num_steps = 0
        for block in model.modules():
            if isinstance(block, Block):
                block.is_checkpointing = config.model.is_checkpointing

    def run(self, batches: Sequence[Batch], *, phase: Phase = contextlib.nullcontext) -> None:
        """One step on its micro-batches.

        Args:
            batches: on the device.
            phase: entered with the name of each phase, once per micro-batch.
        """
        config, optimizer = self._config, self._optimizer
        with phase("losses"):
            counts = self._counts(batches)
        with phase("optimizer"):
            set_learning_rate(optimizer, learning_rate(self._num_steps, config.training))
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for batch in batches:
            with phase("inputs"):
                inputs = to_model_inputs(batch["inputs"], dtype=self.dtype)
            with phase("forward"), runtime.autocast(self._device, self.dtype):
                outputs = self._forward(inputs)
            with phase("losses"):
                targets, weight = batch["targets"], batch["weight"]
                losses = compute_losses(outputs, targets, weight, config=config, counts=counts)
            with phase("backward"):
                self._scaler.scale(losses["loss_total"]).backward()  # type: ignore[no-untyped-call]
            total = total + losses["loss_total"].detach()
        with phase("optimizer"):
            norm = clip_gradient(optimizer, self._scaler, max_norm=config.training.grad_clip)
            step_if(self._spikes.judge(total, norm), optimizer, self._scaler)
        self._num_steps += 1

    def _counts(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """What the losses are divided by, over all micro-batches."""
        config, shapes = self._config, self._model.shapes
        parts = [
            loss_counts(b["targets"], b["weight"], config=config, shapes=shapes) for b in batches
        ]
        return {name: torch.stack([p[name] for p in parts]).sum() for name in parts[0]}


def device_timer(device: torch.device) -> StageTimer:
    """StageTimer of what a device does: by its events, or where it is the CPU by the clock.

    A GPU must be synchronized before they are taken. While it has nothing to do, an event happens
    when it is recorded, so the host's waiting counts as it does on a CPU.
    """
    if device.type != "cuda":
        return StageTimer()
    return StageTimer(_recorded_event, lambda start, stop: start.elapsed_time(stop) / 1e3)


class PhaseTimes:
    """Seconds of each phase of a step, which add up to the step's.

    Args:
        device: where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._timer = device_timer(device)
        self._began_s = time.perf_counter()

    def begin(self) -> None:
        """The step begins; the device has nothing to do."""
        self._began_s = time.perf_counter()
        self._timer.begin()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside, and since the phase before, belongs to `name`."""
        yield
        self._timer.end_stage(name)

    def take(self) -> tuple[dict[str, float], float]:
        """Seconds by phase, and by the host's clock from the step's begin to its end."""
        runtime.synchronize(self._device)
        step_s = time.perf_counter() - self._began_s
        return self._timer.take(), step_s


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
