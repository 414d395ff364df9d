"""The form of a batch, and the sources that fill it; see docs/batch.md.

::

    array_forms        names, shapes and dtypes of a batch's arrays
      -> SampleSource.read_into   a source decodes each sample straight into views of them
      -> write_text      text tokens, on ticks or packed densely
      -> compose_batch   the same memory as named tensors of "inputs" and "targets"

:class:`train.data.batch_maker.BatchMaker` runs this loop in the loader's processes and substitutes
corrupt samples; :func:`assemble_batch` runs it for a few samples at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np
import torch

from shared.errors import ConfigError
from shared.recipe import PAD_TOKEN, SENSOR_STREAMS, TEXT_STREAMS, VISION_STREAMS, Recipe, Stream
from train.config import HEAD_STREAM, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from shared.media.tokenizer import TextTokenizer
    from shared.session.reader import Mel, Text, TokenStream
    from shared.timing import OnStage
    from train.data.order import BatchOrder, OrderSettings

Batch = dict[str, Any]
"""A batch, as docs/batch.md describes it."""

SampleLocation = tuple[int, int]
"""(shard, row) of a sample."""

MIN_TOKENS: Final = 2
"""Shortest packed text batch, so that there is a next token to predict."""

_TIME_SLACK_TICKS = 1e-6
"""Rounding error of a token's time that must not delay it by a tick."""

_ARRAY_STREAMS = (*VISION_STREAMS, Stream.AUDIO, *SENSOR_STREAMS)
"""Streams that a source writes into arrays; it returns text as tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowShapes:
    """Sizes of one window's arrays, as a model and its batches need them."""

    num_ticks: int = 40
    tick_rate_hz: float = 10.0
    num_frames: int = 20
    image_size: int = 224
    num_audio_frames: int = 200
    mel_channels: int = 80
    mel_levels: int = 16
    num_sensor_samples: int = 120
    touch_size: int = 5
    proprio_size: int = 20
    vocab_size: int = 1024

    @property
    def audio_frames_per_tick(self) -> int:
        """Return the number of dMel frames in one tick."""
        return self.num_audio_frames // self.num_ticks

    @property
    def sensor_samples_per_tick(self) -> int:
        """Return the number of touch and proprio samples in one tick."""
        return self.num_sensor_samples // self.num_ticks

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, tick_rate_hz: float = 10.0) -> WindowShapes:
        """Return the sizes of a recipe's windows at a tick rate.

        Raises:
            ConfigError: the tick rate does not fit the recipe's rates.
        """
        num_ticks = round(tick_rate_hz * recipe.window.duration_s)
        for name, rate_hz in (
            ("mel.rate_hz", recipe.mel.rate_hz),
            ("sensors.rate_hz", recipe.sensors.rate_hz),
        ):
            if num_ticks < 1 or recipe.count(rate_hz) % num_ticks:
                raise ConfigError(
                    f"model.tick_rate_hz {tick_rate_hz:g} does not divide the recipe's {name} "
                    f"{rate_hz:g}; fix: choose one that divides both mel.rate_hz and "
                    "sensors.rate_hz"
                )
        return cls(
            num_ticks=num_ticks,
            tick_rate_hz=tick_rate_hz,
            num_frames=recipe.count(recipe.vision.rate_hz),
            image_size=recipe.vision.size,
            num_audio_frames=recipe.count(recipe.mel.rate_hz),
            mel_channels=recipe.mel.channels,
            mel_levels=recipe.mel.levels,
            num_sensor_samples=recipe.count(recipe.sensors.rate_hz),
            touch_size=recipe.sensors.touch_size,
            proprio_size=recipe.sensors.proprio_size,
            vocab_size=recipe.text.vocab_size,
        )


class SampleSource(Protocol):
    """Samples by (shard, row), from shard sets or from sessions read directly.

    A source writes the fields of a sample straight into the arrays of a batch. It returns only
    text, whose length varies.
    """

    recipe: Recipe
    tokenizer: TextTokenizer
    shard_sizes: NDArray[np.int64]
    """Samples per shard."""
    fingerprint: str
    """Changes when any sample does."""
    on_stage: OnStage
    """Callback that receives the name of each stage of reading when it ends."""

    def identity(self) -> dict[str, Any]:
        """Return plain values that tell this data from other data, for checkpoints."""
        ...

    def batch_order(self, settings: OrderSettings) -> BatchOrder:
        """Return the order of this source's batches.

        Raises:
            ValueError: no batch can be made.
        """
        ...

    def shard_name(self, shard: int) -> str:
        """Return a shard's name for messages."""
        ...

    def key(self, shard: int, row: int) -> str:
        """Return SESSION/WINDOW."""
        ...

    def start_s(self, shard: int, row: int) -> float:
        """Return when the window starts on the session clock."""
        ...

    def present(self, shard: int, row: int) -> tuple[Stream, ...]:
        """Return the streams that the sample has."""
        ...

    def prefetch_shards(self, shards: Iterable[int], streams: Collection[Stream]) -> None:
        """Prepare to read streams of these shards from now on, in about this order."""
        ...

    def prefetch_samples(
        self, locations: Iterable[SampleLocation], streams: Collection[Stream]
    ) -> None:
        """Prepare to read streams of these samples next."""
        ...

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[Any]], *, with_text: bool
    ) -> Text | None:
        """Write a sample's fields.

        Args:
            shard: its shard.
            row: its row there.
            out: arrays of one sample, ``<stream>`` and ``<stream>_valid``, of the streams to read.
                Each is overwritten completely, with zeros and False if the sample lacks the
                stream. After an error their content is undefined.
            with_text: whether to read the text too.

        Returns:
            The text, if it was requested and the sample has it.

        Raises:
            CorruptError: the bytes differ from their checksum or don't decode. For a shard, it
                names the file and the offset in it.
        """
        ...


class ReadSample(NamedTuple):
    """A sample that was read into a batch's arrays."""

    location: SampleLocation
    text: Text | None


class ArrayForm(NamedTuple):
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def streams_to_read(config: TrainConfig) -> set[Stream]:
    """Return the streams that a configuration's inputs and targets need."""
    return {*config.input_streams, *config.target_streams}


def array_forms(count: int, *, config: TrainConfig, shapes: WindowShapes) -> dict[str, ArrayForm]:
    """Return the arrays of fixed shape in a batch of `count` samples: all but packed text."""
    streams = streams_to_read(config)
    sensors, ticks = shapes.num_sensor_samples, (shapes.num_ticks,)
    size = shapes.image_size
    picture = (size * 3 // 2, size) if config.data.pixels == "yuv420" else (size, size, 3)
    sample_forms: dict[Stream, tuple[tuple[int, ...], type[np.generic]]] = {
        **dict.fromkeys(VISION_STREAMS, ((shapes.num_frames, *picture), np.uint8)),
        Stream.AUDIO: ((shapes.num_audio_frames, shapes.mel_channels), np.uint8),
        Stream.TOUCH: ((sensors, shapes.touch_size), np.float32),
        Stream.PROPRIO: ((sensors, shapes.proprio_size), np.float32),
    }
    if not config.is_text_only:
        sample_forms |= dict.fromkeys(TEXT_STREAMS, (ticks, np.int64))
    forms = {"weight": ArrayForm((count,), np.dtype(np.float32))}
    for stream in (s for s in sample_forms if s in streams):
        shape, dtype = sample_forms[stream]
        forms[stream] = ArrayForm((count, *shape), np.dtype(dtype))
        forms[f"{stream}_valid"] = ArrayForm((count, shape[0]), np.dtype(np.bool_))
    return forms


def iter_sample_views(arrays: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield for each sample of a batch the views that :meth:`SampleSource.read_into` writes."""
    sampled = {n: values for n, values in arrays.items() if _stream_of(n) in _ARRAY_STREAMS}
    for i in range(len(arrays["weight"])):
        yield {name: values[i] for name, values in sampled.items()}


def write_text(
    samples: Sequence[ReadSample],
    arrays: Mapping[str, NDArray[Any]],
    *,
    source: SampleSource,
    config: TrainConfig,
    shapes: WindowShapes,
) -> dict[str, NDArray[Any]]:
    """Write the text of a batch's samples, whatever the arrays held before.

    Text goes on ticks, into `arrays`, unless the configuration reads nothing but text.

    Returns:
        The arrays of packed text, whose length depends on the text; else {}.
    """
    streams = [s for s in TEXT_STREAMS if s in streams_to_read(config)]
    if config.is_text_only:
        return _pack_texts(samples, streams, source=source)
    for stream in streams:
        ticks, valid = arrays[stream], arrays[f"{stream}_valid"]
        ticks[...], valid[...] = PAD_TOKEN, False
        for i, (location, text) in enumerate(samples):
            if text is not None and stream in source.present(*location):
                ticks[i] = tokens_on_ticks(
                    text.internal if stream is Stream.INTERNAL_TEXT else text.external,
                    start_s=source.start_s(*location),
                    num_ticks=shapes.num_ticks,
                    tick_rate_hz=shapes.tick_rate_hz,
                )
                valid[i] = True
    return {}


def compose_batch(arrays: Mapping[str, NDArray[Any] | Tensor], config: TrainConfig) -> Batch:
    """Present arrays as tensors of the same memory: "inputs", "targets" and "weight"."""
    tensors = {str(name): torch.as_tensor(values) for name, values in arrays.items()}
    return {
        "inputs": {n: t for n, t in tensors.items() if _stream_of(n) in config.input_streams},
        "targets": {
            n.replace(stream, head, 1): t
            for head, stream in HEAD_STREAM.items()
            if head in config.heads
            for n, t in tensors.items()
            if _stream_of(n) == stream
        },
        "weight": tensors["weight"],
    }


def assemble_batch(
    source: SampleSource,
    locations: Sequence[SampleLocation],
    *,
    config: TrainConfig,
    shapes: WindowShapes,
) -> Batch:
    """Read samples into one batch of new memory; each has weight 1.

    Raises:
        CorruptError: a sample's bytes are damaged.
    """
    forms = array_forms(len(locations), config=config, shapes=shapes)
    arrays: dict[str, NDArray[Any]] = {name: np.empty(*form) for name, form in forms.items()}
    arrays["weight"][...] = 1
    with_text = any(s in TEXT_STREAMS for s in streams_to_read(config))
    samples = [
        ReadSample(location, source.read_into(*location, views, with_text=with_text))
        for location, views in zip(locations, iter_sample_views(arrays), strict=True)
    ]
    packed = write_text(samples, arrays, source=source, config=config, shapes=shapes)
    keys = [source.key(*location) for location in locations]
    return {**compose_batch(arrays | packed, config), "keys": keys}


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Join several batches; pad packed text to the longest with PAD, marked invalid."""
    joined: Batch = {}
    for group in ("inputs", "targets"):
        names = batches[0][group]
        joined[group] = {name: _concatenate([b[group][name] for b in batches]) for name in names}
    for head, stream in HEAD_STREAM.items():  # inputs and targets of a stream stay one tensor
        for suffix in ("", "_valid"):
            if f"{stream}{suffix}" in joined["inputs"] and f"{head}{suffix}" in joined["targets"]:
                joined["targets"][f"{head}{suffix}"] = joined["inputs"][f"{stream}{suffix}"]
    joined["weight"] = torch.cat([b["weight"] for b in batches])
    joined["keys"] = [key for b in batches for key in b["keys"]]
    return joined


def tokens_on_ticks(
    tokens: TokenStream, *, start_s: float, num_ticks: int, tick_rate_hz: float
) -> NDArray[np.int64]:
    """Place tokens on ticks, int64 [num_ticks]; PAD marks silence.

    A token takes the first free tick at or after its event's start. Tokens that do not fit into
    the window are cut off.
    """
    ticks = np.full(num_ticks, PAD_TOKEN, dtype=np.int64)
    first_free = 0
    for token, time_s in zip(tokens.ids, tokens.time_s, strict=True):
        start = (time_s - start_s) * tick_rate_hz + _TIME_SLACK_TICKS
        tick = max(first_free, int(min(max(start, 0.0), num_ticks)))  # int() takes no infinity
        if tick >= num_ticks:
            break
        ticks[tick] = token
        first_free = tick + 1
    return ticks


def pack_tokens(text: Text, streams: Sequence[Stream] = TEXT_STREAMS) -> dict[Stream, list[int]]:
    """Put the tokens of streams one after another by time; the other streams have PAD there."""
    tokens = [
        (time_s, number, stream, token)
        for number, (stream, text_tokens) in enumerate(
            zip(TEXT_STREAMS, (text.internal, text.external), strict=True)
        )
        for time_s, token in zip(text_tokens.time_s, text_tokens.ids, strict=True)
        if stream in streams
    ]
    # By event time, then by stream, so that an event's tokens stay together; the sort is stable.
    tokens.sort(key=lambda item: item[:2])
    return {
        stream: [token if own_stream is stream else PAD_TOKEN for _, _, own_stream, token in tokens]
        for stream in streams
    }


def write_absent(out: Mapping[str, NDArray[Any]], streams: Iterable[Stream]) -> None:
    """Write streams that a sample lacks, if they are read: zeros, all invalid."""
    for stream in streams:
        if stream in out:
            out[stream][...] = 0
            out[f"{stream}_valid"][...] = False


def write_numbers(
    out: Mapping[str, NDArray[Any]], stream: Stream, values: NDArray[np.float32]
) -> None:
    """Write touch or proprio [S, D] with its validity; NaN becomes zero."""
    valid = np.asarray(~np.isnan(values).any(axis=1))
    out[stream][...] = np.where(valid[:, None], values, np.float32(0))
    out[f"{stream}_valid"][...] = valid


def write_mel(out: Mapping[str, NDArray[Any]], mel: Mel) -> None:
    """Write dMel levels with their validity; masked levels become zero."""
    out[Stream.AUDIO][...] = np.where(mel.valid[:, None], mel.levels, np.uint8(0))
    out[f"{Stream.AUDIO}_valid"][...] = mel.valid


def _pack_texts(
    samples: Sequence[ReadSample], streams: Sequence[Stream], *, source: SampleSource
) -> dict[str, NDArray[Any]]:
    """Return the packed tokens of samples, [B, longest], with their validity."""
    silence: dict[Stream, list[int]] = {s: [] for s in streams}
    packed = [silence if text is None else pack_tokens(text, streams) for _, text in samples]
    lengths = [len(tokens[streams[0]]) for tokens in packed]
    shape = (len(samples), max(MIN_TOKENS, *lengths))
    is_token = np.arange(shape[1])[None, :] < np.array(lengths)[:, None]
    arrays: dict[str, NDArray[Any]] = {}
    for stream in streams:
        ids = np.full(shape, PAD_TOKEN, dtype=np.int64)
        for i, tokens in enumerate(packed):
            ids[i, : lengths[i]] = tokens[stream]
        is_present = np.array([stream in source.present(*sample.location) for sample in samples])
        arrays[stream], arrays[f"{stream}_valid"] = ids, is_token & is_present[:, None]
    return arrays


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Join rows; pad second dimensions that differ (packed text) with zeros."""
    longest = max(t.shape[1] for t in tensors)
    if all(t.shape[1] == longest for t in tensors):
        return torch.cat(list(tensors))
    padded = [torch.nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors]
    return torch.cat(padded)


def _stream_of(name: str) -> str:
    """Return the stream that an array belongs to."""
    return name.removesuffix("_valid")
