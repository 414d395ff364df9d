"""Run independent functions on a Dask cluster, or in this process.

No other module imports Dask.
"""

from __future__ import annotations

import math
import signal
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from shared.errors import JobError, MachineError, SessionError, StorageError
from shared.machine import describe_os_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

RETRIES = 2
"""How often a failed task is retried, because network file systems fail intermittently. Dask itself
moves the tasks of a worker that died."""

START_S = 2.0
"""Seconds that a local cluster takes to start."""

MIN_WORK_S = 60.0
"""Shorter jobs get no warning about idle workers (seconds)."""

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

    @property
    def num_parallel(self) -> int:
        """How many workers it can keep busy."""
        return max(1, len(self.subtasks))


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
        arguments: SizedIterable[ArgT],
        *,
        label: str,
        weights: Sequence[float] | None = None,
        work_s: float = math.inf,
    ) -> list[ResultT]:
        """Call a function with each argument; return the results in order.

        The function crosses processes. `weights` are the estimated seconds per argument in one
        process, and `work_s`, which replaces them, those of all.

        Raises:
            JobError, MachineError: the job can't continue; at once, without the other tasks.
            Exception: the first failure, after the other tasks have ended.
        """
        tasks: list[TaskWithSubtasks[ArgT, Any]] = [TaskWithSubtasks(a) for a in arguments]
        work_s = sum(weights) if weights is not None else work_s
        return self.run(function, tasks, subtask=function, label=label, work_s=work_s)

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

        A failure is an outcome: the other calls go on. Estimates are as in :meth:`map`. Calls that
        have not started when the caller stops iterating are dropped.
        """
        work_s = sum(weights) if weights is not None else work_s
        iterate = _run_in_process if self.is_in_process(work_s=work_s) else self._run_on_cluster
        with self._progress() as progress:
            bar = progress.add_task(label, total=len(arguments))
            for index, outcome in iterate(
                function, function, [TaskWithSubtasks(a) for a in arguments]
            ):
                if index is not None:
                    yield index, outcome
                progress.advance(bar)

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
        if not tasks:
            return []
        iterate = _run_in_process if self.is_in_process(work_s=work_s) else self._run_on_cluster
        results: dict[int, ResultT] = {}
        failure: Exception | None = None
        with self._progress() as progress:
            bar = progress.add_task(label, total=sum(1 + len(task.subtasks) for task in tasks))
            for index, outcome in iterate(function, subtask, tasks):
                if isinstance(outcome, (JobError, MachineError)):
                    raise outcome
                if isinstance(outcome, Exception):
                    failure = failure or outcome
                    continue
                if index is not None:
                    results[index] = outcome
                progress.advance(bar)
        if failure is not None:
            raise failure
        return [results[index] for index in range(len(tasks))]

    def _run_on_cluster(
        self,
        function: Callable[..., Any],
        subtask: Callable[..., Any],
        tasks: Sequence[TaskWithSubtasks[Any, Any]],
    ) -> Iterator[tuple[int | None, Any]]:
        """See :func:`_run_in_process`. A task is a future that depends on its subtasks' futures."""
        from distributed import as_completed

        submit = partial(self._connect().submit, _attempt, pure=False, retries=RETRIES)
        running: dict[Any, int | None] = {}
        for index, task in enumerate(tasks):
            subtasks = [submit(subtask, argument) for argument in task.subtasks]
            running.update(dict.fromkeys(subtasks))
            # Before subtasks of later tasks, so that few of their files exist at a time.
            priority = 1 if subtasks else 0
            running[submit(function, task.argument, *subtasks, priority=priority)] = index
            del subtasks
        # A finished future is released at once: if its worker died later, Dask would repeat it.
        for future in as_completed(list(running)):
            yield running.pop(future), _outcome(future)

    def _connect(self) -> Any:  # noqa: ANN401
        from distributed import Client

        if self._client is None:
            address: Any = self._scheduler or self._start_local()
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
        """Start a local cluster; retry if a worker dies while it starts."""
        from distributed import LocalCluster

        for attempt in range(STARTS):
            try:
                with block_interrupts():
                    local = LocalCluster(
                        n_workers=self._num_workers,
                        threads_per_worker=1,  # decoders scale by processes
                        dashboard_address="127.0.0.1:0",
                        silence_logs=60,  # the job reports failures itself
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

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self._console, transient=not self._console.is_terminal)


def _attempt(function: Callable[..., Any], argument: Any, *subtask_results: Any) -> Any:  # noqa: ANN401
    """Call a function; return, and do not raise, an error that a retry would repeat.

    A failed subtask is such an error. Requests to stores have been retried already.
    """
    for result in subtask_results:
        if isinstance(result, Exception):
            return result
    try:
        return function(argument, *subtask_results)
    except (JobError, SessionError, StorageError) as error:
        return error


def _run_in_process(
    function: Callable[..., Any],
    subtask: Callable[..., Any],
    tasks: Sequence[TaskWithSubtasks[Any, Any]],
) -> Iterator[tuple[int | None, Any]]:
    """Yield (index, result or error) of each task, and (None, result or error) of each subtask."""
    for index, task in enumerate(tasks):
        results = []
        for argument in task.subtasks:
            results.append(_attempt(subtask, argument))
            yield None, results[-1]
        yield index, _attempt(function, task.argument, *results)


def _outcome(future: Any) -> Any:  # noqa: ANN401
    """Return the result or the error of a future that has ended."""
    from distributed import KilledWorker

    error = future.exception()
    if isinstance(error, KilledWorker):
        return JobError(
            "a task was given up because every worker that tried it died, perhaps out of memory; "
            "fix: use fewer workers or a smaller shard.target_bytes, and run it again: finished "
            "shards are kept"
        )
    return error if error is not None else future.result()


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
