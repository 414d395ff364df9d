"""Seconds and bytes of the parts of a model in a forward pass: encoders, backbone, heads."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from train.data.device import tensors_of
from train.loop.meter import part_of
from train.profiling.step import device_timer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

OUTSIDE = "outside"
"""What lies between the parts: the last poses, rotations, the shape of the outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFigures:
    """Of one part of the model, in one forward pass."""

    part: str
    num_parameters: int
    num_calls: int
    forward_s: float
    """Without the parts inside it; all parts add up to the pass."""
    output_bytes: int
    kept_bytes: int
    """What autograd keeps of it for the backward pass, without weights and the batch; each memory
    counts where it was kept first."""


def measure_parts(
    model: nn.Module,
    forward: Callable[[], object],
    *,
    given: Mapping[str, Tensor],
    device: torch.device,
) -> list[PartFigures]:
    """Figures of each part, those that take longest first.

    Args:
        model: whose parts.
        forward: one forward pass of it; what it returns is held until the measurement is over.
        given: what it is given; not counted.
        device: where it runs.
    """
    timer, stack, parts = device_timer(device), [OUTSIDE], _parts_of(model)
    calls, outputs, kept = (dict.fromkeys((OUTSIDE, *parts.values()), 0) for _ in range(3))
    seen = {_memory(t): t for t in (*model.parameters(), *tensors_of(given))}

    def enter(module: nn.Module, _args: object) -> None:
        timer.end_stage(stack[-1])
        stack.append(parts[module])

    def leave(module: nn.Module, _args: object, output: object) -> None:
        timer.end_stage(stack.pop())
        calls[parts[module]] += 1
        outputs[parts[module]] += sum(t.nbytes for t in tensors_of(output))

    def pack(tensor: Tensor) -> Tensor:
        if _memory(tensor) not in seen:
            seen[_memory(tensor)] = tensor  # held, so that no other memory gets its number
            kept[stack[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    with _hooked(parts, enter, leave), torch.autograd.graph.saved_tensors_hooks(pack, _unpacked):
        timer.begin()
        held = forward()
        timer.end_stage(OUTSIDE)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = timer.take()
    del held
    sizes = _sizes(model)
    figures = [
        PartFigures(
            part=name,
            num_parameters=sizes.get(name, 0),
            num_calls=calls[name],
            forward_s=seconds.get(name, 0.0),
            output_bytes=outputs[name],
            kept_bytes=kept[name],
        )
        for name in calls
    ]
    return sorted(figures, key=lambda figure: -figure.forward_s)


def _parts_of(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that are parts: those just below the names of :func:`part_of`."""
    parts = {}
    for name, module in model.named_modules():
        above, _, last = name.rpartition(".")
        is_part = name in ("encoder", "encoder.frames", "norm") or (
            above in ("encoder.encoders", "blocks", "predictors") and last
        )
        if is_part:
            parts[module] = part_of(f"{name}.")
    return parts


def _sizes(model: nn.Module) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + parameter.numel()
    return sizes


@contextlib.contextmanager
def _hooked(
    parts: dict[nn.Module, str], enter: Callable[..., None], leave: Callable[..., None]
) -> Iterator[None]:
    handles = [
        handle
        for module in parts
        for handle in (
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _unpacked(tensor: Tensor) -> Tensor:
    return tensor
