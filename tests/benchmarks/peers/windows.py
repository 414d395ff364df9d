"""Define the batches of every loader, and read the samples of the peers' formats.

A batch is a dict of tensors: both cameras uint8 [B, 20, 224, 224, 3] in NHWC memory, dMel levels
uint8 [B, 200, 80], proprio float32 [B, 120, 20], touch float32 [B, 120, 5], a token per tick and
text stream int64 [B, 40], and `key`, a list of strings.
"""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
import torch

from shared.shardset.manifest import read_manifest
from train.config import TrainConfig
from train.data.loader import Loader, open_source
from train.data.pixels import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from recordings import Store

EYES = ("vision_left", "vision_right")
NUMBERS = {
    "audio": np.uint8,
    "proprio": np.float32,
    "touch": np.float32,
    "internal_text": np.int64,
    "external_text": np.int64,
}
"""Everything else, and its dtype."""
BATCH_SIZE = 8
WINDOW_S, TICK_RATE_HZ = 4, 10
NUM_FRAMES, SIZE = 20, 224
SHUFFLE_BUFFER = 100
"""Samples, for those that shuffle by a buffer."""

Arrays = dict[str, "NDArray[Any]"]

_SEAM = b"\xff\xd9\xff\xd8"
"""Between two JPEGs."""


def open_set(
    store: Store,
    name: str,
    *,
    workers: int = 0,
    pixels: str = "rgb",
    streams: Sequence[str] = (*EYES, *NUMBERS),
    is_shuffled: bool = False,
) -> Loader:
    """Open one epoch of one of our shard sets by our public loader."""
    data = {"shards": str(store.shards(name)), "modalities": list(streams), "pixels": pixels}
    data["window"] = {"duration_s": WINDOW_S}
    work = {"batch_size": BATCH_SIZE, "num_workers": workers, "prefetch_batches": 2}
    weights = {"internal_text": 1, "external_text": 1, "audio": 1, "animation": 1}
    config = TrainConfig.model_validate(
        {"data": data | work, "training": {"loss_weights": weights}}
    )
    source = open_source(config, split="train")
    return Loader(source, config, is_shuffled=is_shuffled, num_epochs=1)


def iter_windows(batches: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Arrays]]:
    """Yield (key, arrays) of every sample of our loader's batches, without padding rows."""
    for batch in batches:
        for i, key in enumerate(batch["keys"]):
            if batch["weight"][i] > 0:
                inputs = batch["inputs"].items()
                yield key, {n: v[i].numpy().copy() for n, v in inputs if not n.endswith("_valid")}


def iter_samples(store: Store) -> Iterator[tuple[str, dict[str, bytes], Arrays]]:
    """Yield (key, JPEGs of both cameras, numbers) of every sample, in stored order."""
    eyes = {eye: stored_members(store, "mjpeg", eye) for eye in EYES}
    for key, numbers in iter_windows(open_set(store, "mjpeg", streams=NUMBERS)):
        yield key, {eye: b"".join(members[key]) for eye, members in eyes.items()}, numbers


def stored_members(store: Store, name: str, eye: str) -> dict[str, list[bytes]]:
    """Read a camera's members of one of our sets by stock tarfile: those of each window, by key."""
    segment_s = read_manifest(store.shards(name)).recipe.segment_s
    found: dict[str, list[bytes]] = {}
    for path in sorted(store.shards(name).glob(f"train-*.{eye}.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                session, _, segment = member.name.partition(".")[0].partition("/")
                window = int(int(segment) * segment_s // WINDOW_S)
                key = f"{session}@{window * WINDOW_S * TICK_RATE_HZ}"
                found.setdefault(key, []).append(content.read())
    return found


def split_jpegs(member: bytes) -> list[memoryview]:
    """Split concatenated JPEGs without copying."""
    begins, at = [0], member.find(_SEAM)
    while at >= 0:
        begins.append(at + 2)
        at = member.find(_SEAM, at + 2)
    view = memoryview(member)
    stops = (*begins[1:], len(member))
    return [view[a:b] for a, b in zip(begins, stops, strict=True)]


def decode_eye(member: bytes) -> NDArray[np.uint8]:
    """Decode concatenated JPEGs straight into one array, uint8 [F, H, W, 3]."""
    pictures = np.empty((NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    for jpeg, picture in zip(split_jpegs(member), pictures, strict=True):
        simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=picture)
    return pictures


def normalize_as_users_do(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """Normalize frames as torchvision's ToTensor and Normalize do: float32 [F, 3, H, W]."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    values = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float().div_(255)
    return values.sub_(mean).div_(std)
