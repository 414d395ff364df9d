"""Define the recipe: which streams a session has, and how they become a shard set.

A recipe is a YAML file (``configs/recipe.yaml``) and this tree of frozen, validated objects. Each
column depends on its stream only, so that a changed key rebuilds only the columns of that stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path  # noqa: TC003 (pydantic reads it)
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from shared.config import Section, load_section, make_section
from shared.errors import ConfigError
from shared.kinds.column import MAX_MEMBER_BYTES
from shared.streams import (
    DEFAULT_STREAMS,
    DEFAULTS_OF_KIND,
    MAX_STREAMS,
    AudioDefaults,
    AudioStream,
    Kind,
    SensorDefaults,
    SensorStream,
    StreamSpec,
    TextDefaults,
    TextStream,
    VideoDefaults,
    VideoStream,
    check_stream_name,
)

PAD_TOKEN = 0
"""Token of silence, the same in every tokenizer."""

DEFAULT_SEGMENT_S = 2.0
"""Length of a segment if neither the recipe nor an existing set decides it."""

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
"""Sessions to train on, and held-out sessions."""


class SegmentRecipe(Section):
    """How a session is stored: in segments that touch."""

    duration_s: float | None = Field(None, gt=0, le=600)
    """Length of a segment in seconds; null means that of the set that is updated, else 2."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Share of a segment that each required stream must cover; other segments are rejected."""


class TextRecipe(TextDefaults):
    """How text becomes tokens."""

    vocab_size: int = Field(1024, ge=264, le=200_000)
    """Largest vocabulary of the byte-level BPE, which is trained on the train sessions."""
    tokenizer: Path | None = None
    """Path of a tokenizer.json to use instead of training one."""


class SplitRecipe(Section):
    """Which sessions are held out."""

    val_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of held-out sessions. A hash of the name decides, so a session never changes sides."""
    salt: str = ""
    """Text that is hashed with the names; another salt holds out other sessions."""


class ShardRecipe(Section):
    """How segments are packed into shards."""

    target_bytes: int = Field(256 * 2**20, ge=2**16)
    """Approximate bytes of media and numbers per shard."""


_COPY = "copy `streams:` from configs/recipe.yaml and change"

MOVED_KEYS: Mapping[str, str] = {
    "required": f"{_COPY} `required` of each stream",
    "window.duration_s": "set segment.duration_s here and data.window.duration_s for training",
    "window.stride_s": "set data.window.stride_s in the training configuration",
    "window.min_coverage": "set segment.min_coverage",
    "window": "write `segment:`; training windows are data.window of the training config",
    "vision": "write `video:` instead of `vision:`",
    "mel": "write its keys under `audio:`, in `dmel:`",
    "sensors.rate_hz": "set sensor.rate_hz",
    "sensors.max_gap_s": "set sensor.max_gap_s",
    "sensors.touch_size": f"remove it if it is 5; else {_COPY} the count of touch",
    "sensors.proprio_size": f"remove it if it is 20; else {_COPY} the counts of proprio",
    "sensors": "write `sensor:` instead of `sensors:`",
}
"""Keys of recipes before streams were declared, and what to write instead."""


_SECTION_OF_KIND: Mapping[Kind, type[Section]] = {**DEFAULTS_OF_KIND, Kind.TEXT: TextRecipe}

_SOURCE_KEYS = {
    Kind.VIDEO: (),
    Kind.AUDIO: ("track",),
    Kind.SENSOR: ("key",),
    Kind.TEXT: ("stream",),
}
"""Keys that say, with `file`, where a stream is; no two streams of a kind in a recipe file
agree in all of them."""


_PIXEL_BYTES = {"yuv420": 1.5, "raw": 3.0}

_BYTES_PER_S: Mapping[Kind, Callable[[Any], float]] = {
    Kind.VIDEO: lambda s: s.rate_hz * s.height * s.width * _PIXEL_BYTES.get(s.codec, 0.0),
    Kind.SENSOR: lambda s: s.rate_hz * s.size * 4,
}
"""Size of a second of a stored stream, where the recipe decides it; audio is always small."""


class Recipe(Section):
    """Everything that decides the bytes of a shard set."""

    segment: SegmentRecipe = SegmentRecipe()
    video: VideoDefaults = VideoDefaults()
    audio: AudioDefaults = AudioDefaults()
    sensor: SensorDefaults = SensorDefaults()
    text: TextRecipe = TextRecipe()
    streams: dict[str, StreamSpec] = Field(default_factory=dict, validate_default=True)
    """The streams by name, sorted; each has all keys of its kind. A recipe without `streams:` has
    the default seven."""
    split: SplitRecipe = SplitRecipe()
    shard: ShardRecipe = ShardRecipe()

    @model_validator(mode="before")
    @classmethod
    def _complete_streams(cls, values: Any) -> Any:  # noqa: ANN401
        """Refuse keys that moved, and give each stream the defaults of its kind."""
        if not isinstance(values, Mapping):
            return values
        if moved := _moved_keys(values):
            sentence = "is not a key of recipes any more; fix:"
            raise ValueError("\n".join(f"{key} {sentence} {MOVED_KEYS[key]}" for key in moved))
        streams = values.get("streams")
        if streams is None:
            streams = DEFAULT_STREAMS
        if not isinstance(streams, Mapping):
            raise ValueError(
                f"streams is {str(streams)[:40]!r}; fix: write `NAME: {{kind: ..., file: ...}}` "
                "below it"
            )
        if not streams:
            raise ValueError("streams declares no stream; fix: declare one, or leave streams out")
        if len(streams) > MAX_STREAMS:
            raise ValueError(
                f"streams declares {len(streams)} streams, more than {MAX_STREAMS}; fix: declare "
                "values of one sensor as one stream"
            )
        for name in streams:
            check_stream_name(str(name))
        defaults = {kind: _defaults_of(kind, values.get(kind.value)) for kind in Kind}
        names = sorted(streams, key=str)
        return {**values, "streams": {n: _with_defaults(streams[n], defaults) for n in names}}

    @model_validator(mode="after")
    def _check_streams(self) -> Recipe:
        for name, stream in self.streams.items():
            rates_hz = {} if isinstance(stream, TextStream) else {"rate_hz": stream.rate_hz}
            if isinstance(stream, AudioStream):
                rates_hz["dmel.rate_hz"] = stream.dmel.rate_hz
            for key, rate_hz in rates_hz.items():
                count = rate_hz * self.segment_s
                if abs(count - round(count)) > 1e-9 or round(count) < 1:
                    raise ValueError(
                        f"streams.{name}: {key} {rate_hz:g} x segment.duration_s "
                        f"{self.segment_s:g} is {count:g}, not a whole number of samples; fix: "
                        "change one of the two"
                    )
            num_bytes = self.segment_s * _BYTES_PER_S.get(stream.kind, lambda _: 0.0)(stream)
            if num_bytes > MAX_MEMBER_BYTES:
                raise ValueError(
                    f"streams.{name}: a segment of {self.segment_s:g} s has "
                    f"{num_bytes / 2**30:.2f} GiB, more than 1 GiB; fix: lower segment.duration_s"
                )
        return self

    @property
    def segment_s(self) -> float:
        """Length of a segment in seconds."""
        return DEFAULT_SEGMENT_S if self.segment.duration_s is None else self.segment.duration_s

    def with_segment(self, duration_s: float) -> Recipe:
        """Return the recipe with a length of segments.

        Raises:
            ConfigError: a stream has no whole number of samples in a segment.
        """
        values = self.as_json()
        values["segment"]["duration_s"] = duration_s
        return make_section(Recipe, values, origin="recipe")

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the streams that a session must have."""
        return tuple(name for name, stream in self.streams.items() if stream.required)

    @property
    def videos(self) -> dict[str, VideoStream]:
        """The video streams, by name."""
        return {n: s for n, s in self.streams.items() if isinstance(s, VideoStream)}

    @property
    def audios(self) -> dict[str, AudioStream]:
        """The audio streams, by name."""
        return {n: s for n, s in self.streams.items() if isinstance(s, AudioStream)}

    @property
    def sensors(self) -> dict[str, SensorStream]:
        """The sensor streams, by name."""
        return {n: s for n, s in self.streams.items() if isinstance(s, SensorStream)}

    @property
    def texts(self) -> dict[str, TextStream]:
        """The text streams, by name."""
        return {n: s for n, s in self.streams.items() if isinstance(s, TextStream)}

    def of_kind(self, *kinds: Kind) -> tuple[str, ...]:
        """Return the names of the streams of some kinds, sorted."""
        return tuple(name for name, stream in self.streams.items() if stream.kind in kinds)

    def count(self, rate_hz: float) -> int:
        """Return the number of samples in one segment of a signal of `rate_hz`."""
        return round(rate_hz * self.segment_s)


def _moved_keys(values: Mapping[str, Any]) -> list[str]:
    """List the keys of an old recipe that moved; a section only if none of its keys is listed."""
    moved = []
    for key in MOVED_KEYS:
        section, _, name = key.partition(".")
        inner = values.get(section)
        if name and isinstance(inner, Mapping) and name in inner:
            moved.append(key)
        if not name and section in values and not any(m.startswith(f"{key}.") for m in moved):
            moved.append(key)
    return moved


def _defaults_of(kind: Kind, section: object) -> dict[str, Any]:
    """Return what a kind's section sets for streams; nothing if it is invalid, which it reports."""
    keys = DEFAULTS_OF_KIND[kind].model_fields
    try:
        valid = _SECTION_OF_KIND[kind].model_validate({} if section is None else section)
    except ValidationError:
        return {}
    return valid.model_dump(exclude_unset=True, include=set(keys))


def _with_defaults(stream: object, defaults: Mapping[Kind, Mapping[str, Any]]) -> object:
    """Return a stream's plain values, completed by the defaults of its kind."""
    if not isinstance(stream, Mapping) or stream.get("kind") not in list(Kind):
        return stream  # complete, or pydantic explains what is wrong
    inherited = defaults[Kind(stream["kind"])]
    # A section inside, such as dmel, is completed key by key.
    inner = {
        key: {**value, **stream[key]}
        for key, value in inherited.items()
        if isinstance(value, Mapping) and isinstance(stream.get(key), Mapping)
    }
    return {**inherited, **stream, **inner}


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe file.

    Raises:
        ConfigError: the file is missing or not YAML, or has a wrong key or value; exit code 2.
    """
    recipe = load_section(Recipe, path)
    _require_own_sources(recipe, origin=str(path))
    return recipe


def _require_own_sources(recipe: Recipe, *, origin: str) -> None:
    """Check that no stream is declared twice; the sets of a mix may name a source differently."""
    names: dict[str, str] = {}
    for name, stream in recipe.streams.items():
        keys = ("file", *_SOURCE_KEYS[stream.kind])
        if isinstance(stream, SensorStream) and stream.key is None:
            keys = ("file", "names")
        source = ", ".join(f"{key} {getattr(stream, key)}" for key in keys)
        other = names.setdefault(f"{stream.kind} {source}", name)
        if other != name:
            raise ConfigError(
                f"{origin}: streams.{name} has the same source as streams.{other}: {source}; fix: "
                f"remove one of them, or change its {' or '.join(keys)}"
            )


def assign_split(session: str, recipe: Recipe) -> Split:
    """Assign a session to train or val by a hash of its name, independently of other sessions."""
    digest = hashlib.sha256(f"{recipe.split.salt}/{session}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "val" if share < recipe.split.val_fraction else "train"
