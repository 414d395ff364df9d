"""CheckpointManager: save a run's checkpoints, keep the newest, and survive a full disk.

Saving goes one way: ``TrainState.as_dict`` makes a dict on all ranks, ``CheckpointManager.save``
takes the dict, and the main rank writes it with ``train.checkpoints.save_checkpoint``.

If the disk is full, older step checkpoints are removed to make space for a new one. The newest
intact checkpoint is never removed: if the space does not suffice, training continues without the
new checkpoint. The final checkpoint needs no space if its step was just saved: it is a hard link.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.errors import CheckpointError, ConfigError
from shared.storage import DISK_FULL
from train.checkpoints import (
    FINAL_NAME,
    check_checkpoint,
    link_checkpoint,
    list_checkpoints,
    read_checkpoint,
    root_cause,
    save_checkpoint,
    step_in_name,
    step_name,
)
from train.machine import distributed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from train.config import CheckpointConfig

ORPHAN_AGE_S: Final = 3600.0
"""A partial file that was not written to for this long is left over from a killed run."""


class CheckpointManager:
    """Saves a run's checkpoints and prunes older ones.

    All ranks call every method; only the main rank writes.
    """

    def __init__(self, config: CheckpointConfig, *, save_interval: int) -> None:
        self._config = config
        self._save_interval = save_interval
        self.newest: Path | None = None
        """The checkpoint saved last; until then, the one that the run was resumed from."""
        self.warn: Callable[[str], object] = lambda _: None
        """Called with a message when a save fails or a full disk costs older checkpoints."""
        self._is_due = False

    def is_due(self, step: int) -> bool:
        """Return whether a save is due: every ``save_interval`` steps, until it is done."""
        self._is_due |= step % self._save_interval == 0
        return self._is_due

    def save_or_warn(self, state: Mapping[str, Any]) -> None:
        """Save the checkpoint that is due; if that fails, warn and keep the older ones."""
        self._is_due = False
        try:
            self.save(state)
        except CheckpointError as error:
            newest = self.newest.name if self.newest is not None else "none was saved yet"
            self.warn(f"{error}; the newest checkpoint: {newest}")

    def save(self, state: Mapping[str, Any], *, is_pruned: bool = True) -> None:
        """Save a step checkpoint and remove those beyond ``keep_last_n``."""
        self._write(self._config.save_dir / step_name(state["step"]), state)
        if is_pruned and distributed.is_main():
            prune_checkpoints(self._config.save_dir, keep_last_n=self._config.keep_last_n)

    def save_last(
        self, state: Mapping[str, Any], *, is_complete: bool, is_pruned: bool = True
    ) -> None:
        """Save the end of a run: the final checkpoint, or the step's if the run was stopped.

        Raises:
            CheckpointError: the file could not be written; the message says what is lost.
        """
        step = state["step"]
        final = self._config.save_dir / FINAL_NAME
        try:
            if not is_complete:
                self.save(state, is_pruned=is_pruned)
            elif distributed.on_main(lambda: self._link(final, step)):
                self.newest = final
            else:
                self._write(final, state)
        except CheckpointError as error:
            newest = f"the newest checkpoint is {self.newest}" if self.newest else "nothing else is"
            raise CheckpointError(
                f"the run ended at step {step}, which is NOT saved; {newest}. {error}; then resume "
                "the run with `--resume`"
            ) from error

    def _write(self, path: Path, state: Mapping[str, Any]) -> None:
        """Write a checkpoint on the main rank; say which older ones a full disk cost."""
        removed: list[Path] = []
        try:
            self.newest = distributed.on_main(lambda: save_making_room(path, state, removed))
        finally:
            if removed:
                names = ", ".join(each.name for each in removed)
                self.warn(f"the disk is full: removed {names} to make room for {path.name}")

    def _link(self, final: Path, step: int) -> bool:
        """Link the final checkpoint to its step's, if that was just saved; return whether."""
        newest_step = final.with_name(step_name(step))
        if self.newest != newest_step:
            return False
        try:
            link_checkpoint(newest_step, final)
        except OSError:
            return False
        return True


def prepare_folder(folder: Path | str) -> None:
    """Create the folder of a run's checkpoints and check that it is writable."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{folder}: checkpoints cannot be written there ({root_cause(error)}); fix: set "
            "training.checkpointing.save_dir to a writable folder"
        ) from error


def check_writable(folder: Path) -> None:
    """Check as :func:`prepare_folder` does, and remove the folders that this created."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        prepare_folder(folder)
    finally:
        # Deepest first; a folder that another process has written to meanwhile stays.
        for each in new:
            with contextlib.suppress(OSError):
                each.rmdir()


def refuse_checkpoints(folder: Path) -> None:
    """Keep a new run from overwriting and pruning another run's checkpoints."""
    if existing := list_checkpoints(folder):
        names = ", ".join(sorted(path.name for path in existing)[:3])
        raise ConfigError(
            f"{folder} already holds a run's checkpoints ({names}), which a new run would "
            "overwrite; fix: continue that run with `--resume auto`, set "
            "training.checkpointing.save_dir to another folder, or remove them"
        )


def save_making_room(path: Path, state: Mapping[str, Any], removed: list[Path]) -> Path:
    """Save a checkpoint; if the disk is full, remove older ones and try again.

    `removed`: the removed files are added here, even if the second attempt fails.
    """
    try:
        return save_checkpoint(path, state)
    except CheckpointError as error:
        if not _is_disk_full(error) or not (freed := make_room(path.parent)):
            raise
    removed += freed
    return save_checkpoint(path, state)


def find_latest_checkpoint(
    folder: Path | str, *, on_skip: Callable[[str], object] = lambda _: None
) -> Path | None:
    """Find the newest intact checkpoint of a folder, which may be missing, by its "saved_at".

    `on_skip` gets a message for each damaged or foreign file that may be newer.
    """
    by_age: list[tuple[float, int, bool, Path]] = []
    for path in list_checkpoints(Path(folder)):
        try:
            header = read_checkpoint(path, map_location="meta", mmap=True)
            is_final = path.name == FINAL_NAME  # often a second name of the last step's file
            by_age.append((float(header["saved_at"]), int(header["step"]), is_final, path))
        except CheckpointError as error:
            on_skip(f"skipped: {error}")
    # Checksums are compared from the newest file on, until one is intact: reading takes long.
    for *_, path in sorted(by_age, reverse=True):
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            on_skip(f"skipped: {error}")
        else:
            return path
    return None


def prune_checkpoints(folder: Path | str, *, keep_last_n: int) -> list[Path]:
    """Remove all but the newest `keep_last_n` step checkpoints, and partial files of killed runs.

    The final checkpoint and every other file stay.
    """
    folder = Path(folder)
    return _remove([*_steps_by_age(folder)[:-keep_last_n], *_orphans(folder)])


def make_room(folder: Path) -> list[Path]:
    """Remove all step checkpoints but the newest intact one, and partial files of killed runs.

    Nothing is removed if no step checkpoint is intact. Returns the removed files.
    """
    steps = _steps_by_age(folder)
    kept = next((path for path in reversed(steps) if _is_intact(path)), None)
    if kept is None:
        return []
    return _remove([*(path for path in steps if path != kept), *_orphans(folder)])


def _steps_by_age(folder: Path) -> list[Path]:
    """List step checkpoints, oldest first.

    The order is by age, not by step: a new run may share the folder with an older run that had
    reached a later step.
    """
    by_age = []
    for path in list_checkpoints(folder):
        if path.name != FINAL_NAME:
            with contextlib.suppress(FileNotFoundError):  # another process prunes, too
                by_age.append((path.stat().st_mtime_ns, step_in_name(path), path))
    return [path for *_, path in sorted(by_age)]


def _is_intact(path: Path) -> bool:
    try:
        check_checkpoint(path)
        read_checkpoint(path, map_location="meta", mmap=True)
    except CheckpointError:
        return False
    return True


def _orphans(folder: Path) -> list[Path]:
    """List the partial files that are so old that their writers must have died."""
    orphans = []
    for partial in folder.glob(".model_*.pt.partial"):
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished
            if time.time() - partial.stat().st_mtime > ORPHAN_AGE_S:
                orphans.append(partial)
    return orphans


def _remove(paths: list[Path]) -> list[Path]:
    for path in paths:
        path.unlink(missing_ok=True)
    return paths


def _is_disk_full(error: BaseException | None) -> bool:
    """Return whether a full disk is among the causes of an error that torch or the OS raised."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
