"""One model on many ranks: copies whose gradients are averaged (DDP), or shards of it (FSDP2).

FSDP2 is ``fully_shard`` (Zhao et al. 2023, arXiv:2304.11277): a rank holds its share of parameters,
gradients and moments, and gathers a layer's while it computes. State dicts are made whole before
they are saved and cut again when they are loaded, so that a checkpoint says nothing of the ranks.
Where the process is alone, each function gives back what it got.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.machine.distributed import MAIN, is_main, world_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# torch.distributed.fsdp and .tensor are imported where they are used: that takes 0.7 s.


def parallelize(
    model: nn.Module,
    *,
    parallel: Literal["auto", "ddp", "fsdp"],
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """What runs the model so that backward passes average gradients over the ranks.

    With "fsdp" members of a ``ModuleList`` are layers, and their parts are gathered one at a time;
    all else is gathered once. Parts of linear maps alone are gathered as autocast would cast them,
    half as large, and freed when they are through: casts of gathered float32 weights would stay
    until the backward pass, the whole model on every rank.

    Args:
        model: on its device; with "fsdp" its parameters become shards of themselves, in place.
        parallel: how; "auto" is "ddp". Of no meaning where the process is alone.
        dtype: of autocast in the forward pass.

    Returns:
        The model itself, or DDP around it.
    """
    if world_size() == 1:
        return model
    if parallel != "fsdp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=MAIN)
    # Nothing writes into what a layer returned.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    half = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for part in [part for layer in layers for part in layer.children()]:
            if _is_cast_by_autocast(part):
                fully_shard(part, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh)
    return model


def _is_cast_by_autocast(module: nn.Module) -> bool:
    """Whether all of a module's parameters are those of linear maps."""
    own = {id(p) for m in module.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    return bool(own) and own == {id(p) for p in module.parameters()}


@contextlib.contextmanager
def averaging_gradients(parallel_model: nn.Module, *, is_due: bool) -> Iterator[None]:
    """Around a forward and a backward pass.

    With DDP gradients add up on each rank while it is not due. FSDP2 exchanges them each time,
    because a rank has no room for whole ones.
    """
    if isinstance(parallel_model, DistributedDataParallel) and not is_due:
        with parallel_model.no_sync():
            yield
    else:
        yield


def whole(state: Any) -> Any:  # noqa: ANN401 (any nesting)
    """A state dict with whole tensors in the place of shards; all ranks call it.

    Returns:
        Shards become whole on the main rank, in the host's memory, and None on the others; all else
        is as it was.
    """
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if not _is_sharded(state):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if is_main() else None


def whole_tensor(tensor: Tensor) -> Tensor:
    """The same number or tensor on all ranks, on the device; all ranks call it."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shares_of(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors cut into this rank's shares, as those of the same name in `like` are cut.

    A tensor of another shape is left whole, for whoever loads it to refuse. All ranks call it.
    """
    return {name: _share_of(value, like.get(name)) for name, value in values.items()}


def moment_shares(
    state: Mapping[int, Mapping[str, Tensor]], parameters: Sequence[Tensor]
) -> dict[int, dict[str, Tensor]]:
    """An optimizer's moments cut as its parameters are; see :func:`shares_of`."""
    return {
        index: {
            name: _share_of(value, parameters[index] if index < len(parameters) else None)
            for name, value in moments.items()
        }
        for index, moments in state.items()
    }


def _share_of(value: Tensor, like: Tensor | None) -> Tensor:
    if like is None or not _is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _is_sharded(value: object) -> bool:
    if world_size() == 1 or not isinstance(value, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
