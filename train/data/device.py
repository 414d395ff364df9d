"""Copy the loader's batches to the training device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


def to_device(batch: Any, device: torch.device | str) -> Any:  # noqa: ANN401 (any nesting)
    """Copy every tensor of a batch to a device and wait for the copies.

    A tensor that occurs twice, as in streams that are inputs and targets, is copied once and stays
    one tensor. Copies from pinned memory are all queued on the current stream before the wait. The
    wait is necessary: the loader recycles the memory as soon as the batch is released, and torch
    does not track copies from memory that it did not allocate.
    """
    moved = send(batch, device)
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return moved


def send(batch: Any, device: torch.device | str) -> Any:  # noqa: ANN401 (any nesting)
    """Do what :func:`to_device` does, without waiting for copies from pinned memory.

    The caller keeps the batch until the current stream has finished the copies.
    """
    return _send(batch, device, {})


def _send(
    batch: Any,  # noqa: ANN401 (any nesting)
    device: torch.device | str,
    moved: dict[int, Tensor],
) -> Any:  # noqa: ANN401
    """Do what :func:`send` does; `moved` has the tensors so far, by id of the original."""
    if isinstance(batch, Tensor):
        if id(batch) not in moved:
            moved[id(batch)] = batch.to(device, non_blocking=batch.is_pinned())
        return moved[id(batch)]
    if isinstance(batch, dict):
        return {key: _send(value, device, moved) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)([_send(value, device, moved) for value in batch])
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:  # noqa: ANN401 (any nesting)
    """Yield all tensors in any nesting of dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | list | tuple):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from tensors_of(value)
