"""Whatever is damaged in a shard set, no wrong sample is trained on; `python tests/faults.py` tries
more often.
"""

from __future__ import annotations

import random

import faults
import pytest
import tiny_sets

NUM_FLIPS = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_sets.make_set(tmp_path_factory.mktemp("faults"), vision={"codec": "mjpeg"})


@pytest.fixture(scope="module")
def reference(shards):
    return faults.Reference(shards)


@pytest.mark.parametrize("name", faults.FAULTS)
def test_no_damage_gives_a_wrong_sample_or_a_traceback(shards, reference, name):
    count, fault = faults.FAULTS[name]
    for i in range(min(count, 2) or NUM_FLIPS):
        outcome, said = faults.try_fault(fault, shards, reference, f"{name}/{i}")
        assert outcome in {"detected", "unread"}, said


def test_an_undamaged_set_is_judged_unread(shards, reference):
    assert reference.judge(shards) == ("unread", "")


def test_another_sample_under_a_key_is_judged_silent(shards, reference, tmp_path):
    """The judge itself: a set whose pictures differ while every checksum is right."""
    content = faults.noise_pictures(random.Random(0))
    copy = tiny_sets.copy_set(shards, tmp_path / "set")
    faults.hostile_member("vision_left", "vision_left", lambda _: content)(copy, random.Random(0))
    assert reference.judge(copy)[0] == "silent"
