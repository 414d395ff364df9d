"""BatchFeed: batches on the training device, with the next step's batches prefetched.

::

    loader -> as_resumable -> iter_endless -> DeviceQueue.send -> ahead
        -> DeviceQueue.receive -> take

On CUDA a step's batches are prefetched right after the previous step was launched: they are copied
on a side stream while the device computes, and the host does not wait for the copies. On the CPU
nothing is copied and nothing prefetched. Either way, the position that goes into checkpoints is the
one after the batches handed out, not after those prefetched.

Any iterable of batches works. A loader that knows its position (``ResumableLoader``) never ends. A
finite iterable, such as a plain ``DataLoader``, is wrapped in a ``PlainLoader``, which repeats it
pass after pass.
"""

from __future__ import annotations

import atexit
import itertools
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import torch

from shared.errors import CheckpointError, ConfigError
from train.data.device import send, tensors_of, to_device
from train.machine.runtime import separate_rng

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping
    from pathlib import Path

    from train.data.batch import Batch

PASS_SEED_STRIDE: Final = 1_000_003
"""Difference between the seeds of successive passes, so that neighboring seeds share no pass."""


@runtime_checkable
class ResumableLoader(Protocol):
    """A loader that never ends and can start at any batch."""

    def state_at(self, next_batch: int) -> dict[str, Any]:
        """Return plain values from which a loader resumes with batch `next_batch`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a state; allowed before iteration only."""

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over batches, each with its "index"."""


class BatchFeed:
    """Hands out batches on the device.

    Args:
        seed: decides the order of a plain loader that shuffles.
        state: of an earlier feed; None starts at the beginning.
        queue: of a device that computes asynchronously; None: the device's own, if it has one.

    Raises:
        CheckpointError: `state` is of another kind of loader.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        device: torch.device,
        *,
        seed: int,
        state: Mapping[str, Any] | None = None,
        queue: DeviceQueue | None = None,
    ) -> None:
        self._loader = as_resumable(loader, seed=seed)
        self._device = device
        next_batch = 0
        if state is not None:
            next_batch = resume_index(self._loader, state)
            self._loader.load_state_dict(dict(state))
        self._state = self._loader.state_at(next_batch)
        self._batches = iter_endless(self._loader, seed=seed)
        # Loader processes may ignore SIGTERM, which multiprocessing sends at exit before it waits
        # for them forever. It registered its own exit function earlier, so this one runs first.
        atexit.register(_close_if_alive, weakref.ref(self))
        self._ahead: deque[tuple[Batch, dict[str, Any]]] = deque()
        self._num_taken = 1
        self._waits_s: list[float] = []
        self._wait_s = 0.0
        self._queue = queue or make_queue(device)
        self._gaps: list[tuple[Mark, Mark]] = []
        self._launched: Mark | None = None
        # The loader reuses a batch's memory as soon as the batch is unreferenced. Unlike torch's
        # own allocator it does not wait for copies, so batches that are being copied are kept here.
        self._copying: deque[tuple[Batch, Mark]] = deque()
        weakref.finalize(self, _release_copied, self._copying, at_most=0)

    def take(self, count: int = 1) -> list[Batch]:
        """Return the next `count` batches on the device; called at the beginning of a step."""
        batches = []
        for _ in range(count):
            batch, self._state = self._ahead.popleft() if self._ahead else self._pull()
            if self._queue is not None:
                self._queue.receive(batch)
            batches.append(batch)
        if self._queue is not None and self._launched is not None:
            self._gaps.append((self._launched, self._queue.mark()))
        self._num_taken = count
        self._waits_s.append(self._wait_s)
        self._wait_s = 0.0
        return batches

    def fetch_ahead(self) -> None:
        """Fetch as many batches as were taken last, while the device computes.

        Call it once a step's work is launched.
        """
        if self._queue is not None and not self._ahead:
            self._launched = self._queue.mark()
            for _ in range(self._num_taken):
                self._ahead.append(self._pull())

    def state(self) -> dict[str, Any]:
        """Return plain values from which another feed resumes after the last batch handed out."""
        return dict(self._state)

    def close(self) -> None:
        """Stop the loader's processes; the position stays."""
        self._ahead.clear()
        self._batches.close()
        _release_copied(self._copying, at_most=0)

    def take_waits_s(self) -> list[float]:
        """Return how many seconds each step since the last call waited for its data.

        On CUDA only the time during which the device was idle counts, so call it when the device
        has finished.
        """
        waits_s, self._waits_s = self._waits_s, []
        gaps, self._gaps = self._gaps, []
        # The last gaps belong to the last waits; the first step has no gap before it.
        for index, (end, start) in enumerate(reversed(gaps), start=1):
            start.synchronize()
            waits_s[-index] = min(waits_s[-index], end.elapsed_time(start) / 1e3)
        return waits_s

    def _pull(self) -> tuple[Batch, dict[str, Any]]:
        """Fetch the next batch, copied or being copied, and the state after it."""
        # The loader's memory has slots for this many batches, see loader.py.
        _release_copied(self._copying, at_most=2 * self._num_taken - 1)
        began_s = time.perf_counter()
        batch = next(self._batches)
        self._wait_s += time.perf_counter() - began_s
        state = self._loader.state_at(int(batch["index"]) + 1)
        if self._queue is None:
            return to_device(batch, self._device), state
        sent, mark = self._queue.send(batch)
        self._copying.append((batch, mark))
        return sent, state


def as_resumable(loader: Iterable[Batch], *, seed: int) -> ResumableLoader:
    """Return the loader itself if it knows its position, else a :class:`PlainLoader` around it."""
    return loader if isinstance(loader, ResumableLoader) else PlainLoader(loader, seed=seed)


def resume_index(
    loader: Iterable[Batch], state: Mapping[str, Any], *, origin: Path | str = "the checkpoint"
) -> int:
    """Return the index of the batch at which a loader would resume; the loader is not changed.

    `origin`: the file of the state, for messages.

    Raises:
        CheckpointError: the state is of another kind of loader.
        ConfigError: it is of other data or another order, if the loader can tell.
    """
    is_plain = isinstance(loader, PlainLoader) or not isinstance(loader, ResumableLoader)
    if is_plain != ("pass" in state):
        raise CheckpointError(
            f"{origin}: its stream position is of another kind of loader: a run on shards cannot "
            "continue one on a plain DataLoader, nor the reverse; fix: to start a new run, move "
            "the model_*.pt there to another folder, or set training.checkpointing.save_dir to "
            "another one; to continue the old run, use the kind of loader that it began with"
        )
    if hasattr(loader, "resume_index"):  # converts positions of other batch sizes
        return int(loader.resume_index(state))
    return int(state["next_batch"])


def iter_endless(loader: ResumableLoader, *, seed: int) -> Generator[Batch, None, None]:
    """Iterate over a loader's batches without end, apart from the run's random state.

    What a plain loader draws at random while it skips to its position, it draws during this call
    and not while iterating. So the caller can restore a checkpoint's random state in between.
    """
    return loader.open() if isinstance(loader, PlainLoader) else _iterate_lazily(loader, seed=seed)


class PlainLoader:
    """Repeats a finite iterable of batches, and knows its position: the pass, and the batch in it.

    The random state that the iterable shuffles by is a function of (seed, pass), so a resumed run
    skips to the same batch of the same order. Batches get an "index" that counts on over passes.
    """

    def __init__(self, batches: Iterable[Batch], *, seed: int) -> None:
        self._source = batches
        self._seed = seed
        self._pass = 0
        self._pass_start = 0  # index of the pass's first batch
        self._next = 0

    def state_at(self, next_batch: int) -> dict[str, Any]:
        """Return the position of a batch of the current pass, or the one after its last batch."""
        return {"pass": self._pass, "next_batch": next_batch - self._pass_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume at a position; allowed before iteration only."""
        self._pass, self._next = int(state["pass"]), int(state["next_batch"])

    def __iter__(self) -> Iterator[Batch]:
        return self.open()

    def open(self) -> Generator[Batch, None, None]:
        """Open the current pass, skip to the position, and iterate from there without end."""
        batches = self._open_pass()
        for _ in range(self._next):
            next(batches, None)
        return self._repeat(batches)

    def _repeat(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        index = self._next
        while True:
            for batch in batches:
                yield {**batch, "index": index}
                index += 1
            self._pass, self._pass_start = self._pass + 1, index
            batches = self._open_pass()

    def _open_pass(self) -> Iterator[Batch]:
        return _open_pass(self._source, seed=self._seed + PASS_SEED_STRIDE * self._pass)


def _iterate_lazily(loader: ResumableLoader, *, seed: int) -> Generator[Batch, None, None]:
    yield from _open_pass(loader, seed=seed)


def _open_pass(batches: Iterable[Batch], *, seed: int) -> Iterator[Batch]:
    """Open one pass over a loader without changing the run's random state.

    torch's DataLoader draws its shuffle and its workers' seed while it opens and yields its first
    batch. A resumed run opens it once more than the uninterrupted one.
    """
    with separate_rng(seed):
        iterator = iter(batches)
        first = next(iterator, None)
    if first is None:
        raise ConfigError("the loader has no batch; fix: check that its train split has a sample")
    weight = first.get("weight")
    if weight is not None and weight.ndim != 1:
        raise ConfigError(
            f"the loader's batches have weights of shape {list(weight.shape)}, expected [samples]: "
            "each window of a RealMultiModalDataset already is a batch of one; fix: give the "
            "DataLoader collate_fn=real_data_collate_fn, which joins them"
        )
    return itertools.chain(iter([first]), iterator)  # a list would be held as long as the chain


def _close_if_alive(feed: weakref.ref[BatchFeed]) -> None:
    if (alive := feed()) is not None:
        alive.close()


def _release_copied(copying: deque[tuple[Batch, Mark]], *, at_most: int) -> None:
    """Release batches that are copied; wait for copies until at most `at_most` batches are left."""
    while copying and (len(copying) > at_most or copying[0][1].query()):
        copying[0][1].synchronize()
        copying.popleft()


class Mark(Protocol):
    """A point in a device's queue, reached when all work launched before it is done."""

    def query(self) -> bool:
        """Return whether the mark was reached."""

    def synchronize(self) -> None:
        """Wait until the mark is reached."""

    def elapsed_time(self, later: Any, /) -> float:  # noqa: ANN401 (a mark of the same device)
        """Return the milliseconds from this mark to a later one; both were reached."""


class DeviceQueue(Protocol):
    """The queue of a device that computes asynchronously, with a second queue for copies."""

    def mark(self) -> Mark:
        """Return a mark after all work launched so far."""

    def send(self, batch: Batch) -> tuple[Batch, Mark]:
        """Begin to copy a batch; return it on the device, and a mark after the copies.

        The given batch must be kept until the mark is reached.
        """

    def receive(self, batch: Batch) -> None:
        """Make work that is launched from now on wait for a batch that was sent."""


class CudaQueue:
    """The current stream of a GPU, and a side stream for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        """Record an event in the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def send(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Copy a batch on the side stream."""
        with torch.cuda.stream(self._copies):
            return send(batch, self._device), self.mark()

    def receive(self, batch: Batch) -> None:
        """Make the current stream wait for copies; tell the allocator that it uses their memory."""
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._copies)
        for tensor in tensors_of(batch):
            tensor.record_stream(compute)


def make_queue(device: torch.device) -> CudaQueue | None:
    """Return the queue of a GPU, or None for the CPU, which computes synchronously."""
    return CudaQueue(device) if device.type == "cuda" else None
