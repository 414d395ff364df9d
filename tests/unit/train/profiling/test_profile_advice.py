"""Recommendations from hand-made figures; every expected gain is calculated by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.profiling.advice import expected_rate, recommend, untested
from train.profiling.figures import Figures, LoaderPoint, Variant

GIB = 2**30


def point(workers, *rounds, prefetch=2, alone=1000.0):
    return LoaderPoint(
        num_workers=workers,
        prefetch_batches=prefetch,
        training_samples_per_s=rounds,
        loader_samples_per_s=(alone,) * len(rounds),
    )


def variant(change, *rounds, peak_gib=1.0):
    return Variant(change=change, samples_per_s=rounds, peak_memory_bytes=int(peak_gib * GIB))


def make(configured, *, cached=(100.0, 100.0, 100.0), sweep=(), prefetch=(), **given_):
    variants = given_.pop("variants", ())
    return Figures(
        configured=configured,
        sweep=tuple(sweep),
        prefetch_base=given_.pop("prefetch_base", configured),
        prefetch_sweep=tuple(prefetch),
        cached=variant({}, *cached, peak_gib=given_.pop("peak_gib", 1.0)),
        variants=tuple(variants),
        headspaces=tuple(
            c / t for c, t in zip(cached, configured.training_samples_per_s, strict=True)
        ),
        memory_limit_bytes=10 * GIB,
        **given_,
    )


def gains(figures):
    return [(dict(r.change), r.expected_gain) for r in recommend(figures)]


COMPUTE_BOUND = point(2, 100.0, 100.0, 100.0)
LOADER_BOUND = point(1, 50.0, 50.0, 50.0, alone=50.0)
BF16 = {"training.precision": "bf16"}
CHECKPOINTING = {"model.gradient_checkpointing": True}

CASES = {
    "a loader that limits gets the processes that were faster: 90 / 50": (
        make(LOADER_BOUND, sweep=[point(2, 90.0, 90.0, 90.0)]),
        [({"data.num_workers": 2}, "1.80x samples/s")],
    ),
    "of settings that are nearly equal the one with fewer processes is taken": (
        make(LOADER_BOUND, sweep=[point(2, 98.0, 98.0, 98.0), point(4, 99.0, 99.0, 99.0)]),
        [({"data.num_workers": 2}, "1.96x samples/s")],
    ),
    "more processes are taken where they are clearly better": (
        make(LOADER_BOUND, sweep=[point(2, 70.0, 70.0, 70.0), point(4, 99.0, 99.0, 99.0)]),
        [({"data.num_workers": 4}, "1.98x samples/s")],
    ),
    "fewer processes are recommended as well: 120 / 100": (
        make(COMPUTE_BOUND, sweep=[point(0, 120.0, 120.0, 120.0)]),
        [({"data.num_workers": 0}, "1.20x samples/s")],
    ),
    "nothing where the step limits": (
        make(COMPUTE_BOUND, sweep=[point(1, 100.0, 101.0, 99.0), point(4, 101.0, 100.0, 102.0)]),
        [],
    ),
    "nothing where one round says otherwise": (
        make(LOADER_BOUND, sweep=[point(2, 90.0, 90.0, 49.0)]),
        [],
    ),
    "nothing for a gain within the noise": (
        make(COMPUTE_BOUND, sweep=[point(4, 105.0, 105.0, 105.0)]),
        [],
    ),
    "a depth of prefetching is judged beside the same number of processes: 75 / 60": (
        make(
            COMPUTE_BOUND,
            prefetch_base=point(2, 60.0, 60.0, 60.0),
            prefetch=[point(2, 75.0, 75.0, 75.0, prefetch=4)],
        ),
        [({"data.prefetch_batches": 4}, "1.25x samples/s")],
    ),
    # Found later, when the machine was half as fast: 60 / 50 * 36 / 30.
    "with other processes than configured it takes these too, and is worth both gains": (
        make(
            LOADER_BOUND,
            sweep=[point(2, 60.0, 60.0, 60.0)],
            prefetch_base=point(2, 30.0, 30.0, 30.0),
            prefetch=[point(2, 36.0, 36.0, 36.0, prefetch=4)],
        ),
        [({"data.num_workers": 2, "data.prefetch_batches": 4}, "1.44x samples/s")],
    ),
    "without processes nothing is prefetched, so it takes one: 24 / 20": (
        make(
            point(0, 20.0, 20.0, 20.0),
            sweep=[point(1, 20.5, 20.5, 20.5)],
            prefetch_base=point(1, 20.5, 20.5, 20.5),
            prefetch=[point(1, 24.0, 24.0, 24.0, prefetch=3)],
        ),
        [({"data.num_workers": 1, "data.prefetch_batches": 3}, "1.20x samples/s")],
    ),
    "a faster step is worth its gain where the loader waits for it": (
        make(COMPUTE_BOUND, variants=[variant(BF16, 150.0, 150.0, 150.0)]),
        [(BF16, "1.50x samples/s")],
    ),
    "but no more than the loader gives: 120 / 100": (
        make(
            point(2, 100.0, 100.0, 100.0, alone=120.0),
            variants=[variant(BF16, 150.0, 150.0, 150.0)],
        ),
        [(BF16, "1.20x samples/s")],
    ),
    "and nothing where the loader limits": (
        make(LOADER_BOUND, variants=[variant(BF16, 300.0, 300.0, 300.0)]),
        [],
    ),
    # 10 ms per sample with the loader, 5 of them on the step; 2.5 with bf16: 7.5 ms.
    "without processes the loader's time stays: 10 / 7.5": (
        make(
            point(0, 100.0, 100.0, 100.0),
            cached=(200.0, 200.0, 200.0),
            variants=[variant(BF16, 400.0, 400.0, 400.0)],
        ),
        [(BF16, "1.33x samples/s")],
    ),
    "of batch sizes the best one, with what keeps the training the same": (
        make(
            COMPUTE_BOUND,
            variants=[
                variant(
                    {"data.batch_size": 16, "training.accumulation_steps": 2}, 130.0, 130.0, 130.0
                ),
                variant(
                    {"data.batch_size": 32, "training.accumulation_steps": 1}, 140.0, 140.0, 140.0
                ),
            ],
        ),
        [({"data.batch_size": 32, "training.accumulation_steps": 1}, "1.40x samples/s")],
    ),
    "none that does not fit": (
        make(
            COMPUTE_BOUND,
            variants=[variant({"data.batch_size": 32}, 140.0, 140.0, 140.0, peak_gib=11)],
        ),
        [],
    ),
    "the largest gain comes first": (
        make(
            COMPUTE_BOUND,
            sweep=[point(4, 120.0, 120.0, 120.0)],
            variants=[variant(BF16, 150.0, 150.0, 150.0)],
        ),
        [(BF16, "1.50x samples/s"), ({"data.num_workers": 4}, "1.20x samples/s")],
    ),
    "checkpointing where a larger batch lacked memory: 2 of 4 GiB at 100 / 80 of the time": (
        make(
            COMPUTE_BOUND,
            peak_gib=4.0,
            variants=[
                variant(CHECKPOINTING, 80.0, 80.0, 80.0, peak_gib=2.0),
                Variant(change={"data.batch_size": 16}, problem="no room", lacks_memory=True),
            ],
        ),
        [(CHECKPOINTING, "0.50x memory at 1.25x time")],
    ),
    "checkpointing where the step nearly fills the memory": (
        make(
            COMPUTE_BOUND,
            peak_gib=9.0,
            variants=[variant(CHECKPOINTING, 80.0, 80.0, 80.0, peak_gib=3.0)],
        ),
        [(CHECKPOINTING, "0.33x memory at 1.25x time")],
    ),
    "no checkpointing where there is room": (
        make(
            COMPUTE_BOUND,
            peak_gib=4.0,
            variants=[variant(CHECKPOINTING, 80.0, 80.0, 80.0, peak_gib=2.0)],
        ),
        [],
    ),
    "none of what failed": (
        make(
            LOADER_BOUND,
            sweep=[LoaderPoint(num_workers=2, prefetch_batches=2, problem="a process was lost")],
            variants=[Variant(change=BF16, problem="no such kernel")],
        ),
        [],
    ),
}


@pytest.mark.parametrize(("figures", "expected"), CASES.values(), ids=CASES)
def test_recommendations_follow_from_the_figures(figures, expected):
    assert gains(figures) == expected


def test_the_reason_names_the_figures_that_it_follows_from():
    (found,) = recommend(make(LOADER_BOUND, sweep=[point(2, 90.0, 90.0, 90.0)]))
    assert all(figure in found.why for figure in ("50", "90", "100"))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data.num_workers": 4}, "data.num_workers=4"),
        ({"training.compile": True}, "training.compile=true"),
        ({"a.b": 1, "c.d": "bf16"}, "a.b=1 c.d=bf16"),
    ],
)
def test_a_recommendation_is_what_one_adds_to_the_command(change, line):
    (found,) = recommend(make(COMPUTE_BOUND, variants=[variant(change, 150.0, 150.0, 150.0)]))
    assert found.as_arguments() == line


rates = st.floats(1, 1000)


@given(cached=rates, loader=rates, faster=rates, workers=st.integers(0, 2))
def test_no_more_is_promised_than_step_and_loader_can_give(cached, loader, faster, workers):
    together = min(cached, loader) if workers else 1 / (1 / cached + 1 / loader)
    configured = point(workers, together, alone=loader)
    figures = make(configured, cached=(cached,))
    limit = min(faster, loader) if workers else 1 / (1 / faster + 1 / loader)
    assert expected_rate(figures, faster) <= limit * (1 + 1e-9)


def test_compiling_is_named_as_untested_unless_it_was_tried():
    assert [r.what for r in untested(make(COMPUTE_BOUND))] == ["compile"]
    tried = make(COMPUTE_BOUND, variants=[variant({"training.compile": True}, 1.0, 1.0, 1.0)])
    assert untested(tried) == []


def test_recordings_are_to_be_built_into_shards_where_decoding_limits():
    figures = make(LOADER_BOUND, decode_fraction=0.75, are_shards=False)
    (advice,) = [r for r in untested(figures) if r.what != "compile"]
    assert (dict(advice.change), advice.expected_gain) == (
        {"data.shards": "shards/default"},
        "not measured; the loader at most 4.0x",
    )
    assert "`make shards`" in advice.why


def test_a_codec_that_decodes_faster_is_named_where_decoding_limits():
    figures = dataclasses.replace(make(LOADER_BOUND), decode_fraction=0.8)
    codec = next(r for r in untested(figures) if r.what == "codec")
    assert "5.0x" in codec.expected_gain  # 1 / (1 - 0.8)
    idle = dataclasses.replace(make(COMPUTE_BOUND), decode_fraction=0.8)
    assert "codec" not in [r.what for r in untested(idle)]
