"""The machine a run stands on: device, number format, random state, memory, and the wish to stop.

Small functions of plain values, so that a test without a GPU can call every one of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from shared.errors import ConfigError, EngineError

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterator, Mapping

Precision = Literal["auto", "fp32", "bf16", "fp16"]

BYTES_PER_MB = 2**20
_DEVICES = 'use "auto", "cpu", "cuda" or "cuda:N"'
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FIRST_SCALE = 2.0**16
_HOST_ALLOCATOR = "DefaultCPUAllocator"
_SMALLER_BATCHES = (
    "Reduce data.batch_size and raise training.accumulation_steps by the same factor (a step stays "
    "that of the same samples, and `--resume auto` goes on so), or set "
    "model.gradient_checkpointing: true"
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes cuda where there is one, else cpu.

    A GPU that is named by its number becomes the current one.

    Raises:
        ConfigError: no such device here, or one that nothing here has ever run on.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; {_DEVICES}") from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device {name!r} can't be trained or run on; {_DEVICES}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigError(
                f'device "{name}" was asked for, but torch {torch.__version__} sees no CUDA GPU '
                'here; use device="auto" or "cpu", or install the driver and a CUDA build of torch'
            )
        if (device.index or 0) >= count:
            raise ConfigError(
                f'device "{name}" was asked for, but there are {count} GPUs, from cuda:0 on'
            )
        if device.index is not None:
            torch.cuda.set_device(device)  # events and locked memory belong to the current one
    return device


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Number format of the forward pass; "auto" takes bfloat16 on a GPU that has it, else float32.

    Raises:
        ConfigError: bf16 on a GPU without it.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bf16 else torch.float32
    if precision == "bf16" and not has_bf16:
        raise ConfigError(
            "training.precision bf16: this GPU has no bfloat16 (it needs Ampere or newer); use "
            "fp16 or auto"
        )
    return _DTYPES[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for a forward pass; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_scaler(
    device: torch.device, dtype: torch.dtype, *, num_ranks: int = 1
) -> torch.amp.GradScaler:
    """Loss scaling, which only float16 needs; does nothing otherwise.

    Ranks multiply their losses by their number, because gradients are averaged and are to be added.
    The scale makes up for that, so that float16 has to hold the numbers that it holds in one
    process, and overflows where it does there.
    """
    return torch.amp.GradScaler(
        device.type, init_scale=_FIRST_SCALE / num_ranks, enabled=dtype == torch.float16
    )


def scaler_state(scaler: torch.amp.GradScaler, *, num_ranks: int) -> dict[str, Any]:
    """A scaler's state as one process has it; empty where nothing is scaled."""
    state: dict[str, Any] = scaler.state_dict()
    return {**state, "scale": state["scale"] * num_ranks} if state else state


def set_scaler_state(
    scaler: torch.amp.GradScaler, state: Mapping[str, Any], *, num_ranks: int
) -> None:
    """Go on from :func:`scaler_state`, whatever the number of ranks was."""
    if scaler.is_enabled() and state:
        scaler.load_state_dict({**state, "scale": state["scale"] / num_ranks})


def choose_num_threads(
    num_threads: int | None, device: torch.device, *, num_workers: int, num_ranks: int = 1
) -> int:
    """CPU threads of the trainer: as asked for; else, where it computes on the CPU, one per core
    that no loader process and no other rank needs.

    More threads than free cores cost far more than they give, as OpenMP's wait for each other:
    measured on 2 cores with 1 loader process, 2 threads gave 6.6 samples/s and 1 thread 39.7.
    """
    if num_threads is not None:
        return num_threads
    if device.type != "cpu":
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // num_ranks - num_workers)


def set_up_math(*, num_threads: int) -> None:
    """Threads of the CPU, and TF32 for what stays float32 on a GPU."""
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision("high")


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and Python's random."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rank_seed(seed: int, *, rank: int, step: int = 0) -> int:
    """Seed of what a rank draws for itself, such as dropout; the run's own for rank 0 at step 0."""
    return (seed + 1_000_033 * rank + 998_244_353 * step) % 2**63


def rng_state() -> dict[str, Any]:
    """State of all random generators, as tensors and plain values for a safe ``torch.load``."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss_next],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` gave; GPU states beyond the GPUs here are left out."""
    torch.set_rng_state(state["torch"].cpu())
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state.cpu(), index)
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


@contextlib.contextmanager
def separate_rng(seed: int | None = None) -> Iterator[None]:
    """What is drawn inside leaves the random state outside as it was.

    Args:
        seed: the state inside; None goes on from the one outside.
    """
    before = rng_state()
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        set_rng_state(before)


def memory_allocated_mb(device: torch.device) -> float:
    """Peak CUDA memory in MiB since the last call; without a GPU, the process's resident memory."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / BYTES_PER_MB
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # no Linux; the peak is what getrusage has, in bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / BYTES_PER_MB
    return pages * os.sysconf("SC_PAGE_SIZE") / BYTES_PER_MB


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Turn a lack of memory and the loss of a loader process into errors that say what to do.

    torch tells of a lost process wherever the main thread is just then.
    """
    with translate_oom(), translate_worker_errors():
        yield


@contextlib.contextmanager
def translate_oom(mend: str = _SMALLER_BATCHES) -> Iterator[None]:
    """Turn torch's lack of memory, a GPU's or the host's, into an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        is_gpu = isinstance(error, torch.OutOfMemoryError)
        if not is_gpu and _HOST_ALLOCATOR not in reason:
            raise
        whose = "the GPU" if is_gpu else "the host"
        raise EngineError(f"{whose} ran out of memory: {reason}\n{mend}") from error


@contextlib.contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Turn what torch says of a lost worker into an error of ours.

    Raises:
        EngineError: a loader process died or was silent for too long.
    """
    try:
        yield
    except RuntimeError as error:
        what = str(error).strip()
        if not what.startswith(("DataLoader worker (pid", "DataLoader timed out")):
            raise
        raise EngineError(
            f"a loader process was lost: {what.rstrip('.')}. Where it was killed, memory ran out "
            "most likely: lower data.num_workers, data.prefetch_batches or data.batch_size; where "
            "it crashed or was silent, data.num_workers: 0 shows why"
        ) from error


class StopSignals:
    """Remembers the first Ctrl-C or SIGTERM instead of dying of it; the second one acts as always.

    A context manager. Handlers are installed in the main thread only, and put back at the end.

    Args:
        is_patient: further signals are remembered, too.
    """

    def __init__(self, *, is_patient: bool = False) -> None:
        self._is_patient = is_patient
        self.requested = False
        """Whether a stop was asked for."""
        self._previous: dict[signal.Signals, Any] = {}
        self._owner_pid = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            handler: Callable[[int, types.FrameType | None], None] = self._remember
            self._previous = {s: signal.signal(s, handler) for s in _STOP_SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        # A terminal sends Ctrl-C to loader processes too, which inherit this handler by fork: they
        # go on until the trainer, which still needs its step, dismisses them.
        if os.getpid() != self._owner_pid:
            return
        is_first, self.requested = not self.requested, True
        again = b""
        if not self._is_patient:
            signal.signal(number, self._previous[signal.Signals(number)])
            again = b"; once more stops at once"
        if is_first:
            # Not print: a signal may arrive inside a print, which can't be entered twice.
            os.write(2, b"\nStopping after this step and a checkpoint" + again + b".\n")
