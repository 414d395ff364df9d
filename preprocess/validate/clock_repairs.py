"""Repair clocks of a session, where the media leave exactly one right repair."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from preprocess.validate.line_repairs import times_of, with_time
from preprocess.validate.repair_plan import Repair, RepairKind, RepairPlan
from shared.session.alignment import STRETCH_KEY
from shared.session.folder import SESSION_INFO_FILE
from shared.session.timestamps import UNIT_TOLERANCE_S, find_wrong_lines

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.validate.line_repairs import Line, LineFile, Lines
    from shared.session.timestamps import WrongLines


def remove_jumps(
    lines: Lines, files: Mapping[str, LineFile], media_stop_s: float | None
) -> tuple[Lines, list[Repair]]:
    """Remove the jump of a clock after which the lines no longer end with the media.

    Texts in other files follow, if all that are after the session are inside it then.
    """
    repaired: Lines = dict(lines)
    repairs: list[Repair] = []
    jumps: dict[str, WrongLines] = {}
    for name, of_file in lines.items():
        timed = np.array([i for i, x in enumerate(of_file) if x.time_s is not None], dtype=np.int64)
        if files[name].sensors and len(timed):
            times_s = times_of([of_file[i] for i in timed])
            wrong = find_wrong_lines(times_s, timed, media_stop_s)
            jumps.update((name, fault) for fault in wrong if fault.jump_s)
    for name, jump in jumps.items():
        rows = np.arange(jump.first, jump.last + 1)
        repaired[name], number = _shifted(lines[name], rows, jump.jump_s, files[name])
        sentence = (
            f"{name}: subtracted {jump.jump_s:.6g} s from {number} lines after a jump of the "
            "clock; they now end with the media"
        )
        repairs.append(Repair(RepairKind.JUMP, (name,), sentence))
    jumps_s = {jump.jump_s for jump in jumps.values()}
    for name in (n for n in lines if jumps_s and files[n].is_text_file):
        (jump_s, *others) = sorted(jumps_s)
        times_s = np.array([np.nan if x.time_s is None else x.time_s for x in lines[name]])
        stop_s = (media_stop_s or 0.0) + UNIT_TOLERANCE_S
        rows = np.flatnonzero((times_s < -UNIT_TOLERANCE_S) | (times_s > stop_s))
        moved_s = times_s[rows] - jump_s
        if len(rows) and not others and ((moved_s >= 0) & (moved_s <= stop_s)).all():
            repaired[name], number = _shifted(lines[name], rows, jump_s, files[name])
            sentence = f"{name}: subtracted {jump_s:.6g} s from {number} texts after it"
            repairs.append(Repair(RepairKind.JUMP, (name,), sentence))
    return repaired, repairs


def plan_stretches(path: Path, stretches: Mapping[str, float]) -> RepairPlan:
    """Plan to declare the factors of wrong clocks in ``session.json``, beside what it has."""
    file = path / SESSION_INFO_FILE
    try:
        session_info = json.loads(file.read_bytes()) if file.exists() else {}
    except (ValueError, RecursionError):
        session_info = None
    if not stretches or not isinstance(session_info, dict):
        return RepairPlan()
    declared = {**(session_info.get(STRETCH_KEY) or {}), **stretches}
    content = json.dumps({**session_info, STRETCH_KEY: declared}, indent=2, ensure_ascii=False)
    factors = ", ".join(f"{name} by {factor:.7g}" for name, factor in stretches.items())
    sentence = (
        f"{SESSION_INFO_FILE}: declared that times are multiplied, of {factors}; delete "
        f"{STRETCH_KEY!r} if they were only stopped at another time"
    )
    return RepairPlan(
        repairs=(Repair(RepairKind.STRETCH, (SESSION_INFO_FILE,), sentence),),
        contents={SESSION_INFO_FILE: f"{content}\n".encode("utf-8", "surrogatepass")},
    )


def _shifted(
    lines: list[Line], rows: NDArray[np.int64], jump_s: float, file: LineFile
) -> tuple[list[Line], int]:
    """Return lines of which some are earlier by a number of seconds, and how many are."""
    shifted, number = list(lines), 0
    for row in rows.tolist():
        time_s = lines[row].time_s
        if time_s is not None:
            shifted[row] = with_time(lines[row], time_s - jump_s, file)
            number += 1
    return shifted, number
