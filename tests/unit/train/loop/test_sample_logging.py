from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.training import SHAPES, make_batch, make_config, make_trainer, weights_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from shared.media.tokenizer import train_tokenizer
from shared.page import draw_spectrogram
from shared.recipe import VISION_STREAMS, Recipe
from train.config import Head, as_train_config
from train.data.batch import WindowShapes
from train.loop.sample_logging import pick_window, render_window, write_window
from train.model.multimodal import MultiModalCreature

TOKENIZER = train_tokenizer(["reach | high"], vocab_size=264)
EXTRAS = {"tokenizer": TOKENIZER.json}


pytestmark = pytest.mark.usefixtures("one_thread")


def predict(batch, config, shapes=SHAPES):
    torch.manual_seed(0)
    model = MultiModalCreature(config, shapes).eval()
    with torch.no_grad():
        return model(batch["inputs"])


def pick(batch, outputs, config, shapes=SHAPES):
    return pick_window(batch, outputs, config=config, shapes=shapes)


@pytest.fixture
def example(tmp_path):
    config = as_train_config(make_config(tmp_path))
    batch = make_batch(0, size=3)
    for head in ("internal_text", "external_text"):
        batch["targets"][head][:2] = 0  # row 2 has the most text
    outputs = predict(batch, config)
    return SimpleNamespace(
        batch=batch, outputs=outputs, config=config, window=pick(batch, outputs, config)
    )


def test_the_window_with_the_most_text_is_logged(example):
    recorded, _ = example.window.levels
    valid = example.batch["targets"]["audio_valid"][2].numpy()
    expected = np.where(valid[:, None], example.batch["targets"]["audio"][2].numpy(), 255)
    np.testing.assert_array_equal(recorded, expected)


def test_a_padding_row_is_not_logged(example):
    example.batch["weight"][2] = 0
    window = pick(example.batch, example.outputs, example.config)
    assert not window.tokens[Head.INTERNAL_TEXT][0].any()


def test_a_prediction_is_at_the_tick_that_it_predicts(example):
    pairs = {
        Head.INTERNAL_TEXT: (example.window.tokens[Head.INTERNAL_TEXT], 1, 0),
        Head.AUDIO: (example.window.levels, 5, 255),
        Head.ANIMATION: (example.window.poses, 3, np.nan),
    }
    for head, ((_, predicted), per_tick, masked) in pairs.items():
        output = example.outputs[head][2].numpy()
        chosen = output if head is Head.ANIMATION else output.argmax(-1)
        for tick in range(1, 4):
            found = predicted[tick * per_tick : (tick + 1) * per_tick]
            np.testing.assert_array_equal(found, chosen[tick - 1].reshape(found.shape))
        first = predicted[:per_tick]
        np.testing.assert_array_equal(first, np.full_like(first, masked))


def test_the_text_has_recorded_and_predicted_text_and_the_number_of_right_tokens():
    tokens = TOKENIZER.encode("reach | high")
    recorded = np.array([0, *tokens, 0])
    predicted = recorded.copy()
    predicted[-2] = 0
    window = SimpleNamespace(
        key="a<b>/000003",
        tick_rate_hz=10.0,
        frames={},
        tokens={Head.EXTERNAL_TEXT: (recorded, predicted)},
        levels=None,
        poses=None,
    )
    row = render_window(window, EXTRAS).text.splitlines()[-1]
    assert row.startswith("| external text | 0.1 s: reach &#124; high |")
    assert row.endswith(f"| {len(tokens) - 1} of {len(tokens)} |")
    assert "a&lt;b&gt;" in render_window(window, EXTRAS).text


def test_spectrograms_are_gray_where_nothing_is_predicted(example):
    pictures = render_window(example.window, EXTRAS).pictures
    recorded = pictures["spectrogram_recorded"]
    assert recorded.shape == (3 * SHAPES.mel_channels, 3 * SHAPES.num_audio_frames, 3)
    assert (pictures["spectrogram_predicted"][:, :15] == 128).all()


def test_low_pitches_are_at_the_bottom_and_loud_levels_are_bright():
    levels = np.zeros((4, 3), dtype=np.uint8)
    levels[1, 0] = 15
    brightness = draw_spectrogram(levels, num_levels=16).sum(-1)
    assert brightness.shape == (3, 4)
    assert np.unravel_index(brightness.argmax(), (3, 4)) == (2, 1)


def test_a_joint_has_a_gray_recorded_and_an_orange_predicted_curve(example):
    recorded = np.zeros((60, 2), np.float32)
    predicted = np.ones((60, 2), np.float32)
    predicted[:30] = np.nan  # the first half of the window is not predicted
    window = dataclasses.replace(example.window, poses=(recorded, predicted))
    panel = render_window(window, EXTRAS).pictures["joints"].astype(int)[32:]
    gray = np.argwhere(np.abs(panel - (0x9A, 0xA6, 0xB6)).sum(-1) < 20)
    orange = np.argwhere(np.abs(panel - (0xD4, 0x57, 0x0A)).sum(-1) < 60)
    assert gray[:, 0].min() > orange[:, 0].max()
    assert np.ptp(gray[:, 1]) > 1.8 * np.ptp(orange[:, 1])
    assert gray[:, 1].max() == pytest.approx(orange[:, 1].max(), abs=2)


@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
def test_frames_are_logged_as_recorded_and_gray_if_masked(tmp_path, pixels):
    config = as_train_config({"model": {"hidden_dim": 16, "num_layers": 1, "vision_layers": 0}})
    batch, expected = make_batch(0, size=1), []
    for number, eye in enumerate(VISION_STREAMS):
        grey = [60 + 100 * number, 90]
        batch["inputs"][eye] = flat_frames(grey, pixels)
        batch["inputs"][f"{eye}_valid"] = torch.tensor([[True, number == 0]])
        expected.append([grey[0], grey[1] if number == 0 else 128])
    window = pick(batch, predict_nothing(config), config)
    picture = render_window(window, EXTRAS).pictures["frames_recorded"]
    assert picture.shape == (64, 64, 3)
    tiles = picture.reshape(2, 32, 2, 32, 3).astype(int)
    np.testing.assert_allclose(tiles.mean(axis=(1, 3, 4)), expected, atol=1)


def flat_frames(greys, pixels):
    """Two frames of one grey each, [1, 2, ...], in one of the loader's two forms."""
    if pixels == "rgb":
        frames = [np.full((32, 32, 3), grey, "u1") for grey in greys]
    else:
        chroma = np.full((16, 32), 128, "u1")
        frames = [np.concatenate([np.full((32, 32), grey, "u1"), chroma]) for grey in greys]
    return torch.from_numpy(np.stack(frames)[None])


def predict_nothing(config):
    shapes = SHAPES
    sizes = {
        Head.INTERNAL_TEXT: (shapes.vocab_size,),
        Head.EXTERNAL_TEXT: (shapes.vocab_size,),
        Head.AUDIO: (5, shapes.mel_channels, shapes.mel_levels),
        Head.ANIMATION: (3, shapes.proprio_size),
    }
    return {head: torch.zeros(1, shapes.num_ticks, *sizes[head]) for head in config.heads}


def test_tensorboard_has_pictures_sound_and_text_of_a_window(tmp_path):
    recipe = Recipe()
    shapes = WindowShapes.from_recipe(recipe)
    config = as_train_config({"training": {"loss_weights": {"internal_text": 0}}})
    rng = np.random.default_rng(0)
    levels = torch.from_numpy(rng.integers(0, 16, (1, 200, 80), "u1"))
    batch = {
        "inputs": {},
        "targets": {
            "external_text": torch.zeros(1, 40, dtype=torch.int64),
            "external_text_valid": torch.ones(1, 40, dtype=torch.bool),
            "audio": levels,
            "audio_valid": torch.ones(1, 200, dtype=torch.bool),
            "animation": torch.zeros(1, 120, 20),
            "animation_valid": torch.ones(1, 120, dtype=torch.bool),
        },
        "weight": torch.ones(1),
        "keys": ["s/1"],
    }
    outputs = {
        "external_text": torch.zeros(1, 40, 1024),
        "audio": torch.zeros(1, 40, 5, 80, 16),
        "animation": torch.zeros(1, 40, 3, 20),
    }
    rendered = render_window(
        pick(batch, outputs, config, shapes), {**EXTRAS, "recipe": recipe.as_json()}
    )
    with SummaryWriter(str(tmp_path)) as writer:
        write_window(writer, rendered, 7)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "audio": 0}).Reload()
    names = {"spectrogram_recorded", "spectrogram_predicted", "joints"}
    assert set(events.Tags()["images"]) == {f"held_out/{name}" for name in names}
    assert set(events.Tags()["audio"]) == {f"held_out/sound_{n}" for n in ("recorded", "predicted")}
    assert events.Tags()["tensors"] == ["held_out/texts/text_summary"]
    (picture,) = events.Images("held_out/spectrogram_recorded")
    shown = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    np.testing.assert_array_equal(shown, rendered.pictures["spectrogram_recorded"])
    (sound,) = events.Audio("held_out/sound_recorded")
    assert (sound.sample_rate, sound.length_frames, picture.step) == (16_000, 64_000, 7)


def test_logging_a_window_does_not_change_the_training(tmp_path):
    weights = []
    for interval in (1, 1000):
        config = make_config(tmp_path / str(interval), eval_interval=interval, max_steps=3)
        trainer = make_trainer(config, val_loader=[make_batch(9)])
        trainer.train()
        weights.append((weights_of(trainer), torch.get_rng_state(), np.random.get_state()[1]))
    assert torch.equal(weights[0][0], weights[1][0])
    assert torch.equal(weights[0][1], weights[1][1])
    assert np.array_equal(weights[0][2], weights[1][2])


def test_every_evaluation_logs_the_same_window(tmp_path):
    config = make_config(tmp_path, eval_interval=2)
    summary = make_trainer(config, val_loader=[make_batch(9), make_batch(10)]).train()
    events = EventAccumulator(str(summary.log_dir), size_guidance={"tensors": 0}).Reload()
    texts = events.Tensors("held_out/texts/text_summary")
    assert [event.step for event in texts] == [2, 4, 6]
    said = {event.tensor_proto.string_val[0].decode().splitlines()[0] for event in texts}
    assert said == {"window s/9"}
