"""Checkpoints: one file each, there whole or not at all, readable by torch's safe default.

``torch.load(path)["step"]`` works with ``weights_only=True``: a checkpoint holds tensors and plain
containers only. Saving is: write to a temporary name in the same folder, fsync, rename, fsync the
folder. Loading checks the CRC-32 of every record first, because ``torch.load`` itself does not
notice a flipped bit in a tensor.

Keys: format_version, step, saved_at (seconds since 1970), model, optimizer, scaler, spikes,
schedule, rng, rng_of_other_ranks, stream, config, shapes, run_name, skipped_samples, read_samples,
samples_of, extra. Model and moments are whole, however many ranks held shares of them.
"""

from __future__ import annotations

import math
import os
import pickle  # noqa: TID251  only for the name of the error that torch's safe loader raises
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from shared.errors import CheckpointError
from shared.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT_VERSION: Final = 1
"""Raised when a key changes its meaning; a newer file is refused."""

FINAL_NAME: Final = "model_final.pt"
"""File name of the checkpoint at the end of training."""

REQUIRED_KEYS: Final = frozenset(
    {"format_version", "step", "saved_at", "model", "config", "shapes"}
)
"""Keys without which a file is no checkpoint of ours."""

_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "format_version": (int,),
    "step": (int,),
    "saved_at": (int, float),
    "model": (dict,),
    "config": (dict,),
    "shapes": (dict,),
    "extra": (dict,),
}
"""What the values are that every reader looks at."""

_MEND: Final = "take an older one; `train run --resume auto` finds the newest whole one by itself"
"""What to do about a file that is not whole; it is read to go on, to infer and to ablate."""

_STEP_NAME = re.compile(r"model_step_(\d+)\.pt")


def step_name(step: int) -> str:
    """File name of the checkpoint after `step` optimizer steps."""
    return f"model_step_{step}.pt"


def save_checkpoint(path: Path | str, state: Mapping[str, Any]) -> Path:
    """Write `state` so that `path` holds, at every moment, its old content or the new one.

    Args:
        path: the file; its folder is made where it is missing.
        state: tensors and plain containers, with at least :data:`REQUIRED_KEYS`.

    Raises:
        CheckpointError: it couldn't be written, for example because the disk is full; nothing has
            changed then.
    """
    path = Path(path)
    if missing := REQUIRED_KEYS - state.keys():
        raise CheckpointError(f"{path}: the state to save lacks {sorted(missing)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: torch.save(dict(state), file), temporary=partial_of(path))
    # torch reports a failed write as RuntimeError ("unexpected pos ...").
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint couldn't be written ({reason_of(error)}; "
            f"{_free_space(path.parent)}); make "
            "room there, or set training.checkpointing.save_dir to another disk"
        ) from error
    return path


def load_checkpoint(
    path: Path | str, map_location: torch.device | str | None = "cpu"
) -> dict[str, Any]:
    """Read a whole checkpoint, checked.

    Raises:
        CheckpointError: there is none, it is damaged, it is another program's or a newer version's.
    """
    check_checkpoint(path)
    return read_checkpoint(path, map_location=map_location)


def read_checkpoint(
    path: Path | str, *, map_location: torch.device | str | None, mmap: bool = False
) -> dict[str, Any]:
    """Read a checkpoint whose bytes are known to be right, safely.

    Raises:
        CheckpointError: it doesn't open, it is another program's or a newer version's.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: damaged, or no checkpoint ({reason_of(error)}); {_MEND}"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain values, so it is not ours; it was not "
            f"opened, because "
            "such files can run code"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= REQUIRED_KEYS:
        found = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path}: no checkpoint of this trainer: it lacks some of {sorted(REQUIRED_KEYS)}; "
            f"found {found}"
        )
    _check_kinds(path, state)
    if state["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {state['format_version']}, this software reads up to "
            f"{FORMAT_VERSION}; "
            "update vr-creature"
        )
    return state


def check_checkpoint(path: Path | str) -> None:
    """Read every byte of a checkpoint against its CRC-32, in constant memory.

    Raises:
        CheckpointError: there is none, or it is damaged or no checkpoint at all.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_packed(path, archive)
            damaged = archive.testzip()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint{_neighbours(path)}") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: a folder and no checkpoint; {_inside(path)}") from error
    # zipfile answers damage with any of these, depending on where it is.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{path}: half-written, damaged, or no checkpoint ({error}); {_MEND}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {reason_of(error)}") from error
    if damaged is not None:
        raise CheckpointError(
            f"{path}: damaged: record {damaged} differs from its checksum; {_MEND}"
        )


def partial_of(path: Path) -> Path:
    """Where a file lies while it is written."""
    return path.with_name(f".{path.name}.partial")


def _check_kinds(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse values of which no trainer's checkpoint is made; a foreign file can hold anything.

    Raises:
        CheckpointError: it names the first of them.
    """
    for name, kinds in _KINDS.items():
        value = state.get(name)
        is_right = isinstance(value, kinds) or (name == "extra" and value is None)
        if not is_right or (isinstance(value, float) and not math.isfinite(value)):
            raise CheckpointError(
                f"{path}: no checkpoint of this trainer: its {name} is {_shown(value)}, expected "
                f"{' or '.join(kind.__name__ for kind in kinds)}; take one that `python -m train "
                "run` wrote"
            )


def _shown(value: object) -> str:
    """A short value itself, of others the type."""
    is_short = isinstance(value, int | float | str | None) and len(str(value)) <= 40
    return repr(value) if is_short else f"a {type(value).__name__}"


def _refuse_packed(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse records that would grow on reading; a small file could fill the memory.

    Raises:
        CheckpointError: a record is compressed, or records lie over each other.
    """
    records = archive.infolist()
    is_packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if is_packed or sum(record.file_size for record in records) > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its records are larger than the file, which torch.save never writes; it was "
            "not opened, because such a file can fill the memory"
        )


def checkpoints_in(folder: Path) -> list[Path]:
    """Files of a folder, which may be missing, that are named as checkpoints are."""
    if not folder.is_dir():
        return []
    return [
        p
        for p in folder.iterdir()
        if p.is_file() and (p.name == FINAL_NAME or _STEP_NAME.fullmatch(p.name))
    ]


def step_of(path: Path) -> int:
    """The step in a file's name, -1 for the final one."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _free_space(folder: Path) -> str:
    try:
        stats = os.statvfs(folder)
    except OSError:
        return "its folder can't be examined"
    return f"{stats.f_bavail * stats.f_frsize / 2**20:,.0f} MiB free there"


def _neighbours(path: Path) -> str:
    found = sorted(checkpoints_in(path.parent), key=step_of)
    if not found:
        return f"; there is none in {path.parent} at all"
    return f"; in {path.parent} there are {', '.join(p.name for p in found[-5:])}"


def _inside(folder: Path) -> str:
    """What to take of a folder that was named in the place of a file."""
    found = sorted(checkpoints_in(folder), key=step_of)
    if not found:
        return "there is none in it either; name a model_step_N.pt or model_final.pt"
    return f"name one of those in it: {', '.join(p.name for p in found[-5:])}"


def reason_of(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""
    cause: BaseException = error
    while cause.__context__ is not None and isinstance(cause.__context__, OSError):
        cause = cause.__context__
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__
