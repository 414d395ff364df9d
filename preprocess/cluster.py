"""Runs independent functions over a Dask cluster, or in this process. The only module that knows
Dask.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

RETRIES = 2
"""How often a failed task is tried again: network folders hiccup. Dask itself moves the tasks of a
worker that died."""

ArgT = TypeVar("ArgT")
ResultT = TypeVar("ResultT")


class Cluster:
    """Runs functions over a Dask cluster that is started at the first use.

    Args:
        scheduler: address of a running scheduler; None starts a local cluster.
        num_workers: processes of a local cluster; 0 runs in this process, without Dask.
        console: where progress and the dashboard's address go.
    """

    def __init__(self, *, scheduler: str | None, num_workers: int, console: Console) -> None:
        self._scheduler = scheduler
        self._num_workers = num_workers
        self._console = console
        self._stack = ExitStack()
        self._client: Any = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def map(
        self, function: Callable[[ArgT], ResultT], arguments: Sequence[ArgT], *, what: str
    ) -> list[ResultT]:
        """Results in the order of the arguments, with a progress bar.

        Raises:
            Exception: the first failure, after the other tasks have ended.
        """
        results: dict[int, ResultT] = {}
        with self._progress() as progress:
            bar = progress.add_task(what, total=len(arguments))
            for index, result in self._completed(function, arguments):
                results[index] = result
                progress.advance(bar)
        return [results[i] for i in range(len(arguments))]

    def _completed(
        self, function: Callable[[ArgT], ResultT], arguments: Sequence[ArgT]
    ) -> Iterator[tuple[int, ResultT]]:
        if self._scheduler is None and self._num_workers == 0:
            yield from enumerate(map(function, arguments))
            return
        from distributed import as_completed

        client = self._connect()
        futures = {
            client.submit(function, argument, pure=False, retries=RETRIES): index
            for index, argument in enumerate(arguments)
        }
        failure: Exception | None = None
        for future in as_completed(list(futures)):
            error = future.exception()
            if error is None:
                yield futures[future], future.result()
            elif failure is None:
                failure = error
        if failure is not None:
            raise failure

    def _connect(self) -> Any:  # noqa: ANN401
        if self._client is None:
            from distributed import Client, LocalCluster

            address: Any = self._scheduler
            if address is None:
                address = self._stack.enter_context(
                    LocalCluster(
                        n_workers=self._num_workers,
                        threads_per_worker=1,  # decoders scale by processes
                        dashboard_address="127.0.0.1:0",
                        silence_logs=40,
                    )
                )
            self._client = self._stack.enter_context(Client(address))
            self._console.print(f"dask dashboard: {self._client.dashboard_link}", highlight=False)
        return self._client

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
