"""Baselines against loops and dictionaries, fitted and stored."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.models import make_config, make_shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from shared.errors import ConfigError
from shared.streams import DEFAULT_STREAMS, ValueType
from train.model.baselines import (
    Baselines,
    Trigrams,
    compare,
    count_level_pairs,
    level_transitions,
    sensor_outputs,
    unigram,
)
from train.model.losses import Objective

PAD_WEIGHT = 0.25
POSE = [{"count": 2, "type": "angle"}, {"count": 2, "type": "velocity"}]
STREAMS = {**DEFAULT_STREAMS, "proprio": {"kind": "sensor", "key": "proprio", "values": POSE}}
DMEL = {"rate_hz": 20, "fft_size": 256, "channels": 4, "levels": 4}
VOCAB_SIZE = 264


def make_objective(*, vocab_size=VOCAB_SIZE, **weights):
    config = make_config({"model": {"pad_weight": PAD_WEIGHT}}, num_ticks=6, loss_weights=weights)
    text = {"vocab_size": vocab_size}
    shapes = make_shapes(config, streams=STREAMS, audio={"dmel": DMEL}, text=text)
    return Objective.from_config(config, shapes)


OBJECTIVE = make_objective()
HEADS = OBJECTIVE.shapes.heads


def make_batch(seed, *, size=3):
    """Random targets with garbage under the masks, and unequal weights; plain numpy."""
    rng = np.random.default_rng(seed)
    targets = {
        "internal_text": rng.choice(7, (size, 6), p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05]),
        "external_text": rng.integers(0, 3, (size, 6)),
        "audio": rng.choice(4, (size, 12, 4), p=[0.7, 0.1, 0.1, 0.1]).astype("u1"),
        "animation": rng.normal(size=(size, 18, 4)).astype("f4"),
    }
    for head in HEADS:
        valid = rng.random(targets[head].shape[:2]) < 0.7
        targets[head][~valid] = np.nan if head == "animation" else 77
        targets[f"{head}_valid"] = valid
    weight = rng.choice([0.0, 1.0], size).astype("f4")
    weight[0] = 1
    return {"targets": targets, "weight": weight}


TRAIN = [make_batch(seed) for seed in range(4)]
HELD_OUT = make_batch(99, size=5)


@pytest.fixture
def fitted():
    return Baselines.fit(TRAIN, objective=OBJECTIVE)


def mean(losses, name):
    total, count = losses[name]
    return float(total) / float(count)


def token_counts(head):
    counts = [0.0] * VOCAB_SIZE
    for batch in TRAIN:
        for b in range(3):
            for t in range(1, 6):
                if batch["targets"][f"{head}_valid"][b, t]:
                    counts[batch["targets"][head][b, t]] += batch["weight"][b]
    return counts


def level_counts():
    counts = np.zeros((4, 4))
    for batch in TRAIN:
        for b in range(3):
            for frame in range(2, 12):
                if batch["targets"]["audio_valid"][b, frame]:
                    for channel in range(4):
                        level = batch["targets"]["audio"][b, frame, channel]
                        counts[channel, level] += batch["weight"][b]
    return counts


def pair_counts():
    pairs = np.zeros((4, 4, 4))
    for batch in TRAIN:
        targets = batch["targets"]
        for b in range(3):
            for frame in range(2, 12):
                if targets["audio_valid"][b, frame - 1] and targets["audio_valid"][b, frame]:
                    for channel in range(4):
                        before, after = targets["audio"][b, frame - 1 : frame + 1, channel]
                        pairs[channel, before, after] += batch["weight"][b]
    return pairs


def pose_oracle(predict):
    """Mean 1 - cos of angles plus mean smooth L1 of velocities; `predict(last, elapsed_s)`."""
    targets, weight = HELD_OUT["targets"], HELD_OUT["weight"]
    poses, valid = targets["animation"].astype("f8"), targets["animation_valid"]
    errors, shares = [], []
    for b in range(5):
        for sample in range(3, 18):
            if not valid[b, sample]:
                continue
            known = [s for s in range(sample // 3 * 3) if valid[b, s]]
            last = poses[b, known[-1]] if known else np.zeros(4)
            error = predict(last, (sample - known[-1]) / 30 if known else 0.0) - poses[b, sample]
            size = np.abs(error[2:])
            smooth = np.where(size < 1, size**2 / 2, size - 0.5)
            errors.append((1 - np.cos(error[:2])).mean() + smooth.mean())
            shares.append(weight[b])
    return np.average(errors, weights=shares)


def test_copy_last_equals_a_loop_over_samples(fitted):
    expected = pose_oracle(lambda last, elapsed_s: last)
    loss = mean(fitted.losses(HELD_OUT), "animation/copy_last")
    assert loss == pytest.approx(expected, rel=1e-5)


def test_constant_velocity_equals_a_loop_over_samples(fitted):
    expected = pose_oracle(
        lambda last, elapsed_s: np.concatenate([last[:2] + last[2:] * elapsed_s, last[2:]])
    )
    loss = mean(fitted.losses(HELD_OUT), "animation/constant_velocity")
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", ["internal_text", "external_text"])
def test_the_text_unigram_equals_a_loop_over_ticks(fitted, head):
    counts = token_counts(head)
    counts[0] *= PAD_WEIGHT
    total = count = 0.0
    for b in range(5):
        for t in range(1, 6):
            if HELD_OUT["targets"][f"{head}_valid"][b, t]:
                token = HELD_OUT["targets"][head][b, t]
                share = HELD_OUT["weight"][b] * (PAD_WEIGHT if token == 0 else 1.0)
                total -= share * math.log((counts[token] + 1) / (sum(counts) + VOCAB_SIZE))
                count += share
    loss = mean(fitted.losses(HELD_OUT), f"{head}/unigram")
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_the_audio_unigram_equals_a_loop_over_frames_and_channels(fitted):
    counts = level_counts()
    total = count = 0.0
    for b in range(5):
        for frame in range(2, 12):
            if HELD_OUT["targets"]["audio_valid"][b, frame]:
                for channel in range(4):
                    level = HELD_OUT["targets"]["audio"][b, frame, channel]
                    share = (counts[channel, level] + 1) / (counts[channel].sum() + 4)
                    total -= HELD_OUT["weight"][b] * math.log(share)
                    count += HELD_OUT["weight"][b]
    loss = mean(fitted.losses(HELD_OUT), "audio/unigram")
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_the_audio_bigram_equals_a_loop_over_frames_and_channels(fitted):
    pairs = pair_counts()
    alone = (level_counts() + 1) / (level_counts() + 1).sum(1, keepdims=True)
    total = count = 0.0
    levels, valid = HELD_OUT["targets"]["audio"], HELD_OUT["targets"]["audio_valid"]
    for b in range(5):
        for frame in range(2, 12):
            if not valid[b, frame]:
                continue
            for channel in range(4):
                shares = alone[channel]
                if valid[b, frame - 1]:
                    after = pairs[channel, levels[b, frame - 1, channel]]
                    shares = (after + shares) / (after.sum() + 1)
                total -= HELD_OUT["weight"][b] * math.log(shares[levels[b, frame, channel]])
                count += HELD_OUT["weight"][b]
    assert mean(fitted.losses(HELD_OUT), "audio/bigram") == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("head", ["internal_text", "external_text"])
def test_the_trigram_is_scored_on_the_tokens_and_weights_of_the_heads_loss(fitted, head):
    tokens, valid = (HELD_OUT["targets"][f"{head}{end}"] for end in ("", "_valid"))
    log_probs = fitted.trigrams[head].log_probs(
        torch.from_numpy(tokens), torch.from_numpy(valid), pad_weight=PAD_WEIGHT
    )
    total = count = 0.0
    for b in range(5):
        for t in range(1, 6):
            if valid[b, t]:
                share = HELD_OUT["weight"][b] * (PAD_WEIGHT if tokens[b, t] == 0 else 1.0)
                total -= share * float(log_probs[b, t - 1, tokens[b, t]])
                count += share
    assert mean(fitted.losses(HELD_OUT), f"{head}/trigram") == pytest.approx(
        total / count, rel=1e-5
    )


def test_no_other_unigram_has_a_lower_loss_on_the_fitted_counts():
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.integers(1, 10_000, 7).astype("f8"))
    shares = counts.numpy() * np.array([PAD_WEIGHT, *[1.0] * 6])
    best = unigram(counts, pad_weight=PAD_WEIGHT).double().numpy()
    others = np.log(rng.dirichlet(np.exp(best) * 1000, 200))
    assert (-(others * shares).sum(1) >= -(best * shares).sum()).all()


def outputs_of(values, groups, *, valid=None, rate_hz=30, tick_rate_hz=10):
    """Outputs of a sensor's baselines for one window [samples, values]; positions are samples."""
    spec = {"kind": "sensor", "key": "k", "rate_hz": rate_hz, "values": groups}
    num_ticks = len(values) * tick_rate_hz // rate_hz
    config = make_config(num_ticks=num_ticks, loss_weights={"k": 1})
    shape = make_shapes(config, streams={"k": spec}).target_shape("k")
    valid = torch.ones(len(values), dtype=torch.bool) if valid is None else valid
    tensor = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    return sensor_outputs(tensor[None], valid[None], shape, tick_rate_hz=tick_rate_hz)


def test_baselines_do_not_depend_on_the_tick_that_they_predict():
    poses = torch.randn(18, 4)
    changed = poses.clone()
    changed[9:] = torch.nan
    before, after = outputs_of(poses, POSE), outputs_of(changed, POSE)
    for name in ("copy_last", "constant_velocity"):
        assert torch.equal(before[name][:, :3], after[name][:, :3])


def uniform_motion(value_type, times_s):
    """Values that move uniformly from the middle of the window on, [samples, values]."""
    if value_type is ValueType.ANGLE:
        return (np.outer(times_s, [8.0, -9.0]) + np.pi) % (2 * np.pi) - np.pi
    turns = Rotation.from_rotvec(np.outer(times_s, [0.3, 0.2, -0.4]))
    if value_type is ValueType.QUATERNION:
        signs = np.where(np.arange(len(times_s)) % 2, 1, -1)  # one rotation has two quaternions
        return turns.as_quat() * signs[:, None]
    if value_type is ValueType.DIRECTION:
        return turns.apply([0.0, 0.6, 0.8])
    return np.outer(times_s, [1.0, -2.0, 0.5])


@pytest.mark.parametrize("rate_hz", [30, 15])
@pytest.mark.parametrize(
    "value_type", ["scalar", "fraction", "angle", "position", "quaternion", "direction"]
)
def test_constant_velocity_predicts_uniform_motion(value_type, rate_hz):
    times_s = np.arange(20 * rate_hz // 10) / rate_hz
    truth = uniform_motion(ValueType(value_type), times_s)
    groups = [{"count": truth.shape[1], "type": value_type}]
    per_tick = -(-rate_hz // 10)
    ticks = np.floor(np.arange(len(times_s)) * 10 / rate_hz + 1e-9).astype(int)
    places = ticks * per_tick + np.concatenate([np.arange((ticks == t).sum()) for t in range(20)])
    values = np.full((20 * per_tick, truth.shape[1]), np.nan)
    values[places] = truth
    valid = torch.zeros(len(values), dtype=torch.bool)
    valid[places] = True
    spec = {"kind": "sensor", "key": "k", "rate_hz": rate_hz, "values": groups}
    config = make_config(num_ticks=20, loss_weights={"k": 1})
    shape = make_shapes(config, streams={"k": spec}).target_shape("k")
    outputs = sensor_outputs(
        torch.from_numpy(values).float()[None], valid[None], shape, tick_rate_hz=10.0
    )["constant_velocity"][0]
    for sample in np.flatnonzero(ticks >= 2):
        place = places[sample]
        found = outputs[place // per_tick - 1, place % per_tick].numpy()
        error = np.abs(found - truth[sample])
        if value_type == "angle":
            error = np.abs((error + np.pi) % (2 * np.pi) - np.pi)
        elif value_type == "quaternion":
            error = min(error.max(), np.abs(found + truth[sample]).max())
        assert np.max(error) < 2e-3, sample


def test_before_a_second_reading_constant_velocity_stands_still():
    values = np.random.default_rng(0).normal(size=(18, 3))
    valid = torch.zeros(18, dtype=torch.bool)
    valid[4:6] = True
    outputs = outputs_of(values, [{"count": 3, "type": "position"}], valid=valid)
    assert torch.equal(outputs["constant_velocity"], outputs["copy_last"])
    assert not outputs["copy_last"][0, 0].any()
    np.testing.assert_allclose(outputs["copy_last"][0, 5, 2], values[5], rtol=1e-6)


def test_velocities_of_another_unit_are_not_those_of_the_group_before():
    values = np.ones((18, 4))
    other = [POSE[0], {**POSE[1], "unit": "m/s"}]
    moving, still = (
        outputs_of(values, groups)["constant_velocity"][0, 3, :, 0] for groups in (POSE, other)
    )
    np.testing.assert_allclose(moving, 1 + np.arange(1, 4) / 30, rtol=1e-6)
    np.testing.assert_allclose(still, 1.0, rtol=1e-6)


def test_fitting_on_batches_equals_fitting_on_single_rows(fitted):
    rows = [
        {
            "targets": {k: v[b : b + 1] for k, v in batch["targets"].items()},
            "weight": batch["weight"][b : b + 1],
        }
        for batch in TRAIN
        for b in range(3)
    ]
    alone = Baselines.fit(rows, objective=OBJECTIVE).as_dict()
    torch.testing.assert_close(alone, fitted.as_dict(), rtol=0, atol=0)


def test_sums_of_batches_give_the_mean_over_all_their_rows(fitted):
    both = {
        "targets": {
            k: np.concatenate([TRAIN[0]["targets"][k], HELD_OUT["targets"][k]])
            for k in HELD_OUT["targets"]
        },
        "weight": np.concatenate([TRAIN[0]["weight"], HELD_OUT["weight"]]),
    }
    together = fitted.losses(both)
    for name, loss in fitted.mean_losses([TRAIN[0], HELD_OUT]).items():
        assert loss == pytest.approx(mean(together, name), rel=1e-5), name


def test_baselines_survive_torchs_safe_loader(fitted, tmp_path):
    torch.save(fitted.as_dict(), tmp_path / "x.pt")
    values = torch.load(tmp_path / "x.pt", weights_only=True)
    read = Baselines.from_dict(values, objective=OBJECTIVE)
    assert read.mean_losses([HELD_OUT]) == fitted.mean_losses([HELD_OUT])


def test_counts_of_another_model_are_refused(fitted):
    with pytest.raises(ConfigError, match=r"shape \[264\].* needs \[265\]"):
        Baselines.from_dict(fitted.as_dict(), objective=make_objective(vocab_size=265))


def test_without_counts_only_sensors_have_baselines(fitted):
    losses = Baselines.from_dict({}, objective=OBJECTIVE).mean_losses([HELD_OUT])
    fitted_losses = fitted.mean_losses([HELD_OUT])
    names = ("animation/copy_last", "animation/constant_velocity")
    assert losses == {name: fitted_losses[name] for name in names}


def test_disabled_heads_have_no_baseline():
    objective = make_objective(animation=0, audio=0)
    losses = Baselines.fit(TRAIN, objective=objective).losses(HELD_OUT)
    names = ("unigram", "trigram")
    assert set(losses) == {f"{h}_text/{name}" for h in ("internal", "external") for name in names}


def test_compare_shows_which_heads_beat_which_baseline():
    rows = compare(
        {"loss_total": 9.0, "loss_audio": 1.0, "loss_animation": 0.3, "loss_internal_text": None},
        {
            "audio/unigram": 2.0,
            "animation/copy_last": 0.2,
            "animation/constant_velocity": math.nan,
            "internal_text/unigram": 3.0,
        },
    )
    assert [(r.head, r.baseline, r.is_better) for r in rows] == [
        ("audio", "unigram", True),
        ("animation", "copy_last", False),
    ]


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


def fit_trigrams(seeds):
    trigrams = Trigrams.none(VOCAB)
    for seed in seeds:
        trigrams = trigrams.with_more(*as_tensors(make_tokens(seed)))
    return trigrams


def context_at(tokens, valid, b, t):
    """The tokens at ticks t - 1 and t; silence if there is none."""
    return tuple(int(tokens[b, s]) if s >= 0 and valid[b, s] else 0 for s in (t - 1, t))


def trigram_counts(seeds):
    """Counter of (first, second, third)."""
    counts = Counter()
    for seed in seeds:
        tokens, valid, weight = make_tokens(seed)
        for b in range(len(tokens)):
            for t in range(1, tokens.shape[1]):
                if weight[b] and valid[b, t]:
                    counts[(*context_at(tokens, valid, b, t - 1), int(tokens[b, t]))] += 1
    return counts


def kneser_ney(counts):
    """Probability as a function of (context, token), after Chen & Goodman 1999."""
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
def test_the_trigram_equals_kneser_ney_by_dictionaries(seeds, pad_weight):
    prob = kneser_ney(trigram_counts(seeds))
    tokens, valid, _ = make_tokens(1000)
    log_probs = fit_trigrams(seeds).log_probs(*as_tensors((tokens, valid)), pad_weight=pad_weight)
    for b in range(len(tokens)):
        for t in range(tokens.shape[1]):
            context = context_at(tokens, valid, b, t)
            shares = np.array([prob(context, token) for token in range(VOCAB)])
            assert shares.sum() == pytest.approx(1, rel=1e-9)
            shares[0] *= pad_weight
            np.testing.assert_allclose(log_probs[b, t].exp(), shares / shares.sum(), rtol=1e-5)


@settings(max_examples=30)
@given(
    seeds=st.lists(st.integers(0, 99), max_size=3), pad_weight=st.sampled_from([0.0, 1e-3, 0.1, 1])
)
def test_every_distribution_is_proper_and_positive(seeds, pad_weight):
    tokens, valid, _ = as_tensors(make_tokens(1000))
    log_probs = fit_trigrams(seeds).log_probs(tokens, valid, pad_weight=pad_weight)
    assert torch.isfinite(log_probs).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(tokens.shape))


def test_each_trigram_is_stored_once_in_any_vocabulary():
    tokens = torch.tensor([[199_999, 199_998, 199_997] * 30])
    everything = (tokens, torch.ones_like(tokens, dtype=torch.bool), torch.ones(1))
    trigrams = Trigrams.none(200_000).with_more(*everything).with_more(*everything)
    assert len(trigrams.keys) == 4  # three of the cycle, and the first after silence
    assert trigrams.counts.sum() == 2 * 89
    assert trigrams.log_probs(tokens[:, :2], everything[1][:, :2], pad_weight=0.1).argmax(
        -1
    ).tolist() == [[199_998, 199_997]]


def test_the_scaled_probability_of_silence_has_the_lowest_loss():
    """Scaled by its weight, the distribution is the best one under a loss with that weight."""
    tokens = torch.from_numpy(np.random.default_rng(0).choice(3, (1, 4000), p=[0.6, 0.3, 0.1]))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    trigrams = Trigrams.none(3).with_more(tokens, valid, torch.ones(1))
    weights = torch.where(tokens[:, 1:] == 0, 0.1, 1.0)

    def loss(pad_weight):
        log_probs = trigrams.log_probs(tokens, valid, pad_weight=pad_weight)[:, :-1]
        return float((-log_probs.gather(2, tokens[:, 1:, None])[..., 0] * weights).sum())

    assert loss(0.1) < min(loss(0.05), loss(0.2), loss(1.0))


def test_level_pairs_equal_a_loop_over_frames():
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
    pairs = count_level_pairs(*as_tensors((levels, valid, weight)), first=3, num_levels=4)
    np.testing.assert_allclose(pairs, expected)


def test_a_level_without_counts_is_followed_by_the_channels_own_distribution():
    pairs = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    own = torch.tensor([[0.75, 0.25]]).log()
    expected = [[[3.75 / 5, 1.25 / 5], [0.75, 0.25]]]
    np.testing.assert_allclose(level_transitions(pairs, own), expected, rtol=1e-6)
