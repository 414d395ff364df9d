"""Ways to train that must not change what is learned."""

from __future__ import annotations

import pytest
import torch
from experiments.numerics import PLAIN, WAYS, deviation, find_compiler, train


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(PLAIN, tmp_path_factory.mktemp("plain"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", [name for name in WAYS if name != "compile"])
def test_every_way_to_train_gives_the_curve_of_float32(plain, tmp_path, way):
    assert deviation(train(WAYS[way], tmp_path), plain) <= WAYS[way].tolerance


@pytest.mark.parametrize("way", ["bf16", "fp16"])
def test_a_curve_in_half_precision_is_not_that_of_float32_itself(plain, tmp_path, way):
    assert deviation(train(WAYS[way], tmp_path), plain) > 1e-6


def test_the_curve_falls(plain):
    assert plain[-1] < 0.9 * plain[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own compiler
@pytest.mark.skipif(find_compiler() is None, reason="torch.compile needs a C++ compiler: none here")
def test_a_compiled_model_gives_the_curve_of_float32(plain, tmp_path):
    assert deviation(train(WAYS["compile"], tmp_path), plain) <= WAYS["compile"].tolerance
