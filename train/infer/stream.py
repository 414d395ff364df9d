"""Streaming inference, one tick at a time, with a bounded key-value cache.

Memory and the cost of a tick are constant, however long the stream: every layer keeps the keys and
values of as many ticks as a training window has. Each tick gets what was recorded (teacher
forcing), never what was predicted.

Letters: T ticks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from shared.errors import ConfigError
from shared.streams import Kind
from train.data.pixels import to_model_inputs
from train.machine import runtime
from train.model.encoders import frames_due

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from train.model.multimodal import Cache
    from train.shapes import WindowShapes
    from train.trained_model import TrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a value is chosen from logits.

    Raises:
        ConfigError: a number is out of range, or would have no effect.
    """

    temperature: float = 0.0
    """0 chooses the most likely value; 1 draws by the model's probabilities; less than 1 favors
    likely values."""
    top_k: int | None = None
    """Draw only among this many most likely values (Fan et al. 2018, arXiv:1805.04833)."""
    top_p: float | None = None
    """Draw only among the fewest values that together have this probability (Holtzman et al. 2020,
    arXiv:1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; fix: give a number >= 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; fix: give a number >= 1, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p is {self.top_p}; fix: give a share in (0, 1], or leave it out"
            )
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError(
                "top_k and top_p limit random draws, and temperature 0 draws nothing; fix: "
                "set --temperature 1 (temperature=1.0), or leave them out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """Outputs of a model for the T ticks of a window."""

    outputs: Mapping[str, Tensor]
    """Per head [1, T, ...], as :meth:`MultiModalCreature.forward` returns for a whole window."""
    chosen: Mapping[str, NDArray[Any]]
    """Per head [T, ...]: chosen tokens and dMel levels; sensor values unchanged."""
    latencies_ms: list[float]
    """Per tick, from its inputs to the chosen values."""


class TickStream:
    """A model with the state of one stream: its key-value cache and random generator."""

    def __init__(self, trained: TrainedModel, sampling: Sampling, *, seed: int) -> None:
        self._trained = trained
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = runtime.choose_dtype(trained.config.training.precision, trained.device)
        self._cache: Cache | None = None

    def reset(self) -> None:
        """Empty the cache; the next tick is the first of a stream."""
        self._cache = None

    def step(
        self, inputs: Mapping[str, Tensor], *, context: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Predict from one more tick: outputs [1, 1, ...], and the chosen values on the CPU."""
        with torch.inference_mode(), runtime.autocast(self._trained.device, self._dtype):
            output, self._cache = self._trained.model.forward_step(
                to_model_inputs(inputs, dtype=self._dtype),
                self._cache,
                num_ticks=1,
                context=context,
            )
            chosen = {
                head: x.float().cpu()
                if self._trained.shapes.target_shape(head).kind is Kind.SENSOR
                else choose(x, self._sampling, generator=self._generator)
                for head, x in output.items()
            }
        return output, chosen

    def run_window(self, batch: Mapping[str, Any], *, context: int | None = None) -> Streamed:
        """Stream the ticks of a window, after those of the previous window unless it was reset.

        `batch`: as :func:`train.infer.run.read_window` returns; only its inputs are read.
        """
        inputs, num_ticks = batch["inputs"], batch["num_ticks"]
        device, shapes = self._trained.device, self._trained.shapes
        steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        latencies_ms = []
        # One autocast around all ticks casts the weights once, instead of once per tick.
        with torch.inference_mode(), runtime.autocast(device, self._dtype):
            for tick in range(num_ticks):
                started_s = time.perf_counter()
                tick_inputs = take_ticks(
                    inputs, first=tick, count=1, num_ticks=num_ticks, shapes=shapes
                )
                steps.append(self.step(tick_inputs, context=context))
                latencies_ms.append((time.perf_counter() - started_s) * 1e3)
        heads = shapes.heads
        return Streamed(
            outputs={head: torch.cat([o[head] for o, _ in steps], dim=1) for head in heads},
            chosen={
                head: torch.cat([c[head] for _, c in steps], dim=1)[0].numpy() for head in heads
            },
            latencies_ms=latencies_ms,
        )


def take_ticks(
    tensors: Mapping[str, Tensor], *, first: int, count: int, num_ticks: int, shapes: WindowShapes
) -> dict[str, Tensor]:
    """Slice ticks [first, first + count) from a batch's inputs or targets of `num_ticks` ticks."""
    sliced = {}
    for name, tensor in tensors.items():
        stream = name.removesuffix("_valid")
        stream = shapes.targets.get(stream, stream)
        if shapes.streams[stream].kind is Kind.VIDEO:
            due = frames_due(shapes, stream, first_tick=first, num_ticks=count)
            sliced[name] = tensor[:, due.start : due.stop]
        else:
            per_tick = tensor.shape[1] // num_ticks
            sliced[name] = tensor[:, first * per_tick : (first + count) * per_tick]
    return sliced


def choose(logits: Tensor, sampling: Sampling, *, generator: torch.Generator) -> Tensor:
    """Choose a value from each row of logits.

    `logits`: [..., values], on any device.
    `generator`: on the CPU, so that all devices draw the same values; unused at temperature 0.

    Returns:
        int64 [...], on the CPU.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).cpu()
    allowed = mask_unlikely(logits.float().cpu() / sampling.temperature, sampling)
    probabilities = allowed.flatten(0, -2).softmax(-1)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return chosen.view(logits.shape[:-1])


def mask_unlikely(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set logits that top-k and top-p exclude to -inf; the most likely value always stays."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(-1)
        # Exclude a value if more likely values have the whole share already.
        is_excluded = shares.cumsum(-1) - shares >= sampling.top_p
        logits = ordered.masked_fill(is_excluded, -torch.inf).gather(-1, order.argsort(-1))
    return logits
