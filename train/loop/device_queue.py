"""What the feed asks of a device that computes while the host does something else.

Such a device has a queue: work is launched and done later, in turn. A mark in it is reached when
all that was launched before is done. Batches are copied beside the queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from train.data.device import send, tensors_of

if TYPE_CHECKING:
    from train.loop.prefetch import Batch


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
