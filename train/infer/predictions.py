"""Write what a model predicted, as files that stock readers open.

::

    internal_text.jsonl, external_text.jsonl   {"timestamp", "text", "tokens"}, a line per event
    audio.wav                                  16-bit mono, at the recipe's rate and loudness
    dmel.zarr                                  Zarr v3 group: timestamp, dmel (255: not predicted);
                                               audio.wav is decoded from it
    animation.zarr                             Zarr v3 group: timestamp, proprio, valid

All times are on the session clock: the time of the predicted tick. Nothing predicts the session's
first tick, so it is silent, and its poses are NaN and not valid.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import soundfile
import zarr

from shared.clock import wrap_angle
from shared.errors import EngineError
from shared.media.mel import decode_dmel
from shared.media.sound import to_int16
from shared.media.tokenizer import group_events
from shared.recipe import PAD_TOKEN
from shared.session.reader import MASKED_LEVEL
from train.config import TEXT_HEADS, Head

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shared.media.tokenizer import TextTokenizer
    from shared.recipe import Recipe
    from train.data.batch import WindowShapes

ANIMATION_NAME = "animation.zarr"
AUDIO_NAME = "audio.wav"
DMEL_NAME = "dmel.zarr"

NAMES = (*(f"{head}.jsonl" for head in TEXT_HEADS), AUDIO_NAME, DMEL_NAME, ANIMATION_NAME)
"""All files that a folder of predictions can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPrediction:
    """Predictions for N successive ticks of a session."""

    first_tick: int
    """First predicted tick, counted from the session's start."""
    follows: bool
    """Whether it follows the last tick of the previous window, so that a text can continue."""
    times_s: NDArray[np.float64]
    """Start of each predicted tick on the session clock, [N]."""
    tokens: Mapping[Head, NDArray[np.int64]]
    """Per text head, [N]."""
    levels: NDArray[np.uint8] | None
    """dMel levels [N, frames per tick, channels]; None without an audio head."""
    poses: NDArray[np.float32] | None
    """Angles in rad and velocities in rad/s, [N, samples per tick, proprio_size]; None without an
    animation head."""


class PredictionWriter:
    """Writes the predictions of a session window by window; a context manager.

    Sound is decoded per window, so that memory is constant; its phase can jump between windows.
    Only the predicted tokens, one number per tick, are kept until the end.

    Args:
        out: folder for the files, created if missing. Older predictions in it are deleted first,
            also those of heads that this model lacks; other files stay.
        heads: the heads of the model; nothing is written for others.
        num_ticks: ticks of the session.
        recipe: how the model's fields are made.
        shapes: sizes of a window.
        tokenizer: decodes tokens.
        seed: of the phases that Griffin-Lim starts with.

    Raises:
        EngineError: the sound can't be written, for example because the disk is full.
        OSError: another file can't be written.
    """

    def __init__(
        self,
        out: Path,
        *,
        heads: Sequence[Head],
        num_ticks: int,
        recipe: Recipe,
        shapes: WindowShapes,
        tokenizer: TextTokenizer,
        seed: int = 0,
    ) -> None:
        self._out = out
        self._num_ticks = num_ticks
        self._recipe = recipe
        self._shapes = shapes
        self._tokenizer = tokenizer
        self._seed = seed
        self._tokens: dict[Head, list[int]] = {h: [] for h in heads if h in TEXT_HEADS}
        self._times_s: list[float] = []
        out.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            _remove(out / name)
        self._sound = self._open_sound() if Head.AUDIO in heads else None
        self._levels = self._open_dmel() if Head.AUDIO in heads else None
        self._poses = self._open_animation() if Head.ANIMATION in heads else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._sound is not None and kind is not None:
            with contextlib.suppress(soundfile.SoundFileError):  # the first error says more
                self._sound.close()
        elif self._sound is not None:
            with self._translate_sound_errors():
                self._fill_with_silence(self._sound, until_tick=self._num_ticks)
                self._sound.close()
        if kind is None:
            self._write_events()

    def add(self, window: WindowPrediction) -> None:
        """Write a window's predictions; windows must come in order of time."""
        if len(window.times_s) == 0:
            return
        silence = [] if window.follows else [PAD_TOKEN]
        for head, tokens in window.tokens.items():
            self._tokens[head] += [*silence, *tokens.tolist()]
        self._times_s += [*window.times_s[: len(silence)].tolist(), *window.times_s.tolist()]
        if self._sound is not None and window.levels is not None:
            waveform = decode_dmel(
                window.levels.reshape(-1, window.levels.shape[-1]),
                rate_hz=self._recipe.audio.rate_hz,
                recipe=self._recipe.mel,
                seed=self._seed,
            )
            with self._translate_sound_errors():
                self._fill_with_silence(self._sound, until_tick=window.first_tick)
                self._sound.write(to_int16(waveform, gain=1.0))
        if self._levels is not None and window.levels is not None:
            levels = window.levels.reshape(-1, window.levels.shape[-1])
            start = window.first_tick * self._shapes.audio_frames_per_tick
            _array_of(self._levels, "dmel")[start : start + len(levels)] = levels
        if self._poses is not None and window.poses is not None:
            self._write_poses(self._poses, window.first_tick, window.poses)

    def _write_poses(self, group: zarr.Group, first_tick: int, poses: NDArray[np.float32]) -> None:
        """Write poses [N, samples per tick, P] at their time, with wrapped angles."""
        poses = poses.reshape(-1, poses.shape[-1])
        angles, velocities = np.split(poses.astype(np.float64), 2, axis=1)
        start = first_tick * self._shapes.sensor_samples_per_tick
        values = np.concatenate([wrap_angle(angles), velocities], axis=1)
        for name, rows in (("proprio", values), ("valid", np.ones(len(poses), dtype=np.bool_))):
            _array_of(group, name)[start : start + len(poses)] = rows

    def _write_events(self) -> None:
        for head, tokens in self._tokens.items():
            events = group_events(tokens, self._times_s, self._tokenizer)
            lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in events]
            (self._out / f"{head}.jsonl").write_text("".join(lines), encoding="utf-8")

    def _fill_with_silence(self, sound: soundfile.SoundFile, *, until_tick: int) -> None:
        """Write zeros from the end of the sound to the start of a tick."""
        hop = self._recipe.audio.rate_hz // self._recipe.mel.rate_hz
        stop = until_tick * self._shapes.audio_frames_per_tick * hop
        sound.write(np.zeros(max(0, stop - sound.tell()), dtype=np.int16))

    def _open_sound(self) -> soundfile.SoundFile:
        rate_hz = self._recipe.audio.rate_hz
        with self._translate_sound_errors():
            return soundfile.SoundFile(
                self._out / AUDIO_NAME, "w", samplerate=rate_hz, channels=1, subtype="PCM_16"
            )

    @contextlib.contextmanager
    def _translate_sound_errors(self) -> Iterator[None]:
        """Translate errors of libsndfile, which are not OSErrors.

        Raises:
            EngineError: names the file and the free space of its disk.
        """
        try:
            yield
        # soundfile asserts that a write took all samples.
        except (soundfile.SoundFileError, AssertionError) as error:
            free_mb = shutil.disk_usage(self._out).free / 2**20
            raise EngineError(
                f"{self._out / AUDIO_NAME}: the sound can't be written ({error} "
                f"{free_mb:,.0f} MiB are free); fix: free disk space, or give another --out"
            ) from error

    def _open_dmel(self) -> zarr.Group:
        shapes = self._shapes
        group = self._open_group(
            DMEL_NAME, rate_hz=self._recipe.mel.rate_hz, chunk=shapes.num_audio_frames
        )
        group.create_array(
            "dmel",
            shape=(*_array_of(group, "timestamp").shape, shapes.mel_channels),
            chunks=(shapes.num_audio_frames, shapes.mel_channels),
            dtype="uint8",
            fill_value=MASKED_LEVEL,
            dimension_names=["time", "channel"],
            attributes={
                "unit": f"level, 0..{shapes.mel_levels - 1}; {MASKED_LEVEL}: not predicted"
            },
        )
        return group

    def _open_animation(self) -> zarr.Group:
        """Create the arrays of all samples, none of them valid yet."""
        shapes, chunk = self._shapes, self._shapes.num_sensor_samples
        group = self._open_group(ANIMATION_NAME, rate_hz=self._recipe.sensors.rate_hz, chunk=chunk)
        (count,) = _array_of(group, "timestamp").shape
        group.create_array(
            "proprio",
            shape=(count, shapes.proprio_size),
            chunks=(chunk, shapes.proprio_size),
            dtype="float32",
            fill_value=np.nan,
            dimension_names=["time", "value"],
            attributes={"unit": "rad, then rad/s"},
        )
        group.create_array(
            "valid",
            shape=(count,),
            chunks=(chunk,),
            dtype="bool",
            dimension_names=["time"],
            attributes={"meaning": "whether the pose was predicted"},
        )
        return group

    def _open_group(self, name: str, *, rate_hz: float, chunk: int) -> zarr.Group:
        """Create a Zarr group with the session's timestamps at a rate, `chunk` per window."""
        count = self._num_ticks * chunk // self._shapes.num_ticks
        group = zarr.open_group(self._out / name, mode="w", zarr_format=3)
        group.attrs["rate_hz"] = rate_hz
        timestamp = group.create_array(
            "timestamp",
            shape=(count,),
            chunks=(chunk,),
            dtype="float64",
            dimension_names=["time"],
            attributes={"unit": "s on the session clock"},
        )
        timestamp[:] = np.arange(count) / rate_hz
        return group


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array
