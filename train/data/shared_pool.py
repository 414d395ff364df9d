"""Memory that batches are made in and that is used again: slots shared with the loader processes.

::

    main process                         loader process
    acquire() -> slot number  ---------->  arrays(slot)   decodes straight into them
    view()    <- slot number  <----------
      the batch's arrays; when the last array or tensor that looks into them is gone,
      the slot is free to be taken again

Only numbers cross. Whether a slot is free is known to the main process alone, which gives it to a
loader process together with the work: nobody waits for a slot, so nothing can lock up, and no slot
is written to that somebody still looks into. New memory costs a page fault per 4 KiB, several times
the price of writing to it; that is paid once per slot, not once per batch.

The memory is a file without a name (memfd_create): no limit of /dev/shm counts, other processes get
it whether they are forked or spawned, and it is gone with the last of them, however they end. Its
pages are there when they are first written. The first `num_recycled` slots keep theirs; where the
consumer holds more batches than that, further slots are used, and their pages go back to the system
with the batch.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import weakref
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from train.data.batch import ArrayForm

_ALIGNMENT_BYTES = 64
"""Arrays begin at a cache line; slots begin at a page."""


class SharedBatchPool:
    """Slots, each for the arrays of one batch.

    Args:
        forms: the arrays of a batch.
        num_recycled: slots whose memory is kept: as many as are in work or held at any time.

    Attributes:
        slot_bytes: memory of one slot.
        num_recycled: as given.
    """

    def __init__(self, forms: Mapping[str, ArrayForm], *, num_recycled: int) -> None:
        self.num_recycled = num_recycled
        self._forms: dict[str, tuple[int, ArrayForm]] = {}
        end = 0
        for name, form in forms.items():
            self._forms[str(name)] = (end, form)
            end += _round_up(math.prod(form.shape) * form.dtype.itemsize, _ALIGNMENT_BYTES)
        self.slot_bytes = _round_up(max(end, 1), mmap.PAGESIZE)
        self.num_slots = max(num_recycled, _reservable_bytes() // self.slot_bytes)
        """Nobody can hold more batches than fit in the machine's memory."""
        self._free_resident = list(reversed(range(num_recycled)))
        self._free_released: list[int] = []
        self._num_used = num_recycled
        self._owner_pid = os.getpid()
        self._map(_make_file(self.num_slots * self.slot_bytes))

    def acquire(self) -> int:
        """The number of a free slot; one whose memory is there already, if possible.

        Raises:
            EngineError: the batches that are held fill the machine's memory.
        """
        for free in (self._free_resident, self._free_released):
            try:
                return free.pop()
            except IndexError:  # asking first is no use: other threads may free and take as well
                continue
        if self._num_used == self.num_slots:
            raise EngineError(
                f"{self.num_slots} batches of {self.slot_bytes >> 20} MiB are held at once, as "
                "much as this machine's memory (or a quarter of `ulimit -v`, or `ulimit -f`); let "
                "go of batches that are done, copy what you keep of them"
            )
        self._num_used += 1
        return self._num_used - 1

    def arrays(self, slot: int) -> dict[str, NDArray[Any]]:
        """The arrays of a slot that was taken, to be written; they hold anything."""
        start = slot * self.slot_bytes
        return self._cut(self._bytes[start : start + self.slot_bytes])

    def view(self, slot: int) -> dict[str, NDArray[Any]]:
        """The arrays of a slot that was written; it is free when the last view of them is gone."""
        lease = _BufferLease(self._bytes.ctypes.data + slot * self.slot_bytes, self.slot_bytes)
        weakref.finalize(lease, self._free, slot).atexit = False
        return self._cut(np.asarray(lease))

    def pin(self) -> None:
        """Lock the recycled slots into memory, so that a GPU can copy from them by itself.

        To be called once the loader processes have been started: what is locked need not be there
        in a forked process.

        Raises:
            EngineError: the driver refuses.
        """
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address, length = self._bytes.ctypes.data, self.num_recycled * self.slot_bytes
        error = int(runtime.cudaHostRegister(address, length, 0))
        if error:
            raise EngineError(
                f"CUDA can't lock the loader's {length >> 20} MiB of memory (cudaHostRegister: "
                f"error {error}); lower data.num_workers, data.prefetch_batches or data.batch_size"
            )
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned process, which gets the same memory; it only writes what others took."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_bytes")}
        return {**state, "_fd": DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fd = state.pop("_fd").detach()
        self.__dict__.update(state)
        self._map(fd)

    def _free(self, slot: int) -> None:
        if os.getpid() != self._owner_pid:  # a process forked while batches were held
            return
        if slot < self.num_recycled:
            self._free_resident.append(slot)
        else:
            self._memory.madvise(mmap.MADV_REMOVE, slot * self.slot_bytes, self.slot_bytes)
            self._free_released.append(slot)

    def _map(self, fd: int) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd).atexit = False
        self._memory = mmap.mmap(fd, self.num_slots * self.slot_bytes)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)

    def _cut(self, memory: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Memory of one slot as its arrays."""
        return {
            name: np.ndarray(form.shape, form.dtype, memory, offset)
            for name, (offset, form) in self._forms.items()
        }


class _BufferLease:
    """One use of a slot: the object that all arrays and tensors of one batch keep alive.

    A view of the whole memory would not do: NumPy lets a view of a view hold only the first. The
    memory itself outlives it by the finalizer, which holds the ring.
    """

    def __init__(self, address: int, length_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (length_bytes,),
            "typestr": "|u1",
        }


def _make_file(length_bytes: int) -> int:
    """A file without a name, of zeros; its descriptor.

    Raises:
        EngineError: it may not be as long.
    """
    fd = os.memfd_create("batches")
    try:
        os.ftruncate(fd, length_bytes)
    except OSError as error:
        os.close(fd)
        raise EngineError(
            f"the loader's batches need {length_bytes >> 20} MiB of shared memory: "
            f"{error.strerror}; raise `ulimit -f`, or lower data.num_workers, "
            "data.prefetch_batches or data.batch_size"
        ) from error
    return fd


def _reservable_bytes() -> int:
    """Addresses to reserve: as many as there is memory, or a quarter of those that `ulimit -v`
    leaves to the process, or what `ulimit -f` lets a file have.
    """
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    shares = {resource.RLIMIT_AS: 4, resource.RLIMIT_FSIZE: 1}
    limits = [(resource.getrlimit(limit)[0], share) for limit, share in shares.items()]
    allowed = [limit // share for limit, share in limits if limit != resource.RLIM_INFINITY]
    return min([memory_bytes, *allowed])


def _round_up(length: int, step: int) -> int:
    return -(-length // step) * step
