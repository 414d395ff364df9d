from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shared.errors import ConfigError
from train.config import Head, as_train_config
from train.data.batch import WindowShapes
from train.model.baselines import Baselines, compare, constant_velocity, copy_last_pose, unigram

SHAPES = WindowShapes(
    num_ticks=6,
    tick_rate_hz=10.0,
    num_audio_frames=12,
    mel_channels=3,
    mel_levels=4,
    num_sensor_samples=18,
    proprio_size=4,
    vocab_size=7,
)
PAD_WEIGHT = 0.25
CONFIG = as_train_config({"model": {"pad_weight": PAD_WEIGHT}})


def make_batch(seed, *, size=3):
    """Random targets with garbage under the masks, and unequal weights; plain numpy."""
    rng = np.random.default_rng(seed)
    targets = {
        "internal_text": rng.choice(7, (size, 6), p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05]),
        "external_text": rng.integers(0, 3, (size, 6)),
        "audio": rng.choice(4, (size, 12, 3), p=[0.7, 0.1, 0.1, 0.1]).astype("u1"),
        "animation": rng.normal(size=(size, 18, 4)).astype("f4"),
    }
    for head in Head:
        valid = rng.random(targets[head].shape[:2]) < 0.7
        targets[head][~valid] = np.nan if head is Head.ANIMATION else 77
        targets[f"{head}_valid"] = valid
    weight = rng.choice([0.0, 1.0], size).astype("f4")
    weight[0] = 1
    return {"targets": targets, "weight": weight}


TRAIN = [make_batch(seed) for seed in range(4)]
HELD_OUT = make_batch(99, size=5)


@pytest.fixture
def fitted():
    return Baselines.fit(TRAIN, config=CONFIG, shapes=SHAPES)


def mean(losses, name):
    total, count = losses[name]
    return float(total) / float(count)


def token_counts(head):
    counts = [0.0] * 7
    for batch in TRAIN:
        for b in range(3):
            for t in range(1, 6):
                if batch["targets"][f"{head}_valid"][b, t]:
                    counts[batch["targets"][head][b, t]] += batch["weight"][b]
    return counts


def level_counts():
    counts = np.zeros((3, 4))
    for batch in TRAIN:
        for b in range(3):
            for frame in range(2, 12):
                if batch["targets"]["audio_valid"][b, frame]:
                    for channel in range(3):
                        level = batch["targets"]["audio"][b, frame, channel]
                        counts[channel, level] += batch["weight"][b]
    return counts


def pair_counts():
    pairs = np.zeros((3, 4, 4))
    for batch in TRAIN:
        targets = batch["targets"]
        for b in range(3):
            for frame in range(2, 12):
                if targets["audio_valid"][b, frame - 1] and targets["audio_valid"][b, frame]:
                    for channel in range(3):
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
            seen = [s for s in range(sample // 3 * 3) if valid[b, s]]
            last = poses[b, seen[-1]] if seen else np.zeros(4)
            error = predict(last, (sample - seen[-1]) / 30 if seen else 0.0) - poses[b, sample]
            far = np.abs(error[2:])
            smooth = np.where(far < 1, far**2 / 2, far - 0.5)
            errors.append((1 - np.cos(error[:2])).mean() + smooth.mean())
            shares.append(weight[b])
    return np.average(errors, weights=shares)


def test_copying_the_last_pose_scores_as_a_loop_over_samples_does(fitted):
    expected = pose_oracle(lambda last, elapsed_s: last)
    found = mean(fitted.losses(HELD_OUT), "animation/copy_last_pose")
    assert found == pytest.approx(expected, rel=1e-5)


def test_constant_velocity_scores_as_a_loop_over_samples_does(fitted):
    expected = pose_oracle(
        lambda last, elapsed_s: np.concatenate([last[:2] + last[2:] * elapsed_s, last[2:]])
    )
    found = mean(fitted.losses(HELD_OUT), "animation/constant_velocity")
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", ["internal_text", "external_text"])
def test_the_text_unigram_scores_as_a_loop_over_ticks_does(fitted, head):
    counts = token_counts(head)
    counts[0] *= PAD_WEIGHT
    total = count = 0.0
    for b in range(5):
        for t in range(1, 6):
            if HELD_OUT["targets"][f"{head}_valid"][b, t]:
                token = HELD_OUT["targets"][head][b, t]
                share = HELD_OUT["weight"][b] * (PAD_WEIGHT if token == 0 else 1.0)
                total -= share * math.log((counts[token] + 1) / (sum(counts) + 7))
                count += share
    found = mean(fitted.losses(HELD_OUT), f"{head}/unigram")
    assert found == pytest.approx(total / count, rel=1e-5)


def test_the_audio_unigram_scores_as_a_loop_over_frames_and_channels_does(fitted):
    counts = level_counts()
    total = count = 0.0
    for b in range(5):
        for frame in range(2, 12):
            if HELD_OUT["targets"]["audio_valid"][b, frame]:
                for channel in range(3):
                    level = HELD_OUT["targets"]["audio"][b, frame, channel]
                    share = (counts[channel, level] + 1) / (counts[channel].sum() + 4)
                    total -= HELD_OUT["weight"][b] * math.log(share)
                    count += HELD_OUT["weight"][b]
    found = mean(fitted.losses(HELD_OUT), "audio/unigram")
    assert found == pytest.approx(total / count, rel=1e-5)


def test_the_audio_bigram_scores_as_a_loop_over_frames_and_channels_does(fitted):
    pairs = pair_counts()
    alone = (level_counts() + 1) / (level_counts() + 1).sum(1, keepdims=True)
    total = count = 0.0
    levels, valid = HELD_OUT["targets"]["audio"], HELD_OUT["targets"]["audio_valid"]
    for b in range(5):
        for frame in range(2, 12):
            if not valid[b, frame]:
                continue
            for channel in range(3):
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


def test_no_other_unigram_has_a_lower_loss_on_what_it_was_fitted_to():
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.integers(1, 10_000, 7).astype("f8"))
    shares = counts.numpy() * np.array([PAD_WEIGHT, *[1.0] * 6])
    best = unigram(counts, pad_weight=PAD_WEIGHT).double().numpy()
    others = np.log(rng.dirichlet(np.exp(best) * 1000, 200))
    assert (-(others * shares).sum(1) >= -(best * shares).sum()).all()


def test_baselines_know_nothing_of_the_tick_that_they_predict():
    poses, valid = torch.randn(1, 18, 4), torch.ones(1, 18, dtype=torch.bool)
    changed = poses.clone()
    changed[:, 9:] = torch.nan
    for predict in (
        lambda x: copy_last_pose(x, valid, per_tick=3),
        lambda x: constant_velocity(x, valid, per_tick=3, rate_hz=30.0),
    ):
        assert torch.equal(predict(poses)[:, :3], predict(changed)[:, :3])


def test_uniform_motion_is_free_for_constant_velocity():
    time_s = np.arange(18) / 30
    velocity = np.array([0.5, -0.25])
    poses = np.concatenate([time_s[:, None] * velocity, np.tile(velocity, (18, 1))], axis=1)
    batch = {
        "targets": {
            **HELD_OUT["targets"],
            "animation": poses[None].repeat(5, 0).astype("f4"),
            "animation_valid": np.ones((5, 18), dtype=bool),
        },
        "weight": HELD_OUT["weight"],
    }
    losses = Baselines.fit([], config=CONFIG, shapes=SHAPES).losses(batch)
    assert mean(losses, "animation/constant_velocity") < 1e-6


def test_fitting_on_batches_is_fitting_on_their_rows_one_by_one(fitted):
    rows = [
        {
            "targets": {k: v[b : b + 1] for k, v in batch["targets"].items()},
            "weight": batch["weight"][b : b + 1],
        }
        for batch in TRAIN
        for b in range(3)
    ]
    alone = Baselines.fit(rows, config=CONFIG, shapes=SHAPES).as_dict()
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
    read = Baselines.from_dict(values, config=CONFIG, shapes=SHAPES)
    assert read.mean_losses([HELD_OUT]) == fitted.mean_losses([HELD_OUT])


def test_an_older_checkpoints_lists_have_no_sequence_models(fitted):
    lists = {"counts": {head: c.tolist() for head, c in fitted.as_dict()["counts"].items()}}
    read = Baselines.from_dict(lists, config=CONFIG, shapes=SHAPES)
    losses = fitted.mean_losses([HELD_OUT])
    older = {n: x for n, x in losses.items() if not n.endswith(("trigram", "bigram"))}
    assert read.mean_losses([HELD_OUT]) == older


def test_counts_of_another_model_are_refused(fitted):
    other = WindowShapes(num_ticks=6, mel_channels=3, mel_levels=4, vocab_size=8)
    with pytest.raises(ConfigError, match=r"shape \[7\].* needs \[8\]"):
        Baselines.from_dict(fitted.as_dict(), config=CONFIG, shapes=other)


def test_a_manifests_statistics_fill_the_ticks_without_a_token_with_silence():
    statistics = {
        "num_samples": 10,
        "dmel_levels": [[1, 2, 3, 4]] * 3,
        "internal_tokens": [0, 5, 6],
        "external_tokens": [],
    }
    counts = Baselines.from_statistics(statistics, config=CONFIG, shapes=SHAPES).counts
    assert {head: found.tolist() for head, found in counts.items()} == {
        "internal_text": [49.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0],
        "audio": [[1.0, 2.0, 3.0, 4.0]] * 3,
    }


def test_heads_that_are_off_have_no_baseline():
    config = as_train_config({"training": {"loss_weights": {"animation": 0, "audio": 0}}})
    losses = Baselines.fit(TRAIN, config=config, shapes=SHAPES).losses(HELD_OUT)
    names = ("unigram", "trigram")
    assert set(losses) == {f"{h}_text/{name}" for h in ("internal", "external") for name in names}


def test_the_table_says_which_heads_beat_which_baseline():
    rows = compare(
        {"loss_total": 9.0, "loss_audio": 1.0, "loss_animation": 0.3, "loss_internal_text": None},
        {
            "audio/unigram": 2.0,
            "animation/copy_last_pose": 0.2,
            "animation/constant_velocity": math.nan,
            "internal_text/unigram": 3.0,
        },
    )
    assert [(r.head, r.baseline, r.is_better) for r in rows] == [
        ("audio", "unigram", True),
        ("animation", "copy_last_pose", False),
    ]
