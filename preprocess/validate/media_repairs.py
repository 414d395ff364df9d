"""Repair media files: write the right sizes into the header of a WAV file.

The sound itself is copied, so that the original can be kept.
"""

from __future__ import annotations

import functools
import os
import shutil
from typing import TYPE_CHECKING

from preprocess.validate.repair_plan import Repair, RepairKind, RepairPlan
from shared.files import BLOCK_BYTES
from shared.media.riff import corrected_head, read_wav_header

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from preprocess.validate.repair_plan import Content
    from shared.media.riff import WavHeader
    from shared.recipe import Recipe

_BYTES_PER_STAT_BLOCK = 512
_MIN_FREE_BYTES = 64 << 20
"""Space that a repair leaves on the disk."""


def plan_media(path: Path, *, recipe: Recipe) -> RepairPlan:
    """Plan to correct the headers of a session's sound files."""
    repairs: list[Repair] = []
    contents: dict[str, Content] = {}
    blocked: dict[str, str] = {}
    for name in dict.fromkeys(spec.file for spec in recipe.audios.values()):
        file = path / name
        header = read_wav_header(file) if file.is_file() else None
        if header is None or not header.is_wrong:
            continue
        stat = file.stat()
        needed = min(stat.st_size, stat.st_blocks * _BYTES_PER_STAT_BLOCK)
        free = shutil.disk_usage(path).free
        if needed + _MIN_FREE_BYTES > free:
            blocked[name] = (
                f"it needs {needed >> 20} MiB for a corrected copy, {free >> 20} MiB are free; "
                "without it, the sound is read whole all the same"
            )
            continue
        contents[name] = functools.partial(_write_corrected, file, header)
        seconds = header.num_bytes / max(1, header.bytes_per_s)
        sentence = f"{name}: wrote the size of all {seconds:.2f} s of sound into the header"
        repairs.append(Repair(RepairKind.SIZES, (name,), sentence))
    return RepairPlan(repairs=tuple(repairs), contents=contents, blocked=blocked)


def _write_corrected(path: Path, header: WavHeader, output: BinaryIO) -> None:
    """Write a sound file with right sizes; blocks of zeros stay holes."""
    with path.open("rb") as file:
        output.write(corrected_head(file, header))
        file.seek(header.start)
        remaining = header.num_bytes if header.is_last else path.stat().st_size - header.start
        hole = bytes(BLOCK_BYTES)
        while block := file.read(min(BLOCK_BYTES, remaining)):
            remaining -= len(block)
            if block == hole:
                output.seek(len(block), os.SEEK_CUR)
            else:
                output.write(block)
        if header.is_last and header.num_bytes % 2:
            output.write(b"\0")
        output.truncate()
