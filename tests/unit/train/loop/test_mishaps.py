"""Faults of long runs; `python tests/experiments/mishaps.py` prints the outcome of each."""

from __future__ import annotations

import pytest
from experiments.mishaps import MISHAPS, NoSmallDiskError, Run
from experiments.training_kills import final_state, prepare, start
from helpers.processes import finish


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Run an undisturbed training; return its configuration and final state."""
    root = tmp_path_factory.mktemp("mishaps")
    config = prepare(root)
    finish(start(config, root / "undisturbed"))
    return config, final_state(root / "undisturbed")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MISHAPS)
def test_a_training_survives(undisturbed, tmp_path, name):
    config, wanted = undisturbed
    try:
        outcome = MISHAPS[name](Run(config, tmp_path / "run", wanted))
    except NoSmallDiskError as error:
        pytest.skip(f"a small disk needs root here: {error}")
    assert outcome.is_good, outcome.description
