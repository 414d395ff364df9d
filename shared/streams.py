"""Declare streams: the timed signals of a session, and how each is stored.

A recipe declares its streams under names. Each stream has one of four kinds, and each kind has one
class here. What the program does with a stream depends on its kind and on these keys, never on its
name.
"""

from __future__ import annotations

import enum
import re
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Section

METADATA_FILE = "metadata.jsonl"
"""The session file whose lines hold the readings of several sensors."""

TEXT_FILE = "text.jsonl"
"""The session file that holds text events."""

MAX_STREAMS = 512
"""Most streams of a recipe."""

STREAM_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
RESERVED_NAMES = frozenset([
    "animation", "coverage", "epoch", "extras", "index", "inputs", "keys", "made_s", "num_samples",
    "present", "segment", "session", "skipped", "stages_s", "targets", "timestamp", "total",
    "valid", "vision", "weight",
])  # fmt: skip
"""Names of other things in batches, indexes, predictions and metrics."""

_PLAIN_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,254}")


class Kind(enum.StrEnum):
    """What a stream can be; a closed table."""

    VIDEO = "video"
    AUDIO = "audio"
    SENSOR = "sensor"
    TEXT = "text"


class ValueType(enum.StrEnum):
    """What a sensor value means; it decides interpolation, prediction, loss and statistics."""

    SCALAR = "scalar"
    FRACTION = "fraction"
    """0 to 1."""
    ANGLE = "angle"
    """rad, stored in [-pi, pi)."""
    VELOCITY = "velocity"
    POSITION = "position"
    """x, y, z."""
    QUATERNION = "quaternion"
    """x, y, z, w; unit length, stored with a canonical sign."""
    DIRECTION = "direction"
    """x, y, z; unit length."""


VECTOR_SIZES = {ValueType.POSITION: 3, ValueType.DIRECTION: 3, ValueType.QUATERNION: 4}
"""Values that belong together; other types have one."""

DEFAULT_UNITS = {
    ValueType.FRACTION: "0..1",
    ValueType.ANGLE: "rad",
    ValueType.VELOCITY: "rad/s",
    ValueType.POSITION: "m",
}


class ValueGroup(Section):
    """Neighboring values of a sensor that have one type and unit."""

    count: int = Field(ge=1, le=4096)
    """Number of values; a quaternion has 4, a position or direction 3."""
    type: ValueType
    """Meaning of the values."""
    unit: str | None = Field(None, max_length=32)
    """Unit for axes and statistics; null means the unit of the type."""
    names: tuple[str, ...] | None = None
    """One name per value: the columns of a table file, and labels of curves."""

    @property
    def vector_size(self) -> int:
        """Values that belong together: 4 of a quaternion, 3 of a position or direction, else 1."""
        return VECTOR_SIZES.get(self.type, 1)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label of every value for curves: its name, or its type and number."""
        return self.names or tuple(f"{self.type}_{i}" for i in range(self.count))

    @property
    def unit_label(self) -> str:
        """Unit for axes; empty if there is none."""
        return self.unit if self.unit is not None else DEFAULT_UNITS.get(self.type, "")

    @model_validator(mode="after")
    def _check_count(self) -> ValueGroup:
        if self.count % self.vector_size:
            raise ValueError(
                f"{self.count} values of type {self.type} are not a multiple of "
                f"{self.vector_size}; fix: count every component"
            )
        names = self.names or ()
        if self.names is not None and len(names) != self.count:
            raise ValueError(
                f"{len(names)} names for {self.count} values; fix: name each value once"
            )
        if len(set(names)) != len(names) or not all(names):
            raise ValueError("names are empty or repeat; fix: give each value its own name")
        if self.type is ValueType.ANGLE and self.unit not in (None, "rad"):
            raise ValueError(
                f"angles wrap in radians, but their unit is {self.unit!r}; fix: convert to rad, or "
                "write `type: scalar`"
            )
        return self


class MaskReason(enum.StrEnum):
    """Why recorded content is not trusted; a closed table."""

    STILL = "still"
    """It repeats for longer than the world stands still."""
    CLOCK = "clock"
    """Its times are known to be wrong."""
    DAMAGED = "damaged"
    """The decoder had to guess it."""


class MaskDefaults(Section):
    """Which faults of the recording are masked."""

    mask: tuple[MaskReason, ...] = tuple(MaskReason)
    """Content with these faults is masked in the segments. Validation reports the others too."""


class Expectation(Section):
    """What validation expects of a stream; only `max_still_s` changes what is stored."""

    min_rate_hz: float | None = Field(None, gt=0)
    """Lowest rate of readings or frames that passes."""
    max_gap_s: float | None = Field(None, gt=0)
    """Longest gap that passes; null judges gaps by the stream's own regular rate."""
    max_still_s: float | None = Field(None, gt=0)
    """Longest time for which content may repeat exactly; null takes the default of the kind."""
    range: tuple[float, float] | None = None
    """Lowest and highest value that passes; also the axis of the histograms."""

    @model_validator(mode="after")
    def _check_range(self) -> Expectation:
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range {[*self.range]} is empty; fix: write the lower number first")
        return self


class VideoDefaults(MaskDefaults):
    """How a video becomes frames."""

    rate_hz: float = Field(5.0, gt=0, le=120)
    """Frames per second that are kept, the nearest ones by presentation time."""
    size: int | tuple[int, int] = 224
    """Pixels: one number for a square, or [height, width]; multiples of 16."""
    fit: Literal["crop", "stretch", "pad"] = "crop"
    """How another aspect ratio fits: crop or squeeze the longer side, or pad with black bars."""
    codec: Literal["h264", "mjpeg", "yuv420", "raw"] = "h264"
    """How frames are stored: as an H.264 stream per segment, JPEG pictures, planes, or RGB.

    On real footage of 224 pixels, in bytes per frame, PSNR, and ms of one core to decode to planes
    and to RGB: h264 4,500, 38.1 dB, 0.18, 0.45; mjpeg 13,200, 38.5 dB, 0.20, 0.18; yuv420 75,264,
    44.9 dB, 0.007, 0.31; raw 150,528, exact, 0.19, 0.015. Of the compressing codecs, h264 is by far
    the smallest and narrowly the cheapest to decode to planes (`data.pixels: yuv420`); it costs
    1 ms per frame to build. mjpeg is the cheapest to decode to RGB. yuv420 needs almost no CPU, if
    disk and network deliver 75 kB per frame as fast as the GPU consumes them.
    tests/benchmarks/bench_pixels.py measures it."""
    quality: int = Field(90, ge=1, le=100)
    """mjpeg: JPEG quality."""
    qp: int = Field(22, ge=1, le=51)
    """h264: constant quantizer; plus 6 halves the precision. 22 has the PSNR of JPEG quality 90."""
    max_error_s: float | None = Field(None, gt=0)
    """Frames farther than this from their grid time are masked; null means 1 / rate_hz."""

    @field_validator("size", mode="before")
    @classmethod
    def _check_size(cls, size: object) -> object:
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2 or any(type(side) is not int for side in sides):
            raise ValueError(f"{size!r} is not a size in pixels; fix: write 224 or [height, width]")
        for side in sides:
            if not 16 <= side <= 2048 or side % 16:
                raise ValueError(
                    f"{side} pixels are not a multiple of 16 from 16 to 2048; fix: write "
                    f"{min(2048, max(16, round(side / 16) * 16))}"
                )
        return size

    @property
    def height(self) -> int:
        """Height of a frame in pixels."""
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        """Width of a frame in pixels."""
        return self.size if isinstance(self.size, int) else self.size[1]

    @property
    def tolerance_s(self) -> float:
        """Largest distance in seconds between a grid time and its frame."""
        return 1.0 / self.rate_hz if self.max_error_s is None else self.max_error_s


class DmelSettings(Section):
    """How a waveform becomes dMel tokens (Bai et al. 2024, arXiv:2407.15835)."""

    rate_hz: int = Field(50, ge=1, le=1000)
    """Frames per second; must divide the audio rate."""
    fft_size: int = Field(1024, ge=64, le=16_384)
    """Samples in each analysis window. The window ends where its frame ends, so that no frame
    depends on later samples."""
    channels: int = Field(80, ge=4, le=256)
    """Number of mel channels."""
    levels: int = Field(16, ge=2, le=255)
    """Levels per channel; the value 255 means masked."""
    floor_db: float = -70.0
    """Mel energy in dB at the center of the lowest level; lower energies get that level."""
    ceiling_db: float = 30.0
    """Mel energy in dB at the center of the highest level; higher energies get that level."""


class AudioDefaults(MaskDefaults):
    """How audio becomes a waveform and tokens."""

    rate_hz: int = Field(16_000, ge=4_000, le=96_000)
    """Sample rate of the mono waveform."""
    loudness_dbfs: float | None = Field(-23.0, ge=-60, le=0)
    """RMS level to which each session is normalized, with limited peaks; null keeps its level."""
    peak_dbfs: float = Field(-1.0, ge=-60, le=0)
    """Largest level of any sample after the gain."""
    dmel: DmelSettings = DmelSettings()
    """dMel tokens."""

    @model_validator(mode="after")
    def _check_dmel(self) -> AudioDefaults:
        if self.rate_hz % self.dmel.rate_hz:
            raise ValueError(
                f"dmel.rate_hz {self.dmel.rate_hz} does not divide the audio's rate_hz "
                f"{self.rate_hz}; fix: change one of the two"
            )
        if self.dmel.ceiling_db <= self.dmel.floor_db:
            raise ValueError(
                f"dmel.ceiling_db {self.dmel.ceiling_db:g} is not above dmel.floor_db "
                f"{self.dmel.floor_db:g}; fix: raise the ceiling or lower the floor"
            )
        return self


class SensorDefaults(MaskDefaults):
    """How readings of a sensor become samples on a grid."""

    rate_hz: float = Field(30.0, gt=0, le=2000)
    """Samples per second on the grid."""
    max_gap_s: float | None = Field(None, gt=0)
    """Grid points inside a longer gap of the recording are masked instead of interpolated; null
    means 3 / rate_hz."""
    resample: Literal["by_type", "hold"] = "by_type"
    """by_type interpolates as the value type says, for sensors recorded at rate_hz or more. hold
    takes the latest reading that is not older than max_age_s, and never a later one."""
    max_age_s: float | None = Field(None, gt=0)
    """hold: oldest reading that is still used; null means max_gap_s."""

    @property
    def gap_limit_s(self) -> float:
        """Longest gap in seconds that is interpolated."""
        return 3.0 / self.rate_hz if self.max_gap_s is None else self.max_gap_s

    @property
    def age_limit_s(self) -> float:
        """Age in seconds of the oldest reading that `hold` uses."""
        return self.gap_limit_s if self.max_age_s is None else self.max_age_s


class TextDefaults(Section):
    """How text events become tokens on the clock."""

    tokens_per_s: float = Field(10.0, gt=0, le=1000)
    """Tokens of an event follow each other at this rate, the first at the event's time."""


class StreamBase(Section):
    """Keys of every stream."""

    kind: Kind
    file: str
    """File of the session folder that holds the stream."""
    required: bool = False
    """Whether a session without it, and segments that it does not cover, are rejected."""
    clock: Literal["session", "own"] = "session"
    """session: timestamps share the session's offset. own: they are seconds since session start."""
    expect: Expectation = Expectation()
    """What validation expects."""

    @field_validator("file")
    @classmethod
    def _check_file(cls, file: str) -> str:
        if _PLAIN_FILE.fullmatch(file) is None:
            raise ValueError(
                f"{file[:80]!r} is not the name of a file in the session folder; fix: store the "
                "file in the session folder, and write its name"
            )
        return file


class VideoStream(VideoDefaults, StreamBase):
    """A video file."""

    kind: Literal[Kind.VIDEO] = Kind.VIDEO


ChannelChoice = Literal["auto", "mean"] | Annotated[int, Field(ge=0, le=63)]


class AudioStream(AudioDefaults, StreamBase):
    """An audio file, or one audio track of a file."""

    kind: Literal[Kind.AUDIO] = Kind.AUDIO
    track: int = Field(0, ge=0, le=63)
    """Index of the audio track in the file."""
    channels: ChannelChoice = "auto"
    """auto averages the channels, but inverts or leaves out those that would cancel; mean always
    averages; a number, from 0, takes one channel."""


TIME_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9, "100ns": 1e7}
"""Units of a timestamp per second."""


class TimedStream(StreamBase):
    """Keys of streams whose lines or rows have timestamps."""

    time: str = Field("timestamp", min_length=1, max_length=256)
    """Key or column of the timestamps."""
    time_unit: Literal["s", "ms", "us", "ns", "100ns"] = "s"
    """Unit of the timestamps."""

    @property
    def units_per_s(self) -> float:
        """Units of a timestamp in one second."""
        return TIME_UNITS[self.time_unit]


class SensorStream(SensorDefaults, TimedStream):
    """Numbers with timestamps: a key of ``metadata.jsonl``, or a table file of its own."""

    kind: Literal[Kind.SENSOR] = Kind.SENSOR
    file: str = METADATA_FILE
    """metadata.jsonl, or a .jsonl, .csv, .tsv or .parquet file of the session folder."""
    key: str | None = Field(None, min_length=1, max_length=256)
    """JSON key of the list of values, or prefix of the table's columns; null takes the columns that
    `values` names."""
    values: tuple[ValueGroup, ...] = Field(min_length=1)
    """The values of a reading, in order."""

    @property
    def size(self) -> int:
        """Values of a reading."""
        return sum(group.count for group in self.values)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Name of every value; None if a group has no names."""
        is_named = all(group.names is not None for group in self.values)
        return tuple(n for g in self.values for n in g.names or ()) if is_named else None

    @property
    def labels(self) -> tuple[str, ...]:
        """Label of every value for curves, group after group."""
        return tuple(label for group in self.values for label in group.labels)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Columns of each value group."""
        stops = list(accumulate(group.count for group in self.values))
        return tuple(slice(start, stop) for start, stop in pairwise([0, *stops]))

    @model_validator(mode="after")
    def _check_source(self) -> SensorStream:
        suffixes = (".jsonl", ".csv", ".tsv", ".parquet")
        if not self.file.endswith(suffixes):
            raise ValueError(
                f"file {self.file} is no sensor file; fix: use one of {', '.join(suffixes)}"
            )
        if self.key is None and self.names is None:
            raise ValueError(
                "neither key nor names of values are set; fix: set `key: KEY`, or `names` in every "
                "group of values"
            )
        if self.size > 4096:
            raise ValueError(f"{self.size} values exceed 4096; fix: declare several streams")
        names = self.names
        if names is not None and len(set(names)) != len(names):
            raise ValueError("names of values repeat; fix: give each value its own name")
        return self


class TextStream(TextDefaults, TimedStream):
    """Text events with timestamps."""

    kind: Literal[Kind.TEXT] = Kind.TEXT
    file: str = TEXT_FILE
    """A .jsonl file of lines with a timestamp and `text`."""
    stream: str | None = Field(None, min_length=1, max_length=256)
    """Value of the key `stream` of the lines that belong to it; null takes all lines."""
    key: str | None = Field(None, min_length=1, max_length=256)
    """Key of metadata.jsonl whose texts also belong to the stream; null means STREAM_text, if
    `stream` is set."""

    @property
    def metadata_key(self) -> str | None:
        """Key of ``metadata.jsonl`` whose texts belong to the stream."""
        if self.key is not None:
            return self.key
        return f"{self.stream}_text" if self.stream is not None else None

    @model_validator(mode="after")
    def _check_file_type(self) -> TextStream:
        if not self.file.endswith(".jsonl"):
            raise ValueError(f"file {self.file} is not .jsonl; fix: write the texts as JSON lines")
        return self


StreamSpec = Annotated[
    VideoStream | AudioStream | SensorStream | TextStream, Field(discriminator="kind")
]
"""A declared stream of any kind."""

DEFAULTS_OF_KIND: dict[Kind, type[Section]] = {
    Kind.VIDEO: VideoDefaults,
    Kind.AUDIO: AudioDefaults,
    Kind.SENSOR: SensorDefaults,
    Kind.TEXT: TextDefaults,
}
"""The section of a recipe that holds the defaults of each kind."""

DEFAULT_STREAMS: dict[str, dict[str, Any]] = {
    "vision_left": {"kind": "video", "file": "vision_left.mp4", "required": True},
    "vision_right": {"kind": "video", "file": "vision_right.mp4"},
    "audio": {"kind": "audio", "file": "audio.wav", "required": True},
    "touch": {"kind": "sensor", "key": "touch", "values": [{"count": 5, "type": "fraction"}]},
    "proprio": {
        "kind": "sensor",
        "key": "proprio",
        "required": True,
        "values": [
            {"count": 10, "type": "angle", "unit": "rad"},
            {"count": 10, "type": "velocity", "unit": "rad/s"},
        ],
    },
    "internal_text": {"kind": "text", "stream": "internal"},
    "external_text": {"kind": "text", "stream": "external"},
}
"""The streams of a recipe that declares none."""


def mask_reasons(spec: StreamSpec) -> tuple[MaskReason, ...]:
    """Return the faults for which content of a stream is masked; text has none."""
    return spec.mask if isinstance(spec, MaskDefaults) else ()


def check_stream_name(name: str) -> None:
    """Check that a name can be part of files, batches and metrics.

    Raises:
        ValueError: it can't.
    """
    if STREAM_NAME.fullmatch(name) is None:
        raise ValueError(
            f"stream name {name[:40]!r} is not lower-case letters, digits and _, up to 32; fix: "
            "rename the stream"
        )
    if name in RESERVED_NAMES or name.endswith("_valid") or re.fullmatch(r"g\d+", name):
        raise ValueError(f"stream name {name!r} is reserved; fix: rename the stream")
