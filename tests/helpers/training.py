"""Train a model of a few thousand weights on random batches; break and read its checkpoints."""

from __future__ import annotations

import copy
import io
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.recipe import Recipe
from train.checkpoints import FORMAT_VERSION
from train.config import as_train_config
from train.loop.trainer import Trainer
from train.model.multimodal import MultiModalCreature
from train.shapes import WindowShapes

RECIPE = Recipe.model_validate(
    {
        "video": {"size": 32},
        "audio": {"dmel": {"channels": 4, "levels": 4}},
        "text": {"vocab_size": 264},
    }
)
WINDOW = {"duration_s": 0.4}


def make_config(folder, **training):
    """Return plain values as yaml.safe_load does; in YAML 1.1 `lr: 3e-4` is a string."""
    optimizer = {"lr": "3e-3", "warmup_steps": 2, **training.pop("optimizer", {})}
    checkpointing = {"save_dir": str(folder / "checkpoints"), **training.pop("checkpointing", {})}
    return {
        "data": {
            "modalities": ["audio", "touch", "proprio", "internal_text", "external_text"],
            "window": WINDOW,
        },
        "training": {
            "max_steps": 6,
            "log_interval": 2,
            "eval_interval": 1000,
            "save_interval": 1000,
            "log_dir": str(folder / "runs"),
            "optimizer": optimizer,
            "checkpointing": checkpointing,
            **training,
        },
        "model": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
    }


def shapes_of(config, recipe=RECIPE):
    """Return the shapes of a configuration's windows over the streams of a recipe."""
    return WindowShapes.from_recipe(recipe, as_train_config(config))


SHAPES = shapes_of(make_config(Path("unused")))


def make_batch(seed, *, size=2):
    """Make a batch with about 1 in 4 positions invalid, so that batches have different counts."""
    rng = np.random.default_rng(seed)
    sizes = {n: (size, s.num_positions, *s.size) for n, s in SHAPES.streams.items()}
    classes = {n: s.num_classes for n, s in SHAPES.streams.items()}
    values = {
        "audio": rng.integers(0, classes["audio"], sizes["audio"], "u1"),
        "touch": rng.random(sizes["touch"], "f4"),
        "proprio": rng.normal(size=sizes["proprio"]).astype("f4"),
        "internal_text": rng.integers(0, classes["internal_text"], sizes["internal_text"]),
        "external_text": rng.integers(0, classes["external_text"], sizes["external_text"]),
    }
    inputs = {}
    for name, value in values.items():
        inputs[name] = torch.from_numpy(value)
        inputs[f"{name}_valid"] = torch.from_numpy(rng.random(value.shape[:2]) < 0.75)
    targets = {n: t for n, t in inputs.items() if n.startswith(("audio", "internal", "external"))}
    targets |= {"animation": inputs["proprio"], "animation_valid": inputs["proprio_valid"]}
    weight = torch.ones(size)
    return {"inputs": inputs, "targets": targets, "weight": weight, "keys": [f"s@{seed}"] * size}


def join(batches):
    """Join several batches to a large one."""
    return {
        "inputs": {n: torch.cat([b["inputs"][n] for b in batches]) for n in batches[0]["inputs"]},
        "targets": {
            n: torch.cat([b["targets"][n] for b in batches]) for n in batches[0]["targets"]
        },
        "weight": torch.cat([b["weight"] for b in batches]),
        "keys": [key for b in batches for key in b["keys"]],
    }


def with_nan(batch):
    """Copy a batch, so that its loss is not finite."""
    broken = copy.deepcopy(batch)
    broken["inputs"]["touch"][:] = torch.nan
    broken["inputs"]["touch_valid"][:] = True
    return broken


def corrupt_sample(number, **changes):
    """Describe a corrupt sample, as the loader reports it; each number is another member."""
    names = {"key": f"s@{number}", "shard": "train-000000", "window": number}
    return {**names, "file": "a.tar", "offset": number, "error": f"crc differs {number}", **changes}


class EndlessLoader:
    """An endless, resumable stream of batches, like train.data.loader.Loader."""

    def __init__(self, *, skipped=None, on_batch=None):
        self._next = 0
        self._skipped = skipped or {}
        self._on_batch = on_batch or (lambda index: None)

    def state_at(self, next_batch):
        return {"fingerprint": "tiny", "next_batch": next_batch}

    def load_state_dict(self, state):
        self._next = state["next_batch"]

    def __iter__(self):
        torch.empty((), dtype=torch.int64).random_()  # as torch's DataLoader does when it starts
        index = self._next
        while True:
            self._on_batch(index)
            yield {
                **make_batch(index),
                "index": index,
                "epoch": index // 4,
                "skipped": self._skipped.get(index, []),
            }
            index += 1


def with_spike(batch):
    """Copy a batch with poses a thousand times too large, so that its loss is a spike."""
    broken = copy.deepcopy(batch)
    broken["targets"]["animation"] *= 1e3
    return broken


class BrokenLoader(EndlessLoader):
    """An EndlessLoader that breaks the batches of some indices by a function."""

    def __init__(self, broken, how):
        super().__init__()
        self._broken, self._how = broken, how

    def __iter__(self):
        for batch in super().__iter__():
            yield self._how(batch) if batch["index"] in self._broken else batch


def make_trainer(config, loader=None, *, recipe=RECIPE, **options):
    """Make a trainer of a new model with fixed weights; it is silent without a console."""
    torch.manual_seed(1)
    model = MultiModalCreature(config, shapes_of(config, recipe))
    options.setdefault("console", Console(file=io.StringIO()))
    options.setdefault("run_name", "tiny")
    loader = EndlessLoader() if loader is None else loader
    return Trainer(model, config, loader, device="cpu", **options)


def weights_of(trainer):
    """Return all weights as one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def largest_difference(trainer, other):
    """Return the largest absolute difference of two trainers' weights."""
    return float((weights_of(trainer) - weights_of(other)).abs().max())


CPU = torch.device("cpu")


class SimulatedKillError(Exception):
    """Raised where a test simulates a kill."""


def fail(*_: object, **__: object) -> None:
    raise SimulatedKillError


def make_state(step=1, *, saved_at=None):
    model = {"weight": torch.arange(5000, dtype=torch.float32)}
    saved_at = time.time() if saved_at is None else saved_at
    constants = {"format_version": FORMAT_VERSION, "config": {}, "shapes": {}}
    return {**constants, "step": step, "saved_at": saved_at, "model": model}


def flip_a_bit(path):
    """Change one bit in the middle of the file, where the weights are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(path):
    path.write_bytes(b"")


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def read_events(folder):
    """Read event files by TensorBoard's own reader."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def text_of(folder, tag):
    events = read_events(folder).Tensors(f"{tag}/text_summary")
    return " ".join(event.tensor_proto.string_val[0].decode() for event in events)
