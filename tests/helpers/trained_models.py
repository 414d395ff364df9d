"""Make small sessions of all streams, and checkpoints of untrained models."""

from __future__ import annotations

import json

import av
import numpy as np
import soundfile
import torch

from shared.config import make_section
from shared.media.tokenizer import train_tokenizer
from shared.recipe import Recipe
from shared.streams import DEFAULT_STREAMS
from train.checkpoints import FORMAT_VERSION, save_checkpoint
from train.config import as_train_config
from train.model.multimodal import MultiModalCreature
from train.shapes import WindowShapes

RECIPE = {
    "video": {"size": 16},
    "audio": {"rate_hz": 8000, "dmel": {"fft_size": 256, "channels": 8}},
    "text": {"vocab_size": 264},
    "streams": {name: {**spec, "required": False} for name, spec in DEFAULT_STREAMS.items()},
}
MODEL = {"hidden_dim": 16, "num_layers": 1, "num_heads": 1, "vision_layers": 0}
TEXT_ONLY = {"training": {"loss_weights": {"audio": 0, "animation": 0}}, "model": MODEL}
TOKENIZER = train_tokenizer(["reach for the ball", "ball"], vocab_size=264)
EVENTS = [(0.5, "internal", "reach"), (1.0, "external", "ball"), (4.2, "external", "the ball")]


def make_session(folder, *, duration_s=8.0, sound=True, video=False, text=True, events=EVENTS):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    with (folder / "metadata.jsonl").open("w") as file:
        for time_s in np.arange(round(duration_s * 30)) / 30:
            angles = np.sin(time_s + np.arange(10))
            velocities = np.cos(time_s + np.arange(10))
            line = {
                "timestamp": time_s,
                "touch": rng.random(5).tolist(),
                "proprio": [*angles, *velocities],
            }
            file.write(json.dumps(line) + "\n")
    if text:
        lines = [json.dumps({"timestamp": t, "stream": s, "text": w}) for t, s, w in events]
        (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    if sound:
        samples = 0.1 * rng.normal(size=round(duration_s * 8000))
        soundfile.write(folder / "audio.wav", samples, 8000)
    if video:
        with av.open(folder / "vision_left.mp4", "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            for _ in range(round(duration_s * 5)):
                picture = rng.integers(0, 256, (32, 32, 3), dtype="u1")
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return folder


def make_checkpoint(path, config=None, *, streams=None, **extra):
    """Save and return an untrained model whose heads all have random weights."""
    config = as_train_config(config or {"model": MODEL})
    recipe = make_section(Recipe, {**RECIPE, "streams": {**RECIPE["streams"], **(streams or {})}})
    shapes = WindowShapes.from_recipe(recipe, config)
    torch.manual_seed(0)
    model = MultiModalCreature(config, shapes).eval()
    for parameter in model.predictors.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    extra = {"recipe": recipe.as_json(), "tokenizer": TOKENIZER.json, **extra}
    save_checkpoint(
        path,
        {
            "format_version": FORMAT_VERSION,
            "step": 7,
            "saved_at": 0.0,
            "model": model.state_dict(),
            "config": config.model_dump(mode="json"),
            "shapes": shapes.as_json(),
            "extra": {name: value for name, value in extra.items() if value is not None},
        },
    )
    return model
