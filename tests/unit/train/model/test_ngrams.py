"""Sequence models of the baselines, against dictionaries and loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.model.baselines import Trigrams, count_level_pairs, level_transitions

VOCAB = 6


def make_tokens(seed, *, size=4, ticks=9):
    """Tokens of which the first two are frequent, with garbage under the masks."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice(VOCAB, (size, ticks), p=[0.5, 0.2, 0.1, 0.1, 0.06, 0.04])
    valid = rng.random((size, ticks)) < 0.8
    tokens[~valid] = 77
    weight = rng.choice([0.0, 1.0], size, p=[0.3, 0.7])
    return tokens, valid, weight


def as_tensors(case):
    return tuple(torch.from_numpy(array) for array in case)


def fit(seeds):
    trigrams = Trigrams.none(VOCAB)
    for seed in seeds:
        trigrams = trigrams.with_more(*as_tensors(make_tokens(seed)))
    return trigrams


def seen_before(tokens, valid, b, t):
    """The two tokens at ticks t - 1 and t, silence where there is none."""
    return tuple(int(tokens[b, s]) if s >= 0 and valid[b, s] else 0 for s in (t - 1, t))


def counted(seeds):
    """Counter of (first, second, third)."""
    counts = Counter()
    for seed in seeds:
        tokens, valid, weight = make_tokens(seed)
        for b in range(len(tokens)):
            for t in range(1, tokens.shape[1]):
                if weight[b] and valid[b, t]:
                    counts[(*seen_before(tokens, valid, b, t - 1), int(tokens[b, t]))] += 1
    return counts


def kneser_ney(counts):
    """A function of (context, token), written down from Chen & Goodman 1999."""
    tables = {3: counts}
    tables[2] = Counter(gram[1:] for gram in tables[3])
    tables[1] = Counter(gram[1:] for gram in tables[2])

    def prob(context, token):
        order = len(context) + 1
        table = tables[order]
        ones, twos = (sum(n == k for n in table.values()) for k in (1, 2))
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        lower = prob(context[1:], token) if context else 1 / VOCAB
        followers = {gram[-1]: n for gram, n in table.items() if gram[:-1] == context}
        total = sum(followers.values())
        if not total:
            return lower
        kept = discount * len(followers) / total
        return max(followers.get(token, 0) - discount, 0) / total + kept * lower

    return prob


@pytest.mark.parametrize("seeds", [(0,), (1, 2, 3), range(40)], ids=len)
@pytest.mark.parametrize("pad_weight", [0.1, 1.0])
def test_the_trigram_is_kneser_neys_as_dictionaries_give_it(seeds, pad_weight):
    prob = kneser_ney(counted(seeds))
    tokens, valid, _ = make_tokens(1000)
    found = fit(seeds).log_probs(*as_tensors((tokens, valid)), pad_weight=pad_weight)
    for b in range(len(tokens)):
        for t in range(tokens.shape[1]):
            context = seen_before(tokens, valid, b, t)
            shares = np.array([prob(context, token) for token in range(VOCAB)])
            assert shares.sum() == pytest.approx(1, rel=1e-9)
            shares[0] *= pad_weight
            np.testing.assert_allclose(found[b, t].exp(), shares / shares.sum(), rtol=1e-5)


@settings(max_examples=30)
@given(
    seeds=st.lists(st.integers(0, 99), max_size=3), pad_weight=st.sampled_from([0.0, 1e-3, 0.1, 1])
)
def test_every_distribution_is_proper_and_positive(seeds, pad_weight):
    tokens, valid, _ = as_tensors(make_tokens(1000))
    log_probs = fit(seeds).log_probs(tokens, valid, pad_weight=pad_weight)
    assert torch.isfinite(log_probs).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(tokens.shape))


def test_counts_are_kept_once_per_different_trigram_in_any_vocabulary():
    tokens = torch.tensor([[199_999, 199_998, 199_997] * 30])
    everything = (tokens, torch.ones_like(tokens, dtype=torch.bool), torch.ones(1))
    trigrams = Trigrams.none(200_000).with_more(*everything).with_more(*everything)
    assert len(trigrams.keys) == 4  # the cycle's three, and the first after silence
    assert trigrams.counts.sum() == 2 * 89
    assert trigrams.log_probs(tokens[:, :2], everything[1][:, :2], pad_weight=0.1).argmax(
        -1
    ).tolist() == [[199_998, 199_997]]


def test_silence_has_the_share_with_the_lowest_loss():
    """Tilted by its weight, the distribution is the best one under a loss with that weight."""
    tokens = torch.from_numpy(np.random.default_rng(0).choice(3, (1, 4000), p=[0.6, 0.3, 0.1]))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    trigrams = Trigrams.none(3).with_more(tokens, valid, torch.ones(1))
    weights = torch.where(tokens[:, 1:] == 0, 0.1, 1.0)

    def loss(pad_weight):
        log_probs = trigrams.log_probs(tokens, valid, pad_weight=pad_weight)[:, :-1]
        return float((-log_probs.gather(2, tokens[:, 1:, None])[..., 0] * weights).sum())

    assert loss(0.1) < min(loss(0.05), loss(0.2), loss(1.0))


def test_level_pairs_are_what_a_loop_over_frames_counts():
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 4, (3, 12, 2), "u1")
    valid = rng.random((3, 12)) < 0.7
    levels[~valid] = 77
    weight = np.array([1.0, 0.0, 0.5])
    expected = np.zeros((2, 4, 4))
    for b in range(3):
        for frame in range(3, 12):
            for channel in range(2):
                if valid[b, frame - 1] and valid[b, frame]:
                    pair = levels[b, frame - 1, channel], levels[b, frame, channel]
                    expected[channel][pair] += weight[b]
    found = count_level_pairs(*as_tensors((levels, valid, weight)), first=3, num_levels=4)
    np.testing.assert_allclose(found, expected)


def test_transitions_of_a_level_never_seen_are_the_channels_own_distribution():
    pairs = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    own = torch.tensor([[0.75, 0.25]]).log()
    expected = [[[3.75 / 5, 1.25 / 5], [0.75, 0.25]]]
    np.testing.assert_allclose(level_transitions(pairs, own), expected, rtol=1e-6)
