from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import ConfigError, CreatureError
from train.machine import runtime


def test_cuda_without_a_gpu_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r'sees no CUDA GPU here; use device="auto" or "cpu"'):
        runtime.choose_device("cuda")


def test_an_unknown_device_is_a_clear_error():
    with pytest.raises(ConfigError, match="'gpu' is unknown"):
        runtime.choose_device("gpu")


def test_out_of_memory_is_explained():
    with (
        pytest.raises(CreatureError, match=r"Reduce data.batch_size"),
        runtime.explained_out_of_memory(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_random_states_come_back_whole():
    runtime.seed_everything(5)
    state = runtime.rng_state()
    expected = [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()]
    runtime.set_rng_state(state)
    assert [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()] == expected


def test_what_is_drawn_apart_leaves_the_random_state_alone():
    runtime.seed_everything(5)
    expected = torch.rand(3)
    runtime.seed_everything(5)
    with runtime.separate_rng(7):
        torch.rand(10)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages"
)
@pytest.mark.parametrize(("setting", "is_huge"), [(None, True), ("0", False)])
def test_large_tensors_ask_for_large_pages_unless_the_user_says_no(setting, is_huge):
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
