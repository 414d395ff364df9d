"""Pixels as model inputs: colors and normalization against independent formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.oracles import exact_rgb

from train.data import pixels as pixels_module
from train.data.pixels import to_model_inputs

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (2, 3, 8, 6, 3), dtype=np.uint8)
    )


def planes(seed: int = 0) -> torch.Tensor:
    """Noise as I420 of 8 x 12 pixels: more frames than a CPU takes at once."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 5, 12, 12), "u1"))


def test_planes_become_the_colours_of_the_standard_normalised_and_within_the_gamut():
    packed = planes()
    rgb = exact_rgb(packed.flatten(0, 1).numpy()).reshape(3, 5, 8, 12, 3)
    assert 0.2 < ((rgb == 0) | (rgb == 255)).mean() < 0.8  # clamping is tried
    oracle = ((rgb / 255 - MEAN) / STD).transpose(0, 1, 4, 2, 3)
    frames = to_model_inputs({"vision_left": packed})["vision_left"]
    assert frames.dtype == torch.float32
    np.testing.assert_allclose(frames.numpy(), oracle, atol=5e-6)


@pytest.mark.parametrize("make", [pixels, planes])
def test_a_gpus_operators_give_the_numbers_of_the_cpus_loops(monkeypatch, make):
    of_loops = to_model_inputs({"vision_left": make()})["vision_left"]
    monkeypatch.setattr(pixels_module, "_is_compiled", lambda pixels: False)
    of_operators = to_model_inputs({"vision_left": make()})["vision_left"]
    torch.testing.assert_close(of_operators, of_loops, rtol=0, atol=2e-6)
    assert of_operators.stride() == of_loops.stride()


@pytest.mark.parametrize("make", [pixels, planes])
def test_threads_that_share_frames_out_write_them_all(monkeypatch, make):
    alone = to_model_inputs({"vision_left": make()})["vision_left"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(pixels_module, "_THREAD_BYTES", 1)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kinds: torch.full(*shape, 7.0, **kinds))
    assert torch.equal(to_model_inputs({"vision_left": make()})["vision_left"], alone)


def test_grey_planes_are_grey():
    grey = torch.full((1, 1, 12, 8), 128, dtype=torch.uint8)
    grey[:, :, :8] = torch.arange(64, dtype=torch.uint8).view(8, 8) * 4
    rgb = grey[:, :, :8, :, None].expand(1, 1, 8, 8, 3)
    of_planes, of_rgb = (to_model_inputs({"vision_left": x})["vision_left"] for x in (grey, rgb))
    torch.testing.assert_close(of_planes, of_rgb, rtol=0, atol=2e-6)


def test_no_frame_of_planes_is_no_frame():
    frames = to_model_inputs({"vision_left": planes()[:, :0]})["vision_left"]
    assert frames.shape == (3, 0, 3, 8, 12)


def test_frames_are_normalised_as_imagenet_says():
    rgb = pixels()
    oracle = ((rgb.numpy() / 255.0 - MEAN) / STD).transpose(0, 1, 4, 2, 3)
    frames = to_model_inputs({"vision_left": rgb})["vision_left"]
    assert frames.dtype == torch.float32
    np.testing.assert_allclose(frames.numpy(), oracle, atol=1e-6)


def test_frames_keep_the_memory_order_of_the_pixels():
    frames = to_model_inputs({"vision_right": pixels(), "vision_left": planes()})
    assert frames["vision_right"].permute(0, 1, 3, 4, 2).is_contiguous()
    assert frames["vision_left"].is_contiguous()


@pytest.mark.parametrize("make", [pixels, planes])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_frames_of_other_numbers_are_rounded_once(make, dtype):
    exact = to_model_inputs({"vision_left": make()})["vision_left"]
    other = to_model_inputs({"vision_left": make()}, dtype=dtype)["vision_left"]
    assert other.dtype == dtype
    assert torch.equal(other, exact.to(dtype))


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


def test_videos_of_several_sizes_keep_their_height_and_width():
    inputs = {
        "wrist": torch.zeros(2, 3, 24, 48, dtype=torch.uint8),
        "front": torch.zeros(2, 5, 32, 16, 3, dtype=torch.uint8),
    }
    frames = to_model_inputs(inputs)
    assert frames["wrist"].shape == (2, 3, 3, 16, 48)
    assert frames["front"].shape == (2, 5, 3, 32, 16)


@pytest.mark.parametrize("make", [pixels, planes])
def test_inputs_are_not_changed(make):
    given, before = make(), make()
    to_model_inputs({"vision_left": given})
    assert torch.equal(given, before)
