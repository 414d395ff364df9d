"""Read the segments of a session as arrays.

This is the only code that turns recordings into arrays. The shard job encodes the arrays, and
:class:`train.data.session_source.SessionSource` joins them to windows. So the two agree, and tests
compare one with the other.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from shared.kinds.audio import AudioReader
from shared.kinds.sensor import SensorReader
from shared.kinds.text import TextReader
from shared.kinds.video import VideoReader
from shared.media.channels import MEAN
from shared.session.alignment import Placement, session_times, shift_events
from shared.session.folder import read_readings, read_text_events
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from shared.clock import MaskedSpan, Segment
    from shared.kinds.text import SegmentText
    from shared.kinds.video import Frames
    from shared.media.tokenizer import TextTokenizer
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan


class SessionReader:
    """Reads the streams of a session's segments; a source file is opened when it is needed.

    The scan was made with the same recipe. The tokenizer may be None if no text is read. `streams`
    are the timestamped streams that will be read, by default all; the files of the others need not
    exist.
    """

    def __init__(
        self,
        path: Path,
        scan: SessionScan,
        *,
        recipe: Recipe,
        tokenizer: TextTokenizer | None = None,
        streams: Sequence[str] | None = None,
    ) -> None:
        self.path, self.scan, self.recipe, self.tokenizer = path, scan, recipe, tokenizer
        self._streams = tuple(recipe.streams if streams is None else streams)
        self._videos: dict[str, VideoReader] = {}
        self._audio: dict[str, AudioReader] = {}

    def iter_frames(
        self,
        stream: str,
        segments: Sequence[Segment],
        *,
        decode_context: Sequence[Segment] | None = None,
    ) -> Iterator[tuple[Segment, Frames]]:
        """Read the frames of segments; see :meth:`shared.kinds.video.VideoReader.iter_frames`."""
        return self._video(stream).iter_frames(segments, decode_context=decode_context)

    def split_into_runs(self, stream: str, segments: Sequence[Segment], num_runs: int) -> list[int]:
        """Split a pass over a video into runs that can be decoded independently."""
        return self._video(stream).split_into_runs(segments, num_runs)

    def read_audio(self, stream: str, segment: Segment) -> NDArray[np.int16]:
        """Read the waveform of a segment, mono int16 [rate * duration]; 0 where none is."""
        return self._audio_reader(stream).read_audio(segment)

    def read_dmel(self, stream: str, segment: Segment) -> NDArray[np.uint8]:
        """Read the dMel tokens of a segment, uint8 [A, channels]; 255 in masked frames."""
        return self._audio_reader(stream).read_dmel(segment)

    def read_sensor(self, stream: str, segment: Segment) -> NDArray[np.float32]:
        """Read a sensor's samples of a segment, float32 [S, D]; NaN where masked."""
        return self._sensors[stream].read(segment)

    def read_text(self, stream: str, segment: Segment) -> SegmentText:
        """Read the tokens of a segment, and the events that begin in it.

        Raises:
            ValueError: the reader has no tokenizer.
        """
        return self._texts[stream].read(segment)

    def _video(self, stream: str) -> VideoReader:
        if stream not in self._videos:
            spec, start_s = self.recipe.videos[stream], self.scan.start_overrides.get(stream)
            self._videos[stream] = VideoReader(
                self.path / spec.file,
                spec,
                start_s=start_s,
                masked=self._masked(stream),
                stretch=self.scan.stretches.get(stream, 1.0),
            )
        return self._videos[stream]

    def _audio_reader(self, stream: str) -> AudioReader:
        if stream not in self._audio:
            spec = self.recipe.audios[stream]
            self._audio[stream] = AudioReader(
                self.path / spec.file,
                spec,
                start_s=self.scan.start_overrides.get(stream, 0.0),
                gain=self.scan.gains[stream],
                stretch=self.scan.stretches.get(stream, 1.0),
                masked=self._masked(stream),
                mix=self.scan.mixes.get(stream, MEAN),
            )
        return self._audio[stream]

    @property
    def _placement(self) -> Placement:
        return Placement(starts=self.scan.start_overrides, stretches=self.scan.stretches)

    def _masked(self, stream: str) -> tuple[MaskedSpan, ...]:
        return self.scan.masked.get(stream, ())

    def _names(self, kind: Kind) -> list[str]:
        """Return the streams of a kind that the session has and that are read."""
        names = self.recipe.of_kind(kind)
        return [n for n in names if n in self._streams and n in self.scan.intervals]

    @cached_property
    def _sensors(self) -> dict[str, SensorReader]:
        """Readers of all sensors: one pass over each file."""
        recipe, scan = self.recipe, self.scan
        readers = {}
        names = self._names(Kind.SENSOR)
        readings = read_readings(self.path, recipe, names, corrections=scan.corrections)
        for name, own in readings.items():
            times_s = session_times(
                name, own.times_s, scan.clock_offset_s, placement=self._placement, recipe=recipe
            )
            spec = recipe.sensors[name]
            readers[name] = SensorReader(times_s, own.values, spec, self._masked(name))
        return readers

    @cached_property
    def _texts(self) -> dict[str, TextReader]:
        """Readers of all texts."""
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer; fix: give one to SessionReader")
        recipe, scan = self.recipe, self.scan
        names = self._names(Kind.TEXT)
        events = read_text_events(self.path, recipe, names, corrections=scan.corrections)
        readers = {}
        for name, recorded in events.items():
            shifted = shift_events(
                name, recorded, scan.clock_offset_s, placement=self._placement, recipe=recipe
            )
            readers[name] = TextReader(
                [event for event in shifted if 0 <= event.time_s < scan.duration_s],
                recipe.texts[name],
                tokenizer=self.tokenizer,
                duration_s=scan.duration_s,
                segment_s=recipe.segment_s,
            )
        return readers
