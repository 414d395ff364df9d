"""Recommendations from measurements made by hand; every expected gain is calculated by hand."""

from __future__ import annotations

import pytest

from train.config import as_train_config
from train.tools.advice import Measurements, as_arguments, recommend, suggest

GIB = 2**30


def make(num_workers, rates, *, cached=(100.0, 100.0, 100.0), **values):
    values = {
        "decode_fraction": 0.0,
        "memory_bytes": 1 * GIB,
        "memory_limit_bytes": 10 * GIB,
        "could_use_bf16": False,
        **values,
    }
    return Measurements(num_workers=num_workers, rates=rates, cached_rates=cached, **values)


def config(**data):
    return as_train_config({"data": {"shards": "shards/default", **data}})


def suggestions(measured, settings=None):
    """The changes that are suggested, apart from compiling."""
    changes = [dict(each.change) for each in suggest(measured, settings or config())]
    return [change for change in changes if "training.compile" not in change]


def step_bound(others=(), **values):
    return make(2, {2: (100.0, 100.0, 100.0), **dict(others)}, **values)


def loader_bound(others=(), **values):
    return make(1, {1: (50.0, 50.0, 50.0), **dict(others)}, **values)


CASES = {
    "a loader that limits gets the processes that were faster: 90 / 50": (
        loader_bound({2: (90.0, 90.0, 90.0)}),
        [({"data.num_workers": 2}, "1.80x samples/s")],
    ),
    "of settings that are nearly equal the one with fewer processes is chosen": (
        loader_bound({2: (98.0, 98.0, 98.0), 4: (99.0, 99.0, 99.0)}),
        [({"data.num_workers": 2}, "1.96x samples/s")],
    ),
    "more processes are chosen if they are clearly better": (
        loader_bound({2: (70.0, 70.0, 70.0), 4: (99.0, 99.0, 99.0)}),
        [({"data.num_workers": 4}, "1.98x samples/s")],
    ),
    "fewer processes are recommended as well: 120 / 100": (
        step_bound({0: (120.0, 120.0, 120.0)}),
        [({"data.num_workers": 0}, "1.20x samples/s")],
    ),
    "nothing if the step limits": (
        step_bound({1: (100.0, 101.0, 99.0), 4: (101.0, 100.0, 102.0)}),
        [],
    ),
    "nothing if one round says otherwise": (
        loader_bound({2: (90.0, 90.0, 49.0)}),
        [],
    ),
    "nothing for a gain within the noise": (
        step_bound({4: (105.0, 105.0, 105.0)}),
        [],
    ),
    "nothing for a setting that failed": (
        loader_bound({2: ()}),
        [],
    ),
}


@pytest.mark.parametrize(("measured", "expected"), CASES.values(), ids=CASES)
def test_recommendations_follow_from_the_measurements(measured, expected):
    assert [(dict(r.change), r.expected_gain) for r in recommend(measured)] == expected


def test_the_reason_quotes_the_figures_that_it_follows_from():
    (only,) = recommend(loader_bound({2: (90.0, 90.0, 90.0)}))
    assert all(figure in only.why for figure in ("50", "90", "100"))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data.num_workers": 4}, "data.num_workers=4"),
        ({"training.compile": True}, "training.compile=true"),
        ({"a.b": 1, "c.d": "bf16"}, "a.b=1 c.d=bf16"),
    ],
)
def test_a_change_is_formatted_as_arguments_of_the_command(change, line):
    assert as_arguments(change) == line


def test_headspace_is_the_median_ratio_of_the_rounds():
    measured = make(1, {1: (50.0, 80.0, 100.0)}, cached=(100.0, 100.0, 100.0))
    assert measured.headspaces == [2.0, 1.25, 1.0]
    assert measured.headspace == 1.25


def test_compiling_is_suggested_unless_it_is_on():
    assert [r.name for r in suggest(step_bound(), config())] == ["compile"]
    compiled = as_train_config({"training": {"compile": True}})
    assert suggest(step_bound(), compiled) == []


def test_shards_are_suggested_if_decoding_sessions_limits():
    measured = loader_bound(decode_fraction=0.75)
    sessions = as_train_config({"data": {"root_dir": "data/sessions"}})
    assert suggestions(measured, sessions) == [{"data.shards": "shards/default"}]
    advice = suggest(measured, sessions)[0]
    assert advice.expected_gain == "not measured; the loader at most 4.0x"
    assert "`make shards`" in advice.why


def test_a_codec_that_decodes_faster_is_suggested_if_decoding_shards_limits():
    measured = loader_bound(decode_fraction=0.8)
    assert suggestions(measured) == [{"video.codec": "yuv420"}]
    assert "5.0x" in suggest(measured, config())[0].expected_gain  # 1 / (1 - 0.8)
    assert suggestions(step_bound(decode_fraction=0.8)) == []


def test_bf16_is_suggested_if_the_step_limits_and_the_gpu_has_it():
    assert suggestions(step_bound(could_use_bf16=True)) == [{"training.precision": "bf16"}]
    assert suggestions(loader_bound(could_use_bf16=True)) == []


def test_gradient_checkpointing_is_suggested_if_a_step_nearly_fills_the_memory():
    full = step_bound(memory_bytes=9 * GIB)
    assert suggestions(full) == [{"model.gradient_checkpointing": True}]
    assert "9 GiB of 10 GiB" in suggest(full, config())[0].why
    assert suggestions(step_bound(memory_bytes=8 * GIB)) == []


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [(4, [{"data.batch_size": 2, "training.accumulation_steps": 2}]), (3, [])],
)
def test_with_checkpointing_on_smaller_micro_batches_are_suggested(batch_size, expected):
    settings = as_train_config(
        {"data": {"batch_size": batch_size}, "model": {"gradient_checkpointing": True}}
    )
    assert suggestions(step_bound(memory_bytes=9 * GIB), settings) == expected
