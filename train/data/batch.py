"""The form of a batch, and the sources that fill it; see docs/batch.md.

::

    array_forms        names, shapes and dtypes of a batch's arrays
      -> SampleSource.read_into   a source writes each window straight into views of them
      -> pack_texts      the tokens of text-only windows, packed densely
      -> compose_batch   the same memory as named tensors of "inputs" and "targets"

:class:`train.data.batch_maker.BatchMaker` runs this loop in the loader's processes and substitutes
corrupt samples; :func:`assemble_batch` runs it for a few samples at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np
import torch

from shared.recipe import PAD_TOKEN, Recipe
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from shared.media.tokenizer import TextTokenizer
    from shared.timing import OnStage
    from train.data.order import BatchOrder, OrderSettings
    from train.data.windows import WindowGrid
    from train.shapes import StreamShape, WindowShapes

Batch = dict[str, Any]
"""A batch, as docs/batch.md describes it."""

SampleLocation = tuple[int, int]
"""(shard, window) of a sample: the number of the shard, and of the window in it."""

MIN_TOKENS: Final = 2
"""Shortest packed text batch, so that there is a next token to predict."""

_DTYPES: Final[dict[Kind, type[np.generic]]] = {
    Kind.VIDEO: np.uint8,
    Kind.AUDIO: np.uint8,
    Kind.SENSOR: np.float32,
    Kind.TEXT: np.int64,
}


class WindowText(NamedTuple):
    """The tokens of one text stream in a window, in order of their own times."""

    ids: NDArray[np.int64]
    ticks: NDArray[np.int64]
    """Tick of each token, counted from the window's begin; above its end for tokens after the
    session's end."""
    event_s: NDArray[np.float64]
    """When the event of each token began, on the session clock."""
    is_valid: NDArray[np.bool_]
    """Whether the stream was recorded [ticks]."""


class ReadWindow(NamedTuple):
    """What reading a window into arrays returns."""

    texts: Mapping[str, WindowText]
    """The tokens of each text stream that is read."""
    num_members: int
    """Stored segments of streams that were read."""


class SampleSource(Protocol):
    """Samples by (shard, window), from shard sets or from sessions read directly.

    A source gives windows after :meth:`open_windows`. It writes the streams of a window straight
    into the arrays of a batch.
    """

    recipe: Recipe
    tokenizer: TextTokenizer
    shard_sizes: NDArray[np.int64]
    """Segments per shard."""
    fingerprint: str
    """Changes when any segment does."""
    shapes: WindowShapes
    """Sizes of the windows, and the streams that are read."""
    window_counts: NDArray[np.int64]
    """Windows per shard."""
    on_stage: OnStage
    """Callback that receives the name of each stage of reading when it ends."""

    def identity(self) -> dict[str, Any]:
        """Return plain values that tell this data from other data, for checkpoints."""

    def run_lengths_s(self) -> list[float]:
        """Return the length of each run of neighboring segments; no window leaves its run."""

    def open_windows(self, shapes: WindowShapes, grid: WindowGrid) -> SampleSource:
        """Return a source of windows over the same segments, which shares open files."""

    def batch_order(self, settings: OrderSettings) -> BatchOrder:
        """Return the order of this source's batches."""

    def shard_name(self, shard: int) -> str:
        """Return a shard's name for messages."""

    def key(self, shard: int, window: int) -> str:
        """Return SESSION@FIRST_TICK."""

    def prefetch_shards(self, shards: Iterable[int]) -> None:
        """Prepare to read these shards from now on, in about this order."""

    def prefetch_samples(self, locations: Iterable[SampleLocation]) -> None:
        """Prepare to read these samples next."""

    def read_into(self, shard: int, window: int, out: Mapping[str, NDArray[Any]]) -> ReadWindow:
        """Write the streams of a window.

        `out`: arrays of one sample, ``<stream>`` and ``<stream>_valid``, as
            :func:`iter_sample_views` gives them; text without an array is only returned. Each
            is overwritten completely, with zeros and False where nothing was recorded. After
            an error their content is undefined.

        Raises:
            CorruptError: the bytes differ from their checksum or don't decode. For a shard, it
                names the file and the offset in it.
        """


class ReadSample(NamedTuple):
    """A sample that was read into a batch's arrays."""

    location: SampleLocation
    texts: Mapping[str, WindowText]


class ArrayForm(NamedTuple):
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def array_forms(count: int, *, shapes: WindowShapes, pixels: str) -> dict[str, ArrayForm]:
    """Return the arrays of fixed shape in a batch of `count` samples: all but packed text."""
    forms = {"weight": ArrayForm((count,), np.dtype(np.float32))}
    for name, shape in shapes.streams.items():
        if shape.kind is Kind.TEXT and shapes.is_text_only:
            continue
        leading = (count, shape.num_positions)
        size = _picture_size(shape, pixels) if shape.kind is Kind.VIDEO else shape.size
        forms[name] = ArrayForm((*leading, *size), np.dtype(_DTYPES[shape.kind]))
        forms[f"{name}_valid"] = ArrayForm(leading, np.dtype(np.bool_))
    return forms


def iter_sample_views(arrays: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield for each sample of a batch the views that :meth:`SampleSource.read_into` writes."""
    for i in range(len(arrays["weight"])):
        yield {name: values[i] for name, values in arrays.items() if name != "weight"}


def pack_texts(samples: Sequence[ReadSample], shapes: WindowShapes) -> dict[str, NDArray[Any]]:
    """Return the tokens of text-only samples, packed densely, [B, longest], with their validity.

    The streams' tokens come one after another by the time of their events, an event's tokens
    together; where one stream has a token, the others have PAD.
    """
    if not shapes.is_text_only:
        return {}
    names = list(shapes.streams)
    events_s = (np.concatenate([texts[n].event_s for n in names]) for _, texts in samples)
    orders = [np.argsort(event_s, kind="stable") for event_s in events_s]
    size = (len(samples), max(MIN_TOKENS, *map(len, orders)))
    arrays: dict[str, NDArray[Any]] = {}
    for name in names:
        arrays[name] = np.full(size, PAD_TOKEN, dtype=np.int64)
        arrays[f"{name}_valid"] = np.zeros(size, dtype=np.bool_)
    for i, ((_, texts), order) in enumerate(zip(samples, orders, strict=True)):
        start = 0
        for name in names:
            ids = texts[name].ids
            positions = np.flatnonzero((order >= start) & (order < start + len(ids)))
            arrays[name][i, positions] = ids[order[positions] - start]
            arrays[f"{name}_valid"][i, : len(order)] = texts[name].is_valid.any()
            start += len(ids)
    return arrays


def compose_batch(arrays: Mapping[str, NDArray[Any] | Tensor], shapes: WindowShapes) -> Batch:
    """Present arrays as tensors of the same memory: "inputs", "targets" and "weight"."""
    tensors = {str(name): torch.as_tensor(values) for name, values in arrays.items()}
    suffixes = ("", "_valid")
    return {
        "inputs": {f"{n}{end}": tensors[f"{n}{end}"] for n in shapes.inputs for end in suffixes},
        "targets": {
            f"{head}{end}": tensors[f"{name}{end}"]
            for head, name in shapes.targets.items()
            for end in suffixes
        },
        "weight": tensors["weight"],
    }


def assemble_batch(
    source: SampleSource, locations: Sequence[SampleLocation], *, pixels: str
) -> Batch:
    """Read samples into one batch of new memory; each has weight 1."""
    shapes = source.shapes
    forms = array_forms(len(locations), shapes=shapes, pixels=pixels)
    arrays: dict[str, NDArray[Any]] = {name: np.empty(*form) for name, form in forms.items()}
    arrays["weight"][...] = 1
    samples = [
        ReadSample(location, source.read_into(*location, views).texts)
        for location, views in zip(locations, iter_sample_views(arrays), strict=True)
    ]
    keys = [source.key(*location) for location in locations]
    return {**compose_batch(arrays | pack_texts(samples, shapes), shapes), "keys": keys}


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Join several batches; pad packed text to the longest with PAD, marked invalid.

    A tensor that is both an input and a target stays one tensor.
    """
    joined: dict[tuple[int, ...], Tensor] = {}

    def join(group: str, name: str) -> Tensor:
        tensors = [batch[group][name] for batch in batches]
        key = tuple(map(id, tensors))
        if key not in joined:
            joined[key] = _concatenate(tensors)
        return joined[key]

    groups = {g: {n: join(g, n) for n in batches[0][g]} for g in ("inputs", "targets")}
    weight = torch.cat([b["weight"] for b in batches])
    return {**groups, "weight": weight, "keys": [key for b in batches for key in b["keys"]]}


def _picture_size(shape: StreamShape, pixels: str) -> tuple[int, ...]:
    """Return the shape of one frame; see :mod:`shared.media.yuv`."""
    height, width = shape.size
    return (height * 3 // 2, width) if pixels == "yuv420" else (height, width, 3)


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Join rows; pad second dimensions that differ (packed text) with zeros."""
    longest = max(t.shape[1] for t in tensors)
    if all(t.shape[1] == longest for t in tensors):
        return torch.cat(list(tensors))
    padded = [torch.nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors]
    return torch.cat(padded)
