"""Print validation reports as text, as a table, and as JSON lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from preprocess.validate.report import describe_totals
from shared.errors import EngineError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

    from preprocess.validate.report import ValidationReport

_STYLES = {"passed": "green", "warnings": "yellow", "failed": "bold red", "unchecked": "magenta"}
_NO_MESSAGE = "-"


def print_report(console: Console, report: ValidationReport) -> None:
    """Print one session: its status, length, streams, and every message."""
    title = Text(f"{report.session}: ").append(report.status, style=_STYLES[report.status])
    streams = report.stats.get("streams")
    content = f"{_length(report.stats['length_s'])}, {', '.join(streams)}" if streams else ""
    console.print(title.append(f"  {content}"), soft_wrap=True)
    for style, label, messages in (
        (_STYLES["failed"], "error", report.errors),
        (_STYLES["warnings"], "warning", report.warnings),
        ("dim", "note", report.notes),
    ):
        for message in messages:
            line = Text("  ").append(label, style=style).append(f"  {message}")
            console.print(line, soft_wrap=True)
    checks_of: dict[str, list[str]] = {}
    for check, reason in report.not_assessed.items():
        checks_of.setdefault(reason, []).append(check)
    for reason, checks in checks_of.items():
        line = Text(f"  not assessed: {', '.join(checks)}: {reason}", style="dim")
        console.print(line, soft_wrap=True)


def print_summary(console: Console, reports: Sequence[ValidationReport]) -> None:
    """Print all sessions: one table, then totals."""
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
    total_s = sum(report.stats.get("length_s", 0.0) for report in reports)
    statuses = [report.status for report in reports]
    console.print(Text(describe_totals(statuses, _length(total_s))))


def to_json_lines(reports: Iterable[ValidationReport]) -> Iterator[str]:
    """Yield each report as one line of JSON, without a line break."""
    for report in reports:
        yield json.dumps(report.as_dict(), ensure_ascii=False, allow_nan=False)


def exit_code_of(reports: Sequence[ValidationReport], *, strict: bool) -> int:
    """Return 1 if any session failed, else 3 if any could not be checked, else 0.

    With `strict`, warnings count as failures.
    """
    if any(report.has_failed(strict=strict) for report in reports):
        return EngineError.exit_code
    return MachineError.exit_code if any(report.is_unchecked for report in reports) else 0


def _length(duration_s: float | None) -> str:
    """Format a length, from two minutes on with minutes and hours."""
    if duration_s is None:
        return _NO_MESSAGE
    if duration_s < 120:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} h"
        if minutes >= 60
        else (f"{minutes}:{seconds:02d} min")
    )
