"""Loaders of tiny sets, and batches compared."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from helpers.sets import make_config
from train.data.loader import Loader
from train.data.shard_source import ShardSource

SAMPLED = ("vision_left", "vision_right", "audio", "touch", "proprio")
"""Streams that a source writes itself; text it returns."""


def make_loader(shards, *, num_epochs=None, is_shuffled=True, split="train", **options):
    source = ShardSource(shards, split=split)
    config = make_config(shards, **options)
    return Loader(source, config, num_epochs=num_epochs, is_shuffled=is_shuffled)


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert set(one) == set(other)
        for name in ("keys", "index", "epoch", "skipped"):
            assert one[name] == other[name]
        for group in ("inputs", "targets"):
            assert set(one[group]) == set(other[group])
            for name, tensor in one[group].items():
                assert tensor.dtype == other[group][name].dtype
                assert torch.equal(tensor, other[group][name]), name
        assert torch.equal(one["weight"], other["weight"])


def read_sample(source, place, streams=SAMPLED, *, with_text=True, pixels="yuv420"):
    """A sample's arrays as the loader has them, and its text."""
    size = source.recipe.vision.size
    picture = {"yuv420": (size * 3 // 2, size), "rgb": (size, size, 3)}[pixels]
    shapes = {
        **dict.fromkeys(SAMPLED[:2], ((source.recipe.count(5), *picture), np.uint8)),
        "audio": ((source.recipe.count(50), source.recipe.mel.channels), np.uint8),
        "touch": ((source.recipe.count(30), 5), np.float32),
        "proprio": ((source.recipe.count(30), 20), np.float32),
    }
    out = {}
    for stream in streams:
        shape, dtype = shapes[stream]
        out[stream] = np.full(shape, 0xA5, dtype)  # what was there before must not matter
        out[f"{stream}_valid"] = np.ones(shape[0], bool)
    text = source.read_into(*place, out, with_text=with_text)
    return out, text
