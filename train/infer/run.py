"""A trained creature perceives a recorded session and predicts, tick by tick, what comes next.

::

    checkpoint -> load_trained_model        model, recipe, tokenizer, baselines
    session    -> SessionSource        windows that touch, by the checkpoint's recipe
               -> TickStream           forward_step per tick, with a key-value cache
               -> PredictionWriter     text, sound, poses        (train.model.predictions)
               -> Score                losses, baselines, latency -> metrics.json
               -> write_page           all of it beside what was recorded -> index.html

The creature lives on over the borders of windows: the last tick of one predicts the first one of
the next. Its memory is emptied where windows of the session are left out between, and between
windows of densely packed text, which don't follow each other. Everything that was recorded is
perceived: no stream is required, and one that covers little of a window is masked and not left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.clock import Window
from shared.errors import ConfigError, SessionError
from shared.recipe import Stream
from shared.session.folder import SOURCE_FILES, is_session
from train.config import Head, TrainConfig
from train.data.batch import assemble_batch
from train.data.device import to_device
from train.data.session_source import SessionSource
from train.infer.page import write_page
from train.infer.sampling import Sampling
from train.infer.scoring import Score
from train.infer.stream import TickStream, take_ticks
from train.machine import runtime
from train.model.encoders import count_ticks
from train.model.predictions import (
    AUDIO_NAME,
    DMEL_NAME,
    TEXT_HEADS,
    PredictionWriter,
    WindowPrediction,
)
from train.trained_model import TrainedModel, load_trained_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.session.scan import SessionScan
    from train.data.batch import WindowShapes
    from train.infer.stream import Streamed

METRICS_NAME = "metrics.json"

_EPSILON_TICKS = 1e-6


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
        out: folder for the predictions, see :mod:`train.model.predictions`, ``metrics.json`` and
            ``index.html``.
        device: "auto", "cpu", "cuda" or "cuda:N".
        temperature: of tokens and dMel levels; 0 takes the most likely ones.
        top_k: see :class:`train.infer.sampling.Sampling`.
        top_p: see :class:`train.infer.sampling.Sampling`.
        seed: of everything that is drawn.
        progress: called with the windows done and their number.

    Returns:
        What ``metrics.json`` holds: "losses" in nats per token and per dMel value, and of poses
        as in :func:`train.model.losses.compute_losses`; null, with an entry in "reasons", where the
        session has nothing to compare with.

    Raises:
        CheckpointError: no checkpoint, or one without recipe and tokenizer.
        SessionError: no session, or nothing in it can be read.
        ConfigError: a sampling value out of its range, a device that is not here, or a session
            where the predictions are to be written.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    _refuse_recordings(out, session)
    with runtime.translate_oom("Free memory there, or give --device cpu"):
        creature = load_trained_model(checkpoint, device=runtime.choose_device(device))
        source = open_session(session, creature)
        score = run_session(
            source,
            creature,
            TickStream(creature, sampling, seed=seed),
            out=out,
            seed=seed,
            progress=progress,
        )
    metrics = {
        "checkpoint": str(checkpoint),
        **describe_run(source, creature, score),
        "sampling": {**dataclasses.asdict(sampling), "seed": seed},
        **score.as_json(source.fields(0).scan),
    }
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (out / METRICS_NAME).write_text(text, encoding="utf-8")
    write_page(out, source.fields(0), metrics, creature=creature)
    return metrics


def _refuse_recordings(out: Path, session: Path) -> None:
    """Predictions have names that recordings have, too: audio.wav.

    Raises:
        ConfigError: a session lies where they are to be written.
    """
    # Sound of our own lies beside the dMel levels that it was made of.
    theirs = [n for n in SOURCE_FILES if n != AUDIO_NAME or not (out / DMEL_NAME).exists()]
    if any((out / name).exists() for name in theirs) or out.resolve() == session.resolve():
        raise ConfigError(
            f"{out}: a session lies there, and predictions would overwrite its {AUDIO_NAME}; "
            "write them elsewhere by --out"
        )


def describe_run(source: SessionSource, creature: TrainedModel, score: Score) -> dict[str, Any]:
    """Who lived through what."""
    scan = source.fields(0).scan
    return {
        "step": creature.step,
        "session": scan.session,
        "duration_s": scan.length_s,
        "num_windows": int(source.shard_sizes[0]),
        "num_ticks": len(score.latencies_ms),
        "device": str(creature.device),
        "streams": describe_streams(scan, creature.config),
    }


def run_session(
    source: SessionSource,
    creature: TrainedModel,
    stream: TickStream,
    *,
    out: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Give a creature all windows of a session and write what it predicts; see :func:`infer`."""
    score, num_windows = Score(creature), int(source.shard_sizes[0])
    is_dense = creature.config.is_text_only
    with PredictionWriter(
        out,
        heads=creature.config.heads,
        num_ticks=ticks_until(source.fields(0).scan.length_s, creature.shapes),
        recipe=creature.recipe,
        shapes=creature.shapes,
        tokenizer=creature.tokenizer,
        seed=seed,
    ) as writer:
        for row in range(num_windows):
            batch = read_window(source, row, creature)
            if not follows(source, row, creature):
                stream.forget()
            # A dense window's number of tokens is its own; all of it was seen in training.
            streamed = stream.run_session(batch, context=batch["num_ticks"] if is_dense else None)
            score.add(streamed, batch)
            writer.add(place_on_clock(streamed, source, row, creature))
            if progress is not None:
                progress(row + 1, num_windows)
    return score


def open_session(path: Path, creature: TrainedModel) -> SessionSource:
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


def read_window(source: SessionSource, row: int, creature: TrainedModel) -> dict[str, Any]:
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
            batch[group] = take_ticks(batch[group], 0, count, shapes.num_ticks, shapes)
    moved: dict[str, Any] = to_device(batch, creature.device)
    return moved


def follows(source: SessionSource, row: int, creature: TrainedModel) -> bool:
    """Whether a window's first tick comes right after the last one of the window before."""
    if row == 0 or creature.config.is_text_only:
        return False
    gap_s = source.start_s(0, row) - source.start_s(0, row - 1)
    return gap_s < 1.5 * creature.recipe.window.duration_s


def place_on_clock(
    streamed: Streamed, source: SessionSource, row: int, creature: TrainedModel
) -> WindowPrediction:
    """Say which ticks of the session were predicted; those beyond its end are left out.

    Densely packed text has no ticks: a predicted token takes the time of the recorded one that it
    stands for.
    """
    rate_hz, start_s = creature.shapes.tick_rate_hz, source.start_s(0, row)
    first = round(start_s * rate_hz) + 1
    if creature.config.is_text_only:
        times_s = _token_times(source, row, creature)[1:]
    else:
        stop = ticks_until(source.fields(0).scan.length_s, creature.shapes)
        times_s = np.arange(first, min(first + len(streamed.latencies_ms), stop)) / rate_hz
    kept = {Head(head): values[: len(times_s)] for head, values in streamed.chosen.items()}
    levels = kept.get(Head.AUDIO)
    return WindowPrediction(
        first_tick=first,
        follows=follows(source, row, creature),
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


def _token_times(source: SessionSource, row: int, creature: TrainedModel) -> NDArray[np.float64]:
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
