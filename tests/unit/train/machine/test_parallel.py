"""What FSDP2 gathers, and when; test_distributed.py compares its training with one process."""

from __future__ import annotations

import json

import pytest
from helpers.rank_program import start_ranks

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys, torch
from torch import nn
from torch.distributed.tensor import DTensor
from train.machine import distributed
from train.machine.parallel import average_gradients, parallelize
from train.model.blocks import Block, rotations

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(
            Block(32, num_heads=2, is_causal=True, dropout=0.0) for _ in range(3)
        )

    def forward(self, x):
        x = self.first(x).float()
        for block in self.blocks:
            x, _ = block(x, rotations(x.shape[1], first=0, head_dim=16, device=x.device))
        return x

torch.set_num_threads(1)
with distributed.process_group(torch.device("cpu")):
    torch.manual_seed(0)
    model = Layers()
    sizes = {(*p.shape,) for b in model.blocks for p in b.parameters() if p.dim() == 2}
    fsdp = parallelize(model, parallel="fsdp", dtype=torch.bfloat16)
    seen, saved = {}, {}
    for name, module in fsdp.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(
                lambda m, _, name=name: seen.update({name: str(m.weight.dtype)})
            )

    def pack(tensor):
        if (*tensor.shape,) in sizes or (*tensor.shape[::-1],) in sizes:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage
        return tensor

    x = torch.randn(2, 4, 8)
    for is_due in (False, True):
        with average_gradients(fsdp, is_due=is_due):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = fsdp(x).square().mean()
            kept = sum(storage.nbytes() for storage in saved.values())
            loss.backward()
        grads = sorted({f"{type(p.grad).__name__} {p.grad.dtype}" for p in fsdp.parameters()})
        saved.clear()
    print(json.dumps({"weights": seen, "kept": kept, "grads": grads}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Return what two ranks observed in a forward and backward pass under bf16 autocast."""
    script = tmp_path_factory.mktemp("parallel") / "script.py"
    script.write_text(SCRIPT)
    ranks = start_ranks(["-W", "error", str(script)], 2)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_linear_maps_of_layers_are_gathered_as_autocast_casts_them(seen):
    for rank in seen:
        layers = {n: d for n, d in rank["weights"].items() if n.startswith("blocks")}
        halves = {n for n, dtype in layers.items() if dtype == "torch.bfloat16"}
        assert halves == {n for n in layers if not n.endswith("norm")}
        assert {n for n, d in rank["weights"].items() if d == "torch.float32"} >= {"first"}


def test_no_weights_of_layers_are_kept_for_the_backward_pass(seen):
    assert [rank["kept"] for rank in seen] == [0, 0]


def test_gradients_are_float32_shards_also_before_the_last_micro_batch(seen):
    assert [rank["grads"] for rank in seen] == [["DTensor torch.float32"]] * 2
