"""Killed runs resume to the same bits; `tests/experiments/training_kills.py` tries many kills."""

from __future__ import annotations

import pytest
import torch
from experiments.training_kills import differences, run_trials


@pytest.mark.slow
def test_a_training_killed_while_saving_ends_with_the_bits_of_the_undisturbed_one(tmp_path):
    (trial,) = run_trials(tmp_path, 1, seed=2)
    assert "while saving" in trial.moment
    assert not trial.problems


def test_any_bit_that_differs_is_found():
    state = {"a": [torch.zeros(3), {"b": 1}], "c": torch.tensor(2.0)}
    assert differences(state, {"a": [torch.zeros(3), {"b": 1}], "c": torch.tensor(2.0)}) == []
    negative = torch.tensor([0.0, -0.0, 0.0])
    assert differences(state, {**state, "a": [negative, {"b": 1}]}) == ["/a/0"]
    assert differences(state, {**state, "a": [torch.zeros(3), {"b": 2}]}) == ["/a/1/b"]
    assert differences(state, {**state, "a": [torch.zeros(3)]}) == ["/a"]
    assert differences(state, {**state, "c": torch.tensor(2.0, dtype=torch.float64)}) == ["/c"]
    assert differences(state, {"a": state["a"]}) == [""]
