"""Files of predictions: events across windows, files of older models, a full disk."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import zarr
from helpers.trained_models import MODEL, make_checkpoint

from shared.errors import EngineError
from shared.media.tokenizer import train_tokenizer
from train.infer.predictions import (
    METRICS_NAME,
    PredictionWriter,
    WindowPrediction,
    earlier_files,
)
from train.trained_model import load_trained_model


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_writer(out, trained):
    return PredictionWriter(out, trained=trained, num_ticks=80)


def make_trained(folder, heads, streams=None):
    """Load a checkpoint of an untrained model with some heads of the default four, or others."""
    names = ("internal_text", "external_text", "audio", "animation", *heads)
    weights = {name: float(name in heads) for name in names}
    config = {"training": {"loss_weights": weights}, "model": MODEL}
    folder.mkdir(exist_ok=True)
    make_checkpoint(folder / "k.pt", config, streams=streams)
    return load_trained_model(folder / "k.pt", device=torch.device("cpu"))


@pytest.mark.parametrize(("follows", "texts"), [(True, ["reach"]), (False, ["re", "ach"])])
def test_a_text_continues_over_a_border_only_if_no_tick_is_left_out(tmp_path, follows, texts):
    trained = make_trained(tmp_path / "k", ["internal_text", "audio"])
    tokenizer = train_tokenizer([], vocab_size=264)
    trained = dataclasses.replace(trained, tokenizer=tokenizer)
    with open_writer(tmp_path, trained) as writer:
        for first, text in ((38, "re"), (40, "ach")):
            tokens = np.array(tokenizer.encode(text)[1:])
            writer.add(
                WindowPrediction(
                    first_tick=first,
                    follows=follows,
                    times_s=np.arange(first, first + len(tokens)) / 10,
                    values={"internal_text": tokens},
                )
            )
    assert [e["text"] for e in read_lines(tmp_path / "internal_text.jsonl")] == texts


@pytest.mark.parametrize("rate_hz", [5, 15, 200])
def test_each_sample_of_a_sensor_is_at_its_own_time(tmp_path, rate_hz):
    """A tick of 0.1 s has 0 or 1 samples at 5 Hz, 1 or 2 at 15 Hz."""
    gaze = {
        "kind": "sensor",
        "key": "gaze",
        "rate_hz": rate_hz,
        "values": [{"count": 3, "type": "direction", "names": ["x", "y", "z"]}],
    }
    trained = make_trained(tmp_path / "k", ["gaze"], {"gaze": gaze})
    per_tick = trained.shapes.streams["gaze"].per_tick
    with open_writer(tmp_path, trained) as writer:
        for first in (1, 11):  # of tick t, sample n: a direction that tells both
            ticks = np.arange(first, first + 10)
            angles = ticks[:, None] + np.arange(per_tick) / 100
            values = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=-1)
            writer.add(
                WindowPrediction(
                    first_tick=first,
                    follows=True,
                    times_s=ticks / 10,
                    values={"gaze": 2 * values.astype(np.float32)},
                )
            )
    group = zarr.open_group(tmp_path / "gaze.zarr", mode="r")
    times_s = group["timestamp"][:]
    np.testing.assert_allclose(times_s, np.arange(8 * rate_hz) / rate_hz)
    valid = (times_s > 0.1 - 1e-9) & (times_s < 2.1 - 1e-9)
    np.testing.assert_array_equal(group["valid"][:], valid)
    assert np.isnan(group["gaze"][:][~valid]).all()
    tick = np.floor(times_s[valid] * 10 + 1e-6)
    number = np.array([int((tick[:i] == t).sum()) for i, t in enumerate(tick)])
    angles = tick + number / 100
    expected = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=-1)
    np.testing.assert_allclose(group["gaze"][:][valid], expected, atol=1e-6)
    assert group["gaze"].attrs["names"] == ["x", "y", "z"]


def test_predictions_of_an_older_model_are_deleted_and_other_files_stay(tmp_path):
    heads = ["internal_text", "external_text", "audio", "animation"]
    with open_writer(tmp_path / "out", make_trained(tmp_path / "k", heads)) as writer:
        pass
    files = [*writer.files, "../outside.jsonl", "notes.txt"]
    (tmp_path / "out" / METRICS_NAME).write_text(json.dumps({"files": files}))
    (tmp_path / "outside.jsonl").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "video.zarr").mkdir()
    with open_writer(tmp_path / "out", make_trained(tmp_path / "k", heads[:1])):
        pass
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"internal_text.jsonl", "notes.txt", "video.zarr", METRICS_NAME}
    assert (tmp_path / "outside.jsonl").exists()


def test_sound_of_a_run_that_did_not_finish_is_an_earlier_prediction(tmp_path):
    trained = make_trained(tmp_path / "k", ["audio", "internal_text"])
    with open_writer(tmp_path / "out", trained):
        pass
    assert set(earlier_files(tmp_path / "out")) == {"audio.wav", "audio.dmel.zarr"}


def test_a_disk_that_takes_no_sound_is_a_clear_error(tmp_path, file_limit):
    trained = make_trained(tmp_path / "k", ["audio", "internal_text"])

    def write():
        with open_writer(tmp_path, trained):
            file_limit(4096)  # 8 s of silence are 128 kB

    with pytest.raises(EngineError, match=r"audio\.wav: the sound can't be written .* MiB"):
        write()
    file_limit(None)
