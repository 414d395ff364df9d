"""Define the recipe: how the streams of a session become the fields of a sample.

A recipe is a YAML file (``configs/recipe.yaml``) and this tree of frozen, validated objects. Each
field depends on some sections only, so that a changed key rebuilds only the columns that depend on
it.
"""

from __future__ import annotations

import enum
import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from shared.config import Section, load_section

PAD_TOKEN = 0
"""Token of silence, the same in every tokenizer."""


Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
"""Sessions to train on, and held-out sessions."""


class Stream(enum.StrEnum):
    """The timed signals that a session can have."""

    VISION_LEFT = "vision_left"
    VISION_RIGHT = "vision_right"
    AUDIO = "audio"
    TOUCH = "touch"
    PROPRIO = "proprio"
    INTERNAL_TEXT = "internal_text"
    EXTERNAL_TEXT = "external_text"


STREAMS: tuple[Stream, ...] = tuple(Stream)
"""All streams, in the order of their presence bits."""

VISION_STREAMS: tuple[Stream, ...] = (Stream.VISION_LEFT, Stream.VISION_RIGHT)
SENSOR_STREAMS: tuple[Stream, ...] = (Stream.TOUCH, Stream.PROPRIO)
TEXT_STREAMS: tuple[Stream, ...] = (Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT)


class WindowRecipe(Section):
    """How a session is split into windows."""

    duration_s: float = Field(4.0, gt=0, le=600)
    """Length of a window in seconds."""
    stride_s: float | None = Field(None, gt=0)
    """Distance between window starts in seconds; null means the duration, so that windows touch."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Share of a window that a stream must cover to count as present in it. The parts that it does
    not cover are masked."""

    @property
    def effective_stride_s(self) -> float:
        """Distance between window starts in seconds."""
        return self.duration_s if self.stride_s is None else self.stride_s


class VisionRecipe(Section):
    """How video becomes frames."""

    rate_hz: float = Field(5.0, gt=0, le=120)
    """Frames per second that are kept, the nearest ones by presentation time."""
    size: int = Field(224, ge=16, le=1024, multiple_of=16)
    """Height and width in pixels."""
    fit: Literal["crop", "stretch", "pad"] = "crop"
    """How another aspect ratio becomes square: crop or squeeze the longer side, or pad with black
    bars."""
    codec: Literal["h264", "mjpeg", "yuv420", "raw"] = "h264"
    """How frames are stored: as an H.264 stream per window, JPEG pictures, planes, or RGB.

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
    """Frames farther than this from their grid time are masked; null means one step, which is
    1 / rate_hz."""

    @property
    def tolerance_s(self) -> float:
        """Largest distance in seconds between a grid time and its frame."""
        return 1.0 / self.rate_hz if self.max_error_s is None else self.max_error_s


class AudioRecipe(Section):
    """How audio becomes a waveform."""

    rate_hz: int = Field(16_000, ge=4_000, le=96_000)
    """Sample rate of the mono waveform."""
    loudness_dbfs: float | None = Field(-23.0, ge=-60, le=0)
    """RMS level to which each session is normalized, with limited peaks; null keeps its level."""
    peak_dbfs: float = Field(-1.0, ge=-60, le=0)
    """Largest level of any sample after the gain."""


class MelRecipe(Section):
    """How the waveform becomes dMel tokens (Bai et al. 2024, arXiv:2407.15835)."""

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


class SensorRecipe(Section):
    """How touch and proprioception become samples on a grid."""

    rate_hz: float = Field(30.0, gt=0, le=1000)
    """Samples per second on the grid."""
    max_gap_s: float = Field(0.1, gt=0)
    """Grid points inside a longer gap of the recording are masked instead of interpolated."""
    touch_size: int = Field(5, ge=1, le=256)
    """Number of touch values, each in [0, 1]."""
    proprio_size: int = Field(20, ge=2, le=512, multiple_of=2)
    """Number of proprioceptive values: joint angles in rad, then their velocities in rad/s."""


class TextRecipe(Section):
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
    """How samples are packed into shards."""

    target_bytes: int = Field(256 * 2**20, ge=2**16)
    """Approximate bytes of media and numbers per shard."""


class Recipe(Section):
    """Everything that decides the bytes of a shard set."""

    required: tuple[Stream, ...] = (Stream.VISION_LEFT, Stream.AUDIO, Stream.PROPRIO)
    """Streams that a session must have; [] accepts any session with at least one stream."""
    window: WindowRecipe = WindowRecipe()
    vision: VisionRecipe = VisionRecipe()
    audio: AudioRecipe = AudioRecipe()
    mel: MelRecipe = MelRecipe()
    sensors: SensorRecipe = SensorRecipe()
    text: TextRecipe = TextRecipe()
    split: SplitRecipe = SplitRecipe()
    shard: ShardRecipe = ShardRecipe()

    @model_validator(mode="after")
    def _rates_fit_the_window(self) -> Recipe:
        for name, rate_hz in (
            ("vision.rate_hz", self.vision.rate_hz),
            ("mel.rate_hz", self.mel.rate_hz),
            ("sensors.rate_hz", self.sensors.rate_hz),
            ("audio.rate_hz", self.audio.rate_hz),
        ):
            count = rate_hz * self.window.duration_s
            if abs(count - round(count)) > 1e-9 or round(count) < 1:
                raise ValueError(
                    f"{name} {rate_hz:g} x window.duration_s {self.window.duration_s:g} "
                    f"is {count:g}, not a whole number of samples; fix: change one of the two"
                )
        if self.audio.rate_hz % self.mel.rate_hz:
            raise ValueError(
                f"mel.rate_hz {self.mel.rate_hz} does not divide audio.rate_hz "
                f"{self.audio.rate_hz}; fix: change one of the two"
            )
        if self.mel.ceiling_db <= self.mel.floor_db:
            raise ValueError(
                f"mel.ceiling_db {self.mel.ceiling_db:g} is not above mel.floor_db "
                f"{self.mel.floor_db:g}; fix: raise the ceiling or lower the floor"
            )
        return self

    def count(self, rate_hz: float) -> int:
        """Return the number of samples in one window of a signal of `rate_hz`."""
        return round(rate_hz * self.window.duration_s)


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
