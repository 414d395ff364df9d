"""Sessions read directly, by the same recipe as the shards.

It suits small data, and tests compare the shards with it.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from shared.errors import ConfigError, CorruptError, SessionError
from shared.files import fingerprint_of
from shared.media.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from shared.media.yuv import write_rgb
from shared.recipe import (
    SENSOR_STREAMS,
    TEXT_STREAMS,
    VISION_STREAMS,
    Recipe,
    Split,
    Stream,
    assign_split,
    load_recipe,
)
from shared.session.folder import find_sessions, read_timed_lines
from shared.session.reader import SessionReader, Text
from shared.session.scan import SessionScan, scan_session
from shared.timing import no_timer
from train.config import TrainConfig, as_train_config
from train.data.batch import (
    WindowShapes,
    assemble_batch,
    join_batches,
    write_absent,
    write_mel,
    write_numbers,
)
from train.data.order import EpochOrder, SampleOrder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from shared.clock import Window
    from shared.timing import OnStage
    from train.data.batch import SampleLocation
    from train.data.order import BatchOrder, OrderSettings

MAX_OPEN_SESSIONS = 8
"""Sessions whose audio and sensor readings stay in memory."""


class SessionSource:
    """Samples of session folders; each session is one shard, its windows are the rows.

    Args:
        root_dir: a session folder or a folder of them.
        recipe: how streams become fields.
        split: train or val sessions, by the same hash as the shards; None takes all.
        tokenizer: tokenizes text; None trains one on the train sessions, as the shard job does.

    Raises:
        SessionError: there is no session, or none has a usable window.
        ConfigError: the tokenizer has more tokens than the recipe allows.
    """

    def __init__(
        self,
        root_dir: Path | str,
        *,
        recipe: Recipe,
        split: Split | None = None,
        tokenizer: TextTokenizer | None = None,
    ) -> None:
        self.recipe = recipe
        folders = find_sessions(root_dir)
        self.tokenizer = tokenizer or _make_tokenizer(folders, recipe)
        if self.tokenizer.vocab_size > recipe.text.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, more than the recipe's "
                f"text.vocab_size {recipe.text.vocab_size}; fix: set text.vocab_size: "
                f"{self.tokenizer.vocab_size}"
            )
        chosen = [f for f in folders if split is None or assign_split(f.name, recipe) == split]
        self._folders: list[Path] = []
        self._scans: list[SessionScan] = []
        self._windows: list[list[Window]] = []
        self.rejected: dict[str, str] = {}
        """Sessions and windows (SESSION/WINDOW) of this split without samples, and the reasons."""
        for folder in chosen:
            self._add_session(folder)
        if not self._folders and chosen:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.rejected.items())
            raise SessionError(f"{root_dir}: no session can be used: {reasons}")
        self.shard_sizes = np.array([len(w) for w in self._windows], dtype=np.int64)
        sessions = [_session_identity(scan) for scan in self._scans]
        self.fingerprint = fingerprint_of(sessions, recipe.as_json(), self.tokenizer.sha256, split)
        self._open: OrderedDict[int, SessionReader] = OrderedDict()
        self.on_stage: OnStage = no_timer
        """Never called: reading a session has no separate stages."""

    def identity(self) -> dict[str, Any]:
        """See :meth:`train.data.batch.SampleSource.identity`."""
        return {"fingerprint": self.fingerprint}

    def batch_order(self, settings: OrderSettings) -> BatchOrder:
        """See :meth:`train.data.batch.SampleSource.batch_order`."""
        order = SampleOrder(self.shard_sizes, fingerprint=self.fingerprint, settings=settings)
        return EpochOrder(order, settings)

    def shard_name(self, shard: int) -> str:
        """Return the session's name."""
        return self._scans[shard].session

    def key(self, shard: int, row: int) -> str:
        """Return SESSION/WINDOW."""
        return f"{self._scans[shard].session}/{self._windows[shard][row].index:06d}"

    def start_s(self, shard: int, row: int) -> float:
        """Return when the window starts on the session clock."""
        return self._windows[shard][row].start_s

    def present(self, shard: int, row: int) -> tuple[Stream, ...]:
        """Return the streams that the sample has."""
        return self._scans[shard].present(self._windows[shard][row], self.recipe)

    def reader(self, shard: int) -> SessionReader:
        """Return the reader of one session; open it if necessary."""
        if shard not in self._open:
            self._open[shard] = SessionReader(
                self._folders[shard],
                self._scans[shard],
                recipe=self.recipe,
                tokenizer=self.tokenizer,
            )
            if len(self._open) > MAX_OPEN_SESSIONS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def prefetch_shards(self, shards: Iterable[int], streams: Collection[Stream]) -> None:
        """Do nothing: sessions are local."""

    def prefetch_samples(
        self, locations: Iterable[SampleLocation], streams: Collection[Stream]
    ) -> None:
        """Do nothing: recordings are read in order."""

    def read_into(
        self, shard: int, row: int, out: Mapping[str, NDArray[Any]], *, with_text: bool
    ) -> Text | None:
        """See :meth:`train.data.batch.SampleSource.read_into`."""
        try:
            return self._read_fields(shard, row, out, with_text=with_text)
        except (SessionError, OSError) as error:  # a missing file counts as a damaged one
            raise CorruptError(f"{self.key(shard, row)}: {error}") from error

    def _read_fields(
        self, shard: int, row: int, out: Mapping[str, NDArray[Any]], *, with_text: bool
    ) -> Text | None:
        """Do what :meth:`read_into` does; raise what the session's reader raises."""
        reader, window = self.reader(shard), self._windows[shard][row]
        present = self.present(shard, row)
        write_absent(out, (*VISION_STREAMS, *SENSOR_STREAMS, Stream.AUDIO))
        for stream in VISION_STREAMS:
            if stream in out and stream in present:
                for _, frames in reader.iter_frames(stream, [window]):
                    if np.isfinite(frames.error_s).any():
                        write_rgb(frames.pictures, out[stream])
                        out[f"{stream}_valid"][...] = np.isfinite(frames.error_s)
        if any(s in out and s in present for s in SENSOR_STREAMS):
            sensors = reader.read_sensors(window)
            for stream, values in (
                (Stream.TOUCH, sensors.touch),
                (Stream.PROPRIO, sensors.proprio),
            ):
                if stream in out and stream in present:
                    write_numbers(out, stream, values)
        if Stream.AUDIO in out and Stream.AUDIO in present:
            write_mel(out, reader.read_mel(window))
        if with_text and any(s in present for s in TEXT_STREAMS):
            return reader.read_text(window)
        return None

    def _add_session(self, folder: Path) -> None:
        """Add a session's usable windows; note why the others are rejected."""
        scan = scan_session(folder, recipe=self.recipe)
        session_reason = scan.session_rejection(self.recipe)
        windows = scan.windows(self.recipe)
        reasons = [scan.rejection(window, self.recipe) for window in windows]
        kept = [w for w, reason in zip(windows, reasons, strict=True) if reason is None]
        if session_reason is not None or not kept:
            self.rejected[scan.session] = (
                session_reason or "no window covers enough of the required streams"
            )
            return
        self.rejected |= {
            f"{scan.session}/{w.index:06d}": reason
            for w, reason in zip(windows, reasons, strict=True)
            if reason is not None
        }
        self._folders.append(folder)
        self._scans.append(scan)
        self._windows.append(kept)


def _session_identity(scan: SessionScan) -> list[Any]:
    """Return what tells a session from all others."""
    files = {name: file.sha256 for name, file in scan.source_files.items()}
    return [scan.session, files, *([dict(scan.start_overrides)] if scan.start_overrides else [])]


class RealMultiModalDataset(Dataset[dict[str, Any]]):
    """Windows of session folders as training samples.

    Args:
        root_dir: a session folder or a folder of them.
        recipe: a recipe, its file, or None for the default one.
        config: decides which streams are read; None reads all. A TrainConfig, or its plain values
            as ``yaml.safe_load`` returns them.
        split: train or val sessions; None takes all.
        tokenizer: a tokenizer.json; None trains one on the train sessions.

    Raises:
        SessionError: no session can be used.
        ConfigError: the recipe or the tokenizer can't be used.
    """

    def __init__(
        self,
        root_dir: Path | str,
        *,
        recipe: Recipe | Path | str | None = None,
        config: TrainConfig | Mapping[str, Any] | None = None,
        split: Split | None = None,
        tokenizer: Path | str | None = None,
    ) -> None:
        if not isinstance(recipe, Recipe):
            recipe = Recipe() if recipe is None else load_recipe(recipe)
        self.config = TrainConfig() if config is None else as_train_config(config)
        self.source = SessionSource(
            root_dir,
            recipe=recipe,
            split=split,
            tokenizer=None if tokenizer is None else load_tokenizer(Path(tokenizer)),
        )
        self.shapes = WindowShapes.from_recipe(recipe, tick_rate_hz=self.config.model.tick_rate_hz)
        self._starts = np.concatenate([[0], np.cumsum(self.source.shard_sizes)])

    def __len__(self) -> int:
        """Return the number of windows."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one window as a batch of one; :func:`real_data_collate_fn` joins several.

        Raises:
            IndexError: no such window.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)} does not exist")
        index %= len(self)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        location = (shard, index - int(self._starts[shard]))
        return assemble_batch(self.source, [location], config=self.config, shapes=self.shapes)


def real_data_collate_fn(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join samples of :class:`RealMultiModalDataset` into one batch."""
    return join_batches(samples)


def _make_tokenizer(folders: Sequence[Path], recipe: Recipe) -> TextTokenizer:
    """Return the tokenizer that the shard job would train on the same sessions."""
    if recipe.text.tokenizer is not None:
        return load_tokenizer(recipe.text.tokenizer)
    texts = [
        event.text
        for folder in folders
        if assign_split(folder.name, recipe) == "train"
        for event in read_timed_lines(folder, recipe=recipe)[1]
    ]
    return train_tokenizer(texts, vocab_size=recipe.text.vocab_size)
