"""The pool with killed workers, a killed trainer, and other ways to start processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import sets as tiny_sets
from helpers import training as tiny_training
from helpers.sets import make_loader
from helpers.training import EndlessLoader, make_trainer

from shared.errors import EngineError
from shared.shardset.columns import ColumnFile


def test_a_killed_worker_is_a_clear_error(tiny_set, monkeypatch):
    loader = make_loader(tiny_set, num_workers=2, num_epochs=1)
    monkeypatch.setattr(ColumnFile, "read_rows", lambda *_, **__: time.sleep(60))

    def kill_one():
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(workers[-1].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    began_s = time.monotonic()
    with pytest.raises(
        EngineError, match=r"a loader process was lost: .*pid.* lower data\.num_workers"
    ):
        next(iter(loader))
    killer.join()
    assert time.monotonic() - began_s < 20
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_within_a_step_ends_the_run_with_the_same_error(tmp_path):
    def fail(index):  # torch's handler of SIGCHLD raises wherever the trainer is
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    trainer = make_trainer(tiny_training.make_config(tmp_path), EndlessLoader(on_batch=fail))
    with pytest.raises(EngineError, match=r"a loader process was lost: .*pid 7\) is killed"):
        trainer.train()


SCRIPT = """
import itertools, multiprocessing, sys
from helpers.sets import HEADS, TEXT_HEADS, make_config
from train.data.loader import Loader
from train.data.shard_source import ShardSource

def main():
    multiprocessing.set_start_method(sys.argv[2])
    config = make_config(num_workers=2, heads=TEXT_HEADS if sys.argv[3] == "text" else HEADS)
    batches = iter(Loader(ShardSource(sys.argv[1]), config))
    held = list(itertools.islice(batches, 12))
    print(*(c.pid for c in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    print(*(batch["inputs"]["internal_text"].sum().item() for batch in held))

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def trainer(tiny_set, tmp_path):
    """Start a process that holds batches of two workers, with a folder of its own for its files."""
    started = []

    def start(method="fork", what="all"):
        script, scratch = tmp_path / "trainer.py", tmp_path / "scratch"
        script.write_text(SCRIPT, encoding="utf-8")
        scratch.mkdir()
        roots = (Path(tiny_sets.__file__).parents[1], Path(__file__).parents[4])
        env = {**os.environ, "PYTHONPATH": ":".join(map(str, roots)), "TMPDIR": str(scratch)}
        started.append(
            subprocess.Popen(
                [sys.executable, str(script), str(tiny_set), method, what],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
        )
        return started[-1], scratch

    yield start
    for process in started:
        with process:
            process.kill()


def wait_until(is_so, *, timeout_s=20):
    stop_s = time.monotonic() + timeout_s
    while not is_so() and time.monotonic() < stop_s:
        time.sleep(0.05)
    assert is_so()


@pytest.mark.parametrize("what", ["all", pytest.param("text", marks=pytest.mark.slow)])
def test_a_killed_trainer_leaves_no_process_and_no_file(trainer, what):
    shm = set(os.listdir("/dev/shm"))  # noqa: PTH208
    process, scratch = trainer(what=what)
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    wait_until(lambda: not any(w.is_running() for w in workers))
    assert list(scratch.rglob("*")) == []
    assert not {n for n in set(os.listdir("/dev/shm")) - shm if "torch" in n or "batches" in n}  # noqa: PTH208


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_are_not_forked_give_the_same_batches(tiny_set, trainer, method):
    process, _ = trainer(method)
    out, err = process.communicate("go on\n")
    expected = itertools.islice(make_loader(tiny_set), 12)
    sums = [str(batch["inputs"]["internal_text"].sum().item()) for batch in expected]
    assert (out.split("\n")[1].split(), err, process.returncode) == (sums, "", 0)
