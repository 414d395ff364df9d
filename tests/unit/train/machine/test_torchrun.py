"""Runs under torchrun: ranks that die, restarts, signals to all."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from helpers.processes import finish
from helpers.rank_program import start_ranks, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def long_run(tiny_set, tmp_path):
    """Return a configuration file of many short steps, and the folder of its checkpoints."""

    def make(name, **options):
        folder = tmp_path / name
        config = tiny_config(str(tiny_set), str(folder), log_interval=50, **options)
        folder.mkdir()
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return path, folder / "checkpoints"

    return make


def wait_for(path, processes=(), *, timeout_s=120):
    """Wait until a file exists; fail if a process ends before."""
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        ended = [p for p in processes if p.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        assert time.monotonic() < deadline_s, f"{path} does not come"
        time.sleep(0.01)


def start_torchrun(config, *options):
    """Start a run on two ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train = ["-m", "train", "run", "--resume", "auto", "--config", str(config)]
    return subprocess.Popen(
        [sys.executable, *torchrun, *options, *train],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rank_of(process):
    try:
        return process.environ().get("RANK")
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return None


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_restarts_after_a_death_and_resumes_from_the_last_checkpoint(long_run, parallel):
    options = {"parallel": parallel, "max_steps": 300, "save_interval": 25}
    undisturbed, expected = long_run("undisturbed", **options)
    disturbed, folder = long_run("disturbed", **options)
    finish(start_torchrun(undisturbed))
    job = start_torchrun(disturbed, "--max-restarts=1")
    wait_for(folder / "model_step_50.pt", [job])
    (victim,) = [p for p in psutil.Process(job.pid).children() if rank_of(p) == "1"]
    victim.kill()
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert "resuming at step" in output
    one, two = (torch.load(f / "model_final.pt")["model"] for f in (folder, expected))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_when_a_rank_dies_the_others_end_with_a_clear_error(long_run):
    path, folder = long_run("run", max_steps=100_000, save_interval=20)
    ranks = start_ranks(["-m", "train", "run", "--config", str(path)], 2)
    wait_for(folder / "model_step_20.pt", ranks)
    ranks[1].kill()
    output, _ = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 1
    assert "another rank ended early" in output
    assert "--resume auto" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGHUP, 1)]
)
def test_a_signal_to_all_ranks_leaves_one_checkpoint_and_its_exit_code(long_run, number, times):
    path, folder = long_run("run", max_steps=100_000, save_interval=20)
    ranks = start_ranks(["-m", "train", "run", "--config", str(path)], 2)
    wait_for(folder / "model_step_20.pt", ranks)
    for _ in range(times):  # a scheduler and torchrun may both send it
        for process in ranks:
            process.send_signal(number)
    outputs = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [128 + number] * 2, "\n".join(outputs)
    assert outputs[0].count("stopped at step") == 1
    assert "stopped at step" not in outputs[1]
    newest = max(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    step = torch.load(newest)["step"]
    assert f"stopped at step {step}" in outputs[0]
    assert not list(folder.glob(".*.partial"))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_torchrun_resumes_them(long_run):
    path, folder = long_run("run", max_steps=300, save_interval=20)
    job = start_torchrun(path, "--max-restarts=1")
    wait_for(folder / "model_step_20.pt", [job])
    (one,) = [p for p in psutil.Process(job.pid).children() if rank_of(p) == "1"]
    one.terminate()
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert "stopped at step" in output
    assert "resuming at step" in output
    assert torch.load(folder / "model_final.pt")["step"] == 300


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_torchrun_saves_and_is_no_success(long_run, number):
    path, folder = long_run("run", max_steps=100_000, save_interval=20)
    job = start_torchrun(path)
    wait_for(folder / "model_step_20.pt", [job])
    job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    newest = max(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert f"stopped at step {torch.load(newest)['step']}" in output
