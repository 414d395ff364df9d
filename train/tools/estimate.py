"""Estimate what a configuration takes, without data or a GPU: parameters, memory, FLOPs, bytes.

The model and its batches are fake tensors, which have shapes and no memory, so that any machine can
look at 1B parameters. One forward and one backward pass then run as in training.

- FLOPs: matrix products and attention, as torch.utils.flop_counter counts them: two per
  multiply-add, and the whole square for causal attention.
- Activations: what autograd saves for the backward pass, each memory once, without the parameters.
  Measured for 1 and for 2 samples, which gives the share that grows with the batch. Gradient
  checkpointing saves only the input of each layer, of the backbone and of the frame encoder, and
  has one layer's activations at a time when they are recomputed.
- Weights, gradients and AdamW's two moments: 4 bytes each per parameter.

A GPU holds all of these when the backward pass starts, except the gradients, which appear as
activations are freed. They are counted in full, so the estimate is slightly high.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from shared.recipe import Recipe, load_recipe
from shared.shardset.manifest import read_manifest
from train.data.batch import array_forms, compose_batch
from train.data.device import tensors_of
from train.data.loader import num_recycled_slots
from train.data.pixels import to_model_inputs
from train.machine import runtime
from train.model.blocks import Block
from train.model.losses import compute_losses
from train.model.multimodal import SIZES, MultiModalCreature
from train.run import window_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.config import TrainConfig
    from train.data.batch import Batch
    from train.shapes import WindowShapes

GPU_GIB: Final = (24, 40, 80)
"""Memory of the GPUs in the table."""

USABLE: Final = 0.9
"""Usable share of a GPU's memory; CUDA's context, workspaces and gaps take the remainder."""

STATE_BYTES: Final = 16
"""Bytes per parameter: float32 weight, gradient, and AdamW's two moments."""

_MODES: Final = ("without gradient checkpointing", "with gradient checkpointing")

_ATTENTION_FLOPS: Final = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda *shapes, **_: sdpa_flop_count(*shapes[:3])  # type: ignore[no-untyped-call]
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])  # type: ignore[no-untyped-call]
    ),
}
"""The CPU's attention kernels, which torch's flop counter does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What training takes, with or without gradient checkpointing."""

    num_parameters: Mapping[str, int]
    """Submodule of the model -> its number of parameters."""
    fixed_bytes: int
    """Activations that do not grow with the batch, such as weights in half precision."""
    sample_bytes: int
    """Activations per sample."""
    sample_flops: int
    """Forward, backward and recomputation."""
    stream_bytes: Mapping[str, int]
    """Stream -> its bytes in a batch, which are sent to the device and which a loader's slot
    holds."""

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and moments."""
        return STATE_BYTES * sum(self.num_parameters.values())

    def activation_bytes(self, batch_size: int) -> int:
        """Activations of a batch."""
        return self.fixed_bytes + batch_size * self.sample_bytes

    def memory_bytes(self, batch_size: int) -> int:
        """State and activations."""
        return self.state_bytes + self.activation_bytes(batch_size)

    def largest_batch(self, memory_bytes: float) -> int:
        """Samples of the largest batch that fits; 0 if none does."""
        free = USABLE * memory_bytes - self.memory_bytes(0)
        return max(0, int(free // self.sample_bytes))


def estimate(
    config: TrainConfig, shapes: WindowShapes, *, dtype: torch.dtype
) -> tuple[Estimate, Estimate]:
    """Estimate what training takes on one device, without and with gradient checkpointing."""
    with FakeTensorMode():
        model = MultiModalCreature(config, shapes).train()
        sizes = (1, 2, config.data.batch_size)
        one, two, batch = (_blank_batch(size, config, shapes) for size in sizes)
        saved = zip(*(_saved_bytes(model, b, dtype=dtype) for b in (one, two)), strict=True)
        flops = [_count_flops(model, one, is_checkpointing=is_on) for is_on in (False, True)]
    without, with_checkpointing = (
        Estimate(
            num_parameters={
                name: sum(p.numel() for p in module.parameters())
                for name, module in model.named_children()
            },
            # The line through the bytes of 1 and of 2 samples.
            fixed_bytes=2 * bytes_1 - bytes_2,
            sample_bytes=bytes_2 - bytes_1,
            sample_flops=sample_flops,
            stream_bytes=_stream_bytes(batch, shapes),
        )
        for (bytes_1, bytes_2), sample_flops in zip(saved, flops, strict=True)
    )
    return without, with_checkpointing


def print_estimate(config: TrainConfig, *, origin: Path) -> None:
    """Print the estimate of a configuration.

    If its shard set does not exist, ``data.recipe`` or else the default recipe decides the sizes of
    windows. `origin` is the configuration's file, for the title.
    """
    dtype = _dtype(config)
    shapes, shapes_origin = _window_shapes(config, origin=origin)
    modes = estimate(config, shapes, dtype=dtype)
    is_on = config.model.is_checkpointing
    configured, other = modes[is_on], modes[not is_on]
    batch_size, steps = config.data.batch_size, config.training.accumulation_steps
    modules = ", ".join(f"{name} {n / 1e6:.1f} M" for name, n in configured.num_parameters.items())
    console = Console(soft_wrap=True, markup=False)
    console.print(
        f"{origin}: an estimate for one GPU, forward in {str(dtype).removeprefix('torch.')}, "
        f"windows by {shapes_origin}\n"
        f"parameters   {sum(configured.num_parameters.values()) / 1e6:.1f} M: {modules}\n"
        f"FLOPs        {configured.sample_flops / 1e9:.1f} G per sample, forward and backward, "
        f"{_MODES[is_on]}; {configured.sample_flops * batch_size * steps / 1e12:.2f} T per step of "
        f"{batch_size} x {steps} samples; {_MODES[not is_on]} {other.sample_flops / 1e9:.1f} G per "
        f"sample\n"
        f"over the bus {sum(configured.stream_bytes.values()) / 2**20:.1f} MiB per batch of "
        f"{batch_size}: {_list_bytes(configured.stream_bytes)}; the loader keeps room for "
        f"{num_recycled_slots(config)} batches"
    )
    memory = _table(
        f"memory with a batch of {batch_size}, GiB",
        ("", "weights", "gradients", "moments", "activations", "sum"),
    )
    largest = _table(
        f"largest batch that fits (estimate; {1 - USABLE:.0%} of the memory kept free)",
        ("", *(f"{gib} GB" for gib in GPU_GIB)),
    )
    for number, (mode, each) in enumerate(zip(_MODES, modes, strict=True)):
        name = mode + ", as configured" * (number == is_on)
        share = each.state_bytes // 4
        activations, total = each.activation_bytes(batch_size), each.memory_bytes(batch_size)
        memory.add_row(name, *map(_gib, (share, share, 2 * share, activations, total)))
        batches = (each.largest_batch(gib * 2**30) for gib in GPU_GIB)
        largest.add_row(name, *(str(size or "none") for size in batches))
    console.print(memory)
    console.print(largest)


def print_sizes(config: TrainConfig, *, origin: Path) -> None:
    """Print one line per ``model.size``, with all other settings as configured."""
    shapes, shapes_origin = _window_shapes(config, origin=origin)
    batch_size, steps = config.data.batch_size, config.training.accumulation_steps
    table = _table(
        f"{origin}: an estimate, steps of {batch_size} x {steps} samples, windows by "
        f"{shapes_origin}",
        ("size", "parameters, M", "memory, GiB", "recomputing, GiB", "TFLOPs per step"),
    )
    for size in SIZES:
        unset = {"size": size, "hidden_dim": None, "num_layers": None, "num_heads": None}
        sized = config.model_copy(update={"model": config.model.model_copy(update=unset)})
        modes = estimate(sized, shapes, dtype=_dtype(config))
        is_on = sized.model.is_checkpointing
        sizes = [_gib(each.memory_bytes(batch_size)) for each in modes]
        sizes[is_on] = f"* {sizes[is_on]}"
        millions = sum(modes[is_on].num_parameters.values()) / 1e6
        tflops = modes[is_on].sample_flops * batch_size * steps / 1e12
        table.add_row(size, f"{millions:.1f}", *sizes, f"{tflops:.2f}")
    console = Console(soft_wrap=True, markup=False)
    console.print(table)
    console.print("recomputing: with gradient checkpointing; * as configured, as the FLOPs are")


def _dtype(config: TrainConfig) -> torch.dtype:
    """Return the forward pass's dtype; "auto" is bfloat16, as on every GPU since Ampere."""
    dtypes = {"fp16": torch.float16, "fp32": torch.float32}
    return dtypes.get(config.training.precision, torch.bfloat16)


def _window_shapes(config: TrainConfig, *, origin: Path) -> tuple[WindowShapes, str]:
    """Return the sizes of windows, and the shard set or recipe that they come from."""
    recipe, recipe_origin = Recipe(), "the default recipe"
    if config.data.recipe is not None:
        recipe, recipe_origin = load_recipe(config.data.recipe), str(config.data.recipe)
    for location in config.data.sets.values():
        if isinstance(location, Path) and location.exists():
            recipe, recipe_origin = read_manifest(location).recipe, str(location)
            break
    return window_shapes(recipe, config, origin=origin), recipe_origin


def _stream_bytes(batch: Batch, shapes: WindowShapes) -> dict[str, int]:
    """Return the bytes of each stream's arrays; those that are inputs and targets count once."""
    sizes: dict[str, int] = {}
    for group in ("targets", "inputs"):
        for name, tensor in batch[group].items():
            if not name.endswith("_valid"):
                stream = shapes.targets.get(name, name) if group == "targets" else name
                sizes[stream] = tensor.nbytes + batch[group][f"{name}_valid"].nbytes
    return dict(sorted(sizes.items()))


def _list_bytes(stream_bytes: Mapping[str, int]) -> str:
    """List the streams by their size, the largest first."""
    ordered = sorted(stream_bytes.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / 2**20:.2f}" for name, size in ordered)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    first, *others = columns
    numbers = (Column(name, justify="right") for name in others)
    return Table(first, *numbers, title=title, title_justify="left")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f}"


def _saved_bytes(model: MultiModalCreature, batch: Batch, *, dtype: torch.dtype) -> tuple[int, int]:
    """Count the bytes that one forward pass saves, without and with gradient checkpointing."""
    seen = {t.untyped_storage()._cdata: t for t in (*model.parameters(), *tensors_of(batch))}
    # Entry 0 is what is saved outside of layers; the following ones are the passes of layers.
    saved, inputs = [0], [0]
    current = 0

    def enter(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal current
        current = len(saved)
        saved.append(0)
        inputs.append(args[0].nbytes)

    def leave(*_: object) -> None:
        nonlocal current
        current = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor  # keeps the storage alive, so that its id stays unique
            saved[current] += storage.nbytes()
        return tensor

    hooks = [
        hook
        for block in _set_checkpointing(model, is_on=False)
        for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(model, batch, dtype=dtype)
    for hook in hooks:
        hook.remove()
    # Checkpointing saves the inputs of layers, and recomputes the largest layer at some point.
    return sum(saved), saved[0] + sum(inputs) + max(saved[1:], default=0)


def _count_flops(model: MultiModalCreature, batch: Batch, *, is_checkpointing: bool) -> int:
    """Count the FLOPs of a forward and a backward pass."""
    _set_checkpointing(model, is_on=is_checkpointing)
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS) as counter:
        _loss(model, batch, dtype=torch.float32).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def _set_checkpointing(model: MultiModalCreature, *, is_on: bool) -> list[Block]:
    """Switch gradient checkpointing of all layers; return the layers."""
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    for block in blocks:
        block.is_checkpointing = is_on
    return blocks


def _loss(model: MultiModalCreature, batch: Batch, *, dtype: torch.dtype) -> Tensor:
    """Run the forward pass of a training step."""
    inputs = to_model_inputs(batch["inputs"], dtype=dtype)
    with runtime.autocast(torch.device("cpu"), dtype):
        outputs = model(inputs)
    # Cross-entropy accepts levels in bytes, but its fake kernel needs int64.
    targets = {
        name: target.long() if target.dtype == torch.uint8 else target
        for name, target in batch["targets"].items()
    }
    losses = compute_losses(outputs, targets, batch["weight"], objective=model.objective)
    return losses["loss_total"]


def _blank_batch(size: int, config: TrainConfig, shapes: WindowShapes) -> Batch:
    """Make a batch in the loader's form; dense text is as long as a window has ticks."""
    arrays = {
        name: torch.empty(form.shape, dtype=torch.from_numpy(np.empty(0, form.dtype)).dtype)
        for name, form in array_forms(size, shapes=shapes, pixels=config.data.pixels).items()
    }
    if shapes.is_text_only:
        for stream in shapes.streams:
            arrays[stream] = torch.empty(size, shapes.num_ticks, dtype=torch.int64)
            arrays[f"{stream}_valid"] = torch.empty(size, shapes.num_ticks, dtype=torch.bool)
    return compose_batch(arrays, shapes)
