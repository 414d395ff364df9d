"""Audio: place it on the clock, read waveform and dMel tokens of segments, encode and decode."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import soxr

from shared.clock import EPSILON_S, Interval, masked_share
from shared.errors import CorruptError
from shared.files import DiskArray
from shared.kinds.column import Column, stream_settings
from shared.media.channels import MEAN, Mix
from shared.media.mel import encode_dmel
from shared.media.sound import Sound, read_sound, to_int16
from shared.streams import AudioStream, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.clock import MaskedSpan, Segment
    from shared.recipe import Recipe

MASKED_LEVEL = 255
"""Value of dMel levels where there is no audio; real levels are smaller."""

_WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
WAV_HEADER_BYTES = _WAV_HEADER.size
_MAX_WAV_RATE_HZ = 1 << 31
"""From this rate on, the bytes per second don't fit the header."""


def columns(name: str, spec: AudioStream, recipe: Recipe) -> tuple[Column, ...]:
    """Return the columns of an audio stream: its waveform and its dMel tokens."""
    samples, frames = recipe.count(spec.rate_hz), recipe.count(spec.dmel.rate_hz)
    return (
        Column(
            name=name,
            stream=name,
            kind=Kind.AUDIO,
            codec="wav",
            dtype="int16",
            shape=(samples,),
            unit="1/32768 of full scale",
            max_bytes=WAV_HEADER_BYTES + 2 * samples,
            settings=stream_settings(spec, without=("dmel",)),
            is_training_input=False,
        ),
        Column(
            name=f"{name}.dmel",
            stream=name,
            kind=Kind.AUDIO,
            codec="zarr",
            dtype="uint8",
            shape=(frames, spec.dmel.channels),
            unit=f"level, {MASKED_LEVEL} masked",
            max_bytes=frames * spec.dmel.channels,
            settings=stream_settings(spec),
            dimensions=("segment", "frame", "channel"),
            fill_value=MASKED_LEVEL,
            attributes={
                "long_name": "dMel level",
                "missing_value": MASKED_LEVEL,
                "rate_hz": spec.dmel.rate_hz,
            },
        ),
    )


def align_sound(sound: Sound, start_s: float | None) -> Interval:
    """Return the interval of a sound that begins at `start_s`, or where its container says."""
    first_s = sound.start_s if start_s is None else start_s
    return Interval(first_s, first_s + sound.duration_s)


def read_stretched(
    file: Path, spec: AudioStream, *, stretch: float, mix: Mix | None = None, decode: bool = True
) -> Sound:
    """Read the sound of a stream; if its clock was wrong, it lasts `stretch` times as long.

    None lets the stream's setting choose the mix of its channels.
    """
    channels = spec.channels if mix is None else mix
    sound = read_sound(
        file, rate_hz=spec.rate_hz, track=spec.track, channels=channels, decode=decode
    )
    if stretch == 1:
        return sound
    resampler = soxr.ResampleStream(1.0, stretch, 1, dtype="float32", quality="HQ")
    samples: DiskArray[np.float32] = DiskArray(np.float32)
    for block in sound.samples.iter_blocks():
        samples.append(resampler.resample_chunk(block))
    samples.append(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    zeros = tuple(Interval(z.start_s * stretch, z.stop_s * stretch) for z in sound.zeros)
    duration_s = int(sound.duration_s * stretch * sound.rate_hz + 0.5) / sound.rate_hz  # as soxr
    return replace(sound, samples=samples, duration_s=duration_s, zeros=zeros)


class AudioReader:
    """Reads the audio of a session's segments, times `gain`, which normalizes the loudness.

    `start_s` is the start of the first sample on the session clock. dMel frames that overlap a
    `masked` span are masked. See :func:`read_stretched`.
    """

    def __init__(
        self,
        file: Path,
        spec: AudioStream,
        *,
        start_s: float,
        gain: float,
        stretch: float = 1.0,
        masked: Sequence[MaskedSpan] = (),
        mix: Mix = MEAN,
    ) -> None:
        self._spec, self._masked = spec, masked
        self._start = round(start_s * spec.rate_hz)
        sound = read_stretched(file, spec, stretch=stretch, mix=mix)
        self._samples: DiskArray[np.int16] = DiskArray(np.int16)
        for block in sound.samples.iter_blocks():
            self._samples.append(to_int16(block, gain=gain))

    def read_audio(self, segment: Segment) -> NDArray[np.int16]:
        """Read the waveform of a segment, mono int16 [rate * duration]; 0 where none is."""
        start, count = self._range(segment)
        samples = np.zeros(count, dtype=np.int16)
        recorded = self._samples[max(0, start) : max(0, start + count)]
        offset = max(0, -start)
        samples[offset : offset + len(recorded)] = recorded
        return samples

    def read_dmel(self, segment: Segment) -> NDArray[np.uint8]:
        """Read the dMel tokens of a segment, uint8 [A, channels].

        Frames that the audio does not cover, or that are masked, have MASKED_LEVEL in all channels.
        """
        rate_hz, dmel = self._spec.rate_hz, self._spec.dmel
        start, count = self._range(segment)[0], round(dmel.rate_hz * segment.duration_s)
        levels, valid = encode_dmel(self._samples, start, count, rate_hz=rate_hz, settings=dmel)
        starts_s = segment.grid(dmel.rate_hz)
        for span in self._masked:
            stops_s = starts_s + 1 / dmel.rate_hz
            valid &= (stops_s <= span.start_s + EPSILON_S) | (starts_s >= span.stop_s - EPSILON_S)
        levels[~valid] = MASKED_LEVEL
        return levels

    def _range(self, segment: Segment) -> tuple[int, int]:
        """Return the first sample of a segment in the audio (or negative), and the count."""
        count = round(self._spec.rate_hz * segment.duration_s)
        return round(segment.start_s * self._spec.rate_hz) - self._start, count


def coverage(
    interval: Interval, segments: Sequence[Segment], masked: Sequence[MaskedSpan] = ()
) -> NDArray[np.float64]:
    """Compute the share of each segment that an interval covers, without masked spans."""
    shares = []
    for segment in segments:
        start_s = max(interval.start_s, segment.start_s)
        stop_s = max(start_s, min(interval.stop_s, segment.stop_s))
        share = interval.overlap_s(segment.interval) / segment.duration_s
        shares.append(share * (1 - masked_share(start_s, stop_s, masked)))
    return np.array(shares, dtype=np.float64)


def encode_wav(samples: NDArray[np.int16], *, rate_hz: int) -> bytes:
    """Encode mono int16 samples as a RIFF file."""
    return _wav_header(samples.nbytes, rate_hz) + samples.astype("<i2", copy=False).tobytes()


def decode_wav(member: bytes) -> NDArray[np.int16]:
    """Decode the bytes of :func:`encode_wav` to int16 [N], a read-only view of `member`.

    Raises:
        CorruptError: the bytes have another form.
    """
    if len(member) < _WAV_HEADER.size or len(member) % 2:
        raise CorruptError(f"{len(member)} bytes are not a 16-bit wav file")
    rate_hz, size = _WAV_HEADER.unpack_from(member)[7], len(member) - _WAV_HEADER.size
    head = bytes(member[: _WAV_HEADER.size])
    if rate_hz >= _MAX_WAV_RATE_HZ or head != _wav_header(size, rate_hz):
        raise CorruptError("not a wav file as this format writes it")
    return np.frombuffer(member, dtype="<i2", offset=_WAV_HEADER.size)


def _wav_header(size: int, rate_hz: int) -> bytes:
    return _WAV_HEADER.pack(
        b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate_hz, rate_hz * 2, 2, 16, b"data", size
    )
