"""Checkpoint files: what they hold, and which files are refused."""

from __future__ import annotations

import copy
import json
import zipfile

import pytest
import torch
from helpers.models import make_config as make_model_config
from helpers.models import make_shapes
from helpers.training import (
    RECIPE,
    SHAPES,
    cut_in_half,
    flip_a_bit,
    make_config,
    make_empty,
    make_state,
    make_trainer,
    names_in,
    weights_of,
)

from shared.errors import CheckpointError
from shared.recipe import Recipe
from shared.streams import DEFAULT_STREAMS
from train.checkpoints import load_checkpoint, save_checkpoint, shape_differences
from train.shapes import WindowShapes

pytestmark = pytest.mark.usefixtures("one_thread")


def types_in(value):
    """The types of everything in nested containers."""
    found = {type(value)}
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        found = found.union(*map(types_in, value))
    return found


def test_a_checkpoint_holds_only_tensors_and_plain_values(tmp_path):
    extra = {"tokenizer": "{}", "recipe": {"segment": {"duration_s": 4.0}}}
    summary = make_trainer(make_config(tmp_path), checkpoint_extra=extra).train()
    state = torch.load(summary.checkpoint)
    plain = {"dict", "OrderedDict", "list", "tuple", "str", "int", "float", "bool", "NoneType"}
    assert {kind.__name__ for kind in types_in(state)} <= {*plain, "Tensor"}


def test_a_checkpoint_holds_what_inference_and_resuming_need(tmp_path):
    extra = {"tokenizer": "{}", "recipe": {"segment": {"duration_s": 4.0}}}
    summary = make_trainer(make_config(tmp_path), checkpoint_extra=extra).train()
    state = torch.load(summary.checkpoint)
    assert state["step"] == 6
    assert state["extra"] == {**extra, "untrained_heads": []}
    assert state["stream"] == {"fingerprint": "tiny", "next_batch": 6}
    assert json.loads(json.dumps(state["config"]))["training"]["optimizer"]["lr"] == 3e-3
    assert state["shapes"]["streams"]["internal_text"]["num_classes"] == 264
    assert WindowShapes.from_json(json.loads(json.dumps(state["shapes"]))) == SHAPES


def test_a_saved_state_is_loaded_unchanged(tmp_path):
    state = make_state(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "new" / "model_step_7.pt", state))
    assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    assert loaded["step"] == 7
    assert names_in(tmp_path / "new") == {"model_step_7.pt"}


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, make_empty])
def test_a_damaged_checkpoint_is_refused_with_the_fix(tmp_path, damage):
    path = save_checkpoint(tmp_path / "model_step_1.pt", make_state())
    damage(path)
    with pytest.raises(CheckpointError, match=r"model_step_1\.pt.*damaged.*--resume auto"):
        load_checkpoint(path)


def test_a_missing_checkpoint_names_those_that_are_there(tmp_path):
    save_checkpoint(tmp_path / "model_step_40.pt", make_state())
    with pytest.raises(CheckpointError, match=r"no such checkpoint.*model_step_40\.pt"):
        load_checkpoint(tmp_path / "model_step_50.pt")


def test_a_folder_instead_of_a_checkpoint_names_those_in_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"a folder, not.*this folder has none"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "model_step_40.pt", make_state())
    with pytest.raises(CheckpointError, match=r"name one of its files: model_step_40\.pt"):
        load_checkpoint(tmp_path)


class Foreign:
    """Not a plain value."""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {}}, "not a checkpoint of this trainer"),
        ([1, 2], "not a checkpoint of this trainer"),
        ({**make_state(), "format_version": 99}, "format 99, .* fix: update vr-creature"),
        ({**make_state(), "format_version": 1}, "format 1, .* reads format 2; fix: train again"),
        ({**make_state(), "extra": Foreign()}, "can run code"),
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "model_step_1.pt")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "model_step_1.pt")


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model_step_1.pt", "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "model_step_1.pt")


def test_a_failed_save_leaves_the_old_file_and_no_debris(tmp_path, file_limit):
    path = tmp_path / "model_step_1.pt"
    path.write_bytes(b"old")
    file_limit(4096)
    with pytest.raises(CheckpointError, match=r"not be written.*File too large.*raise `ulimit -f`"):
        save_checkpoint(path, make_state())
    file_limit(None)  # before pytest writes its dot, perhaps to a long file
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == {path.name}


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(tmp_path / "checkpoints" / "model_step_1.pt", make_state())


def test_an_incomplete_state_is_refused_before_anything_is_written(tmp_path):
    state = make_state()
    del state["shapes"]
    with pytest.raises(CheckpointError, match="shapes"):
        save_checkpoint(tmp_path / "model_step_1.pt", state)
    assert names_in(tmp_path) == set()


def test_a_checkpoint_of_another_model_names_the_keys_that_differ(tmp_path):
    config = make_config(tmp_path)
    make_trainer(config).train()
    wider = copy.deepcopy(config)
    wider["model"]["hidden_dim"] = 32
    with pytest.raises(CheckpointError, match=r"hidden_dim 16 in the checkpoint, 32 here"):
        make_trainer(wider).load_checkpoint(tmp_path / "checkpoints/model_final.pt")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_heads", 1, "num_heads 2 in the checkpoint, 1 here"),
        ("tick_rate_hz", 20.0, "the checkpoint has 10 ticks per second, the run 20"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_unchanged(tmp_path, key, value, words):
    config = make_config(tmp_path)
    make_trainer(config).train()
    other = copy.deepcopy(config)
    other["model"][key] = value
    trainer = make_trainer(other)
    before = weights_of(trainer)
    with pytest.raises(CheckpointError, match=words):
        trainer.load_checkpoint(tmp_path / "checkpoints/model_final.pt")
    assert torch.equal(before, weights_of(trainer))


@pytest.mark.parametrize("load", ["load_checkpoint", "load_weights"])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("touch", {"values": [{"count": 5, "type": "scalar"}]}, "touch (5 scalar values at 30 Hz)"),
        (
            "touch",
            {"values": [{"count": 5, "type": "fraction", "unit": "N"}]},
            "touch (5 fraction [N] values at 30 Hz)",
        ),
        ("proprio", {"rate_hz": 25.0}, "proprio (10 angle [rad] and 10 velocity [rad/s] values at"),
    ],
)
def test_weights_for_streams_of_another_meaning_are_refused(tmp_path, load, name, change, words):
    config = make_config(tmp_path)
    make_trainer(config).train()
    values = RECIPE.as_json()
    values["streams"][name] |= change
    trainer = make_trainer(config, recipe=Recipe.model_validate(values))
    before = trainer.model.state_dict()
    saved = torch.load(tmp_path / "checkpoints/model_final.pt")["model"]
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in before.items()}
    weights = weights_of(trainer)
    with pytest.raises(CheckpointError, match="of another model") as found:
        getattr(trainer, load)(tmp_path / "checkpoints/model_final.pt")
    assert f"the run reads {words}" in str(found.value).replace("reads and predicts", "reads")
    assert torch.equal(weights, weights_of(trainer))


def test_attention_heads_left_to_the_default_are_the_same_model(tmp_path):
    config = make_config(tmp_path)
    config["model"]["num_heads"] = 1
    make_trainer(config).train()
    del config["model"]["num_heads"]  # one per 64 of width, so one
    trainer = make_trainer(config)
    trainer.load_checkpoint(tmp_path / "checkpoints/model_final.pt")
    assert trainer.step == 6


def test_a_checkpoint_for_inference_only_does_not_resume(tmp_path):
    path = save_checkpoint(tmp_path / "model_step_1.pt", make_state())
    with pytest.raises(CheckpointError, match=r"lacks .*optimizer.*cannot resume"):
        make_trainer(make_config(tmp_path)).load_checkpoint(path)


def test_a_resumed_run_uses_the_configurations_decay_and_not_the_checkpoints(tmp_path):
    make_trainer(make_config(tmp_path)).train()
    config = make_config(tmp_path, optimizer={"weight_decay": 0.5, "betas": [0.5, 0.6]})
    trainer = make_trainer(config)
    trainer.load_checkpoint(tmp_path / "checkpoints/model_final.pt")
    groups = torch.load(trainer.save_checkpoint(tmp_path / "again.pt"))["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [tuple(group["betas"]) for group in groups] == [(0.5, 0.6)] * 2


def test_a_resumed_run_continues_in_its_old_log_folder(tmp_path):
    first = make_trainer(make_config(tmp_path), run_name="mine").train()
    trainer = make_trainer(make_config(tmp_path, max_steps=8), run_name=None)
    trainer.load_checkpoint(first.checkpoint)
    assert trainer.train().log_dir == first.log_dir == tmp_path / "runs" / "mine"


def shapes_with(num_ticks=8, weights=None, **streams):
    """Return the shapes of the default streams and of some more."""
    config = make_model_config(num_ticks=num_ticks, loss_weights=weights or {})
    declared = {**DEFAULT_STREAMS, **streams}
    declared = {name: spec for name, spec in declared.items() if spec is not None}
    return make_shapes(config, streams=declared)


def gaze(count=6, rate_hz=120):
    values = [{"count": count, "type": "direction"}]
    return {"kind": "sensor", "key": "gaze", "rate_hz": rate_hz, "values": values}


@pytest.mark.parametrize(
    ("saved", "own", "expected"),
    [
        (
            {"gaze": gaze()},
            {"gaze": gaze(9, 60)},
            (
                "the checkpoint reads gaze (6 direction values at 120 Hz), "
                "the run reads gaze (9 direction values at 60 Hz)"
            ),
        ),
        (
            {"gaze": gaze()},
            {},
            "the checkpoint reads gaze (6 direction values at 120 Hz), the run does not use gaze",
        ),
        (
            {"gaze": gaze(), "weights": {"gaze": 1}},
            {"gaze": gaze()},
            (
                "the checkpoint reads and predicts gaze (6 direction values at 120 Hz), "
                "the run reads gaze (6 direction values at 120 Hz)"
            ),
        ),
        (
            {"wrist": {"kind": "video", "file": "w.mp4", "size": [32, 48]}},
            {"wrist": {"kind": "video", "file": "w.mp4", "size": [48, 32]}},
            (
                "the checkpoint reads wrist (32 x 48 pixels at 5 Hz), "
                "the run reads wrist (48 x 32 pixels at 5 Hz)"
            ),
        ),
        (
            {"touch": None},
            {},
            (
                "the checkpoint does not use touch, "
                "the run reads touch (5 fraction [0..1] values at 30 Hz)"
            ),
        ),
    ],
)
def test_streams_that_differ_are_named(saved, own, expected):
    assert shape_differences(shapes_with(**saved), shapes_with(**own)) == [expected]


def test_windows_of_another_length_are_the_same_model():
    assert shape_differences(shapes_with(num_ticks=8), shapes_with(num_ticks=20)) == []


def test_another_tick_rate_is_another_model():
    fast = make_shapes(make_model_config({"model": {"tick_rate_hz": 20}}, num_ticks=8))
    differences = shape_differences(shapes_with(), fast)
    assert differences == ["the checkpoint has 10 ticks per second, the run 20"]
