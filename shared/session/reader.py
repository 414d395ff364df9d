"""Read a window of a session as arrays, with one short method per field.

This is the only code that turns windows into arrays. The shard job encodes the arrays, and
:class:`train.data.session_source.RealMultiModalDataset` returns them unchanged. So the two agree,
and tests compare one with the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from shared.clock import Window, frame_mask, interpolate, nearest
from shared.files import DiskArray
from shared.media.mel import encode_dmel
from shared.media.sound import read_sound, to_int16
from shared.media.video import VideoTrack, frames_to_restart, read_frames, read_video_track
from shared.recipe import Recipe, Stream
from shared.session.alignment import align_track
from shared.session.folder import AUDIO_FILE, VISION_FILES, read_metadata, read_text_events

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.tokenizer import TextTokenizer
    from shared.session.folder import TextEvent
    from shared.session.scan import SessionScan

MASKED_LEVEL = 255
"""Value of dMel levels where there is no audio; real levels are smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Vision of one window."""

    pictures: NDArray[np.uint8]
    """RGB [F, H, W, 3]; a masked picture is a copy of the nearest decoded one."""
    error_s: NDArray[np.float32]
    """Presentation time minus grid time [F]; NaN for masked pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensors:
    """Touch and proprioception of one window; NaN where masked."""

    timestamp: NDArray[np.float64]
    """Grid times on the session clock [S]."""
    proprio: NDArray[np.float32]
    """Joint angles in rad in [-pi, pi), then velocities in rad/s [S, proprio_size]."""
    touch: NDArray[np.float32]
    """Touch 0..1 [S, touch_size]."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Whether at least one of the two was recorded [S]."""
        return np.asarray(
            np.isfinite(self.proprio).all(axis=1) | np.isfinite(self.touch).all(axis=1)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mel:
    """DMel tokens of one window."""

    levels: NDArray[np.uint8]
    """[A, channels]; MASKED_LEVEL where masked."""
    valid: NDArray[np.bool_]
    """Whether the audio covers the whole frame [A]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStream:
    """Tokens of one text stream in a window."""

    ids: tuple[int, ...]
    time_s: tuple[float, ...]
    """Per token, when its event began, on the session clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Both text streams of one window, and the events that they come from."""

    internal: TokenStream
    external: TokenStream
    events: tuple[TextEvent, ...]


def split_evenly(first: NDArray[np.int64], lead: NDArray[np.float64], num_runs: int) -> list[int]:
    """Split windows into runs of about equal length, where little must be decoded twice.

    Each run starts at the cheapest window of its first quarter. A run is left out if decoding the
    frames before it would cost as much as the run itself.

    Args:
        first: first frame of each window [N], at least one window.
        lead: frames that must be decoded before each window if a run starts there [N].
        num_runs: number of runs, at least 1.

    Returns:
        num_runs + 1 increasing numbers from 0 to N; run k is windows [cuts[k], cuts[k + 1]). Runs
        that are left out are empty.
    """
    count = len(first)
    run_length = (first[-1] - first[0] + 1) / num_runs
    even = [k * count // num_runs for k in range(num_runs + 1)]
    cuts = [count]
    for start, stop in reversed(list(pairwise(even[1:]))):
        quarter = lead[start : start + max(1, (stop - start) // 4)]
        best = int(quarter.argmin())
        cuts.append(start + best if quarter[best] < run_length else cuts[-1])
    return [0, *reversed(cuts)]


class SessionReader:
    """Reads the fields of a session's windows; a source file is opened when a field needs it.

    Args:
        path: the session folder.
        scan: result of :func:`shared.session.scan.scan_session` with the same recipe.
        recipe: how streams become fields.
        tokenizer: tokenizes text; may be None if no text is read.
    """

    def __init__(
        self,
        path: Path,
        scan: SessionScan,
        *,
        recipe: Recipe,
        tokenizer: TextTokenizer | None = None,
    ) -> None:
        self.path = path
        self.scan = scan
        self.recipe = recipe
        self.tokenizer = tokenizer
        self._tracks: dict[Stream, VideoTrack] = {}

    def iter_frames(
        self,
        stream: Stream,
        windows: Sequence[Window],
        *,
        decode_context: Sequence[Window] | None = None,
    ) -> Iterator[tuple[Window, Frames]]:
        """Read the vision of windows in order of time, in one pass over the video.

        Args:
            stream: a vision stream.
            windows: windows in order of time.
            decode_context: a superset of the windows. The pictures then have the bits of a pass
                over all of these, even if the video is damaged, provided that a run of
                :meth:`split_into_runs` can start at the first window.

        Yields:
            Each window with its frames; a window of which no picture decodes is left out.

        Raises:
            MediaError: the video doesn't open.
        """
        track = self._track(stream)
        rate_hz = self.recipe.vision.rate_hz
        chosen = [nearest(track.times_s, w.grid(rate_hz)) for w in windows]
        requested = {int(i) for index, _ in chosen for i in index}
        if decode_context is not None and requested:
            # Also decode the frames that a full pass would decode, from the restart on.
            start, stop = min(requested), max(requested)
            lead = frames_to_restart(track, np.array([start]))[0]
            start -= int(lead) if np.isfinite(lead) else 0
            for window in decode_context:
                index, _ = nearest(track.times_s, window.grid(rate_hz))
                requested |= {int(i) for i in index if start <= i <= stop}
        video = self.path / VISION_FILES[stream]
        source = read_frames(video, track, sorted(requested), recipe=self.recipe.vision)
        decoded: dict[int, NDArray[np.uint8]] = {}
        upcoming = next(source, None)
        for window, (index, error_s) in zip(windows, chosen, strict=True):
            # Hold exactly the frames from this window's first to its last.
            while upcoming is not None and upcoming[0] <= index[-1]:
                if upcoming[0] >= index[0]:
                    decoded[upcoming[0]] = upcoming[1]
                upcoming = next(source, None)
            frames = self._assemble(decoded, index, error_s)
            if frames is not None:
                yield window, frames
            decoded = {i: picture for i, picture in decoded.items() if i >= index[0]}

    def split_into_runs(
        self, stream: Stream, windows: Sequence[Window], num_runs: int
    ) -> list[int]:
        """Split a pass over windows into runs that can be decoded independently.

        Returns:
            The cuts of :func:`split_evenly`.

        Raises:
            MediaError: the video doesn't open.
        """
        track = self._track(stream)
        starts_s = np.array([w.start_s for w in windows])
        first, _ = nearest(track.times_s, starts_s)
        return split_evenly(first, frames_to_restart(track, first), num_runs)

    def read_audio(self, window: Window) -> NDArray[np.int16]:
        """Read the waveform of a window, mono int16 [rate * duration]; 0 outside the recording."""
        start = self._first_sample(window)
        samples = np.zeros(self.recipe.count(self.recipe.audio.rate_hz), dtype=np.int16)
        recorded = self._samples[max(0, start) : max(0, start + len(samples))]
        offset = max(0, -start)
        samples[offset : offset + len(recorded)] = recorded
        return samples

    def read_mel(self, window: Window) -> Mel:
        """Read the dMel tokens of a window."""
        rate_hz = self.recipe.audio.rate_hz
        levels, valid = encode_dmel(
            self._samples,
            self._first_sample(window),
            self.recipe.count(self.recipe.mel.rate_hz),
            rate_hz=rate_hz,
            recipe=self.recipe.mel,
        )
        levels[~valid] = MASKED_LEVEL
        return Mel(levels=levels, valid=valid)

    def read_sensors(self, window: Window) -> Sensors:
        """Read touch and proprioception of a window on the grid."""
        grid_s = window.grid(self.recipe.sensors.rate_hz)
        proprio = self._on_grid(Stream.PROPRIO, grid_s, self.recipe.sensors.proprio_size // 2)
        touch = self._on_grid(Stream.TOUCH, grid_s, 0)
        return Sensors(timestamp=grid_s, proprio=proprio, touch=touch)

    def read_text(self, window: Window) -> Text:
        """Read the events that begin in a window, and their tokens.

        Raises:
            ValueError: the reader has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer; fix: give one to SessionReader")
        events = tuple(e for e in self._events if window.start_s <= e.time_s < window.stop_s)
        streams = {}
        for stream in (Stream.INTERNAL_TEXT, Stream.EXTERNAL_TEXT):
            tokens = [
                (token, e.time_s)
                for e in events
                if e.stream is stream
                for token in self.tokenizer.encode(e.text)
            ]
            streams[stream] = TokenStream(
                ids=tuple(i for i, _ in tokens), time_s=tuple(t for _, t in tokens)
            )
        return Text(
            internal=streams[Stream.INTERNAL_TEXT],
            external=streams[Stream.EXTERNAL_TEXT],
            events=events,
        )

    @cached_property
    def _events(self) -> tuple[TextEvent, ...]:
        """All text events, on the session clock."""
        offset_s = self.scan.clock_offset_s
        return tuple(replace(e, time_s=e.time_s - offset_s) for e in read_text_events(self.path))

    @cached_property
    def _samples(self) -> DiskArray[np.int16]:
        """The session's normalized audio."""
        sound = read_sound(self.path / AUDIO_FILE, rate_hz=self.recipe.audio.rate_hz)
        samples: DiskArray[np.int16] = DiskArray(np.int16)
        for block in sound.samples.iter_blocks():
            samples.append(to_int16(block, gain=self.scan.gain))
        return samples

    def _first_sample(self, window: Window) -> int:
        """Return the index of a window's first sample in the audio; negative before it begins."""
        rate_hz = self.recipe.audio.rate_hz
        start_s = self.scan.start_overrides.get(Stream.AUDIO, 0.0)
        return round(window.start_s * rate_hz) - round(start_s * rate_hz)

    def _track(self, stream: Stream) -> VideoTrack:
        if stream not in self._tracks:
            track = read_video_track(self.path / VISION_FILES[stream])
            self._tracks[stream] = align_track(track, self.scan.start_overrides.get(stream))
        return self._tracks[stream]

    def _on_grid(
        self, stream: Stream, grid_s: NDArray[np.float64], num_angles: int
    ) -> NDArray[np.float32]:
        times_s, values = self._readings[stream]
        return interpolate(
            times_s,
            values,
            grid_s,
            max_gap_s=self.recipe.sensors.max_gap_s,
            edge_s=0.5 / self.recipe.sensors.rate_hz,
            num_angles=num_angles,
        )

    @cached_property
    def _readings(self) -> dict[Stream, tuple[NDArray[np.float64], NDArray[np.float32]]]:
        """Times on the session clock and values of each sensor stream."""
        sensors = self.recipe.sensors
        metadata = read_metadata(
            self.path, touch_size=sensors.touch_size, proprio_size=sensors.proprio_size
        )
        readings = {}
        for stream, values in (
            (Stream.TOUCH, metadata.touch),
            (Stream.PROPRIO, metadata.proprio),
        ):
            rows = metadata.rows_with(stream)
            readings[stream] = (
                metadata.times_s[rows] - self.scan.clock_offset_s,
                values if rows.all() else values[rows],
            )
        return readings

    def _assemble(
        self,
        decoded: dict[int, NDArray[np.uint8]],
        index: NDArray[np.int64],
        error_s: NDArray[np.float64],
    ) -> Frames | None:
        """Build the frames of one window; the nearest picture replaces one that did not decode."""
        usable = np.array(sorted(i for i in decoded if index[0] <= i <= index[-1]))
        if len(usable) == 0:
            return None
        nearest_usable = usable[np.abs(usable[None, :] - index[:, None]).argmin(axis=1)]
        is_near = frame_mask(error_s, tolerance_s=self.recipe.vision.tolerance_s)
        is_valid = (nearest_usable == index) & is_near
        return Frames(
            pictures=np.stack([decoded[int(i)] for i in nearest_usable]),
            error_s=np.where(is_valid, error_s, np.nan).astype(np.float32),
        )
