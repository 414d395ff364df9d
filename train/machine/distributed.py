"""Ranks: the processes that ``torchrun`` starts, each with its share of every global batch.

A process that was not started by torchrun is alone: each function here then gives back what it got.
Numbers of the device go over nccl (gloo on the CPU), plain values of the host always over gloo, so
that agreeing on them never waits for a device. How the model itself is spread: ``parallel.py``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shared.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch._C._distributed_c10d import Store

T = TypeVar("T")

MAIN: Final = 0
"""The rank that writes: to the terminal, to TensorBoard, to disk."""

_POLL_S: Final = 0.02

_PARTING_S: Final = 5.0
"""Longer than any thread needs to let go of a tensor."""

_PARTING_POLL_S: Final = 0.001


def rank() -> int:
    """Number of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else MAIN


def world_size() -> int:
    """Number of processes that train together, 1 where this one is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank writes."""
    return rank() == MAIN


def local_world_size() -> int:
    """Processes of this training on this machine, among which its cores are divided."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Meet the other ranks of torchrun's environment, and part from them at the end.

    Args:
        device: of the training; any cuda device takes nccl.

    Raises:
        EngineError: another rank has ended before its time.
    """
    if dist.is_initialized() or _announced_world_size() == 1:
        yield
        return
    own_device(device)
    store, number, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=fresh_store(store, number, count),
        rank=number,
        world_size=count,
    )
    try:
        yield
        _wait_for_all()
    except RuntimeError as error:
        if not _is_of_a_lost_rank(error):
            raise
        raise EngineError(
            f"rank {rank()}: another rank has ended before its time; what it said stands elsewhere "
            "in this log. The last checkpoint is whole: `--resume auto` goes on from it, under "
            "torchrun's --max-restarts by itself"
        ) from error
    # Not after an error: with collectives in flight nccl would wait for ranks that do not come.
    dist.destroy_process_group()


def fresh_store(store: Store, number: int, count: int) -> Store:
    """A part of torchrun's store into which no earlier attempt has written.

    torchrun keeps its store when it restarts ranks (seen in torch 2.13); whoever finds the address
    of a dead rank there fails. Its count of restarts would tell attempts apart, but differs between
    machines. So each rank draws a word; the main one calls the words that it finds, again and
    again, until all have heard their own; the first word, its own, is the name of the part.

    Args:
        store: of all attempts.
        number: of this rank.
        count: of ranks.
    """
    word = uuid.uuid4().hex
    store.set(f"here/{number}", word)
    if number == MAIN:
        heard = [f"{word}/heard/{other}" for other in range(1, count)]
        while True:
            words = [store.get(f"here/{other}").decode() for other in range(count)]
            store.set("call", " ".join(words))
            if store.check(heard):
                return dist.PrefixStore(word, store)  # type: ignore[attr-defined]
            time.sleep(_POLL_S)
    while word not in (words := store.get("call").decode().split()):
        time.sleep(_POLL_S)
    store.set(f"{words[0]}/heard/{number}", "")
    return dist.PrefixStore(words[0], store)  # type: ignore[attr-defined]


def own_device(device: torch.device) -> torch.device:
    """This rank's device: of several GPUs the one with its number on this machine.

    Raises:
        ConfigError: more ranks than GPUs, or one GPU named for all ranks.
    """
    announced = _announced_world_size()
    if device.type != "cuda" or announced == 1:
        return device
    local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if ":" in str(device) and device.index != local_rank:
        raise ConfigError(
            f"training.device {device} names one GPU for all {announced} ranks; leave it cuda or "
            "auto, each rank then takes its own"
        )
    if local_rank >= num_gpus:
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU, there are {num_gpus}; start torchrun "
            f"with --nproc-per-node={num_gpus}, or set training.device: cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def check_share(loader: object) -> None:
    """Refuse a loader that does not give this rank its own share of each global batch.

    Raises:
        ConfigError: it says which loader does.
    """
    announced = _announced_world_size()
    if announced > 1 and not dist.is_initialized():
        raise ConfigError(
            f"torchrun started {announced} processes and none waits for the others; put all of it "
            "into `with train.machine.distributed.process_group(device):`, or start it without "
            "torchrun"
        )
    share = (getattr(loader, "rank", MAIN), getattr(loader, "world_size", 1))
    if share != (rank(), world_size()):
        raise ConfigError(
            f"the loader gives share {share[0]} of {share[1]} to rank {rank()} of {world_size()}, "
            "so that ranks would train on the same samples or miss some; use "
            "train.Loader(source, config, rank=train.machine.distributed.rank(), "
            "world_size=train.machine.distributed.world_size())"
        )


def any_of(flag: bool) -> bool:
    """Whether `flag` is true on any rank; the same answer on all."""
    return bool(largest([float(flag)])[0])


def largest(numbers: Sequence[float]) -> list[float]:
    """The largest of each number over the ranks, which give equally many."""
    if world_size() == 1 or not numbers:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [float(x) for x in tensor]


def gather(items: Sequence[T]) -> list[T]:
    """The items of all ranks one after another, on all ranks."""
    if world_size() == 1 or not any_of(bool(items)):  # mostly there are none: one cheap exchange
        return list(items)
    shares: list[Any] = [None] * world_size()
    dist.all_gather_object(shares, list(items))
    return [item for share in shares for item in share]


def on_main(call: Callable[[], T]) -> T:
    """What `call` gives on the main rank, on all ranks.

    Raises:
        EngineError: on all ranks, what `call` raised on the main one.
    """
    if world_size() == 1:
        return call()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = call()
        except EngineError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=MAIN)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def add_up(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the ranks of 0-dim tensors on the device, in float64; the host does not wait."""
    if world_size() == 1 or not tensors:
        return dict(tensors)
    total = torch.stack([tensor.detach().double() for tensor in tensors.values()])
    dist.all_reduce(total)
    sums = zip(tensors.items(), total.unbind(), strict=True)
    return {name: one.to(tensor.dtype) for (name, tensor), one in sums}


def _wait_for_all() -> None:
    """Wait for the other ranks, and for the thread of gloo's that did the exchange.

    Its last act, for which it needs the interpreter, is to let go of the tensor. An interpreter
    that ends meanwhile takes the process down with SIGABRT, after all is done (seen in torch 2.13,
    in one of ten short trainings).
    """
    tensor = torch.zeros(1)
    num_references = sys.getrefcount(tensor)
    dist.all_reduce(tensor)
    deadline_s = time.monotonic() + _PARTING_S
    while sys.getrefcount(tensor) > num_references and time.monotonic() < deadline_s:
        time.sleep(_PARTING_POLL_S)


def _announced_world_size() -> int:
    """How many processes torchrun says it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_of_a_lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
