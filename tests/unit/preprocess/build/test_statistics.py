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
from shared.kinds.audio import encode_wav
from shared.shardset.layout import columns_of
from shared.shardset.manifest import read_manifest
from shared.streams import SensorStream, ValueType

if TYPE_CHECKING:
    from pathlib import Path

    from shared.recipe import Recipe

SMALL = tiny_recipe(shard={"target_bytes": 2**16})
"""A segment per shard."""

UNIT = 2**1074

AXES = [statistics.AXES[t] for t in (ValueType.FRACTION, ValueType.ANGLE, ValueType.SCALAR)]

ANGLE, VELOCITY, FRACTION = (
    statistics.AXES[t] for t in (ValueType.ANGLE, ValueType.VELOCITY, ValueType.FRACTION)
)


# --- exact sums ------------------------------------------------------------------------------

anything = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays(np.float32, st.integers(0, 20), elements=anything))
def test_sums_are_those_of_fractions(values):
    total, squares = exact_sums(values)
    numbers = [Fraction(x) for x in values.tolist()]
    assert Fraction(add_exactly([total]), UNIT) == sum(numbers)
    assert Fraction(add_exactly([squares]), UNIT) == sum(x * x for x in numbers)
    assert float.fromhex(total) == float(sum(numbers))


def test_a_sum_is_written_in_lowest_terms():
    assert exact_sums(np.array([-0.75, -0.75], np.float32)) == ("-0x3p-1", "0x9p-3")
    assert exact_sums(np.array([0.0, -0.0], np.float32)) == ("0x0p0", "0x0p0")


def test_sums_of_many_values_are_exact():
    values = np.full(2**17, np.float32(1) - np.float32(2**-24), np.float32)
    exact = Fraction(values[0].item())
    total, squares = exact_sums(values)
    assert Fraction(add_exactly([total]), UNIT) == 2**17 * exact
    assert Fraction(add_exactly([squares]), UNIT) == 2**17 * exact * exact


def test_a_deviation_far_from_zero_does_not_cancel():
    values = np.float32(1e7) + np.arange(3, dtype=np.float32).reshape(-1, 1)
    found = merged([values], axes=[VELOCITY])
    assert found["mean"] == [10000001.0]
    assert found["std"] == [math.sqrt(2 / 3)]


# --- merging ---------------------------------------------------------------------------------

RECIPE = tiny_recipe(
    audio={"dmel": {"levels": 4, "channels": 4}},
    streams={
        "sound": {"kind": "audio", "file": "a.wav"},
        "moves": {
            "kind": "sensor",
            "key": "moves",
            "values": [
                {"count": 1, "type": "fraction"},
                {"count": 1, "type": "angle"},
                {"count": 1, "type": "scalar"},
            ],
        },
        "gone": {"kind": "sensor", "key": "gone", "values": [{"count": 3, "type": "direction"}]},
        "said": {"kind": "text", "file": "said.jsonl"},
        "eye": {"kind": "video", "file": "eye.mp4"},
    },
)
COLUMNS = columns_of(RECIPE)


def part(values: np.ndarray, tokens: list[int], levels: np.ndarray) -> dict[str, Any]:
    """Statistics of a shard of all columns of RECIPE."""
    contents = {
        "sound": values.reshape(-1)[:4].tolist(),
        "sound.dmel": levels,
        "moves": values,
        "gone": np.full_like(values, np.nan),
        "said": [tokens],
        "eye": [],
    }
    found = {n: statistics.summarize(COLUMNS[n], v, RECIPE) for n, v in contents.items()}
    assert found.pop("eye") is None
    return found


def merged(parts: list[np.ndarray], *, axes: list[statistics.Axis]) -> dict[str, Any]:
    """Merged numbers of some shards' values."""
    return statistics.merge_numbers([statistics.number_statistics(p, axes) for p in parts])


def numpys(rows: np.ndarray, axes: list[statistics.Axis]) -> dict[str, Any]:
    """Histogram, min and max of finite rows, by numpy."""
    found: dict[str, Any] = {"min": rows.min(axis=0).tolist(), "max": rows.max(axis=0).tolist()}
    found["histogram"] = []
    for axis, column in zip(axes, rows.T, strict=True):
        inner, _ = np.histogram(column, np.array(axis.edges))
        outer = int((column < axis.range[0]).sum()), int((column > axis.range[1]).sum())
        found["histogram"].append([outer[0], *inner.tolist(), outer[1]])
    return found


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_merged_statistics_are_numpys_over_all_data(sizes, seed):
    rng = np.random.default_rng(seed)
    values = [rng.normal(0.5, 2, (n, 7, 3)).astype(np.float32) for n in sizes]
    for array in values:
        array[rng.random(array.shape) < 0.1] = np.nan
    tokens = [rng.integers(0, 10, n).tolist() for n in sizes]
    levels = [rng.integers(0, 4, (n, 7, 4), np.uint8) for n in sizes]
    for array in levels:
        array[rng.random(array.shape[:2]) < 0.2] = 255  # masked frames
    parts = [part(*p) for p in zip(values, tokens, levels, strict=True)]
    found = statistics.merge(parts, COLUMNS.values(), num_samples=sum(sizes))
    assert set(found) == {"num_samples", *COLUMNS} - {"eye"}
    assert found["num_samples"] == sum(sizes)
    rows = np.concatenate(values).reshape(-1, 3).astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    assert found["moves"]["count"] == len(rows)
    if len(rows):
        for name in ("mean", "std"):
            expected = getattr(rows, name)(axis=0)
            np.testing.assert_allclose(found["moves"][name], expected, rtol=1e-9, atol=1e-9)
        assert numpys(rows, AXES).items() <= found["moves"].items()
    assert found["gone"] == {"count": 0}
    every = [i for ids in tokens for i in ids]
    counts = [every.count(i) for i in range(max(every, default=-1) + 1)]
    assert found["said"] == {"tokens": counts}
    seen = np.concatenate(levels).reshape(-1, 4)
    assert found["sound.dmel"] == {
        "levels": [[int((c == k).sum()) for k in range(4)] for c in seen.T]
    }


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
    counts = ANGLE.count(np.array([-pi, pi, -4, 4, np.nextafter(pi, np.float32(4))]))
    assert (counts[0], counts[1], counts[-2], counts[-1]) == (1, 1, 1, 2)
    assert sum(counts) == 5
    assert FRACTION.count(np.array([0, 1, 0.02, -1e-9]))[:3] == [1, 1, 1]


def test_bins_of_any_number_are_three_per_decade_on_both_sides_of_zero():
    edges = statistics.LOG.edges
    assert len(edges) == 50
    assert list(edges) == sorted(edges)
    assert edges == tuple(-edge for edge in reversed(edges))
    positive = [edge for edge in edges if edge > 0]
    assert (positive[0], positive[-1]) == (1e-4, 1e4)
    ratios = np.diff(np.log10(positive))
    assert ratios.min() > 0.3
    assert ratios.max() < 0.4
    counts = statistics.LOG.count(np.array([0.0, -9e-5, 1.5, -1.5, 2e4, -1e4]))
    assert (counts[0], counts[1], counts[25], counts[-1], sum(counts)) == (0, 1, 2, 1, 6)


def sensor(*values: tuple[int, str], **keys: Any) -> SensorStream:
    groups = [{"count": count, "type": type_} for count, type_ in values]
    return SensorStream.model_validate({"kind": "sensor", "key": "x", "values": groups, **keys})


def test_expected_ranges_replace_only_the_bins_that_would_not_fit_every_sensor():
    values = ((1, "scalar"), (3, "position"), (1, "angle"), (1, "fraction"), (4, "quaternion"))
    plain = statistics.sensor_axes(sensor(*values))
    expecting = statistics.sensor_axes(sensor(*values, expect={"range": [-2.0, 6.0]}))
    assert plain[:4] == [statistics.LOG] * 4
    assert [axis.range for axis in expecting[:4]] == [[-2.0, 6.0]] * 4
    assert plain[4:] == expecting[4:] == [ANGLE, FRACTION, None, None, None, None]


def test_quaternions_have_no_statistics_and_keep_their_positions():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 6, 5)).astype(np.float32)
    axes = statistics.sensor_axes(sensor((4, "quaternion"), (1, "scalar")))
    found = statistics.merge_numbers(
        [statistics.number_statistics(v, axes) for v in (values, values)]
    )
    assert found["count"] == 60
    for name in ("mean", "std", "min", "max", "range", "scale", "histogram"):
        assert found[name][:4] == [None] * 4
    assert found["mean"][4] == pytest.approx(float(values[..., 4].mean(dtype=np.float64)))
    only = statistics.number_statistics(values[..., :4], axes[:4])
    assert statistics.merge_numbers([only])["mean"] == [None] * 4


@pytest.mark.parametrize(
    ("samples", "expected_db"),
    [
        ([0] * 9, -100.0),
        ([1, *[0] * 10**6], -100.0),  # -150, but nothing is less than silence
        ([-(2**15)] * 9, 0.0),
        ([2**14, -(2**14)], 20 * math.log10(0.5)),
    ],
)
def test_the_level_of_a_segment_is_its_rms(samples, expected_db):
    found = statistics.level_db(encode_wav(np.array(samples, np.int16), rate_hz=8000))
    assert found == pytest.approx(expected_db, abs=1e-12)


# --- of sets ---------------------------------------------------------------------------------


def rows_of(out: Path, stream: str) -> np.ndarray:
    """Every finite row of a sensor in the train split, by zarr."""
    found = []
    for path in out.glob(f"train-*.{stream}.zarr.zip"):
        with zarr.storage.ZipStore(path, mode="r") as store:
            found.append(zarr.open_group(store, mode="r")[stream][:])
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
    levels = levels_of(built).astype(np.float32).astype(np.float64)
    for values, rows, axes in (
        (found["touch"], rows_of(built, "touch"), [FRACTION] * 5),
        (found["proprio"], rows_of(built, "proprio"), [ANGLE] * 10 + [VELOCITY] * 10),
        (found["audio"]["level"], levels, [statistics.LEVEL]),
    ):
        assert values["count"] == len(rows) > 0
        np.testing.assert_allclose(values["mean"], rows.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(values["std"], rows.std(axis=0), rtol=1e-9, atol=1e-9)
        assert values["range"] == [axis.range for axis in axes]
        assert numpys(rows, axes).items() <= values.items()
    ids: Counter[int] = Counter()
    for path in built.glob("train-*.internal_text.tar"):
        for content in tar_members(path).values():
            ids.update(json.loads(content)["ids"])
    assert {i: n for i, n in enumerate(found["internal_text"]["tokens"]) if n} == ids


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


def with_range(limits: list[float] | None) -> Recipe:
    """A recipe whose touch is a scalar of an expected range."""
    touch = {"kind": "sensor", "key": "touch", "values": [{"count": 5, "type": "scalar"}]}
    return tiny_recipe(streams={"touch": {**touch, "expect": {"range": limits}}})


def written(path):
    """Return what changes if a file is written, but not if it is read."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def test_another_expected_range_recounts_what_is_stored(recorded, tmp_path):
    build(recorded, tmp_path / "out", with_range(None))
    before = read_manifest(tmp_path / "out")
    columns = {p: written(p) for p in (tmp_path / "out").glob("*.touch.zarr.zip")}
    build(recorded, tmp_path / "out", with_range([-1.0, 1.0]))
    build(recorded, tmp_path / "fresh", with_range([-1.0, 1.0]))
    after, fresh = (read_manifest(tmp_path / name) for name in ("out", "fresh"))
    assert after.statistics == fresh.statistics
    assert after.statistics["touch"]["range"] == [[-1.0, 1.0]] * 5
    assert after.fingerprint == before.fingerprint  # the samples are the same
    assert {p: written(p) for p in columns} == columns
    assert build(recorded, tmp_path / "out", with_range([-1.0, 1.0])).plan.is_empty


def test_shards_whose_statistics_differ_in_form_are_refused_with_a_fix():
    touch = columns_of(tiny_recipe())["touch"]
    shards = [{"touch": statistics.number_statistics(np.ones((1, 1), np.float32), [FRACTION])}]
    with pytest.raises(ShardError, match=r"statistics of touch: .*'touch'.*; fix: remove"):
        statistics.merge([*shards, {}], [touch], num_samples=2)
    shards.append({"touch": statistics.number_statistics(np.ones((1, 1), np.float32), [ANGLE])})
    with pytest.raises(ShardError, match=r"statistics of touch: .*histograms over.*; fix: remove"):
        statistics.merge(shards, [touch], num_samples=2)
