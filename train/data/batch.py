"""Samples of a source as one batch of tensors: the form that docs/architecture.md describes.

::

    array_forms      names, shapes and dtypes of a batch's arrays
      -> fill_arrays   the source decodes straight into them, whatever they held before
      -> compose_batch   the same memory as named tensors of "inputs" and "targets"

Text tokens are laid on ticks here: one token per tick and stream, each as soon as its event has
begun and the tick is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from shared.errors import ConfigError
from shared.recipe import PAD_TOKEN, SENSOR_STREAMS, TEXT_STREAMS, VISION_STREAMS, Recipe, Stream
from train.config import HEAD_STREAM, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from shared.media.tokenizer import TextTokenizer
    from shared.session.reader import Mel, Text, TokenStream

    ReadSample = Callable[[int, dict[str, NDArray[Any]]], tuple["Place", Text | None]]

MIN_TOKENS = 2
"""A dense text batch is at least this long, so that there is a next token to predict."""

Place = tuple[int, int]
"""(shard, row) of a sample."""

Batch = dict[str, Any]
"""As docs/architecture.md, "The batch"."""

_TIME_SLACK_TICKS = 1e-6

_SAMPLED = (*VISION_STREAMS, Stream.AUDIO, *SENSOR_STREAMS)
"""Streams that a source writes itself; text comes as tokens."""


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
        """DMel frames in one tick."""
        return self.num_audio_frames // self.num_ticks

    @property
    def sensor_samples_per_tick(self) -> int:
        """Touch and proprio samples in one tick."""
        return self.num_sensor_samples // self.num_ticks

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, tick_rate_hz: float = 10.0) -> WindowShapes:
        """Sizes of a recipe's windows at a tick rate.

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
                    f"{rate_hz:g}; choose one that divides both mel.rate_hz and sensors.rate_hz"
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
    """Samples by (shard, row)."""

    recipe: Recipe
    fingerprint: str
    """Changes when any sample does."""
    shard_sizes: NDArray[np.int64]
    tokenizer: TextTokenizer

    def shard_name(self, shard: int) -> str:
        """What people call a shard."""
        ...

    def key(self, shard: int, row: int) -> str:
        """SESSION/WINDOW."""
        ...

    def start_s(self, shard: int, row: int) -> float:
        """When the window begins on the session clock."""
        ...

    def present(self, shard: int, row: int) -> tuple[Stream, ...]:
        """Streams that the sample has."""
        ...

    def prefetch_shards(self, shards: Iterable[int], streams: Collection[Stream]) -> None:
        """Hear which shards, and what of them, are read from now on, in about this order."""
        ...

    def prefetch_samples(
        self, places: Iterable[tuple[int, int]], streams: Collection[Stream]
    ) -> None:
        """Hear which samples, by (shard, row), and what of them, are read next."""
        ...

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[np.generic]], *, with_text: bool
    ) -> Text | None:
        """Write a sample's fields.

        Args:
            shard: its shard.
            row: its row there.
            out: arrays of one sample, ``<stream>`` and ``<stream>_valid``, of the streams wanted.
                Whatever they held before, each is written wholly: zeros and False where the sample
                lacks the stream. After an error they hold anything.
            with_text: whether to read the text too.

        Returns:
            The text, where it was asked for and is there.

        Raises:
            CorruptError: the bytes differ from their checksum or don't decode; of a shard, it
                names the file and where in it they lie.
        """
        ...


class ArrayForm(NamedTuple):
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def array_forms(count: int, *, config: TrainConfig, shapes: WindowShapes) -> dict[str, ArrayForm]:
    """Arrays of fixed shape of a batch of `count` samples: all but densely packed text."""
    wanted = {*config.input_streams, *config.target_streams}
    sensors, ticks = shapes.num_sensor_samples, (shapes.num_ticks,)
    size = shapes.image_size
    picture = (size * 3 // 2, size) if config.data.pixels == "yuv420" else (size, size, 3)
    kinds: dict[Stream, tuple[tuple[int, ...], type[np.generic]]] = {
        **dict.fromkeys(VISION_STREAMS, ((shapes.num_frames, *picture), np.uint8)),
        Stream.AUDIO: ((shapes.num_audio_frames, shapes.mel_channels), np.uint8),
        Stream.TOUCH: ((sensors, shapes.touch_size), np.float32),
        Stream.PROPRIO: ((sensors, shapes.proprio_size), np.float32),
    }
    if not config.is_text_only:
        kinds |= dict.fromkeys(TEXT_STREAMS, (ticks, np.int64))
    forms = {"weight": ArrayForm((count,), np.dtype(np.float32))}
    for stream in (s for s in kinds if s in wanted):
        shape, dtype = kinds[stream]
        forms[stream] = ArrayForm((count, *shape), np.dtype(dtype))
        forms[f"{stream}_valid"] = ArrayForm((count, shape[0]), np.dtype(np.bool_))
    return forms


def fill_arrays(
    source: SampleSource,
    places: Sequence[Place],
    arrays: Mapping[str, NDArray[Any]],
    *,
    config: TrainConfig,
    shapes: WindowShapes,
    read: ReadSample | None = None,
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Read samples into the arrays of :func:`array_forms`, all but "weight".

    Args:
        source: where they are.
        places: which.
        arrays: are written wholly, whatever they held before.
        config: says which streams are inputs and targets.
        shapes: sizes of a window.
        read: reads sample number i into arrays and says which place it took in the end; by default
            the one asked for.

    Returns:
        The arrays whose shape depends on what is said (densely packed text), and the keys.

    Raises:
        CorruptError: a sample's bytes are damaged (and `read` does not help).
    """
    wanted = {*config.input_streams, *config.target_streams}
    with_text = any(s in wanted for s in TEXT_STREAMS)
    names = [n for n in arrays if _stream_of(n) in _SAMPLED]
    texts: list[Text | None] = []
    taken: list[Place] = []
    for i, place in enumerate(places):
        out = {name: arrays[name][i] for name in names}
        if read is None:
            texts.append(source.read_into(*place, out, with_text=with_text))
            taken.append(place)
        else:
            final_place, text = read(i, out)
            texts.append(text)
            taken.append(final_place)
    dense: dict[str, NDArray[Any]] = {}
    if config.is_text_only:
        dense = _dense_text(source, taken, texts, wanted)
    elif with_text:
        _write_text_on_ticks(source, taken, texts, arrays, shapes)
    return dense, [source.key(*place) for place in taken]


def write_absent(out: Mapping[str, NDArray[Any]], streams: Iterable[Stream]) -> None:
    """Write those of the wanted streams that a sample lacks: zeros, nowhere valid."""
    for stream in streams:
        if stream in out:
            out[stream][...] = 0
            out[f"{stream}_valid"][...] = False


def write_numbers(
    out: Mapping[str, NDArray[np.generic]], stream: Stream, values: NDArray[np.float32]
) -> None:
    """Write touch or proprio [S, D] with its validity; NaN becomes zero."""
    valid = np.asarray(~np.isnan(values).any(axis=1))
    out[stream][...] = np.where(valid[:, None], values, np.float32(0))
    out[f"{stream}_valid"][...] = valid


def write_mel(out: Mapping[str, NDArray[np.generic]], mel: Mel) -> None:
    """Write dMel levels with their validity; masked levels become zero."""
    out[Stream.AUDIO][...] = np.where(mel.valid[:, None], mel.levels, np.uint8(0))
    out[f"{Stream.AUDIO}_valid"][...] = mel.valid


def compose_batch(arrays: Mapping[str, NDArray[Any] | Tensor], config: TrainConfig) -> Batch:
    """Arrays as tensors of the same memory: "inputs", "targets" and "weight"."""
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
    places: Sequence[Place],
    *,
    config: TrainConfig,
    shapes: WindowShapes,
) -> Batch:
    """Read samples into one batch of new memory; each has weight 1.

    Raises:
        CorruptError: a sample's bytes are damaged.
    """
    forms = array_forms(len(places), config=config, shapes=shapes)
    arrays: dict[str, NDArray[Any]] = {name: np.empty(*form) for name, form in forms.items()}
    arrays["weight"][...] = 1
    dense, keys = fill_arrays(source, places, arrays, config=config, shapes=shapes)
    return {**compose_batch(arrays | dense, config), "keys": keys}


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Several batches as one; dense text is filled up to the longest with masked silence."""
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
    """Lay tokens on ticks, int64 [num_ticks]; PAD where nothing is said.

    A token takes the first free tick at or after its event's begin. What does not fit into the
    window is cut off.
    """
    ticks = np.full(num_ticks, PAD_TOKEN, dtype=np.int64)
    free = 0
    for token, time_s in zip(tokens.ids, tokens.time_s, strict=True):
        begin = (time_s - start_s) * tick_rate_hz + _TIME_SLACK_TICKS
        tick = max(free, int(min(max(begin, 0.0), num_ticks)))  # int() takes no infinity
        if tick >= num_ticks:
            break
        ticks[tick] = token
        free = tick + 1
    return ticks


def pack_tokens(text: Text, streams: Sequence[Stream] = TEXT_STREAMS) -> dict[Stream, list[int]]:
    """Tokens of streams one after another by time; where one speaks the others have PAD."""
    spoken = [
        (time_s, number, stream, token)
        for number, (stream, tokens) in enumerate(
            zip(TEXT_STREAMS, (text.internal, text.external), strict=True)
        )
        for time_s, token in zip(tokens.time_s, tokens.ids, strict=True)
        if stream in streams
    ]
    # By event time, then by stream, so that an event's tokens stay together; the sort is stable.
    spoken.sort(key=lambda item: item[:2])
    return {
        stream: [token if speaker is stream else PAD_TOKEN for _, _, speaker, token in spoken]
        for stream in streams
    }


def _write_text_on_ticks(
    source: SampleSource,
    places: Sequence[Place],
    texts: Sequence[Text | None],
    arrays: Mapping[str, NDArray[Any]],
    shapes: WindowShapes,
) -> None:
    """Write the token per tick and the validity of the text streams in `arrays`, [B, T]."""
    for stream in (s for s in TEXT_STREAMS if s in arrays):
        ticks, valid = arrays[stream], arrays[f"{stream}_valid"]
        ticks[...], valid[...] = PAD_TOKEN, False
        for i, (place, text) in enumerate(zip(places, texts, strict=True)):
            if text is not None and stream in source.present(*place):
                ticks[i] = tokens_on_ticks(
                    text.internal if stream is Stream.INTERNAL_TEXT else text.external,
                    start_s=source.start_s(*place),
                    num_ticks=shapes.num_ticks,
                    tick_rate_hz=shapes.tick_rate_hz,
                )
                valid[i] = True


def _dense_text(
    source: SampleSource,
    places: Sequence[Place],
    texts: Sequence[Text | None],
    wanted: set[Stream],
) -> dict[str, NDArray[Any]]:
    """Tokens one after another, [B, longest], with their validity."""
    streams = [s for s in TEXT_STREAMS if s in wanted]
    silent: dict[Stream, list[int]] = {s: [] for s in streams}
    packed = [silent if text is None else pack_tokens(text, streams) for text in texts]
    lengths = [len(p[streams[0]]) for p in packed]
    shape = (len(texts), max(MIN_TOKENS, *lengths))
    is_token = np.arange(shape[1])[None, :] < np.array(lengths)[:, None]
    arrays: dict[str, NDArray[Any]] = {}
    for stream in streams:
        ids = np.full(shape, PAD_TOKEN, dtype=np.int64)
        for i, tokens in enumerate(packed):
            ids[i, : lengths[i]] = tokens[stream]
        is_there = np.array([stream in source.present(*place) for place in places])
        arrays[stream], arrays[f"{stream}_valid"] = ids, is_token & is_there[:, None]
    return arrays


def _concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of all; second dimensions that differ (dense text) are filled up with zeros."""
    longest = max(t.shape[1] for t in tensors)
    if all(t.shape[1] == longest for t in tensors):
        return torch.cat(list(tensors))
    padded = [torch.nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors]
    return torch.cat(padded)


def _stream_of(name: str) -> str:
    return name.removesuffix("_valid")
