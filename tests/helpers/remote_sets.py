"""Shard sets behind URLs, their loaders, and batches compared."""

from __future__ import annotations

import torch

from helpers.sets import make_config
from shared.shardset.manifest import read_manifest
from shared.storage import RetryPolicy
from train.data.loader import Loader
from train.data.shard_source import ShardSource

QUICK = RetryPolicy(attempts=6, first_wait_s=0.01, longest_wait_s=0.05)
SECRET = "do-not-print-me"


def url_of(server):
    return f"{server.url}/set"


def make_loader(place, settings=None, *, num_epochs=1, **options):
    return Loader(
        ShardSource(place, cache=settings), make_config(place, **options), num_epochs=num_epochs
    )


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        for name in ("keys", "index", "epoch"):
            assert one[name] == other[name]
        assert [s["key"] for s in one["skipped"]] == [s["key"] for s in other["skipped"]]
        for group in ("inputs", "targets"):
            for name, tensor in one[group].items():
                assert torch.equal(tensor, other[group][name]), name


def copies(batches):
    """Batches that outlive the loader's memory."""
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
    """Names of indexes and columns of a split."""
    names = [e.name for e in read_manifest(shards).in_split(split)]
    return {
        p.name
        for p in shards.iterdir()
        if p.name.partition(".")[0] in names and p.name.endswith(tuple(suffixes))
    }
