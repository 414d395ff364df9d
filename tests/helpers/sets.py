"""Write tiny sessions that lack different streams, build shard sets of them, and read these."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from helpers.sessions import sensor_lines, write_lines, write_tone, write_video
from preprocess.build.job import build_shards
from preprocess.cluster import Cluster
from shared.recipe import Recipe
from shared.shardset.manifest import read_manifest
from shared.streams import DEFAULT_STREAMS
from train.config import TrainConfig
from train.data.batch import array_forms, iter_sample_views
from train.data.loader import Loader
from train.data.shard_source import ShardSource
from train.data.windows import WindowGrid
from train.shapes import WindowShapes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from train.data.batch import SampleSource


LENGTHS_S = {"ann": 2.0, "bob": 1.6, "cat": 2.5, "dan": 1.5, "eve": 2.0}
"""ann, bob and cat have left video, sound, sensors and text; cat has right video, too; dan has only
sound and text; eve has only sensors."""

HEADS = ("internal_text", "external_text", "audio", "animation")
TEXT_HEADS = HEADS[:2]

WORDS = ("reach", "the red ball", "got it", "wait, wörld")


def write_sessions(root: Path) -> Path:
    """Write the folder of sessions."""
    for name, duration_s in LENGTHS_S.items():
        folder = root / name
        folder.mkdir(parents=True)
        frames_s = np.arange(round(duration_s * 30)) / 30
        if name not in {"dan", "eve"}:
            write_video(folder / "vision_left.mp4", times_s=frames_s, b_frames=0)
        if name == "cat":
            write_video(folder / "vision_right.mp4", times_s=frames_s, b_frames=0, gop=10)
        if name != "eve":
            write_tone(folder / "audio.wav", duration_s)
            write_lines(folder / "text.jsonl", _texts(duration_s))
        if name != "dan":
            write_lines(folder / "metadata.jsonl", sensor_lines(duration_s))
    return root


def set_recipe(**sections: Any) -> Recipe:
    """Make a recipe of segments of 0.4 s, of which no stream is required; `streams` replaces all.

    A window of :func:`make_config` spans three or four of them.
    """
    values: dict[str, Any] = {
        "segment": {"duration_s": 0.4},
        "video": {"size": 32},
        "audio": {"rate_hz": 8000, "dmel": {"fft_size": 512, "channels": 16}},
        "text": {"vocab_size": 300},
        "split": {"val_fraction": 0.25, "salt": "c"},  # holds out bob
        "shard": {"target_bytes": 80_000},
        "streams": {name: {**spec, "required": False} for name, spec in DEFAULT_STREAMS.items()},
    }
    values["streams"] = sections.pop("streams", values["streams"])
    return Recipe.model_validate(merge_sections(values, sections))


def merge_sections(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings."""
    both = {**values, **changes}
    for key in values.keys() & changes.keys():
        if isinstance(values[key], dict) and isinstance(changes[key], dict):
            both[key] = merge_sections(values[key], changes[key])
    return both


def make_set(root: Path, **sections: Any) -> Path:
    """Write sessions under `root` and build their shard set; return the set."""
    sessions = write_sessions(root / "sessions")
    return build_set(sessions, root / "shards", set_recipe(**sections))


def build_set(sessions: Path, out: Path, recipe: Recipe, **options: Any) -> Path:
    """Build a shard set in this process."""
    with Cluster(scheduler=None, num_workers=0, console=Console(file=io.StringIO())) as cluster:
        build_shards(sessions, out, recipe=recipe, cluster=cluster, **options)
    return out


def copy_set(shards: Path, to: Path) -> Path:
    """Copy a set, for example to damage the copy."""
    return shutil.copytree(shards, to)


def make_config(
    shards: Path | None = None, *, heads: tuple[str, ...] = HEADS, **data: Any
) -> TrainConfig:
    """Make a configuration of windows of 1 s that overlap, with losses of `heads` only."""
    window = {"duration_s": 1.0, "stride_s": 0.2}
    defaults = {"batch_size": 7, "num_workers": 0, "shuffle_block_shards": 2, "window": window}
    data = {**defaults, **data}
    return TrainConfig.model_validate(
        {
            "data": {"shards": shards, **data},
            "training": {
                "seed": 7,
                "num_threads": 1,
                "loss_weights": {h: float(h in heads) for h in HEADS},
            },
            "model": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "vision_layers": 1},
        }
    )


def sample_locations(source: SampleSource) -> list[tuple[int, int]]:
    """Return every (shard, window) in stored order."""
    return [(s, w) for s, count in enumerate(source.window_counts) for w in range(count)]


def open_windows(source: SampleSource, config: TrainConfig | None = None) -> SampleSource:
    """Return a source of a configuration's windows, by default those of :func:`make_config`."""
    config = config or make_config()
    shapes = WindowShapes.from_recipe(source.recipe, config)
    return source.open_windows(shapes, WindowGrid.from_config(config))


def index_of(root: Path, shard: str) -> Path:
    """Return the file of a shard's index."""
    entries = read_manifest(root).shards
    return root / next(e.index_file for e in entries if e.name == shard)


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest's values; remove its own checksum, which early sets lack, too."""
    path = root / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("sha256", None)
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def flip_byte(path: Path, offset: int) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x55
    path.write_bytes(content)


def _texts(duration_s: float) -> list[dict[str, Any]]:
    """Return an event every 0.3 s, alternating thoughts and speech."""
    return [
        {
            "timestamp": round(0.1 + 0.3 * i, 3),
            "stream": ("internal", "external")[i % 2],
            "text": WORDS[i % len(WORDS)],
        }
        for i in range(int((duration_s - 0.1) / 0.3))
    ]


def make_loader(shards, *, num_epochs=None, is_shuffled=True, split="train", **options):
    source = ShardSource(shards, split=split)
    config = make_config(shards, **options)
    return Loader(source, config, num_epochs=num_epochs, is_shuffled=is_shuffled)


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert set(batch) == set(other)
        for name in ("keys", "index", "epoch", "skipped"):
            assert batch[name] == other[name]
        for group in ("inputs", "targets"):
            assert set(batch[group]) == set(other[group])
            for name, tensor in batch[group].items():
                assert tensor.dtype == other[group][name].dtype
                assert torch.equal(tensor, other[group][name]), name
        assert torch.equal(batch["weight"], other["weight"])


def read_sample(source, location, *, pixels="yuv420"):
    """Return a window's arrays, as the loader has them, and the tokens of its texts.

    `source` gives windows: see :func:`open_windows`.
    """
    forms = array_forms(1, shapes=source.shapes, pixels=pixels)
    arrays = {name: np.empty(*form) for name, form in forms.items()}
    for values in arrays.values():
        values.view(np.uint8)[...] = 0xA5  # old content must not matter
    (out,) = iter_sample_views(arrays)
    return out, source.read_into(*location, out).texts
