"""One model on many ranks: copies with averaged gradients (DDP), or shards of it (FSDP2).

FSDP2 is ``fully_shard`` (Zhao et al. 2023, arXiv:2304.11277): a rank holds its shard of parameters,
gradients and moments, and gathers a layer's parameters while it computes. State dicts are gathered
before they are saved and sharded again after they are loaded, so a checkpoint does not depend on
the number of ranks. In a single process each function returns its input unchanged.
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

# torch.distributed.fsdp and .tensor are imported where they are used, because that takes 0.7 s.


def parallelize(
    model: nn.Module,
    *,
    parallel: Literal["auto", "ddp", "fsdp"],
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Prepare a model so that its backward passes average gradients over the ranks.

    With "fsdp", members of a ``ModuleList`` are layers. Their submodules are gathered one at a
    time; all other parameters are gathered together. A submodule that consists of linear maps is
    gathered in autocast's dtype, half as large, and freed after use. Otherwise autocast's copies of
    the gathered float32 weights would stay until the backward pass: the whole model on every rank.

    Args:
        model: on its device; with "fsdp" its parameters are replaced by shards, in place.
        parallel: "auto" means "ddp"; without effect in a single process.
        dtype: of autocast in the forward pass.
    """
    if world_size() == 1:
        return model
    if parallel != "fsdp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=MAIN)
    # The warning is about writing into a layer's output, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    half = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for submodule in [child for layer in layers for child in layer.children()]:
            if _is_cast_by_autocast(submodule):
                fully_shard(submodule, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh)
    return model


def _is_cast_by_autocast(module: nn.Module) -> bool:
    """Return whether all of a module's parameters belong to linear maps."""
    own = {id(p) for m in module.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    return bool(own) and own == {id(p) for p in module.parameters()}


@contextlib.contextmanager
def average_gradients(parallel_model: nn.Module, *, is_due: bool) -> Iterator[None]:
    """Average gradients over the ranks in the backward pass inside, if it is due.

    With DDP, gradients accumulate on each rank until averaging is due. FSDP2 exchanges them every
    time, because a rank has no memory for whole gradients.
    """
    if isinstance(parallel_model, DistributedDataParallel) and not is_due:
        with parallel_model.no_sync():
            yield
    else:
        yield


def gather_state(state: Any) -> Any:  # noqa: ANN401 (any nesting)
    """Gather the shards in a state dict; all ranks call it.

    In the place of shards, the main rank gets whole tensors in host memory, and the others None.
    """
    if isinstance(state, dict):
        return {key: gather_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gather_state(value) for value in state]
    if not _is_sharded(state):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if is_main() else None


def gather_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor on all ranks, on the device; all ranks call it."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard whole tensors as the tensors of the same name in `like` are sharded.

    All ranks call it. A tensor of another shape stays whole, so that loading it fails.
    """
    return {name: _shard_like(value, like.get(name)) for name, value in values.items()}


def shard_moments(
    state: Mapping[int, Mapping[str, Tensor]], parameters: Sequence[Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Shard an optimizer's moments as its parameters are sharded."""
    return {
        index: {
            name: _shard_like(value, parameters[index] if index < len(parameters) else None)
            for name, value in moments.items()
        }
        for index, moments in state.items()
    }


def _shard_like(value: Tensor, like: Tensor | None) -> Tensor:
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
