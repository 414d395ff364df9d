"""Modalities that are missing, by choice or at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import (
    DEFAULT_NAMES,
    MANY_STREAMS,
    MODEL,
    SHAPES,
    is_equal,
    make_batch,
    make_config,
    make_model,
    make_shapes,
)

from shared.streams import DEFAULT_STREAMS
from train.data.pixels import to_model_inputs
from train.model.encoders import hide_at_random, modalities, without

DROPOUT = {**MODEL, "modality_dropout": 0.3}
VISION = ("vision_left", "vision_right")
pytestmark = pytest.mark.usefixtures("one_thread")


def masks(*, batch=4000):
    """Masks of all streams with one invalid position per sample."""
    valid = torch.ones(batch, 3, dtype=torch.bool)
    valid[:, 1] = False
    return {f"{stream}_valid": valid.clone() for stream in DEFAULT_NAMES}


@pytest.mark.parametrize(
    ("streams", "cameras"),
    [(DEFAULT_STREAMS, VISION), (MANY_STREAMS, ("back", "front", "wrist"))],
    ids=["default", "many"],
)
def test_all_videos_are_one_modality_and_any_other_stream_its_own(streams, cameras):
    config = make_config(loss_weights={"voice": 1} if "voice" in streams else {})
    others = {name: (name,) for name in streams if name not in cameras}
    found = modalities(make_shapes(config, streams=streams))
    assert found == {"vision": cameras, **others}


def test_only_inputs_are_modalities():
    config = make_config({"data": {"modalities": ["audio", "vision_left"]}})
    found = modalities(make_shapes(config))
    assert found == {"vision": ("vision_left",), "audio": ("audio",)}


def test_without_masks_a_stream_and_leaves_the_batch_unchanged():
    inputs = masks()
    hidden = without(inputs, VISION)
    for stream in DEFAULT_NAMES:
        expected = 0 if stream in VISION else 8000
        assert int(hidden[f"{stream}_valid"].sum()) == expected
        assert int(inputs[f"{stream}_valid"].sum()) == 8000


def test_each_modality_is_hidden_as_a_whole_independently_in_the_given_share():
    torch.manual_seed(0)
    inputs = masks()
    groups = modalities(SHAPES)
    hidden = hide_at_random(inputs, groups.values(), share=0.25)
    assert all(torch.equal(inputs[name], mask) for name, mask in masks().items())
    gone = {}
    for name, streams in groups.items():
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


def test_modalities_are_hidden_in_training_and_not_in_evaluation():
    model = make_model({"model": {**MODEL, "modality_dropout": 1 - 1e-9}})
    inputs = to_model_inputs(make_batch())
    nothing = model(without(inputs, DEFAULT_NAMES))
    everything = model(inputs)
    trained = model.train()(inputs)
    for head in everything:
        assert torch.equal(trained[head], nothing[head])
        assert not torch.equal(everything[head], nothing[head])


def test_hidden_modalities_depend_only_on_the_seed():
    model, inputs, outputs = make_model({"model": DROPOUT}).train(), make_batch(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(to_model_inputs(inputs)))
    assert is_equal(outputs[0], outputs[1])
    assert not is_equal(outputs[0], outputs[2])


def test_a_language_model_hides_nothing():
    config = {"model": DROPOUT, "training": {"loss_weights": {"audio": 0, "animation": 0}}}
    assert make_model(config).modality_dropout == 0
    with_touch = {**config, "data": {"modalities": ["internal_text", "touch"]}}
    assert make_model(with_touch).modality_dropout == 0.3
