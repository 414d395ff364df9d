"""Write what a model predicted, as files that stock readers open.

::

    NAME.jsonl       text: {"timestamp", "text", "tokens"}, a line per event
    NAME.wav         audio: 16-bit mono, at the recipe's rate and loudness
    NAME.dmel.zarr   audio: Zarr v3 group: timestamp, dmel (255: not predicted); NAME.wav is decoded
                     from it
    NAME.zarr        sensor: Zarr v3 group: timestamp, valid, and the values, named like the stream

NAME is the head's name. All times are on the session clock: the time of the predicted tick. Nothing
predicts the session's first tick, so it is silent, and its sensor values are NaN and not valid.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import soundfile
import zarr

from shared.errors import EngineError
from shared.kinds.audio import MASKED_LEVEL
from shared.media.mel import decode_dmel
from shared.media.sound import to_int16
from shared.media.tokenizer import group_events
from shared.recipe import PAD_TOKEN
from shared.shardset.layout import training_columns
from shared.streams import STREAM_NAME, Kind
from shared.values import clean_readings
from train.shapes import as_fraction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from train.shapes import StreamShape
    from train.trained_model import TrainedModel

METRICS_NAME: Final = "metrics.json"
"""Losses and more; its "files" are the names of the files of predictions beside it."""

_SECOND_DIMENSION: Final = {Kind.AUDIO: "channel", Kind.SENSOR: "value"}

_FILE_NAME = re.compile(rf"{STREAM_NAME.pattern}(\.jsonl|\.wav|\.dmel\.zarr|\.zarr)")


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPrediction:
    """Predictions for N successive ticks of a session."""

    first_tick: int
    """First predicted tick, counted from the session's start."""
    follows: bool
    """Whether it follows the last tick of the previous window, so that a text can continue."""
    times_s: NDArray[np.float64]
    """Start of each predicted tick on the session clock, [N]."""
    values: Mapping[str, NDArray[Any]]
    """Per head: tokens [N], dMel levels [N, frames per tick, channels], or values of a sensor
    [N, samples per tick, D]."""


class PredictionWriter:
    """Writes the predictions of a session window by window; a context manager.

    Sound is decoded per window, so that memory is constant; its phase can jump between windows.
    Only the predicted tokens, one number per tick, are kept until the end.

    Args:
        out: folder for the files, created if missing. Earlier predictions in it are deleted first,
            also those of heads that this model lacks; other files stay.
        trained: heads that never had a target write nothing.
        seed: of the phases that Griffin-Lim starts with.

    Raises:
        EngineError: the sound can't be written, for example because the disk is full.
        OSError: another file can't be written.
    """

    def __init__(self, out: Path, *, trained: TrainedModel, num_ticks: int, seed: int = 0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for name in earlier_files(out):
            _remove(out / name)
        self._writers = {
            head: _WRITERS[trained.shapes.target_shape(head).kind](
                _Output(out=out, head=head, trained=trained, num_ticks=num_ticks, seed=seed)
            )
            for head in trained.heads
        }

    @property
    def files(self) -> list[str]:
        """Names of the files in the folder."""
        return [name for writer in self._writers.values() for name in writer.files]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for writer in self._writers.values():
            writer.close(is_complete=kind is None)

    def add(self, window: WindowPrediction) -> None:
        """Write a window's predictions; windows must come in order of time."""
        if len(window.times_s):
            for head in self._writers.keys() & window.values.keys():
                self._writers[head].add(window, window.values[head])


def earlier_files(out: Path) -> list[str]:
    """List the files of earlier predictions in a folder, also of a run that did not finish."""
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        names = [*map(str, json.loads((out / METRICS_NAME).read_text(encoding="utf-8"))["files"])]
    # Sound next to the dMel levels that it was decoded from is a prediction.
    for levels in out.glob("*.dmel.zarr"):
        names += [levels.name, levels.name.removesuffix(".dmel.zarr") + ".wav"]
    return [name for name in dict.fromkeys(names) if _FILE_NAME.fullmatch(name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """Where and how a head's predictions are written."""

    out: Path
    head: str
    trained: TrainedModel
    num_ticks: int
    seed: int

    @property
    def stream(self) -> str:
        return self.trained.shapes.targets[self.head]

    @property
    def shape(self) -> StreamShape:
        return self.trained.shapes.streams[self.stream]

    def samples(self, first: int, count: int) -> tuple[slice, NDArray[np.int64]]:
        """Return the samples of ticks, and the position of each among the ticks' positions."""
        ratio = as_fraction(self.shape.rate_hz) / as_fraction(self.trained.shapes.tick_rate_hz)
        start, stop = math.ceil(first * ratio), math.ceil((first + count) * ratio)
        samples = np.arange(start, stop)
        ticks = samples * ratio.denominator // ratio.numerator
        firsts = -(-ticks * ratio.numerator // ratio.denominator)
        return slice(start, stop), (ticks - first) * self.shape.per_tick + samples - firsts

    def select(self, window: WindowPrediction, values: NDArray[Any]) -> tuple[slice, NDArray[Any]]:
        """Return the samples that a window's values [N, per tick, any] are, and these [S, any]."""
        samples, positions = self.samples(window.first_tick, len(values))
        return samples, values.reshape(-1, values.shape[-1])[positions]

    @property
    def num_samples(self) -> int:
        """Samples of the session."""
        return int(self.samples(0, self.num_ticks)[0].stop)

    def open_group(self, name: str) -> zarr.Group:
        """Create a Zarr group with the times of all samples."""
        group = zarr.open_group(self.out / name, mode="w", zarr_format=3)
        group.attrs["rate_hz"] = self.shape.rate_hz
        attributes = {"unit": "s on the session clock"}
        timestamp = self.create_array(group, "timestamp", dtype="float64", attributes=attributes)
        timestamp[:] = np.arange(self.num_samples) / self.shape.rate_hz
        return group

    def create_array(
        self,
        group: zarr.Group,
        name: str,
        *,
        dtype: str,
        size: tuple[int, ...] = (),
        fill_value: float | None = None,
        attributes: Mapping[str, Any],
    ) -> zarr.Array[Any]:
        """Create an array with a row of a size per sample; a chunk has those of a window."""
        window = self.samples(0, self.trained.shapes.num_ticks)[0]
        return group.create_array(
            name,
            shape=(self.num_samples, *size),
            chunks=(window.stop, *size),
            dtype=dtype,
            fill_value=fill_value,
            dimension_names=["time", _SECOND_DIMENSION[self.shape.kind]][: 1 + len(size)],
            attributes=dict(attributes),
        )


class _TextWriter:
    """Writes the events of a text head."""

    def __init__(self, output: _Output) -> None:
        self._output = output
        self.files = (f"{output.head}.jsonl",)
        self._tokens: list[int] = []
        self._times_s: list[float] = []

    def add(self, window: WindowPrediction, values: NDArray[Any]) -> None:
        silence = [] if window.follows else [PAD_TOKEN]
        self._tokens += [*silence, *values.tolist()]
        self._times_s += [*window.times_s[: len(silence)].tolist(), *window.times_s.tolist()]

    def close(self, *, is_complete: bool) -> None:
        if is_complete:
            events = group_events(self._tokens, self._times_s, self._output.trained.tokenizer)
            lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in events]
            (self._output.out / self.files[0]).write_text("".join(lines), encoding="utf-8")


class _SoundWriter:
    """Writes the dMel levels of an audio head, and the sound decoded from them."""

    def __init__(self, output: _Output) -> None:
        self._output = output
        self.files = (f"{output.head}.wav", f"{output.head}.dmel.zarr")
        self._path = output.out / self.files[0]
        self._spec = output.trained.recipe.audios[output.stream]
        with self._translate_errors():
            self._sound = soundfile.SoundFile(
                os.fsencode(self._path),
                "w",
                samplerate=self._spec.rate_hz,
                channels=1,
                subtype="PCM_16",
            )
        group = output.open_group(self.files[1])
        num_levels = output.shape.num_classes
        self._levels = output.create_array(
            group,
            "dmel",
            dtype="uint8",
            size=output.shape.size,
            fill_value=MASKED_LEVEL,
            attributes={"unit": f"level, 0..{num_levels - 1}; {MASKED_LEVEL}: not predicted"},
        )

    def add(self, window: WindowPrediction, values: NDArray[Any]) -> None:
        samples, levels = self._output.select(window, values.astype(np.uint8))
        if not len(levels):
            return
        waveform = decode_dmel(
            levels, rate_hz=self._spec.rate_hz, settings=self._spec.dmel, seed=self._output.seed
        )
        with self._translate_errors():
            self._fill_with_silence(samples.start)
            self._sound.write(to_int16(waveform, gain=1.0))
        self._levels[samples] = levels

    def close(self, *, is_complete: bool) -> None:
        if is_complete:
            with self._translate_errors():
                self._fill_with_silence(self._output.num_samples)
                self._sound.close()
        else:
            with contextlib.suppress(soundfile.SoundFileError):  # the first error says more
                self._sound.close()

    def _fill_with_silence(self, frame: int) -> None:
        """Write zeros from the end of the sound to the start of a dMel frame."""
        stop = frame * (self._spec.rate_hz // self._spec.dmel.rate_hz)
        self._sound.write(np.zeros(max(0, stop - self._sound.tell()), dtype=np.int16))

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Translate errors of libsndfile, which are not OSErrors."""
        try:
            yield
        # soundfile asserts that a write took all samples.
        except (soundfile.SoundFileError, AssertionError) as error:
            free_mb = shutil.disk_usage(self._path.parent).free / 2**20
            raise EngineError(
                f"{self._path}: the sound can't be written ({error} {free_mb:,.0f} MiB are free); "
                "fix: free disk space, or give another --out"
            ) from error


class _ValuesWriter:
    """Writes the values of a sensor head, in the form in which recorded ones are stored."""

    def __init__(self, output: _Output) -> None:
        self._output = output
        self.files = (f"{output.head}.zarr",)
        self._spec = output.trained.recipe.sensors[output.stream]
        group = output.open_group(self.files[0])
        column = training_columns(output.trained.recipe)[output.stream]
        self._values = output.create_array(
            group,
            output.stream,
            dtype="float32",
            size=output.shape.size,
            fill_value=np.nan,
            attributes={"unit": column.unit, **column.attributes},
        )
        attributes = {"meaning": "whether the values were predicted"}
        self._valid = output.create_array(group, "valid", dtype="bool", attributes=attributes)

    def add(self, window: WindowPrediction, values: NDArray[Any]) -> None:
        samples, rows = self._output.select(window, values)
        self._values[samples], is_valid = clean_readings(rows.astype(np.float32), self._spec)
        self._valid[samples] = is_valid

    def close(self, *, is_complete: bool) -> None:
        """Do nothing: every window is written already."""


_WRITERS: Final[Mapping[Kind, Callable[[_Output], _TextWriter | _SoundWriter | _ValuesWriter]]] = {
    Kind.TEXT: _TextWriter,
    Kind.AUDIO: _SoundWriter,
    Kind.SENSOR: _ValuesWriter,
}
"""What writes a head's predictions, by the kind of its target."""


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
