"""From sessions of any declared streams to a trained model, its predictions and its tools."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
import zarr
from click.testing import CliRunner
from helpers.sessions import write_streams
from helpers.sets import build_set

from shared.recipe import Recipe
from shared.streams import Kind
from train.__main__ import cli
from train.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

MANY = {
    "video": {"size": 32},
    "audio": {"rate_hz": 8000, "dmel": {"fft_size": 256, "channels": 8}},
    "text": {"vocab_size": 264},
    "split": {"val_fraction": 0.4, "salt": "a"},
    "streams": {
        "front": {"kind": "video", "file": "front.mp4", "size": [32, 48]},
        "back": {"kind": "video", "file": "back.mp4", "size": 16, "rate_hz": 10},
        "wrist": {"kind": "video", "file": "wrist.mp4", "rate_hz": 1, "codec": "mjpeg"},
        "voice": {"kind": "audio", "file": "sound.mka"},
        "room": {"kind": "audio", "file": "sound.mka", "track": 1},
        "battery": {
            "kind": "sensor",
            "key": "battery",
            "rate_hz": 1,
            "values": [{"count": 1, "type": "fraction"}],
        },
        "hand": {
            "kind": "sensor",
            "file": "hand.jsonl",
            "key": "hand",
            "rate_hz": 15,
            "values": [{"count": 6, "type": "position"}, {"count": 8, "type": "quaternion"}],
        },
        "arm": {
            "kind": "sensor",
            "key": "arm",
            "values": [{"count": 3, "type": "angle"}, {"count": 3, "type": "velocity"}],
        },
        "head": {
            "kind": "sensor",
            "key": "head",
            "rate_hz": 60,
            "values": [{"count": 4, "type": "quaternion"}],
        },
        "pad": {
            "kind": "sensor",
            "file": "pad.csv",
            "rate_hz": 90,
            "values": [{"count": 2, "type": "scalar", "names": ["x", "y"], "unit": "V"}],
        },
        "gaze": {
            "kind": "sensor",
            "file": "gaze.csv",
            "rate_hz": 120,
            "time_unit": "ms",
            "values": [{"count": 3, "type": "direction", "names": ["gx", "gy", "gz"]}],
        },
        "imu": {
            "kind": "sensor",
            "key": "imu",
            "rate_hz": 200,
            "values": [{"count": 6, "type": "scalar"}],
        },
        "said": {"kind": "text", "stream": "said"},
        "thought": {"kind": "text", "stream": "thought"},
        "notes": {"kind": "text", "file": "notes.jsonl"},
    },
}
"""Three cameras, two tracks, seven sensors of all value types, three texts."""

ONE_SENSOR = {
    "split": {"val_fraction": 0.4, "salt": "a"},
    "streams": {
        "gaze": {
            "kind": "sensor",
            "key": "gaze",
            "rate_hz": 120,
            "values": [{"count": 3, "type": "direction"}],
        }
    },
}

HEADS = {"voice": 1.0, "hand": 0.5, "gaze": 1.0, "said": 1.0}


def invoke(*arguments):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def make_run(folder, values, training, *, direct=False):
    """Write sessions and build their set; return the path of a configuration."""
    recipe = Recipe.model_validate(values)
    for i, name in enumerate(("ann", "bob", "cat", "dan")):
        skip = [] if i else list(recipe.streams)[1:3]
        write_streams(folder / "sessions" / name, recipe, duration_s=4.0 + i, skip=skip)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.as_json()))
    data = {"root_dir": str(folder / "sessions"), "recipe": str(folder / "recipe.yaml")}
    if not direct:
        build_set(folder / "sessions", folder / "set", recipe)
        data = {"shards": str(folder / "set")}
    config = {
        "data": {"batch_size": 2, "num_workers": 0, "window": {"duration_s": 2.0}, **data},
        "training": {
            "max_steps": 2,
            "num_threads": 1,
            "eval_interval": 1,
            "log_dir": str(folder / "runs"),
            "checkpointing": {"save_dir": str(folder / "checkpoints")},
            **training,
        },
        "model": {"hidden_dim": 32, "num_layers": 1, "vision_layers": 0, "modality_dropout": 0.1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Train four heads among fifteen streams; return the folder and what was printed."""
    folder = tmp_path_factory.mktemp("many")
    config = make_run(folder, MANY, {"loss_weights": HEADS})
    checked = invoke("run", "--config", config, "--check")
    printed = invoke("run", "--config", config)
    return folder, checked, printed


def test_four_heads_among_fifteen_streams_are_trained(many):
    folder, checked, printed = many
    assert "inputs: " + ", ".join(sorted(MANY["streams"])) in checked
    for name in MANY["streams"]:
        assert f" {name} " in checked
    for head in HEADS:
        assert f"loss_{head}" in printed
    state = load_checkpoint(folder / "checkpoints" / "model_final.pt")
    assert state["shapes"]["targets"] == {name: name for name in sorted(HEADS)}
    # Positions are standardized; checkpoints hold the statistics.
    assert (state["model"]["sensors.s_hand.std"][:6] != 1).all()
    assert (state["model"]["sensors.s_hand.std"][6:] == 1).all()


def test_infer_writes_a_file_per_head_and_a_page_of_every_stream(many):
    folder = many[0]
    checkpoint = folder / "checkpoints" / "model_final.pt"
    arguments = ("--checkpoint", checkpoint, "--input", folder / "sessions" / "dan")
    invoke("infer", *arguments, "--out", folder / "out")
    out = folder / "out" / "dan"
    names = {"voice.wav", "voice.dmel.zarr", "hand.zarr", "gaze.zarr", "said.jsonl"}
    assert {path.name for path in out.iterdir()} == {*names, "metrics.json", "index.html"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["losses"]) == {"loss_total", *(f"loss_{head}" for head in HEADS)}
    assert all(loss is not None for loss in metrics["losses"].values()), metrics["reasons"]
    assert set(metrics["files"]) == names
    gaze = zarr.open_group(out / "gaze.zarr", mode="r")
    assert gaze["gaze"].shape == (7 * 120, 3)
    np.testing.assert_allclose(np.linalg.norm(gaze["gaze"][12:], axis=1), 1, atol=1e-5)
    hand = zarr.open_group(out / "hand.zarr", mode="r")["hand"][:]
    assert np.isfinite(hand[2:]).all()
    assert (hand[2:, [9, 13]] >= 0).all()  # the canonical sign of quaternions
    html = (out / "index.html").read_text()
    recipe = Recipe.model_validate(MANY)
    shown = (*recipe.of_kind(Kind.VIDEO, Kind.AUDIO, Kind.TEXT), "hand", "gaze")
    assert all(name in html for name in shown)
    assert html.count("<canvas") == 3
    assert html.count("<audio") == 3  # two recorded, one predicted
    assert html.count('class="curve predicted"') == 14 + 3
    assert "quaternion" in html


def test_ablation_has_a_row_per_modality_and_all_cameras_are_one(many):
    output = invoke("ablate", "--checkpoint", many[0] / "checkpoints" / "model_final.pt")
    rows = {line.split("│")[0].strip() for line in output.splitlines() if "│" in line}
    others = set(MANY["streams"]) - {"front", "back", "wrist"}
    assert {"nothing", "vision", *others} <= rows


def test_the_estimate_lists_the_bytes_of_every_stream(many):
    output = invoke("estimate", "--config", many[0] / "config.yaml")
    (line,) = (line for line in output.splitlines() if line.startswith("over the bus"))
    assert all(f" {name} " in line for name in MANY["streams"])


@pytest.mark.parametrize("direct", [False, True], ids=["set", "sessions"])
def test_a_recipe_with_one_sensor_and_nothing_else_is_trained(tmp_path, direct):
    training = {"loss_weights": {"gaze": 1.0}}
    config = make_run(tmp_path, ONE_SENSOR, training, direct=direct)
    assert "loss_gaze" in invoke("run", "--config", config)
    checkpoint = tmp_path / "checkpoints" / "model_final.pt"
    session = tmp_path / "sessions" / "bob"
    invoke("infer", "--checkpoint", checkpoint, "--input", session, "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "bob").iterdir()}
    assert names == {"gaze.zarr", "metrics.json", "index.html"}
    assert "gaze" in invoke("ablate", "--checkpoint", checkpoint)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.loss_weights.hands=1", "training.loss_weights names hands.*use one of arm, "),
        ("data.modalities=[front,ear]", "data.modalities names ear.*use .*front"),
        ("data.window.duration_s=1.9", "data.window.duration_s 1.9 is not a multiple of 1 s"),
    ],
)
def test_a_wrong_name_or_window_is_refused_with_the_declared_ones(many, override, message):
    arguments = ["run", "--config", str(many[0] / "config.yaml"), override]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "\n" not in result.output.strip()
    assert re.search(message, result.output), result.output
