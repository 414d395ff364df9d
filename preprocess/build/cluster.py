"""Runs independent functions over a Dask cluster, or in this process. The only module that knows
Dask.
"""

from __future__ import annotations

import math
import signal
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
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
PieceT = TypeVar("PieceT")
PartT = TypeVar("PartT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Joint(Generic[ArgT, PieceT]):
    """A task and the pieces of it that are tasks before it."""

    argument: ArgT
    pieces: Sequence[PieceT] = ()

    @property
    def num_tasks(self) -> int:
        """How many workers it can keep busy."""
        return max(1, len(self.pieces))


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

    def is_in_process(self, *, work_s: float) -> bool:
        """Whether so much work is done in this process, one task after another."""
        is_small = self._num_workers == 0 or (self._client is None and work_s < self._start_s)
        return self._scheduler is None and is_small

    def say(self, message: str) -> None:
        """One line to the terminal."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

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
        work: list[Joint[ArgT, Any]] = [Joint(argument) for argument in arguments]
        return self.join(_Alone(function), work, part=_Alone(function), what=what, work_s=work_s)

    def join(
        self,
        function: Callable[[ArgT, Sequence[PartT]], ResultT],
        work: Sequence[Joint[ArgT, PieceT]],
        *,
        part: Callable[[PieceT], PartT],
        what: str,
        work_s: float = math.inf,
    ) -> list[ResultT]:
        """Results in order, with a progress bar that counts pieces too.

        Args:
            function: what to do with an argument and the parts that were made of its pieces.
            work: arguments and pieces.
            part: what to do with a piece.
            what: the same in words.
            work_s: about how long one process would take for all.

        Raises:
            JobError, Exception: see :meth:`map`; where a piece fails, so does its task.
        """
        if not work:
            return []
        results: dict[int, ResultT] = {}
        with self._progress() as progress:
            num_pieces = sum(len(joint.pieces) for joint in work)
            bar = progress.add_task(what, total=len(work) + num_pieces)
            attempts = _Attempt(function), _Attempt(part)
            for index, result in self._completed(*attempts, work, work_s):
                if index is not None:
                    results[index] = result
                progress.advance(bar)
        return [results[i] for i in range(len(work))]

    def _completed(
        self, function: _Attempt, part: _Attempt, work: Sequence[Joint[Any, Any]], work_s: float
    ) -> Iterator[tuple[int | None, Any]]:
        """Number and result of every task as they end; None and result of every piece."""
        is_here = self.is_in_process(work_s=work_s)
        failure: Exception | None = None
        for index, outcome in (_in_turn if is_here else self._submitted)(function, part, work):
            if isinstance(outcome, (JobError, StorageError)):
                raise outcome
            if not isinstance(outcome, Exception):
                yield index, outcome
            elif failure is None:
                failure = outcome
        if failure is not None:
            raise failure

    def _submitted(
        self, function: _Attempt, part: _Attempt, work: Sequence[Joint[Any, Any]]
    ) -> Iterator[tuple[int | None, Any]]:
        """Like :func:`_in_turn`, over the cluster."""
        from distributed import as_completed

        submit = partial(self._connect().submit, pure=False, retries=RETRIES)
        parts: list[list[Any]] = [[None] * len(joint.pieces) for joint in work]
        missing = [len(joint.pieces) for joint in work]
        running: dict[Any, tuple[int, int | None]] = {}
        for index, joint in enumerate(work):
            for number, piece in enumerate(joint.pieces):
                running[submit(part, piece)] = index, number
            if not joint.pieces:
                running[submit(function, joint.argument, ())] = index, None
        ended = as_completed(list(running))
        for future in ended:
            task, place = running.pop(future)
            outcome = _outcome(future)
            yield task if place is None else None, outcome
            if place is None or isinstance(outcome, Exception):
                continue
            parts[task][place] = outcome
            missing[task] -= 1
            if not missing[task]:
                # Before pieces of later tasks, so that few parts lie about.
                joined = submit(function, work[task].argument, tuple(parts[task]), priority=1)
                running[joined] = task, None
                ended.add(joined)

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
                with ignore_sigint():
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
class _Attempt:
    """A function that returns its error where another attempt would end in the same one."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:  # noqa: ANN401
        try:
            return self.function(*arguments)
        except (JobError, SessionError, StorageError) as error:  # stores were asked patiently
            return error


@dataclass(frozen=True, slots=True)
class _Alone(Generic[ArgT, ResultT]):
    """A function of an argument, for tasks without pieces."""

    function: Callable[[ArgT], ResultT]

    def __call__(self, argument: ArgT, parts: Sequence[Any] = ()) -> ResultT:
        del parts
        return self.function(argument)


def _in_turn(
    function: _Attempt, part: _Attempt, work: Sequence[Joint[Any, Any]]
) -> Iterator[tuple[int | None, Any]]:
    """Number and result or failure of every task; None and those of its pieces before."""
    for index, joint in enumerate(work):
        made = []
        for piece in joint.pieces:
            made.append(part(piece))
            yield None, made[-1]
        if not any(isinstance(outcome, Exception) for outcome in made):
            yield index, function(joint.argument, tuple(made))


def _outcome(future: Any) -> Any:  # noqa: ANN401
    """Result or failure of a task that has ended."""
    from distributed import KilledWorker

    error = future.exception()
    if isinstance(error, KilledWorker):
        return JobError(
            "a task was given up because every worker that tried it died; do they run out of "
            "memory? Use fewer workers or a smaller shard.target_bytes, and run it again: what was "
            "finished is kept"
        )
    return error if error is not None else future.result()


@contextmanager
def ignore_sigint() -> Iterator[None]:
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
