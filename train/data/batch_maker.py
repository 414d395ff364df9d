"""Make batches in a loader process, substituting corrupt samples, and exit with the trainer.

::

    Task(index, slot)
      -> BatchOrder.plan              which samples
      -> SampleSource.prefetch_*      the source may fetch them and the next block
      -> SampleSource.read_into       each sample into the slot; if corrupt, a substitute
      -> pack_texts                   the tokens of text-only samples
      -> MadeBatch                    what crosses to the trainer: everything but the slot's arrays
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from shared.errors import REBUILD_HINT, CorruptError, EngineError, TooManyCorruptSamplesError
from shared.timing import no_timer
from train.data.batch import ReadSample, iter_sample_views, pack_texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from shared.timing import StageTimer
    from train.data.batch import SampleLocation, SampleSource
    from train.data.order import BatchOrder, BatchPlan, Blocks
    from train.data.shared_pool import SharedBatchPool

MAX_ATTEMPTS: Final = 16
"""The run stops when this many samples in a row are corrupt: one and its substitutes."""

MIN_MEMBERS_JUDGED: Final = 200
"""The share of corrupt members is judged as if at least this many had been read."""

_PARENT_CHECK_S = 1.0
"""How often a loader process checks that the trainer is alive."""


@dataclass(frozen=True, slots=True)
class Task:
    """Work for a loader process."""

    index: int
    """Index of the global batch."""
    slot: int
    """Slot of the pool that no other task uses until the batch is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeBatch:
    """A finished batch, as it crosses to the trainer; its arrays are in its slot."""

    slot: int
    packed_text: dict[str, NDArray[Any]]
    """Arrays whose length depends on the text, so that no slot can hold them."""
    extras: dict[str, Any]
    """"keys", "index", "epoch", "num_members", "skipped"; if timed, "stages_s" and "made_s"."""


class BatchMaker:
    """Makes batches in the slots of a pool; a map-style dataset of :class:`Task`.

    A corrupt sample is reported under "skipped" and substituted by another one. For training the
    substitute has weight 1. For evaluation (`is_measured`) it has weight 0, so that no sample
    counts twice, and corrupt substitutes are not reported: each is reported at its own position.
    """

    def __init__(
        self,
        source: SampleSource,
        order: BatchOrder,
        pool: SharedBatchPool,
        *,
        is_measured: bool = False,
        timer: StageTimer | None = None,
    ) -> None:
        self._source = source
        self._order = order
        self._pool = pool
        self._is_measured = is_measured
        self._timer = timer
        self._on_stage = no_timer if timer is None else timer.end_stage
        self._blocks: Blocks = ()

    def __getitem__(self, task: Task) -> MadeBatch | EngineError:
        """Make a batch, as torch's DataLoader requests it; return an error instead of raising it.

        torch would wrap a raised error in a worker's traceback.
        """
        try:
            return self.make(task)
        except EngineError as error:
            # Causes from other libraries must not cross: an error that can't be pickled is lost
            # and the trainer waits forever, and some libraries (tblib, which distributed brings)
            # pickle the whole chain.
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)

    def make(self, task: Task) -> MadeBatch:
        """Read, decode and collate a batch into its slot."""
        if self._timer is not None:
            self._timer.begin()
        plan = self._order.plan(task.index)
        self._on_stage("plan")
        locations = list(zip(plan.shards.tolist(), plan.windows.tolist(), strict=True))
        self._prefetch(plan, locations)
        self._on_stage("open")
        arrays = self._pool.arrays(task.slot)
        samples, skipped, num_members = self._read_samples(plan, locations, arrays)
        packed_text = pack_texts(samples, self._source.shapes)
        keys = [self._source.key(*sample.location) for sample in samples]
        self._on_stage("collate")
        extras = {
            "keys": keys,
            "index": plan.index,
            "epoch": plan.epoch,
            "num_members": num_members,
            "skipped": skipped,
        }
        if self._timer is not None:
            extras["stages_s"], extras["made_s"] = self._timer.take(), time.perf_counter()
        return MadeBatch(slot=task.slot, packed_text=packed_text, extras=extras)

    def _prefetch(self, plan: BatchPlan, locations: Sequence[SampleLocation]) -> None:
        """Prefetch a batch's samples and, when a block starts, that block and the next one."""
        blocks = self._order.find_blocks(plan)
        if blocks != self._blocks:
            self._blocks = blocks
            self._source.prefetch_shards(self._order.list_shards(blocks))
        self._source.prefetch_samples(locations)

    def _read_samples(
        self,
        plan: BatchPlan,
        locations: Sequence[SampleLocation],
        arrays: Mapping[str, NDArray[Any]],
    ) -> tuple[list[ReadSample], list[dict[str, Any]], int]:
        """Read all samples of a batch into its arrays and write their weights.

        Returns the samples read in the end, the corrupt ones to report, and the number of members.
        """
        weight = arrays["weight"]
        weight[...] = plan.weight
        samples: list[ReadSample] = []
        skipped: list[dict[str, Any]] = []
        num_members = 0
        for i, out in enumerate(iter_sample_views(arrays)):
            sample, corrupt, num_read = self._read_or_substitute(plan, i, locations[i], out)
            samples.append(sample)
            num_members += num_read
            if plan.weight[i]:  # padding is reported at the position where it is a sample
                skipped += corrupt[:1] if self._is_measured else corrupt
            if corrupt and self._is_measured:
                weight[i] = 0
        return samples, skipped, num_members

    def _read_or_substitute(
        self, plan: BatchPlan, i: int, location: SampleLocation, out: dict[str, NDArray[Any]]
    ) -> tuple[ReadSample, list[dict[str, Any]], int]:
        """Read sample `i` of a batch or, as long as it is corrupt, a substitute for it.

        Returns:
            The sample that was read, a description of each corrupt one before it, and the number
            of members that were read. A corrupt sample counts with its corrupt member.
        """
        corrupt: list[dict[str, Any]] = []
        current = location
        for attempt in range(MAX_ATTEMPTS):
            try:
                self._on_stage("collate")
                texts, num_members = self._source.read_into(*current, out)
                self._on_stage("decode")  # of a source that times no stages itself
                return ReadSample(current, texts), corrupt, len(corrupt) + num_members
            except CorruptError as error:
                corrupt.append(self._describe(current, error))
                current = self._order.substitute(plan, i, attempt)
        raise TooManyCorruptSamplesError(
            f"sample {location} and {MAX_ATTEMPTS - 1} substitutes for it are corrupt; the last "
            f"error: {_with_fix(corrupt[-1])}"
        )

    def _describe(self, location: SampleLocation, error: CorruptError) -> dict[str, Any]:
        """Describe a corrupt sample for the log; its key is "?" if its index is corrupt too."""
        try:
            key = self._source.key(*location)
        except CorruptError:
            key = "?"
        return {
            "key": key,
            "shard": self._source.shard_name(location[0]),
            "window": location[1],
            "file": error.file,
            "offset": error.offset,
            "error": str(error),
        }


@dataclass(slots=True, kw_only=True)
class CorruptSampleBudget:
    """Counts corrupt members against ``data.max_bad_fraction`` of the members read.

    A member is the stored segment of one stream. Neighboring windows share members, so a corrupt
    one makes several samples corrupt; it is counted and reported once.

    A loader counts its own. When ranks share the batches, the trainer counts those of all ranks,
    so that a run stops at the same step for any number of ranks.
    """

    max_fraction: float
    num_read: int = 0
    """Members read, each as often as it was."""
    corrupt: set[tuple[Any, ...]] = field(default_factory=set)
    """Shard, file and offset of each corrupt member."""
    _last: Mapping[str, Any] | None = None

    @property
    def num_corrupt(self) -> int:
        """Number of corrupt members."""
        return len(self.corrupt)

    def add(self, num_read: int, skipped: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Add members that were read, and corrupt samples; return those whose member is new."""
        self.num_read += num_read
        new = []
        for sample in skipped:
            member = (sample["shard"], sample["file"], sample["offset"])
            if sample["file"] is None:  # unknown: the sample stands for it
                member = (sample["shard"], sample["window"], None)
            if member not in self.corrupt:
                self.corrupt.add(member)
                new.append(sample)
                self._last = sample
        return new

    def check(self) -> None:
        """Check the share of corrupt members, if some were added since the last check."""
        last, self._last = self._last, None
        num_allowed = self.max_fraction * max(self.num_read, MIN_MEMBERS_JUDGED)
        if last is None or self.num_corrupt <= num_allowed:
            return
        raise TooManyCorruptSamplesError(
            f"{self.num_corrupt} of {self.num_read} stored segments of streams are corrupt, "
            f"data.max_bad_fraction allows {self.max_fraction:g} (raise it to continue without "
            f"them); the last error: {_with_fix(last)}"
        )


def _with_fix(skipped: Mapping[str, Any]) -> str:
    """Return the error of a corrupt sample, with a fix if it names none itself."""
    error = str(skipped["error"])
    return error if "; fix: " in error else f"{error}; {REBUILD_HINT}"


def init_worker(_worker_id: int) -> None:
    """Ignore signals that a terminal or scheduler sends to the whole process group.

    The trainer still needs its batch to finish the step and save. After that it stops the workers,
    at the latest by a SIGTERM of its own. They detect by themselves when it is gone.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    # A forked process ends by os._exit, but a spawned one by sys.exit, which takes the interpreter
    # apart first. A thread that needs it then, such as ours, can abort the process (SIGABRT).
    sys.exit = _exit_at_once


def _exit_at_once(code: object = None, /) -> NoReturn:
    """End this process with the exit code that ``sys.exit`` would give it."""
    os._exit(code if isinstance(code, int) else int(code is not None))


def _exit_with_parent(parent_pid: int) -> None:
    """End this process, whatever it waits for, once the trainer sends SIGTERM or is gone."""
    trainer = multiprocessing.parent_process()  # not the parent itself if a server forks workers
    while trainer is not None and trainer.is_alive() and os.getppid() == parent_pid:
        received = signal.sigtimedwait([signal.SIGTERM], _PARENT_CHECK_S)
        if received is not None and received.si_pid == trainer.pid:
            break
    os._exit(0)
