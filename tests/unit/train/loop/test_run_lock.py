"""Two runs in one folder: refused while the first lives, taken over when it is dead."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml
from helpers.processes import await_true, finish, launch
from helpers.rank_program import tiny_config
from helpers.training import EndlessLoader, make_config, make_trainer

from shared.errors import CheckpointError
from train.loop import run_lock
from train.loop.run_lock import LOCK_NAME, hold_folder

HOLDER = """
import os, sys, time
from pathlib import Path
from train.loop.run_lock import hold_folder
with hold_folder(Path(sys.argv[1]), log=print):
    if sys.argv[2:] == ["fork"] and os.fork() == 0:  # a loader process, which outlives it a little
        time.sleep(1)
        os._exit(0)
    print("holds", flush=True)
    sys.stdin.read()
"""


def start_holder(folder, *options):
    """Start a process that holds a folder until its input ends."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "holds\n"
    return holder


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Refuse at once; the other waits are long enough for a busy machine."""
    monkeypatch.setattr(run_lock, "RELEASE_S", 0.0)
    monkeypatch.setattr(run_lock, "_POLL_S", 0.01)


@pytest.fixture
def no_locks(monkeypatch):
    """Take the file system's locks away."""
    monkeypatch.setattr(run_lock, "lock_file", lambda *_, **__: None)


def hold(folder):
    """Hold a folder for a moment; return what was logged."""
    lines = []
    with hold_folder(folder, log=lines.append):
        owner = json.loads((folder / LOCK_NAME).read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
    assert list(folder.glob(".*")) == []
    return lines


def leave_behind(folder, **changes):
    """Leave the file of a run that was killed, by default on another host."""
    folder.mkdir()
    owner = {"host": "elsewhere", "pid": 123, "since": time.time(), **changes}
    (folder / LOCK_NAME).write_text(json.dumps(owner))


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    with start_holder(tmp_path) as holder:
        with pytest.raises(CheckpointError) as error:
            hold(tmp_path)
        holder.stdin.close()
    assert re.fullmatch(
        rf"{tmp_path}: process {holder.pid} on host {socket.gethostname()}, a run since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d, writes its checkpoints here; fix: .*save_dir.*",
        str(error.value),
    )
    assert hold(tmp_path) == []


def test_a_run_takes_over_at_once_from_one_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "RELEASE_S", 60.0)
    monkeypatch.setattr(run_lock, "SILENCE_S", 1000.0)
    with start_holder(tmp_path, "fork") as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / LOCK_NAME).exists()
        assert hold(tmp_path) == []


def test_a_run_takes_over_from_one_of_another_host_that_gives_no_sign_of_life(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.3)
    leave_behind(tmp_path / "run")
    (line,) = hold(tmp_path / "run")
    assert "process 123 on host elsewhere, a run since" in line


def test_the_same_host_name_on_another_machine_is_not_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.3)
    leave_behind(tmp_path / "run", host=socket.gethostname(), boot="another")
    assert len(hold(tmp_path / "run")) == 1


def test_a_run_that_ends_while_the_next_one_waits_leaves_it_a_lock_that_others_see(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run_lock, "SILENCE_S", 60.0)
    leave_behind(tmp_path / "run")
    path = tmp_path / "run" / LOCK_NAME

    def log(_line):
        path.unlink()  # the end of the other run

    with hold_folder(tmp_path / "run", log=log):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        run_lock._held.clear()
        with pytest.raises(CheckpointError), hold_folder(tmp_path / "run", log=log):
            raise AssertionError("it was not refused")
        run_lock._held.add((tmp_path / "run").resolve())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"host": 1, "since": "x"}'])
def test_a_file_with_any_content_is_taken_over(tmp_path, monkeypatch, content):
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.1)
    (tmp_path / LOCK_NAME).write_text(content)
    with hold_folder(tmp_path, log=lambda _: None):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_NAME).exists()


def test_signs_of_life_of_a_run_whose_lock_is_not_seen_refuse_the_next_one(
    tmp_path, monkeypatch, no_locks
):
    monkeypatch.setattr(run_lock, "LIFE_SIGN_S", 0.01)
    monkeypatch.setattr(run_lock, "SILENCE_S", 60.0)
    lines = []
    with hold_folder(tmp_path, log=lines.append):
        run_lock._held.clear()  # as in another process
        with (
            pytest.raises(CheckpointError, match=f"process {os.getpid()} on host"),
            hold_folder(tmp_path, log=lines.append),
        ):
            raise AssertionError("it was not refused")
        run_lock._held.add(tmp_path.resolve())
    assert len(lines) == 1


def test_without_locks_a_run_takes_over_from_a_silent_one_of_this_host(
    tmp_path, monkeypatch, no_locks
):
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.2)
    leave_behind(tmp_path / "run", host=socket.gethostname())
    assert len(hold(tmp_path / "run")) == 1


def test_of_many_runs_that_start_at_once_one_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "RELEASE_S", 60.0)
    log = []

    def take():
        descriptor, is_locked = run_lock._open_locked(tmp_path / LOCK_NAME)
        log.append("in")
        assert is_locked
        time.sleep(0.002)
        log.append("out")
        run_lock._release(descriptor, tmp_path / LOCK_NAME)
        os.close(descriptor)

    threads = [threading.Thread(target=take) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log == ["in", "out"] * 20


def test_trainers_of_one_process_share_a_folder(tmp_path):
    def train_inside(index):
        if index == 1:
            make_trainer(make_config(tmp_path, max_steps=2), EndlessLoader()).train()

    make_trainer(make_config(tmp_path, max_steps=3), EndlessLoader(on_batch=train_inside)).train()
    assert list((tmp_path / "checkpoints").glob(".*")) == []


def test_a_trainer_is_refused_before_it_writes_anything(tmp_path):
    folder = tmp_path / "checkpoints"
    with start_holder(folder) as holder:
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on host"):
            make_trainer(make_config(tmp_path), EndlessLoader()).train()
        assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints", LOCK_NAME]
        holder.stdin.close()


def test_a_file_of_somebody_else_is_refused_with_its_path(tmp_path):
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(CheckpointError, match=rf"{LOCK_NAME}: Is a directory; fix: "):
        hold(tmp_path)


@pytest.mark.slow
def test_a_second_command_is_refused_and_a_requeued_one_takes_over(tiny_set, tmp_path):
    config = tiny_config(str(tiny_set), str(tmp_path), max_steps=10**6, save_interval=5)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "train", "run", "--resume", "auto", "--config", str(path)]
    first = launch(command, scratch=tmp_path / "scratch")
    await_true(lambda: (tmp_path / "checkpoints/model_step_5.pt").exists())
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 1
    assert f"process {first.pid} on host" in second.stderr
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    again = launch([*command, "training.max_steps=10"], scratch=tmp_path / "scratch")
    assert "to step" in (output := finish(again)) or "resuming at step" in output
