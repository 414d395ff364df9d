"""Print validation reports as text, as a table, and as JSON lines."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Literal

import click
from rich.table import Table
from rich.text import Text

from preprocess.validate.duplicates import duplicate_findings, find_duplicates
from preprocess.validate.job import ValidatedSession, known_result, location_of
from preprocess.validate.report import ValidationReport, describe_totals
from shared.errors import EngineError, MachineError
from shared.files import fingerprint_of
from shared.session.names import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from preprocess.validate.duplicates import Signature
    from preprocess.validate.job import Job
    from preprocess.validate.page import ReportPage
    from preprocess.validate.report import Status
    from shared.recipe import Recipe

Form = Literal["table", "json"]

MAX_REPORTS = 200
"""Of more sessions, only those that did not pass are printed in full."""

_STYLES = {"passed": "green", "warnings": "yellow", "failed": "bold red", "unchecked": "magenta"}
_NO_MESSAGE = "-"


def print_report(console: Console, report: ValidationReport) -> None:
    """Print one session: its status, length, streams, and every message."""
    title = Text(f"{report.session}: ").append(report.status, style=_STYLES[report.status])
    streams = report.stats.get("streams")
    if streams:
        title.append(f"  {_length(report.stats['length_s'])}, {', '.join(streams)}")
    console.print(title, soft_wrap=True)
    _print_messages(console, report)
    checks_of: dict[str, list[str]] = {}
    for check, reason in report.not_assessed.items():
        checks_of.setdefault(reason, []).append(check)
    for reason, checks in checks_of.items():
        summary = f"  not assessed: {', '.join(checks)}: {reason}"
        console.print(Text(summary, style="dim"), soft_wrap=True)


def _print_messages(console: Console, report: ValidationReport) -> None:
    for style, label, messages in (
        (_STYLES["failed"], "error", report.errors),
        (_STYLES["warnings"], "warning", report.warnings),
        ("dim", "note", report.notes),
    ):
        for message in messages:
            line = Text("  ").append(label, style=style).append(f"  {message}")
            console.print(line, soft_wrap=True)


class ReportPrinter:
    """Prints results as they come, and remembers little of them.

    Args:
        form: None for full reports; one table at the end; or one JSON object per line.
        num_sessions: of more than MAX_REPORTS, those that passed are only counted.
    """

    def __init__(self, console: Console, *, form: Form | None, num_sessions: int) -> None:
        self._console = console
        self._form = form
        self._is_short = form is None and num_sessions > MAX_REPORTS
        self._statuses: Counter[Status] = Counter()
        self._not_assessed: Counter[str] = Counter()
        self._rows: list[tuple[str, Status, str, str, str]] = []
        self._found: dict[int, tuple[str, Signature, str]] = {}
        """Number of the job -> session, signature, and hash of all files."""
        self._length_s = 0.0
        self._num_known = 0

    def add(self, result: ValidatedSession) -> None:
        """Print a result, or keep its row of the table."""
        report = result.report
        for repair in result.repairs:
            self._console.print(f"{report.session}: {repair}", highlight=False, markup=False)
        if (verdict := result.verdict) is not None:
            content = verdict.session, verdict.signature, fingerprint_of(verdict.sha256)
            self._found[self._statuses.total()] = content
        self._statuses[report.status] += 1
        self._not_assessed.update(report.not_assessed.keys())
        self._length_s += report.stats.get("length_s", 0.0)
        self._num_known += not result.is_new
        if self._form == "json":
            line = json.dumps(report.as_dict(), ensure_ascii=False, allow_nan=False)
            click.echo(line.encode())  # UTF-8 in any locale
        elif self._form == "table":
            self._rows.append(_summary_row(report))
        elif not (self._is_short and report.status == "passed"):
            print_report(self._console, report)

    def add_duplicates(self, jobs: Sequence[Job], recipe: Recipe, page: ReportPage | None) -> None:
        """Report sessions with the same content, which are known only at the end."""
        numbers: dict[str, int] = {}
        for number, (name, _, _) in self._found.items():
            source = jobs[number].source
            if name in numbers and not isinstance(source, ValidatedSession):  # of another location
                name = f"{location_of(source).rpartition('/')[0]}/{name}"
            numbers[name] = number
        signatures = {name: self._found[number][1] for name, number in numbers.items()}
        files = {name: self._found[number][2] for name, number in numbers.items()}
        findings = duplicate_findings(find_duplicates(signatures, files=files), recipe)
        amended, lines = dict[int, ValidationReport](), {}
        for name, own in sorted(findings.items()):
            number = numbers[name]
            old = known_result(jobs[number]).report
            added = ValidationReport(session=old.session).with_findings(own)
            report = old.with_findings(own)
            self._statuses.subtract([old.status])
            self._statuses.update([report.status])
            amended[number] = report
            lines[printable(name)] = {"warnings": added.warnings, "notes": added.notes}
            if self._form == "table":
                self._rows[number] = _summary_row(report)
            elif self._form is None:
                title = f"{printable(name)}, compared with the other sessions:"
                self._console.print(Text(title), soft_wrap=True)
                _print_messages(self._console, added)
        if page is not None:
            page.amend(amended)
        if self._form == "json" and lines:
            click.echo(json.dumps({"duplicates": lines}, ensure_ascii=False).encode())

    def finish(self) -> None:
        """Print what is known at the end."""
        if self._form == "json":
            return
        totals = describe_totals(self._statuses, _length(self._length_s))
        if self._form == "table":
            self._console.print(_make_table(self._rows))
        elif self._statuses.total() == 1 and not self._num_known:
            return  # its report is all
        if counts := ", ".join(f"{check} in {n}" for check, n in self._not_assessed.items()):
            totals += f"; not assessed: {counts}"
        if self._num_known:
            was = "was" if self._num_known == 1 else "were"
            totals += f"; {self._num_known} {was} not looked at again (--all looks at all)"
        if self._is_short and self._statuses["passed"]:
            totals += "; sessions that passed are only counted (--summary lists them)"
        self._console.print(Text(totals), soft_wrap=True)

    def exit_code(self, *, strict: bool) -> int:
        """Return 1 if any session failed, else 3 if any could not be checked, else 0.

        With `strict`, warnings count as failures.
        """
        if self._statuses["failed"] or (strict and self._statuses["warnings"]):
            return EngineError.exit_code
        return MachineError.exit_code if self._statuses["unchecked"] else 0


def _summary_row(report: ValidationReport) -> tuple[str, Status, str, str, str]:
    messages = (*report.errors, *report.warnings, _NO_MESSAGE)
    streams = ", ".join(report.stats.get("streams", {})) or _NO_MESSAGE
    length = _length(report.stats.get("length_s"))
    return report.session, report.status, length, streams, messages[0]


def _make_table(rows: Iterable[tuple[str, Status, str, str, str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("session", "status", "length", "streams", "first message"):
        table.add_column(column, justify="right" if column == "length" else "left")
    for session, status, *others in rows:
        table.add_row(Text(session), Text(status, style=_STYLES[status]), *map(Text, others))
    return table


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
