"""What a configuration will take, before there is data or a GPU: parameters, memory, FLOPs, bytes.

The model and its batches are made of fake tensors, which have shapes and no memory, so that 1B
parameters are looked at on any machine. One forward and one backward pass then run as in training:

- FLOPs: of matrix products and attention, as torch.utils.flop_counter counts them; two for each
  multiply-add, and the whole square for causal attention;
- activations: what autograd keeps for the backward pass (its saved tensors), each memory once,
  without the parameters. For 1 and for 2 samples, which gives the part that grows with the batch.
  Gradient checkpointing keeps only the input of a layer, of the backbone and of the frames, and one
  layer's activations at a time when they are computed again;
- weights, gradients and AdamW's two moments: 4 bytes each per parameter.

On a GPU all of that is there at once when the backward pass begins, but for the gradients, which
come as activations go; they are counted whole, a little too much.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from shared.recipe import Recipe, load_recipe
from shared.shardset.manifest import read_manifest
from train.data.batch import WindowShapes, array_forms, compose_batch
from train.data.device import tensors_of
from train.data.pixels import to_model_inputs
from train.machine import runtime
from train.model.blocks import Block
from train.model.losses import compute_losses
from train.model.multimodal import SIZES, MultiModalCreature

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.config import DataConfig, TrainConfig
    from train.data.batch import Batch

GPU_GIB: Final = (24, 40, 80)
"""Memory of the GPUs in the table."""

USABLE: Final = 0.9
"""Share of a GPU's memory that is left to training by CUDA's context, the libraries' workspaces and
the allocator's gaps."""

STATE_BYTES: Final = 16
"""Per parameter: float32 weight, gradient, and AdamW's two moments."""

_WAYS: Final = ("without gradient checkpointing", "with gradient checkpointing")

_GIB = 2**30

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "auto": torch.bfloat16,  # as on every GPU since Ampere
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes kept for the backward pass: ``fixed_bytes + batch size * sample_bytes``."""

    fixed_bytes: int
    """Weights in half precision, and what else does not grow with the batch."""
    sample_bytes: int

    def of(self, batch_size: int) -> int:
        """Bytes of a batch."""
        return self.fixed_bytes + batch_size * self.sample_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What training by a configuration takes."""

    num_parameters: Mapping[str, int]
    """By part of the model."""
    activations: Activations
    checkpointed: Activations
    """With gradient checkpointing."""
    sample_flops: int
    """Forward and backward."""
    checkpointed_sample_flops: int
    """With the layers' second forward pass."""
    batch_bytes: int
    """Sent to the device per batch."""

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and moments."""
        return STATE_BYTES * sum(self.num_parameters.values())

    def flops(self, *, is_checkpointing: bool) -> int:
        """Of a sample, forward and backward."""
        return self.checkpointed_sample_flops if is_checkpointing else self.sample_flops

    def largest_batch(self, memory_bytes: float, *, is_checkpointing: bool) -> int:
        """Samples of the largest batch that fits; 0 where none does."""
        kept = self.checkpointed if is_checkpointing else self.activations
        free = USABLE * memory_bytes - self.state_bytes - kept.fixed_bytes
        return max(0, int(free // kept.sample_bytes))


def estimate(config: TrainConfig, shapes: WindowShapes, *, dtype: torch.dtype) -> Estimate:
    """What training takes on one device.

    Args:
        config: the whole configuration.
        shapes: sizes of the windows.
        dtype: of the forward pass.

    Raises:
        ConfigError: no model can be made of it.
    """
    with FakeTensorMode():
        model = MultiModalCreature(config, shapes).train()
        one, two = (_kept(model, _blank_batch(n, config, shapes), dtype=dtype) for n in (1, 2))
        flops = {
            is_on: _count_flops(model, _blank_batch(1, config, shapes), is_checkpointing=is_on)
            for is_on in (False, True)
        }
        batch = _blank_batch(config.data.batch_size, config, shapes)
    return Estimate(
        num_parameters={
            name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
        },
        activations=_line(one.total, two.total),
        checkpointed=_line(one.checkpointed, two.checkpointed),
        sample_flops=flops[False],
        checkpointed_sample_flops=flops[True],
        batch_bytes=sum(tensor.nbytes for tensor in tensors_of(batch)),
    )


def print_estimate(config: TrainConfig, *, origin: Path) -> None:
    """The estimate of a configuration, as tables for people.

    Args:
        config: the whole configuration; where its shard set is not there, ``data.recipe`` or else
            the default recipe says how large windows are.
        origin: its file, for the title.

    Raises:
        EngineError: no model can be made of it, or its recipe or shard set can't be read.
    """
    dtype = _DTYPES[config.training.precision]
    recipe, whose = _recipe_of(config.data)
    shapes = WindowShapes.from_recipe(recipe, tick_rate_hz=config.model.tick_rate_hz)
    found = estimate(config, shapes, dtype=dtype)
    console = Console(soft_wrap=True, markup=False)
    batch_size, steps = config.data.batch_size, config.training.accumulation_steps
    is_on = config.model.is_checkpointing
    flops, others = (found.flops(is_checkpointing=on) for on in (is_on, not is_on))
    parts = ", ".join(f"{name} {n / 1e6:.1f} M" for name, n in found.num_parameters.items())
    console.print(
        f"{origin}: an estimate for one GPU, forward in {str(dtype).removeprefix('torch.')}, "
        f"windows by {whose}\n"
        f"parameters   {sum(found.num_parameters.values()) / 1e6:.1f} M: {parts}\n"
        f"FLOPs        {flops / 1e9:.1f} G per sample, forward and backward, {_WAYS[is_on]}; "
        f"{flops * batch_size * steps / 1e12:.2f} T per step of {batch_size} x {steps} samples; "
        f"{_WAYS[not is_on]} {others / 1e9:.1f} G per sample\n"
        f"over the bus {found.batch_bytes / 2**20:.1f} MiB per batch of {batch_size}"
    )
    console.print(_memory_table(found, batch_size, is_checkpointing=is_on))
    console.print(_gpu_table(found, is_checkpointing=is_on))


def print_sizes(config: TrainConfig, *, origin: Path) -> None:
    """A line for each ``model.size``, with all else as in a configuration.

    Args:
        config: the whole configuration; its own size of the model does not count.
        origin: its file, for the title.

    Raises:
        EngineError: as :func:`print_estimate`.
    """
    dtype = _DTYPES[config.training.precision]
    recipe, whose = _recipe_of(config.data)
    shapes = WindowShapes.from_recipe(recipe, tick_rate_hz=config.model.tick_rate_hz)
    batch_size, steps = config.data.batch_size, config.training.accumulation_steps
    table = Table(
        title=f"{origin}: an estimate, steps of {batch_size} x {steps} samples, windows by {whose}",
        title_justify="left",
    )
    columns = ("size", "parameters, M", "memory, GiB", "recomputing, GiB", "TFLOPs per step")
    for name in columns:
        table.add_column(name, justify="left" if name == "size" else "right")
    for size in SIZES:
        sized = of_size(config, size)
        found, is_on = estimate(sized, shapes, dtype=dtype), sized.model.is_checkpointing
        sizes = [
            f"{(found.state_bytes + kept.of(batch_size)) / _GIB:.2f}"
            for kept in (found.activations, found.checkpointed)
        ]
        sizes[is_on] = f"* {sizes[is_on]}"
        table.add_row(
            size,
            f"{sum(found.num_parameters.values()) / 1e6:.1f}",
            *sizes,
            f"{found.flops(is_checkpointing=is_on) * batch_size * steps / 1e12:.2f}",
        )
    console = Console(soft_wrap=True, markup=False)
    console.print(table)
    console.print("recomputing: with gradient checkpointing; * as configured, as the FLOPs are")


def of_size(config: TrainConfig, size: str) -> TrainConfig:
    """The configuration with a model of another size."""
    named = {"size": size, "hidden_dim": None, "num_layers": None, "num_heads": None}
    return config.model_copy(update={"model": config.model.model_copy(update=named)})


def _recipe_of(data: DataConfig) -> tuple[Recipe, str]:
    """What is known of the data, and from where."""
    for place in data.sets.values():
        if isinstance(place, Path) and place.exists():
            return read_manifest(place).recipe, str(place)
    if data.recipe is not None:
        return load_recipe(data.recipe), str(data.recipe)
    return Recipe(), "the default recipe"


def _ways(*, is_checkpointing: bool) -> list[str]:
    """Without and with gradient checkpointing; it says which is configured."""
    mark = ", as configured"
    return [way + mark * (is_on == is_checkpointing) for is_on, way in enumerate(_WAYS)]


def _memory_table(found: Estimate, batch_size: int, *, is_checkpointing: bool) -> Table:
    table = Table(title=f"memory with a batch of {batch_size}, GiB", title_justify="left")
    columns = ("", "weights", "gradients", "moments", "activations", "sum")
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    weights = sum(found.num_parameters.values()) * 4
    ways = _ways(is_checkpointing=is_checkpointing)
    for name, kept in zip(ways, (found.activations, found.checkpointed), strict=True):
        sizes = (weights, weights, 2 * weights, kept.of(batch_size))
        table.add_row(name, *(f"{size / _GIB:.2f}" for size in (*sizes, sum(sizes))))
    return table


def _gpu_table(found: Estimate, *, is_checkpointing: bool) -> Table:
    title = f"largest batch that fits (estimate; {1 - USABLE:.0%} of the memory kept free)"
    table = Table(title=title, title_justify="left")
    table.add_column("GPU")
    for name in _ways(is_checkpointing=is_checkpointing):
        table.add_column(name, justify="right")
    for gib in GPU_GIB:
        sizes = (found.largest_batch(gib * _GIB, is_checkpointing=on) for on in (False, True))
        table.add_row(f"{gib} GB", *(str(size) if size else "none" for size in sizes))
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """Bytes that one forward pass keeps."""

    outside: int
    """Of layers."""
    inside: tuple[int, ...]
    """Of each layer's pass."""
    inputs: tuple[int, ...]
    """What each layer's pass is given."""

    @property
    def total(self) -> int:
        return self.outside + sum(self.inside)

    @property
    def checkpointed(self) -> int:
        """With inputs only, while the largest layer is computed again."""
        return self.outside + sum(self.inputs) + max(self.inside, default=0)


def _kept(model: MultiModalCreature, batch: Batch, *, dtype: torch.dtype) -> _Kept:
    """What autograd saves in one forward pass, each memory once, without weights and the batch."""
    seen = {t.untyped_storage()._cdata: t for t in (*model.parameters(), *tensors_of(batch))}
    kept, inputs = [0], [0]  # the first is what lies outside
    place = 0

    def enter(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal place
        place = len(kept)
        kept.append(0)
        inputs.append(args[0].nbytes)

    def leave(*_: object) -> None:
        nonlocal place
        place = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor  # held, so that no other memory gets its number
            kept[place] += storage.nbytes()
        return tensor

    hooks = [
        hook
        for block in _blocks(model, is_checkpointing=False)
        for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(model, batch, dtype=dtype)
    for hook in hooks:
        hook.remove()
    return _Kept(outside=kept[0], inside=tuple(kept[1:]), inputs=tuple(inputs[1:]))


def _count_flops(model: MultiModalCreature, batch: Batch, *, is_checkpointing: bool) -> int:
    """FLOPs of a forward and a backward pass."""
    _blocks(model, is_checkpointing=is_checkpointing)
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS) as counter:
        _loss(model, batch, dtype=torch.float32).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def _blocks(model: MultiModalCreature, *, is_checkpointing: bool) -> list[Block]:
    """All layers, switched to whether they compute again."""
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    for block in blocks:
        block.is_checkpointing = is_checkpointing
    return blocks


def _loss(model: MultiModalCreature, batch: Batch, *, dtype: torch.dtype) -> Tensor:
    """The forward pass of a training step."""
    inputs = to_model_inputs(batch["inputs"], dtype=dtype)
    with runtime.autocast(torch.device("cpu"), dtype):
        outputs = model(inputs)
    # Cross-entropy takes the bytes of levels as they are, but its fake kernel wants int64.
    targets = {
        name: target.long() if target.dtype == torch.uint8 else target
        for name, target in batch["targets"].items()
    }
    return compute_losses(outputs, targets, batch["weight"], config=model.config)["loss_total"]


def _blank_batch(size: int, config: TrainConfig, shapes: WindowShapes) -> Batch:
    """A batch as the loader makes it; densely packed text has a window's ticks as its length."""
    forms = array_forms(size, config=config, shapes=shapes)
    arrays = {
        name: torch.empty(form.shape, dtype=_torch_dtype(form.dtype))
        for name, form in forms.items()
    }
    if config.is_text_only:
        for stream in {*config.input_streams, *config.target_streams}:
            arrays[stream] = torch.empty(size, shapes.num_ticks, dtype=torch.int64)
            arrays[f"{stream}_valid"] = torch.empty(size, shapes.num_ticks, dtype=torch.bool)
    return compose_batch(arrays, config)


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _line(one: int, two: int) -> Activations:
    """The line through the bytes of 1 and of 2 samples."""
    return Activations(fixed_bytes=2 * one - two, sample_bytes=two - one)


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward_flops(
    grad: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *_: object,
    **__: object,
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


_ATTENTION_FLOPS: Final = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""The flop counter knows only the kernels of GPUs."""
