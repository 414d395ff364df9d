"""The machine that a run uses: device, number format, random state, memory and stop signals.

The functions are small and take plain values, so a test without a GPU can call every one of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from shared.errors import ConfigError, EngineError
from shared.interrupts import REPEAT_S, ending_signals, ignore_lost_terminal, write_line

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterator, Mapping

Precision = Literal["auto", "fp32", "bf16", "fp16"]

BYTES_PER_MB = 2**20
_DEVICES = 'use "auto", "cpu", "cuda" or "cuda:N"'
_FIRST_SCALE = 2.0**16
_HOST_ALLOCATOR = "DefaultCPUAllocator"
_SMALLER_BATCHES = (
    "Reduce data.batch_size and raise training.accumulation_steps by the same factor (each step "
    "then has the same samples, and `--resume auto` accepts it), or set "
    "model.gradient_checkpointing: true"
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; "auto" means cuda if there is a GPU, else cpu.

    A GPU that is named by its number becomes the current one.

    Raises:
        ConfigError: the machine has no such device, or this software does not support it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; fix: {_DEVICES}") from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device {name!r} is not supported; fix: {_DEVICES}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigError(
                f'device is "{name}", but torch {torch.__version__} sees no CUDA GPU; fix: use '
                'device="auto" or "cpu", or install the driver and a CUDA build of torch'
            )
        if (device.index or 0) >= count:
            raise ConfigError(
                f'device is "{name}", but this machine has {count} GPUs; fix: use one of cuda:0 '
                f"to cuda:{count - 1}"
            )
        if device.index is not None:
            torch.cuda.set_device(device)  # events and pinned memory belong to the current one
    return device


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the forward pass's dtype; "auto" means bfloat16 on a GPU that has it, else float32.

    Raises:
        ConfigError: bf16 on a GPU without it.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bf16 else torch.float32
    if precision == "bf16" and not has_bf16:
        raise ConfigError(
            "training.precision is bf16, but this GPU has no bfloat16 (it needs Ampere or newer); "
            "fix: use fp16 or auto"
        )
    return _DTYPES[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a mixed-precision forward pass; for float32 it does nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_scaler(
    device: torch.device, dtype: torch.dtype, *, num_ranks: int = 1
) -> torch.amp.GradScaler:
    """Make the loss scaler that float16 needs; for other dtypes it does nothing.

    Each rank multiplies its loss by the number of ranks, because gradients must be added and are
    averaged. Dividing the scale by that number keeps the values in float16 the same as in one
    process, so that they overflow at the same steps.
    """
    return torch.amp.GradScaler(
        device.type, init_scale=_FIRST_SCALE / num_ranks, enabled=dtype == torch.float16
    )


def scaler_state(scaler: torch.amp.GradScaler, *, num_ranks: int) -> dict[str, Any]:
    """Return a scaler's state as one process would have it; empty if nothing is scaled."""
    state: dict[str, Any] = scaler.state_dict()
    return {**state, "scale": state["scale"] * num_ranks} if state else state


def set_scaler_state(
    scaler: torch.amp.GradScaler, state: Mapping[str, Any], *, num_ranks: int
) -> None:
    """Restore :func:`scaler_state` for any number of ranks."""
    if scaler.is_enabled() and state:
        scaler.load_state_dict({**state, "scale": state["scale"] / num_ranks})


def choose_num_threads(
    num_threads: int | None, device: torch.device, *, num_workers: int, num_ranks: int = 1
) -> int:
    """Return the trainer's number of CPU threads.

    If it is not configured and the trainer computes on the CPU, it is one per core that no loader
    process and no other rank needs. More threads than free cores make training slower, because
    OpenMP's threads wait for each other: on 2 cores with 1 loader process, 2 threads gave
    6.6 samples/s and 1 thread 39.7.
    """
    if num_threads is not None:
        return num_threads
    if device.type != "cpu":
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // num_ranks - num_workers)


def set_up_math(*, num_threads: int) -> None:
    """Set the number of CPU threads, and use TF32 for float32 products on a GPU."""
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision("high")


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and Python's random."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rank_seed(seed: int, *, rank: int, step: int = 0) -> int:
    """Return the seed of a rank's own random numbers; at step 0, rank 0 has the run's seed."""
    return (seed + 1_000_033 * rank + 998_244_353 * step) % 2**63


def rng_state() -> dict[str, Any]:
    """Return the state of all random generators, as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss_next],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore :func:`rng_state`; states of GPUs that this machine does not have are ignored."""
    torch.set_rng_state(state["torch"].cpu())
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state.cpu(), index)
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


@contextlib.contextmanager
def separate_rng(seed: int | None = None) -> Iterator[None]:
    """Restore all random states at the end; with a seed, seed the generators inside."""
    before = rng_state()
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        set_rng_state(before)


def memory_allocated_mb(device: torch.device) -> float:
    """Return the peak CUDA memory since the last call, or on CPU the resident memory, in MiB."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / BYTES_PER_MB
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux; getrusage has the peak, in bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / BYTES_PER_MB
    return pages * os.sysconf("SC_PAGE_SIZE") / BYTES_PER_MB


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all launched work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Turn out-of-memory errors and lost loader processes into errors that say how to fix them.

    torch reports a lost process wherever the main thread is at that moment.
    """
    with translate_oom(), translate_worker_errors():
        yield


@contextlib.contextmanager
def translate_oom(fix: str = _SMALLER_BATCHES) -> Iterator[None]:
    """Turn torch's out-of-memory errors, of a GPU or the host, into an error with a fix."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        is_gpu = isinstance(error, torch.OutOfMemoryError)
        if not is_gpu and _HOST_ALLOCATOR not in reason:
            raise
        owner = "the GPU" if is_gpu else "the host"
        raise EngineError(f"{owner} ran out of memory: {reason}\n{fix}") from error


@contextlib.contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Turn torch's error about a lost loader process into an error that says how to fix it.

    Raises:
        EngineError: a loader process died or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip()
        if not reason.startswith(("DataLoader worker (pid", "DataLoader timed out")):
            raise
        raise EngineError(
            f"a loader process was lost: {reason.rstrip('.')}; fix: if it was killed, memory "
            "probably ran out, so lower data.num_workers, data.prefetch_batches or "
            "data.batch_size; if it crashed or did not answer, data.num_workers: 0 shows why"
        ) from error


class StopSignals:
    """Records the first Ctrl-C, SIGTERM or SIGHUP instead of ending the process.

    A context manager. Handlers are installed in the main thread only, and restored at the end.
    SIGHUP stays ignored if it is, as under nohup. A signal more than a second after the first has
    its usual effect, unless `ignores_repeats`.
    """

    def __init__(self, *, ignores_repeats: bool = False) -> None:
        self._ignores_repeats = ignores_repeats
        self.number = 0
        """The first signal that asked to stop, 0 if none did."""
        self._repeats_until_s = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._owner_pid = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            handler: Callable[[int, types.FrameType | None], None] = self._record
            self._previous = {n: signal.signal(n, handler) for n in ending_signals()}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        # A terminal also sends Ctrl-C to loader processes, which inherit this handler by fork. They
        # continue until the trainer, which needs their batches to finish its step, stops them.
        if os.getpid() != self._owner_pid:
            return
        if number == signal.SIGHUP:
            ignore_lost_terminal()
        if self.number == 0:
            self.number, self._repeats_until_s = number, time.monotonic() + REPEAT_S
            hint = "; press again to stop at once" if number == signal.SIGINT else ""
            write_line(f"\nStopping after this step and a checkpoint{hint}.")
        elif time.monotonic() > self._repeats_until_s and not self._ignores_repeats:
            signal.signal(number, self._previous[signal.Signals(number)])
            signal.raise_signal(number)
