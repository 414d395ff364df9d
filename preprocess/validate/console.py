"""Reports for people and machines."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

    from preprocess.validate.validate import Report, Status

_STYLES = {"passed": "green", "warnings": "yellow", "failed": "bold red"}
_TOTALS: dict[Status, str] = {
    "passed": "passed",
    "warnings": "with warnings",
    "failed": "failed",
}
_NO_MESSAGE = "-"


def print_report(console: Console, report: Report) -> None:
    """One session: its verdict, what it holds, and every message."""
    head = Text(f"{report.session}: ").append(report.status, style=_STYLES[report.status])
    console.print(head.append(f"  {_holds(report)}"), soft_wrap=True)
    for style, label, messages in (
        (_STYLES["failed"], "error", report.errors),
        (_STYLES["warnings"], "warning", report.warnings),
    ):
        for message in messages:
            line = Text("  ").append(label, style=style).append(f"  {message}")
            console.print(line, soft_wrap=True)


def print_summary(console: Console, reports: Sequence[Report]) -> None:
    """All sessions: one table, then totals."""
    table = Table(box=None, pad_edge=False)
    for column in ("session", "status", "length", "streams", "first message"):
        table.add_column(column, justify="right" if column == "length" else "left")
    for report in reports:
        messages = (*report.errors, *report.warnings, _NO_MESSAGE)
        table.add_row(
            Text(report.session),
            Text(report.status, style=_STYLES[report.status]),
            Text(_length(report.stats.get("length_s"))),
            Text(", ".join(report.stats.get("streams", {})) or _NO_MESSAGE),
            Text(messages[0]),
        )
    console.print(table)
    counts = Counter(report.status for report in reports)
    total_s = sum(report.stats.get("length_s", 0.0) for report in reports)
    totals = [f"{counts[status]} {word}" for status, word in _TOTALS.items() if counts[status]]
    sessions = "1 session" if len(reports) == 1 else f"{len(reports)} sessions"
    console.print(
        Text(f"{sessions}, {_length(total_s)}: {', '.join(totals) or 'nothing to judge'}")
    )


def to_json_lines(reports: Iterable[Report]) -> Iterator[str]:
    """Each report as one line of JSON, without the line's end."""
    for report in reports:
        yield json.dumps(report.as_dict(), ensure_ascii=False, allow_nan=False)


def has_failed(reports: Iterable[Report], *, strict: bool) -> bool:
    """Whether any session failed; with `strict`, warnings are failures."""
    return any(report.has_failed(strict=strict) for report in reports)


def _holds(report: Report) -> str:
    """Length and streams of a session in a few words."""
    streams = report.stats.get("streams")
    if not streams:
        return ""
    return f"{_length(report.stats['length_s'])}, {', '.join(streams)}"


def _length(length_s: float | None) -> str:
    """Seconds as people say them."""
    if length_s is None:
        return _NO_MESSAGE
    if length_s < 120:
        return f"{length_s:.1f} s"
    minutes, seconds = divmod(round(length_s), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} h"
        if minutes >= 60
        else (f"{minutes}:{seconds:02d} min")
    )
