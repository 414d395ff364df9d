"""Measure a tick's latency on the CPU, with and without the key-value cache, early and late.

    python tests/benchmarks/bench_infer.py                       tiny and small, all cores
    python tests/benchmarks/bench_infer.py --sizes tiny --ticks 20 --threads 1

"Live" is a stream in real time, a tick every 100 ms: p50, p99, and the share of ticks that end
before the next one. A tick does what ``train infer`` does for it: normalize pixels, run the model,
choose the most likely values of all heads. Inputs are those of the default recipe: two videos of
224 pixels at 5 frames/s, sound, touch, proprio and both texts. Without the cache, a forward pass
over the newest 40 ticks (a window) gives the same values; for the ratio both sides alternate at
every tick. Late positions are set, not reached: the cost can only depend on the cache's content.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as `python -m train` does

import numpy as np
import torch

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
from helpers.models import make_stream

from shared.media.tokenizer import train_tokenizer
from shared.recipe import Recipe
from shared.streams import Kind
from train.config import as_train_config
from train.data.pixels import to_model_inputs
from train.infer.stream import Sampling, TickStream, take_ticks
from train.model.baselines import Baselines
from train.model.multimodal import MultiModalCreature
from train.shapes import WindowShapes
from train.trained_model import TrainedModel

TICK_MS = 100.0
"""Of 10 Hz."""

POSITIONS = (0, 40, 400, 36_000)
"""Ticks lived before those that are measured; 36 000 are an hour."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--ticks", type=int, default=40, help="measured in turns at each position")
    parser.add_argument("--live-ticks", type=int, default=200, help="measured at 10 Hz at each")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads, {_processor()}; ms per tick; there are 100 for each")
    print(
        f"{'size':6} {'M':>5} {'position':>8} {'live p50':>9} {'p99':>7} {'in time':>8} "
        f"{'in turns':>9} {'uncached':>9} {'ratio':>6}"
    )
    for size in options.sizes:
        trained, window = make_trained(size)
        millions = sum(p.numel() for p in trained.model.parameters()) / 1e6
        for position in POSITIONS:
            live = measure_live(trained, window, position, options.live_ticks)
            cached, uncached = measure(trained, window, position, options.ticks)
            ratios = [u / c for c, u in zip(cached, uncached, strict=True)]
            print(
                f"{size:6} {millions:5.0f} {position:8} {np.median(live):9.1f} "
                f"{np.percentile(live, 99):7.1f} {np.mean(np.array(live) <= TICK_MS):8.1%} "
                f"{np.median(cached):9.1f} {np.median(uncached):9.1f} "
                f"{statistics.median(ratios):6.1f}",
                flush=True,
            )


def make_trained(size: str) -> tuple[TrainedModel, dict[str, torch.Tensor]]:
    """Make an untrained model, and a window's inputs."""
    config, recipe = as_train_config({"model": {"size": size}}), Recipe()
    shapes = WindowShapes.from_recipe(recipe, config)
    torch.manual_seed(0)
    model = MultiModalCreature(config, shapes).eval()
    trained = TrainedModel(
        model=model,
        recipe=recipe,
        tokenizer=train_tokenizer([], vocab_size=recipe.text.vocab_size),
        baselines=Baselines.from_dict({}, objective=model.objective),
        step=0,
    )
    rng, window = np.random.default_rng(0), {}
    for name, shape in shapes.streams.items():
        window[name] = torch.from_numpy(make_stream(rng, shape, 1))
        window[f"{name}_valid"] = torch.ones(window[name].shape[:2], dtype=torch.bool)
    return trained, window


def stream_at(
    trained: TrainedModel, window: dict[str, torch.Tensor], position: int
) -> tuple[TickStream, list[dict[str, torch.Tensor]]]:
    """Return a warm stream at a position, and the ticks of a window."""
    shapes = trained.shapes
    stream = TickStream(trained, Sampling(), seed=0)
    ticks = [
        take_ticks(window, first=tick, count=1, num_ticks=shapes.num_ticks, shapes=shapes)
        for tick in range(shapes.num_ticks)
    ]
    for tick in ticks:
        stream.step(tick)
    if position:
        stream._cache = dataclasses.replace(stream._cache, num_ticks=position)
    else:
        stream.reset()
    return stream, ticks


def measure_live(
    trained: TrainedModel, window: dict[str, torch.Tensor], position: int, num_ticks: int
) -> list[float]:
    """Return milliseconds of ticks that begin every 100 ms, or when the previous one ends."""
    stream, ticks = stream_at(trained, window, position)
    latencies_ms = []
    due_s = time.perf_counter()
    for index in range(num_ticks):
        time.sleep(max(0.0, due_s - time.perf_counter()))
        began_s = time.perf_counter()
        stream.step(ticks[index % len(ticks)])
        latencies_ms.append((time.perf_counter() - began_s) * 1e3)
        due_s = max(due_s + TICK_MS / 1e3, time.perf_counter())
    return latencies_ms


def measure(
    trained: TrainedModel, window: dict[str, torch.Tensor], position: int, num_ticks: int
) -> tuple[list[float], list[float]]:
    """Return milliseconds of ticks from a position on, with and without the cache."""
    stream, ticks = stream_at(trained, window, position)
    cached, uncached = [], []
    for index in range(num_ticks):
        began_s = time.perf_counter()
        stream.step(ticks[index % len(ticks)])
        cached.append((time.perf_counter() - began_s) * 1e3)
        began_s = time.perf_counter()
        predict_without_cache(trained, window)
        uncached.append((time.perf_counter() - began_s) * 1e3)
    return cached, uncached


@torch.inference_mode()
def predict_without_cache(trained: TrainedModel, window: dict[str, torch.Tensor]) -> None:
    """Predict a tick by a forward pass over the whole window."""
    for head, output in trained.model(to_model_inputs(window)).items():
        last = output[:, -1]
        _ = last if trained.shapes.target_shape(head).kind is Kind.SENSOR else last.argmax(-1)


def _processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else "unknown processor"


if __name__ == "__main__":
    main()
