"""Sessions read directly, by the same recipe as the shards.

It suits small data, and tests compare the shards with it.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from shared.clock import Segment
from shared.errors import ConfigError, CorruptError, SessionError
from shared.files import fingerprint_of
from shared.kinds.video import Frames
from shared.machine import raise_if_refused
from shared.media.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from shared.media.yuv import write_rgb
from shared.recipe import Recipe, Split, assign_split, load_recipe
from shared.session.folder import read_text_events, survey_sessions
from shared.session.names import session_name
from shared.session.reader import SessionReader
from shared.session.scan import SessionScan, scan_session
from shared.shardset.layout import max_run_segments
from shared.streams import Kind
from shared.timing import no_timer
from train.config import TrainConfig, as_train_config
from train.data.assembly import SegmentSource, VideoSegment, write_window
from train.data.batch import assemble_batch, join_batches
from train.data.windows import WindowGrid
from train.shapes import WindowShapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from shared.timing import OnStage
    from train.data.assembly import SegmentRange
    from train.data.batch import ReadWindow, SampleLocation

MAX_OPEN_SESSIONS: Final = 8
"""Sessions whose audio and readings stay in memory."""

MAX_SEGMENT_BYTES: Final = 128 << 20
"""Decoded segments that stay in memory, so that overlapping windows do not decode them again."""


class _Shard(NamedTuple):
    """The part of a session that a shard would hold."""

    session: int
    segments: tuple[int, ...]


class SessionSource(SegmentSource):
    """Windows of session folders; each session is a shard, or several where shards would cut it.

    Args:
        split: train or val sessions, by the same hash as the shards; None takes all.
        tokenizer: tokenizes text; None trains one on the train sessions, as the shard job does.

    Raises:
        SessionError: there is no session, or none has a usable segment.
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
        survey = survey_sessions(root_dir, recipe)
        folders = survey.folders
        self.tokenizer = tokenizer or _make_tokenizer(folders, recipe)
        if self.tokenizer.vocab_size > recipe.text.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, more than the recipe's "
                f"text.vocab_size {recipe.text.vocab_size}; fix: set text.vocab_size: "
                f"{self.tokenizer.vocab_size}"
            )
        chosen = [
            f for f in folders if split is None or assign_split(session_name(f), recipe) == split
        ]
        self._folders: list[Path] = []
        self._scans: list[SessionScan] = []
        self._shards: list[_Shard] = []
        self.rejected = {f.name: f.reason for f in survey.skipped if f.is_recording}
        """Sessions and segments (SESSION/SEGMENT) of this split that are left out, and why."""
        for folder in chosen:
            self._add_session(folder)
        if not self._folders and chosen:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.rejected.items())
            raise SessionError(f"{root_dir}: no session can be used: {reasons}")
        self.shard_sizes = np.array([len(s.segments) for s in self._shards], dtype=np.int64)
        sessions = [_session_identity(scan) for scan in self._scans]
        self.fingerprint = fingerprint_of(sessions, recipe.as_json(), self.tokenizer.sha256, split)
        self._open: OrderedDict[int, SessionReader] = OrderedDict()
        self._decoded = _SegmentCache()
        self.on_stage: OnStage = no_timer
        """Never called: reading a session has no separate stages."""

    def recorded_streams(self) -> set[str]:
        """Return the streams that some session has a valid sample of."""
        return {n for scan in self._scans for n, shares in scan.coverage.items() if any(shares)}

    def runs(self) -> list[Sequence[int]]:
        """See :class:`SegmentSource`."""
        return [_runs_of(shard.segments) for shard in self._shards]

    def segment_at(self, shard: int, row: int) -> tuple[int, float]:
        """See :class:`SegmentSource`."""
        return self._shards[shard].segments[row], self._scan(shard).duration_s

    def shard_name(self, shard: int) -> str:
        """Return the session's name."""
        return self._scan(shard).session

    def key(self, shard: int, window: int) -> str:
        """Return SESSION@FIRST_TICK."""
        return f"{self._scan(shard).session}@{self.locate(shard, window).clock_tick}"

    def reader(self, shard: int) -> SessionReader:
        """Return a shard's session, open; the least recently used ones are closed."""
        session = self._shards[shard].session
        if session not in self._open:
            while len(self._open) >= MAX_OPEN_SESSIONS:
                self._open.popitem(last=False)
            self._open[session] = SessionReader(
                self._folders[session],
                self._scans[session],
                recipe=self.recipe,
                tokenizer=self.tokenizer,
            )
        self._open.move_to_end(session)
        return self._open[session]

    def prefetch_shards(self, shards: Iterable[int]) -> None:
        """Do nothing: sessions are local."""

    def prefetch_samples(self, locations: Iterable[SampleLocation]) -> None:
        """Do nothing: recordings are read in order."""

    def read_into(self, shard: int, window: int, out: Mapping[str, NDArray[Any]]) -> ReadWindow:
        """See :meth:`train.data.batch.SampleSource.read_into`."""
        rows = self.locate(shard, window)
        read_segments = partial(self._read_segments, shard, rows.rows.start)
        return write_window(out, rows, self._layouts, read_segments=read_segments)

    def _scan(self, shard: int) -> SessionScan:
        return self._scans[self._shards[shard].session]

    def _read_segments(
        self, shard: int, first_row: int, name: str, ranges: list[SegmentRange]
    ) -> dict[int, Any]:
        """Read the segments of a stream that a window needs; see :func:`write_window`."""
        scan, numbers = self._scan(shard), self._shards[shard].segments
        segments: dict[int, Any] = {}
        missing: dict[Segment, int] = {}
        for own in ranges:
            number = numbers[first_row + own.row]
            if name not in scan.present(number):
                continue
            cached = self._decoded.get((scan.session, name, number))
            if cached is None:
                missing[Segment(number, self.recipe.segment_s)] = own.row
            else:
                segments[own.row] = _as_segment(cached)
        if not missing:
            return segments
        spec = self.recipe.streams[name]
        try:
            for segment, decoded in _READERS[spec.kind](self.reader(shard), name, list(missing)):
                segments[missing[segment]] = _as_segment(decoded)
                self._decoded.add((scan.session, name, segment.index), decoded)
        except (SessionError, OSError) as error:  # a missing file counts as a damaged one
            file = f"{scan.session}/{spec.file}"
            if isinstance(error, OSError):
                raise_if_refused(error, file)
            raise CorruptError(f"{file}: {error}", file=file) from error
        return segments

    def _add_session(self, folder: Path) -> None:
        """Add a session's usable segments; note why the others are rejected."""
        scan = scan_session(folder, recipe=self.recipe)
        session_reason = scan.session_rejection(self.recipe)
        stored = scan.stored_segments(self.recipe)
        if session_reason is not None or not stored:
            self.rejected[scan.session] = (
                session_reason or "no segment covers enough of the required streams"
            )
            return
        reasons = scan.rejections(self.recipe)
        self.rejected |= {f"{scan.session}/{i:06d}": reason for i, reason in reasons.items()}
        session = len(self._folders)
        self._folders.append(folder)
        self._scans.append(scan)
        length = max_run_segments(self.recipe)
        cuts = groupby(stored, key=lambda number: number // length)
        self._shards += [_Shard(session, tuple(numbers)) for _, numbers in cuts]


def _runs_of(segments: Sequence[int]) -> list[int]:
    """Return the length of each sequence of consecutive segments."""
    runs = groupby(enumerate(segments), key=lambda item: item[1] - item[0])
    return [sum(1 for _ in run) for _, run in runs]


class _SegmentCache:
    """The decoded segments used last, up to :data:`MAX_SEGMENT_BYTES`."""

    def __init__(self) -> None:
        self._segments: OrderedDict[tuple[str, str, int], Any] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> tuple[type[_SegmentCache], tuple[()]]:
        return _SegmentCache, ()

    def get(self, key: tuple[str, str, int]) -> Any:  # noqa: ANN401 (a segment of any kind)
        """Return a segment; None if it is not in memory."""
        if key in self._segments:
            self._segments.move_to_end(key)
        return self._segments.get(key)

    def add(self, key: tuple[str, str, int], segment: Any) -> None:  # noqa: ANN401
        """Add a segment; drop those used longest ago if they need too much memory."""
        self._segments[key] = segment
        self._bytes += _bytes_of(segment)
        while self._bytes > MAX_SEGMENT_BYTES and len(self._segments) > 1:
            _, dropped = self._segments.popitem(last=False)
            self._bytes -= _bytes_of(dropped)


def _session_identity(scan: SessionScan) -> list[Any]:
    """Return what tells a session from all others."""
    files = {name: file.sha256 for name, file in scan.source_files.items()}
    placed = [dict(values) for values in (scan.start_overrides, scan.stretches) if values]
    return [scan.session, files, *placed]


def _bytes_of(decoded: Any) -> int:  # noqa: ANN401 (a segment of any kind)
    """Return the bytes of a segment's array; a text has none."""
    return int(getattr(getattr(decoded, "pictures", decoded), "nbytes", 0))


def _as_segment(decoded: Any) -> Any:  # noqa: ANN401 (a segment of any kind)
    """Return a segment in the form of :func:`train.data.assembly.write_window`."""
    if not isinstance(decoded, Frames):
        return decoded
    return VideoSegment(
        decoded.error_s, lambda frames, out: write_rgb(decoded.pictures[frames], out)
    )


def _read_each(
    read: Callable[[SessionReader, str, Segment], Any],
    reader: SessionReader,
    name: str,
    segments: Sequence[Segment],
) -> Iterator[tuple[Segment, Any]]:
    for segment in segments:
        yield segment, read(reader, name, segment)


_READERS: Final[dict[Kind, Callable[..., Iterator[tuple[Segment, Any]]]]] = {
    Kind.VIDEO: SessionReader.iter_frames,
    Kind.AUDIO: partial(_read_each, SessionReader.read_dmel),
    Kind.SENSOR: partial(_read_each, SessionReader.read_sensor),
    Kind.TEXT: partial(_read_each, SessionReader.read_text),
}
"""How the segments of each kind are read; a segment of which no picture decodes is left out."""


class RealMultiModalDataset(Dataset[dict[str, Any]]):
    """Windows of session folders as training samples.

    Args:
        root_dir: a session folder or a folder of them.
        recipe: a recipe, its file, or None for the default one.
        config: decides windows and which streams are read; None is the default one. A TrainConfig,
            or its plain values as ``yaml.safe_load`` returns them.
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
        self.shapes = WindowShapes.from_recipe(recipe, self.config)
        self.source = SessionSource(
            root_dir,
            recipe=recipe,
            split=split,
            tokenizer=None if tokenizer is None else load_tokenizer(Path(tokenizer)),
        ).open_windows(self.shapes, WindowGrid.from_config(self.config))
        self._starts = np.concatenate([[0], np.cumsum(self.source.window_counts)])

    def __len__(self) -> int:
        """Return the number of windows."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one window as a batch of one; :func:`real_data_collate_fn` joins several."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)} does not exist")
        index %= len(self)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        location = (shard, index - int(self._starts[shard]))
        return assemble_batch(self.source, [location], pixels=self.config.data.pixels)


def real_data_collate_fn(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join samples of :class:`RealMultiModalDataset` into one batch."""
    return join_batches(samples)


def _make_tokenizer(folders: Sequence[Path], recipe: Recipe) -> TextTokenizer:
    """Return the tokenizer that the shard job would train on the same sessions."""
    if recipe.text.tokenizer is not None:
        return load_tokenizer(recipe.text.tokenizer)
    names = recipe.of_kind(Kind.TEXT)
    texts = [
        event.text
        for folder in folders
        if assign_split(session_name(folder), recipe) == "train"
        for events in read_text_events(folder, recipe, names).values()
        for event in events
    ]
    return train_tokenizer(texts, vocab_size=recipe.text.vocab_size)
