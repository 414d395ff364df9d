"""Run independent functions on a Dask cluster, or in this process.

Small neighbors among many arguments travel in one future, and few futures exist at a time. No other
module imports Dask.
"""

from __future__ import annotations

import logging
import math
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import repeat
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from shared.errors import EngineError, JobError, MachineError, SessionError, StorageError
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


class _Job(NamedTuple):
    label: str
    size: int  # of tasks and subtasks
    weights: Sequence[float] | None = None
    work_s: float = math.inf


_Tasks = Iterable[TaskWithSubtasks[Any, Any]]
_Chunk = list[tuple[int, TaskWithSubtasks[Any, Any]]]  # tasks and their indexes
_Functions = tuple[Callable[..., Any], Callable[..., Any]]  # of tasks and of subtasks
_Outcomes = Generator[tuple[int | None, Any], None, None]
"""Pairs (index, result or error) of tasks, and (None, result or error) of subtasks."""


class Cluster:
    """Runs functions on a Dask cluster that is started at the first use.

    Without the address of a `scheduler`, it is a local cluster of `num_workers` processes, or with
    0 this process alone. Work shorter than `start_s`, which a local cluster takes to start, runs in
    this process.
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
        is_small = self._num_workers == 0 or (self._client is None and work_s < self._start_s)
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
        names: Sequence[str] | None = None,
    ) -> list[ResultT]:
        """Call a function with each argument; return the results in order.

        The function crosses processes. `weights` are the estimated seconds per argument in one
        process. Errors name an argument by `names`.

        Raises:
            JobError, MachineError: the job can't continue; at once, without the other tasks.
            Exception: the first failure, after the other tasks have ended.
        """
        each = self.iterate(function, arguments, label=label, weights=weights, names=names)
        return _collect(each)

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

        A failure is an outcome, as a JobError if every worker that tried the argument died: the
        other calls go on. Calls that have not started when the caller stops iterating are dropped.

        Raises:
            JobError: there are no workers, or the scheduler is gone.
        """
        job = _Job(label, len(arguments), weights)
        tasks: _Tasks = map(TaskWithSubtasks, arguments, repeat(()), names or repeat("a task"))
        with closing(self._iterate((function, function), tasks, job)) as outcomes:
            yield from ((index, outcome) for index, outcome in outcomes if index is not None)

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
        job = _Job(label, sum(1 + len(task.subtasks) for task in tasks), work_s=work_s)
        return _collect(self._iterate((function, subtask), tasks, job))

    def _iterate(self, functions: _Functions, tasks: _Tasks, job: _Job) -> _Outcomes:
        """Run tasks here or on the cluster, and show progress."""
        if not job.size:
            return
        weights = job.weights
        work_s = job.work_s if weights is None else math.fsum(weights)
        is_terminal, status = self._console.is_terminal, _Status()
        bar = Progress(TextColumn("{task.description}"), BarColumn(), status, console=self._console)
        total = job.size if weights is None else work_s
        bar.add_task(job.label, total=total, num=0, size=job.size)
        [task] = bar.tasks
        if self.is_in_process(work_s=work_s):
            outcomes = _run_in_process(functions, tasks)
        else:
            outcomes = self._run_on_cluster(functions, tasks, weights)
        shown_s = time.monotonic()
        with bar if is_terminal else nullcontext(), closing(outcomes):
            for index, outcome in outcomes:
                yield index, outcome
                task.completed += 1.0 if index is None or weights is None else weights[index]
                task.fields["num"] += 1
                if not is_terminal and time.monotonic() > shown_s + LINE_S:
                    self.log(f"{job.label}: {status.render(task)}")
                    shown_s = time.monotonic()

    def _run_on_cluster(
        self, functions: _Functions, tasks: _Tasks, weights: Sequence[float] | None
    ) -> _Outcomes:
        """Run tasks on the cluster.

        If workers died with a chunk, its tasks run again at the end, one at a time: so the guilty
        one is found, and had all of the memory.
        """
        from distributed import CancelledError

        run = _Run(self._connect(), functions)
        try:
            yield from run.iter_outcomes(_iter_chunks(tasks, weights))
            yield from run.iter_outcomes(iter([[each] for each in run.suspects]), is_alone=True)
        except (OSError, CancelledError) as error:
            raise JobError(
                f"scheduler {self._scheduler or 'of local workers'}: it disappeared; fix: start it "
                "and its workers, and run the command again: what is finished is kept"
            ) from error
        finally:
            for future in run.running:  # cancels what has not started
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
        for attempt in range(STARTS):
            try:
                with block_interrupts(), dask.config.set(memory):
                    local = LocalCluster(
                        n_workers=self._num_workers,
                        threads_per_worker=1,  # decoders scale by processes
                        dashboard_address="127.0.0.1:0",
                        silence_logs=60,  # the job reports failures itself
                        scheduler_kwargs={"allowed_failures": 1},
                    )
            except (OSError, RuntimeError) as error:
                if attempt + 1 == STARTS:
                    cause = error.__cause__ or error
                    reason = describe_os_error(cause) if isinstance(cause, OSError) else cause
                    raise JobError(
                        f"{self._num_workers} local workers could not be started: {reason}; fix: "
                        "use fewer (--workers), or none (--workers 0)"
                    ) from error
            else:
                return self._stack.enter_context(local)
        raise AssertionError("unreachable")


class _Run:
    """The futures of a job, a few of which exist at a time."""

    def __init__(self, client: Any, functions: _Functions) -> None:  # noqa: ANN401
        from distributed import as_completed

        self.suspects: _Chunk = []
        self._client = client
        self._functions = functions
        self.running: dict[Any, _Chunk] = {}
        # A result is fetched at once: if its worker died later, Dask would repeat the task.
        self._ended = as_completed(loop=client.loop, with_results=True, raise_errors=False)

    def iter_outcomes(self, chunks: Iterator[_Chunk], *, is_alone: bool = False) -> _Outcomes:
        """Run chunks, or with `is_alone` one at a time; what is killed in company is suspect."""
        from distributed.protocol.pickle import loads

        while True:
            num_threads = sum(self._client.nthreads().values()) or 1  # workers join and leave
            limit = 1 if is_alone else FUTURES_PER_THREAD * num_threads
            while len(self.running) < limit and (chunk := next(chunks, None)):
                self._submit(chunk)
            if not self.running:
                return
            for future, result in self._ended.next_batch():
                tasks, status = self.running.pop(future), future.status
                future.release()
                if status == "cancelled":
                    raise result
                if status == "error":
                    yield from self._failures(tasks, result[1], is_alone=is_alone)
                elif tasks:
                    yield from zip((index for index, _ in tasks), map(loads, result), strict=True)
                elif not is_alone:
                    yield None, result

    def _submit(self, chunk: _Chunk) -> None:
        """Submit a chunk as one future, after those of the subtasks of its task, if it has any."""
        submit = partial(self._client.submit, pure=False)
        function, subtask = self._functions
        arguments = [task.argument for _, task in chunk]
        subtasks = [submit(_attempt, subtask, each) for each in chunk[0][1].subtasks]
        # Before subtasks of later tasks, so that few of their files exist at a time.
        priority = 1 if subtasks else 0
        future = submit(_run_chunk, function, arguments, *subtasks, priority=priority)
        self.running |= {each: [] for each in subtasks} | {future: chunk}
        self._ended.update([*subtasks, future])

    def _failures(self, tasks: _Chunk, error: Exception, *, is_alone: bool) -> _Outcomes:
        """Yield the failures of a failed future; if its worker died, only if it was alone."""
        from distributed import KilledWorker

        is_killed = isinstance(error, KilledWorker)
        if is_killed:
            self._await_local()
            if not is_alone:
                self.suspects += tasks
                return
        for index, task in tasks:
            text = (
                f"{task.name} was given up because every worker that tried it died, perhaps out of "
                "memory; fix: use fewer workers or, for shards, a smaller shard.target_bytes, and "
                "run it again: what is finished is kept"
            )
            yield index, JobError(text) if is_killed else error

    def _await_local(self) -> None:
        """Wait until local workers run again; start those that died while they started."""
        local, stop_s = self._client.cluster, time.monotonic() + RESTART_S
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


def _run_chunk(function: Callable[..., Any], arguments: list[Any], *results: Any) -> list[bytes]:  # noqa: ANN401
    """Call a function on a worker, with the results of subtasks; serialize each outcome."""
    return [_dump(_attempt(function, argument, *results)) for argument in arguments]


def _dump(outcome: Any) -> bytes:  # noqa: ANN401
    """Serialize a result or an error; of a bug, with the lines of the worker's code."""
    from distributed.protocol.pickle import dumps, loads

    if isinstance(outcome, Exception) and not isinstance(outcome, EngineError):
        outcome.add_note("".join(traceback.format_exception(outcome)))
    try:
        content: bytes = dumps(outcome)
        loads(content)
    except Exception as error:
        return _dump(TypeError(f"{outcome!r:.200} can't leave its worker: {error}"))
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


class _Status(ProgressColumn):
    """How many are done, the time since the start, and by weight, the time to the end."""

    def render(self, task: Task) -> Text:
        elapsed_s = task.elapsed or 0.0
        share = task.completed / task.total if task.total else 0.0
        eta = timedelta(seconds=round(elapsed_s / share - elapsed_s)) if share else "-:--:--"
        elapsed = timedelta(seconds=int(elapsed_s))
        return Text(f"{task.fields['num']}/{task.fields['size']} {elapsed} eta {eta}")


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Block Ctrl-C and SIGHUP in threads and processes started here: they inherit the mask.

    A terminal interrupts all processes of a job at once. The client alone answers and stops its
    workers, which would otherwise die with a traceback each.
    """
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()  # it unblocks SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
