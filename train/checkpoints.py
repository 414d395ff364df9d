"""Read and write checkpoint files: atomic, checksummed, and readable by torch's safe default.

A checkpoint is one file that holds tensors and plain containers only, so
``torch.load(path)["step"]`` works with ``weights_only=True``. Saving writes to a temporary name in
the same folder, calls fsync, renames the file and calls fsync on the folder: under its final name a
file is either complete or absent. Loading first checks the CRC-32 of every record, because
``torch.load`` itself does not notice a flipped bit in a tensor.

Keys: format_version, step, saved_at (seconds since 1970), model, optimizer, scaler, spikes,
schedule, rng, rng_of_other_ranks, stream, config, shapes, run_name, corrupt_members, read_members,
samples_of, extra. The model and the optimizer's moments are complete, even if the ranks that saved
them held shards.

When checkpoints are saved and which of them are kept: ``train/loop/checkpoint_manager.py``.
"""

from __future__ import annotations

import contextlib
import math
import pickle  # noqa: TID251  only for the name of the error that torch's safe loader raises
import re
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from shared.errors import CheckpointError
from shared.files import write_atomic
from shared.machine import describe_disk, sync_folder, words_for
from shared.storage import DISK_FULL
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.shapes import WindowShapes

FORMAT_VERSION: Final = 2
"""Version of the keys; raised when a key changes its meaning. Files of other versions are refused.

Since version 2, "shapes" is of :meth:`train.shapes.WindowShapes.as_json` and names the streams.
"""

FINAL_NAME: Final = "model_final.pt"

REQUIRED_KEYS: Final = frozenset(
    {"format_version", "step", "saved_at", "model", "config", "shapes"}
)
"""Keys that every checkpoint has; a file that lacks one is refused."""

_VALUE_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "format_version": (int,),
    "step": (int,),
    "saved_at": (int, float),
    "model": (dict,),
    "config": (dict,),
    "shapes": (dict,),
    "extra": (dict,),
}

_USE_AN_OLDER_ONE: Final = (
    "fix: use an older checkpoint; `train run --resume auto` finds the newest intact one"
)

_USE_A_TRAINERS_FILE: Final = "fix: use a checkpoint that `python -m train run` wrote"

_STEP_NAME = re.compile(r"model_step_(\d+)\.pt")


def step_name(step: int) -> str:
    """Return the file name of the checkpoint after `step` optimizer steps."""
    return f"model_step_{step}.pt"


def step_in_name(path: Path) -> int:
    """Return the step in a checkpoint's file name, -1 for the final checkpoint."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """List the files of a folder that are named like checkpoints; [] for a missing folder."""
    if not folder.is_dir():
        return []
    return [
        path
        for path in folder.iterdir()
        if path.is_file() and (path.name == FINAL_NAME or _STEP_NAME.fullmatch(path.name))
    ]


def save_checkpoint(path: Path | str, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint file atomically.

    At every moment `path` holds either its old content or the new one.

    `state`: tensors and plain containers, with at least :data:`REQUIRED_KEYS`.

    Raises:
        CheckpointError: the file could not be written, for example because the disk is full. The
            old file is unchanged.
    """
    path = Path(path)
    if missing := REQUIRED_KEYS - state.keys():
        raise CheckpointError(f"{path}: the state to save lacks the keys {sorted(missing)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: torch.save(dict(state), file), temporary=partial_path(path))
    # torch reports a failed write as RuntimeError ("unexpected pos ...").
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint could not be written ({root_cause(error)}; "
            f"{describe_disk(path.parent)}); fix: {_fix_of_write(error)}, or set "
            "training.checkpointing.save_dir to another folder"
        ) from error
    return path


def link_checkpoint(source: Path, path: Path) -> Path:
    """Give a checkpoint a second name, which needs no disk space.

    Where the file system has no hard links, the file is copied.
    """
    partial = partial_path(path)
    try:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
            partial.hardlink_to(source)
            partial.replace(path)
            sync_folder(path.parent)
            return path
        with source.open("rb") as original:
            write_atomic(path, lambda file: shutil.copyfileobj(original, file), temporary=partial)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def partial_path(path: Path) -> Path:
    """Return the temporary name of a file that is being written."""
    return path.with_name(f".{path.name}.partial")


def load_checkpoint(
    path: Path | str, map_location: torch.device | str | None = "cpu"
) -> dict[str, Any]:
    """Check and read a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged, or another program or version wrote it.
    """
    check_checkpoint(path)
    return read_checkpoint(path, map_location=map_location)


def read_checkpoint(
    path: Path | str, *, map_location: torch.device | str | None, mmap: bool = False
) -> dict[str, Any]:
    """Read a checkpoint safely, without checking its CRC-32 checksums."""
    path = Path(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint ({root_cause(error)}); {_USE_AN_OLDER_ONE}"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain values, so this trainer did not write it; "
            f"it was not opened, because such files can run code; {_USE_A_TRAINERS_FILE}"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= REQUIRED_KEYS:
        content = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path}: not a checkpoint of this trainer: it lacks some of the keys "
            f"{sorted(REQUIRED_KEYS)} and holds {content}; {_USE_A_TRAINERS_FILE}"
        )
    _check_value_types(path, state)
    _check_version(path, state["format_version"])
    return state


def check_checkpoint(path: Path | str) -> None:
    """Read every byte of a checkpoint and compare its CRC-32 checksums, in constant memory.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_compressed(path, archive)
            damaged_record = archive.testzip()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint{_list_siblings(path)}") from error
    except IsADirectoryError as error:
        raise CheckpointError(
            f"{path}: a folder, not a checkpoint; fix: {_suggest_file_in(path)}"
        ) from error
    # zipfile raises any of these for a damaged file, depending on where the damage is.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{path}: half-written, damaged, or not a checkpoint ({error}); {_USE_AN_OLDER_ONE}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {root_cause(error)}") from error
    if damaged_record is not None:
        raise CheckpointError(
            f"{path}: damaged: record {damaged_record} does not match its checksum; "
            f"{_USE_AN_OLDER_ONE}"
        )


def _check_version(path: Path, version: int) -> None:
    """Refuse checkpoints of other versions."""
    if version != FORMAT_VERSION:
        fix = "update vr-creature" if version > FORMAT_VERSION else "train again, into a new folder"
        raise CheckpointError(
            f"{path}: checkpoint format {version}, but this software reads format "
            f"{FORMAT_VERSION}; fix: {fix}"
        )


def shape_differences(saved: WindowShapes, own: WindowShapes) -> list[str]:
    """Say by name which streams of a checkpoint differ from those here; [] if the weights fit."""
    differences = []
    if saved.tick_rate_hz != own.tick_rate_hz:
        differences.append(
            f"the checkpoint has {saved.tick_rate_hz:g} ticks per second, the run "
            f"{own.tick_rate_hz:g}"
        )
    for name in sorted({*saved.streams, *own.streams}):
        of_checkpoint, of_run = (_describe_use(name, shapes) for shapes in (saved, own))
        if of_checkpoint != of_run:
            differences.append(f"the checkpoint {of_checkpoint}, the run {of_run}")
    return differences


def _describe_use(name: str, shapes: WindowShapes) -> str:
    """Say whether a stream is an input or a target, and in which form."""
    uses = ["reads"] if name in shapes.inputs else []
    uses += ["predicts"] if name in shapes.targets.values() else []
    if not uses:
        return f"does not use {name}"
    shape = shapes.streams[name]
    size = " x ".join(map(str, shape.size))
    units = [group.unit_label and f" [{group.unit_label}]" for group in shape.values]
    pairs = zip(shape.values, units, strict=True)
    groups = " and ".join(f"{group.count} {group.type}{unit}" for group, unit in pairs)
    form = {
        Kind.VIDEO: f"{size} pixels at {shape.rate_hz:g} Hz",
        Kind.AUDIO: f"{size} channels of {shape.num_classes} levels at {shape.rate_hz:g} Hz",
        Kind.SENSOR: f"{groups} values at {shape.rate_hz:g} Hz",
        Kind.TEXT: f"{shape.num_classes} tokens",
    }[shape.kind]
    return f"{' and '.join(uses)} {name} ({form})"


def root_cause(error: BaseException) -> str:
    """Describe the innermost OSError that caused an error in one line."""
    cause = _innermost(error)
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__


def _innermost(error: BaseException) -> BaseException:
    while error.__context__ is not None and isinstance(error.__context__, OSError):
        error = error.__context__
    return error


def _check_value_types(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse values of the wrong type; a file from elsewhere can hold anything."""
    for name, types in _VALUE_TYPES.items():
        value = state.get(name)
        is_right = isinstance(value, types) or (name == "extra" and value is None)
        if not is_right or (isinstance(value, float) and not math.isfinite(value)):
            raise CheckpointError(
                f"{path}: not a checkpoint of this trainer: its {name} is {_short_repr(value)}, "
                f"expected {' or '.join(kind.__name__ for kind in types)}; {_USE_A_TRAINERS_FILE}"
            )


def _short_repr(value: object) -> str:
    """Return a short value itself, and the type of any other."""
    is_short = isinstance(value, int | float | str | None) and len(str(value)) <= 40
    return repr(value) if is_short else f"a {type(value).__name__}"


def _refuse_compressed(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse records that would grow when read, because a small file could fill the memory."""
    records = archive.infolist()
    is_compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if is_compressed or sum(record.file_size for record in records) > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its records are larger than the file, which torch.save never writes; it was "
            f"not opened, because such a file can fill the memory; {_USE_A_TRAINERS_FILE}"
        )


def _fix_of_write(error: BaseException) -> str:
    """Return what to do about the OSError that caused a failed write."""
    cause = _innermost(error)
    words = words_for(cause) if isinstance(cause, OSError) and cause.errno not in DISK_FULL else ""
    return words.rpartition("fix: ")[2] or "free disk space there"


def _list_siblings(path: Path) -> str:
    """Name the checkpoints that are in the folder of a missing one."""
    siblings = sorted(list_checkpoints(path.parent), key=step_in_name)
    if not siblings:
        return f"; there is none in {path.parent} at all"
    return f"; {path.parent} has {', '.join(p.name for p in siblings[-5:])}"


def _suggest_file_in(folder: Path) -> str:
    """Say which file to name instead of a folder."""
    files = sorted(list_checkpoints(folder), key=step_in_name)
    if not files:
        return "name a model_step_N.pt or model_final.pt; this folder has none"
    return f"name one of its files: {', '.join(p.name for p in files[-5:])}"
