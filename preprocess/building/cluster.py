"""Runs independent functions over a Dask cluster, or in this process. The only module that knows
Dask.
"""

from __future__ import annotations

import math
import signal
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from shared.errors import JobError, SessionError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

RETRIES = 2
"""How often a failed task is tried again: network folders hiccup. Dask itself moves the tasks of a
worker that died."""

START_S = 2.0
"""How long a local cluster takes to start."""

MIN_WORK_S = 60.0
"""Nobody minds idle workers in shorter work."""

STARTS = 3
"""How often local workers are started before they are given up."""

ArgT = TypeVar("ArgT")
ResultT = TypeVar("ResultT")


class Cluster:
    """Runs functions over a Dask cluster that is started at the first use.

    Args:
        scheduler: address of a running scheduler; None starts a local cluster.
        num_workers: processes of a local cluster; 0 runs in this process, without Dask.
        console: where progress and the dashboard's address go.
        start_s: how long a local cluster takes to start; shorter work is done in this process.
    """

    def __init__(
        self,
        *,
        scheduler: str | None,
        num_workers: int,
        console: Console,
        start_s: float = START_S,
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

    def num_idle(self, num_tasks: int, *, work_s: float) -> int:
        """Workers of a local cluster that so many tasks leave without work, where it would count.

        Args:
            num_tasks: how many.
            work_s: about how long one process would take for all.
        """
        is_short = self._scheduler is not None or work_s < MIN_WORK_S
        return 0 if is_short else max(0, self._num_workers - num_tasks)

    def say(self, message: str) -> None:
        """One line to the terminal."""
        self._console.print(message, highlight=False, soft_wrap=True)

    def map(
        self,
        function: Callable[[ArgT], ResultT],
        arguments: Sequence[ArgT],
        *,
        what: str,
        work_s: float = math.inf,
    ) -> list[ResultT]:
        """Results in the order of the arguments, with a progress bar.

        Args:
            function: what to do.
            arguments: with what.
            what: the same in words.
            work_s: about how long one process would take for all.

        Raises:
            JobError, StorageError: the job can't go on; at once, the other tasks are given up.
            Exception: the first failure, after the other tasks have ended.
        """
        if not arguments:
            return []
        results: dict[int, ResultT] = {}
        with self._progress() as progress:
            bar = progress.add_task(what, total=len(arguments))
            for index, result in self._completed(function, arguments, work_s):
                results[index] = result
                progress.advance(bar)
        return [results[i] for i in range(len(arguments))]

    def _completed(
        self, function: Callable[[ArgT], ResultT], arguments: Sequence[ArgT], work_s: float
    ) -> Iterator[tuple[int, ResultT]]:
        attempt = _Attempt(function)
        is_small = self._num_workers == 0 or (self._client is None and work_s < self._start_s)
        outcomes = (
            enumerate(map(attempt, arguments))
            if self._scheduler is None and is_small
            else self._submitted(attempt, arguments)
        )
        failure: Exception | None = None
        for index, outcome in outcomes:
            if isinstance(outcome, (JobError, StorageError)):
                raise outcome
            if not isinstance(outcome, Exception):
                yield index, outcome
            elif failure is None:
                failure = outcome
        if failure is not None:
            raise failure

    def _submitted(
        self, attempt: Callable[[ArgT], ResultT | Exception], arguments: Sequence[ArgT]
    ) -> Iterator[tuple[int, ResultT | Exception]]:
        """Result or failure of every task, as they end."""
        from distributed import KilledWorker, as_completed

        client = self._connect()
        futures = {
            client.submit(attempt, argument, pure=False, retries=RETRIES): index
            for index, argument in enumerate(arguments)
        }
        for future in as_completed(list(futures)):
            error = future.exception()
            if isinstance(error, KilledWorker):
                yield (
                    futures[future],
                    JobError(
                        "a task was given up because every worker that tried it died; do they run "
                        "out of memory? Use fewer workers or a smaller shard.target_bytes, and run "
                        "it again: what was finished is kept"
                    ),
                )
            else:
                yield futures[future], error if error is not None else future.result()

    def _connect(self) -> Any:  # noqa: ANN401
        if self._client is None:
            address: Any = self._scheduler or self._start_local()
            self._client = self._stack.enter_context(_client(address))
            self._console.print(f"dask dashboard: {self._client.dashboard_link}", highlight=False)
        return self._client

    def _start_local(self) -> Any:  # noqa: ANN401
        """A local cluster; started again where a worker dies before it has said that it is there.

        Raises:
            JobError: workers die whenever they start.
        """
        from distributed import LocalCluster

        for attempt in range(STARTS):
            try:
                with deaf_to_interrupts():
                    local = LocalCluster(
                        n_workers=self._num_workers,
                        threads_per_worker=1,  # decoders scale by processes
                        dashboard_address="127.0.0.1:0",
                        silence_logs=60,  # what goes wrong is told by the job
                    )
            except RuntimeError as error:
                if attempt + 1 == STARTS:
                    raise JobError(
                        f"{self._num_workers} local workers could not be started: "
                        f"{error.__cause__ or error}; use fewer (--workers), or none (--workers 0)"
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


@dataclass(frozen=True, slots=True)
class _Attempt(Generic[ArgT, ResultT]):
    """A function that returns its error where another attempt would end in the same one."""

    function: Callable[[ArgT], ResultT]

    def __call__(self, argument: ArgT) -> ResultT | Exception:
        try:
            return self.function(argument)
        except (JobError, SessionError, StorageError) as error:  # stores were asked patiently
            return error


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Threads and processes that are started here never see a Ctrl-C: they inherit the mask.

    A terminal interrupts all processes of a job at once. The client alone answers, and dismisses
    its workers, which otherwise die with a traceback each.
    """
    resource_tracker.ensure_running()  # it unblocks SIGINT
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _client(address: Any) -> Any:  # noqa: ANN401
    """A client of a scheduler.

    Raises:
        JobError: nothing answers there.
    """
    from distributed import Client

    try:
        return Client(address)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobError(
            f"scheduler {address}: no answer: {reason}; start one by `dask scheduler` and give its "
            "address as tcp://HOST:PORT"
        ) from error
