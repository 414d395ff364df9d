"""What is said before the first step, each for its own reason."""

from __future__ import annotations

import pytest

from train.config import as_train_config
from train.summary import remarks

MIX = {"mix": [{"shards": "a"}, {"shards": "b"}]}


@pytest.mark.parametrize(
    ("config", "facts", "words"),
    [
        ({}, {}, []),
        ({}, {"not_held_out": "x has no session in its val split"}, ["nothing is held out: x has"]),
        ({"data": {"batch_size": 9}}, {}, []),
        ({"data": {"batch_size": 10}}, {}, ["is 10, and there are 9 train samples"]),
        ({"data": {"batch_size": 10, **MIX}}, {}, []),  # begins its sets anew within a batch
        ({"training": {"parallel": "fsdp"}}, {}, ["parallel is fsdp, and this is one process"]),
        ({"training": {"parallel": "fsdp"}}, {"num_ranks": 2}, []),
        ({"training": {"compile": True}}, {}, ["compiles the model, which takes minutes"]),
    ],
    ids=str,
)
def test_each_remark_is_made_for_its_reason_and_no_other(config, facts, words):
    lines = list(remarks(as_train_config(config), num_samples=9, **facts))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
