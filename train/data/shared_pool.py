"""Recycled memory for batches: a pool of slots that the loader processes share.

::

    main process                           loader process
    acquire() -> slot number  ---------->  arrays(slot)   decodes straight into them
    view(slot)  <- slot number  <--------
      the batch's arrays; when the last array or tensor that views them is gone, the slot is free

Only numbers cross between processes. The main process alone knows which slots are free, and it
sends a slot along with the work. No process waits for a slot, so nothing can deadlock, and no slot
is overwritten while a view of it exists. New memory costs a page fault per 4 KiB, several times the
cost of writing to it; a slot pays that once, not for every batch.

The memory is an unnamed file (memfd_create; where that is refused, a file in the folder of
temporary files). The limit of /dev/shm does not apply, forked and spawned processes both get it,
and it disappears with the last of them, however they end. Pages are allocated when they are first
written. The first `num_recycled` slots keep their pages. If the
consumer holds more batches than that, further slots are used, and their pages are released with the
batch.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import weakref
from multiprocessing.reduction import DupFd
from tempfile import TemporaryFile, gettempdir
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.errors import EngineError
from shared.machine import (
    TOO_MANY_OPEN,
    machine_error,
    naming_path,
    temporary_folder_error,
    warn_once,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from train.data.batch import ArrayForm

_ALIGNMENT_BYTES = 64
"""Arrays start at a cache line, slots at a page."""


class SharedBatchPool:
    """A pool of slots, each for the arrays of one batch.

    Args:
        num_recycled: slots that keep their memory: as many as are being made or held at any time.

    Attributes:
        slot_bytes: memory of one slot.
        num_recycled: see above.
        num_slots: the most batches that can be held; they would fill the machine's memory.
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
        self._free_resident = list(reversed(range(num_recycled)))
        self._free_released: list[int] = []
        self._num_used = num_recycled
        self._owner_pid = os.getpid()
        fd, self._is_on_disk = _make_file(self.num_slots * self.slot_bytes)
        self._map(fd)
        self._allocate(0, num_recycled)

    def acquire(self) -> int:
        """Return the number of a free slot, if possible one whose memory is resident.

        Raises:
            EngineError: the batches that are held fill the machine's memory.
        """
        for free in (self._free_resident, self._free_released):
            try:
                return free.pop()
            except IndexError:  # checking first would race with other threads
                continue
        if self._num_used == self.num_slots:
            raise EngineError(
                f"{self.num_slots} batches of {self.slot_bytes >> 20} MiB are held at once, as "
                "much as this machine's memory (or a quarter of `ulimit -v`, or `ulimit -f`); fix: "
                "drop references to finished batches and copy the tensors that you keep"
            )
        self._allocate(self._num_used, self._num_used + 1)
        self._num_used += 1
        return self._num_used - 1

    def arrays(self, slot: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of an acquired slot for writing; their content is undefined."""
        start = slot * self.slot_bytes
        return self._arrays_in(self._bytes[start : start + self.slot_bytes])

    def view(self, slot: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of a written slot, which is free when the last view of them is gone."""
        lease = _BufferLease(self._bytes.ctypes.data + slot * self.slot_bytes, self.slot_bytes)
        weakref.finalize(lease, self._free, slot).atexit = False
        return self._arrays_in(np.asarray(lease))

    def pin(self) -> None:
        """Lock the recycled slots into memory, so that a GPU can copy from them asynchronously.

        Call it after the loader processes have started: a forked process may lack pinned pages.

        Raises:
            EngineError: the driver refuses.
        """
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address, length = self._bytes.ctypes.data, self.num_recycled * self.slot_bytes
        error = int(runtime.cudaHostRegister(address, length, 0))
        if error:
            raise EngineError(
                f"CUDA can't lock the loader's {length >> 20} MiB of memory (cudaHostRegister: "
                f"error {error}); fix: lower data.num_workers, data.prefetch_batches or "
                "data.batch_size"
            )
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a spawned process, which maps the same memory."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_bytes")}
        return {**state, "_fd": DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fd = state.pop("_fd").detach()
        self.__dict__.update(state)
        self._map(fd)

    def _allocate(self, start: int, stop: int) -> None:
        """Reserve the disk space of slots; writing a mapping on a full disk kills the process."""
        if self._is_on_disk and stop > start:
            try:
                length_bytes = (stop - start) * self.slot_bytes
                os.posix_fallocate(self._fd, start * self.slot_bytes, length_bytes)
            except OSError as error:
                raise temporary_folder_error(error, "the loader's batches") from error

    def _free(self, slot: int) -> None:
        """Return a slot to the pool, and its pages to the system if it is not recycled."""
        if os.getpid() != self._owner_pid:  # this process was forked while batches were held
            return
        if slot < self.num_recycled:
            self._free_resident.append(slot)
        else:
            if not self._is_on_disk:  # there, the space stays reserved
                self._memory.madvise(mmap.MADV_REMOVE, slot * self.slot_bytes, self.slot_bytes)
            self._free_released.append(slot)

    def _map(self, fd: int) -> None:
        """Map the whole file into this process."""
        self._fd = fd
        weakref.finalize(self, os.close, fd).atexit = False
        with naming_path("the loader's memory"):
            self._memory = mmap.mmap(fd, self.num_slots * self.slot_bytes)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)

    def _arrays_in(self, memory: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return the arrays in one slot's memory."""
        return {
            name: np.ndarray(form.shape, form.dtype, memory, offset)
            for name, (offset, form) in self._forms.items()
        }


class _BufferLease:
    """One use of a slot: the object that all arrays and tensors of one batch keep alive.

    A view of the whole memory would not do: in NumPy a view of a view refers to the original
    array only. The finalizer refers to the pool, so that the memory outlives the lease.
    """

    def __init__(self, address: int, length_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (length_bytes,),
            "typestr": "|u1",
        }


def _make_file(length_bytes: int) -> tuple[int, bool]:
    """Create an unnamed file of zeros; return its descriptor, and whether it is on a disk."""
    is_on_disk = False
    try:
        fd = os.memfd_create("batches")
    except OSError as error:
        if error.errno in TOO_MANY_OPEN:
            raise machine_error(error, "the loader's memory") from error
        warn_once(
            f"memory without a name is refused (memfd_create: {error.strerror}); batches are kept "
            f"in a file in {gettempdir()}, which is slower on a disk; fix: set TMPDIR to a folder "
            "in memory, or allow memfd_create in this container"
        )
        fd, is_on_disk = _make_temporary_file(), True
    try:
        os.ftruncate(fd, length_bytes)
    except OSError as error:
        os.close(fd)
        raise EngineError(
            f"the loader's batches need {length_bytes >> 20} MiB of shared memory: "
            f"{error.strerror}; fix: raise `ulimit -f`, or lower data.num_workers, "
            "data.prefetch_batches or data.batch_size"
        ) from error
    return fd, is_on_disk


def _make_temporary_file() -> int:
    """Create a file in the folder of temporary files, remove its name and return its descriptor."""
    try:
        with TemporaryFile(prefix="batches-") as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise temporary_folder_error(error, "the loader's batches") from error


def _reservable_bytes() -> int:
    """Return how much address space to reserve.

    That is the machine's memory, at most a quarter of what `ulimit -v` allows the process and all
    that `ulimit -f` allows a file.
    """
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    shares = {resource.RLIMIT_AS: 4, resource.RLIMIT_FSIZE: 1}
    limits = [(resource.getrlimit(limit)[0], share) for limit, share in shares.items()]
    allowed = [limit // share for limit, share in limits if limit != resource.RLIM_INFINITY]
    return min([memory_bytes, *allowed])


def _round_up(length: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `length`."""
    return -(-length // step) * step
