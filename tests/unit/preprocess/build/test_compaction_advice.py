"""When a build advises ``--compact``: sets that grew by many small shards."""

from __future__ import annotations

import re
import shutil

import pytest
from helpers.oracles import build, tiny_recipe
from hypothesis import given
from hypothesis import strategies as st

from preprocess.build import explain
from preprocess.build.explain import advise_compaction
from preprocess.build.packing import pack, shard_segments
from preprocess.build.plan_types import SessionSegments
from shared.recipe import Recipe
from shared.shardset.manifest import Manifest, ShardEntry

RECIPE = Recipe.model_validate(
    {"segment": {"duration_s": 2.0}, "video": {"size": 64}, "split": {"val_fraction": 0}}
)
SEGMENT_BYTES = 90_000
"""Of the demo's sessions at 64 pixels."""


def manifest_of(shards: list[list[int]]) -> Manifest:
    """Make a manifest of shards with runs of these lengths."""
    entries = [
        ShardEntry(
            name=f"train-{number:06}",
            split="train",
            num_samples=sum(runs),
            runs=tuple(runs),
            length_bytes=sum(runs) * SEGMENT_BYTES,
            index_file=f"train-{number:06}.index",
            index_sha256="",
        )
        for number, runs in enumerate(shards)
    ]
    return Manifest(
        root=None,
        recipe=RECIPE,
        shards=tuple(entries),
        generation=0,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="",
        fields={},
        statistics={},
        counts={},
        fingerprint="",
    )


def figures(advice: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", advice)]


def packed(lengths: list[int]) -> list[list[int]]:
    """Pack sessions of some segments as a build does."""
    sessions = [SessionSegments(f"s{n:05}", tuple(range(k))) for n, k in enumerate(lengths)]
    return [[len(s.segments) for s in shard.sessions] for shard in pack(sessions, RECIPE)]


def test_a_thousand_shards_of_one_short_session_are_too_many() -> None:
    advice = advise_compaction(manifest_of([[6]] * 1000))
    assert advice.startswith("1000 shards for training where about 2 would do")
    assert f"copies {6000 * SEGMENT_BYTES / 2**20:.0f} MiB" in advice
    assert "fix: run it once with --compact" in advice


@pytest.mark.parametrize(
    "shards",
    [[], [[6]] * 20, [[900]] * 1000, [[6] * 500] * 2],
    ids=["none", "few", "long sessions", "packed"],
)
def test_sets_that_are_read_fast_enough_get_no_advice(shards: list[list[int]]) -> None:
    assert advise_compaction(manifest_of(shards)) == ""


@given(lengths=st.lists(st.integers(1, shard_segments(RECIPE)), max_size=300))
def test_a_packed_set_gets_no_advice(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(explain, "_WORTH_COMPACTING_S", 1e-9)
        assert advise_compaction(manifest_of(packed(lengths))) == ""


@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=300))
def test_the_advice_names_the_shards_that_packing_makes(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(explain, "_WORTH_COMPACTING_S", 0)
        patched.setattr(explain, "_WORTH_COMPACTING", 0)
        advice = advise_compaction(manifest_of([[length] for length in lengths]))
    assert figures(advice)[:2] == [len(lengths), len(packed(lengths))]


def test_a_build_gives_the_advice_until_the_set_is_compacted(
    recorded, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(explain, "_WORTH_COMPACTING_S", 1e-9)
    recipe, notes = tiny_recipe(), []
    for name in ("ann", "cat", "dan"):
        shutil.copytree(recorded / name, tmp_path / "sessions" / name)
        notes = build(tmp_path / "sessions", tmp_path / "set", recipe).notes
    assert notes[-1].startswith("3 shards for training where about 1 would do")
    notes = build(tmp_path / "sessions", tmp_path / "set", recipe, compact=True).notes
    assert not [note for note in notes if "shards" in note]
