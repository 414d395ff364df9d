"""Reports as tables and lines of JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from preprocess.validate.console import ReportPrinter, print_report
from preprocess.validate.job import ValidatedSession
from preprocess.validate.report import ValidationReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from preprocess.validate.console import Form


def _printed(show: Callable[[Console], None]) -> str:
    out = io.StringIO()
    show(Console(file=out, width=200))
    return out.getvalue()


def _report(
    name: str, *, errors: tuple[str, ...] = (), warnings: tuple[str, ...] = ()
) -> ValidationReport:
    stats = {"length_s": 61.0, "streams": {"audio": {"start_s": 0, "stop_s": 61}}}
    return ValidationReport(session=name, errors=errors, warnings=warnings, stats=stats)


REPORTS = [
    _report("s1"),
    _report("s2", warnings=("touch[3] is off [0, 1]; fix",)),
    _report("s3", errors=("audio.wav: [red]broken[/red]; fix",)),
]


def _printer(
    reports: list[ValidationReport], form: Form | None = "table", *, num: int = 3, known: int = 0
) -> tuple[ReportPrinter, str]:
    """Print reports, the first ones of which were known before."""
    out = io.StringIO()
    printer = ReportPrinter(Console(file=out, width=200), form=form, num_sessions=num)
    for number, report in enumerate(reports):
        printer.add(ValidatedSession(report=report, is_new=number >= known))
    printer.finish()
    return printer, out.getvalue()


def exit_code_of(reports: list[ValidationReport], *, strict: bool) -> int:
    return _printer(reports)[0].exit_code(strict=strict)


def test_the_summary_is_one_table_and_totals() -> None:
    text = _printer(REPORTS)[1]
    assert [line.split()[:2] for line in text.splitlines()[1:4]] == [
        ["s1", "passed"],
        ["s2", "warnings"],
        ["s3", "failed"],
    ]
    assert text.splitlines()[-1] == "3 sessions, 3:03 min: 1 passed, 1 with warnings, 1 failed"


def test_brackets_in_messages_are_printed_as_they_are() -> None:
    text = _printed(lambda console: [print_report(console, r) for r in REPORTS] and None)
    assert "touch[3] is off [0, 1]" in text
    assert "[red]broken[/red]" in text


def test_json_lines_are_the_reports_as_dictionaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert _printer(REPORTS, "json")[1] == ""
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [r.as_dict() for r in REPORTS]
    assert set(REPORTS[0].as_dict()) == {
        "session", "status", "depth", "checks", "not_assessed", "streams", "warnings", "errors",
        "notes", "stats",
    }  # fmt: skip


def test_what_was_not_assessed_is_grouped_by_its_reason_and_changes_no_status() -> None:
    reasons = {"levels": "needs decoding", "frames": "needs decoding", "drift": "one clock"}
    report = replace(REPORTS[0], not_assessed=reasons)
    text = _printed(lambda console: print_report(console, report))
    assert [line.strip() for line in text.splitlines()[1:]] == [
        "not assessed: levels, frames: needs decoding",
        "not assessed: drift: one clock",
    ]
    assert exit_code_of([report], strict=True) == 0


def test_the_totals_count_the_sessions_that_a_check_could_not_judge() -> None:
    reasons = {"levels": "needs decoding", "drift": "one clock"}
    reports = [replace(REPORTS[0], not_assessed=dict.fromkeys(r, "")) for r in (reasons, ["drift"])]
    totals = _printer(reports)[1].splitlines()[-1]
    assert totals.endswith("2 passed; not assessed: levels in 1, drift in 2")


@pytest.mark.parametrize("is_unchecked", [False, True])
def test_a_kept_report_reads_back_as_it_was(is_unchecked: bool) -> None:
    report = ValidationReport(
        session="s",
        checks={"sound": "passed", "drift": "not assessed"},
        not_assessed={"drift": "one clock"},
        streams={"audio": "absent"},
        warnings=("w",),
        errors=("e",) if is_unchecked else (),
        notes=("n",),
        stats=REPORTS[0].stats,
        is_unchecked=is_unchecked,
        depth="quick",
    )
    assert ValidationReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_full_reports_of_several_sessions_end_with_totals() -> None:
    assert _printer(REPORTS, None)[1].splitlines()[-1] == (
        "3 sessions, 3:03 min: 1 passed, 1 with warnings, 1 failed"
    )
    assert "1 session" not in _printer(REPORTS[:1], None)[1]


def test_sessions_that_were_not_looked_at_are_counted() -> None:
    words = "2 were not looked at again (--all looks at all)"
    for form in (None, "table"):
        assert words in _printer(REPORTS, form, known=2)[1].splitlines()[-1]
    assert "1 was not looked at again" in _printer(REPORTS[:1], None, known=1)[1]


def test_of_many_sessions_those_that_passed_are_only_counted() -> None:
    text = _printer(REPORTS, None, num=201)[1]
    assert [line.split(":")[0] for line in text.splitlines() if line[0] != " "][:-1] == ["s2", "s3"]
    assert "(--summary lists them)" in text
    assert "s1" in _printer(REPORTS, None, num=200)[1]
    assert "s1" in _printer(REPORTS, "table", num=201)[1]


def test_strict_counts_warnings_as_failures() -> None:
    assert exit_code_of(REPORTS[:2], strict=False) == 0
    assert exit_code_of(REPORTS[:2], strict=True) == 1
    assert exit_code_of(REPORTS, strict=False) == 1
    assert exit_code_of(REPORTS[:1], strict=True) == 0


def test_a_session_that_could_not_be_read_is_not_failed_and_has_its_own_exit_code() -> None:
    unread = ValidationReport(session="s", errors=("s: Input/output error",), is_unchecked=True)
    assert unread.as_dict()["status"] == "unchecked"
    assert exit_code_of([REPORTS[0], unread], strict=True) == 3
    assert exit_code_of([*REPORTS, unread], strict=False) == 1
    printed = _printer([REPORTS[0], unread])[1]
    assert "1 passed, 1 that could not be checked" in printed
