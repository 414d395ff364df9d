"""Warnings before the first step, each for its own reason."""

from __future__ import annotations

import pytest

from train.config import as_train_config
from train.summary import startup_warnings

MIX = {"mix": [{"shards": "a"}, {"shards": "b"}]}


@pytest.mark.parametrize(
    ("config", "situation", "words"),
    [
        ({}, {}, []),
        (
            {},
            {"no_val_reason": "x has no session in its val split"},
            ["nothing is held out: x has"],
        ),
        ({"data": {"batch_size": 9}}, {}, []),
        ({"data": {"batch_size": 10}}, {}, ["is 10, but there are 9 train samples"]),
        ({"data": {"batch_size": 10, **MIX}}, {}, []),  # a mix restarts its sets within a batch
        ({"training": {"parallel": "fsdp"}}, {}, ["parallel is fsdp, but this is one process"]),
        ({"training": {"parallel": "fsdp"}}, {"num_ranks": 2}, []),
        ({"data": {"window": {"duration_s": 32}}}, {"runs_s": [32.0, 2.0]}, []),
        (
            {"data": {"window": {"duration_s": 64}}},
            {"runs_s": [32.0, 2.0, 30.0]},  # of 3 x 64 s, 64 are recorded
            ["duration_s 64 is longer than the longest run of 32 s: 67 % of the ticks are masked"],
        ),
        ({"training": {"compile": True}}, {}, ["compiles the model, which takes minutes"]),
    ],
    ids=str,
)
def test_each_warning_has_its_reason_and_no_other(config, situation, words):
    lines = list(startup_warnings(as_train_config(config), num_samples=9, **situation))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
