from __future__ import annotations

import numpy as np
import pytest
import torch

from train.inputs import to_device, to_model_inputs

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (2, 3, 8, 6, 3), dtype=np.uint8)
    )


def test_frames_are_normalised_as_imagenet_says():
    rgb = pixels()
    oracle = ((rgb.numpy() / 255.0 - MEAN) / STD).transpose(0, 1, 4, 2, 3)
    frames = to_model_inputs({"vision_left": rgb})["vision_left"]
    assert frames.dtype == torch.float32
    np.testing.assert_allclose(frames.numpy(), oracle, atol=1e-6)


def test_frames_keep_the_memory_order_of_the_pixels():
    frames = to_model_inputs({"vision_right": pixels()})["vision_right"]
    assert frames.permute(0, 1, 3, 4, 2).is_contiguous()


def test_half_precision_frames_are_rounded_once():
    rgb = pixels()
    exact = to_model_inputs({"vision_left": rgb})["vision_left"]
    half = to_model_inputs({"vision_left": rgb}, dtype=torch.bfloat16)["vision_left"]
    assert torch.equal(half, exact.bfloat16())


def test_all_but_frames_is_passed_through():
    inputs = {
        "vision_left": pixels(),
        "vision_left_valid": torch.ones(2, 3, dtype=torch.bool),
        "audio": torch.randint(0, 16, (2, 10, 4), dtype=torch.uint8),
        "internal_text": torch.randint(0, 9, (2, 4)),
    }
    passed = to_model_inputs(inputs)
    assert passed.keys() == inputs.keys()
    assert all(passed[key] is inputs[key] for key in inputs if key != "vision_left")


def test_inputs_are_not_changed():
    rgb = pixels()
    before = rgb.clone()
    to_model_inputs({"vision_left": rgb})
    assert torch.equal(rgb, before)


def test_copies_to_a_gpu_are_done_when_the_batch_is_handed_out(monkeypatch):
    """The loader's memory is written to again as soon as the batch is let go."""
    events = []

    class Stream:
        def synchronize(self):
            events.append("waited")

    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: events.append("sent"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    to_device({"inputs": {"a": torch.ones(2), "b": torch.ones(2)}, "keys": ["s/0"]}, "cuda")
    assert events == ["sent", "sent", "waited"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_batch_goes_to_the_device_with_its_nesting_and_its_names(kind):
    batch = {"inputs": {"a": torch.ones(2)}, "more": kind([torch.ones(1), 3]), "keys": ["s/0"]}
    moved = to_device(batch, "meta")
    assert moved["inputs"]["a"].device.type == "meta"
    assert isinstance(moved["more"], kind)
    assert moved["more"][0].device.type == "meta"
    assert moved["more"][1] == 3
    assert moved["keys"] == ["s/0"]
