"""Any single input and any single output, by configuration alone."""

from __future__ import annotations

import io
import math

import pytest
import torch
from helpers.sets import HEADS, make_config
from rich.console import Console

from shared.streams import DEFAULT_STREAMS
from train import Loader, MultiModalCreature, Trainer, open_source
from train.data.pixels import to_model_inputs
from train.model.encoders import module_key

pytestmark = pytest.mark.usefixtures("one_thread")


def make_run(shards, folder, stream, head):
    """Configuration of one step."""
    config = make_config(shards, heads=(head,), modalities=[stream])
    values = config.model_dump(mode="json")
    values["training"] |= {
        "max_steps": 1,
        "log_dir": str(folder / "runs"),
        "checkpointing": {"save_dir": str(folder / "checkpoints")},
    }
    return type(config).model_validate(values)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stream", DEFAULT_STREAMS)
def test_a_run_of_one_input_and_one_output_reads_trains_and_evaluates(
    tiny_set, tmp_path, stream, head
):
    config = make_run(tiny_set, tmp_path, stream, head)
    loader = Loader(open_source(config, split="train"), config)
    held_out = Loader(open_source(config, split="val"), config, is_shuffled=False, num_epochs=1)
    batch = next(iter(held_out))
    assert set(batch["inputs"]) == {stream, f"{stream}_valid"}
    assert set(batch["targets"]) == {head, f"{head}_valid"}
    model = MultiModalCreature(config, loader.shapes)
    before = [p.detach().clone() for p in model.parameters()]
    console = Console(file=io.StringIO())
    trainer = Trainer(model, config, loader, val_loader=held_out, device="cpu", console=console)
    summary = trainer.train()
    losses = {**summary.last_losses, **{f"val/{n}": x for n, x in summary.last_val_losses.items()}}
    assert {n.removeprefix("val/") for n in losses} == {"loss_total", f"loss_{head}"}
    assert all(math.isfinite(x) and x > 0 for x in losses.values()), losses
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stream", DEFAULT_STREAMS)
def test_the_one_output_depends_on_the_one_input(tiny_set, tmp_path, stream, head):
    config = make_run(tiny_set, tmp_path, stream, head)
    source = open_source(config, split="train")
    batches = Loader(source, config, is_shuffled=False, num_epochs=1)
    batch = next(b for b in batches if b["inputs"][f"{stream}_valid"].any())
    model = MultiModalCreature(config, batches.shapes)
    torch.nn.init.normal_(model.predictors[module_key(head)].weight)  # animation starts at zero
    inputs = to_model_inputs(batch["inputs"])
    hidden = {**inputs, f"{stream}_valid": torch.zeros_like(inputs[f"{stream}_valid"])}
    assert not torch.equal(model(inputs)[head], model(hidden)[head])
