"""What a loader process does: makes batches in the ring, and ends when the trainer does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shared.errors import CorruptError, EngineError, TooManyCorruptSamplesError
from shared.timing import no_timer
from train.data.batch import Place, fill_arrays

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from shared.session.reader import Text
    from shared.timing import StageTimer
    from train.config import TrainConfig
    from train.data.batch import SampleSource, WindowShapes
    from train.data.mixture import MixedOrder
    from train.data.order import BatchOrder, BatchPlan, Blocks
    from train.data.shared_pool import SharedBatchPool

MAX_SUBSTITUTES = 16
"""So many corrupt samples after each other for one place stop the run."""

MIN_SAMPLES_JUDGED: Final = 200
"""The share of corrupt samples is judged after so many samples."""

_ORPHAN_CHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """Work for a loader process."""

    index: int
    """Number of the global batch."""
    slot: int
    """Of the ring, free until the batch is made."""


class BatchMaker:
    """Makes batches in the ring; only what is small is returned.

    A corrupt sample is told ("skipped") and replaced by another one. In a stream that trains that
    one counts like any other; in one that measures (`is_measured`) no sample may count twice, so
    it has weight 0, and only the corrupt sample itself is told, not those that could not stand in
    for it: each of them is met in its own place.
    """

    def __init__(
        self,
        source: SampleSource,
        order: BatchOrder | MixedOrder,
        ring: SharedBatchPool,
        *,
        config: TrainConfig,
        shapes: WindowShapes,
        is_measured: bool = False,
        timer: StageTimer | None = None,
    ) -> None:
        self._source = source
        self._order = order
        self._ring = ring
        self._config = config
        self._shapes = shapes
        self._is_measured = is_measured
        self._timer = timer
        self._on_stage = no_timer if timer is None else timer.end_stage
        self._blocks: Blocks = ()

    def __getitem__(self, task: Task) -> dict[str, Any]:
        """Read, decode and collate a batch into its slot; "error" says why it can't be."""
        try:
            return self._make(task)
        except EngineError as error:  # torch would wrap it in a worker's traceback
            # Other libraries' errors behind it may not cross: what can't be pickled is lost and
            # never waited for, and some (tblib, which distributed brings) pickle the whole chain.
            error.__cause__ = error.__context__ = None
            return {"error": error.with_traceback(None)}

    def _make(self, task: Task) -> dict[str, Any]:
        if self._timer is not None:
            self._timer.begin()
        plan = self._order.plan(task.index)
        self._on_stage("plan")
        places = [(int(s), int(r)) for s, r in zip(plan.shards, plan.rows, strict=True)]
        self._tell_what_comes(plan, places)
        self._on_stage("open")
        skipped: list[dict[str, Any]] = []
        arrays = self._ring.arrays(task.slot)
        weight = arrays["weight"]
        weight[...] = plan.weight

        def read(i: int, out: dict[str, NDArray[Any]]) -> tuple[Place, Text | None]:
            corrupt: list[dict[str, Any]] = []
            found = self._read(plan, i, places[i], out, corrupt)
            if plan.weight[i]:  # padding is told where it is a sample
                skipped.extend(corrupt[:1] if self._is_measured else corrupt)
            if corrupt and self._is_measured:
                weight[i] = 0
            return found

        dense, keys = fill_arrays(
            self._source, places, arrays, config=self._config, shapes=self._shapes, read=read
        )
        self._on_stage("collate")
        rest = {"keys": keys, "index": plan.index, "epoch": plan.epoch, "skipped": skipped}
        if self._timer is not None:
            rest["stages_s"], rest["made_s"] = self._timer.take(), time.perf_counter()
        return {"slot": task.slot, "dense": dense, "rest": rest}

    def _tell_what_comes(self, plan: BatchPlan, places: list[Place]) -> None:
        """A batch's samples, and at the begin of each block: the source may fetch it and the next
        one.
        """
        blocks = self._order.blocks_of(plan)
        streams = {*self._config.input_streams, *self._config.target_streams}
        if blocks != self._blocks:
            self._blocks = blocks
            self._source.prefetch_shards(self._order.shards_of(blocks), streams)
        self._source.prefetch_samples(places, streams)

    def _read(
        self,
        plan: BatchPlan,
        i: int,
        place: Place,
        out: dict[str, NDArray[Any]],
        skipped: list[dict[str, Any]],
    ) -> tuple[Place, Text | None]:
        """Read one sample; while it is corrupt, the one that stands in for it."""
        streams = (*self._config.input_streams, *self._config.target_streams)
        with_text = any(s.endswith("_text") for s in streams)
        wanted = place
        for attempt in range(MAX_SUBSTITUTES):
            try:
                self._on_stage("collate")
                text = self._source.read_into(*place, out, with_text=with_text)
                self._on_stage("decode")  # of a source that has no timer of its own
                return place, text
            except CorruptError as error:
                skipped.append(self._describe(place, error))
                place = self._order.substitute(plan, i, attempt)
        raise TooManyCorruptSamplesError(
            f"sample {wanted} and {MAX_SUBSTITUTES - 1} others in its place are corrupt; "
            f"the last: {skipped[-1]['error']}; run `python -m preprocess verify SHARDS`"
        )

    def _describe(self, place: Place, error: CorruptError) -> dict[str, Any]:
        """A corrupt sample for the log; its key where the index can still be read."""
        try:
            key = self._source.key(*place)
        except CorruptError:
            key = "?"
        return {
            "key": key,
            "shard": self._source.shard_name(place[0]),
            "row": place[1],
            "file": error.file,
            "offset": error.offset,
            "error": str(error),
        }


@dataclass(slots=True, kw_only=True)
class CorruptSampleBudget:
    """Counts corrupt samples against ``data.max_bad_fraction`` of those read.

    A loader counts its own; where ranks share the batches the trainer counts those of all, so that
    a run stops or goes on whatever its number of ranks.
    """

    max_fraction: float
    num_read: int = 0
    num_bad: int = 0

    def count(self, num_read: int, skipped: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch: how many samples it has, and the corrupt ones, each with its "error".

        Raises:
            TooManyCorruptSamplesError: the share is too large.
        """
        self.num_read += num_read
        self.num_bad += len(skipped)
        if not skipped or self.num_bad <= self.max_fraction * max(
            self.num_read, MIN_SAMPLES_JUDGED
        ):
            return
        raise TooManyCorruptSamplesError(
            f"{self.num_bad} of {self.num_read} samples are corrupt, data.max_bad_fraction allows "
            f"{self.max_fraction:g}; run `python -m preprocess verify SHARDS`; the last: "
            f"{skipped[-1]['error']}"
        )


def init_worker(_worker: int) -> None:
    """Ignore what a terminal or a scheduler sends to the whole process group.

    The trainer still needs its batch to finish the step and save; then it dismisses the workers, at
    the latest by a SIGTERM of its own. They notice by themselves when it is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent_pid: int) -> None:
    """End this process when the trainer says so or is gone, whatever else waits for it then."""
    trainer = multiprocessing.parent_process()  # the parent, or beyond it where a server forks
    while trainer is not None and trainer.is_alive() and os.getppid() == parent_pid:
        said = signal.sigtimedwait([signal.SIGTERM], _ORPHAN_CHECK_S)
        if said is not None and said.si_pid == trainer.pid:
            break
    os._exit(0)
