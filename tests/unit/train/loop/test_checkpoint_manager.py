"""Which checkpoints are saved and kept, which one is the newest, and a full disk."""

from __future__ import annotations

import errno
import io
import os
import signal
import time

import pytest
import torch
from helpers.training import (
    BrokenLoader,
    EndlessLoader,
    corrupt_sample,
    cut_in_half,
    flip_a_bit,
    make_config,
    make_empty,
    make_state,
    make_trainer,
    names_in,
    text_of,
    with_nan,
)
from rich.console import Console

from shared.errors import CheckpointError, DivergedError
from train.checkpoints import link_checkpoint, load_checkpoint, save_checkpoint
from train.loop.checkpoint_manager import (
    check_writable,
    find_latest_checkpoint,
    make_room,
    prune_checkpoints,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_latest_is_the_one_saved_last_whatever_its_step_or_file_time(tmp_path):
    now = time.time()
    for step, age_s in ((500, 300), (90, 100), (100, 200)):
        state = make_state(step, saved_at=now - age_s)
        path = save_checkpoint(tmp_path / f"model_step_{step}.pt", state)
        os.utime(path, (now - step, now - step))
    assert find_latest_checkpoint(tmp_path) == tmp_path / "model_step_90.pt"


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, make_empty])
def test_the_latest_is_intact_and_a_damaged_one_is_named(tmp_path, damage):
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


def test_checking_a_folder_leaves_no_new_folder_behind(tmp_path):
    (tmp_path / "old").mkdir()
    check_writable(tmp_path / "old" / "new" / "newer")
    check_writable(tmp_path / "old")
    assert [*tmp_path.rglob("*")] == [tmp_path / "old"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be written there"):
        check_writable(tmp_path / "file" / "new")


def test_pruning_keeps_the_newest_and_all_files_that_are_no_step_checkpoints(tmp_path):
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


def test_pruning_removes_only_partial_files_of_killed_runs(tmp_path):
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_a_warning_and_the_older_checkpoint_stays(tmp_path, file_limit, capsys):
    limits = {3: 64, 6: None}  # the disk is full from step 4 to step 6
    loader = EndlessLoader(
        skipped={4: [corrupt_sample(7)]},
        on_batch=lambda index: index in limits and file_limit(limits[index]),
    )
    config = make_config(tmp_path, save_interval=3, max_steps=9, log_interval=1)
    summary = make_trainer(config, loader, console=None).train()
    saved = names_in(tmp_path / "checkpoints")
    printed = capsys.readouterr().out
    assert saved == {"model_step_3.pt", "model_step_9.pt", "model_final.pt"}
    assert summary.steps == 9
    assert "model_step_6.pt: the checkpoint could not be written" in printed
    assert printed.count("TensorBoard misses some curves") == 1


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A function that limits the disk to a number of checkpoints, with torch's error."""
    folder, save = tmp_path / "checkpoints", torch.save

    def limit(num_checkpoints):
        def save_or_fail(state, file):
            buffer = io.BytesIO()
            save(state, buffer)
            size = len(buffer.getvalue())
            used = {p.stat().st_ino: p.stat().st_size for p in folder.glob("model_*.pt")}
            if sum(used.values()) + size > num_checkpoints * size * 1.01:
                file.write(buffer.getvalue()[: size // 2])
                try:
                    raise OSError(errno.ENOSPC, "No space left on device")
                except OSError:
                    raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 (as torch does)
            file.write(buffer.getvalue())

        monkeypatch.setattr(torch, "save", save_or_fail)

    return limit


def train_on(folder, *, loader=None, **training):
    """Run a training that saves at every other step; return its output."""
    screen = io.StringIO()
    options = {"save_interval": 2, "checkpointing": {"keep_last_n": 2}, **training}
    console = Console(file=screen, soft_wrap=True)
    make_trainer(make_config(folder, **options), loader, console=console).train()
    return screen.getvalue()


def test_on_a_full_disk_older_checkpoints_make_room_for_newer_ones(tmp_path, small_disk):
    small_disk(2)  # and the third is written before the first is pruned
    printed = train_on(tmp_path, max_steps=8)
    assert printed.count("the disk is full: removed model_step_2.pt to make room") == 1
    assert "to make room" in text_of(tmp_path / "runs" / "tiny", "health")
    folder = tmp_path / "checkpoints"
    assert names_in(folder) == {"model_step_6.pt", "model_step_8.pt", "model_final.pt"}
    assert load_checkpoint(folder / "model_final.pt")["step"] == 8


def test_older_checkpoints_make_room_for_the_final_one_too(tmp_path, small_disk):
    small_disk(2)
    train_on(tmp_path, max_steps=7)
    assert names_in(tmp_path / "checkpoints") == {"model_step_6.pt", "model_final.pt"}


def test_the_last_intact_checkpoint_is_never_removed_and_a_lost_end_is_an_error(
    tmp_path, small_disk
):
    small_disk(1)
    with pytest.raises(CheckpointError, match=r"step 7, which is NOT saved.*model_step_2\.pt"):
        train_on(tmp_path, max_steps=7)
    assert names_in(tmp_path / "checkpoints") == {"model_step_2.pt"}
    assert load_checkpoint(tmp_path / "checkpoints/model_step_2.pt")["step"] == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_that_fails_when_a_signal_stops_the_run_is_an_error(tmp_path, small_disk):
    def fill_and_stop(index):
        if index == 2:
            small_disk(0)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(CheckpointError, match="step 3, which is NOT saved") as found:
        train_on(tmp_path, loader=EndlessLoader(on_batch=fill_and_stop))
    assert found.value.exit_code != 0


def test_no_checkpoint_is_saved_or_pruned_while_steps_are_skipped(tmp_path):
    """Whatever ruined the weights may have happened just before; the next good step is saved."""
    broken = BrokenLoader({3, *range(6, 99)}, with_nan)
    with pytest.raises(DivergedError, match=r"before these steps \(`--resume .*model_step_6\.pt"):
        train_on(tmp_path, loader=broken, save_interval=1, max_steps=99)
    assert names_in(tmp_path / "checkpoints") == {"model_step_5.pt", "model_step_6.pt"}


def test_a_checkpoint_that_is_due_at_a_bad_step_is_saved_at_the_next_good_one(tmp_path):
    broken = BrokenLoader({3}, with_nan)
    train_on(tmp_path, loader=broken, save_interval=4, max_steps=7)
    assert names_in(tmp_path / "checkpoints") == {"model_step_5.pt", "model_final.pt"}


def test_making_room_keeps_the_newest_intact_checkpoint(tmp_path):
    for step in (4, 1, 2, 3):
        save_checkpoint(tmp_path / f"model_step_{step}.pt", make_state(step))
        os.utime(tmp_path / f"model_step_{step}.pt", (step, step))
    save_checkpoint(tmp_path / "model_final.pt", make_state(9))
    for step in (3, 4):
        flip_a_bit(tmp_path / f"model_step_{step}.pt")
    make_room(tmp_path)
    assert names_in(tmp_path) == {"model_step_2.pt", "model_final.pt"}


def test_making_room_removes_nothing_if_none_is_intact(tmp_path):
    for step in (1, 2):
        (tmp_path / f"model_step_{step}.pt").write_bytes(b"torn")
    assert make_room(tmp_path) == []
    assert len(names_in(tmp_path)) == 2


def test_the_final_checkpoint_is_the_file_of_the_last_step(tmp_path):
    train_on(tmp_path, max_steps=4)
    folder = tmp_path / "checkpoints"
    assert (folder / "model_final.pt").samefile(folder / "model_step_4.pt")
    assert find_latest_checkpoint(folder) == folder / "model_final.pt"


def test_the_final_checkpoint_is_a_copy_without_hard_links(tmp_path, monkeypatch):
    def refuse(path, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    source = save_checkpoint(tmp_path / "model_step_1.pt", make_state())
    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    final = link_checkpoint(source, tmp_path / "model_final.pt")
    assert not final.samefile(source)
    assert final.read_bytes() == source.read_bytes()
    assert names_in(tmp_path) == {source.name, final.name}


def test_pruning_survives_a_partial_file_that_vanishes(tmp_path):
    (tmp_path / ".model_step_9.pt.partial").symlink_to(tmp_path / "gone")
    assert prune_checkpoints(tmp_path, keep_last_n=1) == []


@pytest.mark.parametrize(
    "odd",
    [
        {"format_version": "x"},
        {"format_version": None},
        {"step": "x"},
        {"step": [1]},
        {"saved_at": None},
        {"saved_at": float("nan")},
        {"model": []},
        {"config": [1]},
        {"extra": 5},
    ],
    ids=str,
)
def test_a_file_with_wrong_values_is_refused_and_does_not_hide_the_others(tmp_path, odd):
    whole = save_checkpoint(tmp_path / "model_step_1.pt", make_state(1))
    torch.save({**make_state(2), **odd}, tmp_path / "model_step_2.pt")
    messages = []
    assert find_latest_checkpoint(tmp_path, on_skip=messages.append) == whole
    with pytest.raises(CheckpointError, match=f"its {next(iter(odd))} is"):
        load_checkpoint(tmp_path / "model_step_2.pt")
    assert len(messages) == 1
