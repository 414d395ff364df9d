"""Load shard sets behind URLs, and compare batches."""

from __future__ import annotations

import torch

from helpers import sets
from shared.shardset.manifest import read_manifest
from shared.storage import RetryPolicy
from train.data.loader import Loader
from train.data.shard_source import ShardSource

QUICK = RetryPolicy(attempts=6, first_wait_s=0.01, longest_wait_s=0.05)
SECRET = "do-not-print-me"


def url_of(server):
    return f"{server.url}/set"


def make_config(location=None, **options):
    """Make a configuration of small batches of short windows, so that an epoch has several."""
    defaults = {"window": {"duration_s": 0.4}, "batch_size": 3, "shuffle_block_shards": 1}
    return sets.make_config(location, **{**defaults, **options})


def make_loader(location, settings=None, *, num_epochs=1, **options):
    source = ShardSource(location, cache=settings)
    return Loader(source, make_config(location, **options), num_epochs=num_epochs)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in ("keys", "index", "epoch"):
            assert batch[name] == other[name]
        assert [s["key"] for s in batch["skipped"]] == [s["key"] for s in other["skipped"]]
        for group in ("inputs", "targets"):
            for name, tensor in batch[group].items():
                assert torch.equal(tensor, other[group][name]), name


def copies(batches):
    """Copy batches, so that they outlive the loader's memory."""
    return [
        {
            **batch,
            **{g: {n: t.clone() for n, t in batch[g].items()} for g in ("inputs", "targets")},
        }
        for batch in batches
    ]


def read_all(loader):
    return copies(loader)


def data_files(shards, *, split="train", suffixes=("",)):
    """Return the names of a split's indexes and columns."""
    names = [e.name for e in read_manifest(shards).in_split(split)]
    return {
        p.name
        for p in shards.iterdir()
        if p.name.partition(".")[0] in names and p.name.endswith(tuple(suffixes))
    }
