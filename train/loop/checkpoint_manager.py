"""A run's folder of checkpoints: which are kept, which is the newest, what becomes of a full disk.

Where the disk is full, step checkpoints beside the newest whole one make room for a new one; the
last whole one is never removed, and training goes on without the new one if that does not suffice.
The final checkpoint takes no room where its step was just saved: it is the same file.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.errors import CheckpointError, ConfigError
from shared.files import sync_folder, write_atomic
from train.checkpoints import (
    FINAL_NAME,
    check_checkpoint,
    checkpoints_in,
    partial_of,
    read_checkpoint,
    reason_of,
    save_checkpoint,
    step_name,
    step_of,
)
from train.machine import distributed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from train.config import CheckpointConfig
    from train.loop.meter import StepMeter
    from train.loop.state import TrainState

ORPHAN_AGE_S: Final = 3600.0
"""A partial file untouched for so long belongs to a killed run."""

_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class CheckpointManager:
    """Saves a run's checkpoints and removes older ones; all ranks call it, the main one writes.

    Args:
        state: what is saved.
        config: where, and how many are kept.
    """

    def __init__(self, state: TrainState, config: CheckpointConfig) -> None:
        self._state = state
        self._config = config
        self.newest: Path | None = None
        """Of those saved here; at first that which the run goes on from."""
        self.warn: Callable[[str], None] = _say_nothing
        """Told what a full disk cost."""
        self._is_due = False

    def prepare(self) -> None:
        """See :func:`prepare_folder`."""
        distributed.on_main(lambda: prepare_folder(self._config.save_dir))

    def save_if_due(self, stream: Callable[[], Mapping[str, Any]], meter: StepMeter) -> None:
        """After a step: :meth:`save_step` at every ``save_interval``-th; where that fails, training
        goes on and the older ones stay.

        It waits for a step that is not left out: what ruined the weights may have come just before
        those that are, and older checkpoints must not go for that.
        """
        self._is_due |= self._state.step % self._state.config.training.save_interval == 0
        if not self._is_due or meter.is_in_bad_steps():
            return
        self._is_due = False
        with meter.pause():
            try:
                self.save_step(stream())
            except CheckpointError as error:
                stays = self.newest.name if self.newest is not None else "none was saved yet"
                self.warn(f"{error}; the newest checkpoint: {stays}")

    def save_step(self, stream: Mapping[str, Any], *, is_pruned: bool = True) -> None:
        """Save the step that the state is at; then there are no more than are to be kept.

        Args:
            stream: position of the batches trained on.
            is_pruned: whether older ones go.

        Raises:
            CheckpointError: it could not be written.
        """
        self._save(self._config.save_dir / step_name(self._state.step), stream)
        if is_pruned and distributed.is_main():
            prune_checkpoints(self._config.save_dir, keep_last_n=self._config.keep_last_n)

    def save_last(
        self, stream: Mapping[str, Any], *, is_complete: bool, is_pruned: bool = True
    ) -> None:
        """Save the end of a run, the final checkpoint or, where it was stopped, the step's.

        Args:
            stream: position of the batches trained on.
            is_complete: whether it was not stopped.
            is_pruned: see :meth:`save_step`.

        Raises:
            CheckpointError: it could not be written; it says what is lost.
        """
        final = self._config.save_dir / FINAL_NAME
        try:
            if not is_complete:
                self.save_step(stream, is_pruned=is_pruned)
            elif distributed.on_main(lambda: self._link(final)):
                self.newest = final
            else:
                self._save(final, stream)
        except CheckpointError as error:
            kept = f"the newest checkpoint is {self.newest}" if self.newest else "nothing else was"
            raise CheckpointError(
                f"the run ended at step {self._state.step}, which is NOT saved; {kept}. {error}; "
                "then `--resume` it"
            ) from error

    def _save(self, path: Path, stream: Mapping[str, Any]) -> None:
        removed: list[Path] = []
        write = partial(save_making_room, removed=removed)
        try:
            self.newest = self._state.save(path, stream=stream, write=write)
        finally:
            if removed:
                names = ", ".join(each.name for each in removed)
                self.warn(f"the disk is full: {names} made room for {path.name}")

    def _link(self, final: Path) -> bool:
        """Whether the final checkpoint could be made of that of its step."""
        if self.newest != final.with_name(step_name(self._state.step)):
            return False
        try:
            link_checkpoint(final.with_name(step_name(self._state.step)), final)
        except OSError:
            return False
        return True


def prepare_folder(folder: Path | str) -> None:
    """Make the folder of a run's checkpoints, and see that files can be written there.

    Raises:
        CheckpointError: they can't; better said before the first step than after the last one.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no checkpoints can be written there ({reason_of(error)}); set "
            "training.checkpointing.save_dir"
        ) from error


def refuse_checkpoints(folder: Path) -> None:
    """Keep a run that begins anew from overwriting and pruning another one's checkpoints.

    Raises:
        ConfigError: there are some.
    """
    if found := checkpoints_in(folder):
        names = ", ".join(sorted(path.name for path in found)[:3])
        raise ConfigError(
            f"{folder} has checkpoints of a run ({names}), which a new one would overwrite; go on "
            "from them by `--resume auto`, set training.checkpointing.save_dir, or remove them"
        )


def try_folder(folder: Path) -> None:
    """:func:`prepare_folder`, and no folder is left behind that was not there.

    Raises:
        CheckpointError: as there.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        prepare_folder(folder)
    finally:
        for each in new:  # the deepest first; one that another process has filled meanwhile stays
            with contextlib.suppress(OSError):
                each.rmdir()


def save_making_room(
    path: Path | str, state: Mapping[str, Any], *, removed: list[Path] | None = None
) -> Path:
    """:func:`train.checkpoints.save_checkpoint`; where the disk is full, once more with the room of
    older step checkpoints, which are added to `removed`.

    Raises:
        CheckpointError: it couldn't be written.
    """
    try:
        return save_checkpoint(path, state)
    except CheckpointError as error:
        if not _is_disk_full(error) or not (room := make_room(Path(path).parent)):
            raise
    if removed is not None:
        removed += room
    return save_checkpoint(path, state)


def link_checkpoint(source: Path, path: Path) -> Path:
    """Give a checkpoint a second name, which takes no room; a copy where files have only one.

    Raises:
        OSError: the source is gone, or the copy couldn't be written.
    """
    partial = partial_of(path)
    try:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
            partial.hardlink_to(source)
            partial.replace(path)
            sync_folder(path.parent)
            return path
        with source.open("rb") as old:
            write_atomic(path, lambda file: shutil.copyfileobj(old, file), temporary=partial)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def find_latest_checkpoint(
    folder: Path | str, *, on_skip: Callable[[str], None] | None = None
) -> Path | None:
    """The newest whole checkpoint of a folder by the time inside it; None where there is none.

    Args:
        folder: searched for model_step_N.pt and model_final.pt; may be missing.
        on_skip: called with a message for each newer file that is damaged or foreign.
    """
    dated: list[tuple[float, int, bool, Path]] = []
    for path in checkpoints_in(Path(folder)):
        try:
            head = read_checkpoint(path, map_location="meta", mmap=True)
            is_final = path.name == FINAL_NAME  # often the last step's file under a second name
            dated.append((float(head["saved_at"]), int(head["step"]), is_final, path))
        except CheckpointError as error:
            _tell(on_skip, f"skipped: {error}")
    for *_, path in sorted(dated, reverse=True):
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            _tell(on_skip, f"skipped: {error}")
        else:
            return path
    return None


def prune_checkpoints(folder: Path | str, *, keep_last_n: int) -> list[Path]:
    """Remove all but the newest `keep_last_n` step checkpoints.

    Partial files that a killed run left behind go too. The final checkpoint and every other file
    stay.

    Returns:
        What was removed.
    """
    folder = Path(folder)
    return _remove([*_steps_by_age(folder)[:-keep_last_n], *_orphans(folder)])


def make_room(folder: Path) -> list[Path]:
    """Remove all step checkpoints but the newest whole one, and what killed runs left behind.

    Returns:
        What was removed; nothing where no step checkpoint is whole.
    """
    steps = _steps_by_age(folder)
    kept = next((path for path in reversed(steps) if _is_whole(path)), None)
    if kept is None:
        return []
    return _remove([*(path for path in steps if path != kept), *_orphans(folder)])


def _steps_by_age(folder: Path) -> list[Path]:
    """Step checkpoints, the oldest first.

    By age and not by step: a fresh run may share the folder with an older one that had come
    farther.
    """
    dated = []
    for path in checkpoints_in(folder):
        if path.name != FINAL_NAME:
            with contextlib.suppress(FileNotFoundError):  # another process prunes, too
                dated.append((path.stat().st_mtime_ns, step_of(path), path))
    return [path for *_, path in sorted(dated)]


def _is_whole(path: Path) -> bool:
    try:
        check_checkpoint(path)
        read_checkpoint(path, map_location="meta", mmap=True)
    except CheckpointError:
        return False
    return True


def _orphans(folder: Path) -> list[Path]:
    return [p for p in folder.glob(".model_*.pt.partial") if _is_orphan(p)]


def _remove(paths: list[Path]) -> list[Path]:
    for path in paths:
        path.unlink(missing_ok=True)
    return paths


def _is_orphan(partial: Path) -> bool:
    """Whether nobody has written to a partial file for so long that its writer must be gone."""
    try:
        return time.time() - partial.stat().st_mtime > ORPHAN_AGE_S
    except FileNotFoundError:  # its writer has just finished
        return False


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether that is a cause, however deep, of what torch or the system raised."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _say_nothing(_: str) -> None:
    """Where nobody listens."""


def _tell(listener: Callable[[str], None] | None, message: str) -> None:
    if listener is not None:
        listener(message)
