"""A creature lives: its model gets one tick after the other and remembers the newest ones.

Memory and the cost of a tick are constant, however long the life: every layer keeps the keys and
values of as many ticks as a window of training has. A tick gets what was recorded (teacher
forcing), never what was predicted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from shared.recipe import VISION_STREAMS
from train.config import Head
from train.data.pixels import to_model_inputs
from train.infer.sampling import choose
from train.machine import runtime
from train.model.encoders import frames_due

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from train.data.batch import WindowShapes
    from train.infer.sampling import Sampling
    from train.model.multimodal import Cache
    from train.trained_model import TrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """What a model said to a window's ticks, T of them."""

    outputs: Mapping[str, Tensor]
    """As :meth:`MultiModalCreature.forward` gives for a whole window, [1, T, ...]."""
    chosen: Mapping[str, NDArray[Any]]
    """Per head, [T, ...]: tokens, dMel levels, and poses as they are."""
    latencies_ms: list[float]
    """Of each tick, from its inputs to its choices."""


class TickStream:
    """One life of a creature.

    Args:
        creature: who lives.
        sampling: how tokens and dMel levels are chosen.
        seed: of everything that is drawn.
    """

    def __init__(self, creature: TrainedModel, sampling: Sampling, *, seed: int) -> None:
        self._creature = creature
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = runtime.choose_dtype(creature.config.training.precision, creature.device)
        self._cache: Cache | None = None

    def forget(self) -> None:
        """Let the next tick be the first one."""
        self._cache = None

    def perceive(
        self, inputs: Mapping[str, Tensor], *, context: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Live through one tick.

        Args:
            inputs: of the tick, as in a batch of one, on the model's device.
            context: see :meth:`MultiModalCreature.forward_step`.

        Returns:
            The model's outputs [1, 1, ...], and what was chosen from them, on the CPU.
        """
        with torch.inference_mode(), runtime.autocast(self._creature.device, self._dtype):
            output, self._cache = self._creature.model.forward_step(
                to_model_inputs(inputs, dtype=self._dtype),
                self._cache,
                num_ticks=1,
                context=context,
            )
            chosen = {
                head: x.float().cpu()
                if head == Head.ANIMATION
                else choose(x, self._sampling, generator=self._generator)
                for head, x in output.items()
            }
        return output, chosen

    def run_session(self, batch: Mapping[str, Any], *, context: int | None = None) -> Streamed:
        """Live through a window's ticks, after those of the window before unless it was forgotten.

        Args:
            batch: of :func:`train.infer.run.read_window`; only its inputs are looked at.
            context: see :meth:`MultiModalCreature.forward_step`.
        """
        inputs, num_ticks = batch["inputs"], batch["num_ticks"]
        device, shapes = self._creature.device, self._creature.shapes
        said: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        latencies_ms = []
        # One autocast around all ticks casts the weights once and not at each.
        with torch.inference_mode(), runtime.autocast(device, self._dtype):
            for tick in range(num_ticks):
                began_s = time.perf_counter()
                seen = take_ticks(inputs, tick, 1, num_ticks, shapes)
                said.append(self.perceive(seen, context=context))
                latencies_ms.append((time.perf_counter() - began_s) * 1e3)
        heads = [str(head) for head in self._creature.config.heads]
        return Streamed(
            outputs={head: torch.cat([o[head] for o, _ in said], dim=1) for head in heads},
            chosen={
                head: torch.cat([c[head] for _, c in said], dim=1)[0].numpy() for head in heads
            },
            latencies_ms=latencies_ms,
        )


def take_ticks(
    tensors: Mapping[str, Tensor], first: int, count: int, num_ticks: int, shapes: WindowShapes
) -> dict[str, Tensor]:
    """Ticks [first, first + count) of a batch's inputs or targets, which have `num_ticks`."""
    due = frames_due(shapes, first_tick=first, num_ticks=count)
    taken = {}
    for name, tensor in tensors.items():
        if name.removesuffix("_valid") in VISION_STREAMS:
            taken[name] = tensor[:, due.start : due.stop]
        else:
            per_tick = tensor.shape[1] // num_ticks
            taken[name] = tensor[:, first * per_tick : (first + count) * per_tick]
    return taken
