"""Modalities that are missing, by choice or at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import SHAPES, largest_difference, make_batch, make_config, make_trainer
from torch import nn

from shared.recipe import STREAMS, Stream
from train.data.pixels import to_model_inputs
from train.model.encoders import MODALITIES, hide_at_random, without
from train.model.multimodal import MultiModalCreature

pytestmark = pytest.mark.usefixtures("one_thread")


def masks(*, batch=4000):
    """Masks of all streams with one invalid position per sample."""
    valid = torch.ones(batch, 3, dtype=torch.bool)
    valid[:, 1] = False
    return {f"{stream}_valid": valid.clone() for stream in STREAMS}


def test_every_stream_belongs_to_one_modality():
    assert sorted(s for streams in MODALITIES.values() for s in streams) == sorted(STREAMS)


def test_without_masks_a_stream_and_leaves_the_batch_unchanged():
    inputs = masks()
    hidden = without(inputs, MODALITIES["vision"])
    for stream in STREAMS:
        expected = 0 if stream in MODALITIES["vision"] else 8000
        assert int(hidden[f"{stream}_valid"].sum()) == expected
        assert int(inputs[f"{stream}_valid"].sum()) == 8000


def test_each_modality_is_hidden_as_a_whole_independently_in_the_given_share():
    torch.manual_seed(0)
    inputs = masks()
    hidden = hide_at_random(inputs, share=0.25)
    assert all(torch.equal(inputs[name], mask) for name, mask in masks().items())
    gone = {}
    for name, streams in MODALITIES.items():
        stream_masks = [hidden[f"{stream}_valid"].numpy() for stream in streams]
        gone[name] = ~stream_masks[0].any(1)
        for mask in stream_masks:  # both cameras are hidden together; no position becomes valid
            np.testing.assert_array_equal(
                mask, np.array([True, False, True]) & ~gone[name][:, None]
            )
    table = np.array(list(gone.values()))
    np.testing.assert_allclose(table.mean(1), 0.25, atol=0.03)
    correlations = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlations).max() < 0.06


def test_modalities_are_hidden_in_training_and_not_in_evaluation(tmp_path):
    config = make_config(tmp_path)
    config["model"] |= {"dropout": 0.0, "modality_dropout": 1 - 1e-9}
    torch.manual_seed(0)
    model = MultiModalCreature(config, SHAPES)
    nn.init.normal_(model.predictors["animation"].weight, std=0.1)
    inputs = to_model_inputs(make_batch(0)["inputs"])
    nothing = model.eval()(without(inputs, STREAMS))
    everything = model(inputs)
    trained = model.train()(inputs)
    for head in everything:
        assert torch.equal(trained[head], nothing[head])
        assert not torch.equal(everything[head], nothing[head])


def test_hidden_modalities_depend_only_on_the_seed(tmp_path):
    trainers = []
    for name in ("a", "b"):
        config = make_config(tmp_path / name)
        config["model"]["modality_dropout"] = 0.3
        trainers.append(make_trainer(config))
        trainers[-1].train()
    assert largest_difference(*trainers) == 0.0


def test_a_language_model_hides_nothing():
    config = {
        "model": {"hidden_dim": 16, "num_layers": 1, "modality_dropout": 0.9},
        "training": {"loss_weights": {"audio": 0, "animation": 0}},
    }
    assert MultiModalCreature(config, SHAPES).modality_dropout == 0
    streams = [Stream.INTERNAL_TEXT, Stream.TOUCH]
    with_touch = {**config, "data": {"modalities": streams}}
    assert MultiModalCreature(with_touch, SHAPES).modality_dropout == 0.9
