"""The recipe: how the streams of a session become the fields of a sample.

A recipe is a YAML file (``configs/recipe.yaml``) and this tree of frozen, validated objects. Each
field of a sample depends on a part of it, so that a changed key re-makes only the columns it
touches.
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
"""Sessions to learn from, and sessions held out."""


class Stream(enum.StrEnum):
    """The timed signals a session can have."""

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
    """How a session is cut."""

    duration_s: float = Field(4.0, gt=0, le=600)
    """Length of a window in seconds."""
    stride_s: float | None = Field(None, gt=0)
    """Distance of window starts in seconds; null means the duration, windows that touch."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Smallest share of a window that a stream must cover to count as present in it; what is not
    covered is masked."""

    @property
    def step_s(self) -> float:
        """Distance of window starts in seconds."""
        return self.duration_s if self.stride_s is None else self.stride_s


class VisionRecipe(Section):
    """How video becomes frames."""

    rate_hz: float = Field(5.0, gt=0, le=120)
    """Frames per second kept, nearest by presentation time."""
    size: int = Field(224, ge=16, le=1024, multiple_of=16)
    """Height and width in pixels."""
    fit: Literal["crop", "stretch", "pad"] = "crop"
    """How another aspect ratio becomes square: cut the longer side, squeeze it, or add black bars.
    """
    codec: Literal["h264", "mjpeg", "yuv420", "raw"] = "h264"
    """How frames are stored: as an H.264 stream per window, JPEG pictures, planes, or RGB.

    On real footage of 224 pixels, in bytes per frame, PSNR, and ms of one core to a batch's planes
    and to RGB: h264 4,500, 38.1 dB, 0.18, 0.45; mjpeg 13,200, 38.5 dB, 0.20, 0.18; yuv420 75,264,
    44.9 dB, 0.007, 0.31; raw 150,528, exact, 0.19, 0.015. Among those that compress, h264 is the
    cheapest to decode to planes (`data.pixels: yuv420`), if narrowly, and by far the smallest; it
    costs 1 ms per frame to build. To RGB mjpeg is the cheapest. Where disk and network give 75 kB
    per frame as fast as the GPU takes them, yuv420 needs almost no CPU.
    tests/benchmarks/bench_pixels.py measures it."""
    quality: int = Field(90, ge=1, le=100)
    """mjpeg: JPEG quality."""
    qp: int = Field(22, ge=1, le=51)
    """h264: constant quantizer; 6 more halve the precision. 22 has the PSNR of JPEG at quality 90.
    """
    max_error_s: float | None = Field(None, gt=0)
    """A frame farther than this from its grid time is masked; null means one grid step (1 /
    rate_hz)."""

    @property
    def tolerance_s(self) -> float:
        """Largest distance in seconds between a grid time and the frame shown for it."""
        return 1.0 / self.rate_hz if self.max_error_s is None else self.max_error_s


class AudioRecipe(Section):
    """How sound becomes a waveform."""

    rate_hz: int = Field(16_000, ge=4_000, le=96_000)
    """Sample rate; mono."""
    loudness_dbfs: float | None = Field(-23.0, ge=-60, le=0)
    """RMS level each session is brought to, peaks limited; null leaves the level alone."""
    peak_dbfs: float = Field(-1.0, ge=-60, le=0)
    """No sample is louder than this after the gain."""


class MelRecipe(Section):
    """How the waveform becomes dMel tokens (Bai et al. 2024, arXiv:2407.15835)."""

    rate_hz: int = Field(50, ge=1, le=1000)
    """Frames per second; must divide the audio rate."""
    fft_size: int = Field(1024, ge=64, le=16_384)
    """Samples under each analysis window, which ends where its frame ends, so no frame hears the
    future."""
    channels: int = Field(80, ge=4, le=256)
    """Mel channels."""
    levels: int = Field(16, ge=2, le=255)
    """Levels per channel; 255 stands for "masked"."""
    floor_db: float = -70.0
    """Mel energy in dB of the lowest level's centre; all below is that level."""
    ceiling_db: float = 30.0
    """Mel energy in dB of the highest level's centre; all above is that level."""


class SensorRecipe(Section):
    """How touch and proprioception become samples on a grid."""

    rate_hz: float = Field(30.0, gt=0, le=1000)
    """Grid rate."""
    max_gap_s: float = Field(0.1, gt=0)
    """Grid points inside a longer gap of the recording are masked, not interpolated."""
    touch_size: int = Field(5, ge=1, le=256)
    """Number of touch values, each in [0, 1]."""
    proprio_size: int = Field(20, ge=2, le=512, multiple_of=2)
    """Number of proprioceptive values: joint angles in rad, then their velocities in rad/s."""


class TextRecipe(Section):
    """How text becomes tokens."""

    vocab_size: int = Field(1024, ge=264, le=200_000)
    """Largest vocabulary of the byte-level BPE trained on the train sessions."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of training one."""


class SplitRecipe(Section):
    """Which sessions are held out."""

    val_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of sessions held out, chosen by a hash of their names: a session never changes sides.
    """
    salt: str = ""
    """Changes the choice."""


class ShardRecipe(Section):
    """How samples are packed."""

    target_bytes: int = Field(256 * 2**20, ge=2**16)
    """About this many bytes of media and numbers per shard."""


class Recipe(Section):
    """Everything that decides the bytes of a shard set."""

    required: tuple[Stream, ...] = (Stream.VISION_LEFT, Stream.AUDIO, Stream.PROPRIO)
    """Streams without which a session is rejected; [] takes any session with at least one stream.
    """
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
                    f"is {count:g}, not a whole number of samples; change one of the two"
                )
        if self.audio.rate_hz % self.mel.rate_hz:
            raise ValueError(
                f"mel.rate_hz {self.mel.rate_hz} does not divide audio.rate_hz {self.audio.rate_hz}"
            )
        if self.mel.ceiling_db <= self.mel.floor_db:
            raise ValueError("mel.ceiling_db must be above mel.floor_db")
        return self

    def count(self, rate_hz: float) -> int:
        """Number of samples of a signal of `rate_hz` in one window."""
        return round(rate_hz * self.window.duration_s)


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe file.

    Raises:
        ConfigError: no such file, not YAML, or a wrong key or value; exit code 2.
    """
    return load_section(Recipe, path)


def assign_split(session: str, recipe: Recipe) -> Split:
    """Train or val, by a hash of the session's name: it never changes when others come or go."""
    digest = hashlib.sha256(f"{recipe.split.salt}/{session}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "val" if share < recipe.split.val_fraction else "train"
