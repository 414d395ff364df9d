"""What is not in the shards, and why: the lines of ``rejected.jsonl``.

Levels: "session" (none of its windows became a sample), "window", "stream" (a session or a sample
lacks a stream whose file is there), "lines" (lines or events of a file that could not be used).
Windows planned = samples + the windows of the first two.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from shared.recipe import STREAMS
from shared.shardset.layout import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from shared.recipe import Recipe
    from shared.session.scan import SessionScan


def rejected_lines(
    scans: Mapping[str, SessionScan], recipe: Recipe, losses: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Every line, in order of session name.

    Args:
        scans: every session.
        recipe: the recipe of the set.
        losses: streams of samples that turned out not to decode, from the shards' indexes.
    """
    lines: list[dict[str, Any]] = []
    for name in sorted(scans):
        lines += _session_lines(scans[name], recipe)
    lines += [{"level": "stream", **loss} for loss in losses]
    return lines


def count_windows(lines: Iterable[Mapping[str, Any]]) -> int:
    """Windows that the lines reject."""
    return sum(
        {"session": line.get("windows", 0), "window": 1}.get(line["level"], 0) for line in lines
    )


def to_jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """The file's bytes."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _session_lines(scan: SessionScan, recipe: Recipe) -> Iterator[dict[str, Any]]:
    windows = scan.windows(recipe)
    for sentence in scan.oddities:
        yield {"level": "lines", "session": scan.session, "reason": sentence}
    reason = scan.session_rejection(recipe)
    if reason is not None:
        yield {
            "level": "session",
            "session": scan.session,
            "windows": len(windows),
            "reason": reason,
        }
        return
    for stream, why in scan.absent.items():
        sources = next(c.sources for c in COLUMNS.values() if stream in c.streams)
        is_there = "no such file" not in why and "no usable reading" not in why
        if len(sources) == 1 and is_there:
            yield {"level": "stream", "session": scan.session, "stream": stream, "reason": why}
    for window in windows:
        place = {"session": scan.session, "window": window.index}
        reason = scan.rejection(window, recipe)
        if reason is not None:
            times = {"start_s": window.start_s, "stop_s": window.stop_s}
            yield {"level": "window", **place, **times, "reason": reason}
            continue
        present = scan.present(window, recipe)
        for stream, share in zip(STREAMS, scan.coverage[window.index], strict=True):
            if share > 0 and stream not in present:
                why = f"covers {share:.0%} of the window, less than window.min_coverage"
                yield {"level": "stream", **place, "stream": stream, "reason": why}
