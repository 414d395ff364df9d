"""Estimates on fake tensors, against real passes and sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from click.testing import CliRunner
from helpers.sets import make_config as make_set_config
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from shared.recipe import Recipe
from shared.shardset.manifest import read_manifest
from train import Loader, MultiModalCreature, open_source
from train.__main__ import cli
from train.config import TrainConfig, as_train_config, load_train_config
from train.data.device import tensors_of
from train.data.pixels import to_model_inputs
from train.machine import runtime
from train.model.losses import compute_losses
from train.shapes import WindowShapes
from train.tools.estimate import STATE_BYTES, Estimate, estimate

MODEL = {"hidden_dim": 64, "num_layers": 3, "num_heads": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def real(tiny_set):
    """A real batch of 7 and its configuration."""
    config = make_set_config(tiny_set)
    loader = Loader(open_source(config, split="train"), config)
    return config, loader.shapes, next(iter(loader))


def default_shapes(config, **text):
    return WindowShapes.from_recipe(Recipe.model_validate({"text": text}), config)


def forward(model, batch, dtype):
    inputs = to_model_inputs(batch["inputs"], dtype=dtype)
    with runtime.autocast(torch.device("cpu"), dtype):
        outputs = model(inputs)
    losses = compute_losses(outputs, batch["targets"], batch["weight"], objective=model.objective)
    return losses["loss_total"]


def with_model(config, **model):
    values = config.model_dump(mode="json")
    values["model"] |= {**MODEL, **model}
    return TrainConfig.model_validate(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_autograd_saves_in_a_real_pass(real, dtype):
    config, shapes, batch = real
    config = with_model(config)
    model = MultiModalCreature(config, shapes).train()
    held = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *tensors_of(batch))}
    num_bytes = 0

    def pack(tensor):
        nonlocal num_bytes
        if tensor.untyped_storage().data_ptr() not in held:
            held[tensor.untyped_storage().data_ptr()] = tensor
            num_bytes += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, batch, dtype)
    assert loss.requires_grad
    without, _ = estimate(config, shapes, dtype=dtype)
    assert without.activation_bytes(7) == pytest.approx(num_bytes, rel=0.02)


@pytest.mark.parametrize("is_checkpointing", [False, True])
def test_memory_after_a_forward_pass_is_what_the_profiler_sees_allocated(real, is_checkpointing):
    config, shapes, batch = real
    config = with_model(config, gradient_checkpointing=is_checkpointing)
    model = MultiModalCreature(config, shapes).train()
    forward(model, batch, torch.float32).backward()  # allocates what is allocated only once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward(model, batch, torch.float32)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert loss.requires_grad
    without, checkpointed = estimate(config, shapes, dtype=torch.float32)
    expected = without.activation_bytes(7)
    if is_checkpointing:
        # The forward pass has not yet recomputed the largest layer, one of the frame encoder's.
        deeper, _ = estimate(with_model(config, vision_layers=2), shapes, dtype=torch.float32)
        layer = (deeper.activation_bytes(7) - without.activation_bytes(7)) / 2
        expected = checkpointed.activation_bytes(7) - layer
    assert allocated == pytest.approx(expected, rel=0.02)
    assert checkpointed.activation_bytes(7) < 0.8 * without.activation_bytes(7)


def test_flops_are_those_of_the_products_by_hand():
    config = as_train_config(
        {
            "training": {"loss_weights": {"audio": 0, "animation": 0}},
            "model": {**MODEL, "gradient_checkpointing": False},
        }
    )
    width, inner, vocab, ticks, layers = 64, 64 * math.ceil(64 / 24), 300, 40, 3
    linears = layers * (3 * width**2 + width**2 + 3 * width * inner) + 2 * width * vocab
    attention = layers * 2 * ticks * width
    forward_flops = 2 * ticks * (linears + attention)
    # Backward: two products for each linear; for attention the scores again, and four.
    backward_flops = 2 * ticks * (2 * linears + 2.5 * attention)
    # The last product of a layer is not recomputed.
    recomputed = 2 * ticks * (linears - 2 * width * vocab - layers * inner * width + attention)
    without, checkpointed = estimate(
        config, default_shapes(config, vocab_size=vocab), dtype=torch.float32
    )
    assert without.sample_flops == forward_flops + backward_flops
    assert checkpointed.sample_flops == forward_flops + backward_flops + recomputed


def test_bytes_over_the_bus_are_those_of_a_real_batch(real):
    config, shapes, batch = real
    without, _ = estimate(config, shapes, dtype=torch.float32)
    tensors = {tensor.data_ptr(): tensor for tensor in tensors_of(batch)}  # targets are inputs
    expected = sum(tensor.nbytes for tensor in tensors.values()) - batch["weight"].nbytes
    assert sum(without.stream_bytes.values()) == expected
    assert set(without.stream_bytes) == set(shapes.streams)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 10), ("large", 1000)])
def test_any_size_is_estimated_without_its_memory(size, millions):
    config = as_train_config({"model": {"size": size}})
    before_mb = runtime.memory_allocated_mb(torch.device("cpu"))
    without, _ = estimate(config, default_shapes(config), dtype=torch.bfloat16)
    assert runtime.memory_allocated_mb(torch.device("cpu")) - before_mb < 200
    count = sum(without.num_parameters.values())
    assert count / 1e6 == pytest.approx(millions, rel=0.1)
    assert without.state_bytes == STATE_BYTES * count
    with torch.device("meta"):
        model = MultiModalCreature(config)
    assert count == sum(p.numel() for p in model.parameters())


@given(
    fixed=st.integers(0, 10**9),
    per_sample=st.integers(1, 10**9),
    count=st.integers(1, 10**9),
    memory=st.integers(10**9, 10**11),
)
def test_the_largest_batch_fits_and_one_more_does_not(fixed, per_sample, count, memory):
    one = Estimate(
        num_parameters={"all": count},
        fixed_bytes=fixed,
        sample_bytes=per_sample,
        sample_flops=0,
        stream_bytes={},
    )
    size = one.largest_batch(memory)
    assert size == 0 or 16 * count + fixed + size * per_sample <= 0.9 * memory
    assert 16 * count + fixed + (size + 1) * per_sample > 0.9 * memory


def test_the_command_prints_an_estimate_and_the_origin_of_the_windows(tiny_set, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{shards: {tiny_set}}}\nmodel: {{hidden_dim: 16, num_layers: 1}}\n")
    result = CliRunner().invoke(cli, ["estimate", "--config", str(path)])
    assert result.exit_code == 0, result.output
    assert "an estimate" in result.output
    assert str(tiny_set) in result.output
    for gpu in ("24 GB", "40 GB", "80 GB"):
        assert gpu in result.output
    other = CliRunner().invoke(cli, ["estimate", "--config", str(path), "data.shards=null"])
    assert "the default recipe" in other.output


@pytest.mark.parametrize("is_on", [False, True])
def test_the_configured_checkpointing_is_marked_and_counted(tiny_set, tmp_path, is_on):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"data: {{shards: {tiny_set}, batch_size: 4}}\n"
        f"model: {{hidden_dim: 16, num_layers: 1, gradient_checkpointing: {str(is_on).lower()}}}\n"
    )
    runner = CliRunner(env={"COLUMNS": "120"})
    output = runner.invoke(cli, ["estimate", "--config", str(path)]).output
    mode = "with gradient checkpointing" if is_on else "without gradient checkpointing"
    config = load_train_config(path)
    shapes = WindowShapes.from_recipe(read_manifest(tiny_set).recipe, config)
    each = estimate(config, shapes, dtype=torch.bfloat16)[is_on]
    flops = f"{each.sample_flops / 1e9:.1f} G"
    assert f"FLOPs        {flops} per sample, forward and backward, {mode};" in output
    memory, largest = (line for line in output.splitlines() if f"│ {mode}, as configured" in line)
    assert f"{each.memory_bytes(4) / 2**30:.2f}" in memory
    assert str(each.largest_batch(24 * 2**30)) in largest
    assert output.count("as configured") == 2


def test_the_table_of_sizes_has_the_estimate_of_each(tiny_set, tmp_path, monkeypatch):
    monkeypatch.setattr("train.tools.estimate.SIZES", ("tiny",))  # each takes seconds
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"data: {{shards: {tiny_set}, batch_size: 4}}\n"
        "training: {accumulation_steps: 2}\nmodel: {hidden_dim: 16, num_layers: 1}\n"
    )
    result = CliRunner().invoke(cli, ["estimate", "--config", str(path), "--sizes"])
    assert result.exit_code == 0, result.output
    (row,) = (line for line in result.output.splitlines() if "tiny " in line)
    config = as_train_config({"data": {"shards": tiny_set}, "model": {"size": "tiny"}})
    shapes = WindowShapes.from_recipe(read_manifest(tiny_set).recipe, config)
    without, checkpointed = estimate(config, shapes, dtype=torch.bfloat16)
    gib, smaller_gib = (each.memory_bytes(4) / 2**30 for each in (without, checkpointed))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1] == f"{sum(without.num_parameters.values()) / 1e6:.1f}"
    assert cells[2:4] == [f"* {gib:.2f}", f"{smaller_gib:.2f}"]
    assert cells[4] == f"{without.sample_flops * 8 / 1e12:.2f}"
