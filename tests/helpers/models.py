"""A tiny model of all streams, and random inputs for it."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from shared.recipe import STREAMS, Stream
from train.config import Head
from train.data.batch import WindowShapes
from train.model.multimodal import MultiModalCreature

SHAPES = WindowShapes(
    num_ticks=8,
    num_frames=4,
    image_size=32,
    num_audio_frames=40,
    mel_channels=6,
    num_sensor_samples=24,
    vocab_size=300,
)
FAST_FRAMES = dataclasses.replace(SHAPES, num_frames=24)
MODEL = {"hidden_dim": 32, "num_layers": 2, "num_heads": 2}


def make_model(config=None, shapes=SHAPES, *, is_random=True):
    """Make a model in eval mode; `is_random` gives the animation head weights other than 0."""
    torch.manual_seed(0)
    model = MultiModalCreature(config or {"model": MODEL}, shapes).eval()
    if is_random and Head.ANIMATION in model.predictors:
        torch.nn.init.normal_(model.predictors[Head.ANIMATION].weight, std=0.1)
    return model


def make_batch(shapes=SHAPES, *, batch=2, seed=0, streams=STREAMS):
    """Make inputs as the loader does, with about 1 in 5 positions invalid."""
    rng = np.random.default_rng(seed)
    size, samples = shapes.image_size, shapes.num_sensor_samples
    values = {
        Stream.VISION_LEFT: rng.integers(0, 256, (batch, shapes.num_frames, size, size, 3), "u1"),
        Stream.VISION_RIGHT: rng.integers(0, 256, (batch, shapes.num_frames, size, size, 3), "u1"),
        Stream.AUDIO: rng.integers(
            0, shapes.mel_levels, (batch, shapes.num_audio_frames, shapes.mel_channels), "u1"
        ),
        Stream.TOUCH: rng.random((batch, samples, shapes.touch_size), "f4"),
        Stream.PROPRIO: rng.normal(size=(batch, samples, shapes.proprio_size)).astype("f4"),
        Stream.INTERNAL_TEXT: rng.integers(0, shapes.vocab_size, (batch, shapes.num_ticks)),
        Stream.EXTERNAL_TEXT: rng.integers(0, shapes.vocab_size, (batch, shapes.num_ticks)),
    }
    inputs = {}
    for stream in streams:
        inputs[str(stream)] = torch.from_numpy(values[stream])
        valid = rng.random(values[stream].shape[:2]) < 0.8
        valid[:, :1], valid[0, 1:2] = True, False
        inputs[f"{stream}_valid"] = torch.from_numpy(valid)
    return inputs


def is_equal(one, other, *, ticks=slice(None)):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key][:, ticks], other[key][:, ticks]) for key in one)
