"""Ctrl-C, SIGTERM and SIGHUP, to the trainer and to its loader processes."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import training as tiny_training
from helpers.training import EndlessLoader, make_config, make_trainer
from rich.console import Console

from train.machine import runtime

pytestmark = pytest.mark.usefixtures("one_thread")


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(tmp_path, number):
    handlers = [signal.getsignal(s) for s in SIGNALS]
    screen = io.StringIO()
    loader = EndlessLoader(on_batch=lambda index: index == 2 and signal.raise_signal(number))
    trainer = make_trainer(make_config(tmp_path), loader, console=Console(file=screen))
    summary = trainer.train()
    assert (summary.stopped_by, summary.signal_number, summary.steps) == ("signal", number, 3)
    assert torch.load(tmp_path / "checkpoints/model_step_3.pt")["step"] == 3
    assert "--resume auto" in screen.getvalue()
    assert [signal.getsignal(s) for s in SIGNALS] == handlers


def test_an_ignored_hangup_stops_nothing(tmp_path):
    loader = EndlessLoader(on_batch=lambda index: index == 2 and signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        summary = make_trainer(make_config(tmp_path, max_steps=4), loader).train()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (summary.stopped_by, summary.signal_number, summary.steps) == ("max_steps", None, 4)


def press_twice(index):
    if index == 1:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "REPEAT_S", -1.0)
    trainer = make_trainer(make_config(tmp_path), EndlessLoader(on_batch=press_twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_signal_that_is_passed_on_twice_at_once_saves(tmp_path):
    trainer = make_trainer(make_config(tmp_path), EndlessLoader(on_batch=press_twice))
    assert (trainer.train().stopped_by, trainer.step) == ("signal", 2)


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path[:0] = [{tests!r}, {train_tests!r}]
from test_trainer import plain_loader
from helpers.training import make_config, make_trainer
torch.set_num_threads(1)
config = make_config(Path({folder!r}), max_steps=10**6, log_interval=1)
summary = make_trainer(config, plain_loader(num_workers=1), console=None).train()
print("returned by", summary.stopped_by, summary.checkpoint)
"""


def test_ctrl_c_to_the_whole_process_group_with_loader_processes_ends_cleanly(tmp_path):
    tests, here = Path(tiny_training.__file__).parents[1], Path(__file__).parent
    script = SCRIPT.format(tests=str(tests), train_tests=str(here), folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [process.stdout.readline() for _ in range(4)]  # the header and three steps
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, "".join(lines) + rest
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert f"returned by signal {saved}" in rest
    assert "Traceback" not in rest


def test_a_run_whose_terminal_is_closed_saves(tmp_path):
    tests, here = Path(tiny_training.__file__).parents[1], Path(__file__).parent
    path = tmp_path / "program.py"
    path.write_text(SCRIPT.format(tests=str(tests), train_tests=str(here), folder=str(tmp_path)))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(path)])
    output = b""
    while output.count(b"/1000000") < 3:
        output += os.read(terminal, 1000)
    os.close(terminal)
    # The kernel has sent SIGHUP, and every write to the terminal fails.
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert torch.load(saved)["step"] >= 3


STUBBORN = """
import signal, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from torch.utils.data import DataLoader, IterableDataset
from helpers.training import EndlessLoader, make_config, make_trainer
torch.set_num_threads(1)
def ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
class Stream(IterableDataset):
    def __iter__(self):
        return iter(EndlessLoader())
class Stubborn(EndlessLoader):
    def __iter__(self):
        yield from DataLoader(
            Stream(), batch_size=None, num_workers=1, worker_init_fn=ignore_signals
        )
trainer = make_trainer(make_config(Path({folder!r}), max_steps=3), Stubborn())
if {fails}:
    trainer._log = lambda *arguments: 1 / 0
trainer.train()
"""


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_process_ends_even_if_loader_processes_ignore_sigterm(tmp_path, fails):
    tests = str(Path(tiny_training.__file__).parents[1])
    script = STUBBORN.format(tests=tests, folder=str(tmp_path), fails=fails)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert process.wait(timeout=45) == int(fails)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
