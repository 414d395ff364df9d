"""Shards from a scheduler's address: the bytes of a local build, workers dying included."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from contextlib import closing

import dask
import distributed
import pytest
from experiments.clusters import build_over_cluster
from helpers.oracles import (
    DividingCluster,
    build,
    cluster_of,
    file_hashes,
    tiny_recipe,
    write_tiny_sessions,
)
from helpers.processes import await_true, finish, launch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from preprocess import cluster as cluster_module
from preprocess.build.job import build_shards
from preprocess.cluster import (
    CHUNK_S,
    FUTURES_PER_THREAD,
    MAX_CHUNK,
    Cluster,
    TaskWithSubtasks,
    _iter_chunks,
)
from shared.errors import JobError, SessionError, StorageError

SMALL = tiny_recipe(shard={"target_bytes": 2**16})

pytestmark = pytest.mark.filterwarnings("ignore")  # Dask's own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_killed", "task_s"), [(0, 8.0), (2, 8.0), (2, 1.0)], ids=["none", "tasks", "subtasks"]
)
def test_four_workers_of_a_scheduler_give_the_bytes_of_none(tmp_path, num_killed, task_s):
    recorded = write_tiny_sessions(tmp_path / "sessions")
    build(recorded, tmp_path / "local", SMALL)
    build_over_cluster(
        recorded,
        tmp_path / "cluster",
        SMALL,
        num_workers=4,
        num_killed=num_killed,
        task_s=task_s,
    )
    assert file_hashes(tmp_path / "cluster") == file_hashes(tmp_path / "local")


@pytest.mark.slow
def test_subtasks_are_repeated_if_a_worker_dies_with_their_results(tmp_path):
    mark = tmp_path / "died"

    def join(name: str, *results: int) -> str:
        if name == "b" and not mark.exists():
            mark.touch()
            os._exit(1)
        return f"{name}{list(results)}"

    names = ["a", "b", "c"]
    with cluster_of(2) as cluster:
        work = [TaskWithSubtasks(name, ["1", "2", "3"]) for name in names]
        results = cluster.run(join, work, subtask=int, label="join")
    assert mark.exists()
    assert results == [f"{name}[1, 2, 3]" for name in names]


def test_a_scheduler_that_is_not_there_is_named():

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "200ms"}),
        Cluster(scheduler="tcp://127.0.0.1:1", num_workers=0, console=Console(quiet=True)) as it,
        pytest.raises(JobError, match=r"scheduler tcp://127.0.0.1:1: no answer: .*dask scheduler"),
    ):
        it.map(len, ["one"], label="count")


def test_an_error_that_another_attempt_would_repeat_ends_a_job_at_once():
    tried = []

    def fail(error: Exception) -> None:
        tried.append(error)
        raise error

    with cluster_of(0) as cluster:
        with pytest.raises(JobError, match="full"):
            cluster.map(fail, [JobError("full"), JobError("later")], label="fail")
        assert len(tried) == 1
        with pytest.raises(SessionError, match="first"):
            cluster.map(fail, [SessionError("first"), SessionError("second")], label="fail")
        assert len(tried) == 3
        with pytest.raises(StorageError):
            cluster.map(fail, [StorageError("hiccup")], label="fail")


SLEEPING_JOB = """
import signal, sys, time
from pathlib import Path
from rich.console import Console
from preprocess.cluster import Cluster

def sleep(mark):
    Path(mark).touch()
    time.sleep(60)

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        with Cluster(scheduler=None, num_workers=2, console=Console(quiet=True)) as cluster:
            cluster.map(sleep, sys.argv[1:], label="sleep")
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_workers_leave_an_interrupt_of_the_terminal_to_the_client(tmp_path, number):
    script = tmp_path / "job.py"
    script.write_text(SLEEPING_JOB, encoding="utf-8")
    marks = [tmp_path / "one", tmp_path / "two"]
    job = launch([sys.executable, script, *marks], scratch=tmp_path / "scratch")
    await_true(lambda: all(mark.exists() for mark in marks))
    os.killpg(job.pid, number)  # as a terminal does: client and workers
    assert finish(job) == "stopped\n"


@pytest.fixture
def in_threads(monkeypatch):
    """Workers are threads of this process, which start at once."""

    class InThreads(distributed.LocalCluster):
        def __init__(self, **options):
            super().__init__(**{**options, "processes": False})

    monkeypatch.setattr(distributed, "LocalCluster", InThreads)


def test_an_error_of_the_job_does_not_wait_for_running_tasks(tmp_path, in_threads):
    started, ended = tmp_path / "started", tmp_path / "ended"

    def work(name: str) -> None:
        if name == "full":
            await_true(started.exists)
            raise JobError("full")
        started.touch()
        await_true(ended.exists)

    start_s = time.monotonic()
    with cluster_of(2) as cluster:
        with pytest.raises(JobError, match="full"):
            cluster.map(work, ["running", "full"], label="work")
        assert time.monotonic() - start_s < 30  # the running task would take 60 s
        ended.touch()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_task_gets_the_results_of_its_subtasks_and_fails_with_them(
    tmp_path, in_threads, num_workers
):
    def join(argument: str, *parts: int) -> str:
        (tmp_path / f"{argument}{len(parts)}").touch()
        return f"{argument}{list(parts)}"

    subtasks = {"a": ["1", "2"], "b": [], "c": ["3", "x"], "d": ["4"]}
    work = [TaskWithSubtasks(name, each) for name, each in subtasks.items()]
    with cluster_of(num_workers) as cluster:
        assert cluster.run(join, work[:2] + work[3:], subtask=int, label="join") == [
            "a[1, 2]",
            "b[]",
            "d[4]",
        ]
        with pytest.raises(SessionError, match="x is no number"):
            cluster.run(join, work, subtask=number_of, label="join")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a2", "b0", "d1"]


def number_of(text: str) -> int:
    if not text.isdigit():
        raise SessionError(f"{text} is no number")
    return int(text)


@pytest.mark.parametrize("num_deaths", [2, 3])
def test_local_workers_that_die_while_they_start_are_started_again(monkeypatch, num_deaths):
    begun = []

    class DiesAtFirst(distributed.LocalCluster):
        def __init__(self, **options):
            begun.append(options)
            if len(begun) <= num_deaths:
                raise RuntimeError("Nanny failed to start.")
            super().__init__(**{**options, "processes": False})

    monkeypatch.setattr(distributed, "LocalCluster", DiesAtFirst)
    with cluster_of(1) as cluster:
        if num_deaths < 3:
            assert cluster.map(len, ["one", "three"], label="count") == [3, 5]
        else:
            with pytest.raises(JobError, match=r"could not be started: .*--workers 0"):
                cluster.map(len, ["one"], label="count")


@pytest.mark.parametrize(
    ("num_workers", "task_s", "says"),
    [
        (
            3,
            120.0,
            "tasks: 1, idle workers: 2; a smaller --task-seconds (now 120) gives more tasks",
        ),
        (3, 2.0, ""),
    ],
)
def test_idle_workers_are_reported(tmp_path, monkeypatch, num_workers, task_s, says):
    recorded = write_tiny_sessions(tmp_path / "sessions")
    recipe = tiny_recipe(split={"val_fraction": 0})
    monkeypatch.setattr("preprocess.cluster.MIN_WORK_S", 0.0)
    text = io.StringIO()
    with DividingCluster(
        scheduler=None, num_workers=num_workers, console=Console(file=text)
    ) as cluster:
        build_shards(recorded, tmp_path / "set", recipe=recipe, cluster=cluster, task_s=task_s)
    output = " ".join(text.getvalue().split())
    assert says in output
    assert ("idle" in output) == bool(says)
    assert cluster.num_idle(1, work_s=0.0) == num_workers - 1
    monkeypatch.undo()
    assert cluster.num_idle(1, work_s=59.0) == 0


# --- many arguments -----------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 0.001, 0.2, 0.25, 0.6, 100.0]), max_size=700))
def test_chunks_are_as_large_as_they_may_be(weights):
    tasks = [TaskWithSubtasks(each) for each in weights]
    chunks = list(_iter_chunks(tasks, weights))
    assert [pair for chunk in chunks for pair in chunk] == list(enumerate(tasks))
    sums = [sum(task.argument for _, task in chunk) for chunk in chunks]
    for chunk, chunk_s in zip(chunks, sums, strict=True):
        assert len(chunk) <= MAX_CHUNK
        assert chunk_s <= CHUNK_S or len(chunk) == 1
    for chunk, chunk_s, following in zip(chunks, sums, chunks[1:], strict=False):
        assert len(chunk) == MAX_CHUNK or chunk_s + following[0][1].argument > CHUNK_S
    assert [len(chunk) for chunk in _iter_chunks(tasks, None)] == [1] * len(tasks)


def test_few_futures_exist_at_a_time_and_each_has_many_arguments(in_threads, monkeypatch):
    submitted = []
    submit = distributed.Client.submit

    def count(client, *arguments, **options):
        submitted.append(arguments)
        return submit(client, *arguments, **options)

    monkeypatch.setattr(distributed.Client, "submit", count)
    outcomes, num_tasks = {}, []
    with cluster_of(2) as cluster:
        for index, outcome in cluster.iterate(
            str, range(2048), label="write", weights=[CHUNK_S / 64] * 2048
        ):
            outcomes[index] = outcome
            num_tasks.append(len(cluster._client.cluster.scheduler.tasks))
        assert len(submitted) == 2048 / 64
        assert max(num_tasks) <= 2 * 2 * FUTURES_PER_THREAD  # released ones leave with a delay
        assert outcomes == {number: str(number) for number in range(2048)}
        assert cluster.map(str, range(99), label="write", weights=[0.0] * 99) == [
            str(number) for number in range(99)
        ]
        assert len(submitted) == 2048 / 64 + 1


def test_what_has_not_started_is_dropped_with_the_generator(tmp_path, in_threads):
    def mark(name: str) -> None:
        (tmp_path / name).touch()

    names = [str(number) for number in range(100)]
    with cluster_of(1) as cluster:
        with closing(cluster.iterate(mark, names, label="mark")) as outcomes:
            next(outcomes)
        scheduler = cluster._client.cluster.scheduler
        await_true(lambda: not scheduler.tasks)
        assert len(list(tmp_path.iterdir())) <= 2 * FUTURES_PER_THREAD


class PickyError(Exception):
    """Can't be read where it arrives."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def test_an_outcome_that_cannot_be_sent_fails_alone(in_threads):
    def work(name: str) -> object:
        if name == "picky":
            raise PickyError(name, "!")
        return threading.Lock() if name == "lock" else name

    names = ["a", "lock", "b", "picky", "c"]
    with cluster_of(1) as cluster:
        outcomes = dict(cluster.iterate(work, names, label="work", weights=[0.0] * 5))
    assert [outcomes[index] for index in (0, 2, 4)] == ["a", "b", "c"]
    assert "lock" in str(outcomes[1])
    assert "picky!" in str(outcomes[3])
    assert {type(outcomes[index]) for index in (1, 3)} == {TypeError}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failure_is_an_outcome_with_the_lines_of_its_worker(num_workers, in_threads):
    with cluster_of(num_workers) as cluster:
        outcomes = dict(cluster.iterate(int, ["1", "x", "2"], label="read"))
    assert (outcomes[0], outcomes[2]) == (1, 2)
    assert isinstance(outcomes[1], ValueError)
    notes = "".join(getattr(outcomes[1], "__notes__", ()))
    assert ("return function(*arguments)" in notes) == bool(num_workers)


@pytest.mark.slow
def test_only_the_argument_that_kills_its_workers_fails_and_has_its_name(tmp_path):
    mark = tmp_path / "died"

    def work(name: str) -> str:
        if name == "worst" or (name == "unlucky" and not mark.exists()):
            mark.touch()
            os._exit(1)
        return name

    names = [f"session_{number}" for number in range(50)]
    names[17], names[30] = "worst", "unlucky"
    weights = [CHUNK_S / 100] * 50
    with cluster_of(1) as cluster:
        outcomes = dict(cluster.iterate(work, names, label="work", weights=weights))
        failed = outcomes.pop(17)
        assert isinstance(failed, JobError)
        assert "every worker that tried it died" in str(failed)
        assert outcomes == {index: name for index, name in enumerate(names) if index != 17}
        with pytest.raises(JobError, match="worst was given up because every worker"):
            raise dict(cluster.iterate(work, ["a", "worst"], label="work", names=["a", "worst"]))[1]


def test_a_scheduler_that_disappears_ends_the_job_with_a_fix(in_threads):
    remote = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, protocol="tcp", dashboard_address="127.0.0.1:0"
    )
    done = []

    def run(cluster: Cluster) -> None:
        for index, _ in cluster.iterate(time.sleep, [0.01] * 100, label="sleep"):
            done.append(index)
            if len(done) == 3:
                remote.close()

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "200ms"}),
        remote,
        Cluster(
            scheduler=remote.scheduler_address, num_workers=0, console=Console(quiet=True)
        ) as cluster,
        pytest.raises(JobError, match=r"scheduler tcp://.*disappeared.*fix: start it"),
    ):
        run(cluster)
    assert len(done) >= 3


def test_local_workers_do_not_pause_because_of_memory_that_a_task_left(in_threads):
    with cluster_of(1) as cluster:
        cluster.map(len, ["one"], label="count")
        [worker] = cluster._client.cluster.workers.values()
    assert worker.memory_manager.memory_pause_fraction is False


# --- progress -----------------------------------------------------------------------------------


def count_with_a_clock(line_s: float, monkeypatch) -> list[str]:
    """Count 4 words, of 1, 1, 2 and 6 s by estimate and twice as long by the clock."""
    monkeypatch.setattr(cluster_module, "LINE_S", line_s)
    now_s, text, words = [0.0], io.StringIO(), {"a": 1.0, "b": 1.0, "cc": 2.0, "six": 6.0}

    def count(word: str) -> int:
        now_s[0] += 2 * words[word]
        return len(word)

    console = Console(file=text, get_time=lambda: now_s[0])
    with Cluster(scheduler=None, num_workers=0, console=console) as cluster:
        cluster.map(count, words, label="count", weights=[*words.values()])
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def test_where_there_is_no_terminal_progress_is_a_line_now_and_then(monkeypatch):
    assert count_with_a_clock(-1.0, monkeypatch) == [
        "count 1/4 0:00:02 eta -:--:--",
        "count 2/4 0:00:04 eta 0:00:16",
        "count 3/4 0:00:08 eta 0:00:12",
        "count 4/4 0:00:20 eta 0:00:00",
    ]
    assert count_with_a_clock(7.0, monkeypatch) == [
        "count 3/4 0:00:08 eta 0:00:12",
        "count 4/4 0:00:20 eta 0:00:00",
    ]
    assert count_with_a_clock(30.0, monkeypatch) == []
