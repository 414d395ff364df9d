"""Damage of any kind in a shard set never gives a wrong sample.

`python tests/experiments/faults.py` tries more often.
"""

from __future__ import annotations

import random

import pytest
from experiments import faults
from helpers import faults as damage
from helpers import sets as tiny_sets

from train.data.batch_maker import BatchMaker

NUM_FLIPS = {"mjpeg": 40, "h264": 10}

OF_PICTURES = (
    "any single bit flipped",
    *(n for n in damage.FAULTS if "icture" in n or "H.264" in n),
)
"""Faults whose outcome may depend on the codec."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Return by codec a set and the samples that it gives undamaged."""
    found = {}
    for codec in ("mjpeg", "h264"):
        shards = tiny_sets.make_set(tmp_path_factory.mktemp(codec), video={"codec": codec})
        found[codec] = shards, faults.Reference(shards)
    return found


@pytest.mark.parametrize(
    ("codec", "name"),
    [*(("mjpeg", name) for name in damage.FAULTS), *(("h264", name) for name in OF_PICTURES)],
)
def test_no_damage_gives_a_wrong_sample_or_a_traceback(sets, codec, name):
    count, fault = damage.FAULTS[name]
    for i in range(min(count, 2) or NUM_FLIPS[codec]):
        outcome, said = faults.try_fault(fault, *sets[codec], f"{name}/{i}")
        assert outcome in {"detected", "unread"}, said


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("any single bit flipped", None),
        ("a bit of an index flipped", "detected"),
        ("column missing", None),
        ("hostile: index without the array present", "detected"),
        ("hostile: tokens at 1e+308 s", "detected"),
        ("hostile: noise for pictures", "detected"),
    ],
)
def test_damage_has_the_same_outcome_in_loader_processes(sets, name, outcome):
    fault = damage.FAULTS[name][1]
    alone, others = (
        faults.try_fault(fault, *sets["h264"], name, num_workers=count) for count in (0, 2)
    )
    assert others == alone
    assert alone[0] in ({"detected", "unread"} if outcome is None else {outcome})


def test_an_undamaged_set_is_judged_unread(sets):
    shards, reference = sets["h264"]
    assert reference.judge(shards) == ("unread", "")


def test_a_substituted_sample_without_its_offset_is_judged_unnamed(sets, tmp_path, monkeypatch):
    """Test the judge itself."""
    shards, reference = sets["mjpeg"]
    copy = tiny_sets.copy_set(shards, tmp_path / "set")
    damage.hostile_member("internal_text", damage.noise)(copy, random.Random(0))
    assert reference.judge(copy)[0] == "detected"

    def describe(self, location, error):
        return {**original(self, location, error), "error": "a picture does not decode"}

    original = BatchMaker._describe
    monkeypatch.setattr(BatchMaker, "_describe", describe)
    assert reference.judge(copy)[0] == "unnamed"


def test_another_sample_under_a_key_is_judged_silent(sets, tmp_path):
    """Test the judge itself, on a set whose frames differ while every checksum is right."""
    shards, reference = sets["mjpeg"]
    content = damage.noise_pictures(random.Random(0))
    copy = tiny_sets.copy_set(shards, tmp_path / "set")
    damage.hostile_member("vision_left", lambda _: content)(copy, random.Random(0))
    assert reference.judge(copy)[0] == "silent"
