"""Sampling from logits, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.errors import ConfigError
from train.infer.stream import Sampling, choose, mask_unlikely

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)


def probabilities(logits, *, temperature, top_k=None, top_p=None):
    """Probabilities of the values, in plain numpy; None if rounding decides which are excluded."""
    scaled = np.array(logits, dtype=np.float64) / temperature
    if top_k is not None:
        kth = np.sort(scaled)[::-1][min(top_k, len(scaled)) - 1]
        scaled = np.where(scaled >= kth, scaled, -np.inf)
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    if top_p is not None and top_p < 1:
        order = sorted(range(len(shares)), key=lambda i: (-scaled[i], i))  # shares tie by rounding
        before = 0.0
        for index in order:
            if abs(before - top_p) < 1e-5:
                return None
            kept = before < top_p
            before += shares[index]
            shares[index] *= kept
        shares /= shares.sum()
    return shares


@given(
    LOGITS,
    st.sampled_from([0.3, 1.0, 2.5]),
    st.none() | st.integers(1, 14),
    st.none() | st.floats(0.01, 1.0),
)
def test_temperature_top_k_and_top_p_are_those_of_plain_numpy(logits, temperature, top_k, top_p):
    expected = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assume(expected is not None)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    kept = mask_unlikely(torch.tensor(logits) / temperature, sampling)
    np.testing.assert_allclose(kept.softmax(-1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_options_without_effect_at_temperature_0_are_refused(options):
    with pytest.raises(ConfigError, match="set --temperature 1"):
        Sampling(**options)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5}, {"temperature": 1.0, "top_k": 3}, {"temperature": 2.0, "top_p": 0.7}],
    ids=str,
)
def test_values_are_drawn_with_their_probabilities(options):
    logits = np.log([0.1, 0.5, 0.15, 0.25])
    rows = torch.from_numpy(logits).expand(20_000, -1)
    drawn = choose(rows, Sampling(**options), generator=torch.Generator().manual_seed(0))
    shares = np.bincount(drawn.numpy(), minlength=4) / 20_000
    np.testing.assert_allclose(shares, probabilities(logits, **options), atol=0.015)


def test_without_temperature_the_most_likely_value_is_chosen_and_nothing_is_drawn():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(1))
    chosen = choose(logits, Sampling(), generator=generator)
    np.testing.assert_array_equal(chosen.numpy(), logits.numpy().argmax(-1))
    assert torch.equal(generator.get_state(), before)


def test_the_same_seed_draws_the_same_values():
    logits = torch.zeros(50, 100)
    one, other, third = (
        choose(logits, Sampling(temperature=1), generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 2}])
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
