"""What the tasks of a shard read: sessions, and the rows that are made of them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from preprocess.build.shards import Row
from preprocess.build.sources import require_unchanged
from shared.media.tokenizer import parse_tokenizer
from shared.session.reader import SessionReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence, Set

    from preprocess.build.shards import SessionWindows
    from preprocess.build.sources import Recording
    from shared.recipe import Recipe
    from shared.session.scan import SessionScan
    from shared.shardset.store import ShardSetStore

_NONE: Mapping[str, Set[str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContext:
    """All that a task needs besides the task itself."""

    out: ShardSetStore
    recipe: Recipe
    tokenizer_json: str
    """Empty where no text is read."""
    recordings: Mapping[str, Recording]
    """Session name -> where it lies, of the task's sessions."""
    scans: Mapping[str, SessionScan]
    old: ShardSetStore | None = None
    """Where the old shard of the task is; None where it is in `out`."""


@contextmanager
def open_sessions(
    given: TaskContext,
    sources: Mapping[str, Sequence[str]],
    *,
    elsewhere: Mapping[str, Set[str]] = _NONE,
) -> Iterator[dict[str, SessionReader]]:
    """A reader per session.

    Args:
        given: where the sessions lie.
        sources: session -> the files of it that what is written is made of.
        elsewhere: session -> those of them that other tasks have read.

    Raises:
        SessionError: one of the files went away or changed since it was scanned.
    """
    origin = "the shard set's tokenizer"
    text = given.tokenizer_json
    tokenizer = parse_tokenizer(text, origin=origin) if text else None
    with ExitStack() as stack:
        try:
            readers = {}
            for name, files in sources.items():
                needed = [f for f in files if f not in elsewhere.get(name, ())]
                path = stack.enter_context(given.recordings[name].files(needed, given.out))
                readers[name] = SessionReader(
                    path, given.scans[name], recipe=given.recipe, tokenizer=tokenizer
                )
            yield readers
        except Exception:
            # What a session that went away makes of a reader is not the cause.
            for name, files in sources.items():
                require_unchanged(given.recordings[name], files)
            raise
        for name, files in sources.items():
            require_unchanged(given.recordings[name], files)


def iter_rows(slices: Sequence[SessionWindows], given: TaskContext) -> Iterator[Row]:
    """The samples of windows, as their sessions' scans describe them."""
    number = 0
    for piece in slices:
        scan = given.scans[piece.session]
        windows = scan.windows(given.recipe)
        for index in piece.windows:
            window = windows[index]
            streams = scan.present(window, given.recipe)
            yield Row(number, piece.session, window, streams, scan.coverage[index])
            number += 1
