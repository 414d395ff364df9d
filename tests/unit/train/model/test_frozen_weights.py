"""Weights from before streams were declared give the outputs and losses of that code.

The checkpoint is tests/frozen/v2/train_step_4.pt; the numbers below were printed by commit 9087b1f
for the same inputs.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.recipe import Recipe
from train.config import as_train_config
from train.model.encoders import module_key
from train.model.losses import compute_losses
from train.model.multimodal import MultiModalCreature
from train.shapes import WindowShapes

CHECKPOINT = Path(__file__).parents[3] / "frozen" / "v2" / "train_step_4.pt"
LOSSES = {
    "loss_total": 7.999781608581543,
    "loss_internal_text": 5.596468448638916,
    "loss_audio": 1.3893704414367676,
    "loss_animation": 1.0139425992965698,
}
SUMS = {
    "internal_text": (-400.3362139877863, 506.78813916491345),
    "audio": (-57.906496977899224, 150.40831597754732),
    "animation": (-10.483279885957018, 168.32011866685934),
}
"""Sums of each head's outputs and of their absolute values."""

OLD_ORDER = (
    "vision_left",
    "vision_right",
    "audio",
    "touch",
    "proprio",
    "internal_text",
    "external_text",
)
"""Rows of the old parameters `modality` and `null`."""

RECIPE = {
    "segment": {"duration_s": 1.0},
    "video": {"rate_hz": 2.0, "size": 32},
    "audio": {"rate_hz": 4000, "dmel": {"fft_size": 256, "channels": 4, "levels": 4}},
    "sensor": {"rate_hz": 10.0},
    "text": {"vocab_size": 264},
}
pytestmark = pytest.mark.usefixtures("one_thread")


def renamed(old):
    """Give old weights their new names, and the features of angles their new order."""
    new = {}
    for name, weight in old.items():
        if name in ("encoder.modality", "encoder.null"):
            rows = zip(OLD_ORDER, weight, strict=True)
            new |= {f"{name}.{module_key(stream)}": row for stream, row in rows}
        else:
            name = name.replace("frames.places", "frames.positions.32x32")
            name = name.replace("frames.eyes", "frames.projections")
            prefixes = r"(encoder\.encoders|encoder\.norms|predictors|projections)\."
            new[re.sub(prefixes, r"\1.s_", name)] = weight
    # A stream that is no input gave each tick its null vector; any other stream can do so.
    del new["encoder.modality.s_external_text"]
    constant = new.pop("encoder.null.s_external_text")
    for name in ("encoder.modality.s_touch", "encoder.null.s_touch"):
        new[name] = new[name] + constant
    # All sines, all cosines -> pairs of them; then velocities and validity.
    weight = new["encoder.encoders.s_proprio.linear.weight"].clone()
    pairs = torch.stack([weight[:, :10], weight[:, 10:20]], dim=-1).flatten(1)
    new["encoder.encoders.s_proprio.linear.weight"] = torch.cat([pairs, weight[:, 20:]], dim=1)
    return new


def make_inputs():
    rng = np.random.default_rng(0)
    values = {
        "audio": rng.integers(0, 4, (2, 50, 4), "u1"),
        "internal_text": rng.integers(0, 264, (2, 10)),
        "proprio": rng.normal(size=(2, 10, 20)).astype("f4"),
        "touch": rng.random((2, 10, 5), "f4"),
        "vision_left": rng.normal(size=(2, 2, 3, 32, 32)).astype("f4"),
        "vision_right": rng.normal(size=(2, 2, 3, 32, 32)).astype("f4"),
    }
    inputs = {}
    for name, value in values.items():
        inputs[name] = torch.from_numpy(value)
        inputs[f"{name}_valid"] = torch.from_numpy(rng.random(value.shape[:2]) < 0.8)
    return inputs


def test_old_weights_give_the_old_outputs_and_losses():
    state = torch.load(CHECKPOINT, weights_only=True)
    state["config"]["data"] |= {"window": {"duration_s": 1.0}}
    config = as_train_config(state["config"])
    shapes = WindowShapes.from_recipe(Recipe.model_validate(RECIPE), config)
    model = MultiModalCreature(config, shapes).eval()
    result = model.load_state_dict(renamed(state["model"]), strict=False)
    assert all(name.startswith("sensors.") for name in result.missing_keys)
    assert not result.unexpected_keys
    inputs = make_inputs()
    targets = {
        f"{head}{end}": inputs[f"{stream}{end}"]
        for head, stream in shapes.targets.items()
        for end in ("", "_valid")
    }
    with torch.no_grad():
        outputs = model(inputs)
        losses = compute_losses(outputs, targets, torch.ones(2), objective=model.objective)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(LOSSES, rel=1e-5)
    for head, expected in SUMS.items():
        output = outputs[head].double()
        assert (output.sum().item(), output.abs().sum().item()) == pytest.approx(expected, rel=1e-5)
