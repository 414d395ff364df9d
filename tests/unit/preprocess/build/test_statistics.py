"""Statistics of columns: those of numpy over all samples, whatever the shards."""

from __future__ import annotations

import io
import json
import math
import wave
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from helpers.oracles import build, tar_members, tiny_recipe
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from preprocess.build import statistics
from preprocess.build.statistics import add_exactly, exact_sums
from shared.errors import ShardError
from shared.shardset.manifest import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

SMALL = tiny_recipe(shard={"target_bytes": 2**16})
"""Two windows a shard."""

UNIT = 2**1074

AXES = [statistics.TOUCH, statistics.ANGLE, statistics.VELOCITY]


# --- exact sums ------------------------------------------------------------------------------

anything = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays(np.float32, st.tuples(st.integers(0, 20), st.just(2)), elements=anything))
def test_sums_are_those_of_fractions(values):
    sums, squares = exact_sums(values)
    for column in range(2):
        numbers = [Fraction(x) for x in values[:, column].tolist()]
        assert Fraction(add_exactly([sums[column]]), UNIT) == sum(numbers)
        assert Fraction(add_exactly([squares[column]]), UNIT) == sum(x * x for x in numbers)
        assert float.fromhex(sums[column]) == float(sum(numbers))


def test_a_sum_is_written_in_lowest_terms():
    sums, squares = exact_sums(np.array([[-0.75, 0.0], [-0.75, -0.0]], np.float32))
    assert (sums, squares) == (["-0x3p-1", "0x0p0"], ["0x9p-3", "0x0p0"])


def test_sums_of_many_values_are_exact():
    values = np.full((2**17, 1), np.float32(1) - np.float32(2**-24), np.float32)
    exact = Fraction(values[0].item())
    (total,), (squares,) = exact_sums(values)
    assert Fraction(add_exactly([total]), UNIT) == 2**17 * exact
    assert Fraction(add_exactly([squares]), UNIT) == 2**17 * exact * exact


def test_a_deviation_far_from_zero_does_not_cancel():
    values = np.float32(1e7) + np.arange(3, dtype=np.float32).reshape(-1, 1)
    found = merged([values], axes=[statistics.VELOCITY])
    assert found["mean"] == [10000001.0]
    assert found["std"] == [math.sqrt(2 / 3)]


# --- merging ---------------------------------------------------------------------------------


def part(values: np.ndarray, tokens: list[int], levels: np.ndarray) -> dict[str, Any]:
    valid = np.ones(levels.shape[:2], np.bool_)
    return {
        "num_samples": len(values),
        "proprio": statistics.number_statistics(values, AXES),
        "touch": statistics.number_statistics(np.full_like(values, np.nan), AXES),
        **statistics.sound_statistics(values.reshape(-1)[:4].tolist()),
        "dmel_levels": statistics.level_statistics(levels, valid, 4),
        "internal_tokens": statistics.token_statistics([tokens]),
        "external_tokens": statistics.token_statistics([]),
    }


def merged(parts: list[np.ndarray], *, axes: list[statistics.Axis]) -> dict[str, Any]:
    """Merged numbers of some shards' values."""
    none = {"count": 0}
    rest = {"num_samples": 0, "touch": none, "audio_level": none, "dmel_levels": [[0]]}
    rest |= {"internal_tokens": [], "external_tokens": []}
    found = [{**rest, "proprio": statistics.number_statistics(p, axes)} for p in parts]
    return statistics.merge(found)["proprio"]


def numpys(rows: np.ndarray, axes: list[statistics.Axis]) -> dict[str, Any]:
    """Histogram, min and max of finite rows, by numpy."""
    found: dict[str, Any] = {"min": rows.min(axis=0).tolist(), "max": rows.max(axis=0).tolist()}
    found["histogram"] = []
    for axis, column in zip(axes, rows.T, strict=True):
        inner, _ = np.histogram(column, axis.num_bins, (axis.low, axis.high))
        outer = int((column < axis.low).sum()), int((column > axis.high).sum())
        found["histogram"].append([outer[0], *inner.tolist(), outer[1]])
    return found


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_merged_statistics_are_numpys_over_all_data(sizes, seed):
    rng = np.random.default_rng(seed)
    values = [rng.normal(0.5, 2, (n, 7, 3)).astype(np.float32) for n in sizes]
    for array in values:
        array[rng.random(array.shape) < 0.1] = np.nan
    tokens = [rng.integers(0, 10, n).tolist() for n in sizes]
    levels = [rng.integers(0, 4, (n, 7, 2), np.uint8) for n in sizes]
    found = statistics.merge([part(*p) for p in zip(values, tokens, levels, strict=True)])
    rows = np.concatenate(values).reshape(-1, 3).astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    assert found["num_samples"] == sum(sizes)
    assert found["proprio"]["count"] == len(rows)
    if len(rows):
        for name in ("mean", "std"):
            expected = getattr(rows, name)(axis=0)
            np.testing.assert_allclose(found["proprio"][name], expected, rtol=1e-9, atol=1e-9)
        assert numpys(rows, AXES).items() <= found["proprio"].items()
    assert found["touch"] == {"count": 0}
    every = [i for ids in tokens for i in ids]
    counts = [every.count(i) for i in range(max(every, default=-1) + 1)]
    assert found["internal_tokens"] == counts
    assert found["external_tokens"] == []
    seen = np.concatenate(levels).reshape(-1, 2)
    assert found["dmel_levels"] == [[int((c == k).sum()) for k in range(4)] for c in seen.T]


@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 12), st.just(3)), elements=anything),
    data=st.data(),
)
def test_any_packing_gives_the_same_statistics(values, data):
    whole = merged([values], axes=AXES)
    order = data.draw(st.permutations(range(len(values))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    found = merged(np.split(values[order], cuts), axes=AXES)
    assert json.dumps(found) == json.dumps(whole)  # -0.0 is not 0.0


def test_ends_of_an_axis_are_inside_it():
    pi = np.float32(np.pi)
    counts = statistics.ANGLE.count(np.array([-pi, pi, -4, 4, np.nextafter(pi, np.float32(4))]))
    assert (counts[0], counts[1], counts[-2], counts[-1]) == (1, 1, 1, 2)
    assert sum(counts) == 5
    assert statistics.TOUCH.count(np.array([0, 1, 0.02, -1e-9]))[:3] == [1, 1, 1]


@pytest.mark.parametrize(
    ("samples", "expected_db"),
    [
        ([0] * 9, -100.0),
        ([1, *[0] * 10**6], -100.0),  # -150, but nothing is less than silence
        ([-(2**15)] * 9, 0.0),
        ([2**14, -(2**14)], 20 * math.log10(0.5)),
    ],
)
def test_the_level_of_a_window_is_its_rms(samples, expected_db):
    found = statistics.level_db(np.array(samples, np.int16))
    assert found == pytest.approx(expected_db, abs=1e-12)


# --- of sets ---------------------------------------------------------------------------------


def rows_of(out: Path, array: str) -> np.ndarray:
    """Every finite row of the train split's sensors, by zarr."""
    found = []
    for path in out.glob("train-*.proprio.zarr.zip"):
        with zarr.storage.ZipStore(path, mode="r") as store:
            found.append(zarr.open_group(store, mode="r")[array][:])
    rows = np.concatenate(found).astype(np.float64)
    rows = rows.reshape(-1, rows.shape[-1])
    return rows[np.isfinite(rows).all(axis=1)]


def levels_of(out: Path) -> np.ndarray:
    """Levels of the train split's windows, by tarfile and wave."""
    found = []
    for path in out.glob("train-*.audio.tar"):
        for content in tar_members(path).values():
            with wave.open(io.BytesIO(content)) as sound:
                samples = np.frombuffer(sound.readframes(-1), "<i2") / 2**15
            rms = np.sqrt(np.mean(samples**2))
            found.append(20 * np.log10(max(rms, 1e-5)))
    return np.array(found).reshape(-1, 1)


def test_statistics_are_numpys_over_the_train_split(built):
    found = read_manifest(built).statistics
    proprio = [statistics.ANGLE] * 10 + [statistics.VELOCITY] * 10
    for name, rows, axes in (
        ("touch", rows_of(built, "touch"), [statistics.TOUCH] * 5),
        ("proprio", rows_of(built, "proprio"), proprio),
        ("audio_level", levels_of(built).astype(np.float32).astype(np.float64), [statistics.LEVEL]),
    ):
        assert found[name]["count"] == len(rows) > 0
        np.testing.assert_allclose(found[name]["mean"], rows.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found[name]["std"], rows.std(axis=0), rtol=1e-9, atol=1e-9)
        assert found[name]["range"] == [[axis.low, axis.high] for axis in axes]
        assert numpys(rows, axes).items() <= found[name].items()
    ids: Counter[int] = Counter()
    for path in built.glob("train-*.text.tar"):
        for content in tar_members(path).values():
            ids.update(json.loads(content)["internal"]["ids"])
    assert {i: n for i, n in enumerate(found["internal_tokens"]) if n} == ids


@pytest.mark.parametrize(
    "num_workers",
    [0, *(pytest.param(n, marks=[pytest.mark.slow]) for n in (1, 2))],
)
@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_other_shards_and_workers_give_the_same_statistics(built, recorded, tmp_path, num_workers):
    build(recorded, tmp_path / "small", SMALL, num_workers=num_workers)
    one, other = read_manifest(tmp_path / "small"), read_manifest(built)
    assert len(one.shards) > len(other.shards) + 1
    assert one.statistics == other.statistics


def test_an_update_gives_the_statistics_of_a_fresh_build(recorded, built, tmp_path):
    tokenizer = built / read_manifest(built).tokenizer_file
    recipe = tiny_recipe(text={"tokenizer": str(tokenizer)})
    sessions, out = tmp_path / "sessions", tmp_path / "out"
    sessions.mkdir()
    for name in ("dan", "cat", "bob", "ann"):  # a shard each
        (sessions / name).symlink_to(recorded / name)
        build(sessions, out, recipe)
    build(recorded, tmp_path / "fresh", recipe)
    one, other = read_manifest(out), read_manifest(tmp_path / "fresh")
    assert len(one.shards) > len(other.shards)
    assert one.statistics == other.statistics


def test_a_shard_without_exact_sums_is_refused_with_a_fix():
    shard = {"num_samples": 1, "touch": {"count": 1, "min": [0.0], "max": [1.0]}}
    empty = {name: {"count": 0} for name in ("proprio", "audio_level_db")}
    with pytest.raises(ShardError, match=r"touch: a shard .* lacks 'exact_sum'.*; fix: remove"):
        statistics.merge([{**empty, **shard}])
