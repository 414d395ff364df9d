"""Loaders of tiny sets, and batches compared."""

from __future__ import annotations

import itertools

import torch
from tiny_sets import make_config

from train.data.loader import Loader
from train.data.reader import ShardSource


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
