"""Batches on the training device, those of the next step already on their way.

On CUDA a step's batches are fetched ahead, right after the step before was launched: their copies
run on a side stream while it computes, and nobody waits for them but the device. On the CPU nothing
is copied and nothing fetched ahead.
Either way the position that goes into checkpoints is that of the batches handed out, not of those
fetched.

Two kinds of loader work: ours, which knows its position (``state_at``, ``load_state_dict``) and
never ends, and any finite iterable such as a plain ``DataLoader``, which is repeated pass after
pass. The random state that a plain loader shuffles by is a function of (seed, pass), so that a
resumed run skips to the same place in the same order.
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

    from train.data.batch import Batch

PASS_SEED_STRIDE: Final = 1_000_003
"""Distance of the seeds of successive passes, so that neighbouring seeds share no pass."""


@runtime_checkable
class PositionedLoader(Protocol):
    """A loader that goes on forever and can start anywhere."""

    def state_at(self, next_batch: int) -> dict[str, Any]:
        """Plain values from which the loader goes on with batch `next_batch`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; before iteration only."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Batches, each with its "index"."""
        ...


class BatchFeed:
    """Hands out batches on the device.

    Args:
        loader: any iterable of batches.
        device: where the batches go.
        seed: decides the order of a plain loader that shuffles.
        state: of an earlier feed; None starts at the beginning.
        queue: of a device that computes beside the host; None: the device's, where it has one.

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
        self._loader = loader
        self._device = device
        self._position = initial_position(loader, state)
        self._batches = iterate(loader, seed=seed, position=self._position)
        # Loader processes may ignore SIGTERM, which multiprocessing sends at exit and then waits
        # for ever; it registered its own exit function before, so this one runs first.
        atexit.register(_close_if_alive, weakref.ref(self))
        self._ahead: deque[tuple[Batch, dict[str, int]]] = deque()
        self._num_taken = 1
        self._waits_s: list[float] = []
        self._wait_s = 0.0
        self._queue = queue or queue_of(device)
        self._gaps: list[tuple[Mark, Mark]] = []
        self._launched: Mark | None = None
        # The loader's memory is written to again as soon as nobody holds a batch, and it is not
        # torch's own, which would wait for copies by itself.
        self._held: deque[tuple[Batch, Mark]] = deque()
        weakref.finalize(self, _let_go, self._held, at_most=0)

    def take(self, count: int = 1) -> list[Batch]:
        """The next `count` batches, on the device; the beginning of a step."""
        batches = []
        for _ in range(count):
            batch, self._position = self._ahead.popleft() if self._ahead else self._pull()
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
        """Fetch as many batches as were taken last, while the device computes; call it once a
        step's work is launched.
        """
        if self._queue is not None and not self._ahead:
            self._launched = self._queue.mark()
            for _ in range(self._num_taken):
                self._ahead.append(self._pull())

    def state(self) -> dict[str, Any]:
        """Plain values from which another feed goes on behind the last batch handed out.

        A loader's own ``state_at``, or "pass" and "next_batch" of a plain one.
        """
        if isinstance(self._loader, PositionedLoader):
            return self._loader.state_at(self._position["next_batch"])
        return dict(self._position)

    def close(self) -> None:
        """Dismiss the loader's processes; the position stays."""
        self._ahead.clear()
        self._batches.close()
        _let_go(self._held, at_most=0)

    def take_waits_s(self) -> list[float]:
        """Seconds that each step since the last call waited for its data.

        On CUDA: only what the device stood still for, so call it when the device has finished.
        """
        waits_s, self._waits_s = self._waits_s, []
        gaps, self._gaps = self._gaps, []
        for index, (end, start) in enumerate(reversed(gaps), start=1):
            start.synchronize()
            waits_s[-index] = min(waits_s[-index], end.elapsed_time(start) / 1e3)
        return waits_s

    def _pull(self) -> tuple[Batch, dict[str, int]]:
        """The next batch, on the device or on its way, and the position behind it."""
        _let_go(self._held, at_most=2 * self._num_taken - 1)  # as many have a slot, see loader.py
        began_s = time.perf_counter()
        batch, position = next(self._batches)
        self._wait_s += time.perf_counter() - began_s
        if self._queue is None:
            return to_device(batch, self._device), position
        sent, mark = self._queue.send(batch)
        self._held.append((batch, mark))
        return sent, position


def initial_position(loader: Iterable[Batch], state: Mapping[str, Any] | None) -> dict[str, int]:
    """Bring a loader to `state` (None: its beginning) and return the position.

    Raises:
        CheckpointError: the state is of another kind of loader.
    """
    if state is None:
        return {"next_batch": 0, **({} if isinstance(loader, PositionedLoader) else {"pass": 0})}
    position = position_in(loader, state)
    if isinstance(loader, PositionedLoader):
        loader.load_state_dict(dict(state))
    return position


def position_in(loader: Iterable[Batch], state: Mapping[str, Any]) -> dict[str, int]:
    """Where in a loader a state is; the loader stays where it is.

    Raises:
        CheckpointError: the state is of another kind of loader.
        ConfigError: it is of other data or another order, where the loader can tell.
    """
    if isinstance(loader, PositionedLoader) == ("pass" in state):
        raise CheckpointError(
            "the checkpoint's stream position is of another kind of loader than this one (shards "
            "and a plain DataLoader can't continue each other); give the loader that the run began "
            "with"
        )
    if hasattr(loader, "position_of"):  # of ours, whose batches may have another size now
        return {"next_batch": loader.position_of(state)}
    names = ("next_batch",) if isinstance(loader, PositionedLoader) else ("pass", "next_batch")
    return {name: int(state[name]) for name in names}


def iterate(
    loader: Iterable[Batch], *, seed: int, position: Mapping[str, int]
) -> Generator[tuple[Batch, dict[str, int]], None, None]:
    """Batches without end, each with the position behind it.

    What a plain loader draws at random while it skips to `position` is drawn by this call and not
    by the iterator, so that the caller can put the random state of a checkpoint back in between.

    Raises:
        ConfigError: the loader has no batch, or its batches are not of the right form.
    """
    if isinstance(loader, PositionedLoader):
        return _positioned(loader, seed=seed)
    opened = _open_pass(loader, seed=seed, number=position["pass"])
    for _ in range(position["next_batch"]):
        next(opened, None)
    return _passes(loader, opened, seed=seed, position=position)


def _positioned(
    loader: PositionedLoader, *, seed: int
) -> Generator[tuple[Batch, dict[str, int]], None, None]:
    for batch in _open_pass(loader, seed=seed, number=0):
        yield batch, {"next_batch": int(batch["index"]) + 1}


def _passes(
    loader: Iterable[Batch], opened: Iterator[Batch], *, seed: int, position: Mapping[str, int]
) -> Generator[tuple[Batch, dict[str, int]], None, None]:
    number, start = position["pass"], position["next_batch"]
    while True:
        for index, batch in enumerate(opened, start=start):
            yield batch, {"pass": number, "next_batch": index + 1}
        number, start = number + 1, 0
        opened = _open_pass(loader, seed=seed, number=number)


def _open_pass(loader: Iterable[Batch], *, seed: int, number: int) -> Iterator[Batch]:
    """One pass over a loader, opened apart from the run's random state.

    torch's DataLoader draws its shuffle and its workers' seed while it opens and gives its first
    batch; a resumed run opens it once more than the uninterrupted one.
    """
    with separate_rng(seed + PASS_SEED_STRIDE * number):
        batches = iter(loader)
        first = next(batches, None)
    if first is None:
        raise ConfigError("the loader has no batch; is there any sample in its train split?")
    weight = first.get("weight")
    if weight is not None and weight.ndim != 1:
        raise ConfigError(
            f"the loader's batches have weights {list(weight.shape)}, expected [samples]: "
            "each window of a RealMultiModalDataset is a batch of one already; give the DataLoader "
            "collate_fn=real_data_collate_fn, which joins them"
        )
    return itertools.chain(iter([first]), batches)  # a list would be held as long as the chain


def one_epoch(
    loader: Iterable[Batch], device: torch.device, *, max_batches: int
) -> Iterator[Batch]:
    """At most `max_batches` batches on the device, all of the epoch that the first one is of."""
    epochs = set()
    for batch in itertools.islice(loader, max_batches):
        epochs.add(batch.get("epoch"))
        if len(epochs) > 1:
            return
        yield to_device(batch, device)


def _close_if_alive(feed: weakref.ref[BatchFeed]) -> None:
    if (alive := feed()) is not None:
        alive.close()


def _let_go(held: deque[tuple[Batch, Mark]], *, at_most: int) -> None:
    """Let go of batches that have been copied; wait for those that are more than `at_most`."""
    while held and (len(held) > at_most or held[0][1].query()):
        held[0][1].synchronize()
        held.popleft()


class Mark(Protocol):
    """A place in the work of a device."""

    def query(self) -> bool:
        """Whether it was reached."""
        ...

    def synchronize(self) -> None:
        """Wait until it is reached."""
        ...

    def elapsed_time(self, later: Any, /) -> float:  # noqa: ANN401 (a mark of the same device)
        """Milliseconds from this mark to a later one, both reached."""
        ...


class DeviceQueue(Protocol):
    """A device's queue of work, and its way for copies."""

    def mark(self) -> Mark:
        """A mark behind all work that was launched."""
        ...

    def send(self, batch: Batch) -> tuple[Batch, Mark]:
        """Begin to copy a batch: what it will be on the device, and a mark behind the copies, until
        which the given one has to stay.
        """
        ...

    def receive(self, batch: Batch) -> None:
        """Let what is launched from now on wait for a batch that was sent."""
        ...


class CudaQueue:
    """The current stream of a GPU, and a side stream for the copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        """An event in the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def send(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Copy on the side stream."""
        with torch.cuda.stream(self._copies):
            return send(batch, self._device), self.mark()

    def receive(self, batch: Batch) -> None:
        """Tell the allocator, too, that the current stream uses what the side stream made."""
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._copies)
        for tensor in tensors_of(batch):
            tensor.record_stream(compute)


def queue_of(device: torch.device) -> CudaQueue | None:
    """The queue of a GPU; None for the CPU, which computes when it is told to."""
    return CudaQueue(device) if device.type == "cuda" else None
