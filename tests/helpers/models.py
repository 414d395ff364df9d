"""Tiny models of declared streams, and random batches for them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from shared.recipe import Recipe
from shared.streams import VECTOR_SIZES, Kind, ValueType
from train.config import as_train_config
from train.model.encoders import module_key
from train.model.multimodal import MultiModalCreature
from train.shapes import WindowShapes, sample_positions

MODEL = {"hidden_dim": 32, "num_layers": 2, "num_heads": 2}
RECIPE = {
    "video": {"size": 32},
    "audio": {"dmel": {"channels": 6}},
    "text": {"vocab_size": 300},
}
MANY_STREAMS = {
    "front": {"kind": "video", "file": "front.mp4", "size": [32, 48]},
    "back": {"kind": "video", "file": "back.mp4", "size": 16, "rate_hz": 30},
    "wrist": {"kind": "video", "file": "wrist.mp4", "size": 32, "rate_hz": 10},
    "voice": {"kind": "audio", "file": "voice.wav"},
    "room": {"kind": "audio", "file": "voice.wav", "track": 1},
    "gaze": {
        "kind": "sensor",
        "key": "gaze",
        "rate_hz": 120,
        "values": [{"count": 6, "type": "direction"}, {"count": 1, "type": "fraction"}],
    },
    "hand": {
        "kind": "sensor",
        "key": "hand",
        "rate_hz": 15,
        "values": [{"count": 6, "type": "position"}, {"count": 8, "type": "quaternion"}],
    },
    "arm": {
        "kind": "sensor",
        "key": "arm",
        "rate_hz": 30,
        "values": [{"count": 3, "type": "angle"}, {"count": 3, "type": "velocity"}],
    },
    "slow": {
        "kind": "sensor",
        "key": "slow",
        "rate_hz": 5,
        "values": [{"count": 2, "type": "scalar"}],
    },
    "said": {"kind": "text", "stream": "said"},
}
"""Cameras of three sizes, two tracks, sensors of all value types, and rates below and between
whole numbers of samples per tick."""
CAMERAS = ("front", "back", "wrist")


def make_config(sections=None, *, num_ticks=8, **training):
    """Make a configuration of a tiny model over windows of `num_ticks`."""
    values = {"model": MODEL, "training": training, **(sections or {})}
    window = {"duration_s": num_ticks / 10}
    values["data"] = {"window": window, **values.get("data", {})}
    return as_train_config(values)


def make_shapes(config=None, *, num_ticks=8, streams=None, **recipe):
    """Return the shapes of a configuration over declared streams."""
    if streams is not None:
        recipe["streams"] = streams
    recipe = Recipe.model_validate({**RECIPE, **recipe})
    if config is None or isinstance(config, dict):
        config = make_config(config, num_ticks=num_ticks)
    return WindowShapes.from_recipe(recipe, config)


SHAPES = make_shapes()
DEFAULT_NAMES = tuple(SHAPES.streams)
MANY_HEADS = {
    "training": {"loss_weights": {name: 1 for name in MANY_STREAMS if name not in CAMERAS}}
}
WORLDS = {
    "default": ({}, {}),
    "fast_frames": ({}, {"video": {"size": 32, "rate_hz": 30}}),
    "many": (MANY_HEADS, {"streams": MANY_STREAMS}),
}
"""Sections of a configuration and of a recipe, by a name for tests."""
STREAMS_OF_WORLDS = [
    *(("default", name) for name in DEFAULT_NAMES),
    *(("fast_frames", name) for name in ("vision_left", "vision_right")),
    *(("many", name) for name in sorted(MANY_STREAMS)),
]


def make_world(name, *, num_ticks=8, is_random=True):
    """Return a model and its shapes; the statistics of its sensors are not 0 and 1."""
    sections, recipe = WORLDS[name]
    config = make_config(sections, num_ticks=num_ticks)
    shapes = make_shapes(config, **recipe)
    model = make_model(config, shapes, is_random=is_random)
    model.set_statistics({name: make_statistics(shape) for name, shape in sensors(shapes)})
    return model, shapes


def sensors(shapes):
    """Return the sensor streams with their shapes."""
    return [(name, shapes.streams[name]) for name in shapes.of_kind(Kind.SENSOR)]


def make_statistics(shape, *, seed=3):
    """Draw statistics of a sensor, as a manifest has them."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=shape.size), rng.uniform(0.5, 2, shape.size)
    return {"count": 10, "mean": mean.tolist(), "std": std.tolist()}


def make_model(config=None, shapes=None, *, is_random=True):
    """Make a model in eval mode; `is_random` gives sensor heads weights other than 0."""
    if config is None or isinstance(config, dict):
        config = make_config(config)
    torch.manual_seed(0)
    model = MultiModalCreature(config, shapes or make_shapes(config)).eval()
    if is_random:
        for head in model.target_std:
            torch.nn.init.normal_(model.predictors[module_key(head)].weight, std=0.1)
    return model


@st.composite
def declared_streams(draw):
    """Draw one to five streams of any kind, rate and value types; one of them is no video."""
    streams = {}
    for index in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["sensor", "audio", "text", "video"] if index else ["sensor"]))
        name = f"{kind}_{index}"
        spec = {"kind": kind}
        if kind == "sensor":
            types = draw(st.lists(st.sampled_from(ValueType), min_size=1, max_size=3))
            counts = [draw(st.integers(1, 2)) * VECTOR_SIZES.get(each, 1) for each in types]
            values = [{"count": n, "type": t} for n, t in zip(counts, types, strict=True)]
            rate_hz = draw(st.sampled_from([5, 10, 15, 25, 30]))
            spec |= {"key": name, "rate_hz": rate_hz, "values": values}
        elif kind == "video":
            size = draw(st.sampled_from([16, [16, 32]]))
            spec |= {"file": f"{name}.mp4", "rate_hz": draw(st.sampled_from([5, 10, 15, 30]))}
            spec["size"] = size
        elif kind == "audio":
            spec |= {"file": f"{name}.wav"}
        else:
            spec |= {"stream": name}
        streams[name] = spec
    return streams


def make_values(rng, group, *sizes):
    """Draw values of one type."""
    values = rng.normal(size=(*sizes, group.count // group.vector_size, group.vector_size))
    if group.type in (ValueType.QUATERNION, ValueType.DIRECTION):
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
    elif group.type is ValueType.FRACTION:
        values = rng.random(values.shape)
    return values.reshape(*sizes, group.count)


def make_stream(rng, shape, batch):
    """Draw one stream of a batch, as the loader gives it."""
    sizes = (batch, shape.num_positions)
    if shape.kind is Kind.VIDEO:
        return rng.integers(0, 256, (*sizes, *shape.size, 3), "u1")
    if shape.kind is Kind.AUDIO:
        return rng.integers(0, shape.num_classes, (*sizes, *shape.size), "u1")
    if shape.kind is Kind.TEXT:
        return rng.integers(0, shape.num_classes, sizes)
    parts = [make_values(rng, group, *sizes) for group in shape.values]
    return np.concatenate(parts, axis=-1).astype("f4")


def used_positions(shape, shapes):
    """Return which positions of a stream hold a sample, bool [positions]."""
    is_used = np.zeros(shape.num_positions, bool)
    if shape.kind is Kind.TEXT:
        return ~is_used
    positions = sample_positions(
        shape, num_ticks=shapes.num_ticks, tick_rate_hz=shapes.tick_rate_hz
    )
    is_used[positions[positions >= 0]] = True
    return is_used


def make_batch(shapes=SHAPES, *, batch=2, seed=0, streams=None):
    """Make inputs as the loader does, with about 1 in 5 positions invalid."""
    inputs = {}
    for name in shapes.streams if streams is None else streams:
        shape = shapes.streams[name]
        rng = np.random.default_rng([seed, *name.encode()])
        values = make_stream(rng, shape, batch)
        valid = rng.random(values.shape[:2]) < 0.8
        valid[:, :1], valid[0, 1:2] = True, False
        valid &= used_positions(shape, shapes)
        inputs[name] = torch.from_numpy(values)
        inputs[f"{name}_valid"] = torch.from_numpy(valid)
    return inputs


def targets_of(inputs, shapes):
    """Return the streams of a batch that heads predict, as its "targets"."""
    return {
        f"{head}{end}": inputs[f"{name}{end}"]
        for head, name in shapes.targets.items()
        for end in ("", "_valid")
    }


def is_equal(one, other, *, ticks=slice(None)):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key][:, ticks], other[key][:, ticks]) for key in one)
