"""Declared streams from end to end: validate, build, train, infer and look, by the commands.

One recipe declares every kind, rate and value type at once; another one sensor and nothing else.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorstore
import yaml
from click.testing import CliRunner
from helpers.sessions import write_streams

from preprocess.__main__ import cli as preprocess_cli
from shared.recipe import load_recipe
from train import Loader, load_checkpoint, open_source
from train.__main__ import cli as train_cli
from train.config import load_train_config

if TYPE_CHECKING:
    from pathlib import Path

MANY: dict[str, Any] = {
    "segment": {"duration_s": 1.0},
    "text": {"vocab_size": 300},
    "split": {"val_fraction": 0.25, "salt": "c"},
    "audio": {"rate_hz": 8000, "dmel": {"fft_size": 512, "channels": 12}},
    "streams": {
        "front": {"kind": "video", "file": "front.mp4", "rate_hz": 5, "size": 48},
        "wrist": {"kind": "video", "file": "wrist.mp4", "rate_hz": 10, "size": [32, 64]},
        "scene": {"kind": "video", "file": "scene.mp4", "rate_hz": 15, "size": 32},
        "voice": {"kind": "audio", "file": "sound.mkv", "required": True},
        "room": {"kind": "audio", "file": "sound.mkv", "track": 1},
        "battery": {
            "kind": "sensor",
            "key": "battery",
            "rate_hz": 1,
            "resample": "hold",
            "values": [{"count": 1, "type": "fraction"}],
        },
        "finger": {
            "kind": "sensor",
            "key": "finger",
            "rate_hz": 15,
            "values": [{"count": 4, "type": "angle"}],
        },
        "head": {
            "kind": "sensor",
            "file": "head.csv",
            "rate_hz": 30,
            "required": True,
            "values": [
                {"count": 3, "type": "position", "unit": "m", "names": ["x", "y", "z"]},
                {"count": 4, "type": "quaternion", "names": ["qx", "qy", "qz", "qw"]},
            ],
        },
        "hand": {
            "kind": "sensor",
            "file": "hand.jsonl",
            "key": "joints",
            "rate_hz": 60,
            "values": [{"count": 6, "type": "angle"}, {"count": 6, "type": "velocity"}],
        },
        "trunk": {
            "kind": "sensor",
            "file": "trunk.tsv",
            "key": "trunk",
            "rate_hz": 90,
            "time_unit": "ms",
            "values": [{"count": 4, "type": "quaternion"}],
        },
        "gaze": {
            "kind": "sensor",
            "file": "gaze.csv",
            "rate_hz": 120,
            "values": [{"count": 3, "type": "direction", "names": ["gx", "gy", "gz"]}],
        },
        "imu": {
            "kind": "sensor",
            "file": "imu.csv",
            "key": "imu",
            "rate_hz": 200,
            "time_unit": "us",
            "values": [{"count": 6, "type": "scalar", "unit": "m/s^2"}],
        },
        "thought": {"kind": "text", "stream": "thought"},
        "speech": {"kind": "text", "stream": "speech"},
        "operator": {"kind": "text", "file": "notes.jsonl", "time": "t_ms", "time_unit": "ms"},
    },
}

ONE: dict[str, Any] = {
    "segment": {"duration_s": 1.0},
    "split": {"val_fraction": 0.25, "salt": "c"},
    "streams": {
        "imu": {
            "kind": "sensor",
            "file": "imu.csv",
            "rate_hz": 50,
            "values": [{"count": 3, "type": "scalar", "names": ["ax", "ay", "az"]}],
        }
    },
}

HEADS = {
    "many": {"voice": 1.0, "head": 1.0, "gaze": 0.5, "speech": 1.0},
    "one": {"imu": 1.0},
}
RECIPES = {"many": MANY, "one": ONE}
SESSIONS = {"ann": 4.0, "bob": 3.0, "cat": 5.3, "dan": 3.6}


def run(cli: Any, *words: object, expect: int = 0) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == expect, result.output
    return result.output


@pytest.fixture(scope="module", params=list(RECIPES))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory) -> Path:
    """A recipe, sessions, and the set built of them."""
    folder = tmp_path_factory.mktemp(name)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPES[name]))
    recipe = load_recipe(folder / "recipe.yaml")
    for session, duration_s in SESSIONS.items():
        write_streams(folder / "sessions" / session, recipe, duration_s=duration_s)
    run(
        preprocess_cli,
        *("shards", "--recipe", folder / "recipe.yaml", "--sessions", folder / "sessions"),
        *("--out", folder / "set", "--workers", 0),
    )
    return folder


@pytest.fixture(scope="module")
def trained(folder, name) -> Path:
    """The configuration of a finished run of 4 steps."""
    config = {
        "data": {
            "shards": str(folder / "set"),
            "batch_size": 2,
            "num_workers": 0,
            "window": {"duration_s": 2.0, "stride_s": 1.0},
        },
        "model": {"hidden_dim": 32, "num_layers": 1, "vision_layers": 1},
        "training": {
            "max_steps": 4,
            "eval_interval": 2,
            "eval_batches": 2,
            "log_interval": 1,
            "save_interval": 4,
            "device": "cpu",
            "num_threads": 1,
            "loss_weights": HEADS[name],
            "log_dir": str(folder / "runs"),
            "checkpointing": {"save_dir": str(folder / "checkpoints")},
            "optimizer": {"warmup_steps": 1},
        },
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    run(train_cli, "run", "--config", path)
    return path


def test_every_declared_stream_is_validated_and_drawn(folder, name):
    page = folder / "report.html"
    output = run(
        preprocess_cli,
        *("validate", folder / "sessions", "--recipe", folder / "recipe.yaml", "--report", page),
        "--json",
    )
    reports = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(reports) == len(SESSIONS)
    # The 1 Hz stream reaches beyond the end of a session of broken seconds, which is a warning.
    statuses = {report["session"]: report["status"] for report in reports}
    assert {statuses[s] for s in SESSIONS if SESSIONS[s].is_integer()} == {"passed"}, output
    assert "failed" not in statuses.values()
    html = page.read_text()
    for stream in RECIPES[name]["streams"]:
        assert stream in html


def test_a_stock_reader_finds_a_column_per_stream(folder, name):
    recipe = load_recipe(folder / "recipe.yaml")
    for stream, spec in recipe.sensors.items():
        array = tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {
                    "driver": "zip",
                    "base": f"file://{folder}/set/train-000000.{stream}.zarr.zip",
                    "path": f"{stream}/",
                },
            }
        ).result()
        assert array.shape[1:] == (round(spec.rate_hz), spec.size)
        assert np.isfinite(array.read().result()[0]).any()


def test_windows_of_a_set_equal_those_of_the_sessions(folder, name, trained):
    config = load_train_config(trained)
    direct = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={
                    "shards": None,
                    "root_dir": folder / "sessions",
                    "recipe": folder / "recipe.yaml",
                }
            )
        }
    )
    batches = {}
    for how, each in (("set", config), ("sessions", direct)):
        loader = Loader(open_source(each, split="train"), each, is_shuffled=False, num_epochs=1)
        batches[how] = {
            key: {n: t[i] for group in ("inputs", "targets") for n, t in batch[group].items()}
            for batch in loader
            for i, key in enumerate(batch["keys"])
            if batch["weight"][i]
        }
    assert batches["set"].keys() == batches["sessions"].keys()
    for key, arrays in batches["set"].items():
        for array, values in arrays.items():
            if load_recipe(folder / "recipe.yaml").streams[
                array.removesuffix("_valid")
            ].kind == "video" and not array.endswith("_valid"):
                continue  # h264 loses some bits
            other = batches["sessions"][key][array]
            np.testing.assert_array_equal(values.numpy(), other.numpy(), err_msg=f"{key} {array}")


def test_heads_are_trained_and_logged(folder, name, trained):
    state = load_checkpoint(folder / "checkpoints" / "model_final.pt")
    assert state["step"] == 4
    assert set(state["shapes"]["targets"]) == set(HEADS[name])
    assert set(state["shapes"]["inputs"]) == set(RECIPES[name]["streams"])


def test_inference_predicts_every_head_and_draws_a_page(folder, name, trained):
    out = folder / "predictions" / "ann"
    run(
        train_cli,
        *("infer", "--checkpoint", folder / "checkpoints" / "model_final.pt"),
        *("--input", folder / "sessions" / "ann", "--out", out.parent),
    )
    files = {path.name for path in out.iterdir()}
    for head in HEADS[name]:
        assert any(file.startswith(head) for file in files), files
    html = next(path for path in out.iterdir() if path.suffix == ".html").read_text()
    for head in HEADS[name]:
        assert head in html


def test_one_more_stream_adds_its_column_and_touches_no_other(folder, name, trained):
    imu = RECIPES[name]["streams"]["imu"]
    column = "imu_0" if "key" in imu else "ax"
    more = {
        **{key: value for key, value in imu.items() if key != "key"},
        "rate_hz": 25,
        "values": [{"count": 1, "type": "scalar", "names": [column]}],
    }
    recipe = folder / "more.yaml"
    streams = {**RECIPES[name]["streams"], "more": more}
    recipe.write_text(yaml.safe_dump({**RECIPES[name], "streams": streams}))
    before = column_files(folder)
    run(
        preprocess_cli,
        *("shards", "--recipe", recipe, "--sessions", folder / "sessions"),
        *("--out", folder / "set", "--workers", 0),
    )
    after = column_files(folder)
    assert before.items() <= after.items()
    assert {file.split(".")[-3] for file in after.keys() - before.keys()} == {"more"}


def column_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Identity and time of each column file of the set."""
    files = [p for p in (folder / "set").iterdir() if p.suffix in (".zip", ".tar")]
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}
