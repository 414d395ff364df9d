from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import ConfigError, EngineError
from train.machine import runtime


def test_cuda_without_a_gpu_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r'sees no CUDA GPU; fix: use device="auto" or "cpu"'):
        runtime.choose_device("cuda")


@pytest.mark.parametrize(("name", "current"), [("cuda", []), ("cuda:1", [torch.device("cuda:1")])])
def test_the_named_gpu_becomes_the_current_one(monkeypatch, name, current):
    """Events and pinned memory belong to the current GPU, wherever tensors are."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert runtime.choose_device(name) == torch.device(name)
    assert chosen == current


def test_an_unknown_device_is_a_clear_error():
    with pytest.raises(ConfigError, match="'gpu' is unknown"):
        runtime.choose_device("gpu")


@pytest.mark.parametrize("name", ["mps", "meta", "xpu:0"])
def test_an_unsupported_device_is_a_clear_error(name):
    with pytest.raises(ConfigError, match=f"'{name}' is not supported; fix: use \"auto\""):
        runtime.choose_device(name)


def test_out_of_memory_is_explained():
    with (
        pytest.raises(EngineError, match=r"Reduce data.batch_size"),
        runtime.translate_oom(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(("num_before", "num_after"), [(1, 4), (4, 1), (2, 2)])
def test_a_loss_scale_is_restored_for_any_number_of_ranks(num_before, num_after):
    """Loss times ranks times scale is the same for any number of ranks."""

    def scaled(scaler, num_ranks):
        return float(scaler.scale(torch.tensor(3.0) * num_ranks))

    before, after = (
        runtime.make_scaler(torch.device("cpu"), torch.float16, num_ranks=n)
        for n in (num_before, num_after)
    )
    assert scaled(before, num_before) == scaled(after, num_after) == 3 * 65536
    before.update(before.get_scale() / 8)
    runtime.set_scaler_state(
        after, runtime.scaler_state(before, num_ranks=num_before), num_ranks=num_after
    )
    assert scaled(after, num_after) == 3 * 8192


def test_without_loss_scaling_no_state_is_saved_or_needed():
    plain, half = (
        runtime.make_scaler(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.float16)
    )
    assert runtime.scaler_state(plain, num_ranks=2) == {}
    runtime.set_scaler_state(half, {}, num_ranks=2)
    runtime.set_scaler_state(plain, runtime.scaler_state(half, num_ranks=2), num_ranks=2)
    assert float(plain.scale(torch.tensor(3.0))) == 3.0
    assert float(half.scale(torch.tensor(3.0))) == 3 * 65536


def test_out_of_memory_on_the_host_is_explained_and_other_errors_are_not():
    with (
        pytest.raises(EngineError, match=r"the host ran out of memory.*\nReduce data.batch_size"),
        runtime.translate_oom(),
    ):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="shapes"), runtime.translate_oom():
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_all_random_states_are_restored():
    runtime.seed_everything(5)
    state = runtime.rng_state()
    expected = [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()]
    runtime.set_rng_state(state)
    assert [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()] == expected


def test_a_separate_rng_leaves_the_random_state_unchanged():
    runtime.seed_everything(5)
    expected = torch.rand(3)
    runtime.seed_everything(5)
    with runtime.separate_rng(7):
        torch.rand(10)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages"
)
@pytest.mark.parametrize(
    ("setting", "is_huge"), [(None, True), pytest.param("0", False, marks=pytest.mark.slow)]
)
def test_large_tensors_use_large_pages_unless_the_user_disables_them(setting, is_huge):
    program = (
        "import train, torch; x = torch.ones(32 << 20); place = x.data_ptr()\n"
        "for line in open('/proc/self/smaps'):\n"
        "    if '-' in line.split()[0]:\n"
        "        start, end = (int(n, 16) for n in line.split()[0].split('-'))\n"
        "    if line.startswith('VmFlags') and start <= place < end: print('hg' in line.split())"
    )
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    env |= {} if setting is None else {"THP_MEM_ALLOC_ENABLE": setting}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(is_huge)]
