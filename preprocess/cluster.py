"""Run independent functions on a Dask cluster, or in this process.

::

    arguments -> chunks of small neighbors -> a few futures per worker -> outcome of each argument

No other module imports Dask.
"""

from __future__ import annotations

import logging
import math
import signal
import time
import traceback
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from shared.errors import EngineError, JobError, MachineError, SessionError, StorageError
from shared.machine import describe_os_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console

RETRIES = 2
"""How often a worker retries a call that failed, because network file systems fail intermittently.
Dask itself moves the tasks of a worker that died."""

CHUNK_S = 0.5
"""Estimated time of the neighbors that travel in one future (seconds). A future costs the client
and the scheduler about a millisecond."""

MAX_CHUNK = 256
"""The most arguments in one future."""

FUTURES_PER_THREAD = 3
"""How many futures per thread of the workers are submitted at a time, so that the memory of the
client and the scheduler does not grow with the number of arguments."""

BAR_S, LINE_S = 0.1, 30.0
"""How often progress is shown on a terminal, and elsewhere (seconds)."""

START_S = 2.0
"""Seconds that a local cluster takes to start."""

MIN_WORK_S = 60.0
"""Shorter jobs get no warning about idle workers (seconds)."""

RESTART_S = 10.0
"""How long a local worker that died may take to start again (seconds)."""

STARTS = 3
"""How often starting local workers is attempted."""

ArgT = TypeVar("ArgT")
SubT = TypeVar("SubT")
ResultT = TypeVar("ResultT")
ItemT_co = TypeVar("ItemT_co", covariant=True)


class SizedIterable(Protocol[ItemT_co]):
    """An iterable with a length, such as a list."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[ItemT_co]: ...


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


_Numbered = tuple[int, TaskWithSubtasks[Any, Any]]
"""The index of a task, and the task."""

_Outcomes = Generator[tuple[int | None, Any], None, None]
"""Pairs (index, result or error) of each task, and (None, result or error) of each subtask."""


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
        _print(self._console, message)

    def map(
        self,
        function: Callable[[ArgT], ResultT],
        arguments: SizedIterable[ArgT],
        *,
        label: str,
        weights: Sequence[float] | None = None,
        work_s: float = math.inf,
        names: Sequence[str] | None = None,
    ) -> list[ResultT]:
        """Call a function with each argument; return the results in order.

        The function crosses processes. `weights` are the estimated seconds per argument in one
        process: neighbors of about CHUNK_S together travel in one future. `work_s` replaces their
        sum. Errors name an argument by `names`.

        Raises:
            JobError, MachineError: the job can't continue; at once, without the other tasks.
            Exception: the first failure, after the other tasks have ended.
        """
        tasks = _iter_tasks(arguments, names)
        bar = _Progress(self._console, label, num=len(arguments), weights=weights)
        return _collect(self._iterate(function, function, tasks, bar=bar, work_s=work_s))

    def iterate(
        self,
        function: Callable[[ArgT], ResultT],
        arguments: SizedIterable[ArgT],
        *,
        label: str,
        weights: Sequence[float] | None = None,
        work_s: float = math.inf,
    ) -> Iterator[tuple[int, ResultT | Exception]]:
        """Call a function with each argument; yield index and outcome of each as it ends.

        A failure is an outcome: the other calls go on. That every worker died which tried an
        argument is a JobError. Estimates are as in :meth:`map`. Calls that have not started when
        the caller stops iterating are dropped.

        Raises:
            JobError: there are no workers, or the scheduler is gone.
        """
        bar = _Progress(self._console, label, num=len(arguments), weights=weights)
        outcomes = self._iterate(function, function, _iter_tasks(arguments), bar=bar, work_s=work_s)
        with closing(outcomes):
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
        num = sum(1 + len(task.subtasks) for task in tasks)
        bar = _Progress(self._console, label, num=num)
        return _collect(self._iterate(function, subtask, tasks, bar=bar, work_s=work_s))

    def _iterate(
        self,
        function: Callable[..., Any],
        subtask: Callable[..., Any],
        tasks: Iterable[TaskWithSubtasks[Any, Any]],
        *,
        bar: _Progress,
        work_s: float,
    ) -> _Outcomes:
        """Run tasks here or on the cluster."""
        if bar.num == 0:
            return
        if bar.weights is not None:
            work_s = min(work_s, sum(bar.weights))
        with bar:
            if self.is_in_process(work_s=work_s):
                outcomes = _run_in_process(function, subtask, tasks)
            else:
                outcomes = self._run_on_cluster(function, subtask, tasks, bar.weights)
            with closing(outcomes):
                for index, outcome in outcomes:
                    yield index, outcome
                    bar.advance(index)

    def _run_on_cluster(
        self,
        function: Callable[..., Any],
        subtask: Callable[..., Any],
        tasks: Iterable[TaskWithSubtasks[Any, Any]],
        weights: Sequence[float] | None,
    ) -> _Outcomes:
        """Run tasks on the cluster. A task is a future that depends on its subtasks' futures.

        If workers died with a chunk, its tasks run again at the end, one at a time: so the cause
        is found, and has all of the memory.
        """
        run = _Run(self._connect(), function, subtask)
        try:
            chunk_s = CHUNK_S
            if weights is not None:  # fill all workers with little work, too
                chunk_s = min(CHUNK_S, sum(weights) / (FUTURES_PER_THREAD * run.num_threads()))
            yield from run.iter_outcomes(_iter_chunks(tasks, weights, chunk_s))
            yield from run.iter_outcomes(iter([[each] for each in run.suspects]), is_alone=True)
        finally:
            run.release()

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


_LOST = (
    "the Dask scheduler disappeared or dropped the job; fix: start it and its workers again, then "
    "run the command again: what is finished is kept"
)


class _Run:
    """The futures of one :meth:`Cluster.run`, a few of which exist at a time."""

    def __init__(
        self,
        client: Any,  # noqa: ANN401
        function: Callable[..., Any],
        subtask: Callable[..., Any],
    ) -> None:
        from distributed import as_completed

        self.suspects: list[_Numbered] = []
        self._client = client
        self._function = function
        self._subtask = subtask
        self._running: dict[Any, list[_Numbered]] = {}
        # A result is fetched at once: if its worker died later, Dask would repeat the task.
        self._ended = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        self._num_threads = 1
        self._counted_s = -math.inf

    def num_threads(self) -> int:
        """Count the threads of the workers, at least 1; workers may join and leave."""
        if time.monotonic() > self._counted_s + 2.0:
            try:
                self._num_threads = max(1, sum(self._client.nthreads().values()))
            except OSError as error:
                raise JobError(_LOST) from error
            self._counted_s = time.monotonic()
        return self._num_threads

    def iter_outcomes(
        self, chunks: Iterator[list[_Numbered]], *, is_alone: bool = False
    ) -> _Outcomes:
        """Run chunks, or with `is_alone` one at a time.

        If workers died with a chunk, its tasks become suspects; if it was alone, its task fails.
        """
        while True:
            limit = 1 if is_alone else FUTURES_PER_THREAD * self.num_threads()
            while len(self._running) < limit and (chunk := next(chunks, None)):
                self._submit(chunk, is_alone=is_alone)
            if not self._running:
                return
            for future, result in self._ended.next_batch():
                tasks = self._running.pop(future)
                status = future.status
                future.release()
                if status == "cancelled":
                    raise JobError(_LOST) from result
                if status == "error":
                    yield from self._failed(tasks, result[1], is_alone=is_alone)
                elif tasks:
                    yield from zip((index for index, _ in tasks), map(_unpack, result), strict=True)
                else:
                    yield None, result

    def release(self) -> None:
        """Cancel what has not started, and drop the results of the rest."""
        for future in self._running:
            future.release()

    def _failed(
        self, tasks: list[_Numbered], error: Exception, *, is_alone: bool
    ) -> Iterator[tuple[int, Exception]]:
        """Yield the failures of tasks whose future failed, or remember them as suspects."""
        from distributed import KilledWorker

        is_killed = isinstance(error, KilledWorker)
        if is_killed and not is_alone:
            self.suspects += tasks
            return
        for index, task in tasks:
            if is_killed:
                if (local := self._client.cluster) is not None:
                    # Closed while a worker starts, it would print the worker's traceback.
                    with suppress(TimeoutError):
                        self._client.wait_for_workers(len(local.worker_spec), timeout=RESTART_S)
                error = JobError(
                    f"{task.name} was given up because every worker that tried it died, perhaps "
                    "out of memory; fix: use fewer workers or, for shards, a smaller "
                    "shard.target_bytes, and run it again: what is finished is kept"
                )
            yield index, error

    def _submit(self, chunk: list[_Numbered], *, is_alone: bool) -> None:
        """Submit tasks in one future; of a single task, the subtasks first, except if it is alone.

        Alone, a task runs its subtasks itself.
        """
        submit = partial(self._client.submit, pure=False)
        tasks, subtasks = [task for _, task in chunk], []
        if tasks[0].subtasks and not is_alone:
            subtasks = [submit(_attempt, self._subtask, each) for each in tasks[0].subtasks]
            self._watch(subtasks, [])
            tasks = [replace(tasks[0], subtasks=())]
        # Before subtasks of later tasks, so that few of their files exist at a time.
        priority = 1 if subtasks else 0
        functions = self._function, self._subtask
        self._watch([submit(_run_chunk, functions, tasks, *subtasks, priority=priority)], chunk)

    def _watch(self, futures: list[Any], chunk: list[_Numbered]) -> None:
        self._running.update(dict.fromkeys(futures, chunk))
        self._ended.update(futures)


def _iter_chunks(
    tasks: Iterable[TaskWithSubtasks[Any, Any]], weights: Sequence[float] | None, chunk_s: float
) -> Iterator[list[_Numbered]]:
    """Yield neighbors of about `chunk_s` together; without weights, each task alone."""
    chunk: list[_Numbered] = []
    sum_s = 0.0
    for index, task in enumerate(tasks):
        weight_s = math.inf if weights is None else weights[index]
        if chunk and (sum_s + weight_s > chunk_s or len(chunk) == MAX_CHUNK):
            yield chunk
            chunk, sum_s = [], 0.0
        chunk.append((index, task))
        sum_s += weight_s
    if chunk:
        yield chunk


def _run_chunk(
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    tasks: Sequence[TaskWithSubtasks[Any, Any]],
    *results: Any,  # noqa: ANN401
) -> list[bytes]:
    """Run tasks on a worker, or a single one with the results of its subtasks; pack the outcomes.

    Packed one by one, so that one that can't travel is the only one that fails.
    """
    if results:
        return [_pack(_attempt(functions[0], tasks[0].argument, *results))]
    outcomes = _run_in_process(*functions, tasks, retries=RETRIES)
    return [_pack(outcome) for index, outcome in outcomes if index is not None]


def _pack(outcome: Any) -> bytes:  # noqa: ANN401
    """Serialize a result or an error; of a bug, with the lines of the worker's code."""
    from distributed.protocol.pickle import dumps

    if isinstance(outcome, Exception) and not isinstance(outcome, EngineError):
        outcome.add_note("".join(traceback.format_exception(outcome)))
    try:
        return cast("bytes", dumps(outcome))
    except Exception as error:
        return cast("bytes", dumps(TypeError(f"{outcome!r:.200} can't leave its worker: {error}")))


def _unpack(content: bytes) -> Any:  # noqa: ANN401
    """Read a result or an error; return the error if that fails."""
    from distributed.protocol.pickle import loads

    try:
        return loads(content)
    except Exception as error:
        return error


def _attempt(
    function: Callable[..., Any],
    argument: Any,  # noqa: ANN401
    *subtask_results: Any,  # noqa: ANN401
    retries: int = RETRIES,
) -> Any:  # noqa: ANN401
    """Call a function; return, and do not raise, its error, after retries if they can help.

    A failed subtask is an error. Requests to stores have been retried already.
    """
    for result in subtask_results:
        if isinstance(result, Exception):
            return result
    try:
        return function(argument, *subtask_results)
    except (JobError, SessionError, StorageError) as error:
        return error
    except Exception as error:
        if retries:
            return _attempt(function, argument, *subtask_results, retries=retries - 1)
        return error


def _run_in_process(
    function: Callable[..., Any],
    subtask: Callable[..., Any],
    tasks: Iterable[TaskWithSubtasks[Any, Any]],
    *,
    retries: int = 0,
) -> _Outcomes:
    """Run tasks here, one after the other."""
    for index, task in enumerate(tasks):
        results = []
        for argument in task.subtasks:
            results.append(_attempt(subtask, argument, retries=retries))
            yield None, results[-1]
        yield index, _attempt(function, task.argument, *results, retries=retries)


def _iter_tasks(
    arguments: Iterable[ArgT], names: Sequence[str] | None = None
) -> Iterator[TaskWithSubtasks[ArgT, Any]]:
    for index, argument in enumerate(arguments):
        yield TaskWithSubtasks(argument, name=names[index] if names else "a task")


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


class _Progress:
    """Shows how much of a job is done: a bar on a terminal, elsewhere a line now and then.

    The estimated time to the end follows the weights, so that a few long tasks don't mislead.
    """

    def __init__(
        self, console: Console, label: str, *, num: int, weights: Sequence[float] | None = None
    ) -> None:
        self.num = num
        self.weights = weights
        self._console = console
        self._label = label
        self._counted = weights if weights is not None and any(weights) else None
        self._total = float(num) if self._counted is None else math.fsum(self._counted)
        self._num_done = 0
        self._done = 0.0
        self._start_s = self._shown_s = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), _StatusColumn(), console=console
        )
        self._bar.add_task(label, total=self._total, status=self._status)

    def __enter__(self) -> None:
        self._start_s = self._shown_s = time.monotonic()
        if self._console.is_terminal:
            self._bar.start()

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._bar.update(TaskID(0), completed=self._done)
            self._bar.stop()

    def advance(self, index: int | None) -> None:
        """Count a task, or with None a subtask; show it if it is time to."""
        self._num_done += 1
        self._done += 1.0 if index is None or self._counted is None else self._counted[index]
        now_s = time.monotonic()
        if now_s < self._shown_s + (BAR_S if self._console.is_terminal else LINE_S):
            return
        self._shown_s = now_s
        if self._console.is_terminal:
            self._bar.update(TaskID(0), completed=self._done)
        else:
            _print(self._console, f"{self._label}: {self._status()}")

    def _status(self) -> str:
        """Return how much is done, the time since the start, and the estimated time to the end."""
        elapsed_s = time.monotonic() - self._start_s
        eta = "-:--:--"
        if self._done:
            eta_s = elapsed_s * max(0.0, self._total / self._done - 1.0)
            eta = str(timedelta(seconds=round(eta_s)))
        return f"{self._num_done}/{self.num} {timedelta(seconds=int(elapsed_s))} eta {eta}"


class _StatusColumn(ProgressColumn):
    """The status of a :class:`_Progress`, as of now."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"](), style="progress.remaining")


def _print(console: Console, message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)


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
