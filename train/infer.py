"""A trained creature perceives a recorded session and predicts, tick by tick, what comes next.

::

    checkpoint -> load_creature        model, recipe, tokenizer, baselines
    session    -> SessionSource        windows that touch, by the checkpoint's recipe
               -> stream_window        forward_step per tick, with a key-value cache
               -> PredictionWriter     text, sound, poses        (train.predictions)
               -> Score                losses, baselines, latency -> metrics.json

Each tick gets what was recorded (teacher forcing), never what was predicted, so the losses are
those of training. The model was trained on windows, so its cache is emptied at the end of each:
memory is constant. The last tick of a window predicts the first one of the next. Everything that
was recorded is perceived: no stream is required, and one that covers little of a window is masked
and not left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.clock import Window
from shared.errors import SessionError
from shared.recipe import Stream
from shared.session import SOURCE_FILES, is_session
from train import runtime
from train.assemble import assemble_batch
from train.baselines import compare
from train.config import HEAD_STREAM, Head, TrainConfig
from train.creature import Creature, load_creature
from train.dataset import SessionSource
from train.encoders import count_ticks, frames_due
from train.inputs import VISION_STREAMS, to_device, to_model_inputs
from train.losses import loss_sums, mean_losses
from train.predictions import TEXT_HEADS, PredictionWriter, WindowPrediction
from train.sampling import Sampling, choose

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from shared.recipe import WindowShapes
    from shared.scan import SessionScan
    from train.model import Cache

METRICS_NAME = "metrics.json"

_EPSILON_TICKS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """What a model said to a window's ticks, T of them."""

    outputs: Mapping[str, Tensor]
    """As :meth:`MultiModalCreature.forward` gives for the whole window, [1, T, ...]."""
    chosen: Mapping[str, NDArray[Any]]
    """Per head, [T, ...]: tokens, dMel levels, and poses as they are."""
    latencies_ms: list[float]
    """Of each tick."""


def infer(
    checkpoint: Path,
    session: Path,
    out: Path,
    *,
    device: str = "auto",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Stream a session through a checkpoint's model and write what it predicts.

    Args:
        checkpoint: of a training run on shards or sessions.
        session: a session folder; any streams will do.
        out: folder for the predictions, see :mod:`train.predictions`, and ``metrics.json``.
        device: "auto", "cpu", "cuda" or "cuda:N".
        temperature: of tokens and dMel levels; 0 takes the most likely ones.
        top_k: see :class:`train.sampling.Sampling`.
        top_p: see :class:`train.sampling.Sampling`.
        seed: of everything that is drawn.
        progress: called with the windows done and their number.

    Returns:
        What ``metrics.json`` holds: "losses" in nats per token and per dMel value, and of poses
        as in :func:`train.losses.compute_losses`; null, with an entry in "reasons", where the
        session has nothing to compare with.

    Raises:
        CheckpointError: no checkpoint, or one without recipe and tokenizer.
        SessionError: no session, or nothing in it can be read.
        ConfigError: a sampling value out of its range, or a device that is not here.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(seed)
    creature = load_creature(checkpoint, device=runtime.choose_device(device))
    source = open_session(session, creature)
    scan, num_windows = source.fields(0).scan, int(source.shard_sizes[0])
    score = Score(creature)
    with PredictionWriter(
        out,
        heads=creature.config.heads,
        num_ticks=ticks_until(scan.length_s, creature.shapes),
        recipe=creature.recipe,
        shapes=creature.shapes,
        tokenizer=creature.tokenizer,
        seed=seed,
    ) as writer:
        for row in range(num_windows):
            batch = read_window(source, row, creature)
            streamed = stream_window(creature, batch, sampling, generator=generator)
            score.add(streamed, batch)
            writer.add(place_on_clock(streamed, source, row, creature))
            if progress is not None:
                progress(row + 1, num_windows)
    metrics = {
        "checkpoint": str(checkpoint),
        "step": creature.step,
        "session": scan.session,
        "duration_s": scan.length_s,
        "num_windows": num_windows,
        "num_ticks": len(score.latencies_ms),
        "device": str(creature.device),
        "sampling": {**dataclasses.asdict(sampling), "seed": seed},
        "streams": describe_streams(scan, creature.config),
        **score.as_json(scan),
    }
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (out / METRICS_NAME).write_text(text, encoding="utf-8")
    return metrics


def open_session(path: Path, creature: Creature) -> SessionSource:
    """A session as one shard of windows that touch; every stream may be missing.

    Raises:
        SessionError: no session, or nothing in it can be read.
    """
    if not is_session(path):
        raise SessionError(
            f"{path}: no session; give the folder of one, with at least one of "
            f"{', '.join(SOURCE_FILES)}"
        )
    window = {"stride_s": None, "min_coverage": 0.0}
    recipe = creature.recipe.model_copy(
        update={"required": (), "window": creature.recipe.window.model_copy(update=window)}
    )
    return SessionSource(path, recipe=recipe, tokenizer=creature.tokenizer)


def ticks_until(length_s: float, shapes: WindowShapes) -> int:
    """Number of ticks that begin before `length_s`."""
    return math.ceil(length_s * shapes.tick_rate_hz - _EPSILON_TICKS)


def read_window(source: SessionSource, row: int, creature: Creature) -> dict[str, Any]:
    """A window as a batch of one on the model's device; it ends where the session ends.

    Returns:
        As docs/architecture.md, "The batch", and "num_ticks", that it spans.
    """
    shapes = creature.shapes
    batch = assemble_batch(source, [(0, row)], config=creature.config, shapes=shapes)
    if creature.config.is_text_only:
        batch["num_ticks"] = count_ticks(batch["inputs"], shapes)
    else:
        first = round(source.start_s(0, row) * shapes.tick_rate_hz)
        count = min(shapes.num_ticks, ticks_until(source.fields(0).scan.length_s, shapes) - first)
        batch["num_ticks"] = count
        for group in ("inputs", "targets"):
            batch[group] = _take_ticks(batch[group], 0, count, shapes.num_ticks, shapes)
    moved: dict[str, Any] = to_device(batch, creature.device)
    return moved


@torch.inference_mode()
def stream_window(
    creature: Creature,
    batch: Mapping[str, Any],
    sampling: Sampling,
    *,
    generator: torch.Generator,
) -> Streamed:
    """Give the model one tick after the other, from an empty cache.

    Args:
        creature: whose model.
        batch: of :func:`read_window`; only its inputs are looked at.
        sampling: how tokens and dMel levels are chosen.
        generator: what is drawn comes from it.
    """
    config, shapes, device = creature.config, creature.shapes, creature.device
    dtype = runtime.choose_dtype(config.training.precision, device)
    inputs, num_ticks = batch["inputs"], batch["num_ticks"]
    cache: Cache | None = None
    outputs: list[dict[str, Tensor]] = []
    chosen: list[dict[str, Tensor]] = []
    latencies_ms = []
    for tick in range(num_ticks):
        began_s = time.perf_counter()
        seen = to_model_inputs(_take_ticks(inputs, tick, 1, num_ticks, shapes), dtype=dtype)
        with runtime.autocast(device, dtype):
            output, cache = creature.model.forward_step(seen, cache, num_ticks=1)
        chosen.append(
            {
                head: x.float().cpu()
                if head == Head.ANIMATION
                else choose(x, sampling, generator=generator)
                for head, x in output.items()
            }
        )
        latencies_ms.append((time.perf_counter() - began_s) * 1e3)
        outputs.append(output)
    heads = [str(head) for head in config.heads]
    return Streamed(
        outputs={head: torch.cat([o[head] for o in outputs], dim=1) for head in heads},
        chosen={head: torch.cat([c[head] for c in chosen], dim=1)[0].numpy() for head in heads},
        latencies_ms=latencies_ms,
    )


def place_on_clock(
    streamed: Streamed, source: SessionSource, row: int, creature: Creature
) -> WindowPrediction:
    """Say which ticks of the session were predicted; those beyond its end are left out.

    Densely packed text has no ticks: a predicted token takes the time of the recorded one that it
    stands for.
    """
    rate_hz, start_s = creature.shapes.tick_rate_hz, source.start_s(0, row)
    first = round(start_s * rate_hz) + 1
    if creature.config.is_text_only:
        times_s = _token_times(source, row, creature)[1:]
        follows = False
    else:
        stop = ticks_until(source.fields(0).scan.length_s, creature.shapes)
        times_s = np.arange(first, min(first + len(streamed.latencies_ms), stop)) / rate_hz
        duration_s = creature.recipe.window.duration_s
        follows = row > 0 and start_s - source.start_s(0, row - 1) < 1.5 * duration_s
    kept = {Head(head): values[: len(times_s)] for head, values in streamed.chosen.items()}
    levels = kept.get(Head.AUDIO)
    return WindowPrediction(
        first_tick=first,
        follows=follows,
        times_s=times_s,
        tokens={head: values for head, values in kept.items() if head in TEXT_HEADS},
        levels=None if levels is None else levels.astype(np.uint8),
        poses=kept.get(Head.ANIMATION),
    )


def describe_streams(scan: SessionScan, config: TrainConfig) -> dict[str, Any]:
    """Streams of the session: which the model saw, which it doesn't look at, which are missing."""
    return {
        "seen": [str(s) for s in scan.intervals if s in config.input_streams],
        "unseen": [str(s) for s in scan.intervals if s not in config.input_streams],
        "absent": {str(s): why for s, why in scan.absent.items()},
    }


class Score:
    """Losses of the model and of its baselines over the windows of a session, and latencies."""

    def __init__(self, creature: Creature) -> None:
        self.latencies_ms: list[float] = []
        """Of every tick, from its inputs to its choices."""
        self._creature = creature
        self._sums: dict[str, Tensor] = {}

    def add(self, streamed: Streamed, batch: Mapping[str, Any]) -> None:
        """Count a window."""
        self.latencies_ms += streamed.latencies_ms
        targets, weight = batch["targets"], batch["weight"]
        sums = loss_sums(streamed.outputs, targets, weight, config=self._creature.config)
        for name, pair in {**sums, **self._creature.baselines.losses(batch)}.items():
            both = torch.stack([part.double().cpu() for part in pair])
            self._sums[name] = self._sums[name] + both if name in self._sums else both

    def as_json(self, scan: SessionScan) -> dict[str, Any]:
        """Plain values: losses, reasons, baselines, comparison, tick_latency_ms.

        Args:
            scan: says why streams are missing.
        """
        means = {name: _mean(both) for name, both in self._sums.items()}
        config = self._creature.config
        losses = {f"loss_{head}": means[f"loss_{head}"] for head in config.heads}
        baselines = {name: loss for name, loss in means.items() if name not in losses}
        reasons = {
            f"loss_{head}": self._reason(head, scan)
            for head in config.heads
            if losses[f"loss_{head}"] is None
        }
        total = None
        if reasons:
            reasons["loss_total"] = f"it has no sum without {', '.join(reasons)}"
        else:
            sums = {name: (self._sums[name][0], self._sums[name][1]) for name in losses}
            total = float(mean_losses(sums, config=config)["loss_total"])
        rows = compare(losses, baselines)
        return {
            "losses": {"loss_total": total, **losses},
            "reasons": reasons,
            "baselines": baselines,
            "comparison": [dataclasses.asdict(row) for row in rows],
            "tick_latency_ms": _percentiles(self.latencies_ms),
        }

    def _reason(self, head: Head, scan: SessionScan) -> str:
        """Why a head has no loss."""
        if self._sums[f"loss_{head}"][1] > 0:
            return "the model's predictions are not finite"
        stream = HEAD_STREAM[head]
        return scan.absent.get(stream, f"no tick with {stream} follows another tick")


def _take_ticks(
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


def _token_times(source: SessionSource, row: int, creature: Creature) -> NDArray[np.float64]:
    """Times of a window's densely packed tokens, which are in order of time."""
    start_s = source.start_s(0, row)
    window = Window(row, start_s, creature.recipe.window.duration_s)
    text = source.fields(0).read_text(window)
    streams = {*creature.config.input_streams, *creature.config.target_streams}
    times_s = [
        *(text.internal.time_s if Stream.INTERNAL_TEXT in streams else ()),
        *(text.external.time_s if Stream.EXTERNAL_TEXT in streams else ()),
    ]
    return np.sort(np.array(times_s, dtype=np.float64))


def _mean(both: Tensor) -> float | None:
    """Sum over count; None where nothing was counted or the model gives no numbers."""
    mean = float(both[0] / both[1]) if both[1] > 0 else math.nan
    return mean if math.isfinite(mean) else None


def _percentiles(latencies_ms: list[float]) -> dict[str, float]:
    """p50, p95 and p99 of all ticks but the first, which warms the machine up, and that one."""
    later = latencies_ms[1:] or latencies_ms
    shares = {f"p{share}": float(np.percentile(later, share)) for share in (50, 95, 99)}
    return {**shares, "first": latencies_ms[0]}
