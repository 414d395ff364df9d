"""Copy the loader's batches to the training device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


def to_device(batch: Any, device: torch.device | str) -> Any:  # noqa: ANN401 (any nesting)
    """A batch with every tensor on `device`; one that is in it twice, as streams that are inputs
    and targets, is copied once and stays one.

    From pinned memory all copies are queued on the current stream at once, then waited for: the
    loader's memory is written to again as soon as nobody holds the batch, and it is not torch's
    own, which would wait for copies by itself.

    Args:
        batch: tensors in any nesting of dicts, lists and tuples; all else is left as it is.
        device: where to.
    """
    moved = send(batch, device)
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return moved


def send(batch: Any, device: torch.device | str) -> Any:  # noqa: ANN401 (any nesting)
    """As :func:`to_device`, without waiting for what comes from pinned memory: whoever sends it
    keeps the batch until the current stream has done the copies.
    """
    return _sent(batch, device, {})


def _sent(
    batch: Any,  # noqa: ANN401 (any nesting)
    device: torch.device | str,
    moved: dict[int, Tensor],
) -> Any:  # noqa: ANN401
    """As :func:`send`; `moved` has what went before, by id of the tensor."""
    if isinstance(batch, Tensor):
        if id(batch) not in moved:
            moved[id(batch)] = batch.to(device, non_blocking=batch.is_pinned())
        return moved[id(batch)]
    if isinstance(batch, dict):
        return {key: _sent(value, device, moved) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)([_sent(value, device, moved) for value in batch])
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:  # noqa: ANN401 (any nesting)
    """All tensors in any nesting of dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | list | tuple):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from tensors_of(value)
