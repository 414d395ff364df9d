"""Run independent functions on a Dask cluster, or in this process.

Small neighbors among many arguments travel in one future, and few futures exist at a time. No other
module imports Dask.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared.errors import EngineError, JobError, MachineError, SessionError, StorageError
from shared.interrupts import block_interrupts
from shared.machine import describe_os_error

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from rich.console import Console

RETRIES = 2
"""How often a worker retries a call that failed, because network file systems fail intermittently.
Dask itself moves the tasks of a worker that died."""

CHUNK_S = 0.5
"""Estimated time of the neighbors in one future (seconds); a future costs 3 ms of CPU."""

MAX_CHUNK = 256
"""The most arguments in one future."""

FUTURES_PER_THREAD = 3
"""How many futures per thread of the workers exist at a time, because they take memory."""

LINE_S = 30.0
"""How often progress is printed where the output is not a terminal (seconds)."""

START_S = 2.0
"""Seconds that a local cluster takes to start."""

MIN_WORK_S = 60.0
"""Shorter jobs get no warning about idle workers (seconds)."""

RESTART_S = 60.0
"""How long local workers that died may take to start again (seconds)."""

STARTS = 3
"""How often starting local workers is attempted."""

ArgT = TypeVar("ArgT")
SubT = TypeVar("SubT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class TaskWithSubtasks(Generic[ArgT, SubT]):
    """The argument of a task, and the arguments of the subtasks that run before it."""

    argument: ArgT
    subtasks: Sequence[SubT] = ()
    name: str = "a task"

    @property
    def num_parallel(self) -> int:
        """How many workers it can keep busy."""
        return max(1, len(self.subtasks))


_Tasks = Iterable[TaskWithSubtasks[Any, Any]]
_Chunk = list[tuple[int, TaskWithSubtasks[Any, Any]]]  # tasks and their indexes
_Functions = tuple[Callable[..., Any], Callable[..., Any]]  # of tasks and of subtasks
_Outcomes = Generator[tuple[int | None, Any], None, None]
"""Pairs (index, result or error) of tasks, and (None, result or error) of subtasks."""


class Cluster:
    """Runs functions on a Dask cluster that is started at the first use.

    Without the address of a `scheduler`, it is a local cluster of `num_workers` processes, or with
    0 this process alone. Work on which workers would save less than `start_s`, which they take to
    start, runs in this process.
    """

    def __init__(
        self, *, scheduler: str | None, num_workers: int, console: Console, start_s: float = START_S
    ) -> None:
        self._scheduler = scheduler
        self._num_workers = num_workers
        self._start_s = start_s
        self._console = console
        self._stack = ExitStack()
        self._client: Any = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def num_idle(self, num_parallel: int, *, work_s: float) -> int:
        """Count the workers of a local cluster that get no work; 0 for short work.

        `num_parallel` workers can be kept busy; `work_s` is the estimated time in one process.
        """
        is_short = self._scheduler is not None or work_s < MIN_WORK_S
        return 0 if is_short else max(0, self._num_workers - num_parallel)

    def is_in_process(self, *, work_s: float) -> bool:
        """Return whether work of this duration runs serially in this process."""
        saved_s = work_s * (1 - 1 / max(2, self._num_workers))  # one worker keeps memory apart
        is_small = self._num_workers == 0 or (self._client is None and saved_s < self._start_s)
        return self._scheduler is None and is_small

    def log(self, message: str) -> None:
        """Print one line to the terminal."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def map(
        self,
        function: Callable[[ArgT], ResultT],
        arguments: Collection[ArgT],
        *,
        label: str,
        weights: Sequence[float] | None = None,
    ) -> list[ResultT]:
        """Call a function with each argument; return the results in order.

        Raises:
            JobError, MachineError: the job can't continue; at once, without the other tasks.
            Exception: the first failure, after the other tasks have ended.
        """
        return _collect(self.iterate(function, arguments, label=label, weights=weights))

    def iterate(
        self,
        function: Callable[[ArgT], ResultT],
        arguments: Collection[ArgT],
        *,
        label: str,
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> Generator[tuple[int, ResultT | Exception], None, None]:
        """Call a function with each argument; yield index and outcome of each as it ends.

        The function crosses processes. `weights` are the estimated seconds per argument in one
        process. A failure is an outcome: a JobError, with the argument's name of `names`, if every
        worker that tried it died. Calls that have not started when the caller stops iterating are
        dropped.

        Raises:
            JobError: there are no workers, or the scheduler is gone.
        """
        tasks: _Tasks = map(TaskWithSubtasks, arguments, repeat(()), names or repeat("a task"))
        each = self._iterate((function, function), tasks, label, len(arguments), weights=weights)
        with closing(each):
            yield from ((index, outcome) for index, outcome in each if index is not None)

    def run(
        self,
        function: Callable[..., ResultT],
        tasks: Sequence[TaskWithSubtasks[ArgT, SubT]],
        *,
        subtask: Callable[[SubT], Any],
        label: str,
        work_s: float = math.inf,
    ) -> list[ResultT]:
        """Run tasks after their subtasks; return the results of the tasks in order.

        `function` gets the argument of a task and the results of its subtasks.

        Raises:
            JobError, MachineError, Exception: see :meth:`map`. A task whose subtask fails fails
                likewise and does not run.
        """
        size = sum(1 + len(task.subtasks) for task in tasks)
        return _collect(self._iterate((function, subtask), tasks, label, size, work_s=work_s))

    def _iterate(
        self,
        functions: _Functions,
        tasks: _Tasks,
        label: str,
        size: int,
        *,
        weights: Sequence[float] | None = None,
        work_s: float = math.inf,
    ) -> _Outcomes:
        """Run tasks here or on the cluster, and show how many of `size` outcomes there are."""
        if not size:
            return
        work_s = work_s if weights is None else math.fsum(weights)
        is_terminal = self._console.is_terminal
        bar = Progress(
            TextColumn("{task.description}"),
            *([BarColumn()] if is_terminal else []),
            TextColumn("{task.fields[num]}/{task.fields[size]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=math.inf,  # of the last 1000 outcomes, however long they took
        )
        task = bar.add_task(label, total=size if weights is None else work_s, num=0, size=size)
        if self.is_in_process(work_s=work_s):
            outcomes = _run_in_process(functions, tasks)
        else:
            outcomes = self._run_on_cluster(functions, tasks, weights)
        shown_s = bar.get_time()
        with bar if is_terminal else nullcontext(), closing(outcomes):
            for num, (index, outcome) in enumerate(outcomes, 1):
                yield index, outcome
                done = 1.0 if index is None or weights is None else weights[index]
                bar.update(task, advance=done, num=min(num, size))  # a subtask may run again
                if not is_terminal and bar.get_time() > shown_s + LINE_S:
                    self._console.print(bar)
                    shown_s = bar.get_time()

    def _run_on_cluster(
        self, functions: _Functions, tasks: _Tasks, weights: Sequence[float] | None
    ) -> _Outcomes:
        """Run tasks on the cluster.

        If workers died with a chunk, or its outcomes can't be sent, its tasks run again at the end,
        one at a time: so the guilty one is found, and had all of the memory.
        """
        from distributed import CancelledError

        suspects: _Chunk = []
        try:
            yield from self._run_chunks(functions, _iter_chunks(tasks, weights), suspects)
            yield from self._run_chunks(functions, ([each] for each in suspects))
        except (OSError, CancelledError) as error:
            raise JobError(
                f"scheduler {self._scheduler or 'of local workers'}: it disappeared; fix: start it "
                "and its workers, and run the command again: what is finished is kept"
            ) from error

    def _run_chunks(
        self, functions: _Functions, chunks: Iterator[_Chunk], suspects: _Chunk | None = None
    ) -> _Outcomes:
        """Run chunks; tasks of those that fail become suspects, or if alone fail."""
        from distributed import as_completed
        from distributed.protocol.pickle import loads

        client = self._connect()
        running: dict[Any, _Chunk] = {}
        # A result is fetched at once: if its worker died later, Dask would repeat the task.
        ended = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        try:
            while True:
                num_threads = sum(client.nthreads().values()) or 1  # workers join and leave
                limit = 1 if suspects is None else FUTURES_PER_THREAD * num_threads
                while len(running) < limit and (chunk := next(chunks, None)):
                    futures = _submit(client, functions, chunk)
                    running |= futures
                    ended.update([*futures])
                if not running:
                    return
                for future, result in ended.next_batch():
                    chunk, status = running.pop(future), future.status
                    future.release()
                    if status == "cancelled":
                        raise result
                    if status == "finished":
                        yield from loads(result) if chunk else [(None, result)]
                    else:
                        _await_local(client.cluster)
                        yield from _failures(chunk, result[1], suspects)
        finally:
            for future in running:  # cancels what has not started
                future.release()

    def _connect(self) -> Any:  # noqa: ANN401
        from distributed import Client

        if self._client is None:
            address: Any = self._scheduler or self._start_local()
            logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)  # errors come as such
            try:
                client = Client(address)
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise JobError(
                    f"scheduler {address}: no answer: {reason}; fix: start one by `dask scheduler` "
                    "and give its address as tcp://HOST:PORT"
                ) from error
            self._client = self._stack.enter_context(client)
            self._console.print(f"dask dashboard: {self._client.dashboard_link}", highlight=False)
        return self._client

    def _start_local(self) -> Any:  # noqa: ANN401
        """Start a local cluster; retry if a worker dies while it starts.

        Dask restarts a worker that uses more than its share of the machine's memory.
        """
        import dask
        from distributed import LocalCluster

        # A worker that holds more than Dask likes would pause for ever: only its result is in it.
        memory = {f"distributed.worker.memory.{do}": False for do in ("target", "spill", "pause")}
        failure: BaseException = RuntimeError()
        for _ in range(STARTS):
            try:
                with block_interrupts(), dask.config.set(memory):
                    local = LocalCluster(
                        n_workers=self._num_workers,
                        threads_per_worker=1,  # decoders scale by processes
                        dashboard_address="127.0.0.1:0",
                        silence_logs=60,  # the job reports failures itself
                        scheduler_kwargs={"allowed_failures": 1},
                    )
                return self._stack.enter_context(local)
            except (OSError, RuntimeError) as error:
                failure = error.__cause__ or error
        reason = describe_os_error(failure) if isinstance(failure, OSError) else failure
        raise JobError(
            f"{self._num_workers} local workers could not be started: {reason}; fix: use fewer "
            "(--workers), or none (--workers 0)"
        ) from failure


def _submit(client: Any, functions: _Functions, chunk: _Chunk) -> dict[Any, _Chunk]:  # noqa: ANN401
    """Submit the subtasks of a chunk, if it has any, and the chunk as one future after them."""
    submit, (function, subtask) = partial(client.submit, pure=False), functions
    subtasks = [submit(_attempt, subtask, each) for each in chunk[0][1].subtasks]
    arguments = [(index, task.argument) for index, task in chunk]
    # Before subtasks of later tasks, so that few of their files exist at a time.
    future = submit(_run_chunk, function, arguments, *subtasks, priority=int(bool(subtasks)))
    return {each: [] for each in subtasks} | {future: chunk}


def _failures(chunk: _Chunk, error: Exception, suspects: _Chunk | None) -> _Outcomes:
    """Suspect the tasks of a chunk that failed, or yield the failures of those that ran alone."""
    from distributed import KilledWorker

    if suspects is not None:
        suspects += chunk
        return
    for index, task in chunk:
        if isinstance(error, KilledWorker):
            error = JobError(
                f"{task.name} was given up because every worker that tried it died, perhaps out of "
                "memory; fix: use fewer workers or, for shards, a smaller shard.target_bytes, and "
                "run it again: what is finished is kept"
            )
        yield index, error


def _await_local(local: Any) -> None:  # noqa: ANN401
    """Wait until local workers run again; start those that died while they started."""
    stop_s = time.monotonic() + RESTART_S
    while local is not None and time.monotonic() < stop_s:
        processes = [getattr(each, "process", each) for each in local.workers.values()]
        is_running = [each is not None and each.status.name == "running" for each in processes]
        if sum(is_running) == len(local.worker_spec):
            return
        for name, worker in list(local.workers.items()):
            if worker.status.name in {"closed", "failed"}:
                del local.workers[name]
        local.scale(len(local.worker_spec))
        time.sleep(0.1)


def _iter_chunks(tasks: _Tasks, weights: Sequence[float] | None) -> Iterator[_Chunk]:
    """Yield neighbors of about CHUNK_S together, none of which has subtasks, or each task alone."""
    chunk: _Chunk = []
    chunk_s = 0.0
    for index, task in enumerate(tasks):
        weight_s = math.inf if weights is None else weights[index]
        if chunk and (chunk_s + weight_s > CHUNK_S or len(chunk) == MAX_CHUNK):
            yield chunk
            chunk, chunk_s = [], 0.0
        chunk.append((index, task))
        chunk_s += weight_s
    if chunk:
        yield chunk


def _run_chunk(function: Callable[..., Any], chunk: list[tuple[int, Any]], *results: Any) -> bytes:  # noqa: ANN401
    """Call a function on a worker, with the results of subtasks; return indexes and outcomes.

    Bugs get the lines of the worker's code.
    """
    from distributed.protocol.pickle import dumps, loads

    outcomes = [(index, _attempt(function, argument, *results)) for index, argument in chunk]
    for _, outcome in outcomes:
        if isinstance(outcome, Exception) and not isinstance(outcome, EngineError):
            outcome.add_note("".join(traceback.format_exception(outcome)))
    try:
        content: bytes = dumps(outcomes)
        loads(content)
    except Exception as error:
        raise TypeError(f"{outcomes[0][1]!r:.200} can't leave its worker: {error}") from None
    return content


def _attempt(function: Callable[..., Any], *arguments: Any, retries: int = RETRIES) -> Any:  # noqa: ANN401
    """Call a function; return, and do not raise, its error, after retries if they can help.

    A failed subtask among the arguments is an error. Requests to stores have been retried already.
    """
    for result in arguments[1:]:
        if isinstance(result, Exception):
            return result
    try:
        return function(*arguments)
    except (JobError, SessionError, StorageError) as error:
        return error
    except Exception as error:
        return _attempt(function, *arguments, retries=retries - 1) if retries else error


def _run_in_process(functions: _Functions, tasks: _Tasks) -> _Outcomes:
    """Run tasks here, one after the other."""
    function, subtask = functions
    for index, task in enumerate(tasks):
        results = []
        for argument in task.subtasks:
            results.append(_attempt(subtask, argument, retries=0))
            yield None, results[-1]
        yield index, _attempt(function, task.argument, *results, retries=0)


def _collect(outcomes: _Outcomes) -> list[Any]:
    """Return the results in order; see the errors at :meth:`Cluster.map`."""
    results: dict[int, Any] = {}
    failure: Exception | None = None
    with closing(outcomes):
        for index, outcome in outcomes:
            if isinstance(outcome, (JobError, MachineError)):
                raise outcome
            if isinstance(outcome, Exception):
                failure = failure or outcome
            elif index is not None:
                results[index] = outcome
    if failure is not None:
        raise failure
    return [results[index] for index in range(len(results))]
