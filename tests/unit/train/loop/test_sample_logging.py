from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import models
from helpers.training import SHAPES, make_batch, make_config, make_trainer, shapes_of, weights_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from shared.media.tokenizer import train_tokenizer
from shared.page import draw_spectrogram
from shared.recipe import Recipe
from shared.streams import Kind, ValueGroup
from train.config import as_train_config
from train.data.pixels import to_model_inputs
from train.loop.sample_logging import (
    LoggedHead,
    LoggedWindow,
    draw_curves,
    pick_window,
    render_window,
    write_window,
)
from train.model.multimodal import MultiModalCreature
from train.shapes import WindowShapes

TOKENIZER = train_tokenizer(["reach | high"], vocab_size=264)
EXTRAS = {"tokenizer": TOKENIZER.json}


pytestmark = pytest.mark.usefixtures("one_thread")


def predict(batch, config, shapes=SHAPES):
    torch.manual_seed(0)
    model = MultiModalCreature(config, shapes).eval()
    with torch.no_grad():
        return model(batch["inputs"])


@pytest.fixture
def example(tmp_path):
    config = as_train_config(make_config(tmp_path))
    batch = make_batch(0, size=3)
    for head in ("internal_text", "external_text"):
        batch["targets"][head][:2] = 0  # row 2 has the most text
    outputs = predict(batch, config)
    return SimpleNamespace(
        batch=batch, outputs=outputs, window=pick_window(batch, outputs, shapes=SHAPES)
    )


def test_the_window_with_the_most_text_is_logged(example):
    recorded = example.window.heads["audio"].recorded
    valid = example.batch["targets"]["audio_valid"][2].numpy()
    expected = np.where(valid[:, None], example.batch["targets"]["audio"][2].numpy(), 255)
    np.testing.assert_array_equal(recorded, expected)


def test_a_padding_row_is_not_logged(example):
    example.batch["weight"][2] = 0
    window = pick_window(example.batch, example.outputs, shapes=SHAPES)
    assert not window.heads["internal_text"].recorded.any()


def test_a_prediction_is_at_the_tick_that_it_predicts(example):
    empty = {Kind.TEXT: 0, Kind.AUDIO: 255, Kind.SENSOR: np.nan}
    assert set(example.window.heads) == {"internal_text", "external_text", "audio", "animation"}
    for head, values in example.window.heads.items():
        per_tick, kind = values.shape.per_tick, values.shape.kind
        output = example.outputs[head][2].numpy()
        chosen = output if kind is Kind.SENSOR else output.argmax(-1)
        for tick in range(1, 4):
            found = values.predicted[tick * per_tick : (tick + 1) * per_tick]
            np.testing.assert_array_equal(found, chosen[tick - 1].reshape(found.shape))
        first = values.predicted[:per_tick]
        np.testing.assert_array_equal(first, np.full_like(first, empty[kind]))


def test_positions_without_a_sample_are_left_out():
    """At 15 Hz and 10 ticks per second, every second tick has one sample less."""
    config = models.make_config({"training": {"loss_weights": {"hand": 1}}})
    shapes = models.make_shapes(config, streams=models.MANY_STREAMS)
    inputs = models.make_batch(shapes)
    batch = {
        "inputs": inputs,
        "targets": models.targets_of(inputs, shapes),
        "weight": torch.ones(2),
        "keys": ["s@0", "s@8"],
    }
    outputs = models.make_model(config, shapes)(to_model_inputs(inputs))
    window = pick_window(batch, {n: x.detach() for n, x in outputs.items()}, shapes=shapes)
    hand = window.heads["hand"]
    assert hand.recorded.shape == hand.predicted.shape == (12, 14)
    expected = outputs["hand"].detach()[0, 2].numpy()  # tick 2 predicts tick 3, which has 1 sample
    np.testing.assert_array_equal(hand.predicted[5], expected[0])
    assert np.isfinite(hand.predicted[2:]).all()  # the first tick has samples 0 and 1
    pictures = render_window(window, {}).pictures
    assert set(pictures) == {"front", "back", "wrist", "hand/position", "hand/quaternion"}


def text_window(recorded, predicted):
    shape = SHAPES.streams["external_text"]
    head = LoggedHead(stream="external_text", shape=shape, recorded=recorded, predicted=predicted)
    return LoggedWindow(key="a<b>@3", tick_rate_hz=10.0, frames={}, heads={"external_text": head})


def test_the_text_has_recorded_and_predicted_text_and_the_number_of_right_tokens():
    tokens = TOKENIZER.encode("reach | high")
    recorded = np.array([0, *tokens, 0])
    predicted = recorded.copy()
    predicted[-2] = 0
    window = text_window(recorded, predicted)
    row = render_window(window, EXTRAS).text.splitlines()[-1]
    assert row.startswith("| external text | 0.1 s: reach &#124; high |")
    assert row.endswith(f"| {len(tokens) - 1} of {len(tokens)} |")
    assert "a&lt;b&gt;" in render_window(window, EXTRAS).text


def test_spectrograms_are_gray_where_nothing_is_predicted(example):
    pictures = render_window(example.window, EXTRAS).pictures
    audio = SHAPES.streams["audio"]
    assert pictures["audio/recorded"].shape == (3 * audio.size[0], 3 * audio.num_positions, 3)
    assert (pictures["audio/predicted"][:, :15] == 128).all()


def test_low_pitches_are_at_the_bottom_and_loud_levels_are_bright():
    levels = np.zeros((4, 3), dtype=np.uint8)
    levels[1, 0] = 15
    brightness = draw_spectrogram(levels, num_levels=16).sum(-1)
    assert brightness.shape == (3, 4)
    assert np.unravel_index(brightness.argmax(), (3, 4)) == (2, 1)


def test_a_value_has_a_gray_recorded_and_an_orange_predicted_curve():
    recorded = np.zeros((60, 1), np.float32)
    predicted = np.ones((60, 1), np.float32)
    predicted[:30] = np.nan  # the first half of the window is not predicted
    group = ValueGroup(count=1, type="angle")
    panel = draw_curves(recorded, predicted, group).astype(int)[32:]
    gray = np.argwhere(np.abs(panel - (0x9A, 0xA6, 0xB6)).sum(-1) < 20)
    orange = np.argwhere(np.abs(panel - (0xD4, 0x57, 0x0A)).sum(-1) < 60)
    assert gray[:, 0].min() > orange[:, 0].max()
    assert np.ptp(gray[:, 1]) > 1.8 * np.ptp(orange[:, 1])
    assert gray[:, 1].max() == pytest.approx(orange[:, 1].max(), abs=2)


@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
def test_frames_are_logged_as_recorded_and_gray_if_masked(tmp_path, pixels):
    config = make_config(tmp_path)
    config["data"]["modalities"] = ["vision_left", "vision_right"]
    shapes, batch = shapes_of(config), make_batch(0, size=1)
    for number, camera in enumerate(shapes.inputs):
        greys = [60 + 100 * number, 90]
        batch["inputs"][camera] = flat_frames(greys, pixels)
        batch["inputs"][f"{camera}_valid"] = torch.tensor([[True, number == 0]])
    pictures = render_window(pick_window(batch, {}, shapes=shapes), EXTRAS).pictures
    for camera, expected in (("vision_left", [60, 90]), ("vision_right", [160, 128])):
        assert pictures[camera].shape == (32, 64, 3)
        tiles = pictures[camera].reshape(32, 2, 32, 3).astype(int)
        np.testing.assert_allclose(tiles.mean(axis=(0, 2, 3)), expected, atol=1)


def flat_frames(greys, pixels):
    """Two frames of one grey each, [1, 2, ...], in one of the loader's two forms."""
    if pixels == "rgb":
        frames = [np.full((32, 32, 3), grey, "u1") for grey in greys]
    else:
        chroma = np.full((16, 32), 128, "u1")
        frames = [np.concatenate([np.full((32, 32), grey, "u1"), chroma]) for grey in greys]
    return torch.from_numpy(np.stack(frames)[None])


def test_tensorboard_has_pictures_sound_and_text_of_a_window(tmp_path):
    recipe = Recipe()
    config = as_train_config({"training": {"loss_weights": {"internal_text": 0}}})
    shapes = WindowShapes.from_recipe(recipe, config)
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
        pick_window(batch, outputs, shapes=shapes), {**EXTRAS, "recipe": recipe.as_json()}
    )
    with SummaryWriter(str(tmp_path)) as writer:
        write_window(writer, rendered, 7)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "audio": 0}).Reload()
    names = {"audio/recorded", "audio/predicted", "animation/angle", "animation/velocity"}
    assert set(events.Tags()["images"]) == {f"held_out/{name}" for name in names}
    assert set(events.Tags()["audio"]) == {f"held_out/audio/{n}" for n in ("recorded", "predicted")}
    assert events.Tags()["tensors"] == ["held_out/texts/text_summary"]
    (picture,) = events.Images("held_out/audio/recorded")
    shown = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    np.testing.assert_array_equal(shown, rendered.pictures["audio/recorded"])
    (sound,) = events.Audio("held_out/audio/recorded")
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
    assert said == {"window s@9"}
