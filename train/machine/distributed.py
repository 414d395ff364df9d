"""Ranks: the processes that ``torchrun`` starts, each with its share of every global batch.

In a process that torchrun did not start, each function here returns its input unchanged. Tensors on
the device are exchanged by nccl (by gloo on the CPU), plain values of the host always by gloo, so
that exchanging them never waits for a device. How the model is distributed: ``parallel.py``.
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
"""The rank that writes to the terminal, to TensorBoard and to disk."""

_HANDSHAKE_POLL_S: Final = 0.02

_RELEASE_TIMEOUT_S: Final = 5.0
"""Longer than any thread needs to release a tensor."""

_RELEASE_POLL_S: Final = 0.001

_NUM_LAST_EXCHANGES: Final = 8
"""Several for each of gloo's two threads."""


def rank() -> int:
    """Return the rank of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else MAIN


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the rank that writes."""
    return rank() == MAIN


def local_world_size() -> int:
    """Return the number of ranks on this machine, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks of torchrun's environment, and leave them at the end.

    Raises:
        EngineError: another rank ended early.
    """
    if dist.is_initialized() or _announced_world_size() == 1:
        yield
        return
    own_device(device)
    store, own_rank, num_ranks = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=fresh_store(store, own_rank, num_ranks),
        rank=own_rank,
        world_size=num_ranks,
    )
    try:
        yield
        _wait_for_all()
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        raise EngineError(
            f"rank {rank()}: another rank ended early; its own error is elsewhere in this log. The "
            "last checkpoint is intact; fix: resume from it by `--resume auto`, which torchrun's "
            "--max-restarts does by itself"
        ) from error
    # Not after an error: with collectives in flight, nccl would wait for ranks that are gone.
    dist.destroy_process_group()


def fresh_store(store: Store, rank: int, num_ranks: int) -> Store:
    """Return a view of torchrun's store that no earlier attempt has written to.

    torchrun keeps its store when it restarts ranks (seen in torch 2.13), and a rank that finds the
    address of a dead rank there fails. The number of restarts would tell attempts apart, but
    differs between machines. So the ranks agree on a random prefix of the view's keys:

    1. Each rank publishes a random id.
    2. Rank 0 rebroadcasts all ids until every rank has acknowledged its own.
    3. Rank 0's id becomes the prefix.
    """
    own_id = uuid.uuid4().hex
    store.set(f"id/{rank}", own_id)
    if rank == MAIN:
        acknowledgements = [f"{own_id}/acknowledged/{other}" for other in range(1, num_ranks)]
        while True:
            # A rank of a dead attempt may have left an old id; it is read again until it is new.
            ids = [store.get(f"id/{other}").decode() for other in range(num_ranks)]
            store.set("ids", " ".join(ids))
            if store.check(acknowledgements):
                return dist.PrefixStore(own_id, store)  # type: ignore[attr-defined]
            time.sleep(_HANDSHAKE_POLL_S)
    while own_id not in (ids := store.get("ids").decode().split()):
        time.sleep(_HANDSHAKE_POLL_S)
    store.set(f"{ids[0]}/acknowledged/{rank}", "")
    return dist.PrefixStore(ids[0], store)  # type: ignore[attr-defined]


def own_device(device: torch.device) -> torch.device:
    """Return this rank's device: with several GPUs, the one of its local rank.

    Raises:
        ConfigError: there are more ranks than GPUs, or one GPU is named for all ranks.
    """
    announced = _announced_world_size()
    if device.type != "cuda" or announced == 1:
        return device
    local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if ":" in str(device) and device.index != local_rank:
        raise ConfigError(
            f"training.device {device} names one GPU for all {announced} ranks; fix: set it to "
            "cuda or auto, so that each rank uses its own GPU"
        )
    if local_rank >= num_gpus:
        raise ConfigError(
            f"local rank {local_rank} has no GPU, because this machine has {num_gpus}; fix: start "
            f"torchrun with --nproc-per-node={num_gpus}, or set training.device: cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def check_share(loader: object) -> None:
    """Refuse a loader that does not yield this rank's share of each global batch."""
    announced = _announced_world_size()
    if announced > 1 and not dist.is_initialized():
        raise ConfigError(
            f"torchrun started {announced} processes, but they did not join each other; fix: run "
            "everything inside `with train.machine.distributed.process_group(device):`, or start "
            "the program without torchrun"
        )
    share = (getattr(loader, "rank", MAIN), getattr(loader, "world_size", 1))
    if share != (rank(), world_size()):
        raise ConfigError(
            f"the loader yields share {share[0]} of {share[1]} to rank {rank()} of {world_size()}, "
            "so ranks would train on the same samples or miss some; fix: use "
            "train.Loader(source, config, rank=train.machine.distributed.rank(), "
            "world_size=train.machine.distributed.world_size())"
        )


def any_rank(flag: bool) -> bool:
    """Return on all ranks whether `flag` is true on any."""
    return bool(max_over_ranks([float(flag)])[0])


def max_over_ranks(numbers: Sequence[float]) -> list[float]:
    """Return each number's maximum over the ranks, which must pass equally many."""
    if world_size() == 1 or not numbers:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [float(x) for x in tensor]


def gather(items: Sequence[T]) -> list[T]:
    """Return the items of all ranks, in the order of ranks, on all ranks."""
    # On most calls no rank has an item, and one cheap exchange shows that.
    if world_size() == 1 or not any_rank(bool(items)):
        return list(items)
    shares: list[Any] = [None] * world_size()
    dist.all_gather_object(shares, list(items))
    return [item for share in shares for item in share]


def on_main(call: Callable[[], T]) -> T:
    """Call a function on the main rank, and return its result on all ranks.

    Raises:
        EngineError: on all ranks, the error that `call` raised on the main one.
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


def sum_over_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up 0-dim device tensors over the ranks, in float64, without making the host wait."""
    if world_size() == 1 or not tensors:
        return dict(tensors)
    total = torch.stack([tensor.detach().double() for tensor in tensors.values()])
    dist.all_reduce(total)
    sums = zip(tensors.items(), total.unbind(), strict=True)
    return {name: value.to(tensor.dtype) for (name, tensor), value in sums}


def _wait_for_all() -> None:
    """Wait for the other ranks, and for the gloo threads that did the exchanges.

    A thread's last act is to release the tensor, for which it needs the interpreter. If the
    interpreter exits at that moment, the process dies of SIGABRT although all work is done (seen in
    torch 2.13, in one of ten short trainings). gloo's threads take turns, so a few exchanges reach
    each of them; one exchange left the other thread alone (seen in one of four runs with FSDP2).
    """
    for _ in range(_NUM_LAST_EXCHANGES):
        tensor = torch.zeros(1)
        num_references = sys.getrefcount(tensor)
        dist.all_reduce(tensor)
        deadline_s = time.monotonic() + _RELEASE_TIMEOUT_S
        while sys.getrefcount(tensor) > num_references and time.monotonic() < deadline_s:
            time.sleep(_RELEASE_POLL_S)


def _announced_world_size() -> int:
    """Return the number of processes that torchrun started, by its environment variable."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
