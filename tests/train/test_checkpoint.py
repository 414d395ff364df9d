from __future__ import annotations

import copy
import json
import os
import resource
import time
import zipfile

import pytest
import torch
from tiny_training import EndlessLoader, make_config, make_trainer

from shared.errors import CheckpointError
from train.checkpoint import (
    find_latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def file_limit():
    """A function that lets no file grow over so many bytes (as on a full disk), or any (None)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(limit_bytes):
        limit_bytes = soft if limit_bytes is None else limit_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))

    yield set_limit
    set_limit(None)


def make_state(step=1, *, saved_at=None):
    model = {"weight": torch.arange(5000, dtype=torch.float32)}
    saved_at = time.time() if saved_at is None else saved_at
    rest = {"format_version": 1, "config": {}, "shapes": {}}
    return {**rest, "step": step, "saved_at": saved_at, "model": model}


def flip_a_bit(path):
    """Change one bit in the middle of the file, where the weights are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(path):
    path.write_bytes(b"")


def types_in(value):
    """The types of everything in nested containers."""
    found = {type(value)}
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        found = found.union(*map(types_in, value))
    return found


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_holds_only_tensors_and_plain_values(tmp_path):
    extra = {"tokenizer": "{}", "recipe": {"window": {"duration_s": 4.0}}}
    summary = make_trainer(make_config(tmp_path), checkpoint_extra=extra).train()
    state = torch.load(summary.checkpoint)
    plain = {"dict", "OrderedDict", "list", "tuple", "str", "int", "float", "bool", "NoneType"}
    assert {kind.__name__ for kind in types_in(state)} <= {*plain, "Tensor"}


def test_a_checkpoint_says_what_inference_and_resuming_need(tmp_path):
    extra = {"tokenizer": "{}", "recipe": {"window": {"duration_s": 4.0}}}
    summary = make_trainer(make_config(tmp_path), checkpoint_extra=extra).train()
    state = torch.load(summary.checkpoint)
    assert state["step"] == 6
    assert state["extra"] == extra
    assert state["stream"] == {"fingerprint": "tiny", "next_batch": 6}
    assert json.loads(json.dumps(state["config"]))["training"]["optimizer"]["lr"] == 3e-3
    assert state["shapes"]["vocab_size"] == 264


def test_what_is_saved_is_loaded(tmp_path):
    state = make_state(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "new" / "model_step_7.pt", state))
    assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    assert loaded["step"] == 7
    assert names_in(tmp_path / "new") == {"model_step_7.pt"}


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, make_empty])
def test_a_damaged_checkpoint_is_refused_with_a_way_out(tmp_path, damage):
    path = save_checkpoint(tmp_path / "model_step_1.pt", make_state())
    damage(path)
    with pytest.raises(CheckpointError, match=r"model_step_1\.pt.*damaged.*--resume auto"):
        load_checkpoint(path)


def test_a_missing_checkpoint_names_those_that_are_there(tmp_path):
    save_checkpoint(tmp_path / "model_step_40.pt", make_state())
    with pytest.raises(CheckpointError, match=r"no such checkpoint.*model_step_40\.pt"):
        load_checkpoint(tmp_path / "model_step_50.pt")


class Foreign:
    """Not a plain value."""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {}}, "no checkpoint of this trainer"),
        ([1, 2], "no checkpoint of this trainer"),
        ({**make_state(), "format_version": 99}, "format version 99"),
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
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "model_step_1.pt")


def test_the_latest_is_the_one_saved_last_whatever_its_step_or_file_time(tmp_path):
    now = time.time()
    for step, age_s in ((500, 300), (90, 100), (100, 200)):
        state = make_state(step, saved_at=now - age_s)
        path = save_checkpoint(tmp_path / f"model_step_{step}.pt", state)
        os.utime(path, (now - step, now - step))
    assert find_latest_checkpoint(tmp_path) == tmp_path / "model_step_90.pt"


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, make_empty])
def test_the_latest_is_whole_and_a_damaged_one_is_named(tmp_path, damage):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / f"model_step_{step}.pt", make_state(step))
    damage(tmp_path / "model_step_3.pt")
    messages = []
    latest = find_latest_checkpoint(tmp_path, on_skip=messages.append)
    assert latest == tmp_path / "model_step_2.pt"
    assert [m for m in messages if "model_step_3.pt" in m] == messages != []


def test_the_final_checkpoint_counts_for_resuming(tmp_path):
    save_checkpoint(tmp_path / "model_step_8.pt", make_state(8))
    save_checkpoint(tmp_path / "model_final.pt", make_state(9))
    assert find_latest_checkpoint(tmp_path) == tmp_path / "model_final.pt"


def test_a_folder_without_checkpoints_has_no_latest(tmp_path):
    (tmp_path / "model_best.pt").write_bytes(b"another program's")
    assert find_latest_checkpoint(tmp_path) is None
    assert find_latest_checkpoint(tmp_path / "missing") is None


def test_pruning_keeps_the_newest_and_whatever_is_no_step_checkpoint(tmp_path):
    oldest_first = [
        "notes.txt",
        "model_best.pt",
        "model_final.pt",
        "model_step_900.pt",
        "model_step_1.pt",
        "model_step_2.pt",
        "model_step_7.pt.bak",
    ]
    for time_s, name in enumerate(oldest_first):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time_s, time_s))
    removed = prune_checkpoints(tmp_path, keep_last_n=2)
    assert [path.name for path in removed] == ["model_step_900.pt"]
    assert names_in(tmp_path) == {*oldest_first} - {"model_step_900.pt"}


def test_pruning_removes_only_partial_files_that_nobody_writes_any_more(tmp_path):
    old, new = (tmp_path / f".model_step_{n}.pt.partial" for n in (1, 2))
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 7200,) * 2)
    prune_checkpoints(tmp_path, keep_last_n=1)
    assert list(tmp_path.iterdir()) == [new]


def test_a_run_keeps_the_last_n_step_checkpoints_and_the_final_one(tmp_path):
    config = make_config(tmp_path, save_interval=1, checkpointing={"keep_last_n": 2})
    make_trainer(config).train()
    kept = names_in(tmp_path / "checkpoints")
    assert kept == {"model_step_5.pt", "model_step_6.pt", "model_final.pt"}


def test_a_failed_save_leaves_the_old_file_and_no_debris(tmp_path, file_limit):
    path = tmp_path / "model_step_1.pt"
    path.write_bytes(b"old")
    file_limit(4096)
    with pytest.raises(CheckpointError, match=r"couldn't be written.*File too large.*make room"):
        save_checkpoint(path, make_state())
    file_limit(None)  # before pytest writes its dot, perhaps to a long file
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == {path.name}


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="couldn't be written"):
        save_checkpoint(tmp_path / "checkpoints" / "model_step_1.pt", make_state())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_a_warning_and_the_older_checkpoint_stays(tmp_path, file_limit, capsys):
    limits = {3: 64, 6: None}  # the disk is full from step 4 to step 6
    loader = EndlessLoader(
        skipped={4: [{"key": "s/7"}]},
        on_batch=lambda index: index in limits and file_limit(limits[index]),
    )
    config = make_config(tmp_path, save_interval=3, max_steps=9, log_interval=1)
    summary = make_trainer(config, loader, console=None).train()
    saved = names_in(tmp_path / "checkpoints")
    printed = capsys.readouterr().out
    assert saved == {"model_step_3.pt", "model_step_9.pt", "model_final.pt"}
    assert summary.steps == 9
    assert "model_step_6.pt: the checkpoint couldn't be written" in printed
    assert printed.count("TensorBoard misses some curves") == 1


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
    with pytest.raises(CheckpointError, match=r"hidden_dim 16 there, 32 here"):
        make_trainer(wider).load_checkpoint(tmp_path / "checkpoints/model_final.pt")


def test_a_resumed_run_uses_the_configurations_decay_and_not_the_checkpoints(tmp_path):
    make_trainer(make_config(tmp_path)).train()
    config = make_config(tmp_path, optimizer={"weight_decay": 0.5, "betas": [0.5, 0.6]})
    trainer = make_trainer(config)
    trainer.load_checkpoint(tmp_path / "checkpoints/model_final.pt")
    groups = torch.load(trainer.save_checkpoint(tmp_path / "again.pt"))["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [tuple(group["betas"]) for group in groups] == [(0.5, 0.6)] * 2


def test_a_resumed_run_goes_on_in_its_old_log_folder(tmp_path):
    first = make_trainer(make_config(tmp_path), run_name="mine").train()
    trainer = make_trainer(make_config(tmp_path, max_steps=8), run_name=None)
    trainer.load_checkpoint(first.checkpoint)
    assert trainer.train().log_dir == first.log_dir == tmp_path / "runs" / "mine"
