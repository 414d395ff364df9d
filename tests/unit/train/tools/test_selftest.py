"""``train selftest``: it passes on a correct resume and fails on broken ones."""

from __future__ import annotations

import itertools
import sys

import pytest
import yaml
from click.testing import CliRunner
from helpers.sets import make_config

from shared.errors import ConfigError
from train.__main__ import cli
from train.tools.selftest import MIN_STEPS, RankProcesses, compare, plan_launches, run_selftest

BROKEN = """
import sys
import train.tools.selftest as ranks

class Late(ranks.RecordedLoader):
    '''Its resume is off by one.'''

    def load_state_dict(self, state):
        later = int({is_broken} and state["next_batch"] != 0)
        super().load_state_dict({{**state, "next_batch": state["next_batch"] + later}})

ranks.RecordedLoader = Late
ranks.main(sys.argv[1:])
"""

LOSES_MOMENTS = """
import sys
import train.tools.selftest as ranks

class LosesMoments(ranks.Trainer):
    '''Its resume leaves out the optimizer's moments.'''

    def load_checkpoint(self, path):
        super().load_checkpoint(path)
        self._state.optimizer.state.clear()

ranks.Trainer = LosesMoments
ranks.main(sys.argv[1:])
"""


def run(shards, script, tmp_path, *, num_kills, num_steps):
    """The self test with ranks that run a script."""
    path = tmp_path / "rank.py"
    path.write_text(script)
    lines = []
    is_same = run_selftest(
        make_config(shards, batch_size=2),
        num_kills=num_kills,
        num_steps=num_steps,
        program=(sys.executable, str(path)),
        log=lines.append,
    )
    return is_same, "\n".join(lines)


def test_a_resume_that_is_off_by_one_fails(tiny_set, tmp_path):
    script = BROKEN.format(is_broken=True)
    is_same, text = run(tiny_set, script, tmp_path, num_kills=1, num_steps=2 * MIN_STEPS)
    assert not is_same
    assert "; expected" in text
    assert text.endswith("FAIL: see above")


@pytest.mark.slow
def test_the_same_ranks_pass_when_nothing_is_broken(tiny_set, tmp_path):
    script = BROKEN.format(is_broken=False)
    is_same, text = run(tiny_set, script, tmp_path, num_kills=2, num_steps=20)
    assert is_same, text
    assert text.count(": same") == 4  # three launches and the weights
    assert text.endswith("PASS: the killed run equals the undisturbed one")


@pytest.mark.slow
def test_a_resume_that_loses_the_moments_fails(tiny_set, tmp_path):
    is_same, text = run(tiny_set, LOSES_MOMENTS, tmp_path, num_kills=2, num_steps=20)
    assert not is_same
    assert "is not rounding" in text


@pytest.mark.slow
def test_the_command_prints_pass_and_exits_with_0(tiny_set, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(make_config(tiny_set, batch_size=4).model_dump(mode="json")))
    arguments = ["selftest", "--config", str(path), "--kills", "1", "--steps", "8"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "PASS" in result.output


def test_the_command_reports_missing_data(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{shards: {tmp_path}/none}}")
    result = CliRunner().invoke(cli, ["selftest", "--config", str(path)])
    assert result.exit_code == 2
    assert "data.shards" in result.output


def test_the_command_exits_with_1_if_the_runs_differ(tiny_set, tmp_path, monkeypatch):
    monkeypatch.setattr("train.tools.selftest.run_selftest", lambda *values, **named: False)
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{shards: {tiny_set}}}")
    assert CliRunner().invoke(cli, ["selftest", "--config", str(path)]).exit_code == 1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("batch_size", "batches_per_step"), [(8, 1), (3, 2), (1, 4)])
def test_every_launch_differs_from_the_previous_one_and_writes_a_checkpoint(
    seed, batch_size, batches_per_step
):
    launches = plan_launches(
        num_kills=3,
        num_steps=30,
        batches_per_step=batches_per_step,
        batch_size=batch_size,
        seed=seed,
    )
    assert len(launches) == 4
    assert launches[-1].kill_after is None
    kills = [launch.kill_after for launch in launches[:-1]]
    for before, after in itertools.pairwise([0, *kills]):
        assert after - before > (MIN_STEPS - 2) * batches_per_step
    assert kills[-1] <= 30 * batches_per_step - MIN_STEPS * batches_per_step
    for one, other in itertools.pairwise(launches):
        assert one.num_workers != other.num_workers
        assert one.world_size != other.world_size or batch_size == 1
    assert all(batch_size % launch.world_size == 0 for launch in launches)


def test_too_few_steps_for_the_kills_are_refused():
    with pytest.raises(ConfigError, match=f"set --steps {3 * MIN_STEPS}"):
        plan_launches(num_kills=2, num_steps=5, batches_per_step=1, batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("batches", "first", "problem"),
    [
        ([["b"], ["c"]], 1, None),
        ([["c"]], 1, "batch 1, sample 0 is"),
        ([["c"], ["d"]], 2, "batch 3 is one too many"),
        ([[]], 1, "batch 1, sample 0 is"),
    ],
)
def test_the_first_difference_is_reported(batches, first, problem):
    def as_samples(names):
        return [[(key, 0, True) for key in batch] for batch in names]

    difference = compare(as_samples(batches), as_samples([["a"], ["b"], ["c"]]), first=first)
    assert difference is None if problem is None else difference.startswith(problem)


def test_no_rank_outlives_the_context(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with RankProcesses(command, 2, tmp_path) as ranks:
        processes = ranks._processes
    assert [process.poll() for process in processes] == [-9, -9]


def test_a_rank_that_ends_by_itself_is_reported_with_its_output(tmp_path):
    with RankProcesses([sys.executable, "-c", "exit('no data')"], 2, tmp_path) as ranks:
        assert "no data" in ranks.wait_until(lambda: False)
    with RankProcesses([sys.executable, "-c", "exit('no data')"], 1, tmp_path) as ranks:
        assert "exit codes [1]: no data" in ranks.wait_for_success()
