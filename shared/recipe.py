"""Define the recipe: which streams a session has, and how they become a shard set.

A recipe is a YAML file (``configs/recipe.yaml``) and this tree of frozen, validated objects. Each
column depends on its stream only, so that a changed key rebuilds only the columns of that stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path  # noqa: TC003 (pydantic reads it)
from typing import Any, Literal

from pydantic import Field, model_validator

from shared.config import Section, load_section
from shared.streams import (
    DEFAULT_STREAMS,
    DEFAULTS_OF_KIND,
    AudioDefaults,
    Kind,
    SensorDefaults,
    StreamSpec,
    TextDefaults,
    VideoDefaults,
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


_TOUCH = "{kind: sensor, key: touch, values: [{count: 5, type: fraction}]}"
_PROPRIO = "{kind: sensor, key: proprio, values: [{count: 10, type: angle}, ...]}"

MOVED_KEYS: Mapping[str, str] = {
    "required": "write `required: true` in each such stream under `streams:`",
    "window.duration_s": "set segment.duration_s here and data.window.duration_s for training",
    "window.stride_s": "set data.window.stride_s in the training configuration",
    "window.min_coverage": "set segment.min_coverage",
    "vision": "write `video:` instead of `vision:`",
    "mel": "write its keys under `audio:`, in `dmel:`",
    "sensors.rate_hz": "set sensor.rate_hz",
    "sensors.max_gap_s": "set sensor.max_gap_s",
    "sensors.touch_size": f"declare the stream under `streams:`, as touch: {_TOUCH}",
    "sensors.proprio_size": f"declare the stream under `streams:`, as proprio: {_PROPRIO}",
    "window": "write `segment:`; training windows are data.window of the training config",
    "sensors": "write `sensor:` instead of `sensors:`",
}
"""Keys of recipes before streams were declared, and what to write instead."""


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
        for key, fix in MOVED_KEYS.items():
            section, _, name = key.partition(".")
            inner = values.get(section)
            if section in values and (not name or (isinstance(inner, Mapping) and name in inner)):
                raise ValueError(f"{key} is no key of a recipe any more; fix: {fix}")
        streams = values.get("streams")
        if streams is None:
            streams = DEFAULT_STREAMS
        if not isinstance(streams, Mapping):
            raise ValueError("streams is not a mapping; fix: write `NAME: {kind: ..., file: ...}`")
        if not streams:
            raise ValueError("streams declares no stream; fix: declare one, or leave streams out")
        for name in streams:
            check_stream_name(str(name))
        defaults = {kind: _plain(values.get(kind.value)) for kind in Kind}
        completed = {
            name: _with_defaults(streams[name], defaults) for name in sorted(streams, key=str)
        }
        return {**values, "streams": completed}

    @model_validator(mode="after")
    def _check_streams(self) -> Recipe:
        sources: dict[tuple[Any, ...], str] = {}
        for name, stream in self.streams.items():
            source = tuple(getattr(stream, key) for key in stream.source_keys)
            if other := sources.get(source):
                raise ValueError(
                    f"streams {other} and {name} have the same source {stream.file}; fix: remove "
                    f"one, or give them different {' or '.join(stream.source_keys)}"
                )
            sources[source] = name
            for key, rate_hz in stream.rates_hz.items():
                count = rate_hz * self.segment_s
                if abs(count - round(count)) > 1e-9 or round(count) < 1:
                    raise ValueError(
                        f"streams.{name}: {key} {rate_hz:g} x segment.duration_s "
                        f"{self.segment_s:g} is {count:g}, not a whole number of samples; fix: "
                        "change one of the two"
                    )
        return self

    @property
    def segment_s(self) -> float:
        """Length of a segment in seconds."""
        return DEFAULT_SEGMENT_S if self.segment.duration_s is None else self.segment.duration_s

    def with_segment(self, duration_s: float) -> Recipe:
        """Return the recipe with a length of segments; checks that all rates fit it.

        Raises:
            ValueError: a stream has no whole number of samples in a segment.
        """
        values = self.as_json()
        values["segment"]["duration_s"] = duration_s
        return Recipe.model_validate(values)

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the streams that a session must have."""
        return tuple(name for name, stream in self.streams.items() if stream.required)

    def of_kind(self, *kinds: Kind) -> tuple[str, ...]:
        """Return the names of the streams of some kinds, sorted."""
        return tuple(name for name, stream in self.streams.items() if stream.kind in kinds)

    def count(self, rate_hz: float) -> int:
        """Return the number of samples in one segment of a signal of `rate_hz`."""
        return round(rate_hz * self.segment_s)


def _plain(section: object) -> dict[str, Any]:
    """Return the keys that a section sets."""
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, Mapping) else {}


def _with_defaults(stream: object, defaults: Mapping[Kind, Mapping[str, Any]]) -> object:
    """Return a stream's plain values, completed by the defaults of its kind."""
    values = _plain(stream)
    kind = values.get("kind")
    if kind not in set(Kind):
        return values or stream  # pydantic explains what is wrong
    inherited = {
        key: value
        for key, value in defaults[Kind(kind)].items()
        if key in DEFAULTS_OF_KIND[Kind(kind)].model_fields
    }
    for key, value in inherited.items():
        if isinstance(value, Mapping | Section) and isinstance(values.get(key), Mapping | Section):
            values[key] = {**_plain(value), **_plain(values[key])}
    return {**inherited, **values}


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe file.

    Raises:
        ConfigError: the file is missing or not YAML, or has a wrong key or value; exit code 2.
    """
    return load_section(Recipe, path)


def assign_split(session: str, recipe: Recipe) -> Split:
    """Assign a session to train or val by a hash of its name, independently of other sessions."""
    digest = hashlib.sha256(f"{recipe.split.salt}/{session}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "val" if share < recipe.split.val_fraction else "train"
